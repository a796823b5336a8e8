/* silu(gate) * up: of swiglu, and of mlp, which must give the same bits. */
#ifndef LCO_OPS_SIMD_SILU_H
#define LCO_OPS_SIMD_SILU_H

#include "vec.h"

static inline vf silu_times(vf gate, vf up) { return v_mul(v_div(gate, v_add(v_set(1.0f), v_exp(v_sub(v_zero(), gate)))), up); }

#endif
