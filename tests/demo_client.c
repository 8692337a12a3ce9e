/*
 * demo_client.c - one client of the demo: runs captured layers of language models through a daemon
 * and compares every row with double precision. usage: demo_client SOCKET DATA_DIR LAYER...
 */
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <time.h>

#include "sageclient.h"
#include "tests/npy.h"
#include "tests/ref64.h"

enum { REPEATS = 20 };

/*
 * Largest relL1 on these inputs. int8_fp16: INT8 scores; measured up to 0.023. int8_fp8: the
 * rounding of P and V to e4m3 as well; measured up to 0.032.
 */
static const struct {
    enum sage_variant variant;
    const char *name;
    double l1, cos;
} variants[] = {
    {SAGE_INT8_FP16, "int8_fp16", 0.025, 0.9995},
    {SAGE_INT8_FP8, "int8_fp8", 0.050, 0.9985},
};

struct layer {
    char name[64];
    bool causal;
    struct sage_tensor q, k, v; /* with memory of their own */
};

static bool fail(const char *what)
{
    fprintf(stderr, "demo_client: %s: %s\n", what, sage_last_error());
    return false;
}

static double now_ms(void)
{
    struct timespec t;

    clock_gettime(CLOCK_MONOTONIC, &t);
    return (double)t.tv_sec * 1e3 + (double)t.tv_nsec / 1e6;
}

/* index.tsv: name, model, layer, causal, ... */
static bool is_causal(const char *dir, const char *name, bool *causal)
{
    char path[512], line[256], row[64], yes[8];
    bool found = false;

    snprintf(path, sizeof(path), "%s/index.tsv", dir);
    FILE *f = fopen(path, "r");
    while (f && !found && fgets(line, sizeof(line), f))
        found = sscanf(line, "%63s %*s %*s %7s", row, yes) == 2 && !strcmp(row, name);
    if (f)
        fclose(f);
    *causal = found && !strcmp(yes, "yes");
    return found;
}

static bool load(const char *dir, const char *name, struct layer *layer)
{
    struct sage_tensor *const arrays[] = {&layer->q, &layer->k, &layer->v};
    char path[512];

    snprintf(layer->name, sizeof(layer->name), "%s", name);
    if (!is_causal(dir, name, &layer->causal)) {
        fprintf(stderr, "demo_client: %s is not in %s/index.tsv\n", name, dir);
        return false;
    }
    for (int i = 0; i < 3; i++) {
        snprintf(path, sizeof(path), "%s/%s-%c.npy", dir, name, "qkv"[i]);
        if (!npy_load(path, arrays[i]))
            return false;
    }
    return true;
}

static size_t bytes_of(const struct sage_tensor *t)
{
    return (size_t)(t->shape[0] * t->shape[1] * t->shape[2] * t->shape[3]) * sizeof(uint16_t);
}

/* Copy a contiguous tensor into the shared buffer. */
static struct sage_tensor place(char **at, const struct sage_tensor *from)
{
    struct sage_tensor t = *from;

    t.data = memcpy(*at, from->data, bytes_of(from));
    *at += (bytes_of(from) + 63) / 64 * 64;
    return t;
}

/* o in double precision, [Hq][Nq][D] (batch 1). NULL: no memory. */
static double *reference(const struct sage_attn *attn)
{
    int64_t heads = attn->q.shape[1], n = attn->q.shape[2], d = attn->q.shape[3];
    double *r = malloc((size_t)(heads * n * d) * sizeof(*r));

    for (int64_t h = 0; r && h < heads; h++)
        for (int64_t i = 0; i < n; i++)
            ref64_row(attn, 0, h, i, r + (h * n + i) * d);
    return r;
}

static struct ref64_error compare(const struct sage_attn *attn, const double *r)
{
    struct ref64_error e = {0};
    double o[SAGE_MAX_HEAD_DIM];
    int64_t d = attn->q.shape[3];

    for (int64_t h = 0; h < attn->q.shape[1]; h++) {
        for (int64_t i = 0; i < attn->q.shape[2]; i++, r += d) {
            for (int64_t c = 0; c < d; c++)
                o[c] = ref64_get(&attn->o, 0, h, i, c);
            ref64_compare(&e, o, r, d);
        }
    }
    return e;
}

/* Submit the layer REPEATS times before waiting for the first: a queue, as an application has. */
static bool run(struct sage_lane *lane, const struct sage_attn *attn, double *ms)
{
    struct sage_job jobs[REPEATS];
    double start = now_ms();

    for (int i = 0; i < REPEATS; i++)
        if (sage_attn_submit(lane, attn, 0, &jobs[i]))
            return fail("sage_attn_submit");
    for (int i = 0; i < REPEATS; i++)
        if (sage_wait(jobs[i], 60000))
            return fail("sage_wait");
    *ms = (now_ms() - start) / REPEATS;
    return true;
}

static bool run_variant(struct sage_lane *lane, const struct layer *layer, struct sage_attn *attn,
                        int variant, const double *r)
{
    double ms;

    memset(attn->o.data, 0xff, bytes_of(&attn->o)); /* NaN, should anything stay unwritten */
    attn->variant = variants[variant].variant;
    if (!run(lane, attn, &ms))
        return false;
    struct ref64_error e = compare(attn, r);
    double l1 = ref64_l1(&e), cos = ref64_cos(&e);
    bool good = l1 <= variants[variant].l1 && cos >= variants[variant].cos;
    printf("%-12s %2lld/%-2lld %5lld %4lld  %-6s %-9s %9.6f %8.5f %6.3f %8.2f  %s\n", layer->name,
           (long long)attn->q.shape[1], (long long)attn->k.shape[1], (long long)attn->q.shape[2],
           (long long)attn->q.shape[3], attn->causal ? "causal" : "full", variants[variant].name,
           cos, l1, variants[variant].l1, ms, good ? "ok" : "WORSE");
    return good;
}

static bool run_layer(struct sage_client *client, struct sage_lane *lane, const struct layer *layer)
{
    struct sage_attn attn = SAGE_ATTN_INIT;
    struct sage_buffer *buffer;
    size_t bytes = 2 * bytes_of(&layer->q) + bytes_of(&layer->k) + bytes_of(&layer->v) + 4096;

    if (sage_buffer_alloc(client, bytes, &buffer))
        return fail("sage_buffer_alloc");
    char *at = sage_buffer_data(buffer);
    attn.q = place(&at, &layer->q);
    attn.k = place(&at, &layer->k);
    attn.v = place(&at, &layer->v);
    attn.o = place(&at, &layer->q);
    attn.causal = layer->causal;
    double *r = reference(&attn);
    bool good = r && run_variant(lane, layer, &attn, 0, r) && run_variant(lane, layer, &attn, 1, r);
    free(r);
    return sage_buffer_free(buffer) ? fail("sage_buffer_free") : good;
}

int main(int argc, char **argv)
{
    struct sage_client *client;
    struct sage_lane *lane;
    bool good = true;

    if (argc < 4) {
        fprintf(stderr, "usage: demo_client SOCKET DATA_DIR LAYER...\n");
        return 2;
    }
    struct sage_connect_options options = {.socket = argv[1], .name = argv[3]};
    if (sage_connect(&options, &client))
        return fail("sage_connect"), 1;
    if (sage_lane_create(client, &lane))
        return fail("sage_lane_create"), 1;
    for (int i = 3; i < argc && good; i++) {
        struct layer layer = {0};
        good = load(argv[2], argv[i], &layer) && run_layer(client, lane, &layer);
        free(layer.q.data);
        free(layer.k.data);
        free(layer.v.data);
    }
    /* Stay until told to leave, so that the daemon's table of clients shows this one. */
    fflush(stdout);
    if (good)
        while (getchar() != EOF)
            continue;
    sage_disconnect(client);
    return good ? 0 : 1;
}
