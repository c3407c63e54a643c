/* A pool of threads that share the parts of one task at a time. */
#ifndef ONEBASE_THREADS_H
#define ONEBASE_THREADS_H

#include <stdint.h>

/* The most parts that one task may have. */
#define ONEBASE_MOST_PARTS ((1 << 20) - 1)

/* `thread`: which of the pool's threads calls, 0 for the caller's. */
typedef void (*onebase_part)(void *task, int64_t part, int64_t thread);

/* Whoever calls the functions below, or asks for scratch, holds this lock. */
void onebase_lock(void);
void onebase_unlock(void);

/* How many threads compute, the caller included. Ends those of a pool that had another number. Returns the
 * number that there are: fewer where the system gives no more. */
int64_t onebase_threads(int64_t count);

/* Calls `run(task, part)` for each part 0 .. parts - 1 and returns when all have ended. The caller takes parts
 * too. */
void onebase_share(onebase_part run, void *task, int64_t parts);

#endif
