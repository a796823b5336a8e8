/* Whole reads and writes of an open file, and a hook that makes the N-th of them fail (for fault tests). */
#ifndef LCO_BASE_FILE_H
#define LCO_BASE_FILE_H

#include <stdbool.h>
#include <stddef.h>
#include <stdint.h>

/* All bytes, or false with errno; a file that ends too early is ENODATA. */
bool lco_file_read(int file, void *to, size_t bytes, size_t at);
bool lco_file_write(int file, const void *from, size_t bytes, size_t at);

/* As many of the bytes as can be had without waiting for a disk: 0 when that is not known. */
size_t lco_file_read_now(int file, void *to, size_t bytes, size_t at);

/* The n-th of these calls from now on fails with `code`, an errno. 0: off. Returns how many were still to go. */
int64_t lco_file_fail_at(int64_t n, int code);

#endif
