/*
 * requests.h - what each request does.
 */
#ifndef SAGE_REQUESTS_H
#define SAGE_REQUESTS_H

#include "proto/proto.h"

struct session;

/*
 * Serve one request, with the descriptor that came with it or -1: takes it over. false: the
 * protocol is broken, with a text in why[PROTO_TEXT_MAX].
 */
bool request(struct session *s, const struct packet *packet, int fd, char *why);

#endif
