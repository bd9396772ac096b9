// For kernels: wide accesses. For launchers: the device of the tensors made current, launch errors raised at once.
#pragma once

#include <cuda_runtime.h>

#include <stdexcept>
#include <string>

namespace puat {

inline void check_cuda(cudaError_t error, const char* what) {
  if (error == cudaSuccess) return;
  cudaGetLastError();  // the error is reported here; the next launch must not find it
  throw std::runtime_error(std::string(what) + ": " + cudaGetErrorString(error));
}

// Neighbouring elements that a thread moves at once; by default 16 bytes, the widest access there is.
template <typename T, int kCount = 16 / sizeof(T)>
struct alignas(kCount * sizeof(T)) Pack {
  static constexpr int kWidth = kCount;
  T value[kCount];
};

class DeviceGuard {
 public:
  explicit DeviceGuard(int device) {
    check_cuda(cudaGetDevice(&previous_), "cudaGetDevice");
    changed_ = device != previous_;
    if (changed_) check_cuda(cudaSetDevice(device), "cudaSetDevice");
  }
  ~DeviceGuard() {
    if (changed_) cudaSetDevice(previous_);
  }
  DeviceGuard(const DeviceGuard&) = delete;
  DeviceGuard& operator=(const DeviceGuard&) = delete;

 private:
  int previous_ = 0;
  bool changed_ = false;
};

}  // namespace puat
