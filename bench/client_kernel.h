/*
 * client_kernel.h - what handoff_gpu has for a kernel of the client's.
 */
#ifndef SAGE_CLIENT_KERNEL_H
#define SAGE_CLIENT_KERNEL_H

#include <stdint.h>

#ifdef __cplusplus
extern "C" {
#endif

struct CUstream_st;

/* A kernel of one thread that adds 1 to a word of device memory. A cudaError_t. */
int client_kernel(uint64_t *word, struct CUstream_st *stream);

#ifdef __cplusplus
}
#endif
#endif
