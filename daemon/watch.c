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
    SCAN_MAX = 512,             /* words looked at in one turn */
    EVENTS_TURN = 64,           /* events asked for in one turn: about 1 us each */
    EVENTS_OLD = 8,             /* of these, what the young leave to the old in any case; */
    SCAN_OLD = 2 * EVENTS_TURN, /* of words, so that both kinds of old ones have some */
    DELAY_MIN_NS = 50 * 1000,   /* about what a wake-up costs */
    DELAY_MAX_NS = 2000 * 1000,
    DELAY_SHARE = 16, /* of its age: how late a job may be seen */
    /*
     * A job is young until then, and again so long before it is expected: 4,000 old ones are looked
     * at in half of it, or 1,000 that are behind an event in all of it.
     */
    YOUNG_NS = DELAY_SHARE * DELAY_MAX_NS,
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

    TAILQ_INIT(&w->young);
    TAILQ_INIT(&w->old);
    TAILQ_INIT(&w->old_events);
    TAILQ_INIT(&w->resting);
    w->timer_fd = timerfd_create(CLOCK_MONOTONIC, TFD_CLOEXEC | TFD_NONBLOCK);
    if (w->timer_fd < 0)
        return -errno;
    w->hot_ns = HOT_NS;
    uv_idle_init(&d->loop, &w->hot);
    uv_poll_init(&d->loop, &w->timer, w->timer_fd);
    w->timer.data = w;
    return uv_poll_start(&w->timer, UV_READABLE, on_timer);
}

bool watch_has_jobs(const struct watch *w)
{
    return !TAILQ_EMPTY(&w->young) || !TAILQ_EMPTY(&w->old) || !TAILQ_EMPTY(&w->old_events);
}

void watch_finish(struct daemon *d)
{
    close(d->watch.timer_fd);
}

void watch_add(struct daemon *d, struct job *job)
{
    job->watched = &d->watch.young;
    if (!job->watched_ns) /* or put_back() has set it */
        job->watched_ns = daemon_now();
    TAILQ_INSERT_TAIL(job->watched, job, watch_link);
    watch_again(d); /* this turn's watch_turn() may be over */
}

void watch_remove(struct job *job)
{
    TAILQ_REMOVE(job->watched, job, watch_link);
    job->watched = NULL;
}

static void move(struct job *job, struct watched *to)
{
    TAILQ_REMOVE(job->watched, job, watch_link);
    TAILQ_INSERT_TAIL(to, job, watch_link);
    job->watched = to;
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
    d->watch.hot_until_ns = daemon_now() + d->watch.hot_ns;
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

static uint64_t age_of(const struct job *job, uint64_t now)
{
    return now > job->watched_ns ? now - job->watched_ns : 0;
}

static uint64_t job_due_in(const struct job *job, uint64_t now)
{
    return due_in(age_of(job, now), job->session->lanes[job->lane].gap_ns);
}

/* The list that it belongs to. */
static struct watched *list_of(struct watch *w, const struct job *job, uint64_t now)
{
    if (age_of(job, now) < YOUNG_NS || job_due_in(job, now) < YOUNG_NS)
        return &w->young;
    return job->event ? &w->old_events : &w->old;
}

/*
 * When to look at it again. A stream takes about as long from one job to the next as it took the
 * last time: all the time around then, and otherwise so that it is late by a sixteenth at most.
 */
static uint64_t look_in(const struct job *job, uint64_t now)
{
    uint64_t delay = clamp(age_of(job, now) / DELAY_SHARE, DELAY_MIN_NS, DELAY_MAX_NS);
    uint64_t due = job_due_in(job, now);

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
    int ready = job_is_ready(job);

    if (ready == 0) {
        move(job, list_of(&d->watch, job, now));
        return look_in(job, now);
    }
    watch_stir(d);
    if (ready == SAGE_EDEVICE) {
        daemon_lose(d, "found by asking for an event");
    } else if (ready < 0) {
        job_fail(job, ready, "event: cannot be asked for, or what it is behind has failed");
    } else {
        job->session->lanes[job->lane].gap_ns = age_of(job, now);
        watch_remove(job);
        sched_ready(job);
    }
    return UINT64_MAX;
}

/* What is left of a turn. */
struct left {
    int words, events;
};

/*
 * The first jobs of the list; those that have to wait on go to the end. false: there are others,
 * for which nothing is left. *least: when to look at one of them again, if that is sooner.
 */
static bool scan_list(struct daemon *d, struct watched *list, struct left *left, uint64_t now,
                      uint64_t *least)
{
    const struct job *last = TAILQ_LAST(list, watched); /* only compared: it may be freed */
    struct job *job;
    bool is_last = false;

    while (!is_last && !d->device_lost && (job = TAILQ_FIRST(list))) {
        if (left->words == 0 || (job->event && left->events == 0))
            return false;
        is_last = job == last;
        left->words--;
        left->events -= job->event != NULL;
        uint64_t wait = scan_job(d, job, now);
        *least = wait < *least ? wait : *least;
    }
    return true;
}

/*
 * All young jobs, unless they are too many: then it goes on with them soon. Old ones are in no
 * hurry: of them, what comes next. When to do it again; UINT64_MAX: when there are others.
 */
static uint64_t scan(struct daemon *d, uint64_t now)
{
    struct watch *w = &d->watch;
    struct left left = {SCAN_MAX - SCAN_OLD, EVENTS_TURN - EVENTS_OLD};
    uint64_t least = UINT64_MAX;

    if (!scan_list(d, &w->young, &left, now, &least) && least > DELAY_MIN_NS)
        least = DELAY_MIN_NS;
    left.words += SCAN_OLD;
    left.events += EVENTS_OLD;
    scan_list(d, &w->old_events, &left, now, &least);
    scan_list(d, &w->old, &left, now, &least);
    return least;
}

/*
 * The loop has slept and stays awake now, since something is to start soon: what a piece that is
 * about to end makes room for, a job whose inputs are about to be ready, or one that a packet
 * brings or is about to. What is ready already is launched just as soon.
 */
static void warm(struct daemon *d, bool expected)
{
    bool brought = d->sched.n_active == 0 && watch_has_jobs(&d->watch);

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
