/*
 * page.h - the session page: the words by which jobs are handed over and released.
 *
 * The client creates it (a memfd sealed against shrinking and growing), both sides map it. It holds
 * SAGE_LANES lanes; a lane is a queue of jobs that run in order, numbered 1, 2, 3, ... (mod 2^32).
 * Job n of a lane owns entry n % SAGE_ENTRIES of its three rings, so at most SAGE_ENTRIES - 1 are
 * in flight. All words are 32-bit, little endian, written whole. Byte for byte: docs/protocol.md.
 */
#ifndef SAGE_PAGE_H
#define SAGE_PAGE_H

#include <stdbool.h>
#include <stdint.h>

#define SAGE_PAGE_MAGIC 0x45474153u /* "SAGE" */

enum {
    SAGE_PAGE_LAYOUT = 1,
    SAGE_LANES = 64,
    SAGE_ENTRIES = 64,
};

struct sage_page_lane {
    uint32_t acquire[SAGE_ENTRIES]; /* client: = n when the inputs of job n are ready */
    uint32_t release[SAGE_ENTRIES]; /* daemon or its device: = n when job n is over; a futex */
    uint32_t status[SAGE_ENTRIES];  /* the same, before release: 0 or the number of a SAGE_E* */
    uint32_t reserved[SAGE_ENTRIES];
};

struct sage_page {
    uint32_t magic, layout, lanes, entries;
    uint32_t own[(4096 - 16) / 4]; /* the client's; no daemon looks at it */
    struct sage_page_lane lane[SAGE_LANES];
};

_Static_assert(sizeof(struct sage_page) == 4096 + SAGE_LANES * 1024, "docs/protocol.md says so");
_Static_assert(__BYTE_ORDER__ == __ORDER_LITTLE_ENDIAN__, "words of the page are little endian");

/* Has a ring's word reached job n? Numbers wrap, so compare by their distance. */
static inline bool page_reached(uint32_t word, uint32_t n)
{
    return (int32_t)(word - n) >= 0;
}

/* A word that the other side writes: everything before its write is seen after this. */
static inline uint32_t page_load(const uint32_t *word)
{
    return __atomic_load_n(word, __ATOMIC_ACQUIRE);
}

/* A word that the other side reads: everything before is seen by who sees the word. */
static inline void page_store(uint32_t *word, uint32_t value)
{
    __atomic_store_n(word, value, __ATOMIC_RELEASE);
}

/* Tell the job's client: first the status, then the release, then wake who sleeps on it. */
void page_release(struct sage_page_lane *lane, uint32_t n, int status);
/* Wake who sleeps on a release that a device has stored. */
void page_wake(struct sage_page_lane *lane, uint32_t n);

/*
 * Sleep until the word reaches n: a short spin, then a futex (the page is shared, so not a private
 * one). timeout_ns < 0: no limit. false: timed out.
 */
bool page_wait(const uint32_t *word, uint32_t n, int64_t timeout_ns);

/* Make a new page (client): a sealed memfd in *fd and its mapping; NULL with errno. */
struct sage_page *page_create(int *fd);
/* Map a page that somebody else made (daemon): checks size and seals; NULL with *why set. */
struct sage_page *page_map(int fd, const char **why);
void page_unmap(struct sage_page *page);

#endif
