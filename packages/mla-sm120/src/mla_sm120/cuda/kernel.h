// The kernels of the instantiation files: two decode kernels per dtype and tile, two combine kernels.
#pragma once

#include "config.h"

// Decode: grid (row tiles of a request, num_splits, batch), Config::kThreads threads, kMaxSmemBytes of shared memory.
// mla_merge_*: in clusters of (1, num_splits / num_partials, 1), which is 2, 4 or 8 blocks. mla_decode_*: no clusters.
#define MLA_DECLARE_DECODE(name) \
  extern "C" __global__ void name(const __grid_constant__ mla::DecodeParams params)

// Combine: (32, warps of an item, items of a block) threads, 16 warps in all; every row has four items. The first has
// more on its way for a block, the second two blocks on an SM.
extern "C" __global__ void mla_combine(const __grid_constant__ mla::DecodeParams params);
extern "C" __global__ void mla_combine_many(const __grid_constant__ mla::DecodeParams params);
