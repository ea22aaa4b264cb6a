"""Provider `trtllm-gen`: FlashInfer's decode kernels for SM100 and SM103, where FlashInfer is installed.

A launch is one call of `flashinfer.mla.trtllm_batch_decode_with_kv_cache_mla(..., backend="trtllm-gen")`:
    bmm1_scale = softmax_scale        bmm2_scale = output_scale        return_lse_base = "basee"
Scales are handed over in natural units, floats and device tensors alike: FlashInfer multiplies either kind
of bmm1_scale by log2(e) itself. It leaves rows that see no key unwritten or writes NaN to them (its issue
2883), so they are set to zero, and their LSE to -inf, after the call.

Counters of split-KV. FlashInfer's kernels count finished blocks in a buffer that must be zero before the
first launch, that every launch leaves zero, and that launches in flight may not share. A workspace has just
that life: one per stream in flight. So each workspace gets counters of its own, zeroed once when it is first
seen, and kept until the process ends because a captured CUDA graph may refer to them. A workspace that is
first seen while a graph is captured has its own first bytes as counters, which a captured memset zeroes at
every replay.

FlashInfer is imported by `load()` and not before. Importing it, compiling its host code and fetching cubins
may need nvcc and a network; see its documentation of `flashinfer-cubin` and `flashinfer-jit-cache`.
"""

from __future__ import annotations

import importlib
import importlib.metadata
import inspect
import re
import threading
from collections.abc import Callable, Sequence
from contextlib import nullcontext
from dataclasses import dataclass
from typing import Any

import torch
from kernel_dispatch import Arch, ArgumentError, Kernel, Provider, debug_mode
from mla_core import DecodeProblem

DISTRIBUTION = "flashinfer-python"
FIRST_VERSION, END_OF_VERSIONS = (0, 7, 2), (0, 8)  # the interface below is that of 0.7.2
BACKEND = "trtllm-gen"
TACTIC = "default"  # FlashInfer chooses its kernel itself

# (kv_lora_rank, qk_rope_head_dim) -> (qk_nope_head_dim of the models that have it, most heads).
DIMENSIONS = {(512, 64): (128, 128), (256, 64): (64, 32)}
PAGE_SIZES = (32, 64)
HEADS_WITHOUT_KERNEL = range(65, 128)
MAX_BATCH = 65535  # the grid's z dimension

# What FlashInfer takes from its workspace without checking that it is there: the partial output of a block
# per SM. Tiles of its MLA kernels have up to 64 rows, which its reduction kernel reads as 16 bits; this
# allows for twice of each.
PARTIAL_ROWS_PER_SM = 128
PARTIAL_BYTES, PARTIAL_STATS_BYTES = 4, 8
# Softmax statistics, where the LSE is wanted: a slot per head and token, tokens rounded up, and a guard.
STATS_TOKENS, STATS_BYTES, STATS_GUARD_BYTES = 256, 8, 1 << 20

ALIGN_BYTES = 16  # of addresses and strides of what TMA reads, and of counters and scratch
MAX_WORKSPACES = 256  # that get counters of their own; any further one has its own bytes zeroed per launch

# The arguments that a launch gives, all by name.
PASSED = frozenset(
    (
        *("query", "kv_cache", "workspace_buffer", "qk_nope_head_dim", "kv_lora_rank", "qk_rope_head_dim"),
        *("block_tables", "seq_lens", "max_seq_len", "out", "bmm1_scale", "bmm2_scale", "enable_pdl"),
        *("backend", "is_var_seq", "lse", "return_lse", "return_lse_base", "cum_seq_lens_q", "max_q_len"),
        "multi_ctas_kv_counter_buffer",
    )
)


def objection(problem: DecodeProblem, arch: Arch) -> str | None:
    """Why FlashInfer's kernels do not run the problem, or None; imports nothing of FlashInfer."""
    return _objection_to_problem(problem) or _objection_to_installation(_installed_version())


def _objection_to_problem(problem: DecodeProblem) -> str | None:
    ranks = (problem.kv_lora_rank, problem.qk_rope_head_dim)
    if ranks not in DIMENSIONS:
        known = " and ".join(f"{latent} + {rope}" for latent, rope in DIMENSIONS)
        return f"kv_lora_rank + qk_rope_head_dim = {ranks[0]} + {ranks[1]}, the kernels have {known}"
    if problem.num_heads in HEADS_WITHOUT_KERNEL:
        return f"num_heads = {problem.num_heads}, the kernels take 1 to 64, and 128"
    if problem.num_heads > DIMENSIONS[ranks][1]:
        return (
            f"num_heads = {problem.num_heads} with kv_lora_rank = {ranks[0]}, "
            f"the kernels take up to {DIMENSIONS[ranks][1]}"
        )
    if problem.page_size not in PAGE_SIZES:
        return f"page_size = {problem.page_size}, the kernels take {' and '.join(map(str, PAGE_SIZES))}"
    if problem.q_dtype not in (torch.bfloat16, torch.float8_e4m3fn):
        return f"query and cache in {problem.q_dtype}, the kernels take bfloat16 and float8_e4m3fn"
    if problem.out_dtype is not torch.bfloat16:
        return f"output in {problem.out_dtype}, the kernels write bfloat16"
    if problem.ragged and problem.return_lse:
        return "return_lse with ragged queries, which FlashInfer refuses"
    if problem.batch > MAX_BATCH:
        return f"batch = {problem.batch}, a grid has at most {MAX_BATCH}"
    return _objection_to_scales(problem)


def _objection_to_scales(problem: DecodeProblem) -> str | None:
    are_tensors = (problem.softmax_scale_is_tensor, problem.output_scale_is_tensor)
    if any(are_tensors) and problem.q_dtype is not torch.float8_e4m3fn:
        return f"scales in device tensors with {problem.q_dtype}, FlashInfer supports them for fp8 only"
    if any(are_tensors) and not all(are_tensors):
        return "one scale a float and one a device tensor, FlashInfer wants two of a kind"
    return None


def _objection_to_installation(version: str | None) -> str | None:
    needed = f"{DISTRIBUTION} {_dotted(FIRST_VERSION)} or newer, below {_dotted(END_OF_VERSIONS)}"
    if version is None:
        return f"needs {needed}; none is installed"
    match = re.match(r"(\d+)\.(\d+)(?:\.(\d+))?", version)
    release = tuple(int(part or 0) for part in match.groups()) if match else ()
    if not FIRST_VERSION <= release < END_OF_VERSIONS:
        return f"needs {needed}; {version} is installed"
    return None


def _dotted(version: tuple[int, ...]) -> str:
    return ".".join(map(str, version))


def _installed_version() -> str | None:
    try:
        return importlib.metadata.version(DISTRIBUTION)
    except importlib.metadata.PackageNotFoundError:
        return None


def _load() -> Kernel:
    decode = importlib.import_module("flashinfer.mla").trtllm_batch_decode_with_kv_cache_mla
    counter_bytes = importlib.import_module("flashinfer.utils").get_trtllm_gen_multi_ctas_kv_counter_bytes
    missing = PASSED - inspect.signature(decode).parameters.keys()
    if missing:
        raise ImportError(
            f"trtllm_batch_decode_with_kv_cache_mla of {DISTRIBUTION} {_installed_version()} has no argument "
            f"{', '.join(sorted(missing))}"
        )
    return TrtllmGenKernel(decode, counter_bytes)


PROVIDER = Provider(
    name="trtllm-gen",
    archs=("sm_100", "sm_103"),
    supports=objection,
    load=_load,
    priority=5,  # below the kernels of this package, so that `auto` takes it where tuning found it faster
)


@dataclass(frozen=True)
class WorkspaceLayout:
    """How a workspace is divided: counters, used where it has none of its own, then FlashInfer's scratch."""

    counter_bytes: int
    scratch_bytes: int

    @property
    def counter_slot_bytes(self) -> int:
        """Bytes that the counters take up in the workspace."""
        return _round_up(self.counter_bytes, ALIGN_BYTES)

    @property
    def nbytes(self) -> int:
        """Bytes of a workspace."""
        return self.counter_slot_bytes + self.scratch_bytes

    @staticmethod
    def of(problem: DecodeProblem, arch: Arch, counter_bytes: int) -> WorkspaceLayout:
        """The division for a problem."""
        row_bytes = PARTIAL_STATS_BYTES + PARTIAL_BYTES * problem.kv_lora_rank
        scratch_bytes = arch.sm_count * PARTIAL_ROWS_PER_SM * row_bytes
        if problem.return_lse:
            slots = problem.batch * problem.num_heads * _round_up(problem.q_len, STATS_TOKENS)
            scratch_bytes += _round_up(STATS_BYTES * slots, ALIGN_BYTES) + STATS_GUARD_BYTES
        return WorkspaceLayout(counter_bytes, scratch_bytes)


class TrtllmGenKernel:
    """The kernel object of the provider.

    decode: FlashInfer's `trtllm_batch_decode_with_kv_cache_mla`. counter_bytes: its function that sizes the
    counters for a batch, a number of heads and a number of SMs.
    """

    def __init__(self, decode: Callable[..., Any], counter_bytes: Callable[[int, int, int], int]) -> None:
        self._decode = decode
        self._counter_bytes = counter_bytes

    def workspace_nbytes(self, problem: DecodeProblem, arch: Arch, tactic: str | None = None) -> int:
        """Bytes that FlashInfer may write at most, and the counters."""
        return self._layout(problem, arch).nbytes

    def tactics(self, problem: DecodeProblem, arch: Arch) -> Sequence[str]:
        """The one tactic there is."""
        return (TACTIC,)

    def prepare(
        self, problem: DecodeProblem, arch: Arch, device: torch.device, tactic: str
    ) -> Callable[..., None]:
        """The launcher of a problem, once launched on empty inputs.

        That builds FlashInfer's host code, fetches and loads the cubin that this problem needs, and raises
        here whatever FlashInfer has against it.
        """
        if _capturing():
            raise RuntimeError(
                f"{problem.describe()} has no plan for trtllm-gen yet, and none can be made while a CUDA "
                "graph is being captured; make the plan, or call once, before the capture"
            )
        launcher = Launcher(problem, self._layout(problem, arch), self._decode, device)
        with torch.cuda.device(device) if device.type == "cuda" else nullcontext():
            _launch_on_empty_inputs(launcher)
        return launcher

    def _layout(self, problem: DecodeProblem, arch: Arch) -> WorkspaceLayout:
        counters = self._counter_bytes(problem.batch, problem.num_heads, arch.sm_count)
        return WorkspaceLayout.of(problem, arch, counters)


_counters_of: dict[tuple[torch.device, int, int], torch.Tensor] = {}
_counters_lock = threading.Lock()


def counters_for(workspace: torch.Tensor, layout: WorkspaceLayout) -> torch.Tensor:
    """Zeroed counters for a launch with this workspace, [counter_bytes] uint8; the module says how kept."""
    key = (workspace.device, workspace.data_ptr(), layout.counter_bytes)
    counters = _counters_of.get(key)
    if counters is not None:
        return counters
    with _counters_lock:
        if not _capturing() and len(_counters_of) < MAX_WORKSPACES:
            zeros = torch.zeros(layout.counter_bytes, dtype=torch.uint8, device=workspace.device)
            return _counters_of.setdefault(key, zeros)
    return workspace[: layout.counter_bytes].zero_()


@dataclass(frozen=True)
class Launcher:
    """Launches one problem on one device; takes what every launcher of `mla_core.decode.v1` takes."""

    problem: DecodeProblem
    layout: WorkspaceLayout
    decode: Callable[..., Any]
    device: torch.device

    def __call__(
        self,
        query: torch.Tensor,  # [batch, q_len, num_heads, head_dim], or ragged [total_q, num_heads, head_dim]
        kv_cache: torch.Tensor,  # [num_pages, page_size, head_dim]
        block_tables: torch.Tensor,  # [batch, max_pages] int32
        seq_lens: torch.Tensor,  # [batch] int32
        cum_seq_lens_q: torch.Tensor | None,  # [batch + 1] int32
        softmax_scale: float | torch.Tensor,
        output_scale: float | torch.Tensor,
        out: torch.Tensor,  # [..., num_heads, kv_lora_rank] bfloat16
        lse: torch.Tensor | None,  # [batch, q_len, num_heads] float32
        workspace: torch.Tensor | None,
    ) -> None:
        """Write `out` and, where given, `lse`, on the current stream of the device."""
        problem, layout = self.problem, self.layout
        self._check_device(query)
        _check_layouts(query, kv_cache, block_tables, out, lse)
        if debug_mode() and not _capturing():
            _check_pages_present(block_tables, seq_lens, problem.page_size)
        assert workspace is not None
        ranks = (problem.kv_lora_rank, problem.qk_rope_head_dim)
        self.decode(
            query=query,
            kv_cache=kv_cache,
            workspace_buffer=workspace[layout.counter_slot_bytes : layout.nbytes],
            qk_nope_head_dim=DIMENSIONS[ranks][0],
            kv_lora_rank=ranks[0],
            qk_rope_head_dim=ranks[1],
            block_tables=block_tables,
            seq_lens=seq_lens,
            max_seq_len=problem.max_seq_len,
            out=out,
            bmm1_scale=softmax_scale,
            bmm2_scale=output_scale,
            enable_pdl=problem.enable_pdl,
            backend=BACKEND,
            is_var_seq=problem.is_var_seq,
            lse=None if lse is None else lse.flatten(0, 1),
            return_lse=lse is not None,
            return_lse_base=None if lse is None else "basee",
            cum_seq_lens_q=cum_seq_lens_q,
            max_q_len=problem.q_len if problem.ragged else None,
            multi_ctas_kv_counter_buffer=counters_for(workspace, layout),
        )
        blind = rows_without_keys(seq_lens, cum_seq_lens_q, query.shape[:-2])
        out.masked_fill_(blind[..., None, None], 0.0)
        if lse is not None:
            lse.masked_fill_(blind[..., None], -torch.inf)

    def _check_device(self, query: torch.Tensor) -> None:
        if self.device.type != "cuda":
            return
        current = torch.cuda.current_device()
        index = current if self.device.index is None else self.device.index
        if query.device.index != index or current != index:
            raise ArgumentError(
                "query",
                f"on {query.device} with cuda:{current} current, expected both to be cuda:{index}, which the "
                "plan is for",
            )


def rows_without_keys(
    seq_lens: torch.Tensor, cum_seq_lens_q: torch.Tensor | None, leading: Sequence[int]
) -> torch.Tensor:
    """Which query tokens see no key, bool of the shape `leading` ([batch, q_len], or ragged [total_q])."""
    device = seq_lens.device
    if cum_seq_lens_q is not None:
        token = torch.arange(leading[0], device=device, dtype=torch.int32)
        request = torch.searchsorted(cum_seq_lens_q[1:], token, right=True)
        return seq_lens[request] < cum_seq_lens_q[request + 1] - token
    q_len = leading[1]
    if q_len == 1:
        return seq_lens.unsqueeze(1) < 1
    tokens_to_end = torch.arange(q_len, 0, -1, device=device, dtype=torch.int32)  # that token included
    return seq_lens.unsqueeze(1) < tokens_to_end


def _check_layouts(
    query: torch.Tensor,
    kv_cache: torch.Tensor,
    block_tables: torch.Tensor,
    out: torch.Tensor,
    lse: torch.Tensor | None,
) -> None:
    """Raise ArgumentError for what FlashInfer would misread, fail on, or copy at every launch."""
    for name, tensor in (("query", query), ("kv_cache", kv_cache), ("out", out)):
        element_bytes = tensor.element_size()
        misaligned = [stride for stride in tensor.stride()[:-1] if stride * element_bytes % ALIGN_BYTES]
        if misaligned or tensor.data_ptr() % ALIGN_BYTES:
            raise ArgumentError(
                name,
                f"strides {tensor.stride()} at address {tensor.data_ptr():#x}, expected an address and "
                f"strides that are multiples of {ALIGN_BYTES} bytes for this provider",
            )
    for name, tensor in (("block_tables", block_tables), ("out", out)):
        if not tensor.is_contiguous():
            shape = tuple(tensor.shape)
            raise ArgumentError(
                name, f"strides {tensor.stride()} for shape {shape}, expected it contiguous for this provider"
            )
    if out.dim() == 4:
        _check_tokens_evenly_spaced("query", query)
        if lse is not None:
            _check_tokens_evenly_spaced("lse", lse)


def _check_tokens_evenly_spaced(name: str, tensor: torch.Tensor) -> None:
    batch, q_len = tensor.shape[:2]
    between_requests, between_tokens = tensor.stride()[:2]
    if batch > 1 and q_len > 1 and between_requests != q_len * between_tokens:
        raise ArgumentError(
            name,
            f"strides {tensor.stride()} for shape {tuple(tensor.shape)}, expected the tokens of one request "
            "to follow those of the one before for this provider",
        )


def _check_pages_present(block_tables: torch.Tensor, seq_lens: torch.Tensor, page_size: int) -> None:
    first_key = torch.arange(block_tables.shape[1], device=block_tables.device) * page_size
    absent = (block_tables < 0) & (first_key < seq_lens.unsqueeze(1))
    if bool(absent.any()):
        raise ArgumentError(
            "block_tables", "a negative entry before the end of a sequence, which this provider cannot skip"
        )


def _launch_on_empty_inputs(launcher: Launcher) -> None:
    """One launch with the sizes of the problem and sequences of one key; waits for nothing."""
    problem, device = launcher.problem, launcher.device
    batch, num_heads = problem.batch, problem.num_heads
    leading = (batch,) if problem.ragged else (batch, problem.q_len)
    ones = torch.ones(1, device=device)
    lse = torch.empty(*leading, num_heads, device=device) if problem.return_lse else None
    offsets = torch.arange(batch + 1, dtype=torch.int32, device=device) if problem.ragged else None
    launcher(
        query=torch.zeros(*leading, num_heads, problem.head_dim, dtype=problem.q_dtype, device=device),
        kv_cache=torch.zeros(1, problem.page_size, problem.head_dim, dtype=problem.kv_dtype, device=device),
        block_tables=torch.zeros(batch, problem.max_pages, dtype=torch.int32, device=device),
        seq_lens=torch.ones(batch, dtype=torch.int32, device=device),
        cum_seq_lens_q=offsets,
        softmax_scale=ones if problem.softmax_scale_is_tensor else 1.0,
        output_scale=ones if problem.output_scale_is_tensor else 1.0,
        out=torch.empty(*leading, num_heads, problem.kv_lora_rank, dtype=problem.out_dtype, device=device),
        lse=lse,
        workspace=torch.empty(launcher.layout.nbytes, dtype=torch.uint8, device=device),
    )


def _capturing() -> bool:
    return torch.cuda.is_available() and torch.cuda.is_current_stream_capturing()


def _round_up(value: int, multiple: int) -> int:
    return -(-value // multiple) * multiple
