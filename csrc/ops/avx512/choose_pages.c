#include "../simd/choose_pages.h"

lco_status lco_avx512_choose_pages(const lco_choose_pages_args *args) { return choose_pages(args); }
