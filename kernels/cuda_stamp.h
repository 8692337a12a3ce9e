/*
 * cuda_stamp.h - what a stream reads and writes in host memory around a piece: whether its inputs
 * are ready, times, a completion word, the release of a job.
 *
 * All return a cudaError_t, if they do not say otherwise. The memory is pinned and mapped.
 */
#ifndef SAGE_CUDA_STAMP_H
#define SAGE_CUDA_STAMP_H

#include <stddef.h>
#include <stdint.h>

#ifdef __cplusplus
extern "C" {
#endif

struct CUstream_st;
struct sage_attn;
struct sage_part;

/*
 * What happened around the work between its first kernel and sage_cuda_stamp_end(); and, set before
 * that work is launched, what is to be stored in a client's page then, at addresses of the device.
 * So all that differs from one launch to the next of the same work lies here.
 */
struct sage_cuda_stamp {
    uint64_t start_ns, end_ns;  /* %globaltimer: nanoseconds of the device's clock; never 0 */
    uint32_t done;              /* 1, after all the rest */
    uint32_t number;            /* for *release; 0 is for *status */
    uint32_t *status, *release; /* NULL: nothing is */
    /* For sage_cuda_stamp_gate(): a word of the page, which is to reach `number`, and how long. */
    const uint32_t *acquire;
    uint64_t wait_ns;
    uint64_t ready_ns; /* when it did, if that was not so at once */
    uint32_t missed;   /* 1: it did not; nothing was computed, or stored in the page */
};

/*
 * Load the kernels: a first launch must not wait for what the stream waits for. *code: the compute
 * capability, as 90, that all that runs here was compiled for; at most the device's.
 */
int sage_cuda_stamp_load(int *code);

/*
 * In front of a piece whose inputs should be ready any moment: the stream waits for them, wait_ns
 * at most. Then *go, device memory, is 1, or 0 if they are not.
 */
int sage_cuda_stamp_gate(struct sage_cuda_stamp *stamp, uint32_t *go, struct CUstream_st *stream);
/*
 * sage_attn_cuda(), whose first kernel writes the time to *start_ns, device memory or mapped host
 * memory; nothing is written where there is nothing to compute. go: device memory; where there is 0
 * the kernels leave at once and nothing is written either. NULL: they do not. A sage_status.
 */
int sage_attn_cuda_stamped(const struct sage_attn *attn, const struct sage_part *part,
                           void *workspace, size_t bytes, uint64_t *start_ns, const uint32_t *go,
                           struct CUstream_st *stream, char *why, size_t len);
/*
 * When all before is done and can be seen by everybody, the stream writes: *status, then *release,
 * and last of all done. end_ns is the time before that.
 */
int sage_cuda_stamp_end(struct sage_cuda_stamp *stamp, int code, struct CUstream_st *stream);

#ifdef __cplusplus
}
#endif
#endif
