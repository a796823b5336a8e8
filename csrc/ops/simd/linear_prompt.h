/* Prompt rows of `linear`: a blocked product, written once for every kind of arithmetic.
 *
 *   out[m, n] = x[m, k] . w[n, k]^T, computed as out^T so that weight rows are used as they lie and only x is turned over.
 *
 *   packed x   [block of k][panel of VL rows][unit][VL]      once a call; a unit is 4 bytes of one row: one float or two bfloat16
 *   weights    [item rows][ROW_UNITS]                        one block of k of an item's rows, copied (and widened) into cached scratch
 *   sums       [panel][ITEM_ROWS][VL]                        float32, an item's part of out^T; a tile of VL x VL is one run
 *
 * An item is up to ITEM_ROWS weight rows of one part. A thread walks an item's blocks of k in order; `multiply` adds a block's products to
 * the sums, and in the last block turns each tile over into out as soon as it is complete, so that writing overlaps with products. Units
 * past k are zero in both operands. An output is summed in the order of k whatever the items, the panels and the threads are: blocks depend
 * on k alone. */
#ifndef LCO_OPS_SIMD_LINEAR_PROMPT_H
#define LCO_OPS_SIMD_LINEAR_PROMPT_H

#include "../ops.h"
#include "vec.h"

#define ITEM_ROWS 96                     /* weight rows at a time, at most */
#define MAX_BLOCK_UNITS 320              /* units of k at a time, at most */
#define ROW_UNITS (MAX_BLOCK_UNITS + VL) /* the distance keeps rows off the same cache sets */
#define FEW_PANELS 2                     /* so few rows of x: reading weights rules, and items of VL rows read nearly in order */
#define NEAR_ITEM ((int64_t)128 << 10)   /* items of up to so many bytes prefetch the next item, larger ones their next block */
#define MAX_PROMPT_ROWS 1024             /* rows of x packed at a time */

/* One block of k of one item, where its item goes, and the weights that are copied after it. */
typedef struct {
    int64_t x_rows, rows, n_units; /* rows: of weights, a multiple of row_step; n_units: a multiple of VL */
    bool first, last;              /* first: sums are overwritten; last: they are complete */
    bool accumulate;
    float *out; /* [x_rows][columns], ld_out apart */
    int64_t ld_out, columns;
    const float *bias;             /* [columns] or NULL */
    const char *next;              /* row r begins at next + r * row_bytes */
    int64_t row_bytes, next_lines; /* cache lines of a row to prefetch in each VL units of this block */
} prompt_block;

/* Spreads the prefetch of the next block over this one: `rows` rows from `row` on, at unit u. */
ALWAYS_INLINE void prefetch_next(const prompt_block *block, int64_t row, const int64_t rows, int64_t u)
{
    for (int64_t r = 0; r < rows; r++)
        for (int64_t i = 0; i < block->next_lines; i++)
            _mm_prefetch(block->next + (row + r) * block->row_bytes + (u / VL * block->next_lines + i) * 64, _MM_HINT_T1);
}

/* Turns a tile of sums over into out, with bias and what out held before. */
ALWAYS_INLINE void finish_tile(const prompt_block *block, int64_t panel, int64_t row, const float *sums)
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
    int64_t row0, rows, panels;         /* the rows of x of this pass */
    int64_t units, blocks, block_units; /* of k; units and block_units are multiples of VL */
    int64_t item_rows, first[LCO_LINEAR_PARTS + 1];
    uint32_t *x;
    uint32_t *w; /* [thread][ITEM_ROWS][ROW_UNITS] */
    float *sums; /* [thread][panels][ITEM_ROWS][VL] */
} prompt_job;

static int64_t block_units(const prompt_job *job, int64_t block)
{
    const int64_t left = job->units - block * job->block_units;
    return left < job->block_units ? left : job->block_units;
}

static uint32_t *packed_block(const prompt_job *job, int64_t block) { return job->x + block * job->block_units * job->panels * VL; }

static void pack_task(void *ctx, int64_t begin, int64_t end, int thread)
{
    (void)thread;
    const prompt_job *job = ctx;
    const lco_linear_args *a = job->args;
    for (int64_t item = begin; item < end; item++) {
        int64_t panel = item / job->blocks, block = item % job->blocks, n_units = block_units(job, block);
        int64_t k0 = block * job->block_units * job->kernel->per_unit, row = panel * VL, rows = job->rows - row < VL ? job->rows - row : VL;
        job->kernel->pack_x(packed_block(job, block) + panel * n_units * VL, a->x + (job->row0 + row) * a->ld_x + k0, a->ld_x, rows,
                            a->k - k0, n_units);
    }
}

static void prompt_item(const prompt_job *job, int64_t item, uint32_t *w, float *sums)
{
    const lco_linear_args *a = job->args;
    const prompt_kernel *kernel = job->kernel;
    int p = 0;
    while (item >= job->first[p + 1])
        p++;
    const lco_linear_part *part = &a->part[p];
    const int64_t n0 = (item - job->first[p]) * job->item_rows;
    const int64_t rows = part->n - n0 < job->item_rows ? part->n - n0 : job->item_rows;
    const int64_t padded = (rows + kernel->row_step - 1) / kernel->row_step * kernel->row_step;
    const int64_t size = (int64_t)lco_dtype_bytes(part->dtype), row_bytes = a->k * size, block_k = job->block_units * kernel->per_unit;
    const int64_t item_bytes = rows * row_bytes;
    const char *base = (const char *)part->w + n0 * row_bytes;
    memset(w + rows * ROW_UNITS, 0, (size_t)((padded - rows) * ROW_UNITS) * sizeof *w);
    for (int64_t i = 0; i < job->blocks; i++) {
        const int64_t k0 = i * block_k, n_units = block_units(job, i);
        for (int64_t j = 0; j < rows; j++)
            kernel->copy_w(w + j * ROW_UNITS, base + j * row_bytes + k0 * size, part->dtype, a->k - k0, n_units);
        prompt_block block = {.x_rows = job->rows, .rows = padded, .n_units = n_units, .row_bytes = row_bytes};
        block.first = i == 0;
        block.last = i == job->blocks - 1;
        block.accumulate = a->accumulate;
        block.out = part->out + job->row0 * part->ld_out + n0;
        block.ld_out = part->ld_out;
        block.columns = rows;
        block.bias = part->bias != NULL ? part->bias + n0 : NULL;
        const int64_t next = item_bytes <= NEAR_ITEM ? i : i + 1 < job->blocks ? i + 1 : 0; /* whose place is prefetched */
        const int64_t next_k = a->k - next * block_k < block_k ? a->k - next * block_k : block_k;
        block.next = base + next * block_k * size + (next > i ? 0 : item_bytes);
        block.next_lines = (next_k * size / 64 * VL + n_units - 1) / n_units;
        kernel->multiply(sums, packed_block(job, i), w, &block);
    }
}

static void prompt_task(void *ctx, int64_t begin, int64_t end, int thread)
{
    const prompt_job *job = ctx;
    uint32_t *w = job->w + (int64_t)thread * ITEM_ROWS * ROW_UNITS;
    float *sums = job->sums + (int64_t)thread * job->panels * ITEM_ROWS * VL;
    if (job->kernel->begin != NULL)
        job->kernel->begin();
    for (int64_t item = begin; item < end; item++)
        prompt_item(job, item, w, sums);
    if (job->kernel->end != NULL)
        job->kernel->end();
}

/* Rows [row0, row0 + rows): packs x, then multiplies. */
static lco_status prompt_pass(prompt_job *job)
{
    const lco_linear_args *a = job->args;
    lco_arena *scratch = a->exec->scratch;
    const int threads = lco_pool_size(a->exec->pool);
    const lco_mark mark = lco_arena_mark(scratch);
    job->panels = (job->rows + VL - 1) / VL;
    job->x = lco_arena_take(scratch, (size_t)(job->panels * VL) * (size_t)job->units * sizeof *job->x);
    job->w = lco_arena_take(scratch, (size_t)threads * ITEM_ROWS * ROW_UNITS * sizeof *job->w);
    job->sums = lco_arena_take(scratch, (size_t)threads * (size_t)(job->panels * ITEM_ROWS * VL) * sizeof *job->sums);
    lco_status status = job->x != NULL && job->w != NULL && job->sums != NULL ? LCO_OK : LCO_ENOMEM;
    if (status == LCO_OK) {
        const int64_t items = job->first[a->n_parts];
        lco_pool_for(a->exec->pool, job->panels * job->blocks, 4, pack_task, job);
        lco_pool_for(a->exec->pool, items, 1 + items / (16 * threads), prompt_task, job);
    }
    lco_arena_reset(scratch, mark);
    return status;
}

/* Rows [0, m_prompt) of all parts. Many rows are cut into passes of equal size, so that none is left with a few. */
static lco_status linear_prompt(const lco_linear_args *a, const prompt_kernel *kernel)
{
    prompt_job job = {.args = a, .kernel = kernel};
    const int64_t wanted = (a->k + kernel->per_unit - 1) / kernel->per_unit;
    job.units = (wanted + VL - 1) / VL * VL;
    job.blocks = (job.units + MAX_BLOCK_UNITS - 1) / MAX_BLOCK_UNITS;
    job.block_units = ((job.units + job.blocks - 1) / job.blocks + VL - 1) / VL * VL;
    int64_t n = 0;
    for (int p = 0; p < a->n_parts; p++)
        n += a->part[p].n;
    const int64_t share = n / (16 * lco_pool_size(a->exec->pool)) + 1, largest = a->m_prompt <= FEW_PANELS * VL ? VL : ITEM_ROWS;
    job.item_rows = ((share < largest ? share : largest) + kernel->row_step - 1) / kernel->row_step * kernel->row_step;
    for (int p = 0; p < a->n_parts; p++)
        job.first[p + 1] = job.first[p] + (a->part[p].n + job.item_rows - 1) / job.item_rows;
    const int64_t passes = (a->m_prompt + MAX_PROMPT_ROWS - 1) / MAX_PROMPT_ROWS;
    const int64_t step = ((a->m_prompt + passes - 1) / passes + VL - 1) / VL * VL;
    lco_status status = LCO_OK;
    for (job.row0 = 0; status == LCO_OK && job.row0 < a->m_prompt; job.row0 += step) {
        job.rows = a->m_prompt - job.row0 < step ? a->m_prompt - job.row0 : step;
        status = prompt_pass(&job);
    }
    return status;
}

#endif
