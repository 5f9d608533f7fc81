// A disk that fails: loaded before libc (LD_PRELOAD), it counts the calls that write
// below one folder and, at a chosen one, kills the process or returns an error.
//
//     cc -shared -fPIC -O2 -o faults_disk.so faults_disk.c -ldl -pthread
//
// It does nothing until a process calls `faults_arm`. The counters lie in memory that
// the process shares with its parent, who reads them after it is gone.

#define _GNU_SOURCE
#include <dlfcn.h>
#include <errno.h>
#include <fcntl.h>
#include <limits.h>
#include <signal.h>
#include <stdarg.h>
#include <stdatomic.h>
#include <stdio.h>
#include <string.h>
#include <sys/stat.h>
#include <sys/types.h>
#include <sys/uio.h>
#include <unistd.h>

struct counters {
  _Atomic long calls;  // that write below the folder
  _Atomic long hits;   // of them, those that were killed or failed
};

static struct counters* counters;
static char folder[PATH_MAX];
static long first;   // the first call that is hit, from 1; 0 for none
static long period;  // hit again after so many calls; 0 for never
static int failure;  // what it fails with; 0 kills

// What is real: looked up when it is first called.
#define DECLARE(name) static void* real_##name
#define REAL(name) ((__typeof__(&name))found(&real_##name, #name))

static void* found(void** kept, const char* name) {
  if (!*kept) *kept = dlsym(RTLD_NEXT, name);
  return *kept;
}

void faults_arm(struct counters* shared, const char* below, long k, long every, int error) {
  strncpy(folder, below, sizeof folder - 1);
  first = k, period = every, failure = error;
  counters = shared;
}

static int below(const char* path) {
  return strncmp(path, folder, strlen(folder)) == 0;
}

static int descriptor_below(int fd) {
  char link[64], path[PATH_MAX];
  snprintf(link, sizeof link, "/proc/self/fd/%d", fd);
  const ssize_t length = readlink(link, path, sizeof path - 1);
  if (length <= 0) return 0;
  path[length] = 0;
  return below(path);
}

static int path_below(int at, const char* path) {
  if (path[0] == '/') return below(path);
  if (at != AT_FDCWD) return descriptor_below(at);
  char here[PATH_MAX];
  return getcwd(here, sizeof here) != NULL && below(here);
}

// Whether this call is the one; removals fail only where a disk refuses everything.
static int hit(int inside, int removes) {
  if (!counters || !inside) return 0;
  if (removes && (failure == ENOSPC || failure == EDQUOT)) return 0;
  const long n = atomic_fetch_add(&counters->calls, 1) + 1;
  const long after = n - first;
  if (first < 1 || after < 0) return 0;
  if (after > 0 && (period == 0 || after % period)) return 0;
  atomic_fetch_add(&counters->hits, 1);
  return 1;
}

static void die(void) {
  kill(getpid(), SIGKILL);
  for (;;) pause();
}

// After half of what was to be written, or before or after a call that has no halves.
#define FAULT(inside, removes, half, whole)                \
  do {                                                     \
    if (hit(inside, removes)) {                            \
      if (failure) {                                       \
        half;                                              \
        errno = failure;                                   \
        return -1;                                         \
      }                                                    \
      half;                                                \
      if (atomic_load(&counters->calls) % 2) (void)(whole); \
      die();                                               \
    }                                                      \
  } while (0)

DECLARE(write);
ssize_t write(int fd, const void* data, size_t count) {
  FAULT(counters && descriptor_below(fd), 0, (void)!REAL(write)(fd, data, count / 2), 0);
  return REAL(write)(fd, data, count);
}

DECLARE(pwrite);
ssize_t pwrite(int fd, const void* data, size_t count, off_t at) {
  FAULT(counters && descriptor_below(fd), 0, (void)!REAL(pwrite)(fd, data, count / 2, at), 0);
  return REAL(pwrite)(fd, data, count, at);
}

DECLARE(pwrite64);
ssize_t pwrite64(int fd, const void* data, size_t count, off64_t at) {
  FAULT(counters && descriptor_below(fd), 0, (void)!REAL(pwrite64)(fd, data, count / 2, at), 0);
  return REAL(pwrite64)(fd, data, count, at);
}

DECLARE(writev);
ssize_t writev(int fd, const struct iovec* parts, int count) {
  FAULT(counters && descriptor_below(fd), 0, (void)!REAL(writev)(fd, parts, count / 2), 0);
  return REAL(writev)(fd, parts, count);
}

DECLARE(pwritev);
ssize_t pwritev(int fd, const struct iovec* parts, int count, off_t at) {
  FAULT(counters && descriptor_below(fd), 0, (void)!REAL(pwritev)(fd, parts, count / 2, at), 0);
  return REAL(pwritev)(fd, parts, count, at);
}

DECLARE(pwritev64);
ssize_t pwritev64(int fd, const struct iovec* parts, int count, off64_t at) {
  FAULT(counters && descriptor_below(fd), 0, (void)!REAL(pwritev64)(fd, parts, count / 2, at),
        0);
  return REAL(pwritev64)(fd, parts, count, at);
}

DECLARE(copy_file_range);
ssize_t copy_file_range(int in, off64_t* from, int out, off64_t* to, size_t count,
                        unsigned flags) {
  FAULT(counters && descriptor_below(out), 0, , 0);
  return REAL(copy_file_range)(in, from, out, to, count, flags);
}

#define ON_DESCRIPTOR(name, parameters, arguments)          \
  DECLARE(name);                                            \
  int name parameters {                                     \
    FAULT(counters && descriptor_below(fd), 0, , REAL(name) arguments); \
    return REAL(name) arguments;                            \
  }

ON_DESCRIPTOR(fsync, (int fd), (fd))
ON_DESCRIPTOR(fdatasync, (int fd), (fd))
ON_DESCRIPTOR(ftruncate, (int fd, off_t length), (fd, length))
ON_DESCRIPTOR(ftruncate64, (int fd, off64_t length), (fd, length))
ON_DESCRIPTOR(fchmod, (int fd, mode_t mode), (fd, mode))

#define ON_PATH(name, at, path, removes, parameters, arguments)          \
  DECLARE(name);                                                         \
  int name parameters {                                                  \
    FAULT(counters && path_below(at, path), removes, , REAL(name) arguments); \
    return REAL(name) arguments;                                         \
  }

ON_PATH(rename, AT_FDCWD, to, 0, (const char* from, const char* to), (from, to))
ON_PATH(renameat, b, to, 0, (int a, const char* from, int b, const char* to), (a, from, b, to))
ON_PATH(renameat2, b, to, 0,
        (int a, const char* from, int b, const char* to, unsigned flags),
        (a, from, b, to, flags))
ON_PATH(mkdir, AT_FDCWD, path, 0, (const char* path, mode_t mode), (path, mode))
ON_PATH(mkdirat, at, path, 0, (int at, const char* path, mode_t mode), (at, path, mode))
ON_PATH(link, AT_FDCWD, to, 0, (const char* from, const char* to), (from, to))
ON_PATH(symlink, AT_FDCWD, to, 0, (const char* from, const char* to), (from, to))
ON_PATH(truncate, AT_FDCWD, path, 0, (const char* path, off_t length), (path, length))
ON_PATH(chmod, AT_FDCWD, path, 0, (const char* path, mode_t mode), (path, mode))
ON_PATH(unlink, AT_FDCWD, path, 1, (const char* path), (path))
ON_PATH(unlinkat, at, path, 1, (int at, const char* path, int flags), (at, path, flags))
ON_PATH(rmdir, AT_FDCWD, path, 1, (const char* path), (path))

#define WRITES(flags) (((flags) & O_ACCMODE) != O_RDONLY || ((flags) & O_CREAT))
#define MODE(flags, last)                                   \
  mode_t mode = 0;                                          \
  if ((flags) & O_CREAT || ((flags) & O_TMPFILE) == O_TMPFILE) { \
    va_list more;                                           \
    va_start(more, last);                                   \
    mode = va_arg(more, mode_t);                            \
    va_end(more);                                           \
  }

#define OPEN(name)                                                                  \
  DECLARE(name);                                                                    \
  int name(const char* path, int flags, ...) {                                      \
    MODE(flags, flags)                                                              \
    FAULT(counters && WRITES(flags) && path_below(AT_FDCWD, path), 0, ,             \
          REAL(name)(path, flags, mode));                                           \
    return REAL(name)(path, flags, mode);                                           \
  }

#define OPENAT(name)                                                                \
  DECLARE(name);                                                                    \
  int name(int at, const char* path, int flags, ...) {                              \
    MODE(flags, flags)                                                              \
    FAULT(counters && WRITES(flags) && path_below(at, path), 0, ,                   \
          REAL(name)(at, path, flags, mode));                                       \
    return REAL(name)(at, path, flags, mode);                                       \
  }

OPEN(open)
OPEN(open64)
OPENAT(openat)
OPENAT(openat64)
