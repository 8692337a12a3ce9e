/*
 * page.c - making, checking and waiting on the session page.
 */
#include "proto/page.h"

#include <errno.h>
#include <fcntl.h>
#include <limits.h>
#include <linux/futex.h>
#include <sched.h>
#include <stddef.h>
#include <string.h>
#include <sys/mman.h>
#include <sys/stat.h>
#include <sys/syscall.h>
#include <time.h>
#include <unistd.h>

/*
 * How long to look before sleeping: about what being woken up on another core costs. Every look
 * lets others run, since on a busy machine it is this very core that the daemon is waiting for.
 */
enum { SPIN_NS = 100 * 1000 };

void page_release(struct sage_page_lane *lane, uint32_t n, int status)
{
    page_store(&lane->status[n % SAGE_ENTRIES], (uint32_t)-status);
    page_store(&lane->release[n % SAGE_ENTRIES], n);
    page_wake(lane, n);
}

void page_wake(struct sage_page_lane *lane, uint32_t n)
{
    syscall(SYS_futex, &lane->release[n % SAGE_ENTRIES], FUTEX_WAKE, INT_MAX, NULL, NULL, 0);
}

static int64_t now_ns(void)
{
    struct timespec t;

    clock_gettime(CLOCK_MONOTONIC, &t);
    return t.tv_sec * INT64_C(1000000000) + t.tv_nsec;
}

bool page_wait(const uint32_t *word, uint32_t n, int64_t timeout_ns)
{
    if (page_reached(page_load(word), n))
        return true;
    int64_t now = now_ns(), end = timeout_ns < 0 ? INT64_MAX : now + timeout_ns;
    int64_t spin_end = end - now > SPIN_NS ? now + SPIN_NS : end;

    for (;;) {
        uint32_t seen = page_load(word);
        if (page_reached(seen, n))
            return true;
        if (now < spin_end) {
            sched_yield();
        } else {
            struct timespec left = {(end - now) / 1000000000, (end - now) % 1000000000};
            if (now >= end)
                return false;
            syscall(SYS_futex, word, FUTEX_WAIT, seen, timeout_ns < 0 ? NULL : &left, NULL, 0);
        }
        now = now_ns();
    }
}

struct sage_page *page_create(int *fd)
{
    int new_fd = memfd_create("sageattn-page", MFD_CLOEXEC | MFD_ALLOW_SEALING);
    if (new_fd < 0)
        return NULL;
    struct sage_page *page = MAP_FAILED;
    if (ftruncate(new_fd, sizeof(*page)) == 0 &&
        fcntl(new_fd, F_ADD_SEALS, F_SEAL_SHRINK | F_SEAL_GROW | F_SEAL_SEAL) == 0)
        page = mmap(NULL, sizeof(*page), PROT_READ | PROT_WRITE, MAP_SHARED, new_fd, 0);
    if (page == MAP_FAILED) {
        int error = errno;
        close(new_fd);
        errno = error;
        return NULL;
    }
    page->magic = SAGE_PAGE_MAGIC;
    page->layout = SAGE_PAGE_LAYOUT;
    page->lanes = SAGE_LANES;
    page->entries = SAGE_ENTRIES;
    *fd = new_fd;
    return page;
}

struct sage_page *page_map(int fd, const char **why)
{
    struct stat st;
    int seals = fcntl(fd, F_GET_SEALS);

    if (seals < 0 || !(seals & F_SEAL_SHRINK)) {
        *why = "page: must be a memfd sealed against shrinking";
        return NULL;
    }
    if (fstat(fd, &st) < 0 || st.st_size != (off_t)sizeof(struct sage_page)) {
        *why = "page: wrong size";
        return NULL;
    }
    struct sage_page *page = mmap(NULL, sizeof(*page), PROT_READ | PROT_WRITE, MAP_SHARED, fd, 0);
    if (page == MAP_FAILED) {
        *why = "page: cannot be mapped for writing";
        return NULL;
    }
    if (page->magic != SAGE_PAGE_MAGIC || page->layout != SAGE_PAGE_LAYOUT ||
        page->lanes != SAGE_LANES || page->entries != SAGE_ENTRIES) {
        page_unmap(page);
        *why = "page: magic, layout, lanes or entries are not those of this version";
        return NULL;
    }
    return page;
}

void page_unmap(struct sage_page *page)
{
    if (page)
        munmap(page, sizeof(*page));
}
