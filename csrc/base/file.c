#define _GNU_SOURCE
#include "file.h"

#include <errno.h>
#include <sys/uio.h>
#include <unistd.h>

static int64_t fault_countdown;
static int fault_errno;

int64_t lco_file_fail_at(int64_t n, int code)
{
    __atomic_store_n(&fault_errno, code, __ATOMIC_RELAXED);
    return __atomic_exchange_n(&fault_countdown, n, __ATOMIC_RELAXED);
}

static bool fault_fires(void)
{
    if (__atomic_load_n(&fault_countdown, __ATOMIC_RELAXED) <= 0 || __atomic_sub_fetch(&fault_countdown, 1, __ATOMIC_RELAXED) != 0)
        return false;
    errno = __atomic_load_n(&fault_errno, __ATOMIC_RELAXED);
    return true;
}

bool lco_file_read(int file, void *to, size_t bytes, size_t at)
{
    if (fault_fires())
        return false;
    for (size_t done = 0; done < bytes;) {
        const ssize_t n = pread(file, (char *)to + done, bytes - done, (off_t)(at + done));
        if (n < 0 && errno == EINTR)
            continue;
        if (n == 0)
            errno = ENODATA;
        if (n <= 0)
            return false;
        done += (size_t)n;
    }
    return true;
}

bool lco_file_write(int file, const void *from, size_t bytes, size_t at)
{
    if (fault_fires())
        return false;
    for (size_t done = 0; done < bytes;) {
        const ssize_t n = pwrite(file, (const char *)from + done, bytes - done, (off_t)(at + done));
        if (n < 0 && errno == EINTR)
            continue;
        if (n == 0)
            errno = ENOSPC;
        if (n <= 0)
            return false;
        done += (size_t)n;
    }
    return true;
}

size_t lco_file_read_now(int file, void *to, size_t bytes, size_t at)
{
    if (__atomic_load_n(&fault_countdown, __ATOMIC_RELAXED) > 0)
        return 0; /* faults are lco_file_read's */
    const ssize_t n = preadv2(file, &(struct iovec){.iov_base = to, .iov_len = bytes}, 1, (off_t)at, RWF_NOWAIT);
    return n > 0 ? (size_t)n : 0;
}
