// Instructions that CUDA C++ has no name for. Shared-memory addresses are 32-bit.
#pragma once

#include "config.h"

namespace mla {

__device__ __forceinline__ uint32 smem_address(const void* pointer) {
  return static_cast<uint32>(__cvta_generic_to_shared(pointer));
}

// ---- barriers in shared memory

__device__ __forceinline__ void mbar_init(uint32 mbar, uint32 arrivals) {
  asm volatile("mbarrier.init.shared::cta.b64 [%0], %1;" ::"r"(mbar), "r"(arrivals) : "memory");
}

__device__ __forceinline__ void mbar_arrive(uint32 mbar) {
  asm volatile("mbarrier.arrive.shared::cta.b64 _, [%0];" ::"r"(mbar) : "memory");
}

// A warp's arrival, for what all its lanes did before: kWarpArrivals of an mbarrier's count.
__device__ __forceinline__ void mbar_arrive_warp(uint32 mbar, int lane) {
  __syncwarp();
  if (lane < kWarpArrivals) mbar_arrive(mbar);
}

__device__ __forceinline__ void mbar_arrive_expect_tx(uint32 mbar, uint32 tx_bytes) {
  asm volatile("mbarrier.arrive.expect_tx.shared::cta.b64 _, [%0], %1;" ::"r"(mbar), "r"(tx_bytes) : "memory");
}

// Returns when the phase of parity `phase` has completed.
__device__ __forceinline__ void mbar_wait(uint32 mbar, uint32 phase) {
  asm volatile(
      "{\n"
      ".reg .pred done;\n"
      "waiting:\n"
      "mbarrier.try_wait.parity.shared::cta.b64 done, [%0], %1;\n"
      "@!done bra waiting;\n"
      "}\n" ::"r"(mbar),
      "r"(phase)
      : "memory");
}

// After this, barriers that were initialised are known to TMA.
__device__ __forceinline__ void fence_mbar_init() {
  asm volatile("fence.mbarrier_init.release.cluster;" ::: "memory");
}

// Of a part of the block's warps, whose threads are counted; id 0 is __syncthreads.
__device__ __forceinline__ void named_barrier(int id, int threads) {
  asm volatile("barrier.cta.sync.aligned %0, %1;" ::"r"(id), "r"(threads) : "memory");
}

// ---- clusters: blocks that differ in y only, whose rank is that of their y

__device__ __forceinline__ int cluster_size() {
  int size;
  asm("mov.u32 %0, %%cluster_nctarank;" : "=r"(size));
  return size;
}

__device__ __forceinline__ int cluster_rank() {
  int rank;
  asm("mov.u32 %0, %%cluster_ctarank;" : "=r"(rank));
  return rank;
}

// Of the cluster in the grid.
__device__ __forceinline__ int cluster_y() {
  int y;
  asm("mov.u32 %0, %%clusterid.y;" : "=r"(y));
  return y;
}

// Where the same place of shared memory is in the block of a rank.
__device__ __forceinline__ uint32 cluster_address(uint32 address, int rank) {
  uint32 remote;
  asm volatile("mapa.shared::cluster.u32 %0, %1, %2;" : "=r"(remote) : "r"(address), "r"(rank));
  return remote;
}

__device__ __forceinline__ void st_cluster(uint32 address, float4 value) {
  asm volatile("st.shared::cluster.v4.f32 [%0], {%1, %2, %3, %4};" ::"r"(address), "f"(value.x), "f"(value.y),
               "f"(value.z), "f"(value.w)
               : "memory");
}

__device__ __forceinline__ float ld_cluster_float(uint32 address) {
  float value;
  asm volatile("ld.shared::cluster.f32 %0, [%1];" : "=f"(value) : "r"(address) : "memory");
  return value;
}

// All warps of the cluster that have not ended.
__device__ __forceinline__ void cluster_barrier() {
  asm volatile(
      "barrier.cluster.arrive.release.aligned;\n"
      "barrier.cluster.wait.acquire.aligned;" ::
          : "memory");
}

// ---- registers

// Registers of a thread from here on, for all warps of a group of four.
template <int kRegisters>
__device__ __forceinline__ void give_registers_back() {
  asm volatile("setmaxnreg.dec.sync.aligned.u32 %0;" ::"n"(kRegisters));
}
template <int kRegisters>
__device__ __forceinline__ void take_registers() {
  asm volatile("setmaxnreg.inc.sync.aligned.u32 %0;" ::"n"(kRegisters));
}

// ---- TMA

__device__ __forceinline__ void tma_prefetch_map(const TensorMap* map) {
  asm volatile("prefetch.tensormap [%0];" ::"l"(map) : "memory");
}

// Copies the 16 keys from `key` on of page `page`, all chunks; what lies outside of the cache arrives as zeros.
__device__ __forceinline__ void tma_load_box(uint32 target, const TensorMap* map, uint32 mbar, int key, int page) {
  asm volatile(
      "cp.async.bulk.tensor.4d.shared::cta.global.tile.mbarrier::complete_tx::bytes"
      " [%0], [%1, {%3, %4, %5, %6}], [%2];" ::"r"(target),
      "l"(map), "r"(mbar), "r"(0), "r"(key), "r"(0), "r"(page)
      : "memory");
}

// Brings a line to the L2 cache, where all blocks and all grids see the same.
__device__ __forceinline__ void prefetch_l2(const void* address) {
  asm volatile("prefetch.global.L2 [%0];" ::"l"(address));
}

// ---- dependent launches

__device__ __forceinline__ void wait_for_previous_grid() { asm volatile("griddepcontrol.wait;" ::: "memory"); }
__device__ __forceinline__ void launch_dependents() { asm volatile("griddepcontrol.launch_dependents;" ::: "memory"); }

// ---- shared memory

__device__ __forceinline__ void st_shared(uint32 address, uint32 value) {
  asm volatile("st.shared.b32 [%0], %1;" ::"r"(address), "r"(value) : "memory");
}

__device__ __forceinline__ void st_shared(uint32 address, uint4 value) {
  asm volatile("st.shared.v4.b32 [%0], {%1, %2, %3, %4};" ::"r"(address), "r"(value.x), "r"(value.y), "r"(value.z),
               "r"(value.w)
               : "memory");
}

__device__ __forceinline__ void st_shared(uint32 address, float value) { st_shared(address, __float_as_uint(value)); }

__device__ __forceinline__ void st_shared(uint32 address, float4 value) {
  asm volatile("st.shared.v4.f32 [%0], {%1, %2, %3, %4};" ::"r"(address), "f"(value.x), "f"(value.y), "f"(value.z),
               "f"(value.w)
               : "memory");
}

__device__ __forceinline__ void st_shared(uint32 address, float2 value) {
  asm volatile("st.shared.v2.f32 [%0], {%1, %2};" ::"r"(address), "f"(value.x), "f"(value.y) : "memory");
}

__device__ __forceinline__ void st_shared_byte(uint32 address, uint32 value) {
  asm volatile("st.shared.b8 [%0], %1;" ::"r"(address), "r"(value) : "memory");
}

__device__ __forceinline__ uint32 ld_shared(uint32 address) {
  uint32 value;
  asm volatile("ld.shared.b32 %0, [%1];" : "=r"(value) : "r"(address) : "memory");
  return value;
}

__device__ __forceinline__ float ld_shared_float(uint32 address) { return __uint_as_float(ld_shared(address)); }

__device__ __forceinline__ uint4 ld_shared_fragment(uint32 address) {
  uint4 v;
  asm volatile("ld.shared.v4.b32 {%0, %1, %2, %3}, [%4];"
               : "=r"(v.x), "=r"(v.y), "=r"(v.z), "=r"(v.w)
               : "r"(address)
               : "memory");
  return v;
}

__device__ __forceinline__ float4 ld_shared_four(uint32 address) {
  float4 v;
  asm volatile("ld.shared.v4.f32 {%0, %1, %2, %3}, [%4];"
               : "=f"(v.x), "=f"(v.y), "=f"(v.z), "=f"(v.w)
               : "r"(address)
               : "memory");
  return v;
}

__device__ __forceinline__ void ldmatrix4(uint32 (&r)[4], uint32 address) {
  asm volatile("ldmatrix.sync.aligned.m8n8.x4.shared.b16 {%0, %1, %2, %3}, [%4];"
               : "=r"(r[0]), "=r"(r[1]), "=r"(r[2]), "=r"(r[3])
               : "r"(address)
               : "memory");
}

__device__ __forceinline__ void ldmatrix4_trans(uint32 (&r)[4], uint32 address) {
  asm volatile("ldmatrix.sync.aligned.m8n8.x4.trans.shared.b16 {%0, %1, %2, %3}, [%4];"
               : "=r"(r[0]), "=r"(r[1]), "=r"(r[2]), "=r"(r[3])
               : "r"(address)
               : "memory");
}

// Two 16 x 16 matrices of bytes, transposed: r[2 i + j] is of matrix i, columns 8 j to 8 j + 7.
__device__ __forceinline__ void ldmatrix2_trans_bytes(uint32 (&r)[4], uint32 address) {
  asm volatile("ldmatrix.sync.aligned.m16n16.x2.trans.shared.b8 {%0, %1, %2, %3}, [%4];"
               : "=r"(r[0]), "=r"(r[1]), "=r"(r[2]), "=r"(r[3])
               : "r"(address)
               : "memory");
}

// A value that all lanes of a warp have, told to the compiler, which then keeps it in a uniform register.
__device__ __forceinline__ int uniform(int value) { return __shfl_sync(0xffffffffu, value, 0); }

// Keeps the compiler from computing what depends on the value ahead of a loop, where it would hold registers.
__device__ __forceinline__ uint32 recomputed(uint32 value) {
  asm volatile("" : "+r"(value));
  return value;
}

// A value that the compiler cannot compute anew, as it otherwise does with what it has of the thread's index, which it
// reads again and again. All lanes of a warp call it.
__device__ __forceinline__ uint32 kept(uint32 value) { return __shfl_sync(0xffffffffu, value, threadIdx.x % 32); }

// ---- arithmetic

__device__ __forceinline__ float infinity() { return __int_as_float(0x7f800000); }

__device__ __forceinline__ float exp2_approx(float x) {
  float y;
  asm("ex2.approx.ftz.f32 %0, %1;" : "=f"(y) : "f"(x));
  return y;
}

__device__ __forceinline__ float log2_approx(float x) {
  float y;
  asm("lg2.approx.f32 %0, %1;" : "=f"(y) : "f"(x));
  return y;
}

// Two values rounded to nearest even, `low` in the lower bits.
__device__ __forceinline__ uint32 pack(Bf16, float low, float high) {
  uint32 packed;
  asm("cvt.rn.bf16x2.f32 %0, %1, %2;" : "=r"(packed) : "f"(high), "f"(low));
  return packed;
}

__device__ __forceinline__ uint32 pack(Fp16, float low, float high) {
  uint32 packed;
  asm("cvt.rn.f16x2.f32 %0, %1, %2;" : "=r"(packed) : "f"(high), "f"(low));
  return packed;
}

__device__ __forceinline__ unsigned short pack(E4m3, float low, float high) {
  unsigned short packed;
  asm("cvt.rn.satfinite.e4m3x2.f32 %0, %1, %2;" : "=h"(packed) : "f"(high), "f"(low));
  return packed;
}

// c += a b with a [16 rows, 32 bytes], b [8 columns, 32 bytes], c [16, 8] in float32. Volatile, so that they stay
// between the steps of the softmax that they are to hide.
__device__ __forceinline__ void mma(Bf16, float (&c)[4], const uint32 (&a)[4], uint32 b0, uint32 b1) {
  asm volatile("mma.sync.aligned.m16n8k16.row.col.f32.bf16.bf16.f32 {%0, %1, %2, %3}, {%4, %5, %6, %7}, {%8, %9}, "
               "{%0, %1, %2, %3};"
               : "+f"(c[0]), "+f"(c[1]), "+f"(c[2]), "+f"(c[3])
               : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b0), "r"(b1));
}

__device__ __forceinline__ void mma(Fp16, float (&c)[4], const uint32 (&a)[4], uint32 b0, uint32 b1) {
  asm volatile("mma.sync.aligned.m16n8k16.row.col.f32.f16.f16.f32 {%0, %1, %2, %3}, {%4, %5, %6, %7}, {%8, %9}, "
               "{%0, %1, %2, %3};"
               : "+f"(c[0]), "+f"(c[1]), "+f"(c[2]), "+f"(c[3])
               : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b0), "r"(b1));
}

#if defined(__CUDA_ARCH__) && __CUDA_ARCH__ < 1200
// Values of e4m3 are values of fp16, which SM90 multiplies. What the compiler makes of mma.sync of e4m3 there is the
// same conversions and products, with more registers. Both halves of the products pair the same k, if not in the order
// of the operands.
__device__ __forceinline__ void mma(E4m3, float (&c)[4], const uint32 (&a)[4], uint32 b0, uint32 b1) {
  const uint32 b[2] = {b0, b1};
#pragma unroll
  for (int half = 0; half < 2; ++half) {
    asm volatile(
        "{\n"
        ".reg .b16 l0, h0, l1, h1, lb, hb;\n"
        ".reg .b32 a0, a1, a2, a3, b0, b1;\n"
        "mov.b32 {l0, h0}, %4;\n"
        "mov.b32 {l1, h1}, %5;\n"
        "mov.b32 {lb, hb}, %6;\n"
        "cvt.rn.f16x2.e4m3x2 a0, l0;\n"
        "cvt.rn.f16x2.e4m3x2 a1, l1;\n"
        "cvt.rn.f16x2.e4m3x2 a2, h0;\n"
        "cvt.rn.f16x2.e4m3x2 a3, h1;\n"
        "cvt.rn.f16x2.e4m3x2 b0, lb;\n"
        "cvt.rn.f16x2.e4m3x2 b1, hb;\n"
        "mma.sync.aligned.m16n8k16.row.col.f32.f16.f16.f32 {%0, %1, %2, %3}, {a0, a1, a2, a3}, {b0, b1}, "
        "{%0, %1, %2, %3};\n"
        "}\n"
        : "+f"(c[0]), "+f"(c[1]), "+f"(c[2]), "+f"(c[3])
        : "r"(a[2 * half]), "r"(a[2 * half + 1]), "r"(b[half]));
  }
}
#else
__device__ __forceinline__ void mma(E4m3, float (&c)[4], const uint32 (&a)[4], uint32 b0, uint32 b1) {
  asm volatile("mma.sync.aligned.m16n8k32.row.col.f32.e4m3.e4m3.f32 {%0, %1, %2, %3}, {%4, %5, %6, %7}, {%8, %9}, "
               "{%0, %1, %2, %3};"
               : "+f"(c[0]), "+f"(c[1]), "+f"(c[2]), "+f"(c[3])
               : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b0), "r"(b1));
}
#endif

}  // namespace mla
