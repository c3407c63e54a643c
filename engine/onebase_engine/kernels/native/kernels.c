/* The kernels themselves, compiled once for each set of instructions: ONEBASE_KERNELS is the table's name. */
#include "kernels.h"

#include "vectors.h"

#include "product.h"

#include "attention.h"

#include "sampling.h"

#include "recurrence.h"

/* ---- norm ---------------------------------------------------------------------------------- */

/* Lanes of the vectors that torch sums rows with, how many sums it makes side by side, and of how many terms. */
#define TORCH_LANES 8
#define TORCH_SUMS 4
#define TORCH_STEP 16

/* The sum in the order of torch's `mean` (aten/src/ATen/native/cpu/SumKernel.cpp). */
static float torch_sum(const float *x, int64_t size) {
  float part[4][TORCH_SUMS][TORCH_LANES] = {{{0}}};
  int64_t vectors = size / TORCH_LANES, steps = vectors / TORCH_SUMS, step = 0;
  while (step + TORCH_STEP <= steps) {
    for (int64_t i = 0; i < TORCH_STEP; i++, step++)
      for (int j = 0; j < TORCH_SUMS; j++)
        for (int lane = 0; lane < TORCH_LANES; lane++)
          part[0][j][lane] += x[(step * TORCH_SUMS + j) * TORCH_LANES + lane];
    for (int level = 1; level < 4; level++) {
      for (int j = 0; j < TORCH_SUMS; j++)
        for (int lane = 0; lane < TORCH_LANES; lane++) {
          part[level][j][lane] += part[level - 1][j][lane];
          part[level - 1][j][lane] = 0;
        }
      if (step & ((int64_t)(TORCH_STEP - 1) << (level * 4))) break;
    }
  }
  for (; step < steps; step++)
    for (int j = 0; j < TORCH_SUMS; j++)
      for (int lane = 0; lane < TORCH_LANES; lane++)
        part[0][j][lane] += x[(step * TORCH_SUMS + j) * TORCH_LANES + lane];
  for (int level = 1; level < 4; level++)
    for (int j = 0; j < TORCH_SUMS; j++)
      for (int lane = 0; lane < TORCH_LANES; lane++) part[0][j][lane] += part[level][j][lane];
  float sum = 0;
  for (int64_t i = steps * TORCH_SUMS; i < vectors; i++)
    for (int lane = 0; lane < TORCH_LANES; lane++) part[0][0][lane] += x[i * TORCH_LANES + lane];
  for (int j = 1; j < TORCH_SUMS; j++)
    for (int lane = 0; lane < TORCH_LANES; lane++) part[0][0][lane] += part[0][j][lane];
  for (int64_t i = vectors * TORCH_LANES; i < size; i++) sum += x[i];
  for (int lane = 0; lane < TORCH_LANES; lane++) sum += part[0][0][lane];
  return sum;
}

/* Rows that one part takes. */
#define NORMED 16

typedef struct {
  const bf16 *x, *weight;
  bf16 *y;
  int64_t rows, size;
  float eps, *floats; /* of each thread */
  int around_one;
} norm;

static void norm_part(void *task, int64_t part, int64_t thread) {
  norm *n = task;
  int64_t size = n->size, last = least((part + 1) * NORMED, n->rows);
  float *wide = n->floats + thread * 2 * size, *squares = wide + size;
  for (int64_t row = part * NORMED; row < last; row++) {
    const bf16 *x = n->x + row * size;
    bf16 *y = n->y + row * size;
    for (int64_t i = 0; i < size; i += LANES) store(wide + i, widen(x + i));
    for (int64_t i = 0; i < size; i++) squares[i] = wide[i] * wide[i];
    float factor = 1.0f / sqrtf(torch_sum(squares, size) / (float)size + n->eps);
    for (int64_t i = 0; i < size; i += LANES)
      if (n->around_one)
        narrow(y + i, load(wide + i) * each(factor) * (each(1.0f) + widen(n->weight + i)));
      else
        narrow(y + i, rounded(load(wide + i) * each(factor)) * widen(n->weight + i));
  }
}

static int rms_norm(const bf16 *x, const bf16 *weight, bf16 *y, int64_t rows, int64_t size, float eps,
                    int around_one, int64_t threads) {
  norm n = {.x = x, .weight = weight, .y = y, .rows = rows, .size = size, .eps = eps, .around_one = around_one};
  n.floats = onebase_scratch(ONEBASE_FLOATS, threads * size * 8);
  if (!n.floats) return ONEBASE_OUT_OF_MEMORY;
  onebase_share(norm_part, &n, parts_of(rows, NORMED));
  return 0;
}

static void add(const bf16 *x, const bf16 *other, bf16 *y, int64_t count) {
  for (int64_t i = 0; i < count; i += LANES) narrow(y + i, widen(x + i) + widen(other + i));
}

static int gate(const bf16 *gates, const bf16 *ups, bf16 *y, int64_t count) {
  for (int64_t i = 0; i < count; i += LANES) narrow(y + i, gated(widen(gates + i), widen(ups + i)));
  return 0;
}

/* Sums of products of up to SHRUNK rows of x [rows, inner] and 16 of weights [lanes, inner], as adapters are
 * multiplied: [rows, 16]. For trials. */
static int sums(const onebase_order *order, const float *x, int64_t rows, const float *weights, int64_t lanes,
                int64_t inner, float *to) {
  floats some[SHRUNK];
  ordered_sums(order, x, inner, rows, weights, inner, lanes, inner, some);
  memcpy(to, some, rows * sizeof *some);
  return 0;
}

const onebase_kernels ONEBASE_KERNELS = {
    ONEBASE_NAME, linear, experts, attend, rms_norm, draw, convolve, apply_delta_rule, scan_states, add, gate, sums};
