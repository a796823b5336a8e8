/* Weights from the types of a file to the types the model computes with: GGUF blocks decoded, 16- and 32-bit floats converted.
 *
 * GGUF blocks (little-endian; d and m are float16; q counts from the block's first value)
 *
 *   type   values bytes  layout                                             value
 *   Q4_0     32    18    d, 16 bytes of nibbles                             d * (q - 8)
 *   Q4_1     32    20    d, m, 16 bytes of nibbles                          d * q + m
 *   Q5_0     32    22    d, 32 fifth bits, 16 bytes of nibbles              d * (q - 16)
 *   Q5_1     32    24    d, m, 32 fifth bits, 16 bytes of nibbles           d * q + m
 *   Q8_0     32    34    d, 32 int8                                         d * q
 *   Q4_K    256   144    d, m, 12 bytes of scales, 128 bytes of nibbles     (d * scale) * q - (m * min)   per 32
 *   Q5_K    256   176    d, m, 12 bytes of scales, 32 of fifth bits, 128    the same with 5-bit q         per 32
 *   Q6_K    256   210    128 bytes low nibbles, 64 bytes high pairs, 16 int8 scales, d      (d * scale) * (q - 32)   per 16
 *
 * Products and sums are float32, in the order written. The result is then rounded to nearest even. */
#ifndef LCO_MODEL_DEQUANT_H
#define LCO_MODEL_DEQUANT_H

#include <stdbool.h>
#include <stddef.h>
#include <stdint.h>

#include "../base/formats.h"
#include "../base/status.h"

/* Numbers as GGUF files have them. */
typedef enum {
    LCO_Q4_0 = 2,
    LCO_Q4_1 = 3,
    LCO_Q5_0 = 6,
    LCO_Q5_1 = 7,
    LCO_Q8_0 = 8,
    LCO_Q4_K = 12,
    LCO_Q5_K = 13,
    LCO_Q6_K = 14,
} lco_block_type;

/* Decodes n values into out[n]; `bytes` is the size of blocks. *lost counts values that `dtype` cannot hold (NaN, infinite, too large).
 * LCO_EINVAL when n is no whole number of blocks or `bytes` does not fit, LCO_EUNSUPPORTED for other types. */
lco_status lco_dequantize(int type, const void *blocks, size_t bytes, lco_dtype dtype, void *out, int64_t n, int64_t *lost, lco_error *err);

/* Codes of rows of blocks, [rows][k] (those of Q8_0 plus 128), and their scales and offsets, [k / group][rows]; offsets are NULL for types without.
 * LCO_EINVAL, LCO_EUNSUPPORTED as above. */
lco_status lco_block_codes(int type, const void *blocks, size_t bytes, int64_t rows, int64_t k, uint8_t *codes, float *scales,
                           float *offsets, lco_error *err);

/* Rows of integer codes with a scale and a zero point for each group of columns: codes[rows][k], scales and zeros [rows][groups]. */
typedef struct {
    const uint8_t *codes;
    const float *scales;
    const int16_t *zeros;
    const int32_t *group_of; /* [k], or NULL: column c belongs to group c / group_size */
    int64_t rows, k, groups, group_size;
} lco_grouped;

/* out[r][c] = scales[r][g] * (codes[r][c] - zeros[r][g]): one float32 product (exact when the scale was a 16-bit float), then rounded to
 * nearest even. *lost as above. LCO_EINVAL when a column belongs to no group. */
lco_status lco_dequantize_groups(const lco_grouped *w, lco_dtype dtype, void *out, int64_t *lost, lco_error *err);

/* out[i] = in[i], rounded. Both aligned to their element size. *lost as above; float16 saturates at 65504. */
void lco_convert(lco_dtype from, const void *in, lco_dtype to, void *out, int64_t n, int64_t *lost);

#endif
