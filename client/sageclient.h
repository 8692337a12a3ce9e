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
 * Where the daemon has a GPU, q, k, v and o are in device memory, there is no buffer, and
 *
 *     sage_attn_enqueue(client, &attn, stream);     // like a kernel of your CUDA stream
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

/* How sage_attn_enqueue() orders a job with its stream. */
enum sage_mode {
    SAGE_MODE_AUTO = 0,  /* lane where driver and device can, else event, else sync */
    SAGE_MODE_SYNC = 1,  /* the CPU waits for the stream, then for the job */
    SAGE_MODE_EVENT = 2, /* the CPU waits until the job is launched, the stream for the job;
                            daemon and client must belong to the same user. A stream that waits
                            for a daemon that is killed waits for ever */
    SAGE_MODE_LANE = 3,  /* nobody but the stream waits */
};

struct sage_connect_options {
    /* Path; NULL: $SAGEATTND_SOCKET if it is set, otherwise the first that is there of
     * /run/sageattnd/sageattnd.sock, /run/sageattnd/gpu<N>.sock and
     * $XDG_RUNTIME_DIR/sageattnd.sock; where there are several, rather the one whose GPU is the
     * calling thread's current CUDA device. */
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
    /* The GPU that the daemon must have, "GPU-..." as nvidia-smi -L shows it; NULL: any. */
    const char *gpu;
    /* AUTO: $SAGE_MODE ("auto", "lane", "event" or "sync") if it is set. */
    enum sage_mode mode;
    /* Bytes of device memory that stay registered while no job uses them; 0: $SAGE_CACHE_BYTES if
     * it is set, otherwise an eighth of the device. */
    uint64_t cache_bytes;
};

/*
 * Connect and say hello. options: NULL for the defaults; nothing of it is kept. The client is the
 * caller's, to be given to sage_disconnect().
 * SAGE_ENODAEMON (the text says how to start one; also: none has that gpu), SAGE_EPERM (it names
 * the group), SAGE_EVERSION, SAGE_EQUOTA (too many clients), SAGE_EINVAL, SAGE_ENOMEM,
 * SAGE_ETIMEDOUT (after 10 s).
 */
SAGE_API int sage_connect(const struct sage_connect_options *options, struct sage_client **client);

/*
 * Close the connection and free the client, its lanes and its buffers. Jobs that are still in
 * flight are dropped and their outputs undefined: synchronise first. Lets streams that wait for
 * them go on, and waits until streams that work with memory of the library's own, see sage_trim(),
 * and the CUDA contexts whose streams had jobs in lane mode have nothing more to do. NULL is fine.
 * In a fork child: frees the child's copy.
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

/*
 * --- buffers: host memory that the daemon maps too (CPU backend) ---
 *
 * Device memory needs no call: a daemon with a GPU gets to map what a job's tensors lie in when it
 * is first used, and lets go of it within about 0.2 s of being freed, see sage_trim().
 */

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
 * A GPU that is about to wait for its inputs counts as started: if they do not come within 0.1 ms,
 * the job is cancelled then. Waits for the daemon's answer.
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

/* --- jobs of a daemon with a GPU, on device memory and CUDA streams --- */

/*
 * Where the daemon has a GPU, the tensors of all calls here lie in device memory of that GPU, made
 * in this process by any allocator. sage_attn_submit() and sage_attn_run() want them ready: work
 * that writes them has been waited for. Memory that cannot be shared between processes
 * (cudaMallocAsync() pools, managed memory, cuMemCreate() without a POSIX handle type) is copied on
 * the GPU, to memory of the library's and back (SAGE_EHANDLE with $SAGE_STAGING=off, and from
 * sage_attn_submit()). The program must have a CUDA context; the library never makes one.
 */

/*
 * Compute as if by a kernel of `stream` (a CUstream or cudaStream_t; NULL: the default stream of
 * old, of the current context): after all that was put on it before, and before all that is put
 * on it later. In lane mode it waits for nothing, except while 63 jobs of the stream are in flight,
 * for the first of them, or while 64 other streams have jobs in flight. In event mode it waits
 * until the job is launched, in sync mode until it is over; in either until what the stream had to
 * do before is done. Memory that it meets for the first time is registered before that, which takes
 * the daemon's answer. Nothing of *attn is kept; the tensors must stay until the stream has passed
 * the job.
 * Retries like sage_attn_run() what is refused here. An error: nothing was computed, o and lse are
 * undefined, and the stream goes on. SAGE_ECAPTURE (the stream is being captured; the capture goes
 * on), SAGE_EINVAL (also: the stream or a tensor is of another GPU than the daemon's, and the text
 * names both), SAGE_EUNSUPPORTED (also: no CUDA driver, a daemon without a GPU, no lane or event
 * mode where that was asked for), SAGE_EBUFFER (no device memory), SAGE_EBOUNDS (the tensor ends
 * behind its allocation), SAGE_EHANDLE (memory or event handles cannot be exchanged), SAGE_EQUOTA,
 * and what sage_attn_run() returns.
 * In lane and event mode a job can still fail once this has returned: see sage_stream_error(). What
 * a daemon that died had not finished its successor does; where there is none after retry_ms, lane
 * mode lets the stream go on, but in event mode a daemon that is killed while it computes leaves
 * the stream waiting for ever, for its event never comes.
 */
SAGE_API int sage_attn_enqueue(struct sage_client *client, const struct sage_attn *attn,
                               struct CUstream_st *stream);

/*
 * The status of the first job that sage_attn_enqueue() put on the stream and that failed after it
 * had returned, since this was last asked; 0: none that is known of. Synchronise with the stream,
 * then ask. Such a job's outputs are undefined: SAGE_ELOST (the daemon died, and had no successor
 * within retry_ms), SAGE_EDEVICE, and in lane mode what the daemon refuses it for. Waits for
 * nothing, so it also tells why a stream waits for ever. Of the 64 streams that were used last, and
 * of others, whose lane another stream has since, the last 64 errors.
 * SAGE_EINVAL: the driver refused the stream. SAGE_ECAPTURE: it is being captured, ask later; the
 * capture goes on.
 */
SAGE_API int sage_stream_error(struct sage_client *client, struct CUstream_st *stream);

/* The mode that is in force; AUTO: no job of a stream has shown it yet. SYNC with a CPU daemon. */
SAGE_API enum sage_mode sage_client_mode(struct sage_client *client);

/*
 * Let the daemon let go of device memory that was freed or is beyond cache_bytes, now, and free the
 * library's own that is not in use. A thread of the library does the former every 100 ms. Jobs keep
 * what they use. Waits for the daemon's answers.
 */
SAGE_API int sage_trim(struct sage_client *client);

/*
 * Bytes of this program's device memory that are registered, freed since or not; not the library's
 * own, through which it copies what cannot be shared. Waits for nothing.
 */
SAGE_API uint64_t sage_registered_bytes(struct sage_client *client);

#ifdef __cplusplus
}
#endif
#endif
