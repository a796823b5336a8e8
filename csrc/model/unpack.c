#include "unpack.h"

static const uint8_t IN_ORDER[32] = {0,  1,  2,  3,  4,  5,  6,  7,  8,  9,  10, 11, 12, 13, 14, 15,
                                     16, 17, 18, 19, 20, 21, 22, 23, 24, 25, 26, 27, 28, 29, 30, 31};
static const uint8_t AWQ_ORDER[8] = {0, 4, 1, 5, 2, 6, 3, 7}; /* value i of a word is nibble AWQ_ORDER[i] */

/* The words that a line of `values` values reaches into. */
static int64_t words_of(const lco_packed *p, int64_t values)
{
    if (p->kind == LCO_PACK_STREAM)
        return (values * p->bits + 31) / 32;
    const int64_t per_word = 32 / p->bits;
    return (values + per_word - 1) / per_word;
}

static lco_status check(const lco_packed *p, const lco_packed_part *part, lco_error *err)
{
    const int64_t most = INT64_MAX / 64;
    if (!(p->bits == 2 || p->bits == 3 || p->bits == 4 || p->bits == 8) || (p->kind == LCO_PACK_AWQ && p->bits != 4))
        return lco_fail(err, LCO_EINVAL, "%d bits in packing %d; expected 2, 3, 4 or 8, and 4 for AWQ", p->bits, (int)p->kind);
    if (part->line < 0 || part->lines < 0 || part->value < 0 || part->values < 0 || part->value > most - part->values ||
        part->line > most - part->lines || p->line_stride < 0 || p->word_stride < 0)
        return lco_fail(err, LCO_EINVAL, "a negative or absurd part of a packed matrix");
    if (part->lines == 0 || part->values == 0)
        return LCO_OK;
    int64_t line, word, end;
    if (__builtin_mul_overflow(part->line + part->lines - 1, p->line_stride, &line) ||
        __builtin_mul_overflow(words_of(p, part->value + part->values) - 1, p->word_stride, &word) ||
        __builtin_add_overflow(line, word, &end) || end >= p->n_words)
        return lco_fail(err, LCO_EINVAL, "lines up to %lld of %lld values with strides %lld and %lld pass the end of %lld packed words",
                        (long long)(part->line + part->lines), (long long)(part->value + part->values), (long long)p->line_stride,
                        (long long)p->word_stride, (long long)p->n_words);
    return LCO_OK;
}

static void unpack_stream(const lco_packed *p, const lco_packed_part *part, int64_t line_step, int64_t value_step, uint8_t *out)
{
    const uint32_t mask = (1u << p->bits) - 1;
    for (int64_t v = 0; v < part->values; v++) {
        const int64_t bit = (part->value + v) * p->bits;
        const int shift = (int)(bit % 32);
        const bool straddles = shift + p->bits > 32;
        const uint32_t *low = p->words + part->line * p->line_stride + bit / 32 * p->word_stride;
        for (int64_t l = 0; l < part->lines; l++) {
            uint32_t field = low[l * p->line_stride] >> shift;
            if (straddles)
                field |= low[l * p->line_stride + p->word_stride] << (32 - shift);
            out[l * line_step + v * value_step] = (uint8_t)(field & mask);
        }
    }
}

/* Word by word: every one is read once, and the lines of a part stay in the nearest cache. */
static void unpack_words(const lco_packed *p, const lco_packed_part *part, int64_t line_step, int64_t value_step, uint8_t *out)
{
    const int per_word = 32 / p->bits;
    const uint32_t mask = (1u << p->bits) - 1;
    const uint8_t *order = p->kind == LCO_PACK_AWQ ? AWQ_ORDER : IN_ORDER;
    const int64_t first = part->value / per_word, end = part->value + part->values;
    for (int64_t w = first; w * per_word < end; w++) {
        const int from = w == first ? (int)(part->value % per_word) : 0;
        const int to = end - w * per_word < per_word ? (int)(end - w * per_word) : per_word;
        const uint32_t *words = p->words + part->line * p->line_stride + w * p->word_stride;
        const int64_t at = (w * per_word - part->value) * value_step; /* of the word's value 0, which may lie before the part */
        for (int64_t l = 0; l < part->lines; l++) {
            const uint32_t word = words[l * p->line_stride];
            for (int i = from; i < to; i++)
                out[at + l * line_step + i * value_step] = (uint8_t)(word >> order[i] * p->bits & mask);
        }
    }
}

lco_status lco_unpack(const lco_packed *p, const lco_packed_part *part, bool transposed, uint8_t *out, lco_error *err)
{
    lco_status status = check(p, part, err);
    if (status != LCO_OK)
        return status;
    const int64_t line_step = transposed ? 1 : part->values, value_step = transposed ? part->lines : 1;
    if (p->kind == LCO_PACK_STREAM && p->bits == 3)
        unpack_stream(p, part, line_step, value_step, out);
    else
        unpack_words(p, part, line_step, value_step, out);
    return LCO_OK;
}
