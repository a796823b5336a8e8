#include "../simd/rmsnorm.h"

lco_status lco_avx512_rmsnorm(const lco_rmsnorm_args *args) { return rmsnorm(args); }
