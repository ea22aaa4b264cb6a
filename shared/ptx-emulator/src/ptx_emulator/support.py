"""Which instructions the emulator supports, and which of a module it does not."""

from __future__ import annotations

from collections.abc import Iterator

from ptx_emulator.errors import UnsupportedInstruction
from ptx_emulator.lower.context import Lowering
from ptx_emulator.lower.registry import opcodes
from ptx_emulator.machine import operations
from ptx_emulator.program import lower_instruction
from ptx_emulator.ptx.module import Function, Instruction, Module
from ptx_emulator.ptx.parser import parse
from ptx_emulator.targets import check_runs_on


def opcode_table() -> str:
    """The opcodes that are supported, by instruction class."""
    classes: dict[str, list[str]] = {}
    for opcode, op_classes in opcodes().items():
        for op_class in op_classes:
            classes.setdefault(op_class, []).append(opcode)
    width = max(map(len, classes))
    return "\n".join(f"{name:<{width}}  {' '.join(found)}" for name, found in sorted(classes.items()))


def unsupported(text: str, device: str | None = None) -> list[UnsupportedInstruction]:
    """The instructions of a PTX module that the emulator does not run; of equal ones the first.

    Raises:
        EmulatorError: PTX for its `.target` does not run on the device at all.
    """
    module = parse(text)
    check_runs_on(module.target, device or module.target)
    found: dict[str, UnsupportedInstruction] = {}
    for function in module.functions.values():
        for error in _unsupported_of(module, function):
            found.setdefault(error.name, error)
    return list(found.values())


def _unsupported_of(module: Module, function: Function) -> Iterator[UnsupportedInstruction]:
    variables = [*module.variables, *function.variables]
    names = {space: {v.name: 0 for v in variables if v.space in spaces} for space, spaces in _SPACES.items()}
    ctx = Lowering(function, module.target, names["global"], names["shared"], names["local"])
    for item in function.body:
        if not isinstance(item, Instruction):
            continue
        first = len(ctx.ops)
        try:
            lower_instruction(ctx, item)
        except UnsupportedInstruction as error:
            yield error
            continue
        for op in ctx.ops[first:]:
            if op.name not in operations():
                why = f"the runtime has no operation {op.name}"
                yield UnsupportedInstruction(item.name, item.line, function.name, why)
                break


_SPACES = {"global": ("global", "const"), "shared": ("shared",), "local": ("local",)}
