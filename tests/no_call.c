/*
 * no_call.c - to be preloaded: calls of the CUDA driver that are named in $NO_CALL, separated by
 * commas, are not supported, for those who find them by cuGetProcAddress(), as libsageclient does.
 */
#include <dlfcn.h>
#include <stdint.h>
#include <stdlib.h>
#include <string.h>

enum { NOT_SUPPORTED = 801 }; /* CUDA_ERROR_NOT_SUPPORTED */

typedef int find_call(const char *name, void **call, int version, uint64_t flags, int *status);
typedef void *find_symbol(void *library, const char *name);

static find_call *find;

static int refuse(void)
{
    return NOT_SUPPORTED;
}

static int is_refused(const char *name)
{
    const size_t len = strlen(name);
    const char *at = getenv("NO_CALL");

    while (at && (strncmp(at, name, len) || (at[len] && at[len] != ','))) {
        at = strchr(at, ',');
        at = at ? at + 1 : NULL;
    }
    return at != NULL;
}

static int find_or_refuse(const char *name, void **call, int version, uint64_t flags, int *status)
{
    int rc = find(name, call, version, flags, status);

    if (!rc && is_refused(name))
        *(int (**)(void))call = refuse;
    return rc;
}

__attribute__((visibility("default"))) void *dlsym(void *library, const char *name);

void *dlsym(void *library, const char *name)
{
    static find_symbol *next;
    void *symbol;

    if (!next) /* of glibc since 2.34; of all */
        *(void **)&next = dlvsym(RTLD_NEXT, "dlsym", "GLIBC_2.34");
    if (!next)
        *(void **)&next = dlvsym(RTLD_NEXT, "dlsym", "GLIBC_2.2.5");
    symbol = next ? next(library, name) : NULL;
    if (symbol && !strcmp(name, "cuGetProcAddress_v2")) {
        *(void **)&find = symbol;
        *(find_call **)&symbol = find_or_refuse;
    }
    return symbol;
}
