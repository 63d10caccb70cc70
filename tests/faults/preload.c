/* Faults of files and clocks, for processes that load this library before others. Nothing happens until faults_set. */
#define _GNU_SOURCE
#include <dlfcn.h>
#include <errno.h>
#include <fcntl.h>
#include <limits.h>
#include <stdarg.h>
#include <stdatomic.h>
#include <linux/futex.h>
#include <stdio.h>
#include <string.h>
#include <sys/stat.h>
#include <sys/syscall.h>
#include <sys/time.h>
#include <sys/types.h>
#include <sys/uio.h>
#include <time.h>
#include <unistd.h>

static char prefix[PATH_MAX];
static int error_of[3];              /* of writes, reads, and opens for writing; 0 for none */
static atomic_long before[3];        /* calls that still succeed */
static atomic_long failing[3];       /* calls that then fail */
static double jump;                  /* seconds by which the wall clock is wrong */
static atomic_long before_jump;      /* readings that are still right */

/* The function that would have been called without this library; looked up once. */
#define NEXT(name) ({ static __typeof__(name) *next; if (!next) next = (__typeof__(name) *)dlsym(RTLD_NEXT, #name); next; })

void faults_set(const char *folder, int what, int error, long after, long count) {
  strncpy(prefix, folder, sizeof prefix - 1);
  atomic_store(&before[what], after);
  atomic_store(&failing[what], count);
  error_of[what] = error;
}

void faults_clock(double seconds, long after) {
  atomic_store(&before_jump, after);
  jump = seconds;
}

static int fails(int what) {
  if (atomic_fetch_sub(&before[what], 1) > 0) return 0;
  if (atomic_fetch_sub(&failing[what], 1) <= 0) return 0;
  errno = error_of[what];
  return 1;
}

static int file_fails(int fd, int what) {
  if (!error_of[what]) return 0;
  char link[64], path[PATH_MAX];
  snprintf(link, sizeof link, "/proc/self/fd/%d", fd);
  ssize_t length = readlink(link, path, sizeof path - 1);
  if (length < 0) return 0;
  path[length] = 0;
  return strncmp(path, prefix, strlen(prefix)) == 0 && fails(what);
}

static int path_fails(const char *path) {
  return error_of[2] && path && strncmp(path, prefix, strlen(prefix)) == 0 && fails(2);
}

ssize_t write(int fd, const void *data, size_t size) { return file_fails(fd, 0) ? -1 : NEXT(write)(fd, data, size); }
ssize_t pwrite(int fd, const void *data, size_t size, off_t at) { return file_fails(fd, 0) ? -1 : NEXT(pwrite)(fd, data, size, at); }
ssize_t pwrite64(int fd, const void *data, size_t size, off_t at) { return file_fails(fd, 0) ? -1 : NEXT(pwrite64)(fd, data, size, at); }
ssize_t writev(int fd, const struct iovec *parts, int count) { return file_fails(fd, 0) ? -1 : NEXT(writev)(fd, parts, count); }
int fsync(int fd) { return file_fails(fd, 0) ? -1 : NEXT(fsync)(fd); }
ssize_t read(int fd, void *data, size_t size) { return file_fails(fd, 1) ? -1 : NEXT(read)(fd, data, size); }
ssize_t pread(int fd, void *data, size_t size, off_t at) { return file_fails(fd, 1) ? -1 : NEXT(pread)(fd, data, size, at); }
ssize_t pread64(int fd, void *data, size_t size, off_t at) { return file_fails(fd, 1) ? -1 : NEXT(pread64)(fd, data, size, at); }
int mkdir(const char *path, mode_t mode) { return path_fails(path) ? -1 : NEXT(mkdir)(path, mode); }
int rename(const char *from, const char *to) { return path_fails(to) ? -1 : NEXT(rename)(from, to); }

#define OPEN(name)                                              \
  int name(const char *path, int flags, ...) {                  \
    va_list list;                                               \
    va_start(list, flags);                                      \
    mode_t mode = va_arg(list, int);                            \
    va_end(list);                                               \
    if (flags & (O_WRONLY | O_RDWR | O_CREAT) && path_fails(path)) return -1; \
    return NEXT(name)(path, flags, mode);                       \
  }
OPEN(open)
OPEN(open64)

static double wrong(void) { return jump != 0 && atomic_fetch_sub(&before_jump, 1) <= 0 ? jump : 0; }

int clock_gettime(clockid_t clock, struct timespec *now) {
  int result = NEXT(clock_gettime)(clock, now);
  if (clock == CLOCK_REALTIME) now->tv_sec += (time_t)wrong();
  return result;
}
int gettimeofday(struct timeval *restrict now, void *restrict zone) {
  int result = NEXT(gettimeofday)(now, zone);
  now->tv_sec += (time_t)wrong();
  return result;
}
/* A wait until a reading of the wrong clock ends when the right clock would say so, as if the kernel's jumped as well.
   Without this a library that waits (absl does, for TensorStore) would spin, or sleep for the length of the jump. */
long syscall(long number, ...) {
  long a[6];
  va_list list;
  va_start(list, number);
  for (int i = 0; i < 6; i++) a[i] = va_arg(list, long);
  va_end(list);
  struct timespec until;
  if (number == SYS_futex && (a[1] & FUTEX_CLOCK_REALTIME) && a[3] && jump != 0 && atomic_load(&before_jump) <= 0) {
    until = *(const struct timespec *)a[3];
    until.tv_sec -= (time_t)jump;
    if (until.tv_sec < 0) until.tv_sec = 0; /* the kernel takes no time before 1970 */
    a[3] = (long)&until;
  }
  return NEXT(syscall)(number, a[0], a[1], a[2], a[3], a[4], a[5]);
}
time_t time(time_t *now) {
  time_t found = NEXT(time)(NULL) + (time_t)wrong();
  if (now) *now = found;
  return found;
}
