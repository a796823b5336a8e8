#include "../../base/codes.h"
#include "../impl.h"

#include "../choice.h"

static double key_score_bound(const lco_choose_pages_args *a, const float *q, const uint16_t *bounds)
{
    const int64_t d = a->kv->head_dim;
    double sum = 0;
    for (int64_t j = 0; j < d; j++) {
        const double low = (double)q[j] * lco_bf16_to_f32(bounds[j]), high = (double)q[j] * lco_bf16_to_f32(bounds[d + j]);
        sum += low > high ? low : high;
    }
    return sum * a->scale;
}

static norm run_norm(const lco_choose_pages_args *a, const float *q, const key_run *run)
{
    const int64_t d = a->kv->head_dim;
    norm z = {-INFINITY, 0};
    for (int64_t t = 0; t < run->n; t++) {
        const uint8_t *key = run->keys + (size_t)(t * d) * lco_dtype_bytes(run->dtype);
        double score = 0;
        for (int64_t j = 0; j < d; j++)
            score += q[j] * (double)(lco_dtype_scaled(run->dtype) ? lco_decode(key[j], run->dtype) : lco_element(key, j, run->dtype));
        score *= run->scales != NULL ? run->scales[(run->skip + t) / LCO_KV_BLOCK] : 1;
        z = add_norms(z, (norm){score * a->scale, 1});
    }
    return z;
}

lco_status lco_ref_choose_pages(const lco_choose_pages_args *args) { return choose_pages(args); }
