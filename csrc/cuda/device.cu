#include "cuda/device.h"

#include <cuda_runtime_api.h>

namespace fastcontrast {
namespace cuda {

int runtime_version() {
  int version = 0;
  return cudaRuntimeGetVersion(&version) == cudaSuccess ? version : 0;
}

int device_count() {
  int count = 0;
  return cudaGetDeviceCount(&count) == cudaSuccess ? count : 0;
}

std::string device_problem() {
  int count = 0;
  const cudaError_t error = cudaGetDeviceCount(&count);
  return error == cudaSuccess ? "" : cudaGetErrorString(error);
}

}  // namespace cuda
}  // namespace fastcontrast
