// TensorView: a tensor that someone else owns, and the checks every kernel makes before it trusts one.
// A failed check throws std::invalid_argument (ValueError in Python) naming the argument, what was expected, what came.
#pragma once

#include <algorithm>
#include <cstdint>
#include <functional>
#include <initializer_list>
#include <numeric>
#include <stdexcept>
#include <string>
#include <utility>
#include <vector>

#include "dlpack.h"

namespace puat {

enum class DType { kFloat32, kBFloat16, kFloat64, kUInt8, kInt64, kOther };

inline DType dtype_of(const DLDataType& type) {
  if (type.lanes != 1) return DType::kOther;
  if (type.code == kDLFloat && type.bits == 32) return DType::kFloat32;
  if (type.code == kDLBfloat && type.bits == 16) return DType::kBFloat16;
  if (type.code == kDLFloat && type.bits == 64) return DType::kFloat64;
  if (type.code == kDLUInt && type.bits == 8) return DType::kUInt8;
  if (type.code == kDLInt && type.bits == 64) return DType::kInt64;
  return DType::kOther;
}

inline const char* name_of(DType dtype) {
  switch (dtype) {
    case DType::kFloat32:
      return "float32";
    case DType::kBFloat16:
      return "bfloat16";
    case DType::kFloat64:
      return "float64";
    case DType::kUInt8:
      return "uint8";
    case DType::kInt64:
      return "int64";
    case DType::kOther:
      break;
  }
  return "an unsupported dtype";
}

struct TensorView {
  std::string name;  // of the argument, for messages
  char* data;        // first element: byte_offset is already added
  DType dtype;
  int64_t itemsize;
  DLDevice device;
  std::vector<int64_t> shape;
  std::vector<int64_t> strides;  // in elements
  int64_t numel;

  TensorView(std::string argument, const DLTensor& tensor)
      : name(std::move(argument)),
        data(static_cast<char*>(tensor.data) + tensor.byte_offset),
        dtype(dtype_of(tensor.dtype)),
        itemsize((tensor.dtype.bits * tensor.dtype.lanes + 7) / 8),
        device(tensor.device),
        shape(tensor.shape, tensor.shape + tensor.ndim),
        numel(std::accumulate(shape.begin(), shape.end(), int64_t{1}, std::multiplies<>())) {
    if (tensor.strides != nullptr) {
      strides.assign(tensor.strides, tensor.strides + tensor.ndim);
    } else {
      strides.resize(shape.size());
      int64_t stride = 1;
      for (size_t d = shape.size(); d-- > 0; stride *= shape[d]) strides[d] = stride;
    }
  }

  template <typename T>
  T* as() const {
    return reinterpret_cast<T*>(data);
  }
};

inline std::string text(const std::vector<int64_t>& values) {
  std::string out = "(";
  for (size_t i = 0; i < values.size(); ++i) out += (i ? ", " : "") + std::to_string(values[i]);
  return out + ")";
}

inline std::string text(const DLDevice& device) {
  if (device.device_type == kDLCPU) return "cpu";
  if (device.device_type == kDLCUDA) return "cuda:" + std::to_string(device.device_id);
  return "device type " + std::to_string(device.device_type);
}

[[noreturn]] inline void fail(const TensorView& t, const std::string& expected, const std::string& got) {
  throw std::invalid_argument(t.name + ": expected " + expected + ", got " + got);
}

inline void check_device(const TensorView& t, DLDeviceType type) {
  if (t.device.device_type != type) fail(t, type == kDLCPU ? "a CPU tensor" : "a CUDA tensor", text(t.device));
}

inline void check_dtype(const TensorView& t, std::initializer_list<DType> accepted) {
  if (std::find(accepted.begin(), accepted.end(), t.dtype) != accepted.end()) return;
  std::string names;
  for (DType dtype : accepted) names += (names.empty() ? "" : " or ") + std::string(name_of(dtype));
  fail(t, names, name_of(t.dtype));
}

// Dense: the elements fill one stretch of memory, in any order of the dimensions, without gap or overlap.
// Strides of dimensions of size 1 carry no meaning.
inline void check_dense(const TensorView& t) {
  if (t.numel == 0) return;
  std::vector<size_t> dims;
  for (size_t d = 0; d < t.shape.size(); ++d) {
    if (t.shape[d] != 1) dims.push_back(d);
  }
  std::sort(dims.begin(), dims.end(), [&](size_t a, size_t b) { return t.strides[a] < t.strides[b]; });
  int64_t stride = 1;
  for (size_t d : dims) {
    if (t.strides[d] != stride) fail(t, "a tensor without gaps or overlap", "strides " + text(t.strides));
    stride *= t.shape[d];
  }
}

// Element i of the storage of `t` and of `like` are then the same element of the tensor. `like` is dense.
inline void check_same_layout(const TensorView& t, const TensorView& like) {
  const std::string as = " (as " + like.name + ")";
  if (t.dtype != like.dtype) fail(t, name_of(like.dtype) + as, name_of(t.dtype));
  if (t.device.device_type != like.device.device_type || t.device.device_id != like.device.device_id) {
    fail(t, text(like.device) + as, text(t.device));
  }
  if (t.shape != like.shape) fail(t, "shape " + text(like.shape) + as, text(t.shape));
  if (t.numel == 0) return;
  for (size_t d = 0; d < t.shape.size(); ++d) {
    if (t.shape[d] != 1 && t.strides[d] != like.strides[d]) {
      fail(t, "strides " + text(like.strides) + as, text(t.strides));
    }
  }
}

// The same memory or none in common: in between, the result would depend on the order of the elements.
inline void check_no_partial_overlap(const TensorView& written, const TensorView& read) {
  const int64_t bytes = written.numel * written.itemsize;
  if (written.data != read.data && written.data < read.data + bytes && read.data < written.data + bytes) {
    fail(read, "memory apart from that of " + written.name + ", or the same", "memory that partly overlaps it");
  }
}

}  // namespace puat
