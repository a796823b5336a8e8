/* Shared by the files of this folder only. */
#ifndef LCO_KV_INTERNAL_H
#define LCO_KV_INTERNAL_H

#include "kv.h"

typedef struct lco_tier lco_tier;     /* tier.h */
typedef struct lco_prefix lco_prefix; /* prefix.h */

struct lco_kv {
    lco_kv_options options;
    lco_kv_view *views;            /* [n_layers] */
    float *fixed_scales;           /* the views' */
    size_t page_bytes, tail_bytes; /* tail: of a sequence, all buffered layers; 0 without a write buffer */
    size_t first_bytes;            /* beside a page that a text begins with, all buffered layers */
    bool scaled;                   /* some layer has one-byte codes */
    int64_t n_pages;
    uint8_t *base;       /* address space for all pages */
    uint8_t *firsts;     /* and for what lies beside them; NULL: nothing does */
    bool *begins;        /* [n_pages] a text begins with it */
    int32_t *refs;       /* [n_pages] table entries that name the page */
    int64_t n_touched;   /* pages from here on were never handed out: free, and without entries in the two lists below */
    int32_t *free_stack; /* [n_pages] of the others the free ones, the next one to hand out last */
    int64_t n_stacked;
    lco_seq *sequences; /* list */
    int64_t tokens_appended, blocks_quantised, pages_copied, pages_released, tokens_found, bytes_written;
    size_t block_bytes, token_bytes; /* that a block of one-byte layers and a token of the others write */
    lco_kv_sight sight;              /* of the layer that sees most */
    uint16_t *bounds;                /* lco_kv_bounds of all pages; NULL: not kept */
    size_t bounds_bytes;             /* of a page */
    float *bounds_row;               /* [3 * head_dim] to work in */
    int64_t pages_read, pages_left_out;
    float largest_mass, step_mass;
    size_t system_page;
    lco_tier *tier;      /* NULL: every page is in memory */
    lco_prefix *prefix;  /* NULL: none */
    int64_t prefix_idle; /* pages that the prefix index alone holds */
};

struct lco_seq {
    lco_kv *kv;
    int32_t *table;
    int64_t n_pages, capacity; /* entries in use, allocated */
    int64_t length;
    int64_t exact;     /* leading tokens whose rows are to the bit what a prompt with these ids computes */
    int64_t published; /* leading pages that the prefix index was told of */
    int32_t *ids;      /* of the tokens held, -1: not told; room for id_capacity */
    int64_t id_capacity;
    uint8_t *tail, *next_tail; /* NULL: none yet */
    uint8_t *held;             /* lco_seq_hold: the tail at held_length; meaningless when that is 0 */
    int64_t held_length;
    int64_t anchor;    /* lco_seq_hold: a length that truncate can come back to, 0: none in particular */
    int64_t unseen;    /* pages before this index have left the window: released, but for those that a row at `anchor` sees */
    int64_t last_used; /* step of the tier */
    lco_seq *previous, *next;
};

/* Tokens of the stretch being filled at a length, which lie in a tail; 0 when nothing does. */
static inline int64_t lco_tail_tokens(const lco_kv *kv, int64_t length) { return kv->tail_bytes > 0 ? length % kv->options.residual : 0; }

/* table.c: room in the table and the ids, and the tails. */
lco_status lco_seq_need_tail(lco_seq *seq, lco_error *err);
lco_status lco_seq_room(lco_seq *seq, int64_t pages, int64_t tokens, lco_error *err);

/* firsts.c */
lco_status lco_firsts_create(lco_kv *kv, lco_error *err); /* nothing when all layers keep none */
void lco_firsts_destroy(lco_kv *kv);
void lco_firsts_release(lco_kv *kv, int32_t page);          /* the page is free: its memory goes back */
void lco_firsts_copy(lco_kv *kv, int32_t to, int32_t from); /* when `from` begins a text, so does `to` */

/* page.c */
int64_t lco_page_free_count(const lco_kv *kv);
lco_status lco_page_take(lco_kv *kv, int32_t *page, lco_error *err); /* count becomes 1 */
void lco_page_share(lco_kv *kv, int32_t page);
void lco_page_release(lco_kv *kv, int32_t page);
void lco_page_unmap(lco_kv *kv, int32_t page); /* gives its memory back to the system */
void lco_kv_unmap(const lco_kv *kv, uint8_t *from, size_t bytes);

/* bounds.c */
lco_status lco_bounds_create(lco_kv *kv, lco_error *err); /* nothing without a page_tolerance */
void lco_bounds_destroy(lco_kv *kv);
void lco_bounds_page(lco_kv *kv, int64_t page); /* a page in memory that is full now */
bool lco_bounds_sound(const lco_kv *kv, const lco_seq *seq, int64_t *bad);

/* window.c */
lco_status lco_sight_check(const lco_kv_options *options, lco_error *err);
void lco_seq_release_unseen(lco_seq *seq);
lco_status lco_seq_keeps(const lco_seq *seq, int64_t length, lco_error *err); /* that no page a row at `length` needs was released */

#endif
