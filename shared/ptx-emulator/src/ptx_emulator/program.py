"""A kernel in the form the runtime executes, made from its syntax tree."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from ptx_emulator.errors import UnsupportedInstruction
from ptx_emulator.lower.availability import missing
from ptx_emulator.lower.context import FormError, Lowering, Op, Use, Value
from ptx_emulator.lower.early_uses import guard_early_uses
from ptx_emulator.lower.flow import blocks_of, fill_meeting_points, resolve_targets
from ptx_emulator.lower.registers import allocate
from ptx_emulator.lower.registry import find
from ptx_emulator.ptx.module import Function, Instruction, Label, Location, Module, Variable

INSTRUCTION = np.dtype(
    [
        ("operation", "<u4"),
        ("first_arg", "<u4"),
        ("num_args", "<u4"),
        ("guard", "<i4"),
        ("guard_negated", "<u4"),
        ("aligned", "<u4"),
        ("op_class", "<u4"),
        ("line", "<u4"),
    ]
)
CONSTANT = np.dtype([("slot", "<u4"), ("bits", "<u4"), ("value", "<u8"), ("high", "<u8")])


@dataclass
class Program:
    """A lowered kernel.

    `specials` are (slot, bits, name of the special register, number after its colon). `op_classes` are the
    names that the classes of `code` count in, `locations` the source of a PTX line where the PTX says it.
    """

    name: str
    function: Function
    code: np.ndarray
    args: np.ndarray
    constants: np.ndarray
    specials: list[tuple[int, int, str, int]]
    op_classes: list[str]
    locations: dict[int, Location]
    register_bytes: int
    local_bytes: int
    shared_base: int
    static_shared_bytes: int
    parameter_bytes: int
    sets_registers: bool  # has a setmaxnreg


def lower(
    module: Module,
    function: Function,
    symbols: dict[str, int],
    operations: dict[str, int],
    shared_base: int = 0,
) -> Program:
    """Lowers one kernel, for the `.target` of its module.

    Args:
        symbols: addresses of the module's global and constant variables.
        operations: index of each operation of the runtime.
        shared_base: address where shared memory begins that is the kernel's own.

    Raises:
        UnsupportedInstruction: the first instruction, or form of one, that the emulator does not know or the
            target does not have.
    """
    shared, shared_end = _lay_out(
        [v for v in (*module.variables, *function.variables) if v.space == "shared"], shared_base
    )
    local, local_bytes = _lay_out([v for v in function.variables if v.space == "local"])
    ctx = Lowering(function, module.target, symbols, shared, local)
    locations: dict[int, Location] = {}
    for item in function.body:
        if isinstance(item, Label):
            ctx.labels[item.name] = len(ctx.ops)
            continue
        if item.location is not None:
            locations[item.line] = item.location
        lower_instruction(ctx, item)
    ctx.begin(Instruction("exit", (), (), function.line), "control")
    ctx.emit("exit")
    resolve_targets(ctx.ops, ctx.labels)
    blocks = blocks_of(ctx.ops)
    fill_meeting_points(ctx.ops, blocks)
    allocation = allocate(ctx.ops, blocks, [*ctx.constants, *ctx.specials])
    guard_early_uses(ctx.ops, blocks, operations)
    code, args, op_classes = _pack(ctx.ops, allocation.slots, operations, function.name)
    constants = [
        (allocation.slots[value], value.bits, bits & (2**64 - 1), bits >> 64)
        for value, bits in ctx.constants.items()
    ]
    last = function.parameters[-1] if function.parameters else None
    return Program(
        name=function.name,
        function=function,
        code=code,
        args=args,
        constants=np.array(constants, dtype=CONSTANT),
        specials=[_special(allocation.slots[v], v, name) for v, name in ctx.specials.items()],
        op_classes=op_classes,
        locations=locations,
        register_bytes=allocation.register_bytes,
        local_bytes=local_bytes,
        shared_base=shared_base,
        static_shared_bytes=shared_end - shared_base,
        parameter_bytes=last.offset + last.bytes if last else 0,
        sets_registers=any(op.name == "setmaxnreg" for op in ctx.ops),
    )


def lower_instruction(ctx: Lowering, instruction: Instruction) -> None:
    """Lowers one instruction.

    Raises:
        UnsupportedInstruction: it is not known, or not in this form.
        RuntimeError: an error of the emulator itself, from the exception that it is.
    """
    found = find(instruction)
    if found is None:
        raise UnsupportedInstruction(instruction.name, instruction.line, ctx.function.name)
    ctx.begin(instruction, found.class_of(instruction))
    needs = missing(instruction, ctx.target)
    if needs is not None:
        raise ctx.unsupported(f".target {ctx.target} does not have it, it needs {needs}")
    try:
        found.lower(ctx, instruction)
    except UnsupportedInstruction:
        raise
    except FormError as error:
        raise ctx.unsupported(str(error)) from error
    except Exception as error:
        place = f"PTX line {instruction.line} of {ctx.function.name}"
        raise RuntimeError(f"error of the emulator at {place}: {instruction}") from error


def _special(slot: int, value: Value, name: str) -> tuple[int, int, str, int]:
    kind, _, number = name.partition(":")
    return slot, value.bits, kind, int(number or 0)


def _lay_out(variables: list[Variable], first: int = 0) -> tuple[dict[str, int], int]:
    """Offsets of variables from `first` on, and the end of those with a size.

    An `.extern` array comes last.
    """
    offsets, at = {}, first
    for variable in sorted(variables, key=lambda v: v.extern):
        start = -(-at // variable.align) * variable.align
        offsets[variable.name] = start
        if variable.bytes:
            at = start + variable.bytes
    dynamic = [offsets[v.name] for v in variables if v.extern]
    return offsets, max([at, *dynamic])


def _pack(
    ops: list[Op], slots: dict[Value, int], operations: dict[str, int], name: str
) -> tuple[np.ndarray, np.ndarray, list[str]]:
    code = []
    args: list[int] = []
    classes: dict[str, int] = {}
    for op in ops:
        if op.name not in operations:
            raise UnsupportedInstruction(op.name, op.line, name, "the runtime has no such operation")
        first = len(args)
        for arg in op.args:
            assert not isinstance(arg, str)
            args.append(slots[arg.value] if isinstance(arg, Use) else int(arg) & 0xFFFFFFFF)  # type: ignore[arg-type]
        guard = slots[op.guard.value] if op.guard is not None else -1
        op_class = classes.setdefault(op.op_class, len(classes))
        code.append(
            (operations[op.name], first, len(op.args), guard, op.guard_negated, op.aligned, op_class, op.line)
        )
    return np.array(code, dtype=INSTRUCTION), np.array(args, dtype=np.uint32), list(classes)
