/* Byte layouts shared by the whole core (and by the CUDA kernels): element types and the cache page.
 *
 * The page: `page_size` tokens of ALL layers, keys and values, one contiguous run of bytes
 *
 *   codes   [layer][k|v][kv_head][token][head_dim]          element type lco_dtype
 *   scales  [layer][kv_head][k|v][token / 16]  float32      at the page's end, only for element types that need them
 *
 *   page p of a pool begins at base + p * page_bytes. All offsets are 64-bit: LLaMA-13B passes 2^31 elements at 5,243 tokens.
 *
 * One-byte codes mean code * scale, a scale for each block of 16 tokens, kv head, and K or V (base/codes.h). With a write-back buffer the block
 * that a sequence is filling has no codes yet: its 16-bit (bfloat16) values lie in the sequence's tail. There are two of them: rows that go past
 * the block leave the new unfinished block in the other one, so that a step that fails has not touched what was there.
 *
 *   tail    [layer][k|v][kv_head][token % 16][head_dim]     lco_tail_bytes() for each layer */
#ifndef LCO_BASE_FORMATS_H
#define LCO_BASE_FORMATS_H

#include <stdbool.h>
#include <stddef.h>
#include <stdint.h>

typedef enum {
    LCO_F32 = 0,
    LCO_F16 = 1,
    LCO_BF16 = 2,
    LCO_F8_E4M3 = 3, /* these are cache codes only, with scales */
    LCO_F8_E5M2 = 4,
    LCO_I8 = 5,
} lco_dtype;

static inline size_t lco_dtype_bytes(lco_dtype dtype) { return dtype == LCO_F32 ? 4 : dtype <= LCO_BF16 ? 2 : 1; }
static inline bool lco_dtype_scaled(lco_dtype dtype) { return dtype > LCO_BF16; }

#define LCO_KV_BLOCK 16 /* tokens that share a scale */

/* Shape and place of a cache, as attention and append see it. */
typedef struct {
    uint8_t *base;
    size_t page_bytes; /* lco_kv_page_bytes() of the fields below, rounded up to 64 */
    lco_dtype dtype;
    int32_t page_size; /* tokens, 16..512, a multiple of 16 */
    int32_t n_layers, n_kv_heads, head_dim;
    bool buffered; /* the block being filled is in the tail, not in the page (scaled types only) */
} lco_kv_view;

enum { LCO_KEY = 0, LCO_VALUE = 1 };

/* Bytes of a page of the view's shape, rounded to 64 so that every page starts on a cache line; false when they overflow. */
static inline bool lco_kv_page_bytes(const lco_kv_view *kv, size_t *bytes)
{
    const size_t page_size = (size_t)kv->page_size, scales = lco_dtype_scaled(kv->dtype) ? page_size / LCO_KV_BLOCK * sizeof(float) : 0;
    size_t heads, head;
    if (__builtin_mul_overflow((size_t)2 * (size_t)kv->n_layers, (size_t)kv->n_kv_heads, &heads) ||
        __builtin_mul_overflow(page_size * lco_dtype_bytes(kv->dtype), (size_t)kv->head_dim, &head) ||
        __builtin_add_overflow(head, scales, &head) || __builtin_mul_overflow(heads, head, bytes) ||
        __builtin_add_overflow(*bytes, (size_t)63, bytes))
        return false;
    *bytes &= ~(size_t)63;
    return true;
}

/* First element of a head's run of page_size * head_dim codes. */
static inline uint8_t *lco_kv_codes(const lco_kv_view *kv, int64_t page, int64_t layer, int64_t key_or_value, int64_t kv_head)
{
    size_t run = (size_t)kv->page_size * (size_t)kv->head_dim * lco_dtype_bytes(kv->dtype);
    size_t index = ((size_t)layer * 2 + (size_t)key_or_value) * (size_t)kv->n_kv_heads + (size_t)kv_head;
    return kv->base + (size_t)page * kv->page_bytes + index * run;
}

/* Scales of a head's blocks, [page_size / LCO_KV_BLOCK], for keys or for values. */
static inline float *lco_kv_scales(const lco_kv_view *kv, int64_t page, int64_t layer, int64_t key_or_value, int64_t kv_head)
{
    const size_t heads = (size_t)kv->n_layers * (size_t)kv->n_kv_heads, page_size = (size_t)kv->page_size;
    const size_t codes = 2 * heads * page_size * (size_t)kv->head_dim * lco_dtype_bytes(kv->dtype);
    const size_t index = ((size_t)layer * (size_t)kv->n_kv_heads + (size_t)kv_head) * 2 + (size_t)key_or_value;
    return (float *)(void *)(kv->base + (size_t)page * kv->page_bytes + codes) + index * (page_size / LCO_KV_BLOCK);
}

/* Bytes of one layer of a tail, and where a head's 16 rows begin in it. */
static inline size_t lco_tail_bytes(const lco_kv_view *kv)
{
    return (size_t)2 * 2 * LCO_KV_BLOCK * (size_t)kv->n_kv_heads * (size_t)kv->head_dim;
}

static inline uint16_t *lco_tail_rows(const lco_kv_view *kv, void *layer_tail, int64_t key_or_value, int64_t kv_head)
{
    return (uint16_t *)layer_tail + (size_t)(key_or_value * kv->n_kv_heads + kv_head) * LCO_KV_BLOCK * (size_t)kv->head_dim;
}

_Static_assert(sizeof(float) == 4 && sizeof(size_t) == 8, "the layouts assume 4-byte floats and a 64-bit machine");

#endif
