/*
 * test_problem.c - what sage_attn_check() refuses and in which words; sizes, bands, counts, errors.
 */
#include <setjmp.h>
#include <stdarg.h>
#include <stddef.h>
#include <stdint.h>

#include <cmocka.h>
#include <math.h>
#include <stdio.h>
#include <string.h>

#include "inputs.h"
#include "kernels/kernels.h"
#include "kernels/numerics.h"
#include "kernels/problem.h"
#include "ref64.h"

/* Addresses are made up: nothing here reads a tensor. */
static struct sage_tensor at(uintptr_t address, enum sage_dtype dtype, int64_t a, int64_t b,
                             int64_t c, int64_t d)
{
    return (struct sage_tensor){
        .dtype = dtype,
        .data = (void *)address, /* NOLINT: never followed */
        .shape = {a, b, c, d},
        .stride = {b * c * d, c * d, d, 1},
    };
}

/* 2 batches, 8 query heads on 4 kv heads, 10 queries, 12 keys, D = 64. */
static struct sage_attn base(void)
{
    struct sage_attn a = SAGE_ATTN_INIT;

    a.q = at(0x100000, SAGE_F16, 2, 8, 10, 64);
    a.k = at(0x200000, SAGE_F16, 2, 4, 12, 64);
    a.v = at(0x300000, SAGE_F16, 2, 4, 12, 64);
    a.o = at(0x400000, SAGE_F16, 2, 8, 10, 64);
    return a;
}

static void with_mask(struct sage_attn *a, enum sage_dtype dtype)
{
    a->mask = at(0x500000, dtype, 1, 8, 10, 12);
}

static void with_lse(struct sage_attn *a)
{
    a->lse = at(0x600000, SAGE_F32, 2, 8, 10, 1);
}

static void assert_legal_at(const struct sage_attn *a, int line)
{
    char why[160] = "";
    const int status = sage_attn_check(a, why, sizeof why);

    if (status)
        print_error("line %d: %s: %s\n", line, sage_errname(status), why);
    assert_int_equal(status, 0);
}

static void assert_refused_at(const struct sage_attn *a, int status, const char *text, int line)
{
    char why[160] = "", little[8] = "1234567";

    if (sage_attn_check(a, why, sizeof why) != status || strcmp(why, text))
        print_error("line %d: %s\n", line, why);
    assert_string_equal(why, text);
    assert_int_equal(sage_attn_check(a, why, sizeof why), status);
    /* the text is cut to fit, and may be absent */
    assert_int_equal(sage_attn_check(a, little, sizeof little), status);
    assert_int_equal(strlen(little), sizeof little - 1);
    assert_int_equal(strncmp(little, text, sizeof little - 1), 0);
    assert_int_equal(sage_attn_check(a, NULL, 0), status);
}

#define LEGAL(a) assert_legal_at(&(a), __LINE__)
/* The base problem with `change` made to `a` is refused. */
#define REFUSED(change, status, text)                                                              \
    do {                                                                                           \
        struct sage_attn a = base();                                                               \
        change;                                                                                    \
        assert_refused_at(&a, status, text, __LINE__);                                             \
    } while (0)

static void test_legal(void **state)
{
    (void)state;
    struct sage_attn a = base();

    LEGAL(a);
    with_lse(&a);
    with_mask(&a, SAGE_BOOL);
    LEGAL(a);
    a.causal = true;
    a.window_right = 0;
    a.window_left = INT64_MAX;
    a.diagonal = SAGE_BOTTOM_RIGHT;
    a.variant = SAGE_INT8_FP8;
    a.smooth_v = true;
    a.scale = 1e-3f;
    LEGAL(a);
    a.variant = SAGE_AUTO;
    LEGAL(a);
    assert_int_equal(sage_attn_check(NULL, NULL, 0), SAGE_EINVAL);
}

static void test_empty(void **state)
{
    (void)state;
    struct sage_attn a = base();

    a.q = a.o = at(0, SAGE_F16, 0, 8, 10, 64);
    a.k = a.v = at(0, SAGE_F16, 0, 4, 12, 64);
    LEGAL(a);
    assert_int_equal(sage_attn_groups(&a), 0);
    a = base();
    a.q = a.o = at(0, SAGE_F16, 2, 8, 0, 64);
    LEGAL(a);
    assert_int_equal(sage_attn_groups(&a), 0);
    a = base();
    a.k = a.v = at(0, SAGE_F16, 2, 4, 0, 64);
    LEGAL(a);
    assert_int_equal(sage_attn_groups(&a), 8);
    assert_true(sage_attn_ops(&a, NULL) == 0);
}

static void test_options(void **state)
{
    (void)state;
    REFUSED(a.variant = 3, SAGE_EINVAL,
            "variant: 3, must be 0 (auto), 1 (int8_fp16) or 2 (int8_fp8)");
    REFUSED(a.diagonal = 2, SAGE_EINVAL, "diagonal: 2, must be 0 (top left) or 1 (bottom right)");
    REFUSED(a.scale = -1, SAGE_EINVAL,
            "scale: -1, must be positive and finite, or 0 for 1/sqrt(D)");
    REFUSED(a.scale = INFINITY, SAGE_EINVAL,
            "scale: inf, must be positive and finite, or 0 for 1/sqrt(D)");
    REFUSED(a.scale = (float)fabs((double)NAN), SAGE_EINVAL,
            "scale: nan, must be positive and finite, or 0 for 1/sqrt(D)");
    REFUSED(a.window_left = -2, SAGE_EINVAL,
            "window_left: -2, must be at least 0, or -1 for unlimited");
    REFUSED(a.window_right = INT64_MIN, SAGE_EINVAL,
            "window_right: -9223372036854775808, must be at least 0, or -1 for unlimited");
    REFUSED((a.causal = true, a.window_right = 3), SAGE_EINVAL,
            "window_right: 3, must be 0 or -1 with causal");
    REFUSED((a.smooth_v = true, a.variant = SAGE_INT8_FP16), SAGE_EUNSUPPORTED,
            "smooth_v: only int8_fp8 has it, not int8_fp16");
}

static void test_dtypes(void **state)
{
    (void)state;
    REFUSED(a.q.dtype = SAGE_F32, SAGE_EUNSUPPORTED, "q.dtype: f32, must be f16 or bf16");
    REFUSED(a.q.dtype = SAGE_NONE, SAGE_EUNSUPPORTED, "q.dtype: none, must be f16 or bf16");
    REFUSED(a.k.dtype = SAGE_BF16, SAGE_EUNSUPPORTED, "k.dtype: bf16, must be f16 like q");
    REFUSED(a.v.dtype = SAGE_BOOL, SAGE_EUNSUPPORTED, "v.dtype: bool, must be f16 like q");
    REFUSED(a.o.dtype = 77, SAGE_EUNSUPPORTED, "o.dtype: invalid, must be f16 like q");
    REFUSED((with_lse(&a), a.lse.dtype = SAGE_F16), SAGE_EUNSUPPORTED,
            "lse.dtype: f16, must be f32, or none for no lse");
    REFUSED(a.mask.dtype = 5, SAGE_EINVAL, "mask.dtype: 5, must be f16, bf16, f32, bool or none");
}

static void test_tensors(void **state)
{
    (void)state;
    REFUSED(a.q.shape[2] = -1, SAGE_EINVAL, "q.shape[2]: -1, must not be negative");
    REFUSED(a.k.stride[1] = -64, SAGE_EUNSUPPORTED, "k.stride[1]: -64, must not be negative");
    REFUSED(a.k.stride[3] = 2, SAGE_EUNSUPPORTED, "k.stride[3]: 2, must be 1");
    REFUSED(a.v.stride[0] = INT64_MAX, SAGE_EINVAL, "v: its extent in bytes does not fit 63 bits");
    REFUSED(a.v.stride[0] = INT64_MAX / 2, SAGE_EINVAL,
            "v: its extent in bytes does not fit 63 bits");
    REFUSED(a.o.offset = UINT64_MAX, SAGE_EINVAL,
            "o.offset: 18446744073709551615, the tensor ends beyond 64 bits");
    REFUSED(a.o.offset = UINT64_MAX - 0x400000, SAGE_EINVAL,
            "o.offset: 18446744073705357311, the tensor ends beyond 64 bits");
    REFUSED(a.q.offset = 1, SAGE_EINVAL, "q: its address must be a multiple of 2");
    REFUSED((with_lse(&a), a.lse.offset = 2), SAGE_EINVAL,
            "lse: its address must be a multiple of 4");
    REFUSED(a.v.data = NULL, SAGE_EINVAL, "v.data: NULL");
    struct sage_attn a = base();

    a.v.data = NULL; /* in a buffer of the daemon's it may be */
    a.v.buffer = 7;
    LEGAL(a);
}

static void test_shapes(void **state)
{
    (void)state;
    REFUSED((a.q.shape[3] = 100, a.q.stride[2] = 100), SAGE_EUNSUPPORTED,
            "head dimension 100: must be a multiple of 8 from 8 to 256");
    REFUSED(a.q.shape[3] = 264, SAGE_EUNSUPPORTED,
            "head dimension 264: must be a multiple of 8 from 8 to 256");
    REFUSED(a.q.shape[3] = 0, SAGE_EUNSUPPORTED,
            "head dimension 0: must be a multiple of 8 from 8 to 256");
    REFUSED(a.k.shape[1] = 0, SAGE_EINVAL, "k.shape[1]: 0 heads, must be at least 1");
    REFUSED(a.q.shape[1] = 9, SAGE_EINVAL, "q.shape[1]: 9 heads are no multiple of the 4 of k");
    REFUSED((a.q.shape[0] = 1 << 20, a.q.shape[1] = 1 << 20), SAGE_EUNSUPPORTED,
            "q.shape: batch 1048576 x 1048576 heads, must be at most 2147483647 together");
    REFUSED((a.k.shape[2] = INT64_C(1) << 31, a.k.stride[2] = 0), SAGE_EUNSUPPORTED,
            "k.shape[2]: 2147483648 tokens, must be at most 2147482623");
    REFUSED(a.k.shape[0] = 1, SAGE_EINVAL, "k.shape[0]: 1, must be 2 like q");
    REFUSED(a.k.shape[3] = 32, SAGE_EINVAL, "k.shape[3]: 32, must be 64 like q");
    REFUSED(a.v.shape[2] = 11, SAGE_EINVAL, "v.shape[2]: 11, must be 12 like k");
    REFUSED(a.o.shape[2] = 9, SAGE_EINVAL, "o.shape[2]: 9, must be 10 like q");
    REFUSED((with_lse(&a), a.lse.shape[1] = 4), SAGE_EINVAL, "lse.shape[1]: 4, must be 8");
    REFUSED((with_mask(&a, SAGE_F32), a.mask.shape[2] = 5), SAGE_EINVAL,
            "mask.shape[2]: 5, must be 1 or 10");
    REFUSED((with_mask(&a, SAGE_F32), a.mask.shape[3] = 1), SAGE_EINVAL,
            "mask.shape[3]: 1, must be 12, the keys of k");
}

static void test_sequences(void **state)
{
    static const int32_t q[] = {0, 4, 4, 10}, k[] = {0, 0, 7, 12}, back[] = {0, 5, 4, 10};
    static const int32_t late[] = {1, 4, 4, 10}, early[] = {0, 4, 4, 9};
    struct sage_attn one = base();

    (void)state;
    one.q.shape[0] = one.k.shape[0] = one.v.shape[0] = one.o.shape[0] = 1;
    one.n_seqs = 3;
    one.q_offsets = q;
    one.k_offsets = k;
    LEGAL(one);
    assert_int_equal(sage_attn_groups(&one), 12);
    const struct sage_seq s = sage_attn_seq(&one, 2);

    assert_true(s.batch == 0 && s.q0 == 4 && s.nq == 6 && s.k0 == 7 && s.nk == 5);
    REFUSED(a.n_seqs = -1, SAGE_EUNSUPPORTED, "n_seqs: -1, must be from 0 to 4096");
    REFUSED(a.n_seqs = 4097, SAGE_EUNSUPPORTED, "n_seqs: 4097, must be from 0 to 4096");
    REFUSED(a.n_seqs = 1, SAGE_EINVAL, "q.shape[0]: 2, must be 1 with n_seqs");
    REFUSED((a = one, a.q_offsets = NULL), SAGE_EINVAL, "q_offsets: NULL with 3 sequences");
    REFUSED((a = one, a.k_offsets = late), SAGE_EINVAL, "k_offsets[0]: 1, must be 0");
    REFUSED((a = one, a.q_offsets = back), SAGE_EINVAL,
            "q_offsets[2]: 4, must not be less than the 5 before it");
    REFUSED((a = one, a.q_offsets = early), SAGE_EINVAL,
            "q_offsets[3]: 9, must be 10, the tokens in all");
    REFUSED((a = one, with_mask(&a, SAGE_BOOL)), SAGE_EUNSUPPORTED,
            "mask: not supported together with n_seqs");
}

static void test_overlaps(void **state)
{
    (void)state;
    REFUSED(a.o.data = a.q.data, SAGE_EINVAL, "o: overlaps q");
    REFUSED(a.o.data = (char *)a.v.data + 2 * 4 * 12 * 64 * 2 - 2, SAGE_EINVAL, "o: overlaps v");
    REFUSED((a.o.data = a.k.data, a.o.offset = 2), SAGE_EINVAL, "o: overlaps k");
    REFUSED((with_mask(&a, SAGE_F32), a.o.data = a.mask.data), SAGE_EINVAL, "o: overlaps mask");
    REFUSED((with_lse(&a), a.lse.data = a.o.data), SAGE_EINVAL, "lse: overlaps o");
    REFUSED((with_lse(&a), a.lse.data = a.q.data), SAGE_EINVAL, "lse: overlaps q");
    REFUSED(a.o.stride[2] = 63, SAGE_EINVAL, "o.stride[2]: 63, elements of o overlap");
    REFUSED(a.o.stride[1] = 0, SAGE_EINVAL, "o.stride[1]: 0, elements of o overlap");
    REFUSED((with_lse(&a), a.lse.stride[0] = 79), SAGE_EINVAL,
            "lse.stride[0]: 79, elements of lse overlap");
    struct sage_attn a = base();

    a.o.data = (char *)a.v.data + 2 * 4 * 12 * 64 * 2; /* touches its end */
    LEGAL(a);
    a = base();
    a.o.data = a.q.data; /* same numbers in different buffers */
    a.o.buffer = 1;
    LEGAL(a);
    a = base();
    a.k.stride[0] = a.k.stride[1] = 0; /* inputs may repeat themselves and share memory */
    a.v.data = a.k.data;
    LEGAL(a);
    a.o.shape[0] = a.q.shape[0] = a.k.shape[0] = a.v.shape[0] = 1;
    a.o.stride[0] = INT64_MAX; /* of one element: never used */
    LEGAL(a);
}

/* Slice `i` of a fused [B, N, slices, H, D] allocation of halves. */
static struct sage_tensor slice(int64_t b, int64_t n, int64_t slices, int64_t h, int64_t d, int i)
{
    struct sage_tensor t = at(0x100000, SAGE_F16, b, h, n, d);

    t.offset = (uint64_t)(i * h * d) * 2;
    t.stride[0] = n * slices * h * d;
    t.stride[1] = d;
    t.stride[2] = slices * h * d;
    return t;
}

static void test_interleaved(void **state)
{
    (void)state;
    struct sage_attn a = base();

    a.q = slice(2, 10, 4, 8, 64, 0);
    a.k = slice(2, 10, 4, 8, 64, 1);
    a.v = slice(2, 10, 4, 8, 64, 2);
    a.o = slice(2, 10, 4, 8, 64, 3);
    LEGAL(a);
    a.o.offset -= 2; /* into v's last channel */
    assert_refused_at(&a, SAGE_EINVAL, "o: overlaps v", __LINE__);
    a.o.offset += 4; /* around the corner into q's first */
    assert_refused_at(&a, SAGE_EINVAL, "o: overlaps q", __LINE__);
    /* one head dimension wider than D: o in the second half of each row that q has the first of */
    a = base();
    a.q.stride[2] = a.o.stride[2] = 128;
    a.q.stride[1] = a.o.stride[1] = 1280;
    a.q.stride[0] = a.o.stride[0] = 10240;
    a.o.data = (char *)a.q.data + 128;
    LEGAL(a);
    a.o.data = (char *)a.q.data + 126;
    assert_refused_at(&a, SAGE_EINVAL, "o: overlaps q", __LINE__);
}

/* Do two tensors share a byte? By looking at every byte, for tensors within 4 KiB of 0x10000. */
static bool share(const struct sage_tensor *x, const struct sage_tensor *y)
{
    static char seen[1 << 16];
    const struct sage_tensor *both[] = {x, y};
    bool hit = false;

    memset(seen, 0, sizeof seen);
    for (int i = 0; i < 2; i++)
        for (int64_t e = 0; e < both[i]->shape[0] * both[i]->shape[1] * both[i]->shape[2] * 8;
             e++) {
            const struct sage_tensor *t = both[i];
            const int64_t c = e % 8, n = e / 8 % t->shape[2], h = e / 8 / t->shape[2] % t->shape[1];
            const int64_t b = e / 8 / t->shape[2] / t->shape[1];
            const int64_t byte = (int64_t)((uintptr_t)t->data - 0x10000 + t->offset) +
                                 2 * (b * t->stride[0] + h * t->stride[1] + n * t->stride[2] + c);

            if (i == 0)
                seen[byte] = seen[byte + 1] = 1;
            else
                hit |= seen[byte] || seen[byte + 1];
        }
    return hit;
}

/* Small random layouts against every byte: no overlap is missed, some interleaving is allowed. */
static void test_random_overlaps(void **state)
{
    int allowed = 0, refused = 0;
    struct rng rng;

    (void)state;
    rng_init(&rng, test_seed());
    for (int round = 0; round < 20000; round++) {
        struct sage_attn a = SAGE_ATTN_INIT;
        struct sage_tensor *t[] = {&a.q, &a.o};

        for (int i = 0; i < 2; i++) {
            *t[i] = at(0x10000 + 16 * (uintptr_t)rng_below(&rng, 40), SAGE_F16, 2, 2, 3, 8);
            t[i]->stride[2] = 8 * (1 + rng_below(&rng, 8));
            t[i]->stride[1] = 8 * (1 + rng_below(&rng, 24));
            t[i]->stride[0] = 8 * (1 + rng_below(&rng, 48));
        }
        if (rng_below(&rng, 2))
            memcpy(a.o.stride, a.q.stride, sizeof a.o.stride);
        a.k = a.v = at(0x900000, SAGE_F16, 2, 2, 3, 8);
        if (sage_attn_check(&a, NULL, 0) == 0) {
            assert_false(share(&a.q, &a.o));
            allowed++;
        } else {
            refused++;
        }
    }
    assert_true(allowed > 500 && refused > 500);
}

static int64_t garbage(struct rng *rng)
{
    static const int64_t edges[] = {INT64_MIN, INT64_MAX, -1, 0, 1, 2, 8, 64, INT32_MAX, 1ll << 32};

    return rng_below(rng, 3) ? edges[rng_below(rng, 10)] : (int64_t)rng_bits(rng);
}

/* Any bits in any field: an answer, no crash (run it under sanitizers); what passes has a size. */
static void test_garbage(void **state)
{
    static const int32_t offsets[SAGE_MAX_SEQS + 1];
    struct rng rng;

    (void)state;
    rng_init(&rng, test_seed());
    for (int round = 0; round < 200000; round++) {
        struct sage_attn a = base();
        struct sage_tensor *t[] = {&a.q, &a.k, &a.v, &a.o, &a.mask, &a.lse};
        char why[96] = "";

        with_mask(&a, (enum sage_dtype)rng_below(&rng, 6));
        with_lse(&a);
        for (int64_t n = rng_below(&rng, 6); n >= 0; n--) {
            struct sage_tensor *x = t[rng_below(&rng, 6)];

            x->shape[rng_below(&rng, 4)] = garbage(&rng);
            x->stride[rng_below(&rng, 4)] = garbage(&rng);
            x->offset = rng_below(&rng, 4) ? x->offset : (uint64_t)garbage(&rng);
        }
        a.window_left = rng_below(&rng, 2) ? -1 : garbage(&rng);
        a.window_right = rng_below(&rng, 2) ? -1 : garbage(&rng);
        a.n_seqs = rng_below(&rng, 4) ? 0 : (int32_t)garbage(&rng);
        a.q_offsets = a.k_offsets = offsets;
        const int status = sage_attn_check(&a, why, sizeof why);

        assert_true(status == 0 ||
                    ((status == SAGE_EINVAL || status == SAGE_EUNSUPPORTED) && why[0]));
        if (!status)
            assert_true(sage_attn_ops(&a, NULL) >= 0 && sage_attn_workspace(&a, NULL) > 0);
    }
}

static void test_bytes(void **state)
{
    struct sage_tensor t = at(0, SAGE_F16, 2, 3, 5, 8);
    int64_t bytes;

    (void)state;
    assert_true(sage_tensor_bytes(&t, &bytes) && bytes == 2 * 3 * 5 * 8 * 2);
    t.stride[2] = 16;
    assert_true(sage_tensor_bytes(&t, &bytes) && bytes == 2 * (120 + 80 + 4 * 16 + 8));
    t.shape[1] = 0;
    t.stride[0] = INT64_MAX;
    assert_true(sage_tensor_bytes(&t, &bytes) && bytes == 0);
    t.shape[1] = INT64_MAX;
    assert_false(sage_tensor_bytes(&t, &bytes));
    assert_int_equal(sage_dtype_size(SAGE_F32), 4);
    assert_int_equal(sage_dtype_size(SAGE_BOOL), 1);
    assert_int_equal(sage_dtype_size(SAGE_NONE), 0);
}

/* Bands and operations against counting pair by pair. */
static void test_bands(void **state)
{
    struct rng rng;

    (void)state;
    rng_init(&rng, test_seed());
    for (int round = 0; round < 2000; round++) {
        struct sage_attn a = base();
        const int64_t nq = 1 + rng_below(&rng, 20), nk = rng_below(&rng, 20);
        const struct sage_part part = {
            .group = 1, .n_groups = 1, .row = nq / 3, .n_rows = nq - nq / 3};
        double all = 0, some = 0;

        a.q = a.o = at(0x100000, SAGE_F16, 2, 8, nq, 64);
        a.o.buffer = 1;
        a.k = a.v = at(0x200000, SAGE_F16, 2, 4, nk, 64);
        a.causal = rng_below(&rng, 2);
        a.window_left = rng_below(&rng, 12) - 1;
        a.window_right = a.causal ? -1 : rng_below(&rng, 12) - 1;
        a.diagonal = rng_below(&rng, 2) ? SAGE_TOP_LEFT : SAGE_BOTTOM_RIGHT;
        LEGAL(a);
        const struct sage_seq seq = sage_attn_seq(&a, 1);

        for (int64_t i = 0; i < nq; i++) {
            int64_t first, last;

            sage_attn_band(&a, &seq, i, &first, &last);
            for (int64_t j = 0; j < nk; j++)
                assert_int_equal(ref64_sees(&a, nq, nk, i, j), j >= first && j < last);
            assert_true(first >= 0 && last <= nk && first <= last);
            all += (double)(last - first);
            some += i >= part.row ? (double)(last - first) : 0;
        }
        assert_true(sage_attn_ops(&a, NULL) == 4 * 64 * 16 * all);
        assert_true(sage_attn_ops(&a, &part) == 4 * 64 * 2 * some);
    }
}

static void test_resolved(void **state)
{
    struct sage_attn a = base();

    (void)state;
    assert_int_equal(sage_attn_variant(&a), SAGE_INT8_FP16);
    a.smooth_v = true;
    assert_int_equal(sage_attn_variant(&a), SAGE_INT8_FP8);
    assert_string_equal(sage_variant_name(SAGE_INT8_FP8), "int8_fp8");
    assert_string_equal(sage_variant_name((enum sage_variant)9), "invalid");
    assert_true(sage_attn_scale(&a) == 0.125f);
    a.scale = 3;
    assert_true(sage_attn_scale(&a) == 3);
}

static void test_errors(void **state)
{
    (void)state;
    assert_string_equal(sage_errname(0), "SAGE_OK");
    assert_string_equal(sage_errname(SAGE_EINVAL), "SAGE_EINVAL");
    assert_string_equal(sage_strerror(SAGE_EWORKSPACE), "workspace too small");
    assert_string_equal(sage_errname(SAGE_EINTERNAL), "SAGE_EINTERNAL");
    assert_string_equal(sage_errname(SAGE_ECAPTURE), "SAGE_ECAPTURE");
    assert_string_equal(sage_errname(1), "SAGE_E?");
    assert_string_equal(sage_errname(INT32_MIN), "SAGE_E?");
    assert_string_equal(sage_strerror(-999), "unknown status");
    assert_true(sage_retryable(SAGE_EBUSY));
    assert_false(sage_retryable(SAGE_EINVAL));
    assert_false(sage_retryable(SAGE_OK));
}

/* The table of GPU kernels: who does what where. Every problem has one for any device. */
static void test_kernels(void **state)
{
    (void)state;
    for (int d = 8; d <= 256; d += 8)
        for (int bits = 0; bits < 8; bits++) {
            const int bf16 = bits & 1, fp8 = bits >> 1 & 1, mask = bits >> 2;
            const int any = sage_kernel_find(0, d, bf16, fp8, mask);
            const int hopper = sage_kernel_find(90, d, bf16, fp8, mask);

            assert_true(any >= 0 && hopper >= 0);
            assert_true(sage_kernel_find_few(d, bf16, FEW_ROWS) >= 0);
            assert_int_equal(sage_kernel_find_few(d, bf16, FEW_ROWS + 1), -1);
            assert_true(sage_kernels[any].max_head_dim >= d);
            assert_true(sage_kernels[any].max_sm > 120);
            assert_true(sage_kernels[any].min_sm == (fp8 ? 89 : 80));
            assert_int_equal(sage_kernel_find(120, d, bf16, fp8, mask), any);
            assert_int_equal(sage_kernel_find(80, d, bf16, fp8, mask), fp8 ? -1 : any);
            assert_string_equal(sage_kernels[hopper].variant,
                                fp8 && (mask || d <= 128) ? "int8_fp8" : "int8_fp16");
            assert_string_equal(sage_kernels[any].variant, fp8 ? "int8_fp8" : "int8_fp16");
            assert_string_equal(sage_kernels[hopper].dtype, bf16 ? "bf16" : "f16");
            if (mask) {
                assert_int_equal(hopper, any);
            } else {
                assert_int_equal(sage_kernels[hopper].max_sm, 90);
                assert_int_equal(sage_kernels[hopper].max_head_dim, d <= 64    ? 64
                                                                    : d <= 128 ? 128
                                                                               : 256);
                assert_true(sage_kernels[hopper].smem_bytes <= 227 * 1024);
            }
        }
    assert_int_equal(sage_kernel_find(90, 264, 0, 0, 0), -1);
}

/* Those that quantise nothing: Hopper's. */
static void test_exact_kernels(void **state)
{
    (void)state;
    for (int d = 8; d <= 264; d += 8)
        for (int i = 0; i < 4; i++) {
            const int bf16 = i % 2, few = i / 2;
            const int found = sage_kernel_find_exact(d, bf16, few);

            if (d > 256) {
                assert_int_equal(found, -1);
                continue;
            }
            assert_true(found >= sage_kernel_first_exact() && found < sage_n_kernels);
            const struct sage_kernel *k = &sage_kernels[found];
            assert_int_equal(k->max_head_dim, d <= 64 ? 64 : d <= 128 ? 128 : 256);
            assert_int_equal(k->tile_q, few ? 64 : d <= 64 ? 192 : 128);
            assert_int_equal(sage_kernel_splits(found), few);
            assert_string_equal(k->dtype, bf16 ? "bf16" : "f16");
            assert_true(k->min_sm == 90 && k->max_sm == 90);
            assert_true(k->smem_bytes <= 227 * 1024);
        }
}

/* Those for few rows: as many as there are, in 99 KiB of shared memory. */
static void test_few_kernels(void **state)
{
    (void)state;
    for (int d = 8; d <= 256; d += 8)
        for (int bf16 = 0; bf16 < 2; bf16++) {
            for (int64_t rows = 1; rows <= 64; rows++) {
                const int i = sage_kernel_find_few(d, bf16, rows);

                assert_true(i >= sage_kernel_first_few() && i < sage_kernel_first_exact());
                const struct sage_kernel *k = &sage_kernels[i];
                assert_int_equal(k->tile_q, rows <= 16 ? 16 : rows <= 32 ? 32 : 64);
                assert_int_equal(k->max_head_dim, d <= 64 ? 64 : d <= 128 ? 128 : 256);
                assert_string_equal(k->dtype, bf16 ? "bf16" : "f16");
                assert_true(k->min_sm == 80 && k->max_sm > 120);
                assert_true(k->smem_bytes + 2048 <= 99 * 1024);
            }
            assert_int_equal(sage_kernel_find_few(d, bf16, 65), -1);
        }
    assert_int_equal(sage_kernel_find_few(64, 0, INT64_C(1) << 40), -1);
    assert_int_equal(sage_kernel_find_few(264, 0, 1), -1);
}

int main(void)
{
    const struct CMUnitTest tests[] = {
        cmocka_unit_test(test_legal),       cmocka_unit_test(test_empty),
        cmocka_unit_test(test_options),     cmocka_unit_test(test_dtypes),
        cmocka_unit_test(test_tensors),     cmocka_unit_test(test_shapes),
        cmocka_unit_test(test_sequences),   cmocka_unit_test(test_overlaps),
        cmocka_unit_test(test_interleaved), cmocka_unit_test(test_random_overlaps),
        cmocka_unit_test(test_garbage),     cmocka_unit_test(test_bytes),
        cmocka_unit_test(test_bands),       cmocka_unit_test(test_resolved),
        cmocka_unit_test(test_errors),      cmocka_unit_test(test_kernels),
        cmocka_unit_test(test_few_kernels), cmocka_unit_test(test_exact_kernels),
    };

    return cmocka_run_group_tests(tests, NULL, NULL);
}
