/*
 * gpu_problem.c - an attention problem in host memory between guards; random ones.
 */
#include <float.h>
#include <math.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

#include "gpu_attn.h"
#include "kernels/half.h"

/* --- images and tensors --- */

struct problem *problem_create(void)
{
    struct problem *p = calloc(1, sizeof *p);

    if (!p)
        return NULL;
    p->host = aligned_alloc(GUARD, ARENA);
    p->cpu = aligned_alloc(GUARD, ARENA);
    p->gpu = aligned_alloc(GUARD, ARENA);
    if (p->host && p->cpu && p->gpu)
        return p;
    problem_destroy(p);
    return NULL;
}

void problem_destroy(struct problem *p)
{
    free(p->host);
    free(p->cpu);
    free(p->gpu);
    free(p);
}

void problem_reset(struct problem *p, uint64_t seed)
{
    *p = (struct problem){.attn = SAGE_ATTN_INIT,
                          .host = p->host,
                          .cpu = p->cpu,
                          .gpu = p->gpu,
                          .spoil = {.which = -1}};
    rng_init(&p->rng, seed);
}

static void poison(char *at, size_t bytes)
{
    const uint16_t pattern = POISON;

    for (size_t i = 0; i + 1 < bytes; i += 2)
        memcpy(at + i, &pattern, 2);
}

/* Room between guards; its offset in the images. */
static size_t take_slot(struct problem *p, size_t bytes)
{
    const size_t start = p->used + GUARD, end = start + bytes + GUARD;

    p->slots[p->n_slots++] = (struct slot){.start = start, .bytes = bytes};
    if (p->n_slots == MAX_SLOTS || end + GUARD > ARENA) {
        fprintf(stderr, "gpu_attn: a problem is larger than its images\n");
        exit(1);
    }
    poison(p->host + p->used, (end - p->used + GUARD - 1) / GUARD * GUARD);
    p->used = (end + GUARD - 1) / GUARD * GUARD;
    return start;
}

static void set_strides(struct sage_tensor *t, enum layout layout)
{
    const int64_t b = t->shape[0], h = t->shape[1], n = t->shape[2], d = t->shape[3];
    const int64_t gap = layout == GAPS ? 3 : layout == PADDED ? 8 : 0;

    t->stride[3] = 1;
    if (layout == NHD) {
        t->stride[1] = d;
        t->stride[2] = h * d;
        t->stride[0] = n * h * d;
        return;
    }
    t->stride[2] = d + gap;
    t->stride[1] = n * t->stride[2] + (layout == GAPS ? 5 : gap);
    t->stride[0] = h * t->stride[1] + (layout == GAPS ? 1 : gap);
    if (layout == EXPANDED && b > 1) /* one batch that all read */
        t->stride[0] = 0;
    else if (layout == EXPANDED)
        t->stride[1] = 0;
}

struct sage_tensor problem_take(struct problem *p, enum sage_dtype dtype, enum layout layout,
                                int skew, int64_t b, int64_t h, int64_t n, int64_t d)
{
    struct sage_tensor t = {.dtype = dtype, .shape = {b, h, n, d}};
    int64_t bytes;

    set_strides(&t, layout);
    sage_tensor_bytes(&t, &bytes);
    t.offset = (uint64_t)skew * sage_dtype_size(dtype);
    t.data = p->host + take_slot(p, (size_t)bytes + t.offset);
    return t;
}

struct sage_tensor in_image(const struct problem *p, const struct sage_tensor *t, char *image)
{
    struct sage_tensor there = *t;

    if (t->dtype != SAGE_NONE)
        there.data = image + ((char *)t->data - p->host);
    return there;
}

struct sage_attn attn_in_image(const struct problem *p, char *image)
{
    struct sage_attn a = p->attn;

    a.q = in_image(p, &a.q, image);
    a.k = in_image(p, &a.k, image);
    a.v = in_image(p, &a.v, image);
    a.o = in_image(p, &a.o, image);
    a.mask = in_image(p, &a.mask, image);
    a.lse = in_image(p, &a.lse, image);
    return a;
}

static char *row_of(const struct sage_tensor *t, int64_t b, int64_t h, int64_t n)
{
    const int64_t at = b * t->stride[0] + h * t->stride[1] + n * t->stride[2];

    return (char *)t->data + t->offset + at * (int64_t)sage_dtype_size(t->dtype);
}

static void put_in_row(char *row, enum sage_dtype dtype, int64_t c, double x)
{
    if (dtype == SAGE_F16)
        ((uint16_t *)row)[c] = f16_from_f32((float)x);
    else if (dtype == SAGE_BF16)
        ((uint16_t *)row)[c] = bf16_from_f32((float)x);
    else if (dtype == SAGE_F32)
        ((float *)row)[c] = (float)x;
    else
        ((uint8_t *)row)[c] = (uint8_t)x;
}

void put(const struct sage_tensor *t, int64_t b, int64_t h, int64_t n, int64_t c, double x)
{
    put_in_row(row_of(t, b, h, n), t->dtype, c, x);
}

void put_all(const struct sage_tensor *t, double x)
{
    for (int64_t b = 0; b < t->shape[0]; b++)
        for (int64_t h = 0; h < t->shape[1]; h++)
            for (int64_t n = 0; n < t->shape[2]; n++)
                for (int64_t c = 0; c < t->shape[3]; c++)
                    put(t, b, h, n, c, x);
}

/* --- inputs --- */

/*
 * Numbers drawn once; rows of tensors begin at random places among them, for drawing each anew
 * takes more time than attention itself.
 */
enum { POOL = 1 << 20 };
static float normals[POOL + SAGE_MAX_HEAD_DIM], students[POOL + SAGE_MAX_HEAD_DIM];

static void make_pools(void)
{
    struct rng rng;

    if (normals[0] != 0)
        return;
    rng_init(&rng, 1);
    for (int i = 0; i < POOL; i++)
        normals[i] = (float)rng_normal(&rng);
    for (int i = 0; i < POOL; i++) {
        const float *x = normals + (i * 7) % (POOL - 4);
        const float chi2 = (x[1] * x[1] + x[2] * x[2] + x[3] * x[3]) / 3;

        students[i] = x[0] / sqrtf(chi2);
    }
    memcpy(normals + POOL, normals, sizeof(float) * SAGE_MAX_HEAD_DIM);
    memcpy(students + POOL, students, sizeof(float) * SAGE_MAX_HEAD_DIM);
}

/* x * spread[c] + offset[c], x from a pool. */
struct channels {
    float spread[SAGE_MAX_HEAD_DIM], offset[SAGE_MAX_HEAD_DIM];
};

static void fill_head(struct problem *p, const struct sage_tensor *t, int64_t b, int64_t h,
                      const float *pool, const struct channels *ch)
{
    for (int64_t n = 0; n < t->shape[2]; n++) {
        const float *x = pool + rng_below(&p->rng, POOL);
        char *row = row_of(t, b, h, n);

        for (int64_t c = 0; c < t->shape[3]; c++)
            put_in_row(row, t->dtype, c, (double)(x[c] * ch->spread[c] + ch->offset[c]));
    }
}

/* How channel c of a head is made; which: 0, 1, 2 for q, k, v. */
static void channel(struct problem *p, int which, int64_t h, int64_t c, float *spread,
                    float *offset)
{
    const bool f16 = p->attn.q.dtype == SAGE_F16;
    const double normal = rng_normal(&p->rng), uniform = rng_uniform(&p->rng);
    /* what q is multiplied by and k divided, so that scores stay what they are */
    const float far = f16 ? 100 : 1e10f;

    *spread = 1;
    *offset = 0;
    switch (p->kind) {
    case KIND_K_OFFSET:
        *spread = which == 0 ? 2 : 1;
        *offset = which == 1 ? 8 * (float)normal : 0;
        break;
    case KIND_OUTLIERS:
        *spread = which == 0 && c % 17 == 0 ? 6 : which == 2 && c % 13 == 0 ? 5 : 1;
        *offset = which == 1 && c % 17 == 0 ? 12 : 0;
        break;
    case KIND_PEAKY:
        *spread = which < 2 ? 3 : 1;
        break;
    case KIND_V_OFFSET:
        *offset = which == 2 ? 8 + (float)uniform : 0;
        break;
    case KIND_CONST_K:
        *spread = which == 1 || (which == 2 && c == 5) ? 0 : 1;
        *offset = which == 1 ? 3 + (float)normal : 0;
        break;
    case KIND_ONES:
        *spread = which == 2 ? 0 : 1;
        *offset = which == 2 ? 1 : 0;
        break;
    case KIND_HUGE_VALUES:
        *spread = which == 0 ? far : which == 1 ? 1 / far : f16 ? 1e4f : 1e30f;
        break;
    case KIND_TINY_VALUES:
        *spread = which == 0 ? 1 / far : which == 1 ? far : f16 ? 1e-4f : 1e-30f;
        break;
    case KIND_ZEROS:
        *spread = which == 0 || (which == 2 && h % 2) ? 0 : 1;
        break;
    default:
        break;
    }
}

static void fill(struct problem *p, int which, const struct sage_tensor *t)
{
    const float *pool = p->kind == KIND_HEAVY && which == 1 ? students : normals;
    struct channels ch;

    for (int64_t b = 0; b < t->shape[0]; b++)
        for (int64_t h = 0; h < t->shape[1]; h++) {
            for (int64_t c = 0; c < t->shape[3]; c++)
                channel(p, which, h, c, &ch.spread[c], &ch.offset[c]);
            fill_head(p, t, b, h, pool, &ch);
        }
}

/* A row of q or k before it becomes INT8: rotated by an orthogonal matrix, if it is to be. */
static void get_row(const struct problem *p, const struct sage_tensor *t, int64_t b, int64_t h,
                    int64_t n, double *x)
{
    const uint16_t *row = (const uint16_t *)row_of(t, b, h, n);
    double y[SAGE_MAX_HEAD_DIM];

    for (int64_t c = 0; c < t->shape[3]; c++)
        x[c] = y[c] = (double)(t->dtype == SAGE_F16 ? f16_to_f32(row[c]) : bf16_to_f32(row[c]));
    for (int64_t c = 0; p->attn.rotate_qk && c < t->shape[3]; c++) {
        x[c] = 0;
        for (int j = 0; j < 8; j++) {
            const double part = y[c / 8 * 8 + j] / sqrt(8);

            x[c] += __builtin_parity((unsigned)(c % 8 & j)) ? -part : part;
        }
    }
}

/* Largest range over the tokens of a channel; without smoothing, largest magnitude. */
static double k_range(const struct problem *p, int64_t b, int64_t h)
{
    const struct sage_tensor *k = &p->attn.k;
    double x[SAGE_MAX_HEAD_DIM], low[SAGE_MAX_HEAD_DIM], high[SAGE_MAX_HEAD_DIM];
    double range = 0;

    for (int64_t n = 0; n < k->shape[2]; n++) {
        get_row(p, k, b, h, n, x);
        for (int64_t c = 0; c < k->shape[3]; c++) {
            low[c] = n == 0 || x[c] < low[c] ? x[c] : low[c];
            high[c] = n == 0 || x[c] > high[c] ? x[c] : high[c];
        }
    }
    for (int64_t c = 0; c < k->shape[3] && k->shape[2]; c++)
        range =
            fmax(range, p->attn.smooth_k ? high[c] - low[c] : fmax(fabs(high[c]), fabs(low[c])));
    return range;
}

void problem_find_flip(struct problem *p)
{
    const struct sage_tensor *q = &p->attn.q;
    double range = 0, amax = 0;

    for (int64_t b = 0; b < q->shape[0]; b++) {
        for (int64_t h = 0; h < p->attn.k.shape[1]; h++)
            range = fmax(range, k_range(p, b, h));
        for (int64_t h = 0; h < q->shape[1]; h++)
            for (int64_t n = 0; n < q->shape[2]; n++) {
                double x[SAGE_MAX_HEAD_DIM];

                get_row(p, q, b, h, n, x);
                for (int64_t c = 0; c < q->shape[3]; c++)
                    amax = fmax(amax, fabs(x[c]));
            }
    }
    p->flip = (double)sage_attn_scale(&p->attn) * amax * range / 127;
}

void problem_fill(struct problem *p)
{
    make_pools();
    fill(p, 0, &p->attn.q);
    fill(p, 1, &p->attn.k);
    fill(p, 2, &p->attn.v);
    problem_find_flip(p);
}

void problem_plain(struct problem *p, enum sage_dtype dtype, enum sage_variant variant, int64_t b,
                   int64_t heads, int64_t gqa, int64_t nq, int64_t nk, int64_t d)
{
    struct sage_attn *a = &p->attn;

    a->variant = variant;
    a->q = problem_take(p, dtype, HND, 0, b, gqa * heads, nq, d);
    a->k = problem_take(p, dtype, HND, 0, b, heads, nk, d);
    a->v = problem_take(p, dtype, HND, 0, b, heads, nk, d);
    a->o = problem_take(p, dtype, HND, 0, b, gqa * heads, nq, d);
    a->lse = problem_take(p, SAGE_F32, HND, 0, b, gqa * heads, nq, 1);
    problem_fill(p);
}

/* --- random parameters --- */

struct sizes {
    int64_t b, heads, gqa, nq, nk, d;
};

static int64_t random_dim(struct rng *rng)
{
    static const int64_t dims[] = {48, 64, 72, 80, 96, 128, 160, 192, 256, 64, 128};

    return rng_below(rng, 3) ? dims[rng_below(rng, 11)] : 8 * (1 + rng_below(rng, 32));
}

static int64_t random_tokens(struct rng *rng, int64_t most)
{
    int64_t n;

    switch (rng_below(rng, 8)) {
    case 0:
        n = 1;
        break;
    case 1:
        n = 1 + rng_below(rng, 8);
        break;
    case 2:
        n = 1 + rng_below(rng, 64);
        break;
    case 3: /* around the tiles' edges */
        n = 64 * (1 + rng_below(rng, 8)) - 1 + rng_below(rng, 3);
        break;
    case 4:
    case 5:
        n = 1 + rng_below(rng, 300);
        break;
    default:
        n = 1 + rng_below(rng, most);
        break;
    }
    return n < most ? n : most;
}

/* Small enough for the CPU (1.6 GFLOP) and the images. */
static bool too_large(const struct sizes *s)
{
    const double heads = (double)(s->b * s->heads), d = (double)s->d;
    const double q = heads * (double)(s->gqa * s->nq), k = heads * (double)s->nk;

    return q * d > 1e6 || k * d > 1e6 || q * (double)s->nk * d > 4e8;
}

static struct sizes random_sizes(struct rng *rng, int64_t tokens, bool varlen)
{
    static const int64_t gqas[] = {1, 1, 1, 2, 3, 4, 8};
    struct sizes s = {
        .b = varlen ? 1 : 1 + rng_below(rng, 3),
        .heads = 1 + rng_below(rng, 4),
        .gqa = gqas[rng_below(rng, 7)],
        .nq = random_tokens(rng, tokens),
        .nk = rng_below(rng, 50) ? random_tokens(rng, tokens) : 0,
        .d = random_dim(rng),
    };

    if (rng_below(rng, 4) == 0)
        s.nk = s.nq;
    if (rng_below(rng, 6) == 0) { /* decoding */
        s.nq = 1 + rng_below(rng, 16);
        s.nk = 1 + rng_below(rng, 4 * tokens);
    }
    while (too_large(&s)) {
        int64_t *most = s.nq > s.nk ? &s.nq : &s.nk;

        if (rng_below(rng, 2) && (s.b > 1 || s.heads > 1 || s.gqa > 1))
            most = s.b > 1 ? &s.b : s.heads > 1 ? &s.heads : &s.gqa;
        *most = (*most + 1) / 2;
    }
    return s;
}

/* q, k and v as slices of one [B, N, Hq + 2 Hkv, D] allocation. */
static void fused(struct problem *p, enum sage_dtype dtype, const struct sizes *s)
{
    const int64_t heads = s->heads * (s->gqa + 2);
    const struct sage_tensor all = problem_take(p, dtype, NHD, 0, s->b, heads, s->nq, s->d);
    struct sage_tensor *t[] = {&p->attn.q, &p->attn.k, &p->attn.v};
    const int64_t n_heads[] = {s->heads * s->gqa, s->heads, s->heads};
    int64_t head = 0;

    for (int i = 0; i < 3; head += n_heads[i++]) {
        *t[i] = all;
        t[i]->shape[1] = n_heads[i];
        t[i]->offset += (uint64_t)(head * s->d * 2);
    }
}

static enum layout random_layout(struct rng *rng, bool input)
{
    return (enum layout)rng_below(rng, input ? N_LAYOUTS : EXPANDED);
}

static int random_skew(struct rng *rng, enum layout layout)
{
    return layout == GAPS ? (int)rng_below(rng, 8) : layout == PADDED ? 8 : 0;
}

static void random_tensors(struct problem *p, const struct sizes *s)
{
    struct rng *rng = &p->rng;
    struct sage_attn *a = &p->attn;
    const enum sage_dtype dtype = rng_below(rng, 2) ? SAGE_F16 : SAGE_BF16;
    enum layout *l = p->layout;

    for (int i = 0; i < 4; i++)
        l[i] = random_layout(rng, i == 1 || i == 2);
    p->fused = s->nq == s->nk && rng_below(rng, 2);
    if (p->fused) {
        fused(p, dtype, s);
    } else {
        a->q = problem_take(p, dtype, l[0], random_skew(rng, l[0]), s->b, s->heads * s->gqa, s->nq,
                            s->d);
        a->k = problem_take(p, dtype, l[1], random_skew(rng, l[1]), s->b, s->heads, s->nk, s->d);
        a->v = problem_take(p, dtype, l[2], random_skew(rng, l[2]), s->b, s->heads, s->nk, s->d);
    }
    a->o =
        problem_take(p, dtype, l[3], random_skew(rng, l[3]), s->b, s->heads * s->gqa, s->nq, s->d);
    if (rng_below(rng, 2))
        a->lse = problem_take(p, SAGE_F32, l[3], random_skew(rng, l[3]), s->b, s->heads * s->gqa,
                              s->nq, 1);
}

static void random_offsets(struct rng *rng, int32_t *offsets, int n, int64_t end)
{
    offsets[0] = 0;
    for (int i = 1; i < n; i++) /* often an empty sequence */
        offsets[i] = rng_below(rng, 3)
                         ? (int32_t)(offsets[i - 1] + rng_below(rng, end - offsets[i - 1] + 1))
                         : offsets[i - 1];
    offsets[n] = (int32_t)end;
}

/* What stands for a key that is hidden. */
static double hidden_value(struct rng *rng, enum sage_dtype dtype)
{
    if (dtype == SAGE_BOOL)
        return 0;
    if (rng_below(rng, 2))
        return -INFINITY;
    return dtype == SAGE_F16 ? -65504 : dtype == SAGE_BF16 ? -0x1.fep127 : (double)-FLT_MAX;
}

/* Masks: scattered keys, all beyond some key, blind rows. */
static void fill_mask(struct problem *p, const struct sage_tensor *t)
{
    struct rng *rng = &p->rng;
    const bool blind = rng_below(rng, 2), scattered = rng_below(rng, 3);
    const double hidden = hidden_value(rng, t->dtype);
    const int64_t beyond = rng_below(rng, 2) ? t->shape[3] : rng_below(rng, t->shape[3] + 1);

    for (int64_t b = 0; b < t->shape[0]; b++)
        for (int64_t h = 0; h < t->shape[1]; h++)
            for (int64_t n = 0; n < t->shape[2]; n++) {
                const float *x = normals + rng_below(rng, POOL);
                char *row = row_of(t, b, h, n);

                for (int64_t c = 0; c < t->shape[3]; c++) {
                    const bool gone = c >= beyond || (blind && n % 5 == 1) ||
                                      (scattered && rng_below(rng, 4) == 0);

                    put_in_row(row, t->dtype, c,
                               gone                    ? hidden
                               : t->dtype == SAGE_BOOL ? 1 + rng_below(rng, 255)
                                                       : (double)x[c % SAGE_MAX_HEAD_DIM]);
                }
            }
}

static void random_mask(struct problem *p)
{
    const enum sage_dtype dtypes[] = {SAGE_BOOL, SAGE_F16, SAGE_BF16, SAGE_F32};
    struct rng *rng = &p->rng;
    struct sage_attn *a = &p->attn;
    const enum layout layout = rng_below(rng, 2) ? HND : GAPS;
    int64_t shape[3];

    for (int i = 0; i < 3; i++)
        shape[i] = rng_below(rng, 2) ? a->q.shape[i] : 1;
    for (int i = 0; i < 3; i++)
        if (shape[0] * shape[1] * shape[2] * a->k.shape[2] > 2000000)
            shape[i] = 1;
    a->mask = problem_take(p, dtypes[rng_below(rng, 4)], layout, random_skew(rng, layout), shape[0],
                           shape[1], shape[2], a->k.shape[2]);
    fill_mask(p, &a->mask);
}

static void random_options(struct problem *p, const struct sizes *s, bool fp8)
{
    struct rng *rng = &p->rng;
    struct sage_attn *a = &p->attn;
    const int64_t window = s->nk + 1;

    a->variant = fp8 && rng_below(rng, 2) ? SAGE_INT8_FP8 : SAGE_INT8_FP16;
    a->smooth_k = rng_below(rng, 4) > 0;
    a->smooth_v = a->variant == SAGE_INT8_FP8 && rng_below(rng, 2);
    a->rotate_qk = rng_below(rng, 3) == 0;
    a->scale = rng_below(rng, 4) ? 0 : (float)(0.02 + 0.2 * rng_uniform(rng));
    a->causal = rng_below(rng, 5) < 2;
    a->diagonal = (enum sage_diagonal)rng_below(rng, 2);
    a->window_left = rng_below(rng, 3) ? SAGE_UNLIMITED : rng_below(rng, window);
    a->window_right = a->causal ? (rng_below(rng, 2) ? 0 : SAGE_UNLIMITED)
                                : (rng_below(rng, 3) ? SAGE_UNLIMITED : rng_below(rng, window));
}

static void random_spoil(struct problem *p)
{
    static const double values[] = {NAN, -NAN, INFINITY, -INFINITY};
    struct rng *rng = &p->rng;
    const int which = (int)rng_below(rng, 3);
    const struct sage_tensor *t = which == 0 ? &p->attn.q : which == 1 ? &p->attn.k : &p->attn.v;
    const int64_t b = rng_below(rng, p->attn.n_seqs ? p->attn.n_seqs : t->shape[0]);
    const struct sage_seq seq = sage_attn_seq(&p->attn, b);
    const int64_t rows = which == 0 ? seq.nq : seq.nk;
    const bool shared = (t->stride[0] == 0 && t->shape[0] > 1) || t->stride[1] == 0;

    if (rows == 0 || shared) /* a key that several groups read: left to the edges */
        return;
    p->spoil = (struct spoil){which,
                              values[rng_below(rng, 4)],
                              b,
                              rng_below(rng, t->shape[1]),
                              rng_below(rng, rows),
                              rng_below(rng, t->shape[3])};
    put(t, seq.batch, p->spoil.head, (which == 0 ? seq.q0 : seq.k0) + p->spoil.row, p->spoil.c,
        p->spoil.value);
}

void problem_random(struct problem *p, int64_t tokens, bool fp8)
{
    struct rng *rng = &p->rng;
    struct sage_attn *a = &p->attn;
    const bool varlen = rng_below(rng, 5) == 0;
    const struct sizes s = random_sizes(rng, tokens, varlen);

    random_options(p, &s, fp8);
    p->kind = rng_below(rng, 3) ? (enum kind)rng_below(rng, N_KINDS) : KIND_NORMAL;
    p->cut = rng_below(rng, 5) < 2;
    a->n_seqs = varlen ? 1 + (int32_t)rng_below(rng, TEST_SEQS) : 0;
    random_tensors(p, &s);
    if (varlen) {
        random_offsets(rng, p->offsets[0], a->n_seqs, s.nq);
        random_offsets(rng, p->offsets[1], a->n_seqs, s.nk);
        a->q_offsets = p->offsets[0];
        a->k_offsets = p->offsets[1];
    }
    problem_fill(p);
    if (!varlen && rng_below(rng, 3) == 0)
        random_mask(p);
    if (rng_below(rng, 10) == 0 && p->kind != KIND_ONES)
        random_spoil(p);
}

/* --- in words --- */

static void describe_offsets(const struct problem *p, FILE *out)
{
    for (int which = 0; p->attn.n_seqs && which < 2; which++) {
        fprintf(out, which ? " k_offsets" : " q_offsets");
        for (int i = 0; i <= p->attn.n_seqs; i++)
            fprintf(out, "%c%d", i ? ',' : '=', p->offsets[which][i]);
    }
}

void problem_describe(const struct problem *p, char *text, size_t len)
{
    static const char *const kinds[] = {
#define KIND_TEXT(name, text) text,
        KINDS(KIND_TEXT)
#undef KIND_TEXT
    };
    static const char *const layouts[] = {"hnd", "nhd", "gaps", "padded", "expanded"};
    const struct sage_attn *a = &p->attn;
    const int64_t *q = a->q.shape, *k = a->k.shape, *m = a->mask.shape;
    FILE *out = fmemopen(text, len, "w");

    if (!out)
        return;
    fprintf(out, "%s %s B=%lld H=%lld/%lld N=%lld/%lld D=%lld %s", sage_variant_name(a->variant),
            sage_dtype_name(a->q.dtype), (long long)q[0], (long long)q[1], (long long)k[1],
            (long long)q[2], (long long)k[2], (long long)q[3], kinds[p->kind]);
    if (p->fused)
        fprintf(out, " fused,o:%s", layouts[p->layout[3]]);
    else
        fprintf(out, " %s,%s,%s,%s", layouts[p->layout[0]], layouts[p->layout[1]],
                layouts[p->layout[2]], layouts[p->layout[3]]);
    fprintf(out, "%s%s%s%s%s%s%s", a->smooth_k ? " smooth_k" : "", a->smooth_v ? " smooth_v" : "",
            a->rotate_qk ? " rotate_qk" : "", a->causal ? " causal" : "",
            a->diagonal == SAGE_BOTTOM_RIGHT ? " bottom-right" : "", a->lse.dtype ? " lse" : "",
            p->cut ? " cut" : "");
    if (a->window_left >= 0 || a->window_right >= 0)
        fprintf(out, " window=%lld,%lld", (long long)a->window_left, (long long)a->window_right);
    if (a->scale > 0)
        fprintf(out, " scale=%g", (double)a->scale);
    if (a->mask.dtype)
        fprintf(out, " mask=%s[%lld,%lld,%lld]", sage_dtype_name(a->mask.dtype), (long long)m[0],
                (long long)m[1], (long long)m[2]);
    if (p->spoil.which >= 0)
        fprintf(out, " %g in %c[%lld,%lld,%lld,%lld]", p->spoil.value, "qkv"[p->spoil.which],
                (long long)p -> spoil.b, (long long)p->spoil.head, (long long)p->spoil.row,
                (long long)p->spoil.c);
    describe_offsets(p, out);
    fprintf(out, " flip=%.2g", p->flip);
    fclose(out);
}
