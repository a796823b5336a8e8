#include "../../base/qweight.h"
#include "../impl.h"

typedef struct {
    const lco_linear_args *args;
    const lco_linear_part *part;
    float *rows; /* [threads, k]: one row of weights as floats for each thread */
} quantized_job;

static void quantized_outputs(void *ctx, int64_t begin, int64_t end, int thread)
{
    const quantized_job *job = ctx;
    const lco_linear_args *a = job->args;
    const lco_linear_part *part = job->part;
    float *w = job->rows + thread * a->k;
    for (int64_t j = begin; j < end; j++) {
        lco_qweight_row(part->w, j, w);
        for (int64_t i = 0; i < a->m; i++) {
            float *out = part->out + i * part->ld_out + j;
            double sum = part->bias != NULL ? part->bias[j] : 0;
            for (int64_t k = 0; k < a->k; k++)
                sum += (double)a->x[i * a->ld_x + k] * w[k];
            *out = (float)(a->accumulate ? sum + *out : sum);
        }
    }
}

lco_status lco_ref_linear_quantized(const lco_linear_args *args)
{
    lco_arena *scratch = args->exec->scratch;
    lco_mark mark = lco_arena_mark(scratch);
    size_t floats = (size_t)lco_pool_size(args->exec->pool) * (size_t)args->k;
    quantized_job job = {.args = args, .rows = lco_arena_take(scratch, floats * sizeof(float))};
    if (job.rows == NULL)
        return LCO_ENOMEM;
    for (int p = 0; p < args->n_parts; p++) {
        job.part = &args->part[p];
        lco_pool_for(args->exec->pool, job.part->n, 16, quantized_outputs, &job);
    }
    lco_arena_reset(scratch, mark);
    return LCO_OK;
}
