/* A thread pool that belongs to one handle. Workers are started by lco_pool_create and by nothing else.
 *
 * Invariants
 * 1. At most one lco_pool_for runs on a pool at a time (the owner holds its own lock).
 * 2. A worker touches `ctx` only between the start and the return of the lco_pool_for that passed it.
 * 3. Workers spin for a short while after work, then sleep; an idle pool costs no CPU time.
 * 4. Which thread runs a piece is not fixed; results must not depend on it. */
#ifndef LCO_BASE_THREADS_H
#define LCO_BASE_THREADS_H

#include <stdbool.h>
#include <stdint.h>
#include <sys/types.h>

#include "status.h"

typedef struct lco_pool lco_pool;

/* Works on items [begin, end); `thread` is in [0, lco_pool_size). */
typedef void (*lco_task)(void *ctx, int64_t begin, int64_t end, int thread);

/* n_threads counts the caller; 0: as many as the process may run on. */
lco_status lco_pool_create(int n_threads, lco_pool **out, lco_error *err);
void lco_pool_destroy(lco_pool *pool);
int lco_pool_size(const lco_pool *pool);

/* Runs fn over [0, n) in pieces of at most `grain` items, on the caller and all workers, and returns when all is done. */
void lco_pool_for(lco_pool *pool, int64_t n, int64_t grain, lco_task fn, void *ctx);

/* LCO_EFORK, with a message, in a child process made after the pool (its workers do not exist there). */
lco_status lco_pool_check(const lco_pool *pool, lco_error *err);
lco_status lco_owner_check(pid_t owner, lco_error *err); /* the same for anything made by process `owner` */

int lco_cpu_count(void); /* CPUs this process may run on */

#endif
