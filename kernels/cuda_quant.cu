/*
 * cuda_quant.cu - the two kernels before attention. Both have a block for each chunk of keys of
 * each kv head. The first adds up its chunk, of K in long sequences a sample; the second adds up
 * the chunks' sums, in their order, and quantises, in reverse order: what was read last is still in
 * the L2 cache. Where there is only one chunk the second does both. On Hopper cuda_quant_sm90.cu
 * has one kernel for all that.
 */
#include "cuda_quant.cuh"

using namespace sage;

namespace
{

/* Sequences are of one chunk each: who quantises it can add it up, too. */
__host__ __device__ inline bool is_alone(const cuda_args &a)
{
    return a.chunks.each == 1;
}

/* Sums in the workspace: row `which`, SUM_K to MAX_V, of chunk n of a head and of those after. */
struct global_sums {
    float *first;
    int step;

    __device__ global_sums(const cuda_args &a, const chunk &c, int64_t n, int which)
        : step((a.fp8 ? N_SUMS : 1) * a.d)
    {
        first = a.sums + (c.head * a.chunks.total + n) * step + which * a.d;
    }

    __device__ float *row() const
    {
        return first;
    }

    __device__ void next()
    {
        first += step;
    }
};

template <bool BF16> __device__ void sum_chunk(const cuda_args &a, const chunk &c, room &shared)
{
    const int n = c.end - c.begin;

    if (a.smooth_k)
        sum_k<BF16, 0>(a, sampled_rows<global_rows>({a.k, c}, c.begin, c.seq.nk), n, shared,
                       global_sums(a, c, c.n, SUM_K).row());
    if (a.fp8)
        sum_v<BF16, 0>(a, global_rows(a.v, c), n, shared, global_sums(a, c, c.n, SUM_V).row(), a.d);
}

template <bool BF16>
__global__ void __launch_bounds__(QUANT_THREADS) sum_kernel(const __grid_constant__ cuda_args a)
{
    __shared__ room shared;
    const chunk c = find_chunk(a, blockIdx.x);

    if (begins(a) && c.there)
        sum_chunk<BF16>(a, c, shared);
}

template <int D, bool BF16, bool FP8>
__global__ void __launch_bounds__(QUANT_THREADS, D <= 128 ? 3 : 2)
    quantise_kernel(const __grid_constant__ cuda_args a)
{
    __shared__ k_channels<D> k_ch;
    __shared__ v_channels<FP8 ? D : 1> v_ch;
    __shared__ union {
        room sums;
        __align__(128) char v[FP8 ? KERNEL_TILE_K * 2 * D : 1];
    } shared;
    __shared__ k_tops tops;
    __shared__ unsigned k_max;

#if __CUDA_ARCH__ >= 900
    cudaGridDependencySynchronize();
#endif
    if (!begins(a))
        return;
    /* the last ones first: they are what the kernel before has left in the L2 cache */
    const chunk c = find_chunk(a, gridDim.x - 1 - blockIdx.x);

    if (blockIdx.x == 0 && threadIdx.x == 0)
        *a.ticket = 0;
    if (!c.there)
        return;
    if (threadIdx.x == 0)
        k_max = 0;
    if (is_alone(a)) {
        sum_chunk<BF16>(a, c, shared.sums);
        __syncthreads();
    }
    add_up_k(a, c, k_ch, global_sums(a, c, c.chunk_first, SUM_K));
    if constexpr (FP8)
        add_up_v(a, c, v_ch, global_sums(a, c, c.chunk_first, SUM_V), a.d);
    __syncthreads();
    quantise_k<D, BF16>(a, c, global_rows(a.k, c), k_ch, tops, &k_max);
    if constexpr (FP8) {
        const shared_rows<D> rows = {shared.v};
        uint8_t *to = a.v8 + (c.head * a.blocks.total + c.block) * KERNEL_TILE_K * D;
        for (int key = 0; key < c.end - c.begin; key += KERNEL_TILE_K) {
            const int left = c.end - c.begin - key, n = left < KERNEL_TILE_K ? left : KERNEL_TILE_K;
            rows.fill(a, global_rows(a.v, c).from(key), n);
            copy_commit();
            copy_wait<0>();
            __syncthreads();
            quantise_v<D, BF16>(a, rows, n, v_ch, to + key * D);
            __syncthreads();
        }
    }
    __syncthreads();
    if (threadIdx.x == 0)
        a.k_max[c.head * a.chunks.total + c.n] = __uint_as_float(k_max);
}

/* Every head dimension of a kernel in the table. */
#define QUANT_DIMS(X, bf16) X(64, bf16) X(96, bf16) X(128, bf16) X(192, bf16) X(256, bf16)

template <bool FP8>
cudaError_t launch_quantise(const cuda_args *a, unsigned blocks, cudaStream_t stream)
{
#define QUANT_LAUNCH(d, is_bf16)                                                                   \
    if (a->d_padded == d && a->bf16 == is_bf16) {                                                  \
        return launch_early(quantise_kernel<d, is_bf16, FP8>, blocks, QUANT_THREADS, 0, stream,    \
                            *a);                                                                   \
    }
    QUANT_DIMS(QUANT_LAUNCH, false)
    QUANT_DIMS(QUANT_LAUNCH, true)
    return cudaErrorInvalidValue;
}

} // namespace

#define QUANT_FUNCTION(d, bf16)                                                                    \
    (const void *)quantise_kernel<d, bf16, false>, (const void *)quantise_kernel<d, bf16, true>,

extern "C" const void *const cuda_quant_functions[] = {
    QUANT_DIMS(QUANT_FUNCTION, false) QUANT_DIMS(QUANT_FUNCTION, true)(const void *)
        sum_kernel<false>,
    (const void *)sum_kernel<true>, nullptr};

extern "C" cudaError_t cuda_quant_launch(cuda_args *a, unsigned blocks, cudaStream_t stream)
{
    if (a->cluster) {
        const cudaError_t error = cuda_cluster_launch(a, blocks, stream);
        a->start_ns = nullptr;
        return error;
    }
    if ((a->smooth_k || a->fp8) && !is_alone(*a)) {
        if (a->bf16)
            sum_kernel<true><<<blocks, QUANT_THREADS, 0, stream>>>(*a);
        else
            sum_kernel<false><<<blocks, QUANT_THREADS, 0, stream>>>(*a);
        const cudaError_t error = cudaGetLastError();
        if (error != cudaSuccess)
            return error;
        a->start_ns = nullptr;
    }
    const cudaError_t error = a->fp8 ? launch_quantise<true>(a, blocks, stream)
                                     : launch_quantise<false>(a, blocks, stream);
    a->start_ns = nullptr;
    return error;
}
