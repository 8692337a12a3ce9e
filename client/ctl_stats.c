/*
 * ctl_stats.c - the daemon's statistics: for people, as JSON, for Prometheus.
 */
#include "client/ctl.h"

#include <getopt.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <time.h>
#include <unistd.h>

enum format { FORMAT_TEXT, FORMAT_JSON, FORMAT_PROMETHEUS };

int sample_take(struct ctl *ctl, struct sample *s)
{
    struct msg_empty empty = {0};
    int rc = ctl->conn.fd < 0 ? ctl_connect(ctl) : 0;

    if (!rc)
        rc = conn_call(&ctl->conn, OP_STATS, MSG_EMPTY, &empty, NULL, MSG_STATS, &s->stats);
    s->taken_ns = clock_ns();
    return rc ? rc : clients_fetch(ctl, &s->clients, &s->n_clients);
}

double sample_seconds(const struct sample *s, const struct sample *before)
{
    if (!before->taken_ns || s->stats.uptime_ns < before->stats.uptime_ns)
        return 0;
    return (double)(s->taken_ns - before->taken_ns) / 1e9;
}

/* --- for people --- */

static void print_jobs(const struct msg_stats *s)
{
    printf("jobs        %llu accepted, %llu done, %llu failed, %llu refused, %llu cancelled, "
           "%llu dropped\n",
           (unsigned long long)s->accepted, (unsigned long long)s->done,
           (unsigned long long)s->failed, (unsigned long long)s->refused,
           (unsigned long long)s->canceled, (unsigned long long)s->dropped);
    printf("now         %u waiting, %u running; %u of %u slots in use, %u at most\n", s->queued,
           s->running, s->slots_used, s->slots, s->slots_peak);
    if (s->ahead)
        printf("ahead       %llu started before their inputs were seen to be ready, %llu of them "
               "in vain\n",
               (unsigned long long)s->ahead, (unsigned long long)s->missed);
    printf("throughput  %s TOPS while computing (operations / run time, per slot)\n",
           text_tops(s->ops, (double)s->run_ns).s);
}

static void print_rates(const struct msg_stats *s, const struct msg_stats *b, double seconds)
{
    printf("last %-6s %.1f accepted/s, %.1f done/s, %.1f failed/s, %.1f refused/s; %s TOPS\n",
           text_ns(seconds * 1e9).s, (double)(s->accepted - b->accepted) / seconds,
           (double)(s->done - b->done) / seconds, (double)(s->failed - b->failed) / seconds,
           (double)(s->refused - b->refused) / seconds,
           text_tops(s->ops - b->ops, seconds * 1e9).s);
}

static void print_times(const char *name, double p50, double p99, double p999)
{
    printf("  %-9s %10s %10s %10s\n", name, text_ns(p50 * 1e3).s, text_ns(p99 * 1e3).s,
           text_ns(p999 * 1e3).s);
}

static void print_memory(const struct msg_stats *s)
{
    printf("workspace   %s a slot, %s used at most\n", text_bytes((double)s->slot_bytes).s,
           text_bytes((double)s->workspace_peak).s);
    printf("buffers     %u registered, %s mapped, %s staged\n", s->buffers,
           text_bytes((double)s->mapped_bytes).s, text_bytes((double)s->staged_bytes).s);
    printf("clients     %u connected, %llu so far, %llu thrown out\n", s->clients,
           (unsigned long long)s->clients_total, (unsigned long long)s->clients_dropped);
}

static void print_kernels(const struct msg_stats *s)
{
    printf("\n%-40s %10s %10s %8s\n", "KERNEL", "JOBS", "TIME", "TOPS");
    for (uint32_t i = 0; i < s->n_kernels; i++) {
        const struct msg_kernel *k = &s->kernels[i];
        printf("%-40s %10llu %10s %8s\n", k->name, (unsigned long long)k->jobs,
               text_ns((double)k->run_ns).s, text_tops(k->ops, (double)k->run_ns).s);
    }
}

static void print_text(const struct ctl *ctl, const struct sample *now, const struct sample *before)
{
    const struct msg_welcome *w = &ctl->welcome;
    const struct msg_stats *s = &now->stats;
    double seconds = sample_seconds(now, before);

    printf("sageattnd   %s, %s for %s, pid %llu\n", w->version, s->state,
           text_ns((double)s->uptime_ns).s, (unsigned long long)w->pid);
    printf("backend     %s on %s%s%s\n", w->backend, w->device, w->uuid[0] ? ", " : "", w->uuid);
    print_jobs(s);
    if (seconds > 0)
        print_rates(s, &before->stats, seconds);
    printf("time        %10s %10s %10s\n", "p50", "p99", "p99.9");
    print_times("queue", s->queue_p50_us, s->queue_p99_us, s->queue_p999_us);
    print_times("run", s->run_p50_us, s->run_p99_us, s->run_p999_us);
    print_times("total", s->total_p50_us, s->total_p99_us, s->total_p999_us);
    print_memory(s);
    if (s->n_kernels > 0)
        print_kernels(s);
    if (now->n_clients > 0) {
        putchar('\n');
        clients_print(now->clients, now->n_clients);
    }
}

/* --- as JSON --- */

#define JSON_U32(value) json_integer((json_int_t)(value))
#define JSON_U64(value) json_integer((json_int_t)(value))
#define JSON_F64(value) json_real(value)

static json_t *tops_json(double ops, double ns)
{
    return json_real(ns > 0 ? ops / ns / 1e3 : 0);
}

static json_t *kernels_json(const struct msg_stats *s)
{
    json_t *array = json_array();

    for (uint32_t i = 0; i < s->n_kernels; i++) {
        const struct msg_kernel *k = &s->kernels[i];
        json_array_append_new(array,
                              json_pack("{ss sI sI sf so}", "name", k->name, "jobs",
                                        (json_int_t)k->jobs, "run_ns", (json_int_t)k->run_ns, "ops",
                                        k->ops, "tops", tops_json(k->ops, (double)k->run_ns)));
    }
    return array;
}

static json_t *rates_json(const struct msg_stats *s, const struct msg_stats *b, double seconds)
{
    return json_pack("{sf sf sf sf sf so}", "seconds", seconds, "accepted",
                     (double)(s->accepted - b->accepted) / seconds, "done",
                     (double)(s->done - b->done) / seconds, "failed",
                     (double)(s->failed - b->failed) / seconds, "refused",
                     (double)(s->refused - b->refused) / seconds, "tops",
                     tops_json(s->ops - b->ops, seconds * 1e9));
}

static json_t *sample_json(const struct ctl *ctl, const struct sample *now,
                           const struct sample *before)
{
    const struct msg_welcome *w = &ctl->welcome;
    const struct msg_stats *s = &now->stats;
    double seconds = sample_seconds(now, before);
    json_t *o =
        json_pack("{ss ss ss ss sI ss}", "version", w->version, "backend", w->backend, "device",
                  w->device, "uuid", w->uuid, "pid", (json_int_t)w->pid, "state", s->state);

#define STAT(type, key, unit, help) json_object_set_new(o, #key, JSON_##type(s->key));
    PROTO_STATS(STAT)
#undef STAT
    json_object_set_new(o, "tops", tops_json(s->ops, (double)s->run_ns));
    if (seconds > 0)
        json_object_set_new(o, "per_second", rates_json(s, &before->stats, seconds));
    json_object_set_new(o, "kernels", kernels_json(s));
    json_object_set_new(o, "client_list", clients_json(now->clients, now->n_clients));
    return o;
}

/* --- for Prometheus --- */

#define PROMETHEUS_U32(value) printf("%lu\n", (unsigned long)(value))
#define PROMETHEUS_U64(value) printf("%llu\n", (unsigned long long)(value))
#define PROMETHEUS_F64(value) printf("%.17g\n", value)

static void metric(const char *name, const char *type, const char *text)
{
    printf("# HELP sageattnd_%s %s\n# TYPE sageattnd_%s %s\n", name, text, name, type);
}

static void label(const char *name, const char *value)
{
    printf("%s=\"", name);
    for (; *value; value++) {
        if (*value == '"' || *value == '\\')
            putchar('\\');
        putchar(*value);
    }
    putchar('"');
}

static void kernel_metric(const char *name, const char *kernel, double value)
{
    printf("sageattnd_%s{", name);
    label("kernel", kernel);
    printf("} %.17g\n", value);
}

static void print_prometheus(const struct ctl *ctl, const struct sample *now)
{
    const struct msg_stats *s = &now->stats;

    metric("info", "gauge", "the daemon");
    printf("sageattnd_info{");
    label("version", ctl->welcome.version);
    label(",backend", ctl->welcome.backend);
    label(",device", ctl->welcome.device);
    label(",uuid", ctl->welcome.uuid);
    printf("} 1\n");
    metric("draining", "gauge", "1: takes no new jobs");
    printf("sageattnd_draining %d\n", !strcmp(s->state, "draining"));

#define STAT(type, key, unit, help)                                                                \
    metric(#key, #unit, help);                                                                     \
    printf("sageattnd_%s ", #key);                                                                 \
    PROMETHEUS_##type(s->key);
    PROTO_STATS(STAT)
#undef STAT
    metric("kernel_jobs", "counter", "jobs that a kernel finished");
    for (uint32_t i = 0; i < s->n_kernels; i++)
        kernel_metric("kernel_jobs", s->kernels[i].name, (double)s->kernels[i].jobs);
    metric("kernel_run_ns", "counter", "time that a kernel ran");
    for (uint32_t i = 0; i < s->n_kernels; i++)
        kernel_metric("kernel_run_ns", s->kernels[i].name, (double)s->kernels[i].run_ns);
    metric("kernel_ops", "counter", "operations that a kernel did");
    for (uint32_t i = 0; i < s->n_kernels; i++)
        kernel_metric("kernel_ops", s->kernels[i].name, s->kernels[i].ops);
}

/* --- the command --- */

static void show(const struct ctl *ctl, const struct sample *now, const struct sample *before,
                 enum format format, bool watching)
{
    if (format == FORMAT_JSON) {
        ctl_print_json(sample_json(ctl, now, before), watching);
        return;
    }
    if (watching && isatty(STDOUT_FILENO))
        printf("\033[H\033[2J");
    if (format == FORMAT_PROMETHEUS)
        print_prometheus(ctl, now);
    else
        print_text(ctl, now, before);
    if (watching && !isatty(STDOUT_FILENO))
        putchar('\n');
    fflush(stdout);
}

/* With an interval it goes on for ever, also across a restart of the daemon. */
static int loop(struct ctl *ctl, enum format format, double interval)
{
    struct timespec nap = {(time_t)interval, (long)((interval - (double)(time_t)interval) * 1e9)};
    struct sample before = {0};

    for (;;) {
        struct sample now = {0};
        int code = sample_take(ctl, &now) ? ctl_fail() : CTL_OK;
        if (code == CTL_OK)
            show(ctl, &now, &before, format, interval > 0);
        free(now.clients);
        now.clients = NULL;
        if (interval == 0 || ferror(stdout))
            return code;
        before = code == CTL_OK ? now : (struct sample){0};
        nanosleep(&nap, NULL);
    }
}

int ctl_stats(struct ctl *ctl, int argc, char **argv)
{
    static const struct option options[] = {{"json", no_argument, NULL, 'j'},
                                            {"prometheus", no_argument, NULL, 'p'},
                                            {"watch", required_argument, NULL, 'w'},
                                            {0}};
    enum format format = FORMAT_TEXT;
    double interval = 0;
    int option;

    while ((option = getopt_long(argc, argv, "jpw:", options, NULL)) != -1) {
        if (option == 'j' && format != FORMAT_PROMETHEUS)
            format = FORMAT_JSON;
        else if (option == 'p' && format != FORMAT_JSON)
            format = FORMAT_PROMETHEUS;
        else if (option != 'w' || !ctl_number(argv[0], optarg, 0.01, 86400, &interval))
            return ctl_usage(argv[0]);
    }
    if (optind < argc || (format == FORMAT_PROMETHEUS && interval > 0))
        return ctl_usage(argv[0]);
    return loop(ctl, format, interval);
}
