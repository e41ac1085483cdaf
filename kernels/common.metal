// What the kernels share: the one reduction over a threadgroup, and the arithmetic of softmax.

// Below every logit, and what a logit of -inf counts as at temperature 1.
#define LOWEST (-3.4e38f)
#define LEAST_LOGIT (-1e20f)

// Lane i of every simdgroup gets the value of simdgroup i; lanes beyond the last get `none`.
template <class Value, class Scratch>
METAL_FUNC Value gather(
    Value value, Value none, Scratch scratch, uint lane, uint simdgroup, uint simdgroups) {
  // Until here others may still be reading what an earlier call has left in scratch.
  threadgroup_barrier(mem_flags::mem_threadgroup);
  if (lane == 0) {
    scratch[simdgroup] = value;
  }
  threadgroup_barrier(mem_flags::mem_threadgroup);
  return lane < simdgroups ? scratch[lane] : none;
}

template <class Scratch>
METAL_FUNC float block_sum(
    float value, Scratch scratch, uint lane, uint simdgroup, uint simdgroups) {
  return simd_sum(gather(simd_sum(value), 0.0f, scratch, lane, simdgroup, simdgroups));
}

template <class Scratch>
METAL_FUNC float block_max(
    float value, Scratch scratch, uint lane, uint simdgroup, uint simdgroups) {
  return simd_max(gather(simd_max(value), LOWEST, scratch, lane, simdgroup, simdgroups));
}

// The sum of exp(scale (x - most)) over some numbers x, most being their maximum.
struct Softmax {
  float most;
  float sum;
};

METAL_FUNC Softmax empty_softmax() {
  return {LOWEST, 0.0f};
}

// One reading of each x is enough: a higher x rescales the sum of the earlier ones.
METAL_FUNC Softmax with_another(Softmax seen, float x, float scale) {
  const float rise = x - seen.most;
  const float lesser = exp(-scale * fabs(rise));
  if (rise > 0.0f) {
    return {x, seen.sum * lesser + 1.0f};
  }
  return {seen.most, seen.sum + lesser};
}

// Of all the threads' numbers together.
template <class Scratch>
METAL_FUNC Softmax block_softmax(
    Softmax seen, float scale, Scratch scratch, uint lane, uint simdgroup, uint simdgroups) {
  const float most = block_max(seen.most, scratch, lane, simdgroup, simdgroups);
  const float sum = seen.sum * exp(scale * (seen.most - most));
  return {most, block_sum(sum, scratch, lane, simdgroup, simdgroups)};
}

// A logit whose distance to the others is finite; a NaN stays one.
METAL_FUNC float bounded(float logit, float temperature) {
  const float least = LEAST_LOGIT * temperature;
  return logit < least ? least : logit;
}

// What a model does to its head's product: its scale, and its soft cap (0: it has none).
struct Transform {
  float scale;
  float cap;
};

METAL_FUNC float transformed(float product, Transform model) {
  const float logit = model.scale * product;
  return model.cap > 0.0f ? model.cap * tanh(logit / model.cap) : logit;
}

// The derivative of a logit by the product that it is made of.
METAL_FUNC float by_product(float logit, Transform model) {
  const float share = model.cap > 0.0f ? logit / model.cap : 0.0f;
  // 1 - tanh^2 as a product: next to the cap a difference of squares keeps fewer digits.
  return model.scale * (1.0f - share) * (1.0f + share);
}

// log(q / m) and log(p / m) where m = beta p + (1 - beta) q.
struct LogRatios {
  float student;
  float teacher;
};

METAL_FUNC LogRatios log_ratios(float log_q, float log_p, float beta) {
  const float apart = fabs(log_p - log_q);
  const bool teacher_leads = log_p > log_q;
  const float weight = teacher_leads ? beta : 1.0f - beta;
  const float leader = -log(weight + (1.0f - weight) * exp(-apart));
  return {teacher_leads ? leader - apart : leader, teacher_leads ? leader : leader - apart};
}

// The order of a top-k: by falling value, equal ones by rising index.
METAL_FUNC bool comes_before(float x, uint index, float other, uint other_index) {
  return x > other || (x == other && index < other_index);
}
