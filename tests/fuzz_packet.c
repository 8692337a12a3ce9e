/*
 * fuzz_packet.c - one packet: walked, opened and decoded as every message there is. What can be
 * decoded must survive encoding and decoding; what cannot gives a text that is fit to be sent and
 * logged.
 */
#include <stdlib.h>
#include <string.h>

#include "proto/proto.h"

enum {
#define KIND_COUNT(NAME, name) +1
    N_KINDS = 0 PROTO_MESSAGES(KIND_COUNT)
#undef KIND_COUNT
};

union message {
#define MESSAGE_MEMBER(NAME, name) struct msg_##name as_##name;
    PROTO_MESSAGES(MESSAGE_MEMBER)
#undef MESSAGE_MEMBER
};

static union message first, second;
static uint8_t once[PROTO_PACKET_MAX], twice[PROTO_PACKET_MAX];
static struct unpacker *unpacker;

static void require(bool what)
{
    if (!what)
        abort();
}

static void check_text(const char *why)
{
    size_t len = strnlen(why, PROTO_TEXT_MAX);

    require(len > 0 && len < PROTO_TEXT_MAX);
    for (size_t i = 0; i < len; i++)
        require(why[i] >= 0x20 && why[i] < 0x7f);
}

static void check_stable(const struct packet *packet, enum msg_kind kind)
{
    struct packet again;
    char why[PROTO_TEXT_MAX];

    size_t len = packet_encode(once, sizeof(once), packet->op, packet->seq, kind, &first);
    require(len > 0 && packet_walk(once, len));
    require(packet_open(unpacker, once, len, &again, why) == 0);
    require(packet_decode(&again, kind, &second, why) == 0);
    require(packet_encode(twice, sizeof(twice), again.op, again.seq, kind, &second) == len);
    require(memcmp(once, twice, len) == 0);
}

int LLVMFuzzerTestOneInput(const uint8_t *data, size_t size)
{
    struct packet packet;
    char why[PROTO_TEXT_MAX];

    if (!unpacker)
        unpacker = unpacker_create();
    if (size > PROTO_PACKET_MAX)
        return 0;
    for (int kind = 0; kind < N_KINDS; kind++) {
        memset(why, 0, sizeof(why));
        int rc = packet_open(unpacker, data, size, &packet, why);
        if (rc) {
            check_text(why);
            return 0;
        }
        require(packet_walk(data, size));
        rc = packet_decode(&packet, (enum msg_kind)kind, &first, why);
        if (rc == 0)
            check_stable(&packet, (enum msg_kind)kind);
        else
            check_text(why);
    }
    return 0;
}
