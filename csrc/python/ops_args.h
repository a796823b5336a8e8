/* What the files of OpContext share: its object, and the arguments of a call.
 *
 * A `bag` holds the buffers of one call; shapes come from the buffers, and each check names the argument, what was found and what is expected. */
#ifndef LCO_PYTHON_OPS_ARGS_H
#define LCO_PYTHON_OPS_ARGS_H

#include "py_ops.h"

#include <stdatomic.h>
#include <string.h>

#include "../ops/ops.h"
#include "dtypes.h"

typedef struct {
    PyObject_HEAD const lco_ops *ops;
    lco_pool *pool;
    lco_exec exec;
    atomic_bool busy;
} OpContext;

#define BAG_BUFFERS 64

typedef struct {
    Py_buffer view[BAG_BUFFERS];
    int n;
} bag;

static inline void bag_release(bag *b)
{
    while (b->n > 0)
        PyBuffer_Release(&b->view[--b->n]);
}

enum { READ = 0, WRITE = PyBUF_WRITABLE };

static inline bool parse_dtype(const char *name, lco_dtype *out)
{
    if (lco_py_dtype(name, out) && !lco_dtype_scaled(*out))
        return true;
    PyErr_Format(PyExc_ValueError, "dtype = '%s', expected float32, float16 or bfloat16", name);
    return false;
}

static inline const char *format_of(lco_dtype dtype) { return dtype == LCO_F32 ? "f" : "H"; }

static inline bool check(bool good, const char *name, int64_t found, const char *expected)
{
    if (!good)
        PyErr_Format(PyExc_ValueError, "%s is %lld, expected %s", name, (long long)found, expected);
    return good;
}

/* Axis 0 may have any stride of at least a row; the axes after it are contiguous. */
static inline bool rows_contiguous(const Py_buffer *v)
{
    Py_ssize_t step = v->itemsize;
    for (int axis = v->ndim - 1; axis > 0; axis--) {
        if (v->shape[axis] > 1 && v->strides[axis] != step)
            return false;
        step *= v->shape[axis];
    }
    return v->shape[0] <= 1 || (v->strides[0] >= step && v->strides[0] % v->itemsize == 0);
}

/* The buffer of `object`, kept in the bag; NULL with an exception set when it has another type, rank or order. */
static inline const Py_buffer *take(bag *b, PyObject *object, const char *name, const char *format, int ndim, int writable)
{
    Py_buffer *v = &b->view[b->n];
    if (b->n == BAG_BUFFERS) {
        PyErr_Format(PyExc_ValueError, "%s: more than %d buffers in one call", name, BAG_BUFFERS);
        return NULL;
    }
    if (PyObject_GetBuffer(object, v, PyBUF_FORMAT | PyBUF_STRIDES | writable) < 0)
        return NULL;
    b->n++;
    const char *found = v->format != NULL ? v->format : "B";
    if (strcmp(found, format) != 0) {
        PyErr_Format(PyExc_ValueError, "%s holds elements of buffer format '%s', expected '%s'", name, found, format);
        return NULL;
    }
    if (v->ndim != ndim) {
        PyErr_Format(PyExc_ValueError, "%s has %d axes, expected %d", name, v->ndim, ndim);
        return NULL;
    }
    if (!rows_contiguous(v)) {
        PyErr_Format(PyExc_ValueError, "%s has strides that overlap or scatter a row, expected every row to be contiguous", name);
        return NULL;
    }
    return v;
}

/* Elements between the starts of two rows. */
static inline int64_t row_stride(const Py_buffer *v)
{
    int64_t width = 1;
    for (int axis = 1; axis < v->ndim; axis++)
        width *= v->shape[axis];
    return v->shape[0] <= 1 ? width : v->strides[0] / v->itemsize;
}

static inline bool check_axis(const Py_buffer *v, const char *name, int axis, int64_t expected)
{
    if (v->shape[axis] == expected)
        return true;
    PyErr_Format(PyExc_ValueError, "axis %d of %s is %lld, expected %lld", axis, name, (long long)v->shape[axis], (long long)expected);
    return false;
}

static inline bool check_packed(const Py_buffer *v, const char *name)
{
    if (v->shape[0] <= 1 || v->strides[0] * v->shape[0] == v->len)
        return true;
    PyErr_Format(PyExc_ValueError, "rows of %s are %lld bytes apart, expected a contiguous array", name, (long long)v->strides[0]);
    return false;
}

/* Lets other Python threads run and marks the context busy; NULL with an exception set when it can't be used. */
static inline PyThreadState *enter(OpContext *self)
{
    lco_error err = {0};
    if (lco_pool_check(self->pool, &err) != LCO_OK) {
        PyErr_SetString(PyExc_RuntimeError, err.text);
        return NULL;
    }
    if (atomic_exchange(&self->busy, true)) {
        PyErr_SetString(PyExc_RuntimeError, "this OpContext is at work in another thread; use one OpContext for each thread");
        return NULL;
    }
    return PyEval_SaveThread();
}

/* None, or NULL with the op's failure as an exception. */
static inline PyObject *leave(OpContext *self, PyThreadState *state, lco_status status)
{
    PyEval_RestoreThread(state);
    atomic_store(&self->busy, false);
    if (status == LCO_OK)
        return Py_NewRef(Py_None);
    return PyErr_Format(PyExc_MemoryError, "the op ran out of scratch memory (it holds %zu bytes)", lco_arena_bytes(self->exec.scratch));
}

/* py_ops_cache.c */
extern const char lco_py_rope_append_doc[], lco_py_attention_doc[], lco_py_choose_pages_doc[];
PyObject *lco_py_rope_append(PyObject *self, PyObject *args, PyObject *kw);
PyObject *lco_py_attention(PyObject *self, PyObject *args, PyObject *kw);
PyObject *lco_py_choose_pages(PyObject *self, PyObject *args, PyObject *kw);

/* py_quant.c */
extern const char lco_py_hessian_add_doc[], lco_py_inverse_factor_doc[], lco_py_sweep_block_doc[];
PyObject *lco_py_hessian_add(PyObject *self, PyObject *args, PyObject *kw);
PyObject *lco_py_inverse_factor(PyObject *self, PyObject *args, PyObject *kw);
PyObject *lco_py_sweep_block(PyObject *self, PyObject *args, PyObject *kw);

#endif
