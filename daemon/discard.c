/*
 * discard.c - closing descriptors that clients sent: a queue for each user, a few threads for all.
 */
#include "daemon/discard.h"

#include <pthread.h>
#include <signal.h>
#include <stdlib.h>
#include <string.h>
#include <sys/queue.h>
#include <sys/socket.h>
#include <unistd.h>

#include "daemon/log.h"

enum {
    CLOSERS = 4,    /* threads, at most */
    LIST_STEP = 64, /* descriptors by which a list grows */
};

struct owner {
    uid_t uid;
    unsigned n, room, closing; /* in `fds`, and room there; being closed by threads now */
    int *fds;
    TAILQ_ENTRY(owner) link;
};

/* Not the daemon's: threads may outlive it, and their users' sessions. The lock is of it all. */
static pthread_mutex_t lock = PTHREAD_MUTEX_INITIALIZER;
static TAILQ_HEAD(, owner) owners = TAILQ_HEAD_INITIALIZER(owners); /* longest not served first */
static unsigned n_closers, n_closing, n_waiting; /* the last: not closed yet, of all owners */

static struct owner *find(uid_t uid)
{
    struct owner *o;

    TAILQ_FOREACH(o, &owners, link)
        if (o->uid == uid)
            break;
    return o;
}

/* Whose turn is it? Nobody takes half of the threads that others have left, or more. */
static struct owner *next(void)
{
    struct owner *o;

    TAILQ_FOREACH(o, &owners, link)
        if (o->n && o->closing < CLOSERS - n_closing)
            break;
    return o;
}

static void *close_them(void *arg)
{
    struct owner *o;

    pthread_mutex_lock(&lock);
    while ((o = next())) {
        int fd = o->fds[--o->n];
        TAILQ_REMOVE(&owners, o, link);
        TAILQ_INSERT_TAIL(&owners, o, link);
        o->closing++;
        n_closing++;
        pthread_mutex_unlock(&lock);
        close(fd);
        pthread_mutex_lock(&lock);
        n_closing--;
        n_waiting--;
        if (--o->closing || o->n)
            continue;
        TAILQ_REMOVE(&owners, o, link);
        free(o->fds);
        free(o);
    }
    n_closers--;
    pthread_mutex_unlock(&lock);
    return arg;
}

/* One more thread, if it has something to do. Under the lock. */
static void start_closer(void)
{
    pthread_attr_t attr;
    pthread_t thread;
    sigset_t all, old;

    if (n_closers == CLOSERS || !next())
        return;
    pthread_attr_init(&attr);
    pthread_attr_setdetachstate(&attr, PTHREAD_CREATE_DETACHED);
    sigfillset(&all);
    pthread_sigmask(SIG_SETMASK, &all, &old);
    if (pthread_create(&thread, &attr, close_them, NULL) == 0)
        n_closers++;
    pthread_sigmask(SIG_SETMASK, &old, NULL);
    pthread_attr_destroy(&attr);
}

/* Under the lock. */
static bool append(uid_t uid, const int *fds, unsigned n)
{
    struct owner *o = find(uid);

    if (!o) {
        o = calloc(1, sizeof(*o));
        if (!o)
            return false;
        o->uid = uid;
        TAILQ_INSERT_TAIL(&owners, o, link);
    }
    if (o->room - o->n < n) {
        unsigned room = o->n + n + LIST_STEP;
        int *more = realloc(o->fds, room * sizeof(o->fds[0]));
        if (!more)
            return false;
        o->fds = more;
        o->room = room;
    }
    memcpy(o->fds + o->n, fds, n * sizeof(fds[0]));
    o->n += n;
    n_waiting += n;
    return true;
}

void discard(uid_t uid, const int *fds, unsigned n)
{
    if (n == 0)
        return;
    pthread_mutex_lock(&lock);
    bool kept = append(uid, fds, n);
    start_closer();
    pthread_mutex_unlock(&lock);
    if (!kept)
        log_error("discard", "uid=%u left_open=%u reason=\"out of memory\"", (unsigned)uid, n);
}

void discard_socket(uid_t uid, int fd)
{
    shutdown(fd, SHUT_RDWR); /* nothing more comes in, and the peer knows at once */
    discard(uid, &fd, 1);
}

void discard_tick(void)
{
    pthread_mutex_lock(&lock);
    start_closer();
    pthread_mutex_unlock(&lock);
}

unsigned discard_waiting(uid_t uid, unsigned *others)
{
    pthread_mutex_lock(&lock);
    const struct owner *o = find(uid);
    unsigned n = o ? o->n + o->closing : 0;
    *others = n_waiting - n;
    pthread_mutex_unlock(&lock);
    return n;
}
