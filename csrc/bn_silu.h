// bn_silu: channels_last batch normalisation and SiLU in four stages. Formula and gradients: puat_fast/ops/bn_silu.py.
//
// x is N x C x H x W, float32 or bfloat16, channels_last, and so are all of its shape; the rest is float32. Group g of
// G, images [g N / G, (g + 1) N / G), has statistics of its own: mean, var and rstd are G x C. `left` to `bottom`
// surround out and grad_out with zeros, N x C x (H + top + bottom) x (W + left + right), as F.pad does. No result
// depends on `threads`.
#pragma once

#include <algorithm>
#include <array>
#include <initializer_list>
#include <optional>
#include <string>
#include <vector>

#include "bfloat16.h"
#include "exp.h"
#include "tensor.h"

namespace puat {

// As torch's: -inf gives NaN.
inline float silu(float y) { return y / (1.0f + exp(-y)); }

inline float silu_grad(float y) {
  const float sigmoid = 1.0f / (1.0f + exp(-y));
  return sigmoid * (1.0f + y * (1.0f - sigmoid));
}

// The pixels of N x C x H x W, a pixel being C numbers in a row, and where each is found in the padded images.
struct Pixels {
  int64_t images, channels, height, width;
  int64_t left = 0, right = 0, top = 0, bottom = 0;

  explicit Pixels(const TensorView& x)
      : images(x.shape[0]), channels(x.shape[1]), height(x.shape[2]), width(x.shape[3]) {}
  int64_t count() const { return images * height * width; }
  bool padded() const { return left != 0 || right != 0 || top != 0 || bottom != 0; }
  int64_t padded_height() const { return top + height + bottom; }
  int64_t padded_width() const { return left + width + right; }
  int64_t run() const { return padded() ? width : count(); }  // so many are neighbours in the padded images too
  int64_t padded_index(int64_t pixel) const {
    const int64_t row = pixel / width, image = row / height;
    return (image * padded_height() + top + row % height) * padded_width() + left + pixel % width;
  }
};

inline void check_channels_last(const TensorView& t) {
  check_device(t, kDLCPU);
  check_dtype(t, {DType::kFloat32, DType::kBFloat16});
  if (t.shape.size() != 4) fail(t, "shape (N, C, H, W)", text(t.shape));
  int64_t stride = 1;
  for (size_t d : {1, 3, 2, 0}) {
    if (t.numel != 0 && t.shape[d] != 1 && t.strides[d] != stride) {
      fail(t, "a dense channels_last tensor", "shape " + text(t.shape) + " of strides " + text(t.strides));
    }
    stride *= t.shape[d];
  }
}

inline void check_channels_last(const TensorView& t, const std::vector<int64_t>& shape, const TensorView& like) {
  check_channels_last(t);
  if (t.dtype != like.dtype) fail(t, std::string(name_of(like.dtype)) + " (as " + like.name + ")", name_of(t.dtype));
  if (t.shape != shape) fail(t, "shape " + text(shape), text(t.shape));
}

inline void check_table(const TensorView& t, const std::vector<int64_t>& shape) {
  check_device(t, kDLCPU);
  check_dtype(t, {DType::kFloat32});
  if (t.shape != shape) fail(t, "shape " + text(shape), text(t.shape));
  int64_t stride = 1;
  for (size_t d = shape.size(); d-- > 0; stride *= shape[d]) {
    if (t.numel != 0 && shape[d] != 1 && t.strides[d] != stride) fail(t, "a contiguous tensor", text(t.strides));
  }
}

inline void check_together(const std::optional<TensorView>& first, const std::optional<TensorView>& second,
                           const char* names) {
  if (first.has_value() != second.has_value()) {
    fail(first ? *first : *second, std::string(names) + " both or neither", "one of them alone");
  }
}

inline void check_groups(const char* name, int64_t groups, int64_t images) {
  if (groups >= 1 && images % groups == 0) return;
  throw std::invalid_argument(std::string(name) + ": expected a number of groups that divides the " +
                              std::to_string(images) + " images, got " + std::to_string(groups));
}

inline bool overlap(const TensorView& a, const TensorView& b) {
  return a.data < b.data + b.numel * b.itemsize && b.data < a.data + a.numel * a.itemsize;
}

inline void check_apart(const TensorView& written, std::initializer_list<const TensorView*> others) {
  for (const TensorView* other : others) {
    if (other != nullptr && overlap(written, *other)) {
      fail(*other, "memory apart from that of " + written.name, "memory that overlaps it");
    }
  }
}

// Of one shape, they may be the same memory; if one is `padded`, an element stands elsewhere in it.
inline void check_elementwise(const TensorView& written, const TensorView& read, bool padded) {
  if (padded) return check_apart(written, {&read});
  check_no_partial_overlap(written, read);
}

inline const TensorView* pointer(const std::optional<TensorView>& t) { return t ? &*t : nullptr; }
template <typename T>
T* data(const std::optional<TensorView>& t) {
  return t ? t->as<T>() : nullptr;
}

inline void check_bn_silu_stats(const TensorView& mean, const std::optional<TensorView>& var, const TensorView& rstd,
                                const std::optional<TensorView>& h, const TensorView& x,
                                const std::optional<TensorView>& residual,
                                const std::optional<TensorView>& running_mean,
                                const std::optional<TensorView>& running_var, int64_t groups) {
  check_channels_last(x);
  check_groups("groups", groups, x.shape[0]);
  check_together(h, residual, "h and residual");
  check_together(running_mean, running_var, "running_mean and running_var");
  for (const TensorView* other : {pointer(h), pointer(residual)}) {
    if (other != nullptr) check_channels_last(*other, x.shape, x);
  }
  if (h) {
    check_no_partial_overlap(*h, x);
    check_no_partial_overlap(*h, *residual);
  }
  const int64_t channels = x.shape[1];
  const std::array<const TensorView*, 5> tables{&mean, &rstd, pointer(var), pointer(running_mean),
                                                pointer(running_var)};
  for (size_t i = 0; i < tables.size(); ++i) {
    if (tables[i] == nullptr) continue;
    check_table(*tables[i], i < 3 ? std::vector<int64_t>{groups, channels} : std::vector<int64_t>{channels});
    check_apart(*tables[i], {&x, pointer(h), pointer(residual)});
    for (size_t j = i + 1; j < tables.size(); ++j) check_apart(*tables[i], {tables[j]});
  }
  if (running_mean && channels > 0 && x.numel / channels == groups) {
    fail(x, "more than one value per channel and group, for the unbiased variance", "shape " + text(x.shape));
  }
}

// What the other three stages have in common.
inline Pixels check_bn_silu(const TensorView& h, const TensorView& mean, const TensorView& rstd,
                            const TensorView& weight, const TensorView& bias, int64_t left, int64_t right, int64_t top,
                            int64_t bottom) {
  check_channels_last(h);
  const int64_t channels = h.shape[1];
  if (mean.shape.size() != 2) fail(mean, "shape (groups, C)", text(mean.shape));
  check_groups("mean", mean.shape[0], h.shape[0]);
  check_table(mean, {mean.shape[0], channels});
  check_table(rstd, mean.shape);
  check_table(weight, {channels});
  check_table(bias, {channels});
  if (std::min({left, right, top, bottom}) < 0) {
    throw std::invalid_argument("left, right, top, bottom: expected padding >= 0, got " +
                                text({left, right, top, bottom}));
  }
  Pixels pixels(h);
  pixels.left = left, pixels.right = right, pixels.top = top, pixels.bottom = bottom;
  return pixels;
}

inline void check_padded(const TensorView& t, const Pixels& pixels, const TensorView& h) {
  check_channels_last(t, {pixels.images, pixels.channels, pixels.padded_height(), pixels.padded_width()}, h);
}

inline void check_sums(const TensorView& sum_dy, const TensorView& sum_dy_xhat, const TensorView& mean,
                       std::initializer_list<const TensorView*> read) {
  for (const TensorView* sum : {&sum_dy, &sum_dy_xhat}) {
    check_table(*sum, mean.shape);
    check_apart(*sum, read);
  }
  check_apart(sum_dy, {&sum_dy_xhat});
}

inline void check_grad_x(const TensorView& grad_x, const std::optional<TensorView>& grad_h, const TensorView& h,
                         std::initializer_list<const TensorView*> others) {
  check_channels_last(grad_x, h.shape, h);
  if (grad_h) check_channels_last(*grad_h, h.shape, h);
  check_apart(grad_x, {&h, pointer(grad_h)});
  check_apart(grad_x, others);
}

// mean and biased var of each group and channel, rstd = 1 / sqrt(var + eps). With a residual of x: h = x + residual
// (h may be either of them), and the statistics are h's. With running_mean and running_var (C): for one group after the
// other, running = (1 - momentum) running + momentum batch, in which the variance is the unbiased one.
// No pixels at all: mean = var = 0, and the running statistics stay.
void bn_silu_stats_cpu(const TensorView& mean, const std::optional<TensorView>& var, const TensorView& rstd,
                       const std::optional<TensorView>& h, const TensorView& x,
                       const std::optional<TensorView>& residual, const std::optional<TensorView>& running_mean,
                       const std::optional<TensorView>& running_var, double momentum, double eps, int64_t groups,
                       int threads);

// out = SiLU(y), y = (h - mean) rstd weight + bias; zeros around it. Without padding out may be h.
void bn_silu_apply_cpu(const TensorView& out, const TensorView& h, const TensorView& mean, const TensorView& rstd,
                       const TensorView& weight, const TensorView& bias, int64_t left, int64_t right, int64_t top,
                       int64_t bottom, int threads);

// dy = grad_out SiLU'(y), summed over each group and channel, alone and times xhat = (h - mean) rstd.
void bn_silu_reduce_cpu(const TensorView& sum_dy, const TensorView& sum_dy_xhat, const TensorView& grad_out,
                        const TensorView& h, const TensorView& mean, const TensorView& rstd, const TensorView& weight,
                        const TensorView& bias, int64_t left, int64_t right, int64_t top, int64_t bottom, int threads);

// grad_x = weight rstd (dy - (sum_dy + xhat sum_dy_xhat) / pixels of a group) + grad_h. Without the sums, mean and rstd
// are constants (eval) and the bracket is dy.
void bn_silu_input_grad_cpu(const TensorView& grad_x, const TensorView& grad_out,
                            const std::optional<TensorView>& grad_h, const TensorView& h, const TensorView& mean,
                            const TensorView& rstd, const TensorView& weight, const TensorView& bias,
                            const std::optional<TensorView>& sum_dy, const std::optional<TensorView>& sum_dy_xhat,
                            int64_t left, int64_t right, int64_t top, int64_t bottom, int threads);

// Both of these of a training step, faster than one after the other: grad_x holds dy in between.
void bn_silu_backward_cpu(const TensorView& grad_x, const TensorView& sum_dy, const TensorView& sum_dy_xhat,
                          const TensorView& grad_out, const std::optional<TensorView>& grad_h, const TensorView& h,
                          const TensorView& mean, const TensorView& rstd, const TensorView& weight,
                          const TensorView& bias, int64_t left, int64_t right, int64_t top, int64_t bottom,
                          int threads);

}  // namespace puat
