// What the scalar formulas that CPU and CUDA share are written with.
#pragma once

#ifdef __CUDACC__
#define PUAT_HOST_DEVICE __host__ __device__
#else
#define PUAT_HOST_DEVICE
#endif

// Inlined whatever the compiler thinks of it: a loop with a call in it is not vectorised.
#define PUAT_INLINE PUAT_HOST_DEVICE __attribute__((always_inline)) inline

namespace puat {

// a * b, rounded before anything is added: nvcc would fuse the two, and round elsewhere than the reference does.
PUAT_INLINE float product(float a, float b) {
#ifdef __CUDA_ARCH__
  return __fmul_rn(a, b);
#else
  return a * b;
#endif
}

}  // namespace puat
