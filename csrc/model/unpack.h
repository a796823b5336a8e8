/* Small integers packed into 32-bit words, as GPTQ, AWQ and compressed-tensors files have them, to one byte each.
 *
 * A packed matrix is a number of *lines* (the axis that is not packed), each a run of words; word w of line l is
 * words[l * line_stride + w * word_stride]. The strides say along which axis of the tensor the values are packed:
 *
 *   tensor                          line         value        line_stride   word_stride   kind
 *   GPTQ qweight [K * b / 32, N]    output       input        1             N             stream
 *   GPTQ qzeros  [G, N * b / 32]    group        output       N * b / 32    1             stream
 *   AWQ qweight  [K, N / 8]         input        output       N / 8         1             awq
 *   AWQ qzeros   [G, N / 8]         group        output       N / 8         1             awq
 *   weight_packed     [N, K / p]    output       input        K / p         1             whole
 *   weight_zero_point [N / p, G]    group        output       1             G             whole
 *
 *   stream  value i is bits [i * b, i * b + b) of the line, read as one little-endian number: 3-bit values straddle words
 *   whole   p = 32 / b values a word, lowest bits first, unused bits on top: 3-bit values never straddle
 *   awq     4 bits; nibble i of a word is its value 0, 2, 4, 6, 1, 3, 5, 7 [i]
 *
 * For 2, 4 and 8 bits stream and whole are the same; for 3, newer versions of compressed-tensors write stream. */
#ifndef LCO_MODEL_UNPACK_H
#define LCO_MODEL_UNPACK_H

#include <stdbool.h>
#include <stddef.h>
#include <stdint.h>

#include "../base/status.h"

typedef enum { LCO_PACK_STREAM = 0, LCO_PACK_WHOLE = 1, LCO_PACK_AWQ = 2 } lco_pack_kind;

typedef struct {
    const uint32_t *words;
    int64_t n_words;
    int bits; /* 2, 3, 4 or 8 */
    lco_pack_kind kind;
    int64_t line_stride, word_stride;
} lco_packed;

/* The part of a packed matrix to unpack: lines [line, line + lines), values [value, value + values) of each. */
typedef struct {
    int64_t line, lines, value, values;
} lco_packed_part;

/* out[lines][values], or out[values][lines] when transposed. LCO_EINVAL for unknown bits or a part outside the words. */
lco_status lco_unpack(const lco_packed *packed, const lco_packed_part *part, bool transposed, uint8_t *out, lco_error *err);

#endif
