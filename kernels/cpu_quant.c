/*
 * cpu_quant.c - K to INT8 and V to e4m3, on the CPU. Two passes over each chunk of CHUNK_K keys:
 * sums of the chunk; then, from the sums of all chunks, means and scales, and the numbers. The sums
 * are added up in the order of the chunks, whoever made them: results do not depend on threads.
 * Where nothing is quantised the second has K put into blocks as it is.
 */
#include "cpu.h"

#include <math.h>

#include "half.h"

/* One row of K or V as floats. */
static void load(float *x, const struct sage_tensor *t, const struct cpu_group *g, int64_t key)
{
    const uint16_t *row =
        (const uint16_t *)tensor_row(t, g->seq.batch, g->kv_head, g->seq.k0 + key);
    const int64_t d = t->shape[3];

    if (t->dtype == SAGE_F16)
        for (int64_t i = 0; i < d; i++)
            x[i] = f16_to_f32(row[i]);
    else
        for (int64_t i = 0; i < d; i++)
            x[i] = bf16_to_f32(row[i]);
}

static int64_t least(int64_t a, int64_t b)
{
    return a < b ? a : b;
}

/* The sums of chunk c of a group: rows of D floats, SUM_K to BAD_V. */
static float *sums_of(const struct cpu_job *job, const struct cpu_group *g, int64_t c)
{
    return (float *)(g->sums + (size_t)c * job->at.sum_bytes);
}

void cpu_sum_chunk(const struct cpu_job *job, int64_t n)
{
    const struct sage_attn *a = job->attn;
    const int64_t d = a->k.shape[3];
    int64_t c;
    const struct cpu_group g = cpu_group(job, cpu_find(job, job->at.chunks, n, &c));
    const int64_t end = least((c + 1) * CHUNK_K, g.seq.nk);
    float *s = sums_of(job, &g, c), x[SAGE_MAX_HEAD_DIM];

    memset(s, 0, job->at.sum_bytes);
    const int shift = sample_shift(g.seq.nk);
    for (int64_t at = c * CHUNK_K >> shift; a->smooth_k && at < end >> shift; at++) {
        load(x, &a->k, &g, sample_key(at, shift));
        for (int64_t i = 0; i < d; i++)
            s[SUM_K * d + i] += x[i];
    }
    if (!job->fp8)
        return;
    for (int64_t i = 0; i < d; i++) {
        s[MIN_V * d + i] = INFINITY;
        s[MAX_V * d + i] = -INFINITY;
    }
    for (int64_t key = c * CHUNK_K; key < end; key++) {
        load(x, &a->v, &g, key);
        for (int64_t i = 0; i < d; i++) {
            s[SUM_V * d + i] += x[i];
            s[MIN_V * d + i] = x[i] < s[MIN_V * d + i] ? x[i] : s[MIN_V * d + i];
            s[MAX_V * d + i] = x[i] > s[MAX_V * d + i] ? x[i] : s[MAX_V * d + i];
            s[BAD_V * d + i] += x[i] - x[i]; /* NaN once an Inf or NaN has come by */
        }
    }
}

/* What phase 2 needs of all chunks together; every task adds it up for itself. */
struct channels {
    float k_mean[SAGE_MAX_HEAD_DIM], v_mean[SAGE_MAX_HEAD_DIM], v_scale[SAGE_MAX_HEAD_DIM];
};

static void k_channels(const struct cpu_job *job, const struct cpu_group *g, struct channels *ch)
{
    const int64_t d = job->attn->k.shape[3];

    memset(ch->k_mean, 0, sizeof(float) * (size_t)d);
    if (!job->attn->smooth_k)
        return;
    for (int64_t c = 0; c * CHUNK_K < g->seq.nk; c++)
        for (int64_t i = 0; i < d; i++)
            ch->k_mean[i] += sums_of(job, g, c)[SUM_K * d + i];
    const float keys = (float)(g->seq.nk >> sample_shift(g->seq.nk));
    for (int64_t i = 0; i < d; i++)
        ch->k_mean[i] /= keys;
}

/*
 * V's scales: amax/256, not amax/448, the largest there is: below a power of two e4m3 is at its
 * most precise, and that is where bounded inputs have most of their weight (7 % less error on
 * U(-1,1), the same on normal ones). An Inf or NaN in a channel: its scale is NaN.
 */
static void v_channels(const struct cpu_job *job, const struct cpu_group *g, struct channels *ch)
{
    const int64_t d = job->attn->v.shape[3];

    for (int64_t i = 0; i < d; i++) {
        float sum = 0, min = INFINITY, max = -INFINITY, bad = 0;

        for (int64_t c = 0; c * CHUNK_K < g->seq.nk; c++) {
            const float *s = sums_of(job, g, c) + i;

            sum += s[SUM_V * d];
            min = s[MIN_V * d] < min ? s[MIN_V * d] : min;
            max = s[MAX_V * d] > max ? s[MAX_V * d] : max;
            bad += s[BAD_V * d];
        }
        const float mean = job->attn->smooth_v ? sum / (float)g->seq.nk : 0;
        const float amax = max - mean > mean - min ? max - mean : mean - min;

        ch->v_mean[i] = mean;
        ch->v_scale[i] = amax / 256 + bad;
    }
}

/* Which of the four scales of its run a key has. */
static int k_group(int key)
{
    return key / 2 % 4;
}

/*
 * A run of keys, x[run][d], to columns of k[d][BLOCK_K] and their scales. The largest magnitude
 * of a group is found among bit patterns, where Inf and NaN rank above all numbers; a group that
 * has one gets scale NaN, and so do all its scores.
 */
static void quantise_k(uint16_t *k, float *scale, const float *x, int run, int64_t d)
{
    uint32_t top[4] = {0};

    for (int key = 0; key < run; key++)
        for (int64_t i = 0; i < d; i++) {
            const uint32_t bits = f32_bits(x[key * d + i]) & 0x7fffffff;

            top[k_group(key)] = bits > top[k_group(key)] ? bits : top[k_group(key)];
        }
    for (int key = 0; key < run; key++) {
        const float amax = f32_from_bits(top[k_group(key)]);
        const float up = amax > QUANT_MIN && isfinite(amax) ? 127 / amax : 0;

        for (int64_t i = 0; i < d; i++)
            k[i * BLOCK_K + key] = up > 0 ? bf16_from_f32(rintf(x[key * d + i] * up)) : 0;
        scale[key] = isfinite(amax) ? amax / 127 : NAN;
    }
}

/* A block of keys as they are, zero beyond the last key. */
static void copy_k(const struct cpu_job *job, const struct cpu_group *g, int64_t block)
{
    const struct sage_tensor *t = &job->attn->k;
    char *data = g->blocks + (size_t)block * job->at.block_bytes;
    uint16_t *k = (uint16_t *)(data + job->at.k_offset);

    memset(data, 0, job->at.block_bytes);
    for (int64_t j = 0; j < BLOCK_K && block * BLOCK_K + j < g->seq.nk; j++) {
        const uint16_t *row = (const uint16_t *)tensor_row(t, g->seq.batch, g->kv_head,
                                                           g->seq.k0 + block * BLOCK_K + j);

        for (int64_t i = 0; i < t->shape[3]; i++)
            k[i * BLOCK_K + j] = row[i];
        ((float *)data)[j] = 1;
    }
}

static void k_block(const struct cpu_job *job, const struct cpu_group *g, int64_t block,
                    const struct channels *ch)
{
    const int64_t d = job->attn->k.shape[3];
    char *data = g->blocks + (size_t)block * job->at.block_bytes;
    uint16_t *k = (uint16_t *)(data + job->at.k_offset);
    const int run = K_RUN(job->fp8);
    float x[K_RUN(true) * SAGE_MAX_HEAD_DIM];

    for (int at = 0; at < BLOCK_K; at += run) {
        const int64_t key = block * BLOCK_K + at, keys = least(run, g->seq.nk - key);

        if (keys <= 0) { /* beyond the last key */
            memset((float *)data + at, 0, sizeof(float) * (size_t)run);
            for (int64_t i = 0; i < d; i++)
                memset(k + i * BLOCK_K + at, 0, sizeof *k * (size_t)run);
            continue;
        }
        memset(x, 0, sizeof(float) * (size_t)(run * d));
        for (int64_t j = 0; j < keys; j++) {
            load(x + j * d, &job->attn->k, g, key + j);
            for (int64_t i = 0; i < d; i++)
                x[j * d + i] -= ch->k_mean[i];
            for (int64_t i = 0; job->attn->rotate_qk && i < d; i += 8)
                rotate_8(x + j * d + i);
        }
        quantise_k(k + at, (float *)data + at, x, run, d);
    }
}

static void v_block(const struct cpu_job *job, const struct cpu_group *g, int64_t block,
                    const struct channels *ch)
{
    const int64_t d = job->attn->v.shape[3];
    const int64_t keys = least(BLOCK_K, g->seq.nk - block * BLOCK_K);
    uint16_t *v = (uint16_t *)(g->blocks + (size_t)block * job->at.block_bytes + job->at.v_offset);
    float x[SAGE_MAX_HEAD_DIM], up[SAGE_MAX_HEAD_DIM];

    for (int64_t i = 0; i < d; i++)
        up[i] = ch->v_scale[i] > QUANT_MIN / 256 ? 1 / ch->v_scale[i] : 0;
    memset(v, 0, sizeof *v * (size_t)(BLOCK_K * d));
    for (int64_t j = 0; j < keys; j++) {
        load(x, &job->attn->v, g, block * BLOCK_K + j);
        for (int64_t i = 0; i < d; i++)
            v[j * d + i] =
                up[i] > 0 ? bf16_from_f32(e4m3_round((x[i] - ch->v_mean[i]) * up[i])) : 0;
    }
}

void cpu_quantise_chunk(const struct cpu_job *job, int64_t n)
{
    const size_t row = sizeof(float) * (size_t)job->attn->k.shape[3];
    struct channels ch;
    int64_t c;
    const struct cpu_group g = cpu_group(job, cpu_find(job, job->at.chunks, n, &c));
    const int64_t end = least((c + 1) * CHUNK_K, g.seq.nk);

    k_channels(job, &g, &ch);
    if (job->fp8)
        v_channels(job, &g, &ch);
    for (int64_t block = c * CHUNK_K / BLOCK_K; block * BLOCK_K < end; block++) {
        if (job->exact)
            copy_k(job, &g, block);
        else
            k_block(job, &g, block, &ch);
        if (job->fp8)
            v_block(job, &g, block, &ch);
    }
    if (c > 0)
        return;
    memcpy(g.k_mean, ch.k_mean, row);
    if (job->fp8) {
        memcpy(g.v_mean, ch.v_mean, row);
        memcpy(g.v_scale, ch.v_scale, row);
    }
}
