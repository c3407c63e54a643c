/* Products of a batch with layers, adapters included: a part of kernels.c.
 *
 * A product goes by panels of 16 outputs. Weights of a panel are unpacked into the cache, as the bits that
 * bitsandbytes' `dequantize_4bit` or `int8_vectorwise_dequant` gives, and multiplied with all rows of the batch.
 */

/* Rows of an AMX tile, and tiles of rows that stay in registers over all of `in`. */
#define TILE 16
#define TILES 4

/* ---- weights ------------------------------------------------------------------------------- */

/* Terms that are unpacked at once, into the nearest cache. Fewer would have memory read less of a row at a time. */
#define CHUNK 128

/* The scale that is number `place` of a layer's in 8 bits. */
static inline float nested_scale(const onebase_linear *layer, int64_t place) {
  place += layer->nested_first;
  return layer->nested_code[layer->nested[place]] * layer->nested_absmax[place >> 8] + layer->nested_offset;
}

/* The scale of the block of an output with a term. */
static inline float scale_of(const onebase_linear *layer, int64_t output, int64_t term) {
  int64_t blocks = layer->in >> layer->blocksize_log2, block = term >> layer->blocksize_log2;
  if (layer->nested) return nested_scale(layer, output * blocks + block);
  return layer->absmax[(output / LANES * blocks + block) * LANES + output % LANES];
}

/* Terms whose scales in 8 bits are read at once, a multiple of CHUNK, and the most blocks that they lie in. */
#define WINDOW 1024
#define WINDOW_BLOCKS (WINDOW / 32)

/* Reads the scales of a panel's outputs that are in 8 bits, [blocks, 16], from the block with term `first` on: those
 * of `count` terms. */
static inline void read_scales(const onebase_linear *layer, int64_t panel, int64_t first, int64_t count, float *to) {
  int64_t shift = layer->blocksize_log2, blocks = layer->in >> shift, begin = first >> shift;
  int64_t some = ((first + count - 1) >> shift) - begin + 1, there = least(LANES, layer->out - panel * LANES);
  const float *code = layer->nested_code, offset = layer->nested_offset;
  if (there < LANES) memset(to, 0, some * LANES * sizeof(float));
  for (int64_t lane = 0; lane < there; lane++) {
    int64_t place = layer->nested_first + (panel * LANES + lane) * blocks + begin;
    const uint8_t *numbers = layer->nested + place;
    for (int64_t block = 0; block < some;) {
      int64_t last = least(some, block + 256 - ((place + block) & 255));
      float factor = layer->nested_absmax[(place + block) >> 8];
      for (; block < last; block++) to[block * LANES + lane] = code[numbers[block]] * factor + offset;
    }
  }
}

#if defined(__AVX512F__) && defined(__AVX512BW__)

/* The 16 weights that a block may have, twice, as bf16. */
static inline __m512i shades_of(floats code, float scale) {
  __m512 shades = _mm512_mul_ps((__m512)code, _mm512_set1_ps(scale));
#ifdef __AVX512BF16__
  return _mm512_broadcast_i64x4((__m256i)_mm512_cvtneps_pbh(shades));
#else
  return _mm512_broadcast_i64x4(_mm512_cvtepi32_epi16((__m512i)narrowed((floats)shades)));
#endif
}

/* Bytes by which weights are asked for before they are needed: memory answers late. */
#define AHEAD 4096

/* 32 weights from 16 bytes: a byte stands in two words, shifted to its high and to its low value. The table's
 * second half makes a value's fifth bit meaningless. */
static inline void unpack_32(const uint8_t *packed, __m512i shades, bf16 *to) {
  const __m512i spread = _mm512_set_epi64(
      (int64_t)0x800f800f800e800e, (int64_t)0x800d800d800c800c, (int64_t)0x800b800b800a800a,
      (int64_t)0x8009800980088008, (int64_t)0x8007800780068006, (int64_t)0x8005800580048004,
      (int64_t)0x8003800380028002, (int64_t)0x8001800180008000);
  __m512i bytes = _mm512_broadcast_i32x4(_mm_loadu_si128((const __m128i *)packed));
  __m512i values = _mm512_srlv_epi16(_mm512_shuffle_epi8(bytes, spread), _mm512_set1_epi32(4));
  _mm512_storeu_si512(to, _mm512_permutexvar_epi16(values, shades));
}

/* `count` 4-bit weights of an output from term `first` on, both multiples of 32, as bf16. */
static inline void unpack(const onebase_linear *layer, int64_t output, int64_t first, int64_t count, bf16 *to) {
  const uint8_t *packed = (const uint8_t *)layer->weight + (output * layer->in + first) / 2;
  floats code = load(layer->code);
  if (layer->blocksize_log2 == 6 && (first | count) % 64 == 0) {
    for (int64_t done = 0; done < count; done += 64, packed += 32) {
      __m512i shades = shades_of(code, scale_of(layer, output, first + done));
      unpack_32(packed, shades, to + done);
      unpack_32(packed + 16, shades, to + done + 32);
      __builtin_prefetch(packed + AHEAD);
    }
    return;
  }
  for (int64_t done = 0; done < count; done += 32, packed += 16)
    unpack_32(packed, shades_of(code, scale_of(layer, output, first + done)), to + done);
}

#else

static inline void unpack(const onebase_linear *layer, int64_t output, int64_t first, int64_t count, bf16 *to) {
  const uint8_t *packed = (const uint8_t *)layer->weight + (output * layer->in + first) / 2;
  floats code = load(layer->code);
  bf16 shades[LANES];
  for (int64_t done = 0; done < count; done += 2, packed++) {
    if (done % 32 == 0) narrow(shades, code * each(scale_of(layer, output, first + done)));
    to[done] = shades[*packed >> 4];
    to[done + 1] = shades[*packed & 15];
  }
}

#endif

/* `count` int8 weights of an output from term `first` on, both multiples of 32, as bf16. */
static inline void unpack_eight(const onebase_linear *layer, int64_t output, int64_t first, int64_t count, bf16 *to) {
  const int8_t *from = (const int8_t *)layer->weight + output * layer->in + first;
  floats largest = each(layer->absmax[output]);
  for (int64_t done = 0; done < count; done += LANES)
    narrow(to + done, widen_eight(from + done) * largest * each(1.0f / 127.0f));
}

#if defined(__AMX_BF16__) || !defined(__AVX2__)

/* Terms `first .. last` of each of a panel's outputs, a row of `last - first` bf16 for each of the 16. Returns
 * where they lie and the stride between rows: in the scratch, or where the layer has them. */
static const bf16 *panel_of(const onebase_linear *layer, int64_t panel, int64_t first, int64_t last,
                            bf16 *scratch, int64_t *stride) {
  int64_t outputs = least(LANES, layer->out - panel * LANES), terms = last - first;
  if (layer->kind == ONEBASE_BF16 && outputs == LANES) {
    *stride = layer->in;
    return (const bf16 *)layer->weight + panel * LANES * layer->in + first;
  }
  *stride = terms;
  for (int64_t output = 0; output < outputs; output++) {
    int64_t row = panel * LANES + output;
    if (layer->kind == ONEBASE_NF4) unpack(layer, row, first, terms, scratch + output * terms);
    else if (layer->kind == ONEBASE_INT8) unpack_eight(layer, row, first, terms, scratch + output * terms);
    else memcpy(scratch + output * terms, (const bf16 *)layer->weight + row * layer->in + first, terms * sizeof(bf16));
  }
  memset(scratch + outputs * terms, 0, (LANES - outputs) * terms * sizeof(bf16));
  return scratch;
}

#endif

/* ---- the product --------------------------------------------------------------------------- */

/* Panels that a thread takes at once, and ranges of them: each thread has one, in which it goes from one end to the
 * other, as memory is read best, before it helps with the others. */
#define TAKEN 4
#define RANGES 16

/* Parts of a task, as the threads draw them. */
typedef struct {
  int64_t count;
  struct {
    _Alignas(64) int64_t last;
    _Atomic int64_t next;
  } range[RANGES];
} ranges;

/* Layers that multiply the same rows. */
typedef struct {
  const onebase_linear *layers[ONEBASE_MOST_LAYERS];
  bf16 *ys[ONEBASE_MOST_LAYERS];
  int64_t count, gated;
  const onebase_groups *groups;
  const bf16 *x;
  int64_t rows, in;
  uint32_t *tiles;   /* AMX: pairs of terms of 16 rows, [tiles, in / 2, tile] */
  int64_t tile;      /* rows of each of them */
  float *floats;     /* [rows, in], of rows that an adapter acts on */
  float *hidden;     /* x A^T of each term of each group, [rows, rank] */
  int64_t *starts;   /* of the hidden of each term of each layer */
  int64_t terms;     /* of all groups */
  int32_t *jobs;     /* pairs: group, its first row */
  int64_t job_count;
  float *panels;     /* of each thread */
  int64_t panel_size;
  int64_t padded;    /* rows, to the next multiple of a tile */
  ranges *ranges;
} product;

/* Rows of a group that are taken at once. */
#define SHRUNK 32

/* Values of an adapter that are asked for at once at most: many more would push each other out. */
#define ASKED 1024

#ifdef __AMX_BF16__

typedef struct {
  uint8_t palette, start, reserved[14];
  uint16_t bytes[16];
  uint8_t rows[16];
} tile_config;

static void configure(int64_t tile) {
  tile_config config = {.palette = 1};
  for (int i = 0; i < 7; i++) {
    config.rows[i] = 16;
    config.bytes[i] = i < 6 ? 4 * tile : 64;
  }
  _tile_loadconfig(&config);
}

/* Tiles 0 to 3 hold sums [16 outputs, rows], 5 a tile of rows, 6 one of weights. */
static inline void multiply_tiles(const bf16 *weights, int64_t stride, const uint32_t *rows, int64_t next,
                                  int64_t tile, int64_t terms, int count, int ahead) {
  for (int64_t k = 0; k < terms; k += 32) {
    _tile_loadd(6, weights + k, stride * 2);
    if (ahead)
      for (int64_t row = 0; row < LANES; row++) __builtin_prefetch(weights + (LANES + row) * stride + k);
    const uint32_t *pairs = rows + k / 2 * tile;
    _tile_loadd(5, pairs, tile * 4);
    _tile_dpbf16ps(0, 6, 5);
    if (count < 2) continue;
    _tile_loadd(5, pairs + next, tile * 4);
    _tile_dpbf16ps(1, 6, 5);
    if (count < 3) continue;
    _tile_loadd(5, pairs + 2 * next, tile * 4);
    _tile_dpbf16ps(2, 6, 5);
    if (count < 4) continue;
    _tile_loadd(5, pairs + 3 * next, tile * 4);
    _tile_dpbf16ps(3, 6, 5);
  }
}

static inline void store_tile(int number, float *to) {
  switch (number) {
    case 0: _tile_stored(0, to, 64); break;
    case 1: _tile_stored(1, to, 64); break;
    case 2: _tile_stored(2, to, 64); break;
    default: _tile_stored(3, to, 64);
  }
}

/* Panels that are multiplied at once. */
#define PANELS 1

/* Sums of one panel over all rows, [rows, 16]. */
static void multiply(const product *p, const onebase_linear *layer, int64_t panel, int64_t panels, float *scratch,
                     int64_t panel_size, float *sums) {
  (void)panels, (void)panel_size;
  int64_t in = p->in, next = in / 2 * p->tile, tiles = parts_of(p->rows, p->tile), stride;
  int64_t step = tiles > TILES ? in : least(in, 512);
  _Alignas(64) float square[16 * 16];
  const bf16 *weights = NULL;
  if (step == in) weights = panel_of(layer, panel, 0, in, (bf16 *)scratch, &stride);
  for (int64_t first = 0; first < tiles; first += TILES) {
    int count = (int)least(TILES, tiles - first);
    _tile_zero(0);
    _tile_zero(1);
    _tile_zero(2);
    _tile_zero(3);
    for (int64_t k = 0; k < in; k += step) {
      int64_t terms = least(step, in - k);
      if (step != in) weights = panel_of(layer, panel, k, k + terms, (bf16 *)scratch, &stride);
      multiply_tiles(weights, stride, p->tiles + first * next + k / 2 * p->tile, next, p->tile, terms, count,
                     layer->kind == ONEBASE_BF16 && !first);
    }
    for (int i = 0; i < count; i++) {
      float *to = sums + (first + i) * p->tile * LANES;
      if (p->tile == 1) {
        _tile_stored(0, to, 4);
        continue;
      }
      store_tile(i, square);
      if (p->tile == TILE) transpose(square, 16, to);
      else {
        _Alignas(64) float turned[16 * 16];
        transpose(square, 16, turned);
        memcpy(to, turned, p->tile * LANES * sizeof(float));
      }
    }
  }
}

/* Rows `16 * number ..` of x as pairs of terms, pair after pair. */
static void pair_rows(const product *p, int64_t number) {
  int64_t in = p->in, tile = p->tile, first = number * tile, count = least(tile, p->rows - first);
  uint32_t *to = p->tiles + number * (in / 2) * tile;
  const uint32_t *from = (const uint32_t *)(p->x + first * in);
  if (tile == 1) {
    memcpy(to, from, in * sizeof(bf16));
    return;
  }
  for (int64_t k = 0; k < in / 2; k++)
    for (int64_t row = 0; row < tile; row++) to[k * tile + row] = row < count ? from[row * (in / 2) + k] : 0;
}

#else

#if defined(__AVX512BF16__)
#define TERMS 2
typedef uint32_t turned; /* two terms of one output */
#else
#define TERMS 1
typedef float turned; /* one term of one output */
#endif

/* Rows and panels that are multiplied at once: their sums stay in registers. */
#define ROWS_AT_ONCE 4
#if defined(__AVX2__)
#define PANELS 4
#else
#define PANELS 1
#endif

/* Bytes that so many weights take. */
static inline int64_t size_of(const onebase_linear *layer, int64_t weights) {
  return layer->kind == ONEBASE_NF4 ? weights / 2 : layer->kind == ONEBASE_INT8 ? weights : 2 * weights;
}

#ifdef __AVX2__

static inline void ask_for(const char *from, int64_t size) {
  for (const char *line = from; line < from + size; line += 64) __builtin_prefetch(line);
}

/* The same for 32 terms of a panel in bf16. What lies `ahead` is needed so much later that the first cache has no room
 * for it, so it goes to the second one; from there come the terms of `rows`, `stride` apart, that are next but one. */
static inline void ask_for_plain(const char *ahead, const char *rows, int64_t stride, int64_t there) {
  for (int64_t line = 0; line < 32 * LANES * 2; line += 64) __builtin_prefetch(ahead + line, 0, 2);
  for (int64_t row = 0; row < there; row++) __builtin_prefetch(rows + row * stride + 2 * 64);
}

/* `size` bytes of each of a panel's 16 outputs, `stride` apart: where they lie, or in the room with the last one again
 * and again if not all are `there`. */
static inline const uint8_t *all_rows(const uint8_t *from, int64_t *stride, int64_t size, int64_t there,
                                      uint8_t *room) {
  if (there == LANES) return from;
  for (int64_t row = 0; row < LANES; row++) memcpy(room + row * size, from + least(row, there - 1) * *stride, size);
  *stride = size;
  return room;
}

/* `count` int8 weights of each of a panel's outputs from term `first` on, as bf16 [16, count]. */
static inline void unpack_rows(const onebase_linear *layer, int64_t panel, int64_t first, int64_t count, bf16 *to) {
  int64_t there = least(LANES, layer->out - panel * LANES);
  for (int64_t row = 0; row < LANES; row++)
    unpack_eight(layer, panel * LANES + least(row, there - 1), first, count, to + row * count);
}

#endif

#if defined(__AVX512F__)

/* 16 rows of as many words as columns; those that are not `there` are zero. */
static inline void turn_words(const void *from, int64_t stride, int64_t there, uint32_t *to) {
  if (there == LANES) transpose(from, stride, (float *)to);
  else transpose_some(from, stride, there, 0xffff, (float *)to);
}

/* Stores pair `number` of terms of 16 outputs, bf16. */
static inline void put_pair(turned *to, int64_t number, __m512i pair) {
#if TERMS == 2
  _mm512_store_si512(to + number * LANES, pair);
#else
  _mm512_store_si512(to + 2 * number * LANES, _mm512_slli_epi32(pair, 16));
  _mm512_store_si512(to + (2 * number + 1) * LANES, _mm512_and_si512(pair, _mm512_set1_epi32((int)0xffff0000)));
#endif
}

/* 32 numbers as bf16. */
static inline __m512i narrow_two(__m512 low, __m512 high) {
#ifdef __AVX512BF16__
  return (__m512i)_mm512_cvtne2ps_pbh(high, low);
#else
  __m256i first = _mm512_cvtepi32_epi16((__m512i)narrowed((floats)low));
  return _mm512_inserti64x4(_mm512_castsi256_si512(first), _mm512_cvtepi32_epi16((__m512i)narrowed((floats)high)), 1);
#endif
}

/* Terms `first ..` of a panel of 4-bit weights, `count` of them, 128 at most and a multiple of 32:
 * [count / TERMS, 16].
 *
 * A vector has 32 terms of each of four outputs, of `4 * quarter + w` in a quarter of it. The 16 weights that each of
 * them may have in a block are a table of 64 bf16, from which a word's lowest six bits choose: four of a weight and
 * the number of its quarter. */
static inline void turn_nf4(const onebase_linear *layer, int64_t panel, int64_t first, int64_t count,
                            const float *scales, const char *ahead, turned *to) {
  const __m512i quarter = _mm512_set_epi64(0x3030303030303030, 0x3030303030303030, 0x2020202020202020,
                                           0x2020202020202020, 0x1010101010101010, 0x1010101010101010, 0, 0);
  const __m512i nibbles = _mm512_set1_epi8(15);
  int64_t there = least(LANES, layer->out - panel * LANES), shift = layer->blocksize_log2;
  int64_t blocks = layer->in >> shift, stride = layer->in / 2, within = ((int64_t)1 << shift) - 1;
  const uint8_t *from = (const uint8_t *)layer->weight + (panel * LANES * layer->in + first) / 2;
  __m512 code = _mm512_loadu_ps(layer->code);
  __m512i tables[4][2];
  for (int64_t block = 0; !layer->nested && block << shift < count; block++)
    __builtin_prefetch(scales + (PANELS * blocks + block) * LANES);
  uint8_t room[LANES * CHUNK / 2];
  from = all_rows(from, &stride, count / 2, there, room);
  for (int64_t done = 0; done < count; done += 32, to += 32 / TERMS * LANES, ahead += 16 * LANES) {
    ask_for(ahead, 16 * LANES);
    if (done == 0 || !((first + done) & within)) {
      const float *scale = scales + (((first + done) >> shift) - (first >> shift)) * LANES;
#pragma GCC unroll 4
      for (int w = 0; w < 4; w++)
#pragma GCC unroll 2
        for (int half = 0; half < 2; half++) {
          __m512 low = _mm512_mul_ps(code, _mm512_set1_ps(scale[8 * half + w]));
          __m512 high = _mm512_mul_ps(code, _mm512_set1_ps(scale[8 * half + w + 4]));
          tables[w][half] = narrow_two(low, high);
        }
    }
    __m512i words[4][2];
#pragma GCC unroll 4
    for (int w = 0; w < 4; w++) {
      const uint8_t *own = from + w * stride + done / 2;
      __m512i packed = _mm512_castsi128_si512(_mm_loadu_si128((const __m128i *)own));
      packed = _mm512_inserti32x4(packed, _mm_loadu_si128((const __m128i *)(own + 4 * stride)), 1);
      packed = _mm512_inserti32x4(packed, _mm_loadu_si128((const __m128i *)(own + 8 * stride)), 2);
      packed = _mm512_inserti32x4(packed, _mm_loadu_si128((const __m128i *)(own + 12 * stride)), 3);
      /* Of each byte the high four bits are the first term of a pair. */
      __m512i ones = _mm512_ternarylogic_epi32(_mm512_srli_epi32(packed, 4), nibbles, quarter, 0xea);
      __m512i twos = _mm512_ternarylogic_epi32(packed, nibbles, quarter, 0xea);
      words[w][0] = _mm512_mask_blend_epi16(0xaaaaaaaa, ones, _mm512_slli_epi32(twos, 16));
      words[w][1] = _mm512_mask_blend_epi16(0xaaaaaaaa, _mm512_srli_epi32(ones, 16), twos);
    }
#pragma GCC unroll 4
    for (int pair = 0; pair < 4; pair++) {
      __m512i own[4];
#pragma GCC unroll 4
      for (int w = 0; w < 4; w++) {
        __m512i which = pair % 2 ? _mm512_srli_epi16(words[w][pair / 2], 8) : words[w][pair / 2];
        own[w] = _mm512_permutex2var_epi16(tables[w][0], which, tables[w][1]);
      }
      __m512i a = _mm512_unpacklo_epi32(own[0], own[1]), b = _mm512_unpackhi_epi32(own[0], own[1]);
      __m512i c = _mm512_unpacklo_epi32(own[2], own[3]), d = _mm512_unpackhi_epi32(own[2], own[3]);
      put_pair(to, pair, _mm512_unpacklo_epi64(a, c));
      put_pair(to, pair + 4, _mm512_unpackhi_epi64(a, c));
      put_pair(to, pair + 8, _mm512_unpacklo_epi64(b, d));
      put_pair(to, pair + 12, _mm512_unpackhi_epi64(b, d));
    }
  }
}

/* Terms `first ..` of a panel, `count` of them, 128 at most and a multiple of 32: [count / TERMS, 16]. */
static inline void turn_chunk(const onebase_linear *layer, int64_t panel, int64_t first, int64_t count,
                              const float *scales, const char *ahead, turned *to) {
  if (layer->kind == ONEBASE_NF4) {
    turn_nf4(layer, panel, first, count, scales, ahead, to);
    return;
  }
  int64_t there = least(LANES, layer->out - panel * LANES), stride = layer->in / 2;
  const uint32_t *from = (const uint32_t *)((const bf16 *)layer->weight + panel * LANES * layer->in + first);
  _Alignas(64) bf16 room[LANES * CHUNK];
  if (layer->kind == ONEBASE_INT8) {
    ask_for(ahead, LANES * count);
    unpack_rows(layer, panel, first, count, room);
    from = (const uint32_t *)room;
    stride = count / 2;
  }
  for (int64_t k = 0; k < count; k += 32, from += 16, to += 32 / TERMS * LANES) {
    if (layer->kind == ONEBASE_BF16) ask_for_plain(ahead + k * LANES * 2, (const char *)from, stride * 4, there);
#if TERMS == 2
    turn_words(from, stride, there, to);
#else
    _Alignas(64) uint32_t pairs[16 * LANES];
    turn_words(from, stride, there, pairs);
    for (int64_t pair = 0; pair < 16; pair++) put_pair(to, pair, _mm512_load_si512(pairs + pair * LANES));
#endif
  }
}

#endif

#ifdef __AVX512BF16__

static inline floats multiplied(floats sum, const bf16 *x, int64_t k, floats weights) {
  uint32_t pair;
  memcpy(&pair, x + 2 * k, sizeof pair);
  return (floats)_mm512_dpbf16_ps((__m512)sum, (__m512bh)_mm512_set1_epi32((int)pair), (__m512bh)weights);
}

#else

static inline floats multiplied(floats sum, const bf16 *x, int64_t k, floats weights) {
  return fused(each(widened(x[k])), weights, sum);
}

#endif

#if defined(__AVX2__) && !defined(__AVX512F__)

/* Stores four pairs of terms of eight outputs, bf16: vector `w` has them of outputs w and w + 4, each in a half of it.
 * to: [terms, 16]. */
static inline void put_pairs(float *to, const __m256i *pairs) {
  const __m256i upper = _mm256_set1_epi32((int)0xffff0000);
  __m256i a = _mm256_unpacklo_epi32(pairs[0], pairs[1]), b = _mm256_unpackhi_epi32(pairs[0], pairs[1]);
  __m256i c = _mm256_unpacklo_epi32(pairs[2], pairs[3]), d = _mm256_unpackhi_epi32(pairs[2], pairs[3]);
  __m256i turned_[4] = {_mm256_unpacklo_epi64(a, c), _mm256_unpackhi_epi64(a, c), _mm256_unpacklo_epi64(b, d),
                        _mm256_unpackhi_epi64(b, d)};
#pragma GCC unroll 4
  for (int i = 0; i < 4; i++, to += 2 * LANES) {
    _mm256_store_si256((__m256i *)to, _mm256_slli_epi32(turned_[i], 16));
    _mm256_store_si256((__m256i *)(to + LANES), _mm256_and_si256(turned_[i], upper));
  }
}

/* 16 bytes of an output in each half of a vector. */
static inline __m256i two_rows(const uint8_t *one, const uint8_t *other) {
  __m256i first = _mm256_castsi128_si256(_mm_loadu_si128((const __m128i *)one));
  return _mm256_inserti128_si256(first, _mm_loadu_si128((const __m128i *)other), 1);
}

/* Numbers times a scale as bf16, in the low half of each word. The NaN that a scale may be stays one. */
static inline __m256i scaled(__m256 numbers, float scale) {
  __m256i bits = _mm256_castps_si256(_mm256_mul_ps(numbers, _mm256_set1_ps(scale)));
  __m256i odd = _mm256_and_si256(_mm256_srli_epi32(bits, 16), _mm256_set1_epi32(1));
  return _mm256_srli_epi32(_mm256_add_epi32(bits, _mm256_add_epi32(odd, _mm256_set1_epi32(0x7fff))), 16);
}

/* The 16 weights that two outputs may have in a block, bf16, each output's in a half: their low and their high bytes.
 * code: numbers 0 to 3 and 8 to 11, and the others. */
static inline void fill_tables(const __m256 *code, float one, float other, __m256i *tables) {
  __m256i first = _mm256_packus_epi32(scaled(code[0], one), scaled(code[1], one));
  __m256i second = _mm256_packus_epi32(scaled(code[0], other), scaled(code[1], other));
  const __m256i low = _mm256_set1_epi16(255);
  __m256i lows = _mm256_packus_epi16(_mm256_and_si256(first, low), _mm256_and_si256(second, low));
  __m256i highs = _mm256_packus_epi16(_mm256_srli_epi16(first, 8), _mm256_srli_epi16(second, 8));
  tables[0] = _mm256_permute4x64_epi64(lows, 0xd8);
  tables[1] = _mm256_permute4x64_epi64(highs, 0xd8);
}

/* Terms `first ..` of a panel of 4-bit weights, `count` of them and a multiple of 32: [count, 16]. */
static inline void turn_nf4(const onebase_linear *layer, int64_t panel, int64_t first, int64_t count,
                            const float *scales, const char *ahead, float *to) {
  int64_t there = least(LANES, layer->out - panel * LANES), shift = layer->blocksize_log2;
  int64_t stride = layer->in / 2, within = ((int64_t)1 << shift) - 1;
  const uint8_t *from = (const uint8_t *)layer->weight + (panel * LANES * layer->in + first) / 2;
  const __m256i nibbles = _mm256_set1_epi8(15);
  __m256 halves_[2] = {_mm256_loadu_ps(layer->code), _mm256_loadu_ps(layer->code + 8)};
  __m256 code[2] = {_mm256_permute2f128_ps(halves_[0], halves_[1], 0x20),
                    _mm256_permute2f128_ps(halves_[0], halves_[1], 0x31)};
  __m256i tables[2][4][2];
  uint8_t room[LANES * CHUNK / 2];
  from = all_rows(from, &stride, count / 2, there, room);
  for (int64_t done = 0; done < count; done += 32, from += 16, ahead += 16 * LANES) {
    ask_for(ahead, 16 * LANES);
    if (done == 0 || !((first + done) & within)) {
      const float *scale = scales + (((first + done) >> shift) - (first >> shift)) * LANES;
      for (int half = 0; half < 2; half++)
        for (int w = 0; w < 4; w++) fill_tables(code, scale[8 * half + w], scale[8 * half + w + 4], tables[half][w]);
    }
    for (int half = 0; half < 2; half++) {
      __m256i pairs[4][4];
#pragma GCC unroll 4
      for (int w = 0; w < 4; w++) {
        const uint8_t *own = from + (8 * half + w) * stride;
        __m256i packed = two_rows(own, own + 4 * stride), low = tables[half][w][0], high = tables[half][w][1];
        /* Of each byte the high four bits are the first term of a pair. */
        __m256i ones = _mm256_and_si256(_mm256_srli_epi16(packed, 4), nibbles);
        __m256i twos = _mm256_and_si256(packed, nibbles);
        __m256i one_low = _mm256_shuffle_epi8(low, ones), one_high = _mm256_shuffle_epi8(high, ones);
        __m256i two_low = _mm256_shuffle_epi8(low, twos), two_high = _mm256_shuffle_epi8(high, twos);
        __m256i one = _mm256_unpacklo_epi8(one_low, one_high), two = _mm256_unpacklo_epi8(two_low, two_high);
        pairs[0][w] = _mm256_unpacklo_epi16(one, two);
        pairs[1][w] = _mm256_unpackhi_epi16(one, two);
        one = _mm256_unpackhi_epi8(one_low, one_high), two = _mm256_unpackhi_epi8(two_low, two_high);
        pairs[2][w] = _mm256_unpacklo_epi16(one, two);
        pairs[3][w] = _mm256_unpackhi_epi16(one, two);
      }
      for (int four = 0; four < 4; four++) put_pairs(to + (done + 8 * four) * LANES + 8 * half, pairs[four]);
    }
  }
}

/* Terms `first ..` of a panel, `count` of them and a multiple of 32: [count, 16]. */
static inline void turn_chunk(const onebase_linear *layer, int64_t panel, int64_t first, int64_t count,
                              const float *scales, const char *ahead, float *to) {
  if (layer->kind == ONEBASE_NF4) {
    turn_nf4(layer, panel, first, count, scales, ahead, to);
    return;
  }
  int64_t there = least(LANES, layer->out - panel * LANES), stride = layer->in * 2;
  const uint8_t *from = (const uint8_t *)layer->weight + panel * LANES * stride + first * 2;
  _Alignas(64) uint8_t room[LANES * CHUNK * 2];
  if (layer->kind == ONEBASE_INT8) {
    unpack_rows(layer, panel, first, count, (bf16 *)room);
    from = room;
    stride = count * 2;
  } else from = all_rows(from, &stride, count * 2, there, room);
  for (int64_t k = 0; k < count; k += 8, from += 16) {
    if (layer->kind == ONEBASE_INT8) ask_for(ahead + k * LANES, 8 * LANES);
    else if (k % 32 == 0) ask_for_plain(ahead + k * LANES * 2, (const char *)from, stride, LANES);
    for (int half = 0; half < 2; half++) {
      const uint8_t *own = from + 8 * half * stride;
      __m256i pairs[4];
#pragma GCC unroll 4
      for (int w = 0; w < 4; w++) pairs[w] = two_rows(own + w * stride, own + (w + 4) * stride);
      put_pairs(to + k * LANES + 8 * half, pairs);
    }
  }
}

#elif !defined(__AVX512F__)

/* Terms `first ..` of a panel, `count` of them, CHUNK at most: [count, 16]. */
static inline void turn_chunk(const onebase_linear *layer, int64_t panel, int64_t first, int64_t count,
                              const float *scales, const char *ahead, float *to) {
  (void)scales, (void)ahead;
  bf16 unpacked[LANES * CHUNK];
  int64_t stride;
  const bf16 *from = panel_of(layer, panel, first, first + count, unpacked, &stride);
  for (int64_t k = 0; k < count; k++)
    for (int output = 0; output < LANES; output++) to[LANES * k + output] = widened(from[output * stride + k]);
}

#endif

#if defined(__AVX2__) && !defined(__AVX512F__)

/* Adds the products of `count` terms, an even number, to the sums of some rows and panels, of which one has more than
 * one: of a panel [rows of the batch, 16]. Two terms of a row are read as a word. */
static inline __attribute__((always_inline)) void add_some(const bf16 *x, int64_t in, const turned *weights,
                                                           int64_t count, const int rows, const int panels,
                                                           int64_t panel_size, float *sums) {
  const __m256i upper = _mm256_set1_epi32((int)0xffff0000);
  __m256 own[2 * ROWS_AT_ONCE];
  for (int i = 0; i < 2 * rows * panels; i++)
    own[i] = _mm256_loadu_ps(sums + i / 2 / rows * panel_size + i % (2 * rows) * 8);
  for (int64_t k = 0; k < count; k += 2, weights += 2 * LANES)
    for (int i = 0; i < rows * panels; i++) {
      const turned *from = weights + i / rows * CHUNK * LANES;
      int32_t pair;
      memcpy(&pair, x + i % rows * in + k, sizeof pair);
      __m256i both = _mm256_set1_epi32(pair);
      __m256 first = _mm256_castsi256_ps(_mm256_slli_epi32(both, 16));
      __m256 second = _mm256_castsi256_ps(_mm256_and_si256(both, upper));
      for (int half = 0; half < 2; half++) {
        __m256 sum = _mm256_fmadd_ps(first, _mm256_load_ps(from + 8 * half), own[2 * i + half]);
        own[2 * i + half] = _mm256_fmadd_ps(second, _mm256_load_ps(from + LANES + 8 * half), sum);
      }
    }
  for (int i = 0; i < 2 * rows * panels; i++)
    _mm256_storeu_ps(sums + i / 2 / rows * panel_size + i % (2 * rows) * 8, own[i]);
}

static inline __attribute__((always_inline)) void add_products(const bf16 *x, int64_t in, const turned *weights,
                                                               int64_t count, const int rows, const int panels,
                                                               int64_t panel_size, float *sums) {
  if (rows == 1) add_some(x, in, weights, count, 1, panels, panel_size, sums);
  else
    for (int i = 0; i < panels; i++)
      add_some(x, in, weights + i * CHUNK * LANES, count, rows, 1, panel_size, sums + i * panel_size);
}

#else

/* Adds the products of `count` terms to the sums of some rows and panels: of a panel [rows of the batch, 16]. */
static inline __attribute__((always_inline)) void add_products(const bf16 *x, int64_t in, const turned *weights,
                                                               int64_t count, const int rows, const int panels,
                                                               int64_t panel_size, float *sums) {
  floats own[ROWS_AT_ONCE * PANELS];
  for (int i = 0; i < panels; i++)
    for (int row = 0; row < rows; row++) own[i * rows + row] = load(sums + i * panel_size + row * LANES);
  for (int64_t k = 0; k < count / TERMS; k++)
    for (int i = 0; i < panels; i++) {
      floats some = load((const float *)(weights + i * (CHUNK / TERMS) * LANES + k * LANES));
      for (int row = 0; row < rows; row++) own[i * rows + row] = multiplied(own[i * rows + row], x + row * in, k, some);
    }
  for (int i = 0; i < panels; i++)
    for (int row = 0; row < rows; row++) store(sums + i * panel_size + row * LANES, own[i * rows + row]);
}

#endif

static inline __attribute__((always_inline)) void add_rows(const bf16 *x, int64_t in, const turned *weights,
                                                           int64_t count, int64_t rows, const int panels,
                                                           int64_t panel_size, float *sums) {
  for (; rows >= ROWS_AT_ONCE; rows -= ROWS_AT_ONCE, x += ROWS_AT_ONCE * in, sums += ROWS_AT_ONCE * LANES)
    add_products(x, in, weights, count, ROWS_AT_ONCE, panels, panel_size, sums);
  if (rows == 3) add_products(x, in, weights, count, 3, panels, panel_size, sums);
  else if (rows == 2) add_products(x, in, weights, count, 2, panels, panel_size, sums);
  else if (rows == 1) add_products(x, in, weights, count, 1, panels, panel_size, sums);
}

/* The scales of a panel's outputs, [blocks, 16], from the block with term `first` on. Those in 8 bits are read into
 * `own` at the begin of a window, whose terms end at `last` at most. */
static inline const float *scales_of(const onebase_linear *layer, int64_t panel, int64_t first, int64_t window,
                                     int64_t last, float *own) {
  int64_t shift = layer->blocksize_log2;
  if (layer->kind != ONEBASE_NF4) return NULL;
  if (!layer->nested) return layer->absmax + (panel * (layer->in >> shift) + (first >> shift)) * LANES;
  if (first == window) read_scales(layer, panel, first, least(WINDOW, last - first), own);
  return own + ((first >> shift) - (window >> shift)) * LANES;
}

/* Sums of `panels` panels over all rows, for each [rows, 16], `panel_size` apart. With each part of a panel that it
 * unpacks it asks for as much of the panels that come next, in the order in which they lie in memory. */
static void multiply(const product *p, const onebase_linear *layer, int64_t panel, int64_t panels, float *scratch,
                     int64_t panel_size, float *sums) {
  _Alignas(64) turned weights[PANELS * CHUNK / TERMS * LANES];
  _Alignas(64) float own_scales[PANELS * WINDOW_BLOCKS * LANES];
  int64_t in = p->in, block = least(layer->block, in);
  float *part = scratch;
  const char *ahead = (const char *)layer->weight + size_of(layer, (panel + panels) * LANES * in);
  for (int64_t k = 0; k < in; k += block) {
    int64_t last = least(k + block, in);
    float *to = k ? part : sums;
    for (int64_t i = 0; i < panels; i++) memset(to + i * panel_size, 0, p->rows * LANES * sizeof(float));
    for (int64_t first = k; first < last; first += CHUNK) {
      int64_t count = least(CHUNK, last - first), window = first - (first - k) % WINDOW;
      for (int64_t i = 0; i < panels; i++) {
        const float *scales = scales_of(layer, panel + i, first, window, last, own_scales + i * WINDOW_BLOCKS * LANES);
        turn_chunk(layer, panel + i, first, count, scales, ahead, weights + i * (CHUNK / TERMS) * LANES);
        ahead += size_of(layer, LANES * count);
      }
      if (panels == PANELS) add_rows(p->x + first, in, weights, count, p->rows, PANELS, panel_size, to);
      else
        for (int64_t i = 0; i < panels; i++)
          add_rows(p->x + first, in, weights + i * (CHUNK / TERMS) * LANES, count, p->rows, 1, panel_size,
                   to + i * panel_size);
    }
    if (k)
      for (int64_t i = 0; i < panels; i++)
        for (int64_t row = 0; row < p->rows; row++) {
          float *sum = sums + i * panel_size + row * LANES;
          store(sum, load(sum) + load(part + i * panel_size + row * LANES));
        }
  }
}

#endif

/* ---- adapters ------------------------------------------------------------------------------ */

/* `terms` columns of `lanes` rows, 16 at most each, as [16, 16] with a row for each column; the rest is zero.
 * Asks for what lies `ahead`. */
static inline void turn_square(const float *from, int64_t stride, int64_t lanes, int64_t terms, int64_t ahead,
                               float *to) {
  if (lanes >= LANES && terms == LANES) {
    for (int64_t lane = 0; lane < LANES; lane++) __builtin_prefetch(from + lane * stride + ahead);
    transpose(from, stride, to);
    return;
  }
  _Alignas(64) float square[LANES * LANES] = {0};
  for (int64_t lane = 0; lane < least(lanes, LANES); lane++)
    memcpy(square + lane * LANES, from + lane * stride, terms * sizeof(float));
  transpose(square, LANES, to);
}

/* Adds x[k] * turned[k, 16] for some rows of x, their sums side by side. */
static inline __attribute__((always_inline)) void add_terms(const float *x, int64_t x_stride, const float *turned,
                                                            int64_t terms, const int rows, floats *sums) {
  for (int64_t i = 0; i < terms; i++) {
    floats weight = load(turned + i * LANES);
    for (int row = 0; row < rows; row++) sums[row] = fused(each(x[row * x_stride + i]), weight, sums[row]);
  }
}

/* The same, each term to one of STRANDS sums of a row, and each product rounded. */
static inline __attribute__((always_inline)) void add_strands(const float *x, int64_t x_stride, const float *turned,
                                                              int64_t terms, const int rows, floats *sums) {
  for (int64_t i = 0; i < terms; i += STRANDS)
    for (int strand = 0; strand < STRANDS && i + strand < terms; strand++) {
      floats weight = load(turned + (i + strand) * LANES);
      for (int row = 0; row < rows; row++) {
        floats *sum = sums + row * STRANDS + strand;
        *sum += each(x[row * x_stride + i + strand]) * weight;
      }
    }
}

static void stranded_sums(const float *x, int64_t x_stride, int64_t inner, int64_t rows, const float *weights,
                          int64_t stride, int64_t lanes, floats *sums) {
  floats some[SHRUNK * STRANDS];
  for (int64_t i = 0; i < rows * STRANDS; i++) some[i] = (floats){0};
  for (int64_t k = 0; k < inner; k += LANES) {
    _Alignas(64) float turned[LANES * LANES];
    int64_t terms = least(LANES, inner - k), row = 0;
    turn_square(weights + k, stride, lanes, terms, 4 * LANES, turned);
    for (; row + 4 <= rows; row += 4)
      add_strands(x + row * x_stride + k, x_stride, turned, terms, 4, some + row * STRANDS);
    for (; row < rows; row++) add_strands(x + row * x_stride + k, x_stride, turned, terms, 1, some + row * STRANDS);
  }
  for (int64_t row = 0; row < rows; row++) {
    const floats *own = some + row * STRANDS;
    sums[row] = (own[0] + own[2]) + (own[1] + own[3]);
  }
}

/* Sums in `order` of x[k] * weights[lane, k] for up to SHRUNK rows of x, 16 lanes at most at once. */
static inline void ordered_sums(const onebase_order *order, const float *x, int64_t x_stride, int64_t rows,
                                const float *weights, int64_t stride, int64_t lanes, int64_t inner,
                                floats *sums) {
  floats group[SHRUNK], some[SHRUNK];
  if (!order->blocks) {
    stranded_sums(x, x_stride, inner, rows, weights, stride, lanes, sums);
    return;
  }
  /* Further on in long rows, else the next 16 rows. */
  int64_t ahead = stride > 4 * LANES ? 4 * LANES : LANES * stride;
  for (int64_t block = 0, first = 0; block < order->blocks; first = order->ends[block++]) {
    int64_t last = order->ends[block];
    for (int64_t row = 0; row < rows; row++) some[row] = (floats){0};
    for (int64_t k = first; k < last; k += LANES) {
      _Alignas(64) float turned[LANES * LANES];
      int64_t terms = least(LANES, last - k);
      turn_square(weights + k, stride, lanes, terms, ahead, turned);
      const float *part = x + k;
      int64_t row = 0;
      for (; row + 4 <= rows; row += 4) add_terms(part + row * x_stride, x_stride, turned, terms, 4, some + row);
      part += row * x_stride;
      if (rows - row == 3) add_terms(part, x_stride, turned, terms, 3, some + row);
      else if (rows - row == 2) add_terms(part, x_stride, turned, terms, 2, some + row);
      else if (rows - row == 1) add_terms(part, x_stride, turned, terms, 1, some + row);
    }
    int opens = block == 0 || order->group[block] != order->group[block - 1];
    int closes = block + 1 == order->blocks || order->group[block + 1] != order->group[block];
    for (int64_t row = 0; row < rows; row++) {
      group[row] = opens ? some[row] : group[row] + some[row];
      if (closes) sums[row] = order->group[block] ? sums[row] + group[row] : group[row];
    }
  }
}

/* The hidden values of some rows of one group, for all of its terms in all layers. */
static void shrink(const product *p, int64_t job) {
  const onebase_groups *groups = p->groups;
  int64_t group = p->jobs[2 * job], first = p->jobs[2 * job + 1], in = p->in;
  int64_t begin = groups->row_starts[group], rows = groups->row_starts[group + 1] - begin;
  int64_t count = least(SHRUNK, rows - first);
  float *wide = p->floats + (begin + first) * in;
  for (int64_t row = 0; row < count; row++) {
    const bf16 *x = p->x + groups->row[begin + first + row] * in;
    for (int64_t k = 0; k < in; k += LANES) store(wide + row * in + k, widen(x + k));
  }
  for (int64_t which = 0; which < p->count; which++) {
    const onebase_lora *own = p->layers[which]->lora;
    for (int64_t term = groups->term_starts[group]; own && term < groups->term_starts[group + 1]; term++) {
      const onebase_lora *lora = own + groups->slot[term];
      int64_t rank = lora->rank;
      float *hidden = p->hidden + p->starts[which * p->terms + term] + first * rank;
      for (int64_t part = 0; part < rank; part += LANES) {
        floats sums[SHRUNK];
        int64_t lanes = least(LANES, rank - part);
        ordered_sums(lora->shrink, wide, in, count, lora->a + part * in, in, lanes, in, sums);
        for (int64_t row = 0; row < count; row++)
          memcpy(hidden + row * rank + part, &sums[row], lanes * sizeof(float));
      }
    }
  }
}

/* Asks for what `expand` will read for some panels, while their products keep the memory idle. */
static void ask_for_adapters(const product *p, const onebase_linear *layer, int64_t panel, int64_t panels) {
  const onebase_groups *groups = p->groups;
  int64_t first = panel * LANES, outputs = least(panels * LANES, layer->out - first);
  for (int64_t term = 0; layer->lora && term < p->terms; term++) {
    const onebase_lora *lora = layer->lora + groups->slot[term];
    if (!lora->rank) continue;
    const float *b = lora->b + first * lora->rank;
    for (int64_t i = 0; i < least(outputs * lora->rank, ASKED); i += LANES) __builtin_prefetch(b + i);
  }
}

/* Adds to the outputs of one panel, bf16 [rows, 16], what the adapters give. */
static void expand(const product *p, int64_t which, int64_t panel, bf16 *y) {
  const onebase_groups *groups = p->groups;
  const onebase_linear *layer = p->layers[which];
  int64_t first = panel * LANES, lanes = least(LANES, layer->out - first);
  for (int64_t job = 0; layer->lora && job < p->job_count; job++) {
    int64_t group = p->jobs[2 * job], row = p->jobs[2 * job + 1], begin = groups->row_starts[group] + row;
    int64_t count = least(SHRUNK, groups->row_starts[group + 1] - begin);
    floats total[SHRUNK], sums[SHRUNK];
    int acts = 0, wide = !layer->quantized;
    for (int64_t term = groups->term_starts[group]; term < groups->term_starts[group + 1]; term++) {
      const onebase_lora *lora = layer->lora + groups->slot[term];
      int64_t rank = lora->rank;
      if (!rank) continue;
      wide |= lora->wide;
      const float *hidden = p->hidden + p->starts[which * p->terms + term] + row * rank;
      ordered_sums(lora->expand, hidden, rank, count, lora->b + first * rank, rank, lanes, rank, sums);
      for (int64_t i = 0; i < count; i++) {
        if (lora->scale != 1.0f) sums[i] *= each(lora->scale);
        if (groups->weight[term] != 1.0f) sums[i] *= each(groups->weight[term]);
        total[i] = acts ? total[i] + sums[i] : sums[i];
      }
      acts = 1;
    }
    if (!acts) continue;
    for (int64_t i = 0; i < count; i++) {
      bf16 *to = y + groups->row[begin + i] * LANES;
      narrow(to, widen(to) + (wide ? total[i] : rounded(total[i])));
    }
  }
}

/* ---- linear -------------------------------------------------------------------------------- */

/* e to the power of each value as torch computes it (SLEEF's `expf_u10`, https://sleef.org). */
static inline floats torch_exponentials(floats x) {
  floats q = x * each(1.442695040888963407359924681001892137426645954152985934135449406931f);
  q = (q + each(12582912.0f)) - each(12582912.0f); /* to the nearest whole number */
  floats s = fused(q, each(-0.693145751953125f), x);
  s = fused(q, each(-1.428606765330187045e-06f), s);
  floats u = each(0.000198527617612853646278381f);
  u = fused(u, s, each(0.00139304355252534151077271f));
  u = fused(u, s, each(0.00833336077630519866943359f));
  u = fused(u, s, each(0.0416664853692054748535156f));
  u = fused(u, s, each(0.166666671633720397949219f));
  u = fused(u, s, each(0.5f));
  u = each(1.0f) + fused(s * s, u, s);
  ints power = __builtin_convertvector(choose(x < each(-104.0f), each(0), choose(x > each(104.0f), each(0), q)), ints);
  ints half = power >> 1;
  u = u * (floats)((half + 127) << 23) * (floats)((power - half + 127) << 23);
  u = choose(x < each(-104.0f), each(0.0f), u);
  return choose(x > each(100.0f), each(INFINITY), u);
}

/* gate * sigmoid(gate) * up, rounded after each of the two products. */
static inline floats gated(floats gate, floats up) {
  return rounded(gate / (each(1.0f) + torch_exponentials(-gate))) * up;
}

static void prepare_part(void *task, int64_t part, int64_t thread) {
  product *p = task;
  (void)thread;
#ifdef __AMX_BF16__
  int64_t tiles = parts_of(p->rows, p->tile);
  if (part < tiles) {
    pair_rows(p, part);
    return;
  }
  part -= tiles;
#endif
  shrink(p, part);
}

/* The outputs of some panels of one layer, adapters included: bf16, of each panel [rows, 16]. */
static void panel_outputs(const product *p, int64_t which, int64_t panel, int64_t panels, float *scratch,
                          float *sums, bf16 *y) {
  const onebase_linear *layer = p->layers[which];
  if (p->job_count) ask_for_adapters(p, layer, panel, panels);
  multiply(p, layer, panel, panels, scratch, p->padded * LANES, sums);
  for (int64_t i = 0; i < panels; i++, panel++, sums += p->padded * LANES, y += p->padded * LANES) {
    floats bias = layer->bias ? widen_some(layer->bias + panel * LANES, layer->out - panel * LANES) : (floats){0};
    for (int64_t row = 0; row < p->rows; row++) {
      floats sum = load(sums + row * LANES);
      narrow(y + row * LANES, layer->bias ? sum + bias : sum);
    }
    if (p->job_count) expand(p, which, panel, y);
  }
}

static void set_ranges(ranges *r, int64_t parts, int64_t threads) {
  r->count = least(threads, RANGES);
  for (int64_t i = 0; i < r->count; i++) {
    atomic_init(&r->range[i].next, parts * i / r->count);
    r->range[i].last = parts * (i + 1) / r->count;
  }
}

/* The next part for a thread. There is one: it is called once for each. */
static int64_t take(ranges *r, int64_t thread) {
  int64_t part, range = thread;
  do {
    range %= r->count;
    part = atomic_fetch_add_explicit(&r->range[range].next, 1, memory_order_relaxed);
  } while (part >= r->range[range++].last);
  return part;
}

/* TAKEN panels of a layer, or of both of a gated pair. */
static void compute_panels(const product *p, int64_t which, int64_t part, int64_t thread) {
  int64_t size = p->padded * LANES;
  const onebase_linear *layer = p->layers[which];
  float *sums = p->panels + thread * p->panel_size, *scratch = sums + 2 * PANELS * size;
  bf16 *ys = (bf16 *)(sums + PANELS * size), *ups = ys + PANELS * size;
#ifdef __AMX_BF16__
  configure(p->tile);
#endif
  int64_t last = least((part + 1) * TAKEN, parts_of(layer->out, LANES)), panels;
  for (int64_t panel = part * TAKEN; panel < last; panel += panels) {
    panels = least(PANELS, last - panel);
    panel_outputs(p, which, panel, panels, scratch, sums, ys);
    if (p->gated) panel_outputs(p, 1, panel, panels, scratch, sums, ups);
    for (int64_t i = 0; i < panels; i++) {
      bf16 *y = ys + i * size, *up = ups + i * size;
      int64_t first = (panel + i) * LANES, outputs = least(LANES, layer->out - first);
      for (int64_t row = 0; p->gated && row < p->rows; row++)
        narrow(y + row * LANES, gated(widen(y + row * LANES), widen(up + row * LANES)));
      bf16 *to = p->ys[which] + first;
      for (int64_t row = 0; row < p->rows; row++)
        memcpy(to + row * layer->out, y + row * LANES, outputs * sizeof(bf16));
    }
  }
#ifdef __AMX_BF16__
  _tile_release();
#endif
}

static void panel_part(void *task, int64_t any, int64_t thread) {
  product *p = task;
  (void)any;
  int64_t which = 0, part = take(p->ranges, thread);
  for (; !p->gated; which++) {
    int64_t own = parts_of(p->layers[which]->out, LANES * TAKEN);
    if (part < own) break;
    part -= own;
  }
  compute_panels(p, which, part, thread);
}

/* Lists what the shrink has to do. Returns whether there was memory for it. */
static int plan_adapters(product *p) {
  const onebase_groups *groups = p->groups;
  int any = 0;
  for (int64_t which = 0; which < p->count; which++) any |= p->layers[which]->lora != NULL;
  if (!groups || !any || !groups->groups) return 1;
  int64_t rows = groups->row_starts[groups->groups], size = 0;
  p->terms = groups->term_starts[groups->groups];
  p->starts = onebase_scratch(ONEBASE_PLACES, (p->count * p->terms + rows + groups->groups) * 8);
  if (!p->starts) return 0;
  p->jobs = (int32_t *)(p->starts + p->count * p->terms);
  for (int64_t group = 0; group < groups->groups; group++) {
    int64_t count = groups->row_starts[group + 1] - groups->row_starts[group], acts = 0;
    for (int64_t which = 0; which < p->count; which++)
      for (int64_t term = groups->term_starts[group]; term < groups->term_starts[group + 1]; term++) {
        const onebase_lora *lora = p->layers[which]->lora;
        int64_t rank = lora ? lora[groups->slot[term]].rank : 0;
        p->starts[which * p->terms + term] = size;
        size += count * rank;
        acts |= rank;
      }
    for (int64_t first = 0; acts && first < count; first += SHRUNK) {
      p->jobs[2 * p->job_count] = (int32_t)group;
      p->jobs[2 * p->job_count++ + 1] = (int32_t)first;
    }
  }
  if (!p->job_count) return 1;
  p->hidden = onebase_scratch(ONEBASE_HIDDEN, size * 4);
  p->floats = onebase_scratch(ONEBASE_FLOATS, rows * p->in * 4);
  return p->hidden && p->floats;
}

/* Numbers that a thread needs for a product; `rows` and `in` are set. */
static int64_t lay_out(product *p) {
  p->padded = parts_of(p->rows, TILE) * TILE;
#ifdef __AMX_BF16__
  p->tile = least(p->rows, TILE);
  int64_t scratch = p->in * LANES / 2;
#else
  int64_t scratch = PANELS * p->padded * LANES;
#endif
  return parts_of(2 * PANELS * p->padded * LANES + scratch, LANES) * LANES;
}

static int linear(const onebase_linear *const *layers, bf16 *const *ys, int64_t count, int64_t gated,
                  const onebase_groups *groups, const bf16 *x, int64_t rows, int64_t threads) {
  ranges own;
  product p = {.count = count, .gated = gated, .groups = groups, .x = x, .rows = rows, .in = layers[0]->in};
  int64_t parts = 0;
  for (int64_t which = 0; which < count; which++) {
    p.layers[which] = layers[which];
    p.ys[which] = ys[which];
    if (!gated || !which) parts += parts_of(layers[which]->out, LANES * TAKEN);
  }
  if (rows < 1) return 0;
  if (!plan_adapters(&p)) return ONEBASE_OUT_OF_MEMORY;
  int64_t preparing = p.job_count;
  p.panel_size = lay_out(&p);
#ifdef __AMX_BF16__
  p.tiles = onebase_scratch(ONEBASE_ROWS, p.padded * p.in * 2);
  if (!p.tiles) return ONEBASE_OUT_OF_MEMORY;
  preparing += parts_of(rows, p.tile);
#endif
  p.panels = onebase_scratch(ONEBASE_PANELS, threads * p.panel_size * 4);
  if (!p.panels) return ONEBASE_OUT_OF_MEMORY;
  if (rows <= 2)
    for (int64_t part = 0; part < preparing; part++) prepare_part(&p, part, 0);
  else onebase_share(prepare_part, &p, preparing);
  set_ranges(&own, parts, threads);
  p.ranges = &own;
  onebase_share(panel_part, &p, parts);
  return 0;
}

/* ---- a mixture's experts --------------------------------------------------------------------- */

/* The rows of a step, each once for each expert that it has chosen, sorted by expert. */
typedef struct {
  const onebase_mixture *mixture;
  const onebase_choice *choice;
  const bf16 *x;    /* [rows, in] */
  bf16 *y;
  int64_t rows, in, packed; /* `packed`: rows times chosen experts */
  int32_t *starts;  /* of each expert's rows, [experts + 1] */
  int32_t *row;     /* of x, [packed] */
  int32_t *place;   /* among the packed ones of what a row adds up, by ascending number of the expert, [packed] */
  float *weight;    /* of each packed row */
  bf16 *xs, *hidden, *ys; /* packed */
} chosen_rows;

/* Rows that a part takes that copies or adds up. */
#define MOVED 8

/* Products of several experts, each with rows of its own. */
typedef struct {
  product *products;
  int64_t parts; /* of each */
  ranges ranges;
} joined_products;

static void joined_part(void *task, int64_t any, int64_t thread) {
  joined_products *j = task;
  (void)any;
  int64_t part = take(&j->ranges, thread);
  compute_panels(j->products + part / j->parts, 0, part % j->parts, thread);
}

#ifdef __AMX_BF16__
static void joined_tiles(void *task, int64_t part, int64_t thread) {
  joined_products *j = task;
  (void)thread;
  product *p = j->products + part;
  for (int64_t tile = 0; tile < parts_of(p->rows, p->tile); tile++) pair_rows(p, tile);
}
#endif

/* Computes products of layers of the same sizes without adapters. `products` have their layers, rows, x and ys. */
static int multiply_joined(product *products, int64_t count, int64_t threads) {
  joined_products j = {.products = products};
  int64_t size = 0;
  if (!count) return 0;
  for (int64_t i = 0; i < count; i++) {
    int64_t own = lay_out(products + i);
    size = own > size ? own : size;
  }
  float *panels = onebase_scratch(ONEBASE_PANELS, threads * size * 4);
  if (!panels) return ONEBASE_OUT_OF_MEMORY;
  for (int64_t i = 0; i < count; i++) products[i].panels = panels, products[i].panel_size = size;
#ifdef __AMX_BF16__
  int64_t tiled = 0;
  for (int64_t i = 0; i < count; i++) tiled += products[i].padded * products[i].in / 2;
  uint32_t *tiles = onebase_scratch(ONEBASE_ROWS, tiled * 4);
  if (!tiles) return ONEBASE_OUT_OF_MEMORY;
  for (int64_t i = 0; i < count; i++) {
    products[i].tiles = tiles;
    tiles += products[i].padded * products[i].in / 2;
  }
  onebase_share(joined_tiles, &j, count);
#endif
  j.parts = parts_of(products[0].layers[0]->out, LANES * TAKEN);
  set_ranges(&j.ranges, count * j.parts, threads);
  onebase_share(joined_part, &j, count * j.parts);
  return 0;
}

static void gather_part(void *task, int64_t part, int64_t thread) {
  chosen_rows *c = task;
  (void)thread;
  for (int64_t i = part * MOVED; i < least((part + 1) * MOVED, c->packed); i++)
    memcpy(c->xs + i * c->in, c->x + c->row[i] * c->in, c->in * sizeof(bf16));
}

/* What the experts of some rows give times the rows' weights, rounded, and added one by one, rounded again. */
static void sum_part(void *task, int64_t part, int64_t thread) {
  chosen_rows *c = task;
  (void)thread;
  int64_t each_row = c->choice->each, size = c->mixture->layers[2].out;
  for (int64_t row = part * MOVED; row < least((part + 1) * MOVED, c->rows); row++) {
    const int32_t *place = c->place + row * each_row;
    for (int64_t i = 0; i < size; i += LANES) {
      floats total = {0};
      for (int64_t k = 0; k < each_row; k++) {
        floats own = widen(c->ys + place[k] * size + i) * each(c->weight[place[k]]);
        total = rounded(total + rounded(own));
      }
      narrow(c->y + row * size + i, total);
    }
  }
}

/* Sorts the rows by expert, the rows of each in their order. Returns whether there are all the experts. */
static int sort_rows(chosen_rows *c, int32_t *ends) {
  int64_t experts = c->mixture->experts, each_row = c->choice->each;
  const int64_t *chosen = c->choice->experts;
  const void *weights = c->choice->weights;
  memset(c->starts, 0, (experts + 1) * sizeof(int32_t));
  for (int64_t i = 0; i < c->packed; i++) {
    if (chosen[i] < 0 || chosen[i] >= experts) return 0;
    c->starts[chosen[i] + 1]++;
  }
  for (int64_t expert = 0; expert < experts; expert++) {
    c->starts[expert + 1] += c->starts[expert];
    ends[expert] = c->starts[expert];
  }
  for (int64_t i = 0; i < c->packed; i++) {
    int64_t at = ends[chosen[i]]++;
    c->row[at] = (int32_t)(i / each_row);
    c->weight[at] = c->choice->wide ? ((const float *)weights)[i] : widened(((const bf16 *)weights)[i]);
  }
  memset(ends, 0, c->rows * sizeof(int32_t));
  for (int64_t i = 0; i < c->packed; i++) c->place[c->row[i] * each_row + ends[c->row[i]]++] = (int32_t)i;
  return 1;
}

/* Whether a group's terms act on any expert. */
static int acts_on_experts(const onebase_mixture *mixture, const onebase_groups *groups, int64_t group) {
  for (int64_t term = groups->term_starts[group]; term < groups->term_starts[group + 1]; term++)
    for (int64_t layer = 0; layer < 3; layer++)
      if (mixture->layers[layer].lora && mixture->layers[layer].lora[groups->slot[term]].rank) return 1;
  return 0;
}

/* The groups among an expert's rows, in the room `starts` and `rows`. `local`: a number for each row of the step,
 * 0 between two calls. Returns whether an adapter acts. */
static int groups_among(const chosen_rows *c, int64_t expert, const onebase_groups *groups, int32_t *local,
                        int32_t *starts, int32_t *rows, onebase_groups *own) {
  int64_t first = c->starts[expert], last = c->starts[expert + 1], count = 0;
  *own = *groups;
  own->row_starts = starts;
  own->row = rows;
  for (int64_t i = first; i < last; i++) local[c->row[i]] = (int32_t)(i - first + 1);
  for (int64_t group = 0; group < groups->groups; group++) {
    starts[group] = (int32_t)count;
    if (!acts_on_experts(c->mixture, groups, group)) continue;
    for (int64_t i = groups->row_starts[group]; i < groups->row_starts[group + 1]; i++)
      if (local[groups->row[i]]) rows[count++] = local[groups->row[i]] - 1;
  }
  starts[groups->groups] = (int32_t)count;
  for (int64_t i = first; i < last; i++) local[c->row[i]] = 0;
  return count > 0;
}

/* Computes each expert that any row has chosen: those without adapters at once, the others one by one. */
static int experts(const onebase_mixture *mixture, const onebase_choice *choice, const onebase_groups *groups,
                   const bf16 *x, bf16 *y, int64_t rows, int64_t threads) {
  const onebase_linear *layers = mixture->layers;
  chosen_rows c = {.mixture = mixture, .choice = choice, .x = x, .y = y, .rows = rows, .in = layers[0].in};
  int64_t inner = layers[2].in, size = layers[2].out, count = mixture->experts, adapted = 0;
  int64_t grouped = groups ? groups->groups : 0, in_groups = grouped ? groups->row_starts[grouped] : 0;
  c.packed = rows * choice->each;
  if (rows < 1) return 0;
  int64_t numbers = 2 * (count + 1) + 3 * c.packed + 2 * rows + grouped + 1 + in_groups;
  product *products = onebase_scratch(ONEBASE_CHOSEN, count * (int64_t)sizeof(product) + numbers * 4);
  c.xs = onebase_scratch(ONEBASE_PACKED, c.packed * (c.in + inner + size) * (int64_t)sizeof(bf16));
  if (!products || !c.xs) return ONEBASE_OUT_OF_MEMORY;
  c.hidden = c.xs + c.packed * c.in;
  c.ys = c.hidden + c.packed * inner;
  c.starts = (int32_t *)(products + count);
  c.row = c.starts + count + 1;
  c.place = c.row + c.packed;
  c.weight = (float *)(c.place + c.packed);
  int32_t *ends = (int32_t *)(c.weight + c.packed), *local = ends + (count > rows ? count : rows);
  int32_t *group_starts = local + rows, *group_rows = group_starts + grouped + 1;
  if (!sort_rows(&c, ends)) return ONEBASE_NO_EXPERT;
  if (rows > 1) onebase_share(gather_part, &c, parts_of(c.packed, MOVED));
  memset(local, 0, rows * sizeof(int32_t));
  for (int64_t group = 0; group < grouped; group++) adapted |= acts_on_experts(mixture, groups, group);
  for (int64_t half = 0; half < 2; half++) {
    int64_t bare = 0;
    for (int64_t expert = 0; expert < count; expert++) {
      int64_t first = c.starts[expert], own_rows = c.starts[expert + 1] - first;
      onebase_groups own;
      if (!own_rows) continue;
      const onebase_linear *own_layers[] = {layers + 3 * expert + 2 * half, layers + 3 * expert + 1};
      const bf16 *from = half ? c.hidden + first * inner : rows > 1 ? c.xs + first * c.in : x;
      bf16 *to = half ? c.ys + first * size : c.hidden + first * inner;
      if (adapted && groups_among(&c, expert, groups, local, group_starts, group_rows, &own)) {
        int result = linear(own_layers, &to, 2 - half, !half, &own, from, own_rows, threads);
        if (result) return result;
        continue;
      }
      products[bare++] = (product){.layers = {own_layers[0], own_layers[1]}, .ys = {to}, .count = 2 - half,
                                   .gated = !half, .x = from, .rows = own_rows, .in = own_layers[0]->in};
    }
    int result = multiply_joined(products, bare, threads);
    if (result) return result;
  }
  onebase_share(sum_part, &c, parts_of(rows, MOVED));
  return 0;
}
