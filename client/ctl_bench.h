/*
 * ctl_bench.h - what sagectl bench shares with its client processes: an order, and memory that both
 * map for what came of it.
 */
#ifndef SAGE_CTL_BENCH_H
#define SAGE_CTL_BENCH_H

#include <stdatomic.h>

#include "client/ctl_work.h"

enum {
    BENCH_PROCESSES = 256,
    BENCH_DEPTH = 63, /* jobs in flight on a lane */
    BENCH_ROWS = 64,  /* of each client's results, compared with double precision */
    BENCH_NAME = 32,
    BENCH_TEXT = 192,
};

struct order {
    const char *socket;
    struct spec spec;
    int processes, depth;
    double seconds;
};

/*
 * Times in buckets of 1/64 octave: bucket 64*e + m holds [2^e * (64+m)/64, 2^e * (65+m)/64) ns, so
 * a percentile is off by at most 1.6 %.
 */
enum { LAPS_BUCKETS = 64 * 60 };

struct laps {
    uint64_t total;
    uint64_t bucket[LAPS_BUCKETS];
};

void laps_add(struct laps *laps, int64_t ns);
void laps_merge(struct laps *laps, const struct laps *other);
/* The upper edge of the bucket with the given share of the times below or in it, in ns. */
double laps_percentile(const struct laps *laps, double share);

enum bench_phase {
    BENCH_STARTS, /* connects, has its results checked once */
    BENCH_READY,  /* waits for `go` */
    BENCH_RAN,    /* checks its results again */
    BENCH_OVER,   /* waits for `leave` */
};

/* Of one client process; it alone writes, and the others read what came before a later phase. */
struct bench_client {
    _Atomic int phase;
    int status; /* 0 or a SAGE_E*; wrong results are SAGE_EINTERNAL */
    char text[BENCH_TEXT];
    uint64_t jobs;
    int64_t took_ns;         /* from its first submit to its last job's end */
    int64_t rows;            /* compared with double precision, */
    double relative;         /* and how far they were off; */
    double drift;            /* how far all results of the end were from those of the start */
    struct laps job, submit; /* submit to done; of the call alone */
};

/* Mapped by all. */
struct bench {
    _Atomic bool go, stop, leave;
    struct bench_client client[];
};

/* The name under which client `index` of the sagectl with this pid connects. */
void bench_name(int pid, int index, char name[BENCH_NAME]);

/* All of a client process's life. The result is its exit status. */
int bench_run_client(const struct order *order, int parent, int index, struct bench *bench);

#endif
