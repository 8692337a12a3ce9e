/*
 * gpu.h - inside libsageclient: device memory, and jobs that are part of a CUDA stream.
 *
 * No lock is held while the driver is called: it may wait there for as long as the program's own
 * work takes. The exception is the stream that a call was given: who enqueues owns it for the call.
 */
#ifndef SAGE_GPU_H
#define SAGE_GPU_H

#include <pthread.h>

#include "client/cache.h"
#include "client/conn.h"
#include "client/driver.h"
#include "client/sageclient.h"

/* The tensors of a problem, in the order of struct sage_attn. */
enum { TENSOR_Q, TENSOR_K, TENSOR_V, TENSOR_O, TENSOR_MASK, TENSOR_LSE, N_TENSORS };
extern const char *const tensor_names[N_TENSORS];
struct sage_tensor *tensor_of(struct sage_attn *attn, int i);

/* An event of ours, known to the daemon by its handle. */
struct own_event {
    struct own_event *next;
    uint32_t id;
    uint64_t epoch; /* the connection on which it is known */
    bool taken;
    struct context context;
    struct CUevent_st *event;
    struct cu_handle handle;
};

/* An event of the daemon's, opened here; daemons use the same ids, the epoch tells them apart. */
struct their_event {
    struct their_event *next;
    uint32_t id;
    uint64_t epoch;
    struct context context;
    struct CUevent_st *event; /* NULL: it could not be opened */
};

/* The session page for streams of one context. Once listed it does not change. */
struct page_view {
    struct page_view *next;
    struct context context;
    struct sage_page *page;   /* the mapping that CUDA knows */
    uint64_t device;          /* its address for streams; 0: they cannot use it, */
    char why[PROTO_TEXT_MAX]; /* for this reason */
};

/*
 * Device memory of our own, for tensors in memory that cannot be shared. A job has it for the time
 * of its call; what the streams still do with it by then is before `passed`.
 */
struct stage_block {
    bool taken;
    struct sage_buffer *buffer; /* NULL: there is no memory */
    uint64_t base;
    size_t bytes;
    struct context context; /* of all that follows */
    struct CUevent_st *passed;
    struct CUstream_st *own;  /* for calls that have no stream */
    struct CUstream_st *last; /* the stream that had it last */
};

enum { STAGE_BLOCKS = 2 };

/* A client's part here. Under `lock`, except for what is set once by gpu_init(). */
struct gpu {
    enum sage_mode asked;    /* set once */
    bool staging;            /* set once */
    uint64_t cap;            /* 0: an eighth of the device, when that is known */
    enum sage_mode in_force; /* of the last job of a stream; AUTO: there was none */
    uint64_t no_events;      /* the connection on which events turned out not to work */
    struct context same;     /* a context of the daemon's device, */
    int same_device;         /* which is this one, */
    uint64_t same_epoch;     /* on this connection */
    struct cache cache;
    bool used;     /* the driver has given us something */
    bool watching; /* there is a watcher */
    pthread_t watcher;
    pthread_cond_t tick; /* wakes the watcher */
    struct own_event *own;
    struct their_event *theirs;
    uint32_t n_own, last_event; /* how many there are; the id of the last that was made */
    struct page_view *views;
    uint32_t n_views; /* how many were ever begun */
    struct stage_block blocks[STAGE_BLOCKS];
};

/* Where one tensor is for the daemon. */
struct place {
    bool set; /* otherwise in a memfd, to be found by its address */
    bool staged;
    uint32_t buffer;
    uint64_t offset;       /* in the buffer, which has all of it */
    struct cached *cached; /* pinned, unless staged */
};

/* A problem on its way from device memory to the daemon; on the stack of who submits it. */
struct gpu_job {
    struct sage_client *client;
    const struct driver *cu;
    struct sage_attn attn;   /* checked; tensors that are staged lie in the block */
    struct sage_attn theirs; /* as the caller has it */
    struct place places[N_TENSORS];
    struct stage_block *block;    /* NULL: nothing is staged */
    uint64_t staged;              /* bytes copied, both ways */
    uint32_t event;               /* that the inputs are behind; 0: none */
    const struct page_view *view; /* the stream tells and waits in the page; NULL: the CPU does */
    struct memory seen;           /* what was asked for last, see describe() */
    struct CUstream_st *stream;
    struct context context; /* current */
    bool pushed;            /* by us */
    int device, capture_mode;
};

/* --- gpu.c --- */

/* Of the options and the environment. SAGE_EINVAL names what it does not understand. */
int gpu_init(struct sage_client *client, const struct sage_connect_options *options);
/* Which of several daemons: its socket. */
int gpu_choose(struct sage_client *client, const struct sage_connect_options *options);

/* Does the daemon have a GPU? Then all problems go by a gpu_job. */
bool gpu_is_there(struct sage_client *client);

/* A stream to give to gpu_begin(): none, the inputs are ready. */
#define GPU_NO_STREAM ((struct CUstream_st *)UINTPTR_MAX)

/*
 * Check the problem, make the context current, register what its tensors lie in. After success and
 * the submission gpu_end(); jobs that use the registrations by then hold them.
 */
int gpu_begin(struct gpu_job *job, struct sage_client *client, const struct sage_attn *attn,
              struct CUstream_st *stream, bool may_stage);
/*
 * SAGE_ECAPTURE: the stream is being captured. To be asked before the driver is asked anything else
 * of it but its context: cuStreamGetId() makes a capture invalid, and so do most others.
 */
int gpu_check_stream(const struct driver *cu, struct CUstream_st *stream);
/* The job was submitted: its registrations stay until it is over. */
void gpu_submitted(struct gpu_job *job, struct sage_job submitted);
void gpu_end(struct gpu_job *job);

/* --- view.c --- */

/* The page for streams of the job's context; made, and tried out, when it is first asked for. */
int view_get(struct gpu_job *job, const struct page_view **view);
/* The address of a word of the page. */
uint64_t view_word(const struct page_view *view, const struct sage_client *client,
                   const uint32_t *word);
/* All jobs are released: wait for the contexts' streams, and take the page from them. */
void views_finish(struct sage_client *client, const struct driver *cu);
/* Unmap and free, in a fork child too. */
void views_destroy(struct sage_client *client);

/* --- register.c --- */

/* The entry for these spans, which the daemon has then; pinned. ipc: it is one allocation. */
int gpu_acquire(struct gpu_job *job, const struct span *spans, uint32_t n_spans, bool ipc,
                struct cached **cached);
/*
 * The entry of an allocation that has all these bytes, pinned, if the driver says that it is still
 * the same. NULL: look closer. It is of the daemon's device, as all that is registered.
 */
struct cached *gpu_recall(struct gpu_job *job, uint64_t address, uint64_t bytes);
/* Unregister what is stale, and what is beyond the cap; not what is in use. */
void gpu_evict(struct sage_client *client, uint64_t cap);
/* End the watcher, let go of what the driver gave us. The connection is gone by now. */
void gpu_finish(struct sage_client *client);
/* Free what is left, in a fork child too. */
void gpu_destroy(struct sage_client *client);

/* --- stage.c --- */

/*
 * How a tensor is copied to a dense one and back: rows of `width` bytes, repeated along up to three
 * dimensions, the inner first. No CUDA in it.
 */
struct stage_plan {
    size_t width, bytes; /* bytes: of the dense tensor */
    int n;
    struct {
        size_t extent, step, dense; /* step, dense: bytes from one to the next */
    } dim[3];
    int64_t stride[4]; /* of the dense tensor, elements */
};

/* One copy that CUDA can do at once; steps in bytes: from row to row, from slice to slice. */
struct stage_box {
    size_t width, height, depth;
    size_t offset, row, slice;                   /* of the caller's tensor */
    size_t dense_offset, dense_row, dense_slice; /* of the dense one */
};

/* false: it has no such form (a dimension repeats others' elements), and its span is copied. */
bool stage_plan(const struct sage_tensor *tensor, struct stage_plan *plan);
/* Cut into boxes: each(arg, box) until one does not return 0. */
int stage_boxes(const struct stage_plan *plan, int (*each)(void *arg, const struct stage_box *box),
                void *arg);

/* Take a block for the places that are `staged`, copy the inputs there on the stream. */
int stage_in(struct gpu_job *job);
/* Copy the outputs back, on the stream. */
int stage_out(struct gpu_job *job);
/* Give the block back; the stream may still work with it. */
void stage_end(struct gpu_job *job);
/* Free blocks that nothing works with; all: also the others, waiting for them. */
void stage_trim(struct sage_client *client, const struct driver *cu, bool all);

/* --- enqueue.c --- */

/* sage_attn_run() where the daemon has a GPU. */
int gpu_run(struct sage_client *client, const struct sage_attn *attn, struct sage_times *times);

/* The reader's: make the events known to a new daemon. The connection may be gone afterwards. */
int events_register(struct sage_client *client);
void events_finish(struct sage_client *client, const struct driver *cu);

#endif
