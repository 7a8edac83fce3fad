#include "random_walk.h"

#include <algorithm>
#include <system_error>
#include <thread>
#include <vector>

#include "philox.h"

namespace pinclip {
namespace {

// Walks that one thread advances together, phase by phase: each phase computes addresses and asks for them,
// the next one reads them, so the latencies of a bundle overlap. On a graph of 40 M edges, which no cache
// holds, that makes 33 M hops/s of 23 M without the prefetches; 32 lanes make 29 M there, and 128 lose 5% on
// a cached graph.
constexpr int kLanes = 64;
// Hops below which a further thread costs more to start than it saves.
constexpr int64_t kHopsPerThread = 1 << 15;

// A bundle of walks that have not ended.
struct Lanes {
  int count = 0;
  int64_t home[kLanes];
  int64_t at[kLanes];       // the pin each walk stands on
  int64_t* out[kLanes];     // its row of the result
  uint64_t number[kLanes];  // below 2^32
};

PINCLIP_VECTOR_CLONES
void draw_words(uint64_t (&words)[4][kLanes], const Lanes& lanes, uint32_t hop, uint64_t seed) {
  for (int i = 0; i < kLanes; ++i) {
    words[0][i] = hop;
    words[1][i] = lanes.number[i];
    words[2][i] = static_cast<uint64_t>(lanes.home[i]) & 0xFFFFFFFFu;
    words[3][i] = static_cast<uint64_t>(lanes.home[i]) >> 32;
  }
  philox4x32(words, seed);
}

inline int64_t bounded(uint64_t word, int64_t count) {
  return static_cast<int64_t>((word * static_cast<uint64_t>(count)) >> 32);
}

// The first position of table[0, count) whose entry is >= value, else count. No branch depends on the table:
// half of them would be mispredicted.
inline int64_t first_at_least(const int32_t* table, int64_t count, int32_t value) {
  const int32_t* low = table;
  while (count > 1) {
    const int64_t half = count / 2;
    low += half & -static_cast<int64_t>(low[half - 1] < value);
    count -= half;
  }
  return low - table + (count == 1 && *low < value);
}

// Drops the walks for which stuck[i], filling their rows with -1 from `hop` on.
void drop_stuck(Lanes& lanes, int64_t (&edge)[kLanes], const bool (&stuck)[kLanes],
                uint64_t (&words)[4][kLanes], int64_t hop, int64_t length) {
  int kept = 0;
  for (int i = 0; i < lanes.count; ++i) {
    if (stuck[i]) {
      std::fill(lanes.out[i] + hop, lanes.out[i] + length, -1);
      continue;
    }
    lanes.home[kept] = lanes.home[i];
    lanes.at[kept] = lanes.at[i];
    lanes.out[kept] = lanes.out[i];
    lanes.number[kept] = lanes.number[i];
    edge[kept] = edge[i];
    words[2][kept] = words[2][i];
    ++kept;
  }
  lanes.count = kept;
}

// Walks all lanes to their end; each stands on a pin with boards.
template <typename Index, bool kWeighted>
void walk_lanes(const WalkGraph<Index>& graph, const WalkPlan& plan, Lanes& lanes) {
  uint64_t words[4][kLanes];
  int64_t edge[kLanes], board[kLanes];
  for (int64_t hop = 0; hop < plan.length; ++hop) {
    draw_words(words, lanes, static_cast<uint32_t>(hop), plan.seed);
    bool stuck[kLanes] = {}, any_stuck = false;
    for (int i = 0; i < lanes.count; ++i) {
      const int64_t at = words[0][i] < plan.restart ? lanes.home[i] : lanes.at[i];
      const int64_t begin = graph.pin_indptr[at], degree = graph.pin_indptr[at + 1] - begin;
      if constexpr (kWeighted) {
        const int32_t* table = graph.board_cdf + begin;
        const int32_t value = static_cast<int32_t>(words[1][i] >> 1);
        const int64_t draw = first_at_least(table, degree, value);
        stuck[i] = draw == degree;
        any_stuck |= stuck[i];
        edge[i] = begin + draw;
      } else {
        edge[i] = begin + bounded(words[1][i], degree);
      }
      __builtin_prefetch(graph.pin_boards + edge[i]);
    }
    if (any_stuck) drop_stuck(lanes, edge, stuck, words, hop, plan.length);
    for (int i = 0; i < lanes.count; ++i) {
      board[i] = graph.pin_boards[edge[i]];
      __builtin_prefetch(graph.board_indptr + board[i]);
    }
    for (int i = 0; i < lanes.count; ++i) {
      const int64_t begin = graph.board_indptr[board[i]];
      const int64_t size = graph.board_indptr[board[i] + 1] - begin;
      edge[i] = begin + bounded(words[2][i], size);
      __builtin_prefetch(graph.board_pins + edge[i]);
    }
    for (int i = 0; i < lanes.count; ++i) {
      lanes.at[i] = graph.board_pins[edge[i]];
      lanes.out[i][hop] = lanes.at[i];
      __builtin_prefetch(graph.pin_indptr + lanes.at[i]);
    }
  }
  lanes.count = 0;
}

// Walks [first, last) of the plan, numbered start by start.
template <typename Index, bool kWeighted>
void walk_range(const WalkGraph<Index>& graph, const WalkPlan& plan, int64_t first, int64_t last,
                int64_t* visited) {
  Lanes lanes = {};
  int64_t walk = first;
  while (walk < last) {
    const int64_t row = walk / plan.walks, home = plan.starts[row];
    const int64_t row_begin = row * plan.walks, row_end = std::min(row_begin + plan.walks, last);
    if (home < 0 || graph.pin_indptr[home] == graph.pin_indptr[home + 1]) {
      std::fill(visited + walk * plan.length, visited + row_end * plan.length, -1);
      walk = row_end;
      continue;
    }
    const int64_t number = plan.first_walk ? plan.first_walk[row] : 0;
    for (; walk < row_end; ++walk) {
      const int lane = lanes.count++;
      lanes.home[lane] = lanes.at[lane] = home;
      lanes.out[lane] = visited + walk * plan.length;
      lanes.number[lane] = static_cast<uint64_t>(number + walk - row_begin);
      if (lanes.count == kLanes) walk_lanes<Index, kWeighted>(graph, plan, lanes);
    }
  }
  walk_lanes<Index, kWeighted>(graph, plan, lanes);
}

}  // namespace

template <typename Index>
void random_walk(const WalkGraph<Index>& graph, const WalkPlan& plan, int64_t* visited, int threads) {
  const int64_t total = plan.num_starts * plan.walks;
  const auto walk = graph.board_cdf ? walk_range<Index, true> : walk_range<Index, false>;
  const int64_t useful = std::max<int64_t>(1, total * plan.length / kHopsPerThread);
  const int64_t parts = std::min<int64_t>(std::max(threads, 1), useful);
  const auto run = [&](int64_t part) {
    walk(graph, plan, total * part / parts, total * (part + 1) / parts, visited);
  };
  std::vector<std::thread> helpers;
  int64_t part = 1;
  try {
    helpers.reserve(parts);
    for (; part < parts; ++part) helpers.emplace_back(run, part);
  } catch (const std::system_error&) {
    // No more threads to be had: this one walks what is left.
  }
  run(0);
  for (; part < parts; ++part) run(part);
  for (auto& helper : helpers) helper.join();
}

template void random_walk(const WalkGraph<int32_t>&, const WalkPlan&, int64_t*, int);
template void random_walk(const WalkGraph<int64_t>&, const WalkPlan&, int64_t*, int);

}  // namespace pinclip
