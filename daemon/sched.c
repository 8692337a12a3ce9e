/*
 * sched.c - slots and turns.
 */
#include "daemon/sched.h"

#include <math.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

#include "daemon/daemon.h"
#include "daemon/log.h"

enum {
    BRIEF_NS =
        20 * 1000, /* about half of what handing a piece to a thread and hearing of it costs */
    BRIEF_TURN_NS = 200 * 1000, /* of brief pieces computed by the loop in one turn */
    HOLD_PIECES = 8,            /* that a slot is held for, whoever else wants to hold one */
    MEASURED_NS = 500 * 1000,   /* shorter pieces are no measurement of ns_per_op */
    /* When to look for the end of a piece that is polled for: see look_in(). */
    LOOK_EARLY_NS = 100 * 1000,
    LOOK_MIN_NS = 50 * 1000,
    LOOK_MAX_NS = 1000 * 1000,
    /* See start_ahead(): inputs come so long after the job before; and are waited for so long. */
    AHEAD_NS = 50 * 1000,
    AHEAD_WAIT_NS = 100 * 1000,
    /* After one in vain so many jobs are not started ahead; after the next one twice as many. */
    SHY_MIN = 8,
    SHY_MAX = 1024,
    WAIT_FACTOR = 4, /* how much longer than run a piece may wait for the device: see is_hung() */
};

#define HUNG_NS 30e9 /* what runs for so long, and 1000 times its estimate, will never end */

/* Ratio of a priority's device time to that of the next lower one. */
enum { PRIORITY_STEP = 4 };

int sched_init(struct daemon *d, char *why)
{
    struct sched *sc = &d->sched;

    TAILQ_INIT(&sc->active);
    sc->quantum_ns = (double)d->config.quantum_us * 1e3;
    sc->workspace = d->config.slot_bytes;
    sc->ns_per_op = d->backend->ns_per_op;
    sc->can_wait = d->backend->can_wait && d->backend->can_wait(d->device);
    sc->slots = calloc(d->config.slots, sizeof(sc->slots[0]));
    if (!sc->slots)
        return SAGE_ENOMEM;
    while (sc->n_slots < d->config.slots) {
        int rc =
            d->backend->stream_open(d->device, sc->workspace, &sc->slots[sc->n_slots].stream, why);
        if (rc) {
            sched_finish(d);
            return rc;
        }
        sc->n_slots++;
    }
    return 0;
}

void sched_finish(struct daemon *d)
{
    struct sched *sc = &d->sched;

    for (unsigned i = 0; i < sc->n_slots; i++)
        d->backend->stream_close(sc->slots[i].stream);
    free(sc->slots);
    sc->slots = NULL;
    sc->n_slots = 0;
}

/* --- who is runnable --- */

void sched_ready(struct job *job)
{
    struct session *s = job->session;
    struct sched *sc = &s->daemon->sched;

    job->state = JOB_READY;
    if (!job->ready_ns)
        job->ready_ns = daemon_now();
    if (job->started) /* its next piece goes before the session's other jobs */
        TAILQ_INSERT_HEAD(&s->ready, job, ready_link);
    else
        TAILQ_INSERT_TAIL(&s->ready, job, ready_link);
    if (s->active)
        return;
    s->active = true;
    sc->n_active++;
    TAILQ_INSERT_TAIL(&sc->active, s, active_link);
}

/* What was not used is not saved up by who has nothing to do; a debt stays. */
static void forget_credit(struct session *s)
{
    if (!s->active && s->deficit_ns > 0)
        s->deficit_ns = 0;
}

static void leave(struct session *s)
{
    struct sched *sc = &s->daemon->sched;

    if (!s->active || !TAILQ_EMPTY(&s->ready))
        return;
    s->active = false;
    sc->n_active--;
    TAILQ_REMOVE(&sc->active, s, active_link);
    forget_credit(s);
}

/* The slot that the job keeps between its pieces, or NULL. */
static struct slot *held_slot(struct sched *sc, const struct job *job)
{
    for (unsigned i = 0; i < sc->n_slots; i++)
        if (sc->slots[i].holder == job)
            return &sc->slots[i];
    return NULL;
}

static void let_go(struct sched *sc, const struct job *job)
{
    struct slot *slot = held_slot(sc, job);

    if (!slot)
        return;
    slot->holder = NULL;
    sc->n_held--;
    sc->hold_wanted = false;
}

void sched_forget(struct job *job)
{
    if (job->watched)
        watch_remove(job);
    let_go(&job->session->daemon->sched, job); /* it may be between two pieces */
    if (job->state != JOB_READY)
        return;
    TAILQ_REMOVE(&job->session->ready, job, ready_link);
    job->state = JOB_WAITING;
    leave(job->session);
}

void sched_lane(struct session *s, uint32_t lane)
{
    struct job *job = TAILQ_FIRST(&s->lanes[lane].jobs);

    if (!job || job->state != JOB_WAITING || job->watched)
        return;
    if (!job->event && job_is_ready(job)) /* an event is asked for in watch_turn() */
        sched_ready(job);
    else
        watch_add(s->daemon, job);
}

/* --- slots --- */

/* May the job keep a slot between its pieces? Others always find two, or what there is. */
static bool may_hold(const struct sched *sc)
{
    return sc->n_held < (sc->n_slots > 3 ? sc->n_slots - 2 : 1);
}

/*
 * Has the job, which is between two pieces, held the slot for long enough, and does somebody else
 * want to hold one (or, of a single slot, anything)? Then K and V are prepared once more; a group
 * may take hours.
 */
static bool should_let_go(const struct sched *sc, const struct slot *slot, const struct job *job)
{
    const unsigned own = job->session->active; /* by its other jobs */
    bool wanted = sc->n_slots > 1 ? sc->hold_wanted : sc->n_active > own;

    return wanted && slot->n_holding >= HOLD_PIECES;
}

/* Short pieces may queue behind each other in a slot. */
static bool has_room(const struct sched *sc, const struct slot *slot, double est_ns)
{
    return !slot->holder && slot->n < STREAM_DEPTH &&
           (slot->n == 0 || slot->queued_ns + est_ns < sc->quantum_ns / 2);
}

/* The least loaded slot that can take the piece that the job has ready, or NULL. */
static struct slot *find_slot(struct sched *sc, const struct job *job)
{
    struct slot *best = NULL;

    for (unsigned i = 0; i < sc->n_slots; i++) {
        struct slot *slot = &sc->slots[i];
        if (slot->holder == job)
            return slot;
        if (has_room(sc, slot, job->piece_est_ns) && (!best || slot->queued_ns < best->queued_ns))
            best = slot;
    }
    return best;
}

/*
 * The job's piece has waited for its inputs in vain. What waits is in the way of a kernel that has
 * all of the device, so it may be the reason.
 */
static void put_back(struct job *job)
{
    struct lane *lane = &job->session->lanes[job->lane];

    job->session->daemon->stats.missed++;
    lane->shy = lane->next_shy < SHY_MIN ? SHY_MIN : lane->next_shy;
    lane->next_shy = lane->shy < SHY_MAX ? 2 * lane->shy : SHY_MAX;
    lane->gap_ns = job->piece.wait_ns;
    job->state = JOB_WAITING;
    if (job->dropped) {
        job_drop(job);
    } else if (job->unwanted) {
        job_end_canceled(job);
    } else {
        job->started = job->made = false;
        job->ready_ns = 0;
        job->watched_ns = daemon_now() - job->piece.wait_ns;
        sched_lane(job->session, job->lane);
    }
}

/* It was started ahead, and its inputs came. */
static void note_ahead(struct job *job)
{
    struct lane *lane = &job->session->lanes[job->lane];
    const struct piece *piece = &job->piece;

    lane->next_shy = 0;
    job->ready_ns = piece->ready_ns > lane->end_ns ? piece->ready_ns : lane->end_ns;
    if (job->ready_ns > piece->start_ns) /* clocks are compared to some us */
        job->ready_ns = piece->start_ns;
}

static void piece_done(struct daemon *d, struct slot *slot)
{
    struct sched *sc = &d->sched;
    struct job *job = slot->jobs[slot->first];
    struct session *s = job->session;
    struct lane *lane = &s->lanes[job->lane];
    struct piece *piece = &job->piece;
    double took = (double)(piece->end_ns - piece->start_ns);

    slot->first = (slot->first + 1) % STREAM_DEPTH;
    slot->n--;
    slot->seen = SEEN_NOTHING;
    slot->queued_ns = slot->n ? slot->queued_ns - job->piece_est_ns : 0;
    s->n_running--;
    s->deficit_ns +=
        job->piece_est_ns - took; /* the estimate was charged, the measured time counts */
    forget_credit(s);
    if (piece->missed) {
        put_back(job);
        return;
    }
    if (piece->wait_ns)
        note_ahead(job);
    job->run_ns += (uint64_t)took;
    lane->pace = took / job->piece_est_ns;
    if (piece->brief)
        sc->brief_ns += took;
    if (!job->start_ns)
        job->start_ns = piece->start_ns;
    if (piece->status == SAGE_EDEVICE) {
        daemon_lose(d, "found by a piece of a job");
        return;
    }
    /* Small ones say more about overheads than about speed. */
    if (job->piece_ops * sc->ns_per_op > MEASURED_NS) {
        double measured = fmin(took / job->piece_ops, 4 * sc->ns_per_op); /* one may have stood */
        sc->ns_per_op += (measured - sc->ns_per_op) / 8;
    }

    bool last = piece->status || job_is_last_piece(job) || job->dropped;
    if (!last) {
        job_advance(job);
        if ((job->row == 0 && job->head == 0) || /* the next group needs nothing of this one */
            should_let_go(sc, slot, job))
            let_go(sc, job);
        sched_ready(job);
        return;
    }
    lane->end_ns = piece->end_ns;
    lane->shy -= lane->shy > 0;
    let_go(sc, job);
    if (piece->status && !piece->lane && !job->dropped)
        page_release(&s->page->lane[job->lane], job->number, piece->status);
    job_over(job, piece->status);
}

static void note_use(struct daemon *d, const struct job *job)
{
    unsigned used = sched_slots_used(d);
    size_t bytes = d->backend->workspace(&job->attn, &job->piece.part);

    if (used > d->stats.slots_peak)
        d->stats.slots_peak = used;
    if (bytes > d->stats.workspace_peak)
        d->stats.workspace_peak = bytes;
}

/* Short enough for the loop itself, one thread instead of a slot's. */
static bool is_brief(const struct daemon *d, const struct job *job)
{
    double more = job->piece_ops * d->sched.ns_per_op * (double)(d->config.threads - 1);

    return !d->backend->poll && job->piece_est_ns + more < BRIEF_NS;
}

static void start(struct daemon *d, struct slot *slot, struct job *job)
{
    struct session *s = job->session;
    struct sched *sc = &d->sched;

    TAILQ_REMOVE(&s->ready, job, ready_link);
    job->state = JOB_RUNNING;
    s->n_running++;
    s->deficit_ns -= job->piece_est_ns;
    leave(s);
    if (job->holds && !slot->holder) {
        slot->holder = job;
        slot->n_holding = 0;
        sc->n_held++;
    }
    slot->n_holding++;
    job->started = true;
    slot->jobs[(slot->first + slot->n++) % STREAM_DEPTH] = job;
    slot->queued_ns += job->piece_est_ns;
    job->piece.brief = slot->n == 1 && is_brief(d, job);
    job->piece.launch_ns = d->backend->poll ? daemon_now() : 0;
    d->backend->start(slot->stream, &job->piece);
    note_use(d, job);
    if (d->backend->poll)
        watch_again(d); /* this turn has been polled already */
    if (job->by_event && job->piece.lane)
        job_launched(job, slot->stream);
    if (job->piece.brief && __atomic_load_n(&job->piece.done, __ATOMIC_ACQUIRE))
        piece_done(d, slot);
}

void sched_reap(struct daemon *d)
{
    for (unsigned i = 0; i < d->sched.n_slots && !d->device_lost; i++) {
        struct slot *slot = &d->sched.slots[i];
        if (slot->n && d->backend->poll)
            d->backend->poll(slot->stream);
        while (slot->n && !d->device_lost &&
               __atomic_load_n(&slot->jobs[slot->first]->piece.done, __ATOMIC_ACQUIRE))
            piece_done(d, slot);
    }
}

/*
 * Of a piece that runs: sleep until shortly before it should end, if it is like the lane's last
 * one, then look all the time; when that was no good guess, so that what it is late by is a
 * sixteenth of its time.
 */
static uint64_t look_in(const struct job *job, uint64_t now)
{
    uint64_t start = job->piece.start_ns ? job->piece.start_ns : job->piece.launch_ns;
    double pace = job->session->lanes[job->lane].pace;
    double est = pace > 0 ? job->piece_est_ns * pace : job->piece_est_ns;
    double age = now > start ? (double)(now - start) : 0, left = est - age;
    double wait = left > 0 ? left - LOOK_EARLY_NS : age / 16;

    if (job->piece.wait_ns && !job->piece.start_ns) {
        /* It may be over soon, and computed again; unless others keep it from beginning. */
        uint64_t before_ns = job->session->lanes[job->lane].end_ns;
        uint64_t from = before_ns > start ? before_ns : start;
        return now < from + 2 * job->piece.wait_ns ? 0 : LOOK_MIN_NS;
    }
    if (left > -LOOK_EARLY_NS - est / 4 && left < LOOK_EARLY_NS + LOOK_MIN_NS)
        return 0;
    return (uint64_t)fmin(fmax(wait, LOOK_MIN_NS), LOOK_MAX_NS);
}

uint64_t sched_look_in(const struct daemon *d, uint64_t now)
{
    uint64_t least = UINT64_MAX;

    if (!d->backend->poll)
        return least;
    for (unsigned i = 0; i < d->sched.n_slots; i++) {
        const struct slot *slot = &d->sched.slots[i];
        uint64_t wait = slot->n ? look_in(slot->jobs[slot->first], now) : UINT64_MAX;
        if (wait < least)
            least = wait;
    }
    /* Nobody knows which of two that share the device ends first, and after both nothing runs. */
    return sched_slots_used(d) == 2 && least > LOOK_MIN_NS ? LOOK_MIN_NS : least;
}

/* --- turns --- */

/*
 * How long the job's next piece may be. Each cut costs time, and where nothing else runs or could
 * run, a piece that is as long as those which other slots would have delays nobody for longer.
 */
static double quantum(const struct sched *sc, bool alone)
{
    return alone && sc->n_slots > 2 ? (sc->n_slots - 1) * sc->quantum_ns : sc->quantum_ns;
}

static void make_piece(struct daemon *d, struct job *job, bool alone)
{
    struct sched *sc = &d->sched;

    if (!job->made)
        job_next_piece(job, d->backend, quantum(sc, alone), sc->workspace, sc->ns_per_op,
                       held_slot(sc, job) != NULL);
}

/* Of one that could start now. */
static bool is_alone(const struct daemon *d)
{
    return d->sched.n_active == 1 && sched_slots_used(d) == 0;
}

/* Make up the job's piece, unless that was done; may it start? Not if it needs a slot to hold. */
static bool may_start(struct daemon *d, struct job *job)
{
    struct sched *sc = &d->sched;

    make_piece(d, job, is_alone(d));
    if (!job->holds || may_hold(sc) || held_slot(sc, job))
        return true;
    for (unsigned i = 0; i < sc->n_slots; i++)
        if (sc->slots[i].holder && sc->slots[i].holder->session != job->session)
            sc->hold_wanted = true;
    return false;
}

static struct job *next_job(struct daemon *d, struct session *s)
{
    struct job *job;

    TAILQ_FOREACH(job, &s->ready, ready_link)
        if (may_start(d, job))
            return job;
    return NULL;
}

/*
 * Of normal priority: a quantum, so that nobody waits for much more than one of each other session.
 */
static double share(const struct sched *sc, const struct session *s)
{
    double weight = 1.0 / PRIORITY_STEP;

    for (uint32_t i = 0; i < s->priority; i++)
        weight *= PRIORITY_STEP;
    return weight * sc->quantum_ns;
}

static void rotate(struct sched *sc, struct session *s)
{
    TAILQ_REMOVE(&sc->active, s, active_link);
    TAILQ_INSERT_TAIL(&sc->active, s, active_link);
}

static bool any_room(const struct sched *sc)
{
    for (unsigned i = 0; i < sc->n_slots; i++)
        if (has_room(sc, &sc->slots[i], 0))
            return true;
    return false;
}

/*
 * Jobs that hold a slot go on there while their session has time left; in the only slot in any
 * case, for nobody else could use it.
 */
static void continue_holders(struct daemon *d)
{
    struct sched *sc = &d->sched;

    for (unsigned i = 0; i < sc->n_slots; i++) {
        struct job *job = sc->slots[i].holder;
        if (!job || job->state != JOB_READY || (job->session->deficit_ns <= 0 && sc->n_slots > 1))
            continue;
        make_piece(d, job, is_alone(d));
        start(d, &sc->slots[i], job);
    }
}

/* The first session with time left and a job that may start. */
static struct session *next_session(struct daemon *d, struct job **job)
{
    struct session *s;

    TAILQ_FOREACH(s, &d->sched.active, active_link)
        if (s->deficit_ns > 0 && (*job = next_job(d, s)))
            return s;
    return NULL;
}

/*
 * Nobody who could start has time left: as many rounds of shares as the first of them needs, at
 * once. Who waits for another's slot gets none: a debt is not forgiven for waiting. false: nobody
 * could start.
 */
static bool grant(struct daemon *d)
{
    struct sched *sc = &d->sched;
    struct session *s;
    double rounds = INFINITY;

    TAILQ_FOREACH(s, &sc->active, active_link)
        if (s->deficit_ns <= 0 && next_job(d, s))
            rounds = fmin(rounds, floor(-s->deficit_ns / share(sc, s)) + 1);
    if (rounds == INFINITY)
        return false;
    TAILQ_FOREACH(s, &sc->active, active_link)
        if (s->deficit_ns <= 0 && next_job(d, s))
            s->deficit_ns += rounds * share(sc, s);
    return true;
}

/*
 * The slot's only piece ends a job and is about to end, and nobody else has anything to compute. If
 * the inputs of the lane's next job should come soon after that, going by the last job that was
 * watched, it is started behind: the stream itself waits for them, for a short time, and the loop
 * need not see them first. Another slot is idle for who comes meanwhile. The device must release
 * the first of both as well, or they would be released in the wrong order; and there must be
 * something to compute, or what ends the piece might not know that it was in vain.
 */
static void start_ahead(struct daemon *d, struct slot *slot, bool alone)
{
    struct job *job = slot->jobs[slot->first], *next = TAILQ_NEXT(job, lane_link);
    struct session *s = job->session;
    const struct lane *lane = &s->lanes[job->lane];

    if (!next || next->event || next->no_ahead || lane->shy || lane->gap_ns == 0 ||
        lane->gap_ns > AHEAD_NS)
        return;
    if (!job->piece.start_ns || !job->piece.remote || job->piece.status || job->dropped ||
        look_in(job, daemon_now()) > 0)
        return;
    make_piece(d, next, alone);
    next->made = !next->holds && next->piece.remote && next->piece_ops > 0;
    next->no_ahead = !next->made;
    if (next->no_ahead)
        return;
    d->stats.ahead++;
    next->piece.wait_ns = AHEAD_WAIT_NS;
    sched_ready(next);
    if (s->deficit_ns <= 0)
        grant(d);
    start(d, slot, next);
}

static void look_ahead(struct daemon *d)
{
    struct sched *sc = &d->sched;
    const unsigned used = sched_slots_used(d); /* which stays */

    for (unsigned i = 0; i < sc->n_slots && used < sc->n_slots; i++)
        if (sc->slots[i].n == 1)
            start_ahead(d, &sc->slots[i], used == 1);
}

void sched_dispatch(struct daemon *d)
{
    struct sched *sc = &d->sched;

    sc->brief_ns = 0;
    continue_holders(d);
    if (sc->n_active == 0 && sc->can_wait && !d->draining)
        look_ahead(d);
    while (any_room(sc)) {
        struct job *job;
        struct session *s = next_session(d, &job);
        if (!s) {
            if (!grant(d))
                return;
            continue;
        }
        struct slot *slot = find_slot(sc, job);
        if (!slot) /* its turn: nobody else takes what becomes free before it */
            return;
        if (sc->brief_ns > BRIEF_TURN_NS) { /* others want to be heard */
            watch_again(d);
            return;
        }
        start(d, slot, job);
        if (s->active && s->deficit_ns <= 0)
            rotate(sc, s);
    }
}

unsigned sched_slots_used(const struct daemon *d)
{
    unsigned used = 0;

    for (unsigned i = 0; i < d->sched.n_slots; i++)
        used += d->sched.slots[i].n > 0;
    return used;
}

/*
 * A piece that runs will end soon, or never. One that has not begun, although nothing of ours is
 * before it, may wait for others: under MPS a kernel of another process is not interrupted. So it
 * may take longer, and the log says so first.
 */
static bool is_hung(struct daemon *d, unsigned i, char *why)
{
    struct slot *slot = &d->sched.slots[i];
    const struct job *job = slot->jobs[slot->first];
    bool started = __atomic_load_n(&job->piece.start_ns, __ATOMIC_RELAXED);
    double limit = fmax(1000 * job->piece_est_ns, HUNG_NS);

    if (__atomic_load_n(&job->piece.done, __ATOMIC_ACQUIRE))
        return false;
    if (slot->seen != (started ? SEEN_RUNNING : SEEN_WAITING)) {
        slot->seen = started ? SEEN_RUNNING : SEEN_WAITING;
        slot->seen_awake_ns = d->awake_ns;
        slot->told = false;
    }
    double age = (double)(d->awake_ns - slot->seen_awake_ns);
    if (age <= limit)
        return false;
    snprintf(why, PROTO_TEXT_MAX,
             "slot %u: a piece of client %llu %s for %.0f s, estimated: %.3g s", i,
             (unsigned long long)job->session->id, started ? "runs" : "has not begun", age / 1e9,
             job->piece_est_ns / 1e9);
    if (!started && !slot->told)
        log_warning("device_busy", "backend=%s reason=\"%s\"", d->backend->name, why);
    slot->told = true;
    return started || age > WAIT_FACTOR * limit;
}

bool sched_is_hung(struct daemon *d, char *why)
{
    for (unsigned i = 0; i < d->sched.n_slots; i++)
        if (d->sched.slots[i].n && is_hung(d, i, why))
            return true;
    return false;
}
