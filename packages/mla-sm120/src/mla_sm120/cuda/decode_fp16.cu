#include "kernel.cuh"

MLA_DEFINE_DECODE(mla_decode_m16, Fp16, 16)
MLA_DEFINE_DECODE(mla_decode_m32, Fp16, 32)
MLA_DEFINE_DECODE(mla_decode_m64, Fp16, 64)
