/* _core.Engine: requests in, events out. */
#include <string.h>

#include "module.h"

typedef struct {
    PyObject_HEAD cache_object *cache;
    lco_engine *_Atomic engine; /* NULL after close() */
    int64_t cap;                /* events that a step may have */
    PyObject *sequences;        /* dict: request id -> Sequence in use; NULL when close() is done */
} engine_object;

static const char *const FINISH_NAMES[] = {
    [LCO_FINISH_EOS] = "eos", [LCO_FINISH_LENGTH] = "length", [LCO_FINISH_CANCELLED] = "cancelled", [LCO_FINISH_ERROR] = "error"};

static void drop_user(cache_object *cache)
{
    if (--cache->users == 0 && cache->closing)
        lco_py_cache_release(cache);
}

static PyObject *engine_new(PyTypeObject *type, PyObject *args, PyObject *kwargs)
{
    static char *names[] = {"cache", "max_batch", "chunk", NULL};
    core_state *state = PyType_GetModuleState(type);
    PyObject *cache;
    long long max_batch = 0, chunk = 0;
    if (!PyArg_ParseTupleAndKeywords(args, kwargs, "O!|LL", names, state->cache_type, &cache, &max_batch, &chunk))
        return NULL;
    cache_object *owner = (cache_object *)cache;
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
    if (self->sequences != NULL) {
        lco_status status;
        lco_model *model;
        lco_kv *kv;
        lco_engine *engine = NULL;
        owner->users++;
        LOCKED(owner->model, (model = lco_py_model_nogil(owner->model, &err)) && (kv = lco_py_cache_nogil(owner, &err)),
               status = lco_engine_create(model, kv, &options, &engine, &err));
        self->engine = engine;
        if (status == LCO_OK)
            return (PyObject *)self;
        drop_user(owner);
        lco_py_raise((PyObject *)self, &err);
    }
    Py_DECREF(self);
    return NULL;
}

static void mark_busy(engine_object *self, PyObject *id, int change)
{
    PyObject *sequence = self->sequences != NULL ? PyDict_GetItem(self->sequences, id) : NULL;
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
    while (self->sequences != NULL && PyDict_Next(self->sequences, &at, &id, &sequence))
        ((sequence_object *)sequence)->busy--;
    Py_CLEAR(self->sequences);
}

static void engine_release(engine_object *self)
{
    lco_error err;
    lco_status status;
    lco_engine *engine = atomic_exchange(&self->engine, NULL);
    if (engine == NULL)
        return;
    LOCKED(self->cache->model, true, lco_engine_destroy(engine));
    release_sequences(self);
    drop_user(self->cache);
}

static void engine_dealloc(engine_object *self)
{
    PyTypeObject *type = Py_TYPE((PyObject *)self);
    engine_release(self);
    Py_XDECREF(self->sequences);
    Py_XDECREF((PyObject *)self->cache);
    freefunc release = (freefunc)PyType_GetSlot(type, Py_tp_free);
    release(self);
    Py_DECREF(type);
}

static lco_engine *engine_nogil(engine_object *self, lco_error *err)
{
    lco_engine *engine = self->engine;
    if (engine == NULL)
        lco_fail(err, LCO_EINVAL, "this generation is closed: close() was called, by this thread or another");
    return engine;
}

/* For calls that use the model. */
static lco_engine *running_engine_nogil(engine_object *self, lco_error *err)
{
    lco_engine *engine = engine_nogil(self, err);
    return engine != NULL && lco_py_model_nogil(self->cache->model, err) != NULL ? engine : NULL;
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
    if (sequence->cache != self->cache || sequence->busy) {
        PyErr_SetString(state->errors[LCO_EINVAL], sequence->busy ? "sequence: another running generation or another thread uses it"
                                                                  : "sequence: it belongs to another cache");
        return -1;
    }
    *out = sequence;
    return 0;
}

/* Keeps the claim on the sequence until the request ends. */
static PyObject *note_request(engine_object *self, int64_t id, sequence_object *sequence)
{
    lco_error err;
    lco_status status;
    lco_engine *engine;
    PyObject *number = PyLong_FromLongLong(id);
    if (sequence == NULL)
        return number;
    if (number != NULL && self->sequences != NULL && PyDict_SetItem(self->sequences, number, (PyObject *)sequence) == 0)
        return number;
    LOCKED(self->cache->model, (engine = engine_nogil(self, &err)), lco_engine_cancel(engine, id));
    sequence->busy--;
    Py_XDECREF(number);
    return PyErr_Occurred() != NULL ? NULL : lco_py_raise((PyObject *)self, &err);
}

static PyObject *add_request(engine_object *self, lco_request *request, sequence_object *sequence)
{
    lco_error err;
    lco_status status;
    lco_engine *engine;
    int64_t id = 0;
    if (sequence != NULL)
        sequence->busy++;
    LOCKED(self->cache->model,
           (engine = running_engine_nogil(self, &err)) &&
               (sequence == NULL || (request->sequence = lco_py_sequence_nogil(sequence, &err)) != NULL),
           status = lco_engine_add(engine, request, &id, &err));
    if (status == LCO_OK)
        return note_request(self, id, sequence);
    if (sequence != NULL)
        sequence->busy--;
    return lco_py_raise((PyObject *)self, &err);
}

static PyObject *engine_add(engine_object *self, PyObject *args, PyObject *kwargs)
{
    static char *names[] = {"prompt", "max_new_tokens", "eos",   "ignore_eos",         "min_new_tokens", "do_sample", "temperature",
                            "top_k",  "top_p",          "min_p", "repetition_penalty", "seed",           "sequence",  NULL};
    PyObject *prompt_object, *eos_object, *sequence_object_;
    lco_request request = {0};
    int ignore_eos, do_sample, top_k;
    unsigned long long seed;
    long long max_new, min_new;
    lco_sampling *s = &request.sampling;
    if (!PyArg_ParseTupleAndKeywords(args, kwargs, "OLOpLpfifffKO", names, &prompt_object, &max_new, &eos_object, &ignore_eos, &min_new,
                                     &do_sample, &s->temperature, &top_k, &s->top_p, &s->min_p, &s->repetition_penalty, &seed,
                                     &sequence_object_))
        return NULL;
    sequence_object *sequence;
    Py_buffer prompt, eos;
    if (get_sequence(self, sequence_object_, &sequence) != 0)
        return NULL;
    if (lco_py_get_ids((PyObject *)self, prompt_object, "prompt", &prompt) != 0)
        return NULL;
    PyObject *id = NULL;
    if (lco_py_get_ids((PyObject *)self, eos_object, "eos", &eos) == 0) {
        request.prompt = prompt.buf;
        request.n_prompt = prompt.len / 4;
        request.max_new_tokens = max_new;
        request.min_new_tokens = min_new;
        request.eos = eos.buf;
        request.n_eos = (int32_t)(eos.len / 4);
        request.ignore_eos = ignore_eos;
        s->do_sample = do_sample;
        s->top_k = top_k;
        s->seed = seed;
        id = add_request(self, &request, sequence);
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
    lco_engine *engine;
    int64_t n = 0;
    if (!PyList_Check(list)) {
        PyErr_SetString(PyExc_TypeError, "events: expected a list");
        return NULL;
    }
    lco_event *events = PyMem_Malloc((size_t)self->cap * sizeof *events);
    if (events == NULL)
        return PyErr_NoMemory();
    LOCKED(self->cache->model, (engine = running_engine_nogil(self, &err)), status = lco_engine_step(engine, events, self->cap, &n, &err));
    int result = 0;
    if (status != LCO_OK)
        lco_py_raise((PyObject *)self, &err);
    for (int64_t i = 0; i < n && result == 0; i++) {
        PyObject *event = event_tuple(self, &events[i]);
        result = event != NULL ? PyList_Append(list, event) : -1;
        Py_XDECREF(event);
    }
    PyMem_Free(events);
    return status == LCO_OK && result == 0 ? Py_NewRef(Py_None) : NULL;
}

static PyObject *engine_cancel(engine_object *self, PyObject *arg)
{
    lco_error err;
    lco_status status;
    lco_engine *engine;
    long long id = PyLong_AsLongLong(arg);
    if (id == -1 && PyErr_Occurred())
        return NULL;
    /* Looked up before: a request that another thread adds meanwhile keeps its sequence. */
    const bool noted = self->sequences != NULL && PyDict_GetItem(self->sequences, arg) != NULL;
    LOCKED(self->cache->model, (engine = engine_nogil(self, &err)), lco_engine_cancel(engine, id));
    if (status != LCO_OK)
        return lco_py_raise((PyObject *)self, &err);
    if (noted)
        mark_busy(self, arg, -1);
    Py_RETURN_NONE;
}

static PyObject *engine_stats(engine_object *self, PyObject *Py_UNUSED(arg))
{
    lco_error err;
    lco_status status;
    lco_engine *engine;
    lco_engine_stats s = {0};
    LOCKED(self->cache->model, (engine = engine_nogil(self, &err)), s = lco_engine_get_stats(engine));
    if (status != LCO_OK)
        return lco_py_raise((PyObject *)self, &err);
    return Py_BuildValue("{s:L,s:L,s:L,s:L,s:L,s:L,s:L,s:d,s:d,s:d}", "steps", s.steps, "prompt_tokens", s.prompt_tokens, "decode_tokens",
                         s.decode_tokens, "cached_tokens", s.cached_tokens, "waiting", s.waiting, "running", s.running, "preemptions",
                         s.preemptions, "forward_seconds", s.forward_seconds, "sample_seconds", s.sample_seconds, "other_seconds",
                         s.other_seconds);
}

static PyObject *engine_check(engine_object *self, PyObject *Py_UNUSED(arg))
{
    lco_error err;
    lco_status status;
    lco_engine *engine;
    LOCKED(self->cache->model, (engine = engine_nogil(self, &err)), status = lco_engine_check(engine, &err));
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
     "sequence)\n--\n\nQueue a request; returns its number. prompt and eos are int32 arrays."},
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
