// The kernels of the instantiation files: one decode kernel per dtype and tile, one combine kernel.
#pragma once

#include "config.h"

// Decode: grid (row tiles of a request, num_splits, batch), Config::kThreads threads, Config::kSmemBytes of shared
// memory.
#define MLA_DECLARE_DECODE(name) \
  extern "C" __global__ void name(const __grid_constant__ mla::DecodeParams params)

// Combine: (32, warps of an item, items of a block) threads, 16 warps in all; every row has four items. The first has
// more on its way for a block, the second two blocks on an SM.
extern "C" __global__ void mla_combine(const __grid_constant__ mla::DecodeParams params);
extern "C" __global__ void mla_combine_many(const __grid_constant__ mla::DecodeParams params);
