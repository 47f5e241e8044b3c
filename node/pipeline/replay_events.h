/* The problem, and the heap of what happens next; see replay.c. */

#pragma once

#include <stdint.h>

#define NOBODY (-1)

typedef struct {
    int32_t num_nodes, path_length;
    double backward_multiplier, loss_multiplier, gap_s, gap_first_s;
    const double *forward_s, *link_s; /* [nodes], [nodes, nodes] */
    const int32_t *slots;             /* [nodes] */
    const double *uplink_s, *downlink_s; /* [nodes], or NULL where lines are not shared */
} Case;

typedef struct {
    double time;
    int32_t microbatch, index; /* a negative microbatch: node −1 − microbatch becomes free; ~index: a transfer begins */
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

static int32_t node_of(const Case *c, const int32_t *path, int32_t index) {
    int32_t k = c->path_length;
    return index < k ? path[index] : index == k ? path[0] : path[2 * k - index];
}
