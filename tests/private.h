/*
 * private.h - a sageattnd of a test's own, and problems to give it.
 */
#ifndef SAGE_TESTS_PRIVATE_H
#define SAGE_TESTS_PRIVATE_H

#include <sys/types.h>

#include "sageclient.h"

struct private_daemon {
    char directory[64], socket[96];
    pid_t pid;
};

/* Make a directory for the socket; no daemon yet. */
void private_init(struct private_daemon *d);
/*
 * Start $SAGE_BUILDDIR/sageattnd there with further flags (NULL, or up to a NULL) until it answers.
 */
void private_start(struct private_daemon *d, const char *const *flags);
/* Send the signal and wait; the exit status, or minus the signal that ended it. */
int private_stop(struct private_daemon *d, int signal);
void private_finish(struct private_daemon *d);

/* Connect or fail the test. retry_ms as in sage_connect_options. */
struct sage_client *private_connect(const struct private_daemon *d, int retry_ms);

/* A random problem in a buffer of its own: 2 heads on 1, n tokens of 64 channels, causal. */
struct private_problem {
    struct sage_buffer *buffer;
    struct sage_attn attn;
};

void private_problem_init(struct private_problem *p, struct sage_client *client, int n,
                          uint64_t seed);
void private_problem_finish(struct private_problem *p);
/* Overwrite o, so that an old result is not taken for a new one. */
void private_problem_poison(struct private_problem *p);
/* relL1 of o against double precision; NaN where something was not written. */
double private_problem_error(const struct private_problem *p);

#endif
