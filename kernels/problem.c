/*
 * problem.c - is a struct sage_attn legal, and what is in it: sizes, sequences, visible keys.
 * The legality half is run by a daemon on what strangers send: any field may hold anything.
 */
#include "problem.h"

#include <math.h>
#include <stdarg.h>
#include <stdio.h>
#include <string.h>

/* --- sizes, sequences, visible keys --- */

size_t sage_dtype_size(enum sage_dtype dtype)
{
    switch (dtype) {
    case SAGE_F16:
    case SAGE_BF16:
        return 2;
    case SAGE_F32:
        return 4;
    case SAGE_BOOL:
        return 1;
    case SAGE_NONE:
        break;
    }
    return 0;
}

const char *sage_dtype_name(enum sage_dtype dtype)
{
    static const char *const names[] = {"none", "f16", "bf16", "f32", "bool"};

    return (unsigned)dtype < sizeof names / sizeof names[0] ? names[dtype] : "invalid";
}

const char *sage_variant_name(enum sage_variant variant)
{
    static const char *const names[] = {"auto", "int8_fp16", "int8_fp8"};

    return (unsigned)variant < sizeof names / sizeof names[0] ? names[variant] : "invalid";
}

static bool is_empty(const struct sage_tensor *t)
{
    return !t->shape[0] || !t->shape[1] || !t->shape[2] || !t->shape[3];
}

bool sage_tensor_bytes(const struct sage_tensor *t, int64_t *bytes)
{
    int64_t last = 0, step;

    *bytes = 0;
    for (int i = 0; i < 4; i++)
        if (t->shape[i] < 0)
            return false;
    if (is_empty(t))
        return true;
    for (int i = 0; i < 4; i++) {
        if (t->shape[i] == 1) /* its stride is never used */
            continue;
        if (t->stride[i] < 0 || __builtin_mul_overflow(t->shape[i] - 1, t->stride[i], &step) ||
            __builtin_add_overflow(last, step, &last))
            return false;
    }
    return !__builtin_add_overflow(last, 1, &last) &&
           !__builtin_mul_overflow(last, (int64_t)sage_dtype_size(t->dtype), bytes);
}

struct sage_seq sage_attn_seq(const struct sage_attn *attn, int64_t b)
{
    if (!attn->n_seqs)
        return (struct sage_seq){b, 0, attn->q.shape[2], 0, attn->k.shape[2]};
    return (struct sage_seq){
        .batch = 0,
        .q0 = attn->q_offsets[b],
        .nq = attn->q_offsets[b + 1] - attn->q_offsets[b],
        .k0 = attn->k_offsets[b],
        .nk = attn->k_offsets[b + 1] - attn->k_offsets[b],
    };
}

static int64_t clamp(int64_t x, int64_t lo, int64_t hi)
{
    return x < lo ? lo : x > hi ? hi : x;
}

/*
 * Row i of a sequence sees the keys [i + *first, i + *last), each end clamped to [0, nk]. A side
 * without a limit gets an offset beyond every index: rows and keys number less than 2^31 each.
 */
static void band_offsets(const struct sage_attn *attn, const struct sage_seq *seq, int64_t *first,
                         int64_t *last)
{
    const int64_t far = INT64_C(1) << 33;
    const int64_t d = attn->diagonal == SAGE_BOTTOM_RIGHT ? seq->nk - seq->nq : 0;
    const int64_t right = attn->causal ? 0 : attn->window_right;

    *first = attn->window_left < 0 ? -far : d - clamp(attn->window_left, 0, far);
    *last = right < 0 ? far : d + clamp(right, 0, far) + 1;
}

void sage_attn_band(const struct sage_attn *attn, const struct sage_seq *seq, int64_t i,
                    int64_t *first, int64_t *last)
{
    band_offsets(attn, seq, first, last);
    *first = clamp(i + *first, 0, seq->nk);
    *last = clamp(i + *last, 0, seq->nk);
}

float sage_attn_scale(const struct sage_attn *attn)
{
    return attn->scale > 0 ? attn->scale : 1 / sqrtf((float)attn->q.shape[3]);
}

enum sage_variant sage_attn_variant(const struct sage_attn *attn)
{
    if (attn->variant != SAGE_AUTO)
        return attn->variant;
    return attn->smooth_v ? SAGE_INT8_FP8 : SAGE_INT8_FP16;
}

int64_t sage_attn_groups(const struct sage_attn *attn)
{
    if (!attn->q.shape[0] || !attn->q.shape[2])
        return 0;
    return (attn->n_seqs ? attn->n_seqs : attn->q.shape[0]) * attn->k.shape[1];
}

int64_t sage_attn_rows(const struct sage_attn *attn)
{
    int64_t most = attn->n_seqs > 0 ? 0 : attn->q.shape[2];

    for (int64_t s = 0; s < attn->n_seqs; s++) {
        const int64_t rows = attn->q_offsets[s + 1] - attn->q_offsets[s];
        most = rows > most ? rows : most;
    }
    return most * (attn->q.shape[1] / attn->k.shape[1]);
}

int64_t sage_part_heads(const struct sage_attn *attn, const struct sage_part *part)
{
    return part->n_heads ? part->n_heads : attn->q.shape[1] / attn->k.shape[1];
}

bool sage_part_is_legal(const struct sage_attn *attn, const struct sage_part *p)
{
    const int64_t groups = sage_attn_groups(attn), heads = attn->q.shape[1] / attn->k.shape[1];

    if (p->group < 0 || p->n_groups < 0 || p->group > groups || p->n_groups > groups - p->group)
        return false;
    if (p->head < 0 || p->n_heads < 0 || p->head > heads || p->n_heads > heads - p->head)
        return false;
    if (p->n_heads ? p->n_groups != 1 : p->head != 0)
        return false;
    if (p->n_rows < 0)
        return p->n_rows == -1 && p->row == 0;
    if (p->n_groups != 1 || p->row < 0)
        return false;
    const struct sage_seq seq = sage_attn_seq(attn, p->group / attn->k.shape[1]);
    return p->row <= seq.nq && p->n_rows <= seq.nq - p->row;
}

/* Sum over x < end of x clamped to [0, nk]. */
static double ramp(int64_t end, int64_t nk)
{
    const double x = (double)clamp(end, 0, nk), beyond = end > nk ? (double)(end - nk) : 0;

    return x * (x - 1) / 2 + beyond * (double)nk;
}

/* Visible (query, key) pairs of rows [row, row + n) of one query head. */
static double pairs(const struct sage_attn *attn, const struct sage_seq *seq, int64_t row,
                    int64_t n)
{
    int64_t first, last;

    band_offsets(attn, seq, &first, &last);
    return ramp(row + n + last, seq->nk) - ramp(row + last, seq->nk) -
           (ramp(row + n + first, seq->nk) - ramp(row + first, seq->nk));
}

double sage_attn_ops(const struct sage_attn *attn, const struct sage_part *part)
{
    const int64_t heads = attn->k.shape[1];
    double sum = 0;

    if (part && !sage_part_is_legal(attn, part)) /* before the sums below: they might overflow */
        return 0;
    int64_t g = part ? part->group : 0;
    const int64_t end = part ? g + part->n_groups : sage_attn_groups(attn);
    while (g < end) {
        const struct sage_seq seq = sage_attn_seq(attn, g / heads);
        const bool all = !part || part->n_rows < 0;
        /* every batch is alike: all of it at once; sequences differ: as many heads as are left */
        const int64_t n = attn->n_seqs ? clamp(end - g, 0, heads - g % heads) : end - g;

        sum += (double)n * pairs(attn, &seq, all ? 0 : part->row, all ? seq.nq : part->n_rows);
        g += n;
    }
    const int64_t q_heads = part ? sage_part_heads(attn, part) : attn->q.shape[1] / heads;
    return 4.0 * (double)attn->q.shape[3] * (double)q_heads * sum;
}

/* --- is it legal? --- */

/* Where the refusal goes. */
struct why {
    char *text;
    size_t len;
};

static int refuse(const struct why *why, int status, const char *format, ...)
    __attribute__((format(printf, 3, 4)));

static int refuse(const struct why *why, int status, const char *format, ...)
{
    va_list args;

    if (!why->text || !why->len)
        return status;
    va_start(args, format);
    vsnprintf(why->text, why->len, format, args);
    va_end(args);
    return status;
}

static int check_options(const struct sage_attn *a, const struct why *why)
{
    if ((unsigned)a->variant > SAGE_INT8_FP8)
        return refuse(why, SAGE_EINVAL,
                      "variant: %d, must be 0 (auto), 1 (int8_fp16) or 2 (int8_fp8)",
                      (int)a->variant);
    if ((unsigned)a->diagonal > SAGE_BOTTOM_RIGHT)
        return refuse(why, SAGE_EINVAL, "diagonal: %d, must be 0 (top left) or 1 (bottom right)",
                      (int)a->diagonal);
    if (!isfinite(a->scale) || a->scale < 0)
        return refuse(why, SAGE_EINVAL,
                      "scale: %g, must be positive and finite, or 0 for 1/sqrt(D)",
                      (double)a->scale);
    if (a->window_left < SAGE_UNLIMITED)
        return refuse(why, SAGE_EINVAL,
                      "window_left: %lld, must be at least 0, or -1 for unlimited",
                      (long long)a->window_left);
    if (a->window_right < SAGE_UNLIMITED)
        return refuse(why, SAGE_EINVAL,
                      "window_right: %lld, must be at least 0, or -1 for unlimited",
                      (long long)a->window_right);
    if (a->causal && a->window_right > 0)
        return refuse(why, SAGE_EINVAL, "window_right: %lld, must be 0 or -1 with causal",
                      (long long)a->window_right);
    if (a->smooth_v && a->variant == SAGE_INT8_FP16)
        return refuse(why, SAGE_EUNSUPPORTED, "smooth_v: only int8_fp8 has it, not int8_fp16");
    return SAGE_OK;
}

static int check_dtypes(const struct sage_attn *a, const struct why *why)
{
    const enum sage_dtype dtype = a->q.dtype;
    const struct {
        const char *name;
        enum sage_dtype dtype;
    } rest[] = {{"k", a->k.dtype}, {"v", a->v.dtype}, {"o", a->o.dtype}};

    if (dtype != SAGE_F16 && dtype != SAGE_BF16)
        return refuse(why, SAGE_EUNSUPPORTED, "q.dtype: %s, must be f16 or bf16",
                      sage_dtype_name(dtype));
    for (int i = 0; i < 3; i++)
        if (rest[i].dtype != dtype)
            return refuse(why, SAGE_EUNSUPPORTED, "%s.dtype: %s, must be %s like q", rest[i].name,
                          sage_dtype_name(rest[i].dtype), sage_dtype_name(dtype));
    if (a->lse.dtype != SAGE_NONE && a->lse.dtype != SAGE_F32)
        return refuse(why, SAGE_EUNSUPPORTED, "lse.dtype: %s, must be f32, or none for no lse",
                      sage_dtype_name(a->lse.dtype));
    if ((unsigned)a->mask.dtype > SAGE_BOOL)
        return refuse(why, SAGE_EINVAL, "mask.dtype: %d, must be f16, bf16, f32, bool or none",
                      (int)a->mask.dtype);
    return SAGE_OK;
}

/* Shape, strides, size and address of one tensor by itself. */
static int check_tensor(const char *name, const struct sage_tensor *t, const struct why *why)
{
    const size_t size = sage_dtype_size(t->dtype);
    uint64_t address;
    int64_t bytes;

    for (int i = 0; i < 4; i++) {
        if (t->shape[i] < 0)
            return refuse(why, SAGE_EINVAL, "%s.shape[%d]: %lld, must not be negative", name, i,
                          (long long)t->shape[i]);
        if (t->stride[i] < 0)
            return refuse(why, SAGE_EUNSUPPORTED, "%s.stride[%d]: %lld, must not be negative", name,
                          i, (long long)t->stride[i]);
    }
    if (t->shape[3] > 1 && t->stride[3] != 1)
        return refuse(why, SAGE_EUNSUPPORTED, "%s.stride[3]: %lld, must be 1", name,
                      (long long)t->stride[3]);
    if (!sage_tensor_bytes(t, &bytes))
        return refuse(why, SAGE_EINVAL, "%s: its extent in bytes does not fit 63 bits", name);
    if (__builtin_add_overflow((uint64_t)(uintptr_t)t->data, t->offset, &address) ||
        address > UINT64_MAX - (uint64_t)bytes)
        return refuse(why, SAGE_EINVAL, "%s.offset: %llu, the tensor ends beyond 64 bits", name,
                      (unsigned long long)t->offset);
    if (address % size)
        return refuse(why, SAGE_EINVAL, "%s: its address must be a multiple of %zu", name, size);
    if (bytes && !t->data && !t->buffer)
        return refuse(why, SAGE_EINVAL, "%s.data: NULL", name);
    return SAGE_OK;
}

/* All tensors that are present; q, k, v and the mask first, then o and lse. */
struct operand {
    const char *name;
    const struct sage_tensor *t;
};

enum { N_INPUTS = 4, N_OPERANDS = 6 };

static void operands(const struct sage_attn *a, struct operand list[N_OPERANDS])
{
    memcpy(list,
           (struct operand[N_OPERANDS]){{"q", &a->q},
                                        {"k", &a->k},
                                        {"v", &a->v},
                                        {"mask", &a->mask},
                                        {"o", &a->o},
                                        {"lse", &a->lse}},
           N_OPERANDS * sizeof list[0]);
}

static int check_like(const struct operand *x, const int64_t shape[4], const char *like,
                      const struct why *why)
{
    for (int i = 0; i < 4; i++)
        if (x->t->shape[i] != shape[i])
            return refuse(why, SAGE_EINVAL, "%s.shape[%d]: %lld, must be %lld%s", x->name, i,
                          (long long)x->t->shape[i], (long long)shape[i], like);
    return SAGE_OK;
}

static int check_mask_shape(const struct sage_attn *a, const struct why *why)
{
    for (int i = 0; i < 3; i++)
        if (a->mask.shape[i] != a->q.shape[i] && a->mask.shape[i] != 1)
            return refuse(why, SAGE_EINVAL, "mask.shape[%d]: %lld, must be 1 or %lld", i,
                          (long long)a->mask.shape[i], (long long)a->q.shape[i]);
    if (a->mask.shape[3] != a->k.shape[2])
        return refuse(why, SAGE_EINVAL, "mask.shape[3]: %lld, must be %lld, the keys of k",
                      (long long)a->mask.shape[3], (long long)a->k.shape[2]);
    return SAGE_OK;
}

static int check_limits(const struct sage_attn *a, const struct why *why)
{
    const int64_t *q = a->q.shape, *k = a->k.shape;
    int64_t heads;

    if (q[3] < 8 || q[3] > SAGE_MAX_HEAD_DIM || q[3] % 8)
        return refuse(why, SAGE_EUNSUPPORTED,
                      "head dimension %lld: must be a multiple of 8 from 8 to %d", (long long)q[3],
                      SAGE_MAX_HEAD_DIM);
    if (q[1] < 1 || k[1] < 1)
        return refuse(why, SAGE_EINVAL, "%s.shape[1]: 0 heads, must be at least 1",
                      q[1] < 1 ? "q" : "k");
    if (q[1] % k[1])
        return refuse(why, SAGE_EINVAL, "q.shape[1]: %lld heads are no multiple of the %lld of k",
                      (long long)q[1], (long long)k[1]);
    if (q[1] > INT32_MAX || __builtin_mul_overflow(q[0], q[1], &heads) || heads > INT32_MAX)
        return refuse(why, SAGE_EUNSUPPORTED,
                      "q.shape: batch %lld x %lld heads, must be at most %d together",
                      (long long)q[0], (long long)q[1], INT32_MAX);
    if (q[2] > SAGE_MAX_TOKENS || k[2] > SAGE_MAX_TOKENS)
        return refuse(why, SAGE_EUNSUPPORTED, "%s.shape[2]: %lld tokens, must be at most %d",
                      q[2] > SAGE_MAX_TOKENS ? "q" : "k",
                      (long long)(q[2] > SAGE_MAX_TOKENS ? q[2] : k[2]), SAGE_MAX_TOKENS);
    return SAGE_OK;
}

/* The shapes against each other; each tensor by itself has been checked. */
static int check_shapes(const struct sage_attn *a, const struct why *why)
{
    const int64_t *q = a->q.shape, *k = a->k.shape;
    const int64_t lse[4] = {q[0], q[1], q[2], 1};
    int status;

    if ((status = check_limits(a, why)))
        return status;
    if (k[0] != q[0] || k[3] != q[3])
        return refuse(why, SAGE_EINVAL, "k.shape[%d]: %lld, must be %lld like q",
                      k[0] != q[0] ? 0 : 3, (long long)(k[0] != q[0] ? k[0] : k[3]),
                      (long long)(k[0] != q[0] ? q[0] : q[3]));
    if ((status = check_like(&(struct operand){"v", &a->v}, k, " like k", why)) ||
        (status = check_like(&(struct operand){"o", &a->o}, q, " like q", why)))
        return status;
    if (a->lse.dtype != SAGE_NONE &&
        (status = check_like(&(struct operand){"lse", &a->lse}, lse, "", why)))
        return status;
    return a->mask.dtype == SAGE_NONE ? SAGE_OK : check_mask_shape(a, why);
}

static int check_offsets(const char *name, const int32_t *offsets, int32_t n, int64_t end,
                         const struct why *why)
{
    if (!offsets)
        return refuse(why, SAGE_EINVAL, "%s: NULL with %d sequences", name, n);
    if (offsets[0] != 0)
        return refuse(why, SAGE_EINVAL, "%s[0]: %d, must be 0", name, offsets[0]);
    for (int32_t i = 1; i <= n; i++)
        if (offsets[i] < offsets[i - 1])
            return refuse(why, SAGE_EINVAL, "%s[%d]: %d, must not be less than the %d before it",
                          name, i, offsets[i], offsets[i - 1]);
    if (offsets[n] != end)
        return refuse(why, SAGE_EINVAL, "%s[%d]: %d, must be %lld, the tokens in all", name, n,
                      offsets[n], (long long)end);
    return SAGE_OK;
}

static int check_seqs(const struct sage_attn *a, const struct why *why)
{
    int status;

    if (a->n_seqs < 0 || a->n_seqs > SAGE_MAX_SEQS)
        return refuse(why, SAGE_EUNSUPPORTED, "n_seqs: %d, must be from 0 to %d", a->n_seqs,
                      SAGE_MAX_SEQS);
    if (!a->n_seqs)
        return SAGE_OK;
    if (a->q.shape[0] != 1)
        return refuse(why, SAGE_EINVAL, "q.shape[0]: %lld, must be 1 with n_seqs",
                      (long long)a->q.shape[0]);
    if (a->mask.dtype != SAGE_NONE)
        return refuse(why, SAGE_EUNSUPPORTED, "mask: not supported together with n_seqs");
    if ((status = check_offsets("q_offsets", a->q_offsets, a->n_seqs, a->q.shape[2], why)))
        return status;
    return check_offsets("k_offsets", a->k_offsets, a->n_seqs, a->k.shape[2], why);
}

/* Of the dimensions of more than one element, the unused one with the smallest stride; -1: none. */
static int next_dim(const struct sage_tensor *t, const bool used[4])
{
    int best = -1;

    for (int i = 3; i >= 0; i--)
        if (!used[i] && t->shape[i] > 1 && (best < 0 || t->stride[i] < t->stride[best]))
            best = i;
    return best;
}

/*
 * Two elements of an output in one place? No, if each stride exceeds the extent of all dimensions
 * with smaller strides together. Returns the dimension where that fails, or -1.
 */
static int self_overlap(const struct sage_tensor *t)
{
    bool used[4] = {false};
    int64_t extent = 0; /* index of the last element so far; fits, for sage_tensor_bytes() did */
    int i;

    if (is_empty(t))
        return -1;
    while ((i = next_dim(t, used)) >= 0) {
        if (t->stride[i] <= extent)
            return i;
        extent += (t->shape[i] - 1) * t->stride[i];
        used[i] = true;
    }
    return -1;
}

/* Bytes of what is left of a tensor without the dimensions that step by multiples of `period`. */
static int64_t extent_within(const struct sage_tensor *t, int64_t period)
{
    struct sage_tensor inner = *t;
    int64_t bytes;

    for (int i = 0; i < 4; i++)
        if (t->shape[i] > 1 && t->stride[i] * (int64_t)sage_dtype_size(t->dtype) % period == 0)
            inner.shape[i] = 1;
    sage_tensor_bytes(&inner, &bytes);
    return bytes;
}

static uint64_t address_of(const struct sage_tensor *t)
{
    return (uint64_t)(uintptr_t)t->data + t->offset;
}

/*
 * Interleaved slices of one allocation: seen modulo a stride of one of them, the dimensions that
 * step by multiples of it fall away. If what is left of both is two arcs that do not meet on the
 * circle of that circumference, no byte is shared.
 */
static bool interleaved(const struct sage_tensor *a, const struct sage_tensor *b)
{
    for (int i = 0; i < 3; i++) {
        if (a->shape[i] <= 1 || a->stride[i] == 0)
            continue;
        const int64_t period = a->stride[i] * (int64_t)sage_dtype_size(a->dtype);
        const int64_t ea = extent_within(a, period), eb = extent_within(b, period);
        const uint64_t p = (uint64_t)period;
        const uint64_t gap = (address_of(b) % p + p - address_of(a) % p) % p; /* from a up to b */

        if (ea <= period && eb <= period && gap >= (uint64_t)ea && p - gap >= (uint64_t)eb)
            return true;
    }
    return false;
}

static bool disjoint(const struct sage_tensor *a, const struct sage_tensor *b)
{
    int64_t na, nb;

    sage_tensor_bytes(a, &na);
    sage_tensor_bytes(b, &nb);
    if (a->buffer != b->buffer || !na || !nb)
        return true;
    if (address_of(a) + (uint64_t)na <= address_of(b) ||
        address_of(b) + (uint64_t)nb <= address_of(a))
        return true;
    return interleaved(a, b) || interleaved(b, a);
}

/* o and lse share no byte with themselves, each other or an input. */
static int check_overlap(const struct operand list[N_OPERANDS], const struct why *why)
{
    for (int i = N_INPUTS; i < N_OPERANDS; i++) {
        if (list[i].t->dtype == SAGE_NONE)
            continue;
        const int dim = self_overlap(list[i].t);

        if (dim >= 0)
            return refuse(why, SAGE_EINVAL, "%s.stride[%d]: %lld, elements of %s overlap",
                          list[i].name, dim, (long long)list[i].t->stride[dim], list[i].name);
        for (int j = 0; j < i; j++)
            if (list[j].t->dtype != SAGE_NONE && !disjoint(list[i].t, list[j].t))
                return refuse(why, SAGE_EINVAL, "%s: overlaps %s", list[i].name, list[j].name);
    }
    return SAGE_OK;
}

int sage_attn_check(const struct sage_attn *attn, char *why_text, size_t len)
{
    const struct why why = {why_text, len};
    struct operand list[N_OPERANDS];
    int status;

    if (!attn)
        return refuse(&why, SAGE_EINVAL, "attn: NULL");
    operands(attn, list);
    if ((status = check_options(attn, &why)) || (status = check_dtypes(attn, &why)))
        return status;
    for (int i = 0; i < N_OPERANDS; i++)
        if (list[i].t->dtype != SAGE_NONE && (status = check_tensor(list[i].name, list[i].t, &why)))
            return status;
    if ((status = check_shapes(attn, &why)) || (status = check_seqs(attn, &why)))
        return status;
    return check_overlap(list, &why);
}
