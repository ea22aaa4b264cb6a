"""What the provider takes and says, how problems are divided, and what is compiled ahead, without a GPU."""

from __future__ import annotations

import json
import re
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import kernel_dispatch
import pytest
import torch
from kernel_dispatch import Arch, NoKernelError, as_arch, forbid_compilation
from mla_core import DecodeProblem, plan, workspace_nbytes
from mla_sm100 import kernels
from mla_sm100.config import DecodeConfig
from mla_sm100.kernels import KERNELS, TACTICS, Division

PROBLEM = DecodeProblem(batch=3, q_len=2, num_heads=16, page_size=64, max_seq_len=8192)
B200 = Arch.from_name("sm_100a")


def problem(**changes: object) -> DecodeProblem:
    """PROBLEM with other sizes, dtypes and flags, and what follows from them."""
    if "q_dtype" in changes:
        changes = {"kv_dtype": None, "out_dtype": None, **changes}
    return replace(PROBLEM, max_pages=None, **changes)


@pytest.mark.parametrize("arch", ["sm_100a", "sm_100f", "sm_103a", "sm_110a"])
def test_it_is_chosen_where_it_can_run(arch: str) -> None:
    assert kernel_dispatch.explain(PROBLEM, arch).chosen == "sm100"


@pytest.mark.parametrize("arch", ["sm_80", "sm_89", "sm_90a", "sm_120a", "sm_121a", "cpu"])
def test_everywhere_else_it_declines_and_something_else_runs(arch: str) -> None:
    report = kernel_dispatch.explain(PROBLEM, arch)
    assert report.chosen not in ("sm100", None)
    assert re.search(rf"sm100 +declined .*is for sm_100, sm_103, sm_110; this is {arch}", str(report))
    with pytest.raises(NoKernelError, match="is for sm_100"):
        kernel_dispatch.resolve(PROBLEM, arch, "sm100")


def test_on_this_machine_it_declines_or_runs() -> None:
    """On a GPU that is none of its own, or on none, planning goes to another provider."""
    arch = as_arch(None)
    if arch.base in ("sm_100", "sm_103", "sm_110"):
        pytest.skip("a GPU of its own: test_sm100_cuda.py")
    assert plan(PROBLEM).provider != "sm100"
    with pytest.raises(NoKernelError, match=f"this is {arch.name}"):
        plan(PROBLEM, backend="sm100")


@pytest.mark.parametrize(
    ("changes", "reason"),
    [
        ({"page_size": 8}, "page_size = 8"),
        ({"page_size": 48}, "page_size = 48"),
        ({"page_size": 256}, "page_size = 256"),
        ({"kv_lora_rank": 256}, r"256 \+ 64"),
        ({"qk_rope_head_dim": 32}, r"512 \+ 32"),
        ({"max_seq_len": 10**9}, "max_seq_len = 1000000000, the kernels count up to"),
    ],
    ids=str,
)
def test_declines_with_a_reason(changes: dict[str, int], reason: str) -> None:
    with pytest.raises(NoKernelError, match=reason):
        kernel_dispatch.resolve(problem(**changes), B200, "sm100")


def test_a_device_with_less_shared_memory_is_declined() -> None:
    arch = replace(B200, smem_optin_bytes=101376)
    with pytest.raises(NoKernelError, match="101376 bytes of shared memory"):
        kernel_dispatch.resolve(PROBLEM, arch, "sm100")


def test_asking_imports_no_kernel_language() -> None:
    program = (
        "import sys, kernel_dispatch, mla_core\n"
        "problem = mla_core.DecodeProblem(batch=3, num_heads=16, page_size=64, max_seq_len=8192)\n"
        "assert kernel_dispatch.explain(problem, 'sm_100a').chosen == 'sm100'\n"
        "assert mla_core.workspace_nbytes(problem, 'sm_100a') > 0\n"
        "loaded = {'cutlass', 'tvm_ffi', 'flashinfer'} & sys.modules.keys()\n"
        "assert not loaded, loaded\n"
    )
    subprocess.run([sys.executable, "-c", program], check=True)


@pytest.mark.parametrize(
    ("num_heads", "q_len", "tile"),
    [
        (1, 1, "single"),
        (16, 4, "single"),
        (64, 1, "single"),
        (65, 1, "pair"),
        (128, 1, "pair"),
        (128, 4, "pair"),
    ],
)
def test_the_tile_follows_the_rows(num_heads: int, q_len: int, tile: str) -> None:
    names = KERNELS.tactics(problem(num_heads=num_heads, q_len=q_len), B200)
    assert names[0] == tile
    assert set(names) < set(TACTICS)
    of_tile = [name.startswith(tile) for name in names]
    assert of_tile == sorted(of_tile, reverse=True)


@pytest.mark.parametrize(
    ("batch", "is_var_seq", "first"),
    [(74, False, "pair"), (75, False, "pair-persistent"), (75, True, "pair"), (1, False, "pair")],
)
def test_clusters_stay_where_equal_work_exceeds_the_device(batch: int, is_var_seq: bool, first: str) -> None:
    asked = problem(batch=batch, num_heads=128, q_len=1, is_var_seq=is_var_seq)
    assert KERNELS.tactics(asked, B200)[0] == first


@pytest.mark.parametrize("asked", [PROBLEM, problem(batch=500, num_heads=128), problem(max_seq_len=1)])
def test_divisions(asked: DecodeProblem) -> None:
    needed = workspace_nbytes(asked, B200, "sm100")
    for tactic in TACTICS:
        division = Division.of(asked, B200, tactic)
        config, splits = division.config, division.splits
        units = asked.batch * splits.num_splits * -(-asked.rows // config.tile_m)
        resident = B200.sm_count // config.cluster_size
        assert splits.workspace_bytes <= needed
        assert config.split == (splits.num_splits > 1)
        assert config.pair == tactic.startswith("pair")
        assert not ("-whole" in tactic and config.split)
        assert division.num_clusters == (min(units, resident) if "-persistent" in tactic else units)
        assert splits.tile_n == config.tile_n
        assert config.smem_bytes <= B200.smem_optin_bytes
        if asked.is_var_seq:
            assert splits.tiles_per_split == -(-splits.key_tiles // splits.num_splits)
    assert needed == max(Division.of(asked, B200, tactic).splits.workspace_bytes for tactic in TACTICS)


@pytest.mark.parametrize(
    ("batch", "expected"), [(20, (3, 7, 13)), (40, (1, 3, 7)), (75, (1, 1, 3)), (149, (1, 1, 1))]
)
def test_splits_that_fill_the_device_more_often(batch: int, expected: tuple[int, ...]) -> None:
    asked = problem(batch=batch, num_heads=128, q_len=1)
    found = [Division.of(asked, B200, f"pair{fills}").splits.num_splits for fills in ("", "-x2", "-x4")]
    assert found == list(expected)
    assert [KERNELS.workspace_nbytes(asked, B200, f"pair{x}") == 0 for x in ("", "-x2", "-x4")] == [
        splits == 1 for splits in expected
    ]


@pytest.mark.parametrize("asked", [PROBLEM, problem(batch=40, num_heads=128), problem(max_seq_len=1)])
def test_tactics_that_divide_alike_are_offered_once(asked: DecodeProblem) -> None:
    offered = [Division.of(asked, B200, name) for name in KERNELS.tactics(asked, B200)]
    assert len(offered) == len(set(offered))
    assert set(offered) == {Division.of(asked, B200, name) for name in TACTICS}


def test_equal_lengths_are_split_as_far_as_their_tiles_go() -> None:
    assert Division.of(problem(is_var_seq=False), B200, "single").splits.tiles_per_split == 1


def test_an_unknown_tactic_is_an_error() -> None:
    with pytest.raises(ValueError, match="'triple', expected one of pair, "):
        Division.of(PROBLEM, B200, "triple")


@pytest.mark.parametrize(("asked", "uses"), [(None, True), (True, True), (False, False)])
def test_pdl_only_where_a_combine_kernel_follows(asked: bool | None, uses: bool) -> None:
    wanted = problem(enable_pdl=asked)
    assert Division.of(wanted, B200, "single").config.pdl is uses
    assert Division.of(wanted, B200, "single-whole").config.pdl is False


def test_the_key_holds_what_changes_code_and_no_sizes() -> None:
    def digest(tactic: str = "pair", arch: str = "sm_100a", **changes: object) -> str:
        return kernels.FUNCTION.key(Division.of(problem(**changes), B200, tactic).config, arch).digest

    same = {digest(), digest(batch=2), digest(num_heads=100), digest(q_len=3), digest(max_seq_len=5000)}
    assert len(same) == 1
    changed = [
        *({"q_dtype": dtype} for dtype in (torch.float16, torch.float8_e4m3fn)),
        *({"out_dtype": dtype} for dtype in (torch.float16, torch.float8_e4m3fn)),
        *({"page_size": size} for size in (16, 32, 128)),
        *({name: True} for name in ("ragged", "return_lse", "softmax_scale_is_tensor")),
        {"output_scale_is_tensor": True},
        {"enable_pdl": False},
        {"tactic": "single"},
        {"tactic": "pair-whole"},
        {"arch": "sm_103a"},
    ]
    assert len({*same, *(digest(**change) for change in changed)}) == 1 + len(changed)


def test_a_declared_list_is_compiled_ahead(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("KERNEL_DISPATCH_CACHE_DIR", str(tmp_path / "cache"))
    declared = tmp_path / "problems.json"
    sizes = {"batch": 3, "num_heads": 16, "page_size": 64, "max_seq_len": 8192, "q_dtype": "torch.bfloat16"}
    entries = [{**sizes, "num_heads": heads} for heads in (16, 8)]
    declared.write_text(
        json.dumps([{"problem": "mla_core:DecodeProblem", "arguments": entry} for entry in entries])
    )
    command = [sys.executable, "-m", "kernel_dispatch", "warmup", str(declared), "--arch", "sm_100a"]
    done = subprocess.run(command, check=True, capture_output=True, text=True)
    assert re.search(r"B3-q1-H16-\S+ +sm100 +single +\S+ +built", done.stdout)
    assert re.search(r"B3-q1-H8-\S+ +sm100 +single +\S+ +(cached|ready)", done.stdout)
    (tmp_path / "cache").chmod(0o555)
    with forbid_compilation():
        (ready,) = kernel_dispatch.load_problems(str(declared))[:1]
        selection = kernel_dispatch.resolve(ready, "sm_100a", "sm100")
        launcher = selection.kernel.prepare(ready, B200, torch.device("cuda"), selection.tactic)
    assert callable(launcher)


def test_configurations_are_hashable_values() -> None:
    config = DecodeConfig.of(PROBLEM, pair=True, split=False, pdl=False)
    assert {config: 1}[replace(config)] == 1
