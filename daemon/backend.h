/*
 * backend.h - a device: maps client memory and computes pieces of jobs on streams.
 *
 * The loop thread calls everything but map() and unmap(), which run on the libuv pool. A stream
 * works through its pieces in order and tells of each by its completion word; nobody waits for
 * anybody.
 */
#ifndef SAGE_BACKEND_H
#define SAGE_BACKEND_H

#include "daemon/options.h"
#include "proto/page.h"
#include "proto/proto.h"

struct device;
struct stream;

/* One launch: a part of a problem on a stream. The loop fills it, the stream runs it. */
struct piece {
    const struct sage_attn *attn; /* data pointers in force */
    struct sage_part part;
    struct sage_page_lane *lane; /* release job `number` there when this is done; NULL: do not */
    uint32_t number;
    bool brief; /* takes less than waking somebody, on an idle stream: may be done in start() */
    /* Written by the stream, to be read once `done` is seen. */
    int status;                /* SAGE_EDEVICE: the device is lost, and nothing was released */
    uint64_t start_ns, end_ns; /* CLOCK_MONOTONIC */
    uint32_t done;             /* the completion word: 1, last of all */
};

struct backend {
    const char *name;
    /*
     * notify(arg) is called from any thread when a piece is done. 0 or SAGE_E* with
     * why[PROTO_TEXT_MAX].
     */
    int (*open)(struct device **device, const struct config *config, void (*notify)(void *),
                void *arg, char *why);
    void (*close)(struct device *device); /* all streams are closed, all memory is unmapped */
    /* Text for people, and the UUID ("" where there is none). */
    void (*describe)(struct device *device, char name[PROTO_NAME_MAX], char uuid[PROTO_NAME_MAX]);

    /* Map client memory; *size is what the owner of the memory says, not what the client does. */
    int (*map)(struct device *device, uint32_t kind, int fd, void **base, uint64_t *size,
               char *why);
    void (*unmap)(struct device *device, void *base, uint64_t size);

    /* A stream with its workspace, all of it allocated now. */
    int (*stream_open)(struct device *device, size_t workspace, struct stream **stream, char *why);
    void (*stream_close)(struct stream *stream); /* all its pieces are done */
    void (*start)(struct stream *stream, struct piece *piece);

    /* Bytes of workspace for a part; first guess of its duration. */
    size_t (*workspace)(const struct sage_attn *attn, const struct sage_part *part);
    double ns_per_op, ns_per_byte;
    double ns_per_channel; /* of each query head: what a single key costs already */
};

enum { STREAM_DEPTH = 8 }; /* pieces started and not done on one stream, at most */

extern const struct backend backend_cpu, backend_fault;

/* By the name in the configuration; NULL with why[PROTO_TEXT_MAX]. */
const struct backend *backend_find(const char *name, char *why);

/* The name of the kernel that a problem runs on, for statistics. */
void backend_kernel_name(const struct backend *backend, const struct sage_attn *attn,
                         char name[PROTO_NAME_MAX]);

#endif
