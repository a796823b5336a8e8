#include "../mlp.h"
#include "../impl.h"

lco_status lco_avx2_mlp(const lco_mlp_args *args) { return lco_mlp_steps(args, lco_avx2_linear, lco_avx2_swiglu); }
