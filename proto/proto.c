/*
 * proto.c - the codec: one table per message, read by one encoder and one decoder.
 */
#include "proto/proto.h"

#include <msgpack.h>
#include <stdarg.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

/* --- the messages as tables --- */

enum kind {
    K_BOOL,
    K_U32,
    K_U64,
    K_I64,
    K_F32,
    K_F64,
    K_STR,
    K_I64X4,
    K_BYTES,   /* a bin */
    K_OFFSETS, /* int32 in a bin */
    K_U64S,    /* an array */
    K_MAP,
    K_LIST,
};

struct field {
    const char *key;
    uint32_t key_len;
    enum kind kind;
    bool required; /* otherwise absent stands for zero, and zero is not sent */
    size_t offset;
    size_t capacity;         /* K_STR: bytes; K_BYTES and what follows: elements */
    size_t count_offset;     /* K_BYTES and what follows: where their number (uint32_t) is */
    const struct table *sub; /* K_MAP, K_LIST */
};

struct table {
    const struct field *fields;
    size_t n_fields;
    size_t size;   /* bytes of the struct, the distance in a list */
    size_t zeroed; /* bytes to clear before decoding: arrays behind that are filled as counted */
    bool strict;   /* unknown keys are refused: an option must never be dropped */
};

/* clang-format off */
#define FIELD(type, member, kind, required)                                                        \
    { #member, sizeof(#member) - 1, kind, required, offsetof(struct type, member),                 \
      sizeof(((struct type *)0)->member), 0, NULL }
#define REQ(type, member, kind) FIELD(type, member, kind, true)
#define OPT(type, member, kind) FIELD(type, member, kind, false)
#define SUB(type, member, required, table)                                                         \
    { #member, sizeof(#member) - 1, K_MAP, required, offsetof(struct type, member), 0, 0, &(table) }
#define ARRAY(type, member, kind, table)                                                           \
    { #member, sizeof(#member) - 1, kind, false, offsetof(struct type, member),                    \
      sizeof(((struct type *)0)->member) / sizeof(((struct type *)0)->member[0]),                  \
      offsetof(struct type, n_##member), table }
#define TABLE_OF(type, fields, zeroed, strict)                                                     \
    { fields, sizeof(fields) / sizeof((fields)[0]), sizeof(struct type), zeroed, strict }
#define TABLE(name, zeroed, strict)                                                                \
    static const struct table name##_table = TABLE_OF(msg_##name, name##_fields, zeroed, strict)
#define WHOLE(name) TABLE(name, sizeof(struct msg_##name), false)
/* clang-format on */

_Static_assert(sizeof(enum sage_dtype) == 4 && sizeof(enum sage_variant) == 4 &&
                   sizeof(enum sage_diagonal) == 4,
               "enums travel as K_U32");

static const struct field tensor_fields[] = {
    REQ(sage_tensor, dtype, K_U32),    REQ(sage_tensor, buffer, K_U32),
    REQ(sage_tensor, offset, K_U64),   REQ(sage_tensor, shape, K_I64X4),
    REQ(sage_tensor, stride, K_I64X4),
};
static const struct table tensor_table =
    TABLE_OF(sage_tensor, tensor_fields, sizeof(struct sage_tensor), true);

static const struct field attn_fields[] = {
    SUB(sage_attn, q, true, tensor_table),
    SUB(sage_attn, k, true, tensor_table),
    SUB(sage_attn, v, true, tensor_table),
    SUB(sage_attn, o, true, tensor_table),
    SUB(sage_attn, mask, false, tensor_table),
    SUB(sage_attn, lse, false, tensor_table),
    REQ(sage_attn, scale, K_F32),
    REQ(sage_attn, variant, K_U32),
    REQ(sage_attn, smooth_k, K_BOOL),
    REQ(sage_attn, smooth_v, K_BOOL),
    OPT(sage_attn, rotate_qk, K_BOOL),
    REQ(sage_attn, causal, K_BOOL),
    REQ(sage_attn, diagonal, K_U32),
    REQ(sage_attn, window_left, K_I64),
    REQ(sage_attn, window_right, K_I64),
};
static const struct table attn_table =
    TABLE_OF(sage_attn, attn_fields, sizeof(struct sage_attn), true);

static const struct field hello_fields[] = {
    REQ(msg_hello, major, K_U32), REQ(msg_hello, minor, K_U32), OPT(msg_hello, priority, K_U32),
    REQ(msg_hello, pid, K_U64),   REQ(msg_hello, name, K_STR),  REQ(msg_hello, library, K_STR),
    REQ(msg_hello, page, K_BOOL),
};
WHOLE(hello);

static const struct field register_fields[] = {
    REQ(msg_register, buffer, K_U32),
    REQ(msg_register, kind, K_U32),
    REQ(msg_register, size, K_U64),
    ARRAY(msg_register, handle, K_BYTES, NULL),
    ARRAY(msg_register, chunks, K_U64S, NULL),
    OPT(msg_register, more, K_BOOL),
};
WHOLE(register);

static const struct field unregister_fields[] = {REQ(msg_unregister, buffer, K_U32)};
WHOLE(unregister);

static const struct field submit_fields[] = {
    REQ(msg_submit, lane, K_U32),
    REQ(msg_submit, number, K_U32),
    OPT(msg_submit, prompt, K_BOOL),
    OPT(msg_submit, event, K_U32),
    OPT(msg_submit, staged, K_U64),
    OPT(msg_submit, streamed, K_BOOL),
    SUB(msg_submit, attn, true, attn_table),
    ARRAY(msg_submit, q_offsets, K_OFFSETS, NULL),
    ARRAY(msg_submit, k_offsets, K_OFFSETS, NULL),
};
TABLE(submit, offsetof(struct msg_submit, q_offsets), true);

static const struct field cancel_fields[] = {
    REQ(msg_cancel, lane, K_U32),
    REQ(msg_cancel, number, K_U32),
};
WHOLE(cancel);

static const struct field event_fields[] = {
    REQ(msg_event, event, K_U32),
    ARRAY(msg_event, handle, K_BYTES, NULL),
};
WHOLE(event);

static const struct field waited_fields[] = {REQ(msg_waited, event, K_U32)};
WHOLE(waited);

static const struct field clients_fields[] = {OPT(msg_clients, after, K_U64)};
WHOLE(clients);

static const struct table empty_table = {NULL, 0, sizeof(struct msg_empty), 0, false};

static const struct field welcome_fields[] = {
    REQ(msg_welcome, major, K_U32),   REQ(msg_welcome, minor, K_U32),
    REQ(msg_welcome, jobs, K_U32),    REQ(msg_welcome, bytes, K_U64),
    REQ(msg_welcome, buffers, K_U32), REQ(msg_welcome, pid, K_U64),
    REQ(msg_welcome, boot, K_U64),    REQ(msg_welcome, version, K_STR),
    REQ(msg_welcome, backend, K_STR), REQ(msg_welcome, device, K_STR),
    OPT(msg_welcome, uuid, K_STR),    OPT(msg_welcome, modes, K_U32),
};
WHOLE(welcome);

static const struct field registered_fields[] = {
    REQ(msg_registered, buffer, K_U32),
    REQ(msg_registered, size, K_U64),
};
WHOLE(registered);

static const struct field canceled_fields[] = {REQ(msg_canceled, canceled, K_BOOL)};
WHOLE(canceled);

static const struct field done_job_fields[] = {
    REQ(msg_done_job, lane, K_U32),   REQ(msg_done_job, number, K_U32),
    REQ(msg_done_job, status, K_U32), REQ(msg_done_job, queue_ns, K_U64),
    REQ(msg_done_job, run_ns, K_U64), OPT(msg_done_job, text, K_STR),
};
WHOLE(done_job);
static const struct field done_fields[] = {ARRAY(msg_done, jobs, K_LIST, &done_job_table)};
TABLE(done, offsetof(struct msg_done, jobs), false);

static const struct field launched_fields[] = {
    REQ(msg_launched, lane, K_U32),
    REQ(msg_launched, number, K_U32),
    REQ(msg_launched, event, K_U32),
    ARRAY(msg_launched, handle, K_BYTES, NULL),
};
WHOLE(launched);

static const struct field error_fields[] = {
    REQ(msg_error, status, K_U32),
    REQ(msg_error, text, K_STR),
};
WHOLE(error);

static const struct field client_fields[] = {
    REQ(msg_client, id, K_U64),       REQ(msg_client, pid, K_U64),
    REQ(msg_client, uid, K_U64),      REQ(msg_client, name, K_STR),
    REQ(msg_client, priority, K_U32), REQ(msg_client, age_ns, K_U64),
    REQ(msg_client, queued, K_U32),   REQ(msg_client, running, K_U32),
    REQ(msg_client, done, K_U64),     REQ(msg_client, failed, K_U64),
    REQ(msg_client, ops, K_F64),      REQ(msg_client, run_ns, K_U64),
    REQ(msg_client, buffers, K_U32),  REQ(msg_client, mapped_bytes, K_U64),
    OPT(msg_client, mode, K_STR),     OPT(msg_client, queue_p99_us, K_F64),
};
WHOLE(client);
static const struct field client_list_fields[] = {
    ARRAY(msg_client_list, clients, K_LIST, &client_table),
    REQ(msg_client_list, more, K_BOOL),
};
TABLE(client_list, sizeof(struct msg_client_list), false);

static const struct field kernel_fields[] = {
    REQ(msg_kernel, name, K_STR),
    REQ(msg_kernel, jobs, K_U64),
    REQ(msg_kernel, run_ns, K_U64),
    REQ(msg_kernel, ops, K_F64),
};
WHOLE(kernel);
static const struct field stats_fields[] = {
#define STATS_FIELD(type, key, unit, help) OPT(msg_stats, key, K_##type),
    PROTO_STATS(STATS_FIELD)
#undef STATS_FIELD
        REQ(msg_stats, state, K_STR),
    ARRAY(msg_stats, kernels, K_LIST, &kernel_table),
};
WHOLE(stats);

static const struct table *const tables[] = {
#define MESSAGE_TABLE(NAME, name) [MSG_##NAME] = &name##_table,
    PROTO_MESSAGES(MESSAGE_TABLE)
#undef MESSAGE_TABLE
};

const char *proto_op_name(uint32_t op)
{
    switch (op) {
#define OP_NAME(name, number)                                                                      \
    case number:                                                                                   \
        return #name;
        PROTO_OPS(OP_NAME)
#undef OP_NAME
    default:
        return "?";
    }
}

/* --- the walk --- */

static uint64_t big_endian(const uint8_t *p, size_t n)
{
    uint64_t value = 0;
    for (size_t i = 0; i < n; i++)
        value = value << 8 | p[i];
    return value;
}

/*
 * The head of one value: bytes of length field behind the type byte, bytes of payload behind that,
 * values inside it. false: a type that this protocol does not use (extensions, 0xc1).
 */
static bool value_head(const uint8_t *p, size_t left, size_t *head, uint64_t *skip,
                       uint64_t *inside)
{
    static const uint8_t length_bytes[32] = {
        [0x04] = 1, [0x05] = 2, [0x06] = 4, [0x19] = 1, [0x1a] = 2,
        [0x1b] = 4, [0x1c] = 2, [0x1d] = 4, [0x1e] = 2, [0x1f] = 4,
    };
    static const uint8_t number_bytes[32] = {
        [0x0a] = 4, [0x0b] = 8, [0x0c] = 1, [0x0d] = 2, [0x0e] = 4,
        [0x0f] = 8, [0x10] = 1, [0x11] = 2, [0x12] = 4, [0x13] = 8,
    };
    uint8_t type = p[0];

    *head = 1, *skip = 0, *inside = 0;
    if (type < 0x80 || type >= 0xe0) /* small integers */
        return true;
    if (type < 0x90)
        *inside = 2u * (type & 0x0f);
    else if (type < 0xa0)
        *inside = type & 0x0f;
    else if (type < 0xc0)
        *skip = type & 0x1f;
    if (type < 0xc0)
        return true;
    if (type == 0xc1 || (type >= 0xc7 && type <= 0xc9) || (type >= 0xd4 && type <= 0xd8))
        return false;

    size_t n = length_bytes[type - 0xc0];
    if (n > left - 1)
        return false;
    uint64_t length = big_endian(p + 1, n);
    *head = 1 + n;
    if (type >= 0xde)
        *inside = 2 * length;
    else if (type >= 0xdc)
        *inside = length;
    else
        *skip = length + number_bytes[type - 0xc0];
    return true;
}

bool packet_walk(const void *data, size_t len)
{
    const uint8_t *p = data;
    uint64_t open[PROTO_DEPTH_MAX + 1] = {1}; /* values still to come at each level */
    uint64_t pending = 1;                     /* their sum: each needs at least one byte */
    int depth = 0;

    while (depth >= 0) {
        if (open[depth] == 0) {
            depth--;
            continue;
        }
        size_t head;
        uint64_t skip, inside;
        if (len == 0 || !value_head(p, len, &head, &skip, &inside) || skip > len - head)
            return false;
        p += head + skip;
        len -= head + skip;
        open[depth]--;
        pending += inside - 1;
        if (pending > len)
            return false;
        if (inside == 0)
            continue;
        if (++depth > PROTO_DEPTH_MAX)
            return false;
        open[depth] = inside;
    }
    return len == 0;
}

/* --- decoding --- */

/* The zone keeps its first chunk, where any SUBMIT finds room: no packet of a job allocates. */
struct unpacker {
    msgpack_zone zone;
    msgpack_object object;
};

enum { ZONE_BYTES = 16384 };

struct unpacker *unpacker_create(void)
{
    struct unpacker *u = malloc(sizeof(*u));

    if (u && !msgpack_zone_init(&u->zone, ZONE_BYTES)) {
        free(u);
        u = NULL;
    }
    return u;
}

void unpacker_destroy(struct unpacker *u)
{
    if (!u)
        return;
    msgpack_zone_destroy(&u->zone);
    free(u);
}

__attribute__((format(printf, 3, 4))) static int fail(int status, char *why, const char *format,
                                                      ...)
{
    va_list args;

    va_start(args, format);
    vsnprintf(why, PROTO_TEXT_MAX, format, args);
    va_end(args);
    return status;
}

/* An error inside a map or list: put its key in front. */
static int fail_inside(int status, char *why, const char *key)
{
    char inner[PROTO_TEXT_MAX];

    memcpy(inner, why, sizeof(inner));
    inner[sizeof(inner) - 1] = '\0';
    size_t room = PROTO_TEXT_MAX - strlen(key) - 2;
    snprintf(why, PROTO_TEXT_MAX, "%s.%.*s", key, (int)room, inner);
    return status;
}

int packet_open(struct unpacker *u, const void *data, size_t len, struct packet *out, char *why)
{
    size_t offset = 0;

    if (!packet_walk(data, len))
        return fail(SAGE_EPROTO, why, "packet of %zu bytes is not one sound msgpack value", len);
    msgpack_zone_clear(&u->zone);
    msgpack_unpack_return rc = msgpack_unpack(data, len, &offset, &u->zone, &u->object);
    if (rc == MSGPACK_UNPACK_NOMEM_ERROR)
        return fail(SAGE_ENOMEM, why, "packet: out of memory");
    if (rc != MSGPACK_UNPACK_SUCCESS)
        return fail(SAGE_EPROTO, why, "packet cannot be unpacked");

    const msgpack_object *o = &u->object;
    if (o->type != MSGPACK_OBJECT_ARRAY || o->via.array.size != 3)
        return fail(SAGE_EPROTO, why, "packet is not [op, seq, map]");
    const msgpack_object *item = o->via.array.ptr;
    if (item[0].type != MSGPACK_OBJECT_POSITIVE_INTEGER || item[0].via.u64 > UINT32_MAX)
        return fail(SAGE_EPROTO, why, "op: must be an unsigned 32-bit integer");
    if (item[1].type != MSGPACK_OBJECT_POSITIVE_INTEGER || item[1].via.u64 > UINT32_MAX)
        return fail(SAGE_EPROTO, why, "seq: must be an unsigned 32-bit integer");
    if (item[2].type != MSGPACK_OBJECT_MAP)
        return fail(SAGE_EPROTO, why, "body: must be a map");
    out->op = (uint32_t)item[0].via.u64;
    out->seq = (uint32_t)item[1].via.u64;
    out->body = &item[2];
    return 0;
}

static int decode_map(const msgpack_object *map, const struct table *table, void *msg, char *why);

static int decode_sub(const struct field *f, const msgpack_object *o, void *to, char *why)
{
    if (o->type != MSGPACK_OBJECT_MAP)
        return fail(SAGE_EPROTO, why, "%s: must be a map", f->key);
    int rc = decode_map(o, f->sub, to, why);
    return rc ? fail_inside(rc, why, f->key) : 0;
}

static int decode_unsigned(const struct field *f, const msgpack_object *o, uint64_t max, void *to,
                           char *why)
{
    if (o->type != MSGPACK_OBJECT_POSITIVE_INTEGER || o->via.u64 > max)
        return fail(SAGE_EPROTO, why, "%s: must be an integer from 0 to %llu", f->key,
                    (unsigned long long)max);
    if (max == UINT32_MAX)
        *(uint32_t *)to = (uint32_t)o->via.u64;
    else
        *(uint64_t *)to = o->via.u64;
    return 0;
}

static bool is_i64(const msgpack_object *o)
{
    return o->type == MSGPACK_OBJECT_NEGATIVE_INTEGER ||
           (o->type == MSGPACK_OBJECT_POSITIVE_INTEGER && o->via.u64 <= INT64_MAX);
}

static int decode_i64x4(const struct field *f, const msgpack_object *o, int64_t *to, char *why)
{
    bool good = o->type == MSGPACK_OBJECT_ARRAY && o->via.array.size == 4;

    for (int i = 0; good && i < 4; i++) {
        good = is_i64(&o->via.array.ptr[i]);
        to[i] = o->via.array.ptr[i].via.i64;
    }
    return good ? 0 : fail(SAGE_EPROTO, why, "%s: must be 4 integers of 64 bits", f->key);
}

/* Bytes of the UTF-8 character at s; 0: it is none, or a control character (C0, DEL, C1). */
static size_t utf8_char(const unsigned char *s, size_t left)
{
    static const uint32_t least[] = {0, 0x20, 0xa0, 0x800, 0x10000}; /* by length */
    size_t n = s[0] < 0x80 ? 1 : s[0] >> 5 == 6 ? 2 : s[0] >> 4 == 14 ? 3 : s[0] >> 3 == 30 ? 4 : 0;

    if (n == 0 || n > left)
        return 0;
    uint32_t c = n == 1 ? s[0] : s[0] & (0x7fu >> n);
    for (size_t i = 1; i < n; i++) {
        if (s[i] >> 6 != 2)
            return 0;
        c = c << 6 | (s[i] & 0x3f);
    }
    bool surrogate = c >= 0xd800 && c <= 0xdfff;
    return c < least[n] || c == 0x7f || c > 0x10ffff || surrogate ? 0 : n;
}

static int decode_str(const struct field *f, const msgpack_object *o, char *to, char *why)
{
    if (o->type != MSGPACK_OBJECT_STR)
        return fail(SAGE_EPROTO, why, "%s: must be a string", f->key);
    if (o->via.str.size >= f->capacity)
        return fail(SAGE_EPROTO, why, "%s: over %zu bytes", f->key, f->capacity - 1);
    for (size_t i = 0, n; i < o->via.str.size; i += n) {
        n = utf8_char((const unsigned char *)o->via.str.ptr + i, o->via.str.size - i);
        if (n == 0)
            return fail(SAGE_EPROTO, why, "%s: control character, or no UTF-8, at %zu", f->key, i);
    }
    memcpy(to, o->via.str.ptr, o->via.str.size);
    to[o->via.str.size] = '\0';
    return 0;
}

static int decode_bytes(const struct field *f, const msgpack_object *o, char *to, uint32_t *count,
                        char *why)
{
    if (o->type != MSGPACK_OBJECT_BIN || o->via.bin.size > f->capacity)
        return fail(SAGE_EPROTO, why, "%s: must be a bin of at most %zu bytes", f->key,
                    f->capacity);
    memcpy(to, o->via.bin.ptr, o->via.bin.size);
    *count = o->via.bin.size;
    return 0;
}

static int decode_u64s(const struct field *f, const msgpack_object *o, uint64_t *to,
                       uint32_t *count, char *why)
{
    bool good = o->type == MSGPACK_OBJECT_ARRAY && o->via.array.size <= f->capacity;
    uint32_t n = good ? o->via.array.size : 0;

    for (uint32_t i = 0; good && i < n; i++) {
        good = o->via.array.ptr[i].type == MSGPACK_OBJECT_POSITIVE_INTEGER;
        to[i] = o->via.array.ptr[i].via.u64;
    }
    if (!good)
        return fail(SAGE_EPROTO, why, "%s: must be at most %zu non-negative integers", f->key,
                    f->capacity);
    *count = n;
    return 0;
}

static int decode_offsets(const struct field *f, const msgpack_object *o, int32_t *to,
                          uint32_t *count, char *why)
{
    if (o->type != MSGPACK_OBJECT_BIN || o->via.bin.size % 4 != 0 ||
        o->via.bin.size / 4 > f->capacity)
        return fail(SAGE_EPROTO, why, "%s: must be at most %zu int32 in a bin", f->key,
                    f->capacity);
    memcpy(to, o->via.bin.ptr, o->via.bin.size);
    *count = o->via.bin.size / 4;
    return 0;
}

static int decode_list(const struct field *f, const msgpack_object *o, char *to, uint32_t *count,
                       char *why)
{
    if (o->type != MSGPACK_OBJECT_ARRAY || o->via.array.size > f->capacity)
        return fail(SAGE_EPROTO, why, "%s: must be a list of at most %zu", f->key, f->capacity);
    for (uint32_t i = 0; i < o->via.array.size; i++) {
        int rc = decode_sub(f, &o->via.array.ptr[i], to + i * f->sub->size, why);
        if (rc)
            return rc;
    }
    *count = o->via.array.size;
    return 0;
}

static int decode_value(const struct field *f, const msgpack_object *o, char *msg, char *why)
{
    char *to = msg + f->offset;
    uint32_t *count = (uint32_t *)(msg + f->count_offset);

    switch (f->kind) {
    case K_BOOL:
        if (o->type != MSGPACK_OBJECT_BOOLEAN)
            return fail(SAGE_EPROTO, why, "%s: must be true or false", f->key);
        *(bool *)to = o->via.boolean;
        return 0;
    case K_U32:
        return decode_unsigned(f, o, UINT32_MAX, to, why);
    case K_U64:
        return decode_unsigned(f, o, UINT64_MAX, to, why);
    case K_I64:
        if (!is_i64(o))
            return fail(SAGE_EPROTO, why, "%s: must be an integer of 64 bits", f->key);
        *(int64_t *)to = o->via.i64;
        return 0;
    case K_F32:
    case K_F64:
        if (o->type != MSGPACK_OBJECT_FLOAT32 && o->type != MSGPACK_OBJECT_FLOAT64)
            return fail(SAGE_EPROTO, why, "%s: must be a float", f->key);
        if (f->kind == K_F32)
            *(float *)to = (float)o->via.f64;
        else
            *(double *)to = o->via.f64;
        return 0;
    case K_STR:
        return decode_str(f, o, to, why);
    case K_I64X4:
        return decode_i64x4(f, o, (int64_t *)to, why);
    case K_BYTES:
        return decode_bytes(f, o, to, count, why);
    case K_U64S:
        return decode_u64s(f, o, (uint64_t *)to, count, why);
    case K_OFFSETS:
        return decode_offsets(f, o, (int32_t *)to, count, why);
    case K_MAP:
        return decode_sub(f, o, to, why);
    case K_LIST:
        return decode_list(f, o, to, count, why);
    }
    return fail(SAGE_EINTERNAL, why, "%s: unknown kind", f->key);
}

static const struct field *find_field(const struct table *table, const msgpack_object *key)
{
    for (size_t i = 0; i < table->n_fields; i++) {
        const struct field *f = &table->fields[i];
        if (f->key_len == key->via.str.size && !memcmp(f->key, key->via.str.ptr, f->key_len))
            return f;
    }
    return NULL;
}

/* Quoted in a text that goes to logs, terminals and a str: plain ASCII only. */
static int fail_unknown(const msgpack_object *key, char *why)
{
    char name[64];
    size_t n = key->via.str.size < sizeof(name) ? key->via.str.size : sizeof(name) - 1;

    for (size_t i = 0; i < n; i++) {
        char c = key->via.str.ptr[i];
        name[i] = c >= 0x20 && c < 0x7f ? c : '?';
    }
    return fail(SAGE_EUNSUPPORTED, why, "%.*s: unknown key", (int)n, name);
}

/*
 * `map` is a map. The first error is told, but one that breaks the protocol goes before a key that
 * is unknown: who refuses a job for that relies on all else being sound.
 */
static int decode_map(const msgpack_object *map, const struct table *table, void *msg, char *why)
{
    uint64_t seen = 0; /* a bit for each field */
    int bad = 0;

    memset(msg, 0, table->zeroed);
    for (uint32_t i = 0; i < map->via.map.size; i++) {
        const msgpack_object_kv *kv = &map->via.map.ptr[i];
        if (kv->key.type != MSGPACK_OBJECT_STR)
            return fail(SAGE_EPROTO, why, "key %u: must be a string", i);
        const struct field *f = find_field(table, &kv->key);
        if (!f) {
            if (table->strict && !bad)
                bad = fail_unknown(&kv->key, why);
            continue;
        }
        uint64_t bit = UINT64_C(1) << (f - table->fields);
        if (seen & bit)
            return fail(SAGE_EPROTO, why, "%s: given twice", f->key);
        seen |= bit;
        char text[PROTO_TEXT_MAX];
        int rc = decode_value(f, &kv->val, msg, text);
        if (rc && (!bad || (bad == SAGE_EUNSUPPORTED && rc == SAGE_EPROTO))) {
            bad = rc;
            memcpy(why, text, sizeof(text));
        }
    }
    for (size_t i = 0; bad != SAGE_EPROTO && i < table->n_fields; i++)
        if (table->fields[i].required && !(seen & UINT64_C(1) << i))
            bad = fail(SAGE_EPROTO, why, "%s: missing", table->fields[i].key);
    return bad;
}

/* The offsets of a SUBMIT lie in the message; both or neither, of equal length. */
static int finish_submit(struct msg_submit *m, char *why)
{
    if (m->n_q_offsets != m->n_k_offsets)
        return fail(SAGE_EINVAL, why, "k_offsets: %u numbers, but q_offsets has %u", m->n_k_offsets,
                    m->n_q_offsets);
    if (m->n_q_offsets == 0)
        return 0;
    if (m->n_q_offsets == 1)
        return fail(SAGE_EINVAL, why, "q_offsets: 1 number, must be the number of sequences + 1");
    m->attn.n_seqs = (int32_t)m->n_q_offsets - 1;
    m->attn.q_offsets = m->q_offsets;
    m->attn.k_offsets = m->k_offsets;
    return 0;
}

int packet_decode(const struct packet *packet, enum msg_kind kind, void *msg, char *why)
{
    int rc = decode_map(packet->body, tables[kind], msg, why);

    if (rc == 0 && kind == MSG_SUBMIT)
        rc = finish_submit(msg, why);
    return rc;
}

/* --- encoding --- */

struct out {
    char *at;
    size_t left;
    bool full;
};

static inline int out_write(struct out *out, const void *bytes, size_t len)
{
    if (len > out->left) {
        out->full = true;
        return -1;
    }
    memcpy(out->at, bytes, len);
    out->at += len;
    out->left -= len;
    return 0;
}

/* msgpack's own packer calls a function for each byte or two: here they are stored right away. */
#define msgpack_pack_inline_func(name) static inline int out_pack##name
#define msgpack_pack_inline_func_cint(name) static inline int out_pack##name
#define msgpack_pack_user struct out *
#define msgpack_pack_append_buffer(out, bytes, len) return out_write(out, bytes, len)
#include <msgpack/pack_template.h>

static void encode_map(struct out *out, const struct table *table, const char *msg);

static void encode_str(struct out *out, const char *s, size_t len)
{
    out_pack_str(out, len);
    out_pack_str_body(out, s, len);
}

static void encode_value(struct out *out, const struct field *f, const char *msg)
{
    const char *from = msg + f->offset;
    const uint32_t *count = (const uint32_t *)(msg + f->count_offset);

    switch (f->kind) {
    case K_BOOL:
        *(const bool *)from ? out_pack_true(out) : out_pack_false(out);
        break;
    case K_U32:
        out_pack_uint32(out, *(const uint32_t *)from);
        break;
    case K_U64:
        out_pack_uint64(out, *(const uint64_t *)from);
        break;
    case K_I64:
        out_pack_int64(out, *(const int64_t *)from);
        break;
    case K_F32:
        out_pack_float(out, *(const float *)from);
        break;
    case K_F64:
        out_pack_double(out, *(const double *)from);
        break;
    case K_STR:
        encode_str(out, from, strlen(from));
        break;
    case K_I64X4:
        out_pack_array(out, 4);
        for (int i = 0; i < 4; i++)
            out_pack_int64(out, ((const int64_t *)from)[i]);
        break;
    case K_BYTES:
        out_pack_bin(out, *count);
        out_pack_bin_body(out, from, *count);
        break;
    case K_U64S:
        out_pack_array(out, *count);
        for (uint32_t i = 0; i < *count; i++)
            out_pack_uint64(out, ((const uint64_t *)from)[i]);
        break;
    case K_OFFSETS:
        out_pack_bin(out, *count * 4);
        out_pack_bin_body(out, from, *count * 4);
        break;
    case K_MAP:
        encode_map(out, f->sub, from);
        break;
    case K_LIST:
        out_pack_array(out, *count);
        for (uint32_t i = 0; i < *count; i++)
            encode_map(out, f->sub, from + i * f->sub->size);
        break;
    }
}

/* An optional field that is zero is not sent. */
static bool is_sent(const struct field *f, const char *msg)
{
    static const char zero[8];

    if (f->required)
        return true;
    switch (f->kind) {
    case K_BYTES:
    case K_OFFSETS:
    case K_U64S:
    case K_LIST:
        return *(const uint32_t *)(msg + f->count_offset) != 0;
    case K_STR:
        return msg[f->offset] != '\0';
    case K_MAP: /* an optional tensor: its first member is the dtype */
        return *(const uint32_t *)(msg + f->offset) != SAGE_NONE;
    default:
        return memcmp(msg + f->offset, zero, f->capacity) != 0;
    }
}

static void encode_map(struct out *out, const struct table *table, const char *msg)
{
    size_t n = 0;

    for (size_t i = 0; i < table->n_fields; i++)
        n += is_sent(&table->fields[i], msg);
    out_pack_map(out, n);
    for (size_t i = 0; i < table->n_fields; i++) {
        if (!is_sent(&table->fields[i], msg))
            continue;
        encode_str(out, table->fields[i].key, table->fields[i].key_len);
        encode_value(out, &table->fields[i], msg);
    }
}

_Static_assert(offsetof(struct sage_tensor, dtype) == 0, "is_sent() looks there");

size_t packet_encode(void *buf, size_t size, uint32_t op, uint32_t seq, enum msg_kind kind,
                     const void *msg)
{
    struct out out = {.at = buf, .left = size};

    out_pack_array(&out, 3);
    out_pack_uint32(&out, op);
    out_pack_uint32(&out, seq);
    encode_map(&out, tables[kind], msg);
    return out.full ? 0 : size - out.left;
}
