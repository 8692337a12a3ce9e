/*
 * attn_cpu.c - times sage_attn_cpu().
 *
 *   attn_cpu HEADS TOKENS HEAD_DIM THREADS [CALLS]
 *
 * Prints seconds for a call (median), for int8_fp16 and int8_fp8, causal no and yes. fp16 inputs,
 * N(0,1). attn_vs_numpy.py runs it.
 */
#include <stdio.h>
#include <stdlib.h>
#include <time.h>

#include "kernels/problem.h"
#include "tests/inputs.h"

static struct sage_tensor tensor(int64_t heads, int64_t n, int64_t d)
{
    return (struct sage_tensor){
        .dtype = SAGE_F16,
        .data = malloc((size_t)(heads * n * d) * 2),
        .shape = {1, heads, n, d},
        .stride = {heads * n * d, n * d, d, 1},
    };
}

static double now(void)
{
    struct timespec t;

    clock_gettime(CLOCK_MONOTONIC, &t);
    return (double)t.tv_sec + 1e-9 * (double)t.tv_nsec;
}

static int by_value(const void *a, const void *b)
{
    const double x = *(const double *)a, y = *(const double *)b;

    return (x > y) - (x < y);
}

static int time_one(struct sage_cpu *cpu, const struct sage_attn *attn, int calls)
{
    const size_t bytes = sage_attn_workspace(attn, NULL);
    void *workspace = aligned_alloc(64, bytes);
    double *seconds = malloc(sizeof *seconds * (size_t)calls);
    int status = sage_attn_cpu(cpu, attn, NULL, workspace, bytes);

    for (int i = 0; i < calls && !status; i++) {
        const double start = now();

        status = sage_attn_cpu(cpu, attn, NULL, workspace, bytes);
        seconds[i] = now() - start;
    }
    qsort(seconds, (size_t)calls, sizeof *seconds, by_value);
    printf("%s %d %.6f\n", sage_variant_name(attn->variant), attn->causal, seconds[calls / 2]);
    free(seconds);
    free(workspace);
    return status;
}

int main(int argc, char **argv)
{
    if (argc < 5) {
        fprintf(stderr, "usage: attn_cpu HEADS TOKENS HEAD_DIM THREADS [CALLS]\n");
        return 2;
    }
    const int64_t heads = atoll(argv[1]), n = atoll(argv[2]), d = atoll(argv[3]);
    const int calls = argc > 5 ? atoi(argv[5]) : 5;
    struct sage_cpu *cpu = sage_cpu_create(atoi(argv[4]));
    struct sage_attn attn = SAGE_ATTN_INIT;
    char why[128];
    struct rng rng;

    attn.q = tensor(heads, n, d);
    attn.k = tensor(heads, n, d);
    attn.v = tensor(heads, n, d);
    attn.o = tensor(heads, n, d);
    if (!cpu || calls < 1 || sage_attn_check(&attn, why, sizeof why)) {
        fprintf(stderr, "attn_cpu: %s\n", !cpu ? "no memory" : calls < 1 ? "CALLS" : why);
        return 1;
    }
    rng_init(&rng, 1);
    make_inputs(&rng, IN_NORMAL, SAGE_F16, heads, n, d, attn.q.data, attn.k.data, attn.v.data);
    for (int i = 0; i < 4; i++) {
        attn.variant = i / 2 ? SAGE_INT8_FP8 : SAGE_INT8_FP16;
        attn.causal = i % 2;
        if (time_one(cpu, &attn, calls))
            return 1;
    }
    sage_cpu_destroy(cpu);
    free(attn.q.data);
    free(attn.k.data);
    free(attn.v.data);
    free(attn.o.data);
    return 0;
}
