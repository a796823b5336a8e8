/* SwiGLU over vec.h, as one run of m * n elements. */
#include "../impl.h"
#include "silu.h"

#define SWIGLU_BLOCK 4096

static void swiglu_blocks(void *ctx, int64_t begin, int64_t end, int thread)
{
    (void)thread;
    const lco_swiglu_args *a = ctx;
    int64_t i = begin * SWIGLU_BLOCK, last = end * SWIGLU_BLOCK < a->m * a->n ? end * SWIGLU_BLOCK : a->m * a->n;
    for (; i < last; i += VL)
        v_store_part(a->out + i, silu_times(v_load_part(a->gate + i, last - i), v_load_part(a->up + i, last - i)), last - i);
}

static lco_status swiglu(const lco_swiglu_args *args)
{
    int64_t blocks = (args->m * args->n + SWIGLU_BLOCK - 1) / SWIGLU_BLOCK;
    lco_pool_for(args->exec->pool, blocks, 4, swiglu_blocks, (void *)args);
    return LCO_OK;
}
