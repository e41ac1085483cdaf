// The K largest logits of a row, and the log-sum-exp of all of them, in one reading.
//
// inputs   logits [n, V] T
// outputs  values [n, K] T, indices [n, K] int, log_sum_exp [n] float
// template T, K (at most V), CAPACITY (a power of 2, at least K + THREADS), THREADS
// launch   a threadgroup of THREADS for each row
//
// Logits that come before the K-th best so far are collected. When there is no room for more they
// are sorted, and all but K forgotten. No two are equal in that order, so that the result does not
// depend on who came first.
threadgroup float held[CAPACITY];
threadgroup uint held_index[CAPACITY];
threadgroup float scratch[THREADS / 32];
threadgroup uint counts[THREADS / 32];
const uint self = thread_index_in_threadgroup;
const uint lane = thread_index_in_simdgroup;
const uint simdgroup = simdgroup_index_in_threadgroup;
const uint row = threadgroup_position_in_grid.x;
const uint width = logits_shape[1];
const size_t begin = size_t(row) * width;
// An empty place comes after a logit of -inf too.
const uint nowhere = 0xffffffffu;

for (uint i = self; i < CAPACITY; i += THREADS) {
  held[i] = -INFINITY;
  held_index[i] = nowhere;
}
uint holding = 0;
float last = -INFINITY;
uint last_index = nowhere;
Softmax mine = empty_softmax();
for (uint tile = 0; tile < width + THREADS; tile += THREADS) {
  const uint j = tile + self;
  float x = -INFINITY;
  bool wanted = false;
  if (j < width) {
    x = static_cast<float>(logits[begin + j]);
    mine = with_another(mine, x, 1.0f);
    wanted = comes_before(x, j, last, last_index);
  }
  const uint one = wanted ? 1 : 0;
  const uint before = simd_prefix_exclusive_sum(one);
  const uint count = gather(simd_sum(one), 0u, counts, lane, simdgroup, THREADS / 32);
  const uint arriving = simd_sum(count);
  const uint before_simdgroup = simd_sum(lane < simdgroup ? count : 0u);
  if (holding + arriving > CAPACITY || tile >= width) {
    // Bitonic: runs of `size` are sorted, every second one backwards, from those half as long.
    for (uint size = 2; size <= CAPACITY; size *= 2) {
      for (uint apart = size / 2; apart > 0; apart /= 2) {
        for (uint i = self; i < CAPACITY / 2; i += THREADS) {
          const uint low = 2 * i - (i & (apart - 1));
          const uint high = low + apart;
          const float x_low = held[low];
          const float x_high = held[high];
          const uint index_low = held_index[low];
          const uint index_high = held_index[high];
          const bool forwards = (low & size) == 0;
          if (comes_before(x_high, index_high, x_low, index_low) == forwards) {
            held[low] = x_high;
            held[high] = x_low;
            held_index[low] = index_high;
            held_index[high] = index_low;
          }
        }
        threadgroup_barrier(mem_flags::mem_threadgroup);
      }
    }
    for (uint i = K + self; i < CAPACITY; i += THREADS) {
      held[i] = -INFINITY;
      held_index[i] = nowhere;
    }
    holding = holding < K ? holding : K;
    last = held[K - 1];
    last_index = held_index[K - 1];
    threadgroup_barrier(mem_flags::mem_threadgroup);
  }
  if (wanted) {
    const uint place = holding + before_simdgroup + before;
    held[place] = x;
    held_index[place] = j;
  }
  holding += arriving;
}

for (uint i = self; i < K; i += THREADS) {
  values[size_t(row) * K + i] = static_cast<T>(held[i]);
  indices[size_t(row) * K + i] = held_index[i];
}
const Softmax all = block_softmax(mine, 1.0f, scratch, lane, simdgroup, THREADS / 32);
if (self == 0) {
  log_sum_exp[row] = all.most + log(all.sum);
}
