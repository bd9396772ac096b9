#include "pgd_step_normalize.h"

#include "parallel.h"
#include "simd.h"

namespace puat {
namespace {

// Below this many pixels a thread, waking one costs more than it saves.
constexpr int64_t kGrain = 8192;
constexpr int64_t kTile = 256;

// kStride, kChannels: known to the compiler, which then knows how to shuffle; 0: any.
template <int kStride, typename T>
PUAT_INLINE void gather(float* to, const T* from, int64_t any_stride, int64_t n) {
  const int64_t stride = kStride ? kStride : any_stride;
#pragma omp simd
  for (int64_t i = 0; i < n; ++i) to[i] = to_float(from[i * stride]);
}

template <typename T>
PUAT_INLINE void gather(float* to, const T* from, int64_t stride, int64_t n) {
  if (stride == 1) return gather<1>(to, from, stride, n);
  if (stride == 3) return gather<3>(to, from, stride, n);
  if (stride == 8) return gather<8>(to, from, stride, n);
  gather<0>(to, from, stride, n);
}

template <int kChannels, typename T>
PUAT_INLINE void interleave(T* to, const float (&from)[kColours][kTile], int64_t any_channels, int64_t n) {
  const int64_t channels = kChannels ? kChannels : any_channels;
#pragma omp simd
  for (int64_t i = 0; i < n; ++i) {
    for (int c = 0; c < kColours; ++c) store(&to[i * channels + c], from[c][i]);
    for (int c = kColours; c < channels; ++c) store(&to[i * channels + c], 0.0f);
  }
}

// A tile of pixels, colour by colour in the order of planes; then c_in, pixel by pixel.
template <typename T, typename G>
PUAT_INLINE void tile(const PgdStepNormalize<T, G>& work, int64_t n, int64_t begin, int64_t count) {
  float point[kTile], gradient[kTile], centre[kTile], input[kColours][kTile];
  for (int c = 0; c < kColours; ++c) {
    gather(point, work.x.at(n, begin) + c * work.x.channel, work.x.pixel, count);
    gather(gradient, work.grad.at(n, begin) + c * work.grad.channel, work.grad.pixel, count);
    gather(centre, work.x0.at(n, begin) + c * work.x0.channel, work.x0.pixel, count);
    const float eps = work.eps, step = work.step, mean = work.mean[c], std = work.std[c];
#pragma omp simd
    for (int64_t i = 0; i < count; ++i) {
      point[i] = pgd_step(point[i], gradient[i], centre[i], eps, step);
      input[c][i] = normalized(point[i], mean, std);
    }
    float* x_adv = work.x_adv.at(n, begin) + c * work.x_adv.channel;
    if (work.x_adv.pixel == 1) {
      std::copy_n(point, count, x_adv);
    } else {
      for (int64_t i = 0; i < count; ++i) x_adv[i * work.x_adv.pixel] = point[i];
    }
  }
  T* c_in = work.c_in.at(n, begin);
  if (work.channels == 3) return interleave<3>(c_in, input, 3, count);
  if (work.channels == 8) return interleave<8>(c_in, input, 8, count);
  interleave<0>(c_in, input, work.channels, count);
}

PUAT_SIMD void run(const PgdStepNormalize<float, float>& work, int64_t n, int64_t begin, int64_t count) {
  tile(work, n, begin, count);
}

PUAT_SIMD void run(const PgdStepNormalize<float, BFloat16>& work, int64_t n, int64_t begin, int64_t count) {
  tile(work, n, begin, count);
}

PUAT_SIMD void run(const PgdStepNormalize<BFloat16, float>& work, int64_t n, int64_t begin, int64_t count) {
  tile(work, n, begin, count);
}

PUAT_SIMD void run(const PgdStepNormalize<BFloat16, BFloat16>& work, int64_t n, int64_t begin, int64_t count) {
  tile(work, n, begin, count);
}

template <typename T, typename G>
void run_parallel(const TensorView& x_adv, const TensorView& c_in, const TensorView& x, const TensorView& grad,
                  const TensorView& x0, float eps, float step, const std::vector<float>& mean,
                  const std::vector<float>& std, int threads) {
  const auto work = pgd_step_normalize_work<T, G>(x_adv, c_in, x, grad, x0, eps, step, mean, std);
  parallel_for(work.images, std::max<int64_t>(1, kGrain / work.pixels), threads, [&](int64_t begin, int64_t end) {
    for (int64_t n = begin; n < end; ++n) {
      for (int64_t p = 0; p < work.pixels; p += kTile) run(work, n, p, std::min(kTile, work.pixels - p));
    }
  });
}

}  // namespace

void pgd_step_normalize_cpu(const TensorView& x_adv, const TensorView& c_in, const TensorView& x,
                            const TensorView& grad, const TensorView& x0, float eps, float step,
                            const std::vector<float>& mean, const std::vector<float>& std, int threads) {
  check_pgd_step_normalize(x_adv, c_in, x, grad, x0, mean, std, kDLCPU);
  if (x.numel == 0) return;
  const bool wide = c_in.dtype == DType::kFloat32, wide_grad = grad.dtype == DType::kFloat32;
  const auto kernel = wide ? (wide_grad ? run_parallel<float, float> : run_parallel<float, BFloat16>)
                           : (wide_grad ? run_parallel<BFloat16, float> : run_parallel<BFloat16, BFloat16>);
  kernel(x_adv, c_in, x, grad, x0, eps, step, mean, std, threads);
}

}  // namespace puat
