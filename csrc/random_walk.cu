// The walker of random_walk.cpp, one thread a walk: the same law, the same words, the same numbers.
#include <cuda_runtime.h>

#include <algorithm>
#include <cstdint>

#include "random_walk.h"

namespace pinclip {
namespace {

constexpr int kThreads = 256;
// Blocks for each multiprocessor: 2,048 resident threads, whose waits for memory hide one another.
constexpr int kBlocks = 8;

struct Words {
  uint32_t back, board, pin, alias;
};

// Philox4x32-10, see philox.h.
__device__ __forceinline__ Words philox4x32(uint32_t c0, uint32_t c1, uint32_t c2, uint32_t c3, uint64_t key) {
  uint32_t k0 = static_cast<uint32_t>(key), k1 = static_cast<uint32_t>(key >> 32);
#pragma unroll
  for (int round = 0; round < 10; ++round) {
    const uint32_t high0 = __umulhi(0xD2511F53u, c0), low0 = 0xD2511F53u * c0;
    const uint32_t high1 = __umulhi(0xCD9E8D57u, c2), low1 = 0xCD9E8D57u * c2;
    c0 = high1 ^ c1 ^ k0;
    c1 = low1;
    c2 = high0 ^ c3 ^ k1;
    c3 = low0;
    k0 += 0x9E3779B9u;
    k1 += 0xBB67AE85u;
  }
  return {c0, c1, c2, c3};
}

// floor(word * count / 2^32) for count < 2^31.
__device__ __forceinline__ int64_t bounded(uint32_t word, int64_t count) {
  return __umulhi(word, static_cast<uint32_t>(count));
}

template <typename Index, bool kWeighted>
__global__ void __launch_bounds__(kThreads)
    walk_kernel(const WalkGraph<Index> graph, const WalkPlan plan, int64_t* __restrict__ visited) {
  const int64_t total = plan.num_starts * plan.walks;
  const int64_t step = static_cast<int64_t>(gridDim.x) * kThreads;
  for (int64_t walk = static_cast<int64_t>(blockIdx.x) * kThreads + threadIdx.x; walk < total; walk += step) {
    const int64_t row = walk / plan.walks, home = plan.starts[row];
    const int64_t number = walk - row * plan.walks + (plan.first_walk ? plan.first_walk[row] : 0);
    int64_t* out = visited + walk * plan.length;
    int64_t hop = 0, at = home;
    if (home >= 0 && graph.pin_indptr[home] < graph.pin_indptr[home + 1]) {
      for (; hop < plan.length; ++hop) {
        const Words words = philox4x32(static_cast<uint32_t>(hop), static_cast<uint32_t>(number),
                                       static_cast<uint32_t>(home), static_cast<uint32_t>(home >> 32),
                                       plan.seed);
        if (words.back < plan.restart) at = home;
        const int64_t begin = graph.pin_indptr[at];
        int64_t edge = begin + bounded(words.board, graph.pin_indptr[at + 1] - begin);
        if constexpr (kWeighted) {
          const int64_t entry = graph.board_alias[edge];
          if (entry < 0) break;
          if (words.alias >= static_cast<uint32_t>(entry)) edge = begin + (entry >> 32);
        }
        const int64_t board = graph.pin_boards[edge];
        const int64_t first = graph.board_indptr[board];
        at = graph.board_pins[first + bounded(words.pin, graph.board_indptr[board + 1] - first)];
        out[hop] = at;
      }
    }
    for (; hop < plan.length; ++hop) out[hop] = -1;
  }
}

}  // namespace

template <typename Index>
const char* random_walk_cuda(const WalkGraph<Index>& graph, const WalkPlan& plan, int64_t* visited,
                             void* stream) {
  const int64_t total = plan.num_starts * plan.walks;
  if (total == 0) return nullptr;
  int device = 0, processors = 0;
  cudaError_t status = cudaGetDevice(&device);
  if (status == cudaSuccess) {
    status = cudaDeviceGetAttribute(&processors, cudaDevAttrMultiProcessorCount, device);
  }
  if (status != cudaSuccess) return cudaGetErrorString(status);
  const int64_t blocks = std::min<int64_t>((total + kThreads - 1) / kThreads, processors * kBlocks);
  const auto kernel = graph.board_alias ? walk_kernel<Index, true> : walk_kernel<Index, false>;
  kernel<<<static_cast<unsigned>(blocks), kThreads, 0, static_cast<cudaStream_t>(stream)>>>(graph, plan,
                                                                                          visited);
  status = cudaGetLastError();
  return status == cudaSuccess ? nullptr : cudaGetErrorString(status);
}

template const char* random_walk_cuda(const WalkGraph<int32_t>&, const WalkPlan&, int64_t*, void*);
template const char* random_walk_cuda(const WalkGraph<int64_t>&, const WalkPlan&, int64_t*, void*);

}  // namespace pinclip
