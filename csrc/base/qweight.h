/* Quantised weights as kernels read them: one layout for 4 and 8 bits, whatever format the file had.
 *
 *   w[n, j] = scale * (code - neutral) + offset        neutral: 8 of 4 bits, 128 of 8 bits; 0 with LCO_OFFSET_FLOATS
 *
 * Inputs come in *blocks* of `block` (a multiple of 8, at most 128) that share scale and offset; the last may be short. A larger group of the file
 * is several blocks with the same scale. Outputs come in *panels* of 32, which kernels read as one stream:
 *
 *   lco_qweight           64 bytes
 *   order                 int32 [k]           where the file's groups are shuffled (act-order): input j of the layout is x[order[j]]
 *   panel 0, panel 1, ...
 *
 *   panel    block 0, block 1, ...
 *   block    codes    [8 inputs][part][row / 16] of 64 bytes, 16 rows in each
 *            scales   [32]                    float16, bfloat16 or float32
 *            offsets  [32]                    LCO_OFFSET_ZEROS: int8 zero points less neutral, offset = -scale * zero; LCO_OFFSET_FLOATS: as scales
 *
 * (Scales lie among the codes because a processor reads ahead best where nothing is left out: with all scales of a panel in front of its codes, reading
 * took half as long again.)
 *
 * Order, panels and blocks begin at multiples of 64 bytes. The 4 bytes of a row in 64 of codes:
 *
 *   4 bits   one part:   nibble i of the little-endian word is input i of the 8 (as GPTQ packs them, so its words are only moved)
 *   8 bits   two parts:  byte i of part p is input 2 * i + p
 *
 * so the even inputs of 4-bit codes are a mask away, the odd ones a shift and a mask, and either is four bytes side by side for a dot product of
 * bytes. Rows past n have scales and offsets of 0; codes of inputs past k are any number, as x is 0 there. */
#ifndef LCO_BASE_QWEIGHT_H
#define LCO_BASE_QWEIGHT_H

#include "formats.h"
#include "status.h"

#define LCO_QWEIGHT_MAGIC 0x31514F4Cu
#define LCO_PANEL_ROWS 32
#define LCO_LARGEST_BLOCK 128

typedef enum { LCO_OFFSET_NONE = 0, LCO_OFFSET_ZEROS = 1, LCO_OFFSET_FLOATS = 2 } lco_offset_kind;

typedef struct {
    uint32_t magic;
    uint16_t bits; /* 4 or 8 */
    uint16_t block;
    uint8_t scale_dtype; /* lco_dtype: float32, float16 or bfloat16 */
    uint8_t offset_kind;
    uint8_t ordered; /* 1: an order follows */
    uint8_t reserved[5];
    int64_t n, k;
    uint64_t order_hash; /* of the order: equal where inputs of two matrices are ordered alike; 0 without */
    uint8_t padding[24];
} lco_qweight;

_Static_assert(sizeof(lco_qweight) == 64, "the header is one cache line");

static inline size_t lco_round_line(size_t bytes) { return (bytes + 63) & ~(size_t)63; }
static inline int64_t lco_qweight_blocks(const lco_qweight *q) { return (q->k + q->block - 1) / q->block; }
static inline int64_t lco_qweight_panels(const lco_qweight *q) { return (q->n + LCO_PANEL_ROWS - 1) / LCO_PANEL_ROWS; }
static inline int lco_qweight_neutral(const lco_qweight *q) { return q->offset_kind == LCO_OFFSET_FLOATS ? 0 : 1 << (q->bits - 1); }

static inline size_t lco_offset_bytes(const lco_qweight *q)
{
    return q->offset_kind == LCO_OFFSET_NONE ? 0 : q->offset_kind == LCO_OFFSET_ZEROS ? 1 : lco_dtype_bytes((lco_dtype)q->scale_dtype);
}

/* Where scales and offsets begin in a block: behind its codes. */
static inline size_t lco_block_scales(const lco_qweight *q) { return (size_t)q->block * LCO_PANEL_ROWS * q->bits / 8; }
static inline size_t lco_block_offsets(const lco_qweight *q)
{
    return lco_block_scales(q) + LCO_PANEL_ROWS * lco_dtype_bytes((lco_dtype)q->scale_dtype);
}
static inline size_t lco_block_bytes(const lco_qweight *q)
{
    return lco_round_line(lco_block_offsets(q) + LCO_PANEL_ROWS * lco_offset_bytes(q));
}
static inline size_t lco_panel_bytes(const lco_qweight *q) { return (size_t)lco_qweight_blocks(q) * lco_block_bytes(q); }

static inline const int32_t *lco_qweight_order(const lco_qweight *q) { return q->ordered ? (const int32_t *)(const void *)(q + 1) : NULL; }
static inline size_t lco_panels_at(const lco_qweight *q)
{
    return sizeof *q + (q->ordered ? lco_round_line((size_t)q->k * sizeof(int32_t)) : 0);
}
static inline const uint8_t *lco_qweight_panel(const lco_qweight *q, int64_t panel)
{
    return (const uint8_t *)(const void *)q + lco_panels_at(q) + (size_t)panel * lco_panel_bytes(q);
}
static inline size_t lco_qweight_bytes(const lco_qweight *q)
{
    return lco_panels_at(q) + (size_t)lco_qweight_panels(q) * lco_panel_bytes(q);
}

/* Code of a row of a block and the block's input. */
static inline int lco_block_code(const lco_qweight *q, const uint8_t *block, int64_t row, int64_t input)
{
    const int64_t eight = input / 8, i = input % 8, half = row / 16, at = row % 16 * 4;
    if (q->bits == 4)
        return block[(eight * 2 + half) * 64 + at + i / 2] >> (4 * (i & 1)) & 15;
    return block[((eight * 2 + (i & 1)) * 2 + half) * 64 + at + i / 2];
}

/* What a header may say. LCO_EINVAL names the field. */
lco_status lco_qweight_check(const lco_qweight *q, lco_error *err);
/* The same, and that the rest is there and the order a permutation. */
lco_status lco_qweight_check_bytes(const void *data, size_t bytes, lco_error *err);

/* Row n as floats, in the order of the file's inputs: out[k]. The order of float operations is that of the kernels' scales and offsets. */
void lco_qweight_row(const lco_qweight *q, int64_t n, float *out);

#endif
