/*
 * cuda_stamp.h - times and completion words that a stream writes into host memory.
 *
 * All return a cudaError_t. The memory is pinned and mapped (cudaHostAlloc()).
 */
#ifndef SAGE_CUDA_STAMP_H
#define SAGE_CUDA_STAMP_H

#include <stdint.h>

#ifdef __cplusplus
extern "C" {
#endif

struct CUstream_st;

/* What happened around the work between sage_cuda_stamp_start() and sage_cuda_stamp_end(). */
struct sage_cuda_stamp {
    uint64_t start_ns, end_ns; /* %globaltimer: nanoseconds of the device's clock; never 0 */
    uint32_t done;             /* 1, after all the rest */
};

/* Load the kernels: a first launch must not wait for what the stream waits for. */
int sage_cuda_stamp_load(void);

/* The stream writes the time to *ns_word when it comes here. */
int sage_cuda_stamp_start(uint64_t *ns_word, struct CUstream_st *stream);
/* The stream writes end_ns, then done, when all before is done and can be seen by everybody. */
int sage_cuda_stamp_end(struct sage_cuda_stamp *stamp, struct CUstream_st *stream);

#ifdef __cplusplus
}
#endif
#endif
