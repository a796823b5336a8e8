/* Windows: which pages rows to come can see, and the release of the others. */
#include <assert.h>

#include "internal.h"

lco_status lco_sight_check(const lco_kv_options *o, lco_error *err)
{
    enum { MOST = 1 << 30 };
    if (o->window < 0 || o->window > MOST || o->model_window < 0)
        return lco_fail(err, LCO_EINVAL, "attention_window = %lld, expected 1 to %d, or none", (long long)o->window, MOST);
    if (o->sinks < 0 || o->sinks > MOST || (o->sinks > 0 && o->window == 0))
        return lco_fail(err, LCO_EINVAL, "attention_sinks = %lld, expected 0 to %d, and 0 without an attention_window", (long long)o->sinks,
                        MOST);
    return LCO_OK;
}

lco_kv_sight lco_kv_layer_sight(const lco_kv *kv, int64_t own)
{
    const lco_kv_options *o = &kv->options;
    if (o->window > 0 && (own == 0 || o->window < own))
        return (lco_kv_sight){.window = o->window, .sinks = o->sinks};
    return (lco_kv_sight){.window = own};
}

bool lco_kv_sees_page(const lco_kv *kv, int64_t position, int64_t index)
{
    const int64_t page_size = kv->options.page_size, window = kv->sight.window;
    return window == 0 || index * page_size < kv->sight.sinks || (index + 1) * page_size > position - window + 1;
}

int64_t lco_kv_most_tokens(const lco_kv *kv, int64_t rows)
{
    return kv->sight.window > 0 ? kv->sight.window + kv->options.page_size + rows : INT64_MAX;
}

/* Pages that n tokens may lie in, wherever they begin. */
static int64_t pages_across(const lco_kv *kv, int64_t n) { return (n - 1) / kv->options.page_size + 2; }

int64_t lco_kv_most_pages(const lco_kv *kv, int64_t base, int64_t tokens, int64_t rows)
{
    const int64_t page_size = kv->options.page_size, all = (tokens + page_size - 1) / page_size;
    if (kv->sight.window == 0)
        return all;
    const int64_t sinks = (kv->sight.sinks + page_size - 1) / page_size;
    const int64_t anchored = base > 0 ? pages_across(kv, base < kv->sight.window ? base : kv->sight.window) : 0;
    const int64_t most = sinks + anchored + pages_across(kv, lco_kv_most_tokens(kv, rows));
    return most < all ? most : all;
}

/* One page_size more than the window stays, so that a few tokens can always be taken back. */
void lco_seq_release_unseen(lco_seq *seq)
{
    lco_kv *kv = seq->kv;
    const int64_t page_size = kv->options.page_size, past = seq->length - page_size - kv->sight.window + 1; /* nobody sees what is before */
    if (kv->sight.window == 0 || past < page_size)
        return;
    const int64_t end = past / page_size, sinks = (kv->sight.sinks + page_size - 1) / page_size;
    for (int64_t i = seq->unseen > sinks ? seq->unseen : sinks; i < end; i++) {
        const bool anchored = i * page_size < seq->anchor && lco_kv_sees_page(kv, seq->anchor, i);
        if (seq->table[i] == LCO_NO_PAGE || anchored)
            continue;
        lco_page_release(kv, seq->table[i]);
        seq->table[i] = LCO_NO_PAGE;
        kv->pages_released++;
    }
    seq->unseen = end > seq->unseen ? end : seq->unseen;
}

lco_status lco_seq_keeps(const lco_seq *seq, int64_t length, lco_error *err)
{
    const lco_kv *kv = seq->kv;
    const int64_t page_size = kv->options.page_size, last = length > 0 ? (length - 1) / page_size : -1;
    int64_t first = -1, end = 0; /* holes among what a row at `length` needs */
    for (int64_t i = 0; i <= last && length < seq->length; i++) {
        if (seq->table[i] != LCO_NO_PAGE || !(lco_kv_sees_page(kv, length, i) || (i == last && length % page_size != 0)))
            continue;
        first = first < 0 ? i : first;
        end = i + 1;
    }
    if (first < 0)
        return LCO_OK;
    for (end = seq->unseen; end > 0 && seq->table[end - 1] != LCO_NO_PAGE; end--)
        continue;
    const int64_t least = end * page_size + kv->sight.window - 1; /* from here on all that the next row sees is there */
    return lco_fail(err, LCO_EINVAL,
                    "truncate to %lld tokens: the next one would see tokens %lld to %lld, which have left the window of %lld and were "
                    "released; truncate to %lld or more, or free the sequence and compute it again",
                    (long long)length, (long long)first * page_size, (long long)((end * page_size < length ? end * page_size : length) - 1),
                    (long long)kv->sight.window, (long long)least);
}
