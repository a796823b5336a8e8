/* The pool: every item once, whatever the sizes; workers come and go with it; idle workers cost nothing; fork is told. */
#define _GNU_SOURCE
#include <dirent.h>
#include <stdatomic.h>
#include <sys/wait.h>
#include <time.h>
#include <unistd.h>

#include "../../csrc/base/threads.h"
#include "harness.h"

enum { MOST = 3000 };

typedef struct {
    _Atomic int times[MOST];
    _Atomic int bad_piece;
    int64_t n, grain;
    int threads;
} tally;

static void count(void *ctx, int64_t begin, int64_t end, int thread)
{
    tally *t = ctx;
    if (begin < 0 || end > t->n || begin >= end || end - begin > t->grain || thread < 0 || thread >= t->threads)
        atomic_fetch_add(&t->bad_piece, 1);
    for (int64_t i = begin; i < end; i++)
        atomic_fetch_add_explicit(&t->times[i], 1, memory_order_relaxed);
}

static void run_once(lco_pool *pool, int64_t n, int64_t grain)
{
    static tally t;
    memset(&t, 0, sizeof t);
    t.n = n;
    t.grain = grain;
    t.threads = lco_pool_size(pool);
    lco_pool_for(pool, n, grain, count, &t);
    int wrong = 0;
    for (int64_t i = 0; i < MOST; i++)
        wrong += t.times[i] != (i < n);
    CHECK(wrong == 0 && t.bad_piece == 0, "%d threads, %lld items by %lld: %d items not once, %d bad pieces", t.threads, (long long)n,
          (long long)grain, wrong, t.bad_piece);
}

static void every_item_runs_once(void)
{
    const int threads[] = {1, 2, 3, 8};
    const int64_t sizes[] = {0, 1, 2, 7, 64, 1000, MOST}, grains[] = {1, 3, 64, MOST + 1};
    for (size_t t = 0; t < 4; t++) {
        lco_pool *pool;
        CHECK_OK(lco_pool_create(threads[t], &pool, &check_err));
        CHECK(lco_pool_size(pool) == threads[t], "%d threads", lco_pool_size(pool));
        for (size_t i = 0; i < sizeof sizes / sizeof sizes[0]; i++)
            for (size_t j = 0; j < sizeof grains / sizeof grains[0]; j++)
                run_once(pool, sizes[i], grains[j]);
        lco_pool_destroy(pool);
    }
}

static void many_short_jobs(void)
{
    lco_pool *pool;
    CHECK_OK(lco_pool_create(3, &pool, &check_err));
    stream s = {.seed = 4};
    for (int i = 0; i < 600; i++) {
        run_once(pool, stream_below(&s, 40), 1 + stream_below(&s, 5));
        if (i % 100 == 0)
            usleep(3000); /* long enough for workers to fall asleep */
    }
    lco_pool_destroy(pool);
}

/* The calling thread is done with its data when the call returns: plain memory written by workers is visible. */
static void square(void *ctx, int64_t begin, int64_t end, int thread)
{
    (void)thread;
    for (int64_t i = begin; i < end; i++)
        ((int64_t *)ctx)[i] = i * i;
}

static void results_are_visible_after_return(void)
{
    lco_pool *pool;
    CHECK_OK(lco_pool_create(4, &pool, &check_err));
    for (int round = 0; round < 300; round++) {
        int64_t data[512] = {0}, sum = 0;
        lco_pool_for(pool, 512, 8, square, data);
        for (int i = 0; i < 512; i++)
            sum += data[i];
        CHECK(sum == 44608256, "round %d: %lld", round, (long long)sum);
    }
    lco_pool_destroy(pool);
}

static int thread_count(void)
{
    int n = 0;
    DIR *dir = opendir("/proc/self/task");
    for (struct dirent *entry; (entry = readdir(dir)) != NULL;)
        n += entry->d_name[0] != '.';
    closedir(dir);
    return n;
}

static void pools_come_and_go(void)
{
    int before = thread_count();
    for (int i = 0; i < 200; i++) {
        lco_pool *pool;
        CHECK_OK(lco_pool_create(1 + i % 4, &pool, &check_err));
        if (i % 3 == 0)
            run_once(pool, 50, 2);
        lco_pool_destroy(pool);
    }
    int after = thread_count();
    for (int i = 0; i < 200 && after > before; i++) { /* a joined thread leaves /proc a moment later */
        usleep(1000);
        after = thread_count();
    }
    CHECK(after == before, "%d threads, %d before", after, before);
    lco_pool_destroy(NULL);
}

static double cpu_seconds(void)
{
    struct timespec t;
    clock_gettime(CLOCK_PROCESS_CPUTIME_ID, &t);
    return (double)t.tv_sec + 1e-9 * (double)t.tv_nsec;
}

static void idle_workers_cost_nothing(void)
{
    lco_pool *pool;
    CHECK_OK(lco_pool_create(4, &pool, &check_err));
    run_once(pool, 1000, 1);
    usleep(20000);
    double start = cpu_seconds();
    usleep(200000);
    double used = cpu_seconds() - start;
    CHECK(used < 0.02, "%g seconds of CPU time in 0.2 idle seconds", used); /* spinning workers would use up to 0.6 */
    lco_pool_destroy(pool);
}

static void bad_counts_and_faults(void)
{
    lco_pool *pool;
    lco_error err;
    CHECK_ERROR(lco_pool_create(-1, &pool, &err), LCO_EINVAL, &err, "threads = -1");
    CHECK_ERROR(lco_pool_create(1 << 20, &pool, &err), LCO_EINVAL, &err, "threads = 1048576");
    CHECK(pool == NULL, "a failed create gives no pool");
    CHECK_OK(lco_pool_create(0, &pool, &check_err));
    CHECK(lco_pool_size(pool) == lco_cpu_count() && lco_cpu_count() >= 1, "%d threads", lco_pool_size(pool));
    lco_pool_destroy(pool);
    for (int64_t n = 1;; n++) {
        lco_mem_fail_at(n);
        lco_status status = lco_pool_create(3, &pool, &err);
        bool untouched = lco_mem_fail_at(0) > 0;
        CHECK((status == LCO_OK) == untouched, "allocation %lld: status %d", (long long)n, status);
        lco_pool_destroy(pool);
        if (untouched)
            break;
        CHECK_ERROR(status, LCO_ENOMEM, &err, "memory");
    }
}

static void a_forked_child_is_told(void)
{
    lco_pool *pool;
    lco_error err;
    CHECK_OK(lco_pool_create(3, &pool, &check_err));
    run_once(pool, 100, 1);
    pid_t child = fork();
    if (child == 0) {
        bool told = lco_pool_check(pool, &err) == LCO_EFORK && strstr(err.text, "fork") != NULL;
        lco_pool_destroy(pool); /* must not wait for workers that are not there */
        lco_pool *own;
        bool works = lco_pool_create(2, &own, &err) == LCO_OK && lco_pool_check(own, &err) == LCO_OK;
        if (works) {
            run_once(own, 100, 1);
            lco_pool_destroy(own);
        }
        _exit(told && works && harness_failures == 0 ? 0 : 1);
    }
    int state = -1;
    CHECK(waitpid(child, &state, 0) == child && WIFEXITED(state) && WEXITSTATUS(state) == 0, "child state %d", state);
    CHECK_OK(lco_pool_check(pool, &check_err));
    run_once(pool, 100, 1);
    lco_pool_destroy(pool);
}

int main(int argc, char **argv)
{
    const test_case tests[] = {
        TEST(every_item_runs_once),      TEST(many_short_jobs),       TEST(results_are_visible_after_return), TEST(pools_come_and_go),
        TEST(idle_workers_cost_nothing), TEST(bad_counts_and_faults), TEST(a_forked_child_is_told),
    };
    return RUN_ALL(tests, argc, argv);
}
