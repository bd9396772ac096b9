#include "cuda/launch.cuh"
#include "pgd_step.h"

namespace puat {
namespace {

constexpr int kBlock = 256;

// 16 bytes, the widest load there is.
template <typename T>
struct alignas(16) Pack {
  static constexpr int kWidth = 16 / sizeof(T);
  T value[kWidth];
};

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

}  // namespace

void pgd_step_cuda(const TensorView& out, const TensorView& x, const TensorView& grad, const TensorView& x0, float eps,
                   float step, void* stream) {
  check_pgd_step(out, x, grad, x0, kDLCUDA);
  if (x.numel == 0) return;
  const DeviceGuard guard(x.device.device_id);
  const auto launcher = x.dtype == DType::kFloat32 ? launch<float> : launch<BFloat16>;
  launcher(out, x, grad, x0, eps, step, static_cast<cudaStream_t>(stream));
}

}  // namespace puat
