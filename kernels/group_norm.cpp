// The CPU's loops of group_norm_silu and its gradient, behind cpu.cpp in one translation unit. A task is a sample's groups
// first..last of channels; formulas stand in group_norm.py and group_norm_backward.py.
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
inline int64_t parts_of(int64_t batch, int64_t groups, bool last, int threads) {
  return last ? (batch >= threads ? 1 : std::min<int64_t>(groups, threads)) : groups;
}

// of the sample b: the channels first..first + width, which begin with group g0, and with element `start` of the whole
struct Task { int64_t b, g0, first, width, start; };

inline Task task_of(const Norm& f, bool last, int64_t parts, int64_t task) {
  const int64_t own = f.channels / f.groups, b = task / parts, part = task - b * parts;
  const int64_t g0 = last ? part * f.groups / parts : part, g1 = last ? (part + 1) * f.groups / parts : g0 + 1;
  return {b, g0, g0 * own, (g1 - g0) * own, (b * f.channels + (last ? 0 : g0 * own)) * f.n + (last ? g0 * own : 0)};
}

inline float gain_of(const Norm& f, int64_t b, int64_t c) {
  return (f.weight ? f.weight[c] : 1.0f) * (f.scale ? f.scale[b * f.scale_step + c] : 1.0f);
}

inline float offset_of(const Norm& f, int64_t b, int64_t c) {
  const float own = f.bias ? f.bias[c] * (f.scale ? f.scale[b * f.scale_step + c] : 1.0f) : 0.0f;
  return own + (f.shift ? f.shift[b * f.shift_step + c] : 0.0f);
}

template <bool last, bool activation> void forward(const Norm f) {
  const int64_t batch = f.batch, channels = f.channels, n = f.n, groups = f.groups;
  const int64_t own = channels / groups, parts = parts_of(batch, groups, last, f.threads), widest = (groups + parts - 1) / parts * own;
#pragma omp parallel num_threads(f.threads) if (batch * channels * n > SERIAL)
  {
    std::vector<double> totals(last ? widest : 0);
    std::vector<float> room(4 * widest);
    float *part = room.data(), *ms = part + widest, *as = ms + widest, *os = as + widest;
#pragma omp for schedule(static)
    for (int64_t task = 0; task < batch * parts; task++) {
      const auto [b, g0, first, width, start] = task_of(f, last, parts, task);
      const float* __restrict xs = f.x + start;
      float* __restrict ys = f.y + start;
      const double count = (double)(own * n);
      const auto through = [](float h) { return activation ? silu(h) : h; };
      const auto of_group = [&](int64_t k) {
        double total = 0;
        for (int64_t c = k; c < k + own; c++) total += totals[c];
        return total;
      };
      if (last) sum_rows<1>(totals.data(), n, channels, width, part, [=](int64_t i, int64_t) { return Terms<1>{xs[i]}; });
      for (int64_t k = 0; k < width; k += own) {
        const double total = last ? of_group(k) : sum<1>(own * n, [=](int64_t i) { return Terms<1>{xs[i]}; })[0];
        std::fill(ms + k, ms + k + own, (float)(total / count));
      }
      if (last)
        sum_rows<1>(totals.data(), n, channels, width, part, [=](int64_t i, int64_t c) {
          return Terms<1>{(xs[i] - ms[c]) * (xs[i] - ms[c])};
        });
      for (int64_t k = 0; k < width; k += own) {
        const float centre = ms[k];
        const double total = last ? of_group(k) : sum<1>(own * n, [=](int64_t i) {
          return Terms<1>{(xs[i] - centre) * (xs[i] - centre)};
        })[0];
        const float r = (float)(1.0 / std::sqrt(total / count + f.eps));
        if (f.mean) f.mean[b * groups + g0 + k / own] = centre;
        if (f.rstd) f.rstd[b * groups + g0 + k / own] = r;
        for (int64_t c = k; c < k + own; c++) {
          as[c] = r * gain_of(f, b, first + c);
          os[c] = offset_of(f, b, first + c);
        }
      }
      for (int64_t row = 0; row < (last ? n : width); row++) {
        const int64_t base = last ? row * channels : row * n;
        const float *__restrict from = xs + base, *__restrict m = ms, *__restrict a = as, *__restrict o = os;
        float* __restrict to = ys + base;
        if (last)
          for (int64_t c = 0; c < width; c++) to[c] = through(mul_add(from[c] - m[c], a[c], o[c]));
        else {
          const float centre = m[row], slope = a[row], shift = o[row];
          for_row(n, [=](int64_t i) { to[i] = through(mul_add(from[i] - centre, slope, shift)); });
        }
      }
    }
  }
}

// grad_x holds the gradient of h until the sums are known
template <bool last, bool activation> void backward(const Norm f) {
  const int64_t batch = f.batch, channels = f.channels, n = f.n, groups = f.groups;
  const int64_t own = channels / groups, parts = parts_of(batch, groups, last, f.threads), widest = (groups + parts - 1) / parts * own;
#pragma omp parallel num_threads(f.threads) if (batch * channels * n > SERIAL)
  {
    std::vector<double> totals(2 * widest);
    std::vector<float> room(8 * widest);
    float *part = room.data(), *ms = part + 2 * widest, *rs = ms + widest, *as = rs + widest, *os = as + widest;
    float *ps = os + widest, *qs = ps + widest;
#pragma omp for schedule(static)
    for (int64_t task = 0; task < batch * parts; task++) {
      const auto [b, g0, first, width, start] = task_of(f, last, parts, task);
      const float *__restrict xs = f.x + start, *__restrict gs = f.grad + start;
      float* __restrict out = f.grad_x + start;
      for (int64_t c = 0; c < width; c++) {
        const int64_t g = b * groups + g0 + c / own;
        ms[c] = f.mean[g];
        rs[c] = f.rstd[g];
        as[c] = gain_of(f, b, first + c);
        os[c] = offset_of(f, b, first + c);
      }
      const auto through = [=](int64_t i, float x_hat, float gain, float offset) {
        const float slope = activation ? silu_slope(mul_add(x_hat, gain, offset)) : 1.0f;
        out[i] = gs[i] * slope;
        return Terms<2>{out[i], out[i] * x_hat};
      };
      if (last)
        sum_rows<2>(totals.data(), n, channels, width, part,
                    [=](int64_t i, int64_t c) { return through(i, (xs[i] - ms[c]) * rs[c], as[c], os[c]); });
      else
        for (int64_t c = 0; c < width; c++) {
          const float centre = ms[c], inverse = rs[c], gain = as[c], offset = os[c];
          const auto found = sum<2>(n, [=](int64_t i) { return through(c * n + i, (xs[c * n + i] - centre) * inverse, gain, offset); });
          totals[c] = found[0];
          totals[width + c] = found[1];
        }
      for (int64_t k = 0; k < width; k += own) {
        double plain_mean = 0, along_mean = 0;
        for (int64_t c = k; c < k + own; c++) {
          f.sums[b * channels + first + c] = (float)totals[c];
          f.sums[(batch + b) * channels + first + c] = (float)totals[width + c];
          plain_mean += as[c] * totals[c];
          along_mean += as[c] * totals[width + c];
        }
        std::fill(ps + k, ps + k + own, (float)(plain_mean / (double)(own * n)));
        std::fill(qs + k, qs + k + own, (float)(along_mean / (double)(own * n)));
      }
      const auto finish = [](float gh, float v, float centre, float inverse, float gain, float plain, float along) {
        return (mul_add(gain, gh, -plain) - (v - centre) * inverse * along) * inverse;
      };
      for (int64_t row = 0; row < (last ? n : width); row++) {
        const int64_t base = last ? row * channels : row * n;
        const float *__restrict from = xs + base, *__restrict m = ms, *__restrict r = rs, *__restrict a = as;
        const float *__restrict p = ps, *__restrict q = qs;
        float* __restrict to = out + base;
        if (last)
          for (int64_t c = 0; c < width; c++) to[c] = finish(to[c], from[c], m[c], r[c], a[c], p[c], q[c]);
        else {
          const float centre = ms[row], inverse = rs[row], gain = as[row], plain = ps[row], along = qs[row];
          for_row(n, [=](int64_t i) { to[i] = finish(to[i], from[i], centre, inverse, gain, plain, along); });
        }
      }
    }
  }
}

// by last, then activation
using Loop = void (*)(Norm);
constexpr Loop FORWARD[] = {forward<false, false>, forward<false, true>, forward<true, false>, forward<true, true>};
constexpr Loop BACKWARD[] = {backward<false, false>, backward<false, true>, backward<true, false>, backward<true, true>};

}  // namespace

extern "C" {

void fd_group_norm(const Norm* f) { FORWARD[2 * f->last + f->activation](*f); }
void fd_group_norm_backward(const Norm* f) { BACKWARD[2 * f->last + f->activation](*f); }

}  // extern "C"
