/*
 * ref64.c - attention in double precision.
 */
#include "ref64.h"

#include <float.h>
#include <math.h>
#include <pthread.h>
#include <stdlib.h>
#include <string.h>

/* Sign, exponent and mantissa of a 16-bit float by the book. */
static double small_float(uint16_t h, int mantissa_bits)
{
    const int exponent_bits = 15 - mantissa_bits, bias = (1 << (exponent_bits - 1)) - 1;
    const int mantissa = h & ((1 << mantissa_bits) - 1);
    const int exponent = h >> mantissa_bits & ((1 << exponent_bits) - 1);
    double x;

    if (exponent == (1 << exponent_bits) - 1)
        x = mantissa ? NAN : INFINITY;
    else if (exponent == 0)
        x = ldexp(mantissa, 1 - bias - mantissa_bits);
    else
        x = ldexp(mantissa + (1 << mantissa_bits), exponent - bias - mantissa_bits);
    return h & 0x8000 ? -x : x;
}

/* The values of all 16-bit floats: looking them up is ten times as fast. */
static double tables[2][65536];

static void make_tables(void)
{
    for (int i = 0; i < 65536; i++) {
        tables[0][i] = small_float((uint16_t)i, 10);
        tables[1][i] = small_float((uint16_t)i, 7);
    }
}

static const double *table(enum sage_dtype dtype)
{
    static pthread_once_t made = PTHREAD_ONCE_INIT;

    pthread_once(&made, make_tables);
    return tables[dtype == SAGE_BF16];
}

double ref64_get(const struct sage_tensor *t, int64_t a, int64_t b, int64_t c, int64_t d)
{
    const int64_t at = a * t->stride[0] + b * t->stride[1] + c * t->stride[2] + d;
    const char *base = (const char *)t->data + t->offset;

    switch (t->dtype) {
    case SAGE_F16:
    case SAGE_BF16:
        return table(t->dtype)[((const uint16_t *)base)[at]];
    case SAGE_F32:
        return (double)((const float *)base)[at];
    case SAGE_BOOL:
        return base[at] != 0;
    case SAGE_NONE:
        break;
    }
    abort();
}

bool ref64_sees(const struct sage_attn *attn, int64_t nq, int64_t nk, int64_t i, int64_t j)
{
    const int64_t d = attn->diagonal == SAGE_TOP_LEFT ? i : i + nk - nq;

    if (attn->causal && j > d)
        return false;
    if (attn->window_left != SAGE_UNLIMITED && d - j > attn->window_left)
        return false;
    return attn->window_right == SAGE_UNLIMITED || j - d <= attn->window_right;
}

/* A large finite number stays finite in base 2, and ends there at binary32's range. */
static double mask_of(const struct sage_attn *attn, int64_t b, int64_t h, int64_t i, int64_t j)
{
    const int64_t *shape = attn->mask.shape;
    const double lowest = -FLT_MAX * M_LN2;
    double x;

    if (attn->mask.dtype == SAGE_NONE)
        return 0;
    x = ref64_get(&attn->mask, shape[0] == 1 ? 0 : b, shape[1] == 1 ? 0 : h, shape[2] == 1 ? 0 : i,
                  j);
    if (attn->mask.dtype == SAGE_BOOL)
        return x != 0 ? 0 : -INFINITY;
    return x < lowest && isfinite(x) ? lowest : x;
}

double ref64_row(const struct sage_attn *attn, int64_t b, int64_t head, int64_t row, double *o)
{
    const int32_t *qo = attn->q_offsets, *ko = attn->k_offsets;
    const bool varlen = attn->n_seqs > 0;
    const int64_t d = attn->q.shape[3], kv = head / (attn->q.shape[1] / attn->k.shape[1]);
    const int64_t q0 = varlen ? qo[b] : 0, nq = varlen ? qo[b + 1] - q0 : attn->q.shape[2];
    const int64_t k0 = varlen ? ko[b] : 0, nk = varlen ? ko[b + 1] - k0 : attn->k.shape[2];
    const int64_t batch = varlen ? 0 : b;
    const double scale = attn->scale > 0 ? (double)attn->scale : 1 / sqrt((double)d);
    double *q = malloc(sizeof *q * (size_t)d), *s = malloc(sizeof *s * (size_t)(nk + 1));
    double max = -INFINITY, sum = 0;

    memset(o, 0, sizeof *o * (size_t)d);
    for (int64_t x = 0; x < d; x++)
        q[x] = ref64_get(&attn->q, batch, head, q0 + row, x);
    for (int64_t j = 0; j < nk; j++) {
        const double bias = mask_of(attn, batch, head, row, j);
        double dot = 0;

        s[j] = -INFINITY;
        if (!ref64_sees(attn, nq, nk, row, j) || bias == -INFINITY)
            continue;

        for (int64_t x = 0; x < d; x++)
            dot += q[x] * ref64_get(&attn->k, batch, kv, k0 + j, x);
        s[j] = dot * scale + bias;
        max = s[j] > max || isnan(s[j]) ? s[j] : max; /* a NaN stays */
    }
    for (int64_t j = 0; j < nk && max != -INFINITY; j++) {
        const double p = exp(s[j] - max);

        sum += p;
        if (s[j] == -INFINITY)
            continue;
        for (int64_t x = 0; x < d; x++)
            o[x] += p * ref64_get(&attn->v, batch, kv, k0 + j, x);
    }
    for (int64_t x = 0; x < d && sum != 0; x++)
        o[x] /= sum;
    free(q);
    free(s);
    return max == -INFINITY ? -INFINITY : max + log(sum);
}

void ref64_compare(struct ref64_error *e, const double *o, const double *r, int64_t n)
{
    for (int64_t i = 0; i < n; i++) {
        e->oo += o[i] * o[i];
        e->rr += r[i] * r[i];
        e->or += o[i] * r[i];
        e->abs_diff += fabs(o[i] - r[i]);
        e->abs_r += fabs(r[i]);
        e->diff2 += (o[i] - r[i]) * (o[i] - r[i]);
    }
}

double ref64_cos(const struct ref64_error *e)
{
    return e->or / sqrt(e->oo * e->rr);
}

double ref64_l1(const struct ref64_error *e)
{
    return e->abs_diff / e->abs_r;
}

double ref64_l2(const struct ref64_error *e)
{
    return sqrt(e->diff2 / e->rr);
}
