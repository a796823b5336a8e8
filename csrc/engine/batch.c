/* Scheduled rows -> the ragged batch of the forward pass. */
#include <string.h>

#include "internal.h"

static void append_item(lco_engine *engine, lco_job *job, bool prompt)
{
    lco_batch *batch = &engine->batch;
    int64_t done = lco_job_computed(job), pos = job->base + done;
    /* Length-dependent rope kinds see the whole prompt from its first chunk on, so that chunking changes nothing. */
    int64_t rope_length = prompt ? job->base + job->n_prompt : pos + 1;
    engine->items[batch->n_items++] = (lco_item){
        .table = lco_seq_table(job->seq), .row = batch->n_rows, .len = job->rows, .pos = pos, .rope_length = rope_length, .prompt = prompt};
    engine->items[batch->n_items - 1].tail = lco_seq_tail(job->seq);
    engine->items[batch->n_items - 1].next_tail = lco_seq_next_tail(job->seq);
    memcpy(engine->row_ids + batch->n_rows, job->ids + done, (size_t)job->rows * sizeof *job->ids);
    batch->n_rows += job->rows;
    /* A new token comes from the row of the last known id. A chunk inside a prompt has none, nor have ids that are computed again after a
     * preemption. */
    if (done + job->rows == job->n_ids && lco_job_generated(job) < job->max_new) {
        job->logit = batch->n_logits;
        engine->logit_rows[batch->n_logits++] = batch->n_rows - 1;
    }
}

void lco_batch_build(lco_engine *engine)
{
    engine->batch = (lco_batch){.ids = engine->row_ids, .items = engine->items, .logit_rows = engine->logit_rows};
    for (int prompt = 1; prompt >= 0; prompt--) {
        for (int64_t i = 0; i < engine->n_running; i++) {
            lco_job *job = engine->jobs[i];
            if (lco_job_in_prompt(job) != prompt)
                continue;
            job->logit = -1;
            if (job->rows > 0)
                append_item(engine, job, prompt);
        }
    }
}
