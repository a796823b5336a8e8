/* The engine over a tiny random model: the tokens of a request never depend on what else happens. */
#include <math.h>

#include "rig.h"

/* The engine against a loop of its own over the model: prompt at once, then token by token, greedy. */
static void greedy_equals_a_plain_loop(void)
{
    rig r;
    rig_open(&r, 16, 1, 7);
    int32_t ids[MOST_PROMPT + MOST_NEW];
    lco_request q = make_request(0, ids);
    q.eos = NULL;
    q.n_eos = 0;
    q.min_new_tokens = 0;
    answer found[1] = {0};
    add(&r, &q);
    drain(&r, found);
    CHECK(found[0].n == q.max_new_tokens && found[0].finish == LCO_FINISH_LENGTH, "%d tokens, finish %d", found[0].n, found[0].finish);

    lco_seq *seq;
    CHECK_OK(lco_seq_create(r.kv, &seq, &check_err));
    int64_t n = q.n_prompt, done = 0;
    for (int i = 0; i < found[0].n; i++) {
        float logits[TINY_VOCAB];
        CHECK_OK(lco_seq_reserve(seq, n - done, &check_err));
        lco_item item = {.table = lco_seq_table(seq), .len = n - done, .pos = done, .rope_length = n, .prompt = done == 0};
        lco_batch batch = {
            .ids = ids + done, .items = &item, .n_items = 1, .n_rows = n - done, .logit_rows = &(int64_t){n - done - 1}, .n_logits = 1};
        CHECK_OK(lco_llama_forward(r.model, r.kv, &batch, logits, &check_err));
        lco_seq_commit(seq, ids + done, n - done, done == 0);
        done = n;
        int32_t best = 0;
        double sum = 0.0;
        for (int32_t t = 0; t < TINY_VOCAB; t++) {
            best = logits[t] > logits[best] ? t : best;
            sum += exp((double)logits[t]);
        }
        CHECK(found[0].tokens[i] == best, "token %d is %d, expected %d", i, found[0].tokens[i], best);
        double logprob = (double)logits[best] - log(sum);
        CHECK(fabs((double)found[0].logprobs[i] - logprob) < 2e-6, "logprob %g, expected %g", (double)found[0].logprobs[i],
              logprob); /* 2e-7 seen */
        ids[n++] = best;
    }
    lco_seq_destroy(seq);
    rig_close(&r);
}

static void neighbours_and_chunks_change_nothing(void)
{
    enum { N = 12 };
    answer alone[N];
    answers_alone(alone, N);
    int distinct = 0;
    for (int i = 1; i < alone[0].n; i++)
        distinct += alone[0].tokens[i] != alone[0].tokens[0];
    CHECK(distinct > 0, "the tiny model says one token only: the tests would prove nothing");
    const struct {
        int64_t max_batch, chunk;
    } cases[] = {{8, 512}, {8, 7}, {3, 1}, {12, 64}, {1, 16}};
    for (size_t c = 0; c < sizeof cases / sizeof cases[0]; c++) {
        rig r;
        answer together[N] = {0};
        int32_t prompt[MOST_PROMPT];
        rig_open(&r, 200, cases[c].max_batch, cases[c].chunk);
        int64_t prompt_tokens = 0, new_tokens = 0;
        for (int i = 0; i < N; i++) {
            lco_request q = make_request(i, prompt);
            add(&r, &q);
            prompt_tokens += q.n_prompt;
        }
        drain(&r, together);
        for (int i = 0; i < N; i++) {
            char where[64];
            snprintf(where, sizeof where, "max_batch %lld, chunk %lld", (long long)cases[c].max_batch, (long long)cases[c].chunk);
            expect_same(&together[i], &alone[i], i, where);
            new_tokens += together[i].n;
        }
        lco_engine_stats s = lco_engine_get_stats(r.engine);
        CHECK(s.prompt_tokens == prompt_tokens && s.decode_tokens == new_tokens - N && s.preemptions == 0,
              "computed %lld and %lld, expected %lld, %lld", (long long)s.prompt_tokens, (long long)s.decode_tokens,
              (long long)prompt_tokens, (long long)(new_tokens - N));
        CHECK(s.forward_seconds > 0 && s.sample_seconds > 0 && s.other_seconds > 0, "a clock stands still");
        CHECK(pages_free(&r) == 200, "%lld of 200 pages free", (long long)pages_free(&r));
        rig_close(&r);
    }
}

/* Where rope depends on the length, a prompt has one length, its own, however it is cut; then each token has its own. */
static void chunks_change_nothing_with_dynamic_rope(void)
{
    answer answers[3][1] = {0};
    const int64_t chunks[] = {512, 7, 1};
    for (int c = 0; c < 3; c++) {
        rig r = {0};
        int32_t prompt[MOST_PROMPT];
        tiny_make(&r.weights);
        r.weights.config.rope.kind = LCO_ROPE_DYNAMIC;
        r.weights.config.rope.factor = 4.0;
        r.weights.config.rope.original_max = 16;
        CHECK_OK(tiny_model(&r.weights, 1, &r.model, &check_err));
        CHECK_OK(tiny_cache(8, &r.kv, &check_err));
        CHECK_OK(lco_engine_create(r.model, r.kv, &(lco_engine_options){.chunk = chunks[c]}, &r.engine, &check_err));
        lco_request q = simple(prompt, 40, 30);
        add(&r, &q);
        while (!idle(&r)) {
            lco_event event[64];
            int64_t n;
            CHECK_OK(lco_engine_step(r.engine, event, 64, &n, &check_err));
            if (n == 1) {
                answers[c]->logprobs[answers[c]->n] = event->logprob;
                answers[c]->tokens[answers[c]->n++] = event->token;
            }
        }
        rig_close(&r);
        expect_same(answers[c], answers[0], 0, "dynamic rope, chunks");
    }
    CHECK(answers[0]->n == 30, "%d tokens", answers[0]->n);
}

static void finish_reasons(void)
{
    rig r;
    int32_t prompt[MOST_PROMPT];
    answer a[6] = {0};
    rig_open(&r, 64, 8, 512);
    lco_request q = simple(prompt, 9, 12);
    add(&r, &q);
    drain(&r, a);
    CHECK(a[0].n == 12 && a[0].finish == LCO_FINISH_LENGTH, "%d tokens, finish %d", a[0].n, a[0].finish);
    int first = 1; /* a token that did not come before */
    for (bool fresh = false; !fresh && first < 12; first += !fresh) {
        fresh = true;
        for (int i = 0; i < first; i++)
            fresh = fresh && a[0].tokens[i] != a[0].tokens[first];
    }
    int32_t eos[] = {TINY_VOCAB - 1, a[0].tokens[first]};
    q.eos = eos;
    q.n_eos = 2;
    add(&r, &q);
    q.ignore_eos = true;
    add(&r, &q);
    q.ignore_eos = false;
    q.min_new_tokens = first + 1;
    add(&r, &q);
    q.min_new_tokens = 0;
    q.max_new_tokens = 0;
    add(&r, &q);
    drain(&r, a);
    CHECK(a[1].n == first + 1 && a[1].finish == LCO_FINISH_EOS && a[1].tokens[first] == eos[1], "%d tokens, finish %d", a[1].n,
          a[1].finish);
    expect_same(&a[2], &a[0], 2, "ignore_eos");
    CHECK(a[3].n > first && a[3].tokens[first] != eos[1], "min_new_tokens: %d tokens", a[3].n);
    CHECK(a[4].n == 0 && a[4].finish == LCO_FINISH_LENGTH, "no new tokens: %d, finish %d", a[4].n, a[4].finish);
    rig_close(&r);
}

/* Two turns on a sequence of the caller's say what one request with the whole text says. */
static void sequences_go_on(void)
{
    rig r;
    int32_t first[10], second[64], history[64];
    answer a[4] = {0};
    rig_open(&r, 16, 4, 5);
    lco_seq *seq;
    CHECK_OK(lco_seq_create(r.kv, &seq, &check_err));
    lco_request q = simple(first, 10, 8);
    q.sampling.repetition_penalty = 1.3f;
    q.sampling.do_sample = true;
    q.sequence = seq;
    int64_t id = add(&r, &q);
    int64_t unused;
    lco_error err;
    CHECK_ERROR(lco_engine_add(r.engine, &q, &unused, &err), LCO_EINVAL, &err, "in use by request 0");
    drain(&r, a);
    CHECK(id == 0 && a[0].n == 8 && lco_seq_length(seq) == 17, "length %lld: all but the last token", (long long)lco_seq_length(seq));

    memcpy(history, first, sizeof first);
    memcpy(history + 10, a[0].tokens, 7 * sizeof *history);
    second[0] = a[0].tokens[7];
    for (int i = 1; i < 12; i++)
        second[i] = i;
    q.prompt = second;
    q.n_prompt = 12;
    add(&r, &q);
    drain(&r, a);
    CHECK(lco_seq_length(seq) == 17 + 12 + 7, "length %lld", (long long)lco_seq_length(seq));

    int32_t whole[29];
    memcpy(whole, history, 17 * sizeof *whole);
    memcpy(whole + 17, second, 12 * sizeof *whole);
    q.prompt = whole;
    q.n_prompt = 29;
    q.sequence = NULL;
    add(&r, &q);
    drain(&r, a);
    expect_same(&a[1], &a[2], 1, "second turn");

    lco_kv *other;
    lco_seq *foreign;
    CHECK_OK(tiny_cache(4, &other, &check_err));
    CHECK_OK(lco_seq_create(other, &foreign, &check_err));
    q.sequence = foreign;
    CHECK_ERROR(lco_engine_add(r.engine, &q, &unused, &err), LCO_EINVAL, &err, "another cache");
    lco_kv_destroy(other);
    lco_seq_destroy(seq);
    rig_close(&r);
}

static void bad_requests_are_refused(void)
{
    rig r;
    int32_t prompt[TINY_POSITIONS + 1];
    lco_error err;
    int64_t id;
    rig_open(&r, 8, 4, 512);
    const lco_request good = simple(prompt, TINY_POSITIONS + 1, 4);
    lco_request q;
#define REFUSED(change, code, text)                                                                                                        \
    q = good;                                                                                                                              \
    q.n_prompt = 5;                                                                                                                        \
    change;                                                                                                                                \
    CHECK_ERROR(lco_engine_add(r.engine, &q, &id, &err), code, &err, text)
    REFUSED(q.n_prompt = 0, LCO_EINVAL, "prompt is empty");
    REFUSED(q.n_prompt = -1, LCO_EINVAL, "prompt is empty");
    REFUSED(q.prompt = NULL, LCO_EINVAL, "n_prompt = 5");
    REFUSED(q.max_new_tokens = -1, LCO_EINVAL, "max_new_tokens = -1");
    REFUSED(q.min_new_tokens = 5, LCO_EINVAL, "min_new_tokens = 5|max_new_tokens (4)");
    REFUSED(q.min_new_tokens = -1, LCO_EINVAL, "min_new_tokens = -1");
    REFUSED(q.n_prompt = TINY_POSITIONS + 1, LCO_EINVAL, "257 ids|256 positions|at most 0 new");
    REFUSED(q.max_new_tokens = 252, LCO_EINVAL, "5 ids|max_new_tokens = 252|at most 251");
    REFUSED(q.max_new_tokens = INT64_MAX, LCO_EINVAL, "max_positions");
    REFUSED(q.n_prompt = INT64_MAX, LCO_EINVAL, "max_positions");
    REFUSED(q.max_new_tokens = 125, LCO_EPAGES, "needs 9 pages|has 8|max_tokens of at least 129");
    REFUSED(q.prompt = ((int32_t[]){1, 2, 3, TINY_VOCAB, 4}), LCO_EINVAL, "prompt[3] = 61|[0, 61)");
    REFUSED(q.prompt = ((int32_t[]){1, 2, 3, 4, -1}), LCO_EINVAL, "prompt[4] = -1");
    REFUSED((q.eos = (int32_t[]){61}, q.n_eos = 1), LCO_EINVAL, "eos[0] = 61");
    REFUSED(q.n_eos = 1, LCO_EINVAL, "n_eos = 1");
    REFUSED(q.n_eos = -1, LCO_EINVAL, "n_eos = -1");
    REFUSED(q.sampling.top_p = 0.0f, LCO_EINVAL, "top_p = 0");
    CHECK(idle(&r) && pages_free(&r) == 8, "a refused request left something");
    q = good;
    q.n_prompt = 5;
    q.max_new_tokens = 124; /* 128 tokens to compute in 8 pages */
    add(&r, &q);
    lco_engine_destroy(r.engine);

    const struct {
        lco_engine_options options;
        const char *text;
    } bad[] = {{{-1, 0}, "max_batch = -1"},
               {{4097, 0}, "max_batch = 4097"},
               {{0, -5}, "chunk = -5"},
               {{0, (int64_t)1 << 40}, "chunk = 1099511627776"}};
    for (size_t i = 0; i < sizeof bad / sizeof bad[0]; i++)
        CHECK_ERROR(lco_engine_create(r.model, r.kv, &bad[i].options, &r.engine, &err), LCO_EINVAL, &err, bad[i].text);
    lco_kv *other;
    lco_kv_options options = *lco_kv_get_options(r.kv);
    options.n_layers++;
    CHECK_OK(lco_kv_create(&options, &other, &check_err));
    CHECK_ERROR(lco_engine_create(r.model, other, &(lco_engine_options){0}, &r.engine, &err), LCO_EINVAL, &err, "3 layers");
    lco_kv_destroy(other);
    CHECK(r.engine == NULL, "a failed create gives no engine");
    rig_close(&r);
}

static void events_need_room(void)
{
    rig r;
    int32_t prompt[MOST_PROMPT];
    lco_error err;
    lco_event event;
    int64_t n;
    rig_open(&r, 8, 2, 512);
    lco_request q = simple(prompt, 3, 3);
    add(&r, &q);
    CHECK_ERROR(lco_engine_step(r.engine, &event, 1, &n, &err), LCO_EINVAL, &err, "max_batch (2)");
    rig_close(&r); /* with a request under way */
}

int main(int argc, char **argv)
{
    const test_case tests[] = {
        TEST(greedy_equals_a_plain_loop),
        TEST(neighbours_and_chunks_change_nothing),
        TEST(chunks_change_nothing_with_dynamic_rope),
        TEST(finish_reasons),
        TEST(sequences_go_on),
        TEST(bad_requests_are_refused),
        TEST(events_need_room),
    };
    return RUN_ALL(tests, argc, argv);
}
