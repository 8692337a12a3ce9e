/*
 * cuda_attn_wgmma.cuh - attention on Hopper's warpgroup tensor cores (sm_90a).
 *
 * A block stays on its processor and takes one tile of query rows after the other. Four warps work
 * ahead: one finds the next tiles, one fetches K and another V, some stages ahead and across tiles,
 * one fetches Q, and stores o where o takes Q's place. GROUPS warpgroups compute, 64 query
 * rows each, against WGMMA_TILE_K keys at a time (FlashAttention-3, Shah et al., arXiv:2407.08608,
 * section 3):
 *
 *   16 bits   S(j) = Q K(j)^T begins -> O += P(j - 1) V(j - 1) begins -> softmax of S(j)
 *   e4m3      S(j) -> softmax -> P(j) V(j), apart, then added to O
 *
 * The latter leaves registers enough for three warpgroups up to D = 128, as SageAttention 2 has
 * three blocks of one: each waits for its products, and the others work meanwhile.
 *
 * A warp is held while its products with P, which is in registers, are begun: as long as the tensor
 * core takes for all but the last. What hides that is the other warpgroups' softmax.
 *
 * K, and V in e4m3, are in the workspace as shared memory wants them, swizzled. A 16-bit V comes
 * from the caller's tensor by a tensor map, with zeros beyond its end. V has eight more columns, of
 * ones: with them the products have the sum of P as well.
 */
#ifndef SAGE_CUDA_ATTN_WGMMA_CUH
#define SAGE_CUDA_ATTN_WGMMA_CUH

#include <cuda/ptx>

#include "cuda_attn.cuh"
#include "cuda_wgmma.cuh"

namespace sage
{

/* Where a warp is in a ring of N. */
template <int N> struct ring_place {
    int stage = 0;
    uint32_t parity = 0;

    __device__ void next()
    {
        stage = stage + 1 == N ? 0 : stage + 1;
        parity ^= stage == 0;
    }
    __device__ void skip(int n)
    {
        stage += n;
        parity ^= stage / N % 2;
        stage %= N;
    }
};

__device__ __forceinline__ void wait(uint64_t &barrier, uint32_t parity)
{
    while (!cuda::ptx::mbarrier_try_wait_parity(&barrier, parity))
        ;
}

/*
 * All lanes agree on x. The shuffle tells the compiler, which then keeps what follows from it, such
 * as addresses of matrices, in uniform registers, and does not expect loops to part the lanes.
 */
__device__ __forceinline__ int uniform(int x)
{
    return static_cast<int>(__reduce_or_sync(~0u, static_cast<unsigned>(x)));
}

/* The warp is done with what the barrier guards. */
__device__ __forceinline__ void release(uint64_t &barrier)
{
    __syncwarp();
    if (threadIdx.x % 32 == 0)
        cuda::ptx::mbarrier_arrive(&barrier);
}

/*
 * The thread is done with what it reads by itself, not by products. Each tells so for its own
 * reads: compute-sanitizer can follow that.
 */
__device__ inline void leave(uint64_t &barrier)
{
    cuda::ptx::mbarrier_arrive(&barrier);
}

/* Shared memory, by the block's first THREADS threads: those that compute. */
template <int THREADS> __device__ inline void fill_words(char *to, int bytes, uint32_t word)
{
    for (int i = threadIdx.x; i < bytes / 4; i += THREADS)
        reinterpret_cast<uint32_t *>(to)[i] = word;
}

/* The same of products alone: one lane tells it, without a branch while others are under way. */
__device__ __forceinline__ void leave_warp(uint64_t &barrier, bool is_done = true)
{
    asm volatile("{\n"
                 ".reg .pred first;\n"
                 "setp.eq.u32 first, %1, 0;\n"
                 "@first mbarrier.arrive.shared::cta.b64 _, [%0];\n"
                 "}" ::"r"(shared_address(&barrier)),
                 "r"(is_done ? threadIdx.x % 32 : 1)
                 : "memory");
}

/*
 * All of the block are ready, and kernels before this one are over. False: see begins(). A barrier
 * of so many threads, for they come from different places of the code.
 */
template <int GROUPS> __device__ inline bool begin_block(const cuda_args &a)
{
    barrier_wait(2 + GROUPS, WGMMA_THREADS(GROUPS));
    cudaGridDependencySynchronize();
    return begins(a);
}

constexpr int WGMMA_TILES = 3; /* that are found: the one that is worked on, and what comes then */

/*
 * What differs between kernels: e4m3 or 16 bits for P V; `EXACT`: Q K^T in 16 bits as well. Then
 * nothing is quantised and the workspace has counters only: Q and K come by tensor maps, too.
 * GROUPS: warpgroups that compute. SPLITS: keys of tiles may be split.
 *
 * Both, for few tiles: warpgroups have the same 64 rows and share their blocks of keys, one after
 * the other; the first one adds up in the end. A kernel of its own: it would cost the others 2 %.
 */
template <bool EXACT, bool SPLITS> constexpr bool SHARES = EXACT &&SPLITS;
template <int GROUPS, bool SHARED> constexpr int WGMMA_ROWS = SHARED ? EXACT_SMALL : 64 * GROUPS;

/*
 * S of the next tile begins with P V of a tile's last keys, and is there when o has left. D = 256
 * has no registers for it; at D = 64, with a third warpgroup at work meanwhile, it is no faster.
 */
template <int D, bool EXACT, bool SPLITS> constexpr bool IS_EARLY = EXACT && !SPLITS && D == 128;

/*
 * Shared memory: the stages of K and V, Q in INT8 and as it came, and ones. All but the last Q is
 * swizzled, over 64 or 128 bytes of 8 rows, which counts from multiples of 512 or 1024 bytes.
 *
 * 16 bits: V lies in units of 64 channels, 128 bytes a key, a column of units at one distance from
 * each other and from the unit of ones that follows them: `v_step`. D = 128 has its three stages
 * (V and, between them, K) in units 0 1 6, 2 3 7, 4 5 8, Q in 9 to 11 and ones in 12.
 *
 * D = 256: no product has all columns, so V has a lower half, without ones, of its own. Q is in
 * units 0 to 11, K in 12 13 and 14 15, V's two stages in 19 20, 22 23 and 16 17, 18 21, ones in 24.
 */
template <int D, bool FP8, bool EXACT, int ROWS> struct wgmma_layout {
    static constexpr int UNIT = 128 * WGMMA_TILE_K(D), STAGES = WGMMA_STAGES(D, false);
    static constexpr int K_BYTES = WGMMA_TILE_K(D) * D, K_STEP = D == 64 ? K_BYTES : 2 * UNIT;
    static constexpr int V_STEP = D == 64 ? UNIT : 2 * UNIT;
    static constexpr int K = D == 64 ? STAGES * V_STEP : UNIT;
    static constexpr int Q8 = D == 64 ? K + STAGES * K_STEP : 9 * UNIT;
    static constexpr int Q16 = Q8 + ROWS * D, ONES = Q16 + ROWS * 2 * D;
    static constexpr int BYTES = ONES + UNIT;

    __device__ static int v(int stage)
    {
        return stage * V_STEP;
    }
    __device__ static int v_step(int stage)
    {
        return ONES / (D / 64) - stage * (V_STEP / (D / 64));
    }
    __device__ static int k(int stage)
    {
        return K + stage * K_STEP;
    }
    /* 64 channels */
    __device__ static int v_unit(int stage, int unit)
    {
        return v(stage) + unit * v_step(stage);
    }
    template <int THREADS> __device__ static void fill_ones(char *memory, bool bf16)
    {
        fill_words<THREADS>(memory + ONES, UNIT, bf16 ? 0x3f803f80u : 0x3c003c00u);
    }
};

template <int ROWS> struct wgmma_layout<256, false, false, ROWS> {
    static constexpr int UNIT = 128 * WGMMA_TILE_K(256), STAGES = WGMMA_STAGES(256, false);
    static constexpr int Q8 = 0, Q16 = 4 * UNIT, ONES = 24 * UNIT, BYTES = 25 * UNIT;

    __device__ static int k(int stage)
    {
        return (12 + 2 * stage) * UNIT;
    }
    /* the lower half, its units side by side; the upper one */
    __device__ static int v_low(int stage)
    {
        return (19 - 3 * stage) * UNIT;
    }
    __device__ static int v(int stage)
    {
        return (22 - 4 * stage) * UNIT;
    }
    __device__ static int v_step(int stage)
    {
        return (1 + 2 * stage) * UNIT;
    }
    __device__ static int v_unit(int stage, int unit)
    {
        return unit < 2 ? v_low(stage) + unit * UNIT : v(stage) + (unit - 2) * v_step(stage);
    }
    template <int THREADS> __device__ static void fill_ones(char *memory, bool bf16)
    {
        fill_words<THREADS>(memory + ONES, UNIT, bf16 ? 0x3f803f80u : 0x3c003c00u);
    }
};

/* e4m3: V by halves of a tile's keys, [D + 8][64], the last 8 rows of ones. */
template <int D, int ROWS> struct wgmma_layout<D, true, false, ROWS> {
    static constexpr int STAGES = WGMMA_STAGES(D, true), V_HALF = KERNEL_TILE_K * (D + 8);
    static constexpr int K = STAGES * 2 * V_HALF, K_STEP = WGMMA_TILE_K(D) * D;
    static constexpr int Q8 = K + STAGES * K_STEP, Q16 = Q8 + ROWS * D;
    static constexpr int BYTES = Q16 + ROWS * 2 * D;

    __device__ static int v(int stage)
    {
        return stage * 2 * V_HALF;
    }
    __device__ static int k(int stage)
    {
        return K + stage * K_STEP;
    }
    template <int THREADS> __device__ static void fill_ones(char *memory, bool)
    {
        constexpr int WORDS = KERNEL_TILE_K * 8 / 4;

        for (int i = threadIdx.x; i < 2 * STAGES * WORDS; i += THREADS)
            reinterpret_cast<uint32_t *>(memory + i / WORDS * V_HALF +
                                         KERNEL_TILE_K * D)[i % WORDS] = 0x38383838u;
    }
};

/*
 * Exact: K and V in units of 64 channels, Q twice up to D = 128, which has V's two stages in units
 * 0 3 and 2 4, K's in 1 5 and 7 8, ones in 6, Q in 9 to 12.
 */
template <int D, int ROWS> struct wgmma_layout<D, false, true, ROWS> {
    static constexpr int UNIT = 128 * WGMMA_TILE_K(D), STAGES = EXACT_STAGES(D, ROWS);
    static constexpr int Q = D == 64 ? 2 * STAGES * UNIT : 9 * UNIT, Q_STEP = ROWS * 2 * D;
    static constexpr int ONES = D == 64 ? Q + 2 * Q_STEP : 6 * UNIT;
    static constexpr int SHARE = D == 64 ? ONES + UNIT : Q + 2 * Q_STEP; /* see join() */
    static constexpr int BYTES = SHARE + EXACT_SHARE(D, ROWS);

    __device__ static int v(int stage)
    {
        return stage * (D == 64 ? UNIT : 2 * UNIT);
    }
    __device__ static int v_step(int stage)
    {
        return (ONES - v(stage)) / (D / 64);
    }
    __device__ static int k(int stage)
    {
        return D == 64 ? (STAGES + stage) * UNIT : (1 + 6 * stage) * UNIT;
    }
    __device__ static int k_unit(int stage, int unit)
    {
        return k(stage) + unit * (stage ? UNIT : 4 * UNIT);
    }
    __device__ static int v_unit(int stage, int unit)
    {
        return v(stage) + unit * v_step(stage);
    }
    __device__ static int q(int place)
    {
        return Q + place * Q_STEP;
    }
    template <int THREADS> __device__ static void fill_ones(char *memory, bool bf16)
    {
        fill_words<THREADS>(memory + ONES, UNIT, bf16 ? 0x3f803f80u : 0x3c003c00u);
    }
};

/*
 * D = 256: Q in units 0 to 7, K's stages in 8 to 11 and 12 to 15, V and ones as if quantised; o
 * behind them, 64 channels at a time.
 */
template <int ROWS>
struct wgmma_layout<256, false, true, ROWS> : wgmma_layout<256, false, false, ROWS> {
    using of_values = wgmma_layout<256, false, false, ROWS>;
    using of_values::STAGES, of_values::UNIT;
    static_assert(STAGES == EXACT_STAGES(256, ROWS) && EXACT_QUERIES(256) == 1);
    static constexpr int SHARE = 4 * UNIT; /* Q of 64 rows leaves it */
    static_assert(SHARE + EXACT_SHARE(256, ROWS) <= 8 * UNIT);
    static constexpr int O = 25 * UNIT, BYTES = O + ROWS * EXACT_O(256);

    __device__ static int k(int stage)
    {
        return (8 + 4 * stage) * UNIT;
    }
    __device__ static int k_unit(int stage, int unit)
    {
        return k(stage) + unit * UNIT;
    }
    __device__ static int q(int)
    {
        return 0;
    }
};

/* The blocks of keys that a tile sees: the first, how many; where they end for a warpgroup. */
struct alignas(16) key_blocks {
    int first, n;
    int end[3]; /* one more than the last key that some row of it sees; 0: it has no row */
};

template <int D, bool FP8, bool EXACT, int GROUPS, bool SHARED> struct wgmma_memory {
    static constexpr int TILE_Q = WGMMA_ROWS<GROUPS, SHARED>;
    using layout = wgmma_layout<D, FP8, EXACT, TILE_Q>;
    static constexpr int STAGES = layout::STAGES;
    static constexpr int QUERIES = EXACT ? EXACT_QUERIES(D) : 1; /* tiles that have a Q */
    static constexpr bool Q_BECOMES_O = EXACT && EXACT_O(D) == 0;

    char tensors[layout::BYTES];
    float k_scale[EXACT ? 1 : STAGES][EXACT ? 4 : WGMMA_TILE_K(D) / 4];
    query queries[TILE_Q];
    tile tiles[WGMMA_TILES];
    key_blocks blocks[WGMMA_TILES];
    /* of the tiles: K's mean; V's scales, then its means */
    float k_mean[EXACT ? 1 : WGMMA_TILES][EXACT ? 4 : D], v_means[WGMMA_TILES][FP8 ? 2 * D : 1];
    uint64_t k_full[STAGES], v_full[STAGES], k_empty[STAGES], v_empty[STAGES];
    uint64_t tile_full[WGMMA_TILES], tile_empty[WGMMA_TILES], few_left, tail;
    uint64_t q_full[QUERIES], q_empty[QUERIES];

    __device__ int8_t *q8(int row)
    {
        return reinterpret_cast<int8_t *>(tensors + layout::Q8 + row * SWIZZLED_ROW<D>);
    }
    __device__ char *q16(int row)
    {
        return tensors + layout::Q16 + row * 2 * D;
    }

    __device__ void init_barriers()
    {
        const auto init = [](uint64_t &barrier, int n) { cuda::ptx::mbarrier_init(&barrier, n); };
        constexpr int WARPS = 4 * GROUPS, READERS = SHARED ? 4 : WARPS; /* of a block of keys */

        for (int i = 0; i < STAGES; i++) {
            init(k_full[i], 1);
            init(v_full[i], 1);
            init(k_empty[i], EXACT ? READERS : 32 * WARPS); /* see leave() */
            init(v_empty[i], READERS);
        }
        for (int i = 0; i < WGMMA_TILES; i++) {
            init(tile_full[i], 1);
            init(tile_empty[i], 32 * (WARPS + 3));
        }
        for (int i = 0; i < QUERIES; i++) {
            init(q_full[i], EXACT ? 1 : 32);
            init(q_empty[i], EXACT ? WARPS : 32 * WARPS);
        }
        init(few_left, 1);
        init(tail, 1);
        cuda::ptx::fence_mbarrier_init(cuda::ptx::sem_release, cuda::ptx::scope_cluster);
    }
};

/* --- the warps that fetch --- */

template <int D, bool FP8, bool EXACT, int GROUPS, bool SPLITS> struct wgmma_fetch {
    static constexpr int KEYS = WGMMA_TILE_K(D), HALF = KERNEL_TILE_K, SCALES = HALF / 4;
    static constexpr int HALVES = KEYS / HALF;
    static constexpr int AHEAD = EXACT && D > 64 ? 2 : 0;     /* blocks: see prefetch() */
    static constexpr int LEFT = !EXACT ? 12 : D > 64 ? 4 : 2; /* blocks: see tiles() */
    using memory = wgmma_memory<D, FP8, EXACT, GROUPS, SHARES<EXACT, SPLITS>>;
    using layout = typename memory::layout;
    static constexpr int STAGES = memory::STAGES, TILE_Q = memory::TILE_Q;

    __device__ static void prefetch_maps(const cuda_args &a)
    {
        if constexpr (!FP8)
            prefetch_map(a.v_map);
        if constexpr (EXACT) {
            prefetch_map(a.q_map);
            prefetch_map(a.k_map);
            if (memory::Q_BECOMES_O && a.o_mapped)
                prefetch_map(a.o_map);
        }
    }

    /* Where a tensor map has 64 channels of some rows. */
    struct box {
        int32_t at[4];
    };
    __device__ static box box_of(int unit, int32_t row, int64_t head, const tile &t)
    {
        return {64 * unit, row, static_cast<int32_t>(head), static_cast<int32_t>(t.seq.batch)};
    }
    __device__ static box box_of_keys(int unit, int block, const tile &t)
    {
        return box_of(unit, static_cast<int32_t>(t.seq.k0) + block * KEYS, t.kv_head, t);
    }

    /*
     * A block of K and V to the L2 cache, by the tile of a head's last rows, which mostly is the
     * first: the memory takes longer than a step. Others find it there. D = 64 is none the faster.
     */
    __device__ static void prefetch(const cuda_args &a, const tile &t, int block)
    {
        if (t.end - t.row > TILE_Q || int64_t{block} * KEYS >= t.last)
            return;
#pragma unroll
        for (int unit = 0; unit < D / 64; unit++) {
            const box of = box_of_keys(unit, block, t);
            prefetch_tensor(a.k_map, of.at);
            prefetch_tensor(a.v_map, of.at);
        }
    }

    /*
     * The number of the next split of a tile, or tile, after `before`. A block's first is its own:
     * when it draws the next, exact: then the counter may not be open yet. The last number that
     * anybody draws leaves the counter as it was.
     */
    __device__ static unsigned next_ticket(const cuda_args &a, unsigned before)
    {
        const unsigned last = a.n_tiles * (SPLITS ? a.n_splits : 1) - 1;

        if constexpr (EXACT) {
            if (before < gridDim.x)
                open_counter(a, a.arrived);
            const auto n = static_cast<unsigned>(atomicAdd(a.arrived, 1) - a.call);

            if (n == last)
                *a.arrived = a.call;
            return gridDim.x + n;
        } else {
            const unsigned n = atomicAdd(a.ticket, 1);

            if (n == last)
                *a.ticket = 0;
            return gridDim.x + n;
        }
    }

    /* Which split of which tile, and if it is there its blocks of keys. */
    __device__ static void find(const cuda_args &a, unsigned ticket, tile &t, key_blocks &blocks)
    {
        t.index = SPLITS ? divide(ticket, a.order.splits) : ticket;
        t.split = ticket - t.index * (SPLITS ? a.order.splits.by : 1);
        find_tile<!EXACT>(a, TILE_Q, t.index, t);
        if (!t.there)
            return;
        if (SPLITS && a.n_splits > 1)
            take_split(a, t);
        find_blocks(t, blocks);
    }

    /* Of a tile's keys those that belong to its split. */
    __device__ static void take_split(const cuda_args &a, tile &t)
    {
        const int64_t from = static_cast<int64_t>(t.split) * a.split_keys,
                      end = from + a.split_keys;
        t.first = max(t.first, static_cast<int>(from));
        t.last = end < t.last ? static_cast<int>(end) : t.last;
    }

    /* There may be none, whatever a row sees; IS_EARLY: then one, all of which is hidden. */
    __device__ static void find_blocks(const tile &t, key_blocks &to)
    {
        const int rows = t.end - t.row, last = t.last > t.first ? t.last + KEYS - 1 : t.first;

        to.first = t.first / KEYS;
        to.n = last / KEYS - to.first;
        if (IS_EARLY<D, EXACT, SPLITS> && to.n == 0) {
            to.first = 0;
            to.n = 1;
        }
#pragma unroll
        for (int group = 0; group < GROUPS; group++) {
            const int end = min(t.high + min(64 * group + 64, rows), t.last);
            to.end[group] = 64 * group >= rows ? 0 : min(end, (to.first + to.n) * KEYS);
        }
    }

    /*
     * A warp: where the next tiles are; after the last one, that there is none. A number is drawn
     * when there is room for its tile; where later rows see more keys, when few blocks of the tile
     * before are left to be asked for. Not sooner: others may be done first, and would have nothing
     * to do in the end. (Late was not measured for sequences of different length: not there.)
     *
     * The first tile is found while the block begins: it takes as long as all else there.
     */
    __device__ static void tiles(const cuda_args &a, memory &m)
    {
        const bool first_lane = threadIdx.x % 32 == 0;
        const unsigned end = a.n_tiles * (SPLITS ? a.n_splits : 1);
        const bool late = a.high < a.nk && !a.q_offsets;
        unsigned ticket = blockIdx.x;
        bool begun = false;
        uint32_t parity = 0;
        ring_place<WGMMA_TILES> slot;

        for (;;) {
            tile &t = m.tiles[slot.stage];
            if (first_lane) {
                t.there = false;
                if (ticket < end)
                    find(a, ticket, t, m.blocks[slot.stage]);
            }
            __syncwarp();
            if (!begun && !begin_block<GROUPS>(a))
                return;
            begun = true;
            const bool there = __any_sync(~0u, t.there);
            if (!there && __any_sync(~0u, first_lane && ticket < end)) {
                __syncwarp(); /* all have looked at the tile */
                if (first_lane)
                    ticket = next_ticket(a, ticket);
                continue;
            }
            if (there && !EXACT) {
                const float k_max = largest_scale(a, t);
                if (first_lane)
                    t.k_max = k_max;
                if (const float *const from = k_mean_of(a, t))
                    for (int i = threadIdx.x % 32; i < D; i += 32)
                        m.k_mean[slot.stage][i] = i < a.d ? from[i] : 0;
                for (int i = threadIdx.x % 32; FP8 && i < 2 * D; i += 32)
                    m.v_means[slot.stage][i] = a.means[(3 * t.local + 1) * D + i];
            }
            release(m.tile_full[slot.stage]);
            if (!there)
                return;
            if (AHEAD > 0 && first_lane)
#pragma unroll 1
                for (int i = 0; i < AHEAD; i++)
                    prefetch(a, t, t.first / KEYS + i);
            slot.next();
            wait(late ? m.few_left : m.tile_empty[slot.stage], late ? parity : slot.parity ^ 1);
            parity ^= 1;
            if (first_lane)
                ticket = next_ticket(a, ticket);
            wait(m.tile_empty[slot.stage], slot.parity ^ 1);
        }
    }

    __device__ static void fetch_k(const cuda_args &a, memory &m, const tile &t, int block,
                                   int halves, int stage)
    {
        using namespace cuda::ptx;
        const int64_t from = t.block + HALVES * block;
        const int n = min(HALVES, halves - HALVES * block);
        const uint32_t bytes = n * HALF * D, scale_bytes = 4 * n * SCALES;
        uint64_t *full = &m.k_full[stage];

        mbarrier_arrive_expect_tx(sem_release, scope_cta, space_shared, full, bytes + scale_bytes);
        cp_async_bulk(space_cluster, space_global, m.tensors + layout::k(stage),
                      a.k8 + from * (HALF * D), bytes, full);
        cp_async_bulk(space_cluster, space_global, m.k_scale[stage], a.k_scale + from * SCALES,
                      scale_bytes, full);
    }

    /* e4m3 */
    __device__ static void fetch_v8(const cuda_args &a, memory &m, const tile &t, int block,
                                    int halves, int stage)
    {
        using namespace cuda::ptx;
        constexpr int BYTES = HALF * D;
        const uint8_t *from = a.v8 + (t.block + 2 * block) * BYTES;
        const int n = min(2, halves - 2 * block);
        uint64_t *full = &m.v_full[stage];

        mbarrier_arrive_expect_tx(sem_release, scope_cta, space_shared, full, n * BYTES);
        for (int i = 0; i < n; i++)
            cp_async_bulk(space_cluster, space_global,
                          m.tensors + layout::v(stage) + i * layout::V_HALF, from + i * BYTES,
                          BYTES, full);
    }

    /* 16 bits: `full` is told. */
    __device__ static void fetch_v16(const cuda_args &a, memory &m, const tile &t, int block,
                                     int stage, uint64_t *full)
    {
        using namespace cuda::ptx;

        mbarrier_arrive_expect_tx(sem_release, scope_cta, space_shared, full, 2 * KEYS * D);
#pragma unroll
        for (int unit = 0; unit < D / 64; unit++) {
            const box of = box_of_keys(unit, block, t);
            cp_async_bulk_tensor(space_cluster, space_global,
                                 m.tensors + layout::v_unit(stage, unit), &a.v_map, of.at, full);
        }
    }

    /* Exact */
    __device__ static void fetch_k16(const cuda_args &a, memory &m, const tile &t, int block,
                                     int stage)
    {
        using namespace cuda::ptx;
        uint64_t *const full = &m.k_full[stage];

        mbarrier_arrive_expect_tx(sem_release, scope_cta, space_shared, full, 2 * KEYS * D);
#pragma unroll
        for (int unit = 0; unit < D / 64; unit++) {
            const box of = box_of_keys(unit, block, t);
            cp_async_bulk_tensor(space_cluster, space_global,
                                 m.tensors + layout::k_unit(stage, unit), &a.k_map, of.at, full);
        }
    }
    __device__ static void fetch_q16(const cuda_args &a, memory &m, const tile &t, int place)
    {
        using namespace cuda::ptx;
        constexpr int ROWS = TILE_Q;
        uint64_t *const full = &m.q_full[place];

        mbarrier_arrive_expect_tx(sem_release, scope_cta, space_shared, full, 2 * ROWS * D);
#pragma unroll
        for (int unit = 0; unit < D / 64; unit++) {
            const box of = box_of(unit, static_cast<int32_t>(t.seq.q0 + t.row), t.q_head, t);
            cp_async_bulk_tensor(space_cluster, space_global,
                                 m.tensors + layout::q(place) + unit * ROWS * 128, &a.q_map, of.at,
                                 full);
        }
    }

    /* What is beyond the last key becomes zero, for P is zero there, but 0 * NaN would be NaN. */
    __device__ static void clear(char *from, int bytes)
    {
        for (int i = threadIdx.x % 32; i < bytes / 16; i += 32)
            reinterpret_cast<uint4 *>(from)[i] = make_uint4(0, 0, 0, 0);
        async_fence();
        __syncwarp();
    }

    /* Another: K of all tiles, one after the other. V is not to wait for it, nor it for V. */
    __device__ static void keys(const cuda_args &a, memory &m)
    {
        const bool first_lane = threadIdx.x % 32 == 0;
        ring_place<STAGES> at;
        ring_place<WGMMA_TILES> slot;

        for (;; slot.next()) {
            const tile &t = m.tiles[slot.stage];
            wait(m.tile_full[slot.stage], slot.parity);
            if (!__any_sync(~0u, t.there))
                return;
            const int halves = (t.seq.nk + HALF - 1) / HALF, begin = m.blocks[slot.stage].first;
            const int end = begin + m.blocks[slot.stage].n, few = max(begin, end - LEFT);
            for (int block = begin; block < end; block++, at.next()) {
                if (block == few)
                    release(m.few_left);
                __syncwarp();
                wait(m.k_empty[at.stage], at.parity ^ 1);
                if (first_lane) {
                    if constexpr (EXACT)
                        fetch_k16(a, m, t, block, at.stage);
                    else
                        fetch_k(a, m, t, block, halves, at.stage);
                    if constexpr (AHEAD > 0)
                        prefetch(a, t, block + AHEAD);
                }
            }
            if (begin >= end)
                release(m.few_left);
            leave(m.tile_empty[slot.stage]);
        }
    }

    /* A third: V of all tiles. */
    __device__ static void values(const cuda_args &a, memory &m)
    {
        const bool first_lane = threadIdx.x % 32 == 0;
        ring_place<STAGES> at;
        ring_place<WGMMA_TILES> slot;
        uint32_t tail_parity = 0;

        for (;; slot.next()) {
            const tile &t = m.tiles[slot.stage];
            wait(m.tile_full[slot.stage], slot.parity);
            if (!__any_sync(~0u, t.there))
                return;
            const int halves = (t.seq.nk + HALF - 1) / HALF, begin = m.blocks[slot.stage].first;
            const int end = begin + m.blocks[slot.stage].n;
            for (int block = begin; block < end; block++, at.next()) {
                __syncwarp();
                wait(m.v_empty[at.stage], at.parity ^ 1);
                if constexpr (FP8) {
                    if (halves - 2 * block == 1)
                        clear(m.tensors + layout::v(at.stage) + layout::V_HALF, HALF * D);
                    if (first_lane)
                        fetch_v8(a, m, t, block, halves, at.stage);
                } else {
                    /* plain batches have zeros there already */
                    const bool tail = a.k_offsets && (block + 1) * KEYS > t.seq.nk;
                    if (first_lane)
                        fetch_v16(a, m, t, block, at.stage, tail ? &m.tail : &m.v_full[at.stage]);
                    if (!tail)
                        continue;
                    wait(m.tail, tail_parity);
                    tail_parity ^= 1;
                    const int keys = t.seq.nk - block * KEYS;
                    for (int unit = 0; unit < D / 64; unit++)
                        clear(m.tensors + layout::v_unit(at.stage, unit) + keys * 128,
                              (KEYS - keys) * 128);
                    release(m.v_full[at.stage]);
                }
            }
            leave(m.tile_empty[slot.stage]);
        }
    }

    /* Q as it is, 16 bytes a lane, zeros beyond the last row and channel. */
    __device__ static void fetch_q(const cuda_args &a, memory &m, const tile &t)
    {
        constexpr int EACH = D / 8; /* of a row */
        const int lane = threadIdx.x % 32, vector = lane % EACH;
        const int end = 8 * vector < a.d ? t.end - t.row : 0;
        const char *from = q_row(a, t, t.row + lane / EACH) + 16 * vector;
        char *to = m.q16(lane / EACH) + 16 * vector;

#pragma unroll 4
        for (int r = lane / EACH; r < TILE_Q; r += 32 / EACH) {
            if (a.q.aligned)
                copy_async(shared_address(to), from, r < end);
            else
                *reinterpret_cast<uint4 *>(to) =
                    r < end ? load_8(from, false) : make_uint4(0, 0, 0, 0);
            from += 32 / EACH * a.q.stride[2];
            to += 32 / EACH * 2 * D;
        }
        if (a.q.aligned)
            copy_arrive(shared_address(&m.q_full[0]));
        else
            cuda::ptx::mbarrier_arrive(&m.q_full[0]);
    }

    /* A fourth: Q of all tiles, where o is stored by those that compute. */
    __device__ static void queries(const cuda_args &a, memory &m)
    {
        ring_place<WGMMA_TILES> slot;
        uint32_t parity = 0; /* of Q's place */

        for (;; slot.next(), parity ^= 1) {
            const tile &t = m.tiles[slot.stage];
            wait(m.tile_full[slot.stage], slot.parity);
            if (!__any_sync(~0u, t.there))
                return;
            wait(m.q_empty[0], parity ^ 1);
            if constexpr (!EXACT)
                fetch_q(a, m, t);
            else if (threadIdx.x % 32 == 0)
                fetch_q16(a, m, t, 0);
            leave(m.tile_empty[slot.stage]);
        }
    }

    /* Exact: o of whole tiles leaves Q's place by its tensor map. */
    __device__ static bool stores_o(const cuda_args &a)
    {
        return a.o_mapped && (!SPLITS || a.n_splits == 1);
    }

    /* o of a tile. */
    __device__ static void store_o(const cuda_args &a, memory &m, const tile &t, int place)
    {
        using namespace cuda::ptx;
        constexpr int ROWS = TILE_Q;

#pragma unroll
        for (int unit = 0; unit < D / 64; unit++) {
            const box of = box_of(unit, static_cast<int32_t>(t.seq.q0 + t.row), t.q_head, t);
            cp_async_bulk_tensor(space_global, space_shared, &a.o_map, of.at,
                                 m.tensors + layout::q(place) + unit * ROWS * 128);
        }
        cp_async_bulk_commit_group();
        cp_async_bulk_wait_group_read(n32_t<0>());
    }

    /*
     * Q of all tiles, and their o: when a tile ends its o has the place of its Q, and leaves it
     * before another Q comes, that of the tile after the next. Until then the tile is there.
     */
    __device__ static void queries_and_o(const cuda_args &a, memory &m)
    {
        static_assert(WGMMA_TILES == memory::QUERIES + 1);
        const bool first_lane = threadIdx.x % 32 == 0;
        ring_place<WGMMA_TILES> slot, old;
        ring_place<memory::QUERIES> q;
        const auto end_tile = [&] {
            if (first_lane && stores_o(a))
                store_o(a, m, m.tiles[old.stage], q.stage);
            leave(m.tile_empty[old.stage]);
            old.next();
        };

        for (unsigned n = 0;; n++, slot.next(), q.next()) {
            const tile &t = m.tiles[slot.stage];
            wait(m.tile_full[slot.stage], slot.parity);
            wait(m.q_empty[q.stage], q.parity ^ 1);
            if (n >= memory::QUERIES)
                end_tile();
            if (!__any_sync(~0u, t.there))
                break;
            if (first_lane)
                fetch_q16(a, m, t, q.stage);
        }
        if (old.stage == slot.stage)
            return;
        q.next(); /* the last tile's */
        wait(m.q_empty[q.stage], q.parity ^ 1);
        end_tile();
        cuda::ptx::cp_async_bulk_wait_group(cuda::ptx::n32_t<0>());
    }
};

/* --- those that compute --- */

template <int D, bool BF16, bool FP8, bool EXACT, int GROUPS, bool SPLITS> struct wgmma_attention {
    static constexpr int KEYS = WGMMA_TILE_K(D), HALF = KERNEL_TILE_K;
    static constexpr int RUN = K_RUN(FP8), RUNS = KEYS / RUN;
    static constexpr float MOST = 15; /* above m: binary16 ends at 2^16 */
    static constexpr bool SHARED = SHARES<EXACT, SPLITS>;
    static constexpr int STRIDE = SHARED ? GROUPS : 1; /* blocks of keys, to the next one */
    using memory = wgmma_memory<D, FP8, EXACT, GROUPS, SHARED>;
    using layout = typename memory::layout;
    using fetch = wgmma_fetch<D, FP8, EXACT, GROUPS, SPLITS>;
    static constexpr int STAGES = memory::STAGES, TILE_Q = memory::TILE_Q;
    static constexpr bool EARLY = IS_EARLY<D, EXACT, SPLITS>;
    static_assert(!EARLY || memory::Q_BECOMES_O); /* the next Q has a place of its own */
    /* In a tile a stage has one reader: who waits for a phase must know that the last is over. */
    static_assert(STAGES % STRIDE == 0);

    /* Of a tile of keys: integers, or what they would stand for, then relative to m. In place. */
    union scores {
        int s[KEYS / 8][4];
        float p[1][KEYS / 8][4];
    };

    memory &m;
    rows<D, 1, KEYS, BF16, FP8, false, EXACT && KEYS == 128, SHARED> r;
    int group;
    bool coarse; /* a step of the scores may be a factor of 2: no sums of roundings then */
    uint32_t p_packed[FP8 ? KEYS / 32 : KEYS / 16][4]; /* A of P V */
    float decay[1][2];                                 /* of O, by this tile */

    __device__ wgmma_attention(const cuda_args &args, memory &shared, const tile &t, int warpgroup)
        : m(shared), r(args, t, shared.queries), group(warpgroup)
    {
    }

    /* S begins. `q_place`: exact: where Q is. */
    static __device__ void begin_scores(memory &m, int group, scores &x, int stage, int q_place)
    {
        if constexpr (EXACT) {
            const uint32_t at = shared_address(m.tensors);
            const uint64_t q =
                matrix_at(at + layout::q(q_place) + (SHARED ? 0 : 64 * 128 * group), 128, 1024, 0);
            const uint64_t k = matrix_at(at + layout::k(stage), 128, 1024, 0);
            const int k_step = (layout::k_unit(stage, 1) - layout::k(stage)) / 16;

            wgmma_fence();
            wgmma_16<BF16, false>(x.p[0], q, k);
#pragma unroll
            for (int i = 1; i < D / 16; i++)
                wgmma_16<BF16, true>(x.p[0], q + i / 4 * (TILE_Q * 128 / 16) + i % 4 * 2,
                                     k + i / 4 * k_step + i % 4 * 2);
        } else {
            constexpr int ROW = SWIZZLED_ROW<D>, STEPS = ROW / 32; /* of a panel */
            const uint64_t q = matrix_at(shared_address(m.q8(64 * group)), ROW, 8 * ROW, 0);
            const uint64_t k =
                matrix_at(shared_address(m.tensors) + layout::k(stage), ROW, 8 * ROW, 0);

            wgmma_fence();
            wgmma_s8(x.s, q, k);
#pragma unroll
            for (int i = 1; i < D / 32; i++)
                wgmma_s8_add(x.s, q + i / STEPS * (64 * GROUPS * ROW / 16) + i % STEPS * 2,
                             k + i / STEPS * (KEYS * ROW / 16) + i % STEPS * 2);
        }
        wgmma_commit();
    }

    /*
     * P V, and with it the sum of P: 16 bits to O, e4m3 to sums of its own, since the tensor core's
     * are short. The latter begins, for TILES tiles of 8 columns from `first` on.
     */
    template <int TILES> __device__ void begin_sums(float (&sums)[TILES][4], int stage, int first)
    {
        const uint32_t at = shared_address(m.tensors) + layout::v(stage) + first * 8 * HALF;
        const uint64_t v = matrix_at(at, HALF, 8 * HALF, 0);

        wgmma_fence();
        wgmma_e4m3(sums, p_packed[0], v);
#pragma unroll
        for (int k = 1; k < KEYS / 32; k++)
            wgmma_e4m3_add(sums, p_packed[k], v + (k / 2 * layout::V_HALF + k % 2 * 32) / 16);
        wgmma_commit();
    }

    /* They are there. */
    template <int TILES> __device__ void add_sums(float (&sums)[TILES][4], int first)
    {
#pragma unroll
        for (int n = 0; n < TILES; n++)
#pragma unroll
            for (int e = 0; e < 4; e++)
                r.o[0][first + n][e] = fmaf(r.o[0][first + n][e], decay[0][e / 2], sums[n][e]);
    }

    /* e4m3, from beginning to end; D = 128: by halves, as registers are few. */
    __device__ void values_8(int stage)
    {
        constexpr int LOW = D > 64 ? D / 16 : 0;
        float high[D / 8 + 1 - LOW][4];

        if constexpr (LOW > 0) {
            float low[LOW][4];
            begin_sums(low, stage, 0);
            wgmma_wait<0>();
            hold(low);
            add_sums(low, 0);
        }
        begin_sums(high, stage, LOW);
        wgmma_wait<0>();
        hold(high);
        release(m.v_empty[stage]);
        add_sums(high, LOW);
    }

    __device__ void begin_values_16(int stage)
    {
        const uint64_t v = matrix_at(shared_address(m.tensors) + layout::v(stage), 128, 1024,
                                     layout::v_step(stage));
        constexpr int STEP = 16 * 128 / 16;

        hold(r.o[0]);
        wgmma_fence();
        if constexpr (D <= 128) {
#pragma unroll
            for (int k = 0; k < KEYS / 16; k++)
                wgmma_16_add<BF16>(r.o[0], p_packed[k], v + k * STEP);
        } else {
            const uint64_t low = matrix_at(shared_address(m.tensors) + layout::v_low(stage), 128,
                                           1024, layout::UNIT);
            auto &o_low = reinterpret_cast<float(&)[16][4]>(r.o[0][0]);
            auto &o_high = reinterpret_cast<float(&)[17][4]>(r.o[0][16]);
#pragma unroll
            for (int k = 0; k < KEYS / 16; k++) {
                wgmma_16_add<BF16>(o_low, p_packed[k], low + k * STEP);
                wgmma_16_add<BF16>(o_high, p_packed[k], v + k * STEP);
            }
        }
        wgmma_commit();
    }

    /* there: they have begun. */
    __device__ void end_values_16(int stage, bool there = true)
    {
        wgmma_wait<0>();
        hold(r.o[0]);
        if (there)
            release(m.v_empty[stage]);
    }

    /* --- softmax --- */

    __device__ static void hold_scores(scores &x)
    {
        if constexpr (EXACT)
            hold(x.p[0]);
        else
            hold(x.s);
    }

    /*
     * What the tile's integers stand for: by row, times by run of keys. Both, as there are no
     * registers for their products.
     */
    struct factors {
        float q[2], k[RUNS];
    };

    __device__ void load_factors(factors &c, int stage) const
    {
        const float *from = m.k_scale[stage] + r.lane % 4 * 4;

        c.q[0] = r.query_of(0, 0).scale;
        c.q[1] = r.query_of(0, 2).scale;
#pragma unroll
        for (int at = 0; at < KEYS; at += HALF) {
            const float4 four = *reinterpret_cast<const float4 *>(from + at / 4);
            const float k[4] = {four.x, four.y, four.z, four.w};
#pragma unroll
            for (int run = 0; run < HALF; run += RUN)
                c.k[(at + run) / RUN] = k[run / QUANT_RUN];
        }
    }

    /* A tile of 8 keys: integers to scores in base 2, relative to `top`. */
    __device__ void scale(scores &x, int n, const factors &c, const float (&top)[2]) const
    {
#pragma unroll
        for (int e = 0; e < 4; e++)
            x.p[0][n][e] = EXACT ? fmaf(x.p[0][n][e], c.q[0], -top[e / 2])
                                 : fmaf(static_cast<float>(x.s[n][e]),
                                        c.q[e / 2] * c.k[8 * n / RUN], -top[e / 2]);
    }

    __device__ void scale(scores &x, const factors &c, const float (&top)[2]) const
    {
#pragma unroll
        for (int n = 0; n < KEYS / 8; n++)
            scale(x, n, c, top);
    }

    __device__ static void exponentiate(scores &x, int n)
    {
#pragma unroll
        for (int e = 0; e < 4; e++)
            x.p[0][n][e] = exp2_fast(x.p[0][n][e]);
    }

    __device__ static void exponentiate(scores &x)
    {
#pragma unroll
        for (int n = 0; n < KEYS / 8; n++)
            exponentiate(x, n);
    }

    /*
     * Integers to P before rounding, relative to `top`; done(n) is called for each tile of 8 keys,
     * in order, when its P is there. Exponentials take longest, so they are to be among all else;
     * the assembler would put them last. So `top` follows from the last tile's P, times zero: of
     * every tile, or every second.
     */
    template <typename Done>
    __device__ void exponentiate(scores &x, const factors &c, float (&top)[2], Done done)
    {
        constexpr int N = KEYS / 8, AHEAD = FP8 && D > 64 ? 1 : 2; /* as measured, both */
        constexpr int EVERY = D == (EXACT ? 64 : 128) ? 2 : 1;

#pragma unroll
        for (int n = 0; n < AHEAD; n++)
            scale(x, n, c, top);
#pragma unroll
        for (int n = 0; n <= N; n++) {
            if (n < N)
                exponentiate(x, n);
            if (n > 0)
                done(n - 1);
            if (n > 0 && n + AHEAD < N && n % EVERY == 0) {
                top[0] = fmaf(x.p[0][n - 1][0], 0, top[0]);
                top[1] = fmaf(x.p[0][n - 1][2], 0, top[1]);
            }
            if (n + AHEAD < N)
                scale(x, n + AHEAD, c, top);
        }
    }

    /* For lse: P before rounding. */
    __device__ void add_up(const scores &x, int n)
    {
#pragma unroll
        for (int e = 0; e < 4; e += 2)
            r.sum[0][e / 2] += x.p[0][n][e] + x.p[0][n][e + 1];
    }
    __device__ void add_up(const scores &x)
    {
        if (r.a.lse.data)
#pragma unroll
            for (int n = 0; n < KEYS / 8; n++)
                add_up(x, n);
    }

    /* P to 16 bits or e4m3, as A of P V: two or four tiles of 8 keys are a step's. */
    __device__ void pack(const scores &x, int n)
    {
        const float(&p)[KEYS / 8][4] = x.p[0];

#pragma unroll
        for (int row = 0; row < 2; row++) {
            if constexpr (!FP8)
                p_packed[n / 2][n % 2 * 2 + row] = pack_16<BF16>(p[n][2 * row], p[n][2 * row + 1]);
            else if (n % 2 == 1)
                p_packed[n / 4][n / 2 % 2 * 2 + row] = pack_e4m3(
                    p[n - 1][2 * row], p[n - 1][2 * row + 1], p[n][2 * row], p[n][2 * row + 1]);
        }
    }

    __device__ void pack(const scores &x)
    {
#pragma unroll
        for (int n = 0; n < KEYS / 8; n++)
            pack(x, n);
    }

    /* e4m3: integers to A of P V. Twice: P would have to stay for its sum. */
    __device__ void exponentiate_and_pack(scores &x, const factors &c)
    {
        float top[2] = {r.reference(r.top[0][0]), r.reference(r.top[0][1])};

        if (r.a.lse.data)
            exponentiate(x, c, top, [&](int n) {
                add_up(x, n);
                pack(x, n);
            });
        else
            exponentiate(x, c, top, [&](int n) { pack(x, n); });
    }

    /*
     * m becomes the largest score so far, found from the integers: a run's largest has the run's
     * largest score. For tiles of which all rows see all keys; exact: or where -inf hides them.
     * False, and nothing is done, if the last digit of an exact score is more than P has room for.
     */
    __device__ bool follow(const scores &x, const factors &c)
    {
        constexpr float LARGE = 0x1p22f;
        float most[2];
        bool large = false;

#pragma unroll
        for (int half = 0; half < 2; half++) {
            most[half] = -INFINITY;
#pragma unroll
            for (int run = 0; run < RUNS; run++) {
                const int first = run * (RUN / 8), i = 2 * half;
                if constexpr (EXACT) {
                    const float(&p)[KEYS / 8][4] = x.p[0];
                    const float top = fmaxf(fmaxf(p[first][i], p[first][i + 1]),
                                            fmaxf(p[first + 1][i], p[first + 1][i + 1]));
                    most[half] = fmaxf(most[half], top * c.q[0]);
                } else {
                    int top = max(x.s[first][i], x.s[first][i + 1]);
#pragma unroll
                    for (int n = first + 1; n < first + RUN / 8; n++)
                        top = max(max(top, x.s[n][i]), x.s[n][i + 1]);
                    most[half] = fmaxf(most[half], static_cast<float>(top) * c.k[run]);
                }
            }
            if constexpr (!EXACT)
                most[half] *= c.q[half];
            large |= fabsf(most[half]) >= LARGE && most[half] != -INFINITY;
        }
        if (EXACT && !coarse && __any_sync(~0u, large))
            return false;
        r.raise(most, decay[0]);
        return true;
    }

    /*
     * None of this lane's scores is above m by more than P has room for, going by the largest
     * integer and the largest scale. Positive floats are ordered like the integers that they look
     * like, NaN is above them. For the same tiles.
     */
    __device__ bool near(const scores &x, const factors &c) const
    {
        bool is = true;

#pragma unroll
        for (int half = 0; half < 2; half++) {
            int top[2] = {0, 0}; /* two: no long chain */
            float scale = EXACT ? c.q[0] : c.k[0];
#pragma unroll
            for (int n = 0; n < KEYS / 8; n++)
                top[n % 2] = max(max(top[n % 2], x.s[n][2 * half]), x.s[n][2 * half + 1]);
#pragma unroll
            for (int run = 1; run < RUNS && !EXACT; run++)
                scale = fmaxf(scale, c.k[run]);
            if constexpr (!EXACT)
                scale *= c.q[half];
            const int largest = max(top[0], top[1]);
            const float most =
                (EXACT ? __int_as_float(largest) : static_cast<float>(largest)) * scale;
            is &= most - r.top[0][half] <= MOST;
        }
        return is;
    }

    /* Exact: products to scores in base 2, rounded, so that m is one of them. */
    __device__ void refine(scores &x, factors &c) const
    {
#pragma unroll
        for (int n = 0; n < KEYS / 8; n++)
#pragma unroll
            for (int e = 0; e < 4; e++)
                x.p[0][n][e] *= c.q[0];
        c.q[0] = 1;
    }

    __device__ void leave_k(int stage) const
    {
        if constexpr (EXACT)
            leave_warp(m.k_empty[stage]);
        else
            leave(m.k_empty[stage]);
    }

    /*
     * S to P, 16 bits; true if m moved: O has to be rescaled by `decay`, which is 1 otherwise.
     * before_pack() is called before P takes the place of the last one. Where all rows see all keys
     * it is the integers that tell whether m moves, so that exponentials can begin at once; D = 64
     * has no registers for that. Exact: always the products themselves, -inf where they are hidden:
     * short sequences wait for instructions, and this is half of them.
     */
    template <typename BeforePack>
    __device__ bool softmax_16(scores &x, int stage, int key0, BeforePack before_pack)
    {
        bool from_integers = EXACT, moved;
        factors c;

        if constexpr (EXACT)
            c.q[0] = r.a.scale;
        else
            load_factors(c, stage);
        leave_k(stage);
        decay[0][0] = decay[0][1] = 1;
        if constexpr (EXACT) {
            r.hide(x.p, key0);
            if (coarse)
                refine(x, c);
        } else if constexpr (D > 64) {
            from_integers = __all_sync(~0u, !coarse && r.all_see(key0));
        }
        if (from_integers) {
            moved = !__all_sync(~0u, !r.moves && near(x, c));
            if (moved) {
#pragma unroll 1
                while (!follow(x, c)) {
                    coarse = true;
                    refine(x, c);
                }
                r.settle();
            }
            float top[2] = {r.reference(r.top[0][0]), r.reference(r.top[0][1])};
            exponentiate(x, c, top, [](int) {});
        } else {
            scale(x, c,
                  {coarse ? 0 : r.reference(r.top[0][0]), coarse ? 0 : r.reference(r.top[0][1])});
            r.hide(x.p, key0);
            moved = coarse ? r.follow(x.p, decay) : r.follow_from_top(x.p, decay);
            exponentiate(x);
        }
        add_up(x);
        before_pack();
        pack(x);
        return moved;
    }

    /* S to 2^8 P; m is always the largest score so far. */
    __device__ void softmax_8(scores &x, int stage, int key0)
    {
        factors c;

        load_factors(c, stage);
        leave(m.k_empty[stage]);
        if (__any_sync(~0u, !coarse && r.all_see(key0))) {
            follow(x, c);
            exponentiate_and_pack(x, c);
        } else {
            scale(x, c, {0, 0});
            r.hide(x.p, key0);
            r.follow(x.p, decay);
            exponentiate(x);
            add_up(x);
            pack(x);
        }
    }

    /* --- the keys --- */

    __device__ void scores_of(scores &x, const ring_place<STAGES> &at, int q_place) const
    {
        wait(m.k_full[at.stage], at.parity);
        begin_scores(m, group, x, at.stage, q_place);
    }

    /*
     * Blocks from key0 on, every STRIDE-th, up to and without key `end`. EARLY: x is S of the first
     * one; P V of the last one is under way in the end, and `at` is where that is.
     */
    __device__ void steps(scores &x, ring_place<STAGES> &at, int key0, int end, int q_place)
    {
        constexpr int STEP = STRIDE * KEYS;

        if constexpr (FP8) {
#pragma unroll 1
            for (; key0 < end; key0 += KEYS, at.next()) {
                scores_of(x, at, q_place);
                wgmma_wait<0>();
                hold_scores(x);
                softmax_8(x, at.stage, key0);
                wait(m.v_full[at.stage], at.parity);
                values_8(at.stage);
            }
        } else {
            ring_place<STAGES> before = at;
            const auto begin_next = [&] {
                before = at;
#pragma unroll
                for (int i = 0; i < STRIDE; i++)
                    at.next();
                scores_of(x, at, q_place);
                wait(m.v_full[before.stage], before.parity);
                begin_values_16(before.stage);
                wgmma_wait<1>();
                hold_scores(x);
            };

            if constexpr (!EARLY)
                scores_of(x, at, q_place);
            if constexpr (EXACT)
                r.begin();
            if constexpr (!EARLY) {
                wgmma_wait<0>();
                hold_scores(x);
            }
            /* A softmax apart for the first tile is 1.5 % faster where sequences are long. */
            if constexpr (EXACT || D <= 64) {
                bool first = true;
#pragma unroll 1
                for (;; begin_next()) {
                    if constexpr (EXACT && !memory::Q_BECOMES_O)
                        leave_warp(m.q_empty[q_place], key0 + STEP >= end);
                    const bool moved =
                        softmax_16(x, at.stage, key0, [&] { end_values_16(before.stage, !first); });
                    if (moved && (!EARLY || !first)) /* O is zero at first */
                        r.rescale(decay);
                    first = false;
                    key0 += STEP;
                    if (key0 >= end)
                        break;
                }
            } else {
                softmax_16(x, at.stage, key0, [] {});
#pragma unroll 1
                for (key0 += KEYS; key0 < end; key0 += KEYS) {
                    begin_next();
                    if (softmax_16(x, at.stage, key0, [&] { end_values_16(before.stage); }))
                        r.rescale(decay);
                }
            }
            wait(m.v_full[at.stage], at.parity);
            begin_values_16(at.stage);
            if constexpr (!EARLY) {
                end_values_16(at.stage);
                at.next();
            }
        }
    }

    /* No row sees a key. */
    __device__ void no_steps(int q_place)
    {
        r.begin();
        if constexpr (EXACT && !memory::Q_BECOMES_O)
            release(m.q_empty[q_place]);
    }

    /* Tiles that only other warpgroups need. */
    __device__ void pass(ring_place<STAGES> &at, int n) const
    {
        for (; n > 0; n--, at.next()) {
            wait(m.k_full[at.stage], at.parity);
            if constexpr (EXACT)
                release(m.k_empty[at.stage]); /* all lanes have seen it */
            else
                leave(m.k_empty[at.stage]);
            wait(m.v_full[at.stage], at.parity);
            release(m.v_empty[at.stage]);
        }
    }

    /* --- tiles whose keys are shared or split --- */

    /*
     * The first warpgroup's O, m and sums become those of all keys that one of them has seen. The
     * others' pass through shared memory. They end a tile together: none is ahead at a stage that
     * another has not read yet.
     */
    __device__ void join()
    {
        constexpr int N = D / 8 + 2, ROOM = EXACT_SHARE_ROOM(D); /* fours of a lane: all; at once */
        float4 *const place =
            reinterpret_cast<float4 *>(m.tensors + layout::SHARE) + threadIdx.x % 128;
        float by[GROUPS][2], of[GROUPS][2]; /* what is here, and theirs, counts */

#pragma unroll
        for (int begin = 0; begin < N; begin += ROOM) {
            const int end = begin + ROOM < N ? begin + ROOM : N;
            barrier_wait(1 + GROUPS, 128 * GROUPS); /* what was there has been read */
            if (group > 0)
#pragma unroll
                for (int n = begin; n < end; n++)
                    place[128 * ((group - 1) * ROOM + n - begin)] = four(n);
            barrier_wait(1 + GROUPS, 128 * GROUPS);
            if (group > 0)
                continue;
#pragma unroll
            for (int other = 0; other < GROUPS - 1; other++)
#pragma unroll
                for (int n = begin; n < end; n++) {
                    const float4 x = place[128 * (other * ROOM + n - begin)];
                    if (n == 0)
                        weigh_up(x, by[other], of[other]);
                    else
                        add(r.o[0][n - 1], x, by[other], of[other]);
                }
        }
    }

    /* Of a lane's floats: m and sums; O of 8 channels after the other. */
    __device__ float4 four(int n) const
    {
        if (n == 0)
            return make_float4(r.top[0][0], r.top[0][1], r.sum[0][0], r.sum[0][1]);
        const float *o = r.o[0][n - 1];
        return make_float4(o[0], o[1], o[2], o[3]);
    }
    /* The first four, of another warpgroup's. */
    __device__ void weigh_up(const float4 &first, float (&by)[2], float (&of)[2])
    {
        const float m[2] = {first.x, first.y}, sum[2] = {first.z, first.w};

#pragma unroll
        for (int half = 0; half < 2; half++) {
            const float top = fmaxf(r.top[0][half], m[half]);
            by[half] = weight(r.top[0][half], top);
            of[half] = weight(m[half], top);
            r.top[0][half] = top;
            r.sum[0][half] = by[half] * r.sum[0][half] + of[half] * sum[half];
        }
    }
    static __device__ void add(float (&o)[4], const float4 &x, const float (&by)[2],
                               const float (&of)[2])
    {
        o[0] = by[0] * o[0] + of[0] * x.x;
        o[1] = by[0] * o[1] + of[0] * x.y;
        o[2] = by[1] * o[2] + of[1] * x.z;
        o[3] = by[1] * o[3] + of[1] * x.w;
    }

    /* Of what is relative to m, where it becomes relative to `top`. */
    static __device__ float weight(float m, float top)
    {
        return m == -INFINITY ? 0 : exp2_fast(m - top);
    }

    static constexpr int N_O = 4 * (D / 8 + 1), N_PART = N_O + 4; /* floats of a lane */

    /* Where split `i` leaves what this lane has: words of neighbouring lanes side by side. */
    __device__ float *part_of(unsigned i) const
    {
        const int64_t slab = static_cast<int64_t>(r.t.index) * r.a.slabs + r.first_row() / 16;

        return r.a.parts + (slab * r.a.n_splits + i) * (N_PART * 32) + r.lane;
    }

    /* The counter of those that have. It is opened while Q is on its way. */
    __device__ unsigned long long *done() const
    {
        return r.a.done + r.t.index * r.a.slabs + r.first_row() / 16;
    }

    /*
     * Leave O, m and the sums of 16 rows; true if all other splits have left theirs: then they
     * become the whole tile's. Added up in the order of the keys, whoever is last.
     */
    __device__ bool gather()
    {
        if (r.row() >= r.t.end)
            return false;
        float *const to = part_of(r.t.split);
#pragma unroll
        for (int i = 0; i < N_O; i++)
            to[32 * i] = r.o[0][i / 4][i % 4];
#pragma unroll
        for (int half = 0; half < 2; half++) {
            to[32 * (N_O + half)] = r.top[0][half];
            to[32 * (N_O + 2 + half)] = r.sum[0][half];
        }
        __threadfence();
        __syncwarp();
        unsigned before = 0;
        if (r.lane == 0)
            before = static_cast<unsigned>(atomicAdd(done(), 1) - r.a.call);
        if (__shfl_sync(~0u, before, 0) + 1 < r.a.n_splits)
            return false;
        if (r.lane == 0)
            *done() = r.a.call;
        __threadfence();
        merge();
        return true;
    }

    __device__ void merge()
    {
        float m[2] = {-INFINITY, -INFINITY};

        for (unsigned i = 0; i < r.a.n_splits; i++)
#pragma unroll
            for (int half = 0; half < 2; half++)
                m[half] = fmaxf(m[half], __ldcg(part_of(i) + 32 * (N_O + half)));
        r.begin();
#pragma unroll 1
        for (unsigned i = 0; i < r.a.n_splits; i++) {
            const float *from = part_of(i);
            float by[2];
#pragma unroll
            for (int half = 0; half < 2; half++) {
                by[half] = weight(__ldcg(from + 32 * (N_O + half)), m[half]);
                r.sum[0][half] += by[half] * __ldcg(from + 32 * (N_O + 2 + half));
            }
#pragma unroll
            for (int n = 0; n < N_O; n++)
                r.o[0][n / 4][n % 4] += by[n % 4 / 2] * __ldcg(from + 32 * n);
        }
        r.top[0][0] = m[0];
        r.top[0][1] = m[1];
    }

    /* Where 16 rows of o have 8 channels, swizzled. */
    static __device__ char *o_place(char *rows, int row, int eight)
    {
        constexpr int UNIT = TILE_Q * 128;

        return rows + eight / 8 * UNIT + row * 128 + (eight % 8 ^ row % 8) * 16;
    }

    /* What O is multiplied by in the end; where no key was seen O is 0, whatever V holds. */
    __device__ void weigh(float (&up)[2])
    {
        r.weigh(0, up);
        if (!__any_sync(~0u, up[0] == 0 || up[1] == 0))
            return;
#pragma unroll
        for (int n = 0; n < D / 8; n++)
#pragma unroll
            for (int e = 0; e < 4; e++)
                r.o[0][n][e] = up[e / 2] == 0 ? 0 : r.o[0][n][e];
    }

    /*
     * Two elements of o. They are V's means by P as rounded, with its sum by the same products, so
     * only what V has makes them Inf. Inf becomes NaN.
     */
    static __device__ uint32_t o_pair(const float *x, float up)
    {
        return inf_to_nan<BF16>(pack_16<BF16>(x[0] * up, x[1] * up));
    }

    /* `n` tiles of 8 channels of o, from `first` on. */
    template <int N> __device__ void put_o(char *rows, int first, const float (&up)[2]) const
    {
#pragma unroll
        for (int n = 0; n < N; n += 2) {
            uint32_t pairs[4];
#pragma unroll
            for (int i = 0; i < 4; i++)
                pairs[i] = o_pair(&r.o[0][first + n + i / 2][i % 2 * 2], up[i % 2]);
            stmatrix(shared_address(o_place(rows, r.lane % 16, n + r.lane / 16)), pairs);
        }
    }

    /* They leave, whole rows side by side, EACH times 16 bytes. */
    template <int EACH> __device__ void store_o(char *rows, int first) const
    {
        const int eight = r.lane % EACH;

        __syncwarp();
        r.template store_rows<32 / EACH>(r.lane / EACH, 8 * (first + eight), [&](int row) {
            return *reinterpret_cast<const uint4 *>(o_place(rows, row, eight));
        });
    }

    /*
     * Exact: o to the place of Q, when the products of all four warps have read that, and from
     * there by its tensor map, if it has one, else here. `whole`: it is there.
     */
    __device__ void finish_in_place(int q_place, bool whole)
    {
        char *const rows = m.tensors + layout::q(q_place) + r.first_row() * 128;
        float up[2];

        weigh(up);
        barrier_wait(1 + group, 128);
        if (whole) {
            put_o<D / 8>(rows, 0, up);
            if (!fetch::stores_o(r.a))
                store_o<D / 8>(rows, 0);
            r.finish_lse(0, up);
        }
        async_fence();
        release(m.q_empty[q_place]);
    }

    /* Exact: 64 channels at a time, for the next Q has come meanwhile. */
    __device__ void finish_exact()
    {
        char *const rows = m.tensors + layout::O + r.first_row() * 128;
        float up[2];

        weigh(up);
#pragma unroll
        for (int n = 0; n < D / 8; n += 8) {
            __syncwarp();
            put_o<8>(rows, n, up);
            store_o<8>(rows, n);
        }
        r.finish_lse(0, up);
    }

    /* Q to INT8, and what that tells. */
    __device__ void prepare_q(int slot, uint32_t q_parity)
    {
        const int first = r.first_row();

        barrier_wait(1 + group, 128); /* nobody needs the Q before */
        wait(m.q_full[0], q_parity);
        quantise_q<D, BF16, true>(r.a, r.t, r.row(), m.q16(first), 2 * D,
                                  k_mean_of(r.a, r.t) ? m.k_mean[slot] : nullptr, m.q8(first),
                                  m.queries + first, r.t.k_max);
        async_fence();
        leave(m.q_empty[0]);
        barrier_wait(1 + group, 128);
    }

    /* --- tiles --- */

    /*
     * Blocks of keys: the tile's first, all of them; the warpgroup's, and where those end. EARLY:
     * it has one even if it sees none, as the tile has: see find_blocks().
     */
    struct extent {
        int first, all, n, end;

        __device__ extent(const key_blocks &blocks, int group)
        {
            first = uniform(blocks.first);
            all = uniform(blocks.n);
            end = SHARED ? (first + all) * KEYS : uniform(blocks.end[group]);
            n = end > first * KEYS ? (end + KEYS - 1) / KEYS - first : EARLY;
        }
    };

    /* `slot`: the tile's place; `q`: Q's. */
    __device__ void run(ring_place<STAGES> &at, int slot, const ring_place<memory::QUERIES> &q)
    {
        const extent keys(m.blocks[slot], group);
        scores x;

        if (SPLITS && r.a.n_splits > 1 && r.lane == 0 && r.row() < r.t.end)
            open_counter(r.a, done());
        if constexpr (EXACT) {
            wait(m.q_full[q.stage], q.parity);
            barrier_wait(1 + group, 128); /* or the compiler thinks that lanes may have parted */
        } else {
            prepare_q(slot, q.parity);
        }
        if constexpr (!EXACT)
            r.begin(); /* else beside the first products */
        coarse = !EXACT && __any_sync(~0u, r.query_of(0, 0).scale * r.t.k_max >= 1 ||
                                               r.query_of(0, 2).scale * r.t.k_max >= 1);
        at.stage = uniform(at.stage);
        at.parity = uniform(at.parity);
        if constexpr (SHARED) {
            ring_place<STAGES> own = at;
            own.skip(group);
            if (keys.n > group)
                steps(x, own, (keys.first + group) * KEYS, keys.end, uniform(q.stage));
            else
                no_steps(q.stage);
            at.skip(keys.all);
            join();
            if (group > 0) {
                if constexpr (memory::Q_BECOMES_O)
                    release(m.q_empty[q.stage]);
                return;
            }
        } else {
            if (keys.n > 0)
                steps(x, at, keys.first * KEYS, keys.end, uniform(q.stage));
            else
                no_steps(q.stage);
            pass(at, keys.all - keys.n);
        }
        const bool whole = !SPLITS || r.a.n_splits == 1 || gather();
        if constexpr (memory::Q_BECOMES_O) {
            finish_in_place(uniform(q.stage), whole);
        } else if (whole) {
            if constexpr (EXACT)
                finish_exact();
            else
                r.finish(m.v_means[slot]);
        }
    }

    /*
     * EARLY: S of the tile's first block begins. False: there is no tile, and S is of what was in
     * its place: under a condition the assembler would serialise all products.
     */
    static __device__ bool begin_early(memory &m, int group, scores &x, ring_place<STAGES> &at,
                                       const ring_place<WGMMA_TILES> &slot,
                                       const ring_place<memory::QUERIES> &q)
    {
        wait(m.tile_full[slot.stage], slot.parity);
        const bool there = __any_sync(~0u, m.tiles[slot.stage].there);
        at.stage = uniform(at.stage);
        at.parity = uniform(at.parity);
        if (there) {
            wait(m.q_full[q.stage], q.parity);
            wait(m.k_full[at.stage], at.parity);
        }
        __syncwarp(); /* or the compiler thinks that lanes may have parted */
        begin_scores(m, group, x, at.stage, uniform(q.stage));
        return there;
    }

    /* x becomes S of the next tile's first block, if there is one, `slot` and `q` its places. */
    __device__ bool run_early(scores &x, ring_place<STAGES> &at, ring_place<WGMMA_TILES> &slot,
                              ring_place<memory::QUERIES> &q)
    {
        const int place = slot.stage, q_place = uniform(q.stage);
        const extent keys(m.blocks[place], group);

        coarse = false;
        steps(x, at, keys.first * KEYS, keys.end, q_place);
        const int last = at.stage;
        const bool passes = keys.all > keys.n;
        at.next();
        if (passes) { /* all of them, before another tile is waited for: it may come only then */
            wgmma_wait<0>();
            release(m.v_empty[last]);
            pass(at, keys.all - keys.n);
        }
        slot.next();
        q.next();
        const bool there = begin_early(m, group, x, at, slot, q);
        wgmma_wait<1>();
        hold(r.o[0]);
        if (!passes)
            release(m.v_empty[last]);
        finish_in_place(q_place, true);
        wgmma_wait<0>(); /* here: the assembler does not follow products around the loop */
        hold_scores(x);
        leave(m.tile_empty[place]);
        return there;
    }

    /* All tiles of a block. */
    static __device__ void run_all_early(const cuda_args &args, memory &m, int group)
    {
        ring_place<STAGES> at;
        ring_place<WGMMA_TILES> slot;
        ring_place<memory::QUERIES> q;
        scores x;
        bool there = begin_early(m, group, x, at, slot, q);

        wgmma_wait<0>();
        hold_scores(x);
#pragma unroll 1
        while (there) {
            wgmma_attention each(args, m, m.tiles[slot.stage], group);
            there = each.run_early(x, at, slot, q);
        }
    }
};

template <int D, bool BF16, bool FP8, bool EXACT, int GROUPS = WGMMA_GROUPS(D, FP8),
          bool SPLITS = true>
__global__ void __launch_bounds__(WGMMA_THREADS(GROUPS), 1)
    wgmma_kernel(const __grid_constant__ cuda_args args)
{
#ifdef __CUDA_ARCH_FEAT_SM90_ALL
    using memory = wgmma_memory<D, FP8, EXACT, GROUPS, SHARES<EXACT, SPLITS>>;
    using fetch = wgmma_fetch<D, FP8, EXACT, GROUPS, SPLITS>;
    using attention = wgmma_attention<D, BF16, FP8, EXACT, GROUPS, SPLITS>;
    constexpr int SMEM = EXACT ? EXACT_SMEM(D, memory::TILE_Q) : WGMMA_SMEM(D, FP8);
    static_assert(sizeof(memory) <= SMEM - WGMMA_ALIGN, "shared memory");
    extern __shared__ char shared[];
    auto &m = *reinterpret_cast<memory *>(shared + (-shared_address(shared) & (WGMMA_ALIGN - 1)));

    if (threadIdx.x / 128 == GROUPS) {
        registers_less<WGMMA_FETCH_REGISTERS(GROUPS)>();
        const int warp = threadIdx.x / 32 % 4;
        if (warp == 0) {
            fetch::tiles(args, m);
            return;
        }
        if (warp == 1 && threadIdx.x % 32 == 0)
            m.init_barriers();
        if (warp == 2 && threadIdx.x % 32 == 0)
            fetch::prefetch_maps(args);
        if (!begin_block<GROUPS>(args))
            return;
        if (warp == 1)
            fetch::keys(args, m);
        else if (warp == 3)
            fetch::values(args, m);
        else {
            if constexpr (memory::Q_BECOMES_O)
                fetch::queries_and_o(args, m);
            else
                fetch::queries(args, m);
        }
    } else {
        memory::layout::template fill_ones<128 * GROUPS>(m.tensors, BF16);
        async_fence();
        if (EXACT && threadIdx.x < memory::TILE_Q)
            m.queries[threadIdx.x] = {};
        if (!begin_block<GROUPS>(args))
            return;
        registers_more<WGMMA_REGISTERS(GROUPS)>();
        const int group = uniform(static_cast<int>(threadIdx.x / 128));
        if constexpr (attention::EARLY) {
            attention::run_all_early(args, m, group);
        } else { /* here: in a function of its own it becomes up to 2 % slower */
            ring_place<memory::STAGES> at;
            ring_place<WGMMA_TILES> slot;
            ring_place<memory::QUERIES> q;
            for (;; slot.next(), q.next()) {
                const tile &t = m.tiles[slot.stage];
                wait(m.tile_full[slot.stage], slot.parity);
                if (!__any_sync(~0u, t.there))
                    break;
                attention(args, m, t, group).run(at, slot.stage, q);
                leave(m.tile_empty[slot.stage]);
            }
        }
    }
#endif
}

template <int D, bool BF16, bool FP8, bool EXACT, int GROUPS = WGMMA_GROUPS(D, FP8),
          bool SPLITS = true>
cudaError_t wgmma_launch(const cuda_args *args, unsigned blocks, cudaStream_t stream)
{
    constexpr int ROWS = WGMMA_ROWS<GROUPS, SHARES<EXACT, SPLITS>>;

    blocks *= args->n_splits;
    return launch_early(wgmma_kernel<D, BF16, FP8, EXACT, GROUPS, SPLITS>,
                        blocks < args->processors ? blocks : args->processors,
                        WGMMA_THREADS(GROUPS), EXACT ? EXACT_SMEM(D, ROWS) : WGMMA_SMEM(D, FP8),
                        stream, *args);
}

} // namespace sage

#endif
