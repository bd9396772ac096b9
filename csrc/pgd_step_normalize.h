// pgd_step_normalize: an L-inf pgd_step and the network's input made of it. Formula, shapes and errors:
// puat_fast/ops/pgd_step_normalize.py.
#pragma once

#include <vector>

#include "pgd_step.h"

namespace puat {

constexpr int kColours = 3;

// N x C x H x W in memory. The pixels of an image, row after row, must stand at one distance from each other: NCHW,
// channels_last and any choice of images or channels have it, a crop has not.
template <typename T>
struct Images {
  T* data;
  int64_t image, channel, pixel;  // strides, in elements

  explicit Images(const TensorView& t)
      : data(t.as<T>()),
        image(t.strides[0]),
        channel(t.strides[1]),
        pixel(t.shape[3] > 1 ? t.strides[3] : t.strides[2]) {}

  PUAT_HOST_DEVICE T* at(int64_t n, int64_t p) const { return data + n * image + p * pixel; }
};

PUAT_HOST_DEVICE inline float normalized(float value, float mean, float std) { return (value - mean) / std; }

// What is the same for all pixels. G: the type of grad, T: of c_in.
template <typename T, typename G>
struct PgdStepNormalize {
  Images<float> x_adv;
  Images<T> c_in;
  Images<float> x;
  Images<G> grad;
  Images<float> x0;
  float eps, step;
  float mean[kColours], std[kColours];
  int64_t images, pixels;  // the latter of one image
  int channels;            // of c_in
};

inline void check_images(const TensorView& t, const TensorView& like, std::initializer_list<int64_t> channels) {
  if (t.device.device_type != like.device.device_type || t.device.device_id != like.device.device_id) {
    fail(t, text(like.device) + " (as " + like.name + ")", text(t.device));
  }
  const bool fits =
      t.shape.size() == 4 && t.shape[0] == like.shape[0] && t.shape[2] == like.shape[2] && t.shape[3] == like.shape[3];
  if (!fits || std::find(channels.begin(), channels.end(), t.shape[1]) == channels.end()) {
    std::string numbers;
    for (int64_t number : channels) numbers += (numbers.empty() ? "" : " or ") + std::to_string(number);
    fail(t, numbers + " channels, else the shape of " + like.name + " " + text(like.shape), text(t.shape));
  }
  if (t.shape[2] > 1 && t.shape[3] > 1 && t.strides[2] != t.shape[3] * t.strides[3]) {
    fail(t, "rows of pixels without a gap between them", "strides " + text(t.strides));
  }
}

// Neither form of this op works in place.
inline void check_apart(const TensorView& written, const TensorView& other) {
  const auto end = [](const TensorView& t) {
    int64_t last = 0;
    for (size_t d = 0; d < t.shape.size(); ++d) last += (t.shape[d] - 1) * t.strides[d];
    return t.data + (last + 1) * t.itemsize;
  };
  if (written.data < end(other) && other.data < end(written)) {
    fail(other, "memory apart from that of " + written.name, "memory that overlaps it");
  }
}

inline void check_pgd_step_normalize(const TensorView& x_adv, const TensorView& c_in, const TensorView& x,
                                     const TensorView& grad, const TensorView& x0, const std::vector<float>& mean,
                                     const std::vector<float>& std, DLDeviceType device) {
  check_device(x, device);
  for (const TensorView* t : {&x, &x0, &x_adv}) check_dtype(*t, {DType::kFloat32});
  for (const TensorView* t : {&c_in, &grad}) check_dtype(*t, {DType::kFloat32, DType::kBFloat16});
  if (x.shape.size() != 4) fail(x, "4 dimensions", text(x.shape));
  const int64_t channels = c_in.shape.size() == 4 ? std::max<int64_t>(c_in.shape[1], kColours) : kColours;
  for (const TensorView* t : {&x, &x0, &x_adv}) check_images(*t, x, {kColours});
  check_images(grad, x, {kColours, channels});
  check_images(c_in, x, {channels});
  if (mean.size() != kColours)
    throw std::invalid_argument("mean: expected 3 numbers, got " + std::to_string(mean.size()));
  if (std.size() != kColours) throw std::invalid_argument("std: expected 3 numbers, got " + std::to_string(std.size()));
  if (x.numel == 0) return;
  check_dense(x_adv);
  check_dense(c_in);
  const bool one_pixel = x.shape[2] * x.shape[3] == 1;
  const bool channels_last = c_in.strides[1] == 1 && (one_pixel || Images<char>(c_in).pixel == channels);
  if (!channels_last) fail(c_in, "channels_last", "strides " + text(c_in.strides));
  check_apart(x_adv, c_in);
  for (const TensorView* written : {&x_adv, &c_in}) {
    for (const TensorView* read : {&x, &grad, &x0}) check_apart(*written, *read);
  }
}

template <typename T, typename G>
PgdStepNormalize<T, G> pgd_step_normalize_work(const TensorView& x_adv, const TensorView& c_in, const TensorView& x,
                                               const TensorView& grad, const TensorView& x0, float eps, float step,
                                               const std::vector<float>& mean, const std::vector<float>& std) {
  PgdStepNormalize<T, G> work{Images<float>(x_adv),
                              Images<T>(c_in),
                              Images<float>(x),
                              Images<G>(grad),
                              Images<float>(x0),
                              eps,
                              step,
                              {},
                              {},
                              x.shape[0],
                              x.shape[2] * x.shape[3],
                              static_cast<int>(c_in.shape[1])};
  std::copy(mean.begin(), mean.end(), work.mean);
  std::copy(std.begin(), std.end(), work.std);
  return work;
}

void pgd_step_normalize_cpu(const TensorView& x_adv, const TensorView& c_in, const TensorView& x,
                            const TensorView& grad, const TensorView& x0, float eps, float step,
                            const std::vector<float>& mean, const std::vector<float>& std, int threads);

// `stream`: a cudaStream_t. Does not wait for the kernel.
void pgd_step_normalize_cuda(const TensorView& x_adv, const TensorView& c_in, const TensorView& x,
                             const TensorView& grad, const TensorView& x0, float eps, float step,
                             const std::vector<float>& mean, const std::vector<float>& std, void* stream);

}  // namespace puat
