/* Random numbers without state: a draw is a function of (key, counter), so what a request draws depends on its seed and its position alone.
 * Philox 4x32 with 10 rounds (Salmon et al., "Parallel random numbers: as easy as 1, 2, 3", 2011). */
#ifndef LCO_BASE_RNG_H
#define LCO_BASE_RNG_H

#include <stdint.h>

typedef struct {
    uint32_t word[4];
} lco_rng_block;

static inline lco_rng_block lco_rng_philox(lco_rng_block counter, uint32_t key0, uint32_t key1)
{
    for (int round = 0; round < 10; round++) {
        uint64_t a = (uint64_t)0xD2511F53u * counter.word[0];
        uint64_t b = (uint64_t)0xCD9E8D57u * counter.word[2];
        counter = (lco_rng_block){
            {(uint32_t)(b >> 32) ^ counter.word[1] ^ key0, (uint32_t)b, (uint32_t)(a >> 32) ^ counter.word[3] ^ key1, (uint32_t)a}};
        key0 += 0x9E3779B9u;
        key1 += 0xBB67AE85u;
    }
    return counter;
}

/* Uniform in [0, 1), 53 bits. */
static inline double lco_rng_uniform(uint64_t seed, uint64_t position)
{
    lco_rng_block block =
        lco_rng_philox((lco_rng_block){{(uint32_t)position, (uint32_t)(position >> 32), 0, 0}}, (uint32_t)seed, (uint32_t)(seed >> 32));
    uint64_t bits = ((uint64_t)block.word[0] << 32 | block.word[1]) >> 11;
    return (double)bits * 0x1p-53;
}

#endif
