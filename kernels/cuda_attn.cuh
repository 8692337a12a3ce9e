/*
 * cuda_attn.cuh - attention on tensor cores, any GPU from sm_80 on.
 *
 * A block has KERNEL_WARPS warps and a tile of query rows of one head; each warp has its own slabs
 * of 16 rows. Step by step through the keys, KERNEL_TILE_K at a time:
 *
 *   wait for K -> fetch V in the background -> S = Q K^T -> wait for V -> fetch the next K
 *              -> softmax -> O += P V
 *
 * (the order of FlashAttention-2, Dao, arXiv:2307.08691, section 3.) Q is quantised here: it is
 * read once in any case. S starts from MAGIC instead of 0, so that the 32-bit integer sum, read as
 * a binary32, is 1.5 * 2^23 + S, and S * c is one fused multiply-add; that is exact where c has 22
 * significant bits, since 1.5 * 2^23 * c then is a binary32 number.
 */
#ifndef SAGE_CUDA_ATTN_CUH
#define SAGE_CUDA_ATTN_CUH

#include <float.h>
#include <limits.h>

#include "cuda_args.h"
#include "cuda_mma.cuh"
#include "sageattn.h"

namespace sage
{

/* 16-bit P: how far a row's maximum may rise before O and the sums are rescaled. P <= 2^8 then. */
constexpr float MAX_LAG = 8;
constexpr int MAGIC = 0x4b400000;
constexpr float MAGIC_FLOAT = 12582912.0f;
constexpr float LOG2_E = 1.44269504f, LN_2 = 0.693147181f;

/* To int, with room to add a row or a key of a tile. */
__device__ inline int clamp(int64_t x)
{
    constexpr int MOST = INT_MAX - 1024;

    return static_cast<int>(x < -MOST ? -MOST : x > MOST ? MOST : x);
}

/* A tile's place in the problem. */
struct tile {
    cuda_seq seq;
    int64_t q_head, kv_head;
    int64_t head_slot, local; /* kv head in the workspace; group in `means` */
    int64_t block, chunk;     /* the sequence's first ones there */
    const char *v;            /* the sequence's first key */
    int row;                  /* first, of the sequence */
    int end;                  /* of the rows to be computed */
    int64_t low, high;        /* row i sees keys i + low ... i + high */
    bool there;
};

__device__ inline tile find_tile(const cuda_args &a, int tile_q)
{
    tile t = {};
    /* launched only if all tiles fit 31 bits */
    const unsigned total = static_cast<unsigned>(a.tiles.total), head = blockIdx.x / total;
    const unsigned q_heads = static_cast<unsigned>(a.n_q_heads);
    /* last rows first: the longest, if causal */
    const int64_t n = total - 1 - blockIdx.x % total;
    const bool rows = a.n_rows >= 0;

    const int64_t s = rows ? a.seq : space_find(a, a.tiles, a.q_offsets, a.q_first, tile_q, n);
    const int64_t index = rows ? n : n - space_start(a, a.tiles, a.q_offsets, a.q_first, tile_q, s);
    t.seq = seq_of(a, s);
    t.head_slot = head / q_heads;
    t.kv_head = a.head + t.head_slot;
    t.q_head = t.kv_head * a.gqa + a.q_head + head % q_heads;
    t.local = (s - a.seq) * a.n_heads + t.head_slot;
    t.block = t.head_slot * a.blocks.total +
              space_start(a, a.blocks, a.k_offsets, a.k_first, KERNEL_TILE_K, s);
    t.chunk = t.head_slot * a.chunks.total +
              space_start(a, a.chunks, a.k_offsets, a.k_first, a.chunk_keys, s);
    const int64_t row = (rows ? a.row : 0) + index * tile_q;
    const int64_t end = rows ? a.row + a.n_rows : t.seq.nq;
    t.row = static_cast<int>(row);
    t.end = static_cast<int>(end);
    const int64_t shift = a.bottom_right ? static_cast<int64_t>(t.seq.nk) - t.seq.nq : 0;
    t.low = a.low + shift;
    t.high = a.high + shift;
    t.v = a.v.data + t.seq.batch * a.v.stride[0] + t.kv_head * a.v.stride[1] +
          t.seq.k0 * a.v.stride[2];
    t.there = in_part(a, s, t.kv_head) && row < end;
    return t;
}

/*
 * 16 rows of Q to INT8, by one warp: rows to q8, what a step of a row stands for to q_scale (with
 * scale * log2 e in it), scale * q . mean(k) to q_mean. Rows beyond the last are zero. A row with
 * an Inf or NaN has scale NaN, and so has one whose scores with the largest keys would leave the
 * range in which MAGIC is exact.
 */
template <int D, bool BF16>
__device__ void quantise_q(const cuda_args &a, const tile &t, int row0, int8_t *q8, float *q_scale,
                           float *q_mean, float k_max)
{
    constexpr int LANES = D <= 64 ? 8 : D <= 128 ? 16 : 32; /* of a row */
    const int lane = threadIdx.x % 32, vector = lane % LANES;
    const bool column = 8 * vector < a.d;
    float mean[8] = {0};

    if (a.lse.data && a.smooth_k && column && t.seq.nk > 0) {
        const float *from = a.means + t.local * 3 * a.d_padded + 8 * vector;
#pragma unroll
        for (int i = 0; i < 8; i++)
            mean[i] = from[i];
    }
    const char *const from = a.q.data + t.seq.batch * a.q.stride[0] + t.q_head * a.q.stride[1] +
                             t.seq.q0 * a.q.stride[2] + 16 * vector;
#pragma unroll 4
    for (int r = lane / LANES; r < 16; r += 32 / LANES) {
        const int row = row0 + r;
        float x[8] = {0};
        uint32_t top = 0;

        if (row < t.end && column)
            unpack_16<BF16>(x, load_8(from + row * a.q.stride[2], a.q.aligned));
#pragma unroll
        for (int i = 0; i < 8; i++)
            top = max(top, __float_as_uint(x[i]) & 0x7fffffffu);
#pragma unroll
        for (int step = 1; step < LANES; step *= 2)
            top = max(top, __shfl_xor_sync(~0u, top, step));
        const float amax = __uint_as_float(top);
        const float up = quant_up(amax);
        if (8 * vector < D)
            *reinterpret_cast<uint2 *>(q8 + r * KERNEL_PITCH(D) + 8 * vector) =
                up > 0 ? make_uint2(to_bytes(x, up), to_bytes(x + 4, up)) : make_uint2(0, 0);
        if (vector == 0) {
            const float scale = quant_step(amax) * a.scale;
            q_scale[r] = scale * k_max < 0x1p104f ? scale : NAN;
        }
        if (!a.lse.data)
            continue;
        float dot = 0;
#pragma unroll
        for (int i = 0; i < 8; i++)
            dot += x[i] * mean[i];
#pragma unroll
        for (int step = 1; step < LANES; step *= 2)
            dot += __shfl_xor_sync(~0u, dot, step);
        if (vector == 0)
            q_mean[r] = dot * a.scale_lse;
    }
}

/* The largest of K's scales that the head has; by one warp. */
__device__ inline float largest_scale(const cuda_args &a, const tile &t)
{
    const int64_t n = (t.seq.nk + a.chunk_keys - 1) / a.chunk_keys;
    float top = 0;

    for (int64_t i = threadIdx.x % 32; i < n; i += 32)
        top = fmaxf(top, a.k_max[t.chunk + i]);
#pragma unroll
    for (int step = 1; step < 32; step *= 2)
        top = fmaxf(top, __shfl_xor_sync(~0u, top, step));
    return top;
}

/* What the mask tensor adds to a score, in base 2; a large finite one stays finite. */
__device__ inline float mask_bias(const char *at, int dtype)
{
    float x;

    if (dtype == SAGE_BOOL)
        return *at ? 0 : -INFINITY;
    if (dtype == SAGE_F32)
        x = *reinterpret_cast<const float *>(at);
    else if (dtype == SAGE_F16)
        x = __half2float(*reinterpret_cast<const __half *>(at));
    else
        x = __uint_as_float(static_cast<uint32_t>(*reinterpret_cast<const uint16_t *>(at)) << 16);
    const float y = x * LOG2_E;
    return y < -FLT_MAX && x >= -FLT_MAX ? -FLT_MAX : y;
}

template <int D, bool BF16, bool FP8, bool MASK> struct attention {
    static constexpr int SLABS = KERNEL_SLABS(D), TILE_Q = KERNEL_TILE_Q(D), TILE_K = KERNEL_TILE_K;
    static constexpr int THREADS = 32 * KERNEL_WARPS, KEY_TILES = TILE_K / 8, D_TILES = D / 8;
    static constexpr int K_PITCH = KERNEL_PITCH(D);
    static constexpr int V_PITCH = FP8 ? KERNEL_PITCH(TILE_K) : KERNEL_PITCH(2 * D);
    static constexpr bool Q_IN_REGISTERS = D <= 64;

    const cuda_args &a;
    const tile &t; /* in shared memory: there are no registers for what is seldom used */
    uint32_t q_shared, k_shared, v_shared; /* addresses, with this lane's part in them */
    int lane, row, column;                 /* first row of the warp; the lane's first column */
    int all_from, all_to;                  /* first keys of blocks that all rows see all of */
    int limit;          /* of scores' bits, before m has to move: none if a row has seen no key */
    const char *v_from; /* the sequence's first key */

    float o[SLABS][D_TILES][4];
    float p_sum[SLABS][4];              /* sum of P, in the columns of an accumulator */
    float top[SLABS][2], sum[SLABS][2]; /* m; sum of p, of this lane's columns, for lse */
    float q_scale[SLABS][2];
    uint32_t q_fragments[Q_IN_REGISTERS ? D / 32 : 1][SLABS][4];

    __device__ attention(const cuda_args &args, const tile &place) : a(args), t(place)
    {
    }

    /* --- from global to shared memory, by the whole block --- */

    /* K's scales come along with it; they are in use until after the next block's came. */
    __device__ void fetch_k(char *to, float *scales, int block) const
    {
        const int8_t *const from = a.k8 + (t.block + block) * (TILE_K * D);
        const uint32_t at = shared_address(to);

#pragma unroll
        for (int i = 0; i < TILE_K * D / 16 / THREADS; i++) {
            const unsigned n = threadIdx.x + i * THREADS;
            copy_async(at + n / (D / 16) * K_PITCH + n % (D / 16) * 16, from + 16 * n, true);
        }
        if (threadIdx.x < 4)
            copy_async(shared_address(scales + block % 2 * 16 + threadIdx.x * 4),
                       a.k_scale + (t.block + block) * 16 + threadIdx.x * 4, true);
    }

    __device__ void fetch_v(char *to, int block) const
    {
        const uint32_t at = shared_address(to);

        if constexpr (FP8) {
            const uint8_t *const from = a.v8 + (t.block + block) * (TILE_K * D);
#pragma unroll
            for (int i = 0; i < TILE_K * D / 16 / THREADS; i++) {
                const unsigned n = threadIdx.x + i * THREADS;
                copy_async(at + n / (TILE_K / 16) * V_PITCH + n % (TILE_K / 16) * 16, from + 16 * n,
                           true);
            }
        } else {
            constexpr int ROUNDS = TILE_K * D / 8 / THREADS;
            const int left = t.seq.nk - block * TILE_K; /* keys */
            const char *const from = v_from + static_cast<int64_t>(block) * TILE_K * a.v.stride[2];

            if (a.v.aligned && a.d == D && left >= TILE_K) {
#pragma unroll
                for (int i = 0; i < ROUNDS; i++) {
                    const unsigned n = threadIdx.x + i * THREADS, key = n / (D / 8);
                    copy_async(at + key * V_PITCH + n % (D / 8) * 16,
                               from + key * a.v.stride[2] + n % (D / 8) * 16, true);
                }
                return;
            }
#pragma unroll 1
            for (int i = 0; i < ROUNDS; i++) {
                const unsigned n = threadIdx.x + i * THREADS, key = n / (D / 8);
                const int vector = n % (D / 8), offset = key * V_PITCH + 16 * vector;
                const bool there = static_cast<int>(key) < left && 8 * vector < a.d;
                const char *p = there ? from + key * a.v.stride[2] + 16 * vector : v_from;
                if (a.v.aligned)
                    copy_async(at + offset, p, there);
                else
                    *reinterpret_cast<uint4 *>(to + offset) =
                        there ? load_8(p, false) : make_uint4(0, 0, 0, 0);
            }
        }
    }

    /* --- one step --- */

    __device__ void load_q(uint32_t (&fragment)[4], int slab, int k) const
    {
        ldmatrix(fragment, q_shared + slab * 16 * K_PITCH + 32 * k);
    }

    /* Integer scores, MAGIC higher. */
    __device__ void scores(int (&s)[SLABS][KEY_TILES][4]) const
    {
        constexpr int from[4] = {MAGIC, MAGIC, MAGIC, MAGIC};

#pragma unroll
        for (int k = 0; k < D / 32; k++) {
            uint32_t q[SLABS][4];
#pragma unroll
            for (int slab = 0; slab < SLABS; slab++)
                if constexpr (Q_IN_REGISTERS)
#pragma unroll
                    for (int i = 0; i < 4; i++)
                        q[slab][i] = q_fragments[k][slab][i];
                else
                    load_q(q[slab], slab, k);
#pragma unroll
            for (int n = 0; n < KEY_TILES; n += 2) {
                uint32_t b[4];
                ldmatrix(b, k_shared + n * 8 * K_PITCH + 32 * k);
#pragma unroll
                for (int slab = 0; slab < SLABS; slab++) {
                    mma_s8(s[slab][n], q[slab], b[0], b[1], k ? s[slab][n] : from);
                    mma_s8(s[slab][n + 1], q[slab], b[2], b[3], k ? s[slab][n + 1] : from);
                }
            }
        }
    }

    /* To scores in base 2. */
    __device__ void scale(float (&p)[SLABS][KEY_TILES][4], const int (&s)[SLABS][KEY_TILES][4],
                          const float4 &k_scale) const
    {
        const float runs[4] = {k_scale.x, k_scale.y, k_scale.z, k_scale.w};

#pragma unroll
        for (int i = 0; i < SLABS * TILE_K / 4; i++) {
            const int slab = i / (TILE_K / 4), half = i / 8 % 2, n = i % 8;
            const float c =
                __uint_as_float(__float_as_uint(q_scale[slab][half] * runs[n / 2]) & ~3u);
#pragma unroll
            for (int e = 2 * half; e < 2 * half + 2; e++)
                p[slab][n][e] = fmaf(__int_as_float(s[slab][n][e]), c, -MAGIC_FLOAT * c);
        }
    }

    /*
     * The same, relative to m, which is then free. The sum of two constants may be off by 3/4 of a
     * step of the integers: nothing beside what Q and K lost when they became integers.
     */
    __device__ void scale_from_top(float (&p)[SLABS][KEY_TILES][4],
                                   const int (&s)[SLABS][KEY_TILES][4], const float4 &k_scale) const
    {
        const float runs[4] = {k_scale.x, k_scale.y, k_scale.z, k_scale.w};

#pragma unroll
        for (int i = 0; i < SLABS * TILE_K / 4; i++) {
            const int slab = i / (TILE_K / 4), half = i / 8 % 2, n = i % 8;
            const float c = q_scale[slab][half] * runs[n / 2];
            const float minus = fmaf(-MAGIC_FLOAT, c, -reference(top[slab][half]));
#pragma unroll
            for (int e = 2 * half; e < 2 * half + 2; e++)
                p[slab][n][e] = fmaf(__int_as_float(s[slab][n][e]), c, minus);
        }
    }

    /* Row and key of an element, counted from the warp's first row and the block's first key. */
    __device__ int row_of(int slab, int e) const
    {
        return slab * 16 + lane / 4 + e / 2 * 8;
    }
    __device__ int key_of(int n, int e) const
    {
        return n * 8 + column + e % 2;
    }

    /* Scores of keys that a row does not see become -inf. */
    __device__ void hide(float (&p)[SLABS][KEY_TILES][4], int key0) const
    {
        if constexpr (MASK)
            add_mask(p, key0);
        if (key0 >= all_from && key0 <= all_to)
            return;
        /* the first and last key that the warp's row 0 sees, from this lane's first column on */
        const int64_t base = static_cast<int64_t>(row) - key0 - column;
        const int from = clamp(base + t.low), to = clamp(base + t.high);
        const int end = t.seq.nk - key0 - column;

#pragma unroll
        for (int slab = 0; slab < SLABS; slab++)
#pragma unroll
            for (int half = 0; half < 2; half++) {
                const int r = row_of(slab, 2 * half);
                const int first = from + r, last = to + r < end ? to + r : end - 1;
#pragma unroll
                for (int n = 0; n < KEY_TILES; n++)
#pragma unroll
                    for (int e = 0; e < 2; e++)
                        if (8 * n + e < first || 8 * n + e > last)
                            p[slab][n][2 * half + e] = -INFINITY;
            }
    }

    /* A key that is masked out is not seen, whatever it holds. */
    __device__ void add_mask(float (&p)[SLABS][KEY_TILES][4], int key0) const
    {
        const char *from =
            a.mask.data + t.seq.batch * a.mask.stride[0] + t.q_head * a.mask.stride[1];

#pragma unroll
        for (int slab = 0; slab < SLABS; slab++)
#pragma unroll
            for (int half = 0; half < 2; half++) {
                const int r = row + row_of(slab, 2 * half);
                const char *line = from + r * a.mask.stride[2];
                if (r >= t.end)
                    continue;
#pragma unroll
                for (int n = 0; n < KEY_TILES; n++)
#pragma unroll
                    for (int e = 2 * half; e < 2 * half + 2; e++) {
                        const int key = key0 + key_of(n, e);
                        if (key >= t.seq.nk)
                            continue;
                        const float bias = mask_bias(line + key * a.mask_key, a.mask_dtype);
                        p[slab][n][e] = bias == -INFINITY ? bias : p[slab][n][e] + bias;
                    }
            }
    }

    /* The largest score of each row in this block, to all lanes that have the row. */
    __device__ static float largest(const float (&p)[KEY_TILES][4], int half)
    {
        float m = fmaxf(p[0][2 * half], p[0][2 * half + 1]);

#pragma unroll
        for (int n = 1; n < KEY_TILES; n++)
            m = fmaxf(m, fmaxf(p[n][2 * half], p[n][2 * half + 1]));
        m = fmaxf(m, __shfl_xor_sync(~0u, m, 1));
        return fmaxf(m, __shfl_xor_sync(~0u, m, 2));
    }

    /* m of one row moves; x: what that makes of a number that is relative to it. */
    __device__ void rescale(int slab, int half, float x)
    {
        sum[slab][half] *= x;
#pragma unroll
        for (int e = 2 * half; e < 2 * half + 2; e++) {
            p_sum[slab][e] *= x;
#pragma unroll
            for (int n = 0; n < D_TILES; n++)
                o[slab][n][e] *= x;
        }
    }

    /*
     * 16 bits, scores relative to m: as long as none exceeds MAX_LAG, m stays. Positive floats are
     * ordered like their bits, negative ones are below them.
     */
    __device__ void follow_from_top(float (&p)[SLABS][KEY_TILES][4])
    {
        int high[4] = {INT_MIN, INT_MIN, INT_MIN, INT_MIN}; /* of four: no long chain */
        bool none = false;

#pragma unroll
        for (int slab = 0; slab < SLABS; slab++)
#pragma unroll
            for (int n = 0; n < KEY_TILES; n++)
#pragma unroll
                for (int e = 0; e < 4; e += 2)
                    high[n % 2 * 2 + e / 2] =
                        max(max(high[n % 2 * 2 + e / 2], __float_as_int(p[slab][n][e])),
                            __float_as_int(p[slab][n][e + 1]));
        const int highest = max(max(high[0], high[1]), max(high[2], high[3]));
        if (!__any_sync(~0u, highest >= limit))
            return;
#pragma unroll
        for (int slab = 0; slab < SLABS; slab++)
#pragma unroll
            for (int half = 0; half < 2; half++) {
                const float most = largest(p[slab], half), before = top[slab][half];
                const float after = before == -INFINITY ? most : before + fmaxf(most, 0);
                const float by = reference(after) - reference(before);
                top[slab][half] = after;
                none |= after == -INFINITY;
                rescale(slab, half, before == -INFINITY ? 0 : exp2_fast(-by));
#pragma unroll
                for (int n = 0; n < KEY_TILES; n++)
#pragma unroll
                    for (int e = 2 * half; e < 2 * half + 2; e++)
                        p[slab][n][e] -= by;
            }
        limit = __any_sync(~0u, none) ? INT_MIN : __float_as_int(MAX_LAG);
    }

    /* 16 bits, scores as they are, to scores relative to m. */
    __device__ void follow(float (&p)[SLABS][KEY_TILES][4])
    {
#pragma unroll
        for (int slab = 0; slab < SLABS; slab++)
#pragma unroll
            for (int half = 0; half < 2; half++) {
                const float most = largest(p[slab], half), before = top[slab][half];
                const bool moves = before == -INFINITY || most > before + MAX_LAG;
                const float after = moves ? fmaxf(before, most) : before;
                if (__any_sync(~0u, moves))
                    rescale(slab, half,
                            before == -INFINITY ? 0
                            : after == before   ? 1
                                                : exp2_fast(before - after));
                top[slab][half] = after;
#pragma unroll
                for (int n = 0; n < KEY_TILES; n++)
#pragma unroll
                    for (int e = 2 * half; e < 2 * half + 2; e++)
                        p[slab][n][e] -= reference(after);
            }
    }

    /* 16 bits: integer scores to scores relative to m. */
    template <bool EXACT>
    __device__ void relate(float (&p)[SLABS][KEY_TILES][4], const int (&s)[SLABS][KEY_TILES][4],
                           const float4 &k_scale, int key0)
    {
        if constexpr (EXACT) {
            scale(p, s, k_scale);
            hide(p, key0);
            follow(p);
        } else {
            scale_from_top(p, s, k_scale);
            hide(p, key0);
            follow_from_top(p);
        }
    }

    /*
     * e4m3: integer scores to 2^8 P before rounding. There is no room for m to lag; the caller
     * rescales O and the sum of P, by `decay`.
     */
    __device__ void softmax_8(float (&p)[SLABS][KEY_TILES][4], const int (&s)[SLABS][KEY_TILES][4],
                              const float4 &k_scale, int key0, float (&decay)[SLABS][2])
    {
        scale(p, s, k_scale);
        hide(p, key0);
#pragma unroll
        for (int slab = 0; slab < SLABS; slab++)
#pragma unroll
            for (int half = 0; half < 2; half++) {
                const float before = top[slab][half], m = fmaxf(before, largest(p[slab], half));
                const float from = reference(m);
                decay[slab][half] = before == -INFINITY ? 0 : exp2_fast(before - m);
                top[slab][half] = m;
                sum[slab][half] *= decay[slab][half];
#pragma unroll
                for (int n = 0; n < KEY_TILES; n++)
#pragma unroll
                    for (int e = 2 * half; e < 2 * half + 2; e++)
                        sum[slab][half] += p[slab][n][e] = exp2_fast(p[slab][n][e] - from);
            }
    }

    /* What P's exponents are relative to: nothing seen yet is 0; e4m3 has P times 2^8. */
    __device__ static float reference(float m)
    {
        return (m == -INFINITY ? 0 : m) - (FP8 ? 8 : 0);
    }

    /* Of the 16 keys from 16 * k on: part number i of n of their exponentials, and their sums. */
    __device__ void exponentiate(float (&p)[SLABS][KEY_TILES][4], int k, int i, int n)
    {
        constexpr int ALL = SLABS * 8;

#pragma unroll
        for (int at = i * ALL / n; at < (i + 1) * ALL / n; at++) {
            const int slab = at / 8, e = at % 4;
            float &x = p[slab][2 * k + at / 4 % 2][e];
            x = exp2_fast(x);
            sum[slab][e / 2] += x;
        }
    }

    /*
     * Scores relative to m to P; O += P V, and the sum of P in the same way, with V = 1. Between
     * the products for 16 keys stand the exponentials of the next 16: two units that are busy for
     * 6 and 8 cycles with each instruction.
     */
    __device__ void add_16(float (&p)[SLABS][KEY_TILES][4])
    {
        constexpr uint32_t ONES = BF16 ? 0x3f803f80u : 0x3c003c00u;
        constexpr int STEPS = TILE_K / 16, PAIRS = D_TILES / 2;

        exponentiate(p, 0, 0, 1);
#pragma unroll
        for (int k = 0; k < STEPS; k++) {
            uint32_t f[SLABS][4];
#pragma unroll
            for (int slab = 0; slab < SLABS; slab++) {
#pragma unroll
                for (int i = 0; i < 4; i++)
                    f[slab][i] = pack_16<BF16>(p[slab][2 * k + i / 2][i % 2 * 2],
                                               p[slab][2 * k + i / 2][i % 2 * 2 + 1]);
                mma_16<BF16>(p_sum[slab], f[slab], ONES, ONES);
            }
#pragma unroll
            for (int pair = 0; pair < PAIRS; pair++) {
                uint32_t b[4];
                ldmatrix_trans(b, v_shared + k * 16 * V_PITCH + pair * 32);
#pragma unroll
                for (int slab = 0; slab < SLABS; slab++) {
                    mma_16<BF16>(o[slab][2 * pair], f[slab], b[0], b[1]);
                    mma_16<BF16>(o[slab][2 * pair + 1], f[slab], b[2], b[3]);
                    if (k + 1 < STEPS)
                        exponentiate(p, k + 1, pair * SLABS + slab, PAIRS * SLABS);
                }
            }
        }
    }

    /* The same in e4m3: each block apart, since the tensor core's own sums are short. */
    __device__ void add_8(const float (&p)[SLABS][KEY_TILES][4], const float (&decay)[SLABS][2])
    {
        constexpr uint32_t ONES = 0x38383838u;
        uint32_t f[SLABS][2][4];

#pragma unroll
        for (int slab = 0; slab < SLABS; slab++) {
            float block[4] = {0};
#pragma unroll
            for (int k = 0; k < 2; k++) {
#pragma unroll
                for (int i = 0; i < 4; i++) {
                    const int n = 4 * k + i / 2 * 2, e = i % 2 * 2;
                    f[slab][k][i] = pack_e4m3(p[slab][n][e], p[slab][n][e + 1]) |
                                    pack_e4m3(p[slab][n + 1][e], p[slab][n + 1][e + 1]) << 16;
                }
                mma_e4m3(block, f[slab][k], ONES, ONES);
            }
#pragma unroll
            for (int e = 0; e < 4; e++)
                p_sum[slab][e] = fmaf(p_sum[slab][e], decay[slab][e / 2], block[e]);
        }
#pragma unroll
        for (int n = 0; n < D_TILES; n++) {
            uint32_t b[4];
            ldmatrix(b, v_shared + n * 8 * V_PITCH);
#pragma unroll
            for (int slab = 0; slab < SLABS; slab++) {
                float block[4] = {0};
                mma_e4m3(block, f[slab][0], b[0], b[1]);
                mma_e4m3(block, f[slab][1], b[2], b[3]);
#pragma unroll
                for (int e = 0; e < 4; e++)
                    o[slab][n][e] = fmaf(o[slab][n][e], decay[slab][e / 2], block[e]);
            }
        }
    }

    /* --- results --- */

    /*
     * Two elements of o. A sound one is between V's extremes but for rounding, hence finite; beyond
     * the format's range it is its largest number. Inf * 0 is NaN.
     */
    __device__ uint32_t element_pair(const float *x, float up, const float *means) const
    {
        const float most = BF16 ? 0x1.fep127f : 65504;
        float y[2];

#pragma unroll
        for (int e = 0; e < 2; e++) {
            float z = x[e] * up;
            if constexpr (FP8)
                z = z * means[a.d_padded + e] + means[2 * a.d_padded + e];
            z = up == 0 ? 0 : z;
            y[e] = fmaf(z, 0, fmaxf(fminf(z, most), -most));
        }
        return pack_16<BF16>(y[0], y[1]);
    }

    __device__ void finish(const float *q_mean) const
    {
        const float *means = a.means + t.local * 3 * a.d_padded + column;
        char *const out = a.o.data + t.seq.batch * a.o.stride[0] + t.q_head * a.o.stride[1] +
                          t.seq.q0 * a.o.stride[2] + 2 * column;

#pragma unroll
        for (int slab = 0; slab < SLABS; slab++)
#pragma unroll
            for (int half = 0; half < 2; half++) {
                const int r = row + row_of(slab, 2 * half);
                const float total = p_sum[slab][2 * half];
                const float up = total == 0 ? 0 : reciprocal(total); /* 0: nothing was seen */
                char *const to = out + r * a.o.stride[2];
                if (r >= t.end)
                    continue;
#pragma unroll
                for (int n = 0; n < D_TILES; n++) {
                    if (8 * n >= a.d)
                        break;
                    const uint32_t pair = element_pair(&o[slab][n][2 * half], up, means + 8 * n);
                    if (a.o.aligned) {
                        *reinterpret_cast<uint32_t *>(to + 16 * n) = pair;
                    } else {
                        reinterpret_cast<uint16_t *>(to)[8 * n] = static_cast<uint16_t>(pair);
                        reinterpret_cast<uint16_t *>(to)[8 * n + 1] =
                            static_cast<uint16_t>(pair >> 16);
                    }
                }
                if (a.lse.data)
                    finish_lse(r, slab, half, total == 0, q_mean[row_of(slab, 2 * half)]);
            }
    }

    __device__ void finish_lse(int r, int slab, int half, bool none, float q_mean) const
    {
        const unsigned quad = 0xfu << (lane / 4 * 4); /* the lanes that have the row */
        float l = sum[slab][half];

        l += __shfl_xor_sync(quad, l, 1);
        l += __shfl_xor_sync(quad, l, 2);
        l = LN_2 * (reference(top[slab][half]) + log2f(l)) + q_mean;
        if (lane % 4 == 0)
            *reinterpret_cast<float *>(a.lse.data + t.seq.batch * a.lse.stride[0] +
                                       t.q_head * a.lse.stride[1] +
                                       (t.seq.q0 + r) * a.lse.stride[2]) = none          ? -INFINITY
                                                                           : isfinite(l) ? l
                                                                                         : NAN;
    }

    /* --- all of it --- */

    template <bool EXACT>
    __device__ void steps(char *k8, char *v, float *k_scales, int block, int end)
    {
#pragma unroll 1
        for (; block < end; block++) {
            const int key0 = block * TILE_K;
            union { /* in place: there are no registers for both */
                int s[SLABS][KEY_TILES][4];
                float p[SLABS][KEY_TILES][4];
            } x;

            copy_wait<0>();
            __syncthreads(); /* K is there; nobody needs the V before */
            fetch_v(v, block);
            copy_commit();
            scores(x.s);
            copy_wait<0>();
            __syncthreads(); /* V is there; nobody needs this K any more */
            if (block + 1 < end)
                fetch_k(k8, k_scales, block + 1);
            copy_commit();
            const float4 k_scale =
                *reinterpret_cast<const float4 *>(k_scales + block % 2 * 16 + lane % 4 * 4);
            if constexpr (FP8) {
                float decay[SLABS][2];
                softmax_8(x.p, x.s, k_scale, key0, decay);
                add_8(x.p, decay);
            } else {
                relate<EXACT>(x.p, x.s, k_scale, key0);
                add_16(x.p);
            }
        }
    }

    __device__ void run(char *shared)
    {
        char *const q8 = shared, *const k8 = q8 + KERNEL_Q_BYTES(D),
                    *const v = k8 + KERNEL_K_BYTES(D);
        float *const scales = reinterpret_cast<float *>(v + KERNEL_V_BYTES(D, FP8));
        __shared__ __align__(16) float k_scales[2 * 16]; /* of two blocks of keys */
        const int warp = threadIdx.x / 32;

        lane = threadIdx.x % 32;
        column = lane % 4 * 2;
        row = t.row + warp * 16 * SLABS;

        all_from = clamp(row + t.low + (16 * SLABS - 1));
        all_to = clamp(row + t.high - (TILE_K - 1));
        all_to = all_to < t.seq.nk - TILE_K ? all_to : t.seq.nk - TILE_K;

        /* the keys that some row of the tile sees */
        const int64_t last_row = (t.row + TILE_Q < t.end ? t.row + TILE_Q : t.end) - 1;
        const int64_t first = t.row + t.low > 0 ? t.row + t.low : 0;
        const int64_t last = last_row + t.high + 1 < t.seq.nk ? last_row + t.high + 1 : t.seq.nk;
        int block = static_cast<int>(first / TILE_K);
        const int end = last > first ? static_cast<int>((last + TILE_K - 1) / TILE_K) : block;

        v_from = t.v;
        if (block < end)
            fetch_k(k8, k_scales, block);
        copy_commit();

        /* Q: rows of this warp, by this warp */
        const float k_max = largest_scale(a, t);
#pragma unroll 1
        for (int slab = 0; slab < SLABS; slab++) {
            const int r = warp * 16 * SLABS + slab * 16;
            quantise_q<D, BF16>(a, t, t.row + r, reinterpret_cast<int8_t *>(q8) + r * K_PITCH,
                                scales + r, scales + TILE_Q + r, k_max);
        }
        __syncwarp();
        limit = INT_MIN;
        bool coarse = false; /* a step of the integers may be worth a factor of 2 */
        q_shared = shared_address(q8) + (warp * 16 * SLABS + lane % 16) * K_PITCH + lane / 16 * 16;
        k_shared = shared_address(k8) + (lane / 16 * 8 + lane % 8) * K_PITCH + lane / 8 % 2 * 16;
        if constexpr (FP8)
            v_shared = shared_address(v) + lane % 8 * V_PITCH + lane / 8 * 16;
        else
            v_shared = shared_address(v) + lane % 16 * V_PITCH + lane / 16 * 16;
#pragma unroll
        for (int slab = 0; slab < SLABS; slab++) {
#pragma unroll
            for (int half = 0; half < 2; half++) {
                q_scale[slab][half] = scales[warp * 16 * SLABS + row_of(slab, 2 * half)];
                coarse |= q_scale[slab][half] * k_max >= 1;
                top[slab][half] = -INFINITY;
                sum[slab][half] = 0;
            }
#pragma unroll
            for (int e = 0; e < 4; e++)
                p_sum[slab][e] = 0;
#pragma unroll
            for (int n = 0; n < D_TILES; n++)
#pragma unroll
                for (int e = 0; e < 4; e++)
                    o[slab][n][e] = 0;
            if constexpr (Q_IN_REGISTERS)
#pragma unroll
                for (int k = 0; k < D / 32; k++)
                    load_q(q_fragments[k][slab], slab, k);
        }

        if constexpr (FP8 || MASK)
            steps<true>(k8, v, k_scales, block, end);
        else if (__syncthreads_or(coarse))
            steps<true>(k8, v, k_scales, block, end);
        else
            steps<false>(k8, v, k_scales, block, end);
        copy_wait<0>();

        finish(scales + TILE_Q + warp * 16 * SLABS);
    }
};

template <int D, bool BF16, bool FP8, bool MASK>
__global__ void __launch_bounds__(32 * KERNEL_WARPS, 2)
    attn_kernel(const __grid_constant__ cuda_args args)
{
    extern __shared__ __align__(16) char shared[];
    __shared__ tile place;

    if (threadIdx.x == 0)
        place = find_tile(args, KERNEL_TILE_Q(D));
    __syncthreads();
    if (!place.there)
        return;
#if __CUDA_ARCH__ >= 890
    attention<D, BF16, FP8, MASK>(args, place).run(shared);
#else
    if constexpr (!FP8)
        attention<D, BF16, FP8, MASK>(args, place).run(shared);
#endif
}

template <int D, bool BF16, bool FP8, bool MASK>
cudaError_t attn_launch(const cuda_args *args, unsigned blocks, cudaStream_t stream)
{
    attn_kernel<D, BF16, FP8, MASK>
        <<<blocks, 32 * KERNEL_WARPS, KERNEL_SMEM(D, FP8), stream>>>(*args);
    return cudaGetLastError();
}

} // namespace sage

/* A row of one of the tables; rows that another file has are empty here. */
#define ATTN_ROW(here, d, dtype, pv, feature) ATTN_ROW_(here, d, dtype, pv, feature)
#define ATTN_ROW_(here, d, dtype, pv, feature) ATTN_ROW_##here(d, dtype, pv, feature)
#define ATTN_ROW_0(d, dtype, pv, feature) {nullptr, nullptr},
#define ATTN_ROW_1(d, dtype, pv, feature)                                                          \
    {(const void *)                                                                                \
         sage::attn_kernel<d, SAGE_KERNEL_##dtype, SAGE_KERNEL_##pv, SAGE_KERNEL_##feature>,       \
     sage::attn_launch<d, SAGE_KERNEL_##dtype, SAGE_KERNEL_##pv, SAGE_KERNEL_##feature>},

#endif
