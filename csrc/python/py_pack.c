/* Quantised weights for the loaders: from the arrays of a file to the layout that kernels read (base/qweight.h). */
#include "py_pack.h"

#include <string.h>

#include "../model/pack.h"
#include "dtypes.h"

static PyObject *value_error(const lco_error *err)
{
    PyErr_SetString(PyExc_ValueError, err->text);
    return NULL;
}

static PyObject *none_or_error(lco_status status, const lco_error *err) { return status == LCO_OK ? Py_NewRef(Py_None) : value_error(err); }

/* The header that arguments describe. */
static bool read_head(lco_qweight *head, const char *dtype_name, const char *kind)
{
    static const char *const KINDS[] = {"none", "zeros", "floats"};
    lco_dtype dtype;
    if (!lco_py_dtype(dtype_name, &dtype) || lco_dtype_scaled(dtype)) {
        PyErr_Format(PyExc_ValueError, "scale_dtype = '%s', expected float32, float16 or bfloat16", dtype_name);
        return false;
    }
    head->scale_dtype = (uint8_t)dtype;
    for (uint8_t i = 0; i < sizeof KINDS / sizeof KINDS[0]; i++)
        if (strcmp(kind, KINDS[i]) == 0) {
            head->offset_kind = i;
            return true;
        }
    PyErr_Format(PyExc_ValueError, "offsets = '%s', expected none, zeros or floats", kind);
    return false;
}

static PyObject *pack_size(PyObject *module, PyObject *args)
{
    (void)module;
    lco_qweight head = {.magic = LCO_QWEIGHT_MAGIC};
    const char *dtype, *kind;
    int ordered;
    long long n, k;
    lco_error err;
    if (!PyArg_ParseTuple(args, "LLHHssp:pack_size", &n, &k, &head.bits, &head.block, &dtype, &kind, &ordered) ||
        !read_head(&head, dtype, kind))
        return NULL;
    head.n = n;
    head.k = k;
    head.ordered = (uint8_t)ordered;
    return lco_qweight_check(&head, &err) == LCO_OK ? PyLong_FromSize_t(lco_qweight_bytes(&head)) : value_error(&err);
}

static PyObject *pack_begin(PyObject *module, PyObject *args)
{
    (void)module;
    lco_qweight head = {0};
    Py_buffer out, order;
    const char *dtype, *kind;
    long long n, k;
    lco_error err;
    if (!PyArg_ParseTuple(args, "w*LLHHssz*:pack_begin", &out, &n, &k, &head.bits, &head.block, &dtype, &kind, &order))
        return NULL;
    PyObject *result = NULL;
    head.n = n;
    head.k = k;
    if (order.buf != NULL && (order.len != 4 * k || (uintptr_t)order.buf % 4 != 0))
        PyErr_Format(PyExc_ValueError, "an order of %zd bytes, expected int32 for each of %lld inputs", order.len, k);
    else if ((uintptr_t)out.buf % 64 != 0)
        PyErr_SetString(PyExc_ValueError, "out does not begin at a multiple of 64 bytes");
    else if (read_head(&head, dtype, kind))
        result = none_or_error(lco_pack_begin(out.buf, (size_t)out.len, &head, order.buf, &err), &err);
    if (order.buf != NULL)
        PyBuffer_Release(&order);
    PyBuffer_Release(&out);
    return result;
}

/* Whether the buffers hold what `rows` and `s` say; scales and offsets are counted by their type. */
static bool sizes_fit(const lco_qweight *q, const lco_code_rows *rows, const lco_group_scales *s, const Py_buffer *codes,
                      const Py_buffer *scales, const Py_buffer *zeros, const Py_buffer *offsets)
{
    const Py_ssize_t size = (Py_ssize_t)lco_dtype_bytes(s->dtype), count = s->groups * s->outputs;
    const Py_ssize_t expected = rows->words != NULL ? (q->k + 7) / 8 * rows->words_n * 4 : rows->rows * q->k;
    if (codes->len != expected || scales->len != count * size || (uintptr_t)codes->buf % (rows->words != NULL ? 4 : 1) != 0 ||
        (uintptr_t)scales->buf % (size_t)size != 0) {
        PyErr_Format(PyExc_ValueError, "%zd bytes of codes and %zd of scales, expected %zd and %zd, aligned", codes->len, scales->len,
                     expected, count * size);
        return false;
    }
    if ((q->offset_kind == LCO_OFFSET_ZEROS && (zeros->buf == NULL || zeros->len != 2 * count || (uintptr_t)zeros->buf % 2 != 0)) ||
        (q->offset_kind == LCO_OFFSET_FLOATS &&
         (offsets->buf == NULL || offsets->len != count * size || (uintptr_t)offsets->buf % (size_t)size != 0))) {
        PyErr_Format(PyExc_ValueError, "zeros or offsets of another size than %zd scales", count);
        return false;
    }
    return true;
}

static PyObject *pack_rows(PyObject *module, PyObject *args)
{
    (void)module;
    Py_buffer out, codes, scales, zeros, offsets;
    lco_code_rows rows = {0};
    lco_group_scales s = {0};
    long long words_n, row, n_rows, first, outputs, groups, group_size;
    const char *dtype;
    if (!PyArg_ParseTuple(args, "w*y*Li(LL)y*sz*z*(LLLL):pack_rows", &out, &codes, &words_n, &rows.shift, &row, &n_rows, &scales, &dtype,
                          &zeros, &offsets, &first, &outputs, &groups, &group_size))
        return NULL;
    PyObject *result = NULL;
    lco_error err;
    lco_status status;
    int64_t lost = 0;
    const long long most = 1LL << 31;
    rows.row = row;
    rows.rows = n_rows;
    rows.words_n = words_n;
    rows.codes = codes.buf;
    rows.words = words_n > 0 ? codes.buf : NULL;
    s = (lco_group_scales){.scales = scales.buf, .zeros = zeros.buf, .offsets = offsets.buf, .first = first, .outputs = outputs};
    s.groups = groups;
    s.group_size = group_size;
    if (lco_qweight_check_bytes(out.buf, (size_t)out.len, &err) != LCO_OK)
        value_error(&err);
    else if (words_n < 0 || words_n > most || n_rows < 0 || n_rows > most || outputs < 1 || outputs > most || groups < 1 || groups > most ||
             first < 0 || row < 0 || row > most)
        PyErr_SetString(PyExc_ValueError, "a negative or absurd number of rows, outputs or groups");
    else if (!lco_py_dtype(dtype, &s.dtype) || lco_dtype_scaled(s.dtype))
        PyErr_Format(PyExc_ValueError, "dtype = '%s', expected float32, float16 or bfloat16", dtype);
    else if (sizes_fit(out.buf, &rows, &s, &codes, &scales, &zeros, &offsets)) {
        Py_BEGIN_ALLOW_THREADS status = lco_pack_rows(out.buf, &rows, &s, &lost, &err);
        Py_END_ALLOW_THREADS result = status == LCO_OK ? PyLong_FromLongLong(lost) : value_error(&err);
    }
    if (offsets.buf != NULL)
        PyBuffer_Release(&offsets);
    if (zeros.buf != NULL)
        PyBuffer_Release(&zeros);
    PyBuffer_Release(&scales);
    PyBuffer_Release(&codes);
    PyBuffer_Release(&out);
    return result;
}

static PyObject *unpack_rows(PyObject *module, PyObject *args)
{
    (void)module;
    Py_buffer weight, out;
    long long row;
    if (!PyArg_ParseTuple(args, "y*Lw*:unpack_rows", &weight, &row, &out))
        return NULL;
    PyObject *result = NULL;
    lco_error err;
    const lco_qweight *q = weight.buf;
    if (lco_qweight_check_bytes(q, (size_t)weight.len, &err) != LCO_OK)
        value_error(&err);
    else if ((uintptr_t)out.buf % 4 != 0 || out.len % (4 * q->k) != 0)
        PyErr_Format(PyExc_ValueError, "out has %zd bytes, expected float32 rows of %lld", out.len, (long long)q->k);
    else {
        lco_status status;
        Py_BEGIN_ALLOW_THREADS status = lco_unpack_rows(q, row, out.len / (4 * q->k), out.buf, &err);
        Py_END_ALLOW_THREADS result = none_or_error(status, &err);
    }
    PyBuffer_Release(&out);
    PyBuffer_Release(&weight);
    return result;
}

static const PyMethodDef methods[] = {
    {"pack_size", pack_size, METH_VARARGS,
     "pack_size(n, k, bits, block, scale_dtype, offsets, ordered)\n--\n\nBytes of a quantised weight in the layout of "
     "csrc/base/qweight.h."},
    {"pack_begin", pack_begin, METH_VARARGS,
     "pack_begin(out, n, k, bits, block, scale_dtype, offsets, order)\n--\n\n"
     "Writes the header of a quantised weight [n, k] to `out`, writable bytes at a multiple of 64. bits: 4 or 8; block: inputs that share "
     "a\n"
     "scale; offsets: 'none', 'zeros' or 'floats'; order: int32 [k], input j of the layout is x[order[j]], or None."},
    {"pack_rows", pack_rows, METH_VARARGS,
     "pack_rows(out, codes, words_n, shift, rows, scales, dtype, zeros, offsets, groups)\n--\n\n"
     "Fills outputs rows = (first, count) of a begun weight. codes: uint8 [count, k], to which `shift` is added, or, with words_n > 0, "
     "GPTQ's\n"
     "words [ceil(k / 8), words_n] of 4-bit codes of all outputs. groups: (first output, outputs, groups, group size) of scales, zeros "
     "(int16)\n"
     "and offsets, [groups, outputs]. Returns how many of them the layout's type does not hold exactly."},
    {"unpack_rows", unpack_rows, METH_VARARGS,
     "unpack_rows(weight, row, out)\n--\n\nDecodes outputs from `row` on into float32 out [rows, k], in the file's order of inputs."},
    {NULL, NULL, 0, NULL},
};

int lco_py_add_pack(PyObject *module) { return PyModule_AddFunctions(module, (PyMethodDef *)methods); }
