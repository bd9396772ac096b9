// Loops compiled for several vector widths, the widest that the processor has chosen when the module is loaded.
#pragma once

// The levels go by what the processor can do, and have FMA from v3 on. An older gcc knows only names of processors,
// skylake-avx512 being one generation of one vendor.
#if defined(__GNUC__) && __GNUC__ >= 12
#define PUAT_AVX512 "arch=x86-64-v4"
#define PUAT_AVX2 "arch=x86-64-v3"
#else
#define PUAT_AVX512 "arch=skylake-avx512"
#define PUAT_AVX2 "avx2"
#endif

// Sanitizers are not up yet when the loader chooses: they get the plain loop.
#if defined(__x86_64__) && defined(__GNUC__) && !defined(__clang__) && !defined(__SANITIZE_ADDRESS__) && \
    !defined(__SANITIZE_THREAD__)
#define PUAT_SIMD __attribute__((target_clones(PUAT_AVX512, PUAT_AVX2, "default")))
#else
#define PUAT_SIMD
#endif
