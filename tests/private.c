/*
 * private.c - a sageattnd of a test's own, and problems to give it.
 */
#include "tests/private.h"

#include <setjmp.h>
#include <signal.h>
#include <stdarg.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/prctl.h>
#include <sys/wait.h>
#include <unistd.h>

#include <cmocka.h>

#include "tests/inputs.h"
#include "tests/ref64.h"

enum { HEADS_Q = 2, DIM = 64, START_MS = 10000, FLAGS_MAX = 8 };

void private_init(struct private_daemon *d)
{
    *d = (struct private_daemon){.pid = -1};
    strcpy(d->directory, "/tmp/sageattnd-test-XXXXXX");
    assert_non_null(mkdtemp(d->directory));
    snprintf(d->socket, sizeof(d->socket), "%s/sock", d->directory);
}

static void run_daemon(const struct private_daemon *d, const char *const *flags)
{
    char program[512], flag[128];
    const char *argv[FLAGS_MAX + 5] = {program, flag, "--backend=cpu", "--log-level=err"};
    const char *build = getenv("SAGE_BUILDDIR");
    int n = 4;

    snprintf(program, sizeof(program), "%s/sageattnd", build ? build : ".");
    snprintf(flag, sizeof(flag), "--socket=%s", d->socket);
    for (int i = 0; flags && flags[i] && i < FLAGS_MAX; i++)
        argv[n++] = flags[i];
    prctl(PR_SET_PDEATHSIG, SIGKILL); /* a test that is killed leaves no daemon behind */
    execv(program, (char *const *)argv);
    _exit(127);
}

void private_start(struct private_daemon *d, const char *const *flags)
{
    struct sage_connect_options options = {.socket = d->socket, .name = "private", .retry_ms = -1};
    struct sage_client *client;

    d->pid = fork();
    assert_true(d->pid >= 0);
    if (d->pid == 0)
        run_daemon(d, flags);
    for (int ms = 0; ms < START_MS; ms += 20) {
        if (sage_connect(&options, &client) == 0) {
            sage_disconnect(client);
            return;
        }
        assert_int_equal(waitpid(d->pid, NULL, WNOHANG), 0);
        usleep(20000);
    }
    fail_msg("sageattnd does not answer: %s", sage_last_error());
}

int private_stop(struct private_daemon *d, int signal)
{
    int status = 0;

    if (d->pid < 0)
        return 0;
    kill(d->pid, signal);
    assert_int_equal(waitpid(d->pid, &status, 0), d->pid);
    d->pid = -1;
    return WIFEXITED(status) ? WEXITSTATUS(status) : -WTERMSIG(status);
}

void private_finish(struct private_daemon *d)
{
    char lock[128];

    private_stop(d, SIGKILL);
    unlink(d->socket);
    snprintf(lock, sizeof(lock), "%s.lock", d->socket);
    unlink(lock);
    rmdir(d->directory);
}

struct sage_client *private_connect(const struct private_daemon *d, int retry_ms)
{
    struct sage_connect_options options = {
        .socket = d->socket, .name = "test", .retry_ms = retry_ms};
    struct sage_client *client = NULL;

    if (sage_connect(&options, &client))
        fail_msg("sage_connect: %s", sage_last_error());
    return client;
}

static struct sage_tensor tensor(char *data, int heads, int n)
{
    return (struct sage_tensor){
        .dtype = SAGE_F16,
        .data = data,
        .shape = {1, heads, n, DIM},
        .stride = {(int64_t)heads * n * DIM, (int64_t)n * DIM, DIM, 1},
    };
}

void private_problem_init(struct private_problem *p, struct sage_client *client, int n,
                          uint64_t seed)
{
    size_t head = (size_t)n * DIM * sizeof(uint16_t);
    struct rng rng;

    *p = (struct private_problem){.attn = SAGE_ATTN_INIT};
    if (sage_buffer_alloc(client, head * (2 * HEADS_Q + 2), &p->buffer))
        fail_msg("sage_buffer_alloc: %s", sage_last_error());
    char *at = sage_buffer_data(p->buffer);
    p->attn.q = tensor(at, HEADS_Q, n);
    p->attn.o = tensor(at + HEADS_Q * head, HEADS_Q, n);
    p->attn.k = tensor(at + 2 * HEADS_Q * head, 1, n);
    p->attn.v = tensor(at + (2 * HEADS_Q + 1) * head, 1, n);
    p->attn.causal = true;
    rng_init(&rng, seed);
    for (int64_t i = 0; i < (int64_t)HEADS_Q * n * DIM; i++)
        put_half(p->attn.q.data, i, SAGE_F16, rng_normal(&rng));
    for (int64_t i = 0; i < (int64_t)n * DIM; i++) {
        put_half(p->attn.k.data, i, SAGE_F16, rng_normal(&rng));
        put_half(p->attn.v.data, i, SAGE_F16, rng_normal(&rng));
    }
    private_problem_poison(p);
}

void private_problem_finish(struct private_problem *p)
{
    sage_buffer_free(p->buffer);
}

void private_problem_poison(struct private_problem *p)
{
    memset(p->attn.o.data, 0xff, (size_t)(HEADS_Q * p->attn.o.shape[2] * DIM) * sizeof(uint16_t));
}

double private_problem_error(const struct private_problem *p)
{
    struct ref64_error e = {0};
    double o[DIM], r[DIM];

    for (int h = 0; h < HEADS_Q; h++) {
        for (int64_t i = 0; i < p->attn.q.shape[2]; i++) {
            ref64_row(&p->attn, 0, h, i, r);
            for (int c = 0; c < DIM; c++)
                o[c] = ref64_get(&p->attn.o, 0, h, i, c);
            ref64_compare(&e, o, r, DIM);
        }
    }
    return ref64_l1(&e);
}
