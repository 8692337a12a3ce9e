/*
 * problem.h - what every implementation asks of a struct sage_attn: sizes, sequences, visible keys.
 * Internal to the project; linked into libsageattn, libsageclient and the daemon.
 */
#ifndef SAGE_PROBLEM_H
#define SAGE_PROBLEM_H

#include "sageattn.h"

/* Bytes of one element; 0 for SAGE_NONE and for anything that is no dtype. */
size_t sage_dtype_size(enum sage_dtype dtype);
const char *sage_dtype_name(enum sage_dtype dtype);
const char *sage_variant_name(enum sage_variant variant);

/* Bytes from the tensor's first element to the end of its last one; 0 for an empty tensor, false
 * where that does not fit int64. Shape and strides may hold anything. */
bool sage_tensor_bytes(const struct sage_tensor *t, int64_t *bytes);

/* The rows that one group works on: queries [q0, q0 + nq), keys [k0, k0 + nk) of batch `batch`. */
struct sage_seq {
    int64_t batch, q0, nq, k0, nk;
};

/* The sequence of batch (or sequence) number b. */
struct sage_seq sage_attn_seq(const struct sage_attn *attn, int64_t b);

/*
 * Keys [*first, *last) that causal and window let row i of the sequence see; empty if first ==
 * last.
 */
void sage_attn_band(const struct sage_attn *attn, const struct sage_seq *seq, int64_t i,
                    int64_t *first, int64_t *last);

/* Rows of all query heads of a kv head together, of the sequence that has most. */
int64_t sage_attn_rows(const struct sage_attn *attn);

/* Query heads of each group in the part. */
int64_t sage_part_heads(const struct sage_attn *attn, const struct sage_part *part);

/* Is there such a part in this problem? */
bool sage_part_is_legal(const struct sage_attn *attn, const struct sage_part *part);

/* The scale in force. */
float sage_attn_scale(const struct sage_attn *attn);

#endif
