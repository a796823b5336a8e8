/* U by one Cholesky factorisation and one triangular inverse. With A = H read backwards (rows and columns) and A = L L^T, L^-1 read backwards is
 * U. Both run in place: L fills the lower triangle of the matrix; then Y = (L^-1)^T fills the upper one, block column by block column, while the
 * rows of L that it still needs are below. Diagonal blocks are factored and inverted in double, everything else is products of blocks. */
#include <math.h>
#include <string.h>

#include "quant.h"

#define NB LCO_QUANT_BLOCK
#define TILE 512 /* columns of the trailing matrix a pass */
#define PIECE 8

typedef struct {
    float *a; /* [k, k] */
    const double *h;
    const int32_t *order;
    int64_t k;
    double damp;
    const lco_ops *ops;
    const lco_exec *exec;
    double *block; /* [NB, NB] the diagonal block at work */
    float *square; /* [NB, NB] its inverse */
    float *panel;  /* [k, NB] */
    float *minus;  /* [k, NB] */
} job;

/* a = h backwards in the order of the sweep, with damp; lower triangle. */
static void gather(void *ctx, int64_t begin, int64_t end, int thread)
{
    (void)thread;
    const job *j = ctx;
    const int64_t k = j->k;
    for (int64_t r = begin; r < end; r++) {
        const int64_t from = j->order[k - 1 - r];
        for (int64_t c = 0; c < r; c++) {
            const int64_t other = j->order[k - 1 - c];
            j->a[r * k + c] = (float)(from > other ? j->h[from * k + other] : j->h[other * k + from]);
        }
        const double diagonal = j->h[from * k + from] + j->damp;
        j->a[r * k + r] = (float)(diagonal > 0 || diagonal < 0 ? diagonal : 1.0);
    }
}

static lco_status product(const job *j, const float *x, int64_t m, int64_t ld_x, const float *w, int64_t n, int64_t depth, float *out,
                          int64_t ld_out, bool accumulate)
{
    lco_linear_args args = {
        .n_parts = 1, .accumulate = accumulate, .x = x, .m = m, .m_prompt = m, .k = depth, .ld_x = ld_x, .exec = j->exec};
    args.part[0] = (lco_linear_part){.out = out, .ld_out = ld_out, .w = w, .dtype = LCO_F32, .n = n};
    return m > 0 && n > 0 ? j->ops->linear(&args) : LCO_OK;
}

/* block = Cholesky factor of the diagonal block at b; false when there is none. */
static bool factor_block(const job *j, int64_t b, int64_t n)
{
    double *l = j->block;
    for (int64_t r = 0; r < n; r++)
        for (int64_t c = 0; c <= r; c++) {
            double sum = (double)j->a[(b + r) * j->k + b + c];
            for (int64_t p = 0; p < c; p++)
                sum -= l[r * NB + p] * l[c * NB + p];
            if (r == c && !(sum > 0 && sum < INFINITY))
                return false;
            l[r * NB + c] = r == c ? sqrt(sum) : sum / l[c * NB + c];
        }
    return true;
}

/* square = the inverse of `block`; its transpose goes to the diagonal block of a, zeros below the diagonal. */
static void invert_block(const job *j, int64_t b, int64_t n)
{
    double *l = j->block;
    memset(j->square, 0, NB * NB * sizeof(float));
    for (int64_t c = 0; c < n; c++) {
        double column[NB];
        for (int64_t r = c; r < n; r++) {
            double sum = r == c ? 1.0 : 0.0;
            for (int64_t p = c; p < r; p++)
                sum -= l[r * NB + p] * column[p];
            column[r] = sum / l[r * NB + r];
            j->square[r * n + c] = (float)column[r];
        }
    }
    for (int64_t r = 0; r < n; r++)
        for (int64_t c = 0; c < n; c++)
            j->a[(b + r) * j->k + b + c] = c >= r ? j->square[c * n + r] : 0.0f;
}

/* L: a block column at a time. */
static lco_status cholesky(const job *j)
{
    const int64_t k = j->k;
    for (int64_t b = 0; b < k; b += NB) {
        const int64_t n = k - b < NB ? k - b : NB, rest = k - b - n;
        if (!factor_block(j, b, n))
            return LCO_ENUMERIC;
        invert_block(j, b, n);
        float *below = j->a + (b + n) * k + b;
        lco_status status = product(j, below, rest, k, j->square, n, n, j->panel, n, false);
        for (int64_t r = 0; status == LCO_OK && r < rest; r++)
            for (int64_t c = 0; c < n; c++) {
                below[r * k + c] = j->panel[r * n + c];
                j->minus[r * n + c] = -j->panel[r * n + c];
            }
        for (int64_t t = 0; status == LCO_OK && t < rest; t += TILE) {
            const int64_t columns = rest - t < TILE ? rest - t : TILE;
            float *out = j->a + (b + n + t) * k + b + n + t;
            status = product(j, j->minus + t * n, rest - t, n, j->panel + t * n, columns, n, out, k, true);
        }
        if (status != LCO_OK)
            return status;
    }
    return LCO_OK;
}

/* Y, block column i: Y[j][i] = -(sum over p of Y[j][p] L[i][p]) X[i][i]^T, for block rows j above i. */
static lco_status inverse(const job *j)
{
    const int64_t k = j->k;
    float *sums = j->minus;
    for (int64_t b = NB; b < k; b += NB) {
        const int64_t n = k - b < NB ? k - b : NB;
        for (int64_t r = 0; r < n; r++)
            for (int64_t c = 0; c < n; c++)
                j->square[r * n + c] = -j->a[(b + c) * k + b + r];
        for (int64_t at = 0; at < b; at += NB) {
            const int64_t depth = b - at;
            for (int64_t r = 0; r < n; r++)
                memcpy(j->panel + r * depth, j->a + (b + r) * k + at, (size_t)depth * sizeof(float));
            lco_status status = product(j, j->a + at * k + at, NB, k, j->panel, n, depth, sums, n, false);
            if (status == LCO_OK)
                status = product(j, sums, NB, n, j->square, n, n, j->a + at * k + b, k, false);
            if (status != LCO_OK)
                return status;
        }
    }
    return LCO_OK;
}

static lco_status run(job *j)
{
    const size_t square = NB * NB, panel = (size_t)j->k * NB;
    j->block = lco_arena_take(j->exec->scratch, square * sizeof(double));
    j->square = lco_arena_take(j->exec->scratch, square * sizeof(float));
    j->panel = lco_arena_take(j->exec->scratch, panel * sizeof(float));
    j->minus = lco_arena_take(j->exec->scratch, panel * sizeof(float));
    if (j->block == NULL || j->square == NULL || j->panel == NULL || j->minus == NULL)
        return LCO_ENOMEM;
    lco_pool_for(j->exec->pool, j->k, PIECE, gather, j);
    lco_status status = cholesky(j);
    return status == LCO_OK ? inverse(j) : status;
}

lco_status lco_inverse_factor(float *factor, const double *h, const int32_t *order, int64_t k, double damp, const lco_ops *ops,
                              const lco_exec *exec)
{
    const lco_mark mark = lco_arena_mark(exec->scratch);
    job j = {.a = factor, .h = h, .order = order, .k = k, .damp = damp, .ops = ops, .exec = exec};
    lco_status status = run(&j);
    lco_arena_reset(exec->scratch, mark);
    return status;
}
