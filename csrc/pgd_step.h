// pgd_step: one projected sign-gradient step. Formula, shapes and errors: puat_fast/ops/pgd_step.py.
#pragma once

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

inline void check_pgd_step(const TensorView& out, const TensorView& x, const TensorView& grad, const TensorView& x0,
                           DLDeviceType device) {
  check_device(x, device);
  check_dtype(x, {DType::kFloat32, DType::kBFloat16});
  check_dense(x);
  for (const TensorView* other : {&grad, &x0, &out}) check_same_layout(*other, x);
  for (const TensorView* other : {&x, &grad, &x0}) check_no_partial_overlap(out, *other);
}

// out may be x itself. `threads`: how many may share the work.
void pgd_step_cpu(const TensorView& out, const TensorView& x, const TensorView& grad, const TensorView& x0, float eps,
                  float step, int threads);

// `stream`: a cudaStream_t. Does not wait for the kernel.
void pgd_step_cuda(const TensorView& out, const TensorView& x, const TensorView& grad, const TensorView& x0, float eps,
                   float step, void* stream);

}  // namespace puat
