// Generalised Jensen-Shannon divergence of two rows of logits, and its gradient by the student's
// product, of which its logits are made.
//
// inputs   student [n, V] T and teacher [n, V] U, the heads' products; settings [6] float:
//          temperature, beta, the student's scale and soft cap (0: none), the teacher's
// outputs  value [n] float, gradient [n, V] T
// template T, U, THREADS, KIND: 0 forward KL (beta 0), 1 reverse KL (beta 1), 2 between them
// launch   a threadgroup of THREADS for each row
//
// The KLs read their rows twice. Between them it is three times: the gradient has
// KL(student || mixture) in it, which needs both normalisers first.
threadgroup float scratch[THREADS / 32];
const uint self = thread_index_in_threadgroup;
const uint lane = thread_index_in_simdgroup;
const uint simdgroup = simdgroup_index_in_threadgroup;
const uint row = threadgroup_position_in_grid.x;
const uint width = student_shape[1];
const size_t begin = size_t(row) * width;
const float temperature = settings[0];
const float beta = settings[1];
const float scale = 1.0f / temperature;
const Transform student_model = {settings[2], settings[3]};
const Transform teacher_model = {settings[4], settings[5]};

// First reading: both normalisers.
Softmax mine = empty_softmax();
Softmax mine_teacher = empty_softmax();
// The reverse KL's sum of exp(scale (s - s_most)) gap, where gap = (s - s_most) - (t - t_most).
float gaps = 0.0f;
for (uint j = self; j < width; j += THREADS) {
  const float s = bounded(
      transformed(static_cast<float>(student[begin + j]), student_model), temperature);
  const float t = bounded(
      transformed(static_cast<float>(teacher[begin + j]), teacher_model), temperature);
  const Softmax next = with_another(mine, s, scale);
  const Softmax next_teacher = with_another(mine_teacher, t, scale);
  if (KIND == 1) {
    const float moved = (mine.most - next.most) - (mine_teacher.most - next_teacher.most);
    gaps = (gaps + moved * mine.sum) * exp(scale * (mine.most - next.most));
    gaps += exp(scale * (s - next.most)) * ((s - next.most) - (t - next_teacher.most));
  }
  mine = next;
  mine_teacher = next_teacher;
}
const Softmax ours = block_softmax(mine, scale, scratch, lane, simdgroup, THREADS / 32);
const Softmax theirs = block_softmax(mine_teacher, scale, scratch, lane, simdgroup, THREADS / 32);
const float log_sum = log(ours.sum);
const float log_sum_teacher = log(theirs.sum);

float of_student = 0.0f;  // KL(student || mixture)
float of_teacher = 0.0f;  // KL(teacher || mixture)
float mean_gap = 0.0f;
if (KIND == 1) {
  const float moved = (mine.most - ours.most) - (mine_teacher.most - theirs.most);
  gaps = (gaps + moved * mine.sum) * exp(scale * (mine.most - ours.most));
  mean_gap = block_sum(gaps, scratch, lane, simdgroup, THREADS / 32) / ours.sum;
  of_student = scale * mean_gap - log_sum + log_sum_teacher;
}
if (KIND == 2) {
  for (uint j = self; j < width; j += THREADS) {
    const float s = bounded(
      transformed(static_cast<float>(student[begin + j]), student_model), temperature);
    const float t = bounded(
      transformed(static_cast<float>(teacher[begin + j]), teacher_model), temperature);
    const float log_q = scale * (s - ours.most) - log_sum;
    const float log_p = scale * (t - theirs.most) - log_sum_teacher;
    const LogRatios ratios = log_ratios(log_q, log_p, beta);
    of_student += exp(log_q) * ratios.student;
    of_teacher += exp(log_p) * ratios.teacher;
  }
  of_student = block_sum(of_student, scratch, lane, simdgroup, THREADS / 32);
}

// Last reading: the gradient.
for (uint j = self; j < width; j += THREADS) {
  const float s = bounded(
      transformed(static_cast<float>(student[begin + j]), student_model), temperature);
  const float t = bounded(
      transformed(static_cast<float>(teacher[begin + j]), teacher_model), temperature);
  const float log_q = scale * (s - ours.most) - log_sum;
  const float log_p = scale * (t - theirs.most) - log_sum_teacher;
  const float q = exp(log_q);
  float slope;
  if (KIND == 0) {
    const float p = exp(log_p);
    slope = q - p;
    // The slopes sum to 0: with them every term is positive, and equal rows do not cancel.
    of_teacher += p * (log_p - log_q) + slope;
  } else if (KIND == 1) {
    slope = q * scale * ((s - ours.most) - (t - theirs.most) - mean_gap);
  } else {
    slope = (1.0f - beta) * q * (log_ratios(log_q, log_p, beta).student - of_student);
  }
  gradient[begin + j] = static_cast<T>(temperature * slope * by_product(s, student_model));
}
of_teacher = block_sum(of_teacher, scratch, lane, simdgroup, THREADS / 32);
if (self == 0) {
  const float divergence = KIND == 0 ? of_teacher
      : KIND == 1                    ? of_student
                                     : beta * of_teacher + (1.0f - beta) * of_student;
  value[row] = temperature * temperature * divergence;
}
