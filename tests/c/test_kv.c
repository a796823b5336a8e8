/* The cache against a plain model of it: what every sequence holds, who shares what, and how many pages that takes. */
#define _GNU_SOURCE
#include <stdlib.h>
#include <sys/mman.h>
#include <unistd.h>

#include "../../csrc/kv/kv.h"
#include "harness.h"

enum { PAGE = 16, LAYERS = 2, HEADS = 2, DIM = 2, MOST_SEQS = 12, MOST_TOKENS = 400 };

static lco_kv *make(int64_t pages)
{
    lco_kv *kv = NULL;
    lco_kv_options options = {
        .n_layers = LAYERS, .n_kv_heads = HEADS, .head_dim = DIM, .dtype = LCO_F32, .page_size = PAGE, .max_tokens = pages * PAGE};
    CHECK_OK(lco_kv_create(&options, &kv, &check_err));
    return kv;
}

/* Element 0 of one (layer, key or value, head) of a token. */
static float *slot(const lco_kv *kv, const lco_seq *seq, int64_t position, int layer, int which, int head)
{
    const lco_kv_view *views = lco_kv_views(kv);
    return (float *)(void *)lco_kv_codes(&views[layer], lco_seq_table(seq)[position / PAGE], which, head) + position % PAGE * DIM;
}

static float stamp(float value, int layer, int which, int head) { return value * 16 + (float)(layer * 4 + which * 2 + head); }

static void write_token(const lco_kv *kv, const lco_seq *seq, int64_t position, float value)
{
    for (int layer = 0; layer < LAYERS; layer++)
        for (int which = 0; which < 2; which++)
            for (int head = 0; head < HEADS; head++)
                for (int d = 0; d < DIM; d++)
                    slot(kv, seq, position, layer, which, head)[d] = stamp(value, layer, which, head);
}

static bool holds(const lco_kv *kv, const lco_seq *seq, int64_t position, float value)
{
    bool same = true;
    for (int layer = 0; layer < LAYERS; layer++)
        for (int which = 0; which < 2; which++)
            for (int head = 0; head < HEADS; head++)
                for (int d = 0; d < DIM; d++)
                    same = same && slot(kv, seq, position, layer, which, head)[d] == stamp(value, layer, which, head);
    return same;
}

/* The model: each sequence is an array of values. */
typedef struct {
    lco_seq *seq;
    float values[MOST_TOKENS];
    int64_t n;
} mirror;

static void compare(const lco_kv *kv, const mirror *mirrors, int n, int step)
{
    CHECK_OK(lco_kv_check(kv, &check_err));
    int64_t tokens = 0, wrong = 0;
    for (int i = 0; i < n; i++) {
        CHECK(lco_seq_length(mirrors[i].seq) == mirrors[i].n, "step %d: length %lld, expected %lld", step,
              (long long)lco_seq_length(mirrors[i].seq), (long long)mirrors[i].n);
        tokens += mirrors[i].n;
        for (int64_t t = 0; t < mirrors[i].n; t++)
            wrong += !holds(kv, mirrors[i].seq, t, mirrors[i].values[t]);
    }
    lco_kv_stats s = lco_kv_get_stats(kv);
    CHECK(wrong == 0, "step %d: %lld tokens changed", step, (long long)wrong);
    CHECK(s.sequences == n && s.tokens_held == tokens, "step %d: %lld sequences, %lld tokens; expected %d, %lld", step,
          (long long)s.sequences, (long long)s.tokens_held, n, (long long)tokens);
    int64_t least = 0; /* distinct pages that lengths alone explain */
    bool seen[256] = {false};
    for (int i = 0; i < n; i++) {
        for (int64_t p = 0; p < (mirrors[i].n + PAGE - 1) / PAGE; p++) {
            int32_t page = lco_seq_table(mirrors[i].seq)[p];
            least += !seen[page];
            seen[page] = true;
        }
    }
    CHECK(s.pages_total - s.pages_free == least, "step %d: %lld pages held, the sequences' lengths explain %lld", step,
          (long long)(s.pages_total - s.pages_free), (long long)least);
}

/* true when the append was made; when there are no pages nothing changes. */
static bool append(lco_kv *kv, mirror *m, int64_t count, float first)
{
    lco_error err;
    int64_t free_before = lco_kv_get_stats(kv).pages_free, length = m->n;
    lco_status status = lco_seq_reserve(m->seq, count, &err);
    if (status == LCO_EPAGES) {
        CHECK_ERROR(status, LCO_EPAGES, &err, "max_tokens|free");
        CHECK(lco_kv_get_stats(kv).pages_free == free_before && lco_seq_length(m->seq) == length, "a refused reserve took something");
        return false;
    }
    CHECK(status == LCO_OK, "%s", err.text);
    for (int64_t i = 0; i < count; i++) {
        m->values[m->n] = first + (float)i;
        write_token(kv, m->seq, m->n, m->values[m->n]);
        m->n++;
    }
    lco_seq_commit(m->seq, NULL, count, true);
    return true;
}

static void random_operations_match_a_plain_model(void)
{
    enum { PAGES = 30 };
    lco_kv *kv = make(PAGES);
    static mirror mirrors[MOST_SEQS];
    int n = 0, refused = 0, forks = 0;
    float next = 1;
    stream s = {.seed = 8};
    for (int step = 0; step < 3000 && harness_failures < 10; step++) {
        int64_t kind = stream_below(&s, 100);
        mirror *m = n > 0 ? &mirrors[stream_below(&s, n)] : NULL;
        if (m == NULL || (kind < 8 && n < MOST_SEQS)) {
            mirrors[n].n = 0;
            CHECK_OK(lco_seq_create(kv, &mirrors[n].seq, &check_err));
            n++;
        } else if (kind < 18 && n < MOST_SEQS) {
            mirror copy = *m;
            CHECK_OK(lco_seq_fork(m->seq, &copy.seq, &check_err));
            mirrors[n++] = copy;
            forks++;
        } else if (kind < 24) {
            lco_seq_destroy(m->seq);
            *m = mirrors[--n];
        } else if (kind < 36) {
            m->n = stream_below(&s, m->n + 1);
            CHECK_OK(lco_seq_truncate(m->seq, m->n, &check_err));
        } else {
            int64_t count = 1 + stream_below(&s, kind < 60 ? 40 : 5);
            if (m->n + count <= MOST_TOKENS)
                refused += !append(kv, m, count, next);
            next += (float)count;
        }
        compare(kv, mirrors, n, step);
    }
    CHECK(refused > 20 && forks > 50 && lco_kv_get_stats(kv).pages_copied > 20, "%d refused, %d forks, %lld copies: too tame", refused,
          forks, (long long)lco_kv_get_stats(kv).pages_copied);
    while (n > 0)
        lco_seq_destroy(mirrors[--n].seq);
    CHECK(lco_kv_get_stats(kv).pages_free == PAGES, "%lld free", (long long)lco_kv_get_stats(kv).pages_free);
    lco_kv_destroy(kv);
}

/* Beams: forked inside a page, each goes its own way; forked on a border, nothing needs a copy. */
static void forks_copy_on_write(void)
{
    for (int64_t length = 30; length <= 32; length++) {
        lco_kv *kv = make(8);
        mirror a = {0}, b;
        CHECK_OK(lco_seq_create(kv, &a.seq, &check_err));
        append(kv, &a, length, 100);
        b = a;
        CHECK_OK(lco_seq_fork(a.seq, &b.seq, &check_err));
        CHECK(lco_kv_get_stats(kv).pages_free == 6 && lco_kv_get_stats(kv).pages_shared == 2, "a fork takes no page");
        append(kv, &a, 3, 200);
        append(kv, &b, 3, 300);
        CHECK(lco_kv_get_stats(kv).pages_copied == (length < 32), "length %lld: %lld copies", (long long)length,
              (long long)lco_kv_get_stats(kv).pages_copied);
        mirror both[2] = {a, b};
        compare(kv, both, 2, (int)length);
        lco_seq_destroy(a.seq);
        compare(kv, &b, 1, (int)length);
        lco_kv_destroy(kv); /* frees b */
    }
}

/* Pages reserved and not used go back, whoever shares what. */
static void reserved_pages_come_back(void)
{
    lco_kv *kv = make(10);
    mirror a = {0};
    lco_seq *fork;
    lco_error err;
    CHECK_OK(lco_seq_create(kv, &a.seq, &check_err));
    append(kv, &a, 20, 1);
    CHECK_OK(lco_seq_reserve(a.seq, 100, &check_err));
    CHECK(lco_kv_get_stats(kv).pages_free == 2, "120 tokens in 8 pages");
    CHECK_OK(lco_seq_reserve(a.seq, 100, &check_err));
    CHECK_OK(lco_seq_reserve(a.seq, 0, &check_err));
    CHECK(lco_kv_get_stats(kv).pages_free == 2, "room is made once");
    CHECK_OK(lco_seq_fork(a.seq, &fork, &check_err));
    CHECK_OK(lco_kv_check(kv, &check_err));
    CHECK_OK(lco_seq_truncate(a.seq, 20, &check_err));
    CHECK(lco_kv_get_stats(kv).pages_free == 8, "%lld free", (long long)lco_kv_get_stats(kv).pages_free);
    CHECK_ERROR(lco_seq_reserve(fork, 1000, &err), LCO_EPAGES, &err, "8 of 10 are free|max_tokens (now 160)");
    CHECK_ERROR(lco_seq_reserve(fork, -1, &err), LCO_EINVAL, &err, "-1");
    CHECK_ERROR(lco_seq_reserve(fork, INT64_MAX, &err), LCO_EINVAL, &err, "9223372036854775807");
    CHECK_ERROR(lco_seq_truncate(fork, 21, &err), LCO_EINVAL, &err, "21|20");
    CHECK_ERROR(lco_seq_truncate(fork, -1, &err), LCO_EINVAL, &err, "-1");
    CHECK(lco_seq_length(fork) == 20 && lco_seq_cache(fork) == kv, "unchanged");
    lco_kv_destroy(kv);
}

/* A copy needs a page too: with none free the shared page stays as it is. */
static void no_page_for_a_copy(void)
{
    lco_kv *kv = make(2);
    mirror a = {0}, b;
    CHECK_OK(lco_seq_create(kv, &a.seq, &check_err));
    append(kv, &a, 20, 1);
    b = a;
    CHECK_OK(lco_seq_fork(a.seq, &b.seq, &check_err));
    CHECK(!append(kv, &b, 1, 50), "there is no page to copy to");
    lco_seq_destroy(a.seq);
    CHECK(append(kv, &b, 1, 50), "alone again, no copy is needed");
    compare(kv, &b, 1, 0);
    lco_kv_destroy(kv);
}

/* Element offsets past 2^31: 1 MiB pages, 8 GiB of address space, of which two pages are touched. */
static void offsets_are_64_bit(void)
{
    lco_kv_options options = {.n_layers = 32, .n_kv_heads = 8, .head_dim = 32, .dtype = LCO_F32, .page_size = 16, .max_tokens = 16 * 8192};
    lco_kv *kv;
    CHECK_OK(lco_kv_create(&options, &kv, &check_err));
    const lco_kv_view *views = lco_kv_views(kv);
    CHECK(views->page_bytes == (size_t)1 << 20, "%zu bytes a page", views->page_bytes);
    lco_seq *seq;
    CHECK_OK(lco_seq_create(kv, &seq, &check_err));
    CHECK_OK(lco_seq_reserve(seq, 16 * 8192, &check_err));
    int64_t at[8192 / 4096 + 1] = {0, 4096, 8191};
    for (int i = 0; i < 3; i++) {
        uint8_t *last = lco_kv_codes(&views[31], lco_seq_table(seq)[at[i]], LCO_VALUE, 7) + 16 * 32 * 4 - 4;
        CHECK((size_t)(last + 4 - views->base) == ((size_t)lco_seq_table(seq)[at[i]] + 1) << 20, "page %lld ends at %zu", (long long)at[i],
              (size_t)(last + 4 - views->base));
        *(float *)(void *)last = (float)at[i] + 0.5f;
    }
    for (int i = 0; i < 3; i++)
        CHECK(*(float *)(void *)(lco_kv_codes(&views[31], lco_seq_table(seq)[at[i]], LCO_VALUE, 7) + 16 * 32 * 4 - 4) ==
                  (float)at[i] + 0.5f,
              "page %lld was overwritten", (long long)at[i]);

    CHECK_OK(lco_seq_truncate(seq, 0, &check_err));
    CHECK_OK(lco_seq_reserve(seq, 16 * 5000, &check_err));
    lco_seq_commit(seq, NULL, 16 * 5000 - 1, true);
    float *open = (float *)(void *)lco_kv_codes(&views[31], lco_seq_table(seq)[4999], LCO_VALUE, 7);
    open[5] = 4999.5f;
    lco_seq *fork;
    CHECK_OK(lco_seq_fork(seq, &fork, &check_err));
    CHECK_OK(lco_seq_reserve(fork, 1, &check_err)); /* copies page 4999 to page 5000 */
    float *copy = (float *)(void *)lco_kv_codes(&views[31], lco_seq_table(fork)[4999], LCO_VALUE, 7);
    CHECK(copy != open && copy[5] == 4999.5f, "the copy holds %g", (double)copy[5]);
    lco_kv_destroy(kv);
}

/* Bytes of a range that the system holds in memory. */
static int64_t resident(const uint8_t *begin, size_t bytes)
{
    const size_t system_page = (size_t)sysconf(_SC_PAGESIZE), n = bytes / system_page;
    unsigned char *state = malloc(n);
    int64_t count = 0;
    CHECK(mincore((void *)(uintptr_t)begin, bytes, state) == 0, "mincore");
    for (size_t i = 0; i < n; i++)
        count += state[i] & 1;
    free(state);
    return count * (int64_t)system_page;
}

/* Memory follows the pages that were written, not max_tokens, and goes back when they are freed. */
static void memory_follows_use(void)
{
    lco_kv_options options = {.n_layers = 8, .n_kv_heads = 8, .head_dim = 64, .dtype = LCO_F16, .page_size = 64, .max_tokens = 64 * 4096};
    lco_kv *kv;
    CHECK_OK(lco_kv_create(&options, &kv, &check_err));
    lco_kv_stats s = lco_kv_get_stats(kv);
    CHECK(s.resident_bytes == 0 && s.reserved_bytes == (int64_t)4096 * s.page_bytes && s.bytes_per_token == 16384,
          "%lld resident, %lld a token", (long long)s.resident_bytes, (long long)s.bytes_per_token);
    lco_seq *seq;
    CHECK_OK(lco_seq_create(kv, &seq, &check_err));
    CHECK_OK(lco_seq_reserve(seq, 640, &check_err));
    const lco_kv_view *views = lco_kv_views(kv);
    for (int p = 0; p < 5; p++)
        memset(views->base + (size_t)lco_seq_table(seq)[p] * views->page_bytes, 1, views->page_bytes);
    s = lco_kv_get_stats(kv);
    CHECK(s.resident_bytes == 5 * s.page_bytes, "%lld bytes resident, 5 pages of %lld written", (long long)s.resident_bytes,
          (long long)s.page_bytes);
    CHECK(resident(views->base, 4096 * views->page_bytes) == s.resident_bytes, "%lld bytes by the system's count",
          (long long)resident(views->base, 4096 * views->page_bytes));
    CHECK_OK(lco_seq_truncate(seq, 0, &check_err));
    CHECK(resident(views->base, 4096 * views->page_bytes) == 0, "freed pages stay in memory");
    s = lco_kv_get_stats(kv);
    CHECK(s.resident_bytes == 0 && s.pages_free == 4096, "%lld bytes resident after all", (long long)s.resident_bytes);
    lco_kv_destroy(kv);
}

static void bad_options_are_refused(void)
{
    const lco_kv_options good = {.n_layers = 1, .n_kv_heads = 1, .head_dim = 4, .dtype = LCO_F16, .page_size = 16, .max_tokens = 100};
    lco_kv_options o;
    lco_kv *kv;
    lco_error err;
#define REFUSED(field, value, text)                                                                                                        \
    o = good;                                                                                                                              \
    o.field = value;                                                                                                                       \
    CHECK_ERROR(lco_kv_create(&o, &kv, &err), LCO_EINVAL, &err, text);                                                                     \
    CHECK(kv == NULL, "a failed create gives no cache")
    REFUSED(page_size, 0, "page_size = 0|16 to 512");
    REFUSED(page_size, 24, "page_size = 24|multiple of 16");
    REFUSED(page_size, 1024, "page_size = 1024");
    REFUSED(max_tokens, 0, "max_tokens = 0");
    REFUSED(max_tokens, -7, "max_tokens = -7");
    REFUSED(max_tokens, INT64_MAX, "max_tokens = 9223372036854775807");
    REFUSED(n_layers, 0, "0 layers");
    REFUSED(head_dim, -1, "head_dim -1");
    o = good;
    o.max_tokens = (int64_t)1 << 34;
    o.n_layers = 1 << 20;
    o.n_kv_heads = 1 << 10;
    CHECK(lco_kv_create(&o, &kv, &err) != LCO_OK && kv == NULL, "a cache of 2^60 bytes");
    CHECK(strstr(err.text, "max_tokens") != NULL, "%s", err.text);
    CHECK_OK(lco_kv_create(&good, &kv, &check_err));
    CHECK(lco_kv_get_options(kv)->max_tokens == 112, "rounded up to %lld", (long long)lco_kv_get_options(kv)->max_tokens);
    lco_kv_destroy(kv);
    lco_kv_destroy(NULL);
    lco_seq_destroy(NULL);
}

/* Every allocation of a cache's life fails in turn. */
static void allocations_fail_in(const lco_kv_options *options)
{
    for (int64_t n = 1;; n++) {
        int64_t live = lco_mem_live();
        lco_error err;
        lco_seq *a = NULL, *b = NULL;
        lco_kv *kv = NULL;
        lco_mem_fail_at(n);
        lco_status status = lco_kv_create(options, &kv, &err);
        if (status == LCO_OK && (status = lco_seq_create(kv, &a, &err)) == LCO_OK &&
            (status = lco_seq_reserve(a, 5 * PAGE, &err)) == LCO_OK) {
            lco_seq_commit(a, NULL, 4 * PAGE + 1, true);
            if ((status = lco_seq_hold(a, PAGE, &err)) == LCO_OK && (status = lco_seq_fork(a, &b, &err)) == LCO_OK)
                status = lco_seq_reserve(b, 12 * PAGE, &err);
        }
        bool untouched = lco_mem_fail_at(0) > 0;
        if (kv != NULL)
            CHECK_OK(lco_kv_check(kv, &check_err));
        CHECK((status == LCO_OK) == untouched, "allocation %lld: status %d", (long long)n, status);
        lco_kv_destroy(kv);
        CHECK(lco_mem_live() == live, "allocation %lld leaves %lld blocks", (long long)n, (long long)(lco_mem_live() - live));
        if (untouched)
            break;
        CHECK_ERROR(status, LCO_ENOMEM, &err, "out of memory");
    }
}

static void allocations_may_fail(void)
{
    lco_kv_options options = {
        .n_layers = LAYERS, .n_kv_heads = HEADS, .head_dim = DIM, .dtype = LCO_F32, .page_size = PAGE, .max_tokens = 20 * PAGE};
    allocations_fail_in(&options);
    options.dtype = LCO_F8_E5M2;
    options.write_buffer = true;
    allocations_fail_in(&options);
}

int main(int argc, char **argv)
{
    const test_case tests[] = {
        TEST(random_operations_match_a_plain_model),
        TEST(forks_copy_on_write),
        TEST(reserved_pages_come_back),
        TEST(no_page_for_a_copy),
        TEST(offsets_are_64_bit),
        TEST(memory_follows_use),
        TEST(bad_options_are_refused),
        TEST(allocations_may_fail),
    };
    return RUN_ALL(tests, argc, argv);
}
