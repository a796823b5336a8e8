/* Tiles: 8 registers of 16 rows of 64 bytes. A product adds A [16][32 of bfloat16] . B [16 pairs][16] to C [16][16] of float32, where a pair is
 * two neighbours of the dimension that is summed over.
 *
 * gcc 12 does not know that tile loads read memory and that ldtilecfg reads 64 bytes: fences keep the stores before them in place. */
#ifndef LCO_OPS_AMX_TILES_H
#define LCO_OPS_AMX_TILES_H

#include <immintrin.h>
#include <stdint.h>

#define TILE 16 /* rows of a tile, and 32-bit units in one of its rows */
#define TILE_STRIDE (TILE * 4)
#define FENCE() __asm__ volatile("" ::: "memory")

typedef struct {
    int rows, row_bytes;
} tile_shape;

static inline void tiles_configure(const tile_shape shapes[8])
{
    struct {
        uint8_t palette, start_row, reserved[14];
        uint16_t row_bytes[16];
        uint8_t rows[16];
    } config = {.palette = 1};
    _Static_assert(sizeof config == 64, "ldtilecfg reads 64 bytes");
    for (int i = 0; i < 8; i++) {
        config.row_bytes[i] = (uint16_t)shapes[i].row_bytes;
        config.rows[i] = (uint8_t)shapes[i].rows;
    }
    FENCE();
    _tile_loadconfig(&config);
    FENCE();
}

/* All tiles 16 rows of 64 bytes. */
static inline void tiles_begin(void)
{
    const tile_shape whole = {TILE, TILE_STRIDE};
    const tile_shape shapes[8] = {whole, whole, whole, whole, whole, whole, whole, whole};
    tiles_configure(shapes);
}

static inline void tiles_end(void) { _tile_release(); }

#endif
