// Runs the CPU kernels over ragged sizes on exactly sized heap buffers; built with sanitizers by tests/asan.sh.
#include <cmath>
#include <cstdio>
#include <cstdlib>
#include <thread>
#include <vector>

#include "parallel.h"
#include "pgd_step.h"

namespace {

template <typename T>
puat::TensorView view(const char* name, std::vector<T>& values, int64_t& size, uint8_t code) {
  puat::DLTensor tensor{values.data(), {puat::kDLCPU, 0}, 1, {code, sizeof(T) * 8, 1}, &size, nullptr, 0};
  return puat::TensorView(name, tensor);
}

template <typename T>
void run(int64_t size, int threads, uint8_t code) {
  std::vector<T> x(size), grad(size), x0(size), out(size);
  for (int64_t i = 0; i < size; ++i) {
    puat::store(&x[i], 0.25f);
    puat::store(&grad[i], i % 2 ? 1.0f : -1.0f);
    puat::store(&x0[i], 0.5f);
  }
  const puat::TensorView views[] = {view("out", out, size, code), view("x", x, size, code),
                                    view("grad", grad, size, code), view("x0", x0, size, code)};
  puat::pgd_step_cpu(views[0], views[1], views[2], views[3], 0.25f, 0.125f, threads);
  puat::pgd_step_cpu(views[1], views[1], views[2], views[3], 0.25f, 0.125f, threads);
  for (int64_t i = 0; i < size; ++i) {
    const float expected = i % 2 ? 0.375f : 0.25f;
    if (puat::to_float(out[i]) != expected || puat::to_float(x[i]) != expected) {
      std::fprintf(stderr, "size %lld, threads %d: wrong at %lld\n", static_cast<long long>(size), threads,
                   static_cast<long long>(i));
      std::exit(1);
    }
  }
}

// The gradient of samples of `size` equal elements steps from 0.25 towards 0.5, by step / sqrt(size) each.
template <typename T>
void run_l2(int64_t samples, int64_t size, int threads, uint8_t code) {
  std::vector<T> x(samples * size), grad(samples * size), x0(samples * size), out(samples * size);
  for (size_t i = 0; i < x.size(); ++i) {
    puat::store(&x[i], 0.25f);
    puat::store(&grad[i], 3.0f);
    puat::store(&x0[i], 0.5f);
  }
  int64_t shape[] = {samples, size};
  const auto matrix = [&](const char* name, std::vector<T>& values) {
    puat::DLTensor tensor{values.data(), {puat::kDLCPU, 0}, 2, {code, sizeof(T) * 8, 1}, shape, nullptr, 0};
    return puat::TensorView(name, tensor);
  };
  const puat::TensorView views[] = {matrix("out", out), matrix("x", x), matrix("grad", grad), matrix("x0", x0)};
  const double root = std::sqrt(static_cast<double>(size));
  const float step = static_cast<float>(root / 8);
  puat::pgd_step_l2_cpu(views[0], views[1], views[2], views[3], root, step, threads);
  puat::pgd_step_l2_cpu(views[1], views[1], views[2], views[3], root / 16, step, threads);
  for (size_t i = 0; i < x.size(); ++i) {
    if (std::abs(puat::to_float(out[i]) - 0.375f) > 1e-5f || std::abs(puat::to_float(x[i]) - 0.4375f) > 1e-5f) {
      std::fprintf(stderr, "l2, size %lld, threads %d: wrong at %zu\n", static_cast<long long>(size), threads, i);
      std::exit(1);
    }
  }
}

void run_all() {
  for (int64_t size : {0, 1, 2, 7, 31, 257, 65535, 65537, 200003}) {
    for (int threads : {1, 2, 3}) {
      run<float>(size, threads, puat::kDLFloat);
      run<puat::BFloat16>(size, threads, puat::kDLBfloat);
    }
  }
  for (int64_t size : {0, 1, 15, 16, 17, 255, 256, 257, 3072, 70001}) {
    for (int threads : {1, 2, 3}) {
      run_l2<float>(7, size, threads, puat::kDLFloat);
      run_l2<puat::BFloat16>(7, size, threads, puat::kDLBfloat);
    }
  }
}

}  // namespace

int main() {
  std::thread other(run_all);  // two loops at once
  run_all();
  other.join();
  std::puts("ok");
}
