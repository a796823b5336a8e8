#include "dequant.h"

#include <math.h>
#include <string.h>

#include "../base/convert.h"

#define LARGEST_BLOCK 256

/* A block's integers and what they mean: value i is scale * (code - zero), + offset where the type has offsets, of group i / (values / groups). */
typedef struct {
    uint8_t codes[LARGEST_BLOCK];
    float scales[LARGEST_BLOCK / 16], offsets[LARGEST_BLOCK / 16];
} block_codes;

typedef void (*block_reader)(const uint8_t *block, block_codes *out);

typedef struct {
    int type, values, groups;
    size_t bytes;
    int zero;
    bool offsets;
    block_reader read;
} block_kind;

static inline float half_at(const uint8_t *p) { return lco_f16_to_f32((uint16_t)(p[0] | p[1] << 8)); }

static inline uint32_t word_at(const uint8_t *p)
{
    return (uint32_t)p[0] | (uint32_t)p[1] << 8 | (uint32_t)p[2] << 16 | (uint32_t)p[3] << 24;
}

/* Byte i of the nibbles holds value i below and value i + 16 above. */
static void split_nibbles(const uint8_t *nibbles, uint8_t *codes)
{
    for (int i = 0; i < 16; i++) {
        codes[i] = nibbles[i] & 15;
        codes[i + 16] = nibbles[i] >> 4;
    }
}

static void add_fifth_bits(uint32_t fifth, uint8_t *codes)
{
    for (int i = 0; i < 32; i++)
        codes[i] |= (uint8_t)((fifth >> i & 1) << 4);
}

static void read_q4_0(const uint8_t *block, block_codes *out)
{
    out->scales[0] = half_at(block);
    split_nibbles(block + 2, out->codes);
}

static void read_q4_1(const uint8_t *block, block_codes *out)
{
    out->scales[0] = half_at(block);
    out->offsets[0] = half_at(block + 2);
    split_nibbles(block + 4, out->codes);
}

static void read_q5_0(const uint8_t *block, block_codes *out)
{
    out->scales[0] = half_at(block);
    split_nibbles(block + 6, out->codes);
    add_fifth_bits(word_at(block + 2), out->codes);
}

static void read_q5_1(const uint8_t *block, block_codes *out)
{
    out->scales[0] = half_at(block);
    out->offsets[0] = half_at(block + 2);
    split_nibbles(block + 8, out->codes);
    add_fifth_bits(word_at(block + 4), out->codes);
}

static void read_q8_0(const uint8_t *block, block_codes *out)
{
    out->scales[0] = half_at(block);
    for (int i = 0; i < 32; i++)
        out->codes[i] = (uint8_t)(block[2 + i] ^ 128);
}

/* Scale and minimum of group g (0..7), 6 bits each: the first four lie in the low bits of bytes 0-3 and 4-7; of the others, the low four bits
 * are the nibbles of bytes 8-11 and the high two bits sit above the first four's. */
static inline void k_scale(const uint8_t *s, int g, int *scale, int *min)
{
    if (g < 4) {
        *scale = s[g] & 63;
        *min = s[g + 4] & 63;
    } else {
        *scale = (s[g + 4] & 15) | (s[g - 4] >> 6) << 4;
        *min = s[g + 4] >> 4 | (s[g] >> 6) << 4;
    }
}

/* Groups come in pairs: 32 bytes hold group 2p in the low and group 2p + 1 in the high nibbles. `fifth` (or NULL): bit g of byte i is the
 * fifth bit of value i of group g. */
static inline void read_k(const uint8_t *block, const uint8_t *nibbles, const uint8_t *fifth, block_codes *out)
{
    const float d = half_at(block), m = half_at(block + 2);
    for (int g = 0; g < 8; g++) {
        int scale, min;
        k_scale(block + 4, g, &scale, &min);
        out->scales[g] = d * (float)scale;
        out->offsets[g] = -(m * (float)min);
        const uint8_t *q = nibbles + 32 * (g / 2);
        const int right = 4 * (g & 1);
        for (int i = 0; i < 32; i++) {
            int code = q[i] >> right & 15;
            if (fifth != NULL)
                code |= (fifth[i] >> g & 1) << 4;
            out->codes[32 * g + i] = (uint8_t)code;
        }
    }
}

static void read_q4_k(const uint8_t *block, block_codes *out) { read_k(block, block + 16, NULL, out); }

static void read_q5_k(const uint8_t *block, block_codes *out) { read_k(block, block + 48, block + 16, out); }

/* Each half of 128 values: 64 bytes of low nibbles (values 0-63 low, 64-127 high), 32 bytes of high bits (values i, i+32, i+64, i+96). */
static void read_q6_k(const uint8_t *block, block_codes *out)
{
    const float d = half_at(block + 208);
    for (int g = 0; g < 16; g++)
        out->scales[g] = d * (float)(int8_t)block[192 + g];
    for (int half = 0; half < 2; half++) {
        const uint8_t *low = block + 64 * half, *high = block + 128 + 32 * half;
        for (int part = 0; part < 4; part++)
            for (int i = 0; i < 32; i++) {
                const int nibble = low[32 * (part & 1) + i] >> 4 * (part >> 1) & 15;
                out->codes[128 * half + 32 * part + i] = (uint8_t)(nibble | (high[i] >> 2 * part & 3) << 4);
            }
    }
}

static const block_kind *kind_of(int type)
{
    static const block_kind known[] = {
        {LCO_Q4_0, 32, 1, 18, 8, false, read_q4_0},   {LCO_Q4_1, 32, 1, 20, 0, true, read_q4_1},
        {LCO_Q5_0, 32, 1, 22, 16, false, read_q5_0},  {LCO_Q5_1, 32, 1, 24, 0, true, read_q5_1},
        {LCO_Q8_0, 32, 1, 34, 128, false, read_q8_0}, {LCO_Q4_K, 256, 8, 144, 0, true, read_q4_k},
        {LCO_Q5_K, 256, 8, 176, 0, true, read_q5_k},  {LCO_Q6_K, 256, 16, 210, 32, false, read_q6_k},
    };
    for (size_t i = 0; i < sizeof known / sizeof known[0]; i++)
        if (known[i].type == type)
            return &known[i];
    return NULL;
}

static void decode(const block_kind *kind, const uint8_t *block, float *out)
{
    block_codes b;
    kind->read(block, &b);
    const int each = kind->values / kind->groups;
    for (int g = 0; g < kind->groups; g++)
        for (int i = g * each; i < (g + 1) * each; i++) {
            out[i] = b.scales[g] * (float)(b.codes[i] - kind->zero);
            if (kind->offsets)
                out[i] += b.offsets[g];
        }
}

/* The kind of `type`, when `bytes` hold n values of it. */
static lco_status check_blocks(int type, size_t bytes, int64_t n, const block_kind **out, lco_error *err)
{
    const block_kind *kind = *out = kind_of(type);
    if (kind == NULL)
        return lco_fail(err, LCO_EUNSUPPORTED, "GGUF block type %d is not implemented", type);
    if (n < 0 || n % kind->values != 0 || bytes % kind->bytes != 0 || (int64_t)(bytes / kind->bytes) != n / kind->values)
        return lco_fail(err, LCO_EINVAL, "%zu bytes of GGUF block type %d do not hold %lld values (%d in %zu bytes each)", bytes, type,
                        (long long)n, kind->values, kind->bytes);
    return LCO_OK;
}

/* Magnitudes from here on round to infinity (or beyond float16's 65504). */
static float limit_of(lco_dtype dtype)
{
    if (dtype == LCO_F16)
        return 65520.0f;
    return dtype == LCO_BF16 ? lco_float_of_bits(0x7F7F8000u) : INFINITY;
}

/* Stores x[n] from element `at` on; returns how many values the type cannot hold. */
static int64_t store(const float *x, int64_t n, lco_dtype dtype, void *out, int64_t at, float limit)
{
    int32_t lost = 0;
    for (int64_t i = 0; i < n; i++)
        lost += !(fabsf(x[i]) < limit);
    if (dtype == LCO_F32) {
        memcpy((float *)out + at, x, (size_t)n * sizeof *x);
    } else if (dtype == LCO_F16) {
        for (int64_t i = 0; i < n; i++)
            ((uint16_t *)out)[at + i] = lco_f32_to_f16(x[i]);
    } else {
        for (int64_t i = 0; i < n; i++)
            ((uint16_t *)out)[at + i] = lco_f32_to_bf16(x[i]);
    }
    return lost;
}

lco_status lco_dequantize(int type, const void *blocks, size_t bytes, lco_dtype dtype, void *out, int64_t n, int64_t *lost, lco_error *err)
{
    const block_kind *kind;
    lco_status status = check_blocks(type, bytes, n, &kind, err);
    if (status != LCO_OK)
        return status;
    const float limit = limit_of(dtype);
    float buffer[LARGEST_BLOCK];
    *lost = 0;
    for (int64_t i = 0; i < n / kind->values; i++) {
        decode(kind, (const uint8_t *)blocks + (size_t)i * kind->bytes, buffer);
        *lost += store(buffer, kind->values, dtype, out, i * kind->values, limit);
    }
    return LCO_OK;
}

lco_status lco_block_codes(int type, const void *blocks, size_t bytes, int64_t rows, int64_t k, uint8_t *codes, float *scales,
                           float *offsets, lco_error *err)
{
    const block_kind *kind;
    lco_status status = check_blocks(type, bytes, rows * k, &kind, err);
    if (status != LCO_OK)
        return status;
    if (k % kind->values != 0 || kind->offsets != (offsets != NULL))
        return lco_fail(err, LCO_EINVAL, "rows of %lld values of GGUF block type %d, with%s offsets", (long long)k, type,
                        offsets != NULL ? "" : "out");
    const int64_t per_row = k / kind->values;
    for (int64_t i = 0; i < rows * per_row; i++) {
        block_codes b;
        kind->read((const uint8_t *)blocks + (size_t)i * kind->bytes, &b);
        memcpy(codes + i * kind->values, b.codes, (size_t)kind->values);
        for (int64_t g = 0; g < kind->groups; g++) {
            const int64_t at = (i % per_row * kind->groups + g) * rows + i / per_row;
            scales[at] = b.scales[g];
            if (offsets != NULL)
                offsets[at] = b.offsets[g];
        }
    }
    return LCO_OK;
}

static lco_status check_groups(const lco_grouped *w, lco_error *err)
{
    if (w->group_of == NULL && (w->group_size < 1 || (w->k > 0 && (w->k - 1) / w->group_size >= w->groups)))
        return lco_fail(err, LCO_EINVAL, "%lld columns in groups of %lld need more than %lld groups", (long long)w->k,
                        (long long)w->group_size, (long long)w->groups);
    for (int64_t c = 0; w->group_of != NULL && c < w->k; c++)
        if (w->group_of[c] < 0 || w->group_of[c] >= w->groups)
            return lco_fail(err, LCO_EINVAL, "column %lld belongs to group %d of %lld", (long long)c, w->group_of[c], (long long)w->groups);
    return LCO_OK;
}

lco_status lco_dequantize_groups(const lco_grouped *w, lco_dtype dtype, void *out, int64_t *lost, lco_error *err)
{
    lco_status status = check_groups(w, err);
    if (status != LCO_OK)
        return status;
    const float limit = limit_of(dtype);
    float buffer[LARGEST_BLOCK];
    *lost = 0;
    for (int64_t r = 0; r < w->rows; r++) {
        const uint8_t *codes = w->codes + r * w->k;
        const float *scales = w->scales + r * w->groups;
        const int16_t *zeros = w->zeros + r * w->groups;
        for (int64_t at = 0, count; at < w->k; at += count) {
            count = w->k - at < LARGEST_BLOCK ? w->k - at : LARGEST_BLOCK;
            if (w->group_of != NULL) {
                const int32_t *group_of = w->group_of + at;
                for (int64_t i = 0; i < count; i++)
                    buffer[i] = scales[group_of[i]] * (float)(codes[at + i] - zeros[group_of[i]]);
            } else {
                const int64_t g = at / w->group_size, left = (g + 1) * w->group_size - at;
                count = left < count ? left : count;
                const float scale = scales[g];
                const int zero = zeros[g];
                for (int64_t i = 0; i < count; i++)
                    buffer[i] = scale * (float)(codes[at + i] - zero);
            }
            *lost += store(buffer, count, dtype, out, r * w->k + at, limit);
        }
    }
    return LCO_OK;
}

void lco_convert(lco_dtype from, const void *in, lco_dtype to, void *out, int64_t n, int64_t *lost)
{
    const float limit = limit_of(to);
    float buffer[LARGEST_BLOCK];
    *lost = 0;
    for (int64_t at = 0; at < n; at += LARGEST_BLOCK) {
        const int64_t count = n - at < LARGEST_BLOCK ? n - at : LARGEST_BLOCK;
        for (int64_t i = 0; i < count; i++)
            buffer[i] = lco_element(in, at + i, from);
        *lost += store(buffer, count, to, out, at, limit);
    }
}
