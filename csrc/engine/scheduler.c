/* Who computes what in a step, and the pages for it.
 *
 * Running requests come first, oldest first: one token each, or the next chunk of their prompt while the step's budget of prompt tokens
 * lasts. Then waiting requests are admitted in order of arrival as long as a slot, budget and pages for all their ids are there (for as many as
 * a window and a step need, where pages that leave it are released); nobody
 * overtakes. A request that needs a page when none is free pushes out the youngest running one (itself, if it is the youngest). As nobody
 * overtakes and the youngest goes first, the running requests always are the oldest. The oldest of all never yields, so every step makes
 * progress. */
#include "internal.h"

int64_t lco_step_budget(const lco_engine *engine)
{
    const int64_t most = lco_kv_step_tokens(engine->kv);
    return engine->chunk < most ? engine->chunk : most;
}

static int64_t rows_wanted(const lco_job *job, int64_t budget)
{
    if (!lco_job_in_prompt(job))
        return 1;
    int64_t left = job->n_prompt - lco_job_computed(job);
    return left < budget ? left : budget;
}

static lco_status preempt_youngest(lco_engine *engine, lco_error *err)
{
    lco_job *job = engine->jobs[engine->n_running - 1];
    lco_status status = lco_seq_truncate(job->seq, job->base, err);
    if (status != LCO_OK)
        return status;
    engine->n_running--;
    engine->stats.preemptions++;
    return LCO_OK;
}

/* Pages for `rows` more tokens of a running request. Afterwards it may be preempted, or failed when it runs alone and there are none, or when
 * its own pages can't be had from a file. */
static lco_status make_room(lco_engine *engine, int64_t index, int64_t rows, lco_error *err)
{
    lco_job *job = engine->jobs[index];
    while (index < engine->n_running) {
        lco_error why;
        lco_status status = lco_seq_reserve(job->seq, rows, &why);
        if (status == LCO_OK)
            status = lco_seq_open(job->seq, rows, &why);
        if (status == LCO_OK)
            break;
        if (status == LCO_EIO) {
            lco_job_fail(job, &why);
            break;
        }
        if (status != LCO_EPAGES) {
            *err = why;
            return status;
        }
        if (engine->n_running == 1) {
            lco_job_fail(job, &why);
            break;
        }
        status = preempt_youngest(engine, err);
        if (status != LCO_OK)
            return status;
    }
    return LCO_OK;
}

/* Admits the oldest waiting request. `*admitted` is false when it has to wait for pages; with nobody running (`alone`) it fails instead.
 * `budget`: prompt tokens that this step has left. */
static lco_status admit(lco_engine *engine, bool alone, int64_t budget, bool *admitted, lco_error *err)
{
    lco_job *job = engine->jobs[engine->n_running];
    lco_error why;
    const int64_t most = lco_kv_most_tokens(engine->kv, lco_step_budget(engine)); /* of a longer one, pages are released as it goes on */
    lco_status status = LCO_OK;
    int64_t found = 0;
    if (lco_seq_length(job->seq) == 0 && lco_model_shares_prefixes(engine->model))
        status = lco_seq_adopt(job->seq, job->ids, job->n_prompt, &found, &why);
    const int64_t left = job->n_ids - lco_job_computed(job);
    if (status == LCO_OK)
        status = lco_seq_reserve(job->seq, left < most ? left : most, &why);
    if (status == LCO_OK)
        status = lco_seq_open(job->seq, rows_wanted(job, budget), &why);
    if (status != LCO_OK)
        (void)lco_seq_truncate(job->seq, job->base, NULL); /* waiting requests hold no pages */
    if (status != LCO_OK && status != LCO_EPAGES && status != LCO_EIO) {
        *err = why;
        return status;
    }
    const bool fails = status == LCO_EIO || (status == LCO_EPAGES && alone);
    *admitted = status == LCO_OK || fails;
    if (*admitted)
        engine->n_running++;
    if (status == LCO_OK && !job->admitted) {
        engine->stats.cached_tokens += found;
        job->admitted = true;
    }
    if (fails)
        lco_job_fail(job, &why);
    return LCO_OK;
}

lco_status lco_schedule(lco_engine *engine, lco_error *err)
{
    int64_t budget = lco_step_budget(engine), able = 0; /* able: running and not failed */
    lco_kv_begin_step(engine->kv);
    for (int64_t i = 0; i < engine->n_running; i++) {
        lco_job *job = engine->jobs[i];
        int64_t rows = rows_wanted(job, budget);
        lco_status status = make_room(engine, i, rows, err);
        if (status != LCO_OK)
            return status;
        if (i == engine->n_running || job->reports)
            break;
        able++;
        job->rows = rows;
        if (lco_job_in_prompt(job))
            budget -= rows;
    }
    while (budget > 0 && engine->n_running < engine->max_batch && engine->n_running < engine->n_jobs) {
        lco_job *job = engine->jobs[engine->n_running];
        bool admitted;
        lco_status status = admit(engine, able == 0, budget, &admitted, err);
        if (status != LCO_OK)
            return status;
        if (!admitted)
            break;
        if (job->reports)
            continue;
        able++;
        job->rows = rows_wanted(job, budget);
        budget -= job->rows;
    }
    return LCO_OK;
}
