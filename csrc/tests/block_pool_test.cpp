// The block pool under sanitizers: random allocations, retains and releases, checked after every step.
#include "block_pool.hpp"

#include <cstdio>
#include <cstdlib>
#include <random>
#include <vector>

namespace {

void require(bool condition, const char* what) {
  if (!condition) {
    std::fprintf(stderr, "failed: %s\n", what);
    std::exit(1);
  }
}

template <typename Error, typename Call>
bool throws(Call call) {
  try {
    call();
  } catch (const Error&) {
    return true;
  }
  return false;
}

void test_errors_change_nothing() {
  vitalrt::BlockPool pool(4);
  const auto blocks = pool.allocate(3);
  require(throws<vitalrt::OutOfBlocks>([&] { pool.allocate(2); }), "allocate refuses what does not fit");
  require(throws<std::invalid_argument>([&] { pool.allocate(-1); }), "allocate refuses a negative count");
  require(throws<std::invalid_argument>([&] { pool.release({0, 3}); }), "release refuses a free block");
  require(throws<std::invalid_argument>([&] { pool.release({0, 0}); }), "release refuses a duplicate");
  require(throws<std::invalid_argument>([&] { pool.retain({0, 4}); }), "retain refuses an unknown block");
  require(throws<std::invalid_argument>([] { vitalrt::BlockPool empty(0); }), "an empty pool is refused");
  require(pool.num_free() == 1 && pool.ref_count(0) == 1, "errors change nothing");
  require(pool.release(blocks) == 3 && pool.largest_run() == 4, "released runs join");
}

void test_random_walk() {
  std::mt19937 random(0);
  vitalrt::BlockPool pool(61);
  std::vector<std::vector<std::int32_t>> held;
  for (int step = 0; step < 20000; ++step) {
    const auto draw = static_cast<std::int32_t>(random() % 9);
    if (random() % 2 == 0 && draw <= pool.num_free()) {
      const bool fits = draw <= pool.largest_run();
      const auto blocks = pool.allocate(draw);
      require(!fits || blocks.empty() || blocks.back() - blocks.front() == draw - 1, "a run that fits is used");
      held.push_back(blocks);
    } else if (!held.empty()) {
      const std::size_t index = random() % held.size();
      if (random() % 4 == 0) {
        pool.retain(held[index]);
        held.push_back(held[index]);
      } else {
        pool.release(held[index]);
        held.erase(held.begin() + static_cast<std::ptrdiff_t>(index));
      }
    }
    pool.check_integrity();
  }
  for (const auto& blocks : held) {
    pool.release(blocks);
  }
  require(pool.num_free() == 61 && pool.largest_run() == 61, "everything comes back");
}

}  // namespace

int main() {
  test_errors_change_nothing();
  test_random_walk();
  return 0;
}
