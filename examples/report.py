"""What the demo found, and the one HTML page that shows it: no scripts, nothing loaded from elsewhere."""

from __future__ import annotations

import dataclasses
import html
from collections.abc import Sequence
from pathlib import Path

import plots
from checks import Check, LogitError
from common import Case, Greedy
from kernel_dispatch import Explanation
from measure import Sweep
from recording import Call

STYLESHEET = Path(__file__).with_name("report.css")


@dataclasses.dataclass(frozen=True)
class Run:
    """One way of decoding. accepted: per request, the drafts accepted in each step; None without drafts."""

    name: str
    outputs: list[Greedy]
    accepted: list[list[int]] | None
    checks: list[Check]


@dataclasses.dataclass(frozen=True)
class ClientResult:
    """Everything about one model.

    milliseconds: per generated token, by way of decoding. calls: every kind that was made.
    """

    title: str
    summary: str
    cases: list[Case]
    runs: list[Run]
    milliseconds: dict[str, float]
    calls: list[Call]
    num_drafts: int

    @property
    def passed(self) -> bool:
        """Whether every check of every run held."""
        return all(check.passed for run in self.runs for check in run.checks)


@dataclasses.dataclass(frozen=True)
class Results:
    """The whole demo. environment: name and version of what took part. explanations: of the sweeps' calls."""

    environment: dict[str, str]
    clients: list[ClientResult]
    mla: list[Sweep]
    gdn: list[Sweep]
    explanations: list[Explanation]

    @property
    def passed(self) -> bool:
        """Whether nothing disagreed."""
        return all(client.passed for client in self.clients)


def error_rows(client: ClientResult, run: Run) -> list[list[str]]:
    """One row per request: prompt length, equal tokens, margin, errors of both models."""
    rows = []
    for index, (case, output) in enumerate(zip(client.cases, run.outputs, strict=True)):
        equal = int((case.stock.tokens == output.tokens).sum())
        ours = LogitError.of([output.logits], [case.exact])
        stock = LogitError.of([case.stock.logits], [case.exact])
        cells = [f"{value:.4f}" for value in (case.margin, stock.rms, ours.rms, stock.largest, ours.largest)]
        rows.append([str(index), str(len(case.prompt)), f"{equal} of {len(output.tokens)}", *cells])
    return rows


ERROR_HEADINGS = (
    "request",
    "prompt",
    "tokens equal",
    "margin",
    "RMS error, untouched",
    "RMS error, patched",
    "largest, untouched",
    "largest, patched",
)


TIME_HEADING = "ms per generated token, mean"
TIME_CAPTION = (
    "Mean time per generated token: all the time spent in decode, or in verify and commit, divided by the "
    "tokens generated after the first. All layers; prefill not included."
)


def table(headings: Sequence[str], rows: Sequence[Sequence[str]], css: str = "") -> str:
    """An HTML table; cells are text."""
    head = "".join(f"<th>{html.escape(heading)}</th>" for heading in headings)
    body = "".join(
        "<tr>" + "".join(f"<td>{html.escape(cell)}</td>" for cell in row) + "</tr>" for row in rows
    )
    parts = f"<thead><tr>{head}</tr></thead><tbody>{body}</tbody>"
    return f'<div class="scroll"><table class="{css}">{parts}</table></div>'


def check_list(checks: Sequence[Check]) -> str:
    """One line per check with its verdict."""
    items = (
        f'<li class="{"ok" if check.passed else "bad"}">{html.escape(check.name)}'
        f"<span>{html.escape(check.detail)}</span></li>"
        for check in checks
    )
    return f'<ul class="checks">{"".join(items)}</ul>'


def token_chips(case: Case, output: Greedy, accepted: Sequence[int] | None, num_drafts: int) -> str:
    """The generated tokens in order; with drafts, one group per verify call: accepted, next, rejected."""
    expected = case.stock.tokens.tolist()
    tokens = output.tokens.tolist()

    def chip(position: int, kind: str) -> str:
        wrong = " wrong" if tokens[position] != expected[position] else ""
        return f'<b class="{kind}{wrong}">{tokens[position]}</b>'

    if accepted is None:
        return "".join(chip(position, "plain") for position in range(len(tokens)))
    groups, start = [f"<i>{chip(0, 'plain')}</i>"], 1
    for count in accepted:
        kinds = ["draft"] * count + ["plain"]
        shown = [chip(start + i, kind) for i, kind in enumerate(kinds) if start + i < len(tokens)]
        rejected = '<b class="rejected">&times;</b>' * (num_drafts - count)
        groups.append(f"<i>{''.join(shown)}{rejected}</i>")
        start += count + 1
    return "".join(groups)


def token_section(client: ClientResult) -> str:
    """Tokens of every request and run."""
    rows = []
    for index, case in enumerate(client.cases):
        lines = "".join(
            f"<tr><td>{html.escape(run.name)}</td><td class='chips'>"
            + token_chips(
                case, run.outputs[index], run.accepted[index] if run.accepted else None, client.num_drafts
            )
            + "</td></tr>"
            for run in client.runs
        )
        heading = f"request {index}, prompt of {len(case.prompt)} tokens"
        rows.append(f"<tr><th colspan='2'>{heading}</th></tr>{lines}")
    legend = (
        "<p class='note'>Each group is one verify call: <b class='draft'>n</b> accepted draft, "
        "<b class='plain'>n</b> the model's own next token, <b class='rejected'>&times;</b> rejected draft, "
        "<b class='plain wrong'>n</b> differs from the untouched model.</p>"
    )
    return f"{legend}<div class='scroll'><table class='tokens'>{''.join(rows)}</table></div>"


def explanation_section(client: ClientResult) -> str:
    """Which backend runs each problem here, why, and what other devices would get."""
    rows = dict.fromkeys(  # the problems of one label mostly fare alike
        (
            call.label,
            call.here.chosen or "none",
            row.name,
            row.status,
            f"{row.distribution} {row.version}",
            row.reason,
        )
        for call in client.calls
        for row in call.here.rows
    )
    here = table(("call", "chosen", "provider", "status", "package", "reason"), list(rows))
    problems = [
        [call.label, call.here.problem, *(e.chosen or "none" for e in (call.here, *call.elsewhere.values()))]
        for call in client.calls
    ]
    everywhere = table(("call", "problem", "here", *client.calls[0].elsewhere), problems, "mono")
    return f"{here}<p class='note'>The problems, and what other devices would choose:</p>{everywhere}"


def figure(svg: str, caption: str) -> str:
    """An SVG with its caption."""
    return f"<figure>{svg}<figcaption>{html.escape(caption)}</figcaption></figure>"


def client_section(client: ClientResult, name: str) -> str:
    """Everything about one model."""
    greedy = client.runs[0]
    verdicts = "".join(
        f"<div><h4>{html.escape(run.name)}</h4>{check_list(run.checks)}</div>" for run in client.runs
    )
    errors = plots.plot_errors(client.cases, greedy.outputs, f"{name}-errors")
    times = plots.plot_times(client.milliseconds, f"{name}-times")
    return (
        f"<section><h2>{html.escape(client.title)}</h2><p>{html.escape(client.summary)}</p>"
        f"<div class='verdicts'>{verdicts}</div>"
        "<div class='figures'>"
        + figure(errors, "Greedy decoding. A token can only differ where a diamond is below twice the error.")
        + figure(times, TIME_CAPTION)
        + "</div><h3>Errors per request, greedy</h3>"
        + table(ERROR_HEADINGS, error_rows(client, greedy), "numbers")
        + "<h3>Tokens</h3>"
        + token_section(client)
        + "<h3>Backends</h3>"
        + explanation_section(client)
        + "</section>"
    )


def provider_note(explanations: Sequence[Explanation]) -> str:
    """Who ran the calls that are explained, and what to make of their times."""
    names = sorted({explanation.chosen or "none" for explanation in explanations})
    note = f"{'Provider' if len(names) == 1 else 'Providers'}: {', '.join(names)}."
    if "torch" in names:
        note += " Times of torch, the PyTorch provider, show how the work scales, not what a kernel takes."
    return note


def operation_section(results: Results) -> str:
    """Plots of the two operations by themselves."""
    error_label = "RMS error / RMS of float64"
    pictures = (
        (results.mla, "milliseconds", "sequence length (keys)", "ms per call", "mla_core.decode, time"),
        (results.mla, "relative_error", "sequence length (keys)", error_label, "mla_core.decode, error"),
        (results.gdn, "milliseconds", "T, tokens per request", "ms", "gdn_mtp, time for T tokens"),
        (results.gdn, "relative_error", "T, tokens per request", error_label, "gdn_mtp, error of the output"),
    )
    figures = "".join(
        figure(plots.plot_sweeps(sweeps, quantity, xlabel, ylabel, caption), caption)
        for sweeps, quantity, xlabel, ylabel, caption in pictures
    )
    return (
        "<section><h2>The operations by themselves</h2><p>4 requests, bfloat16. MLA: 16 heads, pages of 64. "
        "Gated delta rule: 16 key and 32 value heads of 128, float32 states. "
        f"{html.escape(provider_note(results.explanations))}</p>"
        f"<div class='figures'>{figures}</div></section>"
    )


def page(results: Results) -> str:
    """The whole page."""
    count = sum(len(run.checks) for client in results.clients for run in client.runs)
    failed = sum(
        not check.passed for client in results.clients for run in client.runs for check in run.checks
    )
    verdict = f"All {count} checks hold" if results.passed else f"{failed} of {count} checks fail"
    facts = "".join(
        f"<div><dt>{html.escape(k)}</dt><dd>{html.escape(v)}</dd></div>"
        for k, v in results.environment.items()
    )
    sections = "".join(client_section(client, f"client{i}") for i, client in enumerate(results.clients))
    return (
        '<!doctype html><html lang="en"><head><meta charset="utf-8">'
        '<meta name="viewport" content="width=device-width, initial-scale=1">'
        f"<title>MLA and Gated DeltaNet decode: {verdict}</title>"
        f"<style>{STYLESHEET.read_text(encoding='utf-8')}</style></head><body><main>"
        "<h1>MLA and Gated DeltaNet decode inside real models</h1>"
        f"<p class='banner {'ok' if results.passed else 'bad'}'>{verdict}</p>"
        f"<dl class='facts'>{facts}</dl>{sections}{operation_section(results)}</main></body></html>\n"
    )
