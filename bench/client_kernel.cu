/*
 * client_kernel.cu - what handoff_gpu has for a kernel of the client's.
 */
#include <cuda_runtime_api.h>

#include "client_kernel.h"

static __global__ void add_kernel(uint64_t *word)
{
    *word += 1;
}

int client_kernel(uint64_t *word, struct CUstream_st *stream)
{
    add_kernel<<<1, 1, 0, stream>>>(word);
    return cudaGetLastError();
}
