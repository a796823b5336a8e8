/* `linear` on machines that multiply bfloat16: prompt rows of bfloat16 weights go to a kernel of theirs, with x rounded to bfloat16;
 * everything else goes to lco_avx512_linear. */
#ifndef LCO_OPS_SIMD_LINEAR_BF16_H
#define LCO_OPS_SIMD_LINEAR_BF16_H

#include "../impl.h"
#include "linear_prompt.h"

/* 16 units of one row: 32 floats from x on, of which `width` (at most 32) exist. */
ALWAYS_INLINE vf round_units(const float *x, int64_t width)
{
    vf low, high;
    if (width == 2 * VL) {
        low = v_load(x);
        high = v_load(x + VL);
    } else {
        low = v_load_n(x, width < VL ? width : VL);
        high = width > VL ? v_load_n(x + VL, width - VL) : v_zero();
    }
    return (vf)_mm512_cvtne2ps_pbh(high, low);
}

static void pack_x_bf16(uint32_t *panel, const float *x, int64_t ld_x, int64_t rows, int64_t left, int64_t n_units)
{
    for (int64_t u = 0; u < n_units; u += VL) {
        const int64_t width = left - 2 * u < 0 ? 0 : left - 2 * u < 2 * VL ? left - 2 * u : 2 * VL;
        vf tile[VL];
        for (int64_t i = 0; i < VL; i++)
            tile[i] = i < rows ? round_units(x + i * ld_x + 2 * u, width) : v_zero();
        v_transpose(tile);
        for (int i = 0; i < VL; i++)
            v_store((float *)panel + (u + i) * VL, tile[i]);
    }
}

static void copy_w_bf16(uint32_t *row, const void *w, lco_dtype dtype, int64_t left, int64_t n_units)
{
    (void)dtype;
    const uint16_t *from = w;
    const int64_t whole = left < 2 * n_units ? left / (2 * VL) * VL : n_units;
    int64_t u = 0;
    for (; u < whole; u += VL)
        _mm512_store_si512(row + u, _mm512_loadu_si512(from + 2 * u));
    for (; u < n_units; u += VL) {
        const int64_t width = left > 2 * u ? left - 2 * u : 0;
        _mm512_store_si512(row + u, _mm512_maskz_loadu_epi16((__mmask32)(((uint64_t)1 << width) - 1), from + 2 * u));
    }
}

/* The parts of `a` whose weights are bfloat16, or the others. */
static lco_linear_args select_parts(const lco_linear_args *a, bool bf16)
{
    lco_linear_args chosen = *a;
    chosen.n_parts = 0;
    for (int p = 0; p < a->n_parts; p++)
        if ((a->part[p].dtype == LCO_BF16) == bf16)
            chosen.part[chosen.n_parts++] = a->part[p];
    chosen.m = a->m_prompt;
    return chosen;
}

/* Rows [m_prompt, m) of `a`. */
static lco_linear_args decode_rows(const lco_linear_args *a)
{
    lco_linear_args decode = *a;
    for (int p = 0; p < a->n_parts; p++)
        decode.part[p].out += a->m_prompt * a->part[p].ld_out;
    decode.x += a->m_prompt * a->ld_x;
    decode.m -= a->m_prompt;
    decode.m_prompt = 0;
    return decode;
}

static lco_status linear_bf16(const lco_linear_args *a, const prompt_kernel *kernel)
{
    lco_linear_args prompt = select_parts(a, true), other = select_parts(a, false);
    if (a->m_prompt == 0 || prompt.n_parts == 0)
        return lco_avx512_linear(a);
    lco_status status = linear_prompt(&prompt, kernel);
    if (status == LCO_OK && other.n_parts > 0)
        status = lco_avx512_linear(&other);
    if (status != LCO_OK || a->m == a->m_prompt)
        return status;
    const lco_linear_args decode = decode_rows(a);
    return lco_avx512_linear(&decode);
}

#endif
