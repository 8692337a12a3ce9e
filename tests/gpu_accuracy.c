/*
 * gpu_accuracy.c - errors of the GPU kernels against double precision: the table of bench/accuracy,
 * with the relL1 of peers beside where it is on record (tests/peers_accuracy.tsv).
 */
#include <cuda_runtime_api.h>
#include <pthread.h>
#include <stdatomic.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <unistd.h>

#include "gpu_attn.h"
#include "kernels/kernels.h"
#include "ref64.h"

enum { HEADS = 4, ROWS = 256, MAX_THREADS = 64 };

/* --- reference rows, by all processors --- */

struct rows {
    const struct sage_attn *attn;
    int64_t b, (*where)[2], n;
    double *o, *lse;
    _Atomic int64_t next;
};

static void *take_rows(void *arg)
{
    struct rows *rows = arg;
    const int64_t d = rows->attn->q.shape[3];
    int64_t i;

    while ((i = atomic_fetch_add(&rows->next, 1)) < rows->n) {
        const double lse =
            ref64_row(rows->attn, rows->b, rows->where[i][0], rows->where[i][1], rows->o + i * d);

        if (rows->lse)
            rows->lse[i] = lse;
    }
    return NULL;
}

void rows_in_fp64(const struct sage_attn *attn, int64_t b, int64_t (*where)[2], int64_t n,
                  double *o, double *lse)
{
    struct rows rows = {.attn = attn, .b = b, .where = where, .n = n, .o = o, .lse = lse};
    pthread_t threads[MAX_THREADS];
    const long processors = sysconf(_SC_NPROCESSORS_ONLN);
    int started = 0;

    while (started < processors - 1 && started < MAX_THREADS &&
           !pthread_create(&threads[started], NULL, take_rows, &rows))
        started++;
    take_rows(&rows);
    while (started > 0)
        pthread_join(threads[--started], NULL);
}

/* --- inputs, made side by side --- */

struct set {
    pthread_t thread;
    enum inputs kind;
    int64_t n, d;
    struct sage_attn host, device;
    int64_t where[HEADS * ROWS][2];
    double *reference[2]; /* not causal, causal: [HEADS * ROWS][d] */
};

static struct sage_tensor tensor(int64_t n, int64_t d)
{
    return (struct sage_tensor){
        .dtype = SAGE_F16,
        .data = malloc((size_t)(HEADS * n * d) * 2),
        .shape = {1, HEADS, n, d},
        .stride = {HEADS * n * d, n * d, d, 1},
    };
}

static void *make(void *arg)
{
    struct set *s = arg;
    struct rng rng;

    rng_init(&rng, (uint64_t)s->kind * 1000 + (uint64_t)s->d);
    make_inputs(&rng, s->kind, SAGE_F16, HEADS, s->n, s->d, s->host.q.data, s->host.k.data,
                s->host.v.data);
    return NULL;
}

static void start(struct set *s, enum inputs kind, int64_t n, int64_t d)
{
    *s = (struct set){.kind = kind, .n = n, .d = d, .host = SAGE_ATTN_INIT};
    s->host.q = tensor(n, d);
    s->host.k = tensor(n, d);
    s->host.v = tensor(n, d);
    s->host.o = tensor(n, d);
    for (int64_t i = 0; i < HEADS * ROWS; i++) {
        s->where[i][0] = i / ROWS;
        s->where[i][1] = (2 * (i % ROWS) + 1) * n / (2 * ROWS);
    }
    pthread_create(&s->thread, NULL, make, s);
}

static void finish(struct set *s)
{
    struct sage_tensor *host[] = {&s->host.q, &s->host.k, &s->host.v, &s->host.o};
    struct sage_tensor *device[] = {&s->device.q, &s->device.k, &s->device.v, &s->device.o};

    for (int i = 0; i < 4; i++) {
        free(host[i]->data);
        MUST(cudaFree(device[i]->data));
    }
    free(s->reference[0]);
    free(s->reference[1]);
}

/* Wait for the inputs, bring them to the device, and refer. */
static void ready(struct set *s)
{
    const size_t bytes = (size_t)(HEADS * s->n * s->d) * 2;

    pthread_join(s->thread, NULL);
    s->device = s->host;
    struct sage_tensor *t[] = {&s->device.q, &s->device.k, &s->device.v, &s->device.o};

    for (int i = 0; i < 4; i++) {
        void *there;

        MUST(cudaMalloc(&there, bytes));
        if (i < 3)
            MUST(cudaMemcpy(there, t[i]->data, bytes, cudaMemcpyHostToDevice));
        t[i]->data = there;
    }
    for (int causal = 0; causal < 2; causal++) {
        s->host.causal = causal;
        s->reference[causal] = malloc(sizeof(double) * (size_t)(HEADS * ROWS * s->d));
        rows_in_fp64(&s->host, 0, s->where, HEADS * ROWS, s->reference[causal], NULL);
    }
}

/* --- the table --- */

/* A peer's relL1 as it stands in the file, or "-". */
static const char *peer(const struct set *s, bool causal, const char *name)
{
    static char found[16];
    const char *dir = getenv("SAGE_SRCDIR");
    char path[4096], line[160], kind[16], c[4], p[16], l1[16];
    long long d;
    FILE *file;

    snprintf(path, sizeof path, "%s/tests/peers_accuracy.tsv", dir ? dir : ".");
    strcpy(found, "-");
    if (s->n != 4096) /* what they were recorded at */
        return found;
    file = fopen(path, "r");
    while (file && fgets(line, sizeof line, file))
        if (sscanf(line, "%lld %15s %3s %15s %15s", &d, kind, c, p, l1) == 5 && d == s->d &&
            !strcmp(kind, inputs_name(s->kind)) && !strcmp(c, causal ? "yes" : "no") &&
            !strcmp(p, name))
            strcpy(found, l1);
    if (file)
        fclose(file);
    return found;
}

static int run(struct gpu *gpu, struct set *s)
{
    const size_t bytes = sage_attn_cuda_workspace(&s->device, NULL);
    char why[256] = "";
    const size_t size = (size_t)(HEADS * s->n * s->d) * 2;

    gpu_workspace(gpu, bytes);
    MUST(cudaMemset(s->device.o.data, 0xff, size));
    if (sage_attn_cuda(&s->device, NULL, gpu->workspace, bytes, gpu->stream, why, sizeof why)) {
        fprintf(stderr, "gpu_attn: sage_attn_cuda: %s\n", why);
        return 1;
    }
    MUST(cudaStreamSynchronize(gpu->stream));
    MUST(cudaMemcpy(s->host.o.data, s->device.o.data, size, cudaMemcpyDeviceToHost));
    return 0;
}

static void print_errors(const struct set *s)
{
    const double *r = s->reference[s->device.causal];
    double sum[3] = {0}, worst[3] = {1, 0, 0}, o[SAGE_MAX_HEAD_DIM];

    for (int64_t h = 0; h < HEADS; h++) {
        struct ref64_error e = {0};

        for (int64_t i = h * ROWS; i < (h + 1) * ROWS; i++) {
            for (int64_t c = 0; c < s->d; c++)
                o[c] = ref64_get(&s->host.o, 0, h, s->where[i][1], c);
            ref64_compare(&e, o, r + i * s->d, s->d);
        }
        const double now[3] = {ref64_cos(&e), ref64_l1(&e), ref64_l2(&e)};

        for (int i = 0; i < 3; i++) {
            sum[i] += now[i] / HEADS;
            worst[i] = (i == 0 ? now[i] < worst[i] : now[i] > worst[i]) ? now[i] : worst[i];
        }
    }
    printf("%.6f\t%.5f\t%.5f\t%.6f\t%.5f\t%.5f", sum[0], sum[1], sum[2], worst[0], worst[1],
           worst[2]);
}

static int measure(struct gpu *gpu, struct set *s, bool causal)
{
    const char *setting;

    s->device.causal = causal;
    for (int i = 0; (setting = accuracy_setting(i, &s->device)); i++) {
        if (s->device.variant == SAGE_INT8_FP8 && !gpu->fp8)
            continue;
        if (run(gpu, s))
            return 1;
        printf("%lld\t%s\t%s\t%s\t%s\t", (long long)s->d, inputs_name(s->kind),
               causal ? "yes" : "no", sage_variant_name(s->device.variant), setting);
        print_errors(s);
        printf("\t%s", peer(s, causal, "fa2"));
        printf("\t%s", peer(s, causal, "sa1"));
        printf("\t%s\n", peer(s, causal, "sa2"));
        fflush(stdout);
    }
    return 0;
}

int gpu_accuracy(struct gpu *gpu, int64_t tokens, const char *distribution)
{
    static struct set sets[2 * N_INPUTS_KINDS];
    int n = 0, failures = 0;

    sage_exact_share = 0; /* it is about what quantising does */
    for (int64_t d = 64; d <= 128; d += 64)
        for (int kind = 0; kind < N_INPUTS_KINDS; kind++)
            if (!distribution || !strcmp(distribution, inputs_name((enum inputs)kind)))
                start(&sets[n++], (enum inputs)kind, tokens, d);
    for (int kind = 0; kind < N_INPUTS_KINDS; kind++)
        printf("# %s: %s\n", inputs_name((enum inputs)kind), inputs_what((enum inputs)kind));
    printf("# %lld tokens, %d heads, %d rows of each compared with fp64; fp16 inputs; peers' relL1 "
           "as recorded\n",
           (long long)tokens, HEADS, ROWS);
    printf("head_dim\tdistribution\tcausal\tvariant\tsmoothed\tcos\trelL1\trelL2\tworst_cos\t"
           "worst_relL1\tworst_relL2\tfa2\tsa1\tsa2\n");
    for (int i = 0; i < n; i++) {
        ready(&sets[i]);
        failures += measure(gpu, &sets[i], false) || measure(gpu, &sets[i], true);
        finish(&sets[i]);
    }
    return failures + (n == 0);
}
