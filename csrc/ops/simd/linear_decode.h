/* Decode rows of `linear`: a few rows of x against the whole weight matrix, bound by reading it.
 *
 * A thread takes a run of weight rows and multiplies a group of them (streams) at once with up to DECODE_ROWS rows of x; further rows of x
 * find the weight rows in the cache. Each output is one chain of fused multiply-adds over k, lane by lane, closed by v_sum: its bits depend
 * on k alone.
 *
 * Weights are prefetched twice, far ahead into L2 and near into L1. Ahead of a position in a row lies the rest of that row, then the row of
 * the same stream in the next group. */
#ifndef LCO_OPS_SIMD_LINEAR_DECODE_H
#define LCO_OPS_SIMD_LINEAR_DECODE_H

#include "../ops.h"
#include "vec.h"

#define STREAMS 4                         /* weight rows at once */
#define SINGLE_STREAMS (VL == 16 ? 2 : 4) /* for one row of x: two are enough to hide the latency of 512-bit sums, and read best */
#define DECODE_ROWS (VL == 16 ? 4 : 2)    /* rows of x at once: STREAMS * DECODE_ROWS sums live in registers */
#define FAR_BYTES 8192                    /* prefetched ahead by all streams together, into L2 */
#define NEAR_BYTES 1024                   /* into L1 */
#define MIN_RUN_BYTES ((int64_t)16 << 10)
#define MAX_RUN_BYTES ((int64_t)512 << 10)

typedef struct {
    const lco_linear_args *args;
    int64_t run;                         /* weight rows an item covers */
    int64_t first[LCO_LINEAR_PARTS + 1]; /* first item of each part, and the end */
} decode_job;

/* The place some bytes ahead of byte `at` of a row: at + skip, from byte `turn` on at + skip_after. */
typedef struct {
    int64_t skip, turn, skip_after;
} decode_ahead;

static decode_ahead look_ahead(int64_t bytes, int64_t row_bytes, int streams)
{
    const int64_t groups = bytes / row_bytes, rest = bytes % row_bytes, skip = groups * streams * row_bytes + rest;
    return (decode_ahead){.skip = skip, .turn = row_bytes - rest, .skip_after = skip + (streams - 1) * row_bytes};
}

typedef struct {
    decode_ahead far, near;
} decode_path;

static decode_path look_ahead_both(int64_t row_bytes, int streams)
{
    return (decode_path){look_ahead(FAR_BYTES / streams, row_bytes, streams), look_ahead(NEAR_BYTES / streams, row_bytes, streams)};
}

ALWAYS_INLINE const char *place_ahead(const char *row, int64_t at, const decode_ahead *ahead)
{
    return row + at + (at < ahead->turn ? ahead->skip : ahead->skip_after);
}

/* out[j, r] for `streams` weight rows from w_row on and `rows` rows of x from x_row on. */
ALWAYS_INLINE void decode_tile(const lco_linear_args *a, const lco_linear_part *part, lco_dtype dtype, const decode_path *path,
                               int64_t w_row, int64_t x_row, const int streams, const int rows)
{
    const int64_t k = a->k, size = (int64_t)lco_dtype_bytes(dtype), row_bytes = k * size, line = 64 / size;
    const char *w = (const char *)part->w + w_row * row_bytes;
    const float *x = a->x + x_row * a->ld_x;
    vf sum[STREAMS][4];
    for (int r = 0; r < streams; r++)
        for (int j = 0; j < rows; j++)
            sum[r][j] = v_zero();
    int64_t i = 0;
    for (; i + line <= k; i += line) {
        for (int r = 0; r < streams; r++) {
            _mm_prefetch(place_ahead(w + r * row_bytes, i * size, &path->far), _MM_HINT_T1);
            _mm_prefetch(place_ahead(w + r * row_bytes, i * size, &path->near), _MM_HINT_T0);
        }
#pragma GCC unroll 4
        for (int64_t u = i; u < i + line; u += VL) {
            vf xs[4];
            for (int j = 0; j < rows; j++)
                xs[j] = v_load(x + j * a->ld_x + u);
            for (int r = 0; r < streams; r++) {
                vf ws = v_load_as(w + r * row_bytes, u, dtype);
                for (int j = 0; j < rows; j++)
                    sum[r][j] = v_fma(ws, xs[j], sum[r][j]);
            }
        }
    }
    for (; i < k; i += VL) {
        const int64_t left = k - i < VL ? k - i : VL;
        for (int r = 0; r < streams; r++) {
            vf ws = v_load_as_n(w + r * row_bytes, i, left, dtype);
            for (int j = 0; j < rows; j++)
                sum[r][j] = v_fma(ws, v_load_n(x + j * a->ld_x + i, left), sum[r][j]);
        }
    }
    for (int j = 0; j < rows; j++) {
        float *out = part->out + (x_row + j) * part->ld_out + w_row;
        for (int r = 0; r < streams; r++) {
            float y = v_sum(sum[r][j]);
            if (part->bias != NULL)
                y += part->bias[w_row + r];
            out[r] = a->accumulate ? out[r] + y : y;
        }
    }
}

/* Weight rows [begin, end) against all decode rows, `streams` at a time; returns the first row it left over. */
ALWAYS_INLINE int64_t decode_groups(const lco_linear_args *a, const lco_linear_part *part, lco_dtype dtype, int64_t begin, int64_t end,
                                    const int streams)
{
    const decode_path path = look_ahead_both(a->k * (int64_t)lco_dtype_bytes(dtype), streams);
    int64_t j = begin;
    for (; j + streams <= end; j += streams) {
        for (int64_t row = a->m_prompt, rows; row < a->m; row += rows) {
            rows = a->m - row < DECODE_ROWS ? a->m - row : DECODE_ROWS;
            if (rows == 1)
                decode_tile(a, part, dtype, &path, j, row, streams, 1);
            else if (rows == 2)
                decode_tile(a, part, dtype, &path, j, row, streams, 2);
            else if (rows == 3)
                decode_tile(a, part, dtype, &path, j, row, streams, 3);
            else
                decode_tile(a, part, dtype, &path, j, row, streams, 4);
        }
    }
    return j;
}

ALWAYS_INLINE void decode_run(const lco_linear_args *a, const lco_linear_part *part, lco_dtype dtype, int64_t begin, int64_t end)
{
    if (a->m - a->m_prompt == 1)
        begin = decode_groups(a, part, dtype, begin, end, SINGLE_STREAMS);
    else
        begin = decode_groups(a, part, dtype, begin, end, STREAMS);
    decode_groups(a, part, dtype, begin, end, 1);
}

static void decode_task(void *ctx, int64_t begin, int64_t end, int thread)
{
    (void)thread;
    const decode_job *job = ctx;
    const lco_linear_args *a = job->args;
    for (int64_t item = begin; item < end; item++) {
        int p = 0;
        while (item >= job->first[p + 1])
            p++;
        const lco_linear_part *part = &a->part[p];
        int64_t from = (item - job->first[p]) * job->run, to = from + job->run < part->n ? from + job->run : part->n;
        if (part->dtype == LCO_BF16)
            decode_run(a, part, LCO_BF16, from, to);
        else if (part->dtype == LCO_F16)
            decode_run(a, part, LCO_F16, from, to);
        else
            decode_run(a, part, LCO_F32, from, to);
    }
}

/* Rows [m_prompt, m). Runs are long enough to stream and short enough that no thread waits long for the last one. */
static void linear_decode(const lco_linear_args *a)
{
    int64_t bytes = 0, rows = 0;
    for (int p = 0; p < a->n_parts; p++) {
        bytes += a->part[p].n * a->k * (int64_t)lco_dtype_bytes(a->part[p].dtype);
        rows += a->part[p].n;
    }
    int64_t run_bytes = bytes / (8 * lco_pool_size(a->exec->pool));
    run_bytes = run_bytes < MIN_RUN_BYTES ? MIN_RUN_BYTES : run_bytes > MAX_RUN_BYTES ? MAX_RUN_BYTES : run_bytes;
    decode_job job = {.args = a, .run = (run_bytes * rows / (bytes + 1) / STREAMS + 1) * STREAMS};
    for (int p = 0; p < a->n_parts; p++)
        job.first[p + 1] = job.first[p] + (a->part[p].n + job.run - 1) / job.run;
    lco_pool_for(a->exec->pool, job.first[a->n_parts], 1, decode_task, &job);
}

#endif
