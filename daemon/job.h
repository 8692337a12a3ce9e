/*
 * job.h - one accepted attention problem on its way through the daemon.
 */
#ifndef SAGE_JOB_H
#define SAGE_JOB_H

#include <sys/queue.h>

#include "daemon/backend.h"

struct daemon;
struct session;
struct buffer;
struct event;
struct watched;

enum job_state {
    JOB_WAITING, /* behind another of its lane, or its inputs are not ready */
    JOB_READY,   /* in session.ready */
    JOB_RUNNING, /* a piece of it is in a slot */
};

enum { JOB_TENSORS = 6 };

struct job {
    struct session *session;
    uint32_t lane, number;
    enum job_state state;
    bool started; /* a piece of it has been: it runs, or is in a stream that waits for its inputs */
    bool unwanted; /* to be cancelled, if it is put back */
    bool no_ahead; /* see start_ahead(): not this one */
    bool prompt;   /* its client waits for the report */
    bool dropped;  /* its session is closing: no further piece, no word to anybody */
    bool by_event; /* its client wants to be told of an event behind it */
    bool holds;    /* one of its groups is longer than a quantum: keeps its slot between pieces */
    struct watched *watched; /* the list of daemon.watch that it is in, or NULL */
    struct sage_attn attn;   /* data pointers into the buffers; offsets below */
    int32_t *offsets;        /* of q, then of k. Owned, and kept for the next job */
    size_t offsets_room;
    struct buffer *buffers[JOB_TENSORS]; /* referenced; NULL where the tensor is absent */
    struct event *event;                 /* of the session's, that the inputs are behind, or NULL */
    int64_t groups;                      /* how many there are */
    int64_t group, row,
        head;            /* the next piece starts here; only a job that holds is within a group */
    int64_t block_rows;  /* of the pieces that share a row: each has some of the heads */
    double ops, bytes;   /* of all of it: operations, tensors */
    uint64_t watched_ns; /* since when */
    uint64_t ready_ns, start_ns, run_ns;
    struct piece piece; /* the one in a slot, or made up for the next one */
    bool made;          /* it is made up */
    double piece_ops, piece_est_ns;
    TAILQ_ENTRY(job) lane_link;  /* lane.jobs, or daemon.spare */
    TAILQ_ENTRY(job) ready_link; /* session.ready */
    TAILQ_ENTRY(job) watch_link; /* *watched */
};

/* Jobs for n of them to be in flight without an allocation. 0 or SAGE_ENOMEM. */
int job_reserve(struct daemon *d, uint64_t n);
void job_free_spare(struct daemon *d);

/*
 * SUBMIT: legal? After this nothing looks at the problem again. A job that is not is released with
 * its status and reported; a number that its lane has had already is ignored (a resubmission).
 * false: the rules of the page are broken and the session must go, see why[PROTO_TEXT_MAX].
 */
bool job_submit(struct session *s, const struct msg_submit *msg, char *why);
/* Release and report, for `status`, a job that could be read only so far. Otherwise the same. */
bool job_refuse(struct session *s, uint32_t lane, uint32_t number, int status, const char *text,
                char *why);

/*
 * Cancel if it has not started. false: it has, or it is unknown. One whose stream waits for its
 * inputs is cancelled as soon as that was in vain.
 */
bool job_cancel(struct session *s, uint32_t lane, uint32_t number);
/* Release and report it as cancelled: it is in no slot. Frees it. */
void job_end_canceled(struct job *job);

/* Are its inputs ready? 1, 0 or SAGE_E*: they never will be. */
int job_is_ready(const struct job *job);
/* It never will be ready: release and report it with this status. Frees it. */
void job_fail(struct job *job, int status, const char *text);

/* All of it has been started on the stream: tell its client of an event behind it. */
void job_launched(struct job *job, struct stream *stream);
/* WAITED. false: the session knows of no such event. */
bool job_waited(struct session *s, uint32_t event);
/* A closing session waits for nothing more. */
void job_put_events(struct session *s);

/*
 * Make up the next piece: about quantum_ns long, within the workspace. prepared: the job keeps a
 * slot, which has its group's K and V.
 */
void job_next_piece(struct job *job, const struct backend *backend, double quantum_ns,
                    size_t workspace, double ns_per_op, bool prepared);
/* Is job->piece the last one? */
bool job_is_last_piece(const struct job *job);
/* job->piece is done: move on. */
void job_advance(struct job *job);

/* Over, with `status`: count and report it. It is released already. Frees the job. */
void job_over(struct job *job, int status);
/* Forget about a job that is in no slot. Frees it. */
void job_drop(struct job *job);

#endif
