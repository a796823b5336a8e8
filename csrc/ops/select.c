/* The one file that names all implementations. */
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

#include "../base/cpu.h"
#include "impl.h"

static const lco_ops REF = {
    .name = "ref",
    .detail = "portable C",
    .embed = lco_ref_embed,
    .rmsnorm = lco_ref_rmsnorm,
    .linear = lco_ref_linear,
    .linear_quantized = lco_ref_linear_quantized,
    .swiglu = lco_ref_swiglu,
    .mlp = lco_ref_mlp,
    .rope_append = lco_ref_rope_append,
    .attention = lco_ref_attention,
    .choose_pages = lco_ref_choose_pages,
};

#if defined(__x86_64__)
#define AVX512_COMMON                                                                                                                      \
    .embed = lco_ref_embed, .rmsnorm = lco_avx512_rmsnorm, .swiglu = lco_avx512_swiglu, .rope_append = lco_avx512_rope_append,             \
    .choose_pages = lco_avx512_choose_pages

static const lco_ops AVX2 = {
    .name = "avx2",
    .detail = "AVX2, FMA, F16C",
    .embed = lco_ref_embed,
    .rmsnorm = lco_avx2_rmsnorm,
    .linear = lco_avx2_linear,
    .linear_quantized = lco_avx2_linear_quantized,
    .swiglu = lco_avx2_swiglu,
    .mlp = lco_avx2_mlp,
    .rope_append = lco_avx2_rope_append,
    .attention = lco_avx2_attention,
    .choose_pages = lco_avx2_choose_pages,
};
static const lco_ops AVX512 = {.name = "avx512",
                               .detail = "AVX-512",
                               .linear = lco_avx512_linear,
                               .linear_quantized = lco_avx2_linear_quantized,
                               .mlp = lco_avx512_mlp,
                               .attention = lco_avx512_attention,
                               AVX512_COMMON};
static const lco_ops AVX512_VNNI = {.name = "avx512",
                                    .detail = "AVX-512 with VNNI",
                                    .linear = lco_avx512_linear,
                                    .linear_quantized = lco_avx512_linear_quantized,
                                    .mlp = lco_avx512_mlp,
                                    .attention = lco_avx512_attention,
                                    AVX512_COMMON};
static const lco_ops AVX512_BF16 = {.name = "avx512",
                                    .detail = "AVX-512 with BF16",
                                    .linear = lco_avx512_linear_bf16,
                                    .linear_quantized = lco_avx512_linear_quantized_plain,
                                    .mlp = lco_avx512_mlp_bf16,
                                    .attention = lco_avx512_attention_shifts,
                                    AVX512_COMMON};
static const lco_ops AMX = {.name = "amx",
                            .detail = "AVX-512, AMX with BF16 tiles",
                            .linear = lco_amx_linear,
                            .linear_quantized = lco_amx_linear_quantized,
                            .mlp = lco_amx_mlp,
                            .attention = lco_amx_attention,
                            AVX512_COMMON};
#endif

#define MAX_TABLES 4

/* The tables this CPU can run, best last. */
static int usable(const lco_ops **tables)
{
    int n = 0;
    tables[n++] = &REF;
#if defined(__x86_64__)
    lco_cpu cpu = lco_cpu_detect();
    if (cpu.avx2)
        tables[n++] = &AVX2;
    if (cpu.avx512)
        tables[n++] = cpu.fast_bf16 ? &AVX512_BF16 : cpu.avx512_vnni ? &AVX512_VNNI : &AVX512;
    if (cpu.amx_bf16 && cpu.amx_int8)
        tables[n++] = &AMX;
#endif
    return n;
}

int lco_ops_available(const char **names, int cap)
{
    const lco_ops *tables[MAX_TABLES];
    int n = usable(tables);
    for (int i = 0; i < n && i < cap; i++)
        names[i] = tables[i]->name;
    return n;
}

lco_status lco_ops_select(const char *isa, const lco_ops **out, lco_error *err)
{
    const lco_ops *tables[MAX_TABLES];
    int n = usable(tables);
    const char *source = "isa";
    *out = NULL;
    if (isa == NULL) {
        isa = getenv("LLMCOOPT_ISA");
        source = "LLMCOOPT_ISA";
    }
    if (isa == NULL || isa[0] == '\0') {
        *out = tables[n - 1];
        return LCO_OK;
    }
    char have[64] = "";
    for (int i = 0; i < n; i++) {
        if (strcmp(isa, tables[i]->name) == 0) {
            *out = tables[i];
            return LCO_OK;
        }
        snprintf(have + strlen(have), sizeof have - strlen(have), "%s%s", i > 0 ? ", " : "", tables[i]->name);
    }
    static const char *const KNOWN[] = {"ref", "avx2", "avx512", "amx"};
    for (size_t i = 0; i < sizeof KNOWN / sizeof KNOWN[0]; i++)
        if (strcmp(isa, KNOWN[i]) == 0)
            return lco_fail(err, LCO_EUNSUPPORTED, "%s = '%s', but this CPU has only: %s", source, isa, have);
    return lco_fail(err, LCO_EINVAL, "%s = '%s' is not an instruction set; expected one of ref, avx2, avx512, amx (this CPU has: %s)",
                    source, isa, have);
}
