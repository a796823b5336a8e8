/* The pool: address space for every page from the start, memory only for pages that were written. */
#define _GNU_SOURCE
#include <assert.h>
#include <errno.h>
#include <stdio.h>
#include <string.h>
#include <sys/mman.h>
#include <unistd.h>

#include "../base/mem.h"
#include "prefix.h"
#include "tier.h"

#define MAX_PAGES INT32_MAX
enum { LEAST_HOT = 4 }; /* pages in memory */

static lco_status check_options(const lco_kv_options *o, lco_error *err)
{
    if (o->page_size < 16 || o->page_size > 512 || o->page_size % 16 != 0)
        return lco_fail(err, LCO_EINVAL, "page_size = %d, expected a multiple of 16 from 16 to 512", o->page_size);
    if (o->host_bytes < 0 || (o->spill_path != NULL && o->host_bytes == 0))
        return lco_fail(err, LCO_EINVAL, "host_bytes = %lld, expected the most bytes of memory for pages", (long long)o->host_bytes);
    lco_status status = lco_sight_check(o, err);
    if (status != LCO_OK)
        return status;
    if (o->max_tokens < 1)
        return lco_fail(err, LCO_EINVAL, "max_tokens = %lld, expected at least 1", (long long)o->max_tokens);
    if (o->n_layers < 1 || o->n_kv_heads < 1 || o->head_dim < 1)
        return lco_fail(err, LCO_EINVAL, "a cache of %d layers, %d kv heads, head_dim %d: all must be at least 1", o->n_layers,
                        o->n_kv_heads, o->head_dim);
    return LCO_OK;
}

/* The tokens of a stretch, in options that are the cache's own. */
static lco_status check_buffer(lco_kv_options *o, lco_error *err)
{
    if (!o->write_buffer && o->residual == 0 && o->n_first == 0)
        return LCO_OK;
    if (!o->write_buffer)
        return lco_fail(err, LCO_EINVAL, "residual_length = %d and sink_length = %d without a write_buffer, expected none", o->residual,
                        o->n_first);
    for (int32_t n = LCO_KV_MOST_RESIDUAL; o->residual == 0; n -= LCO_KV_BLOCK)
        if (o->page_size % n == 0)
            o->residual = n;
    if (o->residual < LCO_KV_BLOCK || o->residual > LCO_KV_MOST_RESIDUAL || o->residual % LCO_KV_BLOCK != 0 ||
        o->page_size % o->residual != 0)
        return lco_fail(err, LCO_EINVAL, "residual_length = %d, expected a multiple of %d to %d that divides page_size = %d", o->residual,
                        LCO_KV_BLOCK, LCO_KV_MOST_RESIDUAL, o->page_size);
    if (o->n_first < 0 || o->n_first > LCO_KV_MOST_FIRST)
        return lco_fail(err, LCO_EINVAL, "sink_length = %d, expected 0 to %d", o->n_first, LCO_KV_MOST_FIRST);
    return LCO_OK;
}

/* The views of all layers, without their base yet, and the bytes of a page and of a tail. */
static lco_status lay_out(lco_kv *kv, lco_error *err)
{
    const lco_kv_options *o = &kv->options;
    kv->views = lco_calloc((size_t)o->n_layers, sizeof *kv->views);
    const size_t heads = (size_t)2 * (size_t)o->n_kv_heads, bytes = (size_t)o->n_layers * heads * sizeof(float);
    if (o->fixed_scales != NULL && (kv->fixed_scales = lco_alloc(bytes)) != NULL)
        memcpy(kv->fixed_scales, o->fixed_scales, bytes);
    if (kv->views == NULL || (o->fixed_scales != NULL && kv->fixed_scales == NULL))
        return lco_fail(err, LCO_ENOMEM, "out of memory for a cache of %d layers", o->n_layers);
    for (int32_t i = 0; i < o->n_layers; i++) {
        lco_kv_view *view = &kv->views[i];
        *view = (lco_kv_view){.dtype = o->layer_dtypes != NULL ? o->layer_dtypes[i] : o->dtype, .page_size = o->page_size};
        view->n_kv_heads = o->n_kv_heads;
        view->head_dim = o->head_dim;
        if (kv->fixed_scales != NULL && view->dtype == LCO_F8_E4M3)
            view->fixed_scales = kv->fixed_scales + (size_t)i * heads;
        view->turned = o->turn_keys && lco_dtype_scaled(view->dtype) && view->fixed_scales == NULL; /* those are of keys as they are */
        view->buffered = o->write_buffer && lco_dtype_scaled(view->dtype);
        view->residual = view->buffered ? o->residual : 0;
        view->n_first = view->buffered ? o->n_first : 0;
        view->slice_offset = kv->page_bytes;
        view->tail_offset = kv->tail_bytes;
        kv->scaled = kv->scaled || lco_dtype_scaled(view->dtype);
        size_t slice;
        if (!lco_kv_slice_bytes(view, &slice) || __builtin_add_overflow(kv->page_bytes, slice, &kv->page_bytes))
            return lco_fail(err, LCO_EINVAL, "a page of %d tokens x %d layers x %d kv heads x head_dim %d is too large", o->page_size,
                            o->n_layers, o->n_kv_heads, o->head_dim);
        const size_t token = (size_t)2 * (size_t)view->n_kv_heads * (size_t)view->head_dim * lco_dtype_bytes(view->dtype);
        if (lco_dtype_scaled(view->dtype))
            kv->block_bytes += LCO_KV_BLOCK * token + (size_t)2 * (size_t)view->n_kv_heads * sizeof(float);
        else
            kv->token_bytes += token;
        kv->tail_bytes += lco_tail_bytes(view);
    }
    if (o->write_buffer && !kv->scaled)
        return lco_fail(err, LCO_EINVAL, "a write buffer is for one-byte codes: 16-bit and float32 caches are written once as it is");
    kv->options.layer_dtypes = NULL;
    kv->options.fixed_scales = NULL;
    kv->sight = lco_kv_layer_sight(kv, o->model_window);
    return LCO_OK;
}

static void release(lco_kv *kv)
{
    lco_prefix_destroy(kv);
    lco_tier_destroy(kv);
    lco_bounds_destroy(kv);
    lco_firsts_destroy(kv);
    if (kv->base != NULL)
        munmap(kv->base, kv->page_bytes * (size_t)kv->n_pages);
    lco_free(kv->free_stack);
    lco_free(kv->begins);
    lco_free(kv->refs);
    lco_free(kv->fixed_scales);
    lco_free(kv->views);
    lco_free(kv);
}

lco_status lco_kv_create(const lco_kv_options *options, lco_kv **out, lco_error *err)
{
    *out = NULL;
    lco_status status = check_options(options, err);
    if (status != LCO_OK)
        return status;
    lco_kv *kv = lco_calloc(1, sizeof *kv);
    if (kv == NULL)
        return lco_fail(err, LCO_ENOMEM, "out of memory for a cache");
    kv->options = *options;
    if ((status = check_buffer(&kv->options, err)) != LCO_OK || (status = lay_out(kv, err)) != LCO_OK)
        goto fail;
    const size_t bytes = kv->page_bytes;
    size_t total;
    int64_t n_pages = (options->max_tokens - 1) / options->page_size + 1;
    const int64_t fits = options->host_bytes > 0 ? options->host_bytes / (int64_t)bytes : n_pages;
    if (fits < LEAST_HOT && fits < n_pages) {
        status = lco_fail(err, LCO_EINVAL, "host_bytes = %lld is room for %lld pages of %zu bytes, expected at least %d pages (%zu bytes)",
                          (long long)options->host_bytes, (long long)fits, bytes, LEAST_HOT, LEAST_HOT * bytes);
        goto fail;
    }
    if (options->spill_path == NULL && fits < n_pages)
        n_pages = fits;
    if (n_pages > MAX_PAGES || !lco_mul(bytes, (size_t)n_pages, &total)) {
        status = lco_fail(err, LCO_EINVAL, "max_tokens = %lld needs %lld pages of %zu bytes: more than the cache can number",
                          (long long)options->max_tokens, (long long)n_pages, bytes);
        goto fail;
    }
    kv->options.max_tokens = n_pages * options->page_size;
    kv->n_pages = n_pages;
    kv->system_page = (size_t)sysconf(_SC_PAGESIZE);
    kv->refs = lco_alloc((size_t)n_pages * sizeof *kv->refs); /* not touched before its page is */
    kv->free_stack = lco_alloc((size_t)n_pages * sizeof *kv->free_stack);
    kv->begins = lco_alloc((size_t)n_pages * sizeof *kv->begins);
    if (kv->refs == NULL || kv->free_stack == NULL || kv->begins == NULL) {
        status = lco_fail(err, LCO_ENOMEM, "out of memory for the page list of max_tokens = %lld", (long long)options->max_tokens);
        goto fail;
    }
    kv->base = mmap(NULL, total, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0);
    if (kv->base == MAP_FAILED) {
        kv->base = NULL;
        status = lco_fail(err, LCO_ENOMEM, "address space of %zu bytes for max_tokens = %lld (%zu bytes a token) could not be reserved: %s",
                          total, (long long)options->max_tokens, bytes / (size_t)options->page_size, strerror(errno));
        goto fail;
    }
    for (int32_t i = 0; i < options->n_layers; i++) {
        kv->views[i].base = kv->base + kv->views[i].slice_offset;
        kv->views[i].page_bytes = bytes;
    }
    if ((status = lco_firsts_create(kv, err)) != LCO_OK || (status = lco_tier_create(kv, err)) != LCO_OK ||
        (status = lco_prefix_create(kv, err)) != LCO_OK || (status = lco_bounds_create(kv, err)) != LCO_OK)
        goto fail;
    kv->options.spill_path = NULL;
    *out = kv;
    return LCO_OK;
fail:
    release(kv);
    return status;
}

void lco_kv_destroy(lco_kv *kv)
{
    if (kv == NULL)
        return;
    while (kv->sequences != NULL)
        lco_seq_destroy(kv->sequences);
    release(kv);
}

const lco_kv_options *lco_kv_get_options(const lco_kv *kv) { return &kv->options; }

const lco_kv_view *lco_kv_views(const lco_kv *kv) { return kv->views; }

int64_t lco_page_free_count(const lco_kv *kv) { return kv->n_pages - kv->n_touched + kv->n_stacked + lco_prefix_idle(kv); }

lco_status lco_page_take(lco_kv *kv, int32_t *page, lco_error *err)
{
    if (lco_page_free_count(kv) == 0)
        return lco_fail(err, LCO_EPAGES, "no free page");
    if (kv->n_stacked == 0 && kv->n_touched == kv->n_pages)
        lco_prefix_give_one(kv);
    if (kv->n_stacked > 0) {
        *page = kv->free_stack[--kv->n_stacked];
        assert(kv->refs[*page] == 0);
    } else {
        *page = (int32_t)kv->n_touched++;
    }
    kv->refs[*page] = 1;
    kv->begins[*page] = false;
    return LCO_OK;
}

void lco_page_share(lco_kv *kv, int32_t page)
{
    kv->prefix_idle -= lco_prefix_knows(kv, page) && kv->refs[page] == 1;
    kv->refs[page]++;
}

/* Whole system pages inside it. */
void lco_kv_unmap(const lco_kv *kv, uint8_t *from, size_t bytes)
{
    const uintptr_t mask = kv->system_page - 1, begin = ((uintptr_t)from + mask) & ~mask, end = ((uintptr_t)from + bytes) & ~mask;
    if (end > begin)
        madvise((void *)begin, end - begin, MADV_DONTNEED);
}

void lco_page_unmap(lco_kv *kv, int32_t page) { lco_kv_unmap(kv, kv->base + (size_t)page * kv->page_bytes, kv->page_bytes); }

void lco_page_release(lco_kv *kv, int32_t page)
{
    assert(kv->refs[page] > 0);
    if (--kv->refs[page] > 0) {
        kv->prefix_idle += lco_prefix_knows(kv, page) && kv->refs[page] == 1;
        return;
    }
    lco_page_unmap(kv, page);
    lco_firsts_release(kv, page);
    lco_tier_forget(kv, page);
    kv->free_stack[kv->n_stacked++] = page;
}

/* Bytes of the pool that the system holds in memory now. */
static int64_t resident_bytes(const lco_kv *kv)
{
    enum { STEP = 4096 };
    unsigned char state[STEP];
    const size_t total = kv->page_bytes * (size_t)kv->n_pages;
    int64_t bytes = 0;
    for (int32_t page = 0; page < kv->n_touched; page++) { /* only pages in use can be resident, but for the shared edges */
        if (kv->refs[page] == 0)
            continue;
        size_t begin = (size_t)page * kv->page_bytes & ~(kv->system_page - 1);
        size_t end = ((size_t)page + 1) * kv->page_bytes;
        if (page + 1 < kv->n_touched && kv->refs[page + 1] > 0)
            end &= ~(kv->system_page - 1); /* the shared system page is counted with the next page */
        end = end < total ? end : total;
        for (size_t at = begin; at < end; at += STEP * kv->system_page) {
            size_t length = end - at < STEP * kv->system_page ? end - at : STEP * kv->system_page;
            if (mincore(kv->base + at, length, state) != 0)
                continue;
            for (size_t i = 0; i < (length + kv->system_page - 1) / kv->system_page; i++)
                bytes += (state[i] & 1) * (int64_t)kv->system_page;
        }
    }
    return bytes;
}

lco_kv_stats lco_kv_get_stats(const lco_kv *kv)
{
    lco_kv_stats s = {
        .pages_total = kv->n_pages,
        .pages_free = lco_page_free_count(kv),
        .page_bytes = (int64_t)kv->page_bytes,
        .reserved_bytes = (int64_t)kv->page_bytes * kv->n_pages,
        .resident_bytes = resident_bytes(kv),
        .bytes_per_token = (int64_t)kv->page_bytes / kv->options.page_size,
        .tokens_appended = kv->tokens_appended,
        .blocks_quantised = kv->blocks_quantised,
        .pages_copied = kv->pages_copied,
        .pages_cached = lco_prefix_idle(kv),
        .tokens_found = kv->tokens_found,
        .bytes_written = kv->bytes_written,
        .pages_released = kv->pages_released,
        .pages_read = kv->pages_read,
        .pages_left_out = kv->pages_left_out,
        .bounds_bytes = (kv->n_pages - lco_page_free_count(kv)) * (int64_t)kv->bounds_bytes,
        .largest_mass_left_out = kv->largest_mass,
        .step_mass_left_out = kv->step_mass,
    };
    if (kv->tier != NULL) {
        s.pages_away = kv->tier->n_away;
        s.pages_spilled = kv->tier->spilled;
        s.pages_restored = kv->tier->restored;
        s.slices_fetched = kv->tier->fetches;
        s.bytes_fetched = kv->tier->bytes_fetched;
        s.prefetches_issued = kv->tier->issued;
        s.prefetches_used = kv->tier->used;
    }
    for (int64_t i = 0; i < kv->n_touched; i++) {
        s.pages_shared += kv->refs[i] - lco_prefix_knows(kv, i) > 1;
        s.first_bytes += kv->refs[i] > 0 && kv->begins[i] ? (int64_t)kv->first_bytes : 0;
    }
    for (const lco_seq *seq = kv->sequences; seq != NULL; seq = seq->next) {
        s.sequences++;
        s.tokens_held += seq->length;
        s.tail_bytes += ((seq->tail != NULL) + (seq->next_tail != NULL) + (seq->held != NULL)) * (int64_t)kv->tail_bytes;
    }
    return s;
}

void lco_kv_reset_counters(lco_kv *kv)
{
    kv->tokens_appended = kv->blocks_quantised = kv->pages_copied = kv->tokens_found = kv->bytes_written = 0;
    kv->pages_released = kv->pages_read = kv->pages_left_out = 0;
    kv->largest_mass = 0;
    lco_tier_reset_counters(kv);
}

lco_status lco_kv_check(const lco_kv *kv, lco_error *err)
{
    int32_t *counts = lco_calloc((size_t)kv->n_touched, sizeof *counts);
    if (counts == NULL)
        return lco_fail(err, LCO_ENOMEM, "out of memory for the check");
    lco_status status = LCO_OK;
    for (int64_t i = 0; i < kv->n_touched; i++)
        counts[i] = lco_prefix_knows(kv, i);
    for (const lco_seq *seq = kv->sequences; seq != NULL && status == LCO_OK; seq = seq->next) {
        if (seq->length > seq->n_pages * kv->options.page_size || seq->n_pages > seq->capacity)
            status =
                lco_fail(err, LCO_EFORMAT, "a sequence of %lld tokens holds %lld pages", (long long)seq->length, (long long)seq->n_pages);
        int64_t bad;
        if (status == LCO_OK && !lco_bounds_sound(kv, seq, &bad))
            status = lco_fail(err, LCO_EFORMAT, "page %lld: the bounds of its keys are wrong", (long long)bad);
        for (int64_t i = 0; i < seq->n_pages && status == LCO_OK; i++) {
            if (seq->table[i] == LCO_NO_PAGE && !lco_kv_sees_page(kv, seq->length, i) && i < seq->unseen)
                continue;
            if (seq->table[i] < 0 || seq->table[i] >= kv->n_touched)
                status = lco_fail(err, LCO_EFORMAT, "table entry %lld names page %d of %lld", (long long)i, seq->table[i],
                                  (long long)kv->n_touched);
            else
                counts[seq->table[i]]++;
        }
    }
    for (int64_t i = 0; i < kv->n_touched && status == LCO_OK; i++)
        if (counts[i] != kv->refs[i])
            status = lco_fail(err, LCO_EFORMAT, "page %lld has count %d but %d table entries", (long long)i, kv->refs[i], counts[i]);
    for (int64_t i = 0; i < kv->n_stacked && status == LCO_OK; i++)
        if (counts[kv->free_stack[i]]++ != 0)
            status = lco_fail(err, LCO_EFORMAT, "page %d is on the free list and in use, or listed twice", kv->free_stack[i]);
    for (int64_t i = 0; i < kv->n_touched && status == LCO_OK; i++)
        if (counts[i] == 0)
            status = lco_fail(err, LCO_EFORMAT, "page %lld is neither free nor held", (long long)i);
    int64_t page;
    if (status == LCO_OK && !lco_tier_sound(kv, &page))
        status =
            lco_fail(err, LCO_EFORMAT, "page %lld: where it lies contradicts its use, or the counts of pages in memory and away are wrong",
                     (long long)page);
    if (status == LCO_OK && !lco_prefix_sound(kv, &page))
        status =
            lco_fail(err, LCO_EFORMAT, "page %lld: the prefix index does not find it, or has lost the page it follows, or counts wrongly",
                     (long long)page);
    lco_free(counts);
    return status;
}
