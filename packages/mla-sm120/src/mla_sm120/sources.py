"""The CUDA sources and how they are compiled; needs the standard library only, for the build hook reads it.

A cubin holds the kernels of one dtype, or the combine kernel, for one architecture. A folder of cubins has
the hash of the sources that they were compiled from beside them.
"""

from __future__ import annotations

import hashlib
import os
import shutil
import subprocess
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

CUDA_FOLDER = Path(__file__).with_name("cuda")
ARCHS = ("sm_90a", "sm_120a", "sm_121a")
UNITS = ("decode_bf16", "decode_fp16", "decode_e4m3", "combine")
OPTIONS = ("-std=c++17",)
NVRTC_OPTIONS = (*OPTIONS, "-default-device")  # it would take lambdas for host functions
HASH_NAME = "sources.sha256"


def cubin_name(unit: str, arch: str) -> str:
    """The file name of one cubin."""
    return f"{unit}.{arch}.cubin"


def sources_digest() -> str:
    """SHA-256 over all CUDA sources and the options, 64 hexadecimal digits."""
    total = hashlib.sha256(" ".join(OPTIONS).encode())
    for path in sorted(CUDA_FOLDER.iterdir()):
        total.update(f"{path.name}\0{hashlib.sha256(path.read_bytes()).hexdigest()}\n".encode())
    return total.hexdigest()


def find_nvcc() -> str | None:
    """nvcc: $NVCC, or the one on the PATH."""
    return os.environ.get("NVCC") or shutil.which("nvcc")


def nvcc_archs(nvcc: str) -> tuple[str, ...]:
    """Those of ARCHS that nvcc says it compiles for. Raises OSError or RuntimeError if it does not run."""
    ran = subprocess.run([nvcc, "--list-gpu-code"], check=False, capture_output=True, text=True)
    if ran.returncode:
        raise RuntimeError(f"--list-gpu-code failed\n{ran.stderr}")
    listed = ran.stdout.split()
    return tuple(arch for arch in ARCHS if arch.rstrip("a") in listed or arch in listed)


def compile_unit(nvcc: str, unit: str, arch: str, output: Path, *options: str) -> str:
    """Compile one unit by nvcc; returns what the compiler said. Raises RuntimeError with it if it fails."""
    command = [nvcc, *OPTIONS, f"-arch={arch}", "-cubin", *options, "-o", str(output)]
    ran = subprocess.run([*command, str(CUDA_FOLDER / f"{unit}.cu")], capture_output=True, text=True)
    if ran.returncode:
        raise RuntimeError(f"{unit} for {arch}: nvcc failed\n{ran.stderr}")
    return ran.stdout + ran.stderr


def build_cubins(nvcc: str, folder: Path) -> list[Path]:
    """Every cubin for the architectures that nvcc knows, and the hash of the sources, in `folder`."""
    jobs = [(unit, arch, folder / cubin_name(unit, arch)) for arch in nvcc_archs(nvcc) for unit in UNITS]
    with ThreadPoolExecutor(max_workers=os.cpu_count()) as pool:
        list(pool.map(lambda job: compile_unit(nvcc, *job), jobs))
    digest = folder / HASH_NAME
    digest.write_text(sources_digest() + "\n", encoding="ascii")
    return [path for _, _, path in jobs] + [digest]
