/*
 * buffer.c - registering, using and letting go of what clients share: memory, and events.
 */
#include "daemon/buffer.h"

#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/resource.h>
#include <unistd.h>

#include "daemon/daemon.h"
#include "daemon/discard.h"
#include "daemon/log.h"

enum {
    USER_FDS_MAX = 2 * CHUNKS_MAX, /* descriptors that one user may have us keep, at most */
    LIST_STEP = 256,               /* chunks by which the lists of a buffer grow */
};

/* --- memory --- */

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
    free(b->mapping.fds);
    free(b->mapping.sizes);
    free(b);
    if (s->closing)
        session_free_if_unused(s);
}

static void unmap_work(uv_work_t *work)
{
    struct buffer *b = work->data;
    struct daemon *d = b->session->daemon;

    d->backend->unmap(d->device, &b->mapping, b->base, b->size);
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

    b->status = d->backend->map(d->device, &b->mapping, &b->base, &b->size, b->why);
    if (b->status) {
        b->size = 0;
        return;
    }
    for (unsigned i = 0; i < b->n_fds; i++)
        close(b->mapping.fds[i]); /* of memory that is mapped: nothing goes yet */
}

/* Those of memory that is mapped are closed already. */
static void put_fds(struct buffer *b, bool mapped)
{
    struct user *user = b->session->user;

    if (!mapped)
        discard(user->uid, b->mapping.fds, b->n_fds);
    user->n_fds -= b->n_fds;
    b->n_fds = 0;
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

    put_fds(b, b->status == 0);
    if (b->status == SAGE_EDEVICE) { /* not answered: the next daemon will map it */
        daemon_lose(s->daemon, b->why);
        return;
    }
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

/* Is the packet what its kind must be? `n_fds` is not more than it may be. */
static int check_kind(const struct session *s, const struct msg_register *msg, unsigned n_fds,
                      char *why)
{
    bool is_ipc = msg->kind == BUFFER_CUDA_IPC, is_vmm = msg->kind == BUFFER_VMM;
    unsigned wanted = is_ipc ? 0 : is_vmm ? msg->n_chunks : 1;

    if (msg->kind > BUFFER_VMM || !(s->daemon->backend->kinds & 1u << msg->kind)) {
        snprintf(why, PROTO_TEXT_MAX, "kind: %u cannot be mapped by backend %s", msg->kind,
                 s->daemon->backend->name);
        return SAGE_EUNSUPPORTED;
    }
    if (n_fds != wanted) {
        snprintf(why, PROTO_TEXT_MAX, "descriptor: %s came with the packet, must be %u",
                 n_fds ? "too few" : "none", wanted);
        return SAGE_EHANDLE;
    }
    if (msg->n_handle != (is_ipc ? PROTO_HANDLE_MAX : 0)) {
        snprintf(why, PROTO_TEXT_MAX, "handle: %u bytes, must be %d", msg->n_handle,
                 is_ipc ? PROTO_HANDLE_MAX : 0);
        return SAGE_EINVAL;
    }
    if (is_vmm ? msg->n_chunks == 0 : msg->n_chunks || msg->more) {
        snprintf(why, PROTO_TEXT_MAX, is_vmm ? "chunks: none" : "chunks, more: only with vmm");
        return SAGE_EINVAL;
    }
    return 0;
}

/* May there be one more buffer? */
static int check_new(const struct session *s, const struct msg_register *msg, char *why)
{
    uint64_t limit = s->daemon->config.client_buffers;

    if (msg->buffer == 0) {
        snprintf(why, PROTO_TEXT_MAX, "buffer: must not be 0");
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

/* Is the packet the next one of a buffer that was begun? */
static int check_next(const struct buffer *b, const struct msg_register *msg, char *why)
{
    if (!b->partial) {
        snprintf(why, PROTO_TEXT_MAX, "buffer: %u is registered already", b->id);
        return SAGE_EINVAL;
    }
    if (msg->kind != b->mapping.kind || msg->size != b->wanted) {
        snprintf(why, PROTO_TEXT_MAX, "kind, size: must be those that buffer %u was begun with",
                 b->id);
        return SAGE_EINVAL;
    }
    return 0;
}

static struct buffer *buffer_create(struct session *s, const struct msg_register *msg)
{
    struct buffer *b = calloc(1, sizeof(*b));

    if (!b)
        return NULL;
    b->session = s;
    b->id = msg->buffer;
    b->mapping.kind = (enum buffer_kind)msg->kind;
    memcpy(b->mapping.handle, msg->handle, msg->n_handle);
    b->wanted = msg->size;
    b->work.data = b;
    TAILQ_INSERT_TAIL(&s->buffers[b->id % SESSION_BUCKETS], b, link);
    s->n_buffers++;
    s->n_mappings++;
    s->user->n_mappings++;
    return b;
}

/* One that is not mapped and not being mapped. */
static void buffer_drop(struct buffer *b)
{
    put_fds(b, false);
    leave(b);
    buffer_free(b);
}

/* Room for n more. */
static bool grow(struct mapping *m, unsigned n)
{
    unsigned used = m->n % LIST_STEP; /* of the last step; 0: it is full */

    if (n == 0 || (used && used + n <= LIST_STEP))
        return true;
    size_t room = (m->n + n + LIST_STEP - 1) / LIST_STEP * LIST_STEP;
    int *fds = realloc(m->fds, room * sizeof(fds[0]));
    if (fds)
        m->fds = fds;
    uint64_t *sizes = fds ? realloc(m->sizes, room * sizeof(sizes[0])) : NULL;
    if (sizes)
        m->sizes = sizes;
    return sizes;
}

/* Descriptors that a user has us keep, and how many of them only wait to be closed; others. */
struct kept {
    unsigned own, waiting, others;
    rlim_t limit; /* of all that the daemon has open */
};

/* false: none of this user. */
static bool kept_fds(const struct daemon *d, const struct user *user, struct kept *k)
{
    const struct user *u;
    struct rlimit limit;

    k->waiting = discard_waiting(user->uid, &k->others);
    k->own = user->n_fds + k->waiting;
    if (k->own == 0) /* mostly, and no system call then */
        return false;
    TAILQ_FOREACH(u, &d->users, link)
        if (u != user)
            k->others += u->n_fds;
    k->limit = getrlimit(RLIMIT_NOFILE, &limit) == 0 ? limit.rlim_cur : RLIM_INFINITY;
    return true;
}

/* Of so many one user may have half. */
static unsigned half_of(rlim_t n)
{
    return n / 2 < USER_FDS_MAX ? (unsigned)(n / 2) : USER_FDS_MAX;
}

/*
 * Those of refused packets are open until they are closed: a quarter more than a user may have is
 * for them. Where all users together have three quarters of what there is, a user may not have many
 * that only wait: with none left the kernel would drop those of the next packets, whoever sends
 * them.
 */
bool buffer_user_is_over(const struct daemon *d, const struct user *user)
{
    struct kept k;

    if (!kept_fds(d, user, &k))
        return false;
    unsigned most = half_of(k.limit);
    bool scarce = k.own + k.others > k.limit / 4 * 3;
    return k.own > most + most / 4 || (scarce && k.waiting > k.limit / 32);
}

/* What the packet brings; the descriptors are the buffer's where this says 0. */
static int add_chunks(struct buffer *b, const struct msg_register *msg, const int *fds,
                      unsigned n_fds, char *why)
{
    struct user *user = b->session->user;
    struct mapping *m = &b->mapping;
    uint64_t size = b->size;

    if (m->n + n_fds > CHUNKS_MAX) {
        snprintf(why, PROTO_TEXT_MAX, "chunks: more than %d in buffer %u", CHUNKS_MAX, b->id);
        return SAGE_EQUOTA;
    }
    struct kept k;
    if (kept_fds(b->session->daemon, user, &k)) {
        unsigned most = half_of(k.limit > k.others ? k.limit - k.others : 0);
        if (k.own + n_fds > most) {
            snprintf(why, PROTO_TEXT_MAX,
                     "descriptor: %u of this user wait to be mapped or closed, the limit is %u",
                     k.own, most);
            return SAGE_EBUSY;
        }
    }
    for (unsigned i = 0; i < msg->n_chunks; i++)
        if (msg->chunks[i] == 0 || __builtin_add_overflow(size, msg->chunks[i], &size)) {
            snprintf(why, PROTO_TEXT_MAX, "chunks: %llu bytes is no size",
                     (unsigned long long)msg->chunks[i]);
            return SAGE_EINVAL;
        }
    if (!grow(m, n_fds)) {
        snprintf(why, PROTO_TEXT_MAX, "out of memory");
        return SAGE_ENOMEM;
    }
    for (unsigned i = 0; i < n_fds; i++) {
        m->fds[m->n] = fds[i];
        m->sizes[m->n++] = msg->chunks[i]; /* 0 for a memfd */
    }
    b->size = size;
    b->n_fds += n_fds;
    user->n_fds += n_fds;
    return 0;
}

void buffer_register(struct session *s, const struct msg_register *msg, const int *fds,
                     unsigned n_fds, uint32_t seq)
{
    char why[PROTO_TEXT_MAX] = "out of memory";
    struct buffer *b = find(s, msg->buffer);
    bool begun = b && b->partial;
    int rc = check_kind(s, msg, n_fds, why);

    if (!rc)
        rc = b ? check_next(b, msg, why) : check_new(s, msg, why);
    if (!rc && !b) {
        b = buffer_create(s, msg);
        rc = b ? 0 : SAGE_ENOMEM;
        begun = b;
    }
    if (!rc)
        rc = add_chunks(b, msg, fds, n_fds, why);
    if (rc) {
        discard(s->user->uid, fds, n_fds);
        if (begun)
            buffer_drop(b);
        session_error(s, seq, rc, why);
        return;
    }
    b->seq = seq;
    b->partial = msg->more;
    if (b->partial) {
        struct msg_registered reply = {.buffer = b->id, .size = b->size};
        session_send(s, OP_REGISTER, seq, MSG_REGISTERED, &reply);
        return;
    }
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
            if (b->partial) {
                buffer_drop(b);
                continue;
            }
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

/* --- events --- */

static void event_free(struct event *e)
{
    struct session *s = e->session;

    s->n_events--;
    free(e);
    if (s->closing)
        session_free_if_unused(s);
}

static void close_work(uv_work_t *work)
{
    struct event *e = work->data;
    struct daemon *d = e->session->daemon;

    d->backend->event_close(d->device, e->opened);
}

static void after_close(uv_work_t *work, int status)
{
    (void)status;
    event_free(work->data);
}

static void event_leave(struct event *e)
{
    LIST_REMOVE(e, link);
    uv_queue_work(&e->session->daemon->loop, &e->work, close_work, after_close);
}

static void open_work(uv_work_t *work)
{
    struct event *e = work->data;
    struct daemon *d = e->session->daemon;

    e->status = d->backend->event_open(d->device, e->handle, &e->opened, e->why);
}

static void after_open(uv_work_t *work, int status)
{
    struct event *e = work->data;
    struct session *s = e->session;
    (void)status;

    if (e->status == SAGE_EDEVICE) { /* like after_map() */
        daemon_lose(s->daemon, e->why);
        return;
    }
    if (e->status) {
        LIST_REMOVE(e, link);
        if (!s->closing)
            session_error(s, e->seq, e->status, e->why);
        event_free(e);
        return;
    }
    if (s->closing)
        event_leave(e);
    else {
        e->ready = true;
        session_send(s, OP_EVENT, e->seq, MSG_EMPTY, &(struct msg_empty){0});
    }
}

static struct event *find_event(struct session *s, uint32_t id)
{
    struct event *e;

    LIST_FOREACH(e, &s->events, link)
    if (e->id == id)
        return e;
    return NULL;
}

struct event *event_find(struct session *s, uint32_t id)
{
    struct event *e = find_event(s, id);

    return e && e->ready ? e : NULL;
}

static int check_event(struct session *s, const struct msg_event *msg, char *why)
{
    if (!(s->daemon->backend->modes & MODE_EVENT)) {
        snprintf(why, PROTO_TEXT_MAX, "backend %s has no events", s->daemon->backend->name);
        return SAGE_EUNSUPPORTED;
    }
    if (msg->event == 0 || find_event(s, msg->event)) {
        snprintf(why, PROTO_TEXT_MAX, "event: %u is 0 or registered already", msg->event);
        return SAGE_EINVAL;
    }
    if (msg->n_handle != PROTO_HANDLE_MAX) {
        snprintf(why, PROTO_TEXT_MAX, "handle: %u bytes, must be %d", msg->n_handle,
                 PROTO_HANDLE_MAX);
        return SAGE_EINVAL;
    }
    if (s->n_events >= EVENTS_MAX) {
        snprintf(why, PROTO_TEXT_MAX, "event: %d are registered, which is the limit", EVENTS_MAX);
        return SAGE_EQUOTA;
    }
    return 0;
}

void event_register(struct session *s, const struct msg_event *msg, uint32_t seq)
{
    char why[PROTO_TEXT_MAX] = "out of memory";
    int rc = check_event(s, msg, why);
    struct event *e = rc ? NULL : calloc(1, sizeof(*e));

    if (!e) {
        session_error(s, seq, rc ? rc : SAGE_ENOMEM, why);
        return;
    }
    e->session = s;
    e->id = msg->event;
    e->seq = seq;
    e->work.data = e;
    memcpy(e->handle, msg->handle, PROTO_HANDLE_MAX);
    LIST_INSERT_HEAD(&s->events, e, link);
    s->n_events++;
    uv_queue_work(&s->daemon->loop, &e->work, open_work, after_open);
}

void event_leave_all(struct session *s)
{
    struct event *e, *next;

    for (e = LIST_FIRST(&s->events); e; e = next) {
        next = LIST_NEXT(e, link);
        if (e->ready) /* one that is being opened goes in after_open() */
            event_leave(e);
    }
}
