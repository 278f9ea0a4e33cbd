// Choice of instruction set at run time. Every kernel file in this folder is compiled once per set
// (CMakeLists.txt) into the namespace FASTCONTRAST_ISA; FASTCONTRAST_DISPATCH calls the active one.
//
// Kernel files use no std:: templates, for the reason given in common/macros.h.
#pragma once

namespace fastcontrast {
namespace cpu {

enum class Isa { portable = 0, avx2 = 1, avx512 = 2 };

// The best set that this processor and operating system run.
Isa detected_isa();
// The set in use: detected_isa() unless lowered by set_active_isa (tests do).
Isa active_isa();
// Raises std::invalid_argument when the processor lacks it.
void set_active_isa(Isa isa);
const char* isa_name(Isa isa);

}  // namespace cpu
}  // namespace fastcontrast

#if defined(FASTCONTRAST_X86)
#define FASTCONTRAST_DISPATCH(function, ...)                             \
  (::fastcontrast::cpu::active_isa() == ::fastcontrast::cpu::Isa::avx512 \
       ? ::fastcontrast::cpu::avx512::function(__VA_ARGS__)              \
   : ::fastcontrast::cpu::active_isa() == ::fastcontrast::cpu::Isa::avx2 \
       ? ::fastcontrast::cpu::avx2::function(__VA_ARGS__)                \
       : ::fastcontrast::cpu::portable::function(__VA_ARGS__))
// Declares a kernel once per instruction set: FASTCONTRAST_DECLARE(void f(int)).
#define FASTCONTRAST_DECLARE(...) \
  namespace portable {            \
  __VA_ARGS__;                    \
  }                               \
  namespace avx2 {                \
  __VA_ARGS__;                    \
  }                               \
  namespace avx512 {              \
  __VA_ARGS__;                    \
  }
#else
#define FASTCONTRAST_DISPATCH(function, ...) ::fastcontrast::cpu::portable::function(__VA_ARGS__)
#define FASTCONTRAST_DECLARE(...) \
  namespace portable {            \
  __VA_ARGS__;                    \
  }
#endif
