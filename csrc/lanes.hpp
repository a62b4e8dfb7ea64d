// Eight fp32 numbers side by side, a register of AVX; the compiler makes do with less where there is none.
#pragma once

#include <cstddef>
#include <cstring>

#define VITALRT_INLINE inline __attribute__((always_inline))

namespace vitalrt {

constexpr std::size_t kLanes = 8;
typedef float Lanes __attribute__((vector_size(4 * kLanes)));

// Lanes go to and from functions by reference only: how they would go by value depends on the processor. Memory needs
// no alignment.
VITALRT_INLINE void load(const float* numbers, Lanes& lanes) { std::memcpy(&lanes, numbers, sizeof lanes); }
VITALRT_INLINE void store(float* numbers, const Lanes& lanes) { std::memcpy(numbers, &lanes, sizeof lanes); }

}  // namespace vitalrt
