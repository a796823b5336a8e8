#define _GNU_SOURCE
#include "tier.h"

#include <assert.h>
#include <errno.h>
#include <fcntl.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/mman.h>
#include <sys/stat.h>
#include <unistd.h>

#include "../base/file.h"
#include "../base/mem.h"
#include "prefix.h"

static const char *why(int code) { return code == ENODATA ? "the file ends before it" : strerror(code); }

/* ---- the file ---- */

static bool is_folder(const char *path)
{
    struct stat s;
    return stat(path, &s) == 0 && S_ISDIR(s.st_mode);
}

/* In a folder: a file without a name, so that nothing can be left behind. */
static int open_in(const char *folder, char *path, size_t room)
{
    int file = open(folder, O_TMPFILE | O_RDWR | O_CLOEXEC, 0600);
    if (file >= 0 || (errno != EOPNOTSUPP && errno != EISDIR && errno != ENOENT))
        return file;
    snprintf(path, room, "%s/llmcoopt-XXXXXX", folder);
    file = mkostemp(path, O_CLOEXEC);
    if (file >= 0)
        unlink(path);
    return file;
}

static lco_status open_file(lco_tier *tier, const char *path, lco_error *err)
{
    const size_t room = strlen(path) + 32;
    tier->path = lco_alloc(room);
    if (tier->path == NULL)
        return lco_fail(err, LCO_ENOMEM, "out of memory for the name of the spill file");
    tier->named = !is_folder(path);
    tier->file = tier->named ? open(path, O_RDWR | O_CREAT | O_EXCL | O_CLOEXEC, 0600) : open_in(path, tier->path, room);
    const int code = errno;
    snprintf(tier->path, room, "%s", path);
    if (tier->file >= 0)
        return LCO_OK;
    tier->named = false;
    return lco_fail(err, LCO_EIO, "spill_path = '%s': %s%s", path, strerror(code),
                    code == EEXIST ? "; expected a folder, or the name of a file that is not there yet" : "");
}

/* ---- pages ---- */

static uint8_t *address(const lco_kv *kv, int64_t page) { return kv->base + (size_t)page * kv->page_bytes; }

static size_t place(const lco_kv *kv, int64_t page) { return (size_t)page * kv->page_bytes; }

/* A file that somebody cut grows again with the next write, zeros in between: pages that lay there are marked before. */
static void look_for_cut(lco_tier *tier)
{
    struct stat s;
    if (fstat(tier->file, &s) != 0 || (size_t)s.st_size >= tier->end)
        return;
    tier->end = (size_t)s.st_size;
    for (int64_t page = 0; page < tier->kv->n_touched; page++) {
        if (tier->copied[page] && place(tier->kv, page + 1) > tier->end) {
            tier->cut[page] = tier->away[page];
            tier->copied[page] = tier->away[page];
        }
    }
}

/* As lco_file_read, of a page's bytes from `offset` on. */
static bool read_page(const lco_tier *tier, int64_t page, uint8_t *to, size_t bytes, size_t offset)
{
    errno = ENODATA;
    return !tier->cut[page] && lco_file_read(tier->file, to, bytes, place(tier->kv, page) + offset);
}

static lco_status spill(lco_tier *tier, int32_t page, lco_error *err)
{
    lco_kv *kv = tier->kv;
    if (!tier->copied[page]) {
        look_for_cut(tier);
        if (!lco_file_write(tier->file, address(kv, page), kv->page_bytes, place(kv, page)))
            return lco_fail(err, LCO_EIO,
                            "page %d could not be written to the spill file '%s': %s; make room there, raise host_bytes or free sequences",
                            page, tier->path, strerror(errno));
        tier->copied[page] = true;
        tier->cut[page] = false;
        tier->end = place(kv, page + 1) > tier->end ? place(kv, page + 1) : tier->end;
    }
    lco_page_unmap(kv, page);
    tier->is_hot[page] = false;
    tier->away[page] = true;
    tier->hot--;
    tier->n_away++;
    tier->spilled++;
    return LCO_OK;
}

/* The oldest page of a sequence that may go. Of a sequence in this step, rows go to the page of its length and those after it: they stay. -1: none. */
static int64_t oldest_hot(const lco_seq *seq)
{
    const lco_tier *tier = seq->kv->tier;
    const int64_t end = seq->last_used == tier->step ? seq->length / seq->kv->options.page_size : seq->n_pages;
    for (int64_t i = 0; i < end && i < seq->n_pages; i++)
        if (seq->table[i] != LCO_NO_PAGE && tier->is_hot[seq->table[i]])
            return i;
    return -1;
}

static int64_t hot_pages(const lco_seq *seq)
{
    int64_t n = 0;
    for (int64_t i = 0; i < seq->n_pages; i++)
        n += seq->table[i] != LCO_NO_PAGE && seq->kv->tier->is_hot[seq->table[i]];
    return n;
}

/* Whose page goes: of sequences unused for longest; of those in use now, one with the most pages in memory. NULL: nobody's. */
static lco_seq *whose_goes(const lco_kv *kv, bool unused_only)
{
    lco_seq *best = NULL;
    int64_t most = 0;
    for (lco_seq *seq = kv->sequences; seq != NULL; seq = seq->next) {
        const bool now = seq->last_used == kv->tier->step;
        if ((now && unused_only) || oldest_hot(seq) < 0)
            continue;
        const int64_t pages = now ? hot_pages(seq) : 0;
        if (best == NULL || seq->last_used < best->last_used || (seq->last_used == best->last_used && pages > most)) {
            best = seq;
            most = pages;
        }
    }
    return best;
}

/* Room for one more hot page. */
static lco_status make_room(lco_tier *tier, bool unused_only, lco_error *err)
{
    while (tier->hot >= tier->most_hot) {
        const int32_t idle = lco_prefix_idle_hot(tier->kv);
        lco_seq *seq = idle < 0 ? whose_goes(tier->kv, unused_only) : NULL;
        if (idle < 0 && seq == NULL)
            return lco_fail(
                err, LCO_EPAGES,
                "memory for pages is full: %lld pages of %zu bytes are in use by this step, host_bytes allows %lld; raise host_bytes "
                "or run fewer sequences at once",
                (long long)tier->hot, tier->kv->page_bytes, (long long)tier->most_hot);
        lco_status status = spill(tier, idle >= 0 ? idle : seq->table[oldest_hot(seq)], err);
        if (status != LCO_OK)
            return status;
    }
    return LCO_OK;
}

static void make_hot(lco_tier *tier, int32_t page)
{
    tier->n_away -= tier->away[page];
    tier->away[page] = false;
    tier->is_hot[page] = true;
    tier->hot++;
}

static lco_status unreadable(const lco_tier *tier, int32_t page, int code, lco_error *err)
{
    return lco_fail(err, LCO_EIO, "page %d could not be read from the spill file '%s': %s; free the sequence and compute it again", page,
                    tier->path, why(code));
}

lco_status lco_tier_open(lco_kv *kv, int32_t page, bool fill, lco_error *err)
{
    lco_tier *tier = kv->tier;
    if (tier == NULL || tier->is_hot[page])
        return LCO_OK;
    lco_status status = make_room(tier, false, err);
    if (status != LCO_OK)
        return status;
    if (tier->away[page] && fill) {
        if (!read_page(tier, page, address(kv, page), kv->page_bytes, 0)) {
            const int code = errno;
            lco_page_unmap(kv, page);
            return unreadable(tier, page, code, err);
        }
        tier->restored++;
    }
    make_hot(tier, page);
    return LCO_OK;
}

lco_status lco_tier_settle(lco_kv *kv, int32_t page, lco_error *err)
{
    lco_tier *tier = kv->tier;
    if (tier == NULL)
        return LCO_OK;
    make_hot(tier, page);
    return tier->hot > tier->most_hot ? spill(tier, page, err) : LCO_OK;
}

void lco_tier_dirty(lco_kv *kv, int32_t page)
{
    if (kv->tier != NULL)
        kv->tier->copied[page] = false;
}

void lco_tier_forget(lco_kv *kv, int32_t page)
{
    lco_tier *tier = kv->tier;
    if (tier == NULL)
        return;
    if (tier->copied[page])
        (void)fallocate(tier->file, FALLOC_FL_PUNCH_HOLE | FALLOC_FL_KEEP_SIZE, (off_t)place(kv, page), (off_t)kv->page_bytes);
    tier->hot -= tier->is_hot[page];
    tier->n_away -= tier->away[page];
    tier->is_hot[page] = tier->away[page] = tier->copied[page] = tier->cut[page] = false;
}

lco_status lco_tier_page_out(lco_kv *kv, int32_t page, uint8_t *bytes, lco_error *err)
{
    if (kv->tier == NULL || !kv->tier->away[page])
        memcpy(bytes, address(kv, page), kv->page_bytes);
    else if (!read_page(kv->tier, page, bytes, kv->page_bytes, 0))
        return unreadable(kv->tier, page, errno, err);
    return LCO_OK;
}

void lco_tier_recall(lco_seq *seq)
{
    lco_tier *tier = seq->kv->tier;
    if (tier == NULL || tier->n_away == 0)
        return;
    for (int64_t i = seq->n_pages - 1; i >= 0; i--) {
        const int32_t page = seq->table[i];
        if (page == LCO_NO_PAGE || !tier->away[page])
            continue;
        if (make_room(tier, true, NULL) != LCO_OK)
            return;
        if (!read_page(tier, page, address(seq->kv, page), seq->kv->page_bytes, 0)) {
            lco_page_unmap(seq->kv, page); /* what came of it; who reads the page is told */
            return;
        }
        make_hot(tier, page);
        tier->restored++;
    }
}

bool lco_tier_sound(const lco_kv *kv, int64_t *page)
{
    const lco_tier *tier = kv->tier;
    int64_t hot = 0, away = 0;
    for (*page = 0; tier != NULL && *page < kv->n_touched; ++*page) {
        const bool held = kv->refs[*page] > 0, is_hot = tier->is_hot[*page], is_away = tier->away[*page];
        hot += is_hot;
        away += is_away;
        if ((is_hot && is_away) || (!held && (is_hot || is_away || tier->copied[*page])) || (is_away && !tier->copied[*page]))
            return false;
    }
    *page = -1;
    return tier == NULL || (hot == tier->hot && away == tier->n_away && hot <= tier->most_hot);
}

/* ---- reading ---- */

static reader *reader_of(lco_tier *tier, int thread)
{
    if (thread >= MOST_READERS)
        return NULL;
    if (tier->readers[thread] == NULL && (tier->readers[thread] = lco_calloc(1, sizeof(reader))) != NULL)
        tier->readers[thread]->advised_page = -1;
    return tier->readers[thread];
}

/* Tells the system what is read next. */
static void advise(lco_tier *tier, reader *r, const lco_kv_view *view, int64_t page)
{
    if (page < 0 || !tier->away[page] || (r->advised_page == page && r->advised_offset == view->slice_offset))
        return;
    size_t bytes = 0;
    (void)lco_kv_slice_bytes(view, &bytes);
    posix_fadvise(tier->file, (off_t)(place(tier->kv, page) + view->slice_offset), (off_t)bytes, POSIX_FADV_WILLNEED);
    r->advised_page = page;
    r->advised_offset = view->slice_offset;
    __atomic_fetch_add(&tier->issued, 1, __ATOMIC_RELAXED);
}

/* A run of a slice. When it has to come from the disk, the system is told what is read next: that comes while this one is waited for. */
static bool read_run(lco_tier *tier, reader *r, const lco_kv_view *view, const fetched *f, size_t at, size_t bytes, int64_t next)
{
    const size_t offset = view->slice_offset + at;
    if (!tier->cut[f->page] && lco_file_read_now(tier->file, f->bytes + at, bytes, place(tier->kv, f->page) + offset) == bytes)
        return true;
    advise(tier, r, view, next);
    return read_page(tier, f->page, f->bytes + at, bytes, offset);
}

/* Keys, values and scales of the heads, each a run; everything when all heads are asked. */
static bool read_heads(lco_tier *tier, reader *r, const lco_kv_view *view, const fetched *f, size_t slice_bytes, int64_t next)
{
    if (f->heads == view->n_kv_heads)
        return read_run(tier, r, view, f, 0, slice_bytes, next);
    const size_t run = lco_kv_run_bytes(view) * (size_t)f->heads, scales = lco_scales_offset(view, 0, 0);
    return read_run(tier, r, view, f, lco_codes_offset(view, LCO_KEY, f->head), run, next) &&
           read_run(tier, r, view, f, lco_codes_offset(view, LCO_VALUE, f->head), run, next) &&
           (!lco_dtype_scaled(view->dtype) || read_run(tier, r, view, f, scales, slice_bytes - scales, next));
}

static void note_lost(lco_tier *tier, int64_t page, int code)
{
    __atomic_store_n(&tier->lost[page], true, __ATOMIC_RELAXED);
    __atomic_store_n(&tier->lost_errno, code, __ATOMIC_RELAXED);
    __atomic_fetch_add(&tier->n_lost, 1, __ATOMIC_RELEASE);
}

static const uint8_t *fetch(void *ctx, const lco_kv_view *view, int thread, int64_t page, int64_t next, int64_t head, int64_t heads)
{
    lco_tier *tier = ctx;
    reader *r = reader_of(tier, thread);
    if (r == NULL) {
        note_lost(tier, page, ENOMEM);
        return tier->zeros;
    }
    for (int i = 0; i < LCO_KV_FETCHED; i++) {
        const fetched *f = &r->slot[i];
        if (f->bytes != NULL && f->step == tier->step && f->page == page && f->slice_offset == view->slice_offset && f->head <= head &&
            head + heads <= f->head + f->heads)
            return f->bytes;
    }
    fetched *f = &r->slot[r->next];
    if (f->bytes == NULL && (f->bytes = lco_calloc(1, tier->largest_slice)) == NULL) {
        note_lost(tier, page, ENOMEM);
        return tier->zeros;
    }
    r->next = (r->next + 1) % LCO_KV_FETCHED;
    size_t bytes = 0;
    (void)lco_kv_slice_bytes(view, &bytes);
    *f = (fetched){.bytes = f->bytes, .page = page, .head = head, .heads = heads, .slice_offset = view->slice_offset, .step = tier->step};
    if (!read_heads(tier, r, view, f, bytes, next)) {
        note_lost(tier, page, errno);
        memset(f->bytes, 0, bytes);
    }
    __atomic_fetch_add(&tier->fetches, 1, __ATOMIC_RELAXED);
    __atomic_fetch_add(&tier->bytes_fetched, (int64_t)(bytes / (size_t)view->n_kv_heads * (size_t)heads), __ATOMIC_RELAXED);
    if (r->advised_page == page && r->advised_offset == view->slice_offset)
        __atomic_fetch_add(&tier->used, 1, __ATOMIC_RELAXED);
    return f->bytes;
}

/* ---- a step ---- */

int64_t lco_kv_step_tokens(const lco_kv *kv)
{
    const bool bounded = kv->tier != NULL && kv->tier->most_hot < kv->n_pages;
    const int64_t page_size = kv->options.page_size, hot = bounded ? (kv->tier->most_hot - 2) * page_size : INT64_MAX;
    if (kv->sight.window == 0)
        return hot;
    /* As many as leave room for the window of a sequence that fills the pool alone. */
    const int64_t rest = (kv->n_pages - lco_kv_most_pages(kv, INT64_MAX / 2, INT64_MAX / 2, 0)) * page_size;
    return hot < rest ? hot : rest > page_size ? rest : page_size;
}

void lco_kv_begin_step(lco_kv *kv)
{
    lco_tier *tier = kv->tier;
    kv->step_mass = 0;
    if (tier == NULL)
        return;
    tier->step++;
    if (tier->n_away > 0)
        look_for_cut(tier);
    if (tier->n_lost > 0)
        memset(tier->lost, 0, (size_t)kv->n_touched * sizeof *tier->lost);
    tier->n_lost = 0;
}

lco_status lco_seq_lost(const lco_seq *seq, lco_error *err)
{
    const lco_tier *tier = seq->kv->tier;
    if (tier == NULL || tier->n_lost == 0)
        return LCO_OK;
    const int32_t page_size = seq->kv->options.page_size;
    for (int64_t i = 0; i < seq->n_pages; i++)
        if (seq->table[i] != LCO_NO_PAGE && tier->lost[seq->table[i]])
            return lco_fail(
                err, tier->lost_errno == ENOMEM ? LCO_ENOMEM : LCO_EIO,
                "tokens %lld to %lld of a sequence (page %d) could not be read from the spill file '%s': %s; free the sequence, or "
                "truncate it before them, and compute it again",
                (long long)i * page_size, (long long)(i + 1) * page_size - 1, seq->table[i], tier->path, why(tier->lost_errno));
    return LCO_OK;
}

lco_status lco_tier_create(lco_kv *kv, lco_error *err)
{
    const lco_kv_options *o = &kv->options;
    const size_t n = (size_t)kv->n_pages;
    if (o->spill_path == NULL)
        return LCO_OK;
    lco_tier *tier = kv->tier = lco_calloc(1, sizeof *tier);
    if (tier == NULL)
        return lco_fail(err, LCO_ENOMEM, "out of memory for the spill file");
    tier->kv = kv;
    tier->file = -1;
    tier->most_hot = o->host_bytes / (int64_t)kv->page_bytes;
    for (int32_t i = 0; i < o->n_layers; i++) {
        size_t bytes = 0;
        (void)lco_kv_slice_bytes(&kv->views[i], &bytes);
        tier->largest_slice = bytes > tier->largest_slice ? bytes : tier->largest_slice;
    }
    tier->zeros = lco_calloc(1, tier->largest_slice);
    tier->flags =
        mmap(NULL, 5 * n, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0); /* zeros, touched as pages are */
    if (tier->flags == MAP_FAILED)
        tier->flags = NULL;
    if (tier->zeros == NULL || tier->flags == NULL)
        return lco_fail(err, LCO_ENOMEM, "out of memory for the states of %lld pages", (long long)kv->n_pages);
    tier->is_hot = tier->flags;
    tier->away = tier->flags + n;
    tier->copied = tier->flags + 2 * n;
    tier->cut = tier->flags + 3 * n;
    tier->lost = tier->flags + 4 * n;
    tier->store = (lco_kv_store){.away = tier->away, .fetch = fetch, .ctx = tier};
    for (int32_t i = 0; i < o->n_layers; i++)
        kv->views[i].store = &tier->store;
    return open_file(tier, o->spill_path, err);
}

void lco_tier_reset_counters(lco_kv *kv)
{
    lco_tier *t = kv->tier;
    if (t != NULL)
        t->spilled = t->restored = t->fetches = t->bytes_fetched = t->issued = t->used = 0;
}

void lco_tier_destroy(lco_kv *kv)
{
    lco_tier *tier = kv->tier;
    if (tier == NULL)
        return;
    if (tier->file >= 0)
        close(tier->file);
    if (tier->named)
        unlink(tier->path);
    for (int i = 0; i < MOST_READERS; i++) {
        for (int j = 0; tier->readers[i] != NULL && j < LCO_KV_FETCHED; j++)
            lco_free(tier->readers[i]->slot[j].bytes);
        lco_free(tier->readers[i]);
    }
    if (tier->flags != NULL)
        munmap(tier->flags, 5 * (size_t)kv->n_pages);
    lco_free(tier->zeros);
    lco_free(tier->path);
    lco_free(tier);
    kv->tier = NULL;
}
