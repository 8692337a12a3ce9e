/*
 * cuda_mma.cuh - the PTX that CUDA C++ has no name for: tensor cores from sm_80 on, their operands
 * from shared memory, asynchronous copies. Fragment layouts: PTX ISA, "Matrix Fragments for
 * mma.m16n8k16, m16n8k32"; in all of them lane l holds rows l/4 and l/4 + 8 of A and C, columns
 * 2 * (l%4) and the next of C, and column l/4 of B.
 */
#ifndef SAGE_CUDA_MMA_CUH
#define SAGE_CUDA_MMA_CUH

#include <cuda_bf16.h>
#include <cuda_fp16.h>
#include <stdint.h>

#include "cuda_args.h"

namespace sage
{

__device__ __forceinline__ uint32_t shared_address(const void *p)
{
    return static_cast<uint32_t>(__cvta_generic_to_shared(p));
}

/* Four 8 x 16-byte matrices; lane l gives the address of row l%8 of matrix l/8. */
__device__ __forceinline__ void ldmatrix(uint32_t (&r)[4], uint32_t address)
{
    asm volatile("ldmatrix.sync.aligned.m8n8.x4.shared.b16 {%0, %1, %2, %3}, [%4];"
                 : "=r"(r[0]), "=r"(r[1]), "=r"(r[2]), "=r"(r[3])
                 : "r"(address));
}

/* The same, each matrix of 16-bit elements transposed. */
__device__ __forceinline__ void ldmatrix_trans(uint32_t (&r)[4], uint32_t address)
{
    asm volatile("ldmatrix.sync.aligned.m8n8.x4.trans.shared.b16 {%0, %1, %2, %3}, [%4];"
                 : "=r"(r[0]), "=r"(r[1]), "=r"(r[2]), "=r"(r[3])
                 : "r"(address));
}

/* The other way round; sm_90. */
__device__ __forceinline__ void stmatrix(uint32_t address, const uint32_t (&r)[4])
{
    asm volatile("stmatrix.sync.aligned.m8n8.x4.shared.b16 [%0], {%1, %2, %3, %4};" ::"r"(address),
                 "r"(r[0]), "r"(r[1]), "r"(r[2]), "r"(r[3])
                 : "memory");
}

/* d = a b + c, INT8 with 32-bit sums: a 16 x 32, b 32 x 8. */
__device__ __forceinline__ void mma_s8(int (&d)[4], const uint32_t (&a)[4], uint32_t b0,
                                       uint32_t b1, const int *c)
{
    asm volatile("mma.sync.aligned.m16n8k32.row.col.s32.s8.s8.s32 "
                 "{%0, %1, %2, %3}, {%4, %5, %6, %7}, {%8, %9}, {%10, %11, %12, %13};"
                 : "=r"(d[0]), "=r"(d[1]), "=r"(d[2]), "=r"(d[3])
                 : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b0), "r"(b1), "r"(c[0]),
                   "r"(c[1]), "r"(c[2]), "r"(c[3]));
}

/* c += a b, binary16 or bfloat16 with binary32 sums: a 16 x 16, b 16 x 8. */
template <bool BF16>
__device__ __forceinline__ void mma_16(float (&c)[4], const uint32_t (&a)[4], uint32_t b0,
                                       uint32_t b1)
{
    if constexpr (BF16)
        asm volatile("mma.sync.aligned.m16n8k16.row.col.f32.bf16.bf16.f32 "
                     "{%0, %1, %2, %3}, {%4, %5, %6, %7}, {%8, %9}, {%0, %1, %2, %3};"
                     : "+f"(c[0]), "+f"(c[1]), "+f"(c[2]), "+f"(c[3])
                     : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b0), "r"(b1));
    else
        asm volatile("mma.sync.aligned.m16n8k16.row.col.f32.f16.f16.f32 "
                     "{%0, %1, %2, %3}, {%4, %5, %6, %7}, {%8, %9}, {%0, %1, %2, %3};"
                     : "+f"(c[0]), "+f"(c[1]), "+f"(c[2]), "+f"(c[3])
                     : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b0), "r"(b1));
}

/* c += a b, e4m3: a 16 x 32, b 32 x 8. Sums keep about 13 bits: few terms at a time. sm_89 on. */
__device__ __forceinline__ void mma_e4m3(float (&c)[4], const uint32_t (&a)[4], uint32_t b0,
                                         uint32_t b1)
{
#if __CUDA_ARCH__ >= 890
    asm volatile("mma.sync.aligned.m16n8k32.row.col.f32.e4m3.e4m3.f32 "
                 "{%0, %1, %2, %3}, {%4, %5, %6, %7}, {%8, %9}, {%0, %1, %2, %3};"
                 : "+f"(c[0]), "+f"(c[1]), "+f"(c[2]), "+f"(c[3])
                 : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b0), "r"(b1));
#endif
}

/* The larger and the smaller one; NaN if either is. */
__device__ __forceinline__ float max_nan(float x, float y)
{
    float r;

    asm("max.NaN.f32 %0, %1, %2;" : "=f"(r) : "f"(x), "f"(y));
    return r;
}

__device__ __forceinline__ float min_nan(float x, float y)
{
    float r;

    asm("min.NaN.f32 %0, %1, %2;" : "=f"(r) : "f"(x), "f"(y));
    return r;
}

/* Two 16-bit numbers in a word, as CUDA's own functions take them, and back. */
template <bool BF16> __device__ __forceinline__ auto pair_of(uint32_t word)
{
    if constexpr (BF16)
        return *reinterpret_cast<const __nv_bfloat162 *>(&word);
    else
        return *reinterpret_cast<const __half2 *>(&word);
}

template <typename Pair> __device__ __forceinline__ uint32_t word_of(Pair pair)
{
    return *reinterpret_cast<const uint32_t *>(&pair);
}

/* max_nan() and min_nan() of each of two 16-bit numbers. */
template <bool BF16> __device__ __forceinline__ uint32_t max_nan_2(uint32_t x, uint32_t y)
{
    return word_of(__hmax2_nan(pair_of<BF16>(x), pair_of<BF16>(y)));
}

template <bool BF16> __device__ __forceinline__ uint32_t min_nan_2(uint32_t x, uint32_t y)
{
    return word_of(__hmin2_nan(pair_of<BF16>(x), pair_of<BF16>(y)));
}

/* Two numbers to the 16-bit type, the first one below. */
template <bool BF16> __device__ __forceinline__ uint32_t pack_16(float low, float high)
{
    uint32_t r;

    if constexpr (BF16)
        asm("cvt.rn.bf16x2.f32 %0, %1, %2;" : "=r"(r) : "f"(high), "f"(low));
    else
        asm("cvt.rn.f16x2.f32 %0, %1, %2;" : "=r"(r) : "f"(high), "f"(low));
    return r;
}

/* The same, beyond the type's range to its largest number; NaN to NaN. */
template <bool BF16> __device__ __forceinline__ uint32_t pack_finite_16(float low, float high)
{
    uint32_t r;

    if constexpr (BF16)
        asm("cvt.rn.satfinite.bf16x2.f32 %0, %1, %2;" : "=r"(r) : "f"(high), "f"(low));
    else
        asm("cvt.rn.satfinite.f16x2.f32 %0, %1, %2;" : "=r"(r) : "f"(high), "f"(low));
    return r;
}

/* Two numbers of 16 bits, Inf to NaN. */
template <bool BF16> __device__ __forceinline__ uint32_t inf_to_nan(uint32_t pair)
{
    uint32_t r;

    if constexpr (BF16)
        asm("fma.rn.bf16x2 %0, %1, %2, %1;" : "=r"(r) : "r"(pair), "r"(0));
    else
        asm("fma.rn.f16x2 %0, %1, %2, %1;" : "=r"(r) : "r"(pair), "r"(0));
    return r;
}

/* Barrier `id` of a block, 1 to 15: wait for `threads` of it, whole warps. */
__device__ __forceinline__ void barrier_wait(int id, int threads)
{
    asm volatile("bar.sync %0, %1;" ::"r"(id), "r"(threads) : "memory");
}

/* Four numbers to e4m3, saturating at 448, NaN to NaN, the first one below. sm_89 on. */
__device__ __forceinline__ uint32_t pack_e4m3(float x0, float x1, float x2, float x3)
{
#if __CUDA_ARCH__ >= 890
    uint32_t r;

    asm("{\n"
        ".reg .b16 low, high;\n"
        "cvt.rn.satfinite.e4m3x2.f32 low, %2, %1;\n"
        "cvt.rn.satfinite.e4m3x2.f32 high, %4, %3;\n"
        "mov.b32 %0, {low, high};\n"
        "}"
        : "=r"(r)
        : "f"(x0), "f"(x1), "f"(x2), "f"(x3));
    return r;
#else
    return 0;
#endif
}

/*
 * 2^x, to 2 units in the last place; exact at whole numbers, 0 below -126. Volatile for its place
 * among the matrix products.
 */
__device__ __forceinline__ float exp2_fast(float x)
{
    float y;

    asm volatile("ex2.approx.ftz.f32 %0, %1;" : "=f"(y) : "f"(x));
    return y;
}

/* 1/x, to 1 unit in the last place; 0 for x from 2^126 on, +inf for x below 2^-126. */
__device__ __forceinline__ float reciprocal(float x)
{
    float y;

    asm("rcp.approx.ftz.f32 %0, %1;" : "=f"(y) : "f"(x));
    return y;
}

/* x/y, correctly rounded but for rare cases, for y from 2^-124 to 2^125; `up` is about 1/y. */
__device__ __forceinline__ float divide(float x, float y, float up)
{
    const float quotient = x * up;

    return fmaf(fmaf(-quotient, y, x), up, quotient);
}

/* 127 / amax for QUANT_MIN <= amax < Inf, and 0 for all others. */
__device__ __forceinline__ float quant_up(float amax)
{
    const float y = amax * 0x1p-7f;

    return amax > QUANT_MIN && amax <= 0x1.fffffep127f ? divide(127 / 128.0f, y, reciprocal(y)) : 0;
}

/* What one step of the integers stands for: amax / 127; NaN where amax is Inf or NaN. */
__device__ __forceinline__ float quant_step(float amax)
{
    return divide(amax, 127, 1 / 127.0f);
}

/*
 * Four floats times `up`, rounded as the CPU does it, to the nearest integers' lowest bytes: added
 * to 1.5 * 2^23 a small binary32 is rounded to a whole number, whose bits are its mantissa's.
 */
__device__ __forceinline__ uint32_t to_bytes(const float *x, float up)
{
    uint32_t n[4];

#pragma unroll
    for (int i = 0; i < 4; i++)
        n[i] = __float_as_uint(__fadd_rn(__fmul_rn(x[i], up), 12582912.0f));
    return __byte_perm(__byte_perm(n[0], n[1], 0x0040), __byte_perm(n[2], n[3], 0x0040), 0x5410);
}

/*
 * Four lanes, the first a multiple of 4, have a word each of four rows; afterwards each has all
 * words of the row of its number. In two steps, between lanes two apart, then one.
 */
__device__ __forceinline__ uint4 transpose_quad(const uint32_t (&w)[4])
{
    const bool high = threadIdx.x & 2, odd = threadIdx.x & 1;
    const uint32_t x0 = __shfl_xor_sync(~0u, high ? w[0] : w[2], 2);
    const uint32_t x1 = __shfl_xor_sync(~0u, high ? w[1] : w[3], 2);
    /* of two rows, the words of lanes 0 and 2, or 1 and 3 */
    const uint32_t even_row[2] = {high ? x0 : w[0], high ? w[2] : x0};
    const uint32_t odd_row[2] = {high ? x1 : w[1], high ? w[3] : x1};
    const uint32_t y0 = __shfl_xor_sync(~0u, odd ? even_row[0] : odd_row[0], 1);
    const uint32_t y1 = __shfl_xor_sync(~0u, odd ? even_row[1] : odd_row[1], 1);

    return odd ? make_uint4(y0, odd_row[0], y1, odd_row[1])
               : make_uint4(even_row[0], y0, even_row[1], y1);
}

/* 16 bytes to shared memory, in the background; zeros if not `there`. */
__device__ __forceinline__ void copy_async(uint32_t to, const void *from, bool there)
{
    asm volatile("cp.async.cg.shared.global [%0], [%1], 16, %2;"
                 :
                 : "r"(to), "l"(from), "r"(there ? 16 : 0)
                 : "memory");
}

/* The same of lines that are wanted as a whole: the L2 cache fetches 128 bytes at a time. */
__device__ __forceinline__ void copy_line_async(uint32_t to, const void *from, bool there)
{
    asm volatile("cp.async.cg.shared.global.L2::128B [%0], [%1], 16, %2;"
                 :
                 : "r"(to), "l"(from), "r"(there ? 16 : 0)
                 : "memory");
}

__device__ __forceinline__ void copy_commit()
{
    asm volatile("cp.async.commit_group;" ::: "memory");
}

/* All but the last N groups of copies of this thread are done. */
template <int N> __device__ __forceinline__ void copy_wait()
{
    asm volatile("cp.async.wait_group %0;" : : "n"(N) : "memory");
}

/* Two 16-bit numbers as floats. */
template <bool BF16> __device__ __forceinline__ float2 unpack_pair(uint32_t pair)
{
    if constexpr (BF16)
        return make_float2(__uint_as_float(pair << 16), __uint_as_float(pair & 0xffff0000u));
    else
        return __half22float2(*reinterpret_cast<const __half2 *>(&pair));
}

/* Eight. */
template <bool BF16> __device__ __forceinline__ void unpack_16(float *x, const uint4 &raw)
{
    const uint32_t words[4] = {raw.x, raw.y, raw.z, raw.w};

#pragma unroll
    for (int i = 0; i < 4; i++) {
        const float2 pair = unpack_pair<BF16>(words[i]);
        x[2 * i] = pair.x;
        x[2 * i + 1] = pair.y;
    }
}

/* Of two pairs of 16-bit numbers the larger magnitudes; NaN where there is one. */
template <bool BF16> __device__ __forceinline__ uint32_t max_abs_16(uint32_t x, uint32_t y)
{
    return word_of(__hmax2_nan(__habs2(pair_of<BF16>(x)), __habs2(pair_of<BF16>(y))));
}

template <bool BF16> __device__ __forceinline__ uint32_t max_abs_16(uint32_t x, const uint4 &eight)
{
    return max_abs_16<BF16>(max_abs_16<BF16>(max_abs_16<BF16>(x, eight.x), eight.y),
                            max_abs_16<BF16>(eight.z, eight.w));
}

/* The larger one of such a pair; not a finite number if one is NaN or Inf. */
template <bool BF16> __device__ __forceinline__ float larger_16(uint32_t pair)
{
    const float2 x = unpack_pair<BF16>(pair);

    return __uint_as_float(max(__float_as_uint(x.x), __float_as_uint(x.y)));
}

/* A barrier in shared memory counts this thread when the copies that it has begun are done. */
__device__ __forceinline__ void copy_arrive(uint32_t barrier)
{
    asm volatile("cp.async.mbarrier.arrive.noinc.shared.b64 [%0];" ::"r"(barrier) : "memory");
}

/* Eight 16-bit numbers of global memory: at once if `aligned` to 16 bytes, else one by one. */
__device__ __forceinline__ uint4 load_8(const char *p, bool aligned)
{
    if (aligned)
        return __ldg(reinterpret_cast<const uint4 *>(p));
    const uint16_t *h = reinterpret_cast<const uint16_t *>(p);
    uint32_t words[4];
#pragma unroll
    for (int i = 0; i < 4; i++)
        words[i] = __ldg(h + 2 * i) | static_cast<uint32_t>(__ldg(h + 2 * i + 1)) << 16;
    return make_uint4(words[0], words[1], words[2], words[3]);
}

/*
 * atomicAdd() in global memory. What this thread stored before, or others of its block before a
 * barrier, is there for whoever adds after it, and for their blocks behind another barrier.
 */
__device__ __forceinline__ unsigned long long add_and_fence(unsigned long long *to,
                                                            unsigned long long x)
{
    unsigned long long before;

    asm volatile("atom.acq_rel.gpu.global.add.u64 %0, [%1], %2;"
                 : "=l"(before)
                 : "l"(__cvta_generic_to_global(to)), "l"(x)
                 : "memory");
    return before;
}

/* Eight 16-bit numbers to global memory, likewise. */
__device__ __forceinline__ void store_8(char *p, const uint4 &x, bool aligned)
{
    if (aligned) {
        *reinterpret_cast<uint4 *>(p) = x;
        return;
    }
    const uint32_t words[4] = {x.x, x.y, x.z, x.w};
#pragma unroll
    for (int i = 0; i < 8; i++)
        reinterpret_cast<uint16_t *>(p)[i] = static_cast<uint16_t>(words[i / 2] >> i % 2 * 16);
}

} // namespace sage

#endif
