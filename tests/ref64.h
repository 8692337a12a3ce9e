/*
 * ref64.h - attention in double precision, written straight from the text of sageattn.h, sharing
 * nothing with the implementations that it judges.
 */
#ifndef SAGE_REF64_H
#define SAGE_REF64_H

#include "sageattn.h"

/* The value of one element of a tensor of any dtype (BOOL: 0 or 1). */
double ref64_get(const struct sage_tensor *t, int64_t a, int64_t b, int64_t c, int64_t d);

/* Does row i of a sequence of nq rows and nk keys see key j, by causal and window? */
bool ref64_sees(const struct sage_attn *attn, int64_t nq, int64_t nk, int64_t i, int64_t j);

/*
 * Row `row` of query head `head` of batch or sequence `b` (it counts within it): o[D]; returns lse.
 * A row that sees no key gives 0 and -inf.
 */
double ref64_row(const struct sage_attn *attn, int64_t b, int64_t head, int64_t row, double *o);

/* Sums from which the distance of results o from references r follows. Start from zeros. */
struct ref64_error {
    double oo, rr, or, abs_diff, abs_r, diff2;
};

void ref64_compare(struct ref64_error *e, const double *o, const double *r, int64_t n);
double ref64_cos(const struct ref64_error *e); /* cosine similarity */
double ref64_l1(const struct ref64_error *e);  /* sum |o - r| / sum |r| */
double ref64_l2(const struct ref64_error *e);  /* |o - r| / |r| */

#endif
