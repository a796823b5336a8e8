/* llmcoopt: the public C interface. Everything a C program needs, through opaque handles, option structs and lco_status.
 *
 *   lco_error err;
 *   lco_model *model; lco_kv *kv; lco_engine *engine; int64_t id, n;
 *   lco_model_create(&config, tensors, n_tensors, &(lco_model_options){.threads = 0}, &model, &err);
 *   lco_kv_create(&(lco_kv_options){.n_layers = config.n_layers, .n_kv_heads = config.n_kv_heads, .head_dim = config.head_dim,
 *                                   .dtype = LCO_BF16, .page_size = 64, .max_tokens = 4096}, &kv, &err);
 *   lco_engine_create(model, kv, &(lco_engine_options){0}, &engine, &err);
 *   lco_engine_add(engine, &(lco_request){.prompt = ids, .n_prompt = n_ids, .max_new_tokens = 64}, &id, &err);
 *   lco_event event;
 *   do {
 *       if (lco_engine_step(engine, &event, 1, &n, &err) != LCO_OK) { fputs(err.text, stderr); break; }
 *       if (n == 1) use(event.token);
 *   } while (n == 0 || event.finish == LCO_FINISH_NONE);
 *   lco_engine_destroy(engine); lco_kv_destroy(kv); lco_model_destroy(model);
 *
 * A handle is used by one thread at a time. Tensors are borrowed: they must outlive the model. */
#ifndef LLMCOOPT_H
#define LLMCOOPT_H

#include "engine/engine.h"
#include "kv/kv.h"
#include "model/model.h"

#endif
