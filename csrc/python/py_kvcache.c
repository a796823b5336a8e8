/* _core.KVCache. Its sequences are in py_sequence.c. */
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

void lco_py_free_object(PyObject *self)
{
    PyTypeObject *type = Py_TYPE((PyObject *)self);
    freefunc release = (freefunc)PyType_GetSlot(type, Py_tp_free);
    release(self);
    Py_DECREF(type);
}

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
                            "fixed_scales", "window",     "sinks",        "page_tolerance", "residual",
                            "n_first",      NULL};
    core_state *state = PyType_GetModuleState(type);
    PyObject *model, *layer_dtypes = Py_None, *fixed_scales = Py_None;
    Py_buffer scales = {0};
    const char *dtype;
    int page_size, write_buffer, prefix_index = 0, turn_keys = 1, residual = 0, n_first = 0;
    long long max_tokens, host_bytes = 0, window = 0, sinks = 0;
    const char *spill_path = NULL;
    double tolerance = 0;
    if (!PyArg_ParseTupleAndKeywords(args, kwargs, "O!siLp|LzppOOLLdii", names, state->model_type, &model, &dtype, &page_size, &max_tokens,
                                     &write_buffer, &host_bytes, &spill_path, &prefix_index, &turn_keys, &layer_dtypes, &fixed_scales,
                                     &window, &sinks, &tolerance, &residual, &n_first))
        return NULL;
    const model_object *owner = (model_object *)model;
    lco_kv_options options = {.n_layers = owner->n_layers,
                              .n_kv_heads = owner->n_kv_heads,
                              .head_dim = owner->head_dim,
                              .page_size = page_size,
                              .write_buffer = write_buffer,
                              .residual = residual,
                              .n_first = n_first,
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
    lco_py_free_object((PyObject *)self);
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

static sequence_object *new_sequence(cache_object *self)
{
    core_state *state = lco_py_state((PyObject *)self);
    allocfunc alloc = (allocfunc)PyType_GetSlot(state->sequence_type, Py_tp_alloc);
    sequence_object *seq = (sequence_object *)alloc(state->sequence_type, 0);
    if (seq == NULL)
        return NULL;
    Py_INCREF((PyObject *)self);
    seq->cache = self;
    return seq;
}

static PyObject *cache_sequence(cache_object *self, PyObject *Py_UNUSED(arg))
{
    sequence_object *seq = new_sequence(self);
    if (seq == NULL)
        return NULL;
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
        COUNT(pages_left_out), COUNT(bounds_bytes),    COUNT(first_bytes),
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
    return lco_py_none((PyObject *)self, status, &err);
}

static PyObject *cache_reset_counters(cache_object *self, PyObject *Py_UNUSED(arg))
{
    lco_error err;
    lco_status status;
    lco_kv *kv;
    LOCKED(self->model, (kv = lco_py_cache_nogil(self, &err)), lco_kv_reset_counters(kv));
    return lco_py_none((PyObject *)self, status, &err);
}

static PyObject *cache_page_out(cache_object *self, PyObject *args)
{
    int page;
    Py_buffer bytes;
    PyObject *object;
    if (!PyArg_ParseTuple(args, "iO:page_out", &page, &object) || PyObject_GetBuffer(object, &bytes, PyBUF_WRITABLE) != 0)
        return NULL;
    lco_error err;
    lco_status status;
    lco_kv *kv;
    LOCKED(self->model, (kv = lco_py_cache_nogil(self, &err)),
           status = (size_t)bytes.len == lco_kv_views(kv)->page_bytes
                        ? lco_kv_page_out(kv, page, bytes.buf, &err)
                        : lco_fail(&err, LCO_EINVAL, "a buffer of %lld bytes, expected a page's", (long long)bytes.len));
    PyBuffer_Release(&bytes);
    return lco_py_none((PyObject *)self, status, &err);
}

static PyObject *cache_page_in(cache_object *self, PyObject *object)
{
    Py_buffer bytes;
    if (PyObject_GetBuffer(object, &bytes, PyBUF_SIMPLE) != 0)
        return NULL;
    lco_error err;
    lco_status status;
    lco_kv *kv;
    int32_t page = 0;
    LOCKED(self->model, (kv = lco_py_cache_nogil(self, &err)),
           status = (size_t)bytes.len == lco_kv_views(kv)->page_bytes
                        ? lco_kv_page_in(kv, bytes.buf, &page, &err)
                        : lco_fail(&err, LCO_EINVAL, "a buffer of %lld bytes, expected a page's", (long long)bytes.len));
    PyBuffer_Release(&bytes);
    return status == LCO_OK ? PyLong_FromLong(page) : lco_py_raise((PyObject *)self, &err);
}

/* The first tokens of a page, out of the cache or into it. */
static PyObject *move_first(cache_object *self, PyObject *args, bool in)
{
    int page;
    Py_buffer bytes;
    PyObject *object;
    if (!PyArg_ParseTuple(args, "iO:first", &page, &object) || PyObject_GetBuffer(object, &bytes, in ? PyBUF_SIMPLE : PyBUF_WRITABLE) != 0)
        return NULL;
    lco_error err;
    lco_status status;
    lco_kv *kv;
    LOCKED(self->model, (kv = lco_py_cache_nogil(self, &err)),
           status = (size_t)bytes.len != lco_kv_first_bytes(kv)
                        ? lco_fail(&err, LCO_EFORMAT, "the first tokens of a text in %lld bytes, expected %zu", (long long)bytes.len,
                                   lco_kv_first_bytes(kv))
                    : in ? lco_kv_first_in(kv, page, bytes.buf, &err)
                         : lco_kv_first_out(kv, page, bytes.buf, &err));
    PyBuffer_Release(&bytes);
    return lco_py_none((PyObject *)self, status, &err);
}

static PyObject *cache_first_out(cache_object *self, PyObject *args) { return move_first(self, args, false); }

static PyObject *cache_first_in(cache_object *self, PyObject *args) { return move_first(self, args, true); }

static PyObject *cache_buffer(cache_object *self, PyObject *Py_UNUSED(arg))
{
    lco_error err;
    lco_status status;
    lco_kv *kv;
    int residual = 0;
    Py_ssize_t first_bytes = 0;
    LOCKED(self->model, (kv = lco_py_cache_nogil(self, &err)),
           (residual = lco_kv_get_options(kv)->residual, first_bytes = (Py_ssize_t)lco_kv_first_bytes(kv)));
    return status == LCO_OK ? Py_BuildValue("in", residual, first_bytes) : lco_py_raise((PyObject *)self, &err);
}

static PyObject *cache_page_drop(cache_object *self, PyObject *args)
{
    int page;
    if (!PyArg_ParseTuple(args, "i:page_drop", &page))
        return NULL;
    lco_error err;
    lco_status status;
    lco_kv *kv;
    LOCKED(self->model, (kv = lco_py_cache_nogil(self, &err)), status = lco_kv_page_drop(kv, page, &err));
    return lco_py_none((PyObject *)self, status, &err);
}

static PyObject *cache_restore(cache_object *self, PyObject *args)
{
    lco_seq_image image = {0};
    long long length, exact, unseen;
    Py_buffer ids, table, tail;
    if (!PyArg_ParseTuple(args, "LLLy*y*y*:restore", &length, &exact, &unseen, &ids, &table, &tail))
        return NULL;
    image = (lco_seq_image){.length = length, .exact = exact, .unseen = unseen, .n_pages = table.len / 4};
    image.ids = ids.buf;
    image.table = table.buf;
    image.tail = tail.buf;
    image.tail_bytes = (size_t)tail.len;
    lco_error err;
    lco_status status = LCO_OK;
    lco_kv *kv;
    lco_seq *native = NULL;
    sequence_object *seq = new_sequence(self);
    Py_ssize_t known = 0; /* ids that the model has, or -1: not told */
    while (known < ids.len / 4 && image.ids[known] >= -1 && image.ids[known] < self->model->vocab_size)
        known++;
    if (seq != NULL && length != ids.len / 4)
        status = lco_fail(&err, LCO_EFORMAT, "%lld tokens with %lld ids", length, (long long)(ids.len / 4));
    else if (seq != NULL && known < length)
        status = lco_fail(&err, LCO_EFORMAT, "id %d of a sequence, expected one in [0, %d) (vocab_size)", image.ids[known],
                          self->model->vocab_size);
    else if (seq != NULL)
        LOCKED(self->model, (kv = lco_py_cache_nogil(self, &err)), status = lco_seq_from_image(kv, &image, &native, &err));
    PyBuffer_Release(&tail);
    PyBuffer_Release(&table);
    PyBuffer_Release(&ids);
    if (seq == NULL)
        return NULL;
    seq->seq = native;
    if (status == LCO_OK)
        return (PyObject *)seq;
    lco_py_raise((PyObject *)self, &err);
    Py_DECREF(seq);
    return NULL;
}

static PyObject *cache_check(cache_object *self, PyObject *Py_UNUSED(arg))
{
    lco_error err;
    lco_status status;
    lco_kv *kv;
    LOCKED(self->model, (kv = lco_py_cache_nogil(self, &err)), status = lco_kv_check(kv, &err));
    return lco_py_none((PyObject *)self, status, &err);
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
    {"page_out", (PyCFunction)(void (*)(void))cache_page_out, METH_VARARGS,
     "page_out(page, buffer)\n--\n\nCopy a page's bytes into a buffer of page_bytes."},
    {"page_in", (PyCFunction)(void (*)(void))cache_page_in, METH_O,
     "page_in(bytes)\n--\n\nA page with these bytes, held until page_drop(); returns its number."},
    {"first_out", (PyCFunction)(void (*)(void))cache_first_out, METH_VARARGS,
     "first_out(page, buffer)\n--\n\nCopy what lies beside a page that a text begins with into a buffer of buffer()[1] bytes."},
    {"first_in", (PyCFunction)(void (*)(void))cache_first_in, METH_VARARGS,
     "first_in(page, bytes)\n--\n\nA text begins with this page of page_in(), and these bytes lie beside it."},
    {"buffer", (PyCFunction)(void (*)(void))cache_buffer, METH_NOARGS,
     "buffer()\n--\n\n(tokens of a stretch, bytes beside a page that a text begins with)."},
    {"page_drop", (PyCFunction)(void (*)(void))cache_page_drop, METH_VARARGS, "page_drop(page)\n--\n\nGive back a page of page_in()."},
    {"restore", (PyCFunction)(void (*)(void))cache_restore, METH_VARARGS,
     "restore(length, exact, unseen, ids, table, tail)\n--\n\nA sequence as Sequence.image() gave it, on pages of page_in()."},
    {"check", (PyCFunction)(void (*)(void))cache_check, METH_NOARGS,
     "check()\n--\n\nProve the cache's invariants; FormatError names the first that fails."},
    {"close", (PyCFunction)(void (*)(void))cache_close, METH_NOARGS, "close()\n--\n\nGive all memory back; sequences of this cache end."},
    {NULL, NULL, 0, NULL},
};

static PyType_Slot cache_slots[] = {
    {Py_tp_new, cache_new},
    {Py_tp_dealloc, cache_dealloc},
    {Py_tp_methods, cache_methods},
    {Py_tp_doc,
     "KVCache(model, dtype, page_size, max_tokens, write_buffer, host_bytes=0, spill_path=None, prefix_index=False, "
     "turn_keys=True, layer_dtypes=None, fixed_scales=None, window=0, sinks=0, page_tolerance=0.0, residual=0, n_first=0)\n--\n\n"
     "A paged key/value cache shaped for a model."},
    {0, NULL},
};

PyType_Spec lco_py_cache_spec = {
    .name = "llmcoopt._core.KVCache",
    .basicsize = sizeof(cache_object),
    .flags = Py_TPFLAGS_DEFAULT | Py_TPFLAGS_IMMUTABLETYPE,
    .slots = cache_slots,
};
