"""verify, commit and materialize: chains, trees, fold policies, compilation."""

import random
from functools import partial

import gdn_mtp
import kernel_dispatch
import numpy as np
import pytest
import torch
from gdn_mtp.speculative import SpeculativeReference, folding
from gdn_mtp.speculative.folding import fold_above
from gdn_mtp.speculative.torch_kernel import KERNEL
from gdn_support import BF16, DEVICE, FP16, FP32, assert_same_bits
from speculative_support import History, Setup, arguments, index_tensor, int32, random_tree
from torch._inductor import metrics
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.testing._internal.two_tensor import TwoTensor

SETUP = Setup()


@pytest.mark.parametrize("fold", ["auto", "always", "full"])
@pytest.mark.parametrize("tree", [False, True], ids=["chain", "tree"])
@pytest.mark.parametrize(
    "setup",
    [
        Setup(),
        Setup(state=BF16),
        Setup(io=FP16, capacity=8),
        Setup(io=FP32, l2norm=False, scale=-0.7),
        Setup(H=1, HV=5, K=33, V=1, max_tokens=7, capacity=31),
        Setup(H=3, HV=3, max_tokens=16),
        Setup(H=1, HV=2, K=64, V=64, max_tokens=1),
        Setup(H=2, HV=4, K=64, V=64, max_tokens=4, io=FP16),
        Setup(H=1, HV=2, K=128, V=128, max_tokens=8, state=BF16),
    ],
    ids=lambda setup: f"H{setup.H}-HV{setup.HV}-T{setup.max_tokens}-{setup.io}-{setup.state}",
)
def test_histories(setup, tree, fold):
    rng, history = random.Random(3), History(setup)
    for step in range(24):
        slots = rng.sample(range(setup.pool_size), 4) if step % 5 else [3, -1, 0, -7]
        T = setup.max_tokens if step % 3 else rng.randint(1, setup.max_tokens)
        history.verify(
            slots,
            T,
            step,
            history.random_acceptance(slots, rng),
            num_tokens=[rng.randint(0, T) for _ in slots] if step % 4 == 1 else None,
            parents=[random_tree(T, rng) for _ in slots] if tree else None,
            fold=fold,
        )
    history.check_against_sequential_decoding()


@pytest.mark.parametrize("accepted", [0, 1, 2, 4])
def test_only_what_is_accepted_counts(accepted):
    """Two caches whose drafts differ after the accepted prefix go on alike, to the bit."""
    results = []
    for drafts in (1, 2):
        history = History(SETUP)
        tokens = SETUP.tokens(2, 4, seed=5)
        others = SETUP.tokens(2, 4, seed=drafts)
        mixed = [torch.cat([tokens[n][:, :accepted], others[n][:, accepted:]], dim=1) for n in "qkvab"]
        rest = arguments(history, [4, 1], 4)[5:]
        gdn_mtp.verify(*mixed, *rest, None)
        output = gdn_mtp.verify(*arguments(history, [4, 1], 2, seed=9), int32([accepted] * 2))
        states = gdn_mtp.materialize(history.pool, index_tensor([4, 1]), history.cache, int32([2, 2]))
        results.append((output, states))
    assert_same_bits(results[0][0], results[1][0], "output")
    assert_same_bits(results[0][1], results[1][1], "states")


def test_a_window_that_is_not_accepted_is_dropped():
    history = History(SETUP)
    first = history.verify([2], 4, 0)
    again = history.verify([2], 4, 0)
    assert_same_bits(first, again, "output")


def test_one_window_may_be_accepted_once_only():
    history = History(SETUP)
    history.verify([2], 4, 0)
    history.commit([2], {"num_accepted": int32([3])})
    states = gdn_mtp.materialize(history.pool, index_tensor([2]), history.cache, int32([0]))
    assert_same_bits(states[0], history.pool[2], "state")


def test_siblings_do_not_see_each_other():
    """Two drafts for the same place, as nodes of a tree and as chains of their own."""
    tree, chain = History(SETUP), History(SETUP)
    tokens = SETUP.tokens(1, 3, seed=0)
    nodes = [tokens[name] for name in "qkvab"]
    rest = arguments(tree, [2], 3)[5:]
    output = gdn_mtp.verify(*nodes, *rest, None, parent_indices=int32([[-1, 0, 0]]))
    for path in ([0, 1], [0, 2]):
        rest = arguments(chain, [2], 2)[5:]
        expected = gdn_mtp.verify(*(x[:, path] for x in nodes), *rest, None)
        assert_same_bits(output[:, path], expected, "output")


def test_nan_stays_in_its_request_and_behind_its_token():
    history = History(SETUP)
    inputs = arguments(history, [2, 3], 4)
    clean = gdn_mtp.verify(*inputs, None, backend="torch")
    for x in inputs[:5]:
        x[0, 2] = float("nan")
    output = gdn_mtp.verify(*inputs, None, backend="torch")
    assert_same_bits(output[0, :2], clean[0, :2], "tokens before")
    assert_same_bits(output[1], clean[1], "the other request")
    assert output[0, 2:].isnan().all()
    output = gdn_mtp.verify(*arguments(history, [2, 3], 2), int32([2, 4]))
    assert output.isfinite().all()  # the NaN was not accepted


def test_nan_of_a_sibling_stays_on_its_branch():
    history = History(SETUP)
    inputs = arguments(history, [2], 4)
    options = {"parent_indices": int32([[-1, 0, 0, 2]]), "backend": "torch"}
    clean = gdn_mtp.verify(*inputs, None, **options)
    for x in inputs[:5]:
        x[0, 1] = float("nan")
    output = gdn_mtp.verify(*inputs, None, **options)
    assert_same_bits(output[0, [0, 2, 3]], clean[0, [0, 2, 3]], "the other branch")
    assert output[0, 1].isnan().all()
    path = int32([[0, 2, 3]])
    states = gdn_mtp.materialize(*inputs[7:], None, path, backend="torch")
    assert states.isfinite().all()


@pytest.mark.parametrize("out", [BF16, FP16, FP32])
def test_output_dtypes_and_default(out):
    history, other = History(SETUP), History(SETUP)
    output = history.verify([1, 4], 3, 0, out=out)
    default = gdn_mtp.verify(*arguments(other, [1, 4], 3), None)
    assert default.dtype == SETUP.io
    torch.testing.assert_close(output.float(), default.float(), rtol=2**-7, atol=2**-7)


@pytest.mark.parametrize("index_dtype", [torch.int32, torch.int64])
def test_index_dtypes_and_strides(index_dtype):
    history, other = History(SETUP), History(SETUP)
    expected = gdn_mtp.verify(*arguments(other, [1, -1, 4], 3), None)
    given = list(arguments(history, [1, -1, 4], 3))
    given[8] = torch.tensor([1, 9, -1, 9, 4, 9], dtype=index_dtype, device=DEVICE)[::2]
    given[:3] = [torch.cat([x, x], dim=1)[:, :3] for x in given[:3]]
    tree = int32([[-1, 0, 1]]).expand(3, 3)
    assert_same_bits(gdn_mtp.verify(*given, None, parent_indices=tree), expected, "output")


def test_pool_may_be_a_strided_view():
    history, other = History(SETUP), History(SETUP)
    memory = torch.full((SETUP.pool_size, SETUP.HV + 1, SETUP.V, SETUP.K + 3), float("nan"), device=DEVICE)
    view = memory[:, 1:, :, : SETUP.K]
    view.copy_(history.pool)
    for current, pool in ((history, view), (other, other.pool)):
        given = list(arguments(current, [1, 4], 4))
        given[7] = pool
        gdn_mtp.verify(*given, None)
        gdn_mtp.commit(pool, given[8], current.cache, int32([4, 2]))
    assert_same_bits(view, other.pool, "pool")
    assert memory[:, 0].isnan().all()
    assert memory[..., SETUP.K :].isnan().all()


@pytest.mark.parametrize("scale", [None, 0.5, "tensor"])
def test_scale(scale):
    value = torch.tensor([0.5], device=DEVICE) if scale == "tensor" else scale
    output = gdn_mtp.verify(*arguments(History(SETUP), [1], 3), None, scale=value)
    base = gdn_mtp.verify(*arguments(History(SETUP), [1], 3), None, scale=1.0)
    factor = SETUP.K**-0.5 if scale is None else 0.5
    torch.testing.assert_close(output, (base.float() * factor).to(BF16), rtol=2**-7, atol=0)


def test_slots_lie_past_two_to_the_31_elements():
    setup = Setup(pool_size=2, H=1, HV=1, state=BF16)
    stride = 2**31 + 64
    memory = torch.empty(stride + 128, dtype=BF16)  # 4 GiB of address space, of which one page is used
    far = memory.as_strided((2, 1, setup.V, setup.K), (stride, 128, setup.K, 1))
    near, results = setup.pool().cpu(), []
    far[1] = near[1]
    tokens = {name: x.cpu() for name, x in {**setup.tokens(1, 4, 0), **setup.heads()}.items()}
    slots, accepted = torch.tensor([1]), torch.tensor([3], dtype=torch.int32)
    for pool in (near, far):
        cache = gdn_mtp.SpeculativeCache(2, 1, 1, setup.K, setup.V, max_tokens=4, device="cpu")
        named = {"state_pool": pool, "state_indices": slots, "cache": cache}
        gdn_mtp.verify(**tokens, **named, num_accepted=None)
        output = gdn_mtp.verify(**tokens, **named, num_accepted=accepted, fold="always")
        states = gdn_mtp.materialize(**named, num_accepted=accepted)
        gdn_mtp.commit(**named, num_accepted=accepted)
        results.append((output, states, pool[1]))
    for what, x, y in zip(("output", "states", "pool"), *results, strict=True):
        assert_same_bits(x, y, what)


OTHERS = {
    **{name: lambda x: x * 0.5 for name in ("q", "k", "v", "a", "b", "A_log")},
    "dt_bias": lambda x: x + 0.5,  # what is given may be zero
    "state_indices": lambda x: index_tensor([2, -1, 4]),
    "num_accepted": lambda x: int32([1, 0, 4]),
    "num_tokens": lambda x: int32([2, 0, 4]),
    "parent_indices": lambda x: int32([[-1, 0, 0, 1]] * 3),
    "scale": lambda x: 0.25,
    "use_qk_l2norm": lambda x: False,
    "fold": lambda x: "always",
}


@pytest.mark.parametrize("name", [*OTHERS, "accepted_nodes", "output"])
def test_every_argument_acts(name):
    """Another valid value changes the output, the pool or the cache; or the output is where it was asked."""
    results = []
    for other in (False, True):
        history = History(Setup(l2norm=False))
        slots = [4, -1, 2]
        history.verify(slots, 4, 0)
        inputs = {
            **history.setup.tokens(3, 4, 1),
            **history.setup.heads(),
            "state_indices": index_tensor(slots),
        }
        inputs |= {"num_accepted": int32([2, 0, 3]), "num_tokens": None, "parent_indices": None}
        inputs |= {"scale": 0.5, "use_qk_l2norm": True, "fold": "full"}
        if other and name == "accepted_nodes":
            inputs |= {"num_accepted": None, "accepted_nodes": int32([[0, 2], [-1, -1], [3, -1]])}
        elif other and name == "output":
            inputs["output"] = torch.empty_like(inputs["v"], dtype=FP32)
        elif other:
            inputs[name] = OTHERS[name](inputs[name])
        output = gdn_mtp.verify(**inputs, state_pool=history.pool, cache=history.cache)
        if name == "output":
            assert (output is inputs.get("output")) == other
            output = output.to(BF16)  # which holds the same values
        results.append((output, history.pool, *history.cache.tensors))
    pairs = zip(*results, strict=True)
    alike = all(torch.equal(x.nan_to_num(9.0), y.nan_to_num(9.0)) for x, y in pairs)
    assert alike == (name == "output")


def test_no_requests_need_a_provider_that_exists():
    history = History(SETUP)
    with pytest.raises(kernel_dispatch.NoKernelError, match="no provider of that name"):
        gdn_mtp.verify(*arguments(history, [], 3), None, backend="nobody")


def test_no_requests():
    history = History(SETUP)
    everything = history.snapshot([])
    assert gdn_mtp.verify(*arguments(history, [], 3), None).shape == (0, 3, SETUP.HV, SETUP.V)
    assert gdn_mtp.materialize(history.pool, index_tensor([]), history.cache, None).shape[0] == 0
    gdn_mtp.commit(history.pool, index_tensor([]), history.cache, None)
    everything()


def test_padding_alone_changes_nothing():
    history = History(SETUP)
    everything = history.snapshot([])
    output = history.verify([-1, -1], 3, 0)
    history.commit([-1, -1])
    everything()
    assert (output == 0).all()


class TestFolding:
    def pool_writes(self, fold, steps=12, accepted=2):
        """At which steps of a chain of T = 2 the pool's slot changes, of a ring of 12."""
        setup = Setup(max_tokens=2, capacity=12)
        history, written = History(setup), []
        for step in range(steps):
            before = history.pool[3].clone()
            history.verify([3], 2, step, {"num_accepted": int32([accepted if step else 0])}, fold=fold)
            if not torch.equal(before, history.pool[3]):
                written.append(step)
        return written

    def test_always_folds_what_was_accepted(self):
        assert self.pool_writes("always") == list(range(1, 12))

    def test_full_folds_when_the_next_window_would_not_fit(self):
        assert self.pool_writes("full") == [5, 10]  # 8 tokens may wait, the fifth pair is too many

    def test_nothing_accepted_folds_nothing(self):
        assert self.pool_writes("always", accepted=0) == []

    @pytest.mark.parametrize("fold", range(9))
    def test_an_int_is_the_number_that_stays_pending(self, fold):
        written = self.pool_writes(fold, steps=40)
        period = fold // 2 + 1  # two tokens a step
        assert written == list(range(period, 40, period))

    @pytest.mark.parametrize("tree", [False, True])
    @pytest.mark.parametrize("fold", [0, 3, 8])
    def test_ints_give_what_sequential_decoding_gives(self, fold, tree):
        rng, history = random.Random(fold), History(SETUP)
        for step in range(16):
            slots = rng.sample(range(SETUP.pool_size), 3)
            parents = [random_tree(4, rng) for _ in slots] if tree else None
            acceptance = history.random_acceptance(slots, rng)
            history.verify(slots, 4, step, acceptance, parents=parents, fold=fold)
            assert (history.cache.cursor[:, 1] <= fold).all()
        history.check_against_sequential_decoding()

    def test_one_plan_folds_in_every_way(self, monkeypatch):
        history, prepared = History(SETUP), []
        prepare = type(KERNEL).prepare
        monkeypatch.setattr(type(KERNEL), "prepare", lambda *args: prepared.append(args) or prepare(*args))
        for step, fold in enumerate(("auto", 2, "full", 3, "always")):
            inputs = arguments(history, [4, 1], 4, seed=step)
            gdn_mtp.verify(*inputs, int32([2 if step else 0] * 2), fold=fold, backend="torch", scale=0.31)
        assert len(prepared) == 1
        assert history.cache.cursor[[4, 1], 1].tolist() == [0, 0]

    def test_thresholds(self):
        sizes = {"accepted": 4.5, "token_bytes": 20_672, "state_bytes": 2 << 20}
        assert fold_above("always", 24, 8, **sizes) == 0
        assert fold_above("full", 24, 8, **sizes) == 8
        assert fold_above("auto", 24, 8, **sizes) == 8
        assert fold_above("auto", 32, 4, **sizes) == 24
        assert fold_above("auto", 32, 4, accepted=2.5, token_bytes=20_672, state_bytes=1 << 20) == 13
        assert fold_above("auto", 32, 1, accepted=1, token_bytes=100, state_bytes=50) == 0
        assert fold_above(5, 32, 4, **sizes) == 5

    @pytest.mark.parametrize("pending_cost", [0.5, 1.0, 1.7, 4.0])
    def test_auto_costs_least(self, pending_cost):
        sizes = {"accepted": 2.5, "token_bytes": 20_672, "state_bytes": 1 << 20}

        def cost_per_call(limit):
            folds = sizes["state_bytes"] * sizes["accepted"] / (limit + sizes["accepted"])
            return folds + pending_cost * sizes["token_bytes"] * limit / 2

        cheapest = fold_above("auto", 32, 2, **sizes, pending_cost=pending_cost)
        assert cheapest == min(range(29), key=cost_per_call)

    @pytest.mark.parametrize("T", [2, 4, 8])
    @pytest.mark.parametrize("pending_cost", [1.0, 2.5, 5.0])
    def test_auto_is_near_the_best_where_acceptance_is_random(self, T, pending_cost):
        """A ring simulated under every threshold, 1 to T tokens accepted at each step."""
        sizes = {"token_bytes": 20_672, "state_bytes": 1 << 20}

        def cost_per_call(limit, steps=5000):
            rng, length, cost = random.Random(0), 0, 0.0
            for _ in range(steps):
                length += rng.randint(1, T)
                cost += pending_cost * sizes["token_bytes"] * length
                if length > limit:
                    length, cost = 0, cost + sizes["state_bytes"]
            return cost / steps

        chosen = fold_above("auto", 32, T, accepted=(T + 1) / 2, **sizes, pending_cost=pending_cost)
        assert cost_per_call(chosen) < 1.02 * min(cost_per_call(limit) for limit in range(33 - 2 * T))

    def test_auto_asks_the_table(self, monkeypatch):
        problem = gdn_mtp.SpeculativeProblem(64, 4, 16, 32, 128, 128, 32)
        limits = []
        for cost in (1.0, 4.0):
            monkeypatch.setitem(folding.PENDING_COST, FP32, cost)
            limits.append(folding.fold_limit(problem, 4, "auto"))
        sizes = {"accepted": 2.5, "token_bytes": 16 * (256 + 4) + 32 * 4 * 129, "state_bytes": 2 << 20}
        assert limits == [fold_above("auto", 32, 4, **sizes, pending_cost=cost) for cost in (1.0, 4.0)]
        assert limits[0] > limits[1] > 0


class Loop(torch.nn.Module):
    """Verify, verify, look, commit: everything that is written, with the output made inside the graph."""

    def __init__(self, cache, scale=None):
        super().__init__()
        self.cache, self.scale = cache, scale

    def forward(self, inputs, pool, indices, accepted):
        call = partial(gdn_mtp.verify, **inputs, state_pool=pool, state_indices=indices, cache=self.cache)
        first = call(num_accepted=None, scale=self.scale)
        second = call(num_accepted=accepted, fold="always")
        third = call(num_accepted=accepted, fold=3)
        states = gdn_mtp.materialize(pool, indices, self.cache, accepted)
        pool = gdn_mtp.commit(pool, indices, self.cache, None, accepted[:, None] - 1)
        return first + second + third, states.sum(), pool.sum()


class TestCompilation:
    def given(self, history, batch=3):
        inputs = {**SETUP.tokens(batch, 4, 0), **SETUP.heads()}
        slots = [4, -1, 0, 2][:batch]
        return inputs, history.pool, index_tensor(slots), int32([1, 0, 4, 2][:batch])

    def assert_same_effect(self, make, scale=None, batch=3):
        expected, history = History(SETUP), History(SETUP)
        want = Loop(expected.cache, scale)(*self.given(expected, batch))
        got = make(Loop(history.cache, scale))(*self.given(history, batch))
        for what, x, y in zip(("output", "states", "pool"), got, want, strict=True):
            assert_same_bits(x, y, what)
        assert_same_bits(history.pool, expected.pool, "pool")
        for name, tensor in history.cache.state_dict().items():
            assert_same_bits(tensor, expected.cache.state_dict()[name], name)

    @pytest.mark.parametrize("dynamic", [False, True])
    @pytest.mark.parametrize("scale", [None, 0.5, np.float64(0.5), "tensor"])
    def test_compile_without_graph_breaks(self, scale, dynamic):
        torch._dynamo.reset()
        scale = torch.tensor([0.5], device=DEVICE) if isinstance(scale, str) else scale
        compile_it = partial(torch.compile, fullgraph=True, dynamic=dynamic, backend="aot_eager")
        self.assert_same_effect(compile_it, scale)
        self.assert_same_effect(compile_it, scale, batch=4)

    def test_inductor_copies_neither_pool_nor_cache(self):
        """It makes no kernels of its own for calls that follow each other."""
        torch._dynamo.reset()
        metrics.reset()
        results = []
        for compile_it in (partial(torch.compile, fullgraph=True), lambda function: function):
            history, output = History(SETUP), torch.zeros(3, 4, SETUP.HV, SETUP.V, dtype=BF16, device=DEVICE)
            inputs, pool, indices, accepted = self.given(history)

            def step(output, pool, accepted, cache=history.cache, inputs=inputs, indices=indices):
                call = partial(gdn_mtp.verify, **inputs, state_indices=indices, cache=cache, output=output)
                call(state_pool=pool, num_accepted=None)
                call(state_pool=pool, num_accepted=accepted, fold="always")

            compile_it(step)(output, pool, accepted)
            results.append((output, pool, *history.cache.tensors))
        for x, y in zip(*results, strict=True):
            assert_same_bits(x, y, "a result")
        assert metrics.generated_kernel_count == 0

    def test_copy_and_reset_compile(self):
        torch._dynamo.reset()

        def move(cache, pool, src, dst, gone):
            cache.copy_slots(src, dst, pool)
            cache.reset_slots(gone)
            return pool + 1

        results = []
        for function in (move, torch.compile(move, fullgraph=True, backend="aot_eager")):
            history = History(SETUP)
            history.verify([4, 0], 4, 0)
            function(
                history.cache, history.pool, index_tensor([4, -1]), index_tensor([2, 3]), index_tensor([0])
            )
            results.append((history.pool, history.cache.state_dict()))
        assert_same_bits(results[0][0], results[1][0], "pool")
        for name, tensor in results[0][1].items():
            assert_same_bits(tensor, results[1][1][name], name)

    def test_shapes_on_fake_tensors(self):
        history = History(SETUP)
        with FakeTensorMode(allow_non_fake_inputs=True) as mode:
            convert = mode.from_tensor
            given = arguments(history, [4, 0], 4)
            fake = [convert(x) if isinstance(x, torch.Tensor) else x for x in given]
            output = gdn_mtp.verify(*fake, None)
            states = gdn_mtp.materialize(*fake[7:], None)
        assert (output.shape, output.dtype) == ((2, 4, SETUP.HV, SETUP.V), BF16)
        assert (states.shape, states.dtype) == ((2, SETUP.HV, SETUP.V, SETUP.K), FP32)

    def test_the_operations_pass_opcheck(self):
        history = History(SETUP)
        *tokens, pool, indices, cache = arguments(history, [4, 0], 4)
        tensors = (pool, indices, *cache.tensors, int32([0, 0]), None)
        output = torch.zeros_like(tokens[2])
        states = torch.zeros_like(pool[:2])
        ops = torch.ops.gdn_mtp
        options = (None, None, 4, True, "auto", 3, "auto")
        opcheck = torch.library.opcheck
        opcheck(ops.speculative_verify.default, (*tokens, *tensors, None, None, output, *options))
        opcheck(ops.speculative_commit.default, (*tensors, 4, "auto"))
        opcheck(ops.speculative_materialize.default, (*tensors, states, 4, "auto"))

    def test_a_subclass_of_two_tensors(self):
        """Its own memory says nothing: a cache is not bound to it."""
        histories = [History(SETUP), History(SETUP), History(SETUP)]
        (*tensors, cache), (*others, _), given = (arguments(history, [4, 0], 4) for history in histories)
        pairs = [TwoTensor(x, y) for x, y in zip(tensors, others, strict=True)]
        output = gdn_mtp.verify(*pairs, cache, None)
        assert_same_bits(output.a, gdn_mtp.verify(*given, None), "output")
        assert not cache.is_bound_to(histories[0].pool)
        gdn_mtp.commit(histories[0].pool, index_tensor([4, 0]), cache, None)

    def test_inputs_that_require_gradients_give_results_without(self):
        history = History(SETUP)
        given = arguments(history, [4, 0], 4)
        given[0].requires_grad_()
        assert gdn_mtp.verify(*given, None).isfinite().all()
        assert history.cache.cursor[4].tolist() == [0, 0, 4, 0]


def test_the_oracle_is_sequential_decoding():
    """The oracle against the reference of the other functions, on one path of a tree."""
    tokens, heads = SETUP.tokens(1, 4, seed=0), SETUP.heads()
    oracle = SpeculativeReference(SETUP.pool())
    output = oracle.verify(
        **tokens, **heads, state_indices=index_tensor([2]), parent_indices=int32([[-1, 0, 0, 2]])
    )
    path = [0, 2, 3]
    expected = gdn_mtp.gated_delta_rule_reference(
        **{name: x[:, path] for name, x in tokens.items()}, **heads, state=SETUP.pool()[2:3]
    )
    torch.testing.assert_close(output[:, path], expected.output, rtol=1e-14, atol=1e-14)
    states = oracle.commit(index_tensor([2]), accepted_nodes=int32([path]))
    torch.testing.assert_close(states, expected.state, rtol=1e-14, atol=1e-14)
