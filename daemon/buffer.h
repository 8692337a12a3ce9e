/*
 * buffer.h - client memory that is mapped here. Mapping and unmapping run on the libuv pool.
 */
#ifndef SAGE_BUFFER_H
#define SAGE_BUFFER_H

#include <sys/queue.h>
#include <uv.h>

#include "proto/proto.h"

struct session;

struct buffer {
    struct session *session;
    uint32_t id;
    uint32_t kind;
    int fd; /* until it is mapped */
    void *base;
    uint64_t size, wanted;
    bool open;     /* jobs may use it */
    unsigned jobs; /* that use it */
    bool leaving;  /* unregistered: goes with its last job */
    uint32_t seq;  /* of the request to be answered */
    bool answer;
    int status;
    char why[PROTO_TEXT_MAX];
    uv_work_t work;
    TAILQ_ENTRY(buffer) link; /* session.buffers, until it leaves */
};

/* REGISTER: takes fd over and answers `seq` when it is mapped, or at once if it is refused. */
void buffer_register(struct session *s, const struct msg_register *msg, int fd, uint32_t seq);
/* UNREGISTER: answers when the last job that uses it is over and it is unmapped. */
void buffer_unregister(struct session *s, uint32_t id, uint32_t seq);
/* All of a closing session. */
void buffer_leave_all(struct session *s);

/* A buffer that jobs may use, or NULL. */
struct buffer *buffer_find(struct session *s, uint32_t id);
void buffer_ref(struct buffer *b);
void buffer_unref(struct buffer *b);

#endif
