/*
 * sched.h - slots, and who gets them: deficit round-robin over the sessions with runnable jobs,
 * charged with measured time (Shreedhar and Varghese, SIGCOMM 1995, section 3).
 */
#ifndef SAGE_SCHED_H
#define SAGE_SCHED_H

#include <sys/queue.h>

#include "daemon/backend.h"
#include "daemon/job.h"

struct daemon;
struct session;

struct slot {
    struct stream *stream;
    struct job *jobs[STREAM_DEPTH]; /* a ring: whose pieces are in the stream, oldest first */
    unsigned first, n;
    double queued_ns; /* estimated, of these pieces */
    /* What ticks saw of the oldest piece, and when they first saw it so. */
    enum { SEEN_NOTHING, SEEN_WAITING, SEEN_RUNNING } seen;
    uint64_t seen_awake_ns;
    bool told;          /* that it waits for too long */
    struct job *holder; /* the slot keeps its K and V between pieces: nobody else may use it */
    unsigned n_holding; /* the holder's pieces so far */
};

struct sched {
    struct slot *slots;
    unsigned n_slots, n_held;
    bool hold_wanted; /* since the last slot was let go of, somebody has waited for one to hold */
    size_t workspace; /* bytes of a slot */
    bool can_wait;    /* streams can wait for inputs */
    double quantum_ns;
    double brief_ns;              /* computed by the loop in this turn */
    double ns_per_op;             /* measured, a moving average over large pieces */
    TAILQ_HEAD(, session) active; /* with runnable jobs, in the order of their turns */
    unsigned n_active;
};

/* Open the slots. 0 or SAGE_E* with why[PROTO_TEXT_MAX]. */
int sched_init(struct daemon *d, char *why);
void sched_finish(struct daemon *d); /* all jobs are over */

/* The lane's first job may have changed: is it runnable, or to be watched? */
void sched_lane(struct session *s, uint32_t lane);
/* The job is the first of its lane, its inputs are ready. Or start_ahead() is about to start it. */
void sched_ready(struct job *job);
/* The job is in no slot and will never be again. */
void sched_forget(struct job *job);

/* Take note of the pieces that are done. */
void sched_reap(struct daemon *d);
/* Nanoseconds until the pieces that run have to be polled for again; UINT64_MAX: never. */
uint64_t sched_look_in(const struct daemon *d, uint64_t now);
/* Fill the free slots. */
void sched_dispatch(struct daemon *d);
/*
 * Once a tick: is there a piece that has been running, or waiting for the device, for far too long?
 * With why[PROTO_TEXT_MAX].
 */
bool sched_is_hung(struct daemon *d, char *why);
unsigned sched_slots_used(const struct daemon *d);

#endif
