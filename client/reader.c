/*
 * reader.c - the thread that receives, and that replaces a broken connection.
 *
 * It takes no lock that is held while somebody waits: a program may be stuck in any other call, and
 * its jobs still go on with the next daemon, or are released.
 */
#include "client/client.h"

#include <errno.h>
#include <fcntl.h>
#include <poll.h>
#include <stdio.h>
#include <string.h>
#include <sys/eventfd.h>
#include <sys/socket.h>
#include <unistd.h>

enum { BACKOFF_MIN_MS = 10, BACKOFF_MAX_MS = 200 };

/* --- what comes in --- */

static void take_done(struct sage_client *c)
{
    pthread_mutex_lock(&c->lock);
    for (uint32_t i = 0; i < c->done.n_jobs; i++) {
        const struct msg_done_job *job = &c->done.jobs[i];
        struct sage_lane *lane = job->lane < SAGE_LANES ? c->lanes[job->lane] : NULL;
        if (lane && lane_has(lane, job->number))
            lane->entry[job->number % SAGE_ENTRIES].done = *job;
    }
    pthread_cond_broadcast(&c->changed);
    pthread_mutex_unlock(&c->lock);
}

/* With `lock` held. The list follows at once, for a connection that breaks next. */
static void finish_request(struct sage_client *c, struct request *r, int status)
{
    r->status = status;
    snprintf(r->text, sizeof(r->text), "%s", status ? error_text() : "");
    r->over = true;
    if (r->op == OP_REGISTER && status == 0)
        r->buffer->epoch = r->more ? 0 : c->epoch;
    else if (r->buffer && status != SAGE_ELOST)
        buffer_unlist(r->buffer);
}

static void take_reply(struct sage_client *c, const struct packet *packet)
{
    pthread_mutex_lock(&c->lock);
    for (struct request **p = &c->requests; *p; p = &(*p)->next) {
        struct request *r = *p;
        if (r->seq != packet->seq)
            continue;
        *p = r->next;
        finish_request(c, r, conn_reply(packet, r->op, r->reply_kind, r->reply));
        pthread_cond_broadcast(&c->changed);
        break;
    }
    pthread_mutex_unlock(&c->lock);
}

/* An ERROR that answers nothing is the last that this daemon says to us. */
static void take_reason(struct sage_client *c, const struct packet *packet)
{
    conn_reply(packet, OP_ERROR, MSG_ERROR, NULL);
    snprintf(c->reason, sizeof(c->reason), "%.*s", (int)sizeof(c->reason) - 1, error_text());
}

/* Who waits for it queues a wait for the daemon's event. */
static int take_launched(struct sage_client *c, const struct packet *packet)
{
    struct msg_launched msg;
    char why[PROTO_TEXT_MAX];
    int rc = packet_decode(packet, MSG_LAUNCHED, &msg, why);

    if (rc)
        return error_set(rc, "from the daemon: LAUNCHED: %s", why);
    pthread_mutex_lock(&c->lock);
    struct sage_lane *lane = msg.lane < SAGE_LANES ? c->lanes[msg.lane] : NULL;
    if (lane && lane_has(lane, msg.number)) {
        struct entry *entry = &lane->entry[msg.number % SAGE_ENTRIES];
        entry->launched = msg;
        entry->launched_epoch = c->epoch;
    }
    pthread_cond_broadcast(&c->changed);
    pthread_mutex_unlock(&c->lock);
    return 0;
}

static int dispatch(struct sage_client *c, const struct packet *packet)
{
    char why[PROTO_TEXT_MAX];

    if (packet->op == OP_ERROR && packet->seq == 0) {
        take_reason(c, packet);
        return 0;
    }
    if (packet->op == OP_LAUNCHED)
        return take_launched(c, packet);
    if (packet->op != OP_DONE) {
        take_reply(c, packet);
        return 0;
    }
    int rc = packet_decode(packet, MSG_DONE, &c->done, why);
    if (rc)
        return error_set(rc, "from the daemon: DONE: %s", why);
    take_done(c);
    return 0;
}

/* --- a new connection --- */

static void announce(struct sage_client *c)
{
    pthread_mutex_lock(&c->lock);
    pthread_cond_broadcast(&c->changed);
    pthread_mutex_unlock(&c->lock);
}

static int own_fds(struct conn_fds *fds)
{
    bool left = true;

    for (uint32_t i = 0; i < fds->n; i++) {
        fds->fd[i] = fcntl(fds->fd[i], F_DUPFD_CLOEXEC, 0);
        left = left && fds->fd[i] >= 0;
    }
    return left ? 0 : error_set(SAGE_ENOMEM, "no descriptor left: RLIMIT_NOFILE");
}

static void close_fds(struct conn_fds *fds)
{
    for (uint32_t i = 0; i < fds->n; i++)
        if (fds->fd[i] >= 0)
            close(fds->fd[i]);
}

/* The descriptors are our own: the buffer's owner may unregister it at any time. */
static bool next_part(struct sage_client *c, uint32_t *id, uint32_t first, struct part *part,
                      int *rc)
{
    pthread_mutex_lock(&c->lock);
    const struct sage_buffer *b = buffer_after(c, first ? *id - 1 : *id);
    if (b) { /* another one, if that is gone in the middle */
        part_take(b, b->id == *id ? first : 0, part);
        *rc = own_fds(&part->fds);
        *id = b->id;
    }
    pthread_mutex_unlock(&c->lock);
    return b;
}

static void set_registered(struct sage_client *c, uint32_t id)
{
    pthread_mutex_lock(&c->lock);
    struct sage_buffer *b = buffer_after(c, id - 1);
    if (b && b->id == id)
        b->epoch = c->epoch;
    pthread_mutex_unlock(&c->lock);
}

/* It had no room for the buffer: it may have soon, as other clients come back to it as well. */
static bool may_offer_again(const struct sage_client *c, int rc, int64_t end)
{
    if (!sage_retryable(rc) || c->stop || clock_ns() >= end)
        return false;
    poll(NULL, 0, BACKOFF_MIN_MS);
    return true;
}

/*
 * A buffer that this daemon refuses is left out, and so is one whose memory was freed meanwhile:
 * the jobs that name it will tell. Half of the connection's time goes into offering such as it may
 * take later, for all of them together: the others want the rest.
 */
static int register_buffers(struct sage_client *c)
{
    const int64_t now = clock_ns(), end = now + (c->conn.limit - now) / 2;
    struct msg_registered reply;
    struct part part;
    uint32_t id = 0, first = 0;
    int rc;

    while (next_part(c, &id, first, &part, &rc)) {
        if (rc) /* there will be descriptors later */
            conn_close(&c->conn);
        else
            rc = conn_call(&c->conn, OP_REGISTER, MSG_REGISTER, &part.msg, &part.fds,
                           MSG_REGISTERED, &reply);
        close_fds(&part.fds);
        if (c->conn.fd < 0)
            return rc;
        if (rc == 0 && !part.msg.more)
            set_registered(c, id);
        if (may_offer_again(c, rc, end))
            id--; /* from its first chunk on */
        first = rc == 0 && part.msg.more ? part.next : 0;
    }
    return 0;
}

int reader_attach(struct sage_client *c)
{
    struct msg_welcome welcome;
    int rc = conn_open(&c->conn, c->path);

    if (!rc)
        rc = conn_hello(&c->conn, c->name, c->priority, c->page_fd, &welcome);
    if (rc)
        return rc;
    pthread_mutex_lock(&c->lock);
    c->welcome = welcome;
    c->epoch++;
    pthread_mutex_unlock(&c->lock);
    atomic_store(&c->credits, welcome.jobs);
    rc = register_buffers(c);
    return rc ? rc : events_register(c);
}

/* Forget the connection: it may be a private one still, or the one that submitters know. */
static void drop(struct sage_client *c)
{
    if (c->conn.fd == c->fd) {
        shutdown(c->fd, SHUT_RDWR);
        c->conn.fd = -1;
    }
    conn_close(&c->conn);
}

int reader_install(struct sage_client *c)
{
    if (c->fd >= 0) {
        if (dup3(c->conn.fd, c->fd, O_CLOEXEC) < 0) {
            int error = errno;
            drop(c);
            return error_set(SAGE_ENOMEM, "dup3: %s", strerror(error));
        }
        conn_close(&c->conn);
        c->conn.fd = c->fd;
    } else {
        c->fd = c->conn.fd;
    }
    return 0;
}

/* --- jobs that were under way --- */

/* The first number that can still be under way is that of the entry after the tail's. */
static uint32_t oldest(const struct sage_lane *lane)
{
    return lane_tail(lane) - SAGE_ENTRIES + 1;
}

static bool all_released(struct sage_client *c)
{
    for (int i = 0; i < SAGE_LANES; i++) {
        const struct sage_lane *lane = c->lanes[i];
        uint32_t n = lane ? oldest(lane) : 0;
        for (int e = 0; lane && e < SAGE_ENTRIES; e++)
            if (!lane_released(lane, n + (uint32_t)e))
                return false;
    }
    return true;
}

/* No daemon is going to tell of this job any more, if none has. */
static void set_untold(struct sage_lane *lane, uint32_t n, const char *text)
{
    struct msg_done_job *done = &lane->entry[n % SAGE_ENTRIES].done;

    pthread_mutex_lock(&lane->client->lock);
    if (lane_has(lane, n) && done->number != n) {
        *done = (struct msg_done_job){.lane = lane->index, .number = n, .status = -SAGE_ELOST};
        snprintf(done->text, sizeof(done->text), "%s", text);
    }
    pthread_mutex_unlock(&lane->client->lock);
}

/* The daemon did it, but did not live to tell, nor to wake who sleeps until its device has. */
static void set_released(struct sage_lane *lane, uint32_t n)
{
    set_untold(lane, n, "");
    page_wake(lane->words, n);
}

void reader_fail(struct sage_lane *lane, uint32_t n, const char *text)
{
    set_untold(lane, n, text);
    pthread_mutex_lock(&lane->client->lock);
    lane->entry[n % SAGE_ENTRIES].failed = true;
    pthread_mutex_unlock(&lane->client->lock);
    page_release(lane->words, n, SAGE_ELOST);
}

void reader_fail_all(struct sage_client *c, const char *text)
{
    for (int i = 0; i < SAGE_LANES; i++) {
        struct sage_lane *lane = c->lanes[i];
        uint32_t n = lane ? oldest(lane) : 0;
        for (int e = 0; lane && e < SAGE_ENTRIES; e++, n++)
            if (lane_released(lane, n))
                set_released(lane, n);
            else
                reader_fail(lane, n, text);
    }
}

/* The stream has gone on, or will: the job cannot run again. */
static bool was_launched(struct sage_client *c, const struct sage_lane *lane, uint32_t n)
{
    pthread_mutex_lock(&c->lock);
    bool launched = lane->entry[n % SAGE_ENTRIES].launched.number == n;
    pthread_mutex_unlock(&c->lock);
    return launched;
}

/* The packet of job n into conn.out: its length, or 0 where the entry is another job's by now. */
static size_t copy_packet(struct sage_client *c, struct sage_lane *lane, uint32_t n)
{
    const struct entry *e = &lane->entry[n % SAGE_ENTRIES];
    size_t len = 0;

    pthread_mutex_lock(&c->lock);
    if (e->number == n) {
        len = e->len;
        memcpy(c->conn.out, e->packet, len);
    }
    pthread_mutex_unlock(&c->lock);
    return len;
}

/* While the daemon does not read, it may be waiting for us to read. */
static int send_again(struct sage_client *c, size_t len)
{
    for (;;) {
        int rc = conn_push(c->conn.fd, c->conn.out, len, NULL);
        if (rc != SAGE_EBUSY && rc != SAGE_ENOMEM)
            return rc;
        struct pollfd p[2] = {{.fd = c->conn.fd, .events = POLLIN | POLLOUT},
                              {.fd = c->event, .events = POLLIN}};
        poll(p, 2, rc == SAGE_ENOMEM ? 1 : -1);
        if (p[1].revents)
            return error_set(SAGE_ECANCELED, "the client is being closed");
        if (!(p[0].revents & POLLIN))
            continue;
        struct packet packet;
        rc = conn_recv(&c->conn, &packet, -1);
        if (!rc)
            rc = dispatch(c, &packet);
        if (rc)
            return rc;
    }
}

/* Send what was published and is not released; `again`: even if this connection has seen it. */
static int resubmit(struct sage_client *c, bool again)
{
    for (int i = 0; i < SAGE_LANES; i++) {
        struct sage_lane *lane = c->lanes[i];
        if (!lane)
            continue;
        uint32_t tail = lane_tail(lane);
        if (again || tail - lane->sent > SAGE_ENTRIES)
            lane->sent = tail - SAGE_ENTRIES;
        while (lane->sent != tail) {
            uint32_t n = ++lane->sent;
            if (lane_released(lane, n)) {
                set_released(lane, n);
                continue;
            }
            if (again && was_launched(c, lane, n)) {
                reader_fail(lane, n, "the daemon died after it had launched the job");
                continue;
            }
            size_t len = copy_packet(c, lane, n);
            int rc = len ? send_again(c, len) : 0;
            if (rc)
                return rc;
        }
    }
    return 0;
}

/* Jobs first, then the descriptor: a submitter's late packet must not overtake earlier ones. */
static int resume(struct sage_client *c)
{
    uint64_t seen = atomic_load(&c->link);

    c->boot = c->welcome.boot;
    int rc = resubmit(c, true);
    if (!rc)
        rc = reader_install(c);
    while (!rc) {
        uint64_t live = LINK_WORD(LINK_LIVE, LINK_COUNT(seen));
        if (atomic_compare_exchange_strong(&c->link, &seen, live)) {
            announce(c);
            return 0;
        }
        rc = resubmit(c, false);
    }
    return rc;
}

/* --- when the connection breaks --- */

static void say_lost(const struct sage_client *c)
{
    error_set(SAGE_ELOST,
              c->reason[0] ? "the daemon closed the connection: %s"
                           : "the connection to the daemon broke%s",
              c->reason);
}

static void sever(struct sage_client *c)
{
    uint64_t live = atomic_load(&c->link);
    struct pollfd p = {.fd = c->event, .events = POLLIN};
    eventfd_t value;

    while (!atomic_compare_exchange_weak(&c->link, &live, LINK_WORD(LINK_DOWN, LINK_COUNT(live))))
        ;
    drop(c);
    pthread_mutex_lock(&c->lock);
    say_lost(c);
    while (c->requests) {
        struct request *r = c->requests;
        c->requests = r->next;
        finish_request(c, r, SAGE_ELOST);
    }
    pthread_cond_broadcast(&c->changed);
    pthread_mutex_unlock(&c->lock);
    /* client_revive() may have meant the very connection that broke; `stop` is looked at next. */
    if (poll(&p, 1, 0) > 0)
        eventfd_read(c->event, &value);
}

/* Leave no job behind, then let go of the connection. */
static void give_up(struct sage_client *c)
{
    char text[PROTO_TEXT_MAX];
    uint64_t seen = atomic_load(&c->link);

    if (c->reason[0])
        say_lost(c);
    c->reason[0] = '\0';
    snprintf(text, sizeof(text), "%.*s", (int)sizeof(text) - 1, error_text());
    do
        reader_fail_all(c, text);
    while (
        !atomic_compare_exchange_strong(&c->link, &seen, LINK_WORD(LINK_LOST, LINK_COUNT(seen))));
    announce(c);
}

/*
 * Find the next daemon and give it our jobs. One with the same boot id is the old one, alive: it
 * threw us out and may still be at our jobs, so they are not run twice but failed. While it is at
 * them it does not even take the page (SAGE_EBUSY).
 */
static bool find_successor(struct sage_client *c)
{
    int backoff = BACKOFF_MIN_MS;

    while (c->retry_ms > 0 && !c->stop) {
        if (reader_attach(c) == 0) {
            if (c->welcome.boot == c->boot && !all_released(c)) {
                error_set(SAGE_ELOST, "the daemon closed the connection");
                return false;
            }
            c->reason[0] = '\0';
            if (resume(c) == 0)
                return true;
        }
        drop(c);
        if (clock_ns() >= c->conn.limit)
            break;
        struct pollfd p = {.fd = c->event, .events = POLLIN};
        poll(&p, 1, backoff);
        backoff = backoff * 2 < BACKOFF_MAX_MS ? backoff * 2 : BACKOFF_MAX_MS;
    }
    return false;
}

/* Without a successor the dead socket stays where it is until client_revive(): a late packet of a
 * submitter meets that one. */
static void recover(struct sage_client *c)
{
    c->conn.limit = clock_ns() + c->retry_ms * INT64_C(1000000);
    sever(c);
    bool found = find_successor(c);
    c->conn.limit = CONN_NO_LIMIT;
    if (!found) {
        drop(c);
        give_up(c);
    }
}

void *reader_main(void *client)
{
    struct sage_client *c = client;
    struct packet packet;
    eventfd_t value;

    pthread_setname_np(pthread_self(), "sageclient");
    while (!c->stop) {
        bool live = client_state(c) == LINK_LIVE;
        int rc = live ? conn_recv(&c->conn, &packet, -1) : SAGE_ECANCELED;
        if (rc == SAGE_ECANCELED)
            eventfd_read(c->event, &value);
        else if (rc || dispatch(c, &packet))
            recover(c);
    }
    return NULL;
}
