"""Where shared memory begins: from sm_90 on behind 1 KiB that the system reserves, as ptxas lays it out."""

import numpy as np
import pytest
from harness import run_kernel
from planted_bugs import find, silent

BASE = 0x400
SHARED = (
    ".shared .align 16 .b8 first[32];\n.shared .align 2048 .b8 second[16];\n.shared .align 8 .b64 full;\n"
)
ONE = "setp.ne.u32 %p1, %r1, 0; @%p1 bra DONE;\n{}\nDONE:"


@pytest.mark.parametrize(
    ("target", "first", "second", "dynamic"),
    [
        ("sm_80", 0, 2048, 3072),
        ("sm_89", 0, 2048, 3072),
        ("sm_90", BASE, 2048, 3072),
        ("sm_100a", BASE, 2048, 3072),
        ("sm_120a", BASE, 2048, 3072),
    ],
)
def test_addresses_of_variables(target: str, first: int, second: int, dynamic: int):
    out = np.zeros(3, np.uint32)
    run_kernel(
        ONE.format(
            "mov.u32 %r2, first; mov.u32 %r3, second; mov.u32 %r4, smem;"
            "st.global.u32 [%rd1], %r2; st.global.u32 [%rd1+4], %r3; st.global.u32 [%rd1+8], %r4;"
        ),
        out,
        target=target,
        globals=SHARED,
        shared_bytes=64,
    )
    assert out.tolist() == [first, second, dynamic]


@pytest.mark.parametrize(("target", "base"), [("sm_80", 0), ("sm_90a", BASE)])
def test_special_registers_about_shared_memory(target: str, base: int):
    out = np.zeros(6, np.uint32)
    names = ("total_smem_size", "dynamic_smem_size", "aggr_smem_size")
    names += tuple(f"reserved_smem_offset_{name}" for name in ("begin", "end", "cap"))
    if target == "sm_80":
        names = (*names[:2], names[0], *names[3:])  # %aggr_smem_size needs sm_90
    body = "".join(
        f"mov.u32 %r2, %{name}; st.global.u32 [%rd1+{4 * n}], %r2;" for n, name in enumerate(names)
    )
    run_kernel(ONE.format(body), out, target=target, shared_bytes=96)
    assert out.tolist() == [96, 96, 96 if not base else 96 + base, 0, base, base]


NULL = "mov.u32 %r2, {address}; mov.u64 %rd5, 0; mov.u32 %r3, 1;\n{instruction} // <here>\n"


@pytest.mark.parametrize("checks", [True, False])
@pytest.mark.parametrize("address", [0, 4, BASE - 4])
@pytest.mark.parametrize("instruction", ["ld.shared.u32 %r4, [%r2];", "st.shared.u32 [%r2], %r3;"])
def test_what_is_reserved_cannot_be_accessed(instruction: str, address: int, checks: bool):
    body = NULL.format(address=address, instruction=instruction)
    find(body, kind="out-of-bounds", at="here", shared_bytes=64, checks=checks)
    (message,) = {r.message for r in run_kernel(body, shared_bytes=64, expect_reports=True).reports}
    assert (
        f"starts {BASE - address} bytes before the shared memory of CTA rank 0 (64 bytes from 0x400"
        in message
    )


@pytest.mark.parametrize(
    "instruction",
    [
        "st.shared.v2.u32 [%r2+1016], {%r3, %r3};",
        "atom.shared.add.u32 %r4, [%r2], %r3;",
        "mbarrier.init.shared.b64 [%r2], 1;",
        "cvta.shared.u64 %rd5, %rd5; st.u32 [%rd5], %r3;",
        "cp.async.ca.shared.global [%r2], [%rd1], 4;",
        "ldmatrix.sync.aligned.m8n8.x1.shared.b16 {%r4}, [%r2];",
        "mapa.shared::cluster.u32 %r2, %r2, 0; ld.shared::cluster.u32 %r4, [%r2];",
    ],
)
def test_other_ways_to_a_null_address(instruction: str):
    body = NULL.format(address=0, instruction=instruction)
    find(body, np.zeros(8, np.uint32), kind="out-of-bounds", at="here", shared_bytes=64)


MBARRIER = """
    setp.ne.u32 %p1, %r1, 0; @%p1 bra DONE;
    mov.u32 %r2, smem; mov.u32 %r3, {to};
    mbarrier.init.shared.b64 [%r2], 1; fence.mbarrier_init.release.cluster;
    mbarrier.arrive.expect_tx.shared.b64 _, [%r2], 16;
    cp.async.bulk.shared::cluster.global.mbarrier::complete_tx::bytes [%r3], [%rd1], 16, [%r2]; // <here>
    WAIT: mbarrier.try_wait.parity.shared.b64 %p2, [%r2], 0; @!%p2 bra WAIT;
    DONE:
"""


def test_a_copy_to_a_null_address():
    data = np.zeros(8, np.uint32)
    silent(MBARRIER.format(to="smem+16"), data, shared_bytes=64)
    find(MBARRIER.format(to=0), data, kind="out-of-bounds", at="here", shared_bytes=64)


def test_the_first_bytes_of_its_own_are_accessible():
    silent(
        "mov.u32 %r2, 1024; mov.u32 %r3, 1; st.shared.u32 [%r2], %r3; ld.shared.u32 %r4, [%r2];",
        shared_bytes=64,
    )


def test_a_matrix_at_a_null_address():
    """A descriptor holds an address in units of 16 bytes."""
    find(
        """
        mov.u32 %r2, smem; mov.u32 %r3, 0; mad.lo.u32 %r4, %r1, 16, %r2;
        st.shared.v4.b32 [%r4], {%r3, %r3, %r3, %r3};
        fence.proxy.async.shared::cta; bar.sync 0;
        shr.u32 %r5, %r2, 4; cvt.u64.u32 %rd5, %r5; mov.u64 %rd6, 0; setp.ne.u32 %p1, %r3, 0;
        wgmma.fence.sync.aligned;
        wgmma.mma_async.sync.aligned.m64n8k16.f32.f16.f16 // <here>
            {%f1, %f2, %f3, %f4}, %rd5, %rd6, %p1, 1, 1, 0, 0;
        wgmma.commit_group.sync.aligned; wgmma.wait_group.sync.aligned 0;
        """,
        kind="out-of-bounds",
        at="here",
        block=(128, 1, 1),
        shared_bytes=2048,
    )
