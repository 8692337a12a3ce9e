/*
 * test_options.c - options: defaults, values that make no sense, files, printing.
 */
#include <fcntl.h>
#include <setjmp.h>
#include <stdarg.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <unistd.h>

#include <cmocka.h>

#include "daemon/options.h"

static char path[] = "/tmp/test_options_XXXXXX"; /* of a file, the same in all tests */

static void write_file(const char *text)
{
    FILE *file = fopen(path, "w");

    assert_non_null(file);
    fputs(text, file);
    fclose(file);
}

static void assert_names(const char *why, const char *word)
{
    if (!strstr(why, word))
        fail_msg("'%s' does not name %s", why, word);
}

static void test_defaults(void **state)
{
    struct config c;
    char why[256];
    (void)state;

    config_init(&c);
    assert_string_equal(c.backend, "auto");
    assert_string_equal(c.group, "sageattnd");
    assert_int_equal(c.slots, 3);
    assert_int_equal(c.quantum_us, 5000);
    assert_true(config_finish(&c, why));
    assert_true(c.socket[0] == '/');
    assert_true(c.threads >= 1);
    assert_int_equal(c.slot_bytes, 0); /* of the device, which is not known yet */
    assert_int_equal(c.client_bytes, 0);
    assert_true(config_set(&c, "backend", "cpu", why) && config_finish(&c, why));
    assert_true(c.slot_bytes > 0 && c.slot_bytes <= 64 << 20);
    assert_true(c.client_bytes > 0 && c.user_bytes >= c.client_bytes);
}

static void test_default_socket(void **state)
{
    struct config c;
    char why[256];
    (void)state;

    uid_t uid = geteuid();
    if (uid == 0) {
        config_init(&c);
        assert_true(config_finish(&c, why));
        assert_string_equal(c.socket, "/run/sageattnd/sageattnd.sock");
        assert_int_equal(seteuid(65534), 0);
    }
    setenv("XDG_RUNTIME_DIR", "/run/user/77", 1);
    config_init(&c);
    assert_true(config_finish(&c, why));
    assert_string_equal(c.socket, "/run/user/77/sageattnd.sock");
    unsetenv("XDG_RUNTIME_DIR");
    config_init(&c);
    assert_false(config_finish(&c, why));
    assert_names(why, "socket");
    assert_int_equal(seteuid(uid), 0);
}

static void test_numbers(void **state)
{
    static const struct {
        const char *text;
        bool good;
        uint64_t value;
    } cases[] = {
        {"0", true, 0},
        {"7", true, 7},
        {"1K", true, 1024},
        {"3M", true, 3 << 20},
        {"5G", true, UINT64_C(5) << 30},
        {"18446744073709551615", true, UINT64_MAX},
        {"17179869183G", true, UINT64_C(17179869183) << 30},
        {"18446744073709551616", false, 0},
        {"17179869184G", false, 0},
        {"18014398509481984K", false, 0},
        {"", false, 0},
        {"K", false, 0},
        {"-1", false, 0},
        {"+1", false, 0},
        {" 1", false, 0},
        {" -1", false, 0},
        {"1 K", false, 0},
        {"1k", false, 0},
        {"1KB", false, 0},
        {"1KK", false, 0},
        {"1.5", false, 0},
        {"0x10", false, 0},
        {"ten", false, 0},
    };
    struct config c;
    char why[256];
    (void)state;

    for (size_t i = 0; i < sizeof(cases) / sizeof(cases[0]); i++) {
        config_init(&c);
        uint64_t before = c.client_bytes;
        bool good = config_set(&c, "client_bytes", cases[i].text, why);
        if (good != cases[i].good)
            fail_msg("client_bytes = '%s'", cases[i].text);
        assert_int_equal(c.client_bytes, good ? cases[i].value : before);
        if (!good)
            assert_names(why, "client_bytes");
    }
}

static void test_bad_values(void **state)
{
    static const struct {
        const char *key, *value;
    } cases[] = {
        {"slots", "0"},           {"slots", "65"},
        {"threads", "1025"},      {"quantum_us", "99"},
        {"quantum_us", "20000K"}, {"max_clients", "0"},
        {"user_clients", "0"},    {"client_jobs", "0"},
        {"client_jobs", "4033"},  {"client_buffers", "0"},
        {"client_buffers", "2M"}, {"log_level", "loud"},
        {"log_level", ""},        {"backlog_ms", "0"},
        {"backlog_ms", "16G"},    {"idle_exit", "17179869183G"},
    };
    struct config c;
    char why[256], value[CONFIG_STR_MAX + 10];
    (void)state;

    for (size_t i = 0; i < sizeof(cases) / sizeof(cases[0]); i++) {
        config_init(&c);
        why[0] = '\0';
        if (config_set(&c, cases[i].key, cases[i].value, why) && config_finish(&c, why))
            fail_msg("%s = %s is taken", cases[i].key, cases[i].value);
        assert_names(why, cases[i].key);
    }
    config_init(&c);
    assert_false(config_set(&c, "colour", "blue", why));
    assert_names(why, "colour");
    memset(value, 'x', sizeof(value) - 1);
    value[sizeof(value) - 1] = '\0';
    assert_false(config_set(&c, "socket", value, why));
    assert_names(why, "socket");
    assert_false(config_set(&c, "slots", value, why)); /* a text that is cut */
    assert_names(why, "slots");
    value[CONFIG_STR_MAX - 1] = '\0';
    assert_true(config_set(&c, "socket", value, why));
    assert_string_equal(c.socket, value);
}

static void test_file(void **state)
{
    struct config c;
    char why[256];
    (void)state;

    write_file("; a comment\n# another\n\n[sageattnd]\nslots = 5\nclient_bytes=2G ; behind\n"
               "socket = /tmp/a b.sock\n");
    config_init(&c);
    assert_true(config_read(&c, path, why));
    assert_int_equal(c.slots, 5);
    assert_int_equal(c.client_bytes, UINT64_C(2) << 30);
    assert_string_equal(c.socket, "/tmp/a b.sock");
    assert_int_equal(c.quantum_us, 5000);
}

static void test_bad_files(void **state)
{
    static const struct {
        const char *text, *line, *word;
    } cases[] = {
        {"[sageattnd]\nslots = 2\nslots = many\n", ":3:", "slots"},
        {"[sageattnd]\ncolour = blue\n", ":2:", "colour"},
        {"[sagectl]\nslots = 2\n", ":2:", "sagectl"},
        {"slots = 2\n", ":1:", "sageattnd"},
        {"[sageattnd]\n\nslots\n", ":3:", "key = value"},
        {"[sageattnd\nslots = 2\n", ":1:", ""},
        {"[sageattnd]\nslots = 2\n  client_jobs = 3\n", ":3:", "slots"}, /* goes on with slots */
    };
    struct config c;
    char why[256];
    (void)state;

    for (size_t i = 0; i < sizeof(cases) / sizeof(cases[0]); i++) {
        write_file(cases[i].text);
        config_init(&c);
        if (config_read(&c, path, why))
            fail_msg("taken: %s", cases[i].text);
        assert_names(why, path);
        assert_names(why, cases[i].line);
        assert_names(why, cases[i].word);
    }
    assert_false(config_read(&c, "/nonexistent/file", why));
    assert_names(why, "/nonexistent/file: No such file");
}

/* What config_print() prints, config_read() takes. */
static void test_round_trip(void **state)
{
    static struct config c, again;
    char why[256];
    (void)state;

    config_init(&c);
    assert_true(config_set(&c, "socket", "/run/some where/x.sock", why));
    assert_true(config_set(&c, "fault", "delay_ms=5,lose=7", why));
    assert_true(config_set(&c, "client_bytes", "3G", why));
    assert_true(config_set(&c, "group", "", why));
    assert_true(config_finish(&c, why));
    fflush(stdout);
    int out = dup(STDOUT_FILENO);
    assert_non_null(freopen(path, "w", stdout));
    config_print(&c);
    fflush(stdout);
    dup2(out, STDOUT_FILENO);
    close(out);
    config_init(&again);
    if (!config_read(&again, path, why))
        fail_msg("%s", why);
#define SAME_STR(key) assert_string_equal(c.key, again.key)
#define SAME_U64(key) assert_int_equal(c.key, again.key)
#define SAME(type, key, value, help) SAME_##type(key);
    CONFIG_OPTIONS(SAME)
}

/* A value as long as an option may be, from a file: whole, or refused; never a piece of it. */
static void test_long_line(void **state)
{
    struct config c;
    char why[256], text[CONFIG_STR_MAX + 40], value[CONFIG_STR_MAX];
    (void)state;

    memset(value, 'x', sizeof(value) - 1);
    value[sizeof(value) - 1] = '\0';
    snprintf(text, sizeof(text), "[sageattnd]\nsocket = %s\n", value);
    write_file(text);
    config_init(&c);
    if (config_read(&c, path, why))
        assert_string_equal(c.socket, value);
    else
        assert_names(why, path);
}

static int remove_file(void **state)
{
    (void)state;
    return unlink(path);
}

static int make_file(void **state)
{
    int fd = mkstemp(path);
    (void)state;

    if (fd < 0)
        return -1;
    return close(fd);
}

int main(void)
{
    const struct CMUnitTest tests[] = {
        cmocka_unit_test(test_defaults),  cmocka_unit_test(test_default_socket),
        cmocka_unit_test(test_numbers),   cmocka_unit_test(test_bad_values),
        cmocka_unit_test(test_file),      cmocka_unit_test(test_bad_files),
        cmocka_unit_test(test_long_line), cmocka_unit_test(test_round_trip),
    };
    return cmocka_run_group_tests(tests, make_file, remove_file);
}
