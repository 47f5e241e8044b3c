/* A piece block by block: a whole block where it is, a short one in a padded copy that is written back. */

#pragma once

#include "exchange_numbers.h"

typedef struct {
    float values[5][BLOCK];
} Copies;

static void pad(float **vector, float *copy, int64_t begin, int count) {
    if (!*vector) return;
    memset(copy, 0, BLOCK * sizeof *copy);
    memcpy(copy, *vector + begin, (size_t)count * sizeof *copy);
    *vector = copy;
}

static Vectors vectors_of(const Vectors *all, Copies *copies, int64_t begin, int count) {
    Vectors one = *all;
    if (count == BLOCK) {
        if (one.theta) one.theta += begin;
        if (one.phi) one.phi += begin;
        if (one.momentum) one.momentum += begin;
        if (one.residual) one.residual += begin;
        if (one.anchor) one.anchor += begin;
        return one;
    }
    float **each[5] = {&one.theta, &one.phi, &one.momentum, &one.residual, &one.anchor};
    int anchor_is_phi = all->anchor == all->phi;
    for (int i = 0; i < 5; i++) pad(each[i], copies->values[i], begin, count);
    if (anchor_is_phi) one.anchor = one.phi;
    return one;
}

static void copy_back(const Vectors *all, const Vectors *one, int64_t begin, int count) {
    float *to[5] = {all->theta, all->phi, all->momentum, all->residual, all->anchor};
    float *from[5] = {one->theta, one->phi, one->momentum, one->residual, one->anchor};
    for (int i = 0; i < 5 && count < BLOCK; i++)
        if (to[i]) memcpy(to[i] + begin, from[i], (size_t)count * sizeof(float));
}

static inline __attribute__((always_inline)) void prefetch_all(const Vectors *all, int64_t begin, int64_t numel) {
    prefetch(all->theta, begin, numel);
    prefetch(all->phi, begin, numel);
    prefetch(all->momentum, begin, numel);
    prefetch(all->residual, begin, numel);
}

static int count_of(int64_t numel, int64_t begin) { return numel - begin < BLOCK ? (int)(numel - begin) : BLOCK; }

/* A short block must not count what is behind it. */
static void clear_behind(float *x, int count) {
    if (count < BLOCK) memset(x + count, 0, (size_t)(BLOCK - count) * sizeof *x);
}
