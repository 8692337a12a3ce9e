/*
 * discard.c - closing descriptors that clients sent.
 */
#include "daemon/discard.h"

#include <pthread.h>
#include <signal.h>
#include <stdlib.h>
#include <string.h>
#include <sys/socket.h>
#include <unistd.h>

struct closing {
    unsigned n;
    int fds[];
};

static void *close_them(void *arg)
{
    struct closing *closing = arg;

    for (unsigned i = 0; i < closing->n; i++)
        close(closing->fds[i]);
    free(closing);
    return NULL;
}

void discard(const int *fds, unsigned n)
{
    struct closing *closing = n ? malloc(sizeof(*closing) + n * sizeof(fds[0])) : NULL;
    pthread_attr_t attr;
    pthread_t thread;
    sigset_t all, old;

    if (!closing) {
        for (unsigned i = 0; i < n; i++)
            close(fds[i]);
        return;
    }
    closing->n = n;
    memcpy(closing->fds, fds, n * sizeof(fds[0]));
    pthread_attr_init(&attr);
    pthread_attr_setdetachstate(&attr, PTHREAD_CREATE_DETACHED);
    sigfillset(&all);
    pthread_sigmask(SIG_SETMASK, &all, &old);
    int rc = pthread_create(&thread, &attr, close_them, closing);
    pthread_sigmask(SIG_SETMASK, &old, NULL);
    pthread_attr_destroy(&attr);
    if (rc)
        close_them(closing);
}

void discard_socket(int fd)
{
    char byte;

    if (recv(fd, &byte, 1, MSG_PEEK | MSG_DONTWAIT) > 0)
        discard(&fd, 1);
    else
        close(fd);
}
