#include "prefix_key.hpp"

#include <algorithm>
#include <cstring>
#include <iterator>
#include <limits>
#include <stdexcept>
#include <string>

namespace vitalrt {
namespace {

constexpr std::uint32_t kFirstUnknown = (static_cast<std::uint32_t>(Kind::kLatent) + 1) << kKindShift;
constexpr std::size_t kMostPositions = std::numeric_limits<std::uint32_t>::max();

}  // namespace

PrefixKey::PrefixKey(Span<std::uint8_t> digests, Span<std::uint32_t> positions)
    : num_images_(static_cast<std::size_t>(std::count(positions.begin(), positions.end(), kImageBegins))),
      num_digests_(digests.size / kDigestBytes),
      num_positions_(positions.size) {
  if (digests.size == 0 || digests.size % kDigestBytes != 0) {
    throw std::invalid_argument("digests: expected 32 bytes for the namespace and 32 for each image, got " +
                                std::to_string(digests.size));
  }
  if (num_images_ >= num_digests_) {
    throw std::invalid_argument("digests: expected one for each of " + std::to_string(num_images_) + " images, got " +
                                std::to_string(num_digests_ - 1));
  }
  if (num_positions_ > kMostPositions) {
    throw std::invalid_argument("positions: expected at most " + std::to_string(kMostPositions) + ", got " +
                                std::to_string(num_positions_));
  }
  std::vector<Image> images;
  std::uint32_t next_of_image = kFirstUnknown;
  for (std::uint32_t index = 0; index < num_positions_; ++index) {
    const std::uint32_t position = positions[index];
    if (position >= kFirstUnknown) {
      throw std::invalid_argument("positions: expected text, image or latent, got kind " +
                                  std::to_string(position >> kKindShift));
    }
    if (position == kImageBegins) {
      images.push_back({index, index + 1});
      next_of_image = kImageBegins + 1;
    } else if (position == next_of_image) {
      ++images.back().end;
      ++next_of_image;
    } else {
      next_of_image = kFirstUnknown;
    }
  }
  block_.reserve(2 * num_images_ + digests.size / sizeof(std::uint32_t) + num_positions_);
  for (const Image& image : images) {
    block_.insert(block_.end(), {image.first, image.end});
  }
  const std::size_t digests_begin = block_.size();
  block_.resize(digests_begin + digests.size / sizeof(std::uint32_t));
  std::memcpy(block_.data() + digests_begin, digests.data, digests.size);
  block_.insert(block_.end(), positions.begin(), positions.end());
}

std::size_t PrefixKey::num_shared(const PrefixKey& other) const {
  const auto has_same_digest = [&](std::size_t number) {
    return std::memcmp(digests().data + number * kDigestBytes, other.digests().data + number * kDigestBytes,
                       kDigestBytes) == 0;
  };
  if (!has_same_digest(0)) {
    return 0;
  }
  const Span<std::uint32_t> mine = positions();
  const Span<std::uint32_t> theirs = other.positions();
  const auto [end, _] = std::mismatch(mine.begin(), mine.end(), theirs.begin(), theirs.end());
  const auto count = static_cast<std::size_t>(end - mine.begin());
  for (std::size_t number = 0; number < num_images_ && images()[number].first < count; ++number) {
    if (!has_same_digest(number + 1)) {
      return images()[number].first;
    }
  }
  return count;
}

PageKey PrefixKey::page(std::size_t index, std::size_t page_size) const {
  const std::size_t start = index * page_size;
  const Image* first = first_image_from(start);
  const Image* last = first_image_from(start + page_size);
  const auto num_before = static_cast<std::size_t>(first - images().begin()) + (index > 0 ? 1 : 0);
  const auto num_digests = static_cast<std::size_t>(last - first) + (index > 0 ? 0 : 1);
  return {positions().data + start, digests().data + num_before * kDigestBytes, num_digests * kDigestBytes,
          is_inside_image(first, start, start + page_size)};
}

PrefixKey::Stretch PrefixKey::stretch(std::size_t index, std::size_t page_size) const {
  const std::size_t start = index * page_size;
  const Image* next = first_image_from(start);
  if (is_inside_image(next, start, start + page_size)) {
    return {std::prev(next)->end / page_size, true};
  }
  return {next == images().end() ? std::numeric_limits<std::size_t>::max() : next->first / page_size, false};
}

const PrefixKey::Image* PrefixKey::first_image_from(std::size_t position) const {
  return std::lower_bound(images().begin(), images().end(), position,
                          [](const Image& image, std::size_t value) { return image.first < value; });
}

// next: the first image that does not begin before `start`.
bool PrefixKey::is_inside_image(const Image* next, std::size_t start, std::size_t end) const {
  return next != images().begin() && std::prev(next)->first < start && std::prev(next)->end >= end;
}

}  // namespace vitalrt
