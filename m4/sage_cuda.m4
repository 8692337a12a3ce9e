# SAGE_CUDA(MINIMUM-VERSION)
# --with-cuda=auto|yes|no and --with-cuda-arch=LIST. Sets NVCC, NVCC_VERSION and CUDA_GENCODE, the
# CUDA_CFLAGS and CUDA_LIBS (the static runtime), HAVE_CUDA, HAVE_SM_90A if 90a is in the list, and
# cuda_summary for people to read.
AC_DEFUN([SAGE_CUDA], [
AC_ARG_WITH([cuda],
    [AS_HELP_STRING([--with-cuda=auto|yes|no], [look for nvcc @<:@auto@:>@])],
    [], [with_cuda=auto])
AC_ARG_WITH([cuda-arch],
    [AS_HELP_STRING([--with-cuda-arch=LIST],
        [GPUs to make code for; others compile the PTX of the first, or of 89
         @<:@80 86 89 90a 120@:>@])],
    [], [with_cuda_arch="80 86 89 90a 120"])
AC_ARG_VAR([NVCC], [CUDA compiler])

AS_CASE([$with_cuda], [auto|yes|no], [],
    [AC_MSG_ERROR([--with-cuda=$with_cuda: must be auto, yes or no])])
sage_cuda_why="--with-cuda=no"
NVCC_VERSION=
CUDA_GENCODE=
AS_IF([test "$with_cuda" != no], [
    sage_cuda_why=
    AC_PATH_PROG([NVCC], [nvcc], [], [$PATH$PATH_SEPARATOR/usr/local/cuda/bin])
    AS_IF([test -z "$NVCC"], [sage_cuda_why="no nvcc found"], [
        NVCC_VERSION=`"$NVCC" --version 2>/dev/null | sed -n 's/.*release \([[0-9.]]*\),.*/\1/p'`
        AX_COMPARE_VERSION([${NVCC_VERSION:-0}], [lt], [$1],
            [sage_cuda_why="$NVCC is ${NVCC_VERSION:-of no known version}, must be $1 or newer"])
    ])
])
AS_IF([test -z "$sage_cuda_why"], [
    sage_ptx=
    for sage_arch in $with_cuda_arch; do
        AS_IF([test -z "$CUDA_GENCODE" || test "$sage_arch" = 89], [
            AS_VAR_APPEND([sage_ptx], [" ${sage_arch%%[[a-z]]}"])
            sage_virtual=compute_${sage_arch%%[[a-z]]}
            AS_VAR_APPEND([CUDA_GENCODE], [" -gencode=arch=$sage_virtual,code=$sage_virtual"])
        ])
        AS_VAR_APPEND([CUDA_GENCODE], [" -gencode=arch=compute_$sage_arch,code=sm_$sage_arch"])
        AS_IF([test "$sage_arch" = 90a],
            [AC_DEFINE([HAVE_SM_90A], [1], [there are kernels for Hopper])])
    done
    AC_MSG_CHECKING([whether $NVCC makes code for $with_cuda_arch])
    : >conftest.cu
    AS_IF([test -n "$CUDA_GENCODE" && "$NVCC" --dryrun $CUDA_GENCODE -c conftest.cu \
            -o conftest.o >&AS_MESSAGE_LOG_FD 2>&1],
        [AC_MSG_RESULT([yes])],
        [AC_MSG_RESULT([no])
         sage_cuda_why="nvcc $NVCC_VERSION makes no code for all of '$with_cuda_arch'"])
    rm -f conftest.cu
])
AS_IF([test -n "$sage_cuda_why"], [
    AS_IF([test "$with_cuda" = yes], [AC_MSG_ERROR([--with-cuda: $sage_cuda_why])])
    have_cuda=no
    cuda_summary="no ($sage_cuda_why)"
], [
    have_cuda=yes
    # nvcc may be a link to its real place, beside which its headers and libraries are.
    sage_cuda_root=`readlink -f "$NVCC"`
    sage_cuda_root=${sage_cuda_root%/bin/nvcc}
    for sage_dir in "$sage_cuda_root/lib64" "$sage_cuda_root/lib" \
            "$sage_cuda_root/targets/$host_cpu-linux/lib"; do
        AS_IF([test -f "$sage_dir/libcudart_static.a"],
            [CUDA_LIBS="-L$sage_dir -lcudart_static -ldl -lrt -lpthread"])
    done
    CUDA_CFLAGS="-isystem $sage_cuda_root/include"
    AC_DEFINE([HAVE_CUDA], [1], [there are GPU kernels and the CUDA backend])
    cuda_summary="nvcc $NVCC_VERSION for $with_cuda_arch, PTX$sage_ptx"
])
AC_SUBST([NVCC_VERSION])
AC_SUBST([CUDA_GENCODE])
AC_SUBST([CUDA_CFLAGS])
AC_SUBST([CUDA_LIBS])
AM_CONDITIONAL([HAVE_CUDA], [test "$have_cuda" = yes])
])
