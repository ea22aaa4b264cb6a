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
import report
import torch
import transformers
from gdn_mtp import GatedDeltaRuleProblem
from kernel_dispatch import explain
from mla_core import DecodeProblem

PROMPT_LENS = (3, 9, 17, 33)
NUM_TOKENS = 16
NUM_DRAFTS = 3
DRAFT_WRONG = 0.25  # chance of each drafted token to be wrong
OTHER_ARCHS = ("sm_90a", "sm_100a", "sm_121a")


@dataclasses.dataclass(frozen=True)
class Client:
    """A model to run: how to patch it, how to serve it, and the problems its operation is asked to solve.

    patch(model) swaps its attention in place. engine(model, rollback) serves it. rollbacks name the ways in
    which rejected drafts are undone. problems are labelled.
    """

    title: str
    summary: str
    model: transformers.PreTrainedModel
    patch: Callable[[transformers.PreTrainedModel], None]
    engine: Callable[[transformers.PreTrainedModel, str], common.Engine]
    rollbacks: tuple[str, ...]
    problems: dict[str, DecodeProblem | GatedDeltaRuleProblem]


def deepseek_client(device: torch.device, seed: int) -> Client:
    """DeepSeek-V3 with 16 heads, pages of 8 tokens."""
    num_heads, page_size = 16, 8
    config = deepseek_v3.small_config(num_heads)
    max_seq_len = max(PROMPT_LENS) + NUM_TOKENS + NUM_DRAFTS
    num_pages = len(PROMPT_LENS) * -(-max_seq_len // page_size)

    def problem(q_len: int, ragged: bool = False) -> DecodeProblem:
        sizes = {"batch": len(PROMPT_LENS), "num_heads": num_heads, "page_size": page_size}
        return DecodeProblem(**sizes, q_len=q_len, ragged=ragged, max_seq_len=max_seq_len)

    return Client(
        title="DeepSeek-V3: absorbed MLA over a paged cache",
        summary=f"{config.num_hidden_layers} layers, the last with {config.n_routed_experts} experts; "
        f"{num_heads} heads on a latent of {config.kv_lora_rank} + {config.qk_rope_head_dim}; "
        f"pages of {page_size} in shuffled order, unused rows NaN",
        model=common.random_model(transformers.DeepseekV3ForCausalLM, config, seed, device=device),
        patch=deepseek_v3.patch,
        engine=lambda model, _: deepseek_v3.PagedEngine(model, num_pages, page_size, seed),
        rollbacks=("truncate",),
        problems={
            "prefill": problem(max(PROMPT_LENS), ragged=True),
            "decode": problem(1),
            "verify": problem(1 + NUM_DRAFTS),
        },
    )


def qwen_client(device: torch.device, seed: int) -> Client:
    """Qwen3-Next with a batch of one more row than requests, which is padding."""
    config = qwen3_next.small_config()
    max_batch = len(PROMPT_LENS) + 1
    max_len = max(PROMPT_LENS) + NUM_TOKENS + NUM_DRAFTS
    decode = GatedDeltaRuleProblem(
        B=max_batch,
        T=1,
        H=config.linear_num_key_heads,
        HV=config.linear_num_value_heads,
        K=config.linear_key_head_dim,
        V=config.linear_value_head_dim,
        io_dtype=torch.bfloat16,
        gate_dtype=torch.bfloat16,
        dt_bias_dtype=torch.bfloat16,
        out_dtype=torch.bfloat16,
        state_dtype=torch.float32,
        state_layout="vk",
        use_qk_l2norm=True,
        update_state=True,
        intermediate="none",
        index_dtype=torch.int32,
        separate_write_indices=False,
    )
    verify = dataclasses.replace(decode, T=1 + NUM_DRAFTS)
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
        rollbacks=("gather", "scatter"),
        problems={
            "decode": decode,
            "verify, gather": dataclasses.replace(verify, update_state=False, intermediate="buffer"),
            "verify, scatter": dataclasses.replace(verify, intermediate="scatter"),
        },
    )


def run(client: Client, device: torch.device, seed: int) -> report.ClientResult:
    """Decode greedily and speculatively with the patched model and hold it against the untouched one."""
    print(f"{client.title}: running ...", flush=True)
    cases = common.make_cases(client.model, PROMPT_LENS, NUM_TOKENS, seed)
    prompts = [case.prompt for case in cases]
    patched = copy.deepcopy(client.model)
    client.patch(patched)

    stock = measure.TimedDecoder(common.StockDecoder(client.model), device)
    common.generate(stock, prompts, NUM_TOKENS)
    plain = measure.TimedDecoder(client.engine(patched, client.rollbacks[0]), device)
    common.generate(plain, prompts, NUM_TOKENS)  # warms up
    plain = measure.TimedDecoder(client.engine(patched, client.rollbacks[0]), device)
    outputs = common.generate(plain, prompts, NUM_TOKENS)
    runs = [report.Run("greedy", outputs, None, checks.check_outputs(cases, outputs))]
    timings = {
        "untouched, one request at a time": stock.milliseconds("decode") / len(cases),
        "patched, one batch": plain.milliseconds("decode") / len(cases),
    }
    for rollback in client.rollbacks:
        drafter = common.NoisyDrafter([case.stock.tokens for case in cases], 64, DRAFT_WRONG, seed)
        engine = measure.TimedDecoder(client.engine(patched, rollback), device)
        outputs, accepted = common.generate_speculative(engine, prompts, NUM_TOKENS, drafter, NUM_DRAFTS)
        held = [*checks.check_outputs(cases, outputs), checks.check_acceptance(accepted, NUM_DRAFTS)]
        runs.append(report.Run(f"speculative, {rollback}", outputs, accepted, held))
        seconds = sum(engine.seconds["verify"]) + sum(engine.seconds["commit"])
        num_decoded = len(cases) * (NUM_TOKENS - 1)
        timings[f"patched, speculative, {rollback}"] = 1e3 * seconds / num_decoded
    explanations = {label: explain(problem, device) for label, problem in client.problems.items()}
    elsewhere = {
        arch: {label: explain(problem, arch) for label, problem in client.problems.items()}
        for arch in OTHER_ARCHS
    }
    return report.ClientResult(
        client.title, client.summary, cases, runs, timings, explanations, elsewhere, NUM_DRAFTS
    )


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
    for label, explanation in result.here.items():
        print(f"{label}: {explanation}\n")
    print_table(
        ("elsewhere", *result.here),
        [[arch, *(e.chosen or "none" for e in calls.values())] for arch, calls in result.elsewhere.items()],
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
    print_table(("decoding", "ms per token"), [[k, f"{ms:.2f}"] for k, ms in result.milliseconds.items()])
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
    results = report.Results(
        environment(device, options.seed),
        clients,
        mla=measure.sweep_mla(device, options.seed),
        gdn=measure.sweep_gdn(device, options.seed),
    )
    print_sweeps("mla_core.decode: 4 requests, 16 heads, pages of 64, bfloat16", "keys", results.mla)
    print_sweeps("gdn_mtp: 4 requests, 16 key and 32 value heads of 128, bfloat16", "T", results.gdn)
    options.out.write_text(report.page(results), encoding="utf-8")
    print("everything agrees" if results.passed else "SOMETHING DISAGREES", f"- see {options.out}")
    return 0 if results.passed else 1


if __name__ == "__main__":
    sys.exit(main())
