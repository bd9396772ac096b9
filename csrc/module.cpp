// The Python module puat_fast._C: build facts, and one line per kernel.
#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#include <string>
#include <utility>

#include "augment.h"
#include "bind.h"
#include "bn_silu.h"
#include "pgd_step.h"
#include "pgd_step_normalize.h"
#include "sgd_ema.h"
#include "spectral_norm.h"
#ifdef PUAT_WITH_CUDA
#include "cuda/runtime.h"
#endif

namespace py = pybind11;

namespace puat {
namespace {

py::dict build_info() {
  py::dict info;
  info["version"] = PUAT_VERSION;
  info["compiler"] = PUAT_COMPILER;
  info["pybind11_version"] = PYBIND11_TOSTRING(PYBIND11_VERSION_MAJOR) "." PYBIND11_TOSTRING(PYBIND11_VERSION_MINOR);
#ifdef PUAT_WITH_CUDA
  info["cuda"] = true;
  info["cuda_version"] = PUAT_CUDA_VERSION;
  info["cuda_archs"] = PUAT_CUDA_ARCHS;
#else
  info["cuda"] = false;
  info["cuda_version"] = py::none();
  info["cuda_archs"] = py::none();
#endif
  return info;
}

std::pair<int, std::string> status() {
#ifdef PUAT_WITH_CUDA
  return cuda_status();
#else
  return {0, "built without CUDA"};
#endif
}

void def_cpu_kernels(py::module_& m) {
  def(m, "adam_cpu", adam_cpu, "params", "grads", "exp_avgs", "exp_avg_sqs", "copies", "steps", "lr", "beta1", "beta2",
      "eps", "threads");
  def(m, "augment_backward_cpu", augment_backward_cpu, "out", "grad", "top_left", "flip", "cos_sin", "pad", "threads");
  def(m, "augment_cpu", augment_cpu, "out", "x", "index", "top_left", "flip", "cos_sin", "pad", "threads");
  def(m, "bn_silu_apply_cpu", bn_silu_apply_cpu, "out", "h", "mean", "rstd", "weight", "bias", "left", "right", "top",
      "bottom", "threads");
  def(m, "bn_silu_backward_cpu", bn_silu_backward_cpu, "grad_x", "sum_dy", "sum_dy_xhat", "grad_out", "grad_h", "h",
      "mean", "rstd", "weight", "bias", "left", "right", "top", "bottom", "threads");
  def(m, "bn_silu_input_grad_cpu", bn_silu_input_grad_cpu, "grad_x", "grad_out", "grad_h", "h", "mean", "rstd",
      "weight", "bias", "sum_dy", "sum_dy_xhat", "left", "right", "top", "bottom", "threads");
  def(m, "bn_silu_reduce_cpu", bn_silu_reduce_cpu, "sum_dy", "sum_dy_xhat", "grad_out", "h", "mean", "rstd", "weight",
      "bias", "left", "right", "top", "bottom", "threads");
  def(m, "bn_silu_stats_cpu", bn_silu_stats_cpu, "mean", "var", "rstd", "h", "x", "residual", "running_mean",
      "running_var", "momentum", "eps", "groups", "threads");
  def(m, "pgd_step_cpu", pgd_step_cpu, "out", "x", "grad", "x0", "eps", "step_size", "threads");
  def(m, "pgd_step_l2_cpu", pgd_step_l2_cpu, "out", "x", "grad", "x0", "eps", "step_size", "threads");
  def(m, "pgd_step_normalize_cpu", pgd_step_normalize_cpu, "x_adv", "c_in", "x", "grad", "x0", "eps", "step_size",
      "mean", "std", "threads");
  def(m, "sgd_ema_cpu", sgd_ema_cpu, "params", "grads", "momentum_buffers", "emas", "copies", "weight_decays", "lr",
      "momentum", "ema_decay", "nesterov", "threads");
}

#ifdef PUAT_WITH_CUDA
void def_cuda_kernels(py::module_& m) {
  def(m, "adam_cuda", adam_cuda, "params", "grads", "exp_avgs", "exp_avg_sqs", "copies", "steps", "lr", "beta1",
      "beta2", "eps", "stream");
  def(m, "augment_backward_cuda", augment_backward_cuda, "out", "grad", "top_left", "flip", "cos_sin", "pad", "stream");
  def(m, "augment_cuda", augment_cuda, "out", "x", "index", "top_left", "flip", "cos_sin", "pad", "stream");
  def(m, "pgd_step_cuda", pgd_step_cuda, "out", "x", "grad", "x0", "eps", "step_size", "stream");
  def(m, "pgd_step_l2_cuda", pgd_step_l2_cuda, "out", "x", "grad", "x0", "eps", "step_size", "stream");
  def(m, "pgd_step_normalize_cuda", pgd_step_normalize_cuda, "x_adv", "c_in", "x", "grad", "x0", "eps", "step_size",
      "mean", "std", "stream");
  def(m, "sgd_ema_cuda", sgd_ema_cuda, "params", "grads", "momentum_buffers", "emas", "copies", "weight_decays", "lr",
      "momentum", "ema_decay", "nesterov", "stream");
  def(m, "spectral_norm_backward_cuda", spectral_norm_backward_cuda, "dots", "grad_weights", "grads", "weights",
      "traces", "per_row", "stream");
  def(m, "spectral_norm_iterate_cuda", spectral_norm_iterate_cuda, "trace", "workspace", "weights", "us", "vs",
      "iterations", "stream");
  def(m, "spectral_norm_scale_cuda", spectral_norm_scale_cuda, "out", "weights", "traces", "per_row", "stream");
}
#endif

}  // namespace

PYBIND11_MODULE(_C, m) {
  m.doc() = "CPU and CUDA kernels of puat_fast. Use them through puat_fast.ops.";
  m.def("build_info", &build_info, "What this module was built with: version, compiler, CUDA and its architectures.");
  m.def("cuda_status", &status, "(number of usable CUDA devices, why there is none or ''). Never raises.");
  def_cpu_kernels(m);
#ifdef PUAT_WITH_CUDA
  def_cuda_kernels(m);
#endif
}

}  // namespace puat
