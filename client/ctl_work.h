/*
 * ctl_work.h - attention on random inputs where the daemon can reach them, and what it comes to in
 * double precision: what doctor and bench let the daemon compute.
 */
#ifndef SAGE_CTL_WORK_H
#define SAGE_CTL_WORK_H

#include "client/driver.h"
#include "client/sageclient.h"

/* A problem; rows see keys from the bottom right if it is causal. */
struct spec {
    int64_t batch, heads, kv_heads, nq, nk, dim;
    enum sage_dtype dtype; /* SAGE_F16 or SAGE_BF16 */
    enum sage_variant variant;
    bool causal, lse;
    uint64_t seed; /* of the inputs */
};

/* A connection, and the memory of one problem: device memory where the daemon has a GPU. */
struct work {
    struct sage_client *client;
    struct sage_lane *lane;
    struct device gpu; /* cu: NULL where there is none */
    struct CUstream_st *stream;
    struct sage_buffer *buffer; /* on the CPU */
    char *there, *here;         /* q, k, v, o, lse as the daemon sees them; a copy of our own */
    size_t bytes, results;      /* all of it; where o begins, followed by lse */
    struct sage_attn attn;      /* of what is there */
};

/*
 * Describe the problem with its tensors one behind the other from `base` on: the bytes it takes,
 * up to o in *results. Nothing is looked at. 0: they are more than a terabyte.
 */
size_t spec_describe(const struct spec *spec, char *base, struct sage_attn *attn, size_t *results);

/* How far a result may be off: several times what INT8 scores and the variant's P V cost here. */
double spec_limit(const struct spec *spec);

/* Connect, and open the daemon's GPU if it has one. 0 or a SAGE_E*, with this thread's error text;
 * work_close() in any case. */
int work_open(struct work *work, const char *socket, const char *name);
void work_close(struct work *work);

/* Make the problem, in place of the one before. */
int work_make(struct work *work, const struct spec *spec);
/* Write NaN where the results are to be: what is not written shows. */
int work_poison(struct work *work);
/* Get the results. */
int work_fetch(struct work *work);

/* Submit one job and wait for it, 10 s at most. times: NULL, or what the daemon measured. */
int work_run(struct work *work, struct sage_times *times);
/* Wait for so many jobs on the stream, 10 s for each at most, and hear what became of them. */
int work_await(struct work *work, int jobs);

/*
 * Judge the fetched results by some rows, spread evenly: the sum of |error| over that of |o|, and
 * the largest error of lse. NaN if there is any. *rows: how many at most, then how many it were.
 * SAGE_ENOMEM.
 */
int work_judge(const struct work *work, int64_t *rows, double *relative, double *lse);

#endif
