#include "../simd/attention.h"

lco_status lco_avx512_attention(const lco_attention_args *args) { return attention(args, false); }

lco_status lco_avx512_attention_shifts(const lco_attention_args *args) { return attention(args, true); }
