"""The kernels run for sm_100a on the emulator, all its checks on, every element held against float64.

`test_pairs_of_parameters` covers every pair of values under four schedules; `full_product.py` has all
combinations of them.
"""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
import torch
from combinations import PARAMETERS, name_of, pairwise, run
from emulation import config_of, emulated, run_on_emulator, run_tactic
from kernel_testing.mla import E4M3, Case, Inputs
from ptx_emulator import Options

SCHEDULES = 4


@pytest.mark.parametrize("values", pairwise(PARAMETERS), ids=name_of)
def test_pairs_of_parameters(values: dict[str, Any]) -> None:
    run(values, SCHEDULES)


@pytest.mark.parametrize("pair", [False, True], ids=["single", "pair"])
@pytest.mark.parametrize("dtype", PARAMETERS["dtype"])
def test_ragged_queries(dtype: str, pair: bool) -> None:
    inputs = Inputs(Case((300, 5, 0, 130), dtype, num_heads=40, q_lens=(4, 0, 2, 3), page_size=32))
    for num_splits in (1, 3):
        config = config_of(inputs, pair=pair, split=num_splits > 1)
        run_on_emulator(config, inputs, num_splits=num_splits, num_clusters=3, schedules=SCHEDULES)


@pytest.mark.parametrize("pair", [False, True], ids=["single", "pair"])
@pytest.mark.parametrize("num_splits", [1, 2])
def test_scales_on_the_device_and_of_either_sign(pair: bool, num_splits: int) -> None:
    inputs = Inputs(Case((200, 31), "fp16", num_heads=33, q_len=2, scale=-0.06))
    config = config_of(inputs, pair=pair, split=num_splits > 1)
    for on_device in (False, True):
        flags = replace(config, softmax_scale_is_tensor=on_device, output_scale_is_tensor=on_device)
        run_on_emulator(flags, inputs, num_splits=num_splits, output_scale=-1.75)


@pytest.mark.parametrize("pair", [False, True], ids=["single", "pair"])
@pytest.mark.parametrize("num_splits", [1, 2])
def test_a_scale_of_zero(pair: bool, num_splits: int) -> None:
    inputs = Inputs(Case((200, 31), "bf16", num_heads=7, q_len=2, scale=0.0))
    run_on_emulator(config_of(inputs, pair=pair, split=num_splits > 1), inputs, num_splits=num_splits)


@pytest.mark.parametrize("pair", [False, True], ids=["single", "pair"])
@pytest.mark.parametrize("num_splits", [1, 2])
def test_nan_in_a_query_reaches_its_rows_and_their_lse_alone(pair: bool, num_splits: int) -> None:
    inputs = Inputs(Case((200, 300), "bf16", num_heads=7))
    inputs.query[1, 0, 3, 5] = torch.nan
    with pytest.raises(AssertionError):  # from comparing them
        run_on_emulator(config_of(inputs, pair=pair, split=num_splits > 1), inputs, num_splits=num_splits)
    poisoned = torch.zeros(inputs.lse.shape, dtype=torch.bool)
    poisoned[1, 0, 3] = True
    assert (inputs.lse.isnan() == poisoned).all()
    assert (inputs.out.isnan() == poisoned.unsqueeze(-1)).all()


@pytest.mark.parametrize("pair", [False, True], ids=["single", "pair"])
def test_scores_that_rise_again_and_again(pair: bool) -> None:
    """Every tile raises the reference of some rows, so that the output is rescaled."""
    inputs = Inputs(Case((640,), "bf16", num_heads=64, page_size=64, scale=1.0))
    order = inputs.query[0, 0].float().mean(0) @ inputs.kv_cache.float().nan_to_num().mT
    pages = inputs.block_tables[0, :10]
    inputs.block_tables[0, :10] = pages[order[pages.long()].amax(-1).argsort()]
    run_on_emulator(config_of(inputs, pair=pair), inputs, schedules=SCHEDULES)


@pytest.mark.parametrize("pair", [False, True], ids=["single", "pair"])
@pytest.mark.parametrize("dtype", ["bf16", "e4m3"])
def test_absent_pages_and_strided_tensors(dtype: str, pair: bool) -> None:
    absent = ((0, 1), (0, 4), (1, 0))
    inputs = Inputs(Case((160, 20), dtype, num_heads=20, q_len=2, page_size=32, absent=absent, gap=16))
    run_on_emulator(config_of(inputs, pair=pair), inputs)


@pytest.mark.parametrize("pair", [False, True], ids=["single", "pair"])
def test_fp8_output(pair: bool) -> None:
    inputs = Inputs(Case((150, 64), "e4m3", num_heads=16, out_dtype=E4M3))
    for num_splits in (1, 2):
        config = config_of(inputs, pair=pair, split=num_splits > 1)
        run_on_emulator(config, inputs, num_splits=num_splits, output_scale=300.0)


@pytest.mark.parametrize("pair", [False, True], ids=["single", "pair"])
def test_many_sequences_that_end_inside_a_page(pair: bool) -> None:
    """One cluster works through them, so that slots for values are filled again while ends are cleared."""
    lengths = (300, 65, 1, 0, 131, 64, 5, 257)
    for dtype in ("bf16", "e4m3"):
        inputs = Inputs(Case(lengths, dtype, num_heads=128, page_size=32))
        run_on_emulator(config_of(inputs, pair=pair), inputs, num_clusters=1, schedules=6)


@pytest.mark.parametrize("pair", [False, True], ids=["single", "pair"])
def test_a_dependent_grid_starts_as_early_as_it_may(pair: bool) -> None:
    inputs = Inputs(Case((400, 130), "bf16", num_heads=32, q_len=2))
    config = config_of(inputs, pair=pair, split=True, pdl=True)
    for early in (False, True):
        options = Options(early_dependents=early)
        run = run_on_emulator(config, inputs, num_splits=3, schedules=SCHEDULES, options=options)
    assert len(run.function.launches) == 2
    text = emulated(config).ptx
    assert text.count("griddepcontrol.wait") == 2  # decode and combine
    assert text.count("griddepcontrol.launch_dependents") == 1


@pytest.mark.parametrize("tile", ["pair", "single"])
def test_a_request_has_the_same_bits_alone_and_in_a_batch(tile: str) -> None:
    case = Case((300, 77, 128), "bf16", num_heads=24, q_len=2)
    whole = run_tactic(f"{tile}-whole", Inputs(case)).inputs
    for request in range(len(case.lengths)):
        got = run_tactic(f"{tile}-whole", whole.alone(request)).inputs
        assert (got.out == whole.out[request]).all()
        assert (got.lse == whole.lse[request]).all()
