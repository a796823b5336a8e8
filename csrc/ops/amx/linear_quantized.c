/* linear_quantized with AMX: from 16 rows of x on by tiles of bytes, for which codes are the B operand as they lie once nibbles are apart; fewer
 * rows by vectors. Integer sums are exact, so both give the same bits.
 *
 * A tile product adds A [16 rows of x][chunk inputs] of signed bytes . B [chunk / 4][16 outputs][4 inputs] of unsigned ones to C [16][16] of int32:
 *   tiles 0, 1: C of plane high and outputs 0..15, 16..31;  2, 3: of plane low;  4, 5: A of either plane;  6, 7: B
 * C is complete after a block, and is scaled by the vector unit while the tiles of the next 16 rows multiply. */
#include "../simd/linear_quantized.h"
#include "../impl.h"
#include "tiles.h"

#define FEWEST_ROWS 16
#define C_INTS 256

/* Inputs of a tile: all of a block, or half of it; 0 when neither is at most 64 and a multiple of 8. */
static int64_t chunk_of(const lco_qweight *q)
{
    if (q->block <= 64)
        return q->block;
    return q->block % 16 == 0 ? q->block / 2 : 0;
}

static void configure(int64_t chunk)
{
    tile_shape shapes[8];
    for (int i = 0; i < 8; i++)
        shapes[i] = (tile_shape){.rows = TILE, .row_bytes = i < 4 || i > 5 ? TILE_STRIDE : (int)chunk};
    shapes[6].rows = shapes[7].rows = (int)chunk / 4;
    tiles_configure(shapes);
}

/* The even and the odd inputs of 4-bit codes as bytes: [8 inputs][part][32 outputs][4 bytes], as 8-bit codes lie. */
static void spread_nibbles(uint8_t *out, const uint8_t *codes, int64_t eights)
{
    const __m512i low = _mm512_set1_epi8(15);
    for (int64_t e = 0; e < eights; e++, codes += 128, out += 256)
        for (int half = 0; half < 2; half++) {
            const __m512i both = _mm512_loadu_si512(codes + half * 64);
            _mm512_store_si512(out + half * 64, _mm512_and_si512(both, low));
            _mm512_store_si512(out + 128 + half * 64, _mm512_and_si512(_mm512_srli_epi16(both, 4), low));
        }
}

/* C of one block and 16 rows: [plane and half][16][16]. */
static void multiply_block(int32_t *c, const int8_t *a, const uint8_t *b, int64_t block, int64_t chunk, const int planes)
{
    _tile_zero(0);
    _tile_zero(1);
    if (planes == 2) {
        _tile_zero(2);
        _tile_zero(3);
    }
    for (int64_t i = 0; i < block; i += chunk) {
        _tile_loadd(4, a + 16 * i, chunk);
        _tile_loadd(6, b + 32 * i, 128);
        _tile_loadd(7, b + 32 * i + 64, 128);
        _tile_dpbsud(0, 4, 6);
        _tile_dpbsud(1, 4, 7);
        if (planes == 2) {
            _tile_loadd(5, a + 16 * (block + i), chunk);
            _tile_dpbsud(2, 5, 6);
            _tile_dpbsud(3, 5, 7);
        }
    }
    _tile_stored(0, c, TILE_STRIDE);
    _tile_stored(1, c + C_INTS, TILE_STRIDE);
    if (planes == 2) {
        _tile_stored(2, c + 2 * C_INTS, TILE_STRIDE);
        _tile_stored(3, c + 3 * C_INTS, TILE_STRIDE);
    }
}

/* A block's C that waits to be scaled. */
typedef struct {
    const int32_t *c;
    const uint8_t *block;
    int64_t b, row;
} waiting_sums;

ALWAYS_INLINE void scale_sums(const waiting_sums *w, const block_scales *scales, int neutral, const x_tile *x, float *sums,
                              const int planes)
{
    const vf scale[2] = {load_scales(w->block + scales->scales, 0, scales->dtype),
                         load_scales(w->block + scales->scales, 16, scales->dtype)};
    vf offset[2] = {v_zero(), v_zero()};
    if (scales->kind != LCO_OFFSET_NONE)
        for (int half = 0; half < 2; half++)
            offset[half] = load_offsets(scales, w->block, 16 * half, scale[half]);
    for (int r = 0; r < TILE; r++) {
        const int64_t i = w->b * x->held + w->row + r;
        const __m512i correction = _mm512_set1_epi32(neutral * x->total[i]);
        const vf x_scale = v_set(x->scale[i]), x_sum = v_set(x->sum[i]);
        for (int half = 0; half < 2; half++) {
            float *to = sums + (w->row + r) * LCO_PANEL_ROWS + half * 16;
            __m512i sum = _mm512_load_si512(w->c + half * C_INTS + r * TILE);
            if (planes == 2)
                sum = _mm512_add_epi32(_mm512_slli_epi32(sum, 8), _mm512_load_si512(w->c + (2 + half) * C_INTS + r * TILE));
            vf tot = v_fma(_mm512_cvtepi32_ps(_mm512_sub_epi32(sum, correction)), v_mul(scale[half], x_scale), v_load(to));
            if (scales->kind != LCO_OFFSET_NONE)
                tot = v_fma(offset[half], x_sum, tot);
            v_store(to, tot);
        }
    }
}

ALWAYS_INLINE void product(const lco_qweight *q, const uint8_t *panel, const x_tile *x, float *sums, const int planes)
{
    _Alignas(64) uint8_t bytes[LCO_LARGEST_BLOCK * LCO_PANEL_ROWS];
    _Alignas(64) int32_t c[2][4 * C_INTS];
    const int64_t blocks = lco_qweight_blocks(q);
    const block_scales scales = scales_of(q);
    const int neutral = lco_qweight_neutral(q);
    const int8_t *codes = x->codes;
    waiting_sums waiting = {0};
    int turn = 0;
    memset(sums, 0, (size_t)x->held * LCO_PANEL_ROWS * sizeof *sums);
    configure(x->chunk);
    for (int64_t b = 0; b < blocks; b++, panel += lco_block_bytes(q)) {
        if (q->bits == 4)
            spread_nibbles(bytes, panel, q->block / 8);
        for (int64_t row = 0; row < x->held; row += TILE, codes += TILE * q->block * planes, turn ^= 1) {
            FENCE();
            multiply_block(c[turn], codes, q->bits == 4 ? bytes : panel, q->block, x->chunk, planes);
            FENCE();
            if (waiting.c != NULL)
                scale_sums(&waiting, &scales, neutral, x, sums, planes);
            waiting = (waiting_sums){.c = c[turn], .block = panel, .b = b, .row = row};
        }
    }
    scale_sums(&waiting, &scales, neutral, x, sums, planes);
    tiles_end();
}

static void panel_tiles(const lco_qweight *q, const uint8_t *panel, const x_tile *x, float *sums, bool ahead)
{
    (void)ahead;
    if (x->planes == 2)
        product(q, panel, x, sums, 2);
    else
        product(q, panel, x, sums, 1);
}

lco_status lco_amx_linear_quantized(const lco_linear_args *a)
{
    static const quantized_kernel KERNEL = {.product = panel_tiles, .chunk = chunk_of};
    if (a->m < FEWEST_ROWS)
        return lco_avx512_linear_quantized(a);
    for (int p = 0; p < a->n_parts; p++)
        if (chunk_of(a->part[p].w) == 0)
            return lco_avx512_linear_quantized(a);
    return linear_quantized(a, &KERNEL);
}
