/*
 * accuracy.c - errors of the CPU implementation against double precision, as a table.
 *
 *   accuracy [-n tokens] [-r rows] [-h heads] [-D head_dim] [-d distribution] [-V variant]
 *
 * rows: query rows of each head that are compared, spread evenly. One line for each head dimension,
 * distribution, mask, variant and smoothing: average over the heads, then the worst head.
 */
#include <math.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <unistd.h>

#include "kernels/problem.h"
#include "tests/inputs.h"
#include "tests/ref64.h"

enum { MAX_HEADS = 64 };

static const enum sage_dtype dtype = SAGE_F16;

struct options {
    int64_t tokens, rows, heads, head_dim;
    const char *distribution, *variant;
};

/* One set of inputs, and the reference rows of it. */
struct set {
    int64_t n, d, heads, rows;
    struct sage_attn attn;
    double *reference; /* [heads][rows][d] */
    void *workspace;
    size_t bytes;
};

static struct sage_tensor tensor(int64_t heads, int64_t n, int64_t d)
{
    return (struct sage_tensor){
        .dtype = dtype,
        .data = malloc((size_t)(heads * n * d) * 2),
        .shape = {1, heads, n, d},
        .stride = {heads * n * d, n * d, d, 1},
    };
}

static void set_init(struct set *s, const struct options *opt, enum inputs kind, int64_t d)
{
    struct rng rng;

    rng_init(&rng, (uint64_t)kind * 1000 + (uint64_t)d);
    *s = (struct set){.n = opt->tokens, .d = d, .heads = opt->heads, .rows = opt->rows};
    s->attn = (struct sage_attn)SAGE_ATTN_INIT;
    s->attn.q = tensor(s->heads, s->n, d);
    s->attn.k = tensor(s->heads, s->n, d);
    s->attn.v = tensor(s->heads, s->n, d);
    s->attn.o = tensor(s->heads, s->n, d);
    make_inputs(&rng, kind, dtype, s->heads, s->n, d, s->attn.q.data, s->attn.k.data,
                s->attn.v.data);
    s->reference = malloc(sizeof(double) * (size_t)(s->heads * s->rows * d));
    s->attn.variant = SAGE_INT8_FP8;
    s->bytes = sage_attn_workspace(&s->attn, NULL);
    s->workspace = aligned_alloc(64, s->bytes);
}

static void set_finish(struct set *s)
{
    free(s->attn.q.data);
    free(s->attn.k.data);
    free(s->attn.v.data);
    free(s->attn.o.data);
    free(s->reference);
    free(s->workspace);
}

/* The i-th of the rows that are looked at: the middle of its share. */
static int64_t sample(const struct set *s, int64_t i)
{
    return (2 * i + 1) * s->n / (2 * s->rows);
}

static double *reference(const struct set *s, int64_t head, int64_t i)
{
    return s->reference + (head * s->rows + i) * s->d;
}

static void refer(struct set *s, bool causal)
{
    s->attn.causal = causal;
    for (int64_t h = 0; h < s->heads; h++)
        for (int64_t i = 0; i < s->rows; i++)
            ref64_row(&s->attn, 0, h, sample(s, i), reference(s, h, i));
}

static void measure(struct set *s, struct sage_cpu *cpu, const char *label)
{
    double sum[3] = {0}, worst[3] = {1, 0, 0}, o[SAGE_MAX_HEAD_DIM];

    sage_attn_cpu(cpu, &s->attn, NULL, s->workspace, s->bytes);
    for (int64_t h = 0; h < s->heads; h++) {
        struct ref64_error e = {0};

        for (int64_t i = 0; i < s->rows; i++) {
            for (int64_t c = 0; c < s->d; c++)
                o[c] = ref64_get(&s->attn.o, 0, h, sample(s, i), c);
            ref64_compare(&e, o, reference(s, h, i), s->d);
        }
        const double now[3] = {ref64_cos(&e), ref64_l1(&e), ref64_l2(&e)};

        for (int i = 0; i < 3; i++) {
            sum[i] += now[i] / (double)s->heads;
            worst[i] = (i == 0 ? now[i] < worst[i] : now[i] > worst[i]) ? now[i] : worst[i];
        }
    }
    printf("%s\t%.6f\t%.5f\t%.5f\t%.6f\t%.5f\t%.5f\n", label, sum[0], sum[1], sum[2], worst[0],
           worst[1], worst[2]);
    fflush(stdout);
}

/* All variants and settings of one set. */
static void variants(struct set *s, struct sage_cpu *cpu, const struct options *opt,
                     enum inputs kind)
{
    const char *setting;
    char label[128];

    for (int i = 0; (setting = accuracy_setting(i, &s->attn)); i++) {
        const char *name = sage_variant_name(s->attn.variant);

        if (opt->variant && strcmp(opt->variant, name))
            continue;
        snprintf(label, sizeof label, "%lld\t%s\t%s\t%s\t%s", (long long)s->d, inputs_name(kind),
                 s->attn.causal ? "yes" : "no", name, setting);
        measure(s, cpu, label);
    }
}

static void distribution(struct sage_cpu *cpu, const struct options *opt, enum inputs kind,
                         int64_t d)
{
    struct set s;

    set_init(&s, opt, kind, d);
    for (int causal = 0; causal < 2; causal++) {
        refer(&s, causal);
        variants(&s, cpu, opt, kind);
    }
    set_finish(&s);
}

static int options(struct options *opt, int argc, char **argv)
{
    int c;

    while ((c = getopt(argc, argv, "n:r:h:D:d:V:")) != -1)
        switch (c) {
        case 'n':
            opt->tokens = atoll(optarg);
            break;
        case 'r':
            opt->rows = atoll(optarg);
            break;
        case 'h':
            opt->heads = atoll(optarg);
            break;
        case 'D':
            opt->head_dim = atoll(optarg);
            break;
        case 'd':
            opt->distribution = optarg;
            break;
        case 'V':
            opt->variant = optarg;
            break;
        default:
            return -1;
        }
    return optind == argc && opt->tokens > 0 && opt->rows > 0 && opt->rows <= opt->tokens &&
                   opt->heads > 0 && opt->heads <= MAX_HEADS && opt->head_dim % 8 == 0 &&
                   opt->head_dim <= SAGE_MAX_HEAD_DIM
               ? 0
               : -1;
}

int main(int argc, char **argv)
{
    struct options opt = {.tokens = 4096, .rows = 256, .heads = 4};

    if (options(&opt, argc, argv)) {
        fprintf(stderr, "usage: accuracy [-n tokens] [-r rows] [-h heads] [-D head_dim] "
                        "[-d distribution] [-V variant]\n");
        return 2;
    }
    struct sage_cpu *cpu = sage_cpu_create(0);

    if (!cpu)
        return 1;
    for (int kind = 0; kind < N_INPUTS_KINDS; kind++)
        printf("# %s: %s\n", inputs_name((enum inputs)kind), inputs_what((enum inputs)kind));
    printf("# %lld tokens, %lld heads, %lld rows of each compared with fp64; fp16 inputs\n",
           (long long)opt.tokens, (long long)opt.heads, (long long)opt.rows);
    printf("head_dim\tdistribution\tcausal\tvariant\tsmoothed\tcos\trelL1\trelL2\tworst_cos\t"
           "worst_relL1\tworst_relL2\n");
    for (int64_t d = 64; d <= 128; d += 64)
        for (int kind = 0; kind < N_INPUTS_KINDS; kind++)
            if (!opt.distribution || !strcmp(opt.distribution, inputs_name((enum inputs)kind)))
                if (!opt.head_dim || opt.head_dim == d)
                    distribution(cpu, &opt, (enum inputs)kind, d);
    sage_cpu_destroy(cpu);
    return 0;
}
