"""Shapes, lengths, dtypes, layouts and scales from hypothesis, against the oracle."""

import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from kernel_testing import poisoned
from mla_cases import BF16, E4M3, FP16, Case, assert_decoded
from mla_core import decode

dtypes = st.sampled_from((BF16, FP16, E4M3))


@st.composite
def cases(draw: st.DrawFn) -> Case:
    lengths = tuple(draw(st.lists(st.integers(0, 300), min_size=1, max_size=5)))
    q_lens = None
    if draw(st.booleans()):
        token_counts = st.lists(st.integers(0, 6), min_size=len(lengths), max_size=len(lengths))
        q_lens = tuple(draw(token_counts.filter(any)))
    return Case(
        lengths,
        q_len=draw(st.integers(1, 6)),
        num_heads=draw(st.integers(1, 128)),
        page_size=draw(st.integers(1, 130)),
        dtype=draw(dtypes),
        q_lens=q_lens,
        latent=draw(st.integers(1, 40)),
        rope=draw(st.integers(1, 20)),
        seed=draw(st.integers(0, 2**31)),
    )


def spread(tensor: torch.Tensor, gaps: tuple[int, ...]) -> torch.Tensor:
    """The same values in a larger, poisoned tensor: gaps[d] unused elements at the start of dimension d."""
    wide = poisoned([size + gap for size, gap in zip(tensor.shape, gaps, strict=True)], tensor.dtype)
    view = wide[tuple(slice(gap, None) for gap in gaps)]
    return view.copy_(tensor)


gap = st.integers(0, 2)


@settings(max_examples=60, deadline=None, suppress_health_check=[HealthCheck.too_slow])
@given(case=cases(), data=st.data())
def test_any_problem_in_any_layout(case: Case, data: st.DataObject) -> None:
    inputs = case.inputs()

    def laid_out(tensor: torch.Tensor) -> torch.Tensor:
        return spread(tensor, tuple(data.draw(gap) for _ in tensor.shape))

    query, kv_cache = laid_out(inputs.query), laid_out(inputs.kv_cache)
    if data.draw(st.booleans(), label="unit dimension"):
        kv_cache = kv_cache.unsqueeze(1)
    out_dtype = data.draw(dtypes, label="out_dtype")
    leading = inputs.query.shape[:-1]
    out = laid_out(poisoned((*leading, case.latent), out_dtype))
    lse = laid_out(poisoned(leading, torch.float32))
    softmax_scale = data.draw(st.floats(-0.5, 0.5, width=32), label="softmax_scale")
    output_scale = data.draw(st.floats(-4, 4, width=32), label="output_scale")
    as_tensor = data.draw(st.booleans(), label="scales as tensors")
    decode(
        query,
        kv_cache,
        laid_out(inputs.block_tables),
        inputs.seq_lens,
        softmax_scale=torch.tensor([softmax_scale]) if as_tensor else softmax_scale,
        output_scale=torch.tensor(output_scale) if as_tensor else output_scale,
        out=out,
        lse=lse,
        return_lse=True,
        max_seq_len=data.draw(st.sampled_from((None, max(*case.lengths, 1))), label="max_seq_len"),
        **case.ranks,
        **inputs.ragged,
    )
    assert_decoded(
        out,
        lse,
        inputs,
        softmax_scale=softmax_scale,
        output_scale=output_scale,
        kv_lora_rank=case.latent,
    )
