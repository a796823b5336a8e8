/* The extension llmcoopt._core: module state, the types' structs, and the few helpers that every file here uses.
 * Stable ABI (CPython 3.11 and later). Arrays come and go by the buffer protocol; the NumPy C API is not used.
 *
 * Locking: a model has one lock, taken for every native call on the model, its caches, sequences and engines. It is taken and released with the
 * GIL released, and its holder never waits for the GIL. Any handle may be closed while a call waits for the lock, so:
 * 1. Closing takes the handle out of its object with the GIL held, then waits for the lock, then destroys it. A handle is destroyed under the lock
 *    and nowhere else.
 * 2. A call loads its handles after it got the lock, each of them once: NULL is LCO_EINVAL, anything else lives until the lock is released.
 * 3. `users` and `busy` are claims, made with the GIL held before waiting for the lock: what is claimed is not closed, freed or written by others.
 * In a child of fork() the lock may be held by a thread that does not exist there. Only the process that made the model takes it: elsewhere calls
 * return LCO_EFORK, and closing and deallocators leave the copy of the parent's memory alone. */
#ifndef LCO_PYTHON_MODULE_H
#define LCO_PYTHON_MODULE_H

#define PY_SSIZE_T_CLEAN
#include <Python.h>
#include <stdatomic.h>
#include <sys/types.h>

#include "../llmcoopt.h"

#define N_STATUS (LCO_EUNSUPPORTED + 1)

typedef struct {
    PyObject *errors[N_STATUS]; /* exception class of each status */
    PyTypeObject *model_type, *cache_type, *sequence_type, *engine_type;
} core_state;

typedef struct {
    PyObject_HEAD lco_model *_Atomic model; /* NULL after close() */
    PyThread_type_lock lock;
    pid_t owner;
    int32_t vocab_size, n_layers, n_kv_heads, head_dim; /* of the config */
    int64_t longest_window;
    Py_buffer *buffers; /* the weights, exported as long as the model lives */
    Py_ssize_t n_buffers;
} model_object;

typedef struct {
    PyObject_HEAD model_object *model;
    lco_kv *_Atomic kv; /* NULL after close() */
    Py_ssize_t users;   /* engines alive: close() is refused meanwhile */
    bool closing;       /* close() came with engines alive but the model closed: it is done when the last of them ends */
} cache_object;

typedef struct {
    PyObject_HEAD cache_object *cache;
    lco_seq *_Atomic seq; /* NULL after free() */
    int busy;             /* requests of engines and calls that use it now */
} sequence_object;

/* Sets the exception of a status; returns NULL. */
PyObject *lco_py_raise(PyObject *self, const lco_error *err);
PyObject *lco_py_none(PyObject *self, lco_status status, const lco_error *err); /* None, or the exception of a failure */
void lco_py_free_object(PyObject *self);                                        /* the end of a tp_dealloc */
core_state *lco_py_state(PyObject *self);                                       /* of an instance of one of our types */

/* A C-contiguous int32 buffer; -1 with an exception that names `what`. */
int lco_py_get_ids(PyObject *self, PyObject *object, const char *what, Py_buffer *out);

/* The native handle, or NULL with an error when it was closed or freed. For use under the lock. */
lco_model *lco_py_model_nogil(model_object *self, lco_error *err);
lco_kv *lco_py_cache_nogil(cache_object *self, lco_error *err);
lco_seq *lco_py_sequence_nogil(sequence_object *self, lco_error *err);

void lco_py_cache_release(cache_object *self); /* closes it */

lco_status lco_py_lock_nogil(model_object *model, lco_error *err); /* not taken when it fails: LCO_EFORK */
void lco_py_unlock_nogil(model_object *model);

/* Runs `statement` under the model's lock when `open` is true, which loads the handles (rule 2 above) and writes `err` when one of them is NULL.
 * Sets the caller's `status`, an lco_status, and `err`, an lco_error. */
#define LOCKED(model, open, statement)                                                                                                     \
    do {                                                                                                                                   \
        Py_BEGIN_ALLOW_THREADS;                                                                                                            \
        if ((status = lco_py_lock_nogil(model, &err)) == LCO_OK) {                                                                         \
            if (open)                                                                                                                      \
                statement;                                                                                                                 \
            else                                                                                                                           \
                status = err.code;                                                                                                         \
            lco_py_unlock_nogil(model);                                                                                                    \
        }                                                                                                                                  \
        Py_END_ALLOW_THREADS;                                                                                                              \
    } while (0)

extern PyType_Spec lco_py_model_spec, lco_py_cache_spec, lco_py_sequence_spec, lco_py_engine_spec;

#endif
