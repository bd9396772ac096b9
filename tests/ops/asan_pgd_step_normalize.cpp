// Runs the CPU kernel over ragged images, all types and layouts on exactly sized heap buffers; built with sanitizers by
// tests/asan.sh.
#include <cstdio>
#include <cstdlib>
#include <thread>
#include <vector>

#include "pgd_step_normalize.h"

namespace {

struct Case {
  int64_t images, height, width, channels;
  bool planes;  // else x and x0 are channels_last
  int threads;
};

template <typename T>
puat::TensorView view(const char* name, std::vector<T>& values, const Case& c, int64_t channels, bool planes) {
  const int64_t pixels = c.height * c.width;
  int64_t shape[] = {c.images, channels, c.height, c.width};
  int64_t nchw[] = {channels * pixels, pixels, c.width, 1},
          nhwc[] = {channels * pixels, 1, c.width * channels, channels};
  const uint8_t code = sizeof(T) == 4 ? puat::kDLFloat : puat::kDLBfloat;
  puat::DLTensor tensor{values.data(), {puat::kDLCPU, 0}, 4, {code, sizeof(T) * 8, 1}, shape, planes ? nchw : nhwc, 0};
  return puat::TensorView(name, tensor);
}

template <typename T, typename G>
void run(const Case& c) {
  const int64_t all = c.images * c.height * c.width;
  std::vector<float> x(all * 3, 0.25f), x0(all * 3, 0.5f), x_adv(all * 3);
  std::vector<G> grad(all * c.channels);
  std::vector<T> c_in(all * c.channels);
  for (int64_t i = 0; i < all * c.channels; ++i) {
    puat::store(&grad[i], i % c.channels == 1 ? -1.0f : 1.0f);
    puat::store(&c_in[i], -9.0f);
  }
  puat::pgd_step_normalize_cpu(view("x_adv", x_adv, c, 3, c.planes), view("c_in", c_in, c, c.channels, false),
                               view("x", x, c, 3, c.planes), view("grad", grad, c, c.channels, false),
                               view("x0", x0, c, 3, c.planes), 0.25f, 0.125f, {0.0f, 0.0f, 0.125f}, {1.0f, 0.5f, 0.25f},
                               c.threads);
  const float expected[] = {0.375f, 0.5f, 1.0f};  // the second would leave the ball, and stays at 0.25
  for (int64_t i = 0; i < all * c.channels; ++i) {
    const int64_t channel = i % c.channels;
    if (puat::to_float(c_in[i]) != (channel < 3 ? expected[channel] : 0.0f)) {
      std::fprintf(stderr, "%lld x %lld, %lld channels: wrong at %lld\n", static_cast<long long>(c.height),
                   static_cast<long long>(c.width), static_cast<long long>(c.channels), static_cast<long long>(i));
      std::exit(1);
    }
  }
}

void run_all() {
  for (int64_t images : {0, 1, 19}) {
    for (int64_t width : {1, 7, 16, 33}) {
      for (int64_t channels : {3, 4, 8}) {
        for (int threads : {1, 3}) {
          const Case c{images, 32, width, channels, threads == 1 || width == 7, threads};
          run<float, float>(c);
          run<float, puat::BFloat16>(c);
          run<puat::BFloat16, float>(c);
          run<puat::BFloat16, puat::BFloat16>(c);
        }
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
