/* Keys and queries turned by a Walsh-Hadamard matrix, so that a large channel is spread over all and one-byte codes lose less of the others. The
 * dot product of a key and a query does not change: the matrix is orthogonal but for a factor, a power of two, of which each side takes its share.
 *
 * Specification: everything is multiplied by 2^-s, with s = ceil(log2(n) / 2) for keys and floor(log2(n) / 2) for queries, n the largest power of
 * two that divides head_dim. In each run of n values, for h = 1, 2, 4, ... < n the pairs (a, b) that are h apart become (a + b, a - b), each
 * rounded to float32. After the rotation by position, before a key is rounded to bfloat16.
 *
 * (The idea of turning activations before they are quantised: Ashkboos et al., QuaRot, arXiv 2404.00456.) */
#ifndef LCO_BASE_HADAMARD_H
#define LCO_BASE_HADAMARD_H

#include <stdbool.h>
#include <stdint.h>

/* Values of a run. */
static inline int64_t lco_hadamard_run(int64_t head_dim) { return head_dim & -head_dim; }

/* 2^-s */
static inline float lco_hadamard_factor(int64_t head_dim, bool key)
{
    int bits = 0;
    for (int64_t n = lco_hadamard_run(head_dim); n > 1; n /= 2)
        bits++;
    float factor = 1;
    for (int i = 0; i < (bits + key) / 2; i++)
        factor *= 0.5f;
    return factor;
}

static inline void lco_hadamard(float *x, int64_t head_dim, float factor)
{
    for (int64_t i = 0; i < head_dim; i++)
        x[i] *= factor;
    for (int64_t h = 1; h < lco_hadamard_run(head_dim); h *= 2)
        for (int64_t i = 0; i < head_dim; i += 2 * h)
            for (int64_t j = i; j < i + h; j++) {
                const float a = x[j], b = x[j + h];
                x[j] = a + b;
                x[j + h] = a - b;
            }
}

#endif
