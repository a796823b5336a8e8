/* Shared by the files of this folder only. */
#ifndef LCO_MODEL_INTERNAL_H
#define LCO_MODEL_INTERNAL_H

#include "model.h"

typedef struct {
    const void *data; /* [n, k] row-major, or an lco_qweight; borrowed */
    lco_dtype dtype;
    int64_t n, k;
    const float *bias; /* [n] or NULL */
} lco_weight;

typedef struct {
    const float *attention_norm, *ffn_norm; /* [hidden] */
    const float *q_norm, *k_norm;           /* [head_dim] or NULL */
    lco_weight q, k, v, o, gate, up, down;
} lco_layer;

struct lco_model {
    lco_model_config config;
    int32_t *window;
    double *rope_factors; /* owned copies of short_factor and long_factor */
    lco_weight embedding, head;
    const float *final_norm;
    lco_layer *layers;
    lco_arena *owned;   /* float32 copies of norms and biases: the only weights that are copied */
    lco_arena *scratch; /* of the step */
    lco_pool *pool;
    const lco_ops *ops;
    lco_exec exec;
    bool x_int8; /* of quantised weights: lco_linear_args */
};

/* weights.c: fills embedding, head, norms and layers from the named tensors. */
lco_status lco_weights_bind(lco_model *model, const lco_tensor *tensors, int64_t n, lco_error *err);

#endif
