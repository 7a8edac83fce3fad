// Philox4x32-10, a counter-based generator: the same words from the same counter and key everywhere.
// Source: Salmon, Moraes, Dror, Shaw, "Parallel random numbers: as easy as 1, 2, 3", SC 2011.
#pragma once

#include <cstdint>

// Compiles a function for several vector widths; the loader picks the widest that the processor has.
#if defined(__x86_64__) && defined(__GLIBC__) && defined(__GNUC__) && !defined(__clang__)
#define PINCLIP_VECTOR_CLONES __attribute__((target_clones("arch=x86-64-v4", "arch=x86-64-v3", "default")))
#else
#define PINCLIP_VECTOR_CLONES
#endif

namespace pinclip {

// Draws of `kLanes` walks at once: word w of walk i is words[w][i]. Lanes are independent, so the loop
// over them compiles to vector code.
template <int kLanes>
inline __attribute__((always_inline)) void philox4x32(uint32_t (&words)[4][kLanes], uint64_t key) {
  for (int lane = 0; lane < kLanes; ++lane) {
    uint32_t c0 = words[0][lane], c1 = words[1][lane], c2 = words[2][lane], c3 = words[3][lane];
    uint32_t k0 = static_cast<uint32_t>(key), k1 = static_cast<uint32_t>(key >> 32);
    for (int round = 0; round < 10; ++round) {
      const uint64_t product0 = uint64_t{0xD2511F53u} * c0;
      const uint64_t product1 = uint64_t{0xCD9E8D57u} * c2;
      c0 = static_cast<uint32_t>(product1 >> 32) ^ c1 ^ k0;
      c1 = static_cast<uint32_t>(product1);
      c2 = static_cast<uint32_t>(product0 >> 32) ^ c3 ^ k1;
      c3 = static_cast<uint32_t>(product0);
      k0 += 0x9E3779B9u;
      k1 += 0xBB67AE85u;
    }
    words[0][lane] = c0;
    words[1][lane] = c1;
    words[2][lane] = c2;
    words[3][lane] = c3;
  }
}

}  // namespace pinclip
