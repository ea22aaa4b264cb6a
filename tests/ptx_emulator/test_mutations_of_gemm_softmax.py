"""Every wait, fence and barrier of the reference kernel, dropped or moved one at a time: who notices?

What may survive, and why:
- `fence.mbarrier_init`: the kernel has it twice in a row, either one will do;
- `mbarrier.try_wait` at the end of the load and MMA roles (producer_tail): nothing comes after it in the
  role, and the pair meets again before either CTA frees its tensor memory and ends;
- the last `cp.async.bulk.wait_group` moved later: it still comes before the CTA ends.
"""

from __future__ import annotations

from collections import Counter

from kernels.gemm_softmax import GemmSoftmaxConfig
from ptx_emulator import Options, Result
from ptx_emulator.host.exploring import schedules
from ptx_emulator.machine import LoadedModule
from ptx_emulator.mutation import survey
from test_cute_functions import LOG_2, P_ABSOLUTE, P_RELATIVE, emulated_gemm_softmax, softmax_problem

MAY_SURVIVE = Counter({"fence.mbarrier_init": 2, "mbarrier.try_wait": 4, "cp.async.bulk.wait_group": 1})
MIN_MUTANTS = 25
NUM_SCHEDULES = 6
SCALE_LOG2 = 0.7


def test_only_redundant_synchronisation_survives() -> None:
    function = emulated_gemm_softmax(GemmSoftmaxConfig())
    X, W, P = softmax_problem(1100, 128, 320)  # five tiles for two clusters, five steps for three stages
    expected = (X.double() @ W.double().T * SCALE_LOG2 * LOG_2).softmax(-1)
    call = function.call(X, W, P, SCALE_LOG2)

    def run(module: LoadedModule) -> tuple[Result, bool]:
        right = True
        for options in schedules(Options(strict=False), NUM_SCHEDULES):
            P.fill_(float("nan"))
            result = call.run(options, module)
            right = right and bool(
                ((P.double() - expected).abs() <= P_RELATIVE * expected + P_ABSOLUTE).all()
            )
            if result.reports:
                break
        return result, right

    outcomes = survey(function.module, None, run, progress=False)
    assert len(outcomes) >= MIN_MUTANTS
    survived = Counter(
        next((name for name in MAY_SURVIVE if o.mutant.instruction.startswith(name)), str(o.mutant))
        for o in outcomes
        if o.caught_by == "survived"
    )
    assert survived <= MAY_SURVIVE, survived
