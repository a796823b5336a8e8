/* mlp as the three ops that it joins. */
#ifndef LCO_OPS_MLP_H
#define LCO_OPS_MLP_H

#include "ops.h"

static inline lco_status lco_mlp_steps(const lco_mlp_args *a, lco_status (*linear)(const lco_linear_args *),
                                       lco_status (*swiglu)(const lco_swiglu_args *))
{
    float *gate = a->in.part[0].out;
    const lco_swiglu_args middle = {
        .out = gate, .gate = gate, .up = a->in.part[1].out, .m = a->in.m, .n = a->in.part[0].n, .exec = a->in.exec};
    lco_status status = linear(&a->in);
    if (status == LCO_OK)
        status = swiglu(&middle);
    return status == LCO_OK ? linear(&a->out) : status;
}

#endif
