#include "sgd_ema.h"

#include "parallel.h"
#include "simd.h"

namespace puat {
namespace {

constexpr DLDevice kCpu{kDLCPU, 0};
// Below this many elements a thread, waking one costs more than it saves.
constexpr int64_t kGrain = 32768;
// So many elements of all streams stay in the first-level cache from the update to the average and the copy.
constexpr int64_t kTile = 1024;

PUAT_SIMD void run(const SgdUpdate& update, float* param, const float* grad, float* buffer, int64_t n) {
  const SgdUpdate one = update;  // in registers: the stores below cannot change it
#pragma omp simd
  for (int64_t i = 0; i < n; ++i) one(param[i], grad[i], buffer[i]);
}

PUAT_SIMD void run(const AdamUpdate& update, float* param, const float* grad, float* exp_avg, float* exp_avg_sq,
                   int64_t n) {
  const AdamUpdate one = update;
#pragma omp simd
  for (int64_t i = 0; i < n; ++i) one(param[i], grad[i], exp_avg[i], exp_avg_sq[i]);
}

PUAT_SIMD void average(float* ema, const float* param, int64_t n, float decay) {
#pragma omp simd
  for (int64_t i = 0; i < n; ++i) ema[i] = moving_average(ema[i], param[i], decay);
}

PUAT_SIMD void round_to(BFloat16* copy, const float* param, int64_t n) {
#pragma omp simd
  for (int64_t i = 0; i < n; ++i) store(&copy[i], param[i]);
}

// tile(row, begin, n) for tiles that cover all elements of all rows, as if these were one long tensor.
template <typename Tile>
void for_each_tile(const std::vector<Row>& rows, int threads, const Tile& tile) {
  std::vector<int64_t> starts{0};
  for (const Row& row : rows) starts.push_back(starts.back() + row.numel);
  parallel_for(starts.back(), kGrain, threads, [&](int64_t begin, int64_t end) {
    size_t i = std::upper_bound(starts.begin(), starts.end(), begin) - starts.begin() - 1;
    for (; begin < end; ++i) {
      const int64_t stop = std::min(end, starts[i + 1]);
      for (int64_t n; begin < stop; begin += n) {
        n = std::min(kTile, stop - begin);
        tile(rows[i], begin - starts[i], n);
      }
    }
  });
}

}  // namespace

void sgd_ema_cpu(const Tensors& params, const Tensors& grads, const Tensors& momentum_buffers, const Tensors& emas,
                 const MaybeTensors& copies, const std::vector<double>& weight_decays, const TensorView& lr,
                 const TensorView& momentum, const TensorView& ema_decay, bool nesterov, int threads) {
  const std::vector<Row> rows = sgd_rows(params, grads, momentum_buffers, emas, copies, weight_decays, kDLCPU);
  const float rate = *scalar_of(lr, kCpu), inertia = *scalar_of(momentum, kCpu), decay = *scalar_of(ema_decay, kCpu);
  for_each_tile(rows, threads, [=](const Row& row, int64_t i, int64_t n) {
    run(SgdUpdate{rate, inertia, row.weight_decay, nesterov}, row.param + i, row.grad + i, row.first + i, n);
    if (row.second != nullptr) average(row.second + i, row.param + i, n, decay);
    if (row.copy != nullptr) round_to(row.copy + i, row.param + i, n);
  });
}

void adam_cpu(const Tensors& params, const Tensors& grads, const Tensors& exp_avgs, const Tensors& exp_avg_sqs,
              const MaybeTensors& copies, const Tensors& steps, const TensorView& lr, double beta1, double beta2,
              double eps, int threads) {
  const std::vector<Row> rows = adam_rows(params, grads, exp_avgs, exp_avg_sqs, copies, steps, kDLCPU);
  const AdamConstants constants(beta1, beta2, eps);
  const float rate = *scalar_of(lr, kCpu);
  for_each_tile(rows, threads, [=](const Row& row, int64_t i, int64_t n) {
    const AdamUpdate update = constants.at(rate, *row.step);
    run(update, row.param + i, row.grad + i, row.first + i, row.second + i, n);
    if (row.copy != nullptr) round_to(row.copy + i, row.param + i, n);
  });
}

}  // namespace puat
