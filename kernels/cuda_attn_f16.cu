/*
 * cuda_attn_f16.cu - attention kernels of the table: binary16, P V in 16 bits.
 */
#include "cuda_attn_mma.cuh"

#define HERE_f16_fp16 1
#define HERE_bf16_fp16 0
#define HERE_f16_fp8 0
#define HERE_bf16_fp8 0
#define ROW(d, dtype, pv, feature) ATTN_ROW(HERE_##dtype##_##pv, mma, d, dtype, pv, feature)

extern "C" const cuda_kernel cuda_attn_f16[] = {SAGE_KERNELS(ROW)};
