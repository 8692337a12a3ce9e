/*
 * cuda_quant_sm90.cu - quantisation on Hopper where the keys of a batch fit the shared memory of a
 * cluster: its blocks hold some chunks each, of K or of V, add them up, exchange the sums and
 * quantise what they hold, so that K and V are read once. All sums, their order and so the results
 * are those of the two kernels in cuda_quant.cu.
 */
#include "config.h"

#include "cuda_quant.cuh"

#include <cooperative_groups.h>

#ifdef HAVE_SM_90A

using namespace sage;

namespace
{

enum {
    CLUSTER_ROWS = 64 << 10, /* bytes of rows that a block holds; three blocks on a processor */
    CLUSTER_MOST = 16,       /* blocks */
};

__host__ __device__ inline int chunks_in_block(const cuda_args &a)
{
    return static_cast<int>((a.chunks.each + a.cluster - 1) / a.cluster);
}

int64_t chunk_bytes(const cuda_args &a)
{
    return a.chunk_keys * 2 * a.d_padded;
}

#ifdef __CUDA_ARCH_FEAT_SM90_ALL

__device__ inline int least(int64_t x, int y)
{
    return static_cast<int>(x < y ? x : y);
}

/*
 * This thread is at the barrier of the cluster, and what it wrote to its block's shared memory can
 * be seen behind it; that of cooperative groups also waits for global memory, for 1 to 2 us.
 */
__device__ inline void cluster_arrive()
{
    asm volatile("fence.release.sync_restrict::shared::cta.cluster;\n"
                 "barrier.cluster.arrive.relaxed.aligned;" ::
                     : "memory");
}

__device__ inline void cluster_wait()
{
    asm volatile("barrier.cluster.wait.acquire.aligned;" ::: "memory");
}

/* Sums of the cluster's chunks, n in each block. */
struct cluster_sums {
    float *mine;
    int step, n, rank, i;

    __device__ const float *row() const
    {
        return cooperative_groups::this_cluster().map_shared_rank(mine, rank) + i * step;
    }

    __device__ void next()
    {
        if (++i == n) {
            i = 0;
            rank++;
        }
    }
};

/* What a block has besides its rows. SUM_V ... MAX_V of V are in rows 0 ... 2, as K's SUM_K is. */
template <int D> struct cluster_memory {
    static constexpr int CHUNKS = CLUSTER_ROWS / (QUANT_CHUNK(D) * 2 * D);
    room shared;
    float sums[CHUNKS][3][D];
    union {
        k_channels<D> k;
        v_channels<D> v;
    };
    k_tops tops;
    unsigned k_max[CHUNKS];
};
#endif

template <int D, bool BF16>
__global__ void __launch_bounds__(QUANT_THREADS, 3)
    cluster_kernel(const __grid_constant__ cuda_args a)
{
#ifdef __CUDA_ARCH_FEAT_SM90_ALL
    extern __shared__ __align__(128) char memory[];
    __shared__ cluster_memory<D> m;
    const bool is_v = blockIdx.y;
    const int n = chunks_in_block(a), keys = static_cast<int>(a.chunk_keys);
    const unsigned each = static_cast<unsigned>(a.chunks.each);

    cudaGridDependencySynchronize();
    if (!begins(a))
        return;
    if (!is_v && blockIdx.x == 0 && threadIdx.x == 0)
        *a.ticket = 0;
    chunk c = find_chunk(a, blockIdx.x / a.cluster * each + blockIdx.x % a.cluster * n);
    if (!c.there)
        return; /* as all of its cluster: it is another part's */
    const int rows = least(n * keys, c.seq.nk - c.begin);
    const shared_rows<D> all = {memory};
    const auto rows_of = [&](int i) { return least(keys, rows - i * keys); };
    const cluster_sums sums = {m.sums[0][0], 3 * D, n, 0, 0};

    all.fill(a, global_rows(is_v ? a.v : a.k, c), rows);
    copy_commit();
    if (threadIdx.x < n)
        m.k_max[threadIdx.x] = 0;
    copy_wait<0>();
    __syncthreads();
    for (int i = 0; i * keys < rows; i++)
        if (is_v)
            sum_v<BF16, D / 8>(a, all.from(i * keys), rows_of(i), m.shared, m.sums[i][0], D);
        else if (a.smooth_k)
            sum_k<BF16, D / 8>(
                a, sampled_rows<shared_rows<D>>(all.from(i * keys), c.begin + i * keys, c.seq.nk),
                rows_of(i), m.shared, m.sums[i][0]);
    cluster_arrive();
    cluster_wait();
    if (is_v)
        add_up_v(a, c, m.v, sums, D);
    else
        add_up_k(a, c, m.k, sums);
    __syncthreads();
    cluster_arrive(); /* the others' sums have been read */
    if (is_v)
        quantise_v<D, BF16>(a, all, rows, m.v,
                            a.v8 + (c.head * a.blocks.total + c.block) * KERNEL_TILE_K * D);
    else
        for (int i = 0; i * keys < rows; i++) {
            c.end = c.begin + rows_of(i);
            quantise_k<D, BF16>(a, c, all.from(i * keys), m.k, m.tops, &m.k_max[i]);
            c.begin = c.end;
            c.block += keys / KERNEL_TILE_K;
        }
    __syncthreads();
    if (!is_v && threadIdx.x * keys < rows)
        a.k_max[c.head * a.chunks.total + c.n + threadIdx.x] =
            __uint_as_float(m.k_max[threadIdx.x]);
    cluster_wait();
#endif
}

#define CLUSTER_DIMS(X, bf16) X(64, bf16) X(96, bf16) X(128, bf16) X(192, bf16) X(256, bf16)
#define CLUSTER_KERNELS(X) CLUSTER_DIMS(X, false) CLUSTER_DIMS(X, true)

/* Clusters of more than 8 blocks are not everywhere: there may be few processors side by side. */
template <int D, bool BF16> cudaError_t load(unsigned *most)
{
    cudaLaunchConfig_t config = {};
    cudaLaunchAttribute attribute = {};
    cudaError_t error = cudaFuncSetAttribute(
        cluster_kernel<D, BF16>, cudaFuncAttributeMaxDynamicSharedMemorySize, CLUSTER_ROWS);
    int clusters = 0;

    attribute.id = cudaLaunchAttributeClusterDimension;
    attribute.val.clusterDim = {CLUSTER_MOST, 1, 1};
    config.gridDim = dim3(CLUSTER_MOST);
    config.blockDim = dim3(QUANT_THREADS);
    config.dynamicSmemBytes = CLUSTER_ROWS;
    config.attrs = &attribute;
    config.numAttrs = 1;
    if (!error)
        error = cudaFuncSetAttribute(cluster_kernel<D, BF16>,
                                     cudaFuncAttributeNonPortableClusterSizeAllowed, 1);
    if (!error && (cudaOccupancyMaxActiveClusters(&clusters, cluster_kernel<D, BF16>, &config) ||
                   clusters == 0)) {
        cudaGetLastError(); /* it was no error */
        *most = 8;
    }
    return error;
}

} // namespace

extern "C" cudaError_t cuda_cluster_load(unsigned *most)
{
    cudaError_t error = cudaSuccess;
#define CLUSTER_LOAD(d, bf16) error = error ? error : load<d, bf16>(most);

    *most = CLUSTER_MOST;
    CLUSTER_KERNELS(CLUSTER_LOAD)
    return error;
}

/*
 * Sequences of different lengths (chunks.each is 0) are for the two kernels: in clusters for the
 * longest of them most blocks would have nothing to do.
 */
extern "C" unsigned cuda_cluster_blocks(const cuda_args *a, unsigned most)
{
    const int64_t each = a->chunks.each, fit = CLUSTER_ROWS / chunk_bytes(*a);
    const int64_t least = (each + most - 1) / most, groups = a->n_heads * a->n_seqs;
    /* chunks of a block: as many as fit where there are blocks enough all the same */
    const int64_t n = fit > least && groups * each >= 3 * fit * a->processors ? fit : least;

    /* nothing to be added up, or a sample only: K is read once all the same */
    if (!a->fp8 && (!a->smooth_k || a->nk > SAMPLE_ALL))
        return 0;
    if (each == 0 || n > fit)
        return 0;
    return static_cast<unsigned>((each + n - 1) / n);
}

extern "C" cudaError_t cuda_cluster_launch(const cuda_args *a, unsigned chunks, cudaStream_t stream)
{
    const dim3 grid(chunks / static_cast<unsigned>(a->chunks.each) * a->cluster, a->fp8 ? 2 : 1);
    const size_t smem = static_cast<size_t>(chunks_in_block(*a) * chunk_bytes(*a));
#define CLUSTER_LAUNCH(d, is_bf16)                                                                 \
    if (a->d_padded == d && a->bf16 == is_bf16)                                                    \
        return launch_early(cluster_kernel<d, is_bf16>, grid, QUANT_THREADS, smem, stream, *a,     \
                            a->cluster);
    CLUSTER_KERNELS(CLUSTER_LAUNCH)
    return cudaErrorInvalidValue;
}

#else /* no device has its code */

extern "C" cudaError_t cuda_cluster_load(unsigned *most)
{
    *most = 0;
    return cudaSuccess;
}

extern "C" unsigned cuda_cluster_blocks(const cuda_args *, unsigned)
{
    return 0;
}

extern "C" cudaError_t cuda_cluster_launch(const cuda_args *, unsigned, cudaStream_t)
{
    return cudaErrorInvalidValue;
}
#endif
