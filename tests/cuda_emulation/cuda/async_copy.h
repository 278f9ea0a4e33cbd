// Stands in for csrc/cuda/async_copy.h: this folder comes first on the include path. What a copy
// is to bring arrives when its thread waits for it and not before; until then the target is NaN.
#pragma once

#include <cuda_runtime.h>

namespace fastcontrast {
namespace cuda {

template <int size>
void async_copy(void* to, const void* from, int bytes) {
  static_assert(size == 4 || size == 8 || size == 16, "cp.async moves 4, 8 or 16 bytes");
  cuda_emulation::check_aligned(to, size);
  if (bytes < 0 || bytes > size) throw std::logic_error("cp.async of more bytes than its size");
  if (bytes > 0) cuda_emulation::check_aligned(from, size);
  memset(to, 0xFF, size);
  cuda_emulation::machine().copied += bytes;
  cuda_emulation::Thread& thread = *cuda_emulation::machine().current;
  thread.copies.push_back({to, from, size, bytes, thread.commits});
}

inline void async_commit() { ++cuda_emulation::machine().current->commits; }

template <int pending>
void async_wait() {
  cuda_emulation::Thread& thread = *cuda_emulation::machine().current;
  size_t done = 0;
  for (const cuda_emulation::Copy& copy : thread.copies) {
    if (copy.group + pending >= thread.commits) break;  // groups are closed in order
    if (copy.bytes > 0) memcpy(copy.to, copy.from, copy.bytes);
    memset((char*)copy.to + copy.bytes, 0, copy.size - copy.bytes);
    ++done;
  }
  thread.copies.erase(thread.copies.begin(), thread.copies.begin() + done);
}

}  // namespace cuda
}  // namespace fastcontrast
