"""DeepSeek-V3 and Qwen3-Next decode through mla_core and gdn_mtp, next to the untouched models.

    python examples/demo.py [--out demo.html] [--device cpu] [--seed 0]

Prints which backend runs each operation and why, the tokens, errors and times, and writes the same with plots
to one self-contained page. Exits with status 1 if anything disagrees with the untouched models.
"""

from __future__ import annotations

import argparse
import copy
import dataclasses
import importlib.metadata
import os
import platform
import sys
from collections.abc import Callable, Sequence
from pathlib import Path

os.environ.setdefault("HF_HUB_OFFLINE", "1")  # read when transformers is imported; nothing here is downloaded

import checks
import common
import deepseek_v3
import measure
import qwen3_next
import recording
import report
import torch
import transformers
from kernel_dispatch import explain

PROMPT_LENS = (3, 9, 17, 33)
NUM_TOKENS = 16
NUM_DRAFTS = 3
DRAFT_WRONG = 0.25  # chance of each drafted token to be wrong
OTHER_ARCHS = ("sm_90a", "sm_100a", "sm_121a")


@dataclasses.dataclass(frozen=True)
class Client:
    """A model to run: how to patch it and how to serve it.

    patch(model) swaps its attention in place. engine(model, rollback) serves it. rollbacks name the ways in
    which rejected drafts are undone.
    """

    title: str
    summary: str
    model: transformers.PreTrainedModel
    patch: Callable[[transformers.PreTrainedModel], None]
    engine: Callable[[transformers.PreTrainedModel, str], common.Engine]
    rollbacks: tuple[str, ...]


def deepseek_client(device: torch.device, seed: int) -> Client:
    """DeepSeek-V3 with 16 heads, pages of 8 tokens."""
    num_heads, page_size = 16, 8
    config = deepseek_v3.small_config(num_heads)
    max_seq_len = max(PROMPT_LENS) + NUM_TOKENS + NUM_DRAFTS
    num_pages = len(PROMPT_LENS) * -(-max_seq_len // page_size)
    return Client(
        title="DeepSeek-V3: absorbed MLA over a paged cache",
        summary=f"{config.num_hidden_layers} layers, the last with {config.n_routed_experts} experts; "
        f"{num_heads} heads on a latent of {config.kv_lora_rank} + {config.qk_rope_head_dim}; "
        f"pages of {page_size} in shuffled order, unused rows NaN",
        model=common.random_model(transformers.DeepseekV3ForCausalLM, config, seed, device=device),
        patch=deepseek_v3.patch,
        engine=lambda model, _: deepseek_v3.PagedEngine(model, num_pages, page_size, max_seq_len, seed),
        rollbacks=("truncate",),
    )


def qwen_client(device: torch.device, seed: int) -> Client:
    """Qwen3-Next with a batch of one more row than requests, which is padding."""
    config = qwen3_next.small_config()
    max_batch = len(PROMPT_LENS) + 1
    max_len = max(PROMPT_LENS) + NUM_TOKENS + NUM_DRAFTS
    return Client(
        title="Qwen3-Next: Gated DeltaNet with speculative decoding",
        summary=f"{config.num_hidden_layers - 1} Gated DeltaNet layers: {config.linear_num_key_heads} key, "
        f"{config.linear_num_value_heads} value heads of {config.linear_value_head_dim}; an attention layer "
        f"with {config.num_experts} experts; {max_batch} batch rows, one of them padding; fp32 states",
        model=common.random_model(transformers.Qwen3NextForCausalLM, config, seed, device=device),
        patch=qwen3_next.patch,
        engine=lambda model, rollback: qwen3_next.PooledEngine(
            model,
            max_batch=max_batch,
            max_len=max_len,
            num_verify=1 + NUM_DRAFTS,
            rollback=rollback,
            seed=seed,
        ),
        rollbacks=("gather", "scatter", "compact"),
    )


def run(client: Client, device: torch.device, seed: int) -> report.ClientResult:
    """Decode greedily and speculatively with the patched model and hold it against the untouched one."""
    print(f"{client.title}: running ...", flush=True)
    cases = common.make_cases(client.model, PROMPT_LENS, NUM_TOKENS, seed)
    prompts = [case.prompt for case in cases]
    patched = copy.deepcopy(client.model)
    client.patch(patched)

    num_decoded = len(cases) * (NUM_TOKENS - 1)  # the first token of a request comes from its prefill
    stock = measure.TimedDecoder(common.StockDecoder(client.model), device)
    common.generate(common.StockDecoder(client.model), prompts, NUM_TOKENS)  # warms up
    common.generate(stock, prompts, NUM_TOKENS)
    timings = {"untouched, one request at a time": stock.milliseconds_per_token(num_decoded)}

    engine = recording.RecordingDecoder(client.engine(patched, client.rollbacks[0]))
    common.generate(engine, prompts, NUM_TOKENS)  # warms up
    posed = {problem: phase for phase, problems in engine.problems.items() for problem in problems}
    timed = measure.TimedDecoder(client.engine(patched, client.rollbacks[0]), device)
    outputs = common.generate(timed, prompts, NUM_TOKENS)
    runs = [report.Run("greedy", outputs, None, checks.check_outputs(cases, outputs))]
    timings["patched, one batch"] = timed.milliseconds_per_token(num_decoded)

    def speculate(engine: common.Engine) -> tuple[list[common.Greedy], list[list[int]]]:
        drafter = common.NoisyDrafter([case.stock.tokens for case in cases], 64, DRAFT_WRONG, seed)
        return common.generate_speculative(engine, prompts, NUM_TOKENS, drafter, NUM_DRAFTS)

    for rollback in client.rollbacks:
        engine = recording.RecordingDecoder(client.engine(patched, rollback))
        speculate(engine)  # warms up
        for phase, problems in engine.problems.items():
            for problem in problems:
                posed.setdefault(problem, f"{phase}, {rollback}")
        timed = measure.TimedDecoder(client.engine(patched, rollback), device)
        outputs, accepted = speculate(timed)
        held = [*checks.check_outputs(cases, outputs), checks.check_acceptance(accepted, NUM_DRAFTS)]
        runs.append(report.Run(f"speculative, {rollback}", outputs, accepted, held))
        timings[f"patched, speculative, {rollback}"] = timed.milliseconds_per_token(num_decoded)
    calls = recording.explained(posed, device, OTHER_ARCHS)
    return report.ClientResult(client.title, client.summary, cases, runs, timings, calls, NUM_DRAFTS)


def environment(device: torch.device, seed: int) -> dict[str, str]:
    """What took part, for the head of the report."""
    name = f"CPU, {platform.machine()}, one thread"
    if device.type == "cuda":
        name = torch.cuda.get_device_name(device)
    packages = ("torch", "transformers", "kernel-dispatch", "mla-core", "gdn-mtp")
    versions = {package: importlib.metadata.version(package) for package in packages}
    return {"device": name, "python": platform.python_version(), **versions, "seed": str(seed)}


def print_table(headings: Sequence[str], rows: Sequence[Sequence[str]]) -> None:
    """Columns padded to their widest cell."""
    widths = [max(map(len, column)) for column in zip(headings, *rows, strict=True)]
    for cells in (headings, ["-" * width for width in widths], *rows):
        print("  " + "  ".join(cell.ljust(width) for cell, width in zip(cells, widths, strict=True)).rstrip())
    print()


def print_client(result: report.ClientResult) -> None:
    """Backends, errors, tokens, times and verdicts of one model."""
    print(f"{result.summary}\n")
    for call in result.calls:
        print(f"{call.label}: {call.here}\n")
    print_table(
        ("call", "problem", "here", *OTHER_ARCHS),
        [
            [call.label, call.here.problem]
            + [explanation.chosen or "none" for explanation in (call.here, *call.elsewhere.values())]
            for call in result.calls
        ],
    )
    print_table(report.ERROR_HEADINGS, report.error_rows(result, result.runs[0]))
    print_table(
        ("request", "tokens", "accepted drafts per verify step"),
        [
            [str(i), " ".join(map(str, output.tokens.tolist())), " ".join(map(str, accepted))]
            for run in result.runs[1:2]
            for i, (output, accepted) in enumerate(zip(run.outputs, run.accepted or [], strict=True))
        ],
    )
    print_table(
        ("decoding", report.TIME_HEADING), [[k, f"{ms:.2f}"] for k, ms in result.milliseconds.items()]
    )
    print_table(
        ("verdict", "run", "check", "detail"),
        [
            ["ok" if check.passed else "FAILED", run.name, check.name, check.detail]
            for run in result.runs
            for check in run.checks
        ],
    )


def print_sweeps(title: str, size: str, sweeps: Sequence[measure.Sweep]) -> None:
    """Time and error of one operation."""
    print(title)
    print_table(
        ("", size, "ms", "relative RMS error"),
        [
            [sweep.label, str(point.size), f"{point.milliseconds:.3f}", f"{point.relative_error:.1e}"]
            for sweep in sweeps
            for point in sweep.points
        ],
    )


def main() -> int:
    """Run both clients, report, and return the exit status."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--out", type=Path, default=Path("demo.html"), help="the page to write")
    parser.add_argument("--device", type=torch.device, default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--seed", type=int, default=0)
    options = parser.parse_args()
    device = torch.device(options.device)
    transformers.logging.set_verbosity_error()  # it warns that it uses its PyTorch paths, as is meant here

    torch.set_num_threads(1)  # the models are tiny: more threads wait for each other longer than they compute
    clients = []
    for make_client in (deepseek_client, qwen_client):
        clients.append(run(make_client(device, options.seed), device, options.seed))
        print_client(clients[-1])
    with recording.recorded_problems() as problems:
        mla, gdn = measure.sweep_mla(device, options.seed), measure.sweep_gdn(device, options.seed)
    explanations = [explain(problem, device) for problem in problems]
    results = report.Results(environment(device, options.seed), clients, mla, gdn, explanations)
    print_sweeps("mla_core.decode: 4 requests, 16 heads, pages of 64, bfloat16", "keys", results.mla)
    print_sweeps("gdn_mtp: 4 requests, 16 key and 32 value heads of 128, bfloat16", "T", results.gdn)
    print(f"{report.provider_note(results.explanations)}\n")
    options.out.write_text(report.page(results), encoding="utf-8")
    print("everything agrees" if results.passed else "SOMETHING DISAGREES", f"- see {options.out}")
    return 0 if results.passed else 1


if __name__ == "__main__":
    sys.exit(main())
