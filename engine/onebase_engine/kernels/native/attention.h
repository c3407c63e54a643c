/* Attention over KV blocks: a part of kernels.c. */
typedef struct {
  const onebase_attention *layer;
  const onebase_contexts *contexts;
  const onebase_qkv *step;
  int32_t *parts;  /* pairs: first row, rows; of one context each */
  float *buffers;  /* of each thread */
  int64_t size;
} attention;

/* Queries of one context that one part takes. */
#define QUERIES 8
/* Of them, those that are multiplied at once, by registers. */
#define SCORED_AT_ONCE 8
#define MIXED_AT_ONCE 4
/* Scores that they may have together, before fewer are taken: 1 MB. */
#define SCORES (1 << 18)

/* A query or key of one row as attention uses it, turned by its position if the step says how. */
static inline void turned_head(const onebase_attention *layer, const onebase_qkv *step, const bf16 *from,
                               int64_t row, bf16 *to) {
  int64_t dim = layer->key_dim, half = dim / 2;
  if (!step->cosines) {
    memcpy(to, from, dim * sizeof(bf16));
    return;
  }
  const bf16 *cosines = step->cosines + row * dim, *sines = step->sines + row * dim;
  for (int64_t d = 0; d < dim; d += LANES) {
    floats other = d < half ? -widen(from + d + half) : widen(from + d - half);
    floats turned = rounded(widen(from + d) * widen(cosines + d)) + rounded(other * widen(sines + d));
    narrow(to + d, turned);
  }
}

/* The least scale: one that is no subnormal number, whatever the processor does with these. */
#define LEAST_SCALE 0x1p-100f
/* Added and taken away again, it leaves the nearest integer, ties to even. */
#define TO_INTEGER 12582912.0f

/* Writes numbers as int8 by a scale of their own, which it returns: the largest becomes 127, within a rounding of the
 * scale. Zeros with a scale of NaN stand for numbers of which one is not finite. */
static bf16 write_eight(const bf16 *from, int64_t count, int8_t *to) {
  floats most = {0};
  ints odd = {0};
  for (int64_t d = 0; d < count; d += LANES) {
    floats size = (floats)((words)widen_some(from + d, count - d) & 0x7fffffff);
    odd |= (ints)((words)size >= 0x7f800000);
    most = choose(size > most, size, most);
  }
  float largest = 0;
  for (int lane = 0; lane < LANES; lane++) {
    largest = most[lane] > largest ? most[lane] : largest;
    odd[0] |= odd[lane];
  }
  if (odd[0]) {
    memset(to, 0, count);
    return 0x7fc0;
  }
  bf16 scale[LANES];
  narrow(scale, each(largest / 127.0f < LEAST_SCALE ? LEAST_SCALE : largest / 127.0f));
  for (int64_t d = 0; d < count; d += LANES) {
    floats number = widen_some(from + d, count - d) / each(widened(*scale)) + each(TO_INTEGER) - each(TO_INTEGER);
    int8_t eight[LANES];
    narrow_to_eight(eight, number);
    memcpy(to + d, eight, least(LANES, count - d));
  }
  return *scale;
}

/* Returns whether the row's values are finite numbers. */
static int is_finite_row(const onebase_attention *layer, const onebase_qkv *step, int64_t row) {
  int odd = 0;
  for (int64_t head = 0; head < layer->kv_heads; head++) {
    const bf16 *value = step->v + row * step->v_row + head * step->v_head;
    for (int64_t d = 0; d < layer->value_dim; d++) odd |= (value[d] & 0x7f80) == 0x7f80;
  }
  return !odd;
}

/* Writes a row's keys and values. Returns whether the values are finite numbers. `own`: [key_dim], for itself. */
static int write_row(const onebase_attention *layer, const onebase_qkv *step, int64_t row, int64_t slot, bf16 *own) {
  int odd = 0;
  for (int64_t head = 0; head < layer->kv_heads; head++) {
    int64_t at = head * layer->slots + slot;
    const bf16 *key = step->k + row * step->k_row + head * step->k_head;
    const bf16 *value = step->v + row * step->v_row + head * step->v_head;
    for (int64_t d = 0; d < layer->value_dim; d++) odd |= (value[d] & 0x7f80) == 0x7f80;
    if (layer->key_scales) {
      turned_head(layer, step, key, row, own);
      layer->key_scales[at] = write_eight(own, layer->key_dim, (int8_t *)layer->keys + at * layer->key_dim);
      layer->value_scales[at] = write_eight(value, layer->value_dim, (int8_t *)layer->values + at * layer->value_dim);
    } else {
      turned_head(layer, step, key, row, (bf16 *)layer->keys + at * layer->key_dim);
      memcpy((bf16 *)layer->values + at * layer->value_dim, value, layer->value_dim * sizeof(bf16));
    }
  }
  return !odd;
}

/* The KV slots of positions `first` to `last`. */
static void find_slots(const onebase_attention *layer, const int32_t *table, int64_t first, int64_t last,
                       int32_t *slots) {
  int64_t size = layer->block_size, block = first / size, within = first % size;
  for (int64_t position = first; position <= last; block++, within = 0)
    for (; within < size && position <= last; within++, position++)
      *slots++ = (int32_t)(table[block] * size + within);
}

/* The scales of `count` keys or values, as fp32, and zeros up to `length`. */
static void find_scales(const bf16 *scales, const int32_t *slots, int64_t count, int64_t length, float *to) {
  for (int64_t i = 0; i < length; i++) to[i] = i < count ? widened(scales[slots[i]]) : 0;
}

/* The address of a cached number. */
static inline const void *place_of(const void *cache, int64_t at, const int eight) {
  return (const char *)cache + at * (eight ? 1 : (int64_t)sizeof(bf16));
}

/* Whether slots follow one another in memory. */
static inline int in_a_row(const int32_t *slots, int64_t count) {
  int same = 1;
  for (int64_t i = 1; i < count; i++) same &= slots[i] == slots[0] + i;
  return same;
}

/* The values of `count` keys, 16 at most, of the `left` ones, the others zero: [dim, 16]. Asks for what is read
 * next. */
static inline __attribute__((always_inline)) void turn_keys(const onebase_attention *layer, const void *keys,
                                                            const void *values, const int32_t *slots, int64_t count,
                                                            int64_t left, const int eight, float *to) {
  int64_t dim = layer->key_dim, wide = layer->value_dim, size = eight ? 1 : sizeof(bf16), d = 0;
  const void *of[LANES];
  for (int64_t i = 0; i < count; i++) {
    of[i] = place_of(keys, slots[i] * dim, eight);
    const char *value = place_of(values, slots[i] * wide, eight);
    for (int64_t byte = 0; byte < wide * size; byte += 64) __builtin_prefetch(value + byte);
    const char *key = place_of(keys, slots[least(i + 2 * LANES, left - 1)] * dim, eight);
    for (int64_t byte = 0; byte < dim * size; byte += 64) __builtin_prefetch(key + byte);
  }
  for (; d + LANES <= dim; d += LANES) {
    _Alignas(64) float square[16 * 16];
    for (int64_t i = 0; i < LANES; i++) store(square + 16 * i, i < count ? cached(of[i], d, eight) : (floats){0});
    transpose(square, 16, to + d * LANES);
  }
  for (; d < dim; d++)
    for (int64_t i = 0; i < LANES; i++) {
      float number = 0;
      if (i < count) number = eight ? ((const int8_t *)of[i])[d] : widened(((const bf16 *)of[i])[d]);
      to[d * LANES + i] = number;
    }
}

/* What eager attention makes of 16 products: rounded where it rounds. */
static inline floats scored(const onebase_attention *layer, floats product) {
  floats score = rounded_score(rounded_score(product) * each(layer->scaling));
  if (layer->softcap == 0) return score;
  score = rounded_score(score * each(1.0f / layer->softcap));
  for (int lane = 0; lane < LANES; lane++) score[lane] = tanhf(score[lane]);
  return rounded_score(rounded_score(score) * each(layer->softcap));
}

#ifdef __AVX512BF16__

/* 32 numbers of the cache as bf16. */
static inline __attribute__((always_inline)) __m512i halves_of(const void *cache, int64_t at, const int eight) {
  const void *from = place_of(cache, at, eight);
  if (!eight) return _mm512_loadu_si512(from);
  __m512 high = (__m512)widen_eight((const int8_t *)from + LANES);
  return (__m512i)_mm512_cvtne2ps_pbh(high, (__m512)widen_eight(from));
}

/* 16 keys one after the other as bf16, of which `count` are there. */
static inline __attribute__((always_inline)) void copy_keys(const void *keys, int64_t dim, const int32_t *slots,
                                                            int64_t count, const int eight, bf16 *to) {
  for (int64_t i = 0; i < count; i++, to += dim) {
    const void *key = place_of(keys, slots[i] * dim, eight);
    if (!eight) memcpy(to, key, dim * sizeof(bf16));
    else
      for (int64_t d = 0; d < dim; d += 2 * LANES) _mm512_storeu_si512(to + d, halves_of(key, d, eight));
  }
}

#endif

#ifdef __AMX_BF16__

/* Queries of one tile, and columns of values that are mixed at once. */
#define TILED 16
#define MIXED 16

/* Tiles 0: sums [16 keys, queries], 1: keys, 2: queries in pairs; 3: mixed [queries, 16], 4: weights, 5: values in
 * pairs. */
static void configure_attention(int64_t queries) {
  tile_config config = {.palette = 1};
  for (int i = 0; i < 6; i++) {
    config.rows[i] = 16;
    config.bytes[i] = 64;
  }
  config.bytes[0] = config.bytes[2] = 4 * queries;
  config.rows[3] = config.rows[4] = queries;
  _tile_loadconfig(&config);
}

/* Some queries, up to TILED, [dim / 2, queries] pairs. */
static void pair_queries(const bf16 *q, int64_t dim, int64_t queries, uint32_t *to) {
  for (int64_t i = 0; i < queries; i++)
    for (int64_t d = 0; d < dim / 2; d++) memcpy(to + d * queries + i, q + i * dim + 2 * d, 4);
}

/* Products of up to TILED queries with 16 keys, of which `count` are there: [queries, 16]. */
static inline __attribute__((always_inline)) void score_tile(const void *keys, int64_t dim, const int32_t *slots,
                                                             int64_t count, const uint32_t *pairs, int64_t queries,
                                                             const int eight, floats *sums) {
  _Alignas(64) bf16 copied[LANES * 1024];
  _Alignas(64) float square[LANES * LANES];
  const bf16 *from = (const bf16 *)keys + slots[0] * dim;
  if (eight || count < LANES || !in_a_row(slots, count)) {
    copy_keys(keys, dim, slots, count, eight, copied);
    memset(copied + count * dim, 0, (LANES - count) * dim * sizeof(bf16));
    from = copied;
  }
  _tile_zero(0);
  for (int64_t d = 0; d < dim; d += 32) {
    _tile_loadd(1, from + d, dim * sizeof(bf16));
    _tile_loadd(2, pairs + d / 2 * queries, queries * 4);
    _tile_dpbf16ps(0, 1, 2);
  }
  _tile_stored(0, square, 64);
  transpose(square, LANES, (float *)sums);
}

/* 16 numbers of the cache as bf16. */
static inline __attribute__((always_inline)) __m256i sixteen_halves(const void *cache, int64_t at, const int eight) {
  const void *from = place_of(cache, at, eight);
  if (!eight) return _mm256_loadu_si256(from);
  return (__m256i)_mm512_cvtneps_pbh((__m512)widen_eight(from));
}

/* Adds 16 columns of the values, from `column` on, for up to TILED queries, 32 keys after 32 keys: [queries, 16]. `weights`: bf16
 * [queries, stride], zero from `count` on up to the next 32. */
static inline __attribute__((always_inline)) void mix_tile(const void *values, int64_t column, int64_t wide,
                                                           const int32_t *slots, int64_t count, const bf16 *weights,
                                                           int64_t stride, int64_t queries, const int eight,
                                                           float *to) {
  (void)queries;
  const __m512i low = _mm512_set_epi16(
      47, 15, 46, 14, 45, 13, 44, 12, 43, 11, 42, 10, 41, 9, 40, 8, 39, 7, 38, 6, 37, 5, 36, 4, 35, 3, 34, 2, 33, 1,
      32, 0);
  _Alignas(64) uint32_t pairs[16 * 16];
  _tile_zero(3);
  for (int64_t key = 0; key < count; key += 32) {
    for (int64_t pair = 0; pair < 16; pair++) {
      int64_t first = key + 2 * pair;
      __m256i one = _mm256_setzero_si256(), two = one;
      if (first < count) one = sixteen_halves(values, slots[first] * wide + column, eight);
      if (first + 1 < count) two = sixteen_halves(values, slots[first + 1] * wide + column, eight);
      __m512i both = _mm512_permutex2var_epi16(_mm512_castsi256_si512(one), low, _mm512_castsi256_si512(two));
      _mm512_store_si512(pairs + 16 * pair, both);
    }
    _tile_loadd(4, weights + key, stride * sizeof(bf16));
    _tile_loadd(5, pairs, 64);
    _tile_dpbf16ps(3, 4, 5);
  }
  _tile_stored(3, to, 64);
}

#elif defined(__AVX512BF16__)

/* Queries that share a walk through keys and values, and columns of values that are mixed at once. */
#define TILED 8
#define MIXED 32

/* Products of some queries [queries, dim] with 16 keys as pairs [dim / 2, 16]. */
static inline __attribute__((always_inline)) void score_pairs(const bf16 *q, int64_t dim, const uint32_t *keys,
                                                              const int queries, floats *sums) {
  for (int i = 0; i < queries; i++) sums[i] = (floats){0};
  for (int64_t d = 0; d < dim / 2; d++) {
    floats key = load((const float *)(keys + d * LANES));
    for (int i = 0; i < queries; i++) sums[i] = multiplied(sums[i], q + i * dim, d, key);
  }
}

/* Products of up to TILED queries with 16 keys, of which `count` are there: [queries, 16]. */
static inline __attribute__((always_inline)) void score_tile(const void *keys, int64_t dim, const int32_t *slots,
                                                             int64_t count, const bf16 *q, int64_t queries,
                                                             const int eight, floats *sums) {
  _Alignas(64) bf16 copied[LANES * 1024];
  _Alignas(64) uint32_t turned_[LANES * 512];
  const bf16 *from = (const bf16 *)keys + slots[0] * dim;
  if (eight || !in_a_row(slots, count)) {
    copy_keys(keys, dim, slots, count, eight, copied);
    from = copied;
  }
  for (int64_t d = 0; d < dim; d += 32) turn_words(from + d, dim / 2, count, turned_ + d / 2 * LANES);
  if (queries == 8) score_pairs(q, dim, turned_, 8, sums);
  else
    for (int64_t i = 0; i < queries;) {
      if (queries - i >= 4) score_pairs(q + i * dim, dim, turned_, 4, sums + i), i += 4;
      else if (queries - i == 3) score_pairs(q + i * dim, dim, turned_, 3, sums + i), i += 3;
      else if (queries - i == 2) score_pairs(q + i * dim, dim, turned_, 2, sums + i), i += 2;
      else score_pairs(q + i * dim, dim, turned_, 1, sums + i), i += 1;
    }
}

/* Adds 32 columns of the values, from `column` on, for some queries, two keys after two keys: [queries, 32]. */
static inline __attribute__((always_inline)) void mix_pairs(const void *values, int64_t column, int64_t wide,
                                                            const int32_t *slots, int64_t count, const bf16 *weights,
                                                            int64_t stride, const int eight, const int queries,
                                                            float *to) {
  const __m512i low = _mm512_set_epi16(47, 15, 46, 14, 45, 13, 44, 12, 43, 11, 42, 10, 41, 9, 40, 8, 39, 7, 38, 6, 37, 5,
                                       36, 4, 35, 3, 34, 2, 33, 1, 32, 0);
  const __m512i high = _mm512_add_epi16(low, _mm512_set1_epi16(16));
  floats mixed[2 * TILED];
  for (int i = 0; i < 2 * queries; i++) mixed[i] = (floats){0};
  for (int64_t key = 0; key < count; key += 2) {
    __m512i one = halves_of(values, slots[key] * wide + column, eight), two = _mm512_setzero_si512();
    if (key + 1 < count) two = halves_of(values, slots[key + 1] * wide + column, eight);
    floats first = (floats)_mm512_permutex2var_epi16(one, low, two);
    floats second = (floats)_mm512_permutex2var_epi16(one, high, two);
    for (int i = 0; i < queries; i++) {
      mixed[2 * i] = multiplied(mixed[2 * i], weights + i * stride + key, 0, first);
      mixed[2 * i + 1] = multiplied(mixed[2 * i + 1], weights + i * stride + key, 0, second);
    }
  }
  for (int i = 0; i < 2 * queries; i++) store(to + i * LANES, mixed[i]);
}

static inline __attribute__((always_inline)) void mix_tile(const void *values, int64_t column, int64_t wide,
                                                           const int32_t *slots, int64_t count, const bf16 *weights,
                                                           int64_t stride, int64_t queries, const int eight,
                                                           float *to) {
  for (int64_t i = 0; i < queries;) {
    const bf16 *own = weights + i * stride;
    float *out = to + 2 * i * LANES;
    if (queries - i >= 8) mix_pairs(values, column, wide, slots, count, own, stride, eight, 8, out), i += 8;
    else if (queries - i >= 4) mix_pairs(values, column, wide, slots, count, own, stride, eight, 4, out), i += 4;
    else if (queries - i == 3) mix_pairs(values, column, wide, slots, count, own, stride, eight, 3, out), i += 3;
    else if (queries - i == 2) mix_pairs(values, column, wide, slots, count, own, stride, eight, 2, out), i += 2;
    else mix_pairs(values, column, wide, slots, count, own, stride, eight, 1, out), i += 1;
  }
}

#endif

/* Products of some queries with 16 keys. */
static inline __attribute__((always_inline)) void score_keys(const float *q, int64_t dim, const float *turned,
                                                             const int count, floats *sums) {
  for (int i = 0; i < count; i++) sums[i] = (floats){0};
  for (int64_t d = 0; d < dim; d++) {
    floats key = load(turned + d * LANES);
    for (int i = 0; i < count; i++) sums[i] = fused(each(q[i * dim + d]), key, sums[i]);
  }
}

/* Adds 64 columns of the values, of which `columns` are there, by their weights, key after key, for some queries. */
static inline __attribute__((always_inline)) void mix_values(const void *values, int64_t wide, int64_t columns,
                                                             const int32_t *slots, int64_t keys,
                                                             const float *weights, int64_t stride,
                                                             const int eight, const int count, floats *mixed) {
  for (int i = 0; i < 4 * count; i++) mixed[i] = (floats){0};
  for (int64_t key = 0; key < keys; key++) {
    const void *value = place_of(values, slots[key] * wide, eight);
    floats some[4];
    for (int j = 0; j < 4; j++)
      some[j] = columns >= 4 * LANES ? cached(value, j * LANES, eight)
                : columns > j * LANES ? cached_some(value, j * LANES, columns - j * LANES, eight)
                                      : (floats){0};
    for (int i = 0; i < count; i++)
      for (int j = 0; j < 4; j++) mixed[4 * i + j] = fused(each(weights[i * stride + key]), some[j], mixed[4 * i + j]);
  }
}

/* Weights of the scores of one query [length], in place, as eager attention rounds them. A `sink` (null: none) is one
 * more score, of which the weight is dropped; `scales` (null: none) of the values are multiplied with the weights, and
 * rounded again. */
static inline void soften(float *scores, int64_t length, const float *sink, const float *scales) {
  floats most = load(scores), sum = {0};
  for (int64_t k = LANES; k < length; k += LANES) {
    floats score = load(scores + k);
    most = choose(score > most, score, most);
  }
  float largest = most[0];
  for (int lane = 1; lane < LANES; lane++) largest = most[lane] > largest ? most[lane] : largest;
  if (sink && *sink > largest) largest = *sink;
  for (int64_t k = 0; k < length; k += LANES) {
    floats score = load(scores + k), e = exponentials(score - each(largest));
    e = choose(score == each(-INFINITY), each(0.0f), e);
    store(scores + k, e);
    sum += e;
  }
  floats total = each(sum_of(sum));
  if (sink) total += exponentials(each(*sink - largest));
  for (int64_t k = 0; k < length; k += LANES) {
    floats weight = rounded_score(load(scores + k) / total);
    store(scores + k, scales ? rounded_score(weight * load(scales + k)) : weight);
  }
}

/* Hides the scores of one query at `position` with keys before its chunk, the first of them at position `first`. */
static void hide_chunks(const onebase_attention *layer, int64_t position, int64_t first, float *scores) {
  int64_t hidden = position - position % layer->chunk - first;
  for (int64_t k = 0; k < hidden; k++) scores[k] = -INFINITY;
}

/* Stores the scores of one query with 16 keys, the first of them at position `first`. */
static inline void keep_scores(const onebase_attention *layer, int32_t position, int64_t first, floats sum,
                               float *to) {
  ints at = (ints){0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 13, 14, 15} + (int32_t)first;
  ints hidden = at > position;
  if (layer->window) hidden |= at <= position - (int32_t)layer->window;
  store(to, choose(hidden, each(-INFINITY), scored(layer, sum)));
}

#ifdef __AVX512BF16__

/* The same as the rest of `attend_some`, for heads of whole tiles. */
static inline __attribute__((always_inline)) void attend_by_tiles(
    const attention *a, int64_t first_row, int64_t head, int64_t queries, const int32_t *slots, const float *key_scales,
    const float *value_scales, int64_t count, int64_t length, int64_t begin, const int eight, float *turned, float *q,
    float *scores) {
  const onebase_attention *layer = a->layer;
  int64_t groups = layer->groups, dim = layer->key_dim, wide = layer->value_dim;
  const void *keys = place_of(layer->keys, head * layer->slots * dim, eight);
  const void *values = place_of(layer->values, head * layer->slots * wide, eight);
  bf16 *own_q = (bf16 *)turned; /* [TILED, dim] */
#ifdef __AMX_BF16__
  uint32_t *pairs = (uint32_t *)(own_q + TILED * dim);
#else
  const bf16 *pairs = own_q;
#endif
  for (int64_t i = 0; i < queries; i += TILED) {
    int64_t some = least(TILED, queries - i);
    float *own = scores + i * length;
    for (int64_t d = 0; d < some * dim; d += LANES) narrow(own_q + d, load(q + i * dim + d));
#ifdef __AMX_BF16__
    configure_attention(some);
    pair_queries(own_q, dim, some, pairs);
#endif
    for (int64_t key = 0; key < length; key += LANES) {
      floats sums[TILED];
      int64_t there = count - key < 0 ? 0 : least(LANES, count - key);
      if (there) score_tile(keys, dim, slots + key, there, pairs, some, eight, sums);
      for (int64_t next = key + 2 * LANES; next < least(key + 3 * LANES, count); next++) {
        __builtin_prefetch(place_of(keys, slots[next] * dim, eight));
        __builtin_prefetch(place_of(values, slots[next] * wide, eight));
        if (!eight) {
          __builtin_prefetch(place_of(keys, slots[next] * dim + 32, eight));
          __builtin_prefetch(place_of(values, slots[next] * wide + 32, eight));
        }
      }
      for (int64_t j = 0; j < some; j++) {
        int32_t position = a->contexts->position[first_row + (i + j) / groups];
        floats product = there ? sums[j] : (floats){0};
        if (eight) product *= load(key_scales + key);
        keep_scores(layer, position, begin + key, product, own + j * length + key);
      }
    }
    for (int64_t j = 0; j < some; j++) {
      bf16 *weights = (bf16 *)(own + j * length); /* in place: half as wide */
      const float *sink = layer->sinks ? layer->sinks + head * groups + (i + j) % groups : NULL;
      if (layer->chunk) hide_chunks(layer, a->contexts->position[first_row + (i + j) / groups], begin, own + j * length);
      soften(own + j * length, length, sink, eight ? value_scales : NULL);
      for (int64_t k = 0; k < length; k += LANES) narrow(weights + k, load(own + j * length + k));
    }
    for (int64_t d = 0; d < wide; d += MIXED) {
      _Alignas(64) float mixed[TILED * MIXED];
      mix_tile(values, d, wide, slots, count, (const bf16 *)own, 2 * length, some, eight, mixed);
      for (int64_t j = 0; j < some; j++) {
        int64_t row = first_row + (i + j) / groups, own_head = head * groups + (i + j) % groups;
        bf16 *out = a->step->out + (row * layer->kv_heads * groups + own_head) * wide + d;
        for (int64_t column = 0; column < MIXED; column += LANES)
          narrow(out + column, load(mixed + j * MIXED + column));
      }
    }
  }
#ifdef __AMX_BF16__
  _tile_release();
#endif
}

#endif

static inline __attribute__((always_inline)) void attend_some(const attention *a, int64_t part, int64_t thread,
                                                              const int eight) {
  const onebase_attention *layer = a->layer;
  const onebase_contexts *contexts = a->contexts;
  const onebase_qkv *step = a->step;
  int64_t head = part % layer->kv_heads, some = part / layer->kv_heads;
  int64_t first_row = a->parts[2 * some], rows = a->parts[2 * some + 1];
  int64_t groups = layer->groups, queries = rows * groups, dim = layer->key_dim, wide = layer->value_dim;
  const int32_t *table = contexts->table + (int64_t)contexts->table_row[first_row] * contexts->table_width;
  const void *keys = place_of(layer->keys, head * layer->slots * dim, eight);
  const void *values = place_of(layer->values, head * layer->slots * wide, eight);
  int64_t last = contexts->position[first_row + rows - 1], begin = 0;
  if (layer->window) {
    begin = contexts->position[first_row] - layer->window + 1;
    begin = begin < 0 ? 0 : begin / 32 * 32; /* keys are summed by 32 from the first of all on */
  } else if (layer->chunk) {
    begin = contexts->position[first_row];
    begin = (begin - begin % layer->chunk) / 32 * 32;
  }
  int64_t count = last + 1 - begin, length = parts_of(count, 2 * LANES) * 2 * LANES;
  float *turned = a->buffers + thread * a->size, *q = turned + dim * LANES, *scores = q + queries * dim;
  int32_t *slots = (int32_t *)(scores + queries * length);
  float *key_scales = (float *)(slots + length + dim), *value_scales = key_scales + length;
  find_slots(layer, table, begin, last, slots);
  if (eight) {
    find_scales(layer->key_scales + head * layer->slots, slots, count, length, key_scales);
    find_scales(layer->value_scales + head * layer->slots, slots, count, length, value_scales);
  }
  for (int64_t i = 0; i < queries; i++) {
    int64_t row = first_row + i / groups;
    bf16 *own = (bf16 *)(slots + length);
    turned_head(layer, step, step->q + row * step->q_row + (head * groups + i % groups) * step->q_head, row, own);
    for (int64_t d = 0; d < dim; d++) q[i * dim + d] = widened(own[d]);
  }
#ifdef __AVX512BF16__
  if (dim % 32 == 0 && dim <= 1024 && wide % MIXED == 0) {
    attend_by_tiles(a, first_row, head, queries, slots, key_scales, value_scales, count, length, begin, eight, turned,
                    q, scores);
    return;
  }
#endif
  for (int64_t key = 0; key < count; key += LANES) {
    turn_keys(layer, keys, values, slots + key, least(LANES, count - key), count - key, eight, turned);
    for (int64_t i = 0, together; i < queries; i += together) {
      floats sums[SCORED_AT_ONCE];
      together = queries - i;
      if (together >= SCORED_AT_ONCE) score_keys(q + i * dim, dim, turned, together = SCORED_AT_ONCE, sums);
      else if (together >= 4) score_keys(q + i * dim, dim, turned, together = 4, sums);
      else if (together == 3) score_keys(q + i * dim, dim, turned, 3, sums);
      else if (together == 2) score_keys(q + i * dim, dim, turned, 2, sums);
      else score_keys(q + i * dim, dim, turned, 1, sums);
      for (int64_t j = 0; j < together; j++) {
        int32_t position = contexts->position[first_row + (i + j) / groups];
        if (eight) sums[j] *= load(key_scales + key);
        keep_scores(layer, position, begin + key, sums[j], scores + (i + j) * length + key);
      }
    }
  }
  for (int64_t i = 0; i < queries; i++) {
    const float *sink = layer->sinks ? layer->sinks + head * groups + i % groups : NULL;
    if (layer->chunk) hide_chunks(layer, contexts->position[first_row + i / groups], begin, scores + i * length);
    soften(scores + i * length, parts_of(count, LANES) * LANES, sink, eight ? value_scales : NULL);
  }
  for (int64_t d = 0; d < wide; d += 4 * LANES)
    for (int64_t i = 0; i < queries; i += MIXED_AT_ONCE) {
      floats mixed[4 * MIXED_AT_ONCE];
      int64_t together = least(MIXED_AT_ONCE, queries - i), columns = wide - d;
      const float *own = scores + i * length;
      const void *from = place_of(values, d, eight);
      switch (together) {
        case 1: mix_values(from, wide, columns, slots, count, own, length, eight, 1, mixed); break;
        case 2: mix_values(from, wide, columns, slots, count, own, length, eight, 2, mixed); break;
        case 3: mix_values(from, wide, columns, slots, count, own, length, eight, 3, mixed); break;
        default: mix_values(from, wide, columns, slots, count, own, length, eight, 4, mixed);
      }
      for (int64_t j = 0; j < together; j++) {
        int64_t row = first_row + (i + j) / groups, own_head = head * groups + (i + j) % groups;
        bf16 out[4 * LANES];
        for (int part_ = 0; part_ < 4; part_++) narrow(out + part_ * LANES, mixed[4 * j + part_]);
        memcpy(step->out + (row * layer->kv_heads * groups + own_head) * wide + d, out,
               least(4 * LANES, columns) * sizeof(bf16));
      }
    }
}

static void attend_part(void *task, int64_t part, int64_t thread) { attend_some(task, part, thread, 0); }
static void attend_part_of_eight(void *task, int64_t part, int64_t thread) { attend_some(task, part, thread, 1); }

/* A part's rows have the weight zero for each other's later keys: an infinite value would reach them all the same,
 * so that a row with one begins a part. */
static int attend(const onebase_attention *layer, const onebase_contexts *contexts, const onebase_qkv *step,
                  int64_t threads) {
  attention a = {.layer = layer, .contexts = contexts, .step = step};
  int64_t parts = 0, heads = layer->kv_heads * layer->groups, most = 0;
  a.parts = onebase_scratch(ONEBASE_PLACES, contexts->rows * 9 + layer->key_dim * sizeof(bf16));
  if (!a.parts) return ONEBASE_OUT_OF_MEMORY;
  bf16 *key = (bf16 *)(a.parts + 2 * contexts->rows);
  char *finite = (char *)(key + layer->key_dim);
  for (int64_t row = 0; row < contexts->rows; row++)
    finite[row] = (char)(layer->writes ? write_row(layer, step, row, contexts->write[row], key)
                                       : is_finite_row(layer, step, row));
  for (int64_t row = 0; row < contexts->rows;) {
    int64_t count = 1, length = parts_of(contexts->position[row] + 1 + QUERIES + 32, 2 * LANES) * 2 * LANES;
    if (contexts->position[row] < 0) {
      memset(step->out + row * heads * layer->value_dim, 0, heads * layer->value_dim * sizeof(bf16));
      row++;
      continue;
    }
    while (row + count < contexts->rows && count < QUERIES && contexts->position[row + count] >= 0 &&
           contexts->table_row[row + count] == contexts->table_row[row] && finite[row + count] &&
           (count + 1) * layer->groups * length <= SCORES)
      count++;
    a.parts[2 * parts] = (int32_t)row;
    a.parts[2 * parts++ + 1] = (int32_t)count;
    int64_t size = count * layer->groups * (length + layer->key_dim) + length + layer->key_dim;
    if (layer->key_scales) size += 2 * length;
    most = size > most ? size : most;
    row += count;
  }
  a.size = parts_of(most + layer->key_dim * LANES * 2, LANES) * LANES;
  a.buffers = onebase_scratch(ONEBASE_PANELS, threads * a.size * 4);
  if (!a.buffers) return ONEBASE_OUT_OF_MEMORY;
  onebase_share(layer->key_scales ? attend_part_of_eight : attend_part, &a, parts * layer->kv_heads);
  return 0;
}
