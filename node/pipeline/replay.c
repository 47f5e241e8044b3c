/* The event simulation of node/pipeline/replay.py, line by line, for the planner's inner loop: some twenty times as fast.
   Compiled by node/pipeline/replay_native.py where there is a compiler; tests/node/pipeline compares the two.

   A microbatch is waiting in at most one place and has at most one event under way, and a node has at most one event of its own;
   so a queue is a linked list of microbatches, and the heap of events never outgrows microbatches + nodes. */

#include <math.h>
#include <stdint.h>
#include <stdlib.h>
#include <string.h>

#define SAME_TIME_S 1e-12
#define NOBODY (-1)

enum { FORWARD, LOSS, BACKWARD };
enum { FIFO, PRIORITY, BACKWARD_FIRST };

typedef struct {
    int32_t num_nodes, path_length;
    double backward_multiplier, loss_multiplier, gap_s, gap_first_s;
    const double *forward_s, *link_s; /* [nodes], [nodes, nodes] */
    const int32_t *slots;             /* [nodes] */
    const double *uplink_s, *downlink_s; /* [nodes], or NULL where lines are not shared */
} Case;

typedef struct {
    double time;
    int32_t microbatch, index; /* a negative microbatch: node −1 − microbatch becomes free */
} Event;

typedef struct {
    Event *events;
    int32_t size;
} Heap;

static int before(const Event *a, const Event *b) {
    if (a->time != b->time) return a->time < b->time;
    if (a->microbatch != b->microbatch) return a->microbatch < b->microbatch;
    return a->index < b->index;
}

static void push(Heap *heap, double time, int32_t microbatch, int32_t index) {
    Event event = {time, microbatch, index};
    int32_t place = heap->size++;
    while (place > 0 && before(&event, &heap->events[(place - 1) / 2])) {
        heap->events[place] = heap->events[(place - 1) / 2];
        place = (place - 1) / 2;
    }
    heap->events[place] = event;
}

static Event pop(Heap *heap) {
    Event first = heap->events[0], last = heap->events[--heap->size];
    int32_t place = 0;
    for (;;) {
        int32_t child = 2 * place + 1;
        if (child >= heap->size) break;
        if (child + 1 < heap->size && before(&heap->events[child + 1], &heap->events[child])) child++;
        if (!before(&heap->events[child], &last)) break;
        heap->events[place] = heap->events[child];
        place = child;
    }
    heap->events[place] = last;
    return first;
}

/* Everything that one call needs, in one allocation. */
typedef struct {
    double *free_at, *up_free, *down_free; /* [nodes] */
    double *arrived, *left;                /* [microbatches], [microbatches, tasks] */
    int32_t *slots, *forward, *others;     /* [nodes]; the latter two are heads of queues */
    int32_t *next, *waiting;               /* [microbatches]: the next in the queue, and which task waits */
    int32_t *touched;                      /* [nodes] */
    uint8_t *wakes, *is_touched;           /* [nodes] */
    Heap heap;
} State;

static int32_t node_of(const Case *c, const int32_t *path, int32_t index) {
    int32_t k = c->path_length;
    return index < k ? path[index] : index == k ? path[0] : path[2 * k - index];
}

static int32_t kind_of(const Case *c, int32_t index) {
    return index < c->path_length ? FORWARD : index == c->path_length ? LOSS : BACKWARD;
}

static double duration_of(const Case *c, const int32_t *path, int32_t index) {
    double forward_s = c->forward_s[node_of(c, path, index)];
    int32_t kind = kind_of(c, index);
    return kind == FORWARD ? forward_s : forward_s * (kind == LOSS ? c->loss_multiplier : c->backward_multiplier);
}

static double travel_of(const Case *c, const int32_t *path, int32_t index) {
    int32_t from, to;
    if (index == 2 * c->path_length) return 0.0;
    from = node_of(c, path, index), to = node_of(c, path, index + 1);
    return from == to ? 0.0 : c->link_s[(int64_t)from * c->num_nodes + to];
}

static int precedes(int by_arrival, double arrived_a, double priority_a, int32_t a, double arrived_b, double priority_b,
                    int32_t b) {
    double first_a = by_arrival ? arrived_a : priority_a, first_b = by_arrival ? arrived_b : priority_b;
    double then_a = by_arrival ? priority_a : arrived_a, then_b = by_arrival ? priority_b : arrived_b;
    if (first_a != first_b) return first_a < first_b;
    if (then_a != then_b) return then_a < then_b;
    return a < b;
}

/* The place in the queue that starts at *head of the one to be served first: where its predecessor points to it. */
static int32_t *most_urgent(const State *s, int32_t *head, const double *priorities, int by_arrival) {
    int32_t *best = head, *place;
    if (*head == NOBODY) return head;
    for (place = &s->next[*head]; *place != NOBODY; place = &s->next[*place])
        if (precedes(by_arrival, s->arrived[*place], priorities[*place], *place, s->arrived[*best], priorities[*best], *best))
            best = place;
    return best;
}

static void *carve(char **memory, size_t bytes) {
    void *start = *memory;
    *memory += (bytes + 15) & ~(size_t)15;
    return start;
}

/* Seconds of the iteration; infinite if it never ends, or would end after cutoff_s; NaN without memory.
   paths [microbatches, path_length]; ends takes the end of every microbatch. */
double llm_node_replay(const Case *c, int32_t num_microbatches, const int32_t *paths, const double *priorities, int32_t dispatch,
                       double cutoff_s, double *ends) {
    int32_t n = c->num_nodes, k = c->path_length, m = num_microbatches, tasks = 2 * k + 1, num_left = m, i, t;
    int by_arrival = dispatch == FIFO;
    double latest = 0.0, result = INFINITY;
    size_t bytes = 3 * n * sizeof(double) + (size_t)m * (1 + tasks) * sizeof(double) + (4 * (size_t)n + 2 * m) * sizeof(int32_t) +
                   2 * (size_t)n + ((size_t)m + n) * sizeof(Event) + 16 * 16;
    char *block = calloc(1, bytes), *memory = block;
    State s;
    if (!block) return NAN;
    s.free_at = carve(&memory, n * sizeof(double)), s.up_free = carve(&memory, n * sizeof(double));
    s.down_free = carve(&memory, n * sizeof(double)), s.arrived = carve(&memory, m * sizeof(double));
    s.left = carve(&memory, (size_t)m * tasks * sizeof(double)), s.slots = carve(&memory, n * sizeof(int32_t));
    s.forward = carve(&memory, n * sizeof(int32_t)), s.others = carve(&memory, n * sizeof(int32_t));
    s.touched = carve(&memory, n * sizeof(int32_t)), s.next = carve(&memory, m * sizeof(int32_t));
    s.waiting = carve(&memory, m * sizeof(int32_t)), s.wakes = carve(&memory, n), s.is_touched = carve(&memory, n);
    s.heap.events = carve(&memory, ((size_t)m + n) * sizeof(Event)), s.heap.size = 0;
    memcpy(s.slots, c->slots, n * sizeof(int32_t));
    for (i = 0; i < n; i++) s.forward[i] = s.others[i] = NOBODY;
    for (i = 0; i < m; i++) {
        double left = 0.0;
        for (t = tasks - 1; t >= 0; t--) {
            left += travel_of(c, paths + (size_t)i * k, t);
            left += duration_of(c, paths + (size_t)i * k, t);
            s.left[(size_t)i * tasks + t] = left;
        }
        push(&s.heap, 0.0, i, 0);
    }
    while (s.heap.size) {
        double now = s.heap.events[0].time, limit = now + SAME_TIME_S;
        int32_t num_touched = 0;
        while (s.heap.size && s.heap.events[0].time <= limit) { /* everything that happens now, before any node chooses */
            Event event = pop(&s.heap);
            int32_t node;
            if (event.microbatch < 0) {
                node = -1 - event.microbatch;
                s.wakes[node] = 0;
            } else {
                int32_t *head;
                node = node_of(c, paths + (size_t)event.microbatch * k, event.index);
                if (now + s.left[(size_t)event.microbatch * tasks + event.index] > cutoff_s) goto done;
                head = kind_of(c, event.index) == FORWARD ? &s.forward[node] : &s.others[node];
                s.arrived[event.microbatch] = now, s.waiting[event.microbatch] = event.index;
                s.next[event.microbatch] = *head, *head = event.microbatch;
            }
            if (!s.is_touched[node]) { /* kept in descending order: the last is served first */
                int32_t place = num_touched++;
                for (s.is_touched[node] = 1; place > 0 && s.touched[place - 1] < node; place--) s.touched[place] = s.touched[place - 1];
                s.touched[place] = node;
            }
        }
        while (num_touched) {
            int32_t node = s.touched[--num_touched], chosen, index, kind;
            int32_t *other, *place;
            const int32_t *path;
            double end;
            s.is_touched[node] = 0;
            if (s.free_at[node] > limit) {
                if (!s.wakes[node]) s.wakes[node] = 1, push(&s.heap, s.free_at[node], -1 - node, 0);
                continue;
            }
            place = other = most_urgent(&s, &s.others[node], priorities, by_arrival);
            if (s.forward[node] != NOBODY && s.slots[node] > 0 && (*other == NOBODY || dispatch != BACKWARD_FIRST)) {
                int32_t *entering = most_urgent(&s, &s.forward[node], priorities, by_arrival);
                if (*other == NOBODY || precedes(by_arrival, s.arrived[*entering], priorities[*entering], *entering,
                                                 s.arrived[*other], priorities[*other], *other))
                    place = entering;
            }
            if (*place == NOBODY) continue;
            chosen = *place, *place = s.next[chosen], index = s.waiting[chosen], path = paths + (size_t)chosen * k;
            kind = kind_of(c, index);
            if (now + s.left[(size_t)chosen * tasks + index] > cutoff_s) goto done;
            s.slots[node] += kind - 1; /* FORWARD takes one, LOSS leaves them, BACKWARD gives one back */
            end = now + duration_of(c, path, index);
            s.free_at[node] = end + (index == 0 ? c->gap_first_s : c->gap_s);
            if (index + 1 == tasks) {
                num_left--, ends[chosen] = end;
                if (end > latest) latest = end;
            } else {
                int32_t to = node_of(c, path, index + 1);
                double there = end + travel_of(c, path, index);
                if (c->uplink_s && to != node) {
                    double start = end > s.up_free[node] ? end : s.up_free[node];
                    double earliest = s.down_free[to] + c->downlink_s[to];
                    s.up_free[node] = start + c->uplink_s[node];
                    there = start + travel_of(c, path, index);
                    if (earliest > there) there = earliest;
                    s.down_free[to] = there;
                }
                push(&s.heap, there, chosen, index + 1);
            }
            if ((s.forward[node] != NOBODY || s.others[node] != NOBODY) && !s.wakes[node])
                s.wakes[node] = 1, push(&s.heap, s.free_at[node], -1 - node, 0);
        }
    }
    if (!num_left) result = latest;
done:
    free(block);
    return result;
}
