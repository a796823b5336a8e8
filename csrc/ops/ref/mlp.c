#include "../mlp.h"
#include "../impl.h"

lco_status lco_ref_mlp(const lco_mlp_args *args) { return lco_mlp_steps(args, lco_ref_linear, lco_ref_swiglu); }
