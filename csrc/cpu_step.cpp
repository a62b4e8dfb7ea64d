#include "cpu_step.hpp"

#include <algorithm>
#include <cmath>
#include <cstddef>
#include <limits>
#include <stdexcept>
#include <string>
#include <utility>

// Wherever the loader can choose between versions of a function, one of them is for processors with AVX and FMA.
#if defined(__x86_64__) && defined(__GLIBC__)
#define VITALRT_CLONES __attribute__((target_clones("fma", "default")))
#else
#define VITALRT_CLONES
#endif
#define VITALRT_INLINE inline __attribute__((always_inline))

namespace vitalrt {
namespace {

using std::size_t;

// Partial sums are kept in eight lanes: the same order of additions on every processor and for every batch size.
constexpr size_t kLanes = 8;
typedef float Lanes __attribute__((vector_size(4 * kLanes)));
typedef float LanesInMemory __attribute__((vector_size(4 * kLanes), aligned(4), may_alias));

size_t to_size(std::int64_t value) { return static_cast<size_t>(value); }

VITALRT_INLINE float total(const Lanes& lanes) {
  return ((lanes[0] + lanes[4]) + (lanes[2] + lanes[6])) + ((lanes[1] + lanes[5]) + (lanes[3] + lanes[7]));
}

// sums[n] = the weight row times input row n, all `width` long.
template <size_t kInputs>
VITALRT_INLINE void dot_products(const float* weight, const float* inputs, size_t width, float (&sums)[kInputs]) {
  Lanes partial[kInputs] = {};
  size_t column = 0;
  for (; column + kLanes <= width; column += kLanes) {
    const Lanes numbers = *reinterpret_cast<const LanesInMemory*>(weight + column);
    for (size_t n = 0; n < kInputs; ++n) {
      partial[n] += numbers * *reinterpret_cast<const LanesInMemory*>(inputs + n * width + column);
    }
  }
  for (size_t n = 0; n < kInputs; ++n) {
    sums[n] = total(partial[n]);
    for (size_t rest = column; rest < width; ++rest) {
      sums[n] += weight[rest] * inputs[n * width + rest];
    }
  }
}

VITALRT_INLINE float dot_product(const float* a, const float* b, size_t width) {
  float sums[1];
  dot_products(a, b, width, sums);
  return sums[0];
}

// Weight rows first to last, one after the other, times kInputs rows of inputs; added to outputs if `add`.
template <size_t kInputs>
VITALRT_INLINE void multiply_rows(const float* weight, size_t first, size_t last, size_t width, const float* inputs,
                                  float* outputs, size_t out_width, bool add) {
  for (size_t row = first; row < last; ++row) {
    float sums[kInputs];
    dot_products(weight + row * width, inputs, width, sums);
    for (size_t n = 0; n < kInputs; ++n) {
      float& output = outputs[n * out_width + row];
      output = add ? output + sums[n] : sums[n];
    }
  }
}

// outputs [batch, out_width] = inputs [batch, width] times weight [out_width, width] transposed; added to what is there
// if `add`. The weights are read strictly in order, since a step mostly waits for them to come from memory, and a block
// of them stays in the first cache while the inputs pass by.
VITALRT_CLONES
void multiply(const float* weight, size_t out_width, size_t width, const float* inputs, size_t batch, float* outputs,
              bool add) {
  constexpr size_t kBlock = 16;
  for (size_t first = 0; first < out_width; first += kBlock) {
    const size_t last = std::min(first + kBlock, out_width);
    size_t n = 0;
    for (; n + 4 <= batch; n += 4) {
      multiply_rows<4>(weight, first, last, width, inputs + n * width, outputs + n * out_width, out_width, add);
    }
    for (; n + 2 <= batch; n += 2) {
      multiply_rows<2>(weight, first, last, width, inputs + n * width, outputs + n * out_width, out_width, add);
    }
    for (; n < batch; ++n) {
      multiply_rows<1>(weight, first, last, width, inputs + n * width, outputs + n * out_width, out_width, add);
    }
  }
}

// RMSNorm of one row; input and output may be the same.
VITALRT_CLONES
void rms_norm(const float* input, const float* weight, size_t width, float eps, float* output) {
  const float mean_square = dot_product(input, input, width) / static_cast<float>(width);
  const float scale = 1.0f / std::sqrt(mean_square + eps);
  for (size_t i = 0; i < width; ++i) {
    output[i] = input[i] * scale * weight[i];
  }
}

void rms_norm_rows(const std::vector<float>& inputs, const float* weight, size_t width, float eps, float* outputs) {
  for (size_t start = 0; start < inputs.size(); start += width) {
    rms_norm(&inputs[start], weight, width, eps, outputs + start);
  }
}

// Turns the pairs (x_i, x_{i + D/2}) of one head. turn: cosines [D / 2], then sines.
void rotate(float* head, const float* turn, size_t half) {
  for (size_t i = 0; i < half; ++i) {
    const float low = head[i], high = head[i + half], cosine = turn[i], sine = turn[i + half];
    head[i] = low * cosine - high * sine;
    head[i + half] = high * cosine + low * sine;
  }
}

// Softmax attention of one query head. keys, values: this head's numbers of slot 0; slots are `stride` apart.
VITALRT_CLONES
void attend(const float* query, const float* keys, const float* values, const std::int64_t* slots, size_t num_tokens,
            size_t stride, size_t head_dim, float* scores, float* output) {
  const float scale = 1.0f / std::sqrt(static_cast<float>(head_dim));
  float highest = -std::numeric_limits<float>::infinity();
  for (size_t t = 0; t < num_tokens; ++t) {
    scores[t] = scale * dot_product(query, keys + to_size(slots[t]) * stride, head_dim);
    highest = std::max(highest, scores[t]);
  }
  float sum = 0.0f;
  for (size_t t = 0; t < num_tokens; ++t) {
    scores[t] = std::exp(scores[t] - highest);
    sum += scores[t];
  }
  std::fill(output, output + head_dim, 0.0f);
  for (size_t t = 0; t < num_tokens; ++t) {
    const float* value = values + to_size(slots[t]) * stride;
    const float share = scores[t] / sum;
    for (size_t i = 0; i < head_dim; ++i) {
      output[i] += share * value[i];
    }
  }
}

// gated [F] = silu(gate) * up of one row [gate | up].
void swiglu(const float* gate_up, size_t width, float* gated) {
  for (size_t i = 0; i < width; ++i) {
    gated[i] = gate_up[i] / (1.0f + std::exp(-gate_up[i])) * gate_up[width + i];
  }
}

}  // namespace

CpuStep::CpuStep(const StepShape& shape, std::vector<LayerWeights> layers, const float* final_norm,
                 const float* inverse_frequencies, const StepCache& cache)
    : shape_(shape),
      layers_(std::move(layers)),
      final_norm_(final_norm),
      inverse_frequencies_(inverse_frequencies),
      cache_(cache) {
  if (std::min({shape.hidden_size, shape.num_heads, shape.num_kv_heads, shape.head_dim, shape.intermediate_size,
                cache.num_slots}) < 1) {
    throw std::invalid_argument("shape: expected sizes of at least 1");
  }
  if (shape.num_heads % shape.num_kv_heads != 0 || shape.head_dim % 2 != 0) {
    throw std::invalid_argument("shape: expected num_heads in multiples of num_kv_heads and an even head_dim");
  }
}

void CpuStep::check(const StepRows& rows) const {
  for (std::int64_t b = 0; b < rows.batch; ++b) {
    const std::int64_t length = rows.lengths[b];
    if (length < 0 || length >= rows.row_length) {
      throw std::out_of_range("lengths: expected 0 to " + std::to_string(rows.row_length - 1) + ", got " +
                              std::to_string(length) + " in row " + std::to_string(b));
    }
    const std::int64_t* slots = rows.slots + b * rows.row_length;
    const auto [lowest, highest] = std::minmax_element(slots, slots + length + 1);
    if (*lowest < 0 || *highest >= cache_.num_slots) {
      throw std::out_of_range("slots: expected 0 to " + std::to_string(cache_.num_slots - 1) + " in row " +
                              std::to_string(b));
    }
  }
}

void CpuStep::run(const StepRows& rows, const float* inputs, float* hidden) const {
  check(rows);
  const size_t batch = to_size(rows.batch), width = to_size(shape_.hidden_size);
  const size_t head_dim = to_size(shape_.head_dim), half = head_dim / 2;
  const size_t num_heads = to_size(shape_.num_heads), num_kv_heads = to_size(shape_.num_kv_heads);
  const size_t q_width = num_heads * head_dim, kv_width = num_kv_heads * head_dim, qkv_width = q_width + 2 * kv_width;
  const size_t ffn_width = to_size(shape_.intermediate_size);
  const float eps = shape_.rms_norm_eps;

  std::vector<float> x(inputs, inputs + batch * width), normed(batch * width);
  std::vector<float> qkv(batch * qkv_width), attended(batch * q_width);
  std::vector<float> gate_up(batch * 2 * ffn_width), gated(batch * ffn_width);
  std::vector<float> scores(to_size(rows.row_length)), turns(batch * head_dim);
  for (size_t b = 0; b < batch; ++b) {
    for (size_t i = 0; i < half; ++i) {
      const float angle = static_cast<float>(rows.positions[b]) * inverse_frequencies_[i];
      turns[b * head_dim + i] = std::cos(angle);
      turns[b * head_dim + half + i] = std::sin(angle);
    }
  }

  const size_t layer_size = to_size(cache_.num_slots) * kv_width;
  for (size_t layer = 0; layer < layers_.size(); ++layer) {
    const LayerWeights& weights = layers_[layer];
    float* keys = cache_.k + layer * layer_size;
    float* values = cache_.v + layer * layer_size;

    rms_norm_rows(x, weights.input_norm, width, eps, normed.data());
    multiply(weights.qkv, qkv_width, width, normed.data(), batch, qkv.data(), false);
    for (size_t b = 0; b < batch; ++b) {
      float* row = &qkv[b * qkv_width];
      for (size_t head = 0; head < num_heads + num_kv_heads; ++head) {
        rms_norm(row + head * head_dim, weights.qk_norm + head * head_dim, head_dim, eps, row + head * head_dim);
        rotate(row + head * head_dim, &turns[b * head_dim], half);
      }
      const std::int64_t* slots = rows.slots + to_size(rows.row_length) * b;
      const size_t length = to_size(rows.lengths[b]), place = to_size(slots[length]) * kv_width;
      std::copy_n(row + q_width, kv_width, keys + place);
      std::copy_n(row + q_width + kv_width, kv_width, values + place);
      for (size_t head = 0; head < num_heads; ++head) {
        const size_t shared = head / (num_heads / num_kv_heads) * head_dim;
        attend(row + head * head_dim, keys + shared, values + shared, slots, length + 1, kv_width, head_dim,
               scores.data(), &attended[b * q_width + head * head_dim]);
      }
    }
    multiply(weights.o, width, q_width, attended.data(), batch, x.data(), true);

    rms_norm_rows(x, weights.post_norm, width, eps, normed.data());
    multiply(weights.gate_up, 2 * ffn_width, width, normed.data(), batch, gate_up.data(), false);
    for (size_t b = 0; b < batch; ++b) {
      swiglu(&gate_up[b * 2 * ffn_width], ffn_width, &gated[b * ffn_width]);
    }
    multiply(weights.down, width, ffn_width, gated.data(), batch, x.data(), true);
  }
  rms_norm_rows(x, final_norm_, width, eps, hidden);
}

}  // namespace vitalrt
