// Threads for work that is cut into numbered parts.
#pragma once

#include <algorithm>
#include <atomic>
#include <cstdint>
#include <exception>
#include <mutex>
#include <system_error>
#include <thread>
#include <vector>

namespace pinclip {

// Calls work(part) once for each part in [0, parts) on up to `threads` threads, this one among them; each
// takes the next part when it is done with one. What a part throws is thrown again here, after all have
// ended.
template <typename Work>
void in_parallel(int64_t parts, int threads, const Work& work) {
  std::atomic<int64_t> next{0};
  std::exception_ptr failure;
  std::mutex failing;
  const auto take = [&] {
    try {
      for (int64_t part = next++; part < parts; part = next++) work(part);
    } catch (...) {
      next = parts;
      const std::lock_guard<std::mutex> lock(failing);
      if (!failure) failure = std::current_exception();
    }
  };
  std::vector<std::thread> helpers;
  const int64_t useful = std::min<int64_t>(std::max(threads, 1), parts);
  helpers.reserve(static_cast<size_t>(std::max<int64_t>(useful, 1)));
  try {
    for (int64_t i = 1; i < useful; ++i) helpers.emplace_back(take);
  } catch (const std::system_error&) {
    // No more threads to be had: those that there are do it all.
  }
  take();
  for (auto& helper : helpers) helper.join();
  if (failure) std::rethrow_exception(failure);
}

}  // namespace pinclip
