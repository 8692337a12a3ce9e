/*
 * log.h - one event per line on stderr: "<6>event=connected client=3 name=..." (sd-daemon(3)
 * levels).
 */
#ifndef SAGE_LOG_H
#define SAGE_LOG_H

#include <stdbool.h>
#include <systemd/sd-daemon.h>

/*
 * Level names as in the configuration ("err", "warning", "notice", "info", "debug"); -1: none such.
 */
int log_level_parse(const char *name);
void log_set_level(int level);

/* log_event(6, "connected", "client=%u", id) */
__attribute__((format(printf, 3, 4))) void log_event(int level, const char *event,
                                                     const char *format, ...);

#define log_error(...) log_event(3, __VA_ARGS__)
#define log_warning(...) log_event(4, __VA_ARGS__)
#define log_notice(...) log_event(5, __VA_ARGS__)
#define log_info(...) log_event(6, __VA_ARGS__)
#define log_debug(...) log_event(7, __VA_ARGS__)

#endif
