/*
 * options.h - every option of the daemon, once: INI key, flag, default and help come from this
 * list.
 */
#ifndef SAGE_OPTIONS_H
#define SAGE_OPTIONS_H

#include <stdbool.h>
#include <stdint.h>

enum { CONFIG_STR_MAX = 256 };

/*
 * X(type, key, default, help). STR: text; U64: a number, with K, M or G behind it for powers of
 * 1024.
 */
#define CONFIG_OPTIONS(X)                                                                          \
    X(STR, socket, "",                                                                             \
      "path of the socket (default: /run/sageattnd/sageattnd.sock as root, "                       \
      "otherwise $XDG_RUNTIME_DIR/sageattnd.sock)")                                                \
    X(STR, group, "sageattnd", "group that may connect, if it exists (socket mode 0660)")          \
    X(STR, backend, "auto",                                                                        \
      "cpu, cuda, fault (for tests), or auto: cpu where there is no NVIDIA driver, cuda else")     \
    X(STR, gpu, "0", "GPU of backend=cuda: its number, as CUDA counts, or its UUID (GPU-...)")     \
    X(STR, fault, "", "faults of backend=fault, for tests: see sageattnd.conf(5)")                 \
    X(U64, threads, 0, "CPU threads for one job; 0: one for each processor")                       \
    X(U64, slots, 3, "slots: jobs, or pieces of jobs, that are in the device at once")             \
    X(U64, slot_bytes, 0, "workspace of one slot; 0: chosen from the memory there is")             \
    X(U64, quantum_us, 5000, "longer jobs run in pieces of about this many microseconds")          \
    X(U64, max_clients, 256, "connections in all")                                                 \
    X(U64, user_clients, 128, "connections of one user")                                           \
    X(U64, client_jobs, 256, "jobs in flight of one client")                                       \
    X(U64, client_buffers, 256, "buffers of one client")                                           \
    X(U64, user_jobs, 4096, "jobs in flight of one user")                                          \
    X(U64, user_buffers, 4096, "buffers of one user")                                              \
    X(U64, max_priority, 1,                                                                        \
      "highest priority for others than root and the daemon's user: "                              \
      "0 low, 1 normal, 2 high")                                                                   \
    X(U64, client_bytes, 0, "memory mapped for one client; 0: half of the device's")               \
    X(U64, user_bytes, 0, "memory mapped for one user; 0: three quarters of the device's")         \
    X(U64, backlog_ms, 5000, "drop a client that does not read its replies for so long")           \
    X(U64, idle_exit, 0, "seconds: exit when no client was connected for so long; 0: never")       \
    X(STR, log_level, "info", "err, warning, notice, info or debug")

#define CONFIG_TYPE_STR(key) char key[CONFIG_STR_MAX]
#define CONFIG_TYPE_U64(key) uint64_t key

struct config {
#define CONFIG_FIELD(type, key, value, help) CONFIG_TYPE_##type(key);
    CONFIG_OPTIONS(CONFIG_FIELD)
#undef CONFIG_FIELD
};

/* All defaults. */
void config_init(struct config *config);
/*
 * Set one option; false with a text in why[256] for an unknown key or a value that makes no sense.
 */
bool config_set(struct config *config, const char *key, const char *value, char *why);
/* Read an INI file, section [sageattnd]. */
bool config_read(struct config *config, const char *path, char *why);
/*
 * What the options leave open, from this machine; checks what can only be checked together. Sizes
 * stay 0 where the device has to be opened first: backend=auto and backend=cuda.
 */
bool config_finish(struct config *config, char *why);
/* slot_bytes, client_bytes and user_bytes that are 0, from the memory of this machine. */
void config_memory(struct config *config);
/* Print as an INI file that config_read() takes. */
void config_print(const struct config *config);
/* The flags, for --help. */
void config_help(void);

#endif
