/* One operator at a time on the caller's buffers. Everything an op only asserts is checked here, since Python reaches it.
 *
 * A `bag` holds the buffers of one call; shapes come from the buffers, and each check names the argument, what was found and what is expected. */
#include "py_ops.h"

#include <stdatomic.h>
#include <string.h>

#include "../base/mem.h"
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

static void bag_release(bag *b)
{
    while (b->n > 0)
        PyBuffer_Release(&b->view[--b->n]);
}

enum { READ = 0, WRITE = PyBUF_WRITABLE };

static bool parse_dtype(const char *name, lco_dtype *out)
{
    if (lco_py_dtype(name, out) && !lco_dtype_scaled(*out))
        return true;
    PyErr_Format(PyExc_ValueError, "dtype = '%s', expected float32, float16 or bfloat16", name);
    return false;
}

static const char *format_of(lco_dtype dtype) { return dtype == LCO_F32 ? "f" : "H"; }

static bool check(bool good, const char *name, int64_t found, const char *expected)
{
    if (!good)
        PyErr_Format(PyExc_ValueError, "%s is %lld, expected %s", name, (long long)found, expected);
    return good;
}

/* Axis 0 may have any stride of at least a row; the axes after it are contiguous. */
static bool rows_contiguous(const Py_buffer *v)
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
static const Py_buffer *take(bag *b, PyObject *object, const char *name, const char *format, int ndim, int writable)
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
static int64_t row_stride(const Py_buffer *v)
{
    int64_t width = 1;
    for (int axis = 1; axis < v->ndim; axis++)
        width *= v->shape[axis];
    return v->shape[0] <= 1 ? width : v->strides[0] / v->itemsize;
}

static bool check_axis(const Py_buffer *v, const char *name, int axis, int64_t expected)
{
    if (v->shape[axis] == expected)
        return true;
    PyErr_Format(PyExc_ValueError, "axis %d of %s is %lld, expected %lld", axis, name, (long long)v->shape[axis], (long long)expected);
    return false;
}

static bool check_packed(const Py_buffer *v, const char *name)
{
    if (v->shape[0] <= 1 || v->strides[0] * v->shape[0] == v->len)
        return true;
    PyErr_Format(PyExc_ValueError, "rows of %s are %lld bytes apart, expected a contiguous array", name, (long long)v->strides[0]);
    return false;
}

/* --- running ------------------------------------------------------------------------------------------------------------------- */

/* Lets other Python threads run and marks the context busy; NULL with an exception set when it can't be used. */
static PyThreadState *enter(OpContext *self)
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
static PyObject *leave(OpContext *self, PyThreadState *state, lco_status status)
{
    PyEval_RestoreThread(state);
    atomic_store(&self->busy, false);
    if (status == LCO_OK)
        return Py_NewRef(Py_None);
    return PyErr_Format(PyExc_MemoryError, "the op ran out of scratch memory (it holds %zu bytes)", lco_arena_bytes(self->exec.scratch));
}

/* --- ops ----------------------------------------------------------------------------------------------------------------------- */

PyDoc_STRVAR(embed_doc,
             "embed(out, ids, table, dtype)\n--\n\n"
             "out[m, k] float32 = rows ids[m] (int32) of table[n, k] (dtype: 'float32', or uint16 bits of 'float16', 'bfloat16').");

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
    const Py_buffer *out, *ids, *table;
    if (!PyArg_ParseTupleAndKeywords(args, kw, "OOOs:embed", (char **)names, &out_o, &ids_o, &table_o, &dtype_name) ||
        !parse_dtype(dtype_name, &a.dtype))
        return NULL;
    if ((out = take(&b, out_o, "out", "f", 2, WRITE)) == NULL || (ids = take(&b, ids_o, "ids", "i", 1, READ)) == NULL ||
        (table = take(&b, table_o, "table", format_of(a.dtype), 2, READ)) == NULL || !check_axis(out, "out", 0, ids->shape[0]) ||
        !check_axis(out, "out", 1, table->shape[1]) || !check_packed(out, "out") || !check_packed(ids, "ids") ||
        !check_packed(table, "table"))
        goto done;
    a.ids = ids->buf;
    a.m = ids->shape[0];
    for (int64_t i = 0; i < a.m; i++)
        if (!check(a.ids[i] >= 0 && a.ids[i] < table->shape[0], "an element of ids", a.ids[i], "a row of table"))
            goto done;
    a.out = out->buf;
    a.table = table->buf;
    a.k = table->shape[1];
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

/* One (out, w, dtype, bias or None) of linear. */
static bool take_part(bag *b, PyObject *item, lco_linear_part *part, int64_t m, int64_t k)
{
    PyObject *out_o, *w_o, *bias_o = Py_None;
    const char *dtype_name;
    const Py_buffer *out, *w, *bias;
    if (!PyTuple_Check(item)) {
        PyErr_SetString(PyExc_TypeError, "each part is a tuple (out, w, dtype, bias or None)");
        return false;
    }
    if (!PyArg_ParseTuple(item, "OOs|O:part", &out_o, &w_o, &dtype_name, &bias_o) || !parse_dtype(dtype_name, &part->dtype) ||
        (out = take(b, out_o, "out", "f", 2, WRITE)) == NULL || (w = take(b, w_o, "w", format_of(part->dtype), 2, READ)) == NULL ||
        !check_axis(w, "w", 1, k) || !check_axis(out, "out", 0, m) || !check_axis(out, "out", 1, w->shape[0]) || !check_packed(w, "w"))
        return false;
    if (bias_o != Py_None) {
        if ((bias = take(b, bias_o, "bias", "f", 1, READ)) == NULL || !check_axis(bias, "bias", 0, w->shape[0]) ||
            !check_packed(bias, "bias"))
            return false;
        part->bias = bias->buf;
    }
    part->out = out->buf;
    part->ld_out = row_stride(out);
    part->w = w->buf;
    part->n = w->shape[0];
    return true;
}

PyDoc_STRVAR(linear_doc,
             "linear(x, parts, m_prompt=0, accumulate=False)\n--\n\n"
             "For each (out, w, dtype, bias or None) of parts (1 to 3): out[m, n] = x[m, k] @ w[n, k].T (+ bias[n]) (+ out when\n"
             "accumulate). x, out and bias are float32, rows of x and out may be strided; rows [0, m_prompt) are prompt rows.");

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
    const Py_buffer *x;
    if (!PyArg_ParseTupleAndKeywords(args, kw, "OO!|Lp:linear", (char **)names, &x_o, &PyList_Type, &parts_o, &m_prompt, &accumulate))
        return NULL;
    if ((x = take(&b, x_o, "x", "f", 2, READ)) == NULL ||
        !check(PyList_Size(parts_o) >= 1 && PyList_Size(parts_o) <= LCO_LINEAR_PARTS, "the length of parts", PyList_Size(parts_o),
               "1 to 3") ||
        !check(m_prompt >= 0 && m_prompt <= x->shape[0], "m_prompt", m_prompt, "0 to the rows of x"))
        goto done;
    a.x = x->buf;
    a.m = x->shape[0];
    a.k = x->shape[1];
    a.ld_x = row_stride(x);
    a.m_prompt = m_prompt;
    a.accumulate = accumulate;
    a.n_parts = (int)PyList_Size(parts_o);
    for (int p = 0; p < a.n_parts; p++)
        if (!take_part(&b, PyList_GetItem(parts_o, p), &a.part[p], a.m, a.k))
            goto done;
    if ((state = enter(self)) != NULL)
        result = leave(self, state, self->ops->linear(&a));
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

/* --- ops on the cache ------------------------------------------------------------------------------------------------------------ */

#define MAX_ITEMS 256

typedef struct {
    lco_kv_view kv;
    int64_t n_layers, n_pages;
    lco_item items[MAX_ITEMS];
    Py_buffer tables[MAX_ITEMS];
    int64_t n_items, n_tables;
} cache_call;

static void cache_release(cache_call *c)
{
    while (c->n_tables > 0)
        PyBuffer_Release(&c->tables[--c->n_tables]);
    PyMem_Free(c);
}

/* cache: uint8 bytes of whole pages as formats.h lays them out, all layers of one type. */
static bool take_cache(bag *b, cache_call *c, PyObject *cache_o, const char *dtype_name, int page_size, int n_layers, int n_kv_heads,
                       int head_dim, long long layer)
{
    if (!lco_py_dtype(dtype_name, &c->kv.dtype)) {
        PyErr_Format(PyExc_ValueError, "dtype = '%s', expected one of " LCO_PY_DTYPES, dtype_name);
        return false;
    }
    if (!check(page_size >= 16 && page_size <= 512 && page_size % 16 == 0, "page_size", page_size, "16 to 512, a multiple of 16") ||
        !check(n_layers >= 1, "n_layers", n_layers, "at least 1") || !check(n_kv_heads >= 1, "n_kv_heads", n_kv_heads, "at least 1") ||
        !check(head_dim >= 2 && head_dim % 2 == 0, "head_dim", head_dim, "an even number from 2") ||
        !check(layer >= 0 && layer < n_layers, "layer", layer, "0 to n_layers - 1"))
        return false;
    size_t slice, page;
    c->kv.page_size = page_size;
    c->kv.n_kv_heads = n_kv_heads;
    c->kv.head_dim = head_dim;
    c->n_layers = n_layers;
    if (!lco_kv_slice_bytes(&c->kv, &slice) || !lco_mul(slice, (size_t)n_layers, &page)) {
        PyErr_SetString(PyExc_ValueError, "a page of this shape does not fit the address space");
        return false;
    }
    const Py_buffer *cache = take(b, cache_o, "cache", "B", 1, WRITE);
    if (cache == NULL || !check_packed(cache, "cache"))
        return false;
    c->kv.page_bytes = page;
    c->kv.slice_offset = slice * (size_t)layer;
    c->kv.tail_offset = lco_tail_bytes(&c->kv) * (size_t)layer;
    c->kv.base = (uint8_t *)cache->buf + c->kv.slice_offset;
    c->n_pages = (int64_t)((size_t)cache->len / page);
    return true;
}

/* A buffer of an item of a buffered cache: `layers` tail layers. */
static uint8_t *take_tail(bag *b, const cache_call *c, PyObject *object, const char *name, int64_t layers)
{
    const Py_buffer *view = take(b, object, name, "B", 1, WRITE);
    return view != NULL && check(view->len >= layers * (int64_t)lco_tail_bytes(&c->kv), name, view->len, "the bytes of its layers")
               ? view->buf
               : NULL;
}

/* One (table, row, len, pos, prompt) and, in a buffered cache, (..., tail, next_tail, own). */
static bool take_item(bag *b, cache_call *c, PyObject *object, int64_t m)
{
    PyObject *table_o, *tail_o = NULL, *next_o = NULL, *own_o = NULL;
    long long row, len, pos;
    int prompt;
    if (!PyTuple_Check(object)) {
        PyErr_SetString(PyExc_TypeError, "each item is a tuple (table, row, len, pos, prompt)");
        return false;
    }
    if (!PyArg_ParseTuple(object, "OLLLp|OOO:item", &table_o, &row, &len, &pos, &prompt, &tail_o, &next_o, &own_o) ||
        !check(len >= 1 && len <= m, "len of an item", len, "1 to the number of rows") ||
        !check(row >= 0 && row <= m - len, "row of an item", row, "its rows to lie in the batch") ||
        !check(pos >= 0 && pos <= INT64_MAX - len - c->kv.page_size, "pos of an item", pos, "a position from 0") ||
        !check(prompt || len == 1, "len of a decode item", len, "1"))
        return false;
    Py_buffer *v = &c->tables[c->n_tables];
    if (PyObject_GetBuffer(table_o, v, PyBUF_FORMAT | PyBUF_ND) < 0)
        return false;
    c->n_tables++;
    if (v->ndim != 1 || v->format == NULL || strcmp(v->format, "i") != 0) {
        PyErr_SetString(PyExc_ValueError, "table of an item is not a vector of int32");
        return false;
    }
    int64_t pages = (pos + len + c->kv.page_size - 1) / c->kv.page_size;
    const int32_t *table = v->buf;
    if (!check(v->shape[0] >= pages, "the length of an item's table", v->shape[0], "a page for every position"))
        return false;
    for (int64_t i = 0; i < pages; i++)
        if (!check(table[i] >= 0 && table[i] < c->n_pages, "a page of an item's table", table[i], "a page of the cache"))
            return false;
    lco_item *item = &c->items[c->n_items++];
    *item = (lco_item){.table = table, .row = row, .len = len, .pos = pos, .rope_length = pos + len, .prompt = prompt};
    const bool buffered = lco_dtype_scaled(c->kv.dtype) && own_o != NULL;
    if (c->n_items > 1 &&
        !check(buffered == c->kv.buffered, "the fields of an item", PyTuple_Size(object), "as many as the other items have"))
        return false;
    if (!buffered)
        return true;
    c->kv.buffered = true;
    return (item->tail = take_tail(b, c, tail_o, "tail", c->n_layers)) != NULL &&
           (item->next_tail = take_tail(b, c, next_o, "next_tail", c->n_layers)) != NULL &&
           (item->own = take_tail(b, c, own_o, "own", lco_own_blocks(item))) != NULL;
}

static bool take_items(bag *b, cache_call *c, PyObject *items, int64_t m)
{
    if (!check(PyList_Size(items) <= MAX_ITEMS, "the length of items", PyList_Size(items), "at most 256"))
        return false;
    for (Py_ssize_t i = 0; i < PyList_Size(items); i++)
        if (!take_item(b, c, PyList_GetItem(items, i), m))
            return false;
    return true;
}

PyDoc_STRVAR(
    rope_append_doc,
    "rope_append(q, k, v, cos, sin, cache, dtype, page_size, n_layers, layer, items)\n--\n\n"
    "Rotates q[m, heads, d] and k[m, kv_heads, d] in place by cos and sin [m, d/2] and writes k and v to the cache. Rows may be strided\n"
    "(k and v alike). cache: uint8 pages of base/formats.h; dtype: element type of the cache; items: a list of\n"
    "(table int32, row, len, pos, prompt), for a cache with a write buffer (..., tail, next_tail, own), uint8 as in ops.h.");

static PyObject *context_rope_append(PyObject *object, PyObject *args, PyObject *kw)
{
    OpContext *self = (OpContext *)object;
    PyThreadState *state;
    PyObject *result = NULL;
    static const char *const names[] = {"q", "k", "v", "cos", "sin", "cache", "dtype", "page_size", "n_layers", "layer", "items", NULL};
    PyObject *q_o, *k_o, *v_o, *cos_o, *sin_o, *cache_o, *items_o;
    const char *dtype_name;
    int page_size, n_layers;
    long long layer;
    bag b = {.n = 0};
    const Py_buffer *q, *k, *v, *cos, *sin;
    if (!PyArg_ParseTupleAndKeywords(args, kw, "OOOOOOsiiLO!:rope_append", (char **)names, &q_o, &k_o, &v_o, &cos_o, &sin_o, &cache_o,
                                     &dtype_name, &page_size, &n_layers, &layer, &PyList_Type, &items_o))
        return NULL;
    cache_call *c = PyMem_Calloc(1, sizeof *c);
    if (c == NULL)
        return PyErr_NoMemory();
    if ((q = take(&b, q_o, "q", "f", 3, WRITE)) == NULL || (k = take(&b, k_o, "k", "f", 3, WRITE)) == NULL ||
        (v = take(&b, v_o, "v", "f", 3, READ)) == NULL || (cos = take(&b, cos_o, "cos", "f", 2, READ)) == NULL ||
        (sin = take(&b, sin_o, "sin", "f", 2, READ)) == NULL)
        goto done;
    int64_t m = q->shape[0], d = q->shape[2];
    if (!check(d <= INT32_MAX && k->shape[1] <= INT32_MAX, "head_dim", d, "a 32-bit number") || !check_axis(k, "k", 0, m) ||
        !check_axis(v, "v", 0, m) || !check_axis(k, "k", 2, d) || !check_axis(v, "v", 1, k->shape[1]) || !check_axis(v, "v", 2, d) ||
        !check_axis(cos, "cos", 0, m) || !check_axis(sin, "sin", 0, m) || !check_axis(cos, "cos", 1, d / 2) ||
        !check_axis(sin, "sin", 1, d / 2) || !check_packed(cos, "cos") || !check_packed(sin, "sin") ||
        !check(row_stride(k) == row_stride(v), "the row stride of v", row_stride(v), "that of k") ||
        !take_cache(&b, c, cache_o, dtype_name, page_size, n_layers, (int)k->shape[1], (int)d, layer) || !take_items(&b, c, items_o, m))
        goto done;
    lco_rope_append_args a = {.q = q->buf, .k = k->buf, .v = v->buf, .cos = cos->buf, .sin = sin->buf, .kv = &c->kv, .items = c->items};
    a.n_items = c->n_items;
    a.n_heads = q->shape[1];
    a.ld_q = row_stride(q);
    a.ld_kv = row_stride(k);
    a.exec = &self->exec;
    if ((state = enter(self)) != NULL)
        result = leave(self, state, self->ops->rope_append(&a));
done:
    bag_release(&b);
    cache_release(c);
    return result;
}

PyDoc_STRVAR(attention_doc,
             "attention(out, q, cache, dtype, page_size, n_layers, n_kv_heads, layer, items, scale, window=0)\n--\n\n"
             "Causal attention of q[m, heads, d] over the cache into out[m, heads, d]; rows may be strided. cache, dtype and items as in\n"
             "rope_append; window > 0: only the newest `window` positions.");

static PyObject *context_attention(PyObject *object, PyObject *args, PyObject *kw)
{
    OpContext *self = (OpContext *)object;
    PyThreadState *state;
    PyObject *result = NULL;
    static const char *const names[] = {"out",        "q",     "cache", "dtype", "page_size", "n_layers",
                                        "n_kv_heads", "layer", "items", "scale", "window",    NULL};
    PyObject *out_o, *q_o, *cache_o, *items_o;
    const char *dtype_name;
    int page_size, n_layers, n_kv_heads;
    long long layer, window = 0;
    float scale;
    bag b = {.n = 0};
    const Py_buffer *out, *q;
    if (!PyArg_ParseTupleAndKeywords(args, kw, "OOOsiiiLO!f|L:attention", (char **)names, &out_o, &q_o, &cache_o, &dtype_name, &page_size,
                                     &n_layers, &n_kv_heads, &layer, &PyList_Type, &items_o, &scale, &window))
        return NULL;
    cache_call *c = PyMem_Calloc(1, sizeof *c);
    if (c == NULL)
        return PyErr_NoMemory();
    if ((out = take(&b, out_o, "out", "f", 3, WRITE)) == NULL || (q = take(&b, q_o, "q", "f", 3, READ)) == NULL)
        goto done;
    int64_t m = q->shape[0], n_heads = q->shape[1], d = q->shape[2];
    if (!check(d <= INT32_MAX, "head_dim", d, "a 32-bit number") || !check(window >= 0, "window", window, "0 (none) or more") ||
        !check_axis(out, "out", 0, m) || !check_axis(out, "out", 1, n_heads) || !check_axis(out, "out", 2, d) ||
        !check(n_kv_heads >= 1 && n_heads % n_kv_heads == 0, "n_kv_heads", n_kv_heads, "a divisor of the heads of q") ||
        !take_cache(&b, c, cache_o, dtype_name, page_size, n_layers, n_kv_heads, (int)d, layer) || !take_items(&b, c, items_o, m))
        goto done;
    lco_attention_args a = {.out = out->buf, .q = q->buf, .kv = &c->kv, .items = c->items, .n_items = c->n_items};
    a.n_heads = n_heads;
    a.ld_out = row_stride(out);
    a.ld_q = row_stride(q);
    a.window = window;
    a.scale = scale;
    a.exec = &self->exec;
    if ((state = enter(self)) != NULL)
        result = leave(self, state, self->ops->attention(&a));
done:
    bag_release(&b);
    cache_release(c);
    return result;
}

/* --- the type -------------------------------------------------------------------------------------------------------------------- */

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
static const PyMethodDef CONTEXT_METHODS[] = {METHOD(embed),       METHOD(rmsnorm),   METHOD(linear),       METHOD(swiglu),
                                              METHOD(rope_append), METHOD(attention), {NULL, NULL, 0, NULL}};

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
