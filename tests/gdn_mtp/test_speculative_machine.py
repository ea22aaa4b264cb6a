"""Random histories of 1,000 steps: verify, accept, fold, commit, copy and reset, held against the oracle."""

import random

import torch
from gdn_support import BF16, DEVICE, FP16, FP32
from hypothesis import HealthCheck, settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, rule
from speculative_support import History, Setup, random_tree

SEEDS = st.integers(0, 255)  # few bits: hypothesis bounds what an example of 1,000 steps may draw
POOL_SIZE = 5
ON_GPU = DEVICE.type == "cuda"  # fewer kinds of calls there, each of which compiles a kernel
KINDS = [*["chain"] * 8, *["tree"] * 8, "commit", "commit", "copy", "reset"]


class SpeculativeMachine(RuleBasedStateMachine):
    """One pool and its cache; each rule makes its choices from a seed, and `History` compares."""

    @initialize(
        state=st.sampled_from([FP32, BF16]),
        io=st.sampled_from([BF16] if ON_GPU else [BF16, FP16, FP32]),
        tokens_and_capacity=st.sampled_from(
            [(2, 8)] if ON_GPU else [(1, 2), (2, 8), (3, 7), (4, 8), (4, 16), (5, 32)]
        ),
        l2norm=st.just(True) if ON_GPU else st.booleans(),
    )
    def start(self, state, io, tokens_and_capacity, l2norm):
        torch.set_num_threads(1)
        self.steps = 0
        max_tokens, capacity = tokens_and_capacity
        self.room = capacity - 2 * max_tokens
        self.history = History(
            Setup(
                *(POOL_SIZE, 1, 2, *((64, 64) if ON_GPU else (8, 4)), max_tokens, capacity),
                io=io,
                state=state,
                l2norm=l2norm,
            )
        )

    # One rule: of several, the machine would leave some out of an example.
    @rule(kind=st.sampled_from(KINDS), seed=SEEDS)
    def step(self, kind, seed):
        self.steps += 1
        seed += 256 * self.steps
        rng = random.Random(seed)
        if kind in ("chain", "tree"):
            self.verify(rng, seed, kind == "tree")
        elif kind == "commit":
            slots = self.slots(rng)
            self.history.commit(slots, self.history.random_acceptance(slots, rng))
        elif kind == "copy":
            count = rng.randint(1, 3)
            src = [rng.randrange(-1, POOL_SIZE) for _ in range(count)]
            self.history.copy(src, rng.sample(range(POOL_SIZE), count))
        else:
            self.history.reset([rng.randrange(POOL_SIZE)], seed)

    def verify(self, rng, seed, tree):
        slots, T = self.slots(rng), rng.randint(1, self.history.setup.max_tokens)
        self.history.verify(
            slots,
            T,
            seed,
            self.history.random_acceptance(slots, rng) if rng.random() < 0.9 else None,
            num_tokens=[rng.randint(0, T) for _ in slots] if rng.random() < 0.3 else None,
            parents=[random_tree(T, rng) for _ in slots] if tree else None,
            fold=rng.choice(["auto", "full", "always", rng.randint(0, self.room)]),
        )

    def slots(self, rng):
        """Some slots in any order, and padding."""
        drawn = rng.sample(range(POOL_SIZE), rng.randint(1, POOL_SIZE))
        return [-1 if rng.random() < 0.15 else slot for slot in drawn]

    def teardown(self):
        self.history.check_against_sequential_decoding()


SpeculativeMachine.TestCase.settings = settings(
    max_examples=3,
    stateful_step_count=1001,  # the first is `start`
    deadline=None,
    suppress_health_check=list(HealthCheck),
)
TestSpeculativeMachine = SpeculativeMachine.TestCase
