/* Keys and values as numbers again, for people and tools. */
#include <math.h>

#include "../base/codes.h"
#include "../base/convert.h"
#include "../base/hadamard.h"
#include "internal.h"

static float number(const uint8_t *codes, int64_t i, lco_dtype dtype, float scale)
{
    return lco_dtype_scaled(dtype) ? lco_decode(codes[i], dtype) * scale : lco_element(codes, i, dtype);
}

/* Row of a head at `position`, as the next token finds it. */
static void read_row(const lco_seq *seq, const lco_kv_view *kv, int64_t position, int64_t which, int64_t head, float *out)
{
    const int64_t d = kv->head_dim, slot = position % kv->page_size;
    const uint8_t *codes;
    lco_dtype dtype = kv->dtype;
    if (seq->table[position / kv->page_size] == LCO_NO_PAGE) {
        for (int64_t j = 0; j < d; j++)
            out[j] = NAN;
        return;
    }
    float scale = 1;
    const int64_t own = position - lco_coded_end(kv, seq->length);
    if (kv->buffered && (own >= 0 || position < kv->n_first)) {
        codes = (const uint8_t *)(own >= 0 ? lco_tail_rows(kv, lco_seq_tail(seq) + kv->tail_offset, which, head) + own * d
                                           : lco_first_rows(kv, seq->table[0], which, head) + position * d);
        dtype = LCO_BF16;
    } else {
        const uint8_t *slice = lco_kv_read(kv, 0, seq->table[position / kv->page_size], -1, 0, kv->n_kv_heads);
        codes = lco_read_codes(kv, slice, which, head) + (size_t)(slot * d) * lco_dtype_bytes(dtype);
        if (lco_dtype_scaled(dtype))
            scale = lco_read_scales(kv, slice, which, head)[slot / LCO_KV_BLOCK];
    }
    for (int64_t j = 0; j < d; j++)
        out[j] = number(codes, j, dtype, scale);
    if (which == LCO_KEY && kv->turned) /* turned again, and by the power of two that makes it the inverse */
        lco_hadamard(out, d, 1 / (lco_hadamard_factor(d, true) * (float)lco_hadamard_run(d)));
}

lco_status lco_seq_read(const lco_seq *seq, int32_t layer, int64_t n, float *keys, float *values, lco_error *err)
{
    const lco_kv_options *o = &seq->kv->options;
    if (layer < 0 || layer >= o->n_layers)
        return lco_fail(err, LCO_EINVAL, "layer = %d, expected 0 to %d", layer, o->n_layers - 1);
    if (n != seq->length)
        return lco_fail(err, LCO_EINVAL, "room for %lld tokens, the sequence holds %lld", (long long)n, (long long)seq->length);
    const lco_kv_view *kv = &seq->kv->views[layer];
    lco_kv_begin_step(seq->kv);
    for (int64_t i = 0; i < n * kv->n_kv_heads; i++) {
        read_row(seq, kv, i / kv->n_kv_heads, LCO_KEY, i % kv->n_kv_heads, keys + i * kv->head_dim);
        read_row(seq, kv, i / kv->n_kv_heads, LCO_VALUE, i % kv->n_kv_heads, values + i * kv->head_dim);
    }
    return lco_seq_lost(seq, err);
}
