// Runs the CPU stages over ragged shapes on exactly sized heap buffers, and exp over its range; built with
// sanitizers by tests/asan.sh.
#include <algorithm>
#include <cmath>
#include <cstdio>
#include <cstdlib>
#include <limits>
#include <optional>
#include <thread>
#include <vector>

#include "bn_silu.h"

namespace {

void require(bool holds, const char* what) {
  if (holds) return;
  std::fprintf(stderr, "wrong: %s\n", what);
  std::exit(1);
}

// A float tensor of its own memory; channels_last if of four dimensions.
struct Owned {
  std::vector<int64_t> shape, strides;
  std::vector<float> values;

  Owned(std::vector<int64_t> size, float value) : shape(std::move(size)), strides(shape.size()) {
    int64_t stride = 1;
    const std::vector<size_t> order = shape.size() == 4   ? std::vector<size_t>{1, 3, 2, 0}
                                      : shape.size() == 2 ? std::vector<size_t>{1, 0}
                                                          : std::vector<size_t>{0};
    for (size_t d : order) {
      strides[d] = stride;
      stride *= shape[d];
    }
    values.assign(stride, value);
    for (size_t i = 0; i < values.size(); ++i) values[i] += 0.25f * static_cast<float>(i % 7);
  }

  puat::TensorView view(const char* name) {
    const int dims = static_cast<int>(shape.size());
    return puat::TensorView(
        name, {values.data(), {puat::kDLCPU, 0}, dims, {puat::kDLFloat, 32, 1}, shape.data(), strides.data(), 0});
  }

  // A copy in bfloat16.
  std::vector<puat::BFloat16> rounded;
  puat::TensorView half(const char* name) {
    rounded.resize(values.size());
    for (size_t i = 0; i < values.size(); ++i) puat::store(&rounded[i], values[i]);
    const int dims = static_cast<int>(shape.size());
    return puat::TensorView(
        name, {rounded.data(), {puat::kDLCPU, 0}, dims, {puat::kDLBfloat, 16, 1}, shape.data(), strides.data(), 0});
  }
};

void run_half(int64_t n, int64_t c, int64_t height, int64_t width, bool padded, int64_t groups, int threads) {
  const int64_t left = padded, right = 2 * padded, top = 3 * padded, bottom = padded;
  const std::vector<int64_t> shape{n, c, height, width}, table{groups, c}, vector{c};
  const std::vector<int64_t> wide{n, c, height + top + bottom, width + left + right};
  Owned x(shape, 0.5f), residual(shape, 1.0f), h(shape, 0.0f), grad_x(shape, 0.0f), out(wide, 9.0f), grad_out(wide, -1);
  Owned mean(table, 0), rstd(table, 0), sum_dy(table, 0), sum_dy_xhat(table, 0), weight(vector, 1), bias(vector, 0);
  const puat::TensorView h_view = h.half("h"), residual_view = residual.half("residual"), x_view = x.half("x");
  const puat::TensorView out_view = out.half("out"), grad_view = grad_out.half("grad_out");
  const puat::TensorView grad_x_view = grad_x.half("grad_x");
  puat::bn_silu_stats_cpu(mean.view("mean"), std::nullopt, rstd.view("rstd"), h_view, x_view, residual_view,
                          std::nullopt, std::nullopt, 0.1, 1e-5, groups, threads);
  puat::bn_silu_apply_cpu(out_view, h_view, mean.view("mean"), rstd.view("rstd"), weight.view("weight"),
                          bias.view("bias"), left, right, top, bottom, threads);
  puat::bn_silu_backward_cpu(grad_x_view, sum_dy.view("sum_dy"), sum_dy_xhat.view("sum_dy_xhat"), grad_view,
                             residual_view, h_view, mean.view("mean"), rstd.view("rstd"), weight.view("weight"),
                             bias.view("bias"), left, right, top, bottom, threads);
  for (const Owned* t : {&out, &grad_x, &h}) {
    for (puat::BFloat16 value : t->rounded) require(std::isfinite(puat::to_float(value)), "a result is not finite");
  }
}

void run(int64_t n, int64_t c, int64_t height, int64_t width, bool padded, int64_t groups, int threads) {
  const int64_t left = padded, right = 2 * padded, top = 3 * padded, bottom = padded;
  const std::vector<int64_t> shape{n, c, height, width}, table{groups, c}, vector{c};
  const std::vector<int64_t> wide{n, c, height + top + bottom, width + left + right};
  Owned x(shape, 0.5f), residual(shape, 1.0f), h(shape, 0.0f), grad_x(shape, 0.0f), out(wide, 9.0f), grad_out(wide, -1);
  Owned mean(table, 0), var(table, 0), rstd(table, 0), sum_dy(table, 0), sum_dy_xhat(table, 0);
  Owned running_mean(vector, 0), running_var(vector, 1), weight(vector, 1), bias(vector, 0);
  const bool update = n * height * width > groups;
  const auto running = [update](Owned& t, const char* name) {
    return update ? std::optional<puat::TensorView>(t.view(name)) : std::nullopt;
  };
  puat::bn_silu_stats_cpu(mean.view("mean"), var.view("var"), rstd.view("rstd"), h.view("h"), x.view("x"),
                          residual.view("residual"), running(running_mean, "running_mean"),
                          running(running_var, "running_var"), 0.1, 1e-5, groups, threads);
  puat::bn_silu_apply_cpu(out.view("out"), h.view("h"), mean.view("mean"), rstd.view("rstd"), weight.view("weight"),
                          bias.view("bias"), left, right, top, bottom, threads);
  puat::bn_silu_reduce_cpu(sum_dy.view("sum_dy"), sum_dy_xhat.view("sum_dy_xhat"), grad_out.view("grad_out"),
                           h.view("h"), mean.view("mean"), rstd.view("rstd"), weight.view("weight"), bias.view("bias"),
                           left, right, top, bottom, threads);
  puat::bn_silu_input_grad_cpu(grad_x.view("grad_x"), grad_out.view("grad_out"), residual.view("grad_h"), h.view("h"),
                               mean.view("mean"), rstd.view("rstd"), weight.view("weight"), bias.view("bias"),
                               sum_dy.view("sum_dy"), sum_dy_xhat.view("sum_dy_xhat"), left, right, top, bottom,
                               threads);
  const std::vector<float> expected = grad_x.values;
  puat::bn_silu_backward_cpu(grad_x.view("grad_x"), sum_dy.view("sum_dy"), sum_dy_xhat.view("sum_dy_xhat"),
                             grad_out.view("grad_out"), residual.view("grad_h"), h.view("h"), mean.view("mean"),
                             rstd.view("rstd"), weight.view("weight"), bias.view("bias"), left, right, top, bottom,
                             threads);
  require(grad_x.values == expected, "backward is not reduce and input_grad");
  for (size_t i = 0; i < h.values.size(); ++i) require(h.values[i] == x.values[i] + residual.values[i], "h");
  for (const Owned* t : {&out, &grad_x, &mean, &var, &rstd, &sum_dy, &sum_dy_xhat, &running_mean, &running_var}) {
    for (float value : t->values) require(std::isfinite(value), "a result is not finite");
  }
  if (padded && !out.values.empty()) require(out.values.front() == 0.0f && out.values.back() == 0.0f, "padding");
}

void run_all() {
  const int64_t shapes[][4] = {{2, 1, 1, 1},  {2, 3, 5, 7},  {4, 17, 31, 37}, {2, 160, 17, 13}, {2, 40000, 1, 3},
                               {0, 16, 8, 8}, {2, 16, 0, 8}, {2, 16, 8, 0},   {2, 0, 8, 8},     {6, 3, 101, 103}};
  for (const auto& s : shapes) {
    for (int64_t groups : {1, 2}) {
      for (int threads : {1, 3}) {
        run(s[0], s[1], s[2], s[3], false, groups, threads);
        run(s[0], s[1], s[2], s[3], true, groups, threads);
        run_half(s[0], s[1], s[2], s[3], false, groups, threads);
        run_half(s[0], s[1], s[2], s[3], true, groups, threads);
      }
    }
  }
}

void check_exp() {
  constexpr float kInf = std::numeric_limits<float>::infinity();
  for (double x = -87.0; x < 88.0; x += 0.00017) {
    const float given = static_cast<float>(x);
    const double exact = std::exp(static_cast<double>(given));
    const double unit = std::ldexp(1.0, std::ilogb(exact) - 23);
    require(std::fabs(puat::exp(given) - exact) <= 1.1 * unit, "exp");
  }
  for (float x : {-88.1f, -89.0f, -1e30f, -kInf}) require(puat::exp(x) == 0.0f, "exp where it is next to 0");
  for (float x : {88.5f, 89.0f, 1e30f, kInf}) require(puat::exp(x) == kInf, "exp where it is beyond float");
  require(puat::exp(0.0f) == 1.0f, "exp(0)");
  require(std::isnan(puat::exp(std::nanf(""))) && std::isnan(puat::exp(-std::nanf(""))), "exp(NaN)");
}

}  // namespace

int main() {
  check_exp();
  std::thread other(run_all);  // two loops at once
  run_all();
  other.join();
  std::puts("ok");
}
