/* A tiny Llama with random float32 weights, for tests of what stands above the model. */
#ifndef LCO_TESTS_TINY_H
#define LCO_TESTS_TINY_H

#include <math.h>
#include <stdlib.h>

#include "../../csrc/engine/engine.h"
#include "harness.h"

enum { TINY_VOCAB = 61, TINY_HIDDEN = 24, TINY_FFN = 40, TINY_LAYERS = 2, TINY_HEADS = 4, TINY_KV_HEADS = 2, TINY_HEAD_DIM = 6 };
enum { TINY_TENSORS = 3 + 9 * TINY_LAYERS, TINY_POSITIONS = 256 };

typedef struct {
    lco_model_config config;
    lco_tensor tensors[TINY_TENSORS];
    char names[TINY_TENSORS][64];
    int n_tensors;
} tiny_weights;

static inline float *tiny_tensor(tiny_weights *w, const char *name, int64_t n, int64_t k)
{
    int index = w->n_tensors++;
    int64_t count = n * (k > 0 ? k : 1);
    float *data = malloc((size_t)count * sizeof *data);
    stream s = {.seed = 1000 + (uint64_t)index};
    for (int64_t i = 0; i < count; i++) /* norms near 1; matrices wide enough for the next token to depend on the context */
        data[i] = k > 0 ? (float)((2.0 * stream_uniform(&s) - 1.0) * 3.0 / sqrt((double)k)) : (float)(0.5 + stream_uniform(&s));
    snprintf(w->names[index], sizeof w->names[index], "%s", name);
    w->tensors[index] =
        (lco_tensor){.name = w->names[index], .data = data, .dtype = LCO_F32, .rank = k > 0 ? 2 : 1, .shape = {n, k > 0 ? k : 0}};
    return data;
}

static inline void tiny_make(tiny_weights *w)
{
    *w = (tiny_weights){.config = {.vocab_size = TINY_VOCAB,
                                   .hidden_size = TINY_HIDDEN,
                                   .intermediate_size = TINY_FFN,
                                   .n_layers = TINY_LAYERS,
                                   .n_heads = TINY_HEADS,
                                   .n_kv_heads = TINY_KV_HEADS,
                                   .head_dim = TINY_HEAD_DIM,
                                   .rms_norm_eps = 1e-5,
                                   .max_positions = TINY_POSITIONS,
                                   .rope = {.kind = LCO_ROPE_DEFAULT, .theta = 10000.0, .factor = 1.0, .attention_factor = 1.0}}};
    const int64_t q = TINY_HEADS * TINY_HEAD_DIM, kv = TINY_KV_HEADS * TINY_HEAD_DIM;
    const struct {
        const char *name;
        int64_t n, k;
    } parts[] = {
        {"self_attn.q_proj", q, TINY_HIDDEN},     {"self_attn.k_proj", kv, TINY_HIDDEN},    {"self_attn.v_proj", kv, TINY_HIDDEN},
        {"self_attn.o_proj", TINY_HIDDEN, q},     {"mlp.gate_proj", TINY_FFN, TINY_HIDDEN}, {"mlp.up_proj", TINY_FFN, TINY_HIDDEN},
        {"mlp.down_proj", TINY_HIDDEN, TINY_FFN}, {"input_layernorm", TINY_HIDDEN, 0},      {"post_attention_layernorm", TINY_HIDDEN, 0},
    };
    tiny_tensor(w, "model.embed_tokens.weight", TINY_VOCAB, TINY_HIDDEN);
    tiny_tensor(w, "model.norm.weight", TINY_HIDDEN, 0);
    tiny_tensor(w, "lm_head.weight", TINY_VOCAB, TINY_HIDDEN);
    for (int layer = 0; layer < TINY_LAYERS; layer++) {
        for (size_t i = 0; i < sizeof parts / sizeof parts[0]; i++) {
            char name[64];
            snprintf(name, sizeof name, "model.layers.%d.%s.weight", layer, parts[i].name);
            tiny_tensor(w, name, parts[i].n, parts[i].k);
        }
    }
}

static inline void tiny_free(tiny_weights *w)
{
    for (int i = 0; i < w->n_tensors; i++)
        free((void *)w->tensors[i].data);
}

static inline lco_status tiny_model(const tiny_weights *w, int threads, lco_model **model, lco_error *err)
{
    return lco_model_create(&w->config, w->tensors, w->n_tensors, &(lco_model_options){.threads = threads, .isa = "ref"}, model, err);
}

static inline lco_status tiny_cache(int64_t pages, lco_kv **kv, lco_error *err)
{
    lco_kv_options options = {.n_layers = TINY_LAYERS,
                              .n_kv_heads = TINY_KV_HEADS,
                              .head_dim = TINY_HEAD_DIM,
                              .dtype = LCO_F32,
                              .page_size = 16,
                              .max_tokens = 16 * pages};
    return lco_kv_create(&options, kv, err);
}

#endif
