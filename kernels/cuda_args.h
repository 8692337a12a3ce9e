/*
 * cuda_args.h - what the files of the CUDA implementation share.
 *
 *   cuda.cu           sage_attn_cuda(): workspace, arguments, launches
 *   cuda_quant.cu     the two kernels before attention: sums over the tokens, then K to INT8 and V
 *                     to e4m3; cuda_quant.cuh: what they do for a chunk of keys
 *   cuda_quant_sm90.cu                    one kernel instead, on Hopper, for short batches
 *   cuda_attn.cuh     attention: what is done for a tile of query rows on any GPU
 *   cuda_attn_mma.cuh, cuda_mma.cuh       over the keys that it sees, from sm_80 on; PTX
 *   cuda_attn_wgmma.cuh, cuda_wgmma.cuh   the same on Hopper; PTX
 *   cuda_attn_few.cuh                     few rows: of everything that is needed, without INT8
 *   cuda_attn_*.cu    instantiations
 *
 * Numerics are those of cpu.h but for three things: the maximum m that a row subtracts may lag
 * behind the true one by up to MAX_LAG (16-bit P V), sums are added up in another order, and for
 * few rows, and in short sequences on Hopper, nothing is quantised.
 */
#ifndef SAGE_CUDA_ARGS_H
#define SAGE_CUDA_ARGS_H

#include <cuda.h>
#include <cuda_runtime.h>
#include <stdint.h>

#include "kernels.h"
#include "numerics.h"

enum {
    QUANT_THREADS = 256,
    QUANT_CHUNKS = 64, /* and about that many chunks at most in a sequence */
    QUANT_RUN = 16,    /* keys with four places for scales: half of K_RUN in e4m3 */
    SPLIT_UNITS = 132, /* splits of all tiles, at most, where tiles are split */
    SPLITS_MAX = 32,   /* of a tile: one warp adds them up */
    SPLIT_SLABS = SPLIT_UNITS / 2 * 12, /* of 16 rows: of such tiles, of 192 rows at most */
    FEW_PROCESSORS = 192,               /* few rows: as many are made use of; more is memory */
    FEW_CHUNK = 128,                    /* keys of a block, or more */
    FEW_CHUNKS = 64,                    /* of a tile: one block adds them up */
};

/* Keys of a quantising block, or more: see chunk_keys. */
#define QUANT_CHUNK(d) ((d) <= 128 ? 256 : 128)

/* A tensor: address of [0, 0, 0, 0], strides in bytes of the first three dimensions. */
struct cuda_tensor {
    char *data;
    int64_t stride[3];
    int aligned; /* rows start at multiples of 16 bytes */
};

/*
 * Where groups are in index spaces over all sequences of the part, in units of `unit` tokens: every
 * sequence starts at a unit of its own. A batch is a sequence of its own, of the same length.
 */
struct cuda_space {
    int64_t total; /* units of all sequences, with gaps */
    int64_t each;  /* of one batch; plain batches only */
};

/* What divides a number below 2^31 by `by`, fast: see divide(). */
struct cuda_divider {
    unsigned by, factor, shift;
};

/*
 * In which order tiles of query rows are taken. Those of a head and batch are a column. Columns are
 * taken some together, in turns; the rest of them, if there is one, is another turn.
 */
struct cuda_order {
    unsigned each, turns;               /* tiles of a column; turns without the rest */
    struct cuda_divider turn;           /* tiles of one */
    struct cuda_divider together, rest; /* columns of one */
    struct cuda_divider batches, heads; /* columns of a head; heads of a kv head */
    struct cuda_divider splits;         /* of a tile: n_splits */
};

/* Arguments of all kernels, by value. */
struct cuda_args {
    struct cuda_tensor q, k, v, o, mask, lse; /* lse.data NULL: not wanted */
    int64_t mask_key;                         /* bytes of a mask element */
    int mask_dtype;
    int d, d_padded; /* head dimension; that of the kernel */
    int bf16, fp8, smooth_k, smooth_v, rotate_qk;
    int gqa;                                 /* query heads of a kv head */
    int64_t kv_heads;                        /* of the problem */
    int64_t group, n_groups;                 /* the part */
    int64_t seq, n_seqs;                     /* the sequences that it touches */
    int64_t head, n_heads;                   /* kv heads that have room in the workspace */
    int64_t q_head, n_q_heads;               /* query heads of each group in the part */
    int64_t row, n_rows;                     /* of the sequence; n_rows < 0: all */
    int64_t nq, nk;                          /* tokens of a batch */
    const int32_t *q_offsets, *k_offsets;    /* on the device; NULL: plain batches */
    int64_t q_first, k_first;                /* offsets of sequence `seq` */
    int64_t chunk_keys;                      /* of a chunk; few rows: of a block */
    struct cuda_space chunks, blocks, tiles; /* of keys, of keys, of query rows */
    float scale;                             /* with log2 e in it, and what rotation does */
    float scale_lse;                         /* without */
    int swizzled;                            /* k8 and v8, as wgmma wants them */
    CUtensorMap v_map;                       /* v, for wgmma */
    CUtensorMap q_map, k_map, o_map;         /* exact: the others, too */
    int o_mapped;                            /* there is an o_map */
    uint64_t *start_ns;                      /* where the first kernel writes its time; NULL */
    const uint32_t *go;                      /* 0 there: nothing is to be computed; NULL */
    unsigned n_tiles, processors;            /* in all; multiprocessors of the device */
    struct cuda_order order;                 /* not for few rows */
    unsigned n_splits, split_keys;           /* parts of each tile's keys: see split() */
    unsigned slabs;                          /* of 16 rows in a tile, at most */
    int rows;                                /* few rows: that a tile has room for; else 0 */
    int exact;                               /* the kernel is one of those */
    unsigned starts_early;                   /* the code can: see launch_early() */
    int64_t low, high;                       /* row i sees keys i + low ... i + high */
    int bottom_right;                        /* and then both are nk - nq higher */
    unsigned cluster;                        /* blocks that quantise a batch; 0: two kernels do */
    /* the workspace */
    unsigned *ticket; /* splits that blocks have taken, beyond each one's first; 0 between calls */
    /* few rows: [n_seqs][n_heads], exact: one, as `ticket`: see open_counter() */
    unsigned long long *arrived;
    unsigned long long *done; /* [n_tiles][slabs]: splits that are over; also such counters */
    unsigned long long call;  /* its number; CALL_COUNT is 0 */
    /*
     * [n_tiles][slabs][n_splits][4 * (d_padded / 8) + 8][32]: their O, m and sums;
     * few rows: [n_heads][chunks.total][rows * (d_padded + 4)]: O, then m and sums
     */
    float *parts;
    float *sums;    /* [n_heads][chunks.total][N_SUMS or 1][d] */
    float *means;   /* [n_seqs][n_heads][3][d_padded]: K's mean, V's scale, V's mean */
    float *k_max;   /* [n_heads][chunks.total]: largest scale of K */
    int8_t *k8;     /* [n_heads][blocks.total][KERNEL_TILE_K][d_padded] */
    float *k_scale; /* [n_heads][blocks.total][4][4]: of (key / 2) % 4, of run key / 16 */
    uint8_t *v8;    /* [n_heads][blocks.total][d_padded][KERNEL_TILE_K], keys in v8_place() order */
};

/* What of a counter is the count. */
#define CALL_COUNT 0xffffffull

/* Rows of a chunk's sums; without e4m3 only the first is there. */
enum { SUM_K, SUM_V, MIN_V, MAX_V, N_SUMS };

/* The kernels of the table, by index; launch() only enqueues. */
struct cuda_kernel {
    const void *function;
    cudaError_t (*launch)(const struct cuda_args *args, unsigned blocks, cudaStream_t stream);
};
extern "C" {
extern const struct cuda_kernel cuda_attn_sm90[], cuda_attn_f16[], cuda_attn_bf16[],
    cuda_attn_fp8[], cuda_attn_few[], cuda_attn_exact[];
/* cuda_quant.cu: functions to be loaded, ended by NULL; both launches. */
extern const void *const cuda_quant_functions[];
cudaError_t cuda_quant_launch(struct cuda_args *args, unsigned blocks, cudaStream_t stream);
/*
 * cuda_quant_sm90.cu, for compute capability 9.0: to be called first, says how many blocks a
 * cluster can have; the blocks for a batch, 0 where that cannot be; the launch for so many chunks.
 */
cudaError_t cuda_cluster_load(unsigned *most);
unsigned cuda_cluster_blocks(const struct cuda_args *args, unsigned most);
cudaError_t cuda_cluster_launch(const struct cuda_args *args, unsigned chunks, cudaStream_t stream);
}

#ifdef __CUDACC__
/*
 * Launches a kernel that may start while the one before it in the stream ends, and waits for it by
 * cudaGridDependencySynchronize() before it touches memory; code for older devices cannot wait so.
 * Code that can may also have clusters of blocks.
 */
inline cudaError_t launch_early(void (*kernel)(cuda_args), dim3 blocks, unsigned threads,
                                size_t smem, cudaStream_t stream, const cuda_args &args,
                                unsigned cluster = 1)
{
    cudaLaunchConfig_t config = {};
    cudaLaunchAttribute attributes[2] = {};

    attributes[0].id = cudaLaunchAttributeProgrammaticStreamSerialization;
    attributes[0].val.programmaticStreamSerializationAllowed = 1;
    attributes[1].id = cudaLaunchAttributeClusterDimension;
    attributes[1].val.clusterDim.x = cluster;
    attributes[1].val.clusterDim.y = attributes[1].val.clusterDim.z = 1;
    config.gridDim = blocks;
    config.blockDim = dim3(threads);
    config.dynamicSmemBytes = smem;
    config.stream = stream;
    config.attrs = attributes;
    config.numAttrs = args.starts_early + (cluster > 1);
    return cudaLaunchKernelEx(&config, kernel, args);
}

/*
 * Every kernel of a call, when those before it are over: is there to be a result? The first one
 * says when it begins.
 */
__device__ inline bool begins(const cuda_args &a)
{
    if (a.go && *static_cast<const volatile uint32_t *>(a.go) == 0)
        return false;
    if (a.start_ns && blockIdx.x == 0 && threadIdx.x == 0)
        asm volatile("{\n"
                     ".reg .u64 ns;\n"
                     "mov.u64 ns, %%globaltimer;\n"
                     "st.volatile.global.u64 [%0], ns;\n"
                     "}" ::"l"(a.start_ns)
                     : "memory");
    return true;
}

/* Granlund and Montgomery, "Division by Invariant Integers using Multiplication", section 4. */
__device__ inline unsigned divide(unsigned x, const cuda_divider &d)
{
    return (__umulhi(x, d.factor) + x) >> d.shift;
}

/* One sequence, and where it starts in the index spaces. */
struct cuda_seq {
    int64_t batch, q0, k0;
    int nq, nk;
};

/* Sequence number s (from args.seq on). */
__device__ inline cuda_seq seq_of(const cuda_args &a, int64_t s)
{
    if (!a.q_offsets)
        return {s, 0, 0, static_cast<int>(a.nq), static_cast<int>(a.nk)};
    const int q0 = a.q_offsets[s], k0 = a.k_offsets[s];
    return {0, q0, k0, a.q_offsets[s + 1] - q0, a.k_offsets[s + 1] - k0};
}

/*
 * The first unit of sequence s: floor(tokens before / unit) + sequences before leaves room. An int
 * as unit divides faster.
 */
template <typename Unit>
__device__ inline int64_t space_start(const cuda_args &a, const cuda_space &space,
                                      const int32_t *offsets, int64_t first, Unit unit, int64_t s)
{
    if (!offsets)
        return (s - a.seq) * space.each;
    if constexpr (sizeof(Unit) == 4)
        return static_cast<unsigned>(offsets[s] - first) / static_cast<unsigned>(unit) +
               (s - a.seq);
    return (offsets[s] - first) / unit + (s - a.seq);
}

/* The sequence that unit i belongs to: the last that starts at or before it. */
template <typename Unit>
__device__ inline int64_t space_find(const cuda_args &a, const cuda_space &space,
                                     const int32_t *offsets, int64_t first, Unit unit, int64_t i)
{
    if (!offsets)
        return a.seq + static_cast<unsigned>(i) / static_cast<unsigned>(space.each);
    int64_t low = a.seq, high = a.seq + a.n_seqs;
    while (high - low > 1) {
        const int64_t middle = low + (high - low) / 2;
        if (space_start(a, space, offsets, first, unit, middle) <= i)
            low = middle;
        else
            high = middle;
    }
    return low;
}

__device__ inline bool in_part(const cuda_args &a, int64_t s, int64_t kv_head)
{
    const int64_t group = s * a.kv_heads + kv_head;

    return group >= a.group && group < a.group + a.n_groups;
}

/*
 * What the place in row i, of 64 or 128 bytes, is to be XORed with where it is `swizzled`: the
 * 16-byte vectors at one place of 8 rows of shared memory are in different banks then.
 */
template <int BYTES> __device__ constexpr int row_swizzle(int i)
{
    return BYTES == 64 ? i / 2 % 4 * 16 : i % 8 * 16;
}

/* Rows of D bytes, `swizzled`: those of more than 128 are in panels of 128. */
template <int D> constexpr int SWIZZLED_ROW = D < 128 ? D : 128;

/* Where byte `column` of row i lies then; panels are `panel` bytes apart. */
template <int D> __device__ constexpr int swizzled_place(int i, int column, int panel)
{
    constexpr int ROW = SWIZZLED_ROW<D>;

    return column / ROW * panel + i * ROW + (column % ROW ^ row_swizzle<ROW>(i));
}

/*
 * Where key 0 ... 15 of a run lies in V's e4m3 rows: the columns that a thread holds of two of
 * QK^T's accumulators, 2c, 2c + 1, 2c + 8 and 2c + 9, are then the four bytes that P's fragment
 * wants at 4c.
 */
__device__ constexpr int v8_place(int key)
{
    return key % 8 / 2 * 4 + key / 8 * 2 + key % 2;
}
#endif

#endif
