/*
 * client.c - connecting and disconnecting, requests with a reply, fork.
 */
#include "client/client.h"

#include <errno.h>
#include <fcntl.h>
#include <poll.h>
#include <signal.h>
#include <stdlib.h>
#include <string.h>
#include <sys/eventfd.h>
#include <sys/resource.h>
#include <sys/socket.h>
#include <unistd.h>

enum {
    RETRY_MS = 10000,
    FULL_MS = 10, /* between two looks at a full socket; POLLOUT comes late */
};

/* Of send_request(), besides 0 and SAGE_E*. */
enum { NOT_NOW = 1 };

/* --- fork: a child must not keep the connection open, nor use it --- */

static pthread_mutex_t clients_lock = PTHREAD_MUTEX_INITIALIZER;
static struct sage_client *clients; /* of this process, linked by next */

static void before_fork(void)
{
    pthread_mutex_lock(&clients_lock);
    for (struct sage_client *c = clients; c; c = c->next)
        pthread_mutex_lock(&c->lock);
}

static void unlock_clients(void)
{
    for (struct sage_client *c = clients; c; c = c->next)
        pthread_mutex_unlock(&c->lock);
    pthread_mutex_unlock(&clients_lock);
}

static void after_fork_in_child(void)
{
    for (struct sage_client *c = clients; c; c = c->next) {
        if (c->forked) /* in our parent too: these numbers are somebody else's by now */
            continue;
        c->forked = true;
        if (c->conn.fd != c->fd)
            conn_close(&c->conn);
        close(c->fd);
        close(c->event);
        close(c->page_fd);
        for (uint32_t i = 0; i < c->n_buffers; i++)
            buffer_close(c->buffers[i]);
    }
    unlock_clients();
}

static void watch_forks(void)
{
    pthread_atfork(before_fork, unlock_clients, after_fork_in_child);
}

int client_alien(void)
{
    return error_set(SAGE_EFORK, "the client belongs to the parent process: connect anew");
}

static void enlist(struct sage_client *c)
{
    static pthread_once_t once = PTHREAD_ONCE_INIT;

    pthread_once(&once, watch_forks);
    pthread_mutex_lock(&clients_lock);
    c->next = clients;
    c->prev = &clients;
    if (clients)
        clients->prev = &c->next;
    clients = c;
    pthread_mutex_unlock(&clients_lock);
}

static void delist(struct sage_client *c)
{
    pthread_mutex_lock(&clients_lock);
    *c->prev = c->next;
    if (c->next)
        c->next->prev = c->prev;
    pthread_mutex_unlock(&clients_lock);
}

/* --- descriptors --- */

int client_put_away(int *fd)
{
    struct rlimit limit = {0}, all;

    pthread_mutex_lock(&clients_lock); /* nobody forks meanwhile */
    getrlimit(RLIMIT_NOFILE, &limit);
    all = (struct rlimit){limit.rlim_max, limit.rlim_max};
    setrlimit(RLIMIT_NOFILE, &all);
    int up = fcntl(*fd, F_DUPFD_CLOEXEC, limit.rlim_cur);
    setrlimit(RLIMIT_NOFILE, &limit);
    pthread_mutex_unlock(&clients_lock);
    if (up >= 0) {
        close(*fd);
        *fd = up;
        return 0;
    }
    if ((rlim_t)*fd < limit.rlim_cur / 2) {
        fcntl(*fd, F_SETFD, FD_CLOEXEC);
        return 0;
    }
    close(*fd);
    *fd = -1;
    return error_set(SAGE_ENOMEM, "no descriptor left for a chunk of memory: RLIMIT_NOFILE is %llu",
                     (unsigned long long)limit.rlim_max);
}

/* --- connecting --- */

/* The daemon refuses control characters and what is no UTF-8, and the end may be cut off. */
static void set_name(struct sage_client *c, const char *name)
{
    strncpy(c->name, name ? name : program_invocation_short_name, sizeof(c->name) - 1);
    for (char *p = c->name; *p; p++)
        if ((unsigned char)*p < 0x20 || (unsigned char)*p > 0x7e)
            *p = '?';
}

static int set_options(struct sage_client *c, const struct sage_connect_options *options)
{
    if (options->priority < SAGE_LOW || options->priority > SAGE_HIGH)
        return error_set(SAGE_EINVAL, "priority: %d, must be from -1 to 1", options->priority);
    c->priority = (uint32_t)(PRIORITY_NORMAL + (int)options->priority);
    c->retry_ms = options->retry_ms ? options->retry_ms : RETRY_MS;
    set_name(c, options->name);
    return gpu_init(c, options);
}

static struct sage_client *create(void)
{
    struct sage_client *c = calloc(1, sizeof(*c));
    pthread_condattr_t attr;

    if (!c)
        return NULL;
    c->fd = c->event = c->page_fd = c->conn.fd = -1;
    c->link = LINK_WORD(LINK_LOST, 0);
    pthread_condattr_init(&attr);
    pthread_condattr_setclock(&attr, CLOCK_MONOTONIC);
    pthread_cond_init(&c->changed, &attr);
    pthread_cond_init(&c->gpu.tick, &attr);
    pthread_condattr_destroy(&attr);
    pthread_mutex_init(&c->submit_lock, NULL);
    pthread_mutex_init(&c->lock, NULL);
    return c;
}

static int init(struct sage_client *c, const struct sage_connect_options *options)
{
    static const struct sage_connect_options defaults;

    if (!options)
        options = &defaults;
    int rc = set_options(c, options);
    if (rc)
        return rc;
    c->page = page_create(&c->page_fd);
    if (!c->page)
        return error_set(SAGE_ENOMEM, "session page: %s", strerror(errno));
    c->event = eventfd(0, EFD_CLOEXEC);
    if (c->event < 0)
        return error_set(SAGE_ENOMEM, "eventfd: %s", strerror(errno));
    rc = conn_init(&c->conn, c->event);
    return rc ? rc : gpu_choose(c, options);
}

/* The reader takes no signals: they are the program's. */
static int start_reader(struct sage_client *c)
{
    sigset_t all, old;

    sigfillset(&all);
    pthread_sigmask(SIG_SETMASK, &all, &old);
    int error = pthread_create(&c->reader, NULL, reader_main, c);
    pthread_sigmask(SIG_SETMASK, &old, NULL);
    return error ? error_set(SAGE_ENOMEM, "thread: %s", strerror(error)) : 0;
}

/* Memory; and the locks, except in a fork child, where another thread may have held them. */
static void destroy(struct sage_client *c)
{
    gpu_destroy(c);
    while (c->n_buffers > 0)
        buffer_discard(c->buffers[c->n_buffers - 1]);
    free(c->buffers);
    for (int i = 0; i < SAGE_LANES; i++) {
        struct sage_lane *lane = c->lanes[i];
        for (int e = 0; lane && e < SAGE_ENTRIES; e++)
            free(lane->entry[e].packet);
        free(lane);
    }
    page_unmap(c->page);
    if (!c->forked) {
        pthread_cond_destroy(&c->gpu.tick);
        pthread_cond_destroy(&c->changed);
        pthread_mutex_destroy(&c->lock);
        pthread_mutex_destroy(&c->submit_lock);
    }
    free(c->path);
    free(c);
}

static void close_all(struct sage_client *c)
{
    if (c->conn.fd == c->fd)
        c->conn.fd = -1;
    conn_finish(&c->conn);
    if (c->fd >= 0) {
        shutdown(c->fd, SHUT_RDWR); /* an exec'ed or cloned child may hold it open */
        close(c->fd);
    }
    if (c->event >= 0)
        close(c->event);
    if (c->page_fd >= 0)
        close(c->page_fd);
}

int sage_connect(const struct sage_connect_options *options, struct sage_client **client)
{
    struct sage_client *c = create();

    *client = NULL;
    if (!c)
        return error_set(SAGE_ENOMEM, "out of memory");
    enlist(c); /* from here on a fork closes what there is */
    int rc = init(c, options);
    if (!rc)
        rc = client_revive(c);
    if (!rc)
        rc = start_reader(c);
    if (rc) {
        delist(c);
        close_all(c);
        destroy(c);
        return rc;
    }
    *client = c;
    return 0;
}

/* The watcher may be waiting for an answer, and nobody reads any more; new requests see `stop`. */
static void abandon_requests(struct sage_client *c)
{
    if (c->fd >= 0)
        shutdown(c->fd, SHUT_RDWR);
    pthread_mutex_lock(&c->lock);
    for (struct request *r = c->requests; r; r = r->next) {
        r->status = SAGE_ECANCELED;
        strcpy(r->text, "the client is being closed");
        r->over = true;
    }
    c->requests = NULL;
    pthread_cond_broadcast(&c->changed);
    pthread_mutex_unlock(&c->lock);
}

void sage_disconnect(struct sage_client *client)
{
    if (!client)
        return;
    if (!client->forked) {
        atomic_store(&client->stop, true);
        eventfd_write(client->event, 1);
        pthread_join(client->reader, NULL);
        abandon_requests(client);
        reader_fail_all(client, "the client is being closed"); /* streams go on */
        gpu_finish(client);
        delist(client); /* until here a child of a fork lets go of what there is */
        close_all(client);
    } else {
        delist(client);
        if (!client->conn.unpacking)
            unpacker_destroy(client->conn.unpacker);
    }
    destroy(client);
}

const char *sage_last_error(void)
{
    return error_text();
}

int sage_server_info(struct sage_client *client, struct sage_server *server)
{
    if (client->forked)
        return client_alien();
    pthread_mutex_lock(&client->lock);
    const struct msg_welcome *w = &client->welcome;
    *server = (struct sage_server){
        .pid = w->pid, .jobs = w->jobs, .buffers = w->buffers, .bytes = w->bytes};
    memcpy(server->version, w->version, sizeof(server->version));
    memcpy(server->backend, w->backend, sizeof(server->backend));
    memcpy(server->device, w->device, sizeof(server->device));
    memcpy(server->uuid, w->uuid, sizeof(server->uuid));
    pthread_mutex_unlock(&client->lock);
    return 0;
}

int client_revive(struct sage_client *c)
{
    if (client_state(c) != LINK_LOST)
        return 0;
    if (c->stop)
        return error_set(SAGE_ECANCELED, "the client is being closed");
    c->conn.limit = clock_ns() + CONN_TIMEOUT_MS * INT64_C(1000000); /* for all of it */
    int rc = reader_attach(c);
    if (!rc)
        rc = reader_install(c);
    c->conn.limit = CONN_NO_LIMIT;
    if (rc)
        return rc;
    /* Every job was failed and nobody else can publish one, so the count stands still. The reader,
     * should the connection break at once, takes the lock before it clears the event. */
    pthread_mutex_lock(&c->lock);
    c->boot = c->welcome.boot;
    atomic_store(&c->link, LINK_WORD(LINK_LIVE, LINK_COUNT(atomic_load(&c->link))));
    eventfd_write(c->event, 1);
    pthread_mutex_unlock(&c->lock);
    return 0;
}

/* --- requests --- */

/* List the request, if there is a connection to send it on. With both locks held. */
static int enter_request(struct sage_client *c, struct request *r)
{
    int rc = 0;

    if (c->stop)
        return error_set(SAGE_ECANCELED, "the client is being closed");
    if (r->only && r->only != c->epoch)
        return error_set(SAGE_ELOST, "the connection to the daemon broke");
    if (r->op == OP_REGISTER && !r->only)
        rc = buffer_list(r->buffer);
    if (rc)
        return rc;
    r->epoch = c->epoch;
    r->seq = ++c->seq;
    r->next = c->requests;
    c->requests = r;
    return 0;
}

static void remove_request(struct sage_client *c, struct request *r)
{
    for (struct request **p = &c->requests; *p; p = &(*p)->next)
        if (*p == r) {
            *p = r->next;
            return;
        }
}

/* Enter the request and send it. NOT_NOW: the reader is replacing the connection, or it is full. */
static int send_request(struct sage_client *c, enum msg_kind kind, const void *msg,
                        const struct conn_fds *fds, struct request *r)
{
    int rc = client_revive(c);

    if (rc)
        return rc;
    if (client_state(c) != LINK_LIVE || !conn_has_room(c->fd))
        return NOT_NOW;
    pthread_mutex_lock(&c->lock);
    rc = client_state(c) == LINK_LIVE ? enter_request(c, r) : NOT_NOW;
    pthread_mutex_unlock(&c->lock);
    if (rc)
        return rc;

    size_t len = packet_encode(c->out, sizeof(c->out), r->op, r->seq, kind, msg);
    rc = conn_send(c->fd, c->out, len, fds);
    if (!rc || rc == SAGE_ELOST) /* the reader will see the end and say so */
        return 0;
    pthread_mutex_lock(&c->lock);
    remove_request(c, r);
    if (r->op == OP_REGISTER)
        buffer_unlist(r->buffer);
    pthread_mutex_unlock(&c->lock);
    return rc;
}

/* After NOT_NOW, with no lock held. */
static void await_link(struct sage_client *c)
{
    struct pollfd p = {.fd = c->fd, .events = POLLOUT};

    pthread_mutex_lock(&c->lock);
    bool live = client_state(c) == LINK_LIVE;
    while (client_state(c) == LINK_DOWN)
        pthread_cond_wait(&c->changed, &c->lock);
    pthread_mutex_unlock(&c->lock);
    if (live)
        poll(&p, 1, FULL_MS);
}

int client_call(struct sage_client *c, enum msg_kind kind, const void *msg,
                const struct conn_fds *fds, struct request *r)
{
    int rc;

    r->over = false;
    do {
        pthread_mutex_lock(&c->submit_lock);
        rc = send_request(c, kind, msg, fds, r);
        pthread_mutex_unlock(&c->submit_lock);
        if (rc == NOT_NOW)
            await_link(c);
    } while (rc == NOT_NOW);
    if (rc)
        return rc;

    pthread_mutex_lock(&c->lock);
    while (!r->over || (r->status == SAGE_ELOST && client_state(c) == LINK_DOWN))
        pthread_cond_wait(&c->changed, &c->lock);
    pthread_mutex_unlock(&c->lock);
    return r->status ? error_set(r->status, "%s", r->text) : 0;
}
