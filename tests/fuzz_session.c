/*
 * fuzz_session.c - a live daemon (CPU backend) and clients that do anything: packets of every
 * kind, sound and broken, descriptors of every kind, words in the page, hanging up. After each
 * input nothing may be left: no session, job, buffer, held slot or descriptor.
 *
 * An input is a list of commands, a byte each, with their operands behind them.
 */
#include <fcntl.h>
#include <stdlib.h>
#include <string.h>
#include <sys/mman.h>
#include <sys/socket.h>
#include <unistd.h>

#include "daemon/daemon.h"
#include "daemon/log.h"

enum { PEERS = 2, MEMORY = 65536 };

static struct daemon d;

static struct peer {
    struct session *s; /* NULL: none */
    uint64_t id;       /* of the session: it may be gone already */
    int fd, page_fd;
    struct sage_page *page;
    uint32_t next[4];
} peers[PEERS];

static struct input {
    const uint8_t *at;
    size_t left;
} in;

static void require(bool what)
{
    if (!what)
        abort();
}

static uint8_t byte(void)
{
    if (!in.left)
        return 0;
    in.left--;
    return *in.at++;
}

/* Mostly small, now and then anything. */
static uint64_t number(uint64_t usual)
{
    uint64_t value = 0;
    uint8_t how = byte();

    if (how < 200)
        return usual;
    if (how < 240)
        return byte();
    for (int i = 0; i < 8; i++)
        value = value << 8 | byte();
    return value;
}

/* --- descriptors --- */

static int make_memfd(size_t size, int seals)
{
    int fd = memfd_create("fuzz", MFD_CLOEXEC | MFD_ALLOW_SEALING);

    require(fd >= 0 && ftruncate(fd, (off_t)size) == 0);
    if (seals)
        fcntl(fd, F_ADD_SEALS, seals);
    return fd;
}

static int some_fd(const struct peer *p, uint8_t how)
{
    switch (how % 6) {
    case 0:
        return make_memfd(MEMORY, F_SEAL_SHRINK);
    case 1:
        return make_memfd(byte(), byte());
    case 2:
        return open("/dev/null", O_RDWR | O_CLOEXEC);
    case 3:
        return dup(p->page_fd);
    case 4:
        return make_memfd(MEMORY, F_SEAL_SHRINK | F_SEAL_WRITE);
    default:
        return open("/proc/self/status", O_RDONLY | O_CLOEXEC);
    }
}

/* --- clients --- */

static bool connected(const struct peer *p)
{
    const struct session *s;

    TAILQ_FOREACH(s, &d.sessions, link)
        if (s == p->s && s->id == p->id)
            return true;
    return false;
}

static void give(struct peer *p, const void *data, size_t len, const int *fds, unsigned n)
{
    char *copy =
        malloc(len + !len); /* exactly as long, so that the sanitizer sees a byte too far */

    memcpy(copy, data, len);
    session_packet(p->s, copy, len, fds, n);
    free(copy);
}

static void give_fds(struct peer *p, uint32_t op, enum msg_kind kind, const void *msg,
                     const int *fds, unsigned n)
{
    static uint8_t buf[PROTO_PACKET_MAX];
    size_t len = packet_encode(buf, sizeof(buf), op, byte(), kind, msg);

    if (len)
        give(p, buf, len, fds, n);
    for (unsigned i = 0; !len && i < n; i++)
        close(fds[i]);
}

static void give_message(struct peer *p, uint32_t op, enum msg_kind kind, const void *msg, int fd)
{
    give_fds(p, op, kind, msg, &fd, fd >= 0);
}

static void hang_up(struct peer *p)
{
    if (p->fd >= 0)
        close(p->fd);
    p->fd = -1;
    p->s = NULL;
}

static void connect_peer(struct peer *p)
{
    int fds[2];

    hang_up(p);
    require(socketpair(AF_UNIX, SOCK_SEQPACKET | SOCK_CLOEXEC | SOCK_NONBLOCK, 0, fds) == 0);
    p->fd = fds[0];
    p->s = session_create(&d, fds[1]);
    if (!p->s)
        return;
    p->id = p->s->id;
    struct msg_hello hello = {
        .major = 1, .priority = byte() % 3, .name = "fuzz", .page = byte() % 8 != 7};
    give_message(p, OP_HELLO, MSG_HELLO, &hello, hello.page ? dup(p->page_fd) : -1);
}

/* --- commands --- */

static void raw_packet(struct peer *p)
{
    uint8_t flags = byte();
    size_t len = byte() | (size_t)byte() << 8;
    int fds[3];
    unsigned n = flags & 0x80 ? flags % 4 : 0;

    for (unsigned i = 0; i < n; i++)
        fds[i] = some_fd(p, byte());
    if (len > in.left)
        len = in.left;
    give(p, in.at, len, fds, n);
    in.at += len;
    in.left -= len;
}

static struct sage_tensor tensor(uint64_t offset, int64_t heads, int64_t tokens, int64_t dim)
{
    struct sage_tensor t = {
        .dtype = number(SAGE_F16),
        .buffer = (uint32_t)number(1),
        .offset = number(offset),
        .shape = {(int64_t)number(1), (int64_t)number((uint64_t)heads),
                  (int64_t)number((uint64_t)tokens), (int64_t)number((uint64_t)dim)},
        .stride = {heads * tokens * dim, tokens * dim, dim, 1},
    };

    if (byte() > 230)
        t.stride[byte() % 4] = (int64_t)number(0);
    return t;
}

static void submit(struct peer *p)
{
    static struct msg_submit m;
    uint8_t shape = byte(), options = byte(), lane = byte() % 4;
    int64_t heads = 1 + shape % 3, tokens = 1 + shape / 3 % 40, dim = 8 << shape % 4;
    struct sage_attn *a = &m.attn;

    if (options & 128) /* more than the rows of one piece */
        tokens = 300, dim = 8;
    memset(&m, 0, sizeof(m));
    m.lane = (uint32_t)number(lane);
    m.number = (uint32_t)number(p->next[lane]++);
    m.prompt = options & 1;
    m.event = (uint32_t)number(0);
    m.staged = number(0);
    m.streamed = m.staged & 1;
    a->q = tensor(0, heads, tokens, dim);
    a->k = tensor(16384, heads, tokens, dim);
    a->v = tensor(32768, heads, tokens, dim);
    a->o = tensor(49152, heads, tokens, dim);
    if (options & 2)
        a->mask = tensor(byte() * 16u, heads, tokens, tokens);
    if (options & 4)
        a->lse = tensor(65536 - 4096, heads, tokens, 1);
    a->causal = options & 8;
    a->smooth_k = options & 16;
    a->variant = number(0);
    a->window_left = a->window_right = (int64_t)number(UINT64_MAX);
    if (options & 32) {
        m.n_q_offsets = m.n_k_offsets = (uint32_t)number(2) % 8;
        for (int i = 0; i < 8; i++)
            m.q_offsets[i] = m.k_offsets[i] = (int32_t)number(i ? (uint64_t)tokens : 0);
    }
    if (options & 64 && m.lane < SAGE_LANES)
        page_store(&p->page->lane[m.lane].acquire[m.number % SAGE_ENTRIES], m.number);
    give_message(p, OP_SUBMIT, MSG_SUBMIT, &m, -1);
}

static void scribble(struct peer *p)
{
    uint32_t *words = (uint32_t *)p->page;
    size_t at = byte() % 8 == 0 ? byte() : 1024 + byte() % 4 * 256u + byte();

    page_store(&words[at], (uint32_t)number(byte()));
}

static void registration(struct peer *p)
{
    struct msg_register m = {
        .buffer = (uint32_t)number(1), .kind = (uint32_t)number(1), .size = number(1)};
    int fds[4];
    unsigned n = (unsigned)number(1) % 5;

    if (m.kind != BUFFER_MEMFD) {
        m.n_handle = (uint32_t)number(PROTO_HANDLE_MAX) % (PROTO_HANDLE_MAX + 1);
        m.n_chunks = (uint32_t)number(n) % 5;
        for (uint32_t i = 0; i < m.n_chunks; i++)
            m.chunks[i] = number(4096);
        m.more = byte() % 2;
    }
    for (unsigned i = 0; i < n; i++)
        fds[i] = some_fd(p, (uint8_t)number(0));
    give_fds(p, OP_REGISTER, MSG_REGISTER, &m, fds, n);
}

static void other_request(struct peer *p)
{
    struct msg_unregister unregister = {(uint32_t)number(1)};
    struct msg_cancel cancel = {byte() % 4, byte()};
    struct msg_clients clients = {number(0)};
    struct msg_event event = {.event = byte() % 4, .n_handle = PROTO_HANDLE_MAX};
    struct msg_waited waited = {byte() % 4};

    event.handle[0] = event.event == 3 ? (uint8_t)number(1) : 1;
    switch (byte() % 7) {
    case 0:
        give_message(p, OP_UNREGISTER, MSG_UNREGISTER, &unregister, -1);
        break;
    case 1:
        give_message(p, OP_CANCEL, MSG_CANCEL, &cancel, -1);
        break;
    case 2:
        give_message(p, OP_CLIENTS, MSG_CLIENTS, &clients, -1);
        break;
    case 3:
        give_message(p, OP_STATS, MSG_EMPTY, &clients, -1);
        break;
    case 4:
        give_message(p, OP_EVENT, MSG_EVENT, &event, -1);
        break;
    case 5:
        give_message(p, OP_WAITED, MSG_WAITED, &waited, -1);
        break;
    default:
        give_message(p, byte(), MSG_EMPTY, &clients, -1);
    }
}

static void turns(uint8_t n)
{
    for (int i = 0; i < n % 4 + 1; i++) {
        uv_run(&d.loop, UV_RUN_NOWAIT);
        if (n > 200)
            usleep(100); /* let a piece end */
    }
}

static void hear(struct peer *p)
{
    static char buf[PROTO_PACKET_MAX];

    while (p->fd >= 0 && recv(p->fd, buf, sizeof(buf), MSG_DONTWAIT) > 0)
        continue;
}

static void command(void)
{
    uint8_t what = byte();
    struct peer *p = &peers[what / 16 % PEERS];

    what %= 16;
    if (what != 3 && what != 7 && !connected(p))
        connect_peer(p);
    if (what != 3 && what != 7 && !connected(p))
        return;
    switch (what) {
    case 0:
        raw_packet(p);
        break;
    case 3:
        turns(byte());
        break;
    case 4:
        scribble(p);
        break;
    case 5:
        registration(p);
        break;
    case 6:
        other_request(p);
        break;
    case 7:
        hang_up(p);
        break;
    case 8:
        session_close(p->s, "fuzz");
        break;
    case 9:
        hear(p);
        break;
    default:
        submit(p);
    }
}

/* --- what a GPU would share: lists of chunks, and events --- */

static char shared_memory[MEMORY];
static unsigned mapped, opened, recorded, given_back; /* by the pool: mapped and opened */

static int share_map(struct device *device, const struct mapping *what, void **base, uint64_t *size,
                     char *why)
{
    if (what->kind == BUFFER_MEMFD)
        return backend_cpu.map(device, what, base, size, why);
    *size = 0;
    for (uint32_t i = 0; i < what->n; i++)
        *size += what->sizes[i];
    memcpy(why, "too large", 10);
    if (*size > MEMORY)
        return SAGE_EHANDLE;
    __atomic_add_fetch(&mapped, 1, __ATOMIC_RELAXED);
    *base = shared_memory;
    return 0;
}

static void share_unmap(struct device *device, const struct mapping *what, void *base,
                        uint64_t size)
{
    if (what->kind == BUFFER_MEMFD)
        backend_cpu.unmap(device, what, base, size);
    else
        __atomic_sub_fetch(&mapped, 1, __ATOMIC_RELAXED);
}

static int share_event_open(struct device *device, const uint8_t *handle, void **event, char *why)
{
    (void)device;
    memcpy(why, "no event", 9);
    if (handle[0] > 100)
        return SAGE_EHANDLE;
    *event = (void *)((uintptr_t)handle[0] + 1);
    __atomic_add_fetch(&opened, 1, __ATOMIC_RELAXED);
    return 0;
}

static void share_event_close(struct device *device, void *event)
{
    (void)device;
    require(event);
    __atomic_sub_fetch(&opened, 1, __ATOMIC_RELAXED);
}

/* One event is never done, one always, one fails, the others take a while. */
static int share_event_done(struct device *device, void *event)
{
    static unsigned looks;
    (void)device;

    switch ((uintptr_t)event) {
    case 1:
        return 0;
    case 2:
        return 1;
    case 3:
        return SAGE_EHANDLE;
    default:
        return ++looks % 3 == 0;
    }
}

static int share_event_record(struct stream *stream, uint32_t *number, uint8_t *handle)
{
    static unsigned calls;
    (void)stream;

    memset(handle, 7, PROTO_HANDLE_MAX);
    if (++calls % 5 == 0)
        return SAGE_ENOMEM;
    *number = ++recorded % 8 + 1; /* so that clients find them */
    return 0;
}

static void share_event_put(struct device *device, uint32_t number)
{
    (void)device;
    require(number >= 1 && number <= 8);
    given_back++;
}

/* --- before and after --- */

static void start(void)
{
    struct config config;
    char why[PROTO_TEXT_MAX > 256 ? PROTO_TEXT_MAX : 256];

    static struct backend shared;

    config_init(&config);
    strcpy(config.backend, "cpu");
    config.threads = 1;
    config.slots = 2;
    config.slot_bytes = 1 << 20;
    config.quantum_us = 100;
    config.client_buffers = 4;
    log_set_level(2);
    require(config_finish(&config, why) && daemon_init(&d, &config, why) == 0);
    /* Small jobs count as long ones, so that they are handed to threads and cut into pieces. */
    d.sched.ns_per_op = 1;
    d.sched.quantum_ns = 50000;
    shared = *d.backend;
    shared.kinds |= 1 << BUFFER_VMM;
    shared.modes |= MODE_EVENT;
    shared.map = share_map;
    shared.unmap = share_unmap;
    shared.event_open = share_event_open;
    shared.event_close = share_event_close;
    shared.event_done = share_event_done;
    shared.event_record = share_event_record;
    shared.event_put = share_event_put;
    d.backend = &shared;
}

/* The next descriptor that is free: larger than at the start if one was left open. */
static int next_fd(void)
{
    int fd = dup(STDERR_FILENO);

    close(fd);
    return fd;
}

static void check_nothing_left(void)
{
    for (unsigned i = 0; i < d.sched.n_slots; i++)
        require(d.sched.slots[i].n == 0 && !d.sched.slots[i].holder);
    require(d.n_sessions == 0 && TAILQ_EMPTY(&d.sessions) && TAILQ_EMPTY(&d.users));
    require(d.sched.n_held == 0 && d.sched.n_active == 0 && TAILQ_EMPTY(&d.sched.active));
    require(!watch_has_jobs(&d.watch) && TAILQ_EMPTY(&d.flushing));
    require(!d.device_lost);
    require(mapped == 0 && opened == 0 && recorded == given_back);
    const struct stats *s = &d.stats;
    require(s->accepted == s->done + s->failed + s->canceled + s->dropped);
}

int LLVMFuzzerTestOneInput(const uint8_t *data, size_t size)
{
    static int first_fd;

    if (!d.backend) {
        start();
        uv_run(&d.loop, UV_RUN_NOWAIT);
    }
    first_fd = next_fd();
    in = (struct input){data, size};
    for (int i = 0; i < PEERS; i++) {
        peers[i] = (struct peer){.fd = -1, .next = {1, 1, 1, UINT32_MAX}};
        peers[i].page = page_create(&peers[i].page_fd);
        require(peers[i].page);
    }
    while (in.left)
        command();
    for (int i = 0; i < PEERS; i++)
        hang_up(&peers[i]);
    for (int i = 0; d.n_live && i < 10000; i++)
        uv_run(&d.loop, UV_RUN_ONCE);
    require(d.n_live == 0);
    d.draining = false; /* some inputs ask for it */
    for (int i = 0; i < PEERS; i++) {
        page_unmap(peers[i].page);
        close(peers[i].page_fd);
    }
    check_nothing_left();
    require(next_fd() == first_fd);
    return 0;
}
