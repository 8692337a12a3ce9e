/*
 * ctl_clients.c - who is connected: a page of the list at a time, as a table or as JSON.
 */
#include "client/ctl.h"

#include <getopt.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

static const char *priority_name(uint32_t priority)
{
    static const char *const names[] = {"low", "normal", "high"};

    return priority <= PRIORITY_HIGH ? names[priority] : "?";
}

int clients_fetch(struct ctl *ctl, struct msg_client **list, size_t *n)
{
    struct msg_client_list page = {.more = true};
    struct msg_clients ask = {0};

    *list = NULL;
    *n = 0;
    while (page.more) {
        int rc = conn_call(&ctl->conn, OP_CLIENTS, MSG_CLIENTS, &ask, NULL, MSG_CLIENT_LIST, &page);
        struct msg_client *longer =
            rc ? NULL : realloc(*list, (*n + page.n_clients + 1) * sizeof(**list));
        if (!rc && !longer)
            rc = error_set(SAGE_ENOMEM, "out of memory");
        if (!rc && page.more && page.n_clients == 0)
            rc = error_set(SAGE_EPROTO, "from the daemon: CLIENTS: more, but none on this page");
        if (longer)
            *list = longer;
        if (rc) {
            free(*list);
            *list = NULL;
            return rc;
        }
        memcpy(*list + *n, page.clients, page.n_clients * sizeof(**list));
        *n += page.n_clients;
        ask.after = *n ? (*list)[*n - 1].id : 0;
    }
    return 0;
}

void clients_print(const struct msg_client *list, size_t n)
{
    printf("%6s %8s %6s %-18s %-8s %-5s %8s %7s %7s %9s %7s %8s %8s %10s\n", "ID", "PID", "UID",
           "NAME", "PRIORITY", "MODE", "AGE", "QUEUED", "RUNNING", "DONE", "FAILED", "TOPS",
           "BUFFERS", "MAPPED");
    for (size_t i = 0; i < n; i++) {
        const struct msg_client *c = &list[i];
        printf("%6llu %8llu %6llu %-18.18s %-8s %-5s %8s %7u %7u %9llu %7llu %8s %8u %10s\n",
               (unsigned long long)c->id, (unsigned long long)c->pid, (unsigned long long)c->uid,
               c->name, priority_name(c->priority), c->mode[0] ? c->mode : "-",
               text_ns((double)c->age_ns).s, c->queued, c->running, (unsigned long long)c->done,
               (unsigned long long)c->failed, text_tops(c->ops, (double)c->run_ns).s, c->buffers,
               text_bytes((double)c->mapped_bytes).s);
    }
}

json_t *clients_json(const struct msg_client *list, size_t n)
{
    json_t *array = json_array();

    for (size_t i = 0; i < n; i++) {
        const struct msg_client *c = &list[i];
        json_array_append_new(
            array,
            json_pack("{sI sI sI ss ss ss sI si si sI sI sf sI si sI sf}", "id", (json_int_t)c->id,
                      "pid", (json_int_t)c->pid, "uid", (json_int_t)c->uid, "name", c->name,
                      "priority", priority_name(c->priority), "mode", c->mode, "age_ns",
                      (json_int_t)c->age_ns, "queued", (int)c->queued, "running", (int)c->running,
                      "done", (json_int_t)c->done, "failed", (json_int_t)c->failed, "ops", c->ops,
                      "run_ns", (json_int_t)c->run_ns, "buffers", (int)c->buffers, "mapped_bytes",
                      (json_int_t)c->mapped_bytes, "queue_p99_us", c->queue_p99_us));
    }
    return array;
}

int ctl_clients(struct ctl *ctl, int argc, char **argv)
{
    static const struct option options[] = {{"json", no_argument, NULL, 'j'}, {0}};
    struct msg_client *list = NULL;
    bool json = false;
    size_t n;
    int option;

    while ((option = getopt_long(argc, argv, "j", options, NULL)) != -1) {
        if (option != 'j')
            return ctl_usage(argv[0]);
        json = true;
    }
    if (optind < argc)
        return ctl_usage(argv[0]);
    if (ctl_connect(ctl) || clients_fetch(ctl, &list, &n))
        return ctl_fail();
    if (json)
        ctl_print_json(clients_json(list, n), false);
    else
        clients_print(list, n);
    free(list);
    return CTL_OK;
}
