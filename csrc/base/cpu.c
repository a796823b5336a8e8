#define _GNU_SOURCE
#include "cpu.h"

#if defined(__x86_64__)
#include <cpuid.h>
#include <stdint.h>
#include <sys/syscall.h>
#include <unistd.h>

#define XCR0_YMM 0x6u
#define XCR0_ZMM 0xE6u
#define XCR0_TILE 0x60000u
#define ARCH_REQ_XCOMP_PERM 0x1023
#define XFEATURE_XTILEDATA 18

static uint64_t saved_state(void)
{
    uint32_t low, high;
    __asm__ volatile("xgetbv" : "=a"(low), "=d"(high) : "c"(0));
    return ((uint64_t)high << 32) | low;
}

static bool bit(uint32_t word, int n) { return (word >> n) & 1; }

lco_cpu lco_cpu_detect(void)
{
    lco_cpu cpu = {0};
    uint32_t a, b, c, d;
    if (!__get_cpuid(0, &a, &b, &c, &d))
        return cpu;
    const bool amd = b == signature_AMD_ebx && c == signature_AMD_ecx && d == signature_AMD_edx;
    if (!__get_cpuid(1, &a, &b, &c, &d) || !bit(c, 27)) /* OSXSAVE */
        return cpu;
    bool fma = bit(c, 12), avx = bit(c, 28), f16c = bit(c, 29);
    uint64_t state = saved_state();
    if (!__get_cpuid_count(7, 0, &a, &b, &c, &d))
        return cpu;
    uint32_t b7 = b, c7 = c, d7 = d, a71 = 0;
    if (__get_cpuid_count(7, 1, &a, &b, &c, &d))
        a71 = a;
    cpu.avx2 = avx && fma && f16c && bit(b7, 5) && (state & XCR0_YMM) == XCR0_YMM;
    cpu.avx512 = cpu.avx2 && bit(b7, 16) && bit(b7, 17) && bit(b7, 30) && bit(b7, 31) && (state & XCR0_ZMM) == XCR0_ZMM;
    cpu.avx512_vnni = cpu.avx512 && bit(c7, 11);
    cpu.avx512_fp16 = cpu.avx512 && bit(d7, 23);
    cpu.avx512_bf16 = cpu.avx512 && bit(a71, 5);
    cpu.fast_bf16 = cpu.avx512_bf16 && amd;
    if (cpu.avx512_bf16 && bit(d7, 24) && (state & XCR0_TILE) == XCR0_TILE &&
        syscall(SYS_arch_prctl, ARCH_REQ_XCOMP_PERM, XFEATURE_XTILEDATA) == 0) {
        cpu.amx_bf16 = bit(d7, 22);
        cpu.amx_int8 = bit(d7, 25);
    }
    return cpu;
}
#else
lco_cpu lco_cpu_detect(void) { return (lco_cpu){0}; }
#endif
