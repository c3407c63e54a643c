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
#define ONEBASE_ABI 1

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

EXPORT int onebase_linear_rows(const onebase_linear *const *layers, bf16 *const *ys, int64_t count, int64_t gated,
                               const onebase_groups *groups, const bf16 *x, int64_t rows) {
  onebase_lock();
  int result = kernels->linear(layers, ys, count, gated, groups, x, rows, threads);
  onebase_unlock();
  return result;
}

EXPORT int onebase_attend(const onebase_attention *layer, const onebase_contexts *contexts,
                          const onebase_qkv *step) {
  onebase_lock();
  int result = kernels->attend(layer, contexts, step, threads);
  onebase_unlock();
  return result;
}

EXPORT int onebase_rms_norm(const bf16 *x, const bf16 *weight, bf16 *y, int64_t rows, int64_t size, float eps) {
  onebase_lock();
  int result = kernels->rms_norm(x, weight, y, rows, size, eps, threads);
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
