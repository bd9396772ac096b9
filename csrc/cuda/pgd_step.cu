#include "cuda/launch.cuh"
#include "pgd_step.h"

namespace puat {
namespace {

constexpr int kBlock = 256;

// Memory-bound: three streams in, one out, one pack a thread. Without alignment, and in the ragged last pack, the same
// elements one by one. No __restrict__: out may be x.
template <typename T, bool kAligned>
__global__ void __launch_bounds__(kBlock)
    pgd_step_kernel(T* out, const T* x, const T* grad, const T* x0, int64_t n, float eps, float step) {
  constexpr int kWidth = Pack<T>::kWidth;
  const int64_t begin = (static_cast<int64_t>(blockIdx.x) * kBlock + threadIdx.x) * kWidth;
  if (kAligned && begin + kWidth <= n) {
    Pack<T> result = *reinterpret_cast<const Pack<T>*>(x + begin);
    const Pack<T> gradient = *reinterpret_cast<const Pack<T>*>(grad + begin);
    const Pack<T> centre = *reinterpret_cast<const Pack<T>*>(x0 + begin);
#pragma unroll
    for (int i = 0; i < kWidth; ++i) {
      store(&result.value[i],
            pgd_step(to_float(result.value[i]), to_float(gradient.value[i]), to_float(centre.value[i]), eps, step));
    }
    *reinterpret_cast<Pack<T>*>(out + begin) = result;
    return;
  }
  for (int64_t i = begin; i < min(begin + kWidth, n); ++i) {
    store(&out[i], pgd_step(to_float(x[i]), to_float(grad[i]), to_float(x0[i]), eps, step));
  }
}

// L2: a block takes one sample, three times over it; from the second time on it comes from the caches.
constexpr int kL2Block = 512;
constexpr int kWarp = 32;

// Up to kWidth elements; zeros, which add nothing to a sum, beyond the end.
template <bool kAligned, typename T>
__device__ Pack<T> load(const T* from, int64_t count) {
  constexpr int kWidth = Pack<T>::kWidth;
  if (kAligned && count >= kWidth) return *reinterpret_cast<const Pack<T>*>(from);
  Pack<T> pack;
#pragma unroll
  for (int i = 0; i < kWidth; ++i) {
    if (i < count) {
      pack.value[i] = from[i];
    } else {
      store(&pack.value[i], 0.0f);
    }
  }
  return pack;
}

// The sum over the block, in every thread. The tree is fixed: the same bits every time. `shared` may be used again.
__device__ double block_sum(double value, double* shared) {
  constexpr int kWarps = kL2Block / kWarp;
  for (int distance = kWarp / 2; distance > 0; distance /= 2) value += __shfl_xor_sync(~0u, value, distance);
  if (threadIdx.x % kWarp == 0) shared[threadIdx.x / kWarp] = value;
  __syncthreads();
  double sum = 0.0;
#pragma unroll
  for (int warp = 0; warp < kWarps; ++warp) sum += shared[warp];
  __syncthreads();
  return sum;
}

// Who takes which element does not depend on kAligned, and so neither does the result. out may be x: each element is
// written by the thread that alone reads it from then on.
template <typename T, bool kAligned>
__global__ void __launch_bounds__(kL2Block) pgd_step_l2_kernel(T* out, const T* x, const T* grad, const T* x0,
                                                               int64_t samples, int64_t size, double eps, float step) {
  constexpr int kWidth = Pack<T>::kWidth;
  __shared__ double shared[kL2Block / kWarp];
  for (int64_t sample = blockIdx.x; sample < samples; sample += gridDim.x) {
    const int64_t begin = sample * size + threadIdx.x * kWidth, end = (sample + 1) * size;
    double sum = 0.0;
    for (int64_t at = begin; at < end; at += kL2Block * kWidth) {
      const Pack<T> gradient = load<kAligned>(grad + at, end - at);
#pragma unroll
      for (int i = 0; i < kWidth; ++i) {
        const double g = to_float(gradient.value[i]);
        sum += g * g;
      }
    }
    const float inverse = inverse_length(block_sum(sum, shared));
    sum = 0.0;
    for (int64_t at = begin; at < end; at += kL2Block * kWidth) {
      const Pack<T> point = load<kAligned>(x + at, end - at), gradient = load<kAligned>(grad + at, end - at);
      const Pack<T> centre = load<kAligned>(x0 + at, end - at);
#pragma unroll
      for (int i = 0; i < kWidth; ++i) {
        const float moved = l2_moved(to_float(point.value[i]), to_float(gradient.value[i]), inverse, step);
        const double offset = moved - to_float(centre.value[i]);
        sum += offset * offset;
      }
    }
    const float shrink = l2_shrink(block_sum(sum, shared), eps);
    for (int64_t at = begin; at < end; at += kL2Block * kWidth) {
      Pack<T> result = load<kAligned>(x + at, end - at);
      const Pack<T> gradient = load<kAligned>(grad + at, end - at), centre = load<kAligned>(x0 + at, end - at);
#pragma unroll
      for (int i = 0; i < kWidth; ++i) {
        const float moved = l2_moved(to_float(result.value[i]), to_float(gradient.value[i]), inverse, step);
        store(&result.value[i], l2_projected(moved, to_float(centre.value[i]), shrink));
      }
      if (kAligned && at + kWidth <= end) {
        *reinterpret_cast<Pack<T>*>(out + at) = result;
      } else {
#pragma unroll
        for (int i = 0; i < kWidth; ++i) {
          if (at + i < end) out[at + i] = result.value[i];
        }
      }
    }
  }
}

bool is_aligned(const TensorView& t) { return reinterpret_cast<uintptr_t>(t.data) % 16 == 0; }

template <typename T>
void launch(const TensorView& out, const TensorView& x, const TensorView& grad, const TensorView& x0, float eps,
            float step, cudaStream_t stream) {
  const int64_t per_block = int64_t{kBlock} * Pack<T>::kWidth;
  const auto blocks = static_cast<unsigned>((x.numel + per_block - 1) / per_block);
  const bool aligned = is_aligned(out) && is_aligned(x) && is_aligned(grad) && is_aligned(x0);
  const auto kernel = aligned ? pgd_step_kernel<T, true> : pgd_step_kernel<T, false>;
  kernel<<<blocks, kBlock, 0, stream>>>(out.as<T>(), x.as<T>(), grad.as<T>(), x0.as<T>(), x.numel, eps, step);
  check_cuda(cudaGetLastError(), "pgd_step");
}

template <typename T>
void launch_l2(const TensorView& out, const TensorView& x, const TensorView& grad, const TensorView& x0, double eps,
               float step, cudaStream_t stream) {
  const int64_t samples = x.shape[0], size = x.numel / samples;
  const auto blocks = static_cast<unsigned>(std::min<int64_t>(samples, INT32_MAX));
  const bool aligned = size % Pack<T>::kWidth == 0 && is_aligned(out) && is_aligned(x) && is_aligned(grad) &&
                       is_aligned(x0);  // then every sample begins aligned
  const auto kernel = aligned ? pgd_step_l2_kernel<T, true> : pgd_step_l2_kernel<T, false>;
  kernel<<<blocks, kL2Block, 0, stream>>>(out.as<T>(), x.as<T>(), grad.as<T>(), x0.as<T>(), samples, size, eps, step);
  check_cuda(cudaGetLastError(), "pgd_step_l2");
}

}  // namespace

void pgd_step_cuda(const TensorView& out, const TensorView& x, const TensorView& grad, const TensorView& x0, float eps,
                   float step, void* stream) {
  check_pgd_step(out, x, grad, x0, kDLCUDA);
  if (x.numel == 0) return;
  const DeviceGuard guard(x.device.device_id);
  const auto launcher = x.dtype == DType::kFloat32 ? launch<float> : launch<BFloat16>;
  launcher(out, x, grad, x0, eps, step, static_cast<cudaStream_t>(stream));
}

void pgd_step_l2_cuda(const TensorView& out, const TensorView& x, const TensorView& grad, const TensorView& x0,
                      double eps, float step, void* stream) {
  check_pgd_step_l2(out, x, grad, x0, kDLCUDA);
  if (x.numel == 0) return;
  const DeviceGuard guard(x.device.device_id);
  const auto launcher = x.dtype == DType::kFloat32 ? launch_l2<float> : launch_l2<BFloat16>;
  launcher(out, x, grad, x0, eps, step, static_cast<cudaStream_t>(stream));
}

}  // namespace puat
