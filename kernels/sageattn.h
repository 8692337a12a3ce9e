/*
 * sageattn.h - quantised attention: one problem, a workspace, a place to run it.
 *
 * O = softmax(scale * Q K^T + mask) V with Q and K in INT8 (K smoothed: its mean over the tokens is
 * subtracted first) and P V in 16 bits or FP8.
 *   SageAttention  (int8_fp16): Zhang et al., arXiv:2410.02367, section 4.
 *   SageAttention2 (int8_fp8):  Zhang et al., arXiv:2411.10958, section 3.
 * Few query rows (of all Hq/Hkv query heads of a kv head together at most 64, in every sequence)
 * are computed without quantisation, whatever the variant and in whatever parts: Q K^T and P V in
 * the tensors' 16-bit type, accumulated in fp32. smooth_k, smooth_v and rotate_qk change nothing
 * then.
 *
 * Every function here is thread-safe: none keeps state but what its arguments point to, which
 * kernels are loaded, and how many calls there have been.
 */
#ifndef SAGEATTN_H
#define SAGEATTN_H

#include <stdbool.h>
#include <stddef.h>
#include <stdint.h>

#ifdef __cplusplus
extern "C" {
#endif

#if defined(__GNUC__)
#define SAGE_API __attribute__((visibility("default")))
#else
#define SAGE_API
#endif

/*
 * Every error there is: X(name, number, retry, text). The enum value is -number, the number is what
 * travels on the wire and stands in status words; retry: may the same call succeed later,
 * unchanged?
 */
#define SAGE_ERRORS(X)                                                                             \
    X(SAGE_EINVAL, 1, 0, "invalid argument")                                                       \
    X(SAGE_EUNSUPPORTED, 2, 0, "not supported")                                                    \
    X(SAGE_ENOMEM, 3, 1, "out of memory")                                                          \
    X(SAGE_EWORKSPACE, 4, 0, "workspace too small")                                                \
    X(SAGE_EBUFFER, 5, 0, "no such buffer")                                                        \
    X(SAGE_EBOUNDS, 6, 0, "tensor reaches beyond its buffer")                                      \
    X(SAGE_EHANDLE, 7, 0, "memory handle cannot be used")                                          \
    X(SAGE_EBUSY, 8, 1, "no credit left: wait for a job to finish")                                \
    X(SAGE_EQUOTA, 9, 0, "over a limit of this daemon")                                            \
    X(SAGE_EDRAIN, 10, 1, "daemon is shutting down")                                               \
    X(SAGE_EPROTO, 11, 0, "protocol violation")                                                    \
    X(SAGE_EVERSION, 12, 0, "protocol versions do not match")                                      \
    X(SAGE_EPERM, 13, 0, "permission denied")                                                      \
    X(SAGE_ENODAEMON, 14, 1, "no daemon")                                                          \
    X(SAGE_ELOST, 15, 1, "connection to the daemon lost, job not finished")                        \
    X(SAGE_ETIMEDOUT, 16, 1, "timed out")                                                          \
    X(SAGE_ECANCELED, 17, 0, "cancelled")                                                          \
    X(SAGE_EDEVICE, 18, 1, "device lost")                                                          \
    X(SAGE_EFORK, 19, 0, "handle belongs to the parent process")                                   \
    X(SAGE_EINTERNAL, 20, 0, "internal error")                                                     \
    X(SAGE_ESTARTED, 21, 0, "job has started or is over")                                          \
    X(SAGE_ECAPTURE, 22, 0, "stream is being captured into a graph")

enum sage_status {
    SAGE_OK = 0,
#define SAGE_ERROR_ENUM(name, number, retry, text) name = -(number),
    SAGE_ERRORS(SAGE_ERROR_ENUM)
#undef SAGE_ERROR_ENUM
};

/* The text of a status; static storage, never NULL. */
SAGE_API const char *sage_strerror(int status);
/* The name of a status ("SAGE_EINVAL"); static storage, never NULL. */
SAGE_API const char *sage_errname(int status);
/* May the same call succeed later, unchanged? */
SAGE_API bool sage_retryable(int status);

enum sage_dtype {
    SAGE_NONE = 0, /* no tensor: an absent mask or lse */
    SAGE_F16 = 1,  /* IEEE 754 binary16 */
    SAGE_BF16 = 2, /* upper half of binary32 */
    SAGE_F32 = 3,  /* IEEE 754 binary32: lse, additive mask */
    SAGE_BOOL = 4, /* one byte; 0: masked, anything else: visible */
};

enum sage_variant {
    SAGE_AUTO = 0,      /* int8_fp8 if smooth_v, else int8_fp16, on every device so far */
    SAGE_INT8_FP16 = 1, /* P V in the 16-bit type of V, accumulated in fp32: the accurate one */
    SAGE_INT8_FP8 = 2,  /* P V in e4m3, accumulated in fp32: half the work of P V */
};

/* Which corner the diagonal of the score matrix starts from; it places `causal` and the window. */
enum sage_diagonal {
    SAGE_TOP_LEFT = 0,     /* row i sits at key i (PyTorch's SDPA) */
    SAGE_BOTTOM_RIGHT = 1, /* row i sits at key i + Nk - Nq (FlashAttention) */
};

/*
 * A tensor of four dimensions in memory that its owner keeps alive and unchanged while it is used.
 * Element [a, b, c, d] lies at `data` + size of the dtype * (a*stride[0] + ... + d*stride[3]).
 * Strides count elements and are not negative; stride[3] is 1. Only where the tensor lives differs
 * along the way: in this process `data` is its address and `buffer` and `offset` are 0; through the
 * daemon `data` is NULL and the tensor starts `offset` bytes into registered buffer `buffer`.
 */
struct sage_tensor {
    enum sage_dtype dtype;
    uint32_t buffer;
    uint64_t offset;
    void *data;
    int64_t shape[4];
    int64_t stride[4];
};

/*
 * One attention problem. Start from SAGE_ATTN_INIT and set what differs.
 *   q   [B, Hq, Nq, D]     k, v [B, Hkv, Nk, D]     o [B, Hq, Nq, D]     all F16 or all BF16
 *   D a multiple of 8, at most 256; Hq a multiple of Hkv; query head h reads kv head h / (Hq/Hkv).
 *   mask [B|1, Hq|1, Nq|1, Nk], optional: BOOL, or F16, BF16 or F32 that is added to scale * Q K^T.
 *   lse  [B, Hq, Nq, 1] F32, optional: log (natural) of sum over visible keys of exp(score).
 * Row i sees key j where the mask lets it and, with d = i (top left) or i + Nk - Nq (bottom right),
 *   j >= d - window_left  unless window_left  is SAGE_UNLIMITED, and
 *   j <= d + window_right unless window_right is SAGE_UNLIMITED; causal is window_right = 0.
 * Variable length: with n_seqs > 0, B is 1, the tokens of all sequences are concatenated, and
 * sequence s has queries [q_offsets[s], q_offsets[s+1]) and keys [k_offsets[s], k_offsets[s+1]);
 * the offsets start at 0, do not decrease and end at Nq and Nk. Each sequence is a problem of its
 * own. A row that sees no key gives o = 0 and lse = -inf. A NaN or Inf in q, k or v gives NaN in
 * every row that sees it, never a finite number, but for an Inf in q or k where nothing is
 * quantised: a score of -inf may have no weight then, as a softmax gives it. Finite v whose sum
 * over the keys is beyond 2^-16 of fp32's range (on a GPU, whose largest weight may be 2^15) may
 * give NaN.
 */
struct sage_attn {
    struct sage_tensor q, k, v, o, mask, lse;
    float scale; /* > 0; 0 stands for 1/sqrt(D) */
    enum sage_variant variant;
    /*
     * Subtract K's mean over the tokens; beyond 4096 of them, that of 1,024 or more, spread over
     * all. Exact for o and lse, whatever it is.
     */
    bool smooth_k;
    bool smooth_v; /* int8_fp8 only: subtract V's mean, add it back to o */
    /*
     * Multiply each 8 channels of q and k by a Hadamard matrix before they become INT8: scores stay
     * what they are, and a channel that sticks out is spread over eight (QuaRot, arXiv:2404.00456,
     * section 4). Less error with the q and k of models, more with uniform ones. Elements beyond
     * an eighth of fp32's range give NaN.
     */
    bool rotate_qk;
    bool causal;
    enum sage_diagonal diagonal;
    int64_t window_left, window_right; /* >= 0, or SAGE_UNLIMITED */
    int32_t n_seqs;                    /* 0: a plain batch */
    const int32_t *q_offsets;          /* n_seqs + 1 of them, in host memory */
    const int32_t *k_offsets;
};

#define SAGE_UNLIMITED (-1)
#define SAGE_ATTN_INIT                                                                             \
    {                                                                                              \
        .smooth_k = true, .window_left = SAGE_UNLIMITED, .window_right = SAGE_UNLIMITED            \
    }

enum {
    SAGE_MAX_HEAD_DIM = 256,
    SAGE_MAX_SEQS = 4096,
    SAGE_MAX_TOKENS = INT32_MAX - 1024, /* shape[2]: kernels count to the end of a tile */
};

/*
 * Is the problem legal? 0, or SAGE_EINVAL / SAGE_EUNSUPPORTED with a text that names the field and
 * the limit written to why[len] (why may be NULL). Addresses are not looked at beyond alignment and
 * overlap: o and lse must not share a byte with anything else.
 */
SAGE_API int sage_attn_check(const struct sage_attn *attn, char *why, size_t len);

/* The variant that SAGE_AUTO stands for in this problem; otherwise the one that it names. */
SAGE_API enum sage_variant sage_attn_variant(const struct sage_attn *attn);

/*
 * A problem falls apart into groups that share nothing: group g is batch (or sequence) g / Hkv with
 * kv head g % Hkv and the Hq/Hkv query heads that read it. A part is a run of groups, or some query
 * heads and rows of one group. With several parts of one group in the same workspace, the first
 * prepares K and V there and the others set `prepared`.
 */
struct sage_part {
    int64_t group, n_groups;
    int64_t row, n_rows;   /* of each query head; row = 0, n_rows = -1: all */
    int64_t head, n_heads; /* among the Hq/Hkv of the group; head = 0, n_heads = 0: all */
    bool prepared;
};

/* How many groups; 0 when there is nothing to compute. `attn` has passed sage_attn_check(). */
SAGE_API int64_t sage_attn_groups(const struct sage_attn *attn);

/*
 * Operations of the visible part, 4 * D for each (query, key) pair; a mask tensor does not count.
 * part: NULL is the whole problem; 0 for one that is not in it.
 */
SAGE_API double sage_attn_ops(const struct sage_attn *attn, const struct sage_part *part);

/*
 * Bytes of workspace that sage_attn_cpu() needs for this part (NULL: the whole problem); SIZE_MAX
 * for a part that is not in it, or where they do not fit size_t.
 * `attn` has passed sage_attn_check(); no address is looked at.
 */
SAGE_API size_t sage_attn_workspace(const struct sage_attn *attn, const struct sage_part *part);

/* A pool of CPU threads; create once, use for many problems, one call at a time. */
struct sage_cpu;
/*
 * threads: how many work on a problem, the caller among them; 0: one for each processor. NULL: no
 * memory.
 */
SAGE_API struct sage_cpu *sage_cpu_create(int threads);
SAGE_API void sage_cpu_destroy(struct sage_cpu *cpu);

/*
 * Compute a part (NULL: all) of a problem that has passed sage_attn_check(), in host memory;
 * returns when it is done. cpu: NULL runs on the calling thread alone. workspace: at least
 * sage_attn_workspace() bytes, 64-byte aligned, contents of no interest. Reads only q, k, v, mask
 * and the offsets; writes only o, lse and the workspace. Needs 320 KiB of stack. 0, SAGE_EINVAL
 * (part, alignment) or SAGE_EWORKSPACE.
 */
SAGE_API int sage_attn_cpu(struct sage_cpu *cpu, const struct sage_attn *attn,
                           const struct sage_part *part, void *workspace, size_t bytes);

/* --- on a GPU ---
 *
 * On compute capability 9.0 what has few scores for each key is computed without quantisation as
 * well as few rows, for that is faster: without a mask tensor, with at most so many of them on
 * average, all query heads of a kv head together (Nq * Hq/Hkv, half of it if causal), rows of q, k
 * and v at multiples of 16 bytes and below 2^40 bytes apart, none expanded.
 *
 *     D            keys of a sequence   int8_fp16   int8_fp8
 *     up to 64     any                      36864       9216
 *     up to 128    up to 5120                5120       2560
 *                  more                      2560       2560
 *     up to 256    up to 5120                5120       5120
 *                  more                      1024       1024
 *
 * Beyond D = 128, without a mask tensor and with such rows of v, int8_fp8 is computed as int8_fp16
 * there: the more accurate one is three times as fast, and smooth_v changes nothing.
 *
 * Compute capability 8.0 or newer; int8_fp8 wants 8.9. A build without CUDA has these functions
 * too: they return SAGE_EUNSUPPORTED and say so. Errors come with a text in why[len], which may be
 * NULL. `why` says what a CUDA error was: SAGE_EDEVICE, where the context is unusable from then on,
 * SAGE_ENOMEM or SAGE_EINTERNAL.
 */

/* CUstream and cudaStream_t point to this; NULL is the legacy default stream. */
struct CUstream_st;

/*
 * Load all kernels on the calling thread's current device (made current by cudaSetDevice() or
 * cuCtxSetCurrent(); else device 0). The first sage_attn_cuda() on a device does it; where the
 * stream may be waiting for something by then, do it before: loading waits for the device.
 * SAGE_EUNSUPPORTED: the device is too old.
 */
SAGE_API int sage_cuda_load(char *why, size_t len);

/*
 * Like sage_attn_workspace(), for sage_attn_cuda(). What a group needs is enough for its parts,
 * too, though one of few rows would make use of more.
 */
SAGE_API size_t sage_attn_cuda_workspace(const struct sage_attn *attn,
                                         const struct sage_part *part);

/*
 * Enqueue a part (NULL: all) of a problem that has passed sage_attn_check() on a stream of the
 * current device, and return: at most two kernels that prepare K and V (none where nothing is
 * quantised), then attention. Allocates nothing and waits for nothing. Tensors and workspace are
 * memory that the device can access and the offsets are in host memory, of no interest once this
 * returns.
 * workspace: at least sage_attn_cuda_workspace() bytes, 256-byte aligned, contents of no interest,
 * for this call alone until the stream has passed it; parts of one group with `prepared`, one after
 * the other on one stream, find it as the one before has left it. Kernels read only q, k, v, mask
 * and write only o, lse and the workspace.
 * SAGE_EINVAL (part, alignment), SAGE_ECAPTURE (n_seqs > 0 on a stream that is being captured),
 * SAGE_EWORKSPACE, SAGE_EUNSUPPORTED (int8_fp8 before compute capability 8.9 or by code for older
 * ones, more than 2^31 tiles of rows), and what sage_cuda_load() returns.
 */
SAGE_API int sage_attn_cuda(const struct sage_attn *attn, const struct sage_part *part,
                            void *workspace, size_t bytes, struct CUstream_st *stream, char *why,
                            size_t len);

#ifdef __cplusplus
}
#endif
#endif
