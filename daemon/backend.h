/*
 * backend.h - a device: maps client memory and computes pieces of jobs on streams.
 *
 * The loop thread calls everything but map(), unmap(), page_open(), page_close(), event_open() and
 * event_close(), which run on the libuv pool. A stream works through its pieces in order and tells
 * of each by its completion word; nobody waits for anybody.
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
    struct sage_page_lane *lane;   /* release job `number` there when this is done; NULL: do not */
    struct sage_page_lane *remote; /* the same for the device, which does it; NULL: we do */
    uint32_t number;
    uint64_t wait_ns; /* the stream first waits for the inputs, so long at most; 0: it does not */
    bool brief; /* takes less than waking somebody, on an idle stream: may be done in start() */
    uint64_t launch_ns; /* CLOCK_MONOTONIC, like the others; just before start() */
    /* Written by the stream, to be read once `done` is seen. */
    int status;                /* SAGE_EDEVICE: the device is lost, and nothing was released */
    bool missed;               /* the inputs were not ready in time: nothing was done */
    uint64_t ready_ns;         /* when they were, after it began to wait; 0: it had not to */
    uint64_t start_ns, end_ns; /* start_ns: as soon as it is known, 0 before */
    uint32_t done;             /* the completion word: 1, last of all */
};

/* What a client wants mapped. The backend does not close descriptors. */
struct mapping {
    enum buffer_kind kind;
    uint8_t handle[PROTO_HANDLE_MAX]; /* cuda_ipc */
    uint32_t n;                       /* memfd: 1; vmm: chunks */
    int *fds;                         /* not looked at by unmap() */
    uint64_t *sizes;                  /* of the chunks, as the client says; their sum fits */
};

struct backend {
    const char *name;
    unsigned kinds;          /* 1 << enum buffer_kind: what map() takes */
    unsigned modes;          /* enum mode */
    const char *client_mode; /* of a client whose jobs have no event, in CLIENTS */
    bool forms; /* masks, sequences and a V that is not aligned have kernels of their own */
    /*
     * notify(arg) is called from any thread when a piece is done, unless there is poll(). 0 or
     * SAGE_E* with why[PROTO_TEXT_MAX].
     */
    int (*open)(struct device **device, const struct config *config, void (*notify)(void *),
                void *arg, char *why);
    void (*close)(struct device *device); /* all streams are closed, all memory is unmapped */
    /* Text for people, and the UUID ("" where there is none). */
    void (*describe)(struct device *device, char name[PROTO_NAME_MAX], char uuid[PROTO_NAME_MAX]);
    /* What the configuration leaves to the memory there is: slot_bytes and limits that are 0. */
    void (*defaults)(struct device *device, struct config *config);
    /* Has the device been lost, be it while nothing ran? With why[PROTO_TEXT_MAX]. NULL: never. */
    bool (*is_lost)(struct device *device, char *why);
    /* Can the problem, legal as it is, be computed here? 0 or SAGE_E* with why. NULL: always. */
    int (*supports)(struct device *device, const struct sage_attn *attn, char *why);

    /* Map client memory; *size is what the owner of the memory says, not what the client does. */
    int (*map)(struct device *device, const struct mapping *what, void **base, uint64_t *size,
               char *why);
    void (*unmap)(struct device *device, const struct mapping *what, void *base, uint64_t size);
    /*
     * Let streams store into a client's page: *remote is its address for them, or NULL where they
     * cannot. Both run on the libuv pool, both may be NULL.
     */
    int (*page_open)(struct device *device, struct sage_page *page, struct sage_page **remote,
                     char *why);
    void (*page_close)(struct device *device, struct sage_page *page);
    /* Memory of our own that pieces can use, all zero; NULL: there is not so much. */
    void *(*memory_get)(struct device *device, size_t bytes);
    void (*memory_put)(struct device *device, void *memory);

    /* A stream with its workspace, all of it allocated now. */
    int (*stream_open)(struct device *device, size_t workspace, struct stream **stream, char *why);
    void (*stream_close)(struct stream *stream); /* all its pieces are done */
    void (*start)(struct stream *stream, struct piece *piece);
    /* Can streams wait (wait_ns) and keep nobody else waiting meanwhile? NULL: no. */
    bool (*can_wait)(struct device *device);
    /* Take note of what the device has done. NULL: streams do that by themselves, and notify. */
    void (*poll)(struct stream *stream);
    /*
     * After a sleep, a piece is about to start: have what that needs in the caches. running: one of
     * ours is. NULL: no need.
     */
    void (*warm)(struct device *device, bool running);

    /*
     * Events of MODE_EVENT; without it all are NULL. A client's event: done (1), not yet (0), or
     * SAGE_EHANDLE, or SAGE_EDEVICE for a lost device.
     */
    int (*event_open)(struct device *device, const uint8_t handle[PROTO_HANDLE_MAX], void **event,
                      char *why);
    void (*event_close)(struct device *device, void *event);
    int (*event_done)(struct device *device, void *event);
    /*
     * One of the device's own, recorded behind all that was started on the stream: its number and
     * handle. SAGE_E*: the newest piece was not launched, or there is no event. It is used again
     * when it was given back and has passed.
     */
    int (*event_record)(struct stream *stream, uint32_t *number, uint8_t handle[PROTO_HANDLE_MAX]);
    void (*event_put)(struct device *device, uint32_t number);

    /* Bytes of workspace for a part; first guess of its duration. */
    size_t (*workspace)(const struct sage_attn *attn, const struct sage_part *part);
    double ns_per_op, ns_per_byte;
    double ns_per_channel; /* of each query head: what a single key costs already */
    double ns_per_piece;   /* launching it */
};

enum { STREAM_DEPTH = 8 }; /* pieces started and not done on one stream, at most */

extern const struct backend backend_cpu, backend_cuda, backend_fault;

/* By the name in the configuration; NULL with why[PROTO_TEXT_MAX]. */
const struct backend *backend_find(const char *name, char *why);

/* The name of the kernel that a problem runs on, for statistics. */
void backend_kernel_name(const struct backend *backend, const struct sage_attn *attn,
                         char name[PROTO_NAME_MAX]);

#endif
