/*
 * test_stats.c - percentiles from a histogram, the table of kernels.
 */
#include <math.h>
#include <setjmp.h>
#include <stdarg.h>
#include <stdio.h>
#include <string.h>

#include <cmocka.h>

#include "daemon/stats.h"
#include "tests/inputs.h"

/* A value alone is found again, at most an eighth too large and never too small. */
static void test_one_value(void **state)
{
    struct rng rng;
    (void)state;

    rng_init(&rng, test_seed());
    for (int i = 0; i < 20000; i++) {
        static struct hist hist;
        uint64_t ns = i < 100 ? (uint64_t)i : rng_bits(&rng) >> rng_below(&rng, 64);
        memset(&hist, 0, sizeof(hist));
        hist_add(&hist, ns);
        double us = hist_percentile_us(&hist, 0.5), low = (double)ns / 1e3;
        assert_true(us >= low);
        assert_true(us <= low * 1.125 + 0.001 + 1e-9);
        assert_true(hist_percentile_us(&hist, 0.999) == us);
    }
}

static void test_extremes(void **state)
{
    static struct hist hist;
    (void)state;

    assert_true(hist_percentile_us(&hist, 0.5) == 0);
    hist_add(&hist, 0);
    assert_true(hist_percentile_us(&hist, 0.5) <= 0.001);
    hist_add(&hist, UINT64_MAX);
    hist_add(&hist, UINT64_MAX);
    assert_true(hist_percentile_us(&hist, 0.99) >= (double)UINT64_MAX / 1e3);
    assert_int_equal(hist.total, 3);
}

/* Known distributions: 1 to 100,000 ns once each; 1 % outliers. */
static void test_percentiles(void **state)
{
    static struct hist even, mixed;
    static const double shares[] = {0.01, 0.5, 0.9, 0.99, 0.999};
    (void)state;

    for (uint64_t ns = 1; ns <= 100000; ns++)
        hist_add(&even, ns);
    for (size_t i = 0; i < sizeof(shares) / sizeof(shares[0]); i++) {
        double us = hist_percentile_us(&even, shares[i]), exact = 100 * shares[i];
        assert_true(us >= exact && us <= exact * 1.126);
    }
    for (int i = 0; i < 1000; i++)
        hist_add(&mixed, i < 985 ? 10000 : 5000000);
    assert_true(hist_percentile_us(&mixed, 0.5) < 12);
    assert_true(hist_percentile_us(&mixed, 0.98) < 12);
    assert_true(hist_percentile_us(&mixed, 0.99) >= 5000);
    assert_true(hist_percentile_us(&mixed, 0.999) < 5700);
}

/* What was long ago is forgotten, what is recent counts. */
static void test_fade(void **state)
{
    static struct hist hist;
    (void)state;

    for (int i = 0; i < 20000; i++) {
        hist_fade(&hist, 2048);
        hist_add(&hist, i < 10000 ? 5000000 : 10000);
        assert_true(hist.total > 0 && hist.total <= 2048);
        if (i == 9999)
            assert_true(hist_percentile_us(&hist, 0.5) >= 5000);
    }
    assert_true(hist_percentile_us(&hist, 0.99) < 12);
    assert_true(hist_percentile_us(&hist, 0.5) >= 10);
}

/* More kernels than the table has room for: the last row collects them, nothing is lost. */
static void test_kernels(void **state)
{
    static struct stats stats;
    static struct msg_stats msg;
    uint64_t jobs = 0, run_ns = 0;
    double ops = 0;
    char name[32];
    (void)state;

    for (int round = 0; round < 3; round++) {
        for (int i = 0; i < KERNELS_MAX + 10; i++) {
            snprintf(name, sizeof(name), "kernel %d", i);
            stats_kernel(&stats, name, 10, 100);
        }
    }
    stats_fill(&stats, 5, &msg);
    assert_int_equal(msg.n_kernels, KERNELS_MAX);
    for (uint32_t i = 0; i < msg.n_kernels; i++) {
        snprintf(name, sizeof(name), "kernel %u", i);
        assert_string_equal(msg.kernels[i].name, i < KERNELS_MAX - 1 ? name : "other");
        assert_true(i == KERNELS_MAX - 1 || msg.kernels[i].jobs == 3);
        jobs += msg.kernels[i].jobs;
        run_ns += msg.kernels[i].run_ns;
        ops += msg.kernels[i].ops;
    }
    assert_int_equal(jobs, 3 * (KERNELS_MAX + 10));
    assert_int_equal(run_ns, 100 * jobs);
    assert_true(ops == 10.0 * (double)jobs);
}

int main(void)
{
    const struct CMUnitTest tests[] = {
        cmocka_unit_test(test_one_value),   cmocka_unit_test(test_extremes),
        cmocka_unit_test(test_percentiles), cmocka_unit_test(test_fade),
        cmocka_unit_test(test_kernels),
    };
    return cmocka_run_group_tests(tests, NULL, NULL);
}
