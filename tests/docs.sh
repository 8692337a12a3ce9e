#!/bin/sh
# docs.sh - do the man pages say what the programs do: every flag, option and call, and no other?
# And docs/models.md what was measured?
set -eu

here=$(mktemp -d)
trap 'rm -rf "$here"' EXIT
docs=$SAGE_SRCDIR/docs failed=0

# same WHAT: $here/is (from the program) and $here/said (from the page) list the same names.
same() {
    sort -u "$here/is" -o "$here/is"
    sort -u "$here/said" -o "$here/said"
    [ -s "$here/is" ] || { echo "$1: found none"; failed=1; }
    diff -u "$here/is" "$here/said" || { echo "$1: - has no text, + does not exist"; failed=1; }
}

sageattnd=$SAGE_BUILDDIR/sageattnd
export XDG_RUNTIME_DIR="$here"
"$sageattnd" --help | grep -o -e ' --[a-z-]*' | tr -d ' ' >"$here/is"
sed -n 's/^\.It Fl \(-[a-z-]*\).*/-\1/p' "$docs/sageattnd.8" >"$here/said"
same "flags in sageattnd.8"

"$sageattnd" --config=/dev/null --print-config >"$here/defaults"
sed -n 's/^\([a-z_]*\) = .*/\1/p' "$here/defaults" >"$here/is"
sed -n 's/^\.It Cm \([a-z_]*\) No = .*/\1/p' "$docs/sageattnd.conf.5" >"$here/said"
same "options in sageattnd.conf.5"

grep -v -e '^socket$' -e '^fault$' "$here/is" >"$here/is.most"
mv "$here/is.most" "$here/is"
sed -n 's/^#\([a-z_]*\) = .*/\1/p' "$SAGE_SRCDIR/systemd/sageattnd.conf" >"$here/said"
same "options in the example"
for edit in '' 's/^#\([a-z_]* = \)/\1/'; do
    sed "$edit" "$SAGE_SRCDIR/systemd/sageattnd.conf" >"$here/conf"
    "$sageattnd" --config="$here/conf" --print-config | diff -u "$here/defaults" - ||
        { echo "the example's values are not the defaults"; failed=1; }
done

sagectl=$SAGE_BUILDDIR/sagectl
"$sagectl" --help | sed -n 's/^  \([a-z][a-z]*\)  *[^ ].*/\1/p' >"$here/commands"
{
    cat "$here/commands"
    "$sagectl" --help
    while read -r command; do "$sagectl" "$command" --help; done <"$here/commands"
} | grep -o -E -e '^[a-z]+$' -e '^  -[a-z], --[a-z]+' | sed 's/.*--/--/' >"$here/is"
{
    sed -n 's/^\.It Cm \([a-z]*\).*/\1/p' "$docs/sagectl.1"
    grep -o -e 'Fl -[a-z]*' "$docs/sagectl.1" | sed 's/Fl -/--/'
} >"$here/said"
same "commands and options in sagectl.1"

{ cat "$here/commands"; grep -e '^--' "$here/is"; } >"$here/is.all"
mv "$here/is.all" "$here/is"
{
    sed -n "s/.*commands='\([a-z ]*\)'.*/\1/p" "$SAGE_SRCDIR/client/sagectl.bash" | tr ' ' '\n'
    grep -o -E -e '--[a-z]+' "$SAGE_SRCDIR/client/sagectl.bash"
} >"$here/said"
same "commands and options in sagectl.bash"

# The page of libsageclient tells of some calls of sageattn.h too, and those have to exist.
calls() {
    sed -n '/^SAGE_API/,/;/p' "$1" | grep -o -E '\bsage_[a-z_]+\(' | tr -d '(' | sort -u
}
calls "$SAGE_SRCDIR/client/sageclient.h" >"$here/is"
calls "$SAGE_SRCDIR/kernels/sageattn.h" >"$here/others"
sed -n 's/^\.F[no] \(sage_[a-z_]*\).*/\1/p' "$docs/libsageclient.3" |
    grep -v -x -f "$here/others" >"$here/said"
same "calls in libsageclient.3"

"$PYTHON3" "$SAGE_SRCDIR/bench/models/report" --check || failed=1

command -v mandoc >/dev/null || { echo "no mandoc: pages not checked"; exit $((failed ? 1 : 77)); }
mandoc -T lint -W warning "$docs"/*.[1-8] || failed=1
exit $failed
