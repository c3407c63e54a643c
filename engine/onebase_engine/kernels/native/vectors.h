/* Sixteen numbers at a time, in the instructions that a file is compiled for. */
#ifndef ONEBASE_VECTORS_H
#define ONEBASE_VECTORS_H

#include "kernels.h"

#include <math.h>
#include <stdatomic.h>
#include <string.h>

#include "threads.h"

#ifdef __AVX2__
#include <immintrin.h>
#endif

typedef float floats __attribute__((vector_size(4 * LANES)));
typedef float loose_floats __attribute__((vector_size(4 * LANES), aligned(4)));
typedef uint32_t words __attribute__((vector_size(4 * LANES)));
typedef int32_t ints __attribute__((vector_size(4 * LANES)));
typedef uint16_t halves __attribute__((vector_size(2 * LANES)));
typedef uint16_t loose_halves __attribute__((vector_size(2 * LANES), aligned(2)));

static inline floats each(float value) {
  return (floats){value, value, value, value, value, value, value, value,
                  value, value, value, value, value, value, value, value};
}

static inline int64_t least(int64_t a, int64_t b) { return a < b ? a : b; }
static inline int64_t parts_of(int64_t count, int64_t size) { return (count + size - 1) / size; }

static inline floats load(const float *from) { return *(const loose_floats *)from; }
static inline void store(float *to, floats value) { *(loose_floats *)to = value; }

static inline float widened(bf16 half) {
  uint32_t bits = (uint32_t)half << 16;
  float value;
  memcpy(&value, &bits, sizeof value);
  return value;
}

static inline floats widen(const bf16 *from) {
  words bits = __builtin_convertvector(*(const loose_halves *)from, words) << 16;
  return (floats)bits;
}

/* Zeros from `count` on. */
static inline floats widen_some(const bf16 *from, int64_t count) {
  if (count >= LANES) return widen(from);
  bf16 some[LANES] = {0};
  memcpy(some, from, count * sizeof(bf16));
  return widen(some);
}

/* 16 int8s as fp32. By intrinsics: __builtin_convertvector would have GCC convert them one by one. */
static inline __attribute__((always_inline)) floats widen_eight(const int8_t *from) {
#if defined(__AVX512F__)
  return (floats)_mm512_cvtepi32_ps(_mm512_cvtepi8_epi32(_mm_loadu_si128((const __m128i *)from)));
#elif defined(__AVX2__)
  union {
    floats all;
    __m256 half[2];
  } wide;
  __m128i eight = _mm_loadu_si128((const __m128i *)from);
  wide.half[0] = _mm256_cvtepi32_ps(_mm256_cvtepi8_epi32(eight));
  wide.half[1] = _mm256_cvtepi32_ps(_mm256_cvtepi8_epi32(_mm_srli_si128(eight, 8)));
  return wide.all;
#else
  float wide[LANES];
  for (int lane = 0; lane < LANES; lane++) wide[lane] = from[lane];
  return load(wide);
#endif
}

/* Whole numbers of fp32 as int8s. */
static inline void narrow_to_eight(int8_t *to, floats value) {
  ints wide = __builtin_convertvector(value, ints);
#if defined(__AVX512F__)
  _mm_storeu_si128((__m128i *)to, _mm512_cvtepi32_epi8((__m512i)wide));
#else
  for (int lane = 0; lane < LANES; lane++) to[lane] = (int8_t)wide[lane];
#endif
}

/* Numbers of a KV cache, int8 (`eight`) or bf16: those from `at` on. An int8 is one that bf16 holds exactly. */
static inline __attribute__((always_inline)) floats cached(const void *from, int64_t at, const int eight) {
  if (eight) return widen_eight((const int8_t *)from + at);
  return widen((const bf16 *)from + at);
}

/* Zeros from `count` on. */
static inline __attribute__((always_inline)) floats cached_some(const void *from, int64_t at, int64_t count,
                                                                const int eight) {
  if (count >= LANES) return cached(from, at, eight);
  bf16 some[LANES] = {0};
  memcpy(some, (const char *)from + at * (eight ? 1 : 2), count * (eight ? 1 : sizeof(bf16)));
  return cached(some, 0, eight);
}

/* To the nearest, ties to even, as torch rounds; a NaN stays one. */
static inline words narrowed(floats value) {
  words bits = (words)value;
  words rounded = (bits + 0x7fff + ((bits >> 16) & 1)) >> 16;
  words odd = (words)(value != value);
  return (rounded & ~odd) | (odd & 0x7fc0);
}

static inline void narrow(bf16 *to, floats value) {
  *(loose_halves *)to = __builtin_convertvector(narrowed(value), halves);
}

/* The value as bf16 holds it. */
static inline floats rounded(floats value) { return (floats)(narrowed(value) << 16); }

/* The same of scores and their weights, for which a number too small for fp32's exponent may be zero. */
static inline floats rounded_score(floats value) {
#ifdef __AVX512BF16__
  __m512i wide = _mm512_cvtepu16_epi32((__m256i)_mm512_cvtneps_pbh((__m512)value));
  return (floats)_mm512_slli_epi32(wide, 16);
#else
  return rounded(value);
#endif
}

static inline floats choose(ints which, floats yes, floats no) {
  return (floats)(((words)yes & (words)which) | ((words)no & ~(words)which));
}

/* a * b + c, rounded once where the processor can. */
static inline floats fused(floats a, floats b, floats c) {
#if defined(__AVX512F__)
  return (floats)_mm512_fmadd_ps((__m512)a, (__m512)b, (__m512)c);
#elif defined(__FMA__)
  union {
    floats all;
    __m256 half[2];
  } x = {a}, y = {b}, z = {c};
  for (int i = 0; i < 2; i++) z.half[i] = _mm256_fmadd_ps(x.half[i], y.half[i], z.half[i]);
  return z.all;
#else
  return a * b + c;
#endif
}

static inline float sum_of(floats value) {
  float sum = 0;
  for (int lane = 0; lane < LANES; lane++) sum += value[lane];
  return sum;
}

#ifdef __AVX512F__
/* 16 rows as columns. What is not `known` of a row is zero, and all of those that are not `there`. */
static inline __attribute__((always_inline)) void transpose_some(const float *from, int64_t stride, int64_t there,
                                                                 __mmask16 known, float *to) {
  __m512 r[16], t[16];
  for (int i = 0; i < 16; i++)
    r[i] = i < there ? _mm512_maskz_loadu_ps(known, from + i * stride) : _mm512_setzero_ps();
  for (int i = 0; i < 16; i += 2) {
    t[i] = _mm512_unpacklo_ps(r[i], r[i + 1]);
    t[i + 1] = _mm512_unpackhi_ps(r[i], r[i + 1]);
  }
  for (int i = 0; i < 16; i += 4)
    for (int j = 0; j < 2; j++) {
      __m512d low = _mm512_castps_pd(t[i + j]), high = _mm512_castps_pd(t[i + j + 2]);
      r[i + 2 * j] = _mm512_castpd_ps(_mm512_unpacklo_pd(low, high));
      r[i + 2 * j + 1] = _mm512_castpd_ps(_mm512_unpackhi_pd(low, high));
    }
  for (int i = 0; i < 4; i++) {
    t[i] = _mm512_shuffle_f32x4(r[i], r[i + 4], 0x88);
    t[i + 4] = _mm512_shuffle_f32x4(r[i], r[i + 4], 0xdd);
    t[i + 8] = _mm512_shuffle_f32x4(r[i + 8], r[i + 12], 0x88);
    t[i + 12] = _mm512_shuffle_f32x4(r[i + 8], r[i + 12], 0xdd);
  }
  for (int i = 0; i < 8; i++) {
    _mm512_storeu_ps(to + 16 * i, _mm512_shuffle_f32x4(t[i], t[i + 8], 0x88));
    _mm512_storeu_ps(to + 16 * (i + 8), _mm512_shuffle_f32x4(t[i], t[i + 8], 0xdd));
  }
}
#endif

static inline void transpose(const float *from, int64_t stride, float *to) {
#ifdef __AVX512F__
  transpose_some(from, stride, LANES, 0xffff, to);
#else
  for (int i = 0; i < 16; i++)
    for (int j = 0; j < 16; j++) to[16 * j + i] = from[i * stride + j];
#endif
}

/* e to the power of each value, by Cephes' polynomial, within 2 units of the last place. `half`: x / log(2), half a
 * unit farther from 0. */
static inline floats polynomial_exponentials(floats x, floats half) {
  ints power = __builtin_convertvector(half, ints); /* toward zero: to the nearest */
  floats n = __builtin_convertvector(power, floats);
  x -= n * each(0.693359375f);
  x -= n * each(-2.12194440e-4f);
  floats y = each(1.9875691500e-4f);
  y = fused(y, x, each(1.3981999507e-3f));
  y = fused(y, x, each(8.3334519073e-3f));
  y = fused(y, x, each(4.1665795894e-2f));
  y = fused(y, x, each(1.6666665459e-1f));
  y = fused(y, x, each(5.0000001201e-1f));
  y = fused(y, x * x, x + each(1.0f));
  return y * (floats)((power + 127) << 23);
}

/* e to the power of each value, none above 0. */
static inline floats exponentials(floats x) {
  x = choose(x < each(-87.0f), each(-87.0f), x);
  return polynomial_exponentials(x, x * each(1.44269504088896341f) - each(0.5f));
}

#endif
