/*
 * cpu.c - sage_attn_cpu(): a pool of threads, the workspace, and the phases of a call.
 */
#ifndef _GNU_SOURCE
#define _GNU_SOURCE /* sched_getaffinity */
#endif
#include "cpu.h"

#include <pthread.h>
#include <sched.h>
#include <signal.h>
#include <stdatomic.h>
#include <stdlib.h>
#include <unistd.h>

/* Bytes, touched as used: a struct cpu_tile takes 290 KiB, sanitizers several times as much. */
enum { THREAD_STACK = 8 << 20 };

typedef void task_fn(const struct cpu_job *job, int64_t n);

/* --- the pool: the caller hands out one phase at a time and works on it too --- */

struct sage_cpu {
    const struct cpu_isa *isa;
    pthread_mutex_t lock;
    pthread_cond_t start, done;
    uint64_t phase; /* counts them; under lock, like all down to `quit` */
    int working;    /* threads of ours that are not yet done with it */
    bool quit;
    task_fn *task;
    const struct cpu_job *job;
    int64_t n_tasks;
    _Atomic int64_t next;
    int n_threads; /* ours: the caller's is not among them */
    pthread_t threads[];
};

static void take_tasks(struct sage_cpu *cpu)
{
    int64_t n;

    while ((n = atomic_fetch_add_explicit(&cpu->next, 1, memory_order_relaxed)) < cpu->n_tasks)
        cpu->task(cpu->job, n);
}

static void *thread_main(void *arg)
{
    struct sage_cpu *cpu = arg;
    uint64_t phase = 0;

    pthread_mutex_lock(&cpu->lock);
    for (;;) {
        while (cpu->phase == phase && !cpu->quit)
            pthread_cond_wait(&cpu->start, &cpu->lock);
        if (cpu->quit)
            break;
        phase = cpu->phase;
        pthread_mutex_unlock(&cpu->lock);
        take_tasks(cpu);
        pthread_mutex_lock(&cpu->lock);
        if (--cpu->working == 0)
            pthread_cond_signal(&cpu->done);
    }
    pthread_mutex_unlock(&cpu->lock);
    return NULL;
}

/* task(job, 0) ... task(job, n_tasks - 1), in any order, by all threads; returns after the last. */
static void run(struct sage_cpu *cpu, task_fn *task, const struct cpu_job *job, int64_t n_tasks)
{
    if (!cpu || cpu->n_threads == 0 || n_tasks <= 1) {
        for (int64_t n = 0; n < n_tasks; n++)
            task(job, n);
        return;
    }
    pthread_mutex_lock(&cpu->lock);
    cpu->task = task;
    cpu->job = job;
    cpu->n_tasks = n_tasks;
    atomic_store_explicit(&cpu->next, 0, memory_order_relaxed);
    cpu->working = cpu->n_threads;
    cpu->phase++;
    pthread_cond_broadcast(&cpu->start);
    pthread_mutex_unlock(&cpu->lock);
    take_tasks(cpu);
    pthread_mutex_lock(&cpu->lock);
    while (cpu->working > 0)
        pthread_cond_wait(&cpu->done, &cpu->lock);
    pthread_mutex_unlock(&cpu->lock);
}

/* Processors that this process may use. */
static int processors(void)
{
    cpu_set_t set;

    if (sched_getaffinity(0, sizeof set, &set) == 0)
        return CPU_COUNT(&set);
    const long n = sysconf(_SC_NPROCESSORS_ONLN);
    return n > 0 ? (int)n : 1;
}

/*
 * Threads with all signals blocked, which are for the process's own threads to handle, and with a
 * stack that holds a tile, whatever the process's limit is.
 */
static int start_threads(struct sage_cpu *cpu, int n)
{
    sigset_t all, before;
    pthread_attr_t attr;
    int error = 0;

    pthread_attr_init(&attr);
    pthread_attr_setstacksize(&attr, THREAD_STACK);
    sigfillset(&all);
    pthread_sigmask(SIG_SETMASK, &all, &before);
    while (cpu->n_threads < n && !error) {
        error = pthread_create(&cpu->threads[cpu->n_threads], &attr, thread_main, cpu);
        if (!error)
            cpu->n_threads++;
    }
    pthread_sigmask(SIG_SETMASK, &before, NULL);
    pthread_attr_destroy(&attr);
    return error;
}

struct sage_cpu *sage_cpu_create(int threads)
{
    const int n = (threads > 0 ? threads : processors()) - 1;
    struct sage_cpu *cpu = calloc(1, sizeof *cpu + (size_t)n * sizeof cpu->threads[0]);

    if (!cpu)
        return NULL;
    cpu->isa = cpu_isa(0);
    pthread_mutex_init(&cpu->lock, NULL);
    pthread_cond_init(&cpu->start, NULL);
    pthread_cond_init(&cpu->done, NULL);
    if (start_threads(cpu, n)) {
        sage_cpu_destroy(cpu);
        return NULL;
    }
    return cpu;
}

void sage_cpu_destroy(struct sage_cpu *cpu)
{
    if (!cpu)
        return;
    pthread_mutex_lock(&cpu->lock);
    cpu->quit = true;
    pthread_cond_broadcast(&cpu->start);
    pthread_mutex_unlock(&cpu->lock);
    for (int i = 0; i < cpu->n_threads; i++)
        pthread_join(cpu->threads[i], NULL);
    pthread_cond_destroy(&cpu->done);
    pthread_cond_destroy(&cpu->start);
    pthread_mutex_destroy(&cpu->lock);
    free(cpu);
}

void cpu_use(struct sage_cpu *cpu, const struct cpu_isa *isa)
{
    cpu->isa = isa;
}

/* --- the workspace --- */

static int64_t ceil_div(int64_t a, int64_t b)
{
    return a / b + (a % b > 0);
}

/* Part to compute: the one given, or all. */
static struct sage_part whole(const struct sage_attn *attn, const struct sage_part *part)
{
    return part ? *part : (struct sage_part){.n_groups = sage_attn_groups(attn), .n_rows = -1};
}

int64_t cpu_few_rows = FEW_ROWS;

static bool is_exact(const struct sage_attn *attn)
{
    return sage_attn_rows(attn) <= cpu_few_rows;
}

/* The problem as it is computed: nothing about quantisation where nothing is quantised. */
static struct sage_attn computed(const struct sage_attn *attn)
{
    struct sage_attn a = *attn;

    if (is_exact(attn)) {
        a.variant = SAGE_INT8_FP16;
        a.smooth_k = a.smooth_v = a.rotate_qk = false;
    }
    return a;
}

static int64_t rows_of(const struct sage_part *part, const struct sage_seq *seq)
{
    return part->n_rows < 0 ? seq->nq : part->n_rows;
}

/* Key blocks and chunks of all groups of the part. */
static void count(const struct sage_attn *attn, const struct sage_part *part, int64_t *blocks,
                  int64_t *chunks)
{
    const int64_t heads = attn->k.shape[1], end = part->group + part->n_groups;

    *blocks = *chunks = 0;
    for (int64_t g = part->group, n; g < end; g += n) {
        const struct sage_seq seq = sage_attn_seq(attn, g / heads);

        /* every batch is alike: all of it at once; sequences differ: as many heads as are left */
        n = attn->n_seqs && heads - g % heads < end - g ? heads - g % heads : end - g;
        /* at most 2^31 groups of 2^25 blocks: no overflow */
        *blocks += n * ceil_div(seq.nk, BLOCK_K);
        *chunks += n * ceil_div(seq.nk, CHUNK_K);
    }
}

/* Room for n elements behind what is there; false where that does not fit size_t. */
static bool place(struct cpu_layout *at, size_t *where, int64_t n, size_t size)
{
    size_t bytes;

    *where = at->total;
    return !__builtin_mul_overflow((size_t)n, size, &bytes) &&
           !__builtin_add_overflow(bytes, (size_t)(LINE - 1), &bytes) &&
           !__builtin_add_overflow(at->total, bytes / LINE * LINE, &at->total);
}

static bool lay_out(const struct sage_attn *attn, const struct sage_part *part,
                    struct cpu_layout *at)
{
    const bool fp8 = sage_attn_variant(attn) == SAGE_INT8_FP8;
    const size_t d = (size_t)attn->k.shape[3], index = sizeof(int64_t);
    const int64_t n = part->n_groups;
    int64_t blocks, chunks;

    count(attn, part, &blocks, &chunks);
    *at = (struct cpu_layout){
        .sum_bytes = (fp8 ? N_SUMS : 1) * d * sizeof(float),
        .k_offset = BLOCK_K * sizeof(float),
        .v_offset = BLOCK_K * sizeof(float) + d * BLOCK_K * sizeof(uint16_t),
        .block_bytes = BLOCK_K * sizeof(float) + (fp8 ? 2 : 1) * d * BLOCK_K * sizeof(uint16_t),
    };
    return place(at, &at->blocks, n + 1, index) && place(at, &at->chunks, n + 1, index) &&
           place(at, &at->tiles, n + 1, index) && place(at, &at->means, n, 3 * d * sizeof(float)) &&
           place(at, &at->sums, attn->smooth_k || fp8 ? chunks : 0, at->sum_bytes) &&
           place(at, &at->data, blocks, at->block_bytes);
}

size_t sage_attn_workspace(const struct sage_attn *attn, const struct sage_part *part)
{
    const struct sage_attn a = computed(attn);
    const struct sage_part p = whole(attn, part);
    struct cpu_layout at;

    return sage_part_is_legal(attn, &p) && lay_out(&a, &p, &at) ? at.total : SIZE_MAX;
}

static int64_t *table(const struct cpu_job *job, size_t offset)
{
    return (int64_t *)(job->workspace + offset);
}

static void fill_tables(const struct cpu_job *job)
{
    const struct sage_attn *a = job->attn;
    const int64_t heads = a->k.shape[1], q_heads = sage_part_heads(a, &job->part);
    int64_t *blocks = table(job, job->at.blocks), *chunks = table(job, job->at.chunks);
    int64_t *tiles = table(job, job->at.tiles);

    blocks[0] = chunks[0] = tiles[0] = 0;
    for (int64_t i = 0; i < job->part.n_groups; i++) {
        const struct sage_seq seq = sage_attn_seq(a, (job->part.group + i) / heads);

        blocks[i + 1] = blocks[i] + ceil_div(seq.nk, BLOCK_K);
        chunks[i + 1] = chunks[i] + ceil_div(seq.nk, CHUNK_K);
        tiles[i + 1] = tiles[i] + q_heads * ceil_div(rows_of(&job->part, &seq), BLOCK_Q);
    }
}

struct cpu_group cpu_group(const struct cpu_job *job, int64_t i)
{
    const int64_t heads = job->attn->k.shape[1], d = job->attn->k.shape[3];
    const int64_t g = job->part.group + i;
    float *means = (float *)(job->workspace + job->at.means) + 3 * d * i;

    return (struct cpu_group){
        .seq = sage_attn_seq(job->attn, g / heads),
        .kv_head = g % heads,
        .k_mean = means,
        .v_scale = means + d,
        .v_mean = means + 2 * d,
        .blocks = job->workspace + job->at.data +
                  (size_t)table(job, job->at.blocks)[i] * job->at.block_bytes,
        .sums = job->workspace + job->at.sums +
                (size_t)table(job, job->at.chunks)[i] * job->at.sum_bytes,
    };
}

/* The last group that begins at or before n; groups without any are passed over. */
int64_t cpu_find(const struct cpu_job *job, size_t offset, int64_t n, int64_t *within)
{
    const int64_t *first = table(job, offset);
    int64_t low = 0, high = job->part.n_groups;

    while (high - low > 1) {
        const int64_t middle = low + (high - low) / 2;

        if (first[middle] <= n)
            low = middle;
        else
            high = middle;
    }
    *within = n - first[low];
    return low;
}

/* --- a call --- */

int sage_attn_cpu(struct sage_cpu *cpu, const struct sage_attn *attn, const struct sage_part *part,
                  void *workspace, size_t bytes)
{
    const struct sage_attn a = computed(attn);
    struct cpu_job job = {
        .attn = &a,
        .isa = cpu ? cpu->isa : cpu_isa(0),
        .part = whole(attn, part),
        .workspace = workspace,
        .exact = is_exact(attn),
        .fp8 = sage_attn_variant(&a) == SAGE_INT8_FP8,
    };

    if (!sage_part_is_legal(attn, &job.part))
        return SAGE_EINVAL;
    if (job.part.n_groups == 0)
        return SAGE_OK;
    if (!lay_out(&a, &job.part, &job.at) || bytes < job.at.total)
        return SAGE_EWORKSPACE;
    if ((uintptr_t)workspace % LINE)
        return SAGE_EINVAL;
    const int64_t n = job.part.n_groups;

    fill_tables(&job);
    if (!job.part.prepared) {
        const int64_t chunks = table(&job, job.at.chunks)[n];

        if (a.smooth_k || job.fp8)
            run(cpu, cpu_sum_chunk, &job, chunks);
        run(cpu, cpu_quantise_chunk, &job, chunks);
    }
    run(cpu, cpu_attend_tile, &job, table(&job, job.at.tiles)[n]);
    return SAGE_OK;
}
