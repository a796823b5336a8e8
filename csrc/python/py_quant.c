/* The steps of the quantiser on the caller's buffers, as methods of OpContext. csrc/quant/quant.h says what they compute. */
#include "../quant/quant.h"
#include "ops_args.h"

const char lco_py_hessian_add_doc[] =
    "hessian_add(h, x)\n--\n\n"
    "h[i, j] += sum over rows of x[:, i] * x[:, j] for j <= i: float64 h[k, k], float32 x[m, k] with rows that\n"
    "may be strided. Products are summed in float32 within a call and added in float64.";

PyObject *lco_py_hessian_add(PyObject *object, PyObject *args, PyObject *kw)
{
    OpContext *self = (OpContext *)object;
    PyThreadState *state;
    PyObject *result = NULL, *h_o, *x_o;
    static const char *const names[] = {"h", "x", NULL};
    bag b = {.n = 0};
    const Py_buffer *h, *x;
    if (!PyArg_ParseTupleAndKeywords(args, kw, "OO:hessian_add", (char **)names, &h_o, &x_o))
        return NULL;
    if ((h = take(&b, h_o, "h", "d", 2, WRITE)) != NULL && (x = take(&b, x_o, "x", "f", 2, READ)) != NULL &&
        check_axis(h, "h", 0, x->shape[1]) && check_axis(h, "h", 1, x->shape[1]) && check_packed(h, "h") && (state = enter(self)) != NULL)
        result = leave(self, state, lco_hessian_add(h->buf, x->buf, x->shape[0], x->shape[1], row_stride(x), self->ops, &self->exec));
    bag_release(&b);
    return result;
}

/* True, False when the numbers did not allow it, or NULL with the exception of any other failure. */
static PyObject *leave_numeric(OpContext *self, PyThreadState *state, lco_status status)
{
    PyObject *result = leave(self, state, status == LCO_ENUMERIC ? LCO_OK : status);
    Py_XDECREF(result);
    return result == NULL ? NULL : PyBool_FromLong(status == LCO_OK);
}

const char lco_py_inverse_factor_doc[] =
    "inverse_factor(factor, h, order, damp)\n--\n\n"
    "With H the float64 h[k, k] of hessian_add (its lower triangle), damp added to its diagonal and rows and columns in the int32 "
    "order[k]:\n"
    "the upper triangular U of H^-1 = U.T @ U, as float32 factor[k, k] with U[i, j] = factor[k - 1 - j, k - 1 - i]; what lies below the\n"
    "diagonal of factor is scratch. Returns whether H is positive definite; when it is not, factor is scratch altogether.";

PyObject *lco_py_inverse_factor(PyObject *object, PyObject *args, PyObject *kw)
{
    OpContext *self = (OpContext *)object;
    PyThreadState *state;
    PyObject *result = NULL, *factor_o, *h_o, *order_o;
    static const char *const names[] = {"factor", "h", "order", "damp", NULL};
    double damp;
    bag b = {.n = 0};
    const Py_buffer *factor, *h, *order;
    if (!PyArg_ParseTupleAndKeywords(args, kw, "OOOd:inverse_factor", (char **)names, &factor_o, &h_o, &order_o, &damp))
        return NULL;
    if ((factor = take(&b, factor_o, "factor", "f", 2, WRITE)) == NULL || (h = take(&b, h_o, "h", "d", 2, READ)) == NULL ||
        (order = take(&b, order_o, "order", "i", 1, READ)) == NULL)
        goto done;
    const int64_t k = order->shape[0];
    const int32_t *at = order->buf;
    if (!check_axis(factor, "factor", 0, k) || !check_axis(factor, "factor", 1, k) || !check_axis(h, "h", 0, k) ||
        !check_axis(h, "h", 1, k) || !check_packed(factor, "factor") || !check_packed(h, "h") || !check_packed(order, "order"))
        goto done;
    for (int64_t i = 0; i < k; i++)
        if (!check(at[i] >= 0 && at[i] < k, "an element of order", at[i], "a row of h"))
            goto done;
    if ((state = enter(self)) != NULL)
        result = leave_numeric(self, state, lco_inverse_factor(factor->buf, h->buf, at, k, damp, self->ops, &self->exec));
done:
    bag_release(&b);
    return result;
}

const char lco_py_sweep_block_doc[] =
    "sweep_block(w, factor, codes, scales, zeros, loss, group_of, columns, bits, sym=True, find=True, least_zero=0, exponent=0.0)\n--\n\n"
    "GPTQ over columns (begin, end), at most 128, of float32 w[n, k], whose columns are in the order of the sweep and change; factor is\n"
    "inverse_factor's, or None for rounding to nearest. Fills uint8 codes[n, k]; scales (float32) and zeros (uint8) [n, groups] of the\n"
    "groups int32 group_of[k] that begin in the block, or uses those given when not find; adds to float64 loss[n]. exponent > 0 searches\n"
    "the range of a group. Returns False when a scale does not fit float16.";

static bool check_sweep(const lco_sweep *s, int64_t begin, int64_t end)
{
    if (!check(s->bits >= 2 && s->bits <= 8, "bits", s->bits, "2 to 8") ||
        !check(s->least_zero == 0 || s->least_zero == 1, "least_zero", s->least_zero, "0 or 1") ||
        !check(begin >= 0 && begin < end && end <= s->k, "the first of columns", begin, "columns of w, in order") ||
        !check(end - begin <= LCO_QUANT_BLOCK, "the number of columns", end - begin, "at most 128"))
        return false;
    for (int64_t i = 0; i < s->k; i++)
        if (!check(s->group_of[i] >= 0 && s->group_of[i] < s->groups, "an element of group_of", s->group_of[i], "a column of scales"))
            return false;
    return true;
}

PyObject *lco_py_sweep_block(PyObject *object, PyObject *args, PyObject *kw)
{
    OpContext *self = (OpContext *)object;
    PyThreadState *state;
    PyObject *result = NULL, *w_o, *factor_o, *given[5];
    static const char *const names[] = {"w",       "factor", "codes", "scales", "zeros",      "loss",     "group_of",
                                        "columns", "bits",   "sym",   "find",   "least_zero", "exponent", NULL};
    long long begin, end;
    int sym = 1, find = 1;
    lco_sweep s = {0};
    bag b = {.n = 0};
    const Py_buffer *w, *factor = NULL, *codes, *scales, *zeros, *loss, *group_of;
    if (!PyArg_ParseTupleAndKeywords(args, kw, "OOOOOOO(LL)i|ppif:sweep_block", (char **)names, &w_o, &factor_o, &given[0], &given[1],
                                     &given[2], &given[3], &given[4], &begin, &end, &s.bits, &sym, &find, &s.least_zero, &s.exponent))
        return NULL;
    if ((w = take(&b, w_o, "w", "f", 2, WRITE)) == NULL || (codes = take(&b, given[0], "codes", "B", 2, WRITE)) == NULL ||
        (scales = take(&b, given[1], "scales", "f", 2, WRITE)) == NULL || (zeros = take(&b, given[2], "zeros", "B", 2, WRITE)) == NULL ||
        (loss = take(&b, given[3], "loss", "d", 1, WRITE)) == NULL || (group_of = take(&b, given[4], "group_of", "i", 1, READ)) == NULL ||
        (factor_o != Py_None && (factor = take(&b, factor_o, "factor", "f", 2, READ)) == NULL))
        goto done;
    s.n = w->shape[0];
    s.k = w->shape[1];
    s.groups = scales->shape[1];
    if (!check_axis(codes, "codes", 0, s.n) || !check_axis(codes, "codes", 1, s.k) || !check_axis(scales, "scales", 0, s.n) ||
        !check_axis(zeros, "zeros", 0, s.n) || !check_axis(zeros, "zeros", 1, s.groups) || !check_axis(loss, "loss", 0, s.n) ||
        !check_axis(group_of, "group_of", 0, s.k) || !check_packed(w, "w") || !check_packed(codes, "codes") ||
        !check_packed(scales, "scales") || !check_packed(zeros, "zeros") || !check_packed(loss, "loss") ||
        !check_packed(group_of, "group_of"))
        goto done;
    if (factor != NULL &&
        (!check_axis(factor, "factor", 0, s.k) || !check_axis(factor, "factor", 1, s.k) || !check_packed(factor, "factor")))
        goto done;
    s.w = w->buf;
    s.factor = factor != NULL ? factor->buf : NULL;
    s.codes = codes->buf;
    s.scales = scales->buf;
    s.zeros = zeros->buf;
    s.loss = loss->buf;
    s.group_of = group_of->buf;
    s.sym = sym;
    s.find = find;
    if (check_sweep(&s, begin, end) && (state = enter(self)) != NULL)
        result = leave_numeric(self, state, lco_sweep_block(&s, begin, end, self->ops, &self->exec));
done:
    bag_release(&b);
    return result;
}
