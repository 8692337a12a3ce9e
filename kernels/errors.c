/*
 * errors.c - the names and texts of statuses, expanded from SAGE_ERRORS.
 */
#include "sageattn.h"

struct error {
    const char *name, *text;
    bool retry;
};

#define ERROR_ROW(name, number, retry, text) [number] = {#name, text, retry},

/* Indexed by number, which is -status. */
static const struct error errors[] = {[0] = {"SAGE_OK", "success", false}, SAGE_ERRORS(ERROR_ROW)};

static const struct error *find(int status)
{
    static const struct error unknown = {"SAGE_E?", "unknown status", false};
    const int n = (int)(sizeof errors / sizeof errors[0]);

    if (status > 0 || status <= -n || !errors[-status].name)
        return &unknown;
    return &errors[-status];
}

const char *sage_strerror(int status)
{
    return find(status)->text;
}

const char *sage_errname(int status)
{
    return find(status)->name;
}

bool sage_retryable(int status)
{
    return find(status)->retry;
}
