/*
 * requests.c - one function for each request: decode, check, act, answer. A function that takes the
 * descriptors over sets their number to 0.
 */
#include "daemon/requests.h"

#include <errno.h>
#include <stdio.h>
#include <string.h>
#include <unistd.h>

#include "config.h"
#include "daemon/daemon.h"
#include "daemon/discard.h"
#include "daemon/log.h"

/* The descriptors that came with a packet. */
struct fds {
    const int *fd;
    unsigned n;
};

static bool broken(char *why, const char *text)
{
    snprintf(why, PROTO_TEXT_MAX, "%s", text);
    return false;
}

static void welcome(struct session *s, uint32_t seq)
{
    struct daemon *d = s->daemon;
    struct msg_welcome msg = {
        .major = PROTO_MAJOR,
        .minor = PROTO_MINOR,
        .jobs = (uint32_t)d->config.client_jobs,
        .bytes = d->config.client_bytes,
        .buffers = (uint32_t)d->config.client_buffers,
        .pid = (uint64_t)getpid(),
        .boot = d->boot,
        .version = PACKAGE_VERSION,
        .modes = d->backend->modes,
    };

    snprintf(msg.backend, sizeof(msg.backend), "%s", d->backend->name);
    snprintf(msg.device, sizeof(msg.device), "%s", d->device_name);
    snprintf(msg.uuid, sizeof(msg.uuid), "%s", d->device_uuid);
    session_send(s, OP_HELLO, seq, MSG_WELCOME, &msg);
}

static bool is_trusted(const struct session *s)
{
    return s->user->uid == 0 || s->user->uid == geteuid();
}

/* So that it can stand between quotes in the log. */
static void unquote(char *name)
{
    for (char *to = name; *to; to++)
        if (*to == '"' || *to == '\\')
            *to = '?';
}

/* Say why there will be no session, and end the connection. */
static bool turn_away(struct session *s, uint32_t seq, int status, const char *text)
{
    session_error(s, seq, status, text);
    session_close(s, text);
    return true;
}

static bool serve_hello(struct session *s, const struct packet *packet, struct fds *fds, char *why)
{
    struct msg_hello msg;
    const char *page_why = "page: no descriptor came with the packet";
    char text[PROTO_TEXT_MAX];

    if (s->welcome)
        return broken(why, "HELLO twice");
    if (packet_decode(packet, MSG_HELLO, &msg, why))
        return false;
    if (msg.major != PROTO_MAJOR) {
        snprintf(text, sizeof(text), "the daemon speaks protocol %d, the client %u", PROTO_MAJOR,
                 msg.major);
        return turn_away(s, packet->seq, SAGE_EVERSION, text);
    }
    if (msg.priority > PRIORITY_HIGH)
        return broken(why, "priority: must be from 0 to 2");
    if (msg.priority > s->daemon->config.max_priority && !is_trusted(s)) {
        snprintf(text, sizeof(text), "priority: %u, the limit is %llu (max_priority)", msg.priority,
                 (unsigned long long)s->daemon->config.max_priority);
        return turn_away(s, packet->seq, SAGE_EPERM, text);
    }
    if (msg.page != (fds->n > 0))
        return broken(why, msg.page ? page_why : "descriptor: none was announced");
    int rc = msg.page ? session_set_page(s, fds->fd[0], &page_why) : 0;
    if (rc == SAGE_EBUSY)
        return turn_away(s, packet->seq, rc, page_why);
    if (rc)
        return broken(why, page_why);
    s->welcome = true;
    s->priority = msg.priority;
    unquote(msg.name);
    unquote(msg.library);
    snprintf(s->name, sizeof(s->name), "%s", msg.name);
    s->daemon->stats.clients_total++;
    if (daemon_may_tell_visit(s->daemon))
        log_info("connected", "client=%llu pid=%d uid=%u name=\"%s\" library=\"%s\" page=%d",
                 (unsigned long long)s->id, (int)s->pid, (unsigned)s->user->uid, s->name,
                 msg.library, msg.page);
    welcome(s, packet->seq);
    return true;
}

static bool serve_register(struct session *s, const struct packet *packet, struct fds *fds,
                           char *why)
{
    struct msg_register msg;

    if (packet_decode(packet, MSG_REGISTER, &msg, why))
        return false;
    unsigned most = msg.kind == BUFFER_MEMFD ? 1 : msg.kind == BUFFER_VMM ? msg.n_chunks : 0;
    bool known = msg.kind >= BUFFER_MEMFD && msg.kind <= BUFFER_VMM; /* others are refused later */
    if (known && fds->n > most)
        return broken(why, "descriptors: more than the buffer's kind and chunks need");
    buffer_register(s, &msg, fds->fd, fds->n, packet->seq);
    fds->n = 0;
    return true;
}

static bool serve_unregister(struct session *s, const struct packet *packet, struct fds *fds,
                             char *why)
{
    struct msg_unregister msg;
    (void)fds;

    if (packet_decode(packet, MSG_UNREGISTER, &msg, why))
        return false;
    buffer_unregister(s, msg.buffer, packet->seq);
    return true;
}

static bool serve_event(struct session *s, const struct packet *packet, struct fds *fds, char *why)
{
    struct msg_event msg;
    (void)fds;

    if (packet_decode(packet, MSG_EVENT, &msg, why))
        return false;
    event_register(s, &msg, packet->seq);
    return true;
}

static bool serve_waited(struct session *s, const struct packet *packet, struct fds *fds, char *why)
{
    struct msg_waited msg;
    char text[PROTO_TEXT_MAX];
    (void)fds;

    if (packet_decode(packet, MSG_WAITED, &msg, why))
        return false;
    if (job_waited(s, msg.event)) {
        session_send(s, OP_WAITED, packet->seq, MSG_EMPTY, &(struct msg_empty){0});
        return true;
    }
    snprintf(text, sizeof(text), "event: %u is none that was LAUNCHED and not WAITED", msg.event);
    session_error(s, packet->seq, SAGE_EINVAL, text);
    return true;
}

static bool serve_submit(struct session *s, const struct packet *packet, struct fds *fds, char *why)
{
    struct msg_submit msg;
    char text[PROTO_TEXT_MAX];
    (void)fds;

    int rc = packet_decode(packet, MSG_SUBMIT, &msg, text);
    if (rc == 0)
        return job_submit(s, &msg, why);
    if (rc != SAGE_EPROTO) /* all of it could be read, but it asks for what is unknown here */
        return job_refuse(s, msg.lane, msg.number, rc, text, why);
    return broken(why, text);
}

static bool serve_cancel(struct session *s, const struct packet *packet, struct fds *fds, char *why)
{
    struct msg_cancel msg;
    (void)fds;

    if (packet_decode(packet, MSG_CANCEL, &msg, why))
        return false;
    struct msg_canceled reply = {.canceled = job_cancel(s, msg.lane, msg.number)};
    session_send(s, OP_CANCEL, packet->seq, MSG_CANCELED, &reply);
    return true;
}

static bool serve_stats(struct session *s, const struct packet *packet, struct fds *fds, char *why)
{
    struct msg_stats reply = {0};
    (void)fds, (void)why;

    daemon_stats(s->daemon, &reply);
    session_send(s, OP_STATS, packet->seq, MSG_STATS, &reply);
    return true;
}

static void describe(const struct session *s, uint64_t now, struct msg_client *client)
{
    client->id = s->id;
    client->pid = (uint64_t)s->pid;
    client->uid = s->user->uid;
    memcpy(client->name, s->name, sizeof(client->name));
    client->priority = s->priority;
    client->age_ns = now - s->connected_ns;
    client->queued = s->n_jobs - s->n_running;
    client->running = s->n_running;
    client->done = s->done;
    client->failed = s->failed;
    client->ops = s->ops;
    client->run_ns = s->run_ns;
    client->buffers = s->n_buffers;
    client->mapped_bytes = s->mapped_bytes;
    snprintf(client->mode, sizeof(client->mode), "%s", s->mode);
    client->queue_p99_us = hist_percentile_us(&s->queue, 0.99);
}

static bool serve_clients(struct session *s, const struct packet *packet, struct fds *fds,
                          char *why)
{
    struct msg_clients msg;
    struct msg_client_list reply = {0};
    const struct session *other;
    uint64_t now = daemon_now();
    (void)fds;

    if (packet_decode(packet, MSG_CLIENTS, &msg, why))
        return false;
    TAILQ_FOREACH(other, &s->daemon->sessions, link) { /* in the order of their ids */
        if (other->id <= msg.after || !other->welcome)
            continue;
        reply.more = reply.n_clients == CLIENTS_MAX;
        if (reply.more)
            break;
        describe(other, now, &reply.clients[reply.n_clients++]);
    }
    session_send(s, OP_CLIENTS, packet->seq, MSG_CLIENT_LIST, &reply);
    return true;
}

static bool serve_ping(struct session *s, const struct packet *packet, struct fds *fds, char *why)
{
    (void)fds, (void)why;
    session_send(s, OP_PING, packet->seq, MSG_EMPTY, &(struct msg_empty){0});
    return true;
}

static bool serve_drain(struct session *s, const struct packet *packet, struct fds *fds, char *why)
{
    (void)fds, (void)why;
    if (!is_trusted(s)) {
        session_error(s, packet->seq, SAGE_EPERM, "only root and the daemon's user may drain it");
        return true;
    }
    log_notice("drain", "by=\"%s\" pid=%d", s->name, (int)s->pid);
    session_send(s, OP_DRAIN, packet->seq, MSG_EMPTY, &(struct msg_empty){0});
    daemon_drain(s->daemon);
    return true;
}

static const struct {
    bool (*serve)(struct session *, const struct packet *, struct fds *fds, char *why);
    unsigned max_fds;
} requests[] = {
    [OP_HELLO] = {serve_hello, 1},           [OP_REGISTER] = {serve_register, PROTO_FDS_MAX},
    [OP_UNREGISTER] = {serve_unregister, 0}, [OP_SUBMIT] = {serve_submit, 0},
    [OP_CANCEL] = {serve_cancel, 0},         [OP_STATS] = {serve_stats, 0},
    [OP_CLIENTS] = {serve_clients, 0},       [OP_PING] = {serve_ping, 0},
    [OP_DRAIN] = {serve_drain, 0},           [OP_EVENT] = {serve_event, 0},
    [OP_WAITED] = {serve_waited, 0},
};

bool request(struct session *s, const struct packet *packet, const int *fd, unsigned n_fds,
             char *why)
{
    bool known = packet->op < sizeof(requests) / sizeof(requests[0]) && requests[packet->op].serve;
    struct fds fds = {fd, n_fds};
    bool good;

    if (!s->welcome && packet->op != OP_HELLO)
        good = broken(why, "the first packet must be HELLO");
    else if (n_fds > (known ? requests[packet->op].max_fds : 0))
        good = broken(why, "descriptor: this request takes none, or fewer");
    else if (known)
        good = requests[packet->op].serve(s, packet, &fds, why);
    else {
        snprintf(why, PROTO_TEXT_MAX, "op: %u is unknown", packet->op);
        session_error(s, packet->seq, SAGE_EUNSUPPORTED, why); /* of a newer minor version */
        good = true;
    }
    if (fds.n == 1 && packet->op == OP_HELLO && good && s->page)
        close(fd[0]); /* the page's, which is mapped */
    else
        discard(s->user->uid, fds.fd, fds.n);
    return good;
}
