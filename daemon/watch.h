/*
 * watch.h - when the loop sleeps. While something happens it does not: the next packet is then not
 * paid for with a wake-up; nor when a client that has had no jobs for a while should be about to
 * send the next, going by its last pause. And it looks at what changes without telling anybody: the
 * acquire words and events of jobs whose inputs are not ready, all the time when they should be,
 * and else every 50 us to 2 ms; and pieces that are polled for, when sched_look_in() says. Where
 * these jobs are more than a turn looks at, those that have waited for more than 32 ms and are not
 * expected are looked at less often: however many somebody holds, others' young ones do not wait.
 */
#ifndef SAGE_WATCH_H
#define SAGE_WATCH_H

#include <sys/queue.h>
#include <uv.h>

#include "daemon/job.h"

struct daemon;
struct session;

TAILQ_HEAD(watched, job); /* first of their lane; owned by it */

struct watch {
    struct watched young;          /* for a short time, or expected shortly */
    struct watched old;            /* the others; a turn begins where the last one ended */
    struct watched old_events;     /* of these, all that are behind an event */
    TAILQ_HEAD(, session) resting; /* without jobs, the next of which is expected */
    uv_idle_t hot;                 /* keeps the loop from sleeping */
    uv_poll_t timer;               /* a timerfd: libuv's timers count milliseconds */
    int timer_fd;
    uint64_t hot_ns; /* how long it stays awake for what may follow; tests change that */
    uint64_t hot_until_ns;
    bool awake; /* since the last turn: `hot` may also be active for a packet that has woken us */
};

int watch_init(struct daemon *d);    /* 0 or a negative errno */
void watch_finish(struct daemon *d); /* the loop has closed the handles */

bool watch_has_jobs(const struct watch *w);
void watch_add(struct daemon *d, struct job *job);
void watch_remove(struct job *job);
/* The session has no jobs any more; it has one again (or is closed). */
void watch_rest(struct session *s);
void watch_rested(struct session *s);
/* Something came in: more may follow soon. */
void watch_stir(struct daemon *d);
/* There must be another turn, at once. */
void watch_again(struct daemon *d);
/* Once a turn: hand over the jobs that are ready, and see to being woken again. */
void watch_turn(struct daemon *d);

#endif
