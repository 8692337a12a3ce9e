/*
 * backend_cuda.h - what the files of the CUDA backend share.
 *
 *   backend_cuda.c   the device, its streams, pieces
 *   cuda_graph.c     pieces that come again
 *   cuda_share.c     memory and events of other processes
 */
#ifndef SAGE_BACKEND_CUDA_H
#define SAGE_BACKEND_CUDA_H

#include <cuda.h>
#include <cudaTypedefs.h>
#include <cuda_runtime_api.h>
#include <sys/queue.h>

#include "daemon/backend.h"
#include "kernels/cuda_stamp.h"

/* Of the driver, by name and type of version 12.0; nothing here is linked against libcuda. */
#define CUDA_DRIVER(X)                                                                             \
    X(cuGetErrorName, PFN_cuGetErrorName_v6000)                                                    \
    X(cuMemAddressFree, PFN_cuMemAddressFree_v10020)                                               \
    X(cuMemAddressReserve, PFN_cuMemAddressReserve_v10020)                                         \
    X(cuMemGetAddressRange, PFN_cuMemGetAddressRange_v3020)                                        \
    X(cuMemGetAllocationGranularity, PFN_cuMemGetAllocationGranularity_v10020)                     \
    X(cuMemImportFromShareableHandle, PFN_cuMemImportFromShareableHandle_v10020)                   \
    X(cuMemMap, PFN_cuMemMap_v10020)                                                               \
    X(cuMemRelease, PFN_cuMemRelease_v10020)                                                       \
    X(cuMemSetAccess, PFN_cuMemSetAccess_v10020)                                                   \
    X(cuMemUnmap, PFN_cuMemUnmap_v10020)                                                           \
    X(cuStreamWriteValue32, PFN_cuStreamWriteValue32_v11070)

/* cuda.h makes macros of some of these names, so members are called otherwise. */
struct cuda_driver {
#define CUDA_DRIVER_MEMBER(name, type) type p_##name;
    CUDA_DRIVER(CUDA_DRIVER_MEMBER)
#undef CUDA_DRIVER_MEMBER
};

struct completion;

/* A piece on a stream, and what launches it by one call. */
struct graph {
    struct sage_attn attn;
    struct sage_part part;
    bool waits;           /* for the inputs first */
    cudaGraphExec_t exec; /* NULL: to be recorded. Owned */
    struct sage_cuda_stamp *stamp;
    uint64_t used; /* when, by graphs.clock; 0: it stands for no piece yet */
    bool taken;    /* it is running, or its stamp has not been read */
    bool useless;  /* it cannot be recorded */
};

struct device {
    int ordinal; /* as this process counts */
    int code;    /* compute capability, as 90, that its kernels were compiled for */
    char name[PROTO_NAME_MAX], uuid[PROTO_NAME_MAX];
    size_t total, free;   /* bytes; free: before anything was allocated */
    size_t granularity;   /* of chunks */
    uint64_t slots;       /* that there will be */
    cudaStream_t probe;   /* as good as empty: what a query says of it is said of the context */
    struct graph nothing; /* on `probe`; without exec: there is none */
    int lost;             /* cudaError_t it was lost by, or 0. Any thread, atomically; stays */
    bool releases;        /* kernels can store words in pages of clients */
    uint32_t *bell;       /* device memory, see share_ring(); NULL: it is of no use. Owned */
    int mps;              /* kernels of other processes can run beside ours */
    int64_t clock_ns;     /* CLOCK_MONOTONIC - %globaltimer; INT64_MAX: not known */
    struct cuda_driver cu;
    /* Events of ours: by their numbers, from 1; and those that nobody waits for. Both owned. */
    struct completion **completions;
    uint32_t n_completions;
    STAILQ_HEAD(, completion) idle;
};

/*
 * A call of CUDA or of the driver has failed, whose numbers are the same: is the context lost? Any
 * thread on which the device is current. Logs the error, once.
 */
bool cuda_is_lost(struct device *d, int rc, const char *what);
/*
 * A call has failed: a text, and SAGE_EDEVICE if the context was lost by it, SAGE_ENOMEM, or
 * `status`. Forgets CUDA's last error.
 */
int cuda_error(struct device *d, cudaError_t rc, int status, const char *what, char *why);

/* --- cuda_graph.c --- */

/* Of one stream. NULL: no memory. */
struct graphs *graphs_create(void);
void graphs_destroy(struct graphs *graphs);
/* The piece's graph, if it came before and that does not run; until it is given back (or NULL). */
struct graph *graph_take(struct graphs *graphs, const struct piece *piece);
void graph_put(struct graph *graph);
/*
 * What is launched on the stream between these two is recorded; nothing is launched. cudaError_t.
 * good: it is all there is to the piece.
 */
int graph_begin(struct graph *graph, cudaStream_t stream);
int graph_end(struct graph *graph, cudaStream_t stream, bool good);

/* The device's `nothing`. */
void warm_open(struct device *d);
void warm_close(struct device *d);
/* Launch it, if the last time is over, and where that costs nobody anything. */
void warm(struct device *d, bool running);

/* cuda_share.c: members of backend_cuda, and what open() and close() have to do for them. */
int share_open(struct device *d, char *why);
void share_close(struct device *d);
int share_map(struct device *d, const struct mapping *what, void **base, uint64_t *size, char *why);
void share_unmap(struct device *d, const struct mapping *what, void *base, uint64_t size);
int share_page_open(struct device *d, struct sage_page *page, struct sage_page **remote, char *why);
void share_page_close(struct device *d, struct sage_page *page);
/* Behind what a stream has stored in a page: let the hardware look at once who waits for it. */
void share_ring(struct device *d, cudaStream_t stream);
int share_event_open(struct device *d, const uint8_t handle[PROTO_HANDLE_MAX], void **event,
                     char *why);
void share_event_close(struct device *d, void *event);
int share_event_done(struct device *d, void *event);
/* event_record(), for a stream that all was launched on. */
int share_event_record(struct device *d, cudaStream_t stream, uint32_t *number,
                       uint8_t handle[PROTO_HANDLE_MAX]);
void share_event_put(struct device *d, uint32_t number);

#endif
