/* What the specification (base/codes.h) makes of a whole block. */
#ifndef LCO_TESTS_BLOCKS_H
#define LCO_TESTS_BLOCKS_H

#include "../../csrc/base/codes.h"

/* One block of one head: n values (rows of head_dim, one after the other) -> codes, and their scale. */
static inline void encode_block(uint8_t *codes, float *scale, const uint16_t *values, int64_t n, lco_dtype dtype)
{
    *scale = lco_block_scale(lco_largest_bf16(values, n), dtype);
    lco_encode_run(codes, values, n, *scale, dtype);
}

#endif
