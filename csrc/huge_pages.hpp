// Memory for large arrays that are read here and there: in huge pages where the system has them, so that such a read
// seldom waits for the page table as well.
#pragma once

#include <cstddef>
#include <new>
#include <utility>

#ifdef __linux__
#include <sys/mman.h>
#endif

namespace vitalrt {

// An allocator. What has no constructor is left as it is found: memory that is not used is not taken.
template <typename T>
struct HugePages {
  using value_type = T;

  HugePages() = default;
  template <typename U>
  HugePages(const HugePages<U>&) {}

  T* allocate(std::size_t count) {
    if (!is_worth_it(count)) {
      return static_cast<T*>(::operator new(count * sizeof(T), std::align_val_t(kCacheLine)));
    }
    const std::size_t num_bytes = (count * sizeof(T) + kHugePage - 1) / kHugePage * kHugePage;
    void* memory = ::operator new(num_bytes, std::align_val_t(kHugePage));
#ifdef MADV_HUGEPAGE
    madvise(memory, num_bytes, MADV_HUGEPAGE);  // a wish: where it is not granted, nothing is lost
#endif
    return static_cast<T*>(memory);
  }

  void deallocate(T* memory, std::size_t count) {
    ::operator delete(memory, std::align_val_t(is_worth_it(count) ? kHugePage : kCacheLine));
  }

  template <typename U>
  void construct(U* place) {
    ::new (static_cast<void*>(place)) U;
  }

  template <typename U, typename... Values>
  void construct(U* place, Values&&... values) {
    ::new (static_cast<void*>(place)) U(std::forward<Values>(values)...);
  }

  friend bool operator==(const HugePages&, const HugePages&) { return true; }
  friend bool operator!=(const HugePages&, const HugePages&) { return false; }

 private:
  static constexpr std::size_t kHugePage = std::size_t{1} << 21, kCacheLine = 64;

  // At most four times what is needed is then taken.
  static bool is_worth_it(std::size_t count) { return count * sizeof(T) >= kHugePage / 4; }
};

}  // namespace vitalrt
