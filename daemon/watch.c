/*
 * watch.c - polling of acquire words.
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
    w->delay_ns = DELAY_MIN_NS;
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
    d->watch.delay_ns = DELAY_MIN_NS;
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

static bool is_acquired(const struct job *job)
{
    const struct sage_page_lane *lane = &job->session->page->lane[job->lane];

    return page_reached(page_load(&lane->acquire[job->number % SAGE_ENTRIES]), job->number);
}

/* The first SCAN_MAX jobs; those that have to wait on go to the end. */
static void scan(struct daemon *d)
{
    struct watch *w = &d->watch;
    struct job *last = TAILQ_LAST(&w->jobs, watched);

    for (int i = 0; last && i < SCAN_MAX; i++) {
        struct job *job = TAILQ_FIRST(&w->jobs);
        bool is_last = job == last;
        if (is_acquired(job)) {
            watch_remove(d, job);
            sched_ready(job);
            watch_stir(d);
        } else {
            TAILQ_REMOVE(&w->jobs, job, watch_link);
            TAILQ_INSERT_TAIL(&w->jobs, job, watch_link);
        }
        if (is_last)
            return;
    }
}

void watch_turn(struct daemon *d)
{
    struct watch *w = &d->watch;

    scan(d);
    if (daemon_now() < w->hot_until_ns) {
        uv_idle_start(&w->hot, on_hot);
        return;
    }
    uv_idle_stop(&w->hot);
    if (TAILQ_EMPTY(&w->jobs))
        return;
    sleep_for(w, w->delay_ns);
    w->delay_ns = w->delay_ns * 2 < DELAY_MAX_NS ? w->delay_ns * 2 : DELAY_MAX_NS;
}
