// Sums per pin and the heaviest of them: what the miners of neighbors share.
#pragma once

#include <algorithm>
#include <cstdint>
#include <cstring>
#include <limits>
#include <type_traits>
#include <vector>

namespace pinclip {

// An open-addressed table of pin -> Sum. Adding in the same order gives the same sums to the last bit.
template <typename Index, typename Sum>
class PinSums {
 public:
  // Forgets everything and makes room for `pins` different pins.
  void reset(int64_t pins) {
    size_t capacity = 64;
    while (capacity < 2 * static_cast<size_t>(pins)) capacity *= 2;
    if (capacity > slots_.size()) {
      slots_.assign(capacity, Slot{kFree, Sum{0}});
    } else {
      for (const size_t slot : used_) slots_[slot] = Slot{kFree, Sum{0}};
    }
    used_.clear();
    used_.reserve(static_cast<size_t>(pins));
    shift_ = 64 - __builtin_ctzll(slots_.size());
  }

  // Returns the new sum.
  Sum add(Index pin, Sum value) {
    const size_t mask = slots_.size() - 1;
    size_t slot = static_cast<size_t>((static_cast<uint64_t>(pin) * 0x9E3779B97F4A7C15u) >> shift_);
    while (slots_[slot].pin != pin) {
      if (slots_[slot].pin == kFree) {
        slots_[slot].pin = pin;
        used_.push_back(static_cast<uint32_t>(slot));
        break;
      }
      slot = (slot + 1) & mask;
    }
    return slots_[slot].sum += value;
  }

  template <typename Visit>
  void for_each(const Visit& visit) const {
    for (const size_t slot : used_) visit(slots_[slot].pin, slots_[slot].sum);
  }

 private:
  static constexpr Index kFree = -1;
  struct Slot {
    Index pin;
    Sum sum;
  };
  std::vector<Slot> slots_;
  std::vector<uint32_t> used_;
  int shift_ = 64;
};

// The heaviest of the pins offered; of equal ones the lower numbers.
template <typename Index>
class TopPins {
 public:
  void clear() { pins_.clear(); }

  void offer(Index pin, float weight) {
    if (weight > 0) pins_.push_back(Ranked::of(pin, weight));
  }

  // Writes up to `count` of them, heaviest first, and fills what is left with -1 and 0.
  void write(int64_t count, int64_t* pins, float* weights) {
    const int64_t found = std::min<int64_t>(count, static_cast<int64_t>(pins_.size()));
    if (found < static_cast<int64_t>(pins_.size())) {
      std::nth_element(pins_.begin(), pins_.begin() + found, pins_.end());
    }
    std::sort(pins_.begin(), pins_.begin() + found);
    for (int64_t k = 0; k < found; ++k) {
      pins[k] = pins_[k].pin();
      weights[k] = pins_[k].weight();
    }
    std::fill(pins + found, pins + count, -1);
    std::fill(weights + found, weights + count, 0.0f);
  }

 private:
  // A float above zero orders as its bits do. Where pins have 32 bits, both fit one integer.
  struct Narrow {
    uint64_t key;  // less is better
    static Narrow of(int64_t pin, float weight) {
      return {static_cast<uint64_t>(~bits(weight)) << 32 | static_cast<uint64_t>(pin)};
    }
    bool operator<(const Narrow& other) const { return key < other.key; }
    int64_t pin() const { return static_cast<int64_t>(key & 0xFFFFFFFFu); }
    float weight() const { return unbits(~static_cast<uint32_t>(key >> 32)); }
  };
  struct Wide {
    uint32_t rank;
    int64_t number;
    static Wide of(int64_t pin, float weight) { return {~bits(weight), pin}; }
    bool operator<(const Wide& other) const {
      return rank != other.rank ? rank < other.rank : number < other.number;
    }
    int64_t pin() const { return number; }
    float weight() const { return unbits(~rank); }
  };
  using Ranked = std::conditional_t<sizeof(Index) == 4, Narrow, Wide>;

  static uint32_t bits(float value) {
    uint32_t word;
    std::memcpy(&word, &value, sizeof word);
    return word;
  }
  static float unbits(uint32_t word) {
    float value;
    std::memcpy(&value, &word, sizeof value);
    return value;
  }

  std::vector<Ranked> pins_;
};

}  // namespace pinclip
