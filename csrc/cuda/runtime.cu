#include <cuda_runtime.h>

#include "cuda/runtime.h"

namespace puat {

std::pair<int, std::string> cuda_status() {
  int count = 0;
  const cudaError_t error = cudaGetDeviceCount(&count);
  if (error == cudaSuccess) return {count, ""};
  cudaGetLastError();  // the error is reported here; the next launch must not find it
  return {0, cudaGetErrorString(error)};
}

}  // namespace puat
