#ifndef LCO_PY_DEQUANT_H
#define LCO_PY_DEQUANT_H

#include <Python.h>

/* Adds `dequantize` and `convert` to the module. -1 with an exception set on failure. */
int lco_py_add_dequant(PyObject *module);

#endif
