// Python names of the C++ ops: addresses and sizes in, nothing out. No torch headers, so that one build
// serves every torch version.
#include <pybind11/pybind11.h>

#include <cstdint>

#include "random_walk.h"

namespace py = pybind11;

namespace {

template <typename T>
T* pointer(uintptr_t address) {
  return reinterpret_cast<T*>(address);
}

template <typename Index>
void random_walk(uintptr_t pin_indptr, uintptr_t pin_boards, uintptr_t board_indptr, uintptr_t board_pins,
                 uintptr_t board_cdf, const pinclip::WalkPlan& plan, uintptr_t visited, int threads) {
  const pinclip::WalkGraph<Index> graph{pointer<const int64_t>(pin_indptr), pointer<const Index>(pin_boards),
                                        pointer<const int64_t>(board_indptr),
                                        pointer<const Index>(board_pins), pointer<const int32_t>(board_cdf)};
  py::gil_scoped_release release;
  pinclip::random_walk(graph, plan, pointer<int64_t>(visited), threads);
}

}  // namespace

PYBIND11_MODULE(_C, module) {
  module.def("random_walk", [](uintptr_t pin_indptr, uintptr_t pin_boards, uintptr_t board_indptr,
                               uintptr_t board_pins, uintptr_t board_cdf, bool wide, uintptr_t starts,
                               uintptr_t first_walk, int64_t num_starts, int64_t walks, int64_t length,
                               uint64_t restart, uint64_t seed, uintptr_t visited, int threads) {
    const pinclip::WalkPlan plan{pointer<const int64_t>(starts), pointer<const int64_t>(first_walk),
                                 num_starts, walks, length, restart, seed};
    const auto walk = wide ? random_walk<int64_t> : random_walk<int32_t>;
    walk(pin_indptr, pin_boards, board_indptr, board_pins, board_cdf, plan, visited, threads);
  });
}
