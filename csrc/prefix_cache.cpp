#include "prefix_cache.hpp"

#include <algorithm>
#include <cstring>
#include <functional>
#include <random>
#include <stdexcept>
#include <string>
#include <utility>

// How much of a page's hash says where to look for it. Fuzzing turns it down, so that all pages collide.
#ifndef VITALRT_HASH_BITS
#define VITALRT_HASH_BITS 32
#endif

namespace vitalrt {
namespace {

using std::size_t;

constexpr unsigned kKindShift = 30;
constexpr std::uint32_t kImageBegins = static_cast<std::uint32_t>(Kind::kImage) << kKindShift;
constexpr std::uint32_t kFirstUnknown = (static_cast<std::uint32_t>(Kind::kLatent) + 1) << kKindShift;

// Requests choose their own tokens: with secrets, they cannot choose where pages land in the table.
std::vector<std::uint32_t> random_secrets(std::int32_t count) {
  if (count < 1) {
    throw std::invalid_argument("page_size: expected at least 1, got " + std::to_string(count));
  }
  std::random_device device;
  std::vector<std::uint32_t> secrets(static_cast<size_t>(count));
  std::generate(secrets.begin(), secrets.end(), std::ref(device));
  return secrets;
}

// All 128 bits of the product, folded.
std::uint64_t mix(std::uint64_t a, std::uint64_t b) {
  __extension__ using Wide = unsigned __int128;
  const Wide product = static_cast<Wide>(a) * b;
  return static_cast<std::uint64_t>(product) ^ static_cast<std::uint64_t>(product >> 64);
}

size_t to_size(std::int64_t value) { return static_cast<size_t>(value); }

// Images that begin here. Counted in 32 bits, as wide as a position, so that the compiler takes several at a time.
size_t count_images(const std::uint32_t* positions, size_t num_positions) {
  std::uint32_t count = 0;
  for (size_t index = 0; index < num_positions; ++index) {
    count += positions[index] == kImageBegins ? 1u : 0u;
  }
  return count;
}

size_t table_size(std::int32_t num_blocks) {
  size_t size = 2;
  while (size < 2 * to_size(num_blocks)) {
    size *= 2;
  }
  return size;
}

void fail(const std::string& what) { throw std::logic_error("prefix cache: " + what); }

void require_integrity(bool holds, std::int32_t page, const char* what) {
  if (!holds) {
    fail("page " + std::to_string(page) + ": " + what);
  }
}

}  // namespace

PrefixCache::PrefixCache(BlockPool& pool, std::int32_t page_size)
    : pool_(pool),
      page_size_(to_size(page_size)),
      secrets_(random_secrets(page_size)),
      end_(pool.num_blocks()) {
  pages_.resize(to_size(end_) + 1);
  at(end_).older = at(end_).newer = end_;
  positions_.reset(new (std::align_val_t(64)) std::uint32_t[to_size(end_) * page_size_]);
  table_.assign(table_size(end_), Slot{0, kNone});
}

PrefixCache::~PrefixCache() {
  const std::lock_guard lock(pool_.mutex_);
  for (std::int32_t page = 0; page < end_; ++page) {
    if (is_cached(page) && --pool_.count_of(page) == 0) {
      pool_.give_back(page);
    }
  }
}

std::vector<Pages> PrefixCache::match(const std::vector<PrefixKey>& batch) {
  check_keys(batch);
  std::vector<Pages> matched(batch.size());
  for (size_t request = 0; request < batch.size(); ++request) {
    matched[request].reserve(num_pages_queried(batch[request]));  // nothing after this can throw
  }
  const std::lock_guard lock(pool_.mutex_);
  for (size_t request = 0; request < batch.size(); ++request) {
    const size_t num_pages = num_pages_queried(batch[request]);
    PageKey key = first_page(batch[request]);
    std::int32_t page = kNone;
    for (size_t index = 0; index < num_pages; ++index) {
      page = find(page, key);
      if (page == kNone) {
        break;
      }
      matched[request].push_back(page);
      hold(page);
      key = after(key, page);
    }
    statistics_.pages_queried += static_cast<std::int64_t>(num_pages);
    statistics_.pages_hit += static_cast<std::int64_t>(matched[request].size());
  }
  statistics_.requests += static_cast<std::int64_t>(batch.size());
  return matched;
}

std::int64_t PrefixCache::insert(const std::vector<PrefixKey>& batch, const std::vector<PagesView>& pages) {
  if (pages.size() != batch.size()) {
    throw std::invalid_argument("pages: expected one list per request, got " + std::to_string(pages.size()) + " for " +
                                std::to_string(batch.size()));
  }
  check_keys(batch);
  Pages added;
  std::int64_t num_duplicate = 0;
  const std::lock_guard lock(pool_.mutex_);
  size_t num_offered = 0;
  for (size_t request = 0; request < batch.size(); ++request) {
    const size_t num_pages = num_full_pages(batch[request]);
    if (pages[request].size < num_pages) {
      throw std::invalid_argument("pages: expected " + std::to_string(num_pages) + " for request " +
                                  std::to_string(request) + ", got " + std::to_string(pages[request].size));
    }
    for (size_t index = 0; index < num_pages; ++index) {
      check_held(pages[request][index]);
    }
    num_offered += num_pages;
  }
  added.reserve(num_offered);
  try {
    for (size_t request = 0; request < batch.size(); ++request) {
      PageKey key = first_page(batch[request]);
      std::int32_t parent = kNone;
      for (size_t index = 0; index < num_full_pages(batch[request]); ++index) {
        const std::int32_t offered = pages[request][index];
        const std::int32_t cached = find(parent, key);
        if (is_cached(offered) && offered != cached) {
          throw std::invalid_argument("pages: page " + std::to_string(offered) + " is cached with other contents");
        }
        if (cached == kNone) {
          add(offered, parent, key);
          added.push_back(offered);
        } else if (cached != offered) {
          ++num_duplicate;
        }
        parent = cached == kNone ? offered : cached;
        key = after(key, parent);
      }
    }
  } catch (...) {  // one page offered for two places
    std::for_each(added.rbegin(), added.rend(), [this](std::int32_t page) { remove(page); });
    throw;
  }
  for (const std::int32_t page : added) {  // parents before children
    at(page).users = pool_.count_of(page) - 1;
    add_user(at(page).parent);
  }
  statistics_.pages_inserted += static_cast<std::int64_t>(added.size());
  statistics_.pages_duplicate += num_duplicate;
  return static_cast<std::int64_t>(added.size());
}

std::int64_t PrefixCache::release(const std::vector<PagesView>& batch) {
  const std::lock_guard lock(pool_.mutex_);
  check_releasable(batch);
  std::int64_t num_freed = 0;
  for (const PagesView& pages : batch) {
    for (const std::int32_t page : pages) {
      num_freed += let_go(page);
    }
  }
  return num_freed;
}

std::vector<Branch> PrefixCache::fork(const std::vector<Trunk>& batch) {
  const std::lock_guard lock(pool_.mutex_);
  std::vector<Branch> branches;
  branches.reserve(batch.size());
  std::int32_t num_partial = 0;
  for (const Trunk& trunk : batch) {
    if (trunk.num_tokens < 0 || to_size(trunk.num_tokens) > trunk.pages.size * page_size_) {
      throw std::invalid_argument("num_tokens: expected 0 to " + std::to_string(trunk.pages.size * page_size_) +
                                  ", got " + std::to_string(trunk.num_tokens));
    }
    const size_t num_full = to_size(trunk.num_tokens) / page_size_;
    const bool is_partial = to_size(trunk.num_tokens) % page_size_ != 0;
    Branch branch{Pages(trunk.pages.begin(), trunk.pages.begin() + num_full), kNone, kNone};
    if (is_partial) {
      branch.copy_from = trunk.pages[num_full];
      branch.pages.push_back(kNone);  // the page to come
      ++num_partial;
    }
    for (size_t index = 0; index < num_full + is_partial; ++index) {
      check_held(trunk.pages[index]);
    }
    branches.push_back(std::move(branch));
  }
  const Pages taken = pool_.take(num_partial);
  auto next = taken.begin();
  for (Branch& branch : branches) {
    for (std::int32_t& page : branch.pages) {
      if (page == kNone) {
        page = branch.copy_to = *next++;
      } else {
        hold(page);
      }
    }
  }
  return branches;
}

std::int64_t PrefixCache::evict(std::int64_t count) {
  if (count < 0) {
    throw std::invalid_argument("count: expected at least 0, got " + std::to_string(count));
  }
  const std::lock_guard lock(pool_.mutex_);
  std::int64_t num_evicted = 0;
  for (; num_evicted < count && at(end_).newer != end_; ++num_evicted) {
    const std::int32_t oldest = at(end_).newer;
    unlist(oldest);
    remove(oldest);
    pool_.give_back(oldest);
  }
  statistics_.pages_evicted += num_evicted;
  return num_evicted;
}

PrefixCacheStatistics PrefixCache::statistics() const {
  const std::lock_guard lock(pool_.mutex_);
  PrefixCacheStatistics now = statistics_;
  now.tokens_hit = now.pages_hit * static_cast<std::int64_t>(page_size_);
  return now;
}

// --- keys ------------------------------------------------------------------------------------------------------------

void PrefixCache::check_keys(const std::vector<PrefixKey>& batch) const {
  for (const PrefixKey& key : batch) {
    if (key.digests.size < kDigestBytes || key.digests.size % kDigestBytes != 0) {
      throw std::invalid_argument("digests: expected 32 bytes for the namespace and 32 for each image, got " +
                                  std::to_string(key.digests.size));
    }
    std::uint32_t largest = 0;
    for (const std::uint32_t position : key.positions) {
      largest = std::max(largest, position);
    }
    const size_t num_images = count_images(key.positions.begin(), key.positions.size);
    if (largest >= kFirstUnknown) {
      throw std::invalid_argument("positions: expected text, image or latent, got kind " +
                                  std::to_string(largest >> kKindShift));
    }
    if (num_images >= key.digests.size / kDigestBytes) {
      throw std::invalid_argument("digests: expected one for each of " + std::to_string(num_images) + " images, got " +
                                  std::to_string(key.digests.size / kDigestBytes - 1));
    }
  }
}

// key: of the page.  The next page's, whose digests come after this page's.
PrefixCache::PageKey PrefixCache::after(const PageKey& key, std::int32_t page) const {
  const size_t num_bytes = at(page).has_digests ? digests_.at(page).size() : 0;
  return {key.positions + page_size_, key.digests + num_bytes};
}

PrefixCache::PageKey PrefixCache::key_of(std::int32_t page) const {
  return {positions_of(page), at(page).has_digests ? digests_.at(page).data() : nullptr};
}

// The namespace's on a first page, and those of the images that begin on it.
size_t PrefixCache::num_digest_bytes(std::int32_t parent, const PageKey& key) const {
  return (count_images(key.positions, page_size_) + (parent == kNone ? 1 : 0)) * kDigestBytes;
}

// Where to look in the table. NH, a sum of products of sums with secrets: two pages that differ agree by chance only,
// and no product waits for another (Black et al., UMAC, 1999).
std::uint32_t PrefixCache::place_of(std::int32_t parent, const PageKey& key) const {
  constexpr std::uint64_t kOdd = 0x9e3779b97f4a7c15;
  std::uint64_t sum = static_cast<std::uint64_t>(parent) * kOdd;
  const auto salted = [&](size_t index) -> std::uint64_t { return key.positions[index] + secrets_[index]; };
  size_t index = 0;
  for (; index + 1 < page_size_; index += 2) {
    sum += salted(index) * salted(index + 1);
  }
  if (index < page_size_) {
    sum += salted(index) * kOdd;
  }
  std::uint64_t hash = mix(sum, kOdd);
  const size_t num_bytes = num_digest_bytes(parent, key);
  for (size_t offset = 0; offset < num_bytes; offset += sizeof(std::uint64_t)) {
    std::uint64_t part = 0;
    std::memcpy(&part, key.digests + offset, sizeof part);
    hash = mix(hash ^ part, kOdd);
  }
  return static_cast<std::uint32_t>(hash >> (64 - VITALRT_HASH_BITS));
}

// --- tree and table --------------------------------------------------------------------------------------------------

// Parent and positions being equal, both have as many digests.
bool PrefixCache::is_page(std::int32_t page, std::int32_t parent, const PageKey& key) const {
  if (at(page).parent != parent ||
      std::memcmp(positions_of(page), key.positions, page_size_ * sizeof(std::uint32_t)) != 0) {
    return false;
  }
  if (!at(page).has_digests) {
    return true;
  }
  const std::vector<std::uint8_t>& digests = digests_.at(page);
  return std::equal(digests.begin(), digests.end(), key.digests);
}

// The cached page of this parent and key, or kNone. Most pages have one child: those take no look at the table.
std::int32_t PrefixCache::find(std::int32_t parent, const PageKey& key) const {
  if (parent == kNone) {
    return search(parent, key);
  }
  const Page& node = at(parent);
  if (node.first_child != kNone && is_page(node.first_child, parent, key)) {
    return node.first_child;
  }
  return node.num_others > 0 ? search(parent, key) : kNone;
}

std::int32_t PrefixCache::search(std::int32_t parent, const PageKey& key) const {
  const size_t mask = table_.size() - 1;
  const std::uint32_t place = place_of(parent, key);
  for (size_t slot = place & mask; table_[slot].page != kNone; slot = (slot + 1) & mask) {
    if (table_[slot].place == place && is_page(table_[slot].page, parent, key)) {
      return table_[slot].page;
    }
  }
  return kNone;
}

// With the tree's reference, but as yet without users.
void PrefixCache::add(std::int32_t page, std::int32_t parent, const PageKey& key) {
  const size_t num_bytes = num_digest_bytes(parent, key);
  if (num_bytes > 0) {
    digests_[page].assign(key.digests, key.digests + num_bytes);  // first: it may throw
  }
  std::memcpy(positions_of(page), key.positions, page_size_ * sizeof(std::uint32_t));
  at(page).parent = parent;
  at(page).has_digests = num_bytes > 0;
  if (parent != kNone && at(parent).first_child == kNone) {
    at(parent).first_child = page;
  } else {
    add_slot(page);
    if (parent != kNone) {
      ++at(parent).num_others;
    }
  }
  ++pool_.count_of(page);
  ++statistics_.pages_cached;
}

// Takes an unlisted page that is nobody's user, and whose children are gone, out of the tree, and the tree's reference
// with it. Where that was the last one, giving the page back to the pool is the caller's.
void PrefixCache::remove(std::int32_t page) {
  const std::int32_t parent = at(page).parent;
  if (parent != kNone && at(parent).first_child == page) {
    at(parent).first_child = kNone;
  } else {
    erase_slot(page);
    if (parent != kNone) {
      --at(parent).num_others;
    }
  }
  if (at(page).has_digests) {
    digests_.erase(page);
  }
  at(page) = Page{};
  --pool_.count_of(page);
  --statistics_.pages_cached;
}

void PrefixCache::add_slot(std::int32_t page) {
  const size_t mask = table_.size() - 1;
  const std::uint32_t place = place_of(at(page).parent, key_of(page));
  size_t slot = place & mask;
  while (table_[slot].page != kNone) {
    slot = (slot + 1) & mask;
  }
  table_[slot] = Slot{place, page};
}

// Closes the gap, so that the table needs no marks for what was once there.
void PrefixCache::erase_slot(std::int32_t page) {
  const size_t mask = table_.size() - 1;
  size_t gap = place_of(at(page).parent, key_of(page)) & mask;
  while (table_[gap].page != page) {
    gap = (gap + 1) & mask;
  }
  for (size_t slot = (gap + 1) & mask; table_[slot].page != kNone; slot = (slot + 1) & mask) {
    const size_t home = table_[slot].place & mask;
    if (((slot - home) & mask) >= ((slot - gap) & mask)) {
      table_[gap] = table_[slot];
      gap = slot;
    }
  }
  table_[gap].page = kNone;
}

// --- references and the order of idle pages --------------------------------------------------------------------------

// One reference more, for a sequence.
void PrefixCache::hold(std::int32_t page) {
  ++pool_.count_of(page);
  if (is_cached(page)) {
    add_user(page);
  }
}

// One reference less. Returns the number of pages freed, 0 or 1.
std::int32_t PrefixCache::let_go(std::int32_t page) {
  const bool is_last = --pool_.count_of(page) == 0;
  if (is_last) {
    pool_.give_back(page);
  } else if (is_cached(page)) {
    drop_user(page);
  }
  return is_last;
}

// A page that becomes busy is a user of its parent. Whoever holds a page mostly holds its parent too, so this ends
// soon.
void PrefixCache::add_user(std::int32_t page) {
  while (page != kNone && at(page).users++ == 0) {
    unlist(page);
    page = at(page).parent;
  }
}

void PrefixCache::drop_user(std::int32_t page) {
  while (page != kNone && --at(page).users == 0) {
    list_newest(page);
    page = at(page).parent;
  }
}

void PrefixCache::list_newest(std::int32_t page) {
  const std::int32_t newest = at(end_).older;
  at(page).older = newest;
  at(page).newer = end_;
  at(newest).newer = at(end_).older = page;
  ++statistics_.pages_idle;
}

void PrefixCache::unlist(std::int32_t page) {
  const Page& node = at(page);
  at(node.older).newer = node.newer;
  at(node.newer).older = node.older;
  --statistics_.pages_idle;
}

// --- checks ----------------------------------------------------------------------------------------------------------

void PrefixCache::check_held(std::int32_t page) const {
  pool_.check_known(page);
  if (pool_.count_of(page) == (is_cached(page) ? 1 : 0)) {
    throw std::invalid_argument("pages: expected pages that a sequence holds, got page " + std::to_string(page));
  }
}

// Takes the references away on trial and puts them back, since a page may be named by several requests.
void PrefixCache::check_releasable(const std::vector<PagesView>& batch) {
  std::int32_t refused = kNone;
  Pages dropped;
  for (const PagesView& pages : batch) {
    for (const std::int32_t page : pages) {
      pool_.check_known(page);
    }
    dropped.insert(dropped.end(), pages.begin(), pages.end());
  }
  size_t num_dropped = 0;
  for (; num_dropped < dropped.size() && refused == kNone; ++num_dropped) {
    const std::int32_t page = dropped[num_dropped];
    if (--pool_.count_of(page) < (is_cached(page) ? 1 : 0)) {
      refused = page;
    }
  }
  for (size_t index = 0; index < num_dropped; ++index) {
    ++pool_.count_of(dropped[index]);
  }
  if (refused != kNone) {
    throw std::invalid_argument("pages: expected pages that a sequence holds, got page " + std::to_string(refused) +
                                " once too often");
  }
}

void PrefixCache::check_integrity() const {
  const std::lock_guard lock(pool_.mutex_);
  pool_.check_runs();
  check_tree();
  check_table();
  check_list();
}

void PrefixCache::check_tree() const {
  std::vector<std::int32_t> busy_children(pages_.size(), 0);
  std::vector<std::int32_t> num_others(pages_.size(), 0);
  std::int64_t num_cached = 0;
  for (std::int32_t page = 0; page < end_; ++page) {
    if (!is_cached(page)) {
      continue;
    }
    ++num_cached;
    const std::int32_t parent = at(page).parent;
    require_integrity(parent == kNone || is_cached(parent), page, "its parent is not cached");
    if (at(page).users > 0 && parent != kNone) {
      ++busy_children[to_size(parent)];
    }
    if (parent != kNone && at(parent).first_child != page) {
      ++num_others[to_size(parent)];
    }
    const std::int32_t child = at(page).first_child;
    require_integrity(child == kNone || at(child).parent == page, page, "its first child is another's");
    require_integrity(at(page).has_digests == (digests_.count(page) == 1), page, "its digests are lost");
    require_integrity(find(parent, key_of(page)) == page, page, "it is not found by its key");
  }
  for (std::int32_t page = 0; page < end_; ++page) {
    const std::int32_t num_sequences = pool_.ref_counts_[to_size(page)] - 1;
    require_integrity(!is_cached(page) || at(page).users == num_sequences + busy_children[to_size(page)], page,
                      "its users are not its sequences and busy children");
    require_integrity(at(page).num_others == num_others[to_size(page)], page, "its children are not counted right");
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
    require_integrity(is_cached(page) && at(page).users == 0, page, "it is listed as idle and is not");
    require_integrity(at(at(page).newer).older == page, page, "the list does not lead back to it");
    require_integrity(at(page).parent == kNone || !is_older[to_size(at(page).parent)], page,
                      "it is newer than its parent");
    is_older[to_size(page)] = true;
    ++num_idle;
  }
  for (std::int32_t page = 0; page < end_; ++page) {
    require_integrity(!is_cached(page) || at(page).users > 0 || is_older[to_size(page)], page,
                      "it is idle and not listed");
  }
  if (num_idle != statistics_.pages_idle) {
    fail(std::to_string(num_idle) + " idle pages, counted were " + std::to_string(statistics_.pages_idle));
  }
}

}  // namespace vitalrt
