/*
 * register.c - device memory that the daemon maps: handing it over where a job needs it, and
 * letting go of what its owner has freed.
 */
#include "client/client.h"

#include <errno.h>
#include <fcntl.h>
#include <signal.h>
#include <stdlib.h>
#include <string.h>
#include <unistd.h>

enum {
    WATCH_MS = 100,  /* how long at most freed memory stays mapped by the daemon */
    CLEAR_MS = 1000, /* how long a new allocation may wait for jobs on the one before it */
    CAP_SHARE = 8,   /* default: an eighth of the device may stay registered unused */
};

/* --- the watcher --- */

static bool span_is_there(const struct driver *cu, const struct span *span)
{
    struct memory m;
    int result = driver_describe(cu, span->base, &m);

    if (result != CU_OK) /* it may not be able to say */
        return result != CU_INVALID_VALUE;
    return m.base == span->base && m.size == span->size && m.id == span->id &&
           m.block == span->block;
}

/* Span `i` of the entry, as long as there is such a one. */
static bool get_span(struct sage_client *c, uint64_t serial, uint32_t i, struct span *span)
{
    pthread_mutex_lock(&c->lock);
    const struct cached *e = cache_after(&c->gpu.cache, serial - 1);
    bool is = e && e->serial == serial && !e->stale && i < e->n_spans;
    if (is)
        *span = e->spans[i];
    pthread_mutex_unlock(&c->lock);
    return is;
}

static uint64_t next_serial(struct sage_client *c, uint64_t serial)
{
    pthread_mutex_lock(&c->lock);
    const struct cached *e = cache_after(&c->gpu.cache, serial);
    serial = e ? e->serial : 0;
    pthread_mutex_unlock(&c->lock);
    return serial;
}

static void set_stale(struct sage_client *c, uint64_t serial)
{
    pthread_mutex_lock(&c->lock);
    struct cached *e = cache_after(&c->gpu.cache, serial - 1);
    if (e && e->serial == serial)
        e->stale = true;
    pthread_mutex_unlock(&c->lock);
}

/* Whose memory is gone? */
static void revalidate(struct sage_client *c, const struct driver *cu)
{
    struct span span;

    for (uint64_t serial = 0; (serial = next_serial(c, serial));)
        for (uint32_t i = 0; get_span(c, serial, i, &span); i++)
            if (!span_is_there(cu, &span))
                set_stale(c, serial);
}

void gpu_evict(struct sage_client *c, uint64_t cap)
{
    for (;;) {
        struct sage_buffer *buffer = NULL;

        pthread_mutex_lock(&c->lock);
        struct cached *e = cache_victim(&c->gpu.cache, c->page, cap);
        if (e) { /* a child that is forked from now on finds the buffer in the list of all */
            e->leaving = true;
            buffer = e->buffer;
            e->buffer = NULL;
        }
        pthread_mutex_unlock(&c->lock);
        if (!e)
            return;
        sage_buffer_free(buffer);
        pthread_mutex_lock(&c->lock);
        cache_remove(&c->gpu.cache, e);
        pthread_cond_broadcast(&c->changed);
        pthread_mutex_unlock(&c->lock);
        free(e);
    }
}

static struct timespec after_ms(int ms)
{
    int64_t end = clock_ns() + ms * INT64_C(1000000);

    return (struct timespec){end / 1000000000, end % 1000000000};
}

static void *watch(void *arg)
{
    struct sage_client *c = arg;
    const struct driver *cu = driver_open();

    pthread_setname_np(pthread_self(), "sagewatch");
    pthread_mutex_lock(&c->lock);
    while (!c->stop) {
        struct timespec limit = after_ms(WATCH_MS);
        if (pthread_cond_timedwait(&c->gpu.tick, &c->lock, &limit) != ETIMEDOUT)
            continue;
        uint64_t cap = c->gpu.cap;
        pthread_mutex_unlock(&c->lock);
        revalidate(c, cu);
        gpu_evict(c, cap);
        pthread_mutex_lock(&c->lock);
    }
    pthread_mutex_unlock(&c->lock);
    return NULL;
}

/* Without it freed memory is only found out when its address is used again. */
static int start_watcher(struct sage_client *c, uint64_t cap)
{
    sigset_t all, old;
    int error = 0;

    sigfillset(&all);
    pthread_sigmask(SIG_SETMASK, &all, &old);
    pthread_mutex_lock(&c->lock);
    c->gpu.cap = cap;
    if (!c->gpu.watching)
        error = pthread_create(&c->gpu.watcher, NULL, watch, c);
    c->gpu.watching = !error;
    pthread_mutex_unlock(&c->lock);
    pthread_sigmask(SIG_SETMASK, &old, NULL);
    return error ? error_set(SAGE_ENOMEM, "thread: %s", strerror(error)) : 0;
}

/* Free what we have made on the device. Other threads may be capturing: it is none of theirs. */
static void free_own(struct sage_client *c, bool all)
{
    const struct driver *cu = driver_open();
    int mode = CU_CAPTURE_RELAXED;

    cu->cuThreadExchangeStreamCaptureMode(&mode);
    stage_trim(c, cu, all);
    if (all) {
        events_finish(c, cu);
        views_finish(c, cu);
    }
    cu->cuThreadExchangeStreamCaptureMode(&mode);
}

uint64_t sage_registered_bytes(struct sage_client *client)
{
    if (client->forked)
        return 0;
    pthread_mutex_lock(&client->lock);
    uint64_t bytes = client->gpu.cache.bytes;
    pthread_mutex_unlock(&client->lock);
    return bytes;
}

int sage_trim(struct sage_client *client)
{
    if (client->forked)
        return client_alien();
    pthread_mutex_lock(&client->lock);
    bool used = client->gpu.used;
    uint64_t cap = client->gpu.cap ? client->gpu.cap : UINT64_MAX;
    pthread_mutex_unlock(&client->lock);
    if (!used)
        return 0;
    revalidate(client, driver_open());
    gpu_evict(client, cap);
    free_own(client, false);
    return 0;
}

void gpu_finish(struct sage_client *c)
{
    pthread_mutex_lock(&c->lock);
    bool watching = c->gpu.watching, used = c->gpu.used;
    pthread_cond_signal(&c->gpu.tick);
    pthread_mutex_unlock(&c->lock);
    if (watching)
        pthread_join(c->gpu.watcher, NULL);
    if (used)
        free_own(c, true);
}

void gpu_destroy(struct sage_client *c)
{
    while (c->gpu.cache.first) {
        struct cached *e = c->gpu.cache.first;
        cache_remove(&c->gpu.cache, e);
        if (e->buffer)
            buffer_discard(e->buffer);
        free(e);
    }
    for (struct own_event *e; (e = c->gpu.own);) {
        c->gpu.own = e->next;
        free(e);
    }
    for (struct their_event *e; (e = c->gpu.theirs);) {
        c->gpu.theirs = e->next;
        free(e);
    }
    views_destroy(c);
}

/* --- registering --- */

/* A descriptor of a chunk, if it is still what it was. */
static int export_chunk(const struct span *span, int *fd)
{
    const struct driver *cu = driver_open();
    uint64_t handle;

    if (!cu)
        return SAGE_EUNSUPPORTED;
    int result = cu->cuMemRetainAllocationHandle(&handle, (void *)(uintptr_t)span->base);
    if (result)
        return driver_check(result, "cuMemRetainAllocationHandle"), SAGE_EHANDLE;
    *fd = -1;
    result = cu->cuMemExportToShareableHandle(fd, handle, CU_POSIX_FD, 0);
    if (!result && !span_is_there(cu, span)) /* then it was another's that we got */
        close(*fd), *fd = -1, result = CU_INVALID_VALUE;
    cu->cuMemRelease(handle);
    if (result)
        return driver_check(result, "cuMemExportToShareableHandle"), SAGE_EHANDLE;
    return client_put_away(fd);
}

static uint64_t cap_of(struct gpu_job *job)
{
    struct sage_client *c = job->client;
    size_t total = 0;

    pthread_mutex_lock(&c->lock);
    uint64_t cap = c->gpu.cap;
    pthread_mutex_unlock(&c->lock);
    if (cap)
        return cap;
    job->cu->cuDeviceTotalMem(&total, job->device);
    return total / CAP_SHARE;
}

/* All, before the reader can see the buffer: it must need no driver for the next daemon. */
static int export_chunks(struct sage_buffer *b)
{
    int rc = 0;

    b->fds = malloc(b->n_spans * sizeof(*b->fds));
    if (!b->fds)
        return error_set(SAGE_ENOMEM, "out of memory");
    for (uint32_t i = 0; i < b->n_spans; i++)
        b->fds[i] = -1;
    for (uint32_t i = 0; i < b->n_spans && !rc; i++)
        rc = export_chunk(&b->spans[i], &b->fds[i]);
    return rc;
}

/* The buffer that an entry is for the daemon; several chunks, or one that has no older handle. */
static int add_buffer(struct gpu_job *job, struct cached *e, bool ipc)
{
    struct sage_buffer *b = calloc(1, sizeof(*b));

    if (!b)
        return error_set(SAGE_ENOMEM, "out of memory");
    *b = (struct sage_buffer){.client = job->client,
                              .kind = ipc ? BUFFER_CUDA_IPC : BUFFER_VMM,
                              .fd = -1,
                              .size = cached_bytes(e),
                              .spans = ipc ? NULL : e->spans,
                              .n_spans = ipc ? 0 : e->n_spans};
    int rc = 0;
    if (!ipc)
        rc = export_chunks(b);
    else if (driver_check(job->cu->cuIpcGetMemHandle(&b->handle, cached_base(e)),
                          "cuIpcGetMemHandle"))
        rc = SAGE_EHANDLE;
    if (!rc)
        rc = buffer_add(b);
    if (rc)
        buffer_discard(b);
    else
        e->buffer = b;
    return rc;
}

/*
 * Make room: what the daemon has mapped cannot be at the same address as something new. The last
 * job on freed memory is over for its stream a moment before it is for us.
 */
static void clear(struct sage_client *c, const struct cached *e, uint64_t cap)
{
    int64_t end = clock_ns() + CLEAR_MS * INT64_C(1000000);
    bool clashes;

    do {
        gpu_evict(c, cap);
        pthread_mutex_lock(&c->lock);
        clashes = cache_clashes(&c->gpu.cache, e);
        struct timespec limit = after_ms(1);
        if (clashes)
            pthread_cond_timedwait(&c->changed, &c->lock, &limit);
        pthread_mutex_unlock(&c->lock);
    } while (clashes && clock_ns() < end);
}

static int enter(struct gpu_job *job, struct cached *e, bool ipc)
{
    struct sage_client *c = job->client;
    uint64_t cap = cap_of(job);
    int rc = start_watcher(c, cap);

    if (!rc) {
        clear(c, e, cap);
        rc = add_buffer(job, e, ipc);
    }
    if (rc == SAGE_EQUOTA || rc == SAGE_ENOMEM) {
        gpu_evict(c, 0);
        rc = add_buffer(job, e, ipc);
    }
    pthread_mutex_lock(&c->lock);
    if (rc)
        cache_remove(&c->gpu.cache, e);
    e->ready = !rc;
    pthread_cond_broadcast(&c->changed);
    pthread_mutex_unlock(&c->lock);
    return rc;
}

/* With `lock` held. Did this daemon take it? While there is none the next will be offered it. */
static bool is_taken(const struct sage_client *c, const struct cached *e)
{
    return client_state(c) != LINK_LIVE || e->buffer->epoch == c->epoch;
}

/* With `lock` held. Registered with this daemon; one that another call registers is waited for. */
static struct cached *find(struct sage_client *c, const struct span *spans, uint32_t n)
{
    struct cached *e;

    while ((e = cache_find(&c->gpu.cache, spans, n))) {
        if (!e->ready)
            pthread_cond_wait(&c->changed, &c->lock);
        else if (!is_taken(c, e))
            e->stale = true;
        else
            break;
    }
    return e;
}

int gpu_acquire(struct gpu_job *job, const struct span *spans, uint32_t n, bool ipc,
                struct cached **out)
{
    struct sage_client *c = job->client;
    struct cached *new = NULL;

    pthread_mutex_lock(&c->lock);
    struct cached *e = find(c, spans, n);
    if (!e) {
        e = new = cached_create(spans, n);
        if (new)
            cache_add(&c->gpu.cache, new);
    }
    if (e)
        e->pins++;
    pthread_mutex_unlock(&c->lock);
    *out = e;
    if (!e)
        return error_set(SAGE_ENOMEM, "out of memory");
    int rc = new ? enter(job, new, ipc) : 0;
    if (rc)
        free(new);
    return rc;
}

/* An allocation that a tensor of this job was found in a moment ago. */
static bool was_found(const struct gpu_job *job, const struct cached *e)
{
    for (int i = 0; i < N_TENSORS; i++)
        if (job->places[i].cached == e)
            return true;
    return false;
}

struct cached *gpu_recall(struct gpu_job *job, uint64_t address, uint64_t bytes)
{
    struct sage_client *c = job->client;
    struct span span = {0};

    pthread_mutex_lock(&c->lock);
    struct cached *e = cache_at(&c->gpu.cache, address, bytes);
    if (e && e->ready && e->buffer->kind == BUFFER_CUDA_IPC && is_taken(c, e)) {
        span = e->spans[0];
        e->pins++;
    } else {
        e = NULL;
    }
    pthread_mutex_unlock(&c->lock);
    if (!e || was_found(job, e) || driver_is_still(job->cu, address, span.id, span.block))
        return e;
    pthread_mutex_lock(&c->lock);
    e->pins--;
    pthread_mutex_unlock(&c->lock);
    return NULL;
}
