// PrefixCache::check_integrity, for tests.
#include <cstdint>
#include <mutex>
#include <stdexcept>
#include <string>
#include <vector>

#include "prefix_cache.hpp"

namespace vitalrt {
namespace {

std::size_t to_size(std::int64_t value) { return static_cast<std::size_t>(value); }

void fail(const std::string& what) { throw std::logic_error("prefix cache: " + what); }

void require_integrity(bool holds, std::int32_t page, const char* what) {
  if (!holds) {
    fail("page " + std::to_string(page) + ": " + what);
  }
}

}  // namespace

void PrefixCache::check_integrity() const {
  const std::lock_guard lock(pool_.mutex_);
  pool_.check_runs();
  check_tree();
  check_table();
  check_list();
}

void PrefixCache::check_tree() const {
  std::vector<std::int32_t> num_busy_children(pages_.size(), 0);
  std::vector<std::int32_t> num_others(pages_.size(), 0);
  std::int64_t num_cached = 0;
  for (std::int32_t page = 0; page < end_; ++page) {
    if (!is_cached(page)) {
      continue;
    }
    ++num_cached;
    const std::int32_t parent = at(page).parent;
    require_integrity(parent == kNone || is_cached(parent), page, "its parent is not cached");
    if (!is_idle(page) && parent != kNone) {
      ++num_busy_children[to_size(parent)];
    }
    if (parent != kNone && at(parent).first_child != page) {
      ++num_others[to_size(parent)];
    }
    const std::int32_t child = at(page).first_child;
    require_integrity(child == kNone || at(child).parent == page, page, "its first child is another's");
    require_integrity((at(page).digests != nullptr) == (key_of(page).num_digest_bytes > 0), page,
                      "its digests are lost");
    require_integrity(find(parent, key_of(page)) == page, page, "it is not found by its key");
  }
  for (std::int32_t page = 0; page < end_; ++page) {
    require_integrity(!is_cached(page) || pool_.count_of(page) > 0, page, "it is cached and free");
    require_integrity(at(page).num_busy_children == num_busy_children[to_size(page)], page,
                      "its busy children are not counted right");
    require_integrity(static_cast<std::int32_t>(at(page).num_others) == num_others[to_size(page)], page,
                      "its children are not counted right");
  }
  if (num_cached != statistics_.pages_cached) {
    fail(std::to_string(num_cached) + " pages are cached, counted were " + std::to_string(statistics_.pages_cached));
  }
}

void PrefixCache::check_table() const {
  std::int64_t num_reached = 0;
  for (const Page& page : pages_) {
    num_reached += page.first_child != kNone;
  }
  for (const Slot& slot : table_) {
    if (slot.page != kNone) {
      ++num_reached;
      require_integrity(is_cached(slot.page), slot.page, "it is in the table and not cached");
    }
  }
  if (num_reached != statistics_.pages_cached) {
    fail(std::to_string(num_reached) + " pages are reached, cached are " + std::to_string(statistics_.pages_cached));
  }
}

void PrefixCache::check_list() const {
  std::vector<bool> is_older(pages_.size(), false);
  std::int64_t num_idle = 0;
  for (std::int32_t page = at(end_).newer; page != end_; page = at(page).newer) {
    require_integrity(is_cached(page) && is_idle(page), page, "it is listed as idle and is not");
    require_integrity(at(at(page).newer).older == page, page, "the list does not lead back to it");
    require_integrity(at(page).parent == kNone || !is_older[to_size(at(page).parent)], page,
                      "it is newer than its parent");
    is_older[to_size(page)] = true;
    ++num_idle;
  }
  for (std::int32_t page = 0; page < end_; ++page) {
    require_integrity(!is_cached(page) || !is_idle(page) || is_older[to_size(page)], page,
                      "it is idle and not listed");
  }
  if (num_idle != statistics_.pages_idle) {
    fail(std::to_string(num_idle) + " idle pages, counted were " + std::to_string(statistics_.pages_idle));
  }
}

}  // namespace vitalrt
