/* Holes: pages that left the window, seen from C. */
#include "../../csrc/kv/kv.h"
#include "harness.h"

enum { PAGE = 16, WINDOW = 40 };

static lco_kv *make(int64_t pages, int64_t sinks)
{
    lco_kv *kv = NULL;
    lco_kv_options options = {
        .n_layers = 1, .n_kv_heads = 1, .head_dim = 2, .dtype = LCO_F32, .page_size = PAGE, .max_tokens = pages * PAGE};
    if (sinks > 0) {
        options.window = WINDOW;
        options.sinks = sinks;
    } else {
        options.model_window = WINDOW;
    }
    CHECK_OK(lco_kv_create(&options, &kv, &check_err));
    return kv;
}

static void append(lco_seq *seq, int64_t n)
{
    CHECK_OK(lco_seq_reserve(seq, n, &check_err));
    CHECK_OK(lco_seq_open(seq, n, &check_err));
    lco_seq_commit(seq, NULL, n, true);
    CHECK_OK(lco_kv_check(lco_seq_cache(seq), &check_err));
}

static int64_t used(const lco_kv *kv)
{
    const lco_kv_stats s = lco_kv_get_stats(kv);
    return s.pages_total - s.pages_free;
}

/* Far more tokens than there are pages for. */
static void a_sequence_outgrows_the_pool(void)
{
    for (int64_t sinks = 0; sinks <= 20; sinks += 10) {
        lco_kv *kv = make(8, sinks);
        lco_seq *seq;
        CHECK_OK(lco_seq_create(kv, &seq, &check_err));
        for (int i = 0; i < 1000; i++) {
            append(seq, i % 3 + 1);
            for (int64_t p = 0; p <= lco_seq_length(seq) / PAGE && p * PAGE < lco_seq_length(seq); p++) {
                const bool needed = p * PAGE < sinks || (p + 1) * PAGE > lco_seq_length(seq) - WINDOW + 1;
                CHECK(!needed || lco_seq_table(seq)[p] != LCO_NO_PAGE, "%lld tokens: page %lld is gone", (long long)lco_seq_length(seq),
                      (long long)p);
            }
        }
        CHECK(used(kv) <= 5 + (sinks + PAGE - 1) / PAGE, "%lld pages in use", (long long)used(kv));
        lco_seq_destroy(seq);
        CHECK(used(kv) == 0, "%lld pages were lost", (long long)used(kv));
        lco_kv_destroy(kv);
    }
}

static void what_was_held_stays(void)
{
    lco_kv *kv = make(64, 0);
    lco_seq *seq, *fork;
    lco_error err;
    CHECK_OK(lco_seq_create(kv, &seq, &check_err));
    append(seq, 200);
    CHECK_OK(lco_seq_hold(seq, 500, &check_err));
    for (int i = 0; i < 50; i++)
        append(seq, 10);
    CHECK_OK(lco_seq_fork(seq, &fork, &check_err));
    CHECK_OK(lco_kv_check(kv, &check_err));
    CHECK_ERROR(lco_seq_truncate(fork, 200, &err), LCO_EINVAL, &err, "have left the window of 40");
    CHECK_ERROR(lco_seq_truncate(seq, 199 - PAGE, &err), LCO_EINVAL, &err, "truncate to");
    CHECK_OK(lco_seq_truncate(seq, 200, &check_err));
    CHECK_OK(lco_kv_check(kv, &check_err));
    append(seq, 300);
    CHECK_OK(lco_seq_hold(seq, 0, &check_err));
    CHECK_ERROR(lco_seq_truncate(seq, 200, &err), LCO_EINVAL, &err, "free the sequence");
    lco_seq_destroy(fork);
    CHECK(used(kv) <= 6, "%lld pages in use", (long long)used(kv));
    CHECK_OK(lco_seq_truncate(seq, 0, &check_err));
    CHECK(used(kv) == 0, "%lld pages were lost", (long long)used(kv));
    lco_kv_destroy(kv);
}

int main(int argc, char **argv)
{
    const test_case tests[] = {TEST(a_sequence_outgrows_the_pool), TEST(what_was_held_stays)};
    return RUN_ALL(tests, argc, argv);
}
