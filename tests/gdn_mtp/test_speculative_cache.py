"""The cache itself: sizes, memory, slots that move, a pool that moves, saving and loading."""

import copy
import io

import gdn_mtp
import pytest
import torch
from gdn_mtp.speculative import CacheTensors
from gdn_support import BF16, DEVICE, FP16, FP32, assert_same_bits
from kernel_dispatch import ArgumentError, ArgumentTypeError, bind, debug
from speculative_support import History, Setup, index_tensor, int32

SETUP = Setup()
SIZES = {"pool_size": 5, "H": 2, "HV": 4, "K": 16, "V": 8, "max_tokens": 4}


def make(**changes):
    options = {**SIZES, "device": DEVICE, **changes}
    return gdn_mtp.SpeculativeCache(**options)


@pytest.mark.parametrize(
    ("max_tokens", "capacity"), [(1, 8), (2, 8), (3, 16), (4, 16), (5, 16), (8, 24), (9, 32), (16, 32)]
)
def test_default_capacity(max_tokens, capacity):
    assert make(max_tokens=max_tokens).capacity == capacity


@pytest.mark.parametrize("io", [BF16, FP16, FP32])
def test_tensors_are_what_the_specs_say(io):
    cache = make(io_dtype=io)
    named = {f"cache.{name}": tensor for name, tensor in cache.state_dict().items()}
    assert [spec.name for spec in cache.specs] == list(named)
    sizes = bind(cache.specs, named, device=DEVICE)
    assert sizes == {"pool": 5, "capacity": 16, "H": 2, "K": 16, "HV": 4, "V": 8}
    assert cache.keys.dtype == io
    assert cache.nbytes == sum(tensor.nbytes for tensor in cache.tensors)
    assert all((tensor == 0).all() for tensor in cache.tensors)
    assert "capacity=16" in repr(cache)


@pytest.mark.parametrize("state", [FP32, BF16])
@pytest.mark.parametrize(("HV", "part"), [(16, 14), (32, 16), (64, 16)])
def test_memory_at_8_tokens_is_a_part_of_intermediate_states(HV, part, state):
    H, D, T = 16, 128, 8
    cache = gdn_mtp.SpeculativeCache(3, H, HV, D, D, max_tokens=T, device=DEVICE)
    buffer_bytes = 3 * T * HV * D * D * state.itemsize
    assert cache.nbytes <= buffer_bytes / part
    assert cache.capacity == 3 * T


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("pool_size", 0),
        ("H", -1),
        ("HV", 3),
        ("K", 0),
        ("V", 1.5),
        ("HV", 2**24),  # 2^31 elements of updates in a slot
        ("max_tokens", 0),
        ("max_tokens", 17),
        ("max_tokens", True),
        ("capacity", 7),
        ("capacity", 33),
        ("capacity", "16"),
        ("io_dtype", torch.int8),
        ("device", "meta"),
    ],
)
def test_impossible_sizes_name_the_argument(name, value):
    with pytest.raises(ArgumentError) as raised:
        make(**{name: value})
    assert raised.value.argument == name


def test_a_slot_of_too_many_keys_names_their_heads():
    with pytest.raises(ArgumentError, match="less than 2\\^31") as raised:
        make(H=2**24, HV=2**24)
    assert raised.value.argument == "H"


def test_reset_forgets_tokens_and_keeps_the_pool():
    history = History(SETUP)
    history.verify([1, 4, 2], 4, 0)
    history.verify([1, 4, 2], 4, 1, {"num_accepted": int32([2, 3, 1])}, fold="full")
    assert history.cache.cursor[4].tolist() == [0, 3, 4, 0]
    pool = history.pool.clone()
    unchanged = history.snapshot([4])
    history.cache.reset_slots(index_tensor([4, -1]))
    unchanged()
    assert_same_bits(history.pool, pool, "pool")
    assert history.cache.cursor[4].tolist() == [0, 0, 0, 0]
    assert history.cache.live[4] == 0


@pytest.mark.parametrize("dtype", [torch.int32, torch.int64])
def test_slots_copied_all_at_once(dtype):
    """Two slots change places, a third is copied over, padding is skipped; everything goes on as before."""
    history = History(SETUP)
    history.verify([0, 1, 2, 3], 4, 0)
    history.verify([0, 1, 2, 3], 4, 1, {"num_accepted": int32([1, 2, 3, 4])}, fold="full")
    history.copy([0, 1, 3, -1, 5], [1, 0, 4, 2, -1])
    assert [history.cache.cursor[slot, 1].item() for slot in range(6)] == [2, 1, 3, 4, 4, 0]
    history.verify([0, 1, 2, 3, 4], 4, 2, {"num_accepted": int32([4, 3, 2, 1, 0])})
    history.check_against_sequential_decoding()


def test_copy_without_the_pool_leaves_the_pool():
    history = History(SETUP)
    history.verify([0], 4, 0)
    before = history.pool.clone()
    history.cache.copy_slots(index_tensor([0]), index_tensor([3]))
    assert_same_bits(history.pool, before, "pool")
    assert_same_bits(history.cache.updates[3, :4], history.cache.updates[0, :4], "updates")


@pytest.mark.parametrize(
    ("arguments", "name", "message"),
    [
        (([0, 1], [2, 2]), "dst", "slot 2 is named at 0 and at 1"),
        (([0], [6]), "dst", "6 at"),
        (([6], [0]), "src", "6 at"),
        (([0, 1], [2]), "dst", "1 slots, expected 2"),
        (([0.5], [1]), "src", "dtype"),
    ],
)
def test_copy_that_cannot_be_names_the_argument(arguments, name, message):
    history = History(SETUP)
    everything = history.snapshot([])
    src, dst = (torch.tensor(slots, device=DEVICE) for slots in arguments)
    with debug(), pytest.raises(ArgumentError, match=message) as raised:
        history.cache.copy_slots(src, dst, history.pool)
    assert raised.value.argument == name
    everything()


def test_slots_out_of_range_are_skipped_where_nobody_looks(monkeypatch):
    monkeypatch.setattr("gdn_mtp.speculative.cache.values_are_readable", lambda tensor: False)
    history = History(SETUP)
    history.verify([1, 2], 4, 0)
    unchanged = history.snapshot([3])
    history.cache.copy_slots(index_tensor([99, 1, 1]), index_tensor([2, 3, 6]), history.pool)
    history.cache.reset_slots(index_tensor([99, -3]))
    unchanged()
    assert_same_bits(history.pool[3], history.pool[1], "pool")
    assert history.cache.cursor[3].tolist() == [0, 0, 4, 0]


def test_copy_takes_the_cache_s_own_pool_only():
    history = History(SETUP)
    history.verify([1], 4, 0)
    with pytest.raises(ArgumentError, match=r"^state_pool: pool = 5, expected 6 from cache\.keys$"):
        history.cache.copy_slots(index_tensor([1]), index_tensor([2]), history.pool[:5])
    with pytest.raises(ArgumentError, match="is of the state pool at"):
        history.cache.copy_slots(index_tensor([1]), index_tensor([2]), history.pool.clone())


def test_saved_and_loaded_states_go_on():
    """What an engine does when it moves: pool and cache into other memory, on to the same result."""
    history = History(SETUP)
    history.verify([4, 0], 4, 0)
    history.verify([4, 0], 3, 1, {"num_accepted": int32([3, 1])}, fold="full")
    saved = {name: tensor.cpu().clone() for name, tensor in history.cache.state_dict().items()}
    other = SETUP.cache()
    other.load_state_dict(saved)
    pool = history.pool.clone()
    accepted, indices = int32([2, 3]), index_tensor([4, 0])
    states = gdn_mtp.materialize(pool, indices, other, accepted)
    history.commit([4, 0], {"num_accepted": accepted})
    assert_same_bits(states, history.pool[[4, 0]], "states")


@pytest.mark.parametrize(
    ("change", "error", "match"),
    [
        (lambda saved: saved.pop("live"), ArgumentError, "state_dict: entries .*expected .*'live'"),
        (lambda saved: saved.update(more=saved["live"]), ArgumentError, "state_dict: entries .*'more'"),
        (lambda saved: saved.update(live=[0] * 6), ArgumentTypeError, "live: list, expected a tensor"),
        (lambda saved: saved.update(gates=saved["gates"][:, 1:]), ArgumentError, "gates: "),
        (lambda saved: saved.update(gates=saved["gates"].to("meta")), ArgumentError, "gates: .* on meta"),
        (lambda saved: saved.update(gates=saved["gates"].to_sparse()), ArgumentError, "gates: .*sparse"),
        (lambda saved: saved.update(keys=saved["keys"].float()), ArgumentError, "keys: "),
        (
            lambda saved: saved["cursor"][2].add_(9),
            ArgumentError,
            "^cursor: slot 2: cursor length = 9, expected 0 to 8",
        ),
        (lambda saved: saved["live"][2].add_(1), ArgumentError, "^live: slot 2: live = 0x1, expected bits"),
    ],
)
def test_what_does_not_fit_is_not_loaded(change, error, match):
    cache = History(SETUP).cache
    saved = {name: tensor.clone() for name, tensor in SETUP.cache().state_dict().items()}
    saved["updates"].fill_(3.0)
    change(saved)
    with pytest.raises(error, match=match):
        cache.load_state_dict(saved)
    assert cache.updates.isnan().all()


def test_tensors_that_ask_for_gradients_are_moved_and_loaded_as_others_are():
    history = History(SETUP)
    history.verify([1, 2], 4, 0)
    history.pool.requires_grad_()
    history.copy([1], [4])
    saved = {name: tensor.clone() for name, tensor in history.cache.state_dict().items()}
    saved["updates"].requires_grad_()
    loaded = SETUP.cache()
    loaded.load_state_dict(saved)
    for own, given in zip(loaded.tensors, history.cache.tensors, strict=True):
        assert not own.requires_grad
        assert_same_bits(own, given, "loaded")


def test_memory_made_in_inference_mode_is_written_outside_of_it():
    """Where autograd refuses such a write it does so after it: a pool would be folded, its cache not."""
    history = History(SETUP)
    with torch.inference_mode():
        history.pool, history.cache = history.pool.clone(), SETUP.cache()
    assert history.pool.is_inference()
    assert history.cache.updates.is_inference()
    history.verify([1, 2, 4], 4, 0)
    history.verify([1, 2, 4], 4, 1, {"num_accepted": int32([1, 0, 4])}, fold="always")
    history.copy([2], [0])
    history.commit([1, 2, 0], {"num_accepted": int32([3, 2, 1])})
    history.cache.reset_slots(index_tensor([4]))
    assert history.cache.cursor[4].tolist() == [0, 0, 0, 0]
    history.cache.load_state_dict(SETUP.cache().state_dict())
    assert history.cache.updates.isnan().all()


def test_a_state_dict_is_a_mapping():
    with pytest.raises(ArgumentTypeError, match="state_dict: list, expected a mapping"):
        make().load_state_dict([])


@pytest.mark.parametrize(
    ("pool", "message"),
    [
        (None, "state_pool: None, expected a tensor"),
        (torch.zeros(5, 4, 8), "state_pool: shape"),
        (torch.zeros(6, 4, 8, 16), r"state_pool: pool = 6, expected 5 from cache\.keys"),
        (torch.zeros(5, 3, 8, 16), r"state_pool: HV = 3, expected 4 from cache\.updates"),
        (torch.zeros(5, 4, 8, 17), r"state_pool: K = 17, expected 16 from cache\.keys"),
        (torch.zeros(5, 4, 8, 16, dtype=FP16), "state_pool: dtype"),
        (torch.zeros(5, 4, 8, 16, device="meta"), "state_pool: on meta"),
    ],
)
def test_what_is_no_pool_is_not_bound(pool, message):
    cache = make(device="cpu")
    with pytest.raises(ArgumentError, match=message):
        cache.bind(pool)
    cache.bind(torch.zeros(5, 4, 8, 16))


def test_no_slots_and_slots_named_twice():
    history = History(SETUP)
    history.verify([1, 2], 4, 0)
    everything, none = history.snapshot([]), index_tensor([])
    history.cache.reset_slots(none)
    history.cache.copy_slots(none, none, history.pool)
    everything()
    history.cache.reset_slots(index_tensor([1, -1, 1]))  # forgetting twice is forgetting
    assert history.cache.cursor[[1, 2], 2].tolist() == [0, 4]


def test_a_cache_is_of_one_pool():
    history = History(SETUP)
    history.verify([4], 4, 0)
    moved = history.pool.clone()
    indices, everything = index_tensor([4]), history.snapshot([])
    for call in (gdn_mtp.materialize, gdn_mtp.commit):
        with pytest.raises(ArgumentError, match=r"cache: is of the state pool at .*bind"):
            call(moved, indices, history.cache, None)
    everything()
    history.cache.bind(moved)
    assert gdn_mtp.commit(moved, indices, history.cache, None) is moved


def test_a_second_cache_of_a_pool_does_not_see_what_the_first_has_pending():
    """As documented: without a commit in between, the accepted tokens are lost."""
    history = History(SETUP)
    history.verify([4], 4, 0)
    history.verify([4], 4, 1, {"num_accepted": int32([3])}, fold="full")
    other, indices = SETUP.cache(), index_tensor([4])
    before = history.pool.clone()
    assert_same_bits(gdn_mtp.materialize(history.pool, indices, other, None), before[[4]], "states")
    assert not torch.equal(gdn_mtp.materialize(history.pool, indices, history.cache, None), before[[4]])


@pytest.mark.parametrize("fold", ["auto", "full", 0])
def test_with_room_for_two_windows_every_policy_folds_at_once(fold):
    history = History(Setup(max_tokens=4, capacity=8))
    history.verify([4], 4, 0)
    history.verify([4], 4, 1, {"num_accepted": int32([1])}, fold=fold)
    assert history.cache.cursor[4, 1] == 0
    history.check_against_sequential_decoding()


ARGUMENTS = ("pool_size", "H", "HV", "K", "V", "max_tokens", "capacity", "io_dtype", "device")


@pytest.mark.parametrize("name", [*CacheTensors._fields, *ARGUMENTS])
def test_attributes_are_read_only(name):
    history = History(SETUP)
    history.verify([1], 4, 0)
    for cache in (history.cache, *(copies(history.cache) for copies in (copy.copy, copy.deepcopy))):
        value = getattr(cache, name)
        with pytest.raises(AttributeError, match=f"SpeculativeCache.{name} is read-only"):
            setattr(cache, name, value)
        assert getattr(cache, name) is value or (name == "device" and cache.device == value)
    history.cache.bind(history.pool.clone())


def test_a_copy_elsewhere_says_where_it_is():
    cache = make()
    buffer = io.BytesIO()
    torch.save(cache, buffer)
    buffer.seek(0)
    assert torch.load(buffer, map_location="meta", weights_only=False).device.type == "meta"


def test_pairs_that_are_skipped_may_name_a_slot_twice():
    history = History(SETUP)
    history.verify([0, 3], 4, 0)
    history.cache.copy_slots(index_tensor([0, -1]), index_tensor([3, 3]), history.pool)
    for tensor in (history.pool, *history.cache.tensors):
        assert_same_bits(tensor[3], tensor[0], "slot 3")
    with pytest.raises(ArgumentError, match="dst: slot 3 is named at 0 and at 1"):
        history.cache.copy_slots(index_tensor([0, 1]), index_tensor([3, 3]))


def test_tensors_have_the_documented_order():
    assert CacheTensors._fields == ("keys", "updates", "gates", "k_scale", "cursor", "live")
    assert tuple(make().state_dict()) == CacheTensors._fields
