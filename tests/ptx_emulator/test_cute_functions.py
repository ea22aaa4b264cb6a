"""Compiled CuTe DSL functions with their host code, called with CPU tensors."""

from __future__ import annotations

from functools import cache
from pathlib import Path

import cutlass
import cutlass.cute as cute
import pytest
import torch
from kernels.elementwise import BLOCK_THREADS, axpy, compile_axpy
from kernels.gemm_softmax import GemmSoftmaxConfig, compile_gemm_softmax
from ptx_emulator import (
    CuteFiles,
    Emulated,
    EmulationError,
    EmulatorError,
    Options,
    emulate,
    explore,
    ptx_of,
)

LOG_2 = 0.6931471805599453
# P is rounded to bf16, at most 2^-9 of it; the scores are sums of K bf16 products in fp32.
P_RELATIVE, P_ABSOLUTE = 2**-8, 1e-6


@cache
def emulated_axpy(arch: str) -> Emulated:
    return emulate(compile_axpy(arch), arch, uninitialised=("mOut",), read_only=("mX", "mY"))


@cache
def emulated_gemm_softmax(config: GemmSoftmaxConfig) -> Emulated:
    return emulate(compile_gemm_softmax(config), "sm_100a", uninitialised=("mP",), read_only=("mX", "mW"))


def softmax_problem(M: int, N: int, K: int) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """X [M, K], W [N, K], and P [M, N] of NaN."""
    generator = torch.Generator().manual_seed(M + N + K)
    X = (torch.randn(M, K, generator=generator) * 2 / K**0.5).bfloat16()
    W = torch.randn(N, K, generator=generator).bfloat16()
    return X, W, torch.full((M, N), float("nan"), dtype=torch.bfloat16)


def check_softmax(X: torch.Tensor, W: torch.Tensor, P: torch.Tensor, scale_log2: float) -> None:
    expected = torch.softmax(X.double() @ W.double().T * scale_log2 * LOG_2, -1)
    assert ((P.double() - expected).abs() <= P_RELATIVE * expected + P_ABSOLUTE).all()


@pytest.mark.parametrize("arch", ["sm_80", "sm_90a", "sm_100a", "sm_120a"])
@pytest.mark.parametrize("length", [1, BLOCK_THREADS - 1, 1000])
def test_elementwise(arch: str, length: int) -> None:
    function = emulated_axpy(arch)
    x, y, out = torch.randn(length), torch.randn(length), torch.full((length,), float("nan"))
    function(x, y, out, 2.0)
    assert torch.equal(out, x * 2.0 + y)
    (launch,) = function.launches
    assert launch.grid == (-(-length // BLOCK_THREADS), 1, 1)
    assert launch.block == (BLOCK_THREADS, 1, 1)


def test_a_function_from_files(tmp_path: Path) -> None:
    compiled, object_file = compile_axpy("sm_90a"), tmp_path / "axpy.o"
    compiled.export_to_c(str(object_file), function_name="kept")
    files = CuteFiles(object_file, "kept", ptx_of(compiled), parameters=("x", "y", "out", "scale"))
    function = emulate(files, "sm_90a", uninitialised=("out",), read_only=("x", "y"))
    x, y, out = torch.randn(300), torch.randn(300), torch.full((300,), float("nan"))
    function(x, y, scale=0.5, out=out)
    assert torch.equal(out, x * 0.5 + y)
    assert function.result is not None
    assert not function.result.reports
    with pytest.raises(TypeError, match="scale"):
        function(x, y, out)
    with pytest.raises(EmulationError, match=r"read of x \+ \d+ bytes finds nothing"):
        emulate(files, "sm_90a", uninitialised=("x",))(x, x.clone(), out, 1.0)


def test_arguments_by_name_and_checks_of_the_host_code() -> None:
    function = emulated_axpy("sm_90a")
    x, out = torch.ones(5), torch.zeros(5)
    function(x, x, scale=3.0, mOut=out)
    assert torch.equal(out, torch.full((5,), 4.0))
    with pytest.raises(ValueError, match="mY"):
        function(x, torch.ones(4), out, 3.0)
    with pytest.raises(TypeError):
        function(x, x, out)


def test_a_read_of_an_output_is_found_and_named() -> None:
    x, out = torch.ones(5), torch.zeros(5)
    with pytest.raises(EmulationError) as caught:
        emulate(compile_axpy("sm_90a"), "sm_90a", uninitialised=("mX",))(x, x.clone(), out, 1.0)
    report = caught.value.reports[0]
    assert report.kind == "uninitialised"
    assert "mX" in report.message


def test_findings_name_the_line_of_the_python_source() -> None:
    function = emulate(compile_axpy("sm_90a"), "sm_90a", read_only=("mOut",))
    with pytest.raises(EmulationError) as caught:
        function(torch.ones(5), torch.ones(5), torch.ones(5), 1.0)
    location = caught.value.reports[0].location
    assert location is not None
    assert location.file.endswith("elementwise.py")
    source = Path(location.file).read_text(encoding="utf-8").splitlines()
    assert "mOut[index]" in source[location.line - 1]


def test_functions_that_cannot_be_emulated_are_refused() -> None:
    vector = cute.runtime.make_fake_compact_tensor(cutlass.Float32, (cute.sym_int32(),), assumed_align=16)
    stream = cute.runtime.make_fake_stream(use_tvm_ffi_env_stream=True)
    arguments = (vector, vector, vector, cutlass.Float32(1.0), stream)
    plain = cute.compile(axpy, *arguments, options="--gpu-arch sm_90a --enable-tvm-ffi")
    with pytest.raises(EmulatorError, match="PTX was not kept"):
        ptx_of(plain)
    with pytest.raises(EmulatorError, match="device"):
        emulate(compile_axpy("sm_90a"), "sm_42")


@pytest.mark.parametrize(
    ("config", "M", "K"),
    [
        pytest.param(GemmSoftmaxConfig(), 600, 192, id="M600-N128-K192"),
        pytest.param(GemmSoftmaxConfig(N=64, acc_stages=1), 256, 64, id="M256-N64-K64-1acc"),
        pytest.param(GemmSoftmaxConfig(N=256, load_stages=2), 1, 72, id="M1-N256-K72"),
        pytest.param(GemmSoftmaxConfig(num_clusters=1), 1030, 256, id="M1030-N128-K256-1cluster"),
    ],
)
def test_gemm_softmax(config: GemmSoftmaxConfig, M: int, K: int) -> None:
    assert config.can_implement(K) is None
    X, W, P = softmax_problem(M, config.N, K)
    emulated_gemm_softmax(config)(X, W, P, 0.7)
    check_softmax(X, W, P, 0.7)


def test_gemm_softmax_under_many_schedules() -> None:
    X, W, P = softmax_problem(600, 128, 256)
    call = emulated_gemm_softmax(GemmSoftmaxConfig()).call(X, W, P, 0.7)
    exploration = explore(call, 12, progress=False)
    exploration.raise_if_wrong()
    assert len(exploration.runs) == 12
    check_softmax(X, W, P, 0.7)


def test_counts_of_gemm_softmax() -> None:
    M, N, K = 512, 128, 256
    X, W, P = softmax_problem(M, N, K)
    result = emulated_gemm_softmax(GemmSoftmaxConfig()).call(X, W, P, 1.0).run(Options(checks=False))
    (counts,) = result.counts
    assert counts["mma_flops"] == 2 * M * N * K
    assert counts["exponentials"] == M * N
    tiles = M // 256
    assert counts["tma_load_bytes"] == 2 * (M * K + tiles * N * K)
    assert counts["tma_store_bytes"] == 2 * M * N
