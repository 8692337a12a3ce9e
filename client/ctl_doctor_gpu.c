/*
 * ctl_doctor_gpu.c - the daemon's GPU as this process finds it: driver, MPS, memory, copies.
 */
#include "client/ctl_doctor.h"

#include <errno.h>
#include <poll.h>
#include <signal.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/wait.h>
#include <unistd.h>

void check_no_gpu(struct doctor *d)
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

/* --- the driver --- */

/* The first line of a small file; empty: there is none. */
static void read_line(const char *path, char *line, int size)
{
    FILE *file = fopen(path, "r");

    if (!file || !fgets(line, size, file))
        *line = '\0';
    line[strcspn(line, "\n")] = '\0';
    if (file)
        fclose(file);
}

static bool check_driver(struct doctor *d)
{
    const struct driver *cu = driver_open();
    char module[64];
    int version = 0;

    read_line("/sys/module/nvidia/version", module, sizeof(module));
    if (!cu || cu->cuDriverGetVersion(&version)) {
        report(d, FAIL, "driver",
               *module ? "give this process libcuda.so.1 of the same version; in a container: the "
                         "NVIDIA container toolkit, NVIDIA_DRIVER_CAPABILITIES=compute,utility"
                       : "install the NVIDIA driver, or in a container let it in",
               "%s%s%s", cu ? "the driver does not tell its version" : error_text(),
               *module ? "; the kernel has " : "", module);
        return false;
    }
    report(d, PASS, "driver", "", "CUDA %d.%d%s%s", version / 1000, version % 1000 / 10,
           *module ? ", kernel module " : "", module);
    return true;
}

/* --- MPS: without it processes take turns on the GPU, and each hand-off waits for two turns --- */

/* What the control daemon answers; at most 5 s, for it may hang. */
static void ask_mps(const char *question, char *answer, size_t size)
{
    char command[128];
    size_t n = 0;

    snprintf(command, sizeof(command), "echo %s | timeout 5 nvidia-cuda-mps-control 2>/dev/null",
             question);
    FILE *pipe = popen(command, "r");
    if (pipe) {
        n = fread(answer, 1, size - 1, pipe);
        pclose(pipe);
    }
    answer[n] = '\0';
}

/* Append "name (pid)"; is it one of those that should be inside? */
static void list_pid(unsigned long pid, char *list, size_t size)
{
    char path[64], name[64];
    size_t used = strlen(list);

    snprintf(path, sizeof(path), "/proc/%lu/comm", pid);
    read_line(path, name, sizeof(name));
    snprintf(list + used, size - used, "%s%s (%lu)", used ? ", " : "", *name ? name : "?", pid);
}

struct inside {
    int servers;
    bool daemon, us;
    char list[256];
};

/* Pids are as the control daemon sees them. */
static void look_inside(const struct doctor *d, struct inside *in)
{
    char servers[256], clients[4096], question[64], *at = servers, *end;

    *in = (struct inside){0};
    ask_mps("get_server_list", servers, sizeof(servers));
    for (unsigned long server; (server = strtoul(at, &end, 10)), end != at; at = end) {
        in->servers++;
        snprintf(question, sizeof(question), "get_client_list %lu", server);
        ask_mps(question, clients, sizeof(clients));
        char *next = clients, *after;
        for (unsigned long pid; (pid = strtoul(next, &after, 10)), after != next; next = after) {
            in->daemon |= pid == d->ctl->welcome.pid;
            in->us |= pid == (unsigned long)getpid();
            list_pid(pid, in->list, sizeof(in->list));
        }
    }
}

static void check_mps(struct doctor *d)
{
    const char *dir = getenv("CUDA_MPS_PIPE_DIRECTORY");
    char path[4096];
    struct inside in;

    snprintf(path, sizeof(path), "%s/control", dir && *dir ? dir : "/tmp/nvidia-mps");
    if (access(path, F_OK) < 0) {
        report(d, WARN, "mps",
               "systemctl start nvidia-mps, then restart daemon and clients; only for processes "
               "that trust each other",
               "no MPS (%s): each hand-off costs about 0.3 ms more", path);
        return;
    }
    look_inside(d, &in);
    if (!in.servers)
        report(d, WARN, "mps",
               "ask as root or as its user: echo get_server_list | nvidia-cuda-mps-control",
               "%s is there, but its control daemon names no server", path);
    else if (in.daemon && in.us)
        report(d, PASS, "mps", "", "inside are %s", in.list);
    else
        report(d, WARN, "mps",
               in.daemon ? "let CUDA_MPS_PIPE_DIRECTORY be the daemon's"
                         : "restart sageattnd, with the CUDA_MPS_PIPE_DIRECTORY of its clients",
               "%s not inside, so that they take turns: %s",
               in.daemon ? "this process is"
               : in.us   ? "the daemon is"
                         : "daemon and this process are",
               *in.list ? in.list : "nobody is");
}

/*
 * Can this process open the GPU at all? A child tries: an MPS server of another user that was
 * started without -M would let it wait for ever.
 */
static bool check_open(struct doctor *d)
{
    enum { LIMIT_MS = 30000 };
    struct pollfd end = {.events = POLLIN};
    int ends[2];

    if (pipe(ends) < 0)
        return true;
    fflush(stdout);
    pid_t child = fork();
    if (child == 0) {
        struct device gpu;
        close(ends[0]);
        if (!device_open(&gpu, d->ctl->welcome.uuid))
            device_close(&gpu);
        _exit(0);
    }
    close(ends[1]);
    end.fd = ends[0];
    int n = child < 0 ? 1 : poll(&end, 1, LIMIT_MS); /* its end closes the pipe */
    close(ends[0]);
    if (n == 0)
        kill(child, SIGKILL);
    if (child > 0 && (n != 0 || waitpid(child, NULL, WNOHANG) == 0))
        waitpid(child, NULL, 0);
    if (n == 0)
        report(d, FAIL, "gpu",
               "start nvidia-cuda-mps-control with -M, so that it serves several users at once",
               "opening %s takes more than %d s: an MPS server that serves another user?",
               d->ctl->welcome.uuid, LIMIT_MS / 1000);
    return n != 0;
}

/* --- memory --- */

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

/* Clients whose memory is of cudaMallocAsync() pools have it copied: q, k, v there and o back. */
static void check_staging(struct doctor *d, const struct device *gpu, const struct msg_stats *stats)
{
    const char *allocator = getenv("PYTORCH_CUDA_ALLOC_CONF");
    bool async = allocator && strstr(allocator, "cudaMallocAsync");
    double rate = copy_rate(gpu);

    report(d, async || stats->staged_bytes > 0 ? WARN : PASS, "staging",
           "allocate with cudaMalloc() or PyTorch's own allocator (backend:native, "
           "expandable_segments too); ComfyUI: --disable-cuda-malloc",
           "%s%s copied so far for memory that cannot be shared (cudaMallocAsync), here at %.0f "
           "GB/s: %.0f us for tensors of 16 MiB",
           async ? "PYTORCH_CUDA_ALLOC_CONF asks for cudaMallocAsync; " : "",
           text_bytes((double)stats->staged_bytes).s, rate, rate > 0 ? 0x1p24 / rate / 1e3 : 0);
}

static void check_memory(struct doctor *d, const struct device *gpu, const struct msg_stats *s)
{
    size_t available = 0, total = 0;

    if (driver_check(gpu->cu->cuMemGetInfo(&available, &total), "cuMemGetInfo")) {
        report(d, FAIL, "memory", "nvidia-smi", "%s", error_text());
        return;
    }
    report(d, available < total / 20 ? WARN : PASS, "memory",
           "fewer slots or slot_bytes, or less client_bytes, in sageattnd.conf(5)",
           "the daemon holds %u slots of %s, and %s of its clients; %s of %s are free", s->slots,
           text_bytes((double)s->slot_bytes).s, text_bytes((double)s->mapped_bytes).s,
           text_bytes((double)available).s, text_bytes((double)total).s);
}

bool check_gpu(struct doctor *d, struct device *gpu)
{
    const struct msg_welcome *w = &d->ctl->welcome;
    struct msg_empty empty = {0};
    struct msg_stats stats;

    if (!check_driver(d) || !check_open(d))
        return false;
    if (device_open(gpu, w->uuid)) {
        report(d, FAIL, "gpu", "is it hidden by CUDA_VISIBLE_DEVICES, by a container or a sandbox?",
               "the daemon's %s cannot be used here: %s", w->uuid, error_text());
        return false;
    }
    report(d, PASS, "gpu", "", "%s, %s, is there for this process too", w->device, gpu->uuid);
    check_mps(d);
    if (conn_call(&d->ctl->conn, OP_STATS, MSG_EMPTY, &empty, NULL, MSG_STATS, &stats)) {
        report(d, FAIL, "memory", "journalctl -u sageattnd", "%s", error_text());
        return true;
    }
    check_staging(d, gpu, &stats);
    check_memory(d, gpu, &stats);
    return true;
}
