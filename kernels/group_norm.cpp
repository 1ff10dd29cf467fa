// The CPU's loops of group_norm_silu and its gradient, behind cpu.cpp in one translation unit. A task is a sample's groups
// first..last of channels; formulas stand in group_norm.py and group_norm_backward.py.
#include <vector>

namespace {

constexpr int STRETCH = 1024, ROWS = 64, LANES = 64;  // sums of that many float32 terms or rows join in double

inline float silu(float h) { return h / (1.0f + exact_exp(-h)); }

inline float silu_slope(float h) {
  float s = 1.0f / (1.0f + exact_exp(-h));
  return s * (1.0f + h * (1.0f - s));
}

// many sums side by side, so that the compiler need not reorder one
template <class F> inline double sum(int64_t count, F term) {
  double total = 0;
  for (int64_t start = 0; start < count; start += STRETCH) {
    const int64_t end = std::min<int64_t>(count, start + STRETCH), whole = start + (end - start) / LANES * LANES;
    float part[LANES] = {0};
    for (int64_t i = start; i < whole; i += LANES)
      for (int k = 0; k < LANES; k++) part[k] += term(i + k);
    for (int64_t i = whole; i < end; i++) total += term(i);
    for (int k = 0; k < LANES; k++) total += part[k];
  }
  return total;
}

// out[c] += sum over `count` rows, `width` apart by `step`, of term(index of the element, c)
template <class F> inline void sum_rows(double* out, int64_t count, int64_t step, int64_t width, std::vector<float>& part, F term) {
  for (int64_t start = 0; start < count; start += ROWS) {
    std::fill(part.begin(), part.end(), 0.0f);
    float* __restrict p = part.data();
    const int64_t end = std::min<int64_t>(count, start + ROWS), whole = start + (end - start) / 4 * 4;
    for (int64_t s = start; s < whole; s += 4)
      for (int64_t c = 0; c < width; c++) {
        const int64_t i = s * step + c;
        p[c] += (term(i, c) + term(i + step, c)) + (term(i + 2 * step, c) + term(i + 3 * step, c));
      }
    for (int64_t s = whole; s < end; s++)
      for (int64_t c = 0; c < width; c++) p[c] += term(s * step + c, c);
    for (int64_t c = 0; c < width; c++) out[c] += p[c];
  }
}

// how many tasks share a sample's groups where they lie side by side in memory
inline int64_t parts_of(int64_t batch, int64_t groups, bool last, int threads) {
  return last ? (batch >= threads ? 1 : std::min<int64_t>(groups, threads)) : groups;
}

}  // namespace

extern "C" {

// x, y: [batch, channels, n], or [batch, n, channels] where last; gain, offset: a sample's values `step` (0: shared) apart, or null
void fd_group_norm(float* y, float* mean, float* rstd, const float* x, const float* gain, const float* offset,
                   int64_t gain_step, int64_t offset_step, int64_t batch, int64_t channels, int64_t n, int64_t groups, double eps,
                   int activation, int last, int threads) {
  const int64_t own = channels / groups, parts = parts_of(batch, groups, last, threads);
#pragma omp parallel for schedule(static) num_threads(threads) if (batch * channels * n > SERIAL)
  for (int64_t task = 0; task < batch * parts; task++) {
    const int64_t b = task / parts, g0 = task % parts * groups / parts, g1 = (task % parts + 1) * groups / parts;
    const int64_t first = g0 * own, width = (g1 - g0) * own, start = b * channels * n + (last ? first : first * n);
    const float* __restrict xs = x + start;
    float* __restrict ys = y + start;
    std::vector<double> sums(last ? width : 0), squares(last ? width : 0);
    std::vector<float> part(last ? width : 0), m(width), a(width), o(width);
    if (last) sum_rows(sums.data(), n, channels, width, part, [=](int64_t i, int64_t) { return xs[i]; });
    for (int64_t g = g0; g < g1; g++) {
      double total = 0;
      if (last)
        for (int64_t c = 0; c < own; c++) total += sums[(g - g0) * own + c];
      else
        total = sum(own * n, [=](int64_t i) { return xs[i]; });
      mean[b * groups + g] = (float)(total / (double)(own * n));
      for (int64_t c = 0; c < own; c++) m[(g - g0) * own + c] = mean[b * groups + g];
    }
    const float* ms = m.data();
    if (last)
      sum_rows(squares.data(), n, channels, width, part, [=](int64_t i, int64_t c) {
        float d = xs[i] - ms[c];
        return d * d;
      });
    for (int64_t g = g0; g < g1; g++) {
      double total = 0;
      const float centre = mean[b * groups + g];
      if (last)
        for (int64_t c = 0; c < own; c++) total += squares[(g - g0) * own + c];
      else
        total = sum(own * n, [=](int64_t i) {
          float d = xs[i] - centre;
          return d * d;
        });
      const float r = rstd[b * groups + g] = (float)(1.0 / std::sqrt(total / (double)(own * n) + eps));
      for (int64_t c = 0; c < own; c++) {
        const int64_t k = (g - g0) * own + c;
        a[k] = gain ? r * gain[b * gain_step + first + k] : r;
        o[k] = offset ? offset[b * offset_step + first + k] : 0.0f;
      }
    }
    for (int64_t row = 0; row < (last ? n : width); row++) {
      const int64_t base = last ? row * channels : row * n;
      const float *as = a.data(), *os = o.data();
      if (last && activation)
        for (int64_t c = 0; c < width; c++) ys[base + c] = silu((xs[base + c] - ms[c]) * as[c] + os[c]);
      else if (last)
        for (int64_t c = 0; c < width; c++) ys[base + c] = (xs[base + c] - ms[c]) * as[c] + os[c];
      else {
        const float centre = ms[row], slope = as[row], shift = os[row];
        if (activation)
          for (int64_t i = 0; i < n; i++) ys[base + i] = silu((xs[base + i] - centre) * slope + shift);
        else
          for (int64_t i = 0; i < n; i++) ys[base + i] = (xs[base + i] - centre) * slope + shift;
      }
    }
  }
}

// grad_x, grad like x; sums: [2, batch, channels]. grad_x holds the gradient of h until the sums are known.
void fd_group_norm_backward(float* grad_x, float* sums, const float* grad, const float* mean, const float* rstd, const float* x,
                            const float* gain, const float* offset, int64_t gain_step, int64_t offset_step,
                            int64_t batch, int64_t channels, int64_t n, int64_t groups, int activation, int last, int threads) {
  const int64_t own = channels / groups, parts = parts_of(batch, groups, last, threads);
#pragma omp parallel for schedule(static) num_threads(threads) if (batch * channels * n > SERIAL)
  for (int64_t task = 0; task < batch * parts; task++) {
    const int64_t b = task / parts, g0 = task % parts * groups / parts, g1 = (task % parts + 1) * groups / parts;
    const int64_t first = g0 * own, width = (g1 - g0) * own, start = b * channels * n + (last ? first : first * n);
    const float *__restrict xs = x + start, *__restrict gs = grad + start;
    float* __restrict out = grad_x + start;
    std::vector<double> plain(width), along(width);
    std::vector<float> part(last ? width : 0), m(width), r(width), a(width), o(width), p(width), q(width);
    for (int64_t k = 0; k < width; k++) {
      const int64_t g = b * groups + g0 + k / own;
      m[k] = mean[g];
      r[k] = rstd[g];
      a[k] = gain ? gain[b * gain_step + first + k] : 1.0f;
      o[k] = offset ? offset[b * offset_step + first + k] : 0.0f;
    }
    const float *ms = m.data(), *rr = r.data(), *as = a.data(), *os = o.data();
    for (int64_t row = 0; row < (last ? n : width); row++) {
      const int64_t base = last ? row * channels : row * n, count = last ? width : n;
      if (!activation) std::copy(gs + base, gs + base + count, out + base);
      else if (last)
        for (int64_t c = 0; c < width; c++)
          out[base + c] = gs[base + c] * silu_slope((xs[base + c] - ms[c]) * rr[c] * as[c] + os[c]);
      else {
        const float centre = ms[row], inverse = rr[row], slope = as[row], shift = os[row];
        for (int64_t i = 0; i < n; i++)
          out[base + i] = gs[base + i] * silu_slope((xs[base + i] - centre) * inverse * slope + shift);
      }
    }
    if (last) {
      sum_rows(plain.data(), n, channels, width, part, [=](int64_t i, int64_t) { return out[i]; });
      sum_rows(along.data(), n, channels, width, part,
               [=](int64_t i, int64_t c) { return out[i] * ((xs[i] - ms[c]) * rr[c]); });
    } else
      for (int64_t c = 0; c < width; c++) {
        const float centre = ms[c], inverse = rr[c];
        plain[c] = sum(n, [=](int64_t i) { return out[c * n + i]; });
        along[c] = sum(n, [=](int64_t i) { return out[c * n + i] * ((xs[c * n + i] - centre) * inverse); });
      }
    for (int64_t k = 0; k < width; k += own) {
      double plain_mean = 0, along_mean = 0;
      for (int64_t c = k; c < k + own; c++) {
        sums[b * channels + first + c] = (float)plain[c];
        sums[(batch + b) * channels + first + c] = (float)along[c];
        plain_mean += a[c] * plain[c];
        along_mean += a[c] * along[c];
      }
      std::fill(p.begin() + k, p.begin() + k + own, (float)(plain_mean / (double)(own * n)));
      std::fill(q.begin() + k, q.begin() + k + own, (float)(along_mean / (double)(own * n)));
    }
    const float *ps = p.data(), *qs = q.data();
    for (int64_t row = 0; row < (last ? n : width); row++) {
      const int64_t base = last ? row * channels : row * n;
      if (last)
        for (int64_t c = 0; c < width; c++)
          out[base + c] = (as[c] * out[base + c] - ps[c] - (xs[base + c] - ms[c]) * rr[c] * qs[c]) * rr[c];
      else {
        const float centre = ms[row], inverse = rr[row], slope = as[row], one = ps[row], two = qs[row];
        for (int64_t i = 0; i < n; i++)
          out[base + i] = (slope * out[base + i] - one - (xs[base + i] - centre) * inverse * two) * inverse;
      }
    }
  }
}

}  // extern "C"
