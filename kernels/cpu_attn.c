/*
 * cpu_attn.c - attention of one block of query rows of one head, on the CPU.
 */
#include "cpu.h"

#include <float.h>
#include <math.h>

#include "half.h"

/* Unroll loops whose bounds are constants, at any optimisation level. */
#define UNROLL _Pragma("GCC unroll 16")

/* The largest ROWS below; BLOCK_Q is a multiple of it. */
enum { ROWS_MAX = 8 };

#if defined(__x86_64__)
#define ISA avx512
#define TARGET __attribute__((target("avx512f")))
#define LANES 16
#define ROWS 8
#include "cpu_tile.h"

#define ISA avx2
#define TARGET __attribute__((target("avx2,fma")))
#define LANES 8
#define ROWS 4
#include "cpu_tile.h"
#endif

/* SSE2, NEON and the like; 2 x 4 accumulators, for there may be 16 registers only. */
#define ISA basic
#define TARGET
#define LANES 4
#define ROWS 2
#include "cpu_tile.h"

const struct cpu_isa *cpu_isa(int i)
{
    static const struct cpu_isa basic = {"basic", step_basic};

#if defined(__x86_64__)
    static const struct cpu_isa avx512 = {"avx512", step_avx512}, avx2 = {"avx2", step_avx2};

    if (__builtin_cpu_supports("avx512f") && i-- == 0)
        return &avx512;
    if (__builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma") && i-- == 0)
        return &avx2;
#endif
    return i == 0 ? &basic : NULL;
}

static const float log2_e = 1.44269504f, ln_2 = 0.693147181f;

/* binary16: 10 bits of 23 stay, then steps of 2^-24; bfloat16: 7; e4m3, P times 2^8: 3, 2^-9. */
static const struct cpu_grid f16_grid = {13, 0x1p-14f, 0.5f, 1};
static const struct cpu_grid bf16_grid = {16, 0x1p-126f, 0, 1};
static const struct cpu_grid e4m3_grid = {20, 0x1p-6f, 0x1p14f, 256};

/* What a tile is about, beside its state. */
struct work {
    const struct cpu_job *job;
    struct cpu_group group;
    int64_t head, row; /* query head; first row within the sequence */
    int rows;
    float q_mean[BLOCK_Q]; /* scale * q . mean(k), for lse */
};

static float to_float(uint16_t h, enum sage_dtype dtype)
{
    return dtype == SAGE_F16 ? f16_to_f32(h) : bf16_to_f32(h);
}

/*
 * One row of Q to integers. Its largest magnitude is found among bit patterns, where Inf and NaN
 * rank above all numbers; a row that has one gets scale NaN, and so do all its scores.
 */
static void quantise_q(struct work *w, struct cpu_tile *t, int r)
{
    const struct sage_attn *a = w->job->attn;
    const struct sage_seq *seq = &w->group.seq;
    const uint16_t *q =
        (const uint16_t *)tensor_row(&a->q, seq->batch, w->head, seq->q0 + w->row + r);
    const float scale = sage_attn_scale(a);
    float x[SAGE_MAX_HEAD_DIM], dot = 0;
    uint32_t top = 0;

    for (int i = 0; i < t->d; i++) {
        x[i] = to_float(q[i], a->q.dtype);
        dot += x[i] * w->group.k_mean[i];
    }
    for (int i = 0; a->rotate_qk && i < t->d; i += 8)
        rotate_8(x + i);
    for (int i = 0; i < t->d; i++)
        top = (f32_bits(x[i]) & 0x7fffffff) > top ? f32_bits(x[i]) & 0x7fffffff : top;
    const float amax = f32_from_bits(top), up = amax > QUANT_MIN && isfinite(amax) ? 127 / amax : 0;

    for (int i = 0; i < t->d; i++)
        t->q[r][i] = up > 0 ? rintf(x[i] * up) : 0;
    t->q_scale[r] =
        isfinite(amax) ? amax / 127 * (scale * log2_e * (a->rotate_qk ? ROTATE_SCALE : 1)) : NAN;
    w->q_mean[r] = dot * scale;
}

/* One row of Q as it is. */
static void copy_q(struct work *w, struct cpu_tile *t, int r)
{
    const struct sage_attn *a = w->job->attn;
    const struct sage_seq *seq = &w->group.seq;
    const uint16_t *q =
        (const uint16_t *)tensor_row(&a->q, seq->batch, w->head, seq->q0 + w->row + r);

    for (int i = 0; i < t->d; i++)
        t->q[r][i] = to_float(q[i], a->q.dtype);
    t->q_scale[r] = sage_attn_scale(a) * log2_e;
    w->q_mean[r] = 0;
}

static void begin(struct work *w, struct cpu_tile *t)
{
    const size_t q_bytes = sizeof(float) * (size_t)t->d,
                 v_bytes = sizeof(float) * (size_t)t->v_columns;

    /* The register tile computes up to ROWS_MAX rows at a time: those beyond the last are zero. */
    for (int r = 0; r < t->rows || r % ROWS_MAX; r++) {
        memset(t->o[r], 0, v_bytes);
        if (r >= t->rows)
            memset(t->q[r], 0, q_bytes);
        else if (w->job->exact)
            copy_q(w, t, r);
        else
            quantise_q(w, t, r);
        t->max[r] = -INFINITY;
        t->sum[r] = t->p_sum[r] = t->decay[r] = 0;
    }
    for (int key = 0; key < BLOCK_K; key++) /* the columns beyond D */
        memset(t->v[key] + t->d, 0, v_bytes - q_bytes);
}

/*
 * Mask elements to additions to scores in base 2. A large finite one stays finite, so that a row
 * whose keys are all at -FLT_MAX (PyTorch's habit) is no fully masked one.
 */
static float bias(const char *mask, int64_t i, enum sage_dtype dtype)
{
    float x, y;

    if (dtype == SAGE_BOOL)
        return mask[i] ? 0 : -INFINITY;
    x = dtype == SAGE_F32 ? ((const float *)mask)[i] : to_float(((const uint16_t *)mask)[i], dtype);
    y = x * log2_e;
    return y < -FLT_MAX && x >= -FLT_MAX ? -FLT_MAX : y;
}

/* What each row sees of the keys [key, key + BLOCK_K): band, then mask tensor. */
static void look(const struct work *w, struct cpu_tile *t, int64_t key)
{
    const struct sage_attn *a = w->job->attn;
    const struct sage_tensor *mask = &a->mask;

    t->masked = mask->dtype != SAGE_NONE;
    for (int r = 0; r < t->rows; r++) {
        int64_t first, last;

        sage_attn_band(a, &w->group.seq, w->row + r, &first, &last);
        t->first[r] = first <= key ? 0 : first - key < BLOCK_K ? (int)(first - key) : BLOCK_K;
        t->last[r] = last <= key ? 0 : last - key < BLOCK_K ? (int)(last - key) : BLOCK_K;
        if (!t->masked)
            continue;
        const int64_t batch = mask->shape[0] == 1 ? 0 : w->group.seq.batch;
        const int64_t head = mask->shape[1] == 1 ? 0 : w->head;
        const char *row = tensor_row(mask, batch, head, mask->shape[2] == 1 ? 0 : w->row + r);

        for (int i = t->first[r]; i < t->last[r]; i++)
            t->bias[r][i] = bias(row, key + i, mask->dtype);
    }
}

/*
 * Row r of o and lse. No sum: nothing was seen. A sound o is between V's extremes but for rounding
 * (of V to e4m3 around its mean, say), hence finite; beyond the format's range it is its largest
 * number.
 */
static void finish_row(const struct work *w, const struct cpu_tile *t, int r)
{
    const struct sage_attn *a = w->job->attn;
    const int64_t batch = w->group.seq.batch, row = w->group.seq.q0 + w->row + r;
    uint16_t *o = (uint16_t *)tensor_row(&a->o, batch, w->head, row);
    const bool none = t->sum[r] == 0;
    const float most = a->o.dtype == SAGE_F16 ? 65504 : 0x1.fep127f;

    for (int i = 0; i < t->d; i++) {
        float x = t->o[r][i] / t->p_sum[r];

        if (w->job->fp8)
            x = x * w->group.v_scale[i] + w->group.v_mean[i];
        x = none ? 0 : !isfinite(x) ? NAN : x > most ? most : x < -most ? -most : x;
        o[i] = a->o.dtype == SAGE_F16 ? f16_from_f32(x) : bf16_from_f32(x);
    }
    if (a->lse.dtype != SAGE_NONE) {
        float x = ln_2 * (t->max[r] + log2f(t->sum[r])) + w->q_mean[r];

        x = none ? -INFINITY : isfinite(x) ? x : NAN;
        *(float *)tensor_row(&a->lse, batch, w->head, row) = x;
    }
}

/* All key blocks that some row of the tile sees: first row's first key to last row's last key. */
static void attend(struct work *w, struct cpu_tile *t)
{
    const struct cpu_job *job = w->job;
    const struct sage_seq *seq = &w->group.seq;
    const struct sage_tensor *v = &job->attn->v;
    int64_t first, last, ignored;

    sage_attn_band(job->attn, seq, w->row, &first, &ignored);
    sage_attn_band(job->attn, seq, w->row + t->rows - 1, &ignored, &last);
    for (int64_t block = first / BLOCK_K; block * BLOCK_K < last; block++) {
        const int64_t key = block * BLOCK_K, left = seq->nk - key;
        const char *data = w->group.blocks + (size_t)block * job->at.block_bytes;

        const uint16_t *k = (const uint16_t *)(data + job->at.k_offset);
        const float *k_scale = (const float *)data;
        const enum sage_dtype k_dtype = job->exact ? job->attn->k.dtype : SAGE_BF16;

        look(w, t, key);
        if (job->fp8)
            job->isa->step(t, k, k_dtype, k_scale, data + job->at.v_offset, 2 * t->d, BLOCK_K,
                           SAGE_BF16);
        else
            job->isa->step(
                t, k, k_dtype, k_scale, tensor_row(v, seq->batch, w->group.kv_head, seq->k0 + key),
                left > 1 ? 2 * v->stride[2] : 0, left < BLOCK_K ? (int)left : BLOCK_K, v->dtype);
    }
}

void cpu_attend_tile(const struct cpu_job *job, int64_t n)
{
    const struct sage_attn *a = job->attn;
    const int64_t gqa = a->q.shape[1] / a->k.shape[1], heads = sage_part_heads(a, &job->part);
    struct work w = {.job = job};
    struct cpu_tile t;
    int64_t tile, row, end;

    w.group = cpu_group(job, cpu_find(job, job->at.tiles, n, &tile));
    row = job->part.n_rows < 0 ? 0 : job->part.row;
    end = job->part.n_rows < 0 ? w.group.seq.nq : row + job->part.n_rows;
    /* heads change fastest, for they share K and V; last rows first: the longest, if causal */
    w.head = w.group.kv_head * gqa + job->part.head + tile % heads;
    row += ((end - row + BLOCK_Q - 1) / BLOCK_Q - 1 - tile / heads) * BLOCK_Q;
    w.row = row;
    t.rows = end - row < BLOCK_Q ? (int)(end - row) : BLOCK_Q;
    t.d = (int)a->q.shape[3];
    t.v_columns = (t.d + 15) / 16 * 16;
    t.grid = job->fp8 ? e4m3_grid : a->v.dtype == SAGE_F16 ? f16_grid : bf16_grid;
    begin(&w, &t);
    attend(&w, &t);
    for (int r = 0; r < t.rows; r++)
        finish_row(&w, &t, r);
}
