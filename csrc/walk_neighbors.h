// The pins that walks from a pin visit most. See pinclip/ops/walk_neighbors.py for the law.
#pragma once

#include <cstdint>

#include "random_walk.h"

namespace pinclip {

struct TopPlan {
  int64_t num_pins;        // P
  const float* pin_scale;  // [P], or null: one
  int64_t top_k;
  int64_t stop_visits;  // 0: every walk is made
};

// Fills neighbors and weights [num_starts, top_k] on up to `threads` threads; the numbers do not depend on how
// many.
template <typename Index>
void walk_neighbors(const WalkGraph<Index>& graph, const WalkPlan& plan, const TopPlan& top,
                    int64_t* neighbors, float* weights, int threads);

}  // namespace pinclip
