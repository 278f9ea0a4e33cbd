// Which bfloat16 matrix unit computes the products of bf16_products.h: chosen at run time.
// FASTCONTRAST_BF16_DISPATCH calls the copy of a kernel that was compiled for the active unit.
#pragma once

namespace fastcontrast {
namespace cpu {

// amx_emulated: the code for AMX on a software model of the tiles, in builds for the tests only.
enum class Bf16Unit { none = 0, avx512_bf16 = 1, amx = 2, amx_emulated = 3 };

// Whether this build, processor and operating system run it. The first question about AMX asks
// Linux for the permission to use tiles; it holds for all threads and for children by fork.
bool bf16_unit_available(Bf16Unit unit);
// The fastest available unit, unless set otherwise (tests do). Never the emulation by itself.
Bf16Unit active_bf16_unit();
// Raises std::invalid_argument when it is not available.
void set_active_bf16_unit(Bf16Unit unit);
const char* bf16_unit_name(Bf16Unit unit);

}  // namespace cpu
}  // namespace fastcontrast

#if defined(FASTCONTRAST_HAVE_AVX512_BF16)
#define FASTCONTRAST_CASE_AVX512_BF16(function, ...)         \
  case ::fastcontrast::cpu::Bf16Unit::avx512_bf16:           \
    ::fastcontrast::cpu::avx512_bf16::function(__VA_ARGS__); \
    break;
#else
#define FASTCONTRAST_CASE_AVX512_BF16(function, ...)
#endif
#if defined(FASTCONTRAST_HAVE_AMX)
#define FASTCONTRAST_CASE_AMX(function, ...)         \
  case ::fastcontrast::cpu::Bf16Unit::amx:           \
    ::fastcontrast::cpu::amx::function(__VA_ARGS__); \
    break;
#else
#define FASTCONTRAST_CASE_AMX(function, ...)
#endif
#if defined(FASTCONTRAST_HAVE_AMX_EMULATION)
#define FASTCONTRAST_CASE_AMX_EMULATED(function, ...)         \
  case ::fastcontrast::cpu::Bf16Unit::amx_emulated:           \
    ::fastcontrast::cpu::amx_emulated::function(__VA_ARGS__); \
    break;
#else
#define FASTCONTRAST_CASE_AMX_EMULATED(function, ...)
#endif
// For functions that return nothing; std::invalid_argument (<stdexcept>) where no unit is active.
#define FASTCONTRAST_BF16_DISPATCH(function, ...)                                   \
  switch (::fastcontrast::cpu::active_bf16_unit()) {                                \
    FASTCONTRAST_CASE_AVX512_BF16(function, __VA_ARGS__)                            \
    FASTCONTRAST_CASE_AMX(function, __VA_ARGS__)                                    \
    FASTCONTRAST_CASE_AMX_EMULATED(function, __VA_ARGS__)                           \
    default:                                                                        \
      throw std::invalid_argument("no bfloat16 matrix unit is active: " #function); \
  }
// Declares a kernel once per unit; what is not built is never called.
#define FASTCONTRAST_BF16_DECLARE(...) \
  namespace avx512_bf16 {              \
  __VA_ARGS__;                         \
  }                                    \
  namespace amx {                      \
  __VA_ARGS__;                         \
  }                                    \
  namespace amx_emulated {             \
  __VA_ARGS__;                         \
  }
