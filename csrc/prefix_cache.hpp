// Cached pages of keys and values, found again by what came before them. Knows neither Python nor torch.
//
// A page is one block of a BlockPool and holds `page_size` positions; only full pages are cached, so nothing in the
// cache is ever written again. Pages form a tree: what a page holds depends on all positions before it, so it is known
// by its parent page and its own positions. Pages are the unit of sharing and of eviction, so a node is one page, and
// its index is the block's.
//
// No collisions. The page in which an image begins carries the image's digest, and a first page the digest of its
// namespace; the pages after it inherit both through their parent. Digests and positions are stored and compared in
// full (prefix_key.hpp): a hash only says where to look, and only where a page has several children. Comparing a page
// of 16 words reads one cache line, which a chain of cryptographic digests, equally safe, could not match in speed; and
// it assumes nothing of any hash function beyond SHA-256 of images and names. A page inside an image goes on counting
// where its parent ends, so that its positions need neither be kept nor compared.
//
// Ownership. The tree holds one reference to each cached page and every sequence its own, all counted by the pool. A
// sequence's pages are taken by BlockPool::allocate, match() or fork(), and given back by release(), never by the
// pool's own retain and release once they may be cached.
//
// Least recently used, exactly, in O(1) a page. A page is busy while a sequence holds it or a child of it is busy, else
// idle. Idle pages are in one list, in the order in which they became idle. A page becomes idle after all its children,
// so it is newer than they are, and the oldest page of all has no children left: nothing is ever searched. (Freeing it
// costs the pool O(log runs).)
//
// Thread-safe: every call holds the pool's mutex, so tree and counts change as one.
#pragma once

#include <cstddef>
#include <cstdint>
#include <memory>
#include <vector>

#include "block_pool.hpp"
#include "huge_pages.hpp"
#include "prefix_key.hpp"

namespace vitalrt {

using Keys = std::vector<const PrefixKey*>;
using Pages = std::vector<std::int32_t>;
using PagesView = Span<std::int32_t>;

struct Trunk {
  PagesView pages;
  std::int64_t num_tokens;
};

// copy_from, copy_to: the page whose contents the caller must copy; -1 where the trunk ends with a full page.
struct Branch {
  Pages pages;
  std::int32_t copy_from;
  std::int32_t copy_to;
};

// Counts since construction, except the last two. Pages queried and not hit are misses.
struct PrefixCacheStatistics {
  std::int64_t requests;
  std::int64_t pages_queried;
  std::int64_t pages_hit;
  std::int64_t tokens_hit;
  std::int64_t pages_inserted;
  std::int64_t pages_duplicate;  // offered while an equal page was cached already
  std::int64_t pages_evicted;
  std::int64_t pages_cached;
  std::int64_t pages_idle;  // cached and free to be evicted
};

// In every call a fault in one request is the whole call's: std::invalid_argument, and nothing has changed.
class PrefixCache {
 public:
  // The pool must outlive the cache. Throws std::invalid_argument unless page_size >= 1.
  PrefixCache(BlockPool& pool, std::int32_t page_size);
  ~PrefixCache();
  PrefixCache(const PrefixCache&) = delete;
  PrefixCache& operator=(const PrefixCache&) = delete;

  // For each request the longest run of cached pages from its first position on, each with a reference more, which is
  // the sequence's until it is released. Never up to the last position: it must be computed, for a sequence goes on
  // from its hidden state.
  std::vector<Pages> match(const Keys& batch);

  // Caches each request's full pages; the sequence keeps its references. pages[r]: at least one per full page, held by
  // the sequence, in order of position. Where an equal page is cached already, the sequence's own stays uncached, and
  // pages after it join the cached one. Returns the number of pages now cached that were not.
  std::int64_t insert(const Keys& batch, const std::vector<PagesView>& pages);

  // Drops one reference of each page. Cached pages stay in the cache. Returns the number of pages that became free.
  std::int64_t release(const std::vector<PagesView>& batch);

  // Lets a second sequence go on from a trunk's first num_tokens tokens: it shares the full pages and has a page of its
  // own for the partial one, whose contents the caller copies. Throws OutOfBlocks, changing nothing.
  std::vector<Branch> fork(const std::vector<Trunk>& batch);

  // Frees up to `count` idle pages, least recently used first. Returns how many.
  std::int64_t evict(std::int64_t count);

  PrefixCacheStatistics statistics() const;

  // Recomputes everything that is kept in two places; throws std::logic_error where they disagree.
  void check_integrity() const;

 private:
  static constexpr std::int32_t kNone = -1;
  static constexpr std::int32_t kNotCached = -2;  // as a parent

  // 32 bytes, because matching is a walk through memory.
  struct Page {
    std::int32_t parent = kNotCached;
    std::int32_t first_child = kNone;      // one of the children, or none of them
    std::uint32_t num_others : 31;         // of the children, those that are in the table
    std::uint32_t is_inside_image : 1;     // then its positions are not kept
    std::int32_t num_busy_children = 0;
    std::int32_t older = kNone;
    std::int32_t newer = kNone;
    std::unique_ptr<std::uint8_t[]> digests;  // of the page's own key, if it has any

    Page() : num_others(0), is_inside_image(0) {}
  };

  // An open-addressing hash table of first pages and of all but the first of a page's children; at most half full.
  struct Slot {
    std::uint32_t place;  // where its search begins, before the remainder
    std::int32_t page;
  };

  // What insert() adds for one request.
  struct Chain {
    const std::int32_t* pages;
    std::size_t num_pages;
    std::int32_t parent;
  };

  std::size_t num_full_pages(const PrefixKey& key) const { return key.positions().size / page_size_; }
  std::size_t num_pages_queried(const PrefixKey& key) const {
    return key.positions().size == 0 ? 0 : (key.positions().size - 1) / page_size_;
  }
  PageKey key_of(std::int32_t page) const;

  void prefetch(const Keys& batch) const;
  std::uint32_t place_of(std::int32_t parent, const PageKey& key) const;
  bool is_page(std::int32_t page, std::int32_t parent, const PageKey& key) const;
  void begin_walks(const Keys& batch, std::vector<Pages>& found, std::vector<std::size_t>& num_found) const;
  std::size_t walk(const PrefixKey& key, std::size_t num_found, std::size_t num_pages, std::int32_t* found) const;
  std::size_t follow_image(std::size_t index, std::size_t end, std::int32_t* found) const;
  std::size_t follow_words(const PrefixKey& key, std::size_t index, std::size_t end, std::int32_t* found) const;
  bool holds(std::int32_t page, const std::uint32_t* positions) const;
  std::int32_t find(std::int32_t parent, const PageKey& key) const;
  std::int32_t search(std::int32_t parent, const PageKey& key) const;

  void check_offered(const Keys& batch, const std::vector<PagesView>& pages) const;
  std::int64_t count_duplicates(const PagesView& offered, const Pages& found, std::size_t num_found) const;
  void add_chain(Chain& chain, const PrefixKey& key, std::size_t start);
  void add(std::int32_t page, std::int32_t parent, const PageKey& key);
  void copy_positions(std::int32_t page, const std::uint32_t* positions);
  void put(std::int32_t page, std::int32_t parent, bool is_inside_image);
  void remove(std::int32_t page);
  void add_slot(std::int32_t page, std::uint32_t place);
  void erase_slot(std::int32_t page);

  void hold(std::int32_t page);
  std::int32_t let_go(std::int32_t page);
  void add_busy_child(std::int32_t page);
  void drop_busy_child(std::int32_t page);
  void list_newest(std::int32_t page);
  void unlist(std::int32_t page);

  void check_held(std::int32_t page) const;
  void check_uncached(std::int32_t page) const;
  void check_releasable(const std::vector<PagesView>& batch);
  void check_tree() const;
  void check_table() const;
  void check_list() const;

  bool is_cached(std::int32_t page) const { return at(page).parent != kNotCached; }
  // Of a cached page: only the tree holds it.
  bool is_idle(std::int32_t page) const { return pool_.count_of(page) == 1 && at(page).num_busy_children == 0; }
  Page& at(std::int32_t page) { return pages_[static_cast<std::size_t>(page)]; }
  const Page& at(std::int32_t page) const { return pages_[static_cast<std::size_t>(page)]; }
  std::uint32_t* positions_of(std::int32_t page) { return &positions_[static_cast<std::size_t>(page) * page_size_]; }
  const std::uint32_t* positions_of(std::int32_t page) const {
    return &positions_[static_cast<std::size_t>(page) * page_size_];
  }

  BlockPool& pool_;
  const std::size_t page_size_;
  const std::vector<std::uint32_t> secrets_;  // one per position of a page
  const std::int32_t end_;                      // pages_[end_] closes the ring of idle pages
  std::vector<Page, HugePages<Page>> pages_;    // by block
  // [block, page_size]: one cache line a page, at 16; untouched, so not yet memory, until used.
  std::vector<std::uint32_t, HugePages<std::uint32_t>> positions_;
  std::vector<Slot, HugePages<Slot>> table_;
  PrefixCacheStatistics statistics_{};
};

}  // namespace vitalrt
