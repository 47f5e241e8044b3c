/* Transfers that share their lines: node/pipeline/lines.py, the same operations in the same order. */

#pragma once

#include <math.h>
#include <stdint.h>

#include "replay_events.h"

#define NOTHING 1e-9
#define UNKNOWN (-1.0)

/* `speed` is UNKNOWN while it is being worked out. */
typedef struct {
    double left, speed;
    int32_t sender, receiver, microbatch, index;
} Transfer;

typedef struct {
    Transfer *transfers;         /* [microbatches], of which `size` are under way */
    int32_t size, next;          /* the one that ends first, at next_s */
    double now, next_s;
    double *up, *down;           /* [nodes]: what is free of each line, payloads per second */
    int32_t *num_up, *num_down;  /* [nodes]: transfers that have no speed yet */
} Lines;

static double held_s(const Case *c, int32_t sender, int32_t receiver) {
    double up_s = c->uplink_s[sender], down_s = c->downlink_s[receiver];
    return up_s > down_s ? up_s : down_s;
}

static void advance(Lines *lines, double now) {
    double passed_s = now - lines->now;
    int32_t i;
    for (i = 0; i < lines->size; i++) lines->transfers[i].left -= lines->transfers[i].speed * passed_s;
    lines->now = now;
}

static void share(const Case *c, Lines *lines) {
    Transfer *all = lines->transfers, *end = all + lines->size, *each;
    double *up = lines->up, *down = lines->down;
    int32_t *num_up = lines->num_up, *num_down = lines->num_down, num_left = lines->size;
    for (each = all; each < end; each++) {
        double up_s = c->uplink_s[each->sender], down_s = c->downlink_s[each->receiver];
        num_up[each->sender] = num_down[each->receiver] = 0;
        up[each->sender] = up_s > 0.0 ? 1.0 / up_s : INFINITY, down[each->receiver] = down_s > 0.0 ? 1.0 / down_s : INFINITY;
        each->speed = UNKNOWN;
    }
    for (each = all; each < end; each++) num_up[each->sender]++, num_down[each->receiver]++;
    while (num_left) {
        double least = INFINITY;
        int32_t line = NOBODY, is_up = 1;
        for (each = all; each < end; each++) {
            double part;
            if (each->speed != UNKNOWN) continue;
            part = up[each->sender] / num_up[each->sender];
            if (part < least) least = part, line = each->sender, is_up = 1;
            part = down[each->receiver] / num_down[each->receiver];
            if (part < least) least = part, line = each->receiver, is_up = 0;
        }
        for (each = all; each < end; each++) {
            if (each->speed != UNKNOWN || (is_up ? each->sender : each->receiver) != line) continue;
            each->speed = least;
            up[each->sender] -= least, down[each->receiver] -= least;
            num_up[each->sender]--, num_down[each->receiver]--, num_left--;
        }
    }
    lines->next_s = INFINITY;
    for (each = all; each < end; each++) {
        double end_s = lines->now + each->left / each->speed;
        if (end_s < lines->next_s) lines->next_s = end_s, lines->next = (int32_t)(each - all);
    }
}

static void begin_transfer(const Case *c, Lines *lines, Heap *heap, Event event, const int32_t *path) {
    int32_t index = ~event.index, sender = node_of(c, path, index - 1), receiver = node_of(c, path, index);
    Transfer transfer = {1.0, UNKNOWN, sender, receiver, event.microbatch, index};
    if (held_s(c, sender, receiver) <= 0.0) {
        push(heap, event.time + c->link_s[(int64_t)sender * c->num_nodes + receiver], event.microbatch, index);
        return;
    }
    advance(lines, event.time);
    lines->transfers[lines->size++] = transfer;
    share(c, lines);
}

static void end_transfers(const Case *c, Lines *lines, Heap *heap) {
    int32_t i, kept = 0;
    advance(lines, lines->next_s);
    lines->transfers[lines->next].left = 0.0; /* whatever rounding says */
    for (i = 0; i < lines->size; i++) {
        Transfer each = lines->transfers[i];
        if (each.left > NOTHING) {
            lines->transfers[kept++] = each;
        } else {
            double way_s = c->link_s[(int64_t)each.sender * c->num_nodes + each.receiver] - held_s(c, each.sender, each.receiver);
            push(heap, lines->now + (way_s > 0.0 ? way_s : 0.0), each.microbatch, each.index);
        }
    }
    lines->size = kept;
    share(c, lines);
}

/* Begin and end all transfers that do so before anything else happens. */
static void carry(const Case *c, Lines *lines, Heap *heap, const int32_t *paths) {
    for (;;) {
        if (lines->size && (!heap->size || lines->next_s <= heap->events[0].time)) {
            end_transfers(c, lines, heap);
        } else if (heap->size && heap->events[0].index < 0) {
            Event event = pop(heap);
            begin_transfer(c, lines, heap, event, paths + (size_t)event.microbatch * c->path_length);
        } else {
            return;
        }
    }
}
