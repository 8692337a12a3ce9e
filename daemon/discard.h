/*
 * discard.h - closing descriptors that clients sent. close() of a foreign file may take as long as
 * its owner likes (a socket that lingers, a FUSE file, a huge memfd), which is not the loop's time.
 */
#ifndef SAGE_DISCARD_H
#define SAGE_DISCARD_H

/* Close descriptors one after the other on a thread of their own. */
void discard(const int *fds, unsigned n);
/* Close a socket: on a thread if packets, which may carry descriptors, are waiting in it unread. */
void discard_socket(int fd);

#endif
