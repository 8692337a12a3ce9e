/*
 * cuda_quant.cuh - what a block does for a chunk of the keys of a kv head: sums of its channels,
 * means and scales from those of all chunks, and the numbers. Rows are read where they are, in
 * global memory or in shared memory.
 */
#ifndef SAGE_CUDA_QUANT_CUH
#define SAGE_CUDA_QUANT_CUH

#include "cuda_args.h"
#include "cuda_mma.cuh"

namespace sage
{

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

/* Number i of the chunks of all heads; they are launched only if all fit 31 bits. */
__device__ inline chunk find_chunk(const cuda_args &a, unsigned i)
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

__device__ inline float *sums_of(const cuda_args &a, const chunk &c, int64_t n)
{
    return a.sums + (c.head * a.chunks.total + n) * (a.fp8 ? N_SUMS : 1) * a.d;
}

/* --- rows --- */

/* The rows of a sequence in global memory. */
struct global_rows {
    static constexpr bool NEAR = false;
    const char *first;
    int64_t step;
    bool aligned;

    __device__ global_rows(const cuda_tensor &t, const chunk &c)
        : first(t.data + c.seq.batch * t.stride[0] + c.kv_head * t.stride[1] +
                c.seq.k0 * t.stride[2]),
          step(t.stride[2]), aligned(t.aligned)
    {
    }

    __device__ uint4 load(int key, int vector) const
    {
        return load_8(first + key * step + 16 * vector, aligned);
    }
};

/*
 * Rows of D channels in shared memory, `begin` the first one's key. A row's vectors change places
 * with its number, so that the same one of 8 rows, or two of 4, are in different banks.
 */
template <int D> struct shared_rows {
    static constexpr int VECTORS = D / 8, BYTES = 2 * D;
    static constexpr bool NEAR = true; /* reading again is cheaper than registers */
    char *first;
    int begin;

    __device__ static int place(int row, int vector)
    {
        return row * BYTES + 16 * (vector ^ row % (VECTORS % 8 ? 4 : 8));
    }

    __device__ uint4 load(int key, int vector) const
    {
        return *reinterpret_cast<const uint4 *>(first + place(key - begin, vector));
    }

    /* Whole blocks of rows up to `end`, in the background: copy_commit(). Zeros beyond. */
    __device__ void fill(const cuda_args &a, const global_rows &from, int end) const
    {
        const int rows = (end - begin + KERNEL_TILE_K - 1) / KERNEL_TILE_K * KERNEL_TILE_K;

#pragma unroll 4
        for (int i = threadIdx.x; i < rows * VECTORS; i += QUANT_THREADS) {
            const int row = i / VECTORS, vector = i % VECTORS;
            const bool there = begin + row < end && 8 * vector < a.d;
            char *to = first + place(row, vector);
            if (from.aligned)
                copy_async(shared_address(to),
                           from.first + (begin + row) * from.step + 16 * vector, there);
            else
                *reinterpret_cast<uint4 *>(to) =
                    there ? from.load(begin + row, vector) : make_uint4(0, 0, 0, 0);
        }
    }
};

/* --- 1: sums --- */

using room = float[QUANT_THREADS][8]; /* in shared memory */

/* Eight channels of what each thread has seen: of all lanes, in their order. */
template <typename Add>
__device__ void reduce_channels(float *to, room &shared, const float (&x)[8], int vectors,
                                int lanes, Add add)
{
    __syncthreads();
#pragma unroll
    for (int i = 0; i < 8; i++)
        shared[threadIdx.x][i] = x[i];
    __syncthreads();
    for (int d = threadIdx.x; d < 8 * vectors; d += QUANT_THREADS) {
        float sum = shared[d / 8][d % 8];
#pragma unroll 8
        for (int lane = 1; lane < lanes; lane++)
            sum = add(sum, shared[lane * vectors + d / 8][d % 8]);
        to[d] = sum;
    }
}

__device__ inline float plus(float x, float y)
{
    return x + y;
}

/* A thread has one vector of 8 channels, and every lanes-th key. */
template <bool BF16, typename Rows>
__device__ void sum_k(const cuda_args &a, const chunk &c, const Rows &rows, room &shared)
{
    const int vectors = a.d / 8, lanes = QUANT_THREADS / vectors;
    const int vector = threadIdx.x % vectors, lane = threadIdx.x / vectors;
    float x[8], sum[8] = {0};

#pragma unroll 4
    for (int key = c.begin + lane; lane < lanes && key < c.end; key += lanes) {
        unpack_16<BF16>(x, rows.load(key, vector));
#pragma unroll
        for (int i = 0; i < 8; i++)
            sum[i] += x[i];
    }
    reduce_channels(sums_of(a, c, c.n) + SUM_K * a.d, shared, sum, vectors, lanes, plus);
}

/* The same of V; its extremes are NaN once a NaN has come by. */
template <bool BF16, typename Rows>
__device__ void sum_v(const cuda_args &a, const chunk &c, const Rows &rows, room &shared)
{
    const int vectors = a.d / 8, lanes = QUANT_THREADS / vectors;
    const int vector = threadIdx.x % vectors, lane = threadIdx.x / vectors;
    const uint32_t infinities = BF16 ? 0x7f807f80 : 0x7c007c00;
    float *to = sums_of(a, c, c.n);
    uint32_t least[4], most[4];
    float x[8], sum[8] = {0};

#pragma unroll
    for (int i = 0; i < 4; i++) {
        least[i] = infinities;
        most[i] = infinities | 0x80008000;
    }
#pragma unroll 4
    for (int key = c.begin + lane; lane < lanes && key < c.end; key += lanes) {
        const uint4 raw = rows.load(key, vector);
        const uint32_t words[4] = {raw.x, raw.y, raw.z, raw.w};
        unpack_16<BF16>(x, raw);
#pragma unroll
        for (int i = 0; i < 8; i++)
            sum[i] += x[i];
#pragma unroll
        for (int i = 0; i < 4; i++) {
            least[i] = min_nan_2<BF16>(least[i], words[i]);
            most[i] = max_nan_2<BF16>(most[i], words[i]);
        }
    }
    reduce_channels(to + SUM_V * a.d, shared, sum, vectors, lanes, plus);
    unpack_16<BF16>(x, make_uint4(least[0], least[1], least[2], least[3]));
    reduce_channels(to + MIN_V * a.d, shared, x, vectors, lanes, min_nan);
    unpack_16<BF16>(x, make_uint4(most[0], most[1], most[2], most[3]));
    reduce_channels(to + MAX_V * a.d, shared, x, vectors, lanes, max_nan);
}

/* --- 2: quantisation --- */

/* Of all chunks of the sequence together: means and scales of the channels. */
template <int D> struct channels {
    float k_mean[D], v_mean[D], v_up[D];
};

__device__ inline int count_chunks(const cuda_args &a, const chunk &c)
{
    return static_cast<int>((c.seq.nk + a.chunk_keys - 1) / a.chunk_keys);
}

template <int D> __device__ void add_up_k(const cuda_args &a, const chunk &c, channels<D> &ch)
{
    const int n = count_chunks(a, c);
    const int64_t step = (a.fp8 ? N_SUMS : 1) * a.d;

    for (int d = threadIdx.x; d < a.d; d += QUANT_THREADS) {
        const float *s = sums_of(a, c, c.chunk_first) + SUM_K * a.d + d;
        float sum = 0;

        if (a.smooth_k) {
#pragma unroll 8
            for (int i = 0; i < n; i++)
                sum += s[i * step];
        }
        ch.k_mean[d] = sum / static_cast<float>(c.seq.nk);
        if (c.index == 0)
            a.means[c.local * 3 * a.d_padded + d] = ch.k_mean[d];
    }
}

template <int D> __device__ void add_up_v(const cuda_args &a, const chunk &c, channels<D> &ch)
{
    const int n = count_chunks(a, c);
    const int64_t step = N_SUMS * a.d;
    float *means = a.means + c.local * 3 * a.d_padded;

    for (int d = threadIdx.x; d < D; d += QUANT_THREADS) {
        const float *s = sums_of(a, c, c.chunk_first) + d;
        float sum = 0, least = INFINITY, most = -INFINITY;

        ch.v_mean[d] = ch.v_up[d] = 0;
        if (d >= a.d)
            continue;
#pragma unroll 8
        for (int i = 0; i < n; i++) {
            sum += s[i * step + SUM_V * a.d];
            least = min_nan(least, s[i * step + MIN_V * a.d]);
            most = max_nan(most, s[i * step + MAX_V * a.d]);
        }
        /* amax/256: see cpu_quant.c. NaN if there is an Inf or NaN */
        const float mean = a.smooth_v ? sum / static_cast<float>(c.seq.nk) : 0;
        const float bad = (most - most) + (least - least);
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
 * A warp's way through K, a run of 16 keys at a time. Lane l has keys of the group l % 4 and every
 * eighth of the vectors that they have, so a group's largest magnitude is found within the lanes of
 * equal l % 4. What comes from far is kept in registers, what is near is read twice; then there are
 * registers for the means.
 */
template <int D, bool BF16, typename Rows> struct k_quantiser {
    static constexpr int VECTORS = D / 8, STEPS = (VECTORS + 7) / 8, EACH = 4 * STEPS;
    const cuda_args &a;
    const Rows &rows;
    const channels<D> &ch;
    float mean[STEPS][8];

    __device__ static int vector_of(int i)
    {
        return threadIdx.x % 32 / 4 + i % STEPS * 8;
    }

    __device__ static int key_of(int i)
    {
        const int j = i / STEPS;

        return threadIdx.x % 4 * 2 + j % 2 + j / 2 * 8;
    }

    __device__ k_quantiser(const cuda_args &args, const Rows &r, const channels<D> &channels)
        : a(args), rows(r), ch(channels)
    {
#pragma unroll
        for (int i = 0; i < STEPS; i++)
#pragma unroll
            for (int e = 0; e < 8; e++)
                mean[i][e] = 8 * vector_of(i) < a.d ? ch.k_mean[8 * vector_of(i) + e] : 0;
    }

    /* WHOLE: no key is missing, nor a channel. */
    template <bool WHOLE> __device__ bool is_there(int i, int keys) const
    {
        return WHOLE ? vector_of(i) < VECTORS : 8 * vector_of(i) < a.d && key_of(i) < keys;
    }

    __device__ void centred(float (&x)[8], const uint4 &raw, int i) const
    {
        unpack_16<BF16>(x, raw);
#pragma unroll
        for (int e = 0; e < 8; e++)
            x[e] -= Rows::NEAR ? mean[i % STEPS][e] : ch.k_mean[8 * vector_of(i) + e];
    }

    /* `keys` of them are there, `key0` is the first. Returns the group's scale; NaN if it has an
     * Inf or NaN. */
    template <bool WHOLE>
    __device__ float run(int key0, int keys, int8_t *to, float *scale) const
    {
        uint4 raw[EACH];
        float top[4] = {};

#pragma unroll
        for (int i = 0; i < EACH; i++) {
            float x[8];
            raw[i] = make_uint4(0, 0, 0, 0);
            if (!is_there<WHOLE>(i, keys))
                continue;
            raw[i] = rows.load(key0 + key_of(i), vector_of(i));
            centred(x, raw[i], i);
#pragma unroll
            for (int e = 0; e < 8; e++)
                top[e % 4] = max_nan(top[e % 4], fabsf(x[e]));
        }
        float amax = max_nan(max_nan(top[0], top[1]), max_nan(top[2], top[3]));
#pragma unroll
        for (int step = 4; step < 32; step *= 2)
            amax = max_nan(amax, __shfl_xor_sync(~0u, amax, step));
        const float up = quant_up(amax), down = quant_step(amax);

#pragma unroll
        for (int i = 0; i < EACH; i++) {
            const int key = key_of(i), vector = vector_of(i);
            uint32_t words[2] = {0, 0};
            if (vector >= VECTORS)
                continue;
            if (is_there<WHOLE>(i, keys) && up > 0) {
                float x[8];
                centred(x, Rows::NEAR ? rows.load(key0 + key, vector) : raw[i], i);
                words[0] = to_bytes(x, up);
                words[1] = to_bytes(x + 4, up);
            }
            *reinterpret_cast<uint2 *>(
                to + key * D + (8 * vector ^ (a.swizzled ? row_swizzle<D>(key) : 0))) =
                make_uint2(words[0], words[1]);
        }
        if (threadIdx.x % 32 < 4)
            scale[4 * (threadIdx.x % 4)] = down;
        return down;
    }
};

/* A chunk of K; *k_max, in shared memory, becomes its largest scale. */
template <int D, bool BF16, typename Rows>
__device__ void quantise_k(const cuda_args &a, const chunk &c, const Rows &rows,
                           const channels<D> &ch, unsigned *k_max)
{
    const k_quantiser<D, BF16, Rows> quantiser(a, rows, ch);
    const int64_t block0 = c.head * a.blocks.total + c.block;
    /* whole blocks: what is beyond the last key is zero */
    const int runs =
        (c.end - c.begin + KERNEL_TILE_K - 1) / KERNEL_TILE_K * (KERNEL_TILE_K / K_RUN);
    float top = 0;

    for (int run = threadIdx.x / 32; run < runs; run += QUANT_THREADS / 32) {
        const int64_t block = block0 + run / 4;
        const int key0 = c.begin + run * K_RUN, keys = c.end - key0;
        int8_t *to = a.k8 + (block * KERNEL_TILE_K + run % 4 * K_RUN) * D;
        float *scales = a.k_scale + block * 16 + run % 4;
        const float scale = Rows::NEAR && a.d == D && keys >= K_RUN
                                ? quantiser.template run<true>(key0, keys, to, scales)
                                : quantiser.template run<false>(key0, keys, to, scales);
        top = isfinite(scale) ? fmaxf(top, scale) : top;
    }
    if (threadIdx.x % 32 < 4)
        atomicMax(k_max, __float_as_uint(top));
}

/*
 * Blocks of 64 keys of V from `begin` on, in shared memory, transposed by the matrix loads: lane l
 * gets keys 2c, 2c + 1, 2c + 8 and 2c + 9, c = l % 4, of channel l / 4, the four bytes at 4c.
 */
template <int D, bool BF16>
__device__ void quantise_v(const cuda_args &a, const shared_rows<D> &rows, int end,
                           const channels<D> &ch, uint8_t *to)
{
    const int lane = threadIdx.x % 32;
    const uint32_t first = shared_address(rows.first);

    for (int vector = threadIdx.x / 32; vector < D / 8; vector += QUANT_THREADS / 32) {
        const int d = 8 * vector + lane / 4;
        const float mean = ch.v_mean[d], up = ch.v_up[d];
        const int place = d * KERNEL_TILE_K +
                          (lane % 4 * 16 ^ (a.swizzled ? row_swizzle<KERNEL_TILE_K>(d) : 0));
        for (int key0 = 0; key0 < end - rows.begin; key0 += KERNEL_TILE_K) {
            const int left = end - rows.begin - key0;
            uint32_t words[4];
#pragma unroll
            for (int run = 0; run < 4; run += 2) {
                uint32_t r[4];
                ldmatrix_trans(r, first + rows.place(key0 + run * K_RUN + lane, vector));
#pragma unroll
                for (int i = 0; i < 2; i++) {
                    const float2 x = unpack_2<BF16>(r[2 * i]), y = unpack_2<BF16>(r[2 * i + 1]);
                    const uint32_t low = pack_e4m3((x.x - mean) * up, (x.y - mean) * up);
                    const uint32_t high = pack_e4m3((y.x - mean) * up, (y.y - mean) * up);
                    words[run + i] = up > 0 ? __byte_perm(low, high, 0x5410) : 0;
                }
            }
            if (left < KERNEL_TILE_K)
#pragma unroll
                for (int i = 0; i < 16; i++)
                    if (i / 4 * K_RUN + lane % 4 * 2 + i % 2 + i % 4 / 2 * 8 >= left)
                        words[i / 4] &= ~(0xffu << i % 4 * 8);
            *reinterpret_cast<uint4 *>(to + key0 * D + place) = transpose_quad(words);
        }
    }
}

} // namespace sage

#endif
