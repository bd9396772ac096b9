#include "augment.h"
#include "cuda/launch.cuh"

namespace puat {
namespace {

constexpr int kBlock = 256;
constexpr int kWidth = 4;  // elements of the result a thread writes at once

// Where an element of an image stands, stepping through the image as its memory does.
struct Position {
  int c, y, x;
};

__device__ Position position_of(const AugmentCall& call, unsigned element) {
  const unsigned channels = call.channels, height = call.height, width = call.width;
  if (call.channels_last) {
    const unsigned pixel = element / channels;
    return {static_cast<int>(element % channels), static_cast<int>(pixel / width), static_cast<int>(pixel % width)};
  }
  const unsigned row = element / width;
  return {static_cast<int>(row / height), static_cast<int>(row % height), static_cast<int>(element % width)};
}

__device__ Position next(const AugmentCall& call, Position at) {
  if (call.channels_last) {
    if (++at.c < call.channels) return at;
    at.c = 0;
  }
  if (++at.x < call.width) return at;
  at.x = 0;
  if (++at.y < call.height) return at;
  return {at.c + 1, 0, 0};  // channels_last: past the image's end
}

template <typename In>
__device__ float read(const AugmentCall& call, const In* image, Pixel from, int c) {
  return value_of(image[c * call.channel_stride + from.y * call.row_stride + from.x * call.column_stride]);
}

template <bool kBackward, typename In>
__device__ float element_of(const AugmentCall& call, const Transform& t, const In* image, Position at) {
  if (!kBackward || call.cos_sin == nullptr) {
    const Pixel from = source_of(kBackward ? moved_back(t) : t, at.y, at.x);
    return from.y < 0 ? 0.0f : read(call, image, from, at.c);
  }
  float sum = 0.0f;
#pragma unroll
  for (int k = 0; k < kTakers; ++k) {
    const Pixel taker = taker_of(t, at.y, at.x, k);
    if (taker.y >= 0) sum += read(call, image, taker, at.c);
  }
  return sum;
}

// Each thread writes kWidth neighbours, whatever the layout: stores are coalesced, reads as far as the map allows. An
// image that the index does not find becomes NaN, since a kernel cannot raise.
template <bool kBackward, typename Out, typename In>
__global__ void __launch_bounds__(kBlock)
    augment_kernel(Out* __restrict__ out, const In* __restrict__ x, const AugmentCall call, unsigned blocks_per_image,
                   bool is_aligned) {
  const int64_t n = blockIdx.x / blocks_per_image;
  const unsigned size = call.channels * call.height * call.width;
  const unsigned begin = (blockIdx.x % blocks_per_image * kBlock + threadIdx.x) * kWidth;
  if (begin >= size) return;
  const Transform t = transform_of(call, n);
  const int64_t image = image_of(call, n);
  x += image * call.image_stride;
  out += n * size + begin;
  Pack<Out, kWidth> result{};
  Position at = position_of(call, begin);
#pragma unroll
  for (int i = 0; i < kWidth; ++i) {
    if (begin + i >= size) break;
    store(&result.value[i], image < 0 ? nanf("") : element_of<kBackward>(call, t, x, at));
    at = next(call, at);
  }
  if (is_aligned) {
    *reinterpret_cast<Pack<Out, kWidth>*>(out) = result;
    return;
  }
  for (int i = 0; i < kWidth && begin + i < size; ++i) out[i] = result.value[i];
}

template <bool kBackward, typename Out, typename In>
void launch(const AugmentCall& call, const TensorView& out, const TensorView& x, cudaStream_t stream) {
  const int64_t size = out.numel / call.images, per_block = int64_t{kBlock} * kWidth;
  const int64_t blocks_per_image = (size + per_block - 1) / per_block;
  if (call.images > INT32_MAX / blocks_per_image) {
    fail(out, "less than 2^31 blocks of " + std::to_string(per_block) + " elements", "shape " + text(out.shape));
  }
  const bool is_aligned = size % kWidth == 0 && reinterpret_cast<uintptr_t>(out.data) % sizeof(Pack<Out, kWidth>) == 0;
  augment_kernel<kBackward><<<static_cast<unsigned>(call.images * blocks_per_image), kBlock, 0, stream>>>(
      out.as<Out>(), x.as<const In>(), call, static_cast<unsigned>(blocks_per_image), is_aligned);
  check_cuda(cudaGetLastError(), "augment");
}

template <bool kBackward, typename Out>
void launch(const AugmentCall& call, const TensorView& out, const TensorView& x, cudaStream_t stream) {
  if (x.dtype == DType::kFloat32) return launch<kBackward, Out, float>(call, out, x, stream);
  if (x.dtype == DType::kBFloat16) return launch<kBackward, Out, BFloat16>(call, out, x, stream);
  if constexpr (!kBackward) launch<kBackward, Out, uint8_t>(call, out, x, stream);
}

}  // namespace

void augment_cuda(const TensorView& out, const TensorView& x, const Optional& index, const Optional& top_left,
                  const Optional& flip, const Optional& cos_sin, int64_t pad, void* stream) {
  const AugmentCall call = augment_call(out, x, index, top_left, flip, cos_sin, pad, kDLCUDA);
  check_dtype(x, {DType::kUInt8, DType::kFloat32, DType::kBFloat16});
  if (out.numel == 0) return;
  const DeviceGuard guard(out.device.device_id);
  const auto launcher = out.dtype == DType::kFloat32 ? launch<false, float> : launch<false, BFloat16>;
  launcher(call, out, x, static_cast<cudaStream_t>(stream));
}

void augment_backward_cuda(const TensorView& out, const TensorView& grad, const Optional& top_left,
                           const Optional& flip, const Optional& cos_sin, int64_t pad, void* stream) {
  const AugmentCall call = augment_call(out, grad, std::nullopt, top_left, flip, cos_sin, pad, kDLCUDA);
  check_dtype(grad, {DType::kFloat32, DType::kBFloat16});
  if (out.numel == 0) return;
  const DeviceGuard guard(out.device.device_id);
  const auto launcher = out.dtype == DType::kFloat32 ? launch<true, float> : launch<true, BFloat16>;
  launcher(call, out, grad, static_cast<cudaStream_t>(stream));
}

}  // namespace puat
