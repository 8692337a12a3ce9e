/*
 * session.c - a connection: reading, answering, closing. What the requests do is in requests.c.
 */
#include "daemon/session.h"

#include <errno.h>
#include <fcntl.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/socket.h>
#include <sys/stat.h>
#include <sys/syscall.h>
#include <unistd.h>

#include "daemon/daemon.h"
#include "daemon/discard.h"
#include "daemon/log.h"
#include "daemon/requests.h"

#ifndef SO_PEERPIDFD
#define SO_PEERPIDFD 77 /* Linux 6.5; Debian 12's headers do not have it */
#endif

enum {
    CALLS_PER_TURN = 8,       /* to receive from one session, before the others are heard */
    HEAR_NS = 1000 * 1000,    /* all sessions, in one turn; who comes later is heard for */
    HEAR_LATE_NS = 20 * 1000, /* so long, and one packet at least */
    FDS_ROOM = 253, /* SCM_MAX_FD of the kernel: surplus ones are seen, and closed by others */
};

static void update_poll(struct session *s);

#define HELLO_NS UINT64_C(5000000000) /* a connection without it is of no use, but counts */

/* --- life --- */

static const char too_many_fds[] = "descriptors: too many of this user are open or being closed";

static struct user *user_get(struct daemon *d, uid_t uid)
{
    struct user *user;

    TAILQ_FOREACH(user, &d->users, link)
        if (user->uid == uid)
            break;
    if (!user) {
        user = calloc(1, sizeof(*user));
        if (!user)
            return NULL;
        user->uid = uid;
        TAILQ_INSERT_TAIL(&d->users, user, link);
    }
    user->sessions++;
    return user;
}

static void user_put(struct daemon *d, struct user *user)
{
    if (--user->sessions > 0)
        return;
    TAILQ_REMOVE(&d->users, user, link);
    free(user);
}

static void on_pid(uv_poll_t *handle, int status, int events)
{
    (void)status, (void)events;
    session_close(handle->data, "process is gone");
}

/*
 * The process may be gone while a child of it keeps the socket open: its pidfd tells. The socket's
 * own pidfd cannot mean another process; older kernels only have the pid. False: it is gone
 * already.
 */
static bool watch_pid(struct session *s)
{
    socklen_t len = sizeof(s->pidfd);

    if (getsockopt(s->fd, SOL_SOCKET, SO_PEERPIDFD, &s->pidfd, &len) < 0)
        s->pidfd = (int)syscall(SYS_pidfd_open, s->pid, 0);
    if (s->pidfd < 0)
        return errno != ESRCH;
    fcntl(s->pidfd, F_SETFD, FD_CLOEXEC);
    if (uv_poll_init(&s->daemon->loop, &s->pid_poll, s->pidfd) < 0) {
        close(s->pidfd);
        s->pidfd = -1;
        return true;
    }
    s->pid_poll.data = s;
    s->handles++;
    uv_poll_start(&s->pid_poll, UV_READABLE, on_pid);
    return true;
}

/* A connection that cannot be served is told so before it is closed. */
static struct session *reject(struct daemon *d, int fd, int status, const char *text)
{
    struct msg_error msg = {.status = (uint32_t)-status};

    snprintf(msg.text, sizeof(msg.text), "%s", text);
    size_t len = packet_encode(d->reply, sizeof(d->reply), OP_ERROR, 0, MSG_ERROR, &msg);
    if (send(fd, d->reply, len, MSG_NOSIGNAL | MSG_DONTWAIT) < 0)
        log_debug("reject_unsent", "reason=\"%s\"", text);
    if (daemon_may_complain(d))
        log_warning("rejected", "reason=\"%s\"", text);
    discard_socket(fd);
    return NULL;
}

struct session *session_create(struct daemon *d, int fd)
{
    struct ucred cred = {.uid = (uid_t)-1};
    socklen_t len = sizeof(cred);

    if (getsockopt(fd, SOL_SOCKET, SO_PEERCRED, &cred, &len) < 0)
        return reject(d, fd, SAGE_EPERM, "no peer credentials");
    if (d->n_sessions >= d->config.max_clients)
        return reject(d, fd, SAGE_EQUOTA, "too many connections (max_clients)");
    struct session *s = calloc(1, sizeof(*s));
    struct user *user = s ? user_get(d, cred.uid) : NULL;
    if (!user) {
        free(s);
        return reject(d, fd, SAGE_ENOMEM, "out of memory");
    }
    const char *over = NULL;
    if (user->sessions > d->config.user_clients)
        over = "too many connections of this user (user_clients)";
    else if (buffer_user_is_over(d, user))
        over = too_many_fds;
    if (over || uv_poll_init(&d->loop, &s->poll, fd) < 0) {
        user_put(d, user);
        free(s);
        return over ? reject(d, fd, SAGE_EQUOTA, over)
                    : reject(d, fd, SAGE_ENOMEM, "out of memory or descriptors");
    }
    s->daemon = d;
    s->id = d->next_session++;
    s->fd = fd;
    s->pid = cred.pid;
    s->user = user;
    s->connected_ns = daemon_now();
    for (int i = 0; i < SAGE_LANES; i++)
        TAILQ_INIT(&s->lanes[i].jobs);
    for (int i = 0; i < SESSION_BUCKETS; i++)
        TAILQ_INIT(&s->buffers[i]);
    LIST_INIT(&s->events);
    s->mode = "";
    TAILQ_INIT(&s->ready);
    STAILQ_INIT(&s->backlog);
    s->poll.data = s;
    s->handles = 1;
    TAILQ_INSERT_TAIL(&d->sessions, s, link);
    d->n_sessions++;
    d->n_live++;
    if (watch_pid(s))
        update_poll(s);
    else
        session_close(s, "process is gone");
    return s;
}

/* --- the page, for streams of the device --- */

static void queue_page_work(struct session *s, uv_work_cb work, uv_after_work_cb after)
{
    s->page_busy = true;
    s->page_work.data = s;
    uv_queue_work(&s->daemon->loop, &s->page_work, work, after);
}

static void open_page_work(uv_work_t *work)
{
    struct session *s = work->data;
    const struct daemon *d = s->daemon;
    char why[PROTO_TEXT_MAX];

    s->page_status = d->backend->page_open(d->device, s->page, &s->page_opened, why);
    if (s->page_status)
        log_warning("page", "client=%llu reason=\"%s\"", (unsigned long long)s->id, why);
}

/* Until then, and where it cannot be opened, the loop releases jobs. */
static void after_open_page(uv_work_t *work, int status)
{
    struct session *s = work->data;
    (void)status;

    s->page_busy = false;
    if (s->page_status == SAGE_EDEVICE)
        daemon_lose(s->daemon, "found by opening a page to it");
    else if (!s->page_status)
        s->remote = s->page_opened;
    if (s->closing)
        session_free_if_unused(s);
}

static void close_page_work(uv_work_t *work)
{
    const struct session *s = work->data;
    const struct daemon *d = s->daemon;

    d->backend->page_close(d->device, s->page);
}

static void after_close_page(uv_work_t *work, int status)
{
    struct session *s = work->data;
    (void)status;

    s->page_busy = false;
    s->remote = NULL;
    session_free_if_unused(s);
}

/* All that needed the struct tells so; the page goes last. */
void session_free_if_unused(struct session *s)
{
    struct daemon *d = s->daemon;

    if (s->handles || s->n_jobs || s->n_mappings || s->n_events || s->page_busy)
        return;
    if (s->remote) {
        queue_page_work(s, close_page_work, after_close_page);
        return;
    }
    TAILQ_REMOVE(&d->closing, s, link);
    user_put(d, s->user);
    page_unmap(s->page);
    free(s->report);
    free(s);
    d->n_live--;
}

static bool is_page_in_use(const struct session *s, const struct stat *st)
{
    for (; s; s = TAILQ_NEXT(s, link))
        if (s->page && s->page_ino == st->st_ino && s->page_dev == st->st_dev)
            return true;
    return false;
}

int session_set_page(struct session *s, int fd, const char **why)
{
    struct stat st;
    struct sage_page *page = page_map(fd, why); /* first: of others fstat() may take for ever */

    if (!page)
        return SAGE_EPROTO;
    *why = "page: another connection uses it, or has jobs that are still running";
    if (fstat(fd, &st) < 0 || is_page_in_use(TAILQ_FIRST(&s->daemon->sessions), &st) ||
        is_page_in_use(TAILQ_FIRST(&s->daemon->closing), &st)) {
        page_unmap(page);
        return SAGE_EBUSY;
    }
    s->page = page;
    s->page_ino = st.st_ino;
    s->page_dev = st.st_dev;
    if (s->daemon->backend->page_open)
        queue_page_work(s, open_page_work, after_open_page);
    return 0;
}

static void on_closed(uv_handle_t *handle)
{
    struct session *s = handle->data;

    if (handle == (uv_handle_t *)&s->poll)
        discard_socket(s->fd);
    else
        close(s->pidfd);
    s->handles--;
    session_free_if_unused(s);
}

static void drop_jobs(struct session *s)
{
    struct job *job, *next;

    for (int i = 0; i < SAGE_LANES; i++) {
        for (job = TAILQ_FIRST(&s->lanes[i].jobs); job; job = next) {
            next = TAILQ_NEXT(job, lane_link);
            if (job->state == JOB_RUNNING)
                job->dropped = true;
            else
                job_drop(job);
        }
    }
}

void session_close(struct session *s, const char *reason)
{
    struct daemon *d = s->daemon;
    struct outgoing *out;

    if (s->closing)
        return;
    if (!s->welcome || daemon_may_tell_visit(d))
        log_event(s->welcome ? 6 : 7, "disconnected",
                  "client=%llu pid=%d name=\"%s\" done=%llu reason=\"%s\"",
                  (unsigned long long)s->id, (int)s->pid, s->name, (unsigned long long)s->done,
                  reason);
    s->closing = true;
    watch_rested(s);
    TAILQ_REMOVE(&d->sessions, s, link);
    TAILQ_INSERT_TAIL(&d->closing, s, link);
    d->n_sessions--;
    d->idle_since_ns = daemon_now();
    if (s->flushing)
        TAILQ_REMOVE(&d->flushing, s, flush_link);
    while ((out = STAILQ_FIRST(&s->backlog))) {
        STAILQ_REMOVE_HEAD(&s->backlog, link);
        free(out);
    }
    drop_jobs(s);
    buffer_leave_all(s);
    event_leave_all(s);
    job_put_events(s);
    uv_close((uv_handle_t *)&s->poll, on_closed);
    if (s->pidfd >= 0)
        uv_close((uv_handle_t *)&s->pid_poll, on_closed);
}

/* --- sending --- */

/* 0: sent; 1: not now; negative: never. */
static int send_now(struct session *s, const void *data, size_t len)
{
    if (send(s->fd, data, len, MSG_NOSIGNAL | MSG_DONTWAIT) >= 0)
        return 0;
    return errno == EAGAIN || errno == ENOBUFS || errno == EINTR ? 1 : -1;
}

static bool keep(struct session *s, const void *data, size_t len)
{
    struct outgoing *out = malloc(sizeof(*out) + len);

    if (!out)
        return false;
    out->len = len;
    memcpy(out->data, data, len);
    if (s->backlog_bytes == 0)
        s->backlog_since_ns = daemon_now();
    STAILQ_INSERT_TAIL(&s->backlog, out, link);
    s->backlog_bytes += len;
    update_poll(s);
    return true;
}

void session_send(struct session *s, uint32_t op, uint32_t seq, enum msg_kind kind, const void *msg)
{
    struct daemon *d = s->daemon;

    if (s->closing)
        return;
    size_t len = packet_encode(d->reply, sizeof(d->reply), op, seq, kind, msg);
    if (len == 0) {
        log_error("reply_too_long", "op=%s", proto_op_name(op));
        session_close(s, "reply too long");
        return;
    }
    int rc = s->backlog_bytes ? 1 : send_now(s, d->reply, len);
    if (rc < 0)
        session_close(s, "cannot be written to");
    else if (rc > 0 && !keep(s, d->reply, len))
        session_close(s, "out of memory");
}

static void send_backlog(struct session *s)
{
    struct outgoing *out;

    while ((out = STAILQ_FIRST(&s->backlog))) {
        int rc = send_now(s, out->data, out->len);
        if (rc < 0) {
            session_close(s, "cannot be written to");
            return;
        }
        if (rc > 0)
            break;
        STAILQ_REMOVE_HEAD(&s->backlog, link);
        s->backlog_bytes -= out->len;
        s->backlog_since_ns = daemon_now();
        free(out);
    }
    update_poll(s);
}

void session_error(struct session *s, uint32_t seq, int status, const char *text)
{
    struct msg_error msg = {.status = (uint32_t)-status};

    snprintf(msg.text, sizeof(msg.text), "%s", text);
    session_send(s, OP_ERROR, seq, MSG_ERROR, &msg);
}

void session_report(struct session *s, const struct msg_done_job *job, bool prompt)
{
    if (s->closing)
        return;
    if (!s->report) {
        s->report = calloc(1, sizeof(*s->report));
        if (!s->report) {
            session_close(s, "out of memory");
            return;
        }
    }
    s->report->jobs[s->report->n_jobs++] = *job;
    if (!s->flushing) {
        s->flushing = true;
        TAILQ_INSERT_TAIL(&s->daemon->flushing, s, flush_link);
    }
    s->prompt |= prompt || job->status || s->report->n_jobs >= DONE_BATCH;
    if (s->report->n_jobs == DONE_MAX)
        session_flush(s);
}

void session_flush(struct session *s)
{
    struct msg_done *report = s->report;

    TAILQ_REMOVE(&s->daemon->flushing, s, flush_link);
    s->flushing = s->prompt = false;
    session_send(s, OP_DONE, 0, MSG_DONE, report);
    report->n_jobs = 0;
}

const char *session_overdue(const struct session *s, uint64_t now_ns)
{
    if (s->backlog_bytes > BACKLOG_MAX &&
        now_ns - s->backlog_since_ns > s->daemon->config.backlog_ms * 1000000)
        return "does not read its replies";
    if (!s->welcome && now_ns - s->connected_ns > HELLO_NS)
        return "does not say HELLO";
    return NULL;
}

/* --- receiving --- */

static bool drop(struct session *s, int status, const char *why)
{
    if (daemon_may_complain(s->daemon))
        log_warning("violation", "client=%llu pid=%d name=\"%s\" reason=\"%s\"",
                    (unsigned long long)s->id, (int)s->pid, s->name, why);
    s->daemon->stats.clients_dropped++;
    session_error(s, 0, status, why);
    session_close(s, why);
    return false;
}

static bool violate(struct session *s, const char *why)
{
    return drop(s, SAGE_EPROTO, why);
}

bool session_packet(struct session *s, const void *data, size_t len, const int *fds, unsigned n_fds)
{
    char why[PROTO_TEXT_MAX];
    struct packet packet;

    if (n_fds > PROTO_FDS_MAX) {
        discard(s->user->uid, fds, n_fds);
        return violate(s, "descriptors on a packet: too many");
    }
    if (packet_open(s->daemon->unpacker, data, len, &packet, why)) {
        discard(s->user->uid, fds, n_fds);
        return violate(s, why);
    }
    if (!request(s, &packet, fds, n_fds, why))
        return violate(s, why);
    return !s->closing;
}

static unsigned take_fds(struct msghdr *msg, int fds[FDS_ROOM])
{
    unsigned n = 0;

    for (struct cmsghdr *c = CMSG_FIRSTHDR(msg); c; c = CMSG_NXTHDR(msg, c)) {
        if (c->cmsg_level != SOL_SOCKET || c->cmsg_type != SCM_RIGHTS)
            continue;
        size_t count = (c->cmsg_len - CMSG_LEN(0)) / sizeof(int);
        for (size_t i = 0; i < count && n < FDS_ROOM; i++)
            memcpy(&fds[n++], CMSG_DATA(c) + i * sizeof(int), sizeof(int));
    }
    return n;
}

static bool take_packet(struct session *s, struct msghdr *msg, const void *data, size_t len)
{
    int fds[FDS_ROOM];
    unsigned n_fds = take_fds(msg, fds);

    if (s->closing) { /* an earlier packet of the same call was too bad */
        discard(s->user->uid, fds, n_fds);
        return false;
    }
    if (len == 0 && n_fds == 0) {
        session_close(s, "end of file");
        return false;
    }
    if (msg->msg_flags & (MSG_TRUNC | MSG_CTRUNC) || len > PROTO_PACKET_MAX) {
        discard(s->user->uid, fds, n_fds);
        return violate(s, "packet too long or too many descriptors");
    }
    return session_packet(s, data, len, fds, n_fds);
}

/* What is there, up to `most` packets. false: there is no more, now or ever. */
static bool receive(struct session *s, unsigned most)
{
    struct daemon *d = s->daemon;
    union {
        char bytes[CMSG_SPACE(FDS_ROOM * sizeof(int))];
        struct cmsghdr align;
    } control[PACKETS_AT_ONCE];
    struct iovec iov[PACKETS_AT_ONCE];
    struct mmsghdr msgs[PACKETS_AT_ONCE];

    if (buffer_user_is_over(d, s->user))
        return drop(s, SAGE_EQUOTA, too_many_fds);
    for (int i = 0; i < PACKETS_AT_ONCE; i++) {
        iov[i] = (struct iovec){d->packets[i], sizeof(d->packets[i])};
        msgs[i] = (struct mmsghdr){.msg_hdr = {.msg_iov = &iov[i],
                                               .msg_iovlen = 1,
                                               .msg_control = control[i].bytes,
                                               .msg_controllen = sizeof(control[i].bytes)}};
    }
    int n = recvmmsg(s->fd, msgs, most, MSG_DONTWAIT | MSG_CMSG_CLOEXEC, NULL);
    if (n < 0 && (errno == EAGAIN || errno == EINTR))
        return false;
    if (n < 0) {
        session_close(s, strerror(errno));
        return false;
    }
    for (int i = 0; i < n; i++)
        take_packet(s, &msgs[i].msg_hdr, d->packets[i], msgs[i].msg_len);
    return n == (int)most && !s->closing;
}

/*
 * Packets differ in what they cost, so it is time that is shared: however many connections ask for
 * what is dear, a turn is short, and nobody is passed over in it.
 */
static void hear(struct session *s)
{
    struct daemon *d = s->daemon;
    uint64_t now = daemon_now();

    if (!d->heard_ns)
        d->heard_ns = now;
    bool late = now - d->heard_ns > HEAR_NS;
    uint64_t until = late ? now + HEAR_LATE_NS : d->heard_ns + HEAR_NS;
    for (int i = 0; i < CALLS_PER_TURN && s->backlog_bytes <= BACKLOG_MAX; i++)
        if (!receive(s, late ? 1 : PACKETS_AT_ONCE) || daemon_now() > until)
            return;
}

static void on_poll(uv_poll_t *handle, int status, int events)
{
    struct session *s = handle->data;

    /*
     * A peer that was killed with replies unread: what it had asked for does not matter any more.
     */
    if (status < 0) {
        session_close(s, uv_strerror(status));
        return;
    }
    if (events & UV_WRITABLE)
        send_backlog(s);
    if (s->closing || !(events & (UV_READABLE | UV_DISCONNECT)))
        return;
    watch_stir(s->daemon);
    hear(s);
}

/* Who does not read is not heard, not even saying that it will send no more. */
static void update_poll(struct session *s)
{
    int events = 0;

    if (s->closing)
        return;
    if (s->backlog_bytes <= BACKLOG_MAX)
        events |= UV_READABLE | UV_DISCONNECT;
    if (s->backlog_bytes)
        events |= UV_WRITABLE;
    uv_poll_start(&s->poll, events, on_poll);
}
