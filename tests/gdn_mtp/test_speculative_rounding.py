"""Where states are rounded, and that roundings do not add up: bf16 pools over many folds."""

import gdn_mtp
import pytest
import torch
from gdn_mtp.speculative import SpeculativeReference
from gdn_support import BF16, DEVICE, FP32, UNIT_ROUNDOFF, assert_same_bits
from speculative_support import Setup, index_tensor, int32

HEAD_DIM = 64 if DEVICE.type == "cuda" else 16  # what the kernels for GPUs take


class Twins:
    """A bf16 pool and a float32 pool of the same values, each with its cache."""

    def __init__(self, setup):
        self.setup, self.half = setup, setup.pool().to(BF16)
        self.exact = self.half.float()
        self.caches = {BF16: setup.cache(), FP32: setup.cache()}

    def verify(self, slots, step, accepted, fold, **window):
        """The outputs of both; the float32 pool never folds."""
        tokens = {**self.setup.tokens(len(slots), 4, step), **self.setup.heads()}
        outputs = []
        for pool, policy in ((self.half, fold), (self.exact, "full")):
            output = torch.empty(tokens["v"].shape, device=DEVICE)
            named = {
                "state_pool": pool,
                "state_indices": index_tensor(slots),
                "cache": self.caches[pool.dtype],
            }
            options = {"num_accepted": int32(accepted), "fold": policy, "output": output}
            outputs.append(gdn_mtp.verify(**tokens, **named, **options, **window, backend="torch"))
        return outputs

    def materialize(self, slots, accepted):
        """The states that the float32 pool's cache stands for."""
        return gdn_mtp.materialize(
            self.exact, index_tensor(slots), self.caches[FP32], int32(accepted), backend="torch"
        )


@pytest.mark.parametrize("tree", [False, True], ids=["chain", "tree"])
def test_a_fold_rounds_the_pool_and_nothing_else(tree):
    """The window at a fold is that of the unrounded state, to the bit, and the pool its nearest bf16."""
    twins, slots = Twins(Setup(capacity=16)), [4, -1, 0]
    window = {"parent_indices": int32([[-1, 0, 0, 1]] * 3)} if tree else {}
    for step, accepted in enumerate(([0, 0, 0], [2, 0, 1])):
        half, exact = twins.verify(slots, step, accepted, "full", **window)
        assert_same_bits(half, exact, "output before any fold")
    states = twins.materialize([4, 0], [1, 2])
    half, exact = twins.verify(slots, 2, [1, 0, 2], "always", **window)
    assert_same_bits(half, exact, "output at the fold")
    assert_same_bits(twins.half[[4, 0]], states.to(BF16), "pool")
    for name in ("updates", "gates", "k_scale", "keys"):
        folded, pending = (getattr(twins.caches[dtype], name) for dtype in (BF16, FP32))
        for slot, length in ((4, 3), (0, 3)):
            assert_same_bits(folded[slot, length : length + 4], pending[slot, length : length + 4], name)
    assert twins.caches[BF16].cursor[[4, 0], :3].tolist() == [[3, 0, 4]] * 2
    assert twins.caches[FP32].cursor[[4, 0], :3].tolist() == [[0, 3, 4]] * 2


def test_commit_and_materialize_round_once():
    twins, slots = Twins(Setup(capacity=16)), [4, 0]
    twins.verify(slots, 0, [0, 0], "full")
    twins.verify(slots, 1, [3, 2], "full")
    states = twins.materialize(slots, [2, 4])
    named = (twins.half, index_tensor(slots), twins.caches[BF16], int32([2, 4]))
    assert_same_bits(gdn_mtp.materialize(*named, backend="torch"), states.to(BF16), "materialized states")
    gdn_mtp.commit(*named, backend="torch")
    assert_same_bits(twins.half[slots], states.to(BF16), "pool")


@pytest.mark.parametrize("fold", ["always", "full"])
@pytest.mark.parametrize("state", [FP32, BF16])
def test_errors_do_not_grow_over_1000_steps(state, fold):
    """Without decay, so that nothing but the delta rule itself makes up for what a fold has rounded.

    Errors of states relative to their norm, in units of the larger roundoff of pool and arithmetic: their
    mean over the last 200 steps is what it was over the second 200, and no more than that of decoding on such
    a pool without speculation, which rounds after each call.
    """
    setup = Setup(
        pool_size=3,
        H=1,
        HV=2,
        K=HEAD_DIM,
        V=8 if HEAD_DIM == 16 else 64,
        max_tokens=2,
        capacity=8,
        state=state,
    )
    pool, cache, slots = setup.pool(), setup.cache(), index_tensor([0, 1, 2])
    plain, oracle = pool.clone(), SpeculativeReference(pool)
    heads = {"A_log": torch.zeros(2, device=DEVICE), "dt_bias": torch.full((2,), -40.0, device=DEVICE)}
    accepted, errors, plain_errors = None, [], []
    for step in range(1000):
        tokens = {**setup.tokens(3, 2, step), **heads}
        gdn_mtp.verify(
            **tokens, state_pool=pool, state_indices=slots, cache=cache, num_accepted=accepted, fold=fold
        )
        oracle.verify(**tokens, state_indices=slots, num_accepted=accepted)
        gdn_mtp.gated_delta_rule_mtp(
            **tokens, initial_state=plain, initial_state_indices=slots, disable_state_update=False
        )
        accepted = int32([2, 2, 2])
        expected = torch.stack([oracle.windows[slot][-1] for slot in range(3)])
        states = gdn_mtp.materialize(pool, slots, cache, accepted)
        for actual, noted in ((states, errors), (plain, plain_errors)):
            error = (actual.double() - expected).norm() / expected.norm()
            noted.append(float(error) / UNIT_ROUNDOFF[state])
    early, late = (sum(errors[first : first + 200]) / 200 for first in (200, 800))
    assert late < 1.1 * early
    assert late < 1.1 * sum(plain_errors[800:]) / 200
    assert max(errors[200:]) < 1.5 * early
