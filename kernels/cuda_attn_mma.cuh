/*
 * cuda_attn_mma.cuh - attention on tensor cores, any GPU from sm_80 on.
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
#ifndef SAGE_CUDA_ATTN_MMA_CUH
#define SAGE_CUDA_ATTN_MMA_CUH

#include "cuda_attn.cuh"

namespace sage
{

constexpr int MAGIC = 0x4b400000;
constexpr float MAGIC_FLOAT = 12582912.0f;

template <int D, bool BF16, bool FP8, bool MASK> struct mma_attention {
    static constexpr int SLABS = KERNEL_SLABS(D), TILE_Q = KERNEL_TILE_Q(D), TILE_K = KERNEL_TILE_K;
    static constexpr int THREADS = 32 * KERNEL_WARPS, KEY_TILES = TILE_K / 8, D_TILES = D / 8;
    static constexpr int K_PITCH = KERNEL_PITCH(D);
    static constexpr int V_PITCH = FP8 ? KERNEL_PITCH(TILE_K) : KERNEL_PITCH(2 * D);
    static constexpr bool Q_IN_REGISTERS = D <= 64;

    const cuda_args &a;
    const tile &t;
    rows<D, SLABS, TILE_K, BF16, FP8, MASK> r;
    uint32_t q_shared, k_shared, v_shared; /* addresses, with this lane's part in them */
    bool coarse;                           /* a step of the integers may be a factor of 2 */
    const char *v_from;                    /* the sequence's first key */
    uint32_t q_fragments[Q_IN_REGISTERS ? D / 32 : 1][SLABS][4];

    __device__ mma_attention(const cuda_args &args, const tile &place, const query *queries)
        : a(args), t(place), r(args, place, queries)
    {
    }

    /* --- from global to shared memory, by the whole block --- */

    /* Rows of BYTES that lie `stride` apart, neighbours by neighbouring threads. */
    template <int ROWS, int BYTES, int PITCH>
    __device__ static void fetch_rows(uint32_t to, const char *from, int64_t stride)
    {
        constexpr int LANES = BYTES / 16 % 16 == 0  ? 16
                              : BYTES / 16 % 8 == 0 ? 8
                              : BYTES / 16 % 4 == 0 ? 4
                                                    : 2; /* of a row */
        constexpr int STEP = THREADS / LANES;
        const unsigned lane = threadIdx.x % LANES;
        unsigned row = threadIdx.x / LANES;

        asm volatile("" : "+r"(row)); /* its multiples do not stay in registers */

        to += row * PITCH + 16 * lane;
        from += row * stride + 16 * lane;
#pragma unroll
        for (int i = 0; i < ROWS; i += STEP, from += STEP * stride)
#pragma unroll
            for (int at = 0; at < BYTES; at += 16 * LANES)
                copy_async(to + i * PITCH + at, from + at, true);
    }

    /* K's scales come along with it; they are in use until after the next block's came. */
    __device__ void fetch_k(char *to, float *scales, unsigned block) const
    {
        const int64_t n = t.block + block;

        fetch_rows<TILE_K, D, K_PITCH>(shared_address(to),
                                       reinterpret_cast<const char *>(a.k8) + n * (TILE_K * D), D);
        if (threadIdx.x < 4)
            copy_async(shared_address(scales + block % 2 * 16 + threadIdx.x * 4),
                       a.k_scale + n * 16 + threadIdx.x * 4, true);
    }

    /* e4m3 */
    __device__ void fetch_v8(char *to, unsigned block) const
    {
        fetch_rows<D, TILE_K, V_PITCH>(
            shared_address(to),
            reinterpret_cast<const char *>(a.v8) + (t.block + block) * (TILE_K * D), TILE_K);
    }

    /* 16 bits, as the caller has it; keys beyond the last and channels beyond a.d are zero. */
    __device__ void fetch_v16(char *to, unsigned block) const
    {
        const int left = t.seq.nk - block * TILE_K; /* keys */
        const char *const from = v_from + static_cast<int64_t>(block) * TILE_K * a.v.stride[2];

        if (a.v.aligned && a.d == D && left >= TILE_K) {
            fetch_rows<TILE_K, 2 * D, V_PITCH>(shared_address(to), from, a.v.stride[2]);
            return;
        }
#pragma unroll 1
        for (int n = threadIdx.x; n < TILE_K * D / 8; n += THREADS) {
            asm volatile("" : "+r"(n)); /* nothing of it stays in registers from block to block */
            const int key = n / (D / 8), vector = n % (D / 8), offset = key * V_PITCH + 16 * vector;
            const bool there = key < left && 8 * vector < a.d;
            const char *p = there ? from + key * a.v.stride[2] + 16 * vector : v_from;
            if (a.v.aligned)
                copy_async(shared_address(to) + offset, p, there);
            else
                *reinterpret_cast<uint4 *>(to + offset) =
                    there ? load_8(p, false) : make_uint4(0, 0, 0, 0);
        }
    }

    __device__ void fetch_v(char *to, unsigned block) const
    {
        if constexpr (FP8)
            fetch_v8(to, block);
        else
            fetch_v16(to, block);
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

    /* Integers to scores in base 2. */
    __device__ void scale(float (&p)[SLABS][KEY_TILES][4], const int (&s)[SLABS][KEY_TILES][4],
                          const float4 &k_scale) const
    {
        const float runs[4] = {k_scale.x, k_scale.y, k_scale.z, k_scale.w};

#pragma unroll
        for (int i = 0; i < SLABS * TILE_K / 4; i++) {
            const int slab = i / (TILE_K / 4), half = i / 8 % 2, n = i % 8;
            const float c = __uint_as_float(
                __float_as_uint(r.query_of(slab, 2 * half).scale * runs[n / 2]) & ~3u);
#pragma unroll
            for (int e = 2 * half; e < 2 * half + 2; e++)
                p[slab][n][e] = fmaf(__int_as_float(s[slab][n][e]), c, -MAGIC_FLOAT * c);
        }
    }

    /*
     * The same, relative to m, which is then free. The sum of two constants may be off by 3/4 of a
     * step of the integers: nothing beside what Q and K lost when they became integers, unless a
     * step is a factor of 2 or more.
     */
    __device__ void scale_from_top(float (&p)[SLABS][KEY_TILES][4],
                                   const int (&s)[SLABS][KEY_TILES][4], const float4 &k_scale) const
    {
        const float runs[4] = {k_scale.x, k_scale.y, k_scale.z, k_scale.w};

#pragma unroll
        for (int i = 0; i < SLABS * TILE_K / 4; i++) {
            const int slab = i / (TILE_K / 4), half = i / 8 % 2, n = i % 8;
            const float c = r.query_of(slab, 2 * half).scale * runs[n / 2];
            const float minus = fmaf(-MAGIC_FLOAT, c, -r.reference(r.top[slab][half]));
#pragma unroll
            for (int e = 2 * half; e < 2 * half + 2; e++)
                p[slab][n][e] = fmaf(__int_as_float(s[slab][n][e]), c, minus);
        }
    }

    /* 16 bits: integer scores to scores relative to m; O follows. */
    __device__ void relate(float (&p)[SLABS][KEY_TILES][4], const int (&s)[SLABS][KEY_TILES][4],
                           const float4 &k_scale, int key0)
    {
        float decay[SLABS][2];
        bool moved;

        if (MASK || coarse) {
            scale(p, s, k_scale);
            r.hide(p, key0);
            moved = r.follow(p, decay);
        } else {
            scale_from_top(p, s, k_scale);
            r.hide(p, key0);
            moved = r.follow_from_top(p, decay);
        }
        if (moved)
            r.rescale(decay);
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
            r.sum[slab][e / 2] += x;
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
                mma_16<BF16>(r.o[slab][D / 8], f[slab], ONES, ONES);
            }
#pragma unroll
            for (int pair = 0; pair < PAIRS; pair++) {
                uint32_t b[4];
                ldmatrix_trans(b, v_shared + k * 16 * V_PITCH + pair * 32);
#pragma unroll
                for (int slab = 0; slab < SLABS; slab++) {
                    mma_16<BF16>(r.o[slab][2 * pair], f[slab], b[0], b[1]);
                    mma_16<BF16>(r.o[slab][2 * pair + 1], f[slab], b[2], b[3]);
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
                    f[slab][k][i] = pack_e4m3(p[slab][n][e], p[slab][n][e + 1], p[slab][n + 1][e],
                                              p[slab][n + 1][e + 1]);
                }
                mma_e4m3(block, f[slab][k], ONES, ONES);
            }
#pragma unroll
            for (int e = 0; e < 4; e++)
                r.o[slab][D / 8][e] = fmaf(r.o[slab][D / 8][e], decay[slab][e / 2], block[e]);
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
                    r.o[slab][n][e] = fmaf(r.o[slab][n][e], decay[slab][e / 2], block[e]);
            }
        }
    }

    /* --- all of it --- */

    __device__ void steps(char *k8, char *v, float *k_scales, unsigned block, unsigned end)
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
                *reinterpret_cast<const float4 *>(k_scales + block % 2 * 16 + r.lane % 4 * 4);
            if constexpr (FP8) {
                float decay[SLABS][2];
                scale(x.p, x.s, k_scale);
                r.hide(x.p, key0);
                r.softmax_8(x.p, decay);
                add_8(x.p, decay);
            } else {
                relate(x.p, x.s, k_scale, key0);
                add_16(x.p);
            }
        }
    }

    __device__ void run(char *shared, query *queries)
    {
        char *const q8 = shared, *const k8 = q8 + KERNEL_Q_BYTES(D),
                    *const v = k8 + KERNEL_K_BYTES(D);
        __shared__ __align__(16) float k_scales[2 * 16]; /* of two blocks of keys */
        const int warp = threadIdx.x / 32, lane = r.lane;
        int block = static_cast<int>(t.first / TILE_K);
        const int end = t.last > t.first ? static_cast<int>((t.last + TILE_K - 1) / TILE_K) : block;

        v_from = t.v;
        if (block < end)
            fetch_k(k8, k_scales, block);
        copy_commit();

        /* Q: rows of this warp, by this warp */
        const float k_max = largest_scale(a, t);
#pragma unroll 1
        for (int slab = 0; slab < SLABS; slab++) {
            const int i = warp * 16 * SLABS + slab * 16;
            quantise_q<D, BF16, false>(
                a, t, t.row + i, q_row(a, t, t.row + i), a.q.stride[2], k_mean_of(a, t),
                reinterpret_cast<int8_t *>(q8) + i * K_PITCH, queries + i, k_max);
        }
        __syncwarp();
        q_shared = shared_address(q8) + (warp * 16 * SLABS + lane % 16) * K_PITCH + lane / 16 * 16;
        k_shared = shared_address(k8) + (lane / 16 * 8 + lane % 8) * K_PITCH + lane / 8 % 2 * 16;
        if constexpr (FP8)
            v_shared = shared_address(v) + lane % 8 * V_PITCH + lane / 8 * 16;
        else
            v_shared = shared_address(v) + lane % 16 * V_PITCH + lane / 16 * 16;
        r.begin();
        bool is_coarse = false;
#pragma unroll
        for (int slab = 0; slab < SLABS; slab++) {
#pragma unroll
            for (int e = 0; e < 4; e += 2)
                is_coarse |= r.query_of(slab, e).scale * k_max >= 1;
            if constexpr (Q_IN_REGISTERS)
#pragma unroll
                for (int k = 0; k < D / 32; k++)
                    load_q(q_fragments[k][slab], slab, k);
        }
        coarse = __any_sync(~0u, is_coarse);

        steps(k8, v, k_scales, block, end);
        copy_wait<0>();

        r.finish(a.means + (3 * t.local + 1) * a.d_padded);
    }
};

template <int D, bool BF16, bool FP8, bool MASK>
__global__ void __launch_bounds__(32 * KERNEL_WARPS, 2)
    mma_kernel(const __grid_constant__ cuda_args args)
{
    extern __shared__ __align__(16) char shared[];
    __shared__ tile place;
    __shared__ query queries[KERNEL_TILE_Q(D)];

    if (!begins(args))
        return;
    if (threadIdx.x == 0)
        find_tile(args, KERNEL_TILE_Q(D), blockIdx.x, place);
    __syncthreads();
    if (!place.there)
        return;
#if __CUDA_ARCH__ >= 890
    mma_attention<D, BF16, FP8, MASK>(args, place, queries).run(shared, queries);
#else
    if constexpr (!FP8)
        mma_attention<D, BF16, FP8, MASK>(args, place, queries).run(shared, queries);
#endif
}

template <int D, bool BF16, bool FP8, bool MASK>
cudaError_t mma_launch(const cuda_args *args, unsigned blocks, cudaStream_t stream)
{
    mma_kernel<D, BF16, FP8, MASK>
        <<<blocks, 32 * KERNEL_WARPS, KERNEL_SMEM(D, FP8), stream>>>(*args);
    return cudaGetLastError();
}

} // namespace sage

#endif
