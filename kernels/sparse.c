/* Format TOPK, chunk by chunk: see kernels/sparse.py, whose bytes and values these are. */

#include <math.h>
#include <stdint.h>
#include <stdlib.h>
#include <string.h>

enum { CHUNK = 4096, KEPT = 64, GROUPS = 128, FEW = 256 };

static const float SMALLEST_NORMAL = 1.17549435e-38f;

static uint32_t bits_of(float x) { uint32_t bits; memcpy(&bits, &x, 4); return bits; }
static float from_bits(uint32_t bits) { float x; memcpy(&x, &bits, 4); return x; }

static uint16_t bfloat16_of(float x) {
    uint32_t bits = bits_of(x);
    return (uint16_t)((bits & 0x7FFFFFFFu) > 0x7F800000u ? 0x7FC0u : (bits + 0x7FFF + (bits >> 16 & 1)) >> 16);
}

static int falling(const void *a, const void *b) {
    uint64_t first = *(const uint64_t *)a, second = *(const uint64_t *)b;
    return (first < second) - (first > second);
}

/* Descending. What is here is nearly sorted or short. */
static void sort(uint64_t *keys, int count) {
    if (count > FEW) {
        qsort(keys, (size_t)count, sizeof *keys, falling);
        return;
    }
    for (int i = 1; i < count; i++) {
        uint64_t key = keys[i];
        int at = i;
        for (; at > 0 && keys[at - 1] < key; at--) keys[at] = keys[at - 1];
        keys[at] = key;
    }
}

/* kept <- the 64 largest of the chunk, descending: size in the upper half (NaN is the largest), place in the lower: of equals the
   last, since zeros had better be those of the padding. Of 128 groups' maxima, the 64th largest is no more than the 64th largest
   value: what is below cannot be among them. */
static void select_largest(const float *restrict x, uint64_t *restrict kept) {
    uint32_t size[CHUNK], most[GROUPS] = {0};
    uint64_t found[CHUNK], order[GROUPS];
    for (int i = 0; i < CHUNK; i++) size[i] = bits_of(x[i]) & 0x7FFFFFFFu;
    for (int i = 0; i < CHUNK; i += GROUPS)
        for (int group = 0; group < GROUPS; group++) most[group] = size[i + group] > most[group] ? size[i + group] : most[group];
    for (int group = 0; group < GROUPS; group++) order[group] = most[group];
    sort(order, GROUPS);
    uint32_t least = (uint32_t)order[KEPT - 1];
    int count = 0;
    for (int i = 0; i < CHUNK; i++) {
        found[count] = (uint64_t)size[i] << 32 | (uint32_t)i;
        count += size[i] >= least;
    }
    sort(found, count);
    memcpy(kept, found, KEPT * sizeof *kept);
}

/* The cut in two parts whose means have the least squared error; returns the length of the first. */
static int best_levels(const uint64_t *kept, float levels[2]) {
    float largest = from_bits((uint32_t)(kept[0] >> 32)), first[KEPT], most = 0.0f;
    double sum = 0.0;
    int best = 0;
    if (largest < SMALLEST_NORMAL) largest = SMALLEST_NORMAL;
    for (int i = 0; i < KEPT; i++) first[i] = (float)(sum += from_bits((uint32_t)(kept[i] >> 32)) / largest);
    for (int i = 0; i < KEPT - 1; i++) {
        float second = first[KEPT - 1] - first[i];
        float gain = first[i] * first[i] / (float)(i + 1) + second * second / (float)(KEPT - 1 - i);
        if (i == 0 || gain > most) {
            most = gain;
            best = i;
        }
    }
    levels[0] = first[best] / (float)(best + 1) * largest;
    levels[1] = (first[KEPT - 1] - first[best]) / (float)(KEPT - 1 - best) * largest;
    return best + 1;
}

static void encode_chunk(const float *x, uint8_t *levels_at, uint8_t *codes, uint8_t *indices) {
    uint64_t kept[KEPT];
    float levels[2];
    select_largest(x, kept);
    int num_large = best_levels(kept, levels);
    uint16_t halves[2] = {bfloat16_of(levels[0]), bfloat16_of(levels[1])};
    memcpy(levels_at, halves, sizeof halves);
    memset(codes, 0, KEPT / 4);
    for (int i = 0; i < KEPT; i++) {
        int place = (int)(kept[i] & 0xFFFFFFFFu);
        codes[i / 4] |= (uint8_t)(((x[place] < 0.0f) | (i >= num_large) << 1) << 2 * (i % 4));
        uint8_t *three = indices + i / 2 * 3;
        if (i % 2 == 0) {
            three[0] = (uint8_t)place;
            three[1] = (uint8_t)(place >> 8);
        } else {
            three[1] = (uint8_t)(three[1] | (place & 15) << 4);
            three[2] = (uint8_t)(place >> 4);
        }
    }
}

/* x begins at value `start` of a vector of `num_chunks` chunks. */
void llm_node_topk_encode(const float *x, int64_t numel, uint8_t *bytes, int64_t num_chunks, int64_t start) {
    float copy[CHUNK];
    for (int64_t begin = 0; begin < numel; begin += CHUNK) {
        int64_t chunk = (start + begin) / CHUNK, count = numel - begin < CHUNK ? numel - begin : CHUNK;
        const float *values = x + begin;
        if (count < CHUNK) {
            memset(copy, 0, sizeof copy);
            values = memcpy(copy, values, (size_t)count * sizeof *copy);
        }
        encode_chunk(values, bytes + 4 * chunk, bytes + 4 * num_chunks + 16 * chunk, bytes + 20 * num_chunks + 96 * chunk);
    }
}

/* out <- out + weight * values */
void llm_node_topk_add(const uint8_t *bytes, int64_t num_chunks, int64_t start, float *out, int64_t numel, float weight) {
    for (int64_t begin = 0; begin < numel; begin += CHUNK) {
        int64_t chunk = (start + begin) / CHUNK, count = numel - begin < CHUNK ? numel - begin : CHUNK;
        const uint8_t *codes = bytes + 4 * num_chunks + 16 * chunk, *indices = bytes + 20 * num_chunks + 96 * chunk;
        uint16_t halves[2];
        memcpy(halves, bytes + 4 * chunk, sizeof halves);
        float large = from_bits((uint32_t)halves[0] << 16) * weight, small = from_bits((uint32_t)halves[1] << 16) * weight;
        for (int i = 0; i < KEPT; i++) {
            const uint8_t *three = indices + i / 2 * 3;
            int place = i % 2 ? three[1] >> 4 | three[2] << 4 : three[0] | (three[1] & 15) << 8, code = codes[i / 4] >> 2 * (i % 4);
            float size = code & 2 ? small : large;
            if (place < count) out[begin + place] += code & 1 ? -size : size;
        }
    }
}
