/*
 * cuda_none.c - what a build without CUDA answers to who asks for a GPU.
 */
#include <stdio.h>

#include "sageattn.h"

static int refuse(char *why, size_t len)
{
    if (why)
        snprintf(why, len, "this libsageattn was built without CUDA");
    return SAGE_EUNSUPPORTED;
}

int sage_cuda_load(char *why, size_t len)
{
    return refuse(why, len);
}

size_t sage_attn_cuda_workspace(const struct sage_attn *attn, const struct sage_part *part)
{
    (void)attn, (void)part;
    return SIZE_MAX;
}

int sage_attn_cuda(const struct sage_attn *attn, const struct sage_part *part, void *workspace,
                   size_t bytes, struct CUstream_st *stream, char *why, size_t len)
{
    (void)attn, (void)part, (void)workspace, (void)bytes, (void)stream;
    return refuse(why, len);
}
