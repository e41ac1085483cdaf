// CUDA's words for the ones of Metal that the kernels use. Before it MLX includes CUDA's headers.
#define METAL_FUNC __device__ inline
#define threadgroup __shared__
#define thread_index_in_threadgroup threadIdx.x
#define thread_index_in_simdgroup (threadIdx.x % 32)
#define simdgroup_index_in_threadgroup (threadIdx.x / 32)
#define threadgroup_position_in_grid blockIdx

#ifndef INFINITY
#define INFINITY __int_as_float(0x7f800000)
#endif

using uint = unsigned int;
enum class mem_flags { mem_threadgroup };

// A block's barrier always fences the block's memory.
METAL_FUNC void threadgroup_barrier(mem_flags) {
  __syncthreads();
}

METAL_FUNC float simd_sum(float value) {
  for (int apart = 16; apart > 0; apart /= 2) {
    value += __shfl_xor_sync(0xffffffffu, value, apart);
  }
  return value;
}

METAL_FUNC uint simd_sum(uint value) {
  for (int apart = 16; apart > 0; apart /= 2) {
    value += __shfl_xor_sync(0xffffffffu, value, apart);
  }
  return value;
}

METAL_FUNC float simd_max(float value) {
  for (int apart = 16; apart > 0; apart /= 2) {
    value = max(value, __shfl_xor_sync(0xffffffffu, value, apart));
  }
  return value;
}

METAL_FUNC uint simd_prefix_exclusive_sum(uint value) {
  uint sum = value;
  for (uint apart = 1; apart < 32; apart *= 2) {
    const uint below = __shfl_up_sync(0xffffffffu, sum, apart);
    sum += thread_index_in_simdgroup >= apart ? below : 0;
  }
  return sum - value;
}
