// Python names of the compiled ops: addresses and sizes in, nothing or an error out. No torch headers, so that
// one build serves every torch version.
#include <pybind11/pybind11.h>

#include <cstdint>
#include <stdexcept>
#include <string>

#include "cooccurrence_neighbors.h"
#include "random_walk.h"
#include "walk_neighbors.h"

namespace py = pybind11;

namespace {

template <typename T>
T* pointer(uintptr_t address) {
  return reinterpret_cast<T*>(address);
}

// A graph as Python hands it over; `wide`: its lists are int64, not int32.
struct Graph {
  uintptr_t pin_indptr, pin_boards, board_indptr, board_pins, board_alias;
  bool wide;

  template <typename Index>
  pinclip::WalkGraph<Index> of() const {
    return {pointer<const int64_t>(pin_indptr), pointer<const Index>(pin_boards),
            pointer<const int64_t>(board_indptr), pointer<const Index>(board_pins),
            pointer<const int64_t>(board_alias)};
  }
};

pinclip::WalkPlan plan_of(uintptr_t starts, uintptr_t first_walk, int64_t num_starts, int64_t walks,
                          int64_t length, uint64_t restart, uint64_t seed) {
  return {pointer<const int64_t>(starts), pointer<const int64_t>(first_walk), num_starts, walks, length,
          restart, seed};
}

void random_walk(const Graph& graph, const pinclip::WalkPlan& plan, uintptr_t visited, int threads) {
  const py::gil_scoped_release release;
  int64_t* out = pointer<int64_t>(visited);
  if (graph.wide) {
    pinclip::random_walk(graph.of<int64_t>(), plan, out, threads);
  } else {
    pinclip::random_walk(graph.of<int32_t>(), plan, out, threads);
  }
}

void board_alias(const Graph& graph, int64_t num_pins, uintptr_t weights, uintptr_t table) {
  const py::gil_scoped_release release;
  const auto* indptr = pointer<const int64_t>(graph.pin_indptr);
  const auto* of_boards = pointer<const double>(weights);
  if (graph.wide) {
    pinclip::board_alias(indptr, num_pins, pointer<const int64_t>(graph.pin_boards), of_boards,
                         pointer<int64_t>(table));
  } else {
    pinclip::board_alias(indptr, num_pins, pointer<const int32_t>(graph.pin_boards), of_boards,
                         pointer<int64_t>(table));
  }
}

void walk_neighbors(const Graph& graph, const pinclip::WalkPlan& plan, int64_t num_pins, uintptr_t pin_scale,
                    int64_t top_k, int64_t stop_visits, uintptr_t neighbors, uintptr_t weights, int threads) {
  const py::gil_scoped_release release;
  const pinclip::TopPlan top{num_pins, pointer<const float>(pin_scale), top_k, stop_visits};
  if (graph.wide) {
    pinclip::walk_neighbors(graph.of<int64_t>(), plan, top, pointer<int64_t>(neighbors),
                            pointer<float>(weights), threads);
  } else {
    pinclip::walk_neighbors(graph.of<int32_t>(), plan, top, pointer<int64_t>(neighbors),
                            pointer<float>(weights), threads);
  }
}

template <typename Index>
void cooccurrence_of(const Graph& graph, int64_t num_pins, uintptr_t board_weights, uintptr_t pin_scale,
                     uintptr_t starts, int64_t num_starts, int64_t top_k, uintptr_t neighbors,
                     uintptr_t weights, int threads) {
  const pinclip::CooccurrencePlan<Index> plan{pointer<const int64_t>(graph.pin_indptr),
                                              pointer<const Index>(graph.pin_boards),
                                              pointer<const int64_t>(graph.board_indptr),
                                              pointer<const Index>(graph.board_pins),
                                              num_pins,
                                              pointer<const double>(board_weights),
                                              pointer<const float>(pin_scale),
                                              pointer<const int64_t>(starts),
                                              num_starts,
                                              top_k};
  pinclip::cooccurrence_neighbors(plan, pointer<int64_t>(neighbors), pointer<float>(weights), threads);
}

void cooccurrence_neighbors(const Graph& graph, int64_t num_pins, uintptr_t board_weights,
                            uintptr_t pin_scale, uintptr_t starts, int64_t num_starts, int64_t top_k,
                            uintptr_t neighbors, uintptr_t weights, int threads) {
  const py::gil_scoped_release release;
  const auto mine = graph.wide ? cooccurrence_of<int64_t> : cooccurrence_of<int32_t>;
  mine(graph, num_pins, board_weights, pin_scale, starts, num_starts, top_k, neighbors, weights, threads);
}

#ifdef PINCLIP_CUDA
void random_walk_cuda(const Graph& graph, const pinclip::WalkPlan& plan, uintptr_t visited,
                      uintptr_t stream) {
  void* queue = pointer<void>(stream);
  int64_t* out = pointer<int64_t>(visited);
  const char* error = graph.wide ? pinclip::random_walk_cuda(graph.of<int64_t>(), plan, out, queue)
                                 : pinclip::random_walk_cuda(graph.of<int32_t>(), plan, out, queue);
  if (error != nullptr) throw std::runtime_error(std::string("random_walk: ") + error);
}
#endif

}  // namespace

PYBIND11_MODULE(_C, module) {
  py::class_<Graph>(module, "Graph")
      .def(py::init<uintptr_t, uintptr_t, uintptr_t, uintptr_t, uintptr_t, bool>());
  py::class_<pinclip::WalkPlan>(module, "WalkPlan").def(py::init(&plan_of));
  module.def("random_walk", &random_walk);
  module.def("board_alias", &board_alias);
  module.def("walk_neighbors", &walk_neighbors);
  module.def("cooccurrence_neighbors", &cooccurrence_neighbors);
#ifdef PINCLIP_CUDA
  module.def("random_walk_cuda", &random_walk_cuda);
#endif
}
