/*
 * client.h - inside libsageclient: what a client is made of and who may touch it.
 *
 * Submitters encode and send; one reader thread per client receives, and replaces the connection
 * when it breaks. They meet in `link`, a single atomic word {state, number of jobs published}:
 *
 *   LIVE  the connection works. A submitter publishes its job, adds 1 to the word, sees LIVE in
 *         what it added to, and sends the packet itself.
 *   DOWN  the connection broke; the reader owns `conn`. A submitter that sees DOWN does not send:
 *         the reader does, and gets back to LIVE only by exchanging the very count up to which it
 *         has looked for jobs. So none is forgotten; the daemon ignores one that comes twice.
 *   LOST  at the start, and when the reader gave up and all jobs were failed; it sleeps. Whoever
 *         holds `submit_lock` owns `conn` and tries once to connect at the next call.
 */
#ifndef SAGE_CLIENT_H
#define SAGE_CLIENT_H

#include <pthread.h>
#include <stdatomic.h>

#include "client/conn.h"
#include "client/gpu.h"
#include "client/sageclient.h"
#include "proto/page.h"

enum link_state { LINK_DOWN, LINK_LIVE, LINK_LOST };

#define LINK_SHIFT 62
#define LINK_WORD(state, count) ((uint64_t)(state) << LINK_SHIFT | (count))
#define LINK_STATE(word) ((enum link_state)((word) >> LINK_SHIFT))
#define LINK_COUNT(word) ((word) & ((UINT64_C(1) << LINK_SHIFT) - 1))

/* The job that owns an entry of a lane's ring, kept until the next one takes the entry. All of it
 * under `lock`. */
struct entry {
    uint32_t number;
    uint32_t len, capacity;
    unsigned char *packet;        /* its SUBMIT, ready to be sent, and sent again */
    bool failed;                  /* by the reader */
    uint32_t returned;            /* the job whose status a call returned: it is told */
    struct msg_done_job done;     /* of job done.number; status SAGE_ELOST: it will not be told */
    struct msg_launched launched; /* of job launched.number */
    uint64_t launched_epoch;      /* by the daemon of this connection */
};

/* Made at first use and kept until the client goes: numbers are never used again. */
struct sage_lane {
    struct sage_client *client;
    struct sage_page_lane *words;
    uint32_t index;
    bool used;             /* under `lock`, as the next three */
    uint64_t stream;       /* whose jobs these are: see stream_key(); 0: of no one stream */
    uint32_t looked;       /* the last job whose status was looked at for sage_stream_error() */
    int error;             /* and what it is going to say, */
    uint32_t error_number; /* of this job */
    uint64_t turn;         /* the client's `turns` when it was taken last */
    _Atomic uint64_t tail; /* jobs published, and the number of the last; under submit_lock */
    uint32_t head;         /* the first job not known to be over; under submit_lock */
    uint32_t sent;         /* the last job sent again on a new connection; the reader's */
    struct entry entry[SAGE_ENTRIES];
};

/* That a job of the stream failed, which has no lane any more; 0: nothing. */
struct stream_error {
    uint64_t stream;
    int status;
    char text[PROTO_TEXT_MAX];
};

/* Memory that the daemon can reach: a memfd that both sides map, or device memory. */
struct sage_buffer {
    struct sage_client *client;
    uint32_t id; /* our choice, so that the packets we keep stay good for a new daemon */
    enum buffer_kind kind;
    int fd;              /* memfd; otherwise -1 */
    unsigned char *data; /* where a memfd is mapped; NULL: device memory */
    size_t size;
    struct cu_handle handle;  /* cuda_ipc */
    const struct span *spans; /* vmm: the chunks; they belong to whoever owns the buffer */
    uint32_t n_spans;
    int *fds;       /* theirs, for this daemon and the next; -1: none, and it is not listed */
    bool closing;   /* under `lock`: new jobs are refused it */
    uint64_t epoch; /* under `lock`: the connection on which it is registered */
};

/* One packet of a registration; the descriptors are the buffer's. */
struct part {
    struct msg_register msg;
    uint32_t next; /* the chunk that the next one begins with */
    struct conn_fds fds;
};

/* Somebody who waits for a reply, on the waiter's stack; listed in `requests`, under `lock`. */
struct request {
    struct request *next;
    uint32_t seq, op;
    enum msg_kind reply_kind;
    void *reply;
    struct sage_buffer
        *buffer;    /* REGISTER, UNREGISTER: listed and unlisted along with the request */
    bool more;      /* REGISTER: it takes another packet, */
    uint64_t only;  /* and that one goes to the connection of the first; 0: to any */
    uint64_t epoch; /* the connection on which it was sent */
    bool over;
    int status;
    char text[PROTO_TEXT_MAX];
};

struct sage_client {
    struct sage_client *next, **prev; /* all clients of this process, for fork; clients_lock */
    char *path;                       /* of the socket; the one chosen at first, for good */
    char name[PROTO_NAME_MAX];
    uint32_t priority;
    int retry_ms;
    bool forked; /* set in a fork child only */

    struct sage_page *page;
    int page_fd;
    int event; /* an eventfd: look at `stop` and `link` */
    _Atomic bool stop;
    pthread_t reader;

    _Atomic uint64_t link;
    int fd; /* the connection; the number stays, so a late send meets no foreign descriptor */
    struct conn conn;            /* the receiving side; see above for its owner */
    char reason[PROTO_TEXT_MAX]; /* why the daemon is about to throw us out; the reader's */
    struct msg_done done;        /* scratch of the reader */
    uint64_t boot;               /* of the daemon that has our jobs; conn's owner */
    _Atomic uint32_t credits;    /* jobs in flight that it allows */

    /* Held for encoding and sending, never while waiting for the daemon's work. */
    pthread_mutex_t submit_lock;
    uint32_t seq, in_flight;
    struct msg_submit submit;
    unsigned char out[PROTO_PACKET_MAX];
    _Atomic(struct sage_lane *) lanes[SAGE_LANES]; /* each written once */

    /* Held for looking things up, never while sending or waiting; the inner one of the two. */
    pthread_mutex_t lock;
    pthread_cond_t changed; /* a request or a DONE came in, `link` changed, a lane became free */
    struct request *requests;
    struct sage_buffer **buffers; /* by address; the pointers are the callers' */
    uint32_t n_buffers, buffers_capacity, last_buffer;
    uint32_t runners;                     /* threads in a call that hold a lane for its time */
    uint64_t turns;                       /* lanes that were ever taken */
    struct stream_error lost[SAGE_LANES]; /* the last of n_lost ones */
    uint32_t n_lost;
    uint64_t epoch; /* counts connections */
    struct msg_welcome welcome;
    struct gpu gpu;
};

static inline enum link_state client_state(const struct sage_client *client)
{
    return LINK_STATE(atomic_load(&client->link));
}

/* The number of the last job. */
static inline uint32_t lane_tail(const struct sage_lane *lane)
{
    return (uint32_t)atomic_load(&lane->tail);
}

/* Has there been a job n, and is its entry still its own? */
static inline bool lane_has(const struct sage_lane *lane, uint32_t n)
{
    uint64_t tail = atomic_load(&lane->tail);
    uint32_t later = (uint32_t)tail - n;

    return later < SAGE_ENTRIES && later < tail;
}

static inline bool lane_released(const struct sage_lane *lane, uint32_t n)
{
    return page_reached(page_load(&lane->words->release[n % SAGE_ENTRIES]), n);
}

/* --- client.c --- */

int client_alien(void); /* SAGE_EFORK, with its text */

/*
 * Give a descriptor that is kept for long a number above the process's soft RLIMIT_NOFILE, which is
 * for what the process opens. Where there is none above, it may be one of the lower half; otherwise
 * it is closed, *fd -1: SAGE_ENOMEM.
 */
int client_put_away(int *fd);

/*
 * Send a request and wait for its reply. SAGE_ELOST: it was sent, and the connection broke before
 * the reply came; by now there is a new one, or none (LINK_LOST).
 */
int client_call(struct sage_client *client, enum msg_kind kind, const void *msg,
                const struct conn_fds *fds, struct request *request);

/* With submit_lock held: in state LOST, try once to connect. SAGE_EBUSY: the daemon still runs jobs
 * of this client's last connection. */
int client_revive(struct sage_client *client);

/* --- reader.c --- */

void *reader_main(void *client);
/* Connect, say hello, register the buffers. For the owner of conn. */
int reader_attach(struct sage_client *client);
/* Make the new connection the one that is sent to. For the owner of conn. */
int reader_install(struct sage_client *client);
/* Fail a job that no daemon has; all jobs that are not over, once there is no reader any more. */
void reader_fail(struct sage_lane *lane, uint32_t n, const char *text);
void reader_fail_all(struct sage_client *client, const char *text);

/* --- buffer.c --- */

/* With `lock` held. */
int buffer_list(struct sage_buffer *buffer);
void buffer_unlist(struct sage_buffer *buffer);
/* The listed buffer with the least id above `id`, or NULL. */
struct sage_buffer *buffer_after(struct sage_client *client, uint32_t id);

/* Replace the address of a tensor by the buffer it is in and its offset. SAGE_EBUFFER,
 * SAGE_EBOUNDS. */
int buffer_resolve(struct sage_client *client, const char *name, struct sage_tensor *tensor);
/* Is this address in memory that is mapped here and registered? */
bool buffer_is_host(struct sage_client *client, const void *data);

/* Register it under a new id. When that fails the caller discards the buffer. */
int buffer_add(struct sage_buffer *buffer);

/* With `lock` held: close its descriptors, before it goes or in a fork child. */
void buffer_close(struct sage_buffer *buffer);
/* Unmap and free, without telling anybody. */
void buffer_discard(struct sage_buffer *buffer);

/* The packet that begins with chunk `first`. */
void part_take(const struct sage_buffer *buffer, uint32_t first, struct part *part);

/* --- lane.c --- */

/* With `lock` held: note the first error among jobs that are over, up to the last one of these. */
void lane_look(struct sage_lane *lane, uint32_t last);
/* A call returned the job's status, so sage_stream_error() need not tell it. */
void lane_set_returned(struct sage_job job);

/*
 * With `lock` held: what sage_stream_error() is to say of the stream, whether it has a lane still
 * or had one; once. 0, or the status and what is to be known of it in text[PROTO_TEXT_MAX].
 */
int lane_stream_error(struct sage_client *client, uint64_t stream, char *text);

/*
 * A lane for one call: the stream's, or any (0). If other calls and other streams' jobs have them
 * all, the next that comes free.
 */
int lane_take(struct sage_client *client, uint64_t stream, struct sage_lane **lane);
void lane_put(struct sage_lane *lane);

/*
 * After SAGE_EBUSY: was the lane full? Then its oldest job is over now, however long it took. Or
 * are all credits used? Then it is to be tried again.
 */
bool lane_drained(struct sage_lane *lane, int status);

/*
 * Submit; gpu: NULL, or where the tensors are. With gpu->view the lane is the caller's alone, and
 * its stream is going to store the acquire word.
 */
int lane_submit(struct sage_lane *lane, const struct sage_attn *attn, unsigned flags,
                struct gpu_job *gpu, struct sage_job *job);

/* Until when a call tries again, and the time until its next try. */
struct patience {
    int64_t deadline;
    long nap_us;
};
struct patience patience_begin(const struct sage_client *client);
/* May it, after this status? Then it has slept. */
bool patience_lasts(struct patience *patience, int status);

/* Submit and wait for it, again and again while that helps. */
int lane_run(struct sage_client *client, const struct sage_attn *attn, struct gpu_job *gpu,
             struct sage_times *times, struct patience *patience);

#endif
