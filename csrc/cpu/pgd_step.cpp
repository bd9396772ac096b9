#include "pgd_step.h"

#include "parallel.h"
#include "simd.h"

namespace puat {
namespace {

// Below this many elements a thread, waking one costs more than it saves.
constexpr int64_t kGrain = 32768;

// out may be x, but only element for element, which no vector width disturbs.
PUAT_SIMD void run(float* out, const float* x, const float* grad, const float* x0, int64_t n, float eps, float step) {
#pragma omp simd
  for (int64_t i = 0; i < n; ++i) out[i] = pgd_step(x[i], grad[i], x0[i], eps, step);
}

PUAT_SIMD void run(BFloat16* out, const BFloat16* x, const BFloat16* grad, const BFloat16* x0, int64_t n, float eps,
                   float step) {
#pragma omp simd
  for (int64_t i = 0; i < n; ++i) {
    store(&out[i], pgd_step(to_float(x[i]), to_float(grad[i]), to_float(x0[i]), eps, step));
  }
}

template <typename T>
void run_parallel(const TensorView& out_view, const TensorView& x_view, const TensorView& grad_view,
                  const TensorView& x0_view, float eps, float step, int threads) {
  T* out = out_view.as<T>();
  const T* x = x_view.as<T>();
  const T* grad = grad_view.as<T>();
  const T* x0 = x0_view.as<T>();
  parallel_for(x_view.numel, kGrain, threads, [=](int64_t begin, int64_t end) {
    run(out + begin, x + begin, grad + begin, x0 + begin, end - begin, eps, step);
  });
}

}  // namespace

void pgd_step_cpu(const TensorView& out, const TensorView& x, const TensorView& grad, const TensorView& x0, float eps,
                  float step, int threads) {
  check_pgd_step(out, x, grad, x0, kDLCPU);
  const auto kernel = x.dtype == DType::kFloat32 ? run_parallel<float> : run_parallel<BFloat16>;
  kernel(out, x, grad, x0, eps, step, threads);
}

}  // namespace puat
