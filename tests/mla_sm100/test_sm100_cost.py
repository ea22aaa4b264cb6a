"""benchmarks/emulated_mla_cost.py: what it counts is what the maths needs, and its document is up to date."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import _mla_cost_model as model
import emulated_mla_cost as cost
import pytest
from _mla_cases import Cell


@pytest.fixture(scope="module")
def recorded() -> dict[tuple[str, str, str], Any]:
    """The recorded counts by cell, variant and regime."""
    return {(c["cell"], c["variant"], c["regime"]): c for c in model.results()["cells"]}


def test_the_document_has_the_figures_of_the_results() -> None:
    text = model.DOCUMENT.read_text(encoding="utf-8")
    assert model.filled_in(text) == text


def test_every_result_that_was_counted_was_right() -> None:
    assert model.results()["failed"] == {}


def test_the_model_loads_what_was_counted(recorded: dict[tuple[str, str, str], Any]) -> None:
    for (name, variant, _), c in recorded.items():
        if variant == model.PEER:
            continue
        cell = cost.parse_cell(name)
        tile = model.Tile(cell.dtype, variant == cost.PAIR)
        ctas = 2 if tile.pair else 1
        row_tiles = -(-cell.problem.rows // (tile.rows * ctas))
        tiles = row_tiles * -(-cell.seq_len // tile.keys)
        assert c["key_bytes"] == tiles * ctas * tile.loaded_bytes
        assert sum(role["mma_flops"] for role in c["decode"].values()) == tiles * ctas * tile.flops


def test_bounds_of_a_tile_by_hand() -> None:
    pair = model.Tile("bf16", pair=True).cycles(model.B200, instructions=400)
    assert pair["MMA"] == 2176  # 64 rows x 128 keys x 1088 multiply-adds, 4096 of them a cycle
    assert pair["L2"] == 2176  # 64 keys x 576 and 128 keys x 256 elements, 64 bytes a cycle
    # Those 139264 bytes written, as many read, Q read, P read twice and written once.
    assert pair["shared memory"] == (2 * 139264 + 64 * 1152 + 3 * 16384) / 128
    assert pair["exponentials"] == 512
    assert pair["issue"] == 100
    single = model.Tile("fp8", pair=False).cycles(model.B200, instructions=0)
    assert single["MMA"] == 1088  # half of the keys, at half of twice the rate


def test_a_longer_batch_is_bound_by_more_waves() -> None:
    one, two = (model.estimate(Cell("bf16", batch, 128, 8192), model.B200) for batch in (74, 75))
    assert two.bounds["MMA"] == 2 * one.bounds["MMA"]


def test_b300_differs_from_b200_in_nothing_that_binds() -> None:
    for dtype in model.DTYPES:
        for cell in model.cells():
            b200, b300 = (
                model.estimate(Cell(dtype, cell.batch, cell.num_heads, cell.seq_len, cell.q_len), device)
                for device in (model.B200, model.B300)
            )
            assert (b200.bound, b200.us) == (b300.bound, b300.us)


def test_cells_are_parsed_or_refused() -> None:
    assert cost.parse_cell("q4-H16-s256-fp8") == Cell("fp8", 1, 16, 256, 4)
    with pytest.raises(SystemExit, match="--cells"):
        cost.parse_cell("H16-fp4")


def test_a_run_reaches_the_minimum_and_is_kept(tmp_path: Path) -> None:
    assert cost.main(["--cells", "q1-H16-s256-bf16", "--no-flashinfer", "--out", str(tmp_path)]) == 0
    result = json.loads((tmp_path / "results.json").read_text())
    assert result["failed"] == {}
    assert len(result["goals"]) == 8
    assert all(result["goals"].values())
    assert "FlashInfer is left out" in (tmp_path / "report.txt").read_text()


def test_a_wrong_result_is_not_counted(monkeypatch: pytest.MonkeyPatch) -> None:
    def wrong(*arguments: object) -> None:
        raise AssertionError("out: [0, 0] is wrong")

    monkeypatch.setattr(cost.Call, "check", wrong)
    found, failed = cost.measure(Cell("bf16", 1, 16, 128), with_peer=False)
    assert found == []
    assert set(failed) == {f"{tile} {regime}" for tile in cost.OURS for regime in cost.REGIMES}


@pytest.mark.parametrize("dtype", model.DTYPES)
def test_softmax_of_a_tile_costs_no_more_than_flashinfers(
    dtype: str, recorded: dict[tuple[str, str, str], Any]
) -> None:
    peer = recorded[str(Cell(dtype, 1, 128, 8192)), model.PEER, "whole"]
    theirs = sum(model.instructions(peer["decode"][role]) for role in ("softmax", "correction"))
    few, many = (cost.run_ours(Cell(dtype, 1, 128, keys), cost.PAIR, "whole") for keys in (256, 1024))
    grown = many.instructions("softmax") - few.instructions("softmax")
    assert grown / (many.tiles - few.tiles) <= theirs / peer["tiles"]
