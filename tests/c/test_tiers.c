/* Pages in memory and in a file: contents against a plain model, and every read and write of the file failing in turn. */
#include <errno.h>
#include <stdlib.h>

#include "../../csrc/base/file.h"
#include "../../csrc/kv/kv.h"
#include "harness.h"

enum { PAGE = 16, LAYERS = 3, HEADS = 2, DIM = 8, HOT = 4, MOST_SEQS = 6, MOST_TOKENS = 300 };

static lco_kv_options options_of(lco_dtype dtype)
{
    lco_kv_options options = {.n_layers = LAYERS, .n_kv_heads = HEADS, .head_dim = DIM, .dtype = dtype, .page_size = PAGE};
    options.max_tokens = 60 * PAGE;
    options.host_bytes = HOT * LAYERS * 2 * HEADS * PAGE * DIM * 4; /* float32 pages: a multiple of 64 without rounding */
    options.spill_path = "/tmp";
    return options;
}

typedef struct {
    lco_seq *seq;
    float values[MOST_TOKENS];
    int64_t n;
} mirror;

static float stamp(float value, int layer, int which, int head) { return value * 16 + (float)(layer * 4 + which * 2 + head); }

/* Appends `n` tokens as a step does. */
static lco_status append(lco_kv *kv, mirror *m, int64_t n, float value, lco_error *err)
{
    const lco_kv_view *views = lco_kv_views(kv);
    lco_kv_begin_step(kv);
    lco_status status = lco_seq_reserve(m->seq, n, err);
    if (status == LCO_OK)
        status = lco_seq_open(m->seq, n, err);
    for (int64_t t = m->n; status == LCO_OK && t < m->n + n; t++) {
        const int32_t page = lco_seq_table(m->seq)[t / PAGE];
        CHECK(!lco_kv_away(&views[0], page), "rows go to page %d, which is away", page);
        for (int i = 0; i < LAYERS * 2 * HEADS; i++) {
            const int layer = i / (2 * HEADS), which = i / HEADS % 2, head = i % HEADS;
            float *at = (float *)(void *)lco_kv_codes(&views[layer], page, which, head) + t % PAGE * DIM;
            for (int d = 0; d < DIM; d++)
                at[d] = stamp(value + (float)t, layer, which, head);
        }
        m->values[t] = value + (float)t;
    }
    if (status != LCO_OK) {
        (void)lco_seq_truncate(m->seq, m->n, NULL);
        return status;
    }
    lco_seq_commit(m->seq, NULL, n, true);
    m->n += n;
    return LCO_OK;
}

/* Numbers that differ from the model, read head by head and all heads at once by two threads' readers. */
static int64_t differences(lco_kv *kv, const mirror *m)
{
    const lco_kv_view *views = lco_kv_views(kv);
    int64_t wrong = 0;
    lco_kv_begin_step(kv);
    for (int layer = 0; layer < LAYERS; layer++) {
        for (int64_t t = 0; t < m->n; t++) {
            const int32_t page = lco_seq_table(m->seq)[t / PAGE];
            for (int head = 0; head < HEADS; head++) {
                const uint8_t *one = lco_kv_read(&views[layer], 0, page, -1, head, 1),
                              *all = lco_kv_read(&views[layer], 1, page, page, 0, HEADS);
                for (int which = 0; which < 2; which++) {
                    const float *a = (const float *)(const void *)lco_read_codes(&views[layer], one, which, head) + t % PAGE * DIM;
                    const float *b = (const float *)(const void *)lco_read_codes(&views[layer], all, which, head) + t % PAGE * DIM;
                    for (int d = 0; d < DIM; d++)
                        wrong += a[d] != stamp(m->values[t], layer, which, head) || b[d] != a[d];
                }
            }
        }
    }
    return wrong;
}

static void random_use(void)
{
    static mirror mirrors[MOST_SEQS];
    const lco_kv_options options = options_of(LCO_F32);
    lco_kv *kv;
    stream s = {.seed = 4};
    int n = 0;
    CHECK_OK(lco_kv_create(&options, &kv, &check_err));
    for (int step = 0; step < 3000 && harness_failures == 0; step++) {
        const int64_t what = stream_below(&s, 10), at = n > 0 ? stream_below(&s, n) : 0;
        mirror *m = &mirrors[at];
        lco_error err;
        if (n == 0 || (what == 0 && n < MOST_SEQS)) {
            mirrors[n] = (mirror){0};
            CHECK_OK(lco_seq_create(kv, &mirrors[n++].seq, &check_err));
        } else if (what == 1 && n < MOST_SEQS) {
            mirrors[n] = *m;
            CHECK_OK(lco_seq_fork(m->seq, &mirrors[n++].seq, &check_err));
        } else if (what == 2) {
            lco_seq_destroy(m->seq);
            *m = mirrors[--n];
        } else if (what == 3) {
            m->n = stream_below(&s, m->n + 1);
            CHECK_OK(lco_seq_truncate(m->seq, m->n, &check_err));
        } else if (what == 4) {
            CHECK(differences(kv, m) == 0, "step %d", step);
        } else {
            const int64_t most = MOST_TOKENS - m->n < 2 * PAGE ? MOST_TOKENS - m->n : 2 * PAGE,
                          count = most > 0 ? 1 + stream_below(&s, most) : 0;
            const lco_status status = append(kv, m, count, (float)(step % 1000), &err);
            CHECK(status == LCO_OK || status == LCO_EPAGES, "step %d: %s", step, err.text);
        }
        CHECK_OK(lco_kv_check(kv, &check_err));
    }
    const lco_kv_stats stats = lco_kv_get_stats(kv);
    CHECK(stats.pages_spilled > 100 && stats.slices_fetched > 100 && stats.pages_restored > 10, "%lld spilled, %lld slices, %lld restored",
          (long long)stats.pages_spilled, (long long)stats.slices_fetched, (long long)stats.pages_restored);
    lco_kv_destroy(kv);
}

/* The n-th access to the file fails: an error, or a page that is known as lost; afterwards everything is as if it had not been tried. */
static void accesses_fail(void)
{
    static mirror a, b;
    const lco_kv_options options = options_of(LCO_F32);
    for (int64_t n = 1;; n++) {
        lco_kv *kv;
        lco_error err = {0};
        CHECK_OK(lco_kv_create(&options, &kv, &check_err));
        a = b = (mirror){0};
        CHECK_OK(lco_seq_create(kv, &a.seq, &check_err));
        lco_file_fail_at(n, ENOSPC);
        lco_status status = LCO_OK;
        for (int i = 0; status == LCO_OK && i < 6; i++)
            status = append(kv, &a, 20, 100, &err);
        if (status == LCO_OK && (status = lco_seq_fork(a.seq, &b.seq, &err)) == LCO_OK) {
            lco_seq *seq = b.seq;
            b = a;
            b.seq = seq;
            b.n = 40; /* in an old page, which is away */
            status = lco_seq_truncate(b.seq, b.n, &err);
            if (status == LCO_OK)
                status = append(kv, &b, 20, 500, &err);
        }
        for (int i = 0; status == LCO_OK && i < 2; i++) {
            const mirror *m = i == 0 ? &a : &b;
            const bool same = differences(kv, m) == 0;
            status = lco_seq_lost(m->seq, &err);
            CHECK(same == (status == LCO_OK), "access %lld: a page that is not there was not told", (long long)n);
        }
        const bool untouched = lco_file_fail_at(0, 0) > 0;
        CHECK((status == LCO_OK) == untouched || status == LCO_OK, "access %lld: status %d", (long long)n, status);
        if (status != LCO_OK)
            CHECK_ERROR(status, LCO_EIO, &err, "/tmp|No space left");
        CHECK_OK(lco_kv_check(kv, &check_err));
        CHECK(differences(kv, &a) == 0 && (b.seq == NULL || differences(kv, &b) == 0), "access %lld: something was lost", (long long)n);
        CHECK_OK(append(kv, &a, 20, 700, &check_err));
        CHECK(differences(kv, &a) == 0, "access %lld: it can't go on", (long long)n);
        lco_kv_destroy(kv);
        if (untouched)
            break;
    }
}

int main(int argc, char **argv)
{
    const test_case tests[] = {TEST(random_use), TEST(accesses_fail)};
    return RUN_ALL(tests, argc, argv);
}
