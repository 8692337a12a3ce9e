/*
 * conn.c - connect, send one packet, receive one packet, ask one question.
 */
#include "config.h"

#include "client/conn.h"

#include <errno.h>
#include <grp.h>
#include <linux/sockios.h>
#include <poll.h>
#include <stdarg.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/ioctl.h>
#include <sys/socket.h>
#include <sys/stat.h>
#include <sys/un.h>
#include <time.h>
#include <unistd.h>

#define SYSTEM_DIR "/run/sageattnd"

/*
 * Asked for; the kernel doubles it, and allows no more than net.core.wmem_max. It charges a SUBMIT
 * of one plain problem with about 2.3 KiB: room for the 256 that a daemon allows by default.
 */
enum { SEND_BUFFER = 512 * 1024 };
enum { GPUS_MAX = 32 }; /* of one host: sockets gpu0.sock, gpu1.sock, ... */

static _Thread_local char last_error[2 * PROTO_TEXT_MAX];

int error_set(int status, const char *format, ...)
{
    char text[sizeof(last_error)]; /* an argument may be the last error itself */
    va_list args;
    va_start(args, format);
    vsnprintf(text, sizeof(text), format, args);
    va_end(args);
    memcpy(last_error, text, sizeof(text));
    return status;
}

const char *error_text(void)
{
    return last_error;
}

int status_from_wire(uint32_t number)
{
    return number < 1000 ? -(int)number : SAGE_EINTERNAL; /* a newer daemon may know more errors */
}

int64_t clock_ns(void)
{
    struct timespec t;
    clock_gettime(CLOCK_MONOTONIC, &t);
    return t.tv_sec * INT64_C(1000000000) + t.tv_nsec;
}

/* A socket that we may not look at is there too: who is refused gets told why. */
static bool is_there(const char *path)
{
    return access(path, F_OK) == 0 || errno == EACCES;
}

/* The GPUs after the default one have sockets of their own beside its. */
bool conn_default(int i, char *buf, size_t size)
{
    const char *dir = secure_getenv("XDG_RUNTIME_DIR");

    for (int k = 0; k < GPUS_MAX + 2; k++) {
        if (k == 0)
            snprintf(buf, size, SYSTEM_DIR "/sageattnd.sock");
        else if (k <= GPUS_MAX)
            snprintf(buf, size, SYSTEM_DIR "/gpu%d.sock", k - 1);
        else if (dir && *dir)
            snprintf(buf, size, "%s/sageattnd.sock", dir);
        else
            break;
        if (is_there(buf) && i-- == 0)
            return true;
    }
    return false;
}

const char *conn_path(const char *given, char *buf, size_t size)
{
    if (!given)
        given = secure_getenv("SAGEATTND_SOCKET");
    if (given && *given)
        snprintf(buf, size, "%s", given);
    else if (!conn_default(0, buf, size))
        snprintf(buf, size, SYSTEM_DIR "/sageattnd.sock");
    return buf;
}

int conn_init(struct conn *conn, int stop)
{
    conn->fd = -1;
    conn->stop = stop;
    conn->limit = CONN_NO_LIMIT;
    conn->seq = 0;
    conn->unpacker = unpacker_create();
    return conn->unpacker ? 0 : error_set(SAGE_ENOMEM, "out of memory");
}

void conn_finish(struct conn *conn)
{
    conn_close(conn);
    unpacker_destroy(conn->unpacker);
    conn->unpacker = NULL;
}

void conn_close(struct conn *conn)
{
    if (conn->fd >= 0)
        close(conn->fd);
    conn->fd = -1;
}

static int no_permission(const char *path)
{
    struct stat st;
    struct group group, *found = NULL;
    char buf[4096];
    if (stat(path, &st) < 0)
        return error_set(SAGE_EPERM, "%s: permission denied", path);
    getgrgid_r(st.st_gid, &group, buf, sizeof(buf), &found);
    if (!found)
        return error_set(SAGE_EPERM, "%s: permission denied: it is for group %u", path, st.st_gid);
    return error_set(SAGE_EPERM,
                     "%s: permission denied: it is for group %s: usermod -aG %s USER, log in again",
                     path, found->gr_name, found->gr_name);
}

/* Wait for `events` on fd. 0, SAGE_ETIMEDOUT, or SAGE_ECANCELED when stop became readable. */
static int await(int fd, short events, int stop, int64_t deadline)
{
    for (;;) {
        struct pollfd p[2] = {{.fd = fd, .events = events}, {.fd = stop, .events = POLLIN}};
        int64_t left = deadline < 0 ? -1 : deadline - clock_ns();
        if (deadline >= 0 && left <= 0)
            return error_set(SAGE_ETIMEDOUT, "the daemon did not answer in time");
        int timeout = left < 0 ? -1 : left / 1000000 > 60000 ? 60000 : (int)(left / 1000000) + 1;
        int n = poll(p, 2, timeout);
        if (n > 0 && p[1].revents)
            return error_set(SAGE_ECANCELED, "the client is being closed");
        if (n > 0)
            return 0;
    }
}

static int64_t deadline_of(const struct conn *conn)
{
    int64_t end = clock_ns() + CONN_TIMEOUT_MS * INT64_C(1000000);
    return end < conn->limit ? end : conn->limit;
}

int conn_open(struct conn *conn, const char *path)
{
    struct sockaddr_un addr = {.sun_family = AF_UNIX};
    if (strlen(path) >= sizeof(addr.sun_path))
        return error_set(SAGE_EINVAL, "socket path is longer than %zu: %s",
                         sizeof(addr.sun_path) - 1, path);
    memcpy(addr.sun_path, path, strlen(path));
    conn->fd = socket(AF_UNIX, SOCK_SEQPACKET | SOCK_CLOEXEC | SOCK_NONBLOCK, 0);
    if (conn->fd < 0)
        return error_set(SAGE_ENOMEM, "socket: %s", strerror(errno));
    setsockopt(conn->fd, SOL_SOCKET, SO_SNDBUF, &(int){SEND_BUFFER}, sizeof(int));

    int64_t deadline = deadline_of(conn);
    int rc = 0;
    while (!rc && connect(conn->fd, (struct sockaddr *)&addr, sizeof(addr)) < 0) {
        if (errno == EAGAIN) { /* its backlog is full, and nothing tells when it no longer is */
            rc = await(-1, 0, conn->stop, clock_ns() + 10 * INT64_C(1000000));
            if (rc == SAGE_ETIMEDOUT && clock_ns() < deadline)
                rc = 0;
        } else if (errno == EACCES || errno == EPERM) {
            rc = no_permission(path);
        } else if (errno == ENOENT || errno == ECONNREFUSED) {
            rc = error_set(
                SAGE_ENODAEMON,
                "no daemon at %s: start one: systemctl start sageattnd, or run sageattnd", path);
        } else if (errno != EINTR) {
            rc = error_set(SAGE_ENODAEMON, "%s: %s", path, strerror(errno));
        }
    }
    if (rc)
        conn_close(conn);
    return rc;
}

int conn_push(int fd, const void *data, size_t len, const struct conn_fds *fds)
{
    struct iovec iov = {.iov_base = (void *)data, .iov_len = len};
    union {
        char buf[CMSG_SPACE(PROTO_FDS_MAX * sizeof(int))];
        struct cmsghdr align;
    } control;
    struct msghdr msg = {.msg_iov = &iov, .msg_iovlen = 1};
    if (fds && fds->n > 0) {
        memset(&control, 0, sizeof(control));
        msg.msg_control = control.buf;
        msg.msg_controllen = CMSG_SPACE(fds->n * sizeof(int));
        struct cmsghdr *cmsg = CMSG_FIRSTHDR(&msg);
        cmsg->cmsg_level = SOL_SOCKET;
        cmsg->cmsg_type = SCM_RIGHTS;
        cmsg->cmsg_len = CMSG_LEN(fds->n * sizeof(int));
        memcpy(CMSG_DATA(cmsg), fds->fd, fds->n * sizeof(int));
    }
    for (;;) {
        if (sendmsg(fd, &msg, MSG_NOSIGNAL | MSG_DONTWAIT) >= 0)
            return 0;
        switch (errno) {
        case EINTR:
            continue;
        case EAGAIN:
            return error_set(SAGE_EBUSY, "the daemon does not read its socket");
        case ENOBUFS:
        case ENOMEM:
            return error_set(SAGE_ENOMEM, "sendmsg: %s", strerror(errno));
        case EPIPE:
        case ECONNRESET:
        case ENOTCONN:
            return error_set(SAGE_ELOST, "the daemon closed the connection");
        default:
            return error_set(SAGE_EINTERNAL, "sendmsg: %s", strerror(errno));
        }
    }
}

bool conn_has_room(int fd)
{
    struct pollfd p = {.fd = fd, .events = POLLOUT};
    int used, size;
    socklen_t len = sizeof(size);
    if (poll(&p, 1, 0) > 0)
        return true;
    /* POLLOUT stands for three quarters that are free; sendmsg() is content with any room. */
    return ioctl(fd, SIOCOUTQ, &used) == 0 &&
           getsockopt(fd, SOL_SOCKET, SO_SNDBUF, &size, &len) == 0 && used < size;
}

int conn_send(int fd, const void *data, size_t len, const struct conn_fds *fds)
{
    for (;;) {
        int rc = conn_push(fd, data, len, fds);
        if (rc != SAGE_EBUSY && rc != SAGE_ENOMEM)
            return rc;
        struct pollfd p = {.fd = fd, .events = rc == SAGE_EBUSY ? POLLOUT : 0};
        poll(&p, 1, rc == SAGE_EBUSY ? -1 : 1); /* the kernel is out of memory: a moment later */
    }
}

int conn_recv(struct conn *conn, struct packet *packet, int64_t deadline)
{
    bool reset = false;
    for (;;) {
        ssize_t n = recv(conn->fd, conn->in, sizeof(conn->in), MSG_DONTWAIT);
        if (n > PROTO_PACKET_MAX)
            return error_set(SAGE_EPROTO, "the daemon sent more than %d bytes", PROTO_PACKET_MAX);
        if (n > 0) {
            char why[PROTO_TEXT_MAX];
            conn->unpacking = true;
            int rc = packet_open(conn->unpacker, conn->in, (size_t)n, packet, why);
            conn->unpacking = false;
            return rc ? error_set(rc, "from the daemon: %s", why) : 0;
        }
        if (n < 0 && errno == EINTR)
            continue;
        if (n < 0 && errno == ECONNRESET && !reset) {
            reset = true; /* it did not read all that we sent; what it said before is still there */
            continue;
        }
        if (n == 0 || errno != EAGAIN)
            return error_set(SAGE_ELOST, "the daemon closed the connection");
        int rc = await(conn->fd, POLLIN, conn->stop, deadline);
        if (rc)
            return rc;
    }
}

int conn_reply(const struct packet *packet, uint32_t op, enum msg_kind kind, void *reply)
{
    char why[PROTO_TEXT_MAX];
    if (packet->op == OP_ERROR) {
        struct msg_error error;
        int rc = packet_decode(packet, MSG_ERROR, &error, why);
        if (rc || !error.status)
            return error_set(SAGE_EPROTO, "from the daemon: ERROR: %s", rc ? why : "status 0");
        rc = status_from_wire(error.status);
        return error_set(rc, "%s", error.text[0] ? error.text : sage_strerror(rc));
    }
    if (packet->op != op)
        return error_set(SAGE_EPROTO, "the daemon answered %s with %s", proto_op_name(op),
                         proto_op_name(packet->op));
    int rc = packet_decode(packet, kind, reply, why);
    return rc ? error_set(rc, "from the daemon: %s: %s", proto_op_name(op), why) : 0;
}

int conn_call(struct conn *conn, uint32_t op, enum msg_kind kind, const void *msg,
              const struct conn_fds *fds, enum msg_kind reply_kind, void *reply)
{
    uint32_t seq = ++conn->seq;
    size_t len = packet_encode(conn->out, sizeof(conn->out), op, seq, kind, msg);
    if (!len)
        return error_set(SAGE_EINTERNAL, "%s does not fit a packet", proto_op_name(op));

    struct packet packet;
    int64_t deadline = deadline_of(conn);
    int rc = conn_push(conn->fd, conn->out, len, fds);
    while (rc == SAGE_EBUSY && !(rc = await(conn->fd, POLLOUT, conn->stop, deadline)))
        rc = conn_push(conn->fd, conn->out, len, fds);
    if (!rc || rc == SAGE_ELOST) /* who closes on us may have said why */
        do
            rc = conn_recv(conn, &packet, deadline);
        while (!rc && packet.seq != seq && packet.op != OP_ERROR);
    if (!rc)
        return conn_reply(&packet, op, reply_kind, reply);
    conn_close(conn);
    return rc;
}

int conn_hello(struct conn *conn, const char *name, uint32_t priority, int page,
               struct msg_welcome *welcome)
{
    struct msg_hello hello = {
        .major = PROTO_MAJOR,
        .minor = PROTO_MINOR,
        .priority = priority,
        .pid = (uint64_t)getpid(),
        .library = "libsageclient " PACKAGE_VERSION,
        .page = page >= 0,
    };
    struct conn_fds fds = {page >= 0, {page}};
    snprintf(hello.name, sizeof(hello.name), "%s", name);
    int rc = conn_call(conn, OP_HELLO, MSG_HELLO, &hello, &fds, MSG_WELCOME, welcome);
    if (!rc && welcome->major != PROTO_MAJOR)
        rc = error_set(SAGE_EVERSION, "the daemon speaks protocol %u, this program %u: update one",
                       welcome->major, PROTO_MAJOR);
    if (rc)
        conn_close(conn);
    return rc;
}
