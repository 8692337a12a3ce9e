/*
 * watch.c - polling of acquire words and events.
 */
#include "daemon/watch.h"

#include <errno.h>
#include <sched.h>
#include <sys/timerfd.h>
#include <unistd.h>

#include "daemon/daemon.h"

enum {
    /*
     * A client that waits for a job and submits the next one is back sooner; see docs/decisions.md.
     */
    HOT_NS = 100 * 1000,
    SCAN_MAX = 512,           /* words looked at in one turn */
    EVENTS_TURN = 64,         /* events asked for in one turn: about 1 us each */
    DELAY_MIN_NS = 50 * 1000, /* about what a wake-up costs */
    DELAY_MAX_NS = 2000 * 1000,
    MARGIN_MIN_NS = 100 * 1000,
    MARGIN_MAX_NS = 250 * 1000,
    REST_MAX_NS = 100 * 1000 * 1000, /* after longer ones half a millisecond is not worth it */
};

static void on_hot(uv_idle_t *handle)
{
    (void)handle;  /* watch_turn() does the work: this only keeps the loop turning, */
    sched_yield(); /* and lets others have the core meanwhile */
}

static void on_timer(uv_poll_t *handle, int status, int events)
{
    struct watch *w = handle->data;
    uint64_t expirations;
    (void)status, (void)events;

    if (read(w->timer_fd, &expirations, sizeof(expirations)) < 0)
        return; /* somebody re-armed it meanwhile */
}

int watch_init(struct daemon *d)
{
    struct watch *w = &d->watch;

    TAILQ_INIT(&w->jobs);
    TAILQ_INIT(&w->resting);
    w->timer_fd = timerfd_create(CLOCK_MONOTONIC, TFD_CLOEXEC | TFD_NONBLOCK);
    if (w->timer_fd < 0)
        return -errno;
    uv_idle_init(&d->loop, &w->hot);
    uv_poll_init(&d->loop, &w->timer, w->timer_fd);
    w->timer.data = w;
    return uv_poll_start(&w->timer, UV_READABLE, on_timer);
}

void watch_finish(struct daemon *d)
{
    close(d->watch.timer_fd);
}

void watch_add(struct daemon *d, struct job *job)
{
    job->watched = true;
    job->watched_ns = daemon_now();
    TAILQ_INSERT_TAIL(&d->watch.jobs, job, watch_link);
    watch_again(d); /* this turn's watch_turn() may be over */
}

void watch_remove(struct daemon *d, struct job *job)
{
    job->watched = false;
    TAILQ_REMOVE(&d->watch.jobs, job, watch_link);
}

static void stop_resting(struct session *s)
{
    if (!s->resting)
        return;
    s->resting = false;
    TAILQ_REMOVE(&s->daemon->watch.resting, s, rest_link);
}

void watch_rest(struct session *s)
{
    s->rest_since_ns = daemon_now();
    if (s->closing || !s->rest_ns || s->rest_ns > REST_MAX_NS)
        return;
    s->resting = true;
    TAILQ_INSERT_TAIL(&s->daemon->watch.resting, s, rest_link);
}

void watch_rested(struct session *s)
{
    if (s->rest_since_ns)
        s->rest_ns = daemon_now() - s->rest_since_ns;
    stop_resting(s);
}

void watch_stir(struct daemon *d)
{
    d->watch.hot_until_ns = daemon_now() + HOT_NS;
}

void watch_again(struct daemon *d)
{
    watch_stir(d);
    uv_idle_start(&d->watch.hot, on_hot);
}

static void sleep_for(struct watch *w, uint64_t ns)
{
    struct itimerspec when = {.it_value = {.tv_nsec = (long)ns}};

    timerfd_settime(w->timer_fd, 0, &when, NULL);
}

static uint64_t clamp(uint64_t x, uint64_t least, uint64_t most)
{
    return x < least ? least : x < most ? x : most;
}

/*
 * What took `gap` the last time has lasted for `age` now: it should end in so many ns, 0 where that
 * may be any moment; UINT64_MAX: it takes longer this time.
 */
static uint64_t due_in(uint64_t age, uint64_t gap)
{
    uint64_t margin = clamp(gap / 16, MARGIN_MIN_NS, MARGIN_MAX_NS);

    if (age > gap + margin)
        return UINT64_MAX;
    return age + margin >= gap ? 0 : gap - margin - age;
}

/*
 * When to look at it again. A stream takes about as long from one job to the next as it took the
 * last time: all the time around then, and otherwise so that it is late by a sixteenth at most.
 */
static uint64_t look_in(const struct job *job, uint64_t now)
{
    uint64_t age = now - job->watched_ns;
    uint64_t delay = clamp(age / 16, DELAY_MIN_NS, DELAY_MAX_NS);
    uint64_t due = due_in(age, job->session->lanes[job->lane].gap_ns);

    return due < delay ? due : delay;
}

/* When the next job of a session that has none should come; UINT64_MAX: nobody knows. */
static uint64_t scan_resting(struct watch *w, uint64_t now)
{
    struct session *s, *next;
    uint64_t least = UINT64_MAX;

    for (s = TAILQ_FIRST(&w->resting); s; s = next) {
        next = TAILQ_NEXT(s, rest_link);
        uint64_t age = now > s->rest_since_ns ? now - s->rest_since_ns : 0;
        uint64_t due = due_in(age, s->rest_ns);
        if (due == UINT64_MAX)
            stop_resting(s);
        least = due < least ? due : least;
    }
    return least;
}

/* When to look at it again; UINT64_MAX: it is not watched any more. */
static uint64_t scan_job(struct daemon *d, struct job *job, uint64_t now)
{
    struct watch *w = &d->watch;
    int ready = job_is_ready(job);

    if (ready == 0) {
        TAILQ_REMOVE(&w->jobs, job, watch_link);
        TAILQ_INSERT_TAIL(&w->jobs, job, watch_link);
        return look_in(job, now);
    }
    watch_stir(d);
    if (ready == SAGE_EDEVICE) {
        daemon_lose(d, "found by asking for an event");
    } else if (ready < 0) {
        job_fail(job, ready, "event: cannot be asked for, or what it is behind has failed");
    } else {
        job->session->lanes[job->lane].gap_ns = now - job->watched_ns;
        watch_remove(d, job);
        sched_ready(job);
    }
    return UINT64_MAX;
}

/*
 * The first SCAN_MAX jobs; those that have to wait on go to the end. When to do it again;
 * UINT64_MAX: when there are others.
 */
static uint64_t scan(struct daemon *d, uint64_t now)
{
    struct watch *w = &d->watch;
    const struct job *last = TAILQ_LAST(&w->jobs, watched); /* only compared: it may be freed */
    struct job *job;
    uint64_t least = UINT64_MAX;
    int events = 0;

    for (int i = 0; i < SCAN_MAX && (job = TAILQ_FIRST(&w->jobs)); i++) {
        bool is_last = job == last;
        events += job->event != NULL;
        if (events > EVENTS_TURN || d->device_lost)
            return least < DELAY_MIN_NS ? least : DELAY_MIN_NS;
        uint64_t wait = scan_job(d, job, now);
        least = wait < least ? wait : least;
        if (is_last)
            break;
    }
    return least;
}

/*
 * The loop has slept and stays awake now, since something is to start soon: what a piece that is
 * about to end makes room for, a job whose inputs are about to be ready, or one that a packet
 * brings or is about to. What is ready already is launched just as soon.
 */
static void warm(struct daemon *d, bool expected)
{
    bool brought = d->sched.n_active == 0 && !TAILQ_EMPTY(&d->watch.jobs);

    if (d->backend->warm && (expected || brought))
        d->backend->warm(d->device, sched_slots_used(d) > 0);
}

void watch_turn(struct daemon *d)
{
    struct watch *w = &d->watch;
    uint64_t now = daemon_now(), wait = scan(d, now), piece = sched_look_in(d, now);
    uint64_t packet = scan_resting(w, now);

    wait = piece < wait ? piece : wait;
    wait = packet < wait ? packet : wait;
    if (now < w->hot_until_ns || wait == 0) {
        if (!w->awake && !d->device_lost)
            warm(d, piece == 0 || packet == 0);
        w->awake = true;
        uv_idle_start(&w->hot, on_hot);
        return;
    }
    w->awake = false;
    uv_idle_stop(&w->hot);
    if (wait != UINT64_MAX)
        sleep_for(w, wait);
}
