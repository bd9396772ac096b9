#include "pgd_step_normalize.h"

#include "parallel.h"
#include "simd.h"

namespace puat {
namespace {

// Below this many pixels a thread, waking one costs more than it saves.
constexpr int64_t kGrain = 8192;

template <typename T, typename G>
inline __attribute__((always_inline)) void image(const PgdStepNormalize<T, G>& work, int64_t n) {
  for (int64_t p = 0; p < work.pixels; ++p) {
    float normalised[kColours];
    work.take(n, p, normalised);
    T* to = work.c_in.at(n, p);
    for (int c = 0; c < kColours; ++c) store(&to[c], normalised[c]);
    for (int c = kColours; c < work.channels; ++c) store(&to[c], 0.0f);
  }
}

template <typename T, typename G>
void run(const TensorView& x_adv, const TensorView& c_in, const TensorView& x, const TensorView& grad,
         const TensorView& x0, float eps, float step, const std::vector<float>& mean, const std::vector<float>& std,
         int threads) {
  const auto work = pgd_step_normalize_work<T, G>(x_adv, c_in, x, grad, x0, eps, step, mean, std);
  parallel_for(work.images, std::max<int64_t>(1, kGrain / work.pixels), threads, [&](int64_t begin, int64_t end) {
    for (int64_t n = begin; n < end; ++n) image(work, n);
  });
}

}  // namespace

void pgd_step_normalize_cpu(const TensorView& x_adv, const TensorView& c_in, const TensorView& x,
                            const TensorView& grad, const TensorView& x0, float eps, float step,
                            const std::vector<float>& mean, const std::vector<float>& std, int threads) {
  check_pgd_step_normalize(x_adv, c_in, x, grad, x0, mean, std, kDLCPU);
  if (x.numel == 0) return;
  const bool wide = c_in.dtype == DType::kFloat32, wide_grad = grad.dtype == DType::kFloat32;
  const auto kernel = wide ? (wide_grad ? run<float, float> : run<float, BFloat16>)
                           : (wide_grad ? run<BFloat16, float> : run<BFloat16, BFloat16>);
  kernel(x_adv, c_in, x, grad, x0, eps, step, mean, std, threads);
}

}  // namespace puat
