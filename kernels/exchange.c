/* The passes over whole vectors that an exchange is made of, block by block: see kernels/exchange.py.

   A block is 256 values (the last one may be short). Everything between reading and writing it stays in the first cache, and each
   vector is read once and written once per pass. The formats are those of quantize.py, powers.py and lattice.py and give the same
   bytes and values. Products and sums are rounded one by one (-ffp-contract=off), as torch does it. */

#include "exchange_blocks.h"
#include "exchange_payloads.h"

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
