#include "walk_neighbors.h"

#include <algorithm>
#include <vector>

#include "parallel.h"
#include "top_neighbors.h"

namespace pinclip {
namespace {

// Walks between two looks at whether enough pins have been visited often enough: one bundle of the walker.
constexpr int64_t kRound = 64;
// Hops walked before they are counted: 128 kB of 32-bit pins, which stay in the second cache.
constexpr int64_t kHops = 1 << 15;

template <typename Index>
class Miner {
 public:
  Miner(const WalkGraph<Index>& graph, const WalkPlan& plan, const TopPlan& top)
      : graph_(graph), plan_(plan), top_(top) {}

  // Starts [first, last): together when all their walks fit the buffer, else one by one and round by round.
  void mine(int64_t first, int64_t last, int64_t* neighbors, float* weights) {
    const int64_t round = round_walks(plan_, top_);
    if (round == plan_.walks) {
      walk(first, last, 0, round);
      for (int64_t start = first; start < last; ++start) {
        begin(start);
        count(start, (start - first) * round * plan_.length, round * plan_.length);
        write(start, neighbors, weights);
      }
      return;
    }
    for (int64_t start = first; start < last; ++start) {
      begin(start);
      for (int64_t done = 0; done < plan_.walks && !stopped(); done += round) {
        const int64_t walks = std::min(round, plan_.walks - done);
        walk(start, start + 1, done, walks);
        count(start, 0, walks * plan_.length);
      }
      write(start, neighbors, weights);
    }
  }

  static int64_t round_walks(const WalkPlan& plan, const TopPlan& top) {
    const int64_t fitting = std::max(kRound, kHops / plan.length / kRound * kRound);
    return std::min(plan.walks, top.stop_visits > 0 ? kRound : fitting);
  }

 private:
  void walk(int64_t first, int64_t last, int64_t done, int64_t walks) {
    offsets_.assign(static_cast<size_t>(last - first), done);
    WalkPlan part = plan_;
    part.starts = plan_.starts + first;
    part.num_starts = last - first;
    part.first_walk = offsets_.data();
    part.walks = walks;
    visited_.resize(static_cast<size_t>((last - first) * walks * plan_.length));
    walk_range(graph_, part, 0, part.num_starts * walks, visited_.data());
  }

  void begin(int64_t start) {
    const int64_t most = std::min(plan_.walks * plan_.length, top_.num_pins);
    visits_.reset(plan_.starts[start] < 0 ? 0 : most, top_.num_pins);
    often_ = 0;
  }

  void count(int64_t start, int64_t begin, int64_t hops) {
    const Index home = static_cast<Index>(plan_.starts[start]);
    for (int64_t hop = begin; hop < begin + hops; ++hop) {
      const Index pin = visited_[hop];
      if (pin == home || pin < 0) continue;
      often_ += visits_.add(pin, 1) == top_.stop_visits;
    }
  }

  bool stopped() const { return top_.stop_visits > 0 && often_ >= top_.top_k; }

  void write(int64_t start, int64_t* neighbors, float* weights) {
    best_.reset(top_.top_k);
    visits_.for_each([&](Index pin, int64_t visits) {
      const float scale = top_.pin_scale ? top_.pin_scale[pin] : 1.0f;
      best_.offer(pin, static_cast<float>(visits) * scale);
    });
    best_.write(neighbors + start * top_.top_k, weights + start * top_.top_k);
  }

  const WalkGraph<Index>& graph_;
  const WalkPlan& plan_;
  const TopPlan& top_;
  std::vector<Index> visited_;
  std::vector<int64_t> offsets_;
  PinSums<Index, std::conditional_t<sizeof(Index) == 4, int32_t, int64_t>> visits_;
  TopPins<Index> best_;
  int64_t often_ = 0;
};

}  // namespace

template <typename Index>
void walk_neighbors(const WalkGraph<Index>& graph, const WalkPlan& plan, const TopPlan& top,
                    int64_t* neighbors, float* weights, int threads) {
  const int64_t fitting = kHops / std::max<int64_t>(1, plan.walks * plan.length);
  const int64_t block = std::max<int64_t>(1, fitting);
  const int64_t blocks = (plan.num_starts + block - 1) / block;
  const int64_t share = (blocks + std::max(threads, 1) * 16 - 1) / (std::max(threads, 1) * 16);
  in_parallel(share > 0 ? (blocks + share - 1) / share : 0, threads, [&](int64_t part) {
    Miner<Index> miner(graph, plan, top);
    for (int64_t at = part * share; at < std::min((part + 1) * share, blocks); ++at) {
      miner.mine(at * block, std::min((at + 1) * block, plan.num_starts), neighbors, weights);
    }
  });
}

template void walk_neighbors(const WalkGraph<int32_t>&, const WalkPlan&, const TopPlan&, int64_t*, float*,
                             int);
template void walk_neighbors(const WalkGraph<int64_t>&, const WalkPlan&, const TopPlan&, int64_t*, float*,
                             int);

}  // namespace pinclip
