/* What the files of the engine share. One step reads: lco_schedule -> lco_batch_build -> lco_llama_forward -> lco_sample -> commit. */
#ifndef LCO_ENGINE_INTERNAL_H
#define LCO_ENGINE_INTERNAL_H

#include "engine.h"

/* A request from lco_engine_add to its last event. */
typedef struct {
    int64_t id;
    int32_t *ids; /* the prompt, then what was generated; room for max_new more than the prompt */
    int64_t n_ids, n_prompt, max_new, min_new;
    int32_t *eos;
    int32_t n_eos;
    bool ignore_eos;
    lco_sampling sampling;
    lco_seq *seq;
    bool owns_seq;
    int64_t base;  /* tokens that the sequence held before this request */
    bool admitted; /* once, perhaps preempted since */

    /* Distinct ids so far, kept only with a repetition penalty: a list and a bit for each id. */
    int32_t *seen;
    int64_t n_seen;
    uint8_t *seen_bits;

    /* Of the step under way. */
    int64_t rows;  /* rows computed, 0: none */
    int64_t logit; /* row of engine->logits, -1: none */
    bool reports;  /* `event` waits to be handed out */
    lco_event event;
} lco_job;

struct lco_engine {
    lco_model *model;
    lco_kv *kv;
    int32_t vocab;
    int64_t max_batch, chunk;

    lco_job **jobs; /* by age; [0, n_running) run, the rest wait */
    int64_t n_jobs, n_running, jobs_cap;
    int64_t next_id;

    /* The batch of a step. */
    lco_batch batch;
    int32_t *row_ids;    /* [chunk + max_batch] */
    lco_item *items;     /* [max_batch] */
    int64_t *logit_rows; /* [max_batch] */
    float *logits;       /* [logits_cap, vocab] */
    int64_t logits_cap;

    float *work; /* of lco_sample */
    int32_t *work_ids;
    lco_engine_stats stats;
};

/* request.c */
lco_status lco_job_create(lco_engine *engine, const lco_request *request, lco_job **out, lco_error *err);
void lco_job_destroy(lco_job *job); /* returns the pages it took */
void lco_job_see(lco_job *job, int32_t id);
void lco_job_fail(lco_job *job, const lco_error *why);
lco_status lco_job_check(const lco_engine *engine, int64_t index, lco_error *err);
static inline int64_t lco_job_computed(const lco_job *job) { return lco_seq_length(job->seq) - job->base; }
static inline int64_t lco_job_generated(const lco_job *job) { return job->n_ids - job->n_prompt; }
static inline bool lco_job_in_prompt(const lco_job *job) { return lco_job_computed(job) < job->n_prompt; }

/* scheduler.c: the most prompt tokens of a step. */
int64_t lco_step_budget(const lco_engine *engine);

/* Decides who computes how many rows in this step and reserves their pages. Requests that can have none are failed. */
lco_status lco_schedule(lco_engine *engine, lco_error *err);

/* batch.c: engine->batch out of the rows that were scheduled. */
void lco_batch_build(lco_engine *engine);

/* sampler.c */
lco_status lco_sampling_check(const lco_sampling *sampling, lco_error *err);

#endif
