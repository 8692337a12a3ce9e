/*
 * cuda_attn_exact.cu - attention kernels of the table: Hopper, nothing quantised. Without machine
 * code for sm_90a the rows are empty.
 */
#include "config.h"

#include "cuda_attn_wgmma.cuh"

#ifdef HAVE_SM_90A
#define ROW(d, dtype, rows, splits)                                                                \
    {(const void *)sage::wgmma_kernel<d, SAGE_KERNEL_##dtype, false, true, EXACT_GROUPS(d, rows),  \
                                      SAGE_KERNEL_##splits>,                                       \
     sage::wgmma_launch<d, SAGE_KERNEL_##dtype, false, true, EXACT_GROUPS(d, rows),                \
                        SAGE_KERNEL_##splits>},
#else
#define ROW(d, dtype, rows, splits) {nullptr, nullptr},
#endif

extern "C" const cuda_kernel cuda_attn_exact[] = {SAGE_KERNELS_EXACT(ROW)};
