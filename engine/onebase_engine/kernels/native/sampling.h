/* The next token of each row from its logits: a part of kernels.c.
 *
 * The filters are thresholds on values, as in transformers' logits processors, so that ties fall alike in every
 * batch. A row is drawn by one thread from its own numbers, in one order. */

/* Logits whose weights are summed in fp32 before the sum is added to the others in double. */
#define SUMMED 1024

typedef struct {
  onebase_draw *rows;
  int64_t vocabulary;
  char *buffers; /* of each thread */
  int64_t size;
} drawing;

/* Of the 16 tokens from `first` on, those that may be drawn. */
static inline uint32_t allowed_of(const onebase_draw *row, int64_t first) {
  return row->allowed ? row->allowed[first / 32] >> first % 32 & 0xffff : 0xffff;
}

static inline ints lanes_of(uint32_t bits) {
  const words places = {1, 2, 4, 8, 16, 32, 64, 128, 256, 512, 1024, 2048, 4096, 8192, 16384, 32768};
  return (places & bits) != 0;
}

/* 16 logits from `first` on; minus infinity from the vocabulary's end on. */
static inline floats raw_of(const onebase_draw *row, int64_t first, int64_t vocabulary) {
  int64_t there = vocabulary - first;
  if (there >= LANES)
    return row->wide ? load((const float *)row->logits + first) : widen((const bf16 *)row->logits + first);
  floats some = each(-INFINITY);
  for (int64_t i = 0; i < there; i++)
    some[i] = row->wide ? ((const float *)row->logits)[first + i] : widened(((const bf16 *)row->logits)[first + i]);
  return some;
}

/* The same of what may be drawn, minus infinity elsewhere. `even`: see onebase_draw. */
static inline floats logits_of(const onebase_draw *row, int64_t first, int64_t vocabulary, int even) {
  floats some = raw_of(row, first, vocabulary);
  if (!row->allowed) return some;
  uint32_t bits = allowed_of(row, first);
  if (even) {
    some = (floats){0};
    if (vocabulary - first < LANES) bits &= (1u << (vocabulary - first)) - 1;
  }
  return choose(lanes_of(bits), some, each(-INFINITY));
}

static float largest_lane(floats most) {
  float largest = most[0];
  for (int lane = 1; lane < LANES; lane++) largest = most[lane] > largest ? most[lane] : largest;
  return largest;
}

/* The largest logit of what may be drawn; NaN where a logit is NaN or the largest of all is no finite number. */
static float largest_of(const onebase_draw *row, int64_t vocabulary) {
  floats most = each(-INFINITY), mine = most;
  ints odd = {0};
  for (int64_t i = 0; i < vocabulary; i += LANES) {
    floats some = raw_of(row, i, vocabulary);
    odd |= some != some;
    most = choose(some > most, some, most);
    uint32_t bits = allowed_of(row, i);
    if (row->allowed && bits) mine = choose(lanes_of(bits) & (some > mine), some, mine);
  }
  for (int lane = 0; lane < LANES; lane++)
    if (odd[lane]) return NAN;
  float largest = largest_lane(most);
  if (!isfinite(largest)) return NAN;
  return row->allowed ? largest_lane(mine) : largest;
}

static int32_t first_of(const onebase_draw *row, float value, int64_t vocabulary, int even) {
  for (int64_t i = 0; i < vocabulary; i += LANES) {
    if (!allowed_of(row, i)) continue;
    ints same = logits_of(row, i, vocabulary, even) == each(value);
    for (int lane = 0; lane < LANES; lane++)
      if (same[lane]) return (int32_t)(i + lane);
  }
  return -1;
}

/* Bits of numbers not below zero, in ascending order; `other` has room for as many. */
static const uint32_t *ascending(uint32_t *list, uint32_t *other, int64_t count) {
  for (int shift = 0; shift < 33; shift += 11) {
    int64_t starts[2049] = {0};
    for (int64_t i = 0; i < count; i++) starts[(list[i] >> shift & 2047) + 1]++;
    for (int digit = 0; digit < 2048; digit++) starts[digit + 1] += starts[digit];
    for (int64_t i = 0; i < count; i++) other[starts[list[i] >> shift & 2047]++] = list[i];
    uint32_t *done = other;
    other = list;
    list = done;
  }
  return list;
}

static inline float number_of(uint32_t bits) {
  float value;
  memcpy(&value, &bits, sizeof value);
  return value;
}

/* The least weight that top_k and top_p keep. Few of the weights, the largest, are looked at first. */
static float floor_of(const onebase_draw *row, const float *weights, int64_t vocabulary, double total,
                      uint32_t *list, uint32_t *other) {
  static const float bounds[] = {0x1p-7f, 0x1p-14f, 0x1p-25f, 0};
  for (int tried = 0;; tried++) {
    float bound = bounds[tried];
    int64_t count = 0, kept;
    for (int64_t i = 0; i < vocabulary; i++) {
      memcpy(list + count, weights + i, sizeof *list);
      count += weights[i] >= bound && weights[i] > 0;
    }
    if (bound > 0 && row->top_k > count) continue;
    const uint32_t *sorted = ascending(list, other, count);
    kept = row->top_k > 0 && row->top_k < count ? row->top_k : count;
    float lower = row->top_k > 0 ? number_of(sorted[count - kept]) : 0;
    while (row->top_k > 0 && kept < count && sorted[count - kept - 1] == sorted[count - kept]) kept++;
    if (row->top_p >= 1) return lower;
    double sum = 0, wanted = total;
    if (row->top_k > 0) {
      wanted = 0;
      for (int64_t i = count - kept; i < count; i++) wanted += number_of(sorted[i]);
    }
    for (int64_t i = count; i > count - kept; i--) {
      sum += number_of(sorted[i - 1]);
      if (sum >= (double)row->top_p * wanted) return number_of(sorted[i - 1]);
    }
    if (bound == 0 || row->top_k > 0) return lower;
  }
}

static void draw_part(void *task, int64_t part, int64_t thread) {
  drawing *d = task;
  onebase_draw *row = d->rows + part;
  int64_t vocabulary = d->vocabulary, padded = parts_of(vocabulary, LANES) * LANES;
  float *weights = (float *)(d->buffers + thread * d->size);
  uint32_t *list = (uint32_t *)(weights + padded), *other = list + padded;
  double *sums = (double *)(other + padded), total = 0;
  float largest = largest_of(row, vocabulary), least_kept = 0;
  row->token = -1;
  if (isnan(largest)) return;
  int even = largest == -INFINITY;
  if (even) largest = 0;
  if (row->temperature <= 0) {
    row->token = first_of(row, largest, vocabulary, even);
    return;
  }
  for (int64_t i = 0; i < vocabulary; i += SUMMED) {
    floats sum = {0};
    for (int64_t j = i; j < least(i + SUMMED, vocabulary); j += LANES) {
      if (!allowed_of(row, j)) {
        store(weights + j, each(0));
        continue;
      }
      floats scaled = (logits_of(row, j, vocabulary, even) - each(largest)) / each(row->temperature);
      floats weight = choose(scaled < each(-87.0f), each(0.0f), exponentials(scaled));
      store(weights + j, weight);
      sum += weight;
    }
    total += sum_of(sum);
  }
  if (row->top_k > 0 || row->top_p < 1) least_kept = floor_of(row, weights, vocabulary, total, list, other);
  least_kept = row->min_p > least_kept ? row->min_p : least_kept;
  total = 0;
  for (int64_t i = 0; i < vocabulary; i += SUMMED) {
    floats sum = {0};
    for (int64_t j = i; j < least(i + SUMMED, vocabulary); j += LANES) {
      floats weight = load(weights + j);
      sum += choose(weight >= each(least_kept), weight, each(0.0f));
    }
    total += sums[i / SUMMED] = sum_of(sum);
  }
  double target = row->uniform * total, before = 0;
  for (int64_t i = 0; i < vocabulary; before += sums[i / SUMMED], i += SUMMED) {
    if (before + sums[i / SUMMED] <= target && i + SUMMED < vocabulary) continue;
    double sum = before;
    for (int64_t j = i; j < least(i + SUMMED, vocabulary) && sum <= target; j++)
      if (weights[j] >= least_kept && weights[j] > 0) {
        sum += weights[j];
        row->token = (int32_t)j;
      }
    if (sum > target) return;
  }
  /* Rounding may put the target on the very end: the last token that was kept. */
  for (int64_t i = vocabulary - 1; i >= 0; i--)
    if (weights[i] >= least_kept && weights[i] > 0) {
      row->token = (int32_t)i;
      return;
    }
}

static int draw(onebase_draw *rows, int64_t count, int64_t vocabulary, int64_t threads) {
  drawing d = {.rows = rows, .vocabulary = vocabulary};
  int64_t padded = parts_of(vocabulary, LANES) * LANES;
  d.size = parts_of(12 * padded + 8 * parts_of(vocabulary, SUMMED), 64) * 64;
  d.buffers = onebase_scratch(ONEBASE_PANELS, threads * d.size);
  if (!d.buffers) return ONEBASE_OUT_OF_MEMORY;
  onebase_share(draw_part, &d, count);
  return 0;
}
