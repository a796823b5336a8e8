/* linear_quantized with AVX2: 8 outputs by up to 2 rows of x in registers. Products of bytes go to 16-bit sums of at most 8 (15 * 128 * 2 each, so that none
 * overflows), and these to 32-bit sums. 8-bit codes are multiplied as two nibbles for that. */
#include "../simd/linear_quantized.h"
#include "../impl.h"

#define AHEAD 1024       /* bytes prefetched ahead */
#define SHORT_SUM 4      /* times 8 inputs that 16-bit sums hold */
#define PLANES_NIBBLES 4 /* sums of a row: [plane][nibble] */

typedef int32_t __attribute__((may_alias)) four_bytes; /* of x: loaded where they lie, so that the load broadcasts them */

/* 16-bit sums of one 8 inputs added to sum16: [plane][low nibble, high nibble], or [plane] of 4 bits, whose nibbles are different inputs. */
ALWAYS_INLINE void add_eight(__m256i *sum16, const uint8_t *codes, const char *x, const int bits, const int planes)
{
    const __m256i low = _mm256_set1_epi8(15);
    for (int part = 0; part < (bits == 8 ? 2 : 1); part++) {
        const __m256i both = _mm256_load_si256((const __m256i *)(codes + part * 128));
        const __m256i nibble[2] = {_mm256_and_si256(both, low), _mm256_and_si256(_mm256_srli_epi16(both, 4), low)};
        for (int p = 0; p < planes; p++) {
            const four_bytes *four = (const four_bytes *)(x + p * 8);
            for (int i = 0; i < 2; i++) {
                __m256i *sum = &sum16[bits == 8 ? p * 2 + i : p];
                *sum = _mm256_add_epi16(*sum, _mm256_maddubs_epi16(nibble[i], _mm256_set1_epi32(four[bits == 8 ? part : i])));
            }
        }
    }
}

/* The integer sums of a block for 8 outputs and `rows` rows. */
ALWAYS_INLINE void block_sums(__m256i *out, const uint8_t *codes, const char *x, int64_t eights, int64_t x_step, const int bits,
                              const int rows, const int planes)
{
    const __m256i one = _mm256_set1_epi16(1);
    const int kinds = bits == 8 ? 2 * planes : planes;
    __m256i sum32[2][PLANES_NIBBLES];
    for (int r = 0; r < rows; r++)
        for (int i = 0; i < kinds; i++)
            sum32[r][i] = _mm256_setzero_si256();
    for (int64_t e0 = 0; e0 < eights; e0 += SHORT_SUM) {
        const int64_t end = e0 + SHORT_SUM < eights ? e0 + SHORT_SUM : eights;
        __m256i sum16[2][PLANES_NIBBLES];
        for (int r = 0; r < rows; r++)
            for (int i = 0; i < kinds; i++)
                sum16[r][i] = _mm256_setzero_si256();
#pragma GCC unroll 4
        for (int64_t e = e0; e < end; e++)
            for (int r = 0; r < rows; r++)
                add_eight(sum16[r], codes + e * 32 * bits, x + e * x_step + r * planes * 8, bits, planes);
        for (int r = 0; r < rows; r++)
            for (int i = 0; i < kinds; i++)
                sum32[r][i] = _mm256_add_epi32(sum32[r][i], _mm256_madd_epi16(sum16[r][i], one));
    }
    for (int r = 0; r < rows; r++) {
        __m256i plane[2];
        for (int p = 0; p < planes; p++)
            plane[p] = bits == 8 ? _mm256_add_epi32(sum32[r][2 * p], _mm256_slli_epi32(sum32[r][2 * p + 1], 4)) : sum32[r][p];
        out[r] = planes == 2 ? _mm256_add_epi32(_mm256_slli_epi32(plane[0], 8), plane[1]) : plane[0];
    }
}

ALWAYS_INLINE void product_rows(const lco_qweight *q, const block_scales *scales, const uint8_t *block, const x_tile *x, int row, int64_t b,
                                float *sums, const int bits, const int rows, const int planes)
{
    const int64_t x_step = (int64_t)x->rows * planes * 8, eights = q->block / 8;
    const char *x_codes = (const char *)x->codes + b * eights * x_step + row * planes * 8;
    const int neutral = lco_qweight_neutral(q);
    for (int64_t eight = 0; eight < 4; eight++) {
        const vf scale = load_scales(block + scales->scales, eight * 8, scales->dtype);
        __m256i sum[2];
        block_sums(sum, block + eight * 32, x_codes, eights, x_step, bits, rows, planes);
        for (int r = 0; r < rows; r++) {
            const int64_t i = b * x->rows + row + r;
            float *to = sums + (row + r) * LCO_PANEL_ROWS + eight * 8;
            vf tot = b == 0 ? v_zero() : v_load(to);
            sum[r] = _mm256_sub_epi32(sum[r], _mm256_set1_epi32(neutral * x->total[i]));
            tot = v_fma(_mm256_cvtepi32_ps(sum[r]), v_mul(scale, v_set(x->scale[i])), tot);
            if (scales->kind != LCO_OFFSET_NONE)
                tot = v_fma(load_offsets(scales, block, eight * 8, scale), v_set(x->sum[i]), tot);
            v_store(to, tot);
        }
    }
}

ALWAYS_INLINE void product(const lco_qweight *q, const uint8_t *panel, const x_tile *x, float *sums, bool ahead, const int bits,
                           const int planes)
{
    const int64_t blocks = lco_qweight_blocks(q), bytes = (int64_t)lco_block_bytes(q);
    const block_scales scales = scales_of(q);
    for (int64_t b = 0; b < blocks; b++, panel += bytes) {
        for (int64_t line = 0; ahead && line < bytes; line += 64)
            _mm_prefetch((const char *)panel + AHEAD + line, _MM_HINT_T0);
        int row = 0;
        for (; row + 2 <= x->rows; row += 2)
            product_rows(q, &scales, panel, x, row, b, sums, bits, 2, planes);
        if (row < x->rows)
            product_rows(q, &scales, panel, x, row, b, sums, bits, 1, planes);
    }
}

static void panel_any(const lco_qweight *q, const uint8_t *panel, const x_tile *x, float *sums, bool ahead)
{
    if (q->bits == 4 && x->planes == 2)
        product(q, panel, x, sums, ahead, 4, 2);
    else if (q->bits == 4)
        product(q, panel, x, sums, ahead, 4, 1);
    else if (x->planes == 2)
        product(q, panel, x, sums, ahead, 8, 2);
    else
        product(q, panel, x, sums, ahead, 8, 1);
}

lco_status lco_avx2_linear_quantized(const lco_linear_args *a)
{
    static const quantized_kernel KERNEL = {.product = panel_any, .prefetch = true};
    return linear_quantized(a, &KERNEL);
}
