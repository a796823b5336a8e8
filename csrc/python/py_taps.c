#include "py_taps.h"

#include <string.h>

static const char *const POINTS[LCO_TAP_POINTS] = {
    [LCO_TAP_ATTENTION_INPUT] = "attention_input",
    [LCO_TAP_Q] = "q",
    [LCO_TAP_K] = "k",
    [LCO_TAP_V] = "v",
    [LCO_TAP_ATTENDED] = "attended",
    [LCO_TAP_MLP_INPUT] = "mlp_input",
    [LCO_TAP_DOWN_INPUT] = "down_input",
    [LCO_TAP_HIDDEN] = "hidden",
};

static int take_place(PyObject *self, PyObject *item, lco_taps_place *place)
{
    PyObject *errors = lco_py_state(self)->errors[LCO_EINVAL], *array;
    const char *name;
    long long layer;
    if (!PyTuple_Check(item) || !PyArg_ParseTuple(item, "sLO", &name, &layer, &array)) {
        if (!PyErr_Occurred())
            PyErr_SetString(PyExc_TypeError, "taps: expected tuples of (point, layer, array)");
        return -1;
    }
    int point = 0;
    while (point < LCO_TAP_POINTS && strcmp(name, POINTS[point]) != 0)
        point++;
    if (point == LCO_TAP_POINTS) {
        PyErr_Format(errors, "taps: there is no point '%s'", name);
        return -1;
    }
    if (PyObject_GetBuffer(array, &place->to, PyBUF_WRITABLE | PyBUF_FORMAT | PyBUF_C_CONTIGUOUS) != 0)
        return -1;
    place->point = (lco_tap_point)point;
    place->layer = layer;
    if (place->to.format != NULL && strcmp(place->to.format, "f") == 0)
        return 0;
    PyErr_Format(errors, "taps: the array of '%s' of layer %lld is not float32", name, layer);
    PyBuffer_Release(&place->to);
    return -1;
}

int lco_taps_take(PyObject *self, PyObject *list, lco_taps *taps)
{
    const Py_ssize_t n = PyList_Size(list);
    *taps = (lco_taps){.places = PyMem_Calloc((size_t)n + 1, sizeof *taps->places)};
    if (taps->places == NULL) {
        PyErr_NoMemory();
        return -1;
    }
    for (; taps->n < n; taps->n++)
        if (take_place(self, PyList_GetItem(list, taps->n), &taps->places[taps->n]) != 0)
            return -1;
    return 0;
}

void lco_taps_release(lco_taps *taps)
{
    while (taps->n > 0)
        PyBuffer_Release(&taps->places[--taps->n].to);
    PyMem_Free(taps->places);
    taps->places = NULL;
}

lco_status lco_taps_check(const lco_taps *taps, const lco_model_config *config, int64_t rows, lco_error *err)
{
    for (Py_ssize_t i = 0; i < taps->n; i++) {
        const lco_taps_place *p = &taps->places[i];
        const int64_t n = config->n_layers, width = lco_tap_width(config, p->point);
        if (p->point == LCO_TAP_HIDDEN ? p->layer != n : p->layer < 0 || p->layer >= n)
            return lco_fail(err, LCO_EINVAL, "taps: '%s' of layer %lld; the model has %lld layers", POINTS[p->point], (long long)p->layer,
                            (long long)n);
        if (p->to.len != rows * width * (int64_t)sizeof(float))
            return lco_fail(err, LCO_EINVAL, "taps: the array of '%s' of layer %lld has %lld bytes, expected %lld rows of %lld float32",
                            POINTS[p->point], (long long)p->layer, (long long)p->to.len, (long long)rows, (long long)width);
    }
    return LCO_OK;
}

void lco_taps_see(void *ctx, lco_tap_point point, int64_t layer, const float *rows, int64_t n_floats)
{
    const lco_taps *taps = ctx;
    for (Py_ssize_t i = 0; i < taps->n; i++)
        if (taps->places[i].point == point && taps->places[i].layer == layer)
            memcpy(taps->places[i].to.buf, rows, (size_t)n_floats * sizeof(float));
}
