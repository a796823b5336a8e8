#include "mem.h"

#include <stdatomic.h>
#include <stdlib.h>
#include <string.h>

/* The only writable file-scope state of the core: a counter for fault tests and one for leak tests. */
static _Atomic int64_t fail_countdown;
static _Atomic int64_t live_blocks;

int64_t lco_mem_fail_at(int64_t n) { return atomic_exchange(&fail_countdown, n); }

int64_t lco_mem_live(void) { return atomic_load(&live_blocks); }

static bool fault_fires(void)
{
    if (atomic_load_explicit(&fail_countdown, memory_order_relaxed) <= 0)
        return false;
    return atomic_fetch_sub(&fail_countdown, 1) == 1;
}

bool lco_mul(size_t a, size_t b, size_t *out) { return !__builtin_mul_overflow(a, b, out); }

bool lco_add(size_t a, size_t b, size_t *out) { return !__builtin_add_overflow(a, b, out); }

void *lco_alloc(size_t bytes)
{
    size_t rounded;
    if (fault_fires() || !lco_add(bytes, LCO_ALIGN - 1, &rounded))
        return NULL;
    rounded &= ~(size_t)(LCO_ALIGN - 1);
    void *block = aligned_alloc(LCO_ALIGN, rounded == 0 ? LCO_ALIGN : rounded);
    if (block != NULL)
        atomic_fetch_add(&live_blocks, 1);
    return block;
}

void *lco_calloc(size_t count, size_t bytes)
{
    size_t total;
    if (!lco_mul(count, bytes, &total))
        return NULL;
    void *block = lco_alloc(total);
    if (block != NULL)
        memset(block, 0, total);
    return block;
}

void lco_free(void *block)
{
    if (block != NULL)
        atomic_fetch_sub(&live_blocks, 1);
    free(block);
}

#define ARENA_CHUNKS 40
#define ARENA_FIRST_CHUNK ((size_t)1 << 20)

struct lco_arena {
    char *chunk[ARENA_CHUNKS];
    size_t size[ARENA_CHUNKS];
    size_t n_chunks, current, used; /* used: bytes of chunk `current` */
};

lco_arena *lco_arena_create(void) { return lco_calloc(1, sizeof(lco_arena)); }

void lco_arena_destroy(lco_arena *arena)
{
    if (arena == NULL)
        return;
    for (size_t i = 0; i < arena->n_chunks; i++)
        lco_free(arena->chunk[i]);
    lco_free(arena);
}

static bool arena_grow(lco_arena *arena, size_t bytes)
{
    if (arena->n_chunks == ARENA_CHUNKS)
        return false;
    size_t size = arena->n_chunks == 0 ? ARENA_FIRST_CHUNK : 2 * arena->size[arena->n_chunks - 1];
    if (size < bytes)
        size = bytes;
    char *chunk = lco_alloc(size);
    if (chunk == NULL)
        return false;
    arena->chunk[arena->n_chunks] = chunk;
    arena->size[arena->n_chunks] = size;
    arena->n_chunks++;
    return true;
}

void *lco_arena_take(lco_arena *arena, size_t bytes)
{
    if (!lco_add(bytes, LCO_ALIGN - 1, &bytes))
        return NULL;
    bytes &= ~(size_t)(LCO_ALIGN - 1);
    while (arena->current < arena->n_chunks && arena->size[arena->current] - arena->used < bytes) {
        arena->current++;
        arena->used = 0;
    }
    if (arena->current == arena->n_chunks && !arena_grow(arena, bytes))
        return NULL;
    void *block = arena->chunk[arena->current] + arena->used;
    arena->used += bytes;
    return block;
}

lco_mark lco_arena_mark(const lco_arena *arena) { return (lco_mark){arena->current, arena->used}; }

void lco_arena_reset(lco_arena *arena, lco_mark mark)
{
    arena->current = mark.chunk;
    arena->used = mark.used;
}

size_t lco_arena_bytes(const lco_arena *arena)
{
    size_t total = 0;
    for (size_t i = 0; i < arena->n_chunks; i++)
        total += arena->size[i];
    return total;
}
