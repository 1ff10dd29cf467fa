// The CPU's reverse step, of reverse_step.py, and the scale of dynamic thresholding, of threshold.py. Behind cpu.cpp in one unit.
#include <vector>

namespace {

// out, or uncond + w (out - uncond) in `guided` where the slot has an unconditional lane
inline const float* guided_out(const void* out, int64_t cond_lane, int64_t uncond_lane, const float* scale, int64_t b, int64_t start,
                               int count, int64_t lane, bool bfloat16, float (*room)[BLOCK], float* guided) {
  const float* o = load(out, cond_lane * lane + start, count, bfloat16, room[0]);
  if (uncond_lane < 0) return o;
  const float *other = load(out, uncond_lane * lane + start, count, bfloat16, room[1]), w = scale[b];
  for (int i = 0; i < count; i++) guided[i] = other[i] + w * (o[i] - other[i]);
  return guided;
}

inline void predict_x0(float* x0, const float* a, const float* x, const float* out, int count) {
  std::fill(x0, x0 + count, -0.0f);
  add_term(x0, a[X0_FROM_X], x, count);
  add_term(x0, a[X0_FROM_OUT], out, count);
}

// x after a row that ends a step, with its known part; z is null where nothing is drawn
inline void keep_known(float* x, const float* a, const float* known, const uint8_t* mask, const float* z, int count) {
  float kept[BLOCK], free[BLOCK];
  std::fill(kept, kept + count, -0.0f);
  std::fill(free, free + count, -0.0f);
  add_term(kept, a[KNOWN_ALPHA], known, count);
  add_term(free, a[FREE_RATIO], x, count);
  if (z) add_term(kept, a[KNOWN_SIGMA], z, count);
  if (z) add_term(free, a[FREE_STD], z, count);
  for (int i = 0; i < count; i++) x[i] = mask[i] ? kept[i] : free[i];
}

}  // namespace

extern "C" {

// registers: [registers, batch, n]; out: [lanes, lane] with lane = n or 2n; u: [lanes, n] or null, both float32 or
// both bfloat16; cond, uncond, scale, noise or null
void fd_reverse_step(float* x, float* regs, const void* out, void* u, const float* noise, const float* coef, const int32_t* plan,
                     const int32_t* row, const int64_t* seed, const int64_t* sample_id, const int32_t* cond, const int32_t* uncond,
                     const float* scale, const float* x0_scale, const float* known, const uint8_t* mask, float* preview, int64_t batch,
                     int64_t n, int64_t lane, int64_t rows, int registers, int bfloat16, int threads) {
  const int64_t width = HEAD + (registers + 1) * (registers + 4);
  for_blocks(batch, n, threads, [=](int64_t, int64_t b, int64_t start, int count) {
    const int64_t base = b * n + start;
    const int64_t at = row[b] < 0 || row[b] > rows ? rows : row[b];
    const int64_t cond_lane = cond ? cond[b] : b, uncond_lane = uncond ? uncond[b] : -1;
    const float* a = coef + at * width;
    const int32_t *p = plan + at * PLAN_WIDTH, writes = p[WRITES];
    const bool previewed = preview && writes & WRITES_X0;
    const int32_t reads = p[READS] | (previewed ? 1 | READS_OUT | READS_X0 : 0);
    if (cond_lane < 0 || (reads | writes) == 0) return;
    float state[MAX_REGISTERS + 1][BLOCK], guided[BLOCK], x0[BLOCK], z[BLOCK], sum[BLOCK], room[2][BLOCK];
    const float* o = nullptr;
    if (reads & READS_OUT) o = guided_out(out, cond_lane, uncond_lane, scale, b, start, count, lane, bfloat16, room, guided);
    for (int k = 0; k <= registers; k++)
      if (reads >> k & 1) {
        const float* s = k ? regs + (k - 1) * batch * n + base : x + base;
        std::copy(s, s + count, state[k]);
      }
    if (reads & READS_X0) {
      predict_x0(x0, a, state[0], o, count);
      if (x0_scale && reads & READS_THRESHOLD)
        for (int i = 0; i < count; i++) x0[i] = x0[i] * x0_scale[b];
      if (reads & READS_CLIP) {
        const float lo = a[CLIP_LO], hi = a[CLIP_HI];
        for (int i = 0; i < count; i++) x0[i] = x0[i] < lo ? lo : x0[i] > hi ? hi : x0[i];
      }
      if (previewed) std::copy(x0, x0 + count, preview + base);
    }
    if (reads & READS_NOISE) {
      if (noise) std::copy(noise + base, noise + base + count, z);
      else normals(z, start, count, seed[b], sample_id[b], p[DRAW], DOMAIN_STEP);
      if (reads & READS_LEARNED && lane == 2 * n) {
        const float *v = load(out, cond_lane * lane + n + start, count, bfloat16, room[1]), lo = a[LOG_VAR_MIN], hi = a[LOG_VAR_MAX];
        for (int i = 0; i < count; i++) {
          float f = (v[i] + 1.0f) * 0.5f;
          z[i] = exact_exp((f * hi + (1.0f - f) * lo) * 0.5f) * z[i];
        }
      }
    }
    for (int j = registers; j >= 0; j--) {  // x last: `out` may be x itself
      float* s = j ? regs + (j - 1) * batch * n + base : x + base;
      const float* terms = a + HEAD + j * (registers + 4);
      const bool feeds_u = j == 0 && u && writes & WRITES_U;
      if (!(writes >> j & 1) && !feeds_u) continue;
      std::fill(sum, sum + count, -0.0f);
      for (int k = 0; k <= registers; k++) add_term(sum, terms[k], state[k], count);
      add_term(sum, terms[registers + 1], x0, count);
      add_term(sum, terms[registers + 2], o, count);
      add_term(sum, terms[registers + 3], z, count);
      if (j == 0 && known && reads & READS_KNOWN) {
        const bool noisy = reads & READS_KNOWN_NOISE;
        if (noisy) normals(z, start, count, seed[b], sample_id[b], p[DRAW], DOMAIN_KNOWN);
        keep_known(sum, a, known + base, mask + base, noisy ? z : nullptr, count);
      }
      if (writes >> j & 1) std::copy(sum, sum + count, s);
      if (feeds_u) {
        const float c = a[C_IN_NEXT];
        for (int64_t to : {cond_lane, uncond_lane}) {
          if (to < 0) continue;
          if (bfloat16)
            for (int i = 0; i < count; i++) ((uint16_t*)u)[to * n + start + i] = narrow(c * sum[i]);
          else
            for (int i = 0; i < count; i++) ((float*)u)[to * n + start + i] = c * sum[i];
        }
      }
    }
  });
}

// scale[b] = 1 / min(max(q, 1), largest), q the quantile of |x0|, for slots whose row thresholds
void fd_threshold(float* x0_scale, const float* x, const void* out, const float* coef, const int32_t* plan, const int32_t* row,
                  const int32_t* cond, const int32_t* uncond, const float* scale, int64_t batch, int64_t n, int64_t lane, int64_t rows,
                  int64_t width, int bfloat16, int threads) {
  const int64_t chunks = (n + BLOCK - 1) / BLOCK;
  const bool by_sample = batch >= threads;  // else the threads share each sample's x0
#pragma omp parallel for schedule(dynamic) num_threads(threads) if (by_sample && batch * n > SERIAL)
  for (int64_t b = 0; b < batch; b++) {
    const int64_t at = row[b] < 0 || row[b] > rows ? rows : row[b];
    const int64_t cond_lane = cond ? cond[b] : b, uncond_lane = uncond ? uncond[b] : -1;
    const float* a = coef + at * width;
    const int32_t* p = plan + at * PLAN_WIDTH;
    if (n == 0 || cond_lane < 0 || !(p[READS] & READS_THRESHOLD)) continue;
    std::vector<uint32_t> size(n);  // |x0| in the order of its bits
#pragma omp parallel for schedule(static) num_threads(threads) if (!by_sample && n > SERIAL)
    for (int64_t chunk = 0; chunk < chunks; chunk++) {
      const int64_t start = chunk * BLOCK;
      const int count = (int)std::min<int64_t>(BLOCK, n - start);
      float guided[BLOCK], x0[BLOCK], room[2][BLOCK];
      const float* o = guided_out(out, cond_lane, uncond_lane, scale, b, start, count, lane, bfloat16, room, guided);
      predict_x0(x0, a, x + b * n + start, o, count);
      for (int i = 0; i < count; i++) size[start + i] = (uint32_t)as_int(x0[i]) & 0x7FFFFFFFu;
    }
    const int64_t position = (int64_t)p[QUANTILE] * (n - 1), rank = position >> QUANTILE_BITS;
    const float weight = (float)(position & ((1 << QUANTILE_BITS) - 1)) * QUANTILE_UNIT;
    std::nth_element(size.begin(), size.begin() + rank, size.end());
    const float low = as_float((int32_t)size[rank]);
    const float high = rank + 1 < n ? as_float((int32_t)*std::min_element(size.begin() + rank + 1, size.end())) : low;
    float q = weight == 0.0f || high == low ? low : low + weight * (high - low);
    q = q < 1.0f ? 1.0f : q;
    x0_scale[b] = 1.0f / (q > a[LARGEST] ? a[LARGEST] : q);
  }
}

}  // extern "C"
