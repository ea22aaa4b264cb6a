#include "kernel.cuh"

MLA_DEFINE_DECODE(mla_decode_m16, E4m3, 16)
MLA_DEFINE_DECODE(mla_decode_m32, E4m3, 32)
MLA_DEFINE_DECODE(mla_decode_m64, E4m3, 64)
