"""Misuse: refused by name where it can be seen, and never the ruin of another slot where it cannot."""

import copy
import pickle
import random

import gdn_mtp
import pytest
import torch
from gdn_mtp.speculative.torch_kernel import KERNEL
from gdn_support import BF16, DEVICE, FP16, FP32, NAN, assert_same_bits
from hypothesis import given, settings
from hypothesis import strategies as st
from kernel_dispatch import Arch, ArgumentError, debug
from speculative_support import History, Setup, index_tensor, int32, said

SETUP = Setup()
SLOTS = [4, -1, 0]
HEAD_DIM = 64 if DEVICE.type == "cuda" else 8  # what the kernels for GPUs take


def prepared():
    """A history whose slots 4 and 0 have pending tokens and windows of 3."""
    history = History(SETUP)
    history.verify(SLOTS, 4, 0)
    history.verify(SLOTS, 3, 1, {"num_accepted": int32([2, 0, 4])}, fold="full")
    return history


def arguments(history, **changes):
    tokens = SETUP.tokens(3, 4, seed=2)
    heads = SETUP.heads()
    given = {**tokens, **heads, "state_pool": history.pool, "state_indices": index_tensor(SLOTS)}
    return {**given, "cache": history.cache, "num_accepted": None, **changes}


def assert_refused(history, name, match, **changes):
    everything = history.snapshot([])
    with debug(), pytest.raises(ArgumentError, match=match) as raised:
        gdn_mtp.verify(**arguments(history, **changes))
    assert raised.value.argument == name
    everything()


BAD_VALUES = {
    "more accepted than verified": ("num_accepted", {"num_accepted": int32([3, 0, 4])}, r"4 at \[2\]"),
    "negative acceptance": ("num_accepted", {"num_accepted": int32([-1, 0, 0])}, r"-1 at \[0\]"),
    "node not verified": ("accepted_nodes", {"accepted_nodes": int32([[0, 3]] * 3)}, r"3 at \[0, 1\]"),
    "nodes out of order": ("accepted_nodes", {"accepted_nodes": int32([[1, 0]] * 3)}, "expected a path"),
    "node twice": ("accepted_nodes", {"accepted_nodes": int32([[1, 1]] * 3)}, "expected a path"),
    "too many tokens": ("num_tokens", {"num_tokens": int32([5, 0, 0])}, "expected 0 to T = 4"),
    "negative tokens": ("num_tokens", {"num_tokens": int32([1, 0, -1])}, r"-1 at \[2\]"),
    "parent after its child": (
        "parent_indices",
        {"parent_indices": int32([[-1, 1, 0, 0]] * 3)},
        r"1 at \[0, 1\], expected -1 to 0",
    ),
    "parent beyond the root": ("parent_indices", {"parent_indices": int32([[-1, -2, 0, 0]] * 3)}, "-2 at"),
    "first token with a parent": (
        "parent_indices",
        {"parent_indices": int32([[0] * 4] * 3)},
        r"0 at \[0, 0\], expected -1$",
    ),
    "slot beyond the pool": ("state_indices", {"state_indices": index_tensor([6, 0, 1])}, "6 at"),
    "slot named twice": ("state_indices", {"state_indices": index_tensor([4, 4, 1])}, "slot 4 is named"),
}


@pytest.mark.parametrize("case", BAD_VALUES)
def test_values_out_of_range(case):
    name, changes, match = BAD_VALUES[case]
    assert_refused(prepared(), name, match, **changes)


BAD_TENSORS = {
    "cache of another kind": ("cache", {"cache": {}}, "dict, expected a SpeculativeCache"),
    "other io dtype": ("k", {"k": SETUP.tokens(3, 4, 0)["k"].to(FP16)}, "expected bfloat16 as cache"),
    "other gate dtype": ("b", {"b": SETUP.tokens(3, 4, 0)["b"].to(FP16)}, "as a has"),
    "int64 counts": ("num_accepted", {"num_accepted": index_tensor([0] * 3, torch.int64)}, "dtype int64"),
    "counts of fewer": ("num_accepted", {"num_accepted": int32([0])}, "B = 1, expected 3"),
    "both ways of accepting": (
        "accepted_nodes",
        {"num_accepted": int32([0] * 3), "accepted_nodes": int32([[-1]] * 3)},
        "given besides num_accepted",
    ),
    "more nodes than fit": ("accepted_nodes", {"accepted_nodes": int32([[-1] * 17] * 3)}, "nodes = 17"),
    "parents of fewer": ("parent_indices", {"parent_indices": int32([[-1] * 3] * 3)}, "T = 3, expected 4"),
    "unknown policy": ("fold", {"fold": "never"}, "expected one of 'auto', 'always', 'full' or an int"),
    "fold as a bool": ("fold", {"fold": True}, "True, expected one of"),
    "fold below zero": ("fold", {"fold": -1}, r"-1, expected 0 to capacity - 2 \* max_tokens = 8"),
    "fold without room": ("fold", {"fold": 9}, "9, expected 0 to"),
    "no bool": ("use_qk_l2norm", {"use_qk_l2norm": 1}, "expected a bool"),
    "no backend": ("backend", {"backend": None}, "expected the name of a provider"),
    "infinite scale": ("scale", {"scale": float("inf")}, "expected a finite number"),
    "no pool": ("state_pool", {"state_pool": None}, "expected a tensor"),
    "wrong output": ("output", {"output": torch.empty(3, 4, 4, 9, device=DEVICE)}, "V = 9"),
}


@pytest.mark.parametrize("case", BAD_TENSORS)
def test_arguments_that_do_not_fit(case):
    name, changes, match = BAD_TENSORS[case]
    assert_refused(prepared(), name, match, **changes)


def test_more_tokens_than_the_cache_is_for():
    tokens = SETUP.tokens(3, 5, 0)
    assert_refused(prepared(), "q", "T = 5, expected at most max_tokens = 4", **tokens)


@pytest.mark.parametrize(
    ("changes", "match"),
    [
        ({"pool_size": 7}, "cache.keys: pool = 7, expected 6 from state_pool"),
        ({"H": 4}, "cache.keys: H = 4, expected 2 from q"),
        ({"HV": 2}, "cache.updates: HV = 2, expected 4 from v"),
        ({"K": 8}, "cache.keys: K = 8, expected 16 from q"),
        ({"V": 4}, "cache.updates: V = 4, expected 8 from v"),
    ],
)
def test_a_foreign_cache_is_seen_by_its_sizes(changes, match):
    history = prepared()
    foreign = Setup(**{**vars(SETUP), **changes}).cache()
    with pytest.raises(ArgumentError, match=match):
        gdn_mtp.verify(**arguments(history, cache=foreign))


def test_a_foreign_cache_of_the_same_sizes_is_seen_by_its_pool():
    """Two layers: their caches are alike, their pools are not."""
    first, second = prepared(), prepared()
    assert_refused(first, "cache", "is of the state pool at", cache=second.cache)


def test_two_pools_that_begin_at_one_address_are_told_apart():
    """The states of a layer among others, and the same memory without layers."""
    slots, pool_size = index_tensor([4, 0]), SETUP.pool_size
    memory = torch.zeros(2 * pool_size, SETUP.HV, SETUP.V, SETUP.K, device=DEVICE)
    layer, flat = memory.view(pool_size, 2, *memory.shape[1:])[:, 0], memory[:pool_size]
    cache, tokens = SETUP.cache(), {**SETUP.tokens(2, 2, 0), **SETUP.heads()}
    gdn_mtp.verify(**tokens, state_pool=layer, state_indices=slots, cache=cache, num_accepted=None)
    before = memory.clone()
    with pytest.raises(ArgumentError, match="cache: is of the state pool at"):
        gdn_mtp.commit(flat, slots, cache, int32([2, 2]))
    assert torch.equal(memory, before)


def test_a_copy_of_a_cache_is_of_no_pool_yet():
    history = prepared()
    for other in (copy.deepcopy(history.cache), pickle.loads(pickle.dumps(history.cache))):
        assert not other.is_bound_to(history.pool)
        other.bind(torch.zeros_like(history.pool))
    assert history.cache.is_bound_to(history.pool)


def test_a_shallow_copy_shares_the_pool_as_it_shares_the_tensors():
    history = prepared()
    shared = copy.copy(history.cache)
    assert shared.keys is history.cache.keys
    assert shared.is_bound_to(history.pool)
    assert_refused(history, "cache", "is of the state pool at", cache=shared, state_pool=SETUP.pool())


def test_a_pool_that_cannot_be_the_caches_is_told_apart_from_one_that_moved():
    history = prepared()
    larger = torch.cat([history.pool, history.pool[:1]])
    assert_refused(history, "state_pool", "pool", state_pool=larger)


def test_a_foreign_cache_is_seen_where_autograd_looks_on():
    """Weights that ask for gradients send a call through its operation, which knows tensors but no cache."""
    first, second = prepared(), prepared()
    heads = {name: x.requires_grad_() for name, x in SETUP.heads().items()}
    assert_refused(first, "cache", "is of the state pool at", cache=second.cache, **heads)
    fresh, history = SETUP.cache(), prepared()
    gdn_mtp.verify(**arguments(history, cache=fresh, **heads))
    assert fresh.is_bound_to(history.pool)


@pytest.mark.parametrize(
    ("field", "value", "match"),
    [
        (0, 16, "cursor start = 16, expected 0 to 15"),
        (0, -1, "cursor start = -1"),
        (1, 9, "cursor length = 9, expected 0 to 8"),
        (2, 5, "cursor window = 5, expected 0 to 4"),
        (3, 1, "cursor arrivals = 1, expected 0 to 0"),
    ],
)
@pytest.mark.parametrize("call", ["verify", "commit", "materialize"])
def test_a_cursor_out_of_range(call, field, value, match):
    history = prepared()
    history.cache.cursor[4, field] = value
    everything = history.snapshot([])
    given = arguments(history)
    if call != "verify":
        given = {name: given[name] for name in ("state_pool", "state_indices", "cache", "num_accepted")}
    with debug(), pytest.raises(ArgumentError, match=f"slot 4: {match}"):
        getattr(gdn_mtp, call)(**given)
    everything()


def test_live_bits_out_of_range():
    history = prepared()
    history.cache.live[0] = 1 << 4
    assert_refused(history, "cache", "slot 0: live = 0x10, expected bits below 4")


def test_written_memory_is_of_its_own():
    history = prepared()
    v = SETUP.tokens(3, 4, 2)["v"]
    assert_refused(history, "output", "shares memory with v", v=v, output=v)


def test_materialize_and_commit_check_alike():
    history = prepared()
    named = (history.pool, index_tensor(SLOTS), history.cache)
    everything = history.snapshot([])
    with debug():
        for call in (gdn_mtp.materialize, gdn_mtp.commit):
            with pytest.raises(ArgumentError, match=r"num_accepted: 4 at \[0\]"):
                call(*named, int32([4, 0, 0]))
        with pytest.raises(ArgumentError, match="states: dtype"):
            gdn_mtp.materialize(*named, None, states=torch.empty(3, 4, 8, 16, dtype=BF16, device=DEVICE))
        with pytest.raises(ArgumentError, match="states: shares memory"):
            gdn_mtp.materialize(*named, None, states=history.pool[:3])
    everything()


def test_tokens_that_a_request_did_not_have_cannot_be_accepted():
    history = History(SETUP)
    history.verify([4, 0, 2], 4, 0, num_tokens=[2, 0, 4])
    named = (history.pool, index_tensor([4, 0, 2]), history.cache)
    everything = history.snapshot([])
    with debug(), pytest.raises(ArgumentError, match=r"3 at \[0\], the last verify of slot 4 had 2 tokens"):
        gdn_mtp.commit(*named, int32([3, 0, 4]))
    everything()
    history.commit([4, 0, 2], {"num_accepted": int32([2, 0, 4])})


def test_another_pool_is_refused_though_it_requires_grad():
    history = prepared()
    everything = history.snapshot([])
    other = history.pool.clone().requires_grad_()
    with pytest.raises(ArgumentError, match="is of the state pool at"):
        gdn_mtp.verify(**arguments(history, state_pool=other))
    everything()


def test_a_pool_that_requires_grad_is_the_caches_own_from_then_on():
    history = History(SETUP)
    pool = history.pool.requires_grad_()
    tokens, slots = SETUP.tokens(1, 4, 0) | SETUP.heads(), index_tensor([4])
    gdn_mtp.verify(**tokens, state_pool=pool, state_indices=slots, cache=history.cache, num_accepted=None)
    assert history.cache.is_bound_to(pool)


def test_a_verify_that_fails_leaves_what_its_slots_stand_for(monkeypatch):
    history = History(SETUP)
    history.verify([4, 0], 4, 0)
    accepted = int32([3, 1])
    named = (history.pool, index_tensor([4, 0]), history.cache, accepted)
    before = gdn_mtp.materialize(*named)
    kernel = "gdn_mtp.speculative.torch_kernel"
    given = SETUP.tokens(2, 4, 1) | SETUP.heads()
    given |= dict(zip(("state_pool", "state_indices", "cache", "num_accepted"), named, strict=True))
    for function in ("_evaluate", "_record"):
        with monkeypatch.context() as patch:
            patch.setattr(f"{kernel}.{function}", lambda *arguments: 1 / 0)
            with pytest.raises(ZeroDivisionError):
                gdn_mtp.verify(**given, fold="always", backend="torch")
        assert_same_bits(gdn_mtp.materialize(*named), before, "states")


@pytest.fixture
def unseen(monkeypatch):
    """Values are not looked at, as on a GPU outside debug mode."""
    monkeypatch.setattr("gdn_mtp.speculative.specs.values_are_readable", lambda tensor: False)


class TestUnseen:
    """What the kernels make of what nobody checked, as documented in `gdn_mtp.speculative.api`."""

    def outcome(self, **changes):
        history = prepared()
        unchanged = history.snapshot([4, 0])
        output = gdn_mtp.verify(**arguments(history, **changes))
        unchanged()
        return output, history.pool, history.cache.cursor, history.cache.live

    def assert_alike(self, wrong, right):
        for x, y in zip(self.outcome(**wrong), self.outcome(**right), strict=True):
            assert torch.equal(x, y)

    def test_num_accepted_is_taken_as_the_nearest_allowed(self, unseen):
        self.assert_alike({"num_accepted": int32([77, 9, -5])}, {"num_accepted": int32([3, 0, 0])})

    def test_num_tokens_are_taken_as_the_nearest_allowed(self, unseen):
        self.assert_alike({"num_tokens": int32([77, 9, -5])}, {"num_tokens": int32([4, 0, 0])})

    def test_nodes_beyond_the_window_are_passed_over(self, unseen):
        self.assert_alike(
            {"accepted_nodes": int32([[3, 0, 31], [0, 1, 2], [-9, 1, 99]])},
            {"accepted_nodes": int32([[0, -1, -1], [-1, -1, -1], [1, -1, -1]])},
        )

    def test_a_parent_that_does_not_come_before_is_the_root(self, unseen):
        wrong = int32([[5, 1, 0, 2], [0] * 4, [-7, 0, 2, 99]])
        right = int32([[-1, -1, 0, 2], [-1] * 4, [-1, 0, -1, -1]])
        self.assert_alike({"parent_indices": wrong}, {"parent_indices": right})

    def test_a_slot_beyond_the_pool_is_padding(self, unseen):
        wrong = {"state_indices": index_tensor([4, 6, 2**30])}
        self.assert_alike(wrong, {"state_indices": index_tensor([4, -1, -1])})


@pytest.mark.parametrize("state", [FP32, BF16])
@settings(max_examples=60, deadline=None)
@given(seed=st.integers(0, 2**32 - 1))
def test_garbage_stays_in_its_own_slot(state, seed):
    """Cursors, live bits, acceptance, tokens and parents of any value; NaN in the ring."""
    rng = random.Random(seed)
    setup = Setup(state=state, K=HEAD_DIM, V=HEAD_DIM)
    history = History(setup)
    history.verify([0, 1, 2, 3], 4, 0)
    word = [-(2**31), -17, -1, 0, 1, 3, 15, 16, 31, 32, 99, 2**31 - 1]
    cache, slots = history.cache, rng.sample(range(6), 3)

    def words(*shape):
        count = torch.Size(shape).numel()
        return int32([rng.choice(word) for _ in range(count)]).view(shape)

    for slot in slots:
        cache.cursor[slot], cache.live[slot] = words(4), rng.choice(word)
    indices = [*slots, rng.choice([-1, 6, 2**31 - 1])]
    acceptance = rng.choice([{}, {"num_accepted": words(4)}, {"accepted_nodes": words(4, 5)}])
    named = {"state_pool": history.pool, "state_indices": index_tensor(indices), "cache": cache}
    unchanged = history.snapshot(slots)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("gdn_mtp.speculative.specs.values_are_readable", lambda tensor: False)
        gdn_mtp.materialize(**named, **said(acceptance))
        gdn_mtp.verify(
            **setup.tokens(4, 4, 3),
            **setup.heads(),
            **named,
            **said(acceptance),
            num_tokens=words(4),
            parent_indices=words(4, 4),
            fold=rng.choice(["auto", "always"]),
        )
        gdn_mtp.commit(**named, **said(acceptance))
    unchanged()
    for slot in slots:  # what a reset slot does next is sound again
        history.pool[slot] = history.setup.pool(5)[slot]
    history.reset(slots, 5)
    history.verify(slots, 4, 6)
    history.commit(slots, {"num_accepted": int32([4] * 3)})


@pytest.mark.parametrize(
    ("changes", "match"),
    [
        ({"num_accepted": int32([4, 0, 0])}, "num_accepted exceeds"),
        ({"accepted_nodes": int32([[3]] * 3)}, "accepted_nodes exceed"),
        ({"accepted_nodes": int32([[1, -1, 0]] * 3)}, "accepted_nodes do not ascend"),
        ({"accepted_nodes": int32([[1, 1]] * 3)}, "accepted_nodes do not ascend"),
        ({"state_indices": index_tensor([4, -1, 6])}, "state_indices names a slot beyond the pool"),
        ({"cursor": (4, 2, 99)}, "a cursor of the speculative cache is out of range"),
        ({"cursor": (4, 3, 1)}, "a cursor of the speculative cache is out of range"),
    ],
)
def test_kernels_of_debug_mode_stop_with_a_message(changes, match):
    """What the host could not see, as during the replay of a graph; on the CPU the trap is an exception."""
    history = prepared()
    problem = gdn_mtp.SpeculativeProblem(
        *(3, 0, SETUP.H, SETUP.HV, SETUP.K, SETUP.V, 16), mode="commit", debug=True
    )
    launch = KERNEL.prepare(problem, Arch.from_name("cpu"), torch.device("cpu"), "chunked")
    if "cursor" in changes:
        slot, field, value = changes["cursor"]
        history.cache.cursor[slot, field] = value
    slots = changes.get("state_indices", index_tensor(SLOTS))
    tensors = [x.cpu() for x in (history.pool, slots, *history.cache.tensors)]
    acceptance = [changes.get(name) for name in ("num_accepted", "accepted_nodes")]
    before = tensors[0].clone()
    with pytest.raises(RuntimeError, match=match):
        launch(*tensors, *(None if x is None else x.cpu() for x in acceptance))
    assert torch.equal(tensors[0], before)


WINDOWS = {  # of requests in slot 4, in none, and in slot 0
    "more tokens than there are": ({"num_tokens": int32([4, 9, 5])}, "num_tokens is not between 0 and T"),
    "fewer tokens than none": ({"num_tokens": int32([-1, 9, 0])}, "num_tokens is not between 0 and T"),
    "parent of its own": ({"parent_indices": int32([[-1, 1, 0, 0]] * 3)}, "parent_indices names neither"),
    "parent beyond the root": (
        {"parent_indices": int32([[-1, 0, 0, -2]] * 3)},
        "parent_indices names neither",
    ),
    "nothing wrong": (
        {"num_tokens": int32([2, 9, 0]), "parent_indices": int32([[-1, 0, 7, -9], [9] * 4, [9] * 4])},
        None,
    ),
}


@pytest.mark.parametrize("case", WINDOWS)
def test_kernels_of_debug_mode_look_at_the_window(case):
    changes, match = WINDOWS[case]
    history, heads = prepared(), SETUP.heads()
    problem = gdn_mtp.SpeculativeProblem(
        *(3, 4, SETUP.H, SETUP.HV, SETUP.K, SETUP.V, 16), accept="none", debug=True
    )
    launch = KERNEL.prepare(problem, Arch.from_name("cpu"), torch.device("cpu"), "chunked")
    q, k, v, a, b = (x.cpu() for x in SETUP.tokens(3, 4, seed=2).values())
    written = [history.pool.cpu(), *(x.cpu() for x in history.cache.tensors), torch.full_like(v, NAN)]
    pool, *cache, output = written
    before = [x.clone() for x in written]
    given = [changes.get(name) for name in ("num_tokens", "parent_indices")]
    window = [None if x is None else x.cpu() for x in given]
    weights = (heads["A_log"].cpu(), heads["dt_bias"].cpu(), 1.0)
    call = (q, k, v, a, b, *weights, pool, index_tensor(SLOTS).cpu(), *cache, None, None, *window, 0, output)
    if match is None:
        launch(*call)
        assert output.isfinite().all()
        return
    with pytest.raises(RuntimeError, match=match):
        launch(*call)
    for x, old in zip(written, before, strict=True):
        assert torch.equal(x.nan_to_num(7.0), old.nan_to_num(7.0))


def test_a_slot_that_was_not_reset_goes_on_where_it_was():
    """Why a new request needs `reset_slots`: without it the old request's tokens come along."""
    history = prepared()
    history.pool[4] = 0.0
    stale = gdn_mtp.materialize(history.pool, index_tensor([4]), history.cache, None)
    assert (stale != 0).any()
    history.cache.reset_slots(index_tensor([4]))
    assert (gdn_mtp.materialize(history.pool, index_tensor([4]), history.cache, None) == 0).all()


def test_nan_in_the_pool_of_another_slot_does_not_matter():
    history = prepared()
    history.pool[[1, 2, 3, 5]] = NAN
    output = gdn_mtp.verify(**arguments(history, num_accepted=int32([1, 0, 1])))
    assert output.isfinite().all()
