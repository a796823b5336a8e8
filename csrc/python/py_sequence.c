/* _core.Sequence. */
#include <string.h>

#include "module.h"

lco_seq *lco_py_sequence_nogil(sequence_object *self, lco_error *err)
{
    if (lco_py_cache_nogil(self->cache, err) == NULL)
        return NULL;
    lco_seq *seq = self->seq;
    if (seq == NULL)
        lco_fail(err, LCO_EINVAL, "this sequence was freed: free() was called, by this thread or another");
    return seq;
}

static void sequence_release(sequence_object *self)
{
    lco_error err;
    lco_status status;
    lco_seq *seq = atomic_exchange(&self->seq, NULL);
    if (seq != NULL) /* a cache that is closed frees its sequences */
        LOCKED(self->cache->model, true, self->cache->kv != NULL ? lco_seq_destroy(seq) : (void)0);
}

static void sequence_dealloc(sequence_object *self)
{
    sequence_release(self);
    Py_XDECREF((PyObject *)self->cache);
    lco_py_free_object((PyObject *)self);
}

/* The caller gives it back with busy--. */
static int claim(sequence_object *self)
{
    if (self->busy == 0) {
        self->busy++;
        return 0;
    }
    PyErr_SetString(lco_py_state((PyObject *)self)->errors[LCO_EINVAL],
                    "this sequence is in use by a running generation (close that first) or by a call of another thread");
    return -1;
}

static PyObject *sequence_length(sequence_object *self, PyObject *Py_UNUSED(arg))
{
    lco_error err;
    lco_status status;
    lco_seq *seq;
    int64_t length = 0;
    LOCKED(self->cache->model, (seq = lco_py_sequence_nogil(self, &err)), length = lco_seq_length(seq));
    return status == LCO_OK ? PyLong_FromLongLong(length) : lco_py_raise((PyObject *)self, &err);
}

static PyObject *sequence_ids(sequence_object *self, PyObject *Py_UNUSED(arg))
{
    lco_error err;
    lco_status status;
    lco_seq *seq;
    PyObject *bytes;
    int64_t length = 0, held = 0;
    /* The bytes are made without the model's lock, and a sequence may have grown meanwhile. */
    do {
        LOCKED(self->cache->model, (seq = lco_py_sequence_nogil(self, &err)), length = lco_seq_length(seq));
        if (status != LCO_OK)
            return lco_py_raise((PyObject *)self, &err);
        bytes = PyBytes_FromStringAndSize(NULL, (Py_ssize_t)length * 4);
        if (bytes == NULL)
            return NULL;
        char *to = PyBytes_AsString(bytes);
        LOCKED(self->cache->model, (seq = lco_py_sequence_nogil(self, &err)),
               ((held = lco_seq_length(seq)) == length && length > 0 ? (void)memcpy(to, lco_seq_ids(seq), (size_t)length * 4) : (void)0));
        if (status == LCO_OK && held == length)
            return bytes;
        Py_DECREF(bytes);
    } while (status == LCO_OK);
    return lco_py_raise((PyObject *)self, &err);
}

static PyObject *sequence_adopt(sequence_object *self, PyObject *arg)
{
    Py_buffer ids;
    if (lco_py_get_ids((PyObject *)self, arg, "ids", &ids) != 0)
        return NULL;
    if (claim(self) != 0) {
        PyBuffer_Release(&ids);
        return NULL;
    }
    lco_error err;
    lco_status status;
    lco_model *model;
    lco_seq *seq;
    int64_t found = 0;
    LOCKED(self->cache->model, (model = lco_py_model_nogil(self->cache->model, &err)) && (seq = lco_py_sequence_nogil(self, &err)),
           status = lco_model_shares_prefixes(model) ? lco_seq_adopt(seq, ids.buf, ids.len / 4, &found, &err) : LCO_OK);
    self->busy--;
    PyBuffer_Release(&ids);
    return status == LCO_OK ? PyLong_FromLongLong(found) : lco_py_raise((PyObject *)self, &err);
}

static PyObject *sequence_image(sequence_object *self, PyObject *Py_UNUSED(arg))
{
    if (claim(self) != 0) /* nobody changes it while its parts are copied */
        return NULL;
    lco_error err;
    lco_status status;
    lco_seq *seq;
    lco_seq_image image = {0};
    LOCKED(self->cache->model, (seq = lco_py_sequence_nogil(self, &err)), image = lco_seq_get_image(seq));
    PyObject *result = NULL;
    if (status != LCO_OK)
        lco_py_raise((PyObject *)self, &err);
    else
        result = Py_BuildValue("(LLLy#y#y#)", (long long)image.length, (long long)image.exact, (long long)image.unseen,
                               image.length > 0 ? (const char *)image.ids : "", (Py_ssize_t)image.length * 4,
                               image.n_pages > 0 ? (const char *)image.table : "", (Py_ssize_t)image.n_pages * 4,
                               image.tail_bytes > 0 ? (const char *)image.tail : "", (Py_ssize_t)image.tail_bytes);
    self->busy--;
    return result;
}

static PyObject *sequence_read(sequence_object *self, PyObject *args)
{
    PyObject *keys_object, *values_object;
    Py_buffer keys, values;
    int layer;
    if (!PyArg_ParseTuple(args, "iOO:read", &layer, &keys_object, &values_object))
        return NULL;
    if (PyObject_GetBuffer(keys_object, &keys, PyBUF_WRITABLE) != 0)
        return NULL;
    if (PyObject_GetBuffer(values_object, &values, PyBUF_WRITABLE) != 0) {
        PyBuffer_Release(&keys);
        return NULL;
    }
    lco_error err;
    lco_status status = LCO_OK;
    const Py_ssize_t row = (Py_ssize_t)self->cache->model->n_kv_heads * self->cache->model->head_dim * 4;
    if (keys.len != values.len || keys.len % row != 0)
        status = lco_fail(&err, LCO_EINVAL, "keys and values: buffers of %lld and %lld bytes, expected rows of %lld in both",
                          (long long)keys.len, (long long)values.len, (long long)row);
    else if (claim(self) != 0)
        status = LCO_EINVAL;
    else {
        lco_seq *seq;
        LOCKED(self->cache->model, (seq = lco_py_sequence_nogil(self, &err)),
               status = lco_seq_read(seq, layer, keys.len / row, keys.buf, values.buf, &err));
        self->busy--;
    }
    PyBuffer_Release(&values);
    PyBuffer_Release(&keys);
    if (status == LCO_OK)
        Py_RETURN_NONE;
    return PyErr_Occurred() ? NULL : lco_py_raise((PyObject *)self, &err);
}

static PyObject *sequence_fork(sequence_object *self, PyObject *Py_UNUSED(arg))
{
    allocfunc alloc = (allocfunc)PyType_GetSlot(Py_TYPE((PyObject *)self), Py_tp_alloc);
    sequence_object *copy = (sequence_object *)alloc(Py_TYPE((PyObject *)self), 0);
    if (copy == NULL)
        return NULL;
    Py_INCREF((PyObject *)self->cache);
    copy->cache = self->cache;
    if (claim(self) == 0) {
        lco_error err;
        lco_status status;
        lco_seq *seq, *native = NULL;
        LOCKED(self->cache->model, (seq = lco_py_sequence_nogil(self, &err)), status = lco_seq_fork(seq, &native, &err));
        self->busy--;
        copy->seq = native;
        if (status == LCO_OK)
            return (PyObject *)copy;
        lco_py_raise((PyObject *)self, &err);
    }
    Py_DECREF(copy);
    return NULL;
}

/* A change of the sequence that takes a number of tokens. */
static PyObject *change(sequence_object *self, PyObject *arg, lco_status (*to)(lco_seq *, int64_t, lco_error *))
{
    long long tokens = PyLong_AsLongLong(arg);
    if (tokens == -1 && PyErr_Occurred())
        return NULL;
    if (claim(self) != 0)
        return NULL;
    lco_error err;
    lco_status status;
    lco_seq *seq;
    LOCKED(self->cache->model, (seq = lco_py_sequence_nogil(self, &err)), status = to(seq, tokens, &err));
    self->busy--;
    return lco_py_none((PyObject *)self, status, &err);
}

static PyObject *sequence_truncate(sequence_object *self, PyObject *arg) { return change(self, arg, lco_seq_truncate); }

static PyObject *sequence_hold(sequence_object *self, PyObject *arg) { return change(self, arg, lco_seq_hold); }

static PyObject *sequence_free(sequence_object *self, PyObject *Py_UNUSED(arg))
{
    if (claim(self) != 0)
        return NULL;
    sequence_release(self);
    self->busy--;
    Py_RETURN_NONE;
}

static PyMethodDef sequence_methods[] = {
    {"ids", (PyCFunction)(void (*)(void))sequence_ids, METH_NOARGS, "ids()\n--\n\nThe ids of the tokens held, int32 as bytes."},
    {"length", (PyCFunction)(void (*)(void))sequence_length, METH_NOARGS, "length()\n--\n\nTokens held."},
    {"adopt", (PyCFunction)(void (*)(void))sequence_adopt, METH_O,
     "adopt(ids)\n--\n\nAn empty sequence takes over the pages that the prefix index has of int32 ids; returns how many tokens that is."},
    {"image", (PyCFunction)(void (*)(void))sequence_image, METH_NOARGS,
     "image()\n--\n\n(length, exact, unseen, ids, table, tail) for a file: numbers, then bytes."},
    {"read", (PyCFunction)(void (*)(void))sequence_read, METH_VARARGS,
     "read(layer, keys, values)\n--\n\nKeys and values of a layer into float32 arrays [length, kv_heads, head_dim]."},
    {"fork", (PyCFunction)(void (*)(void))sequence_fork, METH_NOARGS,
     "fork()\n--\n\nA second sequence that shares all pages until one of them is written."},
    {"truncate", (PyCFunction)(void (*)(void))sequence_truncate, METH_O, "truncate(length)\n--\n\nKeep the first tokens only."},
    {"hold", (PyCFunction)(void (*)(void))sequence_hold, METH_O,
     "hold(n)\n--\n\nBefore n tokens come: make truncating to this length exact."},
    {"free", (PyCFunction)(void (*)(void))sequence_free, METH_NOARGS, "free()\n--\n\nReturn the pages."},
    {NULL, NULL, 0, NULL},
};

static PyType_Slot sequence_slots[] = {
    {Py_tp_dealloc, sequence_dealloc},
    {Py_tp_methods, sequence_methods},
    {Py_tp_doc, "A sequence of a KVCache; made by KVCache.sequence()."},
    {0, NULL},
};

PyType_Spec lco_py_sequence_spec = {
    .name = "llmcoopt._core.Sequence",
    .basicsize = sizeof(sequence_object),
    .flags = Py_TPFLAGS_DEFAULT | Py_TPFLAGS_IMMUTABLETYPE | Py_TPFLAGS_DISALLOW_INSTANTIATION,
    .slots = sequence_slots,
};
