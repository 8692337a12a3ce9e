/*
 * demo_client.c - one client of the demo: runs captured layers of language models through a daemon
 * and compares every row with double precision. Where the daemon has a GPU the layers are in device
 * memory and the jobs part of a CUDA stream. usage: demo_client SOCKET DATA_DIR LAYER...
 */
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <time.h>

#include "client/driver.h"
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

/* What the layers are run with. */
struct demo {
    struct sage_client *client;
    struct sage_lane *lane;
    struct device gpu; /* cu: NULL on the CPU */
    struct CUstream_st *stream;
};

/* A layer's tensors, where we see them and, at the same offsets, where the daemon does. */
struct room {
    char *here, *there;
    size_t bytes;
    struct sage_buffer *buffer; /* on the CPU both are in it */
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

/* --- on the GPU --- */

static struct sage_attn move_to(const struct room *room, const struct sage_attn *attn)
{
    struct sage_attn a = *attn;
    struct sage_tensor *const tensors[] = {&a.q, &a.k, &a.v, &a.o};

    for (int i = 0; i < 4; i++)
        tensors[i]->data = room->there + ((char *)tensors[i]->data - room->here);
    return a;
}

static int copy_there(const struct demo *demo, const struct room *room)
{
    return driver_check(demo->gpu.cu->cuMemcpyHtoD((uintptr_t)room->there, room->here, room->bytes),
                        "copy");
}

/* The stream waits for the jobs; here it is only asked whether they went well. */
static int run_on_stream(const struct demo *demo, const struct room *room,
                         const struct sage_attn *attn)
{
    const struct driver *cu = demo->gpu.cu;
    int rc = 0;

    for (int i = 0; !rc && i < REPEATS; i++)
        rc = sage_attn_enqueue(demo->client, attn, demo->stream);
    if (!rc)
        rc = driver_check(cu->cuStreamSynchronize(demo->stream), "cuStreamSynchronize");
    if (!rc)
        rc = sage_stream_error(demo->client, demo->stream);
    if (!rc)
        rc =
            driver_check(cu->cuMemcpyDtoH(room->here, (uintptr_t)room->there, room->bytes), "copy");
    return rc;
}

/* --- on the CPU --- */

/* Submit the layer REPEATS times before waiting for the first: a queue, as an application has. */
static int run_on_lane(const struct demo *demo, const struct sage_attn *attn)
{
    struct sage_job jobs[REPEATS];
    int rc = 0;

    for (int i = 0; !rc && i < REPEATS; i++)
        rc = sage_attn_submit(demo->lane, attn, 0, &jobs[i]);
    for (int i = 0; !rc && i < REPEATS; i++)
        rc = sage_wait(jobs[i], 60000);
    return rc;
}

static int run(const struct demo *demo, const struct room *room, const struct sage_attn *attn,
               double *ms)
{
    struct sage_attn there = move_to(room, attn);
    int rc = demo->gpu.cu ? copy_there(demo, room) : 0;
    double start = now_ms();

    if (!rc)
        rc = demo->gpu.cu ? run_on_stream(demo, room, &there) : run_on_lane(demo, &there);
    *ms = (now_ms() - start) / REPEATS;
    return rc;
}

static bool run_variant(const struct demo *demo, const struct room *room, const struct layer *layer,
                        struct sage_attn *attn, int variant, const double *r)
{
    double ms;

    memset(attn->o.data, 0xff, bytes_of(&attn->o)); /* NaN, should anything stay unwritten */
    attn->variant = variants[variant].variant;
    int rc = run(demo, room, attn, &ms);
    if (rc == SAGE_EUNSUPPORTED) { /* FP8 before compute capability 8.9 */
        printf("%-12s %s: %s\n", layer->name, variants[variant].name, sage_last_error());
        return true;
    }
    if (rc)
        return fail("a job");
    struct ref64_error e = compare(attn, r);
    double l1 = ref64_l1(&e), cos = ref64_cos(&e);
    bool good = l1 <= variants[variant].l1 && cos >= variants[variant].cos;
    printf("%-12s %2lld/%-2lld %5lld %4lld  %-6s %-9s %9.6f %8.5f %6.3f %8.2f  %s\n", layer->name,
           (long long)attn->q.shape[1], (long long)attn->k.shape[1], (long long)attn->q.shape[2],
           (long long)attn->q.shape[3], attn->causal ? "causal" : "full", variants[variant].name,
           cos, l1, variants[variant].l1, ms, good ? "ok" : "WORSE");
    return good;
}

static bool make_room(const struct demo *demo, size_t bytes, struct room *room)
{
    uint64_t memory = 0;

    *room = (struct room){.bytes = bytes};
    if (!demo->gpu.cu) {
        if (sage_buffer_alloc(demo->client, bytes, &room->buffer))
            return fail("sage_buffer_alloc");
        room->here = room->there = sage_buffer_data(room->buffer);
        return true;
    }
    room->here = malloc(bytes);
    if (!room->here || driver_check(demo->gpu.cu->cuMemAlloc(&memory, bytes), "cuMemAlloc"))
        return fail("memory");
    room->there = (char *)(uintptr_t)memory;
    return true;
}

static bool leave_room(const struct demo *demo, struct room *room)
{
    if (!demo->gpu.cu)
        return sage_buffer_free(room->buffer) ? fail("sage_buffer_free") : true;
    free(room->here);
    return driver_check(demo->gpu.cu->cuMemFree((uintptr_t)room->there), "cuMemFree")
               ? fail("memory")
               : true;
}

static bool run_layer(const struct demo *demo, const struct layer *layer)
{
    struct sage_attn attn = SAGE_ATTN_INIT;
    struct room room;
    size_t bytes = 2 * bytes_of(&layer->q) + bytes_of(&layer->k) + bytes_of(&layer->v) + 4096;

    if (!make_room(demo, bytes, &room))
        return false;
    char *at = room.here;
    attn.q = place(&at, &layer->q);
    attn.k = place(&at, &layer->k);
    attn.v = place(&at, &layer->v);
    attn.o = place(&at, &layer->q);
    attn.causal = layer->causal;
    double *r = reference(&attn);
    bool good = r && run_variant(demo, &room, layer, &attn, 0, r) &&
                run_variant(demo, &room, layer, &attn, 1, r);
    free(r);
    return leave_room(demo, &room) && good;
}

static bool start(struct demo *demo, const char *socket, const char *name)
{
    struct sage_connect_options options = {.socket = socket, .name = name};
    struct sage_server server;

    if (sage_connect(&options, &demo->client) || sage_server_info(demo->client, &server))
        return fail("sage_connect");
    if (!server.uuid[0])
        return sage_lane_create(demo->client, &demo->lane) ? fail("sage_lane_create") : true;
    if (device_open(&demo->gpu, server.uuid) ||
        driver_check(demo->gpu.cu->cuStreamCreate(&demo->stream, CU_STREAM_ASIDE), "stream"))
        return fail("GPU");
    return true;
}

int main(int argc, char **argv)
{
    struct demo demo = {0};

    if (argc < 4) {
        fprintf(stderr, "usage: demo_client SOCKET DATA_DIR LAYER...\n");
        return 2;
    }
    bool good = start(&demo, argv[1], argv[3]);
    for (int i = 3; i < argc && good; i++) {
        struct layer layer = {0};
        good = load(argv[2], argv[i], &layer) && run_layer(&demo, &layer);
        free(layer.q.data);
        free(layer.k.data);
        free(layer.v.data);
    }
    /* Stay until told to leave, so that the daemon's table of clients shows this one. */
    fflush(stdout);
    if (good)
        while (getchar() != EOF)
            continue;
    sage_disconnect(demo.client);
    return good ? 0 : 1;
}
