/* How the core reports failure: every function that can fail returns lco_status and writes one sentence into the caller's lco_error.
 * There is no global error state. The sentence says what was found, what was expected and where. */
#ifndef LCO_BASE_STATUS_H
#define LCO_BASE_STATUS_H

typedef enum {
    LCO_OK = 0,
    LCO_EINVAL,       /* an argument is wrong */
    LCO_ENOMEM,       /* memory could not be had */
    LCO_EFORMAT,      /* a file or tensor does not hold what it should */
    LCO_EPAGES,       /* the cache has no free page */
    LCO_ENUMERIC,     /* NaN or infinity where a number must be */
    LCO_EFORK,        /* a handle made before fork() is used after it */
    LCO_EIO,          /* a file could not be read or written */
    LCO_EUNSUPPORTED, /* known, but not implemented or not on this machine */
} lco_status;

typedef struct {
    lco_status code;
    char text[480];
} lco_error;

/* Writes the message and returns `code`, so that `return lco_fail(err, LCO_EINVAL, ...)` reads as one step. `err` may be NULL. */
lco_status lco_fail(lco_error *err, lco_status code, const char *format, ...) __attribute__((format(printf, 3, 4)));

#endif
