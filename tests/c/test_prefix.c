/* The prefix index: what is found again, what is told apart, and which page goes first. */
#include <stdlib.h>

#include "../../csrc/kv/prefix.h"
#include "harness.h"

enum { PAGE = 16, MOST_PAGES = 8, SYMBOLS = 3 };

static lco_kv *make(int64_t pages, bool index)
{
    lco_kv *kv = NULL;
    lco_kv_options options = {.n_layers = 1, .n_kv_heads = 1, .head_dim = 2, .dtype = LCO_F32, .page_size = PAGE, .prefix_index = index};
    options.max_tokens = pages * PAGE;
    CHECK_OK(lco_kv_create(&options, &kv, &check_err));
    return kv;
}

/* A text of whole pages, one letter each: page "b" has the same ids wherever it stands. One token follows, for a prompt leaves one to compute. */
typedef struct {
    int32_t ids[MOST_PAGES * PAGE + 1];
    int64_t n;
} text;

static text spell(const char *letters)
{
    text t = {.n = (int64_t)strlen(letters) * PAGE + 1};
    for (int64_t i = 0; i < t.n; i++)
        t.ids[i] = i < t.n - 1 ? letters[i / PAGE] * 100 + (int32_t)(i % PAGE) : 7;
    return t;
}

/* Appends the rest of a text, as rows of a prompt or of single tokens. */
static void compute(lco_seq *seq, const text *t, bool prompt)
{
    const int64_t held = lco_seq_length(seq), n = t->n - held;
    CHECK_OK(lco_seq_reserve(seq, n, &check_err));
    lco_seq_commit(seq, t->ids + held, n, prompt);
}

/* Appends the rest of a prompt and tells the index. */
static void append(lco_seq *seq, const text *t)
{
    compute(seq, t, true);
    lco_seq_publish(seq);
    CHECK_OK(lco_kv_check(lco_seq_cache(seq), &check_err));
}

static lco_seq *adopted(lco_kv *kv, const text *t, int64_t *matched)
{
    lco_seq *seq;
    CHECK_OK(lco_seq_create(kv, &seq, &check_err));
    CHECK_OK(lco_seq_adopt(seq, t->ids, t->n, matched, &check_err));
    CHECK_OK(lco_kv_check(kv, &check_err));
    CHECK(lco_seq_length(seq) == *matched && *matched % PAGE == 0 && *matched < t->n, "%lld of %lld tokens found, %lld held",
          (long long)*matched, (long long)t->n, (long long)lco_seq_length(seq));
    return seq;
}

/* A prompt comes: what is found is taken over, the rest computed. The caller ends it. */
static lco_seq *begin(lco_kv *kv, const char *letters)
{
    int64_t matched;
    const text t = spell(letters);
    lco_seq *seq = adopted(kv, &t, &matched);
    append(seq, &t);
    return seq;
}

static void say(lco_kv *kv, const char *letters) { lco_seq_destroy(begin(kv, letters)); }

/* Pages of the text that the index has. Looking is a use. */
static int64_t found(lco_kv *kv, const char *letters)
{
    int64_t matched;
    const text t = spell(letters);
    lco_seq_destroy(adopted(kv, &t, &matched));
    return matched / PAGE;
}

static int64_t cached(const lco_kv *kv) { return lco_kv_get_stats(kv).pages_cached; }

static void the_longest_beginning_is_found(void)
{
    lco_kv *kv = make(32, true);
    lco_seq *seq = begin(kv, "abcd"), *other;
    CHECK(found(kv, "abcd") == 4 && found(kv, "abcdb") == 4 && found(kv, "abca") == 3 && found(kv, "a") == 1, "beginnings");
    CHECK(found(kv, "b") == 0 && found(kv, "bcd") == 0 && found(kv, "ba") == 0, "the middle of a text is no beginning");
    text t = spell("abcd");
    int64_t matched;
    for (t.n = 1; t.n <= 4 * PAGE + 1; t.n++) { /* shorter prompts; one token is always left to compute */
        other = adopted(kv, &t, &matched);
        CHECK(matched == (t.n - 1) / PAGE * PAGE, "%lld of %lld tokens", (long long)matched, (long long)t.n);
        for (int64_t i = 0; i < matched; i++)
            CHECK(lco_seq_table(other)[i / PAGE] == lco_seq_table(seq)[i / PAGE] && lco_seq_ids(other)[i] == t.ids[i],
                  "another page, or another id at %lld", (long long)i);
        lco_seq_destroy(other);
    }
    t = spell("abcd");
    t.ids[2 * PAGE - 1]++;
    lco_seq_destroy(adopted(kv, &t, &matched));
    CHECK(matched == PAGE, "the last id of a page counts: %lld tokens", (long long)matched);
    CHECK_OK(lco_seq_adopt(seq, t.ids, t.n, &matched, &check_err));
    CHECK(matched == 0 && lco_seq_length(seq) == 4 * PAGE + 1, "a sequence that holds something takes nothing over");
    lco_kv_destroy(kv);
}

/* Ids that were not told, rows that no prompt computes, pages that are not full; a page whose tokens another page stands for. */
static void what_is_not_learnt(void)
{
    lco_kv *kv = make(32, true);
    text t = spell("abc");
    lco_seq *seq, *twin;
    CHECK_OK(lco_seq_create(kv, &seq, &check_err));
    t.ids[PAGE + 3] = -1;
    append(seq, &t);
    CHECK(found(kv, "abc") == 1 && kv->prefix->n_known == 1, "%lld pages known", (long long)kv->prefix->n_known);
    lco_seq_destroy(seq);
    CHECK_OK(lco_seq_create(kv, &seq, &check_err));
    t = spell("xyz");
    t.n = PAGE + 5;
    compute(seq, &t, true);
    t.n = 3 * PAGE;
    compute(seq, &t, false);
    lco_seq_publish(seq);
    CHECK(found(kv, "xyz") == 1 && kv->prefix->n_known == 2, "rows of single tokens");
    lco_seq_destroy(seq);

    CHECK_OK(lco_seq_create(kv, &seq, &check_err));
    CHECK_OK(lco_seq_create(kv, &twin, &check_err));
    t = spell("pq");
    append(seq, &t);
    append(twin, &t); /* computed at the same time */
    CHECK(kv->prefix->n_known == 4, "a text is known once: %lld pages", (long long)kv->prefix->n_known);
    lco_seq_destroy(seq);
    CHECK(found(kv, "pq") == 2, "the page that is known stays");
    lco_kv_destroy(kv);

    kv = make(32, false);
    say(kv, "abc");
    CHECK(found(kv, "abc") == 0 && cached(kv) == 0, "a cache without an index");
    lco_kv_forget_prefixes(kv);
    lco_kv_destroy(kv);
}

/* The same ids stand for different pages at the beginning and after others, and what goes of one root leaves the others. */
static void roots_are_told_apart(void)
{
    lco_kv *kv = make(32, true);
    lco_seq *seq = begin(kv, "aaaa");
    const int32_t *table = lco_seq_table(seq);
    for (int i = 0; i < 4; i++) {
        const prefix_node *node = &kv->prefix->nodes[table[i]];
        CHECK(node->known && node->parent == (i > 0 ? table[i - 1] : -1) && node->children == (i < 3), "page %d of the text", i);
    }
    CHECK(found(kv, "aaaaa") == 4 && found(kv, "aab") == 2, "a text that repeats itself");
    lco_seq_destroy(seq);
    say(kv, "ba");
    CHECK(found(kv, "ab") == 1 && found(kv, "bb") == 1 && found(kv, "baa") == 2, "two roots");
    CHECK(kv->prefix->n_known == 6 && cached(kv) == 6, "%lld pages known", (long long)kv->prefix->n_known);
    for (int i = 0; i < 4; i++) /* "aaaa" is the one longest unused: its first page is the last of its own to go */
        lco_prefix_give_one(kv);
    CHECK(found(kv, "aa") == 0 && found(kv, "ba") == 2, "the other root");
    lco_kv_destroy(kv);
}

/* ---- texts with one hash ---- */

static uint64_t mix(uint64_t hash, uint64_t value)
{
    hash = (hash ^ value) * 0x9E3779B97F4A7C15u;
    return hash ^ (hash >> 29);
}

typedef struct {
    uint64_t hash; /* after all but the last id */
    int32_t ids[2];
} half;

static int by_hash(const void *a, const void *b)
{
    const uint64_t x = ((const half *)a)->hash, y = ((const half *)b)->hash;
    return x < y ? -1 : x > y;
}

/* Two texts of one page that have the same hash. Of 2^19 pairs of ids before the last, about 16 couples lead to hashes that agree in the upper
 * 33 bits; the last id, of 31 bits, makes up for the rest. (Varying one id is not enough: the factor spreads those too well.) */
static void make_equals(text *a, text *b)
{
    enum { TRIES = 1 << 19, FIRST = PAGE - 3 };
    half *halves = malloc(TRIES * sizeof *halves);
    stream s = {.seed = 5};
    *a = *b = spell("a");
    for (int n = 0; n < TRIES; n++) {
        for (int i = 0; i < 2; i++)
            a->ids[FIRST + i] = halves[n].ids[i] = (int32_t)stream_below(&s, INT32_MAX);
        halves[n].hash = mix(0x632BE59BD9B4E019u, 0);
        for (int i = 0; i < PAGE - 1; i++)
            halves[n].hash = mix(halves[n].hash, (uint64_t)(uint32_t)a->ids[i]);
    }
    qsort(halves, TRIES, sizeof *halves, by_hash);
    int n = 1;
    while (n < TRIES && (halves[n].hash ^ halves[n - 1].hash) >> 31 != 0)
        n++;
    CHECK(n < TRIES, "no two agree");
    if (n < TRIES) {
        memcpy(a->ids + FIRST, halves[n - 1].ids, sizeof halves->ids);
        memcpy(b->ids + FIRST, halves[n].ids, sizeof halves->ids);
        a->ids[PAGE - 1] = 0;
        b->ids[PAGE - 1] = (int32_t)(halves[n].hash ^ halves[n - 1].hash);
    }
    free(halves);
}

static void extend(text *t, char letter)
{
    const text next = spell((char[]){letter, 0});
    memcpy(t->ids + t->n - 1, next.ids, (size_t)next.n * sizeof *next.ids);
    t->n += PAGE;
}

/* Two pages with one hash are told apart by their ids; two with one hash and the same ids, which follow those, by what they follow. */
static void equal_hashes_are_compared(void)
{
    lco_kv *kv = make(16, true);
    text a, b;
    int64_t matched;
    lco_seq *one, *other, *seq;
    make_equals(&a, &b);
    extend(&a, 'x');
    extend(&b, 'x');
    CHECK_OK(lco_seq_create(kv, &one, &check_err));
    append(one, &a);
    seq = adopted(kv, &b, &matched);
    CHECK(matched == 0, "%lld tokens of another text with the same hash", (long long)matched);
    lco_seq_destroy(seq);
    CHECK_OK(lco_seq_create(kv, &other, &check_err));
    append(other, &b);
    const int32_t *p = lco_seq_table(one), *q = lco_seq_table(other);
    const prefix_node *nodes = kv->prefix->nodes;
    CHECK(nodes[p[0]].hash == nodes[q[0]].hash && nodes[p[1]].hash == nodes[q[1]].hash, "the search no longer fits the hash of prefix.c");
    CHECK(kv->prefix->n_known == 4, "%lld of 4 pages known", (long long)kv->prefix->n_known);
    for (int i = 0; i < 2; i++) {
        seq = adopted(kv, i == 0 ? &a : &b, &matched);
        CHECK(matched == 2 * PAGE && memcmp(lco_seq_table(seq), i == 0 ? p : q, 2 * sizeof *p) == 0, "text %d: %lld tokens, or other pages",
              i, (long long)matched);
        lco_seq_destroy(seq);
    }
    lco_seq_destroy(one);
    lco_seq_destroy(other);
    lco_prefix_give_one(kv); /* the first's last page; those with its hash stay to be found */
    lco_prefix_give_one(kv);
    CHECK_OK(lco_kv_check(kv, &check_err));
    lco_seq_destroy(adopted(kv, &a, &matched));
    CHECK(matched == 0, "%lld tokens of a text that is gone", (long long)matched);
    lco_seq_destroy(adopted(kv, &b, &matched));
    CHECK(matched == 2 * PAGE, "%lld tokens of the text that stays", (long long)matched);
    lco_kv_destroy(kv);
}

/* ---- which page goes ---- */

static void the_longest_unused_goes_first(void)
{
    lco_kv *kv = make(7, true);
    say(kv, "ab");
    say(kv, "cd");
    say(kv, "ae"); /* uses "a" again */
    CHECK(cached(kv) == 5, "%lld pages cached", (long long)cached(kv));
    static const char *const gone[] = {"ab", "cd", "c", "ae", "a"}, *const left[] = {"a", "c", "a", "a", ""};
    for (int i = 0; i < 5; i++) {
        const int64_t clock = kv->prefix->clock;
        prefix_node *nodes = malloc(7 * sizeof *nodes);
        memcpy(nodes, kv->prefix->nodes, 7 * sizeof *nodes);
        lco_prefix_give_one(kv);
        CHECK_OK(lco_kv_check(kv, &check_err));
        CHECK(cached(kv) == 4 - i, "page %d: %lld cached", i, (long long)cached(kv));
        CHECK(found(kv, gone[i]) == (int64_t)strlen(gone[i]) - 1 && found(kv, left[i]) == (int64_t)strlen(left[i]), "\"%s\" was to go",
              gone[i]);
        for (int page = 0; page < 7; page++) /* looking was no use of it */
            kv->prefix->nodes[page].used = nodes[page].used;
        kv->prefix->clock = clock;
        free(nodes);
    }
    CHECK(kv->prefix->n_known == 0 && lco_kv_get_stats(kv).pages_free == 7, "all gone");
    lco_kv_destroy(kv);
}

/* Pages that a sequence holds stay while others can go; one of them is forgotten, not freed, where it alone keeps an idle parent. */
static void held_pages_stay(void)
{
    lco_kv *kv = make(6, true);
    lco_seq *one, *two;
    const text ab = spell("ab"), abc = spell("abc");
    CHECK_OK(lco_seq_create(kv, &one, &check_err));
    CHECK_OK(lco_seq_create(kv, &two, &check_err));
    CHECK_OK(lco_seq_reserve(one, 2 * PAGE, &check_err));
    lco_seq_commit(one, ab.ids, 2 * PAGE, true);
    CHECK_OK(lco_seq_reserve(two, 3 * PAGE, &check_err));
    lco_seq_commit(two, abc.ids, 3 * PAGE, true);
    lco_seq_publish(one);
    lco_seq_publish(two); /* its "a" and "b" are the first's, its "c" is known */
    const int32_t c = lco_seq_table(two)[2];
    CHECK(lco_prefix_knows(kv, c) && !lco_prefix_knows(kv, lco_seq_table(two)[0]) && cached(kv) == 0, "three pages known, all held");
    lco_seq_destroy(one);
    CHECK(cached(kv) == 2 && lco_kv_get_stats(kv).pages_free == 3, "%lld cached", (long long)cached(kv));
    CHECK_OK(lco_seq_create(kv, &one, &check_err));
    CHECK_OK(lco_seq_reserve(one, 2 * PAGE, &check_err)); /* the free one, and "b" */
    CHECK_OK(lco_kv_check(kv, &check_err));
    CHECK(cached(kv) == 1 && !lco_prefix_knows(kv, c) && lco_seq_length(two) == 3 * PAGE && lco_seq_table(two)[2] == c && kv->refs[c] == 1,
          "%lld cached, \"c\" has count %d", (long long)cached(kv), kv->refs[c]);
    lco_seq_destroy(two);
    CHECK(found(kv, "ab") == 1 && lco_kv_get_stats(kv).pages_free == 4, "\"a\" stays");
    lco_kv_destroy(kv);

    kv = make(6, true);
    one = begin(kv, "ab"); /* older, but held; two pages and an open one */
    say(kv, "cd");
    CHECK_OK(lco_seq_create(kv, &two, &check_err));
    CHECK_OK(lco_seq_reserve(two, 2 * PAGE, &check_err));
    CHECK(found(kv, "ab") == 2 && found(kv, "cd") == 1, "the idle one goes");
    CHECK_OK(lco_seq_reserve(two, 3 * PAGE, &check_err));
    lco_error err;
    CHECK(found(kv, "ab") == 2 && found(kv, "cd") == 0, "and the one before it");
    CHECK_ERROR(lco_seq_reserve(two, 4 * PAGE, &err), LCO_EPAGES, &err, "0 of 6 are free");
    CHECK(found(kv, "ab") == 2, "a refused reserve takes nothing");
    lco_kv_destroy(kv);
}

/* Where memory for pages is bounded: the page to write to the file. */
static void the_longest_unused_in_memory(void)
{
    lco_kv *kv;
    lco_kv_options options = {.n_layers = 1, .n_kv_heads = 1, .head_dim = 2, .dtype = LCO_F32, .page_size = PAGE, .prefix_index = true};
    options.max_tokens = 64 * PAGE;
    options.host_bytes = 6 * 2 * PAGE * 2 * 4;
    options.spill_path = "/tmp";
    CHECK_OK(lco_kv_create(&options, &kv, &check_err));
    CHECK(lco_prefix_idle_hot(kv) == -1, "an empty index");
    lco_seq *seqs[2];
    static const char *const letters[] = {"ab", "cd"};
    for (int i = 0; i < 2; i++) {
        const text t = spell(letters[i]);
        lco_kv_begin_step(kv);
        CHECK_OK(lco_seq_create(kv, &seqs[i], &check_err));
        CHECK_OK(lco_seq_reserve(seqs[i], 2 * PAGE, &check_err));
        CHECK_OK(lco_seq_open(seqs[i], 2 * PAGE, &check_err));
        lco_seq_commit(seqs[i], t.ids, 2 * PAGE, true);
        lco_seq_publish(seqs[i]);
    }
    CHECK(lco_prefix_idle_hot(kv) == -1, "all are held");
    const int32_t a = lco_seq_table(seqs[0])[0], c = lco_seq_table(seqs[1])[0];
    lco_seq_destroy(seqs[1]);
    CHECK(lco_prefix_idle_hot(kv) == c, "\"c\", which is not held");
    lco_seq_destroy(seqs[0]);
    CHECK(lco_prefix_idle_hot(kv) == a, "\"a\", which is older");
    CHECK(found(kv, "ab") == 2 && lco_prefix_idle_hot(kv) == c, "\"a\" was used since");
    lco_kv_destroy(kv);
}

static void forgetting(void)
{
    lco_kv *kv = make(16, true);
    lco_seq *held = begin(kv, "ab");
    say(kv, "abcd");
    say(kv, "x");
    CHECK(cached(kv) == 3, "%lld cached", (long long)cached(kv));
    lco_kv_forget_prefixes(kv);
    CHECK_OK(lco_kv_check(kv, &check_err));
    CHECK(kv->prefix->n_known == 0 && cached(kv) == 0 && lco_kv_get_stats(kv).pages_free == 13, "%lld free",
          (long long)lco_kv_get_stats(kv).pages_free);
    CHECK(found(kv, "ab") == 0 && found(kv, "x") == 0 && lco_seq_length(held) == 2 * PAGE + 1, "nothing is found, what is held stays");
    lco_kv_forget_prefixes(kv);
    text t = spell("abe");
    t.ids[2 * PAGE] = 7; /* the token it holds already */
    append(held, &t);
    CHECK(found(kv, "ab") == 2, "what goes on is learnt again from its beginning: %lld pages", (long long)found(kv, "ab"));
    lco_seq_destroy(held);
    CHECK(cached(kv) == 3 && lco_kv_get_stats(kv).pages_free == 16, "%lld cached", (long long)cached(kv));
    lco_kv_destroy(kv);
}

/* ---- many pages ---- */

static text numbered(int n)
{
    text t = spell("n");
    t.ids[5] = n;
    return t;
}

/* Every page of the pool may be known, all count as free, and all are given up for who needs them. */
static void the_whole_pool(void)
{
    enum { N = 1000 };
    lco_kv *kv = make(N, true);
    int64_t matched, wrong = 0;
    lco_seq *seq;
    for (int round = 0; round < 2; round++)
        for (int i = 0; i < N; i++) {
            const text t = numbered(i);
            lco_error err;
            lco_status status = lco_seq_create(kv, &seq, &err);
            if (status == LCO_OK && round == 0 && (status = lco_seq_reserve(seq, PAGE, &err)) == LCO_OK) {
                lco_seq_commit(seq, t.ids, PAGE, true);
                lco_seq_publish(seq);
            } else if (status == LCO_OK && (status = lco_seq_adopt(seq, t.ids, t.n, &matched, &err)) == LCO_OK) {
                wrong += matched != PAGE;
            }
            wrong += status != LCO_OK;
            lco_seq_destroy(seq);
        }
    CHECK_OK(lco_kv_check(kv, &check_err));
    const lco_kv_stats s = lco_kv_get_stats(kv);
    CHECK(wrong == 0 && s.pages_cached == N && s.pages_free == N && s.pages_shared == 0 && s.tokens_found == N * PAGE,
          "%lld texts are wrong; %lld pages cached, %lld free, %lld tokens found", (long long)wrong, (long long)s.pages_cached,
          (long long)s.pages_free, (long long)s.tokens_found);
    CHECK_OK(lco_seq_create(kv, &seq, &check_err));
    CHECK_OK(lco_seq_reserve(seq, N * PAGE, &check_err));
    CHECK_OK(lco_kv_check(kv, &check_err));
    CHECK(cached(kv) == 0 && kv->prefix->n_known == 0 && lco_kv_get_stats(kv).pages_free == 0, "%lld cached", (long long)cached(kv));
    lco_kv_destroy(kv);
}

/* The index can't grow: it learns no more for now, and nothing else fails. */
static void no_memory_to_grow(void)
{
    lco_kv *kv = make(102, true);
    lco_seq *seqs[100];
    for (int i = 0; i < 100; i++) {
        const text t = numbered(i);
        CHECK_OK(lco_seq_create(kv, &seqs[i], &check_err));
        CHECK_OK(lco_seq_reserve(seqs[i], PAGE, &check_err));
        lco_seq_commit(seqs[i], t.ids, PAGE, true);
    }
    for (int i = 0; i < 100; i++) {
        lco_mem_fail_at(1);
        lco_seq_publish(seqs[i]);
        lco_mem_fail_at(0);
        CHECK_OK(lco_kv_check(kv, &check_err));
        CHECK(kv->prefix->n_known == (i < 32 ? i + 1 : 32), "%lld of %d pages known", (long long)kv->prefix->n_known, i + 1);
    }
    say(kv, "a");
    CHECK(kv->prefix->n_known == 33 && found(kv, "a") == 1 && kv->prefix->n_buckets == 128, "with memory again it goes on");
    lco_kv_destroy(kv);
}

/* A plain model of the index: the tree of all texts of SYMBOLS letters, which of its pages are known and when they were used last. */
enum { DEPTH = 6, TREE = 1093, POOL = 24 }; /* (3^7 - 1) / 2 */

typedef struct {
    bool known[TREE];
    int64_t used[TREE], clock;
    int n;
} tree;

static int child_of(int at, int symbol) { return at * SYMBOLS + symbol + 1; }

static void drop_oldest_leaf(tree *t)
{
    int best = 0;
    for (int at = 1; at < TREE; at++) {
        bool leaf = t->known[at];
        for (int i = 0; i < SYMBOLS && child_of(at, i) < TREE; i++)
            leaf = leaf && !t->known[child_of(at, i)];
        if (leaf && (best == 0 || t->used[at] < t->used[best]))
            best = at;
    }
    t->known[best] = false;
    t->n--;
}

/* A prompt of `n` symbols comes and goes; the result: its pages that were known. */
static int tree_say(tree *t, const char *letters, int n)
{
    int path[DEPTH + 1] = {0}, matched = 0;
    for (int i = 0; i < n; i++)
        path[i + 1] = child_of(path[i], letters[i] - 'a');
    while (matched < n && t->known[path[matched + 1]])
        matched++;
    for (int i = 1; i <= n; i++) /* in use: not to be dropped */
        t->used[path[i]] = ++t->clock;
    for (int needed = n - matched + 1; POOL - t->n < needed;)
        drop_oldest_leaf(t);
    for (int i = matched + 1; i <= n; i++)
        t->known[path[i]] = true;
    t->n += n - matched;
    return matched;
}

static void random_prompts_match_a_plain_model(void)
{
    static tree t;
    lco_kv *kv = make(POOL, true);
    stream s = {.seed = 21};
    int64_t hits = 0;
    for (int step = 0; step < 5000 && harness_failures < 5; step++) {
        char letters[DEPTH + 1] = "";
        int64_t matched;
        const int n = 1 + (int)stream_below(&s, DEPTH);
        for (int i = 0; i < n; i++)
            letters[i] = (char)('a' + stream_below(&s, SYMBOLS));
        if (stream_below(&s, 500) == 0) {
            lco_kv_forget_prefixes(kv);
            memset(t.known, 0, sizeof t.known);
            t.n = 0;
        }
        const text prompt = spell(letters);
        lco_seq *seq = adopted(kv, &prompt, &matched);
        append(seq, &prompt);
        lco_seq_destroy(seq);
        const int expected = tree_say(&t, letters, n);
        CHECK(matched == (int64_t)expected * PAGE && cached(kv) == t.n,
              "step %d, \"%s\": %lld tokens found, %lld pages cached; expected %d, %d", step, letters, (long long)matched,
              (long long)cached(kv), expected * PAGE, t.n);
        hits += expected;
    }
    CHECK(hits > 3000, "%lld pages found: too tame", (long long)hits);
    lco_kv_destroy(kv);
}

int main(int argc, char **argv)
{
    const test_case tests[] = {
        TEST(the_longest_beginning_is_found),
        TEST(what_is_not_learnt),
        TEST(roots_are_told_apart),
        TEST(equal_hashes_are_compared),
        TEST(the_longest_unused_goes_first),
        TEST(held_pages_stay),
        TEST(the_longest_unused_in_memory),
        TEST(forgetting),
        TEST(the_whole_pool),
        TEST(no_memory_to_grow),
        TEST(random_prompts_match_a_plain_model),
    };
    return RUN_ALL(tests, argc, argv);
}
