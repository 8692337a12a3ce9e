/*
 * ctl.h - what the commands of sagectl share.
 */
#ifndef SAGE_CTL_H
#define SAGE_CTL_H

#include <jansson.h>

#include "client/conn.h"

/* Exit codes; sagectl(1) lists them. */
enum {
    CTL_OK = 0,
    CTL_FAILED = 1,   /* no daemon, a refused request, a failed check */
    CTL_DRAINING = 2, /* health: there is a daemon, but it takes no new jobs */
    CTL_USAGE = 64,   /* EX_USAGE of sysexits.h */
};

struct ctl {
    char path[4096];
    struct conn conn;
    struct msg_welcome welcome;
};

/* argv[0] is the command's name. The result is the exit code. */
int ctl_stats(struct ctl *ctl, int argc, char **argv);
int ctl_clients(struct ctl *ctl, int argc, char **argv);
int ctl_top(struct ctl *ctl, int argc, char **argv);
int ctl_ping(struct ctl *ctl, int argc, char **argv);
int ctl_health(struct ctl *ctl, int argc, char **argv);
int ctl_doctor(struct ctl *ctl, int argc, char **argv);
int ctl_bench(struct ctl *ctl, int argc, char **argv);
int ctl_kernels(struct ctl *ctl, int argc, char **argv);
int ctl_drain(struct ctl *ctl, int argc, char **argv);
int ctl_version(struct ctl *ctl, int argc, char **argv);

/* --- sagectl.c --- */

/* Connect as a client without jobs; an earlier connection is closed. 0 or a SAGE_E*. */
int ctl_connect(struct ctl *ctl);
/* Print this thread's error text; CTL_FAILED. */
int ctl_fail(void);
/* Say how the command is called; CTL_USAGE. */
int ctl_usage(const char *command);
/* The option's argument as a number from min to max. */
bool ctl_number(const char *command, const char *text, double min, double max, double *number);
/* The same for one without a fraction. */
bool ctl_integer(const char *command, const char *text, int64_t min, int64_t max, int64_t *number);

/* Numbers for people; good until the end of the full expression. */
struct text {
    char s[32];
};
struct text text_ns(double ns);
struct text text_bytes(double bytes);
struct text text_tops(double ops, double ns);

/* Print a value in JSON and let go of it. */
void ctl_print_json(json_t *value, bool on_one_line);

/* --- ctl_stats.c --- */

/* All that the daemon tells of itself at one moment. */
struct sample {
    struct msg_stats stats;
    struct msg_client *clients; /* the caller's to free */
    size_t n_clients;
    int64_t taken_ns;
};

/* Connects first where there is no connection. 0 or a SAGE_E*; there are no clients then. */
int sample_take(struct ctl *ctl, struct sample *sample);
/* Seconds between two samples of the same daemon; otherwise 0. */
double sample_seconds(const struct sample *sample, const struct sample *before);

/* --- ctl_misc.c --- */

/* The times of `count` empty requests, in order of length. 0 or a SAGE_E*. */
int ctl_measure(struct ctl *ctl, double *ns, int count);

/* --- ctl_clients.c --- */

/* All clients of the daemon in the order of their ids; *list is the caller's to free. */
int clients_fetch(struct ctl *ctl, struct msg_client **list, size_t *n);
void clients_print(const struct msg_client *list, size_t n);
json_t *clients_json(const struct msg_client *list, size_t n);

#endif
