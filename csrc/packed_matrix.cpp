#include "packed_matrix.hpp"

#include <algorithm>
#include <cstring>

#include "lanes.hpp"

namespace vitalrt {
namespace {

using std::size_t;

constexpr size_t kBlockRows = 2 * kLanes;
typedef std::uint32_t Words __attribute__((vector_size(4 * kLanes)));

// How many numbers a column of a block takes.
constexpr size_t column_size(const float*) { return kBlockRows; }
constexpr size_t column_size(const std::uint32_t*) { return kLanes; }

// A column's two registers.
VITALRT_INLINE void load_column(const float* column, Lanes (&weights)[2]) {
  load(column, weights[0]);
  load(column + kLanes, weights[1]);
}

VITALRT_INLINE void load_column(const std::uint32_t* column, Lanes (&weights)[2]) {
  Words words;
  std::memcpy(&words, column, sizeof words);
  const Words first = words << 16, others = words & 0xffff0000u;
  std::memcpy(&weights[0], &first, sizeof first);
  std::memcpy(&weights[1], &others, sizeof others);
}

// kBlocks blocks times kRows rows of inputs. num_outputs: how many of the blocks' rows there are.
template <size_t kBlocks, size_t kRows, typename T>
VITALRT_INLINE void multiply_tile(const T* blocks, size_t width, const float* inputs, float* outputs, size_t out_width,
                                  size_t num_outputs, bool add) {
  constexpr size_t kColumn = column_size(static_cast<const T*>(nullptr));
  Lanes sums[kRows][kBlocks][2] = {};
  for (size_t column = 0; column < width; ++column) {
    for (size_t block = 0; block < kBlocks; ++block) {
      Lanes weights[2];
      load_column(blocks + (block * width + column) * kColumn, weights);
      for (size_t row = 0; row < kRows; ++row) {
        const float input = inputs[row * width + column];
        sums[row][block][0] += weights[0] * input;
        sums[row][block][1] += weights[1] * input;
      }
    }
  }
  for (size_t row = 0; row < kRows; ++row) {
    float* output = outputs + row * out_width;
    for (size_t part = 0; part < 2 * kBlocks; ++part, output += kLanes) {
      const Lanes& sum = sums[row][part / 2][part % 2];
      const size_t done = part * kLanes, left = num_outputs > done ? std::min(num_outputs - done, kLanes) : 0;
      if (left == kLanes) {
        Lanes before{};
        if (add) {
          load(output, before);
        }
        store(output, before + sum);
        continue;
      }
      for (size_t i = 0; i < left; ++i) {
        output[i] = add ? output[i] + sum[i] : sum[i];
      }
    }
  }
}

// Blocks first to last, kBlocks at a time, times kRows rows of inputs.
template <size_t kBlocks, size_t kRows, typename T>
VITALRT_INLINE void multiply_rows(const T* numbers, size_t first, size_t last, size_t width, const float* inputs,
                                  float* outputs, size_t out_width, bool add) {
  constexpr size_t kColumn = column_size(static_cast<const T*>(nullptr));
  size_t block = first;
  for (; block + kBlocks <= last; block += kBlocks) {
    const size_t done = block * kBlockRows;
    multiply_tile<kBlocks, kRows>(numbers + block * width * kColumn, width, inputs, outputs + done, out_width,
                                  out_width - done, add);
  }
  if constexpr (kBlocks > 1) {
    multiply_rows<1, kRows>(numbers, block, last, width, inputs, outputs, out_width, add);
  }
}

// num_rows rows, kRows of them at most. Fewer rows take more blocks at a time: as many sums are under way as AVX2 has
// registers for beside what they are made from, since one alone would wait for its own last addition.
template <size_t kRows, typename T>
VITALRT_INLINE void multiply_up_to(const T* numbers, size_t first, size_t last, size_t width, const float* inputs,
                                  size_t num_rows, float* outputs, size_t out_width, bool add) {
  if (num_rows == kRows) {
    constexpr size_t kBlocks = kRows == 1 ? 4 : kRows <= 3 ? 2 : 1;
    multiply_rows<kBlocks, kRows>(numbers, first, last, width, inputs, outputs, out_width, add);
  } else if constexpr (kRows > 1) {
    multiply_up_to<kRows - 1>(numbers, first, last, width, inputs, num_rows, outputs, out_width, add);
  }
}

// A few blocks of weights come from memory once and stay in a near cache while the rows pass by.
template <typename T>
VITALRT_INLINE void multiply_all(const T* numbers, size_t out_width, size_t width, const float* inputs, size_t num_rows,
                                 float* outputs, bool add) {
  constexpr size_t kTogether = 4, kMostRows = 6;
  const size_t num_blocks = (out_width + kBlockRows - 1) / kBlockRows;
  for (size_t first = 0; first < num_blocks; first += kTogether) {
    const size_t last = std::min(first + kTogether, num_blocks);
    for (size_t row = 0; row < num_rows; row += kMostRows) {
      multiply_up_to<kMostRows>(numbers, first, last, width, inputs + row * width, std::min(kMostRows, num_rows - row),
                               outputs + row * out_width, out_width, add);
    }
  }
}

template <typename T>
using Multiply = void (*)(const T*, size_t, size_t, const float*, size_t, float*, bool);

template <typename T>
void multiply_plain(const T* numbers, size_t out_width, size_t width, const float* inputs, size_t num_rows,
                    float* outputs, bool add) {
  multiply_all(numbers, out_width, width, inputs, num_rows, outputs, add);
}

#if defined(__x86_64__) && defined(__GNUC__)
template <typename T>
__attribute__((target("avx2,fma"))) void multiply_avx2(const T* numbers, size_t out_width, size_t width,
                                                       const float* inputs, size_t num_rows, float* outputs,
                                                       bool add) {
  multiply_all(numbers, out_width, width, inputs, num_rows, outputs, add);
}

template <typename T>
Multiply<T> fastest() {
  return __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma") ? multiply_avx2<T> : multiply_plain<T>;
}
#else
template <typename T>
Multiply<T> fastest() {
  return multiply_plain<T>;
}
#endif

std::uint32_t bits_of(float number) {
  std::uint32_t word;
  std::memcpy(&word, &number, sizeof word);
  return word;
}

}  // namespace

PackedMatrix::PackedMatrix(const float* weight, size_t out_width, size_t width)
    : is_bf16_(std::all_of(weight, weight + out_width * width,
                           [](float number) { return (bits_of(number) & 0xffffu) == 0; })),
      out_width_(out_width),
      width_(width) {
  const size_t num_blocks = (out_width + kBlockRows - 1) / kBlockRows;
  const size_t num_words = num_blocks * width * (is_bf16_ ? kLanes : kBlockRows);
  lines_.resize((num_words + 15) / 16);
  const auto at = [&](size_t row, size_t column) {
    return row < out_width ? bits_of(weight[row * width + column]) : 0u;
  };
  auto* word = reinterpret_cast<std::uint32_t*>(lines_.data());
  for (size_t first = 0; first < num_blocks * kBlockRows; first += kBlockRows) {
    for (size_t column = 0; column < width; ++column) {
      if (is_bf16_) {
        for (size_t row = first; row < first + kLanes; ++row) {
          *word++ = at(row, column) >> 16 | at(row + kLanes, column);
        }
      } else {
        for (size_t row = first; row < first + kBlockRows; ++row) {
          *word++ = at(row, column);
        }
      }
    }
  }
}

void PackedMatrix::multiply(const float* inputs, size_t num_rows, float* outputs, bool add) const {
  static const auto multiply_words = fastest<std::uint32_t>();
  static const auto multiply_floats = fastest<float>();
  const auto* words = reinterpret_cast<const std::uint32_t*>(lines_.data());
  if (is_bf16_) {
    multiply_words(words, out_width_, width_, inputs, num_rows, outputs, add);
  } else {
    multiply_floats(reinterpret_cast<const float*>(words), out_width_, width_, inputs, num_rows, outputs, add);
  }
}

}  // namespace vitalrt
