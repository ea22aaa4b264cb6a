"""`decode` on the CPU against the float64 oracle, with NaN in all memory that must not be read."""

import itertools
import math
import weakref
from fractions import Fraction

import kernel_dispatch
import pytest
import torch
from kernel_testing import UNUSED_INDEX, poisoned
from mla_cases import BF16, E4M3, FP16, Case, assert_decoded, bits, decode_and_check
from mla_core import DecodeProblem, decode, plan, torch_kernel, workspace_nbytes
from torch.utils._python_dispatch import TorchDispatchMode

LENGTHS = (0, 1, 67, 300, 64)  # empty, one key, a partial last page, several chunks, a full last page
HEADS_AND_Q_LENS = ((1, 1), (1, 4), (16, 1), (16, 2), (96, 2), (128, 1), (128, 4))
MATRIX = [
    Case(LENGTHS, q_len, num_heads, page_size, dtype)
    for dtype, page_size, (num_heads, q_len) in itertools.product(
        (BF16, FP16, E4M3), (1, 16, 64, 100), HEADS_AND_Q_LENS
    )
]
RAGGED = [
    Case((9, 130, 2, 70), q_lens=(2, 1, 4, 0), dtype=BF16),
    Case((300,), q_lens=(3,), num_heads=128, dtype=E4M3),
    Case((0, 5, 64), q_lens=(1, 5, 2), num_heads=7, page_size=16, dtype=FP16),
]


@pytest.mark.parametrize("case", MATRIX, ids=str)
def test_matches_the_oracle(case: Case) -> None:
    decode_and_check(case)


@pytest.mark.parametrize("case", RAGGED, ids=str)
def test_ragged_queries_match_the_oracle(case: Case) -> None:
    decode_and_check(case)


@pytest.mark.parametrize("ranks", [(1, 1), (7, 3), (256, 32)], ids=lambda ranks: f"d{ranks[0]}+{ranks[1]}")
def test_any_latent_and_rope_size(ranks: tuple[int, int]) -> None:
    decode_and_check(Case((3, 40), q_len=2, latent=ranks[0], rope=ranks[1]))


@pytest.mark.parametrize("out_dtype", [BF16, FP16, E4M3], ids=str)
@pytest.mark.parametrize("dtype", [BF16, FP16, E4M3], ids=str)
def test_every_output_dtype(dtype: torch.dtype, out_dtype: torch.dtype) -> None:
    case = Case((30, 5, 0), num_heads=4, dtype=dtype)
    decode_and_check(case, out_dtype=out_dtype)
    inputs = case.inputs()
    out = decode(*inputs.positional, softmax_scale=case.scale, out_dtype=out_dtype)
    assert out.dtype is out_dtype


@pytest.mark.parametrize(("dtype", "expected"), [(BF16, BF16), (FP16, FP16), (E4M3, BF16)], ids=str)
def test_default_output(dtype: torch.dtype, expected: torch.dtype) -> None:
    case = Case((30, 5), q_len=2, num_heads=4, dtype=dtype)
    out, lse = decode(*case.inputs().positional, softmax_scale=case.scale, return_lse=True)
    assert (out.dtype, lse.dtype) == (expected, torch.float32)
    assert (out.shape, lse.shape) == ((2, 2, 4, 512), (2, 2, 4))


def test_fp8_output_saturates() -> None:
    out, _ = decode_and_check(Case((30, 5), num_heads=4), out_dtype=E4M3, output_scale=1e4)
    assert out.float().abs().max() == 448.0


def test_query_of_three_dimensions_and_cache_of_four() -> None:
    case = Case(LENGTHS, num_heads=8)
    inputs = case.inputs()
    query, kv_cache = inputs.query.squeeze(1), inputs.kv_cache.unsqueeze(1)
    out, lse = poisoned((5, 8, 512), BF16), poisoned((5, 8), torch.float32)
    rest = (kv_cache, inputs.block_tables, inputs.seq_lens)
    decode(query, *rest, softmax_scale=case.scale, out=out, lse=lse, return_lse=True)
    assert_decoded(out.unsqueeze(1), lse.unsqueeze(1), inputs, softmax_scale=case.scale)


def test_strided_inputs_and_outputs() -> None:
    case = Case(LENGTHS, q_len=2, num_heads=8)
    inputs = case.inputs()
    wide_query = poisoned((5, 2, 16, 600), BF16)
    wide_query[:, :, ::2, :576] = inputs.query
    wide_cache = poisoned((inputs.kv_cache.shape[0], 70, 640), BF16)
    wide_cache[:, :64, :576] = inputs.kv_cache
    wide_tables = torch.full((10, 20), UNUSED_INDEX, dtype=torch.int32)
    tables = wide_tables[::2, : inputs.block_tables.shape[1]]
    tables.copy_(inputs.block_tables)
    out, lse = poisoned((5, 4, 9, 520), BF16), poisoned((10, 2, 16), torch.float32)
    untouched = bits(out[:, 1::2])
    decode(
        wide_query[:, :, ::2, :576],
        wide_cache[:, :64, :576],
        tables,
        inputs.seq_lens,
        softmax_scale=case.scale,
        out=out[:, ::2, 1:, 4:516],
        lse=lse[::2, :, :8],
        return_lse=True,
    )
    assert_decoded(out[:, ::2, 1:, 4:516], lse[::2, :, :8], inputs, softmax_scale=case.scale)
    assert out[:, ::2, 0].isnan().all()
    assert out[..., :4].isnan().all()
    assert torch.equal(bits(out[:, 1::2]), untouched)


def test_negative_table_entries_are_absent_keys() -> None:
    case = Case((300, 130, 64), q_len=2, num_heads=4)
    inputs = case.inputs()
    inputs.block_tables[0, 1] = -1
    inputs.block_tables[1, 2] = -5  # the last page, which the query tokens themselves are in
    inputs.block_tables[2, 0] = -1  # all there is
    out, lse = decode(*inputs.positional, softmax_scale=case.scale, return_lse=True)
    assert_decoded(out, lse, inputs, softmax_scale=case.scale)
    assert (lse[2] == -math.inf).all()


def test_page_offsets_past_two_to_the_31_elements() -> None:
    kv_cache = torch.empty(2**31 // 576 + 3, 1, 576, dtype=E4M3)  # untouched pages take no memory
    case = Case((2,), num_heads=2, page_size=1, dtype=E4M3)
    inputs = case.inputs()
    pages = torch.tensor([0, len(kv_cache) - 1])
    own_pages = inputs.block_tables[0, :2].long()
    kv_cache.view(torch.uint8)[pages] = inputs.kv_cache.view(torch.uint8)[own_pages]
    out = decode(inputs.query, kv_cache, pages.view(1, 2).int(), inputs.seq_lens, softmax_scale=case.scale)
    assert torch.equal(out, decode(*inputs.positional, softmax_scale=case.scale))


class RefuseFp8Indexing(TorchDispatchMode):
    """Stands in for torch 2.9, which cannot index an fp8 tensor by tensors on a CPU."""

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        if func is torch.ops.aten.index.Tensor and args[0].dtype is E4M3:
            raise NotImplementedError('"index_cpu" not implemented for Float8_e4m3fn')
        return func(*args, **(kwargs or {}))


def test_an_fp8_cache_is_gathered_as_bytes() -> None:
    case = Case((30, 5), num_heads=4, dtype=E4M3)
    inputs = case.inputs()
    problem = DecodeProblem(
        batch=2,
        num_heads=4,
        page_size=64,
        max_seq_len=64,
        max_pages=inputs.block_tables.shape[1],
        q_dtype=E4M3,
    )
    out = poisoned((2, 1, 4, 512), BF16)
    with RefuseFp8Indexing():
        plan(problem, "cpu").run(*inputs.positional, softmax_scale=case.scale, out=out)
    assert_decoded(out, None, inputs, softmax_scale=case.scale)


def test_more_query_tokens_than_keys() -> None:
    _, lse = decode_and_check(Case((2, 0, 5), q_len=4, num_heads=3))
    assert (lse[0, :2] == -math.inf).all()
    assert lse[0, 2:].isfinite().all()


def test_no_requests_and_no_tokens() -> None:
    case = Case((5, 3), num_heads=2)
    query, kv_cache, block_tables, seq_lens = case.inputs().positional
    out = decode(query[:0], kv_cache, block_tables[:0], seq_lens[:0], softmax_scale=1.0)
    assert out.shape == (0, 1, 2, 512)
    offsets = torch.zeros(3, dtype=torch.int32)
    rest = (kv_cache, block_tables, seq_lens)
    ragged = {"cum_seq_lens_q": offsets, "max_q_len": 1}
    assert decode(query[:0, 0], *rest, softmax_scale=1.0, **ragged).shape == (0, 2, 512)


def test_long_queries_are_tiled() -> None:
    tokens = torch_kernel.TILE_ROWS // 64 + 3
    decode_and_check(Case((40, 3), q_len=tokens, num_heads=64))


@pytest.mark.parametrize("name", ["softmax_scale", "output_scale"])
def test_each_scale_acts_as_float_and_as_tensor(name: str) -> None:
    case = Case((30, 70), q_len=2, num_heads=4)
    as_float, lse = decode_and_check(case, **{name: 0.11})
    as_tensor, lse_from_tensor = decode_and_check(case, **{name: torch.tensor([0.11])})
    assert torch.equal(bits(as_float), bits(as_tensor))
    assert torch.equal(bits(lse), bits(lse_from_tensor))
    default, default_lse = decode_and_check(case)
    assert not torch.equal(default, as_float)
    assert torch.equal(default_lse, lse) == (name == "output_scale")


@pytest.mark.parametrize("name", ["softmax_scale", "output_scale"])
def test_scales_may_be_any_real_number(name: str) -> None:
    case = Case((30, 70), q_len=2, num_heads=4)
    as_float, _ = decode_and_check(case, **{name: 0.25})
    as_fraction, _ = decode_and_check(case, **{name: Fraction(1, 4)})
    assert torch.equal(bits(as_float), bits(as_fraction))


def test_negative_scale_and_zero_scale() -> None:
    decode_and_check(Case((30, 0)), softmax_scale=-0.2, output_scale=-3.0)
    _, lse = decode_and_check(Case((30, 7)), softmax_scale=0.0)
    assert torch.allclose(lse[:, 0, 0], torch.tensor([30.0, 7.0]).log())


def test_max_seq_len_bounds_the_lengths_only() -> None:
    case = Case((30, 70))
    assert torch.equal(decode_and_check(case)[0], decode_and_check(case, max_seq_len=70)[0])


def test_fixed_lengths() -> None:
    case = Case((70, 70, 70), q_len=2)
    assert torch.equal(decode_and_check(case)[0], decode_and_check(case, is_var_seq=False)[0])


def test_same_bits_run_to_run_alone_and_in_a_batch() -> None:
    case = Case((300, 0, 67, 513, 1, 256, 40), q_len=2, num_heads=16)
    query, kv_cache, block_tables, seq_lens = case.inputs().positional
    out, lse = decode_and_check(case)
    assert torch.equal(bits(decode_and_check(case)[0]), bits(out))
    for request in range(len(case.lengths)):
        one = slice(request, request + 1)
        alone, lse_alone = decode(
            query[one],
            kv_cache,
            block_tables[one],
            seq_lens[one],
            softmax_scale=case.scale,
            return_lse=True,
        )
        assert torch.equal(bits(alone[0]), bits(out[request]))
        assert torch.equal(bits(lse_alone[0]), bits(lse[request]))


def test_enable_pdl_is_refused_by_a_provider_that_cannot() -> None:
    case = Case((5,))
    for enable_pdl in (None, False):
        decode_and_check(case, enable_pdl=enable_pdl)
    with pytest.raises(kernel_dispatch.NoKernelError, match="enable_pdl=True"):
        decode_and_check(case, enable_pdl=True)


def test_backend_is_strict() -> None:
    decode_and_check(Case((5,)), backend="torch")
    with pytest.raises(kernel_dispatch.NoKernelError, match="no provider of that name"):
        decode_and_check(Case((5,)), backend="nobody")


@pytest.mark.parametrize("workspace", [None, torch.empty(16, dtype=torch.uint8)], ids=["none", "given"])
def test_plan_runs_like_decode(workspace: torch.Tensor | None) -> None:
    case = Case(LENGTHS, q_len=2, num_heads=8)
    inputs = case.inputs()
    max_pages = inputs.block_tables.shape[1]
    problem = DecodeProblem(
        batch=5,
        q_len=2,
        num_heads=8,
        page_size=64,
        max_seq_len=300,
        max_pages=max_pages,
        return_lse=True,
        output_scale_is_tensor=True,
    )
    assert workspace_nbytes(problem, "sm_90a", "torch") == 0
    decode_plan = plan(problem, "cpu")
    assert (decode_plan.provider, decode_plan.workspace_nbytes) == ("torch", 0)
    assert plan(problem, "cpu") is decode_plan
    out, lse = poisoned((5, 2, 8, 512), BF16), poisoned((5, 2, 8), torch.float32)
    decode_plan.run(
        *inputs.positional,
        softmax_scale=case.scale,
        output_scale=torch.tensor(0.5),
        out=out,
        lse=lse,
        workspace=workspace,
    )
    assert_decoded(out, lse, inputs, softmax_scale=case.scale, output_scale=0.5)


def test_ragged_plan_serves_any_number_of_tokens() -> None:
    problem = DecodeProblem(
        batch=2, q_len=3, num_heads=4, page_size=64, max_seq_len=128, max_pages=3, ragged=True
    )
    for q_lens in ((3, 1), (1, 1), (0, 2)):
        case = Case((9, 100), num_heads=4, q_lens=q_lens)
        inputs = case.inputs()
        out = poisoned((sum(q_lens), 4, 512), BF16)
        plan(problem, "cpu").run(
            *inputs.positional, softmax_scale=case.scale, cum_seq_lens_q=inputs.cum_seq_lens_q, out=out
        )
        assert_decoded(out, None, inputs, softmax_scale=case.scale)


class PeakMemory(TorchDispatchMode):
    """The most bytes of storage that results of operations hold at a time, apart from that of `arguments`."""

    def __init__(self, *arguments: torch.Tensor) -> None:
        super().__init__()
        self.peak_bytes = 0
        self._arguments = {tensor.untyped_storage().data_ptr() for tensor in arguments}
        self._results: list[weakref.ref[torch.Tensor]] = []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        result = func(*args, **(kwargs or {}))
        if isinstance(result, torch.Tensor):
            self._results.append(weakref.ref(result))
        alive = [tensor for tensor in (ref() for ref in self._results) if tensor is not None]
        self._results = [weakref.ref(tensor) for tensor in alive]
        storages = (tensor.untyped_storage() for tensor in alive)
        sizes = {storage.data_ptr(): storage.nbytes() for storage in storages}
        new_bytes = sum(size for address, size in sizes.items() if address not in self._arguments)
        self.peak_bytes = max(self.peak_bytes, new_bytes)
        return result


def test_temporary_memory_is_bounded(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch_kernel, "TEMPORARY_BYTES", 32 << 20)
    case = Case((600,) * 60, num_heads=16, spare_pages=1)
    inputs = case.inputs()
    problem = DecodeProblem(
        batch=60, num_heads=16, page_size=64, max_seq_len=600, max_pages=inputs.block_tables.shape[1]
    )
    out = poisoned((*inputs.query.shape[:-1], 512), BF16)
    launch = torch_kernel.Launcher(problem)
    with PeakMemory(*inputs.positional, out) as memory:
        launch(*inputs.positional, None, case.scale, 1.0, out, None, None)
    assert 8 << 20 < memory.peak_bytes < 32 << 20
    assert_decoded(out, None, inputs, softmax_scale=case.scale)
