/* linear with AVX2: float32 products, 4 weight rows by 24 rows of x in registers. */
#include "../impl.h"
#include "../simd/linear_f32.h"

lco_status lco_avx2_linear(const lco_linear_args *a) { return linear_f32(a); }
