// A matrix of weights laid out for products with a few or many rows of fp32 numbers on one CPU core.
//
// A lane of a register belongs to a row of weights, so that nothing is added up across lanes. Each sum goes over the
// columns in their order: it does not depend on how many rows are multiplied at once.
#pragma once

#include <cstddef>
#include <cstdint>
#include <vector>

namespace vitalrt {

class PackedMatrix {
 public:
  // Copies weight [out_width, width]; in bf16 where that changes no number, which is half as much to read.
  PackedMatrix(const float* weight, std::size_t out_width, std::size_t width);

  // outputs [num_rows, out_width] = inputs [num_rows, width] times the weights transposed; added to what is there if
  // `add`.
  void multiply(const float* inputs, std::size_t num_rows, float* outputs, bool add) const;

  std::size_t num_bytes() const { return lines_.size() * sizeof(Line); }

 private:
  struct alignas(64) Line {
    std::uint32_t words[16];
  };

  // Blocks of two registers' rows, zeros beyond the last; in a block, column after column. A column is two registers of
  // fp32, first rows and then the others; or one of words, bf16 of the first rows in their lower halves and of the others
  // in the upper.
  std::vector<Line> lines_;
  bool is_bf16_;
  std::size_t out_width_, width_;
};

}  // namespace vitalrt
