/*
 * gpu_big.c - strides and tensors beyond 2^31 bytes and elements, 200K tokens, on the GPU.
 */
#include <cuda_runtime_api.h>
#include <math.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

#include "gpu_attn.h"
#include "kernels/half.h"
#include "kernels/kernels.h"
#include "ref64.h"

static bool room_for(size_t bytes, const char *what)
{
    size_t free = 0, total = 0;

    MUST(cudaMemGetInfo(&free, &total));
    if (free > bytes + (1u << 30))
        return true;
    printf("big: %s skipped: wants %zu MiB, %zu are free\n", what, bytes >> 20, free >> 20);
    return false;
}

static int verdict(const char *what, enum sage_variant variant, bool good, const char *why)
{
    printf("big: %s, %s: %s%s\n", what, sage_variant_name(variant), good ? "ok " : "FAILED ", why);
    fflush(stdout);
    return !good;
}

static bool run(struct gpu *gpu, const struct sage_attn *a, char *why, size_t len)
{
    const size_t bytes = sage_attn_cuda_workspace(a, NULL);
    int status;

    if ((status = sage_attn_check(a, why, len)))
        return false;
    gpu_workspace(gpu, bytes);
    status = sage_attn_cuda(a, NULL, gpu->workspace, bytes, gpu->stream, why, len);
    MUST(cudaStreamSynchronize(gpu->stream));
    if (!status && !gpu_workspace_sound(gpu, bytes))
        snprintf(why, len, "wrote outside its workspace");
    else if (!status)
        return true;
    return false;
}

/* --- one dimension with a stride that takes its last index 2^33 bytes away --- */

enum { N_TENSORS = 6 };
static const int64_t reach = INT64_C(1) << 33;

static void tensors_of(struct sage_attn *a, struct sage_tensor *t[N_TENSORS])
{
    memcpy(t, ((struct sage_tensor *[]){&a->q, &a->k, &a->v, &a->o, &a->lse, &a->mask}),
           sizeof(struct sage_tensor *) * N_TENSORS);
}

/*
 * Lay the tensors of an HND problem out again in `base`: each step of `axis` takes all of them
 * `period` bytes further; the rest of each is contiguous.
 */
static struct sage_attn spread(const struct problem *p, char *base, int axis, int64_t period)
{
    struct sage_attn a = p->attn;
    struct sage_tensor *t[N_TENSORS];

    tensors_of(&a, t);
    for (int i = 0; i < N_TENSORS; i++) {
        const int64_t size = (int64_t)sage_dtype_size(t[i]->dtype);
        int64_t step = 1;

        if (size == 0)
            continue; /* no mask */
        for (int dim = 3; dim >= 0; dim--) {
            t[i]->stride[dim] = dim == axis ? period / size : step;
            step *= dim == axis ? 1 : t[i]->shape[dim];
        }
        t[i]->data = base;
        base += (step * size + 255) / 256 * 256;
    }
    return a;
}

static char *row_of(const struct sage_tensor *t, int64_t b, int64_t h, int64_t n)
{
    const int64_t at = b * t->stride[0] + h * t->stride[1] + n * t->stride[2];

    return (char *)t->data + t->offset + at * (int64_t)sage_dtype_size(t->dtype);
}

/* Row by row, as strides on the two sides differ. */
static void copy(const struct sage_tensor *to, const struct sage_tensor *from,
                 enum cudaMemcpyKind k)
{
    for (int64_t b = 0; b < to->shape[0]; b++)
        for (int64_t h = 0; h < to->shape[1]; h++)
            for (int64_t n = 0; n < to->shape[2]; n++)
                MUST(cudaMemcpy(row_of(to, b, h, n), row_of(from, b, h, n),
                                (size_t)to->shape[3] * sage_dtype_size(to->dtype), k));
}

/* Each has kernels of its own. */
enum path { MASKED, QUANTISED, EXACT, N_PATHS };

static void make_strided(struct problem *p, const struct gpu *gpu, int n, enum path path,
                         uint64_t seed)
{
    problem_reset(p, seed + (uint64_t)n);
    problem_plain(p, n % 4 < 2 ? SAGE_F16 : SAGE_BF16,
                  n % 2 && gpu->fp8 ? SAGE_INT8_FP8 : SAGE_INT8_FP16, 2, 2, 2, 67, 65, 72);
    if (path != MASKED)
        return;
    p->attn.mask = problem_take(p, SAGE_F32, HND, 0, 2, 4, 67, 65);
    put_all(&p->attn.mask, 0);
    for (int64_t i = 0; i < 67; i++)
        put(&p->attn.mask, i % 2, i % 4, i, i % 65, -INFINITY);
}

static int strided(struct gpu *gpu, struct problem *p, enum path path, uint64_t seed)
{
    const char *const axes[] = {"batch", "head", "row"};
    const char *const paths[] = {"masked", "quantised", "exact"};
    char what[96], why[512], *base;
    struct distance far;
    int failures = 0;

    if (!room_for((size_t)reach + (64 << 20), "strides"))
        return 0;
    MUST(cudaMalloc((void **)&base, (size_t)reach + (64 << 20)));
    for (int n = 0; n < 3 * 4; n++) {
        const int axis = n / 4;
        struct sage_tensor *from[N_TENSORS], *to[N_TENSORS];

        make_strided(p, gpu, n, path, seed);
        /* the fewest steps are those of kv heads, or keys; each is of 16 bytes, or of 4 */
        const int64_t steps = axis == 0 ? 1 : axis == 1 ? 3 : 66, unit = n % 4 % 3 ? 16 : 4;
        const int64_t period = (reach / steps / 256 * 16 + 1) * 16 / unit * unit + (unit - 16) % 16;
        struct sage_attn a = spread(p, base, axis, period), image = attn_in_image(p, p->gpu);

        tensors_of(&p->attn, from);
        tensors_of(&a, to);
        for (int i = 0; i < N_TENSORS; i++)
            copy(to[i], from[i], cudaMemcpyHostToDevice);
        bool good = run(gpu, &a, why, sizeof why);

        memcpy(p->gpu, p->host, p->used);
        copy(&image.o, &a.o, cudaMemcpyDeviceToHost);
        copy(&image.lse, &a.lse, cudaMemcpyDeviceToHost);
        if (good) {
            why[0] = 0;
            gpu_ask(p, &a);
            good = gpu_compare(gpu, p, 1, &far, why, sizeof why);
        }
        snprintf(what, sizeof what, "%s, stride of a %s %lld bytes", paths[path], axes[axis],
                 (long long)period);
        failures += verdict(what, a.variant, good, why);
    }
    MUST(cudaFree(base));
    return failures;
}

/* --- many tokens --- */

enum { POOL = 1 << 20, MAX_D = SAGE_MAX_HEAD_DIM };

enum pool { Q_POOL, KV_POOL, N_POOLS };

/*
 * f16 rows of normal numbers: pieces of a pool, from random places in it. Q has one of its own: a
 * row that is also a key would have a score of 11 nats with it, and e4m3 no numbers for the P of
 * all others, which have most of the weight.
 */
static void fill(uint16_t *to, int64_t rows, int64_t d, enum pool which, struct rng *rng)
{
    static uint16_t pools[N_POOLS][POOL + MAX_D];
    uint16_t *const pool = pools[which];

    for (int i = 0; i < POOL + MAX_D && !pool[POOL]; i++)
        pool[i] = f16_from_f32((float)rng_normal(rng));
    for (int64_t i = 0; i < rows; i++)
        memcpy(to + i * d, pool + rng_below(rng, POOL), (size_t)d * 2);
}

static struct sage_tensor tensor(enum sage_dtype dtype, int64_t heads, int64_t n, int64_t d,
                                 bool device)
{
    const size_t bytes = (size_t)(heads * n * d) * sage_dtype_size(dtype);
    struct sage_tensor t = {
        .dtype = dtype, .shape = {1, heads, n, d}, .stride = {heads * n * d, n * d, d, 1}};

    if (device)
        MUST(cudaMalloc(&t.data, bytes));
    else
        t.data = malloc(bytes);
    return t;
}

/* q [hq, nq, d] and k, v [hkv, nk, d], with o and lse. */
static struct sage_attn allocate(int64_t hq, int64_t hkv, int64_t nq, int64_t nk, int64_t d,
                                 bool device)
{
    struct sage_attn a = SAGE_ATTN_INIT;

    a.q = tensor(SAGE_F16, hq, nq, d, device);
    a.k = tensor(SAGE_F16, hkv, nk, d, device);
    a.v = tensor(SAGE_F16, hkv, nk, d, device);
    a.o = tensor(SAGE_F16, hq, nq, d, device);
    a.lse = tensor(SAGE_F32, hq, nq, 1, device);
    return a;
}

static void release(struct sage_attn *a, bool device)
{
    void *data[] = {a->q.data, a->k.data, a->v.data, a->o.data, a->lse.data};

    for (int i = 0; i < 5; i++)
        if (device)
            MUST(cudaFree(data[i]));
        else
            free(data[i]);
}

static void upload(const struct sage_tensor *to, const struct sage_tensor *from)
{
    int64_t bytes;

    sage_tensor_bytes(from, &bytes);
    MUST(cudaMemcpy(to->data, from->data, (size_t)bytes, cudaMemcpyHostToDevice));
}

static float f16_at(const uint16_t *row, int64_t c)
{
    return f16_to_f32(row[c]);
}

/* A row of o and lse on the device against r and its lse; relL1, and what is wrong. */
static double row_error(const struct sage_attn *a, int64_t head, int64_t row, const double *r,
                        double *lse)
{
    const int64_t d = a->q.shape[3];
    uint16_t o[MAX_D];
    double diff = 0, sum = 0;
    float got;

    MUST(cudaMemcpy(o, row_of(&a->o, 0, head, row), (size_t)d * 2, cudaMemcpyDeviceToHost));
    MUST(cudaMemcpy(&got, row_of(&a->lse, 0, head, row), 4, cudaMemcpyDeviceToHost));
    for (int64_t c = 0; c < d; c++) {
        diff += fabs((double)f16_at(o, c) - r[c]);
        sum += fabs(r[c]);
    }
    *lse = fabs((double)got - *lse);
    return diff / sum;
}

/* relL1 of a row as kernels may err on normal inputs; peers err by 0.013 and 0.037. */
static double limit(const struct sage_attn *a)
{
    return a->variant == SAGE_INT8_FP8 ? 0.08 : 0.03;
}

enum { SAMPLES = 24 };

static bool rows_are_close(const struct sage_attn *a, int64_t (*where)[2], const double *r,
                           const double *lse, char *why, size_t len)
{
    double worst = 0, worst_lse = 0;

    for (int i = 0; i < SAMPLES; i++) {
        double off = lse[i];

        worst = fmax(worst, row_error(a, where[i][0], where[i][1], r + i * a->q.shape[3], &off));
        worst_lse = fmax(worst_lse, off);
    }
    snprintf(why, len, "(worst row: relL1 %.5f, lse off by %.2g)", worst, worst_lse);
    return worst < limit(a) && worst_lse < 0.05;
}

/* 200K tokens, sampled rows against double precision. */
static int tokens_200k(struct gpu *gpu, uint64_t seed)
{
    enum { N = 200000, D = 128 };
    struct sage_attn host = allocate(2, 1, N, N, D, false), a = allocate(2, 1, N, N, D, true);
    double *r = malloc(sizeof *r * SAMPLES * D), lse[SAMPLES];
    int64_t where[SAMPLES][2];
    char what[64], why[512] = "";
    struct rng rng;
    int failures = 0;

    rng_init(&rng, seed);
    fill(host.q.data, 2 * N, D, Q_POOL, &rng);
    fill(host.k.data, N, D, KV_POOL, &rng);
    fill(host.v.data, N, D, KV_POOL, &rng);
    upload(&a.q, &host.q);
    upload(&a.k, &host.k);
    upload(&a.v, &host.v);
    for (int i = 0; i < SAMPLES; i++) {
        where[i][0] = i % 2;
        where[i][1] = i < 2 ? N - 1 : i < 4 ? 0 : i < 6 ? 131072 : rng_below(&rng, N);
    }
    for (int causal = 0; causal < 2; causal++) {
        host.causal = a.causal = causal;
        rows_in_fp64(&host, 0, where, SAMPLES, r, lse);
        for (a.variant = SAGE_INT8_FP16; a.variant <= (gpu->fp8 ? SAGE_INT8_FP8 : SAGE_INT8_FP16);
             a.variant++) {
            MUST(cudaMemset(a.o.data, 0xff, (size_t)2 * N * D * 2));
            const bool good =
                run(gpu, &a, why, sizeof why) && rows_are_close(&a, where, r, lse, why, sizeof why);

            snprintf(what, sizeof what, "200K tokens%s", causal ? ", causal" : "");
            failures += verdict(what, a.variant, good, why);
        }
    }
    free(r);
    release(&host, false);
    release(&a, true);
    return failures;
}

/* --- tensors beyond 2^31 bytes: copies of a tile whose length is no power of two --- */

enum { TILE = 999, COPIES = 140, HEADS = 64, DIM = 128 };

/* Fill a device tensor with copies of its first `rows` rows. */
static void repeat(const struct sage_tensor *t, int64_t rows)
{
    int64_t bytes;

    sage_tensor_bytes(t, &bytes);
    for (size_t done = (size_t)(rows * t->shape[3]) * 2, n; done < (size_t)bytes; done += n) {
        n = done < (size_t)bytes - done ? done : (size_t)bytes - done;
        MUST(cudaMemcpy((char *)t->data + done, t->data, n, cudaMemcpyDeviceToDevice));
    }
}

/*
 * K, V and what they are quantised to. Every head has the same keys but one: SPECIAL, whose value
 * is the head's own, so that a head that reads another's memory is found out. The reference sees
 * each key of the tile once, with the logarithm of how often it is there as a mask.
 */
enum { SPECIAL = 5 };

static void make_special(const struct sage_attn *host, const struct sage_attn *a, int64_t head,
                         struct rng *rng)
{
    const uint16_t *q = (const uint16_t *)row_of(&host->q, 0, head, 0);
    uint16_t *k = (uint16_t *)row_of(&host->k, 0, head, TILE);
    uint16_t *v = (uint16_t *)row_of(&host->v, 0, head, TILE);
    float q2 = 0;

    for (int64_t c = 0; c < DIM; c++)
        q2 += f16_at(q, c) * f16_at(q, c);
    for (int64_t c = 0; c < DIM; c++) { /* a score of 14 nats: of the same weight as all others */
        k[c] = f16_from_f32(14 * sqrtf(DIM) / q2 * f16_at(q, c));
        v[c] = f16_from_f32((float)rng_normal(rng));
    }
    MUST(cudaMemcpy(row_of(&a->k, 0, head, SPECIAL), k, DIM * 2, cudaMemcpyHostToDevice));
    MUST(cudaMemcpy(row_of(&a->v, 0, head, SPECIAL), v, DIM * 2, cudaMemcpyHostToDevice));
}

static void make_keys(struct sage_attn *host, const struct sage_attn *a, struct rng *rng)
{
    const size_t tile = TILE * DIM * 2;

    fill(host->q.data, HEADS * host->q.shape[2], DIM, Q_POOL, rng);
    fill(host->k.data, TILE, DIM, KV_POOL, rng);
    fill(host->v.data, TILE, DIM, KV_POOL, rng);
    upload(&a->q, &host->q);
    MUST(cudaMemcpy(a->k.data, host->k.data, tile, cudaMemcpyHostToDevice));
    MUST(cudaMemcpy(a->v.data, host->v.data, tile, cudaMemcpyHostToDevice));
    repeat(&a->k, TILE);
    repeat(&a->v, TILE);
    for (int64_t h = HEADS - 1; h >= 0; h--) {
        if (h > 0) {
            memcpy(row_of(&host->k, 0, h, 0), host->k.data, tile);
            memcpy(row_of(&host->v, 0, h, 0), host->v.data, tile);
        }
        make_special(host, a, h, rng);
    }
    host->mask = tensor(SAGE_F32, 1, 1, TILE + 1, false);
    for (int64_t j = 0; j <= TILE; j++)
        put(&host->mask, 0, 0, 0, j, j == TILE ? 0 : log(j == SPECIAL ? COPIES - 1 : COPIES));
}

static int large_keys(struct gpu *gpu, int64_t rows, uint64_t seed)
{
    struct sage_attn host = allocate(HEADS, HEADS, rows, TILE + 1, DIM, false), a;
    double *r = malloc(sizeof *r * SAMPLES * DIM), lse[SAMPLES];
    int64_t where[SAMPLES][2];
    char what[64], why[512] = "";
    struct rng rng;
    int failures = 0;

    if (!room_for(UINT64_C(10) << 30, "K and V beyond 2^31 bytes"))
        return 0;
    rng_init(&rng, seed);
    a = allocate(HEADS, HEADS, rows, (int64_t)TILE * COPIES, DIM, true);
    make_keys(&host, &a, &rng);
    for (int i = 0; i < SAMPLES; i++) {
        where[i][0] = i < SAMPLES / 2 ? i : HEADS - 1 - (i - SAMPLES / 2);
        where[i][1] = 0;
    }
    rows_in_fp64(&host, 0, where, SAMPLES, r, lse);
    for (a.variant = SAGE_INT8_FP16; a.variant <= (gpu->fp8 ? SAGE_INT8_FP8 : SAGE_INT8_FP16);
         a.variant++) {
        const bool good =
            run(gpu, &a, why, sizeof why) && rows_are_close(&a, where, r, lse, why, sizeof why);

        snprintf(what, sizeof what, "K and V of 2.3 GB, %lld rows a head", (long long)rows);
        failures += verdict(what, a.variant, good, why);
    }
    free(host.mask.data);
    free(r);
    release(&host, false);
    release(&a, true);
    return failures;
}

/* Rows [g, g + n) of all heads' o against those that the same rows of the tile gave first. */
static int64_t differing(const uint16_t *o, const uint16_t *first, int64_t n)
{
    int64_t bad = 0;

    for (int64_t i = 0; i < n; i++) {
        const uint16_t *x = o + i * DIM, *y = first + i * DIM;
        double diff = 0, sum = 0;

        if (!memcmp(x, y, DIM * 2))
            continue;
        for (int64_t c = 0; c < DIM; c++) {
            diff += fabs((double)f16_at(x, c) - (double)f16_at(y, c));
            sum += fabs((double)f16_at(y, c));
        }
        bad += !(diff <= 0.1 * sum); /* another row's result would differ by about 1 */
    }
    return bad;
}

static bool all_alike(const struct sage_attn *a, char *why, size_t len)
{
    const int64_t chunks = HEADS * a->q.shape[2] / TILE;
    const size_t bytes = TILE * DIM * 2;
    uint16_t *first = malloc(bytes), *o = malloc(bytes);
    int64_t bad = 0, looked = 0;

    MUST(cudaMemcpy(first, a->o.data, bytes, cudaMemcpyDeviceToHost));
    for (int64_t i = 1; i < chunks; i++)
        if (i % 16 == 0 || i > chunks - 32) {
            MUST(cudaMemcpy(o, (char *)a->o.data + (size_t)i * bytes, bytes,
                            cudaMemcpyDeviceToHost));
            bad += differing(o, first, TILE);
            looked += TILE;
        }
    free(first);
    free(o);
    if (bad)
        snprintf(why, len, "%lld of %lld rows differ from the same rows elsewhere", (long long)bad,
                 (long long)looked);
    return bad == 0;
}

/* Q and O: row g of all heads together is row g % TILE of the tile. */
static int large_queries(struct gpu *gpu, enum path path, uint64_t seed)
{
    enum { N = 140000, NK = 200 };
    struct sage_attn host = allocate(1, 1, TILE, NK, DIM, false), a;
    double *r = malloc(sizeof *r * SAMPLES * DIM), lse[SAMPLES];
    int64_t where[SAMPLES][2];
    char why[512] = "";
    struct rng rng;
    int failures = 0;

    if (!room_for(UINT64_C(6) << 30, "Q and O beyond 2^31 bytes"))
        return 0;
    rng_init(&rng, seed);
    a = allocate(HEADS, 1, N, NK, DIM, true);
    fill(host.q.data, TILE, DIM, Q_POOL, &rng);
    fill(host.k.data, NK, DIM, KV_POOL, &rng);
    fill(host.v.data, NK, DIM, KV_POOL, &rng);
    MUST(cudaMemcpy(a.q.data, host.q.data, TILE * DIM * 2, cudaMemcpyHostToDevice));
    repeat(&a.q, TILE);
    upload(&a.k, &host.k);
    upload(&a.v, &host.v);
    for (int i = 0; i < SAMPLES; i++) {
        where[i][0] = 0;
        where[i][1] = i * (TILE - 1) / (SAMPLES - 1);
    }
    rows_in_fp64(&host, 0, where, SAMPLES, r, lse);
    for (a.variant = SAGE_INT8_FP16; a.variant <= (gpu->fp8 ? SAGE_INT8_FP8 : SAGE_INT8_FP16);
         a.variant++) {
        const bool good = run(gpu, &a, why, sizeof why) &&
                          rows_are_close(&a, where, r, lse, why, sizeof why) &&
                          all_alike(&a, why, sizeof why);

        failures += verdict(path == EXACT ? "exact, Q and O of 2.3 GB" : "Q and O of 2.3 GB",
                            a.variant, good, why);
    }
    free(r);
    release(&host, false);
    release(&a, true);
    return failures;
}

int gpu_big(struct gpu *gpu, uint64_t seed)
{
    struct problem *p = problem_create();
    int failures = 0;

    printf("# seed %llu\n", (unsigned long long)seed);
    for (enum path path = MASKED; path < N_PATHS; path++) {
        sage_exact_share = path == EXACT ? INFINITY : 0;
        failures += strided(gpu, p, path, seed);
        if (path != MASKED)
            failures += large_queries(gpu, path, seed);
    }
    problem_destroy(p);
    sage_exact_share = 0;
    failures += tokens_200k(gpu, seed);
    failures += large_keys(gpu, 1, seed);
    failures += large_keys(gpu, 65, seed);
    return failures;
}
