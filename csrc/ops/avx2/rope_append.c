#include "../simd/rope_append.h"

lco_status lco_avx2_rope_append(const lco_rope_append_args *args) { return rope_append(args); }
