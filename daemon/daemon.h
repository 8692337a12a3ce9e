/*
 * daemon.h - the whole state. The loop thread owns all of it; nothing here is locked.
 */
#ifndef SAGE_DAEMON_H
#define SAGE_DAEMON_H

#include <sys/queue.h>
#include <uv.h>

#include "daemon/backend.h"
#include "daemon/options.h"
#include "daemon/sched.h"
#include "daemon/session.h"
#include "daemon/stats.h"
#include "daemon/watch.h"

enum {
    PACKETS_AT_ONCE = 8, /* received by one system call */
    EXIT_DEVICE_LOST =
        70, /* EX_SOFTWARE of sysexits.h: start again, nothing was wrong with the request */
};

struct daemon {
    struct config config;
    uv_loop_t loop;
    const struct backend *backend;
    struct device *device;
    char device_name[PROTO_NAME_MAX], device_uuid[PROTO_NAME_MAX];
    uint64_t boot; /* random: tells clients a new daemon from one that threw them out */

    TAILQ_HEAD(, session) sessions; /* all that are connected, in the order of their ids */
    TAILQ_HEAD(, session) closing;  /* all that are not, and not yet freed */
    TAILQ_HEAD(, session) flushing; /* with jobs to report */
    TAILQ_HEAD(, user) users;       /* who have a session, or one that is not yet freed */
    TAILQ_HEAD(, job) spare;        /* to be used again. Owned */
    size_t spare_offsets;           /* that they have room for */
    unsigned n_sessions;            /* connected */
    unsigned n_live;                /* connected or not yet freed */
    uint64_t next_session;
    struct sched sched;
    struct watch watch;
    struct stats stats;

    uv_check_t turn;      /* after the callbacks of each turn: reap, start, report */
    uv_async_t completed; /* a stream has finished a piece */
    uv_timer_t tick;      /* what has taken too long, is the device there? */
    uv_timer_t report;    /* DONE_DELAY_MS after a turn that left jobs to report */
    uint64_t idle_since_ns;
    uint64_t heard_ns; /* when this turn began to hear sessions; 0: it has not */
    uint64_t last_tick_ns,
        awake_ns;                /* time that ticks saw pass, not that this process was stopped */
    unsigned complaints, visits; /* logged since the last tick */
    bool draining, drained;      /* no new jobs; nothing left to finish */
    bool device_lost;
    char lost_why[PROTO_TEXT_MAX];
    int exit_code;

    void (*on_tick)(struct daemon *); /* the server's share of a tick; NULL without server */
    void (*on_drain)(struct daemon *);
    void (*on_drained)(struct daemon *);
    void *server;

    char packets[PACKETS_AT_ONCE][PROTO_PACKET_MAX + 1]; /* being received */
    char reply[PROTO_PACKET_MAX];                        /* being encoded */
    struct unpacker *unpacker;
};

/*
 * Open the device and the slots, and run a warm-up job of each kind. 0 or SAGE_E* with
 * why[PROTO_TEXT_MAX]. daemon_finish() wants all sessions closed and the loop run until it is idle.
 */
int daemon_init(struct daemon *d, const struct config *config, char *why);
void daemon_finish(struct daemon *d);

/* Take no new jobs, finish what can be finished, close every session, end the loop. */
void daemon_drain(struct daemon *d);

/*
 * The device is lost: logged, and the loop ends after this turn. `why` is said where the device
 * itself cannot tell.
 */
void daemon_lose(struct daemon *d, const char *why);

/* The gauges and counters of STATS. */
void daemon_stats(const struct daemon *d, struct msg_stats *msg);

/* May one more thing that a client did wrong be logged? Nobody shall fill the log. */
bool daemon_may_complain(struct daemon *d);
/* One more that came or went? */
bool daemon_may_tell_visit(struct daemon *d);

uint64_t daemon_now(void); /* ns, CLOCK_MONOTONIC */

#endif
