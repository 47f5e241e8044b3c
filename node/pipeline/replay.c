/* The event simulation of node/pipeline/replay.py, line by line, for the planner's inner loop: some twenty times as fast.
   Compiled by node/pipeline/replay_native.py where there is a compiler; tests/node/pipeline compares the two.

   A microbatch is waiting in at most one place and has at most one event under way, and a node has at most one event of its own;
   so a queue is a linked list of microbatches, and the heap of events never outgrows microbatches + nodes. */

#include <math.h>
#include <stdint.h>
#include <stdlib.h>
#include <string.h>

#include "replay_events.h"
#include "replay_lines.h"

#define SAME_TIME_S 1e-12

enum { FORWARD, LOSS, BACKWARD };
enum { FIFO, PRIORITY, BACKWARD_FIRST };

/* Everything that one call needs, in one allocation. */
typedef struct {
    double *free_at;                       /* [nodes] */
    double *arrived, *left;                /* [microbatches], [microbatches, tasks] */
    int32_t *slots, *forward, *others;     /* [nodes]; the latter two are heads of queues */
    int32_t *next, *waiting;               /* [microbatches]: the next in the queue, and which task waits */
    int32_t *touched;                      /* [nodes] */
    uint8_t *wakes, *is_touched;           /* [nodes] */
    Heap heap;
    Lines lines;
} State;

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
    size_t bytes = 3 * (size_t)n * sizeof(double) + (size_t)m * (1 + tasks) * sizeof(double) +
                   (6 * (size_t)n + 2 * m) * sizeof(int32_t) + 2 * (size_t)n + ((size_t)m + n) * sizeof(Event) +
                   (size_t)m * sizeof(Transfer) + 20 * 16;
    char *block = calloc(1, bytes), *memory = block;
    State s;
    if (!block) return NAN;
    s.free_at = carve(&memory, n * sizeof(double)), s.arrived = carve(&memory, m * sizeof(double));
    s.left = carve(&memory, (size_t)m * tasks * sizeof(double)), s.slots = carve(&memory, n * sizeof(int32_t));
    s.forward = carve(&memory, n * sizeof(int32_t)), s.others = carve(&memory, n * sizeof(int32_t));
    s.touched = carve(&memory, n * sizeof(int32_t)), s.next = carve(&memory, m * sizeof(int32_t));
    s.waiting = carve(&memory, m * sizeof(int32_t)), s.wakes = carve(&memory, n), s.is_touched = carve(&memory, n);
    s.heap.events = carve(&memory, ((size_t)m + n) * sizeof(Event)), s.heap.size = 0;
    s.lines.up = carve(&memory, n * sizeof(double)), s.lines.down = carve(&memory, n * sizeof(double));
    s.lines.num_up = carve(&memory, n * sizeof(int32_t)), s.lines.num_down = carve(&memory, n * sizeof(int32_t));
    s.lines.transfers = carve(&memory, m * sizeof(Transfer)), s.lines.size = 0, s.lines.now = 0.0;
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
    for (;;) {
        double now, limit;
        int32_t num_touched = 0;
        if (c->uplink_s) carry(c, &s.lines, &s.heap, paths);
        if (!s.heap.size) break;
        now = s.heap.events[0].time, limit = now + SAME_TIME_S;
        while (s.heap.size && s.heap.events[0].time <= limit && s.heap.events[0].index >= 0) { /* everything that happens now, before any node chooses */
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
                if (c->uplink_s && to != node)
                    push(&s.heap, end, chosen, ~(index + 1));
                else
                    push(&s.heap, end + travel_of(c, path, index), chosen, index + 1);
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
