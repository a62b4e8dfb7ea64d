// A small decoder's forward pass on the CPU, in fp32. Knows neither Python nor torch.
//
// A small model's pass is thousands of operations of microseconds each: calling them one by one costs more than doing
// them. Here a pass is one call, over whole prompts or over one new token of each running sequence.
//
// B sequences, T new tokens of all of them, d width, H query heads, G key/value heads, D head dim, F FFN width,
// S cache slots, V visual tokens. Row-major throughout.
#pragma once

#include <cstddef>
#include <cstdint>
#include <vector>

#include "packed_matrix.hpp"

namespace vitalrt {

struct DecoderShape {
  std::int64_t hidden_size;        // d
  std::int64_t num_heads;          // H, a multiple of G
  std::int64_t num_kv_heads;       // G
  std::int64_t head_dim;           // D, even
  std::int64_t intermediate_size;  // F
  float rms_norm_eps;
};

struct LayerWeights {
  const float* input_norm;  // [d]
  const float* qkv;         // [(H + 2G) * D, d], rows q | k | v
  const float* qk_norm;     // [H + G, D]
  const float* o;           // [d, H * D]
  const float* post_norm;   // [d]
  const float* gate_up;     // [2F, d], rows gate | up
  const float* down;        // [d, F]
};

// inverse_frequencies: [D / 2]. axes: [D / 2], which of the three M-RoPE axes turns each frequency.
struct Rope {
  const float* inverse_frequencies;
  const std::int64_t* axes;
};

// Keys and values of all layers: each [layers, S, G, D].
struct DecoderCache {
  float* k;
  float* v;
  std::int64_t num_slots;
};

// slots: [B, row_length], the cache slot of each token of a sequence. lengths: [B], how many of its tokens are in the
// cache. counts: [B], how many are new, at least 1; they go to slots[b][lengths[b]] and on. The new tokens lie packed,
// sequence after sequence. positions: [num_axes, T], num_axes 3, or 1 where the three M-RoPE axes agree.
struct NewTokens {
  std::int64_t batch;
  std::int64_t row_length;
  const std::int64_t* slots;
  const std::int64_t* lengths;
  const std::int64_t* counts;
  std::int64_t num_axes;
  const std::int64_t* positions;
};

// rows: [V], which of the T new tokens are visual. features: [V, d] each, added to them after layer 0, 1, ...
struct Deepstack {
  std::int64_t num_rows = 0;
  const std::int64_t* rows = nullptr;
  std::vector<const float*> features = {};
};

// Somebody's threads. start: calls a function with its data on num_threads of them, the caller's included, and returns
// when all are done: GOMP_parallel of any OpenMP, its last argument 0. Without it there is one thread, the caller's.
struct Team {
  void (*start)(void (*function)(void*), void* data, unsigned num_threads, unsigned flags) = nullptr;
  std::size_t num_threads = 1;
};

class CpuDecoder {
 public:
  // Copies the matrices; of all else it keeps the pointers, not what they point at. final_norm: [d].
  // Throws std::invalid_argument on a shape without a meaning.
  CpuDecoder(const DecoderShape& shape, const std::vector<LayerWeights>& layers, const float* final_norm,
             const Rope& rope, const DecoderCache& cache);

  // Appends the new tokens to the cache, in place. inputs: [T, d] embeddings. hidden: [B, d], written: the hidden state
  // of each sequence's last new token after the final norm. A sequence's result does not depend on the others, to the
  // last bit; the team shares the sequences out.
  // Throws std::out_of_range, touching nothing, where a row has no slot left, a slot is not in the cache, or a visual
  // row is not among the new tokens.
  void run(const NewTokens& tokens, const Deepstack& deepstack, const float* inputs, float* hidden,
           const Team& team = {}) const;

  // Of the matrices.
  std::size_t num_bytes() const;

 private:
  struct Layer {
    const float *input_norm, *qk_norm, *post_norm;
    PackedMatrix qkv, o, gate_up, down;
  };

  // Where a new token stands: its sequence's slots, and how many of them hold what came before it.
  struct Place {
    const std::int64_t* slots;
    std::size_t index;
  };

  // Sequences, and their new tokens, that one thread sees to: first to last - 1.
  struct Part {
    std::size_t first_sequence, last_sequence, first_token, last_token;
  };

  std::vector<Place> places_of(const NewTokens& tokens) const;
  std::vector<Part> parts_of(const NewTokens& tokens, std::size_t num_tokens, const Team& team) const;
  std::vector<float> turns_of(const NewTokens& tokens, std::size_t num_tokens, const Part& part) const;
  void run_part(const Part& part, const NewTokens& tokens, const std::vector<Place>& places, const Deepstack& deepstack,
                const float* inputs, float* hidden) const;

  DecoderShape shape_;
  std::vector<Layer> layers_;
  std::size_t num_weights_;  // of all matrices
  const float* final_norm_;
  Rope rope_;
  DecoderCache cache_;
};

}  // namespace vitalrt
