#include "block_pool.hpp"

#include <algorithm>
#include <iterator>
#include <string>

namespace vitalrt {

OutOfBlocks::OutOfBlocks(std::int32_t requested, std::int32_t free)
    : std::runtime_error("out of cache blocks: " + std::to_string(requested) + " requested, " + std::to_string(free) +
                         " free"),
      requested(requested),
      free(free) {}

BlockPool::BlockPool(std::int32_t num_blocks) {
  if (num_blocks < 1) {
    throw std::invalid_argument("num_blocks: expected at least 1, got " + std::to_string(num_blocks));
  }
  ref_counts_.assign(static_cast<std::size_t>(num_blocks), 0);
  free_runs_.emplace(0, num_blocks);
  num_free_ = num_blocks;
}

std::vector<std::int32_t> BlockPool::allocate(std::int32_t count) {
  const std::lock_guard lock(mutex_);
  return take(count);
}

std::vector<std::int32_t> BlockPool::take(std::int32_t count) {
  if (count < 0) {
    throw std::invalid_argument("count: expected at least 0, got " + std::to_string(count));
  }
  if (count > num_free_) {
    throw OutOfBlocks(count, num_free_);
  }
  std::vector<std::int32_t> taken;
  if (count == 0) {
    return taken;
  }
  taken.reserve(static_cast<std::size_t>(count));

  auto best = free_runs_.end();
  for (auto run = free_runs_.begin(); run != free_runs_.end(); ++run) {
    if (run->second >= count && (best == free_runs_.end() || run->second < best->second)) {
      best = run;
    }
  }
  if (best != free_runs_.end()) {
    take_front(best, count, taken);
    return taken;
  }
  for (std::int32_t missing = count; missing > 0;) {
    const auto lowest = free_runs_.begin();
    const std::int32_t piece = std::min(missing, lowest->second);
    take_front(lowest, piece, taken);
    missing -= piece;
  }
  return taken;
}

void BlockPool::retain(const std::vector<std::int32_t>& blocks) {
  const std::lock_guard lock(mutex_);
  check_held(blocks);
  for (const std::int32_t block : blocks) {
    ++count_of(block);
  }
}

std::int32_t BlockPool::release(const std::vector<std::int32_t>& blocks) {
  const std::lock_guard lock(mutex_);
  check_held(blocks);
  const std::int32_t free_before = num_free_;
  for (const std::int32_t block : blocks) {
    if (--count_of(block) == 0) {
      give_back(block);
    }
  }
  return num_free_ - free_before;
}

std::int32_t BlockPool::num_free() const {
  const std::lock_guard lock(mutex_);
  return num_free_;
}

std::int32_t BlockPool::ref_count(std::int32_t block) const {
  const std::lock_guard lock(mutex_);
  check_known(block);
  return ref_counts_[static_cast<std::size_t>(block)];
}

void BlockPool::check_known(std::int32_t block) const {
  if (block < 0 || block >= num_blocks()) {
    throw std::invalid_argument("block: expected 0 to " + std::to_string(num_blocks() - 1) + ", got " +
                                std::to_string(block));
  }
}

std::int32_t BlockPool::largest_run() const {
  const std::lock_guard lock(mutex_);
  std::int32_t longest = 0;
  for (const auto& [start, length] : free_runs_) {
    longest = std::max(longest, length);
  }
  return longest;
}

void BlockPool::check_integrity() const {
  const std::lock_guard lock(mutex_);
  check_runs();
}

void BlockPool::check_runs() const {
  Runs runs;
  std::int32_t num_free = 0;
  for (std::int32_t block = 0; block < num_blocks(); ++block) {
    const std::int32_t count = ref_counts_[static_cast<std::size_t>(block)];
    if (count < 0) {
      throw std::logic_error("block " + std::to_string(block) + " has a negative reference count");
    }
    if (count > 0) {
      continue;
    }
    ++num_free;
    if (!runs.empty() && std::prev(runs.end())->first + std::prev(runs.end())->second == block) {
      ++std::prev(runs.end())->second;
    } else {
      runs.emplace_hint(runs.end(), block, 1);
    }
  }
  if (num_free != num_free_) {
    throw std::logic_error("num_free is " + std::to_string(num_free_) + ", but " + std::to_string(num_free) +
                           " blocks have no reference");
  }
  if (runs != free_runs_) {
    throw std::logic_error("free runs and reference counts disagree");
  }
}

void BlockPool::check_held(const std::vector<std::int32_t>& blocks) const {
  for (const std::int32_t block : blocks) {
    check_known(block);
    if (ref_counts_[static_cast<std::size_t>(block)] == 0) {
      throw std::invalid_argument("blocks: expected blocks in use, got free block " + std::to_string(block));
    }
  }
  std::vector<std::int32_t> sorted = blocks;
  std::sort(sorted.begin(), sorted.end());
  const auto twin = std::adjacent_find(sorted.begin(), sorted.end());
  if (twin != sorted.end()) {
    throw std::invalid_argument("blocks: expected each block once, got block " + std::to_string(*twin) + " twice");
  }
}

void BlockPool::take_front(Runs::iterator run, std::int32_t count, std::vector<std::int32_t>& taken) {
  const auto [start, length] = *run;
  for (std::int32_t block = start; block < start + count; ++block) {
    count_of(block) = 1;
    taken.push_back(block);
  }
  const auto next = free_runs_.erase(run);
  if (count < length) {
    free_runs_.emplace_hint(next, start + count, length - count);
  }
  num_free_ -= count;
}

void BlockPool::give_back(std::int32_t block) {
  ++num_free_;
  std::int32_t length = 1;
  auto next = free_runs_.upper_bound(block);
  if (next != free_runs_.end() && next->first == block + 1) {
    length += next->second;
    next = free_runs_.erase(next);
  }
  if (next != free_runs_.begin()) {
    const auto previous = std::prev(next);
    if (previous->first + previous->second == block) {
      previous->second += length;
      return;
    }
  }
  free_runs_.emplace_hint(next, block, length);
}

}  // namespace vitalrt
