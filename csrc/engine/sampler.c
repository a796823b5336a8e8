/* Logits -> one token.
 *
 * Nothing is sorted: top_k and top_p need only the last candidate that is kept, which quickselect finds in linear time. Everything that
 * comes before it in the order (higher score, then lower id) is kept too. The draw then walks the kept ids in ascending order, so it does
 * not hinge on how the selection moved them. */
#include <float.h>
#include <math.h>
#include <string.h>

#include "../base/rng.h"
#include "internal.h"

#define LANES 8 /* independent sums, for the compiler to use vectors */
/* Scores are float32: a cumulated mass this close to top_p has reached it. */
#define MASS_SLACK 1e-6
#define EXP_LOWEST (-87.0f) /* e^-87 is the last before the numbers with fewer bits */

lco_status lco_sampling_check(const lco_sampling *s, lco_error *err)
{
    if (s->do_sample && !(s->temperature > 0.0f && isfinite(s->temperature)))
        return lco_fail(err, LCO_EINVAL, "temperature = %g, expected a number above 0 (or do_sample off)", (double)s->temperature);
    if (s->top_k < 0)
        return lco_fail(err, LCO_EINVAL, "top_k = %d, expected at least 0 (0: off)", s->top_k);
    if (!(s->top_p > 0.0f && s->top_p <= 1.0f))
        return lco_fail(err, LCO_EINVAL, "top_p = %g, expected a number above 0 and at most 1 (1: off)", (double)s->top_p);
    if (!(s->min_p >= 0.0f && s->min_p <= 1.0f))
        return lco_fail(err, LCO_EINVAL, "min_p = %g, expected 0 to 1 (0: off)", (double)s->min_p);
    if (!(s->repetition_penalty > 0.0f && isfinite(s->repetition_penalty)))
        return lco_fail(err, LCO_EINVAL, "repetition_penalty = %g, expected a number above 0 (1: off)", (double)s->repetition_penalty);
    return LCO_OK;
}

/* Floats as integers of the same order: -NaN < -infinity < ... < infinity < NaN. Compilers make vectors of minima and maxima of integers,
 * but not of floats, whose NaN they must respect. */
static inline int32_t order_of(float x)
{
    int32_t bits;
    memcpy(&bits, &x, sizeof bits);
    return bits ^ ((bits >> 31) & INT32_MAX);
}

static inline float from_order(int32_t order)
{
    order ^= (order >> 31) & INT32_MAX;
    float x;
    memcpy(&x, &order, sizeof x);
    return x;
}

/* e^x for x <= 0 within 2 units in the last place; below EXP_LOWEST as there, which no sum notices.
 * e^x = 2^n e^r with |r| <= ln 2 / 2, e^r by its series to r^7. */
static inline float exp_nonpositive(float x)
{
    const float shift = 12582912.0f; /* 1.5 * 2^23: adding it rounds to an integer that stands in the low bits */
    const int32_t order = order_of(x), lowest = order_of(EXP_LOWEST);
    float y = from_order(order > lowest ? order : lowest);
    float t = y * 1.44269504f + shift;
    float n = t - shift;
    float r = (y - n * 0.693145752f) - n * 1.42860677e-6f; /* ln 2 in two parts, the first exact in products with n */
    float p = 1.0f / 5040.0f;
    p = p * r + 1.0f / 720.0f;
    p = p * r + 1.0f / 120.0f;
    p = p * r + 1.0f / 24.0f;
    p = p * r + 1.0f / 6.0f;
    p = p * r + 0.5f;
    p = p * r + 1.0f;
    p = p * r + 1.0f;
    uint32_t bits;
    memcpy(&bits, &t, sizeof bits);
    bits = (bits + 127u) << 23; /* the shift's own bits leave at the top */
    float scale;
    memcpy(&scale, &bits, sizeof scale);
    return p * scale;
}

/* The largest of x; NaN when one of them is. */
static float peak_of(const float *x, int64_t n)
{
    int32_t most = INT32_MIN, least = INT32_MAX;
    for (int64_t i = 0; i < n; i++) {
        int32_t order = order_of(x[i]);
        most = order > most ? order : most;
        least = order < least ? order : least;
    }
    if (most > order_of(INFINITY) || least < order_of(-INFINITY))
        return NAN;
    return from_order(most);
}

/* Sum of e^(x - peak): exponentials by the block, so that both loops become vectors, then summed in double. */
static double exp_sum(const float *x, int64_t n, float peak)
{
    double sum[LANES] = {0};
    float e[16 * LANES];
    for (int64_t begin = 0; begin < n; begin += 16 * LANES) {
        const int64_t count = n - begin < 16 * LANES ? n - begin : 16 * LANES;
        for (int64_t i = 0; i < count; i++)
            e[i] = exp_nonpositive(x[begin + i] - peak);
        for (int64_t i = count; i < 16 * LANES; i++)
            e[i] = 0.0f;
        for (int i = 0; i < 16 * LANES; i += LANES)
            for (int j = 0; j < LANES; j++)
                sum[j] += (double)e[i + j];
    }
    for (int j = 1; j < LANES; j++)
        sum[0] += sum[j];
    return sum[0];
}

static int32_t first_with(const float *x, int32_t n, float value)
{
    int32_t i = 0;
    while (i < n - 1 && x[i] != value)
        i++;
    return i;
}

/* The order of candidates. */
static inline bool before(const float *score, int32_t a, int32_t b) { return (score[a] > score[b]) | ((score[a] == score[b]) & (a < b)); }

static double weight_of(const float *weight, const int32_t *ids, int64_t begin, int64_t end)
{
    if (weight == NULL)
        return (double)(end - begin);
    double sum = 0.0;
    for (int64_t i = begin; i < end; i++)
        sum += (double)weight[ids[i]];
    return sum;
}

/* Moves [low, high) so that those before a pivot come first, then the pivot; returns its place. */
static int64_t partition(const float *score, int32_t *ids, int64_t low, int64_t high, int64_t pivot_at)
{
    const int32_t pivot = ids[pivot_at];
    ids[pivot_at] = ids[high - 1];
    int64_t mid = low;
    for (int64_t i = low; i < high - 1; i++) { /* always swaps: a branch here would be mispredicted every other time */
        int32_t id = ids[i];
        ids[i] = ids[mid];
        ids[mid] = id;
        mid += before(score, id, pivot);
    }
    ids[high - 1] = ids[mid];
    ids[mid] = pivot;
    return mid;
}

/* Moves to the front of ids[n] the fewest first candidates whose weights (NULL: 1 each) reach `need` (> 0), and returns how many. */
static int64_t select_front(const float *score, const float *weight, int32_t *ids, int64_t n, double need)
{
    int64_t low = 0, high = n; /* the last one of the answer stands in [low, high) */
    double have = 0.0;         /* weight of [0, low) */
    uint64_t state = 1;
    while (high - low > 1) {
        state = state * 6364136223846793005u + 1442695040888963407u; /* a fixed pivot rule would have bad inputs */
        int64_t mid = partition(score, ids, low, high, low + (int64_t)((state >> 33) % (uint64_t)(high - low)));
        double reached = have + weight_of(weight, ids, low, mid);
        double with_pivot = reached + weight_of(weight, ids, mid, mid + 1);
        if (reached >= need) {
            high = mid;
        } else if (with_pivot >= need) {
            return mid + 1;
        } else {
            have = with_pivot;
            low = mid + 1;
        }
    }
    return high;
}

static int32_t last_of(const float *score, const int32_t *ids, int64_t n)
{
    int32_t last = ids[0];
    for (int64_t i = 1; i < n; i++)
        last = before(score, last, ids[i]) ? ids[i] : last;
    return last;
}

/* The last candidate that top_k and top_p keep; -1: all are kept. */
static int32_t last_kept(const lco_sample_args *args, const float *score, const float *weight)
{
    const lco_sampling *s = &args->sampling;
    int64_t n = args->vocab;
    const bool by_count = s->top_k > 0 && s->top_k < n, by_mass = s->top_p < 1.0f;
    if (!by_count && !by_mass)
        return -1;
    int32_t *ids = args->work_ids;
    for (int32_t i = 0; i < args->vocab; i++)
        ids[i] = i;
    if (by_count)
        n = select_front(score, NULL, ids, n, (double)s->top_k);
    if (by_mass) {
        double need = ((double)s->top_p - MASS_SLACK) * weight_of(weight, ids, 0, n);
        n = select_front(score, weight, ids, n, need > 0.0 ? need : DBL_MIN);
    }
    return last_of(score, ids, n);
}

/* `peak` is the largest of the scores and finite. Scores are taken relative to it, so that no temperature overflows. */
static int32_t draw(const lco_sample_args *args, const float *scores, float peak)
{
    const int32_t vocab = args->vocab;
    float *score = args->work, *weight = args->work + vocab;
    for (int32_t i = 0; i < vocab; i++)
        score[i] = (scores[i] - peak) / args->sampling.temperature;
    for (int32_t i = 0; i < vocab; i++)
        weight[i] = exp_nonpositive(score[i]);
    const int32_t last = last_kept(args, score, weight);
    const float least = args->sampling.min_p; /* relative to the most probable, whose weight is 1 */

    int32_t *ids = args->work_ids;
    int64_t n = 0;
    for (int32_t i = 0; i < vocab; i++) {
        ids[n] = i;
        n += (score[i] > EXP_LOWEST) & (weight[i] >= least) & (last < 0 || !before(score, last, i));
    }
    double target = lco_rng_uniform(args->sampling.seed, (uint64_t)args->position) * weight_of(weight, ids, 0, n);
    double sum = 0.0;
    for (int64_t i = 0; i < n - 1; i++) {
        sum += (double)weight[ids[i]];
        if (sum > target)
            return ids[i];
    }
    return ids[n - 1];
}

/* Penalty and bans, on a copy. */
static const float *adjusted(const lco_sample_args *args)
{
    const float penalty = args->sampling.repetition_penalty;
    if ((penalty == 1.0f || args->n_seen == 0) && args->n_banned == 0)
        return args->logits;
    float *score = args->work;
    memcpy(score, args->logits, (size_t)args->vocab * sizeof *score);
    for (int64_t i = 0; penalty != 1.0f && i < args->n_seen; i++) {
        float *s = &score[args->seen[i]];
        float changed = *s < 0.0f ? *s * penalty : *s / penalty;
        *s = changed < FLT_MAX ? changed : FLT_MAX; /* a tiny penalty must not make infinity */
    }
    for (int32_t i = 0; i < args->n_banned; i++)
        score[args->banned[i]] = -INFINITY;
    return score;
}

lco_status lco_sample(const lco_sample_args *args, int32_t *token, float *logprob, lco_error *err)
{
    const float *logits = args->logits;
    const float top = peak_of(logits, args->vocab);
    if (!isfinite(top)) {
        int32_t at = 0;
        while (at < args->vocab - 1 && !isnan(logits[at]) && logits[at] != INFINITY)
            at++;
        if (top == -INFINITY)
            return lco_fail(err, LCO_ENUMERIC, "all %d logits are -infinity, expected at least one finite number", args->vocab);
        return lco_fail(err, LCO_ENUMERIC, "the logit of token %d is %g, expected a finite number or -infinity", at, (double)logits[at]);
    }
    const float *scores = adjusted(args);
    const float peak = scores == logits ? top : peak_of(scores, args->vocab);
    if (peak == -INFINITY)
        return lco_fail(err, LCO_ENUMERIC,
                        "no token is left to take: %d ids are banned (eos before min_new_tokens) and the rest have logit -infinity",
                        args->n_banned);
    *token = args->sampling.do_sample ? draw(args, scores, peak) : first_with(scores, args->vocab, peak);
    *logprob = (float)((double)logits[*token] - (double)top - log(exp_sum(logits, args->vocab, top)));
    return LCO_OK;
}
