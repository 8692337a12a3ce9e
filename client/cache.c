/*
 * cache.c - the list of registered device memory. A program has few allocations that it computes
 * with at a time, so a list does.
 */
#include "client/cache.h"

#include <stdlib.h>
#include <string.h>

struct cached *cached_create(const struct span *spans, uint32_t n_spans)
{
    struct cached *cached = calloc(1, sizeof(*cached) + n_spans * sizeof(*spans));

    if (!cached)
        return NULL;
    cached->n_spans = n_spans;
    memcpy(cached->spans, spans, n_spans * sizeof(*spans));
    return cached;
}

uint64_t cached_base(const struct cached *cached)
{
    return cached->spans[0].base;
}

static uint64_t end_of(const struct span *spans, uint32_t n_spans)
{
    return spans[n_spans - 1].base + spans[n_spans - 1].size;
}

uint64_t cached_bytes(const struct cached *cached)
{
    return end_of(cached->spans, cached->n_spans) - cached_base(cached);
}

void cached_use(struct cached *cached, uint32_t lane, uint32_t n)
{
    const uint64_t bit = UINT64_C(1) << lane;

    if (!(cached->lanes & bit) || page_reached(n, cached->last[lane]))
        cached->last[lane] = n;
    cached->lanes |= bit;
}

bool cached_is_idle(struct cached *cached, const struct sage_page *page)
{
    for (uint64_t left = cached->lanes; left; left &= left - 1) {
        int lane = __builtin_ctzll(left);
        uint32_t n = cached->last[lane];
        if (page_reached(page_load(&page->lane[lane].release[n % SAGE_ENTRIES]), n))
            cached->lanes &= ~(left & -left);
    }
    return !cached->lanes && cached->pins == 0 && cached->ready && !cached->leaving;
}

void cache_add(struct cache *cache, struct cached *cached)
{
    cached->serial = ++cache->serial;
    cached->used = ++cache->clock;
    cached->next = cache->first;
    cache->first = cached;
    cache->bytes += cached_bytes(cached);
}

void cache_remove(struct cache *cache, struct cached *cached)
{
    for (struct cached **p = &cache->first; *p; p = &(*p)->next)
        if (*p == cached) {
            *p = cached->next;
            cache->bytes -= cached_bytes(cached);
            return;
        }
}

static bool same(const struct span *a, const struct span *b)
{
    return a->base == b->base && a->size == b->size && a->id == b->id && a->block == b->block;
}

/* Is there any of its spans that lies on one of these, and is not the same? */
static bool contradicts(const struct cached *cached, const struct span *spans, uint32_t n_spans)
{
    for (uint32_t i = 0; i < cached->n_spans; i++)
        for (uint32_t k = 0; k < n_spans; k++) {
            const struct span *a = &cached->spans[i], *b = &spans[k];
            if (a->base < b->base + b->size && b->base < a->base + a->size && !same(a, b))
                return true;
        }
    return false;
}

static bool overlaps(const struct cached *cached, uint64_t base, uint64_t end)
{
    return cached_base(cached) < end && base < end_of(cached->spans, cached->n_spans);
}

static bool covers(const struct cached *cached, const struct span *spans, uint32_t n_spans)
{
    return cached_base(cached) <= spans[0].base &&
           end_of(spans, n_spans) <= end_of(cached->spans, cached->n_spans);
}

struct cached *cache_find(struct cache *cache, const struct span *spans, uint32_t n_spans)
{
    struct cached *found = NULL;
    uint64_t end = end_of(spans, n_spans);

    for (struct cached *c = cache->first; c; c = c->next) {
        if (c->stale || c->leaving || !overlaps(c, spans[0].base, end))
            continue;
        if (contradicts(c, spans, n_spans))
            c->stale = true;
        else if (covers(c, spans, n_spans))
            found = c;
    }
    if (found)
        found->used = ++cache->clock;
    return found;
}

struct cached *cache_at(struct cache *cache, uint64_t address, uint64_t bytes)
{
    for (struct cached *c = cache->first; c; c = c->next) {
        const struct span *s = c->spans;
        if (c->n_spans > 1 || c->stale || c->leaving || address - s->base >= s->size ||
            bytes > s->size - (address - s->base))
            continue;
        c->used = ++cache->clock;
        return c;
    }
    return NULL;
}

bool cache_clashes(const struct cache *cache, const struct cached *cached)
{
    uint64_t base = cached_base(cached), end = base + cached_bytes(cached);

    for (const struct cached *c = cache->first; c; c = c->next)
        if ((c->stale || c->leaving) && overlaps(c, base, end))
            return true;
    return false;
}

struct cached *cache_after(const struct cache *cache, uint64_t serial)
{
    struct cached *best = NULL;

    for (struct cached *c = cache->first; c; c = c->next)
        if (c->serial > serial && (!best || c->serial < best->serial))
            best = c;
    return best;
}

struct cached *cache_victim(const struct cache *cache, const struct sage_page *page, uint64_t cap)
{
    struct cached *best = NULL;

    for (struct cached *c = cache->first; c; c = c->next) {
        if (!cached_is_idle(c, page) || !(c->stale || cache->bytes > cap))
            continue;
        if (!best || c->stale > best->stale || (c->stale == best->stale && c->used < best->used))
            best = c;
    }
    return best;
}
