"""Basic blocks, meeting points of branches, slots of values."""

import pytest
from ptx_emulator.lower.context import Op, Target, Use, Value
from ptx_emulator.lower.control import MEETS
from ptx_emulator.lower.flow import NEVER, blocks_of, fill_meeting_points, resolve_targets
from ptx_emulator.lower.registers import allocate, slot_bytes

P = Value("p", 1)


def op(name: str, *args: int | Use | Target, guard: Value | None = None) -> Op:
    use = Use(guard, reads=True, writes=False) if guard else None
    return Op(name, list(args), use, False, False, "test", 1)


def branch(label: str, guard: Value | None = P) -> Op:
    return op("branch", Target(label), MEETS, guard=guard)


def meeting_points(ops: list[Op], labels: dict[str, int]) -> list[int]:
    resolve_targets(ops, labels)
    fill_meeting_points(ops, blocks_of(ops))
    return [o.args[1] for o in ops if o.name == "branch"]


def test_if_else_meets_after_both():
    # 0: @p bra ELSE; 1: nop; 2: bra END; ELSE 3: nop; END 4: exit
    ops = [branch("else"), op("nop"), branch("end", None), op("nop"), op("exit")]
    assert meeting_points(ops, {"else": 3, "end": 4})[0] == 4


def test_a_loop_exit_meets_behind_the_loop():
    # LOOP 0: nop; 1: @p bra LOOP; 2: exit
    assert meeting_points([op("nop"), branch("loop"), op("exit")], {"loop": 0}) == [2]


def test_cold_code_behind_the_exit_meets_where_it_returns():
    # 0: @p bra COLD; 1: nop; BACK 2: nop; 3: exit; COLD 4: nop; 5: bra BACK
    ops = [branch("cold"), op("nop"), op("nop"), op("exit"), op("nop"), branch("back", None)]
    assert meeting_points(ops, {"cold": 4, "back": 2})[0] == 2


def test_lanes_that_exit_on_one_side_never_meet():
    # 0: @p bra END; 1: exit; END 2: exit
    assert meeting_points([branch("end"), op("exit"), op("exit")], {"end": 2}) == [NEVER]


def test_an_endless_loop_has_no_meeting_point():
    assert meeting_points([op("nop"), branch("loop"), branch("loop", None)], {"loop": 0}) == [NEVER, NEVER]


def test_a_guarded_exit_goes_on():
    blocks = blocks_of([op("exit", guard=P), op("exit")])
    assert blocks[0].successors == [1]


def read(value: Value) -> Use:
    return Use(value, reads=True, writes=False)


def written(value: Value) -> Use:
    return Use(value, reads=False, writes=True)


def slots_of(ops: list[Op], labels: dict[str, int] | None = None, fixed: tuple[Value, ...] = ()):
    resolve_targets(ops, labels or {})
    return allocate(ops, blocks_of(ops), list(fixed)).slots


def test_values_share_a_slot_only_when_one_is_dead():
    a, b, c = (Value(name, 32) for name in "abc")
    ops = [op("def", written(a)), op("use", written(b), read(a)), op("use", written(c), read(b)), op("exit")]
    slots = slots_of(ops)
    assert slots[a] != slots[b] != slots[c], "a result never overlaps what the same operation reads"
    assert slots[c] == slots[a]


@pytest.mark.parametrize(("bits", "expected"), [(1, 4), (16, 64), (32, 128), (64, 256), (128, 512)])
def test_slot_sizes(bits: int, expected: int):
    assert slot_bytes(bits) == expected


def test_widths_do_not_share():
    a, b = Value("a", 32), Value("b", 64)
    slots = slots_of([op("def", written(a)), op("use", read(a)), op("def", written(b)), op("exit")])
    assert abs(slots[a] - slots[b]) >= slot_bytes(32)


def test_a_value_of_a_loop_lives_through_it():
    # 0: a =; LOOP 1: b =; 2: use b; 3: use a; 4: @p bra LOOP; 5: c =; 6: use c; exit
    a, b, c = (Value(name, 32) for name in "abc")
    ops = [
        op("def", written(a)),
        op("def", written(b)),
        op("use", read(b)),
        op("use", read(a)),
        branch("loop"),
        op("def", written(c)),
        op("use", read(c)),
        op("exit"),
    ]
    slots = slots_of(ops, {"loop": 1})
    assert slots[a] != slots[b]


def test_a_guarded_write_keeps_the_old_value_alive():
    a, b = Value("a", 32), Value("b", 32)
    ops = [
        op("def", written(a)),
        op("def", written(b)),
        op("use", read(b)),
        op("def", written(a), guard=P),
        op("use", read(a)),
        op("exit"),
    ]
    slots = slots_of(ops)
    assert slots[a] != slots[b]


def test_fixed_values_are_never_given_away():
    k, a = Value("#1", 32), Value("a", 32)
    ops = [op("use", read(k), written(a)), op("use", read(a)), op("exit")]
    slots = slots_of(ops, fixed=(k,))
    assert slots[k] != slots[a]
