/* Single operators for tests and benchmarks: llmcoopt._core.OpContext and llmcoopt._core.isas(). */
#ifndef LCO_PYTHON_PY_OPS_H
#define LCO_PYTHON_PY_OPS_H

#define PY_SSIZE_T_CLEAN
#include <Python.h>

/* 0, or -1 with an exception set. */
int lco_py_add_ops(PyObject *module);

#endif
