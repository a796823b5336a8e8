/* The loop. A step is schedule -> forward -> commit -> sample -> report. */
#define _POSIX_C_SOURCE 200809L
#include "engine.h"

#include <string.h>
#include <time.h>

#include "internal.h"

#define DEFAULT_BATCH 64
#define MAX_BATCH 4096
#define DEFAULT_CHUNK 512
#define MAX_CHUNK ((int64_t)1 << 20)

static double now(void)
{
    struct timespec t;
    clock_gettime(CLOCK_MONOTONIC, &t);
    return (double)t.tv_sec + 1e-9 * (double)t.tv_nsec;
}

lco_status lco_engine_create(lco_model *model, lco_kv *kv, const lco_engine_options *options, lco_engine **out, lco_error *err)
{
    *out = NULL;
    const int64_t max_batch = options->max_batch != 0 ? options->max_batch : DEFAULT_BATCH;
    const int64_t chunk = options->chunk != 0 ? options->chunk : DEFAULT_CHUNK;
    if (max_batch < 1 || max_batch > MAX_BATCH)
        return lco_fail(err, LCO_EINVAL, "max_batch = %lld, expected 0 (%d) or 1 to %d", (long long)max_batch, DEFAULT_BATCH, MAX_BATCH);
    if (chunk < 1 || chunk > MAX_CHUNK)
        return lco_fail(err, LCO_EINVAL, "chunk = %lld, expected 0 (%d) or 1 to %lld", (long long)chunk, DEFAULT_CHUNK,
                        (long long)MAX_CHUNK);
    lco_status status = lco_model_fits(model, kv, err);
    if (status != LCO_OK)
        return status;

    lco_engine *engine = lco_calloc(1, sizeof *engine);
    if (engine == NULL)
        return lco_fail(err, LCO_ENOMEM, "out of memory for an engine");
    engine->model = model;
    engine->kv = kv;
    engine->vocab = lco_model_get_config(model)->vocab_size;
    engine->max_batch = max_batch;
    engine->chunk = chunk;
    engine->row_ids = lco_alloc((size_t)(chunk + max_batch) * sizeof *engine->row_ids);
    engine->items = lco_alloc((size_t)max_batch * sizeof *engine->items);
    engine->logit_rows = lco_alloc((size_t)max_batch * sizeof *engine->logit_rows);
    engine->work = lco_alloc(2 * (size_t)engine->vocab * sizeof *engine->work);
    engine->work_ids = lco_alloc((size_t)engine->vocab * sizeof *engine->work_ids);
    if (!engine->row_ids || !engine->items || !engine->logit_rows || !engine->work || !engine->work_ids) {
        lco_engine_destroy(engine);
        return lco_fail(err, LCO_ENOMEM, "out of memory for an engine (max_batch = %lld, chunk = %lld, vocabulary of %d)",
                        (long long)max_batch, (long long)chunk, lco_model_get_config(model)->vocab_size);
    }
    *out = engine;
    return LCO_OK;
}

void lco_engine_destroy(lco_engine *engine)
{
    if (engine == NULL)
        return;
    for (int64_t i = 0; i < engine->n_jobs; i++)
        lco_job_destroy(engine->jobs[i]);
    lco_free(engine->jobs);
    lco_free(engine->work_ids);
    lco_free(engine->work);
    lco_free(engine->logits);
    lco_free(engine->logit_rows);
    lco_free(engine->items);
    lco_free(engine->row_ids);
    lco_free(engine);
}

static lco_status room_for_job(lco_engine *engine, lco_error *err)
{
    if (engine->n_jobs < engine->jobs_cap)
        return LCO_OK;
    int64_t cap = engine->jobs_cap > 0 ? 2 * engine->jobs_cap : 16;
    lco_job **jobs = lco_alloc((size_t)cap * sizeof(lco_job *));
    if (jobs == NULL)
        return lco_fail(err, LCO_ENOMEM, "out of memory for a queue of %lld requests", (long long)cap);
    if (engine->n_jobs > 0)
        memcpy(jobs, engine->jobs, (size_t)engine->n_jobs * sizeof(lco_job *));
    lco_free(engine->jobs);
    engine->jobs = jobs;
    engine->jobs_cap = cap;
    return LCO_OK;
}

lco_status lco_engine_add(lco_engine *engine, const lco_request *request, int64_t *id, lco_error *err)
{
    lco_job *job;
    lco_status status = room_for_job(engine, err);
    if (status == LCO_OK)
        status = lco_job_create(engine, request, &job, err);
    if (status != LCO_OK)
        return status;
    job->id = engine->next_id++;
    engine->jobs[engine->n_jobs++] = job;
    *id = job->id;
    return LCO_OK;
}

static void remove_job(lco_engine *engine, int64_t index)
{
    lco_job_destroy(engine->jobs[index]);
    memmove(engine->jobs + index, engine->jobs + index + 1, (size_t)(engine->n_jobs - index - 1) * sizeof(lco_job *));
    engine->n_jobs--;
    if (index < engine->n_running)
        engine->n_running--;
}

void lco_engine_cancel(lco_engine *engine, int64_t id)
{
    for (int64_t i = 0; i < engine->n_jobs; i++) {
        if (engine->jobs[i]->id == id) {
            remove_job(engine, i);
            return;
        }
    }
}

static lco_status room_for_logits(lco_engine *engine, int64_t rows, lco_error *err)
{
    if (rows <= engine->logits_cap)
        return LCO_OK;
    int64_t cap = 2 * engine->logits_cap > rows ? 2 * engine->logits_cap : rows;
    cap = cap < engine->max_batch ? cap : engine->max_batch;
    float *logits = lco_alloc((size_t)cap * (size_t)engine->vocab * sizeof(float));
    if (logits == NULL)
        return lco_fail(err, LCO_ENOMEM, "out of memory for the logits of %lld sequences (vocabulary of %d)", (long long)cap,
                        engine->vocab);
    lco_free(engine->logits);
    engine->logits = logits;
    engine->logits_cap = cap;
    return LCO_OK;
}

static lco_status forward(lco_engine *engine, lco_error *err)
{
    lco_status status = room_for_logits(engine, engine->batch.n_logits, err);
    if (status == LCO_OK)
        status = lco_batch_check(engine->model, engine->kv, &engine->batch, err);
    if (status == LCO_OK)
        status = lco_llama_forward(engine->model, engine->kv, &engine->batch, engine->logits, err);
    return status;
}

/* Requests whose pages could not be read in this step fail; nothing of what was computed for them counts. */
static void drop_lost(lco_engine *engine)
{
    for (int64_t i = 0; i < engine->n_running; i++) {
        lco_job *job = engine->jobs[i];
        lco_error why;
        if (job->rows > 0 && lco_seq_lost(job->seq, &why) != LCO_OK)
            lco_job_fail(job, &why);
    }
}

static void commit(lco_engine *engine)
{
    for (int64_t i = 0; i < engine->n_running; i++) {
        lco_job *job = engine->jobs[i];
        if (job->rows == 0)
            continue;
        if (lco_job_in_prompt(job))
            engine->stats.prompt_tokens += job->rows;
        else
            engine->stats.decode_tokens += job->rows;
        lco_seq_commit(job->seq, job->ids + lco_job_computed(job), job->rows, lco_job_in_prompt(job));
        if (lco_model_shares_prefixes(engine->model))
            lco_seq_publish(job->seq);
    }
}

static bool ends(const lco_job *job, int32_t token)
{
    for (int32_t i = 0; i < job->n_eos && !job->ignore_eos; i++)
        if (job->eos[i] == token)
            return true;
    return false;
}

static void take_token(lco_job *job, int32_t token, float logprob)
{
    job->ids[job->n_ids++] = token;
    lco_job_see(job, token);
    job->reports = true;
    job->event = (lco_event){.request = job->id, .token = token, .logprob = logprob};
    if (ends(job, token))
        job->event.finish = LCO_FINISH_EOS;
    else if (lco_job_generated(job) == job->max_new)
        job->event.finish = LCO_FINISH_LENGTH;
}

/* NaN and the like end the request that has them, not the step. */
static void sample(lco_engine *engine, lco_job *job)
{
    lco_sample_args args = {.logits = engine->logits + job->logit * engine->vocab,
                            .vocab = engine->vocab,
                            .seen = job->seen,
                            .n_seen = job->n_seen,
                            .banned = job->eos,
                            .n_banned = lco_job_generated(job) < job->min_new ? job->n_eos : 0,
                            .position = job->base + job->n_ids,
                            .sampling = job->sampling,
                            .work = engine->work,
                            .work_ids = engine->work_ids};
    int32_t token;
    float logprob;
    lco_error why, full;
    if (lco_sample(&args, &token, &logprob, &why) == LCO_OK) {
        take_token(job, token, logprob);
        return;
    }
    lco_fail(&full, why.code, "request %lld, position %lld: %.360s", (long long)job->id, (long long)args.position, why.text);
    lco_job_fail(job, &full);
}

static void sample_all(lco_engine *engine)
{
    for (int64_t i = 0; i < engine->n_running; i++) {
        lco_job *job = engine->jobs[i];
        if (job->logit >= 0) {
            sample(engine, job);
        } else if (job->max_new == 0 && job->rows > 0 && lco_job_computed(job) == job->n_ids) {
            job->reports = true;
            job->event = (lco_event){.request = job->id, .token = -1, .finish = LCO_FINISH_LENGTH};
        }
    }
}

/* Hands out what running requests have to say and forgets the finished ones. */
static int64_t report(lco_engine *engine, lco_event *events)
{
    int64_t n = 0, kept = 0, running = 0;
    for (int64_t i = 0; i < engine->n_jobs; i++) {
        lco_job *job = engine->jobs[i];
        if (job->reports) {
            job->reports = false;
            events[n++] = job->event;
            if (job->event.finish != LCO_FINISH_NONE) {
                lco_job_destroy(job);
                continue;
            }
        }
        running += i < engine->n_running;
        engine->jobs[kept++] = job;
    }
    engine->n_jobs = kept;
    engine->n_running = running;
    return n;
}

static bool has_reports(const lco_engine *engine)
{
    for (int64_t i = 0; i < engine->n_running; i++)
        if (engine->jobs[i]->reports)
            return true;
    return false;
}

lco_status lco_engine_step(lco_engine *engine, lco_event *events, int64_t cap, int64_t *n, lco_error *err)
{
    *n = 0;
    if (cap < engine->max_batch)
        return lco_fail(err, LCO_EINVAL, "room for %lld events, expected at least max_batch (%lld)", (long long)cap,
                        (long long)engine->max_batch);
    if (has_reports(engine)) { /* of a step that failed after a request of it had */
        *n = report(engine, events);
        return LCO_OK;
    }
    const double start = now();
    double computed = start, sampled = start, scheduled = start;
    lco_status status = lco_schedule(engine, err);
    if (status != LCO_OK)
        return status;
    lco_batch_build(engine);
    if (engine->batch.n_rows > 0) {
        scheduled = now();
        status = forward(engine, err);
        if (status != LCO_OK)
            return status;
        computed = now();
        drop_lost(engine);
        commit(engine);
        sample_all(engine);
        sampled = now();
        engine->stats.steps++;
    }
    *n = report(engine, events);
    engine->stats.forward_seconds += computed - scheduled;
    engine->stats.sample_seconds += sampled - computed;
    engine->stats.other_seconds += (scheduled - start) + (now() - sampled);
    return LCO_OK;
}

lco_engine_stats lco_engine_get_stats(const lco_engine *engine)
{
    lco_engine_stats stats = engine->stats;
    stats.running = engine->n_running;
    stats.waiting = engine->n_jobs - engine->n_running;
    return stats;
}

lco_status lco_engine_check(const lco_engine *engine, lco_error *err)
{
    if (engine->n_running < 0 || engine->n_running > engine->n_jobs || engine->n_running > engine->max_batch ||
        engine->n_jobs > engine->jobs_cap)
        return lco_fail(err, LCO_EINVAL, "%lld of %lld requests run, at most %lld may (invariant 2)", (long long)engine->n_running,
                        (long long)engine->n_jobs, (long long)engine->max_batch);
    for (int64_t i = 0; i < engine->n_jobs; i++) {
        lco_status status = lco_job_check(engine, i, err);
        if (status != LCO_OK)
            return status;
    }
    return lco_kv_check(engine->kv, err);
}
