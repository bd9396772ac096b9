// What every CUDA launcher needs, and what the build can say about the machine. No CUDA headers: C++ may include it.
#pragma once

#include <string>
#include <utility>

namespace puat {

// How many CUDA devices there are, and why none can be used ("" if they can). Never throws: no driver is an answer.
std::pair<int, std::string> cuda_status();

}  // namespace puat
