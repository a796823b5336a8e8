/* lco_llama_forward: the whole model, in the order in which it computes. THE function to read first. */
#include <math.h>
#include <string.h>

#include "internal.h"

/* Buffers of one step, float32, rows in batch order. */
typedef struct {
    float *x;             /* [m, hidden] the residual stream */
    float *normed;        /* [m, hidden] */
    float *q;             /* [m, n_heads * head_dim] */
    float *k, *v;         /* [m, n_kv_heads * head_dim] */
    float *attended;      /* [m, n_heads * head_dim] */
    float *gate, *up;     /* [m, intermediate] */
    float *cos, *sin;     /* [m, head_dim / 2] */
} buffers;

static lco_status take_buffers(const lco_model_config *c, lco_arena *scratch, int64_t m, buffers *b, lco_error *err)
{
    const size_t rows = (size_t)m, q = (size_t)c->n_heads * (size_t)c->head_dim, kv = (size_t)c->n_kv_heads * (size_t)c->head_dim;
    const struct {
        float **at;
        size_t width;
    } parts[] = {
        {&b->x, (size_t)c->hidden_size},          {&b->normed, (size_t)c->hidden_size},     {&b->q, q},
        {&b->k, kv},                              {&b->v, kv},                              {&b->attended, q},
        {&b->gate, (size_t)c->intermediate_size}, {&b->up, (size_t)c->intermediate_size},   {&b->cos, (size_t)c->head_dim / 2},
        {&b->sin, (size_t)c->head_dim / 2},
    };
    for (size_t i = 0; i < sizeof parts / sizeof parts[0]; i++) {
        *parts[i].at = lco_arena_take(scratch, rows * parts[i].width * sizeof(float));
        if (*parts[i].at == NULL)
            return lco_fail(err, LCO_ENOMEM, "out of memory for a step of %lld tokens (%zu floats a token and buffer); use a smaller chunk",
                            (long long)m, parts[i].width);
    }
    return LCO_OK;
}

static lco_linear_part part(float *out, const lco_weight *w)
{
    return (lco_linear_part){.out = out, .ld_out = w->n, .w = w->data, .dtype = w->dtype, .bias = w->bias, .n = w->n};
}

/* Keeps rows[0..n) of two buffers, moved to the front. rows ascend, so a move never overwrites a row still to come. */
static void keep_rows(float *buffer, int64_t width, const int64_t *rows, int64_t n)
{
    for (int64_t i = 0; i < n; i++)
        if (rows[i] != i)
            memcpy(buffer + i * width, buffer + rows[i] * width, (size_t)width * sizeof(float));
}

/* x += o_proj(attended), then x += down(silu(gate(norm(x))) * up(norm(x))). */
static lco_status after_attention(const lco_model *model, const lco_layer *layer, const buffers *b, int64_t m, int64_t m_prompt)
{
    const lco_model_config *c = &model->config;
    const lco_ops *ops = model->ops;
    const lco_exec *exec = &model->exec;
    const float eps = (float)c->rms_norm_eps;
    lco_status status = ops->linear(&(lco_linear_args){.part = {part(b->x, &layer->o)}, .n_parts = 1, .accumulate = true, .x = b->attended,
                                                       .m = m, .m_prompt = m_prompt, .k = layer->o.k, .ld_x = layer->o.k, .exec = exec});
    if (status == LCO_OK)
        status = ops->rmsnorm(&(lco_rmsnorm_args){.out = b->normed, .x = b->x, .weight = layer->ffn_norm, .m = m, .k = c->hidden_size,
                                                  .ld_out = c->hidden_size, .ld_x = c->hidden_size, .eps = eps, .exec = exec});
    if (status == LCO_OK)
        status = ops->linear(&(lco_linear_args){.part = {part(b->gate, &layer->gate), part(b->up, &layer->up)}, .n_parts = 2, .x = b->normed,
                                                .m = m, .m_prompt = m_prompt, .k = c->hidden_size, .ld_x = c->hidden_size, .exec = exec});
    if (status == LCO_OK)
        status = ops->swiglu(&(lco_swiglu_args){.out = b->gate, .gate = b->gate, .up = b->up, .m = m, .n = c->intermediate_size, .exec = exec});
    if (status == LCO_OK)
        status = ops->linear(&(lco_linear_args){.part = {part(b->x, &layer->down)}, .n_parts = 1, .accumulate = true, .x = b->gate, .m = m,
                                                .m_prompt = m_prompt, .k = c->intermediate_size, .ld_x = c->intermediate_size, .exec = exec});
    return status;
}

/* attended = attention(rope(norm?(q(norm(x)))), cache with this step's k and v appended). */
static lco_status attend(const lco_model *model, const lco_layer *layer, int64_t index, const lco_kv_view *kv, const lco_batch *batch,
                         const buffers *b, int64_t m_prompt)
{
    const lco_model_config *c = &model->config;
    const lco_ops *ops = model->ops;
    const lco_exec *exec = &model->exec;
    const int64_t m = batch->n_rows, d = c->head_dim, q = c->n_heads * d, kv_width = c->n_kv_heads * d;
    const float eps = (float)c->rms_norm_eps;
    lco_status status = ops->rmsnorm(&(lco_rmsnorm_args){.out = b->normed, .x = b->x, .weight = layer->attention_norm, .m = m, .k = c->hidden_size,
                                                         .ld_out = c->hidden_size, .ld_x = c->hidden_size, .eps = eps, .exec = exec});
    if (status == LCO_OK)
        status = ops->linear(&(lco_linear_args){.part = {part(b->q, &layer->q), part(b->k, &layer->k), part(b->v, &layer->v)}, .n_parts = 3,
                                                .x = b->normed, .m = m, .m_prompt = m_prompt, .k = c->hidden_size, .ld_x = c->hidden_size,
                                                .exec = exec});
    if (status == LCO_OK && c->qk_norm)
        status = ops->rmsnorm(&(lco_rmsnorm_args){.out = b->q, .x = b->q, .weight = layer->q_norm, .m = m * c->n_heads, .k = d, .ld_out = d,
                                                  .ld_x = d, .eps = eps, .exec = exec});
    if (status == LCO_OK && c->qk_norm)
        status = ops->rmsnorm(&(lco_rmsnorm_args){.out = b->k, .x = b->k, .weight = layer->k_norm, .m = m * c->n_kv_heads, .k = d, .ld_out = d,
                                                  .ld_x = d, .eps = eps, .exec = exec});
    if (status == LCO_OK)
        status = ops->rope_append(&(lco_rope_append_args){.q = b->q, .k = b->k, .v = b->v, .cos = b->cos, .sin = b->sin, .kv = kv,
                                                          .items = batch->items, .n_items = batch->n_items, .layer = index, .n_heads = c->n_heads,
                                                          .ld_q = q, .ld_kv = kv_width, .exec = exec});
    if (status == LCO_OK)
        status = ops->attention(&(lco_attention_args){.out = b->attended, .q = b->q, .kv = kv, .items = batch->items, .n_items = batch->n_items,
                                                      .layer = index, .n_heads = c->n_heads, .ld_out = q, .ld_q = q, .window = c->window[index],
                                                      .scale = (float)(1.0 / sqrt((double)d)), .exec = exec});
    return status;
}

static int64_t count_below(const int64_t *rows, int64_t n, int64_t limit)
{
    int64_t count = 0;
    while (count < n && rows[count] < limit)
        count++;
    return count;
}

static lco_status forward(lco_model *model, lco_kv *kv, const lco_batch *batch, float *logits, lco_error *err)
{
    const lco_model_config *c = &model->config;
    const lco_ops *ops = model->ops;
    const lco_kv_view view = lco_kv_get_view(kv);
    const int64_t hidden = c->hidden_size;
    int64_t m = batch->n_rows, m_prompt = 0;
    for (int64_t i = 0; i < batch->n_items; i++)
        m_prompt += batch->items[i].prompt ? batch->items[i].len : 0;

    buffers b;
    lco_status status = take_buffers(c, model->scratch, m, &b, err);
    if (status != LCO_OK)
        return status;
    lco_rope_tables(&c->rope, c->head_dim, batch->items, batch->n_items, b.cos, b.sin);
    status = ops->embed(&(lco_embed_args){.out = b.x, .ids = batch->ids, .table = model->embedding.data, .dtype = model->embedding.dtype, .m = m,
                                          .k = hidden, .exec = &model->exec});
    for (int64_t i = 0; i < c->n_layers && status == LCO_OK; i++) {
        const lco_layer *layer = &model->layers[i];
        status = attend(model, layer, i, &view, batch, &b, m_prompt);
        if (i == c->n_layers - 1 && batch->logit_rows != NULL) { /* nothing below needs the rows whose logits nobody asked for */
            keep_rows(b.x, hidden, batch->logit_rows, batch->n_logits);
            keep_rows(b.attended, layer->o.k, batch->logit_rows, batch->n_logits);
            m = batch->n_logits;
            m_prompt = count_below(batch->logit_rows, m, m_prompt);
        }
        if (status == LCO_OK && m > 0)
            status = after_attention(model, layer, &b, m, m_prompt);
    }
    if (status == LCO_OK && m > 0)
        status = ops->rmsnorm(&(lco_rmsnorm_args){.out = b.normed, .x = b.x, .weight = model->final_norm, .m = m, .k = hidden, .ld_out = hidden,
                                                  .ld_x = hidden, .eps = (float)c->rms_norm_eps, .exec = &model->exec});
    if (status == LCO_OK && m > 0)
        status = ops->linear(&(lco_linear_args){.part = {part(logits, &model->head)}, .n_parts = 1, .x = b.normed, .m = m, .m_prompt = m_prompt,
                                                .k = hidden, .ld_x = hidden, .exec = &model->exec});
    if (status != LCO_OK)
        return lco_fail(err, status, "out of memory for the scratch of a step of %lld tokens; use a smaller chunk", (long long)batch->n_rows);
    return LCO_OK;
}

lco_status lco_llama_forward(lco_model *model, lco_kv *kv, const lco_batch *batch, float *logits, lco_error *err)
{
    const lco_mark mark = lco_arena_mark(model->scratch);
    lco_status status = forward(model, kv, batch, logits, err);
    lco_arena_reset(model->scratch, mark);
    return status;
}
