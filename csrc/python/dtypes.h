/* Names of element types, as Python spells them. */
#ifndef LCO_PYTHON_DTYPES_H
#define LCO_PYTHON_DTYPES_H

#include <string.h>

#include "../base/formats.h"

#define LCO_PY_DTYPES "float32, float16, bfloat16, fp8_e4m3, fp8_e5m2 or int8"

static inline bool lco_py_dtype(const char *name, lco_dtype *out)
{
    static const char *const NAMES[] = {[LCO_F32] = "float32",      [LCO_F16] = "float16",      [LCO_BF16] = "bfloat16",
                                        [LCO_F8_E4M3] = "fp8_e4m3", [LCO_F8_E5M2] = "fp8_e5m2", [LCO_I8] = "int8"};
    for (size_t i = 0; i < sizeof NAMES / sizeof NAMES[0]; i++) {
        if (strcmp(name, NAMES[i]) == 0) {
            *out = (lco_dtype)i;
            return true;
        }
    }
    return false;
}

#endif
