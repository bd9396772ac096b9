#include <cooperative_groups.h>

#include "bfloat16.h"
#include "cuda/launch.cuh"
#include "cuda/spectral_norm_layers.cuh"
#include "spectral_norm.h"

namespace puat {
namespace {

namespace cg = cooperative_groups;
using namespace spectral;

constexpr int kBlock = 256;
constexpr int kWarp = 32;
constexpr int kWarps = kBlock / kWarp;
constexpr int kBlocksPerSM = 4;  // enough loads under way; each block more makes a grid-wide barrier dearer
constexpr float kEps = 1e-12f;   // of F.normalize

// --- device: sums in a fixed order -----------------------------------------------------------------------------------

__device__ int lane() { return threadIdx.x % kWarp; }
__device__ int warp() { return threadIdx.x / kWarp; }

// The same bits on every lane: a + b = b + a.
__device__ float warp_sum(float x) {
#pragma unroll
  for (int offset = kWarp / 2; offset > 0; offset /= 2) x += __shfl_xor_sync(0xffffffff, x, offset);
  return x;
}

// sum_i a[i] b[i], by a warp.
__device__ float warp_dot(const float* a, const float* b, int n) {
  float sum = 0.0f;
#pragma unroll 8
  for (int i = lane(); i < n; i += kWarp) sum += a[i] * b[i];
  return warp_sum(sum);
}

// Not by fmaxf, which would lose a NaN.
__device__ float inverse_norm(float sum_of_squares) {
  const float norm = sqrtf(sum_of_squares);
  return 1.0f / (norm < kEps ? kEps : norm);
}

// Calls body(layer, unit) for this block's share of all layers' units of work, units(layer) of them for each.
template <typename Units, typename Body>
__device__ void for_each_unit(const Layers& layers, Units units, Body body) {
  int unit = blockIdx.x;
  for (int l = 0; l < layers.count; ++l) {
    const int n = units(layers.layer[l]);
    for (; unit < n; unit += gridDim.x) body(layers.layer[l], unit);
    unit -= n;
  }
}

__host__ __device__ int tiles(int n, int tile) { return (n + tile - 1) / tile; }

// Calls body(layer, row), a warp for each row of all layers.
template <typename Body>
__device__ void for_each_row(const Layers& layers, Body body) {
  for_each_unit(
      layers, [](const Layer& layer) { return tiles(layer.rows, kWarps); },
      [&](const Layer& layer, int unit) {
        const int row = unit * kWarps + warp();
        if (row < layer.rows) body(layer, row);
      });
}

// --- iterate ---------------------------------------------------------------------------------------------------------
//
// The vectors are written as they come, and whoever reads one takes its norm along: no phase for the norms. Between two
// phases stands a barrier of the grid. Each step has its own place in the workspace, so nothing read is overwritten.

// raw_v = W^T u for the 32 columns of a tile: a warp takes every 8th row, a lane one column.
__device__ void columns_phase(const Layer& layer, int tile, int step) {
  __shared__ float partial[kWarps][kWarp];
  __shared__ float partial_norm[kWarps];
  const int j = tile * kWarp + lane();
  const bool inside = j < layer.columns;
  const float* u = step == 0 ? layer.u : layer.raw_u(step - 1);
  float sum = 0.0f, norm = 0.0f;
#pragma unroll 8
  for (int i = warp(); i < layer.rows; i += kWarps) {
    sum += (inside ? layer.weight[int64_t{i} * layer.columns + j] : 0.0f) * u[i];
    norm += u[i] * u[i];
  }
  partial[warp()][lane()] = sum;
  if (lane() == 0) partial_norm[warp()] = norm;
  __syncthreads();
  if (warp() == 0 && inside) {
    sum = norm = 0.0f;
    for (int w = 0; w < kWarps; ++w) {
      sum += partial[w][lane()];
      norm += partial_norm[w];
    }
    layer.raw_v(step)[j] = step == 0 ? sum : sum * inverse_norm(norm);  // the caller's u counts as it is
  }
  __syncthreads();  // partial is free again
}

// raw_u = W v for one row, by a warp.
__device__ void row_phase(const Layer& layer, int row, int step) {
  const float* w = layer.weight + int64_t{row} * layer.columns;
  const float* v = layer.raw_v(step);
  float sum = 0.0f, norm = 0.0f;
#pragma unroll 8
  for (int j = lane(); j < layer.columns; j += kWarp) {
    sum += w[j] * v[j];
    norm += v[j] * v[j];
  }
  const float inverse = layer.iterations > 0 ? inverse_norm(warp_sum(norm)) : 1.0f;
  sum = warp_sum(sum) * inverse;
  if (lane() == 0) {
    layer.raw_u(step)[row] = sum;
    if (row == 0) *layer.inverse_norm_of_v(step) = inverse;
  }
}

// The trace of one step, and u and v after the last, by a block.
__device__ void finish_phase(const Layer& layer, int step) {
  const float* raw_u = layer.raw_u(step);
  const bool iterated = layer.iterations > 0, last = step + 1 == layer.iterations;
  const float scale_v = *layer.inverse_norm_of_v(step);
  const float scale_u = iterated ? inverse_norm(warp_dot(raw_u, raw_u, layer.rows)) : 1.0f;
  const float* u = iterated ? raw_u : layer.u;
  const float sigma = warp_dot(u, raw_u, layer.rows) * scale_u;
  for (int j = threadIdx.x; j < layer.columns; j += kBlock) {
    const float value = layer.raw_v(step)[j] * scale_v;
    layer.trace_v(step)[layer.logical(j)] = value;
    if (last) layer.v[layer.logical(j)] = value;
  }
  for (int i = threadIdx.x; i < layer.rows; i += kBlock) {
    const float value = u[i] * scale_u;
    layer.trace_u(step)[i] = value;
    if (last) layer.u[i] = value;
  }
  if (threadIdx.x == 0) *layer.trace_sigma(step) = sigma;
}

__global__ void __launch_bounds__(kBlock, kBlocksPerSM) iterate_kernel(const __grid_constant__ Layers layers) {
  const cg::grid_group grid = cg::this_grid();
  int steps = 0;
  for (int l = 0; l < layers.count; ++l) steps = max(steps, layers.layer[l].steps);
  for (int step = 0; step < steps; ++step) {
    for_each_unit(
        layers, [=](const Layer& layer) { return step < layer.steps ? tiles(layer.columns, kWarp) : 0; },
        [=](const Layer& layer, int tile) {
          const int j = tile * kWarp + threadIdx.x;
          if (layer.iterations > 0) {
            columns_phase(layer, tile, step);
          } else if (threadIdx.x < kWarp && j < layer.columns) {
            layer.raw_v(step)[j] = layer.v[layer.logical(j)];
          }
        });
    grid.sync();
    for_each_row(layers, [=](const Layer& layer, int row) {
      if (step < layer.steps) row_phase(layer, row, step);
    });
    grid.sync();
  }
  for_each_unit(
      layers, [](const Layer& layer) { return layer.steps; },
      [](const Layer& layer, int step) { finish_phase(layer, step); });
}

// --- scale, and its backward -----------------------------------------------------------------------------------------

template <typename T>
__global__ void __launch_bounds__(kBlock) scale_kernel(const __grid_constant__ Layers layers) {
  for_each_row(layers, [](const Layer& layer, int row) {
    const float sigma = *layer.trace_sigma(layer.per_row ? row : layer.steps - 1);
    const float* w = layer.weight + int64_t{row} * layer.columns;
    T* out = static_cast<T*>(layer.out) + int64_t{row} * layer.columns;
#pragma unroll 8
    for (int j = lane(); j < layer.columns; j += kWarp) store(&out[j], w[j] / sigma);
  });
}

// <g, W> of the whole layer is the sum of its rows' dots, which every warp adds up in the same order.
template <typename T>
__global__ void __launch_bounds__(kBlock, kBlocksPerSM) backward_kernel(const __grid_constant__ Layers layers) {
  for_each_row(layers, [](const Layer& layer, int row) {
    const float* w = layer.weight + int64_t{row} * layer.columns;
    const T* g = static_cast<const T*>(layer.in) + int64_t{row} * layer.columns;
    float sum = 0.0f;
#pragma unroll 8
    for (int j = lane(); j < layer.columns; j += kWarp) sum += to_float(g[j]) * w[j];
    sum = warp_sum(sum);
    if (lane() == 0) layer.dots[row] = sum;
  });
  cg::this_grid().sync();
  for_each_row(layers, [](const Layer& layer, int row) {
    const T* g = static_cast<const T*>(layer.in) + int64_t{row} * layer.columns;
    float* out = static_cast<float*>(layer.out) + int64_t{row} * layer.columns;
    const float sigma = *layer.trace_sigma(layer.per_row ? row : layer.steps - 1);
    if (!layer.per_row) {
      float dot = 0.0f;
      for (int i = lane(); i < layer.rows; i += kWarp) dot += layer.dots[i];
      const int last = layer.steps - 1;
      const float scale = warp_sum(dot) / (sigma * sigma) * layer.trace_u(last)[row];
      const float* v = layer.trace_v(last);
#pragma unroll 4
      for (int j = lane(); j < layer.columns; j += kWarp) {
        out[j] = to_float(g[j]) / sigma - scale * v[layer.logical(j)];
      }
      return;
    }
    for (int j = lane(); j < layer.columns; j += kWarp) {
      float through_sigma = 0.0f;
      for (int k = 0; k < layer.steps; ++k) {
        const float sigma_k = *layer.trace_sigma(k);
        const float scale = layer.dots[k] / (sigma_k * sigma_k) * layer.trace_u(k)[row];
        through_sigma += scale * layer.trace_v(k)[layer.logical(j)];
      }
      out[j] = to_float(g[j]) / sigma - through_sigma;
    }
  });
}

// --- launches --------------------------------------------------------------------------------------------------------

unsigned rows_grid(const Layers& layers) {
  int blocks = 0;
  for (int l = 0; l < layers.count; ++l) blocks += tiles(layers.layer[l].rows, kWarps);
  return blocks;
}

unsigned columns_grid(const Layers& layers) {
  int blocks = 0;
  for (int l = 0; l < layers.count; ++l) blocks += tiles(layers.layer[l].columns, kWarp);
  return blocks;
}

// All blocks must be resident at once: a barrier of the grid waits for them. At most `wanted` of them.
void launch_cooperatively(void (*kernel)(Layers), Layers layers, unsigned wanted, void* stream, const char* what) {
  int device = 0, multiprocessors = 0, fit = 0;
  check_cuda(cudaGetDevice(&device), "cudaGetDevice");
  check_cuda(cudaDeviceGetAttribute(&multiprocessors, cudaDevAttrMultiProcessorCount, device), "multiprocessors");
  check_cuda(cudaOccupancyMaxActiveBlocksPerMultiprocessor(&fit, kernel, kBlock, 0), "occupancy");
  const unsigned blocks = std::min<unsigned>(wanted, multiprocessors * std::min(fit, kBlocksPerSM));
  void* arguments[] = {&layers};
  const auto entry = reinterpret_cast<const void*>(kernel);
  check_cuda(cudaLaunchCooperativeKernel(entry, blocks, kBlock, arguments, 0, static_cast<cudaStream_t>(stream)), what);
}

}  // namespace

void spectral_norm_iterate_cuda(const TensorView& trace, const TensorView& workspace,
                                const std::vector<TensorView>& weights, const std::vector<TensorView>& us,
                                const std::vector<TensorView>& vs, const std::vector<int64_t>& iterations,
                                void* stream) {
  Layers layers = layers_of(weights);
  check_count("us", us.size(), weights.size());
  check_count("vs", vs.size(), weights.size());
  check_count("iterations", iterations.size(), weights.size());
  check_disjoint(us, vs);
  int64_t size = 0;
  for (int l = 0; l < layers.count; ++l) {
    Layer& layer = layers.layer[l];
    check_vector(us[l], layer.rows, weights[l]);
    check_vector(vs[l], layer.columns, weights[l]);
    if (iterations[l] < 0 || iterations[l] > INT32_MAX) {
      throw std::invalid_argument("iterations[" + std::to_string(l) + "]: expected 0 to 2^31 - 1, got " +
                                  std::to_string(iterations[l]));
    }
    layer.u = us[l].as<float>();
    layer.v = vs[l].as<float>();
    layer.iterations = static_cast<int>(iterations[l]);
    layer.steps = std::max(layer.iterations, 1);
    layer.trace = trace.as<float>() + size;
    layer.workspace = workspace.as<float>() + size;
    size += layer.steps * (int64_t{layer.columns} + layer.rows + 1);
  }
  check_vector(trace, size, weights[0]);
  check_vector(workspace, size, weights[0]);
  const DeviceGuard guard(trace.device.device_id);
  const unsigned wanted = std::max(rows_grid(layers), columns_grid(layers));
  launch_cooperatively(iterate_kernel, layers, wanted, stream, "spectral_norm_iterate");
}

void spectral_norm_scale_cuda(const std::vector<TensorView>& out, const std::vector<TensorView>& weights,
                              const std::vector<TensorView>& traces, const std::vector<bool>& per_row, void* stream) {
  Layers layers = layers_of(weights);
  add_traces(layers, weights, traces, per_row);
  check_alike("out", out, weights);
  for (int l = 0; l < layers.count; ++l) layers.layer[l].out = out[l].data;
  const DeviceGuard guard(weights[0].device.device_id);
  const auto kernel = out[0].dtype == DType::kFloat32 ? scale_kernel<float> : scale_kernel<BFloat16>;
  kernel<<<rows_grid(layers), kBlock, 0, static_cast<cudaStream_t>(stream)>>>(layers);
  check_cuda(cudaGetLastError(), "spectral_norm_scale");
}

void spectral_norm_backward_cuda(const TensorView& dots, const std::vector<TensorView>& grad_weights,
                                 const std::vector<TensorView>& grads, const std::vector<TensorView>& weights,
                                 const std::vector<TensorView>& traces, const std::vector<bool>& per_row,
                                 void* stream) {
  Layers layers = layers_of(weights);
  add_traces(layers, weights, traces, per_row);
  check_alike("grads", grads, weights);
  check_alike("grad_weights", grad_weights, weights);
  check_dtype(grad_weights[0], {DType::kFloat32});
  int64_t rows = 0;
  for (int l = 0; l < layers.count; ++l) {
    Layer& layer = layers.layer[l];
    layer.in = grads[l].data;
    layer.out = grad_weights[l].data;
    layer.dots = dots.as<float>() + rows;
    rows += layer.rows;
  }
  check_vector(dots, rows, weights[0]);
  const DeviceGuard guard(dots.device.device_id);
  const auto kernel = grads[0].dtype == DType::kFloat32 ? backward_kernel<float> : backward_kernel<BFloat16>;
  launch_cooperatively(kernel, layers, rows_grid(layers), stream, "spectral_norm_backward");
}

}  // namespace puat
