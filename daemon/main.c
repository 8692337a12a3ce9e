/*
 * main.c - sageattnd: command line, then serve until told to stop.
 */
#include <signal.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/resource.h>
#include <unistd.h>

#include "config.h"
#include "daemon/daemon.h"
#include "daemon/log.h"
#include "daemon/server.h"

enum { EXIT_USAGE = 2 };

static const char default_file[] = SYSCONFDIR "/sageattnd/sageattnd.conf";

static void help(void)
{
    puts("usage: sageattnd [--config=FILE] [--OPTION=VALUE ...]\n"
         "Run quantised attention for other processes.\n");
    printf("  --config=FILE          read an INI file first (default: %s,\n"
           "                         if it is there)\n"
           "  --print-config         print every option as it is in force, and exit\n"
           "  --version              print the version, and exit\n"
           "  --help                 print this, and exit\n",
           default_file);
    config_help();
}

static bool set_flag(struct config *config, const char *flag, char *why)
{
    char key[64];
    const char *equals = strchr(flag, '=');
    size_t len = equals ? (size_t)(equals - flag) : 0;

    if (strncmp(flag, "--", 2) || len < 3 || len >= sizeof(key)) {
        snprintf(why, PROTO_TEXT_MAX, "%.100s: flags are --option=value, see --help", flag);
        return false;
    }
    snprintf(key, sizeof(key), "%.*s", (int)(len - 2), flag + 2);
    for (char *c = key; *c; c++)
        if (*c == '-')
            *c = '_';
    return config_set(config, key, equals + 1, why);
}

/* Defaults, then the file, then the flags. */
static bool read_config(struct config *config, int argc, char **argv, char *why)
{
    const char *file = access(default_file, F_OK) == 0 ? default_file : NULL;

    config_init(config);
    for (int i = 1; i < argc; i++)
        if (!strncmp(argv[i], "--config=", 9))
            file = argv[i] + 9;
    if (file && !config_read(config, file, why))
        return false;
    for (int i = 1; i < argc; i++) {
        if (!strncmp(argv[i], "--config=", 9) || !strcmp(argv[i], "--print-config"))
            continue;
        if (!set_flag(config, argv[i], why))
            return false;
    }
    return config_finish(config, why);
}

/* Each client takes two descriptors. */
static void raise_limits(void)
{
    struct rlimit limit;

    if (getrlimit(RLIMIT_NOFILE, &limit) == 0) {
        limit.rlim_cur = limit.rlim_max;
        setrlimit(RLIMIT_NOFILE, &limit);
    }
}

static void block_signals(void)
{
    sigset_t set;

    sigemptyset(&set);
    sigaddset(&set, SIGTERM);
    sigaddset(&set, SIGINT);
    sigprocmask(SIG_BLOCK, &set, NULL);
}

/* Why, and who is attached: under MPS their contexts are gone, too, and go before ours comes. */
static void tell_lost(const struct daemon *d)
{
    char who[512] = "";
    size_t len = 0;
    const struct session *s;

    TAILQ_FOREACH(s, &d->sessions, link)
        if (len < sizeof(who))
            len += (size_t)snprintf(who + len, sizeof(who) - len, "%s %s (%d)", len ? "," : "",
                                    s->name, (int)s->pid);
    sd_notifyf(0, "STATUS=device lost: %s; attached:%s", d->lost_why, len ? who : " nobody");
    log_notice("attached", "clients=\"%s\"", len ? who + 1 : "");
}

static int serve(const struct config *config)
{
    static struct daemon daemon;
    static struct server server;
    char why[PROTO_TEXT_MAX];

    int rc = daemon_init(&daemon, config, why);
    if (rc) {
        log_error("start_failed", "reason=\"%s\"", why);
        return rc == SAGE_EDEVICE  ? EXIT_DEVICE_LOST
               : rc == SAGE_EINVAL ? EXIT_USAGE
                                   : EXIT_FAILURE;
    }
    if (server_open(&server, &daemon, why)) {
        log_error("start_failed", "reason=\"%s\"", why);
        daemon_finish(&daemon);
        return EXIT_FAILURE;
    }
    server_ready(&server);
    uv_run(&daemon.loop, UV_RUN_DEFAULT);
    if (daemon.device_lost) {
        tell_lost(&daemon);
        _exit(EXIT_DEVICE_LOST); /* its streams may never end */
    }
    block_signals(); /* told once is enough */
    daemon_finish(&daemon);
    server_finish(&server);
    log_notice("stopped", "jobs_done=%llu", (unsigned long long)daemon.stats.done);
    return daemon.exit_code;
}

int main(int argc, char **argv)
{
    struct config config;
    char why[PROTO_TEXT_MAX > 256 ? PROTO_TEXT_MAX : 256];
    bool print = false;

    for (int i = 1; i < argc; i++) {
        if (!strcmp(argv[i], "--help"))
            return help(), 0;
        if (!strcmp(argv[i], "--version"))
            return puts("sageattnd " PACKAGE_VERSION), 0;
        print |= !strcmp(argv[i], "--print-config");
    }
    if (!read_config(&config, argc, argv, why)) {
        fprintf(stderr, "sageattnd: %s\n", why);
        return EXIT_USAGE;
    }
    if (print)
        return config_print(&config), 0;
    log_set_level(log_level_parse(config.log_level));
    signal(SIGPIPE, SIG_IGN);
    raise_limits();
    return serve(&config);
}
