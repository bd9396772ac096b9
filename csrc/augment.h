// augment: images gathered, cropped, flipped and rotated as one map of pixels. Formula, shapes, errors:
// puat_fast/ops/augment.py.
#pragma once

#include <cstdint>
#include <optional>

#include "arithmetic.h"
#include "bfloat16.h"
#include "tensor.h"

namespace puat {

// A pixel's value as float32; those of uint8 images come to [0,1].
template <typename T>
PUAT_HOST_DEVICE inline float value_of(T pixel) {
  return to_float(pixel);
}
PUAT_HOST_DEVICE inline float value_of(uint8_t pixel) { return static_cast<float>(pixel) / 255.0f; }

// rint, halves to even, of numbers below 2^22: those next to 2^23 have no fraction. Unlike rintf it is vectorised.
PUAT_INLINE float nearest(float value) {
  constexpr float kWhole = 12582912.0f;  // 1.5 * 2^23
  return (value + kWhole) - kWhole;
}

// What happens to one image: pixel (y, x) of what is cropped and flipped is (top + y, left + step x) of the source,
// step being 1 or -1, and of that a rotation is made. An image that is not rotated has cos = 1 and sin = 0, which leave
// every coordinate as it is.
struct Transform {
  int height, width, top, left, step;
  float cos, sin;
};

struct Pixel {
  int y, x;
};

struct Point {
  float y, x;
};

PUAT_INLINE bool is_inside(const Transform& t, int y, int x) {
  return (y >= 0) & (y < t.height) & (x >= 0) & (x < t.width);
}

// From an image's centre to a pixel.
PUAT_INLINE Point from_centre(const Transform& t, int y, int x) {
  return {static_cast<float>(y) - 0.5f * static_cast<float>(t.height - 1),
          static_cast<float>(x) - 0.5f * static_cast<float>(t.width - 1)};
}

// The pixel of the cropped image that output pixel (y, x) copies, whether there is such a pixel or not.
PUAT_INLINE Point rotated(const Transform& t, int y, int x) {
  const Point d = from_centre(t, y, x), centre = from_centre(t, 0, 0);
  return {nearest(product(t.sin, d.x) + product(t.cos, d.y) - centre.y),
          nearest(product(t.cos, d.x) - product(t.sin, d.y) - centre.x)};
}

// The source pixel that output pixel (y, x) copies; y = -1 where it is filled with 0. The range is tested before the
// cast, which NaN would make undefined.
PUAT_INLINE Pixel source_of(const Transform& t, int y, int x) {
  const Point from = rotated(t, y, x);
  const bool is_cropped = (from.y >= 0.0f) & (from.y < static_cast<float>(t.height)) & (from.x >= 0.0f) &
                          (from.x < static_cast<float>(t.width));
  const int source_y = t.top + static_cast<int>(is_cropped ? from.y : 0.0f);
  const int source_x = t.left + t.step * static_cast<int>(is_cropped ? from.x : 0.0f);
  return {is_cropped & is_inside(t, source_y, source_x) ? source_y : -1, source_x};
}

constexpr int kTakers = 4;
constexpr int64_t kMaxSize = 16384;
constexpr double kUnitTolerance = 1e-5;  // of cos^2 + sin^2

// The output pixels that copy source pixel (y, x) are among kTakers: the k-th, or y = -1 if that one does not.
//
// Output d copies the cropped image's pixel q (both seen from the centre) where |R d - q| <= 1/2 in each coordinate, so
// that |d - R^T q| <= sqrt(1/2) < 1 whatever the angle: d is one of the four pixels around R^T q, of which the first is
// the floor, or, where that is a whole number, may be the one before. Rounding has 0.29 pixels of slack to stay within:
// in images of up to kMaxSize pixels a side, a coordinate is less than 0.01 off, there and back, and R's rows are of
// length 1 within kUnitTolerance, which makes less than 0.12 at the corner.
PUAT_INLINE Pixel taker_of(const Transform& t, int y, int x, int k) {
  const int cropped_y = y - t.top, cropped_x = t.step * (x - t.left);
  const Point q = from_centre(t, cropped_y, cropped_x), centre = from_centre(t, 0, 0);
  const float to_y = product(t.cos, q.y) - product(t.sin, q.x) - centre.y;
  const float to_x = product(t.sin, q.y) + product(t.cos, q.x) - centre.x;
  const Pixel taker{static_cast<int>(nearest(to_y - 0.5f)) + k / 2, static_cast<int>(nearest(to_x - 0.5f)) + k % 2};
  const Point from = rotated(t, taker.y, taker.x);
  const bool takes = is_inside(t, cropped_y, cropped_x) & is_inside(t, taker.y, taker.x) &
                     (from.y == static_cast<float>(cropped_y)) & (from.x == static_cast<float>(cropped_x));
  return {takes ? taker.y : -1, taker.x};
}

// Without rotation an image's gradient is that of its output, moved back: a crop and a flip like any other.
PUAT_HOST_DEVICE inline Transform moved_back(const Transform& t) {
  return {t.height, t.width, -t.top, -t.step * t.left, t.step, 1.0f, 0.0f};
}

// A call's arguments as a kernel takes them: by value, no tensors. A draw's step is 0 where all images share it.
struct AugmentCall {
  int64_t images, stored;  // of the result, of x
  int channels, height, width;
  int64_t image_stride;
  int channel_stride, row_stride, column_stride;  // of x, in elements
  bool channels_last;                             // of the result
  int pad;
  const int64_t* index;
  const int64_t* top_left;
  const uint8_t* flip;
  const float* cos_sin;
  int top_left_step, flip_step, cos_sin_step;

  bool shares_draws() const { return top_left_step + flip_step + cos_sin_step == 0; }
};

// -1 for an index that is none.
PUAT_HOST_DEVICE inline int64_t image_of(const AugmentCall& call, int64_t n) {
  const int64_t image = call.index == nullptr ? n : call.index[n];
  return image >= 0 && image < call.stored ? image : -1;
}

// A corner that is none of the padded image's is moved to the nearest that is.
PUAT_HOST_DEVICE inline int offset_of(int64_t corner, int pad) {
  return static_cast<int>(corner < 0 ? 0 : corner > 2 * pad ? 2 * pad : corner) - pad;
}

PUAT_HOST_DEVICE inline Transform transform_of(const AugmentCall& call, int64_t n) {
  Transform t{call.height, call.width, 0, 0, 1, 1.0f, 0.0f};
  if (call.top_left != nullptr) {
    t.top = offset_of(call.top_left[n * call.top_left_step], call.pad);
    t.left = offset_of(call.top_left[n * call.top_left_step + 1], call.pad);
  }
  if (call.flip != nullptr && call.flip[n * call.flip_step] != 0) {
    t.left += t.width - 1;
    t.step = -1;
  }
  if (call.cos_sin != nullptr) {
    t.cos = call.cos_sin[n * call.cos_sin_step];
    t.sin = call.cos_sin[n * call.cos_sin_step + 1];
  }
  return t;
}

using Optional = std::optional<TensorView>;

inline int64_t extent_of(const TensorView& t) {
  int64_t last = 0;
  for (size_t d = 0; d < t.shape.size(); ++d) last += (t.shape[d] - 1) * t.strides[d];
  return t.numel == 0 ? 0 : last + 1;
}

// An input beside `out`: on its device, in memory of its own.
inline void check_input(const TensorView& t, const TensorView& out) {
  if (t.device.device_type != out.device.device_type || t.device.device_id != out.device.device_id) {
    fail(t, text(out.device) + " (as out)", text(t.device));
  }
  const bool apart = t.data >= out.data + out.numel * out.itemsize || out.data >= t.data + extent_of(t) * t.itemsize;
  if (!apart && t.numel > 0) fail(t, "memory apart from that of out", "memory that overlaps it");
}

// A tensor of one row per image, or, for a draw, of one row for all: contiguous, of shape (rows,) or (rows, 2).
inline void check_rows(const TensorView& t, DType dtype, const TensorView& out, bool is_pair, bool is_draw) {
  check_input(t, out);
  check_dtype(t, {dtype});
  const std::vector<int64_t> tail = is_pair ? std::vector<int64_t>{2} : std::vector<int64_t>{};
  const auto is = [&](int64_t rows) {
    std::vector<int64_t> shape{rows};
    shape.insert(shape.end(), tail.begin(), tail.end());
    return t.shape == shape;
  };
  if (!is(out.shape[0]) && !(is_draw && is(1))) {
    fail(t, std::to_string(out.shape[0]) + (is_draw ? " or 1 rows" : " rows") + (is_pair ? " of 2" : ""),
         "shape " + text(t.shape));
  }
  if (extent_of(t) != t.numel || (is_pair && t.numel > 0 && t.strides[1] != 1)) {
    fail(t, "a contiguous tensor", "strides " + text(t.strides));
  }
}

// True for channels_last, false for contiguous; where both hold, false.
inline bool check_memory_format(const TensorView& t) {
  const int64_t c = t.shape[1], h = t.shape[2], w = t.shape[3];
  const auto has = [&](std::initializer_list<int64_t> strides) {
    return std::equal(strides.begin(), strides.end(), t.strides.begin(),
                      [&, d = 0](int64_t a, int64_t b) mutable { return t.shape[d++] == 1 || a == b; });
  };
  if (t.numel == 0 || has({c * h * w, h * w, w, 1})) return false;
  if (!has({c * h * w, 1, w * c, c})) fail(t, "a contiguous or channels_last tensor", "strides " + text(t.strides));
  return true;
}

inline void check_images(const TensorView& out, const TensorView& x, const Optional& index) {
  for (const TensorView* t : {&out, &x}) {
    if (t->shape.size() != 4) fail(*t, "4 dimensions", "shape " + text(t->shape));
  }
  if (x.shape != std::vector<int64_t>{index ? x.shape[0] : out.shape[0], out.shape[1], out.shape[2], out.shape[3]}) {
    fail(x, "images as those of out, of shape " + text(out.shape), "shape " + text(x.shape));
  }
  if (std::max(x.shape[2], x.shape[3]) > kMaxSize) {
    fail(x, "height and width up to " + std::to_string(kMaxSize), "shape " + text(x.shape));
  }
  const int64_t last =
      (x.shape[1] - 1) * x.strides[1] + (x.shape[2] - 1) * x.strides[2] + (x.shape[3] - 1) * x.strides[3];
  if (std::max(last, x.shape[1] * x.shape[2] * x.shape[3]) > INT32_MAX) {
    fail(x, "images of less than 2^31 elements", "shape " + text(x.shape) + ", strides " + text(x.strides));
  }
}

// The arguments as a kernel takes them, checked. `backward`: x is the gradient of the result, out that of the images.
// What the tensors hold is not looked at.
inline AugmentCall augment_call(const TensorView& out, const TensorView& x, const Optional& index,
                                const Optional& top_left, const Optional& flip, const Optional& cos_sin, int64_t pad,
                                DLDeviceType device) {
  check_device(out, device);
  check_dtype(out, {DType::kFloat32, DType::kBFloat16});
  check_input(x, out);
  check_images(out, x, index);
  if (index) check_rows(*index, DType::kInt64, out, false, false);
  if (top_left) check_rows(*top_left, DType::kInt64, out, true, true);
  if (flip) check_rows(*flip, DType::kUInt8, out, false, true);
  if (cos_sin) check_rows(*cos_sin, DType::kFloat32, out, true, true);
  if (pad < 0 || pad > kMaxSize) {
    throw std::invalid_argument("pad: expected 0 to " + std::to_string(kMaxSize) + ", got " + std::to_string(pad));
  }
  const auto step = [](const Optional& t, int size) { return t && t->shape[0] != 1 ? size : 0; };
  return {
      out.shape[0],
      x.shape[0],
      static_cast<int>(x.shape[1]),
      static_cast<int>(x.shape[2]),
      static_cast<int>(x.shape[3]),
      x.strides[0],
      static_cast<int>(x.strides[1]),
      static_cast<int>(x.strides[2]),
      static_cast<int>(x.strides[3]),
      check_memory_format(out),
      static_cast<int>(pad),
      index ? index->as<const int64_t>() : nullptr,
      top_left ? top_left->as<const int64_t>() : nullptr,
      flip ? flip->as<const uint8_t>() : nullptr,
      cos_sin ? cos_sin->as<const float>() : nullptr,
      step(top_left, 2),
      step(flip, 1),
      step(cos_sin, 2),
  };
}

// index, and what is drawn: None switches that part off. `threads`: how many may share the work.
void augment_cpu(const TensorView& out, const TensorView& x, const Optional& index, const Optional& top_left,
                 const Optional& flip, const Optional& cos_sin, int64_t pad, int threads);
void augment_backward_cpu(const TensorView& out, const TensorView& grad, const Optional& top_left, const Optional& flip,
                          const Optional& cos_sin, int64_t pad, int threads);

// `stream`: a cudaStream_t. Does not wait for the kernel.
void augment_cuda(const TensorView& out, const TensorView& x, const Optional& index, const Optional& top_left,
                  const Optional& flip, const Optional& cos_sin, int64_t pad, void* stream);
void augment_backward_cuda(const TensorView& out, const TensorView& grad, const Optional& top_left,
                           const Optional& flip, const Optional& cos_sin, int64_t pad, void* stream);

}  // namespace puat
