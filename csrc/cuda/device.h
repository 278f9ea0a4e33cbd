// What the CUDA half of the module can say about itself without running a kernel.
#pragma once

#include <string>

namespace fastcontrast {
namespace cuda {

int runtime_version();         // of the statically linked runtime, e.g. 13000
int device_count();            // 0 without a driver or a device
std::string device_problem();  // why device_count() is 0, in the runtime's words; empty otherwise

}  // namespace cuda
}  // namespace fastcontrast
