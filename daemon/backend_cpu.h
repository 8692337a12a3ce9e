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
int cpu_map(struct device *device, uint32_t kind, int fd, void **base, uint64_t *size, char *why);
void cpu_unmap(struct device *device, void *base, uint64_t size);
int cpu_stream_open(struct device *device, size_t workspace, struct stream **stream, char *why);
void cpu_stream_close(struct stream *stream);
void cpu_start(struct stream *stream, struct piece *piece);

/* The functions above as members of a struct backend, all but open(). */
#define CPU_FUNCTIONS                                                                              \
    .close = cpu_close, .describe = cpu_describe, .map = cpu_map, .unmap = cpu_unmap,              \
    .stream_open = cpu_stream_open, .stream_close = cpu_stream_close, .start = cpu_start,          \
    .workspace = sage_attn_workspace, .ns_per_op = 0.05, .ns_per_byte = 0.2, .ns_per_channel = 150

#endif
