/* linear with AVX-512: float32 products, 8 weight rows by 48 rows of x in registers. */
#include "../impl.h"
#include "../simd/linear_f32.h"

lco_status lco_avx512_linear(const lco_linear_args *a) { return linear_f32(a); }
