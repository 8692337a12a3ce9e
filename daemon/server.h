/*
 * server.h - the listening socket, and what the service manager is told.
 */
#ifndef SAGE_SERVER_H
#define SAGE_SERVER_H

#include <uv.h>

#include "daemon/daemon.h"

struct server {
    struct daemon *daemon;
    uv_poll_t poll;
    int fd;
    int lock_fd; /* held while the socket at this path is ours; -1: it was handed to us */
    bool paused; /* nobody is accepted: the next tick tries again, or `pause` */
    uv_timer_t pause;
    uint64_t watchdog_ns, fed_ns; /* 0: no watchdog */
    uv_signal_t sigterm, sigint;
    bool told;        /* to end, by a signal: one more means at once */
    char status[160]; /* last told */
};

/* Listen: on the socket that systemd hands over, or at config.socket. 0 or SAGE_E* with why. */
int server_open(struct server *server, struct daemon *d, char *why);
/* Handles are the loop's to close. Removes the socket if it is ours. */
void server_finish(struct server *server);
/* The daemon serves from now on. */
void server_ready(struct server *server);

#endif
