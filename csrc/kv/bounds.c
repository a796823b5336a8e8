/* What the keys of a full page are between, for choose_pages: computed once, when the page becomes full, and kept apart from it in address space of
 * its own, which takes memory as it is written. The pages that become full later write them anew, so what a recycled page had is never read.
 * They are of the keys as codes; the first few of a text, which are read in 16 bit, lie in a page that is never left out (ops/choice.h). */
#define _GNU_SOURCE
#include <errno.h>
#include <math.h>
#include <string.h>
#include <sys/mman.h>

#include "../base/codes.h"
#include "../base/mem.h"
#include "internal.h"

/* The nearest bfloat16 that is not above (`up` false) or not below a. */
static uint16_t round_outward(float a, bool up)
{
    const uint32_t u = lco_float_bits(a);
    const bool negative = (u >> 31) != 0, grow = (u & 0xFFFFu) != 0 && negative != up;
    return (uint16_t)((u >> 16) + grow);
}

static uint16_t *head_bounds(const lco_kv *kv, const lco_kv_view *view, int64_t page, int64_t head)
{
    return kv->bounds + (lco_kv_bounds(view, page, head) - kv->bounds);
}

static void bound_head(const lco_kv_view *view, int64_t page, int64_t head, float *low, float *high, uint16_t *out)
{
    const int64_t d = view->head_dim;
    const uint8_t *codes = lco_kv_codes(view, page, LCO_KEY, head);
    bool finite = true;
    for (int64_t j = 0; j < d; j++) {
        low[j] = INFINITY;
        high[j] = -INFINITY;
    }
    for (int64_t t = 0; t < view->page_size; t++) {
        const uint8_t *row = codes + (size_t)(t * d) * lco_dtype_bytes(view->dtype);
        const float scale = lco_dtype_scaled(view->dtype) ? lco_kv_scales(view, page, LCO_KEY, head)[t / LCO_KV_BLOCK] : 1;
        for (int64_t j = 0; j < d; j++) {
            const float x = lco_dtype_scaled(view->dtype) ? lco_decode(row[j], view->dtype) * scale : lco_element(row, j, view->dtype);
            finite &= isfinite(x);
            low[j] = x < low[j] ? x : low[j];
            high[j] = x > high[j] ? x : high[j];
        }
    }
    for (int64_t j = 0; j < d; j++) {
        out[j] = round_outward(finite ? low[j] : -INFINITY, false);
        out[d + j] = round_outward(finite ? high[j] : INFINITY, true);
    }
}

lco_status lco_bounds_create(lco_kv *kv, lco_error *err)
{
    const lco_kv_options *o = &kv->options;
    if (!(o->page_tolerance >= 0 && o->page_tolerance < 1))
        return lco_fail(err, LCO_EINVAL, "page_tolerance = %g, expected at least 0 and less than 1", o->page_tolerance);
    if (o->page_tolerance == 0)
        return LCO_OK;
    const size_t layer = (size_t)2 * (size_t)o->n_kv_heads * (size_t)o->head_dim, page = (size_t)o->n_layers * layer;
    kv->bounds_bytes = page * sizeof *kv->bounds;
    kv->bounds_row = lco_alloc(3 * (size_t)o->head_dim * sizeof *kv->bounds_row);
    if (kv->bounds_row == NULL)
        return lco_fail(err, LCO_ENOMEM, "out of memory for the bounds of a page's keys");
    void *space =
        mmap(NULL, kv->bounds_bytes * (size_t)kv->n_pages, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0);
    if (space == MAP_FAILED)
        return lco_fail(err, LCO_ENOMEM, "address space for the bounds of the keys of %lld pages could not be reserved: %s",
                        (long long)kv->n_pages, strerror(errno));
    kv->bounds = space;
    for (int32_t i = 0; i < o->n_layers; i++) {
        kv->views[i].bounds = kv->bounds + (size_t)i * layer;
        kv->views[i].bounds_stride = page;
    }
    return LCO_OK;
}

void lco_bounds_destroy(lco_kv *kv)
{
    if (kv->bounds != NULL)
        munmap(kv->bounds, kv->bounds_bytes * (size_t)kv->n_pages);
    lco_free(kv->bounds_row);
}

void lco_bounds_page(lco_kv *kv, int64_t page)
{
    if (kv->bounds == NULL)
        return;
    for (int32_t i = 0; i < kv->options.n_layers; i++)
        for (int64_t head = 0; head < kv->options.n_kv_heads; head++)
            bound_head(&kv->views[i], page, head, kv->bounds_row, kv->bounds_row + kv->options.head_dim,
                       head_bounds(kv, &kv->views[i], page, head));
}

bool lco_bounds_sound(const lco_kv *kv, const lco_seq *seq, int64_t *bad)
{
    const int64_t d = kv->options.head_dim;
    for (int64_t p = 0; kv->bounds != NULL && p < seq->length / kv->options.page_size; p++) {
        const int32_t page = seq->table[p];
        for (int64_t i = 0; page != LCO_NO_PAGE && i < (int64_t)kv->options.n_layers * kv->options.n_kv_heads; i++) {
            const lco_kv_view *view = &kv->views[i / kv->options.n_kv_heads];
            const int64_t head = i % kv->options.n_kv_heads;
            if (lco_kv_away(view, page))
                continue;
            uint16_t *expected = (uint16_t *)(void *)(kv->bounds_row + 2 * d);
            bound_head(view, page, head, kv->bounds_row, kv->bounds_row + d, expected);
            *bad = page;
            if (memcmp(expected, lco_kv_bounds(view, page, head), (size_t)(2 * d) * sizeof *expected) != 0)
                return false;
        }
    }
    return true;
}

void lco_kv_count_choice(lco_kv *kv, int64_t read, int64_t left_out, float mass)
{
    kv->pages_read += read;
    kv->pages_left_out += left_out;
    kv->largest_mass = mass > kv->largest_mass ? mass : kv->largest_mass;
    kv->step_mass = mass > kv->step_mass ? mass : kv->step_mass;
}
