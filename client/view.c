/*
 * view.c - the session page as the streams of a context see it: registered with CUDA there, and
 * tried out. In a mapping of its own for each context, since CUDA registers memory of a process
 * once.
 */
#include "client/client.h"

#include <errno.h>
#include <stdlib.h>
#include <string.h>
#include <sys/mman.h>

/* What a stream stores and waits for when it is tried out. */
enum { PROBE = 1 };

uint64_t view_word(const struct page_view *view, const struct sage_client *c, const uint32_t *word)
{
    return view->device + (uint64_t)((const char *)word - (const char *)c->page);
}

/* Store and wait for a word of our own, as jobs do, on a stream that nobody else uses. */
static int try_out(const struct driver *cu, uint64_t device, const uint32_t *word)
{
    struct CUstream_st *stream;
    int rc = driver_check(cu->cuStreamCreate(&stream, CU_STREAM_ASIDE), "cuStreamCreate");

    if (rc)
        return rc;
    rc = driver_tell_and_await(cu, stream, device, device, PROBE);
    int passed = cu->cuStreamSynchronize(stream);
    rc = rc ? rc : driver_check(passed, "cuStreamSynchronize");
    cu->cuStreamDestroy(stream);
    if (!rc && page_load(word) != PROBE)
        rc = error_set(SAGE_EUNSUPPORTED, "what a stream stores does not get there");
    return rc;
}

/* CUDA may still know its addresses, which must not become somebody else's: keep them then. */
static void unregister(const struct driver *cu, struct page_view *v)
{
    if (cu->cuMemHostUnregister(v->page) != CU_OK)
        v->page = NULL;
    v->device = 0;
}

/* The context is current. `word`: of the page's own ones, for this view alone. */
static int open_view(const struct driver *cu, struct sage_client *c, struct page_view *v,
                     uint32_t *word)
{
    void *page = mmap(NULL, sizeof(*c->page), PROT_READ | PROT_WRITE, MAP_SHARED, c->page_fd, 0);

    if (page == MAP_FAILED)
        return error_set(SAGE_ENOMEM, "session page: %s", strerror(errno));
    v->page = page;
    int rc = driver_check(cu->cuMemHostRegister(page, sizeof(*v->page), CU_HOST_MAPPED),
                          "cuMemHostRegister");
    if (rc)
        return rc;
    rc = driver_check(cu->cuMemHostGetDevicePointer(&v->device, page, 0),
                      "cuMemHostGetDevicePointer");
    if (!rc) {
        page_store(word, 0);
        rc = try_out(cu, view_word(v, c, word), word);
    }
    if (rc)
        unregister(cu, v);
    return rc;
}

static void free_view(struct page_view *v)
{
    if (v->page)
        munmap(v->page, sizeof(*v->page));
    free(v);
}

/* With `lock` held. */
static struct page_view *find(struct sage_client *c, const struct context *context)
{
    struct page_view *v = c->gpu.views;

    while (v && !context_is(&v->context, context))
        v = v->next;
    return v;
}

int view_get(struct gpu_job *job, const struct page_view **out)
{
    const uint32_t n_words = sizeof(job->client->page->own) / sizeof(job->client->page->own[0]);
    struct sage_client *c = job->client;

    pthread_mutex_lock(&c->lock);
    *out = find(c, &job->context);
    uint32_t word = *out ? 0 : c->gpu.n_views++ % n_words;
    pthread_mutex_unlock(&c->lock);
    if (*out)
        return 0;
    struct page_view *v = calloc(1, sizeof(*v));
    if (!v)
        return error_set(SAGE_ENOMEM, "out of memory");
    v->context = job->context;
    int rc = open_view(job->cu, c, v, &c->page->own[word]);
    if (rc == SAGE_EDEVICE || rc == SAGE_ENOMEM) { /* that says nothing of what can be done here */
        free_view(v);
        return rc;
    }
    if (rc)
        memcpy(v->why, error_text(), sizeof(v->why) - 1);
    pthread_mutex_lock(&c->lock);
    struct page_view *other = find(c, &job->context);
    if (!other) {
        v->next = c->gpu.views;
        c->gpu.views = v;
    }
    pthread_mutex_unlock(&c->lock);
    *out = other ? other : v;
    if (other && v->device)
        unregister(job->cu, v);
    if (other)
        free_view(v);
    return 0;
}

/*
 * Every job is released by now, so streams pass the page, but when? The stores and waits that they
 * have before them are past when the context has nothing more to do.
 */
void views_finish(struct sage_client *c, const struct driver *cu)
{
    struct CUctx_st *context;

    for (struct page_view *v = c->gpu.views; v; v = v->next) {
        if (!v->device || !driver_enter(cu, &v->context))
            continue;
        if (cu->cuCtxSynchronize() == CU_OK)
            unregister(cu, v);
        else
            v->page = NULL;
        cu->cuCtxPopCurrent(&context);
    }
}

void views_destroy(struct sage_client *c)
{
    for (struct page_view *v; (v = c->gpu.views);) {
        c->gpu.views = v->next;
        free_view(v);
    }
}
