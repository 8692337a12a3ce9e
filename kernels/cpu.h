/*
 * cpu.h - what the files of the CPU implementation share.
 *
 *   cpu.c        thread pool, workspace, parts, the three phases
 *   cpu_quant.c  phases 1 and 2: sums over the tokens, then K to INT8 and V to e4m3
 *   cpu_attn.c   phase 3: one block of query rows, over the key blocks it sees
 *   cpu_tile.h   one key block of it, for one instruction set
 *
 * This implementation defines the numerics that the GPU kernels answer to:
 *   q_int = round(q / sq), sq = amax/127 of the row;  k_int likewise of k - mean(k), by k_group(),
 *   the mean being that of the keys of numerics.h
 *   s = q_int . k_int * (sq * scale * log2 e) * sk + mask * log2 e
 *   p = 2^(s - m), m the row's maximum so far;  P = p in V's dtype, or 2^8 p in e4m3
 *   V in e4m3: (v - mean(v)) / sv, sv = amax/256 of the channel
 *   o = (sum of P v) / (sum of P)       the same P above and below: V = ones gives exactly 1
 *   lse = ln 2 * (m + log2(sum of p)) + scale * q . mean(k)     p before rounding, q before INT8
 * Of few rows (FEW_ROWS) nothing is quantised: q_int and k_int are q and k, sq and sk 1, mean(k) 0,
 * and P is in V's dtype.
 */
#ifndef SAGE_CPU_H
#define SAGE_CPU_H

#include "numerics.h"
#include "problem.h"

enum {
    BLOCK_Q = 64,           /* query rows of a tile: one task for one thread */
    BLOCK_K = 64,           /* keys of a step */
    CHUNK_K = 16 * BLOCK_K, /* keys of a task in phases 1 and 2 */
    LINE = 64,              /* a cache line, and the widest vector */
};

/* Where things lie in the workspace: offsets from its start, sizes of one element. */
struct cpu_layout {
    /* int64_t[n_groups + 1] each: first block, chunk, tile of each group */
    size_t blocks, chunks, tiles;
    size_t means;              /* float[3][D] for each group: K's mean, V's scale, V's mean */
    size_t sums, sum_bytes;    /* float[N_SUMS][D] for each chunk */
    size_t data, block_bytes;  /* prepared blocks, see below */
    size_t k_offset, v_offset; /* of K and V in a block */
    size_t total;
};

/* Rows of a chunk's sums; without e4m3 only the first is there. */
enum { SUM_K, SUM_V, MIN_V, MAX_V, BAD_V, N_SUMS };

/*
 * A prepared block of BLOCK_K keys, zero beyond the last key:
 *   float    scale[BLOCK_K]
 *   uint16_t k[D][BLOCK_K]    -127..127; as it is, where nothing is quantised
 *   uint16_t v[BLOCK_K][D]    e4m3, for int8_fp8 only
 * Quantised numbers are bfloat16 numbers; held as such, one shift makes them floats.
 */

/* Up to how many rows nothing is quantised: FEW_ROWS. Tests change that. */
extern int64_t cpu_few_rows;

/* One call of sage_attn_cpu(). */
struct cpu_job {
    const struct sage_attn *attn; /* where nothing is quantised: without what is about that */
    const struct cpu_isa *isa;
    struct sage_part part; /* with n_rows resolved unless all */
    struct cpu_layout at;
    char *workspace;
    bool exact, fp8; /* nothing is quantised; V is e4m3 */
};

/* One group of a job. */
struct cpu_group {
    struct sage_seq seq;
    int64_t kv_head;
    float *k_mean, *v_scale, *v_mean; /* [D] each */
    char *blocks;                     /* block_bytes each */
    char *sums;                       /* sum_bytes each */
};

struct cpu_group cpu_group(const struct cpu_job *job, int64_t i);
/* Which group does number n of a table (blocks, chunks or tiles) belong to? Which is it there? */
int64_t cpu_find(const struct cpu_job *job, size_t table, int64_t n, int64_t *within);

/* The phases; one call for each chunk, chunk and tile. */
void cpu_sum_chunk(const struct cpu_job *job, int64_t n);
void cpu_quantise_chunk(const struct cpu_job *job, int64_t n);
void cpu_attend_tile(const struct cpu_job *job, int64_t n);

/* Address of row [a, b, c, :] of a tensor. */
static inline char *tensor_row(const struct sage_tensor *t, int64_t a, int64_t b, int64_t c)
{
    const int64_t i = a * t->stride[0] + b * t->stride[1] + c * t->stride[2];

    return (char *)t->data + t->offset + (size_t)i * sage_dtype_size(t->dtype);
}

/*
 * A narrower float format as rounding sees it: mantissa bits of binary32 to drop; below `normal`
 * its steps are those of a binary32 near `magic`. P is p times `scale`.
 */
struct cpu_grid {
    int drop;
    float normal, magic, scale;
};

/*
 * A tile's state between key blocks: 290 KiB, on the stack of its thread. Columns beyond D and rows
 * beyond the last are zero.
 */
struct cpu_tile {
    int rows, d;
    int v_columns;                                      /* D rounded up to 16 */
    struct cpu_grid grid;                               /* what P is rounded to */
    _Alignas(LINE) float q[BLOCK_Q][SAGE_MAX_HEAD_DIM]; /* -127..127, or as it is */
    float q_scale[BLOCK_Q];                             /* with scale * log2 e in it */
    float max[BLOCK_Q], sum[BLOCK_Q], p_sum[BLOCK_Q];   /* m, sum of p, sum of P */
    float decay[BLOCK_Q];                               /* 2^(m before - m after this key block) */
    _Alignas(LINE) float o[BLOCK_Q][SAGE_MAX_HEAD_DIM];
    /* of the current key block */
    int first[BLOCK_Q], last[BLOCK_Q];           /* visible keys of each row */
    bool masked;                                 /* is there a bias? */
    _Alignas(LINE) float bias[BLOCK_Q][BLOCK_K]; /* mask tensor * log2 e */
    _Alignas(LINE) float p[BLOCK_Q][BLOCK_K];    /* s, then P */
    _Alignas(LINE) float k[SAGE_MAX_HEAD_DIM][BLOCK_K];
    _Alignas(LINE) float v[BLOCK_K][SAGE_MAX_HEAD_DIM];
};

/* An instruction set: the part of the work that is worth writing for each. */
struct cpu_isa {
    const char *name;
    /*
     * Go through one key block: K, of dtype k_dtype, with a scale for each key; v are `keys` rows
     * of D halves, v_stride bytes apart, of dtype v_dtype.
     */
    void (*step)(struct cpu_tile *t, const uint16_t *k, enum sage_dtype k_dtype,
                 const float *k_scale, const char *v, int64_t v_stride, int keys,
                 enum sage_dtype v_dtype);
};

/* The i-th best that this machine can run; NULL beyond the last. */
const struct cpu_isa *cpu_isa(int i);

struct sage_cpu;
/* Make a pool use one instruction set (tests). */
void cpu_use(struct sage_cpu *cpu, const struct cpu_isa *isa);

#endif
