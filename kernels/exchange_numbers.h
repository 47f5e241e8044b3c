/* Numbers one by one and by the block: bits, bfloat16, sums that are always taken in the same order, and how memory is read ahead of
   the work and written past the cache. */

#pragma once

#include <math.h>
#include <stdint.h>
#include <string.h>

#ifdef __AVX__
#include <immintrin.h>
#endif

#include "exchange.h"

enum { LANES = 64, AHEAD = 1024 };

static const float SMALLEST_NORMAL = 1.17549435e-38f;

static uint32_t bits_of(float x) { uint32_t bits; memcpy(&bits, &x, 4); return bits; }
static float from_bits(uint32_t bits) { float x; memcpy(&x, &bits, 4); return x; }

/* Half-even, as fp32; infinity and NaN stay what they are. For x >= 0. */
static float rounded_to_bfloat16(float x) {
    uint32_t bits = bits_of(x);
    return x < INFINITY ? from_bits((bits + 0x7FFF + (bits >> 16 & 1)) & 0xFFFF0000u) : x;
}

static void write_bfloat16(uint8_t *at, float x) {
    uint16_t half = (uint16_t)(bits_of(x) >> 16) | (x != x ? 0x40 : 0);
    memcpy(at, &half, 2);
}

static float read_bfloat16(const uint8_t *at) {
    uint16_t half;
    memcpy(&half, at, 2);
    return from_bits((uint32_t)half << 16);
}

static float inverse_of(float step) { return step >= SMALLEST_NORMAL && step < INFINITY ? 1.0f / step : 0.0f; }

/* max|x|; NaN if there is one, since its bits are the largest. */
static inline float largest(const float *restrict x, int count) {
    uint32_t most = 0;
    for (int i = 0; i < count; i++) {
        uint32_t bits = bits_of(x[i]) & 0x7FFFFFFFu;
        most = bits > most ? bits : most;
    }
    return from_bits(most);
}

static float total(const float *restrict lanes) {
    float sums[16];
    for (int i = 0; i < 16; i++) sums[i] = (lanes[i] + lanes[i + 16]) + (lanes[i + 32] + lanes[i + 48]);
    for (int half = 8; half; half /= 2)
        for (int i = 0; i < half; i++) sums[i] += sums[i + half];
    return sums[0];
}

static float sum_of_squares(const float *restrict x) {
    float lanes[LANES] = {0};
    for (int i = 0; i < BLOCK; i += LANES)
        for (int lane = 0; lane < LANES; lane++) lanes[lane] += x[i + lane] * x[i + lane];
    return total(lanes);
}

/* Written without being read into the cache first, where the processor can. */
static void stream_block(float *restrict out, const float *restrict x) {
#if defined(__AVX512F__)
    if ((uintptr_t)out % 64 == 0) {
        for (int i = 0; i < BLOCK; i += 16) _mm512_stream_ps(out + i, _mm512_loadu_ps(x + i));
        return;
    }
#elif defined(__AVX__)
    if ((uintptr_t)out % 32 == 0) {
        for (int i = 0; i < BLOCK; i += 8) _mm256_stream_ps(out + i, _mm256_loadu_ps(x + i));
        return;
    }
#endif
    memcpy(out, x, BLOCK * sizeof *x);
}

static void settle(void) {
#ifdef __AVX__
    _mm_sfence();
#endif
}

/* Have what comes AHEAD values later brought to the cache: the processor's own foresight ends with a page. Inline, since gcc takes a
   function that does nothing else for one that does nothing. */
static inline __attribute__((always_inline)) void prefetch(const float *x, int64_t begin, int64_t numel) {
    if (!x || numel - begin < AHEAD + BLOCK) return;
    for (int i = 0; i < BLOCK; i += 16) __builtin_prefetch(x + begin + AHEAD + i);
}
