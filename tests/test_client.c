/*
 * test_client.c - libsageclient against real daemons: what every call promises, several threads, a fork,
 * and daemons that stop, die, come back or throw us out.
 */
#include <errno.h>
#include <fcntl.h>
#include <math.h>
#include <pthread.h>
#include <setjmp.h>
#include <signal.h>
#include <stdarg.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/mman.h>
#include <sys/socket.h>
#include <sys/un.h>
#include <sys/wait.h>
#include <time.h>
#include <unistd.h>

#include <cmocka.h>

#include "tests/inputs.h"
#include "tests/private.h"

/* int8_fp16 on N(0,1) has a relL1 of about 0.01; anything not computed is 1 or NaN. */
#define ERROR_MAX 0.03
#define assert_computed(problem) assert_true(private_problem_error(problem) < ERROR_MAX)

static const char *const slow[] = {"--backend=fault", "--fault=delay_ms=30", NULL};

static double now(void)
{
    struct timespec t;

    clock_gettime(CLOCK_MONOTONIC, &t);
    return (double)t.tv_sec + (double)t.tv_nsec / 1e9;
}

static struct sage_lane *lane_of(struct sage_client *client)
{
    struct sage_lane *lane = NULL;

    assert_int_equal(sage_lane_create(client, &lane), 0);
    return lane;
}

/* --- a daemon for the tests that need nothing special --- */

static int setup(void **state)
{
    struct private_daemon *d = malloc(sizeof(*d));

    private_init(d);
    private_start(d, NULL);
    *state = d;
    return 0;
}

static int teardown(void **state)
{
    struct private_daemon *d = *state;

    assert_int_equal(private_stop(d, SIGTERM), 0);
    private_finish(d);
    free(d);
    return 0;
}

static void runs(void **state)
{
    struct sage_client *client = private_connect(*state, 0);
    struct private_problem p;
    struct sage_times times = {0};
    struct sage_server server;

    assert_int_equal(sage_server_info(client, &server), 0);
    assert_string_equal(server.backend, "cpu");
    private_problem_init(&p, client, 300, test_seed());
    assert_int_equal(sage_attn_run(client, &p.attn, &times), 0);
    assert_computed(&p);
    assert_true(times.run_ns > 0);
    private_problem_finish(&p);
    sage_disconnect(client);
}

static void refuses_what_is_wrong(void **state)
{
    struct sage_client *client = private_connect(*state, 0);
    struct sage_lane *lane = lane_of(client);
    struct private_problem p;
    struct sage_job job;
    uint16_t foreign[64];

    private_problem_init(&p, client, 16, 1);
    struct sage_attn bad = p.attn;
    bad.q.data = foreign;
    assert_int_equal(sage_attn_submit(lane, &bad, 0, &job), SAGE_EBUFFER);
    assert_non_null(strstr(sage_last_error(), "q"));
    bad = p.attn;
    bad.v.stride[2] *= 1000;
    assert_int_equal(sage_attn_submit(lane, &bad, 0, &job), SAGE_EBOUNDS);
    assert_non_null(strstr(sage_last_error(), "v"));
    bad = p.attn;
    bad.k.shape[3] = 32;
    assert_int_equal(sage_attn_submit(lane, &bad, 0, &job), SAGE_EINVAL);
    assert_non_null(strstr(sage_last_error(), "k.shape[3]"));
    bad = p.attn;
    bad.o = bad.q;
    assert_int_equal(sage_attn_submit(lane, &bad, 0, &job), SAGE_EINVAL);
    assert_non_null(strstr(sage_last_error(), "o"));
    /* and the next good one is none the worse for it */
    assert_int_equal(sage_attn_submit(lane, &p.attn, 0, &job), 0);
    assert_int_equal(sage_wait(job, 10000), 0);
    assert_computed(&p);
    private_problem_finish(&p);
    sage_disconnect(client);
}

static void buffers(void **state)
{
    struct sage_client *client = private_connect(*state, 0);
    struct sage_buffer *buffer;

    assert_int_equal(sage_buffer_alloc(client, 0, &buffer), SAGE_EINVAL);
    int fd = memfd_create("unsealed", MFD_CLOEXEC | MFD_ALLOW_SEALING);
    assert_int_equal(ftruncate(fd, 8192), 0);
    assert_int_equal(sage_buffer_import(client, fd, &buffer), SAGE_EHANDLE);
    assert_int_equal(fcntl(fd, F_ADD_SEALS, F_SEAL_SHRINK), 0);
    assert_int_equal(sage_buffer_import(client, fd, &buffer), 0);
    close(fd);
    assert_int_equal(sage_buffer_size(buffer), 8192);
    memset(sage_buffer_data(buffer), 1, 8192);
    assert_int_equal(sage_buffer_free(buffer), 0);
    int null = open("/dev/null", O_RDWR | O_CLOEXEC);
    assert_int_equal(sage_buffer_import(client, null, &buffer), SAGE_EHANDLE);
    close(null);
    sage_disconnect(client);
}

static void holds_and_cancels(void **state)
{
    struct sage_client *client = private_connect(*state, 0);
    struct sage_lane *lane = lane_of(client);
    struct private_problem p;
    struct sage_job held, next;

    private_problem_init(&p, client, 64, 2);
    assert_int_equal(sage_attn_submit(lane, &p.attn, SAGE_HELD, &held), 0);
    assert_int_equal(sage_attn_submit(lane, &p.attn, 0, &next), 0);
    assert_int_equal(sage_wait(next, 100), SAGE_ETIMEDOUT); /* its turn is after `held` */
    assert_true(isnan(private_problem_error(&p)));
    assert_int_equal(sage_ready(held), 0);
    assert_int_equal(sage_wait(next, 10000), 0);
    assert_int_equal(sage_wait(held, 0), 0);
    assert_computed(&p);

    assert_int_equal(sage_attn_submit(lane, &p.attn, SAGE_HELD, &held), 0);
    assert_int_equal(sage_attn_submit(lane, &p.attn, 0, &next), 0);
    assert_int_equal(sage_cancel(held), 0);
    assert_int_equal(sage_wait(held, 10000), SAGE_ECANCELED);
    assert_int_equal(sage_wait(next, 10000), 0);
    assert_int_equal(sage_cancel(next), SAGE_EBUSY);
    private_problem_finish(&p);
    sage_disconnect(client);
}

static void runs_out_of_entries(void **state)
{
    struct sage_client *client = private_connect(*state, 0);
    struct sage_lane *lane = lane_of(client);
    struct private_problem p;
    struct sage_job jobs[64];
    int n = 0;

    private_problem_init(&p, client, 16, 3);
    while (n < 64 && sage_attn_submit(lane, &p.attn, n ? 0 : SAGE_HELD, &jobs[n]) == 0)
        n++;
    assert_int_equal(n, 63);
    assert_int_equal(sage_attn_submit(lane, &p.attn, 0, &jobs[63]), SAGE_EBUSY);
    assert_int_equal(sage_ready(jobs[0]), 0);
    for (int i = 0; i < n; i++)
        assert_int_equal(sage_wait(jobs[i], 10000), 0);
    for (int i = 0; i < 1000; i++) { /* round the ring a few times */
        assert_int_equal(sage_attn_submit(lane, &p.attn, 0, &jobs[0]), 0);
        assert_int_equal(sage_wait(jobs[0], 10000), 0);
    }
    private_problem_finish(&p);
    sage_disconnect(client);
}

enum { THREADS = 8, PER_THREAD = 40 };

/* Half of the threads on a lane of their own, half through sage_attn_run(). Returns the failures. */
static void *work(void *arg)
{
    struct sage_client *client = arg;
    struct private_problem p;
    struct sage_lane *lane = NULL;
    intptr_t failures = 0;

    private_problem_init(&p, client, 100, (uint64_t)pthread_self());
    bool own = (uintptr_t)pthread_self() >> 12 & 1;
    if (own)
        failures += sage_lane_create(client, &lane) != 0;
    for (int i = 0; i < PER_THREAD; i++) {
        struct sage_job job;
        private_problem_poison(&p);
        if (!own)
            failures += sage_attn_run(client, &p.attn, NULL) != 0;
        else
            failures += sage_attn_submit(lane, &p.attn, 0, &job) || sage_wait(job, 20000);
        failures += !(private_problem_error(&p) < ERROR_MAX);
    }
    sage_lane_destroy(lane);
    private_problem_finish(&p);
    return (void *)failures;
}

static void serves_threads(void **state)
{
    struct sage_client *client = private_connect(*state, 0);
    pthread_t threads[THREADS];

    for (int i = 0; i < THREADS; i++)
        assert_int_equal(pthread_create(&threads[i], NULL, work, client), 0);
    for (int i = 0; i < THREADS; i++) {
        void *failures;
        assert_int_equal(pthread_join(threads[i], &failures), 0);
        assert_null(failures);
    }
    sage_disconnect(client);
}

static int in_child(struct sage_client *client, struct sage_lane *lane, struct private_problem *p)
{
    struct sage_job job;
    struct sage_lane *other;

    if (sage_attn_submit(lane, &p->attn, 0, &job) != SAGE_EFORK ||
        sage_attn_run(client, &p->attn, NULL) != SAGE_EFORK ||
        sage_lane_create(client, &other) != SAGE_EFORK)
        return 1;
    sage_disconnect(client);
    return 0;
}

static void survives_a_fork(void **state)
{
    struct sage_client *client = private_connect(*state, 0);
    struct sage_lane *lane = lane_of(client);
    struct private_problem p;
    int status;

    private_problem_init(&p, client, 64, 4);
    pid_t child = fork();
    if (child == 0)
        _exit(in_child(client, lane, &p));
    assert_int_equal(waitpid(child, &status, 0), child);
    assert_true(WIFEXITED(status) && WEXITSTATUS(status) == 0);
    assert_int_equal(sage_attn_run(client, &p.attn, NULL), 0);
    assert_computed(&p);
    private_problem_finish(&p);
    sage_disconnect(client);
}

/* --- daemons that come and go --- */

static void explains_that_there_is_none(void **state)
{
    struct private_daemon d;
    struct sage_client *client = NULL;
    (void)state;

    private_init(&d);
    struct sage_connect_options options = {.socket = d.socket};
    assert_int_equal(sage_connect(&options, &client), SAGE_ENODAEMON);
    assert_non_null(strstr(sage_last_error(), "systemctl start sageattnd"));
    private_finish(&d);
}

enum { IN_FLIGHT = 12 };

/* Jobs queued and running on a slow daemon, on two lanes, each with a problem of its own. */
static void fill(struct sage_client *client, struct private_problem *p, struct sage_job *jobs)
{
    struct sage_lane *lanes[2] = {lane_of(client), lane_of(client)};

    for (int i = 0; i < IN_FLIGHT; i++)
        private_problem_init(&p[i], client, 50 + i, (uint64_t)i);
    for (int i = 0; i < IN_FLIGHT; i++)
        assert_int_equal(sage_attn_submit(lanes[i % 2], &p[i].attn, 0, &jobs[i]), 0);
}

static void finish_problems(struct private_problem *p)
{
    for (int i = 0; i < IN_FLIGHT; i++)
        private_problem_finish(&p[i]);
}

static void hands_jobs_to_the_next_daemon(int signal, int status)
{
    struct private_problem p[IN_FLIGHT];
    struct sage_job jobs[IN_FLIGHT];
    struct private_daemon d;

    private_init(&d);
    private_start(&d, slow);
    struct sage_client *client = private_connect(&d, 20000);
    fill(client, p, jobs);
    assert_int_equal(sage_wait(jobs[0], 10000), 0);
    assert_int_equal(private_stop(&d, signal), status);
    private_start(&d, slow);
    for (int i = 0; i < IN_FLIGHT; i++) {
        assert_int_equal(sage_wait(jobs[i], 20000), 0);
        assert_computed(&p[i]);
    }
    assert_int_equal(sage_attn_run(client, &p[0].attn, NULL), 0);
    finish_problems(p);
    sage_disconnect(client);
    private_finish(&d);
}

static void outlives_a_killed_daemon(void **state)
{
    (void)state;
    hands_jobs_to_the_next_daemon(SIGKILL, -SIGKILL);
}

static void outlives_a_drained_daemon(void **state)
{
    (void)state;
    hands_jobs_to_the_next_daemon(SIGTERM, 0);
}

static void outlives_a_lost_device(void **state)
{
    static const char *const lossy[] = {"--backend=fault", "--fault=delay_ms=30,lose=4", NULL};
    struct private_problem p[IN_FLIGHT];
    struct sage_job jobs[IN_FLIGHT];
    struct private_daemon d;
    (void)state;

    private_init(&d);
    private_start(&d, lossy);
    struct sage_client *client = private_connect(&d, 20000);
    fill(client, p, jobs);
    assert_int_equal(private_stop(&d, 0), 70); /* it ends by itself */
    private_start(&d, NULL);
    for (int i = 0; i < IN_FLIGHT; i++) {
        assert_int_equal(sage_wait(jobs[i], 20000), 0);
        assert_computed(&p[i]);
    }
    finish_problems(p);
    sage_disconnect(client);
    private_finish(&d);
}

static void keeps_held_jobs_for_the_next_daemon(void **state)
{
    struct private_problem p;
    struct private_daemon d;
    struct sage_job job;
    (void)state;

    private_init(&d);
    private_start(&d, NULL);
    struct sage_client *client = private_connect(&d, 20000);
    private_problem_init(&p, client, 64, 5);
    assert_int_equal(sage_attn_submit(lane_of(client), &p.attn, SAGE_HELD, &job), 0);
    assert_int_equal(private_stop(&d, SIGTERM), 0);
    private_start(&d, NULL);
    assert_int_equal(sage_ready(job), 0);
    assert_int_equal(sage_wait(job, 20000), 0);
    assert_computed(&p);
    private_problem_finish(&p);
    sage_disconnect(client);
    private_finish(&d);
}

static void gives_up_without_a_successor(void **state)
{
    struct private_problem p[IN_FLIGHT];
    struct sage_job jobs[IN_FLIGHT];
    struct private_daemon d;
    (void)state;

    private_init(&d);
    private_start(&d, slow);
    struct sage_client *client = private_connect(&d, 300);
    fill(client, p, jobs);
    private_stop(&d, SIGKILL);
    double start = now();
    assert_int_equal(sage_wait(jobs[IN_FLIGHT - 1], -1), SAGE_ELOST);
    assert_true(now() - start < 5);
    for (int i = 0; i < IN_FLIGHT; i++) {
        int rc = sage_wait(jobs[i], 1000);
        assert_true(rc == 0 || rc == SAGE_ELOST);
    }
    assert_int_equal(sage_attn_run(client, &p[0].attn, NULL), SAGE_ENODAEMON);
    private_start(&d, NULL); /* and is of use again when there is one */
    assert_int_equal(sage_attn_run(client, &p[0].attn, NULL), 0);
    assert_computed(&p[0]);
    finish_problems(p);
    sage_disconnect(client);
    private_finish(&d);
}

static void waits_for_a_stopped_daemon(void **state)
{
    struct private_problem p;
    struct private_daemon d;
    struct sage_job job;
    (void)state;

    private_init(&d);
    private_start(&d, NULL);
    struct sage_client *client = private_connect(&d, 0);
    private_problem_init(&p, client, 64, 6);
    kill(d.pid, SIGSTOP);
    assert_int_equal(sage_attn_submit(lane_of(client), &p.attn, 0, &job), 0);
    assert_int_equal(sage_wait(job, 300), SAGE_ETIMEDOUT);
    kill(d.pid, SIGCONT);
    assert_int_equal(sage_wait(job, 10000), 0);
    assert_computed(&p);
    private_problem_finish(&p);
    sage_disconnect(client);
    private_finish(&d);
}

/* The descriptor of this process that is connected to the daemon. */
static int connection_to(const char *socket)
{
    for (int fd = 3; fd < 256; fd++) {
        struct sockaddr_un peer = {0};
        socklen_t len = sizeof(peer);
        if (getpeername(fd, (struct sockaddr *)&peer, &len) == 0 && peer.sun_family == AF_UNIX &&
            !strcmp(peer.sun_path, socket))
            return fd;
    }
    fail_msg("no connection to %s", socket);
    return -1;
}

static void is_thrown_out_for_garbage(void **state)
{
    struct private_problem p;
    struct private_daemon d;
    struct sage_job job;
    (void)state;

    private_init(&d);
    private_start(&d, NULL);
    struct sage_client *client = private_connect(&d, 10000);
    private_problem_init(&p, client, 64, 7);
    assert_int_equal(sage_attn_submit(lane_of(client), &p.attn, SAGE_HELD, &job), 0);
    assert_int_equal(send(connection_to(d.socket), "garbage", 7, MSG_NOSIGNAL), 7);
    assert_int_equal(sage_wait(job, 10000), SAGE_ELOST); /* the daemon lives: not submitted again */
    assert_int_equal(sage_attn_run(client, &p.attn, NULL), 0);
    assert_computed(&p);
    private_problem_finish(&p);
    sage_disconnect(client);
    private_finish(&d);
}

int main(void)
{
    const struct CMUnitTest with_daemon[] = {
        cmocka_unit_test(runs),
        cmocka_unit_test(refuses_what_is_wrong),
        cmocka_unit_test(buffers),
        cmocka_unit_test(holds_and_cancels),
        cmocka_unit_test(runs_out_of_entries),
        cmocka_unit_test(serves_threads),
        cmocka_unit_test(survives_a_fork),
    };
    const struct CMUnitTest without[] = {
        cmocka_unit_test(explains_that_there_is_none),
        cmocka_unit_test(outlives_a_killed_daemon),
        cmocka_unit_test(outlives_a_drained_daemon),
        cmocka_unit_test(outlives_a_lost_device),
        cmocka_unit_test(keeps_held_jobs_for_the_next_daemon),
        cmocka_unit_test(gives_up_without_a_successor),
        cmocka_unit_test(waits_for_a_stopped_daemon),
        cmocka_unit_test(is_thrown_out_for_garbage),
    };
    int failed = cmocka_run_group_tests_name("libsageclient", with_daemon, setup, teardown);

    return failed + cmocka_run_group_tests_name("daemons that come and go", without, NULL, NULL);
}
