/*
 * buffer.c - registering, using and letting go of client memory.
 */
#include "daemon/buffer.h"

#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <unistd.h>

#include "daemon/daemon.h"
#include "daemon/discard.h"
#include "daemon/log.h"

static struct buffer *find(struct session *s, uint32_t id)
{
    struct buffer *b;

    TAILQ_FOREACH(b, &s->buffers[id % SESSION_BUCKETS], link)
        if (b->id == id)
            return b;
    return NULL;
}

struct buffer *buffer_find(struct session *s, uint32_t id)
{
    struct buffer *b = find(s, id);

    return b && b->open ? b : NULL;
}

/* Out of the table: no new job can find it. */
static void leave(struct buffer *b)
{
    TAILQ_REMOVE(&b->session->buffers[b->id % SESSION_BUCKETS], b, link);
    b->session->n_buffers--;
    b->open = false;
    b->leaving = true;
}

static void buffer_free(struct buffer *b)
{
    struct session *s = b->session;

    s->n_mappings--;
    s->user->n_mappings--;
    free(b);
    if (s->closing)
        session_free_if_unused(s);
}

static void unmap_work(uv_work_t *work)
{
    struct buffer *b = work->data;
    struct daemon *d = b->session->daemon;

    d->backend->unmap(d->device, b->base, b->size);
}

static void after_unmap(uv_work_t *work, int status)
{
    struct buffer *b = work->data;
    struct session *s = b->session;
    (void)status;

    s->mapped_bytes -= b->size;
    s->user->mapped_bytes -= b->size;
    if (b->answer && !s->closing && b->status)
        session_error(s, b->seq, b->status, b->why);
    else if (b->answer && !s->closing)
        session_send(s, OP_UNREGISTER, b->seq, MSG_EMPTY, &(struct msg_empty){0});
    buffer_free(b);
}

static void unmap(struct buffer *b)
{
    uv_queue_work(&b->session->daemon->loop, &b->work, unmap_work, after_unmap);
}

static void map_work(uv_work_t *work)
{
    struct buffer *b = work->data;
    struct daemon *d = b->session->daemon;

    b->status = d->backend->map(d->device, b->kind, b->fd, &b->base, &b->size, b->why);
    if (b->status) {
        discard(b->fd);
        b->size = 0;
    } else {
        close(b->fd); /* a memfd that is mapped: nothing goes yet */
    }
}

/* What the client said and may have, against what there is. */
static int check_size(const struct buffer *b, char *why)
{
    const struct session *s = b->session;
    const struct config *config = &s->daemon->config;

    if (b->wanted > b->size) {
        snprintf(why, PROTO_TEXT_MAX, "size: %llu, but the memory has %llu bytes",
                 (unsigned long long)b->wanted, (unsigned long long)b->size);
        return SAGE_EBOUNDS;
    }
    if (b->size > config->client_bytes || s->mapped_bytes > config->client_bytes) {
        snprintf(why, PROTO_TEXT_MAX, "size: over the %llu bytes that one client may map",
                 (unsigned long long)config->client_bytes);
        return SAGE_EQUOTA;
    }
    if (s->user->mapped_bytes > config->user_bytes) {
        snprintf(why, PROTO_TEXT_MAX, "size: over the %llu bytes that one user may map",
                 (unsigned long long)config->user_bytes);
        return SAGE_EQUOTA;
    }
    return 0;
}

static void after_map(uv_work_t *work, int canceled)
{
    struct buffer *b = work->data;
    struct session *s = b->session;
    struct msg_registered msg = {.buffer = b->id, .size = b->size};
    (void)canceled;

    if (b->status) {
        if (!b->leaving) {
            leave(b); /* first: an answer that cannot be sent closes the session */
            session_error(s, b->seq, b->status, b->why);
        }
        buffer_free(b);
        return;
    }
    s->mapped_bytes += b->size;
    s->user->mapped_bytes += b->size;
    if (b->leaving) { /* the session closed meanwhile */
        unmap(b);
        return;
    }
    b->status = check_size(b, b->why);
    if (b->status) { /* answered when nothing of it is left */
        b->answer = true;
        leave(b);
        unmap(b);
        return;
    }
    b->open = true;
    session_send(s, OP_REGISTER, b->seq, MSG_REGISTERED, &msg);
}

static int check_register(struct session *s, const struct msg_register *msg, int fd, char *why)
{
    uint64_t limit = s->daemon->config.client_buffers;

    if (fd < 0) {
        snprintf(why, PROTO_TEXT_MAX, "descriptor: none came with the packet");
        return SAGE_EHANDLE;
    }
    if (msg->buffer == 0) {
        snprintf(why, PROTO_TEXT_MAX, "buffer: must not be 0");
        return SAGE_EINVAL;
    }
    if (find(s, msg->buffer)) {
        snprintf(why, PROTO_TEXT_MAX, "buffer: %u is registered already", msg->buffer);
        return SAGE_EINVAL;
    }
    if (msg->size == 0) {
        snprintf(why, PROTO_TEXT_MAX, "size: must not be 0");
        return SAGE_EINVAL;
    }
    if (s->n_mappings >= limit) {
        snprintf(why, PROTO_TEXT_MAX, "buffer: %u are registered, the limit is %llu", s->n_mappings,
                 (unsigned long long)limit);
        return SAGE_EQUOTA;
    }
    if (s->user->n_mappings >= s->daemon->config.user_buffers) {
        snprintf(why, PROTO_TEXT_MAX, "buffer: %u of this user are registered, the limit is %llu",
                 s->user->n_mappings, (unsigned long long)s->daemon->config.user_buffers);
        return SAGE_EQUOTA;
    }
    return 0;
}

void buffer_register(struct session *s, const struct msg_register *msg, int fd, uint32_t seq)
{
    char why[PROTO_TEXT_MAX];
    int rc = check_register(s, msg, fd, why);
    struct buffer *b = rc ? NULL : calloc(1, sizeof(*b));

    if (!rc && !b) {
        snprintf(why, sizeof(why), "out of memory");
        rc = SAGE_ENOMEM;
    }
    if (rc) {
        if (fd >= 0)
            discard(fd);
        session_error(s, seq, rc, why);
        return;
    }
    b->session = s;
    b->id = msg->buffer;
    b->kind = msg->kind;
    b->wanted = msg->size;
    b->fd = fd;
    b->seq = seq;
    b->work.data = b;
    TAILQ_INSERT_TAIL(&s->buffers[b->id % SESSION_BUCKETS], b, link);
    s->n_buffers++;
    s->n_mappings++;
    s->user->n_mappings++;
    uv_queue_work(&s->daemon->loop, &b->work, map_work, after_map);
}

void buffer_unregister(struct session *s, uint32_t id, uint32_t seq)
{
    struct buffer *b = buffer_find(s, id);
    char why[PROTO_TEXT_MAX];

    if (!b) {
        snprintf(why, sizeof(why), "buffer: %u is not registered", id);
        session_error(s, seq, SAGE_EBUFFER, why);
        return;
    }
    b->seq = seq;
    b->answer = true;
    leave(b);
    if (b->jobs == 0)
        unmap(b);
}

void buffer_leave_all(struct session *s)
{
    struct buffer *b, *next;

    for (int i = 0; i < SESSION_BUCKETS; i++) {
        for (b = TAILQ_FIRST(&s->buffers[i]); b; b = next) {
            next = TAILQ_NEXT(b, link);
            bool idle = b->open && b->jobs == 0; /* one that is being mapped goes in after_map() */
            leave(b);
            if (idle)
                unmap(b);
        }
    }
}

void buffer_ref(struct buffer *b)
{
    b->jobs++;
}

void buffer_unref(struct buffer *b)
{
    if (--b->jobs == 0 && b->leaving)
        unmap(b);
}
