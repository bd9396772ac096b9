// pgd_step: one projected gradient step, in L-inf or L2. Formulas, shapes and errors: puat_fast/ops/pgd_step.py.
#pragma once

#include <cmath>

#include "bfloat16.h"
#include "tensor.h"

namespace puat {

// torch.maximum and torch.minimum: NaN in either operand gives NaN.
PUAT_HOST_DEVICE inline float maximum(float a, float b) { return (a < b) | (b != b) ? b : a; }
PUAT_HOST_DEVICE inline float minimum(float a, float b) { return (a > b) | (b != b) ? b : a; }

// step * sign is exact, so a fused multiply-add rounds as the reference does.
PUAT_HOST_DEVICE inline float pgd_step(float x, float grad, float x0, float eps, float step) {
  const float sign = static_cast<float>(grad > 0.0f) - static_cast<float>(grad < 0.0f);
  const float projected = minimum(maximum(x + step * sign, x0 - eps), x0 + eps);
  return minimum(maximum(projected, 0.0f), 1.0f);
}

// L2, per sample. Squares are summed in double, where those of no float32 overflow or vanish.

// 1 / ||grad||, which float32 holds; 0 where the gradient gives no direction: zero, as good as zero, or not finite.
PUAT_HOST_DEVICE inline float inverse_length(double sum_of_squares) {
  const double length = sqrt(sum_of_squares);
  return length >= 0x1p-126 ? static_cast<float>(1.0 / length) : 0.0f;  // NaN is not, and 1 / infinity is 0
}

// The point before projection. The product by 0 would turn an infinite gradient into NaN.
PUAT_HOST_DEVICE inline float l2_moved(float x, float grad, float inverse, float step) {
  const float moved = x + step * (grad * inverse);
  return inverse > 0.0f ? moved : x;
}

// min(1, eps / ||moved - x0||); NaN if there is one in the sample.
PUAT_HOST_DEVICE inline float l2_shrink(double sum_of_squares, double eps) {
  const double length = sqrt(sum_of_squares);
  return length <= eps ? 1.0f : static_cast<float>(eps / length);
}

// Inside the ball, the point itself: x0 + (moved - x0) would round.
PUAT_HOST_DEVICE inline float l2_projected(float moved, float x0, float shrink) {
  const float shrunk = x0 + shrink * (moved - x0);
  return minimum(maximum(shrink == 1.0f ? moved : shrunk, 0.0f), 1.0f);
}

inline void check_pgd_step(const TensorView& out, const TensorView& x, const TensorView& grad, const TensorView& x0,
                           DLDeviceType device) {
  check_device(x, device);
  check_dtype(x, {DType::kFloat32, DType::kBFloat16});
  check_dense(x);
  for (const TensorView* other : {&grad, &x0, &out}) check_same_layout(*other, x);
  for (const TensorView* other : {&x, &grad, &x0}) check_no_partial_overlap(out, *other);
}

// L2 asks more: dim 0 counts the samples, and each of them fills its own stretch of memory.
inline void check_pgd_step_l2(const TensorView& out, const TensorView& x, const TensorView& grad, const TensorView& x0,
                              DLDeviceType device) {
  check_pgd_step(out, x, grad, x0, device);
  if (x.shape.empty()) fail(x, "a batch, dim 0", "shape ()");
  if (x.numel > 0 && x.shape[0] > 1 && x.strides[0] * x.shape[0] != x.numel) {
    fail(x, "one sample after the other in memory", "strides " + text(x.strides));
  }
}

// out may be x itself. `threads`: how many may share the work.
void pgd_step_cpu(const TensorView& out, const TensorView& x, const TensorView& grad, const TensorView& x0, float eps,
                  float step, int threads);

// `stream`: a cudaStream_t. Does not wait for the kernel.
void pgd_step_cuda(const TensorView& out, const TensorView& x, const TensorView& grad, const TensorView& x0, float eps,
                   float step, void* stream);

void pgd_step_l2_cpu(const TensorView& out, const TensorView& x, const TensorView& grad, const TensorView& x0,
                     double eps, float step, int threads);

void pgd_step_l2_cuda(const TensorView& out, const TensorView& x, const TensorView& grad, const TensorView& x0,
                      double eps, float step, void* stream);

}  // namespace puat
