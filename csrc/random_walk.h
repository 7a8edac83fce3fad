// Random walks with restart over the Pin-Board graph. See pinclip/ops/random_walk.py for the law of a walk.
#pragma once

#include <cstdint>

namespace pinclip {

// Borrowed pointers into a valid graph: indices in range, both directions holding the same edges.
template <typename Index>
struct WalkGraph {
  const int64_t* pin_indptr;    // [P + 1]
  const Index* pin_boards;      // [E]
  const int64_t* board_indptr;  // [B + 1]
  const Index* board_pins;      // [E]
  const int64_t* board_alias;   // [E], or null: boards equally likely
};

struct WalkPlan {
  const int64_t* starts;      // [num_starts], a pin or -1
  const int64_t* first_walk;  // [num_starts], or null: zero
  int64_t num_starts;
  int64_t walks;
  int64_t length;
  uint64_t restart;  // out of 2^32
  uint64_t seed;
};

// Fills visited [num_starts, walks, length] on up to `threads` threads; the numbers do not depend on how
// many.
template <typename Index>
void random_walk(const WalkGraph<Index>& graph, const WalkPlan& plan, int64_t* visited, int threads);

// The same on a GPU: every pointer, those in `plan` too, is to device memory; `stream` is a cudaStream_t.
// Returns at once, with null or the text of the error. Only in a build with CUDA.
template <typename Index>
const char* random_walk_cuda(const WalkGraph<Index>& graph, const WalkPlan& plan, int64_t* visited,
                             void* stream);

// Walks [first, last) of the plan, numbered start by start, on this thread; `visited` [.., length] is the row
// of walk `first`.
template <typename Index, typename Out>
void walk_range(const WalkGraph<Index>& graph, const WalkPlan& plan, int64_t first, int64_t last,
                Out* visited);

// Fills table [E], the `board_alias` of a graph whose board b is chosen in proportion to weights[b] >= 0.
template <typename Index>
void board_alias(const int64_t* pin_indptr, int64_t num_pins, const Index* pin_boards, const double* weights,
                 int64_t* table);

}  // namespace pinclip
