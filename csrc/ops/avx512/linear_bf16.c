/* linear with AVX-512 BF16: prompt rows of bfloat16 weights by vdpbf16ps, two products a lane and instruction. */
#include "../simd/linear_mlp.h"
#include "../simd/linear_tile.h"

ALWAYS_INLINE vf unit_dot_bf16(vf sum, vf w, vf x) { return _mm512_dpbf16_ps(sum, (__m512bh)w, (__m512bh)x); }

static void multiply_bf16(float *sums, const uint32_t *x, const uint32_t *w, const prompt_block *block)
{
    unit_products(sums, x, w, block, unit_dot_bf16);
}

static const prompt_kernel KERNEL = {
    .per_unit = 2, .row_step = VL, .shares = 16, .pack_x = pack_x_bf16, .copy_w = copy_w_bf16, .multiply = multiply_bf16};

lco_status lco_avx512_linear_bf16(const lco_linear_args *a) { return linear_bf16(a, &KERNEL); }

lco_status lco_avx512_mlp_bf16(const lco_mlp_args *a) { return mlp_bf16(a, &KERNEL, lco_avx512_linear_bf16); }
