/* THE CONTRACT. Everything that computes implements these operators; the model above knows nothing else.
 *
 * - Activations are float32, row-major. Weights are float32, float16 or bfloat16, row-major [n, k] (a row per output), at any address that is
 *   a multiple of their element size; or quantised (base/qweight.h) for embed and linear_quantized, at a multiple of 64.
 * - Arguments are one zero-initialised struct per op: out, in, weights, sizes, then `exec` (threads and scratch).
 * - Shapes were checked when the model and the batch were built; ops assert, they do not check. They fail only for want of scratch (LCO_ENOMEM).
 * - The result of a row never depends on the other rows of the call nor on the number of threads: sums run in a fixed order per output.
 *   An op may use one arithmetic for rows of a prompt (rows [0, m_prompt), many at once) and another for decode rows; a row's kind is fixed by
 *   the batch, so the same token of the same sequence is always computed alike.
 * - `ref` is the oracle: float32 weights as they are, sums in double. Other tables overlay hot ops only. */
#ifndef LCO_OPS_H
#define LCO_OPS_H

#include "../base/formats.h"
#include "../base/mem.h"
#include "../base/status.h"
#include "../base/threads.h"

typedef struct {
    lco_pool *pool;
    lco_arena *scratch; /* ops take from it in the calling thread and reset to their mark before they return */
} lco_exec;

/* embed: out[i, :] = float(table[ids[i], :]).  ids in [0, n_rows). The table may be quantised. */
typedef struct {
    float *out;         /* [m, k] */
    const int32_t *ids; /* [m] */
    const void *table;  /* [n_rows, k] */
    lco_dtype dtype;
    int64_t m, k;
    const lco_exec *exec;
} lco_embed_args;

/* rmsnorm: out[i, :] = x[i, :] / sqrt(mean(x[i, :]^2) + eps) * weight.  Rows are ld apart; out may be x. */
typedef struct {
    float *out;          /* [m, k], row stride ld_out */
    const float *x;      /* [m, k], row stride ld_x */
    const float *weight; /* [k] */
    int64_t m, k, ld_out, ld_x;
    float eps;
    const lco_exec *exec;
} lco_rmsnorm_args;

/* linear: for every part p, out_p[i, j] = sum_k x[i, k] * w_p[j, k] (+ bias_p[j]) (+ out_p[i, j] when accumulate).
 * Parts share x (q, k, v; gate, up). out may not alias x.
 * Rows [0, m_prompt) are prompt rows: tables whose `detail` says BF16 round x to bfloat16 there (nearest even) for bfloat16 weights,
 * products summed in float32. Rows [m_prompt, m) are decode rows: x stays float32. */
#define LCO_LINEAR_PARTS 3
typedef struct {
    float *out;
    int64_t ld_out;
    const void *w; /* [n, k] */
    lco_dtype dtype;
    const float *bias; /* [n] or NULL */
    int64_t n;
} lco_linear_part;
typedef struct {
    lco_linear_part part[LCO_LINEAR_PARTS];
    int n_parts;
    bool accumulate;
    bool x_int8;    /* linear_quantized only */
    const float *x; /* [m, k], row stride ld_x */
    int64_t m, m_prompt, k, ld_x;
    const lco_exec *exec;
} lco_linear_args;

/* linear_quantized: linear, of parts that are all LCO_QUANTIZED. Tables other than ref round x, for each row and block of inputs that share a scale,
 * to multiples of (largest magnitude of the block) / 32639, or / 127 with x_int8, sum products exactly within a block, and blocks in float32 in their
 * order: prompt and decode rows alike, and the same bits in all these tables. A row with a NaN or infinity gives NaN. */

/* swiglu: out = silu(gate) * up, element by element; silu(z) = z / (1 + exp(-z)).  out may be gate or up. All contiguous [m, n]. */
typedef struct {
    float *out;
    const float *gate, *up;
    int64_t m, n;
    const lco_exec *exec;
} lco_swiglu_args;

/* mlp: out.part[0].out (+)= silu(x . gate^T) * (x . up^T) . down^T, to the bit what linear(in), swiglu(gate, gate, up) and linear(out) give.
 * in: two parts of equal n, gate and up, with out [m, n] for scratch; out: one part, x = gate's out, k = n; m and m_prompt are equal. */
typedef struct {
    lco_linear_args in, out;
} lco_mlp_args;

/* One sequence's share of a ragged batch: rows [row, row + len) are its tokens at positions [pos, pos + len).
 * Position t lies in page table[t / page_size], slot t % page_size (any number where no row sees the page). Attention of these rows reads positions [0, pos + len).
 * Prompt items come first in a batch, then decode items (len == 1 there). */
typedef struct {
    const int32_t *table; /* page numbers, at least ceil((pos + len) / page_size) */
    int64_t row, len, pos;
    int64_t rope_length; /* sequence length that length-dependent rope kinds use for these rows */
    bool prompt;
    uint8_t *tail, *next_tail; /* buffered caches (base/formats.h), all layers; else NULL */
    uint8_t *own; /* buffered caches, prompt items: scratch of lco_own_stretches() tail layers that rope_append fills for attention */
} lco_item;

/* Stretches of `unit` positions that an item's rows lie in. */
static inline int64_t lco_own_stretches(const lco_item *item, int64_t unit)
{
    return (item->pos + item->len - 1) / unit - item->pos / unit + 1;
}

/* The 16-bit keys and values of this layer of the stretch of `position`, in which rows of the item lie: lco_tail_rows() finds a head's. */
static inline uint8_t *lco_own_stretch(const lco_kv_view *kv, const lco_item *item, int64_t position)
{
    if (!item->prompt)
        return item->tail + kv->tail_offset;
    return item->own + (size_t)(position / kv->residual - item->pos / kv->residual) * lco_tail_bytes(kv);
}

/* rope_append: rotates q and k in place by position (rotate-half: pairs i and i + head_dim/2, as Hugging Face checkpoints are stored), turns
 * them where the cache is `turned` (base/hadamard.h), and writes k and v of every row to the cache (rounded to its element type: nearest even; float16 saturates at +-65504, NaN stays NaN).
 * One-byte codes: in a buffered cache a row goes to its stretch in 16 bit, the first few of a text to their place beside the page too, and a block
 * that has all 16 rows is quantised into the page (base/codes.h); the stretch left unfinished goes to the tail, or to next_tail when it is not the
 * one that the item began in. Unbuffered, each row is quantised at once: the first of a block sets the scale, and a larger one widens it and
 * rescales the codes before.
 * cos/sin hold one row per batch row. */
typedef struct {
    float *q;               /* [m, n_heads, head_dim], row stride ld_q; rotated in place */
    float *k;               /* [m, n_kv_heads, head_dim], row stride ld_kv; rotated in place */
    const float *v;         /* [m, n_kv_heads, head_dim], row stride ld_kv */
    const float *cos, *sin; /* [m, head_dim / 2] */
    const lco_kv_view *kv;  /* of the layer; pages that rows go to are in memory */
    const lco_item *items;
    int64_t n_items, n_heads, ld_q, ld_kv;
    const lco_exec *exec;
} lco_rope_append_args;

/* attention: out[i, h, :] = sum_t softmax_t(scale * q[i, h, :] . K[t, g, :]) * V[t, g, :], g = h / (n_heads / n_kv_heads),
 * over positions t with t <= position(i) and, when window > 0, t > position(i) - window or t < sinks.  Scores are masked with true -inf; slots of a page past
 * the sequence's length are never read (they may hold anything, NaN included). Row i's own key is in the cache already.
 * In a buffered cache a row reads its own stretch and the first few positions from 16 bit and all others from codes (base/formats.h): that depends
 * on its position alone, not on how the prompt was cut, what else ran, or what came from a shared prefix.
 * Prompt rows over a bfloat16 cache: tables whose `detail` says AMX round q * scale and the weights of the positions to bfloat16. */
typedef struct {
    float *out;            /* [m, n_heads, head_dim], row stride ld_out */
    const float *q;        /* [m, n_heads, head_dim], row stride ld_q */
    const lco_kv_view *kv; /* of the layer; pages are read through lco_kv_read() */
    const lco_item *items;
    int64_t n_items, n_heads, ld_out, ld_q, window, sinks;
    float scale;
    const uint64_t *chosen; /* by choose_pages: decode rows read these pages only; NULL: all */
    int64_t chosen_words;
    const lco_exec *exec;
} lco_attention_args;

/* choose_pages: for the row of every decode item, pages that it may leave out: the sum of their attention weights is at most `mass` <= tolerance,
 * for each query head. A page that a query head needs is read by all of its kv head. By what a page's keys are between (lco_kv_bounds), no key
 * of what is left out is read. Of an item whose pages are nearly all needed, all are read; attention's result is then the same to the bit.
 * The output is off by at most 2 * mass * the largest magnitude of the head's values. Prompt rows read everything.
 * Depends on the row and its sequence alone, as attention does. */
typedef struct {
    int64_t read, left_out; /* pages of the kv head */
    float mass;             /* of the query head that leaves out most, at most this */
} lco_choice;
typedef struct {
    uint64_t *chosen;      /* [n_items, n_kv_heads, chosen_words]: a bit for each table entry, lowest first. Prompt items': not written */
    lco_choice *choices;   /* [n_items, n_kv_heads]; zeros of prompt items */
    const float *q;        /* [m, n_heads, head_dim], row stride ld_q; rotated */
    const lco_kv_view *kv; /* with bounds */
    const lco_item *items;
    int64_t n_items, n_heads, ld_q, window, sinks, chosen_words;
    float scale; /* > 0 */
    double tolerance;
    const lco_exec *exec;
} lco_choose_pages_args;

static inline bool lco_page_chosen(const lco_attention_args *a, const lco_item *item, int64_t kv_head, int64_t page)
{
    return a->chosen == NULL || item->prompt ||
           (a->chosen[((item - a->items) * a->kv->n_kv_heads + kv_head) * a->chosen_words + page / 64] >> (page % 64) & 1) != 0;
}

/* What a row at `position` reads: positions [0, sinks) and [first, position]. sinks is 0 where these would be one run. */
typedef struct {
    int64_t sinks, first;
} lco_seen;
static inline lco_seen lco_seen_at(int64_t window, int64_t sinks, int64_t position)
{
    const int64_t first = window > 0 && position >= window ? position - window + 1 : 0;
    return sinks < first ? (lco_seen){.sinks = sinks, .first = first} : (lco_seen){0};
}

typedef struct {
    const char *name;   /* "ref", "avx2", "avx512", "amx" */
    const char *detail; /* features in use, for people: "AVX-512 BF16" */
    lco_status (*embed)(const lco_embed_args *);
    lco_status (*rmsnorm)(const lco_rmsnorm_args *);
    lco_status (*linear)(const lco_linear_args *);
    lco_status (*linear_quantized)(const lco_linear_args *);
    lco_status (*swiglu)(const lco_swiglu_args *);
    lco_status (*mlp)(const lco_mlp_args *);
    lco_status (*rope_append)(const lco_rope_append_args *);
    lco_status (*attention)(const lco_attention_args *);
    lco_status (*choose_pages)(const lco_choose_pages_args *);
} lco_ops;

/* The table for an instruction set: `isa` is "ref", "avx2", "avx512", "amx", or NULL for the best this CPU has (or LLMCOOPT_ISA says).
 * LCO_EINVAL for an unknown name, LCO_EUNSUPPORTED when the CPU lacks it; the message lists what it has. */
lco_status lco_ops_select(const char *isa, const lco_ops **out, lco_error *err);
/* Names this machine can run, best last: fills up to `cap`, returns the count. */
int lco_ops_available(const char **names, int cap);

#endif
