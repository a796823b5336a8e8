/* The sampler: order of its steps, exact sets, its distribution, and a plain implementation to compare with. */
#include <math.h>
#include <stdlib.h>

#include "../../csrc/engine/internal.h"
#include "harness.h"

enum { MOST = 4096 };

static const lco_sampling PLAIN = {.temperature = 1.0f, .top_p = 1.0f, .repetition_penalty = 1.0f, .do_sample = true};

typedef struct {
    int32_t token;
    float logprob;
    lco_status status;
    lco_error err;
} outcome;

static outcome sample(lco_sample_args args)
{
    static float work[2 * MOST];
    static int32_t ids[MOST];
    args.work = work;
    args.work_ids = ids;
    outcome o = {.token = -1};
    o.status = lco_sample(&args, &o.token, &o.logprob, &o.err);
    return o;
}

/* Bit i is set when token i is drawn at one of many positions. */
static uint64_t drawn_set(lco_sample_args args)
{
    uint64_t set = 0;
    for (int64_t position = 0; position < 2000; position++) {
        args.position = position;
        outcome o = sample(args);
        CHECK(o.status == LCO_OK && o.token >= 0 && o.token < args.vocab, "token %d: %s", o.token, o.err.text);
        set |= (uint64_t)1 << o.token;
    }
    return set;
}

static void log_of(const double *p, int n, float *logits)
{
    for (int i = 0; i < n; i++)
        logits[i] = (float)log(p[i]);
}

static void top_p_keeps_the_crossing_token(void)
{
    float logits[3];
    log_of((double[]){0.5, 0.375, 0.125}, 3, logits);
    const struct {
        float top_p;
        uint64_t set;
    } cases[] = {{0.5f, 1}, {0.875f, 3}, {0.75f, 3}, {0.51f, 3}, {0.49f, 1}, {0.876f, 7}, {1e-9f, 1}, {1.0f, 7}};
    for (size_t i = 0; i < sizeof cases / sizeof cases[0]; i++) {
        lco_sample_args args = {.logits = logits, .vocab = 3, .sampling = PLAIN};
        args.sampling.top_p = cases[i].top_p;
        uint64_t set = drawn_set(args);
        CHECK(set == cases[i].set, "top_p %g gives set %llx, expected %llx", (double)cases[i].top_p, (unsigned long long)set,
              (unsigned long long)cases[i].set);
    }
}

static void top_p_counts_mass_left_by_top_k(void)
{
    float logits[4]; /* after top_k 2: 0.6, 0.4 */
    log_of((double[]){0.3, 0.2, 0.25, 0.25}, 4, logits);
    logits[0] = (float)log(0.375);
    lco_sample_args args = {.logits = logits, .vocab = 4, .sampling = PLAIN};
    args.sampling.top_k = 2;
    args.sampling.top_p = 0.55f; /* 0.375 of 0.625 is 0.6: token 0 alone; of the whole mass it would take two */
    CHECK(drawn_set(args) == 1, "set %llx", (unsigned long long)drawn_set(args));
}

static void top_k_zero_is_off_and_large_is_clamped(void)
{
    float logits[5] = {0.1f, 0.2f, 0.3f, 0.2f, 0.2f};
    lco_sample_args args = {.logits = logits, .vocab = 5, .sampling = PLAIN};
    const struct {
        int32_t top_k;
        uint64_t set;
    } cases[] = {{0, 31}, {5, 31}, {INT32_MAX, 31}, {1, 4}, {2, 6}, {3, 14}, {4, 30}}; /* ties go to the lowest id */
    for (size_t i = 0; i < sizeof cases / sizeof cases[0]; i++) {
        args.sampling.top_k = cases[i].top_k;
        uint64_t set = drawn_set(args);
        CHECK(set == cases[i].set, "top_k %d gives set %llx", cases[i].top_k, (unsigned long long)set);
    }
}

static void min_p_is_relative_to_the_best(void)
{
    float logits[4];
    log_of((double[]){0.4, 0.3, 0.2, 0.1}, 4, logits);
    lco_sample_args args = {.logits = logits, .vocab = 4, .sampling = PLAIN};
    const struct {
        float min_p;
        uint64_t set;
    } cases[] = {{0.0f, 15}, {0.26f, 7}, {0.49f, 7}, {0.51f, 3}, {0.8f, 1}, {1.0f, 1}};
    for (size_t i = 0; i < sizeof cases / sizeof cases[0]; i++) {
        args.sampling.min_p = cases[i].min_p;
        CHECK(drawn_set(args) == cases[i].set, "min_p %g gives set %llx", (double)cases[i].min_p, (unsigned long long)drawn_set(args));
    }
}

static void penalty_makes_negative_logits_less_likely(void)
{
    float logits[2] = {-1.0f, -1.5f}; /* token 0 becomes -2 */
    lco_sample_args args = {.logits = logits, .vocab = 2, .seen = (int32_t[]){0}, .n_seen = 1, .sampling = PLAIN};
    args.sampling.do_sample = false;
    CHECK(sample(args).token == 0, "no penalty: the larger");
    args.sampling.repetition_penalty = 2.0f;
    CHECK(sample(args).token == 1, "a negative logit is multiplied");
    float positive[2] = {3.0f, 2.0f};
    args.logits = positive;
    CHECK(sample(args).token == 1, "a positive logit is divided");
    args.sampling.repetition_penalty = 1.4f;
    CHECK(sample(args).token == 0, "3 / 1.4 is still above 2: applied once");
    args.sampling.repetition_penalty = 1e-40f; /* 3 / 1e-40 would be infinite */
    args.sampling.do_sample = true;
    CHECK(sample(args).token == 0 && sample(args).status == LCO_OK, "tiny penalty");
}

static void bans_come_before_the_choice(void)
{
    float logits[3] = {5.0f, 4.0f, 3.0f};
    lco_sample_args args = {.logits = logits, .vocab = 3, .banned = (int32_t[]){0, 1, 2}, .n_banned = 1, .sampling = PLAIN};
    CHECK((drawn_set(args) & 1) == 0, "a banned token was drawn");
    args.sampling.top_k = 1;
    CHECK(drawn_set(args) == 2, "top_k counts what is not banned");
    args.sampling.do_sample = false;
    outcome o = sample(args);
    double total = exp(5.0) + exp(4.0) + exp(3.0);
    CHECK(o.token == 1 && fabs((double)o.logprob - log(exp(4.0) / total)) < 1e-6, "logprob %g is of the raw logits", (double)o.logprob);
    args.n_banned = 3;
    o = sample(args);
    CHECK_ERROR(o.status, LCO_ENUMERIC, &o.err, "3 ids are banned");
}

static void sick_logits_are_errors(void)
{
    float logits[40];
    for (int i = 0; i < 40; i++)
        logits[i] = (float)i;
    for (int greedy = 0; greedy < 2; greedy++) {
        lco_sample_args args = {.logits = logits, .vocab = 40, .sampling = PLAIN};
        args.sampling.do_sample = !greedy;
        const int places[] = {0, 15, 16, 31, 32, 39};
        for (size_t i = 0; i < sizeof places / sizeof places[0]; i++) {
            float kept = logits[places[i]];
            char text[32];
            snprintf(text, sizeof text, "token %d is|nan", places[i]);
            logits[places[i]] = NAN;
            outcome o = sample(args);
            CHECK_ERROR(o.status, LCO_ENUMERIC, &o.err, text);
            logits[places[i]] = copysignf(NAN, -1.0f);
            o = sample(args);
            CHECK_ERROR(o.status, LCO_ENUMERIC, &o.err, "nan");
            logits[places[i]] = INFINITY;
            o = sample(args);
            CHECK_ERROR(o.status, LCO_ENUMERIC, &o.err, "is inf");
            logits[places[i]] = -INFINITY;
            CHECK(sample(args).status == LCO_OK, "-infinity is no error");
            logits[places[i]] = kept;
        }
        float none[20];
        for (int i = 0; i < 20; i++)
            none[i] = -INFINITY;
        args.logits = none;
        args.vocab = 20;
        outcome o = sample(args);
        CHECK_ERROR(o.status, LCO_ENUMERIC, &o.err, "all 20 logits");
    }
}

static void extreme_numbers_do_not_overflow(void)
{
    float logits[4] = {0.0f, -3e38f, 3e38f, 2.9e38f};
    lco_sample_args args = {.logits = logits, .vocab = 4, .sampling = PLAIN};
    const float temperatures[] = {1e-38f, 1e-45f, 1.0f};
    for (size_t i = 0; i < 3; i++) {
        args.sampling.temperature = temperatures[i];
        CHECK(drawn_set(args) == 4, "temperature %g", (double)temperatures[i]);
    }
    args.sampling.temperature = 3e38f;
    CHECK((drawn_set(args) & 13) == 13, "a huge temperature levels");
}

static void greedy_ties_go_to_the_lowest_id(void)
{
    for (int n = 1; n < 70; n++) {
        float logits[70] = {0};
        lco_sample_args args = {.logits = logits, .vocab = n, .sampling = PLAIN};
        args.sampling.do_sample = false;
        CHECK(sample(args).token == 0, "all equal, vocabulary of %d", n);
        logits[n - 1] = logits[n / 2] = 2.0f;
        CHECK(sample(args).token == n / 2, "vocabulary of %d", n);
    }
}

/* Chi-square over 20,000 draws; the 1e-4 quantile of 9 degrees of freedom is 33.7 (observed: 7.9). */
static void draws_follow_the_distribution(void)
{
    enum { N = 10, DRAWS = 20000 };
    float logits[N];
    double p[N], total = 0.0, chi = 0.0;
    int64_t counts[N] = {0};
    for (int i = 0; i < N; i++) {
        logits[i] = 0.35f * (float)((i * 7) % N);
        total += p[i] = exp((double)logits[i] / 1.3);
    }
    lco_sample_args args = {.logits = logits, .vocab = N, .sampling = PLAIN};
    args.sampling.temperature = 1.3f;
    args.sampling.seed = 12345;
    for (args.position = 0; args.position < DRAWS; args.position++)
        counts[sample(args).token]++;
    for (int i = 0; i < N; i++) {
        double expected = DRAWS * p[i] / total;
        chi += ((double)counts[i] - expected) * ((double)counts[i] - expected) / expected;
    }
    CHECK(chi < 33.7, "chi-square %g", chi);
    CHECK(chi > 0.5, "chi-square %g: too even to be random", chi);
}

static void a_draw_depends_on_seed_and_position_alone(void)
{
    float logits[50];
    for (int i = 0; i < 50; i++)
        logits[i] = 0.01f * (float)i;
    lco_sample_args args = {.logits = logits, .vocab = 50, .sampling = PLAIN};
    int same_seed = 0, other_seed = 0, other_position = 0;
    for (int64_t position = 0; position < 200; position++) {
        args.position = position;
        args.sampling.seed = 7;
        int32_t token = sample(args).token;
        same_seed += sample(args).token == token;
        args.sampling.seed = 7 | (uint64_t)1 << 32; /* all 64 bits count */
        other_seed += sample(args).token == token;
        args.sampling.seed = 7;
        args.position = position + ((int64_t)1 << 32);
        other_position += sample(args).token == token;
    }
    CHECK(same_seed == 200, "%d", same_seed);
    CHECK(other_seed < 20 && other_position < 20, "%d and %d of 200 equal, about 4 expected", other_seed, other_position);
}

/* The same rules by a full sort and double arithmetic. */
static int32_t plain_choice(const lco_sample_args *a)
{
    static double score[MOST], p[MOST];
    static int32_t order[MOST];
    static bool kept[MOST];
    const int32_t n = a->vocab;
    for (int i = 0; i < n; i++)
        score[i] = a->logits[i];
    for (int64_t i = 0; i < a->n_seen; i++) {
        float s = a->logits[a->seen[i]], penalty = a->sampling.repetition_penalty;
        score[a->seen[i]] = s < 0 ? s * penalty : s / penalty;
    }
    for (int i = 0; i < n; i++) { /* insertion sort: higher first, ties by id */
        int j = i;
        for (; j > 0 && score[order[j - 1]] < score[i]; j--)
            order[j] = order[j - 1];
        order[j] = i;
    }
    if (!a->sampling.do_sample)
        return order[0];
    int count = a->sampling.top_k > 0 && a->sampling.top_k < n ? a->sampling.top_k : n;
    double total = 0.0, sum = 0.0, mass = 0.0;
    for (int i = 0; i < count; i++)
        total += p[order[i]] = exp((score[order[i]] - score[order[0]]) / (double)a->sampling.temperature);
    memset(kept, 0, sizeof kept);
    for (int i = 0; i < count && (i == 0 || sum < ((double)a->sampling.top_p - 1e-6) * total); i++) {
        sum += p[order[i]];
        kept[order[i]] = p[order[i]] >= (double)a->sampling.min_p;
    }
    for (int i = 0; i < n; i++)
        mass += kept[i] ? p[i] : 0.0;
    double target = lco_rng_uniform(a->sampling.seed, (uint64_t)a->position) * mass;
    int32_t last = -1;
    sum = 0.0;
    for (int i = 0; i < n; i++) {
        if (!kept[i])
            continue;
        last = i;
        sum += p[i];
        if (sum > target)
            return i;
    }
    return last;
}

static void agrees_with_a_plain_implementation(void)
{
    static float logits[MOST];
    static int32_t seen[MOST];
    stream s = {.seed = 99};
    for (int trial = 0; trial < 4000; trial++) {
        int32_t n = 1 + (int32_t)stream_below(&s, trial % 40 == 0 ? 1500 : 120);
        double spread = trial % 3 == 0 ? 0.5 : 8.0;
        for (int i = 0; i < n; i++) /* quantised now and then: ties */
            logits[i] = trial % 5 == 0 ? (float)stream_below(&s, 6) - 3.0f : (float)(spread * (2.0 * stream_uniform(&s) - 1.0));
        lco_sample_args args = {.logits = logits, .vocab = n, .seen = seen, .position = trial, .sampling = PLAIN};
        for (; args.n_seen < n / 4; args.n_seen++)
            seen[args.n_seen] = 3 * (int32_t)args.n_seen;
        args.sampling = (lco_sampling){.temperature = (float)(0.3 + 2.0 * stream_uniform(&s)),
                                       .top_k = trial % 2 ? 0 : (int32_t)stream_below(&s, n + 2),
                                       .top_p = trial % 3 ? 1.0f : (float)(0.05 + 0.9 * stream_uniform(&s)),
                                       .min_p = trial % 7 ? 0.0f : (float)(0.3 * stream_uniform(&s)),
                                       .repetition_penalty = trial % 4 ? 1.0f : 1.25f,
                                       .do_sample = trial % 11 != 0,
                                       .seed = (uint64_t)trial * 31};
        int32_t expected = plain_choice(&args);
        outcome o = sample(args);
        CHECK(o.status == LCO_OK && o.token == expected, "trial %d, vocabulary of %d: %d, expected %d", trial, n, o.token, expected);
    }
}

/* log-softmax: float32 exponentials summed in double; bound 4 units of 2^-24 relative to the sum (observed: 1.1e-7). */
static void logprobs_are_log_softmax_of_the_raw_logits(void)
{
    static float logits[MOST];
    stream s = {.seed = 5};
    double worst = 0.0;
    for (int trial = 0; trial < 50; trial++) {
        double sum = 0.0;
        for (int i = 0; i < MOST; i++)
            sum += exp((double)(logits[i] = (float)(20.0 * stream_uniform(&s) - 30.0)));
        lco_sample_args args = {.logits = logits, .vocab = MOST, .position = trial, .sampling = PLAIN};
        outcome o = sample(args);
        double exact = (double)logits[o.token] - log(sum), error = fabs((double)o.logprob - exact);
        error -= fabs(exact) * 0x1p-24; /* the rounding of the result itself */
        worst = error > worst ? error : worst;
    }
    CHECK(worst < 4 * 0x1p-24, "error %g", worst);
}

static void parameters_are_checked_by_name(void)
{
    lco_error err;
    CHECK(lco_sampling_check(&PLAIN, &err) == LCO_OK, "%s", err.text);
    lco_sampling bad = PLAIN;
#define BAD(field, value, text)                                                                                                            \
    bad = PLAIN;                                                                                                                           \
    bad.field = value;                                                                                                                     \
    CHECK_ERROR(lco_sampling_check(&bad, &err), LCO_EINVAL, &err, text)
    BAD(temperature, 0.0f, "temperature = 0|above 0");
    BAD(temperature, -1.0f, "temperature = -1");
    BAD(temperature, NAN, "temperature = nan");
    BAD(temperature, INFINITY, "temperature = inf");
    BAD(top_k, -1, "top_k = -1|at least 0");
    BAD(top_p, 0.0f, "top_p = 0|at most 1");
    BAD(top_p, 1.5f, "top_p = 1.5");
    BAD(top_p, NAN, "top_p = nan");
    BAD(min_p, -0.5f, "min_p = -0.5|0 to 1");
    BAD(min_p, 2.0f, "min_p = 2");
    BAD(repetition_penalty, 0.0f, "repetition_penalty = 0|above 0");
    BAD(repetition_penalty, NAN, "repetition_penalty = nan");
    bad = PLAIN;
    bad.temperature = 0.0f;
    bad.do_sample = false;
    CHECK(lco_sampling_check(&bad, &err) == LCO_OK, "greedy ignores the temperature: %s", err.text);
}

int main(int argc, char **argv)
{
    const test_case tests[] = {
        TEST(top_p_keeps_the_crossing_token),
        TEST(top_p_counts_mass_left_by_top_k),
        TEST(top_k_zero_is_off_and_large_is_clamped),
        TEST(min_p_is_relative_to_the_best),
        TEST(penalty_makes_negative_logits_less_likely),
        TEST(bans_come_before_the_choice),
        TEST(sick_logits_are_errors),
        TEST(extreme_numbers_do_not_overflow),
        TEST(greedy_ties_go_to_the_lowest_id),
        TEST(draws_follow_the_distribution),
        TEST(a_draw_depends_on_seed_and_position_alone),
        TEST(agrees_with_a_plain_implementation),
        TEST(logprobs_are_log_softmax_of_the_raw_logits),
        TEST(parameters_are_checked_by_name),
    };
    return RUN_ALL(tests, argc, argv);
}
