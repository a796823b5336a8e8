/* _core.KVCache and _core.Sequence. */
#include <string.h>

#include "dtypes.h"
#include "module.h"

lco_kv *lco_py_cache_nogil(cache_object *self, lco_error *err)
{
    lco_kv *kv = self->kv;
    if (kv == NULL)
        lco_fail(err, LCO_EINVAL, "this cache is closed: close() was called, by this thread or another");
    return kv;
}

lco_seq *lco_py_sequence_nogil(sequence_object *self, lco_error *err)
{
    if (lco_py_cache_nogil(self->cache, err) == NULL)
        return NULL;
    lco_seq *seq = self->seq;
    if (seq == NULL)
        lco_fail(err, LCO_EINVAL, "this sequence was freed: free() was called, by this thread or another");
    return seq;
}

static void free_object(PyObject *self)
{
    PyTypeObject *type = Py_TYPE((PyObject *)self);
    freefunc release = (freefunc)PyType_GetSlot(type, Py_tp_free);
    release(self);
    Py_DECREF(type);
}

/* ---- KVCache ---- */

/* The element type of each layer from a list of names; NULL with an exception. The caller frees it. */
static lco_dtype *read_layer_dtypes(core_state *state, PyObject *list, int32_t n_layers)
{
    if (!PyList_Check(list) || PyList_Size(list) != n_layers) {
        PyErr_Format(state->errors[LCO_EINVAL], "layer_dtypes: expected a list of %d names, one a layer", n_layers);
        return NULL;
    }
    lco_dtype *types = PyMem_Calloc((size_t)n_layers, sizeof *types);
    if (types == NULL)
        PyErr_NoMemory();
    for (int32_t i = 0; i < n_layers && types != NULL; i++) {
        PyObject *item = PyList_GetItem(list, i);
        const char *name = PyUnicode_Check(item) ? PyUnicode_AsUTF8AndSize(item, NULL) : "";
        if (name != NULL && lco_py_dtype(name, &types[i]))
            continue;
        if (name != NULL)
            PyErr_Format(state->errors[LCO_EINVAL], "layer_dtypes: layer %d has %R, expected " LCO_PY_DTYPES, i, item);
        PyMem_Free(types);
        types = NULL;
    }
    return types;
}

/* float32 scales of all layers, K or V and kv heads: positive, and with a reciprocal. */
static int take_fixed_scales(const model_object *model, PyObject *object, Py_buffer *view)
{
    core_state *state = lco_py_state((PyObject *)model);
    const Py_ssize_t n = (Py_ssize_t)2 * model->n_layers * model->n_kv_heads;
    if (PyObject_GetBuffer(object, view, PyBUF_FORMAT | PyBUF_C_CONTIGUOUS) != 0)
        return -1;
    const float *values = view->buf;
    Py_ssize_t bad = 0;
    if (view->format == NULL || strcmp(view->format, "f") != 0 || view->len != n * (Py_ssize_t)sizeof(float)) {
        PyErr_Format(state->errors[LCO_EINVAL], "fixed_scales: %zd bytes, expected %zd float32: [layers, k|v, kv heads]", view->len, n);
    } else {
        while (bad < n && values[bad] >= 0x1p-126f && values[bad] <= 0x1p126f)
            bad++;
        if (bad == n)
            return 0;
        PyErr_Format(state->errors[LCO_EINVAL], "fixed_scales: number %zd is not a scale (positive, finite, and with a reciprocal)", bad);
    }
    PyBuffer_Release(view);
    return -1;
}

static PyObject *cache_new(PyTypeObject *type, PyObject *args, PyObject *kwargs)
{
    static char *names[] = {"model",        "dtype",      "page_size",    "max_tokens",     "write_buffer",
                            "host_bytes",   "spill_path", "prefix_index", "turn_keys",      "layer_dtypes",
                            "fixed_scales", "window",     "sinks",        "page_tolerance", NULL};
    core_state *state = PyType_GetModuleState(type);
    PyObject *model, *layer_dtypes = Py_None, *fixed_scales = Py_None;
    Py_buffer scales = {0};
    const char *dtype;
    int page_size, write_buffer, prefix_index = 0, turn_keys = 1;
    long long max_tokens, host_bytes = 0, window = 0, sinks = 0;
    const char *spill_path = NULL;
    double tolerance = 0;
    if (!PyArg_ParseTupleAndKeywords(args, kwargs, "O!siLp|LzppOOLLd", names, state->model_type, &model, &dtype, &page_size, &max_tokens,
                                     &write_buffer, &host_bytes, &spill_path, &prefix_index, &turn_keys, &layer_dtypes, &fixed_scales,
                                     &window, &sinks, &tolerance))
        return NULL;
    const model_object *owner = (model_object *)model;
    lco_kv_options options = {.n_layers = owner->n_layers,
                              .n_kv_heads = owner->n_kv_heads,
                              .head_dim = owner->head_dim,
                              .page_size = page_size,
                              .write_buffer = write_buffer,
                              .max_tokens = max_tokens,
                              .host_bytes = host_bytes,
                              .spill_path = spill_path,
                              .prefix_index = prefix_index,
                              .turn_keys = turn_keys,
                              .model_window = owner->longest_window,
                              .window = window,
                              .sinks = sinks,
                              .page_tolerance = tolerance};
    if (!lco_py_dtype(dtype, &options.dtype))
        return PyErr_Format(state->errors[LCO_EINVAL], "dtype = '%s', expected " LCO_PY_DTYPES, dtype);
    allocfunc alloc = (allocfunc)PyType_GetSlot(type, Py_tp_alloc);
    cache_object *self = (cache_object *)alloc(type, 0);
    if (self == NULL)
        return NULL;
    lco_error err;
    lco_kv *kv;
    Py_INCREF(model);
    self->model = (model_object *)model;
    lco_dtype *types = NULL;
    if ((layer_dtypes != Py_None && (types = read_layer_dtypes(state, layer_dtypes, owner->n_layers)) == NULL) ||
        (fixed_scales != Py_None && take_fixed_scales(owner, fixed_scales, &scales) != 0)) {
        PyMem_Free(types);
        Py_DECREF(self);
        return NULL;
    }
    options.layer_dtypes = types;
    options.fixed_scales = scales.buf;
    if (lco_owner_check(owner->owner, &err) == LCO_OK && lco_py_model_nogil(self->model, &err) != NULL &&
        lco_kv_create(&options, &kv, &err) == LCO_OK)
        self->kv = kv;
    else
        lco_py_raise((PyObject *)self, &err);
    PyMem_Free(types);
    if (scales.obj != NULL)
        PyBuffer_Release(&scales);
    if (self->kv != NULL)
        return (PyObject *)self;
    Py_DECREF(self);
    return NULL;
}

void lco_py_cache_release(cache_object *self)
{
    lco_error err;
    lco_status status;
    lco_kv *kv = atomic_exchange(&self->kv, NULL);
    if (kv != NULL)
        LOCKED(self->model, true, lco_kv_destroy(kv));
}

static void cache_dealloc(cache_object *self)
{
    lco_py_cache_release(self); /* no sequence or engine is left: each holds a reference to this object */
    Py_XDECREF((PyObject *)self->model);
    free_object((PyObject *)self);
}

static PyObject *cache_close(cache_object *self, PyObject *Py_UNUSED(arg))
{
    if (self->users == 0) {
        lco_py_cache_release(self);
    } else if (self->model->model == NULL || lco_owner_check(self->model->owner, NULL) != LCO_OK) {
        self->closing = true; /* its engines can't run any more */
    } else {
        PyErr_SetString(lco_py_state((PyObject *)self)->errors[LCO_EINVAL],
                        "this cache is in use by a running generation: close that first");
        return NULL;
    }
    Py_RETURN_NONE;
}

static PyObject *cache_sequence(cache_object *self, PyObject *Py_UNUSED(arg))
{
    core_state *state = lco_py_state((PyObject *)self);
    allocfunc alloc = (allocfunc)PyType_GetSlot(state->sequence_type, Py_tp_alloc);
    sequence_object *seq = (sequence_object *)alloc(state->sequence_type, 0);
    if (seq == NULL)
        return NULL;
    Py_INCREF((PyObject *)self);
    seq->cache = self;
    lco_error err;
    lco_status status;
    lco_kv *kv;
    lco_seq *native = NULL;
    LOCKED(self->model, (kv = lco_py_cache_nogil(self, &err)), status = lco_seq_create(kv, &native, &err));
    seq->seq = native;
    if (status == LCO_OK)
        return (PyObject *)seq;
    lco_py_raise((PyObject *)self, &err);
    Py_DECREF(seq);
    return NULL;
}

static PyObject *cache_stats(cache_object *self, PyObject *Py_UNUSED(arg))
{
    lco_error err;
    lco_status status;
    lco_kv *kv;
    lco_kv_stats s = {0};
    LOCKED(self->model, (kv = lco_py_cache_nogil(self, &err)), s = lco_kv_get_stats(kv));
    if (status != LCO_OK)
        return lco_py_raise((PyObject *)self, &err);
    const struct {
        const char *name;
        int64_t value;
    } counts[] = {
#define COUNT(name) {#name, s.name}
        COUNT(pages_total),    COUNT(pages_free),      COUNT(pages_shared),     COUNT(pages_away),        COUNT(sequences),
        COUNT(tokens_held),    COUNT(page_bytes),      COUNT(bytes_per_token),  COUNT(reserved_bytes),    COUNT(resident_bytes),
        COUNT(tail_bytes),     COUNT(tokens_appended), COUNT(blocks_quantised), COUNT(pages_copied),      COUNT(pages_spilled),
        COUNT(pages_restored), COUNT(slices_fetched),  COUNT(bytes_fetched),    COUNT(prefetches_issued), COUNT(prefetches_used),
        COUNT(pages_cached),   COUNT(tokens_found),    COUNT(bytes_written),    COUNT(pages_released),    COUNT(pages_read),
        COUNT(pages_left_out), COUNT(bounds_bytes),
#undef COUNT
    };
    PyObject *dict = PyDict_New();
    for (size_t i = 0; dict != NULL && i < sizeof counts / sizeof counts[0]; i++) {
        PyObject *value = PyLong_FromLongLong(counts[i].value);
        if (value == NULL || PyDict_SetItemString(dict, counts[i].name, value) != 0)
            Py_CLEAR(dict);
        Py_XDECREF(value);
    }
    const float masses[] = {s.largest_mass_left_out, s.step_mass_left_out};
    for (int i = 0; dict != NULL && i < 2; i++) {
        PyObject *value = PyFloat_FromDouble(masses[i]);
        if (value == NULL || PyDict_SetItemString(dict, i == 0 ? "largest_mass_left_out" : "step_mass_left_out", value) != 0)
            Py_CLEAR(dict);
        Py_XDECREF(value);
    }
    return dict;
}

static PyObject *cache_step_tokens(cache_object *self, PyObject *Py_UNUSED(arg))
{
    lco_error err;
    lco_status status;
    lco_kv *kv;
    int64_t n = 0;
    LOCKED(self->model, (kv = lco_py_cache_nogil(self, &err)), n = lco_kv_step_tokens(kv));
    return status == LCO_OK ? PyLong_FromLongLong(n) : lco_py_raise((PyObject *)self, &err);
}

static PyObject *cache_forget_prefixes(cache_object *self, PyObject *Py_UNUSED(arg))
{
    lco_error err;
    lco_status status;
    lco_kv *kv;
    LOCKED(self->model, (kv = lco_py_cache_nogil(self, &err)), lco_kv_forget_prefixes(kv));
    if (status != LCO_OK)
        return lco_py_raise((PyObject *)self, &err);
    Py_RETURN_NONE;
}

static PyObject *cache_reset_counters(cache_object *self, PyObject *Py_UNUSED(arg))
{
    lco_error err;
    lco_status status;
    lco_kv *kv;
    LOCKED(self->model, (kv = lco_py_cache_nogil(self, &err)), lco_kv_reset_counters(kv));
    if (status != LCO_OK)
        return lco_py_raise((PyObject *)self, &err);
    Py_RETURN_NONE;
}

static PyObject *cache_check(cache_object *self, PyObject *Py_UNUSED(arg))
{
    lco_error err;
    lco_status status;
    lco_kv *kv;
    LOCKED(self->model, (kv = lco_py_cache_nogil(self, &err)), status = lco_kv_check(kv, &err));
    if (status != LCO_OK)
        return lco_py_raise((PyObject *)self, &err);
    Py_RETURN_NONE;
}

static PyMethodDef cache_methods[] = {
    {"sequence", (PyCFunction)(void (*)(void))cache_sequence, METH_NOARGS, "sequence()\n--\n\nA new, empty sequence."},
    {"stats", (PyCFunction)(void (*)(void))cache_stats, METH_NOARGS, "stats()\n--\n\nExact counters as a dict."},
    {"step_tokens", (PyCFunction)(void (*)(void))cache_step_tokens, METH_NOARGS,
     "step_tokens()\n--\n\nThe most tokens of one sequence that a step may append."},
    {"forget_prefixes", (PyCFunction)(void (*)(void))cache_forget_prefixes, METH_NOARGS,
     "forget_prefixes()\n--\n\nEmpty the prefix index."},
    {"reset_counters", (PyCFunction)(void (*)(void))cache_reset_counters, METH_NOARGS,
     "reset_counters()\n--\n\nSet the counters of stats() to zero that count since the cache was made."},
    {"check", (PyCFunction)(void (*)(void))cache_check, METH_NOARGS,
     "check()\n--\n\nProve the cache's invariants; FormatError names the first that fails."},
    {"close", (PyCFunction)(void (*)(void))cache_close, METH_NOARGS, "close()\n--\n\nGive all memory back; sequences of this cache end."},
    {NULL, NULL, 0, NULL},
};

static PyType_Slot cache_slots[] = {
    {Py_tp_new, cache_new},
    {Py_tp_dealloc, cache_dealloc},
    {Py_tp_methods, cache_methods},
    {Py_tp_doc, "KVCache(model, dtype, page_size, max_tokens, write_buffer, host_bytes=0, spill_path=None, prefix_index=False, "
                "turn_keys=True, layer_dtypes=None, fixed_scales=None, window=0, sinks=0, page_tolerance=0.0)\n--\n\nA paged key/value "
                "cache shaped for a model."},
    {0, NULL},
};

PyType_Spec lco_py_cache_spec = {
    .name = "llmcoopt._core.KVCache",
    .basicsize = sizeof(cache_object),
    .flags = Py_TPFLAGS_DEFAULT | Py_TPFLAGS_IMMUTABLETYPE,
    .slots = cache_slots,
};

/* ---- Sequence ---- */

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
    free_object((PyObject *)self);
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

static PyObject *sequence_truncate(sequence_object *self, PyObject *arg)
{
    long long length = PyLong_AsLongLong(arg);
    if (length == -1 && PyErr_Occurred())
        return NULL;
    if (claim(self) != 0)
        return NULL;
    lco_error err;
    lco_status status;
    lco_seq *seq;
    LOCKED(self->cache->model, (seq = lco_py_sequence_nogil(self, &err)), status = lco_seq_truncate(seq, length, &err));
    self->busy--;
    if (status != LCO_OK)
        return lco_py_raise((PyObject *)self, &err);
    Py_RETURN_NONE;
}

static PyObject *sequence_hold(sequence_object *self, PyObject *arg)
{
    long long n = PyLong_AsLongLong(arg);
    if (n == -1 && PyErr_Occurred())
        return NULL;
    if (claim(self) != 0)
        return NULL;
    lco_error err;
    lco_status status;
    lco_seq *seq;
    LOCKED(self->cache->model, (seq = lco_py_sequence_nogil(self, &err)), status = lco_seq_hold(seq, n, &err));
    self->busy--;
    if (status != LCO_OK)
        return lco_py_raise((PyObject *)self, &err);
    Py_RETURN_NONE;
}

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
