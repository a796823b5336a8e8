/* Prompt rows of `linear`: a blocked product, written once for every kind of arithmetic.
 *
 *   out[m, n] = x[m, k] . w[n, k]^T, computed as out^T so that weight rows are used as they lie and only x is turned over.
 *
 *   packed x   [block of k][panel of VL rows][unit][VL]      once a call; a unit is 4 bytes of one row: one float or two bfloat16
 *   weights    [item rows][ROW_UNITS]                        one block of k of an item's rows, copied (and widened) into cached scratch
 *   sums       [panel][ITEM_ROWS][VL]                        float32, an item's part of out^T; a tile of VL x VL is one run
 *
 * An item is up to ITEM_ROWS weight rows of one part. (Of `mlp`, VL rows of gate and the same rows of up in turn; their results become x of
 * the product that follows, packed: linear_mlp.h.) A thread walks an item's blocks of k in order; `multiply` adds a block's products to
 * the sums, and in the last block turns each tile over into out as soon as it is complete, so that writing overlaps with products. Units
 * past k are zero in both operands. An output is summed in the order of k whatever the items, the panels and the threads are: blocks depend
 * on k alone. */
#ifndef LCO_OPS_SIMD_LINEAR_PROMPT_H
#define LCO_OPS_SIMD_LINEAR_PROMPT_H

#include "../ops.h"
#include "vec.h"

#ifndef ITEM_ROWS
#define ITEM_ROWS 96        /* weight rows at a time, at most */
#define MAX_BLOCK_UNITS 320 /* units of k at a time, at most */
#endif
#define ROW_UNITS (MAX_BLOCK_UNITS + VL) /* the distance keeps rows off the same cache sets */
#define FEW_PANELS 2                     /* so few rows of x: reading weights rules, and items of VL rows read nearly in order */
#define NEAR_ITEM ((int64_t)128 << 10)   /* items of up to so many bytes prefetch the next item, larger ones their next block */
#define MLP_STEP (4 * VL)                /* items of mlp: two tiles of gate, two of up, whose results fill whole VL units */
#define MAX_PROMPT_ROWS 1024             /* rows of x packed at a time */

/* Rows of x as products read them. */
typedef struct {
    uint32_t *at;                               /* [block of k][panel][unit][VL] */
    int64_t panels, units, blocks, block_units; /* of k; units and block_units are multiples of VL */
} packed_x;

static int64_t block_units(const packed_x *x, int64_t block)
{
    const int64_t left = x->units - block * x->block_units;
    return left < x->block_units ? left : x->block_units;
}

static uint32_t *packed_block(const packed_x *x, int64_t block) { return x->at + block * x->block_units * x->panels * VL; }

/* The weight rows of an item: those of a part, or VL of gate and VL of up in turn. */
typedef struct {
    const char *from, *up; /* up: NULL where there is one part alone */
    int64_t row_bytes;
} item_weights;

/* Which of its part's rows the item's row r is. */
ALWAYS_INLINE int64_t part_row(const item_weights *w, int64_t r) { return w->up != NULL ? r / (2 * VL) * VL + r % VL : r; }

ALWAYS_INLINE const char *weight_row(const item_weights *w, int64_t r)
{
    return (w->up != NULL && r / VL % 2 != 0 ? w->up : w->from) + part_row(w, r) * w->row_bytes;
}

/* One block of k of one item, where its item goes, and the weights that are copied after it. */
typedef struct prompt_block prompt_block;
struct prompt_block {
    int64_t x_rows, rows, n_units; /* rows: of weights, a multiple of row_step; n_units: a multiple of VL */
    bool first, last;              /* first: sums are overwritten; last: they are complete */
    bool accumulate;
    float *out; /* [x_rows][columns], ld_out apart */
    int64_t ld_out, columns;
    const float *bias; /* [columns] or NULL */
    item_weights next;
    int64_t next_lines; /* cache lines of a row to prefetch in each VL units of this block */
    /* Takes a complete tile of sums to where it goes. */
    void (*finish)(const prompt_block *block, int64_t panel, int64_t row, const float *sums);
    /* mlp: */
    const packed_x *middle; /* NULL in linear */
    int64_t column;         /* of the middle, of the item's first row */
    const float *up_bias;
};

/* Spreads the prefetch of the next block over this one: `rows` rows from `row` on, at unit u. */
ALWAYS_INLINE void prefetch_next(const prompt_block *block, int64_t row, const int64_t rows, int64_t u)
{
    for (int64_t r = 0; r < rows; r++)
        for (int64_t i = 0; i < block->next_lines; i++)
            _mm_prefetch(weight_row(&block->next, row + r) + (u / VL * block->next_lines + i) * 64, _MM_HINT_T1);
}

/* Turns a tile of sums over into out, with bias and what out held before. */
static void finish_tile(const prompt_block *block, int64_t panel, int64_t row, const float *sums)
{
    const int64_t left = block->x_rows - panel * VL, rows = left < VL ? left : VL, width = block->columns - row;
    if (width <= 0)
        return;
    vf tile[VL];
    for (int i = 0; i < VL; i++)
        tile[i] = v_load(sums + i * VL);
    v_transpose(tile);
    vf bias = block->bias != NULL ? v_load_part(block->bias + row, width) : v_zero();
    float *out = block->out + panel * VL * block->ld_out + row;
    for (int64_t i = 0; i < rows; i++, out += block->ld_out) {
        vf y = v_add(tile[i], bias);
        v_store_part(out, block->accumulate ? v_add(v_load_part(out, width), y) : y, width);
    }
}

/* One kind of arithmetic. */
typedef struct {
    int per_unit; /* elements of k in a unit */
    int row_step; /* items are multiples of this many rows; copied rows are padded with zero rows to it */
    int shares;   /* items of a thread, at least, where there are rows enough */
    /* One panel and one block of k: units [0, n_units) of `rows` rows from the `left` elements at x (zero beyond). */
    void (*pack_x)(uint32_t *panel, const float *x, int64_t ld_x, int64_t rows, int64_t left, int64_t n_units);
    /* One weight row's n_units units from `left` elements (zero beyond). */
    void (*copy_w)(uint32_t *row, const void *w, lco_dtype dtype, int64_t left, int64_t n_units);
    /* sums (+)= products of one block of k: packed x with copied weight rows; the last block's are finished. Prefetches `next` meanwhile. */
    void (*multiply)(float *sums, const uint32_t *x, const uint32_t *w, const prompt_block *block);
    void (*begin)(void), (*end)(void); /* around a thread's work; may be NULL */
} prompt_kernel;

typedef struct {
    const lco_linear_args *args;
    const prompt_kernel *kernel;
    int64_t row0, rows; /* the rows of x of this pass */
    int64_t item_rows, first[LCO_LINEAR_PARTS + 1];
    packed_x x;
    uint32_t *w; /* [thread][ITEM_ROWS][ROW_UNITS] */
    float *sums; /* [thread][panels][ITEM_ROWS][VL] */
    /* mlp: parts are gate and up, and the results x of the product after it; NULL in linear. */
    const packed_x *middle;
    void (*finish)(const prompt_block *block, int64_t panel, int64_t row, const float *sums);
} prompt_job;

static void pack_task(void *ctx, int64_t begin, int64_t end, int thread)
{
    (void)thread;
    const prompt_job *job = ctx;
    const lco_linear_args *a = job->args;
    for (int64_t item = begin; item < end; item++) {
        int64_t panel = item / job->x.blocks, block = item % job->x.blocks, n_units = block_units(&job->x, block);
        int64_t k0 = block * job->x.block_units * job->kernel->per_unit, row = panel * VL,
                rows = job->rows - row < VL ? job->rows - row : VL;
        job->kernel->pack_x(packed_block(&job->x, block) + panel * n_units * VL, a->x + (job->row0 + row) * a->ld_x + k0, a->ld_x, rows,
                            a->k - k0, n_units);
    }
}

static void prompt_item(const prompt_job *job, int64_t item, uint32_t *w, float *sums)
{
    const lco_linear_args *a = job->args;
    const prompt_kernel *kernel = job->kernel;
    const bool pairs = job->middle != NULL;
    int p = 0;
    while (!pairs && item >= job->first[p + 1])
        p++;
    const lco_linear_part *part = &a->part[p];
    const int64_t item_columns = pairs ? job->item_rows / 2 : job->item_rows, n0 = (item - job->first[p]) * item_columns;
    const int64_t columns = part->n - n0 < item_columns ? part->n - n0 : item_columns;
    const int64_t step = pairs ? MLP_STEP : kernel->row_step, rows = (pairs ? 2 * columns : columns) + step - 1,
                  padded = rows / step * step;
    const int64_t size = (int64_t)lco_dtype_bytes(part->dtype), row_bytes = a->k * size, block_k = job->x.block_units * kernel->per_unit;
    const int64_t item_bytes = columns * row_bytes;
    item_weights from = {.from = (const char *)part->w + n0 * row_bytes, .row_bytes = row_bytes};
    if (pairs)
        from.up = (const char *)a->part[1].w + n0 * row_bytes;
    for (int64_t i = 0; i < job->x.blocks; i++) {
        const int64_t k0 = i * block_k, n_units = block_units(&job->x, i);
        for (int64_t j = 0; j < padded; j++) {
            if (part_row(&from, j) < columns)
                kernel->copy_w(w + j * ROW_UNITS, weight_row(&from, j) + k0 * size, part->dtype, a->k - k0, n_units);
            else
                memset(w + j * ROW_UNITS, 0, (size_t)n_units * sizeof *w);
        }
        prompt_block block = {.x_rows = job->rows, .rows = padded, .n_units = n_units, .columns = columns, .finish = job->finish};
        block.first = i == 0;
        block.last = i == job->x.blocks - 1;
        block.accumulate = a->accumulate;
        block.out = part->out + job->row0 * part->ld_out + n0;
        block.ld_out = part->ld_out;
        block.bias = part->bias != NULL ? part->bias + n0 : NULL;
        block.middle = job->middle;
        block.column = n0;
        block.up_bias = pairs && a->part[1].bias != NULL ? a->part[1].bias + n0 : NULL;
        const int64_t next = item_bytes <= NEAR_ITEM ? i : i + 1 < job->x.blocks ? i + 1 : 0; /* whose place is prefetched */
        const int64_t next_k = a->k - next * block_k < block_k ? a->k - next * block_k : block_k;
        const int64_t ahead = next * block_k * size + (next > i ? 0 : item_bytes);
        block.next = (item_weights){.from = from.from + ahead, .up = pairs ? from.up + ahead : NULL, .row_bytes = row_bytes};
        block.next_lines = (next_k * size / 64 * VL + n_units - 1) / n_units;
        kernel->multiply(sums, packed_block(&job->x, i), w, &block);
    }
}

static void prompt_task(void *ctx, int64_t begin, int64_t end, int thread)
{
    const prompt_job *job = ctx;
    uint32_t *w = job->w + (int64_t)thread * ITEM_ROWS * ROW_UNITS;
    float *sums = job->sums + (int64_t)thread * job->x.panels * ITEM_ROWS * VL;
    if (job->kernel->begin != NULL)
        job->kernel->begin();
    for (int64_t item = begin; item < end; item++)
        prompt_item(job, item, w, sums);
    if (job->kernel->end != NULL)
        job->kernel->end();
}

static void multiply_items(prompt_job *job)
{
    const int64_t items = job->first[job->middle != NULL ? 1 : job->args->n_parts], threads = lco_pool_size(job->args->exec->pool);
    lco_pool_for(job->args->exec->pool, items, 1 + items / (16 * threads), prompt_task, job);
}

static bool take_packed(lco_arena *scratch, packed_x *x)
{
    return (x->at = lco_arena_take(scratch, (size_t)(x->panels * VL) * (size_t)x->units * sizeof *x->at)) != NULL;
}

/* Rows [row0, row0 + rows): packs x, then multiplies, also by what comes `after` (or NULL). */
static lco_status prompt_pass(prompt_job *job, prompt_job *after)
{
    const lco_exec *exec = job->args->exec;
    lco_arena *scratch = exec->scratch;
    const int threads = lco_pool_size(exec->pool);
    const lco_mark mark = lco_arena_mark(scratch);
    const int64_t panels = job->x.panels = (job->rows + VL - 1) / VL;
    job->w = lco_arena_take(scratch, (size_t)threads * ITEM_ROWS * ROW_UNITS * sizeof *job->w);
    job->sums = lco_arena_take(scratch, (size_t)threads * (size_t)(panels * ITEM_ROWS * VL) * sizeof *job->sums);
    bool ok = job->w != NULL && job->sums != NULL && take_packed(scratch, &job->x);
    if (ok && after != NULL) {
        after->row0 = job->row0;
        after->rows = job->rows;
        after->x.panels = panels;
        after->w = job->w;
        after->sums = job->sums;
        ok = take_packed(scratch, &after->x);
    }
    if (ok) {
        lco_pool_for(exec->pool, panels * job->x.blocks, 4, pack_task, job);
        multiply_items(job);
        if (after != NULL)
            multiply_items(after);
    }
    lco_arena_reset(scratch, mark);
    return ok ? LCO_OK : LCO_ENOMEM;
}

/* How k is cut into blocks, and the weight rows into items; both are multiples of `step` rows. */
static prompt_job plan_job(const lco_linear_args *a, const prompt_kernel *kernel, bool pairs)
{
    prompt_job job = {.args = a, .kernel = kernel, .finish = finish_tile};
    const int64_t wanted = (a->k + kernel->per_unit - 1) / kernel->per_unit, step = pairs ? MLP_STEP : kernel->row_step;
    packed_x *x = &job.x;
    x->units = (wanted + VL - 1) / VL * VL;
    x->blocks = (x->units + MAX_BLOCK_UNITS - 1) / MAX_BLOCK_UNITS;
    x->block_units = ((x->units + x->blocks - 1) / x->blocks + VL - 1) / VL * VL;
    int64_t n = 0;
    for (int p = 0; p < a->n_parts; p++)
        n += a->part[p].n;
    const int64_t share = (n - 1) / (kernel->shares * lco_pool_size(a->exec->pool)) + 1;
    const int64_t largest = a->m_prompt <= FEW_PANELS * VL ? VL : ITEM_ROWS / step * step;
    job.item_rows = ((share < largest ? share : largest) + step - 1) / step * step;
    const int64_t item_columns = pairs ? job.item_rows / 2 : job.item_rows;
    for (int p = 0; p < a->n_parts; p++)
        job.first[p + 1] = job.first[p] + (a->part[p].n + item_columns - 1) / item_columns;
    return job;
}

/* Rows [0, m_prompt). Many rows are cut into passes of equal size, so that none is left with a few. */
static lco_status prompt_passes(prompt_job *job, prompt_job *after)
{
    const int64_t m = job->args->m_prompt, passes = (m + MAX_PROMPT_ROWS - 1) / MAX_PROMPT_ROWS;
    const int64_t step = ((m + passes - 1) / passes + VL - 1) / VL * VL;
    lco_status status = LCO_OK;
    for (job->row0 = 0; status == LCO_OK && job->row0 < m; job->row0 += step) {
        job->rows = m - job->row0 < step ? m - job->row0 : step;
        status = prompt_pass(job, after);
    }
    return status;
}

/* Rows [0, m_prompt) of all parts. */
static lco_status linear_prompt(const lco_linear_args *a, const prompt_kernel *kernel)
{
    prompt_job job = plan_job(a, kernel, false);
    return prompt_passes(&job, NULL);
}

#endif
