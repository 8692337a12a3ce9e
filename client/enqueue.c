/*
 * enqueue.c - jobs as part of a CUDA stream: it waits for a word of the page (lane) or for an event
 * (event), or the CPU waits for it (sync).
 */
#include "client/client.h"

#include <poll.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

/* The answer to a packet that nobody waits for: no request gets that far. */
enum { NO_SEQ = UINT32_MAX };

enum { CANCEL_NS = 10 * 1000 * 1000 }; /* between two tries to cancel a job */

/* --- our events --- */

/* A number for the stream, of the current context where it is a default one; 0 stands for none. */
static uint64_t stream_key(const struct driver *cu, struct CUstream_st *stream, uint64_t context)
{
    unsigned long long id;

    if (cu->cuStreamGetId(stream, &id) != CU_OK)
        id = (uintptr_t)stream;
    if (stream == CU_STREAM_PER_THREAD)
        id += (uintptr_t)pthread_self();
    uint64_t key = id * UINT64_C(0x9e3779b97f4a7c15) + context;
    return key ? key : 1;
}

static void discard_event(struct gpu_job *job, struct own_event *e)
{
    struct sage_client *c = job->client;

    pthread_mutex_lock(&c->lock);
    for (struct own_event **p = &c->gpu.own; *p; p = &(*p)->next)
        if (*p == e) {
            *p = e->next;
            c->gpu.n_own--;
            break;
        }
    pthread_mutex_unlock(&c->lock);
    if (e->event)
        job->cu->cuEventDestroy(e->event);
    free(e);
}

static int register_event(struct sage_client *c, struct own_event *e)
{
    struct msg_event msg = {.event = e->id, .n_handle = sizeof(e->handle.bytes)};
    struct msg_empty reply;
    struct request request = {.op = OP_EVENT, .reply_kind = MSG_EMPTY, .reply = &reply};

    memcpy(msg.handle, e->handle.bytes, sizeof(e->handle.bytes));
    int rc = client_call(c, MSG_EVENT, &msg, NULL, &request);
    pthread_mutex_lock(&c->lock);
    if (!rc)
        e->epoch = request.epoch;
    if (client_state(c) == LINK_LIVE && e->epoch == c->epoch)
        rc = 0; /* also where the reader has told this daemon before us */
    pthread_mutex_unlock(&c->lock);
    return rc;
}

static int create_event(struct gpu_job *job, struct own_event **out)
{
    struct gpu *gpu = &job->client->gpu;
    struct own_event *e = calloc(1, sizeof(*e));

    if (!e)
        return error_set(SAGE_ENOMEM, "out of memory");
    e->taken = true;
    e->context = job->context;
    int rc = driver_check(job->cu->cuEventCreate(&e->event, CU_EVENT_UNTIMED | CU_EVENT_SHARED),
                          "stream: cuEventCreate");
    if (!rc)
        rc = driver_check(job->cu->cuIpcGetEventHandle(&e->handle, e->event),
                          "stream: cuIpcGetEventHandle");
    pthread_mutex_lock(&job->client->lock);
    if (!rc && gpu->n_own == EVENTS_MAX)
        rc = error_set(SAGE_EBUSY, "all %d events of this client are in use", EVENTS_MAX);
    if (!rc) {
        e->id = ++gpu->last_event; /* the daemon keeps those that we discard */
        e->next = gpu->own;
        gpu->own = e;
        gpu->n_own++;
    }
    pthread_mutex_unlock(&job->client->lock);
    *out = e;
    return rc;
}

/* With `lock` held. Does the daemon know the event? While there is none the next will be told. */
static bool is_known(const struct sage_client *c, const struct own_event *e)
{
    return client_state(c) != LINK_LIVE || e->epoch == c->epoch;
}

/*
 * An event that the daemon knows, of the stream's context, recorded behind the inputs. One that
 * does not work is not offered again.
 */
static int take_event(struct gpu_job *job, struct own_event **out)
{
    struct sage_client *c = job->client;
    struct own_event *e;

    pthread_mutex_lock(&c->lock);
    for (e = c->gpu.own; e && (e->taken || !context_is(&e->context, &job->context));)
        e = e->next;
    if (e)
        e->taken = true;
    bool known = e && is_known(c, e);
    pthread_mutex_unlock(&c->lock);
    int rc = e ? 0 : create_event(job, &e);
    if (!rc && !known)
        rc = register_event(c, e);
    if (!rc)
        rc = driver_check(job->cu->cuEventRecord(e->event, job->stream), "stream: cuEventRecord");
    if (rc && e)
        discard_event(job, e);
    *out = rc ? NULL : e;
    return rc;
}

/* false: the daemon does not know it any more. */
static bool put_event(struct sage_client *c, struct own_event *e)
{
    pthread_mutex_lock(&c->lock);
    e->taken = false;
    bool known = is_known(c, e);
    pthread_mutex_unlock(&c->lock);
    return known;
}

/* With `lock` held: the event with the least id above this one. */
static struct own_event *event_after(struct sage_client *c, uint32_t id)
{
    struct own_event *best = NULL;

    for (struct own_event *e = c->gpu.own; e; e = e->next)
        if (e->id > id && (!best || e->id < best->id))
            best = e;
    return best;
}

int events_register(struct sage_client *c)
{
    struct msg_event msg = {.n_handle = sizeof(msg.handle)};
    struct msg_empty reply;

    for (;;) {
        pthread_mutex_lock(&c->lock);
        const struct own_event *e = event_after(c, msg.event);
        if (e) {
            msg.event = e->id;
            memcpy(msg.handle, e->handle.bytes, sizeof(msg.handle));
        }
        pthread_mutex_unlock(&c->lock);
        if (!e)
            return 0;
        int rc = conn_call(&c->conn, OP_EVENT, MSG_EVENT, &msg, NULL, MSG_EMPTY, &reply);
        if (c->conn.fd < 0)
            return rc;
        pthread_mutex_lock(&c->lock);
        struct own_event *known = event_after(c, msg.event - 1);
        if (rc == 0 && known && known->id == msg.event)
            known->epoch = c->epoch;
        pthread_mutex_unlock(&c->lock);
    }
}

void events_finish(struct sage_client *c, const struct driver *cu)
{
    struct CUctx_st *context;

    for (struct own_event *e = c->gpu.own; e; e = e->next)
        if (driver_enter(cu, &e->context)) {
            cu->cuEventDestroy(e->event);
            cu->cuCtxPopCurrent(&context);
        }
    for (struct their_event *e = c->gpu.theirs; e; e = e->next)
        if (e->event && driver_enter(cu, &e->context)) {
            cu->cuEventDestroy(e->event);
            cu->cuCtxPopCurrent(&context);
        }
}

/* --- the daemon's events --- */

/*
 * Open it, once for each of its numbers and of our contexts; the number is ours until we say
 * WAITED, so nobody else is at it. Those of a daemon before stay, for they may be waited for yet.
 */
static int open_event(struct gpu_job *job, const struct msg_launched *launched, uint64_t epoch,
                      struct CUevent_st **out)
{
    struct sage_client *c = job->client;
    struct cu_handle handle;
    struct their_event *e;

    pthread_mutex_lock(&c->lock);
    for (e = c->gpu.theirs; e && !(e->id == launched->event && e->epoch == epoch &&
                                   context_is(&e->context, &job->context));)
        e = e->next;
    if (!e && (e = calloc(1, sizeof(*e)))) {
        *e = (struct their_event){
            .next = c->gpu.theirs, .id = launched->event, .epoch = epoch, .context = job->context};
        c->gpu.theirs = e;
    }
    pthread_mutex_unlock(&c->lock);
    if (!e)
        return error_set(SAGE_ENOMEM, "out of memory");
    if (!e->event) {
        memcpy(handle.bytes, launched->handle, sizeof(handle.bytes));
        if (driver_check(job->cu->cuIpcOpenEventHandle(&e->event, handle),
                         "stream: the daemon's event cannot be opened"))
            return SAGE_EHANDLE;
    }
    *out = e->event;
    return 0;
}

/*
 * Nobody waits for the answer. epoch: the connection that it is meant for, 0: any. Under `lock` it
 * cannot become another one.
 */
static void tell(struct sage_client *c, uint32_t op, enum msg_kind kind, const void *msg,
                 uint64_t epoch)
{
    unsigned char packet[128];
    size_t len = packet_encode(packet, sizeof(packet), op, NO_SEQ, kind, msg);
    int rc;

    do {
        pthread_mutex_lock(&c->lock);
        bool live = client_state(c) == LINK_LIVE && (!epoch || c->epoch == epoch);
        rc = live ? conn_push(c->fd, packet, len, NULL) : 0;
        pthread_mutex_unlock(&c->lock);
        if (rc == SAGE_EBUSY || rc == SAGE_ENOMEM)
            poll(NULL, 0, 1);
    } while (rc == SAGE_EBUSY || rc == SAGE_ENOMEM);
}

/* --- the modes --- */

enum sage_mode sage_client_mode(struct sage_client *client)
{
    if (!gpu_is_there(client))
        return SAGE_MODE_SYNC;
    if (client->gpu.asked != SAGE_MODE_AUTO)
        return client->gpu.asked;
    pthread_mutex_lock(&client->lock);
    enum sage_mode mode = client->gpu.in_force;
    pthread_mutex_unlock(&client->lock);
    return mode;
}

static bool daemon_has(struct sage_client *c, enum mode mode)
{
    pthread_mutex_lock(&c->lock);
    bool has = c->welcome.modes & mode;
    pthread_mutex_unlock(&c->lock);
    return has;
}

static int choose_lane(struct gpu_job *job)
{
    const struct page_view *view;

    if (!daemon_has(job->client, MODE_LANES))
        return error_set(SAGE_EUNSUPPORTED, "mode: lane, but this daemon does not have it");
    int rc = view_get(job, &view);
    if (rc)
        return rc;
    if (!view->device)
        return error_set(SAGE_EUNSUPPORTED, "mode: lane, but streams cannot use the page here: %s",
                         view->why);
    job->view = view;
    return 0;
}

static int choose_event(struct gpu_job *job, struct own_event **event)
{
    if (!daemon_has(job->client, MODE_EVENT))
        return error_set(SAGE_EUNSUPPORTED, "mode: event, but this daemon does not have it");
    return take_event(job, event);
}

/* AUTO: events need not be tried again on this connection. */
static void note_events(struct sage_client *c, int status)
{
    pthread_mutex_lock(&c->lock);
    if (status == SAGE_EHANDLE || status == SAGE_EUNSUPPORTED)
        c->gpu.no_events = c->epoch;
    pthread_mutex_unlock(&c->lock);
}

/* The mode that was asked for; else the first of lane, event and sync that works here. */
static int choose_mode(struct gpu_job *job, enum sage_mode *mode, struct own_event **event)
{
    struct sage_client *c = job->client;
    const bool any = c->gpu.asked == SAGE_MODE_AUTO;
    int rc = 0;

    pthread_mutex_lock(&c->lock);
    bool events = !any || c->gpu.no_events != c->epoch;
    pthread_mutex_unlock(&c->lock);
    *event = NULL;
    *mode = any ? SAGE_MODE_LANE : c->gpu.asked;
    if (*mode == SAGE_MODE_LANE && (rc = choose_lane(job)) && any)
        *mode = events ? SAGE_MODE_EVENT : SAGE_MODE_SYNC;
    if (*mode == SAGE_MODE_EVENT && (rc = choose_event(job, event)) && any) {
        note_events(c, rc);
        *mode = SAGE_MODE_SYNC;
    }
    if (*mode == SAGE_MODE_SYNC)
        rc = 0;
    pthread_mutex_lock(&c->lock);
    c->gpu.in_force = *mode;
    pthread_mutex_unlock(&c->lock);
    return rc;
}

/* --- event mode --- */

/* Wait until the job is launched; false: it is over without. */
static bool await_launch(struct sage_job job, struct msg_launched *launched, uint64_t *epoch)
{
    struct sage_client *c = job.lane->client;
    const struct entry *e = &job.lane->entry[job.number % SAGE_ENTRIES];

    pthread_mutex_lock(&c->lock);
    while (e->launched.number != job.number && e->done.number != job.number)
        pthread_cond_wait(&c->changed, &c->lock);
    *launched = e->launched;
    *epoch = e->launched_epoch;
    pthread_mutex_unlock(&c->lock);
    return launched->number == job.number;
}

/* Let the stream wait for the job; where it cannot, the CPU does. */
static int follow(struct gpu_job *job, struct sage_job submitted)
{
    struct sage_client *c = job->client;
    struct msg_launched launched;
    struct CUevent_st *event = NULL;
    uint64_t epoch;

    if (!await_launch(submitted, &launched, &epoch)) {
        int status = sage_wait(submitted, -1);
        lane_set_returned(submitted);
        return status;
    }
    int rc = open_event(job, &launched, epoch, &event);
    if (!rc)
        rc = driver_check(job->cu->cuStreamWaitEvent(job->stream, event, 0),
                          "stream: cuStreamWaitEvent");
    int status = rc ? sage_wait(submitted, -1) : 0;
    tell(c, OP_WAITED, MSG_WAITED, &(struct msg_waited){.event = launched.event}, epoch);
    if (!rc)
        return 0;
    lane_set_returned(submitted);
    if (status)
        return status;
    return error_set(rc, rc == SAGE_EHANDLE
                             ? "stream: the daemon's event cannot be opened: is it another user's?"
                             : "stream: it cannot wait for the daemon's event");
}

static int run_event(struct gpu_job *job, struct own_event *event, struct patience *patience)
{
    struct sage_lane *lane;
    struct sage_job submitted;
    int rc = lane_take(job->client, stream_key(job->cu, job->stream, job->context.id), &lane);

    if (rc)
        return rc;
    job->event = event->id;
    do {
        rc = lane_submit(lane, &job->attn, 0, job, &submitted);
        if (!rc)
            rc = follow(job, submitted);
    } while (rc && patience_lasts(patience, rc));
    lane_put(lane);
    return rc;
}

/* --- lane mode --- */

/*
 * Our own device is lost: that is to be heard of at once. Under MPS the daemon may have lost it,
 * too, and stay away for as long as we are there.
 */
static int give_up(struct sage_job submitted)
{
    const struct sage_lane *lane = submitted.lane;
    struct msg_cancel msg = {.lane = lane->index, .number = submitted.number};

    tell(lane->client, OP_CANCEL, MSG_CANCEL, &msg, 0);
    lane_set_returned(submitted);
    return SAGE_EDEVICE;
}

/*
 * The stream will not tell that the inputs are ready: cancel the job, again and again, since a
 * daemon that drains leaves it to the next one. It has run only if the stream did tell.
 */
static int take_back(struct sage_job submitted, int reason)
{
    struct sage_page_lane *words = submitted.lane->words;
    uint32_t n = submitted.number, i = n % SAGE_ENTRIES;
    char why[PROTO_TEXT_MAX];

    if (reason == SAGE_EDEVICE)
        return give_up(submitted);
    snprintf(why, sizeof(why), "%.*s", (int)sizeof(why) - 1, error_text());
    do
        sage_cancel(submitted);
    while (!page_wait(&words->release[i], n, CANCEL_NS));
    page_store(&words->acquire[i], n); /* or the lane would wait for it, see is_idle() */
    int status = sage_wait(submitted, -1);
    lane_set_returned(submitted);
    return status == SAGE_ECANCELED ? error_set(reason, "%s", why) : status;
}

/*
 * The stream tells the daemon that the inputs are ready, then waits for the release. No lock is
 * held: where the stream is full the driver waits for it.
 */
static int order(struct gpu_job *job, struct sage_job submitted)
{
    struct sage_page_lane *words = submitted.lane->words;
    uint32_t n = submitted.number, i = n % SAGE_ENTRIES;
    uint64_t acquire = view_word(job->view, job->client, &words->acquire[i]);
    uint64_t release = view_word(job->view, job->client, &words->release[i]);
    int rc = driver_tell_and_await(job->cu, job->stream, acquire, release, n);

    return rc ? take_back(submitted, rc) : 0;
}

/* For what is done before a job is submitted: no memory, a lost device are this process's own. */
static bool may_prepare_again(struct patience *patience, int status)
{
    return status != SAGE_ENOMEM && status != SAGE_EDEVICE && patience_lasts(patience, status);
}

static int run_lane(struct gpu_job *job, struct patience *patience)
{
    struct sage_lane *lane;
    struct sage_job submitted;
    int rc = lane_take(job->client, stream_key(job->cu, job->stream, job->context.id), &lane);

    if (rc)
        return rc;
    do
        rc = lane_submit(lane, &job->attn, 0, job, &submitted);
    while (rc && (lane_drained(lane, rc) || may_prepare_again(patience, rc)));
    if (!rc)
        rc = order(job, submitted);
    lane_put(lane);
    return rc;
}

/* --- sync mode --- */

static int run_sync(struct gpu_job *job, struct sage_times *times, struct patience *patience)
{
    int rc = 0;

    if (job->stream != GPU_NO_STREAM) {
        rc = driver_check(job->cu->cuStreamSynchronize(job->stream), "stream");
        *patience = patience_begin(job->client); /* the program's own work takes its time */
    }
    return rc ? rc : lane_run(job->client, &job->attn, job, times, patience);
}

/* --- the calls --- */

static int begin(struct gpu_job *job, struct sage_client *c, const struct sage_attn *attn,
                 struct CUstream_st *stream, struct patience *patience)
{
    int rc;

    do
        rc = gpu_begin(job, c, attn, stream, true);
    while (rc && may_prepare_again(patience, rc));
    return rc;
}

/*
 * The daemon may be followed by one that cannot have our event, or we cannot open its events: then
 * in the mode that works.
 */
static int run(struct gpu_job *job, struct patience *patience)
{
    const bool any = job->client->gpu.asked == SAGE_MODE_AUTO;
    struct own_event *event;
    enum sage_mode mode;
    bool again;
    int rc;

    do {
        do
            rc = choose_mode(job, &mode, &event);
        while (rc && may_prepare_again(patience, rc));
        if (rc)
            return rc;
        if (mode == SAGE_MODE_LANE)
            return run_lane(job, patience);
        if (mode == SAGE_MODE_SYNC)
            return run_sync(job, NULL, patience);
        rc = run_event(job, event, patience);
        again = !put_event(job->client, event);
        job->event = 0;
        if (any && rc == SAGE_EHANDLE && !again) {
            note_events(job->client, rc);
            again = true;
        }
    } while (rc && again && clock_ns() < patience->deadline);
    return rc;
}

int gpu_run(struct sage_client *client, const struct sage_attn *attn, struct sage_times *times)
{
    struct patience patience = patience_begin(client);
    struct gpu_job job;
    int rc = begin(&job, client, attn, GPU_NO_STREAM, &patience);

    if (rc)
        return rc;
    rc = run_sync(&job, times, &patience);
    if (!rc && job.block)
        rc = stage_out(&job);
    if (!rc && job.block)
        rc = driver_check(job.cu->cuStreamSynchronize(job.stream), "staging");
    gpu_end(&job);
    return rc;
}

int sage_attn_enqueue(struct sage_client *client, const struct sage_attn *attn,
                      struct CUstream_st *stream)
{
    struct patience patience = patience_begin(client);
    struct gpu_job job;

    if (client->forked)
        return client_alien();
    if (!gpu_is_there(client))
        return error_set(SAGE_EUNSUPPORTED, "stream: the daemon computes on the CPU; "
                                            "sage_attn_run() takes host memory");
    int rc = begin(&job, client, attn, stream, &patience);
    if (rc)
        return rc;
    rc = run(&job, &patience);
    if (!rc && job.block)
        rc = stage_out(&job);
    gpu_end(&job);
    return rc;
}

int sage_stream_error(struct sage_client *client, struct CUstream_st *stream)
{
    struct CUctx_st *context = NULL;
    unsigned long long id;
    char text[PROTO_TEXT_MAX];

    if (client->forked)
        return client_alien();
    const struct driver *cu = gpu_is_there(client) ? driver_open() : NULL;
    if (!cu)
        return 0;
    int rc = driver_check(cu->cuStreamGetCtx(stream, &context), "stream: cuStreamGetCtx");
    if (!rc)
        rc = driver_check(cu->cuCtxGetId(context, &id), "stream: cuCtxGetId");
    if (!rc)
        rc = gpu_check_stream(cu, stream);
    if (rc)
        return rc;
    uint64_t key = stream_key(cu, stream, id); /* the driver's lock is not taken within ours */
    pthread_mutex_lock(&client->lock);
    int status = lane_stream_error(client, key, text);
    pthread_mutex_unlock(&client->lock);
    return status ? error_set(status, "a job of this stream: %s", text) : 0;
}
