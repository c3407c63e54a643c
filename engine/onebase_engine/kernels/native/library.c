/* What Python calls: the kernels of the best set of instructions that this processor has. */
#include <stdlib.h>
#include <string.h>

#include "kernels.h"
#include "threads.h"

#if defined(__x86_64__)
#include <sys/syscall.h>
#include <unistd.h>
#endif

#define EXPORT __attribute__((visibility("default")))

/* Changes with each change of a structure or a function: Python asks for its own. */
#define ONEBASE_ABI 11

extern const onebase_kernels onebase_portable, onebase_avx2, onebase_avx512, onebase_avx512_bf16, onebase_amx;

static const onebase_kernels *kernels;
static int64_t threads = 1;

static struct {
  void *memory;
  int64_t size;
} scratches[ONEBASE_SCRATCHES];

void *onebase_scratch(int which, int64_t size) {
  if (scratches[which].size < size) {
    free(scratches[which].memory);
    int64_t more = (size + size / 4 + 4095) / 4096 * 4096;
    scratches[which].memory = aligned_alloc(4096, more);
    scratches[which].size = scratches[which].memory ? more : 0;
  }
  return scratches[which].memory;
}

#ifdef ONEBASE_HAS_AVX2
static int has_avx2(void) { return __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma"); }
#endif

#ifdef ONEBASE_HAS_AVX512
static int has_avx512(void) {
  return __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
         __builtin_cpu_supports("avx512vl") && __builtin_cpu_supports("avx512dq");
}
#endif

#ifdef ONEBASE_HAS_AVX512_BF16
static int has_avx512_bf16(void) { return has_avx512() && __builtin_cpu_supports("avx512bf16"); }
#endif

#ifdef ONEBASE_HAS_AMX
/* Linux gives a process the tiles' large state only if it asks. */
static int has_amx(void) {
#ifdef __linux__
  enum { ask_for_state = 0x1023, tile_data = 18 };
  return has_avx512_bf16() && __builtin_cpu_supports("amx-bf16") &&
         !syscall(SYS_arch_prctl, ask_for_state, tile_data);
#else
  return 0;
#endif
}
#endif

static int always(void) { return 1; }

/* The best first. */
static const struct {
  const onebase_kernels *kernels;
  int (*available)(void);
} all[] = {
#ifdef ONEBASE_HAS_AMX
    {&onebase_amx, has_amx},
#endif
#ifdef ONEBASE_HAS_AVX512_BF16
    {&onebase_avx512_bf16, has_avx512_bf16},
#endif
#ifdef ONEBASE_HAS_AVX512
    {&onebase_avx512, has_avx512},
#endif
#ifdef ONEBASE_HAS_AVX2
    {&onebase_avx2, has_avx2},
#endif
    {&onebase_portable, always},
};

EXPORT int64_t onebase_abi(void) { return ONEBASE_ABI; }

/* Chooses the kernels called `name`, or the best ones with null. Returns the name of those that compute from
 * now on, or null if this processor has no such instructions. */
EXPORT const char *onebase_choose(const char *name) {
#if defined(__x86_64__)
  __builtin_cpu_init();
#endif
  for (size_t i = 0; i < sizeof all / sizeof *all; i++)
    if ((!name || !strcmp(name, all[i].kernels->name)) && all[i].available()) {
      kernels = all[i].kernels;
      return kernels->name;
    }
  return NULL;
}

EXPORT int64_t onebase_use_threads(int64_t count) {
  onebase_lock();
  threads = onebase_threads(count);
  onebase_unlock();
  return threads;
}

static int run(const onebase_call *call, const onebase_groups *groups, const onebase_contexts *contexts) {
  switch (call->kind) {
    case ONEBASE_LINEAR:
      return kernels->linear(call->layers, call->ys, call->count, call->gated, groups, call->x, call->rows, threads);
    case ONEBASE_NORM:
      return kernels->rms_norm(call->x, call->weight, call->ys[0], call->rows, call->size, call->eps,
                               call->around_one, threads);
    case ONEBASE_ATTEND:
      if (!contexts || contexts->rows != call->rows) return ONEBASE_UNFIT;
      return kernels->attend(call->attention, contexts + call->attention->table, &call->projected, threads);
    case ONEBASE_ADD:
      kernels->add(call->x, call->other, call->ys[0], call->rows * call->size);
      return 0;
    case ONEBASE_ROUTE: {
      onebase_unlock(); /* others may compute, and what is called too */
      int result = call->route(call->rows);
      onebase_lock();
      return result;
    }
    case ONEBASE_EXPERTS:
      return kernels->experts(call->mixture, &call->choice, groups, call->x, call->ys[0], call->rows, threads);
    default:
      return ONEBASE_UNFIT;
  }
}

/* Makes calls one after the other, up to the first that fails. `groups` (null: no adapter acts) and `contexts`,
 * one for each table, are the step's. */
EXPORT int onebase_run(const onebase_call *calls, int64_t count, const onebase_groups *groups,
                       const onebase_contexts *contexts) {
  int result = 0;
  onebase_lock();
  for (int64_t i = 0; i < count && !result; i++) result = run(calls + i, groups, contexts);
  onebase_unlock();
  return result;
}

EXPORT int onebase_draw_tokens(onebase_draw *rows, int64_t count, int64_t vocabulary) {
  onebase_lock();
  int result = kernels->draw(rows, count, vocabulary, threads);
  onebase_unlock();
  return result;
}

EXPORT int onebase_convolve(const onebase_convolution *layer, const onebase_runs *runs) {
  onebase_lock();
  int result = kernels->convolve(layer, runs, threads);
  onebase_unlock();
  return result;
}

EXPORT int onebase_apply_delta_rule(const onebase_delta_rule *layer, const onebase_runs *runs) {
  onebase_lock();
  int result = kernels->delta_rule(layer, runs, threads);
  onebase_unlock();
  return result;
}

EXPORT int onebase_scan_states(const onebase_state_space *layer, const onebase_runs *runs) {
  onebase_lock();
  int result = kernels->state_space(layer, runs, threads);
  onebase_unlock();
  return result;
}

EXPORT int onebase_gate(const bf16 *gates, const bf16 *ups, bf16 *y, int64_t count) {
  return kernels->gate(gates, ups, y, count);
}

EXPORT int onebase_sums(const onebase_order *order, const float *x, int64_t rows, const float *weights,
                        int64_t lanes, int64_t inner, float *to) {
  return kernels->sums(order, x, rows, weights, lanes, inner, to);
}
