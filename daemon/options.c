/*
 * options.c - options from defaults, an INI file (inih) and flags.
 */
#include "daemon/options.h"

#include <errno.h>
#include <ini.h>
#include <stddef.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <unistd.h>

#include "daemon/log.h"

enum { WHY_MAX = 256 };

enum type { STR, U64 };

struct option_info {
    const char *key, *help;
    enum type type;
    size_t offset;
};

static const struct option_info options[] = {
#define OPTION_INFO(type, key, value, help) {#key, help, type, offsetof(struct config, key)},
    CONFIG_OPTIONS(OPTION_INFO)
#undef OPTION_INFO
};
enum { N_OPTIONS = sizeof(options) / sizeof(options[0]) };

void config_init(struct config *config)
{
#define INIT_STR(key, value) snprintf(config->key, sizeof(config->key), "%s", value)
#define INIT_U64(key, value) config->key = value
#define OPTION_INIT(type, key, value, help) INIT_##type(key, value);
    CONFIG_OPTIONS(OPTION_INIT)
#undef OPTION_INIT
}

static bool parse_number(const char *text, uint64_t *value)
{
    static const char suffixes[] = "KMG";
    char *end;

    errno = 0;
    unsigned long long n = strtoull(text, &end, 10);
    if (errno || text[0] < '0' || text[0] > '9') /* strtoull() takes blanks and signs */
        return false;
    const char *suffix = *end ? strchr(suffixes, *end) : NULL;
    int shift = suffix ? 10 * (int)(suffix - suffixes + 1) : 0;
    if (end[suffix != NULL] != '\0' || n > UINT64_MAX >> shift)
        return false;
    *value = n << shift;
    return true;
}

bool config_set(struct config *config, const char *key, const char *value, char *why)
{
    for (size_t i = 0; i < N_OPTIONS; i++) {
        char *field = (char *)config + options[i].offset;
        if (strcmp(options[i].key, key))
            continue;
        if (options[i].type == U64) {
            if (parse_number(value, (uint64_t *)field))
                return true;
            snprintf(why, WHY_MAX, "%s: '%s' is no number", key, value);
            return false;
        }
        if (strlen(value) < CONFIG_STR_MAX) {
            strcpy(field, value);
            return true;
        }
        snprintf(why, WHY_MAX, "%s: over %d bytes", key, CONFIG_STR_MAX - 1);
        return false;
    }
    snprintf(why, WHY_MAX, "%s: no such option", key);
    return false;
}

struct reading {
    struct config *config;
    char *why;
    bool failed;
};

static int on_ini(void *user, const char *section, const char *key, const char *value)
{
    struct reading *r = user;

    if (r->failed)
        return 0;
    if (strcmp(section, "sageattnd")) {
        snprintf(r->why, WHY_MAX, "section [%s]: must be [sageattnd]", section);
        r->failed = true;
    } else if (!config_set(r->config, key, value, r->why)) {
        r->failed = true;
    }
    return !r->failed;
}

bool config_read(struct config *config, const char *path, char *why)
{
    struct reading r = {.config = config, .why = why};
    int line = ini_parse(path, on_ini, &r);

    if (line == 0)
        return true;
    if (line < 0) {
        snprintf(why, WHY_MAX, "%.150s: %s", path, strerror(errno));
        return false;
    }
    char inner[WHY_MAX];
    snprintf(inner, sizeof(inner), "%s", r.failed ? why : "not 'key = value'");
    snprintf(why, WHY_MAX, "%.100s:%d: %.140s", path, line, inner);
    return false;
}

static bool default_socket(struct config *config, char *why)
{
    const char *run = getenv("XDG_RUNTIME_DIR");

    if (config->socket[0])
        return true;
    if (geteuid() == 0) {
        strcpy(config->socket, "/run/sageattnd/sageattnd.sock");
        return true;
    }
    if (!run || strlen(run) > CONFIG_STR_MAX - 32) {
        snprintf(why, WHY_MAX, "socket: not set, and XDG_RUNTIME_DIR is not set either");
        return false;
    }
    snprintf(config->socket, sizeof(config->socket), "%s/sageattnd.sock", run);
    return true;
}

void config_memory(struct config *config)
{
    uint64_t memory = (uint64_t)sysconf(_SC_PHYS_PAGES) * (uint64_t)sysconf(_SC_PAGESIZE);

    /*
     * 64 MiB hold the INT8 K of 500,000 tokens of D = 128; a small machine gives 1/64 of its
     * memory.
     */
    if (!config->slot_bytes)
        config->slot_bytes = memory / 64 < 64 << 20 ? memory / 64 : 64 << 20;
    if (!config->client_bytes)
        config->client_bytes = memory / 2;
    if (!config->user_bytes)
        config->user_bytes = memory / 4 * 3;
}

bool config_finish(struct config *config, char *why)
{
    static const struct {
        const char *key;
        size_t offset;
        uint64_t low, high;
    } ranges[] = {
        {"slots", offsetof(struct config, slots), 1, 64},
        {"threads", offsetof(struct config, threads), 0, 1024},
        {"quantum_us", offsetof(struct config, quantum_us), 100, 10000000},
        {"max_clients", offsetof(struct config, max_clients), 1, 65536},
        {"user_clients", offsetof(struct config, user_clients), 1, 65536},
        {"client_jobs", offsetof(struct config, client_jobs), 1, 4032},
        {"client_buffers", offsetof(struct config, client_buffers), 1, 1 << 20},
        {"backlog_ms", offsetof(struct config, backlog_ms), 1, 3600000},
        {"user_jobs", offsetof(struct config, user_jobs), 1, UINT32_MAX},
        {"user_buffers", offsetof(struct config, user_buffers), 1, UINT32_MAX},
        {"max_priority", offsetof(struct config, max_priority), 0, 2},
        {"idle_exit", offsetof(struct config, idle_exit), 0, 366 * 86400},
    };

    for (size_t i = 0; i < sizeof(ranges) / sizeof(ranges[0]); i++) {
        uint64_t value = *(uint64_t *)((char *)config + ranges[i].offset);
        if (value >= ranges[i].low && value <= ranges[i].high)
            continue;
        snprintf(why, WHY_MAX, "%s: must be from %llu to %llu", ranges[i].key,
                 (unsigned long long)ranges[i].low, (unsigned long long)ranges[i].high);
        return false;
    }
    if (log_level_parse(config->log_level) < 0) {
        snprintf(why, WHY_MAX, "log_level: '%.64s' is none of err, warning, notice, info, debug",
                 config->log_level);
        return false;
    }
    if (!config->threads)
        config->threads = (uint64_t)sysconf(_SC_NPROCESSORS_ONLN);
    if (strcmp(config->backend, "auto") && strcmp(config->backend, "cuda"))
        config_memory(config);
    return default_socket(config, why);
}

void config_print(const struct config *config)
{
    puts("[sageattnd]");
#define PRINT_STR(key) printf("%s = %s\n", #key, config->key)
#define PRINT_U64(key) printf("%s = %llu\n", #key, (unsigned long long)config->key)
#define OPTION_PRINT(type, key, value, help) PRINT_##type(key);
    CONFIG_OPTIONS(OPTION_PRINT)
#undef OPTION_PRINT
}

void config_help(void)
{
    for (size_t i = 0; i < N_OPTIONS; i++) {
        char flag[64];
        int n = snprintf(flag, sizeof(flag), "--%s=%s", options[i].key,
                         options[i].type == U64 ? "N" : "TEXT");
        for (int c = 0; c < n; c++)
            if (flag[c] == '_')
                flag[c] = '-';
        printf("  %-22s %s\n", flag, options[i].help);
    }
}
