/* The vector helpers that the shared sources of this folder are written over. One meaning, two widths: 16 floats with AVX-512, else 8 with AVX2.
 * `_n` forms touch the first n elements only (0 <= n <= VL): loads give 0 beyond, stores leave the rest alone.
 * Sums over a vector (v_sum) always add in the same order. */
#ifndef LCO_OPS_SIMD_VEC_H
#define LCO_OPS_SIMD_VEC_H

#include <immintrin.h>
#include <stdint.h>
#include <string.h>

#include "../../base/formats.h"

#if defined(__AVX512F__)
#define VL 16
typedef __m512 vf;

static inline vf v_zero(void) { return _mm512_setzero_ps(); }
static inline vf v_set(float a) { return _mm512_set1_ps(a); }
static inline vf v_load(const float *p) { return _mm512_loadu_ps(p); }
static inline void v_store(float *p, vf a) { _mm512_storeu_ps(p, a); }
static inline __mmask16 v_first(int64_t n) { return (__mmask16)((1u << n) - 1u); }
static inline vf v_load_n(const float *p, int64_t n) { return _mm512_maskz_loadu_ps(v_first(n), p); }
static inline void v_store_n(float *p, vf a, int64_t n) { _mm512_mask_storeu_ps(p, v_first(n), a); }
static inline vf v_add(vf a, vf b) { return _mm512_add_ps(a, b); }
static inline vf v_sub(vf a, vf b) { return _mm512_sub_ps(a, b); }
static inline vf v_mul(vf a, vf b) { return _mm512_mul_ps(a, b); }
static inline vf v_div(vf a, vf b) { return _mm512_div_ps(a, b); }
static inline vf v_max(vf a, vf b) { return _mm512_max_ps(a, b); }
static inline vf v_fma(vf a, vf b, vf c) { return _mm512_fmadd_ps(a, b, c); }   /* a * b + c */
static inline vf v_fnma(vf a, vf b, vf c) { return _mm512_fnmadd_ps(a, b, c); } /* c - a * b */
static inline float v_sum(vf a) { return _mm512_reduce_add_ps(a); }
static inline float v_largest(vf a) { return _mm512_reduce_max_ps(a); }
static inline vf v_from_bf16(__m256i h) { return _mm512_castsi512_ps(_mm512_slli_epi32(_mm512_cvtepu16_epi32(h), 16)); }
static inline vf v_from_f16(__m256i h) { return _mm512_cvtph_ps(h); }
static inline __m256i v_load_half(const void *p) { return _mm256_loadu_si256(p); }
static inline __m256i v_load_half_n(const void *p, int64_t n) { return _mm256_maskz_loadu_epi16(v_first(n), p); }
static inline void v_store_half_n(void *p, __m256i h, int64_t n) { _mm256_mask_storeu_epi16(p, v_first(n), h); }

static inline __m256i v_to_bf16(vf a) /* nearest even; NaN stays NaN (quiet) */
{
    __m512i u = _mm512_castps_si512(a);
    __m512i odd = _mm512_and_si512(_mm512_srli_epi32(u, 16), _mm512_set1_epi32(1));
    __m512i r = _mm512_add_epi32(u, _mm512_add_epi32(odd, _mm512_set1_epi32(0x7FFF)));
    __mmask16 nan = _mm512_cmp_ps_mask(a, a, _CMP_UNORD_Q);
    r = _mm512_mask_or_epi32(r, nan, u, _mm512_set1_epi32(0x400000));
    return _mm512_cvtepi32_epi16(_mm512_srli_epi32(r, 16));
}

/* base/hadamard.h within a vector: pairs (a, b) that are 1, 2, 4, ... apart become (a + b, a - b). */
static inline vf v_hadamard(vf x)
{
    const __m512i lane = _mm512_setr_epi32(0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 13, 14, 15);
    for (int h = 1; h < VL; h *= 2) {
        const __mmask16 upper = _mm512_test_epi32_mask(lane, _mm512_set1_epi32(h));
        const vf other = _mm512_permutexvar_ps(_mm512_xor_si512(lane, _mm512_set1_epi32(h)), x);
        x = _mm512_add_ps(other, _mm512_mask_xor_ps(x, upper, x, v_set(-0.0f)));
    }
    return x;
}

static inline __m256i v_to_f16(vf a) /* nearest even, saturating at 65504; NaN stays NaN */
{
    vf limited = _mm512_max_ps(v_set(-65504.0f), _mm512_min_ps(v_set(65504.0f), a));
    return _mm512_cvtps_ph(limited, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC);
}

/* e^a within 2 units in the last place for a in [-87.3, 88.3]; 0 below; never infinite; NaN stays NaN (min and max give their second operand). */
static inline vf v_exp(vf a)
{
    __mmask16 tiny = _mm512_cmp_ps_mask(a, v_set(-87.33f), _CMP_LT_OQ);
    a = _mm512_min_ps(v_set(88.37f), a);
    vf n = _mm512_roundscale_ps(v_mul(a, v_set(1.44269504f)), _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC);
    vf r = v_fnma(n, v_set(1.42860677e-6f), v_fnma(n, v_set(0.693145752f), a));
    vf p = v_fma(v_set(1.98756915e-4f), r, v_set(1.39819995e-3f));
    p = v_fma(p, r, v_set(8.33345205e-3f));
    p = v_fma(p, r, v_set(4.16657962e-2f));
    p = v_fma(p, r, v_set(1.66666657e-1f));
    p = v_fma(p, r, v_set(0.5f));
    p = v_add(v_fma(p, v_mul(r, r), r), v_set(1.0f));
    return _mm512_mask_mov_ps(_mm512_scalef_ps(p, n), tiny, v_zero());
}

#else /* AVX2 */
#define VL 8
typedef __m256 vf;

static inline vf v_zero(void) { return _mm256_setzero_ps(); }
static inline vf v_set(float a) { return _mm256_set1_ps(a); }
static inline vf v_load(const float *p) { return _mm256_loadu_ps(p); }
static inline void v_store(float *p, vf a) { _mm256_storeu_ps(p, a); }
static inline __m256i v_first(int64_t n)
{
    return _mm256_cmpgt_epi32(_mm256_set1_epi32((int)n), _mm256_setr_epi32(0, 1, 2, 3, 4, 5, 6, 7));
}
static inline vf v_load_n(const float *p, int64_t n) { return _mm256_maskload_ps(p, v_first(n)); }
static inline void v_store_n(float *p, vf a, int64_t n) { _mm256_maskstore_ps(p, v_first(n), a); }
static inline vf v_add(vf a, vf b) { return _mm256_add_ps(a, b); }
static inline vf v_sub(vf a, vf b) { return _mm256_sub_ps(a, b); }
static inline vf v_mul(vf a, vf b) { return _mm256_mul_ps(a, b); }
static inline vf v_div(vf a, vf b) { return _mm256_div_ps(a, b); }
static inline vf v_max(vf a, vf b) { return _mm256_max_ps(a, b); }
static inline vf v_fma(vf a, vf b, vf c) { return _mm256_fmadd_ps(a, b, c); }
static inline vf v_fnma(vf a, vf b, vf c) { return _mm256_fnmadd_ps(a, b, c); }
static inline float v_sum(vf a)
{
    __m128 s = _mm_add_ps(_mm256_castps256_ps128(a), _mm256_extractf128_ps(a, 1));
    s = _mm_add_ps(s, _mm_movehl_ps(s, s));
    return _mm_cvtss_f32(_mm_add_ss(s, _mm_movehdup_ps(s)));
}
static inline float v_largest(vf a)
{
    __m128 s = _mm_max_ps(_mm256_castps256_ps128(a), _mm256_extractf128_ps(a, 1));
    s = _mm_max_ps(s, _mm_movehl_ps(s, s));
    return _mm_cvtss_f32(_mm_max_ss(s, _mm_movehdup_ps(s)));
}
static inline vf v_from_bf16(__m128i h) { return _mm256_castsi256_ps(_mm256_slli_epi32(_mm256_cvtepu16_epi32(h), 16)); }
static inline vf v_from_f16(__m128i h) { return _mm256_cvtph_ps(h); }
static inline __m128i v_load_half(const void *p) { return _mm_loadu_si128(p); }
static inline __m128i v_load_half_n(const void *p, int64_t n)
{
    __m128i h = _mm_setzero_si128();
    memcpy(&h, p, (size_t)n * 2);
    return h;
}
static inline void v_store_half_n(void *p, __m128i h, int64_t n) { memcpy(p, &h, (size_t)n * 2); }

static inline vf v_hadamard(vf x)
{
    const __m256i lane = _mm256_setr_epi32(0, 1, 2, 3, 4, 5, 6, 7);
    for (int h = 1; h < VL; h *= 2) {
        const __m256i bit = _mm256_set1_epi32(h), upper = _mm256_cmpeq_epi32(_mm256_and_si256(lane, bit), bit);
        const vf other = _mm256_permutevar8x32_ps(x, _mm256_xor_si256(lane, bit));
        x = _mm256_add_ps(other, _mm256_xor_ps(x, _mm256_and_ps(_mm256_castsi256_ps(upper), v_set(-0.0f))));
    }
    return x;
}

static inline __m128i v_pack_high(__m256i u) /* the high halves of eight 32-bit words */
{
    __m256i high = _mm256_srli_epi32(u, 16);
    return _mm_packus_epi32(_mm256_castsi256_si128(high), _mm256_extracti128_si256(high, 1));
}

static inline __m128i v_to_bf16(vf a)
{
    __m256i u = _mm256_castps_si256(a);
    __m256i odd = _mm256_and_si256(_mm256_srli_epi32(u, 16), _mm256_set1_epi32(1));
    __m256i r = _mm256_add_epi32(u, _mm256_add_epi32(odd, _mm256_set1_epi32(0x7FFF)));
    __m256i quiet = _mm256_or_si256(u, _mm256_set1_epi32(0x400000));
    __m256 nan = _mm256_cmp_ps(a, a, _CMP_UNORD_Q);
    return v_pack_high(_mm256_blendv_epi8(r, quiet, _mm256_castps_si256(nan)));
}

static inline __m128i v_to_f16(vf a)
{
    vf limited = _mm256_max_ps(v_set(-65504.0f), _mm256_min_ps(v_set(65504.0f), a));
    return _mm256_cvtps_ph(limited, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC);
}

static inline vf v_exp(vf a)
{
    vf tiny = _mm256_cmp_ps(a, v_set(-87.33f), _CMP_LT_OQ);
    a = _mm256_min_ps(v_set(88.37f), _mm256_max_ps(v_set(-88.0f), a));
    vf n = _mm256_round_ps(v_mul(a, v_set(1.44269504f)), _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC);
    vf r = v_fnma(n, v_set(1.42860677e-6f), v_fnma(n, v_set(0.693145752f), a));
    vf p = v_fma(v_set(1.98756915e-4f), r, v_set(1.39819995e-3f));
    p = v_fma(p, r, v_set(8.33345205e-3f));
    p = v_fma(p, r, v_set(4.16657962e-2f));
    p = v_fma(p, r, v_set(1.66666657e-1f));
    p = v_fma(p, r, v_set(0.5f));
    p = v_add(v_fma(p, v_mul(r, r), r), v_set(1.0f));
    __m256i power = _mm256_slli_epi32(_mm256_add_epi32(_mm256_cvtps_epi32(n), _mm256_set1_epi32(127)), 23);
    return _mm256_andnot_ps(tiny, v_mul(p, _mm256_castsi256_ps(power)));
}
#endif

/* VL one-byte codes as floats, e4m3 times 2^-8 (a float16 of the same bits; v_code_unit mends it in the scale). A NaN of e4m3 comes out as
 * a number: the block's scale is NaN then (base/codes.h). */
#if defined(__AVX512F__)
static inline vf v_from_codes(__m128i c, lco_dtype dtype)
{
    if (dtype == LCO_I8)
        return _mm512_cvtepi32_ps(_mm512_cvtepi8_epi32(c));
    if (dtype == LCO_F8_E5M2)
        return _mm512_cvtph_ps(_mm256_slli_epi16(_mm256_cvtepu8_epi16(c), 8));
    return _mm512_cvtph_ps(_mm256_and_si256(_mm256_slli_epi16(_mm256_cvtepi8_epi16(c), 7), _mm256_set1_epi16((short)0xBFFF)));
}
static inline __m128i v_load_codes(const void *p) { return _mm_loadu_si128(p); }
static inline __m128i v_load_codes_n(const void *p, int64_t n) { return _mm_maskz_loadu_epi8(v_first(n), p); }

/* Float codes by shifts and a mask: their bits moved to where a float32 has them, which means value / v_code_lift(). Two thirds of the work of
 * going by float16, but subnormal codes become subnormal floats, which not every processor multiplies as fast as others.
 * v_shift_codes: VL codes. v_shift_words: the k-th of each four. Pairs of these share their first shifts. */
static inline int v_code_mask(lco_dtype dtype) { return (int)(dtype == LCO_F8_E4M3 ? 0x87F00000u : 0x8FE00000u); }
static inline vf v_shift_codes(__m128i c, lco_dtype dtype)
{
    const __m512i moved = _mm512_slli_epi32(_mm512_cvtepi8_epi32(c), dtype == LCO_F8_E4M3 ? 20 : 21);
    return _mm512_castsi512_ps(_mm512_and_si512(moved, _mm512_set1_epi32(v_code_mask(dtype))));
}
static inline vf v_shift_words(__m512i codes, int k, lco_dtype dtype)
{
    const __m512i words = _mm512_srai_epi16(k % 2 == 0 ? _mm512_slli_epi16(codes, 8) : codes, dtype == LCO_F8_E4M3 ? 4 : 3);
    return _mm512_castsi512_ps(_mm512_and_si512(k < 2 ? _mm512_slli_epi32(words, 16) : words, _mm512_set1_epi32(v_code_mask(dtype))));
}

/* 16 bytes of each of 16 rows `stride` apart, turned over as 32-bit words: lane j of words[w] holds bytes 4 * w.. of row j. */
static inline void v_turn_words(__m512i words[4], const uint8_t *first, int64_t stride)
{
    __m512i r[4], t[4];
    for (int i = 0; i < 4; i++) { /* rows i, 4 + i, 8 + i, 12 + i */
        const uint8_t *row = first + i * stride;
        r[i] = _mm512_castsi128_si512(_mm_loadu_si128((const void *)row));
        r[i] = _mm512_inserti32x4(r[i], _mm_loadu_si128((const void *)(row + 4 * stride)), 1);
        r[i] = _mm512_inserti32x4(r[i], _mm_loadu_si128((const void *)(row + 8 * stride)), 2);
        r[i] = _mm512_inserti32x4(r[i], _mm_loadu_si128((const void *)(row + 12 * stride)), 3);
    }
    for (int i = 0; i < 2; i++) {
        t[i] = _mm512_unpacklo_epi32(r[2 * i], r[2 * i + 1]);
        t[2 + i] = _mm512_unpackhi_epi32(r[2 * i], r[2 * i + 1]);
    }
    for (int i = 0; i < 2; i++) {
        words[2 * i] = _mm512_unpacklo_epi64(t[2 * i], t[2 * i + 1]);
        words[2 * i + 1] = _mm512_unpackhi_epi64(t[2 * i], t[2 * i + 1]);
    }
}
#else
static inline vf v_from_codes(__m128i c, lco_dtype dtype)
{
    if (dtype == LCO_I8)
        return _mm256_cvtepi32_ps(_mm256_cvtepi8_epi32(c));
    if (dtype == LCO_F8_E5M2)
        return _mm256_cvtph_ps(_mm_slli_epi16(_mm_cvtepu8_epi16(c), 8));
    return _mm256_cvtph_ps(_mm_and_si128(_mm_slli_epi16(_mm_cvtepi8_epi16(c), 7), _mm_set1_epi16((short)0xBFFF)));
}
static inline __m128i v_load_codes(const void *p) { return _mm_loadl_epi64(p); }
static inline __m128i v_load_codes_n(const void *p, int64_t n)
{
    __m128i c = _mm_setzero_si128();
    memcpy(&c, p, (size_t)n);
    return c;
}
#endif

static inline float v_code_unit(lco_dtype dtype) { return dtype == LCO_F8_E4M3 ? 256.0f : 1.0f; }

/* What makes values of v_shift_codes() and v_shift_words() again. */
static inline float v_code_lift(lco_dtype dtype) { return dtype == LCO_F8_E4M3 ? 0x1p120f : 0x1p112f; }

/* 4 * VL floats into the order that v_shift_words() gives for k = 0, 1, ..., or back. */
static inline void v_order_fourths(float *x, bool back)
{
    float from[4 * VL];
    memcpy(from, x, sizeof from);
    for (int j = 0; j < VL; j++)
        for (int k = 0; k < 4; k++)
            x[back ? 4 * j + k : k * VL + j] = from[back ? k * VL + j : 4 * j + k];
}

/* VL elements of a weight or cache row, whatever its type, as floats. */
static inline vf v_load_as(const void *row, int64_t i, lco_dtype dtype)
{
    if (lco_dtype_scaled(dtype))
        return v_from_codes(v_load_codes((const uint8_t *)row + i), dtype);
    if (dtype == LCO_BF16)
        return v_from_bf16(v_load_half((const uint16_t *)row + i));
    if (dtype == LCO_F16)
        return v_from_f16(v_load_half((const uint16_t *)row + i));
    return v_load((const float *)row + i);
}

static inline vf v_load_as_n(const void *row, int64_t i, int64_t n, lco_dtype dtype)
{
    if (lco_dtype_scaled(dtype))
        return v_from_codes(v_load_codes_n((const uint8_t *)row + i, n), dtype);
    if (dtype == LCO_BF16)
        return v_from_bf16(v_load_half_n((const uint16_t *)row + i, n));
    if (dtype == LCO_F16)
        return v_from_f16(v_load_half_n((const uint16_t *)row + i, n));
    return v_load_n((const float *)row + i, n);
}

/* r[i] lane j becomes r[j] lane i: a square of VL x VL 32-bit values turned over in registers. */
#if defined(__AVX512F__)
static inline void v_transpose(vf r[VL])
{
    vf t[VL];
    for (int i = 0; i < VL; i += 2) {
        t[i] = _mm512_unpacklo_ps(r[i], r[i + 1]);
        t[i + 1] = _mm512_unpackhi_ps(r[i], r[i + 1]);
    }
    for (int i = 0; i < VL; i += 4) {
        r[i] = _mm512_shuffle_ps(t[i], t[i + 2], 0x44);
        r[i + 1] = _mm512_shuffle_ps(t[i], t[i + 2], 0xEE);
        r[i + 2] = _mm512_shuffle_ps(t[i + 1], t[i + 3], 0x44);
        r[i + 3] = _mm512_shuffle_ps(t[i + 1], t[i + 3], 0xEE);
    }
    for (int i = 0; i < VL; i += 8) {
        for (int j = i; j < i + 4; j++) {
            t[j] = _mm512_shuffle_f32x4(r[j], r[j + 4], 0x88);
            t[j + 4] = _mm512_shuffle_f32x4(r[j], r[j + 4], 0xDD);
        }
    }
    for (int j = 0; j < 4; j++) {
        r[j] = _mm512_shuffle_f32x4(t[j], t[j + 8], 0x88);
        r[j + 8] = _mm512_shuffle_f32x4(t[j], t[j + 8], 0xDD);
        r[j + 4] = _mm512_shuffle_f32x4(t[j + 4], t[j + 12], 0x88);
        r[j + 12] = _mm512_shuffle_f32x4(t[j + 4], t[j + 12], 0xDD);
    }
}
#else
static inline void v_transpose(vf r[VL])
{
    vf t[VL];
    for (int i = 0; i < VL; i += 2) {
        t[i] = _mm256_unpacklo_ps(r[i], r[i + 1]);
        t[i + 1] = _mm256_unpackhi_ps(r[i], r[i + 1]);
    }
    for (int i = 0; i < VL; i += 4) {
        r[i] = _mm256_shuffle_ps(t[i], t[i + 2], 0x44);
        r[i + 1] = _mm256_shuffle_ps(t[i], t[i + 2], 0xEE);
        r[i + 2] = _mm256_shuffle_ps(t[i + 1], t[i + 3], 0x44);
        r[i + 3] = _mm256_shuffle_ps(t[i + 1], t[i + 3], 0xEE);
    }
    for (int j = 0; j < 4; j++) {
        t[j] = _mm256_permute2f128_ps(r[j], r[j + 4], 0x20);
        t[j + 4] = _mm256_permute2f128_ps(r[j], r[j + 4], 0x31);
    }
    for (int i = 0; i < VL; i++)
        r[i] = t[i];
}
#endif

/* `_part` forms walk along a row: a whole vector, or the `left` elements that remain of it. */
static inline vf v_load_part(const float *p, int64_t left) { return left >= VL ? v_load(p) : v_load_n(p, left); }

static inline void v_store_part(float *p, vf a, int64_t left)
{
    if (left >= VL)
        v_store(p, a);
    else
        v_store_n(p, a, left);
}

static inline vf v_load_as_part(const void *row, int64_t i, int64_t left, lco_dtype dtype)
{
    return left >= VL ? v_load_as(row, i, dtype) : v_load_as_n(row, i, left, dtype);
}

/* VL floats into a cache row, rounded to its type. */
static inline void v_store_as(void *row, int64_t i, vf a, lco_dtype dtype)
{
    if (dtype == LCO_F32) {
        v_store((float *)row + i, a);
        return;
    }
    __auto_type half = dtype == LCO_BF16 ? v_to_bf16(a) : v_to_f16(a);
    memcpy((uint16_t *)row + i, &half, sizeof half);
}

static inline void v_store_as_part(void *row, int64_t i, vf a, int64_t left, lco_dtype dtype)
{
    if (left >= VL)
        v_store_as(row, i, a, dtype);
    else if (dtype == LCO_F32)
        v_store_n((float *)row + i, a, left);
    else
        v_store_half_n((uint16_t *)row + i, dtype == LCO_BF16 ? v_to_bf16(a) : v_to_f16(a), left);
}

/* The sums of four vectors, each added in the same order. */
static inline __m128 v_sum4(vf a, vf b, vf c, vf d)
{
#if defined(__AVX512F__)
    vf ab = v_add(_mm512_unpacklo_ps(a, b), _mm512_unpackhi_ps(a, b)), cd = v_add(_mm512_unpacklo_ps(c, d), _mm512_unpackhi_ps(c, d));
    vf abcd = v_add(_mm512_shuffle_ps(ab, cd, 0x44), _mm512_shuffle_ps(ab, cd, 0xEE));
    __m256 s = _mm256_add_ps(_mm512_castps512_ps256(abcd), _mm512_extractf32x8_ps(abcd, 1));
#else
    vf ab = v_add(_mm256_unpacklo_ps(a, b), _mm256_unpackhi_ps(a, b)), cd = v_add(_mm256_unpacklo_ps(c, d), _mm256_unpackhi_ps(c, d));
    __m256 s = v_add(_mm256_shuffle_ps(ab, cd, 0x44), _mm256_shuffle_ps(ab, cd, 0xEE));
#endif
    return _mm_add_ps(_mm256_castps256_ps128(s), _mm256_extractf128_ps(s, 1));
}

/* For kernels that are written once and specialised by constant arguments. */
#define ALWAYS_INLINE static inline __attribute__((always_inline))

#endif
