// Loops compiled for several vector widths, the widest that the processor has chosen when the module is loaded.
#pragma once

// A name of a processor is asked for as such (of AVX-512 machines, one generation of one vendor); x86-64-v4 by
// features.
#if defined(__GNUC__) && __GNUC__ >= 12
#define PUAT_AVX512 "arch=x86-64-v4"
#else
#define PUAT_AVX512 "arch=skylake-avx512"
#endif

// Sanitizers are not up yet when the loader chooses: they get the plain loop.
#if defined(__x86_64__) && defined(__GNUC__) && !defined(__clang__) && !defined(__SANITIZE_ADDRESS__) && \
    !defined(__SANITIZE_THREAD__)
#define PUAT_SIMD __attribute__((target_clones(PUAT_AVX512, "avx2", "default")))
#else
#define PUAT_SIMD
#endif
