/* attention with AMX: prompt rows over a bfloat16 cache by tiles. Everything else goes as with AVX-512.
 *
 * A unit's query rows stand in lanes, 16 to a panel. For each BLOCK of positions, two panels at a time:
 *   scores[position][row] = keys . q      keys: A, as they lie in the page; q: B, scaled and packed once a unit
 *   p = 2^(score - base), by lane         rounded to bfloat16, pairs of positions side by side: a B operand as they are written
 *   sums[d][row] += values^T . p          values: A, turned over once a block
 *
 * What is rounded: q times scale, and p, to bfloat16. A row's total adds the rounded p, so that its weights still sum to one.
 * `base` of a row is its largest score when that last rose by more than SLACK: sums are rescaled seldom, and p stays below 2^SLACK.
 *
 * A row's result depends neither on its panel nor on how the prompt was cut: blocks lie at multiples of BLOCK, each lane's base follows from
 * its own scores alone, and a position that a row does not see adds an exact zero - p is 0 there, and what is multiplied by it is finite:
 * stage_block() leaves unseen positions and numbers that are not finite out of the values. */
#define OWN_PROMPT_UNIT
#include "../simd/attention.h"
#include "../../base/convert.h"
#include "tiles.h"

enum {
    STEP = 2 * TILE, /* positions of an A operand of values, and head dimensions of one of keys */
    SLACK = 8,
    FAR = 1 << 20, /* more rows than a unit has */
};
_Static_assert(VL == TILE, "a vector is a row of a tile");
_Static_assert(BLOCK % STEP == 0 && BLOCK <= 64, "whole steps; a bit for each position");

/* Rows and sums of a unit, in the thread's scratch. `d` is padded to `width`, whole steps, with zeros. */
typedef struct {
    int thread;
    int64_t rows, panels, d, width;
    uint32_t *q;                     /* [panels][width / 2][TILE], pairs of head dimensions */
    float *sums;                     /* [panels][width][TILE] */
    float *base, *total;             /* [panels][TILE] */
    int32_t *token;                  /* [panels][TILE], of the unit */
    float *scores;                   /* [2][BLOCK][TILE]; of each half the beginning becomes p, [BLOCK / 2][TILE] pairs of positions */
    uint32_t *turned;                /* [BLOCK / STEP][width][TILE] values, pairs of positions */
    uint16_t *own_keys, *own_values; /* [BLOCK][width], where the page's rows cannot be used as they lie */
} row_unit;

/* The positions at hand, [begin, begin + BLOCK); below, positions and limits are relative to begin. */
typedef struct {
    int64_t begin;
    int32_t low, high, from;              /* the row of token t sees positions [t + low, t + high), from the first one on when t < from */
    bool sinks;                           /* it sees [0, high) when t >= from, else none */
    const uint16_t *keys[BLOCK / TILE];   /* TILE rows each, `width` apart */
    const uint16_t *values[BLOCK / TILE]; /* as they lie in the page, `d` apart */
    uint64_t odd;                         /* positions with values that are not finite, which `turned` holds as zeros */
} key_block;

static int64_t unit_panels(const attention_job *job) { return round_up(job->prompt_tokens * job->group, TILE) / TILE; }

static int64_t padded(const attention_job *job) { return round_up(job->args->kv->head_dim, STEP); }

static int64_t prompt_scratch(const attention_job *job)
{
    const int64_t width = padded(job), panel_floats = TILE * (width / 2 + width + 3);
    return unit_panels(job) * panel_floats + 2 * BLOCK * TILE + 3 * BLOCK * width / 2;
}

static row_unit carve(const attention_job *job, const unit *u, int thread)
{
    row_unit b = {.thread = thread, .rows = u->count * job->group, .d = job->args->kv->head_dim, .width = padded(job)};
    const int64_t panels = unit_panels(job), block = BLOCK * b.width / 2;
    b.panels = round_up(b.rows, TILE) / TILE;
    b.sums = scratch_of(job, thread);
    b.base = b.sums + panels * b.width * TILE;
    b.total = b.base + panels * TILE;
    b.token = (int32_t *)(b.total + panels * TILE);
    b.q = (uint32_t *)(b.token + panels * TILE);
    b.scores = (float *)(b.q + panels * b.width / 2 * TILE);
    b.turned = (uint32_t *)(b.scores + 2 * BLOCK * TILE);
    b.own_keys = (uint16_t *)(b.turned + block);
    b.own_values = b.own_keys + 2 * block;
    return b;
}

/* Where the unit's r-th row begins in q or out, whose rows are `ld` apart. */
static int64_t row_at(const attention_job *job, const unit *u, int64_t r, int64_t ld)
{
    const int64_t head = u->head * job->group + r % job->group;
    return (u->item->row + u->first + r / job->group) * ld + head * job->args->kv->head_dim;
}

/* STEP numbers of a row, of which `left` exist, times scale and rounded: a lane for each pair. */
static vf rounded_pairs(const float *q, int64_t left, vf scale)
{
    const vf low = v_load_part(q, left > 0 ? left : 0), high = left > VL ? v_load_part(q + VL, left - VL) : v_zero();
    return (vf)_mm512_cvtne2ps_pbh(v_mul(scale, high), v_mul(scale, low));
}

static void load_queries(const attention_job *job, const unit *u, const row_unit *b)
{
    const lco_attention_args *a = job->args;
    const vf scale = v_set(a->scale * 1.44269504f); /* scores as exponents of 2 */
    for (int64_t panel = 0; panel < b->panels; panel++) {
        for (int64_t i = 0; i < b->width; i += STEP) {
            vf square[TILE];
            for (int64_t j = 0, r = panel * TILE; j < TILE; j++, r++)
                square[j] = r < b->rows ? rounded_pairs(a->q + row_at(job, u, r, a->ld_q) + i, b->d - i, scale) : v_zero();
            v_transpose(square);
            for (int64_t j = 0; j < TILE; j++)
                v_store((float *)b->q + (panel * b->width / 2 + i / 2 + j) * TILE, square[j]);
        }
        for (int64_t i = 0; i < b->width; i++)
            v_store(b->sums + (panel * b->width + i) * TILE, v_zero());
        for (int64_t j = 0, r = panel * TILE; j < TILE; j++, r++)
            b->token[r] = (int32_t)((r < b->rows ? r : b->rows - 1) / job->group);
        v_store(b->base + panel * TILE, v_set(-INFINITY));
        v_store(b->total + panel * TILE, v_zero());
    }
}

/* Rows [low, high) of TILE rows, zeros in place of the others; with `finite` also in place of numbers that are not, whose rows are returned
 * (a bit for each). */
static uint64_t copy_rows(uint16_t *to, const uint16_t *from, const row_unit *b, int64_t low, int64_t high, bool finite)
{
    const __m512i exponent = _mm512_set1_epi16(0x7F80);
    uint64_t odd = 0;
    for (int64_t r = 0; r < TILE; r++) {
        for (int64_t i = 0; i < b->width; i += STEP) {
            const int64_t n = r < low || r >= high || i >= b->d ? 0 : b->d - i < STEP ? b->d - i : STEP;
            __m512i x = _mm512_maskz_loadu_epi16((__mmask32)(((uint64_t)1 << n) - 1), from + r * b->d + i);
            if (finite) {
                const __mmask32 wild = _mm512_cmpeq_epi16_mask(_mm512_and_si512(x, exponent), exponent);
                x = _mm512_mask_mov_epi16(x, wild, _mm512_setzero_si512());
                odd |= (uint64_t)(wild != 0) << r;
            }
            _mm512_store_si512(to + r * b->width + i, x);
        }
    }
    return odd;
}

/* Values of STEP positions turned over, from [position][width] in two runs of TILE rows to [width][pairs of positions]: 8 head dimensions at a
 * time. A quarter of a vector takes one of 8 positions, within which pairs, fours and eights of positions are brought together. */
static void turn_values(uint32_t *turned, const uint16_t *first, const uint16_t *second, int64_t width)
{
    for (int64_t i = 0; i < width; i += 8) {
        __m512i x[8], pairs[8];
        for (int64_t t = 0; t < 8; t++) {
            x[t] = _mm512_castsi128_si512(_mm_loadu_si128((const __m128i *)(first + t * width + i)));
            x[t] = _mm512_inserti32x4(x[t], _mm_loadu_si128((const __m128i *)(first + (t + 8) * width + i)), 1);
            x[t] = _mm512_inserti32x4(x[t], _mm_loadu_si128((const __m128i *)(second + t * width + i)), 2);
            x[t] = _mm512_inserti32x4(x[t], _mm_loadu_si128((const __m128i *)(second + (t + 8) * width + i)), 3);
        }
        for (int t = 0; t < 8; t += 2) {
            pairs[t] = _mm512_unpacklo_epi16(x[t], x[t + 1]);
            pairs[t + 1] = _mm512_unpackhi_epi16(x[t], x[t + 1]);
        }
        for (int half = 0; half < 2; half++) { /* 4 head dimensions */
            const __m512i a = _mm512_unpacklo_epi32(pairs[half], pairs[2 + half]), b = _mm512_unpackhi_epi32(pairs[half], pairs[2 + half]);
            const __m512i c = _mm512_unpacklo_epi32(pairs[4 + half], pairs[6 + half]),
                          d = _mm512_unpackhi_epi32(pairs[4 + half], pairs[6 + half]);
            uint32_t *to = turned + (i + 4 * half) * TILE;
            _mm512_store_si512(to, _mm512_unpacklo_epi64(a, c));
            _mm512_store_si512(to + TILE, _mm512_unpackhi_epi64(a, c));
            _mm512_store_si512(to + 2 * TILE, _mm512_unpacklo_epi64(b, d));
            _mm512_store_si512(to + 3 * TILE, _mm512_unpackhi_epi64(b, d));
        }
    }
}

/* The g-th TILE positions of the block, of which rows see [from, to), maybe none: nothing else is read. They never cross a page. Values that
 * some row does not see are copied even where they are whole. */
static const uint16_t *stage_run(const attention_job *job, const unit *u, const row_unit *b, key_block *k, int64_t g, int64_t from,
                                 int64_t to, bool all_see_all)
{
    const lco_kv_view *kv = job->args->kv;
    const int64_t t = k->begin + g * TILE;
    uint16_t *own_keys = b->own_keys + g * TILE * b->width, *own_values = b->own_values + g * TILE * b->width;
    if (from >= to) {
        copy_rows(own_keys, own_keys, b, 0, 0, false);
        copy_rows(own_values, own_values, b, 0, 0, false);
        k->keys[g] = own_keys;
        return own_values;
    }
    const int64_t page = t / kv->page_size, last = (u->item->pos + u->item->len - 1) / kv->page_size;
    const int32_t next = page < last ? u->item->table[page + 1] : -1;
    const uint8_t *slice = lco_kv_read(kv, b->thread, u->item->table[page], next, u->head, 1);
    const int64_t offset = t % kv->page_size * b->d;
    const bool as_it_lies = from == 0 && to == TILE && b->d == b->width;
    k->keys[g] = (const uint16_t *)lco_read_codes(kv, slice, LCO_KEY, u->head) + offset;
    k->values[g] = (const uint16_t *)lco_read_codes(kv, slice, LCO_VALUE, u->head) + offset;
    if (!as_it_lies) {
        copy_rows(own_keys, k->keys[g], b, from, to, false);
        k->keys[g] = own_keys;
    }
    if (as_it_lies && all_see_all)
        return k->values[g];
    k->odd |= copy_rows(own_values, k->values[g], b, from, to, true) << (g * TILE);
    return own_values;
}

/* The row of this token sees positions [low, high) of the block. */
ALWAYS_INLINE int32_t row_low(const key_block *k, int32_t token) { return k->sinks || token < k->from ? -FAR : token + k->low; }

ALWAYS_INLINE int32_t row_high(const key_block *k, int32_t token) { return !k->sinks ? token + k->high : token >= k->from ? k->high : 0; }

static int32_t clip(int64_t a) { return a < -FAR ? -FAR : a > FAR ? FAR : (int32_t)a; }

/* Keys and values of the block from `begin` on, of which the unit's rows see positions [first, end): as sinks, or from their windows on. */
static key_block stage_block(const attention_job *job, const unit *u, const row_unit *b, int64_t begin, int64_t first, int64_t end,
                             bool sinks)
{
    const int64_t window = job->args->window, position = u->item->pos + u->first;
    key_block k = {.begin = begin, .sinks = sinks, .low = clip(position - window + 1 - begin)};
    k.high = clip(sinks ? end - begin : position + 1 - begin);
    k.from = window > 0 ? clip(job->args->sinks + window - position) : FAR; /* before it sinks and window are one run */
    const int32_t last = (int32_t)u->count - 1;
    const bool all_see_all = row_high(&k, 0) >= BLOCK && row_low(&k, last) <= 0;
    for (int64_t step = 0; step < BLOCK / STEP; step++) {
        const uint16_t *values[2];
        const int64_t at = begin + step * STEP;
        if (at + STEP <= first || at >= end)
            continue;
        for (int64_t j = 0; j < 2; j++) {
            const int64_t t = at + j * TILE, from = first > t ? first - t : 0, to = end - t < TILE ? end - t : TILE;
            values[j] = stage_run(job, u, b, &k, 2 * step + j, from, to, all_see_all);
        }
        turn_values(b->turned + step * b->width * TILE, values[0], values[1], b->width);
    }
    return k;
}

/* scores[panels][positions of the step][rows]; `panels` is 1 or 2. Tiles 0..3: C, [2 of positions][2 panels]; 4, 5: A; 6, 7: B. */
ALWAYS_INLINE void step_scores(const row_unit *b, const key_block *k, int64_t panel, const int panels, int64_t step)
{
    const int64_t stride = b->width * 2;
    const uint32_t *q = b->q + panel * b->width / 2 * TILE, *next = q + b->width / 2 * TILE;
    float *scores = b->scores + step * STEP * TILE;
    _tile_zero(0);
    _tile_zero(2);
    if (panels == 2) {
        _tile_zero(1);
        _tile_zero(3);
    }
    for (int64_t i = 0; i < b->width; i += STEP) {
        _tile_loadd(4, k->keys[2 * step] + i, stride);
        _tile_loadd(6, q + i / 2 * TILE, TILE_STRIDE);
        _tile_loadd(5, k->keys[2 * step + 1] + i, stride);
        _tile_dpbf16ps(0, 4, 6);
        _tile_dpbf16ps(2, 5, 6);
        if (panels == 2) {
            _tile_loadd(7, next + i / 2 * TILE, TILE_STRIDE);
            _tile_dpbf16ps(1, 4, 7);
            _tile_dpbf16ps(3, 5, 7);
        }
    }
    _tile_stored(0, scores, TILE_STRIDE);
    _tile_stored(2, scores + TILE * TILE, TILE_STRIDE);
    if (panels == 2) {
        _tile_stored(1, scores + BLOCK * TILE, TILE_STRIDE);
        _tile_stored(3, scores + (BLOCK + TILE) * TILE, TILE_STRIDE);
    }
}

/* sums += values^T . p over steps [first, end), for STEP head dimensions from `i` on. Tiles as above, with head dimensions for positions. */
ALWAYS_INLINE void add_values(const row_unit *b, int64_t panel, const int panels, int64_t i, int64_t first, int64_t end)
{
    float *sums = b->sums + (panel * b->width + i) * TILE, *next = sums + b->width * TILE;
    _tile_loadd(0, sums, TILE_STRIDE);
    _tile_loadd(2, sums + TILE * TILE, TILE_STRIDE);
    if (panels == 2) {
        _tile_loadd(1, next, TILE_STRIDE);
        _tile_loadd(3, next + TILE * TILE, TILE_STRIDE);
    }
    for (int64_t step = first; step < end; step++) {
        const uint32_t *values = b->turned + (step * b->width + i) * TILE;
        const float *p = b->scores + step * TILE * TILE;
        _tile_loadd(4, values, TILE_STRIDE);
        _tile_loadd(6, p, TILE_STRIDE);
        _tile_loadd(5, values + TILE * TILE, TILE_STRIDE);
        _tile_dpbf16ps(0, 4, 6);
        _tile_dpbf16ps(2, 5, 6);
        if (panels == 2) {
            _tile_loadd(7, p + BLOCK * TILE, TILE_STRIDE);
            _tile_dpbf16ps(1, 4, 7);
            _tile_dpbf16ps(3, 5, 7);
        }
    }
    _tile_stored(0, sums, TILE_STRIDE);
    _tile_stored(2, sums + TILE * TILE, TILE_STRIDE);
    if (panels == 2) {
        _tile_stored(1, next, TILE_STRIDE);
        _tile_stored(3, next + TILE * TILE, TILE_STRIDE);
    }
}

/* 2^a within 3e-6 of itself, a fraction of what rounding it to bfloat16 costs; 0 below 2^-150; NaN stays NaN (max gives its second operand). */
static inline vf power_of_two(vf a)
{
    a = v_max(v_set(-200.0f), a);
    const vf n = _mm512_roundscale_ps(a, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC), r = v_sub(a, n);
    vf p = v_fma(v_set(9.57010221e-3f), r, v_set(5.59178591e-2f));
    p = v_fma(p, r, v_set(0.240247443f));
    p = v_fma(p, r, v_set(0.693121791f));
    return _mm512_scalef_ps(v_fma(p, r, v_set(0.999999285f)), n);
}

/* Both to bfloat16, the second in the upper half of each lane: nearest, ties away from zero. A NaN of the unit's own making or out of
 * bfloat16 numbers has zeros below, so that the addition does not carry it away. */
static inline __m512i round_pair(vf first, vf second)
{
    const __m512i half = _mm512_set1_epi32(0x8000);
    const __m512i low = _mm512_add_epi32(_mm512_castps_si512(first), half), high = _mm512_add_epi32(_mm512_castps_si512(second), half);
    return _mm512_mask_mov_epi16(_mm512_srli_epi32(low, 16), 0xAAAAAAAA, high);
}

/* The largest score of each lane over positions [first, end), whole steps; never NaN (max gives its second operand). */
static vf largest_scores(const float *scores, int64_t first, int64_t end)
{
    vf top[4];
    for (int j = 0; j < 4; j++)
        top[j] = v_set(-INFINITY);
    for (int64_t t = first; t < end; t += 4)
        for (int j = 0; j < 4; j++)
            top[j] = v_max(v_load(scores + (t + j) * TILE), top[j]);
    return v_max(v_max(top[0], top[1]), v_max(top[2], top[3]));
}

/* Minus infinity for positions that a row does not see. */
static void mask_scores(float *scores, const int32_t *token, const key_block *k, int64_t first, int64_t end)
{
    const __m512i tokens = _mm512_load_si512(token);
    const __mmask16 whole = _mm512_cmplt_epi32_mask(tokens, _mm512_set1_epi32(k->from));
    const __m512i low = _mm512_mask_mov_epi32(_mm512_add_epi32(tokens, _mm512_set1_epi32(k->low)), whole, _mm512_set1_epi32(-FAR));
    const __m512i high = _mm512_add_epi32(tokens, _mm512_set1_epi32(k->high)), none = _mm512_setzero_si512();
    const __m512i stop = k->sinks ? _mm512_mask_mov_epi32(_mm512_set1_epi32(k->high), whole, none) : high;
    const __m512i start = k->sinks ? none : low;
    for (int64_t t = first; t < end; t++) {
        const __m512i at = _mm512_set1_epi32((int)t);
        const __mmask16 seen = _mm512_mask_cmplt_epi32_mask(_mm512_cmple_epi32_mask(start, at), at, stop);
        v_store(scores + t * TILE, _mm512_mask_mov_ps(v_set(-INFINITY), seen, v_load(scores + t * TILE)));
    }
}

/* Scores of positions [first, end), whole steps, become p in pairs; the panel's sums so far are rescaled where their base rises. */
static void block_weights(const row_unit *b, int64_t panel, float *scores, int64_t first, int64_t end)
{
    float *base = b->base + panel * TILE, *total = b->total + panel * TILE, *sums = b->sums + panel * b->width * TILE;
    const vf top = largest_scores(scores, first, end), old = v_load(base);
    const __mmask16 risen = _mm512_cmp_ps_mask(top, v_add(old, v_set(SLACK)), _CMP_GT_OQ);
    const vf now = _mm512_mask_mov_ps(old, risen, top);
    const __mmask16 empty = _mm512_cmp_ps_mask(now, v_set(-INFINITY), _CMP_EQ_OQ); /* seen nothing yet: 2^-inf, not 2^NaN */
    const vf from = _mm512_mask_mov_ps(now, empty, v_zero());
    const __m512bh ones = (__m512bh)_mm512_set1_epi32(0x3F803F80);
    vf sum = v_zero();
    for (int64_t t = first; t < end; t += 2) {
        const vf even = power_of_two(v_sub(v_load(scores + t * TILE), from));
        const vf odd = power_of_two(v_sub(v_load(scores + (t + 1) * TILE), from));
        const __m512i pair = round_pair(even, odd);
        _mm512_store_si512(scores + t / 2 * TILE, pair);
        sum = _mm512_dpbf16_ps(sum, (__m512bh)pair, ones);
    }
    if (_mm512_mask_cmp_ps_mask(risen, old, v_set(-INFINITY), _CMP_NEQ_OQ) != 0) {
        const vf factor = _mm512_mask_mov_ps(v_set(1.0f), risen, power_of_two(v_sub(old, from)));
        v_store(total, v_mul(factor, v_load(total)));
        for (int64_t i = 0; i < b->width; i++)
            v_store(sums + i * TILE, v_mul(factor, v_load(sums + i * TILE)));
    }
    v_store(total, v_add(v_load(total), sum));
    v_store(base, now);
}

/* Values that are not finite reach the rows that see them: what the tiles left out. */
static void add_odd_values(const row_unit *b, const key_block *k, int64_t panel, const float *pairs)
{
    const int32_t *token = b->token + panel * TILE;
    for (uint64_t odd = k->odd; odd != 0; odd &= odd - 1) {
        const int t = __builtin_ctzll(odd);
        const uint16_t *value = k->values[t / TILE] + t % TILE * b->d, *p = (const uint16_t *)(pairs + t / 2 * TILE) + t % 2;
        for (int lane = 0; lane < TILE; lane++) {
            if (t < row_low(k, token[lane]) || t >= row_high(k, token[lane]))
                continue;
            for (int64_t i = 0; i < b->d; i++)
                if ((value[i] & 0x7F80) == 0x7F80)
                    b->sums[(panel * b->width + i) * TILE + lane] += lco_bf16_to_f32(p[2 * lane]) * lco_bf16_to_f32(value[i]);
        }
    }
}

/* One panel or two against the block. */
ALWAYS_INLINE void attend_panels(const row_unit *b, const key_block *k, int64_t panel, const int panels)
{
    const int32_t *token = b->token + panel * TILE;
    const int64_t low = row_low(k, token[0]), high = row_high(k, token[panels * TILE - 1]);
    const int64_t first = low > 0 ? low / STEP : 0, end = high < BLOCK ? (high + STEP - 1) / STEP : BLOCK / STEP;
    if (low >= BLOCK || high <= 0)
        return;
    FENCE();
    for (int64_t step = first; step < end; step++)
        step_scores(b, k, panel, panels, step);
    FENCE();
    for (int j = 0; j < panels; j++) {
        float *scores = b->scores + j * BLOCK * TILE;
        if (row_low(k, token[(j + 1) * TILE - 1]) > first * STEP || row_high(k, token[j * TILE]) < end * STEP)
            mask_scores(scores, token + j * TILE, k, first * STEP, end * STEP);
        block_weights(b, panel + j, scores, first * STEP, end * STEP);
    }
    FENCE();
    for (int64_t i = 0; i < b->width; i += STEP)
        add_values(b, panel, panels, i, first, end);
    FENCE();
    for (int j = 0; j < panels && k->odd != 0; j++)
        add_odd_values(b, k, panel + j, b->scores + j * BLOCK * TILE);
}

static void store_rows(const attention_job *job, const unit *u, const row_unit *b)
{
    const lco_attention_args *a = job->args;
    for (int64_t panel = 0; panel < b->panels; panel++) {
        const vf total = v_load(b->total + panel * TILE);
        for (int64_t i = 0; i < b->d; i += TILE) {
            vf square[TILE];
            for (int64_t j = 0; j < TILE; j++) /* adding 0 makes one of both zeros: a row of zeros more or less may have turned -0 to 0 */
                square[j] = v_add(v_div(v_load(b->sums + (panel * b->width + i + j) * TILE), total), v_zero());
            v_transpose(square);
            for (int64_t j = 0, r = panel * TILE; j < TILE && r < b->rows; j++, r++)
                v_store_part(a->out + row_at(job, u, r, a->ld_out) + i, square[j], b->d - i);
        }
    }
}

/* Every row against positions [first, end): sinks, or what follows. */
static void attend_range(const attention_job *job, const unit *u, const row_unit *b, int64_t first, int64_t end, bool sinks)
{
    for (int64_t begin = first / BLOCK * BLOCK; begin < end; begin += BLOCK) {
        const key_block k = stage_block(job, u, b, begin, first, end, sinks);
        int64_t panel = 0;
        for (; panel + 2 <= b->panels; panel += 2)
            attend_panels(b, &k, panel, 2);
        if (panel < b->panels)
            attend_panels(b, &k, panel, 1);
    }
}

static void prompt_unit(const attention_job *job, const unit *u, int thread)
{
    const int64_t first_pos = u->item->pos + u->first, end = first_pos + u->count;
    const row_unit b = carve(job, u, thread);
    load_queries(job, u, &b);
    tiles_begin();
    attend_range(job, u, &b, 0, seen_at(job->args, end - 1).sinks, true);
    attend_range(job, u, &b, seen_at(job->args, first_pos).first, end, false);
    tiles_end();
    store_rows(job, u, &b);
}

lco_status lco_amx_attention(const lco_attention_args *args)
{
    return args->kv->dtype == LCO_BF16 ? attention(args, false) : lco_avx512_attention(args);
}
