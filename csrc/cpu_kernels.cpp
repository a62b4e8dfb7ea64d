#include "cpu_kernels.hpp"

#include <algorithm>
#include <cmath>
#include <cstring>
#include <limits>

#include "lanes.hpp"

// Wherever the loader can choose between versions of a function, one of them is for processors with AVX and FMA.
#if defined(__x86_64__) && defined(__GLIBC__)
#define VITALRT_CLONES __attribute__((target_clones("fma", "default")))
#else
#define VITALRT_CLONES
#endif

namespace vitalrt {
namespace {

using std::size_t;

typedef std::int32_t IntLanes __attribute__((vector_size(4 * kLanes)));

VITALRT_INLINE float total(const Lanes& lanes) {
  return ((lanes[0] + lanes[4]) + (lanes[2] + lanes[6])) + ((lanes[1] + lanes[5]) + (lanes[3] + lanes[7]));
}

VITALRT_INLINE float dot_product(const float* a, const float* b, size_t width) {
  Lanes partial = {};
  size_t i = 0;
  for (; i + kLanes <= width; i += kLanes) {
    Lanes left, right;
    load(a + i, left);
    load(b + i, right);
    partial += left * right;
  }
  float sum = total(partial);
  for (; i < width; ++i) {
    sum += a[i] * b[i];
  }
  return sum;
}

// x = e^x to about 1e-7 of it, kept within what a float can hold. NaN stays NaN.
VITALRT_INLINE void exponentiate(Lanes& x) {
  const Lanes lowest = Lanes{} - 87.0f, highest = Lanes{} + 88.0f;
  x = x < lowest ? lowest : x;
  x = x > highest ? highest : x;
  // x = n ln 2 + rest. Adding 1.5 * 2^23 rounds to an integer, which is then in the lowest bits.
  const Lanes shifted = x * 1.44269504f + 12582912.0f;
  const Lanes n = shifted - 12582912.0f;
  const Lanes rest = x - n * 0.693359375f + n * 2.12194440e-4f;
  Lanes series = rest * 1.9875691500e-4f + 1.3981999507e-3f;
  series = series * rest + 8.3334519073e-3f;
  series = series * rest + 4.1665795894e-2f;
  series = series * rest + 1.6666665459e-1f;
  series = series * rest + 5.0000001201e-1f;
  series = series * rest * rest + rest + 1.0f;
  IntLanes exponent;
  std::memcpy(&exponent, &shifted, sizeof exponent);
  exponent = (exponent + 127) << 23;  // what 1.5 * 2^23 itself set is shifted out
  Lanes power;
  std::memcpy(&power, &exponent, sizeof power);
  x = series * power;
}

// The last few numbers of a row, where less than a full set of lanes is left; the other lanes are zero.
VITALRT_INLINE void load_some(Lanes& lanes, const float* numbers, size_t count) {
  lanes = Lanes{};
  std::memcpy(&lanes, numbers, count * sizeof(float));
}

VITALRT_INLINE void store_some(float* numbers, const Lanes& lanes, size_t count) {
  std::memcpy(numbers, &lanes, count * sizeof(float));
}

// gate = silu(gate) * up
VITALRT_INLINE void apply_gate(Lanes& gate, const Lanes& up) {
  Lanes power = -gate;
  exponentiate(power);
  gate = gate / (1.0f + power) * up;
}

}  // namespace

VITALRT_CLONES
void rms_norm(const float* inputs, const float* weight, size_t width, size_t num_rows, float eps, float* outputs) {
  for (size_t row = 0; row < num_rows; ++row, inputs += width, outputs += width) {
    const float mean_square = dot_product(inputs, inputs, width) / static_cast<float>(width);
    const float scale = 1.0f / std::sqrt(mean_square + eps);
    for (size_t i = 0; i < width; ++i) {
      outputs[i] = inputs[i] * scale * weight[i];
    }
  }
}

VITALRT_CLONES
void rotate(float* head, const float* turn, size_t half) {
  for (size_t i = 0; i < half; ++i) {
    const float low = head[i], high = head[i + half], cosine = turn[i], sine = turn[i + half];
    head[i] = low * cosine - high * sine;
    head[i + half] = high * cosine + low * sine;
  }
}

VITALRT_CLONES
void attend(const float* query, const float* keys, const float* values, const std::int64_t* slots, size_t num_tokens,
            size_t stride, size_t head_dim, float* scores, float* output) {
  const float scale = 1.0f / std::sqrt(static_cast<float>(head_dim));
  float highest = -std::numeric_limits<float>::infinity();
  for (size_t t = 0; t < num_tokens; ++t) {
    scores[t] = scale * dot_product(query, keys + static_cast<size_t>(slots[t]) * stride, head_dim);
    highest = std::max(highest, scores[t]);
  }
  float sum = 0.0f;
  size_t first = 0;
  for (; first + kLanes <= num_tokens; first += kLanes) {
    Lanes lanes;
    load(scores + first, lanes);
    lanes -= highest;
    exponentiate(lanes);
    store(scores + first, lanes);
  }
  const size_t rest = num_tokens - first;
  Lanes lanes;
  load_some(lanes, scores + first, rest);
  lanes -= highest;
  exponentiate(lanes);
  store_some(scores + first, lanes, rest);
  for (size_t t = 0; t < num_tokens; ++t) {
    sum += scores[t];
  }
  std::fill(output, output + head_dim, 0.0f);
  for (size_t t = 0; t < num_tokens; ++t) {
    const float* value = values + static_cast<size_t>(slots[t]) * stride;
    const float share = scores[t] / sum;
    for (size_t i = 0; i < head_dim; ++i) {
      output[i] += share * value[i];
    }
  }
}

VITALRT_CLONES
void swiglu(const float* gate_up, size_t width, size_t num_rows, float* gated) {
  for (size_t row = 0; row < num_rows; ++row, gate_up += 2 * width, gated += width) {
    size_t i = 0;
    for (; i + kLanes <= width; i += kLanes) {
      Lanes gate, up;
      load(gate_up + i, gate);
      load(gate_up + width + i, up);
      apply_gate(gate, up);
      store(gated + i, gate);
    }
    const size_t rest = width - i;
    Lanes gate, up;
    load_some(gate, gate_up + i, rest);
    load_some(up, gate_up + width + i, rest);
    apply_gate(gate, up);
    store_some(gated + i, gate, rest);
  }
}

}  // namespace vitalrt
