/* Quantising a matrix by GPTQ (Frantar et al., 2022): sums over calibration activations, a factor of their inverse, and the sweep over the matrix.
 *
 * Columns (inputs) are rounded one after the other. What rounding a column loses in the outputs is made up for by the columns that are still to come, as
 * far as the activations X let them: with H = sum of x x^T and the upper triangular U of H^-1 = U^T U,
 *
 *     e = (w[i] - rounded(w[i])) / U[i][i],   w[j] -= e * U[i][j] for all j > i
 *
 * and the sum of e^2 is what the outputs lose altogether (squared, over all tokens). tests/quantizer/gptq_oracle.py is the specification.
 *
 * The products of large matrices go through the `linear` operator, so results are the same bits on any number of threads of one instruction set. */
#ifndef LCO_QUANT_QUANT_H
#define LCO_QUANT_QUANT_H

#include "../ops/ops.h"

#define LCO_QUANT_BLOCK 128 /* columns swept before the columns behind them are touched: products of matrices then do most of the work */

/* h[i][j] += sum over rows of x[.][i] * x[.][j] for j <= i: h is double [k, k], of which only the lower triangle is used; x float32 [m, k], rows
 * ld_x apart. Products of a call are summed in float32, calls in double. LCO_ENOMEM for want of scratch. */
lco_status lco_hessian_add(double *h, const float *x, int64_t m, int64_t k, int64_t ld_x, const lco_ops *ops, const lco_exec *exec);

/* The factor U of h (lower triangle, as above) with `damp` added to its diagonal, and 1 where that is 0; column i of U is input order[i].
 * Stored backwards: U[i][j] = factor[k - 1 - j][k - 1 - i], so that its upper triangle, diagonal included, is what counts; below it lies scratch.
 * LCO_ENUMERIC when the matrix is not positive definite, LCO_ENOMEM. */
lco_status lco_inverse_factor(float *factor, const double *h, const int32_t *order, int64_t k, double damp, const lco_ops *ops,
                              const lco_exec *exec);

typedef struct {
    uint8_t *codes;          /* [n, k] */
    float *scales;           /* [n, groups], numbers that float16 has */
    uint8_t *zeros;          /* [n, groups] */
    double *loss;            /* [n], the sums of e^2; added to */
    float *w;                /* [n, k], columns in the order of the sweep; changed on the way */
    const float *factor;     /* of lco_inverse_factor; NULL: round to nearest */
    const int32_t *group_of; /* [k] */
    int64_t n, k, groups;
    bool find;      /* scale and zero of a group are found when the sweep meets it (its columns are one run); else they are given */
    int bits;       /* 2 to 8 */
    bool sym;       /* zero points in the middle */
    int least_zero; /* the smallest zero point, 0 or 1 */
    float exponent; /* > 0: search the range that makes the sum of |error|^exponent smallest; 0: the whole range */
} lco_sweep;

/* Sweeps columns [begin, end), at most LCO_QUANT_BLOCK; calls go from the first column to the last. With `find`, a group that begins in the
 * block ends in it, unless it begins at `begin`. LCO_ENUMERIC when a scale is too large for float16, LCO_ENOMEM. */
lco_status lco_sweep_block(const lco_sweep *sweep, int64_t begin, int64_t end, const lco_ops *ops, const lco_exec *exec);

#endif
