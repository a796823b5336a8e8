#include "pack.h"

#include <math.h>
#include <string.h>

#include "../base/convert.h"

#define PANELS 8 /* filled side by side, so that a row of GPTQ's words is read in long runs */

/* FNV-1a of the order's words. */
static uint64_t hash_of(const int32_t *order, int64_t k)
{
    uint64_t hash = 0xCBF29CE484222325u;
    for (int64_t j = 0; j < k; j++)
        hash = (hash ^ (uint32_t)order[j]) * 0x100000001B3u;
    return hash;
}

lco_status lco_pack_begin(void *out, size_t bytes, const lco_qweight *head, const int32_t *order, lco_error *err)
{
    lco_qweight *q = out;
    lco_qweight checked = *head;
    checked.magic = LCO_QWEIGHT_MAGIC;
    checked.ordered = order != NULL;
    checked.order_hash = order != NULL ? hash_of(order, head->k) : 0;
    lco_status status = lco_qweight_check(&checked, err);
    if (status != LCO_OK)
        return status;
    if (bytes != lco_qweight_bytes(&checked))
        return lco_fail(err, LCO_EINVAL, "%zu bytes for a quantised weight, expected %zu", bytes, lco_qweight_bytes(&checked));
    *q = checked;
    memset(q + 1, 0, lco_panels_at(q) - sizeof *q);
    if (order != NULL)
        memcpy(q + 1, order, (size_t)q->k * sizeof *order);
    return LCO_OK;
}

/* Where the codes of 8 inputs are in a panel. */
static inline uint8_t *eight_at(const lco_qweight *q, uint8_t *panel, int64_t input)
{
    return panel + (size_t)(input / q->block) * lco_block_bytes(q) + (size_t)(input % q->block) / 8 * 32 * q->bits;
}

/* Eight codes, each a byte, as the eight nibbles of a word. */
static inline uint32_t nibbles_of(const uint8_t *eight)
{
    uint64_t x;
    memcpy(&x, eight, sizeof x);
    x = (x | x >> 4) & 0x00FF00FF00FF00FFu;
    x = (x | x >> 8) & 0x0000FFFF0000FFFFu;
    return (uint32_t)(x | x >> 16);
}

/* Eight codes of a row from the bytes of the file; past k they are 0, and so is x. */
static inline void eight_codes(const lco_qweight *q, const uint8_t *row, const int32_t *order, int64_t input, int shift, uint8_t *out)
{
    const int64_t left = q->k - input, n = left < 8 ? left : 8;
    memset(out, 0, 8);
    for (int64_t i = 0; i < n; i++)
        out[i] = (uint8_t)(row[order != NULL ? order[input + i] : input + i] + shift);
}

static void pack_bytes(const lco_qweight *q, uint8_t *panel, const lco_code_rows *from, int64_t row, int64_t rows)
{
    const int32_t *order = lco_qweight_order(q);
    for (int64_t r = 0; r < rows; r++) {
        const uint8_t *source = from->codes + (row + r - from->row) * q->k;
        uint8_t eight[8];
        for (int64_t input = 0; input < q->k; input += 8) {
            uint8_t *to = eight_at(q, panel, input) + r / 16 * 64 + r % 16 * 4;
            eight_codes(q, source, order, input, from->shift, eight);
            if (q->bits == 4) {
                const uint32_t word = nibbles_of(eight);
                memcpy(to, &word, sizeof word);
            } else {
                for (int i = 0; i < 8; i++)
                    to[(i & 1) * 128 + i / 2] = eight[i];
            }
        }
    }
}

/* Words of 8 inputs from those of the file, where they lie in words of other inputs: out[columns]. */
static inline void gather_words(const lco_qweight *q, const lco_code_rows *from, const int32_t *order, int64_t input, int64_t column,
                                int64_t columns, uint32_t *out)
{
    memset(out, 0, (size_t)columns * sizeof *out);
    for (int64_t i = 0; i < 8 && input + i < q->k; i++) {
        const uint32_t *words = from->words + order[input + i] / 8 * from->words_n + column;
        const int right = order[input + i] % 8 * 4, left = (int)i * 4;
        for (int64_t c = 0; c < columns; c++)
            out[c] |= (words[c] >> right & 15) << left;
    }
}

/* Panels [panel, panel + panels) from GPTQ's words; the first is at `to`. */
static void pack_words(const lco_qweight *q, uint8_t *to, const lco_code_rows *from, int64_t panel, int64_t panels)
{
    const int32_t *order = lco_qweight_order(q);
    const size_t panel_bytes = lco_panel_bytes(q);
    for (int64_t input = 0; input < q->k; input += 8)
        for (int64_t p = 0; p < panels; p++) {
            const int64_t column = (panel + p) * LCO_PANEL_ROWS, left = q->n - column;
            const int64_t columns = left < LCO_PANEL_ROWS ? left : LCO_PANEL_ROWS;
            uint32_t *words = (uint32_t *)(void *)eight_at(q, to + (size_t)p * panel_bytes, input);
            if (order != NULL)
                gather_words(q, from, order, input, column, columns, words);
            else
                memcpy(words, from->words + input / 8 * from->words_n + column, (size_t)columns * sizeof *words);
        }
}

/* n scales or offsets of one block; returns how many are not held exactly, or not finite. */
static int64_t put_floats(uint8_t *to, lco_dtype to_dtype, const void *from, lco_dtype dtype, int64_t at, int64_t n)
{
    int64_t lost = 0;
    for (int64_t i = 0; i < n; i++) {
        const float value = lco_element(from, at + i, dtype);
        lco_set_element(to, i, to_dtype, value);
        lost += !(isfinite(value) && lco_element(to, i, to_dtype) == value);
    }
    return lost;
}

/* Scales and offsets of a panel; those of rows that do not exist are 0. */
static int64_t pack_scales(const lco_qweight *q, uint8_t *panel, const lco_group_scales *s, int64_t row, int64_t rows)
{
    const lco_dtype dtype = (lco_dtype)q->scale_dtype;
    const size_t scales = lco_block_scales(q), offsets = lco_block_offsets(q), bytes = lco_block_bytes(q);
    const int neutral = lco_qweight_neutral(q);
    int64_t lost = 0;
    for (int64_t k0 = 0; k0 < q->k; k0 += q->block, panel += bytes) {
        const int64_t at = k0 / s->group_size * s->outputs + row - s->first;
        memset(panel + scales, 0, bytes - scales);
        lost += put_floats(panel + scales, dtype, s->scales, s->dtype, at, rows);
        if (q->offset_kind == LCO_OFFSET_FLOATS)
            lost += put_floats(panel + offsets, dtype, s->offsets, s->dtype, at, rows);
        for (int64_t r = 0; r < rows && q->offset_kind == LCO_OFFSET_ZEROS; r++) {
            const int zero = s->zeros[at + r] - neutral;
            panel[offsets + (size_t)r] = (uint8_t)zero;
            lost += zero < INT8_MIN || zero > INT8_MAX;
        }
    }
    return lost;
}

static lco_status check_rows(const lco_qweight *q, const lco_code_rows *rows, const lco_group_scales *s, lco_error *err)
{
    if (rows->row < 0 || rows->rows < 1 || rows->row % LCO_PANEL_ROWS != 0 || rows->row + rows->rows > q->n ||
        (rows->rows % LCO_PANEL_ROWS != 0 && rows->row + rows->rows != q->n))
        return lco_fail(err, LCO_EINVAL, "rows [%lld, +%lld) of %lld are no whole panels of %d", (long long)rows->row,
                        (long long)rows->rows, (long long)q->n, LCO_PANEL_ROWS);
    if (rows->row < s->first || rows->row + rows->rows > s->first + s->outputs || s->group_size < 1 || s->group_size % q->block != 0 ||
        (q->k - 1) / s->group_size >= s->groups)
        return lco_fail(err, LCO_EINVAL, "scales of outputs [%lld, +%lld) in %lld groups of %lld do not cover blocks of %d of %lld inputs",
                        (long long)s->first, (long long)s->outputs, (long long)s->groups, (long long)s->group_size, q->block,
                        (long long)q->k);
    if (rows->words != NULL && (q->bits != 4 || rows->words_n < q->n))
        return lco_fail(err, LCO_EINVAL, "words of 4-bit codes of %lld outputs for %d bits and %lld", (long long)rows->words_n, q->bits,
                        (long long)q->n);
    return LCO_OK;
}

lco_status lco_pack_rows(void *out, const lco_code_rows *rows, const lco_group_scales *scales, int64_t *lost, lco_error *err)
{
    const lco_qweight *q = out;
    lco_status status = check_rows(q, rows, scales, err);
    if (status != LCO_OK)
        return status;
    const int64_t first = rows->row / LCO_PANEL_ROWS, end = (rows->row + rows->rows + LCO_PANEL_ROWS - 1) / LCO_PANEL_ROWS;
    const size_t panel_bytes = lco_panel_bytes(q);
    *lost = 0;
    for (int64_t panel = first; panel < end; panel += PANELS) {
        const int64_t panels = end - panel < PANELS ? end - panel : PANELS;
        uint8_t *at = (uint8_t *)out + lco_panels_at(q) + (size_t)panel * panel_bytes;
        for (int64_t p = 0; p < panels; p++) {
            const int64_t row = (panel + p) * LCO_PANEL_ROWS, left = q->n - row, here = left < LCO_PANEL_ROWS ? left : LCO_PANEL_ROWS;
            uint8_t *place = at + (size_t)p * panel_bytes;
            if (here < LCO_PANEL_ROWS)
                memset(place, 0, panel_bytes);
            else if (q->k % q->block != 0) /* inputs past k */
                memset(place + panel_bytes - lco_block_bytes(q), 0, lco_block_bytes(q));
            *lost += pack_scales(q, place, scales, row, here);
            if (rows->words == NULL)
                pack_bytes(q, place, rows, row, here);
        }
        if (rows->words != NULL)
            pack_words(q, at, rows, panel, panels);
    }
    return LCO_OK;
}

lco_status lco_unpack_rows(const lco_qweight *q, int64_t row, int64_t rows, float *out, lco_error *err)
{
    if (row < 0 || rows < 0 || row + rows > q->n)
        return lco_fail(err, LCO_EINVAL, "rows [%lld, +%lld) of a weight of %lld", (long long)row, (long long)rows, (long long)q->n);
    for (int64_t r = 0; r < rows; r++)
        lco_qweight_row(q, row + r, out + r * q->k);
    return LCO_OK;
}
