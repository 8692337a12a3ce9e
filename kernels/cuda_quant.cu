/*
 * cuda_quant.cu - the two kernels before attention. Both have a block for each chunk of keys of
 * each kv head. The first adds up its chunk; the second adds up the chunks' sums, in their order,
 * and quantises, in reverse order: what was read last is still in the L2 cache. Where there is only
 * one chunk the second does both.
 */
#include "cuda_args.h"
#include "cuda_mma.cuh"

using namespace sage;

namespace
{

/* Sequences are of one chunk each: who quantises it can add it up, too. */
__host__ __device__ inline bool is_alone(const cuda_args &a)
{
    return a.chunks.each == 1;
}

/* What a block works on; none for the gaps between sequences and groups of other parts. */
struct chunk {
    cuda_seq seq;
    int64_t head, kv_head; /* in the workspace; in the problem */
    int64_t local, n;      /* index of its group in `means`; number within its head */
    int64_t chunk_first;   /* of the sequence, in its head */
    int64_t block;         /* first key block of the chunk, in its head */
    int64_t index;         /* of the sequence's chunks */
    int begin, end;        /* keys of the sequence */
    bool there;
};

/* Number i of the blocks; they are launched only if all fit 31 bits. */
__device__ chunk find_chunk(const cuda_args &a, unsigned i)
{
    const unsigned total = static_cast<unsigned>(a.chunks.total), head = i / total;
    chunk c;

    c.head = head;
    c.n = i % total;
    const int64_t s = space_find(a, a.chunks, a.k_offsets, a.k_first, a.chunk_keys, c.n);
    c.seq = seq_of(a, s);
    c.kv_head = a.head + head;
    c.local = (s - a.seq) * a.n_heads + head;
    c.chunk_first = space_start(a, a.chunks, a.k_offsets, a.k_first, a.chunk_keys, s);
    c.index = c.n - c.chunk_first;
    const int64_t begin = c.index * a.chunk_keys;
    c.there = in_part(a, s, c.kv_head) && begin < c.seq.nk;
    c.begin = static_cast<int>(begin);
    c.end = static_cast<int>(begin + a.chunk_keys < c.seq.nk ? begin + a.chunk_keys : c.seq.nk);
    c.block =
        space_start(a, a.blocks, a.k_offsets, a.k_first, KERNEL_TILE_K, s) + begin / KERNEL_TILE_K;
    return c;
}

__device__ const char *row_of(const cuda_tensor &t, const chunk &c, int64_t key)
{
    return t.data + c.seq.batch * t.stride[0] + c.kv_head * t.stride[1] +
           (c.seq.k0 + key) * t.stride[2];
}

__device__ float *sums_of(const cuda_args &a, const chunk &c, int64_t n)
{
    return a.sums + (c.head * a.chunks.total + n) * (a.fp8 ? N_SUMS : 1) * a.d;
}

/* --- 1: sums --- */

/* Eight channels of what a thread has seen; `which` is one of SUM_K ... BAD_V. */
template <typename Add>
__device__ void reduce_channels(float *to, float (*shared)[8], const float (&x)[8], int vectors,
                                int lanes, Add add)
{
    __syncthreads();
#pragma unroll
    for (int i = 0; i < 8; i++)
        shared[threadIdx.x][i] = x[i];
    __syncthreads();
    for (int d = threadIdx.x; d < 8 * vectors; d += QUANT_THREADS) {
        float sum = shared[d / 8][d % 8];
        for (int lane = 1; lane < lanes; lane++)
            sum = add(sum, shared[lane * vectors + d / 8][d % 8]);
        to[d] = sum;
    }
}

template <bool BF16>
__device__ void sum_chunk(const cuda_args &a, const chunk &c, float (*shared)[8])
{
    /* a thread has one vector of 8 channels, and every lanes-th key */
    const int vectors = a.d / 8, lanes = QUANT_THREADS / vectors;
    const int vector = threadIdx.x % vectors, lane = threadIdx.x / vectors;
    float *to = sums_of(a, c, c.n);
    float x[8], sum[8] = {0};
    const auto plus = [](float p, float q) { return p + q; };

    if (a.smooth_k) {
#pragma unroll 4
        for (int key = c.begin + lane; lane < lanes && key < c.end; key += lanes) {
            unpack_16<BF16>(x, load_8(row_of(a.k, c, key) + 16 * vector, a.k.aligned));
#pragma unroll
            for (int i = 0; i < 8; i++)
                sum[i] += x[i];
        }
        reduce_channels(to + SUM_K * a.d, shared, sum, vectors, lanes, plus);
    }
    if (!a.fp8)
        return;
    float least[8], most[8], bad[8];
#pragma unroll
    for (int i = 0; i < 8; i++) {
        sum[i] = bad[i] = 0;
        least[i] = INFINITY;
        most[i] = -INFINITY;
    }
#pragma unroll 4
    for (int key = c.begin + lane; lane < lanes && key < c.end; key += lanes) {
        unpack_16<BF16>(x, load_8(row_of(a.v, c, key) + 16 * vector, a.v.aligned));
#pragma unroll
        for (int i = 0; i < 8; i++) {
            sum[i] += x[i];
            least[i] = fminf(least[i], x[i]);
            most[i] = fmaxf(most[i], x[i]);
            bad[i] += x[i] - x[i]; /* NaN once an Inf or NaN has come by */
        }
    }
    reduce_channels(to + SUM_V * a.d, shared, sum, vectors, lanes, plus);
    reduce_channels(to + MIN_V * a.d, shared, least, vectors, lanes,
                    [](float p, float q) { return fminf(p, q); });
    reduce_channels(to + MAX_V * a.d, shared, most, vectors, lanes,
                    [](float p, float q) { return fmaxf(p, q); });
    reduce_channels(to + BAD_V * a.d, shared, bad, vectors, lanes, plus);
}

template <bool BF16>
__global__ void __launch_bounds__(QUANT_THREADS) sum_kernel(const __grid_constant__ cuda_args a)
{
    __shared__ float shared[QUANT_THREADS][8];
    const chunk c = find_chunk(a, blockIdx.x);

    stamp_start(a);
    if (c.there)
        sum_chunk<BF16>(a, c, shared);
}

/* --- 2: quantisation --- */

/* Of all chunks of the sequence together: means and scales of the channels. */
struct channels {
    float k_mean[256], v_mean[256], v_up[256];
};

__device__ void add_up(const cuda_args &a, const chunk &c, channels &ch)
{
    const int n = static_cast<int>((c.seq.nk + a.chunk_keys - 1) / a.chunk_keys);
    const int64_t step = (a.fp8 ? N_SUMS : 1) * a.d;
    float *means = a.means + c.local * 3 * a.d_padded;

    for (int d = threadIdx.x; d < a.d; d += QUANT_THREADS) {
        const float *s = sums_of(a, c, c.chunk_first) + d;
        float k_sum = 0, v_sum = 0, least = INFINITY, most = -INFINITY, bad = 0;

        if (a.smooth_k) {
#pragma unroll 8
            for (int i = 0; i < n; i++)
                k_sum += s[i * step + SUM_K * a.d];
        }
        ch.k_mean[d] = k_sum / static_cast<float>(c.seq.nk);
        if (c.index == 0)
            means[d] = ch.k_mean[d];
        if (!a.fp8)
            continue;
#pragma unroll 4
        for (int i = 0; i < n; i++) {
            v_sum += s[i * step + SUM_V * a.d];
            least = fminf(least, s[i * step + MIN_V * a.d]);
            most = fmaxf(most, s[i * step + MAX_V * a.d]);
            bad += s[i * step + BAD_V * a.d];
        }
        /* amax/256: see cpu_quant.c */
        const float mean = a.smooth_v ? v_sum / static_cast<float>(c.seq.nk) : 0;
        const float scale = fmaxf(most - mean, mean - least) / 256 + bad;
        ch.v_mean[d] = mean;
        ch.v_up[d] = scale > QUANT_MIN / 256 ? 1 / scale : 0;
        if (c.index == 0) {
            means[a.d_padded + d] = scale;
            means[2 * a.d_padded + d] = mean;
        }
    }
}

/*
 * A run of 16 keys by one warp. Lane l has keys of the group l % 4 and every eighth of the vectors
 * that they have, so a group's largest magnitude is found within the lanes of equal l % 4; among
 * bit patterns, where Inf and NaN rank above all numbers. A group that has one gets scale NaN.
 * Returns the group's scale.
 */
template <int D, bool BF16>
__device__ float quantise_run(const cuda_args &a, const chunk &c, const channels &ch, int key0,
                              int8_t *to, float *scale)
{
    constexpr int VECTORS = D / 8, EACH = 4 * VECTORS / 8;
    const int lane = threadIdx.x % 32, group = lane % 4;
    uint4 raw[EACH];
    uint32_t top = 0;

#pragma unroll
    for (int i = 0; i < EACH; i++) {
        const int at = lane / 4 + 8 * i, j = at / VECTORS, vector = at % VECTORS;
        const int key = key0 + 2 * group + j % 2 + j / 2 * 8;
        raw[i] = make_uint4(0, 0, 0, 0);
        if (8 * vector >= a.d || key >= c.end)
            continue;
        float x[8];
        raw[i] = load_8(row_of(a.k, c, key) + 16 * vector, a.k.aligned);
        unpack_16<BF16>(x, raw[i]);
#pragma unroll
        for (int e = 0; e < 8; e++)
            top = max(top, __float_as_uint(x[e] - ch.k_mean[8 * vector + e]) & 0x7fffffffu);
    }
#pragma unroll
    for (int step = 4; step < 32; step *= 2)
        top = max(top, __shfl_xor_sync(~0u, top, step));
    const float amax = __uint_as_float(top);
    const float up = quant_up(amax), down = quant_step(amax);

#pragma unroll
    for (int i = 0; i < EACH; i++) {
        const int at = lane / 4 + 8 * i, j = at / VECTORS, vector = at % VECTORS;
        const int in_run = 2 * group + j % 2 + j / 2 * 8;
        const bool there = 8 * vector < a.d && key0 + in_run < c.end;
        uint32_t words[2] = {0, 0};
        if (there && up > 0) {
            float x[8];
            unpack_16<BF16>(x, raw[i]);
#pragma unroll
            for (int e = 0; e < 8; e++)
                x[e] -= ch.k_mean[8 * vector + e];
            words[0] = to_bytes(x, up);
            words[1] = to_bytes(x + 4, up);
        }
        *reinterpret_cast<uint2 *>(to + in_run * D +
                                   (8 * vector ^ (a.swizzled ? row_swizzle<D>(in_run) : 0))) =
            make_uint2(words[0], words[1]);
    }
    if (lane < 4)
        scale[4 * group] = down;
    return down;
}

/*
 * A block of 64 keys of V, transposed through shared memory: each thread 8 channels of two keys,
 * which lie side by side. Threads of a warp have the same keys and other channels; so that their
 * words are in different banks, a channel's word w is at w ^ (channel / 8) % 16.
 */
template <int D, bool BF16>
__device__ void quantise_v(const cuda_args &a, const chunk &c, const channels &ch, int key0,
                           uint8_t (*tile)[KERNEL_TILE_K], uint8_t *to)
{
    constexpr int VECTORS = D / 8, CHUNKS = KERNEL_TILE_K / 16;

    for (int i = threadIdx.x; i < KERNEL_TILE_K / 2 * VECTORS; i += QUANT_THREADS) {
        const int vector = i % VECTORS, in_block = i / VECTORS * 2;
        const int place = in_block / K_RUN * K_RUN + v8_place(in_block % K_RUN);
        float x[2][8] = {};
#pragma unroll
        for (int k = 0; k < 2; k++) {
            const int key = key0 + in_block + k;
            if (8 * vector >= a.d || key >= c.end)
                continue;
            unpack_16<BF16>(x[k], load_8(row_of(a.v, c, key) + 16 * vector, a.v.aligned));
#pragma unroll
            for (int e = 0; e < 8; e++) {
                const float up = ch.v_up[8 * vector + e];
                x[k][e] = up > 0 ? (x[k][e] - ch.v_mean[8 * vector + e]) * up : 0;
            }
        }
#pragma unroll
        for (int e = 0; e < 8; e++)
            *reinterpret_cast<uint16_t *>(&tile[8 * vector + e][place ^ vector % 16 * 4]) =
                static_cast<uint16_t>(pack_e4m3(x[0][e], x[1][e]));
    }
    __syncthreads();
    for (int i = threadIdx.x; i < D * CHUNKS; i += QUANT_THREADS) {
        const int d = i / CHUNKS, at = i % CHUNKS * 16, moved = d / 8 % 16;
        const uint4 x = *reinterpret_cast<const uint4 *>(&tile[d][at ^ moved / 4 * 16]);
        const uint4 y = moved & 1 ? make_uint4(x.y, x.x, x.w, x.z) : x;
        const int swizzle = a.swizzled ? row_swizzle<KERNEL_TILE_K>(d) : 0;
        *reinterpret_cast<uint4 *>(to + d * KERNEL_TILE_K + (at ^ swizzle)) =
            moved & 2 ? make_uint4(y.z, y.w, y.x, y.y) : y;
    }
    __syncthreads();
}

template <int D, bool BF16, bool FP8>
__global__ void __launch_bounds__(QUANT_THREADS)
    quantise_kernel(const __grid_constant__ cuda_args a)
{
    __shared__ channels ch;
    __shared__ union {
        float sums[QUANT_THREADS][8];
        __align__(16) uint8_t v[FP8 ? D : 1][KERNEL_TILE_K];
    } room;
    __shared__ unsigned k_max;

#if __CUDA_ARCH__ >= 900
    cudaGridDependencySynchronize();
#endif
    stamp_start(a);
    /* the last ones first: they are what the kernel before has left in the L2 cache */
    const chunk c = find_chunk(a, gridDim.x - 1 - blockIdx.x);
    const int64_t block0 = c.head * a.blocks.total + c.block;

    if (blockIdx.x == 0)
        for (int i = threadIdx.x; i < COUNTERS; i += QUANT_THREADS)
            a.ticket[i] = 0;
    if (!c.there)
        return;
    if (threadIdx.x == 0)
        k_max = 0;
    if (is_alone(a)) {
        sum_chunk<BF16>(a, c, room.sums);
        __syncthreads();
    }
    add_up(a, c, ch);
    __syncthreads();

    /* whole blocks: what is beyond the last key is zero */
    const int runs =
        (c.end - c.begin + KERNEL_TILE_K - 1) / KERNEL_TILE_K * (KERNEL_TILE_K / K_RUN);
    for (int run = threadIdx.x / 32; run < runs; run += QUANT_THREADS / 32) {
        const int64_t block = block0 + run / 4;
        const float scale =
            quantise_run<D, BF16>(a, c, ch, c.begin + run * K_RUN,
                                  a.k8 + (block * KERNEL_TILE_K + run % 4 * K_RUN) * a.d_padded,
                                  a.k_scale + block * 16 + run % 4);
        if (threadIdx.x % 32 < 4 && isfinite(scale))
            atomicMax(&k_max, __float_as_uint(scale));
    }
    if constexpr (FP8)
        for (int key = c.begin; key < c.end; key += KERNEL_TILE_K)
            quantise_v<D, BF16>(a, c, ch, key, room.v,
                                a.v8 + (block0 + (key - c.begin) / KERNEL_TILE_K) * KERNEL_TILE_K *
                                           a.d_padded);
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
