/* The engine when pages, memory or numbers fail, under cancellation and at random: nothing is lost, leaked or changed. */
#define _GNU_SOURCE
#include <math.h>
#include <sys/wait.h>
#include <unistd.h>

#include "rig.h"

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
    lco_mem_fail_at(3); /* the second's page table and ids can be had, memory for its logits not */
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
        TEST(pressure_changes_nothing),   TEST(two_sequences_in_four_pages),     TEST(sequences_go_on_under_pressure),
        TEST(cancel_frees_pages_at_once), TEST(no_pages_ends_the_request_alone), TEST(a_failed_step_keeps_its_events),
        TEST(nan_ends_the_request_alone), TEST(every_allocation_may_fail),       TEST(random_traffic),
        TEST(a_forked_child_is_told),
    };
    return RUN_ALL(tests, argc, argv);
}
