#include "../simd/attention.h"

lco_status lco_avx2_attention(const lco_attention_args *args) { return attention(args, false); }
