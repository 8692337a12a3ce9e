/*
 * proto.h - messages between clients and daemon, and their codec: struct <-> msgpack, no I/O.
 *
 * One SOCK_SEQPACKET packet is one msgpack value: [op, seq, {key: value, ...}]. docs/protocol.md
 * has every key; proto.c has one table per message, from which both directions are made.
 */
#ifndef SAGE_PROTO_H
#define SAGE_PROTO_H

#include <sys/types.h>

#include "kernels/sageattn.h"

enum {
    PROTO_MAJOR = 1,          /* differs: refused */
    PROTO_MINOR = 1,          /* differs: the older side's messages are understood */
    PROTO_PACKET_MAX = 65536, /* bytes of one packet */
    PROTO_DEPTH_MAX = 6,      /* nesting of one packet */
    PROTO_FDS_MAX = 32,       /* descriptors that ride on one packet */
    PROTO_HANDLE_MAX = 64,    /* bytes of a CUDA IPC handle */
    PROTO_NAME_MAX = 64,      /* bytes of a name, with its NUL */
    PROTO_TEXT_MAX = 192,     /* bytes of an error text, with its NUL */
};

/* X(NAME, number): requests are answered by the same op, or by ERROR; SUBMIT by DONE alone. */
#define PROTO_OPS(X)                                                                               \
    X(HELLO, 1)                                                                                    \
    X(REGISTER, 2)                                                                                 \
    X(UNREGISTER, 3)                                                                               \
    X(SUBMIT, 4)                                                                                   \
    X(CANCEL, 5)                                                                                   \
    X(STATS, 6)                                                                                    \
    X(CLIENTS, 7)                                                                                  \
    X(PING, 8)                                                                                     \
    X(DRAIN, 9)                                                                                    \
    X(EVENT, 10)                                                                                   \
    X(WAITED, 11)                                                                                  \
    X(DONE, 32)     /* daemon to client: jobs that are over; seq is 0 */                           \
    X(ERROR, 33)    /* daemon to client: the request with this seq failed */                       \
    X(LAUNCHED, 34) /* daemon to client: an event is recorded behind the job; seq is 0 */

enum proto_op {
#define PROTO_OP_ENUM(name, number) OP_##name = number,
    PROTO_OPS(PROTO_OP_ENUM)
#undef PROTO_OP_ENUM
};

const char *proto_op_name(uint32_t op);

enum buffer_kind {
    BUFFER_MEMFD = 1,    /* a memfd sealed against shrinking; host memory */
    BUFFER_CUDA_IPC = 2, /* a cudaIpcMemHandle_t: the whole allocation, from its base */
    BUFFER_VMM = 3,      /* descriptors of cuMemExportToShareableHandle(), mapped in a row */
};

/* How a client may hand over its jobs: bits of msg_welcome.modes. */
enum mode {
    MODE_SYNC = 1,  /* the CPU sets acquire and waits for release */
    MODE_EVENT = 2, /* CUDA IPC events before and behind the job */
    MODE_LANES = 4, /* the client's stream writes acquire and waits for release */
};

enum priority { PRIORITY_LOW, PRIORITY_NORMAL, PRIORITY_HIGH };

/* --- requests --- */

struct msg_hello {
    uint32_t major, minor;
    uint32_t priority;         /* enum priority */
    uint64_t pid;              /* as the client sees itself; the daemon trusts SO_PEERCRED */
    char name[PROTO_NAME_MAX]; /* for statistics */
    char library[PROTO_NAME_MAX];
    bool page; /* a session page rides on the packet; without: no jobs */
};

struct msg_register {
    uint32_t buffer; /* the client's choice, not 0 */
    uint32_t kind;   /* enum buffer_kind; memfd and vmm: descriptors ride on the packet */
    uint64_t size;   /* bytes that the client means to use */
    uint32_t n_handle;
    uint8_t handle[PROTO_HANDLE_MAX]; /* cuda_ipc */
    uint32_t n_chunks;
    uint64_t chunks[PROTO_FDS_MAX]; /* vmm: bytes of each, in the order of their descriptors */
    bool more;                      /* vmm: the next REGISTER of this buffer goes on */
};

enum { CHUNKS_MAX = 8192, EVENTS_MAX = 256 }; /* of one buffer; of one client */

struct msg_unregister {
    uint32_t buffer;
};

struct msg_submit {
    uint32_t lane, number;
    bool prompt;     /* report at once, not with the next DONE_BATCH jobs or after DONE_DELAY_MS */
    uint32_t event;  /* the inputs are ready when this event of the client's is done; 0: none */
    uint64_t staged; /* bytes that the client copied, for their memory cannot be shared */
    bool streamed;   /* a stream of the client's stores acquire and waits for release */
    struct sage_attn attn;             /* decoded: its offsets point to the arrays below */
    uint32_t n_q_offsets, n_k_offsets; /* elements used: attn.n_seqs + 1, or 0 */
    int32_t q_offsets[SAGE_MAX_SEQS + 1], k_offsets[SAGE_MAX_SEQS + 1];
};

struct msg_cancel {
    uint32_t lane, number;
};

struct msg_event {
    uint32_t event; /* the client's choice, not 0 */
    uint32_t n_handle;
    uint8_t handle[PROTO_HANDLE_MAX]; /* cudaIpcEventHandle_t */
};

struct msg_waited {
    uint32_t event; /* of msg_launched: the wait for it is queued, so it may be used again */
};

struct msg_clients {
    uint64_t after; /* list clients with larger ids */
};

struct msg_empty {
    char unused;
};

/* --- replies --- */

struct msg_welcome {
    uint32_t major, minor;
    uint32_t jobs;      /* credits: jobs in flight, */
    uint64_t bytes;     /* bytes mapped, */
    uint32_t buffers;   /* buffers registered */
    uint64_t pid, boot; /* boot: drawn at random at each start of the daemon */
    char version[PROTO_NAME_MAX];
    char backend[PROTO_NAME_MAX];
    char device[PROTO_NAME_MAX];
    char uuid[PROTO_NAME_MAX]; /* "GPU-" and 36 characters; empty on the CPU */
    uint32_t modes;            /* enum mode: those that this daemon can do */
};

struct msg_registered {
    uint32_t buffer;
    uint64_t size; /* bytes, as the daemon found it */
};

struct msg_canceled {
    bool canceled; /* false: it runs or is over, and its own status tells */
};

struct msg_done_job {
    uint32_t lane, number;
    uint32_t status;           /* 0 or the number of a SAGE_E* */
    uint64_t queue_ns, run_ns; /* from runnable to started; computing */
    char text[PROTO_TEXT_MAX]; /* empty unless status */
};

enum { DONE_MAX = 64, DONE_BATCH = 64, DONE_DELAY_MS = 5, CLIENTS_MAX = 64, KERNELS_MAX = 32 };

struct msg_done {
    uint32_t n_jobs;
    struct msg_done_job jobs[DONE_MAX];
};

struct msg_launched {
    uint32_t lane, number;
    uint32_t event; /* the daemon's number for it, until WAITED */
    uint32_t n_handle;
    uint8_t handle[PROTO_HANDLE_MAX]; /* cudaIpcEventHandle_t */
};

struct msg_error {
    uint32_t status;
    char text[PROTO_TEXT_MAX];
};

struct msg_client {
    uint64_t id, pid, uid;
    char name[PROTO_NAME_MAX];
    uint32_t priority;
    uint64_t age_ns;
    uint32_t queued, running; /* jobs */
    uint64_t done, failed;    /* jobs */
    double ops;               /* operations done */
    uint64_t run_ns;          /* measured time of its jobs */
    uint32_t buffers;
    uint64_t mapped_bytes;
    char mode[PROTO_NAME_MAX]; /* of its last job: "cpu", "sync", "event", "lane"; or empty */
    double queue_p99_us;       /* of its last thousand jobs or two: inputs ready to started */
};

struct msg_client_list {
    uint32_t n_clients;
    struct msg_client clients[CLIENTS_MAX];
    bool more;
};

struct msg_kernel {
    char name[PROTO_NAME_MAX];
    uint64_t jobs, run_ns;
    double ops;
};

/*
 * STATS: X(type, key, unit, help). Counters only grow; gauges are as of now. This list makes the
 * reply's struct and codec, sagectl's JSON and its Prometheus text.
 */
#define PROTO_STATS(X)                                                                             \
    X(U64, uptime_ns, gauge, "nanoseconds since the daemon started")                               \
    X(U32, clients, gauge, "connected clients")                                                    \
    X(U64, clients_total, counter, "clients that ever said HELLO")                                 \
    X(U64, clients_dropped, counter,                                                               \
      "connections closed for a protocol violation or a full backlog")                             \
    X(U64, accepted, counter, "jobs accepted")                                                     \
    X(U64, done, counter, "jobs finished with status 0")                                           \
    X(U64, refused, counter, "jobs refused when submitted")                                        \
    X(U64, canceled, counter, "jobs cancelled while queued")                                       \
    X(U64, dropped, counter, "jobs whose client went away")                                        \
    X(U64, failed, counter, "jobs that failed while running")                                      \
    X(U64, ahead, counter, "jobs started before their inputs were seen to be ready")               \
    X(U64, missed, counter, "of these, in vain: started once more when the inputs were ready")     \
    X(F64, ops, counter, "operations done: 4*B*Hq*Nq*Nk*D, masked part not counted")               \
    X(U64, run_ns, counter, "time that jobs ran, summed over slots")                               \
    X(U32, queued, gauge, "jobs waiting")                                                          \
    X(U32, running, gauge, "jobs in slots")                                                        \
    X(F64, queue_p50_us, gauge, "inputs ready to started, median")                                 \
    X(F64, queue_p99_us, gauge, "inputs ready to started, 99th percentile")                        \
    X(F64, queue_p999_us, gauge, "inputs ready to started, 99.9th percentile")                     \
    X(F64, run_p50_us, gauge, "time computing, median")                                            \
    X(F64, run_p99_us, gauge, "time computing, 99th percentile")                                   \
    X(F64, run_p999_us, gauge, "time computing, 99.9th percentile")                                \
    X(F64, total_p50_us, gauge, "inputs ready to released, median")                                \
    X(F64, total_p99_us, gauge, "inputs ready to released, 99th percentile")                       \
    X(F64, total_p999_us, gauge, "inputs ready to released, 99.9th percentile")                    \
    X(U32, slots, gauge, "slots")                                                                  \
    X(U32, slots_used, gauge, "slots with work")                                                   \
    X(U32, slots_peak, gauge, "most slots that ever had work at once")                             \
    X(U64, slot_bytes, gauge, "workspace of one slot")                                             \
    X(U64, workspace_peak, gauge, "most workspace that one piece ever used")                       \
    X(U32, buffers, gauge, "buffers registered")                                                   \
    X(U64, mapped_bytes, gauge, "bytes of client memory mapped here")                              \
    X(U64, staged_bytes, counter, "bytes copied because their memory cannot be shared")

#define PROTO_TYPE_U32 uint32_t
#define PROTO_TYPE_U64 uint64_t
#define PROTO_TYPE_F64 double

struct msg_stats {
#define PROTO_STATS_FIELD(type, key, unit, help) PROTO_TYPE_##type key;
    PROTO_STATS(PROTO_STATS_FIELD)
#undef PROTO_STATS_FIELD
    char state[PROTO_NAME_MAX]; /* "running", "draining" */
    uint32_t n_kernels;
    struct msg_kernel kernels[KERNELS_MAX];
};

/* --- codec --- */

/* The messages that there are: MSG_<NAME> belongs to struct msg_<name>. */
#define PROTO_MESSAGES(X)                                                                          \
    X(HELLO, hello)                                                                                \
    X(REGISTER, register)                                                                          \
    X(UNREGISTER, unregister)                                                                      \
    X(SUBMIT, submit)                                                                              \
    X(CANCEL, cancel)                                                                              \
    X(CLIENTS, clients)                                                                            \
    X(EVENT, event)                                                                                \
    X(WAITED, waited)                                                                              \
    X(EMPTY, empty)                                                                                \
    X(WELCOME, welcome)                                                                            \
    X(REGISTERED, registered)                                                                      \
    X(CANCELED, canceled)                                                                          \
    X(DONE, done)                                                                                  \
    X(LAUNCHED, launched)                                                                          \
    X(ERROR, error)                                                                                \
    X(CLIENT_LIST, client_list)                                                                    \
    X(STATS, stats)

enum msg_kind {
#define PROTO_MSG_ENUM(NAME, name) MSG_##NAME,
    PROTO_MESSAGES(PROTO_MSG_ENUM)
#undef PROTO_MSG_ENUM
};

/*
 * One packet taken apart: the envelope is known to be sound, the body is decoded by
 * packet_decode().
 */
struct packet {
    uint32_t op, seq;
    const void *body; /* msgpack_object of the map, owned by the unpacker */
};

/* Holds the packet that was opened last; one per connection or thread. */
struct unpacker;
struct unpacker *unpacker_create(void); /* NULL: no memory */
void unpacker_destroy(struct unpacker *u);

/*
 * Is this exactly one msgpack value, no deeper than PROTO_DEPTH_MAX, whose counts and lengths, all
 * added up, fit the bytes that are there? Looks at nothing twice and allocates nothing.
 */
bool packet_walk(const void *data, size_t len);

/*
 * Walk and unpack one packet. 0, SAGE_EPROTO or SAGE_ENOMEM with a text in why[PROTO_TEXT_MAX].
 * `out` is good until the next call with the same unpacker, as long as data[len] stays.
 */
int packet_open(struct unpacker *u, const void *data, size_t len, struct packet *out, char *why);

/*
 * Decode the body into the struct of `kind`. 0, or SAGE_EPROTO (SAGE_EUNSUPPORTED for a key that a
 * SUBMIT must not have) with a text that names the key in why[PROTO_TEXT_MAX]; the fields that were
 * read by then are in *msg, the others zero.
 */
int packet_decode(const struct packet *packet, enum msg_kind kind, void *msg, char *why);

/* Encode a packet into buf[size]: its length, or 0 where it does not fit. */
size_t packet_encode(void *buf, size_t size, uint32_t op, uint32_t seq, enum msg_kind kind,
                     const void *msg);

#endif
