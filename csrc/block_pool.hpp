// A fixed pool of KV-cache blocks (pages) with reference counts. Knows neither Python nor torch.
//
// Thread-safe: every call holds the pool's mutex, which a prefix cache over the pool shares.
#pragma once

#include <cstdint>
#include <map>
#include <mutex>
#include <stdexcept>
#include <vector>

#include "huge_pages.hpp"

namespace vitalrt {

// Thrown by BlockPool::allocate when fewer blocks are free than were asked for.
class OutOfBlocks : public std::runtime_error {
 public:
  OutOfBlocks(std::int32_t requested, std::int32_t free);

  std::int32_t requested;
  std::int32_t free;
};

class BlockPool {
 public:
  // Blocks 0 .. num_blocks - 1, all free. Throws std::invalid_argument unless num_blocks >= 1.
  explicit BlockPool(std::int32_t num_blocks);

  // `count` distinct free blocks in ascending order, each now with reference count 1.
  //
  // One contiguous run if any is long enough (the shortest such run, the lowest of equals: long runs stay whole for
  // long requests), otherwise the lowest free blocks. All or nothing: throws OutOfBlocks when fewer than `count` are
  // free, std::invalid_argument when `count` is negative.
  std::vector<std::int32_t> allocate(std::int32_t count);

  // One more reference to each block. Throws std::invalid_argument, changing nothing, when a block is unknown, free or
  // listed twice.
  void retain(const std::vector<std::int32_t>& blocks);

  // One reference less to each block; a block without references becomes free. Returns the number of blocks freed.
  // Throws as retain does, changing nothing.
  std::int32_t release(const std::vector<std::int32_t>& blocks);

  std::int32_t num_blocks() const { return static_cast<std::int32_t>(ref_counts_.size()); }
  std::int32_t num_free() const;

  // 0 for a free block. Throws std::invalid_argument when the block is unknown.
  std::int32_t ref_count(std::int32_t block) const;

  // Length of the longest run of free blocks; 0 when none is free.
  std::int32_t largest_run() const;

  // Recomputes the free runs from the reference counts; throws std::logic_error when the two disagree.
  void check_integrity() const;

 private:
  friend class PrefixCache;  // changes counts and its own tree as one, under mutex_

  using Runs = std::map<std::int32_t, std::int32_t>;

  // From here on, the caller holds mutex_.
  std::vector<std::int32_t> take(std::int32_t count);
  std::int32_t& count_of(std::int32_t block) { return ref_counts_[static_cast<std::size_t>(block)]; }
  void check_known(std::int32_t block) const;
  void check_runs() const;
  void check_held(const std::vector<std::int32_t>& blocks) const;
  void take_front(Runs::iterator run, std::int32_t count, std::vector<std::int32_t>& taken);
  void give_back(std::int32_t block);

  mutable std::mutex mutex_;
  std::vector<std::int32_t, HugePages<std::int32_t>> ref_counts_;  // by block; 0 = free
  Runs free_runs_;  // first block -> length; maximal, so no two runs touch
  std::int32_t num_free_;
};

}  // namespace vitalrt
