/*
 * backend_cpu.c - the CPU as a device: a stream is a thread, its memory is the memfds of clients.
 */
#include "daemon/backend_cpu.h"

#include <errno.h>
#include <fcntl.h>
#include <linux/magic.h>
#include <pthread.h>
#include <semaphore.h>
#include <signal.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/mman.h>
#include <sys/stat.h>
#include <sys/vfs.h>
#include <unistd.h>

#include "daemon/daemon.h"

struct device {
    int threads;
    cpu_run *run;
    void (*notify)(void *);
    void *arg;
};

/* The ring has one writer, the loop, and one reader, the thread; `queued` hands entries over. */
struct stream {
    struct device *device;
    struct sage_cpu *cpu;
    void *workspace;
    size_t bytes;
    pthread_t thread;
    sem_t queued;
    struct piece *ring[STREAM_DEPTH]; /* not owned; NULL asks the thread to end */
    unsigned in, out;
};

int cpu_open(struct device **device, const struct config *config, void (*notify)(void *), void *arg,
             cpu_run *run)
{
    struct device *d = calloc(1, sizeof(*d));

    if (!d)
        return SAGE_ENOMEM;
    d->threads = (int)config->threads;
    d->run = run;
    d->notify = notify;
    d->arg = arg;
    *device = d;
    return 0;
}

static int open_cpu(struct device **device, const struct config *config, void (*notify)(void *),
                    void *arg, char *why)
{
    (void)why;
    return cpu_open(device, config, notify, arg, cpu_run_piece);
}

void cpu_close(struct device *device)
{
    free(device);
}

void cpu_describe(struct device *device, char name[PROTO_NAME_MAX], char uuid[PROTO_NAME_MAX])
{
    snprintf(name, PROTO_NAME_MAX, "CPU, %d threads", device->threads);
    uuid[0] = '\0';
}

void cpu_defaults(struct device *device, struct config *config)
{
    (void)device;
    config_memory(config);
}

int cpu_map(struct device *device, const struct mapping *what, void **base, uint64_t *size,
            char *why)
{
    struct stat st;
    struct statfs fs;
    int fd = what->fds[0];
    (void)device;

    int seals = fcntl(fd, F_GET_SEALS);
    if (seals < 0) {
        snprintf(why, PROTO_TEXT_MAX, "descriptor: not a memfd");
        return SAGE_EHANDLE;
    }
    if (!(seals & F_SEAL_SHRINK)) {
        snprintf(why, PROTO_TEXT_MAX, "descriptor: memfd is not sealed with F_SEAL_SHRINK");
        return SAGE_EHANDLE;
    }
    /* A huge page that its owner punched out again would be a SIGBUS here. */
    if (fstatfs(fd, &fs) < 0 || fs.f_type != TMPFS_MAGIC) {
        snprintf(why, PROTO_TEXT_MAX, "descriptor: memfd must have ordinary pages");
        return SAGE_EHANDLE;
    }
    if (fstat(fd, &st) < 0 || st.st_size <= 0) {
        snprintf(why, PROTO_TEXT_MAX, "descriptor: memfd is empty");
        return SAGE_EHANDLE;
    }
    void *p = mmap(NULL, (size_t)st.st_size, PROT_READ | PROT_WRITE, MAP_SHARED, fd, 0);
    if (p == MAP_FAILED) {
        int error = errno;
        snprintf(why, PROTO_TEXT_MAX, "descriptor: memfd cannot be mapped for writing: %s",
                 strerror(error));
        return error == ENOMEM ? SAGE_ENOMEM : SAGE_EHANDLE;
    }
    *base = p;
    *size = (uint64_t)st.st_size;
    return 0;
}

void cpu_unmap(struct device *device, const struct mapping *what, void *base, uint64_t size)
{
    (void)device, (void)what;
    munmap(base, size);
}

void *cpu_memory_get(struct device *device, size_t bytes)
{
    (void)device;
    return calloc(1, bytes);
}

void cpu_memory_put(struct device *device, void *memory)
{
    (void)device;
    free(memory);
}

int cpu_run_piece(struct sage_cpu *cpu, const struct piece *piece, void *workspace, size_t bytes)
{
    return sage_attn_cpu(cpu, piece->attn, &piece->part, workspace, bytes);
}

static void run(struct stream *s, struct sage_cpu *cpu, struct piece *piece)
{
    __atomic_store_n(&piece->start_ns, daemon_now(), __ATOMIC_RELAXED); /* sched_is_hung() looks */
    piece->status = s->device->run(cpu, piece, s->workspace, s->bytes);
    piece->end_ns = daemon_now();
    if (piece->lane && piece->status != SAGE_EDEVICE)
        page_release(piece->lane, piece->number, piece->status);
    /* From here on the loop may free the piece and unmap the page. */
    __atomic_store_n(&piece->done, 1, __ATOMIC_RELEASE);
}

static void *stream_main(void *arg)
{
    struct stream *s = arg;

    for (;;) {
        while (sem_wait(&s->queued) < 0)
            continue;
        struct piece *piece = s->ring[s->out++ % STREAM_DEPTH];
        if (!piece)
            return NULL;
        run(s, s->cpu, piece);
        s->device->notify(s->device->arg);
    }
}

/*
 * Signals are the loop's. sage_attn_cpu() wants 320 KiB of stack, sanitizers several times as much.
 */
static int start_thread(struct stream *s)
{
    sigset_t all, old;
    pthread_attr_t attr;

    pthread_attr_init(&attr);
    pthread_attr_setstacksize(&attr, 8 << 20);
    sigfillset(&all);
    pthread_sigmask(SIG_SETMASK, &all, &old);
    int rc = pthread_create(&s->thread, &attr, stream_main, s);
    pthread_sigmask(SIG_SETMASK, &old, NULL);
    pthread_attr_destroy(&attr);
    return rc;
}

int cpu_stream_open(struct device *device, size_t workspace, struct stream **stream, char *why)
{
    struct stream *s = calloc(1, sizeof(*s));

    if (!s)
        return SAGE_ENOMEM;
    s->device = device;
    s->bytes = workspace;
    s->workspace = mmap(NULL, workspace, PROT_READ | PROT_WRITE,
                        MAP_PRIVATE | MAP_ANONYMOUS | MAP_POPULATE, -1, 0);
    if (s->workspace == MAP_FAILED)
        goto err_free;
    s->cpu = sage_cpu_create(device->threads);
    if (!s->cpu)
        goto err_unmap;
    sem_init(&s->queued, 0, 0);
    if (start_thread(s) != 0)
        goto err_cpu;
    *stream = s;
    return 0;

err_cpu:
    sem_destroy(&s->queued);
    sage_cpu_destroy(s->cpu);
err_unmap:
    munmap(s->workspace, workspace);
err_free:
    free(s);
    snprintf(why, PROTO_TEXT_MAX, "slot: no memory or threads for a workspace of %zu bytes",
             workspace);
    return SAGE_ENOMEM;
}

void cpu_start(struct stream *s, struct piece *piece)
{
    if (piece && piece->brief && s->device->run == cpu_run_piece) { /* a fault may take longer */
        run(s, NULL, piece);
        return;
    }
    s->ring[s->in++ % STREAM_DEPTH] = piece;
    sem_post(&s->queued);
}

void cpu_stream_close(struct stream *s)
{
    cpu_start(s, NULL);
    pthread_join(s->thread, NULL);
    sem_destroy(&s->queued);
    sage_cpu_destroy(s->cpu);
    munmap(s->workspace, s->bytes);
    free(s);
}

const struct backend backend_cpu = {.name = "cpu", .open = open_cpu, .map = cpu_map, CPU_FUNCTIONS};
