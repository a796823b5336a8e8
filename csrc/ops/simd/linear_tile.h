/* The vector products of linear_prompt.h, for any unit: `unit_dot(sum, w, x)` adds the products of one unit, a fused multiply-add for
 * floats and a dot product of two for bfloat16.
 *
 * Many rows of x: TILE_ROWS weight rows by up to three panels of x, all sums in registers; a lane is a row of x.
 * Few rows of x: VL weight rows are turned over in registers, a lane is a weight row, and no lane is wasted on rows of x that aren't there.
 * Both add an output's units in the same order, so they give the same bits. */
#ifndef LCO_OPS_SIMD_LINEAR_TILE_H
#define LCO_OPS_SIMD_LINEAR_TILE_H

#include "linear_prompt.h"

#define TILE_ROWS (VL == 16 ? 8 : 4)
#define TILE_PANELS 3
#define FEW_ROWS (VL / 2)

typedef vf (*unit_dot_fn)(vf sum, vf w, vf x);

ALWAYS_INLINE void tile_product(float *sums, const float *x, const float *w, const prompt_block *block, int64_t row, bool prefetch,
                                const int panels, unit_dot_fn unit_dot)
{
    vf sum[TILE_ROWS][TILE_PANELS];
    for (int i = 0; i < TILE_ROWS; i++)
        for (int j = 0; j < panels; j++)
            sum[i][j] = v_zero();
    for (int64_t u0 = 0; u0 < block->n_units; u0 += VL) {
        if (prefetch)
            prefetch_next(block, row, TILE_ROWS, u0);
#pragma GCC unroll 4
        for (int64_t u = u0; u < u0 + VL; u++) {
            vf xs[TILE_PANELS];
            for (int j = 0; j < panels; j++)
                xs[j] = v_load(x + (j * block->n_units + u) * VL);
            for (int i = 0; i < TILE_ROWS; i++) {
                vf ws = v_set(w[i * ROW_UNITS + u]);
                for (int j = 0; j < panels; j++)
                    sum[i][j] = unit_dot(sum[i][j], ws, xs[j]);
            }
        }
    }
    for (int i = 0; i < TILE_ROWS; i++) {
        for (int j = 0; j < panels; j++) {
            float *to = sums + (j * ITEM_ROWS + i) * VL;
            v_store(to, block->first ? sum[i][j] : v_add(v_load(to), sum[i][j]));
        }
    }
}

/* The panels of a tile stay in L1 while the weight rows pass. */
ALWAYS_INLINE void many_products(float *sums, const float *x, const float *w, const prompt_block *block, unit_dot_fn unit_dot)
{
    const int64_t panels = (block->x_rows + VL - 1) / VL;
    for (int64_t panel = 0; panel < panels; panel += TILE_PANELS) {
        for (int64_t row = 0; row < block->rows; row += TILE_ROWS) {
            const float *xs = x + panel * block->n_units * VL, *ws = w + row * ROW_UNITS;
            float *to = sums + (panel * ITEM_ROWS + row) * VL;
            if (panels - panel >= 3)
                tile_product(to, xs, ws, block, row, panel == 0, 3, unit_dot);
            else if (panels - panel == 2)
                tile_product(to, xs, ws, block, row, panel == 0, 2, unit_dot);
            else
                tile_product(to, xs, ws, block, row, panel == 0, 1, unit_dot);
        }
        for (int64_t i = panel; block->last && i < panel + TILE_PANELS && i < panels; i++)
            for (int64_t row = 0; row < block->rows; row += VL)
                block->finish(block, i, row, sums + (i * ITEM_ROWS + row) * VL);
    }
}

ALWAYS_INLINE void few_products(float *sums, const float *x, const float *w, const prompt_block *block, const int x_rows,
                                unit_dot_fn unit_dot)
{
    for (int64_t row = 0; row < block->rows; row += VL) {
        vf sum[VL];
        for (int j = 0; j < VL; j++)
            sum[j] = v_zero();
        for (int64_t u0 = 0; u0 < block->n_units; u0 += VL) {
            vf ws[VL];
            prefetch_next(block, row, VL, u0);
            for (int i = 0; i < VL; i++)
                ws[i] = v_load(w + (row + i) * ROW_UNITS + u0);
            v_transpose(ws);
#pragma GCC unroll 16
            for (int u = 0; u < VL; u++)
                for (int j = 0; j < x_rows; j++)
                    sum[j] = unit_dot(sum[j], ws[u], v_set(x[(u0 + u) * VL + j]));
        }
        v_transpose(sum);
        for (int i = 0; i < VL; i++) {
            float *to = sums + (row + i) * VL;
            v_store(to, block->first ? sum[i] : v_add(v_load(to), sum[i]));
        }
        if (block->last)
            block->finish(block, 0, row, sums + row * VL);
    }
}

ALWAYS_INLINE void unit_products(float *sums, const uint32_t *x, const uint32_t *w, const prompt_block *block, unit_dot_fn unit_dot)
{
    const float *xs = (const float *)x, *ws = (const float *)w;
    if (block->x_rows > FEW_ROWS)
        many_products(sums, xs, ws, block, unit_dot);
    else if (block->x_rows > 4)
        few_products(sums, xs, ws, block, FEW_ROWS, unit_dot);
    else if (block->x_rows > 2)
        few_products(sums, xs, ws, block, 4, unit_dot);
    else
        few_products(sums, xs, ws, block, 2, unit_dot);
}

#endif
