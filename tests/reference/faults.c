/* Preloaded into a process: lets the n-th change of a file under a folder fail, kill the process, or send it a signal.

   Inert until `fault_arm`. Every change counts: an opened file that may be written, a write, a truncation, a flush to
   disk, a rename, a removal, a new folder. What is counted is the same for Python and for C++ libraries. Armed for
   reading, it counts files that are opened to be read, and reads, instead. */
#define _GNU_SOURCE
#include <dlfcn.h>
#include <errno.h>
#include <fcntl.h>
#include <limits.h>
#include <signal.h>
#include <stdarg.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/stat.h>
#include <sys/types.h>
#include <sys/uio.h>
#include <unistd.h>

static char folder[PATH_MAX];
static long wanted = -1, count;
static int failure, lasting, signal_number, reads;

void fault_arm(const char *prefix, long nth, int error, int for_ever, int number, int reading) {
  snprintf(folder, sizeof folder, "%s", prefix);
  failure = error, lasting = for_ever, signal_number = number, reads = reading, count = 0;
  __atomic_store_n(&wanted, nth, __ATOMIC_SEQ_CST);
}

long fault_count(void) { return __atomic_load_n(&count, __ATOMIC_SEQ_CST); }

static int at_path(int directory, const char *path) {
  char whole[PATH_MAX];
  if (wanted < 0 || !path) return 0;
  if (path[0] != '/') {
    char base[PATH_MAX], link[64];
    ssize_t size;
    if (directory == AT_FDCWD) {
      if (!getcwd(base, sizeof base)) return 0;
    } else {
      snprintf(link, sizeof link, "/proc/self/fd/%d", directory);
      if ((size = readlink(link, base, sizeof base - 1)) < 0) return 0;
      base[size] = 0;
    }
    if (snprintf(whole, sizeof whole, "%s/%s", base, path) >= (int)sizeof whole) return 0;
    path = whole;
  }
  return !strncmp(path, folder, strlen(folder));
}

static int at_fd(int fd) {
  char link[64], path[PATH_MAX];
  if (wanted < 0) return 0;
  snprintf(link, sizeof link, "/proc/self/fd/%d", fd);
  ssize_t size = readlink(link, path, sizeof path - 1);
  if (size < 0) return 0;
  path[size] = 0;
  return !strncmp(path, folder, strlen(folder));
}

/* Whether this change or read, which is in the folder, must fail; `grows`: a full disk refuses it. */
static int fails(int here, int grows) {
  if (!here) return 0;
  long number = __atomic_add_fetch(&count, 1, __ATOMIC_SEQ_CST);
  if (number == wanted && signal_number) kill(getpid(), signal_number);
  if (!failure || !(number == wanted || (lasting && number > wanted))) return 0;
  if (!grows && (failure == ENOSPC || failure == EDQUOT)) return 0;
  errno = failure;
  return 1;
}

#define REAL(name) static __typeof__(name) *real; if (!real) real = dlsym(RTLD_NEXT, #name)
#define ON_FD(type, name, parameters, arguments, grows) \
  type name parameters { REAL(name); return fails(!reads && at_fd(fd), grows) ? (type)-1 : real arguments; }
#define ON_PATH(type, name, parameters, arguments, directory, path, grows) \
  type name parameters { REAL(name); return fails(!reads && at_path(directory, path), grows) ? (type)-1 : real arguments; }

#define ON_READ(name, parameters, arguments) \
  ssize_t name parameters { REAL(name); return fails(reads && at_fd(fd), 1) ? -1 : real arguments; }

ON_READ(read, (int fd, void *data, size_t size), (fd, data, size))
ON_READ(pread, (int fd, void *data, size_t size, off_t at), (fd, data, size, at))
ON_READ(pread64, (int fd, void *data, size_t size, off64_t at), (fd, data, size, at))
ON_FD(ssize_t, write, (int fd, const void *data, size_t size), (fd, data, size), 1)
ON_FD(ssize_t, pwrite, (int fd, const void *data, size_t size, off_t at), (fd, data, size, at), 1)
ON_FD(ssize_t, pwrite64, (int fd, const void *data, size_t size, off64_t at), (fd, data, size, at), 1)
ON_FD(ssize_t, writev, (int fd, const struct iovec *parts, int number), (fd, parts, number), 1)
ON_FD(ssize_t, pwritev, (int fd, const struct iovec *parts, int number, off_t at), (fd, parts, number, at), 1)
ON_FD(ssize_t, pwritev64, (int fd, const struct iovec *parts, int number, off64_t at), (fd, parts, number, at), 1)
ON_FD(int, ftruncate, (int fd, off_t size), (fd, size), 1)
ON_FD(int, ftruncate64, (int fd, off64_t size), (fd, size), 1)
ON_FD(int, fallocate, (int fd, int mode, off_t at, off_t size), (fd, mode, at, size), 1)
ON_FD(int, fallocate64, (int fd, int mode, off64_t at, off64_t size), (fd, mode, at, size), 1)
ON_FD(int, fsync, (int fd), (fd), 1)
ON_FD(int, fdatasync, (int fd), (fd), 1)
ON_PATH(int, mkdir, (const char *path, mode_t mode), (path, mode), AT_FDCWD, path, 1)
ON_PATH(int, mkdirat, (int fd, const char *path, mode_t mode), (fd, path, mode), fd, path, 1)
ON_PATH(int, rename, (const char *from, const char *to), (from, to), AT_FDCWD, to, 0)
ON_PATH(int, renameat, (int f, const char *from, int t, const char *to), (f, from, t, to), t, to, 0)
ON_PATH(int, renameat2, (int f, const char *from, int t, const char *to, unsigned n), (f, from, t, to, n), t, to, 0)
ON_PATH(int, unlink, (const char *path), (path), AT_FDCWD, path, 0)
ON_PATH(int, unlinkat, (int fd, const char *path, int flags), (fd, path, flags), fd, path, 0)
ON_PATH(int, rmdir, (const char *path), (path), AT_FDCWD, path, 0)

#define OPEN(name, parameters, arguments, directory) \
  int name parameters { \
    REAL(name); \
    va_list rest; va_start(rest, flags); mode_t mode = flags & (O_CREAT | O_TMPFILE) ? va_arg(rest, mode_t) : 0; va_end(rest); \
    int writes = (flags & O_ACCMODE) != O_RDONLY; \
    return fails(writes != reads && at_path(directory, path), 1) ? -1 : real arguments; \
  }
OPEN(open, (const char *path, int flags, ...), (path, flags, mode), AT_FDCWD)
OPEN(open64, (const char *path, int flags, ...), (path, flags, mode), AT_FDCWD)
OPEN(openat, (int fd, const char *path, int flags, ...), (fd, path, flags, mode), fd)
OPEN(openat64, (int fd, const char *path, int flags, ...), (fd, path, flags, mode), fd)
