/* The passes over whole vectors that an exchange is made of, block by block: see kernels/exchange.py.

   A block is 256 values (the last one may be short). Everything between reading and writing it stays in the first cache, and each
   vector is read once and written once per pass. The formats are those of quantize.py, powers.py and lattice.py and give the same
   bytes and values. Products and sums are rounded one by one (-ffp-contract=off), as torch does it. */

#include <math.h>
#include <stdint.h>
#include <string.h>

#ifdef __AVX__
#include <immintrin.h>
#endif

enum { BLOCK = 256, SMALL = 64, LANES = 64, AHEAD = 1024 };
enum { NONE, FP32, BF16, Q8, Q4, E3M0, LATTICE };
enum { PAIR_AVERAGE, NOLOCO, HEAVY_BALL, NESTEROV, SPARSELOCO };

static const float SMALLEST_NORMAL = 1.17549435e-38f;
static const float SMALLEST_STEP = 0x1p-20f;  /* of the lattice, in units of max|x| */
static const float FARTHEST = 0x1p22f;

/* The payload of a whole fragment; `start` is the value in it with which this piece begins. */
typedef struct {
    int32_t codec;
    float factor;  /* on (theirs - ours) */
    uint8_t *bytes;
    int64_t num_blocks;
    int64_t start;
} Payload;

/* One piece of the state; absent ones are null. With pair averaging the anchor is phi itself. */
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

/* ---- numbers ---- */

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

/* ---- formats: one block of 256, or as many small ones as hold `count` values; x is padded with zeros ---- */

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

/* ---- payloads ---- */

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

/* A short block must not count what is behind it. */
static void clear_behind(float *x, int count) {
    if (count < BLOCK) memset(x + count, 0, (size_t)(BLOCK - count) * sizeof *x);
}

/* ---- short blocks are worked on in padded copies ---- */

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

/* ---- the passes ---- */

/* sum x^2 */
double llm_node_size(const float *x, int64_t numel) {
    double sum = 0.0;
    int64_t whole = numel / BLOCK * BLOCK;
    for (int64_t begin = 0; begin < whole; begin += BLOCK) sum += sum_of_squares(x + begin);
    for (int64_t i = whole; i < numel; i++) sum += (float)(x[i] * x[i]);
    return sum;
}

/* What the block moved sets the distance that the lattice's window is made for: averaging/window.py, `wanted`. */
static float spread_of(const Pack *pack, float *distance, const Vectors *one, float squares, int count) {
    const float *x = pack->slow_is_theta ? one->theta : one->phi;
    float moved = sqrtf(squares / (float)count), size = sqrtf(sum_of_squares(x) / (float)count);
    if (pack->moved_by_momentum) moved = fmaxf(moved, sqrtf(sum_of_squares(one->momentum) / (float)count));
    float risen = 2.0f * moved;
    if (*distance > 0.0f) {
        float grown = *distance + pack->drift * moved;
        risen = grown > moved ? grown : moved;
    }
    float least = size * 0x1p-12f;
    risen = risen > least ? risen : least;
    if (isfinite(moved + size)) *distance = risen < size ? risen : size;
    return *distance * 0.625f;  /* 2 * WINDOW / 16 */
}

/* delta <- theta - phi; returns its sum of squares */
static float differ(const float *restrict theta, const float *restrict phi, float *restrict delta) {
    for (int i = 0; i < BLOCK; i++) delta[i] = theta[i] - phi[i];
    return sum_of_squares(delta);
}

static void copy_block(float *restrict out, const float *restrict x) {
    for (int i = 0; i < BLOCK; i++) out[i] = x[i];
}

/* encode, and anchor <- theta; returns sum of delta^2 */
double llm_node_pack(const Pack *pack) {
    double sum = 0.0;
    Copies copies;
    for (int64_t begin = 0; begin < pack->numel; begin += BLOCK) {
        int count = count_of(pack->numel, begin);
        prefetch_all(&pack->vectors, begin, pack->numel);
        Vectors one = vectors_of(&pack->vectors, &copies, begin, count);
        float delta[BLOCK], squares = differ(one.theta, one.phi, delta), spread = 0.0f;
        sum += squares;
        if (pack->slow.codec == LATTICE) spread = spread_of(pack, pack->distance + begin / BLOCK, &one, squares, count);
        if (pack->slow.codec) encode(&pack->slow, begin, count, pack->slow_is_theta ? one.theta : one.phi, spread, pack->weights);
        if (pack->delta.codec) {
            if (one.residual)
                for (int i = 0; i < BLOCK; i++) delta[i] = delta[i] + one.residual[i] * pack->error_decay;
            encode(&pack->delta, begin, count, delta, 0.0f, NULL);
        }
        (one.anchor == one.phi ? copy_block : stream_block)(one.anchor, one.theta);
        copy_back(&pack->vectors, &one, begin, count);
    }
    settle();
    return sum;
}

/* sum of (theirs - ours)^2 */
double llm_node_measure(Measure *measure) {
    double sum = 0.0;
    Vectors all = {(float *)measure->near, 0, 0, 0, 0};
    int needs_near = measure->theirs.codec == FP32 || measure->theirs.codec == LATTICE;
    Copies copies;
    for (int64_t begin = 0; begin < measure->numel; begin += BLOCK) {
        int count = count_of(measure->numel, begin);
        if (needs_near) prefetch(measure->near, begin, measure->numel);
        Vectors one = vectors_of(&all, &copies, begin, count);
        float room[2][BLOCK], difference[BLOCK], squares = 0.0f;
        const float *theirs = decode(&measure->theirs, begin, count, one.theta, measure->weights, room[0]);
        if (theirs) {
            const float *ours = decode_own(&measure->ours, begin, count, one.theta, room[1]);
            for (int i = 0; i < BLOCK; i++) difference[i] = theirs[i] - ours[i];
            clear_behind(difference, count);
            squares = sum_of_squares(difference);
        }
        sum += squares;
        measure->num_unreadable += !theirs;
        if (measure->squares) measure->squares[begin / BLOCK] = squares;
        if (measure->readable) measure->readable[begin / BLOCK] = theirs != NULL;
    }
    return sum;
}

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

/* phi <- where the step leads, theta follows; by <- phi' - anchor. Where the step begins at the anchor, that is phi itself. */
static void move_from_anchor(float *restrict theta, float *restrict phi, float *restrict by, float scale, float keep) {
    for (int i = 0; i < BLOCK; i++) {
        float packed = phi[i], moved = packed + by[i] * scale, now = theta[i];
        by[i] = moved - packed;
        theta[i] = keep == 1.0f ? (now - packed) + moved : now + by[i] * keep;
        phi[i] = moved;
    }
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
    for (int64_t begin = 0; begin < step->numel; begin += BLOCK) {
        int count = count_of(step->numel, begin);
        prefetch_all(&step->vectors, begin, step->numel);
        if (step->vectors.anchor != step->vectors.phi) prefetch(step->vectors.anchor, begin, step->numel);
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
        if (!step->is_dry && one.anchor == one.phi)
            move_from_anchor(one.theta, one.phi, by, step->scale, step->keep);
        else if (!step->is_dry)
            move_from_phi(one.theta, one.phi, one.anchor, by, step->scale, step->keep);
        sum += sum_of_squares(by);
        if (!step->is_dry) copy_back(&step->vectors, &one, begin, count);
    }
    return sum;
}
