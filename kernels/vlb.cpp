// The terms of the variational bound and their gradient, of vlb.py: its operations in its order, of which Triton takes -a as 0 - a. Behind cpu.cpp in one unit.

namespace {

struct Exponential { float power, less, rest; };  // exp(y), exp(y) - 1, exp(y) - 1 - y

inline Exponential exp_rest(float y) {
  const Reduced e = exp_parts(y);
  float power = power_of(e), rest = (e.q * e.r) * e.r, less = power - 1.0f;
  return {power, e.n == 0.0f ? e.r + rest : less, e.n == 0.0f ? rest : less - y};
}

struct Term { float nats, by_gap, by_x0; };

inline Term divergence(float error, float gap, float weight) {
  Exponential e = exp_rest(gap);
  float m = weight * error, square = e.power * (m * m);
  return {0.5f * (e.rest + square), 0.5f * (e.less + square), 0.0f - e.power * error};
}

inline Term likelihood(float x0, float error, float gap, float weight) {
  float root = exact_exp(0.5f * gap), k = weight * root;
  float a = k * (error + HALF_BIN), b = k * (error - HALF_BIN);
  float aa = CUBIC * (a * a), bb = CUBIC * (b * b), span = (2.0f * HALF_BIN) * k;
  float bend = (CUBIC * (k * k)) * (3.0f * (error * error) + HALF_BIN_SQUARED);
  bool above = x0 > EDGE, below = x0 < -EDGE, outermost = above | below;
  float e_p = exact_exp(0.0f - a * (SLOPE + aa)), e_q = exact_exp(b * (SLOPE + bb));
  e_p = above ? 0.0f : e_p;
  e_q = below ? 0.0f : e_q;
  Exponential e = exp_rest(0.0f - span * (SLOPE + bend));
  float e_y = outermost ? 0.0f : e.power, top = outermost ? 1.0f : 0.0f - e.less;
  float from_p = 1.0f + e_p, from_q = 1.0f + e_q, bottom = from_p * from_q, p = top / bottom;
  float nats = 0.5f * minus_two_log(p > LEAST ? p : LEAST);
  nats = p == p ? nats : p;
  float s_p = e_p * from_q / bottom, s_q = e_q * from_p / bottom, s_y = e_y / top;
  float rise_p = SLOPE + 3.0f * aa, rise_q = SLOPE + 3.0f * bb;
  float by_log_k = s_p * (a * rise_p) - s_q * (b * rise_q) + s_y * (span * (SLOPE + 3.0f * bend));
  float by_error = (root * (1.0f / weight)) * (s_p * rise_p - s_q * rise_q + s_y * (span * (SIX_CUBIC * (k * error))));
  bool least = p < LEAST;
  return {nats, least ? 0.0f : -0.5f * by_log_k, least ? 0.0f : by_error};
}

}  // namespace

extern "C" {

// sums: [batch, fd_blocks(n)], in nats; out: [batch, lane] with lane = n or 2n; grad_mean, grad_v or null; coef: [levels, VLB_WIDTH]
void fd_vlb_terms(double* sums, float* grad_mean, float* grad_v, const float* x0, const float* x_t, const float* out, const float* coef,
                  const int64_t* t, int64_t batch, int64_t n, int64_t lane, int64_t levels, int threads) {
  for_blocks(batch, n, threads, [=](int64_t task, int64_t b, int64_t start, int count) {
    const int64_t base = b * n + start, level = level_of(t[b], levels);
    const float* row = coef + level * VLB_WIDTH;
    const float from_x = row[VLB_X0_FROM_X], from_out = row[VLB_X0_FROM_OUT], low = row[VLB_CLIP_LO], high = row[VLB_CLIP_HI];
    const float weight = row[VLB_MEAN_WEIGHT], at_min = row[VLB_GAP_AT_MIN], at_max = row[VLB_GAP_AT_MAX];
    const float *x = x0 + base, *noisy = x_t + base, *o = out + b * lane + start, *v = o + n;
    float raw[BLOCK], error[BLOCK], gap[BLOCK], nats[BLOCK], by_gap[BLOCK], by_x0[BLOCK];
    for (int i = 0; i < count; i++) raw[i] = (from_x != 0.0f ? from_x * noisy[i] : 0.0f) + from_out * o[i];
    for (int i = 0; i < count; i++) error[i] = x[i] - (raw[i] < low ? low : raw[i] > high ? high : raw[i]);
    std::fill(gap, gap + count, 0.0f + at_min);
    if (lane != n)
      for (int i = 0; i < count; i++) {
        float f = (v[i] + 1.0f) * 0.5f;
        gap[i] = f * at_max + (1.0f - f) * at_min;
      }
    for (int i = 0; i < count; i++) {
      Term term = level == 0 ? likelihood(x[i], error[i], gap[i], weight) : divergence(error[i], gap[i], weight);
      nats[i] = term.nats;
      by_gap[i] = term.by_gap;
      by_x0[i] = term.by_x0;
    }
    sums[task] = sum_of(count, [&](int i) { return nats[i]; });
    if (grad_mean)
      for (int i = 0; i < count; i++) grad_mean[base + i] = (raw[i] >= low) & (raw[i] <= high) ? by_x0[i] : 0.0f;
    const float share = 1.0f / (weight > 1.0f ? weight : 1.0f);
    if (grad_v)
      for (int i = 0; i < count; i++) grad_v[base + i] = by_gap[i] * share;
  });
}

}  // extern "C"
