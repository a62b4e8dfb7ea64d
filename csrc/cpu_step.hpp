// One decoder step of a running batch on one CPU core, in fp32. Knows neither Python nor torch.
//
// A small model's step is thousands of operations of microseconds each: calling them one by one costs more than doing
// them. Here a step is one call, and every weight is read once for all rows of the batch.
//
// B sequences, d width, H query heads, G key/value heads, D head dim, F FFN width, S cache slots. Row-major throughout.
#pragma once

#include <cstdint>
#include <vector>

namespace vitalrt {

struct StepShape {
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

// Keys and values of all layers: each [layers, S, G, D].
struct StepCache {
  float* k;
  float* v;
  std::int64_t num_slots;
};

// slots: [B, row_length], the cache slot of each token of a sequence. lengths: [B], how many of its tokens are in the
// cache; this step's token goes to slots[b][lengths[b]]. positions: [B], the same on all three M-RoPE axes.
struct StepRows {
  std::int64_t batch;
  std::int64_t row_length;
  const std::int64_t* slots;
  const std::int64_t* lengths;
  const std::int64_t* positions;
};

class CpuStep {
 public:
  // Keeps the pointers, not what they point at. final_norm: [d]. inverse_frequencies: [D / 2].
  // Throws std::invalid_argument on a shape without a meaning.
  CpuStep(const StepShape& shape, std::vector<LayerWeights> layers, const float* final_norm,
          const float* inverse_frequencies, const StepCache& cache);

  // Appends one token per row to the cache, in place. inputs: [B, d] embeddings. hidden: [B, d], written: the hidden
  // states after the final norm. A row's result does not depend on the others, to the last bit.
  // Throws std::out_of_range, touching nothing, where a row has no slot left or a slot is not in the cache.
  void run(const StepRows& rows, const float* inputs, float* hidden) const;

 private:
  void check(const StepRows& rows) const;

  StepShape shape_;
  std::vector<LayerWeights> layers_;
  const float* final_norm_;
  const float* inverse_frequencies_;
  StepCache cache_;
};

}  // namespace vitalrt
