/*
 * requests.h - what each request does.
 */
#ifndef SAGE_REQUESTS_H
#define SAGE_REQUESTS_H

#include "proto/proto.h"

struct session;

/*
 * Serve one request, with the descriptors that came with it: takes them over. false: the protocol
 * is broken, with a text in why[PROTO_TEXT_MAX].
 */
bool request(struct session *s, const struct packet *packet, const int *fds, unsigned n_fds,
             char *why);

#endif
