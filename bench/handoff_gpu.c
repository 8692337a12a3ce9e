/*
 * handoff_gpu.c - what a hand-off costs a CUDA stream, and what tenants of a GPU get;
 * bench/bench_handoff and bench/bench_tenants start it.
 *
 *   handoff_gpu chain SOCKET: 20 times (kernel, attention, kernel) on one stream, then a wait for
 *       it. Attention by the daemon and in this process take turns; medians, also of what the
 *       daemon added to each turn, as clocks drift; and how long submissions took.
 *       By chains of 40: what each further link takes, without the beginning of a chain
 *   handoff_gpu rate SOCKET SECONDS: tiny jobs on one stream, as many as the daemon takes, from the
 *       first byte on its input on
 *   handoff_gpu size: the heads of 8,192 tokens, D = 128, that attention takes 10 ms for
 *   handoff_gpu tenant SOCKET NAME: for each line "PLACE HEADS NQ NK DEPTH SECONDS" of its input,
 *       attention here (by libsageattn) or there (by the daemon), DEPTH jobs in flight, from the
 *       next line on
 *
 * Prints lines of tab-separated name, value; a tenant an empty line after each run.
 */
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <time.h>
#include <unistd.h>

#include <cuda_runtime_api.h>

#include "bench/client_kernel.h"
#include "sageclient.h"

enum {
    CHAINS = 20, /* queued before the stream is waited for */
    ROUNDS_MAX = 201,
    DEPTH_MAX = 16,
    LAPS_MAX = 1 << 16, /* of a tenant's jobs, the first that count */
};

struct bench {
    struct sage_client *client;
    struct sage_attn attn;
    char *memory, *workspace;
    size_t workspace_bytes;
    uint64_t *word; /* what the kernels around the attention write to */
    cudaStream_t stream;
};

__attribute__((noreturn)) static void die(const char *what, const char *why)
{
    fprintf(stderr, "handoff_gpu: %s: %s\n", what, why);
    exit(1);
}

static void must(cudaError_t rc, const char *what)
{
    if (rc)
        die(what, cudaGetErrorString(rc));
}

static double now(void)
{
    struct timespec t;

    clock_gettime(CLOCK_MONOTONIC, &t);
    return (double)t.tv_sec + (double)t.tv_nsec / 1e9;
}

static int compare(const void *a, const void *b)
{
    double x = *(const double *)a, y = *(const double *)b;

    return (x > y) - (x < y);
}

/* Of n values, which it sorts. */
static double percentile(double *values, int n, double p)
{
    qsort(values, (size_t)n, sizeof(*values), compare);
    return values[(int)(p * (n - 1) + 0.5)];
}

/* --- the problem --- */

static struct sage_tensor tensor(void *data, int64_t heads, int64_t tokens, int64_t dim)
{
    return (struct sage_tensor){.dtype = SAGE_F16,
                                .data = data,
                                .shape = {1, heads, tokens, dim},
                                .stride = {heads * tokens * dim, tokens * dim, dim, 1}};
}

/* q, k, v and o in one allocation; its contents do not matter here, as long as they are numbers. */
static void make_problem(struct bench *b, int64_t heads, int64_t nq, int64_t nk, int64_t dim)
{
    size_t rows = (size_t)(heads * nq * dim) * 2, keys = (size_t)(heads * nk * dim) * 2;
    struct sage_attn attn = SAGE_ATTN_INIT;

    cudaFree(b->memory);
    cudaFree(b->workspace);
    must(cudaMalloc((void **)&b->memory, 2 * (rows + keys)), "cudaMalloc");
    must(cudaMemset(b->memory, 0x11, 2 * (rows + keys)), "cudaMemset");
    attn.q = tensor(b->memory, heads, nq, dim);
    attn.k = tensor(b->memory + rows, heads, nk, dim);
    attn.v = tensor(b->memory + rows + keys, heads, nk, dim);
    attn.o = tensor(b->memory + rows + 2 * keys, heads, nq, dim);
    attn.variant = SAGE_INT8_FP16;
    b->attn = attn;
    b->workspace_bytes = sage_attn_cuda_workspace(&b->attn, NULL);
    must(cudaMalloc((void **)&b->workspace, b->workspace_bytes + 1), "cudaMalloc");
    must(cudaDeviceSynchronize(), "cudaDeviceSynchronize");
}

static void compute_here(struct bench *b)
{
    struct sage_part part = {.n_groups = sage_attn_groups(&b->attn), .n_rows = -1};
    char why[256];

    if (sage_attn_cuda(&b->attn, &part, b->workspace, b->workspace_bytes, b->stream, why,
                       sizeof(why)))
        die("sage_attn_cuda", why);
}

/* Seconds that the call took. */
static double compute_there(struct bench *b)
{
    double start = now();

    if (sage_attn_enqueue(b->client, &b->attn, b->stream))
        die("sage_attn_enqueue", sage_last_error());
    return now() - start;
}

/* socket: NULL for no daemon. */
static void open_bench(struct bench *b, const char *socket, const char *name)
{
    struct sage_connect_options options = {.socket = socket, .name = name};
    char why[256];

    memset(b, 0, sizeof(*b));
    must(cudaSetDevice(0), "cudaSetDevice");
    if (sage_cuda_load(why, sizeof(why)))
        die("sage_cuda_load", why);
    must(cudaStreamCreateWithFlags(&b->stream, cudaStreamNonBlocking), "cudaStreamCreate");
    must(cudaMalloc((void **)&b->word, sizeof(*b->word)), "cudaMalloc");
    must(cudaMemset(b->word, 0, sizeof(*b->word)), "cudaMemset");
    if (socket && sage_connect(&options, &b->client))
        die("sage_connect", sage_last_error());
}

static void close_bench(struct bench *b)
{
    must(cudaStreamSynchronize(b->stream), "cudaStreamSynchronize");
    if (b->client && sage_stream_error(b->client, b->stream))
        die("sage_stream_error", sage_last_error());
    sage_disconnect(b->client);
}

/* --- chains --- */

/* Microseconds a link; submit: NULL for attention in this process, or `links` times to fill in. */
static double run_chain(struct bench *b, int links, double *submit)
{
    double start = now();

    for (int i = 0; i < links; i++) {
        must((cudaError_t)client_kernel(b->word, b->stream), "client_kernel");
        if (submit)
            submit[i] = compute_there(b) * 1e6;
        else
            compute_here(b);
        must((cudaError_t)client_kernel(b->word, b->stream), "client_kernel");
    }
    must(cudaStreamSynchronize(b->stream), "cudaStreamSynchronize");
    return (now() - start) / links * 1e6;
}

/* As many heads as take `target_us` here, at 8,192 tokens of D = 128 (of 1 ms: 4,096). */
static void calibrate(struct bench *b, double target_us)
{
    int64_t tokens = target_us > 5000 ? 8192 : 4096, heads = 16;

    for (int i = 0; i < 4; i++) { /* time goes by rounds of tiles, not by heads alone */
        make_problem(b, heads, tokens, tokens, 128);
        for (int k = 0; k < 2; k++)
            run_chain(b, CHAINS, NULL);
        double us = run_chain(b, CHAINS, NULL);
        heads = (int64_t)((double)heads * target_us / us + 0.5);
    }
    make_problem(b, heads < 1 ? 1 : heads, tokens, tokens, 128);
}

/* What the turns of one chain took, a link, in microseconds. */
struct turns {
    double here[ROUNDS_MAX], there[ROUNDS_MAX], added[ROUNDS_MAX], submit[ROUNDS_MAX * CHAINS * 2];
};

/* Here and there take turns. Returns what the daemon adds: of each turn, as clocks drift, the
 * median. */
static double take_turns(struct bench *b, int links, int rounds, struct turns *turns)
{
    for (int i = 0; i < rounds; i++) {
        turns->here[i] = run_chain(b, links, NULL);
        turns->there[i] = run_chain(b, links, turns->submit + i * links);
        turns->added[i] = turns->there[i] - turns->here[i];
    }
    return percentile(turns->added, rounds, 0.5);
}

static void measure_chain(struct bench *b, const char *name, int rounds)
{
    static struct turns warm, t, longer;

    take_turns(b, CHAINS, 3, &warm);
    double added = take_turns(b, CHAINS, rounds, &t), here = percentile(t.here, rounds, 0.5);
    double further = 2 * take_turns(b, 2 * CHAINS, rounds / 2 + 1, &longer) - added;
    printf("%s_in_process_us\t%.2f\n", name, here);
    printf("%s_daemon_us\t%.2f\n", name, percentile(t.there, rounds, 0.5));
    printf("%s_added_us\t%.2f\n%s_added_percent\t%.3f\n", name, added, name, added / here * 100);
    printf("%s_further_added_us\t%.2f\n", name, further);
    printf("%s_submit_us\t%.2f\n", name, percentile(t.submit, rounds * CHAINS, 0.5));
    printf("%s_submit_p99_us\t%.2f\n", name, percentile(t.submit, rounds * CHAINS, 0.99));
    fflush(stdout);
}

static void chain(const char *socket)
{
    static const char *const modes[] = {"auto", "sync", "event", "lane"};
    struct bench b;

    open_bench(&b, socket, "bench_handoff");
    make_problem(&b, 1, 64, 64, 64);
    measure_chain(&b, "tiny", ROUNDS_MAX);
    calibrate(&b, 1000);
    measure_chain(&b, "1ms", 121);
    calibrate(&b, 10000);
    measure_chain(&b, "10ms", 11);
    printf("mode\t%s\n", modes[sage_client_mode(b.client)]);
    close_bench(&b);
}

/* --- rate --- */

static void rate(const char *socket, double seconds)
{
    struct bench b;
    long jobs = 0;
    char byte;

    open_bench(&b, socket, "rate");
    make_problem(&b, 1, 64, 64, 64);
    for (int i = 0; i < 100; i++)
        compute_there(&b);
    must(cudaStreamSynchronize(b.stream), "cudaStreamSynchronize");
    printf("ready\t1\n");
    fflush(stdout);
    if (read(STDIN_FILENO, &byte, 1) != 1)
        die("start", "end of file");
    double start = now();
    while (now() - start < seconds) {
        for (int i = 0; i < 16; i++)
            compute_there(&b);
        jobs += 16;
    }
    must(cudaStreamSynchronize(b.stream), "cudaStreamSynchronize");
    double took = now() - start;
    printf("jobs\t%ld\nseconds\t%.3f\njobs_per_s\t%.0f\n", jobs, took, (double)jobs / took);
    fflush(stdout);
    close_bench(&b);
}

/* --- tenants --- */

static void size(void)
{
    struct bench b;

    open_bench(&b, NULL, NULL);
    calibrate(&b, 10000);
    printf("heads\t%lld\n", (long long)b.attn.q.shape[1]);
    close_bench(&b);
}

/* What a tenant is told to do. */
struct order {
    char place[8];
    int heads, nq, nk, depth;
    double seconds;
};

static void submit(struct bench *b, const struct order *order)
{
    if (order->place[0] == 'h')
        compute_here(b);
    else
        compute_there(b);
}

/* `depth` jobs in flight, an event behind each: *took seconds, until the last is over. */
static long fly(struct bench *b, const struct order *order, cudaEvent_t *events, double *laps,
                double *took)
{
    double starts[DEPTH_MAX], start = now();
    long in = 0, out = 0;

    for (;;) {
        bool more = now() - start < order->seconds;
        if (!more && out == in)
            break;
        if (more && in - out < order->depth) {
            starts[in % order->depth] = now();
            submit(b, order);
            must(cudaEventRecord(events[in++ % order->depth], b->stream), "cudaEventRecord");
            continue;
        }
        must(cudaEventSynchronize(events[out % order->depth]), "cudaEventSynchronize");
        if (out < LAPS_MAX)
            laps[out] = (now() - starts[out % order->depth]) * 1e3;
        out++;
    }
    *took = now() - start;
    return out;
}

static bool read_order(struct order *order)
{
    char line[128];

    if (!fgets(line, sizeof(line), stdin))
        return false;
    if (sscanf(line, "%7s %d %d %d %d %lf", order->place, &order->heads, &order->nq, &order->nk,
               &order->depth, &order->seconds) != 6 ||
        order->depth < 1 || order->depth > DEPTH_MAX)
        die("order", line);
    return true;
}

/* One job of the order's, so that all there is to load and to register is. */
static void get_ready(struct bench *b, const struct order *order)
{
    const struct sage_attn *a = &b->attn;
    char go[8];

    if (!b->memory || a->q.shape[1] != order->heads || a->q.shape[2] != order->nq ||
        a->k.shape[2] != order->nk)
        make_problem(b, order->heads, order->nq, order->nk, 128);
    submit(b, order);
    must(cudaStreamSynchronize(b->stream), "cudaStreamSynchronize");
    printf("ready\t1\n");
    fflush(stdout);
    if (!fgets(go, sizeof(go), stdin))
        die("start", "end of file");
}

static void tenant(const char *socket, const char *name)
{
    static double laps[LAPS_MAX];
    cudaEvent_t events[DEPTH_MAX];
    struct order order;
    struct bench b;
    double took;

    open_bench(&b, socket, name);
    for (int i = 0; i < DEPTH_MAX; i++)
        must(cudaEventCreateWithFlags(&events[i], cudaEventDisableTiming), "cudaEventCreate");
    while (read_order(&order)) {
        get_ready(&b, &order);
        long jobs = fly(&b, &order, events, laps, &took);
        int n = jobs < LAPS_MAX ? (int)jobs : LAPS_MAX;
        double ops = (double)jobs * sage_attn_ops(&b.attn, NULL);
        printf("jobs\t%ld\nseconds\t%.4f\ntops\t%.4f\n", jobs, took, ops / took / 1e12);
        printf("p50_ms\t%.4f\n", percentile(laps, n, 0.5));
        printf("p99_ms\t%.4f\n\n", percentile(laps, n, 0.99));
        fflush(stdout);
    }
    close_bench(&b);
}

int main(int argc, char **argv)
{
    if (argc == 3 && !strcmp(argv[1], "chain")) {
        chain(argv[2]);
    } else if (argc == 4 && !strcmp(argv[1], "rate")) {
        rate(argv[2], atof(argv[3]));
    } else if (argc == 2 && !strcmp(argv[1], "size")) {
        size();
    } else if (argc == 4 && !strcmp(argv[1], "tenant")) {
        tenant(argv[2], argv[3]);
    } else {
        fprintf(stderr, "usage: handoff_gpu chain SOCKET | rate SOCKET SECONDS | size |"
                        " tenant SOCKET NAME\n");
        return 2;
    }
    return 0;
}
