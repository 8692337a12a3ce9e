/*
 * cuda_stamp.cu - times and completion words that a stream writes into host memory.
 *
 * A kernel starts when all kernels before it in its stream are over and their writes are visible:
 * that, and no fence of theirs, is what `done` rests on.
 */
#include <cuda_runtime_api.h>

#include "cuda_stamp.h"

namespace
{

__device__ uint64_t globaltimer()
{
    uint64_t ns;

    asm volatile("mov.u64 %0, %%globaltimer;" : "=l"(ns));
    return ns;
}

__global__ void stamp_start_kernel(volatile uint64_t *ns_word)
{
    *ns_word = globaltimer();
}

__global__ void stamp_end_kernel(volatile sage_cuda_stamp *stamp)
{
    stamp->end_ns = globaltimer();
    __threadfence_system(); /* the host must not see `done` before it */
    stamp->done = 1;
}

} // namespace

int sage_cuda_stamp_load(void)
{
    cudaFuncAttributes unused;
    cudaError_t rc =
        cudaFuncGetAttributes(&unused, reinterpret_cast<const void *>(stamp_start_kernel));

    if (rc == cudaSuccess)
        rc = cudaFuncGetAttributes(&unused, reinterpret_cast<const void *>(stamp_end_kernel));
    return rc;
}

int sage_cuda_stamp_start(uint64_t *ns_word, struct CUstream_st *stream)
{
    void *args[] = {&ns_word};

    return cudaLaunchKernel(reinterpret_cast<const void *>(stamp_start_kernel), dim3(1), dim3(1),
                            args, 0, stream);
}

int sage_cuda_stamp_end(struct sage_cuda_stamp *stamp, struct CUstream_st *stream)
{
    void *args[] = {&stamp};

    return cudaLaunchKernel(reinterpret_cast<const void *>(stamp_end_kernel), dim3(1), dim3(1),
                            args, 0, stream);
}
