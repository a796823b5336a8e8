/* Prompt rows: a block of (token, query head of the group) rows against BLOCK positions at a time. Keys are converted once a block into
 * a transposed float copy [d][BLOCK], values into [BLOCK][d_pad]; then two small products in registers, a tile of TILE_ROWS rows each.
 *
 * Blocks begin at fixed positions, and a row takes exactly the positions it sees: the sums of a row are the same whatever tile it is in
 * and however the prompt was cut. */

enum {
    TILE_ROWS = 6,
    TILE_VECTORS = VL == 16 ? 4 : 2,
    LANES = TILE_VECTORS * VL,
};

typedef struct {
    int64_t rows, tiles, d, d_pad;
    float *q;               /* [tiles][d][TILE_ROWS], scaled */
    float *sums;            /* [tiles * TILE_ROWS, d_pad] */
    float *largest, *total; /* [tiles * TILE_ROWS] */
    float *keys;            /* [d_pad][BLOCK] */
    float *values;          /* [BLOCK][d_pad] */
} prompt_block;

static int64_t prompt_tiles(const attention_job *job) { return (job->prompt_tokens * job->group + TILE_ROWS - 1) / TILE_ROWS; }

static int64_t prompt_scratch(const attention_job *job)
{
    return prompt_tiles(job) * TILE_ROWS * (job->args->kv->head_dim + job->d_pad + 2 * VL) + 2 * BLOCK * job->d_pad;
}

static prompt_block carve(const attention_job *job, const unit *u, float *scratch)
{
    prompt_block b = {.rows = u->count * job->group, .d = job->args->kv->head_dim, .d_pad = job->d_pad};
    const int64_t rows = prompt_tiles(job) * TILE_ROWS;
    b.tiles = (b.rows + TILE_ROWS - 1) / TILE_ROWS;
    b.keys = scratch;
    b.values = b.keys + BLOCK * b.d_pad;
    b.sums = b.values + BLOCK * b.d_pad;
    b.q = b.sums + rows * b.d_pad;
    b.largest = b.q + rows * b.d;
    b.total = b.largest + rows;
    return b;
}

static void load_queries(const attention_job *job, const unit *u, const prompt_block *b)
{
    const lco_attention_args *a = job->args;
    for (int64_t r = 0; r < b->tiles * TILE_ROWS; r++) {
        float *q = b->q + r / TILE_ROWS * TILE_ROWS * b->d + r % TILE_ROWS;
        const float *from = a->q + (u->item->row + u->first + r / job->group) * a->ld_q + (u->head * job->group + r % job->group) * b->d;
        for (int64_t i = 0; i < b->d; i++)
            q[i * TILE_ROWS] = r < b->rows ? from[i] * a->scale : 0;
        for (int64_t i = 0; i < b->d_pad; i++)
            b->sums[r * b->d_pad + i] = 0;
        b->largest[r] = -INFINITY;
        b->total[r] = 0;
    }
}

/* Positions [skip, n) of a run of codes into the float copies, from column and row `at` on. Columns are written in whole vectors. Scales: of
 * 16 positions each. */
INLINE void convert(const prompt_block *b, lco_dtype dtype, const uint8_t *keys, const uint8_t *values, const float *key_scales,
                    const float *value_scales, int64_t at, int64_t skip, int64_t n)
{
    const bool scaled = lco_dtype_scaled(dtype);
    const float unit = v_code_unit(dtype);
    const size_t row = (size_t)b->d * lco_dtype_bytes(dtype);
    for (int64_t t = 0; t < n; t += VL) {
        const vf scale = scaled ? v_set(key_scales[t / LCO_KV_BLOCK] * unit) : v_zero();
        for (int64_t i = 0; i < b->d; i += VL) {
            vf square[VL];
            for (int64_t j = 0; j < VL; j++)
                square[j] = t + j >= skip && t + j < n ? v_load_as_part(keys + (size_t)(t + j) * row, i, b->d - i, dtype) : v_zero();
            v_transpose(square);
            for (int64_t j = 0; j < VL; j++)
                v_store(b->keys + (i + j) * BLOCK + at + t, scaled ? v_mul(scale, square[j]) : square[j]);
        }
    }
    for (int64_t t = skip; t < n; t++) {
        const vf scale = scaled ? v_set(value_scales[t / LCO_KV_BLOCK] * unit) : v_zero();
        for (int64_t i = 0; i < b->d; i += VL) {
            const vf v = v_load_as_part(values + (size_t)t * row, i, b->d - i, dtype);
            v_store(b->values + (at + t) * b->d_pad + i, scaled ? v_mul(scale, v) : v);
        }
    }
}

static void convert_any(const prompt_block *b, lco_dtype dtype, const uint8_t *keys, const uint8_t *values, const float *key_scales,
                        const float *value_scales, int64_t at, int64_t skip, int64_t n)
{
    if (dtype == LCO_F8_E4M3)
        convert(b, LCO_F8_E4M3, keys, values, key_scales, value_scales, at, skip, n);
    else if (dtype == LCO_F8_E5M2)
        convert(b, LCO_F8_E5M2, keys, values, key_scales, value_scales, at, skip, n);
    else if (dtype == LCO_I8)
        convert(b, LCO_I8, keys, values, key_scales, value_scales, at, skip, n);
    else if (dtype == LCO_BF16)
        convert(b, LCO_BF16, keys, values, NULL, NULL, at, skip, n);
    else if (dtype == LCO_F16)
        convert(b, LCO_F16, keys, values, NULL, NULL, at, skip, n);
    else
        convert(b, LCO_F32, keys, values, NULL, NULL, at, skip, n);
}

/* Positions [first, end) of the first few of the text, over what their codes gave. */
static void place_firsts(const attention_job *job, const unit *u, const prompt_block *b, int64_t first, int64_t end)
{
    const lco_kv_view *kv = job->args->kv;
    const uint16_t *keys = lco_first_rows(kv, u->item->table[0], LCO_KEY, u->head);
    const uint16_t *values = lco_first_rows(kv, u->item->table[0], LCO_VALUE, u->head);
    for (int64_t t = first; t < end; t++)
        for (int64_t i = 0; i < b->d; i++) {
            b->keys[i * BLOCK + t] = lco_bf16_to_f32(keys[t * b->d + i]);
            b->values[t * b->d_pad + i] = lco_bf16_to_f32(values[t * b->d + i]);
        }
}

/* Positions [first, end) of the block that begins at `begin`, from one or more pages. Whole vectors of columns never cross a page. */
static void convert_block(const attention_job *job, const unit *u, int thread, const prompt_block *b, int64_t begin, int64_t first,
                          int64_t end)
{
    const lco_kv_view *kv = job->args->kv;
    for (int64_t t = first, stop; t < end; t = stop) {
        const int64_t page = t / kv->page_size, skip = (t - begin) % LCO_KV_BLOCK, from = t - skip;
        stop = (page + 1) * kv->page_size < end ? (page + 1) * kv->page_size : end;
        const size_t offset = (size_t)(from % kv->page_size * b->d) * lco_dtype_bytes(kv->dtype);
        const uint8_t *slice = lco_kv_read(kv, thread, u->item->table[page], stop < end ? u->item->table[page + 1] : -1, u->head, 1);
        const uint8_t *keys = lco_read_codes(kv, slice, LCO_KEY, u->head) + offset;
        const uint8_t *values = lco_read_codes(kv, slice, LCO_VALUE, u->head) + offset;
        const float *key_scales = NULL, *value_scales = NULL;
        if (lco_dtype_scaled(kv->dtype)) {
            const int64_t block = from % kv->page_size / LCO_KV_BLOCK;
            key_scales = lco_read_scales(kv, slice, LCO_KEY, u->head) + block;
            value_scales = lco_read_scales(kv, slice, LCO_VALUE, u->head) + block;
        }
        convert_any(b, kv->dtype, keys, values, key_scales, value_scales, from - begin, skip, stop - from);
    }
    if (kv->buffered && first < kv->n_first)
        place_firsts(job, u, b, first, end < kv->n_first ? end : kv->n_first);
}

/* scores[r][column, column + vectors * VL) = q[r] . keys. */
INLINE void tile_scores(const float *q, const float *keys, int64_t d, int vectors, int64_t column, float scores[TILE_ROWS][BLOCK])
{
    vf acc[TILE_ROWS][TILE_VECTORS];
    for (int r = 0; r < TILE_ROWS; r++)
        for (int c = 0; c < vectors; c++)
            acc[r][c] = v_zero();
    for (int64_t i = 0; i < d; i++) {
        vf k[TILE_VECTORS];
        for (int c = 0; c < vectors; c++)
            k[c] = v_load(keys + i * BLOCK + column + c * VL);
        for (int r = 0; r < TILE_ROWS; r++) {
            vf x = v_set(q[i * TILE_ROWS + r]);
            for (int c = 0; c < vectors; c++)
                acc[r][c] = v_fma(x, k[c], acc[r][c]);
        }
    }
    for (int r = 0; r < TILE_ROWS; r++)
        for (int c = 0; c < vectors; c++)
            v_store(scores[r] + column + c * VL, acc[r][c]);
}

/* sums[r][i, i + vectors * VL) += sum over t in [begin, end) of p[r][t] * values[t]. */
INLINE void tile_values(const prompt_block *b, int64_t row, int rows, int vectors, int64_t i, int64_t begin, int64_t end, float (*p)[BLOCK])
{
    vf acc[TILE_ROWS][TILE_VECTORS];
    for (int r = 0; r < rows; r++)
        for (int c = 0; c < vectors; c++)
            acc[r][c] = v_load(b->sums + (row + r) * b->d_pad + i + c * VL);
    for (int64_t t = begin; t < end; t++) {
        vf v[TILE_VECTORS];
        for (int c = 0; c < vectors; c++)
            v[c] = v_load(b->values + t * b->d_pad + i + c * VL);
        for (int r = 0; r < rows; r++) {
            vf x = v_set(p[r][t]);
            for (int c = 0; c < vectors; c++)
                acc[r][c] = v_fma(x, v[c], acc[r][c]);
        }
    }
    for (int r = 0; r < rows; r++)
        for (int c = 0; c < vectors; c++)
            v_store(b->sums + (row + r) * b->d_pad + i + c * VL, acc[r][c]);
}

INLINE void add_values(const prompt_block *b, int64_t row, int rows, int64_t begin, int64_t end, float (*p)[BLOCK])
{
    int64_t i = 0;
    for (; i + LANES <= b->d_pad; i += LANES)
        tile_values(b, row, rows, TILE_VECTORS, i, begin, end, p);
    for (; i < b->d_pad; i += VL)
        tile_values(b, row, rows, 1, i, begin, end, p);
}

static void add_values_row(const prompt_block *b, int64_t row, int64_t begin, int64_t end, float (*p)[BLOCK])
{
    if (begin < end)
        add_values(b, row, 1, begin, end, p);
}

typedef struct {
    int64_t begin, end;
} span;

/* One tile of rows against one block. seen[r]: the columns that row r takes; empty when none. */
static void attend_tile(const prompt_block *b, int64_t tile, const span seen[TILE_ROWS])
{
    float scores[TILE_ROWS][BLOCK];
    span all = {BLOCK, 0}, common = {0, BLOCK};
    for (int r = 0; r < TILE_ROWS; r++) {
        if (seen[r].begin < seen[r].end) {
            all.begin = seen[r].begin < all.begin ? seen[r].begin : all.begin;
            all.end = seen[r].end > all.end ? seen[r].end : all.end;
        }
        common.begin = seen[r].begin > common.begin ? seen[r].begin : common.begin;
        common.end = seen[r].end < common.end ? seen[r].end : common.end;
    }
    const float *q = b->q + tile * TILE_ROWS * b->d;
    for (int64_t c = all.begin / LANES * LANES; c < all.end; c += LANES) {
        if (all.end - c > LANES - VL)
            tile_scores(q, b->keys, b->d, TILE_VECTORS, c, scores);
        else
            for (int64_t v = c; v < all.end; v += VL)
                tile_scores(q, b->keys, b->d, 1, v, scores);
    }
    const int64_t row = tile * TILE_ROWS;
    for (int r = 0; r < TILE_ROWS; r++) {
        if (seen[r].begin >= seen[r].end)
            continue;
        for (int64_t t = all.begin / VL * VL; t < seen[r].begin; t++)
            scores[r][t] = -INFINITY;
        const int64_t from = all.begin / VL * VL;
        float factor = block_softmax(scores[r] + from, seen[r].end - from, &b->largest[row + r], &b->total[row + r]);
        if (factor != 1.0f)
            for (int64_t i = 0; i < b->d_pad; i += VL)
                v_store(b->sums + (row + r) * b->d_pad + i, v_mul(v_set(factor), v_load(b->sums + (row + r) * b->d_pad + i)));
    }
    if (common.begin >= common.end) {
        for (int r = 0; r < TILE_ROWS; r++)
            add_values_row(b, row + r, seen[r].begin, seen[r].end, &scores[r]);
        return;
    }
    for (int r = 0; r < TILE_ROWS; r++)
        add_values_row(b, row + r, seen[r].begin, common.begin, &scores[r]);
    add_values(b, row, TILE_ROWS, common.begin, common.end, scores);
    for (int r = 0; r < TILE_ROWS; r++)
        add_values_row(b, row + r, common.end, seen[r].end, &scores[r]);
}

/* Where the block that begins at `t` ends: blocks lie at multiples of BLOCK of a page, or hold several whole small pages. */
static int64_t block_end(int64_t page_size, int64_t t)
{
    if (page_size <= BLOCK) {
        int64_t size = BLOCK / page_size * page_size;
        return (t / size + 1) * size;
    }
    int64_t page = t / page_size * page_size, end = page + ((t - page) / BLOCK + 1) * BLOCK;
    return end < page + page_size ? end : page + page_size;
}

static int64_t block_begin(int64_t page_size, int64_t t)
{
    if (page_size <= BLOCK)
        return t / (BLOCK / page_size * page_size) * (BLOCK / page_size * page_size);
    int64_t page = t / page_size * page_size;
    return page + (t - page) / BLOCK * BLOCK;
}

static void store_rows(const attention_job *job, const unit *u, const prompt_block *b)
{
    const lco_attention_args *a = job->args;
    for (int64_t r = 0; r < b->rows; r++) {
        float *out = a->out + (u->item->row + u->first + r / job->group) * a->ld_out + (u->head * job->group + r % job->group) * b->d;
        for (int64_t i = 0; i < b->d; i += VL)
            v_store_part(out + i, v_div(v_load(b->sums + r * b->d_pad + i), v_set(b->total[r])), b->d - i);
    }
}

/* Every tile against the block of positions from `begin` on. Rows take of it their sinks (`sinks`), or what follows from their window on,
 * up to their own position or to the end of what they read as codes (`own`: the block is their stretch, in 16 bit). */
static void attend_tiles(const attention_job *job, const prompt_block *b, int64_t first_pos, int64_t begin, int64_t end, bool own,
                         bool sinks)
{
    const lco_attention_args *a = job->args;
    for (int64_t tile = 0; tile < b->tiles; tile++) {
        span seen[TILE_ROWS];
        bool any = false;
        for (int64_t r = 0; r < TILE_ROWS; r++) {
            const int64_t row = tile * TILE_ROWS + r, pos = first_pos + (row < b->rows ? row : b->rows - 1) / job->group;
            const lco_seen sees = seen_at(a, pos);
            const int64_t from = sinks ? 0 : sees.first - begin, coded = lco_coded_end(a->kv, pos);
            int64_t stop = own ? pos + 1 : coded;
            stop = sinks && sees.sinks < stop ? sees.sinks : stop;
            const int64_t to = own && coded != begin ? 0 : (stop < end ? stop : end) - begin;
            seen[r] = (span){from > 0 ? from : 0, to > 0 ? to : 0};
            any = any || seen[r].begin < seen[r].end;
        }
        if (any)
            attend_tile(b, tile, seen);
    }
}

/* Positions [first, coded) as codes: sinks, or what follows. */
static void attend_codes(const attention_job *job, const unit *u, int thread, const prompt_block *b, int64_t first, int64_t coded,
                         bool sinks)
{
    const int64_t page_size = job->args->kv->page_size;
    for (int64_t begin = block_begin(page_size, first), end; begin < coded; begin = end) {
        end = block_end(page_size, begin);
        convert_block(job, u, thread, b, begin, begin > first ? begin : first, end < coded ? end : coded);
        attend_tiles(job, b, u->item->pos + u->first, begin, end, false, sinks);
    }
}

/* A row takes its sinks first, and of each of the two what lies in pages before what lies in its own stretch. */
static void prompt_unit(const attention_job *job, const unit *u, int thread)
{
    const lco_attention_args *a = job->args;
    const int64_t first_pos = u->item->pos + u->first, last_pos = first_pos + u->count - 1, coded = lco_coded_end(a->kv, last_pos);
    const int64_t sinks = seen_at(a, last_pos).sinks;
    prompt_block b = carve(job, u, scratch_of(job, thread));
    load_queries(job, u, &b);
    if (sinks > 0)
        attend_codes(job, u, thread, &b, 0, sinks < coded ? sinks : coded, true);
    attend_codes(job, u, thread, &b, seen_at(a, first_pos).first, coded, false);
    for (int64_t begin = lco_coded_end(a->kv, first_pos); a->kv->buffered && begin <= last_pos; begin += a->kv->residual) {
        const int64_t end = begin + a->kv->residual;
        uint8_t *own = lco_own_stretch(a->kv, u->item, begin);
        convert_any(&b, LCO_BF16, (const uint8_t *)lco_tail_rows(a->kv, own, LCO_KEY, u->head),
                    (const uint8_t *)lco_tail_rows(a->kv, own, LCO_VALUE, u->head), NULL, NULL, 0, 0,
                    (end <= last_pos ? end : last_pos + 1) - begin);
        if (sinks > begin)
            attend_tiles(job, &b, first_pos, begin, end, true, true);
        attend_tiles(job, &b, first_pos, begin, end, true, false);
    }
    store_rows(job, u, &b);
}
