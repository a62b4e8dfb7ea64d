// What a sequence holds, position by position, checked once: the prefix cache's calls rely on it.
//
// A position is a word of 32 bits: what kind it is, and which one of that kind. Besides, a sequence has the 256-bit
// digest of its namespace and of each of its images.
#pragma once

#include <cstddef>
#include <cstdint>
#include <vector>

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

constexpr unsigned kKindShift = 30;
constexpr std::uint32_t kImageBegins = static_cast<std::uint32_t>(Kind::kImage) << kKindShift;
constexpr std::size_t kDigestBytes = 32;

// One page's part of a key.
struct PageKey {
  const std::uint32_t* positions;
  const std::uint8_t* digests;  // the namespace's on a first page, then those of the images that begin on the page
  std::size_t num_digest_bytes;
  // All of it belongs to an image that began before it, and goes on counting where its parent ends: it is known by
  // that, and its positions need not be kept.
  bool is_inside_image;
};

class PrefixKey {
 public:
  // Pages from one index up to another, without digests, all of them inside one image or none inside any.
  struct Stretch {
    std::size_t end;
    bool is_inside_image;
  };

  // digests: the namespace's, then one per image in order, 32 bytes each. Both are copied. Throws std::invalid_argument
  // on a position of no kind, or too few digests.
  PrefixKey(Span<std::uint8_t> digests, Span<std::uint32_t> positions);

  Span<std::uint8_t> digests() const {
    return {reinterpret_cast<const std::uint8_t*>(block_.data() + 2 * num_images_), num_digests_ * kDigestBytes};
  }
  Span<std::uint32_t> positions() const { return {block_.data() + block_.size() - num_positions_, num_positions_}; }

  // Asks for the memory that a look at the first page needs.
  void prefetch() const {
    __builtin_prefetch(block_.data());
    __builtin_prefetch(digests().data);
    __builtin_prefetch(positions().data);
  }

  // How many positions, from the first on, hold the same in both; an image's positions hold its digest too.
  std::size_t num_shared(const PrefixKey& other) const;

  PageKey page(std::size_t index, std::size_t page_size) const;

  // The longest stretch from page `index` > 0 on; its end may lie beyond the last page. Empty where the page has
  // digests.
  Stretch stretch(std::size_t index, std::size_t page_size) const;

 private:
  // Positions first .. end - 1 count on from kImageBegins.
  struct Image {
    std::uint32_t first;
    std::uint32_t end;
  };
  Span<Image> images() const { return {reinterpret_cast<const Image*>(block_.data()), num_images_}; }

  const Image* first_image_from(std::size_t position) const;
  bool is_inside_image(const Image* next, std::size_t start, std::size_t end) const;

  std::size_t num_images_;
  std::size_t num_digests_;
  std::size_t num_positions_;
  std::vector<std::uint32_t> block_;  // images, digests, positions: in one piece, since a call finds it cold
};

}  // namespace vitalrt
