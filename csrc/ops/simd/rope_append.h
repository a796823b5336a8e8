/* Rotation and cache write over vec.h. Products and sums are rounded one by one as in the portable op, so that every instruction set
 * stores the same codes. */
#include "../../base/hadamard.h"
#include "../impl.h"
#include "../quantise.h"
#include "vec.h"

static inline void rotate(float *x, const float *cos, const float *sin, int64_t half)
{
    for (int64_t i = 0; i < half; i += VL) {
        const int64_t left = half - i;
        vf a = v_load_part(x + i, left), b = v_load_part(x + half + i, left), c = v_load_part(cos + i, left),
           s = v_load_part(sin + i, left);
        v_store_part(x + i, v_sub(v_mul(a, c), v_mul(b, s)), left);
        v_store_part(x + half + i, v_add(v_mul(b, c), v_mul(a, s)), left);
    }
}

/* base/hadamard.h, a head: first the steps within a vector, in registers. */
static inline void turn(float *x, int64_t d, float factor)
{
    if (lco_hadamard_run(d) < VL) {
        lco_hadamard(x, d, factor);
        return;
    }
    for (int64_t i = 0; i < d; i += VL)
        v_store(x + i, v_hadamard(v_mul(v_set(factor), v_load(x + i))));
    for (int64_t h = VL; h < lco_hadamard_run(d); h *= 2)
        for (int64_t i = 0; i < d; i += 2 * h)
            for (int64_t j = i; j < i + h; j += VL) {
                const vf a = v_load(x + j), b = v_load(x + j + h);
                v_store(x + j, v_add(a, b));
                v_store(x + j + h, v_sub(a, b));
            }
}

static inline void store_codes(uint8_t *row, const float *x, int64_t d, lco_dtype dtype)
{
    for (int64_t j = 0; j < d; j += VL)
        v_store_as_part(row, j, v_load_part(x + j, d - j), d - j, dtype);
}

static void rope_token(const lco_rope_append_args *a, int64_t row, int64_t page, int64_t slot)
{
    const lco_kv_view *kv = a->kv;
    const int64_t d = kv->head_dim, half = d / 2;
    const float *cos = a->cos + row * half, *sin = a->sin + row * half;
    const size_t offset = (size_t)(slot * d) * lco_dtype_bytes(kv->dtype);
    const float for_q = lco_hadamard_factor(d, false), for_k = lco_hadamard_factor(d, true);
    for (int64_t h = 0; h < a->n_heads; h++) {
        float *q = a->q + row * a->ld_q + h * d;
        rotate(q, cos, sin, half);
        if (kv->turned)
            turn(q, d, for_q);
    }
    for (int64_t h = 0; h < kv->n_kv_heads; h++) {
        float *k = a->k + row * a->ld_kv + h * d;
        rotate(k, cos, sin, half);
        if (kv->turned)
            turn(k, d, for_k);
        if (lco_dtype_scaled(kv->dtype))
            continue;
        store_codes(lco_kv_codes(kv, page, LCO_KEY, h) + offset, k, d, kv->dtype);
        store_codes(lco_kv_codes(kv, page, LCO_VALUE, h) + offset, a->v + row * a->ld_kv + h * d, d, kv->dtype);
    }
}

/* Tokens [begin, end) of all items, counted through. */
static void rope_tokens(void *ctx, int64_t begin, int64_t end, int thread)
{
    (void)thread;
    const lco_rope_append_args *a = ctx;
    const lco_item *item = a->items;
    int64_t t = begin;
    for (int64_t before = 0; t < end; before += item->len, item++)
        for (; t < end && t - before < item->len; t++) {
            int64_t pos = item->pos + t - before;
            rope_token(a, item->row + t - before, item->table[pos / a->kv->page_size], pos % a->kv->page_size);
        }
}

static lco_status rope_append(const lco_rope_append_args *args)
{
    const int64_t serial = 16384; /* elements that one thread rotates sooner than another wakes up */
    int64_t n = 0, width = (args->n_heads + 2 * args->kv->n_kv_heads) * args->kv->head_dim;
    for (int64_t i = 0; i < args->n_items; i++)
        n += args->items[i].len;
    lco_pool_for(args->exec->pool, n, 1 + serial / width, rope_tokens, (void *)args);
    return lco_dtype_scaled(args->kv->dtype) ? quantise_rows(args) : LCO_OK;
}
