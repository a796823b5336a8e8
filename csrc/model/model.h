/* A Llama-family model: shape, weights by name, and the forward pass over a ragged batch.
 *
 * Weights are borrowed: the tensors given to lco_model_create must outlive the model (the Python layer keeps the mapped files alive). */
#ifndef LCO_MODEL_MODEL_H
#define LCO_MODEL_MODEL_H

#include <stdbool.h>

#include "../kv/kv.h"
#include "../ops/ops.h"

typedef enum { LCO_ROPE_DEFAULT = 0, LCO_ROPE_LINEAR, LCO_ROPE_DYNAMIC, LCO_ROPE_YARN, LCO_ROPE_LLAMA3, LCO_ROPE_LONGROPE } lco_rope_kind;

typedef struct {
    lco_rope_kind kind;
    double theta, factor;
    double original_max;                      /* positions the model was trained with before scaling (all kinds but default and linear) */
    double low_freq_factor, high_freq_factor; /* llama3 */
    double beta_fast, beta_slow;              /* yarn */
    bool truncate;                            /* yarn: round the ramp's ends to whole dimensions */
    double attention_factor;                  /* multiplies cos and sin (yarn, longrope); already resolved to a number */
    const double *short_factor, *long_factor; /* longrope: head_dim / 2 each */
} lco_rope_config;

typedef struct {
    int32_t vocab_size, hidden_size, intermediate_size, n_layers, n_heads, n_kv_heads, head_dim;
    double rms_norm_eps;
    bool qk_norm;          /* RMSNorm of every q and k head before rope (Qwen3) */
    bool tied_head;        /* lm_head is the embedding */
    int64_t max_positions; /* longest sequence */
    const int32_t *window; /* [n_layers], 0: full attention; NULL: all full */
    lco_rope_config rope;
} lco_model_config;

/* A named array of the checkpoint. Names are Hugging Face's ("model.layers.0.self_attn.q_proj.weight"). */
typedef struct {
    const char *name;
    const void *data; /* of LCO_QUANTIZED: checked by lco_qweight_check_bytes, of this shape */
    lco_dtype dtype;
    int32_t rank;
    int64_t shape[4];
} lco_tensor;

typedef struct lco_model lco_model;

typedef struct {
    int threads;     /* 0: all this process may use */
    const char *isa; /* NULL: best, or LLMCOOPT_ISA */
    bool x_int8;     /* products with quantised weights round activations to 8 bits, not 16 */
} lco_model_options;

/* Binds tensors by name and checks every shape. LCO_EFORMAT names the tensor, what was found and what was expected.
 * Bias tensors are used where present. Tensors that no part of the model asks for are an error. */
lco_status lco_model_create(const lco_model_config *config, const lco_tensor *tensors, int64_t n_tensors, const lco_model_options *options,
                            lco_model **out, lco_error *err);
void lco_model_destroy(lco_model *model);
const lco_model_config *lco_model_get_config(const lco_model *model);
const lco_ops *lco_model_ops(const lco_model *model);
int lco_model_threads(const lco_model *model);
int64_t lco_model_longest_window(const lco_model *model); /* 0: some layer sees all */
size_t lco_model_scratch_bytes(const lco_model *model);

/* Where a tap sees activations: float32 rows of a layer, in the order of computation. */
typedef enum {
    LCO_TAP_ATTENTION_INPUT = 0, /* what q, k and v are computed from, [hidden] */
    LCO_TAP_Q,                   /* after rope, [n_heads * head_dim] */
    LCO_TAP_K,                   /* after rope, as it goes to the cache, before any rounding, [n_kv_heads * head_dim] */
    LCO_TAP_V,
    LCO_TAP_ATTENDED,   /* what attention gives and o is computed from, [n_heads * head_dim] */
    LCO_TAP_MLP_INPUT,  /* what gate and up are computed from, [hidden] */
    LCO_TAP_DOWN_INPUT, /* silu(gate) * up, [intermediate] */
    LCO_TAP_HIDDEN,     /* what the logits are computed from, after the last layer; its layer is n_layers. [hidden] */
    LCO_TAP_POINTS,
} lco_tap_point;

int64_t lco_tap_width(const lco_model_config *config, lco_tap_point point);

typedef struct {
    void (*see)(void *ctx, lco_tap_point point, int64_t layer, const float *rows, int64_t n_floats); /* all rows of the batch */
    void *ctx;
} lco_tap;

/* A ragged batch: prompt items first, then decode items; rows in item order. Checked by lco_batch_check, trusted below. */
typedef struct {
    const int32_t *ids; /* [n_rows] */
    const lco_item *items;
    int64_t n_items, n_rows;
    const int64_t *logit_rows; /* rows whose logits are asked, ascending; NULL with n_logits == n_rows: all */
    int64_t n_logits;
    const lco_tap *tap; /* NULL: nobody looks */
} lco_batch;

/* Whether equal beginnings of prompts have equal keys: not where the rotation depends on how long the whole prompt is. */
bool lco_model_shares_prefixes(const lco_model *model);

/* LCO_EINVAL when the cache was made for another shape. */
lco_status lco_model_fits(const lco_model *model, const lco_kv *kv, lco_error *err);
lco_status lco_batch_check(const lco_model *model, const lco_kv *kv, const lco_batch *batch, lco_error *err);

/* One step: reads and appends the cache, writes logits[n_logits, vocab_size] float32. The caller reserved the pages and commits afterwards.
 * NaN logits are the caller's to find. One caller at a time per model. */
lco_status lco_llama_forward(lco_model *model, lco_kv *kv, const lco_batch *batch, float *logits, lco_error *err);

/* cos and sin of every row and pair: [n_rows, head_dim / 2] each. */
void lco_rope_tables(const lco_rope_config *rope, int32_t head_dim, const lco_item *items, int64_t n_items, float *cos, float *sin);

#endif
