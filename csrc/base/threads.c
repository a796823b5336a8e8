#define _GNU_SOURCE
#include "threads.h"

#include <limits.h>
#include <linux/futex.h>
#include <pthread.h>
#include <sched.h>
#include <stdatomic.h>
#include <string.h>
#include <sys/syscall.h>
#include <unistd.h>

#include "mem.h"

#define SPINS 20000    /* pauses before a worker sleeps: 100-300 microseconds, longer than the serial code between two ops of a step */
#define YIELD_EVERY 64 /* pauses between two offers of the CPU: two threads of a pool may be on one CPU when others are busy */
#define MAX_THREADS 1024

/* The gate of a job: epoch in the high half, OPEN, and the number of workers inside. A worker enters only a gate that is open and of the epoch
 * it saw; the caller closes it when no piece is left and waits for those inside alone. So a worker that has no CPU just now is not waited for. */
#define OPEN ((uint64_t)1 << 31)
#define INSIDE (OPEN - 1)

struct lco_pool {
    _Alignas(64) _Atomic uint32_t epoch; /* grows by one per job; workers wait on it */
    _Alignas(64) _Atomic uint64_t gate;
    _Alignas(64) _Atomic int64_t next; /* first item not yet claimed */
    _Alignas(64) _Atomic int32_t asleep;
    lco_task fn;
    void *ctx;
    int64_t n, grain;
    _Atomic bool quit;
    pid_t owner;
    int n_threads; /* caller included */
    pthread_t *workers;
    struct start {
        lco_pool *pool;
        int thread;
    } *starts;
};

/* The i-th round of a waiting loop. */
static inline void relax(int64_t i)
{
#if defined(__x86_64__)
    __builtin_ia32_pause();
#endif
    if (i % YIELD_EVERY == YIELD_EVERY - 1)
        sched_yield();
}

static void work(lco_pool *pool, int thread)
{
    const int64_t n = pool->n, grain = pool->grain;
    for (;;) {
        int64_t begin = atomic_fetch_add_explicit(&pool->next, grain, memory_order_relaxed);
        if (begin >= n)
            return;
        int64_t end = begin + grain < n ? begin + grain : n;
        pool->fn(pool->ctx, begin, end, thread);
    }
}

static void wait_for_epoch(lco_pool *pool, uint32_t seen)
{
    for (int i = 0; i < SPINS; i++) {
        if (atomic_load_explicit(&pool->epoch, memory_order_acquire) != seen)
            return;
        relax(i);
    }
    atomic_fetch_add(&pool->asleep, 1);
    while (atomic_load(&pool->epoch) == seen)
        syscall(SYS_futex, &pool->epoch, FUTEX_WAIT_PRIVATE, seen, NULL, NULL, 0);
    atomic_fetch_sub(&pool->asleep, 1);
}

static bool enter(lco_pool *pool, uint32_t epoch)
{
    uint64_t gate = atomic_load_explicit(&pool->gate, memory_order_relaxed);
    while (gate >> 32 == epoch && (gate & OPEN) != 0)
        if (atomic_compare_exchange_weak_explicit(&pool->gate, &gate, gate + 1, memory_order_acquire, memory_order_relaxed))
            return true;
    return false;
}

static void *worker_main(void *arg)
{
    struct start start = *(struct start *)arg;
    lco_pool *pool = start.pool;
    for (uint32_t seen = 0;;) {
        wait_for_epoch(pool, seen);
        seen = atomic_load_explicit(&pool->epoch, memory_order_acquire);
        if (atomic_load(&pool->quit))
            return NULL;
        if (enter(pool, seen)) {
            work(pool, start.thread);
            atomic_fetch_sub_explicit(&pool->gate, 1, memory_order_release);
        }
    }
}

static void publish(lco_pool *pool, uint32_t epoch)
{
    atomic_store(&pool->epoch, epoch);
    if (atomic_load(&pool->asleep) > 0)
        syscall(SYS_futex, &pool->epoch, FUTEX_WAKE_PRIVATE, INT_MAX, NULL, NULL, 0);
}

static void close_gate(lco_pool *pool)
{
    atomic_fetch_and_explicit(&pool->gate, ~OPEN, memory_order_relaxed);
    for (int64_t i = 0; (atomic_load_explicit(&pool->gate, memory_order_acquire) & INSIDE) != 0; i++)
        relax(i);
}

void lco_pool_for(lco_pool *pool, int64_t n, int64_t grain, lco_task fn, void *ctx)
{
    if (n <= 0)
        return;
    if (pool->n_threads == 1 || n <= grain) {
        for (int64_t begin = 0; begin < n; begin += grain)
            fn(ctx, begin, begin + grain < n ? begin + grain : n, 0);
        return;
    }
    pool->fn = fn;
    pool->ctx = ctx;
    pool->n = n;
    pool->grain = grain;
    atomic_store_explicit(&pool->next, 0, memory_order_relaxed);
    const uint32_t epoch = atomic_load_explicit(&pool->epoch, memory_order_relaxed) + 1;
    atomic_store_explicit(&pool->gate, (uint64_t)epoch << 32 | OPEN, memory_order_release);
    publish(pool, epoch);
    work(pool, 0);
    close_gate(pool);
}

int lco_pool_size(const lco_pool *pool) { return pool->n_threads; }

int lco_cpu_count(void)
{
    cpu_set_t set;
    if (sched_getaffinity(0, sizeof set, &set) == 0 && CPU_COUNT(&set) > 0)
        return CPU_COUNT(&set);
    long n = sysconf(_SC_NPROCESSORS_ONLN);
    return n > 0 ? (int)n : 1;
}

lco_status lco_pool_check(const lco_pool *pool, lco_error *err) { return lco_owner_check(pool->owner, err); }

lco_status lco_owner_check(pid_t owner, lco_error *err)
{
    if (owner == getpid())
        return LCO_OK;
    return lco_fail(err, LCO_EFORK,
                    "this model was loaded in process %ld and is used in process %ld: its threads do not exist after fork(); "
                    "load the model in the child process (or start it with the 'spawn' method)",
                    (long)owner, (long)getpid());
}

static void stop_workers(lco_pool *pool, int n)
{
    atomic_store(&pool->quit, true);
    publish(pool, atomic_load(&pool->epoch) + 1);
    for (int i = 0; i < n; i++)
        pthread_join(pool->workers[i], NULL);
}

lco_status lco_pool_create(int n_threads, lco_pool **out, lco_error *err)
{
    *out = NULL;
    if (n_threads < 0 || n_threads > MAX_THREADS)
        return lco_fail(err, LCO_EINVAL, "threads = %d, expected 0 (all) to %d", n_threads, MAX_THREADS);
    if (n_threads == 0)
        n_threads = lco_cpu_count();
    lco_pool *pool = lco_calloc(1, sizeof *pool);
    if (pool == NULL)
        return lco_fail(err, LCO_ENOMEM, "out of memory for a thread pool");
    pool->n_threads = n_threads;
    pool->owner = getpid();
    int started = 0;
    lco_status status = LCO_OK;
    if (n_threads > 1) {
        pool->workers = lco_calloc((size_t)n_threads - 1, sizeof *pool->workers);
        pool->starts = lco_calloc((size_t)n_threads - 1, sizeof *pool->starts);
        if (pool->workers == NULL || pool->starts == NULL) {
            status = lco_fail(err, LCO_ENOMEM, "out of memory for %d threads", n_threads);
            goto fail;
        }
    }
    for (; started < n_threads - 1; started++) {
        pool->starts[started] = (struct start){pool, started + 1};
        int code = pthread_create(&pool->workers[started], NULL, worker_main, &pool->starts[started]);
        if (code != 0) {
            status = lco_fail(err, LCO_ENOMEM, "thread %d of %d could not be started: %s", started + 1, n_threads, strerror(code));
            goto fail;
        }
    }
    *out = pool;
    return LCO_OK;
fail:
    stop_workers(pool, started);
    lco_free(pool->starts);
    lco_free(pool->workers);
    lco_free(pool);
    return status;
}

void lco_pool_destroy(lco_pool *pool)
{
    if (pool == NULL)
        return;
    if (pool->owner == getpid())
        stop_workers(pool, pool->n_threads - 1);
    lco_free(pool->starts);
    lco_free(pool->workers);
    lco_free(pool);
}
