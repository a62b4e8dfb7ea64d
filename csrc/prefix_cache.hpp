// Cached pages of keys and values, found again by what came before them. Knows neither Python nor torch.
//
// A page is one block of a BlockPool and holds `page_size` positions; only full pages are cached, so nothing in the
// cache is ever written again. Pages form a tree: what a page holds depends on all positions before it, so it is known
// by its parent page and its own positions. Pages are the unit of sharing and of eviction, so a node is one page, and
// its index is the block's.
//
// No collisions. A position is a word of 32 bits: what kind it is, and which one of that kind (see Kind). The page in
// which an image begins also carries the image's 256-bit digest, and a first page the 256-bit digest of its namespace;
// the pages after it inherit both through their parent. All of it is stored and compared in full: a hash only says
// where to look, and only where a page has several children. Comparing a page of 16 words reads one cache line, which a
// chain of cryptographic digests, equally safe, could not match in speed; and it assumes nothing of any hash function
// beyond SHA-256 of images and names.
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
#include <new>
#include <unordered_map>
#include <vector>

#include "block_pool.hpp"

namespace vitalrt {

template <typename T>
struct Span {
  const T* data;
  std::size_t size;

  const T& operator[](std::size_t index) const { return data[index]; }
  const T* begin() const { return data; }
  const T* end() const { return data + size; }
};

// The two highest bits of a position word; the other 30 say which one.
enum class Kind : std::uint32_t {
  kText = 0,    // token id
  kImage = 1,   // index within its image; 0 begins the next image
  kLatent = 2,  // index of the latent step: same prefix, same index, same vector, whatever the request's K
};

constexpr std::size_t kDigestBytes = 32;

// What a sequence holds, position by position. digests: the namespace's, then one per image in order, 32 bytes each.
struct PrefixKey {
  Span<std::uint8_t> digests;
  Span<std::uint32_t> positions;
};

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
  std::vector<Pages> match(const std::vector<PrefixKey>& batch);

  // Caches each request's full pages; the sequence keeps its references. pages[r]: at least one per full page, held by
  // the sequence, in order of position. Where an equal page is cached already, the sequence's own stays uncached, and
  // pages after it join the cached one. Returns the number of pages now cached that were not.
  std::int64_t insert(const std::vector<PrefixKey>& batch, const std::vector<PagesView>& pages);

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

  // Small, because matching is a walk through memory: pages of one sequence mostly lie side by side.
  struct Page {
    std::int32_t parent = kNotCached;
    std::int32_t first_child = kNone;  // one of the children, or none of them
    std::int32_t num_others = 0;       // of the children, those that are in the table
    std::int32_t users = 0;            // sequences that hold it, plus busy children; 0 = idle
    std::int32_t older = kNone;
    std::int32_t newer = kNone;
    bool has_digests = false;
  };

  // A page as it is looked for: where its positions begin, and where its digests do if it has any.
  struct PageKey {
    const std::uint32_t* positions;
    const std::uint8_t* digests;
  };

  // The positions of one page are one cache line too, at 16 a page.
  struct AlignedDelete {
    void operator()(std::uint32_t* positions) const { ::operator delete[](positions, std::align_val_t(64)); }
  };

  // An open-addressing hash table of first pages and of all but the first of a page's children; at most half full.
  struct Slot {
    std::uint32_t place;  // where its search begins, before the remainder
    std::int32_t page;
  };

  static PageKey first_page(const PrefixKey& key) { return {key.positions.begin(), key.digests.begin()}; }
  PageKey after(const PageKey& key, std::int32_t page) const;
  PageKey key_of(std::int32_t page) const;
  std::size_t num_digest_bytes(std::int32_t parent, const PageKey& key) const;
  std::size_t num_full_pages(const PrefixKey& key) const { return key.positions.size / page_size_; }
  std::size_t num_pages_queried(const PrefixKey& key) const {
    return key.positions.size == 0 ? 0 : (key.positions.size - 1) / page_size_;
  }
  void check_keys(const std::vector<PrefixKey>& batch) const;

  std::uint32_t place_of(std::int32_t parent, const PageKey& key) const;
  bool is_page(std::int32_t page, std::int32_t parent, const PageKey& key) const;
  std::int32_t find(std::int32_t parent, const PageKey& key) const;
  std::int32_t search(std::int32_t parent, const PageKey& key) const;
  void add(std::int32_t page, std::int32_t parent, const PageKey& key);
  void remove(std::int32_t page);
  void add_slot(std::int32_t page);
  void erase_slot(std::int32_t page);

  void hold(std::int32_t page);
  std::int32_t let_go(std::int32_t page);
  void add_user(std::int32_t page);
  void drop_user(std::int32_t page);
  void list_newest(std::int32_t page);
  void unlist(std::int32_t page);

  void check_held(std::int32_t page) const;
  void check_releasable(const std::vector<PagesView>& batch);
  void check_tree() const;
  void check_table() const;
  void check_list() const;

  bool is_cached(std::int32_t page) const { return at(page).parent != kNotCached; }
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
  std::vector<Page> pages_;                     // by block
  // [block, page_size]; untouched, so not yet memory, until used
  std::unique_ptr<std::uint32_t[], AlignedDelete> positions_;
  std::unordered_map<std::int32_t, std::vector<std::uint8_t>> digests_;  // of pages that have any
  std::vector<Slot> table_;
  PrefixCacheStatistics statistics_{};
};

}  // namespace vitalrt
