/* Checkpoint tensors, by Hugging Face name, to the model's layers. Matrices are used where they lie; norms and biases become float32 copies. */
#include <stdarg.h>
#include <stdio.h>
#include <string.h>

#include "internal.h"

#define NAME_BYTES 128

typedef struct {
    lco_model *model;
    const lco_tensor *tensors;
    bool *used;
    int64_t n;
    lco_error *err;
} binder;

static void name_of(char *out, int64_t layer, const char *suffix)
{
    if (layer < 0)
        snprintf(out, NAME_BYTES, "%s", suffix);
    else
        snprintf(out, NAME_BYTES, "model.layers.%lld.%s", (long long)layer, suffix);
}

static const lco_tensor *find(binder *b, const char *name)
{
    for (int64_t i = 0; i < b->n; i++)
        if (strcmp(b->tensors[i].name, name) == 0) {
            b->used[i] = true;
            return &b->tensors[i];
        }
    return NULL;
}

static void shape_text(char *out, size_t bytes, const lco_tensor *t)
{
    size_t at = (size_t)snprintf(out, bytes, "[");
    for (int32_t i = 0; i < t->rank && at < bytes; i++)
        at += (size_t)snprintf(out + at, bytes - at, "%s%lld", i > 0 ? ", " : "", (long long)t->shape[i]);
    if (at < bytes)
        snprintf(out + at, bytes - at, "]");
}

/* The tensor `name` of shape [n] (k == 0) or [n, k]; an error when it is missing, unless optional. */
static lco_status take(binder *b, const char *name, int64_t n, int64_t k, bool optional, const lco_tensor **out)
{
    *out = find(b, name);
    if (*out == NULL)
        return optional ? LCO_OK : lco_fail(b->err, LCO_EFORMAT, "tensor '%s' is missing from the checkpoint", name);
    const lco_tensor *t = *out;
    bool fits = k == 0 ? t->rank == 1 && t->shape[0] == n : t->rank == 2 && t->shape[0] == n && t->shape[1] == k;
    if (k == 0 && t->dtype == LCO_QUANTIZED)
        return lco_fail(b->err, LCO_EFORMAT, "tensor '%s' is quantised, expected floats", name);
    if (fits)
        return LCO_OK;
    char found[96], wanted[64];
    shape_text(found, sizeof found, t);
    if (k == 0)
        snprintf(wanted, sizeof wanted, "[%lld]", (long long)n);
    else
        snprintf(wanted, sizeof wanted, "[%lld, %lld]", (long long)n, (long long)k);
    return lco_fail(b->err, LCO_EFORMAT, "tensor '%s' has shape %s, expected %s from the config", name, found, wanted);
}

/* A vector as float32, copied. NULL in *out when optional and absent. */
static lco_status take_vector(binder *b, int64_t layer, const char *suffix, int64_t n, bool optional, const float **out)
{
    char name[NAME_BYTES];
    const lco_tensor *t;
    *out = NULL;
    name_of(name, layer, suffix);
    lco_status status = take(b, name, n, 0, optional, &t);
    if (status != LCO_OK || t == NULL)
        return status;
    float *copy = lco_arena_take(b->model->owned, (size_t)n * sizeof *copy);
    int32_t *zero = lco_arena_take(b->model->owned, sizeof *zero);
    if (copy == NULL || zero == NULL)
        return lco_fail(b->err, LCO_ENOMEM, "out of memory for '%s'", name);
    *zero = 0;
    lco_embed_args row = {.out = copy, .ids = zero, .table = t->data, .dtype = t->dtype, .m = 1, .k = n, .exec = &b->model->exec};
    *out = copy;
    return b->model->ops->embed(&row);
}

static lco_status take_matrix(binder *b, int64_t layer, const char *stem, int64_t n, int64_t k, lco_weight *out)
{
    char name[NAME_BYTES], suffix[NAME_BYTES / 2];
    const lco_tensor *t;
    snprintf(suffix, sizeof suffix, "%s.weight", stem);
    name_of(name, layer, suffix);
    lco_status status = take(b, name, n, k, false, &t);
    if (status != LCO_OK)
        return status;
    *out = (lco_weight){.data = t->data, .dtype = t->dtype, .n = n, .k = k};
    snprintf(suffix, sizeof suffix, "%s.bias", stem);
    return take_vector(b, layer, suffix, n, true, &out->bias);
}

static lco_status bind_layer(binder *b, int64_t i)
{
    const lco_model_config *c = &b->model->config;
    lco_layer *layer = &b->model->layers[i];
    const int64_t hidden = c->hidden_size, ffn = c->intermediate_size;
    const int64_t q = (int64_t)c->n_heads * c->head_dim, kv = (int64_t)c->n_kv_heads * c->head_dim;
    const struct {
        const char *stem;
        int64_t n, k;
        lco_weight *out;
    } matrices[] = {
        {"self_attn.q_proj", q, hidden, &layer->q},   {"self_attn.k_proj", kv, hidden, &layer->k},
        {"self_attn.v_proj", kv, hidden, &layer->v},  {"self_attn.o_proj", hidden, q, &layer->o},
        {"mlp.gate_proj", ffn, hidden, &layer->gate}, {"mlp.up_proj", ffn, hidden, &layer->up},
        {"mlp.down_proj", hidden, ffn, &layer->down},
    };
    lco_status status = LCO_OK;
    for (size_t m = 0; m < sizeof matrices / sizeof matrices[0] && status == LCO_OK; m++)
        status = take_matrix(b, i, matrices[m].stem, matrices[m].n, matrices[m].k, matrices[m].out);
    if (status == LCO_OK)
        status = take_vector(b, i, "input_layernorm.weight", hidden, false, &layer->attention_norm);
    if (status == LCO_OK)
        status = take_vector(b, i, "post_attention_layernorm.weight", hidden, false, &layer->ffn_norm);
    if (status == LCO_OK && c->qk_norm)
        status = take_vector(b, i, "self_attn.q_norm.weight", c->head_dim, false, &layer->q_norm);
    if (status == LCO_OK && c->qk_norm)
        status = take_vector(b, i, "self_attn.k_norm.weight", c->head_dim, false, &layer->k_norm);
    return status;
}

static lco_status bind_ends(binder *b)
{
    lco_model *model = b->model;
    const lco_model_config *c = &model->config;
    lco_status status = take_matrix(b, -1, "model.embed_tokens", c->vocab_size, c->hidden_size, &model->embedding);
    if (status == LCO_OK)
        status = take_vector(b, -1, "model.norm.weight", c->hidden_size, false, &model->final_norm);
    if (status != LCO_OK)
        return status;
    if (!c->tied_head)
        return take_matrix(b, -1, "lm_head", c->vocab_size, c->hidden_size, &model->head);
    model->head = model->embedding;
    find(b, "lm_head.weight"); /* files of tied models may carry a copy: not used */
    return LCO_OK;
}

lco_status lco_weights_bind(lco_model *model, const lco_tensor *tensors, int64_t n, lco_error *err)
{
    bool *used = lco_calloc((size_t)n + 1, sizeof *used);
    if (used == NULL)
        return lco_fail(err, LCO_ENOMEM, "out of memory while binding tensors");
    binder b = {.model = model, .tensors = tensors, .used = used, .n = n, .err = err};
    lco_status status = bind_ends(&b);
    for (int64_t i = 0; i < model->config.n_layers && status == LCO_OK; i++)
        status = bind_layer(&b, i);
    for (int64_t i = 0; i < n && status == LCO_OK; i++)
        if (!used[i])
            status = lco_fail(err, LCO_EFORMAT,
                              "tensor '%s' belongs to no part of a model with %d layers%s: the config does not describe this checkpoint",
                              tensors[i].name, model->config.n_layers, model->config.qk_norm ? "" : " and no q/k norm");
    lco_free(used);
    return status;
}
