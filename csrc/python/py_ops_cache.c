/* The ops on the cache, one at a time on the caller's buffers. */
#include "../base/mem.h"
#include "ops_args.h"

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

/* None, or (residual, firsts): tokens of a stretch, and uint8 [pages, bytes], what lies beside the pages that a text begins with; all layers. */
static bool take_buffer(bag *b, cache_call *c, PyObject *object, long long layer)
{
    PyObject *firsts_o;
    int residual;
    c->kv.residual = LCO_KV_BLOCK;
    if (object == Py_None)
        return true;
    if (!PyTuple_Check(object)) {
        PyErr_SetString(PyExc_TypeError, "buffer is a tuple (residual, firsts)");
        return false;
    }
    if (!PyArg_ParseTuple(object, "iO:buffer", &residual, &firsts_o) ||
        !check(residual >= LCO_KV_BLOCK && residual <= LCO_KV_MOST_RESIDUAL && residual % LCO_KV_BLOCK == 0 &&
                   c->kv.page_size % residual == 0,
               "residual", residual, "a multiple of 16 up to 64 that divides page_size"))
        return false;
    c->kv.residual = residual;
    const Py_buffer *firsts = take(b, firsts_o, "firsts", "B", 2, WRITE);
    const int64_t row = (int64_t)lco_rows_bytes(&c->kv, 1) * c->n_layers;
    if (firsts == NULL || !check_packed(firsts, "firsts") || !check_axis(firsts, "firsts", 0, c->n_pages) ||
        !check(firsts->shape[1] % row == 0 && firsts->shape[1] / row <= LCO_KV_MOST_FIRST, "axis 1 of firsts", firsts->shape[1],
               "the bytes of 0 to 16 tokens of all layers"))
        return false;
    c->kv.n_first = (int32_t)(firsts->shape[1] / row);
    c->kv.firsts_stride = (size_t)firsts->shape[1];
    c->kv.firsts = (uint8_t *)firsts->buf + lco_first_bytes(&c->kv) * (size_t)layer;
    return true;
}

/* cache: uint8 bytes of whole pages as formats.h lays them out, all layers of one type. */
static bool take_cache(bag *b, cache_call *c, PyObject *cache_o, const char *dtype_name, int page_size, int n_layers, int n_kv_heads,
                       int head_dim, long long layer, PyObject *buffer_o)
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
    c->kv.base = (uint8_t *)cache->buf + c->kv.slice_offset;
    c->n_pages = (int64_t)((size_t)cache->len / page);
    if (!take_buffer(b, c, buffer_o, layer))
        return false;
    c->kv.tail_offset = lco_tail_bytes(&c->kv) * (size_t)layer;
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
           (item->own = take_tail(b, c, own_o, "own", lco_own_stretches(item, c->kv.residual))) != NULL;
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

const char lco_py_rope_append_doc[] =
    "rope_append(q, k, v, cos, sin, cache, dtype, page_size, n_layers, layer, items, scales=None, turned=False, buffer=None)\n--\n\n"
    "Rotates q[m, heads, d] and k[m, kv_heads, d] in place by cos and sin [m, d/2] and writes k and v to the cache. Rows may be strided\n"
    "(k and v alike). cache: uint8 pages of base/formats.h; dtype: element type of the cache; items: a list of\n"
    "(table int32, row, len, pos, prompt), for a cache with a write buffer (..., tail, next_tail, own), uint8 as in ops.h.\n"
    "buffer: of such a cache (residual, firsts), uint8[pages, bytes]; None: (16, nothing).\n"
    "scales: float32 [k|v, kv_heads] that all blocks of one-byte codes have; None: each its own.\n"
    "turned: q and k are turned by a Walsh-Hadamard matrix (base/hadamard.h).";

PyObject *lco_py_rope_append(PyObject *object, PyObject *args, PyObject *kw)
{
    OpContext *self = (OpContext *)object;
    PyThreadState *state;
    PyObject *result = NULL;
    static const char *const names[] = {"q",        "k",     "v",     "cos",    "sin",    "cache",  "dtype", "page_size",
                                        "n_layers", "layer", "items", "scales", "turned", "buffer", NULL};
    PyObject *q_o, *k_o, *v_o, *cos_o, *sin_o, *cache_o, *items_o, *scales_o = Py_None, *buffer_o = Py_None;
    const char *dtype_name;
    int page_size, n_layers, turned = 0;
    long long layer;
    bag b = {.n = 0};
    const Py_buffer *q, *k, *v, *cos, *sin, *scales;
    if (!PyArg_ParseTupleAndKeywords(args, kw, "OOOOOOsiiLO!|OpO:rope_append", (char **)names, &q_o, &k_o, &v_o, &cos_o, &sin_o, &cache_o,
                                     &dtype_name, &page_size, &n_layers, &layer, &PyList_Type, &items_o, &scales_o, &turned, &buffer_o))
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
        !take_cache(&b, c, cache_o, dtype_name, page_size, n_layers, (int)k->shape[1], (int)d, layer, buffer_o) ||
        !take_items(&b, c, items_o, m))
        goto done;
    c->kv.turned = turned;
    if (scales_o != Py_None) {
        if ((scales = take(&b, scales_o, "scales", "f", 2, READ)) == NULL || !check_axis(scales, "scales", 0, 2) ||
            !check_axis(scales, "scales", 1, k->shape[1]) || !check_packed(scales, "scales"))
            goto done;
        c->kv.fixed_scales = scales->buf;
    }
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

/* A bit for every page of every item's table, [items, kv_heads, words]. */
static const Py_buffer *take_chosen(bag *b, const cache_call *c, PyObject *object)
{
    const Py_buffer *chosen = take(b, object, "chosen", "L", 3, WRITE);
    if (chosen == NULL || !check_axis(chosen, "chosen", 0, c->n_items) || !check_axis(chosen, "chosen", 1, c->kv.n_kv_heads) ||
        !check_packed(chosen, "chosen"))
        return NULL;
    for (int64_t i = 0; i < c->n_items; i++)
        if (!check(chosen->shape[2] > c->items[i].pos / c->kv.page_size / 64, "axis 2 of chosen", chosen->shape[2], "a bit for each page"))
            return NULL;
    return chosen;
}

const char lco_py_choose_pages_doc[] =
    "choose_pages(chosen, counts, masses, q, bounds, cache, dtype, page_size, n_layers, n_kv_heads, layer, items, scale, tolerance,\n"
    "             window=0, sinks=0, buffer=None)\n--\n\n"
    "Which pages rows q[m, heads, d] of decode items read: chosen uint64[items, kv_heads, words]; counts int64[items, kv_heads, 2] of "
    "pages\n"
    "read and left out; masses float32[items, kv_heads]. bounds: bfloat16 bits [pages, kv_heads, 2, d] of the layer's keys.";

PyObject *lco_py_choose_pages(PyObject *object, PyObject *args, PyObject *kw)
{
    OpContext *self = (OpContext *)object;
    PyThreadState *state;
    PyObject *result = NULL;
    static const char *const names[] = {"chosen",     "counts", "masses", "q",     "bounds",    "cache",  "dtype", "page_size", "n_layers",
                                        "n_kv_heads", "layer",  "items",  "scale", "tolerance", "window", "sinks", "buffer",    NULL};
    PyObject *chosen_o, *counts_o, *masses_o, *q_o, *bounds_o, *cache_o, *items_o, *buffer_o = Py_None;
    const char *dtype_name;
    int page_size, n_layers, n_kv_heads;
    long long layer, window = 0, sinks = 0;
    float scale;
    double tolerance;
    bag b = {.n = 0};
    const Py_buffer *chosen, *counts, *masses, *q, *bounds;
    lco_choice *choices = NULL;
    if (!PyArg_ParseTupleAndKeywords(args, kw, "OOOOOOsiiiLO!fd|LLO:choose_pages", (char **)names, &chosen_o, &counts_o, &masses_o, &q_o,
                                     &bounds_o, &cache_o, &dtype_name, &page_size, &n_layers, &n_kv_heads, &layer, &PyList_Type, &items_o,
                                     &scale, &tolerance, &window, &sinks, &buffer_o))
        return NULL;
    cache_call *c = PyMem_Calloc(1, sizeof *c);
    if (c == NULL)
        return PyErr_NoMemory();
    if ((q = take(&b, q_o, "q", "f", 3, READ)) == NULL || (counts = take(&b, counts_o, "counts", "l", 3, WRITE)) == NULL ||
        (masses = take(&b, masses_o, "masses", "f", 2, WRITE)) == NULL || (bounds = take(&b, bounds_o, "bounds", "H", 4, READ)) == NULL)
        goto done;
    const int64_t d = q->shape[2];
    if (!check(d <= INT32_MAX, "head_dim", d, "a 32-bit number") || !check(window >= 0, "window", window, "0 (none) or more") ||
        !check(sinks >= 0, "sinks", sinks, "0 (none) or more") ||
        !check(n_kv_heads >= 1 && q->shape[1] % n_kv_heads == 0, "n_kv_heads", n_kv_heads, "a divisor of the heads of q") ||
        !take_cache(&b, c, cache_o, dtype_name, page_size, n_layers, n_kv_heads, (int)d, layer, buffer_o) ||
        !take_items(&b, c, items_o, q->shape[0]) || (chosen = take_chosen(&b, c, chosen_o)) == NULL ||
        !check_axis(counts, "counts", 0, c->n_items) || !check_axis(counts, "counts", 1, n_kv_heads) ||
        !check_axis(counts, "counts", 2, 2) || !check_packed(counts, "counts") || !check_axis(masses, "masses", 0, c->n_items) ||
        !check_axis(masses, "masses", 1, n_kv_heads) || !check_packed(masses, "masses") || !check_axis(bounds, "bounds", 0, c->n_pages) ||
        !check_axis(bounds, "bounds", 1, n_kv_heads) || !check_axis(bounds, "bounds", 2, 2) || !check_axis(bounds, "bounds", 3, d) ||
        !check_packed(bounds, "bounds"))
        goto done;
    const int64_t n = c->n_items * n_kv_heads;
    if ((choices = PyMem_Calloc((size_t)n + 1, sizeof *choices)) == NULL) {
        PyErr_NoMemory();
        goto done;
    }
    c->kv.bounds = bounds->buf;
    c->kv.bounds_stride = (size_t)(n_kv_heads * 2 * d);
    lco_choose_pages_args a = {.chosen = chosen->buf, .choices = choices, .q = q->buf, .kv = &c->kv, .items = c->items};
    a.n_items = c->n_items;
    a.n_heads = q->shape[1];
    a.ld_q = row_stride(q);
    a.window = window;
    a.sinks = sinks;
    a.chosen_words = chosen->shape[2];
    a.scale = scale;
    a.tolerance = tolerance;
    a.exec = &self->exec;
    if ((state = enter(self)) != NULL)
        result = leave(self, state, self->ops->choose_pages(&a));
    for (int64_t i = 0; result != NULL && i < n; i++) {
        ((int64_t *)counts->buf)[2 * i] = choices[i].read;
        ((int64_t *)counts->buf)[2 * i + 1] = choices[i].left_out;
        ((float *)masses->buf)[i] = choices[i].mass;
    }
done:
    PyMem_Free(choices);
    bag_release(&b);
    cache_release(c);
    return result;
}

const char lco_py_attention_doc[] =
    "attention(out, q, cache, dtype, page_size, n_layers, n_kv_heads, layer, items, scale, window=0, sinks=0, chosen=None, "
    "buffer=None)\n--\n\n"
    "Causal attention of q[m, heads, d] over the cache into out[m, heads, d]; rows may be strided. cache, dtype and items as in\n"
    "rope_append; window > 0: only the newest `window` positions and those below `sinks`. chosen: uint64\n"
    "[items, kv_heads, words] of choose_pages.";

PyObject *lco_py_attention(PyObject *object, PyObject *args, PyObject *kw)
{
    OpContext *self = (OpContext *)object;
    PyThreadState *state;
    PyObject *result = NULL;
    static const char *const names[] = {"out",   "q",     "cache",  "dtype", "page_size", "n_layers", "n_kv_heads", "layer",
                                        "items", "scale", "window", "sinks", "chosen",    "buffer",   NULL};
    PyObject *out_o, *q_o, *cache_o, *items_o, *chosen_o = Py_None, *buffer_o = Py_None;
    const char *dtype_name;
    int page_size, n_layers, n_kv_heads;
    long long layer, window = 0, sinks = 0;
    float scale;
    bag b = {.n = 0};
    const Py_buffer *out, *q, *chosen = NULL;
    if (!PyArg_ParseTupleAndKeywords(args, kw, "OOOsiiiLO!f|LLOO:attention", (char **)names, &out_o, &q_o, &cache_o, &dtype_name,
                                     &page_size, &n_layers, &n_kv_heads, &layer, &PyList_Type, &items_o, &scale, &window, &sinks, &chosen_o,
                                     &buffer_o))
        return NULL;
    cache_call *c = PyMem_Calloc(1, sizeof *c);
    if (c == NULL)
        return PyErr_NoMemory();
    if ((out = take(&b, out_o, "out", "f", 3, WRITE)) == NULL || (q = take(&b, q_o, "q", "f", 3, READ)) == NULL)
        goto done;
    int64_t m = q->shape[0], n_heads = q->shape[1], d = q->shape[2];
    if (!check(d <= INT32_MAX, "head_dim", d, "a 32-bit number") || !check(window >= 0, "window", window, "0 (none) or more") ||
        !check(sinks >= 0, "sinks", sinks, "0 (none) or more") || !check_axis(out, "out", 0, m) || !check_axis(out, "out", 1, n_heads) ||
        !check_axis(out, "out", 2, d) ||
        !check(n_kv_heads >= 1 && n_heads % n_kv_heads == 0, "n_kv_heads", n_kv_heads, "a divisor of the heads of q") ||
        !take_cache(&b, c, cache_o, dtype_name, page_size, n_layers, n_kv_heads, (int)d, layer, buffer_o) || !take_items(&b, c, items_o, m))
        goto done;
    if (chosen_o != Py_None && (chosen = take_chosen(&b, c, chosen_o)) == NULL)
        goto done;
    lco_attention_args a = {.out = out->buf, .q = q->buf, .kv = &c->kv, .items = c->items, .n_items = c->n_items};
    a.n_heads = n_heads;
    a.ld_out = row_stride(out);
    a.ld_q = row_stride(q);
    a.window = window;
    a.sinks = sinks;
    a.chosen = chosen != NULL ? chosen->buf : NULL;
    a.chosen_words = chosen != NULL ? chosen->shape[2] : 0;
    a.scale = scale;
    a.exec = &self->exec;
    if ((state = enter(self)) != NULL)
        result = leave(self, state, self->ops->attention(&a));
done:
    bag_release(&b);
    cache_release(c);
    return result;
}
