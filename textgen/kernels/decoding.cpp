// Steps of an int8 decoder, the draw, and masks of guides, each in a single call: see decoding.py. Arrays are row-major.

#include <algorithm>
#include <chrono>
#include <cmath>
#include <cstdint>
#include <cstring>
#include <limits>
#include <vector>

#ifdef __AVX512F__
#include <immintrin.h>
#endif

// --- the draw --------------------------------------------------------------------------------------------------------

static uint64_t mix(uint64_t bits) {  // noise._mix: SplitMix64's finaliser
    bits += 0x9E3779B97F4A7C15;
    bits = (bits ^ bits >> 30) * 0xBF58476D1CE4E5B9;
    bits = (bits ^ bits >> 27) * 0x94D049BB133111EB;
    return bits ^ bits >> 31;
}

// The u in (0, 1) of noise.exponential, which returns -log(1 - u).
static inline float uniform(uint32_t key, uint32_t item) {
    uint32_t bits = (key ^ item) * 0x7FEB352D;
    bits = (bits ^ bits >> 15) * 0x846CA68B;
    bits = (bits ^ bits >> 16) & 0x7FFFFFFF;
    const float value = (static_cast<float>(static_cast<int32_t>(bits)) + 0.5f) * 0x1p-31f;
    return value < 1 - 0x1p-24f ? value : 1 - 0x1p-24f;
}

static const int64_t BLOCK = 64;  // tokens of a row that share one upper bound

// Return the token with the largest logit - log(noise), or -1 if torch's rounding may make another token the largest.
// Logarithms of a whole vocabulary would take most of the time. So the first pass computes an upper bound without one:
// noise = -log(1 - u) > u, hence log(noise) > log(u). The bits of a float, read as an integer, are linear in it between
// powers of two, where they meet the logarithm from below: log2(u) >= bits(u) / 2^23 - 127. Hence
//   logit - log(noise) < logit + ln(2) * (127 - bits(u) / 2^23)
// The second pass computes only tokens whose bound reaches the best value so far, in double precision: few of them.
// bounds: scratch memory; (blocks, BLOCK) bounds of tokens, then the largest bound of each block.
static int64_t draw_row(const float* logits, int64_t size, const int32_t* items, uint32_t key, bool noisy,
                        std::vector<float>& bounds) {
    const int64_t blocks = (size + BLOCK - 1) / BLOCK;
    bounds.resize(blocks * (BLOCK + 1));
    float* largest = bounds.data() + blocks * BLOCK;
    const float slope = noisy ? static_cast<float>(M_LN2) * 0x1p-23f : 0.0f, start = noisy ? 127 * M_LN2 : 0.0;
    int strange = 0;  // some logit is infinite or nan
    // First pass: bounds of all tokens. Branch-free, so that it runs in SIMD registers.
    for (int64_t block = 0; block < blocks; block++) {
        const int64_t first = block * BLOCK, count = first + BLOCK < size ? BLOCK : size - first;
        const float* from = logits + first;
        const int32_t* item = items + first;
        float* to = bounds.data() + first;
        float most = -std::numeric_limits<float>::infinity();
#pragma omp simd reduction(max : most) reduction(| : strange)
        for (int64_t i = 0; i < count; i++) {
            const float value = uniform(key, item[i]);
            int32_t bits;
            std::memcpy(&bits, &value, 4);
            const float bound = from[i] + (start - slope * static_cast<float>(bits));
            to[i] = bound;
            most = bound > most ? bound : most;
            strange |= !(from[i] <= std::numeric_limits<float>::max());  // +infinity or nan
        }
        largest[block] = most;
    }
    if (strange) return -1;
    double best = -std::numeric_limits<double>::infinity(), second = best;
    int64_t token = -1;
    // The error of torch's value: both its logarithms, of values to 16.6 and 22.2, may be off by 4 units in the last
    // place, and the difference by half a unit.
    const auto unsure = [&] { return 0x1p-13 + std::fabs(best) * 0x1p-21; };
    // Second pass: blocks, then tokens, whose bound is not clearly below the best value so far; first the block with the
    // largest bound, after which few others are left.
    const int64_t top = std::max_element(largest, largest + blocks) - largest;
    for (int64_t turn = -1; turn < blocks; turn++) {
        const int64_t block = turn < 0 ? top : turn;
        if (turn == top || (token >= 0 && largest[block] < best - 2 * unsure())) continue;
        for (int64_t i = block * BLOCK; i < size && i < (block + 1) * BLOCK; i++) {
            const bool below = token >= 0 ? bounds[i] < best - 2 * unsure()
                                          : bounds[i] == -std::numeric_limits<float>::infinity();
            if (below) continue;
            const double noise = noisy ? std::log(-std::log1p(-static_cast<double>(uniform(key, items[i])))) : 0.0;
            const double value = logits[i] - noise;
            if (value > best) {
                second = best, best = value, token = i;
            } else if (value > second) {
                second = value;
            }
        }
    }
    return token >= 0 && best - second > unsure() ? token : -1;
}

// Draw a token for each row of logits (rows, size), whose rows begin `stride` apart. Rows are shared among threads.
// items: (size). keys, steps, tokens: (rows). temperature: (rows), 0 for rows without noise; null if all have noise.
// Return the number of tokens that are -1; the caller lets torch draw them.
extern "C" int64_t textgen_draw(const float* logits, int64_t rows, int64_t size, int64_t stride, const int32_t* items,
                                const int64_t* keys, const int64_t* steps, const float* temperature, int64_t* tokens,
                                int threads) {
    int64_t left = 0;
    if (rows * size < 1 << 16) threads = 1;  // little work: waking threads would take longer
#pragma omp parallel num_threads(threads) if (threads > 1) reduction(+ : left)
    {
        std::vector<float> bounds;
#pragma omp for
        for (int64_t row = 0; row < rows; row++) {
            const auto key = static_cast<uint32_t>(mix(mix(keys[row]) ^ static_cast<uint64_t>(steps[row])));
            const bool noisy = temperature == nullptr || temperature[row] > 0;
            tokens[row] = draw_row(logits + row * stride, size, items, key, noisy, bounds);
            left += tokens[row] < 0;
        }
    }
    return left;
}

// Write (logits - their largest) / temperature to divided (rows, size), or the logits as they are if it is 1 (a
// temperature of 0 counts as 1 in the quotient). Rows are shared among threads; the first inner loop finds the largest
// logit of a row, the second one divides.
extern "C" void textgen_divide(const float* logits, int64_t rows, int64_t size, int64_t stride,
                               const float* temperature, float* divided, int threads) {
    if (rows * size < 1 << 16) threads = 1;
#pragma omp parallel for num_threads(threads) if (threads > 1)
    for (int64_t row = 0; row < rows; row++) {
        const float *from = logits + row * stride, by = temperature[row] > 0 ? temperature[row] : 1;
        float *to = divided + row * size, most = -std::numeric_limits<float>::infinity();
        if (temperature[row] == 1) {
            std::memcpy(to, from, size * sizeof(float));
            continue;
        }
#pragma omp simd reduction(max : most)
        for (int64_t i = 0; i < size; i++) most = from[i] > most ? from[i] : most;
        for (int64_t i = 0; i < size; i++) to[i] = (from[i] - most) / by;
    }
}

// Write logits to kept (rows, size), and -infinity for tokens whose bit in masks (rows, bytes) is not set. A row without
// any bit gets 0 for the token `eos`, so that its text ends.
extern "C" void textgen_keep_allowed(const float* logits, int64_t rows, int64_t size, int64_t stride,
                                     const uint8_t* masks, int64_t bytes, int64_t eos, float* kept, int threads) {
    if (rows * size < 1 << 16) threads = 1;
#pragma omp parallel for num_threads(threads) if (threads > 1)
    for (int64_t row = 0; row < rows; row++) {
        const float* from = logits + row * stride;
        const uint8_t* mask = masks + row * bytes;
        float* to = kept + row * size;
        uint8_t any = 0;
        for (int64_t i = 0; i < bytes; i++) any |= mask[i];
        const float none = -std::numeric_limits<float>::infinity();
        int64_t i = 0;
#ifdef __AVX512F__
        for (; i + 16 <= size; i += 16) {
            uint16_t bits;
            std::memcpy(&bits, mask + i / 8, sizeof(bits));
            _mm512_storeu_ps(to + i, _mm512_mask_loadu_ps(_mm512_set1_ps(none), bits, from + i));
        }
#endif
        for (; i < size; i++) {
            const float either[2] = {none, from[i]};  // a branch would be mispredicted for every other token
            to[i] = either[mask[i / 8] >> i % 8 & 1];
        }
        if (!any) to[eos] = 0;
    }
}

// Subtract penalties of a row from values (size), see textgen_penalize_repeats.
static void subtract_repeats(float* values, int64_t size, const int64_t* history, int64_t length, const bool* breaks,
                             float multiplier, float base, int64_t allowed, int64_t most) {
    thread_local std::vector<int64_t> counted;
    thread_local std::vector<float> powers, penalties;
    counted.resize(length), powers.resize(most + 1), penalties.assign(size, 0);
    double power = 1;  // torch's cumprod multiplies in double precision
    for (int64_t n = 0; n <= most; n++, power *= base) powers[n] = static_cast<float>(power);
    for (int64_t i = 0; i < length; i++) counted[i] = history[i] < 0 || breaks[history[i]] ? -1 : history[i];
    const int64_t last = counted[length - 1];
    for (int64_t place = most; place < length && last >= 0; place++) {
        if (counted[place - 1] != last) continue;
        int64_t n = 1;  // tokens before this place that are repeated at the end
        while (n < most && counted[place - 1 - n] >= 0 && counted[place - 1 - n] == counted[length - 1 - n]) n++;
        if (n < allowed) continue;
        float& largest = penalties[history[place] < 0 ? 0 : history[place]];
        largest = std::max(largest, multiplier * powers[n - allowed]);
    }
    for (int64_t i = 0; i < size; i++) values[i] -= penalties[i];
}

// sampling.penalize_repeats: write logits minus penalties to penalized (rows, size). history: (rows, length), -1 for an
// empty place. breaks: (rows, size). multiplier, base, allowed: (rows). Repetitions count up to `most` tokens.
extern "C" void textgen_penalize_repeats(const float* logits, int64_t rows, int64_t size, int64_t stride,
                                         const int64_t* history, int64_t length, const bool* breaks,
                                         const float* multiplier, const float* base, const int64_t* allowed,
                                         int64_t most, float* penalized, int threads) {
    if (rows * size < 1 << 16) threads = 1;
#pragma omp parallel for num_threads(threads) if (threads > 1)
    for (int64_t row = 0; row < rows; row++) {
        float* to = penalized + row * size;
        std::memcpy(to, logits + row * stride, size * sizeof(float));
        subtract_repeats(to, size, history + row * length, length, breaks + row * size, multiplier[row], base[row],
                         allowed[row], most);
    }
}

// sampling.exclude_top_choices, given the probabilities of the logits (rows, size). threshold, applies: (rows).
extern "C" void textgen_exclude(const float* logits, int64_t rows, int64_t size, int64_t stride,
                                const float* probabilities, const float* threshold, const bool* applies, float* kept,
                                int threads) {
    if (rows * size < 1 << 16) threads = 1;
#pragma omp parallel for num_threads(threads) if (threads > 1)
    for (int64_t row = 0; row < rows; row++) {
        const float *from = logits + row * stride, *likely = probabilities + row * size;
        const float none = -std::numeric_limits<float>::infinity(), from_on = threshold[row];
        float *to = kept + row * size, least = -none;
        std::memcpy(to, from, size * sizeof(float));
        if (!applies[row]) continue;
#pragma omp simd reduction(min : least)
        for (int64_t i = 0; i < size; i++) {
            const float above = likely[i] >= from_on && from[i] > none ? from[i] : -none;
            least = above < least ? above : least;
        }
        for (int64_t i = 0; i < size; i++) to[i] = likely[i] >= from_on && from[i] > least ? none : from[i];
    }
}

// noise.uniform(key, step, coordinate)
static inline float chance(int64_t key, int64_t step, int64_t coordinate) {
    const uint64_t bits = mix(mix(mix(key) ^ static_cast<uint64_t>(step)) ^ static_cast<uint64_t>(coordinate));
    return (static_cast<float>(bits >> 41) + 0.5f) * 0x1p-23f;
}

// The same of each row, to values (rows).
extern "C" void textgen_uniform(const int64_t* keys, const int64_t* steps, int64_t coordinate, int64_t rows,
                                float* values) {
    for (int64_t row = 0; row < rows; row++) values[row] = chance(keys[row], steps[row], coordinate);
}

// --- the step --------------------------------------------------------------------------------------------------------

// y = x @ weight.T * scale + offset, for x in 8 bits. Outputs are in panels of 64: of a layer, the four gates (input,
// forget, output, cell) of 16 units; else 64 outputs in a row, filled up with zeros.
struct Product {
    const int8_t* weight;  // (panels, inputs / 4, 64, 4)
    const float* scale;    // (panels, 64), of weights and inputs together
    const float* offset;   // (panels, 64): bias, and correction for inputs that are stored as 128 more than they are
    const float* bias;     // (panels, 64) if inputs are scaled per row; else null, and the bias is in the offset
    int64_t inputs, outputs;
};

struct Model {
    const Product* products;  // num_layers, then a projection if `projected`, then the output layer
    const uint16_t* table;    // bfloat16 (vocab_size, 4, hidden_size): part of the first layer's gates for each token
    int64_t num_layers, hidden_size, num_inputs, vocab_size;
    int64_t projected;  // 1 if there is a projection, else 0
    void* exp;          // torch's exp of 16 floats
};

#ifdef __AVX512VNNI__

typedef __m512 (*Exp)(__m512);

static const int64_t ROWS = 6;  // of a tile: 24 sums, 4 weights and an input fill 29 of the 32 registers

// A step of fewer multiplications runs in one thread. It takes less than 0.1 ms, and threads wait for each other after
// each product: beside other work until the processor is given to both.
static const int64_t SMALL_STEP = 1 << 22;

static inline __m512 sigmoid(Exp exp, __m512 x) {  // 1 / (1 + exp(-x)), in torch's order of operations
    const __m512 power = exp(_mm512_sub_ps(_mm512_setzero_ps(), x));
    return _mm512_div_ps(_mm512_set1_ps(1), _mm512_add_ps(_mm512_set1_ps(1), power));
}

static inline __m512 tanh(Exp exp, __m512 x) {  // 2 sigmoid(2x) - 1, as the plain decoder computes it
    const __m512 half = sigmoid(exp, _mm512_add_ps(x, x));
    return _mm512_sub_ps(_mm512_add_ps(half, half), _mm512_set1_ps(1));
}

// Round to integers from -127 to 127 and add 128: vpdpbusd multiplies unsigned bytes with signed ones.
static inline __m128i bytes(__m512 x) {
    return _mm512_cvtepi32_epi8(_mm512_add_epi32(_mm512_cvtps_epi32(x), _mm512_set1_epi32(128)));
}

static inline void store_hidden(uint8_t* to, __m512 x) {  // hidden states are in -1..1, hence the scale 127
    _mm_storeu_si128(reinterpret_cast<__m128i*>(to), bytes(_mm512_mul_ps(x, _mm512_set1_ps(127))));
}

// Write to y (R, 64) the product of R rows with a panel of 64 outputs, scaled and offset.
// x: unsigned bytes, rows `stride` apart. Four inputs are outermost: their 64 x 4 weights (4 registers) are loaded once
// and used for all R rows. vpdpbusd adds the products of 4 inputs and 4 weights to each of 16 sums.
template <int R>
static inline void multiply(const Product& product, int64_t panel, const uint8_t* x, int64_t stride, float* y) {
    const int8_t* weight = product.weight + panel * 64 * product.inputs;
    __m512i sums[R][4];  // stays in registers only if all loops over it are unrolled
#pragma GCC unroll 8
    for (int r = 0; r < R; r++)
#pragma GCC unroll 4
        for (int j = 0; j < 4; j++) sums[r][j] = _mm512_setzero_si512();
    for (int64_t k = 0; k < product.inputs; k += 4, weight += 256) {
        __m512i w[4];
#pragma GCC unroll 4
        for (int j = 0; j < 4; j++) w[j] = _mm512_loadu_si512(weight + 64 * j);
#pragma GCC unroll 8
        for (int r = 0; r < R; r++) {
            int32_t four;
            std::memcpy(&four, x + r * stride + k, 4);
            const __m512i same = _mm512_set1_epi32(four);
#pragma GCC unroll 4
            for (int j = 0; j < 4; j++)  // with the intrinsic GCC 12 keeps half of the sums in memory
                asm("vpdpbusd %2, %1, %0" : "+v"(sums[r][j]) : "v"(same), "v"(w[j]));
        }
    }
#pragma GCC unroll 4
    for (int j = 0; j < 4; j++) {
        const __m512 scale = _mm512_loadu_ps(product.scale + panel * 64 + 16 * j);
        const __m512 offset = _mm512_loadu_ps(product.offset + panel * 64 + 16 * j);
#pragma GCC unroll 8
        for (int r = 0; r < R; r++) {
            const __m512 sum = _mm512_mul_ps(_mm512_cvtepi32_ps(sums[r][j]), scale);
            _mm512_storeu_ps(y + r * 64 + 16 * j, _mm512_add_ps(sum, offset));
        }
    }
}

// The number of rows as a template argument.
static void multiply(int64_t rows, const Product& product, int64_t panel, const uint8_t* x, int64_t stride, float* y) {
    switch (rows) {
        case 1: return multiply<1>(product, panel, x, stride, y);
        case 2: return multiply<2>(product, panel, x, stride, y);
        case 3: return multiply<3>(product, panel, x, stride, y);
        case 4: return multiply<4>(product, panel, x, stride, y);
        case 5: return multiply<5>(product, panel, x, stride, y);
        default: return multiply<6>(product, panel, x, stride, y);
    }
}

// Read a token per row. before: for each layer hidden and cell, separate arrays (rows, hidden_size). after: the new
// state, one array (num_layers, 2, rows, hidden_size). logits: (rows, vocab_size). Return 1; or 0 if some token is not
// in the vocabulary, and nothing is written.
extern "C" int textgen_step(const Model* model, int64_t rows, const int64_t* tokens, const float* const* before,
                            float* after, float* logits, int threads) {
    const int64_t size = model->hidden_size, layers = model->num_layers, part = rows * size;
    for (int64_t row = 0; row < rows; row++)
        if (tokens[row] < 0 || tokens[row] >= model->num_inputs) return 0;
    if (rows == 0) return 1;
    const int64_t chunks = (rows + ROWS - 1) / ROWS, height = (rows + chunks - 1) / chunks;  // even tiles
    const Exp exp = reinterpret_cast<Exp>(model->exp);
    const Product* products = model->products;
    const Product& output = products[layers + model->projected];
    int64_t num_weights = 0;
    for (int64_t i = 0; i <= layers + model->projected; i++) num_weights += products[i].inputs * products[i].outputs;
    if (rows * num_weights < SMALL_STEP) threads = 1;
    // Inputs of the products, in bytes. Of layer 0: hidden (rows, hidden_size), as its token's part is in the table. Of
    // each further layer: (rows, 2, hidden_size), the new hidden state of the layer below and its own old one. Then the
    // new hidden state of the last layer (rows, hidden_size), and after a projection its result (rows, inputs).
    thread_local std::vector<uint8_t> whole_memory;
    thread_local std::vector<float> projected_memory;
    whole_memory.resize(part * 2 * layers + rows * output.inputs);
    projected_memory.resize(rows * (output.inputs + 1));
    uint8_t* const whole = whole_memory.data();
    float *const projected = projected_memory.data(), *const row_scales = projected + rows * output.inputs;
    const auto inputs_of = [&](int64_t layer) { return whole + (layer == 0 ? 0 : part * (2 * layer - 1)); };

#pragma omp parallel num_threads(threads) if (threads > 1)
    {
        float y[ROWS * 64];  // a tile's product
        // Old hidden states to bytes, into the second half of each layer's inputs (layer 0 has no first half).
#pragma omp for collapse(2)
        for (int64_t layer = 0; layer < layers; layer++)
            for (int64_t row = 0; row < rows; row++) {
                const float* from = before[2 * layer] + row * size;
                uint8_t* to = inputs_of(layer) + (layer == 0 ? row * size : (2 * row + 1) * size);
                for (int64_t i = 0; i < size; i += 16) store_hidden(to + i, _mm512_loadu_ps(from + i));
            }
        for (int64_t layer = 0; layer < layers; layer++) {
            const int64_t stride = products[layer].inputs, next_stride = layer + 1 < layers ? 2 * size : size;
            // A layer: panels of 16 units are shared among threads. All rows are multiplied with a panel, tile by tile,
            // while its weights are in the cache. The barrier after the loop completes the inputs of the next layer.
#pragma omp for
            for (int64_t panel = 0; panel < size / 16; panel++)
                for (int64_t first = 0; first < rows; first += height) {
                    const int64_t count = rows - first < height ? rows - first : height;
                    multiply(count, products[layer], panel, inputs_of(layer) + first * stride, stride, y);
                    // gates to cell and hidden state, 16 units of a row at a time
                    for (int64_t r = 0; r < count; r++) {
                        const int64_t row = first + r, place = row * size + panel * 16;
                        __m512 gates[4];  // input, forget, output, cell
                        for (int j = 0; j < 4; j++) {
                            gates[j] = _mm512_loadu_ps(y + r * 64 + 16 * j);
                            if (layer > 0) continue;
                            // the token's part of the gates: bfloat16, the upper half of a float32
                            const uint16_t* entry = model->table + (tokens[row] * 4 + j) * size + panel * 16;
                            const __m256i half = _mm256_loadu_si256(reinterpret_cast<const __m256i*>(entry));
                            const __m512i wide = _mm512_slli_epi32(_mm512_cvtepu16_epi32(half), 16);
                            gates[j] = _mm512_add_ps(gates[j], _mm512_castsi512_ps(wide));
                        }
                        const __m512 old = _mm512_loadu_ps(before[2 * layer + 1] + place);
                        const __m512 kept = _mm512_mul_ps(sigmoid(exp, gates[1]), old);
                        const __m512 entered = sigmoid(exp, gates[0]);
                        const __m512 cell = _mm512_fmadd_ps(entered, tanh(exp, gates[3]), kept);
                        const __m512 hidden = _mm512_mul_ps(sigmoid(exp, gates[2]), tanh(exp, cell));
                        _mm512_storeu_ps(after + 2 * layer * part + place, hidden);
                        _mm512_storeu_ps(after + (2 * layer + 1) * part + place, cell);
                        store_hidden(inputs_of(layer + 1) + row * next_stride + panel * 16, hidden);
                    }
                }
        }
        uint8_t* last = inputs_of(layers);
        if (model->projected) {
            const Product& product = products[layers];
            // The projection, to `projected` (rows, outputs), as above. The last panel may be narrower than 64 outputs.
#pragma omp for
            for (int64_t panel = 0; panel < (product.outputs + 63) / 64; panel++)
                for (int64_t first = 0; first < rows; first += height) {
                    const int64_t count = rows - first < height ? rows - first : height;
                    multiply(count, product, panel, last + first * size, size, y);
                    const int64_t width = product.outputs - panel * 64 < 64 ? product.outputs - panel * 64 : 64;
                    for (int64_t r = 0; r < count; r++)
                        std::memcpy(projected + (first + r) * product.outputs + panel * 64, y + r * 64, width * 4);
                }
            last += part;
            // Its result has no fixed range: each row is scaled by its own largest value, then rounded to bytes.
#pragma omp for
            for (int64_t row = 0; row < rows; row++) {
                const float* from = projected + row * output.inputs;
                __m512 most = _mm512_setzero_ps();
                for (int64_t i = 0; i < output.inputs; i += 16)
                    most = _mm512_max_ps(most, _mm512_abs_ps(_mm512_loadu_ps(from + i)));
                const float scale = _mm512_reduce_max_ps(most) / 127;
                row_scales[row] = scale > std::numeric_limits<float>::min() ? scale : std::numeric_limits<float>::min();
                for (int64_t i = 0; i < output.inputs; i += 16) {
                    const __m512 x = _mm512_div_ps(_mm512_loadu_ps(from + i), _mm512_set1_ps(row_scales[row]));
                    _mm_storeu_si128(reinterpret_cast<__m128i*>(last + row * output.inputs + i), bytes(x));
                }
            }
        }
        // The output layer, to logits (rows, vocab_size), as above; rows with a scale get it here, and then the bias.
#pragma omp for
        for (int64_t panel = 0; panel < (output.outputs + 63) / 64; panel++)
            for (int64_t first = 0; first < rows; first += height) {
                const int64_t count = rows - first < height ? rows - first : height;
                multiply(count, output, panel, last + first * output.inputs, output.inputs, y);
                const int64_t width = output.outputs - panel * 64 < 64 ? output.outputs - panel * 64 : 64;
                for (int64_t r = 0; r < count; r++) {
                    float* to = logits + (first + r) * output.outputs + panel * 64;
                    if (model->projected) {
                        const __m512 scale = _mm512_set1_ps(row_scales[first + r]);
                        for (int64_t i = r * 64; i < r * 64 + 64; i += 16) {
                            const __m512 bias = _mm512_loadu_ps(output.bias + panel * 64 + i - r * 64);
                            const __m512 scaled = _mm512_mul_ps(_mm512_loadu_ps(y + i), scale);
                            _mm512_storeu_ps(y + i, _mm512_add_ps(scaled, bias));
                        }
                    }
                    std::memcpy(to, y + r * 64, width * sizeof(float));
                }
            }
    }
    return 1;
}


// --- many steps ------------------------------------------------------------------------------------------------------

// How the rows of a chunk draw their tokens. A null pointer: no row has that setting. (rows) or (rows, vocab_size).
struct Rows {
    const int32_t* items;  // hash of each token (vocab_size)
    const int64_t* keys;
    int64_t* steps;          // number of drawn tokens
    const int64_t* lengths;  // number of tokens until a row ends
    const int64_t* scaled_rows;  // (num_scaled): rows that have a twin without their label, whose logits scale theirs
    const int64_t* kept_rows;    // (num_kept): rows whose logits of each step are kept
    const float *temperature, *top_p, *min_p;  // min_p: its logarithm
    const int64_t *top_k, *min_new_tokens;
    const float* bias;
    const uint8_t* banned;
    uint8_t* seen;
    int32_t* counts;
    const float *repetition_penalty, *presence_penalty, *frequency_penalty;
    const float *dry_multiplier, *dry_base;
    const int64_t* dry_allowed_length;
    const bool* breaks;
    int64_t* history;  // (rows, history_length)
    const float *xtc_probability, *xtc_threshold, *label_scale;
    int64_t unk, eos, history_length, repeat_length, xtc_noise, num_scaled, num_kept;
};

struct Scratch {  // memory of a thread
    std::vector<float> bounds, values, powers, some, their_powers, sorted;
};

// Write the elements of x that a mask chooses to `to`, and anything after them; return their number. (An instruction that
// writes them alone takes 100 cycles on some processors.)
static inline int64_t store_chosen(float* to, __mmask16 chosen, __m512 x) {
    _mm512_storeu_ps(to, _mm512_maskz_compress_ps(chosen, x));
    return _mm_popcnt_u32(chosen);
}

// Return the k-th largest of values (size), a multiple of 16; k <= size. At least k values reach the k-th largest of the
// maxima of blocks, and few others do, so only these are sorted.
static float kth_largest(const float* values, int64_t size, int64_t k, std::vector<float>& some) {
    const int64_t blocks = size / 16;
    some.resize(blocks + size + 16);
    float *maxima = some.data(), *reaching = maxima + blocks;
    for (int64_t b = 0; b < blocks; b++) maxima[b] = _mm512_reduce_max_ps(_mm512_loadu_ps(values + 16 * b));
    float least = -std::numeric_limits<float>::infinity();
    if (k <= blocks) {
        std::nth_element(maxima, maxima + k - 1, maxima + blocks, std::greater<float>());
        least = maxima[k - 1];
    }
    int64_t count = 0;
    for (int64_t i = 0; i < size; i += 16) {
        const __m512 x = _mm512_loadu_ps(values + i);
        count += store_chosen(reaching + count, _mm512_cmp_ps_mask(x, _mm512_set1_ps(least), _CMP_GE_OQ), x);
    }
    std::nth_element(reaching, reaching + k - 1, reaching + count, std::greater<float>());
    return reaching[k - 1];
}

struct Above {
    double sum;     // of the powers
    int64_t count;  // of the values
};

// Return the sum of the powers of values from `least` on.
static Above above(const float* values, const float* powers, int64_t size, float least) {
    __m512d sums[2] = {_mm512_setzero_pd(), _mm512_setzero_pd()};
    int64_t count = 0;
    for (int64_t i = 0; i < size; i += 16) {
        const __mmask16 reaches =
            _mm512_cmp_ps_mask(_mm512_loadu_ps(values + i), _mm512_set1_ps(least), _CMP_GE_OQ);
        const __m512 power = _mm512_maskz_loadu_ps(reaches, powers + i);
        sums[0] = _mm512_add_pd(sums[0], _mm512_cvtps_pd(_mm512_castps512_ps256(power)));
        sums[1] = _mm512_add_pd(sums[1], _mm512_cvtps_pd(_mm512_extractf32x8_ps(power, 1)));
        count += _mm_popcnt_u32(reaches);
    }
    return {_mm512_reduce_add_pd(_mm512_add_pd(sums[0], sums[1])), count};
}

struct Limits {
    float possible, sure;  // a value below `possible` is left out; one from `sure` on is kept; torch decides in between
};

// Return the limits of top-p for values (size), a multiple of 16, of which those below `kept` are left out already.
// torch adds rounded probabilities, so the sum at which it stops may be a little above or below p. The error of their
// sum, relative to it, comes from the logarithm of the total (a float32 of up to `most` + 12) and from exp.
static Limits keep_top_p(const float* values, int64_t size, float kept, float most, float p, Exp exp,
                         Scratch& scratch) {
    const float none = -std::numeric_limits<float>::infinity();
    scratch.powers.resize(size);
    float* powers = scratch.powers.data();
    for (int64_t i = 0; i < size; i += 16) {
        const __m512 x = _mm512_loadu_ps(values + i);
        const __mmask16 reaches = _mm512_cmp_ps_mask(x, _mm512_set1_ps(kept), _CMP_GE_OQ);
        const __m512 power = exp(_mm512_sub_ps(x, _mm512_set1_ps(most)));
        _mm512_storeu_ps(powers + i, _mm512_maskz_mov_ps(reaches, power));
    }
    const Above all = above(values, powers, size, none);
    const double error = 0x1p-15 + std::fabs(most) * 0x1p-20;
    const double low = p * all.sum * (1 - error), high = p * all.sum * (1 + error);
    // Search the interval [from, to) with both limits: sum of all from `to` on < low, sum of all from `from` on >= high.
    float from = none, to = std::numeric_limits<float>::infinity();
    Above upper = {0, 0}, lower = all;
    float next = most - 1;
    for (int tries = 0; tries < 40 && lower.count - upper.count > 32; tries++) {
        const Above tried = above(values, powers, size, next);
        if (tried.sum < low) {
            to = next, upper = tried;
        } else if (tried.sum >= high) {
            if (from == none) {  // from now on only the values from `from` on count
                scratch.some.resize(tried.count + 32);
                scratch.their_powers.resize(tried.count + 32);
                float *some = scratch.some.data(), *their_powers = scratch.their_powers.data();
                int64_t count = 0;
                for (int64_t i = 0; i < size; i += 16) {
                    const __m512 x = _mm512_loadu_ps(values + i);
                    const __mmask16 chosen = _mm512_cmp_ps_mask(x, _mm512_set1_ps(next), _CMP_GE_OQ);
                    store_chosen(their_powers + count, chosen, _mm512_loadu_ps(powers + i));
                    count += store_chosen(some + count, chosen, x);
                }
                _mm512_storeu_ps(some + count, _mm512_set1_ps(none));
                values = some, powers = their_powers, size = (count + 15) / 16 * 16;
            }
            from = next, lower = tried;
        } else {
            break;
        }
        next = from == none ? most - 2 * (most - to) : from + (std::min(to, most) - from) / 2;
        if (next == from || next == to) break;
    }
    // Sort the values in it.
    scratch.sorted.resize(lower.count - upper.count + 16);
    float* sorted = scratch.sorted.data();
    int64_t count = 0;
    for (int64_t i = 0; i < size; i += 16) {
        const __m512 x = _mm512_loadu_ps(values + i);
        const __mmask16 inside = _mm512_cmp_ps_mask(x, _mm512_set1_ps(from), _CMP_GE_OQ) &
                                 _mm512_cmp_ps_mask(x, _mm512_set1_ps(to), _CMP_LT_OQ);
        count += store_chosen(sorted + count, inside, x);
    }
    std::sort(sorted, sorted + count, std::greater<float>());
    Limits limits = {none, none};
    double sum = upper.sum;
    bool found = false;
    for (int64_t i = 0; i < count; i++) {
        if (sorted[i] < kept) break;
        sum += std::exp(sorted[i] - most);
        if (!found && sum >= low) limits.sure = sorted[i], found = true;
        if (sum >= high) {
            limits.possible = sorted[i];
            break;
        }
    }
    return limits;
}

// Return the least value whose probability reaches the threshold of XTC, of values (size), a multiple of 16, that
// `kept` keeps; +infinity if none does; nan if rounding may decide. torch adds the same powers in float32, in at least 8
// sums, with some of the values in doubt: its sum lies between that of the surely kept and that of all possible ones.
static float least_choice(const float* values, int64_t size, Limits kept, float most, float threshold, Exp exp,
                          Scratch& scratch) {
    scratch.powers.resize(size);
    float *powers = scratch.powers.data(), least = std::numeric_limits<float>::infinity();
    double sum = 0, doubtful = 0;
    for (int64_t i = 0; i < size; i += 16) {
        const __m512 x = _mm512_loadu_ps(values + i);
        const __mmask16 reaches = _mm512_cmp_ps_mask(x, _mm512_set1_ps(kept.possible), _CMP_GE_OQ);
        const __mmask16 surely = _mm512_cmp_ps_mask(x, _mm512_set1_ps(kept.sure), _CMP_GE_OQ);
        const __m512 power = _mm512_maskz_mov_ps(reaches, exp(_mm512_sub_ps(x, _mm512_set1_ps(most))));
        _mm512_storeu_ps(powers + i, power);
        sum += _mm512_mask_reduce_add_ps(surely, power);
        if (reaches != surely) doubtful += _mm512_mask_reduce_add_ps(reaches & ~surely, power);
    }
    const double error = 0x1p-15 + size * 0x1p-27;
    const double sure = threshold * (sum + doubtful) * (1 + error), possible = threshold * sum * (1 - error);
    if (threshold > 0 && threshold < 1e-30f) return std::nanf("");
    for (int64_t i = 0; i < size; i++) {
        if (values[i] < kept.possible || values[i] == -std::numeric_limits<float>::infinity()) continue;
        if (powers[i] < possible) continue;
        if (powers[i] < sure || values[i] < kept.sure) return std::nanf("");
        least = std::min(least, values[i]);
    }
    return least;
}

// Draw a token of a row from the model's logits (size), as sampling.process_logits and sampling.draw do; -1 if rounding
// may change the token.
static int64_t draw_token(float* logits, int64_t size, const Rows& rows, int64_t row, Exp exp, Scratch& scratch) {
    const float none = -std::numeric_limits<float>::infinity();
    const auto key = static_cast<uint32_t>(mix(mix(rows.keys[row]) ^ static_cast<uint64_t>(rows.steps[row])));
    const float temperature = rows.temperature == nullptr ? 1 : rows.temperature[row];
    const int64_t top_k = rows.top_k == nullptr || rows.top_k[row] >= size ? 0 : rows.top_k[row];  // 0: off
    const float top_p = rows.top_p == nullptr ? 1 : rows.top_p[row];
    const bool excludes = rows.xtc_probability != nullptr &&
                          chance(rows.keys[row], rows.steps[row], rows.xtc_noise) < rows.xtc_probability[row];
    const bool filtered = top_k > 0 || top_p < 1 || rows.min_p != nullptr || excludes;
    logits[rows.unk] = none;
    if (!filtered && temperature == 1 && rows.bias == nullptr && rows.banned == nullptr && rows.seen == nullptr &&
        rows.counts == nullptr && rows.dry_multiplier == nullptr && rows.min_new_tokens == nullptr)
        return draw_row(logits, size, rows.items, key, true, scratch.bounds);

    const int64_t whole = (size + 15) / 16 * 16;
    scratch.values.assign(whole, none);
    float* values = scratch.values.data();
    std::memcpy(values, logits, size * sizeof(float));
    // in the order of sampling.process_logits
    if (rows.bias != nullptr) {
        const float* bias = rows.bias + row * size;
        for (int64_t i = 0; i < size; i++) values[i] += bias[i];
    }
    if (rows.seen != nullptr) {
        const uint8_t* seen = rows.seen + row * size;
        const float penalty = rows.repetition_penalty[row];
        for (int64_t i = 0; i < size; i++) {
            const float changed = values[i] > 0 ? values[i] / penalty : values[i] * penalty;
            values[i] = seen[i] ? changed : values[i];
        }
    }
    if (rows.counts != nullptr) {
        const int32_t* counts = rows.counts + row * size;
        const float presence = rows.presence_penalty == nullptr ? 0 : rows.presence_penalty[row];
        const float frequency = rows.frequency_penalty == nullptr ? 0 : rows.frequency_penalty[row];
        for (int64_t i = 0; i < size; i++) {
            const float once = values[i] - presence * static_cast<float>(counts[i] > 0);
            values[i] = once - frequency * static_cast<float>(counts[i]);
        }
    }
    if (rows.dry_multiplier != nullptr && rows.dry_multiplier[row] > 0)
        subtract_repeats(values, size, rows.history + row * rows.history_length, rows.history_length,
                         rows.breaks + row * size, rows.dry_multiplier[row], rows.dry_base[row],
                         rows.dry_allowed_length[row], rows.repeat_length);
    if (rows.banned != nullptr) {
        const uint8_t* banned = rows.banned + row * size;
        for (int64_t i = 0; i < size; i++) values[i] = banned[i] ? none : values[i];
    }
    if (rows.min_new_tokens != nullptr && rows.steps[row] < rows.min_new_tokens[row]) values[rows.eos] = none;

    float most = none;
    int strange = 0;  // some value is infinite or nan
#pragma omp simd reduction(max : most) reduction(| : strange)
    for (int64_t i = 0; i < size; i++) {
        most = values[i] > most ? values[i] : most;
        strange |= !(values[i] <= std::numeric_limits<float>::max());
    }
    if (strange || most == none) return -1;
    if (temperature != 1) {
        const float by = temperature > 0 ? temperature : 1;
        for (int64_t i = 0; i < size; i++) values[i] = (values[i] - most) / by;
        most = 0;
    }
    if (!filtered) return draw_row(values, size, rows.items, key, temperature > 0, scratch.bounds);

    Limits limits = {none, none};
    if (top_k > 0) limits.possible = limits.sure = kth_largest(values, whole, top_k, scratch.some);
    if (top_p < 1) {
        const Limits nucleus = keep_top_p(values, whole, limits.sure, most, top_p, exp, scratch);
        limits = {std::max(limits.possible, nucleus.possible), std::max(limits.sure, nucleus.sure)};
    }
    if (rows.min_p != nullptr) {
        const float least = most + rows.min_p[row];
        limits = {std::max(limits.possible, least), std::max(limits.sure, least)};
    }
    float least = std::numeric_limits<float>::infinity();
    if (excludes) {
        least = least_choice(values, whole, limits, most, rows.xtc_threshold[row], exp, scratch);
        if (std::isnan(least)) return -1;
    }
    // Draw from all tokens that may be kept. If the drawn one is surely kept, it is also drawn without the others.
    float* drawable = scratch.values.data();
    for (int64_t i = 0; i < size; i++)
        drawable[i] = values[i] >= limits.possible && values[i] <= least ? values[i] : none;
    const int64_t token = draw_row(drawable, size, rows.items, key, temperature > 0, scratch.bounds);
    return token >= 0 && drawable[token] >= limits.sure ? token : -1;
}

// Draw up to `most_steps` tokens of each row. Stop early after a step in which some row has to be drawn by torch, or
// `most_ended` rows or more have ended, or after `seconds`, or if *halt is not 0.
// After the rows come the twins of `scaled_rows`, which read the tokens of their rows.
// tokens: (most_steps + 1, rows and twins): first the tokens that the first step reads, then the drawn ones: -1 for a row
// that has to be drawn by torch, the end-of-text token for a row that has ended in an earlier step. before: as
// textgen_step's. state: the new state (num_layers, 2, rows and twins, hidden_size). logits: of the last step (rows and
// twins, vocab_size). kept: the model's logits of each step (most_steps, num_kept, vocab_size).
// Return the number of steps; negative if torch has to draw, and tokens of the last step are then not recorded in
// `rows`; 0 if a token is not in the vocabulary.
extern "C" int64_t textgen_draw_many(const Model* model, const Rows* rows, int64_t num_rows, int64_t most_steps,
                                     int64_t most_ended, double seconds, const volatile int32_t* halt,
                                     int64_t* tokens, const float* const* before, float* state, float* logits,
                                     float* kept, int threads) {
    const int64_t vocab_size = model->vocab_size, width = num_rows + rows->num_scaled;
    const int64_t part = width * model->hidden_size;
    const Exp exp = reinterpret_cast<Exp>(model->exp);
    const auto started = std::chrono::steady_clock::now();
    std::vector<const float*> parts(2 * model->num_layers);
    for (int64_t i = 0; i < 2 * model->num_layers; i++) parts[i] = state + i * part;
    std::vector<uint8_t> ended(num_rows, 0);
    const int drawing = num_rows * vocab_size < 1 << 16 ? 1 : threads;
    for (int64_t step = 1; step <= most_steps; step++, tokens += width) {
        // a step may write its state over the one that it reads
        if (!textgen_step(model, width, tokens, step == 1 ? before : parts.data(), state, logits, threads)) return 0;
        for (int64_t i = 0; i < rows->num_kept; i++, kept += vocab_size)
            std::memcpy(kept, logits + rows->kept_rows[i] * vocab_size, vocab_size * sizeof(float));
        for (int64_t i = 0; i < rows->num_scaled; i++) {  // sampling.scale_label
            const int64_t row = rows->scaled_rows[i];
            float* with = logits + row * vocab_size;
            const float *without = logits + (num_rows + i) * vocab_size, scale = rows->label_scale[row];
            for (int64_t j = 0; j < vocab_size; j++) with[j] = without[j] + scale * (with[j] - without[j]);
        }
        int64_t* drawn = tokens + width;
        int64_t left = 0;
#pragma omp parallel num_threads(drawing) if (drawing > 1) reduction(+ : left)
        {
            thread_local Scratch scratch;
#pragma omp for schedule(dynamic)
            for (int64_t row = 0; row < num_rows; row++) {
                drawn[row] = ended[row] ? rows->eos
                                        : draw_token(logits + row * vocab_size, vocab_size, *rows, row, exp, scratch);
                left += drawn[row] < 0;
            }
        }
        for (int64_t i = 0; i < rows->num_scaled; i++) drawn[num_rows + i] = drawn[rows->scaled_rows[i]];
        if (left) return -step;
        int64_t num_ended = 0;
        for (int64_t row = 0; row < num_rows; row++) {
            if (!ended[row]) {
                rows->steps[row]++;
                if (rows->seen != nullptr) rows->seen[row * vocab_size + drawn[row]] = 1;
                if (rows->counts != nullptr) rows->counts[row * vocab_size + drawn[row]]++;
                if (rows->history != nullptr) {
                    int64_t* history = rows->history + row * rows->history_length;
                    std::memmove(history, history + 1, (rows->history_length - 1) * sizeof(int64_t));
                    history[rows->history_length - 1] = drawn[row];
                }
                ended[row] = drawn[row] == rows->eos || step >= rows->lengths[row];
            }
            num_ended += ended[row];
        }
        const std::chrono::duration<double> taken = std::chrono::steady_clock::now() - started;
        if (step == most_steps || num_ended >= most_ended || taken.count() > seconds || *halt) return step;
    }
    return most_steps;
}

#endif
