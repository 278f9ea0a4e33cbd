// The extension module that the tests call instead of `_C.cuda`: its own entries, over kernels that
// run on the host.
#include <cuda_runtime.h>

#include "cuda/bindings.h"
#include "probes.h"

PYBIND11_MODULE(_cuda_emulation, m) {
  fastcontrast::cuda::bind(m);
  m.def("set_order", [](int order) {
    cuda_emulation::machine().order = static_cast<cuda_emulation::Order>(order);
  });
  m.def("probe", &cuda_emulation::probe);
}
