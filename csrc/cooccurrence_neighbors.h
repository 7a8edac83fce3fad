// The pins that share the most boards with a pin. See pinclip/ops/cooccurrence_neighbors.py for the law.
#pragma once

#include <cstdint>

namespace pinclip {

template <typename Index>
struct CooccurrencePlan {
  const int64_t* pin_indptr;    // [P + 1]
  const Index* pin_boards;      // [E]
  const int64_t* board_indptr;  // [B + 1]
  const Index* board_pins;      // [E]
  int64_t num_pins;             // P
  const double* board_weights;  // [B], or null: one
  const float* pin_scale;       // [P], or null: one
  const int64_t* starts;        // [num_starts], a pin or -1
  int64_t num_starts;
  int64_t top_k;
};

// Fills neighbors and weights [num_starts, top_k] on up to `threads` threads; the numbers do not depend on how
// many.
template <typename Index>
void cooccurrence_neighbors(const CooccurrencePlan<Index>& plan, int64_t* neighbors, float* weights,
                            int threads);

}  // namespace pinclip
