/*
 * server.c - accepting clients; sd_notify(3), the watchdog, idle exit and signals.
 */
#include "daemon/server.h"

#include <errno.h>
#include <fcntl.h>
#include <grp.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/file.h>
#include <sys/socket.h>
#include <sys/stat.h>
#include <sys/un.h>
#include <unistd.h>

#include "config.h"
#include "daemon/discard.h"
#include "daemon/log.h"

enum {
    BACKLOG = 128,
    ACCEPTS_PER_TURN = 16,
    SOCKETS_MAX = 64, /* that wait to be closed, before others are accepted */
    PAUSE_MS = 2,     /* then */
};

/* --- the socket --- */

/* A lock beside the socket tells a running daemon from the socket of a dead one. */
static int take_lock(const char *path, char *why)
{
    char lock[CONFIG_STR_MAX + 8];

    snprintf(lock, sizeof(lock), "%s.lock", path);
    int fd = open(lock, O_RDWR | O_CREAT | O_CLOEXEC | O_NOFOLLOW, 0600);
    if (fd < 0) {
        snprintf(why, PROTO_TEXT_MAX, "socket: %.100s: %s", lock, strerror(errno));
        return -1;
    }
    if (flock(fd, LOCK_EX | LOCK_NB) < 0) {
        snprintf(why, PROTO_TEXT_MAX, "socket: another sageattnd has %.140s", path);
        close(fd);
        return -1;
    }
    return fd;
}

static void set_owner(const char *path, const char *group)
{
    struct group *gr = group[0] ? getgrnam(group) : NULL;
    bool given = gr && chown(path, (uid_t)-1, gr->gr_gid) == 0;

    if (gr && !given)
        log_warning("socket_group", "group=%s error=\"%s\"", group, strerror(errno));
    if (chmod(path, given ? 0660 : 0600) < 0) /* the daemon's own group was not asked for */
        log_warning("socket_mode", "error=\"%s\"", strerror(errno));
}

static bool is_answered(const struct sockaddr_un *address)
{
    int fd = socket(AF_UNIX, SOCK_SEQPACKET | SOCK_CLOEXEC | SOCK_NONBLOCK, 0);
    int rc = connect(fd, (const struct sockaddr *)address, sizeof(*address));
    bool answered = fd >= 0 && (rc == 0 || errno == EAGAIN);

    if (fd >= 0)
        close(fd);
    return answered;
}

static int bind_socket(const char *path, const char *group, char *why)
{
    struct sockaddr_un address = {.sun_family = AF_UNIX};
    struct stat st;

    if (strlen(path) >= sizeof(address.sun_path)) {
        snprintf(why, PROTO_TEXT_MAX, "socket: path is over %zu bytes",
                 sizeof(address.sun_path) - 1);
        return -1;
    }
    strcpy(address.sun_path, path);
    if (lstat(path, &st) == 0 && !S_ISSOCK(st.st_mode)) {
        snprintf(why, PROTO_TEXT_MAX, "socket: %.140s exists and is no socket", path);
        return -1;
    }
    if (is_answered(&address)) { /* by somebody who has no lock: systemd, say */
        snprintf(why, PROTO_TEXT_MAX, "socket: somebody listens on %.140s already", path);
        return -1;
    }
    unlink(path);
    int fd = socket(AF_UNIX, SOCK_SEQPACKET | SOCK_CLOEXEC | SOCK_NONBLOCK, 0);
    mode_t mask = umask(0177); /* nobody gets in before set_owner() says who may */
    int rc = fd < 0 ? -1 : bind(fd, (struct sockaddr *)&address, sizeof(address));
    umask(mask);
    if (rc == 0) {
        set_owner(path, group);
        rc = listen(fd, BACKLOG);
    }
    if (rc < 0) {
        snprintf(why, PROTO_TEXT_MAX, "socket: %.100s: %s", path, strerror(errno));
        if (fd >= 0)
            close(fd);
        return -1;
    }
    return fd;
}

static int activated_socket(char *why)
{
    int n = sd_listen_fds(1);

    if (n == 0)
        return -1;
    if (n != 1 || sd_is_socket_unix(SD_LISTEN_FDS_START, SOCK_SEQPACKET, 1, NULL, 0) <= 0) {
        snprintf(why, PROTO_TEXT_MAX,
                 "socket activation: must be one listening Unix SOCK_SEQPACKET");
        return -2;
    }
    fcntl(SD_LISTEN_FDS_START, F_SETFL, O_NONBLOCK);
    return SD_LISTEN_FDS_START;
}

/* Until the next tick: do not spin. */
static void pause_accepting(struct server *server)
{
    uv_poll_stop(&server->poll);
    server->paused = true;
}

static void on_connection(uv_poll_t *poll, int status, int events);

static void resume_accepting(struct server *server)
{
    const struct daemon *d = server->daemon;

    if (!server->paused || d->drained || (d->draining && server->lock_fd < 0))
        return;
    server->paused = false;
    uv_poll_start(&server->poll, UV_READABLE, on_connection);
}

static void on_pause(uv_timer_t *timer)
{
    resume_accepting(timer->data);
}

static void on_connection(uv_poll_t *poll, int status, int events)
{
    struct server *server = poll->data;
    (void)status, (void)events;

    if (discard_sockets() > SOCKETS_MAX) {
        if (daemon_may_complain(server->daemon))
            log_warning("accept", "reason=\"sockets wait to be closed\" n=%u", discard_sockets());
        pause_accepting(server);
        uv_timer_start(&server->pause, on_pause, PAUSE_MS, 0);
        return;
    }
    for (int i = 0; i < ACCEPTS_PER_TURN; i++) {
        int fd = accept4(server->fd, NULL, NULL, SOCK_CLOEXEC | SOCK_NONBLOCK);
        if (fd >= 0) {
            session_create(server->daemon, fd);
            continue;
        }
        if (errno == EINTR || errno == ECONNABORTED)
            continue;
        if (errno != EAGAIN) { /* out of descriptors, say */
            log_error("accept", "error=\"%s\"", strerror(errno));
            pause_accepting(server);
        }
        return;
    }
}

/* --- the service manager --- */

static void tell_status(struct server *server)
{
    const struct daemon *d = server->daemon;
    char status[sizeof(server->status)];

    snprintf(status, sizeof(status), "%s on %s; %u clients, %llu jobs done",
             d->draining ? "draining" : "running", d->device_name, d->n_sessions,
             (unsigned long long)d->stats.done);
    if (!strcmp(status, server->status))
        return;
    strcpy(server->status, status);
    sd_notifyf(0, "STATUS=%s", status);
}

static void on_tick(struct daemon *d)
{
    struct server *server = d->server;
    uint64_t now = daemon_now();

    tell_status(server);
    if (server->watchdog_ns && now - server->fed_ns >= server->watchdog_ns / 3) {
        sd_notify(0, "WATCHDOG=1");
        server->fed_ns = now;
    }
    resume_accepting(server);
    if (d->config.idle_exit && d->n_sessions == 0 &&
        now - d->idle_since_ns >= d->config.idle_exit * 1000000000)
        daemon_drain(d);
}

static void on_drain(struct daemon *d)
{
    struct server *server = d->server;

    sd_notify(0, "STOPPING=1");
    if (server->lock_fd < 0) /* who connects from now on is for the next daemon */
        uv_poll_stop(&server->poll);
}

static void on_drained(struct daemon *d)
{
    struct server *server = d->server;

    uv_poll_stop(&server->poll);
}

static void on_signal(uv_signal_t *handle, int number)
{
    struct daemon *d = handle->data;
    struct server *server = d->server;

    if (server->told) { /* twice: at once, then */
        log_warning("aborted", "signal=%d", number);
        _exit(EXIT_FAILURE);
    }
    server->told = true;
    daemon_drain(d);
}

/* --- life --- */

int server_open(struct server *server, struct daemon *d, char *why)
{
    uint64_t watchdog_us = 0;

    *server = (struct server){.daemon = d, .lock_fd = -1};
    server->fd = activated_socket(why);
    if (server->fd == -1) {
        server->lock_fd = take_lock(d->config.socket, why);
        if (server->lock_fd >= 0)
            server->fd = bind_socket(d->config.socket, d->config.group, why);
    }
    if (server->fd < 0) {
        if (server->lock_fd >= 0)
            close(server->lock_fd);
        return SAGE_EINVAL;
    }
    uv_poll_init(&d->loop, &server->poll, server->fd);
    server->poll.data = server;
    uv_poll_start(&server->poll, UV_READABLE, on_connection);
    uv_timer_init(&d->loop, &server->pause);
    server->pause.data = server;
    uv_signal_init(&d->loop, &server->sigterm);
    uv_signal_init(&d->loop, &server->sigint);
    server->sigterm.data = server->sigint.data = d;
    uv_signal_start(&server->sigterm, on_signal, SIGTERM);
    uv_signal_start(&server->sigint, on_signal, SIGINT);
    if (sd_watchdog_enabled(0, &watchdog_us) > 0)
        server->watchdog_ns = watchdog_us * 1000;
    d->server = server;
    d->on_tick = on_tick;
    d->on_drain = on_drain;
    d->on_drained = on_drained;
    return 0;
}

void server_ready(struct server *server)
{
    const struct daemon *d = server->daemon;

    log_notice("ready", "version=%s backend=%s device=\"%s\" socket=%s slots=%u slot_bytes=%zu",
               PACKAGE_VERSION, d->backend->name, d->device_name,
               server->lock_fd >= 0 ? d->config.socket : "activated", d->sched.n_slots,
               d->sched.workspace);
    sd_notifyf(0, "READY=1\nMAINPID=%d", (int)getpid());
    tell_status(server);
}

void server_finish(struct server *server)
{
    if (server->lock_fd >= 0)
        unlink(server->daemon->config.socket);
    /* Not server->fd: the process ends, and does not wait then for what is in the backlog. */
    if (server->lock_fd >= 0)
        close(server->lock_fd);
}
