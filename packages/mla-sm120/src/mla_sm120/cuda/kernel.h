// The kernels of the instantiation files: one decode kernel per dtype and tile, one combine kernel.
#pragma once

#include "config.h"

// Decode: grid (row tiles of a request, num_splits, batch), kThreads threads, Config::kSmemBytes of shared memory.
#define MLA_DECLARE_DECODE(name) \
  extern "C" __global__ void name(const __grid_constant__ mla::DecodeParams params)

// Combine: grid (batch * q_len * num_heads, 4), (32, min(num_splits, 8)) threads.
extern "C" __global__ void mla_combine(const __grid_constant__ mla::DecodeParams params);
