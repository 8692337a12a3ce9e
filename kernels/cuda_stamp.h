/*
 * cuda_stamp.h - times and completion words that a stream writes into host memory.
 *
 * All return a cudaError_t. The memory is pinned and mapped (cudaHostAlloc()).
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

/* What happened around the work between its first kernel and sage_cuda_stamp_end(). */
struct sage_cuda_stamp {
    uint64_t start_ns, end_ns; /* %globaltimer: nanoseconds of the device's clock; never 0 */
    uint32_t done;             /* 1, after all the rest */
};

/* Load the kernels: a first launch must not wait for what the stream waits for. */
int sage_cuda_stamp_load(void);

/*
 * sage_attn_cuda(), whose first kernel writes the time to *start_ns, device memory or mapped host
 * memory; nothing is written where there is nothing to compute. A sage_status.
 */
int sage_attn_cuda_stamped(const struct sage_attn *attn, const struct sage_part *part,
                           void *workspace, size_t bytes, uint64_t *start_ns,
                           struct CUstream_st *stream, char *why, size_t len);
/* The stream writes end_ns, then done, when all before is done and can be seen by everybody. */
int sage_cuda_stamp_end(struct sage_cuda_stamp *stamp, struct CUstream_st *stream);

#ifdef __cplusplus
}
#endif
#endif
