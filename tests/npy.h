/*
 * npy.h - numpy's files: C order, little-endian binary16, version 1.0, four dimensions.
 */
#ifndef SAGE_NPY_H
#define SAGE_NPY_H

#include "sageattn.h"

/*
 * Load a file as a tensor in memory that the caller frees (t->data). false, with a line on stderr,
 * where it is missing or something else.
 */
bool npy_load(const char *path, struct sage_tensor *t);

#endif
