/*
 * lane.c - lanes and jobs: submit, wait, cancel, run.
 */
#include "client/client.h"

#include <stdlib.h>
#include <string.h>
#include <sys/socket.h>
#include <time.h>

#include "kernels/problem.h"

enum {
    MAX_IN_FLIGHT = SAGE_ENTRIES - 1,
    DONE_MS = 100,    /* how long a job's text and times may come after its release */
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

/* With `lock` held. An idle lane, for one owner. */
static int take(struct sage_client *c, struct sage_lane **out)
{
    for (uint32_t i = 0; i < SAGE_LANES; i++) {
        struct sage_lane *lane = c->lanes[i];
        if (lane && lane->used)
            continue;
        if (!lane)
            lane = create(c, i);
        if (!lane)
            return error_set(SAGE_ENOMEM, "out of memory");
        lane->used = true;
        *out = lane;
        return 0;
    }
    return error_set(SAGE_EBUSY, "all %d lanes of this client are in use", SAGE_LANES);
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
    int rc = take(client, lane);
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
        /* One that never became ready would never be over. */
        if (!lane_released(lane, n) &&
            !page_reached(page_load(&lane->words->acquire[n % SAGE_ENTRIES]), n))
            sage_cancel(job);
        page_wait(&lane->words->release[n % SAGE_ENTRIES], n, -1);
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

static int take_credit(struct sage_lane *lane)
{
    struct sage_client *c = lane->client;
    uint32_t credits = c->credits;

    advance(lane);
    if (lane_tail(lane) + 1 - lane->head >= MAX_IN_FLIGHT)
        return error_set(SAGE_EBUSY, "%d jobs are in flight on this lane", MAX_IN_FLIGHT);
    for (int i = 0; c->in_flight >= credits && i < SAGE_LANES; i++)
        if (c->lanes[i])
            advance(c->lanes[i]);
    if (c->in_flight >= credits)
        return error_set(SAGE_EBUSY, "%u jobs are in flight, all that the daemon allows", credits);
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
    if (larger) {
        old = entry->packet;
        entry->packet = larger;
        entry->capacity = (uint32_t)len;
    }
    memcpy(entry->packet, packet, len);
    entry->len = (uint32_t)len;
    entry->number = n;
    pthread_mutex_unlock(&lane->client->lock);
    free(old);
    return 0;
}

/* What the daemon gets is a copy that nobody changes any more: check that one. */
static int check(struct sage_client *c, const struct sage_attn *attn)
{
    static const char *const names[] = {"q", "k", "v", "o", "mask", "lse"};
    struct msg_submit *m = &c->submit;
    struct sage_attn *a = &m->attn;
    struct sage_tensor *tensors[] = {&a->q, &a->k, &a->v, &a->o, &a->mask, &a->lse};
    char why[PROTO_TEXT_MAX];

    *a = *attn;
    for (int i = 0; i < 6; i++)
        if (tensors[i]->dtype != SAGE_NONE && (tensors[i]->buffer || tensors[i]->offset))
            return error_set(SAGE_EINVAL, "%s.%s: must be 0, a tensor is named by its data",
                             names[i], tensors[i]->buffer ? "buffer" : "offset");
    m->n_q_offsets = m->n_k_offsets = 0;
    if (a->n_seqs > 0 && a->n_seqs <= SAGE_MAX_SEQS && a->q_offsets && a->k_offsets) {
        m->n_q_offsets = m->n_k_offsets = (uint32_t)a->n_seqs + 1;
        a->q_offsets = memcpy(m->q_offsets, a->q_offsets, m->n_q_offsets * sizeof(int32_t));
        a->k_offsets = memcpy(m->k_offsets, a->k_offsets, m->n_k_offsets * sizeof(int32_t));
    }
    int rc = sage_attn_check(a, why, sizeof(why));
    if (rc)
        return error_set(rc, "%s", why);
    for (int i = 0; !rc && i < 6; i++)
        rc = buffer_resolve(c, names[i], tensors[i]);
    return rc;
}

/*
 * Publish the checked job, then send it, unless the reader is going to. There was room for it, and
 * nobody else sends; so it waits only if the reader has just replaced the connection and filled it.
 */
static int publish(struct sage_lane *lane, unsigned flags, struct sage_job *job)
{
    struct sage_client *c = lane->client;
    uint64_t tail = atomic_load(&lane->tail) + 1;
    uint32_t n = (uint32_t)tail;

    c->submit.lane = lane->index;
    c->submit.number = n;
    c->submit.prompt = flags & SAGE_TIMES;
    size_t len = packet_encode(c->out, sizeof(c->out), OP_SUBMIT, 0, MSG_SUBMIT, &c->submit);
    if (!len)
        return error_set(SAGE_EINTERNAL, "SUBMIT does not fit a packet");
    int rc = keep_packet(lane, n, c->out, len);
    if (rc)
        return rc;
    if (!(flags & SAGE_HELD))
        page_store(&lane->words->acquire[n % SAGE_ENTRIES], n);
    *job = (struct sage_job){lane, n};
    c->in_flight++;
    atomic_store(&lane->tail, tail);
    enum link_state state = LINK_STATE(atomic_fetch_add(&c->link, 1));
    if (state == LINK_LIVE) {
        rc = conn_send(c->fd, c->out, len, -1);
        if (rc && rc != SAGE_ELOST) /* the reader then sends it again, or fails it */
            shutdown(c->fd, SHUT_RDWR);
    } else if (state == LINK_LOST) { /* since client_revive() */
        reader_fail(lane, n, "the connection to the daemon broke");
    }
    return 0;
}

static int submit(struct sage_lane *lane, const struct sage_attn *attn, unsigned flags,
                  struct sage_job *job)
{
    struct sage_client *c = lane->client;

    pthread_mutex_lock(&c->submit_lock);
    int rc = check(c, attn);
    if (!rc)
        rc = client_revive(c);
    if (!rc)
        rc = take_credit(lane);
    if (!rc)
        rc = publish(lane, flags, job);
    pthread_mutex_unlock(&c->submit_lock);
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
    return submit(lane, attn, flags, job);
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
                 : client_call(job.lane->client, MSG_CANCEL, &msg, -1, &request);
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

/* A lane for this call; if other calls have them all, the next that comes free. */
static int take_for_run(struct sage_client *c, struct sage_lane **lane)
{
    pthread_mutex_lock(&c->lock);
    int rc = take(c, lane);
    while (rc == SAGE_EBUSY && c->runners > 0) {
        pthread_cond_wait(&c->changed, &c->lock);
        rc = take(c, lane);
    }
    c->runners += rc == 0;
    pthread_mutex_unlock(&c->lock);
    return rc;
}

static void put_after_run(struct sage_lane *lane)
{
    pthread_mutex_lock(&lane->client->lock);
    lane->client->runners--;
    put(lane);
    pthread_mutex_unlock(&lane->client->lock);
}

int sage_attn_run(struct sage_client *client, const struct sage_attn *attn,
                  struct sage_times *times)
{
    struct sage_lane *lane;
    struct sage_job job;

    if (client->forked)
        return client_alien();
    int64_t deadline = clock_ns() + client->retry_ms * INT64_C(1000000);
    long nap = NAP_MIN_US;
    int rc = take_for_run(client, &lane);
    if (rc)
        return rc;
    for (;;) {
        rc = submit(lane, attn, times ? SAGE_TIMES : 0, &job);
        if (!rc)
            rc = sage_wait(job, -1);
        if (!rc || !sage_retryable(rc) || clock_ns() >= deadline)
            break;
        nanosleep(&(struct timespec){0, nap * 1000}, NULL);
        nap = nap * 2 < NAP_MAX_US ? nap * 2 : NAP_MAX_US;
    }
    if (!rc && times)
        sage_job_times(job, times); /* zero where they were lost; the result was not */
    put_after_run(lane);
    return rc;
}
