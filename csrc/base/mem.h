/* Memory: aligned blocks, checked sizes, an arena for scratch, and a hook that makes the N-th allocation fail (for fault tests). */
#ifndef LCO_BASE_MEM_H
#define LCO_BASE_MEM_H

#include <stdbool.h>
#include <stddef.h>
#include <stdint.h>

#include "status.h"

#define LCO_ALIGN 64 /* bytes; a cache line and a 512-bit vector */

/* NULL when memory is exhausted or the fault hook fires. Release with lco_free. */
void *lco_alloc(size_t bytes);
void *lco_calloc(size_t count, size_t bytes); /* zeroed; NULL also when count * bytes overflows */
void lco_free(void *block);

/* false when the result does not fit. */
bool lco_mul(size_t a, size_t b, size_t *out);
bool lco_add(size_t a, size_t b, size_t *out);

/* The n-th allocation from now on fails, once (n = 1: the next). 0 turns the hook off. Returns how many were still to go. */
int64_t lco_mem_fail_at(int64_t n);
int64_t lco_mem_live(void); /* blocks allocated and not yet freed, whole process */

/* An arena hands out scratch by moving a pointer. Blocks live until lco_arena_reset to a mark taken before; memory is kept for reuse.
 * Growing adds a chunk, so earlier blocks never move. One owner, one thread. */
typedef struct lco_arena lco_arena;
typedef struct {
    size_t chunk, used;
} lco_mark;

lco_arena *lco_arena_create(void);
void lco_arena_destroy(lco_arena *arena);
void *lco_arena_take(lco_arena *arena, size_t bytes); /* 64-byte aligned, not zeroed; NULL when memory is exhausted */
lco_mark lco_arena_mark(const lco_arena *arena);
void lco_arena_reset(lco_arena *arena, lco_mark mark);
size_t lco_arena_bytes(const lco_arena *arena); /* held */

#endif
