/*
 * backend_cpu.h - what backend_fault takes from backend_cpu.
 */
#ifndef SAGE_BACKEND_CPU_H
#define SAGE_BACKEND_CPU_H

#include "daemon/backend.h"

/* Computes one piece on the stream's thread; returns its status. */
typedef int cpu_run(struct sage_cpu *cpu, const struct piece *piece, void *workspace, size_t bytes);

cpu_run cpu_run_piece;

int cpu_open(struct device **device, const struct config *config, void (*notify)(void *), void *arg,
             cpu_run *run);
void cpu_close(struct device *device);
void cpu_describe(struct device *device, char name[PROTO_NAME_MAX], char uuid[PROTO_NAME_MAX]);
void cpu_defaults(struct device *device, struct config *config);
int cpu_map(struct device *device, const struct mapping *what, void **base, uint64_t *size,
            char *why);
void cpu_unmap(struct device *device, const struct mapping *what, void *base, uint64_t size);
void *cpu_memory_get(struct device *device, size_t bytes);
void cpu_memory_put(struct device *device, void *memory);
int cpu_stream_open(struct device *device, size_t workspace, struct stream **stream, char *why);
void cpu_stream_close(struct stream *stream);
void cpu_start(struct stream *stream, struct piece *piece);

/* What there is of a struct backend, all but its name, open() and map(). */
#define CPU_FUNCTIONS                                                                              \
    .kinds = 1 << BUFFER_MEMFD, .modes = MODE_SYNC, .client_mode = "cpu", .close = cpu_close,      \
    .describe = cpu_describe, .defaults = cpu_defaults, .unmap = cpu_unmap,                        \
    .memory_get = cpu_memory_get, .memory_put = cpu_memory_put, .stream_open = cpu_stream_open,    \
    .stream_close = cpu_stream_close, .start = cpu_start, .workspace = sage_attn_workspace,        \
    .ns_per_op = 0.05, .ns_per_byte = 0.2, .ns_per_channel = 150

#endif
