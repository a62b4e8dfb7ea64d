// The decoder step under sanitizers: memory of exactly the promised sizes, odd shapes, every batch size against single
// rows. That its numbers are right is shown against torch, in tests/engine/test_cpu_step.py.
#include "cpu_step.hpp"

#include <cmath>
#include <cstddef>
#include <cstdint>
#include <cstdio>
#include <cstdlib>
#include <random>
#include <stdexcept>
#include <vector>

namespace {

using Floats = std::vector<float>;

void require(bool condition, const char* what) {
  if (!condition) {
    std::fprintf(stderr, "failed: %s\n", what);
    std::exit(1);
  }
}

Floats random_floats(std::mt19937& random, std::int64_t count) {
  std::normal_distribution<float> normal(0.0f, 0.3f);
  Floats values(static_cast<std::size_t>(count));
  for (float& value : values) {
    value = normal(random);
  }
  return values;
}

// Weights of one decoder, each in an allocation of its own.
struct Decoder {
  Decoder(std::mt19937& random, const vitalrt::StepShape& shape, std::int64_t num_layers) : shape(shape) {
    const std::int64_t d = shape.hidden_size, ffn = shape.intermediate_size;
    const std::int64_t q = shape.num_heads * shape.head_dim, kv = shape.num_kv_heads * shape.head_dim;
    for (std::int64_t layer = 0; layer < num_layers; ++layer) {
      for (const std::int64_t size : {d, (q + 2 * kv) * d, q + kv, d * q, d, 2 * ffn * d, d * ffn}) {
        numbers.push_back(random_floats(random, size));
      }
    }
    final_norm = random_floats(random, d);
    inverse_frequencies = random_floats(random, shape.head_dim / 2);
  }

  vitalrt::CpuStep step(Floats& k, Floats& v, std::int64_t num_slots) const {
    std::vector<vitalrt::LayerWeights> layers;
    for (std::size_t i = 0; i < numbers.size(); i += 7) {
      layers.push_back({numbers[i].data(), numbers[i + 1].data(), numbers[i + 2].data(), numbers[i + 3].data(),
                        numbers[i + 4].data(), numbers[i + 5].data(), numbers[i + 6].data()});
    }
    return vitalrt::CpuStep(shape, layers, final_norm.data(), inverse_frequencies.data(),
                            {k.data(), v.data(), num_slots});
  }

  vitalrt::StepShape shape;
  std::vector<Floats> numbers;
  Floats final_norm, inverse_frequencies;
};

void test_batches_equal_single_rows() {
  std::mt19937 random(0);
  for (int round = 0; round < 60; ++round) {
    const auto draw = [&](std::int64_t low, std::int64_t high) {
      return low + static_cast<std::int64_t>(random() % static_cast<std::uint32_t>(high - low + 1));
    };
    const std::int64_t groups = draw(1, 3), num_layers = draw(1, 3), batch = draw(1, 7);
    const vitalrt::StepShape shape{draw(1, 40), groups * draw(1, 3), groups, 2 * draw(1, 11), draw(1, 50), 1e-6f};
    const Decoder decoder(random, shape, num_layers);
    const std::int64_t row_length = draw(1, 9), num_slots = batch * row_length;
    // Row b owns the slots that leave the rest b when divided by the batch size: no two neighbours.
    std::vector<std::int64_t> slots, lengths, positions;
    for (std::int64_t b = 0; b < batch; ++b) {
      for (std::int64_t t = 0; t < row_length; ++t) {
        slots.push_back(t * batch + b);
      }
      lengths.push_back(draw(0, row_length - 1));
      positions.push_back(draw(0, 10000));
    }
    const Floats inputs = random_floats(random, batch * shape.hidden_size);
    const std::int64_t slot_size = shape.num_kv_heads * shape.head_dim, size = num_layers * num_slots * slot_size;
    Floats k = random_floats(random, size), v = random_floats(random, size), k_single = k, v_single = v;

    Floats hidden(inputs.size()), row(static_cast<std::size_t>(shape.hidden_size));
    decoder.step(k, v, num_slots)
        .run({batch, row_length, slots.data(), lengths.data(), positions.data()}, inputs.data(), hidden.data());
    const vitalrt::CpuStep single = decoder.step(k_single, v_single, num_slots);
    for (std::int64_t b = 0; b < batch; ++b) {
      single.run({1, row_length, &slots[static_cast<std::size_t>(b * row_length)],
                  &lengths[static_cast<std::size_t>(b)], &positions[static_cast<std::size_t>(b)]},
                 inputs.data() + b * shape.hidden_size, row.data());
      for (std::size_t i = 0; i < row.size(); ++i) {
        const float expected = row[i];
        require(std::isfinite(expected), "finite inputs give finite results");
        require(hidden[static_cast<std::size_t>(b) * row.size() + i] == expected, "a row does not depend on others");
      }
    }
    require(k == k_single && v == v_single, "the cache does not depend on the batch");
  }
}

void test_errors_touch_nothing() {
  std::mt19937 random(1);
  const Decoder decoder(random, {8, 2, 1, 4, 8, 1e-6f}, 1);
  Floats k(12, 1.0f), v(12, 1.0f), hidden(8, 5.0f);
  const Floats inputs(8, 1.0f), before = k;
  const vitalrt::CpuStep step = decoder.step(k, v, 3);
  const std::int64_t position = 0;
  const auto refuses = [&](std::vector<std::int64_t> slots, std::int64_t length) {
    try {
      step.run({1, static_cast<std::int64_t>(slots.size()), slots.data(), &length, &position}, inputs.data(),
               hidden.data());
    } catch (const std::out_of_range&) {
      return k == before && v == before && hidden == Floats(8, 5.0f);
    }
    return false;
  };
  require(refuses({0, 1}, 2), "a row without a slot left is refused");
  require(refuses({0, 1}, -1), "a negative length is refused");
  require(refuses({0, 3}, 1), "an unknown slot is refused");
  require(refuses({-1, 1}, 1), "a negative slot is refused");
  require(refuses({}, 0), "a row without slots is refused");
}

}  // namespace

int main() {
  test_batches_equal_single_rows();
  test_errors_touch_nothing();
  return 0;
}
