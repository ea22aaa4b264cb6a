"""Reports, counts and timelines as text and JSON; the shadow memory beside a model of it."""

from __future__ import annotations

import json
import subprocess
from itertools import pairwise
from pathlib import Path

import numpy as np
import ptx_emulator
import pytest
from harness import run_kernel
from ptx_emulator.build import compiler
from ptx_emulator.counts import COUNT_NAMES, LaunchCounts
from ptx_emulator.ptx.module import Location
from ptx_emulator.reports import EmulationError, reports_from_json, reports_json, reports_text
from ptx_emulator.timeline import Row, Span, chrome_trace, write_timeline

RUNTIME = Path(ptx_emulator.build.__file__).parent / "runtime"
LOCATIONS = {"gemm": {12: Location("gemm.py", 3), 40: Location("gemm.py", 7)}}


def finding(kind: str, line: int, warp: int = 0, **more: object) -> dict[str, object]:
    site = {"cta": [1, 2, 0], "warp": warp, "lane": -1, "line": line}
    return {"kind": kind, "kernel": "gemm", "grid": 0, "message": f"{kind} here", "site": site, **more}


def test_report_has_source_and_other_side() -> None:
    other = {"cta": [0, 0, 0], "warp": 2, "lane": 5, "line": 40}
    (report,) = reports_from_json([finding("race", 12, other=other)], LOCATIONS)
    assert (report.kind, report.line, report.cta, report.warp) == ("race", 12, (1, 2, 0), 0)
    assert report.location == Location("gemm.py", 3)
    text = str(report)
    assert "gemm.py:3 (PTX line 12), CTA (1, 2, 0), warp 0" in text
    assert "gemm.py:7 (PTX line 40), CTA (0, 0, 0), warp 2, lane 5" in text
    (read_back,) = json.loads(reports_json([report]))
    expected = {"file": "gemm.py", "line": 7, "function": "", "inlined_at": None}
    assert read_back["other"]["location"] == expected


def test_error_groups_findings() -> None:
    reports = reports_from_json(
        [finding("race", 12), finding("race", 13), finding("uninitialised", 40)], LOCATIONS
    )
    error = EmulationError(reports)
    assert error.reports == reports
    lines = str(error).splitlines()
    assert lines[0] == "3 findings: 2 race, 1 uninitialised"
    assert lines[1] == "gemm (launch 0):"
    assert any("PTX line 13, CTA (1, 2, 0)" in line for line in lines)


def test_deadlock_is_a_table() -> None:
    reports = reports_from_json([finding("deadlock", 12, warp) for warp in (0, 1, 2, 5)], LOCATIONS)
    reports += reports_from_json([finding("deadlock", 40, 4)], LOCATIONS)
    rows = reports_text(reports).splitlines()[3:]
    assert rows[0].split() == ["CTA", "warps", "at"]
    assert " ".join(rows[1].split()) == "(1, 2, 0) 0-2, 5 gemm.py:3 (PTX line 12) deadlock here"
    assert len(rows) == 3


def example() -> LaunchCounts:
    executed = np.array([[5, 0, 1], [5, 0, 1], [0, 7, 1]], dtype=np.uint64)
    counts = np.zeros((3, len(COUNT_NAMES)), dtype=np.uint64)
    counts[2, COUNT_NAMES.index("mma_flops")] = 4096
    return LaunchCounts(
        "gemm", executed, counts, np.array([0, 1, 0]), ["load", "mma"], np.array([12, 13, 12])
    )


def test_roles_are_found() -> None:
    assert example().find_roles() == {"warps 0-1": [0, 1], "warp 2": [2]}


def test_counts_by_role() -> None:
    counts = example()
    assert counts["load"] == 13
    assert counts["mma_flops"] == 4096
    table = counts.by_role({"load": range(2)})
    assert table["load"]["load"] == 12
    assert table["other"]["mma"] == 7
    assert counts.hottest_lines(1) == [(12, 13)]
    rows = [line.split() for line in counts.table({"load": range(2), "mma": [2]}).splitlines()]
    assert rows[1] == ["load", "mma", "all"]
    assert ["mma", "flops", "0", "4,096", "4,096"] in rows
    assert "tma load bytes" in " ".join(rows[-1])
    assert rows[-1][0] == "none:"
    as_json = json.loads(counts.to_json())
    assert as_json["total"]["mma"] == 7
    assert as_json["instructions"] == 20


def test_classes_go_by_the_type() -> None:
    body = """
    add.u32 %r2, %r1, 1; mad.lo.s32 %r2, %r2, 3, %r1; div.u32 %r2, %r2, 3; add.u16x2 %r2, %r2, %r2;
    add.f32 %f1, %f1, %f1; fma.rn.f16x2 %r2, %r2, %r2, %r2; max.bf16 %rs1, %rs1, %rs1;
    div.rn.f32 %f1, %f1, %f1; ex2.approx.ftz.f32 %f1, %f1;
    """
    (counts,) = run_kernel(body, checks=False).counts
    mov_and_mul = 1  # of the harness: mul.wide.u32
    assert (counts["integer"], counts["float"], counts["special"]) == (4 + mov_and_mul, 3, 2)


@pytest.mark.parametrize("roles", [{"a": [3]}, {"a": [0], "b": [0]}])
def test_roles_are_checked(roles: dict[str, list[int]]) -> None:
    with pytest.raises(ValueError, match="roles"):
        example().by_role(roles)


def test_timeline_has_a_row_per_warp_and_engine(tmp_path: Path) -> None:
    def row(warp: int, engine: str, *spans: Span) -> Row:
        return Row("gemm", 0, 0, (1, 2, 0), warp, engine, spans, {7: Location("gemm.py", 3)})

    rows = [
        row(
            0, "", Span("run", "load", 0, 4, {"load": 3, "move": 1}, [7, 9]), Span("wait", "barrier 0", 4, 9)
        ),
        row(1, "", Span("run", "mma", 2, 5, {"mma": 3, "load": 1}, [7], waited=1)),
        row(-1, "tma", Span("engine", "tensor load", 1, 9, lines=[9])),
    ]
    write_timeline(tmp_path / "trace.json", rows, {"producer": [0]})
    events = json.loads((tmp_path / "trace.json").read_text())["traceEvents"]
    names = [e["args"]["name"] for e in events if e["name"] in ("process_name", "thread_name")]
    process = "gemm (launch 0), cluster 0, CTA (1, 2, 0)"
    assert names == [process, "warp 0 producer", "warp 1 mma, load", "engine tma"]
    spans = [(e["name"], e["ts"], e["dur"], e["args"]) for e in events if e["ph"] == "X"]
    assert spans == [
        ("load", 0, 4, {"load": 3, "move": 1, "source": "gemm.py:3", "PTX line": 7}),
        ("wait barrier 0", 4, 5, {}),
        ("mma", 2, 3, {"mma": 3, "load": 1, "source": "gemm.py:3", "PTX line": 7, "waited": 1}),
        ("tensor load", 1, 8, {"PTX line": 9}),
    ]
    assert chrome_trace([])["traceEvents"] == []


def test_warps_that_do_nearly_the_same_have_one_name() -> None:
    common = {"shuffle": 1, "load": 1, "integer": 1, "float": 1, "store": 1}
    classes = [common, common | {"special": 1}, {"mma": 1, "barrier": 1}]
    rows = [
        Row("gemm", 0, 0, (0, 0, 0), warp, "", [Span("run", "", 0, 1, executed)])
        for warp, executed in enumerate(classes)
    ]
    events = chrome_trace(rows)["traceEvents"]
    names = [event["args"]["name"] for event in events if event["name"] == "thread_name"]
    assert names == ["warp 0 special, shuffle, load", "warp 1 special, shuffle, load", "warp 2 mma"]


def test_waits_are_counted_and_traced() -> None:
    body = """
    setp.ge.u32 %p1, %r1, 32;
    @%p1 bra join;
    add.u32 %r2, %r1, 1;
    add.u32 %r2, %r2, 1;
    add.u32 %r2, %r2, 1;
    join:
    bar.sync 3;
    """
    result = run_kernel(body, grid=(2, 2, 1), block=(64, 1, 1), trace=True)
    (counts,) = result.counts
    assert counts["barrier_waits"] == 2 * 4
    assert [(row.cta, row.warp) for row in result.timeline] == [
        ((x, y, 0), warp) for y in (0, 1) for x in (0, 1) for warp in (0, 1)
    ]
    for early, late in zip(result.timeline[::2], result.timeline[1::2], strict=True):
        assert [span.kind for span in early.spans] == ["run"]
        assert [(span.kind, span.name) for span in late.spans][1] == ("wait", "barrier 3")
        assert late.spans[1].end - late.spans[1].begin == counts["barrier_wait_cycles"] / 4 > 0


@pytest.mark.parametrize("rounds", [10, 30000])
def test_a_timeline_has_every_instruction_and_stays_small(rounds: int) -> None:
    body = f"""
    mov.u32 %r3, 0;
    again:
    setp.lt.u32 %p1, %r1, 32;
    @%p1 add.u32 %r2, %r1, 1;
    bar.sync 0;
    add.u32 %r3, %r3, 1;
    setp.lt.u32 %p2, %r3, {rounds};
    @%p2 bra again;
    """
    result = run_kernel(body, block=(64, 1, 1), trace=True, checks=False)
    executed = result.counts[0].executed.sum(axis=1)
    for row, instructions in zip(result.timeline, executed, strict=True):
        assert sum(sum(span.classes.values()) for span in row.spans) == instructions
        assert len(row.spans) <= 20000
        assert all(a.end == b.begin for a, b in pairwise(row.spans))
    waited = sum(span.waited for span in result.timeline[1].spans)
    assert waited == result.counts[0]["barrier_wait_cycles"] == rounds


def test_spans_are_named_by_what_says_most() -> None:
    body = (
        """
    ld.global.u32 %r2, [%rd1];
    add.u32 %r3, %r2, 1;
    """
        + "shfl.sync.bfly.b32 %r3, %r3, 1, 31, 0xffffffff;\n" * 40
        + "st.global.u32 [%rd1], %r1;"
    )
    (row,) = run_kernel(body, np.zeros(1, np.uint32), trace=True, checks=False).timeline
    assert [span.name for span in row.spans] == ["shuffle", "store"]
    assert row.describe() == "shuffle, load, store"


def test_shadow_memory_against_a_model(tmp_path: Path) -> None:
    program = tmp_path / "shadow_model"
    sources = [str(Path(__file__).parent / "shadow_model.cpp"), str(RUNTIME / "shadow.cpp")]
    subprocess.run(
        [*compiler(), "-std=c++17", "-O1", f"-I{RUNTIME}", *sources, "-o", str(program)], check=True
    )
    done = subprocess.run([str(program)], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout
