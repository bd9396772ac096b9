// def: a kernel launcher as a Python function. The launchers stay plain C++; what pybind11 asks for stands here once.
//
//   TensorView                          a DLPack capsule
//   std::optional<TensorView>           a capsule or None
//   std::vector<TensorView>             a list of capsules; element i is called name[i] in messages
//   std::vector<std::optional<...>>     a list of capsules and Nones
//   void*                               an integer: a cudaStream_t
//   all else                            as pybind11 has it
#pragma once

#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#include <array>
#include <cstdint>
#include <optional>
#include <stdexcept>
#include <string>
#include <tuple>
#include <type_traits>
#include <utility>
#include <vector>

#include "tensor.h"

namespace puat {

// What Python passes for a parameter of type T (Given), and what the launcher gets of it. The capsule stays the
// caller's, who keeps the tensor alive during the call: it is read, not consumed.
template <typename T>
struct FromPython {
  using Given = T;
  static T convert(T given, const std::string&) { return given; }
};

template <>
struct FromPython<void*> {
  using Given = uintptr_t;
  static void* convert(Given given, const std::string&) { return reinterpret_cast<void*>(given); }
};

template <>
struct FromPython<TensorView> {
  using Given = pybind11::capsule;
  static TensorView convert(const Given& capsule, const std::string& name) {
    void* managed = PyCapsule_GetPointer(capsule.ptr(), "dltensor");
    if (managed == nullptr) {
      PyErr_Clear();
      const char* found = capsule.name();
      throw std::invalid_argument(name + ": expected a DLPack capsule named 'dltensor', got '" + (found ? found : "") +
                                  "' ('used_dltensor' is one already consumed)");
    }
    return TensorView(name, static_cast<DLManagedTensor*>(managed)->dl_tensor);
  }
};

template <typename T>
struct FromPython<std::optional<T>> {
  using Given = std::optional<typename FromPython<T>::Given>;
  static std::optional<T> convert(const Given& given, const std::string& name) {
    if (!given) return std::nullopt;
    return FromPython<T>::convert(*given, name);
  }
};

template <typename T>
struct FromPython<std::vector<T>> {
  using Given = std::vector<typename FromPython<T>::Given>;
  static std::vector<T> convert(const Given& given, const std::string& name) {
    std::vector<T> out;
    for (size_t i = 0; i < given.size(); ++i) {
      out.push_back(FromPython<T>::convert(given[i], name + "[" + std::to_string(i) + "]"));
    }
    return out;
  }
};

// m.<function>(*names) calls `launcher` with the GIL released.
template <typename... Parameters, typename... Names>
void def(pybind11::module_& m, const char* function, void (*launcher)(Parameters...), Names... names) {
  static_assert(sizeof...(Parameters) == sizeof...(Names), "one name for each parameter");
  const std::array<std::string, sizeof...(Names)> all_names{names...};
  m.def(
      function,
      [launcher, all_names](typename FromPython<std::decay_t<Parameters>>::Given... given) {
        const auto convert = [&](const auto&... name) {
          return std::tuple<std::decay_t<Parameters>...>{FromPython<std::decay_t<Parameters>>::convert(given, name)...};
        };
        const auto arguments = std::apply(convert, all_names);
        const pybind11::gil_scoped_release release;
        std::apply(launcher, arguments);
      },
      pybind11::arg(names)...);
}

}  // namespace puat
