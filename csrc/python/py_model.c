/* _core.Model: a model handle over borrowed weight buffers. */
#include <math.h>
#include <string.h>
#include <unistd.h>

#include "../base/qweight.h"
#include "dtypes.h"
#include "module.h"
#include "py_taps.h"

static const char *const ROPE_NAMES[] = {"default", "linear", "dynamic", "yarn", "llama3", "longrope"};

/* Index of `name` in a list, or -1. */
static int index_of(const char *name, const char *const *list, size_t n)
{
    for (size_t i = 0; i < n; i++)
        if (strcmp(name, list[i]) == 0)
            return (int)i;
    return -1;
}

/* ---- config: a dict whose keys are the fields of lco_model_config ---- */

typedef struct {
    PyObject *dict;
    bool failed;
} reader;

static PyObject *get(reader *r, const char *key)
{
    if (r->failed)
        return NULL;
    PyObject *value = PyDict_GetItemString(r->dict, key);
    if (value == NULL) {
        PyErr_Format(PyExc_KeyError, "config lacks '%s'", key);
        r->failed = true;
    }
    return value;
}

static double get_double(reader *r, const char *key)
{
    PyObject *value = get(r, key);
    double number = value != NULL ? PyFloat_AsDouble(value) : 0.0;
    r->failed |= PyErr_Occurred() != NULL;
    return number;
}

static long long get_int(reader *r, const char *key, long long limit)
{
    PyObject *value = get(r, key);
    long long number = value != NULL ? PyLong_AsLongLong(value) : 0;
    if (!PyErr_Occurred() && !r->failed && (number < 0 || number > limit))
        PyErr_Format(PyExc_ValueError, "config '%s' = %lld, expected 0 to %lld", key, number, limit);
    r->failed |= PyErr_Occurred() != NULL;
    return r->failed ? 0 : number;
}

/* A list of n numbers in arena memory; NULL for None. */
static void *get_list(reader *r, const char *key, Py_ssize_t n, bool integers, lco_arena *arena)
{
    PyObject *list = get(r, key);
    if (list == NULL || list == Py_None)
        return NULL;
    if (!PyList_Check(list) || PyList_Size(list) != n) {
        PyErr_Format(PyExc_ValueError, "config '%s': expected a list of %zd numbers", key, n);
        r->failed = true;
        return NULL;
    }
    void *out = lco_arena_take(arena, (size_t)n * sizeof(double) + 1);
    if (out == NULL)
        PyErr_NoMemory();
    for (Py_ssize_t i = 0; i < n && out != NULL; i++) {
        if (integers)
            ((int32_t *)out)[i] = (int32_t)PyLong_AsLong(PyList_GetItem(list, i));
        else
            ((double *)out)[i] = PyFloat_AsDouble(PyList_GetItem(list, i));
    }
    r->failed |= PyErr_Occurred() != NULL;
    return out;
}

static int read_rope(PyObject *dict, lco_rope_config *rope, int32_t head_dim, lco_arena *arena)
{
    reader r = {.dict = dict};
    PyObject *kind = get(&r, "kind");
    const char *name = kind != NULL ? PyUnicode_AsUTF8AndSize(kind, NULL) : NULL;
    int index = name != NULL ? index_of(name, ROPE_NAMES, sizeof ROPE_NAMES / sizeof ROPE_NAMES[0]) : -1;
    if (index < 0) {
        if (!PyErr_Occurred())
            PyErr_Format(PyExc_ValueError, "rope kind '%s' is unknown", name);
        return -1;
    }
    rope->kind = (lco_rope_kind)index;
    rope->theta = get_double(&r, "theta");
    rope->factor = get_double(&r, "factor");
    rope->original_max = get_double(&r, "original_max");
    rope->low_freq_factor = get_double(&r, "low_freq_factor");
    rope->high_freq_factor = get_double(&r, "high_freq_factor");
    rope->beta_fast = get_double(&r, "beta_fast");
    rope->beta_slow = get_double(&r, "beta_slow");
    rope->truncate = get_int(&r, "truncate", 1);
    rope->attention_factor = get_double(&r, "attention_factor");
    rope->short_factor = get_list(&r, "short_factor", head_dim / 2, false, arena);
    rope->long_factor = get_list(&r, "long_factor", head_dim / 2, false, arena);
    if (!r.failed && rope->kind == LCO_ROPE_LONGROPE && (rope->short_factor == NULL || rope->long_factor == NULL)) {
        PyErr_SetString(PyExc_ValueError, "longrope needs short_factor and long_factor");
        return -1;
    }
    return r.failed ? -1 : 0;
}

static int read_config(PyObject *dict, lco_model_config *config, lco_arena *arena)
{
    reader r = {.dict = dict};
    config->vocab_size = (int32_t)get_int(&r, "vocab_size", INT32_MAX);
    config->hidden_size = (int32_t)get_int(&r, "hidden_size", 1 << 24);
    config->intermediate_size = (int32_t)get_int(&r, "intermediate_size", 1 << 24);
    config->n_layers = (int32_t)get_int(&r, "n_layers", 1 << 16);
    config->n_heads = (int32_t)get_int(&r, "n_heads", 1 << 16);
    config->n_kv_heads = (int32_t)get_int(&r, "n_kv_heads", 1 << 16);
    config->head_dim = (int32_t)get_int(&r, "head_dim", 1 << 14);
    config->rms_norm_eps = get_double(&r, "rms_norm_eps");
    config->qk_norm = get_int(&r, "qk_norm", 1);
    config->tied_head = get_int(&r, "tied_head", 1);
    config->max_positions = get_int(&r, "max_positions", INT64_MAX / 4);
    config->window = get_list(&r, "window", config->n_layers, true, arena);
    PyObject *rope = get(&r, "rope");
    if (r.failed)
        return -1;
    if (!PyDict_Check(rope)) {
        PyErr_SetString(PyExc_TypeError, "config 'rope': expected a dict");
        return -1;
    }
    return read_rope(rope, &config->rope, config->head_dim, arena);
}

/* ---- tensors: a list of (name, buffer, dtype, shape) ---- */

/* A quantised weight: its header says the shape, which must be that of the tuple. */
static int read_quantized(model_object *self, lco_tensor *tensor, PyObject *buffer, PyObject *shape)
{
    lco_error err;
    Py_buffer *view = &self->buffers[self->n_buffers];
    if (PyObject_GetBuffer(buffer, view, PyBUF_SIMPLE) != 0)
        return -1;
    self->n_buffers++;
    const lco_qweight *q = tensor->data = view->buf;
    tensor->dtype = LCO_QUANTIZED;
    tensor->rank = 2;
    if (lco_qweight_check_bytes(q, (size_t)view->len, &err) != LCO_OK) {
        PyErr_Format(PyExc_ValueError, "tensor '%s': %s", tensor->name, err.text);
        return -1;
    }
    long long n, k;
    if (!PyArg_ParseTuple(shape, "LL:shape", &n, &k))
        return -1;
    tensor->shape[0] = n;
    tensor->shape[1] = k;
    if (tensor->shape[0] == q->n && tensor->shape[1] == q->k)
        return 0;
    PyErr_Format(PyExc_ValueError, "tensor '%s': shape [%lld, %lld] and a quantised weight of [%lld, %lld]", tensor->name, n, k,
                 (long long)q->n, (long long)q->k);
    return -1;
}

static int read_tensor(model_object *self, PyObject *item, lco_tensor *tensor)
{
    PyObject *buffer, *shape;
    const char *dtype;
    if (!PyTuple_Check(item)) {
        PyErr_SetString(PyExc_TypeError, "tensors: expected tuples of (name, buffer, dtype, shape)");
        return -1;
    }
    if (!PyArg_ParseTuple(item, "sOsO!", &tensor->name, &buffer, &dtype, &PyTuple_Type, &shape))
        return -1;
    Py_ssize_t rank = PyTuple_Size(shape);
    const bool quantized = strcmp(dtype, "quantized") == 0;
    if (!quantized && (!lco_py_dtype(dtype, &tensor->dtype) || lco_dtype_scaled(tensor->dtype) || rank > 4)) {
        PyErr_Format(PyExc_ValueError,
                     "tensor '%s': dtype '%s' and %zd dimensions; expected float32, float16, bfloat16 or quantized and at most 4",
                     tensor->name, dtype, rank);
        return -1;
    }
    if (quantized)
        return read_quantized(self, tensor, buffer, shape);
    tensor->rank = (int32_t)rank;
    size_t bytes = lco_dtype_bytes(tensor->dtype);
    for (Py_ssize_t i = 0; i < rank; i++) {
        tensor->shape[i] = PyLong_AsLongLong(PyTuple_GetItem(shape, i));
        if (PyErr_Occurred())
            return -1;
        if (tensor->shape[i] < 0 || !lco_mul(bytes, (size_t)tensor->shape[i], &bytes)) {
            PyErr_Format(PyExc_ValueError, "tensor '%s': dimension %zd is %lld", tensor->name, i, (long long)tensor->shape[i]);
            return -1;
        }
    }
    Py_buffer *view = &self->buffers[self->n_buffers];
    if (PyObject_GetBuffer(buffer, view, PyBUF_SIMPLE) != 0)
        return -1;
    self->n_buffers++;
    tensor->data = view->buf;
    if ((size_t)view->len == bytes && (uintptr_t)view->buf % lco_dtype_bytes(tensor->dtype) == 0)
        return 0;
    PyErr_Format(PyExc_ValueError,
                 "tensor '%s': a buffer of %zd bytes at address %p; its shape and dtype need %zu bytes, aligned to an element",
                 tensor->name, view->len, view->buf, bytes);
    return -1;
}

static int read_tensors(model_object *self, PyObject *list, lco_tensor **out)
{
    Py_ssize_t n = PyList_Size(list);
    self->buffers = PyMem_Calloc((size_t)n + 1, sizeof *self->buffers);
    *out = PyMem_Calloc((size_t)n + 1, sizeof **out);
    if (self->buffers == NULL || *out == NULL) {
        PyErr_NoMemory();
        return -1;
    }
    for (Py_ssize_t i = 0; i < n; i++)
        if (read_tensor(self, PyList_GetItem(list, i), &(*out)[i]) != 0)
            return -1;
    return 0;
}

static int model_create(model_object *self, PyObject *dict, PyObject *list, const lco_model_options *options)
{
    lco_tensor *tensors = NULL;
    lco_model_config config = {0};
    lco_error err;
    int result = -1;
    lco_arena *arena = lco_arena_create();
    if (arena == NULL) {
        PyErr_NoMemory();
        return -1;
    }
    if (read_config(dict, &config, arena) == 0 && read_tensors(self, list, &tensors) == 0) {
        lco_status status;
        lco_model *model;
        Py_BEGIN_ALLOW_THREADS;
        status = lco_model_create(&config, tensors, self->n_buffers, options, &model, &err);
        Py_END_ALLOW_THREADS;
        self->model = model;
        self->vocab_size = config.vocab_size;
        self->n_layers = config.n_layers;
        self->n_kv_heads = config.n_kv_heads;
        self->head_dim = config.head_dim;
        self->longest_window = status == LCO_OK ? lco_model_longest_window(model) : 0;
        result = status == LCO_OK ? 0 : -1;
        if (status != LCO_OK)
            lco_py_raise((PyObject *)self, &err);
    }
    PyMem_Free(tensors);
    lco_arena_destroy(arena);
    return result;
}

static PyObject *model_new(PyTypeObject *type, PyObject *args, PyObject *kwargs)
{
    static char *names[] = {"config", "tensors", "threads", "isa", "x_int8", NULL};
    PyObject *config, *tensors;
    lco_model_options options = {0};
    int x_int8 = 0;
    if (!PyArg_ParseTupleAndKeywords(args, kwargs, "O!O!|izp", names, &PyDict_Type, &config, &PyList_Type, &tensors, &options.threads,
                                     &options.isa, &x_int8))
        return NULL;
    options.x_int8 = x_int8;
    allocfunc alloc = (allocfunc)PyType_GetSlot(type, Py_tp_alloc);
    model_object *self = (model_object *)alloc(type, 0);
    if (self == NULL)
        return NULL;
    self->owner = getpid();
    self->lock = PyThread_allocate_lock();
    if (self->lock == NULL)
        PyErr_NoMemory();
    else if (model_create(self, config, tensors, &options) == 0)
        return (PyObject *)self;
    Py_DECREF(self);
    return NULL;
}

lco_model *lco_py_model_nogil(model_object *self, lco_error *err)
{
    lco_model *model = self->model;
    if (model == NULL)
        lco_fail(err, LCO_EINVAL, "this model is closed: close() was called, by this thread or another");
    return model;
}

static void model_release(model_object *self)
{
    lco_error err;
    lco_status status;
    lco_model *model = atomic_exchange(&self->model, NULL);
    if (model != NULL)
        LOCKED(self, true, lco_model_destroy(model));
    while (self->n_buffers > 0)
        PyBuffer_Release(&self->buffers[--self->n_buffers]);
}

static PyObject *model_close(model_object *self, PyObject *Py_UNUSED(arg))
{
    if (self->model != NULL) /* else another thread may be closing it and still wait for a call that reads the weights */
        model_release(self);
    Py_RETURN_NONE;
}

static void model_dealloc(model_object *self)
{
    PyTypeObject *type = Py_TYPE((PyObject *)self);
    model_release(self);
    PyMem_Free(self->buffers);
    if (self->lock != NULL)
        PyThread_free_lock(self->lock);
    freefunc release = (freefunc)PyType_GetSlot(type, Py_tp_free);
    release(self);
    Py_DECREF(type);
}

/* ---- forward ---- */

typedef struct {
    const int32_t *ids;
    int64_t n, rope_length;
    bool prompt, last_only;
    float *logits;        /* NULL: none asked */
    const lco_taps *taps; /* NULL: nobody looks */
} forward_call;

static lco_status nan_check(const float *logits, int64_t rows, int64_t vocab, int64_t first, lco_error *err)
{
    for (int64_t i = 0; i < rows; i++)
        for (int64_t j = 0; j < vocab; j++)
            if (isnan(logits[i * vocab + j]))
                return lco_fail(err, LCO_ENUMERIC,
                                "the logits at position %lld are NaN (token %lld): the weights or the cache hold NaN or infinity",
                                (long long)(first + i), (long long)j);
    return LCO_OK;
}

static lco_status forward_nogil(lco_model *model, lco_kv *kv, lco_seq *seq, const forward_call *call, lco_error *err)
{
    const int64_t pos = lco_seq_length(seq), last = call->n - 1, vocab = lco_model_get_config(model)->vocab_size;
    lco_kv_begin_step(kv);
    lco_status status = lco_seq_reserve(seq, call->n, err);
    if (status != LCO_OK)
        return status;
    if ((status = lco_seq_open(seq, call->n, err)) != LCO_OK) {
        (void)lco_seq_truncate(seq, pos, NULL);
        return status;
    }
    lco_item item = {.table = lco_seq_table(seq), .len = call->n, .pos = pos, .rope_length = call->rope_length, .prompt = call->prompt};
    item.tail = lco_seq_tail(seq);
    item.next_tail = lco_seq_next_tail(seq);
    lco_batch batch = {.ids = call->ids, .items = &item, .n_items = 1, .n_rows = call->n};
    if (call->logits == NULL || call->last_only) {
        batch.logit_rows = &last;
        batch.n_logits = call->logits != NULL;
    } else {
        batch.n_logits = call->n;
    }
    const lco_tap tap = {.see = lco_taps_see, .ctx = (void *)call->taps};
    batch.tap = call->taps != NULL ? &tap : NULL;
    status = lco_batch_check(model, kv, &batch, err);
    if (status == LCO_OK && call->taps != NULL)
        status = lco_taps_check(call->taps, lco_model_get_config(model), call->n, err);
    if (status == LCO_OK)
        status = lco_llama_forward(model, kv, &batch, call->logits, err);
    if (status == LCO_OK)
        status = lco_seq_lost(seq, err);
    if (status == LCO_OK && call->logits != NULL)
        status = nan_check(call->logits, batch.n_logits, vocab, pos + call->n - batch.n_logits, err);
    if (status == LCO_OK) {
        lco_seq_commit(seq, call->ids, call->n, call->prompt);
        if (lco_model_shares_prefixes(model))
            lco_seq_publish(seq);
    } else {
        lco_seq_truncate(seq, pos, NULL); /* returns the pages reserved for nothing */
    }
    return status;
}

static int get_logits(model_object *self, PyObject *out, const forward_call *call, Py_buffer *view)
{
    if (PyObject_GetBuffer(out, view, PyBUF_WRITABLE) != 0)
        return -1;
    Py_ssize_t expected = (Py_ssize_t)(call->last_only ? 1 : call->n) * self->vocab_size * 4;
    if (view->len == expected)
        return 0;
    PyErr_Format(lco_py_state((PyObject *)self)->errors[LCO_EINVAL], "logits: a buffer of %zd bytes, expected %zd", view->len, expected);
    PyBuffer_Release(view);
    return -1;
}

static PyObject *model_forward(model_object *self, PyObject *args, PyObject *kwargs)
{
    static char *names[] = {"sequence", "ids", "logits", "last_only", "rope_length", "prompt", "taps", NULL};
    PyObject *sequence, *ids_object, *out = Py_None, *taps_object = NULL;
    int last_only = 0, prompt = 1;
    long long rope_length = 0;
    core_state *state = lco_py_state((PyObject *)self);
    if (!PyArg_ParseTupleAndKeywords(args, kwargs, "O!O|OpLpO!", names, state->sequence_type, &sequence, &ids_object, &out, &last_only,
                                     &rope_length, &prompt, &PyList_Type, &taps_object))
        return NULL;
    sequence_object *seq = (sequence_object *)sequence;
    if (seq->cache->model != self || seq->busy) {
        PyErr_SetString(state->errors[LCO_EINVAL], seq->busy ? "sequence: a running generation or another thread uses it"
                                                             : "sequence: its cache belongs to another model");
        return NULL;
    }
    Py_buffer ids, logits = {0};
    if (lco_py_get_ids((PyObject *)self, ids_object, "ids", &ids) != 0)
        return NULL;
    forward_call call = {.ids = ids.buf, .n = ids.len / 4, .rope_length = rope_length, .prompt = prompt, .last_only = last_only};
    PyObject *result = NULL;
    lco_taps taps = {0};
    if (out != Py_None && get_logits(self, out, &call, &logits) != 0)
        goto done;
    call.logits = logits.buf;
    if (taps_object != NULL && lco_taps_take((PyObject *)self, taps_object, &taps) != 0)
        goto done;
    call.taps = taps_object != NULL ? &taps : NULL;
    lco_error err;
    lco_status status;
    lco_model *model;
    lco_seq *native;
    seq->busy++;
    LOCKED(self, (model = lco_py_model_nogil(self, &err)) && (native = lco_py_sequence_nogil(seq, &err)),
           status = forward_nogil(model, lco_seq_cache(native), native, &call, &err));
    seq->busy--;
    result = status == LCO_OK ? Py_NewRef(Py_None) : lco_py_raise((PyObject *)self, &err);
done:
    lco_taps_release(&taps);
    if (logits.obj != NULL)
        PyBuffer_Release(&logits);
    PyBuffer_Release(&ids);
    return result;
}

static PyObject *model_info(model_object *self, PyObject *Py_UNUSED(arg))
{
    lco_error err;
    lco_status status;
    lco_model *model;
    const lco_ops *ops = NULL;
    int threads = 0;
    size_t scratch = 0;
    LOCKED(self, (model = lco_py_model_nogil(self, &err)),
           (ops = lco_model_ops(model), threads = lco_model_threads(model), scratch = lco_model_scratch_bytes(model)));
    if (status != LCO_OK)
        return lco_py_raise((PyObject *)self, &err);
    return Py_BuildValue("{s:s,s:s,s:i,s:n}", "isa", ops->name, "isa_detail", ops->detail, "threads", threads, "scratch_bytes",
                         (Py_ssize_t)scratch);
}

static PyMethodDef methods[] = {
    {"forward", (PyCFunction)(void (*)(void))model_forward, METH_VARARGS | METH_KEYWORDS,
     "forward(sequence, ids, logits=None, last_only=False, rope_length=0, prompt=True, taps=[])\n--\n\n"
     "Compute int32 ids after what the sequence holds, append them, and write float32 logits [n, vocab] (or [vocab] when last_only).\n"
     "taps: a list of (point, layer, float32 array [n, width]) that activations are copied into."},
    {"info", (PyCFunction)(void (*)(void))model_info, METH_NOARGS, "info()\n--\n\nInstruction set, threads and scratch bytes."},
    {"close", (PyCFunction)(void (*)(void))model_close, METH_NOARGS, "close()\n--\n\nStop the threads and release the weights."},
    {NULL, NULL, 0, NULL},
};

static PyType_Slot slots[] = {
    {Py_tp_new, model_new},
    {Py_tp_dealloc, model_dealloc},
    {Py_tp_methods, methods},
    {Py_tp_doc, "Model(config, tensors, threads=0, isa=None, x_int8=False)\n--\n\nA model over weight buffers, which it keeps alive."},
    {0, NULL},
};

PyType_Spec lco_py_model_spec = {
    .name = "llmcoopt._core.Model",
    .basicsize = sizeof(model_object),
    .flags = Py_TPFLAGS_DEFAULT | Py_TPFLAGS_IMMUTABLETYPE,
    .slots = slots,
};
