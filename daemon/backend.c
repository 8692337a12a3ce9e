/*
 * backend.c - choosing a backend.
 */
#include "daemon/backend.h"

#include <stdio.h>
#include <string.h>
#include <unistd.h>

#include "config.h"
#include "kernels/problem.h"

#ifdef HAVE_CUDA
#define BACKENDS "auto, cpu, cuda, fault"
static const struct backend *const backends[] = {&backend_cpu, &backend_cuda, &backend_fault};
#else
#define BACKENDS "auto, cpu, fault"
static const struct backend *const backends[] = {&backend_cpu, &backend_fault};
#endif

/* The CPU never stands in for a GPU in silence: only where there is no driver at all. */
static const char *automatic(char *why)
{
    if (access("/proc/driver/nvidia/version", F_OK) < 0)
        return "cpu";
#ifdef HAVE_CUDA
    (void)why;
    return "cuda";
#else
    snprintf(why, PROTO_TEXT_MAX,
             "backend: there is an NVIDIA driver, but this sageattnd was built without CUDA; say "
             "backend=cpu to compute on the CPU");
    return NULL;
#endif
}

const struct backend *backend_find(const char *name, char *why)
{
    if (!strcmp(name, "auto")) {
        name = automatic(why);
        if (!name)
            return NULL;
    }
    for (size_t i = 0; i < sizeof(backends) / sizeof(backends[0]); i++)
        if (!strcmp(name, backends[i]->name))
            return backends[i];
    snprintf(why, PROTO_TEXT_MAX, "backend: '%.64s' is none of " BACKENDS, name);
    return NULL;
}

void backend_kernel_name(const struct backend *backend, const struct sage_attn *attn,
                         char name[PROTO_NAME_MAX])
{
    int d = (int)attn->q.shape[3]; /* at most 256; for each job, so without printf() */
    char digits[] = {(char)('0' + d / 100), (char)('0' + d / 10 % 10), (char)('0' + d % 10), '\0'};

    name = stpcpy(stpcpy(name, backend->name), " ");
    name = stpcpy(stpcpy(name, sage_variant_name(sage_attn_variant(attn))), " ");
    name = stpcpy(stpcpy(name, sage_dtype_name(attn->q.dtype)), " d");
    strcpy(name, digits + (d < 10 ? 2 : d < 100 ? 1 : 0));
}
