"""Functions compiled for configurations: files, keys, the cache, loading with and without the DSL."""

from __future__ import annotations

import platform
import shutil
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import pytest
import tvm_ffi
from cute_kernels import CuteFunction
from cute_kernels.compile import _toolchain
from cute_kernels.load import newest_supported
from kernel_dispatch import CompilationForbiddenError, forbid_compilation, record_lookups
from kernel_testing import cubin_resources
from two_kernels import FUNCTION, TRACED, Config, trace

ARCHS = ("sm_90a", "sm_100a", "sm_120a")
HAS_COMPILER = shutil.which("cc") is not None


@pytest.fixture(scope="module")
def cache_directory(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("kernels")


@pytest.fixture(autouse=True)
def _cache(monkeypatch: pytest.MonkeyPatch, cache_directory: Path) -> None:
    monkeypatch.setenv("KERNEL_DISPATCH_CACHE_DIR", str(cache_directory))


@pytest.mark.parametrize("arch", ARCHS)
def test_every_file_holds_both_kernels(arch: str) -> None:
    compiled = FUNCTION.compiled(Config(), arch)
    ptx = compiled.ptx.read_text()
    assert f".target {arch}" in ptx
    assert ptx.count(".visible .entry") == 2
    for name in ("scale_rows", "add_rows"):
        assert name in ptx
        assert name.encode() in compiled.cubin.read_bytes()
    assert cubin_resources(compiled.cubin.read_bytes()).stack_bytes == 0
    assert compiled.object_file.exists()
    assert compiled.library.exists() == HAS_COMPILER


def test_a_configuration_is_compiled_once() -> None:
    FUNCTION.compiled(Config(), "sm_100a")
    with forbid_compilation(), record_lookups() as lookups:
        assert FUNCTION.load(Config(), "sm_100a") is FUNCTION.load(Config(), "sm_100a")
        with pytest.raises(CompilationForbiddenError):
            FUNCTION.compiled(Config(columns=64), "sm_100a")
    assert not any(lookup.built for lookup in lookups)


def test_the_key_holds_what_changes_code(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    def digest(function: CuteFunction = FUNCTION, arch: str = "sm_100a", **config: int) -> str:
        return function.key(Config(**config), arch).digest

    changed = tmp_path / TRACED.name
    changed.write_text(TRACED.read_text() + "# changed\n")
    digests = {
        digest(),
        digest(cluster=1),
        digest(arch="sm_103a"),
        digest(replace(FUNCTION, name="other")),
        digest(replace(FUNCTION, options=("--opt-level 2",))),
        digest(replace(FUNCTION, sources=(changed,))),
    }
    for variable in ("CUTE_DSL_LINEINFO", "CUTE_DSL_COMPILER_OPT", "CUTE_DSL_ANOTHER"):
        monkeypatch.setenv(variable, "1")
        digests.add(digest())
    assert len(digests) == 9
    for variable in ("CUTE_DSL_KEEP_PTX", "CUTE_DSL_LOG_LEVEL", "CUTE_DSL_ARCH", "CUTE_DSL_NO_CACHE"):
        monkeypatch.setenv(variable, "1")
    assert digest() in digests


@pytest.fixture
def toolchain_read_anew() -> Iterator[None]:
    _toolchain.cache_clear()
    yield
    _toolchain.cache_clear()


@pytest.mark.usefixtures("toolchain_read_anew")
def test_the_key_holds_the_compiler_of_the_dsl_and_the_machine(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    digests = {FUNCTION.key(Config(), "sm_100a").digest}
    for cuda in (98, 99):
        name = f"nvidia-cutlass-dsl-libs-cu{cuda}"
        metadata = tmp_path / f"{name.replace('-', '_')}-0.1.dist-info" / "METADATA"
        metadata.parent.mkdir()
        metadata.write_text(f"Metadata-Version: 2.1\nName: {name}\nVersion: 0.1\n")
    monkeypatch.syspath_prepend(tmp_path)
    for cuda, machine in ((98, "x86_64"), (99, "x86_64"), (99, "aarch64")):
        monkeypatch.setattr("cute_kernels.compile.cuda_of_dsl", lambda cuda=cuda: cuda)
        monkeypatch.setattr(platform, "machine", lambda machine=machine: machine)
        _toolchain.cache_clear()
        digests.add(FUNCTION.key(Config(), "sm_100a").digest)
    assert len(digests) == 4


@pytest.mark.parametrize(
    ("installed", "of_driver", "chosen"),
    [([12, 13], 13, 13), ([12, 13], 12, 12), ([12], 13, 12), ([12, 13], None, 13)],
)
def test_the_dsl_compiles_with_the_newest_cuda_of_the_driver(
    installed: list[int], of_driver: int | None, chosen: int
) -> None:
    assert newest_supported(installed, of_driver) == chosen


@pytest.mark.parametrize("installed", [[13], []])
def test_a_dsl_that_the_driver_does_not_take_is_named(installed: list[int]) -> None:
    with pytest.raises(RuntimeError, match=r"for CUDA (13|none), the driver supports up to 12"):
        newest_supported(installed, 12)


def test_that_cuda_is_the_one_that_the_dsl_loads() -> None:
    program = (
        "import sys, cutlass\n"
        "from cute_kernels.load import cuda_of_dsl\n"
        "loaded = sys.modules['cutlass._mlir._mlir_libs._cutlass_ir'].__file__\n"
        "assert f'_cutlass_ir.cu{cuda_of_dsl()}.' in loaded, loaded\n"
    )
    subprocess.run([sys.executable, "-c", program], check=True)


@pytest.mark.skipif(not HAS_COMPILER, reason="needs a C compiler")
def test_a_library_is_loaded_without_the_dsl(tmp_path: Path) -> None:
    FUNCTION.compiled(Config(), "sm_100a")
    program = (
        f"import sys; sys.path.insert(0, {str(TRACED.parent)!r})\n"
        "from two_kernels import FUNCTION, Config\n"
        "import kernel_dispatch\n"
        "with kernel_dispatch.forbid_compilation():\n"
        "    assert 'built-in method sum_of_scaled_rows' in repr(FUNCTION.load(Config(), 'sm_100a'))\n"
        "assert 'tvm_ffi' in sys.modules\n"
        "assert 'cutlass' not in sys.modules\n"
    )
    subprocess.run([sys.executable, "-c", program], check=True, cwd=tmp_path)


def test_without_a_c_compiler_the_object_file_is_loaded(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setenv("KERNEL_DISPATCH_CACHE_DIR", str(tmp_path))
    monkeypatch.setenv("PATH", "")
    monkeypatch.setenv("CC", "no-such-compiler")
    assert isinstance(FUNCTION.load(Config(), "sm_90a"), tvm_ffi.Function)
    compiled = FUNCTION.compiled(Config(), "sm_90a")
    assert not compiled.library.exists()
    assert compiled.object_file.exists()


def test_a_failing_trace_leaves_nothing_behind(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("KERNEL_DISPATCH_CACHE_DIR", str(tmp_path))

    def fails(config: Config, options: str) -> None:
        raise ValueError(f"no {config.columns} columns")

    with pytest.raises(ValueError, match="no 32 columns"):
        replace(FUNCTION, trace=fails).compiled(Config(), "sm_100a")
    assert not list(tmp_path.glob("entries/*"))
    assert replace(FUNCTION, trace=trace).compiled(Config(), "sm_100a").ptx.exists()
