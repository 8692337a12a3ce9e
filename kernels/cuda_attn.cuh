/*
 * cuda_attn.cuh - what every attention kernel for GPUs does for a tile of query rows of one head:
 * where it is, Q to INT8, which keys its rows see, the running maximum, the results. How scores and
 * P V come about is in cuda_attn_mma.cuh and cuda_attn_wgmma.cuh.
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
/*
 * e4m3 has P times 2^8, and m does not lag: rounding is best where the largest P of a row is a
 * power of two, 2 % worse on average where it is anything.
 */
constexpr float E4M3_SHIFT = 8, E4M3_LAG = 0;
constexpr float LOG2_E = 1.44269504f, LN_2 = 0.693147181f;

/* To int, with room to add a row or a key of a tile. */
__device__ inline int clamp(int64_t x)
{
    constexpr int MOST = INT_MAX - 1024;

    return static_cast<int>(x < -MOST ? -MOST : x > MOST ? MOST : x);
}

/*
 * Two elements of o. A sound one is between V's extremes but for rounding, hence finite; beyond the
 * format's range it is its largest number. Inf * 0 is NaN.
 */
template <bool BF16> __device__ __forceinline__ uint32_t sound_pair(float x, float y)
{
    return pack_finite_16<BF16>(fmaf(x, 0, x), fmaf(y, 0, y));
}

/*
 * A counter in the workspace that nobody has to clear before: one word, the call's number and a
 * count. What else it may hold is of no call that is under way, so each block, by one thread, first
 * sees to it that the word is this call's; where the exchange fails another block was faster.
 */
__device__ inline void open_counter(const cuda_args &a, unsigned long long *word)
{
    const unsigned long long seen = *static_cast<volatile unsigned long long *>(word);

    if ((seen & ~CALL_COUNT) != a.call)
        atomicCAS(word, seen, a.call);
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
    int low, high;            /* keys that its first row sees; of the next one each is one more */
    int first, last;          /* the keys that some row of the tile sees, and one more */
    float k_max;              /* wgmma: largest scale of K */
    unsigned index, split;    /* which one it is, which part of its keys */
    bool there;
};

/*
 * Tile number `index`, to shared memory; there are only launches whose tiles all fit 31 bits. Those
 * of a column are taken last rows first: the longest, if causal. QUANTISED: also where its keys lie
 * in the workspace.
 */
template <bool QUANTISED = true>
__device__ inline void find_tile(const cuda_args &a, int tile_q, unsigned index, tile &t)
{
    const cuda_order &order = a.order;
    const unsigned turn = divide(index, order.turn), place = index - turn * order.turn.by;
    const cuda_divider &columns = turn < order.turns ? order.together : order.rest;
    const unsigned later = divide(place, columns); /* tiles of its column, taken before */
    const unsigned column = turn * order.together.by + place - later * columns.by;
    const unsigned head = divide(column, order.batches), batch = column - head * order.batches.by;
    const unsigned head_slot = divide(head, order.heads);

    int64_t s = a.seq + batch, in_seq = order.each - 1 - later;
    if (!a.tiles.each) { /* of all sequences */
        const int64_t n = in_seq;
        s = space_find(a, a.tiles, a.q_offsets, a.q_first, tile_q, n);
        in_seq = n - space_start(a, a.tiles, a.q_offsets, a.q_first, tile_q, s);
    }
    const bool rows = a.n_rows >= 0;
    const cuda_seq seq = seq_of(a, s);
    t.seq = seq;
    t.kv_head = a.head + head_slot;
    t.q_head = t.kv_head * a.gqa + a.q_head + (head - head_slot * order.heads.by);
    if constexpr (QUANTISED) {
        t.head_slot = head_slot;
        t.local = (s - a.seq) * a.n_heads + head_slot;
        t.block = head_slot * a.blocks.total +
                  space_start(a, a.blocks, a.k_offsets, a.k_first, KERNEL_TILE_K, s);
        t.chunk = head_slot * a.chunks.total +
                  space_start(a, a.chunks, a.k_offsets, a.k_first, a.chunk_keys, s);
        t.v = a.v.data + seq.batch * a.v.stride[0] + t.kv_head * a.v.stride[1] +
              seq.k0 * a.v.stride[2];
    }
    const int64_t row = (rows ? a.row : 0) + in_seq * tile_q;
    const int64_t end = rows ? a.row + a.n_rows : seq.nq;
    t.row = static_cast<int>(row);
    t.end = static_cast<int>(end);
    t.there = in_part(a, s, t.kv_head) && row < end;
    const int64_t shift = a.bottom_right ? static_cast<int64_t>(seq.nk) - seq.nq : 0;
    t.low = clamp(row + shift + a.low);
    t.high = clamp(row + shift + a.high);
    t.first = t.low > 0 ? t.low : 0;
    const int last = t.high + static_cast<int>(end - row < tile_q ? end - row : tile_q);
    t.last = last < seq.nk ? last : seq.nk;
}

/* Of a query row, in shared memory. */
struct query {
    float scale; /* what a step of its integers stands for, times scale * log2 e */
    float mean;  /* scale * q . mean(k), for lse */
};

/*
 * 16 rows of Q to INT8, by one warp: numbers to q8, the rest to `to`. The rows lie `stride` bytes
 * apart, in global memory or, `SHARED`, in shared memory, there with zeros beyond the last row and
 * channel; then the numbers are swizzled as wgmma wants them. `k_mean`: NULL where K is as it was
 * or lse not wanted. A row with an Inf or NaN has scale NaN, and so has one whose scores with the
 * largest keys would leave the range in which sums with MAGIC are exact.
 */
template <int D, bool BF16, bool SHARED, bool ROTATE>
__device__ __forceinline__ void quantise_rows(const cuda_args &a, const tile &t, int row0,
                                              const char *rows, int64_t stride, const float *k_mean,
                                              int8_t *q8, query *to, float k_max)
{
    constexpr int LANES = D <= 64 ? 4 : D <= 128 ? 8 : 16; /* of a row, 16 channels each */
    constexpr int ROWS = 32 / LANES, STEPS = 16 / ROWS;
    int lane = threadIdx.x % 32;
    asm volatile("" : "+r"(lane)); /* what follows from it does not stay in registers */
    const int column = 16 * (lane % LANES), end = t.end - row0;
    const auto load = [&](uint4(&raw)[2], int r) {
#pragma unroll
        for (int i = 0; i < 2; i++) {
            const char *const from = rows + r * stride + 2 * column + 16 * i;
            if constexpr (SHARED)
                raw[i] = *reinterpret_cast<const uint4 *>(from);
            else
                raw[i] = r < end && column + 8 * i < a.d ? load_8(from, a.q.aligned)
                                                         : make_uint4(0, 0, 0, 0);
        }
    };

    /* no branch in it: so the steps are side by side */
#pragma unroll SHARED ? STEPS : 2
    for (int step = 0; step < STEPS; step++) {
        const int r = step * ROWS + lane / LANES;
        uint4 raw[2];

        load(raw, r);
        float x[16], amax = 0;
        unpack_16<BF16>(x, raw[0]);
        unpack_16<BF16>(x + 8, raw[1]);
        if constexpr (ROTATE) {
            rotate_8(x);
            rotate_8(x + 8);
#pragma unroll
            for (int i = 0; i < 16; i++)
                amax = max_nan(amax, fabsf(x[i]));
#pragma unroll
            for (int i = 1; i < LANES; i *= 2)
                amax = max_nan(amax, __shfl_xor_sync(~0u, amax, i));
        } else {
            uint32_t top = max_abs_16<BF16>(max_abs_16<BF16>(0, raw[0]), raw[1]);
#pragma unroll
            for (int i = 1; i < LANES; i *= 2)
                top = max_abs_16<BF16>(top, __shfl_xor_sync(~0u, top, i));
            amax = larger_16<BF16>(top);
        }
        const float up = quant_up(amax), scale = quant_step(amax) * a.scale;
        if (column < D)
            *reinterpret_cast<uint4 *>(
                q8 + (SHARED ? swizzled_place<D>(r, column, WGMMA_TILE_Q(D, 0) * 128)
                             : r * KERNEL_PITCH(D) + column)) =
                make_uint4(to_bytes(x, up), to_bytes(x + 4, up), to_bytes(x + 8, up),
                           to_bytes(x + 12, up));
        if (column == 0)
            to[r].scale = scale * k_max < 0x1p104f ? scale : NAN;
    }
    if (!a.lse.data)
        return;
#pragma unroll 1
    for (int step = 0; step < STEPS; step++) {
        const int r = step * ROWS + lane / LANES;
        float dot = 0;

        if (k_mean) {
            uint4 raw[2];
            load(raw, r);
#pragma unroll
            for (int i = 0; i < 2; i++) {
                float x[8];
                unpack_16<BF16>(x, raw[i]);
                if (column + 8 * i < a.d)
#pragma unroll
                    for (int j = 0; j < 8; j++)
                        dot += x[j] * k_mean[column + 8 * i + j];
            }
#pragma unroll
            for (int i = 1; i < LANES; i *= 2)
                dot += __shfl_xor_sync(~0u, dot, i);
        }
        if (column == 0)
            to[r].mean = dot * a.scale_lse;
    }
}

template <int D, bool BF16, bool SHARED>
__device__ __forceinline__ void quantise_q(const cuda_args &a, const tile &t, int row0,
                                           const char *rows, int64_t stride, const float *k_mean,
                                           int8_t *q8, query *to, float k_max)
{
    if (a.rotate_qk)
        quantise_rows<D, BF16, SHARED, true>(a, t, row0, rows, stride, k_mean, q8, to, k_max);
    else
        quantise_rows<D, BF16, SHARED, false>(a, t, row0, rows, stride, k_mean, q8, to, k_max);
}

/* Where row `row` of the tile's sequence is in q. */
__device__ inline const char *q_row(const cuda_args &a, const tile &t, int row)
{
    return a.q.data + t.seq.batch * a.q.stride[0] + t.q_head * a.q.stride[1] +
           (t.seq.q0 + row) * a.q.stride[2];
}

/* K's mean, if it has been subtracted and lse has to know. */
__device__ inline const float *k_mean_of(const cuda_args &a, const tile &t)
{
    return a.lse.data && a.smooth_k && t.seq.nk > 0 ? a.means + t.local * 3 * a.d_padded : nullptr;
}

/* The largest of K's scales that the head has; by one warp. */
__device__ inline float largest_scale(const cuda_args &a, const tile &t)
{
    const unsigned keys = static_cast<unsigned>(a.chunk_keys), n = (t.seq.nk + keys - 1) / keys;
    float top = 0;

    for (unsigned i = threadIdx.x % 32; i < n; i += 32)
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

/*
 * The rows of one warp, in SLABS of 16, against KEYS keys at a time. Accumulators are those of
 * mma.m16n8: see cuda_mma.cuh. SHARED: every warpgroup has the same rows.
 */
template <int D, int SLABS, int KEYS, bool BF16, bool FP8, bool MASK, bool BITS = false,
          bool SHARED = false>
struct rows {
    static constexpr int KEY_TILES = KEYS / 8, D_TILES = D / 8;
    static constexpr float SHIFT = FP8 ? E4M3_SHIFT : 0, LAG = FP8 ? E4M3_LAG : MAX_LAG;

    const cuda_args &a;
    /* in shared memory: there are no registers for what is seldom used */
    const tile &t;
    const query *queries; /* of the tile's rows */
    int lane;
    int all_from, all_to; /* first keys of blocks that all rows see all of */
    bool moves;           /* m does, whatever comes: a row saw no key yet */

    float o[SLABS][D_TILES + 1][4];     /* last: the sum of P, as if V had columns of ones */
    float top[SLABS][2], sum[SLABS][2]; /* m; sum of p, of this lane's columns, for lse */

    /* `of_tile`: of all its rows. */
    __device__ rows(const cuda_args &args, const tile &place, const query *of_tile)
        : a(args), t(place), queries(of_tile), lane(threadIdx.x % 32), moves(true)
    {
        all_from = first_row() + t.low + (16 * SLABS - 1);
        all_to = first_row() + t.high - (KEYS - 1);
        all_to = all_to < t.seq.nk - KEYS ? all_to : t.seq.nk - KEYS;
    }

    /* The warp's first row: in the tile; in the sequence. */
    __device__ static int first_row()
    {
        return (SHARED ? threadIdx.x % 128 : threadIdx.x) / 32 * 16 * SLABS;
    }
    __device__ int row() const
    {
        return t.row + first_row();
    }

    __device__ const query &query_of(int slab, int e) const
    {
        return queries[first_row() + row_of(slab, e)];
    }

    /* Q is there; nothing is seen yet. */
    __device__ void begin()
    {
#pragma unroll
        for (int slab = 0; slab < SLABS; slab++) {
#pragma unroll
            for (int half = 0; half < 2; half++) {
                top[slab][half] = -INFINITY;
                sum[slab][half] = 0;
            }
#pragma unroll
            for (int n = 0; n <= D_TILES; n++)
#pragma unroll
                for (int e = 0; e < 4; e++)
                    o[slab][n][e] = 0;
        }
    }

    /* --- which keys are seen --- */

    /* Row and key of an element, counted from the warp's first row and the block's first key. */
    __device__ int row_of(int slab, int e) const
    {
        return slab * 16 + lane / 4 + e / 2 * 8;
    }
    __device__ int key_of(int n, int e) const
    {
        return n * 8 + lane % 4 * 2 + e % 2;
    }

    /* Each row sees each key of the block. */
    __device__ bool all_see(int key0) const
    {
        return key0 >= all_from && key0 <= all_to;
    }

    /* Does a row of the sequence see a key? A mask tensor may hide those that it does. */
    __device__ bool sees_any(int r) const
    {
        const int i = r - t.row;

        return !MASK && max(i + t.low, 0) <= min(i + t.high, t.seq.nk - 1);
    }

    /*
     * A lane's keys below `key`, two of every 8, a bit each: R2P makes predicates of them, seven or
     * eight at a time, where comparisons would make them one by one. `BITS`: of 128 keys; kernels
     * that have no register left would spill.
     */
    __device__ static uint32_t keys_below(int key)
    {
        static_assert(2 * KEY_TILES == 32 || !BITS);
        const int k = min(max(key, 0), 8 * KEY_TILES), n = k / 8 * 2 + min(k % 8, 2);

        return n >= 32 ? ~0u : (1u << n) - 1;
    }

    /* Scores of keys that a row does not see become -inf. */
    __device__ void hide(float (&p)[SLABS][KEY_TILES][4], int key0) const
    {
        if constexpr (MASK)
            add_mask(p, key0);
        if (all_see(key0))
            return;
        int from = first_row();
        asm volatile("" : "+r"(from)); /* what follows from it does not stay in registers */
        const int key = key0 + key_of(0, 0);
        const int low = from + t.low, high = from + t.high;
#pragma unroll
        for (int slab = 0; slab < SLABS; slab++)
#pragma unroll
            for (int half = 0; half < 2; half++) {
                const int r = row_of(slab, 2 * half);
                const int first = max(low + r, 0) - key;
                const int last = max(min(high + r, t.seq.nk - 1), -1) - key;
                const uint32_t seen = BITS ? keys_below(last + 1) & ~keys_below(first) : 0;
#pragma unroll
                for (int n = 0; n < KEY_TILES; n++)
#pragma unroll
                    for (int e = 0; e < 2; e++)
                        if (BITS ? !(seen >> (2 * n + e) & 1)
                                 : 8 * n + e < first || 8 * n + e > last)
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
                const int r = row() + row_of(slab, 2 * half);
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

    /* --- the running maximum m --- */

    /* What P's exponents are relative to: nothing seen yet is 0; e4m3 has P times 2^8. */
    __device__ static float reference(float m)
    {
        return (m == -INFINITY ? 0 : m) - SHIFT;
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

    /* m moved. */
    __device__ void rescale(const float (&decay)[SLABS][2])
    {
#pragma unroll
        for (int slab = 0; slab < SLABS; slab++)
#pragma unroll
            for (int n = 0; n <= D_TILES; n++)
#pragma unroll
                for (int e = 0; e < 4; e++)
                    o[slab][n][e] *= decay[slab][e / 2];
    }

    /*
     * Scores relative to m: as long as none exceeds LAG, m stays. Positive floats are ordered like
     * their bits, negative ones are below them. If m of some row of the warp moved, O and the sum
     * of P have to be rescaled by `decay`.
     */
    __device__ bool follow_from_top(float (&p)[SLABS][KEY_TILES][4], float (&decay)[SLABS][2])
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
        if (!__any_sync(~0u, moves || highest >= __float_as_int(SHIFT + LAG)))
            return false;
#pragma unroll
        for (int slab = 0; slab < SLABS; slab++)
#pragma unroll
            for (int half = 0; half < 2; half++) {
                const float most = largest(p[slab], half), before = top[slab][half];
                const float above = most - SHIFT;
                const float after = before == -INFINITY ? above : before + fmaxf(above, 0);
                const float by = reference(after) - reference(before);
                top[slab][half] = after;
                none |= after == -INFINITY;
                decay[slab][half] = before == -INFINITY ? 0 : exp2_fast(-by);
                sum[slab][half] *= decay[slab][half];
#pragma unroll
                for (int n = 0; n < KEY_TILES; n++)
#pragma unroll
                    for (int e = 2 * half; e < 2 * half + 2; e++)
                        p[slab][n][e] -= by;
            }
        moves = __any_sync(~0u, none);
        return true;
    }

    /* m is what raise() has found: from here on follow_from_top() moves it. */
    __device__ void settle()
    {
        moves = __any_sync(~0u, top[0][0] == -INFINITY || top[0][1] == -INFINITY);
    }

    /* m is at least `most`, of this lane's columns; O and the sum of P go by `decay`. */
    __device__ void raise(const float (&most)[2], float (&decay)[2])
    {
#pragma unroll
        for (int half = 0; half < 2; half++) {
            const float before = top[0][half];
            float after = fmaxf(before, most[half]);
            after = fmaxf(after, __shfl_xor_sync(~0u, after, 1));
            after = fmaxf(after, __shfl_xor_sync(~0u, after, 2));
            decay[half] = before == -INFINITY ? 0 : exp2_fast(before - after);
            top[0][half] = after;
            sum[0][half] *= decay[half];
        }
    }

    /* follow_from_top() for scores as they are, which become relative to m. */
    __device__ bool follow(float (&p)[SLABS][KEY_TILES][4], float (&decay)[SLABS][2])
    {
        bool any = false;

#pragma unroll
        for (int slab = 0; slab < SLABS; slab++)
#pragma unroll
            for (int half = 0; half < 2; half++) {
                const float most = largest(p[slab], half), before = top[slab][half];
                const bool moves = before == -INFINITY || most > before + LAG;
                const float after = moves ? fmaxf(before, most) : before;
                any |= moves;
                decay[slab][half] = before == -INFINITY ? 0
                                    : after == before   ? 1
                                                        : exp2_fast(before - after);
                sum[slab][half] *= decay[slab][half];
                top[slab][half] = after;
#pragma unroll
                for (int n = 0; n < KEY_TILES; n++)
#pragma unroll
                    for (int e = 2 * half; e < 2 * half + 2; e++)
                        p[slab][n][e] -= reference(after);
            }
        return __any_sync(~0u, any);
    }

    /*
     * e4m3: scores to 2^8 P before rounding. There is no room for m to lag; O and the sum of P have
     * to be rescaled by `decay`. Sums are behind a branch: P would stay in registers for them.
     */
    __device__ void softmax_8(float (&p)[SLABS][KEY_TILES][4], float (&decay)[SLABS][2])
    {
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
                        p[slab][n][e] = exp2_fast(p[slab][n][e] - from);
            }
        if (!a.lse.data)
            return;
#pragma unroll
        for (int slab = 0; slab < SLABS; slab++)
#pragma unroll
            for (int n = 0; n < KEY_TILES; n++)
#pragma unroll
                for (int e = 0; e < 4; e++)
                    sum[slab][e / 2] += p[slab][n][e];
    }

    /* --- results --- */

    __device__ static uint32_t element_pair(const float *x, float up, float2 scale, float2 mean)
    {
        float y[2] = {x[0] * up, x[1] * up};

        if constexpr (FP8) {
            y[0] = fmaf(y[0], scale.x, mean.x);
            y[1] = fmaf(y[1], scale.y, mean.y);
        }
        const uint32_t pair = sound_pair<BF16>(y[0], y[1]);
        return up == 0 ? 0 : pair;
    }

    /* `v_means`: e4m3: V's scales, then its means, d_padded each. */
    __device__ void finish(const float *v_means) const
    {
#pragma unroll
        for (int slab = 0; slab < SLABS; slab++)
            finish_slab(slab, v_means);
    }

    __device__ void finish_slab(int slab, const float *v_means) const
    {
        float up[2];

        weigh(slab, up);
#pragma unroll
        for (int n = 0; n < D_TILES; n += 4) {
            const int column = 8 * (n + lane % 4);
            float2 scale[4], mean[4];
            if (8 * n >= a.d)
                break;
#pragma unroll
            for (int i = 0; i < 4 && FP8; i++) {
                const float *const from = v_means + key_of(n + i, 0);
                scale[i] = *reinterpret_cast<const float2 *>(from);
                mean[i] = *reinterpret_cast<const float2 *>(from + a.d_padded);
            }
#pragma unroll
            for (int half = 0; half < 2; half++) {
                const int r = row() + row_of(slab, 2 * half);
                uint32_t pairs[4];
#pragma unroll
                for (int i = 0; i < 4; i++)
                    pairs[i] = element_pair(&o[slab][n + i][2 * half], up[half], scale[i], mean[i]);
                /* two columns of each of four tiles become eight of one */
                const uint4 eight = transpose_quad(pairs);
                store_row(r, column, eight);
            }
        }
        finish_lse(slab, up);
    }

    /* What O is multiplied by in the end; 0: nothing was seen. */
    __device__ void weigh(int slab, float (&up)[2]) const
    {
#pragma unroll
        for (int half = 0; half < 2; half++) {
            const float total = o[slab][D_TILES][2 * half];
            up[half] = total != 0                                 ? reciprocal(total)
                       : sees_any(row() + row_of(slab, 2 * half)) ? NAN
                                                                  : 0;
        }
    }

    __device__ void store_row(int r, int column, const uint4 &eight) const
    {
        if (r < t.end && column < a.d)
            store_8(a.o.data + t.seq.batch * a.o.stride[0] + t.q_head * a.o.stride[1] +
                        (t.seq.q0 + r) * a.o.stride[2] + 2 * column,
                    eight, a.o.aligned);
    }

    /* Of the warp's 16 rows every STEPth from `first` on; eight(row): the columns from `column`. */
    template <int STEP, typename Eight>
    __device__ void store_rows(int first, int column, Eight eight) const
    {
        const int left = column < a.d ? t.end - row() : 0;
        char *const to = a.o.data + t.seq.batch * a.o.stride[0] + t.q_head * a.o.stride[1] +
                         (t.seq.q0 + row() + first) * a.o.stride[2] + 2 * column;
        const auto store = [&](int i, bool aligned) {
            if (first + i < left)
                store_8(to + i * a.o.stride[2], eight(first + i), aligned);
        };
        if (a.o.aligned)
#pragma unroll
            for (int i = 0; i < 16; i += STEP)
                store(i, true);
        else
#pragma unroll 1
            for (int i = 0; i < 16; i += STEP)
                store(i, false);
    }

    __device__ void finish_lse(int slab, const float (&up)[2]) const
    {
        if (a.lse.data)
#pragma unroll
            for (int half = 0; half < 2; half++) {
                const int r = row() + row_of(slab, 2 * half);
                if (r < t.end)
                    finish_lse(r, slab, half, up[half] == 0, query_of(slab, 2 * half).mean);
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
};

} // namespace sage

/* A row of one of the tables; rows that another file has are empty here. */
#define ATTN_ROW(here, family, d, dtype, pv, feature) ATTN_ROW_(here, family, d, dtype, pv, feature)
#define ATTN_ROW_(here, family, d, dtype, pv, feature)                                             \
    ATTN_ROW_##here(family, d, dtype, pv, feature)
#define ATTN_ROW_0(family, d, dtype, pv, feature) {nullptr, nullptr},
#define ATTN_ROW_1(family, d, dtype, pv, feature)                                                  \
    {(const void *)                                                                                \
         sage::family##_kernel<d, SAGE_KERNEL_##dtype, SAGE_KERNEL_##pv, SAGE_KERNEL_##feature>,   \
     sage::family##_launch<d, SAGE_KERNEL_##dtype, SAGE_KERNEL_##pv, SAGE_KERNEL_##feature>},

#endif
