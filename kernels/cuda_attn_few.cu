/*
 * cuda_attn_few.cu - attention kernels of the table: few query rows.
 */
#include "cuda_attn_few.cuh"

#define ROW(d, dtype, rows)                                                                        \
    {(const void *)sage::few_kernel<d, SAGE_KERNEL_##dtype, rows>,                                 \
     sage::few_launch<d, SAGE_KERNEL_##dtype, rows>},

extern "C" const cuda_kernel cuda_attn_few[] = {SAGE_KERNELS_FEW(ROW)};
