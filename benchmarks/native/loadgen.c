/* A load generator for HTTP/1.1 POST requests over keep-alive connections: one thread, epoll.
 *
 * Closed loop (default): every connection sends its next request when the answer is complete.
 * --rate R: R requests per second in all, whoever answers late; a request that finds no free connection is timed from
 * the moment at which it was due.   --hold: open all streams, say so, keep them until stdin closes.
 * Numbers count only inside the window that follows --warmup-ms; CPU of other processes (--cpu-pid) is read at both its
 * ends from their CPU clocks, which are exact to the nanosecond and include all their threads. One JSON object on stdout.
 * It never loops without bound: the window, the errors and the time without progress are all limited.
 */
#define _GNU_SOURCE
#include <arpa/inet.h>
#include <errno.h>
#include <fcntl.h>
#include <netinet/tcp.h>
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <strings.h>
#include <sys/epoll.h>
#include <sys/socket.h>
#include <sys/timerfd.h>
#include <time.h>
#include <unistd.h>

enum {
    MAX_CONNECTIONS = 16384,
    MAX_PIDS = 16,
    MAX_HEADERS = 32,
    MAX_SAMPLES = 4 << 20,
    MAX_OPENING = 64, /* connections without a first answer byte; less than any listen backlog */
    MAX_ERRORS = 100,
    READ_BYTES = 65536,
    HEAD_BYTES = 16384,
    VARIANTS = 64, /* requests differ in length by 0-63 blanks behind the JSON */
    STALL_NS = 10 * 1000000000ull,
};

enum state { CLOSED, CONNECTING, IDLE, HEAD, LENGTH, CHUNK_SIZE, CHUNK_DATA, CHUNK_END, TRAILER };

struct connection {
    int fd, opening, used, got_bytes, close_after;
    enum state state;
    const char *request; /* what is being sent */
    size_t request_size, sent;
    int64_t started_ns;
    uint64_t left; /* body or chunk bytes to come */
    char head[HEAD_BYTES];
    size_t head_size;
    char line[32]; /* a chunk's size line, possibly split */
    size_t line_size;
    int last_was_newline;
};

struct samples {
    uint32_t *us;
    size_t count;
};

static struct {
    const char *host, *path, *unique_header, *headers[MAX_HEADERS];
    int port, connections, stream, hold, header_count, pid_count, pids[MAX_PIDS];
    long duration_ms, warmup_ms;
    double rate;
} option = {.host = "127.0.0.1", .path = "/v1/chat/completions", .connections = 1, .duration_ms = 1000};

static struct connection *connections;
static int *idle, idle_first, idle_count; /* a ring: connections take turns, as clients of their own would */
static int next_to_open, opening, opened, epoll_fd, timer_fd, measuring;
static struct {
    char *data;
    size_t size, unique_at;
} variants[VARIANTS];
static unsigned long long sent_total, errors, reconnects, requests, events, bytes, unopened_events;
static char first_error[256];
static struct samples latency, delay;
static int64_t window_start_ns, window_end_ns, progress_ns, longest_pause_ns, rate_start_ns, cpu_start_ns[MAX_PIDS];
static unsigned long long rate_next, late;

static int64_t clock_ns(clockid_t clock) {
    struct timespec t;
    if (clock_gettime(clock, &t)) return -1;
    return (int64_t)t.tv_sec * 1000000000 + t.tv_nsec;
}

static int64_t now_ns(void) { return clock_ns(CLOCK_MONOTONIC); }

/* The CPU clock of another process, all threads, also those that have ended (clock_getcpuclockid(3)). */
static int64_t cpu_ns(int pid) { return clock_ns((clockid_t)((~(unsigned)pid << 3) | 2)); }

static void fail(const char *what) {
    if (!errors++) snprintf(first_error, sizeof first_error, "%.200s", what);
}

static void add_sample(struct samples *s, int64_t ns) {
    if (measuring && s->count < MAX_SAMPLES) s->us[s->count++] = ns < 0 ? 0 : (uint32_t)(ns / 1000);
}

/* ---- requests ---- */

static void build_variants(const char *body, size_t body_size) {
    for (int i = 0; i < VARIANTS; i++) {
        char *to = malloc(8192 + body_size + VARIANTS);
        int n = sprintf(to, "POST %s HTTP/1.1\r\nHost: %s:%d\r\n", option.path, option.host, option.port);
        for (int h = 0; h < option.header_count; h++) n += snprintf(to + n, 512, "%.500s\r\n", option.headers[h]);
        if (option.unique_header) {
            n += sprintf(to + n, "%.100s: ", option.unique_header);
            variants[i].unique_at = (size_t)n;
            n += sprintf(to + n, "%016d\r\n", 0);
        }
        n += sprintf(to + n, "Content-Type: application/json\r\nContent-Length: %zu\r\n\r\n", body_size + (size_t)i);
        memcpy(to + n, body, body_size);
        memset(to + n + body_size, ' ', (size_t)i);
        variants[i].data = to;
        variants[i].size = (size_t)n + body_size + (size_t)i;
    }
}

static void watch(struct connection *c, int how, uint32_t wanted) {
    struct epoll_event e = {wanted, {.u32 = (uint32_t)(c - connections)}};
    epoll_ctl(epoll_fd, how, c->fd, &e);
}

static void closed(struct connection *c) {
    if (c->fd >= 0) close(c->fd);
    c->fd = -1;
    if (c->opening) c->opening = 0, opening--;
    c->state = CLOSED;
}

static void begin(struct connection *c, int64_t at);

static void connect_to_server(struct connection *c) {
    struct sockaddr_in address = {.sin_family = AF_INET, .sin_port = htons((uint16_t)option.port)};
    int on = 1;
    inet_pton(AF_INET, option.host, &address.sin_addr);
    c->fd = socket(AF_INET, SOCK_STREAM | SOCK_NONBLOCK | SOCK_CLOEXEC, 0);
    if (c->fd < 0) {
        fail(strerror(errno));
        return;
    }
    setsockopt(c->fd, IPPROTO_TCP, TCP_NODELAY, &on, sizeof on);
    if (connect(c->fd, (struct sockaddr *)&address, sizeof address) && errno != EINPROGRESS) {
        fail(strerror(errno));
        closed(c);
        return;
    }
    c->state = CONNECTING;
    c->used = 0;
    if (!c->opening) c->opening = 1, opening++;
    watch(c, EPOLL_CTL_ADD, EPOLLOUT);
}

static void write_request(struct connection *c) {
    while (c->sent < c->request_size) {
        ssize_t n = send(c->fd, c->request + c->sent, c->request_size - c->sent, MSG_NOSIGNAL);
        if (n < 0 && errno == EAGAIN) {
            watch(c, EPOLL_CTL_MOD, EPOLLIN | EPOLLOUT);
            return;
        }
        if (n < 0) return; /* the read side learns why */
        c->sent += (size_t)n;
    }
}

static void begin(struct connection *c, int64_t at) {
    int which = (int)(sent_total % VARIANTS);
    if (option.unique_header) {
        char digits[20];
        snprintf(digits, sizeof digits, "%016llu", sent_total);
        memcpy(variants[which].data + variants[which].unique_at, digits, 16);
    }
    sent_total++;
    c->request = variants[which].data;
    c->request_size = variants[which].size;
    c->sent = c->head_size = 0;
    c->got_bytes = c->close_after = 0;
    c->state = HEAD;
    c->started_ns = at;
    write_request(c);
}

/* A connection is free: its next request, if one is due. */
static void next_request(struct connection *c, int64_t now) {
    if (option.rate <= 0) {
        begin(c, now);
        return;
    }
    int64_t due = rate_start_ns + (int64_t)((double)rate_next * 1e9 / option.rate);
    if (rate_start_ns && due <= now) {
        rate_next++;
        late++;
        begin(c, due);
        return;
    }
    c->state = IDLE;
    idle[(idle_first + idle_count++) % option.connections] = (int)(c - connections);
}

static void arm_timer(int64_t due) {
    struct itimerspec when = {{0, 0}, {due / 1000000000, due % 1000000000}};
    timerfd_settime(timer_fd, TFD_TIMER_ABSTIME, &when, NULL);
}

static void send_due_requests(void) {
    int64_t now = now_ns(), due;
    while ((due = rate_start_ns + (int64_t)((double)rate_next * 1e9 / option.rate)) <= now && idle_count) {
        struct connection *c = &connections[idle[idle_first]];
        idle_first = (idle_first + 1) % option.connections;
        idle_count--;
        rate_next++;
        if (c->state == IDLE) begin(c, now);
        else connect_to_server(c); /* the server closed it while it was idle */
    }
    arm_timer(due > now ? due : now + 1000000);
}

/* ---- answers ---- */

static void completed(struct connection *c) {
    int64_t now = progress_ns = now_ns();
    if (measuring) requests++;
    add_sample(&latency, now - c->started_ns);
    c->used = 1;
    if (c->close_after) {
        reconnects++;
        closed(c);
        connect_to_server(c);
    } else
        next_request(c, now);
}

static void count_events(struct connection *c, const char *data, size_t n, int64_t now) {
    for (const char *end = data + n, *at = data; at < end;) {
        const char *newline = memchr(at, '\n', (size_t)(end - at));
        if (!newline) {
            c->last_was_newline = 0;
            break;
        }
        if (newline == at && c->last_was_newline) {
            if (measuring) events++;
            else unopened_events++;
            c->last_was_newline = 0;
        } else
            c->last_was_newline = 1;
        at = newline + 1;
    }
    const char *stamp = data;
    while ((stamp = memmem(stamp, n - (size_t)(stamp - data), "\"mock_ns\":\"", 11)) && stamp + 31 <= data + n) {
        stamp += 11;
        add_sample(&delay, now - strtoll(stamp, NULL, 10));
    }
    progress_ns = now;
}

static const char *header(const char *head, const char *name) {
    for (const char *line = strstr(head, "\r\n"); line; line = strstr(line + 2, "\r\n"))
        if (!strncasecmp(line + 2, name, strlen(name)) && line[2 + strlen(name)] == ':') {
            const char *value = line + 3 + strlen(name);
            return value + strspn(value, " ");
        }
    return NULL;
}

/* The head is complete: what frames the body? Returns 0 if the answer cannot be used. */
static int understand_head(struct connection *c) {
    const char *value;
    c->head[c->head_size] = 0;
    if (strncmp(c->head, "HTTP/1.1 200", 12)) {
        fail(c->head);
        return 0;
    }
    if ((value = header(c->head, "connection")) && !strncasecmp(value, "close", 5)) c->close_after = 1;
    if ((value = header(c->head, "transfer-encoding")) && !strncasecmp(value, "chunked", 7)) {
        c->state = CHUNK_SIZE;
        c->line_size = 0;
        return 1;
    }
    if (!(value = header(c->head, "content-length"))) {
        fail("the answer has neither Content-Length nor chunks");
        return 0;
    }
    c->state = LENGTH;
    c->left = strtoull(value, NULL, 10);
    return 1;
}

/* Take head bytes; returns how many were used. */
static size_t take_head(struct connection *c, const char *data, size_t n) {
    size_t before = c->head_size, room = HEAD_BYTES - 1 - before, copied = n < room ? n : room;
    memcpy(c->head + before, data, copied);
    size_t from = before > 3 ? before - 3 : 0;
    char *end = memmem(c->head + from, before + copied - from, "\r\n\r\n", 4);
    c->head_size = before + copied;
    if (!end) return copied;
    c->head_size = (size_t)(end - c->head) + 4;
    return c->head_size - before;
}

/* Take a line up to its LF; returns bytes used, sets *done when the line is complete (without CRLF, NUL-terminated). */
static size_t take_line(struct connection *c, const char *data, size_t n, int *done) {
    const char *newline = memchr(data, '\n', n);
    size_t used = newline ? (size_t)(newline - data) + 1 : n;
    for (size_t i = 0; i < used && c->line_size < sizeof c->line - 1; i++)
        if (data[i] != '\r' && data[i] != '\n') c->line[c->line_size++] = data[i];
    *done = newline != NULL;
    if (*done) {
        c->line[c->line_size] = 0;
        c->line_size = 0;
    }
    return used;
}

/* Follow the answer through `data`. Returns 0 if the connection cannot be used any further. */
static int feed(struct connection *c, const char *data, size_t n) {
    int64_t now = option.stream ? now_ns() : 0;
    while (n) {
        size_t used = n;
        int done = 0;
        switch (c->state) {
        case HEAD:
            used = take_head(c, data, n);
            done = c->head_size >= 4 && !memcmp(c->head + c->head_size - 4, "\r\n\r\n", 4);
            if (done && !understand_head(c)) return 0;
            if (!done && c->head_size == HEAD_BYTES - 1) return fail("the answer's head is too long"), 0;
            break;
        case LENGTH:
        case CHUNK_DATA:
            if (used > c->left) used = (size_t)c->left;
            if (option.stream) count_events(c, data, used, now);
            c->left -= used;
            if (!c->left && c->state == CHUNK_DATA) c->state = CHUNK_END;
            break;
        case CHUNK_SIZE:
            used = take_line(c, data, n, &done);
            if (done) {
                c->left = strtoull(c->line, NULL, 16);
                c->state = c->left ? CHUNK_DATA : TRAILER;
            }
            break;
        case CHUNK_END:
            used = take_line(c, data, n, &done);
            if (done) c->state = CHUNK_SIZE;
            break;
        case TRAILER:
            used = take_line(c, data, n, &done);
            if (done && c->line[0] == 0) c->state = LENGTH, c->left = 0;
            break;
        default:
            return fail("bytes arrived that nobody asked for"), 0;
        }
        if (c->opening && c->state > HEAD) c->opening = 0, opening--, opened++;
        data += used;
        n -= used;
        if (c->state == LENGTH && !c->left) completed(c);
    }
    return 1;
}

static void ended(struct connection *c, const char *why) {
    int was_idle = c->state == IDLE;
    /* a kept connection may be closed by the server before it saw the request: try again on a new one */
    int stale = c->used && c->state == HEAD && !c->got_bytes;
    closed(c);
    if (was_idle) return; /* it stays in `idle`, and is opened anew when it is needed */
    if (stale) reconnects++;
    else fail(why);
    if (errors < MAX_ERRORS) connect_to_server(c);
}

static void readable(struct connection *c) {
    static char buffer[READ_BYTES];
    ssize_t n = recv(c->fd, buffer, sizeof buffer, 0);
    if (n < 0 && errno == EAGAIN) return;
    if (n <= 0) {
        ended(c, n ? strerror(errno) : "the server closed the connection in the middle of an answer");
        return;
    }
    c->got_bytes = 1;
    if (measuring) bytes += (size_t)n;
    if (!feed(c, buffer, (size_t)n)) {
        closed(c);
        if (errors < MAX_ERRORS) connect_to_server(c);
    }
}

static void writable(struct connection *c) {
    if (c->state != CONNECTING) {
        watch(c, EPOLL_CTL_MOD, EPOLLIN);
        write_request(c);
        return;
    }
    int error = 0;
    socklen_t size = sizeof error;
    getsockopt(c->fd, SOL_SOCKET, SO_ERROR, &error, &size);
    if (error) {
        fail(strerror(error));
        closed(c);
        return;
    }
    watch(c, EPOLL_CTL_MOD, EPOLLIN);
    if (option.rate > 0 && !option.stream) c->opening = 0, opening--, opened++;
    next_request(c, now_ns());
}

/* ---- the run ---- */

static int by_value(const void *a, const void *b) {
    uint32_t x = *(const uint32_t *)a, y = *(const uint32_t *)b;
    return x < y ? -1 : x > y;
}

static void print_samples(const char *name, struct samples *s) {
    if (!s->count) {
        printf(",\"%s\":null", name);
        return;
    }
    qsort(s->us, s->count, sizeof *s->us, by_value);
#define AT(q) s->us[(size_t)((double)(s->count - 1) * (q))]
    printf(",\"%s\":{\"p50\":%u,\"p90\":%u,\"p99\":%u,\"max\":%u}", name, AT(0.5), AT(0.9), AT(0.99), AT(1.0));
}

static void print_escaped(const char *text) {
    for (; *text && *text != '\r' && *text != '\n'; text++)
        if (*text == '"' || *text == '\\' || (unsigned char)*text < 32) printf("?");
        else putchar(*text);
}

static int report(void) {
    double seconds = (double)(window_end_ns - window_start_ns) / 1e9;
    printf("{\"seconds\":%.6f,\"requests\":%llu,\"events\":%llu,\"bytes\":%llu,\"errors\":%llu,\"reconnects\":%llu,"
           "\"late\":%llu,\"opened\":%d,\"longest_pause_ms\":%.1f,\"cpu_ns\":[",
           seconds, requests, events, bytes, errors, reconnects, late, opened, (double)longest_pause_ns / 1e6);
    for (int i = 0; i < option.pid_count; i++) {
        int64_t end = cpu_ns(option.pids[i]);
        if (end < 0 || cpu_start_ns[i] < 0) fail("a measured process has ended");
        printf("%s%lld", i ? "," : "", (long long)(end - cpu_start_ns[i]));
    }
    printf("]");
    print_samples("latency_us", &latency);
    print_samples("event_delay_us", &delay);
    printf(",\"error\":\"");
    print_escaped(first_error);
    printf("\"}\n");
    return errors ? 1 : 0;
}

static void start_window(int64_t now) {
    measuring = 1;
    window_start_ns = now;
    window_end_ns = now + option.duration_ms * 1000000;
    late = 0;
    for (int i = 0; i < option.pid_count; i++) cpu_start_ns[i] = cpu_ns(option.pids[i]);
}

static void open_more(void) {
    while (next_to_open < option.connections && opening < MAX_OPENING && errors < MAX_ERRORS)
        connect_to_server(&connections[next_to_open++]);
}

static void handle(struct epoll_event *e) {
    if (e->data.u32 == UINT32_MAX) {
        uint64_t expirations;
        if (read(timer_fd, &expirations, sizeof expirations) > 0) send_due_requests();
        return;
    }
    struct connection *c = &connections[e->data.u32];
    if (c->fd >= 0 && e->events & EPOLLOUT) writable(c);
    if (c->fd >= 0 && c->state != CONNECTING && e->events & (EPOLLIN | EPOLLHUP | EPOLLERR)) readable(c);
}

/* Turn the loop until `deadline`, or until everything is open when that is what is waited for. */
static int run_until(int64_t deadline, int until_open) {
    struct epoll_event ready[256];
    int64_t turned_ns = 0;
    for (;;) {
        open_more();
        int64_t now = now_ns();
        if (until_open ? opened >= option.connections : now >= deadline) return 1;
        if (errors >= MAX_ERRORS) return 0;
        if (until_open && now >= deadline) return fail("not every connection could be opened in time"), 0;
        if ((uint64_t)(now - progress_ns) > STALL_NS && !option.hold) return fail("no progress for 10 s"), 0;
        /* this loop turns every 100 ms: what exceeds that, the machine did not let the generator run */
        if (measuring && turned_ns && now - turned_ns > longest_pause_ns) longest_pause_ns = now - turned_ns;
        turned_ns = now;
        int64_t left_ms = (deadline - now + 999999) / 1000000;
        int n = epoll_wait(epoll_fd, ready, 256, left_ms > 100 ? 100 : (int)left_ms);
        for (int i = 0; i < n; i++) handle(&ready[i]);
    }
}

static int stdin_closed(void) {
    char c;
    return read(0, &c, 1) == 0;
}

static void hold_streams(void) {
    printf("{\"open\":%d}\n", opened);
    fflush(stdout);
    fcntl(0, F_SETFL, O_NONBLOCK);
    while (!stdin_closed() && now_ns() < window_end_ns && run_until(now_ns() + 50000000, 0)) continue;
}

static void run(void) {
    int64_t now = progress_ns = now_ns();
    /* the next answer opens a connection; in rate mode the TCP connection is enough */
    if (!run_until(now + 30000000000, 1)) return;
    if (option.rate > 0) {
        rate_start_ns = now_ns();
        send_due_requests();
    }
    if (!run_until(now_ns() + option.warmup_ms * 1000000, 0)) return;
    start_window(now_ns());
    if (option.hold) hold_streams();
    else run_until(window_end_ns, 0);
    window_end_ns = now_ns();
}

static void set_up(void) {
    static struct epoll_event timer = {EPOLLIN, {.u32 = UINT32_MAX}};
    epoll_fd = epoll_create1(EPOLL_CLOEXEC);
    timer_fd = timerfd_create(CLOCK_MONOTONIC, TFD_NONBLOCK | TFD_CLOEXEC);
    epoll_ctl(epoll_fd, EPOLL_CTL_ADD, timer_fd, &timer);
    connections = calloc((size_t)option.connections, sizeof *connections);
    idle = calloc((size_t)option.connections, sizeof *idle);
    latency.us = malloc(MAX_SAMPLES * sizeof(uint32_t)); /* pages are taken as they are written */
    delay.us = malloc(MAX_SAMPLES * sizeof(uint32_t));
    if (!connections || !idle || !latency.us || !delay.us) abort();
    for (int i = 0; i < option.connections; i++) connections[i].fd = -1;
}

static void read_body(const char *path) {
    FILE *file = fopen(path, "rb");
    if (!file) {
        perror(path);
        exit(2);
    }
    fseek(file, 0, SEEK_END);
    size_t size = (size_t)ftell(file);
    rewind(file);
    char *body = malloc(size + 1);
    if (fread(body, 1, size, file) != size) exit(2);
    fclose(file);
    build_variants(body, size);
    free(body);
}

int main(int argc, char **argv) {
    const char *body_path = NULL;
    for (int i = 1; i < argc; i++) {
        const char *name = argv[i];
        if (!strcmp(name, "--stream")) option.stream = 1;
        else if (!strcmp(name, "--hold")) option.hold = 1;
        else if (i + 1 == argc) {
            fprintf(stderr, "loadgen: %s needs a value\n", name);
            return 2;
        } else if (!strcmp(name, "--port")) option.port = atoi(argv[++i]);
        else if (!strcmp(name, "--path")) option.path = argv[++i];
        else if (!strcmp(name, "--connections")) option.connections = atoi(argv[++i]);
        else if (!strcmp(name, "--duration-ms")) option.duration_ms = atol(argv[++i]);
        else if (!strcmp(name, "--warmup-ms")) option.warmup_ms = atol(argv[++i]);
        else if (!strcmp(name, "--rate")) option.rate = atof(argv[++i]);
        else if (!strcmp(name, "--body-file")) body_path = argv[++i];
        else if (!strcmp(name, "--unique-header")) option.unique_header = argv[++i];
        else if (!strcmp(name, "--header") && option.header_count < 12) option.headers[option.header_count++] = argv[++i];
        else if (!strcmp(name, "--cpu-pid") && option.pid_count < MAX_PIDS) option.pids[option.pid_count++] = atoi(argv[++i]);
        else {
            fprintf(stderr, "loadgen: unknown or repeated too often: %s\n", name);
            return 2;
        }
    }
    if (!body_path || !option.port || option.connections < 1 || option.connections > MAX_CONNECTIONS) {
        fprintf(stderr, "usage: loadgen --port P --body-file F [--connections 1..%d] ...\n", MAX_CONNECTIONS);
        return 2;
    }
    read_body(body_path);
    set_up();
    run();
    return report();
}
