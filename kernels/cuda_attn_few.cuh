/*
 * cuda_attn_few.cuh - attention of few query rows, as in decoding, on tensor cores from sm_80 on.
 *
 * What takes the time is reading K and V, once each, so nothing is quantised: quantising K would
 * read it twice and write it. The rows of all query heads of a kv head are one tile, whose keys are
 * split over blocks; the last block of a tile to be done merges what the others left (Dao et al.,
 * "Flash-Decoding for long-context inference", 2023).
 *
 * K and V of FEW_TILE_K keys at a time pass through one ring of stages in shared memory: K(0),
 * V(0), K(1), ... all but one on their way. A warp has 16 rows and, of each stage, 1 / PARTS of the
 * keys.
 */
#ifndef SAGE_CUDA_ATTN_FEW_CUH
#define SAGE_CUDA_ATTN_FEW_CUH

#include "cuda_attn.cuh"

namespace sage
{

/* What a block works on: some keys of one kv head, all rows that read it. */
struct few_tile {
    cuda_seq seq;
    int64_t kv_head, group;   /* in the problem; among those of `arrived` */
    int64_t low, high;        /* query i sees keys i + low ... i + high */
    int query, n_queries;     /* of each head: the first, how many */
    int rows;                 /* row r is query r % n_queries of head r / n_queries */
    int begin, end;           /* the keys */
    unsigned chunk, n_chunks; /* which part of the tile's keys, of how many */
    bool there;
};

__device__ inline void find_few(const cuda_args &a, unsigned index, few_tile &t)
{
    const unsigned total = static_cast<unsigned>(a.chunks.total), head = index / total;
    const unsigned n = index - head * total, each = static_cast<unsigned>(a.chunk_keys);
    const int64_t s = space_find(a, a.chunks, a.k_offsets, a.k_first, each, n);
    const cuda_seq seq = seq_of(a, s);
    const int64_t query = a.n_rows < 0 ? 0 : a.row, n_queries = a.n_rows < 0 ? seq.nq : a.n_rows;
    const int64_t shift = a.bottom_right ? static_cast<int64_t>(seq.nk) - seq.nq : 0;
    const int64_t low = a.low + shift, high = a.high + shift;
    /* the keys that some row sees, and one more */
    const int64_t first = query + low > 0 ? query + low : 0;
    const int64_t end = query + n_queries + high;
    const int64_t last = end < seq.nk ? end : seq.nk;
    const unsigned keys = last > first ? static_cast<unsigned>(last - first) : 0;

    t.seq = seq;
    t.kv_head = a.head + head;
    t.group = (s - a.seq) * a.n_heads + head;
    t.low = low;
    t.high = high;
    t.query = static_cast<int>(query);
    t.n_queries = static_cast<int>(n_queries);
    t.rows = static_cast<int>(n_queries * a.n_q_heads);
    t.chunk = n - static_cast<unsigned>(space_start(a, a.chunks, a.k_offsets, a.k_first, each, s));
    t.n_chunks = keys > each ? (keys + each - 1) / each : 1;
    t.there = in_part(a, s, t.kv_head) && n_queries > 0 && t.chunk < t.n_chunks;
    t.begin = keys ? static_cast<int>(first + t.chunk * static_cast<int64_t>(each)) : 0;
    t.end = keys ? static_cast<int>(min(last, t.begin + static_cast<int64_t>(each))) : 0;
}

/*
 * Is this the last block of its tile? One thread asks, between two barriers: what the others have
 * stored is seen by the last block, all of it. A replay of the call finds the word as it wants it.
 */
__device__ inline bool is_last(const cuda_args &a, const few_tile &t)
{
    unsigned long long *const word = a.arrived + t.group;

    if (add_and_fence(word, 1) != a.call + t.n_chunks - 1)
        return false;
    *word = a.call;
    return true;
}

template <int D, bool BF16, int ROWS> struct few_attention {
    static constexpr int SLABS = ROWS / 16, PARTS = FEW_WARPS / SLABS, THREADS = 32 * FEW_WARPS;
    static constexpr int TILE_K = FEW_TILE_K(D, ROWS), KEYS = TILE_K / PARTS, KEY_TILES = KEYS / 8;
    static constexpr int STAGES = FEW_STAGES(D, ROWS), PITCH = KERNEL_PITCH(2 * D);
    static constexpr int STAGE = TILE_K * PITCH, VECTORS = D / 8, D_TILES = D / 8, QUADS = D / 4;
    static constexpr int O_PITCH = D + 8; /* floats */
    static constexpr bool Q_IN_REGISTERS = D <= 128;
    static_assert(KEYS % 16 == 0, "a product with V takes 16 keys");
    static_assert(FEW_WARPS * 16 * O_PITCH * 4 <= FEW_SMEM(D, ROWS), "O of all warps");
    static_assert(ROWS * FEW_CHUNKS * 4 <= FEW_SMEM(D, ROWS), "weights of all chunks");
    static_assert(FEW_CHUNKS <= 64, "two for each lane");

    const cuda_args &a;
    const few_tile &t;              /* in shared memory, as all below that is a reference */
    float4 (&stats)[FEW_WARPS][16]; /* of the warps' rows: m, sum of P, of P before rounding */
    char *ring;
    int lane, slab, part;
    uint32_t q_shared, k_shared, v_shared; /* addresses, with this lane's part in them */
    uint32_t q_fragments[Q_IN_REGISTERS ? D / 16 : 1][4];
    int first[2], last[2];   /* the keys that this lane's rows see, of the block's */
    int all_first, all_last; /* that all of the warp's rows see */

    float o[D_TILES + 1][4]; /* last: the sum of P, as if V had columns of ones */
    float top[2], sum[2];    /* m; sum of P before rounding, of this lane's columns */

    __device__ few_attention(const cuda_args &args, const few_tile &tile,
                             float4 (&of_warps)[FEW_WARPS][16], char *shared)
        : a(args), t(tile), stats(of_warps), ring(shared), lane(threadIdx.x % 32),
          slab(threadIdx.x / 32 % SLABS), part(threadIdx.x / 32 / SLABS)
    {
        const uint32_t at = shared_address(ring);

        q_shared = at + STAGES * STAGE + (slab * 16 + lane % 16) * PITCH + lane / 16 * 16;
        k_shared = at + (part * KEYS + lane / 16 * 8 + lane % 8) * PITCH + lane / 8 % 2 * 16;
        v_shared = at + (part * KEYS + lane % 16) * PITCH + lane / 16 * 16;
    }

    /* --- from global to shared memory, by the whole block --- */

    /* Stage number `n` of all: K or V of TILE_K keys; zeros beyond the last key and channel. */
    __device__ void fetch(int n) const
    {
        constexpr int STEP = THREADS / VECTORS;
        const cuda_tensor &x = n % 2 ? a.v : a.k;
        const int vector = threadIdx.x % VECTORS, row = threadIdx.x / VECTORS;
        const int key = t.begin + n / 2 * TILE_K + row;
        const int left = 8 * vector < a.d ? t.end - key : 0;
        const char *const base =
            x.data + t.seq.batch * x.stride[0] + t.kv_head * x.stride[1] + 16 * vector;
        const char *from = base + (t.seq.k0 + key) * x.stride[2];
        char *const to = ring + n % STAGES * STAGE + row * PITCH + 16 * vector;

        if (t.begin + n / 2 * TILE_K >= t.end)
            return;
        if (x.aligned) {
#pragma unroll
            for (int i = 0; i < TILE_K; i += STEP, from += STEP * x.stride[2])
                copy_line_async(shared_address(to + i * PITCH), i < left ? from : x.data, i < left);
        } else {
#pragma unroll 1
            for (int i = 0; i < TILE_K; i += STEP, from += STEP * x.stride[2])
                *reinterpret_cast<uint4 *>(to + i * PITCH) =
                    i < left ? load_8(from, false) : make_uint4(0, 0, 0, 0);
        }
    }

    /* Q as it is; zeros beyond the last row and channel. */
    __device__ void load_q() const
    {
        char *const to = ring + STAGES * STAGE;

#pragma unroll 4
        for (int i = threadIdx.x; i < ROWS * VECTORS; i += THREADS) {
            const int r = i / VECTORS, vector = i % VECTORS;
            uint4 x = make_uint4(0, 0, 0, 0);
            if (r < t.rows && 8 * vector < a.d) {
                const unsigned head = static_cast<unsigned>(r) / t.n_queries;
                const int64_t q = t.seq.q0 + t.query + (r - head * t.n_queries);
                x = load_8(a.q.data + t.seq.batch * a.q.stride[0] +
                               (t.kv_head * a.gqa + a.q_head + head) * a.q.stride[1] +
                               q * a.q.stride[2] + 16 * vector,
                           a.q.aligned);
            }
            *reinterpret_cast<uint4 *>(to + r * PITCH + 16 * vector) = x;
        }
    }

    /* --- one step --- */

    /* Rows beyond the last see everything: what comes of them is not read. */
    __device__ void begin()
    {
        all_first = t.begin;
        all_last = t.end - 1;
#pragma unroll
        for (int half = 0; half < 2; half++) {
            const int r = slab * 16 + lane / 4 + 8 * half;
            first[half] = 0;
            last[half] = INT_MAX;
            if (r < t.rows) {
                const int query = t.query + static_cast<unsigned>(r) % t.n_queries;
                const int64_t from = query + t.low, to = query + t.high;
                first[half] = clamp(from);
                last[half] = clamp(to < t.end - 1 ? to : t.end - 1);
            }
            all_first = max(all_first, first[half]);
            all_last = min(all_last, last[half]);
            top[half] = -INFINITY;
            sum[half] = 0;
        }
        all_first = __reduce_max_sync(~0u, all_first);
        all_last = __reduce_min_sync(~0u, all_last);
#pragma unroll
        for (int n = 0; n <= D_TILES; n++)
#pragma unroll
            for (int e = 0; e < 4; e++)
                o[n][e] = 0;
        if constexpr (Q_IN_REGISTERS)
#pragma unroll
            for (int k = 0; k < D / 16; k++)
                ldmatrix(q_fragments[k], q_shared + 32 * k);
    }

    /* p = Q K^T */
    __device__ void scores(float (&p)[KEY_TILES][4], int stage) const
    {
        const uint32_t k_stage = k_shared + stage * STAGE;

#pragma unroll
        for (int n = 0; n < KEY_TILES; n++)
#pragma unroll
            for (int e = 0; e < 4; e++)
                p[n][e] = 0;
#pragma unroll
        for (int k = 0; k < D / 16; k++) {
            uint32_t q[4];
            if constexpr (Q_IN_REGISTERS)
#pragma unroll
                for (int i = 0; i < 4; i++)
                    q[i] = q_fragments[k][i];
            else
                ldmatrix(q, q_shared + 32 * k);
#pragma unroll
            for (int n = 0; n < KEY_TILES; n += 2) {
                uint32_t b[4];
                ldmatrix(b, k_stage + n * 8 * PITCH + 32 * k);
                mma_16<BF16>(p[n], q, b[0], b[1]);
                mma_16<BF16>(p[n + 1], q, b[2], b[3]);
            }
        }
    }

    /* Scores in base 2. What is not finite, or no longer, becomes NaN: -inf is for hidden keys. */
    __device__ void scale(float (&p)[KEY_TILES][4], int key0) const
    {
#pragma unroll
        for (int n = 0; n < KEY_TILES; n++)
#pragma unroll
            for (int e = 0; e < 4; e++) {
                const float x = p[n][e] * a.scale;
                p[n][e] = fmaf(x, 0, x);
            }
        if (a.mask_dtype != SAGE_NONE)
            add_mask(p, key0);
        if (key0 >= all_first && key0 + KEYS - 1 <= all_last)
            return;
        const int key = key0 + lane % 4 * 2;
#pragma unroll
        for (int n = 0; n < KEY_TILES; n++)
#pragma unroll
            for (int e = 0; e < 4; e++)
                if (key + 8 * n + e % 2 < first[e / 2] || key + 8 * n + e % 2 > last[e / 2])
                    p[n][e] = -INFINITY;
    }

    /* A key that is masked out is not seen, whatever it holds. */
    __device__ void add_mask(float (&p)[KEY_TILES][4], int key0) const
    {
        const int key = key0 + lane % 4 * 2;

#pragma unroll
        for (int half = 0; half < 2; half++) {
            const int r = slab * 16 + lane / 4 + 8 * half;
            const unsigned head = static_cast<unsigned>(r) / t.n_queries;
            if (r >= t.rows)
                continue;
            const char *const line =
                a.mask.data + t.seq.batch * a.mask.stride[0] +
                (t.kv_head * a.gqa + a.q_head + head) * a.mask.stride[1] +
                (t.query + r - static_cast<int>(head) * t.n_queries) * a.mask.stride[2];
#pragma unroll
            for (int n = 0; n < KEY_TILES; n++)
#pragma unroll
                for (int e = 0; e < 2; e++) {
                    if (key + 8 * n + e >= t.end)
                        continue;
                    const float bias =
                        mask_bias(line + (key + 8 * n + e) * a.mask_key, a.mask_dtype);
                    float &x = p[n][2 * half + e];
                    x = bias == -INFINITY ? bias : x + bias;
                }
        }
    }

    /* Scores to P, relative to the largest score so far, which O follows. */
    __device__ void softmax(float (&p)[KEY_TILES][4])
    {
        float decay[2], from[2];
        bool moved = false;

#pragma unroll
        for (int half = 0; half < 2; half++) {
            const float before = top[half];
            float m = before;
#pragma unroll
            for (int n = 0; n < KEY_TILES; n++)
                m = fmaxf(m, fmaxf(p[n][2 * half], p[n][2 * half + 1]));
            m = fmaxf(m, __shfl_xor_sync(~0u, m, 1));
            m = fmaxf(m, __shfl_xor_sync(~0u, m, 2));
            moved |= m != before;
            decay[half] = before == -INFINITY ? 0 : exp2_fast(before - m);
            from[half] = m == -INFINITY ? 0 : m; /* -inf - -inf would be NaN */
            sum[half] *= decay[half];
            top[half] = m;
        }
#pragma unroll
        for (int n = 0; n < KEY_TILES; n++)
#pragma unroll
            for (int e = 0; e < 4; e++) {
                p[n][e] = exp2_fast(p[n][e] - from[e / 2]);
                sum[e / 2] += p[n][e];
            }
        if (!__any_sync(~0u, moved))
            return;
#pragma unroll
        for (int n = 0; n <= D_TILES; n++)
#pragma unroll
            for (int e = 0; e < 4; e++)
                o[n][e] *= decay[e / 2];
    }

    /* O += P V, and the sum of P in the same way, with V = 1. */
    __device__ void add(const float (&p)[KEY_TILES][4], int stage)
    {
        constexpr uint32_t ONES = BF16 ? 0x3f803f80u : 0x3c003c00u;
        const uint32_t v_stage = v_shared + stage * STAGE;

#pragma unroll
        for (int k = 0; k < KEYS / 16; k++) {
            uint32_t f[4];
#pragma unroll
            for (int i = 0; i < 4; i++)
                f[i] = pack_16<BF16>(p[2 * k + i / 2][i % 2 * 2], p[2 * k + i / 2][i % 2 * 2 + 1]);
            mma_16<BF16>(o[D_TILES], f, ONES, ONES);
#pragma unroll
            for (int pair = 0; pair < D / 16; pair++) {
                uint32_t b[4];
                ldmatrix_trans(b, v_stage + k * 16 * PITCH + pair * 32);
                mma_16<BF16>(o[2 * pair], f, b[0], b[1]);
                mma_16<BF16>(o[2 * pair + 1], f, b[2], b[3]);
            }
        }
    }

    /* Stage n is there, for all; the one before has been used by all, and is filled again. */
    __device__ void next_stage(int n) const
    {
        copy_wait<STAGES - 2>();
        __syncthreads();
        fetch(n + STAGES - 1);
        copy_commit();
    }

    __device__ void steps()
    {
        const int tiles = (t.end - t.begin + TILE_K - 1) / TILE_K;

#pragma unroll 1
        for (int i = 0; i < tiles; i++) {
            float p[KEY_TILES][4];

            next_stage(2 * i);
            scores(p, 2 * i % STAGES);
            scale(p, t.begin + i * TILE_K + part * KEYS);
            softmax(p);
            next_stage(2 * i + 1);
            add(p, (2 * i + 1) % STAGES);
        }
    }

    /* --- results --- */

    /* What the warp has, to where K and V were. */
    __device__ void put_down()
    {
        const int warp = threadIdx.x / 32;
        float *const to = reinterpret_cast<float *>(ring) + warp * 16 * O_PITCH;

#pragma unroll
        for (int half = 0; half < 2; half++) {
            const int r = lane / 4 + 8 * half;
            float l = sum[half];
            l += __shfl_xor_sync(~0u, l, 1);
            l += __shfl_xor_sync(~0u, l, 2);
            if (lane % 4 == 0)
                stats[warp][r] = make_float4(top[half], o[D_TILES][2 * half], l, 0);
#pragma unroll
            for (int n = 0; n < D_TILES; n++)
                *reinterpret_cast<float2 *>(to + r * O_PITCH + 8 * n + lane % 4 * 2) =
                    make_float2(o[n][2 * half], o[n][2 * half + 1]);
        }
    }

    /* Of row r the warps' together, in the order of the keys: four channels of O; m and sums. */
    __device__ float4 of_block(int r, int quad, float4 &all) const
    {
        const float *const from = reinterpret_cast<const float *>(ring) + r * O_PITCH + 4 * quad;
        float4 x = make_float4(0, 0, 0, 0);

        all = make_float4(-INFINITY, 0, 0, 0);
#pragma unroll
        for (int i = 0; i < PARTS; i++)
            all.x = fmaxf(all.x, stats[i * SLABS + r / 16][r % 16].x);
#pragma unroll
        for (int i = 0; i < PARTS; i++) {
            const float4 one = stats[i * SLABS + r / 16][r % 16];
            const float by = weight(one.x, all.x);
            all.y = fmaf(by, one.y, all.y);
            all.z = fmaf(by, one.z, all.z);
            add_quad(x, by, *reinterpret_cast<const float4 *>(from + i * SLABS * 16 * O_PITCH));
        }
        return x;
    }

    /* What is relative to m counts so much where the largest is `most`. */
    __device__ static float weight(float m, float most)
    {
        return m == -INFINITY ? 0 : exp2_fast(m - most);
    }
    __device__ static void add_quad(float4 &to, float by, const float4 &x)
    {
        to.x = fmaf(by, x.x, to.x);
        to.y = fmaf(by, x.y, to.y);
        to.z = fmaf(by, x.z, to.z);
        to.w = fmaf(by, x.w, to.w);
    }

    /* Where chunk i of the tile leaves what it has of row r: O, or m and the sums. */
    __device__ float4 *o_of(unsigned i, int r, int quad) const
    {
        return reinterpret_cast<float4 *>(a.parts + static_cast<int64_t>(blockIdx.x - t.chunk + i) *
                                                        (ROWS * (D + 4))) +
               r * QUADS + quad;
    }
    __device__ float4 *stats_of(unsigned i, int r) const
    {
        return o_of(i, ROWS, r);
    }

    /* A warp takes a row: the chunks' weights, to where O was; m and sums of all. */
    __device__ void weigh_chunks() const
    {
        float *const weights = reinterpret_cast<float *>(ring);

#pragma unroll 4
        for (int r = threadIdx.x / 32; r < t.rows; r += FEW_WARPS) {
            float4 x[2];
#pragma unroll
            for (int i = 0; i < 2; i++)
                x[i] = lane + 32 * i < t.n_chunks ? __ldcg(stats_of(lane + 32 * i, r))
                                                  : make_float4(-INFINITY, 0, 0, 0);
            float m = fmaxf(x[0].x, x[1].x);
#pragma unroll
            for (int step = 1; step < 32; step *= 2)
                m = fmaxf(m, __shfl_xor_sync(~0u, m, step));
            const float by[2] = {weight(x[0].x, m), weight(x[1].x, m)};
            float total = by[0] * x[0].y + by[1] * x[1].y, l = by[0] * x[0].z + by[1] * x[1].z;
#pragma unroll
            for (int step = 1; step < 32; step *= 2) {
                total += __shfl_xor_sync(~0u, total, step);
                l += __shfl_xor_sync(~0u, l, step);
            }
            weights[r * FEW_CHUNKS + lane] = by[0];
            weights[r * FEW_CHUNKS + lane + 32] = by[1];
            if (lane == 0)
                stats[r / 16][r % 16] = make_float4(m, total, l, 0);
        }
    }

    /* Of row r what chunks have, from `from` on: BATCH loads on their way. */
    static constexpr int BATCH = 16;
    __device__ void load_chunks(float4 (&left)[BATCH], int from, int r, int quad) const
    {
#pragma unroll
        for (int i = 0; i < BATCH; i++)
            if (from + i < static_cast<int>(t.n_chunks))
                left[i] = __ldcg(o_of(from + i, r, quad));
    }

    /* All chunks' together, in the order of the keys; the first of them have been loaded. */
    __device__ float4 of_tile(float4 (&left)[BATCH], int r, int quad) const
    {
        const float *const weights = reinterpret_cast<const float *>(ring) + r * FEW_CHUNKS;
        const int n = static_cast<int>(t.n_chunks);
        float4 x = make_float4(0, 0, 0, 0);

#pragma unroll 1
        for (int from = 0;;) {
#pragma unroll
            for (int i = 0; i < BATCH; i++)
                if (from + i < n)
                    add_quad(x, weights[from + i], left[i]);
            from += BATCH;
            if (from >= n)
                return x;
            load_chunks(left, from, r, quad);
        }
    }

    /* Four channels of a row's o; its lse. */
    __device__ void finish(int r, int quad, const float4 &x, const float4 &all) const
    {
        const unsigned head = static_cast<unsigned>(r) / t.n_queries;
        const int64_t q_head = t.kv_head * a.gqa + a.q_head + head;
        const int64_t q = t.seq.q0 + t.query + (r - head * t.n_queries);
        const float up = all.y == 0 ? 0 : reciprocal(all.y); /* 0: nothing was seen */
        const uint2 words = up == 0 ? make_uint2(0, 0)
                                    : make_uint2(sound_pair<BF16>(x.x * up, x.y * up),
                                                 sound_pair<BF16>(x.z * up, x.w * up));
        char *const to = a.o.data + t.seq.batch * a.o.stride[0] + q_head * a.o.stride[1] +
                         q * a.o.stride[2] + 8 * quad;
        if (4 * quad < a.d && a.o.aligned) {
            *reinterpret_cast<uint2 *>(to) = words;
        } else if (4 * quad < a.d) {
            const uint32_t pairs[2] = {words.x, words.y};
#pragma unroll
            for (int i = 0; i < 4; i++)
                reinterpret_cast<uint16_t *>(to)[i] =
                    static_cast<uint16_t>(pairs[i / 2] >> i % 2 * 16);
        }
        if (!a.lse.data || quad > 0)
            return;
        const float l = LN_2 * (all.x + log2f(all.z));
        *reinterpret_cast<float *>(a.lse.data + t.seq.batch * a.lse.stride[0] +
                                   q_head * a.lse.stride[1] + q * a.lse.stride[2]) =
            all.y == 0    ? -INFINITY
            : isfinite(l) ? l
                          : NAN;
    }

    __device__ void run(bool &last)
    {
#pragma unroll 1
        for (int n = 0; n < STAGES - 1; n++) {
            fetch(n);
            copy_commit();
        }
        if (threadIdx.x == 0 && t.n_chunks > 1)
            open_counter(a, a.arrived + t.group);
        load_q();
        __syncthreads();
        begin();
        steps();
        copy_wait<0>();
        __syncthreads();
        put_down();
        __syncthreads();
        for (int i = threadIdx.x; i < t.rows * QUADS; i += THREADS) {
            const int r = i / QUADS, quad = i % QUADS;
            float4 all;
            const float4 x = of_block(r, quad, all);
            if (t.n_chunks == 1) {
                finish(r, quad, x, all);
                continue;
            }
            *o_of(t.chunk, r, quad) = x;
            if (quad == 0)
                *stats_of(t.chunk, r) = all;
        }
        if (t.n_chunks == 1)
            return;
        __syncthreads();
        if (threadIdx.x == 0)
            last = is_last(a, t);
        __syncthreads();
        if (!last)
            return;
        float4 left[BATCH];
        int i = threadIdx.x;
        if (i < t.rows * QUADS)
            load_chunks(left, 0, i / QUADS, i % QUADS);
        weigh_chunks();
        __syncthreads();
        while (i < t.rows * QUADS) {
            const int r = i / QUADS, quad = i % QUADS;
            finish(r, quad, of_tile(left, r, quad), stats[r / 16][r % 16]);
            i += THREADS;
            if (i < t.rows * QUADS)
                load_chunks(left, 0, i / QUADS, i % QUADS);
        }
    }
};

template <int D, bool BF16, int ROWS>
__global__ void __launch_bounds__(32 * FEW_WARPS, FEW_BLOCKS(D, ROWS))
    few_kernel(const __grid_constant__ cuda_args args)
{
    extern __shared__ __align__(16) char shared[];
    __shared__ few_tile tile;
    __shared__ float4 stats[FEW_WARPS][16];
    __shared__ bool last;

#if __CUDA_ARCH__ >= 900
    cudaGridDependencySynchronize();
#endif
    if (!begins(args))
        return;
    if (threadIdx.x == 0)
        find_few(args, blockIdx.x, tile);
    __syncthreads();
    if (tile.there)
        few_attention<D, BF16, ROWS>(args, tile, stats, shared).run(last);
}

template <int D, bool BF16, int ROWS>
cudaError_t few_launch(const cuda_args *args, unsigned blocks, cudaStream_t stream)
{
    return launch_early(few_kernel<D, BF16, ROWS>, blocks, 32 * FEW_WARPS, FEW_SMEM(D, ROWS),
                        stream, *args);
}

} // namespace sage

#endif
