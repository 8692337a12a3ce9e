/*
 * driver.h - the CUDA driver, opened when it is first needed: the library links to no CUDA and is
 * compiled without its headers. What those would say of types and values is said here. Internal.
 *
 * It is the program's driver: nothing here makes a context or initialises it, except for
 * device_open(), which is for programs of this project.
 */
#ifndef SAGE_DRIVER_H
#define SAGE_DRIVER_H

#include <stdbool.h>
#include <stddef.h>
#include <stdint.h>

struct CUctx_st;
struct CUevent_st;
struct CUstream_st;

#define CU_STREAM_PER_THREAD ((struct CUstream_st *)2)

/* Values of cuda.h. */
enum {
    CU_OK = 0,
    CU_INVALID_VALUE = 1,
    CU_NOT_READY = 600,

    CU_MEMORY_HOST = 1,
    CU_MEMORY_DEVICE = 2,
    CU_MEMORY_UNIFIED = 4,
    CU_POSIX_FD = 1, /* CU_MEM_HANDLE_TYPE_POSIX_FILE_DESCRIPTOR */

    CU_STREAM_ASIDE = 1,    /* CU_STREAM_NON_BLOCKING */
    CU_HOST_MAPPED = 2,     /* CU_MEMHOSTREGISTER_DEVICEMAP */
    CU_OP_WAIT = 1,         /* CU_STREAM_MEM_OP_WAIT_VALUE_32 */
    CU_OP_WRITE = 2,        /* CU_STREAM_MEM_OP_WRITE_VALUE_32 */
    CU_WAIT_GEQ = 0,        /* CU_STREAM_WAIT_VALUE_GEQ: (int32_t)(word - value) >= 0 */
    CU_EVENT_UNTIMED = 2,   /* CU_EVENT_DISABLE_TIMING */
    CU_EVENT_SHARED = 4,    /* CU_EVENT_INTERPROCESS */
    CU_CAPTURE_RELAXED = 2, /* CU_STREAM_CAPTURE_MODE_RELAXED */
};

/* CUipcMemHandle and CUipcEventHandle. */
struct cu_handle {
    unsigned char bytes[64];
};

/* CUstreamBatchMemOpParams. */
struct cu_word_op {
    int operation;
    uint64_t address, value;
    unsigned flags;
    uint64_t reserved[2];
};

/* CUDA_MEMCPY3D. */
struct cu_copy_end {
    size_t x, y, z, lod;
    int type;
    const void *host;
    uint64_t device;
    void *array, *reserved;
    size_t pitch, height; /* rows from slice to slice */
};

struct cu_copy {
    struct cu_copy_end from, to;
    size_t width, height, depth;
};

/*
 * X(name, arguments): what cuGetProcAddress() gives for CUDA 12.0, with the default stream of old.
 * All return CUresult. CUdeviceptr and CUmemGenericAllocationHandle are 64 bits, CUdevice an int.
 */
#define DRIVER_CALLS(X)                                                                            \
    X(cuInit, (unsigned flags))                                                                    \
    X(cuGetErrorName, (int error, const char **name))                                              \
    X(cuGetErrorString, (int error, const char **text))                                            \
    X(cuDriverGetVersion, (int *version))                                                          \
    X(cuDeviceGetCount, (int *count))                                                              \
    X(cuDeviceGet, (int *device, int ordinal))                                                     \
    X(cuDeviceGetUuid, (unsigned char *uuid, int device))                                          \
    X(cuDeviceTotalMem, (size_t * bytes, int device))                                              \
    X(cuDevicePrimaryCtxRetain, (struct CUctx_st * *context, int device))                          \
    X(cuDevicePrimaryCtxRelease, (int device))                                                     \
    X(cuCtxGetCurrent, (struct CUctx_st * *context))                                               \
    X(cuCtxPushCurrent, (struct CUctx_st * context))                                               \
    X(cuCtxPopCurrent, (struct CUctx_st * *context))                                               \
    X(cuCtxGetDevice, (int *device))                                                               \
    X(cuCtxGetId, (struct CUctx_st * context, unsigned long long *id))                             \
    X(cuCtxSynchronize, (void))                                                                    \
    X(cuThreadExchangeStreamCaptureMode, (int *mode))                                              \
    X(cuPointerGetAttributes, (unsigned n, int *attributes, void **data, uint64_t address))        \
    X(cuIpcGetMemHandle, (struct cu_handle * handle, uint64_t address))                            \
    X(cuMemRetainAllocationHandle, (uint64_t * handle, void *address))                             \
    X(cuMemExportToShareableHandle,                                                                \
      (void *shareable, uint64_t handle, int type, unsigned long long flags))                      \
    X(cuMemRelease, (uint64_t handle))                                                             \
    X(cuMemAlloc, (uint64_t * address, size_t bytes))                                              \
    X(cuMemFree, (uint64_t address))                                                               \
    X(cuMemGetInfo, (size_t * available, size_t * total))                                          \
    X(cuMemHostGetDevicePointer, (uint64_t * address, void *memory, unsigned flags))               \
    X(cuMemHostRegister, (void *memory, size_t bytes, unsigned flags))                             \
    X(cuMemHostUnregister, (void *memory))                                                         \
    X(cuMemcpyAsync, (uint64_t to, uint64_t from, size_t bytes, struct CUstream_st * stream))      \
    X(cuMemcpy3DAsync, (const struct cu_copy *copy, struct CUstream_st *stream))                   \
    X(cuMemcpyHtoD, (uint64_t to, const void *from, size_t bytes))                                 \
    X(cuMemcpyDtoH, (void *to, uint64_t from, size_t bytes))                                       \
    X(cuStreamCreate, (struct CUstream_st * *stream, unsigned flags))                              \
    X(cuStreamDestroy, (struct CUstream_st * stream))                                              \
    X(cuStreamGetCtx, (struct CUstream_st * stream, struct CUctx_st * *context))                   \
    X(cuStreamGetId, (struct CUstream_st * stream, unsigned long long *id))                        \
    X(cuStreamIsCapturing, (struct CUstream_st * stream, int *status))                             \
    X(cuStreamSynchronize, (struct CUstream_st * stream))                                          \
    X(cuStreamBatchMemOp,                                                                          \
      (struct CUstream_st * stream, unsigned n, struct cu_word_op *ops, unsigned flags))           \
    X(cuStreamWaitEvent, (struct CUstream_st * stream, struct CUevent_st * event, unsigned flags)) \
    X(cuEventCreate, (struct CUevent_st * *event, unsigned flags))                                 \
    X(cuEventDestroy, (struct CUevent_st * event))                                                 \
    X(cuEventRecord, (struct CUevent_st * event, struct CUstream_st * stream))                     \
    X(cuEventQuery, (struct CUevent_st * event))                                                   \
    X(cuEventSynchronize, (struct CUevent_st * event))                                             \
    X(cuIpcGetEventHandle, (struct cu_handle * handle, struct CUevent_st * event))                 \
    X(cuIpcOpenEventHandle, (struct CUevent_st * *event, struct cu_handle handle))

struct driver {
#define DRIVER_FIELD(name, arguments) int(*name) arguments;
    DRIVER_CALLS(DRIVER_FIELD)
#undef DRIVER_FIELD
};

/* Any thread. NULL: SAGE_EUNSUPPORTED, with this thread's error text. */
const struct driver *driver_open(void);

/* 0, or the SAGE_E* that a CUresult comes to, with a text: the format's, then CUDA's own. */
int driver_check(int result, const char *format, ...) __attribute__((format(printf, 2, 3)));

enum { UUID_TEXT = 41 }; /* "GPU-", 36 characters, NUL */
int driver_uuid(const struct driver *cu, int device, char text[UUID_TEXT]);

/* One that was destroyed may leave its address to another, but not its id. */
struct context {
    struct CUctx_st *cu; /* NULL: none */
    unsigned long long id;
};

static inline bool context_is(const struct context *a, const struct context *b)
{
    return a->cu == b->cu && a->id == b->id;
}

/* Make it current until cuCtxPopCurrent(). false: it is gone, with all that was made in it. */
bool driver_enter(const struct driver *cu, const struct context *context);

/* What the driver knows of an address. All zero: nothing. */
struct memory {
    struct CUctx_st *context; /* NULL where it belongs to none */
    unsigned type;            /* CU_MEMORY_* */
    int device;
    bool managed, ipc;     /* ipc: cuIpcGetMemHandle() takes it */
    uint64_t base, size;   /* of the allocation, or of one mapped chunk of a reservation */
    uint64_t id, block;    /* of the allocation and of its physical memory; never used again */
    uint64_t handle_types; /* cuMemExportToShareableHandle() may make these of it */
    void *pool;            /* of cudaMallocAsync() */
};

/* Needs no context. A CUresult. */
int driver_describe(const struct driver *cu, uint64_t address, struct memory *memory);
/* Is it still the allocation that had these ids? A fraction of driver_describe(). */
bool driver_is_still(const struct driver *cu, uint64_t address, uint64_t id, uint64_t block);

/*
 * In one call: the stream stores n in a word, behind all that was put on it before, then waits
 * until another has reached n. Addresses are the device's.
 */
int driver_tell_and_await(const struct driver *cu, struct CUstream_st *stream, uint64_t tell,
                          uint64_t await, uint32_t n);

/* A device for a program of this project: its primary context, current until device_close(). */
struct device {
    const struct driver *cu;
    int number;
    char uuid[UUID_TEXT];
};

/* uuid: NULL or empty for the first device. */
int device_open(struct device *device, const char *uuid);
void device_close(struct device *device);

#endif
