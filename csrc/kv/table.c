/* Sequences: lists of pages, shared by reference count, copied on the first write to a shared page. */
#include <assert.h>
#include <string.h>

#include "../base/codes.h"
#include "../base/mem.h"
#include "tier.h"

lco_status lco_seq_create(lco_kv *kv, lco_seq **out, lco_error *err)
{
    *out = NULL;
    lco_seq *seq = lco_calloc(1, sizeof *seq);
    if (seq == NULL)
        return lco_fail(err, LCO_ENOMEM, "out of memory for a sequence");
    seq->kv = kv;
    seq->next = kv->sequences;
    if (seq->next != NULL)
        seq->next->previous = seq;
    kv->sequences = seq;
    *out = seq;
    return LCO_OK;
}

static void drop_pages(lco_seq *seq, int64_t keep)
{
    while (seq->n_pages > keep)
        if (seq->table[--seq->n_pages] != LCO_NO_PAGE)
            lco_page_release(seq->kv, seq->table[seq->n_pages]);
    seq->unseen = seq->unseen < keep ? seq->unseen : keep;
}

void lco_seq_destroy(lco_seq *seq)
{
    if (seq == NULL)
        return;
    drop_pages(seq, 0);
    if (seq->previous != NULL)
        seq->previous->next = seq->next;
    else
        seq->kv->sequences = seq->next;
    if (seq->next != NULL)
        seq->next->previous = seq->previous;
    lco_free(seq->ids);
    lco_free(seq->held);
    lco_free(seq->next_tail);
    lco_free(seq->tail);
    lco_free(seq->table);
    lco_free(seq);
}

static lco_status grow_table(lco_seq *seq, int64_t n_pages, lco_error *err)
{
    if (n_pages <= seq->capacity)
        return LCO_OK;
    int64_t capacity = seq->capacity * 2 > n_pages ? seq->capacity * 2 : n_pages + 8;
    int32_t *table = lco_calloc((size_t)capacity, sizeof *table);
    if (table == NULL)
        return lco_fail(err, LCO_ENOMEM, "out of memory for a table of %lld pages", (long long)capacity);
    if (seq->n_pages > 0)
        memcpy(table, seq->table, (size_t)seq->n_pages * sizeof *table);
    lco_free(seq->table);
    seq->table = table;
    seq->capacity = capacity;
    return LCO_OK;
}

static lco_status grow_ids(lco_seq *seq, int64_t n, lco_error *err)
{
    if (n <= seq->id_capacity)
        return LCO_OK;
    int64_t capacity = seq->id_capacity * 2 > n ? seq->id_capacity * 2 : n + 64;
    int32_t *ids = lco_alloc((size_t)capacity * sizeof *ids);
    if (ids == NULL)
        return lco_fail(err, LCO_ENOMEM, "out of memory for the ids of %lld tokens", (long long)capacity);
    if (seq->length > 0)
        memcpy(ids, seq->ids, (size_t)seq->length * sizeof *ids);
    lco_free(seq->ids);
    seq->ids = ids;
    seq->id_capacity = capacity;
    return LCO_OK;
}

static lco_status need_rows(uint8_t **rows, size_t bytes, lco_error *err)
{
    if (bytes == 0 || *rows != NULL || (*rows = lco_calloc(1, bytes)) != NULL) /* zeros: files get it whole */
        return LCO_OK;
    return lco_fail(err, LCO_ENOMEM, "out of memory for the write buffer of a sequence (%zu bytes)", bytes);
}

lco_status lco_seq_need_tail(lco_seq *seq, lco_error *err) { return need_rows(&seq->tail, seq->kv->tail_bytes, err); }

/* Whether n more tokens end in a later stretch than the one begun at `length`. */
static bool leaves_stretch(const lco_kv *kv, int64_t length, int64_t n)
{
    return kv->tail_bytes > 0 && length / kv->options.residual < (length + n) / kv->options.residual;
}

/* The first `tokens` of a tail. */
static void copy_tail(const lco_kv *kv, uint8_t *to, uint8_t *from, int64_t tokens)
{
    for (int32_t i = 0; i < kv->options.n_layers && tokens > 0; i++) {
        const lco_kv_view *view = &kv->views[i];
        for (int64_t j = 0; view->buffered && j < (int64_t)2 * view->n_kv_heads; j++) {
            const int64_t which = j / view->n_kv_heads, head = j % view->n_kv_heads;
            memcpy(lco_tail_rows(view, to + view->tail_offset, which, head), lco_tail_rows(view, from + view->tail_offset, which, head),
                   (size_t)(tokens * view->head_dim) * sizeof(uint16_t));
        }
    }
}

lco_status lco_seq_room(lco_seq *seq, int64_t pages, int64_t tokens, lco_error *err)
{
    lco_status status = grow_table(seq, pages, err);
    if (status == LCO_OK)
        status = grow_ids(seq, tokens, err);
    return status;
}

static int64_t pages_for(const lco_seq *seq, int64_t tokens)
{
    return (tokens + seq->kv->options.page_size - 1) / seq->kv->options.page_size;
}

lco_status lco_seq_fork(const lco_seq *seq, lco_seq **out, lco_error *err)
{
    lco_seq *copy;
    lco_status status = lco_seq_create(seq->kv, &copy, err);
    if (status != LCO_OK)
        return status;
    int64_t n = pages_for(seq, seq->length); /* reserved pages past the length are not shared */
    status = lco_seq_room(copy, n, seq->length, err);
    if (status == LCO_OK && lco_tail_tokens(seq->kv, seq->length) > 0)
        status = lco_seq_need_tail(copy, err);
    if (status != LCO_OK) {
        lco_seq_destroy(copy);
        *out = NULL;
        return status;
    }
    for (; copy->n_pages < n; copy->n_pages++) {
        copy->table[copy->n_pages] = seq->table[copy->n_pages];
        if (copy->table[copy->n_pages] != LCO_NO_PAGE)
            lco_page_share(seq->kv, copy->table[copy->n_pages]);
    }
    copy_tail(seq->kv, copy->tail, seq->tail, lco_tail_tokens(seq->kv, seq->length));
    if (seq->length > 0)
        memcpy(copy->ids, seq->ids, (size_t)seq->length * sizeof *seq->ids);
    copy->length = seq->length;
    copy->exact = seq->exact;
    copy->published = seq->published;
    lco_seq_release_unseen(copy); /* what is kept for the anchor of the other only */
    copy->unseen = copy->unseen > seq->unseen ? copy->unseen : seq->unseen;
    *out = copy;
    return LCO_OK;
}

int64_t lco_seq_length(const lco_seq *seq) { return seq->length; }

const int32_t *lco_seq_ids(const lco_seq *seq) { return seq->ids; }

const int32_t *lco_seq_table(const lco_seq *seq) { return seq->table; }

uint8_t *lco_seq_tail(const lco_seq *seq) { return seq->tail; }

/* A step that begins with a stretch may end in the same tail: there is nothing in it yet. */
uint8_t *lco_seq_next_tail(const lco_seq *seq) { return seq->next_tail != NULL ? seq->next_tail : seq->tail; }

lco_kv *lco_seq_cache(const lco_seq *seq) { return seq->kv; }

/* A copy of the shared page at `index` in its place. There is a free page for it. */
static lco_status own_page(lco_seq *seq, int64_t index, lco_error *err)
{
    lco_kv *kv = seq->kv;
    int32_t page = 0;
    lco_page_take(kv, &page, NULL);
    lco_status status = lco_tier_open(kv, page, false, err);
    if (status == LCO_OK)
        status = lco_tier_page_out(kv, seq->table[index], kv->base + (size_t)page * kv->page_bytes, err);
    if (status != LCO_OK) {
        lco_page_release(kv, page);
        return status;
    }
    lco_firsts_copy(kv, page, seq->table[index]);
    lco_page_release(kv, seq->table[index]);
    seq->table[index] = page;
    kv->pages_copied++;
    return LCO_OK;
}

lco_status lco_seq_reserve(lco_seq *seq, int64_t n, lco_error *err)
{
    lco_kv *kv = seq->kv;
    const int32_t page_size = kv->options.page_size;
    if (n < 0 || n > INT64_MAX / 4)
        return lco_fail(err, LCO_EINVAL, "room for %lld tokens was asked for", (long long)n);
    int64_t want = pages_for(seq, seq->length + n);
    int64_t open = seq->length / page_size; /* index of the page that the next token goes to */
    bool copy = n > 0 && open < seq->n_pages && kv->refs[seq->table[open]] > 1;
    int64_t needed = (want > seq->n_pages ? want - seq->n_pages : 0) + copy;
    if (needed > lco_page_free_count(kv))
        return lco_fail(
            err, LCO_EPAGES,
            "the cache is full: %lld more tokens need %lld pages of %d tokens, %lld of %lld are free; raise max_tokens (now %lld)%s "
            "or free sequences",
            (long long)n, (long long)needed, page_size, (long long)lco_page_free_count(kv), (long long)kv->n_pages,
            (long long)kv->options.max_tokens, kv->options.host_bytes > 0 ? " and host_bytes, give a spill_path," : "");
    lco_status status = lco_seq_room(seq, want, seq->length + n, err);
    if (status == LCO_OK && n > 0)
        status = lco_seq_need_tail(seq, err);
    if (status != LCO_OK)
        return status;
    if (copy && (status = own_page(seq, open, err)) != LCO_OK)
        return status;
    for (; seq->n_pages < want; seq->n_pages++) {
        lco_page_take(kv, &seq->table[seq->n_pages], NULL);
        kv->begins[seq->table[seq->n_pages]] = seq->n_pages == 0;
    }
    return LCO_OK;
}

lco_status lco_seq_open(lco_seq *seq, int64_t n, lco_error *err)
{
    lco_kv *kv = seq->kv;
    const int64_t page_size = kv->options.page_size;
    assert(n >= 0 && seq->length + n <= seq->n_pages * page_size);
    if (lco_tail_tokens(kv, seq->length) > 0 && lco_tail_tokens(kv, seq->length + n) > 0 && leaves_stretch(kv, seq->length, n)) {
        const lco_status status = need_rows(&seq->next_tail, kv->tail_bytes, err);
        if (status != LCO_OK)
            return status;
    }
    if (kv->tier == NULL || n == 0)
        return LCO_OK;
    seq->last_used = kv->tier->step;
    for (int64_t i = seq->length / page_size; i * page_size < seq->length + n; i++) {
        lco_status status = lco_tier_open(kv, seq->table[i], i * page_size < seq->length, err);
        if (status != LCO_OK)
            return status;
        lco_tier_dirty(kv, seq->table[i]);
    }
    lco_tier_recall(seq);
    return LCO_OK;
}

void lco_seq_commit(lco_seq *seq, const int32_t *ids, int64_t n, bool prompt)
{
    assert(n >= 0 && seq->length + n <= seq->n_pages * seq->kv->options.page_size && seq->length + n <= seq->id_capacity);
    const int64_t blocks = (seq->length + n) / LCO_KV_BLOCK - seq->length / LCO_KV_BLOCK;
    if (seq->kv->scaled)
        seq->kv->blocks_quantised += blocks;
    if (seq->next_tail != NULL && leaves_stretch(seq->kv, seq->length, n)) {
        lco_free(seq->tail);
        seq->tail = seq->next_tail;
        seq->next_tail = NULL;
    }
    for (int64_t i = 0; i < n; i++)
        seq->ids[seq->length + i] = ids != NULL ? ids[i] : -1;
    const int64_t page_size = seq->kv->options.page_size, full = seq->length / page_size;
    const lco_kv_options *o = &seq->kv->options;
    if (seq->exact == seq->length && seq->kv->scaled && !o->write_buffer)
        seq->exact = seq->length / LCO_KV_BLOCK * LCO_KV_BLOCK; /* rows of a step see their block as all of the step have scaled it */
    if (prompt && seq->exact == seq->length)
        seq->exact += n;
    seq->kv->bytes_written += n * (int64_t)seq->kv->token_bytes;
    seq->kv->bytes_written += (o->write_buffer ? blocks * LCO_KV_BLOCK : n) * (int64_t)seq->kv->block_bytes / LCO_KV_BLOCK;
    seq->length += n;
    seq->kv->tokens_appended += n;
    for (int64_t i = full; i < seq->length / page_size; i++)
        lco_bounds_page(seq->kv, seq->table[i]);
    lco_seq_release_unseen(seq);
}

/* Positions [begin, end) of a stretch of a layer come back to the tail, from codes but for the first few of the text. */
static void reload_layer(lco_seq *seq, const lco_kv_view *kv, int64_t begin, int64_t end)
{
    const int64_t page = seq->table[begin / kv->page_size], d = kv->head_dim;
    for (int64_t i = 0; i < (int64_t)2 * kv->n_kv_heads; i++) {
        const int64_t which = i / kv->n_kv_heads, head = i % kv->n_kv_heads;
        const uint8_t *codes = lco_kv_codes(kv, page, which, head);
        const float *scales = lco_kv_scales(kv, page, which, head);
        uint16_t *rows = lco_tail_rows(kv, seq->tail + kv->tail_offset, which, head);
        for (int64_t t = begin; t < end; t++) {
            const int64_t slot = t % kv->page_size;
            if (t < kv->n_first)
                memcpy(rows + t * d, lco_first_rows(kv, page, which, head) + t * d, (size_t)d * sizeof *rows);
            for (int64_t j = 0; t >= kv->n_first && j < d; j++)
                rows[(t - begin) * d + j] = lco_f32_to_bf16(lco_decode(codes[slot * d + j], kv->dtype) * scales[slot / LCO_KV_BLOCK]);
        }
    }
}

static void reload_tail(lco_seq *seq, int64_t length)
{
    for (int32_t i = 0; i < seq->kv->options.n_layers; i++)
        if (seq->kv->views[i].buffered)
            reload_layer(seq, &seq->kv->views[i], lco_coded_end(&seq->kv->views[i], length), length);
}

/* Pages that only the old anchor kept go. */
static void move_anchor(lco_seq *seq)
{
    const int64_t unseen = seq->unseen, seen = seq->anchor - seq->kv->sight.window,
                  first = seen > 0 ? seen / seq->kv->options.page_size : 0;
    seq->unseen = first < unseen ? first : unseen;
    seq->anchor = seq->length;
    lco_seq_release_unseen(seq);
    seq->unseen = unseen > seq->unseen ? unseen : seq->unseen;
}

lco_status lco_seq_hold(lco_seq *seq, int64_t n, lco_error *err)
{
    move_anchor(seq);
    const int64_t tokens = lco_tail_tokens(seq->kv, seq->length);
    if (tokens == 0 || !leaves_stretch(seq->kv, seq->length, n))
        return LCO_OK;
    const lco_status status = need_rows(&seq->held, seq->kv->tail_bytes, err);
    if (status != LCO_OK)
        return status;
    copy_tail(seq->kv, seq->held, seq->tail, tokens);
    seq->held_length = seq->length;
    return LCO_OK;
}

/* Of a sequence that is cut to `length`: what is remembered of the stretch at that place is still true. */
static bool as_held(const lco_seq *seq, int64_t length)
{
    return length <= seq->held_length && !leaves_stretch(seq->kv, length, seq->held_length - length);
}

/* The tail of a sequence that is cut to `length`, inside a stretch that was full. */
static lco_status restore_tail(lco_seq *seq, int64_t length, lco_error *err)
{
    if (as_held(seq, length)) {
        copy_tail(seq->kv, seq->tail, seq->held, lco_tail_tokens(seq->kv, length));
        return LCO_OK;
    }
    lco_status status = lco_seq_need_tail(seq, err);
    if (status == LCO_OK)
        status = lco_tier_open(seq->kv, seq->table[length / seq->kv->options.page_size], true, err);
    if (status == LCO_OK)
        reload_tail(seq, length);
    return status;
}

/* Tokens of a sequence cut to `length` that are what a prompt computes. A stretch that came back from codes, and a block whose scale tokens that
 * are gone have set, are not. */
static int64_t exact_after(const lco_seq *seq, int64_t length, bool from_codes)
{
    const bool rescaled = seq->kv->scaled && !seq->kv->options.write_buffer && length < seq->length;
    const int64_t most = from_codes ? length - lco_tail_tokens(seq->kv, length) : rescaled ? length / LCO_KV_BLOCK * LCO_KV_BLOCK : length;
    return seq->exact < most ? seq->exact : most;
}

lco_status lco_seq_truncate(lco_seq *seq, int64_t length, lco_error *err)
{
    if (length < 0 || length > seq->length)
        return lco_fail(err, LCO_EINVAL, "truncate to %lld tokens, expected 0 to the sequence's length %lld", (long long)length,
                        (long long)seq->length);
    lco_status status = lco_seq_keeps(seq, length, err);
    if (status != LCO_OK)
        return status;
    const bool coded = lco_tail_tokens(seq->kv, length) > 0 && leaves_stretch(seq->kv, length, seq->length - length);
    status = coded ? restore_tail(seq, length, err) : LCO_OK;
    if (status != LCO_OK)
        return status;
    seq->exact = exact_after(seq, length, coded && !as_held(seq, length));
    seq->published = seq->published < seq->exact / seq->kv->options.page_size ? seq->published : seq->exact / seq->kv->options.page_size;
    if (length < seq->held_length)
        seq->held_length = 0;
    seq->anchor = length < seq->anchor ? length : seq->anchor;
    seq->length = length;
    drop_pages(seq, pages_for(seq, length));
    return LCO_OK;
}
