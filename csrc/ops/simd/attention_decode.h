/* One query token: for each page, for each kv head of the range, BLOCK positions at a time: scores, softmax so far, weighted values.
 * Pages outside, heads inside: the keys of all heads are one run of memory. Codes become floats in registers, once for up to
 * HEADS_AT_ONCE query heads. */

enum { MAX_HEADS = 4, HEADS_AT_ONCE = VL == 16 ? MAX_HEADS : 2 }; /* with four positions: as many sums as there are registers for */

typedef struct {
    const uint8_t *keys, *values;           /* codes of the first position */
    int64_t n, d, d_pad;                    /* positions, 1..BLOCK; head size */
    const float *key_scales, *value_scales; /* of 16 positions each, or NULL */
    int64_t skip;                           /* positions of the first scale that lie before the first position */
    const float *q;                         /* [heads, d_pad], scaled, zero beyond d */
    float *sums;                            /* [heads, d_pad] */
    float *largest, *total;                 /* [heads] */
    const uint8_t *next_keys,
        *next_values; /* read after these: prefetched, by every few heads again, which spreads the requests; NULL: not */
} decode_block;

INLINE void prefetch(const uint8_t *p, size_t bytes)
{
    for (size_t i = 0; i < bytes; i += 64)
        _mm_prefetch((const char *)p + i, _MM_HINT_T1);
}

/* scores[g][t] = q[g] . key[t] for heads g and four positions at a time. Heads of a group share each load, four rows side by side, and what
 * is read next is asked for by software (`ahead`); a head alone reads row after row, which the hardware prefetches better by itself. */
INLINE void block_scores(const decode_block *b, lco_dtype dtype, int heads, bool ahead, float scores[MAX_HEADS][BLOCK])
{
    const size_t row = (size_t)b->d * lco_dtype_bytes(dtype);
    const int64_t whole = b->d / VL * VL;
    for (int64_t t = 0; t < b->n; t += 4) {
        const uint8_t *key[4];
        for (int64_t j = 0; j < 4; j++) /* past the end: the last one again */
            key[j] = b->keys + (size_t)(t + j < b->n ? t + j : b->n - 1) * row;
        vf acc[MAX_HEADS][4];
        for (int g = 0; g < heads; g++)
            for (int j = 0; j < 4; j++)
                acc[g][j] = v_zero();
        if (!ahead) {
            for (int j = 0; j < 4; j++)
                for (int64_t i = 0; i < whole; i += VL)
                    acc[0][j] = v_fma(v_load(b->q + i), v_load_as(key[j], i, dtype), acc[0][j]);
        } else {
            prefetch(b->next_keys + (size_t)t * row, 4 * row);
            for (int64_t i = 0; i < whole; i += VL) {
                vf k[4];
                for (int j = 0; j < 4; j++)
                    k[j] = v_load_as(key[j], i, dtype);
                for (int g = 0; g < heads; g++) {
                    vf q = v_load(b->q + g * b->d_pad + i);
                    for (int j = 0; j < 4; j++)
                        acc[g][j] = v_fma(q, k[j], acc[g][j]);
                }
            }
        }
        if (whole < b->d) {
            for (int j = 0; j < 4; j++) {
                vf k = v_load_as_n(key[j], whole, b->d - whole, dtype);
                for (int g = 0; g < heads; g++)
                    acc[g][j] = v_fma(v_load(b->q + g * b->d_pad + whole), k, acc[g][j]);
            }
        }
        for (int g = 0; g < heads; g++)
            _mm_storeu_ps(scores[g] + t, v_sum4(acc[g][0], acc[g][1], acc[g][2], acc[g][3]));
    }
}

/* scores[first, first + n) become probabilities relative to the new largest score; returns the factor for everything summed before. */
INLINE float block_softmax(float *scores, int64_t n, float *largest, float *total)
{
    vf top = v_set(-INFINITY);
    for (int64_t t = n; t < round_up(n, VL); t++)
        scores[t] = -INFINITY;
    for (int64_t t = 0; t < n; t += VL)
        top = v_max(top, v_load(scores + t));
    float now = v_largest(top);
    if (!(now > *largest))
        now = *largest;
    vf sum = v_zero();
    for (int64_t t = 0; t < n; t += VL) {
        vf p = v_exp(v_sub(v_load(scores + t), v_set(now)));
        v_store(scores + t, p);
        sum = v_add(sum, p);
    }
    float factor = now == *largest ? 1.0f : exp_one(*largest - now);
    *total = *total * factor + v_sum(sum);
    *largest = now;
    return factor;
}

/* sums[g][i, i + vectors * VL) = factor[g] * sums + sum over t in [begin, end) of p[g][t] * value[t]; `tail`: elements of a last short vector. */
INLINE void weigh_columns(const decode_block *b, lco_dtype dtype, int heads, int vectors, int64_t i, int64_t tail, int64_t begin,
                          int64_t end, const float *factor, float p[MAX_HEADS][BLOCK], bool ahead)
{
    const size_t row = (size_t)b->d * lco_dtype_bytes(dtype);
    vf acc[MAX_HEADS][8];
    for (int g = 0; g < heads; g++)
        for (int c = 0; c < vectors; c++)
            acc[g][c] = v_mul(v_set(factor[g]), v_load(b->sums + g * b->d_pad + i + c * VL));
    for (int64_t t = begin; t < end; t++) {
        const uint8_t *value = b->values + (size_t)t * row;
        if (ahead)
            prefetch(b->next_values + (size_t)t * row, row);
        for (int c = 0; c < vectors; c++) {
            vf v = tail == VL ? v_load_as(value, i + c * VL, dtype) : v_load_as_n(value, i + c * VL, tail, dtype);
            for (int g = 0; g < heads; g++)
                acc[g][c] = v_fma(v_set(p[g][t]), v, acc[g][c]);
        }
    }
    for (int g = 0; g < heads; g++)
        for (int c = 0; c < vectors; c++)
            v_store(b->sums + g * b->d_pad + i + c * VL, acc[g][c]);
}

/* Values of positions [begin, end), as many columns at a time as there are registers for. */
INLINE void weigh_values(const decode_block *b, lco_dtype dtype, int heads, int64_t begin, int64_t end, const float *factor,
                         float p[MAX_HEADS][BLOCK], bool ahead)
{
    const int wide = heads == 1 ? 8 : heads == 2 ? VL / 2 : 4; /* vectors */
    int64_t i = 0;
    for (; i + wide * VL <= b->d; i += wide * VL)
        weigh_columns(b, dtype, heads, wide, i, VL, begin, end, factor, p, ahead && i == 0);
    for (; i + wide / 2 * VL <= b->d; i += wide / 2 * VL)
        weigh_columns(b, dtype, heads, wide / 2, i, VL, begin, end, factor, p, ahead && i == 0);
    for (; i + VL <= b->d; i += VL)
        weigh_columns(b, dtype, heads, 1, i, VL, begin, end, factor, p, ahead && i == 0);
    if (i < b->d)
        weigh_columns(b, dtype, heads, 1, i, b->d - i, begin, end, factor, p, ahead && i == 0);
}

/* Each run of positions times its scale. */
INLINE void scale_positions(float *x, int64_t n, const float *scales, int64_t skip, float unit)
{
    for (int64_t t = 0, stop; t < n; t = stop) {
        const int64_t block = (skip + t) / LCO_KV_BLOCK;
        stop = (block + 1) * LCO_KV_BLOCK - skip < n ? (block + 1) * LCO_KV_BLOCK - skip : n;
        const vf scale = v_set(scales[block] * unit);
        for (int64_t i = t; i < stop; i += VL)
            v_store_part(x + i, v_mul(scale, v_load_part(x + i, stop - i)), stop - i);
    }
}

INLINE void attend_block(const decode_block *b, lco_dtype dtype, int heads, bool ahead)
{
    enum { STRAIGHT = 8 }; /* positions: columns taken in turns jump within so many rows only, which the hardware still follows */
    float scores[MAX_HEADS][BLOCK], factor[MAX_HEADS];
    block_scores(b, dtype, heads, ahead, scores);
    for (int g = 0; g < heads; g++) {
        if (lco_dtype_scaled(dtype))
            scale_positions(scores[g], b->n, b->key_scales, b->skip, v_code_unit(dtype));
        factor[g] = block_softmax(scores[g], b->n, &b->largest[g], &b->total[g]);
        if (lco_dtype_scaled(dtype))
            scale_positions(scores[g], b->n, b->value_scales, b->skip, v_code_unit(dtype));
    }
    if (ahead) {
        weigh_values(b, dtype, heads, 0, b->n, factor, scores, true);
        return;
    }
    for (int64_t t = 0; t < b->n; t += STRAIGHT) {
        weigh_values(b, dtype, heads, t, t + STRAIGHT < b->n ? t + STRAIGHT : b->n, factor, scores, false);
        factor[0] = 1;
    }
}

#define ATTEND(name, dtype)                                                                                                                \
    static void name(const decode_block *b, int64_t heads)                                                                                 \
    {                                                                                                                                      \
        if (b->next_keys == NULL)                                                                                                          \
            attend_block(b, dtype, 1, false);                                                                                              \
        else if (heads == 1)                                                                                                               \
            attend_block(b, dtype, 1, true);                                                                                               \
        else if (heads == 2)                                                                                                               \
            attend_block(b, dtype, 2, true);                                                                                               \
        else if (HEADS_AT_ONCE > 2 && heads == 3)                                                                                          \
            attend_block(b, dtype, 3, true);                                                                                               \
        else                                                                                                                               \
            attend_block(b, dtype, HEADS_AT_ONCE, true);                                                                                   \
    }
ATTEND(attend_f32, LCO_F32)
ATTEND(attend_f16, LCO_F16)
ATTEND(attend_bf16, LCO_BF16)
ATTEND(attend_e4m3, LCO_F8_E4M3)
ATTEND(attend_e5m2, LCO_F8_E5M2)
ATTEND(attend_i8, LCO_I8)

static void attend(const decode_block *b, lco_dtype dtype, int64_t heads)
{
    if (dtype == LCO_F8_E4M3)
        attend_e4m3(b, heads);
    else if (dtype == LCO_F8_E5M2)
        attend_e5m2(b, heads);
    else if (dtype == LCO_I8)
        attend_i8(b, heads);
    else if (dtype == LCO_BF16)
        attend_bf16(b, heads);
    else if (dtype == LCO_F16)
        attend_f16(b, heads);
    else
        attend_f32(b, heads);
}

/* Floats of scratch for a thread: the scaled queries. */
static int64_t decode_scratch(const attention_job *job) { return job->args->n_heads * job->d_pad; }

/* All query heads of one kv head of the unit (the h-th) against a block. */
static void attend_heads(const attention_job *job, const unit *u, const float *scaled, int64_t h, decode_block *b, lco_dtype dtype)
{
    const int64_t group = job->group, first_head = (u->head + h) * group;
    float *sums = u->part + first_head * job->d_pad, *largest = u->part + job->args->n_heads * job->d_pad + first_head;
    for (int64_t g = 0; g < group; g += HEADS_AT_ONCE) {
        b->q = scaled + (h * group + g) * job->d_pad;
        b->sums = sums + g * job->d_pad;
        b->largest = largest + g;
        b->total = largest + job->args->n_heads + g;
        attend(b, dtype, group - g < HEADS_AT_ONCE ? group - g : HEADS_AT_ONCE);
    }
}

static void load_decode_query(const attention_job *job, const unit *u, float *scaled)
{
    const lco_attention_args *a = job->args;
    const int64_t d = a->kv->head_dim, first_head = u->head * job->group;
    float *sums = u->part + first_head * job->d_pad, *largest = u->part + a->n_heads * job->d_pad + first_head;
    for (int64_t h = 0; h < u->heads * job->group; h++) {
        const float *q = a->q + u->item->row * a->ld_q + (first_head + h) * d;
        for (int64_t j = 0; j < job->d_pad; j++) {
            scaled[h * job->d_pad + j] = j < d ? q[j] * a->scale : 0;
            sums[h * job->d_pad + j] = 0;
        }
        largest[h] = -INFINITY;
        largest[h + a->n_heads] = 0;
    }
}

/* Positions [begin, end) of one page, whose slice was read. `next`: the slice that is read after it, to be prefetched. */
static void decode_page(const attention_job *job, const unit *u, const float *scaled, const uint8_t *slice, const uint8_t *next,
                        int64_t begin, int64_t end)
{
    const lco_kv_view *kv = job->args->kv;
    const int64_t d = kv->head_dim;
    const size_t code_bytes = lco_dtype_bytes(kv->dtype), run = lco_kv_run_bytes(kv);
    const uint8_t *keys = lco_read_codes(kv, slice, LCO_KEY, u->head), *values = lco_read_codes(kv, slice, LCO_VALUE, u->head);
    for (int64_t h = 0; h < u->heads; h++, keys += run, values += run) {
        const bool last = h + 1 == u->heads;
        const uint8_t *next_keys = last ? lco_read_codes(kv, next, LCO_KEY, u->head) : keys + run;
        const uint8_t *next_values = last ? lco_read_codes(kv, next, LCO_VALUE, u->head) : values + run;
        for (int64_t t = begin, stop; t < end; t = stop) {
            stop = (t / BLOCK + 1) * BLOCK < end ? (t / BLOCK + 1) * BLOCK : end;
            const size_t offset = (size_t)(t * d) * code_bytes;
            decode_block b = {.keys = keys + offset, .values = values + offset, .n = stop - t, .d = d, .d_pad = job->d_pad};
            if (job->group > 1 || lco_dtype_scaled(kv->dtype)) { /* half as many lines a row: the hardware does not follow in time */
                b.next_keys = next_keys + offset;
                b.next_values = next_values + offset;
            }
            if (lco_dtype_scaled(kv->dtype)) {
                b.key_scales = lco_read_scales(kv, slice, LCO_KEY, u->head + h) + t / LCO_KV_BLOCK;
                b.value_scales = lco_read_scales(kv, slice, LCO_VALUE, u->head + h) + t / LCO_KV_BLOCK;
                b.skip = t % LCO_KV_BLOCK;
            }
            attend_heads(job, u, scaled, h, &b, kv->dtype);
        }
    }
}

/* Positions [begin, end) of the block that the query is in, from 16 bit. */
static void decode_own_block(const attention_job *job, const unit *u, const float *scaled, int64_t begin, int64_t end)
{
    const lco_kv_view *kv = job->args->kv;
    uint8_t *own = lco_own_block(kv, u->item, begin / LCO_KV_BLOCK);
    for (int64_t h = 0; h < u->heads; h++) {
        const int64_t offset = begin % LCO_KV_BLOCK * kv->head_dim;
        const uint16_t *keys = lco_tail_rows(kv, own, LCO_KEY, u->head + h) + offset;
        const uint16_t *values = lco_tail_rows(kv, own, LCO_VALUE, u->head + h) + offset;
        decode_block b = {.keys = (const uint8_t *)keys, .values = (const uint8_t *)values, .n = end - begin};
        b.d = kv->head_dim;
        b.d_pad = job->d_pad;
        b.next_keys = job->group > 1 ? b.keys : NULL;
        b.next_values = job->group > 1 ? b.values : NULL;
        attend_heads(job, u, scaled, h, &b, LCO_BF16);
    }
}

static void decode_unit(const attention_job *job, const unit *u, int thread)
{
    const lco_attention_args *a = job->args;
    const int64_t page_size = a->kv->page_size, end = u->first + u->count, pos = u->item->pos, coded = coded_end(a, pos);
    const lco_seen seen = seen_at(a, pos);
    const split_plan plan = plan_splits(a, u->item);
    float *scaled = scratch_of(job, thread);
    load_decode_query(job, u, scaled);
    for (int64_t n = u->first; n < end; n++) {
        const int64_t page = page_at(&plan, n), start = page * page_size, stop = start + page_size < coded ? start + page_size : coded;
        const int64_t sinks = seen.sinks < stop ? seen.sinks : stop, first = seen.first > start ? seen.first : start;
        if ((sinks <= start && first >= stop) || !lco_page_chosen(a, u->item, u->head, page))
            continue;
        int64_t later = n + 1;
        while (later < end && !lco_page_chosen(a, u->item, u->head, page_at(&plan, later)))
            later++;
        const int32_t at = u->item->table[page], next = later < end ? u->item->table[page_at(&plan, later)] : at;
        const uint8_t *slice = lco_kv_read(a->kv, thread, at, next, u->head, u->heads);
        const uint8_t *after = lco_kv_away(a->kv, next) ? slice : lco_kv_slice(a->kv, next);
        if (sinks > start)
            decode_page(job, u, scaled, slice, after, 0, sinks - start);
        if (first < stop)
            decode_page(job, u, scaled, slice, after, first - start, stop - start);
    }
    if (coded > pos || end < plan.count)
        return;
    if (seen.sinks > coded)
        decode_own_block(job, u, scaled, coded, seen.sinks);
    decode_own_block(job, u, scaled, seen.first > coded ? seen.first : coded, pos + 1);
}
