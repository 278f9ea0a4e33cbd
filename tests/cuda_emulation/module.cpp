// The extension module that the tests call instead of `_C.cuda`: its own entries, over kernels that
// run on the host.
#include <cuda_runtime.h>

#include "cuda/bindings.h"
#include "cuda/channel_maps.h"
#include "probes.h"

PYBIND11_MODULE(_cuda_emulation, m) {
  fastcontrast::cuda::bind(m);
  m.def("set_order", [](int order) {
    cuda_emulation::machine().order = static_cast<cuda_emulation::Order>(order);
    cuda_emulation::machine().random = 1;  // the same turns whatever ran before
  });
  m.def("launches", [] {  // since the last call
    const unsigned count = cuda_emulation::machine().launches;
    cuda_emulation::machine().launches = 0;
    return count;
  });
  m.def("copied_bytes", [] {  // since the last call
    const uint64_t copied = cuda_emulation::machine().copied;
    cuda_emulation::machine().copied = 0;
    return copied;
  });
  m.def("quotient", [](uint32_t n, uint32_t d) {
    return fastcontrast::cuda::quotient(n, fastcontrast::cuda::divisor(d));
  });
  m.def("probe", &cuda_emulation::probe);
  m.def("copy_words", &cuda_emulation::copy_words);
  m.def("check_launch", &cuda_emulation::check_launch);
}
