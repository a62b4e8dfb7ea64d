#include "cpu_decoder.hpp"

#include <algorithm>
#include <atomic>
#include <cmath>
#include <cstddef>
#include <exception>
#include <functional>
#include <mutex>
#include <stdexcept>
#include <string>

#include "cpu_kernels.hpp"

namespace vitalrt {
namespace {

using std::size_t;

// What makes waking another thread worth it, some 20 microseconds of work.
constexpr size_t kProductsPerThread = 1'000'000;

size_t to_size(std::int64_t value) { return static_cast<size_t>(value); }

// Calls work(0), .. work(count - 1), each once, on whichever thread of the team comes first.
void share_out(size_t count, const Team& team, const std::function<void(size_t)>& work) {
  if (count == 1) {
    work(0);
    return;
  }
  struct Shared {
    const std::function<void(size_t)>& work;
    const size_t count;
    std::atomic<size_t> next{0};
    std::exception_ptr failure{};
    std::mutex mutex{};
  } shared{work, count};
  const auto take = [](void* data) {
    Shared& all = *static_cast<Shared*>(data);
    for (size_t n = all.next++; n < all.count; n = all.next++) {
      try {
        all.work(n);
      } catch (...) {
        const std::lock_guard<std::mutex> lock(all.mutex);
        all.failure = std::current_exception();
      }
    }
  };
  // The whole team, as torch asks for it: of another size, threads would end and begin anew.
  team.start(take, &shared, static_cast<unsigned>(team.num_threads), 0);
  if (shared.failure) {
    std::rethrow_exception(shared.failure);
  }
}

// Moves the listed rows, ascending, to the front.
void keep_rows(std::vector<float>& numbers, size_t width, const std::vector<size_t>& rows) {
  for (size_t n = 0; n < rows.size(); ++n) {
    if (rows[n] != n) {
      std::copy_n(&numbers[rows[n] * width], width, &numbers[n * width]);
    }
  }
}

}  // namespace

CpuDecoder::CpuDecoder(const DecoderShape& shape, const std::vector<LayerWeights>& layers, const float* final_norm,
                       const Rope& rope, const DecoderCache& cache)
    : shape_(shape), final_norm_(final_norm), rope_(rope), cache_(cache) {
  if (std::min({shape.hidden_size, shape.num_heads, shape.num_kv_heads, shape.head_dim, shape.intermediate_size,
                cache.num_slots}) < 1) {
    throw std::invalid_argument("shape: expected sizes of at least 1");
  }
  if (shape.num_heads % shape.num_kv_heads != 0 || shape.head_dim % 2 != 0) {
    throw std::invalid_argument("shape: expected num_heads in multiples of num_kv_heads and an even head_dim");
  }
  const size_t width = to_size(shape.hidden_size), ffn_width = to_size(shape.intermediate_size);
  const size_t q_width = to_size(shape.num_heads * shape.head_dim);
  const size_t kv_width = to_size(shape.num_kv_heads * shape.head_dim);
  for (const LayerWeights& layer : layers) {
    layers_.push_back({layer.input_norm, layer.qk_norm, layer.post_norm,
                       PackedMatrix(layer.qkv, q_width + 2 * kv_width, width), PackedMatrix(layer.o, width, q_width),
                       PackedMatrix(layer.gate_up, 2 * ffn_width, width),
                       PackedMatrix(layer.down, width, ffn_width)});
  }
  num_weights_ = layers.size() * width * (2 * (q_width + kv_width) + 3 * ffn_width);
}

size_t CpuDecoder::num_bytes() const {
  size_t total = 0;
  for (const Layer& layer : layers_) {
    total += layer.qkv.num_bytes() + layer.o.num_bytes() + layer.gate_up.num_bytes() + layer.down.num_bytes();
  }
  return total;
}

std::vector<CpuDecoder::Place> CpuDecoder::places_of(const NewTokens& tokens) const {
  std::vector<Place> places;
  for (std::int64_t b = 0; b < tokens.batch; ++b) {
    const std::int64_t length = tokens.lengths[b], count = tokens.counts[b];
    if (length < 0 || count < 1 || count > tokens.row_length - length) {
      throw std::out_of_range("lengths, counts: expected 0 to " + std::to_string(tokens.row_length) +
                              " tokens with at least 1 of them new, got " + std::to_string(length) + " and " +
                              std::to_string(count) + " in row " + std::to_string(b));
    }
    const std::int64_t* slots = tokens.slots + b * tokens.row_length;
    const auto [lowest, highest] = std::minmax_element(slots, slots + length + count);
    if (*lowest < 0 || *highest >= cache_.num_slots) {
      throw std::out_of_range("slots: expected 0 to " + std::to_string(cache_.num_slots - 1) + " in row " +
                              std::to_string(b));
    }
    for (std::int64_t index = length; index < length + count; ++index) {
      places.push_back({slots, to_size(index)});
    }
  }
  return places;
}

// [tokens, D], of a part's: cosines [D / 2], then sines.
std::vector<float> CpuDecoder::turns_of(const NewTokens& tokens, size_t num_tokens, const Part& part) const {
  const size_t half = to_size(shape_.head_dim) / 2;
  std::vector<float> turns((part.last_token - part.first_token) * 2 * half);
  float* turn = turns.data();
  for (size_t t = part.first_token; t < part.last_token; ++t, turn += 2 * half) {
    for (size_t i = 0; i < half; ++i) {
      const size_t axis = tokens.num_axes == 1 ? 0 : to_size(rope_.axes[i]);
      const float angle = static_cast<float>(tokens.positions[axis * num_tokens + t]) * rope_.inverse_frequencies[i];
      turn[i] = std::cos(angle);
      turn[half + i] = std::sin(angle);
    }
  }
  return turns;
}

// As many parts as there are threads, of about as many tokens each, and at least one sequence.
std::vector<CpuDecoder::Part> CpuDecoder::parts_of(const NewTokens& tokens, size_t num_tokens, const Team& team) const {
  const size_t batch = to_size(tokens.batch), most_parts = num_tokens * num_weights_ / kProductsPerThread + 1;
  const size_t num_parts = team.start == nullptr ? 1 : std::min({team.num_threads, batch, most_parts});
  std::vector<Part> parts;
  Part part{};
  for (size_t n = 0; n < num_parts; ++n) {
    part = {part.last_sequence, part.last_sequence, part.last_token, part.last_token};
    const size_t share = num_tokens * (n + 1) / num_parts, last = batch - (num_parts - 1 - n);
    do {
      part.last_token += to_size(tokens.counts[part.last_sequence++]);
    } while (part.last_sequence < last && part.last_token < share);
    parts.push_back(part);
  }
  return parts;
}

void CpuDecoder::run(const NewTokens& tokens, const Deepstack& deepstack, const float* inputs, float* hidden,
                     const Team& team) const {
  const std::vector<Place> places = places_of(tokens);
  if (places.empty()) {
    return;
  }
  for (std::int64_t n = 0; n < deepstack.num_rows; ++n) {
    if (deepstack.rows[n] < 0 || to_size(deepstack.rows[n]) >= places.size()) {
      throw std::out_of_range("image_rows: expected 0 to " + std::to_string(places.size() - 1) + ", got " +
                              std::to_string(deepstack.rows[n]));
    }
  }
  const std::vector<Part> parts = parts_of(tokens, places.size(), team);
  share_out(parts.size(), team, [&](size_t n) { run_part(parts[n], tokens, places, deepstack, inputs, hidden); });
}

void CpuDecoder::run_part(const Part& part, const NewTokens& tokens, const std::vector<Place>& all_places,
                          const Deepstack& deepstack, const float* inputs, float* hidden) const {
  std::vector<Place> places(&all_places[part.first_token], &all_places[part.last_token - 1] + 1);
  size_t num_rows = places.size();
  std::vector<size_t> last_rows;
  for (size_t b = part.first_sequence; b < part.last_sequence; ++b) {
    last_rows.push_back(to_size(tokens.counts[b]) + (last_rows.empty() ? 0 : last_rows.back() + 1) - 1);
  }

  const size_t width = to_size(shape_.hidden_size), head_dim = to_size(shape_.head_dim);
  const size_t num_heads = to_size(shape_.num_heads), num_kv_heads = to_size(shape_.num_kv_heads);
  const size_t q_width = num_heads * head_dim, kv_width = num_kv_heads * head_dim, qkv_width = q_width + 2 * kv_width;
  const size_t ffn_width = to_size(shape_.intermediate_size);
  const float eps = shape_.rms_norm_eps;

  std::vector<float> x(inputs + part.first_token * width, inputs + part.last_token * width), normed(num_rows * width);
  std::vector<float> qkv(num_rows * qkv_width), attended(num_rows * q_width);
  std::vector<float> gate_up(num_rows * 2 * ffn_width), gated(num_rows * ffn_width);
  std::vector<float> scores(to_size(tokens.row_length));
  const std::vector<float> turns = turns_of(tokens, all_places.size(), part);

  const size_t layer_size = to_size(cache_.num_slots) * kv_width;
  for (size_t layer = 0; layer < layers_.size(); ++layer) {
    const Layer& weights = layers_[layer];
    float* keys = cache_.k + layer * layer_size;
    float* values = cache_.v + layer * layer_size;

    rms_norm(x.data(), weights.input_norm, width, num_rows, eps, normed.data());
    weights.qkv.multiply(normed.data(), num_rows, qkv.data(), false);
    for (size_t n = 0; n < num_rows; ++n) {
      float* row = &qkv[n * qkv_width];
      for (size_t head = 0; head < num_heads + num_kv_heads; ++head) {
        rms_norm(row + head * head_dim, weights.qk_norm + head * head_dim, head_dim, 1, eps, row + head * head_dim);
        rotate(row + head * head_dim, &turns[n * head_dim], head_dim / 2);
      }
      const size_t slot = to_size(places[n].slots[places[n].index]) * kv_width;
      std::copy_n(row + q_width, kv_width, keys + slot);
      std::copy_n(row + q_width + kv_width, kv_width, values + slot);
    }
    // The last layer need not finish the other rows, unless deepstack still adds to them there.
    if (layer + 1 == layers_.size() && deepstack.features.size() <= layer) {
      keep_rows(x, width, last_rows);
      keep_rows(qkv, qkv_width, last_rows);
      for (size_t b = 0; b < last_rows.size(); ++b) {
        places[b] = places[last_rows[b]];
      }
      num_rows = last_rows.size();
    }
    for (size_t n = 0; n < num_rows; ++n) {
      for (size_t head = 0; head < num_heads; ++head) {
        const size_t shared = head / (num_heads / num_kv_heads) * head_dim;
        attend(&qkv[n * qkv_width + head * head_dim], keys + shared, values + shared, places[n].slots,
               places[n].index + 1, kv_width, head_dim, scores.data(), &attended[n * q_width + head * head_dim]);
      }
    }
    weights.o.multiply(attended.data(), num_rows, x.data(), true);

    rms_norm(x.data(), weights.post_norm, width, num_rows, eps, normed.data());
    weights.gate_up.multiply(normed.data(), num_rows, gate_up.data(), false);
    swiglu(gate_up.data(), ffn_width, num_rows, gated.data());
    weights.down.multiply(gated.data(), num_rows, x.data(), true);
    if (layer < deepstack.features.size()) {
      for (size_t n = 0; n < to_size(deepstack.num_rows); ++n) {
        const size_t token = to_size(deepstack.rows[n]);
        if (token < part.first_token || token >= part.last_token) {
          continue;
        }
        float* row = &x[(token - part.first_token) * width];
        const float* feature = deepstack.features[layer] + n * width;
        std::transform(row, row + width, feature, row, std::plus<>());
      }
    }
  }
  if (num_rows > last_rows.size()) {
    keep_rows(x, width, last_rows);
  }
  rms_norm(x.data(), final_norm_, width, last_rows.size(), eps, hidden + part.first_sequence * width);
}

}  // namespace vitalrt
