/* A request: checked once when it is added, then carried as a job. */
#include <string.h>

#include "internal.h"

static lco_status check_ids(const char *name, const int32_t *ids, int64_t n, int32_t vocab, lco_error *err)
{
    if (n < 0 || (n > 0 && ids == NULL))
        return lco_fail(err, LCO_EINVAL, "n_%s = %lld with %s ids, expected ids and a count of at least 0", name, (long long)n,
                        ids == NULL ? "no" : "some");
    for (int64_t i = 0; i < n; i++)
        if (ids[i] < 0 || ids[i] >= vocab)
            return lco_fail(err, LCO_EINVAL, "%s[%lld] = %d, expected a token id in [0, %d) (vocab_size)", name, (long long)i, ids[i],
                            vocab);
    return LCO_OK;
}

static lco_status check_lengths(const lco_engine *engine, const lco_request *request, int64_t base, lco_error *err)
{
    const int64_t max_positions = lco_model_get_config(engine->model)->max_positions;
    const lco_kv_options *kv = lco_kv_get_options(engine->kv);
    const int64_t n_prompt = request->n_prompt, max_new = request->max_new_tokens;
    if (max_new < 0)
        return lco_fail(err, LCO_EINVAL, "max_new_tokens = %lld, expected at least 0", (long long)max_new);
    if (request->min_new_tokens < 0 || request->min_new_tokens > max_new)
        return lco_fail(err, LCO_EINVAL, "min_new_tokens = %lld, expected 0 to max_new_tokens (%lld)", (long long)request->min_new_tokens,
                        (long long)max_new);
    /* Subtractions, since the sum of two counts from outside may not fit. */
    if (n_prompt > max_positions - base || max_new > max_positions - base - n_prompt)
        return lco_fail(
            err, LCO_EINVAL,
            "a prompt of %lld ids after %lld cached ones with max_new_tokens = %lld does not fit the %lld positions of the model "
            "(max_positions); at most %lld new tokens fit",
            (long long)n_prompt, (long long)base, (long long)max_new, (long long)max_positions,
            (long long)(n_prompt > max_positions - base ? 0 : max_positions - base - n_prompt));
    const int64_t tokens = base + n_prompt + (max_new > 0 ? max_new - 1 : 0); /* the last token is never computed */
    const int64_t needed = lco_kv_most_pages(engine->kv, base, tokens, lco_step_budget(engine)), total = kv->max_tokens / kv->page_size;
    if (needed > total)
        return lco_fail(
            err, LCO_EPAGES,
            "the request needs %lld pages of %d tokens (%lld cached ids, prompt of %lld, max_new_tokens = %lld), the cache has %lld "
            "in all; make it with max_tokens of at least %lld (it has %lld)",
            (long long)needed, kv->page_size, (long long)base, (long long)n_prompt, (long long)max_new, (long long)total,
            (long long)(tokens < needed * kv->page_size ? tokens : needed * kv->page_size), (long long)kv->max_tokens);
    return LCO_OK;
}

static lco_status check_sequence(const lco_engine *engine, const lco_seq *seq, lco_error *err)
{
    if (seq == NULL)
        return LCO_OK;
    if (lco_seq_cache(seq) != engine->kv)
        return lco_fail(err, LCO_EINVAL, "the sequence belongs to another cache, expected one of the engine's cache");
    for (int64_t i = 0; i < engine->n_jobs; i++)
        if (engine->jobs[i]->seq == seq)
            return lco_fail(err, LCO_EINVAL, "the sequence is in use by request %lld, expected one that no request works on",
                            (long long)engine->jobs[i]->id);
    return LCO_OK;
}

static lco_status check_request(const lco_engine *engine, const lco_request *request, lco_error *err)
{
    lco_status status;
    if (request->n_prompt < 1)
        return lco_fail(err, LCO_EINVAL, "the prompt is empty (n_prompt = %lld), expected at least one token id",
                        (long long)request->n_prompt);
    if ((status = check_sequence(engine, request->sequence, err)) != LCO_OK)
        return status;
    int64_t base = request->sequence != NULL ? lco_seq_length(request->sequence) : 0;
    if ((status = check_lengths(engine, request, base, err)) != LCO_OK || /* before the ids: it bounds the count of ids to look at */
        (status = check_ids("prompt", request->prompt, request->n_prompt, engine->vocab, err)) != LCO_OK ||
        (status = check_ids("eos", request->eos, request->n_eos, engine->vocab, err)) != LCO_OK)
        return status;
    return lco_sampling_check(&request->sampling, err);
}

/* The list of distinct ids never holds more than the vocabulary. */
static bool start_seen(lco_job *job, const lco_request *request, int32_t vocab)
{
    const int64_t held = request->sequence != NULL ? lco_seq_length(request->sequence) : 0, most = held + job->n_prompt + job->max_new;
    job->seen = lco_alloc((size_t)(most < vocab ? most : vocab) * sizeof *job->seen);
    job->seen_bits = lco_calloc((size_t)vocab / 8 + 1, 1);
    if (job->seen == NULL || job->seen_bits == NULL)
        return false;
    for (int64_t i = 0; i < held; i++)
        if (lco_seq_ids(request->sequence)[i] >= 0)
            lco_job_see(job, lco_seq_ids(request->sequence)[i]);
    for (int64_t i = 0; i < job->n_prompt; i++)
        lco_job_see(job, job->ids[i]);
    return true;
}

/* Gives back pages: all that the engine took, or those reserved past the length of a caller's sequence and those kept for going back. */
static void return_pages(lco_job *job)
{
    (void)lco_seq_truncate(job->seq, job->owns_seq ? 0 : lco_seq_length(job->seq), NULL);
    (void)lco_seq_hold(job->seq, 0, NULL);
}

lco_status lco_job_create(lco_engine *engine, const lco_request *request, lco_job **out, lco_error *err)
{
    *out = NULL;
    lco_status status = check_request(engine, request, err);
    if (status != LCO_OK)
        return status;
    lco_job *job = lco_calloc(1, sizeof *job);
    if (job == NULL)
        return lco_fail(err, LCO_ENOMEM, "out of memory for a request");
    job->n_prompt = job->n_ids = request->n_prompt;
    job->max_new = request->max_new_tokens;
    job->min_new = request->min_new_tokens;
    job->n_eos = request->n_eos;
    job->ignore_eos = request->ignore_eos;
    job->sampling = request->sampling;
    job->logit = -1;
    job->ids = lco_alloc((size_t)(job->n_prompt + job->max_new) * sizeof *job->ids);
    job->eos = lco_alloc((size_t)job->n_eos * sizeof *job->eos);
    if (job->ids == NULL || job->eos == NULL) {
        status = lco_fail(err, LCO_ENOMEM, "out of memory for %lld ids of a request", (long long)(job->n_prompt + job->max_new));
        goto fail;
    }
    memcpy(job->ids, request->prompt, (size_t)job->n_prompt * sizeof *job->ids);
    if (job->n_eos > 0)
        memcpy(job->eos, request->eos, (size_t)job->n_eos * sizeof *job->eos);
    if (job->sampling.repetition_penalty != 1.0f && !start_seen(job, request, engine->vocab)) {
        status = lco_fail(err, LCO_ENOMEM, "out of memory for the repetition penalty of a request (vocabulary of %d)", engine->vocab);
        goto fail;
    }
    job->seq = request->sequence;
    if (job->seq == NULL) {
        status = lco_seq_create(engine->kv, &job->seq, err);
        if (status != LCO_OK)
            goto fail;
        job->owns_seq = true;
    }
    job->base = lco_seq_length(job->seq);
    if ((status = lco_seq_hold(job->seq, job->n_prompt + job->max_new, err)) != LCO_OK)
        goto fail;
    *out = job;
    return LCO_OK;
fail:
    job->seq = NULL; /* a caller's sequence stays as it was */
    lco_job_destroy(job);
    return status;
}

void lco_job_destroy(lco_job *job)
{
    if (job == NULL)
        return;
    if (job->seq != NULL)
        return_pages(job);
    if (job->owns_seq)
        lco_seq_destroy(job->seq);
    lco_free(job->seen_bits);
    lco_free(job->seen);
    lco_free(job->eos);
    lco_free(job->ids);
    lco_free(job);
}

void lco_job_see(lco_job *job, int32_t id)
{
    uint8_t bit = (uint8_t)(1u << (id & 7));
    if (job->seen_bits == NULL || (job->seen_bits[id >> 3] & bit) != 0)
        return;
    job->seen_bits[id >> 3] |= bit;
    job->seen[job->n_seen++] = id;
}

void lco_job_fail(lco_job *job, const lco_error *why)
{
    return_pages(job); /* now, as others may be waiting for them in this very step */
    job->rows = 0;
    job->logit = -1;
    job->reports = true;
    job->event = (lco_event){.request = job->id, .token = -1, .finish = LCO_FINISH_ERROR, .error = *why};
}

lco_status lco_job_check(const lco_engine *engine, int64_t index, lco_error *err)
{
    const lco_job *job = engine->jobs[index];
    const bool running = index < engine->n_running;
    const int64_t computed = lco_job_computed(job), generated = lco_job_generated(job);
    const long long id = job->id;
    if (index > 0 && engine->jobs[index - 1]->id >= job->id)
        return lco_fail(err, LCO_EINVAL, "request %lld stands after request %lld (invariant 1)", id,
                        (long long)engine->jobs[index - 1]->id);
    if (!running && (computed != 0 || job->reports))
        return lco_fail(err, LCO_EINVAL, "request %lld waits, but has computed %lld ids (invariant 1)", id, (long long)computed);
    if (computed < 0 || (running && !job->reports && computed >= job->n_ids))
        return lco_fail(err, LCO_EINVAL, "request %lld has computed %lld of %lld ids (invariants 3, 4)", id, (long long)computed,
                        (long long)job->n_ids);
    if (generated < 0 || generated > job->max_new || (generated > 0 && generated == job->max_new))
        return lco_fail(err, LCO_EINVAL, "request %lld is here with %lld of %lld tokens generated (invariant 3)", id, (long long)generated,
                        (long long)job->max_new);
    for (int64_t i = 0; i < index; i++)
        if (engine->jobs[i]->seq == job->seq)
            return lco_fail(err, LCO_EINVAL, "requests %lld and %lld share a sequence (invariant 4)", (long long)engine->jobs[i]->id, id);
    int64_t bits = 0, known = 0;
    for (int32_t i = 0; job->seen_bits != NULL && i < engine->vocab; i++)
        bits += (job->seen_bits[i >> 3] >> (i & 7)) & 1;
    for (int64_t i = 0; job->seen_bits != NULL && i < job->n_ids; i++)
        known += (job->seen_bits[job->ids[i] >> 3] >> (job->ids[i] & 7)) & 1;
    if (job->seen_bits != NULL && (bits != job->n_seen || known != job->n_ids))
        return lco_fail(err, LCO_EINVAL, "request %lld counts %lld ids as seen, its bits say %lld (invariant 5)", id,
                        (long long)job->n_seen, (long long)bits);
    return LCO_OK;
}
