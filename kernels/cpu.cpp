// The CPU's fused kernels: noise drawn in registers, one pass over memory. Compiled at first use by kernels/cpu.py, behind philox.cpp.
// The formulas stand in q_sample.py and denoising_loss.py; vlb.cpp, reverse_step.cpp and group_norm.cpp follow in the same unit. BLOCK elements at a time keep all operands in the first-level cache.

namespace {

struct Reduced { float n, r, q, scale; };  // exp(y) = scale (1 + r + r^2 q), scale = 2^n; y clamped

inline Reduced exp_parts(float y) {
  y = y < EXP_LO ? EXP_LO : y > EXP_HI ? EXP_HI : y;
  float rounded = y * LOG2E + ROUNDER, n = rounded - ROUNDER;
  float r = (y - n * LN2_HI) - n * LN2_LO;
  float q = EXP[6] * r + EXP[5];
  for (int k = 4; k >= 2; k--) q = q * r + EXP[k];
  return {n, r, q, as_float((int32_t)((uint32_t)(as_int(rounded) + 127) << 23))};
}

inline float power_of(const Reduced& e) { return ((e.q * e.r + EXP[1]) * e.r + EXP[0]) * e.scale; }

inline float exact_exp(float y) { return power_of(exp_parts(y)); }

// bfloat16 to float32 is exact; back it rounds to nearest, ties to even, as torch does
inline float widen(uint16_t h) { return as_float((int32_t)((uint32_t)h << 16)); }
inline uint16_t narrow(float f) {
  uint32_t bits = (uint32_t)as_int(f);
  return f != f ? 0x7FC0 : (uint16_t)((bits + 0x7FFF + (bits >> 16 & 1)) >> 16);
}

// the same for an element type E: float, or the bits of a bfloat16
inline float widen(float f) { return f; }
template <class E> E rounded(float f);
template <> inline float rounded<float>(float f) { return f; }
template <> inline uint16_t rounded<uint16_t>(float f) { return narrow(f); }

// `count` numbers of the network's dtype from element `at` on, as float32: in place, or widened into `room`
inline const float* load(const void* from, int64_t at, int count, bool bfloat16, float* room) {
  if (!bfloat16) return (const float*)from + at;
  const uint16_t* h = (const uint16_t*)from + at;
  for (int i = 0; i < count; i++) room[i] = widen(h[i]);
  return room;
}

inline void add_term(float* sum, float a, const float* value, int count) {
  if (a != 0.0f)
    for (int i = 0; i < count; i++) sum[i] = sum[i] + a * value[i];
}

// what the network should predict: eps, v, x0 by the index of its kind in q_sample.py
inline void fill_target(float* goal, int kind, float alpha, float sigma, const float* x, const float* z, int count) {
  if (kind == 1) std::copy(z, z + count, goal);
  if (kind == 2)
    for (int i = 0; i < count; i++) goal[i] = alpha * z[i] - sigma * x[i];
  if (kind == 3) std::copy(x, x + count, goal);
}

// the numbers of a mask, each for `inner` neighbours and again after `period` of them, of the elements from `start` on
template <class Number>
inline void fill_mask(float* m, const Number* mask, int64_t start, int count, int64_t period, int64_t inner) {
  int64_t at = start / inner % period, left = inner - start % inner;
  for (int i = 0, run; i < count; i += run) {
    if (inner == 1) {
      run = (int)std::min<int64_t>(count - i, period - at);
      for (int j = 0; j < run; j++) m[i + j] = (float)mask[at + j];
      at += run;
    } else {
      run = (int)std::min<int64_t>(count - i, left);
      std::fill(m + i, m + i + run, (float)mask[at]);
      at++;
      left = inner;
    }
    if (at == period) at = 0;
  }
}

// the sum of term(0..count), sixteen side by side, so that the compiler need not reorder one
template <class Term>
inline double sum_of(int count, Term term) {
  float part[16] = {0};
  for (int i = 0; i < count / 16 * 16; i += 16)
    for (int k = 0; k < 16; k++) part[k] += term(i + k);
  double total = 0;
  for (int i = count / 16 * 16; i < count; i++) total += term(i);
  for (int k = 0; k < 16; k++) total += part[k];
  return total;
}

// run(task, b, start, count) for each block of elements start.. of each sample b, its number first; threads share them
template <class Run>
inline void for_blocks(int64_t batch, int64_t n, int threads, Run run) {
  const int64_t chunks = (n + BLOCK - 1) / BLOCK;
#pragma omp parallel for schedule(static) num_threads(threads) if (batch * n > SERIAL)
  for (int64_t task = 0; task < batch * chunks; task++) {
    const int64_t start = task % chunks * BLOCK;
    run(task, task / chunks, start, (int)std::min<int64_t>(BLOCK, n - start));
  }
}

inline int64_t level_of(int64_t t, int64_t levels) { return std::min<int64_t>(std::max<int64_t>(t, 0), levels - 1); }

}  // namespace

extern "C" {

void fd_normal(float* z, int64_t batch, int64_t n, const int64_t* seed, const int64_t* sample_id, const int64_t* draw, int64_t domain,
               int threads) {
  for_blocks(batch, n, threads, [=](int64_t, int64_t b, int64_t start, int count) {
    normals(z + b * n + start, start, count, seed[b], sample_id[b], draw[b], (uint32_t)domain);
  });
}

void fd_q_sample(float* x_t, float* target, const float* x0, const float* noise, const float* alpha_sigma, const int64_t* t,
                 const int64_t* seed, const int64_t* sample_id, const int64_t* draw, int64_t batch, int64_t n, int64_t levels, int kind,
                 int threads) {
  for_blocks(batch, n, threads, [=](int64_t, int64_t b, int64_t start, int count) {
    const int64_t base = b * n + start, level = level_of(t[b], levels);
    const float alpha = alpha_sigma[2 * level], sigma = alpha_sigma[2 * level + 1];
    float drawn[BLOCK];
    const float *z = noise ? noise + base : drawn, *x = x0 + base;
    if (!noise) normals(drawn, start, count, seed[b], sample_id[b], draw[b], DOMAIN_TRAIN);
    float* y = x_t + base;
    for (int i = 0; i < count; i++) y[i] = alpha * x[i] + sigma * z[i];
    if (kind) fill_target(target + base, kind, alpha, sigma, x, z, count);
  });
}

int fd_blocks(int64_t n) { return (int)((n + BLOCK - 1) / BLOCK); }

void fd_denoising_loss(double* sums, float* errors, const float* out, const float* x0, const float* noise, const float* alpha_sigma,
                       const int64_t* t, const int64_t* seed, const int64_t* sample_id, const int64_t* draw, const void* mask,
                       double* totals, int64_t batch, int64_t n, int64_t lane, int64_t levels, int64_t stride, int64_t period,
                       int64_t inner, int wide, int kind, int threads) {
  for_blocks(batch, n, threads, [=](int64_t task, int64_t b, int64_t start, int count) {
    const int64_t base = b * n + start, level = level_of(t[b], levels);
    float drawn[BLOCK], room[BLOCK], masked[BLOCK];
    const float *z = noise ? noise + base : drawn, *x = x0 + base, *goal = kind == 1 ? z : kind == 3 ? x : room;
    if (!noise && kind != 3) normals(drawn, start, count, seed[b], sample_id[b], draw[b], DOMAIN_TRAIN);
    if (goal == room) fill_target(room, kind, alpha_sigma[2 * level], alpha_sigma[2 * level + 1], x, z, count);
    const float *__restrict from = out + b * lane + start, *__restrict to = goal;
    float* __restrict error = errors ? errors + base : masked;
    if (!mask) {
      sums[task] = sum_of(count, [=](int i) {
        const float e = from[i] - to[i];
        error[i] = e;
        return e * e;
      });
      return;
    }
    if (wide) fill_mask(masked, (const float*)mask + b * stride, start, count, period, inner);
    else fill_mask(masked, (const uint8_t*)mask + b * stride, start, count, period, inner);
    totals[task] = sum_of(count, [&](int i) { return masked[i]; });
    sums[task] = sum_of(count, [=, &masked](int i) {
      const float e = masked[i] != 0.0f ? from[i] - to[i] : 0.0f, weighted = masked[i] * e;
      if (errors) errors[base + i] = weighted;
      return weighted * e;
    });
  });
}

}  // extern "C"
