/* The operators that the tables of select.c name. Files: ref/<op>.c, avx2/<op>.c, avx512/<op>.c, amx/<op>.c. */
#ifndef LCO_OPS_IMPL_H
#define LCO_OPS_IMPL_H

#include "ops.h"

lco_status lco_ref_embed(const lco_embed_args *);
lco_status lco_ref_rmsnorm(const lco_rmsnorm_args *);
lco_status lco_ref_linear(const lco_linear_args *);
lco_status lco_ref_linear_quantized(const lco_linear_args *);
lco_status lco_ref_swiglu(const lco_swiglu_args *);
lco_status lco_ref_mlp(const lco_mlp_args *);
lco_status lco_ref_rope_append(const lco_rope_append_args *);
lco_status lco_ref_attention(const lco_attention_args *);
lco_status lco_ref_choose_pages(const lco_choose_pages_args *);

#if defined(__x86_64__)
lco_status lco_avx2_rmsnorm(const lco_rmsnorm_args *);
lco_status lco_avx2_linear(const lco_linear_args *);
lco_status lco_avx2_linear_quantized(const lco_linear_args *);
lco_status lco_avx2_swiglu(const lco_swiglu_args *);
lco_status lco_avx2_mlp(const lco_mlp_args *);
lco_status lco_avx2_rope_append(const lco_rope_append_args *);
lco_status lco_avx2_attention(const lco_attention_args *);
lco_status lco_avx2_choose_pages(const lco_choose_pages_args *);

lco_status lco_avx512_rmsnorm(const lco_rmsnorm_args *);
lco_status lco_avx512_linear(const lco_linear_args *);                 /* float32 products everywhere */
lco_status lco_avx512_linear_quantized(const lco_linear_args *);       /* needs VNNI */
lco_status lco_avx512_linear_quantized_plain(const lco_linear_args *); /* where the processor reads ahead best by itself: AMD */
lco_status lco_avx512_swiglu(const lco_swiglu_args *);
lco_status lco_avx512_mlp(const lco_mlp_args *);
lco_status lco_avx512_rope_append(const lco_rope_append_args *);
lco_status lco_avx512_attention(const lco_attention_args *);
lco_status lco_avx512_attention_shifts(const lco_attention_args *); /* where subnormal factors cost nothing: float codes by shifts */
lco_status lco_avx512_choose_pages(const lco_choose_pages_args *);

lco_status lco_avx512_linear_bf16(const lco_linear_args *); /* prompt rows of bfloat16 weights by vdpbf16ps */
lco_status lco_amx_linear(const lco_linear_args *);         /* the same by bf16 tiles */
lco_status lco_avx512_mlp_bf16(const lco_mlp_args *);
lco_status lco_amx_linear_quantized(const lco_linear_args *); /* by tiles of bytes */
lco_status lco_amx_mlp(const lco_mlp_args *);
lco_status lco_amx_attention(const lco_attention_args *); /* prompt rows of bfloat16 caches by bf16 tiles */
#endif

#endif
