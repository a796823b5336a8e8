/* One-byte cache codes: what they mean and how a block of values becomes codes. THE specification; every instruction set and device agrees with it
 * bit for bit.
 *
 *   value = decode(code) * scale
 *
 * fp8_e4m3   1 sign, 4 exponent (bias 7), 3 mantissa bits; largest 448; no infinity; 0x7F and 0xFF are NaN
 * fp8_e5m2   1 sign, 5 exponent (bias 15), 2 mantissa bits; largest finite 57,344; the upper half of a float16
 * int8       -127..127
 *
 * Encoding rounds to the nearest, ties to even, keeps subnormals and -0, and saturates at the largest finite value; NaN becomes NaN (int8: 0).
 *
 * The scale of a block is a power of two for the floating types, the smallest that brings the block's largest magnitude within range: float codes
 * lose nothing by it (their precision is relative), decoded values are exact in bfloat16, and encoding decoded values again gives the same
 * values (the same codes under the same scale). int8
 * is uniform, so its scale is the largest magnitude / 127. A block that holds a NaN or an infinity gets a NaN as its scale: whoever reads it
 * learns that.
 *
 * A fixed scale, as checkpoints bring them for fp8_e4m3 (any number, found by calibration), takes the place of the block's own unless that is NaN:
 * magnitudes beyond 448 times the scale saturate. The code is that of value * (1 / scale), each rounded to float32. */
#ifndef LCO_BASE_CODES_H
#define LCO_BASE_CODES_H

#include <math.h>

#include "convert.h"

/* 8 bits of a small float: `mantissa` bits of mantissa, exponents from 1 - bias on, finite up to `largest`. Without branches, for vector loops. */
static inline uint8_t lco_encode_float8(float a, int mantissa, int bias, float largest)
{
    const uint32_t bits = lco_float_bits(a), magnitude_bits = bits & 0x7FFFFFFFu, sign = (bits >> 24) & 0x80u;
    const int drop = 23 - mantissa;
    float magnitude = lco_float_of_bits(magnitude_bits);
    magnitude = magnitude > largest ? largest : magnitude;
    const uint32_t u = lco_float_bits(magnitude);
    const uint32_t normal = ((u + ((1u << (drop - 1)) - 1) + ((u >> drop) & 1u)) >> drop) - ((uint32_t)(127 - bias) << mantissa);
    /* Below the smallest normal number: adding 2^(1 - bias - mantissa + 23) leaves steps of 2^(1 - bias - mantissa) in the mantissa. */
    const uint32_t magic = (uint32_t)(127 + 1 - bias - mantissa + 23) << 23;
    const uint32_t small = lco_float_bits(magnitude + lco_float_of_bits(magic)) - magic;
    const uint32_t code = u < (uint32_t)(127 + 1 - bias) << 23 ? small : normal;
    return (uint8_t)(magnitude_bits > 0x7F800000u ? 0x7Fu
                                                  : sign | code); /* one NaN: the sign of a computed one is the processor's affair */
}

static inline uint8_t lco_encode_e4m3(float a) { return lco_encode_float8(a, 3, 7, 448.0f); }
static inline uint8_t lco_encode_e5m2(float a) { return lco_encode_float8(a, 2, 15, 57344.0f); }

static inline uint8_t lco_encode_i8(float a)
{
    a = a > 127.0f ? 127.0f : a < -127.0f ? -127.0f : a;
    return (uint8_t)(int8_t)(a == a ? rintf(a) : 0.0f);
}

static inline uint8_t lco_encode(float a, lco_dtype dtype)
{
    return dtype == LCO_F8_E4M3 ? lco_encode_e4m3(a) : dtype == LCO_F8_E5M2 ? lco_encode_e5m2(a) : lco_encode_i8(a);
}

static inline float lco_decode(uint8_t code, lco_dtype dtype)
{
    if (dtype == LCO_I8)
        return (float)(int8_t)code;
    if (dtype == LCO_F8_E5M2)
        return lco_f16_to_f32((uint16_t)(code << 8));
    if ((code & 0x7Fu) == 0x7Fu)
        return NAN;
    /* As a float16 the same bits mean 2^-8 of it: the biases are 7 and 15. */
    return 256.0f * lco_f16_to_f32((uint16_t)((code & 0x80u) << 8 | (code & 0x7Fu) << 7));
}

/* The scale for values of at most this magnitude. */
static inline float lco_block_scale(float largest, lco_dtype dtype)
{
    if (!(largest < INFINITY))
        return NAN;
    if (largest == 0)
        return 0x1p-126f; /* anything that joins the block later widens it */
    if (dtype == LCO_I8)
        return largest / 127.0f > 0x1p-126f ? largest / 127.0f : 0x1p-126f;
    const uint32_t u = lco_float_bits(largest);
    const int top = dtype == LCO_F8_E4M3 ? 8 : 15; /* both types end at 1.75 * 2^top */
    const int exponent = (int)(u >> 23) - top + ((u & 0x7FFFFFu) > 0x600000u);
    const int most = 254 - top; /* codes times more than that pass the largest float32: the last bit of its range saturates */
    return lco_float_of_bits((uint32_t)(exponent < 1 ? 1 : exponent < most ? exponent : most) << 23);
}

/* n bfloat16 values -> codes under a scale; every code is NaN's when the scale is NaN. */
static inline void lco_encode_run(uint8_t *codes, const uint16_t *values, int64_t n, float scale, lco_dtype dtype)
{
    const float inverse = 1.0f / scale; /* exact for powers of two from 2^-126 on */
    if (dtype == LCO_F8_E4M3)
        for (int64_t i = 0; i < n; i++)
            codes[i] = lco_encode_e4m3(lco_bf16_to_f32(values[i]) * inverse);
    else if (dtype == LCO_F8_E5M2)
        for (int64_t i = 0; i < n; i++)
            codes[i] = lco_encode_e5m2(lco_bf16_to_f32(values[i]) * inverse);
    else
        for (int64_t i = 0; i < n; i++)
            codes[i] = lco_encode_i8(lco_bf16_to_f32(values[i]) / scale);
}

/* The largest magnitude of n bfloat16 values; infinite when one is NaN. */
static inline float lco_largest_bf16(const uint16_t *values, int64_t n)
{
    uint16_t largest = 0;
    for (int64_t i = 0; i < n; i++) {
        const uint16_t magnitude = values[i] & 0x7FFFu;
        largest = magnitude > largest ? magnitude : largest;
    }
    return largest > 0x7F80u ? INFINITY : lco_bf16_to_f32(largest);
}

#endif
