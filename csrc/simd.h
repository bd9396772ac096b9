// Loops compiled for several vector widths, the widest that the processor has chosen when the module is loaded.
#pragma once

// Sanitizers are not up yet when the loader chooses: they get the plain loop.
#if defined(__x86_64__) && defined(__GNUC__) && !defined(__clang__) && !defined(__SANITIZE_ADDRESS__) && \
    !defined(__SANITIZE_THREAD__)
#define PUAT_SIMD __attribute__((target_clones("arch=skylake-avx512", "avx2", "default")))
#else
#define PUAT_SIMD
#endif
