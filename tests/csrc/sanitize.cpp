// The C++ core on random and degenerate graphs, built with sanitizers by `make sanitize`. Results on one thread
// and on several must be equal; what the sanitizers find ends the program.
#include <array>
#include <cstdint>
#include <cstdio>
#include <cstdlib>
#include <random>
#include <set>
#include <utility>
#include <vector>

#include "cooccurrence_neighbors.h"
#include "random_walk.h"
#include "walk_neighbors.h"

namespace {

template <typename Index>
struct Lists {
  std::vector<int64_t> pin_indptr, board_indptr, alias;
  std::vector<Index> pin_boards, board_pins;
  std::vector<double> board_weights;
  std::vector<float> pin_scale;

  int64_t pins() const { return static_cast<int64_t>(pin_indptr.size()) - 1; }
  pinclip::WalkGraph<Index> graph(bool weighted) const {
    return {pin_indptr.data(), pin_boards.data(), board_indptr.data(), board_pins.data(),
            weighted ? alias.data() : nullptr};
  }
};

// Exactly sized arrays, so that a read one past the end of any of them is seen.
template <typename Index>
Lists<Index> make(int64_t pins, int64_t boards, int64_t edges, std::mt19937_64& random) {
  std::set<std::pair<int64_t, int64_t>> by_pin, by_board;
  for (int64_t e = 0; e < edges; ++e) {
    const int64_t pin = static_cast<int64_t>(random() % pins), board = static_cast<int64_t>(random() % boards);
    by_pin.insert({pin, board});
    by_board.insert({board, pin});
  }
  Lists<Index> lists;
  lists.pin_indptr.assign(pins + 1, 0);
  lists.board_indptr.assign(boards + 1, 0);
  for (const auto& [pin, board] : by_pin) {
    ++lists.pin_indptr[pin + 1];
    lists.pin_boards.push_back(static_cast<Index>(board));
  }
  for (const auto& [board, pin] : by_board) {
    ++lists.board_indptr[board + 1];
    lists.board_pins.push_back(static_cast<Index>(pin));
  }
  for (int64_t p = 0; p < pins; ++p) lists.pin_indptr[p + 1] += lists.pin_indptr[p];
  for (int64_t b = 0; b < boards; ++b) lists.board_indptr[b + 1] += lists.board_indptr[b];
  lists.pin_boards.shrink_to_fit();
  lists.board_pins.shrink_to_fit();
  for (int64_t b = 0; b < boards; ++b) lists.board_weights.push_back(static_cast<double>(random() % 4));
  for (int64_t p = 0; p < pins; ++p) lists.pin_scale.push_back(static_cast<float>(random() % 3));
  lists.alias.resize(lists.pin_boards.size());
  pinclip::board_alias(lists.pin_indptr.data(), pins, lists.pin_boards.data(), lists.board_weights.data(),
                       lists.alias.data());
  return lists;
}

template <typename Value>
void expect_equal(const std::vector<Value>& one, const std::vector<Value>& many, const char* what) {
  if (one == many) return;
  std::fprintf(stderr, "%s differs between one thread and several\n", what);
  std::exit(1);
}

template <typename Index>
void run(int64_t pins, int64_t boards, int64_t edges, std::mt19937_64& random) {
  const Lists<Index> lists = make<Index>(pins, boards, edges, random);
  std::vector<int64_t> starts{-1};
  for (int64_t pin = 0; pin < pins; pin += 1 + pins / 300) starts.push_back(pin);
  const int64_t count = static_cast<int64_t>(starts.size());
  const std::vector<int64_t> offsets(starts.size(), 7);
  for (const bool weighted : {false, true}) {
    const auto graph = lists.graph(weighted);
    for (const auto& [walks, length] : std::vector<std::pair<int64_t, int64_t>>{{1, 1}, {65, 3}, {130, 40}}) {
      const pinclip::WalkPlan plan{starts.data(), offsets.data(), count, walks, length, 1u << 30, 11};
      std::vector<std::vector<int64_t>> visited(2, std::vector<int64_t>(count * walks * length));
      pinclip::random_walk(graph, plan, visited[0].data(), 1);
      pinclip::random_walk(graph, plan, visited[1].data(), 4);
      expect_equal(visited[0], visited[1], "random_walk");
      for (const int64_t stop : {0, 2}) {
        const pinclip::TopPlan top{pins, weighted ? lists.pin_scale.data() : nullptr, 9, stop};
        std::vector<std::vector<int64_t>> found(2, std::vector<int64_t>(count * 9));
        std::vector<std::vector<float>> weights(2, std::vector<float>(count * 9));
        pinclip::walk_neighbors(graph, plan, top, found[0].data(), weights[0].data(), 1);
        pinclip::walk_neighbors(graph, plan, top, found[1].data(), weights[1].data(), 4);
        expect_equal(found[0], found[1], "walk_neighbors");
        expect_equal(weights[0], weights[1], "weights of walk_neighbors");
      }
    }
    const pinclip::CooccurrencePlan<Index> plan{lists.pin_indptr.data(),
                                                lists.pin_boards.data(),
                                                lists.board_indptr.data(),
                                                lists.board_pins.data(),
                                                pins,
                                                weighted ? lists.board_weights.data() : nullptr,
                                                weighted ? lists.pin_scale.data() : nullptr,
                                                starts.data(),
                                                count,
                                                9};
    std::vector<std::vector<int64_t>> found(2, std::vector<int64_t>(count * 9));
    std::vector<std::vector<float>> weights(2, std::vector<float>(count * 9));
    pinclip::cooccurrence_neighbors(plan, found[0].data(), weights[0].data(), 1);
    pinclip::cooccurrence_neighbors(plan, found[1].data(), weights[1].data(), 4);
    expect_equal(found[0], found[1], "cooccurrence_neighbors");
    expect_equal(weights[0], weights[1], "weights of cooccurrence_neighbors");
  }
}

}  // namespace

int main() {
  std::mt19937_64 random(1);
  for (const auto& [pins, boards, edges] :
       std::vector<std::array<int64_t, 3>>{{1, 1, 0}, {1, 1, 1}, {5, 1, 20}, {300, 90, 900}, {140'000, 500, 4'000}}) {
    run<int32_t>(pins, boards, edges, random);
    run<int64_t>(pins, boards, edges, random);
  }
  std::puts("clean");
}
