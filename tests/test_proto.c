/*
 * test_proto.c - the walk, the codec in both directions, its strictness. The golden packets are in
 * test_golden.c.
 */
#include <setjmp.h>
#include <stdarg.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

#include <cmocka.h>
#include <msgpack.h>

#include "proto/proto.h"
#include "tests/inputs.h"

union message {
#define MESSAGE_MEMBER(NAME, name) struct msg_##name as_##name;
    PROTO_MESSAGES(MESSAGE_MEMBER)
#undef MESSAGE_MEMBER
};

static const size_t sizes[] = {
#define MESSAGE_SIZE(NAME, name) [MSG_##NAME] = sizeof(struct msg_##name),
    PROTO_MESSAGES(MESSAGE_SIZE)
#undef MESSAGE_SIZE
};
enum { N_KINDS = sizeof(sizes) / sizeof(sizes[0]) };

/* --- packets written as text: 'str' 12 -3 1.5 true nil [..] {'key':value,..} --- */

static size_t count_items(const char *p)
{
    size_t n = p[0] != ']' && p[0] != '}';
    int depth = 0;

    for (bool quoted = false; depth >= 0; p++) {
        quoted ^= *p == '\'';
        if (quoted)
            continue;
        depth += *p == '[' || *p == '{';
        depth -= *p == ']' || *p == '}';
        n += depth == 0 && *p == ',';
    }
    return n;
}

static const char *pack_value(msgpack_packer *pk, const char *p);

static const char *pack_items(msgpack_packer *pk, const char *p)
{
    while (*p != ']' && *p != '}')
        p = *p == ',' || *p == ':' ? p + 1 : pack_value(pk, p);
    return p + 1;
}

static const char *pack_number(msgpack_packer *pk, const char *p)
{
    char *end;
    double x = strtod(p, &end);

    if (memchr(p, '.', (size_t)(end - p)))
        msgpack_pack_double(pk, x);
    else if (*p == '-')
        msgpack_pack_int64(pk, strtoll(p, NULL, 10));
    else
        msgpack_pack_uint64(pk, strtoull(p, NULL, 10));
    assert_true(end > p);
    return end;
}

static const char *pack_value(msgpack_packer *pk, const char *p)
{
    size_t len;

    switch (*p) {
    case '[':
        msgpack_pack_array(pk, count_items(p + 1));
        return pack_items(pk, p + 1);
    case '{':
        msgpack_pack_map(pk, count_items(p + 1));
        return pack_items(pk, p + 1);
    case '\'':
        len = strcspn(p + 1, "'");
        msgpack_pack_str_with_body(pk, p + 1, len);
        return p + len + 2;
    case 't':
        msgpack_pack_true(pk);
        return p + 4;
    case 'n':
        msgpack_pack_nil(pk);
        return p + 3;
    default:
        return pack_number(pk, p);
    }
}

/* Decode the packet written as `text`; *m is all zero but for what was read. */
static int decode(const char *text, enum msg_kind kind, union message *m, char *why)
{
    msgpack_sbuffer buf;
    msgpack_packer pk;
    struct packet packet;
    struct unpacker *u = unpacker_create();

    msgpack_sbuffer_init(&buf);
    msgpack_packer_init(&pk, &buf, msgpack_sbuffer_write);
    assert_int_equal(*pack_value(&pk, text), '\0');
    memset(m, 0, sizeof(*m));
    memset(why, 0, PROTO_TEXT_MAX);
    int rc = packet_open(u, buf.data, buf.size, &packet, why);
    if (!rc)
        rc = packet_decode(&packet, kind, m, why);
    msgpack_sbuffer_destroy(&buf);
    unpacker_destroy(u);
    return rc;
}

/* --- the walk --- */

static bool walk(const char *bytes, size_t len)
{
    /* In memory of its own, so that a sanitizer sees a byte too far. */
    char *copy = malloc(len ? len : 1);
    memcpy(copy, bytes, len);
    bool good = packet_walk(copy, len);
    free(copy);
    return good;
}
#define WALK(bytes) walk(bytes, sizeof(bytes) - 1)

static void test_walk_types(void **state)
{
    (void)state;
    static const struct {
        const char *bytes;
        size_t len;
    } good[] = {
#define VALUE(bytes) {bytes, sizeof(bytes) - 1}
        VALUE("\x00"),
        VALUE("\x7f"),
        VALUE("\xe0"),
        VALUE("\xff"),
        VALUE("\xc0"),
        VALUE("\xc2"),
        VALUE("\xc3"),
        VALUE("\xcc\xff"),
        VALUE("\xcd\xff\xff"),
        VALUE("\xce\xff\xff\xff\xff"),
        VALUE("\xcf\1\2\3\4\5\6\7\10"),
        VALUE("\xd0\x80"),
        VALUE("\xd1\x80\0"),
        VALUE("\xd2\x80\0\0\0"),
        VALUE("\xd3\x80\0\0\0\0\0\0\0"),
        VALUE("\xca\1\2\3\4"),
        VALUE("\xcb\1\2\3\4\5\6\7\10"),
        VALUE("\xa0"),
        VALUE("\xa3"
              "abc"),
        VALUE("\xd9\3"
              "abc"),
        VALUE("\xda\0\3"
              "abc"),
        VALUE("\xdb\0\0\0\3"
              "abc"),
        VALUE("\xc4\2\0\0"),
        VALUE("\xc5\0\2\0\0"),
        VALUE("\xc6\0\0\0\2\0\0"),
        VALUE("\x90"),
        VALUE("\x80"),
        VALUE("\x92\1\2"),
        VALUE("\x81\1\2"),
        VALUE("\xdc\0\2\1\2"),
        VALUE("\xdd\0\0\0\2\1\2"),
        VALUE("\xde\0\1\1\2"),
        VALUE("\xdf\0\0\0\1\1\2"),
    };
    for (size_t i = 0; i < sizeof(good) / sizeof(good[0]); i++) {
        char longer[16];
        memcpy(longer, good[i].bytes, good[i].len);
        longer[good[i].len] = 0;
        assert_true(walk(longer, good[i].len));
        assert_false(walk(longer, good[i].len + 1));
        for (size_t len = 0; len < good[i].len; len++)
            assert_false(walk(longer, len));
    }
}

static void test_walk_refuses(void **state)
{
    (void)state;
    assert_false(WALK("\xc1"));
    assert_false(WALK("\xd4\1\2")); /* fixext 1 */
    assert_false(WALK("\xd8\1"
                      "0123456789abcdef")); /* fixext 16 */
    assert_false(WALK("\xc7\1\1\1"));       /* ext 8 */
    assert_false(WALK("\xc9\0\0\0\1\1\1")); /* ext 32 */
    assert_false(WALK("\xdd\xff\xff\xff\xff\0\0\0"));
    assert_false(WALK("\xdf\xff\xff\xff\xff\0\0\0"));
    assert_false(WALK("\x93\x93\1\2\3\1")); /* each fits, together they do not */
    assert_false(WALK("\x92\xdc\0\3\1\2\3\xdc\0\3"));
    assert_false(WALK("\xdb\xff\xff\xff\xff"
                      "abc"));
    assert_false(WALK("\xc6\xff\xff\xff\xff"
                      "abc"));
    assert_false(WALK(""));
}

static void test_walk_depth(void **state)
{
    (void)state;
    for (size_t depth = 1; depth < 40; depth++) {
        char arrays[64], maps[128];
        memset(arrays, 0x91, depth);
        arrays[depth] = 1;
        assert_int_equal(walk(arrays, depth + 1), depth <= PROTO_DEPTH_MAX);
        for (size_t i = 0; i < depth; i++)
            memcpy(maps + 2 * i, "\x81\1", 2);
        maps[2 * depth] = 1;
        assert_int_equal(walk(maps, 2 * depth + 1), depth <= PROTO_DEPTH_MAX);
    }
}

/* What the walk lets through, msgpack-c unpacks whole. */
static void test_walk_random(void **state)
{
    struct rng rng;
    unsigned passed = 0;
    (void)state;

    rng_init(&rng, test_seed());
    for (int i = 0; i < 200000; i++) {
        char bytes[12];
        size_t len = 1 + (size_t)rng_below(&rng, sizeof(bytes)), offset = 0;
        uint64_t bits = rng_bits(&rng), more = rng_bits(&rng);
        memcpy(bytes, &bits, 8);
        memcpy(bytes + 8, &more, 4);
        if (i % 2) /* likely to be a container of small things */
            for (size_t k = 0; k < len; k++)
                bytes[k] = (char)(bytes[k] & (k % 3 ? 0x7f : 0x93));
        if (!walk(bytes, len))
            continue;
        msgpack_unpacked result;
        msgpack_unpacked_init(&result);
        assert_int_equal(msgpack_unpack_next(&result, bytes, len, &offset), MSGPACK_UNPACK_SUCCESS);
        assert_int_equal(offset, len);
        msgpack_unpacked_destroy(&result);
        passed++;
    }
    assert_true(passed > 1000);
}

/* --- there and back --- */

static void random_str(struct rng *rng, char *to, size_t size)
{
    static const char *const chars[] = {
        "a", "Z", "0", " ", "\"", "\\", "~", "\xc3\xb6", "\xe2\x82\xac", "\xf0\x9f\x90\xb8"};
    size_t wanted = (size_t)rng_below(rng, (int64_t)size), len = 0;

    for (;;) {
        const char *c = chars[rng_below(rng, 10)];
        if (len + strlen(c) > wanted)
            break;
        memcpy(to + len, c, strlen(c));
        len += strlen(c);
    }
    memset(to + len, 0, size - len);
}

/* As many as are set; behind them zeros. */
static uint32_t random_bytes(struct rng *rng, uint8_t handle[PROTO_HANDLE_MAX])
{
    uint32_t n = (uint32_t)rng_below(rng, PROTO_HANDLE_MAX + 1);

    for (uint32_t i = 0; i < n; i++)
        handle[i] = (uint8_t)rng_bits(rng);
    return n;
}

/* Of every size, so that every width on the wire occurs. */
static uint64_t random_u64(struct rng *rng)
{
    return rng_bits(rng) >> rng_below(rng, 64);
}

#define STR(field) random_str(rng, field, sizeof(field))
#define U32(field) field = (uint32_t)(rng_bits(rng) >> (32 + rng_below(rng, 32)))
#define U64(field) field = random_u64(rng)
#define F64(field) field = rng_normal(rng) * 1e6
#define BOOL(field) field = rng_below(rng, 2)

static void random_tensor(struct rng *rng, struct sage_tensor *t)
{
    uint32_t dtype;

    U32(dtype);
    t->dtype = dtype | 1; /* 0 in an optional tensor is one that is absent */
    U32(t->buffer);
    U64(t->offset);
    for (int i = 0; i < 4; i++) {
        t->shape[i] = (int64_t)random_u64(rng);
        t->stride[i] = -(int64_t)(random_u64(rng) / 2);
        if (t->shape[i] < 0)
            t->shape[i] = INT64_MIN;
    }
}

static void random_submit(struct rng *rng, struct msg_submit *m)
{
    struct sage_attn *a = &m->attn;

    U32(m->lane);
    U32(m->number);
    U32(m->event);
    U64(m->staged);
    BOOL(m->streamed);
    random_tensor(rng, &a->q);
    random_tensor(rng, &a->k);
    random_tensor(rng, &a->v);
    random_tensor(rng, &a->o);
    if (rng_below(rng, 2))
        random_tensor(rng, &a->mask);
    if (rng_below(rng, 2))
        random_tensor(rng, &a->lse);
    a->scale = (float)rng_normal(rng);
    a->variant = rng_below(rng, 1000);
    a->diagonal = rng_below(rng, 1000);
    BOOL(a->smooth_k);
    BOOL(a->smooth_v);
    BOOL(a->rotate_qk);
    BOOL(a->causal);
    a->window_left = (int64_t)rng_bits(rng);
    a->window_right = rng_below(rng, 300) - 150;
    if (!rng_below(rng, 2))
        return;
    a->n_seqs = 1 + (int32_t)rng_below(rng, SAGE_MAX_SEQS);
    m->n_q_offsets = m->n_k_offsets = (uint32_t)a->n_seqs + 1;
    for (int i = 0; i <= a->n_seqs; i++) {
        m->q_offsets[i] = (int32_t)rng_bits(rng);
        m->k_offsets[i] = (int32_t)rng_bits(rng);
    }
}

static void random_client(struct rng *rng, struct msg_client *c)
{
    U64(c->id), U64(c->pid), U64(c->uid);
    STR(c->name);
    U32(c->priority);
    U64(c->age_ns);
    U32(c->queued), U32(c->running);
    U64(c->done), U64(c->failed);
    F64(c->ops);
    U64(c->run_ns);
    U32(c->buffers);
    U64(c->mapped_bytes);
    STR(c->mode);
    F64(c->queue_p99_us);
}

static void random_stats(struct rng *rng, struct msg_stats *m)
{
#define RANDOM_STAT(type, key, unit, help) type(m->key);
    PROTO_STATS(RANDOM_STAT)
#undef RANDOM_STAT
    STR(m->state);
    m->n_kernels = (uint32_t)rng_below(rng, KERNELS_MAX + 1);
    for (uint32_t i = 0; i < m->n_kernels; i++) {
        STR(m->kernels[i].name);
        U64(m->kernels[i].jobs), U64(m->kernels[i].run_ns);
        F64(m->kernels[i].ops);
    }
}

static void random_done(struct rng *rng, struct msg_done *m)
{
    m->n_jobs = (uint32_t)rng_below(rng, DONE_MAX + 1);
    for (uint32_t i = 0; i < m->n_jobs; i++) {
        struct msg_done_job *j = &m->jobs[i];
        U32(j->lane), U32(j->number), U32(j->status);
        U64(j->queue_ns), U64(j->run_ns);
        STR(j->text);
    }
}

static void random_message(struct rng *rng, enum msg_kind kind, union message *m)
{
    memset(m, 0, sizeof(*m));
    switch (kind) {
    case MSG_HELLO:
        U32(m->as_hello.major), U32(m->as_hello.minor), U32(m->as_hello.priority);
        U64(m->as_hello.pid);
        STR(m->as_hello.name), STR(m->as_hello.library);
        BOOL(m->as_hello.page);
        break;
    case MSG_REGISTER:
        U32(m->as_register.buffer), U32(m->as_register.kind);
        U64(m->as_register.size);
        m->as_register.n_handle = random_bytes(rng, m->as_register.handle);
        m->as_register.n_chunks = (uint32_t)rng_below(rng, PROTO_FDS_MAX + 1);
        for (uint32_t i = 0; i < m->as_register.n_chunks; i++)
            U64(m->as_register.chunks[i]);
        BOOL(m->as_register.more);
        break;
    case MSG_UNREGISTER:
        U32(m->as_unregister.buffer);
        break;
    case MSG_SUBMIT:
        random_submit(rng, &m->as_submit);
        break;
    case MSG_CANCEL:
        U32(m->as_cancel.lane), U32(m->as_cancel.number);
        break;
    case MSG_EVENT:
        U32(m->as_event.event);
        m->as_event.n_handle = random_bytes(rng, m->as_event.handle);
        break;
    case MSG_WAITED:
        U32(m->as_waited.event);
        break;
    case MSG_CLIENTS:
        U64(m->as_clients.after);
        break;
    case MSG_EMPTY:
        break;
    case MSG_WELCOME:
        U32(m->as_welcome.major), U32(m->as_welcome.minor), U32(m->as_welcome.jobs),
            U32(m->as_welcome.buffers);
        U64(m->as_welcome.bytes), U64(m->as_welcome.pid), U64(m->as_welcome.boot);
        STR(m->as_welcome.version), STR(m->as_welcome.backend), STR(m->as_welcome.device);
        STR(m->as_welcome.uuid);
        U32(m->as_welcome.modes);
        break;
    case MSG_REGISTERED:
        U32(m->as_registered.buffer);
        U64(m->as_registered.size);
        break;
    case MSG_CANCELED:
        BOOL(m->as_canceled.canceled);
        break;
    case MSG_DONE:
        random_done(rng, &m->as_done);
        break;
    case MSG_LAUNCHED:
        U32(m->as_launched.lane), U32(m->as_launched.number), U32(m->as_launched.event);
        m->as_launched.n_handle = random_bytes(rng, m->as_launched.handle);
        break;
    case MSG_ERROR:
        U32(m->as_error.status);
        STR(m->as_error.text);
        break;
    case MSG_CLIENT_LIST:
        m->as_client_list.n_clients = (uint32_t)rng_below(rng, CLIENTS_MAX + 1);
        for (uint32_t i = 0; i < m->as_client_list.n_clients; i++)
            random_client(rng, &m->as_client_list.clients[i]);
        BOOL(m->as_client_list.more);
        break;
    case MSG_STATS:
        random_stats(rng, &m->as_stats);
        break;
    }
}

static void check_decodes(const uint8_t *bytes, size_t len, uint32_t op, uint32_t seq,
                          enum msg_kind kind, const union message *wanted)
{
    static union message got;
    struct unpacker *u = unpacker_create();
    struct packet packet;
    char why[PROTO_TEXT_MAX] = "";

    memset(&got, 0, sizeof(got));
    if (packet_open(u, bytes, len, &packet, why) || packet_decode(&packet, kind, &got, why))
        fail_msg("kind %d: %s", kind, why);
    assert_int_equal(packet.op, op);
    assert_int_equal(packet.seq, seq);
    if (kind == MSG_SUBMIT) {
        struct sage_attn *a = &got.as_submit.attn;
        assert_ptr_equal(a->q_offsets, a->n_seqs ? got.as_submit.q_offsets : NULL);
        assert_ptr_equal(a->k_offsets, a->n_seqs ? got.as_submit.k_offsets : NULL);
        a->q_offsets = a->k_offsets = NULL;
    }
    assert_memory_equal(&got, wanted, sizes[kind]);
    unpacker_destroy(u);
}

static void test_round_trip(void **state)
{
    static uint8_t bytes[PROTO_PACKET_MAX], small[PROTO_PACKET_MAX];
    static union message m;
    struct rng rng;
    (void)state;

    rng_init(&rng, test_seed());
    for (int i = 0; i < 200; i++) {
        for (int kind = 0; kind < N_KINDS; kind++) {
            uint32_t op = (uint32_t)rng_below(&rng, 40), seq = (uint32_t)rng_bits(&rng);
            random_message(&rng, (enum msg_kind)kind, &m);
            size_t len = packet_encode(bytes, sizeof(bytes), op, seq, (enum msg_kind)kind, &m);
            assert_true(len > 0);
            check_decodes(bytes, len, op, seq, (enum msg_kind)kind, &m);
            assert_int_equal(packet_encode(small, len, op, seq, (enum msg_kind)kind, &m), len);
            assert_memory_equal(small, bytes, len);
        }
    }
}

/* The largest of each kind fits a packet; cut anywhere, it is none; a buffer too small is told. */
static void test_sizes(void **state)
{
    static uint8_t bytes[PROTO_PACKET_MAX], small[PROTO_PACKET_MAX];
    static union message m;
    struct rng rng;
    (void)state;

    rng_init(&rng, test_seed());
    for (int kind = 0; kind < N_KINDS; kind++) {
        random_message(&rng, (enum msg_kind)kind, &m);
        size_t len = packet_encode(bytes, sizeof(bytes), 1, 1, (enum msg_kind)kind, &m);
        assert_true(len > 0);
        size_t step = len > 3000 ? 97 : 1; /* all of short packets, samples of long ones */
        for (size_t cut = 0; cut < len; cut += step) {
            assert_false(walk((char *)bytes, cut));
            assert_int_equal(packet_encode(small, cut, 1, 1, (enum msg_kind)kind, &m), 0);
        }
    }
    memset(&m, 0, sizeof(m));
    m.as_done.n_jobs = DONE_MAX;
    for (int i = 0; i < DONE_MAX; i++) {
        struct msg_done_job *j = &m.as_done.jobs[i];
        j->lane = j->number = j->status = UINT32_MAX;
        j->queue_ns = j->run_ns = UINT64_MAX;
        memset(j->text, 'x', sizeof(j->text) - 1);
    }
    assert_true(packet_encode(bytes, sizeof(bytes), OP_DONE, 0, MSG_DONE, &m));
    memset(&m, 0xff, sizeof(m));
    m.as_client_list.n_clients = CLIENTS_MAX;
    for (int i = 0; i < CLIENTS_MAX; i++) {
        m.as_client_list.clients[i].name[PROTO_NAME_MAX - 1] = '\0';
        m.as_client_list.clients[i].mode[PROTO_NAME_MAX - 1] = '\0';
    }
    m.as_client_list.more = true;
    assert_true(packet_encode(bytes, sizeof(bytes), OP_CLIENTS, 0, MSG_CLIENT_LIST, &m));
    memset(&m, 0, sizeof(m));
    m.as_submit.n_q_offsets = m.as_submit.n_k_offsets = SAGE_MAX_SEQS + 1;
    assert_true(packet_encode(bytes, sizeof(bytes), OP_SUBMIT, 0, MSG_SUBMIT, &m));
}

/* --- strictness --- */

#define TENSOR(more)                                                                               \
    "{'dtype':1,'buffer':1,'offset':64,'shape':[1,2,3,8],'stride':[48,24,8,1]" more "}"
#define OPTIONS                                                                                    \
    "'scale':0.5,'variant':1,'smooth_k':true,'smooth_v':true,'causal':true,"                       \
    "'diagonal':0,'window_left':-1,'window_right':0"
#define KVO "'k':" TENSOR("") ",'v':" TENSOR("") ",'o':" TENSOR("")
#define ATTN(q, more) "{'q':" q "," KVO "," OPTIONS more "}"
#define SUBMIT(attn, more) "[4,9,{'lane':3,'number':5,'attn':" attn more "}]"
#define QSHAPE(shape)                                                                              \
    SUBMIT(ATTN("{'dtype':1,'buffer':1,'offset':64,'shape':" shape ",'stride':[48,24,8,1]}", ""),  \
           "")

static void test_submit_is_strict(void **state)
{
    (void)state;
    static const struct {
        const char *text;
        int status;
        const char *why;
    } cases[] = {
        {SUBMIT(ATTN(TENSOR(""), ""), ""), 0, ""},
        {SUBMIT(ATTN(TENSOR(""), ""), ",'deadline':1"), SAGE_EUNSUPPORTED, "deadline: unknown key"},
        {SUBMIT(ATTN(TENSOR(""), ",'softcap':1.0"), ""), SAGE_EUNSUPPORTED,
         "attn.softcap: unknown key"},
        {SUBMIT(ATTN(TENSOR(",'zero':1"), ""), ""), SAGE_EUNSUPPORTED, "attn.q.zero: unknown key"},
        {SUBMIT(ATTN(TENSOR(""), ",'mask':" TENSOR(",'x':[1]")), ""), SAGE_EUNSUPPORTED,
         "attn.mask.x: unknown key"},
        {SUBMIT(ATTN(TENSOR(""), ",'a\033[2Jb':1"), ""), SAGE_EUNSUPPORTED,
         "attn.a?[2Jb: unknown key"},
        {SUBMIT(ATTN(TENSOR(""), ",'\xff\xfe':1"), ""), SAGE_EUNSUPPORTED, "attn.??: unknown key"},
        {SUBMIT(ATTN(TENSOR(""), ",'causal':true"), ""), SAGE_EPROTO, "attn.causal: given twice"},
        {SUBMIT(ATTN(TENSOR(",'offset':64"), ""), ""), SAGE_EPROTO, "attn.q.offset: given twice"},
        {SUBMIT(ATTN(TENSOR(""), ""), ",'lane':3"), SAGE_EPROTO, "lane: given twice"},
        {SUBMIT("{'q':" TENSOR("") "," KVO "}", ""), SAGE_EPROTO, "attn.scale: missing"},
        {SUBMIT("{" KVO "," OPTIONS "}", ""), SAGE_EPROTO, "attn.q: missing"},
        {"[4,9,{'lane':3,'attn':" ATTN(TENSOR(""), "") "}]", SAGE_EPROTO, "number: missing"},
        {"[4,9,{'lane':3,'number':5}]", SAGE_EPROTO, "attn: missing"},
        {SUBMIT("7", ""), SAGE_EPROTO, "attn: must be a map"},
        {SUBMIT(ATTN("[1]", ""), ""), SAGE_EPROTO, "attn.q: must be a map"},
        {SUBMIT(ATTN("{5:6}", ""), ""), SAGE_EPROTO, "attn.q.key 0: must be a string"},
        {QSHAPE("[1,2,3]"), SAGE_EPROTO, "attn.q.shape: must be 4 integers"},
        {QSHAPE("[1,2,3,4,5]"), SAGE_EPROTO, "attn.q.shape"},
        {QSHAPE("[1,2,3,4.0]"), SAGE_EPROTO, "attn.q.shape"},
        {QSHAPE("[1,2,3,18446744073709551615]"), SAGE_EPROTO, "attn.q.shape"},
        {QSHAPE("{1:2,3:4}"), SAGE_EPROTO, "attn.q.shape"},
        {QSHAPE("'1234'"), SAGE_EPROTO, "attn.q.shape"},
        {SUBMIT(ATTN(TENSOR(""), ""), ",'q_offsets':[0,1]"), SAGE_EPROTO, "q_offsets: must be"},
        {SUBMIT(ATTN(TENSOR(""), ""), ",'k_offsets':'abcd'"), SAGE_EPROTO, "k_offsets: must be"},
        /* What breaks the protocol goes before what is unknown, wherever it stands. */
        {"[4,9,{'new':1,'lane':-3,'number':5,'attn':" ATTN(TENSOR(""), "") "}]", SAGE_EPROTO,
         "lane: must be an integer from 0 to 4294967295"},
        {"[4,9,{'new':1,'number':5,'attn':" ATTN(TENSOR(""), "") "}]", SAGE_EPROTO,
         "lane: missing"},
        {SUBMIT(ATTN(TENSOR(",'zero':1"), ",'variant':2"), ""), SAGE_EPROTO,
         "attn.variant: given twice"},
        {SUBMIT(ATTN(TENSOR(",'zero':1"), ""), ",'k_offsets':1"), SAGE_EPROTO, "k_offsets"},
    };
    static union message m;
    char why[PROTO_TEXT_MAX];

    for (size_t i = 0; i < sizeof(cases) / sizeof(cases[0]); i++) {
        int rc = decode(cases[i].text, MSG_SUBMIT, &m, why);
        if (rc != cases[i].status || strncmp(why, cases[i].why, strlen(cases[i].why)))
            fail_msg("%s: got %d '%s', wanted %d '%s'", cases[i].text, rc, why, cases[i].status,
                     cases[i].why);
        if (rc == SAGE_EPROTO)
            continue;
        assert_int_equal(m.as_submit.lane, 3); /* enough to refuse the job by its number */
        assert_int_equal(m.as_submit.number, 5);
    }
}

static void test_wrong_types(void **state)
{
    (void)state;
    static const struct {
        const char *key, *right, *wrong[4];
    } fields[] = {
        {"attn.scale", "0.5", {"1", "true", "'x'", "nil"}},
        {"attn.causal", "true", {"1", "0", "'true'", "nil"}},
        {"attn.variant", "1", {"-1", "4294967296", "1.0", "true"}},
        {"attn.window_left", "-1", {"9223372036854775808", "0.0", "'1'", "[1]"}},
        {"attn.q.offset", "64", {"-1", "64.0", "'64'", "nil"}},
        {"attn.q.dtype", "1", {"-1", "'f16'", "1.0", "true"}},
        {"number", "5", {"-5", "'5'", "5.0", "4294967296"}},
    };
    static const char good[] = SUBMIT(ATTN(TENSOR(""), ""), "");
    static union message m;
    char text[2048], pattern[64], why[PROTO_TEXT_MAX];

    for (size_t i = 0; i < sizeof(fields) / sizeof(fields[0]); i++) {
        const char *dot = strrchr(fields[i].key, '.');
        snprintf(pattern, sizeof(pattern), "'%s':%s", dot ? dot + 1 : fields[i].key,
                 fields[i].right);
        const char *at = strstr(good, pattern);
        assert_non_null(at);
        const char *value = at + strlen(pattern) - strlen(fields[i].right);
        for (int w = 0; w < 4; w++) {
            snprintf(text, sizeof(text), "%.*s%s%s", (int)(value - good), good, fields[i].wrong[w],
                     value + strlen(fields[i].right));
            assert_int_equal(decode(text, MSG_SUBMIT, &m, why), SAGE_EPROTO);
            if (strncmp(why, fields[i].key, strlen(fields[i].key)))
                fail_msg("%s is not named in '%s'", fields[i].key, why);
        }
    }
}

static void test_offsets(void **state)
{
    static struct msg_submit m;
    static uint8_t bytes[PROTO_PACKET_MAX];
    static union message got;
    char why[PROTO_TEXT_MAX];
    struct unpacker *u = unpacker_create();
    struct packet packet;
    static const uint32_t counts[][2] = {{1, 1}, {3, 2}, {0, 2}, {2, 0}};
    (void)state;

    for (int i = 0; i < 4; i++) {
        m.n_q_offsets = counts[i][0];
        m.n_k_offsets = counts[i][1];
        size_t len = packet_encode(bytes, sizeof(bytes), OP_SUBMIT, 1, MSG_SUBMIT, &m);
        assert_int_equal(packet_open(u, bytes, len, &packet, why), 0);
        assert_int_equal(packet_decode(&packet, MSG_SUBMIT, &got, why), SAGE_EINVAL);
        assert_non_null(strstr(why, "_offsets: "));
    }
    m.n_q_offsets = SAGE_MAX_SEQS + 2; /* reads a little of what lies behind q_offsets */
    m.n_k_offsets = 0;
    size_t len = packet_encode(bytes, sizeof(bytes), OP_SUBMIT, 1, MSG_SUBMIT, &m);
    assert_int_equal(packet_open(u, bytes, len, &packet, why), 0);
    assert_int_equal(packet_decode(&packet, MSG_SUBMIT, &got, why), SAGE_EPROTO);
    unpacker_destroy(u);
}

/* Handles, as strings, and lists of sizes. */
static void test_register(void **state)
{
    (void)state;
#define REGISTER(more) "[2,1,{'buffer':1,'kind':3,'size':4096" more "}]"
#define SIXTEEN "1,2,3,4,5,6,7,8,9,10,11,12,13,14,15,16"
    static const struct {
        const char *text, *why;
        uint32_t n_chunks;
    } cases[] = {
        {REGISTER(""), NULL, 0},
        {REGISTER(",'chunks':[]"), NULL, 0},
        {REGISTER(",'chunks':[4096,18446744073709551615],'more':true"), NULL, 2},
        {REGISTER(",'chunks':[" SIXTEEN "," SIXTEEN "]"), NULL, PROTO_FDS_MAX},
        {REGISTER(",'chunks':[" SIXTEEN "," SIXTEEN ",33]"), "chunks: must be at most 32", 0},
        {REGISTER(",'chunks':[-1]"), "chunks: must be", 0},
        {REGISTER(",'chunks':[1,2.0]"), "chunks: must be", 0},
        {REGISTER(",'chunks':4096"), "chunks: must be", 0},
        {REGISTER(",'chunks':{}"), "chunks: must be", 0},
        {REGISTER(",'more':1"), "more: must be", 0},
        {REGISTER(",'handle':'abc'"), "handle: must be a bin", 0},
        {REGISTER(",'handle':[]"), "handle: must be a bin", 0},
        {"[10,1,{'event':1,'handle':5}]", "handle: must be a bin", 0},
    };
    static union message m;
    char why[PROTO_TEXT_MAX];

    for (size_t i = 0; i < sizeof(cases) / sizeof(cases[0]); i++) {
        bool is_event = !strncmp(cases[i].text, "[10", 3);
        int rc = decode(cases[i].text, is_event ? MSG_EVENT : MSG_REGISTER, &m, why);
        assert_int_equal(rc, cases[i].why ? SAGE_EPROTO : 0);
        if (rc && strncmp(why, cases[i].why, strlen(cases[i].why)))
            fail_msg("%s: '%s'", cases[i].text, why);
        if (!is_event)
            assert_int_equal(m.as_register.n_chunks, cases[i].n_chunks);
    }
}

/* A handle longer than its array must not be written behind it. */
static void test_long_handle(void **state)
{
    static uint8_t bytes[256];
    static struct msg_register m;
    struct unpacker *u = unpacker_create();
    struct packet packet;
    char why[PROTO_TEXT_MAX];
    (void)state;

    m.n_handle = PROTO_HANDLE_MAX;
    size_t len = packet_encode(bytes, sizeof(bytes), OP_REGISTER, 1, MSG_REGISTER, &m);
    uint8_t *head = memmem(bytes, len, "handle", 6);
    assert_non_null(head);
    assert_int_equal(head[7], PROTO_HANDLE_MAX); /* behind the type byte of a bin */
    head[7]++;
    memset(bytes + len, 0, 1);
    assert_int_equal(packet_open(u, bytes, len + 1, &packet, why), 0);
    assert_int_equal(packet_decode(&packet, MSG_REGISTER, &m, why), SAGE_EPROTO);
    assert_int_equal(m.n_handle, 0);
    unpacker_destroy(u);
}

#define HELLO(name) "[1,1,{'major':1,'minor':0,'pid':1,'name':'" name "','library':'','page':true}]"

static void test_strings(void **state)
{
    (void)state;
    static const struct {
        const char *text;
        bool good;
    } cases[] = {
        {HELLO(""), true},
        {HELLO("w\xc3\xb6rker \xe2\x82\xac \xf0\x9f\x90\xb8 \xc2\xa0"), true},
        {HELLO("123456789012345678901234567890123456789012345678901234567890123"), true},
        {HELLO("1234567890123456789012345678901234567890123456789012345678901234"), false},
        {HELLO("a\nb"), false},
        {HELLO("\t"), false},
        {HELLO("\x1b[31m"), false},
        {HELLO("\x7f"), false},
        {HELLO("\xc2\x9b"
               "31m"),
         false}, /* C1: a terminal takes it for ESC [ */
        {HELLO("\xff"), false},
        {HELLO("\x80"), false},
        {HELLO("\xc3"), false},
        {HELLO("\xc3("), false},
        {HELLO("\xc0\xaf"), false}, /* '/', too long */
        {HELLO("\xe0\x80\xaf"), false},
        {HELLO("\xed\xa0\x80"), false},     /* a surrogate */
        {HELLO("\xf4\x90\x80\x80"), false}, /* beyond U+10FFFF */
        {HELLO("\xe2\x82"), false},
    };
    static union message m;
    char why[PROTO_TEXT_MAX];

    for (size_t i = 0; i < sizeof(cases) / sizeof(cases[0]); i++) {
        int rc = decode(cases[i].text, MSG_HELLO, &m, why);
        if (rc != (cases[i].good ? 0 : SAGE_EPROTO))
            fail_msg("case %zu: %d '%s'", i, rc, why);
        if (rc)
            assert_int_equal(strncmp(why, "name: ", 6), 0);
    }
    msgpack_sbuffer buf; /* a NUL inside */
    msgpack_packer pk;
    struct packet packet;
    struct unpacker *u = unpacker_create();
    msgpack_sbuffer_init(&buf);
    msgpack_packer_init(&pk, &buf, msgpack_sbuffer_write);
    pack_value(&pk, HELLO("a#b"));
    *(char *)memchr(buf.data, '#', buf.size) = '\0';
    assert_int_equal(packet_open(u, buf.data, buf.size, &packet, why), 0);
    assert_int_equal(packet_decode(&packet, MSG_HELLO, &m, why), SAGE_EPROTO);
    msgpack_sbuffer_destroy(&buf);
    unpacker_destroy(u);
}

static void test_envelope(void **state)
{
    (void)state;
    static const struct {
        const char *text, *why;
    } cases[] = {
        {"7", "packet is not"},          {"[8,1]", "packet is not"}, {"{'op':8}", "packet is not"},
        {"[8,1,{},0]", "packet is not"}, {"['8',1,{}]", "op:"},      {"[-1,1,{}]", "op:"},
        {"[8,4294967296,{}]", "seq:"},   {"[8,1.0,{}]", "seq:"},     {"[8,1,[]]", "body:"},
        {"[8,1,nil]", "body:"},
    };
    static union message m;
    char why[PROTO_TEXT_MAX];

    for (size_t i = 0; i < sizeof(cases) / sizeof(cases[0]); i++) {
        assert_int_equal(decode(cases[i].text, MSG_EMPTY, &m, why), SAGE_EPROTO);
        if (strncmp(why, cases[i].why, strlen(cases[i].why)))
            fail_msg("%s: '%s'", cases[i].text, why);
    }
}

/* Outside of SUBMIT keys that are not known are skipped, and optional ones may be absent. */
static void test_others_are_lenient(void **state)
{
    static union message m;
    char why[PROTO_TEXT_MAX];
    (void)state;

    assert_int_equal(decode("[7,1,{}]", MSG_CLIENTS, &m, why), 0);
    assert_int_equal(m.as_clients.after, 0);
    assert_int_equal(decode("[7,1,{'sort':[1,{'x':2}],'after':12}]", MSG_CLIENTS, &m, why), 0);
    assert_int_equal(m.as_clients.after, 12);
    assert_int_equal(decode("[8,1,{'x':1,'y':[]}]", MSG_EMPTY, &m, why), 0);
    assert_int_equal(decode("[6,1,{'state':'running','kernels':[{'name':'a','jobs':1,'run_ns':2,"
                            "'ops':3.0,'new':4}]}]",
                            MSG_STATS, &m, why),
                     0);
    assert_int_equal(m.as_stats.n_kernels, 1);
    assert_int_equal(decode("[32,0,{'jobs':[{'lane':1}]}]", MSG_DONE, &m, why), SAGE_EPROTO);
    assert_string_equal(why, "jobs.number: missing");
    assert_int_equal(decode("[32,0,{'jobs':[3]}]", MSG_DONE, &m, why), SAGE_EPROTO);
    assert_string_equal(why, "jobs: must be a map");
    assert_int_equal(decode("[32,0,{'jobs':{}}]", MSG_DONE, &m, why), SAGE_EPROTO);
    assert_int_equal(decode("[7,1,{'after':1,'after':2}]", MSG_CLIENTS, &m, why), SAGE_EPROTO);
}

/* A list longer than its array must not be written behind it. */
static void test_long_lists(void **state)
{
    static union message m;
    static char text[65536];
    char why[PROTO_TEXT_MAX];
    (void)state;

    size_t n = (size_t)snprintf(text, sizeof(text), "[32,0,{'jobs':[");
    for (int i = 0; i <= DONE_MAX; i++)
        n += (size_t)snprintf(text + n, sizeof(text) - n,
                              "%s{'lane':1,'number':%d,'status':0,"
                              "'queue_ns':1,'run_ns':1}",
                              i ? "," : "", i);
    snprintf(text + n, sizeof(text) - n, "]}]");
    assert_int_equal(decode(text, MSG_DONE, &m, why), SAGE_EPROTO);
    assert_string_equal(why, "jobs: must be a list of at most 64");
    assert_int_equal(m.as_done.n_jobs, 0);
}

/* A text longer than PROTO_TEXT_MAX, prefixes and all, is cut and not written beyond. */
static void test_long_text(void **state)
{
    static union message m;
    static char text[2048];
    char *why = malloc(PROTO_TEXT_MAX);
    (void)state;

    snprintf(text, sizeof(text), SUBMIT(ATTN(TENSOR(",'%0300d':1"), ""), ""), 7);
    assert_int_equal(decode(text, MSG_SUBMIT, &m, why), SAGE_EUNSUPPORTED);
    assert_true(strlen(why) < PROTO_TEXT_MAX);
    assert_int_equal(strncmp(why, "attn.q.0000", 11), 0);
    free(why);
}

int main(void)
{
    const struct CMUnitTest tests[] = {
        cmocka_unit_test(test_walk_types),       cmocka_unit_test(test_walk_refuses),
        cmocka_unit_test(test_walk_depth),       cmocka_unit_test(test_walk_random),
        cmocka_unit_test(test_round_trip),       cmocka_unit_test(test_sizes),
        cmocka_unit_test(test_submit_is_strict), cmocka_unit_test(test_wrong_types),
        cmocka_unit_test(test_offsets),          cmocka_unit_test(test_strings),
        cmocka_unit_test(test_envelope),         cmocka_unit_test(test_others_are_lenient),
        cmocka_unit_test(test_long_lists),       cmocka_unit_test(test_long_text),
        cmocka_unit_test(test_register),         cmocka_unit_test(test_long_handle),
    };
    return cmocka_run_group_tests(tests, NULL, NULL);
}
