#include <math.h>

#include "../../base/codes.h"
#include "../impl.h"

typedef struct {
    const lco_attention_args *args;
    const lco_item *item;
    double *scratch; /* [threads, stride]: probabilities of all positions, then one sum per dimension */
    int64_t stride;
} attention_job;

/* Where the key or value of a position lies, and what its elements are multiplied by. */
typedef struct {
    const uint8_t *codes;
    lco_dtype dtype;
    double scale;
} stored;

/* As a query at position `reader` finds it. */
static stored find(const attention_job *job, int thread, int64_t reader, int64_t position, int64_t which, int64_t head)
{
    const lco_kv_view *kv = job->args->kv;
    const int64_t slot = position % kv->page_size, own = position - lco_coded_end(kv, reader);
    if (kv->buffered && (own >= 0 || position < kv->n_first)) {
        const uint16_t *rows = own >= 0 ? lco_tail_rows(kv, lco_own_stretch(kv, job->item, position), which, head) + own * kv->head_dim
                                        : lco_first_rows(kv, job->item->table[0], which, head) + position * kv->head_dim;
        return (stored){(const uint8_t *)rows, LCO_BF16, 1};
    }
    const uint8_t *slice = lco_kv_read(kv, thread, job->item->table[position / kv->page_size], -1, head, 1);
    stored s = {lco_read_codes(kv, slice, which, head), kv->dtype, 1};
    s.codes += (size_t)slot * (size_t)kv->head_dim * lco_dtype_bytes(kv->dtype);
    if (lco_dtype_scaled(kv->dtype))
        s.scale = lco_read_scales(kv, slice, which, head)[slot / LCO_KV_BLOCK];
    return s;
}

static double element(const stored *s, int64_t j)
{
    return s->scale * (lco_dtype_scaled(s->dtype) ? lco_decode(s->codes[j], s->dtype) : lco_element(s->codes, j, s->dtype));
}

/* The position read after `t`. */
static int64_t next_seen(const lco_seen *seen, int64_t t) { return t + 1 < seen->sinks || t + 1 > seen->first ? t + 1 : seen->first; }

/* One query row of one head: scores, softmax, weighted sum of the values, as the formula is written. */
static void attend(const attention_job *job, int thread, const float *q, float *out, int64_t position, int64_t kv_head)
{
    const lco_kv_view *kv = job->args->kv;
    double *p = job->scratch + thread * job->stride, *sum = p + job->item->pos + job->item->len;
    const lco_seen seen = lco_seen_at(job->args->window, job->args->sinks, position);
    double largest = -INFINITY, total = 0;
    for (int64_t t = next_seen(&seen, -1); t <= position; t = next_seen(&seen, t)) {
        p[t] = -INFINITY;
        if (!lco_page_chosen(job->args, job->item, kv_head, t / kv->page_size))
            continue;
        const stored key = find(job, thread, position, t, LCO_KEY, kv_head);
        p[t] = 0;
        for (int64_t j = 0; j < kv->head_dim; j++)
            p[t] += q[j] * element(&key, j);
        p[t] *= job->args->scale;
        largest = p[t] > largest ? p[t] : largest;
    }
    for (int64_t j = 0; j < kv->head_dim; j++)
        sum[j] = 0;
    for (int64_t t = next_seen(&seen, -1); t <= position; t = next_seen(&seen, t)) {
        if (!lco_page_chosen(job->args, job->item, kv_head, t / kv->page_size))
            continue;
        const stored value = find(job, thread, position, t, LCO_VALUE, kv_head);
        p[t] = exp(p[t] - largest);
        total += p[t];
        for (int64_t j = 0; j < kv->head_dim; j++)
            sum[j] += p[t] * element(&value, j);
    }
    for (int64_t j = 0; j < kv->head_dim; j++)
        out[j] = (float)(sum[j] / total);
}

static void attention_row_heads(void *ctx, int64_t begin, int64_t end, int thread)
{
    const attention_job *job = ctx;
    const lco_attention_args *a = job->args;
    const int64_t group = a->n_heads / a->kv->n_kv_heads, d = a->kv->head_dim;
    for (int64_t i = begin; i < end; i++) {
        int64_t token = i / a->n_heads, head = i % a->n_heads, row = job->item->row + token;
        attend(job, thread, a->q + row * a->ld_q + head * d, a->out + row * a->ld_out + head * d, job->item->pos + token, head / group);
    }
}

lco_status lco_ref_attention(const lco_attention_args *args)
{
    lco_arena *scratch = args->exec->scratch;
    lco_mark mark = lco_arena_mark(scratch);
    size_t threads = (size_t)lco_pool_size(args->exec->pool);
    for (int64_t n = 0; n < args->n_items; n++) {
        attention_job job = {.args = args, .item = &args->items[n]};
        job.stride = job.item->pos + job.item->len + args->kv->head_dim;
        job.scratch = lco_arena_take(scratch, threads * (size_t)job.stride * sizeof(double));
        if (job.scratch == NULL)
            return LCO_ENOMEM;
        lco_pool_for(args->exec->pool, job.item->len * args->n_heads, 4, attention_row_heads, &job);
        lco_arena_reset(scratch, mark);
    }
    return LCO_OK;
}
