/*
 * cuda_attn_fp8.cu - attention kernels of the table: P V in e4m3, both dtypes.
 */
#include "cuda_attn_mma.cuh"

#define HERE_f16_fp16 0
#define HERE_bf16_fp16 0
#define HERE_f16_fp8 1
#define HERE_bf16_fp8 1
#define ROW(d, dtype, pv, feature) ATTN_ROW(HERE_##dtype##_##pv, mma, d, dtype, pv, feature)

extern "C" const cuda_kernel cuda_attn_fp8[] = {SAGE_KERNELS(ROW)};
