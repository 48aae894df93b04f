/* Makes calls fail on files below a folder, for the process that preloads it.
   HOSTILE_FOLDER: the folder. HOSTILE_CALL: open (for writing), write or flock. HOSTILE_ERRNO: the number of the error.
   HOSTILE_FIRST, HOSTILE_COUNT: the first call that fails, from 1, and how many fail from there on. */
#define _GNU_SOURCE
#include <dlfcn.h>
#include <errno.h>
#include <fcntl.h>
#include <limits.h>
#include <stdarg.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/types.h>
#include <unistd.h>

static long calls = 0;

static int fails(const char *call, const char *path) {
    const char *folder = getenv("HOSTILE_FOLDER"), *wanted = getenv("HOSTILE_CALL");
    if (!folder || !wanted || strcmp(call, wanted) || strncmp(path, folder, strlen(folder))) return 0;
    long first = atol(getenv("HOSTILE_FIRST")), count = atol(getenv("HOSTILE_COUNT"));
    long now = __sync_add_and_fetch(&calls, 1);
    if (now < first || now >= first + count) return 0;
    errno = atoi(getenv("HOSTILE_ERRNO"));
    return 1;
}

static int call_fails(const char *call, int file) {
    char link[64], path[PATH_MAX + 1];
    snprintf(link, sizeof link, "/proc/self/fd/%d", file);
    ssize_t size = readlink(link, path, PATH_MAX);
    if (size < 0) return 0;
    path[size] = 0;
    return fails(call, path);
}

int flock(int file, int operation) {
    static int (*real)(int, int);
    if (!real) real = dlsym(RTLD_NEXT, "flock");
    return call_fails("flock", file) ? -1 : real(file, operation);
}

ssize_t write(int file, const void *data, size_t size) {
    static ssize_t (*real)(int, const void *, size_t);
    if (!real) real = dlsym(RTLD_NEXT, "write");
    return call_fails("write", file) ? -1 : real(file, data, size);
}

ssize_t pwrite64(int file, const void *data, size_t size, off64_t place) {
    static ssize_t (*real)(int, const void *, size_t, off64_t);
    if (!real) real = dlsym(RTLD_NEXT, "pwrite64");
    return call_fails("write", file) ? -1 : real(file, data, size, place);
}

#define OPEN(name)                                                                                                     \
    int name(const char *path, int flags, ...) {                                                                       \
        static int (*real)(const char *, int, ...);                                                                    \
        if (!real) real = dlsym(RTLD_NEXT, #name);                                                                     \
        va_list more;                                                                                                  \
        va_start(more, flags);                                                                                         \
        mode_t mode = (flags & (O_CREAT | O_TMPFILE)) ? va_arg(more, mode_t) : 0;                                      \
        va_end(more);                                                                                                  \
        if ((flags & (O_WRONLY | O_RDWR)) && fails("open", path)) return -1;                                           \
        return real(path, flags, mode);                                                                                \
    }
OPEN(open)
OPEN(open64)
