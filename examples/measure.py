"""Wall times of a served model's phases, and time and error of the two operations by themselves.

On a machine without a GPU these times are those of the PyTorch providers: they show that everything runs and
how it scales, not what a kernel does.
"""

from __future__ import annotations

import dataclasses
import statistics
import time
from collections import defaultdict
from collections.abc import Callable, Sequence
from functools import partial

import gdn_mtp
import mla_core
import torch
from common import Decoder
from torch import Tensor

BATCH = 4
MIN_REPEATS = 5
MIN_SECONDS = 0.2


@dataclasses.dataclass(frozen=True)
class Point:
    """One size: milliseconds per call (median), and RMS error relative to the RMS of the float64 result."""

    size: int
    milliseconds: float
    relative_error: float


@dataclasses.dataclass(frozen=True)
class Sweep:
    """One curve."""

    label: str
    points: tuple[Point, ...]


class TimedDecoder:
    """Passes everything on to a `common.Decoder` or `common.Engine` and notes how long each call took."""

    def __init__(self, decoder: Decoder, device: torch.device) -> None:
        self.decoder = decoder
        self.device = device
        self.seconds: dict[str, list[float]] = defaultdict(list)

    def __getattr__(self, phase: str) -> Callable[..., object]:
        return partial(self._timed, phase)

    def _timed(self, phase: str, *arguments: object) -> object:
        synchronize(self.device)
        start = time.perf_counter()
        result = getattr(self.decoder, phase)(*arguments)
        synchronize(self.device)
        self.seconds[phase].append(time.perf_counter() - start)
        return result

    def milliseconds_per_token(self, num_tokens: int) -> float:
        """Mean over `num_tokens` generated tokens: all the time spent after prefill, divided by them."""
        seconds = sum(sum(calls) for phase, calls in self.seconds.items() if phase != "prefill")
        return 1e3 * seconds / num_tokens


def synchronize(device: torch.device) -> None:
    """Wait for the work queued on `device`."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def median_milliseconds(call: Callable[[], object], device: torch.device) -> float:
    """Median wall time of `call` after one warm-up, over at least MIN_REPEATS calls and MIN_SECONDS."""
    call()
    seconds: list[float] = []
    while len(seconds) < MIN_REPEATS or sum(seconds) < MIN_SECONDS:
        synchronize(device)
        start = time.perf_counter()
        call()
        synchronize(device)
        seconds.append(time.perf_counter() - start)
    return 1e3 * statistics.median(seconds)


def relative_rms(value: Tensor, exact: Tensor) -> float:
    """RMS of value - exact over RMS of exact, in float64."""
    value, exact = value.double().cpu(), exact.double().cpu()
    return float((value - exact).square().mean().sqrt() / exact.square().mean().sqrt())


def sweep_mla(device: torch.device, seed: int, seq_lens: Sequence[int] = (128, 512, 2048)) -> list[Sweep]:
    """`mla_core.decode` in bfloat16 over sequence length: 4 requests, 16 heads, pages of 64."""
    return [
        Sweep(f"q_len = {q_len}", tuple(mla_point(device, seed, q_len, seq_len) for seq_len in seq_lens))
        for q_len in (1, 4)
    ]


def mla_point(device: torch.device, seed: int, q_len: int, seq_len: int) -> Point:
    """One call of `mla_core.decode` on random pages in random order."""
    generator = torch.Generator().manual_seed(seed)
    page_size, num_heads, head_dim = 64, 16, 576
    max_pages = -(-seq_len // page_size)
    table = torch.randperm(BATCH * max_pages, generator=generator).view(BATCH, max_pages)
    query = torch.randn(BATCH, q_len, num_heads, head_dim, generator=generator)
    pages = torch.randn(BATCH * max_pages, page_size, head_dim, generator=generator)
    arguments = (
        query.to(device, torch.bfloat16),
        pages.to(device, torch.bfloat16),
        table.to(device, torch.int32),
        torch.full((BATCH,), seq_len, dtype=torch.int32, device=device),
    )
    decode = partial(mla_core.decode, *arguments, softmax_scale=192**-0.5)
    exact, _ = mla_core.decode_reference(*arguments, softmax_scale=192**-0.5)
    return Point(seq_len, median_milliseconds(decode, device), relative_rms(decode(), exact))


def sweep_gdn(device: torch.device, seed: int, token_counts: Sequence[int] = (1, 2, 4, 8)) -> list[Sweep]:
    """`gdn_mtp` over tokens per request: one verify call, against as many single-token decode calls.

    4 requests, Qwen3-Next's 16 key and 32 value heads of 128, bfloat16 inputs, float32 states.
    """
    sweeps = {"one verify call, states kept": True, "T decode calls": False}
    return [
        Sweep(label, tuple(gdn_point(device, seed, num_tokens, verify) for num_tokens in token_counts))
        for label, verify in sweeps.items()
    ]


def gdn_point(device: torch.device, seed: int, num_tokens: int, verify: bool) -> Point:
    """`num_tokens` tokens through one multi-token call, or through single-token calls, on random states."""
    generator = torch.Generator().manual_seed(seed)
    num_heads, num_value_heads, dim = 16, 32, 128

    def random(*shape: int, dtype: torch.dtype = torch.bfloat16) -> Tensor:
        return torch.randn(shape, generator=generator).to(device, dtype)

    q, k = random(2, BATCH, num_tokens, num_heads, dim)
    v = random(BATCH, num_tokens, num_value_heads, dim)
    a, b = random(2, BATCH, num_tokens, num_value_heads)
    log_decay, dt_bias = random(2, num_value_heads, dtype=torch.float32)
    pool = random(BATCH, num_value_heads, dim, dim, dtype=torch.float32)
    slots = torch.arange(BATCH, dtype=torch.int32, device=device)
    exact = gdn_mtp.gated_delta_rule_reference(
        q, k, v, pool, log_decay, a, dt_bias, b, initial_state_indices=slots
    ).output
    states = pool.new_empty(BATCH, num_tokens, *pool.shape[1:])

    def run_verify() -> Tensor:
        return gdn_mtp.gated_delta_rule_mtp(
            q,
            k,
            v,
            pool,
            slots,
            log_decay,
            a,
            dt_bias,
            b,
            intermediate_states_buffer=states,
            disable_state_update=True,
        )[0]

    def run_decodes() -> Tensor:
        outputs = [
            gdn_mtp.gated_delta_rule_decode_pretranspose(
                *(x[:, t : t + 1] for x in (q, k, v)),
                pool,
                log_decay,
                a[:, t : t + 1],
                dt_bias,
                b[:, t : t + 1],
            )[0]
            for t in range(num_tokens)
        ]
        return torch.cat(outputs, dim=1)

    run = run_verify if verify else run_decodes
    error = relative_rms(run(), exact)  # before the timed calls: decoding advances the pool
    return Point(num_tokens, median_milliseconds(run, device), error)
