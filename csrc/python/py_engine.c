/* _core.Engine: requests in, events out. */
#include <string.h>

#include "module.h"

typedef struct {
    PyObject_HEAD cache_object *cache;
    lco_engine *engine; /* NULL after close() */
    lco_event *events;
    int64_t cap;
    PyObject *sequences; /* dict: request id -> Sequence in use */
} engine_object;

static const char *const FINISH_NAMES[] = {
    [LCO_FINISH_EOS] = "eos", [LCO_FINISH_LENGTH] = "length", [LCO_FINISH_CANCELLED] = "cancelled", [LCO_FINISH_ERROR] = "error"};

static PyObject *engine_new(PyTypeObject *type, PyObject *args, PyObject *kwargs)
{
    static char *names[] = {"cache", "max_batch", "chunk", NULL};
    core_state *state = PyType_GetModuleState(type);
    PyObject *cache;
    long long max_batch = 0, chunk = 0;
    if (!PyArg_ParseTupleAndKeywords(args, kwargs, "O!|LL", names, state->cache_type, &cache, &max_batch, &chunk))
        return NULL;
    cache_object *owner = (cache_object *)cache;
    if (lco_py_cache(owner) == NULL || lco_py_model(owner->model) == NULL)
        return NULL;
    allocfunc alloc = (allocfunc)PyType_GetSlot(type, Py_tp_alloc);
    engine_object *self = (engine_object *)alloc(type, 0);
    if (self == NULL)
        return NULL;
    lco_engine_options options = {.max_batch = max_batch, .chunk = chunk};
    lco_error err;
    Py_INCREF((PyObject *)owner);
    self->cache = owner;
    self->cap = max_batch > 0 ? max_batch : 64;
    self->sequences = PyDict_New();
    if (self->sequences == NULL)
        goto fail;
    lco_status status;
    LOCKED(owner->model, status = lco_engine_create(owner->model->model, owner->kv, &options, &self->engine, &err));
    if (status != LCO_OK) {
        lco_py_raise((PyObject *)self, &err);
        goto fail;
    }
    owner->users++;
    self->events = PyMem_Calloc((size_t)self->cap, sizeof *self->events);
    if (self->events != NULL)
        return (PyObject *)self;
    PyErr_NoMemory();
fail:
    Py_DECREF(self);
    return NULL;
}

static void mark_busy(engine_object *self, PyObject *id, int change)
{
    PyObject *sequence = PyDict_GetItem(self->sequences, id);
    if (sequence == NULL)
        return;
    ((sequence_object *)sequence)->busy += change;
    if (change < 0)
        PyDict_DelItem(self->sequences, id);
}

static void release_sequences(engine_object *self)
{
    PyObject *id, *sequence;
    Py_ssize_t at = 0;
    while (PyDict_Next(self->sequences, &at, &id, &sequence))
        ((sequence_object *)sequence)->busy--;
    PyDict_Clear(self->sequences);
}

static void engine_release(engine_object *self)
{
    if (self->engine == NULL)
        return;
    lco_py_lock_nogil(self->cache->model);
    lco_engine_destroy(self->engine);
    lco_py_unlock_nogil(self->cache->model);
    self->engine = NULL;
    self->cache->users--;
    release_sequences(self);
}

static void engine_dealloc(engine_object *self)
{
    PyTypeObject *type = Py_TYPE((PyObject *)self);
    engine_release(self);
    PyMem_Free(self->events);
    Py_XDECREF(self->sequences);
    Py_XDECREF((PyObject *)self->cache);
    freefunc release = (freefunc)PyType_GetSlot(type, Py_tp_free);
    release(self);
    Py_DECREF(type);
}

static lco_engine *open_engine(engine_object *self)
{
    if (self->engine == NULL)
        PyErr_SetString(lco_py_state((PyObject *)self)->errors[LCO_EINVAL], "this engine is closed");
    else if (lco_py_model(self->cache->model) != NULL)
        return self->engine;
    return NULL;
}

/* A sequence to go on with: NULL in *out for None; -1 with an exception when it can't be used. */
static int get_sequence(engine_object *self, PyObject *object, sequence_object **out)
{
    core_state *state = lco_py_state((PyObject *)self);
    *out = NULL;
    if (object == Py_None)
        return 0;
    if (Py_TYPE(object) != state->sequence_type) {
        PyErr_SetString(state->errors[LCO_EINVAL], "sequence: expected a Sequence or None");
        return -1;
    }
    sequence_object *sequence = (sequence_object *)object;
    if (lco_py_sequence(sequence) == NULL)
        return -1;
    if (sequence->cache != self->cache || sequence->busy) {
        PyErr_SetString(state->errors[LCO_EINVAL],
                        sequence->busy ? "sequence: another running generation uses it" : "sequence: it belongs to another cache");
        return -1;
    }
    *out = sequence;
    return 0;
}

static PyObject *add_request(engine_object *self, const lco_request *request, sequence_object *sequence)
{
    lco_error err;
    lco_status status;
    int64_t id = 0;
    LOCKED(self->cache->model, status = lco_engine_add(self->engine, request, &id, &err));
    if (status != LCO_OK)
        return lco_py_raise((PyObject *)self, &err);
    PyObject *number = PyLong_FromLongLong(id);
    if (number == NULL || sequence == NULL)
        return number;
    if (PyDict_SetItem(self->sequences, number, (PyObject *)sequence) == 0) {
        sequence->busy++;
        return number;
    }
    LOCKED(self->cache->model, lco_engine_cancel(self->engine, id));
    Py_DECREF(number);
    return NULL;
}

static PyObject *engine_add(engine_object *self, PyObject *args, PyObject *kwargs)
{
    static char *names[] = {"prompt",      "max_new_tokens", "eos",   "ignore_eos", "min_new_tokens",     "do_sample",
                            "temperature", "top_k",          "top_p", "min_p",      "repetition_penalty", "seed",
                            "sequence",    "history",        NULL};
    PyObject *prompt_object, *eos_object, *sequence_object_, *history_object;
    lco_request request = {0};
    int ignore_eos, do_sample, top_k;
    unsigned long long seed;
    long long max_new, min_new;
    lco_sampling *s = &request.sampling;
    if (!PyArg_ParseTupleAndKeywords(args, kwargs, "OLOpLpfifffKOO", names, &prompt_object, &max_new, &eos_object, &ignore_eos, &min_new,
                                     &do_sample, &s->temperature, &top_k, &s->top_p, &s->min_p, &s->repetition_penalty, &seed,
                                     &sequence_object_, &history_object))
        return NULL;
    sequence_object *sequence;
    Py_buffer prompt, eos, history;
    if (open_engine(self) == NULL || get_sequence(self, sequence_object_, &sequence) != 0)
        return NULL;
    if (lco_py_get_ids((PyObject *)self, prompt_object, "prompt", &prompt) != 0)
        return NULL;
    PyObject *id = NULL;
    if (lco_py_get_ids((PyObject *)self, eos_object, "eos", &eos) == 0) {
        if (lco_py_get_ids((PyObject *)self, history_object, "history", &history) == 0) {
            request.prompt = prompt.buf;
            request.n_prompt = prompt.len / 4;
            request.max_new_tokens = max_new;
            request.min_new_tokens = min_new;
            request.eos = eos.buf;
            request.n_eos = (int32_t)(eos.len / 4);
            request.ignore_eos = ignore_eos;
            request.history = history.buf;
            request.n_history = history.len / 4;
            request.sequence = sequence != NULL ? sequence->seq : NULL;
            s->do_sample = do_sample;
            s->top_k = top_k;
            s->seed = seed;
            id = add_request(self, &request, sequence);
            PyBuffer_Release(&history);
        }
        PyBuffer_Release(&eos);
    }
    PyBuffer_Release(&prompt);
    return id;
}

/* (request, token, logprob, finish or None, exception or None) */
static PyObject *event_tuple(engine_object *self, const lco_event *event)
{
    PyObject *error = NULL;
    if (event->finish == LCO_FINISH_ERROR) {
        error = PyObject_CallFunction(lco_py_state((PyObject *)self)->errors[event->error.code], "s", event->error.text);
        if (error == NULL)
            return NULL;
    }
    PyObject *id = PyLong_FromLongLong(event->request);
    if (id == NULL) {
        Py_XDECREF(error);
        return NULL;
    }
    if (event->finish != LCO_FINISH_NONE)
        mark_busy(self, id, -1);
    return Py_BuildValue("(NifzN)", id, event->token, (double)event->logprob,
                         event->finish == LCO_FINISH_NONE ? NULL : FINISH_NAMES[event->finish], error != NULL ? error : Py_NewRef(Py_None));
}

/* Events go into the caller's list before this returns: a signal that arrives meanwhile can't lose them. */
static PyObject *engine_step(engine_object *self, PyObject *list)
{
    lco_error err;
    lco_status status;
    int64_t n = 0;
    if (open_engine(self) == NULL)
        return NULL;
    if (!PyList_Check(list)) {
        PyErr_SetString(PyExc_TypeError, "events: expected a list");
        return NULL;
    }
    LOCKED(self->cache->model, status = self->cache->model->model == NULL
                                            ? lco_fail(&err, LCO_EINVAL, "this model was closed by another thread")
                                            : lco_engine_step(self->engine, self->events, self->cap, &n, &err));
    if (status != LCO_OK)
        return lco_py_raise((PyObject *)self, &err);
    for (int64_t i = 0; i < n; i++) {
        PyObject *event = event_tuple(self, &self->events[i]);
        int result = event != NULL ? PyList_Append(list, event) : -1;
        Py_XDECREF(event);
        if (result != 0)
            return NULL;
    }
    Py_RETURN_NONE;
}

static PyObject *engine_cancel(engine_object *self, PyObject *arg)
{
    long long id = PyLong_AsLongLong(arg);
    if ((id == -1 && PyErr_Occurred()) || open_engine(self) == NULL)
        return NULL;
    LOCKED(self->cache->model, lco_engine_cancel(self->engine, id));
    mark_busy(self, arg, -1);
    Py_RETURN_NONE;
}

static PyObject *engine_stats(engine_object *self, PyObject *Py_UNUSED(arg))
{
    if (open_engine(self) == NULL)
        return NULL;
    lco_engine_stats s = lco_engine_get_stats(self->engine);
    return Py_BuildValue("{s:L,s:L,s:L,s:L,s:L,s:L,s:d,s:d,s:d}", "steps", s.steps, "prompt_tokens", s.prompt_tokens, "decode_tokens",
                         s.decode_tokens, "waiting", s.waiting, "running", s.running, "preemptions", s.preemptions, "forward_seconds",
                         s.forward_seconds, "sample_seconds", s.sample_seconds, "other_seconds", s.other_seconds);
}

static PyObject *engine_check(engine_object *self, PyObject *Py_UNUSED(arg))
{
    lco_error err;
    lco_status status;
    if (open_engine(self) == NULL)
        return NULL;
    LOCKED(self->cache->model, status = lco_engine_check(self->engine, &err));
    if (status != LCO_OK)
        return lco_py_raise((PyObject *)self, &err);
    Py_RETURN_NONE;
}

static PyObject *engine_close(engine_object *self, PyObject *Py_UNUSED(arg))
{
    engine_release(self);
    Py_RETURN_NONE;
}

static PyMethodDef methods[] = {
    {"add", (PyCFunction)(void (*)(void))engine_add, METH_VARARGS | METH_KEYWORDS,
     "add(prompt, max_new_tokens, eos, ignore_eos, min_new_tokens, do_sample, temperature, top_k, top_p, min_p, repetition_penalty, seed, "
     "sequence, "
     "history)\n--\n\nQueue a request; returns its number. prompt, eos and history are int32 arrays."},
    {"step", (PyCFunction)(void (*)(void))engine_step, METH_O,
     "step(events)\n--\n\nRun one step; appends (request, token, logprob, finish or None, exception or None) to the list `events`."},
    {"cancel", (PyCFunction)(void (*)(void))engine_cancel, METH_O, "cancel(request)\n--\n\nEnd a request at once and return its pages."},
    {"stats", (PyCFunction)(void (*)(void))engine_stats, METH_NOARGS, "stats()\n--\n\nSteps, tokens, queue lengths and seconds as a dict."},
    {"check", (PyCFunction)(void (*)(void))engine_check, METH_NOARGS, "check()\n--\n\nProve the engine's invariants."},
    {"close", (PyCFunction)(void (*)(void))engine_close, METH_NOARGS, "close()\n--\n\nEnd all requests."},
    {NULL, NULL, 0, NULL},
};

static PyType_Slot slots[] = {
    {Py_tp_new, engine_new},
    {Py_tp_dealloc, engine_dealloc},
    {Py_tp_methods, methods},
    {Py_tp_doc, "Engine(cache, max_batch=64, chunk=512)\n--\n\nContinuous batching over one cache."},
    {0, NULL},
};

PyType_Spec lco_py_engine_spec = {
    .name = "llmcoopt._core.Engine",
    .basicsize = sizeof(engine_object),
    .flags = Py_TPFLAGS_DEFAULT | Py_TPFLAGS_IMMUTABLETYPE,
    .slots = slots,
};
