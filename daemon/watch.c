/*
 * watch.c - polling of acquire words.
 */
#include "daemon/watch.h"

#include <errno.h>
#include <sys/timerfd.h>
#include <unistd.h>

#include "daemon/daemon.h"

enum {
    HOT_NS = 100 * 1000,       /* a client that signals right after it submitted is seen at once */
    DELAY_MIN_NS = 50 * 1000,  /* about what a wake-up costs */
    DELAY_MAX_NS = 1000 * 1000,
};

static void on_hot(uv_idle_t *handle)
{
    (void)handle; /* watch_turn() does the work: this only keeps the loop turning */
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

void watch_close(struct daemon *d)
{
    uv_close((uv_handle_t *)&d->watch.hot, NULL);
    uv_close((uv_handle_t *)&d->watch.timer, NULL);
}

void watch_finish(struct daemon *d)
{
    close(d->watch.timer_fd);
}

void watch_add(struct daemon *d, struct job *job)
{
    job->watched = true;
    TAILQ_INSERT_TAIL(&d->watch.jobs, job, watch_link);
    watch_stir(d);
    uv_idle_start(&d->watch.hot, on_hot); /* this turn's watch_turn() may be over */
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

static void sleep_for(struct watch *w, uint64_t ns)
{
    struct itimerspec when = {.it_value = {.tv_nsec = (long)ns}};

    timerfd_settime(w->timer_fd, 0, &when, NULL);
}

void watch_turn(struct daemon *d)
{
    struct watch *w = &d->watch;
    struct job *job, *next;

    for (job = TAILQ_FIRST(&w->jobs); job; job = next) {
        next = TAILQ_NEXT(job, watch_link);
        const uint32_t *acquire = &job->session->page->lane[job->lane].acquire[job->number % SAGE_ENTRIES];
        if (!page_reached(page_load(acquire), job->number))
            continue;
        watch_remove(d, job);
        sched_ready(job);
        watch_stir(d);
    }
    if (TAILQ_EMPTY(&w->jobs)) {
        uv_idle_stop(&w->hot);
        return;
    }
    if (daemon_now() < w->hot_until_ns) {
        uv_idle_start(&w->hot, on_hot);
        return;
    }
    uv_idle_stop(&w->hot);
    sleep_for(w, w->delay_ns);
    w->delay_ns = w->delay_ns * 2 < DELAY_MAX_NS ? w->delay_ns * 2 : DELAY_MAX_NS;
}
