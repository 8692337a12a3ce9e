/*
 * ctl_doctor.h - the checks of sagectl doctor, one after the other, and how they report.
 */
#ifndef SAGE_CTL_DOCTOR_H
#define SAGE_CTL_DOCTOR_H

#include "client/ctl.h"
#include "client/driver.h"

enum result { PASS, WARN, FAIL };

struct doctor {
    struct ctl *ctl;
    json_t *checks; /* NULL: print lines */
    bool failed;
};

/* The remedy is shown unless it passed. */
void report(struct doctor *d, enum result result, const char *check, const char *remedy,
            const char *format, ...) __attribute__((format(printf, 5, 6)));
/* A number to go with the last report, in JSON. */
void report_number(struct doctor *d, const char *key, double value);

/* --- ctl_doctor_gpu.c --- */

/* The daemon has none. */
void check_no_gpu(struct doctor *d);
/* The daemon's GPU: driver, MPS, whether it is there for this process, staging, memory. true: it
 * can be used, and is open. */
bool check_gpu(struct doctor *d, struct device *gpu);

/* --- ctl_doctor_jobs.c --- */

/* Namespaces, results, modes, hand-off. */
void check_jobs(struct doctor *d);

#endif
