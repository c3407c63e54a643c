/* Layers that keep a state from token to token: a part of kernels.c.
 *
 * The tokens of a run are computed one after the other, each by the same code, and a part is some numbers of the
 * state over a whole run. So a row's bits do not depend on where its prompt was cut. */

/* 16 numbers of a row from `at` on; zeros from `count` on. */
static inline floats numbers_of(const onebase_rows *x, int64_t row, int64_t at, int64_t count) {
  int64_t place = row * x->stride + at;
  if (!x->wide) return widen_some((const bf16 *)x->from + place, count);
  if (count >= LANES) return load((const float *)x->from + place);
  float some[LANES] = {0};
  memcpy(some, (const float *)x->from + place, count * sizeof(float));
  return load(some);
}

static inline float number_of_row(const onebase_rows *x, int64_t row, int64_t at) {
  int64_t place = row * x->stride + at;
  return x->wide ? ((const float *)x->from)[place] : widened(((const bf16 *)x->from)[place]);
}

/* Writes the first `count` of 16 numbers, fp32 if `wide`, else bf16. */
static inline void put_numbers(void *to, int64_t at, floats value, int64_t count, int64_t wide) {
  if (wide) {
    float *place = (float *)to + at;
    if (count >= LANES) store(place, value);
    else memcpy(place, &value, count * sizeof(float));
  } else {
    bf16 *place = (bf16 *)to + at, some[LANES];
    if (count >= LANES) {
      narrow(place, value);
    } else {
      narrow(some, value);
      memcpy(place, some, count * sizeof(bf16));
    }
  }
}

/* e to the power of each value, of either sign, and of none beyond 87. */
static inline floats powers(floats x) {
  x = choose(x < each(-87.0f), each(-87.0f), choose(x > each(87.0f), each(87.0f), x));
  return polynomial_exponentials(x, x * each(1.44269504088896341f) + choose(x < each(0.0f), each(-0.5f), each(0.5f)));
}

/* Rows behind the last run, `size` bytes each, are zeros. */
static void clear_padding(const onebase_runs *runs, void *y, int64_t rows, int64_t size) {
  int64_t used = runs->starts[runs->runs];
  memset((char *)y + used * size, 0, (rows - used) * size);
}

/* ---- convolution --------------------------------------------------------------------------- */

/* Channels that one part takes. */
#define CHANNELS 256

typedef struct {
  const onebase_convolution *layer;
  const onebase_runs *runs;
  float *buffers; /* of each thread: weights, bias, and addresses of the rows that the taps see */
  int64_t size;
} convolution;

/* Weights of `count` channels as [taps, CHANNELS], fp32. */
static inline __attribute__((always_inline)) void turn_taps(const void *weight, int64_t first, int64_t count,
                                                            const int64_t taps, const int wide, float *to) {
  for (int64_t i = 0; i < count; i++)
    for (int64_t tap = 0; tap < taps; tap++) {
      int64_t place = (first + i) * taps + tap;
      to[tap * CHANNELS + i] = wide ? ((const float *)weight)[place] : widened(((const bf16 *)weight)[place]);
    }
}

/* One row from the rows that its taps see, each from the part's first channel on. */
static inline __attribute__((always_inline)) void convolve_row(const convolution *c, const void *const *seen,
                                                               const float *weights, const float *bias, int64_t count,
                                                               const int64_t taps, const int wide, int64_t to) {
  void *y = c->layer->y;
  int64_t as = c->layer->wide;
  for (int64_t i = 0; i < count; i += LANES) {
    floats sum = {0};
    for (int64_t tap = 0; tap < taps; tap++) {
      onebase_rows x = {seen[tap], 0, wide};
      sum += numbers_of(&x, 0, i, count - i) * load(weights + tap * CHANNELS + i);
    }
    if (bias) sum += load(bias + i);
    put_numbers(y, to + i, sum, count - i, as);
  }
}

static void convolve_part(void *task, int64_t part, int64_t thread) {
  const convolution *c = task;
  const onebase_convolution *layer = c->layer;
  const onebase_runs *runs = c->runs;
  int64_t first = part * CHANNELS, count = least(CHANNELS, layer->channels - first);
  int64_t taps = layer->taps, before = taps - 1, bytes = layer->x.wide ? sizeof(float) : sizeof(bf16);
  float *weights = c->buffers + thread * c->size, *bias = layer->bias ? weights + taps * CHANNELS : NULL;
  const void **seen = (const void **)(weights + (taps + 1) * CHANNELS);
  if (layer->wide) turn_taps(layer->weight, first, count, taps, 1, weights);
  else if (taps == 4) turn_taps(layer->weight, first, count, 4, 0, weights);
  else turn_taps(layer->weight, first, count, taps, 0, weights);
  onebase_rows added = {layer->bias, 0, layer->wide};
  for (int64_t i = 0; bias && i < count; i += LANES) store(bias + i, numbers_of(&added, 0, first + i, count - i));
  for (int64_t run = 0; run < runs->runs; run++) {
    int64_t start = runs->starts[run], stop = runs->starts[run + 1], write = runs->write[run];
    const char *x = (const char *)layer->x.from + first * bytes;
    const char *old = (const char *)layer->states + (runs->read[run] * before * layer->channels + first) * bytes;
    for (int64_t row = start; row < stop; row++) {
      for (int64_t tap = 0, source = row - before; tap < taps; tap++, source++)
        seen[tap] = source >= start ? x + source * layer->x.stride * bytes
                                    : old + (source - start + before) * layer->channels * bytes;
      int64_t to = row * layer->channels + first;
      if (layer->x.wide) convolve_row(c, seen, weights, bias, count, taps, 1, to);
      else if (taps == 4 && count == CHANNELS) convolve_row(c, seen, weights, bias, CHANNELS, 4, 0, to);
      else convolve_row(c, seen, weights, bias, count, taps, 0, to);
    }
    for (int64_t tap = 0, source = stop - before; write >= 0 && tap < before; tap++, source++)
      memcpy((char *)layer->states + ((write * before + tap) * layer->channels + first) * bytes,
             source >= start ? x + source * layer->x.stride * bytes
                             : old + (source - start + before) * layer->channels * bytes,
             count * bytes);
  }
}

static int convolve(const onebase_convolution *layer, const onebase_runs *runs, int64_t threads) {
  convolution c = {.layer = layer, .runs = runs};
  c.size = (layer->taps + 1) * CHANNELS + parts_of(2 * layer->taps, LANES) * LANES;
  c.buffers = onebase_scratch(ONEBASE_PANELS, threads * c.size * sizeof(float));
  if (!c.buffers) return ONEBASE_OUT_OF_MEMORY;
  clear_padding(runs, layer->y, layer->rows, layer->channels * (layer->wide ? sizeof(float) : sizeof(bf16)));
  onebase_share(convolve_part, &c, parts_of(layer->channels, CHANNELS));
  return 0;
}

/* ---- delta rule ---------------------------------------------------------------------------- */

/* Numbers of a value that one part takes: with them, the state of a head of 128 is 16 KB. */
#define VECTORS 2
#define VALUES (VECTORS * LANES)

typedef struct {
  const onebase_delta_rule *layer;
  const onebase_runs *runs;
  int64_t slices;
  float *buffers; /* of each thread: a state, and four vectors of the size of a key */
  int64_t size;
} delta_rule;

/* Adds each vector of values, times a number. */
static inline __attribute__((always_inline)) void add_values(floats *sums, float times, const floats *values) {
  for (int j = 0; j < VECTORS; j++) sums[j] = fused(each(times), values[j], sums[j]);
}

static inline __attribute__((always_inline)) void load_values(const float *from, floats *values) {
  for (int j = 0; j < VECTORS; j++) values[j] = load(from + j * LANES);
}

/* The new state of one key, from its old one. */
static inline __attribute__((always_inline)) void change_values(const float *from, float *to, float decay, float key,
                                                                const floats *change, floats *values) {
  load_values(from, values);
  for (int j = 0; j < VECTORS; j++) {
    values[j] = fused(each(key), change[j], each(decay) * values[j]);
    store(to + j * LANES, values[j]);
  }
}

/* One token: from the state before it, rows `from_row` apart, to the one behind it. Each sum is that of the even
 * keys and that of the odd ones. */
static inline __attribute__((always_inline)) void delta_token(const float *from, int64_t from_row, float *to,
                                                              int64_t to_row, const float *vectors, int64_t dim,
                                                              const floats *value, floats beta, floats *y) {
  const float *query = vectors, *key = query + dim, *decay = key + dim, *decayed = decay + dim;
  floats even[VECTORS] = {{0}}, odd[VECTORS] = {{0}}, change[VECTORS], some[VECTORS];
  int64_t pairs = dim / 2 * 2;
  for (int64_t i = 0; i < pairs; i += 2) {
    load_values(from + i * from_row, some);
    add_values(even, decayed[i], some);
    load_values(from + (i + 1) * from_row, some);
    add_values(odd, decayed[i + 1], some);
  }
  if (pairs < dim) {
    load_values(from + pairs * from_row, some);
    add_values(even, decayed[pairs], some);
  }
  for (int j = 0; j < VECTORS; j++) {
    change[j] = beta * (value[j] - (even[j] + odd[j]));
    even[j] = odd[j] = each(0.0f);
  }
  for (int64_t i = 0; i < pairs; i += 2) {
    change_values(from + i * from_row, to + i * to_row, decay[i], key[i], change, some);
    add_values(even, query[i], some);
    change_values(from + (i + 1) * from_row, to + (i + 1) * to_row, decay[i + 1], key[i + 1], change, some);
    add_values(odd, query[i + 1], some);
  }
  if (pairs < dim) {
    change_values(from + pairs * from_row, to + pairs * to_row, decay[pairs], key[pairs], change, some);
    add_values(even, query[pairs], some);
  }
  for (int j = 0; j < VECTORS; j++) y[j] = even[j] + odd[j];
}

/* A query or key as fp32, of length 1 if the layer asks for it, times `scale`. */
static inline void finish_vector(const onebase_delta_rule *layer, const onebase_rows *x, int64_t row, int64_t head,
                                 float scale, float *to) {
  int64_t dim = layer->key_dim;
  floats squares = {0};
  for (int64_t i = 0; i < dim; i += LANES) {
    floats some = numbers_of(x, row, head * dim + i, dim - i);
    squares = fused(some, some, squares);
    put_numbers(to, i, some, dim - i, 1);
  }
  if (layer->normalized) scale *= 1.0f / sqrtf(sum_of(squares) + layer->eps);
  for (int64_t i = 0; i < dim; i++) to[i] *= scale;
}

static void find_vectors(const onebase_delta_rule *layer, int64_t row, int64_t head, float *vectors) {
  int64_t dim = layer->key_dim, own = head / (layer->heads / layer->key_heads);
  float *query = vectors, *key = query + dim, *decay = key + dim, *decayed = decay + dim;
  finish_vector(layer, &layer->q, row, own, layer->scale, query);
  finish_vector(layer, &layer->k, row, own, 1.0f, key);
  if (layer->by_key) {
    for (int64_t i = 0; i < dim; i += LANES)
      put_numbers(decay, i, powers(numbers_of(&layer->decay, row, head * dim + i, dim - i)), dim - i, 1);
  } else {
    float same = powers(each(number_of_row(&layer->decay, row, head)))[0];
    for (int64_t i = 0; i < dim; i++) decay[i] = same;
  }
  for (int64_t i = 0; i < dim; i++) decayed[i] = decay[i] * key[i];
}

/* A part's first token reads the state's place, its last one writes to its place, and the others use a copy which
 * stays in the cache. */
static void delta_part(void *task, int64_t part, int64_t thread) {
  const delta_rule *d = task;
  const onebase_delta_rule *layer = d->layer;
  int64_t slice = part % d->slices, head = part / d->slices % layer->heads, run = part / d->slices / layer->heads;
  int64_t first = slice * VALUES, dim = layer->key_dim, wide = layer->value_dim, count = least(VALUES, wide - first);
  int64_t start = d->runs->starts[run], stop = d->runs->starts[run + 1], write = d->runs->write[run];
  float *state = d->buffers + thread * d->size, *vectors = state + dim * VALUES;
  const float *read = layer->states + (d->runs->read[run] * layer->heads + head) * dim * wide + first;
  float *kept = write < 0 ? NULL : layer->states + (write * layer->heads + head) * dim * wide + first;
  int whole = count == VALUES && stop > start;
  for (int64_t i = 0; !whole && i < dim; i++) {
    memset(state + i * VALUES, 0, VALUES * sizeof(float));
    memcpy(state + i * VALUES, read + i * wide, count * sizeof(float));
  }
  for (int64_t row = start; row < stop; row++) {
    floats value[VECTORS], y[VECTORS], beta = each(number_of_row(&layer->beta, row, head));
    int old = whole && row == start, last = whole && kept && row == stop - 1;
    find_vectors(layer, row, head, vectors);
    for (int j = 0; j < VECTORS; j++)
      value[j] = count > j * LANES ? numbers_of(&layer->v, row, head * wide + first + j * LANES, count - j * LANES)
                                   : each(0.0f);
    delta_token(old ? read : state, old ? wide : VALUES, last ? kept : state, last ? wide : VALUES, vectors, dim, value,
                beta, y);
    for (int j = 0; j < VECTORS && j * LANES < count; j++)
      put_numbers(layer->y, (row * layer->heads + head) * wide + first + j * LANES, y[j], count - j * LANES,
                  layer->v.wide);
  }
  for (int64_t i = 0; !whole && kept && i < dim; i++)
    memcpy(kept + i * wide, state + i * VALUES, count * sizeof(float));
}

static int apply_delta_rule(const onebase_delta_rule *layer, const onebase_runs *runs, int64_t threads) {
  delta_rule d = {.layer = layer, .runs = runs, .slices = parts_of(layer->value_dim, VALUES)};
  d.size = parts_of(layer->key_dim * (VALUES + 4), LANES) * LANES;
  d.buffers = onebase_scratch(ONEBASE_PANELS, threads * d.size * sizeof(float));
  if (!d.buffers) return ONEBASE_OUT_OF_MEMORY;
  clear_padding(runs, layer->y, layer->rows,
                layer->heads * layer->value_dim * (layer->v.wide ? sizeof(float) : sizeof(bf16)));
  onebase_share(delta_part, &d, runs->runs * layer->heads * d.slices);
  return 0;
}

/* ---- state space --------------------------------------------------------------------------- */

/* A line is the `size` numbers of the state that belong to one number of x; 16 of one group are computed at once.
 * So many of these are a part. */
#define LINES_AT_ONCE 4

typedef struct {
  const onebase_state_space *layer;
  const onebase_runs *runs;
  int64_t lines, parts, padded; /* lines and parts of a group; `size` to the next multiple of 16 */
  float *buffers;               /* of each thread: 16 lines of the state, and of rates, b, c, sums, turned sums */
  int64_t size;
} state_space;

static inline void copy_lines(const float *from, int64_t from_line, float *to, int64_t to_line, int64_t count,
                              int64_t size) {
  for (int64_t line = 0; line < count; line++)
    memcpy(to + line * to_line, from + line * from_line, size * sizeof(float));
}

/* Tokens of a run, `count` lines from `first` on, 16 at most. */
static inline __attribute__((always_inline)) void scan_lines(const state_space *s, int64_t run, int64_t group,
                                                             int64_t first, int64_t count, float *state,
                                                             const int by_size) {
  const onebase_state_space *layer = s->layer;
  int64_t size = layer->size, padded = s->padded, all = layer->heads * layer->dim, write = s->runs->write[run];
  float *rates = state + LANES * padded, *b = rates + LANES * padded, *c = b + padded, *sums = c + padded;
  float *turned = sums + LANES * LANES, each_rate[LANES] = {0}, skips[LANES] = {0}, steps[LANES] = {0};
  int64_t heads[LANES];
  memset(state, 0, LANES * padded * sizeof(float));
  memset(sums, 0, LANES * LANES * sizeof(float));
  copy_lines(layer->states + (s->runs->read[run] * all + first) * size, size, state, padded, count, size);
  if (by_size) memset(rates, 0, LANES * padded * sizeof(float));
  for (int64_t line = 0; line < count; line++) {
    int64_t head = heads[line] = (first + line) / layer->dim;
    if (by_size) memcpy(rates + line * padded, layer->a + head * size, size * sizeof(float));
    else each_rate[line] = layer->a[head];
    if (layer->skip) skips[line] = layer->skip[head];
  }
  for (int64_t row = s->runs->starts[run]; row < s->runs->starts[run + 1]; row++) {
    for (int64_t i = 0; i < size; i += LANES) {
      store(b + i, numbers_of(&layer->b, row, group * size + i, size - i));
      store(c + i, numbers_of(&layer->c, row, group * size + i, size - i));
    }
    for (int64_t line = 0; line < count; line++) steps[line] = number_of_row(&layer->dt, row, heads[line]);
    floats x = numbers_of(&layer->x, row, first, count), y = {0};
    floats into = load(steps) * x, keep = powers(load(steps) * load(each_rate));
    for (int64_t line = 0; line < count; line++) {
      float *own = state + line * padded;
      floats sum = {0};
      for (int64_t i = 0; i < padded; i += LANES) {
        floats kept = by_size ? powers(each(steps[line]) * load(rates + line * padded + i)) : each(keep[line]);
        floats now = fused(load(own + i), kept, each(into[line]) * load(b + i));
        store(own + i, now);
        sum = fused(now, load(c + i), sum);
      }
      store(sums + line * LANES, sum);
    }
    transpose(sums, LANES, turned);
    for (int lane = 0; lane < LANES; lane++) y += load(turned + lane * LANES);
    if (layer->skip) y += load(skips) * x;
    put_numbers(layer->y, row * all + first, y, count, 1);
  }
  if (write >= 0) copy_lines(state, padded, layer->states + (write * all + first) * size, size, count, size);
}

static void scan_part(void *task, int64_t part, int64_t thread) {
  const state_space *s = task;
  const onebase_state_space *layer = s->layer;
  int64_t group = part / s->parts % layer->groups, run = part / s->parts / layer->groups;
  int64_t first = part % s->parts * LINES_AT_ONCE * LANES, last = least(first + LINES_AT_ONCE * LANES, s->lines);
  float *buffer = s->buffers + thread * s->size;
  for (int64_t line = first; line < last; line += LANES) {
    int64_t count = least(LANES, last - line), own = group * s->lines + line;
    if (layer->by_size) scan_lines(s, run, group, own, count, buffer, 1);
    else scan_lines(s, run, group, own, count, buffer, 0);
  }
}

static int scan_states(const onebase_state_space *layer, const onebase_runs *runs, int64_t threads) {
  state_space s = {.layer = layer, .runs = runs, .lines = layer->heads / layer->groups * layer->dim};
  s.parts = parts_of(s.lines, LINES_AT_ONCE * LANES);
  s.padded = parts_of(layer->size, LANES) * LANES;
  s.size = (2 * LANES + 2) * s.padded + 2 * LANES * LANES;
  s.buffers = onebase_scratch(ONEBASE_PANELS, threads * s.size * sizeof(float));
  if (!s.buffers) return ONEBASE_OUT_OF_MEMORY;
  clear_padding(runs, layer->y, layer->rows, layer->heads * layer->dim * sizeof(float));
  onebase_share(scan_part, &s, runs->runs * layer->groups * s.parts);
  return 0;
}
