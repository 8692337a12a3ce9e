/*
 * buffer.h - what clients share: memory that is mapped here, and their events. Opening and closing
 * run on the libuv pool.
 */
#ifndef SAGE_BUFFER_H
#define SAGE_BUFFER_H

#include <sys/queue.h>
#include <uv.h>

#include "daemon/backend.h"
#include "proto/proto.h"

struct daemon;
struct session;
struct user;

struct buffer {
    struct session *session;
    uint32_t id;
    struct mapping mapping; /* its descriptors are open until it is mapped. Owned */
    unsigned n_fds;         /* of these */
    void *base;
    uint64_t size, wanted; /* size: until it is mapped that of the chunks that came */
    bool partial;          /* more chunks are to come */
    bool open;             /* jobs may use it */
    unsigned jobs;         /* that use it */
    bool leaving;          /* unregistered: goes with its last job */
    uint32_t seq;          /* of the request to be answered */
    bool answer;
    int status;
    char why[PROTO_TEXT_MAX];
    uv_work_t work;
    TAILQ_ENTRY(buffer) link; /* session.buffers, until it leaves */
};

/* REGISTER: takes the descriptors over and answers `seq` when it is mapped, refused or partial. */
void buffer_register(struct session *s, const struct msg_register *msg, const int *fds,
                     unsigned n_fds, uint32_t seq);
/* UNREGISTER: answers when the last job that uses it is over and it is unmapped. */
void buffer_unregister(struct session *s, uint32_t id, uint32_t seq);
/* All of a closing session. */
void buffer_leave_all(struct session *s);

/* Does the user have too many descriptors open here for anything more to be received from it? */
bool buffer_user_is_over(const struct daemon *d, const struct user *user);

/* A buffer that jobs may use, or NULL. */
struct buffer *buffer_find(struct session *s, uint32_t id);
void buffer_ref(struct buffer *b);
void buffer_unref(struct buffer *b);

struct event {
    struct session *session;
    uint32_t id;
    uint8_t handle[PROTO_HANDLE_MAX];
    void *opened; /* the backend's */
    bool ready;   /* it is open: jobs may use it */
    uint32_t seq;
    int status;
    char why[PROTO_TEXT_MAX];
    uv_work_t work;
    LIST_ENTRY(event) link; /* session.events */
};

/* EVENT: answers when it is open. It is closed with the session. */
void event_register(struct session *s, const struct msg_event *msg, uint32_t seq);
/* All of a closing session: no job asks for them any more. */
void event_leave_all(struct session *s);
/* An event that is open, or NULL. */
struct event *event_find(struct session *s, uint32_t id);

#endif
