#!/bin/sh
# units.sh - are the systemd units sound, and do they leave the daemon no more than it needs?
set -eu

command -v systemd-analyze >/dev/null || { echo "no systemd-analyze: skipped"; exit 77; }

here=$(mktemp -d)
trap 'rm -rf "$here"' EXIT
system=$here/system user=$here/user failed=0
mkdir "$system" "$user"
cp "$SAGE_SRCDIR"/systemd/nvidia-mps.service "$SAGE_SRCDIR"/systemd/sageattnd.socket \
    "$SAGE_SRCDIR"/systemd/sageattnd@.socket "$SAGE_BUILDDIR"/systemd/sageattnd.service \
    "$SAGE_BUILDDIR"/systemd/sageattnd@.service "$system"
cp "$SAGE_BUILDDIR"/systemd/sageattnd-user.service "$user"/sageattnd.service
cp "$SAGE_SRCDIR"/systemd/sageattnd-user.socket "$user"/sageattnd.socket
chmod u+w "$system"/* "$user"/*

# What the units start need not be installed here; that they start something has to show.
for program in /sageattnd /nvidia-modprobe /nvidia-cuda-mps-control; do
    grep -q "^Exec[A-Za-z]*=[+-]*/[^ ]*$program " "$system"/*
done
sed -i -E '/^Exec/s,/[^ |"]*/(sageattnd|nvidia-[a-z-]+) ,/bin/true ,' "$system"/* "$user"/*
! grep -H @ "$system"/sageattnd.service "$user"/* | grep -v 'SystemCall\|modprobe@' || failed=1

# verify only warns of unknown keys, so it must have nothing to say.
verify() {
    said=$(systemd-analyze verify --man=no "$@" 2>&1) || failed=1
    [ -z "$said" ] || { echo "$said"; failed=1; }
}
(cd "$system" && cp sageattnd@.service sageattnd@0.service && cp sageattnd@.socket sageattnd@0.socket)
verify "$system"/nvidia-mps.service "$system"/sageattnd.service "$system"/sageattnd.socket
verify "$system"/sageattnd@0.service "$system"/sageattnd@0.socket
XDG_RUNTIME_DIR=$here verify --user "$user"/sageattnd.service "$user"/sageattnd.socket

# 0 is the safest, 100 an unprotected root.
for unit in sageattnd.service sageattnd@0.service; do
    systemd-analyze security --no-pager --offline=true --threshold=20 "$system/$unit" >"$here/log" ||
        { grep -v '^.\[' "$here/log" | tail -80; failed=1; }
    grep 'exposure level' "$here/log"
done
exit $failed
