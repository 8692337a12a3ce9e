/*
 * session.h - one connection: its packets, its lanes, its buffers, its limits.
 */
#ifndef SAGE_SESSION_H
#define SAGE_SESSION_H

#include <sys/queue.h>
#include <sys/types.h>
#include <uv.h>

#include "daemon/buffer.h"
#include "daemon/job.h"
#include "daemon/stats.h"
#include "proto/page.h"
#include "proto/proto.h"

struct daemon;

/* What all sessions of one user have together. */
struct user {
    uid_t uid;
    unsigned sessions, n_jobs, n_mappings;
    unsigned n_fds; /* of buffers that are not mapped yet */
    uint64_t mapped_bytes;
    TAILQ_ENTRY(user) link; /* daemon.users */
};

struct lane {
    TAILQ_HEAD(, job) jobs; /* in order; the first runs, one may wait behind it. Owned */
    uint32_t last;          /* number of the newest job that came */
    bool used;
    uint64_t gap_ns; /* how long the last job that was watched was the first before it was ready */
    uint64_t end_ns; /* when its last job ended */
    /* See start_ahead(): so many jobs are not; and so many after the next one that is in vain. */
    unsigned shy, next_shy;
    double pace; /* measured time of the last piece to its estimate; 0: there is none */
};

struct outgoing {
    STAILQ_ENTRY(outgoing) link;
    size_t len;
    char data[];
};

enum { SESSION_BUCKETS = 64, BACKLOG_MAX = 65536, QUEUE_RECENT = 2048 };

struct session {
    struct daemon *daemon;
    uint64_t id;
    int fd, pidfd; /* pidfd < 0: the kernel has none */
    uv_poll_t poll, pid_poll;
    unsigned handles; /* of these two, that libuv still knows */
    pid_t pid;
    struct user *user;
    char name[PROTO_NAME_MAX];
    uint32_t priority;
    uint64_t connected_ns;
    bool welcome; /* said HELLO */
    bool closing; /* jobs in slots and buffers being opened or closed still need the struct */

    struct sage_page *page;
    struct sage_page *remote;      /* the page for the device's streams, or NULL */
    struct sage_page *page_opened; /* by the pool, for the loop; the same with */
    int page_status;
    bool page_busy; /* it is being opened to streams, or closed */
    uv_work_t page_work;
    dev_t page_dev; /* which memfd it is */
    ino_t page_ino;
    struct lane lanes[SAGE_LANES];
    TAILQ_HEAD(, buffer) buffers[SESSION_BUCKETS]; /* by id % SESSION_BUCKETS. Owned */
    unsigned n_buffers; /* registered; with those being opened or closed: */
    unsigned n_mappings;
    uint64_t mapped_bytes;
    LIST_HEAD(, event) events;      /* the client's. Owned */
    unsigned n_events;              /* with those being closed */
    uint32_t launched[EVENTS_MAX];  /* events of the device that wait for their WAITED */
    unsigned n_launched, n_pledged; /* of these; with those of jobs that are not launched yet */

    TAILQ_HEAD(, job) ready; /* runnable jobs; owned by their lanes */
    unsigned n_jobs;         /* in lanes */
    unsigned n_running;      /* of these, in slots */
    uint64_t rest_since_ns;  /* it has no jobs since then; 0: it has never had any */
    uint64_t rest_ns;        /* how long it had none the last time; 0: it always had some */
    bool resting;            /* in watch.resting */
    TAILQ_ENTRY(session) rest_link;
    double deficit_ns; /* device time that may still be used before it is another's turn */
    bool active;       /* in sched.active */
    TAILQ_ENTRY(session) active_link;
    uint64_t done, failed, run_ns;
    double ops;
    struct hist queue; /* of the last QUEUE_RECENT jobs or fewer, see hist_fade() */
    const char *mode;  /* of the last job; "" before any */

    STAILQ_HEAD(, outgoing) backlog; /* packets that the socket did not take yet. Owned */
    size_t backlog_bytes;
    uint64_t backlog_since_ns;
    struct msg_done *report;         /* jobs to be reported */
    bool flushing;                   /* there are some */
    bool prompt;                     /* at the end of this turn */
    TAILQ_ENTRY(session) flush_link; /* daemon.flushing */
    TAILQ_ENTRY(session) link;       /* daemon.sessions, then daemon.closing */
};

/* Take over a connected socket. NULL (and fd closed) where memory or a limit says no. */
struct session *session_create(struct daemon *d, int fd);

/*
 * One packet came, with `n_fds` descriptors: takes them over. false: the session is closing, for
 * it has broken the protocol. (Also the fuzzer's way in.)
 */
bool session_packet(struct session *s, const void *data, size_t len, const int *fds,
                    unsigned n_fds);

/*
 * Map the page that came with HELLO. SAGE_EBUSY: another session has it, perhaps a closed one whose
 * running jobs will still write to it: a late release must not meet the next jobs of the client.
 * SAGE_EPROTO: it is no page. *why is set.
 */
int session_set_page(struct session *s, int fd, const char **why);

/* Drop the queued jobs and let go of everything as soon as the last running job is over. */
void session_close(struct session *s, const char *reason);
/* The struct goes when nothing needs it any more. */
void session_free_if_unused(struct session *s);

/* Send, or keep until the socket takes it. This may close the session, like all that sends. */
void session_send(struct session *s, uint32_t op, uint32_t seq, enum msg_kind kind,
                  const void *msg);
void session_error(struct session *s, uint32_t seq, int status, const char *text);
/* A job is over: tell with the next DONE, which goes at the end of this turn if `prompt`. */
void session_report(struct session *s, const struct msg_done_job *job, bool prompt);
void session_flush(struct session *s);
/* Why it should be dropped, for what it did not do in time; or NULL. */
const char *session_overdue(const struct session *s, uint64_t now_ns);

#endif
