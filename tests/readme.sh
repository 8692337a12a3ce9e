#!/bin/sh
# readme.sh - does the README's client compile as it stands there, and run?
set -eu

here=$(mktemp -d)
daemon=
trap '[ -z "$daemon" ] || kill "$daemon" || :; rm -rf "$here"' EXIT

sed -n '/^```c$/,/^```$/p' "$SAGE_SRCDIR/README.md" | sed '/^```/d' >"$here/client.c"
[ -s "$here/client.c" ]
# shellcheck disable=SC2086 # flags are several words
$SAGE_CC -I"$SAGE_SRCDIR/client" -I"$SAGE_SRCDIR/kernels" -o "$here/client" "$here/client.c" \
    -L"$SAGE_BUILDDIR/.libs" -Wl,-rpath,"$SAGE_BUILDDIR/.libs" -lsageclient

export SAGEATTND_SOCKET="$here/sock"
if "$here/client" 2>"$here/err"; then
    echo "works without a daemon?"
    exit 1
fi
grep -q "$here/sock" "$here/err"

"$SAGE_BUILDDIR/sageattnd" --config=/dev/null --backend=cpu --socket="$here/sock" &
daemon=$!
for _ in $(seq 100); do
    [ ! -S "$here/sock" ] || break
    sleep 0.1
done
said=$("$here/client")
echo "$said"
[ "$said" = success ]
kill "$daemon"
wait "$daemon"
daemon=
