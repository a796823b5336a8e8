/* One operator at a time on the caller's buffers. Everything an op only asserts is checked here, since Python reaches it. */
#include "../base/mem.h"
#include "../base/qweight.h"
#include "ops_args.h"

PyDoc_STRVAR(embed_doc,
             "embed(out, ids, table, dtype)\n--\n\n"
             "out[m, k] float32 = rows ids[m] (int32) of table[n, k] (dtype: 'float32', or uint16 bits of 'float16', 'bfloat16'), or of a\n"
             "'quantized' weight of pack_begin().");

static bool check_width(int64_t found, const char *name, int64_t expected)
{
    if (found != expected)
        PyErr_Format(PyExc_ValueError, "axis 1 of %s is %lld, expected %lld", name, (long long)found, (long long)expected);
    return found == expected;
}

/* A weight matrix of any type: float rows, or the bytes of a quantised one. Its place, n and k; false with an exception. */
typedef struct {
    const void *data;
    lco_dtype dtype;
    int64_t n, k;
} matrix;

static bool take_matrix(bag *b, PyObject *object, const char *name, const char *dtype_name, matrix *out)
{
    const Py_buffer *v;
    lco_error err = {0};
    if (strcmp(dtype_name, "quantized") != 0) {
        if (!parse_dtype(dtype_name, &out->dtype) || (v = take(b, object, name, format_of(out->dtype), 2, READ)) == NULL ||
            !check_packed(v, name))
            return false;
        out->data = v->buf;
        out->n = v->shape[0];
        out->k = v->shape[1];
        return true;
    }
    if ((v = take(b, object, name, "B", 1, READ)) == NULL)
        return false;
    if (lco_qweight_check_bytes(v->buf, (size_t)v->len, &err) != LCO_OK) {
        PyErr_Format(PyExc_ValueError, "%s: %s", name, err.text);
        return false;
    }
    out->data = v->buf;
    out->dtype = LCO_QUANTIZED;
    out->n = ((const lco_qweight *)v->buf)->n;
    out->k = ((const lco_qweight *)v->buf)->k;
    return true;
}

static PyObject *context_embed(PyObject *object, PyObject *args, PyObject *kw)
{
    OpContext *self = (OpContext *)object;
    PyThreadState *state;
    PyObject *result = NULL;
    static const char *const names[] = {"out", "ids", "table", "dtype", NULL};
    PyObject *out_o, *ids_o, *table_o;
    const char *dtype_name;
    lco_embed_args a = {.exec = &self->exec};
    bag b = {.n = 0};
    matrix table;
    const Py_buffer *out, *ids;
    if (!PyArg_ParseTupleAndKeywords(args, kw, "OOOs:embed", (char **)names, &out_o, &ids_o, &table_o, &dtype_name))
        return NULL;
    if ((out = take(&b, out_o, "out", "f", 2, WRITE)) == NULL || (ids = take(&b, ids_o, "ids", "i", 1, READ)) == NULL ||
        !take_matrix(&b, table_o, "table", dtype_name, &table) || !check_axis(out, "out", 0, ids->shape[0]) ||
        !check_axis(out, "out", 1, table.k) || !check_packed(out, "out") || !check_packed(ids, "ids"))
        goto done;
    a.ids = ids->buf;
    a.m = ids->shape[0];
    for (int64_t i = 0; i < a.m; i++)
        if (!check(a.ids[i] >= 0 && a.ids[i] < table.n, "an element of ids", a.ids[i], "a row of table"))
            goto done;
    a.out = out->buf;
    a.table = table.data;
    a.dtype = table.dtype;
    a.k = table.k;
    if ((state = enter(self)) != NULL)
        result = leave(self, state, self->ops->embed(&a));
done:
    bag_release(&b);
    return result;
}

PyDoc_STRVAR(rmsnorm_doc, "rmsnorm(out, x, weight, eps)\n--\n\n"
                          "out[m, k] = x[m, k] / sqrt(mean(x^2) + eps) * weight[k], all float32; rows may be strided; out may be x.");

static PyObject *context_rmsnorm(PyObject *object, PyObject *args, PyObject *kw)
{
    OpContext *self = (OpContext *)object;
    PyThreadState *state;
    PyObject *result = NULL;
    static const char *const names[] = {"out", "x", "weight", "eps", NULL};
    PyObject *out_o, *x_o, *weight_o;
    lco_rmsnorm_args a = {.exec = &self->exec};
    bag b = {.n = 0};
    const Py_buffer *out, *x, *weight;
    if (!PyArg_ParseTupleAndKeywords(args, kw, "OOOf:rmsnorm", (char **)names, &out_o, &x_o, &weight_o, &a.eps))
        return NULL;
    if ((out = take(&b, out_o, "out", "f", 2, WRITE)) == NULL || (x = take(&b, x_o, "x", "f", 2, READ)) == NULL ||
        (weight = take(&b, weight_o, "weight", "f", 1, READ)) == NULL || !check_axis(out, "out", 0, x->shape[0]) ||
        !check_axis(out, "out", 1, x->shape[1]) || !check_axis(weight, "weight", 0, x->shape[1]) || !check_packed(weight, "weight"))
        goto done;
    a.out = out->buf;
    a.x = x->buf;
    a.weight = weight->buf;
    a.m = x->shape[0];
    a.k = x->shape[1];
    a.ld_out = row_stride(out);
    a.ld_x = row_stride(x);
    if ((state = enter(self)) != NULL)
        result = leave(self, state, self->ops->rmsnorm(&a));
done:
    bag_release(&b);
    return result;
}

/* One (out, w, dtype, bias or None) of linear, or of linear_quantized. */
static bool take_part(bag *b, PyObject *item, lco_linear_part *part, int64_t m, int64_t k, bool quantized)
{
    PyObject *out_o, *w_o, *bias_o = Py_None;
    const char *dtype_name;
    const Py_buffer *out, *bias;
    matrix w;
    if (!PyTuple_Check(item)) {
        PyErr_SetString(PyExc_TypeError, "each part is a tuple (out, w, dtype, bias or None)");
        return false;
    }
    if (!PyArg_ParseTuple(item, "OOs|O:part", &out_o, &w_o, &dtype_name, &bias_o))
        return false;
    if (quantized != (strcmp(dtype_name, "quantized") == 0)) {
        PyErr_Format(PyExc_ValueError, "dtype = '%s', expected %s", dtype_name, quantized ? "quantized" : "float32, float16 or bfloat16");
        return false;
    }
    if ((out = take(b, out_o, "out", "f", 2, WRITE)) == NULL || !take_matrix(b, w_o, "w", dtype_name, &w) || !check_width(w.k, "w", k) ||
        !check_axis(out, "out", 0, m) || !check_axis(out, "out", 1, w.n))
        return false;
    if (bias_o != Py_None) {
        if ((bias = take(b, bias_o, "bias", "f", 1, READ)) == NULL || !check_axis(bias, "bias", 0, w.n) || !check_packed(bias, "bias"))
            return false;
        part->bias = bias->buf;
    }
    part->out = out->buf;
    part->ld_out = row_stride(out);
    part->w = w.data;
    part->dtype = w.dtype;
    part->n = w.n;
    return true;
}

PyDoc_STRVAR(linear_doc,
             "linear(x, parts, m_prompt=0, accumulate=False)\n--\n\n"
             "For each (out, w, dtype, bias or None) of parts (1 to 3): out[m, n] = x[m, k] @ w[n, k].T (+ bias[n]) (+ out when\n"
             "accumulate). x, out and bias are float32, rows of x and out may be strided; rows [0, m_prompt) are prompt rows.");

/* x, the parts and the sizes of either. */
static bool take_linear(bag *b, lco_linear_args *a, PyObject *x_o, PyObject *parts_o, long long m_prompt, int accumulate, bool quantized)
{
    const Py_buffer *x;
    if ((x = take(b, x_o, "x", "f", 2, READ)) == NULL ||
        !check(PyList_Size(parts_o) >= 1 && PyList_Size(parts_o) <= LCO_LINEAR_PARTS, "the length of parts", PyList_Size(parts_o),
               "1 to 3") ||
        !check(m_prompt >= 0 && m_prompt <= x->shape[0], "m_prompt", m_prompt, "0 to the rows of x"))
        return false;
    a->x = x->buf;
    a->m = x->shape[0];
    a->k = x->shape[1];
    a->ld_x = row_stride(x);
    a->m_prompt = m_prompt;
    a->accumulate = accumulate;
    a->n_parts = (int)PyList_Size(parts_o);
    for (int p = 0; p < a->n_parts; p++)
        if (!take_part(b, PyList_GetItem(parts_o, p), &a->part[p], a->m, a->k, quantized))
            return false;
    return true;
}

static PyObject *context_linear(PyObject *object, PyObject *args, PyObject *kw)
{
    OpContext *self = (OpContext *)object;
    PyThreadState *state;
    PyObject *result = NULL;
    static const char *const names[] = {"x", "parts", "m_prompt", "accumulate", NULL};
    PyObject *x_o, *parts_o;
    long long m_prompt = 0;
    int accumulate = 0;
    lco_linear_args a = {.exec = &self->exec};
    bag b = {.n = 0};
    if (!PyArg_ParseTupleAndKeywords(args, kw, "OO!|Lp:linear", (char **)names, &x_o, &PyList_Type, &parts_o, &m_prompt, &accumulate))
        return NULL;
    if (take_linear(&b, &a, x_o, parts_o, m_prompt, accumulate, false) && (state = enter(self)) != NULL)
        result = leave(self, state, self->ops->linear(&a));
    bag_release(&b);
    return result;
}

PyDoc_STRVAR(
    linear_quantized_doc,
    "linear_quantized(x, parts, m_prompt=0, accumulate=False, x_int8=False)\n--\n\n"
    "linear for parts (out, w, 'quantized', bias or None), w being uint8 as pack_begin() and pack_rows() fill it. x_int8: x is rounded to\n"
    "8 bits, in place of 16.");

static PyObject *context_linear_quantized(PyObject *object, PyObject *args, PyObject *kw)
{
    OpContext *self = (OpContext *)object;
    PyThreadState *state;
    PyObject *result = NULL;
    static const char *const names[] = {"x", "parts", "m_prompt", "accumulate", "x_int8", NULL};
    PyObject *x_o, *parts_o;
    long long m_prompt = 0;
    int accumulate = 0, x_int8 = 0;
    bag b = {.n = 0};
    if (!PyArg_ParseTupleAndKeywords(args, kw, "OO!|Lpp:linear_quantized", (char **)names, &x_o, &PyList_Type, &parts_o, &m_prompt,
                                     &accumulate, &x_int8))
        return NULL;
    lco_linear_args a = {.exec = &self->exec, .x_int8 = x_int8};
    if (take_linear(&b, &a, x_o, parts_o, m_prompt, accumulate, true) && (state = enter(self)) != NULL)
        result = leave(self, state, self->ops->linear_quantized(&a));
    bag_release(&b);
    return result;
}

PyDoc_STRVAR(
    mlp_doc,
    "mlp(x, gate, up, down, m_prompt=0, accumulate=False)\n--\n\n"
    "Parts as linear takes them: down's out[m, k] = (silu(x @ gate.T) * (x @ up.T)) @ down.T (+ out when accumulate), with biases;\n"
    "gate's and up's out[m, n] are scratch, contiguous.");

static PyObject *context_mlp(PyObject *object, PyObject *args, PyObject *kw)
{
    OpContext *self = (OpContext *)object;
    PyThreadState *state;
    PyObject *result = NULL;
    static const char *const names[] = {"x", "gate", "up", "down", "m_prompt", "accumulate", NULL};
    PyObject *x_o, *parts[3];
    long long m_prompt = 0;
    int accumulate = 0;
    bag b = {.n = 0};
    const Py_buffer *x;
    if (!PyArg_ParseTupleAndKeywords(args, kw, "OOOO|Lp:mlp", (char **)names, &x_o, &parts[0], &parts[1], &parts[2], &m_prompt,
                                     &accumulate))
        return NULL;
    lco_mlp_args a = {.in = {.exec = &self->exec, .n_parts = 2}, .out = {.exec = &self->exec, .n_parts = 1, .accumulate = accumulate}};
    if ((x = take(&b, x_o, "x", "f", 2, READ)) == NULL ||
        !check(m_prompt >= 0 && m_prompt <= x->shape[0], "m_prompt", m_prompt, "0 to the rows of x"))
        goto done;
    a.in.x = x->buf;
    a.in.m = a.out.m = x->shape[0];
    a.in.m_prompt = a.out.m_prompt = m_prompt;
    a.in.k = x->shape[1];
    a.in.ld_x = row_stride(x);
    if (!take_part(&b, parts[0], &a.in.part[0], a.in.m, a.in.k, false) || !take_part(&b, parts[1], &a.in.part[1], a.in.m, a.in.k, false) ||
        !check(a.in.part[1].n == a.in.part[0].n, "the width of up", a.in.part[1].n, "the width of gate") ||
        !check(a.in.part[0].ld_out == a.in.part[0].n && a.in.part[1].ld_out == a.in.part[1].n, "the width of gate", a.in.part[0].n,
               "contiguous rows of gate and up") ||
        !take_part(&b, parts[2], &a.out.part[0], a.in.m, a.in.part[0].n, false))
        goto done;
    a.out.x = a.in.part[0].out;
    a.out.k = a.out.ld_x = a.in.part[0].n;
    if ((state = enter(self)) != NULL)
        result = leave(self, state, self->ops->mlp(&a));
done:
    bag_release(&b);
    return result;
}

PyDoc_STRVAR(swiglu_doc, "swiglu(out, gate, up)\n--\n\nout = silu(gate) * up, all float32 [m, n] and contiguous; out may be gate or up.");

static PyObject *context_swiglu(PyObject *object, PyObject *args, PyObject *kw)
{
    OpContext *self = (OpContext *)object;
    PyThreadState *state;
    PyObject *result = NULL;
    static const char *const names[] = {"out", "gate", "up", NULL};
    PyObject *given[3];
    lco_swiglu_args a = {.exec = &self->exec};
    bag b = {.n = 0};
    const Py_buffer *view[3];
    if (!PyArg_ParseTupleAndKeywords(args, kw, "OOO:swiglu", (char **)names, &given[0], &given[1], &given[2]))
        return NULL;
    for (int i = 0; i < 3; i++)
        if ((view[i] = take(&b, given[i], names[i], "f", 2, i == 0 ? WRITE : READ)) == NULL ||
            !check_axis(view[i], names[i], 0, view[0]->shape[0]) || !check_axis(view[i], names[i], 1, view[0]->shape[1]) ||
            !check_packed(view[i], names[i]))
            goto done;
    a.out = view[0]->buf;
    a.gate = view[1]->buf;
    a.up = view[2]->buf;
    a.m = view[0]->shape[0];
    a.n = view[0]->shape[1];
    if ((state = enter(self)) != NULL)
        result = leave(self, state, self->ops->swiglu(&a));
done:
    bag_release(&b);
    return result;
}

static PyObject *context_new(PyTypeObject *type, PyObject *args, PyObject *kw)
{
    static const char *const names[] = {"isa", "threads", NULL};
    const char *isa = NULL;
    int threads = 1;
    lco_error err = {0};
    if (!PyArg_ParseTupleAndKeywords(args, kw, "|zi:OpContext", (char **)names, &isa, &threads))
        return NULL;
    allocfunc alloc = (allocfunc)PyType_GetSlot(type, Py_tp_alloc);
    OpContext *self = (OpContext *)alloc(type, 0);
    if (self == NULL)
        return NULL;
    if (lco_ops_select(isa, &self->ops, &err) != LCO_OK || lco_pool_create(threads, &self->pool, &err) != LCO_OK) {
        PyErr_SetString(err.code == LCO_ENOMEM ? PyExc_MemoryError : PyExc_ValueError, err.text);
        Py_DECREF(self);
        return NULL;
    }
    self->exec = (lco_exec){.pool = self->pool, .scratch = lco_arena_create()};
    if (self->exec.scratch == NULL) {
        Py_DECREF(self);
        return PyErr_NoMemory();
    }
    return (PyObject *)self;
}

static void context_dealloc(PyObject *object)
{
    OpContext *self = (OpContext *)object;
    PyTypeObject *type = Py_TYPE(object);
    lco_arena_destroy(self->exec.scratch);
    lco_pool_destroy(self->pool);
    ((freefunc)PyType_GetSlot(type, Py_tp_free))(object);
    Py_DECREF(type);
}

static PyObject *context_name(PyObject *self, void *closure)
{
    (void)closure;
    return PyUnicode_FromString(((OpContext *)self)->ops->name);
}

static PyObject *context_detail(PyObject *self, void *closure)
{
    (void)closure;
    return PyUnicode_FromString(((OpContext *)self)->ops->detail);
}

static PyObject *context_threads(PyObject *self, void *closure)
{
    (void)closure;
    return PyLong_FromLong(lco_pool_size(((OpContext *)self)->pool));
}

#define METHOD(op) {#op, (PyCFunction)(void (*)(void))context_##op, METH_VARARGS | METH_KEYWORDS, op##_doc}
static const PyMethodDef CONTEXT_METHODS[] = {
    METHOD(embed),
    METHOD(rmsnorm),
    METHOD(linear),
    METHOD(linear_quantized),
    METHOD(swiglu),
    METHOD(mlp),
    {"rope_append", (PyCFunction)(void (*)(void))lco_py_rope_append, METH_VARARGS | METH_KEYWORDS, lco_py_rope_append_doc},
    {"attention", (PyCFunction)(void (*)(void))lco_py_attention, METH_VARARGS | METH_KEYWORDS, lco_py_attention_doc},
    {"choose_pages", (PyCFunction)(void (*)(void))lco_py_choose_pages, METH_VARARGS | METH_KEYWORDS, lco_py_choose_pages_doc},
    {"hessian_add", (PyCFunction)(void (*)(void))lco_py_hessian_add, METH_VARARGS | METH_KEYWORDS, lco_py_hessian_add_doc},
    {"inverse_factor", (PyCFunction)(void (*)(void))lco_py_inverse_factor, METH_VARARGS | METH_KEYWORDS, lco_py_inverse_factor_doc},
    {"sweep_block", (PyCFunction)(void (*)(void))lco_py_sweep_block, METH_VARARGS | METH_KEYWORDS, lco_py_sweep_block_doc},
    {NULL, NULL, 0, NULL}};

static const PyGetSetDef CONTEXT_GETSET[] = {
    {"name", context_name, NULL, "Instruction set: 'ref', 'avx2', 'avx512' or 'amx'.", NULL},
    {"detail", context_detail, NULL, "CPU features in use.", NULL},
    {"threads", context_threads, NULL, "Number of threads, the caller included.", NULL},
    {NULL, NULL, NULL, NULL, NULL},
};

PyDoc_STRVAR(context_doc,
             "OpContext(isa=None, threads=1)\n--\n\n"
             "Single operators of one instruction set, for tests and benchmarks. isa None: the best of this CPU; threads 0: one per CPU.\n"
             "Shapes come from the buffers; ValueError says which argument does not fit.");

PyDoc_STRVAR(isas_doc, "isas()\n--\n\nNames of the instruction sets that this machine can run, best last.");

static PyObject *module_isas(PyObject *module, PyObject *unused)
{
    (void)module, (void)unused;
    const char *names[8];
    int n = lco_ops_available(names, 8);
    PyObject *list = PyList_New(0);
    for (int i = 0; list != NULL && i < n && i < 8; i++) {
        PyObject *name = PyUnicode_FromString(names[i]);
        if (name == NULL || PyList_Append(list, name) < 0)
            Py_CLEAR(list);
        Py_XDECREF(name);
    }
    return list;
}

int lco_py_add_ops(PyObject *module)
{
    static const PyMethodDef functions[] = {{"isas", module_isas, METH_NOARGS, isas_doc}, {NULL, NULL, 0, NULL}};
    PyType_Slot slots[] = {
        {Py_tp_new, context_new},
        {Py_tp_dealloc, context_dealloc},
        {Py_tp_methods, (void *)CONTEXT_METHODS},
        {Py_tp_getset, (void *)CONTEXT_GETSET},
        {Py_tp_doc, (void *)context_doc},
        {0, NULL},
    };
    PyType_Spec spec = {.name = "llmcoopt._core.OpContext", .basicsize = sizeof(OpContext), .flags = Py_TPFLAGS_DEFAULT, .slots = slots};
    if (PyModule_AddFunctions(module, (PyMethodDef *)functions) < 0)
        return -1;
    PyObject *type = PyType_FromModuleAndSpec(module, &spec, NULL);
    if (type == NULL)
        return -1;
    int status = PyModule_AddType(module, (PyTypeObject *)type);
    Py_DECREF(type);
    return status;
}
