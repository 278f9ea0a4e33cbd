// Where a kernel runs. Called by the declarations of every CUDA op; knows no CUDA header.
#pragma once

namespace fastcontrast {
namespace cuda {

struct Stream {
  int device;    // index of the GPU
  void* handle;  // a cudaStream_t of that GPU; null is its default stream
};

}  // namespace cuda
}  // namespace fastcontrast
