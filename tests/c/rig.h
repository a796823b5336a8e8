/* An engine over the tiny model, its requests and what they said. */
#ifndef LCO_TESTS_RIG_H
#define LCO_TESTS_RIG_H

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

static inline void rig_open(rig *r, int64_t pages, int64_t max_batch, int64_t chunk)
{
    tiny_make(&r->weights);
    CHECK_OK(tiny_model(&r->weights, 1, &r->model, &check_err));
    CHECK_OK(tiny_cache(pages, &r->kv, &check_err));
    CHECK_OK(lco_engine_create(r->model, r->kv, &(lco_engine_options){.max_batch = max_batch, .chunk = chunk}, &r->engine, &check_err));
}

static inline void rig_close(rig *r)
{
    lco_engine_destroy(r->engine);
    CHECK_OK(lco_kv_check(r->kv, &check_err));
    lco_kv_destroy(r->kv);
    lco_model_destroy(r->model);
    tiny_free(&r->weights);
}

static inline int64_t pages_free(const rig *r) { return lco_kv_get_stats(r->kv).pages_free; }

/* One step; answers[id] collects what came. */
static inline int64_t step(rig *r, answer *answers)
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

static inline bool idle(const rig *r)
{
    lco_engine_stats s = lco_engine_get_stats(r->engine);
    return s.waiting + s.running == 0;
}

static inline void drain(rig *r, answer *answers)
{
    for (int steps = 0; !idle(r); steps++) {
        if (steps > 20000) {
            CHECK(false, "the engine does not come to an end");
            return;
        }
        step(r, answers);
    }
}

static inline int64_t add(rig *r, const lco_request *request)
{
    int64_t id = -1;
    CHECK_OK(lco_engine_add(r->engine, request, &id, &check_err));
    return id;
}

/* Requests of all kinds; the n-th is always the same. */
static inline lco_request make_request(int n, int32_t *prompt)
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

static inline void expect_same(const answer *found, const answer *expected, int n, const char *where)
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
static inline void answers_alone(answer *alone, int n)
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

static inline lco_request simple(int32_t *prompt, int64_t n_prompt, int64_t max_new)
{
    for (int64_t i = 0; i < n_prompt; i++)
        prompt[i] = (int32_t)((i * i + 3) % TINY_VOCAB);
    return (lco_request){.prompt = prompt,
                         .n_prompt = n_prompt,
                         .max_new_tokens = max_new,
                         .sampling = {.temperature = 1.0f, .top_p = 1.0f, .repetition_penalty = 1.0f}};
}

#endif
