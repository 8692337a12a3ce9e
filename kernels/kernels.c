/*
 * kernels.c - the table of kernels as data.
 */
#include "kernels.h"

#include <limits.h>

#define KERNEL_ROW(family, min_sm, max_sm, d, dtype, pv, feature, can, tile_q, tile_k, threads,    \
                   smem)                                                                           \
    {#family " " #dtype " " #pv " d" #d " " #feature,                                              \
     min_sm,                                                                                       \
     max_sm,                                                                                       \
     d,                                                                                            \
     #dtype,                                                                                       \
     "int8_" #pv,                                                                                  \
     can,                                                                                          \
     tile_q,                                                                                       \
     tile_k,                                                                                       \
     threads,                                                                                      \
     smem},
#define MMA_ROW(d, dtype, pv, feature)                                                             \
    KERNEL_ROW(                                                                                    \
        mma, SAGE_KERNEL_##pv ? 89 : 80, INT_MAX, d, dtype, pv, feature,                           \
        SAGE_KERNEL_##feature ? "causal,window,varlen,lse,mask" : "causal,window,varlen,lse",      \
        KERNEL_TILE_Q(d), KERNEL_TILE_K, 32 * KERNEL_WARPS, KERNEL_SMEM(d, SAGE_KERNEL_##pv))
#define WGMMA_ROW(d, dtype, pv, feature)                                                           \
    KERNEL_ROW(wgmma, 90, 90, d, dtype, pv, feature, "causal,window,varlen,lse",                   \
               WGMMA_TILE_Q(d, SAGE_KERNEL_##pv), WGMMA_TILE_K(d),                                 \
               WGMMA_THREADS(WGMMA_GROUPS(d, SAGE_KERNEL_##pv)), WGMMA_SMEM(d, SAGE_KERNEL_##pv))

#define FEW_ROW(d, dtype, rows)                                                                    \
    {"few " #dtype " rows" #rows " d" #d,                                                          \
     80,                                                                                           \
     INT_MAX,                                                                                      \
     d,                                                                                            \
     #dtype,                                                                                       \
     "any",                                                                                        \
     "causal,window,varlen,lse,mask",                                                              \
     rows,                                                                                         \
     FEW_TILE_K(d, rows),                                                                          \
     32 * FEW_WARPS,                                                                               \
     FEW_SMEM(d, rows)},

#define EXACT_ROW(d, dtype, rows, splits)                                                          \
    {"exact " #dtype " rows" #rows " " #splits " d" #d,                                            \
     90,                                                                                           \
     90,                                                                                           \
     d,                                                                                            \
     #dtype,                                                                                       \
     "any",                                                                                        \
     "causal,window,varlen,lse",                                                                   \
     rows,                                                                                         \
     WGMMA_TILE_K(d),                                                                              \
     WGMMA_THREADS(EXACT_GROUPS(d, rows)),                                                         \
     EXACT_SMEM(d, rows)},

const struct sage_kernel sage_kernels[] = {SAGE_KERNELS_SM90(WGMMA_ROW) SAGE_KERNELS(
    MMA_ROW) SAGE_KERNELS_FEW(FEW_ROW) SAGE_KERNELS_EXACT(EXACT_ROW)};
const int sage_n_kernels = sizeof(sage_kernels) / sizeof(sage_kernels[0]);

/*
 * Hopper's tensor cores sum e4m3 products in few bits, so that each step's sums want registers of
 * their own: beyond D = 128 there are none, and 16 bits are three times as fast as other kernels.
 */
static int wants_fp8(const struct sage_kernel *kernel, int head_dim, int fp8)
{
    return fp8 && !(kernel->max_sm == 90 && head_dim > 128);
}

int sage_kernel_find(int sm, int head_dim, int bf16, int fp8, int mask)
{
#define KERNEL_KEY(d, dtype, pv, feature)                                                          \
    {SAGE_KERNEL_##dtype, SAGE_KERNEL_##pv, SAGE_KERNEL_##feature},
    static const struct {
        int bf16, fp8, mask;
    } keys[] = {SAGE_KERNELS_SM90(KERNEL_KEY) SAGE_KERNELS(KERNEL_KEY)};

    for (int i = 0; i < sage_kernel_first_few(); i++)
        if ((sm ? sm >= sage_kernels[i].min_sm && sm <= sage_kernels[i].max_sm
                : sage_kernels[i].max_sm == INT_MAX) &&
            head_dim <= sage_kernels[i].max_head_dim && bf16 == keys[i].bf16 &&
            wants_fp8(&sage_kernels[i], head_dim, fp8) == keys[i].fp8 && mask == keys[i].mask)
            return i;
    return -1;
}

int sage_kernel_first_few(void)
{
#define KERNEL_COUNT(d, dtype, pv, feature) +1
    return 0 SAGE_KERNELS_SM90(KERNEL_COUNT) SAGE_KERNELS(KERNEL_COUNT);
}

int sage_kernel_find_few(int head_dim, int bf16, int64_t rows)
{
#define FEW_KEY(d, dtype, rows) SAGE_KERNEL_##dtype,
    static const int of_bf16[] = {SAGE_KERNELS_FEW(FEW_KEY)};
    const int first = sage_kernel_first_few();

    for (int i = first; i < sage_kernel_first_exact(); i++)
        if (head_dim <= sage_kernels[i].max_head_dim && rows <= sage_kernels[i].tile_q &&
            bf16 == of_bf16[i - first])
            return i;
    return -1;
}

int sage_kernel_first_exact(void)
{
#define FEW_COUNT(d, dtype, rows) +1
    return sage_kernel_first_few() SAGE_KERNELS_FEW(FEW_COUNT);
}

double sage_exact_share = 1, sage_few_share = 1;
unsigned sage_most_blocks = UINT_MAX;

#define EXACT_KEY(d, dtype, rows, splits) {SAGE_KERNEL_##dtype, SAGE_KERNEL_##splits},
static const struct {
    int bf16, splits;
} exact_keys[] = {SAGE_KERNELS_EXACT(EXACT_KEY)};

int sage_kernel_find_exact(int head_dim, int bf16, int few)
{
    const int first = sage_kernel_first_exact();

    for (int i = first; i < sage_n_kernels; i++)
        if (head_dim <= sage_kernels[i].max_head_dim && bf16 == exact_keys[i - first].bf16 &&
            few == exact_keys[i - first].splits)
            return i;
    return -1;
}

int sage_kernel_splits(int index)
{
    const int first = sage_kernel_first_exact();

    return index < first ? sage_kernels[index].max_sm == 90 : exact_keys[index - first].splits;
}
