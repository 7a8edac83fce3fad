// Sums per pin and the heaviest of them: what the miners of neighbors share.
#pragma once

#include <algorithm>
#include <cstdint>
#include <cstring>
#include <limits>
#include <type_traits>
#include <vector>

namespace pinclip {

// Pins up to which sums are kept in a plain array: 512 kB of 32-bit counts stay in the second cache, and need
// neither hashing nor a branch that asks whether a pin is new. That halves the time of counting.
constexpr int64_t kPlain = 1 << 17;

// Sums by pin: a plain array for few pins, else an open-addressed table. Adding in the same order gives the same
// sums to the last bit.
template <typename Index, typename Sum>
class PinSums {
 public:
  // Forgets everything and makes room for `most` different pins of [0, num_pins).
  void reset(int64_t most, int64_t num_pins) {
    plain_ = num_pins <= kPlain;
    if (plain_) {
      for (int64_t i = 0; i < count_; ++i) sums_[used_[i]] = Sum{0};
      sums_.resize(static_cast<size_t>(num_pins));
    } else {
      for (int64_t i = 0; i < count_; ++i) slots_[used_[i]] = Slot{kFree, Sum{0}};
      size_t capacity = 64;
      while (capacity < 2 * static_cast<size_t>(most)) capacity *= 2;
      if (capacity > slots_.size()) slots_.assign(capacity, Slot{kFree, Sum{0}});
      shift_ = 64 - __builtin_ctzll(slots_.size());
    }
    count_ = 0;
    if (static_cast<int64_t>(used_.size()) < most + 1) used_.resize(static_cast<size_t>(most + 1));
  }

  // Adds value > 0 and returns the new sum.
  Sum add(Index pin, Sum value) {
    if (plain_) {
      Sum& sum = sums_[pin];
      used_[count_] = static_cast<uint32_t>(pin);
      count_ += sum == 0;
      return sum += value;
    }
    const size_t mask = slots_.size() - 1;
    size_t slot = static_cast<size_t>((static_cast<uint64_t>(pin) * 0x9E3779B97F4A7C15u) >> shift_);
    while (slots_[slot].pin != pin) {
      if (slots_[slot].pin == kFree) {
        slots_[slot].pin = pin;
        used_[count_++] = static_cast<uint32_t>(slot);
        break;
      }
      slot = (slot + 1) & mask;
    }
    return slots_[slot].sum += value;
  }

  template <typename Visit>
  void for_each(const Visit& visit) const {
    for (int64_t i = 0; i < count_; ++i) {
      const uint32_t at = used_[i];
      plain_ ? visit(static_cast<Index>(at), sums_[at]) : visit(slots_[at].pin, slots_[at].sum);
    }
  }

 private:
  static constexpr Index kFree = -1;
  struct Slot {
    Index pin;
    Sum sum;
  };
  bool plain_ = false;
  std::vector<Sum> sums_;
  std::vector<Slot> slots_;
  std::vector<uint32_t> used_;  // the first count_ are the places of pins with a sum
  int64_t count_ = 0;
  int shift_ = 64;
};

// The heaviest of the pins offered; of equal ones the lower numbers.
template <typename Index>
class TopPins {
 public:
  void reset(int64_t count) {
    count_ = count;
    pins_.clear();
    worst_ = Ranked::last();
  }

  void offer(Index pin, float weight) {
    if (!(weight > 0)) return;
    const Ranked ranked = Ranked::of(pin, weight);
    // Most are worse than the best so far: only what may be among them is kept, and sorted out now and then.
    if (!(ranked < worst_)) return;
    pins_.push_back(ranked);
    if (static_cast<int64_t>(pins_.size()) >= std::max(kSome, 2 * count_)) prune();
  }

  // Writes the best, heaviest first, and fills what is left of `count` with -1 and 0.
  void write(int64_t* pins, float* weights) {
    if (static_cast<int64_t>(pins_.size()) > count_) prune();
    std::sort(pins_.begin(), pins_.end());
    const int64_t found = static_cast<int64_t>(pins_.size());
    for (int64_t k = 0; k < found; ++k) {
      pins[k] = pins_[k].pin();
      weights[k] = pins_[k].weight();
    }
    std::fill(pins + found, pins + count_, -1);
    std::fill(weights + found, weights + count_, 0.0f);
  }

 private:
  static constexpr int64_t kSome = 128;

  void prune() {
    std::nth_element(pins_.begin(), pins_.begin() + (count_ - 1), pins_.end());
    pins_.resize(static_cast<size_t>(count_));
    worst_ = pins_.back();
  }

  // A float above zero orders as its bits do. Where pins have 32 bits, both fit one integer.
  struct Narrow {
    uint64_t key;  // less is better
    static Narrow last() { return {~uint64_t{0}}; }
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
    static Wide last() { return {~uint32_t{0}, std::numeric_limits<int64_t>::max()}; }
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

  int64_t count_ = 0;
  std::vector<Ranked> pins_;
  Ranked worst_ = Ranked::last();
};

}  // namespace pinclip
