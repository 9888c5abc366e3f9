// An LSTM layer over a window, forward and backward, and cross-entropy with its gradient: see training.py.
// For processors with registers of 512 bits; the LSTM for those that multiply bfloat16 in them. Products are summed in
// float32. The order of each sum does not depend on the number of threads; only the gradient of the output bias is summed
// thread by thread.

#ifndef __AVX512F__
#error "the compiler knows no registers of 512 bits of this processor"
#endif

#include <immintrin.h>
#include <omp.h>

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <cstring>
#include <vector>

typedef uint16_t bf16;

static const long LANES = 16;  // float32 values of a register
static const long BLOCK = 4;   // registers side by side: the four gates of 16 units, or 64 units
static const long ROWS = 6;    // lanes of a tile: 6 x 4 sums, 4 weights and an input fill 29 of the 32 registers

static inline __m512 all(float x) { return _mm512_set1_ps(x); }
static inline __m512 load(const float* p) { return _mm512_loadu_ps(p); }
static inline __m512 load(const bf16* p) {  // a bfloat16 is the upper half of a float32
    const __m512i wide = _mm512_cvtepu16_epi32(_mm256_loadu_si256(reinterpret_cast<const __m256i*>(p)));
    return _mm512_castsi512_ps(_mm512_slli_epi32(wide, 16));
}
// Round to bfloat16: to the nearest, ties to even, subnormal values to zero; nan stays nan.
static inline __m256i rounded(__m512 x) {
#ifdef __AVX512BF16__
    return reinterpret_cast<__m256i>(_mm512_cvtneps_pbh(x));
#else  // the same bits by integers
    const __m512i bits = _mm512_castps_si512(x), size = _mm512_and_si512(bits, _mm512_set1_epi32(0x7fffffff));
    const __m512i odd = _mm512_and_si512(_mm512_srli_epi32(bits, 16), _mm512_set1_epi32(1));
    __m512i sum = _mm512_add_epi32(bits, _mm512_add_epi32(odd, _mm512_set1_epi32(0x7fff)));
    const __mmask16 subnormal = _mm512_cmplt_epi32_mask(size, _mm512_set1_epi32(0x00800000));
    sum = _mm512_mask_andnot_epi32(sum, subnormal, _mm512_set1_epi32(0x7fffffff), bits);  // the sign
    sum = _mm512_mask_or_epi32(sum, _mm512_cmp_ps_mask(x, x, _CMP_UNORD_Q), bits, _mm512_set1_epi32(0x00400000));
    return _mm512_cvtepi32_epi16(_mm512_srli_epi32(sum, 16));
#endif
}
static inline void store(float* p, __m512 x) { _mm512_storeu_ps(p, x); }
static inline void store(bf16* p, __m512 x) { _mm256_storeu_si256(reinterpret_cast<__m256i*>(p), rounded(x)); }

// 2^n e^r, with e^r by Taylor's polynomial for |r| <= ln(2) / 2: within 3e-7 of e^x, relatively
static inline __m512 exponential(__m512 x) {
    x = _mm512_min_ps(all(88.0f), _mm512_max_ps(all(-87.0f), x));  // in this order nan stays nan
    const int nearest = _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC;
    const __m512 n = _mm512_roundscale_ps(_mm512_mul_ps(x, all(1.44269504f)), nearest);
    // r = x - n ln(2), with ln(2) in two parts (Cody and Waite 1980): the first has few digits, n times it is exact
    const __m512 r = _mm512_fnmadd_ps(n, all(1.42860677e-6f), _mm512_fnmadd_ps(n, all(0.693145752f), x));
    __m512 sum = all(1.0f / 720);
    for (const float term : {1.0f / 120, 1.0f / 24, 1.0f / 6, 0.5f, 1.0f, 1.0f})
        sum = _mm512_fmadd_ps(sum, r, all(term));
    return _mm512_scalef_ps(sum, n);
}
static inline __m512 sigmoid(__m512 x) {
    return _mm512_div_ps(all(1), _mm512_add_ps(all(1), exponential(_mm512_sub_ps(all(0), x))));
}
static inline __m512 hyperbolic_tangent(__m512 x) {  // 2 sigmoid(2x) - 1
    const __m512 far = _mm512_fmsub_ps(all(2), sigmoid(_mm512_add_ps(x, x)), all(1));
    // near 0 digits of 2 sigmoid(2x) - 1 would cancel; the series x - x^3 / 3 is used there
    const __m512 near = _mm512_fnmadd_ps(_mm512_mul_ps(_mm512_mul_ps(x, x), x), all(1.0f / 3), x);
    return _mm512_mask_blend_ps(_mm512_cmp_ps_mask(_mm512_abs_ps(x), all(0.02f), _CMP_LT_OQ), far, near);
}

// --- the LSTM --------------------------------------------------------------------------------------------------------

#ifdef __AVX512BF16__

// Arguments of a call; _WindowArguments in training.py has the same fields. Arrays are row-major. A unit is one of the
// hidden_size components of hidden state and cell. Gates are in torch's order: input, forget, cell, output.
struct WindowArguments {
    int64_t lanes, steps, input_size, hidden_size;
    const float* weight_ih;     // (4 * hidden_size, input_size)
    const float* weight_hh;     // (4 * hidden_size, hidden_size)
    const float* bias;          // (4 * hidden_size)
    bf16* inputs;               // (lanes, steps, input_size + hidden_size): input, and hidden state before the step
    bf16* outputs;              // (lanes, steps, hidden_size): hidden state after each step
    bf16* gates;                // (lanes, steps, 4 * hidden_size), or null; backward overwrites them by gradients
    bf16* cells;                // (lanes, steps, hidden_size): cell after each step, or null
    float* cell;                // (lanes, hidden_size): before the window; forward updates it, backward reads it
    const bf16* grad_outputs;   // (lanes, steps, hidden_size)
    float* grad_hidden;         // (lanes, hidden_size): of the hidden state after the window
    float* grad_cell;           // (lanes, hidden_size): of the cell after the window; updated to that before it
    float* grad_bias;           // (4 * hidden_size), zeros at first
    bf16* packed;               // scratch memory for the weights in the order that `multiply` reads
    bf16* tiles;                // scratch memory for the inputs of a step, if AMX multiplies; null: registers do
    int64_t threads;
};

// Add to sums[row][z] the product of R rows with a block of weights: R x BLOCK registers of LANES outputs each.
// rows: bfloat16, `stride` apart, `size` values each. packed: (size / 2, BLOCK, LANES, 2), that is, for each pair of
// inputs one register per z, with the weights of both inputs side by side, as vdpbf16ps multiplies and adds them.
// The pair of inputs is outermost: its weights are loaded once and used for all rows, and sums stay in registers.
template <long R>
static inline void multiply(__m512 (&sums)[ROWS][BLOCK], const bf16* rows, long stride, const bf16* packed, long size) {
    for (long k = 0; k < size; k += 2, packed += 2 * BLOCK * LANES) {
        __m512bh weights[BLOCK];
        for (long z = 0; z < BLOCK; z++)
            weights[z] = reinterpret_cast<__m512bh>(_mm512_loadu_si512(packed + 2 * LANES * z));
        for (long r = 0; r < R; r++) {
            int32_t pair;
            std::memcpy(&pair, rows + r * stride + k, sizeof pair);
            const __m512bh input = reinterpret_cast<__m512bh>(_mm512_set1_epi32(pair));
            for (long z = 0; z < BLOCK; z++) sums[r][z] = _mm512_dpbf16_ps(sums[r][z], input, weights[z]);
        }
    }
}

// A block is LANES units. Their four gates are the BLOCK registers of `multiply`: a tile has all gates of its units.
struct Forward {
    // Round the weights of block b to bfloat16 and write them to `packed` as (size / 2, BLOCK, LANES, 2), where size is
    // input_size + hidden_size, gate z is row z * hidden_size + unit of the weights, and weight_ih comes first.
    static void pack(const WindowArguments& w, long b) {
        const long size = w.input_size + w.hidden_size;
        int32_t* out = reinterpret_cast<int32_t*>(w.packed) + b * size / 2 * BLOCK * LANES;  // pairs of bfloat16
        // 16 inputs at a time for all 64 rows of a block. Inputs are outermost, so that the part of `packed` that is
        // written (8 pairs x 64 rows, 2 KiB) stays in the first-level cache.
        for (long k = 0; k < size; k += LANES)
            for (long z = 0; z < BLOCK; z++)
                for (long u = 0; u < LANES; u++) {
                    const long row = z * w.hidden_size + b * LANES + u;
                    int32_t pairs[LANES / 2];
                    const float* from = k < w.input_size ? w.weight_ih + row * w.input_size + k
                                                         : w.weight_hh + row * w.hidden_size + k - w.input_size;
                    _mm256_storeu_si256(reinterpret_cast<__m256i*>(pairs), rounded(load(from)));
                    for (long i = 0; i < LANES / 2; i++) out[(k / 2 + i) * BLOCK * LANES + z * LANES + u] = pairs[i];
                }
    }

    // What a step multiplies by the weights: `size` values a lane, w.steps * size apart.
    static long size(const WindowArguments& w) { return w.input_size + w.hidden_size; }
    static long blocks(const WindowArguments& w) { return w.hidden_size / LANES; }
    static const bf16* rows(const WindowArguments& w, long lane, long step) {
        return w.inputs + (lane * w.steps + step) * size(w);
    }

    // Compute one step of a lane for the 16 units of block b. sums: (4 gates, 16 units).
    //   i, f, o = sigmoid, g = tanh of (weights @ inputs + bias);  c = f * c_before + i * g;  h = o * tanh(c)
    // (Hochreiter and Schmidhuber 1997; forget gate of Gers et al. 2000).
    static inline void start(const WindowArguments& w, long b, long, long, __m512 (&sums)[BLOCK]) {
        for (long z = 0; z < BLOCK; z++) sums[z] = load(w.bias + z * w.hidden_size + b * LANES);
    }
    // Gates to cell and hidden state. The hidden state is also written beside the next step's input.
    static inline void finish(const WindowArguments& w, long b, long lane, long step, const __m512 (&sums)[BLOCK]) {
        const long row = lane * w.steps + step, unit = b * LANES;
        const __m512 i = sigmoid(sums[0]), f = sigmoid(sums[1]), o = sigmoid(sums[3]);
        const __m512 g = hyperbolic_tangent(sums[2]);
        float* cell = w.cell + lane * w.hidden_size + unit;
        const __m512 c = _mm512_fmadd_ps(f, load(cell), _mm512_mul_ps(i, g));
        const __m512 h = _mm512_mul_ps(o, hyperbolic_tangent(c));
        store(cell, c);
        store(w.outputs + row * w.hidden_size + unit, h);
        if (step + 1 < w.steps) store(w.inputs + (row + 1) * size(w) + w.input_size + unit, h);
        if (w.gates == nullptr) return;  // no backward pass
        bf16* gates = w.gates + row * 4 * w.hidden_size + unit;
        store(gates, i);
        store(gates + w.hidden_size, f);
        store(gates + 2 * w.hidden_size, g);
        store(gates + 3 * w.hidden_size, o);
        store(w.cells + row * w.hidden_size + unit, c);
    }
};

// A block is BLOCK * LANES = 64 units. Their hidden state gets its gradient from all gates of the next step.
struct Backward {
    // Round the columns of weight_hh that belong to block b and write them as (4 * hidden_size / 2, BLOCK, LANES, 2):
    // a pair is two neighbouring gate rows k and k + 1 of one unit's column.
    static void pack(const WindowArguments& w, long b) {
        bf16* out = w.packed + b * 4 * w.hidden_size * BLOCK * LANES;
        for (long k = 0; k < 4 * w.hidden_size; k += 2)
            for (long z = 0; z < BLOCK; z++, out += 2 * LANES) {
                const float* from = w.weight_hh + k * w.hidden_size + (b * BLOCK + z) * LANES;
                const __m512i even = _mm512_cvtepu16_epi32(rounded(load(from)));
                const __m512i odd = _mm512_cvtepu16_epi32(rounded(load(from + w.hidden_size)));
                _mm512_storeu_si512(out, _mm512_or_si512(even, _mm512_slli_epi32(odd, 16)));
            }
    }

    static long size(const WindowArguments& w) { return 4 * w.hidden_size; }
    static long blocks(const WindowArguments& w) { return w.hidden_size / (BLOCK * LANES); }
    static const bf16* rows(const WindowArguments& w, long lane, long step) {  // the next step's gates, gradients by now
        return step + 1 == w.steps ? nullptr : w.gates + (lane * w.steps + step + 1) * size(w);
    }

    // Go back one step of a lane for the 64 units of block b. With dx for the gradient of the loss by x, and gradients
    // of gates taken before their sigmoid s (s' = s - s^2) or tanh t (t' = 1 - t^2):
    //   dh = d(output) + weight_hh^T @ d(gates of the next step)
    //   dc = dc(next step) * f(next step) + dh * o * tanh'(c)
    //   di = dc * g * i';  df = dc * c_before * f';  dg = dc * i * g';  do = dh * tanh(c) * o'
    // This is the chain rule on the equations of Forward::start (as in Graves 2012, "Supervised Sequence Labelling with
    // Recurrent Neural Networks", section 4.6, without peepholes). sums: dh (64 units).
    static inline void start(const WindowArguments& w, long b, long lane, long step, __m512 (&sums)[BLOCK]) {
        for (long z = 0; z < BLOCK; z++) {
            const long unit = (b * BLOCK + z) * LANES;
            sums[z] = load(w.grad_outputs + (lane * w.steps + step) * w.hidden_size + unit);
            if (step + 1 == w.steps) sums[z] = _mm512_add_ps(sums[z], load(w.grad_hidden + lane * w.hidden_size + unit));
        }
    }
    // From dh and dc to the gradients of the four gates, which overwrite the gates.
    static inline void finish(const WindowArguments& w, long b, long lane, long step, const __m512 (&sums)[BLOCK]) {
        for (long z = 0; z < BLOCK; z++) {
            const long row = lane * w.steps + step, unit = (b * BLOCK + z) * LANES;
            bf16* gates = w.gates + row * size(w) + unit;
            const __m512 i = load(gates), f = load(gates + w.hidden_size), g = load(gates + 2 * w.hidden_size);
            const __m512 o = load(gates + 3 * w.hidden_size);
            const __m512 c = hyperbolic_tangent(load(w.cells + row * w.hidden_size + unit));  // tanh of the cell
            const __m512 before = step > 0 ? load(w.cells + (row - 1) * w.hidden_size + unit)
                                           : load(w.cell + lane * w.hidden_size + unit);
            const __m512 dh = sums[z], one = all(1);
            float* carried = w.grad_cell + lane * w.hidden_size + unit;  // dc(next step) * f(next step)
            const __m512 dc = _mm512_fmadd_ps(_mm512_mul_ps(dh, o), _mm512_fnmadd_ps(c, c, one), load(carried));
            store(carried, _mm512_mul_ps(dc, f));
            const __m512 grad_gates[] = {
                _mm512_mul_ps(_mm512_mul_ps(dc, g), _mm512_fnmadd_ps(i, i, i)),
                _mm512_mul_ps(_mm512_mul_ps(dc, before), _mm512_fnmadd_ps(f, f, f)),
                _mm512_mul_ps(_mm512_mul_ps(dc, i), _mm512_fnmadd_ps(g, g, one)),
                _mm512_mul_ps(_mm512_mul_ps(dh, c), _mm512_fnmadd_ps(o, o, o)),
            };
            for (long gate = 0; gate < 4; gate++) {
                float* bias = w.grad_bias + gate * w.hidden_size + unit;
                store(bias, _mm512_add_ps(load(bias), grad_gates[gate]));
                store(gates + gate * w.hidden_size, grad_gates[gate]);
            }
        }
    }
};

// Compute one step of R lanes for block b, with sums in registers.
template <typename Direction, long R>
static void tile(const WindowArguments& w, long b, long lane, long step) {
    const long size = Direction::size(w);
    __m512 sums[ROWS][BLOCK];
    for (long r = 0; r < R; r++) Direction::start(w, b, lane + r, step, sums[r]);
    if (const bf16* rows = Direction::rows(w, lane, step))
        multiply<R>(sums, rows, w.steps * size, w.packed + b * size * BLOCK * LANES, size);
    for (long r = 0; r < R; r++) Direction::finish(w, b, lane + r, step, sums[r]);
}

// Compute one step of all lanes for block b, in tiles of at most ROWS lanes. The number of rows is a template argument,
// so that the compiler keeps a tile's sums in registers.
template <typename Direction>
static void all_lanes(const WindowArguments& w, long b, long step) {
    for (long lane = 0; lane < w.lanes;) {
        const long left = w.lanes - lane, rows = left == 8 || left == 7 ? 4 : left;  // 4 + 4 is faster than 6 + 2
        switch (rows) {
            case 1: tile<Direction, 1>(w, b, lane, step), lane += 1; break;
            case 2: tile<Direction, 2>(w, b, lane, step), lane += 2; break;
            case 3: tile<Direction, 3>(w, b, lane, step), lane += 3; break;
            case 4: tile<Direction, 4>(w, b, lane, step), lane += 4; break;
            case 5: tile<Direction, 5>(w, b, lane, step), lane += 5; break;
            default: tile<Direction, 6>(w, b, lane, step), lane += 6;
        }
    }
}

#ifdef __AMX_BF16__
// The same step by AMX, whose registers, called tiles too, hold 16 rows of 64 bytes. An instruction multiplies 16 lanes
// with 32 values each by the same 32 rows of 16 units: `packed` has them in the order that it wants. It sums products of
// even and of odd rows apart and adds both to the float32 sums; 32 rows come after the 32 before them.
static const long TILE = 16, DEPTH = 32;

// Let the compiler finish writes to memory before a tile is loaded from it: GCC's intrinsics do not say that they read.
static inline void written(const void* p) { __asm__ volatile("" : : "r"(p) : "memory"); }

// Tiles 0 to 3 hold sums (2 of lanes by 2 of units), 4 and 5 lanes, 6 and 7 weights. Each thread has a setting.
static void configure_tiles(const WindowArguments& w) {
    struct alignas(64) {
        uint8_t palette, start_row, zeros[14];
        uint16_t bytes[16];
        uint8_t rows[16];
    } shapes = {1};
    for (int t = 0; t < 8; t++) shapes.bytes[t] = 64, shapes.rows[t] = t < 6 ? std::min(w.lanes, TILE) : TILE;
    written(&shapes);
    _tile_loadconfig(&shapes);
}

// Copy what a step multiplies to w.tiles, (size / DEPTH, lanes, DEPTH). In its array 16 lanes are a power of two apart,
// so that they push each other out of the caches.
template <typename Direction>
static void gather(const WindowArguments& w, long step) {
    const long size = Direction::size(w);
    const bf16* rows = Direction::rows(w, 0, step);
#pragma omp for schedule(static)
    for (long k = 0; k < (rows == nullptr ? 0 : size); k += DEPTH)
        for (long lane = 0; lane < w.lanes; lane++)
            _mm512_storeu_si512(w.tiles + k * w.lanes + lane * DEPTH,
                                _mm512_loadu_si512(rows + lane * w.steps * size + k));
}

// Add to sums (two times TILE lanes, BLOCK * LANES) the product of one or two times TILE gathered lanes with a block.
template <bool two>
static void multiply_tiles(float* sums, const bf16* first, const bf16* second, long stride, const bf16* packed, long size) {
    const long row = BLOCK * LANES * sizeof(float), pair = 2 * BLOCK * LANES * sizeof(bf16);  // bytes
    written(sums);
    for (long z = 0; z < BLOCK; z += 2) {
        float *left = sums + z * LANES, *right = left + LANES, *below = left + TILE * BLOCK * LANES;
        _tile_loadd(0, left, row);
        _tile_loadd(1, right, row);
        if (two) _tile_loadd(2, below, row);
        if (two) _tile_loadd(3, below + LANES, row);
        for (long k = 0; k < size; k += DEPTH) {
            const bf16* weights = packed + k * BLOCK * LANES + 2 * z * LANES;
            _tile_loadd(6, weights, pair);
            _tile_loadd(7, weights + 2 * LANES, pair);
            _tile_loadd(4, first + k * stride, DEPTH * sizeof(bf16));
            _tile_dpbf16ps(0, 4, 6);
            _tile_dpbf16ps(1, 4, 7);
            if (two) {
                _tile_loadd(5, second + k * stride, DEPTH * sizeof(bf16));
                _tile_dpbf16ps(2, 5, 6);
                _tile_dpbf16ps(3, 5, 7);
            }
        }
        _tile_stored(0, left, row);
        _tile_stored(1, right, row);
        if (two) _tile_stored(2, below, row);
        if (two) _tile_stored(3, below + LANES, row);
    }
}

// Compute one step of all lanes for block b from gathered lanes. The last 16 lanes may overlap those before them: their
// products are then computed twice, and finished once.
template <typename Direction>
static void all_lanes_by_tiles(const WindowArguments& w, long b, long step) {
    alignas(64) float sums[2 * TILE][BLOCK * LANES];
    const long size = Direction::size(w), rows = std::min(w.lanes, TILE);
    const bf16* packed = w.packed + b * size * BLOCK * LANES;
    for (long lane = 0; lane < w.lanes; lane += 2 * TILE) {
        const bool two = lane + TILE < w.lanes;
        const long begins[] = {std::min(lane, w.lanes - rows), std::min(lane + TILE, w.lanes - rows)};
        __m512 values[BLOCK];
        for (long t = 0; t <= two; t++)
            for (long r = 0; r < rows; r++) {
                Direction::start(w, b, begins[t] + r, step, values);
                for (long z = 0; z < BLOCK; z++) store(sums[t * TILE + r] + z * LANES, values[z]);
            }
        const bf16 *first = w.tiles + begins[0] * DEPTH, *second = w.tiles + begins[1] * DEPTH;
        if (Direction::rows(w, lane, step) != nullptr) {
            if (two) multiply_tiles<true>(sums[0], first, second, w.lanes, packed, size);
            else multiply_tiles<false>(sums[0], first, second, w.lanes, packed, size);
        }
        for (long t = 0; t <= two; t++)
            for (long r = lane + t * TILE - begins[t]; r < rows; r++) {
                for (long z = 0; z < BLOCK; z++) values[z] = load(sums[t * TILE + r] + z * LANES);
                Direction::finish(w, b, begins[t] + r, step, values);
            }
    }
}
#endif

// Compute one step, by all threads. Its blocks are independent of each other. The barrier at the end of `omp for` is the
// point where the step's results are complete. A block's units belong to one thread in all steps, so that sums in
// grad_bias and grad_cell need no lock and have a fixed order.
template <typename Direction>
static void all_blocks(const WindowArguments& w, long step) {
#ifdef __AMX_BF16__
    if (w.tiles != nullptr) {
        gather<Direction>(w, step);
#pragma omp for schedule(static)
        for (long b = 0; b < Direction::blocks(w); b++) all_lanes_by_tiles<Direction>(w, b, step);
        return;
    }
#endif
#pragma omp for schedule(static)
    for (long b = 0; b < Direction::blocks(w); b++) all_lanes<Direction>(w, b, step);
}

// Run a window, forward or backward, one step after the other.
template <typename Direction>
static void window(const WindowArguments& w, bool forward) {
#pragma omp parallel num_threads(w.threads)
    {
#ifdef __AMX_BF16__
        if (w.tiles != nullptr) configure_tiles(w);
#endif
#pragma omp for schedule(static)
        for (long b = 0; b < Direction::blocks(w); b++) Direction::pack(w, b);
        for (long i = 0; i < w.steps; i++) all_blocks<Direction>(w, forward ? i : w.steps - 1 - i);
#ifdef __AMX_BF16__
        if (w.tiles != nullptr) _tile_release();
#endif
    }
}

extern "C" void textgen_lstm_forward(const WindowArguments* w) { window<Forward>(*w, true); }
extern "C" void textgen_lstm_backward(const WindowArguments* w) { window<Backward>(*w, false); }

#endif

// --- cross-entropy ---------------------------------------------------------------------------------------------------

// Return the cross-entropy of a row in nats, log(sum_j exp(z_j)) - z_target with z = x + bias. Unless grad_bias is
// null, overwrite x by the gradient softmax(z) - one-hot(target), and add it to grad_bias.
// Three passes over a float32 copy (`row`, with room for one more register) that stays in the cache: the largest value,
// then exponentials and their sum, then the gradient. The last register of `row` is filled up with -infinity, whose
// exponential is below 2e-38. `target` must be in the row.
template <typename T>
static float cross_entropy_row(T* x, const float* bias, long size, long target, float* grad_bias, float* row) {
    const long even = size / LANES * LANES;  // values in whole registers
    const __mmask16 rest = static_cast<__mmask16>((1u << (size - even)) - 1);
    __m512 peaks = all(-INFINITY), masses = all(0);
    for (long i = 0; i < even; i += LANES) {
        const __m512 logits = _mm512_add_ps(load(x + i), load(bias + i));
        store(row + i, logits);
        peaks = _mm512_max_ps(peaks, logits);
    }
    if (rest) {
        T last[LANES] = {};
        std::memcpy(last, x + even, (size - even) * sizeof(T));
        const __m512 logits = _mm512_add_ps(load(last), _mm512_maskz_loadu_ps(rest, bias + even));
        store(row + even, _mm512_mask_mov_ps(all(-INFINITY), rest, logits));
        peaks = _mm512_max_ps(peaks, load(row + even));
    }
    const float peak = _mm512_reduce_max_ps(peaks), target_logit = row[target];
    for (long i = 0; i < size; i += LANES) {
        const __m512 mass = exponential(_mm512_sub_ps(load(row + i), all(peak)));
        store(row + i, mass);
        masses = _mm512_add_ps(masses, mass);
    }
    const float mass = _mm512_reduce_add_ps(masses), nats = std::log(mass) + peak - target_logit;
    if (grad_bias == nullptr) return nats;
    row[target] -= mass;  // minus 1, once divided by mass
    for (long i = 0; i < even; i += LANES) {
        const __m512 grad = _mm512_mul_ps(load(row + i), all(1 / mass));
        store(grad_bias + i, _mm512_add_ps(load(grad_bias + i), grad));
        store(x + i, grad);
    }
    if (rest) {
        T last[LANES];
        const __m512 grad = _mm512_mul_ps(load(row + even), all(1 / mass));
        const __m512 sum = _mm512_add_ps(_mm512_maskz_loadu_ps(rest, grad_bias + even), grad);
        _mm512_mask_storeu_ps(grad_bias + even, rest, sum);
        store(last, grad);
        std::memcpy(x + even, last, (size - even) * sizeof(T));
    }
    return nats;
}

// Compute the cross-entropy of rows, see training.cross_entropy. logits: (rows, size), overwritten by their gradient.
// bias: (size). targets: (rows), -1 is not scored. nats: (rows). grad_bias: (size), added to; null if no gradient is
// needed. Rows are shared among threads. Each thread sums its gradients of the bias in its own memory. The sums are
// added in the order of threads, so that the result is the same each time with the same number of threads.
template <typename T>
static void cross_entropy(T* logits, const float* bias, const int64_t* targets, int64_t rows, int64_t size, float* nats,
                          float* grad_bias, int64_t threads) {
#pragma omp parallel num_threads(threads)
    {
        std::vector<float> row(size + LANES), sums(grad_bias == nullptr ? 0 : size);
#pragma omp for schedule(static)
        for (int64_t r = 0; r < rows; r++) {
            T* x = logits + r * size;
            if (targets[r] < 0) {
                nats[r] = 0;
                std::memset(x, 0, size * sizeof(T));
            } else {
                float* grad_sums = grad_bias == nullptr ? nullptr : sums.data();
                nats[r] = cross_entropy_row(x, bias, size, targets[r], grad_sums, row.data());
            }
        }
        for (int thread = 0; grad_bias != nullptr && thread < omp_get_num_threads(); thread++) {
            if (thread == omp_get_thread_num())
                for (int64_t i = 0; i < size; i++) grad_bias[i] += sums[i];
#pragma omp barrier
        }
    }
}

extern "C" void textgen_cross_entropy_bfloat16(bf16* logits, const float* bias, const int64_t* targets, int64_t rows,
                                               int64_t size, float* nats, float* grad_bias, int64_t threads) {
    cross_entropy(logits, bias, targets, rows, size, nats, grad_bias, threads);
}
extern "C" void textgen_cross_entropy_float32(float* logits, const float* bias, const int64_t* targets, int64_t rows,
                                              int64_t size, float* nats, float* grad_bias, int64_t threads) {
    cross_entropy(logits, bias, targets, rows, size, nats, grad_bias, threads);
}
