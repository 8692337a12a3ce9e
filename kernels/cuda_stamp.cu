/*
 * cuda_stamp.cu - the end of a piece: what a stream writes into host memory behind it.
 *
 * A kernel starts when all kernels before it in its stream are over and their writes are visible:
 * that, and no fence of theirs, is what `release` and `done` rest on.
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

/* Whoever sees the word sees all that this thread has stored before. */
__device__ void publish(volatile uint32_t *word, uint32_t value)
{
    __threadfence_system();
    *word = value;
}

__global__ void stamp_end_kernel(volatile sage_cuda_stamp *stamp)
{
    volatile uint32_t *const status = stamp->status, *const release = stamp->release;
    const uint32_t number = stamp->number;

    stamp->end_ns = globaltimer();
    if (release) {
        *status = 0;
        publish(release, number);
    }
    publish(&stamp->done, 1);
}

} // namespace

int sage_cuda_stamp_load(void)
{
    cudaFuncAttributes unused;

    return cudaFuncGetAttributes(&unused, reinterpret_cast<const void *>(stamp_end_kernel));
}

int sage_cuda_stamp_end(struct sage_cuda_stamp *stamp, struct CUstream_st *stream)
{
    void *args[] = {&stamp};

    return cudaLaunchKernel(reinterpret_cast<const void *>(stamp_end_kernel), dim3(1), dim3(1),
                            args, 0, stream);
}
