// What a transformer layer does to rows of fp32 numbers on one CPU core. Knows neither Python nor torch.
//
// A row's result never depends on the other rows, and sums are added up in the same order on every processor.
#pragma once

#include <cstddef>
#include <cstdint>

namespace vitalrt {

// RMSNorm of each row; inputs and outputs may be the same. weight: [width].
void rms_norm(const float* inputs, const float* weight, std::size_t width, std::size_t num_rows, float eps,
              float* outputs);

// Turns the pairs (x_i, x_{i + D/2}) of one head of D = 2 * half numbers. turn: cosines [D / 2], then sines.
void rotate(float* head, const float* turn, std::size_t half);

// Softmax attention of one query head over num_tokens tokens. keys, values: this head's numbers of slot 0; slots are
// `stride` apart. scores: room for num_tokens numbers.
void attend(const float* query, const float* keys, const float* values, const std::int64_t* slots,
            std::size_t num_tokens, std::size_t stride, std::size_t head_dim, float* scores, float* output);

// gated [num_rows, width] = silu(gate) * up of rows [gate | up].
void swiglu(const float* gate_up, std::size_t width, std::size_t num_rows, float* gated);

}  // namespace vitalrt
