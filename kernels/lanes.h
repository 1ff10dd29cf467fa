// Loops and sums in as many lanes as a processor's vectors have, for group_norm.cpp.
#include <algorithm>
#include <array>
#include <cstdint>

namespace {

constexpr int STRETCH = 1024, ROWS = 64, LANES = 32;  // sums of that many float32 terms or rows join in double
template <int K> using Terms = std::array<float, K>;

// adds to `out` the K sums of the terms from..end, a multiple of WIDTH, in as many lanes, so that the compiler need not reorder one
template <int WIDTH, int K, class F> inline void add_lanes(std::array<double, K>& out, int64_t from, int64_t end, F term) {
  float part[K][WIDTH] = {};
  for (int64_t i = from; i < end; i += WIDTH)
#pragma GCC ivdep
    for (int lane = 0; lane < WIDTH; lane++) {
      const Terms<K> t = term(i + lane);
      for (int k = 0; k < K; k++) part[k][lane] += t[k];
    }
  for (int k = 0; k < K; k++) {
    for (int half = WIDTH / 2; half >= 4; half /= 2)
      for (int j = 0; j < half; j++) part[k][j] += part[k][j + half];
    if constexpr (WIDTH == 1) out[k] += part[k][0];
    else out[k] += ((double)part[k][0] + part[k][1]) + ((double)part[k][2] + part[k][3]);
  }
}

// K sums of `count` terms
template <int K, class F> inline std::array<double, K> sum(int64_t count, F term) {
  std::array<double, K> out{};
  const int64_t whole = count / LANES * LANES, sixteens = count / 16 * 16, fours = count / 4 * 4;
  for (int64_t start = 0; start < whole; start += STRETCH)
    add_lanes<LANES, K>(out, start, std::min<int64_t>(whole, start + STRETCH), term);
  if (whole < sixteens) add_lanes<16, K>(out, whole, sixteens, term);
  if (sixteens < fours) add_lanes<4, K>(out, sixteens, fours, term);
  if (fours < count) add_lanes<1, K>(out, fours, count, term);
  return out;
}

// run(0..count), a row of a few elements in narrower vectors and not one by one
template <class F> inline void for_row(int64_t count, F run) {
  const int64_t whole = count / 16 * 16, fours = count / 4 * 4;
#pragma GCC ivdep
  for (int64_t i = 0; i < whole; i++) run(i);
  for (int64_t i = whole; i < fours; i += 4)
#pragma GCC ivdep
    for (int lane = 0; lane < 4; lane++) run(i + lane);
  for (int64_t i = fours; i < count; i++) run(i);
}

// out[k][c] = the K sums over `count` rows of term(row, c), c < width; part: room for K rows
template <int K, class F> inline void sum_rows(double* out, int64_t count, int64_t width, float* part, F term) {
  std::fill(out, out + K * width, 0.0);
  for (int64_t start = 0; start < count; start += ROWS) {
    std::fill(part, part + K * width, 0.0f);
    float* __restrict p = part;
    const int64_t end = std::min<int64_t>(count, start + ROWS), whole = start + (end - start) / 4 * 4;
    for (int64_t s = start; s < whole; s += 4)
#pragma GCC ivdep
      for (int64_t c = 0; c < width; c++) {
        const Terms<K> t0 = term(s, c), t1 = term(s + 1, c), t2 = term(s + 2, c), t3 = term(s + 3, c);
        for (int k = 0; k < K; k++) p[k * width + c] += (t0[k] + t1[k]) + (t2[k] + t3[k]);
      }
    for (int64_t s = whole; s < end; s++)
      for (int64_t c = 0; c < width; c++) {
        const Terms<K> t = term(s, c);
        for (int k = 0; k < K; k++) p[k * width + c] += t[k];
      }
    for (int64_t c = 0; c < K * width; c++) out[c] += p[c];
  }
}

}  // namespace
