/* Taps of Model.forward: buffers of the caller that a forward pass copies activations into. Python code looks at them afterwards, without the
 * model's lock, so that it may do anything: use the model, raise, or be interrupted. */
#ifndef LCO_PYTHON_PY_TAPS_H
#define LCO_PYTHON_PY_TAPS_H

#include "module.h"

typedef struct {
    lco_tap_point point;
    int64_t layer;
    Py_buffer to; /* float32 [rows, lco_tap_width()] */
} lco_taps_place;

typedef struct {
    lco_taps_place *places;
    Py_ssize_t n;
} lco_taps;

/* From a list of (point, layer, float32 array); -1 with an exception. The caller releases it in any case. */
int lco_taps_take(PyObject *self, PyObject *list, lco_taps *taps);
void lco_taps_release(lco_taps *taps);
/* LCO_EINVAL when a layer is not of the model or an array has another size. */
lco_status lco_taps_check(const lco_taps *taps, const lco_model_config *config, int64_t rows, lco_error *err);
/* lco_tap's function; its context is an lco_taps. */
void lco_taps_see(void *ctx, lco_tap_point point, int64_t layer, const float *rows, int64_t n_floats);

#endif
