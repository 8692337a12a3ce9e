#!/bin/sh
# python_wheel.sh - does the wheel work by itself: no build tree, no library but libc's? And the
# package as pip installs it from its folder, which finds the libraries where it is told?
set -eu

"$PYTHON3" -c 'import setuptools, wheel, pip' 2>/dev/null ||
    { echo "no pip, setuptools and wheel in $PYTHON3"; exit 77; }
! grep -q -e __asan_init -e __tsan_init "$SAGE_BUILDDIR/.libs/libsageattn.so" ||
    { echo "sanitized libraries cannot be loaded into python"; exit 77; }
here=$(mktemp -d)
trap 'rm -rf "$here"' EXIT

# shellcheck disable=SC2086 # flags of the make that runs this are not for that one
wheel=$(env -u MAKEFLAGS -u MAKELEVEL make -s -C "$SAGE_BUILDDIR" wheel | tail -n 1)
echo "$wheel"
"$PYTHON3" -m pip install -q --no-index --no-deps --no-compile --target "$here/site" "$wheel" 2>&1
for library in "$here"/site/sageattnd/*.so.*; do
    others=$(readelf -d "$library" | sed -n 's/.*(NEEDED).*\[\(.*\)\]/\1/p' |
        grep -v -x -e 'lib\(c\|m\|dl\|rt\|pthread\)\.so\.[0-9]*' -e 'ld-linux.*') || :
    [ -z "$others" ] || { echo "$library needs $others"; exit 1; }
done
[ -e "$here/site/sageattnd/py.typed" ]
cp -R "$SAGE_SRCDIR/client/python" "$here/folder"
chmod -R u+w "$here/folder"
"$PYTHON3" -m pip install -q --no-index --no-deps --no-compile --no-build-isolation \
    --target "$here/plain" "$here/folder" 2>&1
libraries=$(cd "$SAGE_BUILDDIR/.libs" && pwd)
cd "$here"
[ -z "$(find plain -name '*.so*')" ]
SAGEATTND_LIBRARY_PATH=$libraries PYTHONPATH=$here/plain "$PYTHON3" -c '
import numpy as np, sageattnd
assert sageattnd.__file__.startswith("'"$here"'/plain/"), sageattnd.__file__
ones = np.ones((1, 2, 16, 64), np.float16)
assert (sageattnd.sageattn(ones, ones, ones) == 1).all()'
unset SAGEATTND_LIBRARY_PATH
SAGE_WHEEL=$here/site PYTHONPATH=$here/site "$PYTHON3" "$SAGE_SRCDIR/tests/python_numpy.py"
