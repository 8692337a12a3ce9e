/*
 * discard.c - closing descriptors that clients sent.
 */
#include "daemon/discard.h"

#include <pthread.h>
#include <signal.h>
#include <stdint.h>
#include <sys/socket.h>
#include <unistd.h>

static void *close_it(void *arg)
{
    close((int)(intptr_t)arg);
    return NULL;
}

void discard(int fd)
{
    pthread_attr_t attr;
    pthread_t thread;
    sigset_t all, old;

    pthread_attr_init(&attr);
    pthread_attr_setdetachstate(&attr, PTHREAD_CREATE_DETACHED);
    sigfillset(&all);
    pthread_sigmask(SIG_SETMASK, &all, &old);
    int rc = pthread_create(&thread, &attr, close_it, (void *)(intptr_t)fd);
    pthread_sigmask(SIG_SETMASK, &old, NULL);
    pthread_attr_destroy(&attr);
    if (rc)
        close(fd);
}

void discard_socket(int fd)
{
    char byte;

    if (recv(fd, &byte, 1, MSG_PEEK | MSG_DONTWAIT) > 0)
        discard(fd);
    else
        close(fd);
}
