/*
 * lane.c - lanes and jobs: submit, wait, cancel, run.
 */
#include "client/client.h"

#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/socket.h>
#include <time.h>

#include "kernels/problem.h"

enum {
    MAX_IN_FLIGHT = SAGE_ENTRIES - 1,
    DONE_MS = 100,    /* how long a job's text and times may come after its release */
    LANE_MS = 10,     /* between two looks for a lane that nobody uses */
    NAP_MIN_US = 100, /* between two tries of sage_attn_run() */
    NAP_MAX_US = 20000,
};

/* --- lanes --- */

static struct sage_lane *create(struct sage_client *c, uint32_t index)
{
    struct sage_lane *lane = calloc(1, sizeof(*lane));

    if (!lane)
        return NULL;
    lane->client = c;
    lane->index = index;
    lane->words = &c->page->lane[index];
    lane->head = 1;
    c->lanes[index] = lane;
    return lane;
}

void lane_look(struct sage_lane *lane, uint32_t last)
{
    while (lane->looked != last && lane_released(lane, lane->looked + 1)) {
        uint32_t n = ++lane->looked;
        const struct entry *e = &lane->entry[n % SAGE_ENTRIES];
        int status = status_from_wire(page_load(&lane->words->status[n % SAGE_ENTRIES]));
        /* The word may be a daemon's, that finished late what we had failed. */
        if (!status && e->number == n && e->failed)
            status = SAGE_ELOST;
        if (status && !lane->error && e->returned != n) {
            lane->error = status;
            lane->error_number = n;
        }
    }
}

void lane_set_returned(struct sage_job job)
{
    struct sage_lane *lane = job.lane;

    pthread_mutex_lock(&lane->client->lock);
    lane->entry[job.number % SAGE_ENTRIES].returned = job.number;
    if (lane->error_number == job.number)
        lane->error = 0;
    pthread_mutex_unlock(&lane->client->lock);
}

/* The error that the lane's stream has not been told; then it has. 0: none. */
static int tell_error(struct sage_lane *lane, char *text)
{
    lane_look(lane, lane_tail(lane));
    int status = lane->error;
    if (status) {
        const struct msg_done_job *done = &lane->entry[lane->error_number % SAGE_ENTRIES].done;
        bool told = done->number == lane->error_number && done->text[0];
        snprintf(text, PROTO_TEXT_MAX, "%s", told ? done->text : sage_strerror(status));
        lane->error = 0;
    }
    return status;
}

/* For a stream that loses its lane to another: what it was not told it still will be. */
static void keep_error(struct sage_client *c, struct sage_lane *lane)
{
    struct stream_error e = {.stream = lane->stream};

    e.status = tell_error(lane, e.text);
    if (e.status && e.stream)
        c->lost[c->n_lost++ % SAGE_LANES] = e;
}

int lane_stream_error(struct sage_client *c, uint64_t stream, char *text)
{
    char other[PROTO_TEXT_MAX];
    int status = 0;

    for (uint32_t i = c->n_lost - SAGE_LANES; i != c->n_lost; i++) { /* the oldest first */
        struct stream_error *e = &c->lost[i % SAGE_LANES];
        if (e->stream != stream)
            continue;
        if (!status)
            memcpy(text, e->text, sizeof(e->text));
        status = status ? status : e->status;
        e->stream = 0;
    }
    for (int i = 0; i < SAGE_LANES; i++)
        if (c->lanes[i] && c->lanes[i]->stream == stream) {
            int error = tell_error(c->lanes[i], status ? other : text);
            status = status ? status : error;
        }
    return status;
}

static bool is_ready(const struct sage_lane *lane, uint32_t n)
{
    return page_reached(page_load(&lane->words->acquire[n % SAGE_ENTRIES]), n);
}

/*
 * Nobody is going to write to its words. A job can be over before an earlier one (refused), and
 * before its stream has come to store the acquire word.
 */
static bool is_idle(const struct sage_lane *lane)
{
    uint32_t tail = lane_tail(lane);

    for (uint32_t n = tail - MAX_IN_FLIGHT + 1; n != tail + 1; n++)
        if (!lane_released(lane, n) || (lane->stream && !is_ready(lane, n)))
            return false;
    return true;
}

/*
 * How little a lane suits a new stream: rather one that no other is going to ask for, and never one
 * where a job would wait for an earlier one of another stream, which may be waiting for it.
 */
enum { FREE, NEW, IDLE, BUSY };

static int unfitness(const struct sage_lane *lane)
{
    if (!lane)
        return NEW;
    if (lane->used || !is_idle(lane))
        return BUSY;
    return lane->stream ? IDLE : FREE;
}

/* The stream's, or the one that suits best; of equals that was taken longest ago. -1: none does. */
static int choose(const struct sage_client *c, uint64_t stream)
{
    int best = -1, least = BUSY;
    uint64_t turn = 0;

    for (int i = 0; stream && i < SAGE_LANES; i++)
        if (c->lanes[i] && !c->lanes[i]->used && c->lanes[i]->stream == stream)
            return i;
    for (int i = 0; i < SAGE_LANES; i++) {
        const struct sage_lane *lane = c->lanes[i];
        int unfit = unfitness(lane);
        if (unfit < least || (unfit == IDLE && least == IDLE && lane->turn < turn)) {
            best = i;
            least = unfit;
            turn = lane ? lane->turn : 0;
        }
    }
    return best;
}

/* With `lock` held. A lane for one owner. */
static int take(struct sage_client *c, uint64_t stream, struct sage_lane **out)
{
    int best = choose(c, stream);

    if (best < 0)
        return error_set(SAGE_EBUSY, "all %d lanes of this client are in use", SAGE_LANES);
    struct sage_lane *lane = c->lanes[best];
    if (!lane)
        lane = create(c, (uint32_t)best);
    if (!lane)
        return error_set(SAGE_ENOMEM, "out of memory");
    if (!stream || lane->stream != stream) {
        keep_error(c, lane);
        lane->stream = stream;
        lane->looked = lane_tail(lane);
        lane->error = 0;
    }
    lane_look(lane, lane_tail(lane));
    lane->turn = ++c->turns;
    lane->used = true;
    *out = lane;
    return 0;
}

static void put(struct sage_lane *lane)
{
    lane->used = false;
    pthread_cond_broadcast(&lane->client->changed);
}

int sage_lane_create(struct sage_client *client, struct sage_lane **lane)
{
    *lane = NULL;
    if (client->forked)
        return client_alien();
    pthread_mutex_lock(&client->lock);
    int rc = take(client, 0, lane);
    pthread_mutex_unlock(&client->lock);
    return rc;
}

void sage_lane_destroy(struct sage_lane *lane)
{
    if (!lane || lane->client->forked)
        return;
    uint32_t tail = lane_tail(lane);
    for (uint32_t n = tail - MAX_IN_FLIGHT + 1; n != tail + 1; n++) {
        struct sage_job job = {lane, n};
        bool ready = is_ready(lane, n);
        /* One that never became ready would never be over. */
        if (!lane_released(lane, n) && !ready)
            sage_cancel(job);
        page_wait(&lane->words->release[n % SAGE_ENTRIES], n, -1);
        if (!ready) /* nor is it going to be: the lane has no use for it any more */
            page_store(&lane->words->acquire[n % SAGE_ENTRIES], n);
    }
    pthread_mutex_lock(&lane->client->lock);
    put(lane);
    pthread_mutex_unlock(&lane->client->lock);
}

/* --- submitting --- */

/* Count what is over. */
static void advance(struct sage_lane *lane)
{
    uint32_t end = lane_tail(lane) + 1;

    while (lane->head != end && lane_released(lane, lane->head)) {
        lane->head++;
        lane->client->in_flight--;
    }
}

/* As many jobs are in flight as the daemon allows. With `submit_lock` held. */
static bool credits_are_used(struct sage_client *c)
{
    for (int i = 0; c->in_flight >= c->credits && i < SAGE_LANES; i++)
        if (c->lanes[i])
            advance(c->lanes[i]);
    return c->in_flight >= c->credits;
}

static int take_credit(struct sage_lane *lane)
{
    struct sage_client *c = lane->client;

    advance(lane);
    if (lane_tail(lane) + 1 - lane->head >= MAX_IN_FLIGHT)
        return error_set(SAGE_EBUSY, "%d jobs are in flight on this lane", MAX_IN_FLIGHT);
    if (credits_are_used(c))
        return error_set(SAGE_EBUSY, "%u jobs are in flight, all that the daemon allows",
                         (uint32_t)c->credits);
    if (client_state(c) == LINK_LIVE && !conn_has_room(c->fd))
        return error_set(SAGE_EBUSY, "the daemon does not read its socket, and it is full");
    return 0;
}

/* Keep the packet: the reader sends it again when the daemon dies. */
static int keep_packet(struct sage_lane *lane, uint32_t n, const void *packet, size_t len)
{
    struct entry *entry = &lane->entry[n % SAGE_ENTRIES];
    unsigned char *old = NULL, *larger = NULL;

    if (len > entry->capacity) {
        larger = malloc(len);
        if (!larger)
            return error_set(SAGE_ENOMEM, "out of memory");
    }
    pthread_mutex_lock(&lane->client->lock);
    lane_look(lane, lane_tail(lane)); /* the entry's last job is over, and its status goes now */
    if (larger) {
        old = entry->packet;
        entry->packet = larger;
        entry->capacity = (uint32_t)len;
    }
    memcpy(entry->packet, packet, len);
    entry->len = (uint32_t)len;
    entry->number = n;
    entry->failed = false;
    pthread_mutex_unlock(&lane->client->lock);
    free(old);
    return 0;
}

/* What the daemon gets is a copy that nobody changes any more: check that one. */
static int check(struct sage_client *c, const struct sage_attn *attn, const struct gpu_job *gpu)
{
    struct msg_submit *m = &c->submit;
    struct sage_attn *a = &m->attn;
    char why[PROTO_TEXT_MAX];

    *a = *attn;
    for (int i = 0; i < N_TENSORS; i++) {
        const struct sage_tensor *t = tensor_of(a, i);
        if (t->dtype != SAGE_NONE && (t->buffer || t->offset))
            return error_set(SAGE_EINVAL, "%s.%s: must be 0, a tensor is named by its data",
                             tensor_names[i], t->buffer ? "buffer" : "offset");
    }
    m->event = gpu ? gpu->event : 0;
    m->streamed = gpu && gpu->view;
    m->staged = gpu ? gpu->staged : 0;
    m->n_q_offsets = m->n_k_offsets = 0;
    if (a->n_seqs > 0 && a->n_seqs <= SAGE_MAX_SEQS && a->q_offsets && a->k_offsets) {
        m->n_q_offsets = m->n_k_offsets = (uint32_t)a->n_seqs + 1;
        a->q_offsets = memcpy(m->q_offsets, a->q_offsets, m->n_q_offsets * sizeof(int32_t));
        a->k_offsets = memcpy(m->k_offsets, a->k_offsets, m->n_k_offsets * sizeof(int32_t));
    }
    /* gpu_begin() has checked its own copy, to which only offsets do not belong. */
    int rc = gpu && a->n_seqs == 0 ? 0 : sage_attn_check(a, why, sizeof(why));
    if (rc)
        return error_set(rc, "%s", why);
    for (int i = 0; !rc && i < N_TENSORS; i++) {
        struct sage_tensor *t = tensor_of(a, i);
        if (!gpu || !gpu->places[i].set) {
            rc = buffer_resolve(c, tensor_names[i], t);
            continue;
        }
        t->data = NULL;
        t->buffer = gpu->places[i].buffer;
        t->offset = gpu->places[i].offset;
    }
    return rc;
}

/* The packet of the checked job, as the lane's next. */
static int prepare(struct sage_lane *lane, unsigned flags)
{
    struct sage_client *c = lane->client;
    uint32_t n = lane_tail(lane) + 1;

    c->submit.lane = lane->index;
    c->submit.number = n;
    c->submit.prompt = flags & SAGE_TIMES;
    size_t len = packet_encode(c->out, sizeof(c->out), OP_SUBMIT, 0, MSG_SUBMIT, &c->submit);
    if (!len)
        return error_set(SAGE_EINTERNAL, "SUBMIT does not fit a packet");
    return keep_packet(lane, n, c->out, len);
}

/*
 * Publish the prepared job, then send it, unless the reader is going to. There was room for it; so
 * it waits only if the reader has just replaced the connection and filled it.
 */
static void publish(struct sage_lane *lane)
{
    struct sage_client *c = lane->client;
    uint64_t tail = atomic_load(&lane->tail) + 1;
    uint32_t n = (uint32_t)tail;
    const struct entry *e = &lane->entry[n % SAGE_ENTRIES];

    c->in_flight++;
    atomic_store(&lane->tail, tail);
    enum link_state state = LINK_STATE(atomic_fetch_add(&c->link, 1));
    if (state == LINK_LIVE) {
        int rc = conn_send(c->fd, e->packet, e->len, NULL);
        if (rc && rc != SAGE_ELOST) /* the reader then sends it again, or fails it */
            shutdown(c->fd, SHUT_RDWR);
    } else if (state == LINK_LOST) { /* since client_revive() */
        reader_fail(lane, n, "the connection to the daemon broke");
    }
}

bool lane_drained(struct sage_lane *lane, int status)
{
    uint32_t oldest = lane_tail(lane) - MAX_IN_FLIGHT + 1;

    if (status != SAGE_EBUSY)
        return false;
    if (!lane_released(lane, oldest))
        return page_wait(&lane->words->release[oldest % SAGE_ENTRIES], oldest, -1);
    pthread_mutex_lock(&lane->client->submit_lock);
    bool used = credits_are_used(lane->client);
    pthread_mutex_unlock(&lane->client->submit_lock);
    if (used) /* any of them may be over first */
        nanosleep(&(struct timespec){.tv_nsec = NAP_MIN_US * 1000}, NULL);
    return used;
}

int lane_submit(struct sage_lane *lane, const struct sage_attn *attn, unsigned flags,
                struct gpu_job *gpu, struct sage_job *job)
{
    struct sage_client *c = lane->client;
    bool streamed = gpu && gpu->view;

    pthread_mutex_lock(&c->submit_lock);
    int rc = check(c, attn, gpu);
    if (!rc)
        rc = client_revive(c);
    if (!rc)
        rc = take_credit(lane);
    if (!rc)
        rc = prepare(lane, flags);
    if (!rc) {
        uint32_t n = lane_tail(lane) + 1;
        if (!streamed && !(flags & SAGE_HELD))
            page_store(&lane->words->acquire[n % SAGE_ENTRIES], n);
        publish(lane);
        *job = (struct sage_job){lane, n};
    }
    pthread_mutex_unlock(&c->submit_lock);
    if (!rc && gpu)
        gpu_submitted(gpu, *job);
    return rc;
}

static int submit_from_gpu(struct sage_lane *lane, const struct sage_attn *attn, unsigned flags,
                           struct sage_job *job)
{
    struct gpu_job gpu;
    int rc = gpu_begin(&gpu, lane->client, attn, GPU_NO_STREAM, false);

    if (rc)
        return rc;
    rc = lane_submit(lane, &gpu.attn, flags, &gpu, job);
    gpu_end(&gpu);
    return rc;
}

int sage_attn_submit(struct sage_lane *lane, const struct sage_attn *attn, unsigned flags,
                     struct sage_job *job)
{
    *job = (struct sage_job){0};
    if (lane->client->forked)
        return client_alien();
    if (flags & ~(unsigned)(SAGE_HELD | SAGE_TIMES))
        return error_set(SAGE_EINVAL, "flags: 0x%x, may only have SAGE_HELD and SAGE_TIMES", flags);
    return gpu_is_there(lane->client) ? submit_from_gpu(lane, attn, flags, job)
                                      : lane_submit(lane, attn, flags, NULL, job);
}

/* --- jobs --- */

static int check_job(struct sage_job job)
{
    if (!job.lane)
        return error_set(SAGE_EINVAL, "job %u: has no lane", job.number);
    if (job.lane->client->forked)
        return client_alien();
    if (!lane_has(job.lane, job.number))
        return error_set(SAGE_EINVAL, "job %u: not submitted, or %d later ones were", job.number,
                         MAX_IN_FLIGHT);
    return 0;
}

int sage_ready(struct sage_job job)
{
    int rc = check_job(job);

    if (!rc)
        page_store(&job.lane->words->acquire[job.number % SAGE_ENTRIES], job.number);
    return rc;
}

/* Sleep until the job is over, whatever its status. */
static int await_release(struct sage_job job, int timeout_ms, int *status)
{
    uint32_t i = job.number % SAGE_ENTRIES;
    int64_t timeout = timeout_ms < 0 ? -1 : timeout_ms * INT64_C(1000000);
    int rc = check_job(job);

    if (rc)
        return rc;
    if (!page_wait(&job.lane->words->release[i], job.number, timeout))
        return error_set(SAGE_ETIMEDOUT, "job %u is not over after %d ms", job.number, timeout_ms);
    *status = status_from_wire(page_load(&job.lane->words->status[i]));
    return check_job(job); /* was it still this job's status? */
}

/* The daemon's own words on a released job, which come by the socket a little later. */
static bool await_done(struct sage_job job, int64_t timeout_ns, struct msg_done_job *done)
{
    struct sage_client *c = job.lane->client;
    const struct msg_done_job *kept = &job.lane->entry[job.number % SAGE_ENTRIES].done;
    int64_t end = clock_ns() + timeout_ns;
    struct timespec limit = {end / 1000000000, end % 1000000000};
    int rc = 0;

    pthread_mutex_lock(&c->lock);
    while (kept->number != job.number && lane_has(job.lane, job.number) && rc == 0)
        rc = timeout_ns < 0 ? pthread_cond_wait(&c->changed, &c->lock)
                            : pthread_cond_timedwait(&c->changed, &c->lock, &limit);
    *done = *kept;
    pthread_mutex_unlock(&c->lock);
    return done->number == job.number;
}

int sage_wait(struct sage_job job, int timeout_ms)
{
    struct msg_done_job done;
    int status;
    int rc = await_release(job, timeout_ms, &status);

    if (rc || !status)
        return rc;
    bool told = await_done(job, DONE_MS * INT64_C(1000000), &done);
    return error_set(status, "%s", told && done.text[0] ? done.text : sage_strerror(status));
}

int sage_job_times(struct sage_job job, struct sage_times *times)
{
    struct msg_done_job done;
    int status;

    *times = (struct sage_times){0};
    int rc = await_release(job, -1, &status);
    if (rc)
        return rc;
    if (!await_done(job, -1, &done))
        return check_job(job);
    if (done.status == -SAGE_ELOST)
        return error_set(SAGE_ELOST, "job %u: the daemon was lost before it told", job.number);
    *times = (struct sage_times){done.queue_ns, done.run_ns};
    return 0;
}

int sage_cancel(struct sage_job job)
{
    struct msg_cancel msg = {.number = job.number};
    struct msg_canceled reply = {0};
    struct request request = {.op = OP_CANCEL, .reply_kind = MSG_CANCELED, .reply = &reply};
    int status = 0;
    int rc = check_job(job);

    if (rc)
        return rc;
    msg.lane = job.lane->index;
    do /* after a break the job is in the next daemon's queue, or it is over */
        rc = lane_released(job.lane, job.number)
                 ? 0
                 : client_call(job.lane->client, MSG_CANCEL, &msg, NULL, &request);
    while (rc == SAGE_ELOST);
    if (rc || reply.canceled)
        return rc;
    rc = await_release(job, 0, &status);
    if (rc == SAGE_ETIMEDOUT)
        return error_set(SAGE_ESTARTED, "job %u has started", job.number);
    /* By this call, whose answer was lost, or by an earlier one. */
    if (!rc && status != SAGE_ECANCELED)
        rc = error_set(SAGE_ESTARTED, "job %u is over", job.number);
    return rc;
}

/* --- all in one --- */

/* Is there a lane that is not the program's own? It becomes free, and DONE or its owner tells. */
static bool any_returns(const struct sage_client *c)
{
    for (int i = 0; i < SAGE_LANES; i++)
        if (!c->lanes[i] || !c->lanes[i]->used)
            return true;
    return c->runners > 0;
}

/* With `lock` held. A lane whose stream has yet to store an acquire word becomes idle unheard. */
static void await_change(struct sage_client *c)
{
    int64_t end = clock_ns() + LANE_MS * INT64_C(1000000);
    struct timespec limit = {end / 1000000000, end % 1000000000};

    pthread_cond_timedwait(&c->changed, &c->lock, &limit);
}

int lane_take(struct sage_client *c, uint64_t stream, struct sage_lane **lane)
{
    pthread_mutex_lock(&c->lock);
    int rc = take(c, stream, lane);
    while (rc == SAGE_EBUSY && any_returns(c)) {
        await_change(c);
        rc = take(c, stream, lane);
    }
    c->runners += rc == 0;
    pthread_mutex_unlock(&c->lock);
    return rc;
}

void lane_put(struct sage_lane *lane)
{
    pthread_mutex_lock(&lane->client->lock);
    lane->client->runners--;
    put(lane);
    pthread_mutex_unlock(&lane->client->lock);
}

struct patience patience_begin(const struct sage_client *client)
{
    return (struct patience){clock_ns() + client->retry_ms * INT64_C(1000000), NAP_MIN_US};
}

bool patience_lasts(struct patience *p, int status)
{
    if (!sage_retryable(status) || clock_ns() >= p->deadline)
        return false;
    nanosleep(&(struct timespec){0, p->nap_us * 1000}, NULL);
    p->nap_us = p->nap_us * 2 < NAP_MAX_US ? p->nap_us * 2 : NAP_MAX_US;
    return true;
}

int lane_run(struct sage_client *client, const struct sage_attn *attn, struct gpu_job *gpu,
             struct sage_times *times, struct patience *patience)
{
    struct sage_lane *lane;
    struct sage_job job;
    int rc = lane_take(client, 0, &lane);

    if (rc)
        return rc;
    do {
        rc = lane_submit(lane, attn, times ? SAGE_TIMES : 0, gpu, &job);
        if (!rc)
            rc = sage_wait(job, -1);
    } while (rc && patience_lasts(patience, rc));
    if (!rc && times)
        sage_job_times(job, times); /* zero where they were lost; the result was not */
    lane_put(lane);
    return rc;
}

int sage_attn_run(struct sage_client *client, const struct sage_attn *attn,
                  struct sage_times *times)
{
    struct patience patience = patience_begin(client);

    if (client->forked)
        return client_alien();
    return gpu_is_there(client) ? gpu_run(client, attn, times)
                                : lane_run(client, attn, NULL, times, &patience);
}
