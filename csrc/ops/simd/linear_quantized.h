/* linear_quantized, all but the product of one panel of weights with a tile of x, which is a file's own for each instruction set.
 *
 * x is rounded once a call, for each row and block of inputs, to integers of 16 bits: x ~ scale * (256 * high + low), all of high and low in
 * [-128, 127], so that products are those of bytes: the same number of instructions as bfloat16 products of x would take, and 1/60 of the error
 * (benchmarks/results/LOG.md). Sums within a block are exact. With x_int8 there is high alone.
 *
 *   tile of x   codes  [block][8 inputs][row][plane: high, low][part: even inputs, odd inputs][4 bytes], or, for AMX,
 *                      [block][row / 16][plane][chunk of inputs][row % 16][8 inputs][part][4 bytes]
 *               scale, sum, total   [block][row]      sum = scale * total, total = the sum of the integers
 *
 * An output is a chain over blocks b of tot = fma(integer sum, weight scale * x scale, tot), then tot = fma(offset, sum, tot) where there are offsets,
 * whatever else is computed and by how many threads. */
#ifndef LCO_OPS_SIMD_LINEAR_QUANTIZED_H
#define LCO_OPS_SIMD_LINEAR_QUANTIZED_H

#include <math.h>

#include "../../base/convert.h"
#include "../../base/qweight.h"
#include "../ops.h"
#include "vec.h"

#define X_TILE 6      /* rows of x at once, at most, with one plane */
#define X_TILE_WIDE 4 /* with two: sums of 32 outputs fill 16 registers; more are slower (benchmarks/results/LOG.md) */
#define AMX_ROWS 64
#define LARGEST_16 32639 /* 127 * 256 + 127 */
#define LARGEST_8 127
#define SMALLEST_X 1e-30f               /* blocks of x below it are rounded as if they held it */
#define ITEM_BYTES ((int64_t)512 << 10) /* panels that stay in L2 while the tiles of x pass */
#define ROUND_BITS 0x4B400000           /* of 1.5 * 2^23: added to a float it leaves the nearest integer in the low bits */

/* x for weights with blocks and order alike. */
typedef struct {
    const lco_linear_args *args;
    const int32_t *order;
    int64_t block, blocks, tiles, tile_rows;
    int64_t chunk; /* AMX: inputs of a tile register; 0 for the layout of vectors */
    int planes;
    int8_t *codes;
    float *scale, *sum;
    int32_t *total;
} quantized_x;

typedef struct {
    const int8_t *codes;
    const float *scale, *sum;
    const int32_t *total;
    int rows, held, planes; /* held: rows in memory; AMX: a multiple of 16 */
    int64_t chunk;
} x_tile;

/* sums[row][32] = the products of a panel with a tile. `ahead`: whether weights are prefetched. */
typedef void (*panel_product)(const lco_qweight *q, const uint8_t *panel, const x_tile *x, float *sums, bool ahead);

typedef struct {
    panel_product product;
    bool prefetch;                         /* weights, when the first tile passes */
    int64_t (*chunk)(const lco_qweight *); /* AMX: of quantized_x; else NULL */
} quantized_kernel;

typedef struct {
    const lco_linear_args *args;
    const quantized_kernel *kernel;
    const quantized_x *x[LCO_LINEAR_PARTS];
    int64_t panels[LCO_LINEAR_PARTS]; /* of an item */
    int64_t first[LCO_LINEAR_PARTS + 1];
} quantized_job;

static x_tile get_tile(const quantized_x *x, int64_t tile)
{
    const int64_t row = tile * x->tile_rows, left = x->args->m - row, at = row * x->blocks;
    x_tile t = {.rows = (int)(left < x->tile_rows ? left : x->tile_rows), .planes = x->planes, .chunk = x->chunk};
    t.held = x->chunk > 0 ? (t.rows + 15) / 16 * 16 : t.rows;
    t.codes = x->codes + at * x->block * x->planes;
    t.scale = x->scale + at;
    t.sum = x->sum + at;
    t.total = x->total + at;
    return t;
}

/* Where the codes of a row's block go: 8 inputs are `eight` bytes apart, of the next chunk `chunk`, planes `plane`. */
typedef struct {
    int8_t *at;
    int64_t eight, chunk, plane;
} code_places;

static code_places places_of(const quantized_x *x, const x_tile *t, int64_t row, int64_t block)
{
    int8_t *at = x->codes + (t->codes - x->codes) + block * t->held * x->block * x->planes;
    if (x->chunk == 0)
        return (code_places){.at = at + row * x->planes * 8, .eight = t->held * x->planes * 8, .chunk = 0, .plane = 8};
    at += row / 16 * 16 * x->block * x->planes + row % 16 * x->chunk;
    return (code_places){.at = at, .eight = 8, .chunk = 16 * x->chunk, .plane = 16 * x->block};
}

/* Floats [k0, k0 + block) of a row in the order of the weights, zeros past the last. */
static void gather_block(const quantized_x *x, const float *row, int64_t k0, float *out)
{
    const int64_t left = x->args->k - k0, n = left < x->block ? left : x->block;
    if (x->order == NULL)
        memcpy(out, row + k0, (size_t)n * sizeof *out);
    else
        for (int64_t i = 0; i < n; i++)
            out[i] = row[x->order[k0 + i]];
    memset(out + n, 0, (size_t)(x->block - n) * sizeof *out);
}

/* The scale that takes the largest of n floats to `largest`: NaN when one is not finite. */
static float scale_of(const float *values, int64_t n, int largest, float *inverse)
{
    int32_t bits = 0;
    for (int64_t i = 0; i < n; i++) {
        const int32_t magnitude = (int32_t)(lco_float_bits(values[i]) & 0x7FFFFFFFu);
        bits = magnitude > bits ? magnitude : bits;
    }
    float most = lco_float_of_bits((uint32_t)bits);
    if (bits >= 0x7F800000) {
        *inverse = 0;
        return NAN;
    }
    most = most > SMALLEST_X ? most : SMALLEST_X;
    *inverse = (float)largest / most;
    return most / (float)largest;
}

/* Rounds one block of one row. */
static void round_block(const quantized_x *x, const float *values, const code_places *to, float *scale, float *sum, int32_t *total)
{
    const __m128i parts = _mm_setr_epi8(0, 2, 4, 6, 1, 3, 5, 7, 8, 10, 12, 14, 9, 11, 13, 15);
    const bool wide = x->planes == 2;
    const int64_t block = x->block, chunk = x->chunk > 0 ? x->chunk : block;
    int8_t high[LCO_LARGEST_BLOCK + 8], low[LCO_LARGEST_BLOCK + 8];
    float inverse;
    int32_t all = 0;
    *scale = scale_of(values, block, wide ? LARGEST_16 : LARGEST_8, &inverse);
    for (int64_t i = 0; i < block; i++) {
        const int32_t rounded = (int32_t)lco_float_bits(values[i] * inverse + lco_float_of_bits(ROUND_BITS)) - ROUND_BITS;
        const int32_t v = inverse > 0 ? rounded : 0;
        all += v;
        low[i] = (int8_t)v;
        high[i] = (int8_t)(wide ? (v + 128) >> 8 : v);
    }
    *total = all;
    *sum = *scale * (float)all;
    for (int64_t first = 0; first < block; first += chunk) {
        int8_t *at = to->at + first / chunk * to->chunk;
        for (int64_t i = first; i < first + chunk; i += 8, at += to->eight) {
            _mm_storel_epi64((__m128i *)at, _mm_shuffle_epi8(_mm_loadl_epi64((const __m128i *)(high + i)), parts));
            if (wide)
                _mm_storel_epi64((__m128i *)(at + to->plane), _mm_shuffle_epi8(_mm_loadl_epi64((const __m128i *)(low + i)), parts));
        }
    }
}

/* Rows that AMX holds past the last are zeros. */
static void clear_rows(const quantized_x *x, const x_tile *t)
{
    const int64_t at = t->scale - x->scale;
    const size_t held = (size_t)(t->held * x->blocks);
    memset(x->codes + (t->codes - x->codes), 0, held * (size_t)(x->block * x->planes));
    memset(x->scale + at, 0, held * sizeof *x->scale);
    memset(x->sum + at, 0, held * sizeof *x->sum);
    memset(x->total + at, 0, held * sizeof *x->total);
}

static void round_tiles(void *ctx, int64_t begin, int64_t end, int thread)
{
    (void)thread;
    const quantized_x *x = ctx;
    float values[LCO_LARGEST_BLOCK];
    for (int64_t tile = begin; tile < end; tile++) {
        const x_tile t = get_tile(x, tile);
        const int64_t at = t.scale - x->scale;
        if (t.held > t.rows)
            clear_rows(x, &t);
        for (int64_t r = 0; r < t.rows; r++)
            for (int64_t b = 0; b < x->blocks; b++) {
                const int64_t i = at + b * t.held + r;
                const code_places to = places_of(x, &t, r, b);
                gather_block(x, x->args->x + (tile * x->tile_rows + r) * x->args->ld_x, b * x->block, values);
                round_block(x, values, &to, &x->scale[i], &x->sum[i], &x->total[i]);
            }
    }
}

/* `chunk` as in quantized_x: AMX takes tiles of AMX_ROWS rows. */
static bool round_x(const lco_linear_args *a, const lco_qweight *q, int64_t chunk, quantized_x *x)
{
    lco_arena *scratch = a->exec->scratch;
    *x = (quantized_x){.args = a, .order = lco_qweight_order(q), .block = q->block, .blocks = lco_qweight_blocks(q), .chunk = chunk};
    const int64_t most = chunk > 0 ? AMX_ROWS : a->x_int8 ? X_TILE : X_TILE_WIDE;
    x->planes = a->x_int8 ? 1 : 2;
    x->tiles = (a->m + most - 1) / most;
    x->tile_rows = chunk > 0 ? most : (a->m + x->tiles - 1) / x->tiles;
    const size_t rows = (size_t)(chunk > 0 ? (a->m + 15) / 16 * 16 : a->m) * (size_t)x->blocks;
    x->codes = lco_arena_take(scratch, rows * (size_t)x->block * (size_t)x->planes);
    x->scale = lco_arena_take(scratch, rows * sizeof *x->scale);
    x->sum = lco_arena_take(scratch, rows * sizeof *x->sum);
    x->total = lco_arena_take(scratch, rows * sizeof *x->total);
    if (x->codes == NULL || x->scale == NULL || x->sum == NULL || x->total == NULL)
        return false;
    lco_pool_for(a->exec->pool, x->tiles, 1, round_tiles, x);
    return true;
}

/* Weights that read x alike. */
static bool same_x(const lco_qweight *a, const lco_qweight *b)
{
    return a->block == b->block && a->order_hash == b->order_hash && a->ordered == b->ordered &&
           (!a->ordered || memcmp(lco_qweight_order(a), lco_qweight_order(b), (size_t)a->k * sizeof(int32_t)) == 0);
}

static void finish_tile(const lco_linear_args *a, const lco_linear_part *part, int64_t row, int rows, int64_t column, const float *sums)
{
    for (int64_t i = 0; i < rows; i++) {
        float *out = part->out + (row + i) * part->ld_out + column;
        for (int64_t j = 0; j < LCO_PANEL_ROWS && column + j < part->n; j += VL) {
            const int64_t left = part->n - column - j;
            vf y = v_load(sums + i * LCO_PANEL_ROWS + j);
            if (part->bias != NULL)
                y = v_add(y, v_load_part(part->bias + column + j, left));
            v_store_part(out + j, a->accumulate ? v_add(v_load_part(out + j, left), y) : y, left);
        }
    }
}

static void quantized_task(void *ctx, int64_t begin, int64_t end, int thread)
{
    (void)thread;
    const quantized_job *job = ctx;
    float sums[AMX_ROWS * LCO_PANEL_ROWS];
    for (int64_t item = begin; item < end; item++) {
        int p = 0;
        while (item >= job->first[p + 1])
            p++;
        const lco_linear_part *part = &job->args->part[p];
        const lco_qweight *q = part->w;
        const int64_t from = (item - job->first[p]) * job->panels[p], panels = lco_qweight_panels(q);
        const int64_t to = from + job->panels[p] < panels ? from + job->panels[p] : panels;
        for (int64_t tile = 0; tile < job->x[p]->tiles; tile++) {
            const x_tile x = get_tile(job->x[p], tile);
            for (int64_t panel = from; panel < to; panel++) {
                job->kernel->product(q, lco_qweight_panel(q, panel), &x, sums, job->kernel->prefetch && tile == 0);
                finish_tile(job->args, part, tile * job->x[p]->tile_rows, x.rows, panel * LCO_PANEL_ROWS, sums);
            }
        }
    }
}

/* Items are as long as stays in L2, and short enough that no thread waits long for the last one. */
static void cut_items(quantized_job *job)
{
    const lco_linear_args *a = job->args;
    int64_t bytes = 0;
    for (int p = 0; p < a->n_parts; p++)
        bytes += (int64_t)lco_qweight_bytes(a->part[p].w);
    const int64_t share = bytes / (8 * lco_pool_size(a->exec->pool)), item = share < ITEM_BYTES ? share : ITEM_BYTES;
    for (int p = 0; p < a->n_parts; p++) {
        const lco_qweight *q = a->part[p].w;
        job->panels[p] = item / (int64_t)lco_panel_bytes(q) > 0 ? item / (int64_t)lco_panel_bytes(q) : 1;
        job->first[p + 1] = job->first[p] + (lco_qweight_panels(q) + job->panels[p] - 1) / job->panels[p];
    }
}

static lco_status linear_quantized(const lco_linear_args *a, const quantized_kernel *kernel)
{
    quantized_x x[LCO_LINEAR_PARTS];
    quantized_job job = {.args = a, .kernel = kernel};
    const lco_mark mark = lco_arena_mark(a->exec->scratch);
    bool ok = true;
    if (a->m == 0)
        return LCO_OK;
    for (int p = 0; p < a->n_parts && ok; p++) {
        for (int before = 0; before < p && job.x[p] == NULL; before++)
            if (same_x(a->part[before].w, a->part[p].w))
                job.x[p] = job.x[before];
        if (job.x[p] == NULL) {
            ok = round_x(a, a->part[p].w, kernel->chunk != NULL ? kernel->chunk(a->part[p].w) : 0, &x[p]);
            job.x[p] = &x[p];
        }
    }
    if (ok) {
        cut_items(&job);
        lco_pool_for(a->exec->pool, job.first[a->n_parts], 1, quantized_task, &job);
    }
    lco_arena_reset(a->exec->scratch, mark);
    return ok ? LCO_OK : LCO_ENOMEM;
}

/* VL scales or offsets of a block from element `at` on. */
ALWAYS_INLINE vf load_scales(const void *from, int64_t at, lco_dtype dtype)
{
    if (dtype == LCO_F16)
        return v_load_as(from, at, LCO_F16);
    return dtype == LCO_BF16 ? v_load_as(from, at, LCO_BF16) : v_load((const float *)from + at);
}

/* How the blocks of a weight are scaled. */
typedef struct {
    size_t scales, offsets; /* where they are in a block */
    lco_dtype dtype;
    lco_offset_kind kind;
} block_scales;

static inline block_scales scales_of(const lco_qweight *q)
{
    return (block_scales){.scales = lco_block_scales(q),
                          .offsets = lco_block_offsets(q),
                          .dtype = (lco_dtype)q->scale_dtype,
                          .kind = (lco_offset_kind)q->offset_kind};
}

/* Offsets of VL rows of a block from `row` on; not asked for LCO_OFFSET_NONE. */
ALWAYS_INLINE vf load_offsets(const block_scales *s, const uint8_t *block, int64_t row, vf scale)
{
    if (s->kind == LCO_OFFSET_FLOATS)
        return load_scales(block + s->offsets, row, s->dtype);
    return v_sub(v_zero(), v_mul(scale, v_from_codes(v_load_codes(block + s->offsets + row), LCO_I8)));
}

#endif
