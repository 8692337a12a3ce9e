/*
 * cuda_attn_exact.cu - attention kernels of the table: Hopper, nothing quantised. Without machine
 * code for sm_90a the rows are empty.
 */
#include "config.h"

#include "cuda_attn_wgmma.cuh"

#ifdef HAVE_SM_90A
#define ROW(d, dtype)                                                                              \
    {(const void *)sage::wgmma_kernel<d, SAGE_KERNEL_##dtype, false, true>,                        \
     sage::wgmma_launch<d, SAGE_KERNEL_##dtype, false, true>,                                      \
     (const void *)sage::wgmma_kernel<d, SAGE_KERNEL_##dtype, false, true, true>},
#else
#define ROW(d, dtype) {nullptr, nullptr, nullptr},
#endif

extern "C" const cuda_kernel cuda_attn_exact[] = {SAGE_KERNELS_EXACT(ROW)};
