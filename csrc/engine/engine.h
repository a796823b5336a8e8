/* The loop: requests in, tokens out. Continuous batching: at every step running sequences decode one token each, and waiting prompts are
 * admitted and computed in chunks as far as the token budget of a step goes.
 *
 * Invariants (lco_engine_check proves 1 to 5)
 * 1. Requests are ordered by age; the running ones are the oldest. A waiting request holds no pages but those its sequence came with.
 * 2. At most max_batch requests run.
 * 3. Of its ids (prompt, then generated), a running request has computed a leading part, never all: the last one is still to be computed.
 * 4. A sequence serves at most one request, and its length is what it came with plus what the request has computed.
 * 5. The ids that the repetition penalty counts are distinct, and all of the prompt and the generated ones are among them.
 * 6. A step that fails leaves every sequence at a committed length and may be repeated; a failure that belongs to one request (no pages,
 *    NaN) finishes that request with LCO_FINISH_ERROR and lets the others go on.
 * 7. The token of a request depends on its own ids, parameters and seed alone: not on its neighbours, nor on having been preempted.
 *
 * States: waiting -> (admitted: pages for all its ids could be had) running -> finished, forgotten once its last event was handed out.
 *         running -> (preempted: an older request needed pages) waiting; its prompt and then its generated ids are computed again as
 *         before. */
#ifndef LCO_ENGINE_ENGINE_H
#define LCO_ENGINE_ENGINE_H

#include "../model/model.h"

typedef struct {
    float temperature;        /* > 0; with do_sample false ignored */
    int32_t top_k;            /* 0: off */
    float top_p;              /* (0, 1], 1: off */
    float min_p;              /* [0, 1], 0: off */
    float repetition_penalty; /* > 0, 1: off */
    bool do_sample;           /* false: the largest logit, ties to the lowest id */
    uint64_t seed;
} lco_sampling;

typedef struct {
    const int32_t *prompt;  /* copied */
    int64_t n_prompt;       /* >= 1 */
    int64_t max_new_tokens; /* 0: only compute the prompt; one event with token -1 and LCO_FINISH_LENGTH */
    const int32_t *eos;     /* ids that end generation; copied */
    int32_t n_eos;
    bool ignore_eos;
    int64_t min_new_tokens; /* eos is not taken before */
    lco_sampling sampling;
    /* A sequence to go on with (its cache holds what came before, and its ids count for the repetition penalty), or NULL: a new one, freed at the end. It must outlive the request and
     * not be written by others meanwhile. Afterwards it holds the prompt and all generated ids but the last, which was never computed. */
    lco_seq *sequence;
} lco_request;

typedef enum { LCO_FINISH_NONE = 0, LCO_FINISH_EOS, LCO_FINISH_LENGTH, LCO_FINISH_CANCELLED, LCO_FINISH_ERROR } lco_finish;

typedef struct {
    int64_t request;
    int32_t token; /* -1 when none came (error, or length 0) */
    float logprob; /* of `token` under softmax of the raw logits */
    lco_finish finish;
    lco_error error; /* with LCO_FINISH_ERROR */
} lco_event;

typedef struct {
    int64_t max_batch; /* sequences computed at once, 1..4096; 0: 64 */
    int64_t chunk;     /* prompt tokens of one step, 1..1048576; 0: 512 */
} lco_engine_options;

typedef struct {
    int64_t steps, prompt_tokens, decode_tokens; /* computed so far */
    int64_t cached_tokens; /* of prompts, found in the prefix index when their request was admitted, the first time if it was preempted */
    int64_t waiting, running, preemptions;
    double forward_seconds, sample_seconds, other_seconds; /* of the steps; `other` is the engine's own overhead */
} lco_engine_stats;

typedef struct lco_engine lco_engine;

/* Model and cache must outlive the engine. LCO_EINVAL when the cache's shape is not the model's. */
lco_status lco_engine_create(lco_model *model, lco_kv *kv, const lco_engine_options *options, lco_engine **out, lco_error *err);
void lco_engine_destroy(lco_engine *engine); /* frees the sequences it made */
/* Checks the request (ids in the vocabulary, lengths within max_positions and cache, parameters in range) and queues it. Ids of requests
 * grow from 0. LCO_EPAGES when the whole cache is too small for it. */
lco_status lco_engine_add(lco_engine *engine, const lco_request *request, int64_t *id, lco_error *err);
/* Ends a request at once, without an event; its pages are free when this returns. Unknown ids are ignored. */
void lco_engine_cancel(lco_engine *engine, int64_t id);
/* Runs one step and writes at most one event a running request, in order of age. cap >= max_batch. n = 0 with LCO_OK: more prompt chunks to
 * go, or nothing to do (lco_engine_get_stats tells: waiting + running == 0). */
lco_status lco_engine_step(lco_engine *engine, lco_event *events, int64_t cap, int64_t *n, lco_error *err);
lco_engine_stats lco_engine_get_stats(const lco_engine *engine);
lco_status lco_engine_check(const lco_engine *engine, lco_error *err);

/* Picks a token from logits[vocab]. Order: repetition penalty over `seen` (prompt and output, once per distinct id), banned ids,
 * temperature, top_k, top_p, min_p, then one draw. Ties of equal scores go to the lowest id throughout. The draw is a function of (seed,
 * position) alone. LCO_ENUMERIC when a logit is NaN or +infinity, or when no token is left to take. */
typedef struct {
    const float *logits;
    int32_t vocab;
    const int32_t *seen; /* distinct ids */
    int64_t n_seen;
    const int32_t *banned; /* ids that may not be taken (eos before min_new_tokens) */
    int32_t n_banned;
    int64_t position; /* index of the new token in the sequence */
    lco_sampling sampling;
    float *work;       /* [2 * vocab] scratch */
    int32_t *work_ids; /* [vocab] scratch */
} lco_sample_args;
lco_status lco_sample(const lco_sample_args *args, int32_t *token, float *logprob, lco_error *err);

#endif
