// Stands in for CUDA's <cuda_runtime.h>: csrc/cuda/*.cu, compiled by the host's compiler with this
// folder first on the include path, run on the processor. Built by
// tests/cuda_emulation/__init__.py.
//
// Blocks run one after the other, and every thread of a block is a fiber with a stack of its own,
// kept for the next block; switching is by _longjmp, which makes no system call. A
// fiber runs until it waits: at __syncthreads for all threads of the block, at a shuffle, a vote or
// __syncwarp for all lanes of its warp. What it finds, besides wrong results:
//   - a thread that left the kernel, or waits elsewhere, while others wait for it;
//   - 16-byte access to an address that is no multiple of 16;
//   - asynchronous copies that nobody waited for: they have not arrived;
//   - a write just beyond dynamic shared memory; reads of it before a write give NaN;
//   - any access beyond the memory of a tensor, where guarded.py has made that memory;
//   - code that is right for one order of threads only: run it in several (set_order) and compare.
// What it cannot show: time, memory ordering between blocks or without a barrier, the rounding of
// the GPU's own instructions, divergence inside a warp, static shared memory that was not written
// (it keeps what the block before left) or access beyond it, and races that no order of whole
// stretches shows.
#pragma once

#include <math.h>
#include <setjmp.h>
#include <signal.h>
#include <stdint.h>
#include <string.h>
#include <ucontext.h>

#include <exception>
#include <memory>
#include <mutex>
#include <stdexcept>
#include <string>
#include <vector>

#define __global__
#define __device__
#define __host__
#define __grid_constant__
#define __shared__ static
#define __forceinline__ inline __attribute__((always_inline))
#define __launch_bounds__(...)

struct uint3 {
  unsigned x, y, z;
};
struct dim3 {
  unsigned x = 1, y = 1, z = 1;
};
struct alignas(16) uint4 {
  unsigned x, y, z, w;
};

using cudaStream_t = void*;
enum cudaError_t { cudaSuccess = 0, cudaErrorInvalidConfiguration = 9 };
// The error that the last launch left, and then none: probes.h sets it.
inline cudaError_t& cuda_last_error() {
  static cudaError_t last = cudaSuccess;
  return last;
}
inline cudaError_t cudaGetLastError() {
  const cudaError_t last = cuda_last_error();
  cuda_last_error() = cudaSuccess;
  return last;
}
inline cudaError_t cudaGetDevice(int* device) { return *device = 0, cudaSuccess; }
inline cudaError_t cudaSetDevice(int) { return cudaSuccess; }
inline const char* cudaGetErrorString(cudaError_t error) {
  return error == cudaSuccess ? "no error" : "invalid configuration argument";
}

namespace cuda_emulation {

constexpr unsigned LANES = 32;
constexpr size_t STACK = 64 << 10;
constexpr size_t GUARD = 64;
constexpr size_t MOST_SHARED = 99 << 10;
constexpr unsigned char GUARD_BYTE = 0xA5;

// The order in which the threads of a block take their turns.
enum class Order { ascending = 0, descending = 1, shuffled = 2 };

enum class Wait { nothing, warp, block };

// A copy to shared memory under way: see cuda/async_copy.h.
struct Copy {
  void* to;
  const void* from;
  int size, bytes;
  unsigned group;
};

struct Thread {
  ucontext_t context;  // where the fiber starts
  jmp_buf place;       // where it is, from then on
  bool started;
  std::unique_ptr<char[]> stack;
  uint3 index;
  Wait waits_for;
  bool left;
  std::vector<Copy> copies;
  unsigned commits;    // groups of copies that it has closed
  unsigned exchanges;  // how often it has shuffled or voted: which of its warp's two slots is next
};

struct Machine {
  Order order = Order::ascending;
  dim3 grid, block;
  uint3 block_index;
  std::vector<Thread> threads = std::vector<Thread>(1024);
  unsigned count = 0;           // of the block's threads
  std::vector<uint64_t> slots;  // [warps, 2, LANES]
  std::vector<unsigned char> shared;
  unsigned char* shared_begin = nullptr;
  Thread* current = nullptr;
  jmp_buf scheduler;
  const void* kernel = nullptr;
  void (*call)(const void*) = nullptr;
  std::exception_ptr error;
  bool faulted = false;  // the fiber that ran last touched memory that is not there
  uint32_t random = 1;
  unsigned launches = 0;  // since it was asked
  uint64_t copied = 0;    // bytes, asynchronously, since it was asked
  std::mutex busy;
};

inline Machine& machine() {
  static Machine only;
  return only;
}

inline void leave_to_scheduler() {
  Machine& m = machine();
  if (_setjmp(m.current->place) == 0) _longjmp(m.scheduler, 1);
}

inline void run_thread() {  // never returns: the fiber waits for the next block
  for (;;) {
    Machine& m = machine();
    try {
      m.call(m.kernel);
    } catch (...) {
      if (!m.error) m.error = std::current_exception();
    }
    m.current->left = true;
    leave_to_scheduler();
  }
}

inline void wait(Wait what) {
  machine().current->waits_for = what;
  leave_to_scheduler();
}

inline void start_thread(Machine& m, unsigned number) {
  Thread& thread = m.threads[number];
  thread.index = {number % m.block.x, number / m.block.x % m.block.y,
                  number / (m.block.x * m.block.y)};
  thread.waits_for = Wait::nothing;
  thread.left = false;
  thread.copies.clear();
  thread.commits = 0;
  thread.exchanges = 0;
}

inline void switch_to(Machine& m, Thread& thread) {
  m.current = &thread;
  if (_setjmp(m.scheduler) != 0) return;
  if (thread.started) _longjmp(thread.place, 1);
  thread.started = true;
  if (!thread.stack) thread.stack.reset(new char[STACK]);
  getcontext(&thread.context);
  thread.context.uc_stack.ss_sp = thread.stack.get();
  thread.context.uc_stack.ss_size = STACK;
  thread.context.uc_link = nullptr;
  makecontext(&thread.context, run_thread, 0);
  setcontext(&thread.context);
}

// While a kernel runs, a fault ends its fiber where it is: what holds memory is of the scheduler.
class Faults {
 public:
  Faults() {
    struct sigaction action = {};
    action.sa_handler = [](int) {
      machine().faulted = true;
      _longjmp(machine().scheduler, 1);
    };
    action.sa_flags = SA_NODEFER;  // the handler does not return
    for (int i = 0; i < 2; ++i) sigaction(SIGNALS[i], &action, &before_[i]);
  }
  ~Faults() {
    for (int i = 0; i < 2; ++i) sigaction(SIGNALS[i], &before_[i], nullptr);
  }
  Faults(const Faults&) = delete;
  Faults& operator=(const Faults&) = delete;

 private:
  static constexpr int SIGNALS[2] = {SIGSEGV, SIGBUS};
  struct sigaction before_[2];
};

// One turn for every thread that does not wait. False when there was none.
inline bool take_turns(Machine& m) {
  const unsigned count = m.count;
  unsigned step = 1, start = 0;
  if (m.order == Order::shuffled) {  // an odd step visits all of a multiple of 32
    m.random = m.random * 1664525u + 1013904223u;
    start = (m.random >> 8) % count;
    step =
        (count % LANES == 0 && (count & (count - 1)) == 0) ? (m.random >> 16 | 1u) % count | 1u : 1;
  }
  bool any = false;
  for (unsigned i = 0; i < count && !m.error; ++i) {
    const unsigned turn = m.order == Order::descending ? count - 1 - i : i;
    Thread& thread = m.threads[(start + (uint64_t)turn * step) % count];
    if (thread.left || thread.waits_for != Wait::nothing) continue;
    any = true;
    switch_to(m, thread);
    if (m.faulted) {
      m.faulted = false;
      throw std::logic_error("thread " + std::to_string(&thread - m.threads.data()) +
                             " accesses memory beyond any tensor's");
    }
  }
  return any;
}

// Lets the group go on if all of it waits for the same. Returns whether it did.
inline bool release(Machine& m, size_t begin, size_t end, Wait what) {
  for (size_t i = begin; i < end; ++i) {
    if (m.threads[i].left || m.threads[i].waits_for != what) return false;
  }
  for (size_t i = begin; i < end; ++i) m.threads[i].waits_for = Wait::nothing;
  return true;
}

inline void run_block(Machine& m, size_t shared_bytes) {
  memset(m.shared_begin, 0xFF, shared_bytes);  // NaN
  memset(m.shared_begin + shared_bytes, GUARD_BYTE, GUARD);
  const size_t count = m.count;
  for (unsigned i = 0; i < count; ++i) start_thread(m, i);
  for (;;) {
    const bool any = take_turns(m);
    if (m.error) break;
    bool released = false;
    for (size_t warp = 0; warp < count; warp += LANES) {
      released |= release(m, warp, warp + LANES, Wait::warp);
    }
    released |= release(m, 0, count, Wait::block);
    if (any || released) continue;
    for (size_t i = 0; i < count; ++i) {
      if (m.threads[i].left) continue;
      throw std::logic_error("thread " + std::to_string(i) + " waits at a barrier of its " +
                             (m.threads[i].waits_for == Wait::warp ? "warp" : "block") +
                             " that other threads never reach");
    }
    break;
  }
  if (m.error) std::rethrow_exception(m.error);
  for (size_t i = 0; i < GUARD; ++i) {
    if (m.shared_begin[shared_bytes + i] != GUARD_BYTE) {
      throw std::logic_error("a write " + std::to_string(i) +
                             " bytes beyond dynamic shared memory");
    }
  }
}

template <typename Call>
void launch(const char* name, dim3 grid, dim3 block, size_t shared_bytes, const Call& call) {
  Machine& m = machine();
  const std::lock_guard<std::mutex> guard(m.busy);
  const std::string shape = std::string(name) + " of " + std::to_string(grid.x) + "x" +
                            std::to_string(grid.y) + "x" + std::to_string(grid.z) + " blocks of " +
                            std::to_string(block.x * block.y * block.z) + " threads: ";
  const unsigned count = block.x * block.y * block.z;
  if (count == 0 || count > 1024 || count % LANES != 0) {
    throw std::logic_error(shape + "a block has a multiple of 32 threads here, up to 1024");
  }
  if (grid.x == 0 || grid.y - 1 >= 65535 || grid.z - 1 >= 65535) {
    throw std::logic_error(shape + "no such grid");
  }
  if (shared_bytes > MOST_SHARED) {
    throw std::logic_error(shape + "more shared memory than GPUs from sm_80 on have for a block");
  }
  ++m.launches;
  m.grid = grid;
  m.block = block;
  m.count = count;
  m.slots.assign(count * 2, 0);
  m.shared.resize(shared_bytes + GUARD + 16);
  m.shared_begin = m.shared.data() + (16 - (uintptr_t)m.shared.data() % 16) % 16;
  m.kernel = &call;
  m.call = [](const void* kernel) { (*static_cast<const Call*>(kernel))(); };
  m.error = nullptr;
  try {
    const Faults faults;
    for (unsigned z = 0; z < grid.z; ++z) {
      for (unsigned y = 0; y < grid.y; ++y) {
        for (unsigned x = 0; x < grid.x; ++x) {
          m.block_index = {x, y, z};
          run_block(m, shared_bytes);
        }
      }
    }
  } catch (const std::exception& error) {
    for (Thread& thread : m.threads) thread.started = false;  // some are in the middle of a kernel
    throw std::logic_error(shape + error.what());
  }
}

// What every lane of the warp put in, after the last has: [LANES]. Two slots take turns, because a
// lane may be one exchange ahead of one that still reads.
inline const uint64_t* exchange(unsigned mask, uint64_t value) {
  if (mask != 0xFFFFFFFFu) throw std::logic_error("a shuffle or vote of a part of a warp");
  Machine& m = machine();
  Thread* self = m.current;
  const size_t number = self - m.threads.data();
  uint64_t* slot = &m.slots[(number / LANES * 2 + self->exchanges++ % 2) * LANES];
  slot[number % LANES] = value;
  wait(Wait::warp);
  return slot;
}

inline unsigned lane() { return (machine().current - machine().threads.data()) % LANES; }

template <typename T>
T shuffle(unsigned mask, T value, unsigned from) {
  static_assert(sizeof(T) <= 8, "a shuffle moves up to 8 bytes");
  uint64_t bits = 0;
  memcpy(&bits, &value, sizeof value);
  bits = exchange(mask, bits)[from % LANES];
  memcpy(&value, &bits, sizeof value);
  return value;
}

inline void check_aligned(const void* address, size_t bytes) {
  if ((uintptr_t)address % bytes != 0) {
    throw std::logic_error("access to " + std::to_string(bytes) + " bytes at an address that is " +
                           std::to_string((uintptr_t)address % bytes) + " beyond a multiple");
  }
}

inline void* dynamic_shared() { return machine().shared_begin; }

}  // namespace cuda_emulation

#define threadIdx (::cuda_emulation::machine().current->index)
#define blockIdx (::cuda_emulation::machine().block_index)
#define blockDim (::cuda_emulation::machine().block)
#define gridDim (::cuda_emulation::machine().grid)

#define FASTCONTRAST_LAUNCH(stream, blocks, threads, shared, kernel, ...)                    \
  (void)(stream),                                                                            \
      ::cuda_emulation::launch(#kernel, dim3{(unsigned)(blocks)}, dim3{(unsigned)(threads)}, \
                               shared, [&] { kernel(__VA_ARGS__); })
#define FASTCONTRAST_CHECK_ALIGNED(address, bytes) ::cuda_emulation::check_aligned(address, bytes)
#define FASTCONTRAST_SHARED(type, name) \
  type* const name = static_cast<type*>(::cuda_emulation::dynamic_shared())

inline int __ffs(unsigned bits) { return __builtin_ffs((int)bits); }
inline void __syncthreads() { cuda_emulation::wait(cuda_emulation::Wait::block); }
inline void __syncwarp(unsigned mask = 0xFFFFFFFFu) { cuda_emulation::exchange(mask, 0); }

template <typename T>
T __shfl_sync(unsigned mask, T value, int from) {
  return cuda_emulation::shuffle(mask, value, (unsigned)from);
}
template <typename T>
T __shfl_xor_sync(unsigned mask, T value, int with) {
  return cuda_emulation::shuffle(mask, value, cuda_emulation::lane() ^ (unsigned)with);
}
template <typename T>
T __shfl_down_sync(unsigned mask, T value, unsigned by) {
  const unsigned own = cuda_emulation::lane();
  return cuda_emulation::shuffle(mask, value, own + by < cuda_emulation::LANES ? own + by : own);
}
inline unsigned __ballot_sync(unsigned mask, int vote) {
  const uint64_t* votes = cuda_emulation::exchange(mask, vote != 0);
  unsigned bits = 0;
  for (unsigned lane = 0; lane < cuda_emulation::LANES; ++lane)
    bits |= (unsigned)votes[lane] << lane;
  return bits;
}
inline int __any_sync(unsigned mask, int vote) { return __ballot_sync(mask, vote) != 0; }
inline int __all_sync(unsigned mask, int vote) { return __ballot_sync(mask, vote) == 0xFFFFFFFFu; }

inline int __popc(unsigned bits) { return __builtin_popcount(bits); }

template <typename T>
T atomicAdd(T* address, T value) {
  const T before = *address;
  *address = before + value;
  return before;
}
