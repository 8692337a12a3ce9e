/*
 * kernels.c - the table of kernels as data.
 */
#include "kernels.h"

#define KERNEL_ROW(d, dtype, pv, feature)                                                          \
    {"mma " #dtype " " #pv " d" #d " " #feature,                                                   \
     SAGE_KERNEL_##pv ? 89 : 80,                                                                   \
     d,                                                                                            \
     #dtype,                                                                                       \
     "int8_" #pv,                                                                                  \
     SAGE_KERNEL_##feature ? "causal,window,varlen,lse,mask" : "causal,window,varlen,lse",         \
     KERNEL_TILE_Q(d),                                                                             \
     KERNEL_TILE_K,                                                                                \
     32 * KERNEL_WARPS,                                                                            \
     KERNEL_SMEM(d, SAGE_KERNEL_##pv)},

const struct sage_kernel sage_kernels[] = {SAGE_KERNELS(KERNEL_ROW)};
const int sage_n_kernels = sizeof(sage_kernels) / sizeof(sage_kernels[0]);

int sage_kernel_find(int head_dim, int bf16, int fp8, int mask)
{
#define KERNEL_KEY(d, dtype, pv, feature)                                                          \
    {d, SAGE_KERNEL_##dtype, SAGE_KERNEL_##pv, SAGE_KERNEL_##feature},
    static const struct {
        int d, bf16, fp8, mask;
    } keys[] = {SAGE_KERNELS(KERNEL_KEY)};

    for (int i = 0; i < sage_n_kernels; i++)
        if (head_dim <= keys[i].d && bf16 == keys[i].bf16 && fp8 == keys[i].fp8 &&
            mask == keys[i].mask)
            return i;
    return -1;
}
