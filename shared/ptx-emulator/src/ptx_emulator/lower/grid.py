"""Instructions about the grid: dependent launch, cluster launch control, registers of a warp group, sleep."""

from __future__ import annotations

from ptx_emulator.lower.context import Lowering
from ptx_emulator.lower.modifiers import Modifiers, operands
from ptx_emulator.lower.registry import lowers
from ptx_emulator.lower.spaces import GENERIC, SHARED
from ptx_emulator.ptx.module import Immediate, Instruction, Vector

MIN_REGISTERS, MAX_REGISTERS, REGISTER_STEP = 24, 256, 8  # of setmaxnreg
DIMENSIONS = {"get_first_ctaid::x": 0, "get_first_ctaid::y": 1, "get_first_ctaid::z": 2}


@lowers("griddepcontrol", op_class="grid")
def lower_griddepcontrol(ctx: Lowering, instruction: Instruction) -> None:
    modifiers = Modifiers(ctx, instruction)
    what = modifiers.take("wait", "launch_dependents")
    modifiers.done()
    if what is None:
        raise ctx.unsupported("one of .wait and .launch_dependents was expected")
    operands(ctx, instruction, 0)
    ctx.emit(f"griddepcontrol.{what}")


@lowers("setmaxnreg", op_class="control")
def lower_setmaxnreg(ctx: Lowering, instruction: Instruction) -> None:
    modifiers = Modifiers(ctx, instruction)
    action = modifiers.take("inc", "dec")
    if action is None or not (modifiers.has("sync") and modifiers.has("aligned")):
        raise ctx.unsupported(".inc or .dec, .sync and .aligned are needed")
    if modifiers.type() != "u32":
        raise ctx.unsupported("the type must be .u32")
    modifiers.done()
    (count,) = operands(ctx, instruction, 1)
    value = count.value if isinstance(count, Immediate) else None
    if not isinstance(value, int) or not MIN_REGISTERS <= value <= MAX_REGISTERS or value % REGISTER_STEP:
        raise ctx.unsupported(
            f"the count must be a multiple of {REGISTER_STEP} from {MIN_REGISTERS} to {MAX_REGISTERS}"
        )
    ctx.emit("setmaxnreg", value, int(action == "inc"))


@lowers("nanosleep", op_class="control")
def lower_nanosleep(ctx: Lowering, instruction: Instruction) -> None:
    modifiers = Modifiers(ctx, instruction)
    if modifiers.type() != "u32":
        raise ctx.unsupported("the type must be .u32")
    modifiers.done()
    (duration,) = operands(ctx, instruction, 1)
    ctx.emit("nanosleep", ctx.src(duration, "u32"))


@lowers("pmevent", op_class="control")
def lower_pmevent(ctx: Lowering, instruction: Instruction) -> None:
    modifiers = Modifiers(ctx, instruction)
    modifiers.has("mask")
    modifiers.done()
    operands(ctx, instruction, 1)
    ctx.emit("pmevent")


@lowers("clusterlaunchcontrol.try_cancel", op_class="grid")
def lower_try_cancel(ctx: Lowering, instruction: Instruction) -> None:
    modifiers = Modifiers(ctx, instruction)
    modifiers.has("try_cancel")
    space = SHARED if modifiers.has("shared::cta") else GENERIC
    multicast = modifiers.has("multicast::cluster::all")
    if not (
        modifiers.has("async") and modifiers.has("mbarrier::complete_tx::bytes") and modifiers.has("b128")
    ):
        raise ctx.unsupported(".async, .mbarrier::complete_tx::bytes and .b128 are needed")
    modifiers.done()
    address, mbarrier = operands(ctx, instruction, 2)
    ctx.emit(
        "clusterlaunchcontrol.try_cancel",
        *ctx.address(address),
        *ctx.address(mbarrier),
        space,
        int(multicast),
    )


@lowers("clusterlaunchcontrol.query_cancel", op_class="grid")
def lower_query_cancel(ctx: Lowering, instruction: Instruction) -> None:
    modifiers = Modifiers(ctx, instruction)
    modifiers.has("query_cancel")
    if modifiers.type() != "b128":
        raise ctx.unsupported("the type of the response must be .b128")
    result, response = operands(ctx, instruction, 2)
    handle = ctx.src(response, "b128")
    if modifiers.has("is_canceled"):
        if not modifiers.has("pred"):
            raise ctx.unsupported("the type of the result must be .pred")
        modifiers.done()
        ctx.emit("clusterlaunchcontrol.is_canceled", ctx.dst(result, "pred"), handle)
        return
    one = modifiers.take(*DIMENSIONS)
    if not modifiers.has("b32"):
        raise ctx.unsupported("the type of the result must be .b32")
    if one is not None:
        modifiers.done()
        ctx.emit("clusterlaunchcontrol.first_ctaid", ctx.dst(result, "b32"), handle, DIMENSIONS[one])
        return
    if not (modifiers.has("get_first_ctaid") and modifiers.has("v4")):
        raise ctx.unsupported("one of .is_canceled and .get_first_ctaid was expected")
    modifiers.done()
    if not isinstance(result, Vector) or len(result.elements) != 4:
        raise ctx.unsupported("the result must be a vector of four")
    for dimension, element in enumerate(result.elements):
        ctx.emit("clusterlaunchcontrol.first_ctaid", ctx.dst(element, "b32"), handle, dimension)
