// sgd_ema and adam: one step for all tensors of a network. Formulas, shapes and errors: puat_fast/ops/sgd_ema.py.
#pragma once

#include <cmath>
#include <optional>
#include <string>
#include <vector>

#include "arithmetic.h"
#include "bfloat16.h"
#include "tensor.h"

namespace puat {

// decay 0 copies, so that no NaN of the old average survives.
PUAT_HOST_DEVICE inline float moving_average(float ema, float param, float decay) {
  return decay == 0.0f ? param : product(decay, ema) + product(1.0f - decay, param);
}

// One step of SGD for one element, with all that does not depend on the element.
struct SgdUpdate {
  float lr, momentum, weight_decay;
  bool nesterov;

  PUAT_HOST_DEVICE void operator()(float& param, float grad, float& buffer) const {
    const float decayed = grad + product(weight_decay, param);
    buffer = product(momentum, buffer) + decayed;
    param -= product(lr, nesterov ? decayed + product(momentum, buffer) : buffer);
  }
};

struct AdamUpdate {
  float beta1, beta2, one_minus_beta1, one_minus_beta2, step_size, root_of_correction2, eps;

  PUAT_HOST_DEVICE void operator()(float& param, float grad, float& exp_avg, float& exp_avg_sq) const {
    exp_avg = product(beta1, exp_avg) + product(one_minus_beta1, grad);
    exp_avg_sq = product(beta2, exp_avg_sq) + product(product(one_minus_beta2, grad), grad);
    param -= product(step_size, exp_avg) / (sqrtf(exp_avg_sq) / root_of_correction2 + eps);
  }
};

struct AdamConstants {
  double log_beta1, log_beta2;  // of beta 0 minus infinity, which makes its correction 1
  float beta1, beta2, one_minus_beta1, one_minus_beta2, eps;

  AdamConstants(double beta1, double beta2, double eps)
      : log_beta1(std::log(beta1)),
        log_beta2(std::log(beta2)),
        beta1(static_cast<float>(beta1)),
        beta2(static_cast<float>(beta2)),
        one_minus_beta1(static_cast<float>(1.0 - beta1)),
        one_minus_beta2(static_cast<float>(1.0 - beta2)),
        eps(static_cast<float>(eps)) {}

  // The corrections of the zeros that the averages started from, 1 - beta^step, in double: cheap beside the memory.
  PUAT_HOST_DEVICE AdamUpdate at(float lr, float step) const {
    const double correction1 = -expm1(step * log_beta1), correction2 = -expm1(step * log_beta2);
    return {beta1,
            beta2,
            one_minus_beta1,
            one_minus_beta2,
            static_cast<float>(lr / correction1),
            static_cast<float>(sqrt(correction2)),
            eps};
  }
};

// One tensor of the network: streams of `numel` elements in one order, and what else it has of its own.
struct Row {
  float* param;
  const float* grad;
  float* first;        // momentum_buffer, or exp_avg
  float* second;       // ema or null, or exp_avg_sq
  BFloat16* copy;      // or null
  const float* step;   // adam's, on the device of the others
  float weight_decay;  // sgd's
  int64_t numel;
};

using Tensors = std::vector<TensorView>;
using MaybeTensors = std::vector<std::optional<TensorView>>;

inline void check_count(size_t count, const Tensors& params, const char* name) {
  if (count == params.size()) return;
  throw std::invalid_argument(std::string(name) + ": expected " + std::to_string(params.size()) +
                              " entries, one for each of params, got " + std::to_string(count));
}

inline void check_on(const TensorView& t, const DLDevice& device) {
  if (t.device.device_type != device.device_type || t.device.device_id != device.device_id) {
    fail(t, text(device), text(t.device));
  }
}

inline const float* scalar_of(const TensorView& t, const DLDevice& device) {
  check_on(t, device);
  check_dtype(t, {DType::kFloat32});
  if (t.numel != 1) fail(t, "one element", std::to_string(t.numel));
  return t.as<float>();
}

// Where `copy` is to be read as `param` is, in another dtype.
inline void check_copy(const TensorView& copy, const TensorView& param) {
  check_dtype(copy, {DType::kBFloat16});
  TensorView same_dtype = copy;
  same_dtype.dtype = param.dtype;
  check_same_layout(same_dtype, param);
  check_no_partial_overlap(copy, param);
}

// The checked rows of a launch. `first` has an entry for each of params; `second` too, or none at all; `copies`
// likewise.
inline std::vector<Row> rows_of(const Tensors& params, const Tensors& grads, const Tensors& first,
                                const Tensors& second, const MaybeTensors& copies, DLDeviceType device) {
  check_count(grads.size(), params, "grads");
  if (!copies.empty()) check_count(copies.size(), params, "copies");
  std::vector<Row> rows;
  for (size_t i = 0; i < params.size(); ++i) {
    const TensorView& param = params[i];
    check_device(param, device);
    check_on(param, params[0].device);
    check_dtype(param, {DType::kFloat32});
    check_dense(param);
    std::vector<const TensorView*> others{&grads[i], &first[i]};
    if (!second.empty()) others.push_back(&second[i]);
    for (const TensorView* other : others) {
      check_same_layout(*other, param);
      check_no_partial_overlap(param, *other);
    }
    BFloat16* copy = nullptr;
    if (!copies.empty() && copies[i]) {
      check_copy(*copies[i], param);
      copy = copies[i]->as<BFloat16>();
    }
    rows.push_back({param.as<float>(), grads[i].as<float>(), first[i].as<float>(),
                    second.empty() ? nullptr : second[i].as<float>(), copy, nullptr, 0.0f, param.numel});
  }
  return rows;
}

inline std::vector<Row> sgd_rows(const Tensors& params, const Tensors& grads, const Tensors& momentum_buffers,
                                 const Tensors& emas, const MaybeTensors& copies,
                                 const std::vector<double>& weight_decays, DLDeviceType device) {
  check_count(momentum_buffers.size(), params, "momentum_buffers");
  if (!emas.empty()) check_count(emas.size(), params, "emas");
  check_count(weight_decays.size(), params, "weight_decays");
  std::vector<Row> rows = rows_of(params, grads, momentum_buffers, emas, copies, device);
  for (size_t i = 0; i < rows.size(); ++i) rows[i].weight_decay = static_cast<float>(weight_decays[i]);
  return rows;
}

inline std::vector<Row> adam_rows(const Tensors& params, const Tensors& grads, const Tensors& exp_avgs,
                                  const Tensors& exp_avg_sqs, const MaybeTensors& copies, const Tensors& steps,
                                  DLDeviceType device) {
  check_count(exp_avgs.size(), params, "exp_avgs");
  check_count(exp_avg_sqs.size(), params, "exp_avg_sqs");
  check_count(steps.size(), params, "steps");
  std::vector<Row> rows = rows_of(params, grads, exp_avgs, exp_avg_sqs, copies, device);
  for (size_t i = 0; i < rows.size(); ++i) rows[i].step = scalar_of(steps[i], params[i].device);
  return rows;
}

// All tensors float32, each of `params` and what belongs to it dense and in one order; copies bfloat16. Written in
// place: params, momentum_buffers, emas (or none), copies (or none, also one by one). lr, momentum, ema_decay: one
// element each. `threads`: how many may share the work.
void sgd_ema_cpu(const Tensors& params, const Tensors& grads, const Tensors& momentum_buffers, const Tensors& emas,
                 const MaybeTensors& copies, const std::vector<double>& weight_decays, const TensorView& lr,
                 const TensorView& momentum, const TensorView& ema_decay, bool nesterov, int threads);

// Likewise; steps: one element each, counted from 1, only read.
void adam_cpu(const Tensors& params, const Tensors& grads, const Tensors& exp_avgs, const Tensors& exp_avg_sqs,
              const MaybeTensors& copies, const Tensors& steps, const TensorView& lr, double beta1, double beta2,
              double eps, int threads);

// lr, momentum and ema_decay may stand in host memory: the launch takes their values along. Elsewhere the kernel reads
// them. `stream`: a cudaStream_t. Does not wait for the kernel.
void sgd_ema_cuda(const Tensors& params, const Tensors& grads, const Tensors& momentum_buffers, const Tensors& emas,
                  const MaybeTensors& copies, const std::vector<double>& weight_decays, const TensorView& lr,
                  const TensorView& momentum, const TensorView& ema_decay, bool nesterov, void* stream);
void adam_cuda(const Tensors& params, const Tensors& grads, const Tensors& exp_avgs, const Tensors& exp_avg_sqs,
               const MaybeTensors& copies, const Tensors& steps, const TensorView& lr, double beta1, double beta2,
               double eps, void* stream);

}  // namespace puat
