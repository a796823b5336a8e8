/* Weight conversion for the loaders: buffers in, caller-owned buffers out, the GIL released in between. */
#include "py_dequant.h"

#include <string.h>

#include "../model/dequant.h"
#include "../model/unpack.h"

static int dtype_of(const char *name, lco_dtype *out)
{
    static const struct {
        const char *name;
        lco_dtype dtype;
    } known[] = {{"F32", LCO_F32}, {"F16", LCO_F16}, {"BF16", LCO_BF16}};
    for (size_t i = 0; i < sizeof known / sizeof known[0]; i++)
        if (strcmp(known[i].name, name) == 0) {
            *out = known[i].dtype;
            return 0;
        }
    PyErr_Format(PyExc_ValueError, "dtype is '%s', expected F32, F16 or BF16", name);
    return -1;
}

/* Elements of `dtype` in the buffer, or -1 with an exception when its size or address does not fit. */
static Py_ssize_t elements_of(const Py_buffer *buffer, lco_dtype dtype, const char *argument)
{
    const Py_ssize_t item = (Py_ssize_t)lco_dtype_bytes(dtype);
    if (buffer->len % item == 0 && (uintptr_t)buffer->buf % (size_t)item == 0)
        return buffer->len / item;
    PyErr_Format(PyExc_ValueError, "%s has %zd bytes; expected a multiple of %zd, at an address that is one too", argument, buffer->len,
                 item);
    return -1;
}

static PyObject *dequantize(PyObject *module, PyObject *args)
{
    (void)module;
    Py_buffer blocks, out;
    int type;
    const char *name;
    if (!PyArg_ParseTuple(args, "y*iw*s:dequantize", &blocks, &type, &out, &name))
        return NULL;
    PyObject *result = NULL;
    lco_dtype dtype;
    int64_t lost = 0;
    Py_ssize_t n;
    if (dtype_of(name, &dtype) == 0 && (n = elements_of(&out, dtype, "out")) >= 0) {
        lco_error err;
        lco_status status;
        Py_BEGIN_ALLOW_THREADS status = lco_dequantize(type, blocks.buf, (size_t)blocks.len, dtype, out.buf, n, &lost, &err);
        Py_END_ALLOW_THREADS if (status == LCO_OK) result = PyLong_FromLongLong(lost);
        else PyErr_SetString(PyExc_ValueError, err.text);
    }
    PyBuffer_Release(&out);
    PyBuffer_Release(&blocks);
    return result;
}

static PyObject *block_codes(PyObject *module, PyObject *args)
{
    (void)module;
    Py_buffer blocks, codes, scales, offsets;
    int type;
    long long rows;
    if (!PyArg_ParseTuple(args, "y*iLw*w*z*:block_codes", &blocks, &type, &rows, &codes, &scales, &offsets))
        return NULL;
    PyObject *result = NULL;
    const bool shaped = rows > 0 && codes.len % rows == 0 && scales.len % (4 * rows) == 0 && (uintptr_t)scales.buf % 4 == 0;
    const int64_t k = shaped ? codes.len / rows : 0, groups = shaped ? scales.len / (4 * rows) : 0;
    const bool wanted = groups > 0 && k % groups == 0 && k / groups == (type == LCO_Q6_K ? 16 : 32);
    if (!wanted || (offsets.buf != NULL && (offsets.readonly || offsets.len != scales.len || (uintptr_t)offsets.buf % 4 != 0))) {
        PyErr_Format(PyExc_ValueError, "%zd bytes of codes, %zd of scales and %zd of offsets do not fit %lld rows of type %d", codes.len,
                     scales.len, offsets.buf != NULL ? offsets.len : 0, rows, type);
    } else {
        lco_error err;
        lco_status status;
        Py_BEGIN_ALLOW_THREADS status =
            lco_block_codes(type, blocks.buf, (size_t)blocks.len, rows, k, codes.buf, scales.buf, offsets.buf, &err);
        Py_END_ALLOW_THREADS if (status == LCO_OK) result = Py_NewRef(Py_None);
        else PyErr_SetString(PyExc_ValueError, err.text);
    }
    if (offsets.buf != NULL)
        PyBuffer_Release(&offsets);
    PyBuffer_Release(&scales);
    PyBuffer_Release(&codes);
    PyBuffer_Release(&blocks);
    return result;
}

static PyObject *convert(PyObject *module, PyObject *args)
{
    (void)module;
    Py_buffer in, out;
    const char *from_name, *to_name;
    if (!PyArg_ParseTuple(args, "y*sw*s:convert", &in, &from_name, &out, &to_name))
        return NULL;
    PyObject *result = NULL;
    lco_dtype from, to;
    Py_ssize_t n, n_out;
    int64_t lost = 0;
    if (dtype_of(from_name, &from) != 0 || dtype_of(to_name, &to) != 0)
        goto done;
    if ((n = elements_of(&in, from, "source")) < 0 || (n_out = elements_of(&out, to, "out")) < 0)
        goto done;
    if (n != n_out) {
        PyErr_Format(PyExc_ValueError, "out holds %zd values, source holds %zd", n_out, n);
        goto done;
    }
    Py_BEGIN_ALLOW_THREADS lco_convert(from, in.buf, to, out.buf, n, &lost);
    Py_END_ALLOW_THREADS result = PyLong_FromLongLong(lost);
done:
    PyBuffer_Release(&out);
    PyBuffer_Release(&in);
    return result;
}

static PyObject *unpack(PyObject *module, PyObject *args)
{
    (void)module;
    Py_buffer words, out;
    lco_packed packed = {0};
    long long line_stride, word_stride, line, lines, value, values;
    int kind, transposed;
    if (!PyArg_ParseTuple(args, "y*ii(LL)(LLLL)pw*:unpack", &words, &packed.bits, &kind, &line_stride, &word_stride, &line, &lines, &value,
                          &values, &transposed, &out))
        return NULL;
    PyObject *result = NULL;
    long long needed;
    if (words.len % 4 != 0 || (uintptr_t)words.buf % 4 != 0 || kind < LCO_PACK_STREAM || kind > LCO_PACK_AWQ) {
        PyErr_Format(PyExc_ValueError, "words: %zd bytes in packing %d; expected whole words at an aligned address, and packing 0 to 2",
                     words.len, kind);
    } else if (lines < 0 || values < 0 || __builtin_mul_overflow(lines, values, &needed) || needed != out.len) {
        PyErr_Format(PyExc_ValueError, "out has %zd bytes; expected one for each of %lld lines of %lld values", out.len, lines, values);
    } else {
        lco_error err;
        lco_status status;
        packed.words = words.buf;
        packed.n_words = words.len / 4;
        packed.kind = (lco_pack_kind)kind;
        packed.line_stride = line_stride;
        packed.word_stride = word_stride;
        const lco_packed_part part = {.line = line, .lines = lines, .value = value, .values = values};
        Py_BEGIN_ALLOW_THREADS status = lco_unpack(&packed, &part, transposed, out.buf, &err);
        Py_END_ALLOW_THREADS if (status == LCO_OK) result = Py_NewRef(Py_None);
        else PyErr_SetString(PyExc_ValueError, err.text);
    }
    PyBuffer_Release(&out);
    PyBuffer_Release(&words);
    return result;
}

static PyObject *dequantize_groups(PyObject *module, PyObject *args)
{
    (void)module;
    Py_buffer codes, scales, zeros, group_of, out;
    long long k, group_size;
    const char *name;
    if (!PyArg_ParseTuple(args, "y*Ly*y*z*Lw*s:dequantize_groups", &codes, &k, &scales, &zeros, &group_of, &group_size, &out, &name))
        return NULL;
    PyObject *result = NULL;
    lco_dtype dtype;
    Py_ssize_t n, n_scales;
    int64_t lost = 0;
    if (dtype_of(name, &dtype) != 0 || (n = elements_of(&out, dtype, "out")) < 0 ||
        (n_scales = elements_of(&scales, LCO_F32, "scales")) < 0)
        goto done;
    const int64_t rows = k > 0 ? n / k : 0;
    if (k < 1 || rows < 1 || n != codes.len || n % k != 0 || n_scales % rows != 0 || zeros.len != 2 * n_scales ||
        (uintptr_t)zeros.buf % 2 != 0 || (group_of.buf != NULL && (group_of.len != 4 * k || (uintptr_t)group_of.buf % 4 != 0))) {
        PyErr_Format(PyExc_ValueError,
                     "%zd codes in rows of %lld, %zd values of out, %zd scales, %zd bytes of zeros and %zd of group numbers do not fit",
                     codes.len, k, n, n_scales, zeros.len, group_of.buf != NULL ? group_of.len : 0);
        goto done;
    }
    lco_error err;
    lco_status status;
    const lco_grouped w = {.codes = codes.buf,
                           .scales = scales.buf,
                           .zeros = zeros.buf,
                           .group_of = group_of.buf,
                           .rows = rows,
                           .k = k,
                           .groups = n_scales / rows,
                           .group_size = group_size};
    Py_BEGIN_ALLOW_THREADS status = lco_dequantize_groups(&w, dtype, out.buf, &lost, &err);
    Py_END_ALLOW_THREADS if (status == LCO_OK) result = PyLong_FromLongLong(lost);
    else PyErr_SetString(PyExc_ValueError, err.text);
done:
    PyBuffer_Release(&out);
    if (group_of.buf != NULL)
        PyBuffer_Release(&group_of);
    PyBuffer_Release(&zeros);
    PyBuffer_Release(&scales);
    PyBuffer_Release(&codes);
    return result;
}

static const PyMethodDef methods[] = {
    {"dequantize", dequantize, METH_VARARGS,
     "dequantize(blocks, type, out, dtype)\n--\n\n"
     "Decodes GGUF blocks of type number `type` into the writable buffer `out` of `dtype` ('F32', 'F16', 'BF16').\n"
     "Returns how many values the dtype cannot hold (NaN, infinite, too large). ValueError when the sizes do not fit."},
    {"block_codes", block_codes, METH_VARARGS,
     "block_codes(blocks, type, rows, codes, scales, offsets)\n--\n\n"
     "The integers of GGUF blocks of `rows` rows: uint8 codes [rows, k] (of Q8_0 plus 128), float32 scales and offsets [k / group, rows];\n"
     "offsets is None for types without. ValueError when the sizes do not fit."},
    {"convert", convert, METH_VARARGS,
     "convert(source, from_dtype, out, to_dtype)\n--\n\n"
     "Converts between 'F32', 'F16' and 'BF16', rounding to nearest even, into the writable buffer `out`.\n"
     "Returns how many values the dtype cannot hold. ValueError when the sizes do not fit."},
    {"unpack", unpack, METH_VARARGS,
     "unpack(words, bits, kind, strides, part, transposed, out)\n--\n\n"
     "Unpacks integers of 2, 3, 4 or 8 bits from 32-bit words to one byte each. kind: 0 stream, 1 whole, 2 awq; strides: (line, word);\n"
     "part: (line, lines, value, values); out: uint8 [lines, values], or [values, lines] when transposed. csrc/model/unpack.h says more.\n"
     "ValueError when the part is not inside the words."},
    {"dequantize_groups", dequantize_groups, METH_VARARGS,
     "dequantize_groups(codes, k, scales, zeros, group_of, group_size, out, dtype)\n--\n\n"
     "out[r, c] = scales[r, g] * (codes[r, c] - zeros[r, g]): uint8 codes [rows, k], float32 scales and int16 zeros [rows, groups]; g is\n"
     "int32 group_of[c], or c // group_size when that is None. Returns how many values the dtype cannot hold. ValueError when the sizes\n"
     "do not fit or a column belongs to no group."},
    {NULL, NULL, 0, NULL},
};

int lco_py_add_dequant(PyObject *module) { return PyModule_AddFunctions(module, (PyMethodDef *)methods); }
