"""What the compiler makes of the sources for every architecture: registers, stack, instructions."""

from __future__ import annotations

import re
import subprocess
from pathlib import Path

import pytest
from kernel_testing.cubin import sections
from mla_sm120 import load, sources
from mla_sm120.load import compiler_of

NVCC = sources.find_nvcc()
pytestmark = pytest.mark.skipif(NVCC is None, reason="needs nvcc")

REPORT = re.compile(
    r"entry function '(\w+)'.*?(\d+) bytes stack frame, (\d+) bytes spill stores, (\d+) bytes spill loads"
    r".*?Used (\d+) registers",
    re.DOTALL,
)
LAUNCH_REGISTERS = 168  # kLaunchRegisters of config.h: what setmaxnreg shares out among the warps of a block
KERNELS_PER_UNIT = 6  # of a dtype: three tiles, merged or not
HMMA, QMMA = 0x23C, 0x27A  # opcodes, the low twelve bits of an instruction
HMMA_16816 = 1 << 75  # of an HMMA: it reduces sixteen elements, not eight
HMMA_BF16 = 1 << 82  # they are bf16, not fp16
S2R, TID_X = 0x919, 0x21  # the opcode that reads a special register, and the one of the thread's index


@pytest.fixture(scope="module")
def built(tmp_path_factory: pytest.TempPathFactory) -> dict[tuple[str, str], tuple[Path, str]]:
    """(unit, arch) -> (cubin, compiler's report)."""
    assert NVCC is not None
    folder = tmp_path_factory.mktemp("cubins")
    found = {}
    for arch in sources.nvcc_archs(NVCC):
        for unit in sources.UNITS:
            path = folder / sources.cubin_name(unit, arch)
            found[unit, arch] = (path, sources.compile_unit(NVCC, unit, arch, path, "-Xptxas", "-v"))
    return found


def test_no_spills_and_no_stack(built: dict[tuple[str, str], tuple[Path, str]]) -> None:
    seen = 0
    for (unit, arch), (_, report) in built.items():
        for name, stack, stores, loads, registers in REPORT.findall(report):
            seen += 1
            what = f"{unit} {name} for {arch}"
            assert (stack, stores, loads) == ("0", "0", "0"), (
                f"{what}: {stack} bytes of stack, spills {stores} and {loads}"
            )
            assert int(registers) <= 255, what
            if name.endswith("_m64"):
                # With fewer, warps that multiply would wait for ever for registers that the block lacks.
                assert int(registers) == LAUNCH_REGISTERS, what
    assert seen == 20 * len({arch for _, arch in built})


def test_cubins_name_their_compiler(built: dict[tuple[str, str], tuple[Path, str]]) -> None:
    assert NVCC is not None
    release = re.search(r"release [\d.]+, V([\d.]+)", subprocess.check_output([NVCC, "--version"], text=True))
    assert release is not None
    assert {compiler_of(path.read_bytes()) for path, _ in built.values()} == {f"ptxas {release[1]}"}


def code_words(cubin: bytes) -> list[list[int]]:
    """The instructions of each kernel of a cubin, in order."""
    return [
        [int.from_bytes(code[at : at + 16], "little") for at in range(0, len(code), 16)]
        for name, code in sections(cubin)
        if name.startswith(".text.")
    ]


def tensor_instructions(cubin: bytes) -> list[set[str]]:
    """The names of the matrix instructions of each kernel of a cubin."""
    return [{name for name in map(tensor_instruction, words) if name} for words in code_words(cubin)]


def tensor_instruction(word: int) -> str | None:
    """The name of an instruction if it is a matrix product: as nvdisasm has it, of QMMA the first word."""
    if word & 0xFFF == QMMA:
        return "QMMA"
    if word & 0xFFF != HMMA:
        return None
    return f"HMMA.{16816 if word & HMMA_16816 else 1688}.F32{'.BF16' if word & HMMA_BF16 else ''}"


@pytest.mark.parametrize(
    ("unit", "instruction"),
    [
        ("decode_bf16", "HMMA.16816.F32.BF16"),
        ("decode_fp16", "HMMA.16816.F32"),
        ("decode_e4m3", "QMMA"),
    ],
)
@pytest.mark.parametrize("arch", ["sm_120a", "sm_121a"])
def test_products_are_matrix_instructions(
    built: dict[tuple[str, str], tuple[Path, str]], unit: str, instruction: str, arch: str
) -> None:
    if (unit, arch) not in built:
        pytest.skip(f"this nvcc does not compile for {arch}")
    found = tensor_instructions(built[unit, arch][0].read_bytes())
    assert found == [{instruction}] * KERNELS_PER_UNIT


def test_the_index_of_the_thread_is_not_read_again_among_products(
    built: dict[tuple[str, str], tuple[Path, str]],
) -> None:
    """In the main loop every such read costs 2.5 %: "What the compiler reads again" in docs/speed.md.

    Products are looked for in the order of the code, where the main loop lies among them.
    """
    seen = 0
    for (unit, arch), (path, _) in built.items():
        for words in code_words(path.read_bytes()):
            products = [at for at, word in enumerate(words) if tensor_instruction(word)]
            reads = [at for at, word in enumerate(words) if (word & 0xFFF, word >> 72 & 0xFF) == (S2R, TID_X)]
            assert reads, f"{unit} for {arch}"
            if products:
                seen += 1
                assert not [at for at in reads if products[0] < at < products[-1]], f"{unit} for {arch}"
    assert seen == 3 * KERNELS_PER_UNIT * len({arch for _, arch in built})


def test_fp8_builds_with_the_portable_transpose(tmp_path: Path) -> None:
    assert NVCC is not None
    arch = sources.nvcc_archs(NVCC)[-1]
    path = tmp_path / "portable.cubin"
    report = sources.compile_unit(
        NVCC, "decode_e4m3", arch, path, "-Xptxas", "-v", "-DMLA_PORTABLE_TRANSPOSE"
    )
    assert_nothing_on_a_stack(report)


def assert_nothing_on_a_stack(report: str) -> None:
    """Of every kernel in the compiler's report of a unit."""
    found = REPORT.findall(report)
    assert len(found) == KERNELS_PER_UNIT
    assert all((stack, stores, loads) == ("0", "0", "0") for _, stack, stores, loads, _ in found)


def test_a_wheel_that_was_built_beside_nvcc_has_every_cubin() -> None:
    assert NVCC is not None
    if Path(__file__).parents[2] / "packages" in load.PACKAGED.resolve().parents:
        pytest.skip("the sources are used in place, not a wheel")
    for arch in sources.nvcc_archs(NVCC):
        assert all(load.packaged_cubin(unit, arch) is not None for unit in sources.UNITS), arch


def test_every_cubin_has_its_place(tmp_path: Path) -> None:
    assert NVCC is not None
    names = {path.name for path in sources.build_cubins(NVCC, tmp_path)}
    expected = {sources.cubin_name(unit, arch) for unit in sources.UNITS for arch in sources.nvcc_archs(NVCC)}
    assert names == expected | {sources.HASH_NAME}


def test_packaged_cubins_are_taken_if_they_are_of_these_sources(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    assert NVCC is not None
    arch = sources.nvcc_archs(NVCC)[0]
    (tmp_path / sources.cubin_name("combine", arch)).write_bytes(b"a cubin")
    digest = tmp_path / sources.HASH_NAME
    digest.write_text(sources.sources_digest())
    monkeypatch.setattr(load, "PACKAGED", tmp_path)
    packaged = tmp_path / sources.cubin_name("combine", arch)
    assert load.packaged_cubin("combine", arch) == packaged
    compiled = []

    def compile_with(unit: str, arch: str, options: tuple[str, ...], into: Path) -> None:
        compiled.append(options)
        (into / "compiled").write_text(unit)

    nvrtc_bytes = [100]
    monkeypatch.setattr(load, "_nvrtc_version", lambda: (13, 0))
    monkeypatch.setattr(load, "_nvrtc_bytes", lambda: nvrtc_bytes[0])
    monkeypatch.setattr(load, "_compile", compile_with)
    monkeypatch.setenv("KERNEL_DISPATCH_CACHE_DIR", str(tmp_path / "cache"))
    monkeypatch.setenv(load.OPTIONS_VARIABLE, "-DMLA_PORTABLE_TRANSPOSE")
    assert load.packaged_cubin("combine", arch) is None
    with_options = load.compiled_cubin("combine", arch)
    assert tmp_path / "cache" in with_options.parents
    monkeypatch.delenv(load.OPTIONS_VARIABLE)
    assert load.packaged_cubin("combine", arch) == packaged
    digest.write_text("0" * 64)
    assert load.packaged_cubin("combine", arch) is None
    without = load.compiled_cubin("combine", arch)
    assert tmp_path / "cache" in without.parents
    assert with_options != without
    assert compiled == [(*sources.NVRTC_OPTIONS, "-DMLA_PORTABLE_TRANSPOSE"), sources.NVRTC_OPTIONS]
    nvrtc_bytes[0] = 101  # another release of the same version
    assert load.compiled_cubin("combine", arch) not in (with_options, without)
    assert len(compiled) == 3
