#include "kernel.cuh"

MLA_DEFINE_DECODE(mla_decode_m16, Bf16, 16)
MLA_DEFINE_DECODE(mla_decode_m32, Bf16, 32)
MLA_DEFINE_DECODE(mla_decode_m64, Bf16, 64)
