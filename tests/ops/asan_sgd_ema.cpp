// Runs both kernels over ragged sizes on exactly sized heap buffers; built with sanitizers by tests/asan.sh.
#include <cmath>
#include <cstdio>
#include <cstdlib>
#include <deque>
#include <thread>
#include <vector>

#include "parallel.h"
#include "sgd_ema.h"

namespace {

const std::vector<int64_t> kSizes{0, 1, 2, 7, 1023, 1025, 65537, 200003};

// Tensors of all sizes, each filled with one value.
template <typename T>
struct Filled {
  std::deque<std::vector<T>> values;
  std::deque<int64_t> sizes;  // a view points into it
  std::vector<puat::TensorView> views;

  Filled(const char* name, float value, const std::vector<int64_t>& wanted) {
    for (int64_t size : wanted) {
      sizes.push_back(size);
      values.emplace_back(size);
      for (T& element : values.back()) puat::store(&element, value);
      const uint8_t code = sizeof(T) == 4 ? puat::kDLFloat : puat::kDLBfloat;
      puat::DLTensor tensor{values.back().data(), {puat::kDLCPU, 0}, 1, {code, sizeof(T) * 8, 1},
                            &sizes.back(),        nullptr,           0};
      views.emplace_back(name, tensor);
    }
  }

  void expect(float expected) const {
    for (const auto& tensor : values) {
      for (const T& element : tensor) {
        if (std::fabs(puat::to_float(element) - expected) < 1e-6f) continue;
        std::fprintf(stderr, "%s: expected %f, got %f\n", views[0].name.c_str(), expected, puat::to_float(element));
        std::exit(1);
      }
    }
  }
};

using Floats = Filled<float>;

puat::MaybeTensors some(const Filled<puat::BFloat16>& copies) {
  puat::MaybeTensors out(copies.views.begin(), copies.views.end());
  out[1] = std::nullopt;
  return out;
}

void run_sgd(int threads) {
  const Floats params("params", 1.0f, kSizes), grads("grads", 0.5f, kSizes), buffers("momentum_buffers", 2.0f, kSizes);
  const Floats emas("emas", 0.0f, kSizes);
  const Floats numbers("number", 0.5f, {1});
  const Filled<puat::BFloat16> copies("copies", 0.0f, kSizes);
  const auto& half = numbers.views[0];
  puat::sgd_ema_cpu(params.views, grads.views, buffers.views, emas.views, some(copies),
                    std::vector<double>(kSizes.size(), 0.5), half, half, half, true, threads);
  buffers.expect(2.0f);  // 0.5 * 2 + (0.5 + 0.5 * 1)
  params.expect(0.0f);   // 1 - 0.5 * (1 + 0.5 * 2)
  emas.expect(0.0f);
  puat::sgd_ema_cpu(params.views, grads.views, buffers.views, {}, {}, std::vector<double>(kSizes.size(), 0.0), half,
                    half, half, false, threads);
  params.expect(-0.75f);  // -0.5 * (0.5 * 2 + 0.5)
}

void run_adam(int threads) {
  const Floats params("params", 1.0f, kSizes), grads("grads", 0.5f, kSizes), exp_avgs("exp_avgs", 0.0f, kSizes);
  const Floats exp_avg_sqs("exp_avg_sqs", 0.0f, kSizes), steps("steps", 1.0f, std::vector<int64_t>(kSizes.size(), 1));
  const Floats lr("lr", 0.25f, {1});
  const Filled<puat::BFloat16> copies("copies", 0.75f, kSizes);
  puat::adam_cpu(params.views, grads.views, exp_avgs.views, exp_avg_sqs.views, some(copies), steps.views, lr.views[0],
                 0.5, 0.75, 0.0, threads);
  params.expect(0.75f);  // the first step is lr sign(grad)
  exp_avgs.expect(0.25f);
  exp_avg_sqs.expect(0.0625f);
  copies.expect(0.75f);
}

void run_all() {
  for (int threads : {1, 2, 3}) {
    run_sgd(threads);
    run_adam(threads);
  }
}

}  // namespace

int main() {
  std::thread other(run_all);  // two loops at once
  run_all();
  other.join();
  std::puts("ok");
}
