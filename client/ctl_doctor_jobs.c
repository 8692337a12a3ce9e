/*
 * ctl_doctor_jobs.c - jobs through the daemon: does it reach our memory, are results right, and
 * what does the hand-off cost?
 */
#include "client/ctl_doctor.h"

#include <math.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/socket.h>
#include <time.h>
#include <unistd.h>

#include "client/client.h"
#include "client/ctl_work.h"

/* --- namespaces --- */

/* Is that pid the daemon's in this namespace too? Its socket may be systemd's. */
static bool sees_daemon(const struct ctl *ctl)
{
    struct ucred peer = {0};
    socklen_t size = sizeof(peer);
    char path[64], name[64] = "";

    getsockopt(ctl->conn.fd, SOL_SOCKET, SO_PEERCRED, &peer, &size);
    if (peer.pid > 0 && (uint64_t)peer.pid == ctl->welcome.pid)
        return true;
    snprintf(path, sizeof(path), "/proc/%llu/comm", (unsigned long long)ctl->welcome.pid);
    FILE *file = fopen(path, "r");
    if (file && !fgets(name, sizeof(name), file))
        name[0] = '\0';
    if (file)
        fclose(file);
    return strstr(name, "sageattnd") != NULL;
}

/* " another ipc namespace" and the like; empty where they are the same or cannot be told. */
static void name_differences(const struct ctl *ctl, char *text, size_t size)
{
    static const char *const kinds[] = {"ipc", "pid", "user"};
    char path[64], ours[64], theirs[64];

    *text = '\0';
    for (int i = 0; i < 3; i++) {
        snprintf(path, sizeof(path), "/proc/self/ns/%s", kinds[i]);
        ssize_t a = readlink(path, ours, sizeof(ours));
        snprintf(path, sizeof(path), "/proc/%llu/ns/%s", (unsigned long long)ctl->welcome.pid,
                 kinds[i]);
        ssize_t b = readlink(path, theirs, sizeof(theirs));
        if (a > 0 && b > 0 && (a != b || memcmp(ours, theirs, (size_t)a)))
            snprintf(text + strlen(text), size - strlen(text), "; another %s namespace", kinds[i]);
    }
}

/* The first job registers our memory: the daemon opens a handle, or a memfd. */
static bool check_namespaces(struct doctor *d, struct work *work)
{
    bool seen = sees_daemon(d->ctl);
    char text[128];
    int rc = work_run(work, NULL);

    if (seen)
        name_differences(d->ctl, text, sizeof(text));
    else
        snprintf(text, sizeof(text), "; it is in another pid namespace");
    if (!rc || rc == SAGE_EUNSUPPORTED) {
        report(d, PASS, "namespaces", "", "the daemon maps our memory%s", text);
        return true;
    }
    report(d, FAIL, "namespaces",
           rc == SAGE_EQUOTA ? "raise the limits of clients in sageattnd.conf(5)"
           : rc != SAGE_EHANDLE
               ? "journalctl -u sageattnd"
               : "let daemon and clients share /dev/shm and the namespaces for ipc "
                 "and pids: docker run --ipc=host --pid=host",
           "%s: %s%s", sage_errname(rc), error_text(), text);
    return false;
}

/* --- results --- */

/* false: no job came back, and none is going to. */
static bool check_variant(struct doctor *d, struct work *work, enum sage_variant variant,
                          const char *name)
{
    enum { RUNS = 20 };
    /* Grouped heads, causal from the bottom right, sizes that fit no tile. */
    struct spec spec = {1, 4, 2, 50, 70, 64, SAGE_BF16, variant, true, true, 1};
    int64_t best = INT64_MAX, rows = spec.heads * spec.nq;
    double relative = 0, lse = 0;

    int rc = work_make(work, &spec);
    for (int i = 0; i < RUNS && !rc; i++) {
        int64_t start = clock_ns();
        rc = work_run(work, NULL);
        int64_t took = clock_ns() - start;
        best = took < best ? took : best;
    }
    if (rc == SAGE_EUNSUPPORTED) { /* FP8 before compute capability 8.9 */
        report(d, PASS, name, "", "not on this device: %s", error_text());
        return true;
    }
    if (!rc)
        rc = work_fetch(work);
    if (!rc)
        rc = work_judge(work, &rows, &relative, &lse);
    if (rc) {
        report(d, FAIL, name, "journalctl -u sageattnd", "a job failed: %s: %s", sage_errname(rc),
               error_text());
        return rc != SAGE_ETIMEDOUT;
    }
    bool good = relative <= spec_limit(&spec) && lse <= 0.05;
    report(d, good ? PASS : FAIL, name, "a wrong result: report it, with this output",
           "a small job in %.1f us; off by %.2f %% of fp64 (limit %.0f %%), lse by %.4f",
           (double)best / 1e3, 100 * relative, 100 * spec_limit(&spec), lse);
    return true;
}

/* --- the hand-off --- */

enum {
    ROUNDS = 5, /* the median counts */
    JOBS = 8,   /* of a round, one behind the other */
    HEADS = 8,
    LEAST = 16, /* tokens */
    MOST_CPU = 4096,
    MOST_GPU = 32768,
    TENTH = 10, /* the hand-off is little where the job takes so many times as long */
    SLOW_CPU_NS = 1000000,
    SLOW_GPU_NS = 150000, /* without MPS it is 290 us */
};

static void own_name(char *name, size_t size)
{
    snprintf(name, size, "sagectl doctor %d", (int)getpid());
}

/* What the daemon says of our connection for jobs. */
static int find_self(const struct doctor *d, struct msg_client *self)
{
    struct msg_client *list;
    char name[PROTO_NAME_MAX];
    size_t n;
    int rc = clients_fetch(d->ctl, &list, &n);

    own_name(name, sizeof(name));
    if (rc)
        return rc;
    rc = SAGE_ELOST;
    for (size_t i = 0; i < n && rc; i++) {
        if (!strcmp(list[i].name, name)) {
            *self = list[i];
            rc = 0;
        }
    }
    free(list);
    return rc ? error_set(rc, "the daemon knows nothing of %s: was it replaced?", name) : 0;
}

/* The same once it has counted all our jobs: it lets a job go before it counts it. */
static int find_self_idle(const struct doctor *d, struct msg_client *self)
{
    enum { LIMIT = 1000 };
    int rc = find_self(d, self);

    for (int i = 0; !rc && self->queued + self->running > 0 && i < LIMIT; i++) {
        nanosleep(&(struct timespec){.tv_nsec = 1000000}, NULL);
        rc = find_self(d, self);
    }
    return rc;
}

/* As a program does it: on the GPU queued on a stream, on the CPU submitted and waited for. */
static int run_jobs(struct work *work)
{
    int rc = 0;

    for (int i = 0; i < JOBS && !rc; i++)
        rc = work->gpu.cu ? sage_attn_enqueue(work->client, &work->attn, work->stream)
                          : work_run(work, NULL);
    return !rc && work->gpu.cu ? work_await(work, JOBS) : rc;
}

static int compare(const void *a, const void *b)
{
    double x = *(const double *)a, y = *(const double *)b;

    return (x > y) - (x < y);
}

/* What a job takes beyond being computed, and what that takes by the daemon's account. */
struct cost {
    double handoff_ns, run_ns;
};

static int measure(const struct doctor *d, struct work *work, int64_t heads, int64_t n,
                   struct cost *cost)
{
    struct spec spec = {1, heads, heads, n, n, 64, SAGE_F16, SAGE_INT8_FP16, false, false, 1};
    double handoff[ROUNDS], run[ROUNDS];
    struct msg_client before, after;

    int rc = work_make(work, &spec);
    if (!rc)
        rc = run_jobs(work); /* warms up */
    for (int i = 0; i < ROUNDS && !rc; i++) {
        rc = find_self_idle(d, &before);
        int64_t start = clock_ns();
        if (!rc)
            rc = run_jobs(work);
        double took = (double)(clock_ns() - start) / JOBS;
        if (!rc)
            rc = find_self_idle(d, &after);
        if (!rc && after.done != before.done + JOBS)
            rc = error_set(SAGE_ELOST, "the daemon was replaced meanwhile");
        run[i] = rc ? 0 : (double)(after.run_ns - before.run_ns) / JOBS;
        handoff[i] = took - run[i];
    }
    if (rc)
        return rc;
    qsort(handoff, ROUNDS, sizeof(*handoff), compare);
    qsort(run, ROUNDS, sizeof(*run), compare);
    *cost = (struct cost){fmax(handoff[ROUNDS / 2], 0), run[ROUNDS / 2]};
    return 0;
}

/*
 * How many tokens must a job have to take so long? Each step doubles them, and between two of them
 * time is a power of the length. *tokens 0: too many to try.
 */
static int find_length(const struct doctor *d, struct work *work, double wanted_ns, double *tokens)
{
    int64_t most = work->gpu.cu ? MOST_GPU : MOST_CPU;
    struct cost cost, shorter = {0};

    *tokens = 0;
    for (int64_t n = LEAST; n <= most; n *= 2, shorter = cost) {
        int rc = measure(d, work, HEADS, n, &cost);
        if (rc)
            return rc;
        if (cost.run_ns < wanted_ns)
            continue;
        *tokens = (double)n;
        if (n > LEAST)
            *tokens *= pow(2, log(wanted_ns / cost.run_ns) / log(cost.run_ns / shorter.run_ns));
        return 0;
    }
    return 0;
}

static void check_handoff(struct doctor *d, struct work *work)
{
    struct msg_empty empty = {0};
    struct msg_stats stats;
    struct cost tiny;
    double tokens = 0;
    bool gpu = work->gpu.cu;
    char from[64];

    int rc = measure(d, work, 1, LEAST, &tiny);
    if (!rc)
        rc = find_length(d, work, TENTH * tiny.handoff_ns, &tokens);
    if (!rc)
        rc = conn_call(&d->ctl->conn, OP_STATS, MSG_EMPTY, &empty, NULL, MSG_STATS, &stats);
    if (rc) {
        report(d, FAIL, "handoff", "journalctl -u sageattnd", "%s: %s", sage_errname(rc),
               error_text());
        return;
    }
    if (tokens > 0)
        snprintf(from, sizeof(from), "from %.0f tokens on", tokens);
    else
        snprintf(from, sizeof(from), "beyond %d tokens", gpu ? MOST_GPU : MOST_CPU);
    bool slow = tiny.handoff_ns > (gpu ? SLOW_GPU_NS : SLOW_CPU_NS);
    report(d, slow ? WARN : PASS, "handoff",
           gpu ? "MPS, where processes trust each other: systemctl start nvidia-mps; is it busy?"
               : "is the machine overloaded?",
           "%.1f us a job; pays %s (%d heads of 64), where it is a tenth of the job%s",
           tiny.handoff_ns / 1e3, from, HEADS,
           stats.queued + stats.running ? "; measured beside jobs of others" : "");
    report_number(d, "handoff_us", tiny.handoff_ns / 1e3);
    report_number(d, "tokens", tokens);
}

/* Why streams cannot use the page, if somebody found out. */
static const char *why_no_lane(const struct work *work)
{
    for (const struct page_view *v = work->client->gpu.views; v; v = v->next)
        if (!v->device)
            return v->why;
    return "";
}

/* Which mode do streams get? By the daemon's account of the jobs that were measured. */
static void check_mode(struct doctor *d, const struct work *work)
{
    static const struct {
        const char *mode, *text;
    } modes[] = {
        {"lane", ": streams wait for the job, by words in shared memory"},
        {"sync", ": the CPU waits for the stream and for the job: nothing else works here, or "
                 "SAGE_MODE says so"},
        {"event", ": streams wait for the job, by interprocess events"},
    };
    struct msg_client self;
    const char *text = "";

    if (find_self(d, &self)) {
        report(d, FAIL, "mode", "journalctl -u sageattnd", "%s", error_text());
        return;
    }
    for (size_t i = 0; i < sizeof(modes) / sizeof(modes[0]); i++)
        if (!strcmp(self.mode, modes[i].mode))
            text = modes[i].text;
    const char *why = strcmp(self.mode, "lane") ? why_no_lane(work) : "";
    report(d, *why ? WARN : PASS, "mode", "", "%s%s%s%s", self.mode, text, *why ? "; lane: " : "",
           why);
}

void check_jobs(struct doctor *d)
{
    struct spec spec = {1, 1, 1, 16, 16, 64, SAGE_F16, SAGE_INT8_FP16, false, false, 1};
    struct work work;
    char name[PROTO_NAME_MAX];

    own_name(name, sizeof(name));
    int rc = work_open(&work, d->ctl->path, name);
    if (!rc)
        rc = work_make(&work, &spec);
    if (rc)
        report(d, FAIL, "client",
               rc == SAGE_EQUOTA ? "raise the limits of clients in sageattnd.conf(5)"
                                 : "journalctl -u sageattnd",
               "%s: %s", sage_errname(rc), error_text());
    else if (check_namespaces(d, &work) && check_variant(d, &work, SAGE_INT8_FP16, "int8_fp16") &&
             check_variant(d, &work, SAGE_INT8_FP8, "int8_fp8")) {
        check_handoff(d, &work);
        if (work.gpu.cu)
            check_mode(d, &work);
    }
    work_close(&work);
}
