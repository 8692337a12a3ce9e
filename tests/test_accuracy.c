/*
 * test_accuracy.c - the CPU implementation's errors against what users of other kernels get.
 *
 * peers_accuracy.tsv holds errors that FlashAttention 2, SageAttention 1 and SageAttention 2 made
 * on an H100. Bounds on relL1 (average over the heads): int8_fp16 max(0.8 * SA1, 1.3 * FA2),
 * int8_fp8 1.02 * SA2; a single head, being 64 rows only, may have half as much again. Two
 * exceptions, both of int8_fp16, where 8 bits of Q and K have no more to give:
 *   uniform  amplitudes are bounded, so every scale is 1/127, however few elements share it: finer
 *            scales gain nothing and the error is that of SageAttention 1
 *   vbias    causal: most of the error is fp16's own, of P and o (FA2's), which scales do not lower
 * Inputs are drawn from a fixed seed, for heads differ by some per cent and uniform ones by ten;
 * $SAGE_TEST_SEED draws others.
 */
#include <setjmp.h>
#include <stdarg.h>
#include <stddef.h>
#include <stdint.h>

#include <cmocka.h>
#include <math.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

#include "inputs.h"
#include "kernels/problem.h"
#include "npy.h"
#include "ref64.h"

enum { HEADS = 4, TOKENS = 4096, ROWS = 64 };

/* Average and worst relL1 over the heads. */
struct error {
    double mean, worst;
};

static const char *source(const char *name)
{
    static char path[4096];
    const char *dir = getenv("srcdir"); /* set by make check */

    snprintf(path, sizeof path, "%s/tests/%s", dir ? dir : ".", name);
    return path;
}

/* A peer's relL1; fails where it is not on record. */
static double peer(int64_t d, const char *kind, bool causal, const char *name)
{
    FILE *file = fopen(source("peers_accuracy.tsv"), "r");
    char line[160], k[16], c[4], p[16];
    double l1, found = -1;
    long long dim;

    assert_non_null(file);
    while (fgets(line, sizeof line, file))
        if (sscanf(line, "%lld %15s %3s %15s %lf", &dim, k, c, p, &l1) == 5 && dim == d &&
            !strcmp(k, kind) && !strcmp(c, causal ? "yes" : "no") && !strcmp(p, name))
            found = l1;
    fclose(file);
    assert_true(found > 0);
    return found;
}

static double bound(int64_t d, enum inputs kind, bool causal, enum sage_variant variant)
{
    const char *name = inputs_name(kind);
    const double below = kind == IN_UNIFORM ? 1.08 : kind == IN_VBIAS && causal ? 0.9 : 0.8;

    if (variant == SAGE_INT8_FP8)
        return 1.02 * peer(d, name, causal, "sa2");
    return fmax(below * peer(d, name, causal, "sa1"), 1.3 * peer(d, name, causal, "fa2"));
}

static struct sage_tensor tensor(int64_t heads, int64_t n, int64_t d)
{
    return (struct sage_tensor){
        .dtype = SAGE_F16,
        .data = malloc((size_t)(heads * n * d) * 2),
        .shape = {1, heads, n, d},
        .stride = {heads * n * d, n * d, d, 1},
    };
}

static void release(struct sage_attn *a)
{
    free(a->q.data);
    free(a->k.data);
    free(a->v.data);
    free(a->o.data);
}

/* Row i of `rows` that are looked at among n: the middle of its share. */
static int64_t sample(int64_t i, int64_t rows, int64_t n)
{
    return (2 * i + 1) * n / (2 * rows);
}

static void compare_row(const struct sage_attn *a, int64_t head, int64_t row, const double *r,
                        struct ref64_error *e)
{
    const int64_t d = a->q.shape[3];
    double o[SAGE_MAX_HEAD_DIM];

    for (int64_t c = 0; c < d; c++)
        o[c] = ref64_get(&a->o, 0, head, row, c);
    ref64_compare(e, o, r, d);
}

/* One variant against references r[heads][rows][D]; computes only the rows that are looked at. */
static struct error measure(const struct sage_attn *a, int64_t rows, const double *r)
{
    const int64_t heads = a->q.shape[1], n = a->q.shape[2], d = a->q.shape[3];
    const int64_t gqa = heads / a->k.shape[1];
    struct sage_part part = {.n_groups = 1, .n_rows = 1};
    const size_t bytes = sage_attn_workspace(a, &part);
    void *workspace = aligned_alloc(64, bytes);
    struct error result = {0, 0};

    for (int64_t h = 0; h < heads; h++) {
        struct ref64_error e = {0};

        part.group = h / gqa;
        for (int64_t i = 0; i < rows; i++) {
            part.row = sample(i, rows, n);
            part.prepared = i > 0;
            assert_int_equal(sage_attn_cpu(NULL, a, &part, workspace, bytes), 0);
            compare_row(a, h, part.row, r + (h * rows + i) * d, &e);
        }
        result.mean += ref64_l1(&e) / (double)heads;
        result.worst = fmax(result.worst, ref64_l1(&e));
    }
    free(workspace);
    return result;
}

static double *references(const struct sage_attn *a, int64_t rows)
{
    const int64_t heads = a->q.shape[1], d = a->q.shape[3];
    double *r = malloc(sizeof *r * (size_t)(heads * rows * d));

    for (int64_t h = 0; h < heads; h++)
        for (int64_t i = 0; i < rows; i++)
            ref64_row(a, 0, h, sample(i, rows, a->q.shape[2]), r + (h * rows + i) * d);
    return r;
}

/* Both variants of one distribution and mask; returns how many bounds are broken. */
static int check(struct sage_attn *a, enum inputs kind)
{
    double *r = references(a, ROWS);
    int broken = 0;

    for (a->variant = SAGE_INT8_FP16; a->variant <= SAGE_INT8_FP8; a->variant++) {
        const double limit = bound(a->q.shape[3], kind, a->causal, a->variant);
        const struct error e = measure(a, ROWS, r);
        const bool bad = !(e.mean <= limit) || !(e.worst <= 1.5 * limit);

        printf("%3d %-8s %-7s %-9s relL1 %.5f worst %.5f bound %.5f%s\n", (int)a->q.shape[3],
               inputs_name(kind), a->causal ? "causal" : "", sage_variant_name(a->variant), e.mean,
               e.worst, limit, bad ? " BROKEN" : "");
        broken += bad;
    }
    free(r);
    return broken;
}

static void test_distributions(void **state)
{
    const char *seed = getenv("SAGE_TEST_SEED");
    struct rng rng;
    int broken = 0;

    (void)state;
    rng_init(&rng, seed ? strtoull(seed, NULL, 0) : 1);
    for (int64_t d = 64; d <= 128; d += 64)
        for (int kind = 0; kind < N_INPUTS_KINDS; kind++) {
            struct sage_attn a = SAGE_ATTN_INIT;

            if (!inputs_have_peers((enum inputs)kind))
                continue;
            a.q = tensor(HEADS, TOKENS, d);
            a.k = tensor(HEADS, TOKENS, d);
            a.v = tensor(HEADS, TOKENS, d);
            a.o = tensor(HEADS, TOKENS, d);
            make_inputs(&rng, (enum inputs)kind, SAGE_F16, HEADS, TOKENS, d, a.q.data, a.k.data,
                        a.v.data);
            for (int causal = 0; causal < 2; causal++) {
                a.causal = causal;
                broken += check(&a, (enum inputs)kind);
            }
            release(&a);
        }
    assert_int_equal(broken, 0);
}

static bool load_layer(const char *name, struct sage_attn *a)
{
    struct sage_tensor *t[] = {&a->q, &a->k, &a->v};
    char file[64];

    for (int i = 0; i < 3; i++) {
        snprintf(file, sizeof file, "data/%s-%c.npy", name, "qkv"[i]);
        if (!npy_load(source(file), t[i]))
            return false;
    }
    a->o = tensor(a->q.shape[1], a->q.shape[2], a->q.shape[3]);
    return true;
}

/*
 * Inputs that language models really have. No peers' figures are on record for them: the limits are
 * what was measured (worst layer: 0.020 and 0.032), and half as much again.
 */
static void test_language_models(void **state)
{
    static const char *const layers[] = {"smollm2-l00", "smollm2-l02", "smollm2-l18",
                                         "smollm2-l29", "minilm-l00",  "minilm-l05"};
    int broken = 0;

    (void)state;
    for (size_t i = 0; i < sizeof layers / sizeof layers[0]; i++) {
        struct sage_attn a = SAGE_ATTN_INIT;

        assert_true(load_layer(layers[i], &a));
        a.causal = !strncmp(layers[i], "smollm2", 7);
        double *r = references(&a, ROWS);

        for (a.variant = SAGE_INT8_FP16; a.variant <= SAGE_INT8_FP8; a.variant++) {
            const struct error e = measure(&a, ROWS, r);

            printf("%-11s %-9s relL1 %.5f worst %.5f\n", layers[i], sage_variant_name(a.variant),
                   e.mean, e.worst);
            broken += !(e.mean < (a.variant == SAGE_INT8_FP8 ? 0.048 : 0.03));
        }
        free(r);
        release(&a);
    }
    assert_int_equal(broken, 0);
}

int main(void)
{
    const struct CMUnitTest tests[] = {
        cmocka_unit_test(test_distributions),
        cmocka_unit_test(test_language_models),
    };

    return cmocka_run_group_tests(tests, NULL, NULL);
}
