/*
 * ctl_work.c - attention on random inputs where the daemon can reach them, and what it comes to in
 * double precision.
 */
#include "client/ctl_work.h"

#include <math.h>
#include <stdint.h>
#include <stdlib.h>
#include <string.h>
#include <time.h>

#include "client/conn.h"
#include "kernels/half.h"
#include "kernels/problem.h"

/* --- the problem --- */

enum { ALIGNMENT = 256 };

static struct sage_tensor tensor(enum sage_dtype dtype, int64_t batch, int64_t heads, int64_t n,
                                 int64_t d)
{
    return (struct sage_tensor){
        .dtype = dtype, .shape = {batch, heads, n, d}, .stride = {heads * n * d, n * d, d, 1}};
}

static int64_t count(const struct sage_tensor *t)
{
    return t->shape[0] * t->shape[1] * t->shape[2] * t->shape[3];
}

size_t spec_describe(const struct spec *s, char *base, struct sage_attn *attn, size_t *results)
{
    enum { TENSORS = 5 };
    struct sage_tensor *const tensors[TENSORS] = {&attn->q, &attn->k, &attn->v, &attn->o,
                                                  &attn->lse};
    double elements = (double)s->batch * (double)s->dim *
                      ((double)s->heads * (double)s->nq + (double)s->kv_heads * (double)s->nk);
    size_t bytes = 0;

    *attn = (struct sage_attn)SAGE_ATTN_INIT;
    if (elements > 0x1p38) /* twice of them, at 2 bytes */
        return 0;
    attn->q = attn->o = tensor(s->dtype, s->batch, s->heads, s->nq, s->dim);
    attn->k = attn->v = tensor(s->dtype, s->batch, s->kv_heads, s->nk, s->dim);
    if (s->lse)
        attn->lse = tensor(SAGE_F32, s->batch, s->heads, s->nq, 1);
    for (int i = 0; i < TENSORS; i++) {
        struct sage_tensor *t = tensors[i];
        if (t == &attn->o)
            *results = bytes;
        t->data = (void *)((uintptr_t)base + bytes);
        bytes += (size_t)count(t) * sage_dtype_size(t->dtype);
        bytes = (bytes + ALIGNMENT - 1) / ALIGNMENT * ALIGNMENT;
    }
    attn->variant = s->variant;
    attn->causal = s->causal;
    attn->diagonal = SAGE_BOTTOM_RIGHT;
    return bytes;
}

double spec_limit(const struct spec *spec)
{
    return spec->variant == SAGE_INT8_FP8 ? 0.15 : 0.05;
}

/* Uniform with variance 1; any generator will do. */
static void fill(uint16_t *x, int64_t n, enum sage_dtype dtype, uint64_t seed)
{
    for (int64_t i = 0; i < n; i++) {
        seed = seed * 6364136223846793005u + 1442695040888963407u;
        float f = (float)((double)(seed >> 11) / 4503599627370496.0 - 1) * 1.7320508f;
        x[i] = dtype == SAGE_F16 ? f16_from_f32(f) : bf16_from_f32(f);
    }
}

/* --- where it lies --- */

/* Our own copy of what a tensor holds. */
static void *here(const struct work *w, const struct sage_tensor *t)
{
    return w->here + ((char *)t->data - w->there);
}

/* Streams that do not wait for that of old may use it at once: wait for it here. */
static int copy_there(const struct work *w, size_t from, size_t to)
{
    const struct driver *cu = w->gpu.cu;

    if (!cu) {
        memcpy(w->there + from, w->here + from, to - from);
        return 0;
    }
    int result = cu->cuMemcpyHtoD((uintptr_t)w->there + from, w->here + from, to - from);
    return driver_check(result ? result : cu->cuStreamSynchronize(NULL), "copy");
}

static void let_go(struct work *w)
{
    if (w->gpu.cu && w->there)
        w->gpu.cu->cuMemFree((uintptr_t)w->there);
    sage_buffer_free(w->buffer);
    free(w->here);
    w->buffer = NULL;
    w->here = w->there = NULL;
}

static int allocate(struct work *w)
{
    uint64_t memory = 0;
    int rc;

    w->here = malloc(w->bytes);
    if (!w->here)
        return error_set(SAGE_ENOMEM, "out of memory");
    if (w->gpu.cu) {
        rc = driver_check(w->gpu.cu->cuMemAlloc(&memory, w->bytes), "cuMemAlloc");
        w->there = (char *)(uintptr_t)memory;
        return rc;
    }
    rc = sage_buffer_alloc(w->client, w->bytes, &w->buffer);
    if (!rc)
        w->there = sage_buffer_data(w->buffer);
    return rc;
}

int work_open(struct work *w, const char *socket, const char *name)
{
    struct sage_connect_options options = {.socket = socket, .name = name, .retry_ms = 2000};
    struct sage_server server;

    *w = (struct work){0};
    int rc = sage_connect(&options, &w->client);
    if (!rc)
        rc = sage_server_info(w->client, &server);
    if (!rc && server.uuid[0]) {
        struct device gpu;
        rc = device_open(&gpu, server.uuid);
        if (!rc) {
            w->gpu = gpu;
            rc = driver_check(gpu.cu->cuStreamCreate(&w->stream, CU_STREAM_ASIDE), "stream");
        }
    }
    return rc ? rc : sage_lane_create(w->client, &w->lane);
}

/* The client first: it lets streams go on, and its buffers go with it. Then what it looked at. */
void work_close(struct work *w)
{
    sage_disconnect(w->client);
    w->buffer = NULL;
    let_go(w);
    if (w->stream)
        w->gpu.cu->cuStreamDestroy(w->stream);
    if (w->gpu.cu)
        device_close(&w->gpu);
    *w = (struct work){0};
}

int work_make(struct work *w, const struct spec *spec)
{
    const struct sage_tensor *const inputs[] = {&w->attn.q, &w->attn.k, &w->attn.v};

    let_go(w);
    w->bytes = spec_describe(spec, NULL, &w->attn, &w->results);
    int rc = w->bytes ? allocate(w) : error_set(SAGE_ENOMEM, "more than a terabyte of tensors");
    if (rc)
        return rc;
    spec_describe(spec, w->there, &w->attn, &w->results);
    memset(w->here, 0xff, w->bytes);
    for (int i = 0; i < 3; i++)
        fill(here(w, inputs[i]), count(inputs[i]), spec->dtype, 3 * spec->seed + (uint64_t)i);
    return copy_there(w, 0, w->bytes);
}

int work_poison(struct work *w)
{
    memset(w->here + w->results, 0xff, w->bytes - w->results);
    return copy_there(w, w->results, w->bytes);
}

int work_fetch(struct work *w)
{
    size_t bytes = w->bytes - w->results;

    if (!w->gpu.cu) {
        memcpy(w->here + w->results, w->there + w->results, bytes);
        return 0;
    }
    return driver_check(
        w->gpu.cu->cuMemcpyDtoH(w->here + w->results, (uintptr_t)w->there + w->results, bytes),
        "copy");
}

enum { JOB_S = 10 };

/* Not sage_attn_run(): that waits as long as it takes. */
int work_run(struct work *w, struct sage_times *times)
{
    struct sage_job job;
    int rc = sage_attn_submit(w->lane, &w->attn, times ? SAGE_TIMES : 0, &job);

    if (!rc)
        rc = sage_wait(job, JOB_S * 1000);
    return rc || !times ? rc : sage_job_times(job, times);
}

/* Not cuStreamSynchronize(): likewise. It is looked all the time while a job may take so long. */
int work_await(struct work *w, int jobs)
{
    const struct driver *cu = w->gpu.cu;
    const int64_t start = clock_ns(), sleep_ns = 50 * 1000000,
                  most_ns = jobs * JOB_S * INT64_C(1000000000);
    struct CUevent_st *event;
    int rc = driver_check(cu->cuEventCreate(&event, CU_EVENT_UNTIMED), "cuEventCreate");

    if (rc)
        return rc;
    int result = cu->cuEventRecord(event, w->stream);
    if (!result)
        while ((result = cu->cuEventQuery(event)) == CU_NOT_READY && clock_ns() - start < most_ns)
            if (clock_ns() - start > sleep_ns)
                nanosleep(&(struct timespec){.tv_nsec = 1000000}, NULL);
    cu->cuEventDestroy(event);
    if (result == CU_NOT_READY)
        return error_set(SAGE_ETIMEDOUT, "the stream's jobs are not over after %d s", jobs * JOB_S);
    rc = driver_check(result, "stream");
    return rc ? rc : sage_stream_error(w->client, w->stream);
}

/* --- what it comes to --- */

/* Row `row` of the tensor's head, as numbers. */
static void read_row(const struct work *w, const struct sage_tensor *t, const int64_t at[3],
                     double *out)
{
    const uint16_t *x = here(w, t);

    x += at[0] * t->stride[0] + at[1] * t->stride[1] + at[2] * t->stride[2];
    for (int64_t c = 0; c < t->shape[3]; c++)
        out[c] = (double)(t->dtype == SAGE_F16 ? f16_to_f32(x[c]) : bf16_to_f32(x[c]));
}

/* One row in double precision: o[D], and its log-sum-exp as the result. score: room for Nk. */
static double attend(const struct work *w, const int64_t at[3], double *o, double *score)
{
    const struct sage_attn *a = &w->attn;
    const int64_t dim = a->q.shape[3], share = a->q.shape[1] / a->k.shape[1];
    const struct sage_seq seq = sage_attn_seq(a, at[0]);
    double q[SAGE_MAX_HEAD_DIM], x[SAGE_MAX_HEAD_DIM], max = -INFINITY, sum = 0;
    int64_t first, last, key[3] = {at[0], at[1] / share, 0};

    sage_attn_band(a, &seq, at[2], &first, &last);
    read_row(w, &a->q, at, q);
    memset(o, 0, (size_t)dim * sizeof(*o));
    for (int64_t j = first; j < last; j++) {
        key[2] = j;
        read_row(w, &a->k, key, x);
        score[j] = 0;
        for (int64_t c = 0; c < dim; c++)
            score[j] += q[c] * x[c];
        score[j] *= (double)sage_attn_scale(a);
        max = fmax(max, score[j]);
    }
    for (int64_t j = first; j < last; j++) {
        double weight = exp(score[j] - max);
        key[2] = j;
        read_row(w, &a->v, key, x);
        sum += weight;
        for (int64_t c = 0; c < dim; c++)
            o[c] += weight * x[c];
    }
    for (int64_t c = 0; c < dim && sum > 0; c++)
        o[c] /= sum;
    return max + log(sum);
}

/* The larger one, or NaN if there is one. */
static double worse(double a, double b)
{
    return isnan(a) || a >= b ? a : b;
}

static double lse_error(const struct work *w, const int64_t at[3], double wanted)
{
    const struct sage_tensor *t = &w->attn.lse;

    if (t->dtype == SAGE_NONE)
        return 0;
    float got = ((const float *)here(w, t))[at[0] * t->stride[0] + at[1] * t->stride[1] + at[2]];
    return (double)got == wanted ? 0 : fabs((double)got - wanted); /* -inf: it saw no key */
}

int work_judge(const struct work *w, int64_t *rows, double *relative, double *lse)
{
    const int64_t *shape = w->attn.o.shape, all = shape[0] * shape[1] * shape[2];
    const int64_t n = all < *rows ? all : *rows;
    double error = 0, size = 0, got[SAGE_MAX_HEAD_DIM], o[SAGE_MAX_HEAD_DIM];
    double *score = malloc((size_t)w->attn.k.shape[2] * sizeof(*score));

    if (!score)
        return error_set(SAGE_ENOMEM, "out of memory");
    *lse = 0;
    for (int64_t i = 0; i < n; i++) {
        int64_t row = n > 1 ? (int64_t)((double)i / (double)(n - 1) * (double)(all - 1)) : 0;
        int64_t at[3] = {row / shape[2] / shape[1], row / shape[2] % shape[1], row % shape[2]};
        *lse = worse(*lse, lse_error(w, at, attend(w, at, o, score)));
        read_row(w, &w->attn.o, at, got);
        for (int64_t c = 0; c < shape[3]; c++) {
            error += fabs(got[c] - o[c]);
            size += fabs(o[c]);
        }
    }
    free(score);
    *relative = error == 0 ? 0 : error / size;
    *rows = n;
    return 0;
}
