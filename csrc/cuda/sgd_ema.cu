#include "cuda/launch.cuh"
#include "sgd_ema.h"

namespace puat {
namespace {

constexpr int kBlock = 256;
constexpr int kWidth = 4;  // floats in 16 bytes, the widest load there is
constexpr int kPerBlock = 16 * kBlock;

// The tensors of one launch, by value: nothing to allocate, nothing to copy, and a captured graph holds its own. Kernel
// parameters may take 4 KB, and 32 KB with CUDA 12.1 or later. More tensors take more launches.
constexpr int kRows = CUDART_VERSION >= 12010 ? 128 : 48;
struct Table {
  int count;
  unsigned first_block[kRows];
  Row rows[kRows];
};

// A number known at launch, or one to be read on the device.
struct Scalar {
  const float* at;
  float value;

  Scalar(const TensorView& t, const TensorView& like)
      : at(t.device.device_type == kDLCPU ? nullptr : scalar_of(t, like.device)),
        value(at != nullptr ? 0.0f : *scalar_of(t, t.device)) {}

  __device__ float get() const { return at != nullptr ? *at : value; }
};

struct Sgd {
  Scalar lr, momentum, ema_decay;
  bool nesterov;

  struct Update {
    SgdUpdate sgd;
    float ema_decay;
    __device__ void operator()(float& param, float grad, float& buffer, float& ema) const {
      sgd(param, grad, buffer);
      ema = moving_average(ema, param, ema_decay);
    }
  };
  __device__ Update of(const Row& row) const {
    return {{lr.get(), momentum.get(), row.weight_decay, nesterov}, ema_decay.get()};
  }
};

struct Adam {
  Scalar lr;
  AdamConstants constants;

  __device__ AdamUpdate of(const Row& row) const { return constants.at(lr.get(), *row.step); }
};

// The row of this block: the last one that begins at or before it. Uniform over the block.
__device__ int row_of_block(const Table& table) {
  int low = 0, high = table.count;
  while (high - low > 1) {
    const int middle = (low + high) / 2;
    (table.first_block[middle] <= blockIdx.x ? low : high) = middle;
  }
  return low;
}

__device__ bool is_aligned(const void* pointer, int bytes) { return reinterpret_cast<uintptr_t>(pointer) % bytes == 0; }

template <typename Update>
__device__ void update_pack(const Row& row, int64_t i, const Update& update) {
  using Floats = Pack<float, kWidth>;
  Floats param = *reinterpret_cast<const Floats*>(row.param + i), first = *reinterpret_cast<Floats*>(row.first + i);
  const Floats grad = *reinterpret_cast<const Floats*>(row.grad + i);
  Floats second{};
  if (row.second != nullptr) second = *reinterpret_cast<Floats*>(row.second + i);
  Pack<BFloat16, kWidth> copy;
#pragma unroll
  for (int k = 0; k < kWidth; ++k) {
    update(param.value[k], grad.value[k], first.value[k], second.value[k]);
    store(&copy.value[k], param.value[k]);
  }
  *reinterpret_cast<Floats*>(row.param + i) = param;
  *reinterpret_cast<Floats*>(row.first + i) = first;
  if (row.second != nullptr) *reinterpret_cast<Floats*>(row.second + i) = second;
  if (row.copy != nullptr) *reinterpret_cast<Pack<BFloat16, kWidth>*>(row.copy + i) = copy;
}

template <typename Update>
__device__ void update_element(const Row& row, int64_t i, const Update& update) {
  float second = row.second != nullptr ? row.second[i] : 0.0f;
  update(row.param[i], row.grad[i], row.first[i], second);
  if (row.second != nullptr) row.second[i] = second;
  if (row.copy != nullptr) store(&row.copy[i], row.param[i]);
}

// Memory-bound. A block has one stretch of one tensor; its threads take neighbouring packs. Without alignment, and in
// the ragged last pack, the same elements one by one.
template <typename Rule>
__global__ void __launch_bounds__(kBlock)
    update_kernel(const __grid_constant__ Table table, const __grid_constant__ Rule rule) {
  const int which = row_of_block(table);
  const Row& row = table.rows[which];
  const auto update = rule.of(row);
  const int64_t begin = static_cast<int64_t>(blockIdx.x - table.first_block[which]) * kPerBlock;
  const int64_t end = min(begin + kPerBlock, row.numel);
  const bool aligned = is_aligned(row.param, 16) && is_aligned(row.grad, 16) && is_aligned(row.first, 16) &&
                       is_aligned(row.second, 16) && is_aligned(row.copy, 8);
  for (int64_t i = begin + threadIdx.x * kWidth; i < end; i += kBlock * kWidth) {
    if (aligned && i + kWidth <= end) {
      update_pack(row, i, update);
    } else {
      for (int64_t k = i; k < min(i + kWidth, end); ++k) update_element(row, k, update);
    }
  }
}

template <typename Rule>
void launch(const std::vector<Row>& rows, const Rule& rule, const char* what, void* stream) {
  Table table;
  unsigned blocks = 0;
  table.count = 0;
  const auto flush = [&] {
    if (blocks == 0) return;
    update_kernel<Rule><<<blocks, kBlock, 0, static_cast<cudaStream_t>(stream)>>>(table, rule);
    check_cuda(cudaGetLastError(), what);
    blocks = 0;
    table.count = 0;
  };
  for (const Row& row : rows) {
    if (row.numel == 0) continue;
    if (table.count == kRows) flush();
    table.rows[table.count] = row;
    table.first_block[table.count++] = blocks;
    blocks += static_cast<unsigned>((row.numel + kPerBlock - 1) / kPerBlock);
  }
  flush();
}

}  // namespace

void sgd_ema_cuda(const Tensors& params, const Tensors& grads, const Tensors& momentum_buffers, const Tensors& emas,
                  const MaybeTensors& copies, const std::vector<double>& weight_decays, const TensorView& lr,
                  const TensorView& momentum, const TensorView& ema_decay, bool nesterov, void* stream) {
  if (params.empty()) return;
  const std::vector<Row> rows = sgd_rows(params, grads, momentum_buffers, emas, copies, weight_decays, kDLCUDA);
  const Sgd rule{{lr, params[0]}, {momentum, params[0]}, {ema_decay, params[0]}, nesterov};
  const DeviceGuard guard(params[0].device.device_id);
  launch(rows, rule, "sgd_ema", stream);
}

void adam_cuda(const Tensors& params, const Tensors& grads, const Tensors& exp_avgs, const Tensors& exp_avg_sqs,
               const MaybeTensors& copies, const Tensors& steps, const TensorView& lr, double beta1, double beta2,
               double eps, void* stream) {
  if (params.empty()) return;
  const std::vector<Row> rows = adam_rows(params, grads, exp_avgs, exp_avg_sqs, copies, steps, kDLCUDA);
  const Adam rule{{lr, params[0]}, AdamConstants(beta1, beta2, eps)};
  const DeviceGuard guard(params[0].device.device_id);
  launch(rows, rule, "adam", stream);
}

}  // namespace puat
