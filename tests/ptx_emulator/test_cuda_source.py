"""PTX of CUDA sources, by nvcc and by NVRTC: the same kernel, options, lines, errors."""

from __future__ import annotations

import os
import shutil
from pathlib import Path

import numpy as np
import pytest
from ptx_emulator import BuildError, EmulationError, compile_cuda, launch
from ptx_emulator.host import cuda_source

CUDA = """
__global__ void add(float* out, const float* x, int n) {
  int i = blockIdx.x * blockDim.x + threadIdx.x;
  if (i <= n) out[i] += x[i];
}
"""


@pytest.fixture(params=["nvcc", "nvrtc"])
def compiler(request: pytest.FixtureRequest) -> str:
    """Each compiler that is installed."""
    name: str = request.param
    if name == "nvcc" and not (os.environ.get("NVCC") or shutil.which("nvcc")):
        pytest.skip("nvcc is not installed")
    if name == "nvrtc" and cuda_source._nvrtc() is None:
        pytest.skip("NVRTC is not installed (pip install ptx-emulator[nvrtc])")
    return name


def arrays() -> tuple[np.ndarray, np.ndarray]:
    return np.zeros(100, dtype=np.float32), np.arange(100, dtype=np.float32)


def test_files_beside_the_source_are_found_and_lines_named(compiler: str, tmp_path: Path) -> None:
    path = tmp_path / "add.cu"
    path.write_text('#include "kernel.h"\n', encoding="utf-8")
    (tmp_path / "kernel.h").write_text(CUDA.replace("<=", "<"), encoding="utf-8")
    out, x = arrays()
    launch(compile_cuda(path, compiler=compiler), grid=4, block=32, args=[out, x, 100])
    assert np.array_equal(out, x)
    (tmp_path / "kernel.h").write_text(CUDA, encoding="utf-8")
    with pytest.raises(EmulationError) as caught:
        launch(compile_cuda(path, compiler=compiler), grid=4, block=32, args=[out, x, 100])
    location = caught.value.reports[0].location
    assert location is not None
    assert (Path(location.file).name, location.line) == ("kernel.h", 4)


def test_a_text_is_called_source(compiler: str) -> None:
    with pytest.raises(EmulationError) as caught:
        launch(compile_cuda(CUDA, compiler=compiler), "add", grid=4, block=32, args=[*arrays(), 100])
    assert "<source>:4" in str(caught.value)
    assert ".loc" not in compile_cuda(CUDA, compiler=compiler, lineinfo=False)


@pytest.mark.parametrize("words", [1, 2])
def test_include_paths_and_macros(compiler: str, words: int, tmp_path: Path) -> None:
    (tmp_path / "folder").mkdir()
    (tmp_path / "folder" / "factor.h").write_text("constexpr float kFactor = 3.0f;\n", encoding="utf-8")
    source = CUDA.replace("<=", "<").replace("x[i];", "kFactor * x[i] + SUMMAND;")
    folder = str(tmp_path / "folder")
    options = [f"-I{folder}", "-DSUMMAND=1.0f"] if words == 1 else ["-I", folder, "-D", "SUMMAND=1.0f"]
    out, x = arrays()
    ptx = compile_cuda("#include <factor.h>\n" + source, "sm_120a", options, compiler=compiler)
    assert ".target sm_120a" in ptx
    launch(ptx, grid=4, block=32, args=[out, x, 100])
    assert np.array_equal(out, 3 * x + 1)


def test_the_standard_may_be_chosen(compiler: str) -> None:
    source = 'extern "C" __global__ void k(int* out) { *out = __cplusplus / 100; }'
    for options, standard in (((), 2017), (("-std=c++20",), 2020), (("--std=c++14",), 2014)):
        out = np.zeros(1, np.int32)
        launch(compile_cuda(source, options=options, compiler=compiler), args=[out], block=1)
        assert out[0] == standard


def test_errors_name_the_compiler_and_the_line(compiler: str, tmp_path: Path) -> None:
    with pytest.raises(BuildError, match=rf"(?is){compiler} failed:\n<source>\(4\): error.*y\[i\]"):
        compile_cuda(CUDA.replace("x[i]", "y[i]"), compiler=compiler)
    path = tmp_path / "wrong.cu"
    path.write_text(CUDA.replace("x[i]", "y[i]"), encoding="utf-8")
    with pytest.raises(BuildError, match=r"wrong\.cu\(4\): error"):
        compile_cuda(path, compiler=compiler)
    with pytest.raises(BuildError, match="no-such-option"):
        compile_cuda(CUDA, options=["--no-such-option"], compiler=compiler)


def test_without_a_compiler(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(cuda_source, "_nvrtc", lambda: None)
    monkeypatch.delenv("NVCC", raising=False)
    monkeypatch.setenv("PATH", "")
    with pytest.raises(BuildError, match=r"install nvcc, or `pip install ptx-emulator\[nvrtc\]`"):
        compile_cuda(CUDA)
    with pytest.raises(BuildError, match="nvcc is not installed"):
        compile_cuda(CUDA, compiler="nvcc")


def test_a_compiler_that_is_not_known() -> None:
    with pytest.raises(ValueError, match="clang"):
        compile_cuda(CUDA, compiler="clang")


def test_an_entry_of_the_cache_that_cannot_be_read_is_made_again(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(cuda_source, "cache_folder", lambda: tmp_path)
    made = []

    def compile_now() -> tuple[str, list[str]]:
        made.append(1)
        return "ptx", []

    assert cuda_source._cached(["key"], compile_now) == "ptx"
    (entry,) = tmp_path.iterdir()
    for content in (b"", b"[", b"\xff"):
        entry.write_bytes(content)
        assert cuda_source._cached(["key"], compile_now) == "ptx"
    assert cuda_source._cached(["key"], compile_now) == "ptx"
    assert len(made) == 4


@pytest.mark.skipif(shutil.which("nvcc") is None, reason="needs nvcc")
def test_flags_of_the_environment_are_part_of_the_key(monkeypatch: pytest.MonkeyPatch) -> None:
    source = "__global__ void store(int* out) { *out = VALUE; }"
    found = []
    for value in ("11", "12"):
        monkeypatch.setenv("NVCC_APPEND_FLAGS", f"-DVALUE={value}")
        out = np.zeros(1, dtype=np.int32)
        launch(compile_cuda(source, compiler="nvcc"), args=[out])
        found.append(int(out[0]))
    assert found == [11, 12]
