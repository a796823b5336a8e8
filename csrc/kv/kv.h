/* The paged key/value cache: a pool of pages, and sequences that own lists of pages.
 *
 * Invariants (lco_kv_check proves them)
 * 1. Every page is free (reference count 0, on the free list once) or held (count = the number of table entries that name it).
 * 2. A sequence of n tokens has at least ceil(n / page_size) table entries; those past that are reserved for tokens to come. Where rows see a
 *    window only (lco_kv_sight), entries whose page no row to come can see are holes: LCO_NO_PAGE, their pages were released.
 * 3. Slots [length, ...) of a sequence's last page may hold anything; no reader goes past the length.
 * 4. A page with count > 1 is never written: lco_seq_reserve copies it first (copy-on-write).
 * 5. Of a sequence of n tokens in a cache with a write-back buffer, the tokens from n / residual * residual on lie in its tail in 16 bit, the
 *    first n_first beside its first page, and all full blocks of 16 as codes in pages. Which of these a reader takes depends on the query's
 *    position alone (base/formats.h), whatever was cached when.
 * 6. With a spill file a page is blank (nothing was ever to be written), hot (in memory) or away (in the file), at most host_bytes of them hot.
 *    Rows go to hot pages: lco_seq_open makes them so. All else is read where it lies, and results don't depend on where that is.
 * 7. A page in the prefix index is full, and so is the page it follows, which is in the index too; the index counts as one that names it.
 * 8. With a page_tolerance the bounds of the keys of every full page are known (lco_kv_bounds).
 * 9. Address space is reserved for all pages when the pool is made; memory is used only by pages written (the OS maps them on first touch),
 *    and is given back when pages are freed.
 *
 * States of a page: free -> (lco_seq_reserve) held -> (lco_seq_fork) shared -> (free, truncate, copy-on-write) held -> free. */
#ifndef LCO_KV_KV_H
#define LCO_KV_KV_H

#include <stdbool.h>

#include "../base/formats.h"
#include "../base/status.h"

typedef struct lco_kv lco_kv;
typedef struct lco_seq lco_seq;

#define LCO_NO_PAGE (-1) /* table entry of a hole */

typedef struct {
    int32_t n_layers, n_kv_heads, head_dim;
    lco_dtype dtype;
    const lco_dtype *layer_dtypes; /* [n_layers], read by lco_kv_create only; NULL: all are `dtype` */
    const float *fixed_scales;     /* [n_layers][k|v][n_kv_heads], copied; of fp8_e4m3 layers (base/codes.h). NULL: scales from the data */
    int32_t page_size;
    bool turn_keys;     /* one-byte codes: keys and queries are turned before (base/hadamard.h) */
    bool write_buffer;  /* one-byte codes: the newest tokens are kept in 16 bit, and quantised once, a block of 16 at a time */
    int32_t residual;   /* with a write buffer: tokens of a stretch (base/formats.h); 0: as many as can be, LCO_KV_MOST_RESIDUAL at most */
    int32_t n_first;    /* with a write buffer: the first tokens of a text that stay in 16 bit, 0 to LCO_KV_MOST_FIRST */
    int64_t max_tokens; /* over all sequences; rounded up to whole pages */
    /* The most memory for pages, 0: no bound. With spill_path, a folder or the name of a file to make, pages beyond it lie in that file;
     * without, max_tokens becomes what fits. */
    int64_t host_bytes;
    const char *spill_path; /* read by lco_kv_create only */
    bool prefix_index;      /* full pages of prompts are kept after their sequences, to be found again */
    int64_t model_window;   /* the longest window of the model's layers, 0: some layer sees all */
    double page_tolerance;  /* approximate: decode rows may leave out pages with attention weights of this sum at most; 0: they read all */
    int64_t window, sinks;  /* approximate: rows see the newest `window` positions and those below `sinks`; 0: all that the model's do */
} lco_kv_options;

/* What a row sees of the positions before it: all, or with window > 0 the newest `window` (its own is one of them) and those below `sinks`. */
typedef struct {
    int64_t window, sinks;
} lco_kv_sight;

typedef struct {
    int64_t pages_total, pages_free, pages_shared, sequences, tokens_held;
    int64_t page_bytes, reserved_bytes, resident_bytes; /* address space; memory in use now, as the OS counts it */
    int64_t bytes_per_token, tail_bytes, first_bytes;   /* beside the pages: of all sequences, of all pages that a text begins with */
    /* With a spill file: pages in it and not in memory; pages written to it and read back whole; slices that attention read, and their bytes;
     * reads announced to the system, and those that came. */
    int64_t pages_away, pages_spilled, pages_restored, slices_fetched, bytes_fetched, prefetches_issued, prefetches_used;
    int64_t pages_cached;                                    /* held by the prefix index alone; they count as free */
    int64_t tokens_found, bytes_written;                     /* tokens that the index had; codes, scales and 16-bit rows written to pages */
    int64_t tokens_appended, blocks_quantised, pages_copied; /* since the cache was made; a block: 16 tokens of all layers and heads */
    int64_t pages_released;                                  /* left the window */
    /* With a page_tolerance, of each layer and kv head of decode rows; the largest bound of a query head's weights left out, and the last step's. */
    int64_t pages_read, pages_left_out, bounds_bytes; /* bounds of keys, of the pages held */
    float largest_mass_left_out, step_mass_left_out;
} lco_kv_stats;

lco_status lco_kv_create(const lco_kv_options *options, lco_kv **out, lco_error *err);
void lco_kv_destroy(lco_kv *kv); /* frees its sequences too */
const lco_kv_options *lco_kv_get_options(const lco_kv *kv);
const lco_kv_view *lco_kv_views(const lco_kv *kv); /* [n_layers] */
lco_kv_stats lco_kv_get_stats(const lco_kv *kv);
/* Steps are counted: sequences not used in this one give their memory first. Call before the first lco_seq_reserve of a step. */
void lco_kv_begin_step(lco_kv *kv);
int64_t lco_kv_step_tokens(const lco_kv *kv); /* the most tokens of one sequence that a step may append */
void lco_kv_forget_prefixes(lco_kv *kv);      /* empties the prefix index */
void lco_kv_reset_counters(lco_kv *kv);       /* those that count since the cache was made */
/* What rows of a layer see whose window in the model is `own` (0: all): the shorter window holds. */
lco_kv_sight lco_kv_layer_sight(const lco_kv *kv, int64_t own);
/* Whether a row at `position` or later may read of the page at a table index. */
bool lco_kv_sees_page(const lco_kv *kv, int64_t position, int64_t index);
/* The most tokens that a sequence needs pages for at once when steps append up to `rows`: INT64_MAX when rows see all. */
int64_t lco_kv_most_tokens(const lco_kv *kv, int64_t rows);
/* The most pages that a sequence may hold while it grows to `tokens` in such steps and can still go back to `base` tokens. */
int64_t lco_kv_most_pages(const lco_kv *kv, int64_t base, int64_t tokens, int64_t rows);
void lco_kv_count_choice(lco_kv *kv, int64_t read, int64_t left_out, float mass);
lco_status lco_kv_check(const lco_kv *kv, lco_error *err);

lco_status lco_seq_create(lco_kv *kv, lco_seq **out, lco_error *err);
void lco_seq_destroy(lco_seq *seq); /* returns its pages */
lco_status lco_seq_fork(const lco_seq *seq, lco_seq **out, lco_error *err);
int64_t lco_seq_length(const lco_seq *seq);
const int32_t *lco_seq_ids(const lco_seq *seq); /* of the tokens held; -1 where lco_seq_commit was not told */
const int32_t *lco_seq_table(const lco_seq *seq);
uint8_t *lco_seq_tail(const lco_seq *seq); /* of the stretch being filled; NULL before the first reserve and without a write buffer */
uint8_t *
lco_seq_next_tail(const lco_seq *seq); /* where rows of a later unfinished one go, since lco_seq_open; lco_seq_commit makes it the tail */
lco_kv *lco_seq_cache(const lco_seq *seq);

/* Makes room for n more tokens, all or nothing: new pages at the end, a copy of the last page when it is shared, and the tail.
 * LCO_EPAGES says how many pages were needed, how many are free, and the option to raise. */
lco_status lco_seq_reserve(lco_seq *seq, int64_t n, lco_error *err);
/* Before a step in which n of the reserved tokens are written: makes their pages ready, and the next tail. LCO_EPAGES when memory for pages is full
 * of this step's; LCO_EIO, LCO_ENOMEM. */
lco_status lco_seq_open(lco_seq *seq, int64_t n, lco_error *err);
/* n reserved tokens were written: the length grows, pages that left the window go. Their ids may be NULL: not known. `prompt`: they were prompt
 * rows. */
void lco_seq_commit(lco_seq *seq, const int32_t *ids, int64_t n, bool prompt);
/* Tells the prefix index of the sequence's full pages, as far as they are what a prompt computes. Nothing without an index. */
void lco_seq_publish(lco_seq *seq);
/* An empty sequence takes over the pages whose tokens are the beginning of ids[n], but leaves at least one to compute. `matched`: their tokens. */
lco_status lco_seq_adopt(lco_seq *seq, const int32_t *ids, int64_t n, int64_t *matched, lco_error *err);
/* Before `n` tokens come: remembers the stretch being filled unless they stay in it, so that truncating to this length again, or to less in this
 * stretch, is exact whatever is appended meanwhile. Pages that a row at this length sees are kept for it, whatever the window.
 * One place is remembered, the last. */
lco_status lco_seq_hold(lco_seq *seq, int64_t n, lco_error *err);
/* Keeps [0, length), returns pages past it. A stretch that was full already and is filled again later comes back to the tail as its codes say.
 * LCO_EINVAL when a page that the next row would see has left the window; a page_size back from its longest it never has. */
lco_status lco_seq_truncate(lco_seq *seq, int64_t length, lco_error *err);

/* After a step: LCO_EIO when a page of the sequence could not be read in it; what was computed is worth nothing then. */
lco_status lco_seq_lost(const lco_seq *seq, lco_error *err);
/* Keys and values of a layer as the next token's attention reads them, float32 [n, kv_heads, head_dim] each. `n` is the length. */
lco_status lco_seq_read(const lco_seq *seq, int32_t layer, int64_t n, float *keys, float *values, lco_error *err);

/* A sequence as a file may hold it. Pointers of lco_seq_get_image() are good until the sequence changes. */
typedef struct {
    int64_t length, exact,
        unseen; /* exact: leading tokens that are what a prompt computes; unseen: leading pages that have left the window */
    int64_t n_pages;
    const int32_t *ids, *table; /* [length], [n_pages] with LCO_NO_PAGE where a page was released */
    const uint8_t *tail;
    size_t tail_bytes; /* 0: none */
} lco_seq_image;
lco_seq_image lco_seq_get_image(const lco_seq *seq);
/* A sequence on pages that lco_kv_page_in() gave (or others hold). LCO_EFORMAT when the image contradicts itself or the cache. */
lco_status lco_seq_from_image(lco_kv *kv, const lco_seq_image *image, lco_seq **out, lco_error *err);
/* A page's bytes, wherever it lies; a page with these bytes, held by the caller until lco_kv_page_drop(). */
lco_status lco_kv_page_out(lco_kv *kv, int32_t page, uint8_t *bytes, lco_error *err);
lco_status lco_kv_page_in(lco_kv *kv, const uint8_t *bytes, int32_t *page, lco_error *err);
/* What lies beside a page that a text begins with, lco_kv_first_bytes(), 0: nothing does. Of pages given in, before a sequence takes them. */
size_t lco_kv_first_bytes(const lco_kv *kv);
lco_status lco_kv_first_out(const lco_kv *kv, int32_t page, uint8_t *bytes, lco_error *err);
lco_status lco_kv_first_in(lco_kv *kv, int32_t page, const uint8_t *bytes, lco_error *err);
lco_status lco_kv_page_drop(lco_kv *kv, int32_t page, lco_error *err);

#endif
