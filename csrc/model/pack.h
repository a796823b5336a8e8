/* Quantised weights from the forms of files to the layout of base/qweight.h. Any number of threads may pack panels of one weight at once. */
#ifndef LCO_MODEL_PACK_H
#define LCO_MODEL_PACK_H

#include "../base/qweight.h"

/* Writes the header and the order ([k], or NULL) to `out`, which has `bytes`. `head` says bits, block, types, n and k. LCO_EINVAL when they do not fit. */
lco_status lco_pack_begin(void *out, size_t bytes, const lco_qweight *head, const int32_t *order, lco_error *err);

/* Scales of outputs [first, first + outputs), of groups of `group_size` inputs in the order of the layout: element [group][output - first]. */
typedef struct {
    const void *scales;
    lco_dtype dtype;
    const int16_t *zeros; /* LCO_OFFSET_ZEROS: zero points of codes as the layout has them */
    const void *offsets;  /* LCO_OFFSET_FLOATS: of `dtype` */
    int64_t first, outputs, groups, group_size;
} lco_group_scales;

/* Codes of outputs [row, row + rows) in the file's order of inputs: either bytes, [rows][k], or GPTQ's words of 4-bit codes, [ceil(k / 8)][words_n]
 * for outputs 0 to words_n - 1. */
typedef struct {
    const uint8_t *codes;
    const uint32_t *words;
    int64_t words_n;
    int shift; /* added to every code (bytes only) */
    int64_t row, rows;
} lco_code_rows;

/* Fills whole panels: `row` is a multiple of 32, and so is `rows` unless they are the last. *lost counts scales and offsets that the layout's type does
 * not hold exactly or that are not finite. LCO_EINVAL when something does not fit. */
lco_status lco_pack_rows(void *out, const lco_code_rows *rows, const lco_group_scales *scales, int64_t *lost, lco_error *err);

/* Rows [row, row + rows) of the matrix, decoded, in the file's order of inputs: out[rows][k]. */
lco_status lco_unpack_rows(const lco_qweight *q, int64_t row, int64_t rows, float *out, lco_error *err);

#endif
