/* A libnvidia-ml.so.1 whose GPUs, processes and faults come from a text file.
 *
 * The file named by FAKE_NVML_SCRIPT is read again with every call, so a test changes the machine by replacing it.
 * build.py describes the lines. Only what mesh/host/nvml.py calls is here; the structs are NVML's own.
 * Not thread safe: one reader at a time, as in mesh.
 */
#define _GNU_SOURCE
#include <ctype.h>
#include <dirent.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <time.h>
#include <unistd.h>

enum { OK = 0, UNINITIALIZED = 1, BAD_ARGUMENT = 2, NOT_SUPPORTED = 3, NOT_FOUND = 6, INSUFFICIENT_SIZE = 7,
       NOT_LOADED = 9, VERSION_MISMATCH = 25 };
enum { MAX_DEVICES = 64, MAX_PROCESSES = 512, MAX_RULES = 64, TEXT = 128 };
#define MIB (1024ULL * 1024)
#define NOT_AVAILABLE 0xFFFFFFFFFFFFFFFFULL
#define EXPORT __attribute__((visibility("default")))

typedef struct { unsigned long long total, free, used; } memory_v1;
typedef struct { unsigned version; unsigned long long total, reserved, free, used; } memory_v2;
typedef struct { unsigned pid; unsigned long long used; unsigned gpu_instance, compute_instance; } process_info;
typedef struct { unsigned version, value; } addressing_mode;

/* A GPU, or a MIG instance (parent >= 0). Handles are pointers into the table of the last parse, as numbers: index + 1. */
typedef struct {
    int parent, slot, instance;
    char uuid[TEXT], flags[TEXT], name[TEXT];
    unsigned long long total, reserved, used;
} device;
typedef struct { int device; unsigned pid; long mib; char list[16]; int scripted; } process;
typedef struct { char function[TEXT]; char uuid[TEXT]; int code; } rule;
typedef struct { int device; unsigned pid; long mib; double dead_at; } ghost;

static device devices[MAX_DEVICES];
static process processes[MAX_PROCESSES];
static rule rules[MAX_RULES];
static ghost ghosts[MAX_PROCESSES];
static int n_devices, n_processes, n_rules, n_ghosts, init_code, initialized, short_serial, short_done;
static double linger_s;
static int consumers;

static double now_s(void) {
    struct timespec t;
    clock_gettime(CLOCK_MONOTONIC, &t);
    return (double)t.tv_sec + (double)t.tv_nsec / 1e9;
}

static int find_device(const char *name) {
    for (int i = 0; i < n_devices; i++)
        if (!strcmp(devices[i].uuid, name)) return i;
    if (isdigit((unsigned char)name[0])) { /* an index: of the GPUs, not of the MIG instances */
        int wanted = atoi(name);
        for (int i = 0; i < n_devices; i++)
            if (devices[i].parent < 0 && wanted-- == 0) return i;
    }
    return -1;
}

static void add_process(int where, unsigned pid, long mib, const char *list, int scripted) {
    if (where < 0 || n_processes == MAX_PROCESSES) return;
    process *p = &processes[n_processes++];
    p->device = where; p->pid = pid; p->mib = mib; p->scripted = scripted;
    snprintf(p->list, sizeof p->list, "%s", list);
}

static void parse_line(const char *line) {
    char a[TEXT], b[TEXT], c[TEXT], list[16] = "compute";
    device d = {.parent = -1};
    int offset = 0, slot, number;
    unsigned pid;
    if (sscanf(line, "gpu %127s %llu %llu %llu %127s %n", d.uuid, &d.total, &d.reserved, &d.used, d.flags, &offset) == 5 ||
        sscanf(line, "mig %127s %d %d %127s %llu %llu %127s %n", a, &slot, &d.instance, d.uuid, &d.total, &d.used, d.flags,
               &offset) == 7) {
        if (line[0] == 'm') { d.parent = find_device(a); d.slot = slot; }
        snprintf(d.name, sizeof d.name, "%s", line + offset);
        d.name[strcspn(d.name, "\n")] = 0;
        if (n_devices < MAX_DEVICES) devices[n_devices++] = d;
    } else if (sscanf(line, "process %127s %u %127s %15s", a, &pid, b, list) >= 3) {
        add_process(find_device(a), pid, strcmp(b, "na") ? atol(b) : -1, list, 1);
    } else if (sscanf(line, "error %127s %127s %127s", a, b, c) == 3 && n_rules < MAX_RULES) {
        rule *r = &rules[n_rules++];
        strcpy(r->function, a); strcpy(r->uuid, b);
        r->code = strcmp(c, "hang") ? atoi(c) : -1;
    } else if (sscanf(line, "init %d", &number) == 1) {
        init_code = number;
    } else if (sscanf(line, "shortfall %d", &number) == 1) {
        if (number != short_serial) { short_serial = number; short_done = 0; }
    } else if (sscanf(line, "consumers %d", &number) == 1) {
        consumers = 1; linger_s = number / 1000.0;
    }
}

/* -- processes that say in their environment how much GPU memory they have */

static size_t read_proc(unsigned pid, const char *file, char *to, size_t size) {
    char path[64];
    snprintf(path, sizeof path, "/proc/%u/%s", pid, file);
    FILE *f = fopen(path, "rb");
    if (!f) return 0;
    size_t n = fread(to, 1, size - 1, f);
    fclose(f);
    to[n] = 0;
    return n;
}

static const char *in_block(const char *block, size_t size, const char *key) { /* NUL separated strings */
    size_t length = strlen(key);
    for (const char *p = block; p < block + size; p += strlen(p) + 1)
        if (!strncmp(p, key, length)) return p + length;
    return NULL;
}

static int leads_session(unsigned pid) { /* a node starts each child in a session of its own */
    return getsid((pid_t)pid) == (pid_t)pid;
}

static void add_consumer(unsigned pid) {
    static char env[65536], argv[65536];
    size_t size = read_proc(pid, "environ", env, sizeof env);
    const char *mib = size ? in_block(env, size, "FAKE_GPU_MIB=") : NULL;
    if (!mib || !leads_session(pid)) return;
    const char *visible = in_block(env, size, "CUDA_VISIBLE_DEVICES=");
    size = read_proc(pid, "cmdline", argv, sizeof argv);
    const char *split = in_block(argv, size, "--tensor-split");
    split = split && !*split && split + 1 < argv + size ? split + 1 : NULL;
    char names[1024];
    snprintf(names, sizeof names, "%s", visible ? visible : "0");
    int where[MAX_DEVICES], n = 0;
    double share[MAX_DEVICES], sum = 0;
    for (char *rest = names, *name; n < MAX_DEVICES && (name = strsep(&rest, ",")) && *name; n++) {
        where[n] = find_device(name);
        share[n] = split ? strtod(split, (char **)&split) : 1;
        if (split && *split == ',') split++;
        sum += share[n];
    }
    for (int i = 0; i < n && sum > 0; i++) add_process(where[i], pid, (long)(atol(mib) * share[i] / sum), "compute", 0);
}

/* Memory that the driver gives back only a while after the process is gone. */
static void haunt(void) {
    double now = now_s();
    int kept = 0;
    for (int g = 0; g < n_ghosts; g++) {
        int alive = 0;
        for (int i = 0; i < n_processes; i++) alive |= processes[i].pid == ghosts[g].pid && !processes[i].scripted;
        if (alive) continue;
        if (ghosts[g].dead_at == 0) ghosts[g].dead_at = now;
        if (now - ghosts[g].dead_at < linger_s) {
            if (ghosts[g].device < n_devices) devices[ghosts[g].device].used += (unsigned long long)ghosts[g].mib;
            ghosts[kept++] = ghosts[g];
        }
    }
    n_ghosts = kept;
    for (int i = 0; i < n_processes && n_ghosts < MAX_PROCESSES; i++)
        if (!processes[i].scripted)
            ghosts[n_ghosts++] = (ghost){processes[i].device, processes[i].pid, processes[i].mib, 0};
}

static void find_consumers(void) {
    DIR *proc = opendir("/proc");
    if (!proc) return;
    for (struct dirent *entry; (entry = readdir(proc));)
        if (isdigit((unsigned char)entry->d_name[0])) add_consumer((unsigned)atoi(entry->d_name));
    closedir(proc);
    haunt();
}

static void parse(int with_consumers) {
    char line[1024];
    const char *path = getenv("FAKE_NVML_SCRIPT");
    n_devices = n_processes = n_rules = init_code = consumers = 0;
    FILE *f = path ? fopen(path, "r") : NULL;
    if (!f) { init_code = NOT_LOADED; return; }
    while (fgets(line, sizeof line, f)) parse_line(line);
    fclose(f);
    if (consumers && with_consumers) find_consumers();
}

/* -- the calls */

static int enter(const char *function, void *handle, device **found, int with_consumers) {
    for (;;) {
        parse(with_consumers);
        int code = initialized ? OK : UNINITIALIZED;
        size_t index = (size_t)handle;
        if (found) {
            if (index < 1 || index > (size_t)n_devices) return NOT_FOUND;
            *found = &devices[index - 1];
        }
        for (int i = 0; i < n_rules && code == OK; i++) {
            const char *uuid = found ? (*found)->uuid : "*";
            if ((!strcmp(rules[i].function, function) || !strcmp(rules[i].function, "*")) &&
                (!strcmp(rules[i].uuid, "*") || !strcmp(rules[i].uuid, uuid)))
                code = rules[i].code;
        }
        if (code >= 0) return code;
        usleep(5000); /* hang */
    }
}
#define ENTER(handle) device *d; { int code = enter(__func__, handle, &d, 0); if (code) return code; } (void)d
#define ENTER_COUNTING(handle) device *d; { int code = enter(__func__, handle, &d, 1); if (code) return code; }

EXPORT int nvmlInitWithFlags(unsigned flags) {
    (void)flags;
    parse(0);
    if (init_code == OK) initialized = 1;
    return init_code;
}

EXPORT int nvmlShutdown(void) {
    int code = initialized ? OK : UNINITIALIZED;
    initialized = 0;
    return code;
}

EXPORT const char *nvmlErrorString(int code) {
    switch (code) {
    case UNINITIALIZED: return "Uninitialized";
    case NOT_SUPPORTED: return "Not Supported";
    case NOT_FOUND: return "Not Found";
    case NOT_LOADED: return "Driver Not Loaded";
    case 15: return "GPU is lost";
    case 18: return "Driver/library version mismatch";
    default: return "Unknown Error";
    }
}

EXPORT int nvmlDeviceGetCount_v2(unsigned *count) {
    int code = enter(__func__, NULL, NULL, 0);
    *count = 0;
    for (int i = 0; i < n_devices; i++) *count += devices[i].parent < 0;
    return code;
}

EXPORT int nvmlDeviceGetHandleByIndex_v2(unsigned index, void **handle) {
    char name[16];
    snprintf(name, sizeof name, "%u", index);
    parse(0);
    int where = find_device(name);
    if (where < 0) return BAD_ARGUMENT;
    *handle = (void *)(size_t)(where + 1);
    ENTER(*handle);
    return OK;
}

EXPORT int nvmlDeviceGetName(void *handle, char *to, unsigned size) {
    ENTER(handle);
    snprintf(to, size, "%s", d->name);
    return OK;
}

EXPORT int nvmlDeviceGetUUID(void *handle, char *to, unsigned size) {
    ENTER(handle);
    snprintf(to, size, "%s", d->uuid);
    return OK;
}

static int is_listed_before(int i) { /* one that computes and draws is in two lists with the same memory */
    for (int j = 0; j < i; j++)
        if (processes[j].device == processes[i].device && processes[j].pid == processes[i].pid) return 1;
    return 0;
}

static unsigned long long used_bytes(const device *d) {
    unsigned long long used = d->used;
    for (int i = 0; i < n_processes; i++)
        if (processes[i].device == d - devices && processes[i].mib > 0 && !is_listed_before(i))
            used += (unsigned long long)processes[i].mib;
    return (used + d->reserved > d->total ? d->total - d->reserved : used) * MIB;
}

EXPORT int nvmlDeviceGetMemoryInfo(void *handle, memory_v1 *info) {
    ENTER_COUNTING(handle);
    if (strstr(d->flags, "unified")) return NOT_SUPPORTED;
    info->total = d->total * MIB;
    info->used = used_bytes(d) + d->reserved * MIB; /* v1 counts what the driver reserves as used */
    info->free = info->total - info->used;
    return OK;
}

EXPORT int nvmlDeviceGetMemoryInfo_v2(void *handle, memory_v2 *info) {
    ENTER_COUNTING(handle);
    if (info->version != (sizeof(memory_v2) | 2u << 24)) return VERSION_MISMATCH;
    if (strstr(d->flags, "unified")) return NOT_SUPPORTED;
    info->total = d->total * MIB;
    info->reserved = d->reserved * MIB;
    info->used = used_bytes(d);
    info->free = info->total - info->used - info->reserved;
    return OK;
}

EXPORT int nvmlDeviceGetMigMode(void *handle, unsigned *current, unsigned *pending) {
    ENTER(handle);
    *current = *pending = strstr(d->flags, "mig") != NULL;
    return strstr(d->flags, "consumer") ? NOT_SUPPORTED : OK;
}

EXPORT int nvmlDeviceGetMaxMigDeviceCount(void *handle, unsigned *count) {
    ENTER(handle);
    *count = 7;
    return OK;
}

EXPORT int nvmlDeviceGetMigDeviceHandleByIndex(void *handle, unsigned slot, void **found) {
    ENTER(handle);
    for (int i = 0; i < n_devices; i++)
        if (devices[i].parent == d - devices && devices[i].slot == (int)slot) {
            *found = (void *)(size_t)(i + 1);
            return OK;
        }
    return NOT_FOUND;
}

EXPORT int nvmlDeviceGetGpuInstanceId(void *handle, unsigned *id) {
    ENTER(handle);
    *id = (unsigned)d->instance;
    return d->parent < 0 ? NOT_SUPPORTED : OK;
}

EXPORT int nvmlDeviceGetAddressingMode(void *handle, addressing_mode *mode) {
    ENTER(handle);
    mode->value = strstr(d->flags, "ats") ? 2 : 0;
    return OK;
}

static int list_processes(const char *function, void *handle, const char *list, unsigned *count, process_info *to) {
    device *d;
    int code = enter(function, handle, &d, 1);
    if (code) return code;
    unsigned n = 0;
    for (int i = 0; i < n_processes; i++) {
        const process *p = &processes[i];
        if (p->device != d - devices || strcmp(p->list, list)) continue;
        if (to && n < *count)
            to[n] = (process_info){p->pid, p->mib < 0 ? NOT_AVAILABLE : (unsigned long long)p->mib * MIB,
                                   d->parent < 0 ? 0xFFFFFFFFu : (unsigned)d->instance, 0xFFFFFFFFu};
        n++;
    }
    int grew = to && short_serial && !short_done;
    short_done |= grew;
    code = n > *count || (!to && n) || grew ? INSUFFICIENT_SIZE : OK;
    *count = n;
    return code;
}

#define LIST(name, list)                                                                     \
    EXPORT int name(void *handle, unsigned *count, process_info *to) {                        \
        return list_processes(__func__, handle, list, count, to);                             \
    }
LIST(nvmlDeviceGetComputeRunningProcesses_v2, "compute")
LIST(nvmlDeviceGetComputeRunningProcesses_v3, "compute")
LIST(nvmlDeviceGetGraphicsRunningProcesses_v2, "graphics")
LIST(nvmlDeviceGetGraphicsRunningProcesses_v3, "graphics")
LIST(nvmlDeviceGetMPSComputeRunningProcesses_v2, "mps")
LIST(nvmlDeviceGetMPSComputeRunningProcesses_v3, "mps")
