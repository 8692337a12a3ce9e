/*
 * sagectl.c - look at a running daemon: a table of commands.
 */
#include "client/ctl.h"

#include <errno.h>
#include <getopt.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

static const struct command {
    const char *name;
    int (*run)(struct ctl *ctl, int argc, char **argv);
    const char *arguments, *summary, *options;
} commands[] = {
    {"stats", ctl_stats, "[--json | --prometheus] [--watch SECONDS]",
     "counters, times and throughput, per client and per kernel",
     "  -j, --json           one JSON object; with --watch one a line\n"
     "  -p, --prometheus     text for a Prometheus scrape\n"
     "  -w, --watch SECONDS  again and again, with rates\n"},
    {"clients", ctl_clients, "[--json]", "who is connected",
     "  -j, --json           a JSON array\n"},
    {"top", ctl_top, "[--interval SECONDS] [--count N]", "a live view of the clients",
     "  -i, --interval SECONDS  between two frames (1)\n"
     "  -c, --count N        end after so many\n"},
    {"ping", ctl_ping, "[--count N]", "measure the round trip of a request",
     "  -c, --count N        how often (100)\n"},
    {"health", ctl_health, "", "exit with 0: running, 1: not reachable, 2: draining", ""},
    {"doctor", ctl_doctor, "[--json]", "check everything from the socket to a computed result",
     "  -j, --json           a JSON array of the checks\n"},
    {"bench", ctl_bench, "[--processes N] [--depth N] [--time SECONDS] [--json] [SHAPE]",
     "throughput and latency through the daemon, results checked",
     "  -p, --processes N    clients at once (1)\n"
     "  -i, --depth N        jobs in flight of each, at most 63 (4)\n"
     "  -t, --time SECONDS   how long (5)\n"
     "  -j, --json           one JSON object\n"
     "the shape of all jobs:\n"
     "  -b, --batch N        sequences (1)\n"
     "  -q, --heads N        query heads (8)\n"
     "  -k, --kvheads N      heads of keys and values (as many as query heads)\n"
     "  -n, --tokens N       queries, and as many keys (1024)\n"
     "  -m, --keys N         keys, where they are not as many\n"
     "  -d, --dim N          channels of a head (64)\n"
     "  -e, --dtype NAME     f16 or bf16 (f16)\n"
     "  -v, --variant NAME   auto, int8_fp16 or int8_fp8 (auto)\n"
     "  -c, --causal         from the bottom right\n"},
    {"kernels", ctl_kernels, "", "the attention kernels for GPUs that there are", ""},
    {"drain", ctl_drain, "[--wait]", "refuse new jobs, finish what runs, exit",
     "  -w, --wait           until the daemon is gone\n"},
    {"version", ctl_version, "", "of sagectl and of the daemon", ""},
};

enum { N_COMMANDS = sizeof(commands) / sizeof(commands[0]) };

static const struct command *find(const char *name)
{
    for (size_t i = 0; i < N_COMMANDS; i++)
        if (!strcmp(commands[i].name, name))
            return &commands[i];
    return NULL;
}

static void help(FILE *out)
{
    fprintf(out, "usage: sagectl [-s SOCKET] COMMAND [OPTIONS]\n\n");
    for (size_t i = 0; i < N_COMMANDS; i++)
        fprintf(out, "  %-9s %s\n", commands[i].name, commands[i].summary);
    fprintf(out, "\n  -s, --socket PATH  of the daemon; default: $SAGEATTND_SOCKET,\n"
                 "                     /run/sageattnd/sageattnd.sock, gpu<N>.sock\n"
                 "                     beside it, or\n"
                 "                     $XDG_RUNTIME_DIR/sageattnd.sock\n"
                 "  -h, --help         this text; after a command: its options\n");
}

static void help_command(FILE *out, const struct command *command)
{
    fprintf(out, "usage: sagectl %s %s\n%s\n%s  -h, --help           this text\n", command->name,
            command->arguments, command->summary, command->options);
}

int ctl_usage(const char *command)
{
    fprintf(stderr, "usage: sagectl %s %s\n", command, find(command)->arguments);
    return CTL_USAGE;
}

int ctl_fail(void)
{
    fprintf(stderr, "sagectl: %s\n", error_text());
    return CTL_FAILED;
}

int ctl_connect(struct ctl *ctl)
{
    conn_close(&ctl->conn);
    int rc = conn_open(&ctl->conn, ctl->path);
    return rc ? rc : conn_hello(&ctl->conn, "sagectl", PRIORITY_NORMAL, -1, &ctl->welcome);
}

bool ctl_number(const char *command, const char *text, double min, double max, double *number)
{
    char *end;

    *number = strtod(text, &end);
    if (end != text && !*end && *number >= min && *number <= max)
        return true;
    fprintf(stderr, "sagectl %s: %s: must be a number from %g to %g\n", command, text, min, max);
    return false;
}

bool ctl_integer(const char *command, const char *text, int64_t min, int64_t max, int64_t *number)
{
    char *end;

    errno = 0;
    *number = strtoll(text, &end, 10);
    if (end != text && !*end && !errno && *number >= min && *number <= max)
        return true;
    fprintf(stderr, "sagectl %s: %s: must be an integer from %lld to %lld\n", command, text,
            (long long)min, (long long)max);
    return false;
}

static struct text scaled(double value, double step, const char *const *units, int n_units)
{
    struct text text;
    int unit = 0;

    while (value >= 0.9995 * step && unit < n_units - 1) {
        value /= step;
        unit++;
    }
    int digits = unit == 0 || value >= 99.95 ? 0 : value >= 9.995 ? 1 : 2;
    snprintf(text.s, sizeof(text.s), "%.*f %s", digits, value, units[unit]);
    return text;
}

struct text text_ns(double ns)
{
    static const char *const units[] = {"ns", "us", "ms", "s"};
    struct text text;

    if (ns < 120e9)
        return scaled(ns, 1000, units, 4);
    unsigned long minutes = (unsigned long)(ns / 60e9);
    if (minutes < 60)
        snprintf(text.s, sizeof(text.s), "%lum %02lus", minutes, (unsigned long)(ns / 1e9) % 60);
    else if (minutes < 48 * 60)
        snprintf(text.s, sizeof(text.s), "%luh %02lum", minutes / 60, minutes % 60);
    else
        snprintf(text.s, sizeof(text.s), "%lud %02luh", minutes / 1440, minutes / 60 % 24);
    return text;
}

struct text text_bytes(double bytes)
{
    static const char *const units[] = {"B", "KiB", "MiB", "GiB", "TiB"};

    return scaled(bytes, 1024, units, 5);
}

struct text text_tops(double ops, double ns)
{
    struct text text;
    double tops = ns > 0 ? ops / ns / 1e3 : 0;

    snprintf(text.s, sizeof(text.s), tops > 0 && tops < 0.1 ? "%.2g" : "%.4g", tops);
    return text;
}

void ctl_print_json(json_t *value, bool on_one_line)
{
    json_dumpf(value, stdout,
               JSON_REAL_PRECISION(15) | (on_one_line ? JSON_COMPACT : JSON_INDENT(2)));
    putchar('\n');
    fflush(stdout);
    json_decref(value);
}

static bool wants_help(int argc, char **argv)
{
    for (int i = 1; i < argc; i++)
        if (!strcmp(argv[i], "-h") || !strcmp(argv[i], "--help"))
            return true;
    return false;
}

static int run(const struct command *command, const char *socket, int argc, char **argv)
{
    static struct ctl ctl;

    conn_path(socket, ctl.path, sizeof(ctl.path));
    if (conn_init(&ctl.conn, -1))
        return ctl_fail();
    optind = 0; /* the commands start getopt anew */
    int code = command->run(&ctl, argc, argv);
    conn_finish(&ctl.conn);
    if (fflush(stdout) || ferror(stdout)) {
        perror("sagectl: output");
        return CTL_FAILED;
    }
    return code;
}

int main(int argc, char **argv)
{
    static const struct option options[] = {
        {"socket", required_argument, NULL, 's'}, {"help", no_argument, NULL, 'h'}, {0}};
    const char *socket = NULL;
    int option;

    while ((option = getopt_long(argc, argv, "+s:h", options, NULL)) != -1) {
        if (option == 'h') {
            help(stdout);
            return CTL_OK;
        }
        if (option != 's') {
            help(stderr);
            return CTL_USAGE;
        }
        socket = optarg;
    }
    const struct command *command = optind < argc ? find(argv[optind]) : NULL;
    if (!command) {
        if (optind < argc)
            fprintf(stderr, "sagectl: %s: no such command\n", argv[optind]);
        help(stderr);
        return CTL_USAGE;
    }
    argc -= optind;
    argv += optind;
    if (wants_help(argc, argv)) {
        help_command(stdout, command);
        return CTL_OK;
    }
    return run(command, socket, argc, argv);
}
