/*
 * cuda_attn_sm90.cu - attention kernels of the table: Hopper. Without machine code for sm_90a,
 * which no PTX for others can become, the rows are empty.
 */
#include "config.h"

#include "cuda_attn_wgmma.cuh"

#ifdef HAVE_SM_90A
#define ROW(d, dtype, pv, feature) ATTN_ROW_1(wgmma, d, dtype, pv, feature)
#else
#define ROW(d, dtype, pv, feature) ATTN_ROW_0(wgmma, d, dtype, pv, feature)
#endif

extern "C" const cuda_kernel cuda_attn_sm90[] = {SAGE_KERNELS_SM90(ROW)};
