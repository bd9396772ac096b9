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

// The same partial sums whatever the vector width: every processor, as every number of threads, gives the same bits.
struct SumOfSquares {
  static constexpr int kLanes = 16;
  double lanes[kLanes] = {};

  PUAT_INLINE void add(const float* values, int64_t n) {
    int64_t i = 0;
    for (; i + kLanes <= n; i += kLanes) {
#pragma omp simd
      for (int lane = 0; lane < kLanes; ++lane) lanes[lane] += square(values[i + lane]);
    }
    for (int lane = 0; i + lane < n; ++lane) lanes[lane] += square(values[i + lane]);
  }

  PUAT_INLINE double total() const {
    double sum = 0.0;
    for (const double lane : lanes) sum += lane;
    return sum;
  }

 private:
  static PUAT_INLINE double square(double value) { return value * value; }
};

// One sample, three times over it; from the second time on it comes from the cache.
template <typename T>
PUAT_INLINE void l2_sample(T* out, const T* x, const T* grad, const T* x0, int64_t n, double eps, float step) {
  constexpr int64_t kTile = 16 * SumOfSquares::kLanes;
  float tile[kTile];
  SumOfSquares gradient, offset;
  for (int64_t i = 0; i < n; i += kTile) {
    const int64_t count = std::min(kTile, n - i);
#pragma omp simd
    for (int64_t j = 0; j < count; ++j) tile[j] = to_float(grad[i + j]);
    gradient.add(tile, count);
  }
  const float inverse = inverse_length(gradient.total());
  for (int64_t i = 0; i < n; i += kTile) {
    const int64_t count = std::min(kTile, n - i);
#pragma omp simd
    for (int64_t j = 0; j < count; ++j) {
      tile[j] = l2_moved(to_float(x[i + j]), to_float(grad[i + j]), inverse, step) - to_float(x0[i + j]);
    }
    offset.add(tile, count);
  }
  const float shrink = l2_shrink(offset.total(), eps);
  for (int64_t i = 0; i < n; i += kTile) {
    const int64_t count = std::min(kTile, n - i);
#pragma omp simd
    for (int64_t j = 0; j < count; ++j) tile[j] = l2_moved(to_float(x[i + j]), to_float(grad[i + j]), inverse, step);
#pragma omp simd
    for (int64_t j = 0; j < count; ++j) store(&out[i + j], l2_projected(tile[j], to_float(x0[i + j]), shrink));
  }
}

PUAT_SIMD void run_l2(float* out, const float* x, const float* grad, const float* x0, int64_t n, double eps,
                      float step) {
  l2_sample(out, x, grad, x0, n, eps, step);
}

PUAT_SIMD void run_l2(BFloat16* out, const BFloat16* x, const BFloat16* grad, const BFloat16* x0, int64_t n, double eps,
                      float step) {
  l2_sample(out, x, grad, x0, n, eps, step);
}

template <typename T>
void run_l2_parallel(const TensorView& out_view, const TensorView& x_view, const TensorView& grad_view,
                     const TensorView& x0_view, double eps, float step, int threads) {
  T* out = out_view.as<T>();
  const T* x = x_view.as<T>();
  const T* grad = grad_view.as<T>();
  const T* x0 = x0_view.as<T>();
  const int64_t samples = x_view.shape[0], size = x_view.numel / samples;
  const int64_t grain = std::max<int64_t>(1, kGrain / size);
  parallel_for(samples, grain, threads, [=](int64_t begin, int64_t end) {
    for (int64_t at = begin * size; at < end * size; at += size) {
      run_l2(out + at, x + at, grad + at, x0 + at, size, eps, step);
    }
  });
}

}  // namespace

void pgd_step_cpu(const TensorView& out, const TensorView& x, const TensorView& grad, const TensorView& x0, float eps,
                  float step, int threads) {
  check_pgd_step(out, x, grad, x0, kDLCPU);
  const auto kernel = x.dtype == DType::kFloat32 ? run_parallel<float> : run_parallel<BFloat16>;
  kernel(out, x, grad, x0, eps, step, threads);
}

void pgd_step_l2_cpu(const TensorView& out, const TensorView& x, const TensorView& grad, const TensorView& x0,
                     double eps, float step, int threads) {
  check_pgd_step_l2(out, x, grad, x0, kDLCPU);
  if (x.numel == 0) return;
  const auto kernel = x.dtype == DType::kFloat32 ? run_l2_parallel<float> : run_l2_parallel<BFloat16>;
  kernel(out, x, grad, x0, eps, step, threads);
}

}  // namespace puat
