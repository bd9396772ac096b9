#include "cuda/launch.cuh"
#include "pgd_step_normalize.h"

namespace puat {
namespace {

constexpr int kBlock = 256;

// Memory-bound: a thread takes a pixel, so that planes are read in full lines, and c_in, where its channels fill packs
// of 16 bytes, is written in them.
template <typename T, typename G, bool kPacked>
__global__ void __launch_bounds__(kBlock) pgd_step_normalize_kernel(const PgdStepNormalize<T, G> work) {
  constexpr int kWidth = Pack<T>::kWidth;
  const int64_t n = blockIdx.x;
  for (int64_t p = int64_t{blockIdx.y} * kBlock + threadIdx.x; p < work.pixels; p += int64_t{gridDim.y} * kBlock) {
    float point[kColours], gradient[kColours], centre[kColours], input[kColours];
#pragma unroll
    for (int c = 0; c < kColours; ++c) {  // all loads before the first store, past which none could be moved
      point[c] = work.x.at(n, p)[c * work.x.channel];
      gradient[c] = to_float(work.grad.at(n, p)[c * work.grad.channel]);
      centre[c] = work.x0.at(n, p)[c * work.x0.channel];
    }
#pragma unroll
    for (int c = 0; c < kColours; ++c) {
      point[c] = pgd_step(point[c], gradient[c], centre[c], work.eps, work.step);
      work.x_adv.at(n, p)[c * work.x_adv.channel] = point[c];
      input[c] = normalized(point[c], work.mean[c], work.std[c]);
    }
    T* c_in = work.c_in.at(n, p);
    if (kPacked) {
      Pack<T> pack;
#pragma unroll
      for (int c = 0; c < kWidth; ++c) store(&pack.value[c], c < kColours ? input[c] : 0.0f);
      *reinterpret_cast<Pack<T>*>(c_in) = pack;
#pragma unroll
      for (int c = 0; c < kColours; ++c) store(&pack.value[c], 0.0f);
      for (int c = kWidth; c < work.channels; c += kWidth) *reinterpret_cast<Pack<T>*>(c_in + c) = pack;
    } else {
#pragma unroll
      for (int c = 0; c < kColours; ++c) store(&c_in[c], input[c]);
      for (int c = kColours; c < work.channels; ++c) store(&c_in[c], 0.0f);
    }
  }
}

template <typename T, typename G>
void launch(const TensorView& x_adv, const TensorView& c_in, const TensorView& x, const TensorView& grad,
            const TensorView& x0, float eps, float step, const std::vector<float>& mean, const std::vector<float>& std,
            cudaStream_t stream) {
  const auto work = pgd_step_normalize_work<T, G>(x_adv, c_in, x, grad, x0, eps, step, mean, std);
  const dim3 blocks(static_cast<unsigned>(work.images),
                    static_cast<unsigned>(std::min<int64_t>((work.pixels + kBlock - 1) / kBlock, 65535)));
  const bool packed = work.channels % Pack<T>::kWidth == 0 && reinterpret_cast<uintptr_t>(c_in.data) % 16 == 0;
  const auto kernel = packed ? pgd_step_normalize_kernel<T, G, true> : pgd_step_normalize_kernel<T, G, false>;
  kernel<<<blocks, kBlock, 0, stream>>>(work);
  check_cuda(cudaGetLastError(), "pgd_step_normalize");
}

}  // namespace

void pgd_step_normalize_cuda(const TensorView& x_adv, const TensorView& c_in, const TensorView& x,
                             const TensorView& grad, const TensorView& x0, float eps, float step,
                             const std::vector<float>& mean, const std::vector<float>& std, void* stream) {
  check_pgd_step_normalize(x_adv, c_in, x, grad, x0, mean, std, kDLCUDA);
  if (x.numel == 0) return;
  const DeviceGuard guard(x.device.device_id);
  const bool wide = c_in.dtype == DType::kFloat32, wide_grad = grad.dtype == DType::kFloat32;
  const auto launcher = wide ? (wide_grad ? launch<float, float> : launch<float, BFloat16>)
                             : (wide_grad ? launch<BFloat16, float> : launch<BFloat16, BFloat16>);
  launcher(x_adv, c_in, x, grad, x0, eps, step, mean, std, static_cast<cudaStream_t>(stream));
}

}  // namespace puat
