#include "prefix_cache.hpp"

#include <algorithm>
#include <array>
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

// Pages looked ahead in a walk, and those asked for before it begins.
constexpr size_t kStride = 8;
constexpr std::int32_t kNumPrefetched = 64;

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

size_t table_size(std::int32_t num_blocks) {
  size_t size = 2;
  while (size < 2 * to_size(num_blocks)) {
    size *= 2;
  }
  return size;
}

}  // namespace

PrefixCache::PrefixCache(BlockPool& pool, std::int32_t page_size)
    : pool_(pool),
      page_size_(to_size(page_size)),
      secrets_(random_secrets(page_size)),
      end_(pool.num_blocks()) {
  pages_.resize(to_size(end_) + 1);
  at(end_).older = at(end_).newer = end_;
  positions_.resize(to_size(end_) * page_size_);
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

std::vector<Pages> PrefixCache::match(const Keys& batch) {
  std::vector<Pages> matched(batch.size());
  for (const PrefixKey* key : batch) {
    __builtin_prefetch(key);
  }
  for (size_t request = 0; request < batch.size(); ++request) {
    batch[request]->prefetch();
    matched[request].resize(num_pages_queried(*batch[request]));  // nothing after this can throw
  }
  std::vector<size_t> num_found(batch.size());
  const std::lock_guard lock(pool_.mutex_);
  prefetch(batch);
  begin_walks(batch, matched, num_found);
  for (size_t request = 0; request < batch.size(); ++request) {
    Pages& pages = matched[request];
    statistics_.pages_queried += static_cast<std::int64_t>(pages.size());
    pages.resize(walk(*batch[request], num_found[request], pages.size(), pages.data()));
    statistics_.pages_hit += static_cast<std::int64_t>(pages.size());
  }
  for (const Pages& pages : matched) {
    for (const std::int32_t page : pages) {
      hold(page);
    }
  }
  statistics_.requests += static_cast<std::int64_t>(batch.size());
  return matched;
}

std::int64_t PrefixCache::insert(const Keys& batch, const std::vector<PagesView>& pages) {
  if (pages.size() != batch.size()) {
    throw std::invalid_argument("pages: expected one list per request, got " + std::to_string(pages.size()) + " for " +
                                std::to_string(batch.size()));
  }
  std::vector<Chain> chains;
  chains.reserve(batch.size());
  Pages found;
  std::int64_t num_duplicate = 0;
  std::int64_t num_added = 0;
  const std::lock_guard lock(pool_.mutex_);
  check_offered(batch, pages);
  try {
    for (size_t request = 0; request < batch.size(); ++request) {
      const PrefixKey& key = *batch[request];
      found.resize(std::max(found.size(), num_full_pages(key)));
      const size_t num_found = walk(key, 0, num_full_pages(key), found.data());
      num_duplicate += count_duplicates(pages[request], found, num_found);
      chains.push_back({pages[request].begin() + num_found, 0, num_found == 0 ? kNone : found[num_found - 1]});
      add_chain(chains.back(), key, num_found);
    }
  } catch (...) {
    for (; !chains.empty(); chains.pop_back()) {
      for (Chain& chain = chains.back(); chain.num_pages > 0; --chain.num_pages) {
        remove(chain.pages[chain.num_pages - 1]);
      }
    }
    throw;
  }
  for (const Chain& chain : chains) {
    if (chain.num_pages > 0) {
      add_busy_child(chain.parent);
      num_added += static_cast<std::int64_t>(chain.num_pages);
    }
  }
  statistics_.pages_inserted += num_added;
  statistics_.pages_duplicate += num_duplicate;
  return num_added;
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

// --- finding pages ---------------------------------------------------------------------------------------------------

PageKey PrefixCache::key_of(std::int32_t page) const {
  const Page& node = at(page);
  if (node.is_inside_image) {
    return {nullptr, nullptr, 0, true};
  }
  const std::uint32_t* positions = positions_of(page);
  const auto num_images = std::count(positions, positions + page_size_, kImageBegins);
  const size_t num_digests = to_size(num_images) + (node.parent == kNone ? 1 : 0);
  return {positions, node.digests.get(), num_digests * kDigestBytes, false};
}

// A scheduler comes here with cold caches: what the walks of a batch begin with is asked for at once, not one by one.
void PrefixCache::prefetch(const Keys& batch) const {
  constexpr size_t kNumAtOnce = 64;
  std::array<const Slot*, kNumAtOnce> slots;
  size_t num_slots = 0;
  for (const PrefixKey* key : batch) {
    if (num_slots < kNumAtOnce && num_pages_queried(*key) > 0) {
      slots[num_slots] = &table_[place_of(kNone, key->page(0, page_size_)) & (table_.size() - 1)];
      __builtin_prefetch(slots[num_slots++]);
    }
  }
  for (size_t index = 0; index < num_slots; ++index) {
    const std::int32_t page = slots[index]->page;
    if (page == kNone) {
      continue;
    }
    __builtin_prefetch(positions_of(page));
    for (std::int32_t next = page; next < std::min(page + kNumPrefetched, end_); next += 2) {  // two in a cache line
      __builtin_prefetch(&at(next));
    }
    for (std::int32_t next = page; next < std::min(page + kNumPrefetched, end_); next += 16) {
      __builtin_prefetch(&pool_.count_of(next));
    }
  }
  for (size_t index = 0; index < num_slots; ++index) {
    if (slots[index]->page != kNone) {
      __builtin_prefetch(at(slots[index]->page).digests.get());
    }
  }
}

// Finds first pages and, where they lead into an image, the pages inside it: for all requests side by side, so that none
// waits for the memory of another. found[r]: as many pages as are asked for; num_found: out.
void PrefixCache::begin_walks(const Keys& batch, std::vector<Pages>& found, std::vector<size_t>& num_found) const {
  std::vector<size_t> ends(batch.size(), 0);
  std::vector<size_t> walking;
  walking.reserve(batch.size());
  for (size_t request = 0; request < batch.size(); ++request) {
    const size_t num_pages = found[request].size();
    num_found[request] = walk(*batch[request], 0, std::min<size_t>(num_pages, 1), found[request].data());
    if (num_found[request] > 0) {
      const PrefixKey::Stretch stretch = batch[request]->stretch(1, page_size_);
      ends[request] = stretch.is_inside_image ? std::min(stretch.end, num_pages) : 0;
      walking.push_back(request);
    }
  }
  while (!walking.empty()) {
    size_t num_walking = 0;
    for (const size_t request : walking) {
      const size_t index = num_found[request];
      if (index < ends[request] && follow_image(index, index + 1, found[request].data()) > index) {
        ++num_found[request];
        __builtin_prefetch(&pool_.count_of(found[request][index]), 1);
        walking[num_walking++] = request;
      }
    }
    walking.resize(num_walking);
  }
}

// Writes the cached pages among the key's first num_pages to `found`, from index num_found on; those before are there.
// Returns how many there are.
size_t PrefixCache::walk(const PrefixKey& key, size_t num_found, size_t num_pages, std::int32_t* found) const {
  std::int32_t page = num_found > 0 ? found[num_found - 1] : kNone;
  while (num_found < num_pages) {
    page = find(page, key.page(num_found, page_size_));
    if (page == kNone) {
      break;
    }
    found[num_found++] = page;
    const PrefixKey::Stretch stretch = key.stretch(num_found, page_size_);
    const size_t end = std::min(stretch.end, num_pages);
    num_found =
        stretch.is_inside_image ? follow_image(num_found, end, found) : follow_words(key, num_found, end, found);
    page = found[num_found - 1];
  }
  return num_found;
}

// What a walk needs no table for: from the page found before `index` on up to `end`, first children that are the key's.
// Both return the index after the last one found.
size_t PrefixCache::follow_image(size_t index, size_t end, std::int32_t* found) const {
  std::int32_t page = found[index - 1];
  for (; index < end; ++index) {
    page = at(page).first_child;
    if (page == kNone || !at(page).is_inside_image) {
      break;
    }
    found[index] = page;
  }
  return index;
}

size_t PrefixCache::follow_words(const PrefixKey& key, size_t index, size_t end, std::int32_t* found) const {
  std::int32_t page = found[index - 1];
  while (index < end) {
    const size_t stride = std::min(index + kStride, end);
    size_t linked = index;
    for (; linked < stride; ++linked) {
      page = at(page).first_child;
      if (page == kNone || at(page).is_inside_image || at(page).digests != nullptr) {
        break;
      }
      __builtin_prefetch(positions_of(page));
      found[linked] = page;
    }
    for (; index < linked; ++index) {
      if (!holds(found[index], key.positions().data + index * page_size_)) {
        return index;
      }
    }
    if (linked < stride) {
      break;
    }
  }
  return index;
}

bool PrefixCache::holds(std::int32_t page, const std::uint32_t* positions) const {
  return std::memcmp(positions_of(page), positions, page_size_ * sizeof(std::uint32_t)) == 0;
}

// Where to look in the table. NH, a sum of products of sums with secrets: two pages that differ agree by chance only,
// and no product waits for another (Black et al., UMAC, 1999).
std::uint32_t PrefixCache::place_of(std::int32_t parent, const PageKey& key) const {
  constexpr std::uint64_t kOdd = 0x9e3779b97f4a7c15;
  std::uint64_t sum = static_cast<std::uint64_t>(parent) * kOdd;
  if (key.is_inside_image) {
    return static_cast<std::uint32_t>(mix(sum, kOdd) >> (64 - VITALRT_HASH_BITS));
  }
  const auto salted = [&](size_t index) -> std::uint64_t { return key.positions[index] + secrets_[index]; };
  size_t index = 0;
  for (; index + 1 < page_size_; index += 2) {
    sum += salted(index) * salted(index + 1);
  }
  if (index < page_size_) {
    sum += salted(index) * kOdd;
  }
  std::uint64_t hash = mix(sum, kOdd);
  for (size_t offset = 0; offset < key.num_digest_bytes; offset += sizeof(std::uint64_t)) {
    std::uint64_t part = 0;
    std::memcpy(&part, key.digests + offset, sizeof part);
    hash = mix(hash ^ part, kOdd);
  }
  return static_cast<std::uint32_t>(hash >> (64 - VITALRT_HASH_BITS));
}

// Of two pages with one parent that are both inside an image, both go on from the parent alike. Parent and positions
// being equal, both have as many digests.
bool PrefixCache::is_page(std::int32_t page, std::int32_t parent, const PageKey& key) const {
  return at(page).parent == parent && at(page).is_inside_image == key.is_inside_image &&
         (key.is_inside_image || holds(page, key.positions)) &&
         (key.num_digest_bytes == 0 || std::memcmp(at(page).digests.get(), key.digests, key.num_digest_bytes) == 0);
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

// --- changing the tree -----------------------------------------------------------------------------------------------

void PrefixCache::check_offered(const Keys& batch, const std::vector<PagesView>& pages) const {
  for (size_t request = 0; request < batch.size(); ++request) {
    const size_t num_pages = num_full_pages(*batch[request]);
    if (pages[request].size < num_pages) {
      throw std::invalid_argument("pages: expected " + std::to_string(num_pages) + " for request " +
                                  std::to_string(request) + ", got " + std::to_string(pages[request].size));
    }
    for (size_t index = 0; index < num_pages; ++index) {
      check_held(pages[request][index]);
    }
  }
}

// Of the pages offered where an equal one was found.
std::int64_t PrefixCache::count_duplicates(const PagesView& offered, const Pages& found, size_t num_found) const {
  std::int64_t num_duplicate = 0;
  for (size_t index = 0; index < num_found; ++index) {
    if (offered[index] != found[index]) {
      check_uncached(offered[index]);
      ++num_duplicate;
    }
  }
  return num_duplicate;
}

// Adds the key's pages from index `start` on, each the only child of the one before, and counts them in `chain` one by
// one: should this throw, they are to be removed. They are busy, but the chain's parent is not yet told.
void PrefixCache::add_chain(Chain& chain, const PrefixKey& key, size_t start) {
  const size_t num_pages = num_full_pages(key);
  std::int32_t last = chain.parent;
  size_t index = start;
  while (index < num_pages) {
    const std::int32_t page = chain.pages[index - start];
    check_uncached(page);
    add(page, last, key.page(index, page_size_));
    if (index > start) {
      at(last).num_busy_children = 1;
    }
    last = page;
    chain.num_pages = ++index - start;
    const PrefixKey::Stretch stretch = key.stretch(index, page_size_);
    for (const size_t end = std::min(stretch.end, num_pages); index < end; ++index) {
      const std::int32_t next = chain.pages[index - start];
      check_uncached(next);
      if (!stretch.is_inside_image) {
        copy_positions(next, key.positions().data + index * page_size_);
      }
      put(next, last, stretch.is_inside_image);
      at(last).first_child = next;
      at(last).num_busy_children = 1;
      chain.num_pages = index + 1 - start;
      last = next;
    }
  }
}

void PrefixCache::add(std::int32_t page, std::int32_t parent, const PageKey& key) {
  if (key.num_digest_bytes > 0) {  // first: it may throw
    at(page).digests = std::make_unique<std::uint8_t[]>(key.num_digest_bytes);
    std::memcpy(at(page).digests.get(), key.digests, key.num_digest_bytes);
  }
  if (!key.is_inside_image) {
    copy_positions(page, key.positions);
  }
  put(page, parent, key.is_inside_image);
  if (parent != kNone && at(parent).first_child == kNone) {
    at(parent).first_child = page;
  } else {
    add_slot(page, place_of(parent, key));
    if (parent != kNone) {
      ++at(parent).num_others;
    }
  }
}

void PrefixCache::copy_positions(std::int32_t page, const std::uint32_t* positions) {
  std::memcpy(positions_of(page), positions, page_size_ * sizeof(std::uint32_t));
}

// With the tree's reference.
void PrefixCache::put(std::int32_t page, std::int32_t parent, bool is_inside_image) {
  at(page).parent = parent;
  at(page).is_inside_image = is_inside_image;
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
  at(page) = Page{};
  --pool_.count_of(page);
  --statistics_.pages_cached;
}

void PrefixCache::add_slot(std::int32_t page, std::uint32_t place) {
  const size_t mask = table_.size() - 1;
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
  if (is_cached(page) && is_idle(page)) {
    unlist(page);
    add_busy_child(at(page).parent);
  }
  ++pool_.count_of(page);
}

// One reference less. Returns the number of pages freed, 0 or 1.
std::int32_t PrefixCache::let_go(std::int32_t page) {
  const bool is_last = --pool_.count_of(page) == 0;
  if (is_last) {
    pool_.give_back(page);
  } else if (is_cached(page) && is_idle(page)) {
    list_newest(page);
    drop_busy_child(at(page).parent);
  }
  return is_last;
}

// Whoever holds a page mostly holds its parent too, so this ends soon.
void PrefixCache::add_busy_child(std::int32_t page) {
  while (page != kNone) {
    const bool was_idle = is_idle(page);
    ++at(page).num_busy_children;
    if (!was_idle) {
      break;
    }
    unlist(page);
    page = at(page).parent;
  }
}

void PrefixCache::drop_busy_child(std::int32_t page) {
  while (page != kNone) {
    --at(page).num_busy_children;
    if (!is_idle(page)) {
      break;
    }
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
  if (page < 0 || page >= end_) {
    pool_.check_known(page);
  }
  const std::int32_t count = pool_.count_of(page);
  if (count == 0 || (count == 1 && is_cached(page))) {
    throw std::invalid_argument("pages: expected pages that a sequence holds, got page " + std::to_string(page));
  }
}

void PrefixCache::check_uncached(std::int32_t page) const {
  if (is_cached(page)) {
    throw std::invalid_argument("pages: page " + std::to_string(page) + " is cached with other contents");
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

}  // namespace vitalrt
