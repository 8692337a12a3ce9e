/*
 * buffer.c - memory that the daemon can reach, and finding tensors in it.
 */
#include "client/client.h"

#include <errno.h>
#include <fcntl.h>
#include <signal.h>
#include <stdlib.h>
#include <string.h>
#include <sys/mman.h>
#include <sys/stat.h>
#include <unistd.h>

#include "kernels/problem.h"

/* --- the list --- */

/* Where a buffer at `data` is in the list, or belongs: device memory's, at NULL, come first. */
static uint32_t position(const struct sage_client *c, const void *data)
{
    uint32_t low = 0, high = c->n_buffers;

    while (low < high) {
        uint32_t middle = low + (high - low) / 2;
        if ((uintptr_t)c->buffers[middle]->data < (uintptr_t)data)
            low = middle + 1;
        else
            high = middle;
    }
    return low;
}

int buffer_list(struct sage_buffer *buffer)
{
    struct sage_client *c = buffer->client;
    uint32_t at = position(c, buffer->data);

    if (c->n_buffers == c->buffers_capacity) {
        uint32_t capacity = c->buffers_capacity ? 2 * c->buffers_capacity : 16;
        void *grown = realloc(c->buffers, capacity * sizeof(*c->buffers));
        if (!grown)
            return error_set(SAGE_ENOMEM, "out of memory");
        c->buffers = grown;
        c->buffers_capacity = capacity;
    }
    memmove(c->buffers + at + 1, c->buffers + at, (c->n_buffers - at) * sizeof(*c->buffers));
    c->buffers[at] = buffer;
    c->n_buffers++;
    return 0;
}

void buffer_unlist(struct sage_buffer *buffer)
{
    struct sage_client *c = buffer->client;
    uint32_t at = position(c, buffer->data);

    while (at < c->n_buffers && c->buffers[at] != buffer)
        at++;
    if (at == c->n_buffers)
        return;
    c->n_buffers--;
    memmove(c->buffers + at, c->buffers + at + 1, (c->n_buffers - at) * sizeof(*c->buffers));
}

struct sage_buffer *buffer_after(struct sage_client *c, uint32_t id)
{
    struct sage_buffer *best = NULL;

    for (uint32_t i = 0; i < c->n_buffers; i++) {
        struct sage_buffer *b = c->buffers[i];
        if (b->id > id && (!best || b->id < best->id))
            best = b;
    }
    return best;
}

/* With `lock` held. The buffer that may have this address in its mapping. */
static const struct sage_buffer *find(const struct sage_client *c, const unsigned char *data)
{
    uint32_t at = position(c, data);

    if (at == c->n_buffers || c->buffers[at]->data != data)
        at--; /* the last one that begins below; of none, UINT32_MAX */
    const struct sage_buffer *b = at < c->n_buffers ? c->buffers[at] : NULL;
    return b && b->data && !b->closing && (size_t)(data - b->data) < b->size ? b : NULL;
}

bool buffer_is_host(struct sage_client *c, const void *data)
{
    pthread_mutex_lock(&c->lock);
    bool found = find(c, data) != NULL;
    pthread_mutex_unlock(&c->lock);
    return found;
}

static int check_bounds(const char *name, const struct sage_tensor *t, int64_t bytes, uint64_t size)
{
    if (t->offset <= size && (uint64_t)bytes <= size - t->offset)
        return 0;
    return error_set(SAGE_EBOUNDS, "%s: %lld bytes at offset %llu of a buffer of %llu", name,
                     (long long)bytes, (unsigned long long)t->offset, (unsigned long long)size);
}

int buffer_resolve(struct sage_client *c, const char *name, struct sage_tensor *t)
{
    const unsigned char *data = t->data;
    uint64_t size = 0;
    int64_t bytes;

    t->data = NULL;
    t->buffer = 0;
    t->offset = 0;
    if (t->dtype == SAGE_NONE || !sage_tensor_bytes(t, &bytes) || bytes == 0)
        return 0; /* nowhere; what is wrong with such a tensor sage_attn_check() says */

    pthread_mutex_lock(&c->lock);
    const struct sage_buffer *b = find(c, data);
    if (b) {
        t->buffer = b->id;
        t->offset = (uint64_t)(data - b->data);
        size = b->size;
    }
    pthread_mutex_unlock(&c->lock);
    if (!t->buffer)
        return error_set(SAGE_EBUFFER, "%s: %p is in no registered buffer", name,
                         (const void *)data);
    return check_bounds(name, t, bytes, size);
}

/* --- registering --- */

void part_take(const struct sage_buffer *b, uint32_t first, struct part *part)
{
    struct msg_register *m = &part->msg;

    *m = (struct msg_register){.buffer = b->id, .kind = b->kind, .size = b->size};
    part->next = first;
    part->fds.n = 0;
    if (b->kind == BUFFER_MEMFD)
        part->fds.fd[part->fds.n++] = b->fd;
    if (b->kind == BUFFER_CUDA_IPC) {
        m->n_handle = sizeof(b->handle.bytes);
        memcpy(m->handle, b->handle.bytes, sizeof(b->handle.bytes));
    }
    while (part->next < b->n_spans && m->n_chunks < PROTO_FDS_MAX) {
        part->fds.fd[part->fds.n++] = b->fds[part->next];
        m->chunks[m->n_chunks++] = b->spans[part->next++].size;
    }
    m->more = part->next < b->n_spans;
}

/* One packet, and its answer. only: 0, or the connection that got the ones before. */
static int add_part(struct sage_buffer *b, struct part *part, uint64_t *only)
{
    struct msg_registered reply;
    struct request request = {.op = OP_REGISTER,
                              .reply_kind = MSG_REGISTERED,
                              .reply = &reply,
                              .buffer = b,
                              .more = part->msg.more,
                              .only = *only};
    int rc = client_call(b->client, MSG_REGISTER, &part->msg, &part->fds, &request);

    *only = request.epoch;
    return rc;
}

int buffer_add(struct sage_buffer *b)
{
    struct sage_client *c = b->client;
    struct part part = {0};
    uint64_t only = 0;
    int rc;

    pthread_mutex_lock(&c->lock);
    b->id = ++c->last_buffer;
    pthread_mutex_unlock(&c->lock);
    do {
        part_take(b, part.next, &part);
        rc = add_part(b, &part, &only);
    } while (!rc && part.msg.more);
    if (rc != SAGE_ELOST)
        return rc;
    /* The reader has offered it to the next daemon, if there is one. */
    pthread_mutex_lock(&c->lock);
    bool registered = client_state(c) == LINK_LIVE && b->epoch == c->epoch;
    pthread_mutex_unlock(&c->lock);
    return registered ? 0 : rc;
}

/* --- the calls --- */

void buffer_close(struct sage_buffer *b)
{
    if (b->fd >= 0)
        close(b->fd);
    for (uint32_t i = 0; b->fds && i < b->n_spans; i++)
        if (b->fds[i] >= 0)
            close(b->fds[i]);
}

void buffer_discard(struct sage_buffer *buffer)
{
    struct sage_client *c = buffer->client;

    pthread_mutex_lock(&c->lock);
    buffer_unlist(buffer);
    if (!c->forked)
        buffer_close(buffer);
    pthread_mutex_unlock(&c->lock);
    if (buffer->data)
        munmap(buffer->data, buffer->size);
    free(buffer->fds);
    free(buffer);
}

/* Map and register. Takes the descriptor over, also when it fails. */
static int create(struct sage_client *c, int fd, size_t size, struct sage_buffer **buffer)
{
    struct sage_buffer *b = calloc(1, sizeof(*b));

    if (!b) {
        close(fd);
        return error_set(SAGE_ENOMEM, "out of memory");
    }
    *b = (struct sage_buffer){.client = c, .kind = BUFFER_MEMFD, .fd = fd, .size = size};
    void *data = mmap(NULL, size, PROT_READ | PROT_WRITE, MAP_SHARED, fd, 0);
    int rc = 0;
    if (data == MAP_FAILED)
        rc = error_set(errno == ENOMEM ? SAGE_ENOMEM : SAGE_EHANDLE, "mmap of %zu bytes: %s", size,
                       strerror(errno));
    else
        b->data = data;
    if (!rc)
        rc = buffer_add(b);
    if (rc)
        buffer_discard(b);
    else
        *buffer = b;
    return rc;
}

static uint64_t bytes_allowed(struct sage_client *client)
{
    pthread_mutex_lock(&client->lock);
    uint64_t bytes = client->welcome.bytes;
    pthread_mutex_unlock(&client->lock);
    return bytes;
}

int sage_buffer_alloc(struct sage_client *client, size_t bytes, struct sage_buffer **buffer)
{
    *buffer = NULL;
    if (client->forked)
        return client_alien();
    if (bytes == 0 || bytes > INT64_MAX)
        return error_set(SAGE_EINVAL, "bytes: %zu, must be from 1 to 2^63 - 1", bytes);
    uint64_t allowed = bytes_allowed(client);
    if (bytes > allowed)
        return error_set(SAGE_EQUOTA, "bytes: %zu, the daemon allows %llu", bytes,
                         (unsigned long long)allowed);
    int fd = memfd_create("sageattn-buffer", MFD_CLOEXEC | MFD_ALLOW_SEALING);
    if (fd < 0)
        return error_set(SAGE_ENOMEM, "memfd_create: %s", strerror(errno));
    /*
     * All pages now: they are ours then, and not charged to the daemon, which may be first to
     * write. A signal would undo it.
     */
    sigset_t all, before;
    sigfillset(&all);
    pthread_sigmask(SIG_SETMASK, &all, &before);
    int status = fallocate(fd, 0, 0, (off_t)bytes);
    pthread_sigmask(SIG_SETMASK, &before, NULL);
    if (status < 0 || fcntl(fd, F_ADD_SEALS, F_SEAL_SHRINK | F_SEAL_GROW | F_SEAL_SEAL) < 0) {
        int rc = error_set(SAGE_ENOMEM, "memfd of %zu bytes: %s", bytes, strerror(errno));
        close(fd);
        return rc;
    }
    return create(client, fd, bytes, buffer);
}

int sage_buffer_import(struct sage_client *client, int memfd, struct sage_buffer **buffer)
{
    struct stat st;
    int seals = fcntl(memfd, F_GET_SEALS);

    *buffer = NULL;
    if (client->forked)
        return client_alien();
    if (seals < 0)
        return error_set(SAGE_EHANDLE, "descriptor %d is no memfd: %s", memfd, strerror(errno));
    if (!(seals & F_SEAL_SHRINK))
        return error_set(SAGE_EHANDLE, "descriptor %d is not sealed with F_SEAL_SHRINK", memfd);
    if (fstat(memfd, &st) < 0 || st.st_size == 0)
        return error_set(SAGE_EHANDLE, "descriptor %d: the memfd is empty", memfd);
    int fd = fcntl(memfd, F_DUPFD_CLOEXEC, 0);
    if (fd < 0)
        return error_set(SAGE_ENOMEM, "dup: %s", strerror(errno));
    return create(client, fd, (size_t)st.st_size, buffer);
}

void *sage_buffer_data(const struct sage_buffer *buffer)
{
    return buffer->data;
}

size_t sage_buffer_size(const struct sage_buffer *buffer)
{
    return buffer->size;
}

int sage_buffer_free(struct sage_buffer *buffer)
{
    int rc = 0;

    if (!buffer)
        return 0;
    struct sage_client *c = buffer->client;
    struct msg_unregister msg = {.buffer = buffer->id};
    struct msg_empty reply;
    struct request request = {
        .op = OP_UNREGISTER, .reply_kind = MSG_EMPTY, .reply = &reply, .buffer = buffer};
    if (c->forked)
        rc = client_alien();
    pthread_mutex_lock(&c->lock);
    buffer->closing = true;
    pthread_mutex_unlock(&c->lock);
    /* Until it is answered the reader registers the buffer anew: jobs under way still need it. */
    while (!rc && client_state(c) != LINK_LOST) {
        rc = client_call(c, MSG_UNREGISTER, &msg, NULL, &request);
        if (rc != SAGE_ELOST)
            break;
        rc = 0;
    }
    buffer_discard(buffer);
    /* A daemon that does not know the buffer, or none at all, holds nothing of it. */
    return rc == SAGE_EBUFFER || rc == SAGE_ENODAEMON ? 0 : rc;
}
