#include "../mlp.h"
#include "../impl.h"

lco_status lco_avx512_mlp(const lco_mlp_args *args) { return lco_mlp_steps(args, lco_avx512_linear, lco_avx512_swiglu); }
