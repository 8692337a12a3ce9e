/*
 * ctl_doctor.c - is everything as it should be, and if not, what helps? From socket to result.
 */
#include "config.h"

#include "client/ctl.h"

#include <errno.h>
#include <fcntl.h>
#include <getopt.h>
#include <grp.h>
#include <math.h>
#include <stdarg.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/mman.h>
#include <sys/stat.h>
#include <unistd.h>

#include "client/driver.h"
#include "client/sageclient.h"

enum result { PASS, WARN, FAIL };

struct doctor {
    struct ctl *ctl;
    json_t *checks; /* NULL: print lines */
    bool failed;
};

/* A path may be no UTF-8, which JSON needs to be. */
static json_t *json_text(const char *text)
{
    json_t *value = json_string(text);
    char ascii[512];

    if (value)
        return value;
    snprintf(ascii, sizeof(ascii), "%s", text);
    for (char *p = ascii; *p; p++)
        if (*p & 0x80)
            *p = '?';
    return json_string(ascii);
}

__attribute__((format(printf, 5, 6))) static void report(struct doctor *d, enum result result,
                                                         const char *check, const char *remedy,
                                                         const char *format, ...)
{
    static const char *const names[] = {"PASS", "WARN", "FAIL"};
    char text[512];
    va_list args;

    va_start(args, format);
    vsnprintf(text, sizeof(text), format, args);
    va_end(args);
    if (result == PASS)
        remedy = "";
    d->failed |= result == FAIL;
    if (d->checks) {
        json_array_append_new(d->checks,
                              json_pack("{ss ss so ss}", "check", check, "result", names[result],
                                        "text", json_text(text), "remedy", remedy));
        return;
    }
    printf("%s  %-10s %s\n", names[result], check, text);
    if (*remedy)
        printf("      %-10s remedy: %s\n", "", remedy);
    fflush(stdout);
}

/* --- what surrounds the daemon --- */

static void check_memfd(struct doctor *d)
{
    int fd = memfd_create("sagectl-doctor", MFD_CLOEXEC | MFD_ALLOW_SEALING);
    int rc = fd < 0 ? -1 : fcntl(fd, F_ADD_SEALS, F_SEAL_SHRINK | F_SEAL_GROW | F_SEAL_SEAL);

    if (rc < 0)
        report(d, FAIL, "memfd",
               "allow memfd_create(2) and F_ADD_SEALS in the sandbox of this process",
               "sealed memory cannot be made: %s", strerror(errno));
    else
        report(d, PASS, "memfd", "", "sealed memory can be made");
    if (fd >= 0)
        close(fd);
}

static bool check_socket(struct doctor *d)
{
    const char *path = d->ctl->path;
    struct stat st;

    if (stat(path, &st) < 0) {
        report(d, FAIL, "socket",
               errno == EACCES ? "ask for access to its directory"
                               : "systemctl start sageattnd, or run sageattnd; "
                                 "-s and $SAGEATTND_SOCKET name another socket",
               "%s: %s", path, strerror(errno));
        return false;
    }
    const struct group *group = getgrgid(st.st_gid);
    char owner[64];
    snprintf(owner, sizeof(owner), group ? "%s" : "%.0s%u", group ? group->gr_name : "", st.st_gid);
    if (!S_ISSOCK(st.st_mode))
        report(d, FAIL, "socket", "remove it, or name another with -s", "%s is no socket", path);
    else if (access(path, R_OK | W_OK) < 0)
        report(d, FAIL, "socket", "usermod -aG GROUP USER with the group named here, log in again",
               "%s: no permission; it is for group %s, mode %04o", path, owner, st.st_mode & 07777);
    else if (st.st_mode & S_IWOTH)
        report(d, WARN, "socket", "set SocketMode=0660 and a group",
               "%s: everybody may use it: group %s, mode %04o", path, owner, st.st_mode & 07777);
    else
        report(d, PASS, "socket", "", "%s, group %s, mode %04o", path, owner, st.st_mode & 07777);
    return S_ISSOCK(st.st_mode);
}

static bool check_daemon(struct doctor *d)
{
    const struct msg_welcome *w = &d->ctl->welcome;
    struct msg_empty empty = {0};
    struct msg_stats stats;
    int rc = ctl_connect(d->ctl);

    if (!rc)
        rc = conn_call(&d->ctl->conn, OP_STATS, MSG_EMPTY, &empty, NULL, MSG_STATS, &stats);
    if (rc) {
        report(d, FAIL, "daemon",
               rc == SAGE_EVERSION    ? "install sageattnd and sagectl of the same version"
               : rc == SAGE_EPERM     ? "join the socket's group, log in again"
               : rc == SAGE_ETIMEDOUT ? "is it stopped? journalctl -u sageattnd"
                                      : "systemctl restart sageattnd; journalctl -u sageattnd",
               "%s", error_text());
        return false;
    }
    bool draining = !strcmp(stats.state, "draining");
    report(d, draining ? WARN : PASS, "daemon", "wait for its successor, or start one",
           "pid %llu, %s on %s, %s for %s", (unsigned long long)w->pid, w->backend, w->device,
           stats.state, text_ns((double)stats.uptime_ns).s);
    bool same = !strcmp(w->version, PACKAGE_VERSION);
    report(d, same ? PASS : WARN, "version", "restart the daemon after an update",
           "sageattnd %s, protocol %u.%u; sagectl %s, protocol %d.%d", w->version, w->major,
           w->minor, PACKAGE_VERSION, PROTO_MAJOR, PROTO_MINOR);
    return !draining;
}

static void check_round_trip(struct doctor *d)
{
    enum { N = 201, SLOW_NS = 1000000 };
    double ns[N];

    if (ctl_measure(d->ctl, ns, N)) {
        report(d, FAIL, "ping", "journalctl -u sageattnd", "%s", error_text());
        return;
    }
    report(d, ns[N / 2] > SLOW_NS ? WARN : PASS, "ping", "is the machine overloaded?",
           "%.1f us a round trip (median of %d)", ns[N / 2] / 1e3, N);
}

/* --- the GPU, from here --- */

static void check_no_gpu(struct doctor *d)
{
    struct device gpu;
    int rc = device_open(&gpu, NULL);

    if (rc) {
        report(d, PASS, "gpu", "", "the daemon computes on the CPU, and there is no GPU here: %s",
               error_text());
        return;
    }
    report(d, WARN, "gpu", "start sageattnd with --backend=auto or cuda",
           "the daemon computes on the CPU, but there is a GPU: %s", gpu.uuid);
    device_close(&gpu);
}

/* Without it the processes take turns on the GPU, and each hand-off waits for two turns. */
static void check_mps(struct doctor *d)
{
    const char *dir = getenv("CUDA_MPS_PIPE_DIRECTORY");
    char path[4096];

    snprintf(path, sizeof(path), "%s/control", dir && *dir ? dir : "/tmp/nvidia-mps");
    bool there = access(path, F_OK) == 0;
    report(d, there ? PASS : WARN, "mps", "systemctl start nvidia-mps, then restart the clients",
           there ? "MPS is here: %s" : "no MPS (%s): each hand-off costs about 0.3 ms more", path);
}

/* What copies cost on this device: one direction, device to device. */
static double copy_rate(const struct device *gpu)
{
    enum { BYTES = 64 << 20, TIMES = 8 };
    const struct driver *cu = gpu->cu;
    uint64_t memory;
    double rate = 0;

    if (cu->cuMemAlloc(&memory, 2 * (size_t)BYTES) != CU_OK)
        return 0;
    int rc = cu->cuMemcpyAsync(memory + BYTES, memory, BYTES, NULL);
    rc = rc ? rc : cu->cuStreamSynchronize(NULL);
    int64_t start = clock_ns();
    for (int i = 0; i < TIMES && !rc; i++)
        rc = cu->cuMemcpyAsync(memory + BYTES, memory, BYTES, NULL);
    rc = rc ? rc : cu->cuStreamSynchronize(NULL);
    if (!rc)
        rate = (double)BYTES * TIMES / (double)(clock_ns() - start);
    cu->cuMemFree(memory);
    return rate;
}

static bool check_gpu(struct doctor *d, struct device *gpu)
{
    const struct msg_welcome *w = &d->ctl->welcome;

    if (device_open(gpu, w->uuid)) {
        report(d, FAIL, "gpu", "is it hidden by CUDA_VISIBLE_DEVICES, by a container or a sandbox?",
               "the daemon's %s cannot be used here: %s", w->uuid, error_text());
        return false;
    }
    report(d, PASS, "gpu", "", "%s, %s, is there for this process too", w->device, gpu->uuid);
    check_mps(d);
    report(d, PASS, "staging", "",
           "memory of cudaMalloc() is shared as it is; of cudaMallocAsync() pools it is copied, "
           "here at %.0f GB/s",
           copy_rate(gpu));
    return true;
}

/* --- a small problem, and what it comes to --- */

/* Grouped heads, causal from the bottom right, sizes that fit no tile; bf16 is easy to convert. */
enum { HEADS = 4, KV_HEADS = 2, ROWS = 50, KEYS = 70, DIM = 64 };

struct problem {
    uint16_t q[HEADS][ROWS][DIM], k[KV_HEADS][KEYS][DIM], v[KV_HEADS][KEYS][DIM];
    uint16_t o[HEADS][ROWS][DIM];
    float lse[HEADS][ROWS];
};

static double from_bf16(uint16_t x)
{
    uint32_t bits = (uint32_t)x << 16;
    float f;

    memcpy(&f, &bits, sizeof(f));
    return f;
}

/* Uniform with variance 1, rounded to bf16 by cutting; any generator will do. */
static void fill(uint16_t *x, size_t n, uint64_t seed)
{
    for (size_t i = 0; i < n; i++) {
        seed = seed * 6364136223846793005u + 1442695040888963407u;
        float f = (float)((double)(seed >> 11) / 4503599627370496.0 - 1) * 1.7320508f;
        uint32_t bits;
        memcpy(&bits, &f, sizeof(bits));
        x[i] = (uint16_t)(bits >> 16);
    }
}

/* A problem where the daemon can reach it: in a buffer, or, on a GPU, a copy of it. */
struct room {
    struct problem *problem;
    char *base;
    struct sage_buffer *buffer;
    struct device gpu; /* cu: NULL where there is none */
};

static struct sage_tensor tensor(void *data, enum sage_dtype dtype, int heads, int n, int d)
{
    return (struct sage_tensor){.dtype = dtype,
                                .data = data,
                                .shape = {1, heads, n, d},
                                .stride = {(int64_t)heads * n * d, (int64_t)n * d, d, 1}};
}

static struct sage_attn describe(const struct room *room, enum sage_variant variant)
{
    struct sage_attn attn = SAGE_ATTN_INIT;
    struct problem *p = room->problem;

    fill(&p->q[0][0][0], sizeof(p->q) / 2, 1);
    fill(&p->k[0][0][0], sizeof(p->k) / 2, 2);
    fill(&p->v[0][0][0], sizeof(p->v) / 2, 3);
    memset(p->o, 0xff, sizeof(p->o)); /* NaN: what is not written shows */
    memset(p->lse, 0xff, sizeof(p->lse));
    attn.q = tensor(room->base + offsetof(struct problem, q), SAGE_BF16, HEADS, ROWS, DIM);
    attn.k = tensor(room->base + offsetof(struct problem, k), SAGE_BF16, KV_HEADS, KEYS, DIM);
    attn.v = tensor(room->base + offsetof(struct problem, v), SAGE_BF16, KV_HEADS, KEYS, DIM);
    attn.o = tensor(room->base + offsetof(struct problem, o), SAGE_BF16, HEADS, ROWS, DIM);
    attn.lse = tensor(room->base + offsetof(struct problem, lse), SAGE_F32, HEADS, ROWS, 1);
    attn.variant = variant;
    attn.causal = true;
    attn.diagonal = SAGE_BOTTOM_RIGHT;
    return attn;
}

/* One row in double precision: o[DIM], and its log-sum-exp as the result. */
static double attend(const struct problem *p, int head, int row, double *o)
{
    int kv = head / (HEADS / KV_HEADS), visible = row + KEYS - ROWS + 1;
    double score[KEYS], max = -INFINITY, sum = 0;

    for (int j = 0; j < visible; j++) {
        score[j] = 0;
        for (int c = 0; c < DIM; c++)
            score[j] += from_bf16(p->q[head][row][c]) * from_bf16(p->k[kv][j][c]);
        score[j] /= sqrt(DIM);
        max = fmax(max, score[j]);
    }
    memset(o, 0, DIM * sizeof(*o));
    for (int j = 0; j < visible; j++) {
        double weight = exp(score[j] - max);
        sum += weight;
        for (int c = 0; c < DIM; c++)
            o[c] += weight * from_bf16(p->v[kv][j][c]);
    }
    for (int c = 0; c < DIM; c++)
        o[c] /= sum;
    return max + log(sum);
}

/* Sum of |error| over sum of |o|, and the largest error of lse. NaN stays NaN. */
static void judge(const struct problem *p, double *relative, double *lse)
{
    double error = 0, size = 0, o[DIM];

    *lse = 0;
    for (int h = 0; h < HEADS; h++)
        for (int i = 0; i < ROWS; i++) {
            double off = fabs(attend(p, h, i, o) - (double)p->lse[h][i]);
            *lse = off <= *lse ? *lse : off;
            for (int c = 0; c < DIM; c++) {
                error += fabs(from_bf16(p->o[h][i][c]) - o[c]);
                size += fabs(o[c]);
            }
        }
    *relative = error / size;
}

static void bring(const struct room *room)
{
    if (room->gpu.cu)
        room->gpu.cu->cuMemcpyHtoD((uintptr_t)room->base, room->problem, sizeof(struct problem));
}

static void fetch(const struct room *room)
{
    if (room->gpu.cu)
        room->gpu.cu->cuMemcpyDtoH(room->problem, (uintptr_t)room->base, sizeof(struct problem));
}

/* Not sage_attn_run(): that waits as long as it takes. */
static int run(struct sage_lane *lane, const struct sage_attn *attn)
{
    enum { JOB_MS = 10000 };
    struct sage_job job;
    int rc = sage_attn_submit(lane, attn, 0, &job);

    return rc ? rc : sage_wait(job, JOB_MS);
}

/* Limits: several times what INT8 scores and the variant's P V cost on such inputs. false: no job
 * came back, and none is going to. */
static bool check_variant(struct doctor *d, struct sage_lane *lane, const struct room *room,
                          enum sage_variant variant, const char *name, double limit)
{
    enum { RUNS = 20 };
    struct sage_attn attn = describe(room, variant);
    int64_t best = INT64_MAX;
    double relative, lse;

    bring(room);
    for (int i = 0; i < RUNS; i++) {
        int64_t start = clock_ns();
        int rc = run(lane, &attn);
        if (rc == SAGE_EUNSUPPORTED) { /* FP8 before compute capability 8.9 */
            report(d, PASS, name, "", "not on this device: %s", sage_last_error());
            return true;
        }
        if (rc) {
            report(d, FAIL, name, "journalctl -u sageattnd", "a job failed: %s: %s",
                   sage_errname(rc), sage_last_error());
            return rc != SAGE_ETIMEDOUT;
        }
        int64_t took = clock_ns() - start;
        best = took < best ? took : best;
    }
    fetch(room);
    judge(room->problem, &relative, &lse);
    bool good = relative <= limit && lse <= 0.05;
    report(d, good ? PASS : FAIL, name, "a wrong result: report it, with this output",
           "a small job in %.1f us; off by %.2f %% of fp64 (limit %.0f %%), lse by %.4f",
           (double)best / 1e3, 100 * relative, 100 * limit, lse);
    return true;
}

/* Which mode do streams get, and what does a hand-off cost there? */
static void check_mode(struct doctor *d, struct sage_client *client, const struct room *room)
{
    enum { RUNS = 20 };
    struct sage_attn attn = describe(room, SAGE_INT8_FP16);
    int64_t best = INT64_MAX;

    for (int i = 0; i < RUNS; i++) {
        int64_t start = clock_ns();
        int rc = sage_attn_enqueue(client, &attn, NULL);
        if (!rc)
            rc = driver_check(room->gpu.cu->cuStreamSynchronize(NULL), "cuStreamSynchronize");
        if (rc) {
            report(d, FAIL, "mode", "SAGE_MODE=sync", "%s: %s", sage_errname(rc),
                   sage_last_error());
            return;
        }
        int64_t took = clock_ns() - start;
        best = took < best ? took : best;
    }
    bool event = sage_client_mode(client) == SAGE_MODE_EVENT;
    report(d, PASS, "mode", "", "%s: a small job on a stream in %.1f us",
           event ? "event (streams wait)" : "sync (the CPU waits; SAGE_MODE=event: the stream)",
           (double)best / 1e3);
}

static int make_room(struct sage_client *client, struct room *room)
{
    uint64_t memory;

    if (!room->gpu.cu) {
        int rc = sage_buffer_alloc(client, sizeof(struct problem), &room->buffer);
        if (!rc)
            room->problem = sage_buffer_data(room->buffer);
        room->base = (char *)room->problem;
        return rc;
    }
    room->problem = calloc(1, sizeof(struct problem));
    if (!room->problem)
        return error_set(SAGE_ENOMEM, "out of memory");
    int rc = driver_check(room->gpu.cu->cuMemAlloc(&memory, sizeof(struct problem)), "cuMemAlloc");
    if (!rc)
        room->base = (char *)(uintptr_t)memory;
    return rc;
}

static void leave_room(struct room *room)
{
    if (!room->gpu.cu)
        return;
    if (room->base)
        room->gpu.cu->cuMemFree((uintptr_t)room->base);
    free(room->problem);
    device_close(&room->gpu);
}

static void check_room(struct doctor *d, struct room *room)
{
    struct sage_connect_options options = {
        .socket = d->ctl->path, .name = "sagectl doctor", .retry_ms = 2000};
    struct sage_client *client = NULL;
    struct sage_lane *lane;
    int rc = sage_connect(&options, &client);

    if (!rc)
        rc = make_room(client, room);
    if (!rc)
        rc = sage_lane_create(client, &lane);
    if (rc) {
        report(d, FAIL, "buffer",
               rc == SAGE_EQUOTA ? "raise the limits of clients in sageattnd.conf(5)"
                                 : "journalctl -u sageattnd",
               "%s", sage_last_error());
    } else {
        if (room->buffer)
            report(d, PASS, "buffer", "", "the daemon maps our memory");
        if (check_variant(d, lane, room, SAGE_INT8_FP16, "int8_fp16", 0.05) &&
            check_variant(d, lane, room, SAGE_INT8_FP8, "int8_fp8", 0.15) && room->gpu.cu)
            check_mode(d, client, room);
    }
    sage_disconnect(client); /* frees it all, and waits for nothing */
}

static void check_jobs(struct doctor *d)
{
    struct room room = {0};

    if (!d->ctl->welcome.uuid[0])
        check_no_gpu(d);
    else if (!check_gpu(d, &room.gpu))
        return;
    check_room(d, &room);
    leave_room(&room);
}

int ctl_doctor(struct ctl *ctl, int argc, char **argv)
{
    static const struct option options[] = {{"json", no_argument, NULL, 'j'}, {0}};
    struct doctor d = {.ctl = ctl};
    int option;

    while ((option = getopt_long(argc, argv, "j", options, NULL)) != -1) {
        if (option != 'j') {
            json_decref(d.checks);
            return ctl_usage(argv[0]);
        }
        if (!d.checks)
            d.checks = json_array();
    }
    if (optind < argc) {
        json_decref(d.checks);
        return ctl_usage(argv[0]);
    }
    check_memfd(&d);
    if (check_socket(&d) && check_daemon(&d)) {
        check_round_trip(&d);
        check_jobs(&d);
    }
    if (d.checks)
        ctl_print_json(d.checks, false);
    return d.failed ? CTL_FAILED : CTL_OK;
}
