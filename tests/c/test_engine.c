/* The engine over a tiny random model: the tokens of a request never depend on what else happens, and nothing is ever lost or leaked. */
#define _GNU_SOURCE
#include <math.h>
#include <sys/wait.h>
#include <unistd.h>

#include "../../csrc/engine/engine.h"
#include "harness.h"
#include "tiny.h"

enum { MOST_NEW = 64, MOST_PROMPT = 128, MOST_BATCH = 16 };

/* A model with a cache, and what requests said, by request id. */
typedef struct {
    int32_t tokens[MOST_NEW];
    float logprobs[MOST_NEW];
    int n;
    lco_finish finish;
    lco_error error;
} answer;

typedef struct {
    tiny_weights weights;
    lco_model *model;
    lco_kv *kv;
    lco_engine *engine;
} rig;

static void rig_open(rig *r, int64_t pages, int64_t max_batch, int64_t chunk)
{
    tiny_make(&r->weights);
    CHECK_OK(tiny_model(&r->weights, 1, &r->model, &check_err));
    CHECK_OK(tiny_cache(pages, &r->kv, &check_err));
    CHECK_OK(lco_engine_create(r->model, r->kv, &(lco_engine_options){.max_batch = max_batch, .chunk = chunk}, &r->engine, &check_err));
}

static void rig_close(rig *r)
{
    lco_engine_destroy(r->engine);
    CHECK_OK(lco_kv_check(r->kv, &check_err));
    lco_kv_destroy(r->kv);
    lco_model_destroy(r->model);
    tiny_free(&r->weights);
}

static int64_t pages_free(const rig *r) { return lco_kv_get_stats(r->kv).pages_free; }

/* One step; answers[id] collects what came. */
static int64_t step(rig *r, answer *answers)
{
    lco_event events[MOST_BATCH];
    int64_t n = 0;
    CHECK_OK(lco_engine_step(r->engine, events, MOST_BATCH, &n, &check_err));
    CHECK_OK(lco_engine_check(r->engine, &check_err));
    for (int64_t i = 0; i < n; i++) {
        answer *a = &answers[events[i].request];
        CHECK(i == 0 || events[i - 1].request < events[i].request, "events out of order");
        CHECK(a->finish == LCO_FINISH_NONE, "request %lld goes on after its end", (long long)events[i].request);
        if (events[i].token >= 0) {
            a->logprobs[a->n] = events[i].logprob;
            a->tokens[a->n++] = events[i].token;
        }
        a->finish = events[i].finish;
        if (a->finish == LCO_FINISH_ERROR)
            a->error = events[i].error;
    }
    return n;
}

static bool idle(const rig *r)
{
    lco_engine_stats s = lco_engine_get_stats(r->engine);
    return s.waiting + s.running == 0;
}

static void drain(rig *r, answer *answers)
{
    for (int steps = 0; !idle(r); steps++) {
        if (steps > 20000) {
            CHECK(false, "the engine does not come to an end");
            return;
        }
        step(r, answers);
    }
}

static int64_t add(rig *r, const lco_request *request)
{
    int64_t id = -1;
    CHECK_OK(lco_engine_add(r->engine, request, &id, &check_err));
    return id;
}

/* Requests of all kinds; the n-th is always the same. */
static lco_request make_request(int n, int32_t *prompt)
{
    stream s = {.seed = 77 + (uint64_t)n};
    lco_request q = {.prompt = prompt,
                     .n_prompt = n % 5 == 4 ? 1 : 1 + stream_below(&s, 40),
                     .max_new_tokens = 1 + stream_below(&s, 40),
                     .sampling = {.temperature = 1.0f, .top_p = 1.0f, .repetition_penalty = 1.0f}};
    for (int64_t i = 0; i < q.n_prompt; i++)
        prompt[i] = (int32_t)stream_below(&s, TINY_VOCAB);
    if (n % 2 == 1)
        q.sampling = (lco_sampling){.temperature = 0.9f,
                                    .top_k = n % 3 ? 20 : 0,
                                    .top_p = 0.95f,
                                    .min_p = 0.01f,
                                    .repetition_penalty = n % 4 == 1 ? 1.3f : 1.0f,
                                    .do_sample = true,
                                    .seed = (uint64_t)n};
    else if (n % 4 == 2)
        q.sampling.repetition_penalty = 1.5f;
    static const int32_t eos[] = {5, 17};
    if (n % 3 == 0) {
        q.eos = eos;
        q.n_eos = 2;
        q.min_new_tokens = q.max_new_tokens / 2;
    }
    return q;
}

static void expect_same(const answer *found, const answer *expected, int n, const char *where)
{
    CHECK(found->n == expected->n && found->finish == expected->finish, "%s, request %d: %d tokens, finish %d; alone %d, finish %d (%s)",
          where, n, found->n, found->finish, expected->n, expected->finish, found->error.text);
    for (int i = 0; i < found->n && i < expected->n; i++) {
        if (found->tokens[i] != expected->tokens[i] || found->logprobs[i] != expected->logprobs[i]) {
            CHECK(false, "%s, request %d differs at token %d: %d, alone %d", where, n, i, found->tokens[i], expected->tokens[i]);
            return;
        }
    }
}

/* What the first n requests of make_request say when each has a machine of its own. */
static void answers_alone(answer *alone, int n)
{
    for (int i = 0; i < n; i++) {
        rig r;
        int32_t prompt[MOST_PROMPT];
        answer one[1] = {0};
        rig_open(&r, 16, 1, 512);
        lco_request q = make_request(i, prompt);
        add(&r, &q);
        drain(&r, one);
        CHECK(pages_free(&r) == 16, "%lld of 16 pages free", (long long)pages_free(&r));
        rig_close(&r);
        alone[i] = one[0];
    }
}

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
        lco_seq_commit(seq, n - done);
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

/* Pools of few pages: requests push each other out and are computed again, with the same result. */
static void pressure_changes_nothing(void)
{
    enum { N = 12 };
    answer alone[N];
    answers_alone(alone, N);
    for (int64_t pages = 5; pages <= 12; pages++) {
        for (int64_t chunk = 6; chunk <= 100; chunk += 94) {
            rig r;
            answer together[N] = {0};
            int32_t prompt[MOST_PROMPT];
            rig_open(&r, pages, 8, chunk);
            for (int i = 0; i < N; i++) {
                lco_request q = make_request(i, prompt);
                add(&r, &q);
            }
            drain(&r, together);
            for (int i = 0; i < N; i++)
                expect_same(&together[i], &alone[i], i, pages == 5 ? "5 pages" : "6 to 12 pages");
            CHECK(pages > 8 || lco_engine_get_stats(r.engine).preemptions > 0, "%lld pages bring no pressure", (long long)pages);
            CHECK(pages_free(&r) == pages, "%lld of %lld pages free", (long long)pages_free(&r), (long long)pages);
            rig_close(&r);
        }
    }
}

/* A pool of 4 pages and two sequences that want 4 each, with everything that counts prompt and output apart. */
static void two_sequences_in_four_pages(void)
{
    answer answers[2][2] = {0};
    for (int pressed = 0; pressed < 2; pressed++) {
        rig r;
        rig_open(&r, pressed ? 4 : 8, 2, 512);
        for (int i = 0; i < 2; i++) {
            int32_t prompt[20];
            for (int j = 0; j < 20; j++)
                prompt[j] = (i * 31 + j * 7) % TINY_VOCAB;
            lco_request q = {.prompt = prompt,
                             .n_prompt = 20,
                             .max_new_tokens = 40,
                             .eos = (int32_t[]){3, 9},
                             .n_eos = 2,
                             .min_new_tokens = 35,
                             .sampling = {.temperature = 1.2f, .top_p = 0.9f, .repetition_penalty = 1.2f, .do_sample = true, .seed = 42}};
            add(&r, &q);
        }
        drain(&r, answers[pressed]);
        lco_engine_stats s = lco_engine_get_stats(r.engine);
        CHECK((s.preemptions > 0) == pressed, "%lld preemptions", (long long)s.preemptions);
        rig_close(&r);
    }
    for (int i = 0; i < 2; i++) {
        expect_same(&answers[1][i], &answers[0][i], i, "4 pages");
        CHECK(answers[1][i].n >= 35, "%d tokens", answers[1][i].n);
    }
}

static lco_request simple(int32_t *prompt, int64_t n_prompt, int64_t max_new);

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

static lco_request simple(int32_t *prompt, int64_t n_prompt, int64_t max_new)
{
    for (int64_t i = 0; i < n_prompt; i++)
        prompt[i] = (int32_t)((i * i + 3) % TINY_VOCAB);
    return (lco_request){.prompt = prompt,
                         .n_prompt = n_prompt,
                         .max_new_tokens = max_new,
                         .sampling = {.temperature = 1.0f, .top_p = 1.0f, .repetition_penalty = 1.0f}};
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
    q.history = history;
    q.n_history = 17;
    add(&r, &q);
    drain(&r, a);
    CHECK(lco_seq_length(seq) == 17 + 12 + 7, "length %lld", (long long)lco_seq_length(seq));

    int32_t whole[29];
    memcpy(whole, history, 17 * sizeof *whole);
    memcpy(whole + 17, second, 12 * sizeof *whole);
    q.prompt = whole;
    q.n_prompt = 29;
    q.history = NULL;
    q.n_history = 0;
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

/* A caller's sequence that is pushed out keeps what it came with. */
static void sequences_go_on_under_pressure(void)
{
    answer a[2][3] = {0};
    for (int pressed = 0; pressed < 2; pressed++) {
        rig r;
        int32_t prompt[64];
        rig_open(&r, pressed ? 7 : 16, 3, 512);
        lco_seq *seq;
        CHECK_OK(lco_seq_create(r.kv, &seq, &check_err));
        lco_request q = simple(prompt, 20, 1);
        q.sequence = seq;
        add(&r, &q);
        drain(&r, a[pressed]);
        q = simple(prompt, 10, 60);
        add(&r, &q);
        q = simple(prompt, 6, 40);
        q.sequence = seq;
        add(&r, &q);
        drain(&r, a[pressed]);
        CHECK((lco_engine_get_stats(r.engine).preemptions > 0) == pressed, "preemptions");
        CHECK(lco_seq_length(seq) == 20 + 6 + 39, "length %lld", (long long)lco_seq_length(seq));
        lco_seq_destroy(seq);
        rig_close(&r);
    }
    for (int i = 0; i < 3; i++)
        expect_same(&a[1][i], &a[0][i], i, "7 pages");
}

static void cancel_frees_pages_at_once(void)
{
    const int steps[] = {0, 1, 2, 4, 17, 18};
    for (size_t s = 0; s < sizeof steps / sizeof steps[0]; s++) {
        rig r;
        int32_t prompt[MOST_PROMPT];
        answer a[4] = {0};
        rig_open(&r, 40, 2, 16); /* of three one waits; prompts take three chunks */
        lco_seq *seq;
        CHECK_OK(lco_seq_create(r.kv, &seq, &check_err));
        for (int i = 0; i < 3; i++) {
            lco_request q = simple(prompt, 40, 60);
            q.sequence = i == 1 ? seq : NULL;
            add(&r, &q);
        }
        for (int i = 0; i < steps[s]; i++)
            step(&r, a);
        for (int64_t id = 2; id >= 0; id--) {
            lco_engine_cancel(r.engine, id);
            lco_engine_cancel(r.engine, id); /* unknown by now */
            CHECK_OK(lco_engine_check(r.engine, &check_err));
        }
        int64_t held = (lco_seq_length(seq) + 15) / 16;
        CHECK(pages_free(&r) == 40 - held, "%lld free after %d steps, the caller's sequence holds %lld", (long long)pages_free(&r),
              steps[s], (long long)held);
        CHECK(idle(&r) && step(&r, a) == 0, "nothing is left to do");
        lco_seq_destroy(seq);
        CHECK(pages_free(&r) == 40, "%lld free", (long long)pages_free(&r));
        rig_close(&r);
    }
}

/* Pages that others hold: a request that runs alone fails by itself, with the cache's words. */
static void no_pages_ends_the_request_alone(void)
{
    rig r;
    int32_t prompt[MOST_PROMPT];
    answer a[4] = {0};
    rig_open(&r, 4, 4, 512);
    lco_seq *hog;
    CHECK_OK(lco_seq_create(r.kv, &hog, &check_err));
    CHECK_OK(lco_seq_reserve(hog, 32, &check_err));
    lco_request grows = simple(prompt, 20, 30), large = simple(prompt, 40, 1), fits = simple(prompt, 20, 5);
    add(&r, &grows); /* runs out of pages at token 13 */
    grows.prompt = large.prompt = prompt;
    add(&r, &large); /* never gets the pages for its prompt */
    add(&r, &fits);
    drain(&r, a);
    CHECK(a[0].finish == LCO_FINISH_ERROR && a[0].n == 13, "finish %d after %d tokens", a[0].finish, a[0].n);
    CHECK_ERROR(a[0].error.code, LCO_EPAGES, &a[0].error, "max_tokens");
    CHECK(a[1].finish == LCO_FINISH_ERROR && a[1].n == 0, "finish %d after %d tokens", a[1].finish, a[1].n);
    CHECK_ERROR(a[1].error.code, LCO_EPAGES, &a[1].error, "need 3 pages|max_tokens");
    CHECK(a[2].finish == LCO_FINISH_LENGTH && a[2].n == 5, "finish %d after %d tokens", a[2].finish, a[2].n);
    lco_seq_destroy(hog);
    CHECK(pages_free(&r) == 4, "%lld free", (long long)pages_free(&r));
    rig_close(&r);
}

static void count_ids(int *counts, const int32_t *ids, int64_t n)
{
    for (int64_t i = 0; i < n; i++)
        counts[ids[i]]++;
}

/* A step that fails after one of its requests did: that one's event is not lost, and the others go on. */
static void a_failed_step_keeps_its_events(void)
{
    rig r;
    int32_t prompt[MOST_PROMPT];
    answer a[2] = {0};
    lco_event events[4];
    lco_error err;
    int64_t n = 7;
    rig_open(&r, 4, 4, 512);
    lco_seq *hog;
    CHECK_OK(lco_seq_create(r.kv, &hog, &check_err));
    CHECK_OK(lco_seq_reserve(hog, 32, &check_err));
    lco_request large = simple(prompt, 40, 1), fits = simple(prompt, 20, 5);
    add(&r, &large);
    add(&r, &fits);
    lco_mem_fail_at(2); /* the second's page table can be had, memory for its logits not */
    CHECK_ERROR(lco_engine_step(r.engine, events, 4, &n, &err), LCO_ENOMEM, &err, "logits");
    CHECK(lco_mem_fail_at(0) <= 0 && n == 0, "%lld events", (long long)n);
    CHECK_OK(lco_engine_check(r.engine, &check_err));
    CHECK(step(&r, a) == 1 && a[0].finish == LCO_FINISH_ERROR && a[1].n == 0, "the event that was due, and no other");
    drain(&r, a);
    CHECK(a[1].finish == LCO_FINISH_LENGTH && a[1].n == 5, "finish %d after %d tokens", a[1].finish, a[1].n);
    lco_seq_destroy(hog);
    rig_close(&r);
}

/* A token whose embedding is NaN spoils the requests that hold it, and their pages once free spoil nobody. */
static void nan_ends_the_request_alone(void)
{
    enum { HEALTHY = 2, ROUNDS = 3 };
    answer alone[HEALTHY], a[ROUNDS * (HEALTHY + 1)] = {0};
    answers_alone(alone, HEALTHY);
    int32_t prompt[MOST_PROMPT], sick = 0;
    int counts[TINY_VOCAB + 1] = {0};
    for (int i = 0; i < HEALTHY; i++) {
        lco_request q = make_request(i, prompt);
        count_ids(counts, prompt, q.n_prompt);
        count_ids(counts, alone[i].tokens, alone[i].n);
    }
    while (counts[sick] > 0)
        sick++;
    CHECK(sick < TINY_VOCAB, "the healthy requests hold every token");
    rig r;
    rig_open(&r, 12, 4, 512);
    ((float *)r.weights.tensors[0].data)[sick * TINY_HIDDEN + 3] = NAN;
    for (int round = 0; round < ROUNDS; round++) {
        lco_request q = simple(prompt, 90, 10);
        prompt[12] = sick;
        int64_t id = add(&r, &q);
        for (int i = 0; i < HEALTHY; i++) {
            q = make_request(i, prompt);
            add(&r, &q);
        }
        drain(&r, a);
        CHECK(a[id].finish == LCO_FINISH_ERROR && a[id].n == 0, "finish %d", a[id].finish);
        char text[64];
        snprintf(text, sizeof text, "request %d, position 90|nan", (int)id);
        CHECK_ERROR(a[id].error.code, LCO_ENUMERIC, &a[id].error, text);
        for (int i = 0; i < HEALTHY; i++)
            expect_same(&a[id + 1 + i], &alone[i], i, "beside NaN");
    }
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
    REFUSED((q.history = (int32_t[]){0, 99}, q.n_history = 2), LCO_EINVAL, "history[1] = 99");
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

/* Everything from the model to the last token with the N-th allocation failing, for every N. A step that fails is repeated. */
static void every_allocation_may_fail(void)
{
    enum { N = 3 };
    answer alone[N];
    answers_alone(alone, N);
    tiny_weights weights;
    tiny_make(&weights);
    const int64_t live = lco_mem_live();
    int64_t n = 1;
    for (bool untouched = false; !untouched; n++) {
        lco_model *model = NULL;
        rig r = {0};
        lco_error err = {0};
        answer a[N] = {0};
        lco_status status;
        lco_mem_fail_at(n);
        if ((status = tiny_model(&weights, 1, &model, &err)) == LCO_OK && (status = tiny_cache(7, &r.kv, &err)) == LCO_OK)
            status = lco_engine_create(model, r.kv, &(lco_engine_options){.max_batch = 3, .chunk = 9}, &r.engine, &err);
        CHECK(status == LCO_OK || (status == LCO_ENOMEM && strstr(err.text, "memory") != NULL), "allocation %lld: %d %s", (long long)n,
              status, err.text);
        for (int i = 0; status == LCO_OK && i < N; i++) {
            int32_t prompt[MOST_PROMPT];
            lco_request q = make_request(i, prompt);
            int64_t id = -1;
            while ((status = lco_engine_add(r.engine, &q, &id, &err)) == LCO_ENOMEM)
                CHECK(lco_engine_get_stats(r.engine).waiting == i, "a failed add left a request");
            CHECK(status == LCO_OK && id == i, "request %lld: %s", (long long)id, err.text);
        }
        lco_event events[N];
        while (status == LCO_OK && !idle(&r)) {
            int64_t count;
            lco_status stepped = lco_engine_step(r.engine, events, N, &count, &err);
            CHECK(stepped == LCO_OK || stepped == LCO_ENOMEM, "allocation %lld: %s", (long long)n, err.text);
            int64_t pending = lco_mem_fail_at(0);
            CHECK_OK(lco_engine_check(r.engine, &check_err));
            lco_mem_fail_at(pending);
            for (int64_t i = 0; i < count; i++) {
                answer *one = &a[events[i].request];
                one->logprobs[one->n] = events[i].logprob;
                one->tokens[one->n++] = events[i].token;
                one->finish = events[i].finish;
            }
        }
        untouched = lco_mem_fail_at(0) > 0;
        if (status == LCO_OK) {
            for (int i = 0; i < N; i++)
                expect_same(&a[i], &alone[i], i, "after a failed allocation");
            CHECK(pages_free(&r) == 7, "%lld of 7 pages free", (long long)pages_free(&r));
        }
        lco_engine_destroy(r.engine);
        lco_kv_destroy(r.kv);
        lco_model_destroy(model);
        CHECK(lco_mem_live() == live, "allocation %lld leaves %lld blocks", (long long)n, (long long)(lco_mem_live() - live));
    }
    CHECK(n > 30, "only %lld allocations were tried", (long long)n);
    tiny_free(&weights);
}

/* Requests come, are cancelled and end at random in a small pool; those that end say what they say alone. */
static void random_traffic(void)
{
    enum { KINDS = 15, TOTAL = 300 };
    answer alone[KINDS];
    static answer a[TOTAL];
    answers_alone(alone, KINDS);
    memset(a, 0, sizeof a);
    bool cancelled[TOTAL] = {false};
    rig r;
    rig_open(&r, 11, 5, 20);
    stream s = {.seed = 3};
    int64_t added = 0;
    int ended = 0;
    while (added < TOTAL || !idle(&r)) {
        if (added < TOTAL && stream_below(&s, 100) < 25) {
            int32_t prompt[MOST_PROMPT];
            lco_request q = make_request((int)(added % KINDS), prompt);
            int64_t id = add(&r, &q);
            CHECK(id == added, "id %lld", (long long)id);
            added++;
        }
        if (added > 0 && stream_below(&s, 100) < 3) {
            int64_t id = stream_below(&s, added);
            cancelled[id] = cancelled[id] || a[id].finish == LCO_FINISH_NONE;
            lco_engine_cancel(r.engine, id);
            CHECK_OK(lco_engine_check(r.engine, &check_err));
        }
        step(&r, a);
        if (harness_failures > 20)
            break;
    }
    for (int i = 0; i < TOTAL; i++) {
        CHECK(cancelled[i] == (a[i].finish == LCO_FINISH_NONE), "request %d: cancelled %d, finish %d", i, cancelled[i], a[i].finish);
        if (!cancelled[i])
            expect_same(&a[i], &alone[i % KINDS], i, "random traffic");
        ended += !cancelled[i];
    }
    CHECK(ended > TOTAL / 2 && ended < TOTAL, "%d of %d ended", ended, TOTAL);
    CHECK(lco_engine_get_stats(r.engine).preemptions > 0, "no pressure");
    CHECK(pages_free(&r) == 11, "%lld of 11 pages free", (long long)pages_free(&r));
    rig_close(&r);
}

static void a_forked_child_is_told(void)
{
    rig r;
    int32_t prompt[MOST_PROMPT];
    answer a[1] = {0};
    rig_open(&r, 8, 2, 512);
    lco_request q = simple(prompt, 3, 6);
    add(&r, &q);
    step(&r, a);
    pid_t child = fork();
    if (child == 0) {
        lco_event events[2];
        lco_error err;
        int64_t n;
        lco_status status = lco_engine_step(r.engine, events, 2, &n, &err);
        bool told = status == LCO_EFORK && strstr(err.text, "fork") != NULL && lco_engine_check(r.engine, &err) == LCO_OK;
        lco_engine_destroy(r.engine);
        lco_kv_destroy(r.kv);
        lco_model_destroy(r.model); /* must not wait for threads that are not there */
        _exit(told ? 0 : 1);
    }
    int state = -1;
    CHECK(waitpid(child, &state, 0) == child && WIFEXITED(state) && WEXITSTATUS(state) == 0, "child state %d", state);
    drain(&r, a);
    CHECK(a[0].n == 6, "the parent goes on: %d tokens", a[0].n);
    rig_close(&r);
}

int main(int argc, char **argv)
{
    const test_case tests[] = {
        TEST(greedy_equals_a_plain_loop),
        TEST(neighbours_and_chunks_change_nothing),
        TEST(chunks_change_nothing_with_dynamic_rope),
        TEST(pressure_changes_nothing),
        TEST(two_sequences_in_four_pages),
        TEST(finish_reasons),
        TEST(sequences_go_on),
        TEST(sequences_go_on_under_pressure),
        TEST(cancel_frees_pages_at_once),
        TEST(no_pages_ends_the_request_alone),
        TEST(a_failed_step_keeps_its_events),
        TEST(nan_ends_the_request_alone),
        TEST(bad_requests_are_refused),
        TEST(events_need_room),
        TEST(every_allocation_may_fail),
        TEST(random_traffic),
        TEST(a_forked_child_is_told),
    };
    return RUN_ALL(tests, argc, argv);
}
