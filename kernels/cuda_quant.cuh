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

/* --- rows --- */

/* Threads of a block that load, side by side, a row of so many vectors of 8 channels; rows. */
__host__ __device__ constexpr int lanes_of(int vectors)
{
    return QUANT_THREADS / vectors / 8 * 8;
}

/* The rows of a chunk in global memory. */
struct global_rows {
    const char *first;
    int64_t step;
    bool aligned;

    __device__ global_rows(const cuda_tensor &t, const chunk &c)
        : first(t.data + c.seq.batch * t.stride[0] + c.kv_head * t.stride[1] +
                (c.seq.k0 + c.begin) * t.stride[2]),
          step(t.stride[2]), aligned(t.aligned)
    {
    }

    __device__ global_rows from(int row) const
    {
        global_rows r = *this;

        r.first += row * step;
        return r;
    }

    __device__ uint4 load(unsigned row, unsigned vector) const
    {
        return load_8(first + row * step + 16 * vector, aligned);
    }
};

/*
 * Rows of D channels in shared memory. The vectors of a row change places with its number, so that
 * the same one of 8 rows, or two of 4, are in different banks.
 */
template <int D> struct shared_rows {
    static constexpr int VECTORS = D / 8, BYTES = 2 * D;
    char *first;

    /* row: a multiple of 8 */
    __device__ shared_rows from(int row) const
    {
        return {first + row * BYTES};
    }

    __device__ static unsigned place(unsigned row, unsigned vector)
    {
        return row * BYTES + 16 * (vector ^ row % (VECTORS % 8 ? 4 : 8));
    }

    __device__ uint4 load(unsigned row, unsigned vector) const
    {
        return *reinterpret_cast<const uint4 *>(first + place(row, vector));
    }

    /* n rows, and zeros to the end of their last block, in the background: copy_commit(). */
    __device__ void fill(const cuda_args &a, const global_rows &from, int n) const
    {
        constexpr int LANES = lanes_of(VECTORS);
        const int vector = threadIdx.x % VECTORS, lane = threadIdx.x / VECTORS;
        const int rows = (n + KERNEL_TILE_K - 1) / KERNEL_TILE_K * KERNEL_TILE_K;
        const bool wanted = 8 * vector < a.d;
        const char *p = from.first + lane * from.step + 16 * vector;
        const uint32_t to = shared_address(first);

        if (lane >= LANES)
            return;
        if (!from.aligned) {
            for (int row = lane; row < rows; row += LANES)
                *reinterpret_cast<uint4 *>(first + place(row, vector)) =
                    wanted && row < n ? from.load(row, vector) : make_uint4(0, 0, 0, 0);
            return;
        }
#pragma unroll 4
        for (int i = 0; lane + i * LANES < rows; i++, p += LANES * from.step)
            copy_async(to + place(lane + i * LANES, vector), p, wanted && lane + i * LANES < n);
    }
};

/* Of rows from key `begin` on, at a multiple of 64, those that K's mean is of. */
template <typename Rows> struct sampled_rows {
    Rows all;
    int begin, shift;

    __device__ sampled_rows(const Rows &rows, int begin_key, int nk)
        : all(rows), begin(begin_key), shift(sample_shift(nk))
    {
    }

    __device__ uint4 load(int row, unsigned vector) const
    {
        return all.load(static_cast<unsigned>(sample_key((begin >> shift) + row, shift)) - begin,
                        vector);
    }
};

/* --- 1: sums --- */

using room = float[QUANT_THREADS][8]; /* in shared memory */

/* Eight channels of what each thread has seen: of all lanes, in their order. */
template <typename Add>
__device__ void reduce_channels(const cuda_args &a, float *to, room &shared, const float (&x)[8],
                                int vectors, int lanes, Add add)
{
    __syncthreads();
#pragma unroll
    for (int i = 0; i < 8; i++)
        shared[threadIdx.x][i] = x[i];
    __syncthreads();
    for (int d = threadIdx.x; d < a.d; d += QUANT_THREADS) {
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

/* A vector of every lanes-th row, of n; some are on their way at a time. */
template <typename Rows, typename Do>
__device__ void for_lane(const Rows &rows, int n, int vector, int lane, int lanes, Do what)
{
    constexpr int AT_ONCE = 4;

    for (int row = lane; row < n; row += AT_ONCE * lanes) {
        uint4 raw[AT_ONCE];
#pragma unroll
        for (int i = 0; i < AT_ONCE; i++)
            if (row + i * lanes < n)
                raw[i] = rows.load(row + i * lanes, vector);
#pragma unroll
        for (int i = 0; i < AT_ONCE; i++)
            if (row + i * lanes < n)
                what(raw[i]);
    }
}

/*
 * Of n rows, or those of them that are in the sample; a thread has one vector of 8 channels, and
 * every lanes-th row. VECTORS: of a row, if it is known.
 */
template <bool BF16, int VECTORS, typename Rows>
__device__ void sum_k(const cuda_args &a, const sampled_rows<Rows> &rows, int n, room &shared,
                      float *to)
{
    const int vectors = VECTORS ? VECTORS : a.d_padded / 8, lanes = lanes_of(vectors);
    const int vector = threadIdx.x % vectors, lane = threadIdx.x / vectors;
    float sum[8] = {0};

    if (lane < lanes && 8 * vector < a.d)
        for_lane(rows, n >> rows.shift, vector, lane, lanes, [&](const uint4 &raw) {
            float x[8];
            unpack_16<BF16>(x, raw);
#pragma unroll
            for (int e = 0; e < 8; e++)
                sum[e] += x[e];
        });
    reduce_channels(a, to, shared, sum, vectors, lanes, plus);
}

/* The same of V, and its extremes, which are NaN once a NaN has come by; `step` floats apart. */
template <bool BF16, int VECTORS, typename Rows>
__device__ void sum_v(const cuda_args &a, const Rows &rows, int n, room &shared, float *to,
                      int step)
{
    const int vectors = VECTORS ? VECTORS : a.d_padded / 8, lanes = lanes_of(vectors);
    const int vector = threadIdx.x % vectors, lane = threadIdx.x / vectors;
    const uint32_t infinities = BF16 ? 0x7f807f80 : 0x7c007c00;
    uint32_t least[4], most[4];
    float x[8], sum[8] = {0};

#pragma unroll
    for (int i = 0; i < 4; i++) {
        least[i] = infinities;
        most[i] = infinities | 0x80008000;
    }
    if (lane < lanes && 8 * vector < a.d)
        for_lane(rows, n, vector, lane, lanes, [&](const uint4 &raw) {
            const uint32_t words[4] = {raw.x, raw.y, raw.z, raw.w};
            unpack_16<BF16>(x, raw);
#pragma unroll
            for (int e = 0; e < 8; e++)
                sum[e] += x[e];
#pragma unroll
            for (int e = 0; e < 4; e++) {
                least[e] = min_nan_2<BF16>(least[e], words[e]);
                most[e] = max_nan_2<BF16>(most[e], words[e]);
            }
        });
    reduce_channels(a, to, shared, sum, vectors, lanes, plus);
    unpack_16<BF16>(x, make_uint4(least[0], least[1], least[2], least[3]));
    reduce_channels(a, to + (MIN_V - SUM_V) * step, shared, x, vectors, lanes, min_nan);
    unpack_16<BF16>(x, make_uint4(most[0], most[1], most[2], most[3]));
    reduce_channels(a, to + (MAX_V - SUM_V) * step, shared, x, vectors, lanes, max_nan);
}

/* --- 2: quantisation --- */

/* Of all chunks of the sequence together: means and scales of the channels. */
template <int D> struct k_channels {
    float mean[D];
};
template <int D> struct v_channels {
    float mean[D], up[D];
};

__device__ inline int count_chunks(const cuda_args &a, const chunk &c)
{
    return static_cast<int>((c.seq.nk + a.chunk_keys - 1) / a.chunk_keys);
}

/* sums: goes from the row of the first chunk's sums to the others'. */
template <int D, typename Sums>
__device__ void add_up_k(const cuda_args &a, const chunk &c, k_channels<D> &ch, Sums sums)
{
    const int n = a.smooth_k ? count_chunks(a, c) : 0;

    for (int d = threadIdx.x; d < a.d; d += QUANT_THREADS) {
        Sums s = sums;
        float sum = 0;
#pragma unroll 8
        for (int i = 0; i < n; i++, s.next())
            sum += s.row()[d];
        ch.mean[d] = sum / static_cast<float>(c.seq.nk >> sample_shift(c.seq.nk));
        if (c.index == 0)
            a.means[c.local * 3 * a.d_padded + d] = ch.mean[d];
    }
}

/* The others are `step` floats behind. */
template <int D, typename Sums>
__device__ void add_up_v(const cuda_args &a, const chunk &c, v_channels<D> &ch, Sums sums, int step)
{
    const int n = count_chunks(a, c);
    float *means = a.means + c.local * 3 * a.d_padded;

    for (int d = threadIdx.x; d < D; d += QUANT_THREADS) {
        Sums s = sums;
        float sum = 0, least = INFINITY, most = -INFINITY;

        ch.mean[d] = ch.up[d] = 0;
        if (d >= a.d)
            continue;
#pragma unroll 8
        for (int i = 0; i < n; i++, s.next()) {
            sum += s.row()[d];
            least = min_nan(least, s.row()[(MIN_V - SUM_V) * step + d]);
            most = max_nan(most, s.row()[(MAX_V - SUM_V) * step + d]);
        }
        /* amax/256: see cpu_quant.c. NaN if there is an Inf or NaN */
        const float mean = a.smooth_v ? sum / static_cast<float>(c.seq.nk) : 0;
        const float bad = (most - most) + (least - least);
        const float scale = fmaxf(most - mean, mean - least) / 256 + bad;
        ch.mean[d] = mean;
        ch.up[d] = scale > QUANT_MIN / 256 ? 1 / scale : 0;
        if (c.index == 0) {
            means[a.d_padded + d] = scale;
            means[2 * a.d_padded + d] = mean;
        }
    }
}

/*
 * A warp's way through K. Each lane has one vector of 8 channels of the four keys of a group, keys
 * 2g, 2g + 1, 2g + 8 and 2g + 9 of a run of 16, for the g-th; so many groups at a time as there
 * are lanes for. The others of the run are another warp's.
 */
template <int D, bool BF16> struct k_quantiser {
    static constexpr int LANES = D <= 64 ? 8 : D <= 128 ? 16 : 32; /* of a group */
    static constexpr int GROUPS = 32 / LANES, WARPS = 4 / GROUPS;
    const cuda_args &a;
    const int vector, key0; /* the first key of the group */
    const int pitch;        /* of keys */
    int place[2];           /* of the vector's bytes, of this key and the next one */
    float mean[8];

    /* A warp's groups are WARPS apart: their rows in shared memory are in different banks. */
    __device__ k_quantiser(const cuda_args &args, const k_channels<D> &ch)
        : a(args), vector(threadIdx.x % 32 / GROUPS),
          key0(2 * (threadIdx.x / 32 % WARPS + threadIdx.x % GROUPS * WARPS)),
          pitch(a.swizzled ? SWIZZLED_ROW<D> : D)
    {
#pragma unroll
        for (int i = 0; i < 2; i++)
            place[i] = a.swizzled ? swizzled_place<D>(key0 + i, 8 * vector, KERNEL_TILE_K * 128)
                                  : (key0 + i) * D + 8 * vector;
#pragma unroll
        for (int e = 0; e < 8; e++)
            mean[e] = 8 * vector < a.d ? ch.mean[8 * vector + e] : 0;
    }

    /*
     * `keys` of the run's keys are there; WHOLE: all are, and all channels. The largest magnitude
     * is NaN if there is a NaN, and so is the scale, which is returned, also if there is an Inf.
     * other(x): the largest of x and of what whoever has the run's other half has there.
     */
    template <bool WHOLE, typename Rows, typename Other>
    __device__ float run(const Rows &rows, int keys, int8_t *to, float *scale, Other other) const
    {
        const bool mine = WHOLE ? D == 8 * LANES || 8 * vector < D : 8 * vector < a.d;
        float x[4][8] = {}, top[4] = {};

#pragma unroll
        for (int i = 0; i < 4; i++) {
            if (!mine || !(WHOLE || key0 + i % 2 + i / 2 * 8 < keys))
                continue;
            unpack_16<BF16>(x[i], rows.from(i / 2 * 8).load(key0 + i % 2, vector));
#pragma unroll
            for (int e = 0; e < 8; e++)
                x[i][e] -= mean[e];
            if (a.rotate_qk)
                rotate_8(x[i]);
#pragma unroll
            for (int e = 0; e < 8; e++)
                top[e % 4] = max_nan(top[e % 4], fabsf(x[i][e]));
        }
        float amax = max_nan(max_nan(top[0], top[1]), max_nan(top[2], top[3]));
#pragma unroll
        for (int step = GROUPS; step < 32; step *= 2)
            amax = max_nan(amax, __shfl_xor_sync(~0u, amax, step));
        if (a.fp8)
            amax = other(amax);
        const float up = quant_up(amax), down = quant_step(amax);
        const uint32_t mask = up > 0 ? ~0u : 0; /* NaN * 0 is no 0 */

#pragma unroll
        for (int i = 0; i < 4; i++)
            if (D == 8 * LANES || 8 * vector < D)
                *reinterpret_cast<uint2 *>(to + i / 2 * 8 * pitch + place[i % 2]) =
                    make_uint2(to_bytes(x[i], up) & mask, to_bytes(x[i] + 4, up) & mask);
        if (vector == 0)
            scale[2 * key0] = down;
        return down;
    }
};

/* What warps tell each other of the largest magnitudes of K's groups: of two runs by turns. */
using k_tops = float[2][QUANT_THREADS / 32][4];

/* A chunk of K; *k_max, in shared memory, becomes its largest scale. */
template <int D, bool BF16, typename Rows>
__device__ void quantise_k(const cuda_args &a, const chunk &c, const Rows &rows,
                           const k_channels<D> &ch, k_tops &tops, unsigned *k_max)
{
    using way = k_quantiser<D, BF16>;
    constexpr int WARPS = way::WARPS, STEP = QUANT_THREADS / 32 / WARPS;
    const way quantiser(a, ch);
    const int warp = threadIdx.x / 32, group = threadIdx.x % way::GROUPS;
    int turn = 0;
    /* e4m3: a run of 16 keys has the scales of the next one, too: that of other warps */
    const auto other = [&](float top) {
        float(&now)[QUANT_THREADS / 32][4] = tops[turn];

        turn ^= 1;
        if (quantiser.vector == 0)
            now[warp][group] = top;
        barrier_wait(1 + warp / (2 * WARPS), 64 * WARPS); /* of both runs' warps */
        return max_nan(top, now[warp ^ WARPS][group]);
    };
    const int64_t block0 = c.head * a.blocks.total + c.block;
    /* whole blocks: what is beyond the last key is zero */
    const int runs =
        (c.end - c.begin + KERNEL_TILE_K - 1) / KERNEL_TILE_K * (KERNEL_TILE_K / QUANT_RUN);
    int8_t *to = a.k8 + block0 * KERNEL_TILE_K * D;
    float *scales = a.k_scale + block0 * 16;
    float top = 0;

    for (int run = warp / WARPS; run < runs; run += STEP) {
        const int keys = c.end - c.begin - run * QUANT_RUN;
        const Rows from = rows.from(run * QUANT_RUN);
        int8_t *const bytes =
            to + run / 4 * KERNEL_TILE_K * D + run % 4 * QUANT_RUN * quantiser.pitch;
        float *const scale = scales + run / 4 * 16 + run % 4;
        const float down = a.d == D && keys >= QUANT_RUN
                               ? quantiser.template run<true>(from, keys, bytes, scale, other)
                               : quantiser.template run<false>(from, keys, bytes, scale, other);
        top = isfinite(down) ? fmaxf(top, down) : top;
    }
    if (quantiser.vector == 0)
        atomicMax(k_max, __float_as_uint(top));
    if (a.fp8)
        __syncthreads(); /* tops are free again */
}

/*
 * n rows of V, transposed by the matrix loads: lane l gets keys 2c, 2c + 1, 2c + 8 and 2c + 9 of a
 * run, c = l % 4, of channel l / 4: the four bytes at 4c. Whole blocks, as K.
 */
template <int D, bool BF16>
__device__ void quantise_v(const cuda_args &a, const shared_rows<D> &rows, int n,
                           const v_channels<D> &ch, uint8_t *to)
{
    const int lane = threadIdx.x % 32;

    for (int vector = threadIdx.x / 32; vector < D / 8; vector += QUANT_THREADS / 32) {
        const int d = 8 * vector + lane / 4;
        const float mean = ch.mean[d], up = ch.up[d];
        const uint32_t mask = up > 0 ? ~0u : 0;
        const int place =
            d * KERNEL_TILE_K + (lane % 4 * 16 ^ (a.swizzled ? row_swizzle<KERNEL_TILE_K>(d) : 0));
        uint32_t from = shared_address(rows.first) + rows.place(lane, vector);
#pragma unroll 1
        for (int key0 = 0; key0 < n; key0 += KERNEL_TILE_K) {
            uint32_t words[4];
#pragma unroll
            for (int run = 0; run < 4; run += 2, from += 2 * QUANT_RUN * rows.BYTES) {
                uint32_t r[4];
                ldmatrix_trans(r, from);
#pragma unroll
                for (int i = 0; i < 2; i++) {
                    const float2 x = unpack_pair<BF16>(r[2 * i]),
                                 y = unpack_pair<BF16>(r[2 * i + 1]);
                    words[run + i] = pack_e4m3((x.x - mean) * up, (x.y - mean) * up,
                                               (y.x - mean) * up, (y.y - mean) * up) &
                                     mask;
                }
            }
            if (n - key0 < KERNEL_TILE_K)
#pragma unroll
                for (int i = 0; i < 16; i++)
                    if (i / 4 * QUANT_RUN + lane % 4 * 2 + i % 2 + i % 4 / 2 * 8 >= n - key0)
                        words[i / 4] &= ~(0xffu << i % 4 * 8);
            *reinterpret_cast<uint4 *>(to + key0 * D + place) = transpose_quad(words);
        }
    }
}

} // namespace sage

#endif
