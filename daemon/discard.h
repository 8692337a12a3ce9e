/*
 * discard.h - closing descriptors that clients sent. close() of a foreign file may take as long as
 * its owner likes (a socket that lingers, a FUSE file, a huge memfd), which is not the loop's time.
 */
#ifndef SAGE_DISCARD_H
#define SAGE_DISCARD_H

#include <stdbool.h>
#include <sys/types.h>

/*
 * Have descriptors that came from a user closed, by one of a few threads. Without memory to note
 * them they stay open.
 */
void discard(uid_t uid, const int *fds, unsigned n);
/* Close a client's socket: by another thread where packets wait in it, for they may have some. */
void discard_socket(int fd);
/* Once a tick: start a thread that could not be had when it was needed, or one for a stuck one. */
void discard_tick(void);
/* How many descriptors of the user wait to be closed, or for their close() to return; of others. */
unsigned discard_waiting(uid_t uid, unsigned *others);
/* How many sockets wait, but for those that a thread was given up for. */
unsigned discard_sockets(void);

#endif
