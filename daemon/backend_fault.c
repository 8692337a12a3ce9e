/*
 * backend_fault.c - the CPU backend with faults on purpose, for tests: --backend=fault
 * --fault=delay_ms=N,fail=N,lose=N,hang=N. Every piece takes delay_ms longer; the Nth piece after
 * the warm-up fails, loses the device, or never ends.
 */
#include "daemon/backend_cpu.h"

#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <time.h>
#include <unistd.h>

enum { DELAY_MS, FAIL, LOSE, HANG, N_FAULTS };

/* One device a process; `pieces` is counted by all its streams. */
static unsigned long faults[N_FAULTS];
static unsigned long pieces;

static int run_faulty(struct sage_cpu *cpu, const struct piece *piece, void *workspace,
                      size_t bytes)
{
    if (!piece->lane && piece->number == 0) /* the warm-up has no client */
        return cpu_run_piece(cpu, piece, workspace, bytes);
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
    return cpu_run_piece(cpu, piece, workspace, bytes);
}

static int open_fault(struct device **device, const struct config *config, void (*notify)(void *),
                      void *arg, char *why)
{
    static char *const names[] = {"delay_ms", "fail", "lose", "hang", NULL};
    char text[CONFIG_STR_MAX], *rest = text, *value;

    memset(faults, 0, sizeof(faults));
    pieces = 0;
    strcpy(text, config->fault);
    while (*rest) {
        int fault = getsubopt(&rest, names, &value);
        if (fault < 0 || !value) {
            snprintf(
                why, PROTO_TEXT_MAX,
                "fault: '%.64s' is none of delay_ms=, fail=, lose=, hang=", value ? value : "");
            return SAGE_EINVAL;
        }
        faults[fault] = strtoul(value, NULL, 10);
    }
    return cpu_open(device, config, notify, arg, run_faulty);
}

const struct backend backend_fault = {.name = "fault", .open = open_fault, CPU_FUNCTIONS};
