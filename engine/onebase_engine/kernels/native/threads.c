/* A waiting thread looks again and again for PATIENCE_NS, and then sleeps until it is woken. It never yields the
 * processor: who yields gives up the rest of its time slice, and Linux then runs even a thread of the lowest
 * priority for milliseconds, while whom a futex wakes is run before such a thread at once.
 *
 * Parts are drawn one by one from a ticket that also names the task, so that a thread which sleeps, or which
 * the system does not run, holds nobody up and can never touch a task that has ended.
 */
#define _GNU_SOURCE
#include "threads.h"

#include <pthread.h>
#include <sched.h>
#include <signal.h>
#include <stdatomic.h>
#include <stdlib.h>
#include <time.h>
#include <unistd.h>
#ifdef __linux__
#include <linux/futex.h>
#include <sys/syscall.h>
#endif

#define MOST_THREADS 256
#define PATIENCE_NS 100000
#define LOOKS 50 /* between two readings of the clock */

/* Ticket: the task's number (24 bits), how many parts it has (20), how many are drawn (20). */
#define DRAWN(ticket) ((int64_t)((ticket) & ONEBASE_MOST_PARTS))
#define PARTS(ticket) ((int64_t)((ticket) >> 20 & ONEBASE_MOST_PARTS))

static struct {
  _Alignas(64) _Atomic uint64_t ticket;
  _Alignas(64) _Atomic int64_t ended;
  _Alignas(64) _Atomic uint32_t bell; /* what sleepers watch */
  _Atomic int32_t asleep;
  _Alignas(64) _Atomic uint32_t ends; /* what the thread that shares a task watches, asleep */
  _Atomic int32_t awaited;
  _Atomic int stopping;
  onebase_part run;
  void *task;
  int64_t count;
  pid_t process; /* that the threads belong to: a forked child has none of them */
  pthread_t threads[MOST_THREADS];
  pthread_mutex_t door;
} pool = {.count = 1, .door = PTHREAD_MUTEX_INITIALIZER};

static inline void relax(void) {
#if defined(__x86_64__) || defined(__i386__)
  __builtin_ia32_pause();
#elif defined(__aarch64__)
  __asm__ volatile("yield");
#endif
}

static int64_t now_ns(void) {
  struct timespec time;
  clock_gettime(CLOCK_MONOTONIC, &time);
  return (int64_t)time.tv_sec * 1000000000 + time.tv_nsec;
}

static void sleep_while(_Atomic uint32_t *bell, uint32_t seen) {
#ifdef __linux__
  syscall(SYS_futex, bell, FUTEX_WAIT_PRIVATE, seen, NULL, NULL, 0);
#else
  (void)bell, (void)seen;
  struct timespec while_ = {0, 100000};
  nanosleep(&while_, NULL);
#endif
}

static void ring(_Atomic uint32_t *bell, _Atomic int32_t *asleep) {
  atomic_fetch_add(bell, 1);
#ifdef __linux__
  if (atomic_load(asleep)) syscall(SYS_futex, bell, FUTEX_WAKE_PRIVATE, MOST_THREADS, NULL, NULL, 0);
#endif
}

/* Draws parts of the current task until none is left. */
static void work(int64_t thread) {
  uint64_t ticket = atomic_load_explicit(&pool.ticket, memory_order_acquire);
  while (DRAWN(ticket) < PARTS(ticket)) {
    if (!atomic_compare_exchange_weak_explicit(&pool.ticket, &ticket, ticket + 1, memory_order_acq_rel,
                                               memory_order_acquire))
      continue;
    pool.run(pool.task, DRAWN(ticket), thread);
    int64_t ended = atomic_fetch_add_explicit(&pool.ended, 1, memory_order_acq_rel) + 1;
    if (thread && ended == PARTS(ticket)) ring(&pool.ends, &pool.awaited);
    ticket = atomic_load_explicit(&pool.ticket, memory_order_acquire);
  }
}

static int has_work(int64_t unused) {
  (void)unused;
  uint64_t ticket = atomic_load_explicit(&pool.ticket, memory_order_acquire);
  return DRAWN(ticket) < PARTS(ticket) || atomic_load_explicit(&pool.stopping, memory_order_acquire);
}

static int has_ended(int64_t parts) { return atomic_load_explicit(&pool.ended, memory_order_acquire) >= parts; }

/* Returns once `is_over` of the argument is true; whoever makes it true rings the bell. */
static void wait_until(int (*is_over)(int64_t), int64_t argument, _Atomic uint32_t *bell, _Atomic int32_t *asleep) {
  int64_t until = 0;
  do {
    for (int look = 0; look < LOOKS; look++) {
      if (is_over(argument)) return;
      relax();
    }
    if (!until) until = now_ns() + PATIENCE_NS;
  } while (now_ns() < until);
  atomic_fetch_add(asleep, 1);
  for (;;) {
    uint32_t seen = atomic_load(bell);
    if (is_over(argument)) break;
    sleep_while(bell, seen);
  }
  atomic_fetch_sub(asleep, 1);
}

static void *live(void *thread) {
  while (!atomic_load_explicit(&pool.stopping, memory_order_acquire)) {
    work((intptr_t)thread);
    wait_until(has_work, 0, &pool.bell, &pool.asleep);
  }
  return NULL;
}

static void stop_threads(void) {
  if (pool.process == getpid()) {
    atomic_store(&pool.stopping, 1);
    ring(&pool.bell, &pool.asleep);
    for (int64_t i = 1; i < pool.count; i++) pthread_join(pool.threads[i], NULL);
    atomic_store(&pool.stopping, 0);
  } else {
    atomic_store(&pool.asleep, 0);
    atomic_store(&pool.awaited, 0);
  }
  pool.count = 1;
}

static void start_threads(int64_t count) {
  sigset_t all, before;
  sigfillset(&all);
  pthread_sigmask(SIG_SETMASK, &all, &before); /* the program's own threads get its signals */
  pool.process = getpid();
  while (pool.count < count && !pthread_create(&pool.threads[pool.count], NULL, live, (void *)(intptr_t)pool.count)) pool.count++;
  pthread_sigmask(SIG_SETMASK, &before, NULL);
}

static void lock_in_child(void) {
  pthread_mutex_t fresh = PTHREAD_MUTEX_INITIALIZER;
  pool.door = fresh;
}

void onebase_lock(void) { pthread_mutex_lock(&pool.door); }

void onebase_unlock(void) { pthread_mutex_unlock(&pool.door); }

int64_t onebase_threads(int64_t count) {
  static int registered;
  if (!registered) registered = !pthread_atfork(NULL, NULL, lock_in_child);
  if (count > MOST_THREADS) count = MOST_THREADS;
  if (count < 1) count = 1;
  if (pool.process != getpid() || pool.count != count) {
    stop_threads();
    start_threads(count);
  }
  return pool.count;
}

void onebase_share(onebase_part run, void *task, int64_t parts) {
  if (pool.count > 1 && pool.process != getpid()) {
    int64_t count = pool.count;
    stop_threads();
    start_threads(count);
  }
  if (pool.count < 2 || parts < 2 || parts > ONEBASE_MOST_PARTS) {
    for (int64_t part = 0; part < parts; part++) run(task, part, 0);
    return;
  }
  pool.run = run;
  pool.task = task;
  atomic_store_explicit(&pool.ended, 0, memory_order_relaxed);
  uint64_t number = (atomic_load_explicit(&pool.ticket, memory_order_relaxed) >> 40) + 1;
  atomic_store_explicit(&pool.ticket, number << 40 | (uint64_t)parts << 20, memory_order_release);
  ring(&pool.bell, &pool.asleep);
  work(0);
  wait_until(has_ended, parts, &pool.ends, &pool.awaited);
}
