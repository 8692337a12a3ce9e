/*
 * handoff.c - what handing a job to the daemon costs, beside a bare echo over the same kind of
 * socket, in the same run. usage: handoff SAGEATTND
 *
 *   round trip: one tiny job, submitted and waited for; one packet, sent and answered
 *   rate:       four clients with 32 tiny jobs each in flight; four with 32 packets each
 *   memory:     resident bytes of the daemon beyond its slots, with 64 idle clients
 */
#include <poll.h>
#include <signal.h>
#include <stdbool.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/mman.h>
#include <sys/socket.h>
#include <sys/wait.h>
#include <time.h>
#include <unistd.h>

#include "sageclient.h"

enum {
    ROUNDS = 5, /* alternating, the median counts */
    ROUND_TRIPS = 2000,
    CLIENTS = 4,
    WINDOW = 32,
    JOBS = 20000, /* of each client and round */
    IDLE_CLIENTS = 64,
    PACKET = 512, /* bytes; a SUBMIT has about as many */
};

static double now(void)
{
    struct timespec t;

    clock_gettime(CLOCK_MONOTONIC, &t);
    return (double)t.tv_sec + (double)t.tv_nsec / 1e9;
}

__attribute__((noreturn)) static void die(const char *what)
{
    fprintf(stderr, "handoff: %s: %s\n", what, sage_last_error());
    exit(1);
}

static int compare(const void *a, const void *b)
{
    double x = *(const double *)a, y = *(const double *)b;

    return (x > y) - (x < y);
}

static double median(double *values, int n)
{
    qsort(values, (size_t)n, sizeof(*values), compare);
    return values[n / 2];
}

/* --- the echo --- */

static void echo_server(struct pollfd *fds, int n)
{
    char packet[PACKET];

    for (int open = n; open > 0;) {
        poll(fds, (nfds_t)n, -1);
        for (int i = 0; i < n; i++) {
            if (!fds[i].revents)
                continue;
            ssize_t len;
            while ((len = recv(fds[i].fd, packet, sizeof(packet), MSG_DONTWAIT)) > 0)
                if (send(fds[i].fd, packet, (size_t)len, MSG_NOSIGNAL) < 0)
                    break;
            if (len == 0) {
                fds[i].fd = -1;
                open--;
            }
        }
    }
    exit(0);
}

/* Keep `window` packets on their way until `count` are back. */
static void echo_client(int fd, int count, int window)
{
    char packet[PACKET] = {0};
    int sent = 0, back = 0;

    while (back < count) {
        while (sent < count && sent - back < window && send(fd, packet, sizeof(packet), 0) > 0)
            sent++;
        if (recv(fd, packet, sizeof(packet), 0) <= 0)
            die("echo");
        back++;
    }
}

/* Seconds for `n` clients to get `count` packets back each. */
static double run_echo(int n, int count, int window)
{
    struct pollfd fds[CLIENTS];
    int ends[CLIENTS];
    pid_t clients[CLIENTS];

    for (int i = 0; i < n; i++) {
        int pair[2];
        if (socketpair(AF_UNIX, SOCK_SEQPACKET, 0, pair) < 0)
            die("socketpair");
        fds[i] = (struct pollfd){.fd = pair[0], .events = POLLIN};
        ends[i] = pair[1];
    }
    pid_t server = fork();
    if (server == 0) {
        for (int i = 0; i < n; i++)
            close(ends[i]);
        echo_server(fds, n);
    }
    double start = now();
    for (int i = 0; i < n; i++) {
        clients[i] = fork();
        if (clients[i] == 0) {
            echo_client(ends[i], count, window);
            exit(0);
        }
    }
    for (int i = 0; i < n; i++)
        waitpid(clients[i], NULL, 0);
    double seconds = now() - start;
    for (int i = 0; i < n; i++) {
        close(ends[i]);
        close(fds[i].fd);
    }
    waitpid(server, NULL, 0);
    return seconds;
}

/* --- the daemon --- */

/*
 * The least there is: one head, one query, one key of 8 channels. What is measured is the hand-off.
 */
static struct sage_attn tiny_problem(struct sage_buffer *buffer)
{
    struct sage_attn attn = SAGE_ATTN_INIT;
    char *at = sage_buffer_data(buffer);

    attn.q = (struct sage_tensor){SAGE_F16, 0, 0, at, {1, 1, 1, 8}, {8, 8, 8, 1}};
    attn.k = (struct sage_tensor){SAGE_F16, 0, 0, at + 1024, {1, 1, 1, 8}, {8, 8, 8, 1}};
    attn.v = attn.k;
    attn.v.data = at + 2048;
    attn.o = attn.q;
    attn.o.data = at + 3072;
    return attn;
}

static void job_client(const char *socket, int count, int window, int ready_fd, int go_fd)
{
    struct sage_connect_options options = {.socket = socket, .name = "handoff"};
    struct sage_client *client;
    struct sage_buffer *buffer;
    struct sage_lane *lane;
    struct sage_job jobs[64];
    char byte = 0;

    if (sage_connect(&options, &client) || sage_buffer_alloc(client, 4096, &buffer) ||
        sage_lane_create(client, &lane))
        die("connect");
    struct sage_attn attn = tiny_problem(buffer);
    if (write(ready_fd, &byte, 1) != 1 || read(go_fd, &byte, 1) != 1)
        die("start");
    for (int i = 0; i < count + window; i++) {
        if (i >= window && sage_wait(jobs[i % window], -1))
            die("sage_wait");
        if (i < count && sage_attn_submit(lane, &attn, 0, &jobs[i % window]))
            die("sage_attn_submit");
    }
    if (write(ready_fd, &byte, 1) != 1)
        die("end");
    sage_lane_destroy(lane);
    sage_buffer_free(buffer);
    sage_disconnect(client);
    exit(0);
}

static void read_bytes(int fd, int n)
{
    char byte;

    while (n-- > 0)
        if (read(fd, &byte, 1) != 1)
            die("a client ended early");
}

static double run_jobs(const char *socket, int n, int count, int window)
{
    int ready[2], go[2];
    char byte = 0;

    if (pipe(ready) < 0 || pipe(go) < 0)
        die("pipe");
    for (int i = 0; i < n; i++)
        if (fork() == 0)
            job_client(socket, count, window, ready[1], go[0]);
    read_bytes(ready[0], n);
    double start = now();
    for (int i = 0; i < n; i++)
        if (write(go[1], &byte, 1) != 1)
            die("go");
    read_bytes(ready[0], n);
    double seconds = now() - start;
    for (int i = 0; i < n; i++)
        wait(NULL);
    close(ready[0]), close(ready[1]), close(go[0]), close(go[1]);
    return seconds;
}

static pid_t start_daemon(const char *program, const char *socket)
{
    char flag[256];
    struct sage_connect_options options = {.socket = socket};
    struct sage_client *client;

    snprintf(flag, sizeof(flag), "--socket=%s", socket);
    pid_t pid = fork();
    if (pid == 0) {
        execl(program, program, flag, "--backend=cpu", "--log-level=warning", (char *)NULL);
        _exit(127);
    }
    for (int i = 0; i < 100; i++) {
        if (sage_connect(&options, &client) == 0) {
            sage_disconnect(client);
            return pid;
        }
        usleep(50000);
    }
    die("sageattnd does not answer");
}

/*
 * Resident pages of the daemon without its slots' workspaces, in MB; slot bytes by its own account.
 */
static double resident_mb(pid_t pid)
{
    char path[64];
    long size, resident;

    snprintf(path, sizeof(path), "/proc/%d/statm", (int)pid);
    FILE *f = fopen(path, "r");
    if (!f || fscanf(f, "%ld %ld", &size, &resident) != 2)
        die("statm");
    fclose(f);
    return (double)resident * (double)sysconf(_SC_PAGESIZE) / 1e6;
}

static void measure_memory(const char *program, const char *socket)
{
    struct sage_connect_options options = {.socket = socket, .name = "idle"};
    struct sage_client *clients[IDLE_CLIENTS];
    const double slots_mb = 3 * 67.108864; /* the defaults of a machine with 4 GiB or more */
    pid_t daemon = start_daemon(program, socket);

    for (int i = 0; i < IDLE_CLIENTS; i++)
        if (sage_connect(&options, &clients[i]))
            die("idle client");
    printf("memory: %.1f MB beyond the slots, with %d idle clients (limit 20)\n",
           resident_mb(daemon) - slots_mb, IDLE_CLIENTS);
    for (int i = 0; i < IDLE_CLIENTS; i++)
        sage_disconnect(clients[i]);
    kill(daemon, SIGTERM);
    waitpid(daemon, NULL, 0);
}

int main(int argc, char **argv)
{
    double echo_us[ROUNDS], job_us[ROUNDS], echo_rate[ROUNDS], job_rate[ROUNDS];
    char directory[] = "/tmp/sageattnd-bench-XXXXXX", socket[64];

    if (argc != 2 || !mkdtemp(directory)) {
        fprintf(stderr, "usage: handoff SAGEATTND\n");
        return 2;
    }
    snprintf(socket, sizeof(socket), "%s/sock", directory);
    pid_t daemon = start_daemon(argv[1], socket);
    for (int i = 0; i < ROUNDS; i++) {
        echo_us[i] = run_echo(1, ROUND_TRIPS, 1) / ROUND_TRIPS * 1e6;
        job_us[i] = run_jobs(socket, 1, ROUND_TRIPS, 1) / ROUND_TRIPS * 1e6;
        echo_rate[i] = CLIENTS * JOBS / run_echo(CLIENTS, JOBS, WINDOW);
        job_rate[i] = CLIENTS * JOBS / run_jobs(socket, CLIENTS, JOBS, WINDOW);
    }
    kill(daemon, SIGTERM);
    waitpid(daemon, NULL, 0);

    double e = median(echo_us, ROUNDS), j = median(job_us, ROUNDS);
    printf("round trip: echo %.1f us, job %.1f us, ratio %.2f (limit 3)\n", e, j, j / e);
    e = median(echo_rate, ROUNDS), j = median(job_rate, ROUNDS);
    printf("rate: echo %.0f/s, jobs %.0f/s, ratio %.2f (limit 0.33)\n", e, j, j / e);
    measure_memory(argv[1], socket);
    snprintf(socket, sizeof(socket), "%s/sock.lock", directory);
    unlink(socket);
    rmdir(directory);
    return 0;
}
