/*
 * cuda_attn_wgmma.cuh - attention on Hopper's warpgroup tensor cores (sm_90a).
 *
 * A block has one warpgroup that fetches K and V, some stages ahead, and WGMMA_GROUPS that compute,
 * 64 query rows each, against WGMMA_TILE_K keys at a time (FlashAttention-3, Shah et al.,
 * arXiv:2407.08608, section 3). While one's softmax runs the tensor cores work for the others and
 * for its own last block:
 *
 *   S(j) = Q K(j)^T begins -> O += P(j - 1) V(j - 1) begins -> S(j) is there -> m, exponentials
 *        -> O is there -> P(j) to 16 bits
 *
 * K is in the workspace as shared memory wants it, swizzled; V comes from the caller's tensor by a
 * tensor map, with zeros beyond its end.
 */
#ifndef SAGE_CUDA_ATTN_WGMMA_CUH
#define SAGE_CUDA_ATTN_WGMMA_CUH

#include <cuda/ptx>

#include "cuda_attn.cuh"
#include "cuda_wgmma.cuh"

namespace sage
{

template <int D, bool BF16, bool FP8, bool MASK> struct wgmma_attention {
    static constexpr int GROUPS = WGMMA_GROUPS(D), STAGES = WGMMA_STAGES(D);
    static constexpr int KEYS = WGMMA_TILE_K, KEY_TILES = KEYS / 8;
    static constexpr int K_BYTES = KEYS * D, V_BYTES = 2 * KEYS * D, SCALES = KEYS / 4;
    static constexpr int V_COLUMNS = 64; /* of a row of V in shared memory: 128 bytes */
    static constexpr int TURN = 1, Q_THERE = TURN + GROUPS; /* barriers, one for each warpgroup */

    /* V, K and Q are swizzled, which counts from multiples of 1024 bytes. */
    struct memory {
        char v[STAGES][V_BYTES];
        char k8[STAGES][K_BYTES];
        int8_t q8[WGMMA_TILE_Q(D)][D];
        uint16_t ones[16][64];
        float k_scale[STAGES][SCALES];
        query queries[WGMMA_TILE_Q(D)];
        uint64_t k_full[STAGES], v_full[STAGES], k_empty[STAGES], v_empty[STAGES];
        tile place;
    };
    static_assert(sizeof(memory) <= WGMMA_SMEM(D) - WGMMA_ALIGN, "WGMMA_SMEM");

    /* Where a warpgroup is in the ring of stages. */
    struct place {
        int stage = 0;
        uint32_t parity = 0;

        __device__ void next()
        {
            stage = stage + 1 == STAGES ? 0 : stage + 1;
            parity ^= stage == 0;
        }
    };

    __device__ static void wait(uint64_t &barrier, uint32_t parity)
    {
        while (!cuda::ptx::mbarrier_try_wait_parity(&barrier, parity))
            ;
    }

    /* --- the warpgroup that fetches: one thread of it --- */

    __device__ static void fetch(const cuda_args &a, memory &m, int block, int end)
    {
        using namespace cuda::ptx;
        constexpr int HALVES = KEYS / KERNEL_TILE_K, HALF_SCALES = SCALES / HALVES;
        const tile &t = m.place;
        const int halves = (t.seq.nk + KERNEL_TILE_K - 1) / KERNEL_TILE_K;
        const int8_t *k8 = a.k8 + t.block * (KERNEL_TILE_K * D);
        const float *k_scale = a.k_scale + t.block * HALF_SCALES;

        for (place at; block < end; block++, at.next()) {
            const int half = block * HALVES, n = min(HALVES, halves - half);
            const uint32_t bytes = n * KERNEL_TILE_K * D, scale_bytes = 4 * n * HALF_SCALES;
            uint64_t *full = &m.k_full[at.stage];

            wait(m.k_empty[at.stage], at.parity ^ 1);
            mbarrier_arrive_expect_tx(sem_release, scope_cta, space_shared, full,
                                      bytes + scale_bytes);
            cp_async_bulk(space_cluster, space_global, m.k8[at.stage],
                          k8 + static_cast<int64_t>(half) * (KERNEL_TILE_K * D), bytes, full);
            cp_async_bulk(space_cluster, space_global, m.k_scale[at.stage],
                          k_scale + static_cast<int64_t>(half) * HALF_SCALES, scale_bytes, full);

            full = &m.v_full[at.stage];
            wait(m.v_empty[at.stage], at.parity ^ 1);
            mbarrier_arrive_expect_tx(sem_release, scope_cta, space_shared, full, V_BYTES);
#pragma unroll
            for (int d = 0; d < D; d += V_COLUMNS) {
                const int32_t where[4] = {d, static_cast<int32_t>(t.seq.k0) + block * KEYS,
                                          static_cast<int32_t>(t.kv_head),
                                          static_cast<int32_t>(t.seq.batch)};
                cp_async_bulk_tensor(space_cluster, space_global,
                                     m.v[at.stage] + d / V_COLUMNS * (KEYS * 2 * V_COLUMNS),
                                     &a.v_map, where, full);
            }
        }
    }

    /* --- those that compute --- */

    memory &m;
    rows<D, 1, KEYS, BF16, FP8, MASK> r;
    int group;
    uint32_t p16[KEYS / 16][4];

    __device__ wgmma_attention(const cuda_args &args, memory &shared)
        : m(shared), r(args, shared.place, shared.queries),
          group(__shfl_sync(~0u, r.first_row() / 64, 0))
    {
    }

    /* S begins. */
    __device__ void scores(int (&s)[KEY_TILES][4], int stage) const
    {
        const uint64_t q = matrix_at(shared_address(m.q8[64 * group]), D, 8 * D, 0);
        const uint64_t k = matrix_at(shared_address(m.k8[stage]), D, 8 * D, 0);

        wgmma_fence();
        wgmma_s8(s, q, k);
#pragma unroll
        for (int i = 1; i < D / 32; i++)
            wgmma_s8_add(s, q + 2 * i, k + 2 * i);
        wgmma_commit();
    }

    /* O += P V begins, and the sum of P, as if V had columns of ones. */
    __device__ void values(int stage)
    {
        const uint64_t v =
            matrix_at(shared_address(m.v[stage]), 2 * V_COLUMNS, 16 * V_COLUMNS, V_BYTES / 2);
        const uint64_t ones = matrix_at(shared_address(m.ones), 128, 1024, 0);

        hold(r.o[0]);
        hold(r.p_sum);
        wgmma_fence();
#pragma unroll
        for (int k = 0; k < KEYS / 16; k++) {
            wgmma_16<BF16>(r.o[0], p16[k], v + k * (16 * 2 * V_COLUMNS / 16));
            wgmma_16<BF16>(r.p_sum, p16[k], ones);
        }
        wgmma_commit();
    }

    /* All of it is there. */
    __device__ void values_end()
    {
        wgmma_wait<0>();
        hold(r.o[0]);
        hold(r.p_sum);
    }

    /* Integers to scores in base 2, relative to m. */
    __device__ void scale(float (&p)[KEY_TILES][4], const int (&s)[KEY_TILES][4], int stage) const
    {
        const float *from = m.k_scale[stage] + r.lane % 4 * 4;
        const float minus[2] = {-r.reference(r.top[0][0]), -r.reference(r.top[0][1])};
        /* there are no registers to keep them */
        const float q_scale[2] = {r.query_of(0, 0).scale, r.query_of(0, 2).scale};

#pragma unroll
        for (int run = 0; run < KEYS / 16; run += 4) {
            const float4 four = *reinterpret_cast<const float4 *>(from + 4 * run);
            const float k_scale[4] = {four.x, four.y, four.z, four.w};
#pragma unroll
            for (int n = 2 * run; n < 2 * run + 8; n++)
#pragma unroll
                for (int e = 0; e < 4; e++)
                    p[n][e] = fmaf(static_cast<float>(s[n][e]), q_scale[e / 2] * k_scale[n / 2 % 4],
                                   minus[e / 2]);
        }
    }

    /*
     * To P before rounding, and its sum for lse. The warpgroups take turns: if two were at it at
     * the same time both would take twice as long, with nothing left to be done beside.
     */
    __device__ void exponentiate(float (&p)[KEY_TILES][4])
    {
        turn_wait();
#pragma unroll
        for (int n = 0; n < KEY_TILES; n++)
#pragma unroll
            for (int e = 0; e < 4; e++)
                p[n][e] = exp2_fast(p[n][e]);
        if (r.a.lse.data)
#pragma unroll
            for (int n = 0; n < KEY_TILES; n++)
#pragma unroll
                for (int e = 0; e < 4; e += 2)
                    r.sum[0][e / 2] += p[n][e] + p[n][e + 1];
        turn_over(); /* beyond a branch: the assembler would put it before the exponentials */
    }

    __device__ void turn_wait() const
    {
        barrier_wait(TURN + threadIdx.x / 128, 256);
    }
    __device__ void turn_over() const
    {
        barrier_count(TURN + (threadIdx.x / 128 + 1) % GROUPS, 256);
    }

    /* P to 16 bits, as A of P V. */
    __device__ void pack(const float (&p)[KEY_TILES][4])
    {
#pragma unroll
        for (int n = 0; n < KEY_TILES; n++)
#pragma unroll
            for (int half = 0; half < 2; half++)
                p16[n / 2][n % 2 * 2 + half] = pack_16<BF16>(p[n][2 * half], p[n][2 * half + 1]);
    }

    __device__ void release(uint64_t &barrier) const
    {
        __syncwarp();
        if (r.lane == 0)
            cuda::ptx::mbarrier_arrive(&barrier);
    }

    /* Tiles `tile` ... of the keys, up to and without key `end`; where the next tile is. */
    __device__ place steps(int tile, int end)
    {
        union { /* in place: there are no registers for both */
            int s[KEY_TILES][4];
            float p[1][KEY_TILES][4];
        } x;
        float decay[1][2];
        place at;
        int key0 = tile * KEYS;

        hold(r.o[0]);
        hold(r.p_sum);
        wait(m.k_full[0], 0);
        scores(x.s, 0);
        wgmma_wait<0>();
        hold(x.s);
        scale(x.p[0], x.s, 0);
        release(m.k_empty[0]);
        r.hide(x.p, key0);
        r.follow_from_top(x.p, decay);
        exponentiate(x.p[0]);
        pack(x.p[0]);
#pragma unroll 1
        for (key0 += KEYS; key0 < end; key0 += KEYS) {
            const place before = at;

            at.next();
            wait(m.k_full[at.stage], at.parity);
            scores(x.s, at.stage);
            wait(m.v_full[before.stage], before.parity);
            values(before.stage);
            wgmma_wait<1>();
            hold(x.s);
            scale(x.p[0], x.s, at.stage);
            release(m.k_empty[at.stage]);
            r.hide(x.p, key0);
            const bool moved = r.follow_from_top(x.p, decay);
            exponentiate(x.p[0]);
            values_end();
            release(m.v_empty[before.stage]);
            if (moved)
                r.rescale(decay);
            pack(x.p[0]);
        }
        wait(m.v_full[at.stage], at.parity);
        values(at.stage);
        values_end();
        release(m.v_empty[at.stage]);
        at.next();
        return at;
    }

    /* Tiles that only other warpgroups need. */
    __device__ void pass(int tile, int end, place at) const
    {
        for (; tile < end; tile++, at.next()) {
            turn_wait();
            turn_over();
            wait(m.k_full[at.stage], at.parity);
            release(m.k_empty[at.stage]);
            wait(m.v_full[at.stage], at.parity);
            release(m.v_empty[at.stage]);
        }
    }

    __device__ void run(int tile, int end_tile)
    {
        const int first = r.first_row();

        quantise_q<D, BF16, true>(r.a, r.t, r.row(), m.q8[first], m.queries + first,
                                  largest_scale(r.a, r.t));
        async_fence();
        barrier_wait(Q_THERE + group, 128);
        r.begin();

        /* the last key that some row of the warpgroup sees, and one more */
        const int64_t next_row = r.t.row + (group + 1) * 64;
        const int64_t last = (next_row < r.t.end ? next_row : r.t.end) + r.t.high;
        const int64_t most = static_cast<int64_t>(end_tile) * KEYS;
        const int64_t of_both = last < r.t.last ? last : r.t.last;
        /* all lanes agree; the shuffle tells the compiler, which then has uniform addresses */
        const int end = __shfl_sync(~0u, static_cast<int>(of_both < most ? of_both : most), 0);
        place at;

        if (group == GROUPS - 1)
            turn_over();
        if (end > tile * KEYS) {
            at = steps(tile, end);
            tile = (end + KEYS - 1) / KEYS;
        }
        pass(tile, end_tile, at);
        r.finish();
        if (group == 0)
            turn_wait(); /* the last one: it leaves no barrier half counted */
    }
};

template <int D, bool BF16, bool FP8, bool MASK>
__global__ void __launch_bounds__(128 * (WGMMA_GROUPS(D) + 1), 1)
    wgmma_kernel(const __grid_constant__ cuda_args args)
{
#ifdef __CUDA_ARCH_FEAT_SM90_ALL
    using attention = wgmma_attention<D, BF16, FP8, MASK>;
    constexpr int GROUPS = attention::GROUPS, KEYS = attention::KEYS;
    extern __shared__ char shared[];
    auto &m = *reinterpret_cast<typename attention::memory *>(
        shared + (-shared_address(shared) & (WGMMA_ALIGN - 1)));
    const int group = threadIdx.x / 128;

    stamp_start(args);
    for (int i = threadIdx.x; i < 16 * 64; i += blockDim.x)
        m.ones[0][i] = BF16 ? 0x3f80 : 0x3c00;
    async_fence();
    if (threadIdx.x == 0) {
        m.place = find_tile(args, WGMMA_TILE_Q(D));
        for (int i = 0; i < attention::STAGES; i++) {
            cuda::ptx::mbarrier_init(&m.k_full[i], 1);
            cuda::ptx::mbarrier_init(&m.v_full[i], 1);
            cuda::ptx::mbarrier_init(&m.k_empty[i], 4 * GROUPS);
            cuda::ptx::mbarrier_init(&m.v_empty[i], 4 * GROUPS);
        }
        cuda::ptx::fence_mbarrier_init(cuda::ptx::sem_release, cuda::ptx::scope_cluster);
    }
    __syncthreads();
    const tile &t = m.place;
    if (!t.there)
        return;
    const int block = static_cast<int>(t.first / KEYS);
    const int end = t.last > t.first ? static_cast<int>((t.last + KEYS - 1) / KEYS) : block;

    if (group == GROUPS) {
        registers_less<WGMMA_FETCH_REGISTERS(D)>();
        if (threadIdx.x == 128 * GROUPS)
            attention::fetch(args, m, block, end);
    } else {
        registers_more<WGMMA_REGISTERS(D)>();
        attention(args, m).run(block, end);
    }
#endif
}

template <int D, bool BF16, bool FP8, bool MASK>
cudaError_t wgmma_launch(const cuda_args *args, unsigned blocks, cudaStream_t stream)
{
    wgmma_kernel<D, BF16, FP8, MASK>
        <<<blocks, 128 * (WGMMA_GROUPS(D) + 1), WGMMA_SMEM(D), stream>>>(*args);
    return cudaGetLastError();
}

} // namespace sage

#endif
