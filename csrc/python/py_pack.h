#ifndef LCO_PY_PACK_H
#define LCO_PY_PACK_H

#define PY_SSIZE_T_CLEAN
#include <Python.h>

/* Adds the functions that make quantised weights to the module. -1 with an exception set on failure. */
int lco_py_add_pack(PyObject *module);

#endif
