// What a kernel's text sees on a CPU: as much of the Metal shading language (or, with EMULATE_CUDA,
// of CUDA) as kernels here use. A word that is missing is a compile error, never a wrong number.
// runtime.cpp is the other side.
#pragma once
#include <cmath>

#include "runtime.h"

using ushort = unsigned short;

// emulator.py writes `threadgroup T name[n];` as EMULATOR_SHARED(slot, T, name, [n]).
#define EMULATOR_SHARED(slot, T, name, dimensions) \
  typedef T name##_array dimensions;               \
  name##_array& name =                             \
      *static_cast<name##_array*>(emulator_shared(slot, sizeof(name##_array), #name))
// Code of this file that the access checker shall not see.
#define EMULATOR_OWN __attribute__((no_sanitize("thread"), noinline))
#define EMULATOR_LINE int line = __builtin_LINE()

struct bfloat16_t {
  uint16_t bits;
  bfloat16_t() = default;
#ifndef EMULATE_CUDA
  explicit  // In Metal a float becomes a bfloat only by a cast.
#endif
      bfloat16_t(float value) {
    uint32_t word;
    memcpy(&word, &value, 4);
    bits = value != value ? 0x7fc0 : uint16_t((word + 0x7fff + ((word >> 16) & 1)) >> 16);
  }
  operator float() const {
    const uint32_t word = uint32_t(bits) << 16;
    float value;
    memcpy(&value, &word, 4);
    return value;
  }
};
using bfloat = bfloat16_t;
using half = _Float16;
using float16_t = half;

// The values of a simdgroup's lanes at one simd operation.
template <class T>
struct Lanes {
  const unsigned char* slots;
  uint32_t present;
  EMULATOR_OWN Lanes(T value, int line) {
    slots = emulator_exchange(&value, sizeof value, line, &present);
  }
  bool has(uint lane) const { return lane < 32 && (present >> lane & 1); }
  // Of a lane that takes no part, or that there is not: all bits set, NaN.
  EMULATOR_OWN T operator[](uint lane) const {
    T value;
    memset(&value, 0xff, sizeof value);
    if (has(lane)) memcpy(&value, slots + 16 * lane, sizeof value);
    return value;
  }
};

#ifdef EMULATE_CUDA

#define __global__
#define __device__
#define __grid_constant__
#define __shared__
using __nv_bfloat16 = bfloat16_t;
using __half = half;
struct Shape {
  int32_t sizes[10];
  int32_t operator[](int axis) const { return sizes[axis]; }
};
#define threadIdx (emulator_position().thread_position_in_threadgroup)
#define blockIdx (emulator_position().threadgroup_position_in_grid)
#define blockDim (emulator_position().threads_per_threadgroup)
#define gridDim (emulator_position().threadgroups_per_grid)
inline void __syncthreads(EMULATOR_LINE) { emulator_barrier(true, 3, line); }
inline void __syncwarp(EMULATOR_LINE) { emulator_barrier(false, 3, line); }
inline uint emulator_lane() { return emulator_position().thread_index_in_simdgroup; }
template <class T>
EMULATOR_OWN T __shfl_xor_sync(uint, T value, int mask, EMULATOR_LINE) {
  return Lanes<T>(value, line)[emulator_lane() ^ mask];
}
template <class T>
EMULATOR_OWN T __shfl_up_sync(uint, T value, uint delta, EMULATOR_LINE) {
  const uint lane = emulator_lane();
  return Lanes<T>(value, line)[lane >= delta ? lane - delta : lane];
}
inline float exp(float x) { return ::expf(x); }
inline float log(float x) { return ::logf(x); }
inline float sqrt(float x) { return ::sqrtf(x); }
inline float tanh(float x) { return ::tanhf(x); }
inline float fabs(float x) { return ::fabsf(x); }
inline float max(float a, float b) { return ::fmaxf(a, b); }

#else

enum class mem_flags { mem_none = 0, mem_device = 1, mem_threadgroup = 2 };

namespace metal {
inline float exp(float x) { return ::expf(x); }
inline float log(float x) { return ::logf(x); }
inline float sqrt(float x) { return ::sqrtf(x); }
inline float tanh(float x) { return ::tanhf(x); }
inline float fabs(float x) { return ::fabsf(x); }
inline float max(float a, float b) { return ::fmaxf(a, b); }
inline int max(int a, int b) { return a < b ? b : a; }
inline uint max(uint a, uint b) { return a < b ? b : a; }
namespace fast {
using metal::exp;
using metal::log;
}  // namespace fast

// In the order of a butterfly: 16 lanes apart, then 8, 4, 2, 1.
template <class T, class Combine>
EMULATOR_OWN T reduce(T value, int line, Combine combine) {
  const Lanes<T> lanes(value, line);
  T values[32];
  bool present[32];
  for (uint i = 0; i < 32; i++) values[i] = lanes[i], present[i] = lanes.has(i);
  for (uint apart = 16; apart; apart /= 2)
    for (uint i = 0; i < apart; i++) {
      if (!present[i + apart]) continue;
      values[i] = present[i] ? combine(values[i], values[i + apart]) : values[i + apart];
      present[i] = true;
    }
  return values[0];
}
template <class T>
T simd_sum(T value, EMULATOR_LINE) {
  return reduce(value, line, [](T a, T b) { return T(a + b); });
}
template <class T>
T simd_max(T value, EMULATOR_LINE) {
  return reduce(value, line, [](T a, T b) { return a < b ? b : a; });
}
template <class T>
EMULATOR_OWN T simd_prefix_exclusive_sum(T value, EMULATOR_LINE) {
  const Lanes<T> lanes(value, line);
  const uint self = emulator_position().thread_index_in_simdgroup;
  T sum = T(0);
  for (uint i = 0; i < self; i++)
    if (lanes.has(i)) sum = T(sum + lanes[i]);
  return sum;
}
template <class T>
EMULATOR_OWN T simd_shuffle_xor(T value, ushort mask, EMULATOR_LINE) {
  return Lanes<T>(value, line)[emulator_position().thread_index_in_simdgroup ^ mask];
}
inline void threadgroup_barrier(mem_flags flags, EMULATOR_LINE) {
  emulator_barrier(true, int(flags), line);
}
inline void simdgroup_barrier(mem_flags flags, EMULATOR_LINE) {
  emulator_barrier(false, int(flags), line);
}
}  // namespace metal
using namespace metal;

#define device
#define constant
#define thread
#define threadgroup
#define kernel
#define METAL_FUNC inline
// Not in Metal, but in what is included above.
#pragma GCC poison double expm1 log1p erf erfc tgamma lgamma

#endif
