"""What the demo says of itself: the problems it explains, the times it reports, who ran the sweeps."""

from __future__ import annotations

import dataclasses

import demo
import gdn_mtp
import kernel_dispatch
import measure
import mla_core
import pytest
import recording
import report
import torch

DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")
PROBLEM = mla_core.DecodeProblem(batch=3, num_heads=4, page_size=8, max_seq_len=64)


@pytest.fixture
def launched(monkeypatch):
    """The problems that are launched, each with the provider of its plan."""
    providers = {}
    for plan_type in (mla_core.Plan, gdn_mtp.Plan, gdn_mtp.speculative.plans.SpeculativePlan):

        def launch(plan, *arguments, _launch=plan_type.launch):
            providers[plan.problem] = plan.provider
            return _launch(plan, *arguments)

        monkeypatch.setattr(plan_type, "launch", launch)
    return providers


@pytest.mark.parametrize("make_client", [demo.deepseek_client, demo.qwen_client])
def test_explained_problems_are_those_that_ran(make_client, launched, monkeypatch):
    monkeypatch.setattr(demo, "PROMPT_LENS", (3, 9))
    monkeypatch.setattr(demo, "NUM_TOKENS", 8)
    result = demo.run(make_client(DEVICE, 0), DEVICE, 0)
    assert {call.problem: call.here.chosen for call in result.calls} == launched
    labels = [call.label for call in result.calls]
    assert labels.count("decode") == 1
    assert {label.split(",")[0] for label in labels} - {"prefill"} == {"decode", "verify"}
    assert all(list(call.elsewhere) == list(demo.OTHER_ARCHS) for call in result.calls)


def test_recording_sees_problems_that_are_already_planned(launched):
    points = [measure.mla_point(DEVICE, 0, 1, 128)]
    with recording.recorded_problems() as problems:
        points.append(measure.mla_point(DEVICE, 0, 1, 128))
        points.append(measure.gdn_point(DEVICE, 0, 2, verify=True))
    assert problems == list(launched)
    assert len(points) == 3


def test_time_per_token_is_a_mean_without_prefill():
    timed = measure.TimedDecoder(decoder=None, device=DEVICE)
    timed.seconds.update(prefill=[9.0], verify=[0.001, 0.003, 0.005], commit=[0.001, 0.0, 0.002])
    assert timed.milliseconds_per_token(6) == pytest.approx(2.0)


@pytest.mark.parametrize(
    ("chosen", "expected", "absent"),
    [
        (["sm100"], "Provider: sm100.", "PyTorch"),
        (["torch", "torch"], "Provider: torch. Times of torch, the PyTorch provider, show", "Providers"),
        (["torch", "cute"], "Providers: cute, torch. Times of torch", "none"),
    ],
)
def test_the_page_says_who_ran_the_sweeps(chosen, expected, absent):
    explanation = kernel_dispatch.explain(PROBLEM, "cpu")
    note = report.provider_note([dataclasses.replace(explanation, chosen=name) for name in chosen])
    assert note.startswith(expected)
    assert absent not in note
