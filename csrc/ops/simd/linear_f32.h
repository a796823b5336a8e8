/* `linear` with float32 products for all weight types: the whole op for a vector width. */
#ifndef LCO_OPS_SIMD_LINEAR_F32_H
#define LCO_OPS_SIMD_LINEAR_F32_H

#include "linear_decode.h"
#include "linear_tile.h"

static void pack_x_f32(uint32_t *panel, const float *x, int64_t ld_x, int64_t rows, int64_t left, int64_t n_units)
{
    for (int64_t u = 0; u < n_units; u += VL) {
        const int64_t width = left - u < 0 ? 0 : left - u < VL ? left - u : VL;
        vf tile[VL];
        for (int64_t i = 0; i < VL; i++)
            tile[i] = i >= rows ? v_zero() : width == VL ? v_load(x + i * ld_x + u) : v_load_n(x + i * ld_x + u, width);
        v_transpose(tile);
        for (int i = 0; i < VL; i++)
            v_store((float *)panel + (u + i) * VL, tile[i]);
    }
}

ALWAYS_INLINE void widen_row(float *row, const void *w, lco_dtype dtype, int64_t left, int64_t n_units)
{
    const int64_t whole = left < n_units ? left / VL * VL : n_units;
    int64_t u = 0;
    for (; u < whole; u += VL)
        v_store(row + u, v_load_as(w, u, dtype));
    for (; u < n_units; u += VL)
        v_store(row + u, u < left ? v_load_as_n(w, u, left - u, dtype) : v_zero());
}

static void copy_w_f32(uint32_t *row, const void *w, lco_dtype dtype, int64_t left, int64_t n_units)
{
    if (dtype == LCO_BF16)
        widen_row((float *)row, w, LCO_BF16, left, n_units);
    else if (dtype == LCO_F16)
        widen_row((float *)row, w, LCO_F16, left, n_units);
    else
        widen_row((float *)row, w, LCO_F32, left, n_units);
}

ALWAYS_INLINE vf unit_dot_f32(vf sum, vf w, vf x) { return v_fma(w, x, sum); }

static void multiply_f32(float *sums, const uint32_t *x, const uint32_t *w, const prompt_block *block)
{
    unit_products(sums, x, w, block, unit_dot_f32);
}

static lco_status linear_f32(const lco_linear_args *a)
{
    static const prompt_kernel KERNEL = {
        .per_unit = 1, .row_step = VL, .shares = 16, .pack_x = pack_x_f32, .copy_w = copy_w_f32, .multiply = multiply_f32};
    lco_status status = a->m_prompt > 0 ? linear_prompt(a, &KERNEL) : LCO_OK;
    if (status == LCO_OK && a->m > a->m_prompt)
        linear_decode(a);
    return status;
}

#endif
