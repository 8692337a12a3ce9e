/*
 * cuda.cu - sage_attn_cuda(): what goes where in the workspace, the arguments, the launches.
 */
#include "cuda_args.h"
#include "cuda_stamp.h"

#include <atomic>
#include <cudaTypedefs.h>
#include <limits.h>
#include <math.h>
#include <stdarg.h>
#include <stdio.h>
#include <string.h>

extern "C" {
#include "problem.h"
}

namespace
{

enum { ALIGN = 256, DEVICES_MAX = 64, MAX_TILE = 1024 };
/* numbers of rows and keys are int, to the end of a tile */
static_assert(SAGE_MAX_TOKENS <= INT_MAX - MAX_TILE);

__attribute__((format(printf, 4, 5))) int refuse(char *why, size_t len, int status,
                                                 const char *format, ...)
{
    va_list args;

    if (!why || !len)
        return status;
    va_start(args, format);
    vsnprintf(why, len, format, args);
    va_end(args);
    return status;
}

/* Errors after which a context answers every call with the same error. */
bool is_lost(cudaError_t error)
{
    switch (error) {
    case cudaErrorIllegalAddress:
    case cudaErrorLaunchFailure:
    case cudaErrorLaunchTimeout:
    case cudaErrorHardwareStackError:
    case cudaErrorIllegalInstruction:
    case cudaErrorMisalignedAddress:
    case cudaErrorInvalidAddressSpace:
    case cudaErrorInvalidPc:
    case cudaErrorAssert:
    case cudaErrorECCUncorrectable:
    case cudaErrorMpsClientTerminated:
    case cudaErrorContextIsDestroyed:
    case cudaErrorDeviceUninitialized:
    case cudaErrorCudartUnloading:
        return true;
    default:
        return false;
    }
}

int refuse_cuda(char *why, size_t len, const char *what, cudaError_t error)
{
    return refuse(why, len,
                  is_lost(error)                       ? SAGE_EDEVICE
                  : error == cudaErrorMemoryAllocation ? SAGE_ENOMEM
                  : error == cudaErrorNoDevice || error == cudaErrorInsufficientDriver
                      ? SAGE_EUNSUPPORTED
                      : SAGE_EINTERNAL,
                  "%s: %s: %s", what, cudaGetErrorName(error), cudaGetErrorString(error));
}

/* --- loading --- */

struct gpu {
    short sm, code; /* compute capability, as 90; that which the loaded code was compiled for */
    short processors;
    short cluster; /* blocks of a cluster that quantises, at most; on Hopper */
};

/* Each device whose kernels are loaded; sm 0: not yet. */
std::atomic<struct gpu> loaded[DEVICES_MAX];

/* cuTensorMapEncodeTiled(), where there are kernels that want it. */
std::atomic<PFN_cuTensorMapEncodeTiled_v12000> encode_tiled;

/* For few rows: it wants nothing prepared. */
bool is_few(int index)
{
    return index >= sage_kernel_first_few() && index < sage_kernel_first_exact();
}

/* Nothing is quantised, on Hopper: neither. */
bool is_exact(int index)
{
    return index >= sage_kernel_first_exact();
}

bool is_fp8(int index)
{
    return !strcmp(sage_kernels[index].variant, "int8_fp8");
}

const struct cuda_kernel *kernel(int index)
{
#define ONE(d, dtype, pv, feature) +1
    constexpr int SM90 = 0 SAGE_KERNELS_SM90(ONE);
    const struct cuda_kernel *tables[] = {cuda_attn_f16, cuda_attn_bf16, cuda_attn_fp8};

    if (index < SM90)
        return &cuda_attn_sm90[index];
    if (is_few(index))
        return &cuda_attn_few[index - sage_kernel_first_few()];
    if (is_exact(index))
        return &cuda_attn_exact[index - sage_kernel_first_exact()];
    for (const auto *table : tables)
        if (table[index - SM90].function)
            return &table[index - SM90];
    return nullptr;
}

/* It wants K and an e4m3 V swizzled, and a map of a 16-bit V. */
bool is_wgmma(int index)
{
    return sage_kernels[index].max_sm == 90;
}

/* All that the device may run. The quantisation's code, and so all, was compiled for gpu->code. */
cudaError_t load_all(struct gpu *gpu)
{
    const int sm = gpu->sm;
    unsigned cluster = 0;
    cudaFuncAttributes attributes;
    cudaError_t error = cudaSuccess;

    if (sm == 90 && cuda_attn_sm90[0].function) {
        void *found;
        cudaDriverEntryPointQueryResult result;
        error = cudaGetDriverEntryPointByVersion("cuTensorMapEncodeTiled", &found, 12000,
                                                 cudaEnableDefault, &result);
        if (!error && result == cudaDriverEntryPointSuccess)
            encode_tiled = reinterpret_cast<PFN_cuTensorMapEncodeTiled_v12000>(found);
    }
    if (sm == 90 && !error)
        error = cuda_cluster_load(&cluster);
    gpu->cluster = static_cast<short>(cluster);
    for (int i = 0; cuda_quant_functions[i] && !error; i++)
        error = cudaFuncGetAttributes(&attributes, cuda_quant_functions[i]);
    if (!error)
        gpu->code = static_cast<short>(attributes.ptxVersion);
    for (int i = 0; i < sage_n_kernels && !error; i++) {
        if (sm < sage_kernels[i].min_sm || sm > sage_kernels[i].max_sm)
            continue;
        const void *function = kernel(i)->function;
        if (!function)
            continue;
        error = cudaFuncGetAttributes(&attributes, function);
        if (!error)
            error = cudaFuncSetAttribute(function, cudaFuncAttributeMaxDynamicSharedMemorySize,
                                         sage_kernels[i].smem_bytes);
    }
    return error;
}

/* The current device, its kernels loaded; a status. */
int ready(struct gpu *gpu, char *why, size_t len)
{
    int device, major, minor, processors;
    cudaError_t error = cudaGetDevice(&device);

    if (error)
        return refuse_cuda(why, len, "cudaGetDevice", error);
    *gpu = device < DEVICES_MAX ? loaded[device].load(std::memory_order_acquire) : (struct gpu){};
    if (gpu->sm)
        return SAGE_OK;
    error = cudaDeviceGetAttribute(&major, cudaDevAttrComputeCapabilityMajor, device);
    if (!error)
        error = cudaDeviceGetAttribute(&minor, cudaDevAttrComputeCapabilityMinor, device);
    if (!error)
        error = cudaDeviceGetAttribute(&processors, cudaDevAttrMultiProcessorCount, device);
    if (error)
        return refuse_cuda(why, len, "cudaDeviceGetAttribute", error);
    gpu->sm = static_cast<short>(10 * major + minor);
    gpu->processors = static_cast<short>(processors);
    if (gpu->sm < 80)
        return refuse(why, len, SAGE_EUNSUPPORTED,
                      "device %d has compute capability %d.%d, must be 8.0 or newer", device, major,
                      minor);
    error = load_all(gpu);
    if (error)
        return refuse_cuda(why, len, "loading kernels", error);
    if (device < DEVICES_MAX)
        loaded[device].store(*gpu, std::memory_order_release);
    return SAGE_OK;
}

/* --- the workspace --- */

struct layout {
    size_t offsets, arrived, done, ticket, sums, means, k_max, k8, k_scale, v8, parts, total;
};

bool place(struct layout *at, size_t *where, int64_t n, size_t size)
{
    size_t bytes;

    *where = at->total;
    return !__builtin_mul_overflow(static_cast<size_t>(n), size, &bytes) &&
           !__builtin_add_overflow(bytes, static_cast<size_t>(ALIGN - 1), &bytes) &&
           !__builtin_add_overflow(at->total, bytes / ALIGN * ALIGN, &at->total);
}

int64_t ceil_div(int64_t a, int64_t b)
{
    return a / b + (a % b > 0);
}

/* Units of all sequences of the part; `offsets` of host memory, NULL: batches of n tokens. */
struct cuda_space space(const struct cuda_args *a, const int32_t *offsets, int64_t n, int64_t unit)
{
    if (!offsets)
        return {a->n_seqs * ceil_div(n, unit), ceil_div(n, unit)};
    return {(offsets[a->seq + a->n_seqs] - offsets[a->seq]) / unit + a->n_seqs, 0};
}

/* The kernel for devices of compute capability `sm`; see sage_kernel_find(). */
int find_kernel(const struct sage_attn *attn, int sm)
{
    return sage_kernel_find(sm, static_cast<int>(attn->q.shape[3]), attn->q.dtype == SAGE_BF16,
                            sage_attn_variant(attn) == SAGE_INT8_FP8,
                            attn->mask.dtype != SAGE_NONE);
}

/* The kernel for few rows, or -1. It follows from the whole problem: parts are computed alike. */
int find_few(const struct sage_attn *attn)
{
    return sage_kernel_find_few(static_cast<int>(attn->q.shape[3]), attn->q.dtype == SAGE_BF16,
                                sage_attn_rows(attn));
}

/* Causal and window leave no key that none of these rows sees. */
bool see_all_keys(const struct sage_attn *attn, int64_t first_row, int64_t rows)
{
    const int64_t nk = attn->k.shape[2], right = attn->causal ? 0 : attn->window_right;
    const int64_t first =
        first_row + (attn->diagonal == SAGE_BOTTOM_RIGHT ? nk - attn->q.shape[2] : 0);

    return (attn->window_left < 0 || attn->window_left >= first) &&
           (right < 0 || right >= nk - first - rows);
}

/* How many tiles of so many rows, at most: sequences end in one of their own. */
double count_tiles(const struct sage_attn *attn, int rows)
{
    const int64_t *const q = attn->q.shape;

    return static_cast<double>(q[0] * q[1]) * static_cast<double>(ceil_div(q[2], rows)) +
           static_cast<double>(attn->n_seqs * q[1]);
}

/*
 * So few tiles of `rows` rows that smaller ones, which fill the processors better, take less time.
 * Processors take theirs in rounds; `pairs`: where later rows see more keys, tiles are that much
 * shorter.
 */
bool has_few_tiles(const struct sage_attn *attn, int rows, double pairs)
{
    const int64_t *const q = attn->q.shape;
    const double all = static_cast<double>(q[0] * q[1]) * static_cast<double>(q[2]) *
                       static_cast<double>(attn->k.shape[2]);
    const double share = attn->n_seqs > 0 || attn->window_left >= 0 ? 1 : pairs / all;

    return ceil(count_tiles(attn, EXACT_SMALL) * share / SPLIT_UNITS) <=
           sage_few_share * EXACT_ROUNDS(q[3]) *
               ceil(count_tiles(attn, rows) * share / SPLIT_UNITS);
}

/* The kernel that quantises nothing, or -1. That, too, follows from the whole problem. */
int find_exact(const struct sage_attn *attn, int sm)
{
    const int64_t *const k = attn->k.shape;
    const int d = static_cast<int>(attn->q.shape[3]), bf16 = attn->q.dtype == SAGE_BF16;
    const int index = sage_kernel_find_exact(d, bf16, 0);

    if (sm != 90 || attn->mask.dtype != SAGE_NONE || index < 0 || !kernel(index)->function)
        return -1;
    const double keys = static_cast<double>(k[0] * k[1]) * static_cast<double>(k[2]);
    const double pairs = sage_attn_ops(attn, nullptr) / (4 * static_cast<double>(d));
    const double sequences = attn->n_seqs > 0 ? attn->n_seqs : 1;
    const bool fp8 = sage_attn_variant(attn) == SAGE_INT8_FP8;
    const double each = static_cast<double>(k[2]) / sequences;
    const double most = sage_exact_share * EXACT_PAIRS(sage_kernels[index].max_head_dim, fp8, each);
    if (pairs <= 0 || pairs > most * keys ||
        count_tiles(attn, sage_kernels[index].tile_q) >= CALL_COUNT)
        return -1;
    return sage_kernel_find_exact(d, bf16, has_few_tiles(attn, sage_kernels[index].tile_q, pairs));
}

/*
 * Fewer tiles than processors: the keys of each are split, into at least two steps of tile_k, so
 * that SPLIT_UNITS have something to do. Not where merging takes longer than that saves.
 */
void split(struct cuda_args *a, int64_t rows, int64_t tile_q, int64_t tile_k)
{
    static_assert(WGMMA_TILE_Q(64, 0) <= 192 && WGMMA_TILE_Q(128, 1) <= 192, "SPLIT_SLABS");
    const int64_t steps = ceil_div(a->nk, tile_k), least = a->exact ? 16 : 4;
    int64_t tiles, n;

    if (__builtin_mul_overflow(a->n_heads * a->n_q_heads, a->tiles.total, &tiles) || tiles <= 0 ||
        tiles > SPLIT_UNITS / 2 || steps < least)
        return;
    n = SPLIT_UNITS / tiles < steps / 2 ? SPLIT_UNITS / tiles : steps / 2;
    n = n < SPLITS_MAX ? n : SPLITS_MAX;
    const int64_t each = ceil_div(steps, n);
    a->n_splits = static_cast<unsigned>(ceil_div(steps, each));
    a->split_keys = static_cast<unsigned>(each * tile_k);
    a->slabs = static_cast<unsigned>(ceil_div(rows < tile_q ? rows : tile_q, 16));
}

/* How many keys the rows of the part see in sequence s. */
int64_t seen_keys(const struct sage_attn *attn, const struct sage_part *part, int64_t s)
{
    const struct sage_seq seq = sage_attn_seq(attn, s);
    const int64_t row = part->n_rows < 0 ? 0 : part->row;
    const int64_t rows = part->n_rows < 0 ? seq.nq : part->n_rows;
    int64_t first, last, other;

    if (rows == 0)
        return 0;
    sage_attn_band(attn, &seq, row, &first, &other);
    sage_attn_band(attn, &seq, row + rows - 1, &other, &last);
    return last > first ? last - first : 0;
}

/*
 * Few rows: the keys that each sequence's rows see are split, so that about `units` blocks have
 * something to do: one for each processor, since each more has to be merged. Not where there are
 * enough tiles.
 */
void split_few(const struct sage_attn *attn, const struct sage_part *part, int64_t units,
               struct cuda_args *a)
{
    const int64_t tiles = a->n_heads * a->n_seqs, unit = KERNEL_TILE_K;
    int64_t sum = 0, most = 0, each;

    for (int64_t s = 0; s < (attn->n_seqs > 0 ? a->n_seqs : 1); s++) {
        const int64_t keys = seen_keys(attn, part, a->seq + s);
        sum += keys;
        most = keys > most ? keys : most;
    }
    if (attn->n_seqs > 0)
        each = tiles < 2 * units ? ceil_div(sum * a->n_heads, units) : most;
    else
        each = tiles > 0 && tiles < units ? ceil_div(most, units / tiles) : most;
    const int64_t least = ceil_div(most, FEW_CHUNKS);
    each = each > least ? each : least;
    each = each > FEW_CHUNK ? each : FEW_CHUNK;
    a->chunk_keys = ceil_div(each, unit) * unit;
    a->n_splits = most > a->chunk_keys ? static_cast<unsigned>(ceil_div(most, a->chunk_keys)) : 1;
    a->chunks = attn->n_seqs > 0 ? space(a, attn->k_offsets, a->nk, a->chunk_keys)
                                 : cuda_space{a->n_seqs * a->n_splits, a->n_splits};
}

/*
 * The part of a kernel's arguments that needs no address. processors: that the keys of few tiles
 * may be split for; 0: nothing is split.
 */
void describe(const struct sage_attn *attn, const struct sage_part *part, int index,
              int64_t processors, struct cuda_args *a)
{
    const int64_t kv_heads = attn->k.shape[1];
    const bool one_seq = part->n_groups == 0 ||
                         part->group / kv_heads == (part->group + part->n_groups - 1) / kv_heads;

    *a = cuda_args{};
    a->d = static_cast<int>(attn->q.shape[3]);
    a->d_padded = sage_kernels[index].max_head_dim;
    a->bf16 = attn->q.dtype == SAGE_BF16;
    a->fp8 = is_fp8(index);
    a->smooth_k = attn->smooth_k;
    a->smooth_v = attn->smooth_v;
    a->rotate_qk = attn->rotate_qk && !is_few(index) && !is_exact(index);
    a->gqa = static_cast<int>(attn->q.shape[1] / kv_heads);
    a->kv_heads = kv_heads;
    a->group = part->group;
    a->n_groups = part->n_groups;
    a->seq = part->group / kv_heads;
    a->n_seqs = part->n_groups ? (part->group + part->n_groups - 1) / kv_heads - a->seq + 1 : 0;
    a->head = one_seq ? part->group % kv_heads : 0;
    a->n_heads = one_seq ? part->n_groups : kv_heads;
    a->q_head = part->head;
    a->n_q_heads = sage_part_heads(attn, part);
    a->row = part->row;
    a->n_rows = part->n_rows;
    a->nq = attn->q.shape[2];
    a->nk = attn->k.shape[2];
    const int32_t *q_offsets = attn->n_seqs > 0 ? attn->q_offsets : nullptr;
    const int32_t *k_offsets = attn->n_seqs > 0 ? attn->k_offsets : nullptr;
    a->q_first = q_offsets ? q_offsets[a->seq] : 0;
    a->k_first = k_offsets ? k_offsets[a->seq] : 0;
    if (is_few(index)) {
        const int64_t most = processors < FEW_PROCESSORS ? processors : FEW_PROCESSORS;
        a->rows = sage_kernels[index].tile_q;
        /* half as many blocks as there is room for: more cost in merging what they gain */
        split_few(attn, part, most * FEW_BLOCKS(a->d_padded, a->rows) / 2, a);
        return;
    }
    a->chunk_keys = ceil_div(ceil_div(a->nk, QUANT_CHUNKS), KERNEL_TILE_K) * KERNEL_TILE_K;
    if (a->chunk_keys < QUANT_CHUNK(a->d_padded))
        a->chunk_keys = QUANT_CHUNK(a->d_padded);
    const int tile_q = sage_kernels[index].tile_q;
    a->chunks = space(a, k_offsets, a->nk, a->chunk_keys);
    a->blocks = space(a, k_offsets, a->nk, KERNEL_TILE_K);
    a->tiles = part->n_rows < 0
                   ? space(a, q_offsets, a->nq, tile_q)
                   : cuda_space{ceil_div(part->n_rows, tile_q), ceil_div(part->n_rows, tile_q)};
    a->n_splits = 1;
    a->exact = is_exact(index);
    const int64_t rows = part->n_rows < 0 ? a->nq : part->n_rows;
    if (processors && sage_kernel_splits(index) && !k_offsets &&
        see_all_keys(attn, part->row, rows))
        split(a, rows, tile_q, sage_kernels[index].tile_k);
}

/* For few rows: nothing is prepared. */
bool lay_out_few(const struct sage_attn *attn, const struct cuda_args *a, struct layout *at)
{
    const int64_t offsets = attn->n_seqs > 0 ? 2 * (attn->n_seqs + 1) : 0;
    const size_t part = sizeof(float) * static_cast<size_t>(a->rows * (a->d_padded + 4));
    int64_t chunks, groups;

    *at = layout{};
    return !__builtin_mul_overflow(a->n_heads, a->chunks.total, &chunks) &&
           !__builtin_mul_overflow(a->n_heads, a->n_seqs, &groups) &&
           place(at, &at->offsets, offsets, sizeof(int32_t)) &&
           place(at, &at->arrived, groups, sizeof(unsigned long long)) &&
           place(at, &at->parts, a->n_splits > 1 ? chunks : 0, part);
}

bool lay_out(const struct sage_attn *attn, const struct cuda_args *a, struct layout *at)
{
    if (a->rows)
        return lay_out_few(attn, a, at);
    const int64_t offsets = attn->n_seqs > 0 ? 2 * (attn->n_seqs + 1) : 0;
    const size_t part = sizeof(float) * 32 * (static_cast<size_t>(a->d_padded) / 2 + 8);
    const int64_t parts = /* no more than SPLIT_UNITS tiles */
        a->n_splits > 1 ? a->n_heads * a->n_q_heads * a->tiles.total * a->slabs * a->n_splits : 0;
    *at = layout{};
    if (a->exact)
        return place(at, &at->offsets, offsets, sizeof(int32_t)) &&
               place(at, &at->arrived, 1, sizeof(unsigned long long)) &&
               place(at, &at->done, SPLIT_SLABS, sizeof(unsigned long long)) &&
               place(at, &at->parts, parts, part);
    const size_t row = sizeof(float) * static_cast<size_t>(a->d);
    const size_t block = static_cast<size_t>(KERNEL_TILE_K) * static_cast<size_t>(a->d_padded);
    int64_t chunks, blocks, groups;

    return !__builtin_mul_overflow(a->n_heads, a->chunks.total, &chunks) &&
           !__builtin_mul_overflow(a->n_heads, a->blocks.total, &blocks) &&
           !__builtin_mul_overflow(a->n_heads, a->n_seqs, &groups) &&
           place(at, &at->offsets, offsets, sizeof(int32_t)) &&
           place(at, &at->done, SPLIT_SLABS, sizeof(unsigned long long)) &&
           place(at, &at->ticket, 1, sizeof(unsigned)) &&
           place(at, &at->sums,
                 a->fp8        ? chunks * N_SUMS
                 : a->smooth_k ? chunks
                               : 0,
                 row) &&
           place(at, &at->means, groups, 3 * sizeof(float) * static_cast<size_t>(a->d_padded)) &&
           place(at, &at->k_max, chunks, sizeof(float)) && place(at, &at->k8, blocks, block) &&
           place(at, &at->k_scale, blocks, 16 * sizeof(float)) &&
           place(at, &at->v8, a->fp8 ? blocks : 0, block) &&
           /* last: other parts with the same K and V have others */
           place(at, &at->parts, parts, part);
}

struct sage_part whole(const struct sage_attn *attn, const struct sage_part *part)
{
    struct sage_part all = {};

    if (part)
        return *part;
    all.n_groups = sage_attn_groups(attn);
    all.n_rows = -1;
    return all;
}

/* --- the arguments --- */

bool aligned(const struct cuda_tensor *t, const int64_t shape[4], uintptr_t to)
{
    uintptr_t bits = reinterpret_cast<uintptr_t>(t->data);

    for (int i = 0; i < 3; i++)
        if (shape[i] > 1)
            bits |= static_cast<uintptr_t>(t->stride[i]);
    return bits % to == 0;
}

struct cuda_tensor tensor(const struct sage_tensor *t, uintptr_t alignment)
{
    const int64_t size = static_cast<int64_t>(sage_dtype_size(t->dtype));
    struct cuda_tensor to = {};

    if (t->dtype == SAGE_NONE)
        return to;
    to.data = static_cast<char *>(t->data) + t->offset;
    for (int i = 0; i < 3; i++) /* no step along a dimension of one element, whatever its stride */
        to.stride[i] = t->shape[i] > 1 ? t->stride[i] * size : 0;
    to.aligned = aligned(&to, t->shape, alignment);
    return to;
}

/* A bound that no difference of two tokens reaches stands for none. */
int64_t bound(int64_t x)
{
    const int64_t limit = INT64_C(1) << 40;

    return x > limit ? limit : x < -limit ? -limit : x;
}

void fill(const struct sage_attn *attn, const struct layout *at, char *workspace,
          struct cuda_args *a)
{
    const int64_t right = attn->causal ? 0 : attn->window_right;

    a->q = tensor(&attn->q, 16);
    a->k = tensor(&attn->k, 16);
    a->v = tensor(&attn->v, 16);
    a->o = tensor(&attn->o, 16);
    a->lse = tensor(&attn->lse, 4);
    a->mask = tensor(&attn->mask, 1);
    a->mask_dtype = attn->mask.dtype;
    a->mask_key = static_cast<int64_t>(sage_dtype_size(attn->mask.dtype));
    a->scale_lse = sage_attn_scale(attn);
    a->scale = a->scale_lse * 1.44269504f * (a->rotate_qk ? ROTATE_SCALE : 1);
    a->low = attn->window_left < 0 ? bound(INT64_MIN) : bound(-attn->window_left);
    a->high = right < 0 ? bound(INT64_MAX) : bound(right);
    a->bottom_right = attn->diagonal == SAGE_BOTTOM_RIGHT;
    if (attn->n_seqs > 0) {
        a->q_offsets = reinterpret_cast<const int32_t *>(workspace + at->offsets);
        a->k_offsets = a->q_offsets + attn->n_seqs + 1;
    }
    for (int i = 0; i < 3; i++) { /* broadcast */
        if (attn->mask.shape[i] == 1)
            a->mask.stride[i] = 0;
    }
    a->ticket = reinterpret_cast<unsigned *>(workspace + at->ticket);
    a->done = reinterpret_cast<unsigned long long *>(workspace + at->done);
    a->arrived = reinterpret_cast<unsigned long long *>(workspace + at->arrived);
    a->parts = reinterpret_cast<float *>(workspace + at->parts);
    a->sums = reinterpret_cast<float *>(workspace + at->sums);
    a->means = reinterpret_cast<float *>(workspace + at->means);
    a->k_max = reinterpret_cast<float *>(workspace + at->k_max);
    a->k8 = reinterpret_cast<int8_t *>(workspace + at->k8);
    a->k_scale = reinterpret_cast<float *>(workspace + at->k_scale);
    a->v8 = reinterpret_cast<uint8_t *>(workspace + at->v8);
}

/*
 * A tensor as wgmma kernels fetch it: `rows` tokens of 64 channels, zeros beyond the end. False
 * where it cannot be described so; the driver is not asked for what it would refuse.
 */
bool map_rows(const struct sage_tensor *t, int rows, CUtensorMap *map)
{
    const struct cuda_tensor x = tensor(t, 16);
    const auto encode = encode_tiled.load(std::memory_order_relaxed);
    cuuint64_t dims[4], strides[3];
    const cuuint32_t box[4] = {64, static_cast<cuuint32_t>(rows), 1, 1}, steps[4] = {1, 1, 1, 1};

    if (!encode || !x.aligned)
        return false;
    for (int i = 0; i < 4; i++) {
        dims[i] = static_cast<cuuint64_t>(t->shape[3 - i]);
        if (dims[i] == 0 || dims[i] > UINT64_C(1) << 32)
            return false;
    }
    for (int i = 0; i < 3; i++) { /* there is no step along a dimension of one element */
        strides[i] = dims[i + 1] > 1 ? static_cast<cuuint64_t>(x.stride[2 - i]) : 16;
        if (strides[i] == 0 || strides[i] >= UINT64_C(1) << 40)
            return false;
    }
    return encode(map,
                  t->dtype == SAGE_BF16 ? CU_TENSOR_MAP_DATA_TYPE_BFLOAT16
                                        : CU_TENSOR_MAP_DATA_TYPE_FLOAT16,
                  4, x.data, dims, strides, box, steps, CU_TENSOR_MAP_INTERLEAVE_NONE,
                  CU_TENSOR_MAP_SWIZZLE_128B, CU_TENSOR_MAP_L2_PROMOTION_L2_256B,
                  CU_TENSOR_MAP_FLOAT_OOB_FILL_NONE) == CUDA_SUCCESS;
}

/* o, up to the part's last row. False for sequences: a tile may reach into the next one. */
bool map_o(const struct sage_attn *attn, const struct sage_part *part, int rows, CUtensorMap *map)
{
    struct sage_tensor o = attn->o;

    if (part->n_rows >= 0)
        o.shape[2] = part->row + part->n_rows;
    return attn->n_seqs == 0 && map_rows(&o, rows, map);
}

struct maps {
    CUtensorMap q, k, v;
};

/* The kernel for a problem whose tensors are on a device of compute capability `sm`. */
int choose(const struct sage_attn *attn, int sm, struct maps *maps)
{
    const int few = find_few(attn);

    *maps = {};
    if (few >= 0)
        return few;
    const int exact = find_exact(attn, sm), special = find_kernel(attn, sm);
    if (exact >= 0 && map_rows(&attn->q, sage_kernels[exact].tile_q, &maps->q) &&
        map_rows(&attn->k, sage_kernels[exact].tile_k, &maps->k) &&
        map_rows(&attn->v, sage_kernels[exact].tile_k, &maps->v))
        return exact;
    if (is_wgmma(special) && kernel(special)->function &&
        (is_fp8(special) || map_rows(&attn->v, sage_kernels[special].tile_k, &maps->v)))
        return special;
    return find_kernel(attn, 0);
}

struct cuda_divider divider_of(unsigned by)
{
    unsigned shift = 0;

    while (UINT64_C(1) << shift < by)
        shift++;
    const uint64_t above = (UINT64_C(1) << shift) - by;
    return {by, static_cast<unsigned>((above << 32) / by + 1), shift};
}

/*
 * Where tiles of a column are of different length they are taken from several columns in turn, so
 * that what is left at a launch's end is short: four tiles or so of each processor, but only of so
 * many columns that their K and V are in the L2 cache.
 */
struct cuda_order order_tiles(const struct cuda_args *a)
{
    constexpr unsigned TOGETHER = 512;
    const auto total = static_cast<unsigned>(a->tiles.total);
    const unsigned each = a->tiles.each ? static_cast<unsigned>(a->tiles.each) : total;
    const auto heads = static_cast<unsigned>(a->n_q_heads);
    const unsigned columns = a->n_tiles / each, most = a->d_padded <= 64 ? 32 : 16;
    unsigned together = a->high < a->nk ? ceil_div(TOGETHER, each) : 1;

    if (together > most)
        together = most;
    return {each,
            columns / together,
            divider_of(together * each),
            divider_of(together),
            divider_of(columns % together > 0 ? columns % together : 1),
            divider_of(total / each),
            divider_of(heads),
            divider_of(a->n_splits)};
}

/* The offsets are the caller's: of pageable memory, copied before the call returns. */
int copy_offsets(const struct sage_attn *attn, const struct cuda_args *a, cudaStream_t stream,
                 char *why, size_t len)
{
    const size_t bytes = sizeof(int32_t) * static_cast<size_t>(attn->n_seqs + 1);
    cudaStreamCaptureStatus capturing;
    cudaError_t error = cudaStreamIsCapturing(stream, &capturing);

    if (!error && capturing != cudaStreamCaptureStatusNone)
        return refuse(why, len, SAGE_ECAPTURE,
                      "n_seqs: a stream that is being captured would read the offsets later");
    if (!error)
        error = cudaMemcpyAsync(const_cast<int32_t *>(a->q_offsets), attn->q_offsets, bytes,
                                cudaMemcpyHostToDevice, stream);
    if (!error)
        error = cudaMemcpyAsync(const_cast<int32_t *>(a->k_offsets), attn->k_offsets, bytes,
                                cudaMemcpyHostToDevice, stream);
    return error ? refuse_cuda(why, len, "cudaMemcpyAsync", error) : SAGE_OK;
}

/* K, and V in e4m3, to INT8 and e4m3 in the workspace. */
int prepare(struct cuda_args *a, int64_t chunks, bool wgmma, cudaStream_t stream, char *why,
            size_t len)
{
    cudaError_t error = cudaSuccess;

    if (chunks > 0) {
        error = cuda_quant_launch(a, static_cast<unsigned>(chunks), stream);
        if (error)
            return refuse_cuda(why, len, "launching the quantisation", error);
    } else if (wgmma) { /* there is no key, and nobody else to clear it */
        error = cudaMemsetAsync(a->ticket, 0, sizeof(*a->ticket), stream);
        if (error)
            return refuse_cuda(why, len, "cudaMemsetAsync", error);
    }
    return SAGE_OK;
}

/*
 * A number that no other call has, of 40 bits that memory does not hold by chance; and 24 zeros.
 * Multiples of 2^64 by the golden ratio are far apart: the next 2^38 differ in their first 40 bits.
 */
unsigned long long next_call()
{
    static std::atomic<unsigned long long> calls;

    return ++calls * 0x9e3779b97f4a7c15 & ~CALL_COUNT;
}

} // namespace

/* --- the calls --- */

int sage_cuda_load(char *why, size_t len)
{
    struct gpu gpu;

    return ready(&gpu, why, len);
}

/* Enough for any device. */
size_t sage_attn_cuda_workspace(const struct sage_attn *attn, const struct sage_part *part)
{
    const struct sage_part p = whole(attn, part);
    size_t most = 0;

    if (!sage_part_is_legal(attn, &p))
        return SIZE_MAX;
    const int few = find_few(attn),
              indices[] = {few, find_kernel(attn, 0), find_kernel(attn, 90), find_exact(attn, 90)};
    for (const int index : indices) {
        struct cuda_args a;
        struct layout at;
        if (index < 0 || is_few(index) != (few >= 0))
            continue;
        describe(attn, &p, index, INT_MAX, &a);
        if (!lay_out(attn, &a, &at))
            return SIZE_MAX;
        most = at.total > most ? at.total : most;
    }
    return most;
}

int sage_cuda_kernel(const struct sage_attn *attn)
{
    struct gpu gpu;
    struct maps maps;
    char why[256];
    const int status = ready(&gpu, why, sizeof why);

    return status ? status : choose(attn, gpu.sm, &maps);
}

int sage_attn_cuda(const struct sage_attn *attn, const struct sage_part *part, void *workspace,
                   size_t bytes, struct CUstream_st *stream, char *why, size_t len)
{
    return sage_attn_cuda_stamped(attn, part, workspace, bytes, nullptr, nullptr, stream, why, len);
}

int sage_attn_cuda_stamped(const struct sage_attn *attn, const struct sage_part *part,
                           void *workspace, size_t bytes, uint64_t *start_ns, const uint32_t *go,
                           struct CUstream_st *stream, char *why, size_t len)
{
    const struct sage_part p = whole(attn, part);
    struct cuda_args a;
    struct layout at;
    struct gpu gpu;
    int64_t chunks, tiles;
    int status;

    if (!sage_part_is_legal(attn, &p))
        return refuse(why, len, SAGE_EINVAL, "part: is not in the problem");
    status = ready(&gpu, why, len);
    if (status)
        return status;
    if (p.n_groups == 0)
        return SAGE_OK;
    const int any = find_kernel(attn, 0);
    if (gpu.code < sage_kernels[any].min_sm)
        return refuse(why, len, SAGE_EUNSUPPORTED,
                      "variant: %s wants compute capability %d.%d, the device has %d.%d, with code "
                      "for %d.%d",
                      sage_kernels[any].variant, sage_kernels[any].min_sm / 10,
                      sage_kernels[any].min_sm % 10, gpu.sm / 10, gpu.sm % 10, gpu.code / 10,
                      gpu.code % 10);
    struct maps maps;
    const int index = choose(attn, gpu.sm, &maps);
    const bool wgmma = is_wgmma(index), quantises = !is_few(index) && !is_exact(index);
    const bool prepares = quantises && !p.prepared;
    describe(attn, &p, index, gpu.processors, &a);
    bool fits = lay_out(attn, &a, &at);
    if (fits && bytes < at.total && a.n_splits > 1) { /* enough for the group, not for splits */
        describe(attn, &p, index, 0, &a);
        fits = lay_out(attn, &a, &at);
    }
    if (!fits || bytes < at.total)
        return refuse(why, len, SAGE_EWORKSPACE, "workspace: %zu bytes, must be %zu", bytes,
                      sage_attn_cuda_workspace(attn, part));
    if (reinterpret_cast<uintptr_t>(workspace) % ALIGN)
        return refuse(why, len, SAGE_EINVAL, "workspace: must be a multiple of %d", ALIGN);
    fill(attn, &at, static_cast<char *>(workspace), &a);
    a.start_ns = start_ns;
    a.go = go;
    a.swizzled = wgmma;
    a.q_map = maps.q;
    a.k_map = maps.k;
    a.v_map = maps.v;
    a.o_mapped = is_exact(index) && map_o(attn, &p, sage_kernels[index].tile_q, &a.o_map);
    a.processors = static_cast<unsigned>(gpu.processors);
    if (a.processors > sage_most_blocks)
        a.processors = sage_most_blocks;
    a.starts_early = gpu.code >= 90;
    if (quantises && gpu.cluster > 0)
        a.cluster = cuda_cluster_blocks(&a, static_cast<unsigned>(gpu.cluster));
    if (__builtin_mul_overflow(a.n_heads, a.chunks.total, &chunks) || chunks > INT_MAX ||
        __builtin_mul_overflow(a.n_heads * a.n_q_heads, a.tiles.total, &tiles) || tiles > INT_MAX)
        return refuse(why, len, SAGE_EUNSUPPORTED,
                      "q.shape: more than 2^31 tiles of %d rows; compute it in parts",
                      sage_kernels[index].tile_q);
    a.n_tiles = static_cast<unsigned>(tiles);
    if (tiles > 0)
        a.order = order_tiles(&a);
    if (a.q_offsets && !p.prepared && (status = copy_offsets(attn, &a, stream, why, len)))
        return status;
    if (prepares && (status = prepare(&a, chunks, wgmma, stream, why, len)))
        return status;
    const int64_t blocks = !is_few(index) ? tiles : p.n_rows == 0 ? 0 : chunks;
    if (blocks == 0)
        return SAGE_OK;
    a.call = next_call();
    const cudaError_t error = kernel(index)->launch(&a, static_cast<unsigned>(blocks), stream);
    return error ? refuse_cuda(why, len, "launching attention", error) : SAGE_OK;
}
