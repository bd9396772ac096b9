// Runs the CPU kernels over ragged images on exactly sized heap buffers; built with sanitizers by tests/asan.sh.
#include <cmath>
#include <cstdio>
#include <cstdlib>
#include <thread>
#include <vector>

#include "augment.h"
#include "parallel.h"

namespace {

constexpr int kPad = 3;

template <typename T>
struct Buffer {
  std::vector<T> values;
  std::vector<int64_t> shape;
  Buffer(std::vector<int64_t> s) : shape(std::move(s)) {
    int64_t size = 1;
    for (int64_t n : shape) size *= n;
    values.resize(size);
  }
  puat::TensorView view(const char* name, uint8_t code) {
    puat::DLTensor tensor{values.data(),
                          {puat::kDLCPU, 0},
                          static_cast<int32_t>(shape.size()),
                          {code, sizeof(T) * 8, 1},
                          shape.data(),
                          nullptr,
                          0};
    return puat::TensorView(name, tensor);
  }
};

void fill(std::vector<float>& values) { values.assign(values.size(), 1.0f); }
void fill(std::vector<uint8_t>& values) { values.assign(values.size(), 255); }

// Of ones: each output is 1 or 0, and the gradient counts, for each source pixel, the outputs that are 1 through it.
template <typename T>
void run(int64_t n, int64_t c, int64_t h, int64_t w, bool rotates, int threads, uint8_t code) {
  Buffer<T> x({n, c, h, w});
  Buffer<float> out({n, c, h, w}), grad({n, c, h, w}), cos_sin({n, 2});
  Buffer<int64_t> index({n}), top_left({n, 2});
  Buffer<uint8_t> flip({n});
  fill(x.values);
  fill(grad.values);
  for (int64_t i = 0; i < n; ++i) {
    index.values[i] = n - 1 - i;
    top_left.values[2 * i] = i % (2 * kPad + 1);
    top_left.values[2 * i + 1] = 2 * kPad - i % (2 * kPad + 1);
    flip.values[i] = i % 2;
    cos_sin.values[2 * i] = std::cos(0.7f * static_cast<float>(i));
    cos_sin.values[2 * i + 1] = std::sin(0.7f * static_cast<float>(i));
  }
  const puat::Optional corners = top_left.view("top_left", puat::kDLInt), flips = flip.view("flip", puat::kDLUInt);
  const puat::Optional turns = rotates ? puat::Optional(cos_sin.view("cos_sin", puat::kDLFloat)) : std::nullopt;
  puat::augment_cpu(out.view("out", puat::kDLFloat), x.view("x", code), index.view("index", puat::kDLInt), corners,
                    flips, turns, kPad, threads);
  double kept = 0, counted = 0;
  for (float value : out.values) kept += value;
  puat::augment_backward_cpu(out.view("out", puat::kDLFloat), grad.view("grad", puat::kDLFloat), corners, flips, turns,
                             kPad, threads);
  for (float value : out.values) counted += value;
  if (kept != counted) {
    std::fprintf(stderr, "%lld x %lld x %lld, threads %d: %g outputs, %g counted\n", static_cast<long long>(n),
                 static_cast<long long>(h), static_cast<long long>(w), threads, kept, counted);
    std::exit(1);
  }
}

void run_all() {
  const int64_t shapes[][4] = {{0, 3, 4, 4},   {1, 1, 1, 1},    {2, 0, 3, 3},   {5, 3, 7, 11},
                               {9, 2, 32, 33}, {3, 1, 2, 1500}, {40, 3, 32, 32}};
  for (const auto& s : shapes) {
    for (int threads : {1, 2, 3}) {
      for (bool rotates : {false, true}) {
        run<float>(s[0], s[1], s[2], s[3], rotates, threads, puat::kDLFloat);
        run<uint8_t>(s[0], s[1], s[2], s[3], rotates, threads, puat::kDLUInt);
      }
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
