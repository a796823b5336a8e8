/* How pages are chosen: what all implementations of choose_pages share. A file that includes this defines key_score_bound() and run_norm() before
 * it, the two places where keys are read.
 *
 * For a query head, e^bound * page_size is the most that the weights of a page sum to before they are divided by the sum over all positions.
 * That sum is at least what is known of it: the scores of the pages always read (the first, the newest two) and of the PIVOTS of highest
 * bound. Pages are taken, highest bound first, until the rest is within the tolerance. A page that one head of a group takes, all take. */
#ifndef LCO_OPS_CHOICE_H
#define LCO_OPS_CHOICE_H

#include <math.h>
#include <string.h>

enum { PIVOTS = 2, FEWEST = 4 }; /* fewer pages than FEWEST to choose from: all are read */

/* sum * e^top */
typedef struct {
    double top, sum;
} norm;

/* Keys of some positions. */
typedef struct {
    const uint8_t *keys; /* codes of the first position */
    int64_t n;
    const float *scales; /* of LCO_KV_BLOCK positions each, or NULL */
    int64_t skip;        /* positions of the first scale before the first position */
    lco_dtype dtype;
} key_run;

/* At least every score of a page whose bounds these are: [2][d] bfloat16, the least and the largest of each channel. */
static double key_score_bound(const lco_choose_pages_args *a, const float *q, const uint16_t *bounds);
/* At most the sum of e^score over the run. */
static norm run_norm(const lco_choose_pages_args *a, const float *q, const key_run *run);

typedef struct {
    const lco_choose_pages_args *args;
    uint8_t *scratch; /* [threads, stride] */
    size_t stride;
    int64_t most; /* pages to choose from, at most */
} choice_job;

/* A kv head of an item. */
typedef struct {
    const lco_choose_pages_args *args;
    const lco_item *item;
    int64_t head, group, n; /* pages to choose from */
    lco_seen seen;
    int thread;
    uint64_t *chosen; /* of the args */
    double *weights;  /* [group][n] of the pages: page_size * e^(bound - the head's top) */
    double *sums;     /* [group] what is known of the sum over all positions, in the same unit */
    double *bounds;   /* [n] of the query head at hand */
    int64_t *pages;   /* [n] table indexes */
    int64_t *heap;    /* [n] indexes into these, those of the query head that are not taken yet */
    bool *taken;      /* [n] by some query head */
} choice;

static norm add_norms(norm a, norm b)
{
    if (!(a.top < b.top))
        return b.sum > 0 ? (norm){a.top, a.sum + b.sum * exp(b.top - a.top)} : a;
    return (norm){b.top, b.sum + (a.sum > 0 ? a.sum * exp(a.top - b.top) : 0)};
}

static const float *query(const choice *c, int64_t g)
{
    const lco_choose_pages_args *a = c->args;
    return a->q + c->item->row * a->ld_q + (c->head * c->group + g) * a->kv->head_dim;
}

/* Of n positions in 16 bit. */
static norm rows_norm(const choice *c, const float *q, const uint16_t *rows, int64_t n)
{
    const key_run run = {.keys = (const uint8_t *)rows, .n = n, .dtype = LCO_BF16};
    return run_norm(c->args, q, &run);
}

/* Of positions [begin, end) of one page, read as codes but for the first few of the text. */
static norm page_norm(const choice *c, const float *q, int64_t begin, int64_t end)
{
    const lco_kv_view *kv = c->args->kv;
    if (begin >= end)
        return (norm){-INFINITY, 0};
    if (kv->buffered && begin < kv->n_first) {
        const int64_t stop = end < kv->n_first ? end : kv->n_first;
        const uint16_t *rows = lco_first_rows(kv, c->item->table[0], LCO_KEY, c->head) + begin * kv->head_dim;
        return add_norms(rows_norm(c, q, rows, stop - begin), page_norm(c, q, stop, end));
    }
    const int64_t slot = begin % kv->page_size;
    const uint8_t *slice = lco_kv_read(kv, c->thread, c->item->table[begin / kv->page_size], -1, c->head, 1);
    key_run run = {.keys = lco_read_codes(kv, slice, LCO_KEY, c->head), .n = end - begin, .dtype = kv->dtype, .skip = slot % LCO_KV_BLOCK};
    run.keys += (size_t)(slot * kv->head_dim) * lco_dtype_bytes(kv->dtype);
    if (lco_dtype_scaled(kv->dtype))
        run.scales = lco_read_scales(kv, slice, LCO_KEY, c->head) + slot / LCO_KV_BLOCK;
    return run_norm(c->args, q, &run);
}

/* Of the newest two pages and of the first, as far as the window shows them. */
static norm always_read_norm(const choice *c, const float *q)
{
    const lco_kv_view *kv = c->args->kv;
    const int64_t size = kv->page_size, pos = c->item->pos, last = pos / size * size;
    const int64_t coded = lco_coded_end(kv, pos), first = c->seen.first;
    const int64_t from = first > last - size ? first : last - size;
    norm z = add_norms(page_norm(c, q, from, last), page_norm(c, q, first > last ? first : last, coded));
    if (kv->buffered) {
        const int64_t begin = first > coded ? first : coded;
        const uint16_t *rows = lco_tail_rows(kv, lco_own_stretch(kv, c->item, pos), LCO_KEY, c->head) + (begin - coded) * kv->head_dim;
        z = add_norms(z, rows_norm(c, q, rows, pos + 1 - begin));
    }
    const int64_t begin = c->seen.sinks > 0 ? 0 : first, end = c->seen.sinks > 0 ? c->seen.sinks : size;
    return begin == 0 ? add_norms(z, page_norm(c, q, 0, end < size ? end : size)) : z;
}

/* Whole pages in sight, but for the first and the newest two. */
static void list_pages(choice *c)
{
    const int64_t size = c->args->kv->page_size, end = c->item->pos / size - 1;
    const int64_t first = (c->seen.first + size - 1) / size;
    for (int64_t p = 1; p < end && (p + 1) * size <= c->seen.sinks; p++)
        c->pages[c->n++] = p;
    for (int64_t p = first > 1 ? first : 1; p < end; p++)
        c->pages[c->n++] = p;
}

static bool above(const choice *c, int64_t i, int64_t j)
{
    return c->bounds[i] > c->bounds[j] || (c->bounds[i] == c->bounds[j] && c->pages[i] < c->pages[j]);
}

static void sift(const choice *c, int64_t at, int64_t n)
{
    for (int64_t child; (child = 2 * at + 1) < n; at = child) {
        child += child + 1 < n && above(c, c->heap[child + 1], c->heap[child]);
        if (!above(c, c->heap[child], c->heap[at]))
            return;
        const int64_t moved = c->heap[at];
        c->heap[at] = c->heap[child];
        c->heap[child] = moved;
    }
}

static bool within(double rest, double sum, double tolerance) { return rest == 0 || rest / (sum + rest) <= tolerance; } /* false for NaN */

/* Takes the pages that query head g needs. Returns what is known of its sum, in units of its weights. */
static double take_pages(const choice *c, int64_t g)
{
    const lco_choose_pages_args *a = c->args;
    const float *q = query(c, g);
    const int64_t size = a->kv->page_size;
    norm known = always_read_norm(c, q);
    double top = known.top, rest = 0, *weights = c->weights + g * c->n;
    for (int64_t i = 0; i < c->n; i++) {
        const double bound = key_score_bound(a, q, lco_kv_bounds(a->kv, c->item->table[c->pages[i]], c->head));
        c->bounds[i] = bound < INFINITY ? bound : INFINITY; /* NaN: must be read */
        c->heap[i] = i;
        top = c->bounds[i] > top && c->bounds[i] < INFINITY ? c->bounds[i] : top;
    }
    for (int64_t i = 0; i < c->n; i++) {
        weights[i] = c->bounds[i] < INFINITY ? (double)size * exp(c->bounds[i] - top) : 0;
        rest += weights[i];
    }
    for (int64_t i = c->n / 2 - 1; i >= 0; i--)
        sift(c, i, c->n);
    double sum = known.sum * exp(known.top - top);
    for (int64_t left = c->n, pivots = 0; left > 0; left--) {
        const int64_t i = c->heap[0];
        if (c->bounds[i] < INFINITY && within(rest, sum, a->tolerance))
            break;
        c->heap[0] = c->heap[left - 1];
        sift(c, 0, left - 1);
        c->taken[i] = true;
        rest = rest > weights[i] ? rest - weights[i] : 0;
        if (pivots++ < PIVOTS) {
            known = add_norms(known, page_norm(c, q, c->pages[i] * size, (c->pages[i] + 1) * size));
            sum = known.sum * exp(known.top - top);
        }
    }
    return sum;
}

static void choose(choice *c, lco_choice *result)
{
    const lco_choose_pages_args *a = c->args;
    const int64_t size = a->kv->page_size, last = c->item->pos / size;
    const int64_t sinks = (c->seen.sinks + size - 1) / size, first = c->seen.first / size;
    double mass = 0;
    int64_t left = 0;
    memset(c->chosen, 0xFF, (size_t)a->chosen_words * sizeof *c->chosen);
    *result = (lco_choice){.read = sinks > first ? last + 1 : sinks + last + 1 - first};
    list_pages(c);
    if (c->n < FEWEST)
        return;
    memset(c->taken, 0, (size_t)c->n * sizeof *c->taken);
    for (int64_t g = 0; g < c->group; g++)
        c->sums[g] = take_pages(c, g);
    for (int64_t i = 0; i < c->n; i++)
        left += !c->taken[i];
    for (int64_t g = 0; g < c->group; g++) {
        double rest = 0;
        for (int64_t i = 0; i < c->n; i++)
            rest += c->taken[i] ? 0 : c->weights[g * c->n + i];
        if (!within(rest, c->sums[g], a->tolerance)) /* by rounding only */
            return;
        mass = rest > 0 && rest / (c->sums[g] + rest) > mass ? rest / (c->sums[g] + rest) : mass;
    }
    if (left * 8 < c->n) /* nearly all are read: then all */
        return;
    for (int64_t i = 0; i < c->n; i++)
        if (!c->taken[i])
            c->chosen[c->pages[i] / 64] &= ~((uint64_t)1 << (c->pages[i] % 64));
    result->read -= left;
    result->left_out = left;
    result->mass = (float)(mass * 1.000001);
}

/* Of a thread, for n pages and a group: the arrays of `choice`, in order. */
static size_t choice_bytes(int64_t n, int64_t group)
{
    return (size_t)n * ((size_t)(group + 1) * sizeof(double) + 2 * sizeof(int64_t) + sizeof(bool)) + (size_t)group * sizeof(double);
}

static void choose_units(void *ctx, int64_t begin, int64_t end, int thread)
{
    const choice_job *job = ctx;
    const lco_choose_pages_args *a = job->args;
    const int64_t n_kv = a->kv->n_kv_heads;
    for (int64_t i = begin; i < end; i++) {
        choice c = {.args = a, .item = &a->items[i / n_kv], .head = i % n_kv, .group = a->n_heads / n_kv, .thread = thread};
        a->choices[i] = (lco_choice){0};
        if (c.item->prompt)
            continue;
        c.seen = lco_seen_at(a->window, a->sinks, c.item->pos);
        c.chosen = a->chosen + i * a->chosen_words;
        c.weights = (double *)(void *)(job->scratch + (size_t)thread * job->stride);
        c.sums = c.weights + c.group * job->most;
        c.bounds = c.sums + c.group;
        c.pages = (int64_t *)(void *)(c.bounds + job->most);
        c.heap = c.pages + job->most;
        c.taken = (bool *)(c.heap + job->most);
        choose(&c, &a->choices[i]);
    }
}

static lco_status choose_pages(const lco_choose_pages_args *a)
{
    choice_job job = {.args = a};
    for (int64_t i = 0; i < a->n_items; i++) {
        const int64_t pages = a->items[i].pos / a->kv->page_size + 1;
        job.most = !a->items[i].prompt && pages > job.most ? pages : job.most;
    }
    const lco_mark mark = lco_arena_mark(a->exec->scratch);
    job.stride = (choice_bytes(job.most, a->n_heads / a->kv->n_kv_heads) + 63) & ~(size_t)63;
    job.scratch = lco_arena_take(a->exec->scratch, (size_t)lco_pool_size(a->exec->pool) * job.stride);
    if (job.scratch != NULL)
        lco_pool_for(a->exec->pool, a->n_items * a->kv->n_kv_heads, 1, choose_units, &job);
    lco_arena_reset(a->exec->scratch, mark);
    return job.scratch != NULL ? LCO_OK : LCO_ENOMEM;
}

#endif
