// Noise, of philox.py: counters by Philox4x32-10, normals by Box-Muller. The first file of the one unit that kernels/cpu.py compiles, which puts
// the constants of philox.py, exact.py and layout.py in front, with contraction off: every operation rounds once, as in Triton and NumPy.
#include <algorithm>
#include <cmath>
#include <cstdint>
#include <cstring>
#ifdef __AVX512F__
#include <immintrin.h>
#endif

namespace {

constexpr int QUADS = 64, BLOCK = 4 * QUADS;
constexpr int64_t SERIAL = 16384;  // fewer elements than this are not worth waking a thread

inline float as_float(int32_t i) { float f; std::memcpy(&f, &i, 4); return f; }
inline int32_t as_int(float f) { int32_t i; std::memcpy(&i, &f, 4); return i; }

// -2 ln u of normal numbers 0 < u < 4/3
inline float minus_two_log(float u) {
  int32_t bits = as_int(u), e = (int32_t)((uint32_t)bits - MANTISSA_BASE) & EXPONENT_MASK;
  float f = as_float(bits - e) - 1.0f;
  float q = LOG[7] * f + LOG[6];
  for (int k = 5; k >= 0; k--) q = q * f + LOG[k];
  return q * f + (float)e * LOG_EXPONENT;
}

inline void box_muller(int quads, const uint32_t* w0, const uint32_t* w1, float* z0, float* z1) {
  for (int j = 0; j < quads; j++) {
    float radius = std::sqrt(minus_two_log((float)w0[j] * 0x1p-32f + 0x1p-33f));
    float v4 = (float)w1[j] * 0x1p-30f, rounded = v4 + ROUNDER;
    int32_t k = as_int(rounded);
    float r = v4 - (rounded - ROUNDER), s = r * r;
    float c = ((COS[3] * s + COS[2]) * s + COS[1]) * s + COS[0];
    float n = (((SIN[3] * s + SIN[2]) * s + SIN[1]) * s + SIN[0]) * r;
    bool odd = k & 1;
    z0[j] = as_float(as_int(odd ? n : c) ^ (int32_t)((uint32_t)((k + 1) & 2) << 30)) * radius;
    z1[j] = as_float(as_int(odd ? c : n) ^ (int32_t)((uint32_t)(k & 2) << 30)) * radius;
  }
}

// the four words of each counter (quad0 + j, draw, sample_id, domain), j = 0..quads, rounded up to 16
inline void philox(int quads, int64_t quad0, int64_t seed, int64_t sample_id, int64_t draw, uint32_t domain, uint32_t* c0, uint32_t* c1,
                   uint32_t* c2, uint32_t* c3) {
  uint32_t k0 = (uint32_t)seed, k1 = (uint32_t)((uint64_t)seed >> 32);
#ifdef __AVX512F__
  // a word in each lane of 64 bits, whose upper half is left as it falls: a multiplication reads the lower one. 1.4x over what g++ makes
  // of the loops below, which multiply low and high words apart; two vectors at a time hide the latency
  const __m512i up = _mm512_set_epi64(7, 6, 5, 4, 3, 2, 1, 0), m0 = _mm512_set1_epi64(MULTIPLIERS[0]), m1 = _mm512_set1_epi64(MULTIPLIERS[1]);
  for (int j = 0; j < quads; j += 16) {
    __m512i x0[2], x1[2], x2[2], x3[2];
    for (int h = 0; h < 2; h++) {
      x0[h] = _mm512_add_epi64(_mm512_set1_epi64(quad0 + j + 8 * h), up);
      x1[h] = _mm512_set1_epi64(draw);
      x2[h] = _mm512_set1_epi64(sample_id);
      x3[h] = _mm512_set1_epi64(domain);
    }
    uint32_t a = k0, b = k1;
    for (int round = 0; round < ROUNDS; round++) {
      const __m512i key0 = _mm512_set1_epi64(a), key1 = _mm512_set1_epi64(b);
      for (int h = 0; h < 2; h++) {
        const __m512i p0 = _mm512_mul_epu32(x0[h], m0), p1 = _mm512_mul_epu32(x2[h], m1);
        x0[h] = _mm512_xor_si512(_mm512_xor_si512(_mm512_srli_epi64(p1, 32), x1[h]), key0);
        x2[h] = _mm512_xor_si512(_mm512_xor_si512(_mm512_srli_epi64(p0, 32), x3[h]), key1);
        x1[h] = p1;
        x3[h] = p0;
      }
      a += KEY_STEPS[0];
      b += KEY_STEPS[1];
    }
    for (int h = 0; h < 2; h++) {
      const int at = j + 8 * h;
      _mm256_storeu_si256((__m256i*)(c0 + at), _mm512_cvtepi64_epi32(x0[h]));
      _mm256_storeu_si256((__m256i*)(c1 + at), _mm512_cvtepi64_epi32(x1[h]));
      _mm256_storeu_si256((__m256i*)(c2 + at), _mm512_cvtepi64_epi32(x2[h]));
      _mm256_storeu_si256((__m256i*)(c3 + at), _mm512_cvtepi64_epi32(x3[h]));
    }
  }
#else
  for (int j = 0; j < quads; j++) {
    c0[j] = (uint32_t)(quad0 + j);
    c1[j] = (uint32_t)draw;
    c2[j] = (uint32_t)sample_id;
    c3[j] = domain;
  }
  for (int round = 0; round < ROUNDS; round++) {
    for (int j = 0; j < quads; j++) {
      uint64_t p0 = (uint64_t)c0[j] * MULTIPLIERS[0], p1 = (uint64_t)c2[j] * MULTIPLIERS[1];
      c0[j] = (uint32_t)(p1 >> 32) ^ c1[j] ^ k0;
      c2[j] = (uint32_t)(p0 >> 32) ^ c3[j] ^ k1;
      c1[j] = (uint32_t)p1;
      c3[j] = (uint32_t)p0;
    }
    k0 += KEY_STEPS[0];
    k1 += KEY_STEPS[1];
  }
#endif
}

// z[0..count): the normals of the elements start.. of one sample; start is a multiple of 4
inline void normals(float* z, int64_t start, int count, int64_t seed, int64_t sample_id, int64_t draw, uint32_t domain) {
  uint32_t c0[QUADS], c1[QUADS], c2[QUADS], c3[QUADS];
  float z0[QUADS], z1[QUADS], z2[QUADS], z3[QUADS];
  const int quads = (count + 3) / 4;
  philox(quads, start / 4, seed, sample_id, draw, domain, c0, c1, c2, c3);
  box_muller(quads, c0, c1, z0, z1);
  box_muller(quads, c2, c3, z2, z3);
  const int whole = count / 4;
  for (int j = 0; j < whole; j++) {
    z[4 * j] = z0[j];
    z[4 * j + 1] = z1[j];
    z[4 * j + 2] = z2[j];
    z[4 * j + 3] = z3[j];
  }
  const float* tail[4] = {z0, z1, z2, z3};
  for (int i = 4 * whole; i < count; i++) z[i] = tail[i - 4 * whole][whole];
}

}  // namespace
