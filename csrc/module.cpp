// The Python module puat_fast._C: build facts, and one line per kernel.
#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#include <string>
#include <utility>

#include "bind.h"
#include "pgd_step.h"
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
  def(m, "pgd_step_cpu", pgd_step_cpu, "out", "x", "grad", "x0", "eps", "step_size", "threads");
}

#ifdef PUAT_WITH_CUDA
void def_cuda_kernels(py::module_& m) {
  def(m, "pgd_step_cuda", pgd_step_cuda, "out", "x", "grad", "x0", "eps", "step_size", "stream");
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
