"""Compiling the runtime: choice of the compiler, one of several processes, progress."""

from __future__ import annotations

import importlib.util
import os
import shutil
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import pytest
from ptx_emulator import BuildError, build
from ptx_emulator.__main__ import main

# A runtime of a few small files, so that a build takes a second.
INCLUDE = '#include "shared.h"\n'
SMALL = {
    "shared.h": "int twice(int x);\n",
    "a.cpp": INCLUDE + "int twice(int x) { return 2 * x; }\n",
    **{f"b{n}.cpp": INCLUDE + f"int b{n}() {{ return twice({n}); }}\n" for n in range(3)},
}
BUILD_SMALL = """
import sys
from pathlib import Path
from ptx_emulator import build
build._RUNTIME = Path(sys.argv[1])
print(build.build())
"""


@pytest.fixture
def small(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The folder of a small runtime; the cache is empty."""
    folder = tmp_path / "runtime"
    folder.mkdir()
    for name, text in SMALL.items():
        (folder / name).write_text(text, encoding="utf-8")
    monkeypatch.setattr(build, "_RUNTIME", folder)
    monkeypatch.setenv("PTX_EMULATOR_CACHE_DIR", str(tmp_path / "cache"))
    return folder


@pytest.fixture
def fresh_compiler() -> Iterator[None]:
    """The compiler is looked for again, also by the next test."""
    caches = (build.compiler, build.compiler_version, build._identity)
    for cached in caches:
        cached.cache_clear()
    yield
    for cached in caches:
        cached.cache_clear()


def test_only_what_changed_is_compiled_again(small: Path, tmp_path: Path) -> None:
    first = build.build(progress=False)
    objects = set((tmp_path / "cache").glob("*.o"))
    assert len(objects) == 4
    assert build.build(progress=False) == first
    (small / "a.cpp").write_text(INCLUDE + "int twice(int x) { return x + x; }\n", encoding="utf-8")
    assert build.build(progress=False) != first
    assert len(set((tmp_path / "cache").glob("*.o")) - objects) == 1
    assert not list((tmp_path / "cache").glob("*.partial"))


def test_files_that_are_compiled_as_one_exist_and_are_optimised_alike() -> None:
    names = {path.stem for path in build._RUNTIME.glob("*.cpp")}
    assert names >= build._LESS_OPTIMISED
    together = [name for group in build._TOGETHER for name in group]
    assert names >= set(together)
    assert len(set(together)) == len(together)
    for group in build._TOGETHER:
        assert len({name in build._LESS_OPTIMISED for name in group}) == 1, group
    assert sorted(source for unit in build._units() for source in unit) == sorted(
        build._RUNTIME.glob("*.cpp")
    )


def test_progress_is_told_once(small: Path, capfd: pytest.CaptureFixture[str]) -> None:
    build.build()
    told = capfd.readouterr().err
    assert "ptx-emulator: compiling its runtime, once" in told
    assert "5/5" in told  # four files and the library
    build.build()
    assert capfd.readouterr().err == ""


def test_of_several_processes_one_compiles(small: Path, tmp_path: Path) -> None:
    log = tmp_path / "log"
    wrapper = tmp_path / "c++"
    wrapper.write_text(f'#!/bin/sh\necho "$@" >> {log}\nexec {build.compiler()[0]} "$@"\n', encoding="utf-8")
    wrapper.chmod(0o755)
    env = {**os.environ, "CXX": str(wrapper)}
    command = [sys.executable, "-c", BUILD_SMALL, str(small)]
    pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "text": True}
    processes = [subprocess.Popen(command, env=env, **pipes) for _ in range(4)]
    outputs = [process.communicate()[0] for process in processes]
    assert [process.returncode for process in processes] == [0] * 4
    assert len(set(outputs)) == 1
    assert Path(outputs[0].strip()).exists()
    compiled = [line for line in log.read_text(encoding="utf-8").splitlines() if " -c " in line]
    assert len(compiled) == 4  # files, each by one process


def test_a_killed_build_does_not_hold_up_the_next(small: Path, tmp_path: Path) -> None:
    wrapper = tmp_path / "c++"
    slow = 'case "$*" in *" -c "*) sleep 60;; esac'
    wrapper.write_text(f'#!/bin/sh\n{slow}\nexec {build.compiler()[0]} "$@"\n', encoding="utf-8")
    wrapper.chmod(0o755)
    env = {**os.environ, "CXX": str(wrapper)}
    process = subprocess.Popen(
        [sys.executable, "-c", BUILD_SMALL, str(small)], env=env, start_new_session=True
    )
    lock = tmp_path / "cache" / "build.lock"
    while not lock.exists():
        assert process.poll() is None
        time.sleep(0.05)
    os.killpg(process.pid, 9)
    process.wait()
    assert build.build(progress=False).exists()


def test_what_the_compiler_says_is_told(small: Path) -> None:
    (small / "a.cpp").write_text("int twice(int x) { return y; }\n", encoding="utf-8")
    with pytest.raises(BuildError, match=r"(?s)a\.cpp.*'?y'?"):
        build.build(progress=False)


@pytest.mark.usefixtures("fresh_compiler")
def test_order_of_the_compilers(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    for name in ("g++", "clang++"):
        (tmp_path / name).write_text("#!/bin/sh\necho a compiler 1.0\n", encoding="utf-8")
        (tmp_path / name).chmod(0o755)
    monkeypatch.setenv("PATH", str(tmp_path))
    monkeypatch.setenv("CXX", "mine -m64")

    def chosen() -> tuple[str, ...]:
        build.compiler.cache_clear()
        return build.compiler()

    assert chosen() == ("mine", "-m64")
    monkeypatch.delenv("CXX")
    assert chosen() == (str(tmp_path / "g++"),)
    (tmp_path / "g++").unlink()
    assert chosen() == (str(tmp_path / "clang++"),)
    assert build.compiler_version() == f"{tmp_path / 'clang++'}: a compiler 1.0"
    (tmp_path / "clang++").unlink()
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: object() if name == "ziglang" else None)
    assert chosen() == (sys.executable, "-m", "ziglang", "c++")
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    with pytest.raises(BuildError, match=r"no C\+\+ compiler: install"):
        chosen()


@pytest.mark.usefixtures("fresh_compiler")
def test_a_compiler_that_is_not_there_is_named(monkeypatch: pytest.MonkeyPatch, small: Path) -> None:
    monkeypatch.setenv("CXX", "no-such-compiler")
    with pytest.raises(BuildError, match=r"no-such-compiler cannot be run.*\$CXX"):
        build.build(progress=False)


def test_the_command_line_names_the_compiler(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["ops"]) == 0
    assert capsys.readouterr().out.endswith(f"\nThe runtime is compiled by {build.compiler_version()}.\n")


# The whole runtime, compiled by another compiler than the one that is chosen here, and a kernel.
SUM = """
import numpy as np
from ptx_emulator import build
from harness import run_kernel
out = np.zeros(32, np.float32)
x = np.linspace(-2, 2, 32, dtype=np.float32)
run_kernel('''add.u64 %rd3, %rd1, %rd0; ld.global.f32 %f1, [%rd3];
cvt.rn.bf16x2.f32 %r2, %f1, %f1; ex2.approx.f32 %f2, %f1; add.u64 %rd4, %rd2, %rd0; st.global.f32 [%rd4], %f2;
''', x, out)
np.testing.assert_allclose(out, np.exp2(x), rtol=1e-6)
print(build.compiler_version())
"""


@pytest.mark.parametrize("name", ["clang++", "ziglang"])
def test_other_compilers(name: str, tmp_path: Path) -> None:
    if name == "ziglang":
        if importlib.util.find_spec("ziglang") is None:
            pytest.skip("ziglang is not installed (pip install ptx-emulator[zig])")
        command = f"{sys.executable} -m ziglang c++"
    else:
        if shutil.which(name) is None:
            pytest.skip(f"{name} is not installed")
        command = name
    search = os.pathsep.join([str(Path(__file__).parent), os.environ.get("PYTHONPATH", "")])
    cache = {"PTX_EMULATOR_CACHE_DIR": str(tmp_path / "cache"), "ZIG_GLOBAL_CACHE_DIR": str(tmp_path / "zig")}
    env = {**os.environ, **cache, "CXX": command, "PYTHONPATH": search}
    done = subprocess.run([sys.executable, "-c", SUM], env=env, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert done.stdout.startswith(command)
