/*
 * cuda_share.c - memory, pages and events of other processes on the GPU. Opening and closing run on
 * the libuv pool: any thread there may be new to the device.
 */
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <unistd.h>

#include "daemon/backend_cuda.h"
#include "daemon/log.h"

enum {
    COMPLETIONS_FIRST = 64,            /* made at start */
    COMPLETIONS_MAX = 16 * EVENTS_MAX, /* each takes a little of the driver's memory */
};

/* An event of ours that other processes open. */
struct completion {
    uint32_t number;
    cudaEvent_t event;
    cudaIpcEventHandle_t handle;
    STAILQ_ENTRY(completion) link; /* device.idle */
};

_Static_assert(sizeof(cudaIpcMemHandle_t) == PROTO_HANDLE_MAX &&
                   sizeof(cudaIpcEventHandle_t) == PROTO_HANDLE_MAX,
               "handles travel whole");

/* Like cuda_error(), for calls of the driver. */
static int driver_error(struct device *d, CUresult rc, const char *what, char *why)
{
    const char *name = NULL;

    d->cu.p_cuGetErrorName(rc, &name);
    snprintf(why, PROTO_TEXT_MAX, "%s: %s", what, name ? name : "unknown error");
    if (cuda_is_lost(d, (int)rc, what))
        return SAGE_EDEVICE;
    return rc == CUDA_ERROR_OUT_OF_MEMORY ? SAGE_ENOMEM : SAGE_EHANDLE;
}

/* --- memory --- */

/* Is what was mapped there on this device? */
static int check_device(struct device *d, const void *memory, char *why)
{
    struct cudaPointerAttributes attributes;
    cudaError_t rc = cudaPointerGetAttributes(&attributes, memory);

    if (rc)
        return cuda_error(d, rc, SAGE_EHANDLE, "kind: the memory has no attributes", why);
    if (attributes.type == cudaMemoryTypeDevice && attributes.device == d->ordinal)
        return 0;
    snprintf(why, PROTO_TEXT_MAX, "kind: the memory is not on this daemon's device, %s", d->uuid);
    return SAGE_EHANDLE;
}

/* What was opened: on this device, and how much of it from here on? */
static int query_ipc(struct device *d, void *memory, uint64_t *size, char *why)
{
    CUdeviceptr start;
    size_t bytes;

    int status = check_device(d, memory, why);
    if (status)
        return status;
    CUresult rc = d->cu.p_cuMemGetAddressRange(&start, &bytes, (CUdeviceptr)memory);
    if (rc)
        return driver_error(d, rc, "handle: what it opens has no size", why);
    *size = start + bytes - (CUdeviceptr)memory;
    return 0;
}

/*
 * CUDA counts how often a process has opened the same memory and gives it the same address each
 * time (since 11.x), so nothing has to be counted here.
 */
static int map_ipc(struct device *d, const struct mapping *what, void **base, uint64_t *size,
                   char *why)
{
    cudaIpcMemHandle_t handle;
    void *memory = NULL;

    memcpy(&handle, what->handle, sizeof(handle));
    cudaError_t rc = cudaIpcOpenMemHandle(&memory, handle, cudaIpcMemLazyEnablePeerAccess);
    if (rc)
        return cuda_error(d, rc, SAGE_EHANDLE, "handle: cannot be opened on this device", why);
    int status = query_ipc(d, memory, size, why);
    if (!status) {
        *base = memory;
        return 0;
    }
    if (cudaIpcCloseMemHandle(memory))
        cudaGetLastError();
    return status;
}

/* All chunks, before anything is done for them: *total is their sum. */
static int check_chunks(const struct device *d, const struct mapping *what, uint64_t *total,
                        char *why)
{
    *total = 0;
    for (uint32_t i = 0; i < what->n; i++) {
        if (what->sizes[i] % d->granularity) {
            snprintf(why, PROTO_TEXT_MAX, "chunks: %llu bytes are no multiple of %zu",
                     (unsigned long long)what->sizes[i], d->granularity);
            return SAGE_EHANDLE;
        }
        *total += what->sizes[i];
    }
    return 0;
}

/* The mapping keeps the memory alive, not the handle. cuMemMap() refuses what is not there. */
static int map_chunk(struct device *d, CUdeviceptr at, int fd, uint64_t size, char *why)
{
    CUmemGenericAllocationHandle handle;

    CUresult rc = d->cu.p_cuMemImportFromShareableHandle(&handle, (void *)(uintptr_t)fd,
                                                         CU_MEM_HANDLE_TYPE_POSIX_FILE_DESCRIPTOR);
    if (rc)
        return driver_error(d, rc, "descriptor: no memory that was exported", why);
    rc = d->cu.p_cuMemMap(at, size, 0, handle, 0);
    int status = rc ? driver_error(d, rc, "chunks: cannot be mapped with this size", why) : 0;
    d->cu.p_cuMemRelease(handle);
    return status;
}

/* All are mapped: let the device reach them. */
static int open_chunks(struct device *d, const struct mapping *what, CUdeviceptr start,
                       uint64_t total, char *why)
{
    const CUmemAccessDesc access = {
        .location = {.type = CU_MEM_LOCATION_TYPE_DEVICE, .id = d->ordinal},
        .flags = CU_MEM_ACCESS_FLAGS_PROT_READWRITE,
    };
    int status = 0;

    CUresult rc = d->cu.p_cuMemSetAccess(start, total, &access, 1);
    if (rc)
        return driver_error(d, rc, "chunks: this daemon's device cannot reach them", why);
    for (uint32_t i = 0; !status && i < what->n; i++) {
        status = check_device(d, (const void *)start, why);
        start += what->sizes[i];
    }
    return status;
}

/* The first n chunks, and the addresses of all. */
static void unmap_chunks(struct device *d, const struct mapping *what, uint32_t n,
                         CUdeviceptr start, uint64_t total)
{
    CUresult rc = CUDA_SUCCESS;
    CUdeviceptr at = start;

    for (uint32_t i = 0; i < n; i++) {
        CUresult one = d->cu.p_cuMemUnmap(at, what->sizes[i]);
        rc = rc ? rc : one;
        at += what->sizes[i];
    }
    CUresult last = d->cu.p_cuMemAddressFree(start, total);
    rc = rc ? rc : last;
    if (rc && !cuda_is_lost(d, (int)rc, "cuMemUnmap"))
        log_error("unmap", "kind=vmm error=%d", (int)rc);
}

static int map_vmm(struct device *d, const struct mapping *what, void **base, uint64_t *size,
                   char *why)
{
    CUdeviceptr start, at;
    uint64_t total;
    uint32_t n;

    int status = check_chunks(d, what, &total, why);
    if (status)
        return status;
    CUresult rc = d->cu.p_cuMemAddressReserve(&start, total, 0, 0, 0);
    if (rc)
        return driver_error(d, rc, "chunks: no addresses for all of them", why);
    for (n = 0, at = start; n < what->n; n++) {
        status = map_chunk(d, at, what->fds[n], what->sizes[n], why);
        if (status)
            break;
        at += what->sizes[n];
    }
    if (!status)
        status = open_chunks(d, what, start, total, why);
    if (status) {
        unmap_chunks(d, what, n, start, total);
        return status;
    }
    *base = (void *)start;
    *size = total;
    return 0;
}

int share_map(struct device *d, const struct mapping *what, void **base, uint64_t *size, char *why)
{
    cudaError_t rc = cudaSetDevice(d->ordinal);

    if (rc)
        return cuda_error(d, rc, SAGE_EINTERNAL, "cudaSetDevice", why);
    return what->kind == BUFFER_VMM ? map_vmm(d, what, base, size, why)
                                    : map_ipc(d, what, base, size, why);
}

void share_unmap(struct device *d, const struct mapping *what, void *base, uint64_t size)
{
    cudaError_t rc = cudaSetDevice(d->ordinal);

    if (!rc && what->kind == BUFFER_VMM) {
        unmap_chunks(d, what, what->n, (CUdeviceptr)base, size);
        return;
    }
    if (!rc)
        rc = cudaIpcCloseMemHandle(base);
    if (rc && !cuda_is_lost(d, rc, "cudaIpcCloseMemHandle"))
        log_error("unmap", "kind=cuda_ipc error=%s", cudaGetErrorName(rc));
    cudaGetLastError();
}

/* --- pages of clients --- */

static int open_page(struct sage_page *page, struct sage_page **remote, const char **what)
{
    *what = "page: cudaHostRegister";
    cudaError_t rc = cudaHostRegister(page, sizeof(*page), cudaHostRegisterMapped);
    if (rc)
        return rc;
    *what = "page: cudaHostGetDevicePointer";
    rc = cudaHostGetDevicePointer((void **)remote, page, 0);
    if (rc)
        cudaHostUnregister(page);
    return rc;
}

/* Release a job in a page like a client's. */
static bool try_out(struct device *d, struct sage_page *page, struct sage_cuda_stamp *stamp)
{
    struct sage_page_lane *lane = &page->lane[0];
    struct sage_page *remote;
    const char *what;

    if (open_page(page, &remote, &what))
        return false;
    page_store(&lane->status[1], 1);
    *stamp = (struct sage_cuda_stamp){
        .number = 1, .status = &remote->lane[0].status[1], .release = &remote->lane[0].release[1]};
    int rc = sage_cuda_stamp_end(stamp, d->code, d->probe);
    if (!rc)
        rc = cudaStreamSynchronize(d->probe);
    cudaHostUnregister(page);
    return !rc && page_load(&lane->release[1]) == 1 && page_load(&lane->status[1]) == 0;
}

/* By real stores, since there is nothing to ask. */
static bool can_release(struct device *d)
{
    struct sage_cuda_stamp *stamp = NULL;
    int fd;
    struct sage_page *page = page_create(&fd);

    if (!page)
        return false;
    bool can = !cudaHostAlloc((void **)&stamp, sizeof(*stamp), cudaHostAllocMapped) &&
               try_out(d, page, stamp);
    cudaFreeHost(stamp);
    cudaGetLastError();
    page_unmap(page);
    close(fd);
    return can;
}

/*
 * The hardware looks at a word that a stream waits for about every 8 us, or at once when a stream
 * of any process has stored a word itself: what kernels store it is not told of. So behind the
 * kernel that stores a release comes a store that nobody reads. See docs/decisions.md.
 */
void share_ring(struct device *d, cudaStream_t stream)
{
    if (d->bell)
        d->cu.p_cuStreamWriteValue32(stream, (CUdeviceptr)d->bell, 0, 0);
}

/* Without MPS the waiting stream is not on the device, so there is nobody to be told. */
static void bell_open(struct device *d)
{
    if (!d->mps || !d->releases)
        return;
    int rc = cudaMalloc((void **)&d->bell, sizeof(*d->bell));
    if (!rc)
        rc = (int)d->cu.p_cuStreamWriteValue32(d->probe, (CUdeviceptr)d->bell, 0, 0);
    if (!rc)
        rc = cudaStreamSynchronize(d->probe);
    if (!rc)
        return;
    log_warning("bell", "error=%d reason=\"streams cannot store words, clients wait longer\"", rc);
    cudaFree(d->bell);
    cudaGetLastError();
    d->bell = NULL;
}

int share_page_open(struct device *d, struct sage_page *page, struct sage_page **remote, char *why)
{
    const char *what = "cudaSetDevice";

    *remote = NULL;
    if (!d->releases)
        return 0;
    int rc = cudaSetDevice(d->ordinal);
    if (!rc)
        rc = open_page(page, remote, &what);
    return rc ? cuda_error(d, (cudaError_t)rc, SAGE_EUNSUPPORTED, what, why) : 0;
}

void share_page_close(struct device *d, struct sage_page *page)
{
    cudaError_t rc = cudaSetDevice(d->ordinal);

    if (!rc)
        rc = cudaHostUnregister(page);
    if (rc && !cuda_is_lost(d, rc, "cudaHostUnregister"))
        log_error("page_close", "error=%s", cudaGetErrorName(rc));
    cudaGetLastError();
}

/* --- events of clients --- */

int share_event_open(struct device *d, const uint8_t handle[PROTO_HANDLE_MAX], void **event,
                     char *why)
{
    cudaIpcEventHandle_t ipc;
    cudaEvent_t opened;
    cudaError_t rc = cudaSetDevice(d->ordinal);

    memcpy(&ipc, handle, sizeof(ipc));
    if (!rc)
        rc = cudaIpcOpenEventHandle(&opened, ipc);
    if (!rc) {
        *event = opened;
        return 0;
    }
    int status = cuda_error(d, rc, SAGE_EHANDLE, "handle: event cannot be opened", why);
    if (status == SAGE_EHANDLE && rc == cudaErrorMapBufferObjectFailed)
        snprintf(why, PROTO_TEXT_MAX,
                 "handle: event cannot be opened (%s): CUDA shares events only between processes "
                 "of one user",
                 cudaGetErrorName(rc));
    return status;
}

void share_event_close(struct device *d, void *event)
{
    cudaError_t rc = cudaSetDevice(d->ordinal);

    if (!rc)
        rc = cudaEventDestroy((cudaEvent_t)event);
    if (rc && !cuda_is_lost(d, rc, "cudaEventDestroy"))
        log_error("event_close", "error=%s", cudaGetErrorName(rc));
    cudaGetLastError();
}

int share_event_done(struct device *d, void *event)
{
    cudaError_t rc = cudaEventQuery((cudaEvent_t)event);

    if (rc == cudaSuccess)
        return 1;
    cudaGetLastError(); /* cudaErrorNotReady too would stay for the next launch */
    if (rc == cudaErrorNotReady)
        return 0;
    return cuda_is_lost(d, rc, "cudaEventQuery") ? SAGE_EDEVICE : SAGE_EHANDLE;
}

/* --- events of ours --- */

static int completion_create(struct device *d, struct completion **completion)
{
    struct completion *c = calloc(1, sizeof(*c));
    cudaError_t rc = cudaErrorMemoryAllocation;

    if (!c)
        return rc;
    rc = cudaEventCreateWithFlags(&c->event, cudaEventDisableTiming | cudaEventInterprocess);
    if (rc)
        goto err_free;
    rc = cudaIpcGetEventHandle(&c->handle, c->event);
    if (rc)
        goto err_event;
    d->completions[d->n_completions++] = c;
    c->number = d->n_completions;
    *completion = c;
    return 0;

err_event:
    cudaEventDestroy(c->event);
err_free:
    cudaGetLastError();
    free(c);
    return rc;
}

/*
 * The one that was given back first, if it has passed; else a new one. NULL: there is none. One
 * behind a long job goes to the end, where it does not stand before those that have passed.
 */
static struct completion *completion_get(struct device *d)
{
    struct completion *c = STAILQ_FIRST(&d->idle);

    if (c) {
        STAILQ_REMOVE_HEAD(&d->idle, link);
        if (cudaEventQuery(c->event) == cudaSuccess)
            return c;
        cudaGetLastError();
        STAILQ_INSERT_TAIL(&d->idle, c, link);
    }
    if (d->n_completions == COMPLETIONS_MAX || completion_create(d, &c))
        return NULL;
    return c;
}

int share_event_record(struct device *d, cudaStream_t stream, uint32_t *number,
                       uint8_t handle[PROTO_HANDLE_MAX])
{
    struct completion *c = completion_get(d);
    char why[PROTO_TEXT_MAX] = "no event is left";

    if (!c)
        return SAGE_ENOMEM;
    cudaError_t rc = cudaEventRecord(c->event, stream);
    if (rc) {
        STAILQ_INSERT_TAIL(&d->idle, c, link);
        return cuda_error(d, rc, SAGE_EINTERNAL, "cudaEventRecord", why);
    }
    *number = c->number;
    memcpy(handle, &c->handle, PROTO_HANDLE_MAX);
    return 0;
}

void share_event_put(struct device *d, uint32_t number)
{
    STAILQ_INSERT_TAIL(&d->idle, d->completions[number - 1], link);
}

/* --- with the device --- */

static int load_driver(struct device *d, char *why)
{
    static const struct {
        const char *name;
        size_t at;
    } entries[] = {
#define CUDA_DRIVER_ENTRY(name, type) {#name, offsetof(struct cuda_driver, p_##name)},
        CUDA_DRIVER(CUDA_DRIVER_ENTRY)
#undef CUDA_DRIVER_ENTRY
    };

    for (size_t i = 0; i < sizeof(entries) / sizeof(entries[0]); i++) {
        enum cudaDriverEntryPointQueryResult found;
        void *entry = NULL;
        cudaError_t rc = cudaGetDriverEntryPointByVersion(entries[i].name, &entry, 12000,
                                                          cudaEnableDefault, &found);
        if (rc || found != cudaDriverEntryPointSuccess || !entry) {
            snprintf(why, PROTO_TEXT_MAX, "driver: %s of CUDA 12.0 is missing", entries[i].name);
            return SAGE_EUNSUPPORTED;
        }
        memcpy((char *)&d->cu + entries[i].at, &entry, sizeof(entry));
    }
    return 0;
}

int share_open(struct device *d, char *why)
{
    const CUmemAllocationProp prop = {
        .type = CU_MEM_ALLOCATION_TYPE_PINNED,
        .location = {.type = CU_MEM_LOCATION_TYPE_DEVICE, .id = d->ordinal},
        .requestedHandleTypes = CU_MEM_HANDLE_TYPE_POSIX_FILE_DESCRIPTOR,
    };
    struct completion *c;

    int status = load_driver(d, why);
    if (status)
        return status;
    CUresult rc = d->cu.p_cuMemGetAllocationGranularity(&d->granularity, &prop,
                                                        CU_MEM_ALLOC_GRANULARITY_MINIMUM);
    if (rc || !d->granularity)
        return driver_error(d, rc, "cuMemGetAllocationGranularity", why);
    d->releases = can_release(d);
    if (!d->releases)
        log_warning("release", "by=cpu reason=\"kernels cannot store words in clients' pages\"");
    bell_open(d);
    d->completions = calloc(COMPLETIONS_MAX, sizeof(d->completions[0]));
    if (!d->completions)
        return SAGE_ENOMEM;
    while (d->n_completions < COMPLETIONS_FIRST) {
        int error = completion_create(d, &c);
        if (error)
            return cuda_error(d, (cudaError_t)error, SAGE_EUNSUPPORTED, "interprocess events", why);
        STAILQ_INSERT_TAIL(&d->idle, c, link);
    }
    return 0;
}

void share_close(struct device *d)
{
    for (uint32_t i = 0; i < d->n_completions; i++) {
        cudaEventDestroy(d->completions[i]->event);
        free(d->completions[i]);
    }
    free(d->completions);
    if (d->bell)
        cudaFree(d->bell);
}
