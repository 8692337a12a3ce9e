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
    DELAY_MAX_NS = 1000 * 1000,
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
    TAILQ_INSERT_TAIL(&d->watch.jobs, job, watch_link);
    watch_again(d); /* this turn's watch_turn() may be over */
}

void watch_remove(struct daemon *d, struct job *job)
{
    job->watched = false;
    TAILQ_REMOVE(&d->watch.jobs, job, watch_link);
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

static void scan_job(struct daemon *d, struct job *job)
{
    struct watch *w = &d->watch;
    int ready = job_is_ready(job);

    if (ready == 0) {
        TAILQ_REMOVE(&w->jobs, job, watch_link);
        TAILQ_INSERT_TAIL(&w->jobs, job, watch_link);
        return;
    }
    watch_stir(d);
    if (ready == SAGE_EDEVICE) {
        daemon_lose(d, "found by asking for an event");
    } else if (ready < 0) {
        job_fail(job, ready, "event: cannot be asked for, or what it is behind has failed");
    } else {
        watch_remove(d, job);
        sched_ready(job);
    }
}

/* The first SCAN_MAX jobs; those that have to wait on go to the end. */
static void scan(struct daemon *d)
{
    struct watch *w = &d->watch;
    const struct job *last = TAILQ_LAST(&w->jobs, watched); /* only compared: it may be freed */
    struct job *job;
    int events = 0;

    for (int i = 0; i < SCAN_MAX && (job = TAILQ_FIRST(&w->jobs)); i++) {
        bool is_last = job == last;
        events += job->event != NULL;
        if (events > EVENTS_TURN || d->device_lost)
            return;
        scan_job(d, job);
        if (is_last)
            return;
    }
}

/* Between two looks when nothing has come for so long: what is seen is late by a sixteenth. */
static uint64_t delay_after(uint64_t quiet_ns)
{
    uint64_t delay = quiet_ns / 16;

    return delay < DELAY_MIN_NS ? DELAY_MIN_NS : delay < DELAY_MAX_NS ? delay : DELAY_MAX_NS;
}

void watch_turn(struct daemon *d)
{
    struct watch *w = &d->watch;

    scan(d);
    uint64_t now = daemon_now(), wait = sched_look_in(d, now);
    if (now < w->hot_until_ns || wait == 0) {
        uv_idle_start(&w->hot, on_hot);
        return;
    }
    uv_idle_stop(&w->hot);
    if (!TAILQ_EMPTY(&w->jobs)) {
        uint64_t delay = delay_after(now - w->hot_until_ns);
        wait = wait < delay ? wait : delay;
    }
    if (wait != UINT64_MAX)
        sleep_for(w, wait);
}
