// spectral_norm: W / sigma for many layers. Formulas, shapes and errors: puat_fast/ops/spectral_norm.py.
#pragma once

#include <vector>

#include "tensor.h"

namespace puat {

// A trace holds a row for each iteration of a layer, one if there was none: v (columns), u (rows), sigma, in logical
// order. `workspace` has the size of the trace that is written. Shared: weights are float32, out x ..., contiguous or
// channels_last; all layers lie on one device. `stream`: a cudaStream_t; nothing waits for a kernel.

// Updates us and vs in place, and writes the traces of all layers into `trace`, one after another.
void spectral_norm_iterate_cuda(const TensorView& trace, const TensorView& workspace,
                                const std::vector<TensorView>& weights, const std::vector<TensorView>& us,
                                const std::vector<TensorView>& vs, const std::vector<int64_t>& iterations,
                                void* stream);

// out = W / sigma, float32 or bfloat16, in W's layout: row k by the sigma of iteration k where per_row, else by the
// last.
void spectral_norm_scale_cuda(const std::vector<TensorView>& out, const std::vector<TensorView>& weights,
                              const std::vector<TensorView>& traces, const std::vector<bool>& per_row, void* stream);

// grad_weights from the gradients of `out`, both in W's layout. `dots`: workspace, an element for each row of all
// layers.
void spectral_norm_backward_cuda(const TensorView& dots, const std::vector<TensorView>& grad_weights,
                                 const std::vector<TensorView>& grads, const std::vector<TensorView>& weights,
                                 const std::vector<TensorView>& traces, const std::vector<bool>& per_row, void* stream);

}  // namespace puat
