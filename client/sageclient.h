/*
 * sageclient.h - quantised attention in a daemon that owns the device.
 *
 *     struct sage_client *client;
 *     struct sage_buffer *buffer;
 *     sage_connect(NULL, &client);
 *     sage_buffer_alloc(client, bytes, &buffer);
 *     struct sage_attn attn = SAGE_ATTN_INIT;       // q, k, v, o: pointers into the buffer
 *     sage_attn_run(client, &attn, NULL);
 *
 * Errors: 0 or a negative SAGE_E* of sageattn.h; sage_last_error() has the text.
 * Threads: any thread may call anything at any time, except that an object must not be used by one
 * thread while another destroys it. No call waits for the device unless its comment says so; those
 * that wait for the daemon's answer wait for as long as it is alive, even if it is stopped.
 * Fork: a child of fork() cannot use its parent's client: all calls but sage_disconnect() return
 * SAGE_EFORK.
 * A daemon that dies: its jobs are handed to its successor, see sage_connect_options.retry_ms.
 */
#ifndef SAGECLIENT_H
#define SAGECLIENT_H

#include "sageattn.h"

#ifdef __cplusplus
extern "C" {
#endif

struct sage_client;
struct sage_buffer;
struct sage_lane;

enum sage_priority { SAGE_LOW = -1, SAGE_NORMAL = 0, SAGE_HIGH = 1 };

struct sage_connect_options {
    /* Path; NULL: $SAGEATTND_SOCKET if it is set, otherwise the first that is there of
     * /run/sageattnd/sageattnd.sock and $XDG_RUNTIME_DIR/sageattnd.sock. */
    const char *socket;
    /* For the daemon's statistics, 63 bytes of ASCII; NULL: the program's name. */
    const char *name;
    /* Weight of this client: 1/4, 1 or 4. */
    enum sage_priority priority;
    /* How long after its daemon died this client may take to find a successor, connect to it and
     * register its buffers there, before jobs fail with SAGE_ELOST; 0: the default of 10000;
     * negative: do not look. From then on each call that needs a daemon tries once to connect, for
     * at most 10 s. Also how long sage_attn_run() tries again. */
    int retry_ms;
};

/*
 * Connect and say hello. options: NULL for the defaults; nothing of it is kept. The client is the
 * caller's, to be given to sage_disconnect().
 * SAGE_ENODAEMON (the text says how to start one), SAGE_EPERM (it names the group), SAGE_EVERSION,
 * SAGE_EQUOTA (too many clients), SAGE_EINVAL, SAGE_ENOMEM, SAGE_ETIMEDOUT (after 10 s).
 */
SAGE_API int sage_connect(const struct sage_connect_options *options, struct sage_client **client);

/*
 * Close the connection and free the client, its lanes and its buffers. Jobs that are still in
 * flight are dropped and their outputs undefined. NULL is fine. In a fork child: frees the child's
 * copy.
 */
SAGE_API void sage_disconnect(struct sage_client *client);

/* The text of this thread's last failed call; valid until its next call. Never NULL. */
SAGE_API const char *sage_last_error(void);

struct sage_server {
    char version[64], backend[64], device[64], uuid[64];
    uint64_t pid;
    uint32_t jobs;    /* jobs this client may have in flight */
    uint32_t buffers; /* buffers it may register */
    uint64_t bytes;   /* bytes it may register */
};

/* What the daemon said of itself when this client last connected to it. */
SAGE_API int sage_server_info(struct sage_client *client, struct sage_server *server);

/* --- buffers: host memory that the daemon maps too (CPU backend) --- */

/*
 * Allocate zeroed shared memory and register it. The buffer is the caller's, to be given to
 * sage_buffer_free() before its client goes. Waits for the daemon's answer.
 * SAGE_EINVAL (bytes 0), SAGE_ENOMEM, SAGE_EQUOTA, SAGE_ENODAEMON.
 */
SAGE_API int sage_buffer_alloc(struct sage_client *client, size_t bytes,
                               struct sage_buffer **buffer);

/*
 * Register a memfd that exists already, sealed with F_SEAL_SHRINK. The descriptor stays the
 * caller's and may be closed afterwards. Otherwise like sage_buffer_alloc(); SAGE_EHANDLE besides.
 */
SAGE_API int sage_buffer_import(struct sage_client *client, int memfd, struct sage_buffer **buffer);

SAGE_API void *sage_buffer_data(const struct sage_buffer *buffer);
SAGE_API size_t sage_buffer_size(const struct sage_buffer *buffer);

/*
 * Unregister and unmap: waits until no job uses the buffer. New jobs are refused it at once. NULL
 * is fine. The memory is gone from this process afterwards, whatever is returned.
 */
SAGE_API int sage_buffer_free(struct sage_buffer *buffer);

/* --- jobs --- */

/*
 * A queue whose jobs run one after the other in the order of submission. The lane is the caller's,
 * to be given to sage_lane_destroy() before its client goes. SAGE_EBUSY (64 are all a client has),
 * SAGE_ENOMEM.
 */
SAGE_API int sage_lane_create(struct sage_client *client, struct sage_lane **lane);
/* Waits for the lane's jobs; held ones that never became ready are cancelled. NULL is fine. */
SAGE_API void sage_lane_destroy(struct sage_lane *lane);

/* A submitted job: plain data, nothing to free; all zero when it could not be submitted. Good as
 * long as no more than 63 later jobs were submitted on its lane; SAGE_EINVAL says that it is too
 * old, or that there never was such a job. */
struct sage_job {
    struct sage_lane *lane;
    uint32_t number;
};

enum sage_submit_flags {
    SAGE_HELD = 1,  /* the inputs are not ready yet: sage_ready() will tell */
    SAGE_TIMES = 2, /* sage_job_times() is going to be called: have the times sent at once */
};

/*
 * Hand a problem to the daemon and return without waiting for it. The tensors lie in registered
 * buffers, named by address (`data`); they belong to the daemon until the job is over. Nothing of
 * *attn is kept. The job runs when all earlier jobs of its lane are over.
 * Errors found here queue nothing: SAGE_EINVAL, SAGE_EUNSUPPORTED, SAGE_EBUFFER (not in any
 * registered buffer), SAGE_EBOUNDS, SAGE_EBUSY (63 jobs in flight on the lane, no credit, or the
 * daemon does not read its socket and it is full), SAGE_ENOMEM. When the daemon was lost it first
 * connects: what sage_connect() returns, and SAGE_EBUSY while jobs of the lost connection run.
 * What the daemon finds comes from sage_wait().
 */
SAGE_API int sage_attn_submit(struct sage_lane *lane, const struct sage_attn *attn, unsigned flags,
                              struct sage_job *job);

/* The inputs of a job submitted with SAGE_HELD are ready. SAGE_EINVAL: no such job. */
SAGE_API int sage_ready(struct sage_job job);

/*
 * Wait until the job is over and return its status. timeout_ms < 0: as long as it takes (a dead
 * daemon ends it after retry_ms). SAGE_ETIMEDOUT: not over yet. SAGE_EINVAL: no such job.
 * Any number of threads may wait, any number of times.
 */
SAGE_API int sage_wait(struct sage_job job, int timeout_ms);

/*
 * Cancel a job that has not started; it is then over with SAGE_ECANCELED. 0 when it was cancelled,
 * by this call or before, SAGE_ESTARTED when it has started or is over, SAGE_EINVAL: no such job.
 * Waits for the daemon's answer.
 */
SAGE_API int sage_cancel(struct sage_job job);

/* What a job took, in nanoseconds, as the daemon measured it. */
struct sage_times {
    uint64_t queue_ns; /* from when it could run (arrived, inputs ready) until it started */
    uint64_t run_ns;   /* computing */
};

/*
 * Wait until the job is over and the daemon has told its times; 0 also for a job that failed. They
 * come at once for a job submitted with SAGE_TIMES, otherwise a millisecond or so after that.
 * SAGE_ELOST: the daemon was lost before it told. SAGE_EINVAL: no such job. On an error they are 0.
 */
SAGE_API int sage_job_times(struct sage_job job, struct sage_times *times);

/*
 * Submit, wait and return the job's status. Retries what a retry can help (a draining daemon, no
 * credit) for up to retry_ms. times: NULL, or filled on success; 0 where the daemon was lost just
 * before it told. The call takes a free lane of the client for as long as it lasts, or waits for
 * that of another such call; SAGE_EBUSY when all 64 are the program's own.
 */
SAGE_API int sage_attn_run(struct sage_client *client, const struct sage_attn *attn,
                           struct sage_times *times);

#ifdef __cplusplus
}
#endif
#endif
