/* What the passes of an exchange take: kernels/exchange_arguments.py has the same fields in the same order. */

#pragma once

#include <stdint.h>

enum { BLOCK = 256 };
enum { NONE, FP32, BF16, Q8, Q4, E3M0, LATTICE };
enum { PAIR_AVERAGE, NOLOCO, HEAVY_BALL, NESTEROV, SPARSELOCO };

/* The payload of a whole fragment; `start` is the value in it with which this piece begins. */
typedef struct {
    int32_t codec;
    float factor;  /* on (theirs - ours) */
    uint8_t *bytes;
    int64_t num_blocks;
    int64_t start;
} Payload;

/* One piece of the state; absent ones are null. With pair averaging the anchor may be phi itself. */
typedef struct {
    float *theta, *phi, *momentum, *residual, *anchor;
} Vectors;

typedef struct {
    Vectors vectors;
    int64_t numel;
    Payload delta, slow;
    float *distance;  /* of the lattice's window, one per block */
    float drift, error_decay;
    int32_t slow_is_theta, moved_by_momentum;
    const int32_t *weights;  /* of the lattice's checksum */
} Pack;

typedef struct {
    const float *near;  /* what we encoded, or null with payloads of delta */
    int64_t numel;
    Payload ours, theirs;
    const int32_t *weights;
    float *squares;     /* per block, or null */
    uint8_t *readable;  /* per block, or null */
    int64_t num_unreadable;
} Measure;

typedef struct {
    Vectors vectors;
    int64_t numel;
    Payload own_delta, own_slow;
    const Payload *deltas, *slows;  /* one per partner, some of them absent */
    int32_t num_partners, rule, slow_is_theta, keeps_residual, is_dry;
    float own_factor;  /* on our own delta in the mean; below 0 for the exact delta */
    float alpha, beta, gamma, scale, clip, keep, error_decay;
    const int32_t *weights;
} Step;

double llm_node_size(const float *x, int64_t numel);
double llm_node_pack(const Pack *pack);
double llm_node_measure(Measure *measure);
double llm_node_step(const Step *step);
