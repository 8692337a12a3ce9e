/*
 * npy.c - numpy's files (numpy.lib.format): magic, version, length of the header, a Python dict as
 * text, data.
 */
#include "npy.h"

#include <stdio.h>
#include <stdlib.h>
#include <string.h>

/* Four dimensions out of the header's dict; false where it describes no C-order halves. */
static bool parse(const char *header, int64_t shape[4])
{
    const char *order = strstr(header, "'fortran_order': False");
    const char *at = strstr(header, "'shape': (");
    long long n[4];

    if (!strstr(header, "'descr': '<f2'") || !order || !at)
        return false;
    if (sscanf(at, "'shape': (%lld, %lld, %lld, %lld)", &n[0], &n[1], &n[2], &n[3]) != 4)
        return false;
    for (int i = 0; i < 4; i++) {
        if (n[i] < 1 || n[i] > 1 << 20)
            return false;
        shape[i] = n[i];
    }
    return true;
}

/* 1.0: two bytes of version after the magic, then the header's length in two bytes. */
static bool read_header(FILE *file, int64_t shape[4])
{
    unsigned char start[10];
    char header[1024];

    if (fread(start, 1, sizeof start, file) != sizeof start ||
        memcmp(start, "\x93NUMPY\x01\x00", 8))
        return false;
    const size_t length = start[8] | (size_t)start[9] << 8;

    if (length >= sizeof header || fread(header, 1, length, file) != length)
        return false;
    header[length] = '\0';
    return parse(header, shape);
}

static bool load(FILE *file, struct sage_tensor *t)
{
    int64_t n = 1;

    *t = (struct sage_tensor){.dtype = SAGE_F16};
    if (!read_header(file, t->shape))
        return false;
    for (int i = 3; i >= 0; i--) {
        t->stride[i] = n;
        if (__builtin_mul_overflow(n, t->shape[i], &n) || n > 1 << 28)
            return false;
    }
    t->data = malloc((size_t)n * 2);
    if (t->data && fread(t->data, 2, (size_t)n, file) == (size_t)n && fgetc(file) == EOF)
        return true;
    free(t->data);
    t->data = NULL;
    return false;
}

bool npy_load(const char *path, struct sage_tensor *t)
{
    FILE *file = fopen(path, "rb");
    bool ok = false;

    if (file) {
        ok = load(file, t);
        fclose(file);
    }
    if (!ok)
        fprintf(stderr, "%s: %s\n", path,
                file ? "no C-order <f2 array of four dimensions" : "missing");
    return ok;
}
