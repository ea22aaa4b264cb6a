"""The mutants of the reference kernels that nothing catches, each with why."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

from kernels.gemm_softmax import GemmSoftmaxConfig
from ptx_emulator import Options, Result
from ptx_emulator.host.exploring import schedules
from ptx_emulator.machine import LoadedModule
from ptx_emulator.mutation import CATCHERS, Outcome, Place, survey
from test_cute_functions import LOG_2, P_ABSOLUTE, P_RELATIVE, emulated_gemm_softmax, softmax_problem

NUM_SCHEDULES = 6
SCALE_LOG2 = 0.7
REDUNDANT, GAP, UNCLASSIFIED = "redundant", "gap of the checker", "not classified"


@dataclass(frozen=True)
class Verdict:
    """What a survivor is: `REDUNDANT` or a `GAP`, and why."""

    verdict: str
    why: str


_INIT_FENCE = Verdict(
    REDUNDANT,
    "TmemAllocator and pipeline_init_arrive both fence after all mbarriers are initialised; without both of "
    "them the race checker finds races with the first arrivals",
)
_LOAD_TAIL = Verdict(
    REDUNDANT,
    "nothing comes after it in the role. The epilogues of the pair end later: they have waited for an "
    "accumulator whose tcgen05.commit comes after those that arrive here. That the commits of one thread "
    "arrive in order is how the emulator runs them; the PTX ISA does not say it in so many words",
)
_ACC_TAIL = Verdict(
    REDUNDANT,
    "nothing comes after it in the role; the epilogue warps of both CTAs arrive here before the pair meets "
    "to free its tensor memory, and neither CTA ends before that",
)
_LAST_STORE = Verdict(
    REDUNDANT, "moved behind a tcgen05 instruction it still comes before the end of the CTA, where sP goes"
)
SURVIVORS: dict[Place, Verdict] = {
    Place("tmem = utils.TmemAllocator(", "fence.mbarrier_init.release.cluster", "drop"): _INIT_FENCE,
    Place(
        "pipeline.pipeline_init_arrive(cluster_shape_mn=(CLUSTER_CTAS, 1), is_relaxed=True)",
        "fence.mbarrier_init.release.cluster",
        "drop",
    ): _INIT_FENCE,
    **{
        Place(
            "load_pipeline.producer_tail(state)", "mbarrier.try_wait.parity.shared.b64", "drop", stage
        ): _LOAD_TAIL
        for stage in range(3)
    },
    Place("acc_pipeline.producer_tail(empty)", "mbarrier.try_wait.parity.shared.b64", "drop"): _ACC_TAIL,
    Place("cute.arch.cp_async_bulk_wait_group(0, read=False)", "cp.async.bulk.wait_group", "later"): (
        _LAST_STORE
    ),
}


def survey_gemm_softmax(*, progress: bool = False) -> list[Outcome]:
    """Every mutant of the GEMM with softmax, each under `NUM_SCHEDULES` schedules to its end."""
    function = emulated_gemm_softmax(GemmSoftmaxConfig())
    X, W, P = softmax_problem(1100, 128, 320)  # five tiles for two clusters, five steps for three stages
    expected = (X.double() @ W.double().T * SCALE_LOG2 * LOG_2).softmax(-1)
    call = function.call(X, W, P, SCALE_LOG2)

    def run(module: LoadedModule) -> Iterator[tuple[Result, bool]]:
        for options in schedules(Options(strict=False), NUM_SCHEDULES):
            P.fill_(float("nan"))
            result = call.run(options, module)
            bound = P_RELATIVE * expected + P_ABSOLUTE
            yield result, bool(((P.double() - expected).abs() <= bound).all())

    return survey(function.module, None, run, progress=progress)


def verdict_of(outcome: Outcome) -> Verdict | None:
    """What a survivor is; None of a mutant that was caught."""
    if not outcome.survived:
        return None
    return SURVIVORS.get(outcome.mutant.place, Verdict(UNCLASSIFIED, ""))


def record(outcomes: Sequence[Outcome]) -> dict[str, Any]:
    """Counts, and every mutant with what caught it, or what it is, as JSON objects."""
    mutants = []
    for outcome in outcomes:
        verdict = verdict_of(outcome)
        mutants.append(outcome.record() | ({"survivor": vars(verdict)} if verdict else {}))
    caught = {name: sum(name in o.caught_by for o in outcomes) for name in CATCHERS}
    return {
        "mutants": len(outcomes),
        "schedules": NUM_SCHEDULES,
        "caught": sum(not o.survived for o in outcomes),
        "caught_by": caught,
        "caught_by_nothing_else": {n: sum(o.caught_by == (n,) for o in outcomes) for n in CATCHERS},
        "survived": {
            kind: sum(m.get("survivor", {}).get("verdict") == kind for m in mutants)
            for kind in (REDUNDANT, GAP, UNCLASSIFIED)
        },
        "each": mutants,
    }
