// Reads bytes as a sequence of calls to a prefix cache and compares it, after each, with a model that recomputes
// everything from a map of whole prefixes. Aborts where they differ. With VITALRT_HASH_BITS=2 pages collide all the
// time.
//
// libFuzzer: clang++ -std=c++17 -g -fsanitize=fuzzer,address,undefined -DVITALRT_HASH_BITS=2 -Icsrc
//            csrc/fuzz/prefix_cache_fuzz.cpp csrc/prefix*.cpp csrc/block_pool.cpp
// AFL, and random bytes where there is neither: the same with csrc/fuzz/driver.cpp and without `fuzzer`.
#include <algorithm>
#include <array>
#include <cstdio>
#include <cstdlib>
#include <map>
#include <set>
#include <stdexcept>
#include <vector>

#include "prefix_cache.hpp"

namespace {

using vitalrt::Pages;
using vitalrt::PagesView;
using vitalrt::PrefixKey;

constexpr std::size_t kPageSize = 2;
constexpr std::int32_t kNumPages = 20;
constexpr std::size_t kMaxSequences = 8;
constexpr std::uint32_t kImage = 1u << 30;
constexpr std::uint32_t kLatent = 2u << 30;

// The namespace, then one number per position that says all about it: an image's is told from another's by its number.
using Prefix = std::vector<std::uint64_t>;

void require(bool condition, const char* what) {
  if (!condition) {
    std::fprintf(stderr, "prefix cache and model differ: %s\n", what);
    std::abort();
  }
}

// The input, then zeros.
class Bytes {
 public:
  Bytes(const std::uint8_t* data, std::size_t size) : next_(data), end_(data + size) {}
  bool empty() const { return next_ == end_; }
  std::uint32_t below(std::size_t limit) { return (empty() ? 0u : *next_++) % static_cast<std::uint32_t>(limit); }

 private:
  const std::uint8_t* next_;
  const std::uint8_t* end_;
};

struct Sequence {
  std::vector<std::uint8_t> digests;
  std::vector<std::uint32_t> positions;
  Prefix facts;
  Pages pages;

  void add_digest(std::uint8_t number) { digests.insert(digests.end(), vitalrt::kDigestBytes, number); }
  void add(std::uint32_t position, std::uint64_t fact = 0) {
    positions.push_back(position);
    facts.push_back(position | fact << 32);
  }
  PrefixKey key() const { return {{digests.data(), digests.size()}, {positions.data(), positions.size()}}; }
  PagesView pages_view() const { return {pages.data(), pages.size()}; }
  std::size_t num_pages() const { return (positions.size() + kPageSize - 1) / kPageSize; }
  Prefix prefix(std::size_t num_full) const {
    return Prefix(facts.begin(), facts.begin() + 1 + static_cast<std::ptrdiff_t>(num_full * kPageSize));
  }
};

Sequence read_sequence(Bytes& bytes) {
  Sequence sequence;
  const std::uint32_t name = bytes.below(2);
  sequence.add_digest(static_cast<std::uint8_t>(name));
  sequence.facts.push_back(name);
  for (std::uint32_t piece = bytes.below(4) + 1; piece > 0; --piece) {
    const std::uint32_t kind = bytes.below(3);
    const std::uint32_t which = bytes.below(2);
    const std::uint32_t length = bytes.below(kind == 1 ? 8 : 4) + 1;
    if (kind == 1) {
      sequence.add_digest(static_cast<std::uint8_t>(which + 10));
    }
    for (std::uint32_t index = 0; index < length; ++index) {
      if (kind == 0) {
        sequence.add(which);
      } else if (kind == 1) {
        sequence.add(kImage + index, which);
      } else {
        sequence.add(kLatent + index + 1);
      }
    }
  }
  return sequence;
}

class Run {
 public:
  void step(Bytes& bytes) {
    switch (bytes.below(7)) {
      case 0:
      case 1:
        arrive(bytes);
        break;
      case 2:
        insert(some(bytes));
        break;
      case 3:
        leave(some(bytes));
        break;
      case 4:
        evict(bytes.below(5));
        break;
      case 5:
        fork(bytes);
        break;
      default:
        misuse(bytes);
    }
    check();
  }

  void finish() {
    while (!sequences_.empty()) {
      leave({0});
    }
    evict(kNumPages);
    check();
    require(pool_.num_free() == kNumPages, "everything comes back");
  }

 private:
  using Chosen = std::set<std::size_t>;

  Chosen some(Bytes& bytes) {
    Chosen chosen;
    for (std::uint32_t count = bytes.below(3) + 1; count > 0 && !sequences_.empty(); --count) {
      chosen.insert(bytes.below(sequences_.size()));
    }
    return chosen;
  }

  void arrive(Bytes& bytes) {
    if (sequences_.size() == kMaxSequences) {
      return;
    }
    Sequence sequence = read_sequence(bytes);
    const PrefixKey key = sequence.key();
    const auto matched = cache_.match({&key});
    Pages expected;
    for (std::size_t full = 1; full * kPageSize < sequence.positions.size(); ++full) {
      const auto hit = cached_.find(sequence.prefix(full));
      if (hit == cached_.end()) {
        break;
      }
      expected.push_back(hit->second);
    }
    require(matched.size() == 1 && matched[0] == expected, "pages matched");
    sequence.pages = expected;
    sequences_.push_back(sequence);
    settle(sequences_);
    const auto missing = static_cast<std::int32_t>(sequence.num_pages() - expected.size());
    if (missing > pool_.num_free()) {
      leave({sequences_.size() - 1});
      return;
    }
    const Pages own = pool_.allocate(missing);
    sequences_.back().pages.insert(sequences_.back().pages.end(), own.begin(), own.end());
  }

  void insert(const Chosen& chosen) {
    std::vector<PrefixKey> keys;
    vitalrt::Keys batch;
    std::vector<PagesView> pages;
    std::int64_t num_new = 0;
    for (const std::size_t index : chosen) {
      const Sequence& sequence = sequences_[index];
      keys.push_back(sequence.key());
      pages.push_back(sequence.pages_view());
      for (std::size_t full = 1; full * kPageSize <= sequence.positions.size(); ++full) {
        num_new += cached_.emplace(sequence.prefix(full), sequence.pages[full - 1]).second;
      }
    }
    for (const PrefixKey& key : keys) {
      batch.push_back(&key);
    }
    require(cache_.insert(batch, pages) == num_new, "pages inserted");
    settle(sequences_);
  }

  void leave(const Chosen& chosen) {
    std::vector<Sequence> leaving;
    std::vector<PagesView> pages;
    for (const std::size_t index : chosen) {
      leaving.push_back(sequences_[index]);
    }
    for (auto index = chosen.rbegin(); index != chosen.rend(); ++index) {
      sequences_.erase(sequences_.begin() + static_cast<std::ptrdiff_t>(*index));
    }
    for (const Sequence& sequence : leaving) {
      pages.push_back(sequence.pages_view());
    }
    const std::int32_t free_before = pool_.num_free();
    require(cache_.release(pages) == pool_.num_free() - free_before, "pages freed");
    std::vector<Sequence> left = sequences_;
    left.insert(left.end(), leaving.rbegin(), leaving.rend());
    while (left.size() > sequences_.size()) {
      if (left.back().pages.empty()) {
        left.pop_back();
      } else {
        left.back().pages.pop_back();
      }
      settle(left);
    }
  }

  void evict(std::uint32_t count) {
    const std::size_t expected = std::min<std::size_t>(count, idle_.size());
    require(cache_.evict(count) == static_cast<std::int64_t>(expected), "pages evicted");
    for (std::size_t index = 0; index < expected; ++index) {
      cached_.erase(idle_[index]);
    }
    idle_.erase(idle_.begin(), idle_.begin() + static_cast<std::ptrdiff_t>(expected));
  }

  void fork(Bytes& bytes) {
    if (sequences_.empty() || sequences_.size() == kMaxSequences) {
      return;
    }
    Sequence branch = sequences_[bytes.below(sequences_.size())];
    const std::size_t num_tokens = bytes.below(branch.positions.size() + 1);
    const vitalrt::Trunk trunk{branch.pages_view(), static_cast<std::int64_t>(num_tokens)};
    const bool is_partial = num_tokens % kPageSize != 0;
    try {
      const auto forked = cache_.fork({trunk});
      const std::size_t num_full = num_tokens / kPageSize;
      require(forked[0].pages.size() == num_full + is_partial, "pages of a branch");
      require(std::equal(branch.pages.begin(), branch.pages.begin() + static_cast<std::ptrdiff_t>(num_full),
                         forked[0].pages.begin()),
              "full pages are shared");
      require(forked[0].copy_from == (is_partial ? branch.pages[num_full] : -1), "page to copy");
      require(forked[0].copy_to == (is_partial ? forked[0].pages.back() : -1), "page to copy to");
      branch.positions.resize(num_tokens);
      branch.facts.resize(num_tokens + 1);
      branch.pages = forked[0].pages;
      sequences_.push_back(branch);
    } catch (const vitalrt::OutOfBlocks&) {
      require(is_partial && pool_.num_free() == 0, "a branch finds room where there is room");
    }
    settle(sequences_);
  }

  // A batch whose second request names no page at all, or the first page of a sequence once too often: refused whole.
  void misuse(Bytes& bytes) {
    if (sequences_.empty() || sequences_[0].pages.empty()) {
      return;
    }
    const Sequence& right = sequences_[0];
    Sequence wrong;
    wrong.add_digest(0);
    for (std::size_t index = 0; index < 2 * kPageSize; ++index) {
      wrong.add(7);  // which no other sequence holds
    }
    const std::int32_t page = bytes.below(2) != 0 ? right.pages[0] : kNumPages;
    wrong.pages.assign(2, page);
    const PrefixKey right_key = right.key();
    const PrefixKey wrong_key = wrong.key();
    require_refusal([&] { cache_.insert({&right_key, &wrong_key}, {right.pages_view(), wrong.pages_view()}); });
    const auto num_holders = std::count_if(sequences_.begin(), sequences_.end(), [&](const Sequence& one) {
      return !one.pages.empty() && one.pages[0] == right.pages[0];
    });
    wrong.pages.assign(static_cast<std::size_t>(num_holders), page);
    require_refusal([&] { cache_.release({right.pages_view(), wrong.pages_view()}); });
  }

  template <typename Call>
  void require_refusal(Call call) {
    try {
      call();
    } catch (const std::invalid_argument&) {
      return;
    }
    require(false, "misuse is refused");
  }

  // What a sequence holds is busy, and so is everything before it; the rest of the cache is idle, children first.
  void settle(const std::vector<Sequence>& sequences) {
    std::set<std::int32_t> held;
    for (const Sequence& sequence : sequences) {
      held.insert(sequence.pages.begin(), sequence.pages.end());
    }
    std::set<Prefix> busy;
    for (const auto& [prefix, page] : cached_) {
      for (std::size_t size = prefix.size(); held.count(page) != 0 && size > 1; size -= kPageSize) {
        busy.insert(Prefix(prefix.begin(), prefix.begin() + static_cast<std::ptrdiff_t>(size)));
      }
    }
    idle_.erase(std::remove_if(idle_.begin(), idle_.end(), [&](const Prefix& one) { return busy.count(one) != 0; }),
                idle_.end());
    const std::set<Prefix> listed(idle_.begin(), idle_.end());
    std::vector<Prefix> fresh;
    for (const auto& [prefix, page] : cached_) {
      if (busy.count(prefix) == 0 && listed.count(prefix) == 0) {
        fresh.push_back(prefix);
      }
    }
    std::sort(fresh.begin(), fresh.end(), [](const Prefix& a, const Prefix& b) { return a.size() > b.size(); });
    idle_.insert(idle_.end(), fresh.begin(), fresh.end());
  }

  void check() const {
    cache_.check_integrity();
    std::array<std::int32_t, kNumPages> counts{};
    for (const Sequence& sequence : sequences_) {
      for (const std::int32_t page : sequence.pages) {
        ++counts[static_cast<std::size_t>(page)];
      }
    }
    for (const auto& [prefix, page] : cached_) {
      ++counts[static_cast<std::size_t>(page)];
    }
    for (std::int32_t page = 0; page < kNumPages; ++page) {
      require(pool_.ref_count(page) == counts[static_cast<std::size_t>(page)], "reference counts");
    }
    const auto statistics = cache_.statistics();
    require(statistics.pages_cached == static_cast<std::int64_t>(cached_.size()), "pages cached");
    require(statistics.pages_idle == static_cast<std::int64_t>(idle_.size()), "pages idle");
  }

  vitalrt::BlockPool pool_{kNumPages};
  vitalrt::PrefixCache cache_{pool_, kPageSize};
  std::vector<Sequence> sequences_;
  std::map<Prefix, std::int32_t> cached_;
  std::vector<Prefix> idle_;
};

}  // namespace

extern "C" int LLVMFuzzerTestOneInput(const std::uint8_t* data, std::size_t size) {
  Bytes bytes(data, size);
  Run run;
  while (!bytes.empty()) {
    run.step(bytes);
  }
  run.finish();
  return 0;
}
