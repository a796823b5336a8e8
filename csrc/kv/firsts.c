/* What lies beside a page that a text begins with: its first tokens in 16 bit, in address space of its own that takes memory as it is written. It
 * stays in memory wherever the page goes. */
#define _GNU_SOURCE
#include <errno.h>
#include <string.h>
#include <sys/mman.h>

#include "internal.h"

lco_status lco_firsts_create(lco_kv *kv, lco_error *err)
{
    for (int32_t i = 0; i < kv->options.n_layers; i++)
        kv->first_bytes += lco_first_bytes(&kv->views[i]);
    if (kv->first_bytes == 0)
        return LCO_OK;
    void *space =
        mmap(NULL, kv->first_bytes * (size_t)kv->n_pages, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0);
    if (space == MAP_FAILED)
        return lco_fail(err, LCO_ENOMEM, "address space for the first tokens of %lld pages could not be reserved: %s",
                        (long long)kv->n_pages, strerror(errno));
    kv->firsts = space;
    size_t at = 0;
    for (int32_t i = 0; i < kv->options.n_layers; i++) {
        kv->views[i].firsts = kv->firsts + at;
        kv->views[i].firsts_stride = kv->first_bytes;
        at += lco_first_bytes(&kv->views[i]);
    }
    return LCO_OK;
}

void lco_firsts_destroy(lco_kv *kv)
{
    if (kv->firsts != NULL)
        munmap(kv->firsts, kv->first_bytes * (size_t)kv->n_pages);
}

void lco_firsts_release(lco_kv *kv, int32_t page)
{
    if (kv->first_bytes > 0 && kv->begins[page])
        lco_kv_unmap(kv, kv->firsts + (size_t)page * kv->first_bytes, kv->first_bytes);
}

void lco_firsts_copy(lco_kv *kv, int32_t to, int32_t from)
{
    kv->begins[to] = kv->begins[from];
    if (kv->first_bytes > 0 && kv->begins[from])
        memcpy(kv->firsts + (size_t)to * kv->first_bytes, kv->firsts + (size_t)from * kv->first_bytes, kv->first_bytes);
}
