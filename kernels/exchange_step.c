/* The last pass of an exchange, the outer step of averaging/outer.py: see kernels/exchange.py, and exchange.c for the others. */

#include "exchange_blocks.h"
#include "exchange_payloads.h"

/* The mean delta of the group: own_factor * own + sum of factor * theirs, or our exact one. */
static void mean_delta(const Step *step, const Vectors *one, int64_t begin, int count, float *restrict mean) {
    float room[BLOCK], factor = step->own_factor;
    if (factor < 0.0f) {
        for (int i = 0; i < BLOCK; i++) mean[i] = one->anchor[i] - one->phi[i];
        return;
    }
    const float *own = decode(&step->own_delta, begin, count, NULL, NULL, room);
    for (int i = 0; i < BLOCK; i++) mean[i] = own[i] * factor;
    for (int partner = 0; partner < step->num_partners; partner++) {
        if (!step->deltas[partner].codec) continue;
        const float *theirs = decode(step->deltas + partner, begin, count, NULL, NULL, room);
        factor = step->deltas[partner].factor;
        for (int i = 0; i < BLOCK; i++) mean[i] += theirs[i] * factor;
    }
}

/* pull <- sum of factor * (theirs - ours); a block that cannot be read pulls nobody */
static void sum_pulls(const Step *step, const Vectors *one, int64_t begin, int count, float *restrict pull) {
    const float *near = step->slow_is_theta ? one->anchor : one->phi, *ours = NULL;
    float room[2][BLOCK];
    for (int partner = 0; partner < step->num_partners; partner++) {
        const Payload *slow = step->slows + partner;
        const float *theirs = slow->codec ? decode(slow, begin, count, near, step->weights, room[0]) : NULL;
        if (!theirs) continue;
        int is_first = !ours;
        float factor = slow->factor;
        if (is_first) ours = decode_own(&step->own_slow, begin, count, near, room[1]);
        if (is_first)
            for (int i = 0; i < BLOCK; i++) pull[i] = (theirs[i] - ours[i]) * factor;
        else
            for (int i = 0; i < BLOCK; i++) pull[i] += (theirs[i] - ours[i]) * factor;
    }
    if (!ours) memset(pull, 0, BLOCK * sizeof *pull);
    clear_behind(pull, count);
}

/* by <- the outer step; the momentum takes its own and shrinks by `clip`: averaging/outer.py. With pair averaging by is the pull. */
static void outer_step(const Step *step, float *restrict momentum, const float *restrict mean, float *restrict by) {
    float alpha = step->alpha, beta = step->beta, gamma = step->gamma, clip = step->clip;
    switch (step->rule) {
    case NOLOCO:
        for (int i = 0; i < BLOCK; i++) {
            by[i] = momentum[i] * alpha + mean[i] * beta + by[i] * gamma;
            momentum[i] = by[i] * clip;
        }
        break;
    case HEAVY_BALL:
        for (int i = 0; i < BLOCK; i++) {
            float velocity = momentum[i] * alpha + mean[i];
            by[i] = velocity * beta + by[i] * gamma;
            momentum[i] = velocity * clip;
        }
        break;
    case NESTEROV:
        for (int i = 0; i < BLOCK; i++) {
            float velocity = momentum[i] * alpha + mean[i];
            by[i] = (mean[i] + velocity * alpha) * beta + by[i] * gamma;
            momentum[i] = velocity * clip;
        }
        break;
    case SPARSELOCO:
        for (int i = 0; i < BLOCK; i++) by[i] = mean[i] * beta + by[i] * gamma;
        break;
    }
}

/* e <- b * e + delta - sent */
static void keep_residual(const Step *step, const Vectors *one, int64_t begin, int count) {
    float room[BLOCK], decay = step->error_decay, *restrict residual = one->residual;
    const float *sent = decode(&step->own_delta, begin, count, NULL, NULL, room);
    for (int i = 0; i < BLOCK; i++) residual[i] = residual[i] * decay + (one->anchor[i] - one->phi[i]) - sent[i];
}

/* phi <- where the step leads, theta follows; by <- phi' - anchor. Pair averaging begins at the anchor and does not read phi. */
static void move_from_anchor(float *restrict theta, float *restrict phi, const float *restrict anchor, float *restrict by,
                             float scale, float keep) {
    float moved[BLOCK];
    for (int i = 0; i < BLOCK; i++) {
        float packed = anchor[i], now = theta[i];
        moved[i] = packed + by[i] * scale;
        by[i] = moved[i] - packed;
        theta[i] = keep == 1.0f ? (now - packed) + moved[i] : now + by[i] * keep;
    }
    stream_block(phi, moved);
}

static void move_from_phi(float *restrict theta, float *restrict phi, const float *restrict anchor, float *restrict by, float scale,
                          float keep) {
    for (int i = 0; i < BLOCK; i++) {
        float packed = anchor[i], moved = phi[i] + by[i] * scale, now = theta[i];
        by[i] = moved - packed;
        theta[i] = keep == 1.0f ? (now - packed) + moved : now + by[i] * keep;
        phi[i] = moved;
    }
}

/* theta, phi and momentum take the step; returns sum of (phi' - anchor)^2, or, dry, that of the step, and changes nothing */
double llm_node_step(const Step *step) {
    double sum = 0.0;
    Copies copies;
    Vectors read = step->vectors;
    if (step->rule == PAIR_AVERAGE) read.phi = NULL;
    for (int64_t begin = 0; begin < step->numel; begin += BLOCK) {
        int count = count_of(step->numel, begin);
        prefetch_all(&read, begin, step->numel);
        prefetch(read.anchor, begin, step->numel);
        Vectors one = vectors_of(&step->vectors, &copies, begin, count);
        float mean[BLOCK], by[BLOCK], copy[BLOCK], *momentum = one.momentum;
        if (step->keeps_residual && !step->is_dry) keep_residual(step, &one, begin, count);
        sum_pulls(step, &one, begin, count, by);
        if (step->rule != PAIR_AVERAGE) {
            if (step->is_dry && momentum) momentum = memcpy(copy, momentum, sizeof copy);
            mean_delta(step, &one, begin, count, mean);
            clear_behind(mean, count);
            outer_step(step, momentum, mean, by);
        }
        if (!step->is_dry && step->rule == PAIR_AVERAGE)
            move_from_anchor(one.theta, one.phi, one.anchor == one.phi ? memcpy(copy, one.phi, sizeof copy) : one.anchor, by,
                             step->scale, step->keep);
        else if (!step->is_dry)
            move_from_phi(one.theta, one.phi, one.anchor, by, step->scale, step->keep);
        sum += sum_of_squares(by);
        if (!step->is_dry) copy_back(&step->vectors, &one, begin, count);
    }
    settle();
    return sum;
}
