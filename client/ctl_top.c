/*
 * ctl_top.c - a live view of the clients: who computes, how much, and who waits.
 */
#include "client/ctl.h"

#include <getopt.h>
#include <poll.h>
#include <pwd.h>
#include <signal.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/ioctl.h>
#include <sys/signalfd.h>
#include <termios.h>
#include <unistd.h>

/* Rates are over the time since the frame before; of what was not there then, since it came. */
struct row {
    const struct msg_client *client;
    double seconds, jobs, ops, run_ns;
};

struct top {
    struct ctl *ctl;
    double interval;
    int64_t frames;    /* still to come; -1: no end */
    int quit, signal;  /* descriptors: SIGINT and the like; SIGWINCH, SIGTSTP */
    bool screen, keys; /* stdout and stdin are a terminal */
    struct termios cooked;
    struct sample before, now;
    char *frame; /* the last one, in full */
    size_t frame_len;
};

/* --- a frame --- */

static const struct msg_client *find(const struct sample *sample, uint64_t id)
{
    for (size_t i = 0; i < sample->n_clients; i++)
        if (sample->clients[i].id == id)
            return &sample->clients[i];
    return NULL;
}

static struct row row_of(const struct top *top, const struct msg_client *c)
{
    static const struct msg_client none;
    double seconds = sample_seconds(&top->now, &top->before);
    const struct msg_client *b = seconds > 0 ? find(&top->before, c->id) : NULL;

    if (!b)
        seconds = (double)c->age_ns / 1e9;
    b = b ? b : &none;
    return (struct row){.client = c,
                        .seconds = seconds,
                        .jobs = (double)(c->done - b->done),
                        .ops = c->ops - b->ops,
                        .run_ns = (double)(c->run_ns - b->run_ns)};
}

/* Who computed most comes first. */
static int compare(const void *a, const void *b)
{
    const struct row *x = a, *y = b;

    if (x->run_ns != y->run_ns)
        return x->run_ns < y->run_ns ? 1 : -1;
    return (x->client->id > y->client->id) - (x->client->id < y->client->id);
}

static struct text user_name(uint64_t uid)
{
    const struct passwd *user = getpwuid((uid_t)uid);
    struct text text;

    if (user)
        snprintf(text.s, sizeof(text.s), "%s", user->pw_name);
    else
        snprintf(text.s, sizeof(text.s), "%llu", (unsigned long long)uid);
    return text;
}

static void write_head(const struct top *top, FILE *out)
{
    static const struct msg_stats none;
    const struct msg_welcome *w = &top->ctl->welcome;
    const struct msg_stats *s = &top->now.stats;
    double seconds = sample_seconds(&top->now, &top->before);
    const struct msg_stats *b = seconds > 0 ? &top->before.stats : &none;

    seconds = seconds > 0 ? seconds : (double)s->uptime_ns / 1e9;
    fprintf(out, "sageattnd %s, pid %llu, %s on %s, %s for %s\n", w->version,
            (unsigned long long)w->pid, w->backend, w->device, s->state,
            text_ns((double)s->uptime_ns).s);
    fprintf(out, "last %s: %.1f jobs/s, %.1f failed/s; %s TOPS; %.2f of %u slots computing\n",
            text_ns(seconds * 1e9).s, (double)(s->done - b->done) / seconds,
            (double)(s->failed - b->failed) / seconds, text_tops(s->ops - b->ops, seconds * 1e9).s,
            (double)(s->run_ns - b->run_ns) / 1e9 / seconds, s->slots);
    fprintf(out, "now %u waiting, %u running; %s mapped in %u buffers, %s staged so far\n\n",
            s->queued, s->running, text_bytes((double)s->mapped_bytes).s, s->buffers,
            text_bytes((double)s->staged_bytes).s);
}

static void write_row(const struct row *row, double all_ns, FILE *out)
{
    const struct msg_client *c = row->client;

    fprintf(out, "%8llu %-10.10s %-18.18s %-6.6s %10.1f %8s %6.1f%% %7u %7u %9s %10.1f\n",
            (unsigned long long)c->pid, user_name(c->uid).s, c->name, c->mode[0] ? c->mode : "-",
            row->seconds > 0 ? row->jobs / row->seconds : 0,
            text_tops(row->ops, row->seconds * 1e9).s, all_ns > 0 ? 100 * row->run_ns / all_ns : 0,
            c->queued, c->running, text_ns(c->queue_p99_us * 1e3).s,
            (double)c->mapped_bytes / 0x1p20);
}

static int write_clients(const struct top *top, FILE *out)
{
    size_t n = top->now.n_clients;
    struct row *rows = calloc(n + 1, sizeof(*rows));
    double all_ns = 0;

    if (!rows)
        return error_set(SAGE_ENOMEM, "out of memory");
    for (size_t i = 0; i < n; i++) {
        rows[i] = row_of(top, &top->now.clients[i]);
        all_ns += rows[i].run_ns;
    }
    qsort(rows, n, sizeof(*rows), compare);
    fprintf(out, "%8s %-10s %-18s %-6s %10s %8s %7s %7s %7s %9s %10s\n", "PID", "USER", "NAME",
            "MODE", "JOBS/S", "TOPS", "SHARE", "QUEUED", "RUNNING", "P99 WAIT", "MAPPED MiB");
    for (size_t i = 0; i < n; i++)
        write_row(&rows[i], all_ns, out);
    free(rows);
    return 0;
}

/* The daemon may go and come: that is to be seen, and does not end it. */
static int make_frame(struct top *top)
{
    free(top->frame);
    top->frame = NULL;
    FILE *out = open_memstream(&top->frame, &top->frame_len);
    if (!out)
        return error_set(SAGE_ENOMEM, "out of memory");
    free(top->before.clients);
    top->before = top->now;
    top->now = (struct sample){0};
    int rc = sample_take(top->ctl, &top->now);
    if (!rc) {
        write_head(top, out);
        rc = write_clients(top, out);
    } else {
        top->now.taken_ns = 0;
        fprintf(out, "%s\n", error_text());
    }
    return fclose(out) ? error_set(SAGE_ENOMEM, "out of memory") : rc;
}

/* --- the terminal --- */

/* Bytes of the line's first `columns` characters, which are UTF-8. */
static int cut(const char *line, size_t len, int columns)
{
    size_t n = 0;

    while (n < len && (((unsigned char)line[n] & 0xc0) == 0x80 || columns-- > 0))
        n++;
    return (int)n;
}

static void show(const struct top *top)
{
    struct winsize size = {0};

    if (!top->screen) {
        printf("%s\n", top->frame);
        fflush(stdout);
        return;
    }
    ioctl(STDOUT_FILENO, TIOCGWINSZ, &size);
    int rows = size.ws_row ? size.ws_row : 24, columns = size.ws_col ? size.ws_col : 80;
    printf("\033[H");
    for (const char *line = top->frame, *end; rows > 0 && *line; line = end + 1, rows--) {
        end = strchr(line, '\n');
        printf("%.*s\033[K%s", cut(line, (size_t)(end - line), columns), line,
               rows > 1 ? "\n" : "");
    }
    printf("\033[J");
    fflush(stdout);
}

/* Another screen, no cursor, keys at once and unseen. */
static void enter(struct top *top)
{
    if (top->screen)
        printf("\033[?1049h\033[?25l");
    if (top->keys) {
        struct termios raw = top->cooked;
        raw.c_lflag &= ~(tcflag_t)(ICANON | ECHO);
        tcsetattr(STDIN_FILENO, TCSADRAIN, &raw);
    }
}

static void leave(struct top *top)
{
    if (top->keys)
        tcsetattr(STDIN_FILENO, TCSADRAIN, &top->cooked);
    if (top->screen)
        printf("\033[?25h\033[?1049l");
    fflush(stdout);
}

static void on_signal(struct top *top)
{
    struct signalfd_siginfo info;

    if (read(top->signal, &info, sizeof(info)) != sizeof(info))
        return;
    if (info.ssi_signo == SIGTSTP) {
        leave(top);
        raise(SIGSTOP); /* until SIGCONT */
        enter(top);
    }
    show(top);
}

static bool wants_to_quit(struct top *top)
{
    char key;

    if (read(STDIN_FILENO, &key, 1) == 1)
        return key == 'q' || key == 'Q';
    top->keys = false; /* it hung up */
    return true;
}

/* Until it is time for the next frame; false: it is time to go. */
static bool pass_time(struct top *top, int64_t until)
{
    for (;;) {
        struct pollfd fds[] = {{top->quit, POLLIN, 0},
                               {top->signal, POLLIN, 0},
                               {top->keys ? STDIN_FILENO : -1, POLLIN, 0}};
        int64_t ns = until - clock_ns();
        struct timespec left = {ns / 1000000000, ns % 1000000000};
        if (ns <= 0)
            return true;
        if (ppoll(fds, 3, &left, NULL) <= 0)
            continue;
        if (fds[0].revents || (fds[2].revents && wants_to_quit(top)))
            return false;
        if (fds[1].revents)
            on_signal(top);
    }
}

/* --- the command --- */

static int loop(struct top *top)
{
    int64_t next = clock_ns();

    for (;;) {
        int rc = make_frame(top);
        if (rc == SAGE_ECANCELED)
            return CTL_OK;
        if (rc == SAGE_ENOMEM)
            return ctl_fail();
        show(top);
        if (ferror(stdout) || (top->frames > 0 && --top->frames == 0))
            return rc ? CTL_FAILED : CTL_OK;
        next += (int64_t)(top->interval * 1e9);
        next = next > clock_ns() ? next : clock_ns(); /* it took longer than that */
        if (!pass_time(top, next))
            return CTL_OK;
    }
}

/* Signals come by descriptor, so none is missed; the first ends every wait for the daemon. */
static int catch_signals(struct top *top)
{
    sigset_t quit, others, all;

    sigemptyset(&quit);
    sigaddset(&quit, SIGINT);
    sigaddset(&quit, SIGTERM);
    sigaddset(&quit, SIGHUP);
    sigemptyset(&others);
    sigaddset(&others, SIGWINCH);
    sigaddset(&others, SIGTSTP);
    sigorset(&all, &quit, &others);
    sigprocmask(SIG_BLOCK, &all, NULL);
    top->quit = signalfd(-1, &quit, SFD_CLOEXEC);
    top->signal = signalfd(-1, &others, SFD_CLOEXEC);
    top->ctl->conn.stop = top->quit;
    return top->quit < 0 || top->signal < 0 ? error_set(SAGE_EINTERNAL, "signalfd") : 0;
}

int ctl_top(struct ctl *ctl, int argc, char **argv)
{
    static const struct option options[] = {
        {"interval", required_argument, NULL, 'i'}, {"count", required_argument, NULL, 'c'}, {0}};
    struct top top = {.ctl = ctl, .interval = 1, .frames = -1};
    int option;

    while ((option = getopt_long(argc, argv, "i:c:", options, NULL)) != -1)
        if (!(option == 'i' && ctl_number(argv[0], optarg, 0.01, 86400, &top.interval)) &&
            !(option == 'c' && ctl_integer(argv[0], optarg, 1, INT32_MAX, &top.frames)))
            return ctl_usage(argv[0]);
    if (optind < argc)
        return ctl_usage(argv[0]);
    if (catch_signals(&top) || ctl_connect(ctl)) /* later it may go: that is shown */
        return ctl_fail();
    top.screen = isatty(STDOUT_FILENO);
    top.keys = top.screen && tcgetattr(STDIN_FILENO, &top.cooked) == 0;
    enter(&top);
    int code = loop(&top);
    leave(&top);
    if (code && top.screen && top.frame) /* that screen is gone */
        fputs(top.frame, stderr);
    free(top.before.clients);
    free(top.now.clients);
    free(top.frame);
    close(top.quit);
    close(top.signal);
    return code;
}
