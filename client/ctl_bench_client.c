/*
 * ctl_bench_client.c - one client process of sagectl bench: jobs one behind the other, as many in
 * flight as it was told, and a look at what came out before and after.
 */
#include "client/ctl_bench.h"

#include <math.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <time.h>

#include "client/conn.h"
#include "kernels/half.h"

/* --- times --- */

static unsigned bucket_of(uint64_t ns)
{
    if (ns < 64)
        return (unsigned)ns;
    unsigned octave = 63 - (unsigned)__builtin_clzll(ns);
    unsigned bucket = 64 * (octave - 5) + (unsigned)(ns >> (octave - 6) & 63);
    return bucket < LAPS_BUCKETS ? bucket : LAPS_BUCKETS - 1;
}

static double bucket_end(unsigned bucket)
{
    if (bucket < 64)
        return bucket + 1;
    return (double)(65 + bucket % 64) * (double)(UINT64_C(1) << (bucket / 64 - 1));
}

void laps_add(struct laps *laps, int64_t ns)
{
    laps->total++;
    laps->bucket[bucket_of(ns > 0 ? (uint64_t)ns : 0)]++;
}

void laps_merge(struct laps *laps, const struct laps *other)
{
    laps->total += other->total;
    for (int i = 0; i < LAPS_BUCKETS; i++)
        laps->bucket[i] += other->bucket[i];
}

double laps_percentile(const struct laps *laps, double share)
{
    uint64_t below = 0;

    for (unsigned i = 0; i < LAPS_BUCKETS; i++) {
        below += laps->bucket[i];
        if (below > 0 && (double)below >= share * (double)laps->total)
            return bucket_end(i);
    }
    return 0;
}

/* --- jobs in flight: on a lane, or on a stream with an event behind each --- */

struct flight {
    struct work work;
    const struct order *order;
    struct bench *bench;
    struct bench_client *self;
    uint64_t submitted, over;
    struct {
        int64_t start_ns;
        struct sage_job job;
        struct CUevent_st *event;
    } jobs[BENCH_DEPTH];
};

static int finish(struct flight *f)
{
    unsigned i = (unsigned)(f->over % (unsigned)f->order->depth);
    const struct driver *cu = f->work.gpu.cu;
    int rc = cu ? driver_check(cu->cuEventSynchronize(f->jobs[i].event), "cuEventSynchronize")
                : sage_wait(f->jobs[i].job, -1);

    f->over++;
    laps_add(&f->self->job, clock_ns() - f->jobs[i].start_ns);
    return rc;
}

static int hand_over(struct flight *f, unsigned i)
{
    struct work *w = &f->work;

    return w->gpu.cu ? sage_attn_enqueue(w->client, &w->attn, w->stream)
                     : sage_attn_submit(w->lane, &w->attn, 0, &f->jobs[i].job);
}

/* Without a credit, or room in the socket, the jobs before have to end first. */
static int submit(struct flight *f)
{
    unsigned i = (unsigned)(f->submitted % (unsigned)f->order->depth);
    const struct driver *cu = f->work.gpu.cu;
    int rc;

    while (f->jobs[i].start_ns = clock_ns(), (rc = hand_over(f, i)) == SAGE_EBUSY) {
        if (atomic_load(&f->bench->stop))
            return error_set(SAGE_ECANCELED, "interrupted");
        if (f->over < f->submitted)
            rc = finish(f);
        else
            nanosleep(&(struct timespec){.tv_nsec = 100000}, NULL);
        if (rc && rc != SAGE_EBUSY)
            return rc;
    }
    laps_add(&f->self->submit, clock_ns() - f->jobs[i].start_ns);
    if (!rc && cu)
        rc = driver_check(cu->cuEventRecord(f->jobs[i].event, f->work.stream), "cuEventRecord");
    f->submitted += !rc;
    return rc;
}

/* Is the oldest one over? Looked at after each call, for in mode sync the call waits. */
static bool is_over(const struct flight *f)
{
    unsigned i = (unsigned)(f->over % (unsigned)f->order->depth);
    const struct driver *cu = f->work.gpu.cu;

    if (f->over == f->submitted)
        return false;
    return cu ? cu->cuEventQuery(f->jobs[i].event) != CU_NOT_READY
              : sage_wait(f->jobs[i].job, 0) != SAGE_ETIMEDOUT;
}

static int fly(struct flight *f)
{
    int64_t start = clock_ns(), end = start + (int64_t)(f->order->seconds * 1e9);
    int rc = 0;

    while (!rc && !atomic_load(&f->bench->stop) && clock_ns() < end) {
        if (f->submitted - f->over == (unsigned)f->order->depth)
            rc = finish(f);
        if (!rc)
            rc = submit(f);
        while (!rc && is_over(f))
            rc = finish(f);
    }
    rc = rc == SAGE_ECANCELED ? 0 : rc;
    while (!rc && f->over < f->submitted)
        rc = finish(f);
    f->self->took_ns = clock_ns() - start;
    f->self->jobs = f->over;
    return !rc && f->work.gpu.cu ? sage_stream_error(f->work.client, f->work.stream) : rc;
}

/* --- results --- */

/* The sum of |difference| over that of |before|; NaN if there is any. */
static double drift(const uint16_t *now, const uint16_t *before, int64_t n, enum sage_dtype dtype)
{
    double difference = 0, size = 0;

    for (int64_t i = 0; i < n; i++) {
        double a = (double)(dtype == SAGE_F16 ? f16_to_f32(now[i]) : bf16_to_f32(now[i]));
        double b = (double)(dtype == SAGE_F16 ? f16_to_f32(before[i]) : bf16_to_f32(before[i]));
        difference += fabs(a - b);
        size += fabs(b);
    }
    return difference == 0 ? 0 : difference / size;
}

/* Fetch and judge; *first: what came the first time, or NULL, and then it is made. */
static int check(struct flight *f, void **first)
{
    struct bench_client *self = f->self;
    struct work *w = &f->work;
    const int64_t *shape = w->attn.o.shape, n = shape[0] * shape[1] * shape[2] * shape[3];
    double limit = spec_limit(&f->order->spec), relative, lse;
    int64_t rows = BENCH_ROWS;

    int rc = work_fetch(w);
    if (!rc)
        rc = work_judge(w, &rows, &relative, &lse);
    if (rc)
        return rc;
    const uint16_t *o = (const uint16_t *)(w->here + w->results);
    self->rows += rows;
    self->relative = self->relative >= relative ? self->relative : relative;
    if (!(relative <= limit))
        return error_set(SAGE_EINTERNAL, "wrong results: off by %.2f %% of fp64 (limit %.0f %%)",
                         100 * relative, 100 * limit);
    if (*first) {
        self->drift = drift(o, *first, n, f->order->spec.dtype);
        if (!(self->drift <= limit))
            return error_set(SAGE_EINTERNAL, "wrong results: %.2f %% off those of the first job",
                             100 * self->drift);
        return 0;
    }
    *first = malloc((size_t)n * sizeof(*o) + 1);
    if (!*first)
        return error_set(SAGE_ENOMEM, "out of memory");
    memcpy(*first, o, (size_t)n * sizeof(*o));
    return 0;
}

/* --- from the beginning to the end --- */

/* Inputs differ from client to client: results that were mixed up are wrong ones. */
static int prepare(struct flight *f, const char *name, int index, void **first)
{
    struct spec spec = f->order->spec;
    const struct driver *cu;
    int rc = work_open(&f->work, f->order->socket, name);

    spec.seed = (uint64_t)index + 1;
    if (!rc)
        rc = work_make(&f->work, &spec);
    cu = f->work.gpu.cu;
    for (int i = 0; !rc && cu && i < f->order->depth; i++)
        rc = driver_check(cu->cuEventCreate(&f->jobs[i].event, CU_EVENT_UNTIMED), "cuEventCreate");
    if (!rc)
        rc = submit(f); /* as those that count: it registers the memory, and warms up */
    if (!rc)
        rc = finish(f);
    if (!rc && cu) /* a stream goes on, whatever became of the job */
        rc = sage_stream_error(f->work.client, f->work.stream);
    if (!rc)
        rc = check(f, first);
    f->submitted = f->over = 0;
    memset(&f->self->job, 0, sizeof(f->self->job));
    memset(&f->self->submit, 0, sizeof(f->self->submit));
    return rc ? rc : work_poison(&f->work);
}

static void enter(struct bench_client *self, enum bench_phase phase, const _Atomic bool *until)
{
    atomic_store(&self->phase, phase);
    while (until && !atomic_load(until))
        nanosleep(&(struct timespec){.tv_nsec = 200000}, NULL);
}

void bench_name(int pid, int index, char name[BENCH_NAME])
{
    snprintf(name, BENCH_NAME, "bench %d.%d", pid, index);
}

int bench_run_client(const struct order *order, int parent, int index, struct bench *bench)
{
    struct bench_client *self = &bench->client[index];
    static struct flight f;
    void *first = NULL;
    char name[BENCH_NAME];

    f = (struct flight){.order = order, .bench = bench, .self = self};
    bench_name(parent, index, name);
    int rc = prepare(&f, name, index, &first);
    if (!rc) {
        enter(self, BENCH_READY, &bench->go);
        rc = fly(&f);
        enter(self, BENCH_RAN, NULL);
    }
    if (!rc && self->jobs > 0)
        rc = check(&f, &first);
    if (rc) {
        self->status = rc;
        snprintf(self->text, sizeof(self->text), "%s", sage_last_error());
    }
    enter(self, BENCH_OVER, &bench->leave);
    for (int i = 0; i < BENCH_DEPTH; i++)
        if (f.jobs[i].event)
            f.work.gpu.cu->cuEventDestroy(f.jobs[i].event);
    work_close(&f.work);
    free(first);
    return rc ? 1 : 0;
}
