/* What the engine computes on a CPU, on plain pointers. `kernels.c` is compiled once for each set of
 * instructions; `library.c` chooses one of them at run time and is all that Python sees.
 *
 * A row's bits depend on nothing but the row: each sum has one order, whatever else is in the batch and
 * however many threads there are.
 */
#ifndef ONEBASE_KERNELS_H
#define ONEBASE_KERNELS_H

#include <stdint.h>

#define LANES 16
#define ONEBASE_MOST_LAYERS 3

typedef uint16_t bf16;

/* The order in which products of `inner` terms are summed: terms of a block one after the other, blocks of a
 * group, groups. `ends` are the blocks' ends; `group` of each says which group it is in, from 0 on. With no
 * blocks there are STRANDS sums, of every fourth product, rounded, one after the other; then (0 + 2) + (1 + 3). */
#define STRANDS 4
typedef struct {
  int64_t blocks;
  int32_t ends[64];
  int32_t group[64];
} onebase_order;

/* One adapter of one layer. */
typedef struct {
  const float *a; /* [rank, in] */
  const float *b; /* [out, rank] */
  int64_t rank; /* 0: the slot has none */
  const onebase_order *shrink, *expand;
  float scale;
  int32_t wide; /* whether its delta is never rounded before it is added, as PEFT does for an activated LoRA */
} onebase_lora;

enum { ONEBASE_NF4 = 0, ONEBASE_BF16 = 1, ONEBASE_INT8 = 2 };

typedef struct {
  int64_t kind, in, out; /* `in` a multiple of 32 */
  const void *weight;   /* two values a byte, the first one high, or bf16 or int8 [out, in] */
  const float *absmax;  /* of each block of weights: [out / 16, blocks of an output, 16]; with int8 of each output */
  const float *code;    /* [16] */
  int64_t blocksize_log2; /* 5 or more */
  const bf16 *bias;     /* [out] or null */
  int64_t block;        /* terms that are summed before they are added to the rest; `in` with AMX */
  int64_t quantized;    /* whether a delta is rounded before it is added, as PEFT does for 4-bit layers */
  const onebase_lora *lora; /* by slot, or null */
  const uint8_t *nested;      /* instead of `absmax` scales in 8 bits, or null: [out, blocks of an output] from number */
  int64_t nested_first;       /* this on */
  const float *nested_code;   /* what one stands for, [256], */
  const float *nested_absmax; /* times this of each 256, from number 0 on, */
  float nested_offset;        /* plus this */
} onebase_linear;

/* Which adapters act on which rows: rows `row[row_starts[g] ..]` have the terms `term_starts[g] ..`. */
typedef struct {
  int64_t groups;
  const int32_t *row_starts, *row, *term_starts, *slot;
  const float *weight;
} onebase_groups;

/* bf16, or int8 with one scale for each slot: a number is then the product of the two. */
typedef struct {
  void *keys, *values; /* of a head from slot head * slots on, [slots, dim] */
  bf16 *key_scales, *value_scales; /* the same, or null: keys and values are bf16 */
  int64_t kv_heads, groups, key_dim, value_dim, slots, block_size;
  float scaling, softcap; /* softcap 0: none */
  int64_t window, chunk;  /* how many positions a row sees up to its own, or of what size the chunks are of which it
                             sees its own; 0: all */
  int64_t writes;         /* 0: the step's keys and values are in the cache already */
  int64_t table;          /* number of its contexts among the step's */
  const float *sinks;     /* [kv_heads * groups], or null: a logit of each head that has no value */
} onebase_attention;

/* Of one step and one table of blocks, which some layers share. Row r is at `position[r]` of the context whose
 * blocks are row `table_row[r]` of `table`; its key and value go to KV slot `write[r]`. Rows that are padding have
 * a position of -1. */
typedef struct {
  int64_t rows;
  const int32_t *position, *table_row, *write, *table;
  int64_t table_width;
} onebase_contexts;

/* q, k, v: row and head strides in elements; out [rows, heads, value_dim]. With `cosines` and `sines` [rows,
 * key_dim], key_dim a multiple of 32, queries and keys are still to be turned by their positions. */
typedef struct {
  const bf16 *q, *k, *v;
  int64_t q_row, q_head, k_row, k_head, v_row, v_head;
  bf16 *out;
  const bf16 *cosines, *sines;
} onebase_qkv;

/* How a row's token is drawn from its logits: the largest with a temperature of 0, else by `uniform`, in [0, 1),
 * from those that top_k (0: all), top_p and min_p leave, in this order. If all that are allowed are at minus
 * infinity, they are drawn as if all of them were at 0. */
typedef struct {
  const void *logits; /* bf16, or float if `wide` */
  const uint32_t *allowed; /* a bit of each token, the first in the lowest, that may be drawn; NULL: all may */
  int64_t wide, top_k;
  double uniform;
  float temperature, top_p, min_p;
  int32_t token; /* the result: -1 where the largest of all logits is no finite number, or nothing is allowed */
} onebase_draw;

/* Runs of rows that each continue a state. Run i has the rows from starts[i] to starts[i + 1], begins with the state
 * in place read[i] and leaves its own in place write[i], which no run reads, unless that is -1. Rows behind the last
 * run are padding. */
typedef struct {
  int64_t runs;
  const int32_t *starts, *read, *write;
} onebase_runs;

/* Rows `stride` elements apart, fp32 if `wide`, else bf16. */
typedef struct {
  const void *from;
  int64_t stride, wide;
} onebase_rows;

/* A causal convolution of each channel. */
typedef struct {
  int64_t rows, channels, taps;
  onebase_rows x;          /* [rows, channels] */
  const void *weight;      /* [channels, taps] */
  const void *bias;        /* [channels] or null */
  int64_t wide;            /* whether weight, bias and y are fp32, not bf16 */
  void *states;            /* [places, taps - 1, channels], as x: the rows before */
  void *y;                 /* [rows, channels] */
} onebase_convolution;

/* The gated delta rule: S = exp(decay) S, S += k (beta (v - k S)), y = scale q S. */
typedef struct {
  int64_t rows, key_heads, heads, key_dim, value_dim;
  onebase_rows q, k;       /* [rows, key_heads, key_dim], each head for neighbouring ones of v */
  onebase_rows v;          /* [rows, heads, value_dim] */
  onebase_rows decay;      /* [rows, heads], or [rows, heads, key_dim] if `by_key` */
  onebase_rows beta;       /* [rows, heads] */
  int64_t by_key, normalized; /* `normalized`: q and k are first divided by the root of their squares' sum and eps */
  float eps, scale;
  float *states;           /* [places, heads, key_dim, value_dim] */
  void *y;                 /* as v, contiguous */
} onebase_delta_rule;

/* A selective state space model: S = exp(dt a) S + (dt x) b, y = S c + skip x. */
typedef struct {
  int64_t rows, heads, dim, groups, size;
  onebase_rows x;          /* [rows, heads, dim] */
  onebase_rows dt;         /* [rows, heads] */
  onebase_rows b, c;       /* [rows, groups, size], each group for neighbouring heads */
  const float *a;          /* [heads], or [heads, size] if `by_size` */
  const float *skip;       /* [heads] or null */
  int64_t by_size;
  float *states;           /* [places, heads, dim, size] */
  float *y;                /* [rows, heads, dim] */
} onebase_state_space;

/* A mixture's experts, whose gate is silu. `layers`: of each expert the gate, the layer up and the one down. */
typedef struct {
  int64_t experts;
  const onebase_linear *layers; /* [experts, 3] */
} onebase_mixture;

/* The experts of a step's rows, [rows, each], and their weights, fp32 if `wide`, else bf16. */
typedef struct {
  const int64_t *experts;
  const void *weights;
  int64_t each, wide;
} onebase_choice;

/* Makes the choice of a step's rows. Returns 0, or ONEBASE_NOT_CHOSEN. */
typedef int (*onebase_route)(int64_t rows);

/* One call, with all that stays the same from step to step. Which of the fields are read depends on the kind:
 *   LINEAR  `count` layers over x [rows, in] to `ys`; `gated`
 *   NORM    x [rows, size] by `weight` [size] to ys[0]; `around_one`
 *   ATTEND  by `attention` and `projected`, over the step's contexts
 *   ADD     x + other, [rows, size], to ys[0]
 *   ROUTE   by `route`
 *   EXPERTS by `mixture` and `choice` over x [rows, in] to ys[0] [rows, out] */
enum { ONEBASE_LINEAR, ONEBASE_NORM, ONEBASE_ATTEND, ONEBASE_ADD, ONEBASE_ROUTE, ONEBASE_EXPERTS };
typedef struct {
  int64_t kind, rows, count, gated, size;
  float eps;
  int32_t around_one;
  const onebase_linear *layers[ONEBASE_MOST_LAYERS];
  bf16 *ys[ONEBASE_MOST_LAYERS];
  const bf16 *x, *other, *weight;
  const onebase_attention *attention;
  onebase_qkv projected;
  onebase_route route;
  const onebase_mixture *mixture;
  onebase_choice choice;
} onebase_call;

/* Each returns 0, or ONEBASE_OUT_OF_MEMORY. `threads`: that the pool has. */
typedef struct {
  const char *name;
  /* Several layers over the same rows x [rows, in], to ys [rows, out]. `gated`: two layers of one size, and
   * ys[0] is silu(first) * second. */
  int (*linear)(const onebase_linear *const *layers, bf16 *const *ys, int64_t count, int64_t gated,
                const onebase_groups *, const bf16 *x, int64_t rows, int64_t threads);
  int (*experts)(const onebase_mixture *, const onebase_choice *, const onebase_groups *, const bf16 *x, bf16 *y,
                 int64_t rows, int64_t threads);
  int (*attend)(const onebase_attention *, const onebase_contexts *, const onebase_qkv *, int64_t threads);
  /* `size` a multiple of 16. Rows are rounded before they are multiplied by the weight, or, with `around_one`, after
   * they are by 1 and the weight. */
  int (*rms_norm)(const bf16 *x, const bf16 *weight, bf16 *y, int64_t rows, int64_t size, float eps,
                  int around_one, int64_t threads);
  int (*draw)(onebase_draw *rows, int64_t count, int64_t vocabulary, int64_t threads);
  int (*convolve)(const onebase_convolution *, const onebase_runs *, int64_t threads);
  int (*delta_rule)(const onebase_delta_rule *, const onebase_runs *, int64_t threads);
  int (*state_space)(const onebase_state_space *, const onebase_runs *, int64_t threads);
  /* x + other, `count` a multiple of 16. */
  void (*add)(const bf16 *x, const bf16 *other, bf16 *y, int64_t count);
  /* silu(gates) * ups, `count` a multiple of 16. For trials. */
  int (*gate)(const bf16 *gates, const bf16 *ups, bf16 *y, int64_t count);
  /* For trials. */
  int (*sums)(const onebase_order *, const float *x, int64_t rows, const float *weights, int64_t lanes,
              int64_t inner, float *to);
} onebase_kernels;

/* `size` bytes on a cache line's border, the caller's until it asks again for the same of the ONEBASE_SCRATCHES,
 * or null where memory is out. Only for the thread that calls `onebase_share`, and the parts of its task. */
enum {
  ONEBASE_ROWS,
  ONEBASE_FLOATS,
  ONEBASE_HIDDEN,
  ONEBASE_PLACES,
  ONEBASE_PANELS,
  ONEBASE_CHOSEN,
  ONEBASE_PACKED,
  ONEBASE_SCRATCHES
};
void *onebase_scratch(int which, int64_t size);

/* What is returned where memory is out, for a call that does not fit the step, where a row has chosen an expert that
 * there is not, and where choosing has failed. */
#define ONEBASE_OUT_OF_MEMORY (-1)
#define ONEBASE_UNFIT (-2)
#define ONEBASE_NO_EXPERT (-3)
#define ONEBASE_NOT_CHOSEN (-4)

#endif
