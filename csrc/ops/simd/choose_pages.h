/* choose_pages over vec.h: ../choice.h chooses, bounds and scores are computed here, in float32. What rounding may do to them is added to bounds
 * and taken from scores. */
#include "../impl.h"
#include "vec.h"

#include "../choice.h"

/* A sum of products off by at most this share of the sum of their magnitudes. */
static double rounding(int64_t d) { return (double)(d / VL + VL + 4) * 0x1p-24; }

static double key_score_bound(const lco_choose_pages_args *a, const float *q, const uint16_t *bounds)
{
    const int64_t d = a->kv->head_dim;
    vf sum = v_zero(), magnitudes = v_zero();
    for (int64_t i = 0; i < d; i += VL) {
        const vf x = v_load_part(q + i, d - i);
        const vf low = v_mul(x, v_load_as_part(bounds, i, d - i, LCO_BF16)),
                 high = v_mul(x, v_load_as_part(bounds + d, i, d - i, LCO_BF16));
        const vf most = v_max(low, high);
        sum = v_add(sum, most);
        magnitudes = v_add(magnitudes, v_max(most, v_max(v_sub(v_zero(), low), v_sub(v_zero(), high))));
    }
    return (v_sum(sum) + rounding(d) * v_sum(magnitudes)) * a->scale;
}

/* Scores of a run, lowered by what rounding may have added. */
ALWAYS_INLINE void run_scores(const lco_choose_pages_args *a, const float *q, const key_run *run, lco_dtype dtype, float *scores)
{
    const int64_t d = a->kv->head_dim;
    const float unit = a->scale * v_code_unit(dtype), share = (float)rounding(d);
    const vf clear = v_set(-0.0f);
    for (int64_t t = 0; t < run->n; t++) {
        const uint8_t *key = run->keys + (size_t)(t * d) * lco_dtype_bytes(dtype);
        vf sum = clear, magnitudes = v_zero();
        for (int64_t i = 0; i < d; i += VL) {
            const vf product = v_mul(v_load_part(q + i, d - i), v_load_as_part(key, i, d - i, dtype));
            sum = v_add(sum, product);
            magnitudes = v_add(magnitudes, v_max(product, v_sub(v_zero(), product)));
        }
        const float scale = run->scales != NULL ? run->scales[(run->skip + t) / LCO_KV_BLOCK] * unit : unit;
        scores[t] = (v_sum(sum) - share * v_sum(magnitudes)) * scale;
    }
}

static norm run_norm(const lco_choose_pages_args *a, const float *q, const key_run *run)
{
    enum { MOST = 512 + VL }; /* positions of a page */
    float scores[MOST];
    switch (run->dtype) {
    case LCO_F8_E4M3:
        run_scores(a, q, run, LCO_F8_E4M3, scores);
        break;
    case LCO_F8_E5M2:
        run_scores(a, q, run, LCO_F8_E5M2, scores);
        break;
    case LCO_I8:
        run_scores(a, q, run, LCO_I8, scores);
        break;
    case LCO_BF16:
        run_scores(a, q, run, LCO_BF16, scores);
        break;
    case LCO_F16:
        run_scores(a, q, run, LCO_F16, scores);
        break;
    case LCO_F32:
    case LCO_QUANTIZED: /* never: of weights only */
        run_scores(a, q, run, LCO_F32, scores);
        break;
    }
    float top = -INFINITY;
    for (int64_t t = 0; t < run->n; t++)
        top = scores[t] <= top ? top : scores[t]; /* NaN stays */
    for (int64_t t = run->n; t % VL != 0; t++)
        scores[t] = -INFINITY;
    vf sum = v_zero();
    for (int64_t t = 0; t < run->n; t += VL)
        sum = v_add(sum, v_exp(v_sub(v_load(scores + t), v_set(top))));
    return (norm){top, v_sum(sum) * (1 - 0x1p-16)};
}
