/*
 * cuda_stamp.cu - around a piece: what its stream waits for, what it writes into host memory.
 *
 * The kernel at the end goes on when all kernels before it in its stream are over and their writes
 * are visible: that, and no fence of theirs, is what `release` and `done` rest on.
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

/* It is over before any other kernel of the piece begins: none of them starts earlier. */
__global__ void gate_kernel(volatile sage_cuda_stamp *stamp, uint32_t *go)
{
    const volatile uint32_t *const acquire = stamp->acquire;
    const uint32_t number = stamp->number;
    const uint64_t until = globaltimer() + stamp->wait_ns;
    const auto reached = [&] { return static_cast<int32_t>(*acquire - number) >= 0; };
    bool is = reached(); /* page_reached() */

    if (!is) {
        while (!is && globaltimer() < until)
            is = reached();
        stamp->ready_ns = globaltimer();
    }
    __threadfence_system();
    *go = is;
    stamp->missed = !is;
}

/*
 * On Hopper it may start before the kernel before it is over, so that it has done all that it can
 * do before by then. A job's status says nothing until the job is released.
 */
__global__ void stamp_end_kernel(volatile sage_cuda_stamp *stamp)
{
    volatile uint32_t *const status = stamp->status;
    volatile uint32_t *release = stamp->release;
    const uint32_t number = stamp->number;

    if (stamp->missed)
        release = nullptr;
    if (release) {
        *status = 0;
        __threadfence_system();
    }
#if __CUDA_ARCH__ >= 900
    cudaGridDependencySynchronize();
#endif
    stamp->end_ns = globaltimer();
    if (release)
        publish(release, number);
    publish(&stamp->done, 1);
}

} // namespace

int sage_cuda_stamp_load(int *code)
{
    cudaFuncAttributes attributes = {};
    const cudaError_t rc =
        cudaFuncGetAttributes(&attributes, reinterpret_cast<const void *>(stamp_end_kernel));

    *code = attributes.ptxVersion;
    return rc ? rc
              : cudaFuncGetAttributes(&attributes, reinterpret_cast<const void *>(gate_kernel));
}

int sage_cuda_stamp_gate(struct sage_cuda_stamp *stamp, uint32_t *go, struct CUstream_st *stream)
{
    gate_kernel<<<1, 1, 0, stream>>>(stamp, go);
    return cudaGetLastError();
}

int sage_cuda_stamp_end(struct sage_cuda_stamp *stamp, int code, struct CUstream_st *stream)
{
    cudaLaunchAttribute early = {};
    cudaLaunchConfig_t config = {};
    void *args[] = {&stamp};

    early.id = cudaLaunchAttributeProgrammaticStreamSerialization;
    early.val.programmaticStreamSerializationAllowed = 1;
    config.gridDim = config.blockDim = dim3(1);
    config.stream = stream;
    config.attrs = &early;
    config.numAttrs = code >= 90; /* older code does not wait */
    return cudaLaunchKernelExC(&config, reinterpret_cast<const void *>(stamp_end_kernel), args);
}
