#define _GNU_SOURCE
#include "prefix.h"

#include <assert.h>
#include <string.h>
#include <sys/mman.h>

#include "../base/mem.h"
#include "tier.h"

static int32_t *ids_of(const lco_kv *kv, int64_t page) { return kv->prefix->ids + page * kv->options.page_size; }

static uint64_t mix(uint64_t hash, uint64_t value)
{
    hash = (hash ^ value) * 0x9E3779B97F4A7C15u;
    return hash ^ (hash >> 29);
}

static uint64_t hash_of(uint64_t parent, const int32_t *ids, int32_t n)
{
    uint64_t hash = mix(0x632BE59BD9B4E019u, parent);
    for (int32_t i = 0; i < n; i++)
        hash = mix(hash, (uint64_t)(uint32_t)ids[i]);
    return hash;
}

/* ---- buckets: open addressing, the next place after a taken one ---- */

static int64_t bucket_of(const lco_prefix *p, uint64_t hash) { return (int64_t)(hash & (uint64_t)(p->n_buckets - 1)); }

static int64_t after(const lco_prefix *p, int64_t bucket) { return (bucket + 1) & (p->n_buckets - 1); }

static void put(lco_prefix *p, int32_t page)
{
    int64_t at = bucket_of(p, p->nodes[page].hash);
    while (p->buckets[at] != 0)
        at = after(p, at);
    p->buckets[at] = page + 1;
}

/* Closes the gap: what stands after it and belongs before it moves up. */
static void take_out(lco_prefix *p, int32_t page)
{
    int64_t at = bucket_of(p, p->nodes[page].hash);
    while (p->buckets[at] != page + 1)
        at = after(p, at);
    for (;;) {
        int64_t next = at;
        p->buckets[at] = 0;
        do {
            next = after(p, next);
            if (p->buckets[next] == 0)
                return;
        } while (((next - bucket_of(p, p->nodes[p->buckets[next] - 1].hash)) & (p->n_buckets - 1)) < ((next - at) & (p->n_buckets - 1)));
        p->buckets[at] = p->buckets[next];
        at = next;
    }
}

static bool grow(lco_prefix *p)
{
    if (2 * (p->n_known + 1) <= p->n_buckets)
        return true;
    int32_t *old = p->buckets, *buckets = lco_calloc((size_t)(2 * p->n_buckets), sizeof *buckets);
    if (buckets == NULL)
        return false;
    const int64_t n = p->n_buckets;
    p->buckets = buckets;
    p->n_buckets = 2 * n;
    for (int64_t i = 0; i < n; i++)
        if (old[i] != 0)
            put(p, old[i] - 1);
    lco_free(old);
    return true;
}

/* The known page with these ids after `parent`, or -1. */
static int32_t find(const lco_kv *kv, int32_t parent, const int32_t *ids)
{
    const lco_prefix *p = kv->prefix;
    const int32_t n = kv->options.page_size;
    const uint64_t hash = hash_of(parent >= 0 ? p->nodes[parent].hash : 0, ids, n);
    for (int64_t at = bucket_of(p, hash); p->buckets[at] != 0; at = after(p, at)) {
        const int32_t page = p->buckets[at] - 1;
        if (p->nodes[page].hash == hash && p->nodes[page].parent == parent && memcmp(ids_of(kv, page), ids, (size_t)n * sizeof *ids) == 0)
            return page;
    }
    return -1;
}

/* ---- pages come and go ---- */

static bool all_told(const int32_t *ids, int32_t n)
{
    for (int32_t i = 0; i < n; i++)
        if (ids[i] < 0)
            return false;
    return true;
}

static void learn(lco_kv *kv, int32_t page, int32_t parent, const int32_t *ids)
{
    lco_prefix *p = kv->prefix;
    const int32_t n = kv->options.page_size;
    lco_page_share(kv, page);
    p->nodes[page] = (prefix_node){.hash = hash_of(parent >= 0 ? p->nodes[parent].hash : 0, ids, n), .parent = parent, .known = true};
    memcpy(ids_of(kv, page), ids, (size_t)n * sizeof *ids);
    if (parent >= 0)
        p->nodes[parent].children++;
    put(p, page);
    p->n_known++;
}

static void unlearn(lco_kv *kv, int32_t page)
{
    lco_prefix *p = kv->prefix;
    assert(p->nodes[page].known && p->nodes[page].children == 0);
    take_out(p, page);
    if (p->nodes[page].parent >= 0)
        p->nodes[p->nodes[page].parent].children--;
    p->nodes[page].known = false;
    p->n_known--;
    kv->prefix_idle -= kv->refs[page] == 1;
    lco_page_release(kv, page);
}

void lco_seq_publish(lco_seq *seq)
{
    lco_kv *kv = seq->kv;
    const int32_t n = kv->options.page_size;
    int32_t parent = -1;
    if (kv->prefix == NULL || seq->exact / n <= seq->published)
        return;
    seq->published = seq->exact / n;
    for (int64_t i = 0; (i + 1) * n <= seq->exact && all_told(seq->ids + i * n, n); i++) {
        int32_t page = find(kv, parent, seq->ids + i * n);
        if (page < 0) {
            page = seq->table[i];
            if (page == LCO_NO_PAGE || lco_prefix_knows(kv, page) || !grow(kv->prefix))
                return;
            learn(kv, page, parent, seq->ids + i * n);
        }
        kv->prefix->nodes[page].used = ++kv->prefix->clock;
        parent = page;
    }
}

lco_status lco_seq_adopt(lco_seq *seq, const int32_t *ids, int64_t n, int64_t *matched, lco_error *err)
{
    lco_kv *kv = seq->kv;
    const int32_t size = kv->options.page_size;
    int32_t parent = -1, page;
    int64_t pages = 0;
    *matched = 0;
    if (kv->prefix == NULL || seq->length > 0 || seq->n_pages > 0)
        return LCO_OK;
    while ((pages + 1) * size < n && (page = find(kv, parent, ids + pages * size)) >= 0) {
        parent = page;
        pages++;
    }
    lco_status status = lco_seq_room(seq, pages, pages * size, err);
    if (status != LCO_OK)
        return status;
    for (int64_t i = pages - 1; i >= 0; i--, parent = kv->prefix->nodes[parent].parent) {
        seq->table[i] = parent;
        lco_page_share(kv, parent);
        kv->prefix->nodes[parent].used = kv->prefix->clock + i + 1;
    }
    kv->prefix->clock += pages;
    if (pages > 0)
        memcpy(seq->ids, ids, (size_t)(pages * size) * sizeof *ids);
    seq->n_pages = pages;
    seq->published = pages;
    seq->length = seq->exact = *matched = pages * size;
    kv->tokens_found += *matched;
    lco_seq_release_unseen(seq);
    return LCO_OK;
}

/* ---- pages that nobody else holds ---- */

int64_t lco_prefix_idle(const lco_kv *kv) { return kv->prefix != NULL ? kv->prefix_idle : 0; }

/* The longest unused known page without children; of those that nobody else holds, when there is one. -1: none. */
static int32_t oldest_leaf(const lco_kv *kv)
{
    const lco_prefix *p = kv->prefix;
    int32_t best = -1;
    for (int32_t page = 0; page < kv->n_touched; page++) {
        const prefix_node *node = &p->nodes[page];
        if (!node->known || node->children > 0)
            continue;
        const bool idle = kv->refs[page] == 1, best_idle = best >= 0 && kv->refs[best] == 1;
        if (best < 0 || idle > best_idle || (idle == best_idle && node->used < p->nodes[best].used))
            best = page;
    }
    return best;
}

void lco_prefix_give_one(lco_kv *kv)
{
    for (const int64_t idle = lco_prefix_idle(kv); idle > 0 && lco_prefix_idle(kv) == idle;)
        unlearn(kv, oldest_leaf(kv)); /* one that a sequence holds frees nothing, but perhaps its parent */
}

int32_t lco_prefix_idle_hot(const lco_kv *kv)
{
    int32_t best = -1;
    for (int32_t page = 0; lco_prefix_idle(kv) > 0 && page < kv->n_touched; page++)
        if (lco_prefix_knows(kv, page) && kv->refs[page] == 1 && kv->tier->is_hot[page] &&
            (best < 0 || kv->prefix->nodes[page].used < kv->prefix->nodes[best].used))
            best = page;
    return best;
}

void lco_kv_forget_prefixes(lco_kv *kv)
{
    lco_prefix *p = kv->prefix;
    for (int32_t page = 0; p != NULL && page < kv->n_touched; page++) {
        if (!p->nodes[page].known)
            continue;
        kv->prefix_idle -= kv->refs[page] == 1;
        p->nodes[page] = (prefix_node){0};
        lco_page_release(kv, page);
    }
    if (p != NULL) {
        memset(p->buckets, 0, (size_t)p->n_buckets * sizeof *p->buckets);
        p->n_known = 0;
    }
}

bool lco_prefix_sound(const lco_kv *kv, int64_t *page)
{
    const lco_prefix *p = kv->prefix;
    int64_t known = 0, idle = 0, children = 0, in_buckets = 0;
    for (*page = 0; p != NULL && *page < kv->n_touched; ++*page) {
        const prefix_node *node = &p->nodes[*page];
        if (!node->known)
            continue;
        known++;
        idle += kv->refs[*page] == 1;
        children += node->children;
        in_buckets += node->parent >= 0;
        if (kv->refs[*page] < 1 || (node->parent >= 0 && !p->nodes[node->parent].known) ||
            find(kv, node->parent, ids_of(kv, *page)) != *page)
            return false;
    }
    *page = -1;
    if (p == NULL)
        return true;
    bool sound = known == p->n_known && idle == kv->prefix_idle && children == in_buckets;
    in_buckets = 0;
    for (int64_t i = 0; i < p->n_buckets; i++)
        in_buckets += p->buckets[i] != 0;
    return sound && in_buckets == known;
}

lco_status lco_prefix_create(lco_kv *kv, lco_error *err)
{
    const size_t n = (size_t)kv->n_pages, nodes = n * sizeof(prefix_node), ids = n * (size_t)kv->options.page_size * sizeof(int32_t);
    if (!kv->options.prefix_index)
        return LCO_OK;
    lco_prefix *p = kv->prefix = lco_calloc(1, sizeof *p);
    if (p == NULL)
        return lco_fail(err, LCO_ENOMEM, "out of memory for the prefix index");
    p->n_buckets = 64;
    p->buckets = lco_calloc((size_t)p->n_buckets, sizeof *p->buckets);
    p->nodes = mmap(NULL, nodes + ids, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0);
    if (p->nodes == MAP_FAILED)
        p->nodes = NULL;
    if (p->buckets == NULL || p->nodes == NULL)
        return lco_fail(err, LCO_ENOMEM, "out of memory for the prefix index of %lld pages", (long long)kv->n_pages);
    p->ids = (int32_t *)(void *)(p->nodes + n);
    return LCO_OK;
}

void lco_prefix_destroy(lco_kv *kv)
{
    lco_prefix *p = kv->prefix;
    if (p == NULL)
        return;
    if (p->nodes != NULL)
        munmap(p->nodes, (size_t)kv->n_pages * (sizeof *p->nodes + (size_t)kv->options.page_size * sizeof *p->ids));
    lco_free(p->buckets);
    lco_free(p);
    kv->prefix = NULL;
}
