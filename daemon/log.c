/*
 * log.c - the log; the level is the daemon's only global.
 */
#include "daemon/log.h"

#include <stdarg.h>
#include <stdio.h>
#include <string.h>
#include <unistd.h>

static int log_level = 6;

int log_level_parse(const char *name)
{
    static const char *const names[] = {[3] = "err", "warning", "notice", "info", "debug"};

    for (int i = 3; i <= 7; i++)
        if (!strcmp(name, names[i]))
            return i;
    return -1;
}

void log_set_level(int level)
{
    log_level = level;
}

void log_event(int level, const char *event, const char *format, ...)
{
    char line[1024];
    va_list args;

    if (level > log_level)
        return;
    int n = snprintf(line, sizeof(line), "<%d>event=%s ", level, event);
    va_start(args, format);
    int m = vsnprintf(line + n, sizeof(line) - (size_t)n - 1, format, args);
    va_end(args);
    n = m < 0 ? n : n + m;
    if (n > (int)sizeof(line) - 2)
        n = (int)sizeof(line) - 2;
    line[n++] = '\n';
    /* One write, so that lines of several processes do not mix; nothing to be done if it fails. */
    if (write(STDERR_FILENO, line, (size_t)n) < 0)
        return;
}
