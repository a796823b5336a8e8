/* mlp of prompt rows: two products, the first of which leaves its results as the second reads them.
 *
 * A tile of sums is [weight row][row of x]. Of VL rows of gate and the same VL of up, v = silu(gate) * up is a tile of the middle, VL of its
 * columns by a panel of its rows: pairs of columns rounded side by side are units of packed x, with nothing turned over and nothing of the
 * middle written as floats. */
#ifndef LCO_OPS_SIMD_LINEAR_MLP_H
#define LCO_OPS_SIMD_LINEAR_MLP_H

#include "../mlp.h"
#include "linear_bf16.h"
#include "silu.h"

/* Where the tile of the middle lies whose first column is the item's `row` / 2. */
ALWAYS_INLINE uint32_t *middle_at(const prompt_block *block, int64_t panel, int64_t row)
{
    const packed_x *x = block->middle;
    const int64_t unit = (block->column + row / 2) / 2, b = unit / x->block_units;
    return packed_block(x, b) + (panel * block_units(x, b) + unit - b * x->block_units) * VL;
}

ALWAYS_INLINE vf middle_column(const prompt_block *block, int64_t column, const float *gate, const float *up)
{
    const bool in = column < block->columns;
    const vf gate_bias = v_set(in && block->bias != NULL ? block->bias[column] : 0.0f);
    const vf up_bias = v_set(in && block->up_bias != NULL ? block->up_bias[column] : 0.0f);
    return silu_times(v_add(v_load(gate), gate_bias), v_add(v_load(up), up_bias));
}

/* Tiles come in turn: gate (waits for up), up. Columns past the last have weights and biases of zero, and are zero. */
static void finish_middle(const prompt_block *block, int64_t panel, int64_t row, const float *sums)
{
    if (row / VL % 2 == 0)
        return;
    const float *gate = sums - VL * VL;
    const __m512i side_by_side = _mm512_set_epi16(31, 15, 30, 14, 29, 13, 28, 12, 27, 11, 26, 10, 25, 9, 24, 8, 23, 7, 22, 6, 21, 5, 20, 4,
                                                  19, 3, 18, 2, 17, 1, 16, 0);
    row -= VL;
    uint32_t *to = middle_at(block, panel, row);
    for (int64_t i = 0; i < VL; i += 2) {
        const vf even = middle_column(block, row / 2 + i, gate + i * VL, sums + i * VL);
        const vf odd = middle_column(block, row / 2 + i + 1, gate + (i + 1) * VL, sums + (i + 1) * VL);
        _mm512_store_si512(to + i / 2 * VL, _mm512_permutexvar_epi16(side_by_side, (__m512i)_mm512_cvtne2ps_pbh(odd, even)));
    }
}

static bool all_bf16(const lco_mlp_args *a)
{
    return a->in.part[0].dtype == LCO_BF16 && a->in.part[1].dtype == LCO_BF16 && a->out.part[0].dtype == LCO_BF16;
}

/* Prompt rows by `kernel`. The other rows, and few rows or weights of other types: by `linear` and swiglu, one after the other. */
static lco_status mlp_bf16(const lco_mlp_args *a, const prompt_kernel *kernel, lco_status (*linear)(const lco_linear_args *))
{
    if (a->in.m_prompt <= FEW_PANELS * VL || !all_bf16(a))
        return lco_mlp_steps(a, linear, lco_avx512_swiglu);
    prompt_job first = plan_job(&a->in, kernel, true), second = plan_job(&a->out, kernel, false);
    first.middle = &second.x;
    first.finish = finish_middle;
    const lco_status status = prompt_passes(&first, &second);
    if (status != LCO_OK || a->in.m == a->in.m_prompt)
        return status;
    const lco_mlp_args decode = {.in = decode_rows(&a->in), .out = decode_rows(&a->out)};
    return lco_mlp_steps(&decode, linear, lco_avx512_swiglu);
}

#endif
