/*
 * test_attn.c - sage_attn_cpu() against double precision, over the whole surface, and its edges.
 */
#include <setjmp.h>
#include <stdarg.h>
#include <stddef.h>
#include <stdint.h>

#include <cmocka.h>
#include <float.h>
#include <math.h>
#include <pthread.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

#include "inputs.h"
#include "kernels/cpu.h"
#include "ref64.h"

/*
 * All tensors of a problem in one arena of 16-byte slots between guards. Outputs are poisoned with
 * NaN; `before` is the arena as it was, to tell what a call has written.
 */
struct fixture {
    struct sage_attn attn;
    char *arena, *before;
    size_t size, used;
    int32_t offsets[2][8];
};

enum { ARENA = 4 << 20, GUARD = 64 };

static void fixture_init(struct fixture *f)
{
    *f = (struct fixture){.attn = SAGE_ATTN_INIT, .size = ARENA};
    f->arena = malloc(ARENA);
    f->before = malloc(ARENA);
    memset(f->arena, 0xff, ARENA); /* NaN in every format */
}

static void fixture_finish(struct fixture *f)
{
    free(f->arena);
    free(f->before);
}

enum layout { HND, NHD, GAPS, N_LAYOUTS };

/* A tensor of shape [b, h, n, d] in the arena. */
static struct sage_tensor take(struct fixture *f, enum sage_dtype dtype, enum layout layout,
                               int64_t b, int64_t h, int64_t n, int64_t d)
{
    struct sage_tensor t = {
        .dtype = dtype, .shape = {b, h, n, d}, .stride = {h * n * d, n * d, d, 1}};
    int64_t bytes;

    if (layout == NHD) {
        t.stride[1] = d;
        t.stride[2] = h * d;
    } else if (layout == GAPS) {
        t.stride[2] = d + 3;
        t.stride[1] = n * t.stride[2] + 5;
        t.stride[0] = h * t.stride[1] + 1;
    }
    assert_true(sage_tensor_bytes(&t, &bytes));
    t.data = f->arena + f->used;
    t.offset = GUARD;
    f->used += (size_t)(bytes + 2 * GUARD + 15) / 16 * 16;
    assert_true(f->used <= f->size);
    return t;
}

static char *element(const struct sage_tensor *t, int64_t b, int64_t h, int64_t n, int64_t c)
{
    return tensor_row(t, b, h, n) + (size_t)c * sage_dtype_size(t->dtype);
}

static void put(const struct sage_tensor *t, int64_t b, int64_t h, int64_t n, int64_t c, double x)
{
    char *at = element(t, b, h, n, c);

    if (t->dtype == SAGE_F32)
        *(float *)at = (float)x;
    else if (t->dtype == SAGE_BOOL)
        *(uint8_t *)at = (uint8_t)x;
    else
        put_half(at, 0, t->dtype, x);
}

static void fill(const struct sage_tensor *t, struct rng *rng, double spread, double offset)
{
    for (int64_t b = 0; b < t->shape[0]; b++)
        for (int64_t h = 0; h < t->shape[1]; h++)
            for (int64_t n = 0; n < t->shape[2]; n++)
                for (int64_t c = 0; c < t->shape[3]; c++)
                    put(t, b, h, n, c, spread * rng_normal(rng) + offset * sin((double)c));
}

/* Poison the outputs, run, and see that nothing else changed. */
static void run_part(struct fixture *f, struct sage_cpu *cpu, const struct sage_part *part,
                     char *workspace, size_t bytes)
{
    memset(workspace + bytes, 0x5a, GUARD);
    assert_int_equal(sage_attn_cpu(cpu, &f->attn, part, workspace, bytes), 0);
    for (int i = 0; i < GUARD; i++)
        assert_int_equal(workspace[bytes + (size_t)i], 0x5a);
}

static void poison(const struct sage_tensor *t)
{
    for (int64_t b = 0; b < t->shape[0]; b++)
        for (int64_t h = 0; h < t->shape[1]; h++)
            for (int64_t n = 0; n < t->shape[2]; n++)
                memset(element(t, b, h, n, 0), 0xff,
                       (size_t)t->shape[3] * sage_dtype_size(t->dtype));
}

static void run(struct fixture *f, struct sage_cpu *cpu)
{
    const size_t bytes = sage_attn_workspace(&f->attn, NULL);
    char why[160] = "", *workspace = aligned_alloc(64, bytes + GUARD);

    if (sage_attn_check(&f->attn, why, sizeof why))
        fail_msg("%s", why);
    poison(&f->attn.o);
    if (f->attn.lse.dtype)
        poison(&f->attn.lse);
    memset(workspace, 0xff, bytes);
    memcpy(f->before, f->arena, f->size);
    if (bytes)
        run_part(f, cpu, NULL, workspace, bytes);
    free(workspace);
}

/* Outside o and lse the arena is as it was. */
static void assert_nothing_else_written(struct fixture *f)
{
    char *now = malloc(f->size);

    memcpy(now, f->arena, f->size);
    poison(&f->attn.o);
    if (f->attn.lse.dtype)
        poison(&f->attn.lse);
    assert_memory_equal(f->arena, f->before, f->size);
    memcpy(f->arena, now, f->size);
    free(now);
}

static bool is_exact(const struct sage_attn *a)
{
    return sage_attn_rows(a) <= cpu_few_rows;
}

/* How far o may be from the truth, v being N(0,1): e4m3 rounds |v| < 5 by up to 1/16 of it. */
static double tolerance(const struct sage_attn *a)
{
    if (is_exact(a))
        return a->v.dtype == SAGE_BF16 ? 0.05 : 0.01;
    return sage_attn_variant(a) == SAGE_INT8_FP8 ? 0.4 : 0.2;
}

static bool row_is_close(const struct fixture *f, int64_t b, int64_t h, int64_t i)
{
    const struct sage_attn *a = &f->attn;
    const int64_t batch = a->n_seqs ? 0 : b, row = i + (a->n_seqs ? a->q_offsets[b] : 0);
    double r[SAGE_MAX_HEAD_DIM];
    const double lse = ref64_row(a, b, h, i, r);
    double got = a->lse.dtype ? ref64_get(&a->lse, batch, h, row, 0) : lse;

    if (isinf(lse) ? got != lse : !(fabs(got - lse) < (is_exact(a) ? 0.001 : 0.1))) {
        print_error("batch %d head %d row %d: lse %g, not %g\n", (int)b, (int)h, (int)i, got, lse);
        return false;
    }
    for (int64_t c = 0; c < a->q.shape[3]; c++) {
        got = ref64_get(&a->o, batch, h, row, c);
        if (isinf(lse) ? got == 0 : fabs(got - r[c]) < tolerance(a))
            continue;
        print_error("batch %d head %d row %d channel %d: %g, not %g\n", (int)b, (int)h, (int)i,
                    (int)c, got, r[c]);
        return false;
    }
    return true;
}

static void assert_right(struct fixture *f)
{
    const struct sage_attn *a = &f->attn;
    const int64_t n = a->n_seqs ? a->n_seqs : a->q.shape[0];

    for (int64_t b = 0; b < n; b++) {
        const int64_t nq = a->n_seqs ? a->q_offsets[b + 1] - a->q_offsets[b] : a->q.shape[2];

        for (int64_t h = 0; h < a->q.shape[1]; h++)
            for (int64_t i = 0; i < nq; i++)
                assert_true(row_is_close(f, b, h, i));
    }
    assert_nothing_else_written(f);
}

/* --- random problems --- */

static void random_offsets(struct rng *rng, int32_t *offsets, int n, int64_t end)
{
    offsets[0] = 0;
    for (int i = 1; i < n; i++) /* often an empty sequence */
        offsets[i] = rng_below(rng, 3)
                         ? (int32_t)(offsets[i - 1] + rng_below(rng, end - offsets[i - 1] + 1))
                         : offsets[i - 1];
    offsets[n] = (int32_t)end;
}

static void random_mask(struct fixture *f, struct rng *rng, const int64_t shape[4])
{
    const enum sage_dtype dtypes[] = {SAGE_BOOL, SAGE_F16, SAGE_BF16, SAGE_F32};
    struct sage_tensor *t = &f->attn.mask;
    const bool blind = rng_below(rng, 2); /* some rows see nothing at all */

    *t = take(f, dtypes[rng_below(rng, 4)], rng_below(rng, 2) ? HND : GAPS,
              rng_below(rng, 2) ? shape[0] : 1, rng_below(rng, 2) ? shape[1] : 1,
              rng_below(rng, 2) ? shape[2] : 1, shape[3]);
    for (int64_t b = 0; b < t->shape[0]; b++)
        for (int64_t h = 0; h < t->shape[1]; h++)
            for (int64_t n = 0; n < t->shape[2]; n++)
                for (int64_t c = 0; c < t->shape[3]; c++) {
                    const bool hidden = rng_below(rng, 4) == 0 || (blind && n % 5 == 1);

                    put(t, b, h, n, c,
                        t->dtype == SAGE_BOOL ? (hidden ? 0 : 1 + rng_below(rng, 255))
                        : hidden              ? -INFINITY
                                              : rng_normal(rng));
                }
}

static void random_tensors(struct fixture *f, struct rng *rng)
{
    static const int64_t dims[] = {8, 16, 48, 64, 72, 80, 96, 128, 160, 192, 256};
    struct sage_attn *a = &f->attn;
    const enum sage_dtype dtype = rng_below(rng, 2) ? SAGE_F16 : SAGE_BF16;
    const int64_t d = dims[rng_below(rng, 11)], b = a->n_seqs ? 1 : 1 + rng_below(rng, 2);
    const int64_t heads = 1 + rng_below(rng, 2), gqa = 1 + rng_below(rng, 3);
    const int64_t nq = 1 + rng_below(rng, rng_below(rng, 2) ? 8 : 140);
    const int64_t nk = rng_below(rng, rng_below(rng, 2) ? 8 : 200);
    enum layout layout[4];

    for (int i = 0; i < 4; i++)
        layout[i] = (enum layout)rng_below(rng, N_LAYOUTS);
    a->q = take(f, dtype, layout[0], b, heads * gqa, nq, d);
    a->k = take(f, dtype, layout[1], b, heads, nk, d);
    a->v = take(f, dtype, layout[2], b, heads, nk, d);
    a->o = take(f, dtype, layout[3], b, heads * gqa, nq, d);
    fill(&a->q, rng, 1, 0);
    fill(&a->k, rng, 1, a->smooth_k ? 4 : 0);
    fill(&a->v, rng, 1, 0);
    if (rng_below(rng, 2))
        a->lse = take(f, SAGE_F32, layout[0], b, heads * gqa, nq, 1);
}

static void random_problem(struct fixture *f, struct rng *rng)
{
    struct sage_attn *a = &f->attn;

    fixture_init(f);
    a->smooth_k = rng_below(rng, 3) > 0;
    a->variant = (enum sage_variant)rng_below(rng, 3);
    a->smooth_v = a->variant != SAGE_INT8_FP16 && rng_below(rng, 2);
    a->rotate_qk = rng_below(rng, 2);
    a->scale = rng_below(rng, 4) ? 0 : 0.07f;
    a->n_seqs = rng_below(rng, 4) ? 0 : 1 + (int32_t)rng_below(rng, 6);
    a->causal = rng_below(rng, 2);
    a->diagonal = (enum sage_diagonal)rng_below(rng, 2);
    a->window_left = rng_below(rng, 3) ? SAGE_UNLIMITED : rng_below(rng, 90);
    a->window_right = a->causal || rng_below(rng, 3) ? SAGE_UNLIMITED : rng_below(rng, 90);
    random_tensors(f, rng);
    if (a->n_seqs) {
        random_offsets(rng, f->offsets[0], a->n_seqs, a->q.shape[2]);
        random_offsets(rng, f->offsets[1], a->n_seqs, a->k.shape[2]);
        a->q_offsets = f->offsets[0];
        a->k_offsets = f->offsets[1];
    } else if (rng_below(rng, 2)) {
        const int64_t shape[4] = {a->q.shape[0], a->q.shape[1], a->q.shape[2], a->k.shape[2]};

        random_mask(f, rng, shape);
    }
}

static void test_sweep(void **state)
{
    struct sage_cpu *cpu = sage_cpu_create(2);
    struct rng rng;
    int isas = 0;

    (void)state;
    while (cpu_isa(isas))
        isas++;
    rng_init(&rng, test_seed());
    for (int round = 0; round < 300; round++) {
        struct fixture f;

        random_problem(&f, &rng);
        cpu_use(cpu, cpu_isa((int)rng_below(&rng, isas)));
        run(&f, cpu);
        assert_right(&f);
        fixture_finish(&f);
    }
    sage_cpu_destroy(cpu);
}

/* q, k, v and o as slices of one [B, N, 4, H, D] allocation. */
static void test_fused(void **state)
{
    struct rng rng;
    struct fixture f;
    struct sage_tensor *t[] = {&f.attn.q, &f.attn.k, &f.attn.v, &f.attn.o};

    (void)state;
    rng_init(&rng, test_seed());
    fixture_init(&f);
    const struct sage_tensor all = take(&f, SAGE_F16, HND, 2, 77, 4 * 3, 64);

    for (int i = 0; i < 4; i++) {
        *t[i] = all;
        t[i]->offset += (uint64_t)i * 3 * 64 * 2;
        memcpy(t[i]->shape, (int64_t[4]){2, 3, 77, 64}, sizeof t[i]->shape);
        memcpy(t[i]->stride, (int64_t[4]){77 * 12 * 64, 64, 12 * 64, 1}, sizeof t[i]->stride);
        fill(t[i], &rng, 1, 0);
    }
    run(&f, NULL);
    assert_right(&f);
    fixture_finish(&f);
}

/* --- the same bits however it is cut --- */

/* What the poisoned arena looks like after `cut` has run. */
static char *result_of(struct fixture *f, struct sage_cpu *cpu, struct rng *rng)
{
    const int64_t groups = sage_attn_groups(&f->attn), kv = f->attn.k.shape[1];
    char *copy = malloc(f->size);

    poison(&f->attn.o);
    for (int64_t g = 0; g < groups;) {
        struct sage_part part = {
            .group = g, .n_groups = 1 + rng_below(rng, groups - g), .n_rows = -1};
        const int64_t nq = sage_attn_seq(&f->attn, g / kv).nq;
        const bool rows = rng_below(rng, 2) && nq > 0;

        if (rows)
            part = (struct sage_part){.group = g, .n_groups = 1, .n_rows = 1 + rng_below(rng, nq)};
        const size_t bytes = sage_attn_workspace(&f->attn, &part);
        char *workspace = aligned_alloc(64, bytes + GUARD);

        memset(workspace, 0xff, bytes);
        run_part(f, cpu, &part, workspace, bytes);
        while (rows && part.row + part.n_rows < nq) {
            part.row += part.n_rows;
            part.n_rows = 1 + rng_below(rng, nq - part.row);
            part.prepared = true;
            run_part(f, cpu, &part, workspace, bytes);
        }
        g += part.n_groups;
        free(workspace);
    }
    memcpy(copy, f->arena, f->size);
    return copy;
}

static void test_parts_and_threads(void **state)
{
    struct sage_cpu *pools[] = {NULL, sage_cpu_create(1), sage_cpu_create(2), sage_cpu_create(5)};
    struct rng rng;

    (void)state;
    rng_init(&rng, test_seed());
    for (int round = 0; round < 60; round++) {
        struct fixture f;

        random_problem(&f, &rng);
        run(&f, pools[3]);
        char *cut = result_of(&f, pools[round % 4], &rng), *whole;

        run(&f, pools[(round + 1) % 4]);
        whole = malloc(f.size);
        memcpy(whole, f.arena, f.size);
        run(&f, NULL);
        assert_memory_equal(whole, f.arena, f.size);
        assert_memory_equal(whole, cut, f.size);
        free(whole);
        free(cut);
        fixture_finish(&f);
    }
    for (int i = 0; i < 4; i++)
        sage_cpu_destroy(pools[i]);
}

static void *own_pool(void *arg)
{
    struct fixture *f = arg;
    struct sage_cpu *cpu = sage_cpu_create(3);

    for (int i = 0; i < 10; i++)
        run(f, cpu);
    sage_cpu_destroy(cpu);
    return NULL;
}

static void test_several_pools(void **state)
{
    struct fixture f[3];
    pthread_t threads[3];
    struct rng rng;

    (void)state;
    rng_init(&rng, test_seed());
    for (int i = 0; i < 3; i++) {
        random_problem(&f[i], &rng);
        assert_int_equal(pthread_create(&threads[i], NULL, own_pool, &f[i]), 0);
    }
    for (int i = 0; i < 3; i++)
        pthread_join(threads[i], NULL);
    for (int i = 0; i < 3; i++) {
        assert_right(&f[i]);
        fixture_finish(&f[i]);
    }
}

/* --- edges --- */

/* 1 batch, 4 query heads on 2 kv heads, D = 64, with lse. */
static void plain(struct fixture *f, struct rng *rng, enum sage_variant variant, int64_t nq,
                  int64_t nk)
{
    fixture_init(f);
    f->attn.variant = variant;
    f->attn.q = take(f, SAGE_F16, HND, 1, 4, nq, 64);
    f->attn.k = take(f, SAGE_F16, HND, 1, 2, nk, 64);
    f->attn.v = take(f, SAGE_F16, HND, 1, 2, nk, 64);
    f->attn.o = take(f, SAGE_F16, HND, 1, 4, nq, 64);
    f->attn.lse = take(f, SAGE_F32, HND, 1, 4, nq, 1);
    fill(&f->attn.q, rng, 1, 0);
    fill(&f->attn.k, rng, 1, 2);
    fill(&f->attn.v, rng, 1, 0);
}

static double o_at(const struct fixture *f, int64_t h, int64_t i, int64_t c)
{
    return ref64_get(&f->attn.o, 0, h, i, c);
}

static double lse_at(const struct fixture *f, int64_t h, int64_t i)
{
    return ref64_get(&f->attn.lse, 0, h, i, 0);
}

static void set(const struct sage_tensor *t, double x)
{
    struct rng rng;

    rng_init(&rng, 0);
    fill(t, &rng, 0, 0);
    for (int64_t n = 0; n < t->shape[2]; n++)
        for (int64_t h = 0; h < t->shape[1]; h++)
            for (int64_t c = 0; c < t->shape[3]; c++)
                put(t, 0, h, n, c, x);
}

static void each_variant(void (*test)(enum sage_variant))
{
    test(SAGE_INT8_FP16);
    test(SAGE_INT8_FP8);
}

static void ones(enum sage_variant variant)
{
    struct fixture f;
    struct rng rng;

    rng_init(&rng, test_seed());
    plain(&f, &rng, variant, 70, 333);
    set(&f.attn.v, 1);
    run(&f, NULL);
    for (int64_t i = 0; i < 4 * 70 * 64; i++)
        assert_true(o_at(&f, i / 64 / 70, i / 64 % 70, i % 64) == 1);
    fixture_finish(&f);
}

static void test_ones(void **state)
{
    (void)state;
    each_variant(ones);
}

/* Zero Q, constant K, one zero channel of V: the mean of V, and 0. */
static void constants(enum sage_variant variant)
{
    struct fixture f;
    struct rng rng;

    rng_init(&rng, test_seed());
    for (int i = 0; i < 4; i++) {
        plain(&f, &rng, variant, 5, 100);
        f.attn.smooth_k = i % 2;
        if (i / 2)
            set(&f.attn.q, 0);
        set(&f.attn.k, 3);
        for (int64_t n = 0; n < 100; n++)
            put(&f.attn.v, 0, 1, n, 7, 0);
        run(&f, NULL);
        assert_right(&f);
        assert_true(o_at(&f, 2, 4, 7) == 0 && o_at(&f, 2, 4, 8) != 0);
        fixture_finish(&f);
    }
}

static void test_constants(void **state)
{
    (void)state;
    each_variant(constants);
}

/* One key: o is its value, lse its score. No key: 0 and -inf. */
static void few_keys(enum sage_variant variant)
{
    struct fixture f;
    struct rng rng;

    rng_init(&rng, test_seed());
    plain(&f, &rng, variant, 3, 1);
    run(&f, NULL);
    assert_right(&f);
    for (int64_t c = 0; c < 64 && variant == SAGE_INT8_FP16; c++)
        assert_true(o_at(&f, 3, 2, c) == ref64_get(&f.attn.v, 0, 1, 0, c));
    fixture_finish(&f);
    plain(&f, &rng, variant, 3, 0);
    run(&f, NULL);
    assert_right(&f);
    assert_true(lse_at(&f, 0, 0) == -INFINITY && o_at(&f, 0, 0, 0) == 0);
    fixture_finish(&f);
}

static void test_few_keys(void **state)
{
    (void)state;
    each_variant(few_keys);
}

/* K's mean moves scores by hundreds of nats and lse with them; o must not notice. */
static void far_mean(int64_t nq, int64_t nk)
{
    struct fixture f;
    struct rng rng;

    rng_init(&rng, test_seed());
    plain(&f, &rng, SAGE_INT8_FP16, nq, nk);
    fill(&f.attn.k, &rng, 0.01, 40);
    run(&f, NULL);
    for (int64_t h = 0; h < 4; h++)
        for (int64_t i = 0; i < nq; i++) {
            double r[64];

            assert_true(fabs(lse_at(&f, h, i) - ref64_row(&f.attn, 0, h, i, r)) < 1e-3);
        }
    fixture_finish(&f);
}

static void test_lse_exact(void **state)
{
    (void)state;
    far_mean(50, 300);
    far_mean(5, SAMPLE_ALL + 904);
}

/* One key of each stratum; and all phases of what is periodic are seen about as often. */
static void test_sample(void **state)
{
    const int64_t lengths[] = {SAMPLE_ALL + 1, 8192, 20000, 50000, 200000};

    (void)state;
    assert_int_equal(sample_shift(SAMPLE_ALL), 0);
    for (size_t l = 0; l < sizeof lengths / sizeof lengths[0]; l++) {
        const int shift = sample_shift(lengths[l]);
        const int64_t n = lengths[l] >> shift;

        assert_true(n >= 1024);
        for (int64_t period = 2; period <= 128; period++) {
            double real = 0, imaginary = 0;

            for (int64_t i = 0; i < n; i++) {
                const int64_t key = sample_key(i, shift);
                const double phase = 2 * acos(-1) * (double)(key % period) / (double)period;

                assert_true(key >= i << shift && key < (i + 1) << shift);
                real += cos(phase) / (double)n;
                imaginary += sin(phase) / (double)n;
            }
            /* of all keys it would be zero, of those of one phase 1 */
            assert_true(hypot(real, imaginary) < 0.15);
        }
    }
}

/* Mean distance of o from the truth, over all rows. */
static double mean_error(const struct fixture *f)
{
    const int64_t *shape = f->attn.o.shape;
    double sum = 0;

    for (int64_t h = 0; h < shape[1]; h++)
        for (int64_t i = 0; i < shape[2]; i++) {
            double r[SAGE_MAX_HEAD_DIM];

            ref64_row(&f->attn, 0, h, i, r);
            for (int64_t c = 0; c < shape[3]; c++)
                sum += fabs(o_at(f, h, i, c) - r[c]);
        }
    return sum / (double)(shape[1] * shape[2] * shape[3]);
}

/* Channels of k that stick out: spread over eight they leave finer steps to the others. */
static void test_rotation(void **state)
{
    const int64_t before = cpu_few_rows;
    struct fixture f;
    struct rng rng;
    double plainly;

    (void)state;
    cpu_few_rows = 0;
    rng_init(&rng, test_seed());
    plain(&f, &rng, SAGE_INT8_FP16, 50, 300);
    for (int64_t h = 0; h < f.attn.k.shape[1]; h++)
        for (int64_t j = 0; j < 300; j++)
            for (int64_t c = 3; c < 64; c += 16)
                put(&f.attn.k, 0, h, j, c, 16 * rng_normal(&rng));
    for (int64_t h = 0; h < f.attn.q.shape[1]; h++)
        for (int64_t i = 0; i < 50; i++)
            for (int64_t c = 3; c < 64; c += 16)
                put(&f.attn.q, 0, h, i, c, rng_normal(&rng) / 16);
    run(&f, NULL);
    plainly = mean_error(&f);
    f.attn.rotate_qk = true;
    run(&f, NULL);
    assert_true(mean_error(&f) < 0.7 * plainly);
    fixture_finish(&f);
    cpu_few_rows = before;
}

/* Nothing is quantised up to FEW_ROWS, whatever is asked for; beyond, everything. */
static void few_rows(enum sage_variant variant)
{
    const int64_t before = cpu_few_rows;

    cpu_few_rows = FEW_ROWS;
    for (int i = 0; i < 4; i++) {
        const int64_t nq = FEW_ROWS / 2 + i / 2; /* of two query heads */
        struct fixture f;
        struct rng rng;

        rng_init(&rng, test_seed());
        plain(&f, &rng, variant, nq, 300);
        f.attn.smooth_k = f.attn.rotate_qk = i % 2;
        f.attn.smooth_v = i % 2 && variant == SAGE_INT8_FP8;
        run(&f, NULL);
        const double error = mean_error(&f);
        assert_true(i < 2 ? error < 0.0001 : error > 0.0005);
        fixture_finish(&f);
    }
    cpu_few_rows = before;
}

static void test_few_rows(void **state)
{
    (void)state;
    each_variant(few_rows);
}

/* --- Inf and NaN --- */

enum { NAN_NQ = 150, NAN_NK = 200, NAN_AT = 130 };

/* Rows of heads [first, last) are as they were in `clean`, bit for bit. */
static void assert_same_heads(const struct fixture *f, const char *clean, int64_t first,
                              int64_t last)
{
    const ptrdiff_t at = element(&f->attn.o, 0, first, 0, 0) - f->arena;

    assert_memory_equal(f->arena + at, clean + at, (size_t)(last - first) * NAN_NQ * 64 * 2);
}

/* Put x into one element of a tensor of kv head 1 (q: of head 3) and see who notices. */
static void spoil(enum sage_variant variant, int which, double x, bool smooth_v, bool rotate_qk)
{
    struct fixture f;
    struct rng rng;

    rng_init(&rng, 5);
    plain(&f, &rng, variant, NAN_NQ, NAN_NK);
    f.attn.smooth_v = smooth_v;
    f.attn.rotate_qk = rotate_qk;
    f.attn.causal = true;
    run(&f, NULL);
    char *clean = malloc(f.size);

    memcpy(clean, f.arena, f.size);
    const struct sage_tensor *t = which == 0 ? &f.attn.q : which == 1 ? &f.attn.k : &f.attn.v;

    put(t, 0, which == 0 ? 3 : 1, NAN_AT, 9, x);
    run(&f, NULL);
    assert_same_heads(&f, clean, 0, which == 0 ? 3 : 2);
    for (int64_t h = which == 0 ? 3 : 2; h < 4; h++)
        for (int64_t i = 0; i < NAN_NQ; i++) {
            const bool sees = which == 0 ? i == NAN_AT : i >= NAN_AT;

            for (int64_t c = 0; c < 64; c++) {
                if (sees && (which < 2 || c == 9))
                    assert_true(isnan(o_at(&f, h, i, c)));
                else /* may be NaN, but not another number */
                    assert_true(isnan(o_at(&f, h, i, c)) || which == 1 ||
                                !memcmp(element(&f.attn.o, 0, h, i, c),
                                        clean + (element(&f.attn.o, 0, h, i, c) - f.arena), 2));
            }
            if (sees && which < 2)
                assert_true(isnan(lse_at(&f, h, i)));
        }
    free(clean);
    fixture_finish(&f);
}

static void spoils(enum sage_variant variant)
{
    const double values[] = {NAN, -NAN, INFINITY, -INFINITY};

    for (int i = 0; i < 4; i++)
        for (int which = 0; which < 3; which++) {
            spoil(variant, which, values[i], false, false);
            spoil(variant, which, values[i], false, true);
            if (variant == SAGE_INT8_FP8)
                spoil(variant, which, values[i], true, false);
        }
}

static void test_not_finite(void **state)
{
    (void)state;
    each_variant(spoils);
}

/*
 * The row sees all keys alike: o is the mean of V, as a whole. A single channel of either may be 0;
 * a row that sees no key has no other, and is off by all of the mean.
 */
static void assert_mean(const struct fixture *f, int64_t h, int64_t i)
{
    const int64_t share = f->attn.q.shape[1] / f->attn.k.shape[1], nk = f->attn.k.shape[2];
    double size = 0, error = 0;

    for (int64_t c = 0; c < 64; c++) {
        double mean = 0;

        for (int64_t j = 0; j < nk; j++)
            mean += ref64_get(&f->attn.v, 0, h / share, j, c) / (double)nk;
        size += fabs(mean);
        error += fabs(o_at(f, h, i, c) - mean);
    }
    assert_true(error < 0.2 * size);
    assert_true(isfinite(lse_at(f, h, i)));
}

/* In an additive mask any NaN and +Inf are contagious; -FLT_MAX is a number. */
static void bad_mask(enum sage_variant variant)
{
    const uint32_t bits[] = {0x7fc00000, 0x7fffffff, 0xffffffff, 0x7f800001, 0x7f800000};
    struct fixture f;
    struct rng rng;

    rng_init(&rng, test_seed());
    for (int i = 0; i < 6; i++) {
        plain(&f, &rng, variant, 4, 150);
        f.attn.mask = take(&f, SAGE_F32, HND, 1, 1, 4, 150);
        set(&f.attn.mask, 0);
        for (int64_t j = 0; j < 150; j++)
            put(&f.attn.mask, 0, 0, 1, j, (double)-FLT_MAX);
        if (i < 5)
            memcpy(element(&f.attn.mask, 0, 0, 2, 31 * i), &bits[i], 4);
        run(&f, NULL);
        for (int64_t c = 0; c < 64; c++) {
            assert_true(isfinite(o_at(&f, 1, 0, c)) && isfinite(o_at(&f, 1, 3, c)));
            assert_true(i < 5 ? isnan(o_at(&f, 1, 2, c)) : isfinite(o_at(&f, 1, 2, c)));
        }
        assert_true(i < 5 ? isnan(lse_at(&f, 1, 2)) : isfinite(lse_at(&f, 1, 2)));
        assert_mean(&f, 1, 1);
        fixture_finish(&f);
    }
}

static void test_bad_mask(void **state)
{
    (void)state;
    each_variant(bad_mask);
}

/*
 * A row from which the mask tensor hides every key sees nothing, even of a NaN in a key or in
 * itself.
 */
static void hidden_row(enum sage_variant variant)
{
    struct fixture f;
    struct rng rng;

    rng_init(&rng, test_seed());
    plain(&f, &rng, variant, 4, 150);
    f.attn.smooth_k = false;
    f.attn.mask = take(&f, SAGE_BOOL, HND, 1, 1, 4, 150);
    set(&f.attn.mask, 1);
    for (int64_t j = 0; j < 150; j++)
        put(&f.attn.mask, 0, 0, 2, j, 0);
    put(&f.attn.k, 0, 0, 70, 3, NAN);
    put(&f.attn.q, 0, 0, 2, 5, NAN);
    run(&f, NULL);
    for (int64_t c = 0; c < 64; c++)
        assert_true(o_at(&f, 0, 2, c) == 0);
    assert_true(lse_at(&f, 0, 2) == -INFINITY);
    fixture_finish(&f);
}

static void test_hidden_row(void **state)
{
    (void)state;
    each_variant(hidden_row);
}

/* V at the ends of binary16: rounding it to e4m3 around its mean must not push o over the edge. */
static void test_largest(void **state)
{
    struct fixture f;
    struct rng rng;

    (void)state;
    rng_init(&rng, 3);
    plain(&f, &rng, SAGE_INT8_FP8, 8, 64);
    f.attn.smooth_v = true;
    set(&f.attn.q, 0);
    for (int64_t j = 0; j < 64; j++)
        for (int64_t c = 0; c < 64; c++)
            put(&f.attn.v, 0, 0, j, c, j == 0 ? -65504 : 65504);
    f.attn.window_left = 0;
    f.attn.window_right = 0;
    run(&f, NULL);
    for (int64_t i = 0; i < 8; i++)
        for (int64_t c = 0; c < 64; c++)
            assert_true(fabs(o_at(&f, 0, i, c)) > 50000 && isfinite(o_at(&f, 0, i, c)));
    fixture_finish(&f);
}

/* Scores that overflow must not come out as numbers. */
static void test_overflow(void **state)
{
    struct fixture f;
    struct rng rng;

    (void)state;
    rng_init(&rng, test_seed());
    for (int i = 0; i < 2; i++) {
        plain(&f, &rng, SAGE_INT8_FP16, 4, 40);
        f.attn.scale = 1e38f;
        f.attn.smooth_k = false;
        set(&f.attn.q, 1000);
        set(&f.attn.k, i ? -1000 : 1000); /* all scores -inf is not the same as seeing nothing */
        run(&f, NULL);
        assert_true(isnan(o_at(&f, 0, 0, 0)) && isnan(lse_at(&f, 0, 0)));
        fixture_finish(&f);
    }
}

static void test_refused(void **state)
{
    struct fixture f;
    struct rng rng;

    (void)state;
    rng_init(&rng, 1);
    plain(&f, &rng, SAGE_INT8_FP16, 10, 10);
    const size_t bytes = sage_attn_workspace(&f.attn, NULL);
    char *w = aligned_alloc(64, bytes + 64);
    const struct sage_part bad[] = {
        {.group = -1, .n_groups = 1, .n_rows = -1},
        {.group = 0, .n_groups = 3, .n_rows = -1},
        {.group = 3, .n_groups = 0, .n_rows = -1},
        {.n_groups = 2, .row = 0, .n_rows = 5},
        {.n_groups = 1, .row = 5, .n_rows = 6},
        {.n_groups = 1, .row = 1, .n_rows = -1},
        {.n_groups = 1, .row = -1, .n_rows = 1},
        {.n_groups = 1, .row = INT64_MAX, .n_rows = 2},
        {.group = 1, .n_groups = INT64_MAX, .n_rows = -1},
    };

    assert_int_equal(sage_attn_cpu(NULL, &f.attn, NULL, w, bytes - 1), SAGE_EWORKSPACE);
    assert_int_equal(sage_attn_cpu(NULL, &f.attn, NULL, w + 8, bytes), SAGE_EINVAL);
    for (size_t i = 0; i < sizeof bad / sizeof bad[0]; i++) {
        assert_int_equal(sage_attn_cpu(NULL, &f.attn, &bad[i], w, bytes), SAGE_EINVAL);
        assert_true(sage_attn_workspace(&f.attn, &bad[i]) == SIZE_MAX);
        assert_true(sage_attn_ops(&f.attn, &bad[i]) == 0);
    }
    free(w);
    f.attn.k.shape[2] = f.attn.v.shape[2] = INT32_MAX;
    f.attn.q.shape[1] = f.attn.k.shape[1] = f.attn.v.shape[1] = INT32_MAX;
    assert_true(sage_attn_workspace(&f.attn, NULL) == SIZE_MAX);
    fixture_finish(&f);
}

int main(void)
{
    const struct CMUnitTest tests[] = {
        cmocka_unit_test(test_sweep),
        cmocka_unit_test(test_fused),
        cmocka_unit_test(test_parts_and_threads),
        cmocka_unit_test(test_several_pools),
        cmocka_unit_test(test_ones),
        cmocka_unit_test(test_constants),
        cmocka_unit_test(test_few_keys),
        cmocka_unit_test(test_lse_exact),
        cmocka_unit_test(test_sample),
        cmocka_unit_test(test_rotation),
        cmocka_unit_test(test_few_rows),
        cmocka_unit_test(test_not_finite),
        cmocka_unit_test(test_bad_mask),
        cmocka_unit_test(test_hidden_row),
        cmocka_unit_test(test_largest),
        cmocka_unit_test(test_overflow),
        cmocka_unit_test(test_refused),
    };

    cpu_few_rows = 0;
    int failed = cmocka_run_group_tests_name("quantised", tests, NULL, NULL);
    cpu_few_rows = INT64_MAX;
    return failed + cmocka_run_group_tests_name("nothing quantised", tests, NULL, NULL);
}
