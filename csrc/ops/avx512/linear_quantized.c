/* linear_quantized with AVX-512 VNNI: 32 outputs by up to 4 rows of x, or 6 of 8 bits, in registers. */
#include "../simd/linear_quantized.h"
#include "../impl.h"

#define FAR_AHEAD 4096  /* bytes prefetched ahead into L2 */
#define NEAR_AHEAD 1024 /* into L1 */

/* Prefetches what is ahead of 8 inputs of codes. */
ALWAYS_INLINE void prefetch_eight(const uint8_t *codes, const int bits)
{
    for (int line = 0; line < 32 * bits; line += 64) {
        _mm_prefetch((const char *)codes + FAR_AHEAD + line, _MM_HINT_T1);
        _mm_prefetch((const char *)codes + NEAR_AHEAD + line, _MM_HINT_T0);
    }
}

/* 64 bytes of codes of 16 outputs: the even (part 0) or odd inputs of 8. */
ALWAYS_INLINE __m512i load_part(const uint8_t *codes, const int bits, const int part, const int half)
{
    const __m512i low = _mm512_set1_epi8(15);
    if (bits == 8)
        return _mm512_load_si512(codes + (part * 2 + half) * 64);
    const __m512i both = _mm512_load_si512(codes + half * 64);
    return _mm512_and_si512(part == 0 ? both : _mm512_srli_epi16(both, 4), low);
}

ALWAYS_INLINE void product(const lco_qweight *q, const uint8_t *panel, const x_tile *x, float *sums, bool ahead, const int bits,
                           const int rows, const int planes)
{
    const int chains = rows * planes <= 4 ? 2 : 1; /* of a sum: few rows have too few sums to hide the latency */
    const int64_t blocks = lco_qweight_blocks(q), eights = q->block / 8;
    const int neutral = lco_qweight_neutral(q);
    const block_scales scales = scales_of(q);
    const char *x_codes = (const char *)x->codes;
    vf tot[X_TILE][2];
    for (int r = 0; r < rows; r++)
        tot[r][0] = tot[r][1] = v_zero();
    for (int64_t b = 0; b < blocks; b++, panel += lco_block_bytes(q)) {
        const uint8_t *codes = panel;
        __m512i acc[X_TILE][2][2][2]; /* [row][half][plane][chain] */
#pragma GCC unroll 6
        for (int r = 0; r < rows; r++)
            for (int half = 0; half < 2; half++)
                for (int p = 0; p < planes; p++)
                    for (int c = 0; c < chains; c++)
                        acc[r][half][p][c] = _mm512_setzero_si512();
#pragma GCC unroll 2
        for (int64_t e = 0; e < eights; e++, codes += 32 * bits, x_codes += rows * planes * 8) {
            if (ahead)
                prefetch_eight(codes, bits);
            for (int part = 0; part < 2; part++) {
                const __m512i w[2] = {load_part(codes, bits, part, 0), load_part(codes, bits, part, 1)};
                for (int r = 0; r < rows; r++)
                    for (int p = 0; p < planes; p++) {
                        int32_t four;
                        memcpy(&four, x_codes + (r * planes + p) * 8 + part * 4, sizeof four);
                        for (int half = 0; half < 2; half++) {
                            __m512i *sum = &acc[r][half][p][part % chains];
                            *sum = _mm512_dpbusd_epi32(*sum, w[half], _mm512_set1_epi32(four));
                        }
                    }
            }
        }
        const vf scale[2] = {load_scales(panel + scales.scales, 0, scales.dtype), load_scales(panel + scales.scales, 16, scales.dtype)};
#pragma GCC unroll 6
        for (int r = 0; r < rows; r++) {
            const __m512i correction = _mm512_set1_epi32(neutral * x->total[b * rows + r]);
            const vf x_scale = v_set(x->scale[b * rows + r]);
#pragma GCC unroll 2
            for (int half = 0; half < 2; half++) {
                __m512i plane[2];
                for (int p = 0; p < planes; p++)
                    plane[p] = chains == 2 ? _mm512_add_epi32(acc[r][half][p][0], acc[r][half][p][1]) : acc[r][half][p][0];
                __m512i sum = planes == 2 ? _mm512_add_epi32(_mm512_slli_epi32(plane[0], 8), plane[1]) : plane[0];
                sum = _mm512_sub_epi32(sum, correction);
                tot[r][half] = v_fma(_mm512_cvtepi32_ps(sum), v_mul(scale[half], x_scale), tot[r][half]);
            }
        }
        if (scales.kind != LCO_OFFSET_NONE) {
            const vf offset[2] = {load_offsets(&scales, panel, 0, scale[0]), load_offsets(&scales, panel, 16, scale[1])};
#pragma GCC unroll 6
            for (int r = 0; r < rows; r++)
                for (int half = 0; half < 2; half++)
                    tot[r][half] = v_fma(offset[half], v_set(x->sum[b * rows + r]), tot[r][half]);
        }
    }
    for (int r = 0; r < rows; r++)
        for (int half = 0; half < 2; half++)
            v_store(sums + r * LCO_PANEL_ROWS + half * 16, tot[r][half]);
}

#define ROWS(BITS, N, PLANES)                                                                                                              \
    case N:                                                                                                                                \
        product(q, panel, x, sums, ahead, BITS, N, PLANES);                                                                                \
        break;
#define PRODUCT(NAME, BITS, PLANES, MORE)                                                                                                  \
    static void NAME(const lco_qweight *q, const uint8_t *panel, const x_tile *x, float *sums, bool ahead)                                 \
    {                                                                                                                                      \
        switch (x->rows) {                                                                                                                 \
            ROWS(BITS, 1, PLANES)                                                                                                          \
            ROWS(BITS, 2, PLANES)                                                                                                          \
            ROWS(BITS, 3, PLANES)                                                                                                          \
            ROWS(BITS, 4, PLANES)                                                                                                          \
            MORE                                                                                                                           \
        }                                                                                                                                  \
    }
PRODUCT(product_4, 4, 2, )
PRODUCT(product_8, 8, 2, )
PRODUCT(product_4_int8, 4, 1, ROWS(4, 5, 1) ROWS(4, 6, 1))
PRODUCT(product_8_int8, 8, 1, ROWS(8, 5, 1) ROWS(8, 6, 1))

static void panel_any(const lco_qweight *q, const uint8_t *panel, const x_tile *x, float *sums, bool ahead)
{
    if (q->bits == 4)
        (x->planes == 2 ? product_4 : product_4_int8)(q, panel, x, sums, ahead);
    else
        (x->planes == 2 ? product_8 : product_8_int8)(q, panel, x, sums, ahead);
}

lco_status lco_avx512_linear_quantized(const lco_linear_args *a)
{
    static const quantized_kernel KERNEL = {.product = panel_any, .prefetch = true};
    return linear_quantized(a, &KERNEL);
}

lco_status lco_avx512_linear_quantized_plain(const lco_linear_args *a)
{
    static const quantized_kernel KERNEL = {.product = panel_any};
    return linear_quantized(a, &KERNEL);
}
