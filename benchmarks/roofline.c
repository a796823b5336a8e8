/* What this machine can do at most: reading loops and arithmetic loops, on one or more threads. Built and called by roofline.py.
 *
 * A loop runs on all threads between two barriers; the rate is the work of all over the time from the first barrier to the second. One thread
 * is timed by its own CPU time, which other programs on the machine disturb less. */
#define _GNU_SOURCE
#include <pthread.h>
#include <stdint.h>
#include <stdlib.h>
#include <string.h>
#include <time.h>

#if defined(__x86_64__)
#include <immintrin.h>
#include <sys/syscall.h>
#include <unistd.h>
#define TARGET(features) __attribute__((target(features), noinline))
#else
#define TARGET(features) __attribute__((noinline))
#endif

#define MAX_THREADS 256
#define LINE 64

typedef struct job {
    /* Works on a thread's share and returns bytes read or operations done. */
    double (*loop)(const struct job *job, int thread, uint64_t *sink);
    const char *data;
    size_t bytes;
    long ahead; /* bytes of software prefetch, 0: none */
    int64_t rounds;
    int threads;
    pthread_barrier_t barrier;
} job;

typedef struct {
    job *job;
    int thread;
    double done;
    uint64_t sink;
    pthread_t handle;
} worker;

typedef uint64_t line __attribute__((vector_size(LINE), aligned(8), may_alias));

#define READ_LOOP(name, features)                                                                                                          \
    TARGET(features) static double name(const job *j, int thread, uint64_t *sink)                                                          \
    {                                                                                                                                      \
        const size_t share = j->bytes / (size_t)j->threads / (4 * LINE) * (4 * LINE);                                                      \
        const char *p = j->data + (size_t)thread * share;                                                                                  \
        line a = {0}, b = {0}, c = {0}, d = {0};                                                                                           \
        for (size_t i = 0; i < share; i += 4 * LINE, p += 4 * LINE) {                                                                      \
            if (j->ahead != 0)                                                                                                             \
                for (int n = 0; n < 4; n++)                                                                                                \
                    __builtin_prefetch(p + j->ahead + n * LINE, 0, 3);                                                                     \
            a ^= *(const line *)p;                                                                                                         \
            b ^= *(const line *)(p + LINE);                                                                                                \
            c ^= *(const line *)(p + 2 * LINE);                                                                                            \
            d ^= *(const line *)(p + 3 * LINE);                                                                                            \
        }                                                                                                                                  \
        a ^= b ^ c ^ d;                                                                                                                    \
        for (int i = 0; i < 8; i++)                                                                                                        \
            *sink ^= a[i];                                                                                                                 \
        return (double)share;                                                                                                              \
    }

#if defined(__x86_64__)
READ_LOOP(read_wide, "avx512f")
READ_LOOP(read_plain, "sse2")

#define CHAINS 12 /* independent sums: more than latency times rate of any of these units */

TARGET("avx512f") static double fma_avx512(const job *j, int thread, uint64_t *sink)
{
    __m512 s[CHAINS], a = _mm512_set1_ps(1.0f + (float)thread), b = _mm512_set1_ps(1e-9f);
    for (int i = 0; i < CHAINS; i++)
        s[i] = _mm512_set1_ps((float)i);
    for (int64_t n = 0; n < j->rounds; n++)
        for (int i = 0; i < CHAINS; i++)
            s[i] = _mm512_fmadd_ps(a, b, s[i]);
    for (int i = 1; i < CHAINS; i++)
        s[0] = _mm512_add_ps(s[0], s[i]);
    *sink = (uint64_t)_mm512_reduce_add_ps(s[0]);
    return (double)j->rounds * CHAINS * 32;
}

TARGET("avx2,fma") static double fma_avx2(const job *j, int thread, uint64_t *sink)
{
    __m256 s[CHAINS], a = _mm256_set1_ps(1.0f + (float)thread), b = _mm256_set1_ps(1e-9f);
    for (int i = 0; i < CHAINS; i++)
        s[i] = _mm256_set1_ps((float)i);
    for (int64_t n = 0; n < j->rounds; n++)
        for (int i = 0; i < CHAINS; i++)
            s[i] = _mm256_fmadd_ps(a, b, s[i]);
    for (int i = 1; i < CHAINS; i++)
        s[0] = _mm256_add_ps(s[0], s[i]);
    *sink = (uint64_t)s[0][0];
    return (double)j->rounds * CHAINS * 16;
}

TARGET("avx512f,avx512bw,avx512vl,avx512bf16") static double dot_bf16(const job *j, int thread, uint64_t *sink)
{
    __m512 s[CHAINS];
    __m512bh a = (__m512bh)_mm512_set1_epi32(0x3F803F80 + thread), b = (__m512bh)_mm512_set1_epi32(0x30003000);
    for (int i = 0; i < CHAINS; i++)
        s[i] = _mm512_set1_ps((float)i);
    for (int64_t n = 0; n < j->rounds; n++)
        for (int i = 0; i < CHAINS; i++)
            s[i] = _mm512_dpbf16_ps(s[i], a, b);
    for (int i = 1; i < CHAINS; i++)
        s[0] = _mm512_add_ps(s[0], s[i]);
    *sink = (uint64_t)_mm512_reduce_add_ps(s[0]);
    return (double)j->rounds * CHAINS * 64;
}

#define TILE_TARGET TARGET("amx-tile,amx-bf16,avx512f")
#define TILE_WORDS 512

/* All eight tiles of 16 rows by 64 bytes, and the last four filled with noise: what zeros cost may be less. */
TILE_TARGET static void tiles_begin(uint16_t *noise)
{
    struct {
        uint8_t palette, start_row, reserved[14];
        uint16_t row_bytes[16];
        uint8_t rows[16];
    } config = {.palette = 1};
    for (int i = 0; i < 8; i++) {
        config.row_bytes[i] = 64;
        config.rows[i] = 16;
    }
    uint32_t state = 1;
    for (int i = 0; i < 4 * TILE_WORDS; i++) {
        state = state * 1664525 + 1013904223;
        noise[i] = (uint16_t)(0x3C00 | (state >> 16 & 0x83FF)); /* +-2^-7 .. 2^-3 */
    }
    __asm__ volatile("" ::: "memory");
    _tile_loadconfig(&config);
    __asm__ volatile("" ::: "memory");
    _tile_zero(0);
    _tile_zero(1);
    _tile_zero(2);
    _tile_zero(3);
    _tile_loadd(4, noise, 64);
    _tile_loadd(5, noise + TILE_WORDS, 64);
    _tile_loadd(6, noise + 2 * TILE_WORDS, 64);
    _tile_loadd(7, noise + 3 * TILE_WORDS, 64);
}

#define TILE_FLOPS (16.0 * 16 * 32 * 2)

TILE_TARGET static double tiles_bf16(const job *j, int thread, uint64_t *sink)
{
    uint16_t noise[4 * TILE_WORDS];
    tiles_begin(noise);
    for (int64_t n = 0; n < j->rounds; n++) {
        _tile_dpbf16ps(0, 4, 6);
        _tile_dpbf16ps(1, 4, 7);
        _tile_dpbf16ps(2, 5, 6);
        _tile_dpbf16ps(3, 5, 7);
    }
    _tile_release();
    *sink = (uint64_t)thread;
    return (double)j->rounds * 4 * TILE_FLOPS;
}

TILE_TARGET static double tiles_bf16_loaded(const job *j, int thread, uint64_t *sink)
{
    uint16_t noise[4 * TILE_WORDS];
    tiles_begin(noise);
    for (int64_t n = 0; n < j->rounds; n++) {
        _tile_loadd(4, noise, 64);
        _tile_loadd(6, noise + 2 * TILE_WORDS, 64);
        _tile_loadd(7, noise + 3 * TILE_WORDS, 64);
        _tile_loadd(5, noise + TILE_WORDS, 64);
        _tile_dpbf16ps(0, 4, 6);
        _tile_dpbf16ps(1, 4, 7);
        _tile_dpbf16ps(2, 5, 6);
        _tile_dpbf16ps(3, 5, 7);
    }
    _tile_release();
    *sink = (uint64_t)thread;
    return (double)j->rounds * 4 * TILE_FLOPS;
}
#else
READ_LOOP(read_plain, "")
#endif

static double seconds(clockid_t clock)
{
    struct timespec t;
    clock_gettime(clock, &t);
    return (double)t.tv_sec + 1e-9 * (double)t.tv_nsec;
}

static void *work(void *arg)
{
    worker *w = arg;
    pthread_barrier_wait(&w->job->barrier);
    w->done = w->job->loop(w->job, w->thread, &w->sink);
    pthread_barrier_wait(&w->job->barrier);
    return NULL;
}

/* Work per second, or a negative number when a thread could not be started. */
static double rate(job *j)
{
    worker workers[MAX_THREADS] = {0};
    if (j->threads < 1 || j->threads > MAX_THREADS || pthread_barrier_init(&j->barrier, NULL, (unsigned)j->threads) != 0)
        return -1;
    for (int i = 0; i < j->threads; i++)
        workers[i] = (worker){.job = j, .thread = i};
    for (int i = 1; i < j->threads; i++)
        if (pthread_create(&workers[i].handle, NULL, work, &workers[i]) != 0)
            return -1;
    const clockid_t clock = j->threads == 1 ? CLOCK_THREAD_CPUTIME_ID : CLOCK_MONOTONIC;
    pthread_barrier_wait(&j->barrier);
    const double start = seconds(clock);
    double done = workers[0].done = j->loop(j, 0, &workers[0].sink);
    pthread_barrier_wait(&j->barrier);
    const double time = seconds(clock) - start;
    for (int i = 1; i < j->threads; i++) {
        pthread_join(workers[i].handle, NULL);
        done += workers[i].done;
    }
    pthread_barrier_destroy(&j->barrier);
    return done / time;
}

/* Bytes per second of reading `bytes` bytes at `data`, `ahead` bytes of prefetch. */
__attribute__((visibility("default"))) double roofline_read(const void *data, size_t bytes, long ahead, int threads)
{
    job j = {.loop = read_plain, .data = data, .bytes = bytes, .ahead = ahead, .threads = threads};
#if defined(__x86_64__)
    if (__builtin_cpu_supports("avx512f"))
        j.loop = read_wide;
#endif
    return rate(&j);
}

/* Operations per second of "avx2 f32", "avx512 f32", "avx512 bf16", "amx bf16" or "amx bf16 from L1"; 0 when this CPU has no such unit. */
__attribute__((visibility("default"))) double roofline_flops(const char *unit, int64_t rounds, int threads)
{
    job j = {.rounds = rounds, .threads = threads};
    (void)unit;
#if defined(__x86_64__)
    if (strcmp(unit, "avx2 f32") == 0 && __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma"))
        j.loop = fma_avx2;
    else if (strcmp(unit, "avx512 f32") == 0 && __builtin_cpu_supports("avx512f"))
        j.loop = fma_avx512;
    else if (strcmp(unit, "avx512 bf16") == 0 && __builtin_cpu_supports("avx512bf16"))
        j.loop = dot_bf16;
    else if (strncmp(unit, "amx bf16", 8) == 0 && __builtin_cpu_supports("amx-bf16") && syscall(SYS_arch_prctl, 0x1023, 18) == 0)
        j.loop = unit[8] == '\0' ? tiles_bf16 : tiles_bf16_loaded;
#endif
    return j.loop == NULL ? 0 : rate(&j);
}
