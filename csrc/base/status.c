#include "status.h"

#include <stdarg.h>
#include <stddef.h>
#include <stdio.h>

lco_status lco_fail(lco_error *err, lco_status code, const char *format, ...)
{
    if (err != NULL) {
        va_list args;
        va_start(args, format);
        vsnprintf(err->text, sizeof err->text, format, args);
        va_end(args);
        err->code = code;
    }
    return code;
}
