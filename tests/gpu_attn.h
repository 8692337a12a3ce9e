/*
 * gpu_attn.h - what the files of gpu_attn share.
 *
 *   gpu_attn.c      command line, the sweep over random problems, its table
 *   gpu_problem.c   a problem in host memory: tensors, guards, random parameters and inputs
 *   gpu_run.c       run it on the GPU and on the CPU, compare, say what is wrong
 *   gpu_edges.c     edges, errors, streams
 *   gpu_big.c       strides and tensors beyond 2^31 bytes, 200K tokens
 *   gpu_accuracy.c  errors against double precision, as bench/accuracy prints them
 */
#ifndef SAGE_GPU_ATTN_H
#define SAGE_GPU_ATTN_H

#include "inputs.h"
#include "kernels/problem.h"

/* --- a problem --- */

enum {
    ARENA = 64 << 20, /* bytes of an image */
    GUARD = 256,      /* poisoned bytes on either side of each slot, and its alignment */
    MAX_SLOTS = 8,
    TEST_SEQS = 8,
};

/* A NaN in every format, and none that arithmetic on a CPU or a GPU produces. */
#define POISON 0xffc1u

/*
 * A piece of an image that holds one tensor, or the slices of one allocation: `bytes` from `start`
 * on, GUARD bytes before and after them.
 */
struct slot {
    size_t start, bytes;
    char *device;
};

enum layout { HND, NHD, GAPS, PADDED, EXPANDED, N_LAYOUTS };

#define KINDS(X)                                                                                   \
    X(NORMAL, "normal")                                                                            \
    X(K_OFFSET, "k-offset") /* q * 2, k + N(0,8) for each channel */                               \
    X(OUTLIERS, "outliers") /* channels: q * 6, k + 12, v * 5 */                                   \
    X(PEAKY, "peaky")       /* q * 3, k * 3 */                                                     \
    X(HEAVY, "heavy")       /* k Student t, 3 degrees of freedom */                                \
    X(V_OFFSET, "v-offset") /* v + 8..9 for each channel */                                        \
    X(CONST_K, "const-k")   /* all keys alike, a zero channel of v */                              \
    X(ONES, "ones")         /* v = 1: so must o be */                                              \
    X(HUGE_VALUES, "huge")  /* v near the end of its range, q large, k small */                    \
    X(TINY_VALUES, "tiny")  /* v small, q small, k large */                                        \
    X(ZEROS, "zeros")       /* q = 0, and v = 0 in odd heads */

enum kind {
#define KIND_ENUM(name, text) KIND_##name,
    KINDS(KIND_ENUM)
#undef KIND_ENUM
        N_KINDS
};

/* One element of q, k or v (which: 0, 1, 2) that is no finite number; which < 0: there is none. */
struct spoil {
    int which;
    double value;
    int64_t b, head, row, c; /* b: batch or sequence; head: of that tensor; row: in the sequence */
};

/*
 * `attn` has host addresses in `host`, the image of what is given to both implementations: inputs,
 * and poison everywhere else. `cpu` and `gpu` are the images after the call.
 */
struct problem {
    struct sage_attn attn;
    char *host, *cpu, *gpu;
    size_t used;
    struct slot slots[MAX_SLOTS];
    int n_slots;
    int32_t offsets[2][TEST_SEQS + 1];
    enum kind kind;
    enum layout layout[4]; /* of q, k, v, o */
    bool fused;
    struct spoil spoil;
    bool cut;        /* run in parts */
    bool overflows;  /* all scores are beyond fp32: all that see a key must be NaN */
    char repeat[96]; /* the command that runs it again */
    bool exact;      /* the GPU quantises nothing, as it says: double precision is the judge */
    bool fp8;        /* P V is in e4m3, as it says, and by the judge, too */
    double flip;     /* nats: what one step of K's INT8 can move a score by */
    struct rng rng;  /* goes on with how it is cut */
};

/* Images of ARENA bytes; NULL on no memory. Emptied by problem_reset(), not freed between uses. */
struct problem *problem_create(void);
void problem_destroy(struct problem *p);
void problem_reset(struct problem *p, uint64_t seed);

/* A tensor in a slot of its own, `skew` elements behind the slot's aligned start. */
struct sage_tensor problem_take(struct problem *p, enum sage_dtype dtype, enum layout layout,
                                int skew, int64_t b, int64_t h, int64_t n, int64_t d);
/* Random parameters and inputs; tokens: the most of q or k. */
void problem_random(struct problem *p, int64_t tokens, bool fp8);
/* Only q, k and v anew, of p->kind; and p->flip, which goes with them. */
void problem_fill(struct problem *p);
void problem_find_flip(struct problem *p);
/* Contiguous q, k, v, o and lse of p->kind, gqa * heads query heads on `heads`. */
void problem_plain(struct problem *p, enum sage_dtype dtype, enum sage_variant variant, int64_t b,
                   int64_t heads, int64_t gqa, int64_t nq, int64_t nk, int64_t d);
/* One line that says everything. */
void problem_describe(const struct problem *p, char *text, size_t len);

void put(const struct sage_tensor *t, int64_t b, int64_t h, int64_t n, int64_t c, double x);
void put_all(const struct sage_tensor *t, double x);
/* The same tensor in another image. */
struct sage_tensor in_image(const struct problem *p, const struct sage_tensor *t, char *image);
struct sage_attn attn_in_image(const struct problem *p, char *image);

/* --- the GPU --- */

struct CUstream_st;

struct gpu {
    struct sage_cpu *pool;
    struct CUstream_st *stream;
    char *arena;     /* ARENA bytes on the device */
    char *workspace; /* `bytes` of it, and guards */
    size_t bytes;
    bool fp8;      /* has the GPU e4m3? */
    bool separate; /* an allocation for each tensor: compute-sanitizer sees its ends */
    char name[320];
};

/* 0; or 77, with a line that says why there is none. */
int gpu_init(struct gpu *gpu, bool separate);
void gpu_finish(struct gpu *gpu);

/* Go on only if a CUDA runtime call succeeded: a failed one ends the program with status 1. */
#define MUST(call) gpu_must((int)(call), #call, __FILE__, __LINE__)
void gpu_must(int error, const char *call, const char *file, int line);

/* At least `bytes` of workspace, poisoned, between guards. */
char *gpu_workspace(struct gpu *gpu, size_t bytes);
/* Is everything outside the first `bytes` untouched? */
bool gpu_workspace_sound(struct gpu *gpu, size_t bytes);
/* Put the problem's slots onto the device; its tensors there. */
void gpu_upload(struct gpu *gpu, struct problem *p);
struct sage_attn gpu_attn(const struct problem *p);
void gpu_download(struct gpu *gpu, struct problem *p);
void gpu_release(struct gpu *gpu, struct problem *p);

/* How is it computed? p->exact and p->fp8 are set. */
void gpu_ask(struct problem *p, const struct sage_attn *on_device);

/* How far GPU and CPU are apart: worst and mean head, worst element of o, worst lse. */
struct distance {
    int64_t heads;
    double l1, mean_l1, l1_of_bound, element_of_bound, lse;
};

/* Run it on the CPU, or in double precision, and compare with what is in p->gpu. */
bool gpu_compare(struct gpu *gpu, struct problem *p, int rows64, struct distance *far, char *why,
                 size_t len);
/* Download what ran on gpu->stream, run it on the CPU and compare; see gpu_check(). */
bool gpu_judge(struct gpu *gpu, struct problem *p, int rows64, struct distance *far, char *why,
               size_t len);
/*
 * Upload, run on both, download and compare, everything that can be compared; `rows64` random rows
 * of o with double precision too. false, and a text in why, where something is wrong.
 */
bool gpu_check(struct gpu *gpu, struct problem *p, int rows64, struct distance *far, char *why,
               size_t len);

/* Rows of batch (or sequence) b in double precision, by all processors: where[i] = {head, row} to
 * o[i][D] and, unless NULL, lse[i]. */
void rows_in_fp64(const struct sage_attn *attn, int64_t b, int64_t (*where)[2], int64_t n,
                  double *o, double *lse);

/* --- the parts of the program: how many failures --- */

int gpu_edges(struct gpu *gpu, uint64_t seed);
int gpu_big(struct gpu *gpu, uint64_t seed);
int gpu_accuracy(struct gpu *gpu, int64_t tokens, const char *distribution);

#endif
