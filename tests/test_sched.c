/*
 * test_sched.c - who gets the slots: a real daemon and real sessions, but a backend whose pieces
 * take as long as the test says. Time is the test's own, so the outcome does not depend on the
 * machine.
 */
#include <fcntl.h>
#include <math.h>
#include <setjmp.h>
#include <stdarg.h>
#include <stddef.h>
#include <stdlib.h>
#include <string.h>
#include <sys/mman.h>
#include <sys/socket.h>
#include <unistd.h>

#include <cmocka.h>

#include "daemon/daemon.h"
#include "daemon/log.h"
#include "kernels/problem.h"

enum { MAX_SLOTS = 8, MEMORY = 16 << 20, O_AT = 4096 };

static struct daemon d;

/* --- a backend that only pretends --- */

struct slot_model {
    struct stream *stream;
    struct {
        struct piece *piece;
        uint64_t start_ns, end_ns; /* told when it ends: sched_is_hung() goes by the real clock */
    } queue[STREAM_DEPTH];
    unsigned n;
};

static struct model {
    struct slot_model slots[MAX_SLOTS];
    unsigned n_slots;
    uint64_t now_ns;
    double ns_per_op;     /* what it takes in truth */
    struct session *slow; /* its jobs take `factor` times as long as others of their size */
    double factor;
    void (*on_start)(struct job *job, struct stream *stream, uint64_t took_ns);
} model;

static struct job *job_of(struct piece *piece)
{
    return (struct job *)((char *)piece - offsetof(struct job, piece));
}

static struct slot_model *slot_of(struct stream *stream)
{
    struct slot_model *slot = model.slots;

    while (slot < model.slots + model.n_slots && slot->stream != stream)
        slot++;
    if (slot == model.slots + model.n_slots) {
        assert_true(model.n_slots < MAX_SLOTS);
        slot->stream = stream;
        model.n_slots++;
    }
    return slot;
}

static void model_start(struct stream *stream, struct piece *piece)
{
    struct slot_model *slot = slot_of(stream);
    struct job *job = job_of(piece);
    double took = 1000 + sage_attn_ops(piece->attn, &piece->part) * model.ns_per_op;

    assert_true(slot->n < STREAM_DEPTH);
    assert_true(d.backend->workspace(piece->attn, &piece->part) <= d.sched.workspace);
    if (job->session == model.slow)
        took *= model.factor;
    uint64_t start_ns = slot->n ? slot->queue[slot->n - 1].end_ns : model.now_ns;
    slot->queue[slot->n].piece = piece;
    slot->queue[slot->n].start_ns = start_ns;
    slot->queue[slot->n++].end_ns = start_ns + (uint64_t)took;
    if (model.on_start)
        model.on_start(job, stream, (uint64_t)took);
}

/* The piece that ends next is over. false: none is running. */
static bool step(void)
{
    struct slot_model *next = NULL;

    for (unsigned i = 0; i < model.n_slots; i++) {
        struct slot_model *slot = &model.slots[i];
        if (slot->n && (!next || slot->queue[0].end_ns < next->queue[0].end_ns))
            next = slot;
    }
    if (!next)
        return false;
    struct piece *piece = next->queue[0].piece;
    piece->start_ns = next->queue[0].start_ns;
    piece->end_ns = model.now_ns = next->queue[0].end_ns;
    memmove(next->queue, next->queue + 1, --next->n * sizeof(next->queue[0]));
    piece->missed = piece->wait_ns && !job_is_ready(job_of(piece));
    if (piece->missed)
        piece->end_ns = piece->start_ns;
    else if (piece->lane)
        page_release(piece->lane, piece->number, 0);
    piece->done = 1;
    uv_run(&d.loop, UV_RUN_NOWAIT);
    return true;
}

/* --- clients --- */

struct peer {
    struct session *s;
    int fd;
    struct sage_page *page;
    char *memory;
    uint32_t last[SAGE_LANES];
    uint64_t used_ns, jobs;
};

static void packet(struct peer *p, uint32_t op, enum msg_kind kind, const void *msg, int fd)
{
    static char data[PROTO_PACKET_MAX];
    size_t len = packet_encode(data, sizeof(data), op, 1, kind, msg);

    assert_true(len > 0);
    assert_true(session_packet(p->s, data, len, &fd, fd >= 0));
    while (recv(p->fd, data, sizeof(data), MSG_DONTWAIT) > 0)
        continue;
}

static void connect_peer(struct peer *p, uint32_t priority)
{
    struct msg_hello hello = {
        .major = PROTO_MAJOR, .priority = priority, .name = "peer", .page = true};
    struct msg_register reg = {.buffer = 1, .kind = BUFFER_MEMFD, .size = MEMORY};
    int fds[2], page_fd, fd = memfd_create("memory", MFD_CLOEXEC | MFD_ALLOW_SEALING);

    memset(p, 0, sizeof(*p));
    assert_int_equal(socketpair(AF_UNIX, SOCK_SEQPACKET | SOCK_CLOEXEC, 0, fds), 0);
    p->fd = fds[0];
    p->s = session_create(&d, fds[1]);
    assert_non_null(p->s);
    p->page = page_create(&page_fd);
    assert_non_null(p->page);
    packet(p, OP_HELLO, MSG_HELLO, &hello, page_fd);
    assert_int_equal(ftruncate(fd, MEMORY), 0);
    assert_int_equal(fcntl(fd, F_ADD_SEALS, F_SEAL_SHRINK), 0);
    packet(p, OP_REGISTER, MSG_REGISTER, &reg, fd);
    while (!buffer_find(p->s, 1))
        uv_run(&d.loop, UV_RUN_ONCE);
}

/* Inputs are one vector, read again and again; only o takes room. */
static struct sage_attn problem(int64_t heads, int64_t nq, int64_t nk)
{
    struct sage_attn attn = SAGE_ATTN_INIT;
    struct sage_tensor t = {
        .dtype = SAGE_F16, .buffer = 1, .shape = {1, heads, nq, 64}, .stride = {0, 0, 0, 1}};

    attn.q = t;
    t.shape[2] = nk;
    attn.k = attn.v = t;
    attn.o = (struct sage_tensor){
        SAGE_F16, 1, O_AT, NULL, {1, heads, nq, 64}, {heads * nq * 64, nq * 64, 64, 1}};
    return attn;
}

static void acquire(struct peer *p, uint32_t lane, uint32_t number)
{
    page_store(&p->page->lane[lane].acquire[number % SAGE_ENTRIES], number);
}

/* Its inputs are not ready, unless the number was acquired. */
static uint32_t submit_held(struct peer *p, uint32_t lane, struct sage_attn attn)
{
    static struct msg_submit msg;

    msg.lane = lane;
    msg.number = ++p->last[lane];
    msg.attn = attn;
    packet(p, OP_SUBMIT, MSG_SUBMIT, &msg, -1);
    uv_run(&d.loop, UV_RUN_NOWAIT);
    return msg.number;
}

static uint32_t submit(struct peer *p, uint32_t lane, struct sage_attn attn)
{
    acquire(p, lane, p->last[lane] + 1);
    return submit_held(p, lane, attn);
}

/* All but the last `left` jobs of the lane? */
static bool released_but(const struct peer *p, uint32_t lane, uint32_t left)
{
    uint32_t n = p->last[lane] - left;

    return p->last[lane] <= left ||
           page_reached(page_load(&p->page->lane[lane].release[n % SAGE_ENTRIES]), n);
}

static bool released(const struct peer *p, uint32_t lane)
{
    return released_but(p, lane, 0);
}

static void disconnect(struct peer *p)
{
    close(p->fd);
    page_unmap(p->page);
}

/* --- set up --- */

static struct backend fake;

static void start_daemon(unsigned slots, unsigned quantum_us)
{
    struct config config;
    char why[256] = "";

    config_init(&config);
    config.slots = slots;
    config.threads = 1;
    config.slot_bytes = 8 << 20;
    config.quantum_us = quantum_us;
    strcpy(config.backend, "cpu");
    assert_true(config_finish(&config, why));
    if (daemon_init(&d, &config, why))
        fail_msg("%s", why);
    fake = *d.backend;
    fake.start = model_start;
    d.backend = &fake;
    model = (struct model){.ns_per_op = fake.ns_per_op};
}

static void stop_daemon(void)
{
    while (step())
        continue;
    while (!TAILQ_EMPTY(&d.sessions))
        session_close(TAILQ_FIRST(&d.sessions), "test ends");
    const uint64_t until_ns = daemon_now() + 10000000000;
    while (d.n_live && daemon_now() < until_ns) { /* threads of the pool close what is mapped */
        uv_run(&d.loop, UV_RUN_ONCE);
        while (step())
            continue;
    }
    assert_int_equal(d.n_live, 0);
    assert_int_equal(d.sched.n_held, 0);
    assert_int_equal(d.sched.n_active, 0);
    assert_true(TAILQ_EMPTY(&d.users));
    assert_false(watch_has_jobs(&d.watch));
    daemon_finish(&d);
}

/* --- shares --- */

static struct peer peers[4];

static void account(struct job *job, struct stream *stream, uint64_t took_ns)
{
    (void)stream;
    for (int i = 0; i < 4; i++)
        if (peers[i].s == job->session)
            peers[i].used_ns += took_ns;
}

/* Each of n peers always has ten jobs of its kind in each of four lanes, for so long. */
static void run_load(int n, const struct sage_attn *kinds, uint64_t duration_ns)
{
    model.on_start = account;
    while (model.now_ns < duration_ns) {
        for (int i = 0; i < n; i++) {
            for (uint32_t lane = 0; lane < 4; lane++) {
                if (!released_but(&peers[i], lane, 9))
                    continue;
                submit(&peers[i], lane, kinds[i]);
                peers[i].jobs++;
            }
        }
        step();
    }
    model.on_start = NULL;
}

static void assert_ratio(double got, double wanted, double tolerance)
{
    if (fabs(got / wanted - 1) > tolerance)
        fail_msg("%u slots: ratio %g, wanted %g", d.sched.n_slots, got, wanted);
}

/* Small jobs and jobs 200 times as large: the same device time each. */
static void test_fair(void **state)
{
    (void)state;
    for (unsigned slots = 1; slots <= 4; slots++) {
        start_daemon(slots, 1000);
        connect_peer(&peers[0], PRIORITY_NORMAL);
        connect_peer(&peers[1], PRIORITY_NORMAL);
        struct sage_attn kinds[] = {problem(2, 128, 128), problem(200, 128, 256)};
        run_load(2, kinds, 2000000000);
        assert_ratio((double)peers[0].used_ns / (double)peers[1].used_ns, 1, 0.1);
        stop_daemon();
        disconnect(&peers[0]);
        disconnect(&peers[1]);
    }
}

/* What counts is the time that jobs take, not what was expected of them. */
static void test_measured(void **state)
{
    (void)state;
    start_daemon(3, 1000);
    connect_peer(&peers[0], PRIORITY_NORMAL);
    connect_peer(&peers[1], PRIORITY_NORMAL);
    struct sage_attn kinds[] = {problem(2, 256, 256), problem(2, 256, 256)};
    model.slow = peers[1].s;
    model.factor = 10;
    run_load(2, kinds, 2000000000);
    assert_ratio((double)peers[0].used_ns / (double)peers[1].used_ns, 1, 0.1);
    stop_daemon();
    disconnect(&peers[0]);
    disconnect(&peers[1]);
}

/* 1 : 4 : 16, and none starves. */
static void test_priorities(void **state)
{
    (void)state;
    start_daemon(2, 1000);
    for (uint32_t i = 0; i < 3; i++)
        connect_peer(&peers[i], i);
    struct sage_attn kinds[] = {problem(4, 256, 256), problem(4, 256, 256), problem(9, 128, 256)};
    run_load(3, kinds, 4000000000);
    assert_ratio((double)peers[1].used_ns / (double)peers[0].used_ns, 4, 0.15);
    assert_ratio((double)peers[2].used_ns / (double)peers[1].used_ns, 4, 0.15);
    stop_daemon();
    for (int i = 0; i < 3; i++)
        disconnect(&peers[i]);
}

/* What a job took less than was expected of it is not saved up by a client with nothing to do. */
static void test_quicker_than_expected(void **state)
{
    struct peer *p = &peers[0];
    (void)state;

    start_daemon(1, 1000);
    connect_peer(p, PRIORITY_NORMAL);
    model.slow = p->s;
    for (int i = 0; i < 8; i++) {
        model.factor = i < 4 ? 1 : 0.01;
        submit(p, 0, problem(2, 256, 256));
        while (!released(p, 0))
            step();
        assert_true(p->s->deficit_ns <= 0);
    }
    stop_daemon();
    disconnect(p);
}

/* Time that nobody else wants is not withheld, and not saved up either. */
static void test_work_conserving(void **state)
{
    (void)state;
    start_daemon(2, 1000);
    connect_peer(&peers[0], PRIORITY_LOW);
    connect_peer(&peers[1], PRIORITY_LOW);
    struct sage_attn kinds[] = {problem(4, 256, 256), problem(4, 256, 256)};
    run_load(1, kinds, 500000000);
    assert_ratio((double)peers[0].used_ns, 2 * 500e6, 0.05);
    peers[0].used_ns = 0;
    run_load(2, kinds, 1000000000);
    assert_ratio((double)peers[0].used_ns / (double)peers[1].used_ns, 1, 0.1);
    stop_daemon();
    disconnect(&peers[0]);
    disconnect(&peers[1]);
}

/* --- pieces --- */

static struct coverage {
    int64_t nq, groups;
    int64_t group, row; /* all before has been started */
    struct stream *stream;
    double quantum_ns;
    unsigned most_held, there,
        handed_over; /* pieces since K and V were prepared; how often again */
} cover;

/*
 * Pieces follow each other without gap or overlap, and rows of a group stay where its K and V are,
 * for a while at least.
 */
static void check_piece(struct job *job, struct stream *stream, uint64_t took_ns)
{
    const struct sage_part *part = &job->piece.part;

    if (d.sched.n_held > cover.most_held)
        cover.most_held = d.sched.n_held;
    if (job->session != peers[0].s)
        return;
    assert_int_equal(part->group, cover.group);
    /* Alone half as much again as two quanta; 128 rows are the least that is worth a piece. */
    assert_true((double)took_ns < 3.1 * cover.quantum_ns ||
                (part->n_rows >= 0 && part->n_rows <= 128));
    if (part->n_rows < 0) {
        assert_int_equal(cover.row, 0);
        cover.group += part->n_groups;
    } else {
        assert_int_equal(part->n_groups, 1);
        assert_int_equal(part->row, cover.row);
        if (part->prepared) {
            assert_true(part->row > 0);
            assert_ptr_equal(stream, cover.stream);
        } else if (part->row > 0) {
            assert_true(cover.there >= 8);
            cover.handed_over++;
        }
        cover.there = part->prepared ? cover.there + 1 : 1;
        cover.stream = stream;
        cover.row += part->n_rows;
        assert_true(cover.row <= cover.nq);
        if (cover.row == cover.nq) {
            cover.row = 0;
            cover.group++;
        }
    }
    bool last = cover.group == cover.groups;
    assert_int_equal(job->piece.lane != NULL, last);
    assert_int_equal(job_is_last_piece(job), last);
}

static void cut(int64_t heads, int64_t nq, int64_t nk, bool causal, unsigned slots)
{
    const unsigned quantum_us = 500;
    start_daemon(slots, quantum_us);
    connect_peer(&peers[0], PRIORITY_NORMAL);
    connect_peer(&peers[1], PRIORITY_NORMAL);
    struct sage_attn attn = problem(heads, nq, nk), small = problem(1, 64, 64);
    attn.causal = causal;
    cover = (struct coverage){.nq = nq, .groups = heads, .quantum_ns = quantum_us * 1e3};
    model.on_start = check_piece;
    submit(&peers[0], 0, attn);
    while (!released(&peers[0], 0)) {
        if (released(&peers[1], 5))
            submit(&peers[1], 5, small);
        assert_true(step());
    }
    assert_int_equal(cover.group, heads);
    model.on_start = NULL;
    stop_daemon();
    disconnect(&peers[0]);
    disconnect(&peers[1]);
}

static void test_pieces(void **state)
{
    (void)state;
    for (unsigned slots = 1; slots <= 3; slots++) {
        cut(16, 256, 1024, false, slots); /* groups of 0.86 ms */
        cut(32, 128, 256, false, slots);  /* several groups a piece */
        cut(1, 4096, 4096, false, slots); /* rows of one group */
        cut(3, 2000, 3000, false, slots); /* and of three, one after the other */
        cut(2, 3000, 3000, true, slots);
        cut(1, 129, 30000, false, slots);
    }
}

static unsigned n_pieces;

static void count_piece(struct job *job, struct stream *stream, uint64_t took_ns)
{
    (void)stream, (void)took_ns;
    n_pieces += job->session == peers[0].s;
}

/* Into how many pieces is a job cut, alone and beside another client's? */
static unsigned pieces(bool alone)
{
    start_daemon(3, 2000);
    connect_peer(&peers[0], PRIORITY_NORMAL);
    connect_peer(&peers[1], PRIORITY_NORMAL);
    n_pieces = 0;
    model.on_start = count_piece;
    if (!alone)
        submit(&peers[1], 0, problem(1, 64, 64));
    submit(&peers[0], 0, problem(64, 128, 256));
    while (!released(&peers[0], 0)) {
        if (!alone && released(&peers[1], 0))
            submit(&peers[1], 0, problem(1, 64, 64));
        assert_true(step());
    }
    model.on_start = NULL;
    stop_daemon();
    disconnect(&peers[0]);
    disconnect(&peers[1]);
    return n_pieces;
}

static void test_alone(void **state)
{
    unsigned beside = pieces(false);
    (void)state;

    assert_in_range(beside, 6, 32);
    assert_in_range(pieces(true), beside / 2 - 1, beside / 2 + 1);
}

/*
 * Clients with long heads never hold the last slots: a small job does not wait for one of them to
 * end.
 */
static void test_held_slots(void **state)
{
    (void)state;
    for (unsigned slots = 2; slots <= 5; slots++) {
        start_daemon(slots, 500);
        for (int i = 0; i < 4; i++)
            connect_peer(&peers[i], PRIORITY_NORMAL);
        cover = (struct coverage){0};
        model.on_start = check_piece;
        struct session *first = peers[0].s;
        peers[0].s = NULL; /* check_piece() is to count only */
        for (int i = 1; i < 4; i++)
            for (uint32_t lane = 0; lane < 3; lane++)
                submit(&peers[i], lane, problem(1, 8192, 8192));
        for (int i = 0; i < 20; i++)
            assert_true(step());
        peers[0].s = first;
        model.on_start = NULL;
        for (int i = 0; i < 50; i++) {
            uint64_t start = model.now_ns;
            submit(&peers[0], 0, problem(1, 64, 64));
            while (!released(&peers[0], 0))
                assert_true(step());
            /*
             * Three others with a quantum each before it, each piece a little longer than
             * estimated.
             */
            assert_true(model.now_ns - start < 4 * 2 * 500000);
        }
        assert_true(cover.most_held >= 1);
        assert_true(cover.most_held <= (slots > 3 ? slots - 2 : 1));
        for (int i = 1; i < 4; i++) /* and they end, one after the other */
            for (uint32_t lane = 0; lane < 3; lane++)
                while (!released(&peers[i], lane))
                    assert_true(step());
        stop_daemon();
        for (int i = 0; i < 4; i++)
            disconnect(&peers[i]);
    }
}

/* Who computes a head of hours lets others with long heads have the slot between its pieces. */
static void test_handed_over(void **state)
{
    (void)state;
    for (unsigned slots = 1; slots <= 3; slots++) {
        start_daemon(slots, 500);
        for (int i = 0; i < 2; i++)
            connect_peer(&peers[i], PRIORITY_NORMAL);
        cover = (struct coverage){.nq = 100000, .groups = 1, .quantum_ns = 500e3};
        model.on_start = check_piece;
        submit(&peers[0], 0, problem(1, 100000, 8192));
        for (int i = 0; i < 3; i++)
            assert_true(step());
        assert_int_equal(d.sched.n_held, 1);
        uint64_t start_ns = model.now_ns;
        submit(&peers[1], 0, problem(1, 4096, 8192));
        while (!released(&peers[1], 0))
            assert_true(step());
        double alone = 2.0 * 2 * 64 * 4096 * 8192 * fake.ns_per_op;
        assert_true((double)(model.now_ns - start_ns) < 3 * alone + 2 * 9 * 500e3);
        assert_false(released(&peers[0], 0));
        assert_true(cover.handed_over >= 1);
        unsigned before = cover.handed_over;
        while (!released(&peers[0], 0)) /* for nobody */
            assert_true(step());
        assert_true(cover.handed_over <= before + 1);
        model.on_start = NULL;
        stop_daemon();
        for (int i = 0; i < 2; i++)
            disconnect(&peers[i]);
    }
}

static unsigned n_prepared;

static void count_prepared(struct job *job, struct stream *stream, uint64_t took_ns)
{
    (void)stream, (void)took_ns;
    n_prepared += !job->piece.part.prepared;
}

/* For a job of the same client a slot is not let go of. */
static void test_not_handed_over(void **state)
{
    (void)state;
    for (unsigned slots = 1; slots <= 3; slots++) {
        start_daemon(slots, 500);
        connect_peer(&peers[0], PRIORITY_NORMAL);
        n_prepared = 0;
        model.on_start = count_prepared;
        for (uint32_t lane = 0; lane < 2; lane++)
            submit(&peers[0], lane, problem(1, 100000, 8192));
        while (!released(&peers[0], 0) || !released(&peers[0], 1))
            assert_true(step());
        assert_int_equal(n_prepared, 2);
        model.on_start = NULL;
        stop_daemon();
        disconnect(&peers[0]);
    }
}

/* A sequence without rows, whose keys alone would make a long piece. */
static void test_empty_sequence(void **state)
{
    static struct msg_submit msg;
    struct peer *p = &peers[0];
    (void)state;

    start_daemon(2, 500);
    connect_peer(p, PRIORITY_NORMAL);
    msg.lane = 0;
    msg.number = ++p->last[0];
    msg.attn = problem(1, 64, 60000);
    msg.attn.n_seqs = 2;
    msg.n_q_offsets = msg.n_k_offsets = 3;
    msg.q_offsets[2] = 64;
    msg.k_offsets[1] = 59000;
    msg.k_offsets[2] = 60000;
    acquire(p, 0, msg.number);
    packet(p, OP_SUBMIT, MSG_SUBMIT, &msg, -1);
    cover = (struct coverage){.nq = 64, .groups = 2, .quantum_ns = 500e3};
    model.on_start = check_piece;
    uv_run(&d.loop, UV_RUN_NOWAIT);
    while (step())
        continue;
    assert_true(released(p, 0));
    assert_int_equal(cover.group, 2);
    assert_true(p->s->deficit_ns > -1e9);
    model.on_start = NULL;
    stop_daemon();
    disconnect(p);
}

/* A piece that was stopped for long says little about the speed, and that is forgotten again. */
static void test_stood(void **state)
{
    (void)state;
    start_daemon(2, 2000);
    connect_peer(&peers[0], PRIORITY_NORMAL);
    double rate = d.sched.ns_per_op;
    model.slow = peers[0].s;
    for (int i = 0; i < 100; i++) {
        model.factor = i == 0 ? 100000 : 1;
        submit(&peers[0], 0, problem(64, 256, 256));
        for (int n = 0; !released(&peers[0], 0); n++) {
            assert_true(step());
            assert_true(d.sched.ns_per_op < 4 * rate);
            model.factor = 1; /* only the first pieces */
        }
    }
    assert_true(d.sched.ns_per_op < 1.1 * rate);
    stop_daemon();
    disconnect(&peers[0]);
}

/* --- lanes, closing --- */

static void check_lane_order(struct job *job, struct stream *stream, uint64_t took_ns)
{
    (void)stream, (void)took_ns;
    assert_ptr_equal(TAILQ_FIRST(&job->session->lanes[job->lane].jobs), job);
}

static void test_lanes(void **state)
{
    (void)state;
    start_daemon(3, 500);
    connect_peer(&peers[0], PRIORITY_NORMAL);
    model.on_start = check_lane_order;
    for (int i = 0; i < 60; i++)
        for (uint32_t lane = 0; lane < 4; lane++)
            submit(&peers[0], lane, problem(1 + i % 3, 64 + 64 * (i % 5), 512));
    while (step())
        continue;
    for (uint32_t lane = 0; lane < 4; lane++)
        assert_true(released(&peers[0], lane));
    assert_int_equal(d.stats.done, 240);
    stop_daemon();
    disconnect(&peers[0]);
}

/* A session closes after any number of steps: pieces that run end, nothing else of it starts. */
static void test_close_anywhere(void **state)
{
    static struct session *closed;
    (void)state;

    for (int steps = 0; steps < 40; steps++) {
        start_daemon(1 + (unsigned)steps % 4, 500);
        connect_peer(&peers[0], PRIORITY_NORMAL);
        connect_peer(&peers[1], PRIORITY_NORMAL);
        for (uint32_t lane = 0; lane < 3; lane++) {
            submit(&peers[0], lane, problem(1, 4096, 4096));
            submit(&peers[0], lane, problem(3, 256, 256));
            submit(&peers[1], lane, problem(lane + 1, 1024, 2048));
        }
        for (int i = 0; i < steps; i++)
            step();
        closed = peers[0].s;
        session_close(closed, "test");
        while (!released(&peers[1], 0) || !released(&peers[1], 1) || !released(&peers[1], 2))
            assert_true(step());
        assert_int_equal(d.stats.dropped + d.stats.done, 9);
        submit(&peers[1], 0, problem(1, 4096, 4096)); /* a slot to hold is free again */
        while (!released(&peers[1], 0))
            assert_true(step());
        stop_daemon();
        disconnect(&peers[0]);
        disconnect(&peers[1]);
    }
}

/* --- events, lists of chunks, pieces that are polled for --- */

/* A device that shares events and memory as CUDA does; a handle's first byte is its number. */
static struct shared {
    int status;           /* what event_open() and event_record() come to */
    int ready[8];         /* of clients' events, as event_done() says */
    unsigned n_open;      /* of these */
    unsigned recorded;    /* events of ours */
    unsigned given_back;  /* of these */
    unsigned n_mapped;    /* chunks */
    unsigned polls, last; /* the piece that runs is over when `polls` comes to `last` */
    int warmed, warmed_running;
    unsigned asked; /* how often for a client's event */
    char memory[MEMORY];
} shared;

static int shared_open(struct device *device, const uint8_t *handle, void **event, char *why)
{
    (void)device;
    if (shared.status) {
        strcpy(why, "the text of the status");
        return shared.status;
    }
    *event = &shared.ready[handle[0]];
    shared.n_open++;
    return 0;
}

static void shared_close(struct device *device, void *event)
{
    (void)device, (void)event;
    shared.n_open--;
}

static int shared_done(struct device *device, void *event)
{
    (void)device;
    shared.asked++;
    return *(const int *)event;
}

static int shared_record(struct stream *stream, uint32_t *number, uint8_t *handle)
{
    (void)stream;
    if (shared.status)
        return shared.status;
    *number = ++shared.recorded;
    memset(handle, (int)*number, PROTO_HANDLE_MAX);
    return 0;
}

static void shared_put(struct device *device, uint32_t number)
{
    (void)device;
    assert_in_range(number, 1, shared.recorded);
    shared.given_back++;
}

static int shared_map(struct device *device, const struct mapping *what, void **base,
                      uint64_t *size, char *why)
{
    (void)device, (void)why;
    *size = 0;
    for (uint32_t i = 0; i < what->n; i++)
        *size += what->sizes[i];
    shared.n_mapped += what->n;
    *base = shared.memory;
    return 0;
}

static void shared_unmap(struct device *device, const struct mapping *what, void *base,
                         uint64_t size)
{
    if (what->kind == BUFFER_VMM)
        shared.n_mapped -= what->n;
    else
        backend_cpu.unmap(device, what, base, size);
}

static void forget_answers(const struct peer *p)
{
    char answer[256];

    while (recv(p->fd, answer, sizeof(answer), MSG_DONTWAIT) > 0)
        continue;
}

static void start_shared(struct peer *p)
{
    start_daemon(2, 500);
    memset(&shared, 0, sizeof(shared));
    fake.kinds = 1 << BUFFER_VMM | 1 << BUFFER_MEMFD;
    fake.modes = MODE_SYNC | MODE_EVENT;
    fake.event_open = shared_open;
    fake.event_close = shared_close;
    fake.event_done = shared_done;
    fake.event_record = shared_record;
    fake.event_put = shared_put;
    connect_peer(p, PRIORITY_NORMAL);
    forget_answers(p);
}

/* What the daemon says next, of this kind; its op must be `op`. */
static void hear(struct peer *p, uint32_t op, enum msg_kind kind, void *msg)
{
    static struct unpacker *unpacker;
    static char data[PROTO_PACKET_MAX];
    struct packet got;
    char why[PROTO_TEXT_MAX];
    ssize_t n;

    unpacker = unpacker ? unpacker : unpacker_create();
    while ((n = recv(p->fd, data, sizeof(data), MSG_DONTWAIT)) < 0)
        uv_run(&d.loop, UV_RUN_ONCE);
    assert_int_equal(packet_open(unpacker, data, (size_t)n, &got, why), 0);
    assert_int_equal(got.op, op);
    assert_int_equal(packet_decode(&got, kind, msg, why), 0);
}

/* Like packet(), but what is answered stays to be heard. */
static void say(struct peer *p, uint32_t op, enum msg_kind kind, const void *msg, unsigned n_fds)
{
    static char data[PROTO_PACKET_MAX];
    int fds[PROTO_FDS_MAX];
    size_t len = packet_encode(data, sizeof(data), op, 1, kind, msg);

    for (unsigned i = 0; i < n_fds; i++)
        fds[i] = dup(STDERR_FILENO);
    assert_true(len > 0);
    assert_true(session_packet(p->s, data, len, fds, n_fds));
}

static void submit_event(struct peer *p, uint32_t lane, uint32_t event)
{
    static struct msg_submit msg;

    msg.lane = lane;
    msg.number = ++p->last[lane];
    msg.event = event;
    msg.prompt = true;
    msg.attn = problem(1, 64, 64);
    page_store(&p->page->lane[lane].acquire[msg.number % SAGE_ENTRIES], msg.number);
    say(p, OP_SUBMIT, MSG_SUBMIT, &msg, 0);
}

/* A job waits for its event, is launched, and its client gives the daemon's event back. */
static void test_events(void **state)
{
    struct msg_event event = {.event = 5, .n_handle = PROTO_HANDLE_MAX, .handle = {3}};
    static struct msg_done done;
    struct msg_launched launched;
    struct msg_waited waited;
    struct msg_error error;
    struct msg_empty empty;
    struct peer *p = &peers[0];
    (void)state;

    start_shared(p);
    say(p, OP_EVENT, MSG_EVENT, &event, 0);
    hear(p, OP_EVENT, MSG_EMPTY, &empty);
    say(p, OP_EVENT, MSG_EVENT, &event, 0); /* twice */
    hear(p, OP_ERROR, MSG_ERROR, &error);
    assert_int_equal(error.status, -SAGE_EINVAL);

    submit_event(p, 0, 5);
    for (int i = 0; i < 100; i++)
        uv_run(&d.loop, UV_RUN_NOWAIT);
    assert_int_equal(sched_slots_used(&d), 0);
    shared.ready[3] = 1;
    hear(p, OP_LAUNCHED, MSG_LAUNCHED, &launched);
    assert_int_equal(launched.number, p->last[0]);
    assert_int_equal(launched.handle[0], launched.event);
    assert_false(released(p, 0));
    assert_true(step());
    assert_true(released(p, 0));
    assert_string_equal(p->s->mode, "event");

    waited.event = launched.event + 1;
    say(p, OP_WAITED, MSG_WAITED, &waited, 0);
    hear(p, OP_DONE, MSG_DONE, &done);
    hear(p, OP_ERROR, MSG_ERROR, &error);
    waited.event = launched.event;
    say(p, OP_WAITED, MSG_WAITED, &waited, 0);
    hear(p, OP_WAITED, MSG_EMPTY, &empty);
    assert_int_equal(shared.given_back, 1);
    assert_int_equal(p->s->n_pledged, 0);
    say(p, OP_WAITED, MSG_WAITED, &waited, 0);
    hear(p, OP_ERROR, MSG_ERROR, &error);

    shared.ready[3] = SAGE_EHANDLE; /* it cannot be asked for any more */
    submit_event(p, 1, 5);
    hear(p, OP_DONE, MSG_DONE, &done);
    assert_int_equal(done.jobs[0].status, -SAGE_EHANDLE);
    assert_true(released(p, 1));
    assert_int_equal(p->s->n_pledged, 0);

    shared.ready[3] = 0; /* the session ends with jobs of all kinds */
    submit_event(p, 2, 5);
    shared.ready[3] = 1;
    submit_event(p, 3, 5);
    hear(p, OP_LAUNCHED, MSG_LAUNCHED, &launched);
    stop_daemon();
    assert_int_equal(shared.n_open, 0);
    assert_int_equal(shared.given_back, shared.recorded);
    disconnect(p);
}

/* Nothing more is said to anybody; the next daemon serves. */
static void assert_lost(struct peer *p, const char *why)
{
    char data[256];

    for (int i = 0; i < 1000 && !d.device_lost; i++)
        uv_run(&d.loop, UV_RUN_ONCE);
    assert_true(d.device_lost);
    assert_string_equal(d.lost_why, why);
    assert_int_equal(d.exit_code, EXIT_DEVICE_LOST);
    assert_true(recv(p->fd, data, sizeof(data), MSG_DONTWAIT) < 0);
    d.device_lost = false; /* so that the test can end as others do */
}

/* The device is lost while an event is opened, or asked for: its client gets no answer. */
static void test_events_lost(void **state)
{
    struct msg_event event = {.event = 1, .n_handle = PROTO_HANDLE_MAX};
    struct msg_launched launched;
    static struct msg_done done;
    struct msg_empty empty;
    struct peer *p = &peers[0];
    (void)state;

    start_shared(p);
    say(p, OP_EVENT, MSG_EVENT, &event, 0);
    hear(p, OP_EVENT, MSG_EMPTY, &empty);
    submit_event(p, 0, 1);
    shared.ready[0] = SAGE_EDEVICE;
    assert_lost(p, "found by asking for an event");
    assert_false(released(p, 0));
    shared.ready[0] = 1;
    hear(p, OP_LAUNCHED, MSG_LAUNCHED, &launched);
    assert_true(step());
    hear(p, OP_DONE, MSG_DONE, &done);

    shared.status = SAGE_ENOMEM; /* no event of ours: the release tells */
    submit_event(p, 0, 1);
    while (sched_slots_used(&d) == 0)
        uv_run(&d.loop, UV_RUN_ONCE);
    assert_true(step());
    hear(p, OP_DONE, MSG_DONE, &done);
    assert_int_equal(done.jobs[0].status, 0);
    assert_true(released(p, 0));
    assert_int_equal(p->s->n_pledged, 1); /* the first one's, which is not WAITED for */

    shared.status = SAGE_EDEVICE;
    event.event = 2;
    say(p, OP_EVENT, MSG_EVENT, &event, 0);
    assert_lost(p, "the text of the status");
    LIST_FIRST(&p->s->events)->ready = true; /* goes with the session, like the other one */
    shared.n_open++;
    stop_daemon();
    assert_int_equal(shared.n_open, 0);
    disconnect(p);
}

/* No more than EVENTS_MAX jobs wait for their WAITED. */
static void test_event_limit(void **state)
{
    struct msg_event event = {.event = 1, .n_handle = PROTO_HANDLE_MAX};
    static struct msg_done done;
    struct msg_launched launched;
    struct msg_empty empty;
    struct peer *p = &peers[0];
    (void)state;

    start_shared(p);
    say(p, OP_EVENT, MSG_EVENT, &event, 0);
    hear(p, OP_EVENT, MSG_EMPTY, &empty);
    shared.ready[0] = 1;
    for (int i = 0; i < EVENTS_MAX; i++) {
        submit_event(p, 0, 1);
        hear(p, OP_LAUNCHED, MSG_LAUNCHED, &launched);
        assert_true(step());
        hear(p, OP_DONE, MSG_DONE, &done);
    }
    assert_int_equal(shared.recorded, EVENTS_MAX);
    submit_event(p, 0, 1);
    hear(p, OP_DONE, MSG_DONE, &done);
    assert_int_equal(done.jobs[0].status, -SAGE_EBUSY);
    stop_daemon();
    assert_int_equal(shared.given_back, EVENTS_MAX);
    disconnect(p);
}

/* A device that stores releases itself, at the same address as we do. */
static struct {
    int opened, closed;
    struct sage_page *page;
} paged;

static int paged_open(struct device *device, struct sage_page *page, struct sage_page **remote,
                      char *why)
{
    (void)device, (void)why;
    *remote = paged.page = page;
    paged.opened++;
    return 0;
}

static void paged_close(struct device *device, struct sage_page *page)
{
    (void)device;
    assert_ptr_equal(page, paged.page);
    paged.closed++;
}

/* Of a job's pieces the device releases the last one's, and only that. */
static void check_remote(struct job *job, struct stream *stream, uint64_t took_ns)
{
    const struct piece *piece = &job->piece;
    (void)stream, (void)took_ns;

    assert_ptr_equal(piece->remote, piece->lane);
    assert_int_equal(piece->lane != NULL, job_is_last_piece(job));
}

/* The device has a page from when its client came until all its jobs are over. */
static void test_page(void **state)
{
    struct peer *p = &peers[0];
    (void)state;

    start_daemon(1, 1000);
    memset(&paged, 0, sizeof(paged));
    fake.page_open = paged_open;
    fake.page_close = paged_close;
    connect_peer(p, PRIORITY_NORMAL);
    while (p->s->page_busy)
        uv_run(&d.loop, UV_RUN_ONCE);
    assert_ptr_equal(p->s->remote, p->s->page);
    model.on_start = check_remote;
    submit(p, 0, problem(8, 1024, 1024)); /* several pieces */
    while (!released(p, 0))
        assert_true(step());
    submit(p, 0, problem(8, 64, 64));
    session_close(p->s, "test");
    for (int i = 0; i < 100; i++)
        uv_run(&d.loop, UV_RUN_NOWAIT);
    assert_int_equal(paged.closed, 0);
    assert_true(step());
    while (d.n_live)
        uv_run(&d.loop, UV_RUN_ONCE);
    model.on_start = NULL;
    assert_int_equal(paged.opened, 1);
    assert_int_equal(paged.closed, 1);
    stop_daemon();
    disconnect(p);
}

/*
 * A stream's job comes to a daemon that drains: it is left to the next one, not refused. Nor is it
 * where its user has jobs enough.
 */
static void test_drain_streamed(void **state)
{
    static struct msg_submit msg;
    static struct msg_done done;
    char answer[256];
    struct peer *p = &peers[0];
    (void)state;

    start_daemon(1, 1000);
    fake.modes |= MODE_LANES;
    connect_peer(p, PRIORITY_NORMAL);
    while (recv(p->fd, answer, sizeof(answer), MSG_DONTWAIT) > 0)
        continue;
    submit(p, 0, problem(8, 64, 64)); /* keeps it */
    d.config.user_jobs = 1;           /* which is not for a stream's */
    for (uint32_t lane = 3; lane >= 1; lane--) {
        d.draining = lane < 3;
        msg.lane = lane;
        msg.number = ++p->last[lane];
        msg.streamed = lane != 2;
        msg.attn = problem(1, 64, 64);
        page_store(&p->page->lane[lane].acquire[msg.number % SAGE_ENTRIES], msg.number);
        say(p, OP_SUBMIT, MSG_SUBMIT, &msg, 0);
    }
    hear(p, OP_DONE, MSG_DONE, &done);
    assert_int_equal(done.n_jobs, 1);
    assert_int_equal(done.jobs[0].lane, 2);
    assert_int_equal(done.jobs[0].status, -SAGE_EDRAIN);
    assert_true(released(p, 2));
    assert_false(released(p, 1));
    assert_int_equal(p->s->n_jobs, 2);
    fake.modes &= ~MODE_LANES; /* then there are no streams, whatever a client says */
    msg.lane = 4;
    msg.number = ++p->last[4];
    msg.streamed = true;
    say(p, OP_SUBMIT, MSG_SUBMIT, &msg, 0);
    hear(p, OP_DONE, MSG_DONE, &done);
    assert_int_equal(done.jobs[0].lane, 4);
    assert_int_equal(done.jobs[0].status, -SAGE_EDRAIN);
    d.draining = false;
    while (step())
        continue;
    assert_true(released(p, 0));
    assert_true(released(p, 3));
    assert_false(released(p, 1));
    stop_daemon();
    disconnect(p);
}

static int lowest_fd(void)
{
    int fd = dup(STDERR_FILENO);

    close(fd);
    return fd;
}

/* A list of chunks over several packets, in every way that it can end. */
static void test_chunks(void **state)
{
    struct msg_register msg = {.buffer = 2,
                               .kind = BUFFER_VMM,
                               .size = 3 * 4096,
                               .n_chunks = 2,
                               .chunks = {4096, 4096},
                               .more = true};
    struct msg_registered reply;
    struct msg_error error;
    struct peer *p = &peers[0];
    (void)state;

    start_shared(p);
    fake.map = shared_map;
    fake.unmap = shared_unmap;
    int fd = lowest_fd();

    say(p, OP_REGISTER, MSG_REGISTER, &msg, 2);
    hear(p, OP_REGISTER, MSG_REGISTERED, &reply);
    assert_int_equal(reply.size, 8192);
    assert_null(buffer_find(p->s, 2));
    assert_int_equal(p->s->user->n_fds, 2);
    msg.n_chunks = 1;
    msg.more = false;
    say(p, OP_REGISTER, MSG_REGISTER, &msg, 1);
    hear(p, OP_REGISTER, MSG_REGISTERED, &reply);
    assert_int_equal(reply.size, 3 * 4096);
    assert_non_null(buffer_find(p->s, 2));
    assert_int_equal(shared.n_mapped, 3);
    assert_int_equal(p->s->user->n_fds, 0);
    assert_int_equal(lowest_fd(), fd);

    msg.buffer = 3; /* less than what was said */
    say(p, OP_REGISTER, MSG_REGISTER, &msg, 1);
    hear(p, OP_ERROR, MSG_ERROR, &error);
    assert_int_equal(error.status, -SAGE_EBOUNDS);
    msg.more = true;
    say(p, OP_REGISTER, MSG_REGISTER, &msg, 1);
    hear(p, OP_REGISTER, MSG_REGISTERED, &reply);
    msg.size++; /* another buffer */
    say(p, OP_REGISTER, MSG_REGISTER, &msg, 1);
    hear(p, OP_ERROR, MSG_ERROR, &error);
    assert_int_equal(error.status, -SAGE_EINVAL);
    msg.chunks[0] = UINT64_MAX; /* a sum beyond 64 bits; too few descriptors; no size */
    say(p, OP_REGISTER, MSG_REGISTER, &msg, 1);
    hear(p, OP_REGISTER, MSG_REGISTERED, &reply);
    say(p, OP_REGISTER, MSG_REGISTER, &msg, 1);
    hear(p, OP_ERROR, MSG_ERROR, &error);
    assert_int_equal(error.status, -SAGE_EINVAL);
    say(p, OP_REGISTER, MSG_REGISTER, &msg, 0);
    hear(p, OP_ERROR, MSG_ERROR, &error);
    assert_int_equal(error.status, -SAGE_EHANDLE);
    msg.chunks[0] = 0;
    say(p, OP_REGISTER, MSG_REGISTER, &msg, 1);
    hear(p, OP_ERROR, MSG_ERROR, &error);
    assert_int_equal(p->s->user->n_fds, 0);
    assert_int_equal(p->s->n_mappings, 2);

    msg.n_chunks = PROTO_FDS_MAX; /* one packet too many */
    for (int i = 0; i < PROTO_FDS_MAX; i++)
        msg.chunks[i] = 4096;
    for (int i = 0; i < CHUNKS_MAX / PROTO_FDS_MAX && i < 8; i++) {
        say(p, OP_REGISTER, MSG_REGISTER, &msg, PROTO_FDS_MAX);
        hear(p, OP_REGISTER, MSG_REGISTERED, &reply);
    }
    assert_int_equal(p->s->user->n_fds, 8 * PROTO_FDS_MAX);
    p->s->user->n_fds += 2 * CHUNKS_MAX; /* others of this user have as many as there may be */
    say(p, OP_REGISTER, MSG_REGISTER, &msg, PROTO_FDS_MAX);
    hear(p, OP_ERROR, MSG_ERROR, &error);
    assert_int_equal(error.status, -SAGE_EBUSY);
    p->s->user->n_fds -= 2 * CHUNKS_MAX;
    assert_int_equal(p->s->user->n_fds, 0);
    say(p, OP_REGISTER, MSG_REGISTER, &msg, PROTO_FDS_MAX); /* goes with the session */
    hear(p, OP_REGISTER, MSG_REGISTERED, &reply);

    session_close(p->s, "test");
    assert_true(TAILQ_EMPTY(&d.sessions));
    while (shared.n_mapped)
        uv_run(&d.loop, UV_RUN_ONCE);
    stop_daemon();
    disconnect(p);
}

static void count_poll(struct stream *stream)
{
    struct slot_model *slot = slot_of(stream);

    if (slot->n == 0 || ++shared.polls < shared.last)
        return;
    struct piece *piece = slot->queue[0].piece;
    piece->start_ns = piece->launch_ns;
    piece->end_ns = daemon_now();
    memmove(slot->queue, slot->queue + 1, --slot->n * sizeof(slot->queue[0]));
    page_release(piece->lane, piece->number, 0);
    piece->done = 1;
    shared.polls = 0;
}

/* Nobody tells the loop that a piece is over: it looks by itself, also when it has slept. */
static void test_polled(void **state)
{
    (void)state;

    start_shared(&peers[0]);
    fake.poll = count_poll;
    for (unsigned last = 1; last <= 4096; last *= 8) {
        shared.last = last;
        for (int i = 0; i < 3; i++)
            submit(&peers[0], 0, problem(1, 64, 64));
        while (!released(&peers[0], 0))
            uv_run(&d.loop, UV_RUN_ONCE); /* sleeps, if nothing is to be done */
        assert_int_equal(sched_look_in(&d, daemon_now()), UINT64_MAX);
    }
    stop_daemon();
    disconnect(&peers[0]);
}

static void poll_nothing(struct stream *stream)
{
    (void)stream;
}

/* When one of two that share the device ends is hard to tell, and soon nothing runs: look often. */
static void test_two_polled(void **state)
{
    const uint64_t often_ns = 50 * 1000;
    (void)state;

    start_daemon(3, 5000);
    fake.poll = poll_nothing;
    for (unsigned i = 0; i < 3; i++) {
        connect_peer(&peers[i], PRIORITY_NORMAL);
        submit(&peers[i], 0, problem(16, 256, 1024)); /* 14 ms */
        assert_int_equal(sched_slots_used(&d), i + 1);
        uint64_t look_in_ns = sched_look_in(&d, daemon_now());
        if (i == 1)
            assert_true(look_in_ns <= often_ns);
        else
            assert_true(look_in_ns > often_ns);
    }
    stop_daemon();
    for (unsigned i = 0; i < 3; i++)
        disconnect(&peers[i]);
}

/* How often was the loop awake, in the time from..to (ms) since then? */
static unsigned awake(uint64_t since_ns, double from, double to)
{
    unsigned turns = 0;

    for (;;) {
        uv_run(&d.loop, UV_RUN_ONCE);
        double age = (double)(daemon_now() - since_ns) / 1e6;
        if (age >= to)
            return turns;
        turns += age >= from && uv_is_active((uv_handle_t *)&d.watch.hot);
    }
}

/* A stream is expected to be where it was when the lane's last job came: not looked for before. */
static void test_expected(void **state)
{
    unsigned seen = 0;
    (void)state;

    start_daemon(2, 500);
    connect_peer(&peers[0], PRIORITY_NORMAL);
    struct lane *lane = &peers[0].s->lanes[0];
    for (int i = 0; i < 200 && !seen; i++) { /* a busy machine may wake us too late */
        lane->gap_ns = 20 * 1000 * 1000;
        uint32_t n = submit_held(&peers[0], 0, problem(1, 64, 64));
        uint64_t since_ns = TAILQ_FIRST(&d.watch.young)->watched_ns;
        assert_int_equal(awake(since_ns, 2, 19), 0);
        seen = awake(since_ns, 19.5, 20.5);
        acquire(&peers[0], 0, n);
        while (watch_has_jobs(&d.watch))
            uv_run(&d.loop, UV_RUN_ONCE);
        assert_true(lane->gap_ns >= 20 * 1000 * 1000);
        while (!released(&peers[0], 0))
            assert_true(step());
    }
    assert_true(seen > 0);
    stop_daemon();
    disconnect(&peers[0]);
}

/* --- ahead of their inputs --- */

static void turns(int n)
{
    while (n--)
        uv_run(&d.loop, UV_RUN_NOWAIT);
}

/* A daemon whose streams can wait, and a client whose inputs come 10 us after the job before. */
static void start_waiting(unsigned slots, struct peer *p)
{
    start_daemon(slots, 500);
    d.sched.can_wait = true;
    connect_peer(p, PRIORITY_NORMAL);
    p->s->remote = p->page;
    p->s->lanes[0].gap_ns = 10 * 1000;
}

static void stop_waiting(struct peer *p)
{
    p->s->remote = NULL; /* nobody has opened it */
    stop_daemon();
    disconnect(p);
}

/* A job that runs, and one behind it whose inputs are not ready: which is told. */
static struct job *run_and_hold(struct peer *p)
{
    submit(p, 0, problem(1, 64, 64));
    submit_held(p, 0, problem(1, 64, 64));
    struct job *first = TAILQ_FIRST(&p->s->lanes[0].jobs), *second = TAILQ_NEXT(first, lane_link);
    assert_int_equal(first->state, JOB_RUNNING);
    assert_int_equal(second->state, JOB_WAITING); /* the first has not begun */
    /* It is about to end, and for a while: the loop need not look at once. */
    first->piece_est_ns = 400e6;
    p->s->lanes[0].pace = 0;
    first->piece.start_ns = daemon_now() - 400 * 1000 * 1000;
    turns(1);
    return second;
}

/* The inputs come in time: the loop has nothing to do with it. */
static void test_ahead(void **state)
{
    struct peer *p = &peers[0];
    (void)state;

    start_waiting(2, p);
    for (int i = 0; i < 3; i++) {
        struct job *second = run_and_hold(p);
        assert_int_equal(second->state, JOB_RUNNING);
        assert_true(second->piece.wait_ns > 0);
        assert_int_equal(sched_slots_used(&d), 1); /* behind the first */
        assert_false(job_cancel(p->s, 0, second->number));
        assert_true(step());
        acquire(p, 0, p->last[0]);
        assert_true(step());
        assert_true(released(p, 0));
    }
    assert_int_equal(d.stats.done, 6);
    assert_int_equal(d.stats.ahead, 3);
    assert_int_equal(d.stats.missed, 0);
    stop_waiting(p);
}

/* They do not: the job waits as any other, and the next ones are not started ahead. */
static void test_ahead_missed(void **state)
{
    struct peer *p = &peers[0];
    (void)state;

    start_waiting(2, p);
    struct job *second = run_and_hold(p);
    assert_true(step());
    double deficit_ns = p->s->deficit_ns;
    assert_true(step());
    assert_false(released(p, 0));
    assert_int_equal(second->state, JOB_WAITING);
    assert_non_null(second->watched);
    assert_int_equal(p->s->n_running, 0);
    assert_true(p->s->deficit_ns >= deficit_ns); /* nothing is charged, */
    assert_true(p->s->deficit_ns <= 0);          /* nor is what it was granted kept */
    turns(3);
    assert_int_equal(second->state, JOB_WAITING);
    acquire(p, 0, p->last[0]);
    turns(1);
    assert_int_equal(second->state, JOB_RUNNING);
    assert_int_equal(second->piece.wait_ns, 0);
    assert_true(step());
    assert_true(released(p, 0));
    assert_int_equal(d.stats.missed, 1);
    p->s->lanes[0].gap_ns = 10 * 1000; /* as if it had been quick again */
    for (int i = 0; i < 4; i++) {
        second = run_and_hold(p);
        assert_int_equal(second->state, JOB_WAITING);
        acquire(p, 0, p->last[0]);
        while (step())
            continue;
        p->s->lanes[0].gap_ns = 10 * 1000;
    }
    assert_int_equal(run_and_hold(p)->state, JOB_RUNNING); /* but after ten of them */
    acquire(p, 0, p->last[0]);
    stop_waiting(p);
}

/* Whose inputs are never ready may cancel, or go: before the wait is over, or after. */
static void test_ahead_given_up(void **state)
{
    struct peer *p = &peers[0];
    (void)state;

    start_waiting(2, p);
    for (int early = 0; early < 2; early++) {
        run_and_hold(p);
        if (early)
            assert_false(job_cancel(p->s, 0, p->last[0]));
        assert_true(step());
        assert_false(released(p, 0));
        assert_true(step());
        if (!early)
            assert_true(job_cancel(p->s, 0, p->last[0]));
        assert_true(released(p, 0));
        assert_int_equal(d.stats.canceled, early + 1);
        p->s->lanes[0].gap_ns = 10 * 1000;
        p->s->lanes[0].shy = 0;
    }
    run_and_hold(p);
    p->s->remote = NULL;
    session_close(p->s, "gone");
    while (step())
        continue;
    assert_int_equal(d.stats.missed, 3);
    assert_int_equal(d.stats.done, 3);
    assert_int_equal(d.stats.dropped, 1);
    stop_daemon();
    disconnect(p);
}

/* A job of several pieces is not started ahead, and is made up for that once only. */
static void test_ahead_long(void **state)
{
    struct peer *p = &peers[0];
    (void)state;

    start_waiting(2, p);
    submit(p, 0, problem(1, 64, 64));
    submit_held(p, 0, problem(64, 512, 2048));
    struct job *first = TAILQ_FIRST(&p->s->lanes[0].jobs), *second = TAILQ_NEXT(first, lane_link);
    first->piece.start_ns = daemon_now();
    turns(2);
    assert_int_equal(second->state, JOB_WAITING);
    assert_true(second->no_ahead);
    assert_false(second->made);
    acquire(p, 0, p->last[0]);
    stop_waiting(p);
}

/* Nobody is kept waiting: it is not done where no other slot is idle. */
static void test_ahead_alone(void **state)
{
    struct peer *p = &peers[0];
    (void)state;

    for (unsigned slots = 1; slots <= 2; slots++) {
        start_waiting(slots, p);
        connect_peer(&peers[1], PRIORITY_NORMAL);
        if (slots == 2)
            submit(&peers[1], 0, problem(1, 64, 64));
        struct job *second = run_and_hold(p);
        assert_int_equal(second->state, JOB_WAITING);
        acquire(p, 0, p->last[0]);
        while (step())
            continue;
        assert_true(released(p, 0));
        stop_waiting(p);
        disconnect(&peers[1]);
    }
}

static struct peer crowd[17]; /* who fill a turn twice over, with all their lanes */

/* All jobs of the session have been watched for a second and for `ns` more. */
static void age_jobs(const struct session *s, uint64_t ns)
{
    for (int i = 0; i < SAGE_LANES; i++)
        if (!TAILQ_EMPTY(&s->lanes[i].jobs))
            TAILQ_FIRST(&s->lanes[i].jobs)->watched_ns = daemon_now() - 1000000000 - ns;
}

/*
 * Jobs that somebody holds for long do not keep another's from being seen in the first turn; they
 * are seen themselves, and more often again when they are expected.
 */
static void test_crowd(void **state)
{
    const int n = sizeof(crowd) / sizeof(crowd[0]);
    struct session *s;
    bool seen = false;
    (void)state;

    start_daemon(4, 500);
    for (int i = 0; i < n; i++) {
        connect_peer(&crowd[i], PRIORITY_NORMAL);
        for (uint32_t lane = 0; lane < SAGE_LANES; lane++)
            submit_held(&crowd[i], lane, problem(1, 64, 64));
        age_jobs(crowd[i].s, 0);
    }
    connect_peer(&peers[0], PRIORITY_NORMAL);
    turns(8);
    assert_true(TAILQ_EMPTY(&d.watch.young));
    for (uint32_t lane = 0; lane < 8; lane++) {
        uint32_t number = submit_held(&peers[0], lane, problem(1, 64, 64));
        acquire(&peers[0], lane, number);
        turns(1);
        assert_int_equal(peers[0].s->n_jobs, 1);
        assert_int_equal(peers[0].s->n_running, 1);
        assert_true(step());
    }
    s = crowd[n / 2].s;
    for (int i = 0; i < 200 && !seen; i++) { /* a busy machine may miss the time */
        s->lanes[7].gap_ns = daemon_now() - TAILQ_FIRST(&s->lanes[7].jobs)->watched_ns + 20000000;
        turns(3);
        seen = TAILQ_FIRST(&s->lanes[7].jobs)->watched == &d.watch.young;
    }
    assert_true(seen);
    for (int i = 0; i < n; i += 4)
        acquire(&crowd[i], 5, 1);
    turns(3);
    for (int i = 0; i < n; i += 4)
        assert_int_not_equal(TAILQ_FIRST(&crowd[i].s->lanes[5].jobs)->state, JOB_WAITING);
    stop_daemon();
    for (int i = 0; i < n; i++)
        disconnect(&crowd[i]);
    disconnect(&peers[0]);
}

/* Many events that nobody records are asked for in turn, and the loop sleeps as it would else. */
static void test_crowd_of_events(void **state)
{
    struct msg_event event = {.event = 1, .n_handle = PROTO_HANDLE_MAX};
    struct msg_launched launched;
    struct msg_empty empty;
    unsigned woken = 0;
    (void)state;

    start_shared(&peers[0]);
    connect_peer(&peers[1], PRIORITY_NORMAL);
    forget_answers(&peers[1]);
    for (uint8_t i = 0; i < 2; i++) {
        event.handle[0] = i;
        say(&peers[i], OP_EVENT, MSG_EVENT, &event, 0);
        hear(&peers[i], OP_EVENT, MSG_EMPTY, &empty);
        for (uint32_t lane = 0; lane < 60; lane++)
            submit_event(&peers[i], lane, 1);
        age_jobs(peers[i].s, 0);
    }
    turns(8);
    shared.asked = 0;
    for (uint64_t until = daemon_now() + 100000000; daemon_now() < until; woken++)
        uv_run(&d.loop, UV_RUN_ONCE);
    assert_in_range(shared.asked, 1, 20000);
    assert_in_range(woken, 1, 400);
    shared.ready[1] = 1;
    hear(&peers[1], OP_LAUNCHED, MSG_LAUNCHED, &launched);
    stop_daemon();
    assert_int_equal(shared.n_open, 0);
    disconnect(&peers[0]);
    disconnect(&peers[1]);
}

static size_t slow_workspace(const struct sage_attn *attn, const struct sage_part *part)
{
    uint64_t until = daemon_now() + 200000;

    while (daemon_now() < until)
        continue;
    return backend_cpu.workspace(attn, part);
}

/* Packets that wait to be received: each of 16 lanes' next job, whose inputs are not ready. */
static void send_submits(struct peer *p)
{
    static struct msg_submit msg;
    static char data[PROTO_PACKET_MAX];

    for (msg.lane = 0; msg.lane < 16; msg.lane++) {
        msg.number = ++p->last[msg.lane];
        msg.attn = problem(1, 64, 64);
        size_t len = packet_encode(data, sizeof(data), OP_SUBMIT, 1, MSG_SUBMIT, &msg);
        assert_int_equal(send(p->fd, data, len, 0), len);
    }
}

/*
 * A turn in which sessions have been heard for long enough takes one packet of each other, or what
 * is cheap; then they go on.
 */
static void test_heard(void **state)
{
    static char data[PROTO_PACKET_MAX];
    size_t len = packet_encode(data, sizeof(data), OP_PING, 1, MSG_EMPTY, &(struct msg_empty){0});
    (void)state;

    start_daemon(1, 500);
    for (int i = 0; i < 2; i++)
        connect_peer(&peers[i], PRIORITY_NORMAL);
    for (int i = 0; i < 2; i++)
        send_submits(&peers[i]);
    fake.workspace = slow_workspace;
    turns(1);
    unsigned first = peers[0].s->n_jobs, second = peers[1].s->n_jobs;
    assert_int_equal(first + second, PACKETS_AT_ONCE + 1);
    assert_true(first == 1 || second == 1);
    d.heard_ns = 1; /* another did so */
    turns(1);
    assert_int_equal(peers[0].s->n_jobs, first + 1);
    assert_int_equal(peers[1].s->n_jobs, second + 1);
    turns(16);
    assert_int_equal(peers[0].s->n_jobs, 16);
    assert_int_equal(peers[1].s->n_jobs, 16);
    for (int i = 0; i < 64; i++)
        assert_int_equal(send(peers[0].fd, data, len, 0), len);
    forget_answers(&peers[0]);
    d.heard_ns = 1;
    turns(1);
    int answers = 0;
    while (recv(peers[0].fd, data, sizeof(data), MSG_DONTWAIT) > 0)
        answers++;
    assert_in_range(answers, 1, 8);
    stop_daemon();
    disconnect(&peers[0]);
    disconnect(&peers[1]);
}

static void count_warm(struct device *device, bool running)
{
    (void)device;
    shared.warmed++;
    shared.warmed_running += running;
}

/* How often was a launch warmed up since the last time? Then nothing is under way. */
static int warmed(void)
{
    int n = shared.warmed;

    shared.warmed = 0;
    while (d.watch.awake) {
        d.watch.hot_until_ns = 0;
        uv_run(&d.loop, UV_RUN_NOWAIT);
    }
    return n;
}

/* Who was woken by a packet whose job is not ready gets ready for it; who is awake is. */
static void test_warm(void **state)
{
    (void)state;

    start_daemon(2, 500);
    d.watch.hot_ns = 1000000000; /* however busy the machine is */
    connect_peer(&peers[0], PRIORITY_NORMAL);
    fake.warm = count_warm;
    shared.warmed = shared.warmed_running = 0;
    warmed();
    uint32_t n = submit_held(&peers[0], 0, problem(1, 64, 64));
    assert_int_equal(shared.warmed, 1);
    acquire(&peers[0], 0, n);
    submit_held(&peers[0], 1, problem(1, 64, 64)); /* meanwhile the first one is found */
    assert_int_equal(peers[0].s->n_running, 1);
    assert_int_equal(shared.warmed, 1);
    acquire(&peers[0], 1, 1);
    while (!released(&peers[0], 1) || !released(&peers[0], 0)) {
        uv_run(&d.loop, UV_RUN_NOWAIT);
        step();
    }
    warmed();
    submit(&peers[0], 0, problem(1, 64, 64)); /* ready: it is launched at once */
    assert_int_equal(peers[0].s->n_running, 1);
    assert_int_equal(warmed(), 0);
    submit_held(&peers[0], 1, problem(1, 64, 64)); /* beside one that runs */
    assert_int_equal(shared.warmed_running, 1);
    acquire(&peers[0], 1, 2);
    while (!released(&peers[0], 1) || !released(&peers[0], 0)) {
        uv_run(&d.loop, UV_RUN_NOWAIT);
        step();
    }
    stop_daemon();
    disconnect(&peers[0]);
}

/* Its lane 0. */
static void finish_jobs(const struct peer *p)
{
    while (!released(p, 0)) {
        uv_run(&d.loop, UV_RUN_NOWAIT);
        step();
    }
}

/*
 * A client without jobs is expected back after as long as the last time, but not for long: the loop
 * is awake then, and a launch warm. Nobody waits for one that takes its time.
 */
static void test_rest(void **state)
{
    const uint64_t ms = 1000 * 1000;
    unsigned seen = 0;
    (void)state;

    start_daemon(2, 500);
    fake.warm = count_warm;
    connect_peer(&peers[0], PRIORITY_NORMAL);
    struct session *s = peers[0].s;
    submit(&peers[0], 0, problem(1, 64, 64));
    finish_jobs(&peers[0]);
    assert_false(s->resting);                /* it has never come back yet */
    for (int i = 0; i < 200 && !seen; i++) { /* a busy machine may wake us too late */
        submit(&peers[0], 0, problem(1, 64, 64));
        s->rest_ns = 20 * ms;
        finish_jobs(&peers[0]);
        assert_true(s->resting);
        shared.warmed = 0;
        assert_int_equal(awake(s->rest_since_ns, 2, 19), 0);
        seen = awake(s->rest_since_ns, 19.5, 20.2);
        assert_true(!seen || shared.warmed == 1);
        assert_int_equal(awake(s->rest_since_ns, 21, 30), 0);
        assert_false(s->resting);
    }
    assert_true(seen > 0);
    submit(&peers[0], 0, problem(1, 64, 64));
    assert_true(s->rest_ns >= 30 * ms);
    s->rest_ns = 200 * ms; /* too long */
    finish_jobs(&peers[0]);
    assert_false(s->resting);
    submit(&peers[0], 0, problem(1, 64, 64));
    s->rest_ns = ms;
    finish_jobs(&peers[0]);
    assert_true(s->resting);
    session_close(s, "test");
    assert_true(TAILQ_EMPTY(&d.watch.resting));
    stop_daemon();
    disconnect(&peers[0]);
}

/* Ticks have seen so many more seconds pass: is something hung? */
static bool hung_after(double seconds)
{
    char why[PROTO_TEXT_MAX];

    sched_is_hung(&d, why);
    d.awake_ns += (uint64_t)(seconds * 1e9);
    return sched_is_hung(&d, why);
}

/*
 * A piece that runs is hung after 30 s or 1000 times its estimate; one that waits for the device,
 * after four times that.
 */
static void test_hung(void **state)
{
    (void)state;

    start_daemon(1, 100000);
    connect_peer(&peers[0], PRIORITY_NORMAL);
    assert_false(hung_after(1e6));
    for (int i = 0; i < 3; i++) /* one behind the other in the slot */
        submit(&peers[0], (uint32_t)i, problem(1, 64, 64));
    assert_int_equal(d.sched.slots[0].n, 3);
    assert_false(hung_after(119));
    assert_true(hung_after(2));
    assert_true(step()); /* the next one begins to wait now */
    assert_false(hung_after(119));
    model.slots[0].queue[0].piece->start_ns = 1;
    assert_false(hung_after(29));
    assert_true(hung_after(2));
    assert_true(step());
    assert_false(hung_after(29)); /* another one, and it waits */
    while (step())
        continue;

    submit(&peers[0], 0, problem(1, 1000, 4000));
    double limit = 1000 * TAILQ_FIRST(&peers[0].s->lanes[0].jobs)->piece_est_ns / 1e9;
    assert_true(limit > 31);
    assert_false(hung_after(4 * limit - 1));
    model.slots[0].queue[0].piece->start_ns = 1;
    assert_false(hung_after(limit - 1));
    d.awake_ns += 2000000000;
    for (int i = 0; i < 1000 && !d.device_lost; i++) /* until the next tick */
        uv_run(&d.loop, UV_RUN_ONCE);
    assert_true(d.device_lost);
    assert_int_equal(d.exit_code, EXIT_DEVICE_LOST);
    assert_non_null(strstr(d.lost_why, "slot 0: a piece of client 1 runs for"));
    assert_false(released(&peers[0], 0));
    d.device_lost = false;
    stop_daemon();
    disconnect(&peers[0]);
}

int main(void)
{
    const struct CMUnitTest tests[] = {
        cmocka_unit_test(test_fair),
        cmocka_unit_test(test_measured),
        cmocka_unit_test(test_priorities),
        cmocka_unit_test(test_work_conserving),
        cmocka_unit_test(test_quicker_than_expected),
        cmocka_unit_test(test_pieces),
        cmocka_unit_test(test_held_slots),
        cmocka_unit_test(test_handed_over),
        cmocka_unit_test(test_not_handed_over),
        cmocka_unit_test(test_empty_sequence),
        cmocka_unit_test(test_stood),
        cmocka_unit_test(test_lanes),
        cmocka_unit_test(test_close_anywhere),
        cmocka_unit_test(test_events),
        cmocka_unit_test(test_event_limit),
        cmocka_unit_test(test_page),
        cmocka_unit_test(test_drain_streamed),
        cmocka_unit_test(test_chunks),
        cmocka_unit_test(test_polled),
        cmocka_unit_test(test_two_polled),
        cmocka_unit_test(test_hung),
        cmocka_unit_test(test_events_lost),
        cmocka_unit_test(test_alone),
        cmocka_unit_test(test_expected),
        cmocka_unit_test(test_warm),
        cmocka_unit_test(test_rest),
        cmocka_unit_test(test_ahead),
        cmocka_unit_test(test_ahead_missed),
        cmocka_unit_test(test_ahead_given_up),
        cmocka_unit_test(test_ahead_long),
        cmocka_unit_test(test_ahead_alone),
        cmocka_unit_test(test_crowd),
        cmocka_unit_test(test_crowd_of_events),
        cmocka_unit_test(test_heard),
    };
    log_set_level(3);
    alarm(120); /* a scheduler that stalls or spins does not do so for ever */
    return cmocka_run_group_tests(tests, NULL, NULL);
}
