/* Byte layouts shared by the whole core (and by the CUDA kernels): element types and the cache page.
 *
 * The page: `page_size` tokens of ALL layers, keys and values, one contiguous run of bytes
 *
 *   codes   [layer][k|v][kv_head][token][head_dim]          element type lco_dtype
 *   scales  [layer][kv_head][k|v][token / 16]  float32      at the page's end, only for element types that need them
 *
 *   page p of a pool begins at base + p * page_bytes. All offsets are 64-bit: LLaMA-13B passes 2^31 elements at 5,243 tokens. */
#ifndef LCO_BASE_FORMATS_H
#define LCO_BASE_FORMATS_H

#include <stddef.h>
#include <stdint.h>

typedef enum {
    LCO_F32 = 0,
    LCO_F16 = 1,
    LCO_BF16 = 2,
} lco_dtype;

static inline size_t lco_dtype_bytes(lco_dtype dtype) { return dtype == LCO_F32 ? 4 : 2; }

/* Shape and place of a cache, as attention and append see it. */
typedef struct {
    uint8_t *base;
    size_t page_bytes; /* lco_kv_page_bytes() of the fields below, rounded up to 64 */
    lco_dtype dtype;
    int32_t page_size; /* tokens, 16..512, a multiple of 16 */
    int32_t n_layers, n_kv_heads, head_dim;
} lco_kv_view;

enum { LCO_KEY = 0, LCO_VALUE = 1 };

/* First element of a head's run of page_size * head_dim codes. */
static inline uint8_t *lco_kv_codes(const lco_kv_view *kv, int64_t page, int64_t layer, int64_t key_or_value, int64_t kv_head)
{
    size_t run = (size_t)kv->page_size * (size_t)kv->head_dim * lco_dtype_bytes(kv->dtype);
    size_t index = ((size_t)layer * 2 + (size_t)key_or_value) * (size_t)kv->n_kv_heads + (size_t)kv_head;
    return kv->base + (size_t)page * kv->page_bytes + index * run;
}

_Static_assert(sizeof(float) == 4 && sizeof(size_t) == 8, "the layouts assume 4-byte floats and a 64-bit machine");

#endif
