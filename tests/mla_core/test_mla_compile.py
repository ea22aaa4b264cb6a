"""`decode` and `merge_states` under torch.compile, torch.export, fake tensors and torch.library's checks."""

from collections.abc import Callable

import numpy as np
import pytest
import torch
from kernel_dispatch import ArgumentError
from mla_cases import BF16, E4M3, Case, bits
from mla_core import decode, merge_states, trtllm_batch_decode_with_kv_cache_mla
from torch._subclasses.fake_tensor import FakeTensorMode

CASE = Case((30, 0, 70), q_len=2, num_heads=4)
RAGGED = Case((30, 5), q_lens=(1, 3), num_heads=4)
SCALE = CASE.scale
INPUTS = CASE.inputs()


def plain(*tensors: torch.Tensor) -> torch.Tensor:
    return decode(*tensors, softmax_scale=SCALE)


def with_lse_and_scales(*tensors: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    scale = torch.full((1,), SCALE)
    return decode(*tensors, softmax_scale=scale, output_scale=2.0, return_lse=True, out_dtype=E4M3)


def around(*tensors: torch.Tensor) -> torch.Tensor:
    query, *rest = tensors
    return decode(query * 2, *rest, softmax_scale=SCALE).float().sum(-1)


def flashinfer_names(*tensors: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    query, kv_cache, block_tables, seq_lens = tensors
    workspace = torch.empty(0, dtype=torch.uint8)
    return trtllm_batch_decode_with_kv_cache_mla(
        query,
        kv_cache,
        workspace,
        128,
        512,
        64,
        block_tables,
        seq_lens,
        70,
        bmm1_scale=SCALE,
        return_lse=True,
    )


def numpy_scale(*tensors: torch.Tensor) -> torch.Tensor:
    return decode(*tensors, softmax_scale=1 / np.sqrt(576))


FUNCTIONS = [plain, with_lse_and_scales, around, flashinfer_names, numpy_scale]


def as_bits(result: torch.Tensor | tuple[torch.Tensor, ...]) -> list[list[int]]:
    return [bits(t).tolist() for t in (result if isinstance(result, tuple) else (result,))]


@pytest.mark.parametrize("backend", ["eager", "aot_eager"])
@pytest.mark.parametrize("function", FUNCTIONS, ids=lambda f: f.__name__)
def test_compiles_to_one_graph(function: Callable[..., torch.Tensor], backend: str) -> None:
    torch._dynamo.reset()
    compiled = torch.compile(function, fullgraph=True, backend=backend)
    assert as_bits(compiled(*INPUTS.positional)) == as_bits(function(*INPUTS.positional))


def test_compiles_ragged_queries_and_own_outputs() -> None:
    torch._dynamo.reset()
    inputs = RAGGED.inputs()
    out = torch.zeros(4, 4, 512, dtype=BF16)
    lse = torch.zeros(4, 4)

    def write(*tensors: torch.Tensor) -> torch.Tensor:
        decode(*tensors, softmax_scale=SCALE, out=out, lse=lse, return_lse=True, **inputs.ragged)
        return out + 1

    expected = write(*inputs.positional)
    expected_bits = as_bits((out, lse))
    out.zero_()
    lse.zero_()
    result = torch.compile(write, fullgraph=True, backend="aot_eager")(*inputs.positional)
    assert torch.equal(result, expected)
    assert as_bits((out, lse)) == expected_bits


def test_compiled_once_for_every_batch() -> None:
    torch._dynamo.reset()
    compiled = torch.compile(plain, fullgraph=True, backend="aot_eager", dynamic=True)
    for lengths in (
        (30, 5, 70, 0, 1),
        (7, 300, 1),
        (3, 3, 3, 200),
    ):  # no two sizes of the first call are equal
        inputs = Case(lengths, q_len=2, num_heads=4).inputs()
        with torch._dynamo.config.patch(error_on_recompile=len(lengths) < 5):
            assert as_bits(compiled(*inputs.positional)) == as_bits(plain(*inputs.positional))


@pytest.mark.parametrize("strict", [False, True], ids=["non-strict", "strict"])
def test_exports(strict: bool) -> None:
    class Module(torch.nn.Module):
        def forward(self, *tensors: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
            return with_lse_and_scales(*tensors)

    program = torch.export.export(Module(), INPUTS.positional, strict=strict)
    assert "mla_core.decode" in str(program.graph)
    assert as_bits(program.module()(*INPUTS.positional)) == as_bits(with_lse_and_scales(*INPUTS.positional))


def test_fake_tensors_get_shapes_and_errors() -> None:
    with FakeTensorMode() as mode:
        query, *rest = (mode.from_tensor(tensor) for tensor in INPUTS.positional)
        out, lse = decode(query, *rest, softmax_scale=1.0, return_lse=True)
        assert (out.shape, lse.shape, out.dtype) == ((3, 2, 4, 512), (3, 2, 4), BF16)
        with pytest.raises(ArgumentError, match="block_tables: batch = 3, expected 2 from query"):
            decode(query[:2], *rest, softmax_scale=1.0)


def test_merge_states_compiles() -> None:
    torch._dynamo.reset()
    states = torch.randn(3, 8), torch.randn(3), torch.randn(3, 8), torch.randn(3)
    compiled = torch.compile(merge_states, fullgraph=True, backend="aot_eager")
    assert as_bits(compiled(*states)) == as_bits(merge_states(*states))
    torch.library.opcheck(torch.ops.mla_core.merge_states.default, states)


@pytest.mark.parametrize("scale", [SCALE, torch.tensor([SCALE])], ids=["float", "tensor"])
def test_op_passes_the_checks_of_torch_library(scale: float | torch.Tensor) -> None:
    is_tensor = isinstance(scale, torch.Tensor)
    arguments = (
        *INPUTS.positional,
        None,  # cum_seq_lens_q
        *((1.0, scale) if is_tensor else (scale, None)),
        *(1.0, None),  # output_scale
        torch.zeros(3, 2, 4, 512, dtype=BF16),
        torch.zeros(3, 2, 4),
        torch.zeros(8, dtype=torch.uint8),
        *(512, 64, None, None, True, None, "auto"),
    )
    torch.library.opcheck(torch.ops.mla_core.decode.default, arguments)


def test_autograd_is_refused_rather_than_wrong() -> None:
    query, *rest = INPUTS.positional
    query = query.float().requires_grad_().to(BF16)
    out = decode(query, *rest, softmax_scale=SCALE)
    with pytest.raises(RuntimeError):
        out.float().sum().backward()
