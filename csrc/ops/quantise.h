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

/* One head's keys or values in block `block` (counted from position 0) of an item in a buffered cache. */
static void fill_block(const lco_rope_append_args *a, const lco_item *item, int64_t block, int64_t which, int64_t head)
{
    const lco_kv_view *kv = a->kv;
    const int64_t d = kv->head_dim, start = block * LCO_KV_BLOCK, stop = start + LCO_KV_BLOCK, end = item->pos + item->len;
    const int64_t first_block = item->pos / LCO_KV_BLOCK, from = start > item->pos ? start : item->pos, to = stop < end ? stop : end;
    uint16_t *rows = lco_tail_rows(kv, lco_own_block(kv, item, block), which, head);
    if (item->prompt && from > start)
        memcpy(rows, lco_tail_rows(kv, item->tail + kv->tail_offset, which, head), (size_t)((from - start) * d) * sizeof *rows);
    for (int64_t t = from; t < to; t++)
        round_row(a, item, t - item->pos, which, head, rows + (t - start) * d);
    if (to == stop) {
        const int64_t page = item->table[start / kv->page_size], in_page = start % kv->page_size / LCO_KV_BLOCK;
        float *scale = lco_kv_scales(kv, page, which, head) + in_page;
        *scale = scale_for(kv, which, head, lco_largest_bf16(rows, LCO_KV_BLOCK * d));
        lco_encode_run(lco_kv_codes(kv, page, which, head) + in_page * LCO_KV_BLOCK * d, rows, LCO_KV_BLOCK * d, *scale, kv->dtype);
    } else if (item->prompt) {
        uint8_t *tail = block == first_block ? item->tail : item->next_tail;
        memcpy(lco_tail_rows(kv, tail + kv->tail_offset, which, head) + (from - start) * d, rows + (from - start) * d,
               (size_t)((to - from) * d) * sizeof *rows);
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

/* Units [begin, end): (block of an item, K or V, head), items one after the other. */
static void quantise_units(void *ctx, int64_t begin, int64_t end, int thread)
{
    const quantise_job *job = ctx;
    const lco_rope_append_args *a = job->args;
    const int64_t heads = a->kv->n_kv_heads;
    uint16_t *row = job->rows + thread * a->kv->head_dim;
    const lco_item *item = a->items;
    int64_t before = 0;
    for (int64_t i = begin; i < end; i++) {
        while (i - before >= lco_own_blocks(item) * 2 * heads)
            before += lco_own_blocks(item++) * 2 * heads;
        const int64_t block = item->pos / LCO_KV_BLOCK + (i - before) / (2 * heads), which = (i - before) / heads % 2,
                      head = (i - before) % heads;
        if (a->kv->buffered)
            fill_block(a, item, block, which, head);
        else
            widen_block(a, item, block, which, head, row);
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
        units += lco_own_blocks(&a->items[i]) * 2 * a->kv->n_kv_heads;
    lco_pool_for(a->exec->pool, units, 1 + SERIAL / (LCO_KV_BLOCK * a->kv->head_dim), quantise_units, &job);
    lco_arena_reset(scratch, mark);
    return LCO_OK;
}

#endif
