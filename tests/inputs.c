/*
 * inputs.c - random attention inputs.
 */
#include "inputs.h"

#include <math.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <time.h>
#include <unistd.h>

void rng_init(struct rng *rng, uint64_t seed)
{
    *rng = (struct rng){.state = seed};
}

/* splitmix64: Steele, Lea, Flood, "Fast splittable pseudorandom number generators", 2014. */
uint64_t rng_bits(struct rng *rng)
{
    uint64_t z = rng->state += 0x9e3779b97f4a7c15;

    z = (z ^ z >> 30) * 0xbf58476d1ce4e5b9;
    z = (z ^ z >> 27) * 0x94d049bb133111eb;
    return z ^ z >> 31;
}

int64_t rng_below(struct rng *rng, int64_t n)
{
    return (int64_t)(rng_bits(rng) % (uint64_t)n);
}

double rng_uniform(struct rng *rng)
{
    return (double)(rng_bits(rng) >> 11) * 0x1p-53;
}

/* Box and Muller, 1958. */
double rng_normal(struct rng *rng)
{
    if (rng->has_spare) {
        rng->has_spare = false;
        return rng->spare;
    }
    const double r = sqrt(-2 * log(1 - rng_uniform(rng))), a = 2 * M_PI * rng_uniform(rng);

    rng->spare = r * sin(a);
    rng->has_spare = true;
    return r * cos(a);
}

uint64_t test_seed(void)
{
    const char *given = getenv("SAGE_TEST_SEED");
    struct timespec now;
    uint64_t seed;

    clock_gettime(CLOCK_REALTIME, &now);
    seed = given ? strtoull(given, NULL, 0)
                 : ((uint64_t)now.tv_sec << 20 ^ (uint64_t)now.tv_nsec ^ (uint64_t)getpid() << 44);
    printf("SAGE_TEST_SEED=%llu\n", (unsigned long long)seed);
    fflush(stdout);
    return seed;
}

static const struct {
    const char *name, *what;
    bool peers;
} kinds[] = {
#define INPUTS_ROW(NAME, name, peers, what) {#name, what, peers},
    INPUTS(INPUTS_ROW)
#undef INPUTS_ROW
};

const char *inputs_name(enum inputs kind)
{
    return kinds[kind].name;
}

const char *inputs_what(enum inputs kind)
{
    return kinds[kind].what;
}

bool inputs_have_peers(enum inputs kind)
{
    return kinds[kind].peers;
}

/* Nearest number with `bits` of mantissa and exponents from `min` to `max`; Inf beyond. */
static uint16_t round_small(double x, int bits, int min, int max)
{
    const uint16_t sign = signbit(x) ? 0x8000 : 0;
    const uint16_t inf = (uint16_t)((max - min + 2) << bits);
    int exponent;

    x = fabs(x);
    if (isnan(x))
        return sign | inf | 1 << (bits - 1);
    frexp(x, &exponent);
    exponent = x == 0 || exponent - 1 < min ? min : exponent - 1;
    if (isinf(x) || exponent > max)
        return sign | inf;
    /* in steps of the last bit; 2^bits of them are the hidden one, absent below 2^min */
    const int64_t steps = llrint(ldexp(x, bits - exponent));
    const int64_t code = ((int64_t)(exponent - min) << bits) + steps;

    return (uint16_t)(sign | (code > inf ? inf : code));
}

void put_half(void *array, int64_t i, enum sage_dtype dtype, double x)
{
    ((uint16_t *)array)[i] =
        dtype == SAGE_F16 ? round_small(x, 10, -14, 15) : round_small(x, 7, -126, 127);
}

/* Student's t with 3 degrees of freedom: normal over the root of a chi square's mean. */
static double student3(struct rng *rng)
{
    double chi2 = 0, x;

    for (int i = 0; i < 3; i++) {
        x = rng_normal(rng);
        chi2 += x * x;
    }
    return rng_normal(rng) / sqrt(chi2 / 3);
}

static double rare(struct rng *rng)
{
    return rng_normal(rng) + (rng_uniform(rng) < 0.001 ? 10 * rng_normal(rng) : 0);
}

/* What the channels of one head have in common. */
struct channel {
    double k, v;
};

/* Element c of a row of q, k and v. */
static void element(struct rng *rng, enum inputs kind, int64_t c, const struct channel *ch,
                    double x[3])
{
    for (int i = 0; i < 3; i++)
        x[i] = kind == IN_UNIFORM ? 2 * rng_uniform(rng) - 1
               : kind == IN_RARE  ? rare(rng)
                                  : rng_normal(rng);
    if (kind == IN_KBIAS)
        x[0] *= 2;
    if (kind == IN_OUTLIER && c % 17 == 0)
        x[0] *= 6;
    if (kind == IN_OUTLIER && c % 13 == 0)
        x[2] *= 5;
    if (kind == IN_PEAKY) {
        x[0] *= 3;
        x[1] *= 3;
    }
    if (kind == IN_HEAVY)
        x[1] = student3(rng);
    if (kind == IN_SINK && c == 0) /* a channel of its own; the sink's key answers it */
        x[0] = 8;
    x[1] += ch->k;
    x[2] += ch->v;
}

static void channels(struct rng *rng, enum inputs kind, int64_t d, struct channel *ch)
{
    for (int64_t c = 0; c < d; c++) {
        ch[c] = (struct channel){0, 0};
        if (kind == IN_KBIAS)
            ch[c].k = 8 * rng_normal(rng);
        if (kind == IN_OUTLIER && c % 17 == 0)
            ch[c].k = 12;
        if (kind == IN_VBIAS)
            ch[c].v = 3 * rng_normal(rng);
        if (kind == IN_VOFFSET)
            ch[c].v = 8 + rng_uniform(rng);
    }
}

const char *accuracy_setting(int i, struct sage_attn *attn)
{
    static const struct {
        enum sage_variant variant;
        bool smooth_k, smooth_v, rotate_qk;
        const char *name;
    } rows[] = {
        {SAGE_INT8_FP16, true, false, false, "k"},
        {SAGE_INT8_FP16, true, false, true, "k, rotated"},
        {SAGE_INT8_FP16, false, false, false, "none"},
        {SAGE_INT8_FP8, true, false, false, "k"},
        {SAGE_INT8_FP8, true, false, true, "k, rotated"},
        {SAGE_INT8_FP8, false, false, false, "none"},
        {SAGE_INT8_FP8, true, true, false, "k+v"},
    };

    if (i >= (int)(sizeof rows / sizeof rows[0]))
        return NULL;
    attn->variant = rows[i].variant;
    attn->smooth_k = rows[i].smooth_k;
    attn->smooth_v = rows[i].smooth_v;
    attn->rotate_qk = rows[i].rotate_qk;
    return rows[i].name;
}

void make_inputs(struct rng *rng, enum inputs kind, enum sage_dtype dtype, int64_t h, int64_t n,
                 int64_t d, void *q, void *k, void *v)
{
    struct channel ch[SAGE_MAX_HEAD_DIM];

    for (int64_t head = 0; head < h; head++) {
        channels(rng, kind, d, ch);
        for (int64_t row = 0; row < n; row++)
            for (int64_t c = 0; c < d; c++) {
                const int64_t at = (head * n + row) * d + c;
                double x[3];

                element(rng, kind, c, &ch[c], x);
                if (kind == IN_SINK && c == 0) /* 8 * k / sqrt(d) is 10 nats */
                    x[1] = row == 0 ? 10 * sqrt((double)d) / 8 : 0;
                put_half(q, at, dtype, x[0]);
                put_half(k, at, dtype, x[1]);
                put_half(v, at, dtype, x[2]);
            }
    }
}
