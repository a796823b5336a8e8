/* Caches with a write buffer against a plain model: what every sequence's pages and tail hold, whatever was forked, cut, held or given up. */
#include <math.h>
#include <stdlib.h>

#include "../../csrc/base/codes.h"
#include "../../csrc/kv/kv.h"
#include "blocks.h"
#include "harness.h"

enum { LAYERS = 2, HEADS = 2, DIM = 2, RUNS = LAYERS * 2 * HEADS, ELEMENTS = RUNS * DIM, MOST_SEQS = 8, MOST_TOKENS = 208 };

/* The model of a sequence: its 16-bit elements as they are or, where a full stretch came back to the tail, as they came back; and those of full
 * blocks as they were quantised. */
typedef struct {
    lco_seq *seq;
    uint16_t rows[MOST_TOKENS][ELEMENTS], quantised[MOST_TOKENS][ELEMENTS];
    int64_t n;
    uint16_t held[LCO_KV_MOST_RESIDUAL][ELEMENTS];
    int64_t held_length;
} mirror;

static lco_kv_options options_of(lco_dtype dtype, int64_t tokens, int32_t residual, int32_t n_first)
{
    return (lco_kv_options){.n_layers = LAYERS,
                            .n_kv_heads = HEADS,
                            .head_dim = DIM,
                            .dtype = dtype,
                            .page_size = residual == 16 ? 32 : 64,
                            .write_buffer = true,
                            .residual = residual,
                            .n_first = n_first,
                            .max_tokens = tokens};
}

/* Run r of a block of rows, [16][DIM]: its values of one layer, K or V, and head. */
static void run_of(const uint16_t rows[][ELEMENTS], int run, uint16_t out[LCO_KV_BLOCK * DIM])
{
    for (int t = 0; t < LCO_KV_BLOCK; t++)
        memcpy(out + t * DIM, rows[t] + run * DIM, DIM * sizeof *out);
}

static uint8_t *codes_at(const lco_kv_view *views, const lco_seq *seq, int64_t block, int run, float **scale)
{
    const lco_kv_view *view = &views[run / (2 * HEADS)];
    const int64_t page = lco_seq_table(seq)[block * LCO_KV_BLOCK / view->page_size], at = block % (view->page_size / LCO_KV_BLOCK);
    const int which = run / HEADS % 2, head = run % HEADS;
    *scale = lco_kv_scales(view, page, which, head) + at;
    return lco_kv_codes(view, page, which, head) + at * LCO_KV_BLOCK * DIM;
}

static uint16_t *tail_at(const lco_kv_view *views, uint8_t *tail, int run)
{
    const lco_kv_view *view = &views[run / (2 * HEADS)];
    return lco_tail_rows(view, tail + view->tail_offset, run / HEADS % 2, run % HEADS);
}

static uint16_t *first_at(const lco_kv_view *views, const lco_seq *seq, int64_t t, int run)
{
    const lco_kv_view *view = &views[run / (2 * HEADS)];
    return lco_first_rows(view, lco_seq_table(seq)[0], run / HEADS % 2, run % HEADS) + t * DIM;
}

/* What rope_append does with rows [from, to) of the model: whole blocks to the page, the unfinished stretch to the tail it belongs to, the first rows
 * to their place. */
static void write_rows(const lco_kv *kv, mirror *m, int64_t from, int64_t to)
{
    const lco_kv_view *views = lco_kv_views(kv);
    for (int64_t start = from / LCO_KV_BLOCK * LCO_KV_BLOCK; start + LCO_KV_BLOCK <= to; start += LCO_KV_BLOCK) {
        memcpy(m->quantised[start], m->rows[start], LCO_KV_BLOCK * sizeof m->rows[0]);
        for (int run = 0; run < RUNS; run++) {
            uint16_t values[LCO_KV_BLOCK * DIM];
            float *scale;
            uint8_t *codes = codes_at(views, m->seq, start / LCO_KV_BLOCK, run, &scale);
            run_of(&m->rows[start], run, values);
            encode_block(codes, scale, values, LCO_KV_BLOCK * DIM, views->dtype);
        }
    }
    const int64_t unfinished = to / views->residual * views->residual;
    uint8_t *tail = unfinished == from / views->residual * views->residual ? lco_seq_tail(m->seq) : lco_seq_next_tail(m->seq);
    for (int64_t t = unfinished > from ? unfinished : from; t < to; t++)
        for (int run = 0; run < RUNS; run++)
            memcpy(tail_at(views, tail, run) + (t - unfinished) * DIM, m->rows[t] + run * DIM, DIM * sizeof(uint16_t));
    for (int64_t t = from; t < to && t < views->n_first; t++)
        for (int run = 0; run < RUNS; run++)
            memcpy(first_at(views, m->seq, t, run), m->rows[t] + run * DIM, DIM * sizeof(uint16_t));
}

static int64_t differences(const lco_kv *kv, const mirror *m)
{
    const lco_kv_view *views = lco_kv_views(kv);
    int64_t wrong = 0;
    for (int run = 0; run < RUNS; run++) {
        for (int64_t block = 0; block < m->n / LCO_KV_BLOCK; block++) {
            uint16_t values[LCO_KV_BLOCK * DIM];
            uint8_t codes[LCO_KV_BLOCK * DIM];
            float scale, *found_scale;
            const uint8_t *found = codes_at(views, m->seq, block, run, &found_scale);
            run_of(&m->quantised[block * LCO_KV_BLOCK], run, values);
            encode_block(codes, &scale, values, LCO_KV_BLOCK * DIM, views->dtype);
            wrong += memcmp(codes, found, sizeof codes) != 0 || scale != *found_scale;
        }
        for (int64_t t = m->n / views->residual * views->residual; t < m->n; t++)
            wrong += memcmp(tail_at(views, lco_seq_tail(m->seq), run) + t % views->residual * DIM, m->rows[t] + run * DIM,
                            DIM * sizeof(uint16_t)) != 0;
        for (int64_t t = 0; t < m->n && t < views->n_first; t++)
            wrong += memcmp(first_at(views, m->seq, t, run), m->rows[t] + run * DIM, DIM * sizeof(uint16_t)) != 0;
    }
    return wrong;
}

static void new_rows(mirror *m, int64_t from, int64_t to, stream *s)
{
    for (int64_t t = from; t < to; t++)
        for (int i = 0; i < ELEMENTS; i++)
            m->rows[t][i] = lco_f32_to_bf16((float)((stream_uniform(s) - 0.5) * exp2(20 * stream_uniform(s) - 10)));
}

static bool append(lco_kv *kv, mirror *m, int64_t count, stream *s)
{
    lco_error err;
    const lco_status status = lco_seq_reserve(m->seq, count, &err);
    CHECK(status == LCO_OK || status == LCO_EPAGES, "%s", err.text);
    if (status != LCO_OK)
        return false;
    CHECK_OK(lco_seq_open(m->seq, count, &check_err));
    new_rows(m, m->n, m->n + count, s);
    write_rows(kv, m, m->n, m->n + count);
    lco_seq_commit(m->seq, NULL, count, true);
    m->n += count;
    return true;
}

/* A step that writes its rows and then fails. */
static void fail(lco_kv *kv, mirror *m, int64_t count, stream *s)
{
    static mirror copy;
    lco_error err;
    copy = *m;
    if (lco_seq_reserve(m->seq, count, &err) == LCO_OK) {
        CHECK_OK(lco_seq_open(m->seq, count, &check_err));
        new_rows(&copy, m->n, m->n + count, s);
        write_rows(kv, &copy, m->n, m->n + count);
    }
    CHECK_OK(lco_seq_truncate(m->seq, m->n, &check_err));
}

static void hold(mirror *m, int64_t residual)
{
    CHECK_OK(lco_seq_hold(m->seq, residual, &check_err));
    if (m->n % residual == 0)
        return;
    m->held_length = m->n;
    memcpy(m->held, m->rows[m->n / residual * residual], (size_t)residual * sizeof m->held[0]);
}

/* Rows [start, length) as their codes say. */
static void reload(mirror *m, int64_t start, int64_t length, const lco_kv_options *o)
{
    for (int64_t block = start; block < length; block += LCO_KV_BLOCK)
        for (int run = 0; run < RUNS; run++) {
            uint16_t values[LCO_KV_BLOCK * DIM];
            uint8_t codes[LCO_KV_BLOCK * DIM];
            float scale;
            run_of(&m->quantised[block], run, values);
            encode_block(codes, &scale, values, LCO_KV_BLOCK * DIM, o->dtype);
            for (int64_t i = 0; i < LCO_KV_BLOCK * DIM; i++)
                if (block + i / DIM >= o->n_first)
                    m->rows[block + i / DIM][run * DIM + i % DIM] = lco_f32_to_bf16(lco_decode(codes[i], o->dtype) * scale);
        }
}

static void cut(mirror *m, int64_t length, const lco_kv_options *o)
{
    const int64_t stretch = length / o->residual, start = stretch * o->residual;
    const bool held = length <= m->held_length && stretch == m->held_length / o->residual;
    if (length > start && stretch < m->n / o->residual && held)
        memcpy(m->rows[start], m->held, (size_t)o->residual * sizeof m->held[0]);
    else if (length > start && stretch < m->n / o->residual)
        reload(m, start, length, o);
    if (length < m->held_length)
        m->held_length = 0;
    m->n = length;
    CHECK_OK(lco_seq_truncate(m->seq, length, &check_err));
}

static void random_operations(lco_dtype dtype, int32_t residual, int32_t n_first)
{
    const lco_kv_options options = options_of(dtype, 32 * 16, residual, n_first);
    static mirror mirrors[MOST_SEQS];
    lco_kv *kv;
    CHECK_OK(lco_kv_create(&options, &kv, &check_err));
    int n = 0, refused = 0;
    stream s = {.seed = 30 + dtype};
    for (int step = 0; step < 2500 && harness_failures < 5; step++) {
        const int64_t kind = stream_below(&s, 100);
        mirror *m = n > 0 ? &mirrors[stream_below(&s, n)] : NULL;
        if (m == NULL || (kind < 6 && n < MOST_SEQS)) {
            mirrors[n] = (mirror){0};
            CHECK_OK(lco_seq_create(kv, &mirrors[n++].seq, &check_err));
        } else if (kind < 16 && n < MOST_SEQS) {
            mirrors[n] = *m;
            mirrors[n].held_length = 0;
            CHECK_OK(lco_seq_fork(m->seq, &mirrors[n++].seq, &check_err));
        } else if (kind < 20) {
            lco_seq_destroy(m->seq);
            *m = mirrors[--n];
        } else if (kind < 30) {
            cut(m, stream_below(&s, m->n + 1), &options);
        } else if (kind < 40) {
            cut(m, m->held_length > 0 ? m->held_length : m->n, &options);
        } else if (kind < 50) {
            hold(m, residual);
        } else {
            const int64_t count = kind < 70 ? 1 : 1 + stream_below(&s, 40);
            if (m->n + count <= MOST_TOKENS && kind % 4 == 0)
                fail(kv, m, count, &s);
            else if (m->n + count <= MOST_TOKENS)
                refused += !append(kv, m, count, &s);
        }
        CHECK_OK(lco_kv_check(kv, &check_err));
        for (int i = 0; i < n; i++)
            CHECK(lco_seq_length(mirrors[i].seq) == mirrors[i].n && differences(kv, &mirrors[i]) == 0,
                  "type %d, stretches of %d, step %d, operation %lld: %lld runs of sequence %d of %lld tokens differ", dtype, residual,
                  step, (long long)kind, (long long)differences(kv, &mirrors[i]), i, (long long)mirrors[i].n);
    }
    CHECK(refused > 5 && lco_kv_get_stats(kv).pages_copied > 10, "%d refused, %lld copies: too tame", refused,
          (long long)lco_kv_get_stats(kv).pages_copied);
    while (n > 0)
        lco_seq_destroy(mirrors[--n].seq);
    CHECK(lco_kv_get_stats(kv).tail_bytes == 0, "%lld", (long long)lco_kv_get_stats(kv).tail_bytes);
    lco_kv_destroy(kv);
}

static void random_operations_match_a_plain_model(void)
{
    for (lco_dtype dtype = LCO_F8_E4M3; dtype <= LCO_I8; dtype++) {
        random_operations(dtype, 16, 0);
        random_operations(dtype, 32, 16);
        random_operations(dtype, 64, 4);
    }
}

/* Counters, and when there is a second tail: only when a stretch that was begun is left for another one that is not filled. */
static void tails_are_counted(void)
{
    const lco_kv_options options = options_of(LCO_I8, 320, 32, 4);
    static mirror m;
    lco_kv *kv;
    lco_seq *fork;
    stream s = {.seed = 2};
    CHECK_OK(lco_kv_create(&options, &kv, &check_err));
    const lco_kv_view *views = lco_kv_views(kv);
    const size_t bytes = lco_tail_bytes(views) * LAYERS;
    m = (mirror){0};
    CHECK_OK(lco_seq_create(kv, &m.seq, &check_err));
    CHECK(lco_seq_tail(m.seq) == NULL && lco_seq_next_tail(m.seq) == NULL, "a tail before the first reserve");
    CHECK_OK(lco_seq_hold(m.seq, LCO_KV_BLOCK, &check_err));
    for (int64_t n = 1; n <= 50; n++) {
        append(kv, &m, 1, &s);
        CHECK(lco_seq_next_tail(m.seq) == lco_seq_tail(m.seq), "token %lld", (long long)n);
        CHECK(lco_kv_get_stats(kv).blocks_quantised == n / LCO_KV_BLOCK, "token %lld", (long long)n);
    }
    CHECK(lco_kv_get_stats(kv).tail_bytes == (int64_t)bytes, "%lld", (long long)lco_kv_get_stats(kv).tail_bytes);
    CHECK_OK(lco_seq_reserve(m.seq, 100, &check_err));
    CHECK_OK(lco_seq_open(m.seq, 14, &check_err));
    CHECK(lco_seq_next_tail(m.seq) == lco_seq_tail(m.seq), "to the end of the stretch");
    CHECK_OK(lco_seq_open(m.seq, 15, &check_err));
    CHECK(lco_seq_next_tail(m.seq) != lco_seq_tail(m.seq), "past it");
    CHECK(lco_kv_get_stats(kv).tail_bytes == (int64_t)(2 * bytes), "%lld", (long long)lco_kv_get_stats(kv).tail_bytes);
    uint8_t *next = lco_seq_next_tail(m.seq);
    append(kv, &m, 15, &s);
    CHECK(lco_seq_tail(m.seq) == next && lco_seq_next_tail(m.seq) == next, "it takes the place of the first");
    CHECK_OK(lco_seq_fork(m.seq, &fork, &check_err));
    CHECK(lco_seq_tail(fork) != lco_seq_tail(m.seq), "a tail is shared");
    append(kv, &m, 31, &s);
    CHECK(m.n % 32 == 0, "%lld", (long long)m.n);
    lco_seq *empty;
    CHECK_OK(lco_seq_fork(m.seq, &empty, &check_err));
    CHECK(lco_seq_tail(empty) == NULL, "a fork at a stretch's end has nothing in a tail");
    lco_seq_destroy(empty);
    CHECK_OK(lco_seq_reserve(m.seq, 40, &check_err));
    CHECK_OK(lco_seq_open(m.seq, 40, &check_err));
    CHECK(lco_seq_next_tail(m.seq) == lco_seq_tail(m.seq), "nothing is in the tail that the next stretch may not take");
    CHECK(lco_kv_get_stats(kv).tail_bytes == (int64_t)(2 * bytes), "%lld", (long long)lco_kv_get_stats(kv).tail_bytes);
    CHECK(lco_kv_get_stats(kv).first_bytes == (int64_t)(lco_first_bytes(views) * LAYERS), "of one page");
    CHECK_OK(lco_seq_hold(fork, 30, &check_err));
    CHECK(lco_kv_get_stats(kv).tail_bytes == (int64_t)(2 * bytes), "nothing is held for tokens that stay in the stretch");
    CHECK_OK(lco_seq_hold(fork, 31, &check_err));
    CHECK(lco_kv_get_stats(kv).tail_bytes == (int64_t)(3 * bytes), "what is held for going back is counted too");
    lco_kv_destroy(kv);
}

/* The memory of first tokens goes back with their page. What the system gives next is zeros. */
static void first_tokens_give_their_memory_back(void)
{
    enum { WIDE = 2048 };
    lco_kv_options options = options_of(LCO_I8, 320, 64, 16);
    lco_kv *kv;
    lco_seq *seq, *fork;
    options.head_dim = WIDE;
    CHECK_OK(lco_kv_create(&options, &kv, &check_err));
    const lco_kv_view *view = lco_kv_views(kv);
    CHECK_OK(lco_seq_create(kv, &seq, &check_err));
    CHECK_OK(lco_seq_reserve(seq, 70, &check_err));
    const int64_t page = lco_seq_table(seq)[0], n = (int64_t)(lco_first_bytes(view) / sizeof(uint16_t));
    uint16_t *rows = lco_first_rows(view, page, LCO_KEY, 0);
    memset(rows, 0x7F, (size_t)n * sizeof *rows);
    lco_seq_commit(seq, NULL, 70, true);
    CHECK_OK(lco_seq_fork(seq, &fork, &check_err));
    lco_seq_destroy(seq);
    CHECK(rows[n / 2] == 0x7F7F, "the fork has them");
    CHECK(lco_kv_get_stats(kv).first_bytes == (int64_t)(lco_first_bytes(view) * LAYERS), "of one page");
    lco_seq_destroy(fork);
    CHECK(rows[n / 2] == 0 && lco_kv_get_stats(kv).first_bytes == 0, "nobody has");
    lco_kv_destroy(kv);
}

static void stretches_fit_pages(void)
{
    const struct {
        int32_t page_size, residual, n_first;
        bool write_buffer;
        const char *text;
    } wrong[] = {
        {64, 48, 0, true, "residual_length = 48|divides page_size = 64"},
        {128, 128, 0, true, "residual_length = 128|to 64"},
        {64, 8, 0, true, "residual_length = 8"},
        {64, -16, 0, true, "residual_length = -16"},
        {64, 64, 17, true, "sink_length = 17|0 to 16"},
        {64, 64, -1, true, "sink_length = -1"},
        {64, 0, 4, false, "sink_length = 4|write_buffer"},
        {64, 64, 0, false, "residual_length = 64|write_buffer"},
    };
    for (size_t i = 0; i < sizeof wrong / sizeof *wrong; i++) {
        lco_kv_options options = options_of(LCO_I8, 320, wrong[i].residual, wrong[i].n_first);
        lco_error err;
        lco_kv *kv;
        options.page_size = wrong[i].page_size;
        options.write_buffer = wrong[i].write_buffer;
        CHECK_ERROR(lco_kv_create(&options, &kv, &err), LCO_EINVAL, &err, wrong[i].text);
    }
    const int32_t longest[][2] = {{16, 16}, {32, 32}, {48, 48}, {64, 64}, {80, 16}, {96, 48}, {128, 64}, {512, 64}};
    for (size_t i = 0; i < sizeof longest / sizeof *longest; i++) {
        lco_kv_options options = options_of(LCO_I8, 1024, 0, 4);
        lco_kv *kv;
        options.page_size = longest[i][0];
        CHECK_OK(lco_kv_create(&options, &kv, &check_err));
        CHECK(lco_kv_get_options(kv)->residual == longest[i][1], "pages of %d: %d", longest[i][0], lco_kv_get_options(kv)->residual);
        lco_kv_destroy(kv);
    }
}

static void a_write_buffer_is_for_one_byte_codes(void)
{
    for (lco_dtype dtype = LCO_F32; dtype <= LCO_BF16; dtype++) {
        const lco_kv_options options = options_of(dtype, 32, 16, 0);
        lco_error err;
        lco_kv *kv;
        CHECK_ERROR(lco_kv_create(&options, &kv, &err), LCO_EINVAL, &err, "write buffer|one-byte");
    }
}

int main(int argc, char **argv)
{
    const test_case tests[] = {
        TEST(random_operations_match_a_plain_model), TEST(tails_are_counted),
        TEST(first_tokens_give_their_memory_back),   TEST(stretches_fit_pages),
        TEST(a_write_buffer_is_for_one_byte_codes),
    };
    return RUN_ALL(tests, argc, argv);
}
