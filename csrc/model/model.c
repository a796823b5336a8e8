/* Making and freeing a model handle, and the check of a batch at the boundary. */
#include <math.h>
#include <string.h>

#include "internal.h"

static lco_status check_config(const lco_model_config *c, lco_error *err)
{
    const struct {
        const char *name;
        int64_t value;
    } positive[] = {
        {"vocab_size", c->vocab_size},
        {"hidden_size", c->hidden_size},
        {"intermediate_size", c->intermediate_size},
        {"num_hidden_layers", c->n_layers},
        {"num_attention_heads", c->n_heads},
        {"num_key_value_heads", c->n_kv_heads},
        {"head_dim", c->head_dim},
        {"max_position_embeddings", c->max_positions},
    };
    for (size_t i = 0; i < sizeof positive / sizeof positive[0]; i++)
        if (positive[i].value < 1)
            return lco_fail(err, LCO_EINVAL, "%s = %lld, expected at least 1", positive[i].name, (long long)positive[i].value);
    if (c->n_heads % c->n_kv_heads != 0)
        return lco_fail(err, LCO_EINVAL, "num_attention_heads = %d is not a multiple of num_key_value_heads = %d", c->n_heads,
                        c->n_kv_heads);
    if (c->head_dim % 2 != 0)
        return lco_fail(err, LCO_EINVAL, "head_dim = %d, expected an even number (rotary pairs)", c->head_dim);
    if (!(c->rms_norm_eps >= 0) || isinf(c->rms_norm_eps))
        return lco_fail(err, LCO_EINVAL, "rms_norm_eps = %g, expected a small number >= 0", c->rms_norm_eps);
    return LCO_OK;
}

/* The model keeps its own copies of the arrays that the config points to. */
static lco_status copy_config(lco_model *model, const lco_model_config *config, lco_error *err)
{
    model->config = *config;
    lco_rope_config *rope = &model->config.rope;
    const size_t half = (size_t)config->head_dim / 2;
    model->window = lco_calloc((size_t)config->n_layers, sizeof *model->window);
    model->rope_factors = lco_calloc(2 * half, sizeof *model->rope_factors);
    if (model->window == NULL || model->rope_factors == NULL)
        return lco_fail(err, LCO_ENOMEM, "out of memory for a model");
    if (config->window != NULL)
        memcpy(model->window, config->window, (size_t)config->n_layers * sizeof *model->window);
    model->config.window = model->window;
    if (rope->kind == LCO_ROPE_LONGROPE) {
        memcpy(model->rope_factors, rope->short_factor, half * sizeof(double));
        memcpy(model->rope_factors + half, rope->long_factor, half * sizeof(double));
    }
    rope->short_factor = model->rope_factors;
    rope->long_factor = model->rope_factors + half;
    return LCO_OK;
}

lco_status lco_model_create(const lco_model_config *config, const lco_tensor *tensors, int64_t n_tensors, const lco_model_options *options,
                            lco_model **out, lco_error *err)
{
    *out = NULL;
    lco_status status = check_config(config, err);
    if (status != LCO_OK)
        return status;
    lco_model *model = lco_calloc(1, sizeof *model);
    if (model == NULL)
        return lco_fail(err, LCO_ENOMEM, "out of memory for a model");
    status = copy_config(model, config, err);
    if (status != LCO_OK)
        goto fail;
    model->layers = lco_calloc((size_t)config->n_layers, sizeof *model->layers);
    model->owned = lco_arena_create();
    model->scratch = lco_arena_create();
    if (model->layers == NULL || model->owned == NULL || model->scratch == NULL) {
        status = lco_fail(err, LCO_ENOMEM, "out of memory for a model of %d layers", config->n_layers);
        goto fail;
    }
    status = lco_ops_select(options->isa, &model->ops, err);
    if (status == LCO_OK)
        status = lco_pool_create(options->threads, &model->pool, err);
    if (status != LCO_OK)
        goto fail;
    model->x_int8 = options->x_int8;
    model->exec = (lco_exec){.pool = model->pool, .scratch = model->scratch};
    status = lco_weights_bind(model, tensors, n_tensors, err);
    if (status != LCO_OK)
        goto fail;
    *out = model;
    return LCO_OK;
fail:
    lco_model_destroy(model);
    return status;
}

void lco_model_destroy(lco_model *model)
{
    if (model == NULL)
        return;
    lco_pool_destroy(model->pool);
    lco_arena_destroy(model->scratch);
    lco_arena_destroy(model->owned);
    lco_free(model->layers);
    lco_free(model->rope_factors);
    lco_free(model->window);
    lco_free(model);
}

const lco_model_config *lco_model_get_config(const lco_model *model) { return &model->config; }

const lco_ops *lco_model_ops(const lco_model *model) { return model->ops; }

int lco_model_threads(const lco_model *model) { return lco_pool_size(model->pool); }

int64_t lco_model_longest_window(const lco_model *model)
{
    int64_t longest = 0;
    for (int32_t i = 0; i < model->config.n_layers; i++) {
        if (model->config.window[i] == 0)
            return 0;
        longest = model->config.window[i] > longest ? model->config.window[i] : longest;
    }
    return longest;
}

size_t lco_model_scratch_bytes(const lco_model *model) { return lco_arena_bytes(model->scratch); }

bool lco_model_shares_prefixes(const lco_model *model)
{
    return model->config.rope.kind != LCO_ROPE_DYNAMIC && model->config.rope.kind != LCO_ROPE_LONGROPE;
}

lco_status lco_model_fits(const lco_model *model, const lco_kv *kv, lco_error *err)
{
    const lco_model_config *c = &model->config;
    const lco_kv_options *o = lco_kv_get_options(kv);
    const int64_t window = lco_model_longest_window(model);
    if (o->model_window > 0 && (window == 0 || window > o->model_window))
        return lco_fail(err, LCO_EINVAL, "the cache is for layers that see %lld tokens at most; those of the model see %s",
                        (long long)o->model_window, window == 0 ? "all" : "more");
    if (o->n_layers == c->n_layers && o->n_kv_heads == c->n_kv_heads && o->head_dim == c->head_dim)
        return LCO_OK;
    return lco_fail(err, LCO_EINVAL, "the cache is for %d layers, %d kv heads, head_dim %d; the model has %d, %d, %d", o->n_layers,
                    o->n_kv_heads, o->head_dim, c->n_layers, c->n_kv_heads, c->head_dim);
}

static lco_status check_item(const lco_model *model, const lco_kv *cache, const lco_item *item, int64_t index, int64_t row, lco_error *err)
{
    if (item->row != row || item->len < 1 || item->pos < 0 || (!item->prompt && item->len != 1))
        return lco_fail(err, LCO_EINVAL, "batch item %lld covers rows [%lld, +%lld) at position %lld; expected to begin at row %lld",
                        (long long)index, (long long)item->row, (long long)item->len, (long long)item->pos, (long long)row);
    if (item->pos + item->len > model->config.max_positions)
        return lco_fail(err, LCO_EINVAL, "a sequence of %lld tokens is longer than the model's context of %lld",
                        (long long)(item->pos + item->len), (long long)model->config.max_positions);
    const lco_kv_options *kv = lco_kv_get_options(cache);
    const int64_t n_pages = kv->max_tokens / kv->page_size, held = (item->pos + item->len - 1) / kv->page_size + 1;
    for (int64_t p = 0; p < held; p++)
        if ((item->table[p] < 0 || item->table[p] >= n_pages) && (item->table[p] != LCO_NO_PAGE || lco_kv_sees_page(cache, item->pos, p)))
            return lco_fail(err, LCO_EINVAL, "batch item %lld: block table entry %lld is %d, the cache has %lld pages", (long long)index,
                            (long long)p, item->table[p], (long long)n_pages);
    return LCO_OK;
}

lco_status lco_batch_check(const lco_model *model, const lco_kv *kv, const lco_batch *batch, lco_error *err)
{
    lco_status status = lco_pool_check(model->pool, err);
    if (status == LCO_OK)
        status = lco_model_fits(model, kv, err);
    if (status != LCO_OK)
        return status;
    int64_t row = 0;
    for (int64_t i = 0; i < batch->n_items; i++) {
        if (i > 0 && batch->items[i].prompt && !batch->items[i - 1].prompt)
            return lco_fail(err, LCO_EINVAL, "batch item %lld is a prompt after a decode item", (long long)i);
        status = check_item(model, kv, &batch->items[i], i, row, err);
        if (status != LCO_OK)
            return status;
        row += batch->items[i].len;
    }
    if (row != batch->n_rows || row == 0)
        return lco_fail(err, LCO_EINVAL, "a batch of %lld rows whose items have %lld", (long long)batch->n_rows, (long long)row);
    for (int64_t i = 0; i < row; i++)
        if (batch->ids[i] < 0 || batch->ids[i] >= model->config.vocab_size)
            return lco_fail(err, LCO_EINVAL, "token id %d at row %lld is outside the vocabulary of %d", batch->ids[i], (long long)i,
                            model->config.vocab_size);
    for (int64_t i = 0; batch->logit_rows != NULL && i < batch->n_logits; i++)
        if (batch->logit_rows[i] >= row || batch->logit_rows[i] < (i > 0 ? batch->logit_rows[i - 1] + 1 : 0))
            return lco_fail(err, LCO_EINVAL, "logits of row %lld were asked; rows must ascend within %lld", (long long)batch->logit_rows[i],
                            (long long)row);
    return LCO_OK;
}
