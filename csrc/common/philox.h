// Philox4x32-10, the counter-based generator of Salmon, Moraes, Dror and Shaw, "Parallel random
// numbers: as easy as 1, 2, 3" (SC 2011): a pure function from a 128-bit counter and a 64-bit key
// to four 32-bit words. Called by common/crop.h on every device, so that a draw is the same
// everywhere.
//
// Words and rounds as in Random123, at::philox_engine(seed, subsequence, offset) and
// tl.philox(seed, c0, c1, c2, c3): key = (seed[31:0], seed[63:32]), c0, c1 = offset,
// c2, c3 = subsequence.
#pragma once

#include <stdint.h>

#include "common/macros.h"

namespace fastcontrast {

struct PhiloxBlock {
  uint32_t word[4];
};

FC_INLINE PhiloxBlock philox4x32(PhiloxBlock counter, uint64_t seed) {
  uint32_t c0 = counter.word[0], c1 = counter.word[1];
  uint32_t c2 = counter.word[2], c3 = counter.word[3];
  uint32_t k0 = (uint32_t)seed, k1 = (uint32_t)(seed >> 32);
  for (int round = 0; round < 10; ++round) {
    const uint64_t p0 = (uint64_t)0xD2511F53u * c0;
    const uint64_t p1 = (uint64_t)0xCD9E8D57u * c2;
    c0 = (uint32_t)(p1 >> 32) ^ c1 ^ k0;
    c1 = (uint32_t)p1;
    c2 = (uint32_t)(p0 >> 32) ^ c3 ^ k1;
    c3 = (uint32_t)p0;
    k0 += 0x9E3779B9u;
    k1 += 0xBB67AE85u;
  }
  return PhiloxBlock{{c0, c1, c2, c3}};
}

}  // namespace fastcontrast
