#include "quant.h"

#define TILE 512 /* columns of h a pass: only the part from the tile's first row down is computed */
#define PIECE 16 /* rows or columns a thread takes at a time */

typedef struct {
    double *h;
    const float *x;
    float *xt;   /* [k, m] */
    float *tile; /* [k - first, columns] */
    int64_t m, k, ld_x, first, columns;
} job;

static void transpose(void *ctx, int64_t begin, int64_t end, int thread)
{
    (void)thread;
    const job *j = ctx;
    for (int64_t i = 0; i < j->m; i++)
        for (int64_t c = begin; c < end; c++)
            j->xt[c * j->m + i] = j->x[i * j->ld_x + c];
}

static void add_rows(void *ctx, int64_t begin, int64_t end, int thread)
{
    (void)thread;
    const job *j = ctx;
    for (int64_t r = begin; r < end; r++) {
        const int64_t columns = r + 1 < j->columns ? r + 1 : j->columns;
        double *h = j->h + (j->first + r) * j->k + j->first;
        for (int64_t c = 0; c < columns; c++)
            h[c] += (double)j->tile[r * j->columns + c];
    }
}

static lco_status add(job *j, const lco_ops *ops, const lco_exec *exec)
{
    const int64_t widest = j->k < TILE ? j->k : TILE;
    j->xt = lco_arena_take(exec->scratch, (size_t)j->k * (size_t)j->m * sizeof(float));
    j->tile = lco_arena_take(exec->scratch, (size_t)j->k * (size_t)widest * sizeof(float));
    if (j->xt == NULL || j->tile == NULL)
        return LCO_ENOMEM;
    lco_pool_for(exec->pool, j->k, PIECE, transpose, j);
    for (j->first = 0; j->first < j->k; j->first += TILE) {
        const int64_t rows = j->k - j->first;
        const float *xt = j->xt + j->first * j->m;
        j->columns = rows < TILE ? rows : TILE;
        lco_linear_args args = {.n_parts = 1, .x = xt, .m = rows, .m_prompt = rows, .k = j->m, .ld_x = j->m, .exec = exec};
        args.part[0] = (lco_linear_part){.out = j->tile, .ld_out = j->columns, .w = xt, .dtype = LCO_F32, .n = j->columns};
        lco_status status = ops->linear(&args);
        if (status != LCO_OK)
            return status;
        lco_pool_for(exec->pool, rows, PIECE, add_rows, j);
    }
    return LCO_OK;
}

lco_status lco_hessian_add(double *h, const float *x, int64_t m, int64_t k, int64_t ld_x, const lco_ops *ops, const lco_exec *exec)
{
    const lco_mark mark = lco_arena_mark(exec->scratch);
    job j = {.h = h, .x = x, .m = m, .k = k, .ld_x = ld_x};
    lco_status status = add(&j, ops, exec);
    lco_arena_reset(exec->scratch, mark);
    return status;
}
