/*
 * numerics.h - what CPU and GPU do alike, number by number: which keys share a scale, what is
 * not quantised, what counts as zero, of which keys K's mean is, and what rotate_qk does.
 */
#ifndef SAGE_NUMERICS_H
#define SAGE_NUMERICS_H

#include <stdint.h>

#ifdef __CUDACC__
#define NUMERICS_INLINE __host__ __device__ __forceinline__
#else
#define NUMERICS_INLINE static inline
#endif

/*
 * Of each run of keys, those with the same (key / 2) % 4 share a scale: of 16 keys four, which are
 * the columns that one thread holds of a tensor core's 16 x 16 accumulator. So to a GPU thread this
 * is one scale for a run, as cheap as one for all its keys, and the error of S's K part is that of
 * a group of 4 (0.94 of a group of 16 on normal inputs, together with Q's part). With P V in e4m3,
 * which has most of the error, twice as many: a GPU thread has less to do.
 */
#define K_RUN(fp8) ((fp8) ? 32 : 16)

/*
 * Up to so many rows of all query heads of a kv head nothing is quantised: reading K and V is what
 * takes the time then. This follows from the whole problem, so parts are computed alike.
 */
#define FEW_ROWS 64

/* Magnitudes below count as zero: 256 divided by this is still finite. */
#define QUANT_MIN 0x1p-117f

/* --- K's mean ---
 *
 * Whatever vector is taken from all keys of a sequence, softmax stays the same: it need not be the
 * mean of all of them, only near it. So of more than SAMPLE_ALL keys one of each stratum of 4 to 64
 * is looked at, 1,024 or more: which one differs from stratum to stratum, so that nothing periodic
 * is seen at one phase.
 */
enum { SAMPLE_ALL = 4096, SAMPLE_BITS = 6 };

/* A stratum of a sequence of nk keys is 2^this; there are nk >> this, the last keys are in none. */
NUMERICS_INLINE int sample_shift(int64_t nk)
{
    int shift = 2;

    if (nk <= SAMPLE_ALL)
        return 0;
    while (shift < SAMPLE_BITS && nk >> (shift + 11))
        shift++;
    return shift;
}

/* The key of stratum i: it is where i times the golden ratio is between two whole numbers. */
NUMERICS_INLINE int64_t sample_key(int64_t i, int shift)
{
    const uint32_t place = (uint32_t)i * 0x9e3779b9u;

    return (i << shift) + (place >> (32 - SAMPLE_BITS) >> (SAMPLE_BITS - shift));
}

/* --- rotate_qk: additions in one order, so that the numbers are the same, bit by bit --- */

/* Of products of q and k, for the matrix is not normalised: Q's scales have it. */
#define ROTATE_SCALE 0.125f

/* Eight channels times the Hadamard matrix of entries 1 and -1. */
NUMERICS_INLINE void rotate_8(float *x)
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
