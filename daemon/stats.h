/*
 * stats.h - counters, times and the table of kernels.
 */
#ifndef SAGE_STATS_H
#define SAGE_STATS_H

#include "proto/proto.h"

/*
 * Times in buckets of 1/8 octave: bucket 8*e + m holds [2^e * (8+m)/8, 2^e * (9+m)/8) ns, so a
 * percentile is off by at most 12.5 %.
 */
enum { HIST_BUCKETS = 8 * 64 };

struct hist {
    uint64_t total;
    uint64_t bucket[HIST_BUCKETS];
};

void hist_add(struct hist *hist, uint64_t ns);
/* Once there are `most` values let half of them count, so that the recent ones prevail. */
void hist_fade(struct hist *hist, uint64_t most);
/*
 * The upper edge of the bucket with the given share of the values below or in it, in us; 0 if
 * empty.
 */
double hist_percentile_us(const struct hist *hist, double share);

struct stats {
    uint64_t started_ns;
    uint64_t clients_total, clients_dropped;
    uint64_t accepted, done, refused, canceled, dropped, failed;
    uint64_t ahead, missed;
    double ops;
    uint64_t run_ns, staged_bytes;
    uint64_t workspace_peak;
    uint32_t slots_peak;
    struct hist queue, run, total;
    uint32_t n_kernels;
    struct msg_kernel kernels[KERNELS_MAX]; /* the last one collects what has no place */
};

/* A finished job of the named kernel. */
void stats_kernel(struct stats *stats, const char *name, double ops, uint64_t run_ns);
/* The part of the STATS reply that is kept here. */
void stats_fill(const struct stats *stats, uint64_t now_ns, struct msg_stats *msg);

#endif
