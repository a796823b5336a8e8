/* Byte layouts shared by the whole core (and by the CUDA kernels): element types and the cache page. Quantised weights: qweight.h.
 *
 * The page: `page_size` tokens of ALL layers, keys and values, one contiguous run of bytes: a *slice* for each layer, one after the other
 *
 *   codes   [k|v][kv_head][token][head_dim]          element type lco_dtype, which may differ from layer to layer
 *   scales  [k|v][kv_head][token / 16]  float32      only for element types that need them
 *
 *   Slices begin at multiples of 64 bytes. Page p of a pool begins at base + p * page_bytes. All offsets are 64-bit: LLaMA-13B passes 2^31 elements
 *   at 5,243 tokens. A layer of a page is one run, so that a page that is not in memory can be read layer by layer.
 *
 * One-byte codes mean code * scale, a scale for each block of 16 tokens, kv head, and K or V (base/codes.h). With a write-back buffer the newest
 * tokens are in 16 bit (bfloat16) too: those of the *stretch* that a sequence is filling, `residual` tokens that begin at a multiple of it. They lie
 * in the sequence's tail; a block of 16 of them is quantised into the page as soon as it is full. A prompt that goes past the stretch leaves the new
 * unfinished one in another tail, so that a step that fails has not touched what was there.
 *
 *   tail    for each buffered layer [k|v][kv_head][token % residual][head_dim], lco_tail_bytes()
 *
 * The first few tokens of a sequence, which most others attend to, stay in 16 bit for good, beside its first page and as long as that.
 *
 *   firsts  for each page that a text begins with, each buffered layer [k|v][kv_head][token < n_first][head_dim], lco_first_bytes()
 *
 * So a query at position p reads position t from 16 bit when t / residual = p / residual or t < n_first, else from codes. That depends on p alone. */
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
    LCO_QUANTIZED = 6, /* of weight matrices only: an lco_qweight (base/qweight.h) */
} lco_dtype;

static inline size_t lco_dtype_bytes(lco_dtype dtype) { return dtype == LCO_F32 ? 4 : dtype <= LCO_BF16 ? 2 : 1; }
static inline bool lco_dtype_scaled(lco_dtype dtype) { return dtype > LCO_BF16 && dtype <= LCO_I8; }

#define LCO_KV_BLOCK 16 /* tokens that share a scale */
enum { LCO_KV_MOST_RESIDUAL = 64, LCO_KV_MOST_FIRST = LCO_KV_BLOCK };

typedef struct lco_kv_view lco_kv_view;

/* Pages that are not in memory. fetch() returns a copy of the view's layer of such a page, of which at least kv heads [head, head + heads) are there;
 * it is the calling thread's, and good until that thread has fetched LCO_KV_FETCHED - 1 other pages. It never fails: what can't be read is zeros,
 * and the pool remembers it against the page (lco_kv_lost). */
#define LCO_KV_FETCHED 8
typedef struct {
    const bool *away; /* [pages] */
    const uint8_t *(*fetch)(void *ctx, const lco_kv_view *kv, int thread, int64_t page, int64_t next, int64_t head, int64_t heads);
    void *ctx;
} lco_kv_store;

/* Shape and place of one layer of a cache, as attention and append see it. */
struct lco_kv_view {
    uint8_t *base;                    /* this layer's slice of page 0 */
    size_t page_bytes;                /* from page to page */
    size_t slice_offset, tail_offset; /* where this layer begins in a page and in a tail */
    lco_dtype dtype;
    int32_t page_size; /* tokens, 16..512, a multiple of 16 */
    int32_t n_kv_heads, head_dim;
    bool turned;               /* keys and queries are turned by base/hadamard.h */
    const float *fixed_scales; /* [k|v][kv_head] that all blocks have (base/codes.h); NULL: scales come from the data */
    bool buffered;             /* the newest tokens are in the tail (scaled types only) */
    int32_t residual;          /* buffered: tokens of a stretch, a multiple of 16 that divides page_size, at most LCO_KV_MOST_RESIDUAL */
    int32_t n_first;           /* buffered: tokens that stay in 16 bit, 0..LCO_KV_MOST_FIRST */
    uint8_t *firsts;           /* of this layer beside page 0 */
    size_t firsts_stride;      /* from page to page */
    const lco_kv_store *store; /* NULL: all pages are in memory */
    const uint16_t *bounds;    /* of this layer of page 0, see lco_kv_bounds(); NULL: not kept */
    size_t bounds_stride;      /* from page to page, elements */
};

enum { LCO_KEY = 0, LCO_VALUE = 1 };

/* Bytes of a slice of the view's shape, rounded to 64 so that every slice starts on a cache line; false when they overflow. */
static inline bool lco_kv_slice_bytes(const lco_kv_view *kv, size_t *bytes)
{
    const size_t page_size = (size_t)kv->page_size, scales = lco_dtype_scaled(kv->dtype) ? page_size / LCO_KV_BLOCK * sizeof(float) : 0;
    size_t head;
    if (__builtin_mul_overflow(page_size * lco_dtype_bytes(kv->dtype), (size_t)kv->head_dim, &head) ||
        __builtin_add_overflow(head, scales, &head) || __builtin_mul_overflow((size_t)2 * (size_t)kv->n_kv_heads, head, bytes) ||
        __builtin_add_overflow(*bytes, (size_t)63, bytes))
        return false;
    *bytes &= ~(size_t)63;
    return true;
}

/* Bytes of a head's run of codes. */
static inline size_t lco_kv_run_bytes(const lco_kv_view *kv)
{
    return (size_t)kv->page_size * (size_t)kv->head_dim * lco_dtype_bytes(kv->dtype);
}

/* Where the codes of a head, [page_size * head_dim], and its scales, [page_size / LCO_KV_BLOCK], begin in a slice. */
static inline size_t lco_codes_offset(const lco_kv_view *kv, int64_t key_or_value, int64_t kv_head)
{
    return (size_t)(key_or_value * kv->n_kv_heads + kv_head) * lco_kv_run_bytes(kv);
}

static inline size_t lco_scales_offset(const lco_kv_view *kv, int64_t key_or_value, int64_t kv_head)
{
    const size_t blocks = (size_t)(key_or_value * kv->n_kv_heads + kv_head) * (size_t)(kv->page_size / LCO_KV_BLOCK);
    return (size_t)2 * (size_t)kv->n_kv_heads * lco_kv_run_bytes(kv) + blocks * sizeof(float);
}

/* Of every full page, kv head and channel: no key, as attention reads it, is below the first or above the second of [2][head_dim] bfloat16. They
 * lie in memory wherever the page does. Infinite where a key is not a number. */
static inline const uint16_t *lco_kv_bounds(const lco_kv_view *kv, int64_t page, int64_t kv_head)
{
    return kv->bounds + (size_t)page * kv->bounds_stride + (size_t)(2 * kv_head * kv->head_dim);
}

/* A page's slice for writing, which is done to pages in memory only. */
static inline uint8_t *lco_kv_slice(const lco_kv_view *kv, int64_t page) { return kv->base + (size_t)page * kv->page_bytes; }

static inline uint8_t *lco_kv_codes(const lco_kv_view *kv, int64_t page, int64_t key_or_value, int64_t kv_head)
{
    return lco_kv_slice(kv, page) + lco_codes_offset(kv, key_or_value, kv_head);
}

static inline float *lco_kv_scales(const lco_kv_view *kv, int64_t page, int64_t key_or_value, int64_t kv_head)
{
    return (float *)(void *)(lco_kv_slice(kv, page) + lco_scales_offset(kv, key_or_value, kv_head));
}

static inline bool lco_kv_away(const lco_kv_view *kv, int64_t page) { return kv->store != NULL && kv->store->away[page]; }

/* A page's slice for reading heads [head, head + heads), wherever the page lies. `next`: the page that is likely read after it, or -1. */
static inline const uint8_t *lco_kv_read(const lco_kv_view *kv, int thread, int64_t page, int64_t next, int64_t head, int64_t heads)
{
    return lco_kv_away(kv, page) ? kv->store->fetch(kv->store->ctx, kv, thread, page, next, head, heads) : lco_kv_slice(kv, page);
}

/* In a slice that lco_kv_read() gave. */
static inline const uint8_t *lco_read_codes(const lco_kv_view *kv, const uint8_t *slice, int64_t key_or_value, int64_t kv_head)
{
    return slice + lco_codes_offset(kv, key_or_value, kv_head);
}

static inline const float *lco_read_scales(const lco_kv_view *kv, const uint8_t *slice, int64_t key_or_value, int64_t kv_head)
{
    return (const float *)(const void *)(slice + lco_scales_offset(kv, key_or_value, kv_head));
}

/* Bytes of `rows` tokens of this layer in 16 bit, and where a head's rows begin among them. */
static inline size_t lco_rows_bytes(const lco_kv_view *kv, int64_t rows)
{
    return (size_t)2 * 2 * (size_t)rows * (size_t)kv->n_kv_heads * (size_t)kv->head_dim;
}

static inline uint16_t *lco_rows_at(const lco_kv_view *kv, void *layer_rows, int64_t rows, int64_t key_or_value, int64_t kv_head)
{
    return (uint16_t *)layer_rows + (size_t)(key_or_value * kv->n_kv_heads + kv_head) * (size_t)(rows * kv->head_dim);
}

/* This layer of a tail. */
static inline size_t lco_tail_bytes(const lco_kv_view *kv) { return lco_rows_bytes(kv, kv->residual); }

static inline uint16_t *lco_tail_rows(const lco_kv_view *kv, void *layer_tail, int64_t key_or_value, int64_t kv_head)
{
    return lco_rows_at(kv, layer_tail, kv->residual, key_or_value, kv_head);
}

/* This layer of what lies beside a page that a text begins with. */
static inline size_t lco_first_bytes(const lco_kv_view *kv) { return lco_rows_bytes(kv, kv->n_first); }

static inline uint16_t *lco_first_rows(const lco_kv_view *kv, int64_t page, int64_t key_or_value, int64_t kv_head)
{
    return lco_rows_at(kv, kv->firsts + (size_t)page * kv->firsts_stride, kv->n_first, key_or_value, kv_head);
}

/* Positions before this are read as codes by a query at `position`, but for the first few; the rest from the stretch in 16 bit. */
static inline int64_t lco_coded_end(const lco_kv_view *kv, int64_t position)
{
    return kv->buffered ? position / kv->residual * kv->residual : position + 1;
}

_Static_assert(sizeof(float) == 4 && sizeof(size_t) == 8, "the layouts assume 4-byte floats and a 64-bit machine");

#endif
