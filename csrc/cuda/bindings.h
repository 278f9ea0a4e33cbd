// The Python entries of the CUDA kernels: `_C.cuda`, one function per kernel entry, with the names
// and arguments of the CPU's, but for a stream (device, address) where those take threads.
#pragma once

#include <pybind11/pybind11.h>

namespace fastcontrast {
namespace cuda {

void bind(pybind11::module_& m);
void bind_distance_softmax(pybind11::module_& m);
void bind_nearest(pybind11::module_& m);

}  // namespace cuda
}  // namespace fastcontrast
