// Philox4x32-10, a counter-based generator: the same words from the same counter and key everywhere.
// Source: Salmon, Moraes, Dror, Shaw, "Parallel random numbers: as easy as 1, 2, 3", SC 2011.
#pragma once

#include <cstdint>

// Compiles a function for AVX-512 as well, where the loop over lanes takes a sixth of the time; which of the
// two runs is decided when the library is loaded; which ThreadSanitizer, not ready by then, does not survive.
#if defined(__x86_64__) && defined(__GLIBC__) && defined(__GNUC__) && !defined(__clang__) && \
    !defined(__SANITIZE_THREAD__)
#define PINCLIP_VECTOR_CLONES __attribute__((target_clones("arch=x86-64-v4", "default")))
#else
#define PINCLIP_VECTOR_CLONES
#endif

namespace pinclip {

// Draws of kLanes walks at once: words[0..3][i] hold the counter of lane i and then its random words. Each is
// a 32-bit number in 64 bits, the width of the products, so that lanes never have to be shuffled.
template <int kLanes>
inline __attribute__((always_inline)) void philox4x32(uint64_t (&words)[4][kLanes], uint64_t key) {
  constexpr uint64_t kLow = 0xFFFFFFFFu;
  for (int lane = 0; lane < kLanes; ++lane) {
    uint64_t c0 = words[0][lane], c1 = words[1][lane], c2 = words[2][lane], c3 = words[3][lane];
    uint32_t k0 = static_cast<uint32_t>(key), k1 = static_cast<uint32_t>(key >> 32);
    for (int round = 0; round < 10; ++round) {
      const uint64_t product0 = 0xD2511F53u * (c0 & kLow);
      const uint64_t product1 = 0xCD9E8D57u * (c2 & kLow);
      // The high halves of c1 and c3 are never read, so they need no clearing.
      c0 = (product1 >> 32) ^ c1 ^ k0;
      c1 = product1;
      c2 = (product0 >> 32) ^ c3 ^ k1;
      c3 = product0;
      k0 += 0x9E3779B9u;
      k1 += 0xBB67AE85u;
    }
    words[0][lane] = c0 & kLow;
    words[1][lane] = c1 & kLow;
    words[2][lane] = c2 & kLow;
    words[3][lane] = c3 & kLow;
  }
}

}  // namespace pinclip
