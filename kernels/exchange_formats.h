/* The formats of quantize.py, powers.py and lattice.py: one block of 256, or one small one of 64; x is padded with zeros. */

#pragma once

#include "exchange_numbers.h"

enum { SMALL = 64 };

static const float SMALLEST_STEP = 0x1p-20f;  /* of the lattice, in units of max|x| */
static const float FARTHEST = 0x1p22f;

static void pack_nibbles(const uint8_t *restrict codes, uint8_t *restrict out, int half) {
    for (int i = 0; i < half; i++) out[i] = (uint8_t)(codes[i] | codes[i + half] << 4);
}

static void encode_bfloat16(const float *restrict x, uint8_t *restrict out) {
    uint16_t halves[BLOCK];
    for (int i = 0; i < BLOCK; i++) {
        uint32_t bits = bits_of(x[i]), rounded = (bits + 0x7FFF + (bits >> 16 & 1)) >> 16;
        halves[i] = (uint16_t)((bits & 0x7FFFFFFFu) > 0x7F800000u ? 0x7FC0u : rounded);
    }
    memcpy(out, halves, sizeof halves);
}

static void encode_q8(const float *restrict x, uint8_t *restrict scale, uint8_t *restrict codes) {
    float step = rounded_to_bfloat16(largest(x, BLOCK) * (float)(1.0 / 127)), inverse = inverse_of(step);
    write_bfloat16(scale, step);
    if (inverse == 0.0f) {
        memset(codes, 0, BLOCK);
        return;
    }
    for (int i = 0; i < BLOCK; i++) codes[i] = (uint8_t)(int8_t)(int32_t)rintf(x[i] * inverse);
}

static void encode_q4(const float *restrict x, uint8_t *restrict scale, uint8_t *restrict codes) {
    uint8_t unpacked[SMALL];
    float step = rounded_to_bfloat16(largest(x, SMALL) * (float)(1.0 / 7)), inverse = inverse_of(step);
    write_bfloat16(scale, step);
    if (inverse == 0.0f) {
        memset(codes, 0x77, SMALL / 2);
        return;
    }
    for (int i = 0; i < SMALL; i++) unpacked[i] = (uint8_t)((int32_t)rintf(x[i] * inverse) + 7);
    pack_nibbles(unpacked, codes, SMALL / 2);
}

static void encode_e3m0(const float *restrict x, uint8_t *restrict scale, uint8_t *restrict codes) {
    uint8_t unpacked[SMALL];
    float step = rounded_to_bfloat16(largest(x, SMALL) * 0.9f), inverse = inverse_of(step);
    write_bfloat16(scale, step);
    for (int i = 0; i < SMALL; i++) {
        int32_t exponent = (int32_t)(bits_of(fabsf(x[i]) * inverse) + (1u << 22)) >> 23;
        exponent -= 120;
        exponent = exponent < 0 ? 0 : exponent;
        exponent = exponent > 7 ? 7 : exponent;
        unpacked[i] = (uint8_t)(exponent | (int32_t)(bits_of(x[i]) >> 28 & 8));
    }
    pack_nibbles(unpacked, codes, SMALL / 2);
}

static void encode_lattice(const float *restrict x, float spread, const int32_t *restrict weights, uint8_t *restrict step_at,
                           uint8_t *restrict checksum_at, uint8_t *restrict codes) {
    uint8_t unpacked[BLOCK];
    float least = largest(x, BLOCK) * SMALLEST_STEP;
    least = least < SMALLEST_NORMAL ? SMALLEST_NORMAL : least;
    float step = rounded_to_bfloat16(spread != spread || spread > least ? spread : least), inverse = inverse_of(step);
    uint32_t checksum = 0;
    write_bfloat16(step_at, step);
    if (inverse == 0.0f) {
        memset(codes, 0, BLOCK / 2);
        memset(checksum_at, 0, 2);
        return;
    }
    for (int i = 0; i < BLOCK; i++) {
        int32_t k = (int32_t)rintf(x[i] * inverse);
        unpacked[i] = (uint8_t)(k & 15);
        checksum += (uint32_t)(k >> 4) * (uint32_t)weights[i];
    }
    pack_nibbles(unpacked, codes, BLOCK / 2);
    uint16_t low = (uint16_t)checksum;
    memcpy(checksum_at, &low, 2);
}

static void decode_q8(const uint8_t *restrict scale, const uint8_t *restrict codes, float *restrict out) {
    float step = read_bfloat16(scale);
    for (int i = 0; i < BLOCK; i++) out[i] = (float)(int8_t)codes[i] * step;
}

static void decode_q4(const uint8_t *restrict scale, const uint8_t *restrict codes, float *restrict out) {
    float step = read_bfloat16(scale);
    for (int i = 0; i < SMALL / 2; i++) {
        out[i] = (float)((codes[i] & 15) - 7) * step;
        out[i + SMALL / 2] = (float)((codes[i] >> 4) - 7) * step;
    }
}

static inline float e3m0_unit(uint32_t code) {
    return from_bits((code & 8) << 28 | (code & 7 ? ((code & 7) + 120) << 23 : 0));
}

static void decode_e3m0(const uint8_t *restrict scale, const uint8_t *restrict codes, float *restrict out) {
    float step = read_bfloat16(scale);
    for (int i = 0; i < SMALL / 2; i++) {
        out[i] = e3m0_unit(codes[i] & 15u) * step;
        out[i + SMALL / 2] = e3m0_unit(codes[i] >> 4) * step;
    }
}

/* Whether the block could be read; if not, out holds anything. */
static int decode_lattice(const float *restrict near, const int32_t *restrict weights, const uint8_t *restrict step_at,
                          const uint8_t *restrict checksum_at, const uint8_t *restrict codes, float *restrict out) {
    float step = read_bfloat16(step_at), inverse = inverse_of(step);
    if (inverse == 0.0f) return 0;
    float m[BLOCK];
    for (int i = 0; i < BLOCK; i++) m[i] = rintf(near[i] * inverse);
    if (!(largest(m, BLOCK) <= FARTHEST)) return 0;
    uint32_t checksum = 0;
    for (int i = 0; i < BLOCK / 2; i++) {
        int32_t low = codes[i] & 15, high = codes[i] >> 4;
        int32_t low_part = ((int32_t)m[i] - low + 7) >> 4, high_part = ((int32_t)m[i + BLOCK / 2] - high + 7) >> 4;
        checksum += (uint32_t)low_part * (uint32_t)weights[i] + (uint32_t)high_part * (uint32_t)weights[i + BLOCK / 2];
        out[i] = (float)(low_part * 16 + low) * step;
        out[i + BLOCK / 2] = (float)(high_part * 16 + high) * step;
    }
    uint16_t sent;
    memcpy(&sent, checksum_at, 2);
    return sent == (uint16_t)checksum;
}
