/*
 * conn.h - a connection to the daemon: whole packets out and in, every wait with a limit.
 * libsageclient and sagectl share it. Internal.
 */
#ifndef SAGE_CONN_H
#define SAGE_CONN_H

#include "proto/proto.h"

enum {
    CONN_TIMEOUT_MS = 10000, /* a daemon started by its socket answers after it has warmed up */
};
#define CONN_NO_LIMIT INT64_MAX /* of its owner's; that of CONN_TIMEOUT_MS stays */

/* For one thread at a time; conn_push() and conn_send() need only the descriptor. */
struct conn {
    int fd;   /* -1: not connected */
    int stop; /* the owner's; once it is readable every wait ends with SAGE_ECANCELED; -1: none */
    int64_t limit; /* the owner's; no conn_open() or conn_call() lasts longer; of clock_ns() */
    uint32_t seq;
    struct unpacker *unpacker;
    volatile bool unpacking; /* a fork child may find it so: then the unpacker is in pieces */
    unsigned char in[PROTO_PACKET_MAX + 1]; /* one more, to notice packets that are too long */
    unsigned char out[PROTO_PACKET_MAX];
};

/* Descriptors that ride on a packet. */
struct conn_fds {
    uint32_t n;
    int fd[PROTO_FDS_MAX];
};

/* This thread's error text. error_set() returns its status. */
int error_set(int status, const char *format, ...) __attribute__((format(printf, 2, 3)));
const char *error_text(void);
/* The status that a number from the wire or the page stands for. */
int status_from_wire(uint32_t number);

int64_t clock_ns(void); /* monotonic */

/* Which socket: the given one, $SAGEATTND_SOCKET, or the first default that is there. */
const char *conn_path(const char *given, char *buf, size_t size);
/* Default number `i` among those that are there, in the order of preference; false: no more. */
bool conn_default(int i, char *buf, size_t size);

int conn_init(struct conn *conn, int stop);
void conn_finish(struct conn *conn);

/* SAGE_ENODAEMON, SAGE_EPERM, SAGE_EINVAL (path too long), SAGE_ETIMEDOUT, SAGE_ECANCELED. */
int conn_open(struct conn *conn, const char *path);
void conn_close(struct conn *conn);

/* One packet; fds: NULL, or what rides on it. SAGE_EBUSY: would block; SAGE_ELOST: no peer. */
int conn_push(int fd, const void *data, size_t len, const struct conn_fds *fds);
/* Would conn_push() find room? Also when there is no peer any more. */
bool conn_has_room(int fd);
/* The same as conn_push(), but waits for room. */
int conn_send(int fd, const void *data, size_t len, const struct conn_fds *fds);

/* One packet; *packet is good until the next. deadline of clock_ns(), < 0: none. */
int conn_recv(struct conn *conn, struct packet *packet, int64_t deadline);

/* Decode the reply to a request; the status and text that an ERROR carries. */
int conn_reply(const struct packet *packet, uint32_t op, enum msg_kind kind, void *reply);

/* Ask and wait for the answer. When the connection itself fails it is closed: fd is -1 then. */
int conn_call(struct conn *conn, uint32_t op, enum msg_kind kind, const void *msg,
              const struct conn_fds *fds, enum msg_kind reply_kind, void *reply);

/* HELLO; page < 0: without a page, no jobs. SAGE_EVERSION. */
int conn_hello(struct conn *conn, const char *name, uint32_t priority, int page,
               struct msg_welcome *welcome);

#endif
