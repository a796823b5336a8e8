#include "../../base/hadamard.h"
#include "../impl.h"
#include "../quantise.h"

typedef struct {
    const lco_rope_append_args *args;
    const lco_item *item;
} rope_job;

/* Pairs (x[i], x[i + half]). Every product and sum is rounded to float32: all instruction sets store the same codes. */
static void rotate(float *x, const float *cos, const float *sin, int64_t half)
{
    for (int64_t i = 0; i < half; i++) {
        float a = x[i], b = x[i + half];
        x[i] = a * cos[i] - b * sin[i];
        x[i + half] = b * cos[i] + a * sin[i];
    }
}

static void store_row(const lco_kv_view *kv, int64_t page, int64_t which, int64_t head, int64_t slot, const float *x)
{
    uint8_t *codes = lco_kv_codes(kv, page, which, head);
    for (int64_t j = 0; j < kv->head_dim; j++)
        lco_set_element(codes, slot * kv->head_dim + j, kv->dtype, x[j]);
}

static void rope_tokens(void *ctx, int64_t begin, int64_t end, int thread)
{
    (void)thread;
    const rope_job *job = ctx;
    const lco_rope_append_args *a = job->args;
    const lco_kv_view *kv = a->kv;
    const int64_t half = kv->head_dim / 2;
    for (int64_t t = begin; t < end; t++) {
        int64_t row = job->item->row + t, pos = job->item->pos + t;
        int64_t page = job->item->table[pos / kv->page_size], slot = pos % kv->page_size;
        const float *cos = a->cos + row * half, *sin = a->sin + row * half;
        for (int64_t h = 0; h < a->n_heads; h++) {
            float *q = a->q + row * a->ld_q + h * kv->head_dim;
            rotate(q, cos, sin, half);
            if (kv->turned)
                lco_hadamard(q, kv->head_dim, lco_hadamard_factor(kv->head_dim, false));
        }
        for (int64_t h = 0; h < kv->n_kv_heads; h++) {
            float *k = a->k + row * a->ld_kv + h * kv->head_dim;
            rotate(k, cos, sin, half);
            if (kv->turned)
                lco_hadamard(k, kv->head_dim, lco_hadamard_factor(kv->head_dim, true));
            if (lco_dtype_scaled(kv->dtype))
                continue;
            store_row(kv, page, LCO_KEY, h, slot, k);
            store_row(kv, page, LCO_VALUE, h, slot, a->v + row * a->ld_kv + h * kv->head_dim);
        }
    }
}

lco_status lco_ref_rope_append(const lco_rope_append_args *args)
{
    for (int64_t n = 0; n < args->n_items; n++) {
        rope_job job = {.args = args, .item = &args->items[n]};
        lco_pool_for(args->exec->pool, job.item->len, 16, rope_tokens, &job);
    }
    return lco_dtype_scaled(args->kv->dtype) ? quantise_rows(args) : LCO_OK;
}
