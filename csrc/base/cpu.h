/* Which instruction sets this CPU has and the operating system saves (CPUID and XGETBV). */
#ifndef LCO_BASE_CPU_H
#define LCO_BASE_CPU_H

#include <stdbool.h>

typedef struct {
    bool avx2;        /* AVX2, FMA, F16C, with ymm state */
    bool avx512;      /* F, BW, DQ, VL, with zmm state */
    bool avx512_bf16; /* vdpbf16ps */
    bool
        fast_bf16; /* AMD: vdpbf16ps does twice the work of float32 FMA, on Intel half; and subnormal factors cost nothing there, on Intel a
                         trap each (benchmarks/results/LOG.md) */
    bool avx512_vnni;
    bool avx512_fp16;
    bool amx_bf16; /* tiles usable: permission asked from the kernel once and granted */
    bool amx_int8;
} lco_cpu;

/* Asks the CPU; for AMX it asks Linux for permission to use tile data (a process-wide setting that stays). */
lco_cpu lco_cpu_detect(void);

#endif
