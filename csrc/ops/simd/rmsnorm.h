/* RMSNorm over vec.h: one row at a time, four partial sums. */
#include <math.h>

#include "../impl.h"
#include "vec.h"

static float sum_of_squares(const float *x, int64_t k)
{
    vf s[4] = {v_zero(), v_zero(), v_zero(), v_zero()};
    int64_t j = 0;
    for (; j + 4 * VL <= k; j += 4 * VL) {
        for (int c = 0; c < 4; c++) {
            vf a = v_load(x + j + c * VL);
            s[c] = v_fma(a, a, s[c]);
        }
    }
    for (; j < k; j += VL) {
        vf a = v_load_part(x + j, k - j);
        s[0] = v_fma(a, a, s[0]);
    }
    return v_sum(v_add(v_add(s[0], s[1]), v_add(s[2], s[3])));
}

static void rmsnorm_rows(void *ctx, int64_t begin, int64_t end, int thread)
{
    (void)thread;
    const lco_rmsnorm_args *a = ctx;
    for (int64_t i = begin; i < end; i++) {
        const float *x = a->x + i * a->ld_x;
        float *out = a->out + i * a->ld_out;
        vf scale = v_set(1.0f / sqrtf(sum_of_squares(x, a->k) / (float)a->k + a->eps));
        for (int64_t j = 0; j < a->k; j += VL) {
            vf scaled = v_mul(v_load_part(x + j, a->k - j), scale);
            v_store_part(out + j, v_mul(scaled, v_load_part(a->weight + j, a->k - j)), a->k - j);
        }
    }
}

static lco_status rmsnorm(const lco_rmsnorm_args *args)
{
    const int64_t serial = 32768; /* elements that one thread normalises sooner than another wakes up */
    int64_t grain = 1 + serial / (args->k + 1);
    lco_pool_for(args->exec->pool, args->m, grain, rmsnorm_rows, (void *)args);
    return LCO_OK;
}
