/*
 * watch.h - looks at words that change without telling anybody: the acquire words of jobs whose
 * inputs are not ready. Without sleeping while something happens, then every 50 us to 1 ms.
 */
#ifndef SAGE_WATCH_H
#define SAGE_WATCH_H

#include <sys/queue.h>
#include <uv.h>

#include "daemon/job.h"

struct daemon;

struct watch {
    TAILQ_HEAD(, job) jobs; /* first of their lane; owned by it */
    uv_idle_t hot;          /* keeps the loop from sleeping */
    uv_poll_t timer;        /* a timerfd: libuv's timers count milliseconds */
    int timer_fd;
    uint64_t delay_ns, hot_until_ns;
};

int watch_init(struct daemon *d);    /* 0 or a negative errno */
void watch_close(struct daemon *d);  /* gives the handles back to the loop, */
void watch_finish(struct daemon *d); /* which has closed them */

void watch_add(struct daemon *d, struct job *job);
void watch_remove(struct daemon *d, struct job *job);
/* Something came in: more may follow soon. */
void watch_stir(struct daemon *d);
/* Once a turn: hand over the jobs that are ready, and see to being woken again. */
void watch_turn(struct daemon *d);

#endif
