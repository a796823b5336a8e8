/* A test is a function; CHECK reports where and what, and lets the test go on. RUN_ALL in main runs a table of tests. */
#ifndef LCO_TESTS_HARNESS_H
#define LCO_TESTS_HARNESS_H

#include <stdbool.h>
#include <stdio.h>
#include <string.h>

#include "../../csrc/base/mem.h"
#include "../../csrc/base/rng.h"
#include "../../csrc/base/status.h"

static int harness_failures;

#define CHECK(condition, ...)                                                                                                              \
    do {                                                                                                                                   \
        if (!(condition)) {                                                                                                                \
            harness_failures++;                                                                                                            \
            printf("%s:%d: not so: %s: ", __FILE__, __LINE__, #condition);                                                                 \
            printf(__VA_ARGS__);                                                                                                           \
            printf("\n");                                                                                                                  \
        }                                                                                                                                  \
    } while (0)

#define CHECK_OK(call)                                                                                                                     \
    do {                                                                                                                                   \
        lco_error check_err = {0};                                                                                                         \
        lco_status check_status = (call);                                                                                                  \
        CHECK(check_status == LCO_OK, "status %d: %s", check_status, check_err.text);                                                      \
    } while (0)

/* The call fails with this status and its message contains each of the texts (separated by '|'). */
static inline void check_error(const char *file, int line, lco_status found, lco_status expected, const lco_error *err, const char *texts)
{
    bool good = found == expected && err->code == expected;
    for (const char *part = texts; good && part != NULL;) {
        const char *end = strchr(part, '|');
        char one[128];
        snprintf(one, sizeof one, "%.*s", end != NULL ? (int)(end - part) : (int)strlen(part), part);
        good = strstr(err->text, one) != NULL;
        part = end != NULL ? end + 1 : NULL;
    }
    if (!good) {
        harness_failures++;
        printf("%s:%d: status %d \"%s\", expected status %d and \"%s\"\n", file, line, found, err->text, expected, texts);
    }
}
#define CHECK_ERROR(found, expected, err, texts) check_error(__FILE__, __LINE__, found, expected, err, texts)

/* Reproducible numbers: the n-th of a stream. */
typedef struct {
    uint64_t seed, next;
} stream;

static inline double stream_uniform(stream *s) { return lco_rng_uniform(s->seed, s->next++); }

static inline int64_t stream_below(stream *s, int64_t n) { return (int64_t)(stream_uniform(s) * (double)n); }

typedef struct {
    const char *name;
    void (*run)(void);
} test_case;

/* Every test leaves as many live blocks as it found. With an argument, only tests whose name contains it run. */
static inline int run_tests(const test_case *tests, int n, const char *only)
{
    int failed = 0, ran = 0;
    for (int i = 0; i < n; i++) {
        if (only != NULL && strstr(tests[i].name, only) == NULL)
            continue;
        int before = harness_failures;
        int64_t live = lco_mem_live();
        tests[i].run();
        CHECK(lco_mem_live() == live, "%s leaks %lld blocks", tests[i].name, (long long)(lco_mem_live() - live));
        bool good = harness_failures == before;
        printf("%s %s\n", good ? "ok  " : "FAIL", tests[i].name);
        fflush(stdout);
        failed += !good;
        ran++;
    }
    printf("%d tests, %d failed\n", ran, failed);
    return failed != 0 || ran == 0;
}

#define TEST(name) {#name, name}
#define RUN_ALL(tests, argc, argv) run_tests(tests, (int)(sizeof(tests) / sizeof((tests)[0])), (argc) > 1 ? (argv)[1] : NULL)

#endif
