/*
 * stats.c - counters, times and the table of kernels.
 */
#include "daemon/stats.h"

#include <stdio.h>
#include <string.h>

static unsigned bucket_of(uint64_t ns)
{
    if (ns < 8)
        return (unsigned)ns;
    unsigned octave = 63 - (unsigned)__builtin_clzll(ns);
    return 8 * (octave - 2) + (unsigned)(ns >> (octave - 3) & 7);
}

static double bucket_end(unsigned bucket)
{
    if (bucket < 8)
        return bucket + 1;
    return (double)(9 + bucket % 8) * (double)(UINT64_C(1) << (bucket / 8 - 1));
}

void hist_add(struct hist *hist, uint64_t ns)
{
    hist->total++;
    hist->bucket[bucket_of(ns)]++;
}

void hist_fade(struct hist *hist, uint64_t most)
{
    if (hist->total < most)
        return;
    hist->total = 0;
    for (unsigned i = 0; i < HIST_BUCKETS; i++)
        hist->total += hist->bucket[i] /= 2;
}

double hist_percentile_us(const struct hist *hist, double share)
{
    uint64_t below = 0;
    double wanted = share * (double)hist->total;

    for (unsigned i = 0; i < HIST_BUCKETS; i++) {
        below += hist->bucket[i];
        if (below > 0 && (double)below >= wanted)
            return bucket_end(i) / 1e3;
    }
    return 0;
}

void stats_kernel(struct stats *stats, const char *name, double ops, uint64_t run_ns)
{
    struct msg_kernel *k = stats->kernels, *end = k + stats->n_kernels;

    while (k < end && strcmp(k->name, name))
        k++;
    if (k == stats->kernels + KERNELS_MAX)
        k--;
    if (k == end) {
        stats->n_kernels++;
        snprintf(k->name, sizeof(k->name), "%s", stats->n_kernels == KERNELS_MAX ? "other" : name);
    }
    k->jobs++;
    k->ops += ops;
    k->run_ns += run_ns;
}

static void fill_times(const struct hist *hist, double *p50, double *p99, double *p999)
{
    *p50 = hist_percentile_us(hist, 0.5);
    *p99 = hist_percentile_us(hist, 0.99);
    *p999 = hist_percentile_us(hist, 0.999);
}

void stats_fill(const struct stats *stats, uint64_t now_ns, struct msg_stats *msg)
{
    msg->uptime_ns = now_ns - stats->started_ns;
    msg->clients_total = stats->clients_total;
    msg->clients_dropped = stats->clients_dropped;
    msg->accepted = stats->accepted;
    msg->done = stats->done;
    msg->refused = stats->refused;
    msg->canceled = stats->canceled;
    msg->dropped = stats->dropped;
    msg->ahead = stats->ahead;
    msg->missed = stats->missed;
    msg->failed = stats->failed;
    msg->ops = stats->ops;
    msg->run_ns = stats->run_ns;
    msg->staged_bytes = stats->staged_bytes;
    msg->slots_peak = stats->slots_peak;
    msg->workspace_peak = stats->workspace_peak;
    fill_times(&stats->queue, &msg->queue_p50_us, &msg->queue_p99_us, &msg->queue_p999_us);
    fill_times(&stats->run, &msg->run_p50_us, &msg->run_p99_us, &msg->run_p999_us);
    fill_times(&stats->total, &msg->total_p50_us, &msg->total_p99_us, &msg->total_p999_us);
    msg->n_kernels = stats->n_kernels;
    memcpy(msg->kernels, stats->kernels, stats->n_kernels * sizeof(stats->kernels[0]));
}
