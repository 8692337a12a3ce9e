/*
 * job.c - from a SUBMIT to its terminal status.
 */
#include "daemon/job.h"

#include <math.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

#include "daemon/daemon.h"
#include "kernels/problem.h"

enum { SPARE_OFFSETS_MAX = 1 << 20 }; /* that jobs to be used again keep room for, 4 MiB */

static const char *const tensor_names[JOB_TENSORS] = {"q", "k", "v", "o", "mask", "lse"};

static struct sage_tensor *tensor_of(struct sage_attn *attn, int i)
{
    struct sage_tensor *const tensors[JOB_TENSORS] = {&attn->q, &attn->k,    &attn->v,
                                                      &attn->o, &attn->mask, &attn->lse};
    return tensors[i];
}

/* --- memory: what one job leaves the next one uses --- */

int job_reserve(struct daemon *d, uint64_t n)
{
    while (n-- > 0) {
        struct job *job = calloc(1, sizeof(*job));
        if (!job)
            return SAGE_ENOMEM;
        TAILQ_INSERT_HEAD(&d->spare, job, lane_link);
    }
    return 0;
}

void job_free_spare(struct daemon *d)
{
    struct job *job;

    while ((job = TAILQ_FIRST(&d->spare))) {
        TAILQ_REMOVE(&d->spare, job, lane_link);
        free(job->offsets);
        free(job);
    }
}

/* The one that was used last is still in the cache. */
static void put_spare(struct daemon *d, struct job *job)
{
    if (d->spare_offsets + job->offsets_room > SPARE_OFFSETS_MAX) {
        free(job->offsets);
        job->offsets = NULL;
        job->offsets_room = 0;
    }
    d->spare_offsets += job->offsets_room;
    TAILQ_INSERT_HEAD(&d->spare, job, lane_link);
}

/* With room for `n` offsets. */
static struct job *take_spare(struct daemon *d, size_t n)
{
    if (TAILQ_EMPTY(&d->spare) && job_reserve(d, 1))
        return NULL;
    struct job *job = TAILQ_FIRST(&d->spare);
    if (n > job->offsets_room) {
        int32_t *offsets = realloc(job->offsets, n * sizeof(*offsets));
        if (!offsets)
            return NULL;
        d->spare_offsets += n - job->offsets_room;
        job->offsets = offsets;
        job->offsets_room = n;
    }
    d->spare_offsets -= job->offsets_room;
    TAILQ_REMOVE(&d->spare, job, lane_link);
    *job = (struct job){.offsets = job->offsets, .offsets_room = job->offsets_room};
    return job;
}

/* --- admission --- */

enum taken { TAKEN, DUPLICATE, BROKEN };

/* The next number of a lane; a number that came before is a resubmission that crossed its job. */
static enum taken take_number(struct session *s, uint32_t lane_index, uint32_t number, char *why)
{
    if (!s->page || lane_index >= SAGE_LANES) {
        snprintf(why, PROTO_TEXT_MAX, s->page ? "lane: %u, must be below %d" : "no session page",
                 lane_index, SAGE_LANES);
        return BROKEN;
    }
    struct lane *lane = &s->lanes[lane_index];
    if (lane->used && page_reached(lane->last, number))
        return DUPLICATE;
    const struct job *oldest = TAILQ_FIRST(&lane->jobs);
    if (oldest && number - oldest->number > SAGE_ENTRIES) {
        snprintf(why, PROTO_TEXT_MAX, "number: %u is more than %d ahead of job %u", number,
                 SAGE_ENTRIES, oldest->number);
        return BROKEN;
    }
    lane->used = true;
    lane->last = number;
    return TAKEN;
}

static void refuse(struct session *s, uint32_t lane, uint32_t number, int status, const char *text)
{
    struct msg_done_job report = {.lane = lane, .number = number, .status = (uint32_t)-status};

    snprintf(report.text, sizeof(report.text), "%s", text);
    page_release(&s->page->lane[lane], number, status);
    s->daemon->stats.refused++;
    session_report(s, &report, true);
}

bool job_refuse(struct session *s, uint32_t lane, uint32_t number, int status, const char *text,
                char *why)
{
    enum taken taken = take_number(s, lane, number, why);

    if (taken == TAKEN)
        refuse(s, lane, number, status, text);
    return taken != BROKEN;
}

/* Every tensor lies in a buffer of this session, to its last byte. */
static int bind_tensors(struct session *s, struct job *job, char *why)
{
    for (int i = 0; i < JOB_TENSORS; i++) {
        struct sage_tensor *t = tensor_of(&job->attn, i);
        int64_t bytes;
        if (t->dtype == SAGE_NONE)
            continue;
        if (!sage_tensor_bytes(t, &bytes)) {
            snprintf(why, PROTO_TEXT_MAX, "%s: its extent in bytes does not fit 63 bits",
                     tensor_names[i]);
            return SAGE_EINVAL;
        }
        if (bytes == 0) /* lies nowhere */
            continue;
        struct buffer *b = buffer_find(s, t->buffer);
        if (!b) {
            snprintf(why, PROTO_TEXT_MAX, "%s.buffer: %u is not registered", tensor_names[i],
                     t->buffer);
            return SAGE_EBUFFER;
        }
        if (t->offset > b->size || (uint64_t)bytes > b->size - t->offset) {
            snprintf(why, PROTO_TEXT_MAX, "%s: reaches beyond the %llu bytes of buffer %u",
                     tensor_names[i], (unsigned long long)b->size, b->id);
            return SAGE_EBOUNDS;
        }
        t->data = (char *)b->base + t->offset; /* from here on it is a tensor of this process */
        t->buffer = 0;
        t->offset = 0;
        job->buffers[i] = b;
        /* What is read and written, wherever it lies: not the extent. */
        job->bytes += (double)t->shape[0] * (double)t->shape[1] * (double)t->shape[2] *
                      (double)t->shape[3] * (double)sage_dtype_size(t->dtype);
    }
    return 0;
}

/*
 * The largest group has to fit a slot, since nothing smaller can be computed alone: one of the
 * sequence with the most keys, or with the most rows.
 */
static int check_workspace(const struct daemon *d, const struct sage_attn *attn, char *why)
{
    int64_t heads = attn->k.shape[1], most_keys = 0, most_rows = 0;

    for (int64_t i = 1; i < attn->n_seqs; i++) {
        if (sage_attn_seq(attn, i).nk > sage_attn_seq(attn, most_keys).nk)
            most_keys = i;
        if (sage_attn_seq(attn, i).nq > sage_attn_seq(attn, most_rows).nq)
            most_rows = i;
    }
    const int n = sage_attn_groups(attn) == 0 ? 0 : most_rows == most_keys ? 1 : 2;
    for (int i = 0; i < n; i++) {
        struct sage_part part = {
            .group = (i ? most_rows : most_keys) * heads, .n_groups = 1, .n_rows = -1};
        size_t bytes = d->backend->workspace(attn, &part);
        if (bytes <= d->sched.workspace)
            continue;
        snprintf(why, PROTO_TEXT_MAX,
                 "workspace: one kv head needs %zu bytes, a slot has %zu (option slot_bytes)",
                 bytes, d->sched.workspace);
        return SAGE_EQUOTA;
    }
    return 0;
}

static int check_event(struct session *s, const struct msg_submit *msg, char *why)
{
    if (!msg->event)
        return 0;
    if (!event_find(s, msg->event)) {
        snprintf(why, PROTO_TEXT_MAX, "event: %u is not registered", msg->event);
        return SAGE_EHANDLE;
    }
    if (s->n_pledged >= EVENTS_MAX) {
        snprintf(why, PROTO_TEXT_MAX, "event: %d jobs are not WAITED for, which is the limit",
                 EVENTS_MAX);
        return SAGE_EBUSY;
    }
    return 0;
}

/* On a stream of a device's: where there are none it is the client's word only. */
static bool is_streamed(const struct session *s, const struct msg_submit *msg)
{
    return msg->streamed && s->daemon->backend->modes & MODE_LANES;
}

static int check(struct session *s, const struct msg_submit *msg, char *why)
{
    struct sage_attn attn = msg->attn;
    int rc;

    if (s->daemon->draining) {
        snprintf(why, PROTO_TEXT_MAX, "the daemon is shutting down");
        return SAGE_EDRAIN;
    }
    /* A job in a slot may have been released without our knowing yet: its credit is used again. */
    if (s->n_jobs - s->n_running >= s->daemon->config.client_jobs) {
        snprintf(why, PROTO_TEXT_MAX, "%u jobs in flight, the limit is %llu", s->n_jobs,
                 (unsigned long long)s->daemon->config.client_jobs);
        return SAGE_EBUSY;
    }
    /* One of a stream nobody could submit again: those are as many as clients have credits. */
    if (!is_streamed(s, msg) && s->user->n_jobs >= s->daemon->config.user_jobs) {
        snprintf(why, PROTO_TEXT_MAX, "%u jobs of this user in flight, the limit is %llu",
                 s->user->n_jobs, (unsigned long long)s->daemon->config.user_jobs);
        return SAGE_EBUSY;
    }
    for (int i = 0; i < JOB_TENSORS; i++)
        tensor_of(&attn, i)->data = NULL;
    const struct daemon *d = s->daemon;
    rc = sage_attn_check(&attn, why, PROTO_TEXT_MAX);
    if (!rc && d->backend->supports)
        rc = d->backend->supports(d->device, &attn, why);
    if (!rc)
        rc = check_event(s, msg, why);
    return rc ? rc : check_workspace(d, &attn, why);
}

static struct job *job_create(struct session *s, const struct msg_submit *msg)
{
    size_t n = msg->n_q_offsets;
    struct job *job = take_spare(s->daemon, 2 * n);

    if (!job)
        return NULL;
    job->session = s;
    job->lane = msg->lane;
    job->number = msg->number;
    job->prompt = msg->prompt;
    job->attn = msg->attn;
    job->event = msg->event ? event_find(s, msg->event) : NULL;
    job->by_event = job->event;
    if (n) {
        int32_t *offsets = job->offsets;
        memcpy(offsets, msg->q_offsets, n * sizeof(int32_t));
        memcpy(offsets + n, msg->k_offsets, n * sizeof(int32_t));
        job->attn.q_offsets = offsets;
        job->attn.k_offsets = offsets + n;
    }
    return job;
}

static void accept_job(struct session *s, struct job *job, bool streamed)
{
    job->groups = sage_attn_groups(&job->attn);
    job->ops = sage_attn_ops(&job->attn, NULL);
    for (int i = 0; i < JOB_TENSORS; i++)
        if (job->buffers[i])
            buffer_ref(job->buffers[i]);
    TAILQ_INSERT_TAIL(&s->lanes[job->lane].jobs, job, lane_link);
    if (s->n_jobs++ == 0)
        watch_rested(s);
    s->user->n_jobs++;
    s->n_pledged += job->by_event;
    s->mode = streamed ? "lane" : job->by_event ? "event" : s->daemon->backend->client_mode;
    s->daemon->stats.accepted++;
    sched_lane(s, job->lane);
}

bool job_submit(struct session *s, const struct msg_submit *msg, char *why)
{
    enum taken taken = take_number(s, msg->lane, msg->number, why);

    if (taken != TAKEN)
        return taken == DUPLICATE;
    /* For the next daemon: nobody could try again. */
    if (s->daemon->draining && is_streamed(s, msg))
        return true;
    int rc = check(s, msg, why);
    struct job *job = rc ? NULL : job_create(s, msg);
    if (!rc && !job) {
        snprintf(why, PROTO_TEXT_MAX, "out of memory");
        rc = SAGE_ENOMEM;
    }
    if (!rc)
        rc = bind_tensors(s, job, why);
    if (!rc) {
        /* Its word alone; but staged is only what lies in memory that is mapped here. */
        s->daemon->stats.staged_bytes +=
            msg->staged < s->mapped_bytes ? msg->staged : s->mapped_bytes;
        accept_job(s, job, is_streamed(s, msg));
        return true;
    }
    if (job)
        put_spare(s->daemon, job);
    refuse(s, msg->lane, msg->number, rc, why);
    return true;
}

/* --- inputs, and who waits for outputs --- */

int job_is_ready(const struct job *job)
{
    const struct daemon *d = job->session->daemon;
    const uint32_t *acquire = job->session->page->lane[job->lane].acquire;

    if (!page_reached(page_load(&acquire[job->number % SAGE_ENTRIES]), job->number))
        return 0;
    return job->event ? d->backend->event_done(d->device, job->event->opened) : 1;
}

void job_launched(struct job *job, struct stream *stream)
{
    struct msg_launched msg = {
        .lane = job->lane, .number = job->number, .n_handle = PROTO_HANDLE_MAX};
    struct session *s = job->session;

    if (s->daemon->backend->event_record(stream, &msg.event, msg.handle))
        return;            /* its release tells */
    job->by_event = false; /* the pledge goes with WAITED from now on */
    s->launched[s->n_launched++] = msg.event;
    session_send(s, OP_LAUNCHED, 0, MSG_LAUNCHED, &msg);
}

bool job_waited(struct session *s, uint32_t event)
{
    const struct daemon *d = s->daemon;

    for (unsigned i = 0; i < s->n_launched; i++) {
        if (s->launched[i] != event)
            continue;
        s->launched[i] = s->launched[--s->n_launched];
        s->n_pledged--;
        d->backend->event_put(d->device, event);
        return true;
    }
    return false;
}

void job_put_events(struct session *s)
{
    while (s->n_launched)
        job_waited(s, s->launched[0]);
}

/* --- pieces --- */

static void estimate(struct job *job, const struct backend *backend, double ns_per_op)
{
    const struct sage_part *part = &job->piece.part;
    double share = job->groups ? (double)part->n_groups / (double)job->groups : 1;
    double memory_ns = job->bytes * share * backend->ns_per_byte;
    double heads = (double)part->n_groups * (double)sage_part_heads(&job->attn, part);

    job->piece_ops = job->groups ? sage_attn_ops(&job->attn, part) : 0;
    job->piece_est_ns = job->piece_ops * ns_per_op;
    if (job->piece_est_ns < memory_ns)
        job->piece_est_ns = memory_ns;
    job->piece_est_ns += heads * (double)job->attn.q.shape[3] * backend->ns_per_channel;
    job->piece_est_ns += backend->ns_per_piece;
}

/* Its next piece goes on with a group, whose K and V are in its slot while it keeps that. */
static bool is_within_group(const struct job *job)
{
    return job->row || job->head;
}

static int64_t group_rows(const struct job *job)
{
    return sage_attn_seq(&job->attn, job->group / job->attn.k.shape[1]).nq;
}

enum { BLOCK_ROWS = 128 }; /* whole blocks of the kernels */

/*
 * One group is too long, by the estimate for all of it: about a quantum of its query rows, in whole
 * blocks; where one block of all query heads is too long already, of some of the heads.
 */
static void cut_group(struct job *job, const struct backend *backend, double quantum_ns,
                      double ns_per_op, bool prepared)
{
    struct sage_part *part = &job->piece.part;
    int64_t all = group_rows(job), left = all - job->row, gqa = sage_part_heads(&job->attn, part);
    double share = quantum_ns / job->piece_est_ns;

    if (all == 0) /* of an empty sequence nothing is computed */
        return;
    /* With a share above 1/2 two halves would only cost a launch more. */
    int64_t rows =
        share > 0.5 ? left : ((int64_t)((double)all * share) / BLOCK_ROWS + 1) * BLOCK_ROWS;
    double block_share = share * (double)all / (double)(all < BLOCK_ROWS ? all : BLOCK_ROWS);
    int64_t heads = block_share > 0.5 ? gqa : (int64_t)((double)gqa * block_share) + 1;

    if (job->head)
        rows = job->block_rows;
    if (rows > left)
        rows = left;
    if (heads > gqa - job->head)
        heads = gqa - job->head;
    if (rows == all && heads == gqa)
        return;
    job->holds = true;
    job->block_rows = rows;
    part->row = job->row;
    part->n_rows = rows;
    part->head = job->head;
    part->n_heads = heads;
    part->prepared = prepared;
    estimate(job, backend, ns_per_op);
}

void job_next_piece(struct job *job, const struct backend *backend, double quantum_ns,
                    size_t workspace, double ns_per_op, bool prepared)
{
    const struct session *s = job->session;
    struct sage_part *part = &job->piece.part;
    int64_t left = is_within_group(job) ? 1 : job->groups - job->group;

    *part = (struct sage_part){.group = job->group, .n_groups = left, .n_rows = -1};
    estimate(job, backend, ns_per_op);
    while (part->n_groups > 1 && (job->piece_est_ns > 1.5 * quantum_ns ||
                                  backend->workspace(&job->attn, part) > workspace)) {
        /* Of equal length: the next job of this kind is cut at the same places. */
        double pieces = fmax(round(job->piece_est_ns / quantum_ns), 2);
        part->n_groups = (int64_t)ceil((double)part->n_groups / pieces);
        estimate(job, backend, ns_per_op);
    }
    job->holds = is_within_group(job);
    if (part->n_groups == 1 && (job->holds || job->piece_est_ns > 1.5 * quantum_ns))
        cut_group(job, backend, quantum_ns, ns_per_op, prepared);
    job->piece.attn = &job->attn;
    job->piece.number = job->number;
    job->piece.lane = job_is_last_piece(job) && !job->dropped ? &s->page->lane[job->lane] : NULL;
    job->piece.remote = job->piece.lane && s->remote ? &s->remote->lane[job->lane] : NULL;
    job->piece.wait_ns = 0;
    job->piece.missed = false;
    job->piece.ready_ns = job->piece.start_ns = job->piece.end_ns = 0;
    job->piece.done = 0;
    job->made = true;
}

/* Does a piece end the rows and heads of its (last) group? */
static bool ends_heads(const struct job *job)
{
    const struct sage_part *part = &job->piece.part;

    return part->n_heads == 0 ||
           part->head + part->n_heads == job->attn.q.shape[1] / job->attn.k.shape[1];
}

static bool ends_rows(const struct job *job)
{
    const struct sage_part *part = &job->piece.part;

    return part->n_rows < 0 || part->row + part->n_rows == group_rows(job);
}

bool job_is_last_piece(const struct job *job)
{
    const struct sage_part *part = &job->piece.part;

    return part->group + part->n_groups == job->groups && ends_rows(job) && ends_heads(job);
}

void job_advance(struct job *job)
{
    const struct sage_part *part = &job->piece.part;

    job->made = false;
    if (!ends_heads(job)) {
        job->head = part->head + part->n_heads;
        return;
    }
    job->head = 0;
    if (!ends_rows(job)) {
        job->row = part->row + part->n_rows;
        return;
    }
    job->row = 0;
    job->group += part->n_groups;
}

/* --- the end --- */

static void job_free(struct job *job)
{
    struct session *s = job->session;
    struct lane *lane = &s->lanes[job->lane];

    for (int i = 0; i < JOB_TENSORS; i++)
        if (job->buffers[i])
            buffer_unref(job->buffers[i]);
    TAILQ_REMOVE(&lane->jobs, job, lane_link);
    if (--s->n_jobs == 0)
        watch_rest(s);
    s->user->n_jobs--;
    s->n_pledged -= job->by_event;
    uint32_t lane_index = job->lane;
    put_spare(s->daemon, job);
    if (s->closing)
        session_free_if_unused(s);
    else
        sched_lane(s, lane_index);
}

static void count(struct job *job, int status)
{
    struct session *s = job->session;
    struct stats *stats = &s->daemon->stats;
    char name[PROTO_NAME_MAX];

    s->run_ns += job->run_ns;
    stats->run_ns += job->run_ns;
    if (job->dropped && !job_is_last_piece(job)) { /* otherwise its client had it before it left */
        stats->dropped++;
        return;
    }
    if (status) {
        s->failed++;
        stats->failed++;
        return;
    }
    s->done++;
    stats->done++;
    s->ops += job->ops;
    stats->ops += job->ops;
    hist_add(&stats->queue, job->start_ns - job->ready_ns);
    hist_fade(&s->queue, QUEUE_RECENT);
    hist_add(&s->queue, job->start_ns - job->ready_ns);
    hist_add(&stats->run, job->run_ns);
    hist_add(&stats->total, job->piece.end_ns - job->ready_ns);
    backend_kernel_name(s->daemon->backend, &job->attn, name);
    stats_kernel(stats, name, job->ops, job->run_ns);
}

void job_over(struct job *job, int status)
{
    struct msg_done_job report = {
        .lane = job->lane,
        .number = job->number,
        .status = (uint32_t)-status,
        .queue_ns = job->start_ns - job->ready_ns,
        .run_ns = job->run_ns,
    };

    count(job, status);
    if (status)
        snprintf(report.text, sizeof(report.text), "%s", sage_strerror(status));
    bool dropped = job->dropped, prompt = job->prompt;
    struct session *s = job->session;
    job_free(job);
    if (!dropped) /* it was connected, so it is still there; this may close it */
        session_report(s, &report, prompt);
}

void job_drop(struct job *job)
{
    job->session->daemon->stats.dropped++;
    sched_forget(job);
    job_free(job);
}

/* Over before it ran: release and report it. Frees it; this may close the session, too. */
static void end_waiting(struct job *job, int status, const char *text)
{
    struct msg_done_job report = {
        .lane = job->lane, .number = job->number, .status = (uint32_t)-status};
    struct session *s = job->session;

    snprintf(report.text, sizeof(report.text), "%s", text);
    page_release(&s->page->lane[job->lane], job->number, status);
    sched_forget(job);
    job_free(job);
    session_report(s, &report, true);
}

void job_fail(struct job *job, int status, const char *text)
{
    job->session->failed++;
    job->session->daemon->stats.failed++;
    end_waiting(job, status, text);
}

void job_end_canceled(struct job *job)
{
    job->session->daemon->stats.canceled++;
    end_waiting(job, SAGE_ECANCELED, sage_strerror(SAGE_ECANCELED));
}

bool job_cancel(struct session *s, uint32_t lane, uint32_t number)
{
    struct job *job;

    if (!s->page || lane >= SAGE_LANES)
        return false;
    TAILQ_FOREACH(job, &s->lanes[lane].jobs, lane_link)
        if (job->number == number)
            break;
    if (job && job->state == JOB_RUNNING && job->piece.wait_ns)
        job->unwanted = true;
    if (!job || job->started)
        return false;
    job_end_canceled(job);
    return true;
}
