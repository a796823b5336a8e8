/* Scalar conversions between float32 and the 16-bit types. One meaning with v_to_f16 and v_to_bf16 of simd/vec.h, bit for bit. */
#ifndef LCO_BASE_CONVERT_H
#define LCO_BASE_CONVERT_H

#include <stdint.h>
#include <string.h>

#include "formats.h"

static inline uint32_t lco_float_bits(float a)
{
    uint32_t u;
    memcpy(&u, &a, sizeof u);
    return u;
}

static inline float lco_float_of_bits(uint32_t u)
{
    float a;
    memcpy(&a, &u, sizeof a);
    return a;
}

static inline float lco_bf16_to_f32(uint16_t h) { return lco_float_of_bits((uint32_t)h << 16); }

/* Nearest even; NaN stays NaN (quiet). */
static inline uint16_t lco_f32_to_bf16(float a)
{
    uint32_t u = lco_float_bits(a);
    if ((u & 0x7FFFFFFFu) > 0x7F800000u)
        return (uint16_t)((u | 0x400000u) >> 16);
    return (uint16_t)((u + 0x7FFFu + ((u >> 16) & 1u)) >> 16);
}

static inline float lco_f16_to_f32(uint16_t h)
{
    uint32_t sign = (uint32_t)(h & 0x8000u) << 16, exponent = (h >> 10) & 31u, mantissa = h & 1023u;
    if (exponent == 31)
        return lco_float_of_bits(sign | 0x7F800000u | mantissa << 13 | (mantissa != 0 ? 0x400000u : 0));
    if (exponent != 0)
        return lco_float_of_bits(sign | (exponent + 112u) << 23 | mantissa << 13);
    float magnitude = (float)mantissa * 0x1p-24f; /* zero or subnormal */
    return lco_float_of_bits(sign | lco_float_bits(magnitude));
}

/* Nearest even; saturates at +-65504; NaN stays NaN (quiet). */
static inline uint16_t lco_f32_to_f16(float a)
{
    uint32_t u = lco_float_bits(a), magnitude = u & 0x7FFFFFFFu;
    uint16_t sign = (uint16_t)((u >> 16) & 0x8000u);
    if (magnitude > 0x7F800000u)
        return (uint16_t)(sign | 0x7E00u | ((magnitude >> 13) & 0x3FFu));
    if (magnitude >= 0x477FE000u) /* 65504 and above */
        return (uint16_t)(sign | 0x7BFFu);
    if (magnitude >= 0x38800000u) { /* normal: from 2^-14 */
        uint32_t rounded = magnitude + 0xFFFu + ((magnitude >> 13) & 1u);
        return (uint16_t)(sign | ((rounded - 0x38000000u) >> 13));
    }
    /* Subnormal: adding 2^-1 leaves steps of 2^-24 in the mantissa, so that the addition itself rounds. */
    float shifted = lco_float_of_bits(magnitude) + 0.5f;
    return (uint16_t)(sign | (lco_float_bits(shifted) - 0x3F000000u));
}

/* Element i of a row of any type, as float. */
static inline float lco_element(const void *row, int64_t i, lco_dtype dtype)
{
    if (dtype == LCO_BF16)
        return lco_bf16_to_f32(((const uint16_t *)row)[i]);
    if (dtype == LCO_F16)
        return lco_f16_to_f32(((const uint16_t *)row)[i]);
    return ((const float *)row)[i];
}

static inline void lco_set_element(void *row, int64_t i, lco_dtype dtype, float a)
{
    if (dtype == LCO_BF16)
        ((uint16_t *)row)[i] = lco_f32_to_bf16(a);
    else if (dtype == LCO_F16)
        ((uint16_t *)row)[i] = lco_f32_to_f16(a);
    else
        ((float *)row)[i] = a;
}

#endif
