/* The prefix index: pages found again by the ids of their tokens and of all tokens before. For the files of this folder.
 *
 * A page is known once it is full and each of its rows is what a prompt with these ids computes (lco_seq.exact). It is known as the child of the page
 * that stands for the tokens before it. The index holds a reference, so that the page stays when its sequences go; it is given up, longest unused
 * first and children before parents, when no page is free otherwise. */
#ifndef LCO_KV_PREFIX_H
#define LCO_KV_PREFIX_H

#include "internal.h"

typedef struct {
    uint64_t hash;  /* of the ids and of the parent's hash */
    int32_t parent; /* page; -1: the text begins here */
    int32_t children;
    int64_t used; /* when last */
    bool known;
} prefix_node;

struct lco_prefix {
    prefix_node *nodes; /* [n_pages], zeros where a page was never known; memory as pages are */
    int32_t *ids;       /* [n_pages][page_size] */
    int32_t *buckets;   /* [n_buckets], a power of two: page + 1, 0: none; the next place after a taken one */
    int64_t n_buckets, n_known, clock;
};

lco_status lco_prefix_create(lco_kv *kv, lco_error *err); /* kv->prefix; nothing when the options ask for none */
void lco_prefix_destroy(lco_kv *kv);
int64_t lco_prefix_idle(const lco_kv *kv);              /* pages that nobody but the index holds */
void lco_prefix_give_one(lco_kv *kv);                   /* frees one of them */
int32_t lco_prefix_idle_hot(const lco_kv *kv);          /* the longest unused of them that is in memory; -1: none */
bool lco_prefix_sound(const lco_kv *kv, int64_t *page); /* for lco_kv_check */

static inline bool lco_prefix_knows(const lco_kv *kv, int64_t page) { return kv->prefix != NULL && kv->prefix->nodes[page].known; }

#endif
