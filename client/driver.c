/*
 * driver.c - the CUDA driver's entry points by dlopen, and questions to it.
 */
#include "client/driver.h"

#include <dlfcn.h>
#include <pthread.h>
#include <stdarg.h>
#include <stdio.h>
#include <string.h>

#include "client/conn.h"

/* Layouts are cuda.h's: a mistake here is memory corruption there. */
_Static_assert(sizeof(void *) == 8, "handles and addresses have 64 bits");
_Static_assert(sizeof(struct cu_copy) == 200, "sizeof(CUDA_MEMCPY3D)");
_Static_assert(sizeof(struct cu_word_op) == 48, "sizeof(CUstreamBatchMemOpParams)");
_Static_assert(sizeof(struct cu_handle) == 64, "CU_IPC_HANDLE_SIZE");

enum { CUDA_12_0 = 12000, LEGACY_STREAM = 1 };

/* Written once, before anybody gets to see it. */
struct opened {
    struct driver calls;
    char why[PROTO_TEXT_MAX]; /* empty: it is open */
};

/* A plain dlsym() finds the first version of a call; cuGetProcAddress() has had two itself. */
struct lookup {
    int (*v2)(const char *name, void **call, int version, uint64_t flags, int *status);
    int (*v1)(const char *name, void **call, int version, uint64_t flags);
};

static void *find(const struct lookup *lookup, const char *name)
{
    void *call = NULL;
    int status = 0;
    int rc = lookup->v2 ? lookup->v2(name, &call, CUDA_12_0, LEGACY_STREAM, &status)
                        : lookup->v1(name, &call, CUDA_12_0, LEGACY_STREAM);

    return rc == CU_OK && status == 0 ? call : NULL;
}

static void open_driver(struct opened *o)
{
    struct lookup lookup = {0};
    void *library = dlopen("libcuda.so.1", RTLD_NOW | RTLD_LOCAL);

    if (!library) {
        snprintf(o->why, sizeof(o->why), "no CUDA driver: %s", dlerror());
        return;
    }
    *(void **)&lookup.v2 = dlsym(library, "cuGetProcAddress_v2");
    *(void **)&lookup.v1 = dlsym(library, "cuGetProcAddress");
    if (!lookup.v2 && !lookup.v1) {
        snprintf(o->why, sizeof(o->why), "the CUDA driver is older than CUDA 12.0");
        return;
    }
#define DRIVER_FIND(name, arguments)                                                               \
    *(void **)&o->calls.name = find(&lookup, #name);                                               \
    if (!o->calls.name)                                                                            \
        snprintf(o->why, sizeof(o->why), "the CUDA driver has no %s of CUDA 12.0", #name);
    DRIVER_CALLS(DRIVER_FIND)
#undef DRIVER_FIND
}

static struct opened *opened(void)
{
    static struct opened o;

    return &o;
}

static void open_once(void)
{
    open_driver(opened());
}

const struct driver *driver_open(void)
{
    static pthread_once_t once = PTHREAD_ONCE_INIT;

    pthread_once(&once, open_once);
    if (!opened()->why[0])
        return &opened()->calls;
    error_set(SAGE_EUNSUPPORTED, "%s", opened()->why);
    return NULL;
}

/* The numbers of cuda.h: contexts that are lost end with 7xx, errors of captures are 9xx. */
static int status_of(int result)
{
    switch (result) {
    case 2: /* OUT_OF_MEMORY */
        return SAGE_ENOMEM;
    case 1:   /* INVALID_VALUE */
    case 3:   /* NOT_INITIALIZED */
    case 4:   /* DEINITIALIZED */
    case 201: /* INVALID_CONTEXT */
    case 400: /* INVALID_HANDLE */
    case 709: /* CONTEXT_IS_DESTROYED */
        return SAGE_EINVAL;
    case 46:  /* DEVICE_UNAVAILABLE */
    case 214: /* ECC_UNCORRECTABLE */
    case 700: /* ILLEGAL_ADDRESS */
    case 702: /* LAUNCH_TIMEOUT */
    case 710: /* ASSERT */
    case 714: /* HARDWARE_STACK_ERROR */
    case 715: /* ILLEGAL_INSTRUCTION */
    case 716: /* MISALIGNED_ADDRESS */
    case 717: /* INVALID_ADDRESS_SPACE */
    case 718: /* INVALID_PC */
    case 719: /* LAUNCH_FAILED */
        return SAGE_EDEVICE;
    case 801: /* NOT_SUPPORTED */
        return SAGE_EUNSUPPORTED;
    default:
        return result >= 900 && result <= 908 ? SAGE_ECAPTURE : SAGE_EINTERNAL;
    }
}

int driver_check(int result, const char *format, ...)
{
    const struct driver *cu = result ? driver_open() : NULL;
    const char *name = NULL, *text = NULL;
    char what[PROTO_TEXT_MAX];
    va_list args;

    if (!result)
        return 0;
    if (cu) {
        cu->cuGetErrorName(result, &name);
        cu->cuGetErrorString(result, &text);
    }
    va_start(args, format);
    vsnprintf(what, sizeof(what), format, args);
    va_end(args);
    return error_set(status_of(result), "%s: %s (%d): %s", what, name ? name : "CUDA error", result,
                     text ? text : "unknown");
}

int driver_uuid(const struct driver *cu, int device, char text[UUID_TEXT])
{
    unsigned char u[16];
    int rc = driver_check(cu->cuDeviceGetUuid(u, device), "device %d: cuDeviceGetUuid", device);

    if (rc)
        return rc;
    snprintf(text, UUID_TEXT,
             "GPU-%02x%02x%02x%02x-%02x%02x-%02x%02x-%02x%02x-%02x%02x%02x%02x%02x%02x", u[0], u[1],
             u[2], u[3], u[4], u[5], u[6], u[7], u[8], u[9], u[10], u[11], u[12], u[13], u[14],
             u[15]);
    return 0;
}

bool driver_enter(const struct driver *cu, const struct context *context)
{
    unsigned long long id = 0;

    /* A primary context can be pushed even after it was reset. */
    return context->cu && cu->cuCtxGetId(context->cu, &id) == CU_OK && id == context->id &&
           cu->cuCtxPushCurrent(context->cu) == CU_OK;
}

int driver_describe(const struct driver *cu, uint64_t address, struct memory *m)
{
    /* Booleans come as one byte or as four: what is not written stays 0. */
    uint64_t managed = 0, ipc = 0, mapping = 0, mapped = 0;
    struct {
        int attribute;
        void *data;
    } ask[] = {
        {1, &m->context},       /* CU_POINTER_ATTRIBUTE_CONTEXT */
        {2, &m->type},          /* MEMORY_TYPE */
        {7, &m->id},            /* BUFFER_ID */
        {8, &managed},          /* IS_MANAGED */
        {9, &m->device},        /* DEVICE_ORDINAL */
        {10, &ipc},             /* IS_LEGACY_CUDA_IPC_CAPABLE */
        {11, &m->base},         /* RANGE_START_ADDR */
        {12, &m->size},         /* RANGE_SIZE */
        {14, &m->handle_types}, /* ALLOWED_HANDLE_TYPES */
        {17, &m->pool},         /* MEMPOOL_HANDLE */
        {18, &mapped},          /* MAPPING_SIZE */
        {19, &mapping},         /* MAPPING_BASE_ADDR */
        {20, &m->block},        /* MEMORY_BLOCK_ID */
    };
    enum { N = sizeof(ask) / sizeof(ask[0]), NEWER = 3 };
    int attributes[N];
    void *data[N];

    *m = (struct memory){0};
    for (int i = 0; i < N; i++) {
        attributes[i] = ask[i].attribute;
        data[i] = ask[i].data;
    }
    int result = cu->cuPointerGetAttributes(N, attributes, data, address);
    if (result == CU_INVALID_VALUE) /* a driver that does not know the newer ones */
        result = cu->cuPointerGetAttributes(N - NEWER, attributes, data, address);
    m->managed = managed;
    m->ipc = ipc;
    /* Where a reservation is mapped chunk by chunk, the range may be all of it. */
    if (!m->ipc && !m->pool && mapping && address - mapping < mapped) {
        m->base = mapping;
        m->size = mapped;
    }
    return result;
}

bool driver_is_still(const struct driver *cu, uint64_t address, uint64_t id, uint64_t block)
{
    int attributes[] = {7, 20}; /* CU_POINTER_ATTRIBUTE_BUFFER_ID, _MEMORY_BLOCK_ID */
    uint64_t found[2] = {0};
    void *data[] = {&found[0], &found[1]};

    return cu->cuPointerGetAttributes(2, attributes, data, address) == CU_OK && found[0] == id &&
           found[1] == block;
}

int driver_tell_and_await(const struct driver *cu, struct CUstream_st *stream, uint64_t tell,
                          uint64_t await, uint32_t n)
{
    struct cu_word_op ops[] = {
        {.operation = CU_OP_WRITE, .address = tell, .value = n},
        {.operation = CU_OP_WAIT, .address = await, .value = n, .flags = CU_WAIT_GEQ},
    };

    return driver_check(cu->cuStreamBatchMemOp(stream, 2, ops, 0), "stream: cuStreamBatchMemOp");
}

/* --- for programs of this project --- */

static int find_device(struct device *d, const char *uuid)
{
    int n = 0;
    int rc = driver_check(d->cu->cuDeviceGetCount(&n), "cuDeviceGetCount");

    for (int i = 0; !rc && i < n; i++) {
        rc = driver_check(d->cu->cuDeviceGet(&d->number, i), "cuDeviceGet");
        if (!rc)
            rc = driver_uuid(d->cu, d->number, d->uuid);
        if (!rc && (!uuid || !*uuid || !strcmp(uuid, d->uuid)))
            return 0;
    }
    return rc ? rc
              : error_set(SAGE_EINVAL, "%s is not among the %d devices of this process",
                          uuid && *uuid ? uuid : "a GPU", n);
}

int device_open(struct device *d, const char *uuid)
{
    struct CUctx_st *context;

    *d = (struct device){.cu = driver_open()};
    if (!d->cu)
        return SAGE_EUNSUPPORTED;
    int rc = driver_check(d->cu->cuInit(0), "cuInit");
    if (!rc)
        rc = find_device(d, uuid);
    if (!rc)
        rc = driver_check(d->cu->cuDevicePrimaryCtxRetain(&context, d->number), "%s", d->uuid);
    if (rc)
        return rc;
    rc = driver_check(d->cu->cuCtxPushCurrent(context), "cuCtxPushCurrent");
    if (rc)
        d->cu->cuDevicePrimaryCtxRelease(d->number);
    return rc;
}

void device_close(struct device *d)
{
    struct CUctx_st *context;

    d->cu->cuCtxPopCurrent(&context);
    d->cu->cuDevicePrimaryCtxRelease(d->number);
}
