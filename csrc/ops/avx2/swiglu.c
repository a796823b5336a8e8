#include "../simd/swiglu.h"

lco_status lco_avx2_swiglu(const lco_swiglu_args *args) { return swiglu(args); }
