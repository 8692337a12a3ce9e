/*
 * test_golden.c - the packets in tests/golden/, byte for byte, in both directions. They pin the
 * wire format: a change that needs one of them changed breaks every client that there is.
 */
#include <ctype.h>
#include <setjmp.h>
#include <stdarg.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

#include <cmocka.h>

#include "proto/proto.h"

#define F16_TENSOR(id, at, heads, tokens)                                                          \
    {                                                                                              \
        .dtype = SAGE_F16, .buffer = id, .offset = at, .shape = {1, heads, tokens, 64},            \
        .stride = {                                                                                \
            heads * tokens * 64,                                                                   \
            tokens * 64,                                                                           \
            64,                                                                                    \
            1                                                                                      \
        }                                                                                          \
    }

static const struct msg_hello hello = {
    .major = 1,
    .minor = 0,
    .priority = PRIORITY_HIGH,
    .pid = 4711,
    .name = "w\xc3\xb6rker",
    .library = "0.1.0",
    .page = true,
};
static const struct msg_welcome welcome = {
    .major = 1,
    .minor = 0,
    .jobs = 256,
    .bytes = UINT64_C(1) << 33,
    .buffers = 256,
    .pid = 812,
    .boot = UINT64_C(0xfedcba9876543210),
    .version = "0.1.0",
    .backend = "cpu",
    .device = "CPU, 8 threads",
};
static const struct msg_welcome welcome_gpu = {
    .major = 1,
    .minor = 1,
    .jobs = 256,
    .bytes = UINT64_C(1) << 36,
    .buffers = 256,
    .pid = 812,
    .boot = 1,
    .version = "0.1.0",
    .backend = "cuda",
    .device = "NVIDIA H100 80GB HBM3",
    .uuid = "GPU-01234567-89ab-cdef-0123-456789abcdef",
    .modes = MODE_SYNC | MODE_EVENT,
};
static const struct msg_register reg = {.buffer = 1, .kind = BUFFER_MEMFD, .size = 65536};
static const struct msg_registered registered = {.buffer = 1, .size = 65536};
#define HANDLE                                                                                     \
    {                                                                                              \
        0x10, 0x32, 0x54, 0x76, [PROTO_HANDLE_MAX - 1] = 0xfe                                      \
    }
static const struct msg_register register_ipc = {
    .buffer = 2,
    .kind = BUFFER_CUDA_IPC,
    .size = 20971520,
    .n_handle = PROTO_HANDLE_MAX,
    .handle = HANDLE,
};
static const struct msg_register register_vmm = {
    .buffer = 3,
    .kind = BUFFER_VMM,
    .size = 25165824,
    .n_chunks = 2,
    .chunks = {2097152, 20971520},
    .more = true,
};
static const struct msg_register register_rest = {
    .buffer = 3,
    .kind = BUFFER_VMM,
    .size = 25165824,
    .n_chunks = 1,
    .chunks = {2097152},
};
static const struct msg_event event = {
    .event = 1,
    .n_handle = PROTO_HANDLE_MAX,
    .handle = HANDLE,
};
static const struct msg_launched launched = {
    .lane = 1,
    .number = 2,
    .event = 7,
    .n_handle = PROTO_HANDLE_MAX,
    .handle = HANDLE,
};
static const struct msg_waited waited = {.event = 7};
static const struct msg_unregister unregister = {.buffer = 70000};
static const struct msg_submit submit = {
    .lane = 3,
    .number = 200,
    .attn =
        {
            .q = F16_TENSOR(1, 0, 4, 32),
            .k = F16_TENSOR(1, 16384, 2, 100),
            .v = F16_TENSOR(1, 41984, 2, 100),
            .o = F16_TENSOR(2, 0, 4, 32),
            .scale = 0.125f,
            .variant = SAGE_INT8_FP16,
            .smooth_k = true,
            .causal = true,
            .diagonal = SAGE_BOTTOM_RIGHT,
            .window_left = SAGE_UNLIMITED,
            .window_right = SAGE_UNLIMITED,
        },
};
static const struct msg_submit submit_mask = {
    .lane = 0,
    .number = UINT32_MAX,
    .attn =
        {
            .q = F16_TENSOR(1, 0, 1, 8),
            .k = F16_TENSOR(1, 1024, 1, 8),
            .v = F16_TENSOR(1, 2048, 1, 8),
            .o = F16_TENSOR(1, 3072, 1, 8),
            .mask = {SAGE_BOOL, 1, 4096, NULL, {1, 1, 8, 8}, {0, 0, 8, 1}},
            .lse = {SAGE_F32, 1, UINT64_C(1) << 40, NULL, {1, 1, 8, 1}, {8, 8, 1, 1}},
            .variant = SAGE_INT8_FP8,
            .smooth_v = true,
            .window_left = 127,
            .window_right = 300,
        },
};
static const struct msg_submit submit_varlen = {
    .lane = 63,
    .number = 1,
    .attn =
        {
            .q = F16_TENSOR(1, 0, 1, 12),
            .k = F16_TENSOR(1, 1536, 1, 12),
            .v = F16_TENSOR(1, 3072, 1, 12),
            .o = F16_TENSOR(1, 4608, 1, 12),
            .smooth_k = true,
            .window_left = SAGE_UNLIMITED,
            .window_right = 0,
            .n_seqs = 2,
        },
    .n_q_offsets = 3,
    .n_k_offsets = 3,
    .q_offsets = {0, 5, 12},
    .k_offsets = {0, 12, 12},
};
/* Four rows of one buffer, and what has to be said besides. */
#define SMALL_ATTN                                                                                 \
    {                                                                                              \
        .q = F16_TENSOR(2, 0, 1, 8), .k = F16_TENSOR(2, 1024, 1, 8),                               \
        .v = F16_TENSOR(2, 2048, 1, 8), .o = F16_TENSOR(2, 3072, 1, 8), .smooth_k = true,          \
        .window_left = SAGE_UNLIMITED, .window_right = SAGE_UNLIMITED,                             \
    }

static const struct msg_submit submit_event = {
    .lane = 1,
    .number = 2,
    .event = 1,
    .staged = 4096,
    .attn = SMALL_ATTN,
};
static const struct msg_submit submit_lane = {
    .lane = 5,
    .number = 64,
    .streamed = true,
    .attn = SMALL_ATTN,
};
static const struct msg_cancel cancel = {.lane = 3, .number = 200};
static const struct msg_canceled canceled = {.canceled = true};
static const struct msg_empty empty;
static const struct msg_clients clients = {.after = 12};
static const struct msg_clients clients_first;
static const struct msg_client_list client_list = {
    .n_clients = 1,
    .clients = {{.id = 13,
                 .pid = 4711,
                 .uid = 1000,
                 .name = "w\xc3\xb6rker",
                 .priority = 2,
                 .age_ns = 90000000000,
                 .queued = 2,
                 .running = 1,
                 .done = 40,
                 .failed = 1,
                 .ops = 1.5e12,
                 .run_ns = 80000000,
                 .buffers = 2,
                 .mapped_bytes = 131072}},
};
static const struct msg_client_list client_modes = {
    .n_clients = 1,
    .clients = {{.id = 14, .pid = 1, .name = "", .mode = "event"}},
};
static const struct msg_done done = {
    .n_jobs = 2,
    .jobs = {{.lane = 3, .number = 200, .queue_ns = 15000, .run_ns = 2000000},
             {.lane = 0,
              .number = UINT32_MAX,
              .status = 6,
              .text = "q: reaches beyond the 65536 bytes of buffer 1"}},
};
static const struct msg_error error = {
    .status = 5,
    .text = "buffer: 70000 is not registered",
};
static const struct msg_stats stats = {
    .uptime_ns = 3600000000000,
    .clients = 1,
    .clients_total = 7,
    .accepted = 41,
    .done = 40,
    .failed = 1,
    .ops = 1.5e12,
    .run_ns = 80000000,
    .run_p50_us = 1966.08,
    .slots = 3,
    .slot_bytes = 67108864,
    .state = "running",
    .n_kernels = 1,
    .kernels = {{.name = "cpu int8_fp16 f16 d64", .jobs = 40, .run_ns = 80000000, .ops = 1.5e12}},
};

static const struct golden {
    const char *name;
    uint32_t op, seq;
    enum msg_kind kind;
    size_t size;
    const void *message;
} golden[] = {
    {"hello", OP_HELLO, 1, MSG_HELLO, sizeof(hello), &hello},
    {"welcome", OP_HELLO, 1, MSG_WELCOME, sizeof(welcome), &welcome},
    {"welcome_gpu", OP_HELLO, 1, MSG_WELCOME, sizeof(welcome_gpu), &welcome_gpu},
    {"register", OP_REGISTER, 2, MSG_REGISTER, sizeof(reg), &reg},
    {"registered", OP_REGISTER, 2, MSG_REGISTERED, sizeof(registered), &registered},
    {"register_ipc", OP_REGISTER, 3, MSG_REGISTER, sizeof(register_ipc), &register_ipc},
    {"register_vmm", OP_REGISTER, 4, MSG_REGISTER, sizeof(register_vmm), &register_vmm},
    {"register_rest", OP_REGISTER, 5, MSG_REGISTER, sizeof(register_rest), &register_rest},
    {"unregister", OP_UNREGISTER, 300, MSG_UNREGISTER, sizeof(unregister), &unregister},
    {"unregistered", OP_UNREGISTER, 300, MSG_EMPTY, sizeof(empty), &empty},
    {"submit", OP_SUBMIT, 4, MSG_SUBMIT, sizeof(submit), &submit},
    {"submit_mask", OP_SUBMIT, 5, MSG_SUBMIT, sizeof(submit_mask), &submit_mask},
    {"submit_varlen", OP_SUBMIT, 6, MSG_SUBMIT, sizeof(submit_varlen), &submit_varlen},
    {"submit_event", OP_SUBMIT, 7, MSG_SUBMIT, sizeof(submit_event), &submit_event},
    {"submit_lane", OP_SUBMIT, 7, MSG_SUBMIT, sizeof(submit_lane), &submit_lane},
    {"cancel", OP_CANCEL, 7, MSG_CANCEL, sizeof(cancel), &cancel},
    {"canceled", OP_CANCEL, 7, MSG_CANCELED, sizeof(canceled), &canceled},
    {"stats", OP_STATS, 65536, MSG_EMPTY, sizeof(empty), &empty},
    {"stats_reply", OP_STATS, 65536, MSG_STATS, sizeof(stats), &stats},
    {"clients", OP_CLIENTS, 8, MSG_CLIENTS, sizeof(clients), &clients},
    {"clients_first", OP_CLIENTS, 9, MSG_CLIENTS, sizeof(clients_first), &clients_first},
    {"client_list", OP_CLIENTS, 8, MSG_CLIENT_LIST, sizeof(client_list), &client_list},
    {"client_modes", OP_CLIENTS, 9, MSG_CLIENT_LIST, sizeof(client_modes), &client_modes},
    {"ping", OP_PING, UINT32_MAX, MSG_EMPTY, sizeof(empty), &empty},
    {"drain", OP_DRAIN, 10, MSG_EMPTY, sizeof(empty), &empty},
    {"event", OP_EVENT, 11, MSG_EVENT, sizeof(event), &event},
    {"launched", OP_LAUNCHED, 0, MSG_LAUNCHED, sizeof(launched), &launched},
    {"waited", OP_WAITED, 12, MSG_WAITED, sizeof(waited), &waited},
    {"done", OP_DONE, 0, MSG_DONE, sizeof(done), &done},
    {"error", OP_ERROR, 300, MSG_ERROR, sizeof(error), &error},
};

/* Two hex digits a byte, anything between; '#' to the end of the line is a comment. */
static size_t read_hex(const char *name, uint8_t *bytes, size_t size)
{
    const char *dir = getenv("SAGE_SRCDIR");
    char path[512], line[256];
    size_t n = 0;

    snprintf(path, sizeof(path), "%s/tests/golden/%s.hex", dir ? dir : ".", name);
    FILE *file = fopen(path, "r");
    if (!file)
        fail_msg("%s: cannot be read", path);
    while (fgets(line, sizeof(line), file)) {
        line[strcspn(line, "#\n")] = '\0';
        for (char *p = line; *p; p += isspace((unsigned char)*p) ? 1 : 2) {
            unsigned value;
            if (isspace((unsigned char)*p))
                continue;
            assert_int_equal(sscanf(p, "%2x", &value), 1);
            assert_true(n < size);
            bytes[n++] = (uint8_t)value;
        }
    }
    fclose(file);
    return n;
}

/* A new packet is written by hand, or taken from here and looked at. */
static void print_hex(const char *name, const uint8_t *bytes, size_t len)
{
    printf("%s.hex:", name);
    for (size_t i = 0; i < len; i++)
        printf("%s%02x", i % 16 ? " " : "\n", bytes[i]);
    printf("\n");
}

static void test_encode(void **state)
{
    static uint8_t wanted[PROTO_PACKET_MAX], got[PROTO_PACKET_MAX];
    (void)state;

    for (size_t i = 0; i < sizeof(golden) / sizeof(golden[0]); i++) {
        const struct golden *g = &golden[i];
        size_t n = packet_encode(got, sizeof(got), g->op, g->seq, g->kind, g->message);
        size_t len = read_hex(g->name, wanted, sizeof(wanted));
        if (n == len && !memcmp(got, wanted, len))
            continue;
        print_hex(g->name, got, n);
        fail_msg("%s is encoded otherwise", g->name);
    }
}

static void test_decode(void **state)
{
    static uint8_t bytes[PROTO_PACKET_MAX];
    static struct msg_submit
        got[2]; /* the largest message, and room to see what is written behind */
    struct unpacker *u = unpacker_create();
    struct packet packet;
    char why[PROTO_TEXT_MAX];
    (void)state;

    for (size_t i = 0; i < sizeof(golden) / sizeof(golden[0]); i++) {
        const struct golden *g = &golden[i];
        size_t len = read_hex(g->name, bytes, sizeof(bytes));
        memset(got, 0, sizeof(got));
        if (packet_open(u, bytes, len, &packet, why) || packet_decode(&packet, g->kind, got, why))
            fail_msg("%s: %s", g->name, why);
        assert_int_equal(packet.op, g->op);
        assert_int_equal(packet.seq, g->seq);
        if (g->kind == MSG_SUBMIT) {
            assert_true(!got->attn.n_seqs == !got->attn.q_offsets);
            got->attn.q_offsets = got->attn.k_offsets = NULL;
        }
        assert_memory_equal(got, g->message, g->size);
    }
    unpacker_destroy(u);
}

int main(void)
{
    const struct CMUnitTest tests[] = {
        cmocka_unit_test(test_encode),
        cmocka_unit_test(test_decode),
    };
    return cmocka_run_group_tests(tests, NULL, NULL);
}
