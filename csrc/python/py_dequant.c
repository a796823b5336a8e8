/* Weight conversion for the loaders: buffers in, caller-owned buffers out, the GIL released in between. */
#include "py_dequant.h"

#include <string.h>

#include "../model/dequant.h"

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

static const PyMethodDef methods[] = {
    {"dequantize", dequantize, METH_VARARGS,
     "dequantize(blocks, type, out, dtype)\n--\n\n"
     "Decodes GGUF blocks of type number `type` into the writable buffer `out` of `dtype` ('F32', 'F16', 'BF16').\n"
     "Returns how many values the dtype cannot hold (NaN, infinite, too large). ValueError when the sizes do not fit."},
    {"convert", convert, METH_VARARGS,
     "convert(source, from_dtype, out, to_dtype)\n--\n\n"
     "Converts between 'F32', 'F16' and 'BF16', rounding to nearest even, into the writable buffer `out`.\n"
     "Returns how many values the dtype cannot hold. ValueError when the sizes do not fit."},
    {NULL, NULL, 0, NULL},
};

int lco_py_add_dequant(PyObject *module) { return PyModule_AddFunctions(module, (PyMethodDef *)methods); }
