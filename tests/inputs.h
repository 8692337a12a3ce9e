/*
 * inputs.h - random attention inputs: the distributions on which accuracy is stated.
 */
#ifndef SAGE_INPUTS_H
#define SAGE_INPUTS_H

#include "sageattn.h"

/* A seeded generator (splitmix64) of uniform and normal numbers. */
struct rng {
    uint64_t state;
    double spare;
    bool has_spare;
};

void rng_init(struct rng *rng, uint64_t seed);
uint64_t rng_bits(struct rng *rng);
/* 0 <= x < n */
int64_t rng_below(struct rng *rng, int64_t n);
/* [0, 1) */
double rng_uniform(struct rng *rng);
double rng_normal(struct rng *rng);

/* The seed in $SAGE_TEST_SEED, or a fresh one; printed, so that a failure can be repeated. */
uint64_t test_seed(void);

/* X(name, peers, what): peers: is it among those of which peers' errors are on record? */
#define INPUTS(X)                                                                                  \
    X(NORMAL, normal, true, "N(0,1)")                                                              \
    X(UNIFORM, uniform, true, "U(-1,1)")                                                           \
    X(KBIAS, kbias, true, "q*2, k + one N(0,8) offset per channel")                                \
    X(OUTLIER, outlier, true, "each 17th q channel *6, k channel +12; each 13th v *5")             \
    X(PEAKY, peaky, true, "q*3, k*3: sharp softmax")                                               \
    X(VBIAS, vbias, true, "v + one N(0,3) offset per channel")                                     \
    X(HEAVY, heavy, false, "k Student t, 3 degrees of freedom")                                    \
    X(RARE, rare, false, "q, k, v N(0,1) + N(0,100) * Bernoulli(0.001)")                           \
    X(SINK, sink, false, "one key 10 nats above the rest")                                         \
    X(VOFFSET, voffset, false, "v + one offset of 8 to 9 per channel")

enum inputs {
#define INPUTS_ENUM(NAME, name, peers, what) IN_##NAME,
    INPUTS(INPUTS_ENUM)
#undef INPUTS_ENUM
        N_INPUTS_KINDS
};

const char *inputs_name(enum inputs kind);
const char *inputs_what(enum inputs kind);
bool inputs_have_peers(enum inputs kind);

/*
 * Number i of what accuracy is stated of: sets the variant and what is done to q, k and v before,
 * and returns a name of the latter; NULL behind the last.
 */
const char *accuracy_setting(int i, struct sage_attn *attn);

/* Write x as element i of an array of F16 or BF16, rounded to nearest even from double. */
void put_half(void *array, int64_t i, enum sage_dtype dtype, double x);

/* Fill q [h, n, d] and k, v [h, n, d] (contiguous, dtype F16 or BF16) with one distribution. */
void make_inputs(struct rng *rng, enum inputs kind, enum sage_dtype dtype, int64_t h, int64_t n,
                 int64_t d, void *q, void *k, void *v);

#endif
