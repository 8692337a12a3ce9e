/*
 * ctl_bench.c - throughput and latency through the daemon, from one or more client processes that
 * are forked off: the order, the wait, the report.
 */
#include "client/ctl_bench.h"

#include <errno.h>
#include <getopt.h>
#include <math.h>
#include <signal.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/mman.h>
#include <sys/prctl.h>
#include <sys/wait.h>
#include <time.h>
#include <unistd.h>

#include "client/ctl.h"
#include "kernels/problem.h"

struct run {
    struct ctl *ctl;
    struct order order;
    struct bench *bench;
    pid_t *pids; /* 0: gone */
    struct sample before, after;
    bool json;
};

/* --- the order --- */

static bool parse_name(const char *text, const char *const *names, int n, int *value)
{
    for (*value = 0; *value < n; ++*value)
        if (names[*value] && !strcmp(text, names[*value]))
            return true;
    fprintf(stderr, "sagectl bench: %s: must be one of", text);
    for (int i = 0; i < n; i++)
        if (names[i])
            fprintf(stderr, " %s", names[i]);
    fputc('\n', stderr);
    return false;
}

static bool parse_option(int option, const char *text, struct run *run)
{
    static const char *const dtypes[] = {[SAGE_F16] = "f16", [SAGE_BF16] = "bf16"};
    static const char *const variants[] = {
        [SAGE_AUTO] = "auto", [SAGE_INT8_FP16] = "int8_fp16", [SAGE_INT8_FP8] = "int8_fp8"};
    enum { MOST = 1 << 28 };
    struct spec *s = &run->order.spec;
    int64_t number;
    int name;

    switch (option) {
    case 't':
        return ctl_number("bench", text, 0.01, 86400, &run->order.seconds);
    case 'e':
        if (!parse_name(text, dtypes, 3, &name))
            return false;
        s->dtype = (enum sage_dtype)name;
        return true;
    case 'v':
        if (!parse_name(text, variants, 3, &name))
            return false;
        s->variant = (enum sage_variant)name;
        return true;
    case 'c':
        return s->causal = true;
    case 'j':
        return run->json = true;
    case 'p':
        if (!ctl_integer("bench", text, 1, BENCH_PROCESSES, &number))
            return false;
        run->order.processes = (int)number;
        return true;
    case 'i':
        if (!ctl_integer("bench", text, 1, BENCH_DEPTH, &number))
            return false;
        run->order.depth = (int)number;
        return true;
    default: {
        int64_t *const extents[] = {&s->batch, &s->heads, &s->kv_heads, &s->nq, &s->nk, &s->dim};
        const char *at = strchr("bqknmd", option);
        return at && ctl_integer("bench", text, 1, MOST, extents[at - "bqknmd"]);
    }
    }
}

static bool parse(int argc, char **argv, struct run *run)
{
    static const struct option options[] = {
        {"processes", required_argument, NULL, 'p'}, {"depth", required_argument, NULL, 'i'},
        {"time", required_argument, NULL, 't'},      {"json", no_argument, NULL, 'j'},
        {"batch", required_argument, NULL, 'b'},     {"heads", required_argument, NULL, 'q'},
        {"kvheads", required_argument, NULL, 'k'},   {"tokens", required_argument, NULL, 'n'},
        {"keys", required_argument, NULL, 'm'},      {"dim", required_argument, NULL, 'd'},
        {"dtype", required_argument, NULL, 'e'},     {"variant", required_argument, NULL, 'v'},
        {"causal", no_argument, NULL, 'c'},          {0}};
    struct spec *s = &run->order.spec;
    int option;

    *s = (struct spec){.batch = 1, .heads = 8, .nq = 1024, .dim = 64, .dtype = SAGE_F16};
    run->order.processes = 1;
    run->order.depth = 4;
    run->order.seconds = 5;
    while ((option = getopt_long(argc, argv, "p:i:t:jb:q:k:n:m:d:e:v:c", options, NULL)) != -1)
        if (option == '?' || !parse_option(option, optarg, run))
            return false;
    s->kv_heads = s->kv_heads ? s->kv_heads : s->heads;
    s->nk = s->nk ? s->nk : s->nq;
    return optind == argc;
}

/* Said once, not by each client. */
static bool is_legal(const struct spec *spec)
{
    struct sage_attn attn;
    size_t results;
    char why[BENCH_TEXT] = "more than a terabyte of tensors";
    char *somewhere = (char *)(uintptr_t)4096;

    if (spec_describe(spec, somewhere, &attn, &results) &&
        !sage_attn_check(&attn, why, sizeof(why)))
        return true;
    fprintf(stderr, "sagectl bench: %s\n", why);
    return false;
}

/* --- the clients --- */

static volatile sig_atomic_t interrupted;

static void interrupt(int signal)
{
    interrupted = signal;
}

/* A second signal does what it does by default. */
static void catch_signals(void)
{
    struct sigaction action = {.sa_handler = interrupt, .sa_flags = SA_RESETHAND};

    sigaction(SIGINT, &action, NULL);
    sigaction(SIGTERM, &action, NULL);
}

/* The terminal's interrupt is for the parent, which says when to stop; no client outlives it. */
static int start_client(struct run *run, int index)
{
    pid_t parent = getpid(), pid = fork();

    if (pid < 0)
        return error_set(SAGE_EINTERNAL, "fork: %s", strerror(errno));
    run->pids[index] = pid;
    if (pid > 0)
        return 0;
    signal(SIGINT, SIG_IGN);
    signal(SIGTERM, SIG_DFL);
    prctl(PR_SET_PDEATHSIG, SIGTERM);
    if (getppid() != parent)
        _exit(1);
    conn_finish(&run->ctl->conn);
    exit(bench_run_client(&run->order, (int)parent, index, run->bench));
}

/* One that ended early has left no status. */
static void look_after(struct run *run, int index)
{
    struct bench_client *client = &run->bench->client[index];
    int status;

    if (!run->pids[index] || waitpid(run->pids[index], &status, WNOHANG) <= 0)
        return;
    run->pids[index] = 0;
    if (atomic_load(&client->phase) == BENCH_OVER)
        return;
    client->status = SAGE_EINTERNAL;
    snprintf(client->text, sizeof(client->text),
             WIFSIGNALED(status) ? "killed by signal %d" : "exit status %d",
             WIFSIGNALED(status) ? WTERMSIG(status) : WEXITSTATUS(status));
    atomic_store(&client->phase, BENCH_OVER);
}

/* Until all clients are so far. One that failed, and an interrupt, stop them all. */
static void await(struct run *run, enum bench_phase phase)
{
    int behind = 1;

    while (behind) {
        behind = 0;
        for (int i = 0; i < run->order.processes; i++) {
            look_after(run, i);
            behind += atomic_load(&run->bench->client[i].phase) < (int)phase;
            if (atomic_load(&run->bench->client[i].phase) == BENCH_OVER &&
                run->bench->client[i].status)
                atomic_store(&run->bench->stop, true);
        }
        if (interrupted)
            atomic_store(&run->bench->stop, true);
        if (behind)
            nanosleep(&(struct timespec){.tv_nsec = 5000000}, NULL);
    }
}

/* Let go of them all, however far they are. */
static void dismiss(struct run *run)
{
    atomic_store(&run->bench->stop, true);
    atomic_store(&run->bench->go, true);
    atomic_store(&run->bench->leave, true);
    for (int i = 0; i < run->order.processes; i++)
        if (run->pids[i] > 0)
            waitpid(run->pids[i], NULL, 0);
}

static int run_clients(struct run *run)
{
    int rc = 0;

    fflush(stdout);
    for (int i = 0; !rc && i < run->order.processes; i++)
        rc = start_client(run, i);
    if (!rc) {
        await(run, BENCH_READY);
        rc = sample_take(run->ctl, &run->before);
    }
    if (!rc) {
        atomic_store(&run->bench->go, true);
        await(run, BENCH_RAN);
        rc = sample_take(run->ctl, &run->after);
        if (rc == SAGE_ELOST) /* one that came in between counts, too */
            rc = sample_take(run->ctl, &run->after);
        await(run, BENCH_OVER);
    }
    dismiss(run);
    return rc;
}

/* --- the report --- */

/* What the table and the JSON say of one client, or of all. */
struct figures {
    uint64_t jobs, counted;             /* those that the daemon counted; for all of them */
    double seconds, ops, share, run_ns; /* share of the device's time; mean run time of a job */
    const struct laps *job, *submit;
};

static const struct msg_client *entry(const struct sample *sample, const char *name)
{
    for (size_t i = 0; i < sample->n_clients; i++)
        if (!strcmp(sample->clients[i].name, name))
            return &sample->clients[i];
    return NULL;
}

/* What the daemon counted for this client; a daemon that came in between counts from its start. */
static void account(const struct run *run, int index, uint64_t *run_ns, uint64_t *jobs)
{
    char name[BENCH_NAME];

    bench_name((int)getpid(), index, name);
    const struct msg_client *a = entry(&run->before, name), *b = entry(&run->after, name);
    bool grew = a && b && b->done >= a->done && b->run_ns >= a->run_ns;
    *run_ns = b ? b->run_ns - (grew ? a->run_ns : 0) : 0;
    *jobs = b ? b->done - (grew ? a->done : 0) : 0;
}

/* all[n]: a row for each client, then one for all of them. */
static void add_up(const struct run *run, struct figures *all, struct laps *job,
                   struct laps *submit)
{
    int n = run->order.processes;
    uint64_t run_ns, jobs, all_jobs = 0;
    double all_ns = 0;
    struct sage_attn attn;
    size_t results;

    spec_describe(&run->order.spec, NULL, &attn, &results);
    double ops = sage_attn_ops(&attn, NULL);
    all[n] = (struct figures){.job = job, .submit = submit, .share = 1};
    for (int i = 0; i < n; i++) {
        const struct bench_client *c = &run->bench->client[i];
        account(run, i, &run_ns, &jobs);
        all_ns += (double)run_ns;
        all_jobs += jobs;
        all[i] = (struct figures){.jobs = c->jobs,
                                  .seconds = (double)c->took_ns / 1e9,
                                  .ops = ops * (double)c->jobs,
                                  .share = (double)run_ns,
                                  .run_ns = jobs ? (double)run_ns / (double)jobs : 0,
                                  .job = &c->job,
                                  .submit = &c->submit};
        laps_merge(job, &c->job);
        laps_merge(submit, &c->submit);
        all[n].jobs += all[i].jobs;
        all[n].ops += all[i].ops;
        all[n].seconds = fmax(all[n].seconds, all[i].seconds);
    }
    for (int i = 0; i < n; i++)
        all[i].share = all_ns > 0 ? all[i].share / all_ns : 0;
    all[n].counted = all_jobs;
    all[n].run_ns = all_jobs ? all_ns / (double)all_jobs : 0;
}

/* Jobs of others that the daemon did meanwhile; 0 where it was replaced. */
static uint64_t others(const struct run *run, const struct figures *all)
{
    const struct msg_stats *a = &run->before.stats, *b = &run->after.stats;
    uint64_t done = sample_seconds(&run->after, &run->before) > 0 ? b->done - a->done : 0;

    return done > all->counted ? done - all->counted : 0;
}

static const char *mode(const struct run *run)
{
    char name[BENCH_NAME];

    bench_name((int)getpid(), 0, name);
    const struct msg_client *client = entry(&run->after, name);
    return client && client->mode[0] ? client->mode : "none";
}

static double per_second(double n, double seconds)
{
    return seconds > 0 ? n / seconds : 0;
}

static void print_row(const char *name, const struct figures *f)
{
    printf("%-6s %9llu %10.1f %8s %6.1f%% %9s %9s %9s %9s %9s %9s\n", name,
           (unsigned long long)f->jobs, per_second((double)f->jobs, f->seconds),
           text_tops(f->ops, f->seconds * 1e9).s, 100 * f->share, text_ns(f->run_ns).s,
           text_ns(laps_percentile(f->job, 0.5)).s, text_ns(laps_percentile(f->job, 0.99)).s,
           text_ns(laps_percentile(f->job, 0.999)).s, text_ns(laps_percentile(f->submit, 0.5)).s,
           text_ns(laps_percentile(f->submit, 0.99)).s);
}

static void print_text(const struct run *run, const struct figures *all)
{
    const struct msg_welcome *w = &run->ctl->welcome;
    const struct order *order = &run->order;
    const struct spec *s = &order->spec;
    const struct figures *sum = &all[order->processes];
    char name[16];

    printf("daemon      sageattnd %s, %s on %s, mode %s\n", w->version, w->backend, w->device,
           mode(run));
    printf("a job       B %lld, Hq %lld, Hkv %lld, Nq %lld, Nk %lld, D %lld, %s, %s%s: %.4g Gop\n",
           (long long)s->batch, (long long)s->heads, (long long)s->kv_heads, (long long)s->nq,
           (long long)s->nk, (long long)s->dim, sage_dtype_name(s->dtype),
           sage_variant_name(s->variant), s->causal ? ", causal" : "",
           sum->jobs ? sum->ops / (double)sum->jobs / 1e9 : 0);
    printf("load        processes %d, jobs in flight of each %d, %s\n\n", order->processes,
           order->depth, text_ns(sum->seconds * 1e9).s);
    printf("%-6s %9s %10s %8s %7s %9s %9s %9s %9s %9s %9s\n", "CLIENT", "JOBS", "JOBS/S", "TOPS",
           "SHARE", "RUN", "P50", "P99", "P99.9", "SUBM P50", "SUBM P99");
    for (int i = 0; i < order->processes; i++) {
        snprintf(name, sizeof(name), "%d", i);
        print_row(name, &all[i]);
    }
    print_row("all", sum);
    uint64_t strangers = others(run, sum);
    if (strangers)
        printf("\nThe daemon did %llu jobs of other clients meanwhile.\n",
               (unsigned long long)strangers);
}

static void print_results(const struct run *run)
{
    int64_t rows = 0;
    double relative = 0, most = 0;

    for (int i = 0; i < run->order.processes; i++) {
        const struct bench_client *c = &run->bench->client[i];
        rows += c->rows;
        relative = fmax(relative, c->relative);
        most = fmax(most, c->drift);
    }
    printf("\nresults     %lld rows off by %.2f %% of fp64 at most (limit %.0f %%); first and last "
           "job "
           "differ by %.2f %%\n",
           (long long)rows, 100 * relative, 100 * spec_limit(&run->order.spec), 100 * most);
}

static json_t *laps_json(const struct laps *laps)
{
    return json_pack("{sf sf sf}", "p50", laps_percentile(laps, 0.5) / 1e3, "p99",
                     laps_percentile(laps, 0.99) / 1e3, "p999", laps_percentile(laps, 0.999) / 1e3);
}

static json_t *figures_json(const struct figures *f)
{
    return json_pack("{sI sf sf sf sf sf so so}", "jobs", (json_int_t)f->jobs, "seconds",
                     f->seconds, "jobs_per_second", per_second((double)f->jobs, f->seconds), "tops",
                     per_second(f->ops / 1e12, f->seconds), "share", f->share, "run_us",
                     f->run_ns / 1e3, "latency_us", laps_json(f->job), "submit_us",
                     laps_json(f->submit));
}

static void print_json(const struct run *run, const struct figures *all)
{
    const struct msg_welcome *w = &run->ctl->welcome;
    const struct order *o = &run->order;
    const struct spec *s = &o->spec;
    json_t *clients = json_array();

    for (int i = 0; i < o->processes; i++) {
        const struct bench_client *c = &run->bench->client[i];
        json_t *client = figures_json(&all[i]);
        json_object_set_new(client, "rows_checked", json_integer(c->rows));
        json_object_set_new(client, "relative_error", json_real(c->relative));
        json_object_set_new(client, "drift", json_real(c->drift));
        json_array_append_new(clients, client);
    }
    ctl_print_json(json_pack("{ss ss ss ss ss s{sI sI sI sI sI sI ss ss sb} si si so so sI}",
                             "version", w->version, "backend", w->backend, "device", w->device,
                             "uuid", w->uuid, "mode", mode(run), "job", "batch",
                             (json_int_t)s->batch, "heads", (json_int_t)s->heads, "kv_heads",
                             (json_int_t)s->kv_heads, "queries", (json_int_t)s->nq, "keys",
                             (json_int_t)s->nk, "dim", (json_int_t)s->dim, "dtype",
                             sage_dtype_name(s->dtype), "variant", sage_variant_name(s->variant),
                             "causal", (int)s->causal, "processes", o->processes, "depth", o->depth,
                             "clients", clients, "all", figures_json(&all[o->processes]),
                             "other_jobs", (json_int_t)others(run, &all[o->processes])),
                   false);
}

/* false, and it says why: one failed, or they were stopped before there was anything to report. */
static bool went_well(const struct run *run, uint64_t jobs)
{
    bool good = true;

    for (int i = 0; i < run->order.processes; i++) {
        const struct bench_client *c = &run->bench->client[i];
        if (!c->status || c->status == SAGE_ECANCELED) /* that is an interrupt's */
            continue;
        fprintf(stderr, "sagectl: client %d: %s: %s\n", i, sage_errname(c->status), c->text);
        good = false;
    }
    if (good && !jobs)
        fprintf(stderr, "sagectl: no job was done\n");
    return good && jobs > 0;
}

static int report(const struct run *run)
{
    struct figures *all = calloc((size_t)run->order.processes + 1, sizeof(*all));
    static struct laps job, submit;

    if (!all) {
        error_set(SAGE_ENOMEM, "out of memory");
        return ctl_fail();
    }
    add_up(run, all, &job, &submit);
    bool good = went_well(run, all[run->order.processes].jobs);
    if (good && run->json)
        print_json(run, all);
    else if (good) {
        print_text(run, all);
        print_results(run);
    }
    free(all);
    return good ? CTL_OK : CTL_FAILED;
}

int ctl_bench(struct ctl *ctl, int argc, char **argv)
{
    struct run run = {.ctl = ctl, .order.socket = ctl->path};

    if (!parse(argc, argv, &run))
        return ctl_usage(argv[0]);
    if (!is_legal(&run.order.spec))
        return CTL_USAGE;
    size_t n = (size_t)run.order.processes;
    size_t bytes = sizeof(struct bench) + n * sizeof(struct bench_client);
    if (ctl_connect(ctl))
        return ctl_fail();
    run.pids = calloc(n, sizeof(*run.pids));
    run.bench = mmap(NULL, bytes, PROT_READ | PROT_WRITE, MAP_SHARED | MAP_ANONYMOUS, -1, 0);
    int rc = !run.pids || run.bench == MAP_FAILED ? error_set(SAGE_ENOMEM, "out of memory") : 0;
    catch_signals();
    if (!rc)
        rc = run_clients(&run);
    int code = rc ? ctl_fail() : report(&run);
    free(run.before.clients);
    free(run.after.clients);
    free(run.pids);
    if (run.bench != MAP_FAILED)
        munmap(run.bench, bytes);
    return code;
}
