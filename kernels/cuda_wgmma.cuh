/*
 * cuda_wgmma.cuh - the PTX of Hopper's warpgroup matrix products, which cuda::ptx lacks. Four
 * consecutive warps multiply 64 rows, 16 each, with accumulators in the layout of mma.m16n8. The
 * products run on their own: between wgmma_fence() and wgmma_wait() nothing may touch their
 * registers.
 */
#ifndef SAGE_CUDA_WGMMA_CUH
#define SAGE_CUDA_WGMMA_CUH

#include <stdint.h>

namespace sage
{

/*
 * Where B is (PTX ISA, "Matrix Descriptor Format"; addresses and offsets in units of 16 bytes).
 * Rows are swizzled over `row_bytes`, 64 or 128, in groups of 8 rows that lie `group` bytes apart.
 * `column`: the distance of the next columns where a row holds only some of them (transposed B).
 */
__device__ __forceinline__ uint64_t matrix_at(uint32_t address, int row_bytes, int group,
                                              int column)
{
    const uint64_t swizzle = row_bytes == 128 ? 1 : 2;

    return static_cast<uint64_t>((address & 0x3ffff) >> 4) |
           static_cast<uint64_t>(column >> 4) << 16 | static_cast<uint64_t>(group >> 4) << 32 |
           swizzle << 62;
}

/* What this thread wrote to shared memory is seen by products that start after the next barrier. */
__device__ __forceinline__ void async_fence()
{
    asm volatile("fence.proxy.async.shared::cta;" ::: "memory");
}

/* Registers are final: those of a product that is to start, of one that has ended. */
__device__ __forceinline__ void wgmma_fence()
{
    asm volatile("wgmma.fence.sync.aligned;" ::: "memory");
}

__device__ __forceinline__ void wgmma_commit()
{
    asm volatile("wgmma.commit_group.sync.aligned;" ::: "memory");
}

/* All but the last N groups are done. */
template <int N> __device__ __forceinline__ void wgmma_wait()
{
    asm volatile("wgmma.wait_group.sync.aligned %0;" ::"n"(N) : "memory");
}

/* The compiler is not to move what it does with these registers across. */
template <int N> __device__ __forceinline__ void hold(float (&x)[N][4])
{
#pragma unroll
    for (int n = 0; n < N; n++)
#pragma unroll
        for (int e = 0; e < 4; e++)
            asm volatile("" : "+f"(x[n][e])::"memory");
}

template <int N> __device__ __forceinline__ void hold(int (&x)[N][4])
{
#pragma unroll
    for (int n = 0; n < N; n++)
#pragma unroll
        for (int e = 0; e < 4; e++)
            asm volatile("" : "+r"(x[n][e])::"memory");
}

/* A tensor map's box to the L2 cache. */
__device__ __forceinline__ void prefetch_tensor(const CUtensorMap &map, const int32_t (&where)[4])
{
    asm volatile(
        "cp.async.bulk.prefetch.tensor.4d.L2.global.tile [%0, {%1, %2, %3, %4}];" ::"l"(&map),
        "r"(where[0]), "r"(where[1]), "r"(where[2]), "r"(where[3])
        : "memory");
}

/* A tensor map to where the copies look for it. */
__device__ __forceinline__ void prefetch_map(const CUtensorMap &map)
{
    asm volatile("prefetch.tensormap [%0];" ::"l"(&map) : "memory");
}

/* Accumulators, as text and as registers: of 64, 72, 128 and 136 columns. */
#define WGMMA_32                                                                                   \
    "%0, %1, %2, %3, %4, %5, %6, %7, %8, %9, %10, %11, "                                           \
    "%12, %13, %14, %15, %16, %17, %18, %19, %20, %21, %22, %23, "                                 \
    "%24, %25, %26, %27, %28, %29, %30, %31"
#define WGMMA_36 WGMMA_32 ", %32, %33, %34, %35"
#define WGMMA_64                                                                                   \
    WGMMA_36 ", %36, %37, %38, %39, %40, %41, %42, %43, %44, %45, %46, %47, "                      \
             "%48, %49, %50, %51, %52, %53, %54, %55, %56, %57, %58, %59, "                        \
             "%60, %61, %62, %63"
#define WGMMA_68 WGMMA_64 ", %64, %65, %66, %67"
#define WGMMA_REGS_4(c, n) c(d[n][0]), c(d[n][1]), c(d[n][2]), c(d[n][3])
#define WGMMA_REGS_16(c, n)                                                                        \
    WGMMA_REGS_4(c, n), WGMMA_REGS_4(c, n + 1), WGMMA_REGS_4(c, n + 2), WGMMA_REGS_4(c, n + 3)
#define WGMMA_REGS_8_TILES(c, n) WGMMA_REGS_16(c, n), WGMMA_REGS_16(c, n + 4)
#define WGMMA_REGS_32(c) WGMMA_REGS_8_TILES(c, 0)
#define WGMMA_REGS_36(c) WGMMA_REGS_8_TILES(c, 0), WGMMA_REGS_4(c, 8)
#define WGMMA_REGS_64(c) WGMMA_REGS_8_TILES(c, 0), WGMMA_REGS_8_TILES(c, 8)
#define WGMMA_REGS_68(c) WGMMA_REGS_64(c), WGMMA_REGS_4(c, 16)

/* d = a b (+ d): INT8, 64 x 64 or 128 x 32; both have their 32 side by side, in shared memory. */
#define WGMMA_AB_32 "%32, %33, "
#define WGMMA_AB_64 "%64, %65, "
#define WGMMA_S8(n, columns, add, c)                                                               \
    asm volatile("{\n"                                                                             \
                 ".reg .pred add;\n"                                                               \
                 "setp.ne.b32 add, 0, " #add ";\n"                                                 \
                 "wgmma.mma_async.sync.aligned.m64n" #columns "k32.s32.s8.s8 {" WGMMA_##n          \
                 "}, " WGMMA_AB_##n "add;\n"                                                       \
                                    "}"                                                            \
                 : WGMMA_REGS_##n(c)                                                               \
                 : "l"(a), "l"(b))
#define WGMMA_S8_FUNCTIONS(tiles, n, columns)                                                      \
    __device__ __forceinline__ void wgmma_s8(int(&d)[tiles][4], uint64_t a, uint64_t b)            \
    {                                                                                              \
        WGMMA_S8(n, columns, 0, "=r");                                                             \
    }                                                                                              \
    __device__ __forceinline__ void wgmma_s8_add(int(&d)[tiles][4], uint64_t a, uint64_t b)        \
    {                                                                                              \
        WGMMA_S8(n, columns, 1, "+r");                                                             \
    }
WGMMA_S8_FUNCTIONS(8, 32, 64)
WGMMA_S8_FUNCTIONS(16, 64, 128)

/* d = a b (+ d), 16 bits: 64 x 16, 64 or 128 x 16; both have their 16 side by side, as above. */
#define WGMMA_QK(n, columns, type, add, c)                                                         \
    asm volatile("{\n"                                                                             \
                 ".reg .pred add;\n"                                                               \
                 "setp.ne.b32 add, 0, " #add ";\n"                                                 \
                 "wgmma.mma_async.sync.aligned.m64n" #columns "k16.f32." type "." type             \
                 " {" WGMMA_##n "}, " WGMMA_AB_##n "add, 1, 1, 0, 0;\n"                            \
                                                   "}"                                             \
                 : WGMMA_REGS_##n(c)                                                               \
                 : "l"(a), "l"(b))
#define WGMMA_QK_FUNCTION(tiles, n, columns)                                                       \
    template <bool BF16, bool ADD>                                                                 \
    __device__ __forceinline__ void wgmma_16(float(&d)[tiles][4], uint64_t a, uint64_t b)          \
    {                                                                                              \
        if constexpr (BF16 && ADD)                                                                 \
            WGMMA_QK(n, columns, "bf16", 1, "+f");                                                 \
        else if constexpr (BF16)                                                                   \
            WGMMA_QK(n, columns, "bf16", 0, "=f");                                                 \
        else if constexpr (ADD)                                                                    \
            WGMMA_QK(n, columns, "f16", 1, "+f");                                                  \
        else                                                                                       \
            WGMMA_QK(n, columns, "f16", 0, "=f");                                                  \
    }
WGMMA_QK_FUNCTION(8, 32, 64)
WGMMA_QK_FUNCTION(16, 64, 128)

/*
 * d = a b (+ d), 64 x 64, 72, 128 or 136; a in registers. 16 bits: a is 64 x 16, b transposed: it
 * has its columns side by side. e4m3: a is 64 x 32, b has its 32 side by side.
 */
#define WGMMA_A_32 "{%32, %33, %34, %35}, %36, "
#define WGMMA_A_36 "{%36, %37, %38, %39}, %40, "
#define WGMMA_A_64 "{%64, %65, %66, %67}, %68, "
#define WGMMA_A_68 "{%68, %69, %70, %71}, %72, "
#define WGMMA_PV(shape, n, add, c, signs)                                                          \
    asm volatile("{\n"                                                                             \
                 ".reg .pred add;\n"                                                               \
                 "setp.ne.b32 add, 0, " #add ";\n"                                                 \
                 "wgmma.mma_async.sync.aligned." shape " {" WGMMA_##n "}, " WGMMA_A_##n            \
                 "add, " signs ";\n"                                                               \
                 "}"                                                                               \
                 : WGMMA_REGS_##n(c)                                                               \
                 : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "l"(b))
#define WGMMA_PV_FUNCTIONS(tiles, n, columns)                                                      \
    template <bool BF16>                                                                           \
    __device__ __forceinline__ void wgmma_16_add(float(&d)[tiles][4], const uint32_t(&a)[4],       \
                                                 uint64_t b)                                       \
    {                                                                                              \
        if constexpr (BF16)                                                                        \
            WGMMA_PV("m64n" #columns "k16.f32.bf16.bf16", n, 1, "+f", "1, 1, 1");                  \
        else                                                                                       \
            WGMMA_PV("m64n" #columns "k16.f32.f16.f16", n, 1, "+f", "1, 1, 1");                    \
    }                                                                                              \
    __device__ __forceinline__ void wgmma_e4m3(float(&d)[tiles][4], const uint32_t(&a)[4],         \
                                               uint64_t b)                                         \
    {                                                                                              \
        WGMMA_PV("m64n" #columns "k32.f32.e4m3.e4m3", n, 0, "=f", "1, 1");                         \
    }                                                                                              \
    __device__ __forceinline__ void wgmma_e4m3_add(float(&d)[tiles][4], const uint32_t(&a)[4],     \
                                                   uint64_t b)                                     \
    {                                                                                              \
        WGMMA_PV("m64n" #columns "k32.f32.e4m3.e4m3", n, 1, "+f", "1, 1");                         \
    }
WGMMA_PV_FUNCTIONS(8, 32, 64)
WGMMA_PV_FUNCTIONS(9, 36, 72)
WGMMA_PV_FUNCTIONS(16, 64, 128)
WGMMA_PV_FUNCTIONS(17, 68, 136)

/* Registers of the threads of this warpgroup: of those that it was started with, 8 at a time. */
template <int N> __device__ __forceinline__ void registers_more()
{
    asm volatile("setmaxnreg.inc.sync.aligned.u32 %0;" ::"n"(N));
}

template <int N> __device__ __forceinline__ void registers_less()
{
    asm volatile("setmaxnreg.dec.sync.aligned.u32 %0;" ::"n"(N));
}

} // namespace sage

#endif
