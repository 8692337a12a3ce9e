/*
 * gpu_edges.c - what sageattn.h says of edges, errors and streams, on the GPU.
 */
#include "config.h"

#include <cuda_runtime_api.h>
#include <float.h>
#include <math.h>
#include <pthread.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <time.h>
#include <unistd.h>

#include "gpu_attn.h"
#include "kernels/kernels.h"
#include "ref64.h"

struct edges {
    struct gpu *gpu;
    struct problem *p;
    uint64_t seed;
    int failures, checks;
    enum sage_variant variant;
    enum sage_dtype dtype;
};

static void report(struct edges *e, const struct problem *p, const char *what, const char *why)
{
    char text[1024] = "";

    if (p)
        problem_describe(p, text, sizeof text);
    printf("FAILED %s: %s\n  %s\n", what, why, text);
    fflush(stdout);
    e->failures++;
}

static void expect(struct edges *e, bool good, const char *what, const char *why)
{
    e->checks++;
    if (!good)
        report(e, NULL, what, why);
}

static void check(struct edges *e, const char *what)
{
    struct distance far;
    char why[512];

    e->checks++;
    if (!gpu_check(e->gpu, e->p, 1, &far, why, sizeof why))
        report(e, e->p, what, why);
}

static int enqueue(struct edges *e, const struct problem *p, struct CUstream_st *stream, char *why,
                   size_t len)
{
    const struct sage_attn a = gpu_attn(p);
    const size_t bytes = sage_attn_cuda_workspace(&a, NULL);

    return sage_attn_cuda(&a, NULL, e->gpu->workspace, bytes, stream, why, len);
}

/* One batch, 2 * gqa query heads on 2. */
static struct sage_attn *begin_gqa(struct edges *e, enum kind kind, int64_t gqa, int64_t nq,
                                   int64_t nk, int64_t d)
{
    problem_reset(e->p, e->seed + (uint64_t)e->checks);
    e->p->kind = kind;
    problem_plain(e->p, e->dtype, e->variant, 1, 2, gqa, nq, nk, d);
    return &e->p->attn;
}

static struct sage_attn *begin(struct edges *e, enum kind kind, int64_t nq, int64_t nk, int64_t d)
{
    return begin_gqa(e, kind, 2, nq, nk, d);
}

/* --- values --- */

static void ones(struct edges *e)
{
    const int64_t dims[] = {8, 64, 72, 128, 256}, keys[] = {1, 63, 64, 333, 1500};

    for (int i = 0; i < 25; i++) {
        begin(e, KIND_ONES, 70, keys[i / 5], dims[i % 5])->causal = i % 2;
        check(e, "V = ones gives exactly 1");
    }
}

static void constants(struct edges *e)
{
    for (int i = 0; i < 8; i++) {
        struct sage_attn *a = begin(e, KIND_CONST_K, 5, i % 2 ? 100 : 1, i / 4 ? 64 : 136);

        a->smooth_k = i / 2 % 2;
        check(e, "constant K, a zero channel of V");
        begin(e, KIND_ZEROS, 130, 200, 8 * (1 + i));
        check(e, "zero Q, zero V");
    }
}

static void empty(struct edges *e)
{
    const int64_t sizes[][2] = {{3, 0}, {0, 5}, {0, 0}, {200, 0}, {1, 1}, {1, 2}, {300, 1}};

    for (size_t i = 0; i < sizeof sizes / sizeof sizes[0]; i++) {
        begin(e, KIND_NORMAL, sizes[i][0], sizes[i][1], 64);
        check(e, "few or no rows or keys");
        begin(e, KIND_NORMAL, sizes[i][0], sizes[i][1], 64)->smooth_k = false;
        check(e, "few or no rows or keys");
    }
    problem_reset(e->p, e->seed);
    problem_plain(e->p, e->dtype, e->variant, 0, 2, 2, 10, 10, 64);
    check(e, "no batch");
}

static void head_dims(struct edges *e)
{
    for (int64_t d = 8; d <= 256; d += 8) {
        begin(e, KIND_NORMAL, 150, 210, d)->causal = d % 16 == 0;
        check(e, "head dimension");
    }
}

/* Keys are quantised in chunks of 256; on Hopper up to 16 or 32 of them by a cluster of blocks. */
static void chunks(struct edges *e)
{
    const int64_t counts[] = {1, 2, 3, 7, 8, 9, 15, 16, 17, 31, 33};
    const int64_t dims[] = {64, 72, 96, 128, 136};

    for (int i = 0; i < 11 * 4; i++) {
        const int64_t nk = 256 * counts[i / 4] - (i % 2 ? 255 : 0), d = dims[i % 5];
        struct sage_attn *a = begin(e, KIND_NORMAL, 70, nk, d);
        const struct sage_tensor *spoilt = i % 8 == 2 ? &a->k : &a->v;

        a->smooth_k = i % 8 != 2;
        a->smooth_v = e->variant == SAGE_INT8_FP8 && i % 3 == 0;
        check(e, "chunks of keys");
        if (i % 4 < 2)
            continue;
        e->p->spoil = (struct spoil){spoilt == &a->k ? 1 : 2, INFINITY, 0, 1, nk - 1, 7};
        put(spoilt, 0, 1, nk - 1, 7, INFINITY);
        check(e, "chunks of keys and an Inf in the last");
    }
}

/* Rows that the band hides altogether; windows beyond the end. */
static void bands(struct edges *e)
{
    const int64_t windows[][2] = {{0, 0}, {1000, 1000}, {-1, 0}, {5, -1}, {64, 63}, {0, 500}};

    for (int i = 0; i < 6 * 4; i++) {
        struct sage_attn *a = begin(e, KIND_NORMAL, i / 6 % 2 ? 300 : 20, i / 6 % 2 ? 40 : 300, 64);

        a->diagonal = i / 12 ? SAGE_TOP_LEFT : SAGE_BOTTOM_RIGHT;
        a->window_left = windows[i % 6][0];
        a->window_right = windows[i % 6][1];
        check(e, "windows");
    }
}

/* K's mean moves scores by hundreds of nats and lse with them; o must not notice. */
static void far_mean(struct edges *e)
{
    for (int64_t nk = 300; nk <= 20300; nk += 10000) { /* then of a sample */
        struct sage_attn *a = begin(e, KIND_NORMAL, 70, nk, 64);
        struct rng rng;

        rng_init(&rng, e->seed);
        for (int64_t h = 0; h < 2; h++)
            for (int64_t n = 0; n < nk; n++)
                for (int64_t c = 0; c < 64; c++)
                    put(&a->k, 0, h, n, c, 40 * sin((double)c) + 0.01 * rng_normal(&rng));
        problem_find_flip(e->p);
        check(e, "lse with a far mean of K");
    }
}

/* V at the ends of binary16: rounding it to e4m3 around its mean must not push o over the edge. */
static void largest(struct edges *e)
{
    struct sage_attn *a = begin(e, KIND_NORMAL, 8, 64, 64);
    const double top = e->dtype == SAGE_F16 ? 65504 : 0x1p100;

    a->smooth_v = e->variant == SAGE_INT8_FP8;
    put_all(&a->q, 0);
    put_all(&a->v, top);
    for (int64_t c = 0; c < 64; c++)
        put(&a->v, 0, 0, 0, c, -top);
    a->window_left = a->window_right = 0;
    check(e, "V at the ends of its range");
}

/* Scores that overflow must not come out as numbers; all at -inf is not the same as no key. */
static void overflow(struct edges *e)
{
    for (int i = 0; i < 4; i++) {
        struct sage_attn *a = begin(e, KIND_NORMAL, i / 2 ? 40 : 4, 40, 64);

        a->scale = 1e38f;
        a->smooth_k = false;
        put_all(&a->q, 1000);
        put_all(&a->k, i % 2 ? -1000 : 1000);
        e->p->flip = 0;
        e->p->overflows = true;
        check(e, "scores that overflow");
    }
}

/* Each row 127 and integers below: INT8 with a step of 1 has them as they are. */
static void put_integers(const struct sage_tensor *t, struct rng *rng)
{
    for (int64_t h = 0; h < t->shape[1]; h++)
        for (int64_t n = 0; n < t->shape[2]; n++)
            for (int64_t c = 0; c < t->shape[3]; c++)
                put(t, 0, h, n, c,
                    c == 0 ? 127 : fmax(-127, fmin(127, rint(30 * rng_normal(rng)))));
}

/* A score's last digit is more than P has room for. */
static void huge_scores(struct edges *e)
{
    const double values[] = {4000, 8000, 10000, 20000, -30000};

    for (int i = 0; i < 5 * 4; i++) {
        struct sage_attn *a = begin(e, KIND_NORMAL, 150, 200, i / 5 % 2 ? 64 : 128);

        a->causal = i / 10;
        a->smooth_k = false;
        put_all(&a->q, fabs(values[i % 5]));
        put_all(&a->k, values[i % 5]);
        e->p->flip = 0;
        check(e, "equal scores of billions");
    }
}

/* A step of the integers is a factor of many: m moves by thousands, and a few keys have it all. */
static void steep(struct edges *e)
{
    for (int64_t d = 64; d <= 128; d += 64) {
        struct sage_attn *a = begin(e, KIND_NORMAL, 150, 1000, d);
        struct rng rng;

        rng_init(&rng, e->seed + (uint64_t)d);
        put_integers(&a->q, &rng);
        put_integers(&a->k, &rng);
        a->smooth_k = false;
        a->scale = 10;
        e->p->flip = 0;
        check(e, "scores of hundreds of thousands");
    }
}

/* Batches may be quantised by another kernel than sequences; results are the same, bit by bit. */
static void both_ways(struct edges *e)
{
    static char before[ARENA];
    const int64_t dims[] = {64, 96, 128};

    for (int i = 0; i < 9; i++) {
        struct sage_attn *a = begin(e, KIND_K_OFFSET, 200, 300 + 480 * i, dims[i % 3]);
        char why[256] = "";

        a->causal = true; /* or keys of batches might be split */
        for (int varlen = 0; varlen < 2; varlen++) {
            memcpy(before, e->p->gpu, e->p->used);
            a->n_seqs = varlen;
            e->p->offsets[0][1] = (int32_t)a->q.shape[2];
            e->p->offsets[1][1] = (int32_t)a->k.shape[2];
            a->q_offsets = e->p->offsets[0];
            a->k_offsets = e->p->offsets[1];
            gpu_upload(e->gpu, e->p);
            const struct sage_attn there = gpu_attn(e->p);
            gpu_workspace(e->gpu, sage_attn_cuda_workspace(&there, NULL));
            expect(e, enqueue(e, e->p, e->gpu->stream, why, sizeof why) == 0, "both ways", why);
            gpu_download(e->gpu, e->p);
            gpu_release(e->gpu, e->p);
        }
        expect(e, !memcmp(before, e->p->gpu, e->p->used), "both ways", "other results");
    }
}

/* Fewer tiles of rows than processors: tiles are smaller, or the keys of each are split. */
static void few_tiles(struct edges *e)
{
    const int64_t rows[] = {65, 128, 200, 300, 511}, keys[] = {512, 1023, 1024, 2100, 4097},
                  dims[] = {64, 128, 256, 96, 200};

    for (int i = 0; i < 25; i++) {
        begin(e, i % 4 ? KIND_NORMAL : KIND_ONES, rows[i % 5], keys[i / 5], dims[i * 2 % 5]);
        e->p->cut = i % 3 == 1;
        check(e, "few tiles");
    }
}

/* --- Inf and NaN --- */

static void spoil(struct edges *e, int which, double value, int64_t d, int64_t row, int64_t c)
{
    struct sage_attn *a = begin(e, KIND_NORMAL, 150, 200, d);
    const struct sage_tensor *t = which == 0 ? &a->q : which == 1 ? &a->k : &a->v;
    const int64_t head = which == 0 ? 3 : 1;

    a->causal = true;
    a->diagonal = row % 2 ? SAGE_TOP_LEFT : SAGE_BOTTOM_RIGHT;
    a->smooth_v = e->variant == SAGE_INT8_FP8 && c % 2;
    a->smooth_k = row % 4 != 0;
    if (which == 0)
        row = row % 150;
    e->p->spoil = (struct spoil){which, value, 0, head, row, c};
    put(t, 0, head, row, c, value);
    check(e, "NaN or Inf");
}

static void spoils(struct edges *e)
{
    const double values[] = {NAN, -NAN, INFINITY, -INFINITY};
    const int64_t dims[] = {64, 72, 128, 256}, rows[] = {0, 63, 64, 130, 199};

    for (int i = 0; i < 4 * 3 * 4; i++) {
        const int64_t d = dims[i % 4], columns[] = {0, 9, d - 1};

        for (int j = 0; j < 5; j++)
            spoil(e, i / 4 % 3, values[(i / 12 + j) % 4], d, rows[j], columns[(i + j) % 3]);
    }
}

/* In an additive mask any NaN and +Inf are contagious; -FLT_MAX is a number. */
static void bad_masks(struct edges *e)
{
    const uint32_t bits[] = {0x7fc00000, 0x7fffffff, 0xffffffff, 0x7f800001, 0x7f800000};

    for (int i = 0; i < 6 * 2; i++) {
        const int64_t rows = i < 6 ? 4 : 100;
        struct sage_attn *a = begin(e, KIND_NORMAL, rows, 150, 64);

        a->mask = problem_take(e->p, SAGE_F32, HND, 0, 1, 1, rows, 150);
        put_all(&a->mask, 0);
        for (int64_t j = 0; j < 150; j++)
            put(&a->mask, 0, 0, 1, j, (double)-FLT_MAX);
        if (i % 6 < 5)
            memcpy((float *)a->mask.data + 2 * 150 + 31 * (i % 6), &bits[i % 6], 4);
        check(e, "NaN and Inf in a mask");
    }
}

/* A row from which the mask hides every key sees nothing, even of a NaN in a key or in itself. */
static void hidden_rows(struct edges *e)
{
    for (int i = 0; i < 6 * 2; i++) {
        const int64_t rows = i < 6 ? 100 : 30, hidden = rows - 4;
        const enum sage_dtype dtype = i % 6 < 2 ? SAGE_BOOL : i % 6 < 4 ? SAGE_F32 : e->dtype;
        struct sage_attn *a = begin(e, KIND_NORMAL, rows, 150, i % 2 ? 64 : 128);

        a->smooth_k = i % 6 >= 3;
        a->mask = problem_take(e->p, dtype, HND, 0, 1, 1, rows, 150);
        put_all(&a->mask, dtype == SAGE_BOOL);
        for (int64_t j = 0; j < 150; j++)
            put(&a->mask, 0, 0, hidden, j, dtype == SAGE_BOOL ? 0 : -INFINITY);
        e->p->spoil = (struct spoil){1, NAN, 0, 0, 70, 3};
        put(&a->k, 0, 0, 70, 3, NAN);
        check(e, "hidden row and a NaN in a key");
        e->p->spoil = (struct spoil){0, NAN, 0, 2, hidden, 3};
        put(&a->k, 0, 0, 70, 3, 0);
        put(&a->q, 0, 2, hidden, 3, NAN);
        check(e, "hidden row that is NaN itself");
    }
}

/* --- few rows: those of all query heads of a kv head are a tile, whose keys are split --- */

static const struct few {
    int64_t gqa, nq;
} fews[] = {{1, 1},  {2, 1},  {4, 1},  {1, 16}, {1, 17}, {8, 2},  {3, 11}, {8, 4},
            {5, 12}, {4, 16}, {1, 64}, {64, 1}, {9, 7},  {1, 65}, {65, 1}, {2, 31}};
enum { N_FEW = sizeof fews / sizeof fews[0] };

static void few_sizes(struct edges *e)
{
    const int64_t keys[] = {1, 2, 63, 64, 65, 127, 129, 1000, 4097},
                  dims[] = {64, 128, 256, 8, 200};

    for (int i = 0; i < 9 * N_FEW; i++) {
        const struct few *few = &fews[i % N_FEW];
        struct sage_attn *a =
            begin_gqa(e, KIND_NORMAL, few->gqa, few->nq, keys[i / N_FEW], dims[i % 5]);

        a->causal = i % 3 == 0;
        a->diagonal = i / 2 % 2 ? SAGE_TOP_LEFT : SAGE_BOTTOM_RIGHT;
        e->p->cut = i % 4 == 1;
        check(e, "few rows");
    }
}

/* Many keys: more splits than a block merges at a time, and as many as there may be. */
static void few_long(struct edges *e)
{
    const int64_t keys[] = {2048, 5000, 16384, 40000};

    for (int i = 0; i < 8; i++) {
        const struct few *few = &fews[(i * 5 + i / 4) % N_FEW];

        begin_gqa(e, i % 3 ? KIND_NORMAL : KIND_ONES, few->gqa, few->nq, keys[i % 4],
                  i % 4 < 2 ? 256
                  : i % 2   ? 64
                            : 128);
        check(e, "few rows, many keys");
    }
}

/* Whole splits that a row, or all rows, do not see; rows that see no key. */
static void few_bands(struct edges *e)
{
    const int64_t windows[][2] = {{0, 0}, {10, 10}, {-1, 0}, {300, -1}, {2000, 100}, {9000, 9000}};

    for (int i = 0; i < 6 * 2 * 4; i++) {
        struct sage_attn *a = begin_gqa(e, i % 5 ? KIND_NORMAL : KIND_ONES, i % 3 + 1,
                                        i % 7 ? 16 : 1, i / 24 ? 4000 : 9, i % 2 ? 64 : 128);

        a->diagonal = i / 6 % 2 ? SAGE_TOP_LEFT : SAGE_BOTTOM_RIGHT;
        a->window_left = windows[i % 6][0];
        a->window_right = windows[i % 6][1];
        e->p->cut = i / 12 % 2;
        check(e, "few rows, windows");
    }
}

/* Keys that the mask hides from all rows, or from one head's, whole splits of them, too. */
static void few_masks(struct edges *e)
{
    for (int i = 0; i < 2 * N_FEW; i++) {
        const struct few *few = &fews[i % N_FEW];
        const int64_t nk = i / N_FEW ? 5000 : 150;
        struct sage_attn *a =
            begin_gqa(e, i % 3 ? KIND_NORMAL : KIND_ONES, few->gqa, few->nq, nk, i % 2 ? 64 : 128);
        const int64_t heads = i / 2 % 2 ? a->q.shape[1] : 1, rows = i / 4 % 2 ? few->nq : 1;

        a->mask = problem_take(e->p, i % 3 ? SAGE_BOOL : SAGE_F32, HND, 0, 1, heads, rows, nk);
        put_all(&a->mask, i % 3 ? 1 : 0);
        for (int64_t j = 0; j < nk; j++)
            if (j % 1000 > 100)
                put(&a->mask, 0, heads - 1, rows - 1, j, i % 3 ? 0 : -INFINITY);
        e->p->cut = i % 4 == 1;
        check(e, "few rows, masks");
    }
}

static void few_sequences(struct edges *e)
{
    for (int i = 0; i < 12; i++) {
        struct sage_attn *a = begin_gqa(e, i % 3 ? KIND_NORMAL : KIND_ONES, i % 2 ? 4 : 1, 20, 9000,
                                        i % 4 ? 64 : 128);

        memcpy(e->p->offsets[0], (int32_t[]){0, 1, 1, 4, 19, 20}, 24);
        memcpy(e->p->offsets[1], (int32_t[]){0, 3000, 3400, 3400, 3529, 9000}, 24);
        a->n_seqs = 5;
        a->q_offsets = e->p->offsets[0];
        a->k_offsets = e->p->offsets[1];
        a->causal = i / 2 % 2;
        a->diagonal = i % 2 ? SAGE_TOP_LEFT : SAGE_BOTTOM_RIGHT;
        a->window_left = i / 4 % 2 ? 500 : SAGE_UNLIMITED;
        e->p->cut = i / 6;
        check(e, "few rows of sequences");
    }
}

/* K's mean is never taken: lse is as good far from zero. */
static void few_far_mean(struct edges *e)
{
    struct sage_attn *a = begin_gqa(e, KIND_NORMAL, 4, 3, 3000, 64);

    for (int64_t h = 0; h < 2; h++)
        for (int64_t n = 0; n < 3000; n++)
            for (int64_t c = 0; c < 64; c++)
                put(&a->k, 0, h, n, c, 40 * sin((double)c) + 0.01 * rng_normal(&e->p->rng));
    check(e, "few rows, lse with a far mean of K");
}

static void few_spoils(struct edges *e)
{
    const double values[] = {NAN, -NAN, INFINITY, -INFINITY};

    for (int i = 0; i < 3 * 4 * 3; i++) {
        struct sage_attn *a = begin_gqa(e, KIND_NORMAL, 3, 5, 1500, i % 2 ? 128 : 72);
        const int which = i % 3;
        const struct sage_tensor *t = which == 0 ? &a->q : which == 1 ? &a->k : &a->v;
        const int64_t row = which == 0 ? i % 5 : rng_below(&e->p->rng, 1500), c = i % 72;
        const int64_t head = which == 0 ? 4 : 1;

        a->window_left = i / 12 ? 1000 : SAGE_UNLIMITED;
        e->p->spoil = (struct spoil){which, values[i / 3 % 4], 0, head, row, c};
        put(t, 0, head, row, c, values[i / 3 % 4]);
        check(e, "few rows, NaN or Inf");
    }
}

static void few_rows(struct edges *e)
{
    few_sizes(e);
    few_long(e);
    few_bands(e);
    few_masks(e);
    few_sequences(e);
    few_far_mean(e);
    few_spoils(e);
}

/* --- errors --- */

static void refused(struct edges *e)
{
    const struct sage_part bad[] = {
        {.group = -1, .n_groups = 1, .n_rows = -1},
        {.group = 0, .n_groups = 3, .n_rows = -1},
        {.group = 3, .n_groups = 0, .n_rows = -1},
        {.n_groups = 2, .row = 0, .n_rows = 5},
        {.n_groups = 1, .row = 5, .n_rows = 6},
        {.n_groups = 1, .row = 1, .n_rows = -1},
        {.n_groups = 1, .row = -1, .n_rows = 1},
        {.n_groups = 1, .row = INT64_MAX, .n_rows = 2},
        {.n_groups = 1, .n_rows = -1, .head = 1, .n_heads = 2},
        {.n_groups = 2, .n_rows = -1, .head = 0, .n_heads = 1},
        {.group = 1, .n_groups = INT64_MAX, .n_rows = -1},
    };
    struct gpu *gpu = e->gpu;
    char why[256] = "";

    begin(e, KIND_NORMAL, 10, 10, 64);
    gpu_upload(gpu, e->p);
    const struct sage_attn a = gpu_attn(e->p);
    const size_t bytes = sage_attn_cuda_workspace(&a, NULL);
    char *w = gpu_workspace(gpu, bytes + 256);

    expect(e, bytes > 0 && bytes < 1 << 20, "sage_attn_cuda_workspace", "implausible");
    expect(e,
           sage_attn_cuda(&a, NULL, w, bytes - 1, gpu->stream, why, sizeof why) ==
                   SAGE_EWORKSPACE &&
               *why,
           "workspace too small", why);
    expect(e, sage_attn_cuda(&a, NULL, w, 0, gpu->stream, NULL, 0) == SAGE_EWORKSPACE,
           "no workspace, no text", "");
    expect(e, sage_attn_cuda(&a, NULL, w + 64, bytes, gpu->stream, why, sizeof why) == SAGE_EINVAL,
           "misaligned workspace", why);
    for (size_t i = 0; i < sizeof bad / sizeof bad[0]; i++) {
        expect(e,
               sage_attn_cuda(&a, &bad[i], w, bytes, gpu->stream, why, sizeof why) == SAGE_EINVAL,
               "illegal part", why);
        expect(e, sage_attn_cuda_workspace(&a, &bad[i]) == SIZE_MAX, "illegal part",
               "sage_attn_cuda_workspace");
    }
    gpu_download(gpu, e->p);
    gpu_release(gpu, e->p);
    expect(e, !memcmp(e->p->gpu, e->p->host, e->p->used), "refused calls", "wrote something");
}

static void no_fp8(struct edges *e)
{
    char why[256] = "";

    e->variant = SAGE_INT8_FP8;
    begin(e, KIND_NORMAL, 10, 10, 64);
    gpu_upload(e->gpu, e->p);
    const struct sage_attn a = gpu_attn(e->p);
    const size_t bytes = sage_attn_cuda_workspace(&a, NULL);

    expect(e,
           sage_attn_cuda(&a, NULL, gpu_workspace(e->gpu, bytes), bytes, e->gpu->stream, why,
                          sizeof why) == SAGE_EUNSUPPORTED &&
               *why,
           "int8_fp8 on a GPU without it", why);
    gpu_release(e->gpu, e->p);
}

/* --- streams --- */

static void prepare(struct edges *e, int64_t nq, int64_t nk, bool varlen)
{
    struct sage_attn *a = begin(e, KIND_NORMAL, nq, nk, 128);

    if (varlen) {
        const int32_t q = (int32_t)nq, k = (int32_t)nk;

        memcpy(e->p->offsets[0], (int32_t[]){0, q / 3, q / 3, q}, 16);
        memcpy(e->p->offsets[1], (int32_t[]){0, k / 6, k - 40, k}, 16);
        a->n_seqs = 3;
        a->q_offsets = e->p->offsets[0];
        a->k_offsets = e->p->offsets[1];
    }
    gpu_upload(e->gpu, e->p);
    const struct sage_attn there = gpu_attn(e->p);

    gpu_workspace(e->gpu, sage_attn_cuda_workspace(&there, NULL));
    MUST(cudaStreamSynchronize(e->gpu->stream));
}

static void judge(struct edges *e, const char *what)
{
    struct distance far;
    char why[512];

    e->checks++;
    if (!gpu_judge(e->gpu, e->p, 0, &far, why, sizeof why))
        report(e, e->p, what, why);
}

static void sleep_on_stream(void *arg)
{
    (void)arg;
    usleep(300000);
}

static double now(void)
{
    struct timespec t;

    clock_gettime(CLOCK_MONOTONIC, &t);
    return (double)t.tv_sec + 1e-9 * (double)t.tv_nsec;
}

/* The call returns while the stream is busy, and does not look at the offsets later. */
static void asynchronous(struct edges *e)
{
    for (int i = 0; i < 4; i++) {
        const bool varlen = i % 2;
        int32_t saved[2][TEST_SEQS + 1];
        char why[256] = "";

        prepare(e, i / 2 ? 6 : 300, i / 2 ? 3000 : 300, varlen);
        MUST(cudaLaunchHostFunc(e->gpu->stream, sleep_on_stream, NULL));
        const double start = now();
        const int status = enqueue(e, e->p, e->gpu->stream, why, sizeof why);
        const double took = now() - start;

        memcpy(saved, e->p->offsets, sizeof saved);
        memset(e->p->offsets, 0, sizeof saved);
        expect(e, status == 0, "busy stream", why);
        expect(e, took < 0.1, "busy stream", "sage_attn_cuda() waited for it");
        MUST(cudaStreamSynchronize(e->gpu->stream));
        memcpy(e->p->offsets, saved, sizeof saved);
        judge(e, varlen ? "offsets changed after the call" : "busy stream");
    }
}

static void legacy_stream(struct edges *e)
{
    char why[256] = "";

    prepare(e, 300, 300, false);
    expect(e, enqueue(e, e->p, NULL, why, sizeof why) == 0, "legacy stream", why);
    MUST(cudaStreamSynchronize(NULL));
    judge(e, "legacy stream");
}

/* A captured call can be replayed: also in a workspace that another call has used meanwhile. */
static void replayed(struct edges *e, int64_t nq, int64_t nk)
{
    cudaStream_t s = e->gpu->stream;
    cudaGraphExec_t exec;
    cudaGraph_t graph = NULL;
    int64_t bytes;
    char why[256] = "";

    prepare(e, nq, nk, false);
    const struct sage_tensor o = gpu_attn(e->p).o;

    sage_tensor_bytes(&o, &bytes);
    MUST(cudaStreamBeginCapture(s, cudaStreamCaptureModeThreadLocal));
    const int status = enqueue(e, e->p, s, why, sizeof why);

    MUST(cudaStreamEndCapture(s, &graph));
    expect(e, status == 0, "capture", why);
    MUST(cudaGraphInstantiate(&exec, graph, 0));
    for (int i = 0; i < 4; i++) {
        if (i == 2)
            expect(e, enqueue(e, e->p, s, why, sizeof why) == 0, "between replays", why);
        MUST(cudaMemsetAsync(o.data, 0xff, (size_t)bytes, s));
        MUST(cudaGraphLaunch(exec, s));
    }
    judge(e, "replayed graph");
    MUST(cudaGraphExecDestroy(exec));
    MUST(cudaGraphDestroy(graph));
}

/* A call with sequences is refused, and does not break the capture. */
static void not_captured(struct edges *e)
{
    cudaStream_t s = e->gpu->stream;
    cudaGraph_t graph = NULL;
    char why[256] = "";

    prepare(e, 300, 300, true);
    MUST(cudaStreamBeginCapture(s, cudaStreamCaptureModeThreadLocal));
    expect(e, enqueue(e, e->p, s, why, sizeof why) == SAGE_ECAPTURE, "capture of sequences", why);
    MUST(cudaStreamEndCapture(s, &graph));
    if (graph)
        MUST(cudaGraphDestroy(graph));
    gpu_release(e->gpu, e->p);
}

/* One of several threads, each with a stream, a workspace and a problem of its own. */
struct worker {
    pthread_t thread;
    struct problem *p;
    struct sage_attn attn;
    cudaStream_t stream;
    void *workspace;
    size_t bytes;
    int status;
};

static void *work(void *arg)
{
    struct worker *w = arg;

    MUST(cudaSetDevice(0));
    for (int i = 0; i < 50 && !w->status; i++)
        w->status = sage_attn_cuda(&w->attn, NULL, w->workspace, w->bytes, w->stream, NULL, 0);
    MUST(cudaStreamSynchronize(w->stream));
    return NULL;
}

static void worker_init(struct edges *e, struct worker *w, int i)
{
    *w = (struct worker){.p = problem_create()};
    problem_reset(w->p, e->seed + (uint64_t)i);
    if (i % 2) { /* few rows, split keys */
        w->p->kind = KIND_NORMAL;
        problem_plain(w->p, SAGE_F16, SAGE_INT8_FP16, 1, 2, 4, 1 + i, 3000 * i, 64);
    } else {
        problem_random(w->p, 600, e->gpu->fp8);
    }
    gpu_upload(e->gpu, w->p);
    w->attn = gpu_attn(w->p);
    w->bytes = sage_attn_cuda_workspace(&w->attn, NULL);
    MUST(cudaMalloc(&w->workspace, w->bytes + 256));
    MUST(cudaStreamCreateWithFlags(&w->stream, cudaStreamNonBlocking));
}

static void threads(struct edges *e)
{
    enum { WORKERS = 6 };
    const bool separate = e->gpu->separate;
    struct worker workers[WORKERS];
    struct distance far;
    char why[512];

    e->gpu->separate = true;
    for (int i = 0; i < WORKERS; i++)
        worker_init(e, &workers[i], i);
    MUST(cudaDeviceSynchronize());
    for (int i = 0; i < WORKERS; i++)
        pthread_create(&workers[i].thread, NULL, work, &workers[i]);
    for (int i = 0; i < WORKERS; i++)
        pthread_join(workers[i].thread, NULL);
    for (int i = 0; i < WORKERS; i++) {
        struct worker *w = &workers[i];

        expect(e, w->status == 0, "threads", sage_errname(w->status));
        if (!gpu_judge(e->gpu, w->p, 0, &far, why, sizeof why))
            report(e, w->p, "threads", why);
        MUST(cudaFree(w->workspace));
        MUST(cudaStreamDestroy(w->stream));
        problem_destroy(w->p);
    }
    e->gpu->separate = separate;
}

static void values(struct edges *e)
{
    void (*const tests[])(struct edges *) = {
        ones,     constants, empty,       head_dims, chunks,    bands,     far_mean,    largest,
        overflow, steep,     huge_scores, both_ways, few_tiles, bad_masks, hidden_rows, spoils};

    for (size_t i = 0; i < sizeof tests / sizeof tests[0]; i++)
        tests[i](e);
    /* the same in both variants */
    if (!e->gpu->fp8 || (e->variant == SAGE_INT8_FP8) == (e->dtype == SAGE_BF16))
        few_rows(e);
}

/* On Hopper what has few scores for each key is exact, in tiles of so many rows; others are not. */
static void chosen(struct edges *e)
{
    const struct {
        enum sage_variant variant;
        int64_t gqa, nq, nk, d;
        int rows; /* 0: not exact */
    } cases[] = {{SAGE_INT8_FP16, 2, 3200, 300, 64, 64},    {SAGE_INT8_FP16, 2, 5000, 300, 64, 192},
                 {SAGE_INT8_FP16, 2, 300, 300, 64, 64},     {SAGE_INT8_FP16, 2, 200, 200, 136, 64},
                 {SAGE_INT8_FP16, 16, 2300, 300, 64, 192},  {SAGE_INT8_FP16, 16, 2310, 300, 64, 0},
                 {SAGE_INT8_FP16, 2, 100, 5000, 64, 64},    {SAGE_INT8_FP16, 2, 100, 5000, 128, 64},
                 {SAGE_INT8_FP16, 2, 2560, 5120, 128, 128}, {SAGE_INT8_FP16, 2, 2561, 5120, 128, 0},
                 {SAGE_INT8_FP16, 2, 1280, 5121, 128, 64},  {SAGE_INT8_FP16, 2, 1281, 5121, 128, 0},
                 {SAGE_INT8_FP16, 2, 2560, 300, 256, 128},  {SAGE_INT8_FP16, 2, 2561, 300, 256, 0},
                 {SAGE_INT8_FP16, 2, 512, 5121, 256, 64},   {SAGE_INT8_FP16, 2, 513, 5121, 256, 0},
                 {SAGE_INT8_FP8, 2, 4608, 300, 64, 192},    {SAGE_INT8_FP8, 2, 4609, 300, 64, 0},
                 {SAGE_INT8_FP8, 2, 1280, 300, 128, 64},    {SAGE_INT8_FP8, 2, 1281, 300, 128, 0},
                 {SAGE_INT8_FP8, 2, 1280, 5121, 128, 64},   {SAGE_INT8_FP8, 2, 512, 5121, 256, 64}};

    const enum sage_variant variant = e->variant;
    int major, minor;

    MUST(cudaDeviceGetAttribute(&major, cudaDevAttrComputeCapabilityMajor, 0));
    MUST(cudaDeviceGetAttribute(&minor, cudaDevAttrComputeCapabilityMinor, 0));
#ifdef HAVE_SM_90A
    if (major != 9 || minor != 0)
#endif
        return;
    for (size_t i = 0; i < sizeof cases / sizeof cases[0]; i++) {
        e->variant = cases[i].variant;
        begin_gqa(e, KIND_NORMAL, cases[i].gqa, cases[i].nq, cases[i].nk, cases[i].d);
        gpu_upload(e->gpu, e->p);
        const struct sage_attn a = gpu_attn(e->p);
        const int kernel = sage_cuda_kernel(&a);
        const int rows = kernel < sage_kernel_first_exact() ? 0 : sage_kernels[kernel].tile_q;

        expect(e, rows == cases[i].rows, "which kernel", sage_kernels[kernel].name);
        gpu_release(e->gpu, e->p);
    }
    e->variant = variant;
}

int gpu_edges(struct gpu *gpu, uint64_t seed)
{
    struct edges e = {.gpu = gpu, .p = problem_create(), .seed = seed};
    const double exact_share = sage_exact_share;
    const double start = now();

    printf("# seed %llu\n", (unsigned long long)seed);
    for (int i = 0; i < (gpu->fp8 ? 4 : 2); i++) {
        e.variant = i < 2 ? SAGE_INT8_FP16 : SAGE_INT8_FP8;
        e.dtype = i % 2 ? SAGE_BF16 : SAGE_F16;
        sage_exact_share = 0; /* short sequences are quantised as well */
        values(&e);
        sage_exact_share = exact_share;
        if (i < 2) { /* the same in both variants; smaller tiles, then larger ones */
            values(&e);
            sage_few_share = 0;
            values(&e);
            sage_few_share = 1;
        }
    }
    e.variant = SAGE_INT8_FP16;
    refused(&e);
    for (int i = 0; i < 2; i++) {
        sage_exact_share = i ? exact_share : 0;
        asynchronous(&e);
        legacy_stream(&e);
        replayed(&e, 300, 300);
        replayed(&e, 100, 5000); /* split keys */
        replayed(&e, 1, 300);
        replayed(&e, 3, 5000);
    }
    chosen(&e);
    not_captured(&e);
    threads(&e);
    if (!gpu->fp8)
        no_fp8(&e);
    printf("edges: %d checks, %d failed, %.1f s\n", e.checks, e.failures, now() - start);
    problem_destroy(e.p);
    return e.failures;
}
