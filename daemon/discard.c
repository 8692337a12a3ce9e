/*
 * discard.c - closing descriptors that clients sent: a queue for each user, a few threads for all;
 * and sockets in which such may wait, by one more.
 */
#include "daemon/discard.h"

#include <errno.h>
#include <pthread.h>
#include <signal.h>
#include <stdlib.h>
#include <string.h>
#include <sys/queue.h>
#include <sys/socket.h>
#include <time.h>
#include <unistd.h>

#include "daemon/log.h"

enum {
    CLOSERS = 4,    /* threads, at most */
    LIST_STEP = 64, /* descriptors by which a list grows */
    CLOSE_MS = 1,   /* that what lingers in a socket may take */
    STUCK_MAX = 3,  /* threads for sockets that do not come back from a close() */
};

#ifndef sigev_notify_thread_id
#define sigev_notify_thread_id _sigev_un._tid
#endif

struct list {
    unsigned n, room;
    int *fds;
};

struct owner {
    uid_t uid;
    unsigned closing; /* by threads now */
    struct list list;
    TAILQ_ENTRY(owner) link;
};

/* Not the daemon's: threads may outlive it, and their users' sessions. The lock is of it all. */
static pthread_mutex_t lock = PTHREAD_MUTEX_INITIALIZER;
static TAILQ_HEAD(, owner) owners = TAILQ_HEAD_INITIALIZER(owners); /* longest not served first */
static unsigned n_closers, n_closing, n_waiting; /* the last: not closed yet, of all owners */
static struct list sockets;
static struct {
    uintptr_t thread, last; /* the number of the one thread that closes them, 0: none; the last */
    bool closing, ticked;   /* it is in a close(); and was so at the last tick */
    unsigned stuck;         /* threads that were given up */
} sockets_by;

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
        if (o->list.n && o->closing < CLOSERS - n_closing)
            break;
    return o;
}

static void *close_them(void *arg)
{
    struct owner *o;

    pthread_mutex_lock(&lock);
    while ((o = next())) {
        int fd = o->list.fds[--o->list.n];
        TAILQ_REMOVE(&owners, o, link);
        TAILQ_INSERT_TAIL(&owners, o, link);
        o->closing++;
        n_closing++;
        pthread_mutex_unlock(&lock);
        close(fd);
        pthread_mutex_lock(&lock);
        n_closing--;
        n_waiting--;
        if (--o->closing || o->list.n)
            continue;
        TAILQ_REMOVE(&owners, o, link);
        free(o->list.fds);
        free(o);
    }
    n_closers--;
    pthread_mutex_unlock(&lock);
    return arg;
}

static void nothing(int signal)
{
    (void)signal;
}

/* Interrupt, from now on and again and again, what this thread waits for in a call. */
static bool start_interrupts(timer_t *timer)
{
    struct sigevent event = {.sigev_notify = SIGEV_THREAD_ID, .sigev_signo = SIGRTMIN};
    const struct timespec each = {.tv_nsec = CLOSE_MS * 1000000};
    const struct sigaction action = {.sa_handler = nothing};
    sigset_t set;

    event.sigev_notify_thread_id = gettid();
    sigaction(SIGRTMIN, &action, NULL);
    sigemptyset(&set);
    sigaddset(&set, SIGRTMIN);
    pthread_sigmask(SIG_UNBLOCK, &set, NULL);
    return timer_create(CLOCK_MONOTONIC, &event, timer) == 0 &&
           timer_settime(*timer, 0, &(struct itimerspec){each, each}, NULL) == 0;
}

/*
 * What waits in a socket is not closed as a descriptor of ours is: no owner of a file is asked, and
 * what lingers lets itself be interrupted. (What was written to a FUSE file may still be waited
 * for: give_up_stuck().)
 */
static void *close_sockets(void *thread)
{
    const uintptr_t own = (uintptr_t)thread;
    timer_t timer;
    bool timed = start_interrupts(&timer);

    if (!timed)
        log_error("discard", "timer=\"%s\"", strerror(errno));
    pthread_mutex_lock(&lock);
    while (sockets_by.thread == own && sockets.n) {
        int fd = sockets.fds[--sockets.n];
        sockets_by.closing = true;
        sockets_by.ticked = false;
        pthread_mutex_unlock(&lock);
        close(fd);
        pthread_mutex_lock(&lock);
        if (sockets_by.thread == own)
            sockets_by.closing = false;
    }
    if (sockets_by.thread == own)
        sockets_by.thread = 0;
    else
        sockets_by.stuck--;
    pthread_mutex_unlock(&lock);
    if (timed)
        timer_delete(timer);
    return NULL;
}

/* Under the lock. */
static bool start(void *(*run)(void *), uintptr_t arg)
{
    pthread_attr_t attr;
    pthread_t thread;
    sigset_t all, old;

    pthread_attr_init(&attr);
    pthread_attr_setdetachstate(&attr, PTHREAD_CREATE_DETACHED);
    sigfillset(&all);
    pthread_sigmask(SIG_SETMASK, &all, &old);
    int rc = pthread_create(&thread, &attr, run, (void *)arg);
    pthread_sigmask(SIG_SETMASK, &old, NULL);
    pthread_attr_destroy(&attr);
    return rc == 0;
}

/* One more thread of each kind, if it has something to do. Under the lock. */
static void start_closers(void)
{
    if (n_closers < CLOSERS && next() && start(close_them, 0))
        n_closers++;
    if (sockets.n && !sockets_by.thread && start(close_sockets, sockets_by.last + 1))
        sockets_by.thread = ++sockets_by.last;
}

/* Has a socket's close() lasted since the last tick? Another thread goes on. Under the lock. */
static void give_up_stuck(void)
{
    bool stuck = sockets_by.closing && sockets_by.ticked;

    sockets_by.ticked = true;
    if (!stuck || sockets_by.stuck == STUCK_MAX)
        return;
    sockets_by.thread = 0;
    sockets_by.closing = false;
    sockets_by.stuck++;
}

static bool append(struct list *list, const int *fds, unsigned n)
{
    if (list->room - list->n < n) {
        unsigned room = list->n + n + LIST_STEP;
        int *more = realloc(list->fds, room * sizeof(list->fds[0]));
        if (!more)
            return false;
        list->fds = more;
        list->room = room;
    }
    memcpy(list->fds + list->n, fds, n * sizeof(fds[0]));
    list->n += n;
    return true;
}

/* Under the lock. */
static bool append_of(uid_t uid, const int *fds, unsigned n)
{
    struct owner *o = find(uid);

    if (!o) {
        o = calloc(1, sizeof(*o));
        if (!o)
            return false;
        o->uid = uid;
        TAILQ_INSERT_TAIL(&owners, o, link);
    }
    if (!append(&o->list, fds, n))
        return false;
    n_waiting += n;
    return true;
}

void discard(uid_t uid, const int *fds, unsigned n)
{
    if (n == 0)
        return;
    pthread_mutex_lock(&lock);
    bool kept = append_of(uid, fds, n);
    start_closers();
    pthread_mutex_unlock(&lock);
    if (!kept)
        log_error("discard", "uid=%u left_open=%u reason=\"out of memory\"", (unsigned)uid, n);
}

/*
 * Nothing waits in it, not even a packet without bytes, which looks like the end: with each packet
 * come credentials, for which there is no room here. The first look may only tell of a reset.
 */
static bool is_empty(int fd)
{
    const int on = 1;
    struct msghdr msg;
    ssize_t n;

    if (setsockopt(fd, SOL_SOCKET, SO_PASSCRED, &on, sizeof(on)) < 0)
        return false;
    do {
        msg = (struct msghdr){0};
        n = recvmsg(fd, &msg, MSG_PEEK | MSG_DONTWAIT);
    } while (n < 0 && (errno == ECONNRESET || errno == EINTR));
    return n == 0 && !(msg.msg_flags & MSG_CTRUNC);
}

void discard_socket(int fd)
{
    shutdown(fd, SHUT_RDWR); /* nothing more comes in, and the peer knows at once */
    if (is_empty(fd)) {
        close(fd);
        return;
    }
    pthread_mutex_lock(&lock);
    bool kept = append(&sockets, &fd, 1);
    start_closers();
    pthread_mutex_unlock(&lock);
    if (!kept)
        log_error("discard", "left_open=1 reason=\"out of memory\"");
}

void discard_tick(void)
{
    pthread_mutex_lock(&lock);
    give_up_stuck();
    start_closers();
    pthread_mutex_unlock(&lock);
}

unsigned discard_waiting(uid_t uid, unsigned *others)
{
    pthread_mutex_lock(&lock);
    const struct owner *o = find(uid);
    unsigned n = o ? o->list.n + o->closing : 0;
    *others = n_waiting - n;
    pthread_mutex_unlock(&lock);
    return n;
}

unsigned discard_sockets(void)
{
    pthread_mutex_lock(&lock);
    unsigned n = sockets.n + sockets_by.closing;
    pthread_mutex_unlock(&lock);
    return n;
}
