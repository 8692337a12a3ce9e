#!/bin/sh
# exports.sh - do the libraries export their public calls, and nothing else?
set -eu

here=$(mktemp -d)
trap 'rm -rf "$here"' EXIT
failed=0

# calls HEADER...: the functions that it declares.
calls() {
    sed -n '/^SAGE_API/,/;/p' "$@" | tr '\n' ' ' | grep -o -E 'SAGE_API [^(]*\(' |
        grep -o -E 'sage_[a-z_]+\($' | tr -d '(' | sort -u
}

# exports LIBRARY: the functions that a program can link to.
exports() {
    nm -D --defined-only "$SAGE_BUILDDIR/.libs/$1" | sed -n 's/^[0-9a-f]* [TW] //p' | sort -u
}

[ -e "$SAGE_BUILDDIR/.libs/libsageattn.so" ] || { echo "built without shared libraries"; exit 77; }
calls "$SAGE_SRCDIR/kernels/sageattn.h" >"$here/is"
[ -s "$here/is" ]
exports libsageattn.so | diff -u "$here/is" - || failed=1

# libsageclient brings along what clients need of sageattn.h: all but the computing.
calls "$SAGE_SRCDIR/kernels/sageattn.h" "$SAGE_SRCDIR/client/sageclient.h" |
    grep -v -x -e sage_attn_cpu -e sage_attn_workspace -e sage_cpu_create -e sage_cpu_destroy \
        -e sage_attn_cuda -e sage_attn_cuda_workspace -e sage_cuda_load >"$here/is"
exports libsageclient.so | diff -u "$here/is" - || failed=1
[ $failed = 0 ] || echo "- declared but not exported, + exported but not declared"
exit $failed
