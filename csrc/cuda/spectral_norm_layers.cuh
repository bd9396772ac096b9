// The table of layers that spectral_norm's kernels take by value, and the checks on what goes into it.
#pragma once

#include <cuda_runtime.h>

#include <algorithm>
#include <cstdint>
#include <stdexcept>
#include <string>
#include <vector>

#include "tensor.h"

namespace puat::spectral {

constexpr int kMaxLayers = 32;  // _MAX_LAYERS of puat_fast/ops/spectral_norm.py

// One layer, W as rows x columns in the order of memory. Not all of it is there in each launch.
struct Layer {
  const float* weight;
  float* u;
  float* v;
  float* trace;      // steps rows of (v, u, sigma)
  float* workspace;  // the same, with v and u before they are normalised, v in the order of memory, 1/|v| for sigma
  const void* in;    // gradient of the result
  void* out;         // result, or gradient of W
  float* dots;       // <g_i, W_i> of each row i
  int rows, columns;
  int channels, positions;  // columns = channels x positions in the logical order, positions x channels in memory
  int iterations;
  int steps;  // rows of the trace: iterations, at least 1
  bool per_row;

  __device__ int64_t stride() const { return int64_t{columns} + rows + 1; }
  __device__ float* trace_v(int step) const { return trace + step * stride(); }
  __device__ float* trace_u(int step) const { return trace_v(step) + columns; }
  __device__ float* trace_sigma(int step) const { return trace_u(step) + rows; }
  __device__ float* raw_v(int step) const { return workspace + step * stride(); }
  __device__ float* raw_u(int step) const { return raw_v(step) + columns; }
  __device__ float* inverse_norm_of_v(int step) const { return raw_u(step) + rows; }
  // Where column j in memory stands in the logical order.
  __device__ int logical(int j) const { return positions == 1 ? j : j % channels * positions + j / channels; }
};

struct Layers {
  int count;
  Layer layer[kMaxLayers];
};

inline void check_count(const char* name, size_t count, size_t expected) {
  if (count == expected) return;
  throw std::invalid_argument(std::string(name) + ": expected " + std::to_string(expected) +
                              " of them, one for each weight, got " + std::to_string(count));
}

inline void check_vector(const TensorView& t, int64_t size, const TensorView& weight) {
  check_dtype(t, {DType::kFloat32});
  if (t.device.device_type != weight.device.device_type || t.device.device_id != weight.device.device_id) {
    fail(t, text(weight.device) + " (as " + weight.name + ")", text(t.device));
  }
  const std::vector<int64_t> shape{size};
  if (t.shape != shape) fail(t, "shape " + text(shape), "shape " + text(t.shape));
  if (size > 1 && t.strides[0] != 1) fail(t, "a contiguous vector", "strides " + text(t.strides));
}

// Rows one after another, and within a row the logical order (contiguous) or the channels innermost (channels_last).
inline Layer layer_of(const TensorView& weight) {
  check_device(weight, kDLCUDA);
  check_dtype(weight, {DType::kFloat32});
  if (weight.shape.size() < 2 || weight.numel == 0) {
    fail(weight, "out x ... elements", "shape " + text(weight.shape));
  }
  check_dense(weight);
  Layer layer{};
  const int64_t rows = weight.shape[0], columns = weight.numel / rows;
  if (weight.numel > int64_t{1} << 30) fail(weight, "at most 2^30 elements", "shape " + text(weight.shape));
  layer.weight = weight.as<float>();
  layer.rows = static_cast<int>(rows);
  layer.columns = static_cast<int>(columns);
  const auto in_order = [&](std::vector<size_t> dims) {
    int64_t stride = 1;
    for (size_t d : dims) {
      if (weight.shape[d] != 1 && weight.strides[d] != stride) return false;
      stride *= weight.shape[d];
    }
    return true;
  };
  std::vector<size_t> contiguous(weight.shape.size());
  for (size_t d = 0; d < contiguous.size(); ++d) contiguous[d] = contiguous.size() - 1 - d;
  const bool channels_last = !in_order(contiguous);
  if (channels_last && !(weight.shape.size() == 4 && in_order({1, 3, 2, 0}))) {
    fail(weight, "a contiguous or channels_last tensor", "strides " + text(weight.strides));
  }
  layer.channels = channels_last ? static_cast<int>(weight.shape[1]) : layer.columns;
  layer.positions = layer.columns / layer.channels;
  return layer;
}

inline Layers layers_of(const std::vector<TensorView>& weights) {
  if (weights.empty() || weights.size() > kMaxLayers) {
    throw std::invalid_argument("weights: expected 1 to " + std::to_string(kMaxLayers) + " of them, got " +
                                std::to_string(weights.size()));
  }
  Layers layers{};
  for (const TensorView& weight : weights) {
    layers.layer[layers.count++] = layer_of(weight);
    if (weight.device.device_id != weights[0].device.device_id) {
      fail(weight, text(weights[0].device) + " (as weights[0])", text(weight.device));
    }
  }
  return layers;
}

inline void check_disjoint(const std::vector<TensorView>& us, const std::vector<TensorView>& vs) {
  std::vector<const TensorView*> all;
  for (const TensorView& t : us) all.push_back(&t);
  for (const TensorView& t : vs) all.push_back(&t);
  for (size_t a = 0; a < all.size(); ++a) {
    for (size_t b = a + 1; b < all.size(); ++b) {
      check_no_partial_overlap(*all[a], *all[b]);
      if (all[a]->data == all[b]->data) fail(*all[b], "memory of its own", "that of " + all[a]->name);
    }
  }
}

// Fills in the traces, and checks that they fit.
inline void add_traces(Layers& layers, const std::vector<TensorView>& weights, const std::vector<TensorView>& traces,
                       const std::vector<bool>& per_row) {
  check_count("traces", traces.size(), weights.size());
  check_count("per_row", per_row.size(), weights.size());
  for (int l = 0; l < layers.count; ++l) {
    Layer& layer = layers.layer[l];
    const int64_t row = int64_t{layer.columns} + layer.rows + 1;
    const int64_t steps = std::max<int64_t>(traces[l].numel / row, 1);
    check_vector(traces[l], steps * row, weights[l]);
    layer.trace = traces[l].as<float>();
    layer.steps = static_cast<int>(steps);
    layer.per_row = per_row[l] && layer.steps > 1;  // without iterations, or with one row, there is one sigma
    if (layer.per_row && layer.steps != layer.rows) {
      fail(traces[l], "1 or " + std::to_string(layer.rows) + " iterations (per_row)", std::to_string(steps));
    }
  }
}

inline void check_alike(const char* name, const std::vector<TensorView>& tensors,
                        const std::vector<TensorView>& weights) {
  check_count(name, tensors.size(), weights.size());
  for (size_t l = 0; l < weights.size(); ++l) {
    check_dtype(tensors[l], {DType::kFloat32, DType::kBFloat16});
    if (tensors[l].dtype != tensors[0].dtype) {
      fail(tensors[l], std::string(name_of(tensors[0].dtype)) + " (as " + tensors[0].name + ")",
           name_of(tensors[l].dtype));
    }
    TensorView in_float = tensors[l];
    in_float.dtype = DType::kFloat32;  // the dtypes may differ, all else not
    check_same_layout(in_float, weights[l]);
  }
}

}  // namespace puat::spectral
