/*
 * gpu_run.c - one problem on the GPU and on the CPU, and all that must be true of the results.
 */
#include <cuda_runtime_api.h>
#include <float.h>
#include <math.h>
#include <stdarg.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

#include "gpu_attn.h"
#include "kernels/half.h"
#include "kernels/kernels.h"
#include "ref64.h"

/* --- the GPU --- */

/* The problem that was uploaded last: what a device error is about. */
static const struct problem *current;

void gpu_must(int error, const char *call, const char *file, int line)
{
    char text[1024] = "";

    if (error == cudaSuccess)
        return;
    if (current)
        problem_describe(current, text, sizeof text);
    printf("FAILED %s:%d: %s: %s\n  %s\n  %s\n", file, line, call,
           cudaGetErrorString((cudaError_t)error), text, current ? current->repeat : "");
    exit(1);
}

int gpu_init(struct gpu *gpu, bool separate)
{
    struct cudaDeviceProp prop;
    char why[256] = "";
    int n = 0;
    const cudaError_t error = cudaGetDeviceCount(&n);

    if (error != cudaSuccess || n == 0) {
        printf("gpu_attn: skipped, no GPU: %s\n", cudaGetErrorString(error));
        return 77;
    }
    *gpu = (struct gpu){.pool = sage_cpu_create(0), .separate = separate};
    MUST(cudaSetDevice(0));
    MUST(cudaGetDeviceProperties(&prop, 0));
    gpu->fp8 = prop.major * 10 + prop.minor >= 89;
    snprintf(gpu->name, sizeof gpu->name, "%s, compute capability %d.%d", prop.name, prop.major,
             prop.minor);
    const int status = sage_cuda_load(why, sizeof why);

    if (status == SAGE_EUNSUPPORTED) {
        printf("gpu_attn: skipped: %s: %s\n", gpu->name, why);
        return 77;
    }
    if (status || !gpu->pool) {
        fprintf(stderr, "gpu_attn: sage_cuda_load: %s: %s\n", sage_errname(status), why);
        exit(1);
    }
    MUST(cudaStreamCreateWithFlags(&gpu->stream, cudaStreamNonBlocking));
    MUST(cudaMalloc((void **)&gpu->arena, ARENA));
    return 0;
}

void gpu_finish(struct gpu *gpu)
{
    sage_cpu_destroy(gpu->pool);
    cudaStreamDestroy(gpu->stream);
    cudaFree(gpu->arena);
    if (gpu->workspace)
        cudaFree(gpu->workspace - GUARD);
}

enum { PAINT = 0x5a };

char *gpu_workspace(struct gpu *gpu, size_t bytes)
{
    if (bytes > gpu->bytes || !gpu->workspace || gpu->separate) {
        if (gpu->workspace)
            MUST(cudaFree(gpu->workspace - GUARD));
        MUST(cudaMalloc((void **)&gpu->workspace, bytes + 2 * GUARD));
        gpu->workspace += GUARD;
        gpu->bytes = bytes;
    }
    MUST(cudaMemsetAsync(gpu->workspace - GUARD, PAINT, GUARD, gpu->stream));
    MUST(cudaMemsetAsync(gpu->workspace, 0xff, bytes, gpu->stream));
    MUST(cudaMemsetAsync(gpu->workspace + bytes, PAINT, GUARD, gpu->stream));
    return gpu->workspace;
}

bool gpu_workspace_sound(struct gpu *gpu, size_t bytes)
{
    unsigned char guards[2][GUARD];

    MUST(cudaMemcpy(guards[0], gpu->workspace - GUARD, GUARD, cudaMemcpyDeviceToHost));
    MUST(cudaMemcpy(guards[1], gpu->workspace + bytes, GUARD, cudaMemcpyDeviceToHost));
    for (int i = 0; i < GUARD; i++)
        if (guards[0][i] != PAINT || guards[1][i] != PAINT)
            return false;
    return true;
}

void gpu_upload(struct gpu *gpu, struct problem *p)
{
    current = p;
    for (int i = 0; i < p->n_slots; i++) {
        struct slot *s = &p->slots[i];

        s->device = gpu->arena + s->start;
        if (!gpu->separate)
            continue;
        MUST(cudaMalloc((void **)&s->device, s->bytes ? s->bytes : 1));
        MUST(cudaMemcpyAsync(s->device, p->host + s->start, s->bytes, cudaMemcpyHostToDevice,
                             gpu->stream));
    }
    if (!gpu->separate)
        MUST(cudaMemcpyAsync(gpu->arena, p->host, p->used, cudaMemcpyHostToDevice, gpu->stream));
}

void gpu_download(struct gpu *gpu, struct problem *p)
{
    if (!gpu->separate) {
        MUST(cudaMemcpyAsync(p->gpu, gpu->arena, p->used, cudaMemcpyDeviceToHost, gpu->stream));
    } else {
        memcpy(p->gpu, p->host, p->used);
        for (int i = 0; i < p->n_slots; i++)
            MUST(cudaMemcpyAsync(p->gpu + p->slots[i].start, p->slots[i].device, p->slots[i].bytes,
                                 cudaMemcpyDeviceToHost, gpu->stream));
    }
    MUST(cudaStreamSynchronize(gpu->stream));
}

void gpu_release(struct gpu *gpu, struct problem *p)
{
    for (int i = 0; i < p->n_slots && gpu->separate; i++)
        MUST(cudaFree(p->slots[i].device));
    current = NULL;
}

static void on_device(const struct problem *p, struct sage_tensor *t)
{
    const size_t at = (size_t)((char *)t->data - p->host);

    for (int i = 0; i < p->n_slots && t->dtype; i++)
        if (p->slots[i].start == at)
            t->data = p->slots[i].device;
}

struct sage_attn gpu_attn(const struct problem *p)
{
    struct sage_attn a = p->attn;
    struct sage_tensor *t[] = {&a.q, &a.k, &a.v, &a.o, &a.mask, &a.lse};

    for (int i = 0; i < 6; i++)
        on_device(p, t[i]);
    return a;
}

/* --- running, whole or in parts --- */

static bool fail(char *why, size_t len, const char *format, ...)
    __attribute__((format(printf, 3, 4)));

static bool fail(char *why, size_t len, const char *format, ...)
{
    va_list args;

    va_start(args, format);
    vsnprintf(why, len, format, args);
    va_end(args);
    return false;
}

static bool launch(struct gpu *gpu, const struct sage_attn *a, const struct sage_part *part,
                   size_t bytes, char *why, size_t len)
{
    char text[256] = "";
    const int status =
        sage_attn_cuda(a, part, gpu->workspace, bytes, gpu->stream, text, sizeof text);

    return !status || fail(why, len, "sage_attn_cuda: %s: %s", sage_errname(status), text);
}

/* All that was launched is over. */
static bool settle(struct gpu *gpu, size_t bytes, char *why, size_t len)
{
    MUST(cudaStreamSynchronize(gpu->stream));
    if (!gpu_workspace_sound(gpu, bytes))
        return fail(why, len, "wrote outside its %zu bytes of workspace", bytes);
    return true;
}

static bool run_alone(struct gpu *gpu, const struct sage_attn *a, const struct sage_part *part,
                      char *why, size_t len)
{
    const size_t bytes = sage_attn_cuda_workspace(a, part);

    if (bytes == SIZE_MAX)
        return fail(why, len, "sage_attn_cuda_workspace: SIZE_MAX");
    gpu_workspace(gpu, bytes);
    return launch(gpu, a, part, bytes, why, len) && settle(gpu, bytes, why, len);
}

/*
 * Some heads of one group, its rows in pieces; the first call prepares unless others have. Nobody
 * waits between them: kernels may start before the ones before them are over.
 */
static bool run_rows(struct gpu *gpu, const struct sage_attn *a, struct rng *rng,
                     struct sage_part part, int64_t nq, size_t bytes, char *why, size_t len)
{
    for (part.row = 0; part.row < nq; part.row += part.n_rows) {
        part.n_rows = 1 + rng_below(rng, nq - part.row);
        if (!launch(gpu, a, &part, bytes, why, len))
            return false;
        part.prepared = true;
    }
    return settle(gpu, bytes, why, len);
}

/* One group in pieces that share K and V in the workspace. */
static bool run_group(struct gpu *gpu, const struct sage_attn *a, struct rng *rng, int64_t group,
                      char *why, size_t len)
{
    const int64_t heads = a->q.shape[1] / a->k.shape[1];
    const int64_t nq = sage_attn_seq(a, group / a->k.shape[1]).nq;
    struct sage_part part = {.group = group, .n_groups = 1, .n_rows = -1};
    const size_t bytes = sage_attn_cuda_workspace(a, &part);

    gpu_workspace(gpu, bytes);
    for (part.head = 0; part.head < heads; part.head += part.n_heads, part.prepared = true) {
        part.n_heads = 1 + rng_below(rng, heads - part.head);
        if (!run_rows(gpu, a, rng, part, nq, bytes, why, len))
            return false;
    }
    return true;
}

static bool run_cut(struct gpu *gpu, const struct sage_attn *a, struct rng *rng, char *why,
                    size_t len)
{
    const int64_t groups = sage_attn_groups(a);

    for (int64_t g = 0; g < groups;) {
        const struct sage_part part = {
            .group = g, .n_groups = 1 + rng_below(rng, groups - g), .n_rows = -1};
        const bool pieces = rng_below(rng, 2);

        if (!(pieces ? run_group(gpu, a, rng, g, why, len) : run_alone(gpu, a, &part, why, len)))
            return false;
        g += pieces ? 1 : part.n_groups;
    }
    return true;
}

static void run_cpu(struct gpu *gpu, struct problem *p)
{
    struct sage_attn a = attn_in_image(p, p->cpu);

    a.variant = p->fp8 ? SAGE_INT8_FP8 : SAGE_INT8_FP16;
    a.smooth_v = a.smooth_v && p->fp8;
    memcpy(p->cpu, p->host, p->used);
    if (p->exact)
        return;
    const size_t bytes = sage_attn_workspace(&a, NULL);
    void *workspace = aligned_alloc(64, bytes + 64);
    if (sage_attn_cpu(gpu->pool, &a, NULL, workspace, bytes)) {
        fprintf(stderr, "gpu_attn: sage_attn_cpu failed\n");
        exit(1);
    }
    free(workspace);
}

/* --- judging --- */

/*
 * How far the two may be apart. They have the same INT8 numbers but for steps that flip where K's
 * means, summed in another order, differ in their last bits; `flip` is what one step does to a
 * score. P differs by rounding, for the maximum that it refers to depends on the size of the key
 * blocks and on how the maximum follows. Rounding of P and o, relative: binary16 2^-11, bfloat16
 * 2^-8 at most; of P in e4m3 2^-4 at most and 1/38 on average, on both sides independently. An
 * average over a head's rows is known to one part in the root of how many there are.
 *
 * Few rows, beside double precision: P and o are rounded, the rest is binary32; `flip` is how far
 * the sum of a score may be off, and beside_mask() what a mask's number does to it.
 */
struct bounds {
    double l1, element, flip_l1, flip_element;
};

static struct bounds bounds_of(const struct problem *p)
{
    const struct sage_attn *a = &p->attn;

    if (p->exact)
        return a->q.dtype == SAGE_F16 ? (struct bounds){6e-4, 1.2e-3, 1, 1}
                                      : (struct bounds){4e-3, 9e-3, 1, 1};
    if (p->fp8)
        return (struct bounds){0.05, 0.05, 0.02, 0.2};
    if (a->q.dtype == SAGE_F16)
        return (struct bounds){1e-3, 2e-3, 0.02, 0.2};
    return (struct bounds){6e-3, 1e-2, 0.02, 0.2};
}

/* What one head is judged by. */
struct head {
    const struct problem *p;
    struct rng *rng;
    struct sage_attn cpu, gpu; /* in the images */
    struct sage_seq seq;
    int64_t b, h, kv;
    bool may_spoil; /* a NaN or Inf in its q, or in k or v of its group: NaN is allowed */
    double vmax;    /* of the group, largest |v|: what errors of o are measured against */
    double kmax;    /* of the group, largest |k| */
    double flip;    /* see bounds_of() */
    struct bounds bounds;
    const double *o64,
        *lse64;       /* few rows: what is right, [Hq][nq][D]; else NULL: what the CPU says */
    double diff, sum; /* sum of |gpu - cpu| and of |cpu|, over n elements */
    int64_t n;
    struct distance *far;
    char *why;
    size_t len;
};

static double mask_at(const struct sage_attn *a, int64_t b, int64_t h, int64_t i, int64_t j)
{
    const int64_t *s = a->mask.shape;
    const double x =
        ref64_get(&a->mask, s[0] == 1 ? 0 : b, s[1] == 1 ? 0 : h, s[2] == 1 ? 0 : i, j);

    return a->mask.dtype == SAGE_BOOL && x == 0 ? -INFINITY : x;
}

static bool sees(const struct head *t, int64_t i, int64_t j)
{
    const struct sage_attn *a = &t->cpu;

    return ref64_sees(a, t->seq.nq, t->seq.nk, i, j) &&
           (!a->mask.dtype || mask_at(a, t->b, t->h, i, j) != -INFINITY);
}

static double wanted_o(const struct head *t, int64_t i, int64_t c)
{
    const int64_t d = t->cpu.q.shape[3];

    return t->o64 ? t->o64[(t->h * t->seq.nq + i) * d + c]
                  : ref64_get(&t->cpu.o, t->seq.batch, t->h, t->seq.q0 + i, c);
}

static double wanted_lse(const struct head *t, int64_t i)
{
    return t->lse64 ? t->lse64[t->h * t->seq.nq + i]
                    : ref64_get(&t->cpu.lse, t->seq.batch, t->h, t->seq.q0 + i, 0);
}

/* Does row i see no key at all? */
static bool blind(const struct head *t, int64_t i)
{
    int64_t first, last;

    sage_attn_band(&t->cpu, &t->seq, i, &first, &last);
    while (first < last && t->cpu.mask.dtype && mask_at(&t->cpu, t->b, t->h, i, first) == -INFINITY)
        first++;
    return first >= last;
}

/* Must row i be NaN (of an Inf or NaN in v: in its channel)? */
static bool must_spoil(const struct head *t, int64_t i)
{
    const struct spoil *s = &t->p->spoil;

    if (t->p->overflows)
        return true;
    if (!t->may_spoil)
        return false;
    if (t->o64 && s->which < 2 && isinf(s->value)) /* as a softmax has it; without weights NaN */
        return isnan(wanted_o(t, i, 0)) || wanted_lse(t, i) == -INFINITY;
    if (s->which == 0)
        return s->head == t->h && s->row == i;
    return sees(t, i, s->row);
}

static bool is_poison(const struct sage_tensor *t, int64_t b, int64_t h, int64_t i, int64_t c)
{
    const int64_t at = b * t->stride[0] + h * t->stride[1] + i * t->stride[2] + c;
    const char *base = (const char *)t->data + t->offset;
    const uint16_t *bits = (const uint16_t *)(base + at * (int64_t)sage_dtype_size(t->dtype));

    return bits[0] == POISON && (t->dtype != SAGE_F32 || bits[1] == POISON);
}

/*
 * Where all that a row sees has a mask's -65504 or the like, scores are rounded beside that. With
 * one beyond 2^17 the mask has swallowed them, also in double precision.
 */
static double beside_mask(const struct head *t, int64_t i)
{
    return t->lse64 && t->cpu.mask.dtype ? fmin(fabs(wanted_lse(t, i)), 0x1p17) * 0x1p-22 : 0;
}

static bool check_element(struct head *t, int64_t i, int64_t c, bool is_blind, bool must)
{
    const int64_t row = t->seq.q0 + i, b = t->seq.batch;
    const double got = ref64_get(&t->gpu.o, b, t->h, row, c);
    const double wanted = wanted_o(t, i, c);
    const double diff = fabs(got - wanted);
    const double beside = beside_mask(t, i);
    const double bound =
        t->vmax * (t->bounds.element + t->bounds.flip_element * t->flip + beside) + 0x1p-24;

    if (is_poison(&t->gpu.o, b, t->h, row, c))
        return fail(t->why, t->len, "o[%lld,%lld,%lld,%lld] was not written", (long long)t->b,
                    (long long)t->h, (long long)i, (long long)c);
    if (is_blind ? got == 0
        : must
            ? isnan(got)
            : (t->may_spoil && (isnan(got) || isnan(wanted))) || (got != got && wanted != wanted))
        return true;
    if (!is_blind && !must && diff <= bound && (t->p->kind != KIND_ONES || got == 1)) {
        t->far->element_of_bound = fmax(t->far->element_of_bound, diff / bound);
        if (beside > t->bounds.l1 / 4)
            return true; /* one such row would be most of the head's error */
        /* of fp64, the smallest numbers of binary16 stand half a step beside */
        t->diff += t->o64 && t->cpu.q.dtype == SAGE_F16 ? fmax(diff - 0x1p-25, 0) : diff;
        t->sum += fabs(wanted);
        t->n++;
        return true;
    }
    return fail(t->why, t->len, "o[%lld,%lld,%lld,%lld] = %.6g, %s %.6g (bound %.2g)%s",
                (long long)t->b, (long long)t->h, (long long)i, (long long)c, got,
                t->o64 ? "in fp64" : "on the CPU", wanted, bound,
                is_blind ? ", its row sees nothing: must be 0"
                : must   ? ", its row sees what is not finite: must be NaN"
                         : "");
}

static bool check_lse(struct head *t, int64_t i, bool is_blind, bool must)
{
    const int64_t row = t->seq.q0 + i, b = t->seq.batch;
    const double got = ref64_get(&t->gpu.lse, b, t->h, row, 0);
    const double wanted = wanted_lse(t, i);
    const double diff = fabs(got - wanted);
    const double bound = t->lse64 ? 2e-5 + t->flip + 0x1p-20 * fabs(wanted)
                                  : 1e-3 + 0.1 * t->flip + 1e-5 * fabs(wanted);
    const bool unwritten = is_poison(&t->gpu.lse, b, t->h, row, 0);

    if (!unwritten && is_blind && got == -INFINITY)
        return true;
    if (!unwritten && !is_blind && isnan(got) && (isnan(wanted) || t->may_spoil || must))
        return true;
    if (!unwritten && !is_blind && !(must && t->p->spoil.which < 2) &&
        ((t->may_spoil && isnan(wanted)) || diff <= bound)) {
        t->far->lse = fmax(t->far->lse, diff / (1 + 1e-2 * fabs(wanted))); /* NaN: no news */
        return true;
    }
    return fail(t->why, t->len, "lse[%lld,%lld,%lld] = %.8g, %s %.8g%s%s", (long long)t->b,
                (long long)t->h, (long long)i, got, t->lse64 ? "in fp64" : "on the CPU", wanted,
                unwritten ? ", was not written" : "", is_blind ? ", its row sees nothing" : "");
}

static bool check_row(struct head *t, int64_t i)
{
    const bool is_blind = blind(t, i), must = !is_blind && must_spoil(t, i);
    const struct spoil *s = &t->p->spoil;

    for (int64_t c = 0; c < t->cpu.q.shape[3]; c++)
        if (!check_element(t, i, c, is_blind, must && (s->which < 2 || s->c == c)))
            return false;
    return !t->cpu.lse.dtype || check_lse(t, i, is_blind, must);
}

/* The largest finite magnitude in some rows of a head. */
static double largest(const struct sage_tensor *t, int64_t b, int64_t h, int64_t row, int64_t rows)
{
    double top = 0;

    for (int64_t i = row; i < row + rows; i++)
        for (int64_t c = 0; c < t->shape[3]; c++) {
            const double x = fabs(ref64_get(t, b, h, i, c));

            top = isfinite(x) && x > top ? x : top;
        }
    return top;
}

static bool check_head(struct head *t)
{
    const struct spoil *s = &t->p->spoil;
    struct distance *far = t->far;
    const int64_t gqa = t->cpu.q.shape[1] / t->cpu.k.shape[1];

    t->kv = t->h / gqa;
    t->may_spoil =
        s->which >= 0 && s->b == t->b && (s->which == 0 ? s->head / gqa : s->head) == t->kv;
    if (t->h % gqa == 0) {
        t->vmax = largest(&t->cpu.v, t->seq.batch, t->kv, t->seq.k0, t->seq.nk);
        t->kmax = t->o64 ? largest(&t->cpu.k, t->seq.batch, t->kv, t->seq.k0, t->seq.nk) : 0;
    }
    t->flip = t->p->flip;
    if (t->o64) /* as many steps of binary32, of the largest product, as there are products */
        t->flip = (double)(sage_attn_scale(&t->cpu) * (float)t->cpu.q.shape[3]) * 0x1p-24 *
                  t->kmax * largest(&t->cpu.q, t->seq.batch, t->h, t->seq.q0, t->seq.nq);
    t->diff = t->sum = 0;
    t->n = 0;
    for (int64_t i = 0; i < t->seq.nq; i++)
        if (!check_row(t, i))
            return false;
    if (t->n == 0)
        return true;
    const double n = (double)t->n, few = 1 + 8 / sqrt(n);
    const double floor = n * (1e-3 * t->vmax + 0x1p-25), l1 = t->diff / (t->sum + floor);
    const double bound = few * (t->bounds.l1 + t->bounds.flip_l1 * t->flip);

    far->mean_l1 = (far->mean_l1 * (double)far->heads + l1) / (double)(far->heads + 1);
    far->heads++;
    far->l1 = fmax(far->l1, l1);
    far->l1_of_bound = fmax(far->l1_of_bound, l1 / bound);
    return l1 <= bound || fail(t->why, t->len, "batch %lld head %lld: relL1 %.5f, bound %.5f",
                               (long long)t->b, (long long)t->h, l1, bound);
}

/* A few rows against double precision: to see that both are right. */
static bool check64(struct head *t, int rows)
{
    const double loose = t->p->fp8 ? 0.1 : 0.05;
    double r[SAGE_MAX_HEAD_DIM];

    for (int n = 0; n < rows && t->seq.nq; n++) {
        const int64_t i = rng_below(t->rng, t->seq.nq), d = t->cpu.q.shape[3];
        const double lse = ref64_row(&t->cpu, t->b, t->h, i, r);

        for (int64_t c = 0; c < d && isfinite(lse); c++) {
            const double got = ref64_get(&t->gpu.o, t->seq.batch, t->h, t->seq.q0 + i, c);

            if (isnan(ref64_get(&t->cpu.o, t->seq.batch, t->h, t->seq.q0 + i, c)))
                continue;
            if (!(fabs(got - r[c]) <= t->vmax * (loose + 2 * t->p->flip) + 0x1p-24))
                return fail(t->why, t->len, "o[%lld,%lld,%lld,%lld] = %.6g, in fp64 %.6g",
                            (long long)t->b, (long long)t->h, (long long)i, (long long)c, got,
                            r[c]);
        }
    }
    return true;
}

/* Outside o and lse the image is what it was. Takes o and lse away. */
static bool check_rest(struct problem *p, char *why, size_t len)
{
    const struct sage_attn before = attn_in_image(p, p->host), after = attn_in_image(p, p->gpu);
    const struct sage_tensor *from[] = {&before.o, &before.lse}, *to[] = {&after.o, &after.lse};

    for (int i = 0; i < 2; i++)
        for (int64_t b = 0; to[i]->dtype && b < to[i]->shape[0]; b++)
            for (int64_t h = 0; h < to[i]->shape[1]; h++)
                for (int64_t n = 0; n < to[i]->shape[2]; n++) {
                    const int64_t at =
                        (b * to[i]->stride[0] + h * to[i]->stride[1] + n * to[i]->stride[2]) *
                            (int64_t)sage_dtype_size(to[i]->dtype) +
                        (int64_t)to[i]->offset;

                    memcpy((char *)to[i]->data + at, (char *)from[i]->data + at,
                           (size_t)to[i]->shape[3] * sage_dtype_size(to[i]->dtype));
                }
    if (!memcmp(p->gpu, p->host, p->used))
        return true;
    size_t at = 0;
    int slot = 0;

    while (p->gpu[at] == p->host[at])
        at++;
    while (slot + 1 < p->n_slots && at + GUARD >= p->slots[slot + 1].start)
        slot++;
    return fail(why, len, "wrote outside o and lse: slot %d of %zu bytes, byte %lld", slot,
                p->slots[slot].bytes, (long long)at - (long long)p->slots[slot].start);
}

/* All rows of batch b in double precision. */
static void in_fp64(struct head *t, double **o, double **lse)
{
    const int64_t n = t->cpu.q.shape[1] * t->seq.nq, d = t->cpu.q.shape[3];
    int64_t(*where)[2] = malloc(sizeof *where * (size_t)(n + 1));

    *o = malloc(sizeof **o * (size_t)(n * d + 1));
    *lse = malloc(sizeof **lse * (size_t)(n + 1));
    for (int64_t i = 0; i < n; i++) {
        where[i][0] = i / t->seq.nq;
        where[i][1] = i % t->seq.nq;
    }
    rows_in_fp64(&t->cpu, t->b, where, n, *o, *lse);
    t->o64 = *o;
    t->lse64 = *lse;
    free(where);
}

static bool judge_batch(struct head *t, int rows64)
{
    double *o = NULL, *lse = NULL;
    bool good = true;

    t->seq = sage_attn_seq(&t->p->attn, t->b);
    if (t->p->exact)
        in_fp64(t, &o, &lse);
    for (t->h = 0; t->h < t->p->attn.q.shape[1] && good; t->h++)
        good = check_head(t) && (o || t->p->spoil.which >= 0 || check64(t, rows64));
    free(o);
    free(lse);
    return good;
}

static bool judge(struct problem *p, int rows64, struct distance *far, char *why, size_t len)
{
    struct head t = {.p = p,
                     .rng = &p->rng,
                     .cpu = attn_in_image(p, p->cpu),
                     .gpu = attn_in_image(p, p->gpu),
                     .bounds = bounds_of(p),
                     .far = far,
                     .why = why,
                     .len = len};
    const int64_t batches = p->attn.n_seqs ? p->attn.n_seqs : p->attn.q.shape[0];

    for (t.b = 0; t.b < batches; t.b++)
        if (!judge_batch(&t, rows64))
            return false;
    return true;
}

void gpu_ask(struct problem *p, const struct sage_attn *on_device)
{
    const int kernel = sage_cuda_kernel(on_device);
    const char *variant = kernel < 0 ? "" : sage_kernels[kernel].variant;

    p->exact = !strcmp(variant, "any");
    p->fp8 = !strcmp(variant, "int8_fp8");
}

bool gpu_compare(struct gpu *gpu, struct problem *p, int rows64, struct distance *far, char *why,
                 size_t len)
{
    *far = (struct distance){0};
    run_cpu(gpu, p);
    return judge(p, rows64, far, why, len) && check_rest(p, why, len);
}

bool gpu_judge(struct gpu *gpu, struct problem *p, int rows64, struct distance *far, char *why,
               size_t len)
{
    const struct sage_attn a = gpu_attn(p);

    gpu_ask(p, &a);
    gpu_download(gpu, p);
    gpu_release(gpu, p);
    return gpu_compare(gpu, p, rows64, far, why, len);
}

bool gpu_check(struct gpu *gpu, struct problem *p, int rows64, struct distance *far, char *why,
               size_t len)
{
    char text[256];

    *far = (struct distance){0};
    if (sage_attn_check(&p->attn, text, sizeof text))
        return fail(why, len, "sage_attn_check: %s", text);
    gpu_upload(gpu, p);
    const struct sage_attn a = gpu_attn(p);

    if (!(p->cut ? run_cut(gpu, &a, &p->rng, why, len) : run_alone(gpu, &a, NULL, why, len))) {
        gpu_release(gpu, p);
        return false;
    }
    return gpu_judge(gpu, p, rows64, far, why, len);
}
