/* lco_llama_forward: the whole model, in the order in which it computes. THE function to read first. */
#include <math.h>
#include <string.h>

#include "../base/hadamard.h"
#include "internal.h"

/* Buffers of one step, float32, rows in batch order. */
typedef struct {
    float *x;         /* [m, hidden] the residual stream */
    float *normed;    /* [m, hidden] */
    float *q;         /* [m, n_heads * head_dim] */
    float *k, *v;     /* [m, n_kv_heads * head_dim] */
    float *attended;  /* [m, n_heads * head_dim] */
    float *gate, *up; /* [m, intermediate] */
    float *cos, *sin; /* [m, head_dim / 2] */
} buffers;

static lco_status take_buffers(const lco_model_config *c, lco_arena *scratch, int64_t m, buffers *b, lco_error *err)
{
    const size_t rows = (size_t)m, q = (size_t)c->n_heads * (size_t)c->head_dim, kv = (size_t)c->n_kv_heads * (size_t)c->head_dim;
    const struct {
        float **at;
        size_t width;
    } parts[] = {
        {&b->x, (size_t)c->hidden_size},
        {&b->normed, (size_t)c->hidden_size},
        {&b->q, q},
        {&b->k, kv},
        {&b->v, kv},
        {&b->attended, q},
        {&b->gate, (size_t)c->intermediate_size},
        {&b->up, (size_t)c->intermediate_size},
        {&b->cos, (size_t)c->head_dim / 2},
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

/* One step on its way: what is computed, and the first failure. After a failure the functions below do nothing. */
typedef struct {
    const lco_model *model;
    const lco_batch *batch;
    lco_kv *cache;
    const lco_kv_view *kv; /* of each layer */
    lco_item *items;       /* the batch's, with scratch for the blocks that prompt rows lie in */
    buffers b;
    uint64_t *chosen;    /* pages that decode rows read, [n_items, n_kv_heads, chosen_words]; NULL: all */
    lco_choice *choices; /* [n_items, n_kv_heads] */
    int64_t chosen_words;
    int64_t m, m_prompt; /* rows now, and how many of them are prompt rows (they come first) */
    lco_status status;
} step;

/* Buffered layers: 16-bit keys and values of one layer for the stretches of every prompt item. */
static lco_status take_items(step *s, lco_arena *scratch, lco_error *err)
{
    const lco_batch *batch = s->batch;
    size_t layer_bytes = 0;
    int64_t residual = 0;
    for (int32_t i = 0; i < s->model->config.n_layers && layer_bytes == 0; i++)
        if (s->kv[i].buffered) { /* all that are have the same shape */
            layer_bytes = lco_tail_bytes(&s->kv[i]);
            residual = s->kv[i].residual;
        }
    bool ok = (s->items = lco_arena_take(scratch, (size_t)batch->n_items * sizeof *s->items)) != NULL;
    for (int64_t i = 0; ok && i < batch->n_items; i++) {
        s->items[i] = batch->items[i];
        if (layer_bytes > 0 && s->items[i].prompt)
            ok = (s->items[i].own = lco_arena_take(scratch, (size_t)lco_own_stretches(&s->items[i], residual) * layer_bytes)) != NULL;
    }
    return ok ? LCO_OK : lco_fail(err, LCO_ENOMEM, "out of memory for the new keys and values of a step; use a smaller chunk");
}

/* With a page_tolerance: room for the choice of pages of a layer. */
static lco_status take_choice(step *s, lco_arena *scratch, lco_error *err)
{
    const lco_kv_options *o = lco_kv_get_options(s->cache);
    const lco_batch *batch = s->batch;
    for (int64_t i = 0; i < batch->n_items; i++) {
        const int64_t words = batch->items[i].pos / o->page_size / 64 + 1;
        s->chosen_words = !batch->items[i].prompt && words > s->chosen_words ? words : s->chosen_words;
    }
    if (o->page_tolerance == 0 || s->chosen_words == 0)
        return LCO_OK;
    const size_t heads = (size_t)batch->n_items * (size_t)o->n_kv_heads;
    s->choices = lco_arena_take(scratch, heads * sizeof *s->choices);
    s->chosen = lco_arena_take(scratch, heads * (size_t)s->chosen_words * sizeof *s->chosen);
    return s->choices != NULL && s->chosen != NULL ? LCO_OK : lco_fail(err, LCO_ENOMEM, "out of memory for the choice of pages");
}

/* out = rmsnorm(x) * weight, `rows` rows of `width`. */
static void norm(step *s, float *out, const float *x, const float *weight, int64_t rows, int64_t width)
{
    lco_rmsnorm_args args = {.out = out, .x = x, .weight = weight, .m = rows, .k = width, .ld_out = width, .ld_x = width};
    args.eps = (float)s->model->config.rms_norm_eps;
    args.exec = &s->model->exec;
    if (s->status == LCO_OK)
        s->status = s->model->ops->rmsnorm(&args);
}

static lco_linear_part part(float *out, const lco_weight *w)
{
    return (lco_linear_part){.out = out, .ld_out = w->n, .w = w->data, .dtype = w->dtype, .bias = w->bias, .n = w->n};
}

static lco_linear_args linear_args(const step *s, const float *x, int64_t k, bool add, int n_parts)
{
    return (lco_linear_args){
        .n_parts = n_parts, .accumulate = add, .x = x, .k = k, .ld_x = k, .m = s->m, .m_prompt = s->m_prompt, .exec = &s->model->exec};
}

/* The op for the parts of `from` whose weights are quantised, or for the others. */
static void linear_of(step *s, const lco_linear_args *from, bool quantized)
{
    lco_linear_args args = *from;
    args.n_parts = 0;
    for (int p = 0; p < from->n_parts; p++)
        if ((from->part[p].dtype == LCO_QUANTIZED) == quantized)
            args.part[args.n_parts++] = from->part[p];
    args.x_int8 = s->model->x_int8;
    if (s->status == LCO_OK && s->m > 0 && args.n_parts > 0)
        s->status = quantized ? s->model->ops->linear_quantized(&args) : s->model->ops->linear(&args);
}

/* Every part's out = x @ w^T + bias, or out += ... when `add`. */
static void linear(step *s, const float *x, int64_t k, bool add, int n_parts, lco_linear_part first, lco_linear_part second,
                   lco_linear_part third)
{
    lco_linear_args args = linear_args(s, x, k, add, n_parts);
    args.part[0] = first;
    args.part[1] = second;
    args.part[2] = third;
    linear_of(s, &args, false);
    linear_of(s, &args, true);
}

/* Rotates q and k by position and appends k and v to the cache. */
static void rope_append(step *s, int64_t layer)
{
    const lco_model_config *c = &s->model->config;
    lco_rope_append_args args = {.q = s->b.q, .k = s->b.k, .v = s->b.v, .cos = s->b.cos, .sin = s->b.sin, .kv = &s->kv[layer]};
    args.items = s->items;
    args.n_items = s->batch->n_items;
    args.n_heads = c->n_heads;
    args.ld_q = (int64_t)c->n_heads * c->head_dim;
    args.ld_kv = (int64_t)c->n_kv_heads * c->head_dim;
    args.exec = &s->model->exec;
    if (s->status == LCO_OK)
        s->status = s->model->ops->rope_append(&args);
}

/* Which pages decode rows read, where the caller lets them leave some out. */
static void choose_pages(step *s, const lco_attention_args *attention)
{
    lco_choose_pages_args args = {.chosen = s->chosen, .choices = s->choices, .q = attention->q, .kv = attention->kv};
    args.items = s->items;
    args.n_items = s->batch->n_items;
    args.n_heads = attention->n_heads;
    args.ld_q = attention->ld_q;
    args.window = attention->window;
    args.sinks = attention->sinks;
    args.chosen_words = s->chosen_words;
    args.scale = attention->scale;
    args.tolerance = lco_kv_get_options(s->cache)->page_tolerance;
    args.exec = &s->model->exec;
    if (s->status == LCO_OK)
        s->status = s->model->ops->choose_pages(&args);
    for (int64_t i = 0; s->status == LCO_OK && i < args.n_items * args.kv->n_kv_heads; i++)
        lco_kv_count_choice(s->cache, s->choices[i].read, s->choices[i].left_out, s->choices[i].mass);
}

/* attended = softmax(q . keys) . values over each row's sequence. */
static void attention(step *s, int64_t layer)
{
    const lco_model_config *c = &s->model->config;
    lco_attention_args args = {.out = s->b.attended, .q = s->b.q, .kv = &s->kv[layer], .n_heads = c->n_heads};
    args.items = s->items;
    args.n_items = s->batch->n_items;
    args.ld_out = args.ld_q = (int64_t)c->n_heads * c->head_dim;
    const lco_kv_sight sight = lco_kv_layer_sight(s->cache, c->window[layer]);
    args.window = sight.window;
    args.sinks = sight.sinks;
    args.scale = (float)(1.0 / sqrt((double)c->head_dim));
    args.exec = &s->model->exec;
    if (s->chosen != NULL)
        choose_pages(s, &args);
    args.chosen = s->chosen;
    args.chosen_words = s->chosen_words;
    if (s->status == LCO_OK)
        s->status = s->model->ops->attention(&args);
}

/* x += down(silu(gate(normed)) * up(normed)) */
static void mlp(step *s, const lco_layer *layer)
{
    const lco_model_config *c = &s->model->config;
    lco_mlp_args args = {.in = linear_args(s, s->b.normed, c->hidden_size, false, 2),
                         .out = linear_args(s, s->b.gate, c->intermediate_size, true, 1)};
    args.in.part[0] = part(s->b.gate, &layer->gate);
    args.in.part[1] = part(s->b.up, &layer->up);
    args.out.part[0] = part(s->b.x, &layer->down);
    if (s->status == LCO_OK && s->m > 0)
        s->status = s->model->ops->mlp(&args);
}

/* Keeps the asked rows of a buffer, moved to the front. Rows ascend, so a move never overwrites a row still to come. */
static void keep_rows(float *buffer, int64_t width, const int64_t *rows, int64_t n)
{
    for (int64_t i = 0; i < n; i++)
        if (rows[i] != i)
            memcpy(buffer + i * width, buffer + rows[i] * width, (size_t)width * sizeof(float));
}

/* Nothing after the last attention needs the rows whose logits nobody asked for, unless a tap wants to see them. */
static void drop_rows(step *s)
{
    const lco_batch *batch = s->batch;
    const lco_model_config *c = &s->model->config;
    if (batch->logit_rows == NULL)
        return;
    keep_rows(s->b.x, c->hidden_size, batch->logit_rows, batch->n_logits);
    keep_rows(s->b.normed, c->hidden_size, batch->logit_rows, batch->n_logits);
    keep_rows(s->b.attended, (int64_t)c->n_heads * c->head_dim, batch->logit_rows, batch->n_logits);
    int64_t prompts = 0;
    while (prompts < batch->n_logits && batch->logit_rows[prompts] < s->m_prompt)
        prompts++;
    s->m = batch->n_logits;
    s->m_prompt = prompts;
}

int64_t lco_tap_width(const lco_model_config *c, lco_tap_point point)
{
    switch (point) {
    case LCO_TAP_Q:
    case LCO_TAP_ATTENDED:
        return (int64_t)c->n_heads * c->head_dim;
    case LCO_TAP_K:
    case LCO_TAP_V:
        return (int64_t)c->n_kv_heads * c->head_dim;
    case LCO_TAP_DOWN_INPUT:
        return c->intermediate_size;
    default:
        return c->hidden_size;
    }
}

static void see(const step *s, lco_tap_point point, int64_t layer, const float *rows)
{
    const lco_tap *tap = s->batch->tap;
    if (tap != NULL && s->status == LCO_OK)
        tap->see(tap->ctx, point, layer, rows, s->m * lco_tap_width(&s->model->config, point));
}

/* q or k as they are before a cache of one-byte codes has them turned: turned back into `attended`, which attention fills later. */
static void see_turned(const step *s, lco_tap_point point, int64_t layer, const float *rows)
{
    const int64_t d = s->kv[layer].head_dim, n = s->m * lco_tap_width(&s->model->config, point);
    const float factor = 1 / (lco_hadamard_factor(d, point == LCO_TAP_K) * (float)lco_hadamard_run(d));
    if (s->batch->tap == NULL || s->status != LCO_OK)
        return;
    memcpy(s->b.attended, rows, (size_t)n * sizeof(float));
    for (int64_t i = 0; s->kv[layer].turned && i < n; i += d)
        lco_hadamard(s->b.attended + i, d, factor);
    see(s, point, layer, s->b.attended);
}

/* mlp() in the steps that it is made of, to the bit: for weights that `mlp` does not take, and so that a tap can look between them. */
static void mlp_in_steps(step *s, const lco_layer *layer, int64_t index)
{
    const lco_model_config *c = &s->model->config;
    const lco_linear_part none = {0};
    lco_swiglu_args args = {.out = s->b.gate, .gate = s->b.gate, .up = s->b.up, .m = s->m, .n = c->intermediate_size};
    args.exec = &s->model->exec;
    linear(s, s->b.normed, c->hidden_size, false, 2, part(s->b.gate, &layer->gate), part(s->b.up, &layer->up), none);
    if (s->status == LCO_OK && s->m > 0)
        s->status = s->model->ops->swiglu(&args);
    see(s, LCO_TAP_DOWN_INPUT, index, s->b.gate);
    linear(s, s->b.gate, c->intermediate_size, true, 1, part(s->b.x, &layer->down), none, none);
}

static bool any_quantized(const lco_layer *layer)
{
    return layer->gate.dtype == LCO_QUANTIZED || layer->up.dtype == LCO_QUANTIZED || layer->down.dtype == LCO_QUANTIZED;
}

static void layer_forward(step *s, int64_t index)
{
    const lco_model_config *c = &s->model->config;
    const lco_layer *layer = &s->model->layers[index];
    const lco_linear_part none = {0};
    buffers *b = &s->b;

    norm(s, b->normed, b->x, layer->attention_norm, s->m, c->hidden_size);
    see(s, LCO_TAP_ATTENTION_INPUT, index, b->normed);
    linear(s, b->normed, c->hidden_size, false, 3, part(b->q, &layer->q), part(b->k, &layer->k), part(b->v, &layer->v));
    if (c->qk_norm) {
        norm(s, b->q, b->q, layer->q_norm, s->m * c->n_heads, c->head_dim);
        norm(s, b->k, b->k, layer->k_norm, s->m * c->n_kv_heads, c->head_dim);
    }
    rope_append(s, index);
    see_turned(s, LCO_TAP_Q, index, b->q);
    see_turned(s, LCO_TAP_K, index, b->k);
    see(s, LCO_TAP_V, index, b->v);
    attention(s, index);
    see(s, LCO_TAP_ATTENDED, index, b->attended);
    if (index == c->n_layers - 1 && s->batch->tap == NULL)
        drop_rows(s);
    linear(s, b->attended, layer->o.k, true, 1, part(b->x, &layer->o), none, none);

    norm(s, b->normed, b->x, layer->ffn_norm, s->m, c->hidden_size);
    see(s, LCO_TAP_MLP_INPUT, index, b->normed);
    if (s->batch->tap == NULL && !any_quantized(layer))
        mlp(s, layer);
    else
        mlp_in_steps(s, layer, index);
}

static lco_status forward(lco_model *model, lco_kv *kv, const lco_batch *batch, float *logits, lco_error *err)
{
    const lco_model_config *c = &model->config;
    const lco_linear_part none = {0};
    step s = {.model = model, .batch = batch, .cache = kv, .kv = lco_kv_views(kv), .m = batch->n_rows};
    for (int64_t i = 0; i < batch->n_items; i++)
        s.m_prompt += batch->items[i].prompt ? batch->items[i].len : 0;
    lco_status status = take_buffers(c, model->scratch, s.m, &s.b, err);
    if (status == LCO_OK)
        status = take_items(&s, model->scratch, err);
    if (status == LCO_OK)
        status = take_choice(&s, model->scratch, err);
    if (status != LCO_OK)
        return status;

    lco_rope_tables(&c->rope, c->head_dim, batch->items, batch->n_items, s.b.cos, s.b.sin);
    lco_embed_args embed = {.out = s.b.x, .ids = batch->ids, .table = model->embedding.data, .dtype = model->embedding.dtype};
    embed.m = s.m;
    embed.k = c->hidden_size;
    embed.exec = &model->exec;
    s.status = model->ops->embed(&embed);
    for (int64_t i = 0; i < c->n_layers; i++)
        layer_forward(&s, i);
    norm(&s, s.b.normed, s.b.x, model->final_norm, s.m, c->hidden_size);
    if (batch->tap != NULL) {
        see(&s, LCO_TAP_HIDDEN, c->n_layers, s.b.normed);
        drop_rows(&s);
    }
    linear(&s, s.b.normed, c->hidden_size, false, 1, part(logits, &model->head), none, none);
    if (s.status != LCO_OK)
        return lco_fail(err, s.status, "out of memory for the scratch of a step of %lld tokens; use a smaller chunk",
                        (long long)batch->n_rows);
    return LCO_OK;
}

lco_status lco_llama_forward(lco_model *model, lco_kv *kv, const lco_batch *batch, float *logits, lco_error *err)
{
    const lco_mark mark = lco_arena_mark(model->scratch);
    lco_status status = forward(model, kv, batch, logits, err);
    lco_arena_reset(model->scratch, mark);
    return status;
}
