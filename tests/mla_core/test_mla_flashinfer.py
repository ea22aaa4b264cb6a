"""FlashInfer's argument list: the signature itself, what each argument does, and which are refused."""

import inspect
import math

import pytest
import torch
from kernel_dispatch import ArgumentError, NoKernelError
from kernel_testing import poisoned
from mla_cases import BF16, E4M3, Case, bits
from mla_core import decode, trtllm_batch_decode_with_kv_cache_mla

# FlashInfer 0.7.2, in its order; "required" where there is no default.
REQUIRED = "required"
PARAMETERS = {
    "query": REQUIRED,
    "kv_cache": REQUIRED,
    "workspace_buffer": REQUIRED,
    "qk_nope_head_dim": REQUIRED,
    "kv_lora_rank": REQUIRED,
    "qk_rope_head_dim": REQUIRED,
    "block_tables": REQUIRED,
    "seq_lens": REQUIRED,
    "max_seq_len": REQUIRED,
    "sparse_mla_top_k": 0,
    "out": None,
    "bmm1_scale": 1.0,
    "bmm2_scale": 1.0,
    "sinks": None,
    "skip_softmax_threshold_scale_factor": None,
    "enable_pdl": None,
    "backend": "auto",
    "is_var_seq": True,
    "uses_shared_paged_kv_idx": True,
    "lse": None,
    "return_lse": False,
    "cute_dsl_impl": "auto",
    "kv_scale_format": "auto",
    "cum_seq_lens_q": None,
    "max_q_len": None,
    "multi_ctas_kv_counter_buffer": None,
    "sparse_mla_top_k_lens": None,
    "enable_dcp": False,
    "cp_world": 1,
    "cp_rank": 0,
    "causal_seqlens_kv_global": None,
    "use_fp16_softmax": None,
    "return_lse_base": None,
}
CASE = Case((30, 0, 70), q_len=2, num_heads=4)
SCALE = CASE.scale


def arguments(case: Case = CASE, **changes: object) -> dict[str, object]:
    inputs = case.inputs()
    return {
        "query": inputs.query,
        "kv_cache": inputs.kv_cache,
        "workspace_buffer": torch.full((64,), 0xFF, dtype=torch.uint8),
        "qk_nope_head_dim": 128,
        "kv_lora_rank": 512,
        "qk_rope_head_dim": 64,
        "block_tables": inputs.block_tables,
        "seq_lens": inputs.seq_lens,
        "max_seq_len": 128,
        "bmm1_scale": SCALE,
        **changes,
    }


def parameters_of(function: object) -> dict[str, object]:
    parameters = inspect.signature(function).parameters.values()
    return {p.name: REQUIRED if p.default is inspect.Parameter.empty else p.default for p in parameters}


def test_signature_is_flashinfers() -> None:
    parameters = parameters_of(trtllm_batch_decode_with_kv_cache_mla)
    assert list(parameters.items()) == list(PARAMETERS.items())
    kinds = inspect.signature(trtllm_batch_decode_with_kv_cache_mla).parameters.values()
    assert all(parameter.kind is inspect.Parameter.POSITIONAL_OR_KEYWORD for parameter in kinds)


def test_result_is_that_of_decode() -> None:
    out = trtllm_batch_decode_with_kv_cache_mla(**arguments(bmm2_scale=0.5))
    expected = decode(*CASE.inputs().positional, softmax_scale=SCALE, output_scale=0.5)
    assert torch.equal(bits(out), bits(expected))


def test_scales_may_be_tensors_and_bmm2_leaves_the_logits() -> None:
    plain, lse = trtllm_batch_decode_with_kv_cache_mla(**arguments(return_lse=True))
    scales = {"bmm1_scale": torch.tensor([SCALE]), "bmm2_scale": torch.tensor([2.0])}
    out, same_lse = trtllm_batch_decode_with_kv_cache_mla(**arguments(return_lse=True, **scales))
    assert torch.equal(out, 2 * plain)
    assert torch.equal(same_lse, lse)


@pytest.mark.parametrize("shape", [(6, 4), (3, 2, 4), None], ids=str)
@pytest.mark.parametrize(
    ("base", "factor"), [(None, 1.0), ("basee", 1.0), ("base2", math.log2(math.e))], ids=str
)
def test_lse_buffer_shape_and_base(shape: tuple[int, ...] | None, base: str | None, factor: float) -> None:
    _, expected = decode(*CASE.inputs().positional, softmax_scale=SCALE, return_lse=True)
    buffer = None if shape is None else poisoned(shape, torch.float32)
    _, lse = trtllm_batch_decode_with_kv_cache_mla(
        **arguments(lse=buffer, return_lse=True, return_lse_base=base)
    )
    assert lse.shape == (shape or (6, 4))
    assert buffer is None or lse is buffer
    torch.testing.assert_close(lse.view(3, 2, 4), factor * expected, rtol=1e-6, atol=0)


def test_out_is_honoured_and_chooses_the_dtype() -> None:
    out = poisoned((3, 2, 4, 512), E4M3)
    assert trtllm_batch_decode_with_kv_cache_mla(**arguments(out=out)) is out
    expected = decode(*CASE.inputs().positional, softmax_scale=SCALE, out_dtype=E4M3)
    assert torch.equal(bits(out), bits(expected))


@pytest.mark.parametrize("max_q_len", [None, 3, 5])
def test_ragged_queries(max_q_len: int | None) -> None:
    case = Case((30, 5), q_lens=(1, 3), num_heads=4)
    inputs = case.inputs()
    ragged = {"cum_seq_lens_q": inputs.cum_seq_lens_q, "max_q_len": max_q_len}
    out, lse = trtllm_batch_decode_with_kv_cache_mla(
        **arguments(case, max_seq_len=64, return_lse=True, **ragged)
    )
    expected = decode(*inputs.positional, softmax_scale=SCALE, return_lse=True, **inputs.ragged)
    assert torch.equal(out, expected[0])
    assert torch.equal(lse, expected[1])


def test_cache_of_four_dimensions() -> None:
    plain = arguments()
    with_unit = {**plain, "kv_cache": plain["kv_cache"].unsqueeze(1)}
    out = trtllm_batch_decode_with_kv_cache_mla(**with_unit)
    assert torch.equal(out, trtllm_batch_decode_with_kv_cache_mla(**plain))


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("sparse_mla_top_k", 16),
        ("sinks", [torch.zeros(4)]),
        ("skip_softmax_threshold_scale_factor", 1.0),
        ("uses_shared_paged_kv_idx", False),
        ("cute_dsl_impl", "modular"),
        ("kv_scale_format", "pow2_fp32"),
        ("multi_ctas_kv_counter_buffer", torch.zeros(4)),
        ("sparse_mla_top_k_lens", torch.zeros(4)),
        ("enable_dcp", True),
        ("cp_world", 2),
        ("cp_rank", 1),
        ("causal_seqlens_kv_global", torch.zeros(3, dtype=torch.int32)),
        ("use_fp16_softmax", True),
        ("use_fp16_softmax", 0),
        ("use_fp16_softmax", "no"),
        ("qk_nope_head_dim", 0),
        ("qk_nope_head_dim", None),
        ("seq_lens", None),
        ("workspace_buffer", None),
        ("workspace_buffer", torch.zeros(4)),
        ("workspace_buffer", torch.zeros(4, 4, dtype=torch.uint8)),
        ("max_seq_len", None),
        ("max_seq_len", 1000),
        ("kv_lora_rank", 511),
        ("qk_rope_head_dim", 63),
        ("bmm1_scale", math.nan),
        ("bmm1_scale", "1"),
        ("bmm2_scale", torch.tensor([math.inf])),
        ("bmm2_scale", torch.ones(2)),
        ("out", torch.zeros(3, 2, 4, 511, dtype=BF16)),
        ("lse", torch.zeros(6, 4)),  # without return_lse
        ("return_lse", 1),
        ("return_lse_base", "base10"),
        ("return_lse_base", "base2"),  # without return_lse
        ("return_lse_base", "basee"),
        ("cum_seq_lens_q", torch.zeros(1, dtype=torch.int32)),
        ("cum_seq_lens_q", 3),
        ("cum_seq_lens_q", torch.zeros(4, dtype=torch.int64)),
        ("cum_seq_lens_q", torch.zeros(4, 1, dtype=torch.int32)),
        ("cum_seq_lens_q", torch.zeros(4, dtype=torch.int32, device="meta")),
        ("max_q_len", 2),  # without cum_seq_lens_q
        ("is_var_seq", False),
        ("is_var_seq", None),
        ("enable_pdl", 1),
        ("backend", None),
    ],
    ids=lambda value: value if isinstance(value, str) else "",
)
def test_refuses_by_name(name: str, value: object) -> None:
    out = poisoned((3, 2, 4, 512), BF16)
    before = bits(out)
    with pytest.raises(ArgumentError) as error:
        trtllm_batch_decode_with_kv_cache_mla(**arguments(**{"out": out, name: value}))
    blamed = "seq_lens" if name == "is_var_seq" and value is False else name
    blamed = "query" if name in ("kv_lora_rank", "qk_rope_head_dim") else blamed
    assert error.value.argument == blamed
    assert torch.equal(bits(out), before)


def test_offsets_are_not_read_where_the_query_has_no_data() -> None:
    ragged = arguments(Case((30, 5), q_lens=(1, 3), num_heads=4), max_seq_len=64)
    on_meta = {"query": ragged["query"].to("meta"), "cum_seq_lens_q": torch.zeros(3, dtype=torch.int32)}
    with pytest.raises(ArgumentError, match="cum_seq_lens_q: on cpu, expected meta"):
        trtllm_batch_decode_with_kv_cache_mla(**{**ragged, **on_meta})
    on_meta["cum_seq_lens_q"] = on_meta["cum_seq_lens_q"].to("meta")
    with pytest.raises(ArgumentError, match="cum_seq_lens_q: on meta, expected a tensor with data"):
        trtllm_batch_decode_with_kv_cache_mla(**{**ragged, **on_meta})


def test_use_fp16_softmax_false_is_the_default() -> None:
    out = trtllm_batch_decode_with_kv_cache_mla(**arguments(use_fp16_softmax=False))
    assert torch.equal(out, trtllm_batch_decode_with_kv_cache_mla(**arguments()))


def test_lse_with_another_number_of_rows_is_refused() -> None:
    with pytest.raises(ArgumentError, match=r"lse: 5 rows, expected batch \* q_len = 6"):
        trtllm_batch_decode_with_kv_cache_mla(**arguments(lse=torch.zeros(5, 4), return_lse=True))


def test_pdl_and_backend_reach_the_provider() -> None:
    with pytest.raises(NoKernelError, match="enable_pdl"):
        trtllm_batch_decode_with_kv_cache_mla(**arguments(enable_pdl=True))
    with pytest.raises(NoKernelError, match="cute-dsl"):
        trtllm_batch_decode_with_kv_cache_mla(**arguments(backend="cute-dsl"))
