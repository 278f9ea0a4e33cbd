#include "cpu/bf16_unit.h"

#include <atomic>
#include <stdexcept>
#include <string>

#if defined(FASTCONTRAST_HAVE_AMX)
#include <cpuid.h>
#include <sys/syscall.h>
#include <unistd.h>
#endif

#include "cpu/isa.h"

namespace fastcontrast {
namespace cpu {

namespace {

#if defined(FASTCONTRAST_HAVE_AMX)
// Tiles are 8 KiB of registers per thread, which Linux saves for those alone who ask (5.16 on).
bool tiles_permitted() {
  constexpr long ARCH_GET_XCOMP_PERM = 0x1022, ARCH_REQ_XCOMP_PERM = 0x1023;
  constexpr unsigned long XFEATURE_XTILEDATA = 18;
  unsigned long permitted = 0;
  if (syscall(SYS_arch_prctl, ARCH_REQ_XCOMP_PERM, XFEATURE_XTILEDATA) != 0) return false;
  if (syscall(SYS_arch_prctl, ARCH_GET_XCOMP_PERM, &permitted) != 0) return false;
  return permitted >> XFEATURE_XTILEDATA & 1;
}

bool detect_amx() {
  if (detected_isa() != Isa::avx512) return false;
  unsigned eax, ebx, ecx, edx;
  if (!__get_cpuid_count(7, 0, &eax, &ebx, &ecx, &edx)) return false;
  const bool has_bf16 = edx >> 22 & 1, has_tile = edx >> 24 & 1;
  return has_bf16 && has_tile && tiles_permitted();
}
#endif

#if defined(FASTCONTRAST_HAVE_AVX512_BF16)
bool detect_avx512_bf16() {
  __builtin_cpu_init();
  return detected_isa() == Isa::avx512 && __builtin_cpu_supports("avx512bf16");
}
#endif

std::atomic<Bf16Unit>& active() {
  static std::atomic<Bf16Unit> unit{bf16_unit_available(Bf16Unit::amx) ? Bf16Unit::amx
                                    : bf16_unit_available(Bf16Unit::avx512_bf16)
                                        ? Bf16Unit::avx512_bf16
                                        : Bf16Unit::none};
  return unit;
}

}  // namespace

bool bf16_unit_available(Bf16Unit unit) {
  switch (unit) {
#if defined(FASTCONTRAST_HAVE_AVX512_BF16)
    case Bf16Unit::avx512_bf16: {
      static const bool available = detect_avx512_bf16();
      return available;
    }
#endif
#if defined(FASTCONTRAST_HAVE_AMX)
    case Bf16Unit::amx: {
      static const bool available = detect_amx();
      return available;
    }
#endif
#if defined(FASTCONTRAST_HAVE_AMX_EMULATION)
    case Bf16Unit::amx_emulated:
      return true;
#endif
    case Bf16Unit::none:
      return true;
    default:
      return false;
  }
}

Bf16Unit active_bf16_unit() { return active().load(std::memory_order_relaxed); }

void set_active_bf16_unit(Bf16Unit unit) {
  if (!bf16_unit_available(unit)) {
    throw std::invalid_argument(std::string("this build or machine has no ") +
                                bf16_unit_name(unit));
  }
  active().store(unit);
}

const char* bf16_unit_name(Bf16Unit unit) {
  switch (unit) {
    case Bf16Unit::avx512_bf16:
      return "avx512_bf16";
    case Bf16Unit::amx:
      return "amx";
    case Bf16Unit::amx_emulated:
      return "amx_emulated";
    default:
      return "none";
  }
}

}  // namespace cpu
}  // namespace fastcontrast
