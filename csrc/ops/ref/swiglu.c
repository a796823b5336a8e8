#include <math.h>

#include "../impl.h"

static void swiglu_rows(void *ctx, int64_t begin, int64_t end, int thread)
{
    (void)thread;
    const lco_swiglu_args *a = ctx;
    for (int64_t i = begin * a->n; i < end * a->n; i++) {
        double z = a->gate[i];
        a->out[i] = (float)(z / (1 + exp(-z)) * a->up[i]);
    }
}

lco_status lco_ref_swiglu(const lco_swiglu_args *args)
{
    lco_pool_for(args->exec->pool, args->m, 16, swiglu_rows, (void *)args);
    return LCO_OK;
}
