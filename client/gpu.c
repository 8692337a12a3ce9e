/*
 * gpu.c - which daemon has the GPU, and what a problem's tensors lie in.
 */
#include "client/client.h"

#include <errno.h>
#include <inttypes.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

#include "kernels/problem.h"

enum {
    SPANS_AT_ONCE = 4 /* of one tensor, before memory is allocated for the list */
};

const char *const tensor_names[N_TENSORS] = {"q", "k", "v", "o", "mask", "lse"};

struct sage_tensor *tensor_of(struct sage_attn *a, int i)
{
    struct sage_tensor *const tensors[] = {&a->q, &a->k, &a->v, &a->o, &a->mask, &a->lse};

    return tensors[i];
}

/* --- options --- */

static int set_mode(struct gpu *gpu, enum sage_mode mode)
{
    static const char *const names[] = {"auto", "sync", "event", "lane"};
    const char *name = secure_getenv("SAGE_MODE");

    if (mode < SAGE_MODE_AUTO || mode > SAGE_MODE_LANE)
        return error_set(SAGE_EINVAL, "mode: %d, must be from 0 to 3", (int)mode);
    gpu->asked = mode;
    if (mode != SAGE_MODE_AUTO || !name || !*name)
        return 0;
    for (int i = SAGE_MODE_AUTO; i <= SAGE_MODE_LANE; i++)
        if (!strcmp(name, names[i])) {
            gpu->asked = (enum sage_mode)i;
            return 0;
        }
    return error_set(SAGE_EINVAL, "$SAGE_MODE: %s, must be auto, lane, event or sync", name);
}

static int set_cap(struct gpu *gpu, uint64_t bytes)
{
    const char *text = secure_getenv("SAGE_CACHE_BYTES");
    char *end;

    gpu->cap = bytes;
    if (bytes || !text || !*text)
        return 0;
    errno = 0;
    gpu->cap = strtoull(text, &end, 10);
    if (errno || *end || *text < '0' || *text > '9')
        return error_set(SAGE_EINVAL, "$SAGE_CACHE_BYTES: %s, must be a number of bytes", text);
    if (gpu->cap == 0)
        gpu->cap = 1; /* 0 is an eighth of the device */
    return 0;
}

static int set_staging(struct gpu *gpu)
{
    const char *text = secure_getenv("SAGE_STAGING");

    gpu->staging = !text || strcmp(text, "off");
    if (text && *text && strcmp(text, "on") && strcmp(text, "off"))
        return error_set(SAGE_EINVAL, "$SAGE_STAGING: %s, must be on or off", text);
    return 0;
}

int gpu_init(struct sage_client *c, const struct sage_connect_options *options)
{
    int rc = set_mode(&c->gpu, options->mode);

    if (!rc)
        rc = set_cap(&c->gpu, options->cache_bytes);
    return rc ? rc : set_staging(&c->gpu);
}

/* --- which daemon --- */

/* What GPU does the daemon at this socket have? "" is the CPU. */
static int ask_uuid(struct sage_client *c, const char *path, char uuid[PROTO_NAME_MAX])
{
    struct msg_welcome welcome;
    int rc = conn_open(&c->conn, path);

    if (!rc)
        rc = conn_hello(&c->conn, c->name, c->priority, -1, &welcome);
    conn_close(&c->conn);
    memcpy(uuid, rc ? "" : welcome.uuid, rc ? 1 : PROTO_NAME_MAX);
    return rc;
}

/* The device that the calling thread works with, if it does with any. */
static bool current_uuid(char uuid[UUID_TEXT])
{
    const struct driver *cu = driver_open();
    int device;

    return cu && cu->cuCtxGetDevice(&device) == CU_OK && !driver_uuid(cu, device, uuid);
}

/*
 * Among several sockets: the first whose daemon has this GPU. If none has, why one could not be
 * asked, or SAGE_ENODAEMON.
 */
static int find_path(struct sage_client *c, const char *uuid, char *path, size_t size)
{
    char found[PROTO_NAME_MAX], why[512] = "";
    int first = SAGE_ENODAEMON;

    for (int i = 0; conn_default(i, path, size); i++) {
        int rc = ask_uuid(c, path, found);
        if (!rc && !strcmp(found, uuid))
            return 0;
        if (rc && rc != SAGE_ENODAEMON && first == SAGE_ENODAEMON) {
            first = rc;
            snprintf(why, sizeof(why), "%s", sage_last_error());
        }
    }
    return why[0] ? error_set(first, "%s", why)
                  : error_set(first, "gpu: no daemon has %s: start one for it", uuid);
}

static int choose_path(struct sage_client *c, const struct sage_connect_options *options,
                       char *path, size_t size)
{
    const char *named = options->socket ? options->socket : secure_getenv("SAGEATTND_SOCKET");
    char uuid[PROTO_NAME_MAX], here[UUID_TEXT];

    if (named && *named) {
        conn_path(options->socket, path, size);
        if (!options->gpu)
            return 0;
        int rc = ask_uuid(c, path, uuid);
        if (rc || !strcmp(uuid, options->gpu))
            return rc;
        return error_set(SAGE_ENODAEMON, "gpu: %s, the daemon at %s has %s", options->gpu, path,
                         uuid[0] ? uuid : "none");
    }
    if (options->gpu)
        return find_path(c, options->gpu, path, size);
    if (conn_default(1, path, size) && current_uuid(here) && !find_path(c, here, path, size))
        return 0;
    conn_path(NULL, path, size);
    return 0;
}

int gpu_choose(struct sage_client *c, const struct sage_connect_options *options)
{
    char path[4096];
    int rc = choose_path(c, options, path, sizeof(path));

    if (rc)
        return rc;
    c->path = strdup(path);
    return c->path ? 0 : error_set(SAGE_ENOMEM, "out of memory");
}

bool gpu_is_there(struct sage_client *c)
{
    pthread_mutex_lock(&c->lock);
    bool there = c->welcome.uuid[0];
    pthread_mutex_unlock(&c->lock);
    return there;
}

/* --- the tensors of a problem --- */

/* A growing list of the spans that a tensor lies in. */
struct spans {
    struct span few[SPANS_AT_ONCE], *list;
    uint32_t n, capacity;
};

static int add_span(struct spans *s, const struct memory *m)
{
    if (s->n == CHUNKS_MAX)
        return error_set(SAGE_EUNSUPPORTED, "more than %d chunks of memory", CHUNKS_MAX);
    if (s->n == s->capacity) {
        struct span *grown = malloc(2 * s->capacity * sizeof(*grown));
        if (!grown)
            return error_set(SAGE_ENOMEM, "out of memory");
        memcpy(grown, s->list, s->n * sizeof(*grown));
        if (s->list != s->few)
            free(s->list);
        s->list = grown;
        s->capacity *= 2;
    }
    s->list[s->n++] = (struct span){m->base, m->size, m->id, m->block};
    return 0;
}

static bool is_exportable(const struct memory *m)
{
    return !m->managed && !m->pool && (m->ipc || m->handle_types & CU_POSIX_FD);
}

/* Something else may follow it in the same tensor. */
static bool is_chunk(const struct memory *m)
{
    return !m->ipc && !m->pool && !m->managed;
}

static const char *why_not(const struct memory *m)
{
    if (m->managed)
        return "managed memory";
    if (m->pool)
        return "memory of a cudaMallocAsync() pool";
    return "virtual memory that was made without a shareable handle type";
}

/*
 * The tensors of a problem often lie in one allocation, and while its call lasts that stays what it
 * is: asked about once.
 */
static int describe(struct gpu_job *job, uint64_t address, struct memory *m)
{
    int result = CU_OK;

    if (!job->seen.size || address - job->seen.base >= job->seen.size)
        result = driver_describe(job->cu, address, &job->seen);
    *m = job->seen;
    if (result)
        job->seen.size = 0;
    return result;
}

/*
 * What tensor i lies in, from one span to the next; *hidden: the first that cannot be exported, and
 * then the list is of no use.
 */
static int collect(struct gpu_job *job, int i, uint64_t bytes, struct spans *s,
                   struct memory *first, struct memory *hidden)
{
    uint64_t at = (uint64_t)(uintptr_t)tensor_of(&job->attn, i)->data, end = at + bytes;
    const char *name = tensor_names[i];
    struct memory m;

    for (uint64_t next = at; next < end; next = m.base + m.size) {
        int rc = driver_check(describe(job, next, &m), "%s: cuPointerGetAttributes", name);
        if (rc)
            return rc;
        bool device = m.type == CU_MEMORY_DEVICE || m.managed;
        if (next == at && !device)
            return error_set(SAGE_EBUFFER, "%s: %p is neither device memory nor in a buffer", name,
                             (void *)(uintptr_t)at);
        if (!m.size || next - m.base >= m.size ||
            (next != at && !(device && is_chunk(first) && is_chunk(&m))))
            return error_set(SAGE_EBOUNDS,
                             "%s: %" PRIu64 " bytes at 0x%" PRIx64
                             ", but the allocation ends at 0x%" PRIx64,
                             name, bytes, at, next);
        if (next == at)
            *first = m;
        if (!m.managed && m.device != job->device)
            return error_set(SAGE_EINVAL, "%s: it is on device %d, the stream on device %d", name,
                             m.device, job->device);
        if (!is_exportable(&m) && !hidden->size)
            *hidden = m;
        rc = hidden->size ? 0 : add_span(s, &m);
        if (rc)
            return rc;
    }
    return 0;
}

static int hide(struct gpu_job *job, int i, const struct memory *hidden, bool may_stage)
{
    if (!job->client->gpu.staging)
        return error_set(SAGE_EHANDLE, "%s: %s cannot be shared, and SAGE_STAGING is off",
                         tensor_names[i], why_not(hidden));
    if (!may_stage)
        return error_set(SAGE_EHANDLE, "%s: %s cannot be shared: use sage_attn_enqueue()",
                         tensor_names[i], why_not(hidden));
    job->places[i].staged = true;
    return 0;
}

/* What tensor i lies in, by the driver's account; *e: the entry, pinned, unless it is staged. */
static int look(struct gpu_job *job, int i, uint64_t bytes, bool may_stage, struct cached **e)
{
    struct spans s = {.capacity = SPANS_AT_ONCE};
    struct memory first = {0}, hidden = {0};

    s.list = s.few;
    int rc = collect(job, i, bytes, &s, &first, &hidden);
    if (!rc && hidden.size)
        rc = hide(job, i, &hidden, may_stage);
    else if (!rc)
        rc = gpu_acquire(job, s.list, s.n, first.ipc, e);
    if (s.list != s.few)
        free(s.list);
    return rc;
}

static int place(struct gpu_job *job, int i, bool may_stage)
{
    const struct sage_tensor *t = tensor_of(&job->attn, i);
    uint64_t at = (uint64_t)(uintptr_t)t->data;
    int64_t bytes;
    int rc = 0;

    if (t->dtype == SAGE_NONE || !sage_tensor_bytes(t, &bytes) || bytes == 0)
        return 0;
    struct cached *e = gpu_recall(job, at, (uint64_t)bytes);
    if (!e && !buffer_is_host(job->client, t->data))
        rc = look(job, i, (uint64_t)bytes, may_stage, &e);
    if (!rc && e)
        job->places[i] = (struct place){
            .set = true, .cached = e, .buffer = e->buffer->id, .offset = at - cached_base(e)};
    return rc;
}

/* --- a job --- */

/* A context is needed even where a tensor's address says it all: that of the stream, else of the
 * first tensor that has one, else of the calling thread. */
static struct CUctx_st *find_context(struct gpu_job *job)
{
    struct CUctx_st *context = NULL;
    struct memory m;

    if (job->stream != GPU_NO_STREAM)
        job->cu->cuStreamGetCtx(job->stream, &context);
    for (int i = 0; i < N_TENSORS && !context; i++) {
        const struct sage_tensor *t = tensor_of(&job->attn, i);
        if (t->dtype != SAGE_NONE && t->data &&
            describe(job, (uint64_t)(uintptr_t)t->data, &m) == CU_OK)
            context = m.context;
    }
    if (!context)
        job->cu->cuCtxGetCurrent(&context);
    return context;
}

static int check_device(struct gpu_job *job)
{
    struct sage_client *c = job->client;
    char here[UUID_TEXT], there[PROTO_NAME_MAX];

    pthread_mutex_lock(&c->lock);
    memcpy(there, c->welcome.uuid, sizeof(there));
    c->gpu.used = true;
    uint64_t epoch = c->epoch;
    bool known = c->gpu.same_epoch == epoch && context_is(&c->gpu.same, &job->context);
    job->device = c->gpu.same_device;
    pthread_mutex_unlock(&c->lock);
    if (known)
        return 0;
    int rc = driver_check(job->cu->cuCtxGetDevice(&job->device), "cuCtxGetDevice");
    if (!rc)
        rc = driver_uuid(job->cu, job->device, here);
    if (rc)
        return rc;
    if (!strcmp(here, there)) {
        pthread_mutex_lock(&c->lock);
        c->gpu.same = job->context;
        c->gpu.same_device = job->device;
        c->gpu.same_epoch = epoch;
        pthread_mutex_unlock(&c->lock);
        return 0;
    }
    return error_set(SAGE_EINVAL, "%s of %s, but the daemon has %s: see sage_connect_options.gpu",
                     job->stream == GPU_NO_STREAM ? "the memory is" : "stream: is", here, there);
}

int gpu_check_stream(const struct driver *cu, struct CUstream_st *stream)
{
    int status = 0;

    if (stream == GPU_NO_STREAM)
        return 0;
    int rc = driver_check(cu->cuStreamIsCapturing(stream, &status), "stream");
    if (!rc && status)
        rc = error_set(SAGE_ECAPTURE, "stream: is being captured into a graph, and a job is sent "
                                      "to the daemon when it is enqueued");
    return rc;
}

/* Other threads may be capturing: what we do is none of theirs. */
static int enter_context(struct gpu_job *job)
{
    struct CUctx_st *context = find_context(job), *current = NULL;

    if (!context)
        return error_set(SAGE_EINVAL, "there is no CUDA context: is q in device memory?");
    int rc = driver_check(job->cu->cuCtxGetId(context, &job->context.id), "cuCtxGetId");
    if (!rc)
        rc = driver_check(job->cu->cuCtxGetCurrent(&current), "cuCtxGetCurrent");
    job->pushed = current != context;
    if (!rc && job->pushed)
        rc = driver_check(job->cu->cuCtxPushCurrent(context), "cuCtxPushCurrent");
    if (rc)
        return rc;
    job->context.cu = context;
    job->capture_mode = CU_CAPTURE_RELAXED;
    job->cu->cuThreadExchangeStreamCaptureMode(&job->capture_mode);
    return 0;
}

int gpu_begin(struct gpu_job *job, struct sage_client *c, const struct sage_attn *attn,
              struct CUstream_st *stream, bool may_stage)
{
    char why[PROTO_TEXT_MAX];

    *job = (struct gpu_job){.client = c, .attn = *attn, .theirs = *attn, .stream = stream};
    for (int i = 0; i < N_TENSORS; i++) {
        struct sage_tensor *t = tensor_of(&job->attn, i);
        if (t->dtype != SAGE_NONE && (t->buffer || t->offset))
            return error_set(SAGE_EINVAL, "%s.%s: must be 0, a tensor is named by its data",
                             tensor_names[i], t->buffer ? "buffer" : "offset");
    }
    int rc = sage_attn_check(&job->attn, why, sizeof(why));
    if (rc)
        return error_set(rc, "%s", why);
    job->cu = driver_open();
    if (!job->cu)
        return SAGE_EUNSUPPORTED;
    rc = enter_context(job);
    if (rc)
        return rc;
    rc = check_device(job);
    if (!rc)
        rc = gpu_check_stream(job->cu, job->stream);
    for (int i = 0; !rc && i < N_TENSORS; i++)
        rc = place(job, i, may_stage);
    if (!rc)
        rc = stage_in(job);
    if (rc)
        gpu_end(job);
    return rc;
}

void gpu_submitted(struct gpu_job *job, struct sage_job submitted)
{
    struct sage_client *c = job->client;
    uint32_t lane = submitted.lane->index;

    pthread_mutex_lock(&c->lock);
    for (int i = 0; i < N_TENSORS; i++) {
        struct cached *e = job->places[i].cached;
        if (!e)
            continue;
        cached_use(e, lane, submitted.number);
    }
    pthread_mutex_unlock(&c->lock);
}

void gpu_end(struct gpu_job *job)
{
    struct sage_client *c = job->client;
    struct CUctx_st *context;

    stage_end(job);
    pthread_mutex_lock(&c->lock);
    for (int i = 0; i < N_TENSORS; i++)
        if (job->places[i].cached)
            job->places[i].cached->pins--;
    pthread_mutex_unlock(&c->lock);
    job->cu->cuThreadExchangeStreamCaptureMode(&job->capture_mode);
    if (job->pushed)
        job->cu->cuCtxPopCurrent(&context);
}
