// Between a kernel (shim.h) and what runs it (runtime.cpp).
#pragma once
#include <stddef.h>
#include <stdint.h>
#include <string.h>

using uint = unsigned int;

struct uint3 {
  uint x, y, z;
};

// Where a thread is; the names are Metal's attributes.
struct Position {
  uint3 thread_position_in_grid, thread_position_in_threadgroup, threadgroup_position_in_grid;
  uint3 threads_per_grid, threadgroups_per_grid, threads_per_threadgroup;
  uint thread_index_in_threadgroup, thread_index_in_simdgroup, simdgroup_index_in_threadgroup;
  uint simdgroups_per_threadgroup, threads_per_simdgroup;
};

extern "C" {
// Waits for the whole simdgroup; then the 16-byte slots of its lanes, and which lanes took part.
const unsigned char* emulator_exchange(const void* value, size_t bytes, int line, uint32_t* lanes);
// fences: 1 orders device memory, 2 threadgroup memory.
void emulator_barrier(bool whole_threadgroup, int fences, int line);
void* emulator_shared(int slot, size_t bytes, const char* name);
Position emulator_position();
}
