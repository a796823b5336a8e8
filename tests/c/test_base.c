/* Memory, arenas, checked sizes, messages, random numbers, and the choice of instruction sets. */
#define _GNU_SOURCE
#include <stdint.h>
#include <stdlib.h>

#include "../../csrc/base/cpu.h"
#include "../../csrc/ops/ops.h"
#include "harness.h"

static void sizes_are_checked(void)
{
    size_t out;
    CHECK(lco_mul(SIZE_MAX / 2, 2, &out) && out == SIZE_MAX - 1, "%zu", out);
    CHECK(!lco_mul(SIZE_MAX / 2 + 1, 2, &out), "a product that does not fit");
    CHECK(!lco_mul((size_t)1 << 32, (size_t)1 << 32, &out), "2^64");
    CHECK(lco_mul(0, SIZE_MAX, &out) && out == 0, "%zu", out);
    CHECK(lco_add(SIZE_MAX, 0, &out) && !lco_add(SIZE_MAX, 1, &out), "a sum that does not fit");
}

static void blocks_are_aligned_and_counted(void)
{
    int64_t live = lco_mem_live();
    const size_t sizes[] = {0, 1, 63, 64, 65, 4097, (size_t)3 << 20};
    void *blocks[7];
    for (size_t i = 0; i < 7; i++) {
        blocks[i] = lco_alloc(sizes[i]);
        CHECK(blocks[i] != NULL && (uintptr_t)blocks[i] % LCO_ALIGN == 0, "%zu bytes at %p", sizes[i], blocks[i]);
        memset(blocks[i], 0xAB, sizes[i]);
    }
    CHECK(lco_mem_live() == live + 7, "%lld live", (long long)(lco_mem_live() - live));
    for (size_t i = 0; i < 7; i++)
        lco_free(blocks[i]);
    lco_free(NULL);
    CHECK(lco_mem_live() == live, "%lld live", (long long)(lco_mem_live() - live));
    unsigned char *zeros = lco_calloc(100, 7);
    for (int i = 0; i < 700; i++)
        CHECK(zeros[i] == 0, "byte %d", i);
    lco_free(zeros);
    CHECK(lco_calloc(SIZE_MAX / 2, 3) == NULL, "count * bytes overflows");
    CHECK(lco_alloc(SIZE_MAX - 3) == NULL, "rounding up overflows");
}

static void the_nth_allocation_fails_once(void)
{
    lco_mem_fail_at(3);
    void *blocks[4];
    for (int i = 0; i < 4; i++)
        blocks[i] = lco_alloc(8);
    CHECK(blocks[0] && blocks[1] && !blocks[2] && blocks[3], "the third, and no other");
    CHECK(lco_mem_fail_at(0) <= 0, "the hook has fired");
    for (int i = 0; i < 4; i++)
        lco_free(blocks[i]);
    lco_mem_fail_at(10);
    lco_free(lco_alloc(1));
    CHECK(lco_mem_fail_at(0) == 9, "nine to go");
    lco_mem_fail_at(1);
    CHECK(lco_arena_create() == NULL, "an arena needs memory");
    lco_mem_fail_at(0);
}

static void arena_blocks_do_not_move(void)
{
    lco_arena *arena = lco_arena_create();
    CHECK(lco_arena_bytes(arena) == 0, "an arena starts empty");
    enum { N = 400 };
    static unsigned char *blocks[N];
    stream s = {.seed = 11};
    for (int i = 0; i < N; i++) {
        size_t bytes = 1 + (size_t)stream_below(&s, i % 50 == 0 ? 3 << 20 : 5000);
        blocks[i] = lco_arena_take(arena, bytes);
        CHECK(blocks[i] != NULL && (uintptr_t)blocks[i] % LCO_ALIGN == 0, "block %d at %p", i, (void *)blocks[i]);
        memset(blocks[i], i & 255, bytes);
    }
    s.next = 0;
    for (int i = 0; i < N; i++) {
        size_t bytes = 1 + (size_t)stream_below(&s, i % 50 == 0 ? 3 << 20 : 5000);
        CHECK(blocks[i][0] == (i & 255) && blocks[i][bytes - 1] == (i & 255), "block %d was overwritten", i);
    }
    CHECK(lco_arena_take(arena, SIZE_MAX - 8) == NULL, "rounding up overflows");
    lco_arena_destroy(arena);
    lco_arena_destroy(NULL);
}

static void arena_memory_is_reused(void)
{
    lco_arena *arena = lco_arena_create();
    char *kept = lco_arena_take(arena, 100);
    strcpy(kept, "kept");
    lco_mark mark = lco_arena_mark(arena);
    size_t held = 0;
    void *first = NULL;
    for (int round = 0; round < 50; round++) {
        void *a = lco_arena_take(arena, 1000);
        for (int i = 0; i < 8; i++)
            memset(lco_arena_take(arena, 700000), round, 700000);
        if (round == 0) {
            held = lco_arena_bytes(arena);
            first = a;
        }
        CHECK(a == first && lco_arena_bytes(arena) == held, "round %d: %zu bytes held, %zu at first", round, lco_arena_bytes(arena), held);
        lco_arena_reset(arena, mark);
    }
    CHECK(strcmp(kept, "kept") == 0, "a block before the mark was overwritten");
    lco_mem_fail_at(1);
    CHECK(lco_arena_take(arena, held * 4) == NULL, "no memory for a chunk");
    lco_mem_fail_at(0);
    CHECK(lco_arena_take(arena, 1000) != NULL, "the arena is usable after a failure");
    lco_arena_destroy(arena);
}

static void messages_are_cut_not_overrun(void)
{
    struct {
        lco_error err;
        char guard[8];
    } s = {.guard = "guarded"};
    char text[2000];
    memset(text, 'x', sizeof text - 1);
    text[sizeof text - 1] = 0;
    CHECK(lco_fail(&s.err, LCO_EFORMAT, "tensor '%s' and %d", text, 5) == LCO_EFORMAT, "the code comes back");
    CHECK(strlen(s.err.text) == sizeof s.err.text - 1 && strcmp(s.guard, "guarded") == 0, "%zu", strlen(s.err.text));
    CHECK(lco_fail(NULL, LCO_ENOMEM, "nobody reads %d", 1) == LCO_ENOMEM, "no message wanted");
}

/* The published vectors of Philox4x32-10. */
static void philox_is_philox(void)
{
    const struct {
        lco_rng_block counter;
        uint32_t key[2];
        uint32_t expected[4];
    } vectors[] = {
        {{{0, 0, 0, 0}}, {0, 0}, {0x6627e8d5, 0xe169c58d, 0xbc57ac4c, 0x9b00dbd8}},
        {{{~0u, ~0u, ~0u, ~0u}}, {~0u, ~0u}, {0x408f276d, 0x41c83b0e, 0xa20bc7c6, 0x6d5451fd}},
        {{{0x243f6a88, 0x85a308d3, 0x13198a2e, 0x03707344}}, {0xa4093822, 0x299f31d0}, {0xd16cfe09, 0x94fdcceb, 0x5001e420, 0x24126ea1}},
    };
    for (int i = 0; i < 3; i++) {
        lco_rng_block found = lco_rng_philox(vectors[i].counter, vectors[i].key[0], vectors[i].key[1]);
        CHECK(memcmp(found.word, vectors[i].expected, 16) == 0, "vector %d: %08x %08x %08x %08x", i, found.word[0], found.word[1],
              found.word[2], found.word[3]);
    }
    double sum = 0.0, least = 1.0, most = 0.0;
    for (uint64_t i = 0; i < 100000; i++) {
        double u = lco_rng_uniform(9, i);
        sum += u;
        least = u < least ? u : least;
        most = u > most ? u : most;
    }
    CHECK(sum / 1e5 > 0.496 && sum / 1e5 < 0.504 && least >= 0.0 && least < 1e-4 && most < 1.0 && most > 1 - 1e-4, "mean %g, %g to %g",
          sum / 1e5, least, most);
}

static void instruction_sets_by_name(void)
{
    const char *names[8];
    int n = lco_ops_available(names, 8);
    CHECK(n >= 1 && strcmp(names[0], "ref") == 0, "%d sets, the first is %s", n, names[0]);
    lco_error err;
    for (int i = 0; i < n; i++) {
        const lco_ops *ops;
        CHECK_OK(lco_ops_select(names[i], &ops, &check_err));
        CHECK(ops != NULL && strcmp(ops->name, names[i]) == 0, "%s", names[i]);
        CHECK(ops->embed && ops->rmsnorm && ops->linear && ops->swiglu && ops->rope_append && ops->attention, "%s lacks an op", names[i]);
    }
    const lco_ops *ops;
    CHECK_ERROR(lco_ops_select("sse9", &ops, &err), LCO_EINVAL, &err, "sse9|avx2");
    lco_cpu cpu = lco_cpu_detect();
    CHECK(!cpu.avx512 || cpu.avx2, "AVX-512 without AVX2");
    if (!cpu.amx_bf16)
        CHECK_ERROR(lco_ops_select("amx", &ops, &err), LCO_EUNSUPPORTED, &err, "amx|ref");
    setenv("LLMCOOPT_ISA", "ref", 1);
    CHECK_OK(lco_ops_select(NULL, &ops, &check_err));
    CHECK(strcmp(ops->name, "ref") == 0, "%s", ops->name);
    setenv("LLMCOOPT_ISA", "mmx", 1);
    CHECK_ERROR(lco_ops_select(NULL, &ops, &err), LCO_EINVAL, &err, "LLMCOOPT_ISA|mmx");
    unsetenv("LLMCOOPT_ISA");
    CHECK_OK(lco_ops_select(NULL, &ops, &check_err));
    CHECK(strcmp(ops->name, names[n - 1]) == 0, "the best is %s, chosen %s", names[n - 1], ops->name);
}

int main(int argc, char **argv)
{
    const test_case tests[] = {
        TEST(sizes_are_checked),        TEST(blocks_are_aligned_and_counted), TEST(the_nth_allocation_fails_once),
        TEST(arena_blocks_do_not_move), TEST(arena_memory_is_reused),         TEST(messages_are_cut_not_overrun),
        TEST(philox_is_philox),         TEST(instruction_sets_by_name),
    };
    return RUN_ALL(tests, argc, argv);
}
