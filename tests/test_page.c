/*
 * test_page.c - the session page: who may map what, numbers that wrap, waiting across processes.
 */
#include <errno.h>
#include <fcntl.h>
#include <setjmp.h>
#include <signal.h>
#include <stdarg.h>
#include <stdlib.h>
#include <string.h>
#include <sys/mman.h>
#include <sys/stat.h>
#include <sys/syscall.h>
#include <sys/time.h>
#include <sys/wait.h>
#include <time.h>
#include <unistd.h>

#include <cmocka.h>

#include "kernels/sageattn.h"
#include "proto/page.h"

enum { MS = 1000000 };

static int64_t now_ns(void)
{
    struct timespec t;

    clock_gettime(CLOCK_MONOTONIC, &t);
    return t.tv_sec * INT64_C(1000000000) + t.tv_nsec;
}

static void test_create(void **state)
{
    int fd;
    struct sage_page *page = page_create(&fd);
    struct stat st;
    const char *why = NULL;
    (void)state;

    assert_non_null(page);
    assert_int_equal(fstat(fd, &st), 0);
    assert_int_equal(st.st_size, 69632);
    assert_true(fcntl(fd, F_GETFD) & FD_CLOEXEC);
    assert_true(fcntl(fd, F_GET_SEALS) & F_SEAL_SHRINK);
    assert_int_equal(ftruncate(fd, 4096), -1);
    assert_int_equal(memcmp(page, "SAGE\1\0\0\0\100\0\0\0\100\0\0\0", 16), 0);
    for (size_t i = 16; i < sizeof(*page); i++)
        assert_int_equal(((char *)page)[i], 0);

    struct sage_page *other = page_map(fd, &why);
    assert_non_null(other);
    close(fd); /* both mappings stay */
    page_store(&page->lane[63].acquire[63], 77);
    assert_int_equal(page_load(&other->lane[63].acquire[63]), 77);
    page_unmap(page);
    page_unmap(other);
    page_unmap(NULL);
}

/* Where docs/protocol.md says the words are. */
static void test_layout(void **state)
{
    static struct sage_page page;
    char *base = (char *)&page;
    (void)state;

    assert_ptr_equal(&page.lane[0].acquire[0], base + 4096);
    assert_ptr_equal(&page.lane[5].acquire[7], base + 4096 + 1024 * 5 + 4 * 7);
    assert_ptr_equal(&page.lane[5].release[7], base + 4096 + 1024 * 5 + 256 + 4 * 7);
    assert_ptr_equal(&page.lane[5].status[7], base + 4096 + 1024 * 5 + 512 + 4 * 7);
}

static int make_memfd(off_t size, int seals, const void *header)
{
    int fd = memfd_create("test", MFD_CLOEXEC | MFD_ALLOW_SEALING);

    assert_true(fd >= 0);
    assert_int_equal(ftruncate(fd, size), 0);
    if (header)
        assert_int_equal(pwrite(fd, header, 16, 0), 16);
    assert_int_equal(fcntl(fd, F_ADD_SEALS, seals), 0);
    return fd;
}

static void assert_refused(int fd)
{
    const char *why = NULL;

    assert_null(page_map(fd, &why));
    assert_non_null(why);
    assert_int_equal(strncmp(why, "page: ", 6), 0);
    close(fd);
}

static void test_refusals(void **state)
{
    static const uint32_t good[4] = {SAGE_PAGE_MAGIC, 1, 64, 64};
    off_t size = sizeof(struct sage_page);
    int pipe_fds[2];
    const char *why;
    (void)state;

    assert_refused(make_memfd(size, 0, good));
    assert_refused(make_memfd(size, F_SEAL_GROW, good));
    assert_refused(make_memfd(size - 1, F_SEAL_SHRINK, good));
    assert_refused(make_memfd(size + 1, F_SEAL_SHRINK, good));
    assert_refused(make_memfd(0, F_SEAL_SHRINK, NULL));
    assert_refused(make_memfd(size, F_SEAL_SHRINK | F_SEAL_WRITE, good));
    assert_refused(make_memfd(size, F_SEAL_SHRINK, NULL));
    for (int i = 0; i < 4; i++) {
        uint32_t header[4];
        memcpy(header, good, sizeof(header));
        header[i]++;
        assert_refused(make_memfd(size, F_SEAL_SHRINK, header));
    }
    assert_refused(open("/dev/zero", O_RDWR | O_CLOEXEC));
    assert_int_equal(pipe(pipe_fds), 0);
    assert_refused(pipe_fds[0]);
    close(pipe_fds[1]);
    assert_null(page_map(-1, &why));

    int fd = make_memfd(size, F_SEAL_SHRINK, good);
    struct sage_page *page = page_map(fd, &why);
    assert_non_null(page);
    page_unmap(page);
    close(fd);
}

static void test_wrap(void **state)
{
    static struct sage_page_lane lane;
    (void)state;

    assert_true(page_reached(1, 1));
    assert_true(page_reached(2, 1));
    assert_false(page_reached(0, 1));
    assert_true(page_reached(0, UINT32_MAX));
    assert_true(page_reached(5, UINT32_MAX - 5));
    assert_false(page_reached(UINT32_MAX, 0));
    assert_false(page_reached(UINT32_MAX - 63, 0));
    assert_true(page_reached(INT32_MAX, 0));
    assert_false(page_reached(0x80000000u, 0));

    const uint32_t first = UINT32_MAX - 100;
    for (uint32_t i = 0; i < SAGE_ENTRIES; i++)
        lane.release[(first + i) % SAGE_ENTRIES] = first + i - SAGE_ENTRIES;
    for (uint32_t n = first; n != 100; n++) {
        assert_false(page_reached(page_load(&lane.release[n % SAGE_ENTRIES]), n));
        page_release(&lane, n, -(int)(n % 21));
        assert_true(page_reached(page_load(&lane.release[n % SAGE_ENTRIES]), n));
        assert_int_equal(lane.status[n % SAGE_ENTRIES], n % 21);
    }
}

static void test_timeout(void **state)
{
    uint32_t word = 5;
    int64_t start = now_ns();
    (void)state;

    assert_true(page_wait(&word, 5, 0));
    assert_true(page_wait(&word, 4, -1));
    assert_false(page_wait(&word, 6, 0));
    assert_false(page_wait(&word, 6, 30 * MS));
    int64_t took = now_ns() - start;
    assert_true(took >= 30 * MS);
    assert_true(took < 5000 * (int64_t)MS);
}

static void nothing(int number)
{
    (void)number;
}

/* A signal does not end the wait. */
static void test_signal(void **state)
{
    struct sigaction action = {.sa_handler = nothing}, old;
    struct itimerval every = {{0, 2000}, {0, 2000}}, never = {0};
    uint32_t word = 0;
    int64_t start = now_ns();
    (void)state;

    assert_int_equal(sigaction(SIGALRM, &action, &old), 0);
    setitimer(ITIMER_REAL, &every, NULL);
    bool reached = page_wait(&word, 1, 40 * MS);
    setitimer(ITIMER_REAL, &never, NULL);
    sigaction(SIGALRM, &old, NULL);
    assert_false(reached);
    assert_true(now_ns() - start >= 40 * MS);
}

/*
 * The child is the daemon: it releases every job when it is acquired; now and then it takes its
 * time.
 */
static void serve(int fd, uint32_t jobs)
{
    const char *why;
    struct sage_page *page = page_map(fd, &why);

    for (uint32_t n = 1; page && n <= jobs; n++) {
        if (!page_wait(&page->lane[2].acquire[n % SAGE_ENTRIES], n, 20000 * (int64_t)MS))
            _exit(1);
        if (n % 100 == 0)
            usleep(2000); /* long enough for the client to sleep */
        page_release(&page->lane[2], n, n % 3 ? 0 : -(int)(n % 20));
    }
    _exit(page ? 0 : 2);
}

static void test_two_processes(void **state)
{
    enum { JOBS = 1500 };
    int fd, status;
    struct sage_page *page = page_create(&fd);
    (void)state;

    pid_t child = fork();
    if (child == 0)
        serve(fd, JOBS);
    struct sage_page_lane *lane = &page->lane[2];
    for (uint32_t n = 1; n <= JOBS; n++) {
        page_store(&lane->acquire[n % SAGE_ENTRIES], n);
        syscall(SYS_futex, &lane->acquire[n % SAGE_ENTRIES], 1 /* FUTEX_WAKE */, 1, NULL, NULL, 0);
        assert_true(page_wait(&lane->release[n % SAGE_ENTRIES], n, 20000 * (int64_t)MS));
        assert_int_equal(lane->status[n % SAGE_ENTRIES], n % 3 ? 0 : n % 20);
    }
    assert_int_equal(waitpid(child, &status, 0), child);
    assert_int_equal(status, 0);
    page_unmap(page);
    close(fd);
}

/* Any number may wait for one release. */
static void test_many_waiters(void **state)
{
    enum { WAITERS = 5 };
    int fd, status;
    struct sage_page *page = page_create(&fd);
    pid_t children[WAITERS];
    (void)state;

    for (uint32_t n = 1; n <= 2; n++) {
        for (int i = 0; i < WAITERS; i++) {
            children[i] = fork();
            if (children[i] == 0)
                _exit(!page_wait(&page->lane[0].release[n], n, 20000 * (int64_t)MS));
        }
        usleep(20000);
        int64_t start = now_ns();
        if (n == 1) {
            page_release(&page->lane[0], n, 0);
        } else { /* a device has stored it, and the daemon sees that */
            page_store(&page->lane[0].release[n], n);
            page_wake(&page->lane[0], n);
        }
        for (int i = 0; i < WAITERS; i++) {
            assert_int_equal(waitpid(children[i], &status, 0), children[i]);
            assert_int_equal(status, 0);
        }
        assert_true(now_ns() - start < 10000 * (int64_t)MS);
    }
    page_unmap(page);
    close(fd);
}

int main(void)
{
    const struct CMUnitTest tests[] = {
        cmocka_unit_test(test_create),        cmocka_unit_test(test_layout),
        cmocka_unit_test(test_refusals),      cmocka_unit_test(test_wrap),
        cmocka_unit_test(test_timeout),       cmocka_unit_test(test_signal),
        cmocka_unit_test(test_two_processes), cmocka_unit_test(test_many_waiters),
    };
    return cmocka_run_group_tests(tests, NULL, NULL);
}
