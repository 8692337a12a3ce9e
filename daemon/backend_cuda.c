/*
 * backend_cuda.c - a GPU as a device: a stream is a CUDA stream. The loop launches, and reads in
 * pinned memory what the device has written about each piece: when it began, when it ended.
 *
 * The end of a job is told to its client by the stream itself, in the client's page; the piece's
 * record comes behind that, so that nothing writes to a page any more whose pieces are all over.
 *
 * The loop waits for nothing on the device. Its thread and those of the pool all have the primary
 * context of the one device current.
 */
#include "daemon/backend_cuda.h"

#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <strings.h>
#include <sys/prctl.h>

#include "daemon/daemon.h"
#include "daemon/log.h"

#define ASK_NS UINT64_C(10000000) /* how often a stream is asked whether it still lives */
/*
 * How late the driver's threads may be. One of them wakes ten times a second and finds nothing to
 * do: what there is to do wakes it by a descriptor.
 */
#define DRIVER_SLACK_NS 1000000000ul

struct started {
    struct piece *piece; /* not owned */
    struct sage_cuda_stamp *stamp;
    struct graph *graph; /* whose stamp it is, or NULL */
};

/* The ring has one writer and one reader, both the loop. */
struct stream {
    struct device *device;
    cudaStream_t cuda;
    void *workspace;
    size_t bytes;
    struct graphs *graphs;
    struct sage_cuda_stamp *stamps; /* pinned: the device writes, the loop reads. By ring entry */
    uint32_t *go; /* of the device: is the piece that the stream is at to be computed? Owned */
    struct started ring[STREAM_DEPTH];
    unsigned in, out;
    uint64_t asked_ns;
};

/* --- errors --- */

static void lose(struct device *d, const char *what, cudaError_t rc)
{
    int lives = 0;

    if (__atomic_compare_exchange_n(&d->lost, &lives, rc ? rc : cudaErrorUnknown, false,
                                    __ATOMIC_RELAXED, __ATOMIC_RELAXED))
        log_error("cuda_lost", "gpu=%s call=\"%s\" error=%s text=\"%s\"", d->uuid, what,
                  cudaGetErrorName(rc), cudaGetErrorString(rc));
}

/* Of a lost context every call fails, also of an empty stream. */
static bool probe(struct device *d)
{
    if (__atomic_load_n(&d->lost, __ATOMIC_RELAXED))
        return true;
    cudaError_t rc = cudaStreamQuery(d->probe);
    if (rc == cudaSuccess || rc == cudaErrorNotReady)
        return false;
    lose(d, "cudaStreamQuery", rc);
    return true;
}

static bool is_lost(struct device *d, char *why)
{
    if (!probe(d))
        return false;
    cudaError_t rc = (cudaError_t)__atomic_load_n(&d->lost, __ATOMIC_RELAXED);
    snprintf(why, PROTO_TEXT_MAX, "%s (%s)", cudaGetErrorName(rc), cudaGetErrorString(rc));
    return true;
}

bool cuda_is_lost(struct device *d, int rc, const char *what)
{
    /* A process gets no other MPS server; a stream, which goes past it, need not know. */
    if (rc == cudaErrorMpsConnectionFailed || rc == cudaErrorMpsRpcFailure ||
        rc == cudaErrorMpsServerNotReady || rc == cudaErrorMpsClientTerminated)
        lose(d, what, (cudaError_t)rc);
    return probe(d);
}

int cuda_error(struct device *d, cudaError_t rc, int status, const char *what, char *why)
{
    cudaGetLastError(); /* or the next launch would be told of it */
    snprintf(why, PROTO_TEXT_MAX, "%s: %s (%s)", what, cudaGetErrorName(rc),
             cudaGetErrorString(rc));
    if (d->probe && cuda_is_lost(d, rc, what))
        return SAGE_EDEVICE;
    return rc == cudaErrorMemoryAllocation ? SAGE_ENOMEM : status;
}

/* --- the device --- */

static void format_uuid(const cudaUUID_t *uuid, char text[PROTO_NAME_MAX])
{
    char *to = stpcpy(text, "GPU");

    for (int i = 0; i < 16; i++) {
        if (i == 0 || i == 4 || i == 6 || i == 8 || i == 10)
            *to++ = '-';
        to += sprintf(to, "%02x", (unsigned char)uuid->bytes[i]);
    }
}

/* The device that `gpu` means: a number, or (the beginning of) a UUID that only one has. */
static int pick(const char *gpu, int n, int *ordinal, char *why)
{
    char *end, uuid[PROTO_NAME_MAX];
    struct cudaDeviceProp prop;
    unsigned long number = strtoul(gpu, &end, 10);
    int found = 0;

    if (gpu[0] >= '0' && gpu[0] <= '9' && !*end) {
        *ordinal = (int)number;
        found = number < (unsigned long)n;
    } else if (!strncasecmp(gpu, "GPU-", 4)) {
        for (int i = 0; i < n; i++) {
            if (cudaGetDeviceProperties(&prop, i) != cudaSuccess)
                continue;
            format_uuid(&prop.uuid, uuid);
            if (strncasecmp(uuid, gpu, strlen(gpu)))
                continue;
            *ordinal = i;
            found++;
        }
    }
    if (found == 1)
        return 0;
    snprintf(why, PROTO_TEXT_MAX,
             "gpu: '%.64s' is none of the %d that CUDA shows (CUDA_VISIBLE_DEVICES=%.32s)", gpu, n,
             getenv("CUDA_VISIBLE_DEVICES") ? getenv("CUDA_VISIBLE_DEVICES") : "");
    return SAGE_EINVAL;
}

static int open_context(struct device *d, const struct config *config, char *why)
{
    struct cudaDeviceProp prop;
    int n = 0, rc = cudaGetDeviceCount(&n);

    if (rc)
        return cuda_error(d, (cudaError_t)rc, SAGE_EUNSUPPORTED, "no GPU can be used", why);
    if (pick(config->gpu, n, &d->ordinal, why))
        return SAGE_EINVAL;
    rc = cudaSetDevice(d->ordinal); /* makes the context, and makes it current here: on the loop */
    if (!rc)
        rc = cudaGetDeviceProperties(&prop, d->ordinal);
    if (!rc)
        rc = cudaStreamCreateWithFlags(&d->probe, cudaStreamNonBlocking);
    if (!rc)
        rc = sage_cuda_stamp_load(&d->code);
    if (rc)
        return cuda_error(d, (cudaError_t)rc, SAGE_EUNSUPPORTED, "GPU cannot be opened", why);
    /* An older driver does not know what is asked for. */
    if (cudaDeviceGetAttribute(&d->mps, cudaDevAttrMpsEnabled, d->ordinal) != cudaSuccess)
        cudaGetLastError();
    snprintf(d->name, sizeof(d->name), "%.63s", prop.name);
    format_uuid(&prop.uuid, d->uuid);
    rc = sage_cuda_load(why, PROTO_TEXT_MAX);
    if (rc)
        return rc;
    rc = cudaMemGetInfo(&d->free, &d->total);
    return rc ? cuda_error(d, (cudaError_t)rc, SAGE_EINTERNAL, "cudaMemGetInfo", why) : 0;
}

static void close_cuda(struct device *d)
{
    share_close(d);
    warm_close(d);
    if (d->probe)
        cudaStreamDestroy(d->probe);
    free(d);
}

static int open_cuda(struct device **device, const struct config *config, void (*notify)(void *),
                     void *arg, char *why)
{
    struct device *d = calloc(1, sizeof(*d));
    (void)notify, (void)arg; /* poll() tells */

    if (!d)
        return SAGE_ENOMEM;
    d->slots = config->slots;
    d->clock_ns = INT64_MAX;
    STAILQ_INIT(&d->idle);
    prctl(PR_SET_TIMERSLACK, DRIVER_SLACK_NS); /* of the threads that begin here */
    int rc = open_context(d, config, why);
    prctl(PR_SET_TIMERSLACK, 0);
    if (!rc)
        rc = share_open(d, why);
    if (!rc)
        warm_open(d);
    if (rc) {
        close_cuda(d);
        return rc;
    }
    *device = d;
    return 0;
}

static void describe(struct device *d, char name[PROTO_NAME_MAX], char uuid[PROTO_NAME_MAX])
{
    memcpy(name, d->name, PROTO_NAME_MAX);
    memcpy(uuid, d->uuid, PROTO_NAME_MAX);
}

/*
 * A slot has a sixteenth of the free memory, from 256 MiB to 4 GiB, but all together not more than
 * half. 4 GiB hold the INT8 K and 8-bit V of 16 million tokens of D = 128.
 */
static void defaults(struct device *d, struct config *config)
{
    const uint64_t step = 2 << 20, least = 256ull << 20, most = 4ull << 30;
    uint64_t bytes = d->free / 16;

    bytes = bytes < least ? least : bytes > most ? most : bytes;
    if (bytes > d->free / 2 / config->slots)
        bytes = d->free / 2 / config->slots;
    if (!config->slot_bytes)
        config->slot_bytes = bytes / step ? bytes / step * step : step;
    if (!config->client_bytes)
        config->client_bytes = d->total / 2;
    if (!config->user_bytes)
        config->user_bytes = d->total / 4 * 3;
    log_notice("vram", "gpu=%s total=%zu free=%zu slots=%llu slot_bytes=%llu workspaces=%llu",
               d->uuid, d->total, d->free, (unsigned long long)config->slots,
               (unsigned long long)config->slot_bytes,
               (unsigned long long)(config->slots * config->slot_bytes));
}

static int supports(struct device *d, const struct sage_attn *attn, char *why)
{
    if (sage_attn_variant(attn) != SAGE_INT8_FP8 || d->code >= 89)
        return 0;
    snprintf(why, PROTO_TEXT_MAX,
             "variant: int8_fp8 needs compute capability 8.9, this GPU runs code for %d.%d",
             d->code / 10, d->code % 10);
    return SAGE_EUNSUPPORTED;
}

static void *memory_get(struct device *d, size_t bytes)
{
    void *memory;
    (void)d;

    if (cudaMalloc(&memory, bytes) != cudaSuccess) {
        cudaGetLastError();
        return NULL;
    }
    /* Streams of slots do not wait for the default stream. */
    if (cudaMemset(memory, 0, bytes) == cudaSuccess && cudaDeviceSynchronize() == cudaSuccess)
        return memory;
    cudaGetLastError();
    cudaFree(memory);
    return NULL;
}

static void memory_put(struct device *d, void *memory)
{
    (void)d;
    cudaFree(memory);
}

/* --- streams --- */

static void stream_close(struct stream *s)
{
    cudaStreamSynchronize(s->cuda); /* nothing is in it, but for the ends of completion events */
    graphs_destroy(s->graphs);
    cudaStreamDestroy(s->cuda);
    cudaFreeHost(s->stamps);
    cudaFree(s->workspace);
    cudaFree(s->go);
    free(s);
}

static int stream_open(struct device *d, size_t workspace, struct stream **stream, char *why)
{
    struct stream *s = calloc(1, sizeof(*s));

    if (!s)
        return SAGE_ENOMEM;
    s->device = d;
    s->bytes = workspace;
    cudaError_t rc = cudaStreamCreateWithFlags(&s->cuda, cudaStreamNonBlocking);
    if (rc)
        goto err_free;
    rc = cudaHostAlloc((void **)&s->stamps, STREAM_DEPTH * sizeof(s->stamps[0]),
                       cudaHostAllocPortable | cudaHostAllocMapped);
    if (rc)
        goto err_stream;
    rc = cudaMalloc((void **)&s->go, sizeof(*s->go));
    if (rc)
        goto err_stamps;
    rc = cudaMalloc(&s->workspace, workspace);
    if (rc)
        goto err_go;
    s->graphs = graphs_create();
    if (!s->graphs)
        goto err_workspace;
    *stream = s;
    return 0;

err_workspace:
    rc = cudaErrorMemoryAllocation;
    cudaFree(s->workspace);
err_go:
    cudaFree(s->go);
err_stamps:
    cudaFreeHost(s->stamps);
err_stream:
    cudaStreamDestroy(s->cuda);
err_free:
    free(s);
    int status = cuda_error(d, rc, SAGE_EINTERNAL, "slot", why);
    if (status == SAGE_ENOMEM)
        snprintf(why, PROTO_TEXT_MAX,
                 "slot_bytes: %llu slots need %llu bytes each, %zu of the GPU's %zu bytes are free",
                 (unsigned long long)d->slots, (unsigned long long)workspace, d->free, d->total);
    return status;
}

/* --- pieces --- */

/* What the device is told of the piece, and has told of it: nothing yet. */
static void prepare(struct sage_cuda_stamp *stamp, const struct piece *piece)
{
    uint32_t entry = piece->number % SAGE_ENTRIES;
    struct sage_page_lane *remote = piece->remote;

    *stamp = (struct sage_cuda_stamp){.number = piece->number,
                                      .status = remote ? &remote->status[entry] : NULL,
                                      .release = remote ? &remote->release[entry] : NULL,
                                      .acquire = remote ? &remote->acquire[entry] : NULL,
                                      .wait_ns = piece->wait_ns};
}

static int launch(struct stream *s, struct piece *piece, struct sage_cuda_stamp *stamp, char *why)
{
    const uint32_t *go = piece->wait_ns ? s->go : NULL;

    if (go && sage_cuda_stamp_gate(stamp, s->go, s->cuda)) {
        snprintf(why, PROTO_TEXT_MAX, "what waits for the inputs cannot be launched");
        piece->status = SAGE_EINTERNAL;
    } else {
        piece->status = sage_attn_cuda_stamped(piece->attn, &piece->part, s->workspace, s->bytes,
                                               &stamp->start_ns, go, s->cuda, why, PROTO_TEXT_MAX);
    }
    if (piece->status)
        stamp->release = NULL;
    /* Also behind a launch that failed: something before it may run. */
    return sage_cuda_stamp_end(stamp, s->device->code, s->cuda);
}

/* By a graph, which is recorded first if need be. false: nothing was launched. */
static bool launch_graph(struct stream *s, struct piece *piece, struct graph *graph, char *why)
{
    if (!graph->exec) {
        if (graph_begin(graph, s->cuda))
            return false;
        int rc = launch(s, piece, graph->stamp, why);
        if (graph_end(graph, s->cuda, !rc && !piece->status))
            return false;
    }
    if (cudaGraphLaunch(graph->exec, s->cuda) == cudaSuccess)
        return true;
    cudaGetLastError();
    return false;
}

static void start(struct stream *s, struct piece *piece)
{
    struct graph *graph = graph_take(s->graphs, piece);
    struct sage_cuda_stamp *stamp = graph ? graph->stamp : &s->stamps[s->in % STREAM_DEPTH];
    const bool alone = s->in == s->out;
    char why[PROTO_TEXT_MAX] = "";
    int rc = 0;

    s->ring[s->in++ % STREAM_DEPTH] = (struct started){piece, stamp, graph};
    piece->status = 0;
    prepare(stamp, piece);
    if (!graph || !launch_graph(s, piece, graph, why)) {
        prepare(stamp, piece);
        rc = launch(s, piece, stamp, why);
    }
    if (!rc && !piece->status) {
        /* Among many it would cost more time than it saves. */
        if (piece->remote && (alone || piece->wait_ns))
            share_ring(s->device, s->cuda);
        return;
    }
    piece->remote = NULL;
    cudaError_t last = cudaGetLastError(); /* or the next launch would be told of it */
    if (piece->status)
        log_error("launch", "status=%s reason=\"%s\"", sage_errname(piece->status), why);
    /* Without its end nothing would ever be known of the piece. */
    if (rc || piece->status == SAGE_EDEVICE)
        lose(s->device, "launch", rc ? (cudaError_t)rc : last);
}

/*
 * The piece's times on our clock. It cannot have begun before it was launched nor ended after now:
 * that keeps the distance of both clocks, which drift, to what the shortest pieces show. How long
 * it took is the device's measurement.
 */
static void set_times(struct device *d, struct piece *piece, const struct sage_cuda_stamp *stamp,
                      uint64_t now)
{
    /* Where nothing was computed nothing began. */
    uint64_t start_ns = stamp->start_ns ? stamp->start_ns : stamp->end_ns;
    uint64_t took = stamp->end_ns > start_ns ? stamp->end_ns - start_ns : 0;

    if (took > now - piece->launch_ns)
        took = now - piece->launch_ns;
    int64_t low = (int64_t)(piece->launch_ns - start_ns);
    int64_t high = (int64_t)(now - took - start_ns);
    if (d->clock_ns < low)
        d->clock_ns = low;
    if (d->clock_ns > high)
        d->clock_ns = high;
    piece->start_ns = start_ns + (uint64_t)d->clock_ns;
    piece->end_ns = piece->start_ns + took;
}

/* The oldest piece is over, or the device is. */
static void finish(struct stream *s, struct piece *piece)
{
    const bool tell = piece->lane && !piece->missed; /* it is as if it had not been started */

    if (tell && piece->remote)
        page_wake(piece->lane, piece->number);
    else if (tell && piece->status != SAGE_EDEVICE)
        page_release(piece->lane, piece->number, piece->status);
    graph_put(s->ring[s->out++ % STREAM_DEPTH].graph);
    piece->done = 1;
}

/* The oldest piece is not over: has it begun, and is there still somebody who computes it? */
static void look_after(struct stream *s, struct piece *piece, struct sage_cuda_stamp *stamp,
                       uint64_t now)
{
    uint64_t start_ns = __atomic_load_n(&stamp->start_ns, __ATOMIC_RELAXED);
    struct device *d = s->device;

    if (start_ns && !piece->start_ns)
        piece->start_ns = d->clock_ns == INT64_MAX ? now : start_ns + (uint64_t)d->clock_ns;
    if (now - s->asked_ns < ASK_NS)
        return;
    s->asked_ns = now;
    cudaError_t rc = cudaStreamQuery(s->cuda);
    if (rc == cudaErrorNotReady)
        cudaGetLastError();
    else if (rc)
        lose(d, "cudaStreamQuery", rc);
    else if (!__atomic_load_n(&stamp->done, __ATOMIC_ACQUIRE)) /* it was passed, but did not come */
        lose(d, "stamp", cudaErrorUnknown);
}

/* Without MPS nothing of a client would run while ours waits. */
static bool can_wait(struct device *d)
{
    return d->mps && d->releases;
}

static void poll(struct stream *s)
{
    uint64_t now = daemon_now();

    while (s->out != s->in) {
        struct sage_cuda_stamp *stamp = s->ring[s->out % STREAM_DEPTH].stamp;
        struct piece *piece = s->ring[s->out % STREAM_DEPTH].piece;
        if (__atomic_load_n(&s->device->lost, __ATOMIC_RELAXED)) {
            piece->status = SAGE_EDEVICE;
        } else if (__atomic_load_n(&stamp->done, __ATOMIC_ACQUIRE)) {
            set_times(s->device, piece, stamp, now);
            piece->missed = stamp->missed;
            if (stamp->ready_ns)
                piece->ready_ns = stamp->ready_ns + (uint64_t)s->device->clock_ns;
        } else {
            look_after(s, piece, stamp, now);
            return;
        }
        finish(s, piece);
    }
}

static int event_record(struct stream *s, uint32_t *number, uint8_t handle[PROTO_HANDLE_MAX])
{
    const struct piece *newest = s->ring[(s->in - 1) % STREAM_DEPTH].piece;

    if (newest->status)
        return newest->status;
    return share_event_record(s->device, s->cuda, number, handle);
}

const struct backend backend_cuda = {
    .name = "cuda",
    .kinds = 1 << BUFFER_CUDA_IPC | 1 << BUFFER_VMM,
    .modes = MODE_SYNC | MODE_EVENT | MODE_LANES,
    .client_mode = "sync",
    .forms = true,
    .open = open_cuda,
    .close = close_cuda,
    .describe = describe,
    .defaults = defaults,
    .is_lost = is_lost,
    .supports = supports,
    .map = share_map,
    .unmap = share_unmap,
    .page_open = share_page_open,
    .page_close = share_page_close,
    .memory_get = memory_get,
    .memory_put = memory_put,
    .stream_open = stream_open,
    .stream_close = stream_close,
    .start = start,
    .can_wait = can_wait,
    .poll = poll,
    .warm = warm,
    .event_open = share_event_open,
    .event_close = share_event_close,
    .event_done = share_event_done,
    .event_record = event_record,
    .event_put = share_event_put,
    .workspace = sage_attn_cuda_workspace,
    /* 300 Tops and 2 TB/s: of an H100. Two launches around three, a look at the end. */
    .ns_per_op = 1e9 / 300e12,
    .ns_per_byte = 1e9 / 2e12,
    .ns_per_piece = 10e3,
};
