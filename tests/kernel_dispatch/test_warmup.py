"""Warm-up, its report, declared problems, and the command line."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest
import torch
import tuning_fakes
from kernel_dispatch import (
    ArgumentError,
    ArgumentTypeError,
    CompileCache,
    CompileKey,
    WarmupError,
    as_arch,
    autotune,
    clear_tuning,
    load_problems,
    warmup,
)
from kernel_dispatch.__main__ import main
from tuning_fakes import CPU, SLOW_S, Scaling, ScalingKernel, scale, scaling_providers

DECLARED = "tuning_fakes:DECLARED"


def compiled(cache: CompileCache) -> ScalingKernel:
    """A kernel that compiles one file per problem."""

    def build(problem: Scaling) -> None:
        key = CompileKey("scaling", problem, "cpu", (), {}, "")
        cache.get_or_build(key, lambda directory: (directory / "kernel.o").touch())

    return ScalingKernel({"only": 0.0}, on_prepare=build)


@pytest.fixture
def cache(tmp_path: Path) -> CompileCache:
    return CompileCache(tmp_path / "cache")


@pytest.fixture(autouse=True)
def declared(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(tuning_fakes, "DECLARED", [Scaling(2), Scaling(8)], raising=False)


# Preparing.


def test_the_report_says_what_was_built_and_what_was_cached(cache: CompileCache) -> None:
    with scaling_providers(compiled(cache)):
        first = warmup([Scaling(2)], "cpu", progress=False)
        second = warmup([Scaling(2), Scaling(4)], "cpu", progress=False)
    assert [row.status for row in first.rows] == ["built"]
    assert [(row.problem, row.provider, row.tactic, row.status) for row in second.rows] == [
        ("scaling B2 float32", "p0", "only", "cached"),
        ("scaling B4 float32", "p0", "only", "built"),
    ]
    assert all(row.seconds > 0 for row in second.rows)
    lines = str(second).splitlines()
    assert lines[0] == "warm-up for cpu"
    assert lines[1].split() == ["problem", "provider", "tactic", "seconds", "status"]
    assert lines[3].split() == [
        "scaling",
        "B4",
        "float32",
        "p0",
        "only",
        f"{second.rows[1].seconds:.3f}",
        "built",
    ]


def test_a_kernel_that_looks_nothing_up_is_ready() -> None:
    kernel = ScalingKernel({"only": 0.0})
    with scaling_providers(kernel):
        (row,) = warmup([Scaling(2)], CPU, progress=False).rows
    assert row.status == "ready"
    assert kernel.prepared == ["only"]


def test_the_backend_is_strict_and_the_tuned_tactic_is_the_one_prepared() -> None:
    slow, fast = ScalingKernel({"a": SLOW_S}), ScalingKernel({"b": SLOW_S, "c": 0.0})
    with scaling_providers(slow, fast):
        assert [row.tactic for row in warmup([Scaling(4)], CPU, "p1", progress=False).rows] == ["b"]
        with autotune(progress=False):
            scale(torch.ones(4))
        assert [row.tactic for row in warmup([Scaling(4)], CPU, progress=False).rows] == ["c"]
        clear_tuning()
        with pytest.raises(WarmupError, match="p7"):
            warmup([Scaling(4)], CPU, "p7", progress=False)


def test_a_tactic_is_prepared_by_name_or_all_are() -> None:
    several, other = ScalingKernel({"a": 0.0, "b": 0.0}), ScalingKernel({"c": 0.0})
    with scaling_providers(several, other):
        (row,) = warmup([Scaling(2)], CPU, progress=False, tactic="b").rows
        assert (row.provider, row.tactic, several.prepared) == ("p0", "b", ["b"])
        rows = warmup([Scaling(2), Scaling(4)], CPU, progress=False, tactic="all").rows
        assert [(row.problem, row.tactic) for row in rows] == [
            (f"scaling B{batch} float32", tactic) for batch in (2, 4) for tactic in "ab"
        ]
        assert several.prepared == ["b", *"abab"]
        assert [row.tactic for row in warmup([Scaling(2)], CPU, "p1", progress=False, tactic="all").rows] == [
            "c"
        ]
        with pytest.raises(WarmupError, match="'c', expected one of a, b") as caught:
            warmup([Scaling(2)], CPU, progress=False, tactic="c")
        (row,) = caught.value.report.rows
        assert (row.provider, row.tactic) == ("-", "c")


def test_a_failure_is_raised_after_the_other_problems_were_prepared(cache: CompileCache) -> None:
    kernel = compiled(cache)
    build = kernel.on_prepare

    def build_or_fail(problem: Scaling) -> None:
        if problem.batch == 2:
            raise ValueError("ptxas gave up")
        build(problem)

    kernel.on_prepare = build_or_fail
    with scaling_providers(kernel), pytest.raises(WarmupError) as caught:
        warmup([Scaling(2), Scaling(4)], CPU, progress=False)
    report = caught.value.report
    assert [row.status for row in report.rows] == ["failed", "built"]
    assert [row.error for row in report.failures] == ["ValueError: ptxas gave up"]
    assert "scaling B2 float32: ValueError: ptxas gave up" in str(caught.value)


@pytest.mark.parametrize("tactic", [None, "all"])
def test_a_problem_without_a_kernel_fails_with_the_reasons(tactic: str | None) -> None:
    with (
        scaling_providers(ScalingKernel({"a": 0.0}), supports=lambda problem, arch: "batch is odd"),
        pytest.raises(WarmupError, match="batch is odd") as caught,
    ):
        warmup([Scaling(3)], CPU, progress=False, tactic=tactic)
    (row,) = caught.value.report.rows
    assert (row.provider, row.tactic, row.status) == ("-", "-", "failed")


@pytest.mark.parametrize(
    ("problems", "came"),
    [
        ([Scaling(2), 1], "item 1: int"),
        ("x", "item 0: str"),
        ([Scaling], "item 0: type"),
        (Scaling(2), "Scaling"),
        (3, "int"),
    ],
    ids=["int-item", "str", "class-item", "one-problem", "int"],
)
def test_what_is_no_problem_is_named_before_anything_is_prepared(problems: object, came: str) -> None:
    kernel = ScalingKernel({"a": 0.0})
    with (
        scaling_providers(kernel),
        pytest.raises(ArgumentTypeError, match=f"^problems: {came}, expected") as caught,
    ):
        warmup(problems, CPU, progress=False)  # type: ignore[arg-type]
    assert caught.value.argument == "problems"
    assert kernel.prepared == []


@pytest.mark.parametrize("progress", [True, False])
def test_the_progress_bar_goes_to_stderr(progress: bool, capsys: pytest.CaptureFixture[str]) -> None:
    with scaling_providers(ScalingKernel({"a": 0.0})):
        warmup([Scaling(2), Scaling(4)], CPU, progress=progress)
    captured = capsys.readouterr()
    assert captured.out == ""
    assert ("2/2" in captured.err) == progress


# Declared problems.


def test_problems_come_from_an_attribute_one_or_several(monkeypatch: pytest.MonkeyPatch) -> None:
    assert load_problems(DECLARED) == [Scaling(2), Scaling(8)]
    monkeypatch.setattr(tuning_fakes, "ONE", Scaling(3), raising=False)
    assert load_problems("tuning_fakes:ONE") == [Scaling(3)]


def test_problems_come_from_a_json_file(tmp_path: Path) -> None:
    path = tmp_path / "problems.json"
    declared = [
        {"problem": "tuning_fakes:Scaling", "arguments": {"batch": 5}},
        {"problem": "tuning_fakes:Scaling", "arguments": {"batch": 1, "dtype": "torch.bfloat16"}},
    ]
    path.write_text(json.dumps(declared))
    assert load_problems(str(path)) == [Scaling(5), Scaling(1, torch.bfloat16)]


@pytest.mark.parametrize(
    ("target", "reason"),
    [
        ("tuning_fakes", "expected module:attribute or a path"),
        (":DECLARED", "expected module:attribute or a path"),
        ("no_such_module:X", "cannot be imported: No module named 'no_such_module'"),
        ("tuning_fakes:ABSENT", "has no attribute 'ABSENT'"),
        ("tuning_fakes:SLOW_S", "is a float, expected a problem or several"),
        ("tuning_fakes:Scaling", "is a type, expected a problem or several"),
        ("sys:path", "item 0 of sys:path is a str, expected a problem"),
        ("/no/such/file.json", "cannot be read as JSON"),
    ],
)
def test_a_target_that_names_no_problems_is_an_error(target: str, reason: str) -> None:
    with pytest.raises(ArgumentError, match=reason) as caught:
        load_problems(target)
    assert caught.value.argument == "target"


@pytest.mark.parametrize(
    ("content", "reason"),
    [
        ("{", "cannot be read as JSON"),
        ("{}", "holds a dict, expected a list of problems"),
        ("[]", "holds no problems, expected at least one"),
        ('[{"problem": "tuning_fakes:Scaling"}]', r"item 0 of .* expected \{\"problem\""),
        ('[{"problem": "tuning_fakes:Scaling", "arguments": {}}]', "item 0 of .*'batch'"),
        ('[{"problem": "tuning_fakes:Scaling", "arguments": {"batch": 1, "rows": 2}}]', "item 0 of .*'rows'"),
        (
            '[{"problem": "tuning_fakes:Scaling", "arguments": {"batch": 1, "dtype": "torch.bf17"}}]',
            r"item 0 of .* 'torch\.bf17' is no dtype",
        ),
        ('[{"problem": "tuning_fakes:Absent", "arguments": {}}]', "has no attribute 'Absent'"),
        ('[{"problem": 5, "arguments": {}}]', "item 0 of .*: problem is 5, expected a string module:Class"),
        (
            '[{"problem": "tuning_fakes:Scaling", "arguments": [4]}]',
            r"item 0 .*: arguments is \[4\], expected",
        ),
        ('[{"problem": ".fakes:Scaling", "arguments": {}}]', "'.fakes:Scaling', expected module:attribute"),
        ('[{"problem": "builtins:dict", "arguments": {}}]', "'builtins:dict' is no class of problems"),
        ("[" * 100_000, "cannot be read as JSON"),
    ],
)
def test_a_faulty_json_file_is_an_error_naming_the_item(tmp_path: Path, content: str, reason: str) -> None:
    path = tmp_path / "problems.json"
    path.write_text(content)
    with pytest.raises(ArgumentError, match=reason):
        load_problems(str(path))


def test_a_json_file_calls_nothing_but_a_class_of_problems(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    called: list[str] = []
    monkeypatch.setattr(tuning_fakes, "FUNCTION", lambda: called.append("called"), raising=False)
    path = tmp_path / "problems.json"
    for name in ("tuning_fakes:FUNCTION", "os:getcwd"):
        path.write_text(json.dumps([{"problem": name, "arguments": {}}]))
        with pytest.raises(ArgumentError, match=f"item 0 of .*: '{name}' is no class of problems"):
            load_problems(str(path))
    assert called == []


# The command line.


def test_explain_prints_a_table_per_problem(capsys: pytest.CaptureFixture[str]) -> None:
    with scaling_providers(ScalingKernel({"a": 0.0}), ScalingKernel({"b": 0.0})):
        assert main(["explain", DECLARED, "--arch", "cpu"]) == 0
        text = capsys.readouterr().out
        assert "scaling B2 float32" in text
        assert "scaling B8 float32" in text
        assert text.count("p0: ") == 2
        assert main(["explain", DECLARED, "--arch", "cpu", "--backend", "p1"]) == 0
        assert capsys.readouterr().out.count("p1: asked for") == 2


def test_explain_answers_for_another_arch_and_says_when_there_is_no_kernel(
    capsys: pytest.CaptureFixture[str],
) -> None:
    with scaling_providers(ScalingKernel({"a": 0.0})):
        assert main(["explain", DECLARED, "--arch", "sm_121a"]) == 1
    text = capsys.readouterr().out
    assert str(as_arch("sm_121a")) in text
    assert "is for cpu; this is sm_121a" in text


def test_warmup_prints_the_report(cache: CompileCache, capsys: pytest.CaptureFixture[str]) -> None:
    with scaling_providers(compiled(cache)):
        assert main(["warmup", DECLARED, "--arch", "cpu"]) == 0
        assert capsys.readouterr().out.count("built") == 2
        assert main(["warmup", DECLARED, "--arch", "sm_90a"]) == 1
        assert capsys.readouterr().out.count("failed") == 2
        assert main(["warmup", DECLARED, "--arch", "cpu", "--tactic", "all"]) == 0
        assert capsys.readouterr().out.count("cached") == 2
        assert main(["warmup", DECLARED, "--arch", "cpu", "--tactic", "none"]) == 1
        assert capsys.readouterr().out.count("'none', expected one of only") == 2


def test_the_arch_is_that_of_the_variable_unless_given(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("CUTE_DSL_ARCH", "sm_121a")
    with scaling_providers(ScalingKernel({"a": 0.0})):
        for command in ("explain", "warmup"):
            assert main([command, DECLARED]) == 1
            assert str(as_arch("sm_121a")) in capsys.readouterr().out
            assert main([command, DECLARED, "--arch", "cpu"]) == 0
            assert "sm_121a" not in capsys.readouterr().out
        monkeypatch.setenv("CUTE_DSL_ARCH", "")
        assert main(["warmup", DECLARED]) in (0, 1)  # as where it is not set: a GPU has none of the kernels
        assert f"warm-up for {as_arch(None)}" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["explain", "tuning_fakes"], "target: 'tuning_fakes', expected module:attribute"),
        (["explain", DECLARED, "--arch", "sm_1"], "arch: 'sm_1' is unknown"),
        (["warmup"], "required: target"),
        ([], "required: command"),
    ],
    ids=["target", "arch", "no-target", "no-command"],
)
def test_wrong_usage_exits_with_2(
    arguments: list[str], message: str, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit) as caught:
        main(arguments)
    assert caught.value.code == 2
    assert message in capsys.readouterr().err


def test_the_module_runs(tmp_path: Path) -> None:
    (tmp_path / "declared.py").write_text("from tuning_fakes import Scaling\nPROBLEMS = [Scaling(6)]\n")
    command = [sys.executable, "-m", "kernel_dispatch", "explain", "declared:PROBLEMS", "--arch", "cpu"]
    done = subprocess.run(
        command,
        cwd=tmp_path,
        env={"PYTHONPATH": str(Path(tuning_fakes.__file__).parent), "PATH": ""},
        capture_output=True,
        text=True,
        timeout=120,
    )
    assert done.returncode == 1  # no provider of the made-up operation is installed
    assert "scaling B6 float32" in done.stdout
    assert done.stderr == ""
