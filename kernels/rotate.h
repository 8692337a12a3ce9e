/*
 * rotate.h - what rotate_qk does to q and k, on CPU and GPU alike: additions in one order, so that
 * the numbers are the same, bit by bit.
 */
#ifndef SAGE_ROTATE_H
#define SAGE_ROTATE_H

#ifdef __CUDACC__
#define ROTATE_INLINE __host__ __device__ __forceinline__
#else
#define ROTATE_INLINE static inline
#endif

/* Of products of q and k, for the matrix is not normalised: Q's scales have it. */
#define ROTATE_SCALE 0.125f

/* Eight channels times the Hadamard matrix of entries 1 and -1. */
ROTATE_INLINE void rotate_8(float *x)
{
    for (int step = 1; step < 8; step *= 2)
        for (int i = 0; i < 8; i++)
            if (!(i & step)) {
                const float a = x[i], b = x[i + step];

                x[i] = a + b;
                x[i + step] = a - b;
            }
}

#endif
