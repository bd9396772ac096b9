// The Python module puat_fast._C: unpacks DLPack capsules, releases the GIL, calls the kernels.
#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#include <cstdint>
#include <string>

#include "pgd_step.h"
#include "tensor.h"
#ifdef PUAT_WITH_CUDA
#include "cuda/runtime.h"
#endif

namespace py = pybind11;

namespace puat {
namespace {

// The capsule stays the caller's, who keeps the tensor alive during the call: it is read, not consumed.
TensorView view(const py::capsule& capsule, const char* name) {
  void* managed = PyCapsule_GetPointer(capsule.ptr(), "dltensor");
  if (managed == nullptr) {
    PyErr_Clear();
    const char* found = capsule.name();
    throw std::invalid_argument(std::string(name) + ": expected a DLPack capsule named 'dltensor', got '" +
                                (found ? found : "") + "' ('used_dltensor' is one already consumed)");
  }
  return TensorView(name, static_cast<DLManagedTensor*>(managed)->dl_tensor);
}

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

void bind_pgd_step(py::module_& m) {
  using py::arg;
  m.def(
      "pgd_step_cpu",
      [](const py::capsule& out, const py::capsule& x, const py::capsule& grad, const py::capsule& x0, float eps,
         float step_size, int threads) {
        const TensorView out_view = view(out, "out"), x_view = view(x, "x"), grad_view = view(grad, "grad"),
                         x0_view = view(x0, "x0");
        const py::gil_scoped_release release;
        pgd_step_cpu(out_view, x_view, grad_view, x0_view, eps, step_size, threads);
      },
      arg("out"), arg("x"), arg("grad"), arg("x0"), arg("eps"), arg("step_size"), arg("threads"));
#ifdef PUAT_WITH_CUDA
  m.def(
      "pgd_step_cuda",
      [](const py::capsule& out, const py::capsule& x, const py::capsule& grad, const py::capsule& x0, float eps,
         float step_size, uintptr_t stream) {
        const TensorView out_view = view(out, "out"), x_view = view(x, "x"), grad_view = view(grad, "grad"),
                         x0_view = view(x0, "x0");
        const py::gil_scoped_release release;
        pgd_step_cuda(out_view, x_view, grad_view, x0_view, eps, step_size, reinterpret_cast<void*>(stream));
      },
      arg("out"), arg("x"), arg("grad"), arg("x0"), arg("eps"), arg("step_size"), arg("stream"));
#endif
}

}  // namespace

PYBIND11_MODULE(_C, m) {
  m.doc() = "CPU and CUDA kernels of puat_fast. Use them through puat_fast.ops.";
  m.def("build_info", &build_info, "What this module was built with: version, compiler, CUDA and its architectures.");
  m.def("cuda_status", &status, "(number of usable CUDA devices, why there is none or ''). Never raises.");
  bind_pgd_step(m);
}

}  // namespace puat
