/* Second half of rope_append for one-byte codes: rotated keys, and values, of a step's rows -> 16-bit blocks, pages, tails (ops.h, base/codes.h).
 *
 * Included by every instruction set's rope_append, so that each compiles these loops for its own vectors; the codes are the same everywhere. */
#ifndef LCO_OPS_QUANTISE_H
#define LCO_OPS_QUANTISE_H

#include "../base/codes.h"
#include "ops.h"

typedef struct {
    const lco_rope_append_args *args;
    uint16_t *rows; /* [threads][head_dim] */
} quantise_job;

/* Row t of the item, as 16 bit. */
static void round_row(const lco_rope_append_args *a, const lco_item *item, int64_t t, int64_t which, int64_t head, uint16_t *to)
{
    const int64_t d = a->kv->head_dim;
    const float *from = (which == LCO_KEY ? a->k : a->v) + (item->row + t) * a->ld_kv + head * d;
    for (int64_t j = 0; j < d; j++)
        to[j] = lco_f32_to_bf16(from[j]);
}

/* The scale of a block of a head whose largest magnitude is this (base/codes.h). */
static float scale_for(const lco_kv_view *kv, int64_t which, int64_t head, float largest)
{
    return kv->fixed_scales != NULL && largest < INFINITY ? kv->fixed_scales[which * kv->n_kv_heads + head]
                                                          : lco_block_scale(largest, kv->dtype);
}

/* The block of 16 rows from position `start` on, into its page. */
static void quantise_block(const lco_rope_append_args *a, const lco_item *item, int64_t start, int64_t which, int64_t head,
                           const uint16_t *rows)
{
    const lco_kv_view *kv = a->kv;
    const int64_t page = item->table[start / kv->page_size], in_page = start % kv->page_size / LCO_KV_BLOCK,
                  n = LCO_KV_BLOCK * kv->head_dim;
    float *scale = lco_kv_scales(kv, page, which, head) + in_page;
    *scale = scale_for(kv, which, head, lco_largest_bf16(rows, n));
    lco_encode_run(lco_kv_codes(kv, page, which, head) + in_page * n, rows, n, *scale, kv->dtype);
}

/* One head's keys or values in a stretch, counted from position 0, of an item in a buffered cache. */
static void fill_stretch(const lco_rope_append_args *a, const lco_item *item, int64_t stretch, int64_t which, int64_t head)
{
    const lco_kv_view *kv = a->kv;
    const int64_t d = kv->head_dim, start = stretch * kv->residual, stop = start + kv->residual, end = item->pos + item->len;
    const int64_t from = start > item->pos ? start : item->pos, to = stop < end ? stop : end;
    const size_t row_bytes = (size_t)d * sizeof(uint16_t);
    uint16_t *rows = lco_tail_rows(kv, lco_own_stretch(kv, item, start), which, head);
    if (item->prompt && from > start)
        memcpy(rows, lco_tail_rows(kv, item->tail + kv->tail_offset, which, head), (size_t)(from - start) * row_bytes);
    for (int64_t t = from; t < to; t++)
        round_row(a, item, t - item->pos, which, head, rows + (t - start) * d);
    for (int64_t t = from; t < to && t < kv->n_first; t++)
        memcpy(lco_first_rows(kv, item->table[0], which, head) + t * d, rows + (t - start) * d, row_bytes);
    for (int64_t t = from / LCO_KV_BLOCK * LCO_KV_BLOCK; t + LCO_KV_BLOCK <= to; t += LCO_KV_BLOCK)
        quantise_block(a, item, t, which, head, rows + (t - start) * d);
    if (to < stop && item->prompt) {
        uint8_t *tail = stretch == item->pos / kv->residual ? item->tail : item->next_tail;
        memcpy(lco_tail_rows(kv, tail + kv->tail_offset, which, head) + (from - start) * d, rows + (from - start) * d,
               (size_t)(to - from) * row_bytes);
    }
}

/* One head's keys or values in a block of an unbuffered cache: every row is quantised as it comes. */
static void widen_block(const lco_rope_append_args *a, const lco_item *item, int64_t block, int64_t which, int64_t head, uint16_t *row)
{
    const lco_kv_view *kv = a->kv;
    const int64_t d = kv->head_dim, start = block * LCO_KV_BLOCK, end = item->pos + item->len;
    const int64_t page = item->table[start / kv->page_size], in_page = start % kv->page_size / LCO_KV_BLOCK;
    uint8_t *codes = lco_kv_codes(kv, page, which, head) + in_page * LCO_KV_BLOCK * d;
    float *scale = lco_kv_scales(kv, page, which, head) + in_page;
    for (int64_t t = start > item->pos ? start : item->pos; t < start + LCO_KV_BLOCK && t < end; t++) {
        round_row(a, item, t - item->pos, which, head, row);
        const float own = scale_for(kv, which, head, lco_largest_bf16(row, d));
        if (t == start) {
            *scale = own;
        } else if (!(own <= *scale) && !isnan(*scale)) { /* a NaN stays */
            for (int64_t j = 0; j < (t - start) * d; j++)
                codes[j] = lco_encode(lco_decode(codes[j], kv->dtype) * *scale / own, kv->dtype);
            *scale = own;
        }
        lco_encode_run(codes + (t - start) * d, row, d, *scale, kv->dtype);
    }
}

/* Positions whose rows of a head one call takes. */
static int64_t quantise_unit(const lco_kv_view *kv) { return kv->buffered ? kv->residual : LCO_KV_BLOCK; }

/* Units [begin, end): (stretch or block of an item, K or V, head), items one after the other. */
static void quantise_units(void *ctx, int64_t begin, int64_t end, int thread)
{
    const quantise_job *job = ctx;
    const lco_rope_append_args *a = job->args;
    const int64_t heads = a->kv->n_kv_heads, unit = quantise_unit(a->kv);
    uint16_t *row = job->rows + thread * a->kv->head_dim;
    const lco_item *item = a->items;
    int64_t before = 0;
    for (int64_t i = begin; i < end; i++) {
        while (i - before >= lco_own_stretches(item, unit) * 2 * heads)
            before += lco_own_stretches(item++, unit) * 2 * heads;
        const int64_t at = item->pos / unit + (i - before) / (2 * heads), which = (i - before) / heads % 2, head = (i - before) % heads;
        if (a->kv->buffered)
            fill_stretch(a, item, at, which, head);
        else
            widen_block(a, item, at, which, head, row);
    }
}

static lco_status quantise_rows(const lco_rope_append_args *a)
{
    enum { SERIAL = 16384 }; /* values that one thread quantises sooner than another wakes up */
    lco_arena *scratch = a->exec->scratch;
    const lco_mark mark = lco_arena_mark(scratch);
    quantise_job job = {.args = a};
    job.rows = lco_arena_take(scratch, (size_t)lco_pool_size(a->exec->pool) * (size_t)a->kv->head_dim * sizeof *job.rows);
    if (job.rows == NULL)
        return LCO_ENOMEM;
    int64_t units = 0;
    for (int64_t i = 0; i < a->n_items; i++)
        units += lco_own_stretches(&a->items[i], quantise_unit(a->kv)) * 2 * a->kv->n_kv_heads;
    lco_pool_for(a->exec->pool, units, 1 + SERIAL / (quantise_unit(a->kv) * a->kv->head_dim), quantise_units, &job);
    lco_arena_reset(scratch, mark);
    return LCO_OK;
}

#endif
