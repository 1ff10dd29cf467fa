// The CPU's loops of group_norm_silu and its gradient, behind cpu.cpp in one translation unit. A task is a sample's groups
// first..last of channels; formulas stand in group_norm.py and group_norm_backward.py. Its elements are of type E: float, or
// the bits of a bfloat16, which are read and written where they lie.
#include <memory>
#include <type_traits>
#include <vector>

namespace {

// one instruction where the processor has it: unlike in cpu.cpp, nothing here need have the same bits elsewhere
inline float mul_add(float a, float b, float c) {
#if defined(__FMA__) || defined(__ARM_FEATURE_FMA)
  return __builtin_fmaf(a, b, c);
#else
  return a * b + c;
#endif
}

// exact_exp with fused steps
inline float quick_exp(float y) {
  y = std::max(EXP_LO, std::min(EXP_HI, y));
  float rounded = mul_add(y, LOG2E, ROUNDER), n = rounded - ROUNDER;
  float r = mul_add(-n, LN2_LO, mul_add(-n, LN2_HI, y));
  float p = mul_add(mul_add(mul_add(EXP[6], r, EXP[5]), r, EXP[4]), r, EXP[3]);  // written out: a loop here is not unrolled
  p = mul_add(mul_add(mul_add(p, r, EXP[2]), r, EXP[1]), r, EXP[0]);
  return p * as_float((int32_t)((uint32_t)(as_int(rounded) + 127) << 23));
}

inline float silu(float h) { return h / (1.0f + quick_exp(-h)); }

inline float silu_slope(float h) {
  float s = 1.0f / (1.0f + quick_exp(-h));
  return s * mul_add(h, 1.0f - s, 1.0f);
}

// how many tasks share a sample's groups where they lie side by side in memory
inline int64_t parts_of(const Norm& f, bool last) {
  return last ? (f.batch >= f.threads ? 1 : std::min<int64_t>(f.groups, f.threads)) : f.groups;
}

// the channels of the widest task
inline int64_t widest_of(const Norm& f, int64_t parts) { return (f.groups + parts - 1) / parts * (f.channels / f.groups); }

// of the sample b: the channels first..first + width, which begin with group g0, and with element `start` of the whole
struct Task { int64_t b, g0, first, width, start; };

inline Task task_of(const Norm& f, bool last, int64_t parts, int64_t task) {
  const int64_t own = f.channels / f.groups, b = task / parts, part = task - b * parts;
  const int64_t g0 = last ? part * f.groups / parts : part, g1 = last ? (part + 1) * f.groups / parts : g0 + 1;
  return {b, g0, g0 * own, (g1 - g0) * own, (b * f.channels + (last ? 0 : g0 * own)) * f.n + (last ? g0 * own : 0)};
}

// to[c] = a vector's number of the channel c for the sample b, or `otherwise` where there is no vector
inline void take(const Vector& vector, int64_t b, int64_t channels, float otherwise, float* __restrict to) {
  const float* exact = (const float*)vector.at + b * vector.step;
  const uint16_t* half = (const uint16_t*)vector.at + b * vector.step;
  if (!vector.at) std::fill(to, to + channels, otherwise);
  else
    for (int64_t c = 0; c < channels; c++) to[c] = vector.bfloat16 ? widen(half[c]) : exact[c];
}

// h = x_hat gain + offset, for all channels of the sample b; part: room for as many numbers
__attribute__((noinline)) void affine(const Norm& f, int64_t b, float* __restrict part, float* __restrict gain,
                                      float* __restrict offset) {
  const int64_t channels = f.channels;
  take(f.weight, b, channels, 1.0f, gain);
  take(f.bias, b, channels, 0.0f, offset);
  take(f.scale, b, channels, 1.0f, part);
  for (int64_t c = 0; c < channels; c++) gain[c] *= part[c];
  if (f.bias.at)
    for (int64_t c = 0; c < channels; c++) offset[c] *= part[c];
  take(f.shift, b, channels, 0.0f, part);
  for (int64_t c = 0; c < channels; c++) offset[c] += part[c];
}

// each channel's mean and rstd; apart from `forward`, so that one serves both of its kinds: a compiler takes long over the sums
template <class E, bool last>
__attribute__((noinline)) void moments(const Norm& f, const Task& t, const E* xs, double* totals, float* part, float* ms,
                                       float* rs) {
  const int64_t channels = f.channels, own = channels / f.groups, n = f.n;
  const double count = (double)(own * n);
  const auto of_group = [=](int64_t k) {
    double total = 0;
    for (int64_t c = k; c < k + own; c++) total += totals[c];
    return total;
  };
  if (last) sum_rows<1>(totals, n, t.width, part, [=](int64_t row, int64_t c) { return Terms<1>{widen(xs[row * channels + c])}; });
  for (int64_t k = 0; k < t.width; k += own) {
    const double total = last ? of_group(k) : sum<1>(own * n, [=](int64_t i) { return Terms<1>{widen(xs[i])}; })[0];
    std::fill(ms + k, ms + k + own, (float)(total / count));
  }
  if (last)
    sum_rows<1>(totals, n, t.width, part, [=](int64_t row, int64_t c) {
      const float d = widen(xs[row * channels + c]) - ms[c];
      return Terms<1>{d * d};
    });
  for (int64_t k = 0; k < t.width; k += own) {
    const float centre = ms[k];
    const double total = last ? of_group(k) : sum<1>(own * n, [=](int64_t i) {
      const float d = widen(xs[i]) - centre;
      return Terms<1>{d * d};
    })[0];
    const float r = (float)(1.0 / std::sqrt(total / count + f.eps));
    if (f.mean) f.mean[t.b * f.groups + t.g0 + k / own] = centre;
    if (f.rstd) f.rstd[t.b * f.groups + t.g0 + k / own] = r;
    std::fill(rs + k, rs + k + own, r);
  }
}

template <class E, bool last, bool activation> void forward(const Norm f) {
  const int64_t channels = f.channels, n = f.n, parts = parts_of(f, last), widest = widest_of(f, parts);
#pragma omp parallel num_threads(f.threads) if (f.batch * channels * n > SERIAL)
  {
    std::vector<double> totals(last ? widest : 0);
    std::vector<float> room(2 * widest + 3 * channels);
    float *ms = room.data(), *rs = ms + widest, *part = rs + widest, *gain = part + channels, *offset = gain + channels;
    int64_t sample = -1;
#pragma omp for schedule(static)
    for (int64_t task = 0; task < f.batch * parts; task++) {
      const Task t = task_of(f, last, parts, task);
      const E* __restrict xs = (const E*)f.x + t.start;
      E* __restrict ys = (E*)f.y + t.start;
      moments<E, last>(f, t, xs, totals.data(), part, ms, rs);
      if (t.b != sample) affine(f, sample = t.b, part, gain, offset);
      float *as = gain + t.first, *os = offset + t.first;
      for (int64_t c = 0; c < t.width; c++) as[c] *= rs[c];
      const auto through = [](float h) { return rounded<E>(activation ? silu(h) : h); };
      for (int64_t row = 0; row < (last ? n : t.width); row++) {
        const int64_t base = row * (last ? channels : n);
        const E* __restrict from = xs + base;
        const float *__restrict m = ms, *__restrict a = as, *__restrict o = os;
        E* __restrict to = ys + base;
        if (last)
          for (int64_t c = 0; c < t.width; c++) to[c] = through(mul_add(widen(from[c]) - m[c], a[c], o[c]));
        else {
          const float centre = m[row], slope = a[row], shift = o[row];
          for_row(n, [=](int64_t i) { to[i] = through(mul_add(widen(from[i]) - centre, slope, shift)); });
        }
      }
    }
  }
}

// what a task of the gradient knows of each channel, and the gradient of h, whose rows lie `step` apart
struct Known { float *ms, *rs, *as, *os, *ps, *qs, *held; int64_t step; };

// dv, for which the sums are known; apart from `backward` as `moments` is
template <class E, bool last>
__attribute__((noinline)) void finish(const Norm& f, const Task& t, const E* xs, E* out, const Known& k) {
  const auto one = [](float gh, float v, float centre, float inverse, float gain, float plain, float along) {
    return rounded<E>((mul_add(gain, gh, -plain) - (v - centre) * inverse * along) * inverse);
  };
  const int64_t n = f.n;
  for (int64_t row = 0; row < (last ? n : t.width); row++) {
    const int64_t base = row * (last ? f.channels : n);
    const E* __restrict from = xs + base;
    const float *__restrict m = k.ms, *__restrict r = k.rs, *__restrict a = k.as, *__restrict p = k.ps, *__restrict q = k.qs;
    E* __restrict to = out + base;
    const float* apart = k.held + row * k.step;
    const auto gh = [=](int64_t i) {
      if constexpr (std::is_same_v<E, float>) return to[i];
      else return apart[i];
    };
    if (last)
      for (int64_t c = 0; c < t.width; c++) to[c] = one(gh(c), widen(from[c]), m[c], r[c], a[c], p[c], q[c]);
    else {
      const float centre = m[row], inverse = r[row], gain = a[row], plain = p[row], along = q[row];
      for_row(n, [=](int64_t i) { to[i] = one(gh(i), widen(from[i]), centre, inverse, gain, plain, along); });
    }
  }
}

// The gradient of h is held until the sums are known: in grad_x, or in a task's room where that would round it.
template <class E, bool last, bool activation> void backward(const Norm f) {
  constexpr bool in_place = std::is_same_v<E, float>;
  const int64_t batch = f.batch, channels = f.channels, n = f.n, own = channels / f.groups;
  const int64_t parts = parts_of(f, last), widest = widest_of(f, parts);
#pragma omp parallel num_threads(f.threads) if (batch * channels * n > SERIAL)
  {
    std::vector<double> totals(2 * widest);
    std::vector<float> room(4 * widest + 4 * channels);
    float *ms = room.data(), *rs = ms + widest, *ps = rs + widest, *qs = ps + widest, *part = qs + widest;
    float *gain = part + 2 * channels, *offset = gain + channels;
    int64_t sample = -1;
    const std::unique_ptr<float[]> apart(in_place ? nullptr : new float[widest * n]);  // a vector would fill it first
#pragma omp for schedule(static)
    for (int64_t task = 0; task < batch * parts; task++) {
      const Task t = task_of(f, last, parts, task);
      const E *__restrict xs = (const E*)f.x + t.start, *__restrict gs = (const E*)f.grad + t.start;
      E* out = (E*)f.grad_x + t.start;
      float* held = in_place ? (float*)out : apart.get();
      const int64_t step = !last ? n : in_place ? channels : t.width;
      for (int64_t c = 0; c < t.width; c++) {
        const int64_t g = t.b * f.groups + t.g0 + c / own;
        ms[c] = f.mean[g];
        rs[c] = f.rstd[g];
      }
      if (t.b != sample) affine(f, sample = t.b, part, gain, offset);
      float *as = gain + t.first, *os = offset + t.first;
      const auto through = [=](float* gh, int64_t i, float centre, float inverse, float gain, float offset) {
        const float x_hat = (widen(xs[i]) - centre) * inverse;
        *gh = widen(gs[i]) * (activation ? silu_slope(mul_add(x_hat, gain, offset)) : 1.0f);
        return Terms<2>{*gh, *gh * x_hat};
      };
      if (last)
        sum_rows<2>(totals.data(), n, t.width, part, [=](int64_t row, int64_t c) {
          return through(held + row * step + c, row * channels + c, ms[c], rs[c], as[c], os[c]);
        });
      else
        for (int64_t c = 0; c < t.width; c++) {
          const float centre = ms[c], inverse = rs[c], gain = as[c], offset = os[c];
          const auto term = [=](int64_t i) { return through(held + i, i, centre, inverse, gain, offset); };
          const auto found = sum<2>(n, [=](int64_t i) { return term(c * n + i); });
          totals[c] = found[0];
          totals[t.width + c] = found[1];
        }
      for (int64_t k = 0; k < t.width; k += own) {
        double plain_mean = 0, along_mean = 0;
        for (int64_t c = k; c < k + own; c++) {
          f.sums[t.b * channels + t.first + c] = (float)totals[c];
          f.sums[(batch + t.b) * channels + t.first + c] = (float)totals[t.width + c];
          plain_mean += as[c] * totals[c];
          along_mean += as[c] * totals[t.width + c];
        }
        std::fill(ps + k, ps + k + own, (float)(plain_mean / (double)(own * n)));
        std::fill(qs + k, qs + k + own, (float)(along_mean / (double)(own * n)));
      }
      finish<E, last>(f, t, xs, out, {ms, rs, as, os, ps, qs, held, step});
    }
  }
}

using Loop = void (*)(Norm);
// by last, then activation
template <class E>
constexpr Loop FORWARD[] = {forward<E, false, false>, forward<E, false, true>, forward<E, true, false>, forward<E, true, true>};
template <class E>
constexpr Loop BACKWARD[] = {backward<E, false, false>, backward<E, false, true>, backward<E, true, false>, backward<E, true, true>};

}  // namespace

extern "C" {

void fd_group_norm(const Norm* f) { (f->bfloat16 ? FORWARD<uint16_t> : FORWARD<float>)[2 * f->last + f->activation](*f); }

void fd_group_norm_backward(const Norm* f) {
  (f->bfloat16 ? BACKWARD<uint16_t> : BACKWARD<float>)[2 * f->last + f->activation](*f);
}

}  // extern "C"
