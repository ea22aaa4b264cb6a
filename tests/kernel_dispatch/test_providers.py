"""Registration through entry points of made-up distributions, and what `resolve` and `explain` make of it."""

from __future__ import annotations

import re
import sys
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace
from importlib import invalidate_caches
from pathlib import Path
from types import SimpleNamespace
from typing import ClassVar

import pytest
import torch
from kernel_dispatch import (
    Arch,
    ArgumentError,
    ArgumentTypeError,
    Kernel,
    NoKernelError,
    Provider,
    ProviderError,
    as_arch,
    candidates,
    check_registered,
    explain,
    providers,
    registered,
    reload_providers,
    resolution,
    resolve,
)

GROUP = "kernel_dispatch_test.op.v1"


@dataclass(frozen=True)
class Problem:
    entry_point_group: ClassVar[str] = GROUP
    batch: int = 3

    def bucketed(self) -> Problem:
        return Problem(1 << (self.batch.bit_length() - 1))

    def describe(self) -> str:
        return f"B{self.batch}"


class FakeKernel:
    def __init__(self, tactics: tuple[str, ...] = ("heuristic", "other")) -> None:
        self._tactics = tactics

    def workspace_nbytes(self, problem: Problem, arch: Arch, tactic: str | None = None) -> int:
        return 0

    def tactics(self, problem: Problem, arch: Arch) -> tuple[str, ...]:
        return self._tactics

    def prepare(self, problem: Problem, arch: Arch, device: torch.device, tactic: str) -> Callable[..., None]:
        return lambda: None


def no_objection(problem: Problem, arch: Arch) -> str | None:
    return None


def small_batches_only(problem: Problem, arch: Arch) -> str | None:
    return None if problem.batch <= 8 else f"batch = {problem.batch}, at most 8"


def provider(
    name: str,
    archs: tuple[str, ...] = ("any",),
    priority: int = 0,
    supports: Callable[[Problem, Arch], str | None] = no_objection,
    load: Callable[[], Kernel] = FakeKernel,
) -> Provider:
    return Provider(name, archs, supports, load, priority)


def must_not_load() -> Kernel:
    raise AssertionError("loaded without need")


@pytest.fixture
def three() -> Iterator[None]:
    """ "torch" for any arch, "hopper" for small batches, "blackwell"."""
    with (
        registered(GROUP, provider("torch")),
        registered(GROUP, provider("hopper", ("sm_90",), 10, small_batches_only)),
        registered(GROUP, provider("blackwell", ("sm_100", "sm_103"), 20)),
    ):
        yield


@pytest.fixture
def site(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Callable[..., None]]:
    """Installs made-up distributions: site(name, version, {entry point: value}, {module: source})."""
    monkeypatch.syspath_prepend(str(tmp_path))
    known = set(sys.modules)

    def install(name: str, version: str, points: dict[str, str], modules: dict[str, str]) -> None:
        info = tmp_path / f"{name.replace('-', '_')}-{version}.dist-info"
        info.mkdir()
        (info / "METADATA").write_text(f"Metadata-Version: 2.1\nName: {name}\nVersion: {version}\n")
        lines = [f"[{GROUP}]", *(f"{point} = {value}" for point, value in points.items())]
        (info / "entry_points.txt").write_text("\n".join(lines))
        for module, source in modules.items():
            (tmp_path / f"{module}.py").write_text(source)
        invalidate_caches()
        reload_providers()

    yield install
    for module in set(sys.modules) - known:
        if getattr(sys.modules[module], "__file__", "") and str(tmp_path) in str(
            sys.modules[module].__file__
        ):
            del sys.modules[module]
    reload_providers()


GOOD_SOURCE = """
from kernel_dispatch import Provider
loads = []
PROVIDER = Provider("good", ("any",), lambda problem, arch: None, lambda: loads.append(1), 5)
"""


def test_entry_points_are_found_without_loading(site: Callable[..., None]) -> None:
    site("good-kernels", "1.2", {"good": "good_kernels:PROVIDER"}, {"good_kernels": GOOD_SOURCE})
    assert "good_kernels" not in sys.modules
    (entry,) = providers(GROUP)
    assert (entry.name, entry.distribution, entry.version, entry.error) == (
        "good",
        "good-kernels",
        "1.2",
        None,
    )
    assert entry.provider is not None
    assert explain(Problem(), "cpu").chosen == "good"
    assert sys.modules["good_kernels"].loads == []
    assert providers(GROUP) == (entry,)


@pytest.mark.parametrize(
    ("value", "source", "error"),
    [
        (
            "bad:PROVIDER",
            "import no_such_module_anywhere",
            "ModuleNotFoundError: No module named 'no_such_module",
        ),
        ("bad:PROVIDER", "raise OSError('libcuda.so.1: missing')", "OSError: libcuda.so.1: missing"),
        ("bad:NOTHING", "", "AttributeError: .*NOTHING"),
        ("bad:PROVIDER", "PROVIDER = 'a string'", "bad:PROVIDER is a str, expected a Provider"),
        ("bad:PROVIDER", GOOD_SOURCE, "bad:PROVIDER calls itself 'good', expected 'bad'"),
    ],
)
def test_broken_provider_is_listed_and_the_others_go_on(
    site: Callable[..., None], value: str, source: str, error: str
) -> None:
    site("good-kernels", "1.2", {"good": "good_kernels:PROVIDER"}, {"good_kernels": GOOD_SOURCE})
    site("bad-kernels", "0.3", {"bad": value}, {"bad": source})
    good, bad = providers(GROUP)
    assert (good.name, bad.name, bad.distribution, bad.version) == ("good", "bad", "bad-kernels", "0.3")
    assert bad.provider is None
    assert bad.error is not None
    explanation = explain(Problem(), "cpu")
    assert explanation.chosen == "good"
    assert [(row.name, row.status) for row in explanation.rows] == [("good", "chosen"), ("bad", "broken")]
    with pytest.raises(NoKernelError, match=f"^backend='bad': {error}"):
        resolve(Problem(), "cpu", backend="bad")


def test_name_taken_by_another_distribution(site: Callable[..., None]) -> None:
    site("first", "1", {"good": "first_kernels:PROVIDER"}, {"first_kernels": GOOD_SOURCE})
    site("second", "2", {"good": "second_kernels:PROVIDER"}, {"second_kernels": GOOD_SOURCE})
    kept, refused = providers(GROUP)
    assert (kept.distribution, kept.error) == ("first", None)
    assert (refused.distribution, refused.error) == ("second", "the name 'good' is taken by first")
    assert [row.status for row in explain(Problem(), "cpu").rows] == ["chosen", "broken"]


@pytest.mark.parametrize(
    ("arch", "batch", "backend", "chosen", "reason"),
    [
        ("cpu", 3, "auto", "torch", "the only one that supports it"),
        ("sm_90a", 3, "auto", "hopper", "highest priority of 2 able"),
        ("sm_90a", 9, "auto", "torch", "the only one that supports it"),
        ("sm_103a", 3, "auto", "blackwell", "highest priority of 2 able"),
        ("sm_121a", 3, "auto", "torch", "the only one that supports it"),
        ("sm_90a", 3, "torch", "torch", "asked for by backend='torch'"),
    ],
)
@pytest.mark.usefixtures("three")
def test_choice(arch: str, batch: int, backend: str, chosen: str, reason: str) -> None:
    explanation = explain(Problem(batch), arch, backend)
    assert (explanation.chosen, explanation.reason) == (chosen, reason)
    assert [row.name for row in explanation.rows] == ["blackwell", "hopper", "torch"]
    assert [row.name for row in explanation.rows if row.status == "chosen"] == [chosen]
    selection = resolve(Problem(batch), arch, backend)
    assert (selection.provider.name, selection.tactic, selection.reason) == (chosen, "heuristic", reason)
    assert isinstance(selection.kernel, FakeKernel)


@pytest.mark.usefixtures("three")
def test_a_backend_is_a_provider_of_the_group_or_auto() -> None:
    for backend in ("auto", "torch", "hopper"):
        check_registered(GROUP, backend)
    with pytest.raises(NoKernelError, match=f"^backend='nothing': no provider of that name in {GROUP}$"):
        check_registered(GROUP, "nothing")


@pytest.mark.parametrize(
    ("arch", "batch", "backend", "reason"),
    [
        ("cpu", 3, "nothing", f"no provider of that name in {GROUP}"),
        ("sm_90a", 3, "blackwell", "is for sm_100, sm_103; this is sm_90a"),
        ("sm_90a", 9, "hopper", "batch = 9, at most 8"),
    ],
)
@pytest.mark.usefixtures("three")
def test_strict_backend_never_falls_back(arch: str, batch: int, backend: str, reason: str) -> None:
    explanation = explain(Problem(batch), arch, backend)
    assert explanation.chosen is None
    with pytest.raises(NoKernelError) as raised:
        resolve(Problem(batch), arch, backend)
    first_line, _, table = str(raised.value).partition("\n")
    assert first_line == f"backend={backend!r}: {reason}"
    assert table == str(explanation)
    assert all(name in table for name in ("torch", "hopper", "blackwell"))
    assert {row.reason for row in explanation.rows if row.status == "supported"} == {"supports it"}


def test_nobody_can() -> None:
    with registered(GROUP, provider("hopper", ("sm_90",))), pytest.raises(NoKernelError) as raised:
        resolve(Problem(), "cpu")
    assert str(raised.value).startswith(f"none of 1 providers in {GROUP} can run this problem\n")
    assert "is for sm_90; this is cpu" in str(raised.value)
    with pytest.raises(NoKernelError, match=r"^none of 0 providers"):
        resolve(Problem(), "cpu")


def test_a_provider_for_other_architectures_says_what_it_needs():
    needy = Provider(
        "needy", ("sm_120",), no_objection, FakeKernel, 10, needs="an RTX GPU; CUDA 12.8 or newer"
    )
    expected = "is for sm_120 (an RTX GPU; CUDA 12.8 or newer); this is sm_90a"
    assert needy.objection(Problem(3), as_arch("sm_90a")) == expected
    assert needy.objection(Problem(3), as_arch("sm_120a")) is None
    with pytest.raises(ArgumentTypeError, match=r"^needs"):
        Provider("needy", ("sm_120",), no_objection, FakeKernel, 10, needs=None)


@pytest.mark.parametrize(
    ("tuned", "expected"),
    [
        (("torch", "other"), ("torch", "other")),
        (("hopper", "other"), ("hopper", "other")),
        (("torch", "gone"), ("torch", "heuristic")),
        (("blackwell", "other"), ("hopper", "heuristic")),
    ],
    ids=["lower-priority", "tactic", "tactic-gone", "cannot-here"],
)
@pytest.mark.usefixtures("three")
def test_tuned_choice(
    monkeypatch: pytest.MonkeyPatch, tuned: tuple[str, str], expected: tuple[str, str]
) -> None:
    monkeypatch.setattr(resolution, "tuned_choice", lambda problem, arch: tuned)
    selection = resolve(Problem(), "sm_90a")
    assert (selection.provider.name, selection.tactic) == expected
    assert explain(Problem(), "sm_90a").chosen == expected[0]
    strict = resolve(Problem(), "sm_90a", backend="hopper")
    assert (strict.provider.name, strict.tactic) == (
        "hopper",
        "other" if tuned == ("hopper", "other") else "heuristic",
    )


@pytest.mark.usefixtures("three")
def test_a_named_tactic(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(resolution, "tuned_choice", lambda problem, arch: ("hopper", "heuristic"))
    for backend in ("auto", "hopper"):
        selection = resolve(Problem(), "sm_90a", backend, "other")
        assert (selection.provider.name, selection.tactic) == ("hopper", "other")
        assert selection.reason.endswith("; tactic named")
    with pytest.raises(ArgumentError, match=r"^tactic: 'none', expected one of heuristic, other") as raised:
        resolve(Problem(), "sm_90a", tactic="none")
    assert raised.value.argument == "tactic"


def test_load_runs_once_and_only_for_the_chosen() -> None:
    loads: list[int] = []

    def load() -> Kernel:
        loads.append(1)
        return FakeKernel()

    with (
        registered(GROUP, provider("mine", load=load, priority=1)),
        registered(GROUP, provider("torch", load=must_not_load)),
    ):
        assert resolve(Problem(), "cpu").kernel is resolve(Problem(5), "cpu").kernel
    assert loads == [1]


def test_threads_share_one_load() -> None:
    loads: list[int] = []

    def load() -> Kernel:
        loads.append(1)
        time.sleep(0.05)
        return FakeKernel()

    with registered(GROUP, provider("mine", load=load)), ThreadPoolExecutor(4) as pool:
        kernels = list(pool.map(lambda batch: resolve(Problem(batch), "cpu").kernel, range(1, 5)))
    assert loads == [1]
    assert all(kernel is kernels[0] for kernel in kernels)


def test_broken_load_is_raised_with_its_cause() -> None:
    with (
        registered(GROUP, provider("torch")),
        registered(GROUP, provider("mine", priority=1, load=must_not_load)),
    ):
        with pytest.raises(
            NoKernelError, match="'mine' failed to load: AssertionError: loaded without"
        ) as raised:
            resolve(Problem(), "cpu")
        assert isinstance(raised.value.__cause__, AssertionError)
        assert resolve(Problem(), "cpu", backend="torch").provider.name == "torch"


def test_failing_supports_is_shown_and_raised() -> None:
    def divide(problem: Problem, arch: Arch) -> str | None:
        raise ZeroDivisionError("oops")

    with (
        registered(GROUP, provider("torch")),
        registered(GROUP, provider("mine", priority=1, supports=divide)),
    ):
        explanation = explain(Problem(), "cpu")
        assert explanation.chosen == "torch"
        assert (explanation.rows[0].status, explanation.rows[0].reason) == (
            "broken",
            "supports() raised ZeroDivisionError: oops",
        )
        for backend in ("auto", "mine"):
            with pytest.raises(NoKernelError, match=r"'mine' failed in supports\(\)") as raised:
                resolve(Problem(), "cpu", backend)
            assert isinstance(raised.value.__cause__, ZeroDivisionError)
        assert resolve(Problem(), "cpu", "torch").provider.name == "torch"


@pytest.mark.parametrize("answer", [True, False, "", 3], ids=repr)
def test_answer_of_supports_that_is_no_reason_is_shown_and_raised(answer: object) -> None:
    expected = rf"supports\(\) returned {answer!r}, expected None or the reason to decline"
    with (
        registered(GROUP, provider("torch")),
        registered(GROUP, provider("mine", priority=1, supports=lambda problem, arch: answer)),  # type: ignore[arg-type,return-value]
    ):
        explanation = explain(Problem(), "cpu")
        assert explanation.chosen == "torch"
        assert explanation.rows[0].status == "broken"
        assert re.fullmatch(expected, explanation.rows[0].reason)
        assert "supports() returned" in str(explanation)
        for backend in ("auto", "mine"):
            with pytest.raises(NoKernelError, match=r"'mine' failed in supports\(\)") as raised:
                resolve(Problem(), "cpu", backend)
            assert isinstance(raised.value.__cause__, ProviderError)
        with pytest.raises(NoKernelError, match=f"^provider 'mine': {expected}$"):
            candidates(Problem(), "cpu")
        assert resolve(Problem(), "cpu", "torch").provider.name == "torch"


@pytest.mark.parametrize(
    ("loaded", "came"),
    [
        (None, "NoneType without workspace_nbytes, tactics, prepare"),
        (SimpleNamespace(workspace_nbytes=len, tactics=len), "SimpleNamespace without prepare"),
        (
            SimpleNamespace(workspace_nbytes=0, tactics=len, prepare=len),
            "SimpleNamespace without workspace_nbytes",
        ),
    ],
    ids=["None", "no-prepare", "no-function"],
)
def test_what_load_returns_must_be_a_kernel(loaded: object, came: str) -> None:
    with registered(GROUP, provider("mine", load=lambda: loaded)):  # type: ignore[arg-type,return-value]
        for _ in range(2):
            with pytest.raises(
                NoKernelError, match=rf"'mine' failed to load: ProviderError: load\(\) returned {came}"
            ):
                resolve(Problem(), "cpu")


@pytest.mark.parametrize(
    ("field", "value", "error", "came"),
    [
        ("name", 3, ArgumentTypeError, "int, expected a str"),
        ("name", "", ArgumentError, "'', expected a name of the provider's own"),
        ("name", "auto", ArgumentError, "'auto', expected a name of the provider's own"),
        ("archs", "sm_90", ArgumentTypeError, "str, expected a tuple of names without suffix"),
        ("archs", ["sm_90"], ArgumentTypeError, "list, expected a tuple of names without suffix"),
        ("archs", (90,), ArgumentTypeError, r"int in \(90,\), expected names without suffix"),
        ("archs", ("sm_90a",), ArgumentError, r"'sm_90a' in \('sm_90a',\), expected names without suffix"),
        ("archs", ("sm_100", "sm_120f"), ArgumentError, "'sm_120f' in .*, expected names without suffix"),
        ("archs", ("any", "sm_90"), ArgumentError, r"'any' in .*, expected names .* or \(\"any\",\)"),
        ("archs", (), ArgumentError, r"\(\), expected names without suffix"),
        ("supports", None, ArgumentTypeError, "NoneType, expected a function"),
        ("load", None, ArgumentTypeError, "NoneType, expected a function"),
        ("priority", "x", ArgumentTypeError, "str, expected an int"),
        ("priority", True, ArgumentTypeError, "bool, expected an int"),
        ("priority", 1.0, ArgumentTypeError, "float, expected an int"),
    ],
)
def test_bad_field_of_a_provider_is_named(
    field: str, value: object, error: type[ArgumentError], came: str
) -> None:
    with pytest.raises(error, match=f"^{field}: {came}") as raised:
        replace(provider("mine"), **{field: value})
    assert raised.value.argument == field


def test_every_known_arch_may_be_listed() -> None:
    names = ("sm_80", "sm_86", "sm_89", "sm_90", "sm_100", "sm_103", "sm_110", "sm_120", "sm_121", "cpu")
    assert [as_arch(name).base for name in names] == list(names)
    assert provider("mine", names).archs == names


def test_kernel_without_tactics_is_an_error() -> None:
    with (
        registered(GROUP, provider("mine", load=lambda: FakeKernel(tactics=()))),
        pytest.raises(NoKernelError, match="'mine' has no tactic for B3"),
    ):
        resolve(Problem(), "cpu")


@pytest.mark.usefixtures("three")
def test_candidates_are_every_tactic_of_every_able_provider() -> None:
    found = [(selection.provider.name, selection.tactic) for selection in candidates(Problem(), "sm_90a")]
    assert found == [("hopper", "heuristic"), ("hopper", "other"), ("torch", "heuristic"), ("torch", "other")]


@pytest.mark.usefixtures("three")
def test_candidate_that_does_not_load_is_left_out_with_a_warning() -> None:
    with (
        registered(GROUP, provider("mine", load=must_not_load)),
        pytest.warns(RuntimeWarning, match="left out of the candidates: provider 'mine' failed to load"),
    ):
        found = [selection.provider.name for selection in candidates(Problem(), "cpu")]
    assert found == ["torch", "torch"]


def test_registered_provider_is_gone_after_the_block() -> None:
    mine = provider("mine")
    with registered(GROUP, mine) as same:
        assert same is mine
        with pytest.raises(ArgumentError, match=r"^provider: name 'mine' is taken in .* by registered\(\)$"):
            registered(GROUP, provider("mine")).__enter__()
        assert [entry.name for entry in providers(GROUP)] == ["mine"]
    assert providers(GROUP) == ()


def test_registered_takes_providers_only() -> None:
    with pytest.raises(ArgumentTypeError, match=r"^provider: str, expected a Provider$"):
        registered(GROUP, "mine").__enter__()  # type: ignore[arg-type]


@pytest.mark.parametrize("ask", [explain, resolve, candidates])
@pytest.mark.parametrize(
    ("problem", "came"),
    [("x", "str"), (3, "int"), (None, "NoneType"), (Problem, "the class Problem")],
    ids=["str", "int", "None", "class"],
)
def test_what_is_no_problem_is_named(ask: Callable[..., object], problem: object, came: str) -> None:
    with pytest.raises(ArgumentTypeError, match=rf"^problem: {came}, expected a problem") as raised:
        ask(problem, "cpu")
    assert raised.value.argument == "problem"


@pytest.mark.parametrize("arch", ["cpu", "sm_90a", "sm_100a", "sm_121a"])
@pytest.mark.usefixtures("three")
def test_explanation_reads_as_a_table(arch: str) -> None:
    def declined_at_length(problem: Problem, arch: Arch) -> str | None:
        return "this problem needs a\nvery long explanation " * 6

    with registered(GROUP, provider("slow", supports=declined_at_length)):
        explanation = explain(Problem(), arch)
    lines = str(explanation).splitlines()
    assert lines[0].startswith(f"{GROUP} on {arch}")
    assert lines[1] == "  problem  B3"
    assert lines[2] == f"  chosen   {explanation.chosen}: {explanation.reason}"
    header = next(line for line in lines if line.startswith("  provider"))
    column = header.index("reason")
    assert all(len(line) <= 110 for line in lines)
    assert [line[column - 1] for line in lines[lines.index(header) :]] == [" "] * (
        len(lines) - lines.index(header)
    )
    for row in explanation.rows:
        assert any(line.split()[:2] == [row.name, row.status] for line in lines), row
