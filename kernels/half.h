/*
 * half.h - binary16 and bfloat16 to binary32 and back, and rounding to e4m3. To nearest, ties to
 * even; no branches, so that loops over them vectorise; right with subnormals flushed or not.
 */
#ifndef SAGE_HALF_H
#define SAGE_HALF_H

#include <stdint.h>
#include <string.h>

static inline uint32_t f32_bits(float x)
{
    uint32_t bits;

    memcpy(&bits, &x, sizeof bits);
    return bits;
}

static inline float f32_from_bits(uint32_t bits)
{
    float x;

    memcpy(&x, &bits, sizeof x);
    return x;
}

static inline float bf16_to_f32(uint16_t h)
{
    return f32_from_bits((uint32_t)h << 16);
}

/* Exponents move from bias 15 to bias 127: 112 more; 2^23 is one step of a binary32 exponent. */
static inline float f16_to_f32(uint16_t h)
{
    const uint32_t sign = (uint32_t)(h & 0x8000) << 16, a = (uint32_t)(h & 0x7fff) << 13;
    const uint32_t normal = a + (112u << 23);
    const uint32_t special = a + (224u << 23); /* Inf, NaN: exponent 31 becomes 255 */
    /* exponent 0 has no hidden bit: read it with one (exponent 1), and take 2^-14 off again */
    const uint32_t subnormal = f32_bits(f32_from_bits(a + (113u << 23)) - 0x1p-14f);

    return f32_from_bits(sign | (a < (1u << 23) ? subnormal : a >= (31u << 23) ? special : normal));
}

static inline uint16_t bf16_from_f32(float x)
{
    const uint32_t a = f32_bits(x) & 0x7fffffff, sign = f32_bits(x) >> 16 & 0x8000;
    const uint32_t rounded = (a + 0x7fff + (a >> 16 & 1)) >> 16;

    return (uint16_t)(sign | (a > 0x7f800000 ? 0x7fc0 : rounded));
}

static inline uint16_t f16_from_f32(float x)
{
    const uint32_t a = f32_bits(x) & 0x7fffffff, sign = f32_bits(x) >> 16 & 0x8000;
    const uint32_t normal = (a - (112u << 23) + 0xfff + (a >> 13 & 1)) >> 13;
    /* in [0.5, 1) a binary32's last bit is 2^-24, the smallest binary16: the sum rounds there */
    const uint32_t subnormal = f32_bits(f32_from_bits(a) + 0.5f) - f32_bits(0.5f);

    return (uint16_t)(sign | (a > 0x7f800000     ? 0x7e00    /* NaN */
                              : a >= 0x477ff000  ? 0x7c00    /* from 65520 on: Inf */
                              : a < (113u << 23) ? subnormal /* below 2^-14 */
                                                 : normal));
}

/*
 * To the nearest e4m3 (4 exponent bits, bias 7, 3 of mantissa, no Inf), saturating at its largest,
 * 448, as a float: all of them are bfloat16 numbers too. NaN stays NaN.
 */
static inline float e4m3_round(float x)
{
    const uint32_t a = f32_bits(x) & 0x7fffffff, sign = f32_bits(x) & 0x80000000;
    const float normal = f32_from_bits((a + 0x7ffff + (a >> 20 & 1)) & 0xfff00000);
    /* below 2^-6 the step is 2^-9, the last bit of a binary32 in [2^14, 2^15) */
    const float subnormal = (f32_from_bits(a) + 0x1p14f) - 0x1p14f;
    const float rounded = a < f32_bits(0x1p-6f) ? subnormal : normal;

    if (a > 0x7f800000)
        return x;
    return f32_from_bits(sign | f32_bits(rounded > 448 ? 448.0f : rounded));
}

#endif
