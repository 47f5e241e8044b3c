/* A payload is a whole vector in one format; a block of it is found, and written or read. Behind `count` values of a short block
   there may be anything. */

#pragma once

#include "exchange_formats.h"

static void encode(const Payload *payload, int64_t begin, int count, const float *x, float spread, const int32_t *weights) {
    uint8_t *bytes = payload->bytes;
    int64_t at = payload->start + begin, block = at / BLOCK, num_blocks = payload->num_blocks;
    switch (payload->codec) {
    case FP32:
        if (count == BLOCK)
            stream_block((float *)(bytes + 4 * at), x);
        else
            memcpy(bytes + 4 * at, x, 4 * (size_t)count);
        break;
    case BF16: {
        uint8_t halves[2 * BLOCK];
        encode_bfloat16(x, count == BLOCK ? bytes + 2 * at : halves);
        if (count < BLOCK) memcpy(bytes + 2 * at, halves, 2 * (size_t)count);
        break;
    }
    case Q8:
        encode_q8(x, bytes + 2 * block, bytes + 2 * num_blocks + BLOCK * block);
        break;
    case Q4:
    case E3M0:
        for (int64_t small = at / SMALL, i = 0; i < count; small++, i += SMALL)
            (payload->codec == Q4 ? encode_q4 : encode_e3m0)(x + i, bytes + 2 * small, bytes + 2 * num_blocks + SMALL / 2 * small);
        break;
    case LATTICE:
        encode_lattice(x, spread, weights, bytes + 2 * block, bytes + 2 * (num_blocks + block),
                       bytes + 4 * num_blocks + BLOCK / 2 * block);
        break;
    }
}

/* The values, in `room` or where they are already; null if they cannot be read. Behind `count` there may be anything. */
static const float *decode(const Payload *payload, int64_t begin, int count, const float *near, const int32_t *weights, float *room) {
    const uint8_t *bytes = payload->bytes;
    int64_t at = payload->start + begin, block = at / BLOCK, num_blocks = payload->num_blocks;
    switch (payload->codec) {
    case FP32:
        if (count == BLOCK && (uintptr_t)bytes % sizeof(float) == 0) {
            prefetch((const float *)bytes, at, num_blocks * BLOCK);
            return (const float *)bytes + at;
        }
        memcpy(room, bytes + 4 * at, 4 * (size_t)count);
        break;
    case BF16:
        for (int i = 0; i < count; i++) room[i] = read_bfloat16(bytes + 2 * at + 2 * i);
        break;
    case Q8:
        decode_q8(bytes + 2 * block, bytes + 2 * num_blocks + BLOCK * block, room);
        break;
    case Q4:
    case E3M0:
        for (int64_t small = at / SMALL, i = 0; i < count; small++, i += SMALL)
            (payload->codec == Q4 ? decode_q4 : decode_e3m0)(bytes + 2 * small, bytes + 2 * num_blocks + SMALL / 2 * small, room + i);
        break;
    case LATTICE:
        if (!decode_lattice(near, weights, bytes + 2 * block, bytes + 2 * (num_blocks + block),
                            bytes + 4 * num_blocks + BLOCK / 2 * block, room))
            return NULL;
        break;
    }
    return room;
}

/* Our own values as they travelled. `near` is what was encoded, and fp32 and the lattice need no codes then. */
static const float *decode_own(const Payload *payload, int64_t begin, int count, const float *near, float *restrict room) {
    if (payload->codec == FP32 && near) return near;
    if (payload->codec != LATTICE) return decode(payload, begin, count, NULL, NULL, room);
    float step = read_bfloat16(payload->bytes + 2 * ((payload->start + begin) / BLOCK)), inverse = 1.0f / step;
    for (int i = 0; i < BLOCK; i++) room[i] = rintf(near[i] * inverse) * step;
    return room;
}
