/* A mock llama-server for benchmarks: one thread, epoll, no allocation per request once buffers have grown.
 *
 * It takes llama-server's command line (--host, --port, -m, -np; every other flag is ignored), answers /health, /props,
 * /slots, /v1/models and /v1/chat/completions like it, and frames its answers like it: JSON with Content-Length, SSE as one
 * chunk per event, two events in the first chunk. The request's body steers the answer:
 *   "max_tokens": events of a stream   "mock_interval_us": time between them   "mock_answer_bytes": size of a JSON answer
 * Each event carries the CLOCK_MONOTONIC time of its write ("mock_ns"), so that the reader knows how long it travelled.
 * --mock-keepalive-max N closes a connection after N answers, as llama-server does after 100; the default is never.
 */
#define _GNU_SOURCE
#include <arpa/inet.h>
#include <errno.h>
#include <fcntl.h>
#include <netinet/tcp.h>
#include <signal.h>
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

enum { MAX_FDS = 65536, MAX_EVENTS = 256, READ_BYTES = 65536, MAX_REQUEST_BYTES = 128 << 20 };

struct buffer {
    char *data;
    size_t used, size;
};

struct connection {
    int fd, closing, streaming, answered;
    struct buffer in, out;
    size_t out_sent;
    int64_t due_ns, interval_ns; /* next event of the stream */
    long events_left;
    int heap_at;
};

static struct connection *connections[MAX_FDS];
static struct connection *heap[MAX_FDS + 1]; /* streams by due_ns, 1-based */
static int heap_size, epoll_fd, timer_fd, total_slots = 4, streams;
static long keepalive_max, answers;
static const char *model_path = "mock.gguf";
static uint64_t random_state = 88172645463325252ull;

static int64_t now_ns(void) {
    struct timespec t;
    clock_gettime(CLOCK_MONOTONIC, &t);
    return (int64_t)t.tv_sec * 1000000000 + t.tv_nsec;
}

static uint64_t next_random(void) {
    random_state ^= random_state << 13;
    random_state ^= random_state >> 7;
    return random_state ^= random_state << 17;
}

static void reserve(struct buffer *b, size_t more) {
    if (b->used + more <= b->size) return;
    size_t size = b->size ? b->size : 4096;
    while (size < b->used + more) size *= 2;
    b->data = realloc(b->data, size);
    if (!b->data) abort();
    b->size = size;
}

static void append(struct buffer *b, const void *data, size_t n) {
    reserve(b, n);
    memcpy(b->data + b->used, data, n);
    b->used += n;
}

/* ---- timers: a binary heap of streams, and one timerfd set to its top ---- */

static void heap_put(int at, struct connection *c) {
    heap[at] = c;
    c->heap_at = at;
}

static void heap_up(int at) {
    struct connection *c = heap[at];
    for (; at > 1 && heap[at / 2]->due_ns > c->due_ns; at /= 2) heap_put(at, heap[at / 2]);
    heap_put(at, c);
}

static void heap_down(int at) {
    struct connection *c = heap[at];
    for (int child; (child = at * 2) <= heap_size; at = child) {
        if (child < heap_size && heap[child + 1]->due_ns < heap[child]->due_ns) child++;
        if (heap[child]->due_ns >= c->due_ns) break;
        heap_put(at, heap[child]);
    }
    heap_put(at, c);
}

static void heap_add(struct connection *c) {
    heap_put(++heap_size, c);
    heap_up(heap_size);
}

static void heap_remove(struct connection *c) {
    int at = c->heap_at;
    struct connection *last = heap[heap_size--];
    if (last != c) {
        heap_put(at, last);
        heap_up(at);
        heap_down(last->heap_at);
    }
    c->heap_at = 0;
}

static void arm_timer(void) {
    static int64_t armed_ns;
    int64_t due = heap_size ? heap[1]->due_ns : 0;
    if (due == armed_ns) return;
    armed_ns = due;
    struct itimerspec when = {{0, 0}, {due / 1000000000, due % 1000000000}};
    timerfd_settime(timer_fd, TFD_TIMER_ABSTIME, &when, NULL);
}

/* ---- connections ---- */

static void end_stream(struct connection *c) {
    if (!c->streaming) return;
    c->streaming = 0;
    streams--;
    if (c->heap_at) heap_remove(c);
}

static void drop(struct connection *c) {
    end_stream(c);
    connections[c->fd] = NULL;
    close(c->fd);
    free(c->in.data);
    free(c->out.data);
    free(c);
}

static void watch(struct connection *c, uint32_t events) {
    struct epoll_event e = {events, {.fd = c->fd}};
    epoll_ctl(epoll_fd, EPOLL_CTL_MOD, c->fd, &e);
}

/* Write what waits. Returns 0 if the connection is gone. */
static int flush(struct connection *c) {
    while (c->out_sent < c->out.used) {
        ssize_t n = send(c->fd, c->out.data + c->out_sent, c->out.used - c->out_sent, MSG_NOSIGNAL);
        if (n < 0 && errno == EAGAIN) {
            watch(c, EPOLLIN | EPOLLOUT);
            return 1;
        }
        if (n < 0) {
            drop(c);
            return 0;
        }
        c->out_sent += (size_t)n;
    }
    c->out.used = c->out_sent = 0;
    if (c->closing && !c->streaming) {
        drop(c);
        return 0;
    }
    return 1;
}

/* ---- answers ---- */

static void answer(struct connection *c, const char *status, const char *type, const char *body, size_t n, size_t pad) {
    char head[512];
    char keep_alive[64] = "";
    c->answered++;
    if (keepalive_max && c->answered >= keepalive_max) c->closing = 1;
    if (c->closing) snprintf(keep_alive, sizeof keep_alive, "Connection: close\r\n");
    else if (keepalive_max) snprintf(keep_alive, sizeof keep_alive, "Keep-Alive: timeout=5, max=%ld\r\n", keepalive_max);
    int head_size = snprintf(head, sizeof head,
                             "HTTP/1.1 %s\r\nServer: llama.cpp\r\nAccess-Control-Allow-Origin: \r\n%s"
                             "Content-Type: %s\r\nContent-Length: %zu\r\n\r\n",
                             status, keep_alive, type, n + pad);
    append(&c->out, head, (size_t)head_size);
    append(&c->out, body, n);
    reserve(&c->out, pad);
    memset(c->out.data + c->out.used, ' ', pad);
    c->out.used += pad;
}

static void answer_json(struct connection *c, const char *status, const char *body) {
    answer(c, status, "application/json; charset=utf-8", body, strlen(body), 0);
}

static void answer_slots(struct connection *c) {
    struct buffer body = {0};
    append(&body, "[", 1);
    for (int i = 0; i < total_slots; i++) {
        char slot[128];
        int n = snprintf(slot, sizeof slot, "%s{\"id\":%d,\"n_ctx\":4096,\"is_processing\":%s}", i ? "," : "", i,
                         i < streams ? "true" : "false");
        append(&body, slot, (size_t)n);
    }
    append(&body, "]", 2); /* with the NUL */
    answer_json(c, "200 OK", body.data);
    free(body.data);
}

static void answer_props(struct connection *c) {
    char body[1024];
    snprintf(body, sizeof body,
             "{\"default_generation_settings\":{\"n_ctx\":4096},\"total_slots\":%d,\"model_path\":\"%.400s\","
             "\"build_info\":\"b0-mock\",\"is_sleeping\":false}",
             total_slots, model_path);
    answer_json(c, "200 OK", body);
}

/* The text grows to the size asked for, plus 0-63 blanks: no two answers need have the same Content-Length. */
static void answer_completion(struct connection *c, long bytes) {
    static char *body;
    static long built_for;
    static size_t size;
    if (built_for != bytes) {
        static const char start[] = "{\"choices\":[{\"finish_reason\":\"stop\",\"index\":0,\"message\":{\"role\":"
                                    "\"assistant\",\"content\":\"";
        static const char end[] = "\"}}],\"created\":1763652000,\"model\":\"mock\",\"system_fingerprint\":\"b0-mock\","
                                  "\"object\":\"chat.completion\",\"usage\":{\"completion_tokens\":64,\"prompt_tokens\":32,"
                                  "\"total_tokens\":96},\"id\":\"chatcmpl-mock\",\"timings\":{\"prompt_n\":32,"
                                  "\"predicted_n\":64,\"predicted_per_second\":50.0}}";
        long text = bytes - (long)(sizeof start + sizeof end - 2);
        if (text < 1) text = 1;
        size = sizeof start + sizeof end - 2 + (size_t)text;
        body = realloc(body, size + 1);
        memcpy(body, start, sizeof start - 1);
        for (long i = 0; i < text; i++) body[(long)sizeof start - 1 + i] = "the quick brown fox "[i % 20];
        memcpy(body + sizeof start - 1 + text, end, sizeof end);
        built_for = bytes;
    }
    answer(c, "200 OK", "application/json; charset=utf-8", body, size, (size_t)(answers++ % 64));
}

static size_t write_event(char *to, const char *delta) {
    return (size_t)sprintf(to,
                           "data: {\"choices\":[{\"finish_reason\":null,\"index\":0,\"delta\":{%s}}],\"created\":1763652000,"
                           "\"id\":\"chatcmpl-oBYBlJaTLbZnWHUmqUE4AyuDCGpLsSPJ\",\"model\":\"mock\",\"system_fingerprint\":"
                           "\"b0-mock\",\"object\":\"chat.completion.chunk\",\"mock_ns\":\"%020lld\"}\n\n",
                           delta, (long long)now_ns());
}

static void append_chunk(struct connection *c, const char *data, size_t n) {
    char size[16];
    append(&c->out, size, (size_t)sprintf(size, "%zx\r\n", n));
    append(&c->out, data, n);
    append(&c->out, "\r\n", 2);
}

static void begin_stream(struct connection *c, long events, long interval_us) {
    static const char head[] = "HTTP/1.1 200 OK\r\nServer: llama.cpp\r\nAccess-Control-Allow-Origin: \r\nContent-Type: "
                               "text/event-stream\r\nX-Accel-Buffering: no\r\nTransfer-Encoding: chunked\r\n\r\n";
    char chunk[1024];
    append(&c->out, head, sizeof head - 1);
    size_t n = write_event(chunk, "\"role\":\"assistant\",\"content\":null");
    n += write_event(chunk + n, "\"content\":\"Once\"");
    append_chunk(c, chunk, n);
    c->answered++;
    c->streaming = 1;
    streams++;
    c->events_left = events;
    c->interval_ns = interval_us * 1000;
    /* a random phase, so that streams opened together do not speak together */
    c->due_ns = now_ns() + (int64_t)(next_random() % (uint64_t)c->interval_ns);
    heap_add(c);
}

static void finish_stream(struct connection *c) {
    static const char last[] = "data: {\"choices\":[],\"created\":1763652000,\"id\":\"chatcmpl-mock\",\"model\":\"mock\",\"object\":"
                               "\"chat.completion.chunk\",\"usage\":{\"completion_tokens\":64,\"prompt_tokens\":32,"
                               "\"total_tokens\":96},\"timings\":{\"prompt_n\":32,\"predicted_n\":64}}\n\n";
    append_chunk(c, last, sizeof last - 1);
    append_chunk(c, "data: [DONE]\n\n", 14);
    append(&c->out, "0\r\n\r\n", 5);
    end_stream(c);
}

static void send_due_events(void) {
    char event[1024];
    int64_t now = now_ns();
    while (heap_size && heap[1]->due_ns <= now) {
        struct connection *c = heap[1];
        append_chunk(c, event, write_event(event, "\"content\":\" upon\""));
        c->due_ns += c->interval_ns;
        if (c->due_ns < now) c->due_ns = now + c->interval_ns; /* fell behind: skip, never catch up in a burst */
        if (--c->events_left <= 0) finish_stream(c);
        else heap_down(1);
        flush(c);
    }
}

/* ---- requests ---- */

static char *find(const char *in, size_t n, const char *what) { return memmem(in, n, what, strlen(what)); }

static long number_after(const char *body, size_t n, const char *key, long otherwise) {
    const char *at = find(body, n, key);
    if (!at) return otherwise;
    at += strlen(key);
    while (at < body + n && (*at == ' ' || *at == ':')) at++;
    return at < body + n ? strtol(at, NULL, 10) : otherwise;
}

static void route(struct connection *c, const char *head, const char *body, size_t n) {
    int post = !strncmp(head, "POST ", 5);
    const char *path = strchr(head, ' ') + 1;
    size_t path_size = strcspn(path, " ?");
#define IS(p) (path_size == sizeof(p) - 1 && !memcmp(path, p, sizeof(p) - 1))
    if (post && IS("/v1/chat/completions")) {
        const char *stream = find(body, n, "\"stream\"");
        if (stream) stream += 8;
        while (stream && (*stream == ' ' || *stream == ':')) stream++;
        if (stream && *stream == 't') {
            long interval_us = number_after(body, n, "\"mock_interval_us\"", 20000);
            begin_stream(c, number_after(body, n, "\"max_tokens\"", 16), interval_us < 100 ? 100 : interval_us);
        } else
            answer_completion(c, number_after(body, n, "\"mock_answer_bytes\"", 1000));
    } else if (!post && (IS("/health") || IS("/v1/health"))) answer_json(c, "200 OK", "{\"status\":\"ok\"}");
    else if (!post && IS("/props")) answer_props(c);
    else if (!post && IS("/slots")) answer_slots(c);
    else if (!post && IS("/v1/models")) answer_json(c, "200 OK", "{\"object\":\"list\",\"data\":[{\"id\":\"mock\"}]}");
    else
        answer_json(c, "404 Not Found",
                    "{\"error\":{\"message\":\"File Not Found\",\"type\":\"not_found_error\",\"code\":404}}");
}

/* Value of a header, or NULL. The head is NUL-terminated. */
static const char *header(const char *head, const char *name) {
    for (const char *line = strstr(head, "\r\n"); line; line = strstr(line + 2, "\r\n"))
        if (!strncasecmp(line + 2, name, strlen(name)) && line[2 + strlen(name)] == ':') {
            const char *value = line + 3 + strlen(name);
            return value + strspn(value, " ");
        }
    return NULL;
}

/* Decode a chunked body in place from `at`; returns the offset behind it, 0 if incomplete, -1 if malformed. */
static ssize_t dechunk(char *at, size_t n, size_t *body_size) {
    size_t read = 0, written = 0;
    for (;;) {
        char *line = memmem(at + read, n - read, "\r\n", 2);
        if (!line) return 0;
        char *end;
        size_t size = strtoul(at + read, &end, 16);
        if (end == at + read || size > MAX_REQUEST_BYTES) return -1;
        read = (size_t)(line - at) + 2;
        if (n < read + size + 2) return 0;
        memmove(at + written, at + read, size);
        written += size;
        read += size + 2;
        if (size == 0) {
            *body_size = written;
            return (ssize_t)read;
        }
    }
}

/* Handle one complete request at the front of the input. 1: handled, 0: more bytes needed, -1: connection gone. */
static int handle_one(struct connection *c) {
    char *end = c->in.used ? find(c->in.data, c->in.used, "\r\n\r\n") : NULL;
    if (!end) return 0;
    size_t head_size = (size_t)(end - c->in.data) + 4;
    end[2] = 0; /* the last header keeps its line end */
    const char *length = header(c->in.data, "content-length");
    const char *coding = header(c->in.data, "transfer-encoding");
    const char *connection = header(c->in.data, "connection");
    const char *expect = header(c->in.data, "expect");
    size_t body_size = length ? strtoul(length, NULL, 10) : 0, total = head_size + body_size;
    int complete = c->in.used >= total;
    if (coding && !strncasecmp(coding, "chunked", 7)) {
        struct buffer copy = {0}; /* decoding is destructive, and the body may not be complete yet */
        append(&copy, c->in.data + head_size, c->in.used - head_size);
        append(&copy, "", 1);
        ssize_t used = dechunk(copy.data, copy.used - 1, &body_size);
        complete = used > 0;
        if (complete) {
            memcpy(c->in.data + head_size, copy.data, body_size);
            total = head_size + (size_t)used;
        }
        free(copy.data);
        if (used < 0) return drop(c), -1;
    }
    if (!complete) {
        if (expect && !strncasecmp(expect, "100-continue", 12) && c->in.used == head_size) {
            append(&c->out, "HTTP/1.1 100 Continue\r\n\r\n", 25);
            if (!flush(c)) return -1;
        }
        end[2] = '\r';
        return 0;
    }
    if (connection && !strncasecmp(connection, "close", 5)) c->closing = 1;
    route(c, c->in.data, c->in.data + head_size, body_size);
    memmove(c->in.data, c->in.data + total, c->in.used - total);
    c->in.used -= total;
    return flush(c) ? 1 : -1;
}

static void readable(struct connection *c) {
    reserve(&c->in, READ_BYTES + 1);
    ssize_t n = recv(c->fd, c->in.data + c->in.used, c->in.size - c->in.used - 1, 0);
    if (n < 0 && errno == EAGAIN) return;
    if (n <= 0 || c->in.used + (size_t)n > MAX_REQUEST_BYTES) {
        drop(c);
        return;
    }
    c->in.used += (size_t)n;
    c->in.data[c->in.used] = 0;
    while (!c->streaming && handle_one(c) > 0) continue;
}

static void accept_all(int listener) {
    for (;;) {
        int fd = accept4(listener, NULL, NULL, SOCK_NONBLOCK | SOCK_CLOEXEC), on = 1;
        if (fd < 0) return;
        if (fd >= MAX_FDS) {
            close(fd);
            continue;
        }
        setsockopt(fd, IPPROTO_TCP, TCP_NODELAY, &on, sizeof on);
        struct connection *c = calloc(1, sizeof *c);
        c->fd = fd;
        connections[fd] = c;
        struct epoll_event e = {EPOLLIN, {.fd = fd}};
        epoll_ctl(epoll_fd, EPOLL_CTL_ADD, fd, &e);
    }
}

static int listen_on(const char *host, int port) {
    struct sockaddr_in address = {.sin_family = AF_INET, .sin_port = htons((uint16_t)port)};
    int fd = socket(AF_INET, SOCK_STREAM | SOCK_NONBLOCK | SOCK_CLOEXEC, 0), on = 1;
    setsockopt(fd, SOL_SOCKET, SO_REUSEADDR, &on, sizeof on);
    if (inet_pton(AF_INET, host, &address.sin_addr) != 1 || bind(fd, (struct sockaddr *)&address, sizeof address) ||
        listen(fd, 4096)) {
        fprintf(stderr, "mock_upstream: cannot listen on %s:%d: %s\n", host, port, strerror(errno));
        exit(1);
    }
    return fd;
}

static void stop(int signal) {
    (void)signal;
    _exit(0);
}

static _Noreturn void serve(int listener) {
    struct epoll_event e = {EPOLLIN, {.fd = listener}}, ready[MAX_EVENTS];
    uint64_t expirations;
    epoll_fd = epoll_create1(EPOLL_CLOEXEC);
    timer_fd = timerfd_create(CLOCK_MONOTONIC, TFD_NONBLOCK | TFD_CLOEXEC);
    epoll_ctl(epoll_fd, EPOLL_CTL_ADD, listener, &e);
    e.data.fd = timer_fd;
    epoll_ctl(epoll_fd, EPOLL_CTL_ADD, timer_fd, &e);
    for (;;) {
        arm_timer();
        int n = epoll_wait(epoll_fd, ready, MAX_EVENTS, -1);
        for (int i = 0; i < n; i++) {
            int fd = ready[i].data.fd;
            if (fd == listener) accept_all(listener);
            else if (fd == timer_fd) {
                if (read(timer_fd, &expirations, sizeof expirations) > 0) send_due_events();
            } else {
                struct connection *c = connections[fd];
                if (c && ready[i].events & EPOLLOUT) {
                    watch(c, EPOLLIN);
                    if (!flush(c)) continue;
                }
                if (c && ready[i].events & (EPOLLIN | EPOLLHUP | EPOLLERR)) readable(c);
            }
        }
    }
}

int main(int argc, char **argv) {
    const char *host = "127.0.0.1";
    int port = 8080;
    for (int i = 1; i < argc; i++) {
        const char *value = i + 1 < argc ? argv[i + 1] : "";
        if (!strcmp(argv[i], "--version") || !strcmp(argv[i], "--help")) {
            printf("version: 0 (mock)\n");
            return 0;
        }
        if (!strcmp(argv[i], "--host")) host = value;
        else if (!strcmp(argv[i], "--port")) port = atoi(value);
        else if (!strcmp(argv[i], "-m") || !strcmp(argv[i], "--model")) model_path = value;
        else if (!strcmp(argv[i], "-np") || !strcmp(argv[i], "--parallel")) total_slots = atoi(value);
        else if (!strcmp(argv[i], "--mock-keepalive-max")) keepalive_max = atol(value);
    }
    signal(SIGTERM, stop);
    signal(SIGINT, stop);
    signal(SIGPIPE, SIG_IGN);
    int listener = listen_on(host, port);
    fprintf(stderr, "srv  main: mock server is listening on http://%s:%d\n", host, port);
    serve(listener);
}
