// 1 - cosine of a student's mean hidden state and its teacher's, and the gradient.
//
// inputs   student [groups, span, d] T, teacher [groups, d] U, mask [groups, span] bool,
//          weights [groups] float
// outputs  value [groups] float, gradient [groups, span, d] T
// template T, U, COLUMNS = ceil(d / THREADS), THREADS
// launch   a threadgroup of THREADS for each group
//
// The mean is over the span's positions that the mask keeps; nothing else is read, and a group
// without one gives 0. With a span of 1 each position is compared by itself. Both outputs are
// multiplied by the group's weight.
threadgroup float scratch[THREADS / 32];
const uint self = thread_index_in_threadgroup;
const uint lane = thread_index_in_simdgroup;
const uint simdgroup = simdgroup_index_in_threadgroup;
const uint group = threadgroup_position_in_grid.x;
const uint span = student_shape[1];
const uint width = student_shape[2];
const size_t begin = size_t(group) * span * width;
const size_t first = size_t(group) * span;
// Squared norms below this count as this, so that a zero vector has a finite gradient.
const float least_squared_norm = 1e-12f;

uint kept = 0;
for (uint i = 0; i < span; i++) {
  kept += mask[first + i] ? 1 : 0;
}
const float share = kept > 0 ? 1.0f / static_cast<float>(kept) : 0.0f;

float means[COLUMNS];
float ours_squared = 0.0f;
float theirs_squared = 0.0f;
float product = 0.0f;
for (uint column = 0; column < COLUMNS; column++) {
  const uint j = column * THREADS + self;
  float sum = 0.0f;
  float theirs = 0.0f;
  if (j < width && kept > 0) {
    for (uint i = 0; i < span; i++) {
      if (mask[first + i]) {
        sum += static_cast<float>(student[begin + size_t(i) * width + j]);
      }
    }
    theirs = static_cast<float>(teacher[size_t(group) * width + j]);
  }
  means[column] = sum * share;
  ours_squared += means[column] * means[column];
  theirs_squared += theirs * theirs;
  product += means[column] * theirs;
}
ours_squared = block_sum(ours_squared, scratch, lane, simdgroup, THREADS / 32);
theirs_squared = block_sum(theirs_squared, scratch, lane, simdgroup, THREADS / 32);
product = block_sum(product, scratch, lane, simdgroup, THREADS / 32);
const float ours_scale = 1.0f / sqrt(max(ours_squared, least_squared_norm));
const float theirs_scale = 1.0f / sqrt(max(theirs_squared, least_squared_norm));
const float cosine = product * ours_scale * theirs_scale;
if (self == 0) {
  value[group] = kept > 0 ? weights[group] * (1.0f - cosine) : 0.0f;
}

const float factor = weights[group] * share * ours_scale;
// Below the least norm the scale is a constant.
const float along = ours_squared > least_squared_norm ? cosine * ours_scale : 0.0f;
for (uint column = 0; column < COLUMNS; column++) {
  const uint j = column * THREADS + self;
  if (j < width) {
    const float theirs =
        kept > 0 ? static_cast<float>(teacher[size_t(group) * width + j]) : 0.0f;
    const float slope = factor * (along * means[column] - theirs_scale * theirs);
    for (uint i = 0; i < span; i++) {
      gradient[begin + size_t(i) * width + j] = static_cast<T>(mask[first + i] ? slope : 0.0f);
    }
  }
}
