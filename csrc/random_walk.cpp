#include "random_walk.h"

#include <algorithm>
#include <vector>

#include "parallel.h"
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
template <typename Out>
struct Lanes {
  int count = 0;
  int64_t home[kLanes];
  int64_t at[kLanes];       // the pin each walk stands on
  Out* out[kLanes];         // its row of the result
  uint64_t number[kLanes];  // below 2^32
};

PINCLIP_VECTOR_CLONES
void draw_words(uint64_t (&words)[4][kLanes], const int64_t (&home)[kLanes],
                const uint64_t (&number)[kLanes], uint32_t hop, uint64_t seed) {
  for (int i = 0; i < kLanes; ++i) {
    words[0][i] = hop;
    words[1][i] = number[i];
    words[2][i] = static_cast<uint64_t>(home[i]) & 0xFFFFFFFFu;
    words[3][i] = static_cast<uint64_t>(home[i]) >> 32;
  }
  philox4x32(words, seed);
}

inline int64_t bounded(uint64_t word, int64_t count) {
  return static_cast<int64_t>((word * static_cast<uint64_t>(count)) >> 32);
}

// Drops the walks that have no board to go to, filling their rows with -1 from `hop` on.
template <typename Out>
void drop_stuck(Lanes<Out>& lanes, int64_t (&edge)[kLanes], uint64_t (&words)[4][kLanes], int64_t hop,
                int64_t length) {
  int kept = 0;
  for (int i = 0; i < lanes.count; ++i) {
    if (edge[i] < 0) {
      std::fill(lanes.out[i] + hop, lanes.out[i] + length, Out{-1});
      continue;
    }
    if (kept < i) {
      lanes.home[kept] = lanes.home[i];
      lanes.at[kept] = lanes.at[i];
      lanes.out[kept] = lanes.out[i];
      lanes.number[kept] = lanes.number[i];
      edge[kept] = edge[i];
      words[2][kept] = words[2][i];
    }
    ++kept;
  }
  lanes.count = kept;
}

// Walks all lanes to their end; each stands on a pin with boards.
template <typename Index, typename Out, bool kWeighted>
void walk_lanes(const WalkGraph<Index>& graph, const WalkPlan& plan, Lanes<Out>& lanes) {
  uint64_t words[4][kLanes];
  int64_t edge[kLanes], begin[kLanes], board[kLanes];
  for (int64_t hop = 0; hop < plan.length; ++hop) {
    draw_words(words, lanes.home, lanes.number, static_cast<uint32_t>(hop), plan.seed);
    for (int i = 0; i < lanes.count; ++i) {
      const int64_t at = words[0][i] < plan.restart ? lanes.home[i] : lanes.at[i];
      begin[i] = graph.pin_indptr[at];
      edge[i] = begin[i] + bounded(words[1][i], graph.pin_indptr[at + 1] - begin[i]);
      if constexpr (kWeighted) __builtin_prefetch(graph.board_alias + edge[i]);
      __builtin_prefetch(graph.pin_boards + edge[i]);
    }
    if constexpr (kWeighted) {
      int64_t lowest = 0;
      for (int i = 0; i < lanes.count; ++i) {
        const int64_t entry = graph.board_alias[edge[i]];
        const bool own = words[3][i] < (static_cast<uint64_t>(entry) & 0xFFFFFFFFu);
        edge[i] = own ? edge[i] : begin[i] + (entry >> 32);
        edge[i] = entry < 0 ? -1 : edge[i];
        lowest = std::min(lowest, entry);
        __builtin_prefetch(graph.pin_boards + edge[i]);
      }
      if (lowest < 0) drop_stuck(lanes, edge, words, hop, plan.length);
    }
    for (int i = 0; i < lanes.count; ++i) {
      board[i] = graph.pin_boards[edge[i]];
      __builtin_prefetch(graph.board_indptr + board[i]);
    }
    for (int i = 0; i < lanes.count; ++i) {
      const int64_t first = graph.board_indptr[board[i]];
      edge[i] = first + bounded(words[2][i], graph.board_indptr[board[i] + 1] - first);
      __builtin_prefetch(graph.board_pins + edge[i]);
    }
    for (int i = 0; i < lanes.count; ++i) {
      lanes.at[i] = graph.board_pins[edge[i]];
      lanes.out[i][hop] = static_cast<Out>(lanes.at[i]);
      __builtin_prefetch(graph.pin_indptr + lanes.at[i]);
    }
  }
  lanes.count = 0;
}

template <typename Index, typename Out, bool kWeighted>
void walk_range_of(const WalkGraph<Index>& graph, const WalkPlan& plan, int64_t first, int64_t last,
                   Out* visited) {
  Lanes<Out> lanes = {};
  int64_t walk = first;
  while (walk < last) {
    const int64_t row = walk / plan.walks, home = plan.starts[row];
    const int64_t row_begin = row * plan.walks, row_end = std::min(row_begin + plan.walks, last);
    if (home < 0 || graph.pin_indptr[home] == graph.pin_indptr[home + 1]) {
      std::fill(visited + (walk - first) * plan.length, visited + (row_end - first) * plan.length, Out{-1});
      walk = row_end;
      continue;
    }
    const int64_t number = plan.first_walk ? plan.first_walk[row] : 0;
    for (; walk < row_end; ++walk) {
      const int lane = lanes.count++;
      lanes.home[lane] = lanes.at[lane] = home;
      lanes.out[lane] = visited + (walk - first) * plan.length;
      lanes.number[lane] = static_cast<uint64_t>(number + walk - row_begin);
      if (lanes.count == kLanes) walk_lanes<Index, Out, kWeighted>(graph, plan, lanes);
    }
  }
  walk_lanes<Index, Out, kWeighted>(graph, plan, lanes);
}

}  // namespace

template <typename Index, typename Out>
void walk_range(const WalkGraph<Index>& graph, const WalkPlan& plan, int64_t first, int64_t last,
                Out* visited) {
  const auto walk = graph.board_alias ? walk_range_of<Index, Out, true> : walk_range_of<Index, Out, false>;
  walk(graph, plan, first, last, visited);
}

template <typename Index>
void random_walk(const WalkGraph<Index>& graph, const WalkPlan& plan, int64_t* visited, int threads) {
  const int64_t total = plan.num_starts * plan.walks;
  const int64_t useful = std::max<int64_t>(1, total * plan.length / kHopsPerThread);
  const int64_t parts = std::min<int64_t>(std::max(threads, 1), useful);
  in_parallel(parts, static_cast<int>(parts), [&](int64_t part) {
    const int64_t first = total * part / parts;
    walk_range(graph, plan, first, total * (part + 1) / parts, visited + first * plan.length);
  });
}

// Vose's construction of Walker's alias method, pin by pin.
template <typename Index>
void board_alias(const int64_t* pin_indptr, int64_t num_pins, const Index* pin_boards, const double* weights,
                 int64_t* table) {
  constexpr double kOne = 4294967296.0;  // 2^32
  std::vector<double> share;
  std::vector<int64_t> light, heavy;
  for (int64_t pin = 0; pin < num_pins; ++pin) {
    const int64_t begin = pin_indptr[pin], count = pin_indptr[pin + 1] - begin;
    double total = 0;
    for (int64_t k = 0; k < count; ++k) total += weights[pin_boards[begin + k]];
    if (!(total > 0)) {
      std::fill(table + begin, table + begin + count, int64_t{-1});
      continue;
    }
    share.resize(count);
    light.clear();
    heavy.clear();
    for (int64_t k = 0; k < count; ++k) {
      share[k] = weights[pin_boards[begin + k]] / total * static_cast<double>(count);
      (share[k] < 1 ? light : heavy).push_back(k);
    }
    const auto set = [&](int64_t k, double own, int64_t alias) {
      const double threshold = std::min(own * kOne, kOne - 1);
      table[begin + k] = (alias << 32) | static_cast<int64_t>(threshold);
    };
    while (!light.empty() && !heavy.empty()) {
      const int64_t low = light.back(), high = heavy.back();
      light.pop_back();
      set(low, share[low], high);
      share[high] -= 1 - share[low];
      if (share[high] < 1) {
        heavy.pop_back();
        light.push_back(high);
      }
    }
    // What is left over on either side is a whole share each, up to rounding.
    for (const int64_t k : heavy) set(k, 1, k);
    for (const int64_t k : light) set(k, 1, k);
  }
}

template void walk_range(const WalkGraph<int32_t>&, const WalkPlan&, int64_t, int64_t, int32_t*);
template void walk_range(const WalkGraph<int64_t>&, const WalkPlan&, int64_t, int64_t, int64_t*);
template void random_walk(const WalkGraph<int32_t>&, const WalkPlan&, int64_t*, int);
template void random_walk(const WalkGraph<int64_t>&, const WalkPlan&, int64_t*, int);
template void board_alias(const int64_t*, int64_t, const int32_t*, const double*, int64_t*);
template void board_alias(const int64_t*, int64_t, const int64_t*, const double*, int64_t*);

}  // namespace pinclip
