// What the kernels are launched with; `launch.py` packs the same bytes. No CUDA header is needed, so that NVRTC
// compiles these files wherever they are.
#pragma once

namespace mla {

using int32 = int;
using int64 = long long;
using uint32 = unsigned int;
using uint64 = unsigned long long;

static_assert(sizeof(int64) == 8 && sizeof(void*) == 8, "64-bit targets only");

// A CUtensorMap, encoded by the driver on the host.
struct alignas(64) TensorMap {
  unsigned char bytes[128];
};

enum OutType : int32 { kOutBf16 = 0, kOutFp16 = 1, kOutE4m3 = 2 };

// Rows of a request are (token, head), token major: row = token * num_heads + head, of q_len * num_heads.
// Strides are in elements; the last dimension of every tensor has stride 1.
struct DecodeParams {
  TensorMap kv_map;             // [num_pages, 9 chunks, page_size keys, 64 elements], see config.h
  const void* query;            // [batch, q_len, num_heads, 576], or ragged [total_q, num_heads, 576]
  void* out;                    // as query, with 512 in place of 576
  float* lse;                   // as query, without the last dimension; may be null
  float* o_partial;             // [num_partials, batch * q_len * num_heads, 512]; null with one partial result
  float* lse_partial;           // [num_partials, batch * q_len * num_heads], log2; null with one partial result
  const int32* block_tables;    // [batch, max_pages]
  const int32* seq_lens;        // [batch]
  const int32* cum_seq_lens_q;  // [batch + 1]; null where the query is not ragged
  const float* softmax_scale_device;  // [1], or null: the value below
  const float* output_scale_device;   // [1], or null: the value below
  int64 query_stride[3];        // of batch (unused where ragged), token, head
  int64 out_stride[3];
  int64 lse_stride[2];          // of batch (unused where ragged), token
  int64 table_stride;           // of batch
  float softmax_scale;
  float output_scale;
  int32 batch;
  int32 q_len;                  // tokens of every request, or the most of any where ragged
  int32 num_heads;
  int32 page_size_log2;
  int32 num_splits;
  int32 out_type;               // OutType
  int32 query_aligned;          // whether every query row starts at a multiple of 16 bytes
  int32 out_aligned;            // whether every output row starts at a multiple of two elements
  int32 num_partials;           // of a request: num_splits over the blocks of a cluster, which has one
  int32 key_tiles;              // of the longest sequence there may be, each of kTileKeys keys
};

static_assert(sizeof(DecodeParams) == 384, "launch.py packs 384 bytes");

}  // namespace mla
