/* The vector tile of linear_prompt.h: TILE_ROWS weight rows by up to three panels of x, all sums in registers.
 * `unit_dot(sum, w, x)` adds the products of one unit; it is a fused multiply-add for floats and a dot product of two for bfloat16. */
#ifndef LCO_OPS_SIMD_LINEAR_TILE_H
#define LCO_OPS_SIMD_LINEAR_TILE_H

#include "linear_prompt.h"

#define TILE_ROWS (VL == 16 ? 8 : 4)
#define TILE_PANELS 3

ALWAYS_INLINE void tile_product(float *sums, const float *x, const float *w, int64_t n_units, bool first, const int panels,
                                vf (*unit_dot)(vf, vf, vf))
{
    vf sum[TILE_ROWS][TILE_PANELS];
    for (int i = 0; i < TILE_ROWS; i++)
        for (int j = 0; j < panels; j++)
            sum[i][j] = v_zero();
#pragma GCC unroll 4
    for (int64_t u = 0; u < n_units; u++) {
        vf xs[TILE_PANELS];
        for (int j = 0; j < panels; j++)
            xs[j] = v_load(x + (j * n_units + u) * VL);
        for (int i = 0; i < TILE_ROWS; i++) {
            vf ws = v_set(w[i * ROW_UNITS + u]);
            for (int j = 0; j < panels; j++)
                sum[i][j] = unit_dot(sum[i][j], ws, xs[j]);
        }
    }
    for (int i = 0; i < TILE_ROWS; i++) {
        for (int j = 0; j < panels; j++) {
            float *to = sums + (j * ITEM_ROWS + i) * VL;
            v_store(to, first ? sum[i][j] : v_add(v_load(to), sum[i][j]));
        }
    }
}

/* All panels and rows; the panels of a tile stay in L1 while the weight rows pass. */
ALWAYS_INLINE void tile_products(float *sums, const uint32_t *x, const uint32_t *w, int64_t panels, int64_t rows, int64_t n_units, bool first,
                                 vf (*unit_dot)(vf, vf, vf))
{
    for (int64_t panel = 0; panel < panels; panel += TILE_PANELS) {
        const float *xs = (const float *)x + panel * n_units * VL;
        for (int64_t i = 0; i < rows; i += TILE_ROWS) {
            const float *ws = (const float *)w + i * ROW_UNITS;
            float *to = sums + (panel * ITEM_ROWS + i) * VL;
            if (panels - panel >= 3)
                tile_product(to, xs, ws, n_units, first, 3, unit_dot);
            else if (panels - panel == 2)
                tile_product(to, xs, ws, n_units, first, 2, unit_dot);
            else
                tile_product(to, xs, ws, n_units, first, 1, unit_dot);
        }
    }
}

#endif
