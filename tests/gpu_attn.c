/*
 * gpu_attn.c - sage_attn_cuda() against sage_attn_cpu() and double precision.
 *
 *   gpu_attn [--n=2000] [--seed=S] [--only=K] [--list] [--max-tokens=1500] [--separate]
 *            a sweep over random problems; seed: from the clock unless given; only: one of them;
 *            list: say what they are; separate: an allocation for each tensor
 *   gpu_attn --edges [--separate]     what sageattn.h says of edges and errors
 *   gpu_attn --big                    beyond 2^31 bytes, 200K tokens
 *   gpu_attn --accuracy [--tokens=4096] [--distribution=NAME]
 *
 * Exit status 0, 1 on a failure, 77 where there is no GPU. Of a failed problem a line says what is
 * wrong, what it was and how to repeat it.
 */
#include <getopt.h>
#include <limits.h>
#include <math.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <time.h>

#include "gpu_attn.h"
#include "kernels/kernels.h"

enum { MAX_FAILURES = 20, ROWS_64 = 2, EVERY_64 = 4 };

struct options {
    int64_t n, only, max_tokens, tokens;
    uint64_t seed;
    const char *distribution;
    int list, edges, big, accuracy, separate;
};

enum { EXACT = 2, N_ROWS }; /* after the variants: what is the same in both */

/* The worst of what has been seen of a variant and a dtype; and in which problem. */
struct row {
    int64_t problems, heads;
    double mean;
    struct distance worst;
    int64_t l1_in, element_in, lse_in;
};

static uint64_t seed_of(const struct options *opt, int64_t k)
{
    struct rng rng;

    rng_init(&rng, opt->seed * 0x9e3779b97f4a7c15 + (uint64_t)k);
    return rng_bits(&rng);
}

static void worse(double *worst, double now, int64_t *where, int64_t k)
{
    if (now <= *worst)
        return;
    *worst = now;
    *where = k;
}

static void note(struct row rows[N_ROWS][2], const struct problem *p, const struct distance *far,
                 int64_t k)
{
    const int variant = p->exact ? EXACT : p->fp8;
    struct row *r = &rows[variant][p->attn.q.dtype == SAGE_BF16];

    r->problems++;
    r->mean += far->mean_l1 * (double)far->heads;
    r->heads += far->heads;
    r->worst.l1 = fmax(r->worst.l1, far->l1);
    worse(&r->worst.l1_of_bound, far->l1_of_bound, &r->l1_in, k);
    worse(&r->worst.element_of_bound, far->element_of_bound, &r->element_in, k);
    worse(&r->worst.lse, far->lse, &r->lse_in, k);
}

static void print_table(struct row rows[N_ROWS][2])
{
    static const char *const names[] = {"int8_fp16", "int8_fp8", "exact"};

    printf("variant\tdtype\tproblems\theads\tmean_relL1\tworst_relL1\tof_bound\tin\t"
           "element_of_bound\tin\tlse\tin\n");
    for (int variant = 0; variant < N_ROWS; variant++)
        for (int dtype = 0; dtype < 2; dtype++) {
            const struct row *r = &rows[variant][dtype];

            if (r->problems)
                printf("%s\t%s\t%lld\t%lld\t%.6f\t%.5f\t%.2f\t%lld\t%.2f\t%lld\t%.2g\t%lld\n",
                       names[variant], dtype ? "bf16" : "f16", (long long)r->problems,
                       (long long)r->heads, r->mean / (double)(r->heads ? r->heads : 1),
                       r->worst.l1, r->worst.l1_of_bound, (long long)r->l1_in,
                       r->worst.element_of_bound, (long long)r->element_in, r->worst.lse,
                       (long long)r->lse_in);
        }
}

static int sweep(struct gpu *gpu, const struct options *opt)
{
    struct row rows[N_ROWS][2] = {{{0}}};
    struct problem *p = problem_create();
    struct timespec start, end;
    char why[512], text[1024] = "";
    const double exact_share = sage_exact_share;
    int64_t failures = 0, done = 0;

    if (!p)
        return 1;
    printf("# seed %llu\n", (unsigned long long)opt->seed);
    clock_gettime(CLOCK_MONOTONIC, &start);
    for (int64_t k = 0; k < opt->n && failures < MAX_FAILURES; k++) {
        struct distance far;

        if (opt->only >= 0 && k != opt->only)
            continue;
        problem_reset(p, seed_of(opt, k));
        problem_random(p, opt->max_tokens, !gpu || gpu->fp8);
        sage_exact_share = k % 2 ? exact_share : 0; /* short sequences are quantised as well */
        sage_few_share = (double)(k / 4 % 2);       /* or hardly one has the larger tiles */
        sage_most_blocks = k / 2 % 2 ? 1 + (unsigned)(k / 4 % 5) : UINT_MAX;
        snprintf(p->repeat, sizeof p->repeat, "gpu_attn --seed=%llu --max-tokens=%lld --only=%lld",
                 (unsigned long long)opt->seed, (long long)opt->max_tokens, (long long)k);
        if (opt->list || opt->only >= 0) {
            problem_describe(p, text, sizeof text);
            printf("%lld: %s\n", (long long)k, text);
        }
        if (!gpu)
            continue;
        if (!gpu_check(gpu, p, k % EVERY_64 ? 0 : ROWS_64, &far, why, sizeof why)) {
            problem_describe(p, text, sizeof text);
            printf("FAILED %s\n  %s\n  %s\n", why, text, p->repeat);
            fflush(stdout);
            failures++;
        }
        note(rows, p, &far, k);
        done++;
    }
    sage_most_blocks = UINT_MAX;
    sage_exact_share = exact_share;
    sage_few_share = 1;
    clock_gettime(CLOCK_MONOTONIC, &end);
    print_table(rows);
    printf("sweep: %lld problems, %lld failed, %.1f s\n", (long long)done, (long long)failures,
           (double)(end.tv_sec - start.tv_sec) + 1e-9 * (double)(end.tv_nsec - start.tv_nsec));
    problem_destroy(p);
    return failures > 0;
}

static int parse(struct options *opt, int argc, char **argv)
{
    enum { N = 256, SEED, ONLY, MAX_TOKENS, TOKENS, DISTRIBUTION };
    const struct option options[] = {
        {"n", required_argument, NULL, N},
        {"seed", required_argument, NULL, SEED},
        {"only", required_argument, NULL, ONLY},
        {"max-tokens", required_argument, NULL, MAX_TOKENS},
        {"tokens", required_argument, NULL, TOKENS},
        {"distribution", required_argument, NULL, DISTRIBUTION},
        {"list", no_argument, &opt->list, 1},
        {"edges", no_argument, &opt->edges, 1},
        {"big", no_argument, &opt->big, 1},
        {"accuracy", no_argument, &opt->accuracy, 1},
        {"separate", no_argument, &opt->separate, 1},
        {0},
    };
    int c;

    while ((c = getopt_long(argc, argv, "", options, NULL)) != -1)
        if (c == N)
            opt->n = atoll(optarg);
        else if (c == SEED)
            opt->seed = strtoull(optarg, NULL, 0);
        else if (c == ONLY)
            opt->only = atoll(optarg);
        else if (c == MAX_TOKENS)
            opt->max_tokens = atoll(optarg);
        else if (c == TOKENS)
            opt->tokens = atoll(optarg);
        else if (c == DISTRIBUTION)
            opt->distribution = optarg;
        else if (c != 0)
            return -1;
    if (opt->only >= opt->n)
        opt->n = opt->only + 1;
    return optind == argc && opt->max_tokens > 0 && opt->tokens > 0 ? 0 : -1;
}

int main(int argc, char **argv)
{
    struct options opt = {.n = 2000, .only = -1, .max_tokens = 1500, .tokens = 4096};
    struct timespec now;
    struct gpu gpu;
    int status;

    clock_gettime(CLOCK_REALTIME, &now);
    opt.seed = (uint64_t)now.tv_sec * 1000 + (uint64_t)now.tv_nsec / 1000000;
    if (parse(&opt, argc, argv)) {
        fprintf(stderr, "usage: gpu_attn [--n=N] [--seed=S] [--only=K] [--list] [--max-tokens=N]\n"
                        "                [--edges] [--big] [--accuracy [--tokens=N] "
                        "[--distribution=NAME]] [--separate]\n");
        return 2;
    }
    if (opt.list)
        return sweep(NULL, &opt);
    if ((status = gpu_init(&gpu, opt.separate)))
        return status;
    printf("# %s\n", gpu.name);
    status = opt.accuracy ? gpu_accuracy(&gpu, opt.tokens, opt.distribution)
             : opt.edges  ? gpu_edges(&gpu, opt.seed)
             : opt.big    ? gpu_big(&gpu, opt.seed)
                          : sweep(&gpu, &opt);
    gpu_finish(&gpu);
    return status ? 1 : 0;
}
