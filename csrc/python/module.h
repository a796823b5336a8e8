/* The extension llmcoopt._core: module state, the types' structs, and the few helpers that every file here uses.
 * Stable ABI (CPython 3.11 and later). Arrays come and go by the buffer protocol; the NumPy C API is not used.
 *
 * Locking: a model has one lock, taken for every native call on the model, its caches, sequences and engines. It is taken and released with the
 * GIL released, and its holder never waits for the GIL, so it may also be waited for while the GIL is held (in deallocators). */
#ifndef LCO_PYTHON_MODULE_H
#define LCO_PYTHON_MODULE_H

#define PY_SSIZE_T_CLEAN
#include <Python.h>

#include "../llmcoopt.h"

#define N_STATUS (LCO_EUNSUPPORTED + 1)

typedef struct {
    PyObject *errors[N_STATUS]; /* exception class of each status */
    PyTypeObject *model_type, *cache_type, *sequence_type, *engine_type;
} core_state;

typedef struct {
    PyObject_HEAD lco_model *model; /* NULL after close() */
    PyThread_type_lock lock;
    Py_buffer *buffers; /* the weights, exported as long as the model lives */
    Py_ssize_t n_buffers;
} model_object;

typedef struct {
    PyObject_HEAD model_object *model;
    lco_kv *kv;       /* NULL after close() */
    Py_ssize_t users; /* engines alive and calls running on this cache: close() is refused meanwhile */
} cache_object;

typedef struct {
    PyObject_HEAD cache_object *cache;
    lco_seq *seq; /* NULL after free() */
    int busy;     /* requests of engines that use it now */
} sequence_object;

/* Sets the exception of a status; returns NULL. */
PyObject *lco_py_raise(PyObject *self, const lco_error *err);
core_state *lco_py_state(PyObject *self); /* of an instance of one of our types */

/* A C-contiguous int32 buffer; -1 with an exception that names `what`. */
int lco_py_get_ids(PyObject *self, PyObject *object, const char *what, Py_buffer *out);

/* The native handle, or NULL with an exception when it was closed or freed. */
lco_model *lco_py_model(model_object *self);
lco_kv *lco_py_cache(cache_object *self);
lco_seq *lco_py_sequence(sequence_object *self);

void lco_py_lock_nogil(model_object *model); /* the GIL may be held or not; see above */
void lco_py_unlock_nogil(model_object *model);

#define LOCKED(model, statement)                                                                                                           \
    do {                                                                                                                                   \
        Py_BEGIN_ALLOW_THREADS;                                                                                                            \
        lco_py_lock_nogil(model);                                                                                                          \
        statement;                                                                                                                         \
        lco_py_unlock_nogil(model);                                                                                                        \
        Py_END_ALLOW_THREADS;                                                                                                              \
    } while (0)

extern PyType_Spec lco_py_model_spec, lco_py_cache_spec, lco_py_sequence_spec, lco_py_engine_spec;

#endif
