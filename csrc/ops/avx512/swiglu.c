#include "../simd/swiglu.h"

lco_status lco_avx512_swiglu(const lco_swiglu_args *args) { return swiglu(args); }
