"""Every wait, fence and barrier of the reference kernel, dropped or moved one at a time: who notices?"""

from __future__ import annotations

import json
from pathlib import Path

from mutations import SURVIVORS, record, survey_gemm_softmax, verdict_of
from ptx_emulator.mutation import CATCHERS, catcher_of

MIN_MUTANTS = 25
BENCHMARKS = Path(__file__).resolve().parents[2] / "benchmarks"
RECORD = BENCHMARKS / "results" / "emulated_mutations.json"


def test_only_what_is_known_to_be_redundant_survives() -> None:
    outcomes = survey_gemm_softmax()
    assert len(outcomes) >= MIN_MUTANTS
    survivors = {o.mutant.place: verdict_of(o) for o in outcomes if o.survived}
    assert survivors == SURVIVORS, "\n".join(map(str, survivors))
    found = record(outcomes)
    kept = json.loads(RECORD.read_text(encoding="utf-8"))["gemm_softmax"]
    same = ("mutants", "caught", "survived")
    assert {name: found[name] for name in same} == {name: kept[name] for name in same}


def test_each_kind_of_finding_counts_as_what_it_is() -> None:
    kinds = ("race", "proxy-race", "uninitialised", "tcgen05-order", "deadlock", "barrier", "out-of-bounds")
    catchers = [
        "races",
        "races",
        "uninitialised",
        "tcgen05-order",
        "deadlock",
        "other checks",
        "other checks",
    ]
    assert [catcher_of(kind) for kind in kinds] == catchers
    assert set(catchers) < set(CATCHERS)


def test_the_table_of_the_readme_is_that_of_the_record() -> None:
    import importlib.util

    spec = importlib.util.spec_from_file_location("emulated_mutations", BENCHMARKS / "emulated_mutations.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    text = module.README.read_text(encoding="utf-8")
    assert module.filled_in(text, json.loads(RECORD.read_text(encoding="utf-8"))) == text
