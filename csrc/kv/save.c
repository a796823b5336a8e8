/* Pages and sequences out of a cache and into one, for files. What a file holds is the Python layer's. */
#include <string.h>

#include "tier.h"

static lco_status check_held(const lco_kv *kv, int32_t page, lco_error *err)
{
    if (page >= 0 && page < kv->n_touched && kv->refs[page] > 0)
        return LCO_OK;
    return lco_fail(err, LCO_EINVAL, "page %d, expected one that is held", page);
}

lco_status lco_kv_page_out(lco_kv *kv, int32_t page, uint8_t *bytes, lco_error *err)
{
    lco_status status = check_held(kv, page, err);
    return status == LCO_OK ? lco_tier_page_out(kv, page, bytes, err) : status;
}

lco_status lco_kv_page_in(lco_kv *kv, const uint8_t *bytes, int32_t *page, lco_error *err)
{
    if (lco_page_free_count(kv) == 0)
        return lco_fail(err, LCO_EPAGES,
                        "the cache is full: all of its %lld pages are in use; raise max_tokens (now %lld) or free sequences",
                        (long long)kv->n_pages, (long long)kv->options.max_tokens);
    lco_page_take(kv, page, NULL);
    memcpy(kv->base + (size_t)*page * kv->page_bytes, bytes, kv->page_bytes);
    lco_bounds_page(kv, *page); /* of a page that is not full yet they are found again when it is */
    lco_status status = lco_tier_settle(kv, *page, err);
    if (status != LCO_OK)
        lco_page_release(kv, *page);
    return status;
}

size_t lco_kv_first_bytes(const lco_kv *kv) { return kv->first_bytes; }

lco_status lco_kv_first_out(const lco_kv *kv, int32_t page, uint8_t *bytes, lco_error *err)
{
    lco_status status = check_held(kv, page, err);
    if (status == LCO_OK && !kv->begins[page])
        status = lco_fail(err, LCO_EINVAL, "page %d, expected one that a text begins with", page);
    if (status == LCO_OK && kv->first_bytes > 0)
        memcpy(bytes, kv->firsts + (size_t)page * kv->first_bytes, kv->first_bytes);
    return status;
}

lco_status lco_kv_first_in(lco_kv *kv, int32_t page, const uint8_t *bytes, lco_error *err)
{
    lco_status status = check_held(kv, page, err);
    if (status != LCO_OK)
        return status;
    kv->begins[page] = true;
    if (kv->first_bytes > 0)
        memcpy(kv->firsts + (size_t)page * kv->first_bytes, bytes, kv->first_bytes);
    return LCO_OK;
}

lco_status lco_kv_page_drop(lco_kv *kv, int32_t page, lco_error *err)
{
    lco_status status = check_held(kv, page, err);
    if (status == LCO_OK)
        lco_page_release(kv, page);
    return status;
}

lco_seq_image lco_seq_get_image(const lco_seq *seq)
{
    const int64_t pages = (seq->length + seq->kv->options.page_size - 1) / seq->kv->options.page_size;
    return (lco_seq_image){.length = seq->length,
                           .exact = seq->exact,
                           .unseen = seq->unseen < pages ? seq->unseen : pages,
                           .n_pages = pages,
                           .ids = seq->ids,
                           .table = seq->table,
                           .tail = seq->tail,
                           .tail_bytes = lco_tail_tokens(seq->kv, seq->length) > 0 ? seq->kv->tail_bytes : 0};
}

static lco_status check_image(const lco_kv *kv, const lco_seq_image *image, lco_error *err)
{
    const int64_t page_size = kv->options.page_size, n = image->n_pages;
    if (image->length < 0 || image->length > INT64_MAX / 4 || n != (image->length + page_size - 1) / page_size || image->exact < 0 ||
        image->exact > image->length || image->unseen < 0 || image->unseen > n)
        return lco_fail(err, LCO_EFORMAT,
                        "a sequence of %lld tokens in %lld pages of %lld, of which %lld tokens are exact and %lld pages unseen",
                        (long long)image->length, (long long)n, (long long)page_size, (long long)image->exact, (long long)image->unseen);
    const size_t tail = lco_tail_tokens(kv, image->length) > 0 ? kv->tail_bytes : 0;
    if (image->tail_bytes != tail)
        return lco_fail(err, LCO_EFORMAT, "a write buffer of %zu bytes, expected %zu", image->tail_bytes, tail);
    for (int64_t i = 0; i < n; i++) {
        const int32_t page = image->table[i];
        const bool hole = page == LCO_NO_PAGE && i < image->unseen && !lco_kv_sees_page(kv, image->length, i);
        if (!hole && (page < 0 || page >= kv->n_touched || kv->refs[page] == 0))
            return lco_fail(err, LCO_EFORMAT, "page %lld of a sequence is number %d, which is none", (long long)i, page);
        if (!hole && kv->begins[page] != (i == 0))
            return lco_fail(err, LCO_EFORMAT, "page %lld of a sequence is number %d, which %s", (long long)i, page,
                            i == 0 ? "no text begins with" : "a text begins with");
    }
    return LCO_OK;
}

lco_status lco_seq_from_image(lco_kv *kv, const lco_seq_image *image, lco_seq **out, lco_error *err)
{
    lco_seq *seq = NULL;
    *out = NULL;
    lco_status status = check_image(kv, image, err);
    if (status == LCO_OK)
        status = lco_seq_create(kv, &seq, err);
    if (status == LCO_OK)
        status = lco_seq_room(seq, image->n_pages, image->length, err);
    if (status == LCO_OK && image->tail_bytes > 0)
        status = lco_seq_need_tail(seq, err);
    if (status != LCO_OK) {
        lco_seq_destroy(seq);
        return status;
    }
    if (image->length > 0)
        memcpy(seq->ids, image->ids, (size_t)image->length * sizeof *seq->ids);
    if (image->tail_bytes > 0)
        memcpy(lco_seq_tail(seq), image->tail, image->tail_bytes);
    for (int64_t i = 0; i < image->n_pages; i++) {
        seq->table[i] = image->table[i];
        if (image->table[i] != LCO_NO_PAGE)
            lco_page_share(kv, image->table[i]);
    }
    seq->n_pages = image->n_pages;
    seq->length = image->length;
    seq->exact = image->exact;
    seq->unseen = image->unseen;
    *out = seq;
    return LCO_OK;
}
