/*
 * daemon.c - the parts put together: turns of the loop, ticks, warm-up, drain.
 */
#include "daemon/daemon.h"

#include <sched.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/random.h>
#include <time.h>

#include "daemon/discard.h"
#include "daemon/log.h"
#include "kernels/problem.h"

enum {
    TICK_MS = 500,
    IDLE_TICK_MS = 1000, /* while nobody is connected: half of what the loop then costs */
    COMPLAINTS_MAX = 10, /* logged in a tick */
    VISITS_MAX = 100,
    /* of warm-up jobs */
    HEADS = 2,
    TOKENS = 128,
};

uint64_t daemon_now(void)
{
    struct timespec t;

    clock_gettime(CLOCK_MONOTONIC, &t);
    return (uint64_t)t.tv_sec * 1000000000 + (uint64_t)t.tv_nsec;
}

/* --- turns and ticks --- */

static void close_sessions(struct daemon *d, const char *reason)
{
    while (!TAILQ_EMPTY(&d->sessions))
        session_close(TAILQ_FIRST(&d->sessions), reason);
}

/* Jobs whose inputs are not ready stay unreleased: their clients hand them to the next daemon. */
static bool is_drained(const struct daemon *d)
{
    return d->draining && d->sched.n_active == 0 && sched_slots_used(d) == 0;
}

static void on_report(uv_timer_t *timer)
{
    struct daemon *d = timer->data;

    while (!TAILQ_EMPTY(&d->flushing))
        session_flush(TAILQ_FIRST(&d->flushing));
}

/* A report wakes a thread of the client: one for many jobs, unless somebody waits for it. */
static void flush_reports(struct daemon *d)
{
    struct session *s, *next;

    for (s = TAILQ_FIRST(&d->flushing); s; s = next) {
        next = TAILQ_NEXT(s, flush_link);
        if (s->prompt || d->draining)
            session_flush(s);
    }
    if (!TAILQ_EMPTY(&d->flushing) && !uv_is_active((uv_handle_t *)&d->report))
        uv_timer_start(&d->report, on_report, DONE_DELAY_MS, 0);
}

static void on_turn(uv_check_t *handle)
{
    struct daemon *d = handle->data;

    d->heard_ns = 0; /* the next packets are of the next turn */
    sched_reap(d);
    watch_turn(d);
    if (!d->device_lost)
        sched_dispatch(d);
    if (d->device_lost) { /* nothing is released or reported: the next daemon will do it all */
        uv_stop(&d->loop);
        return;
    }
    flush_reports(d);
    if (is_drained(d)) {
        if (!d->drained && d->on_drained)
            d->on_drained(d);
        d->drained = true;
        close_sessions(d, "drained");
        if (d->n_live == 0)
            uv_stop(&d->loop);
    }
}

static void on_completed(uv_async_t *handle)
{
    (void)handle; /* on_turn() looks */
}

static void notify(void *arg)
{
    struct daemon *d = arg;

    uv_async_send(&d->completed);
}

void daemon_lose(struct daemon *d, const char *why)
{
    char text[PROTO_TEXT_MAX];

    if (d->device_lost)
        return;
    d->device_lost = true;
    d->exit_code = EXIT_DEVICE_LOST;
    bool told = d->backend->is_lost && d->backend->is_lost(d->device, text);
    snprintf(d->lost_why, sizeof(d->lost_why), "%s", told ? text : why);
    log_error("device_lost", "backend=%s reason=\"%s\"", d->backend->name, d->lost_why);
}

bool daemon_may_complain(struct daemon *d)
{
    return d->complaints++ < COMPLAINTS_MAX;
}

bool daemon_may_tell_visit(struct daemon *d)
{
    return d->visits++ < VISITS_MAX;
}

static void drop_overdue(struct daemon *d, uint64_t now)
{
    struct session *s, *next;

    for (s = TAILQ_FIRST(&d->sessions); s; s = next) {
        next = TAILQ_NEXT(s, link);
        const char *why = session_overdue(s, now);
        if (!why)
            continue;
        d->stats.clients_dropped++;
        session_close(s, why);
    }
}

static void on_tick(uv_timer_t *timer)
{
    struct daemon *d = timer->data;
    uint64_t now = daemon_now(), passed = now - d->last_tick_ns;
    char why[PROTO_TEXT_MAX];

    d->last_tick_ns = now;
    d->awake_ns += passed < 2 * TICK_MS * 1000000ull ? passed : TICK_MS * 1000000ull;
    if (d->complaints > COMPLAINTS_MAX)
        log_warning("quiet", "complaints_not_logged=%u", d->complaints - COMPLAINTS_MAX);
    if (d->visits > VISITS_MAX)
        log_warning("quiet", "visits_not_logged=%u", d->visits - VISITS_MAX);
    d->complaints = d->visits = 0;
    drop_overdue(d, now);
    discard_tick();
    if (sched_is_hung(d, why) || (d->backend->is_lost && d->backend->is_lost(d->device, why))) {
        daemon_lose(d, why);
        notify(d); /* on_turn() ends it, and does not sleep first */
        return;
    }
    if (d->on_tick)
        d->on_tick(d);
    uv_timer_start(timer, on_tick, d->n_live ? TICK_MS : IDLE_TICK_MS, 0);
}

void daemon_drain(struct daemon *d)
{
    if (d->draining)
        return;
    d->draining = true;
    log_notice("draining", "clients=%u slots_used=%u", d->n_sessions, sched_slots_used(d));
    if (d->on_drain)
        d->on_drain(d);
    notify(d); /* one more turn, even if nothing else happens */
}

/* --- warm-up --- */

static int run_and_wait(struct daemon *d, struct stream *stream, const struct sage_attn *attn)
{
    struct piece piece = {
        .attn = attn,
        .part = {.n_groups = sage_attn_groups(attn), .n_rows = -1},
        .launch_ns = daemon_now(),
    };

    d->backend->start(stream, &piece);
    while (!__atomic_load_n(&piece.done, __ATOMIC_ACQUIRE)) {
        if (d->backend->poll)
            d->backend->poll(stream);
        sched_yield();
    }
    return piece.status;
}

/* Problems of one shape for which there may be different kernels. */
enum form { PLAIN, SEQUENCES, MASKED, UNALIGNED, FORMS };

/* In `memory`, all of it zero, or at no address yet (NULL). */
static struct sage_attn warm_up_problem(enum form form, enum sage_variant variant,
                                        enum sage_dtype dtype, int64_t dim, uint16_t *memory)
{
    static const int32_t offsets[] = {0, TOKENS / 2, TOKENS};
    const int64_t elements = HEADS * TOKENS * dim;
    struct sage_attn attn = SAGE_ATTN_INIT;
    struct sage_tensor *const tensors[] = {&attn.q, &attn.k, &attn.v, &attn.o};

    attn.variant = variant;
    for (int i = 0; i < 4; i++)
        *tensors[i] = (struct sage_tensor){
            .dtype = dtype,
            .data = memory ? memory + i * elements : NULL,
            .shape = {1, HEADS, TOKENS, dim},
            .stride = {elements, TOKENS * dim, dim, 1},
        };
    if (form == SEQUENCES) {
        attn.n_seqs = 2;
        attn.q_offsets = attn.k_offsets = offsets;
    }
    if (form == UNALIGNED && memory)
        attn.v.data = memory + 2 * elements - 1;
    if (form == MASKED) /* zeros that are added; those of q are as good as any */
        attn.mask = (struct sage_tensor){
            .dtype = dtype, .data = memory, .shape = {1, 1, 1, TOKENS}, .stride = {0, 0, 0, 1}};
    return attn;
}

/*
 * One small job of a kind on every slot: what is loaded late or cannot run is known before READY.
 */
static int warm_up_kind(struct daemon *d, enum sage_variant variant, enum sage_dtype dtype,
                        int64_t dim, char *why)
{
    struct sage_attn attn = warm_up_problem(PLAIN, variant, dtype, dim, NULL);

    if (d->backend->supports && d->backend->supports(d->device, &attn, why))
        return 0;
    uint16_t *memory =
        d->backend->memory_get(d->device, 4 * HEADS * TOKENS * (size_t)dim * sizeof(*memory));
    int rc = memory ? 0 : SAGE_ENOMEM;
    for (enum form form = PLAIN; !rc && form < (d->backend->forms ? FORMS : 1); form++) {
        attn = warm_up_problem(form, variant, dtype, dim, memory);
        if ((form != PLAIN || dim > 64) && d->backend->workspace(&attn, NULL) > d->sched.workspace)
            continue; /* nor will a client's fit */
        for (unsigned i = 0; !rc && i < d->sched.n_slots; i++)
            rc = run_and_wait(d, d->sched.slots[i].stream, &attn);
    }
    if (memory)
        d->backend->memory_put(d->device, memory);
    snprintf(why, PROTO_TEXT_MAX, "warm-up of %s %s d%d: %s", sage_variant_name(variant),
             sage_dtype_name(dtype), (int)dim, sage_strerror(rc));
    return rc;
}

static int warm_up(struct daemon *d, char *why)
{
    static const int64_t dims[] = {64, 96, 128, 192, SAGE_MAX_HEAD_DIM}; /* as many kernels */
    static const struct {
        enum sage_variant variant;
        enum sage_dtype dtype;
    } kinds[] = {
        {SAGE_INT8_FP16, SAGE_F16},
        {SAGE_INT8_FP16, SAGE_BF16},
        {SAGE_INT8_FP8, SAGE_F16},
        {SAGE_INT8_FP8, SAGE_BF16},
    };

    for (size_t i = 0; i < sizeof(kinds) / sizeof(kinds[0]); i++) {
        for (size_t j = 0; j < sizeof(dims) / sizeof(dims[0]); j++) {
            int rc = warm_up_kind(d, kinds[i].variant, kinds[i].dtype, dims[j], why);
            if (rc)
                return rc;
        }
    }
    return 0;
}

/* --- life --- */

static int open_device(struct daemon *d, char *why)
{
    int rc;

    d->backend = backend_find(d->config.backend, why);
    if (!d->backend)
        return SAGE_EINVAL;
    snprintf(why, PROTO_TEXT_MAX, "backend %s: cannot be opened", d->backend->name);
    rc = d->backend->open(&d->device, &d->config, notify, d, why);
    if (rc)
        return rc;
    d->backend->describe(d->device, d->device_name, d->device_uuid);
    d->backend->defaults(d->device, &d->config);
    rc = sched_init(d, why);
    if (rc)
        goto err_device;
    rc = warm_up(d, why);
    if (rc)
        goto err_sched;
    return 0;

err_sched:
    sched_finish(d);
err_device:
    d->backend->close(d->device);
    return rc;
}

static void start_handles(struct daemon *d)
{
    uv_check_init(&d->loop, &d->turn);
    d->turn.data = d;
    uv_check_start(&d->turn, on_turn);
    uv_timer_init(&d->loop, &d->tick);
    d->tick.data = d;
    uv_timer_start(&d->tick, on_tick, IDLE_TICK_MS, 0);
    uv_timer_init(&d->loop, &d->report);
    d->report.data = d;
}

static void close_handle(uv_handle_t *handle, void *arg)
{
    (void)arg;
    if (!uv_is_closing(handle))
        uv_close(handle, NULL);
}

static void close_loop(struct daemon *d)
{
    uv_walk(&d->loop, close_handle, NULL);
    uv_run(&d->loop, UV_RUN_DEFAULT);
    uv_loop_close(&d->loop);
}

int daemon_init(struct daemon *d, const struct config *config, char *why)
{
    int rc;

    memset(d, 0, sizeof(*d));
    d->config = *config;
    d->next_session = 1;
    TAILQ_INIT(&d->sessions);
    TAILQ_INIT(&d->closing);
    TAILQ_INIT(&d->flushing);
    TAILQ_INIT(&d->users);
    TAILQ_INIT(&d->spare);
    d->stats.started_ns = daemon_now();
    snprintf(why, PROTO_TEXT_MAX, "out of memory or descriptors");
    if (getrandom(&d->boot, sizeof(d->boot), 0) != sizeof(d->boot))
        return SAGE_EINTERNAL;
    if (uv_loop_init(&d->loop) < 0)
        return SAGE_ENOMEM;
    d->unpacker = unpacker_create();
    rc = d->unpacker && uv_async_init(&d->loop, &d->completed, on_completed) == 0 ? 0 : SAGE_ENOMEM;
    if (!rc)
        rc = job_reserve(d, config->client_jobs);
    if (!rc)
        rc = open_device(d, why);
    if (!rc && watch_init(d) < 0) {
        sched_finish(d);
        d->backend->close(d->device);
        rc = SAGE_ENOMEM;
    }
    if (rc) {
        close_loop(d);
        unpacker_destroy(d->unpacker);
        job_free_spare(d);
        return rc;
    }
    start_handles(d);
    d->idle_since_ns = d->last_tick_ns = daemon_now(); /* opening may have taken long */
    return 0;
}

void daemon_finish(struct daemon *d)
{
    close_sessions(d, "daemon ends");
    while (d->n_live) /* buffers are being closed, pieces are running */
        uv_run(&d->loop, UV_RUN_ONCE);
    sched_finish(d); /* joins the streams, which use the loop's async */
    close_loop(d);
    watch_finish(d);
    d->backend->close(d->device);
    unpacker_destroy(d->unpacker);
    job_free_spare(d);
}

void daemon_stats(const struct daemon *d, struct msg_stats *msg)
{
    const struct session *s;

    stats_fill(&d->stats, daemon_now(), msg);
    TAILQ_FOREACH(s, &d->sessions, link) {
        msg->queued += s->n_jobs - s->n_running;
        msg->buffers += s->n_buffers;
        msg->mapped_bytes += s->mapped_bytes;
    }
    for (unsigned i = 0; i < d->sched.n_slots; i++)
        msg->running += d->sched.slots[i].n;
    msg->clients = d->n_sessions;
    msg->slots = d->sched.n_slots;
    msg->slots_used = sched_slots_used(d);
    msg->slot_bytes = d->sched.workspace;
    snprintf(msg->state, sizeof(msg->state), "%s", d->draining ? "draining" : "running");
}
