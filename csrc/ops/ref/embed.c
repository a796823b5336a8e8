#include "../../base/convert.h"
#include "../../base/qweight.h"
#include "../impl.h"

static void embed_rows(void *ctx, int64_t begin, int64_t end, int thread)
{
    (void)thread;
    const lco_embed_args *a = ctx;
    size_t row_bytes = (size_t)a->k * lco_dtype_bytes(a->dtype);
    for (int64_t i = begin; i < end; i++) {
        if (a->dtype == LCO_QUANTIZED) {
            lco_qweight_row(a->table, a->ids[i], a->out + i * a->k);
            continue;
        }
        const uint8_t *row = (const uint8_t *)a->table + (size_t)a->ids[i] * row_bytes;
        for (int64_t j = 0; j < a->k; j++)
            a->out[i * a->k + j] = lco_element(row, j, a->dtype);
    }
}

lco_status lco_ref_embed(const lco_embed_args *args)
{
    lco_pool_for(args->exec->pool, args->m, 16, embed_rows, (void *)args);
    return LCO_OK;
}
