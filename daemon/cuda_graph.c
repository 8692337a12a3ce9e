/*
 * cuda_graph.c - pieces that come again. A client computes the same problem in the same memory over
 * and over; launching its kernels takes several calls each time, a graph of them one.
 *
 * All that is in a graph follows from the piece and the stream's workspace, so nothing makes one
 * wrong, not even the end of the buffers: whoever comes with the same addresses means them.
 */
#include <stdlib.h>
#include <string.h>

#include "daemon/backend_cuda.h"

enum { GRAPHS_MAX = 64 }; /* of a stream; each takes about 100 KiB of the device's memory */

struct graphs {
    struct graph list[GRAPHS_MAX];
    struct sage_cuda_stamp *stamps; /* pinned; of each */
    uint64_t clock;
};

struct graphs *graphs_create(void)
{
    struct graphs *graphs = calloc(1, sizeof(*graphs));

    if (!graphs)
        return NULL;
    if (cudaHostAlloc((void **)&graphs->stamps, GRAPHS_MAX * sizeof(graphs->stamps[0]),
                      cudaHostAllocPortable | cudaHostAllocMapped)) {
        cudaGetLastError();
        free(graphs);
        return NULL;
    }
    for (int i = 0; i < GRAPHS_MAX; i++)
        graphs->list[i].stamp = &graphs->stamps[i];
    return graphs;
}

static void clear(struct graph *graph)
{
    if (graph->exec)
        cudaGraphExecDestroy(graph->exec);
    graph->exec = NULL;
    graph->useless = false;
}

void graphs_destroy(struct graphs *graphs)
{
    for (int i = 0; i < GRAPHS_MAX; i++)
        clear(&graphs->list[i]);
    cudaFreeHost(graphs->stamps);
    free(graphs);
}

/* Field by field where there is padding. */
static bool same_attn(const struct sage_attn *a, const struct sage_attn *b)
{
    return !memcmp(a, b, offsetof(struct sage_attn, scale)) && a->scale == b->scale &&
           a->variant == b->variant && a->smooth_k == b->smooth_k && a->smooth_v == b->smooth_v &&
           a->rotate_qk == b->rotate_qk && a->causal == b->causal && a->diagonal == b->diagonal &&
           a->window_left == b->window_left && a->window_right == b->window_right;
}

static bool same_part(const struct sage_part *a, const struct sage_part *b)
{
    return a->group == b->group && a->n_groups == b->n_groups && a->row == b->row &&
           a->n_rows == b->n_rows && a->head == b->head && a->n_heads == b->n_heads &&
           a->prepared == b->prepared;
}

static bool is_of(const struct graph *graph, const struct piece *piece)
{
    return graph->used && graph->waits == (piece->wait_ns > 0) &&
           same_attn(&graph->attn, piece->attn) && same_part(&graph->part, &piece->part);
}

struct graph *graph_take(struct graphs *graphs, const struct piece *piece)
{
    struct graph *oldest = NULL;

    if (piece->attn->n_seqs > 0) /* the offsets are copied when it is launched */
        return NULL;
    for (int i = 0; i < GRAPHS_MAX; i++) {
        struct graph *graph = &graphs->list[i];
        if (graph->taken)
            continue;
        if (is_of(graph, piece)) {
            graph->used = ++graphs->clock;
            graph->taken = !graph->useless;
            return graph->taken ? graph : NULL;
        }
        if (!oldest || graph->used < oldest->used)
            oldest = graph;
    }
    if (oldest) {
        clear(oldest);
        oldest->attn = *piece->attn;
        oldest->part = piece->part;
        oldest->waits = piece->wait_ns > 0;
        oldest->used = ++graphs->clock;
    }
    return NULL;
}

void graph_put(struct graph *graph)
{
    if (graph)
        graph->taken = false;
}

int graph_begin(struct graph *graph, cudaStream_t stream)
{
    /* Relaxed: what threads of the pool call meanwhile is none of it. */
    cudaError_t rc = cudaStreamBeginCapture(stream, cudaStreamCaptureModeRelaxed);

    if (!rc)
        return 0;
    cudaGetLastError();
    graph->useless = true;
    return rc;
}

int graph_end(struct graph *graph, cudaStream_t stream, bool good)
{
    cudaGraph_t recorded = NULL;
    cudaError_t rc = cudaStreamEndCapture(stream, &recorded);

    if (!rc && good)
        rc = cudaGraphInstantiate(&graph->exec, recorded, 0);
    if (recorded)
        cudaGraphDestroy(recorded);
    graph->useless = !graph->exec;
    cudaGetLastError();
    return graph->exec ? cudaSuccess : rc ? rc : cudaErrorUnknown;
}

/* --- nothing --- */

/*
 * After a millisecond of sleep a launch takes some 10 us longer, after ten 20 us: little of the
 * driver is in the caches then. Launching nothing a moment before brings it back.
 */

void warm_open(struct device *d)
{
    struct graph *nothing = &d->nothing;

    if (cudaHostAlloc((void **)&nothing->stamp, sizeof(*nothing->stamp), cudaHostAllocMapped)) {
        cudaGetLastError();
        return;
    }
    *nothing->stamp = (struct sage_cuda_stamp){0};
    if (!graph_begin(nothing, d->probe))
        graph_end(nothing, d->probe, !sage_cuda_stamp_end(nothing->stamp, d->code, d->probe));
}

void warm_close(struct device *d)
{
    if (!d->nothing.stamp)
        return;
    cudaStreamSynchronize(d->probe);
    clear(&d->nothing);
    cudaFreeHost(d->nothing.stamp);
}

void warm(struct device *d, bool running)
{
    /*
     * Without MPS the device would leave whatever another process computes for it. And where others
     * leave it no room on the device it must not pile up.
     */
    if (d->nothing.exec && (running || d->mps) && cudaStreamQuery(d->probe) == cudaSuccess)
        cudaGraphLaunch(d->nothing.exec, d->probe);
    cudaGetLastError();
}
