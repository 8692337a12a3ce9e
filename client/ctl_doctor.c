/*
 * ctl_doctor.c - is everything as it should be, and if not, what helps? From socket to result.
 */
#include "config.h"

#include "client/ctl_doctor.h"

#include <errno.h>
#include <fcntl.h>
#include <getopt.h>
#include <grp.h>
#include <stdarg.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/mman.h>
#include <sys/stat.h>
#include <unistd.h>

/* A path may be no UTF-8, which JSON needs to be. */
static json_t *json_text(const char *text)
{
    json_t *value = json_string(text);
    char ascii[512];

    if (value)
        return value;
    snprintf(ascii, sizeof(ascii), "%s", text);
    for (char *p = ascii; *p; p++)
        if (*p & 0x80)
            *p = '?';
    return json_string(ascii);
}

void report(struct doctor *d, enum result result, const char *check, const char *remedy,
            const char *format, ...)
{
    static const char *const names[] = {"PASS", "WARN", "FAIL"};
    char text[512];
    va_list args;

    va_start(args, format);
    vsnprintf(text, sizeof(text), format, args);
    va_end(args);
    if (result == PASS)
        remedy = "";
    d->failed |= result == FAIL;
    if (d->checks) {
        json_array_append_new(d->checks,
                              json_pack("{ss ss so ss}", "check", check, "result", names[result],
                                        "text", json_text(text), "remedy", remedy));
        return;
    }
    printf("%s  %-10s %s\n", names[result], check, text);
    if (*remedy)
        printf("      %-10s remedy: %s\n", "", remedy);
    fflush(stdout);
}

void report_number(struct doctor *d, const char *key, double value)
{
    if (d->checks)
        json_object_set_new(json_array_get(d->checks, json_array_size(d->checks) - 1), key,
                            json_real(value));
}

/* --- what surrounds the daemon --- */

static void check_memfd(struct doctor *d)
{
    int fd = memfd_create("sagectl-doctor", MFD_CLOEXEC | MFD_ALLOW_SEALING);
    int rc = fd < 0 ? -1 : fcntl(fd, F_ADD_SEALS, F_SEAL_SHRINK | F_SEAL_GROW | F_SEAL_SEAL);

    if (rc < 0)
        report(d, FAIL, "memfd",
               "allow memfd_create(2) and F_ADD_SEALS in the sandbox of this process",
               "sealed memory cannot be made: %s", strerror(errno));
    else
        report(d, PASS, "memfd", "", "sealed memory can be made");
    if (fd >= 0)
        close(fd);
}

static bool check_socket(struct doctor *d)
{
    const char *path = d->ctl->path;
    struct stat st;

    if (stat(path, &st) < 0) {
        report(d, FAIL, "socket",
               errno == EACCES ? "ask for access to its directory"
                               : "systemctl start sageattnd, or run sageattnd; "
                                 "-s and $SAGEATTND_SOCKET name another socket",
               "%s: %s", path, strerror(errno));
        return false;
    }
    const struct group *group = getgrgid(st.st_gid);
    char owner[64];
    snprintf(owner, sizeof(owner), group ? "%s" : "%.0s%u", group ? group->gr_name : "", st.st_gid);
    if (!S_ISSOCK(st.st_mode))
        report(d, FAIL, "socket", "remove it, or name another with -s", "%s is no socket", path);
    else if (access(path, R_OK | W_OK) < 0)
        report(d, FAIL, "socket", "usermod -aG GROUP USER with the group named here, log in again",
               "%s: no permission; it is for group %s, mode %04o", path, owner, st.st_mode & 07777);
    else if (st.st_mode & S_IWOTH)
        report(d, WARN, "socket", "set SocketMode=0660 and a group",
               "%s: everybody may use it: group %s, mode %04o", path, owner, st.st_mode & 07777);
    else
        report(d, PASS, "socket", "", "%s, group %s, mode %04o", path, owner, st.st_mode & 07777);
    return S_ISSOCK(st.st_mode);
}

static bool check_daemon(struct doctor *d)
{
    const struct msg_welcome *w = &d->ctl->welcome;
    struct msg_empty empty = {0};
    struct msg_stats stats;
    int rc = ctl_connect(d->ctl);

    if (!rc)
        rc = conn_call(&d->ctl->conn, OP_STATS, MSG_EMPTY, &empty, NULL, MSG_STATS, &stats);
    if (rc) {
        report(d, FAIL, "daemon",
               rc == SAGE_EVERSION    ? "install sageattnd and sagectl of the same version"
               : rc == SAGE_EPERM     ? "join the socket's group, log in again"
               : rc == SAGE_ETIMEDOUT ? "is it stopped? journalctl -u sageattnd"
                                      : "systemctl restart sageattnd; journalctl -u sageattnd",
               "%s", error_text());
        return false;
    }
    bool draining = !strcmp(stats.state, "draining");
    report(d, draining ? WARN : PASS, "daemon", "wait for its successor, or start one",
           "pid %llu, %s on %s, %s for %s", (unsigned long long)w->pid, w->backend, w->device,
           stats.state, text_ns((double)stats.uptime_ns).s);
    bool same = !strcmp(w->version, PACKAGE_VERSION);
    report(d, same ? PASS : WARN, "version", "restart the daemon after an update",
           "sageattnd %s, protocol %u.%u; sagectl %s, protocol %d.%d", w->version, w->major,
           w->minor, PACKAGE_VERSION, PROTO_MAJOR, PROTO_MINOR);
    return !draining;
}

static void check_round_trip(struct doctor *d)
{
    enum { N = 201, SLOW_NS = 1000000 };
    double ns[N];

    if (ctl_measure(d->ctl, ns, N)) {
        report(d, FAIL, "ping", "journalctl -u sageattnd", "%s", error_text());
        return;
    }
    report(d, ns[N / 2] > SLOW_NS ? WARN : PASS, "ping", "is the machine overloaded?",
           "%.1f us a round trip (median of %d)", ns[N / 2] / 1e3, N);
}

/* --- the command --- */

/* GPU or none, then jobs there. */
static void check_device(struct doctor *d)
{
    struct device gpu;

    if (!d->ctl->welcome.uuid[0]) {
        check_no_gpu(d);
        check_jobs(d);
    } else if (check_gpu(d, &gpu)) {
        check_jobs(d);
        device_close(&gpu);
    }
}

int ctl_doctor(struct ctl *ctl, int argc, char **argv)
{
    static const struct option options[] = {{"json", no_argument, NULL, 'j'}, {0}};
    struct doctor d = {.ctl = ctl};
    int option;

    while ((option = getopt_long(argc, argv, "j", options, NULL)) != -1) {
        if (option != 'j') {
            json_decref(d.checks);
            return ctl_usage(argv[0]);
        }
        if (!d.checks)
            d.checks = json_array();
    }
    if (optind < argc) {
        json_decref(d.checks);
        return ctl_usage(argv[0]);
    }
    check_memfd(&d);
    if (check_socket(&d) && check_daemon(&d)) {
        check_round_trip(&d);
        check_device(&d);
    }
    if (d.checks)
        ctl_print_json(d.checks, false);
    return d.failed ? CTL_FAILED : CTL_OK;
}
