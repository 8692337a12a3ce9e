/*
 * kernels.h - every attention kernel for GPUs that there is, in one list: the table that people
 * read (`sagectl kernels`), the instantiations and the choice among them all come from it.
 * Internal to the project.
 */
#ifndef SAGE_KERNELS_H
#define SAGE_KERNELS_H

#include <stdint.h>

/*
 * X(d, f16|bf16, fp16|fp8, band|mask): head dimensions up to d; P V in 16 bits or in e4m3. `band`
 * is everything but a mask tensor: causal, windows, sequences, lse. Of those that can do a problem
 * the first is taken, so they ascend in d.
 */
#define SAGE_KERNELS(X)                                                                            \
    X(64, f16, fp16, band)                                                                         \
    X(96, f16, fp16, band)                                                                         \
    X(128, f16, fp16, band)                                                                        \
    X(192, f16, fp16, band)                                                                        \
    X(256, f16, fp16, band)                                                                        \
    X(64, f16, fp16, mask)                                                                         \
    X(128, f16, fp16, mask)                                                                        \
    X(256, f16, fp16, mask)                                                                        \
    X(64, bf16, fp16, band)                                                                        \
    X(96, bf16, fp16, band)                                                                        \
    X(128, bf16, fp16, band)                                                                       \
    X(192, bf16, fp16, band)                                                                       \
    X(256, bf16, fp16, band)                                                                       \
    X(64, bf16, fp16, mask)                                                                        \
    X(128, bf16, fp16, mask)                                                                       \
    X(256, bf16, fp16, mask)                                                                       \
    X(64, f16, fp8, band)                                                                          \
    X(128, f16, fp8, band)                                                                         \
    X(256, f16, fp8, band)                                                                         \
    X(64, f16, fp8, mask)                                                                          \
    X(128, f16, fp8, mask)                                                                         \
    X(256, f16, fp8, mask)                                                                         \
    X(64, bf16, fp8, band)                                                                         \
    X(128, bf16, fp8, band)                                                                        \
    X(256, bf16, fp8, band)                                                                        \
    X(64, bf16, fp8, mask)                                                                         \
    X(128, bf16, fp8, mask)                                                                        \
    X(256, bf16, fp8, mask)

/*
 * The same, for compute capability 9.0 only; they come first. For fp16 V has to be a tensor that a
 * tensor map can describe: rows at multiples of 16 bytes.
 */
#define SAGE_KERNELS_SM90(X)                                                                       \
    X(64, f16, fp16, band)                                                                         \
    X(128, f16, fp16, band)                                                                        \
    X(256, f16, fp16, band)                                                                        \
    X(64, bf16, fp16, band)                                                                        \
    X(128, bf16, fp16, band)                                                                       \
    X(256, bf16, fp16, band)                                                                       \
    X(64, f16, fp8, band)                                                                          \
    X(128, f16, fp8, band)                                                                         \
    X(64, bf16, fp8, band)                                                                         \
    X(128, bf16, fp8, band)

/*
 * X(d, f16|bf16, rows), for any device: where the rows of all query heads of a kv head are so few.
 * Of both variants: nothing is quantised. They come last.
 */
#define SAGE_KERNELS_FEW(X)                                                                        \
    X(64, f16, 16)                                                                                 \
    X(64, f16, 32)                                                                                 \
    X(64, f16, 64)                                                                                 \
    X(128, f16, 16)                                                                                \
    X(128, f16, 32)                                                                                \
    X(128, f16, 64)                                                                                \
    X(256, f16, 16)                                                                                \
    X(256, f16, 32)                                                                                \
    X(256, f16, 64)                                                                                \
    X(64, bf16, 16)                                                                                \
    X(64, bf16, 32)                                                                                \
    X(64, bf16, 64)                                                                                \
    X(128, bf16, 16)                                                                               \
    X(128, bf16, 32)                                                                               \
    X(128, bf16, 64)                                                                               \
    X(256, bf16, 16)                                                                               \
    X(256, bf16, 32)                                                                               \
    X(256, bf16, 64)

/*
 * X(d, f16|bf16, rows, whole|split), Hopper's for both variants: where keys have so few scores that
 * quantising them takes longer than it saves, as in short sequences. Nothing is quantised. Tiles of
 * so many rows; `split`: few of them, whose keys warpgroups share, and may be split. After all
 * others.
 */
#define SAGE_KERNELS_EXACT(X)                                                                      \
    X(64, f16, 64, split)                                                                          \
    X(64, f16, 192, whole)                                                                         \
    X(128, f16, 64, split)                                                                         \
    X(128, f16, 128, whole)                                                                        \
    X(256, f16, 64, split)                                                                         \
    X(256, f16, 128, whole)                                                                        \
    X(64, bf16, 64, split)                                                                         \
    X(64, bf16, 192, whole)                                                                        \
    X(128, bf16, 64, split)                                                                        \
    X(128, bf16, 128, whole)                                                                       \
    X(256, bf16, 64, split)                                                                        \
    X(256, bf16, 128, whole)

/* What the words of the list stand for, as conditions. */
#define SAGE_KERNEL_f16 0
#define SAGE_KERNEL_bf16 1
#define SAGE_KERNEL_fp16 0
#define SAGE_KERNEL_fp8 1
#define SAGE_KERNEL_band 0
#define SAGE_KERNEL_mask 1
#define SAGE_KERNEL_whole 0
#define SAGE_KERNEL_split 1

enum {
    KERNEL_WARPS = 4,
    KERNEL_TILE_K = 64, /* keys of a step */
};

/*
 * A warp has two slabs of 16 query rows, so that what it reads of K and V serves 32 rows; beyond
 * d = 128 the registers are enough for one.
 */
#define KERNEL_SLABS(d) ((d) <= 128 ? 2 : 1)
#define KERNEL_TILE_Q(d) (KERNEL_WARPS * 16 * KERNEL_SLABS(d))

/* Rows in shared memory have 16 bytes more: 8 rows of 16 bytes then lie in 32 different banks. */
#define KERNEL_PITCH(bytes) ((bytes) + 16)
#define KERNEL_Q_BYTES(d) (KERNEL_TILE_Q(d) * KERNEL_PITCH(d))
#define KERNEL_K_BYTES(d) (KERNEL_TILE_K * KERNEL_PITCH(d))
#define KERNEL_V_BYTES(d, fp8)                                                                     \
    ((fp8) ? KERNEL_PITCH(KERNEL_TILE_K) * (d) : KERNEL_TILE_K * KERNEL_PITCH(2 * (d)))
#define KERNEL_SMEM(d, fp8) (KERNEL_Q_BYTES(d) + KERNEL_K_BYTES(d) + KERNEL_V_BYTES(d, fp8))

/*
 * On Hopper: warpgroups that compute, 64 rows each, and one whose warps fetch; their registers, of
 * those that the block starts with; stages of K and V in shared memory.
 */
#define WGMMA_TILE_K(d) ((d) <= 128 ? 128 : 64)
#define WGMMA_GROUPS(d, fp8) ((d) <= 64 || (fp8) ? 3 : 2)
#define WGMMA_THREADS(groups) (128 * (groups) + 128)
#define WGMMA_REGISTERS(groups) ((groups) == 3 ? 160 : 232)
#define WGMMA_FETCH_REGISTERS(groups) ((groups) == 3 ? 32 : 40)
#define WGMMA_TILE_Q(d, fp8) (64 * WGMMA_GROUPS(d, fp8))
#define WGMMA_STAGES(d, fp8) ((d) <= 64 || (fp8) ? 4 : (d) <= 128 ? 3 : 2)
#define WGMMA_ALIGN 1024
/* K and V, and as many ones as 64 channels of V, or, e4m3, 8 more channels; Q, twice. */
#define WGMMA_TENSORS(d, fp8)                                                                      \
    (((fp8) ? WGMMA_STAGES(d, fp8) * WGMMA_TILE_K(d) * (2 * (d) + 8)                               \
            : WGMMA_TILE_K(d) * (WGMMA_STAGES(d, fp8) * 3 * (d) + 128)) +                          \
     WGMMA_TILE_Q(d, fp8) * 3 * (d))
/* and K's scales, what belongs to Q's rows, means and scales of three tiles; barriers, places */
#define WGMMA_SMEM(d, fp8)                                                                         \
    (WGMMA_ALIGN + WGMMA_TENSORS(d, fp8) + WGMMA_STAGES(d, fp8) * WGMMA_TILE_K(d) +                \
     WGMMA_TILE_Q(d, fp8) * 8 + ((fp8) ? 36 : 12) * (d) + 896)

/*
 * Nothing quantised: where keys of a kv head have so many scores each, on average, or less.
 * `keys`: of a sequence, on average. e4m3 gains more by quantising, where it is e4m3.
 */
#define EXACT_PAIRS(d, fp8, keys)                                                                  \
    ((d) <= 64    ? ((fp8) ? 9216 : 36864)                                                         \
     : (d) <= 128 ? ((fp8) || (keys) > 5120 ? 2560 : 5120)                                         \
                  : ((keys) > 5120 ? 1024 : 5120))
#define EXACT_SMALL 64 /* rows of the smaller tiles: two or three warpgroups have the same */
#define EXACT_GROUPS(d, rows) ((rows) == EXACT_SMALL ? ((d) <= 64 ? 3 : 2) : (rows) / 64)
/* A round of larger tiles takes as long as so many of smaller ones. */
#define EXACT_ROUNDS(d) ((d) <= 64 ? 2 : 1.4)
/* K and V, ones, Q twice, or once and a place for o; what belongs to rows, barriers, places. */
#define EXACT_STAGES(d, rows) ((d) > 64 ? 2 : (rows) == EXACT_SMALL ? 3 : 4)
#define EXACT_QUERIES(d) ((d) <= 128 ? 2 : 1)
#define EXACT_O(d) ((d) <= 128 ? 0 : 128) /* bytes of a row at a time; 0: o has Q's place */
/* What a smaller tile's others leave for its first warpgroup: fours of a lane at a time; bytes. */
#define EXACT_SHARE_ROOM(d) ((d) <= 128 ? (d) / 8 + 2 : 16)
#define EXACT_SHARE(d, rows)                                                                       \
    ((rows) == EXACT_SMALL ? (EXACT_GROUPS(d, rows) - 1) * EXACT_SHARE_ROOM(d) * 16 * 128 : 0)
#define EXACT_SMEM(d, rows)                                                                        \
    (WGMMA_ALIGN + WGMMA_TILE_K(d) * (EXACT_STAGES(d, rows) * 4 * (d) + 128) +                     \
     ((d) <= 128 ? (rows) : 128) * EXACT_QUERIES(d) * 2 * (d) +                                    \
     ((d) <= 128 ? EXACT_SHARE(d, rows) : 0) + (rows) * (EXACT_O(d) + 8) + 1024)

/*
 * Few rows: warps, blocks that a processor of Hopper's has at a time, keys of a stage, stages of K
 * or V in shared memory, and Q; no more than the 99 KiB that a block can have everywhere. Memory is
 * fastest with 64 to 100 KiB on their way to a processor, so a block takes as much shared memory as
 * leaves no room for more of them. Its stages, all but one of which are on their way, are 64 KiB;
 * where a tile's registers leave room for four blocks, half of that, in two stages of 128 keys.
 */
#define FEW_WARPS 4
#define FEW_BLOCKS(d, rows) ((d) <= 64 && (rows) <= 16 ? 4 : 2)
#define FEW_TILE_K(d, rows) (FEW_BLOCKS(d, rows) > 2 ? 128 : (d) > 128 && (rows) > 16 ? 32 : 64)
#define FEW_STAGES(d, rows)                                                                        \
    ((d) > 128 && (rows) > 32 ? 3 : 65536 / (FEW_BLOCKS(d, rows) * (d)*FEW_TILE_K(d, rows)))
#define FEW_TENSORS(d, rows)                                                                       \
    ((FEW_STAGES(d, rows) * FEW_TILE_K(d, rows) + (rows)) * KERNEL_PITCH(2 * (d)))
#define FEW_ROOM(d, rows) (228 / (FEW_BLOCKS(d, rows) + 1) * 1024)
#define FEW_SMEM(d, rows)                                                                          \
    (FEW_TENSORS(d, rows) > FEW_ROOM(d, rows) ? FEW_TENSORS(d, rows) : FEW_ROOM(d, rows))

struct sage_attn;

struct sage_kernel {
    const char *name;
    int min_sm, max_sm, max_head_dim;
    const char *dtype, *variant, *features;
    int tile_q, tile_k, threads, smem_bytes;
};

#ifdef __cplusplus
extern "C" {
#endif

extern const struct sage_kernel sage_kernels[];
extern const int sage_n_kernels;

/*
 * The first kernel that can do it on a device of compute capability `sm`, or 0: on any; or -1. How
 * many rows there are is not asked here. On 9.0, beyond D = 128, that of int8_fp16 does both.
 */
int sage_kernel_find(int sm, int head_dim, int bf16, int fp8, int mask);
/* The kernel for `rows` rows of all query heads of a kv head together; -1: they are not few. */
int sage_kernel_find_few(int head_dim, int bf16, int64_t rows);
/* Of sage_kernels, the first one for few rows. */
int sage_kernel_first_few(void);
/* The kernel that quantises nothing, for few tiles or many; or -1. */
int sage_kernel_find_exact(int head_dim, int bf16, int few);
/* Keys of its tiles may be split. */
int sage_kernel_splits(int index);
/* Of EXACT_PAIRS and of EXACT_ROUNDS, what counts: 1. Tests change that. */
extern double sage_exact_share, sage_few_share;
/* Blocks of a kernel on Hopper, at most: a processor each. Tests have few, with many tiles each. */
extern unsigned sage_most_blocks;
/* Of sage_kernels, the first one of those. */
int sage_kernel_first_exact(void);
/* The kernel for the whole problem on the current device, whose tensors are there; < 0: error. */
int sage_cuda_kernel(const struct sage_attn *attn);

#ifdef __cplusplus
}
#endif
#endif
