"""How long does a plain copy of a GDN layer's states take? The floor of a decode call, launch included.

    python benchmarks/bench_copy_floor.py [--heads 32 64] [--batch 1 4 8 16 32 64 128] [--out FOLDER]

For each batch an element-wise kernel copies as many bytes as a T = 1 decode call reads and writes (64 KiB per
value head and request in fp32), in the same CUDA graph form, each call on memory of its own. Large copies
reach the device's copy bandwidth; small ones show what starting and draining a kernel costs. Writes
results.json.
"""

from __future__ import annotations

import argparse
import functools
import json
import shlex
import sys
import time
from pathlib import Path

import torch
from kernel_testing import calls_for_cold_l2, copy_bandwidth_gb_s, environment, time_cuda_us

STATE_NBYTES = 128 * 128 * 4  # one value head of one request, fp32
MIN_CALLS = 20


class Copies:
    """Calls that copy `nbytes` by an element-wise kernel, each on memory of its own, and their check."""

    def __init__(self, nbytes: int, device: torch.device) -> None:
        count = max(MIN_CALLS, calls_for_cold_l2(2 * nbytes, device))
        self.sources = [torch.randn(nbytes // 4, device=device) for _ in range(count)]
        self.targets = [torch.full_like(source, float("nan")) for source in self.sources]
        self.calls = [
            functools.partial(torch.neg, source, out=target)
            for source, target in zip(self.sources, self.targets, strict=True)
        ]

    def check(self) -> None:
        """Raises RuntimeError unless every call has been made and copied (and negated) all."""
        for source, target in zip(self.sources, self.targets, strict=True):
            if not torch.equal(target, -source):
                raise RuntimeError("the copy is wrong")


def measure(nbytes: int, device: torch.device) -> float:
    """Median microseconds of one copy of `nbytes`, checked to be one."""
    copies = Copies(nbytes, device)
    (time_us,) = time_cuda_us({"copy": copies.calls}).values()
    copies.check()
    return time_us


def main() -> int:
    """Run the benchmark; returns the exit status."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter, allow_abbrev=False
    )
    parser.add_argument("--heads", type=int, nargs="+", default=[32, 64], help="value heads")
    parser.add_argument("--batch", type=int, nargs="+", default=[1, 4, 8, 16, 32, 64, 128])
    parser.add_argument("--out", type=Path, help="folder for results.json")
    options = parser.parse_args()
    if not torch.cuda.is_available():
        print(f"bench_copy_floor: needs a CUDA device; torch {torch.__version__} finds none", file=sys.stderr)
        return 1
    device = torch.device("cuda", torch.cuda.current_device())
    record = environment()
    print(*(f"{name} {value}" for name, value in record.items()), sep=", ")
    copy_gb_s = copy_bandwidth_gb_s(device)
    print(f"copy bandwidth {copy_gb_s:.0f} GB/s, read plus written")
    print(f"{'heads':>6} {'B':>5} {'us':>9} {'GB/s':>7} of copy")
    rows = []
    for heads in options.heads:
        for batch in options.batch:
            nbytes = batch * heads * STATE_NBYTES
            time_us = measure(nbytes, device)
            gb_s = 2 * nbytes / time_us / 1e3
            rows.append({"heads": heads, "B": batch, "us": time_us, "gb_s": gb_s})
            print(f"{heads:6} {batch:5} {time_us:9.2f} {gb_s:7.0f} {gb_s / copy_gb_s:7.3f}", flush=True)
    if options.out is not None:
        options.out.mkdir(parents=True, exist_ok=True)
        facts = {"environment": record, "date": time.strftime("%Y-%m-%d"), "copy_gb_s": copy_gb_s}
        facts["command"] = shlex.join(["python", "benchmarks/bench_copy_floor.py", *sys.argv[1:]])
        text = json.dumps({**facts, "rows": rows}, indent=1) + "\n"
        (options.out / "results.json").write_text(text, encoding="utf-8")
    return 0


if __name__ == "__main__":
    sys.exit(main())
