/*
 * backend_fault.c - the CPU backend with faults on purpose, for tests: --backend=fault
 * --fault=delay_ms=N,fail=N,lose=N,hang=N,lose_map=N,lose_idle=N,lose_start=N,busy_map=N. Every
 * piece takes delay_ms longer; the Nth piece after the warm-up fails, loses the device, or never
 * ends. The device is lost by the Nth registration, by nothing N ms after the last piece of a
 * client, or by the Nth piece of the warm-up. There is no room for the first N registrations.
 */
#include "daemon/backend_cpu.h"

#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <time.h>
#include <unistd.h>

#include "daemon/daemon.h"

enum { DELAY_MS, FAIL, LOSE, HANG, LOSE_MAP, LOSE_IDLE, LOSE_START, BUSY_MAP, N_FAULTS };

/* One device a process; what is counted is so by all its streams, or threads of the pool. */
static unsigned long faults[N_FAULTS];
static unsigned long pieces, maps, warm_ups;
static uint64_t last_ns; /* a piece ended */

static int run_faulty(struct sage_cpu *cpu, const struct piece *piece, void *workspace,
                      size_t bytes)
{
    if (!piece->lane && piece->number == 0) /* the warm-up has no client */
        return ++warm_ups == faults[LOSE_START] ? SAGE_EDEVICE
                                                : cpu_run_piece(cpu, piece, workspace, bytes);
    unsigned long n = __atomic_add_fetch(&pieces, 1, __ATOMIC_RELAXED);
    if (faults[DELAY_MS]) {
        struct timespec delay = {(time_t)faults[DELAY_MS] / 1000,
                                 (long)(faults[DELAY_MS] % 1000) * 1000000};
        nanosleep(&delay, NULL);
    }
    if (n == faults[FAIL])
        return SAGE_EINTERNAL;
    if (n == faults[LOSE])
        return SAGE_EDEVICE;
    while (n == faults[HANG])
        pause();
    const int status = cpu_run_piece(cpu, piece, workspace, bytes);
    __atomic_store_n(&last_ns, daemon_now(), __ATOMIC_RELAXED);
    return status;
}

static int map_faulty(struct device *device, const struct mapping *what, void **base,
                      uint64_t *size, char *why)
{
    unsigned long n = __atomic_add_fetch(&maps, 1, __ATOMIC_RELAXED);

    if (n <= faults[BUSY_MAP]) {
        snprintf(why, PROTO_TEXT_MAX, "fault: busy_map=%lu", faults[BUSY_MAP]);
        return SAGE_EBUSY;
    }
    if (n != faults[LOSE_MAP])
        return cpu_map(device, what, base, size, why);
    snprintf(why, PROTO_TEXT_MAX, "fault: lose_map=%lu", faults[LOSE_MAP]);
    return SAGE_EDEVICE;
}

static bool is_lost(struct device *device, char *why)
{
    (void)device;
    const uint64_t last = __atomic_load_n(&last_ns, __ATOMIC_RELAXED);

    if (!faults[LOSE_IDLE] || !last || daemon_now() - last < faults[LOSE_IDLE] * 1000000)
        return false;
    snprintf(why, PROTO_TEXT_MAX, "fault: lose_idle=%lu", faults[LOSE_IDLE]);
    return true;
}

static int open_fault(struct device **device, const struct config *config, void (*notify)(void *),
                      void *arg, char *why)
{
    static char *const names[] = {"delay_ms",  "fail",       "lose",     "hang", "lose_map",
                                  "lose_idle", "lose_start", "busy_map", NULL};
    char text[CONFIG_STR_MAX], *rest = text, *value;

    memset(faults, 0, sizeof(faults));
    pieces = maps = warm_ups = 0;
    last_ns = 0;
    strcpy(text, config->fault);
    while (*rest) {
        int fault = getsubopt(&rest, names, &value);
        if (fault < 0 || !value) {
            snprintf(why, PROTO_TEXT_MAX,
                     "fault: '%.64s' is none of delay_ms=, fail=, lose=, hang=, lose_map=, "
                     "lose_idle=, lose_start=, busy_map=",
                     value ? value : "");
            return SAGE_EINVAL;
        }
        faults[fault] = strtoul(value, NULL, 10);
    }
    return cpu_open(device, config, notify, arg, run_faulty);
}

const struct backend backend_fault = {
    .name = "fault", .open = open_fault, .map = map_faulty, .is_lost = is_lost, CPU_FUNCTIONS};
