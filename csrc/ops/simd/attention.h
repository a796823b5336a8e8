/* Attention over vec.h: the work split. The arithmetic is in attention_decode.h and attention_prompt.h.
 *
 * A unit of work is
 *   prompt item: a few query tokens of one kv head with all positions they see; written to out at once;
 *   decode item: a split (a run of pages) for a range of kv heads; leaves (largest score, sum, weighted values) per query head.
 * Splits depend on the item's positions alone, and a second pass merges them in order. So a row's result depends neither on the number
 * of threads nor on the rest of the batch. Head ranges and token blocks only share loads; no result depends on them. */
#include <math.h>

#include "../../base/convert.h"
#include "../impl.h"
#include "vec.h"

#define INLINE static inline __attribute__((always_inline))
#define BLOCK 64 /* positions whose scores are held at once */
#define MAX_SPLITS 16
#define MIN_SPLIT 512 /* positions */

enum {
    UNITS_PER_THREAD = 8,
    PROMPT_ROWS = 96,        /* query rows of a unit: they share the converted keys and values */
    AWAY_ROWS = 1024,        /* at most, where pages are away: each unit reads them from the file */
    SERIAL_PRODUCTS = 50000, /* done by one thread sooner than another wakes up */
};

typedef struct {
    const lco_item *item;
    int64_t first, count; /* prompt: tokens of the item; decode: pages among those that it reads (split_plan) */
    int64_t head, heads;  /* kv heads */
    float *part;          /* decode: where the split's partial results go */
} unit;

/* Partial results of one split: weighted values [n_heads, d_pad], then the largest scores and the sums, [n_heads] each. */
typedef struct {
    const lco_item *item;
    float *parts;
    int64_t n_splits;
} merge_item;

typedef struct {
    const lco_attention_args *args;
    unit *units;
    merge_item *merges;
    int64_t n_units, n_merges, group, d_pad, part_stride;
    int64_t prompt_tokens;         /* of a prompt unit */
    bool lifted;                   /* decode rows take float codes by shifts (attention_decode.h) */
    float *scratch;                /* [threads, scratch_stride] */
    int64_t scratch_stride, pairs; /* of a query row and a position, at most */
} attention_job;

static float *scratch_of(const attention_job *job, int thread) { return job->scratch + thread * job->scratch_stride; }

/* e^a for one number, the same bits as in a vector. */
INLINE float exp_one(float a)
{
    float e[VL];
    v_store(e, v_exp(v_set(a)));
    return e[0];
}

static int64_t round_up(int64_t a, int64_t to) { return (a + to - 1) / to * to; }

static lco_seen seen_at(const lco_attention_args *a, int64_t position) { return lco_seen_at(a->window, a->sinks, position); }

/* Pages that a decode item reads: table entries [0, sinks), then from `first` on, `count` in all; and how these are split. */
typedef struct {
    int64_t sinks, first, count, per_split, n_splits;
} split_plan;

static split_plan plan_splits(const lco_attention_args *a, const lco_item *item)
{
    const int64_t page_size = a->kv->page_size;
    const lco_seen seen = seen_at(a, item->pos);
    split_plan plan = {.sinks = (seen.sinks + page_size - 1) / page_size, .first = seen.first / page_size};
    if (plan.sinks > plan.first) /* they share a page */
        plan.sinks = plan.first = 0;
    plan.count = plan.sinks + item->pos / page_size + 1 - plan.first;
    int64_t least = (MIN_SPLIT + page_size - 1) / page_size, even = (plan.count + MAX_SPLITS - 1) / MAX_SPLITS;
    plan.per_split = even > least ? even : least;
    plan.n_splits = (plan.count + plan.per_split - 1) / plan.per_split;
    return plan;
}

/* Table index of the n-th page. */
static int64_t page_at(const split_plan *plan, int64_t n) { return n < plan->sinks ? n : plan->first + n - plan->sinks; }

#include "attention_decode.h"

static bool reads_away_pages(const lco_attention_args *a, const lco_item *item)
{
    const int64_t size = a->kv->page_size, end = (item->pos + item->len - 1) / size + 1;
    const lco_seen seen = seen_at(a, item->pos);
    for (int64_t p = 0; p < end && a->kv->store != NULL; p++)
        if ((p * size < seen.sinks || (p + 1) * size > seen.first) && lco_kv_away(a->kv, item->table[p]))
            return true;
    return false;
}

/* Tokens of a prompt unit. No result depends on it. */
static int64_t prompt_tokens(const attention_job *job)
{
    const lco_attention_args *a = job->args;
    int64_t all = 0;
    bool away = false;
    for (int64_t i = 0; i < a->n_items; i++) {
        all += a->items[i].prompt ? a->items[i].len * a->n_heads : 0;
        away = away || (a->items[i].prompt && reads_away_pages(a, &a->items[i]));
    }
    const int64_t share = away ? all / lco_pool_size(a->exec->pool) : 0, most = share < AWAY_ROWS ? share : AWAY_ROWS;
    const int64_t rows = most > PROMPT_ROWS ? most : PROMPT_ROWS;
    return rows > job->group ? rows / job->group : 1;
}

/* The work of a prompt unit, and how many floats of scratch a thread needs for it. A file that defines OWN_PROMPT_UNIT has its own. */
static int64_t prompt_scratch(const attention_job *job);
static void prompt_unit(const attention_job *job, const unit *u, int thread);
#ifndef OWN_PROMPT_UNIT
#include "attention_prompt.h"
#endif

static void run_units(void *ctx, int64_t begin, int64_t end, int thread)
{
    const attention_job *job = ctx;
    for (int64_t i = begin; i < end; i++) {
        if (job->units[i].item->prompt)
            prompt_unit(job, &job->units[i], thread);
        else
            decode_unit(job, &job->units[i], thread);
    }
}

/* Sums the splits of (item, query head) pairs in order. */
static void merge_heads(void *ctx, int64_t begin, int64_t end, int thread)
{
    (void)thread;
    const attention_job *job = ctx;
    const lco_attention_args *a = job->args;
    const int64_t d = a->kv->head_dim, n_heads = a->n_heads;
    for (int64_t i = begin; i < end; i++) {
        const merge_item *merge = &job->merges[i / n_heads];
        const int64_t head = i % n_heads, largest_at = n_heads * job->d_pad + head;
        float weight[MAX_SPLITS], largest = -INFINITY, total = 0;
        for (int64_t s = 0; s < merge->n_splits; s++) {
            float m = merge->parts[s * job->part_stride + largest_at];
            largest = m > largest ? m : largest;
        }
        for (int64_t s = 0; s < merge->n_splits; s++) {
            const float *part = merge->parts + s * job->part_stride;
            weight[s] = exp_one(part[largest_at] - largest);
            total += weight[s] * part[largest_at + n_heads];
        }
        float *out = a->out + merge->item->row * a->ld_out + head * d;
        for (int64_t j = 0; j < d; j += VL) {
            vf sum = v_zero();
            for (int64_t s = 0; s < merge->n_splits; s++)
                sum = v_fma(v_set(weight[s]), v_load(merge->parts + s * job->part_stride + head * job->d_pad + j), sum);
            v_store_part(out + j, v_div(sum, v_set(total)), d - j);
        }
    }
}

/* Ranges of kv heads that each split is cut into: enough for all threads. */
static int64_t head_ranges(const attention_job *job, int64_t n_splits)
{
    const int64_t n_kv = job->args->kv->n_kv_heads;
    if (job->args->chosen != NULL) /* every kv head has pages of its own */
        return n_kv;
    int64_t wanted = (lco_pool_size(job->args->exec->pool) * UNITS_PER_THREAD + n_splits - 1) / n_splits;
    return wanted < n_kv ? wanted : n_kv;
}

static void add_prompt_units(attention_job *job, const lco_item *item)
{
    const int64_t step = job->prompt_tokens;
    for (int64_t first = (item->len - 1) / step * step; first >= 0; first -= step) { /* the longest first */
        int64_t count = item->len - first < step ? item->len - first : step;
        for (int64_t head = 0; head < job->args->kv->n_kv_heads; head++)
            job->units[job->n_units++] = (unit){.item = item, .first = first, .count = count, .head = head, .heads = 1};
    }
}

static void add_decode_units(attention_job *job, const merge_item *merge, int64_t ranges)
{
    const split_plan plan = plan_splits(job->args, merge->item);
    const int64_t n_kv = job->args->kv->n_kv_heads;
    for (int64_t s = 0; s < plan.n_splits; s++) {
        unit u = {.item = merge->item, .first = s * plan.per_split, .part = merge->parts + s * job->part_stride};
        u.count = plan.count - u.first < plan.per_split ? plan.count - u.first : plan.per_split;
        for (int64_t r = 0; r < ranges; r++) {
            u.head = n_kv * r / ranges;
            u.heads = n_kv * (r + 1) / ranges - u.head;
            job->units[job->n_units++] = u;
        }
    }
}

/* Counts units and splits, takes scratch for them and lists them. */
static lco_status plan_units(attention_job *job)
{
    const lco_attention_args *a = job->args;
    const int64_t n_kv = a->kv->n_kv_heads;
    int64_t prompt_units = 0, splits = 0, decode_items = 0;
    job->prompt_tokens = prompt_tokens(job);
    for (int64_t i = 0; i < a->n_items; i++) {
        job->pairs += a->items[i].len * (a->items[i].pos + a->items[i].len - seen_at(a, a->items[i].pos).first);
        if (a->items[i].prompt) {
            prompt_units += (a->items[i].len + job->prompt_tokens - 1) / job->prompt_tokens * n_kv;
        } else {
            splits += plan_splits(a, &a->items[i]).n_splits;
            decode_items++;
        }
    }
    int64_t ranges = splits > 0 ? head_ranges(job, splits) : 0;
    int64_t prompt_floats = prompt_units > 0 ? prompt_scratch(job) : 0, decode_floats = splits > 0 ? decode_scratch(job) : 0;
    job->part_stride = round_up(a->n_heads * (job->d_pad + 2), 16);
    job->scratch_stride = round_up(prompt_floats > decode_floats ? prompt_floats : decode_floats, 16);
    lco_arena *arena = a->exec->scratch;
    size_t threads = (size_t)lco_pool_size(a->exec->pool);
    job->units = lco_arena_take(arena, (size_t)(prompt_units + splits * ranges) * sizeof *job->units);
    job->merges = lco_arena_take(arena, (size_t)decode_items * sizeof *job->merges);
    float *parts = lco_arena_take(arena, (size_t)(splits * job->part_stride) * sizeof *parts);
    job->scratch = lco_arena_take(arena, threads * (size_t)job->scratch_stride * sizeof *job->scratch);
    if (job->units == NULL || job->merges == NULL || parts == NULL || job->scratch == NULL)
        return LCO_ENOMEM;
    for (int64_t i = 0; i < a->n_items; i++) {
        const lco_item *item = &a->items[i];
        if (item->prompt) {
            add_prompt_units(job, item);
            continue;
        }
        merge_item *merge = &job->merges[job->n_merges++];
        *merge = (merge_item){.item = item, .parts = parts, .n_splits = plan_splits(a, item).n_splits};
        parts += merge->n_splits * job->part_stride;
        add_decode_units(job, merge, ranges);
    }
    return LCO_OK;
}

/* `shifts`: this processor multiplies subnormal floats as fast as others. */
static lco_status attention(const lco_attention_args *args, bool shifts)
{
    lco_mark mark = lco_arena_mark(args->exec->scratch);
    attention_job job = {.args = args, .group = args->n_heads / args->kv->n_kv_heads, .d_pad = round_up(args->kv->head_dim, VL)};
    job.lifted = shifts && (args->kv->dtype == LCO_F8_E4M3 || args->kv->dtype == LCO_F8_E5M2);
    lco_status status = plan_units(&job);
    if (status == LCO_OK) {
        const bool serial = job.pairs * args->n_heads * args->kv->head_dim < SERIAL_PRODUCTS;
        lco_pool_for(args->exec->pool, job.n_units, serial ? job.n_units : 1, run_units, &job);
        lco_pool_for(args->exec->pool, job.n_merges * args->n_heads, 16, merge_heads, &job);
    }
    lco_arena_reset(args->exec->scratch, mark);
    return status;
}
