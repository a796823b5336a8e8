#include <math.h>

#include "../impl.h"

static void rmsnorm_rows(void *ctx, int64_t begin, int64_t end, int thread)
{
    (void)thread;
    const lco_rmsnorm_args *a = ctx;
    for (int64_t i = begin; i < end; i++) {
        const float *x = a->x + i * a->ld_x;
        float *out = a->out + i * a->ld_out;
        double sum = 0;
        for (int64_t j = 0; j < a->k; j++)
            sum += (double)x[j] * x[j];
        double scale = 1 / sqrt(sum / (double)a->k + a->eps);
        for (int64_t j = 0; j < a->k; j++)
            out[j] = (float)(x[j] * scale * a->weight[j]);
    }
}

lco_status lco_ref_rmsnorm(const lco_rmsnorm_args *args)
{
    lco_pool_for(args->exec->pool, args->m, 16, rmsnorm_rows, (void *)args);
    return LCO_OK;
}
