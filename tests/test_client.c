/*
 * test_client.c - libsageclient against real daemons: what every call promises, several threads, a
 * fork, and daemons that stop, die, come back or throw us out.
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
#include <sys/resource.h>
#include <sys/socket.h>
#include <sys/un.h>
#include <sys/wait.h>
#include <time.h>
#include <unistd.h>

#include <cmocka.h>

#include "client/client.h"
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
    bad.k.offset = 64; /* not dropped silently */
    assert_int_equal(sage_attn_submit(lane, &bad, 0, &job), SAGE_EINVAL);
    assert_non_null(strstr(sage_last_error(), "k.offset"));
    bad = p.attn;
    bad.o.buffer = 1;
    assert_int_equal(sage_attn_submit(lane, &bad, 0, &job), SAGE_EINVAL);
    assert_non_null(strstr(sage_last_error(), "o.buffer"));
    assert_int_equal(sage_attn_submit(lane, &p.attn, 4, &job), SAGE_EINVAL);
    assert_non_null(strstr(sage_last_error(), "flags"));
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
    assert_int_equal(sage_cancel(held), 0); /* it was, if not by this call */
    assert_int_equal(sage_cancel(next), SAGE_ESTARTED);
    assert_false(sage_retryable(SAGE_ESTARTED));
    private_problem_finish(&p);
    sage_disconnect(client);
}

static void assert_no_job(struct sage_job job)
{
    struct sage_times times;

    assert_int_equal(sage_wait(job, 0), SAGE_EINVAL);
    assert_int_equal(sage_ready(job), SAGE_EINVAL);
    assert_int_equal(sage_cancel(job), SAGE_EINVAL);
    assert_int_equal(sage_job_times(job, &times), SAGE_EINVAL);
}

static void knows_its_jobs(void **state)
{
    struct sage_client *client = private_connect(*state, 0);
    struct sage_lane *lane = lane_of(client);
    struct private_problem p;
    struct sage_job job = {lane, 1}, first;

    private_problem_init(&p, client, 16, 11);
    assert_no_job((struct sage_job){NULL, 1});
    assert_no_job((struct sage_job){lane, 0});
    assert_no_job((struct sage_job){lane, 1});
    assert_no_job((struct sage_job){lane, UINT32_MAX - 3});
    assert_int_equal(sage_attn_submit(lane, &p.attn, 0, &first), 0);
    assert_int_equal(sage_wait(first, 10000), 0);
    assert_no_job((struct sage_job){lane, first.number - 1});
    assert_no_job((struct sage_job){lane, first.number + 1});
    struct sage_attn bad = p.attn;
    bad.scale = -1;
    assert_int_equal(sage_attn_submit(lane, &bad, 0, &job), SAGE_EINVAL);
    assert_null(job.lane);
    assert_int_equal(job.number, 0);
    for (int i = 0; i < 64; i++) {
        assert_int_equal(sage_wait(first, 0), 0); /* 63 later ones do not matter */
        assert_int_equal(sage_attn_submit(lane, &p.attn, 0, &job), 0);
        assert_int_equal(sage_wait(job, 10000), 0);
    }
    assert_no_job(first);
    private_problem_finish(&p);
    sage_disconnect(client);
}

static void tells_times(void **state)
{
    struct sage_client *client = private_connect(*state, 0);
    struct sage_lane *lane = lane_of(client);
    struct private_problem p;
    struct sage_job jobs[4];
    struct sage_times times;

    private_problem_init(&p, client, 100, 12);
    for (int i = 0; i < 4; i++) /* asked for beforehand or not */
        assert_int_equal(sage_attn_submit(lane, &p.attn, i % 2 ? SAGE_TIMES : 0, &jobs[i]), 0);
    for (int i = 3; i >= 0; i--) {
        assert_int_equal(sage_job_times(jobs[i], &times), 0);
        assert_true(times.run_ns > 0);
        assert_int_equal(sage_wait(jobs[i], 0), 0); /* for then it is over */
    }
    assert_int_equal(sage_attn_submit(lane, &p.attn, SAGE_HELD | SAGE_TIMES, &jobs[0]), 0);
    assert_int_equal(sage_cancel(jobs[0]), 0);
    assert_int_equal(sage_job_times(jobs[0], &times), 0);
    assert_int_equal(times.run_ns, 0);
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

/*
 * A lane of a stream whose owner does not look at it between two jobs: the entry of one that failed
 * is used again, and sage_stream_error() would still tell of it.
 */
static void keeps_the_first_error_of_a_full_lane(void **state)
{
    struct sage_client *client = private_connect(*state, 0);
    struct private_problem p;
    struct sage_lane *lane;
    struct sage_job jobs[64];

    private_problem_init(&p, client, 16, 4);
    assert_int_equal(lane_take(client, 77, &lane), 0);
    for (int i = 0; i < 63; i++)
        assert_int_equal(sage_attn_submit(lane, &p.attn, i ? 0 : SAGE_HELD, &jobs[i]), 0);
    assert_int_equal(sage_cancel(jobs[0]), 0);
    assert_int_equal(sage_wait(jobs[62], 10000), 0);
    for (int i = 0; i < 2; i++) { /* the second has the entry of jobs[0] */
        assert_int_equal(sage_attn_submit(lane, &p.attn, 0, &jobs[63]), 0);
        assert_int_equal(sage_wait(jobs[63], 10000), 0);
    }
    assert_int_equal(jobs[63].number, jobs[0].number + SAGE_ENTRIES);
    pthread_mutex_lock(&client->lock);
    lane_look(lane, lane_tail(lane));
    pthread_mutex_unlock(&client->lock);
    assert_int_equal(lane->error, SAGE_ECANCELED);
    assert_int_equal(lane->error_number, jobs[0].number);
    lane_put(lane);
    private_problem_finish(&p);
    sage_disconnect(client);
}

static int stream_error(struct sage_client *client, uint64_t stream, char *text)
{
    pthread_mutex_lock(&client->lock);
    int status = lane_stream_error(client, stream, text);
    pthread_mutex_unlock(&client->lock);
    return status;
}

/* A stream whose lane goes to another is told of its job's error all the same, once. */
static void keeps_the_error_of_a_lost_lane(void **state)
{
    struct sage_client *client = private_connect(*state, 0);
    struct private_problem p;
    struct sage_lane *lane;
    struct sage_job job;
    char text[PROTO_TEXT_MAX];

    private_problem_init(&p, client, 16, 4);
    for (int i = 0; i < 2; i++) {
        assert_int_equal(lane_take(client, 77, &lane), 0);
        assert_int_equal(sage_attn_submit(lane, &p.attn, SAGE_HELD, &job), 0);
        assert_int_equal(sage_cancel(job), 0);
        assert_int_equal(sage_wait(job, 10000), SAGE_ECANCELED);
        page_store(&lane->words->acquire[job.number % SAGE_ENTRIES], job.number);
        lane_put(lane);
        for (uint64_t stream = 1000; i == 0 && stream < 1000 + SAGE_LANES; stream++) {
            assert_int_equal(lane_take(client, stream, &lane), 0);
            lane_put(lane);
        }
    }
    /* the first in a lane that another stream has, the second in one of its own */
    assert_int_equal(client->n_lost, 1);
    assert_int_equal(stream_error(client, 78, text), 0);
    assert_int_equal(stream_error(client, 77, text), SAGE_ECANCELED);
    assert_true(text[0] != 0);
    assert_int_equal(stream_error(client, 77, text), 0);
    private_problem_finish(&p);
    sage_disconnect(client);
}

/* What a call returned is not told again, what none did is, whichever of the jobs ended first. */
static void tells_what_no_call_returned(void **state)
{
    struct sage_client *client = private_connect(*state, 0);
    struct private_problem p;
    struct sage_lane *lane;
    struct sage_job jobs[2];
    char text[PROTO_TEXT_MAX];

    private_problem_init(&p, client, 16, 4);
    for (int returned = 0; returned < 2; returned++) {
        assert_int_equal(lane_take(client, 77, &lane), 0);
        for (int i = 0; i < 2; i++)
            assert_int_equal(sage_attn_submit(lane, &p.attn, SAGE_HELD, &jobs[i]), 0);
        for (int i = 1; i >= 0; i--) {
            assert_int_equal(sage_cancel(jobs[i]), 0);
            assert_int_equal(sage_wait(jobs[i], 10000), SAGE_ECANCELED);
            page_store(&lane->words->acquire[jobs[i].number % SAGE_ENTRIES], jobs[i].number);
            if (i == 1 || returned)
                lane_set_returned(jobs[i]);
        }
        lane_put(lane);
        assert_int_equal(stream_error(client, 77, text), returned ? 0 : SAGE_ECANCELED);
        assert_int_equal(stream_error(client, 77, text), 0);
    }
    private_problem_finish(&p);
    sage_disconnect(client);
}

/* A call waits for a credit as it does for its lane: without a limit, and for nothing else. */
static void waits_for_a_credit(void **state)
{
    enum { CREDITS = 256, EACH = 60 };
    struct sage_client *client = private_connect(*state, 0);
    struct sage_lane *lanes[CREDITS / EACH + 1], *last = lane_of(client);
    struct private_problem p;
    struct sage_job jobs[CREDITS], job;

    private_problem_init(&p, client, 16, 4);
    assert_int_equal(client->credits, CREDITS);
    for (int i = 0; i < CREDITS; i++) {
        if (i % EACH == 0)
            lanes[i / EACH] = lane_of(client);
        assert_int_equal(sage_attn_submit(lanes[i / EACH], &p.attn, SAGE_HELD, &jobs[i]), 0);
    }
    assert_int_equal(sage_attn_submit(last, &p.attn, 0, &job), SAGE_EBUSY);
    assert_true(lane_drained(last, SAGE_EBUSY));
    assert_false(lane_drained(last, SAGE_ENOMEM));
    assert_int_equal(sage_cancel(jobs[0]), 0);
    assert_int_equal(sage_wait(jobs[0], 10000), SAGE_ECANCELED);
    assert_false(lane_drained(last, SAGE_EBUSY));
    assert_int_equal(sage_attn_submit(last, &p.attn, 0, &job), 0);
    assert_int_equal(sage_wait(job, 10000), 0);
    for (size_t i = 0; i < sizeof(lanes) / sizeof(lanes[0]); i++)
        sage_lane_destroy(lanes[i]);
    sage_lane_destroy(last);
    private_problem_finish(&p);
    sage_disconnect(client);
}

enum { THREADS = 8, PER_THREAD = 40 };

/*
 * Half of the threads on a lane of their own, half through sage_attn_run(). Returns the failures.
 */
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

/* The child's files get the numbers that the client's descriptors had in the parent. */
static int fork_again(void)
{
    enum { FILES = 16 };
    int files[FILES], status;

    for (int i = 0; i < FILES; i++)
        files[i] = open("/dev/null", O_RDONLY | O_CLOEXEC);
    pid_t child = fork();
    if (child == 0) {
        for (int i = 0; i < FILES; i++)
            if (fcntl(files[i], F_GETFD) < 0)
                _exit(1);
        _exit(0);
    }
    return waitpid(child, &status, 0) == child && WIFEXITED(status) ? WEXITSTATUS(status) : 2;
}

static void is_zero_in_a_child(int (*run)(void))
{
    int status;

    pid_t child = fork();
    if (child == 0)
        _exit(run());
    assert_int_equal(waitpid(child, &status, 0), child);
    assert_true(WIFEXITED(status));
    assert_int_equal(WEXITSTATUS(status), 0);
}

static void leaves_a_grandchild_its_files(void **state)
{
    struct sage_client *client = private_connect(*state, 0);

    is_zero_in_a_child(fork_again);
    sage_disconnect(client);
}

/* --- descriptors --- */

static rlim_t soft_limit(rlim_t soft, rlim_t hard)
{
    setrlimit(RLIMIT_NOFILE, &(struct rlimit){soft, hard});
    struct rlimit limit = {0};
    getrlimit(RLIMIT_NOFILE, &limit);
    return limit.rlim_cur;
}

/* A number for the first of what is wrong. */
static int put_away(void)
{
    int fd = open("/dev/null", O_RDONLY), high = fcntl(fd, F_DUPFD, 40);

    if (soft_limit(64, 128) != 64 || client_put_away(&fd) || fd < 64)
        return 1;
    if (!(fcntl(fd, F_GETFD) & FD_CLOEXEC) || soft_limit(64, 128) != 64)
        return 2;
    int low = open("/dev/null", O_RDONLY), same = low;
    if (low >= 32 || soft_limit(64, 64) != 64 || client_put_away(&low) || low != same)
        return 3;
    if (!(fcntl(low, F_GETFD) & FD_CLOEXEC))
        return 4;
    if (high != 40 || client_put_away(&high) != SAGE_ENOMEM || fcntl(40, F_GETFD) >= 0)
        return 5;
    return high == -1 && strstr(sage_last_error(), "RLIMIT_NOFILE is 64") ? 0 : 6;
}

static void keeps_descriptors_out_of_the_way(void **state)
{
    (void)state;
    is_zero_in_a_child(put_away);
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

/* A daemon that is given jobs, and the one that comes after it. */
struct succession {
    struct private_daemon d;
    struct sage_client *client;
    struct private_problem p[IN_FLIGHT];
    struct sage_job jobs[IN_FLIGHT];
};

static void begin_succession(struct succession *s, const char *const *first, int retry_ms)
{
    private_init(&s->d);
    private_start(&s->d, first);
    s->client = private_connect(&s->d, retry_ms);
    fill(s->client, s->p, s->jobs);
}

/* The first one ends, by the signal or, 0, by itself. */
static void succeed(struct succession *s, int signal, int status, const char *const *next)
{
    assert_int_equal(private_stop(&s->d, signal), status);
    private_start(&s->d, next);
}

static void end_succession(struct succession *s)
{
    for (int i = 0; i < IN_FLIGHT; i++)
        private_problem_finish(&s->p[i]);
    sage_disconnect(s->client);
    private_finish(&s->d);
}

static void hands_jobs_to_the_next_daemon(int signal, int status, const char *const *next)
{
    struct succession s;

    begin_succession(&s, slow, 20000);
    assert_int_equal(sage_wait(s.jobs[0], 10000), 0);
    succeed(&s, signal, status, next);
    for (int i = 0; i < IN_FLIGHT; i++) {
        struct sage_times times;
        assert_int_equal(sage_wait(s.jobs[i], 20000), 0);
        assert_computed(&s.p[i]);
        int rc = sage_job_times(s.jobs[i], &times); /* the dead one may not have come to tell */
        assert_true(rc == 0 || rc == SAGE_ELOST);
        assert_int_equal(times.run_ns > 0, rc == 0);
    }
    assert_int_equal(sage_attn_run(s.client, &s.p[0].attn, NULL), 0);
    end_succession(&s);
}

static void outlives_a_killed_daemon(void **state)
{
    (void)state;
    hands_jobs_to_the_next_daemon(SIGKILL, -SIGKILL, slow);
}

/* Which has no room for its memory at first: others come back, too. */
static void outlives_a_daemon_whose_successor_is_busy(void **state)
{
    static const char *const busy[] = {"--backend=fault", "--fault=busy_map=5", NULL};
    (void)state;
    hands_jobs_to_the_next_daemon(SIGKILL, -SIGKILL, busy);
}

/* For good: the jobs that name what it refused are told so, in time, and others are computed. */
static void outlives_a_daemon_whose_successor_refuses(void **state)
{
    static const char *const full[] = {"--backend=fault", "--fault=busy_map=1000000", NULL};
    struct succession s;
    (void)state;

    begin_succession(&s, slow, 4000);
    succeed(&s, SIGKILL, -SIGKILL, full);
    for (int i = 0; i < IN_FLIGHT; i++) {
        int rc = sage_wait(s.jobs[i], 4000);
        if (rc != 0) /* not one that was done before */
            assert_int_equal(rc, SAGE_EBUFFER);
        else
            assert_computed(&s.p[i]);
    }
    assert_int_equal(sage_attn_run(s.client, &s.p[0].attn, NULL), SAGE_EBUFFER);
    assert_int_equal(private_stop(&s.d, SIGTERM), 0);
    end_succession(&s);
}

static void outlives_a_drained_daemon(void **state)
{
    (void)state;
    hands_jobs_to_the_next_daemon(SIGTERM, 0, slow);
}

static void outlives_a_lost_device(void **state)
{
    static const char *const lossy[] = {"--backend=fault", "--fault=delay_ms=30,lose=4", NULL};
    struct succession s;
    (void)state;

    begin_succession(&s, lossy, 20000);
    succeed(&s, 0, 70, NULL);
    for (int i = 0; i < IN_FLIGHT; i++) {
        assert_int_equal(sage_wait(s.jobs[i], 20000), 0);
        assert_computed(&s.p[i]);
    }
    end_succession(&s);
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
    struct succession s;
    (void)state;

    begin_succession(&s, slow, 300);
    private_stop(&s.d, SIGKILL);
    double start = now();
    assert_int_equal(sage_wait(s.jobs[IN_FLIGHT - 1], -1), SAGE_ELOST);
    assert_true(now() - start < 5);
    for (int i = 0; i < IN_FLIGHT; i++) {
        struct sage_times times;
        int rc = sage_wait(s.jobs[i], 1000);
        assert_true(rc == 0 || rc == SAGE_ELOST);
        if (rc)
            assert_int_equal(sage_job_times(s.jobs[i], &times), SAGE_ELOST);
    }
    assert_int_equal(sage_attn_run(s.client, &s.p[0].attn, NULL), SAGE_ENODAEMON);
    private_start(&s.d, NULL); /* and is of use again when there is one */
    assert_int_equal(sage_attn_run(s.client, &s.p[0].attn, NULL), 0);
    assert_computed(&s.p[0]);
    end_succession(&s);
}

/* As with a socket unit whose service does not get up: there is a socket, and nobody to accept. */
static void gives_up_in_time(void **state)
{
    struct sockaddr_un addr = {.sun_family = AF_UNIX};
    struct private_problem p;
    struct private_daemon d;
    struct sage_job job;
    (void)state;

    private_init(&d);
    private_start(&d, NULL);
    struct sage_client *client = private_connect(&d, 500);
    private_problem_init(&p, client, 64, 8);
    assert_int_equal(sage_attn_submit(lane_of(client), &p.attn, SAGE_HELD, &job), 0);
    int fd = socket(AF_UNIX, SOCK_SEQPACKET | SOCK_CLOEXEC, 0);
    strcpy(addr.sun_path, d.socket);
    assert_int_equal(unlink(d.socket), 0);
    assert_int_equal(bind(fd, (struct sockaddr *)&addr, sizeof(addr)), 0);
    assert_int_equal(listen(fd, 8), 0);
    private_stop(&d, SIGKILL);
    double start = now();
    assert_int_equal(sage_wait(job, -1), SAGE_ELOST);
    assert_true(now() - start > 0.4 && now() - start < 1.5);
    close(fd);
    private_problem_finish(&p);
    sage_disconnect(client);
    private_finish(&d);
}

static void *alloc(void *client)
{
    struct sage_buffer *buffer;
    intptr_t rc = sage_buffer_alloc(client, 4096, &buffer);

    return (void *)(rc ? rc : sage_buffer_free(buffer));
}

enum { STALLED_LANES = 64, STALLED_JOBS = STALLED_LANES * 63 };

/* Submit until the socket is full; the number of jobs. */
static int stuff(struct sage_lane **lanes, const struct private_problem *p, struct sage_job *jobs)
{
    for (int n = 0; n < STALLED_JOBS; n++) {
        const struct private_problem *own = &p[n / 63];
        double start = now();
        int rc = sage_attn_submit(lanes[n / 63], &own->attn, 0, &jobs[n]);
        assert_true(now() - start < 1);
        if (rc) {
            assert_int_equal(rc, SAGE_EBUSY);
            assert_non_null(strstr(sage_last_error(), "does not read its socket"));
            return n;
        }
    }
    fail_msg("%d jobs fit the socket", STALLED_JOBS);
    return 0;
}

static void never_blocks_on_a_stopped_daemon(void **state)
{
    static const char *const generous[] = {"--client-jobs=4032", NULL};
    static struct private_problem p[STALLED_LANES];
    static struct sage_job jobs[STALLED_JOBS];
    struct sage_lane *lanes[STALLED_LANES];
    struct private_daemon d;
    pthread_t thread;
    void *failed;
    (void)state;

    private_init(&d);
    private_start(&d, generous);
    struct sage_client *client = private_connect(&d, 0);
    for (int i = 0; i < STALLED_LANES; i++) {
        lanes[i] = lane_of(client);
        private_problem_init(&p[i], client, 1, (uint64_t)i);
    }
    kill(d.pid, SIGSTOP);
    int n = stuff(lanes, p, jobs);
    assert_true(n > 0);
    assert_int_equal(pthread_create(&thread, NULL, alloc, client), 0);
    usleep(50000); /* it waits for the daemon, and nobody has to wait for it */
    double start = now();
    assert_int_equal(sage_attn_submit(lanes[63], &p[63].attn, 0, &jobs[n]), SAGE_EBUSY);
    assert_true(now() - start < 1);
    kill(d.pid, SIGCONT);
    for (int i = 0; i < n; i++)
        assert_int_equal(sage_wait(jobs[i], 10000), 0);
    assert_int_equal(pthread_join(thread, &failed), 0);
    assert_null(failed);
    assert_int_equal(sage_attn_submit(lanes[63], &p[63].attn, 0, &jobs[n]), 0);
    assert_int_equal(sage_wait(jobs[n], 10000), 0);
    assert_computed(&p[63]);
    sage_disconnect(client); /* the buffers go with it */
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
    assert_non_null(strstr(sage_last_error(), "packet of 7 bytes")); /* what it said to us */
    assert_int_equal(sage_attn_run(client, &p.attn, NULL), 0);
    assert_computed(&p);
    private_problem_finish(&p);
    sage_disconnect(client);
    private_finish(&d);
}

static const char *const slower[] = {"--backend=fault", "--fault=delay_ms=1000", NULL};

/* Let a job start, then get the client thrown out. */
static struct sage_job start_and_be_thrown_out(struct sage_client *client,
                                               struct private_problem *p,
                                               const struct private_daemon *d)
{
    struct sage_job job;

    assert_int_equal(sage_attn_submit(lane_of(client), &p->attn, 0, &job), 0);
    usleep(300000);
    assert_int_equal(send(connection_to(d->socket), "garbage", 7, MSG_NOSIGNAL), 7);
    return job;
}

/* While the job runs the daemon takes the page of nobody. */
static void hears_that_its_jobs_still_run(void **state)
{
    struct sage_buffer *buffer = NULL;
    struct private_problem p;
    struct private_daemon d;
    (void)state;

    private_init(&d);
    private_start(&d, slower);
    struct sage_client *client = private_connect(&d, 50);
    private_problem_init(&p, client, 64, 9);
    struct sage_job job = start_and_be_thrown_out(client, &p, &d);
    assert_int_equal(sage_wait(job, 10000), SAGE_ELOST);
    assert_non_null(strstr(sage_last_error(), "packet of 7 bytes"));
    double start = now();
    assert_int_equal(sage_buffer_alloc(client, 4096, &buffer), SAGE_EBUSY);
    assert_non_null(strstr(sage_last_error(), "page"));
    assert_true(now() - start < 0.5);
    int rc;
    while ((rc = sage_buffer_alloc(client, 4096, &buffer)) == SAGE_EBUSY && now() - start < 10)
        usleep(10000);
    assert_int_equal(rc, 0);
    private_problem_finish(&p);
    sage_disconnect(client);
    private_finish(&d);
}

static void comes_back_when_its_jobs_are_over(void **state)
{
    struct sage_buffer *buffer = NULL;
    struct private_problem p;
    struct private_daemon d;
    struct sage_times times;
    (void)state;

    private_init(&d);
    private_start(&d, slower);
    struct sage_client *client = private_connect(&d, 10000);
    private_problem_init(&p, client, 64, 10);
    struct sage_job job = start_and_be_thrown_out(client, &p, &d);
    assert_int_equal(sage_buffer_alloc(client, 4096, &buffer), 0); /* by the next connection */
    assert_int_equal(sage_wait(job, 0), 0); /* it was running, and so it was finished */
    assert_computed(&p);
    assert_int_equal(sage_job_times(job, &times), SAGE_ELOST);
    private_problem_finish(&p);
    sage_disconnect(client);
    private_finish(&d);
}

/* --- what needs a GPU, where there is none --- */

static void has_no_streams_on_the_cpu(void **state)
{
    struct sage_client *client = private_connect(*state, 0);
    struct private_problem p;

    private_problem_init(&p, client, 16, 13);
    assert_int_equal(sage_attn_enqueue(client, &p.attn, NULL), SAGE_EUNSUPPORTED);
    assert_non_null(strstr(sage_last_error(), "CPU"));
    assert_int_equal(sage_client_mode(client), SAGE_MODE_SYNC);
    assert_int_equal(sage_stream_error(client, NULL), 0);
    assert_int_equal(sage_trim(client), 0);
    assert_int_equal(sage_attn_run(client, &p.attn, NULL), 0);
    private_problem_finish(&p);
    sage_disconnect(client);
}

/* A mode that is asked for may be one that another daemon has: it is refused when it is used. */
static void refuses_lanes_on_the_cpu(void **state)
{
    const struct private_daemon *d = *state;
    struct sage_connect_options options = {.socket = d->socket};
    struct private_problem p;

    for (int i = 0; i < 2; i++) {
        struct sage_client *client = NULL;
        options.mode = i ? SAGE_MODE_LANE : SAGE_MODE_AUTO;
        assert_int_equal(setenv("SAGE_MODE", i ? "event" : "lane", 1), 0);
        assert_int_equal(sage_connect(&options, &client), 0);
        unsetenv("SAGE_MODE");
        private_problem_init(&p, client, 16, 14);
        assert_int_equal(sage_attn_enqueue(client, &p.attn, NULL), SAGE_EUNSUPPORTED);
        assert_non_null(strstr(sage_last_error(), "CPU"));
        assert_int_equal(sage_client_mode(client), SAGE_MODE_SYNC);
        private_problem_finish(&p);
        sage_disconnect(client);
    }
}

static void takes_only_the_gpu_that_was_named(void **state)
{
    const struct private_daemon *d = *state;
    struct sage_connect_options options = {.socket = d->socket, .gpu = "GPU-0123"};
    struct sage_client *client = NULL;

    assert_int_equal(sage_connect(&options, &client), SAGE_ENODAEMON);
    assert_null(client);
    assert_non_null(strstr(sage_last_error(), "GPU-0123"));
    assert_non_null(strstr(sage_last_error(), d->socket));
}

static void refuses_variable(const struct private_daemon *d, const char *name, const char *value)
{
    struct sage_connect_options options = {.socket = d->socket};
    struct sage_client *client = NULL;

    assert_int_equal(setenv(name, value, 1), 0);
    assert_int_equal(sage_connect(&options, &client), SAGE_EINVAL);
    assert_non_null(strstr(sage_last_error(), name));
    unsetenv(name);
}

static void refuses_options_that_it_does_not_know(void **state)
{
    const struct private_daemon *d = *state;
    struct sage_connect_options options = {.socket = d->socket, .mode = 4};
    struct sage_client *client = NULL;

    assert_int_equal(sage_connect(&options, &client), SAGE_EINVAL);
    assert_non_null(strstr(sage_last_error(), "mode"));
    refuses_variable(d, "SAGE_MODE", "lanes");
    refuses_variable(d, "SAGE_STAGING", "yes");
    refuses_variable(d, "SAGE_CACHE_BYTES", "-1");
    refuses_variable(d, "SAGE_CACHE_BYTES", "12k");
    refuses_variable(d, "SAGE_CACHE_BYTES", "99999999999999999999");
}

/* --- the cache of registrations --- */

static struct cached *enter(struct cache *cache, uint64_t base, uint64_t size, uint64_t id,
                            uint32_t n)
{
    struct span spans[8];

    for (uint32_t i = 0; i < n; i++)
        spans[i] = (struct span){base + i * size, size, id + i, 0};
    struct cached *c = cached_create(spans, n);
    assert_non_null(c);
    cache_add(cache, c);
    c->ready = true;
    return c;
}

static struct cached *look_up(struct cache *cache, uint64_t base, uint64_t size, uint64_t id,
                              uint32_t n)
{
    struct span spans[8];

    for (uint32_t i = 0; i < n; i++)
        spans[i] = (struct span){base + i * size, size, id + i, 0};
    return cache_find(cache, spans, n);
}

static void empty(struct cache *cache)
{
    while (cache->first) {
        struct cached *c = cache->first;
        cache_remove(cache, c);
        free(c);
    }
    assert_int_equal(cache->bytes, 0);
}

static void knows_memory_by_its_id(void **state)
{
    struct cache cache = {0};
    (void)state;

    struct cached *a = enter(&cache, 0x1000, 0x1000, 1, 1);
    struct cached *chunks = enter(&cache, 0x10000, 0x1000, 10, 4);
    assert_int_equal(cache.bytes, 0x5000);
    assert_ptr_equal(look_up(&cache, 0x1000, 0x1000, 1, 1), a);
    assert_null(look_up(&cache, 0x2000, 0x1000, 2, 1)); /* a neighbour */
    assert_false(a->stale);
    assert_ptr_equal(look_up(&cache, 0x11000, 0x1000, 11, 2), chunks);
    assert_ptr_equal(look_up(&cache, 0x13000, 0x1000, 13, 1), chunks);
    assert_null(look_up(&cache, 0x13000, 0x1000, 13, 2)); /* reaches beyond it */
    assert_false(chunks->stale);

    assert_null(look_up(&cache, 0x1000, 0x1000, 3, 1)); /* freed and allocated again */
    assert_true(a->stale);
    assert_null(look_up(&cache, 0x1000, 0x1000, 1, 1));
    struct cached *b = enter(&cache, 0x1800, 0x1000, 4, 1);
    assert_true(cache_clashes(&cache, b));
    cache_remove(&cache, a);
    free(a);
    assert_false(cache_clashes(&cache, b));
    b->leaving = true; /* and so not to be had */
    assert_null(look_up(&cache, 0x1800, 0x1000, 4, 1));
    struct span other_block = {0x11000, 0x1000, 11, 1}; /* mapped anew at the same place */
    assert_null(cache_find(&cache, &other_block, 1));
    assert_true(chunks->stale);
    empty(&cache);
}

static void drops_what_was_used_longest_ago(void **state)
{
    struct cache cache = {0};
    struct sage_page *page = calloc(1, sizeof(*page));
    (void)state;

    assert_non_null(page);
    struct cached *a = enter(&cache, 0x1000, 0x1000, 1, 1);
    struct cached *b = enter(&cache, 0x2000, 0x1000, 2, 1);
    struct cached *c = enter(&cache, 0x3000, 0x1000, 3, 1);
    assert_null(cache_victim(&cache, page, 0x3000));
    assert_ptr_equal(cache_victim(&cache, page, 0x2fff), a);
    assert_ptr_equal(look_up(&cache, 0x1000, 0x1000, 1, 1), a);
    assert_ptr_equal(cache_victim(&cache, page, 0x2fff), b);
    b->pins = 1;
    assert_ptr_equal(cache_victim(&cache, page, 0x2fff), c);
    c->lanes = UINT64_C(1) << 63; /* a job of lane 63 is on its way, number 70 */
    c->last[63] = 70;
    page_store(&page->lane[63].release[70 % SAGE_ENTRIES], 70 - SAGE_ENTRIES);
    assert_ptr_equal(cache_victim(&cache, page, 0x2fff), a);
    page_store(&page->lane[63].release[70 % SAGE_ENTRIES], 70);
    assert_ptr_equal(cache_victim(&cache, page, 0x2fff), c);
    a->stale = true; /* goes first, and also where there is room */
    assert_ptr_equal(cache_victim(&cache, page, UINT64_MAX), a);
    a->ready = false;
    assert_null(cache_victim(&cache, page, UINT64_MAX));
    assert_ptr_equal(cache_after(&cache, a->serial), b);
    assert_null(cache_after(&cache, c->serial));
    empty(&cache);
    free(page);
}

static void finds_memory_by_its_address(void **state)
{
    struct cache cache = {0};
    (void)state;

    struct cached *a = enter(&cache, 0x1000, 0x1000, 1, 1);
    enter(&cache, 0x10000, 0x1000, 10, 4);
    assert_ptr_equal(cache_at(&cache, 0x1000, 0x1000), a);
    assert_ptr_equal(cache_at(&cache, 0x1fff, 1), a);
    assert_null(cache_at(&cache, 0xfff, 1));
    assert_null(cache_at(&cache, 0x1001, 0x1000)); /* reaches beyond it */
    assert_null(cache_at(&cache, 0x1001, UINT64_MAX));
    assert_null(cache_at(&cache, 0x2000, 1));
    assert_null(cache_at(&cache, 0x11000, 16)); /* of several chunks: each has to be asked about */
    struct cached *b = enter(&cache, 0x3000, 0x1000, 2, 1);
    assert_true(a->used < b->used);
    assert_ptr_equal(cache_at(&cache, 0x1000, 1), a);
    assert_true(a->used > b->used); /* so that it does not go next */
    a->stale = true;
    assert_null(cache_at(&cache, 0x1000, 1));
    b->leaving = true;
    assert_null(cache_at(&cache, 0x3000, 1));
    empty(&cache);
}

/* --- staging: what is copied where --- */

struct staging {
    const unsigned char *theirs;
    unsigned char *ours, *back;
    int boxes;
};

static int copy_box(void *arg, const struct stage_box *b)
{
    struct staging *s = arg;

    for (size_t z = 0; z < b->depth; z++)
        for (size_t y = 0; y < b->height; y++) {
            size_t at = b->offset + z * b->slice + y * b->row;
            size_t dense = b->dense_offset + z * b->dense_slice + y * b->dense_row;
            memcpy(s->ours + dense, s->theirs + at, b->width);
            memcpy(s->back + at, s->ours + dense, b->width);
        }
    assert_true(b->depth == 1 || (b->slice % b->row == 0 && b->dense_slice % b->dense_row == 0));
    s->boxes++;
    return 0;
}

/* The dense copy has the same elements, and copying back touches no other byte. */
static int stage(const struct sage_tensor *t, size_t bytes)
{
    struct stage_plan plan;
    unsigned char *theirs = malloc(bytes), *back = calloc(1, bytes), *seen = calloc(1, bytes);

    assert_true(stage_plan(t, &plan));
    unsigned char *ours = malloc(plan.bytes);
    for (size_t i = 0; i < bytes; i++)
        theirs[i] = (unsigned char)(1 + i * 37 % 255);
    struct staging s = {theirs, ours, back, 0};
    assert_int_equal(stage_boxes(&plan, copy_box, &s), 0);
    size_t count = 0;
    for (int64_t b = 0; b < t->shape[0]; b++)
        for (int64_t h = 0; h < t->shape[1]; h++)
            for (int64_t n = 0; n < t->shape[2]; n++)
                for (int64_t d = 0; d < t->shape[3]; d++, count++) {
                    int64_t at = b * t->stride[0] + h * t->stride[1] + n * t->stride[2] + d;
                    int64_t dense =
                        b * plan.stride[0] + h * plan.stride[1] + n * plan.stride[2] + d;
                    assert_true((size_t)dense * 2 < plan.bytes);
                    assert_memory_equal(ours + 2 * dense, theirs + 2 * at, 2);
                    memset(seen + 2 * at, 1, 2);
                }
    assert_int_equal(plan.bytes, 2 * count);
    for (size_t i = 0; i < bytes; i++)
        assert_int_equal(back[i], seen[i] ? theirs[i] : 0);
    free(theirs);
    free(back);
    free(seen);
    free(ours);
    return s.boxes;
}

static struct sage_tensor strided(int64_t b, int64_t h, int64_t n, int64_t d, int64_t sb,
                                  int64_t sh, int64_t sn)
{
    return (struct sage_tensor){
        .dtype = SAGE_F16, .shape = {b, h, n, d}, .stride = {sb, sh, sn, 1}};
}

static void stages_any_layout(void **state)
{
    struct stage_plan plan;
    struct sage_tensor t;
    (void)state;

    t = strided(2, 3, 5, 8, 120, 40, 8); /* dense: one copy */
    assert_int_equal(stage(&t, 480), 1);
    t = strided(2, 3, 5, 8, 120, 8, 24); /* tokens outside heads */
    assert_int_equal(stage(&t, 480), 1);
    t = strided(2, 3, 5, 8, 360, 8, 72); /* one third of a fused QKV */
    assert_int_equal(stage(&t, 1440), 1);
    t = strided(2, 3, 5, 8, 1000, 300, 50); /* holes everywhere */
    assert_int_equal(stage(&t, 4000), 2);
    t = strided(2, 3, 5, 8, 1000, 290, 50); /* slices no whole number of rows apart */
    assert_int_equal(stage(&t, 4000), 6);
    t = strided(1, 1, 1, 8, 0, 0, 0);
    assert_int_equal(stage(&t, 16), 1);
    t = strided(4, 3, 5, 1, 15, 5, 1); /* lse */
    assert_int_equal(stage(&t, 120), 1);
    t = strided(2, 3, 5, 8, 120, 0, 8); /* one head for three: its span is copied instead */
    assert_false(stage_plan(&t, &plan));
    t = strided(1, 1, 5, 8, 0, 0, 4);
    assert_false(stage_plan(&t, &plan));
}

int main(void)
{
    const struct CMUnitTest alone[] = {
        cmocka_unit_test(knows_memory_by_its_id),
        cmocka_unit_test(finds_memory_by_its_address),
        cmocka_unit_test(drops_what_was_used_longest_ago),
        cmocka_unit_test(stages_any_layout),
    };
    const struct CMUnitTest with_daemon[] = {
        cmocka_unit_test(runs),
        cmocka_unit_test(refuses_what_is_wrong),
        cmocka_unit_test(buffers),
        cmocka_unit_test(holds_and_cancels),
        cmocka_unit_test(knows_its_jobs),
        cmocka_unit_test(tells_times),
        cmocka_unit_test(runs_out_of_entries),
        cmocka_unit_test(keeps_the_first_error_of_a_full_lane),
        cmocka_unit_test(keeps_the_error_of_a_lost_lane),
        cmocka_unit_test(tells_what_no_call_returned),
        cmocka_unit_test(waits_for_a_credit),
        cmocka_unit_test(serves_threads),
        cmocka_unit_test(survives_a_fork),
        cmocka_unit_test(leaves_a_grandchild_its_files),
        cmocka_unit_test(keeps_descriptors_out_of_the_way),
        cmocka_unit_test(has_no_streams_on_the_cpu),
        cmocka_unit_test(refuses_lanes_on_the_cpu),
        cmocka_unit_test(takes_only_the_gpu_that_was_named),
        cmocka_unit_test(refuses_options_that_it_does_not_know),
    };
    const struct CMUnitTest without[] = {
        cmocka_unit_test(explains_that_there_is_none),
        cmocka_unit_test(outlives_a_killed_daemon),
        cmocka_unit_test(outlives_a_daemon_whose_successor_is_busy),
        cmocka_unit_test(outlives_a_daemon_whose_successor_refuses),
        cmocka_unit_test(outlives_a_drained_daemon),
        cmocka_unit_test(outlives_a_lost_device),
        cmocka_unit_test(keeps_held_jobs_for_the_next_daemon),
        cmocka_unit_test(gives_up_without_a_successor),
        cmocka_unit_test(gives_up_in_time),
        cmocka_unit_test(waits_for_a_stopped_daemon),
        cmocka_unit_test(never_blocks_on_a_stopped_daemon),
        cmocka_unit_test(is_thrown_out_for_garbage),
        cmocka_unit_test(hears_that_its_jobs_still_run),
        cmocka_unit_test(comes_back_when_its_jobs_are_over),
    };
    int failed = cmocka_run_group_tests_name("device memory", alone, NULL, NULL);

    failed += cmocka_run_group_tests_name("libsageclient", with_daemon, setup, teardown);
    return failed + cmocka_run_group_tests_name("daemons that come and go", without, NULL, NULL);
}
