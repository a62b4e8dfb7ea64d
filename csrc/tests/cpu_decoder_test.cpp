// The decoder under sanitizers: memory of exactly the promised sizes, odd shapes, batches of steps and of prompts
// against single sequences. That its numbers are right is shown against torch, in tests/engine/test_cpu_decoder.py.
#include "cpu_decoder.hpp"

#include <cmath>
#include <cstddef>
#include <cstdint>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <random>
#include <stdexcept>
#include <thread>
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
  // fits_bf16: whether the lower halves of all numbers are zero, so that the core may leave them out.
  Decoder(std::mt19937& random, const vitalrt::DecoderShape& shape, std::int64_t num_layers, bool fits_bf16)
      : shape(shape) {
    const std::int64_t d = shape.hidden_size, ffn = shape.intermediate_size;
    const std::int64_t q = shape.num_heads * shape.head_dim, kv = shape.num_kv_heads * shape.head_dim;
    for (std::int64_t layer = 0; layer < num_layers; ++layer) {
      for (const std::int64_t size : {d, (q + 2 * kv) * d, q + kv, d * q, d, 2 * ffn * d, d * ffn}) {
        numbers.push_back(random_floats(random, size));
        for (float& number : numbers.back()) {
          std::uint32_t word;
          std::memcpy(&word, &number, sizeof word);
          word &= fits_bf16 ? 0xffff0000u : 0xffffffffu;
          std::memcpy(&number, &word, sizeof word);
        }
      }
    }
    final_norm = random_floats(random, d);
    inverse_frequencies = random_floats(random, shape.head_dim / 2);
    for (std::int64_t i = 0; i < shape.head_dim / 2; ++i) {
      axes.push_back(i % 3);
    }
  }

  vitalrt::CpuDecoder over(Floats& k, Floats& v, std::int64_t num_slots) const {
    std::vector<vitalrt::LayerWeights> layers;
    for (std::size_t i = 0; i < numbers.size(); i += 7) {
      layers.push_back({numbers[i].data(), numbers[i + 1].data(), numbers[i + 2].data(), numbers[i + 3].data(),
                        numbers[i + 4].data(), numbers[i + 5].data(), numbers[i + 6].data()});
    }
    return vitalrt::CpuDecoder(shape, layers, final_norm.data(), {inverse_frequencies.data(), axes.data()},
                               {k.data(), v.data(), num_slots});
  }

  vitalrt::DecoderShape shape;
  std::vector<Floats> numbers;
  Floats final_norm, inverse_frequencies;
  std::vector<std::int64_t> axes;
};

// A sequence's share of a batch. visual: which of its new tokens get deepstack features.
struct Part {
  std::vector<std::int64_t> slots, visual;
  std::int64_t length, count;
  std::vector<std::int64_t> positions;  // [3, count]
  Floats inputs;                        // [count, d]
  std::vector<Floats> deepstack;        // [visual, d] each
};

// Runs the parts packed, as NewTokens and Deepstack want them.
Floats run(const vitalrt::CpuDecoder& decoder, const std::vector<Part>& parts, std::size_t width,
           const vitalrt::Team& team = {}) {
  std::vector<std::int64_t> slots, lengths, counts, positions, visual;
  Floats inputs;
  std::vector<Floats> deepstack(parts[0].deepstack.size());
  for (const Part& part : parts) {
    for (const std::int64_t token : part.visual) {
      visual.push_back(static_cast<std::int64_t>(inputs.size() / width) + token);
    }
    slots.insert(slots.end(), part.slots.begin(), part.slots.end());
    lengths.push_back(part.length);
    counts.push_back(part.count);
    inputs.insert(inputs.end(), part.inputs.begin(), part.inputs.end());
    for (std::size_t layer = 0; layer < deepstack.size(); ++layer) {
      deepstack[layer].insert(deepstack[layer].end(), part.deepstack[layer].begin(), part.deepstack[layer].end());
    }
  }
  for (std::int64_t axis = 0; axis < 3; ++axis) {
    for (const Part& part : parts) {
      const auto first = part.positions.begin() + axis * part.count;
      positions.insert(positions.end(), first, first + part.count);
    }
  }
  vitalrt::Deepstack features{static_cast<std::int64_t>(visual.size()), visual.data(), {}};
  for (const Floats& layer : deepstack) {
    features.features.push_back(layer.data());
  }
  Floats hidden(parts.size() * width);
  decoder.run({static_cast<std::int64_t>(parts.size()), static_cast<std::int64_t>(parts[0].slots.size()),
               slots.data(), lengths.data(), counts.data(), 3, positions.data()},
              features, inputs.data(), hidden.data(), team);
  return hidden;
}

// As GOMP_parallel.
void start_threads(void (*function)(void*), void* data, unsigned num_threads, unsigned) {
  std::vector<std::thread> others;
  for (unsigned n = 1; n < num_threads; ++n) {
    others.emplace_back(function, data);
  }
  function(data);
  for (std::thread& other : others) {
    other.join();
  }
}

// max_count 1: steps. More: prompts. With a large shape there is enough to do for several threads.
void test_batches_equal_single_sequences(int num_rounds, std::int64_t max_count, std::int64_t scale = 1) {
  std::mt19937 random(0);
  for (int round = 0; round < num_rounds; ++round) {
    const auto draw = [&](std::int64_t low, std::int64_t high) {
      return low + static_cast<std::int64_t>(random() % static_cast<std::uint32_t>(high - low + 1));
    };
    const std::int64_t groups = draw(1, 3), num_layers = draw(1, 3), batch = draw(1, 7), num_features = draw(0, 3);
    const vitalrt::DecoderShape shape{scale * draw(1, 40), groups * draw(1, 3), groups, 2 * draw(1, 11),
                                      scale * draw(1, 50), 1e-6f};
    const Decoder decoder(random, shape, num_layers, round % 2 == 1);
    const std::int64_t row_length = draw(max_count, max_count + 8), num_slots = batch * row_length;
    // Sequence b owns the slots that leave the rest b when divided by the batch size: no two neighbours.
    std::vector<Part> parts;
    for (std::int64_t b = 0; b < batch; ++b) {
      Part part;
      for (std::int64_t t = 0; t < row_length; ++t) {
        part.slots.push_back(t * batch + b);
      }
      part.count = draw(1, max_count);
      part.length = draw(0, row_length - part.count);
      for (std::int64_t t = 0; t < part.count; ++t) {
        if (draw(0, 2) == 0) {
          part.visual.push_back(t);
        }
      }
      for (std::int64_t i = 0; i < 3 * part.count; ++i) {
        part.positions.push_back(draw(0, 10000));
      }
      part.inputs = random_floats(random, part.count * shape.hidden_size);
      for (std::int64_t i = 0; i < num_features; ++i) {
        const auto num_visual = static_cast<std::int64_t>(part.visual.size());
        part.deepstack.push_back(random_floats(random, num_visual * shape.hidden_size));
      }
      parts.push_back(part);
    }
    const std::int64_t slot_size = shape.num_kv_heads * shape.head_dim, size = num_layers * num_slots * slot_size;
    Floats k = random_floats(random, size), v = random_floats(random, size), k_single = k, v_single = v;

    const auto width = static_cast<std::size_t>(shape.hidden_size);
    const vitalrt::Team team{start_threads, static_cast<std::size_t>(draw(1, 5))};
    const Floats hidden = run(decoder.over(k, v, num_slots), parts, width, team);
    const vitalrt::CpuDecoder single = decoder.over(k_single, v_single, num_slots);
    for (std::size_t b = 0; b < parts.size(); ++b) {
      const Floats row = run(single, {parts[b]}, width);
      for (std::size_t i = 0; i < width; ++i) {
        require(std::isfinite(row[i]), "finite inputs give finite results");
        require(hidden[b * width + i] == row[i], "a sequence does not depend on others");
      }
    }
    require(k == k_single && v == v_single, "the cache does not depend on the batch");
  }
}

void test_errors_touch_nothing() {
  std::mt19937 random(1);
  const Decoder weights(random, {8, 2, 1, 4, 8, 1e-6f}, 1, false);
  Floats k(12, 1.0f), v(12, 1.0f), hidden(8, 5.0f);
  const Floats inputs(16, 1.0f), before = k;
  const vitalrt::CpuDecoder decoder = weights.over(k, v, 3);
  const std::vector<std::int64_t> positions(2, 0);
  const auto refuses = [&](std::vector<std::int64_t> slots, std::int64_t length, std::int64_t count = 1,
                           std::int64_t visual = 0) {
    try {
      decoder.run({1, static_cast<std::int64_t>(slots.size()), slots.data(), &length, &count, 1, positions.data()},
                  {1, &visual, {inputs.data()}}, inputs.data(), hidden.data());
    } catch (const std::out_of_range&) {
      return k == before && v == before && hidden == Floats(8, 5.0f);
    }
    return false;
  };
  require(refuses({0, 1}, 2), "a row without a slot left is refused");
  require(refuses({0, 1}, 1, 2), "more new tokens than slots left are refused");
  require(refuses({0, 1}, 1, 0), "a sequence without new tokens is refused");
  require(refuses({0, 1}, -1), "a negative length is refused");
  require(refuses({0, 3}, 1), "an unknown slot is refused");
  require(refuses({-1, 1}, 1), "a negative slot is refused");
  require(refuses({}, 0), "a row without slots is refused");
  require(refuses({0, 1}, 0, 2, 2), "a visual row beyond the new tokens is refused");
  require(refuses({0, 1}, 0, 2, -1), "a negative visual row is refused");
}

}  // namespace

int main() {
  test_batches_equal_single_sequences(60, 1);
  test_batches_equal_single_sequences(60, 30);
  test_batches_equal_single_sequences(10, 30, 8);
  test_errors_touch_nothing();
  return 0;
}
