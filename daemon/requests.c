/*
 * requests.c - one function for each request: decode, check, act, answer. A function that keeps the
 * descriptor sets *fd to -1.
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

static bool serve_hello(struct session *s, const struct packet *packet, int *fd, char *why)
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
    if (msg.page != (*fd >= 0))
        return broken(why, msg.page ? page_why : "descriptor: none was announced");
    int rc = msg.page ? session_set_page(s, *fd, &page_why) : 0;
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
    log_info("connected", "client=%llu pid=%d uid=%u name=\"%s\" library=\"%s\" page=%d",
             (unsigned long long)s->id, (int)s->pid, (unsigned)s->user->uid, s->name, msg.library,
             msg.page);
    welcome(s, packet->seq);
    return true;
}

static bool serve_register(struct session *s, const struct packet *packet, int *fd, char *why)
{
    struct msg_register msg;

    if (packet_decode(packet, MSG_REGISTER, &msg, why))
        return false;
    buffer_register(s, &msg, *fd, packet->seq);
    *fd = -1;
    return true;
}

static bool serve_unregister(struct session *s, const struct packet *packet, int *fd, char *why)
{
    struct msg_unregister msg;
    (void)fd;

    if (packet_decode(packet, MSG_UNREGISTER, &msg, why))
        return false;
    buffer_unregister(s, msg.buffer, packet->seq);
    return true;
}

static bool serve_submit(struct session *s, const struct packet *packet, int *fd, char *why)
{
    struct msg_submit msg;
    char text[PROTO_TEXT_MAX];
    (void)fd;

    int rc = packet_decode(packet, MSG_SUBMIT, &msg, text);
    if (rc == 0)
        return job_submit(s, &msg, why);
    if (rc != SAGE_EPROTO) /* all of it could be read, but it asks for what is unknown here */
        return job_refuse(s, msg.lane, msg.number, rc, text, why);
    return broken(why, text);
}

static bool serve_cancel(struct session *s, const struct packet *packet, int *fd, char *why)
{
    struct msg_cancel msg;
    (void)fd;

    if (packet_decode(packet, MSG_CANCEL, &msg, why))
        return false;
    struct msg_canceled reply = {.canceled = job_cancel(s, msg.lane, msg.number)};
    session_send(s, OP_CANCEL, packet->seq, MSG_CANCELED, &reply);
    return true;
}

static bool serve_stats(struct session *s, const struct packet *packet, int *fd, char *why)
{
    struct msg_stats reply = {0};
    (void)fd, (void)why;

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
}

static bool serve_clients(struct session *s, const struct packet *packet, int *fd, char *why)
{
    struct msg_clients msg;
    struct msg_client_list reply = {0};
    const struct session *other;
    uint64_t now = daemon_now();
    (void)fd;

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

static bool serve_ping(struct session *s, const struct packet *packet, int *fd, char *why)
{
    (void)fd, (void)why;
    session_send(s, OP_PING, packet->seq, MSG_EMPTY, &(struct msg_empty){0});
    return true;
}

static bool serve_drain(struct session *s, const struct packet *packet, int *fd, char *why)
{
    (void)fd, (void)why;
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
    bool (*serve)(struct session *, const struct packet *, int *fd, char *why);
    bool takes_fd;
} requests[] = {
    [OP_HELLO] = {serve_hello, true},
    [OP_REGISTER] = {serve_register, true},
    [OP_UNREGISTER] = {serve_unregister, false},
    [OP_SUBMIT] = {serve_submit, false},
    [OP_CANCEL] = {serve_cancel, false},
    [OP_STATS] = {serve_stats, false},
    [OP_CLIENTS] = {serve_clients, false},
    [OP_PING] = {serve_ping, false},
    [OP_DRAIN] = {serve_drain, false},
};

bool request(struct session *s, const struct packet *packet, int fd, char *why)
{
    bool known = packet->op < sizeof(requests) / sizeof(requests[0]) && requests[packet->op].serve;
    bool good;

    if (!s->welcome && packet->op != OP_HELLO)
        good = broken(why, "the first packet must be HELLO");
    else if (fd >= 0 && !(known && requests[packet->op].takes_fd))
        good = broken(why, "descriptor: this request takes none");
    else if (known)
        good = requests[packet->op].serve(s, packet, &fd, why);
    else {
        snprintf(why, PROTO_TEXT_MAX, "op: %u is unknown", packet->op);
        session_error(s, packet->seq, SAGE_EUNSUPPORTED, why); /* of a newer minor version */
        good = true;
    }
    if (fd >= 0 && packet->op == OP_HELLO && good && s->page)
        close(fd); /* the page's, which is mapped */
    else if (fd >= 0)
        discard(fd);
    return good;
}
