/* One query token: for each page, for each kv head of the range, BLOCK positions at a time: scores, softmax so far, weighted values.
 * Pages outside, heads inside: the keys of all heads are one run of memory. Codes become floats in registers, once for up to
 * HEADS_AT_ONCE query heads.
 *
 * Lifted codes (job->lifted) are float codes by shifts: numbers near 2^-120 (v_code_lift). The other factor of each product is lifted by as much,
 * after what takes it far from 1 is set aside: a query's `unit`, the power of two below its largest number, by which scores are multiplied
 * afterwards; and the largest scale of a block's values, by which their weighted sum is. All of that is exact, and nothing leaves the range
 * of float32 on the way that would not leave it anyway. Their sums, and queries of heads alone, stand in the order of
 * v_shift_words(), CHUNK columns at a time; columns after the last whole chunk in their own. */

enum {
    MAX_HEADS = 4,
    HEADS_AT_ONCE = VL == 16 ? MAX_HEADS : 2, /* with four positions: as many sums as there are registers for */
    CHUNK_VECTORS = 4,
    CHUNK = CHUNK_VECTORS * VL,
};

typedef struct {
    const uint8_t *keys, *values;           /* codes of the first position */
    int64_t n, d, d_pad;                    /* positions, 1..BLOCK; head size */
    const float *key_scales, *value_scales; /* of 16 positions each, or NULL */
    int64_t skip;                           /* positions of the first scale that lie before the first position */
    const float *q;                         /* [heads, d_pad], scaled, zero beyond d */
    const float *unit;                      /* [heads] of q when codes are lifted, else NULL */
    float *sums;                            /* [heads, d_pad] */
    float *largest, *total;                 /* [heads] */
    const uint8_t *next_keys,
        *next_values; /* read after these: prefetched, by every few heads again, which spreads the requests; NULL: not */
} decode_block;

/* How a kernel reads rows: the type, and whether its codes are lifted. */
typedef struct {
    lco_dtype dtype;
    bool lifted;
} row_form;

INLINE void prefetch(const uint8_t *p, size_t bytes)
{
    for (size_t i = 0; i < bytes; i += 64)
        _mm_prefetch((const char *)p + i, _MM_HINT_T1);
}

/* The c-th vector of a whole chunk of columns, from i on. */
INLINE vf load_chunk(const uint8_t *row, int64_t i, int c, row_form form)
{
#if VL == 16
    if (form.lifted)
        return v_shift_words(_mm512_loadu_si512(row + i), c, form.dtype);
#endif
    return v_load_as(row, i + c * VL, form.dtype);
}

/* A vector of the columns after the whole chunks, of which `left` exist, in their own order. */
INLINE vf load_rest(const uint8_t *row, int64_t i, int64_t left, row_form form)
{
#if VL == 16
    if (form.lifted)
        return v_shift_codes(left < VL ? v_load_codes_n(row + i, left) : v_load_codes(row + i), form.dtype);
#endif
    return v_load_as_part(row, i, left, form.dtype);
}

#if VL == 16
enum { PIECE = 16, ALL_LANES = BLOCK / VL }; /* codes of a key that are turned over at a time; vectors of a block's positions */

/* scores[g][t] = q[g] . key[t] of a group's heads, for a whole block of lifted codes and a head size of whole pieces: with a lane for each
 * position nothing is left to be summed across lanes, which with many heads costs more than turning keys over, four codes to a word. */
INLINE void turned_scores(const decode_block *b, lco_dtype dtype, int heads, float scores[MAX_HEADS][BLOCK])
{
    vf acc[MAX_HEADS][ALL_LANES];
    for (int g = 0; g < heads; g++)
        for (int j = 0; j < ALL_LANES; j++)
            acc[g][j] = v_zero();
    for (int64_t i = 0; i < b->d; i += PIECE) {
        __m512i words[ALL_LANES][PIECE / 4];
        for (int j = 0; j < ALL_LANES; j++)
            v_turn_words(words[j], b->keys + j * VL * b->d + i, b->d);
        for (int w = 0; w < PIECE / 4; w++) {
            prefetch(b->next_keys + (i + 4 * w) * BLOCK, 4 * BLOCK);
            for (int k = 0; k < 4; k++) {
                vf x[ALL_LANES];
                for (int j = 0; j < ALL_LANES; j++)
                    x[j] = v_shift_words(words[j][w], k, dtype);
                for (int g = 0; g < heads; g++) {
                    const vf q = v_set(b->q[g * b->d_pad + i + 4 * w + k]);
                    for (int j = 0; j < ALL_LANES; j++)
                        acc[g][j] = v_fma(q, x[j], acc[g][j]);
                }
            }
        }
    }
    for (int g = 0; g < heads; g++)
        for (int j = 0; j < ALL_LANES; j++)
            v_store(scores[g] + j * VL, acc[g][j]);
}
#endif

/* scores[g][t] = q[g] . key[t] for heads g and four positions at a time. Heads of a group share each load, four rows side by side, and what
 * is read next is asked for by software (`ahead`); a head alone reads row after row, which the hardware prefetches better by itself. */
INLINE void block_scores(const decode_block *b, row_form form, int heads, bool ahead, float scores[MAX_HEADS][BLOCK])
{
    const size_t row = (size_t)b->d * lco_dtype_bytes(form.dtype);
    const int64_t whole = form.lifted && heads > 1 ? 0 : b->d / CHUNK * CHUNK; /* queries of a group are in their own order */
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
                for (int64_t i = 0; i < whole; i += CHUNK)
                    for (int c = 0; c < CHUNK_VECTORS; c++)
                        acc[0][j] = v_fma(v_load(b->q + i + c * VL), load_chunk(key[j], i, c, form), acc[0][j]);
        } else if (heads == 1) {
            prefetch(b->next_keys + (size_t)t * row, 4 * row);
            for (int64_t i = 0; i < whole; i += CHUNK)
                for (int j = 0; j < 4; j++)
                    for (int c = 0; c < CHUNK_VECTORS; c++)
                        acc[0][j] = v_fma(v_load(b->q + i + c * VL), load_chunk(key[j], i, c, form), acc[0][j]);
        } else {
            prefetch(b->next_keys + (size_t)t * row, 4 * row);
            for (int64_t i = 0; i < whole; i += VL) {
                vf k[4];
                for (int j = 0; j < 4; j++)
                    k[j] = v_load_as(key[j], i, form.dtype);
                for (int g = 0; g < heads; g++) {
                    const vf q = v_load(b->q + g * b->d_pad + i);
                    for (int j = 0; j < 4; j++)
                        acc[g][j] = v_fma(q, k[j], acc[g][j]);
                }
            }
        }
        for (int64_t i = whole; i < b->d; i += VL) {
            for (int j = 0; j < 4; j++) {
                const vf k = load_rest(key[j], i, b->d - i, form);
                for (int g = 0; g < heads; g++)
                    acc[g][j] = v_fma(v_load(b->q + g * b->d_pad + i), k, acc[g][j]);
            }
        }
        for (int g = 0; g < heads; g++)
            _mm_storeu_ps(scores[g] + t, v_sum4(acc[g][0], acc[g][1], acc[g][2], acc[g][3]));
    }
}

/* A scale for each position, from those of 16 each, divided by `unit` and times `number`: position t's is spread[skip + t]. */
INLINE void spread_scales(float *spread, const decode_block *b, const float *scales, float unit, float number)
{
    for (int64_t t = 0; t < b->skip + b->n; t += LCO_KV_BLOCK)
        for (int64_t i = 0; i < LCO_KV_BLOCK; i += VL)
            v_store(spread + t + i, v_set(scales[t / LCO_KV_BLOCK] / unit * number));
}

/* x[t] times a number and the scale of its position. */
INLINE void scale_positions(float *x, int64_t n, float number, const float *scales)
{
    for (int64_t t = 0; t < n; t += VL)
        v_store(x + t, v_mul(v_mul(v_set(number), v_load(x + t)), v_load(scales + t)));
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

/* sums[g][i, i + vectors * VL) = factor[g] * sums + unit * sum over t in [begin, end) of p[g][t] * value[t]. Fewer vectors than a chunk has are
 * columns after the whole ones. `unit` is 1 unless codes are lifted. */
INLINE void weigh_columns(const decode_block *b, row_form form, int heads, int vectors, int64_t i, int64_t begin, int64_t end,
                          const float *factor, float unit, float p[MAX_HEADS][BLOCK], bool ahead)
{
    const size_t row = (size_t)b->d * lco_dtype_bytes(form.dtype);
    vf acc[MAX_HEADS][8];
    for (int g = 0; g < heads; g++)
        for (int c = 0; c < vectors; c++)
            acc[g][c] = form.lifted ? v_zero() : v_mul(v_set(factor[g]), v_load(b->sums + g * b->d_pad + i + c * VL));
    for (int64_t t = begin; t < end; t++) {
        const uint8_t *value = b->values + (size_t)t * row;
        if (ahead)
            prefetch(b->next_values + (size_t)t * row, row);
        for (int c = 0; c < vectors; c++) {
            const int64_t at = i + c * VL;
            const vf v = vectors < CHUNK_VECTORS ? load_rest(value, at, b->d - at, form)
                                                 : load_chunk(value, i + c / CHUNK_VECTORS * CHUNK, c % CHUNK_VECTORS, form);
            for (int g = 0; g < heads; g++)
                acc[g][c] = v_fma(v_set(p[g][t]), v, acc[g][c]);
        }
    }
    for (int g = 0; g < heads; g++) {
        for (int c = 0; c < vectors; c++) {
            float *sums = b->sums + g * b->d_pad + i + c * VL;
            v_store(sums, form.lifted ? v_fma(v_set(unit), acc[g][c], v_mul(v_set(factor[g]), v_load(sums))) : acc[g][c]);
        }
    }
}

/* Values of positions [begin, end), as many columns at a time as there are registers for. */
INLINE void weigh_values(const decode_block *b, row_form form, int heads, int64_t begin, int64_t end, const float *factor, float unit,
                         float p[MAX_HEADS][BLOCK], bool ahead)
{
    const int wide = heads == 1 || (heads == 2 && VL == 16) ? 8 : 4; /* vectors */
    int64_t i = 0;
    for (; i + wide * VL <= b->d; i += wide * VL)
        weigh_columns(b, form, heads, wide, i, begin, end, factor, unit, p, ahead && i == 0);
    for (; i + CHUNK <= b->d; i += CHUNK)
        weigh_columns(b, form, heads, CHUNK_VECTORS, i, begin, end, factor, unit, p, ahead && i == 0);
    for (; i + VL < b->d; i += 2 * VL)
        weigh_columns(b, form, heads, 2, i, begin, end, factor, unit, p, ahead && i == 0);
    if (i < b->d)
        weigh_columns(b, form, heads, 1, i, begin, end, factor, unit, p, ahead && i == 0);
}

/* The largest of the scales of the block's positions: a power of two for float codes. */
INLINE float largest_scale(const decode_block *b)
{
    float largest = 0x1p-126f;
    for (int64_t i = 0; i <= (b->skip + b->n - 1) / LCO_KV_BLOCK; i++)
        largest = b->value_scales[i] > largest ? b->value_scales[i] : largest;
    return largest;
}

INLINE void attend_block(const decode_block *b, row_form form, int heads, bool ahead)
{
    enum { STRAIGHT = 8 }; /* positions: columns taken in turns jump within so many rows only, which the hardware still follows */
    const bool scaled = lco_dtype_scaled(form.dtype);
    const float unit = form.lifted ? largest_scale(b) : 1;
    float scores[MAX_HEADS][BLOCK], factor[MAX_HEADS], key_scales[BLOCK + 2 * LCO_KV_BLOCK], value_scales[BLOCK + 2 * LCO_KV_BLOCK];
    if (scaled) {
        spread_scales(key_scales, b, b->key_scales, 1, form.lifted ? 1 : v_code_unit(form.dtype));
        spread_scales(value_scales, b, b->value_scales, unit, form.lifted ? v_code_lift(form.dtype) : v_code_unit(form.dtype));
    }
#if VL == 16
    if (form.lifted && heads > 1 && b->n == BLOCK && b->d % PIECE == 0)
        turned_scores(b, form.dtype, heads, scores);
    else
#endif
        block_scores(b, form, heads, ahead, scores);
    for (int g = 0; g < heads; g++) {
        if (scaled)
            scale_positions(scores[g], b->n, form.lifted ? b->unit[g] : 1, key_scales + b->skip);
        factor[g] = block_softmax(scores[g], b->n, &b->largest[g], &b->total[g]);
        if (scaled)
            scale_positions(scores[g], b->n, 1, value_scales + b->skip);
    }
    if (ahead) {
        weigh_values(b, form, heads, 0, b->n, factor, unit, scores, true);
        return;
    }
    for (int64_t t = 0; t < b->n; t += STRAIGHT) {
        weigh_values(b, form, heads, t, t + STRAIGHT < b->n ? t + STRAIGHT : b->n, factor, unit, scores, false);
        factor[0] = 1;
    }
}

#define ATTEND(name, dtype, lifted)                                                                                                        \
    static void name(const decode_block *b, int64_t heads)                                                                                 \
    {                                                                                                                                      \
        const row_form form = {dtype, lifted};                                                                                             \
        if (b->next_keys == NULL)                                                                                                          \
            attend_block(b, form, 1, false);                                                                                               \
        else if (heads == 1)                                                                                                               \
            attend_block(b, form, 1, true);                                                                                                \
        else if (heads == 2)                                                                                                               \
            attend_block(b, form, 2, true);                                                                                                \
        else if (HEADS_AT_ONCE > 2 && heads == 3)                                                                                          \
            attend_block(b, form, 3, true);                                                                                                \
        else                                                                                                                               \
            attend_block(b, form, HEADS_AT_ONCE, true);                                                                                    \
    }
ATTEND(attend_f32, LCO_F32, false)
ATTEND(attend_f16, LCO_F16, false)
ATTEND(attend_bf16, LCO_BF16, false)
ATTEND(attend_e4m3, LCO_F8_E4M3, false)
ATTEND(attend_e5m2, LCO_F8_E5M2, false)
ATTEND(attend_i8, LCO_I8, false)
#if VL == 16
ATTEND(attend_lifted_e4m3, LCO_F8_E4M3, true)
ATTEND(attend_lifted_e5m2, LCO_F8_E5M2, true)
#endif

static void attend(const decode_block *b, lco_dtype dtype, int64_t heads)
{
#if VL == 16
    if (b->unit != NULL) {
        (dtype == LCO_F8_E4M3 ? attend_lifted_e4m3 : attend_lifted_e5m2)(b, heads);
        return;
    }
#endif
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

/* Floats of scratch for a thread: the scaled queries and their units. */
static int64_t decode_scratch(const attention_job *job) { return job->args->n_heads * (job->d_pad + 1); }

/* Of `left` heads of a group, how many go together next. With AVX-512 never one of several. */
static int64_t next_heads(int64_t left) { return left == HEADS_AT_ONCE + 1 && VL == 16 ? 3 : left < HEADS_AT_ONCE ? left : HEADS_AT_ONCE; }

/* All query heads of one kv head of the unit (the h-th) against a block. */
static void attend_heads(const attention_job *job, const unit *u, const float *scaled, int64_t h, decode_block *b, lco_dtype dtype)
{
    const int64_t group = job->group, first_head = (u->head + h) * group;
    float *sums = u->part + first_head * job->d_pad, *largest = u->part + job->args->n_heads * job->d_pad + first_head;
    const float *units = scaled + job->args->n_heads * job->d_pad + h * group;
    for (int64_t g = 0, n; g < group; g += n) {
        n = next_heads(group - g);
        b->q = scaled + (h * group + g) * job->d_pad;
        b->unit = job->lifted && lco_dtype_scaled(dtype) ? units + g : NULL;
        b->sums = sums + g * job->d_pad;
        b->largest = largest + g;
        b->total = largest + job->args->n_heads + g;
        attend(b, dtype, n);
    }
}

/* Makes a query what lifted codes are multiplied by, and returns its unit. */
static float lift_query(const attention_job *job, float *q)
{
    vf top = v_set(0x1p-126f);
    for (int64_t j = 0; j < job->d_pad; j += VL)
        top = v_max(v_max(v_load(q + j), v_sub(v_zero(), v_load(q + j))), top);
    const float unit = lco_float_of_bits(lco_float_bits(v_largest(top)) & 0x7F800000u), lift = v_code_lift(job->args->kv->dtype);
    for (int64_t j = 0; j < job->d_pad; j += VL)
        v_store(q + j, v_mul(v_set(lift), v_mul(v_set(1 / unit), v_load(q + j))));
    for (int64_t j = 0; job->group == 1 && j + CHUNK <= job->args->kv->head_dim; j += CHUNK)
        v_order_fourths(q + j, false);
    return unit;
}

/* The unit's queries times scale; lifted for codes of the cache's type, or as they are. */
static void load_decode_query(const attention_job *job, const unit *u, float *scaled, bool lifted)
{
    const lco_attention_args *a = job->args;
    const int64_t d = a->kv->head_dim, d_pad = job->d_pad;
    const float *q = a->q + u->item->row * a->ld_q + u->head * job->group * d;
    for (int64_t h = 0; h < u->heads * job->group; h++) {
        for (int64_t j = 0; j < d_pad; j++)
            scaled[h * d_pad + j] = j < d ? q[h * d + j] * a->scale : 0;
        if (lifted)
            scaled[a->n_heads * d_pad + h] = lift_query(job, scaled + h * d_pad);
    }
}

static void begin_sums(const attention_job *job, const unit *u)
{
    const int64_t n_heads = job->args->n_heads, first_head = u->head * job->group;
    float *sums = u->part + first_head * job->d_pad, *largest = u->part + n_heads * job->d_pad + first_head;
    for (int64_t h = 0; h < u->heads * job->group; h++) {
        for (int64_t j = 0; j < job->d_pad; j++)
            sums[h * job->d_pad + j] = 0;
        largest[h] = -INFINITY;
        largest[h + n_heads] = 0;
    }
}

/* Sums that were made of lifted codes, back in their own order. */
static void order_sums(const attention_job *job, const unit *u)
{
    float *sums = u->part + u->head * job->group * job->d_pad;
    for (int64_t h = 0; h < u->heads * job->group; h++)
        for (int64_t j = 0; j + CHUNK <= job->args->kv->head_dim; j += CHUNK)
            v_order_fourths(sums + h * job->d_pad + j, true);
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

/* n positions in 16 bit. keys, values: of the first of them and of the unit's first head; heads are `stride` elements apart. */
static void decode_rows(const attention_job *job, const unit *u, const float *scaled, const uint16_t *keys, const uint16_t *values,
                        int64_t stride, int64_t n)
{
    for (int64_t h = 0; h < u->heads && n > 0; h++) {
        decode_block b = {.keys = (const uint8_t *)(keys + h * stride), .values = (const uint8_t *)(values + h * stride), .n = n};
        b.d = job->args->kv->head_dim;
        b.d_pad = job->d_pad;
        b.next_keys = job->group > 1 ? b.keys : NULL;
        b.next_values = job->group > 1 ? b.values : NULL;
        attend_heads(job, u, scaled, h, &b, LCO_BF16);
    }
}

/* Positions [begin, end) of the stretch that the query is in. */
static void decode_own(const attention_job *job, const unit *u, const float *scaled, int64_t begin, int64_t end)
{
    const lco_kv_view *kv = job->args->kv;
    uint8_t *own = lco_own_stretch(kv, u->item, begin);
    const int64_t offset = begin % kv->residual * kv->head_dim;
    decode_rows(job, u, scaled, lco_tail_rows(kv, own, LCO_KEY, u->head) + offset, lco_tail_rows(kv, own, LCO_VALUE, u->head) + offset,
                kv->residual * kv->head_dim, end - begin);
}

/* Positions [begin, end) of the first few of the text. */
static void decode_firsts(const attention_job *job, const unit *u, const float *scaled, int64_t begin, int64_t end)
{
    const lco_kv_view *kv = job->args->kv;
    const int64_t page = u->item->table[0], offset = begin * kv->head_dim;
    decode_rows(job, u, scaled, lco_first_rows(kv, page, LCO_KEY, u->head) + offset, lco_first_rows(kv, page, LCO_VALUE, u->head) + offset,
                kv->n_first * kv->head_dim, end - begin);
}

static void decode_unit(const attention_job *job, const unit *u, int thread)
{
    const lco_attention_args *a = job->args;
    const int64_t page_size = a->kv->page_size, end = u->first + u->count, pos = u->item->pos, coded = lco_coded_end(a->kv, pos);
    const int64_t n_first = a->kv->buffered && coded > 0 ? a->kv->n_first : 0;
    const lco_seen seen = seen_at(a, pos);
    const split_plan plan = plan_splits(a, u->item);
    float *scaled = scratch_of(job, thread);
    begin_sums(job, u);
    load_decode_query(job, u, scaled, job->lifted);
    for (int64_t n = u->first; n < end; n++) {
        const int64_t page = page_at(&plan, n), start = page * page_size, stop = start + page_size < coded ? start + page_size : coded;
        const int64_t from = start > n_first ? start : n_first; /* n_first is at most a page */
        const int64_t sinks = seen.sinks < stop ? seen.sinks : stop, first = seen.first > from ? seen.first : from;
        if ((sinks <= from && first >= stop) || !lco_page_chosen(a, u->item, u->head, page))
            continue;
        int64_t later = n + 1;
        while (later < end && !lco_page_chosen(a, u->item, u->head, page_at(&plan, later)))
            later++;
        const int32_t at = u->item->table[page], next = later < end ? u->item->table[page_at(&plan, later)] : at;
        const uint8_t *slice = lco_kv_read(a->kv, thread, at, next, u->head, u->heads);
        const uint8_t *after = lco_kv_away(a->kv, next) ? slice : lco_kv_slice(a->kv, next);
        if (sinks > from)
            decode_page(job, u, scaled, slice, after, from - start, sinks - start);
        if (first < stop)
            decode_page(job, u, scaled, slice, after, first - start, stop - start);
    }
    if (job->lifted)
        order_sums(job, u);
    const bool firsts = u->first == 0 && page_at(&plan, 0) == 0, own = coded <= pos && end == plan.count;
    if (job->lifted && (firsts || own))
        load_decode_query(job, u, scaled, false);
    if (firsts) {
        decode_firsts(job, u, scaled, 0, seen.sinks < n_first ? seen.sinks : n_first);
        decode_firsts(job, u, scaled, seen.first, n_first);
    }
    if (own) {
        decode_own(job, u, scaled, coded, seen.sinks);
        decode_own(job, u, scaled, seen.first > coded ? seen.first : coded, pos + 1);
    }
}
