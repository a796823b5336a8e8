/* Pages in memory and pages away: a bounded number of pages in memory, the others in a file. For the files of this folder.
 *
 * A page that a sequence holds is
 *   blank   no row of it was ever to be written: it takes no memory
 *   hot     in memory, at its own address
 *   away    in the file, at page * page_bytes, and not in memory
 * lco_tier_open() makes blank and away pages hot before rows go to them. Everything else is read where it lies: lco_kv_read() fetches the slice that
 * attention asks for into a few buffers of the thread. Explicit reads and writes, never a mapped file: a full disk or a file cut short is
 * an error value, not a signal.
 *
 * A device's memory would be one more such step: pages hot on the device, away in host memory, and beyond that in the file. */
#ifndef LCO_KV_TIER_H
#define LCO_KV_TIER_H

#include "internal.h"

typedef struct {
    uint8_t *bytes; /* a slice */
    int64_t page, head, heads;
    size_t slice_offset; /* which layer */
    int64_t step;        /* of lco_kv_begin_step(): what was fetched before it may have changed */
} fetched;

/* Of one thread: what it fetched last, in turn. */
typedef struct {
    fetched slot[LCO_KV_FETCHED];
    int64_t next, advised_page;
    size_t advised_offset;
} reader;

enum { MOST_READERS = 1024 };

struct lco_tier {
    lco_kv *kv;
    lco_kv_store store;
    int64_t most_hot, hot; /* pages */
    bool *flags;           /* the memory of these, [n_pages] each */
    bool *is_hot, *away;
    bool *copied; /* the file has the page as it is */
    bool *cut;    /* it had: somebody else made the file shorter */
    bool *lost;   /* a read of this step failed */
    size_t end;   /* bytes that the file should have */
    char *path;
    int file;
    bool named;
    int64_t step;
    int64_t n_away, n_lost;
    int lost_errno;
    reader *readers[MOST_READERS];
    size_t largest_slice;
    uint8_t *zeros; /* a slice */
    /* Threads count for themselves by atomic additions. */
    int64_t spilled, restored, fetches, bytes_fetched, issued, used;
};

lco_status lco_tier_create(lco_kv *kv, lco_error *err); /* kv->tier; nothing when the options ask for none */
void lco_tier_destroy(lco_kv *kv);
void lco_tier_reset_counters(lco_kv *kv);

/* Makes page `page` hot: `fill` when what it held must be there again. Sends others away for it. */
lco_status lco_tier_open(lco_kv *kv, int32_t page, bool fill, lco_error *err);
void lco_tier_forget(lco_kv *kv, int32_t page);                                         /* the page is free */
lco_status lco_tier_page_out(lco_kv *kv, int32_t page, uint8_t *bytes, lco_error *err); /* its bytes, wherever it lies */
lco_status lco_tier_settle(lco_kv *kv, int32_t page, lco_error *err); /* a new page, at its address: stays if there is room, or goes away */
void lco_tier_dirty(lco_kv *kv, int32_t page);                        /* rows go to it: the file's copy is stale */
void lco_tier_recall(lco_seq *seq);                                   /* pages come back, newest first, while there is room */
bool lco_tier_sound(const lco_kv *kv, int64_t *page);                 /* for lco_kv_check */

#endif
