#include <math.h>
#include <stdatomic.h>

#include "../base/convert.h"
#include "quant.h"

#define NB LCO_QUANT_BLOCK
#define RANGES 80 /* tried when the range is searched: the whole one, then a hundredth less each */
#define PIECE 4   /* rows a thread takes at a time */

typedef struct {
    const lco_sweep *sweep;
    int64_t begin, end;
    float *u;      /* [NB, NB] the block of U */
    float *minus;  /* [n, end - begin] errors e, negated */
    float *behind; /* [k - end, end - begin] U of the columns behind, a row for each of them */
    atomic_bool too_large;
} job;

typedef struct {
    float scale;
    int zero;
} grid;

/* The nearest float16, but at least its smallest number. */
static float scale_of(float range, int steps)
{
    const float scale = lco_f16_to_f32(lco_f32_to_f16(range / (float)steps));
    return scale > 0x1p-24f ? scale : 0x1p-24f;
}

static grid grid_of(const lco_sweep *s, float low, float high)
{
    const int top = (1 << s->bits) - 1;
    const float scale = scale_of(high - low, top);
    if (s->sym)
        return (grid){scale, 1 << (s->bits - 1)};
    const float zero = rintf(-low / scale);
    if (zero < (float)s->least_zero) /* nothing lies below 0 but what rounds to it: the rest of the codes is for what lies above */
        return (grid){scale_of(high - low, top - s->least_zero), s->least_zero};
    return (grid){scale, zero < (float)top ? (int)zero : top};
}

static int code_of(float w, grid g, int top)
{
    const float steps = w / g.scale, low = (float)-g.zero, high = (float)(top - g.zero);
    return (int)lrintf(!(steps > low) ? low : steps < high ? steps : high) + g.zero;
}

static double error_of(const lco_sweep *s, const float *w, int64_t n, grid g)
{
    double sum = 0;
    for (int64_t i = 0; i < n; i++)
        sum += powf(fabsf(w[i] - g.scale * (float)(code_of(w[i], g, (1 << s->bits) - 1) - g.zero)), s->exponent);
    return sum;
}

/* Scale and zero for weights w[n]. */
static grid find_grid(const lco_sweep *s, const float *w, int64_t n)
{
    float low = 0, high = 0;
    for (int64_t i = 0; i < n; i++) {
        low = w[i] < low ? w[i] : low;
        high = w[i] > high ? w[i] : high;
    }
    if (s->sym) {
        high = -low > high ? -low : high;
        low = -high;
    }
    if (low == high) {
        low = -1;
        high = 1;
    }
    grid best = grid_of(s, low, high);
    if (s->exponent <= 0)
        return best;
    double least = error_of(s, w, n, best);
    for (int i = 1; i < RANGES; i++) {
        const float shrink = 1 - (float)i / 100;
        const grid g = grid_of(s, low * shrink, high * shrink);
        const double error = error_of(s, w, n, g);
        if (error < least) {
            least = error;
            best = g;
        }
    }
    return best;
}

static void sweep_row(job *j, int64_t row)
{
    const lco_sweep *s = j->sweep;
    const int64_t width = j->end - j->begin;
    float *w = s->w + row * s->k, *scales = s->scales + row * s->groups;
    uint8_t *zeros = s->zeros + row * s->groups;
    for (int64_t i = j->begin; i < j->end; i++) {
        const int32_t group = s->group_of[i];
        if (s->find && (i == 0 || s->group_of[i - 1] != group)) {
            int64_t last = i + 1;
            while (last < s->k && s->group_of[last] == group)
                last++;
            const grid found = find_grid(s, w + i, last - i);
            if (found.scale >= 65504)
                atomic_store(&j->too_large, true);
            scales[group] = found.scale;
            zeros[group] = (uint8_t)found.zero;
        }
        const grid g = {scales[group], zeros[group]};
        const int code = code_of(w[i], g, (1 << s->bits) - 1);
        s->codes[row * s->k + i] = (uint8_t)code;
        if (s->factor == NULL)
            continue;
        const float *u = j->u + (i - j->begin) * NB;
        const float e = (w[i] - g.scale * (float)(code - g.zero)) / u[i - j->begin];
        s->loss[row] += (double)e * (double)e;
        j->minus[row * width + i - j->begin] = -e;
        for (int64_t c = i + 1; c < j->end; c++)
            w[c] -= e * u[c - j->begin];
    }
}

static void sweep_rows(void *ctx, int64_t begin, int64_t end, int thread)
{
    (void)thread;
    for (int64_t row = begin; row < end; row++)
        sweep_row(ctx, row);
}

/* U[i][c] for the columns i of the block. */
static void copy_behind(void *ctx, int64_t begin, int64_t end, int thread)
{
    (void)thread;
    const job *j = ctx;
    const int64_t k = j->sweep->k, width = j->end - j->begin;
    for (int64_t r = begin; r < end; r++) {
        const float *from = j->sweep->factor + (k - 1 - (j->end + r)) * k + k - 1 - j->begin;
        for (int64_t i = 0; i < width; i++)
            j->behind[r * width + i] = from[-i];
    }
}

static lco_status sweep_block(job *j, const lco_ops *ops, const lco_exec *exec)
{
    const lco_sweep *s = j->sweep;
    const int64_t width = j->end - j->begin, rest = s->k - j->end;
    if (s->factor != NULL) {
        j->u = lco_arena_take(exec->scratch, NB * NB * sizeof(float));
        j->minus = lco_arena_take(exec->scratch, (size_t)s->n * (size_t)width * sizeof(float));
        j->behind = lco_arena_take(exec->scratch, (size_t)(rest + 1) * (size_t)width * sizeof(float));
        if (j->u == NULL || j->minus == NULL || j->behind == NULL)
            return LCO_ENOMEM;
        for (int64_t i = 0; i < width; i++)
            for (int64_t c = i; c < width; c++)
                j->u[i * NB + c] = s->factor[(s->k - 1 - j->begin - c) * s->k + s->k - 1 - j->begin - i];
    }
    lco_pool_for(exec->pool, s->n, PIECE, sweep_rows, j);
    if (atomic_load(&j->too_large))
        return LCO_ENUMERIC;
    if (s->factor == NULL || rest == 0)
        return LCO_OK;
    lco_pool_for(exec->pool, rest, PIECE, copy_behind, j);
    lco_linear_args args = {.n_parts = 1, .accumulate = true, .x = j->minus, .m = s->n, .m_prompt = s->n, .k = width, .ld_x = width};
    args.part[0] = (lco_linear_part){.out = s->w + j->end, .ld_out = s->k, .w = j->behind, .dtype = LCO_F32, .n = rest};
    args.exec = exec;
    return ops->linear(&args);
}

lco_status lco_sweep_block(const lco_sweep *sweep, int64_t begin, int64_t end, const lco_ops *ops, const lco_exec *exec)
{
    const lco_mark mark = lco_arena_mark(exec->scratch);
    job j = {.sweep = sweep, .begin = begin, .end = end};
    lco_status status = sweep_block(&j, ops, exec);
    lco_arena_reset(exec->scratch, mark);
    return status;
}
