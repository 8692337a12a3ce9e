/*
 * cache.h - which device memory is registered: what it is known by, who uses it, what goes first.
 * No driver and no I/O. Everything here is used under the client's `lock`.
 */
#ifndef SAGE_CACHE_H
#define SAGE_CACHE_H

#include "proto/page.h"

struct sage_buffer;

/*
 * A piece of device memory: an allocation, or a chunk that is mapped into a reservation. An address
 * that was freed and allocated again has other ids.
 */
struct span {
    uint64_t base, size;
    uint64_t id, block; /* CU_POINTER_ATTRIBUTE_BUFFER_ID and _MEMORY_BLOCK_ID */
};

/* Spans that follow each other without a gap, and are one buffer for the daemon. */
struct cached {
    struct cached *next;
    struct sage_buffer *buffer;
    uint64_t serial; /* of all there ever were */
    bool ready;      /* the daemon has it; before, others wait for the one who registers */
    bool stale;      /* its memory is gone: to be found no more, and to be dropped */
    bool leaving;    /* it is being unregistered */
    uint32_t pins;   /* calls that are about to submit a job with it */
    uint64_t used;   /* the cache's clock when it was found last */
    uint64_t lanes;  /* bit per lane: `last` is a job of it */
    uint32_t last[SAGE_LANES]; /* the last job of each lane that uses it */
    uint32_t n_spans;
    struct span spans[];
};

struct cache {
    struct cached *first;
    uint64_t bytes; /* registered */
    uint64_t clock, serial;
};

/* NULL: no memory. Free with free(), once it is in no cache. */
struct cached *cached_create(const struct span *spans, uint32_t n_spans);
uint64_t cached_base(const struct cached *cached);
uint64_t cached_bytes(const struct cached *cached);
/* Job n of the lane uses it; calls on one lane may come in any order. */
void cached_use(struct cached *cached, uint32_t lane, uint32_t n);
/* Does no call and no job use it? Forgets jobs that are over: their numbers wrap. */
bool cached_is_idle(struct cached *cached, const struct sage_page *page);

void cache_add(struct cache *cache, struct cached *cached);
void cache_remove(struct cache *cache, struct cached *cached);

/*
 * The entry that has just these spans among its own, or NULL. Entries that claim something else
 * about their addresses become stale.
 */
struct cached *cache_find(struct cache *cache, const struct span *spans, uint32_t n_spans);

/*
 * The entry of a single span that has all these bytes, or NULL; whether its memory is still what it
 * was is not said.
 */
struct cached *cache_at(struct cache *cache, uint64_t address, uint64_t bytes);

/* Does the daemon, or may it, still have other memory mapped that was at the entry's addresses? */
bool cache_clashes(const struct cache *cache, const struct cached *cached);

/* The entry with the least serial above this one, or NULL. */
struct cached *cache_after(const struct cache *cache, uint64_t serial);

/*
 * An idle entry that ought to go: a stale one, else, while more than `cap` bytes are registered,
 * the one that was found longest ago. NULL: none.
 */
struct cached *cache_victim(const struct cache *cache, const struct sage_page *page, uint64_t cap);

#endif
