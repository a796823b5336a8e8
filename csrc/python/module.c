/* Module definition, error mapping and shared helpers of llmcoopt._core. */
#include "module.h"

#include <string.h>

#include "py_dequant.h"
#include "py_ops.h"
#include "py_pack.h"

static const char *const ERROR_NAMES[N_STATUS] = {
    [LCO_EINVAL] = "ArgumentError",   [LCO_ENOMEM] = "OutOfMemoryError",       [LCO_EFORMAT] = "FormatError",
    [LCO_EPAGES] = "OutOfPagesError", [LCO_ENUMERIC] = "NumericError",         [LCO_EFORK] = "ForkError",
    [LCO_EIO] = "StorageError",       [LCO_EUNSUPPORTED] = "UnsupportedError",
};

core_state *lco_py_state(PyObject *self) { return PyType_GetModuleState(Py_TYPE(self)); }

PyObject *lco_py_raise(PyObject *self, const lco_error *err)
{
    PyErr_SetString(lco_py_state(self)->errors[err->code], err->text);
    return NULL;
}

PyObject *lco_py_none(PyObject *self, lco_status status, const lco_error *err)
{
    return status == LCO_OK ? Py_NewRef(Py_None) : lco_py_raise(self, err);
}

lco_status lco_py_lock_nogil(model_object *model, lco_error *err)
{
    lco_status status = lco_owner_check(model->owner, err);
    if (status == LCO_OK)
        PyThread_acquire_lock(model->lock, WAIT_LOCK);
    return status;
}

void lco_py_unlock_nogil(model_object *model) { PyThread_release_lock(model->lock); }

int lco_py_get_ids(PyObject *self, PyObject *object, const char *what, Py_buffer *out)
{
    if (PyObject_GetBuffer(object, out, PyBUF_FORMAT | PyBUF_ND) != 0)
        return -1;
    if (out->itemsize == 4 && out->ndim == 1 && out->format != NULL && (strcmp(out->format, "i") == 0 || strcmp(out->format, "l") == 0))
        return 0;
    PyErr_Format(lco_py_state(self)->errors[LCO_EINVAL], "%s: expected a one-dimensional int32 array, found %d dimensions of format '%s'",
                 what, out->ndim, out->format != NULL ? out->format : "B");
    PyBuffer_Release(out);
    return -1;
}

static PyObject *mem_fail_at(PyObject *Py_UNUSED(module), PyObject *arg)
{
    long long n = PyLong_AsLongLong(arg);
    if (n == -1 && PyErr_Occurred())
        return NULL;
    return PyLong_FromLongLong(lco_mem_fail_at(n));
}

static PyObject *mem_live(PyObject *Py_UNUSED(module), PyObject *Py_UNUSED(arg)) { return PyLong_FromLongLong(lco_mem_live()); }

static PyMethodDef methods[] = {
    {"mem_fail_at", mem_fail_at, METH_O,
     "mem_fail_at(n)\n--\n\nMake the n-th native allocation from now fail, once (0: off). For fault tests."},
    {"mem_live", mem_live, METH_NOARGS, "mem_live()\n--\n\nNative blocks allocated and not freed, in this process. For leak tests."},
    {NULL, NULL, 0, NULL},
};

static int add_type(PyObject *module, PyType_Spec *spec, PyTypeObject **out)
{
    *out = (PyTypeObject *)PyType_FromModuleAndSpec(module, spec, NULL);
    return *out == NULL ? -1 : PyModule_AddType(module, *out);
}

static int find_errors(core_state *state)
{
    PyObject *module = PyImport_ImportModule("llmcoopt.errors");
    if (module == NULL)
        return -1;
    int result = 0;
    for (int i = LCO_EINVAL; i < N_STATUS && result == 0; i++) {
        state->errors[i] = PyObject_GetAttrString(module, ERROR_NAMES[i]);
        result = state->errors[i] == NULL ? -1 : 0;
    }
    Py_DECREF(module);
    return result;
}

static int exec_module(PyObject *module)
{
    core_state *state = PyModule_GetState(module);
    if (find_errors(state) != 0 || add_type(module, &lco_py_model_spec, &state->model_type) != 0 ||
        add_type(module, &lco_py_cache_spec, &state->cache_type) != 0 ||
        add_type(module, &lco_py_sequence_spec, &state->sequence_type) != 0 ||
        add_type(module, &lco_py_engine_spec, &state->engine_type) != 0)
        return -1;
    return lco_py_add_ops(module) != 0 || lco_py_add_dequant(module) != 0 || lco_py_add_pack(module) != 0 ? -1 : 0;
}

static int traverse_module(PyObject *module, visitproc visit, void *arg)
{
    core_state *state = PyModule_GetState(module);
    for (int i = LCO_EINVAL; i < N_STATUS; i++)
        Py_VISIT(state->errors[i]);
    Py_VISIT(state->model_type);
    Py_VISIT(state->cache_type);
    Py_VISIT(state->sequence_type);
    Py_VISIT(state->engine_type);
    return 0;
}

static int clear_module(PyObject *module)
{
    core_state *state = PyModule_GetState(module);
    for (int i = LCO_EINVAL; i < N_STATUS; i++)
        Py_CLEAR(state->errors[i]);
    Py_CLEAR(state->model_type);
    Py_CLEAR(state->cache_type);
    Py_CLEAR(state->sequence_type);
    Py_CLEAR(state->engine_type);
    return 0;
}

static void free_module(void *module) { clear_module(module); }

static PyModuleDef_Slot slots[] = {
    {Py_mod_exec, exec_module},
    {0, NULL},
};

static struct PyModuleDef definition = {
    PyModuleDef_HEAD_INIT,
    .m_name = "llmcoopt._core",
    .m_doc = "The native core of llmcoopt. Use the classes of the package llmcoopt; these are what they are made of.",
    .m_size = sizeof(core_state),
    .m_methods = methods,
    .m_slots = slots,
    .m_traverse = traverse_module,
    .m_clear = clear_module,
    .m_free = free_module,
};

PyMODINIT_FUNC PyInit__core(void) { return PyModuleDef_Init(&definition); }
