/*
 * ctl_misc.c - the small commands: ping, health, kernels, drain, version.
 */
#include "config.h"

#include "client/ctl.h"

#include <getopt.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

#include "kernels/kernels.h"

/* Nothing but the command's name. */
static bool has_arguments(int argc, char **argv)
{
    static const struct option options[] = {{0}};

    return getopt_long(argc, argv, "", options, NULL) != -1 || optind < argc;
}

static int compare(const void *a, const void *b)
{
    double x = *(const double *)a, y = *(const double *)b;

    return (x > y) - (x < y);
}

/* Nearest rank: the least sample that no fewer than this share of the samples reach. */
static double percentile(const double *sorted, int n, double share)
{
    int rank = (int)(share * n);

    if (rank < share * n)
        rank++;
    return sorted[rank > 0 ? rank - 1 : 0];
}

int ctl_measure(struct ctl *ctl, double *ns, int count)
{
    struct msg_empty empty = {0};

    for (int i = 0; i < count; i++) {
        int64_t start = clock_ns();
        int rc = conn_call(&ctl->conn, OP_PING, MSG_EMPTY, &empty, NULL, MSG_EMPTY, &empty);
        if (rc)
            return rc;
        ns[i] = (double)(clock_ns() - start);
    }
    qsort(ns, (size_t)count, sizeof(*ns), compare);
    return 0;
}

int ctl_ping(struct ctl *ctl, int argc, char **argv)
{
    static const struct option options[] = {{"count", required_argument, NULL, 'c'}, {0}};
    double number = 100;
    int option;

    while ((option = getopt_long(argc, argv, "c:", options, NULL)) != -1)
        if (option != 'c' || !ctl_number(argv[0], optarg, 1, 1e6, &number))
            return ctl_usage(argv[0]);
    if (optind < argc)
        return ctl_usage(argv[0]);
    int count = (int)number;
    double *ns = malloc((size_t)count * sizeof(*ns));
    if (!ns) {
        error_set(SAGE_ENOMEM, "out of memory");
        return ctl_fail();
    }
    int rc = ctl_connect(ctl);
    if (!rc)
        rc = ctl_measure(ctl, ns, count);
    if (!rc)
        printf("%s: %d round trips: min %s, p50 %s, p99 %s, p99.9 %s, max %s\n", ctl->path, count,
               text_ns(ns[0]).s, text_ns(percentile(ns, count, 0.5)).s,
               text_ns(percentile(ns, count, 0.99)).s, text_ns(percentile(ns, count, 0.999)).s,
               text_ns(ns[count - 1]).s);
    free(ns);
    return rc ? ctl_fail() : CTL_OK;
}

int ctl_health(struct ctl *ctl, int argc, char **argv)
{
    struct msg_empty empty = {0};
    struct msg_stats stats;

    if (has_arguments(argc, argv))
        return ctl_usage(argv[0]);
    int rc = ctl_connect(ctl);
    if (!rc)
        rc = conn_call(&ctl->conn, OP_STATS, MSG_EMPTY, &empty, NULL, MSG_STATS, &stats);
    if (rc) {
        ctl_fail();
        return rc == SAGE_EDRAIN ? CTL_DRAINING : CTL_FAILED;
    }
    puts(stats.state);
    return strcmp(stats.state, "draining") ? CTL_OK : CTL_DRAINING;
}

/* Of this build; no daemon is asked. */
int ctl_kernels(struct ctl *ctl, int argc, char **argv)
{
    (void)ctl;
    if (has_arguments(argc, argv))
        return ctl_usage(argv[0]);
    printf("%-24s %-6s %5s %-5s %-10s %-9s %7s %9s  %s\n", "KERNEL", "ARCH", "DIM", "DTYPE",
           "VARIANT", "TILE", "THREADS", "SHARED", "FEATURES");
    for (int i = 0; i < sage_n_kernels; i++) {
        const struct sage_kernel *k = &sage_kernels[i];
        char arch[32], tile[32];
        snprintf(arch, sizeof(arch), k->max_sm == k->min_sm ? "sm_%d" : "sm_%d+", k->min_sm);
        snprintf(tile, sizeof(tile), "%dx%d", k->tile_q, k->tile_k);
        printf("%-24s %-6s %5d %-5s %-10s %-9s %7d %9d  %s\n", k->name, arch, k->max_head_dim,
               k->dtype, k->variant, tile, k->threads, k->smem_bytes, k->features);
    }
    return CTL_OK;
}

int ctl_drain(struct ctl *ctl, int argc, char **argv)
{
    static const struct option options[] = {{"wait", no_argument, NULL, 'w'}, {0}};
    struct msg_empty empty = {0};
    struct packet packet;
    bool wait = false;
    int option;

    while ((option = getopt_long(argc, argv, "w", options, NULL)) != -1) {
        if (option != 'w')
            return ctl_usage(argv[0]);
        wait = true;
    }
    if (optind < argc)
        return ctl_usage(argv[0]);
    if (ctl_connect(ctl) ||
        conn_call(&ctl->conn, OP_DRAIN, MSG_EMPTY, &empty, NULL, MSG_EMPTY, &empty))
        return ctl_fail();
    int rc = 0;
    while (wait && !rc) /* it closes every connection when the last job is over */
        rc = conn_recv(&ctl->conn, &packet, -1);
    return rc && rc != SAGE_ELOST ? ctl_fail() : CTL_OK;
}

int ctl_version(struct ctl *ctl, int argc, char **argv)
{
    if (has_arguments(argc, argv))
        return ctl_usage(argv[0]);
    printf("sagectl %s, protocol %d.%d\n", PACKAGE_VERSION, PROTO_MAJOR, PROTO_MINOR);
    if (ctl_connect(ctl))
        printf("no answer from a daemon: %s\n", error_text());
    else
        printf("sageattnd %s, protocol %u.%u, %s on %s, pid %llu\n", ctl->welcome.version,
               ctl->welcome.major, ctl->welcome.minor, ctl->welcome.backend, ctl->welcome.device,
               (unsigned long long)ctl->welcome.pid);
    return CTL_OK;
}
