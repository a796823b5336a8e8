#include "qweight.h"

#include "convert.h"
#include "mem.h"

lco_status lco_qweight_check(const lco_qweight *q, lco_error *err)
{
    const int64_t most = (int64_t)1 << 31;
    if (q->magic != LCO_QWEIGHT_MAGIC)
        return lco_fail(err, LCO_EINVAL, "a quantised weight begins with %08x, expected %08x", q->magic, LCO_QWEIGHT_MAGIC);
    if (q->bits != 4 && q->bits != 8)
        return lco_fail(err, LCO_EINVAL, "a quantised weight of %d bits, expected 4 or 8", q->bits);
    if (q->block < 8 || q->block > LCO_LARGEST_BLOCK || q->block % 8 != 0)
        return lco_fail(err, LCO_EINVAL, "a quantised weight with blocks of %d inputs, expected a multiple of 8 up to %d", q->block,
                        LCO_LARGEST_BLOCK);
    if (q->scale_dtype > LCO_BF16 || q->offset_kind > LCO_OFFSET_FLOATS || q->ordered > 1)
        return lco_fail(err, LCO_EINVAL, "a quantised weight with scales of type %d, offsets of kind %d, order %d", q->scale_dtype,
                        q->offset_kind, q->ordered);
    if (q->n < 1 || q->k < 1 || q->n > most || q->k > most)
        return lco_fail(err, LCO_EINVAL, "a quantised weight of [%lld, %lld]", (long long)q->n, (long long)q->k);
    return LCO_OK;
}

static lco_status check_order(const lco_qweight *q, lco_error *err)
{
    const int32_t *order = lco_qweight_order(q);
    bool *seen = lco_calloc((size_t)q->k, sizeof *seen);
    if (seen == NULL)
        return lco_fail(err, LCO_ENOMEM, "out of memory for the order of %lld inputs", (long long)q->k);
    lco_status status = LCO_OK;
    for (int64_t j = 0; status == LCO_OK && j < q->k; j++) {
        if (order[j] < 0 || order[j] >= q->k || seen[order[j]])
            status = lco_fail(err, LCO_EINVAL, "order[%lld] of a quantised weight is %d, expected each of 0 to %lld once", (long long)j,
                              order[j], (long long)q->k - 1);
        else
            seen[order[j]] = true;
    }
    lco_free(seen);
    return status;
}

lco_status lco_qweight_check_bytes(const void *data, size_t bytes, lco_error *err)
{
    const lco_qweight *q = data;
    if (bytes < sizeof *q || (uintptr_t)data % 64 != 0)
        return lco_fail(err, LCO_EINVAL, "a quantised weight of %zu bytes at %p, expected a header of %zu at a multiple of 64", bytes, data,
                        sizeof *q);
    lco_status status = lco_qweight_check(q, err);
    if (status != LCO_OK)
        return status;
    if (bytes != lco_qweight_bytes(q))
        return lco_fail(err, LCO_EINVAL, "a quantised weight [%lld, %lld] of %d bits has %zu bytes, expected %zu", (long long)q->n,
                        (long long)q->k, q->bits, bytes, lco_qweight_bytes(q));
    return q->ordered ? check_order(q, err) : LCO_OK;
}

void lco_qweight_row(const lco_qweight *q, int64_t n, float *out)
{
    const lco_dtype dtype = (lco_dtype)q->scale_dtype;
    const uint8_t *block = lco_qweight_panel(q, n / LCO_PANEL_ROWS);
    const int64_t row = n % LCO_PANEL_ROWS;
    const int32_t *order = lco_qweight_order(q);
    for (int64_t k0 = 0; k0 < q->k; k0 += q->block, block += lco_block_bytes(q)) {
        const int64_t left = q->k - k0, inputs = left < q->block ? left : q->block;
        const uint8_t *offsets = block + lco_block_offsets(q);
        const float scale = lco_element(block + lco_block_scales(q), row, dtype);
        const float offset = q->offset_kind == LCO_OFFSET_FLOATS ? lco_element(offsets, row, dtype) : 0;
        const int zero = lco_qweight_neutral(q) + (q->offset_kind == LCO_OFFSET_ZEROS ? ((const int8_t *)offsets)[row] : 0);
        for (int64_t i = 0; i < inputs; i++)
            out[order != NULL ? order[k0 + i] : k0 + i] = scale * (float)(lco_block_code(q, block, row, i) - zero) + offset;
    }
}
