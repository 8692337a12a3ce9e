/*
 * sample.h - the keys whose mean is taken from K, on CPU and GPU alike. Whatever vector is taken
 * from all keys of a sequence, softmax stays the same: it need not be the mean of all of them, only
 * near it. So of more than SAMPLE_ALL keys one of each stratum of 4 to 64 is looked at, 1,024 or
 * more: which one differs from stratum to stratum, so that nothing periodic is seen at one phase.
 */
#ifndef SAGE_SAMPLE_H
#define SAGE_SAMPLE_H

#include <stdint.h>

#ifdef __CUDACC__
#define SAMPLE_INLINE __host__ __device__ __forceinline__
#else
#define SAMPLE_INLINE static inline
#endif

enum { SAMPLE_ALL = 4096, SAMPLE_BITS = 6 };

/* A stratum of a sequence of nk keys is 2^this; there are nk >> this, the last keys are in none. */
SAMPLE_INLINE int sample_shift(int64_t nk)
{
    int shift = 2;

    if (nk <= SAMPLE_ALL)
        return 0;
    while (shift < SAMPLE_BITS && nk >> (shift + 11))
        shift++;
    return shift;
}

/* The key of stratum i: it is where i times the golden ratio is between two whole numbers. */
SAMPLE_INLINE int64_t sample_key(int64_t i, int shift)
{
    const uint32_t place = (uint32_t)i * 0x9e3779b9u;

    return (i << shift) + (place >> (32 - SAMPLE_BITS) >> (SAMPLE_BITS - shift));
}

#endif
