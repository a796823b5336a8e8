/* One-byte codes and their scales (csrc/base/codes.h) against a slow search in double: every half, every midpoint of neighbouring codes. */
#include <math.h>
#include <stdlib.h>

#include "../../csrc/base/codes.h"
#include "blocks.h"
#include "harness.h"

typedef struct {
    const char *name;
    lco_dtype dtype;
    int mantissa, bias, codes; /* magnitude codes 0..codes - 1 are finite */
    double largest;
} kind;

static const kind KINDS[] = {
    {"fp8_e4m3", LCO_F8_E4M3, 3, 7, 0x7F, 448},
    {"fp8_e5m2", LCO_F8_E5M2, 2, 15, 0x7C, 57344},
    {"int8", LCO_I8, 0, 0, 128, 127},
};
enum { N_KINDS = 3 };

/* The magnitude that the low 7 bits mean, as the standard writes it. int8: the number itself. */
static double meaning(const kind *k, int code)
{
    if (k->dtype == LCO_I8)
        return code;
    const int exponent = code >> k->mantissa, fraction = code & ((1 << k->mantissa) - 1);
    return exponent == 0 ? ldexp(fraction, 1 - k->bias - k->mantissa)
                         : ldexp(fraction + (1 << k->mantissa), exponent - k->bias - k->mantissa);
}

static uint8_t with_sign(const kind *k, int code, bool negative)
{
    return k->dtype == LCO_I8 ? (uint8_t)(negative ? -code : code) : (uint8_t)(code | (negative ? 0x80 : 0));
}

/* The code nearest to a finite value or an infinity: of two as near, the one whose last bit is 0. */
static uint8_t search(const kind *k, double value)
{
    const double magnitude = fmin(fabs(value), k->largest);
    int best = 0;
    for (int code = 1; code < k->codes; code++) {
        const double now = fabs(meaning(k, code) - magnitude), before = fabs(meaning(k, best) - magnitude);
        if (now < before || (now == before && code % 2 == 0))
            best = code;
    }
    return with_sign(k, best, signbit(value) != 0);
}

static bool is_nan_code(const kind *k, uint8_t code) { return k->dtype == LCO_I8 ? code == 0 : (code & 0x7F) == 0x7F; }

static void check_encode(const kind *k, float value)
{
    if (harness_failures > 20)
        return;
    const uint8_t found = lco_encode(value, k->dtype);
    if (isnan(value))
        CHECK(is_nan_code(k, found), "%s: NaN becomes %02X", k->name, found);
    else
        CHECK(found == search(k, value), "%s: %a becomes %02X, expected %02X", k->name, (double)value, found, search(k, value));
}

static void every_half(void)
{
    for (int i = 0; i < N_KINDS; i++)
        for (uint32_t h = 0; h < 65536; h++)
            check_encode(&KINDS[i], lco_f16_to_f32((uint16_t)h));
}

/* Where rounding turns: the middle of two neighbours, and a step to either side. */
static void every_midpoint(void)
{
    for (int i = 0; i < N_KINDS; i++) {
        const kind *k = &KINDS[i];
        for (int code = 0; code + 1 < k->codes; code++) {
            const float middle = (float)((meaning(k, code) + meaning(k, code + 1)) / 2);
            const float values[] = {middle, nextafterf(middle, 0), nextafterf(middle, INFINITY)};
            for (int j = 0; j < 3; j++) {
                check_encode(k, values[j]);
                check_encode(k, -values[j]);
            }
            CHECK(lco_encode(values[1], k->dtype) == code && lco_encode(values[2], k->dtype) == code + 1, "%s at %02X", k->name, code);
        }
    }
}

static void random_floats(void)
{
    stream s = {.seed = 3};
    for (int i = 0; i < N_KINDS; i++)
        for (int n = 0; n < 20000; n++)
            check_encode(&KINDS[i], lco_float_of_bits((uint32_t)stream_below(&s, (int64_t)1 << 32)));
}

/* Values and codes by hand, so that the search too is checked. */
static void known_codes(void)
{
    const struct {
        float value;
        uint8_t e4m3, e5m2, i8;
    } known[] = {
        {0.0f, 0x00, 0x00, 0},
        {-0.0f, 0x80, 0x80, 0},
        {1.0f, 0x38, 0x3C, 1},
        {-1.0f, 0xB8, 0xBC, (uint8_t)-1},
        {2.5f, 0x42, 0x41, 2}, /* a tie for int8 */
        {3.5f, 0x46, 0x43, 4},
        {300.0f, 0x79, 0x5D, 127}, /* 288 in steps of 32; 304 would be the tie */
        {304.0f, 0x7A, 0x5D, 127},
        {448.0f, 0x7E, 0x5F, 127},
        {464.0f, 0x7E, 0x5F, 127}, /* where other libraries begin to give NaN or infinity */
        {465.0f, 0x7E, 0x5F, 127},
        {-1e6f, 0xFE, 0xFB, (uint8_t)-127},
        {57344.0f, 0x7E, 0x7B, 127},
        {61440.0f, 0x7E, 0x7B, 127},
        {3e38f, 0x7E, 0x7B, 127},
        {INFINITY, 0x7E, 0x7B, 127},
        {-INFINITY, 0xFE, 0xFB, (uint8_t)-127},
        {0x1p-6f, 0x08, 0x24, 0}, /* e4m3: smallest normal */
        {0x1p-9f, 0x01, 0x18, 0}, /* e4m3: smallest of all */
        {0x1p-10f, 0x00, 0x14, 0},
        {0x1.8p-9f, 0x02, 0x1A, 0},
        {0x1p-14f, 0x00, 0x04, 0},
        {0x1p-16f, 0x00, 0x01, 0},
        {-0x1p-17f, 0x80, 0x80, 0},
        {0x1.8p-16f, 0x00, 0x02, 0},
        {1e-45f, 0x00, 0x00, 0},
        {-1e-45f, 0x80, 0x80, 0},
    };
    for (size_t i = 0; i < sizeof known / sizeof known[0]; i++) {
        const float value = known[i].value;
        CHECK(lco_encode(value, LCO_F8_E4M3) == known[i].e4m3, "%a: %02X", (double)value, lco_encode(value, LCO_F8_E4M3));
        CHECK(lco_encode(value, LCO_F8_E5M2) == known[i].e5m2, "%a: %02X", (double)value, lco_encode(value, LCO_F8_E5M2));
        CHECK(lco_encode(value, LCO_I8) == known[i].i8, "%a: %02X", (double)value, lco_encode(value, LCO_I8));
    }
    for (int i = 0; i < N_KINDS; i++) {
        check_encode(&KINDS[i], NAN);
        check_encode(&KINDS[i], -NAN);
        check_encode(&KINDS[i], lco_float_of_bits(0x7F800001u));
        check_encode(&KINDS[i], lco_float_of_bits(0xFFFFFFFFu));
    }
}

/* All 256 codes: decoded as the standard says, and encoded again they are the same. */
static void every_code(void)
{
    for (int i = 0; i < N_KINDS; i++) {
        const kind *k = &KINDS[i];
        for (int code = 0; code < 256; code++) {
            const float found = lco_decode((uint8_t)code, k->dtype);
            if (k->dtype == LCO_I8) {
                CHECK(found == (float)(code < 128 ? code : code - 256), "int8 %02X is %g", code, (double)found);
                CHECK(code == 0x80 || lco_encode(found, LCO_I8) == code, "int8 %02X changes", code);
                continue;
            }
            const int magnitude = code & 0x7F;
            if (magnitude >= k->codes) {
                const bool infinite = k->dtype == LCO_F8_E5M2 && magnitude == 0x7C;
                CHECK(infinite ? isinf(found) && (found < 0) == (code > 127) : isnan(found), "%s %02X is %g", k->name, code, (double)found);
                continue;
            }
            CHECK((double)fabsf(found) == meaning(k, magnitude) && (signbit(found) != 0) == (code > 127), "%s %02X is %a", k->name, code,
                  (double)found);
            CHECK(lco_encode(found, k->dtype) == code, "%s: %02X comes back as %02X", k->name, code, lco_encode(found, k->dtype));
        }
    }
}

/* The smallest power of two that brings the largest within range, but never a subnormal one, whose inverse would be infinite. */
static void check_scale(const kind *k, float largest)
{
    const float scale = lco_block_scale(largest, k->dtype);
    int exponent;
    if (k->dtype == LCO_I8) {
        const float expected = fmaxf(largest / 127.0f, 0x1p-126f);
        CHECK(scale == expected, "int8 %a: scale %a", (double)largest, (double)scale);
        return;
    }
    CHECK(frexp(scale, &exponent) == 0.5 && scale >= 0x1p-126f, "%s %a: scale %a", k->name, (double)largest, (double)scale);
    CHECK((double)largest <= k->largest * (double)scale, "%s %a: not within range of %a", k->name, (double)largest, (double)scale);
    CHECK(scale == 0x1p-126f || (double)largest > k->largest * (double)scale / 2, "%s %a: %a is not the smallest", k->name, (double)largest,
          (double)scale);
}

static void scales(void)
{
    stream s = {.seed = 4};
    const float extremes[] = {1e-45f,       0x1p-127f, 0x1p-126f, 0x1p-120f, 0x1p-118f, 0x1.cp-118f,
                              0x1.c2p-118f, 1.0f,      448.0f,    449.0f,    57344.0f};
    for (int i = 0; i < N_KINDS; i++) {
        const kind *k = &KINDS[i];
        for (size_t j = 0; j < sizeof extremes / sizeof extremes[0]; j++)
            check_scale(k, extremes[j]);
        for (uint32_t h = 1; h < 0x4700; h++) /* every bfloat16 from the smallest to 32,768 */
            check_scale(k, lco_bf16_to_f32((uint16_t)h));
        for (int n = 0; n < 10000; n++)
            check_scale(k, (float)exp2(stream_uniform(&s) * 140 - 126));
        CHECK(isnan(lco_block_scale(INFINITY, k->dtype)) && isnan(lco_block_scale(NAN, k->dtype)), "%s", k->name);
        const float none = lco_block_scale(0, k->dtype), most = lco_block_scale(0x1.FEp127f, k->dtype);
        CHECK(none > 0 && isfinite(none) && isfinite(1 / none), "%s: the scale of nothing is %a", k->name, (double)none);
        CHECK(most > 1 && 1 / most > 0 && isfinite(lco_decode(lco_encode(0x1.FEp127f / most, k->dtype), k->dtype) * most),
              "%s: %a for the largest bfloat16", k->name, (double)most);
    }
}

static void largest_of_a_run(void)
{
    uint16_t values[40] = {0};
    CHECK(lco_largest_bf16(values, 40) == 0, "of zeros");
    for (int at = 0; at < 40; at++) {
        memset(values, 0, sizeof values);
        values[at] = lco_f32_to_bf16(-3.0f);
        CHECK(lco_largest_bf16(values, 40) == 3.0f, "at %d", at);
        values[(at + 1) % 40] = lco_f32_to_bf16(2.0f);
        CHECK(lco_largest_bf16(values, 40) == 3.0f && lco_largest_bf16(values, at) == (at == 39 ? 2.0f : 0), "at %d", at);
        const uint16_t bad[] = {0x7F80, 0xFF80, 0x7F81, 0xFFFF};
        for (int i = 0; i < 4; i++) {
            values[at] = bad[i];
            CHECK(!(lco_largest_bf16(values, 40) < INFINITY), "%04X at %d", bad[i], at);
        }
    }
}

enum { BLOCK = 64 };

static void random_block(stream *s, uint16_t *values, int n)
{
    const double size = exp2(stream_uniform(s) * 180 - 120);
    for (int i = 0; i < n; i++)
        values[i] = lco_f32_to_bf16((float)(size * (stream_uniform(s) - 0.5) * exp2(-20 * stream_uniform(s) * stream_uniform(s))));
}

/* A block: each value the nearest under the block's scale. Decoded (in bfloat16, as a tail holds it) and encoded again under the same scale the
 * codes stay; as a block of its own, whatever its scale, the values stay. */
static void blocks(void)
{
    stream s = {.seed = 5};
    uint16_t values[BLOCK], again[BLOCK];
    uint8_t codes[BLOCK], codes_again[BLOCK];
    float scale, scale_again;
    for (int n = 0; n < 6000 && harness_failures < 20; n++) {
        const kind *k = &KINDS[n % N_KINDS];
        random_block(&s, values, BLOCK);
        encode_block(codes, &scale, values, BLOCK, k->dtype);
        CHECK(scale == lco_block_scale(lco_largest_bf16(values, BLOCK), k->dtype), "%s", k->name);
        for (int i = 0; i < BLOCK; i++) {
            const float value = lco_bf16_to_f32(values[i]);
            const double step = k->dtype == LCO_I8 ? 0.5 : fmax(fabs((double)value / (double)scale), meaning(k, 1 << k->mantissa)) / 16;
            CHECK(k->dtype == LCO_I8 || codes[i] == search(k, (double)value / (double)scale), "%s: %02X", k->name, codes[i]);
            CHECK(fabs((double)lco_decode(codes[i], k->dtype) - (double)value / (double)scale) <=
                      step * (k->mantissa == 2 ? 2 : 1) * 1.0001,
                  "%s: %a is %02X under %a", k->name, (double)value, codes[i], (double)scale);
            again[i] = lco_f32_to_bf16(lco_decode(codes[i], k->dtype) * scale);
            CHECK(k->dtype == LCO_I8 || lco_bf16_to_f32(again[i]) == lco_decode(codes[i], k->dtype) * scale, "not exact in bfloat16");
        }
        lco_encode_run(codes_again, again, BLOCK, scale, k->dtype);
        CHECK(memcmp(codes, codes_again, BLOCK) == 0, "%s: codes change under the same scale", k->name);
        encode_block(codes_again, &scale_again, again, BLOCK, k->dtype);
        if (k->dtype == LCO_I8)
            CHECK(memcmp(codes, codes_again, BLOCK) == 0, "int8: codes change");
        for (int i = 0; i < BLOCK && k->dtype != LCO_I8; i++)
            CHECK(lco_decode(codes[i], k->dtype) * scale == lco_decode(codes_again[i], k->dtype) * scale_again,
                  "%s: a decoded value changes", k->name);
    }
}

/* One NaN or infinity anywhere: the scale is NaN, and so is what any code of the block means. */
static void bad_values_show(void)
{
    const uint16_t bad[] = {0x7FC0, 0xFFC0, 0x7F81, 0xFFFF, 0x7F80, 0xFF80};
    stream s = {.seed = 6};
    uint16_t values[BLOCK];
    uint8_t codes[BLOCK];
    float scale;
    for (int n = 0; n < 6 * BLOCK * N_KINDS; n++) {
        const kind *k = &KINDS[n % N_KINDS];
        random_block(&s, values, BLOCK);
        values[n / N_KINDS % BLOCK] = bad[n / (N_KINDS * BLOCK)];
        encode_block(codes, &scale, values, BLOCK, k->dtype);
        CHECK(isnan(scale), "%s: scale %a", k->name, (double)scale);
        for (int i = 0; i < BLOCK; i++) {
            CHECK(is_nan_code(k, codes[i]), "%s: code %02X", k->name, codes[i]);
            CHECK(isnan(lco_decode(codes[i], k->dtype) * scale), "%s: code %02X", k->name, codes[i]);
        }
    }
}

int main(int argc, char **argv)
{
    const test_case tests[] = {
        TEST(every_half), TEST(every_midpoint),   TEST(random_floats), TEST(known_codes),     TEST(every_code),
        TEST(scales),     TEST(largest_of_a_run), TEST(blocks),        TEST(bad_values_show),
    };
    return RUN_ALL(tests, argc, argv);
}
