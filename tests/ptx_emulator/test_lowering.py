"""What the lowering refuses, and that it never fails in another way."""

from __future__ import annotations

import random
from collections.abc import Iterator
from dataclasses import replace

import pytest
from harness import kernel_text, run_kernel
from ptx_emulator import UnsupportedInstruction, program
from ptx_emulator.lower import registry
from ptx_emulator.lower.context import Lowering
from ptx_emulator.program import lower_instruction
from ptx_emulator.ptx.module import Address, Immediate, Instruction, Operand, Pair, Register, Symbol, Vector
from ptx_emulator.ptx.parser import parse
from test_availability import instructions

_NAMES = "%p1 %rs1 %r1 %r2 %rd1 %f1 %fd1 %rq1 %tid.x %clock64 %undeclared _"
REGISTERS = [Register(name) for name in _NAMES.split()]
FUNCTION = parse(kernel_text("", 1)).functions["kernel"]


def body(text: str) -> Instruction:
    instruction = parse(kernel_text(text, 4)).functions["kernel"].body[-2]
    assert isinstance(instruction, Instruction)
    return instruction


def operand(rng: random.Random) -> Operand:
    registers = tuple(rng.choices(REGISTERS, k=rng.choice([0, 1, 2, 4, 8])))
    return rng.choice(
        [
            rng.choice(REGISTERS),
            Immediate(rng.choice([0, -1, 3, 2.5, 2**40])),
            Vector(registers),
            Address(rng.choice(REGISTERS), rng.choice([0, -8]), registers),
            Symbol(rng.choice(["smem", "array1", "nothing"])),
            Pair(REGISTERS[0], REGISTERS[2]),
        ]
    )


def variants(instruction: Instruction, rng: random.Random, words: list[str]) -> Iterator[Instruction]:
    """The instruction with a modifier or an operand too few, too many or another."""
    modifiers, operands = instruction.modifiers, instruction.operands
    for at in range(len(modifiers) + 1):
        yield replace(instruction, modifiers=modifiers[:at] + modifiers[at + 1 :])
        yield replace(instruction, modifiers=(*modifiers[:at], rng.choice(words), *modifiers[at:]))
        yield replace(instruction, modifiers=(*modifiers[:at], rng.choice(words), *modifiers[at + 1 :]))
    for at in range(len(operands) + 1):
        yield replace(instruction, operands=operands[:at] + operands[at + 1 :])
        yield replace(instruction, operands=(*operands[:at], operand(rng), *operands[at:]))
        yield replace(instruction, operands=(*operands[:at], operand(rng), *operands[at + 1 :]))


@pytest.mark.parametrize("target", ["sm_90a", "sm_100a", "sm_120a"])
def test_a_form_that_is_not_understood_is_refused(target: str) -> None:
    rng = random.Random(1)
    known = [body(text) for text in instructions()]
    words = [*sorted({word for instruction in known for word in instruction.modifiers}), "zzz", "u128", "f8"]
    refused = accepted = 0
    for instruction in known:
        for variant in variants(instruction, rng, words):
            ctx = Lowering(FUNCTION, target, {}, {"smem": 0}, {})
            try:
                lower_instruction(ctx, variant)  # any other exception fails the test
                accepted += 1
            except UnsupportedInstruction:
                refused += 1
    assert refused > accepted > 0


def test_an_error_of_the_emulator_is_not_called_a_refusal(monkeypatch: pytest.MonkeyPatch) -> None:
    def fails(ctx: Lowering, instruction: Instruction) -> None:
        raise KeyError("oops")

    monkeypatch.setattr(program, "find", lambda instruction: registry.Lowered(fails, "integer"))
    with pytest.raises(RuntimeError, match=r"PTX line \d+ of kernel: mov\.u32 %r1, %tid\.x;") as caught:
        run_kernel("")
    assert isinstance(caught.value.__cause__, KeyError)


@pytest.mark.parametrize(
    "text",
    [
        "ld.global.v2.b32 {%r1, %r2}, [%rd1+16];",
        "cp.async.bulk.tensor.1d.global.shared::cta.tile.bulk_group [%rd1, {%r1}], [smem+8];",
        "elect.sync %r2|%p1, -1;",
        "@!%p1 fma.rn.f32 %f1, 0f3F800000, %f2, 0d3FF0000000000000;",
        "selp.b32 %r1, %r2, 7, %p1;",
        "bar.sync 0;",
    ],
)
def test_instructions_as_text(text: str) -> None:
    assert str(body(text)) == text
