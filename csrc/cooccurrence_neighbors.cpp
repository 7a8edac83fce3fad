#include "cooccurrence_neighbors.h"

#include <algorithm>

#include "parallel.h"
#include "top_neighbors.h"

namespace pinclip {
namespace {

// Starts that a thread takes at a time: few enough that one with giant boards does not hold up the end.
constexpr int64_t kBlock = 64;

template <typename Index>
int64_t board_size(const CooccurrencePlan<Index>& plan, int64_t board) {
  return plan.board_indptr[board + 1] - plan.board_indptr[board];
}

// Adds up the boards of one start, in the order of its list.
template <typename Index>
void mine_start(const CooccurrencePlan<Index>& plan, int64_t start, PinSums<Index, double>& sums) {
  const int64_t home = plan.starts[start];
  const int64_t begin = home < 0 ? 0 : plan.pin_indptr[home], end = home < 0 ? 0 : plan.pin_indptr[home + 1];
  int64_t most = 0;
  for (int64_t edge = begin; edge < end; ++edge) most += board_size(plan, plan.pin_boards[edge]);
  sums.reset(std::min(most, plan.num_pins), plan.num_pins);
  for (int64_t edge = begin; edge < end; ++edge) {
    const int64_t board = plan.pin_boards[edge];
    const double weight = plan.board_weights ? plan.board_weights[board] : 1.0;
    if (!(weight > 0)) continue;
    for (int64_t at = plan.board_indptr[board]; at < plan.board_indptr[board + 1]; ++at) {
      if (plan.board_pins[at] != home) sums.add(plan.board_pins[at], weight);
    }
  }
}

}  // namespace

template <typename Index>
void cooccurrence_neighbors(const CooccurrencePlan<Index>& plan, int64_t* neighbors, float* weights,
                            int threads) {
  in_parallel((plan.num_starts + kBlock - 1) / kBlock, threads, [&](int64_t block) {
    PinSums<Index, double> sums;
    TopPins<Index> best;
    const int64_t last = std::min((block + 1) * kBlock, plan.num_starts);
    for (int64_t start = block * kBlock; start < last; ++start) {
      mine_start(plan, start, sums);
      best.reset(plan.top_k);
      sums.for_each([&](Index pin, double sum) {
        best.offer(pin, static_cast<float>(sum) * (plan.pin_scale ? plan.pin_scale[pin] : 1.0f));
      });
      best.write(neighbors + start * plan.top_k, weights + start * plan.top_k);
    }
  });
}

template void cooccurrence_neighbors(const CooccurrencePlan<int32_t>&, int64_t*, float*, int);
template void cooccurrence_neighbors(const CooccurrencePlan<int64_t>&, int64_t*, float*, int);

}  // namespace pinclip
