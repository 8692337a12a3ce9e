/*
 * stage.c - tensors in memory that cannot be shared: copied to memory of our own that can be, and
 * back, on the caller's stream.
 */
#include "client/client.h"

#include <stdlib.h>
#include <string.h>

#include "kernels/problem.h"

enum {
    ALIGN = 256,           /* of tensors in a block: as the driver aligns allocations */
    GRAIN = 2 << 20,       /* blocks are multiples of what the driver allocates at least */
    PITCH_MAX = INT32_MAX, /* CU_DEVICE_ATTRIBUTE_MAX_PITCH of all devices so far */
};

/* --- how to copy a tensor; no CUDA here --- */

/* Dimensions that are more than one element long, the one with the smallest step first. */
static int sort_dims(const struct sage_tensor *t, int order[3])
{
    int n = 0;

    for (int i = 2; i >= 0; i--) {
        if (t->shape[i] <= 1)
            continue;
        int k = n++;
        for (; k > 0 && t->stride[order[k - 1]] > t->stride[i]; k--)
            order[k] = order[k - 1];
        order[k] = i;
    }
    return n;
}

/* A dimension whose elements follow those of the one inside it is one with it. */
static void merge(struct stage_plan *plan)
{
    int n = 0;

    for (int i = 0; i < plan->n; i++) {
        if (n == 0 && plan->dim[i].step == plan->width)
            plan->width *= plan->dim[i].extent;
        else if (n > 0 && plan->dim[i].step == plan->dim[n - 1].step * plan->dim[n - 1].extent)
            plan->dim[n - 1].extent *= plan->dim[i].extent;
        else
            plan->dim[n++] = plan->dim[i];
    }
    plan->n = n;
}

bool stage_plan(const struct sage_tensor *t, struct stage_plan *plan)
{
    const size_t size = sage_dtype_size(t->dtype);
    uint64_t dense = (uint64_t)t->shape[3], reach = dense; /* elements up to here, inside out */
    int order[3], n = sort_dims(t, order);

    *plan = (struct stage_plan){.width = size * dense, .stride = {0, 0, 0, 1}};
    for (int k = 0; k < n; k++) {
        const int i = order[k];
        const uint64_t stride = (uint64_t)t->stride[i], extent = (uint64_t)t->shape[i];
        if (stride < reach)
            return false;
        plan->dim[k].extent = extent;
        plan->dim[k].step = size * stride;
        plan->dim[k].dense = size * dense;
        plan->stride[i] = (int64_t)dense;
        reach += stride * (extent - 1); /* no more than the tensor's own extent */
        dense *= extent;
    }
    plan->n = n;
    plan->bytes = size * dense;
    merge(plan);
    return true;
}

/* Rows along dimension `row`, slices along `slice`; -1: just one. */
static int each_box(const struct stage_plan *plan, size_t offset, size_t dense, int row, int slice,
                    int (*each)(void *arg, const struct stage_box *box), void *arg)
{
    struct stage_box box = {.width = plan->width,
                            .height = 1,
                            .depth = 1,
                            .offset = offset,
                            .dense_offset = dense,
                            .row = plan->width,
                            .dense_row = plan->width};

    if (row >= 0) {
        box.height = plan->dim[row].extent;
        box.row = plan->dim[row].step;
        box.dense_row = plan->dim[row].dense;
    }
    box.slice = box.row * box.height;
    box.dense_slice = box.dense_row * box.height;
    if (slice >= 0) {
        box.depth = plan->dim[slice].extent;
        box.slice = plan->dim[slice].step;
        box.dense_slice = plan->dim[slice].dense;
    }
    return each(arg, &box);
}

/* The dimensions from `left` - 1 to `done` by a loop, the inner ones at once. */
static int loop(const struct stage_plan *plan, int left, int done, size_t offset, size_t dense,
                int (*each)(void *arg, const struct stage_box *box), void *arg)
{
    int rc = 0;

    if (left == done)
        return each_box(plan, offset, dense, done > 0 ? 0 : -1, done > 1 ? 1 : -1, each, arg);
    for (size_t i = 0; !rc && i < plan->dim[left - 1].extent; i++)
        rc = loop(plan, left - 1, done, offset + i * plan->dim[left - 1].step,
                  dense + i * plan->dim[left - 1].dense, each, arg);
    return rc;
}

int stage_boxes(const struct stage_plan *plan, int (*each)(void *arg, const struct stage_box *box),
                void *arg)
{
    int done = plan->n < 2 ? plan->n : 2;

    /* CUDA counts the distance of slices in rows, on both sides. */
    if (done == 2 &&
        (plan->dim[1].step % plan->dim[0].step || plan->dim[1].dense % plan->dim[0].dense))
        done = 1;
    if (done > 0 && plan->dim[0].step > PITCH_MAX)
        done = 0;
    return loop(plan, plan->n, done, 0, 0, each, arg);
}

/* --- blocks --- */

/* Its context may be gone by now, and the memory with it. */
static void free_block(const struct driver *cu, struct stage_block *b, bool connected)
{
    struct CUctx_st *context;

    if (!driver_enter(cu, &b->context))
        cu = NULL;
    if (cu && b->passed)
        cu->cuEventSynchronize(b->passed);
    if (b->buffer && connected)
        sage_buffer_free(b->buffer);
    else if (b->buffer)
        buffer_discard(b->buffer);
    if (cu) {
        if (b->own)
            cu->cuStreamDestroy(b->own);
        if (b->passed)
            cu->cuEventDestroy(b->passed);
        if (b->base)
            cu->cuMemFree(b->base);
        cu->cuCtxPopCurrent(&context);
    }
    *b = (struct stage_block){.taken = b->taken};
}

/* Device memory that the daemon maps too; the context is current. */
static int fill_block(struct gpu_job *job, struct stage_block *b, size_t bytes)
{
    const struct driver *cu = job->cu;

    b->context = job->context;
    b->bytes = (bytes + GRAIN - 1) / GRAIN * GRAIN;
    int rc = driver_check(cu->cuMemAlloc(&b->base, b->bytes), "staging: %zu bytes", b->bytes);
    if (!rc)
        rc = driver_check(cu->cuEventCreate(&b->passed, CU_EVENT_UNTIMED), "staging: event");
    if (!rc)
        rc = driver_check(cu->cuStreamCreate(&b->own, CU_STREAM_ASIDE), "staging: stream");
    struct sage_buffer *buffer = rc ? NULL : calloc(1, sizeof(*buffer));
    if (!rc && !buffer)
        rc = error_set(SAGE_ENOMEM, "out of memory");
    if (rc)
        return rc;
    *buffer = (struct sage_buffer){
        .client = job->client, .kind = BUFFER_CUDA_IPC, .fd = -1, .size = b->bytes};
    if (driver_check(cu->cuIpcGetMemHandle(&buffer->handle, b->base), "staging: cuIpcGetMemHandle"))
        rc = SAGE_EHANDLE;
    if (!rc)
        rc = buffer_add(buffer);
    if (rc == SAGE_EQUOTA || rc == SAGE_ENOMEM) { /* as enter() in register.c */
        gpu_evict(job->client, 0);
        rc = buffer_add(buffer);
    }
    if (rc)
        buffer_discard(buffer);
    else
        b->buffer = buffer;
    return rc;
}

/* With `lock` held. While there is no connection, a daemon that threw us out may be at it yet. */
static bool suits(const struct gpu_job *job, const struct stage_block *b, size_t bytes)
{
    const struct sage_client *c = job->client;

    return b->buffer && b->bytes >= bytes && context_is(&b->context, &job->context) &&
           client_state(c) == LINK_LIVE && b->buffer->epoch == c->epoch;
}

/* How little a block suits: the stream's last one needs no wait, and an empty one none either. */
static int unfitness(const struct gpu_job *job, const struct stage_block *b, size_t bytes)
{
    if (suits(job, b, bytes))
        return b->last == job->stream ? 0 : 2;
    return b->buffer ? 3 : 1;
}

static struct stage_block *find_block(struct gpu_job *job, size_t bytes)
{
    struct stage_block *best = NULL;

    for (int i = 0; i < STAGE_BLOCKS; i++) {
        struct stage_block *b = &job->client->gpu.blocks[i];
        if (!b->taken && (!best || unfitness(job, b, bytes) < unfitness(job, best, bytes)))
            best = b;
    }
    return best;
}

static void give_block(struct sage_client *c, struct stage_block *b)
{
    pthread_mutex_lock(&c->lock);
    b->taken = false;
    pthread_cond_broadcast(&c->changed);
    pthread_mutex_unlock(&c->lock);
}

static int take_block(struct gpu_job *job, size_t bytes)
{
    struct sage_client *c = job->client;
    struct stage_block *b;

    pthread_mutex_lock(&c->lock);
    while (!(b = find_block(job, bytes)))
        pthread_cond_wait(&c->changed, &c->lock);
    b->taken = true;
    bool good = suits(job, b, bytes);
    pthread_mutex_unlock(&c->lock);
    int rc = 0;
    if (!good) {
        free_block(job->cu, b, true);
        rc = fill_block(job, b, bytes);
    }
    struct CUstream_st *stream = job->stream == GPU_NO_STREAM ? b->own : job->stream;
    if (!rc)
        rc = driver_check(job->cu->cuStreamWaitEvent(stream, b->passed, 0),
                          "staging: cuStreamWaitEvent");
    if (rc) {
        free_block(job->cu, b, true);
        give_block(c, b);
        return rc;
    }
    b->last = job->stream = stream;
    job->block = b;
    return 0;
}

static bool is_idle(const struct driver *cu, const struct stage_block *b)
{
    struct CUctx_st *context;

    if (!driver_enter(cu, &b->context))
        return true; /* all that was in it is gone */
    bool idle = cu->cuEventQuery(b->passed) == CU_OK;
    cu->cuCtxPopCurrent(&context);
    return idle;
}

void stage_trim(struct sage_client *c, const struct driver *cu, bool all)
{
    for (int i = 0; i < STAGE_BLOCKS; i++) {
        struct stage_block *b = &c->gpu.blocks[i];
        pthread_mutex_lock(&c->lock);
        bool mine = b->context.cu && !b->taken;
        b->taken |= mine;
        pthread_mutex_unlock(&c->lock);
        if (mine && (all || is_idle(cu, b)))
            free_block(cu, b, !all);
        if (mine)
            give_block(c, b);
    }
}

/* --- copying --- */

struct copy {
    struct gpu_job *job;
    uint64_t theirs, ours;
    bool back;
};

static int copy_box(void *arg, const struct stage_box *box)
{
    const struct copy *copy = arg;
    const struct driver *cu = copy->job->cu;
    struct cu_copy_end theirs = {.type = CU_MEMORY_UNIFIED,
                                 .device = copy->theirs + box->offset,
                                 .pitch = box->row,
                                 .height = box->slice / box->row};
    struct cu_copy_end ours = {.type = CU_MEMORY_UNIFIED,
                               .device = copy->ours + box->dense_offset,
                               .pitch = box->dense_row,
                               .height = box->dense_slice / box->dense_row};
    struct cu_copy_end *to = copy->back ? &theirs : &ours, *from = copy->back ? &ours : &theirs;

    if (box->height == 1 && box->depth == 1)
        return driver_check(
            cu->cuMemcpyAsync(to->device, from->device, box->width, copy->job->stream),
            "staging: %zu bytes", box->width);
    struct cu_copy c = {*from, *to, box->width, box->height, box->depth};
    return driver_check(cu->cuMemcpy3DAsync(&c, copy->job->stream), "staging: %zu x %zu x %zu",
                        box->width, box->height, box->depth);
}

/* How tensor i is copied. Where it has no dense form, all of its span is, as it is. */
static int plan_of(struct gpu_job *job, int i, struct stage_plan *plan)
{
    const struct sage_tensor *t = tensor_of(&job->theirs, i);
    int64_t bytes;

    if (stage_plan(t, plan))
        return 0;
    if (i == TENSOR_O || i == TENSOR_LSE)
        return error_set(SAGE_EUNSUPPORTED, "%s.stride: its elements overlap", tensor_names[i]);
    sage_tensor_bytes(t, &bytes);
    *plan = (struct stage_plan){.width = (size_t)bytes, .bytes = (size_t)bytes};
    memcpy(plan->stride, t->stride, sizeof(plan->stride));
    return 0;
}

static int copy(struct gpu_job *job, int i, bool back)
{
    struct copy copy = {.job = job,
                        .theirs = (uint64_t)(uintptr_t)tensor_of(&job->theirs, i)->data,
                        .ours = job->block->base + job->places[i].offset,
                        .back = back};
    struct stage_plan plan;
    int rc = plan_of(job, i, &plan);

    return rc ? rc : stage_boxes(&plan, copy_box, &copy);
}

/* Lay the tensors out one behind the other; their sizes and strides are known then. */
static int lay_out(struct gpu_job *job, size_t *bytes)
{
    struct stage_plan plan;

    *bytes = 0;
    for (int i = 0; i < N_TENSORS; i++) {
        if (!job->places[i].staged)
            continue;
        int rc = plan_of(job, i, &plan);
        if (rc)
            return rc;
        memcpy(tensor_of(&job->attn, i)->stride, plan.stride, sizeof(plan.stride));
        job->places[i].offset = *bytes;
        job->staged += plan.bytes;
        *bytes += (plan.bytes + ALIGN - 1) / ALIGN * ALIGN;
    }
    return 0;
}

int stage_in(struct gpu_job *job)
{
    size_t bytes;
    int rc = lay_out(job, &bytes);

    if (rc || !bytes)
        return rc;
    rc = take_block(job, bytes);
    for (int i = 0; !rc && i < N_TENSORS; i++) {
        struct place *p = &job->places[i];
        if (!p->staged)
            continue;
        p->set = true;
        p->buffer = job->block->buffer->id;
        tensor_of(&job->attn, i)->data = (void *)(uintptr_t)(job->block->base + p->offset);
        if (i != TENSOR_O && i != TENSOR_LSE)
            rc = copy(job, i, false);
    }
    return rc;
}

int stage_out(struct gpu_job *job)
{
    int rc = 0;

    for (int i = TENSOR_O; !rc && i < N_TENSORS; i++)
        if (job->places[i].staged && (i == TENSOR_O || i == TENSOR_LSE))
            rc = copy(job, i, true);
    return rc;
}

void stage_end(struct gpu_job *job)
{
    if (!job->block)
        return;
    job->cu->cuEventRecord(job->block->passed, job->stream);
    give_block(job->client, job->block);
    job->block = NULL;
}
