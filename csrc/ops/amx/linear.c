/* linear with AMX: prompt rows of bfloat16 weights by tiles.
 *
 * A tile product adds A [16 weight rows][32 of k] . B [16 pairs of k][16 rows of x] to C [16 weight rows][16 rows of x]: weight rows are
 * an A operand as they lie, packed x is a B operand as it lies. Two A and two B tiles give four products for four loads:
 *   tiles 0..3: C (2 x 2), 4..5: A, 6..7: B
 * Weights pass while two panels of x stay: their loads ask for no place in L1. */
#define ITEM_ROWS 128
#define MAX_BLOCK_UNITS 512
#include "../simd/linear_mlp.h"
#include "tiles.h"

/* Where the tile of a panel and of the `half`-th 16 weight rows lies. */
#define SUMS_AT(sums, panel, half) ((sums) + ((panel) * ITEM_ROWS + (half) * TILE) * VL)

/* Asks for the lines of out, which another core may hold, that hold `columns` weight rows from `row` on of rows [begin, end) of x. */
ALWAYS_INLINE void prefetch_out(const prompt_block *block, int64_t row, const int columns, int64_t begin, int64_t end)
{
    if (!block->last || block->middle != NULL)
        return;
    for (int64_t i = begin; i < (end < block->x_rows ? end : block->x_rows); i++)
        for (int j = 0; j < columns; j += VL)
            __builtin_prefetch(block->out + i * block->ld_out + row + j, 1);
}

/* What is prefetched in the products of a row pair with panels [panel, panel + 2): a share of the next weights, and the lines of out. */
ALWAYS_INLINE void prefetch_step(const prompt_block *block, int64_t row, int64_t panel, int64_t panels, int64_t u)
{
    const int64_t first = 2 * TILE * panel / panels, end = 2 * TILE * (panel + 2 < panels ? panel + 2 : panels) / panels;
    prefetch_next(block, row + first, end - first, u);
    const int64_t x = panel * TILE, begin = 2 * TILE * u / block->n_units, stop = 2 * TILE * (u + TILE) / block->n_units;
    prefetch_out(block, row, 2 * TILE, x + begin, x + stop);
}

static void product_2x2(float *sums, const uint32_t *x, const uint32_t *w, const prompt_block *block, int64_t row, int64_t panel,
                        int64_t panels)
{
    const int64_t n_units = block->n_units;
    if (block->first) {
        _tile_zero(0);
        _tile_zero(1);
        _tile_zero(2);
        _tile_zero(3);
    } else {
        _tile_loadd(0, SUMS_AT(sums, 0, 0), VL * 4);
        _tile_loadd(1, SUMS_AT(sums, 1, 0), VL * 4);
        _tile_loadd(2, SUMS_AT(sums, 0, 1), VL * 4);
        _tile_loadd(3, SUMS_AT(sums, 1, 1), VL * 4);
    }
    for (int64_t u = 0; u < n_units; u += TILE) {
        prefetch_step(block, row, panel, panels, u);
        _tile_stream_loadd(4, w + u, ROW_UNITS * 4);
        _tile_loadd(6, x + u * VL, VL * 4);
        _tile_loadd(7, x + (n_units + u) * VL, VL * 4);
        _tile_stream_loadd(5, w + TILE * ROW_UNITS + u, ROW_UNITS * 4);
        _tile_dpbf16ps(0, 4, 6);
        _tile_dpbf16ps(1, 4, 7);
        _tile_dpbf16ps(2, 5, 6);
        _tile_dpbf16ps(3, 5, 7);
    }
    _tile_stored(0, SUMS_AT(sums, 0, 0), VL * 4);
    _tile_stored(1, SUMS_AT(sums, 1, 0), VL * 4);
    _tile_stored(2, SUMS_AT(sums, 0, 1), VL * 4);
    _tile_stored(3, SUMS_AT(sums, 1, 1), VL * 4);
}

/* The last panel of an odd count. */
static void product_2x1(float *sums, const uint32_t *x, const uint32_t *w, const prompt_block *block, int64_t row, int64_t panel,
                        int64_t panels)
{
    if (block->first) {
        _tile_zero(0);
        _tile_zero(2);
    } else {
        _tile_loadd(0, SUMS_AT(sums, 0, 0), VL * 4);
        _tile_loadd(2, SUMS_AT(sums, 0, 1), VL * 4);
    }
    for (int64_t u = 0; u < block->n_units; u += TILE) {
        prefetch_step(block, row, panel, panels, u);
        _tile_loadd(6, x + u * VL, VL * 4);
        _tile_stream_loadd(4, w + u, ROW_UNITS * 4);
        _tile_stream_loadd(5, w + TILE * ROW_UNITS + u, ROW_UNITS * 4);
        _tile_dpbf16ps(0, 4, 6);
        _tile_dpbf16ps(2, 5, 6);
    }
    _tile_stored(0, SUMS_AT(sums, 0, 0), VL * 4);
    _tile_stored(2, SUMS_AT(sums, 0, 1), VL * 4);
}

static void multiply_tiles(float *sums, const uint32_t *x, const uint32_t *w, const prompt_block *block)
{
    const int64_t panels = (block->x_rows + TILE - 1) / TILE;
    for (int64_t panel = 0; panel < panels; panel += 2) {
        for (int64_t row = 0; row < block->rows; row += 2 * TILE) {
            const int64_t width = panels - panel < 2 ? 1 : 2;
            float *to = SUMS_AT(sums, panel, row / TILE);
            const uint32_t *xs = x + panel * block->n_units * VL, *ws = w + row * ROW_UNITS;
            FENCE();
            if (width == 2)
                product_2x2(to, xs, ws, block, row, panel, panels);
            else
                product_2x1(to, xs, ws, block, row, panel, panels);
            FENCE();
            for (int64_t i = 0; block->last && i < 2 * width; i++)
                block->finish(block, panel + i % width, row + i / width * TILE, SUMS_AT(to, i % width, i / width));
        }
    }
}

static const prompt_kernel KERNEL = {.per_unit = 2,
                                     .row_step = 2 * TILE,
                                     .shares = 5,
                                     .pack_x = pack_x_bf16,
                                     .copy_w = copy_w_bf16,
                                     .multiply = multiply_tiles,
                                     .begin = tiles_begin,
                                     .end = tiles_end};

lco_status lco_amx_linear(const lco_linear_args *a) { return linear_bf16(a, &KERNEL); }

lco_status lco_amx_mlp(const lco_mlp_args *a) { return mlp_bf16(a, &KERNEL, lco_amx_linear); }
