// An LSTM over a window, there and back, and the softmax of logits with its gradient: see training.py.
// For processors that multiply bfloat16 in registers of 512 bits. Products and sums are taken in float32, each sum in
// an order that depends on no number of threads, but for the slope of the logits' bias, which adds up thread by thread.

#ifndef __AVX512BF16__
#error "the compiler knows no bfloat16 of this processor"
#endif

#include <immintrin.h>
#include <omp.h>

#include <cmath>
#include <cstdint>
#include <cstring>
#include <vector>

typedef uint16_t bf16;

static const long LANES = 16;  // float32 values of a register
static const long BLOCK = 4;   // registers side by side: the four gates of 16 units, or 64 units
static const long ROWS = 6;    // 6 x 4 sums, 4 weights and an input: what 32 registers hold

static inline __m512 all(float x) { return _mm512_set1_ps(x); }
static inline __m512 load(const float* p) { return _mm512_loadu_ps(p); }
static inline __m512 load(const bf16* p) {
    const __m512i wide = _mm512_cvtepu16_epi32(_mm256_loadu_si256(reinterpret_cast<const __m256i*>(p)));
    return _mm512_castsi512_ps(_mm512_slli_epi32(wide, 16));
}
static inline __m256i rounded(__m512 x) { return reinterpret_cast<__m256i>(_mm512_cvtneps_pbh(x)); }
static inline void store(float* p, __m512 x) { _mm512_storeu_ps(p, x); }
static inline void store(bf16* p, __m512 x) { _mm256_storeu_si256(reinterpret_cast<__m256i*>(p), rounded(x)); }

// 2^n e^r, with e^r by Taylor's polynomial for |r| <= ln(2) / 2: within 3e-7 of e^x, relatively
static inline __m512 exponential(__m512 x) {
    x = _mm512_min_ps(all(88.0f), _mm512_max_ps(all(-87.0f), x));  // in this order what is no number stays so
    const int nearest = _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC;
    const __m512 n = _mm512_roundscale_ps(_mm512_mul_ps(x, all(1.44269504f)), nearest);
    // ln(2) in two parts, the first of so few digits that n times it is exact
    const __m512 r = _mm512_fnmadd_ps(n, all(1.42860677e-6f), _mm512_fnmadd_ps(n, all(0.693145752f), x));
    __m512 sum = all(1.0f / 720);
    for (const float term : {1.0f / 120, 1.0f / 24, 1.0f / 6, 0.5f, 1.0f, 1.0f})
        sum = _mm512_fmadd_ps(sum, r, all(term));
    return _mm512_scalef_ps(sum, n);
}
static inline __m512 sigmoid(__m512 x) {
    return _mm512_div_ps(all(1), _mm512_add_ps(all(1), exponential(_mm512_sub_ps(all(0), x))));
}
static inline __m512 hyperbolic_tangent(__m512 x) {
    const __m512 far = _mm512_fmsub_ps(all(2), sigmoid(_mm512_add_ps(x, x)), all(1));
    // x - x^3 / 3 where digits of the other would cancel
    const __m512 near = _mm512_fnmadd_ps(_mm512_mul_ps(_mm512_mul_ps(x, x), x), all(1.0f / 3), x);
    return _mm512_mask_blend_ps(_mm512_cmp_ps_mask(_mm512_abs_ps(x), all(0.02f), _CMP_LT_OQ), far, near);
}

// --- the LSTM --------------------------------------------------------------------------------------------------------

struct Window {
    int64_t lanes, steps, inputs, units;
    const float *weight_ih, *weight_hh, *bias;  // (4 * units, inputs), (4 * units, units), (4 * units): torch's order
    bf16* seen;                                 // (lanes, steps, inputs + units): inputs and the units' last outputs
    bf16* outputs;                              // (lanes, steps, units)
    bf16* gates;                                // (lanes, steps, 4 * units), or null; in the end of backward: slopes
    bf16* cells;                                // (lanes, steps, units), or null
    float* cell;                                // (lanes, units): before the window, then after it
    const bf16* slopes;                         // (lanes, steps, units), of the outputs
    float *slope_hidden, *slope_cell;           // (lanes, units), of the state after the window
    float* slope_bias;                          // (4 * units), zeros at first
    bf16* packed;                               // room for the weights
    int64_t threads;
};

// Add to `sums` the product of some rows with a block's weights, packed as (size / 2, BLOCK, LANES, 2).
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

struct Forward {
    // Lay out the four gates of units b * LANES and following.
    static void pack(const Window& w, long b) {
        const long size = w.inputs + w.units;
        int32_t* out = reinterpret_cast<int32_t*>(w.packed) + b * size / 2 * BLOCK * LANES;
        for (long k = 0; k < size; k += LANES)  // outermost: what is written at a time stays in the nearest cache
            for (long z = 0; z < BLOCK; z++)
                for (long u = 0; u < LANES; u++) {
                    const long row = z * w.units + b * LANES + u;
                    int32_t pairs[LANES / 2];
                    const float* from = k < w.inputs ? w.weight_ih + row * w.inputs + k
                                                     : w.weight_hh + row * w.units + k - w.inputs;
                    _mm256_storeu_si256(reinterpret_cast<__m256i*>(pairs), rounded(load(from)));
                    for (long i = 0; i < LANES / 2; i++) out[(k / 2 + i) * BLOCK * LANES + z * LANES + u] = pairs[i];
                }
    }

    template <long R>
    static void tile(const Window& w, long b, long lane, long step) {
        const long size = w.inputs + w.units, unit = b * LANES;
        __m512 sums[ROWS][BLOCK];
        for (long r = 0; r < R; r++)
            for (long z = 0; z < BLOCK; z++) sums[r][z] = load(w.bias + z * w.units + unit);
        const bf16* rows = w.seen + (lane * w.steps + step) * size;
        multiply<R>(sums, rows, w.steps * size, w.packed + b * size * BLOCK * LANES, size);
        for (long r = 0; r < R; r++) {
            const long row = (lane + r) * w.steps + step;
            const __m512 in = sigmoid(sums[r][0]), forget = sigmoid(sums[r][1]), out = sigmoid(sums[r][3]);
            const __m512 fresh = hyperbolic_tangent(sums[r][2]);
            float* cell = w.cell + (lane + r) * w.units + unit;
            const __m512 c = _mm512_fmadd_ps(forget, load(cell), _mm512_mul_ps(in, fresh));
            const __m512 h = _mm512_mul_ps(out, hyperbolic_tangent(c));
            store(cell, c);
            store(w.outputs + row * w.units + unit, h);
            if (step + 1 < w.steps) store(w.seen + (row + 1) * size + w.inputs + unit, h);
            if (w.gates == nullptr) continue;
            bf16* gates = w.gates + row * 4 * w.units + unit;
            store(gates, in);
            store(gates + w.units, forget);
            store(gates + 2 * w.units, fresh);
            store(gates + 3 * w.units, out);
            store(w.cells + row * w.units + unit, c);
        }
    }
};

struct Backward {
    // Lay out what units b * BLOCK * LANES and following get from all gates.
    static void pack(const Window& w, long b) {
        bf16* out = w.packed + b * 4 * w.units * BLOCK * LANES;
        for (long k = 0; k < 4 * w.units; k += 2)
            for (long z = 0; z < BLOCK; z++, out += 2 * LANES) {
                const float* from = w.weight_hh + k * w.units + (b * BLOCK + z) * LANES;
                const __m512i even = _mm512_cvtepu16_epi32(rounded(load(from)));
                const __m512i odd = _mm512_cvtepu16_epi32(rounded(load(from + w.units)));
                _mm512_storeu_si512(out, _mm512_or_si512(even, _mm512_slli_epi32(odd, 16)));
            }
    }

    template <long R>
    static void tile(const Window& w, long b, long lane, long step) {
        __m512 sums[ROWS][BLOCK];  // slopes of the outputs
        const bool last = step + 1 == w.steps;
        for (long r = 0; r < R; r++)
            for (long z = 0; z < BLOCK; z++) {
                const long unit = (b * BLOCK + z) * LANES;
                sums[r][z] = load(w.slopes + ((lane + r) * w.steps + step) * w.units + unit);
                if (last) sums[r][z] = _mm512_add_ps(sums[r][z], load(w.slope_hidden + (lane + r) * w.units + unit));
            }
        const long size = 4 * w.units;
        const bf16* rows = w.gates + (lane * w.steps + step + 1) * size;  // slopes by now
        if (!last) multiply<R>(sums, rows, w.steps * size, w.packed + b * size * BLOCK * LANES, size);
        for (long r = 0; r < R; r++)
            for (long z = 0; z < BLOCK; z++) {
                const long row = (lane + r) * w.steps + step, unit = (b * BLOCK + z) * LANES;
                bf16* gates = w.gates + row * size + unit;
                const __m512 in = load(gates), forget = load(gates + w.units), fresh = load(gates + 2 * w.units);
                const __m512 out = load(gates + 3 * w.units);
                const __m512 c = hyperbolic_tangent(load(w.cells + row * w.units + unit));
                const __m512 before = step > 0 ? load(w.cells + (row - 1) * w.units + unit)
                                               : load(w.cell + (lane + r) * w.units + unit);
                const __m512 dh = sums[r][z], one = all(1);
                float* carried = w.slope_cell + (lane + r) * w.units + unit;
                const __m512 dc = _mm512_fmadd_ps(_mm512_mul_ps(dh, out), _mm512_fnmadd_ps(c, c, one), load(carried));
                store(carried, _mm512_mul_ps(dc, forget));
                const __m512 slopes[] = {
                    _mm512_mul_ps(_mm512_mul_ps(dc, fresh), _mm512_fnmadd_ps(in, in, in)),
                    _mm512_mul_ps(_mm512_mul_ps(dc, before), _mm512_fnmadd_ps(forget, forget, forget)),
                    _mm512_mul_ps(_mm512_mul_ps(dc, in), _mm512_fnmadd_ps(fresh, fresh, one)),
                    _mm512_mul_ps(_mm512_mul_ps(dh, c), _mm512_fnmadd_ps(out, out, out)),
                };
                for (long g = 0; g < 4; g++) {
                    float* bias = w.slope_bias + g * w.units + unit;
                    store(bias, _mm512_add_ps(load(bias), slopes[g]));
                    store(gates + g * w.units, slopes[g]);
                }
            }
    }
};

template <typename Direction>
static void all_lanes(const Window& w, long b, long step) {
    for (long lane = 0; lane < w.lanes;) {
        const long left = w.lanes - lane, rows = left == 8 || left == 7 ? 4 : left;  // 4 + 4 is faster than 6 + 2
        switch (rows) {
            case 1: Direction::template tile<1>(w, b, lane, step), lane += 1; break;
            case 2: Direction::template tile<2>(w, b, lane, step), lane += 2; break;
            case 3: Direction::template tile<3>(w, b, lane, step), lane += 3; break;
            case 4: Direction::template tile<4>(w, b, lane, step), lane += 4; break;
            case 5: Direction::template tile<5>(w, b, lane, step), lane += 5; break;
            default: Direction::template tile<6>(w, b, lane, step), lane += 6;
        }
    }
}

extern "C" void textgen_lstm_forward(const Window* w) {
#pragma omp parallel num_threads(w->threads)
    {
#pragma omp for schedule(static)
        for (long b = 0; b < w->units / LANES; b++) Forward::pack(*w, b);
        for (long step = 0; step < w->steps; step++) {
#pragma omp for schedule(static)
            for (long b = 0; b < w->units / LANES; b++) all_lanes<Forward>(*w, b, step);
        }
    }
}

extern "C" void textgen_lstm_backward(const Window* w) {
#pragma omp parallel num_threads(w->threads)
    {
#pragma omp for schedule(static)
        for (long b = 0; b < w->units / (BLOCK * LANES); b++) Backward::pack(*w, b);
        for (long step = w->steps - 1; step >= 0; step--) {
#pragma omp for schedule(static)
            for (long b = 0; b < w->units / (BLOCK * LANES); b++) all_lanes<Backward>(*w, b, step);
        }
    }
}

// --- the softmax -----------------------------------------------------------------------------------------------------

// A row of logits, its bias added: `x` becomes the slope of the row's nats, which are returned.
template <typename T>
static float softmax_row(T* x, const float* bias, long size, long target, float* slope_bias, float* row) {
    const long even = size / LANES * LANES;
    const __mmask16 rest = static_cast<__mmask16>((1u << (size - even)) - 1);
    // all passes work on `row`, which ends with a whole register: -infinity, whose exponential counts for nothing
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
    const float peak = _mm512_reduce_max_ps(peaks), wanted = row[target];
    for (long i = 0; i < size; i += LANES) {
        const __m512 mass = exponential(_mm512_sub_ps(load(row + i), all(peak)));
        store(row + i, mass);
        masses = _mm512_add_ps(masses, mass);
    }
    const float mass = _mm512_reduce_add_ps(masses), nats = std::log(mass) + peak - wanted;
    if (slope_bias == nullptr) return nats;
    row[target] -= mass;
    for (long i = 0; i < even; i += LANES) {
        const __m512 slope = _mm512_mul_ps(load(row + i), all(1 / mass));
        store(slope_bias + i, _mm512_add_ps(load(slope_bias + i), slope));
        store(x + i, slope);
    }
    if (rest) {
        T last[LANES];
        const __m512 slope = _mm512_mul_ps(load(row + even), all(1 / mass));
        const __m512 sum = _mm512_add_ps(_mm512_maskz_loadu_ps(rest, slope_bias + even), slope);
        _mm512_mask_storeu_ps(slope_bias + even, rest, sum);
        store(last, slope);
        std::memcpy(x + even, last, (size - even) * sizeof(T));
    }
    return nats;
}

// logits (rows, size), bias (size), targets (rows), -1 where nothing is scored; nats (rows); slope_bias (size) is added
// to, or null where no slopes are wanted.
template <typename T>
static void softmax(T* logits, const float* bias, const int64_t* targets, int64_t rows, int64_t size, float* nats,
                    float* slope_bias, int64_t threads) {
#pragma omp parallel num_threads(threads)
    {
        std::vector<float> row(size + LANES), sums(slope_bias == nullptr ? 0 : size);
#pragma omp for schedule(static)
        for (int64_t r = 0; r < rows; r++) {
            T* x = logits + r * size;
            if (targets[r] < 0) {
                nats[r] = 0;
                std::memset(x, 0, size * sizeof(T));
            } else {
                float* slopes = slope_bias == nullptr ? nullptr : sums.data();
                nats[r] = softmax_row(x, bias, size, targets[r], slopes, row.data());
            }
        }
        for (int thread = 0; slope_bias != nullptr && thread < omp_get_num_threads(); thread++) {
            if (thread == omp_get_thread_num())
                for (int64_t i = 0; i < size; i++) slope_bias[i] += sums[i];
#pragma omp barrier
        }
    }
}

extern "C" void textgen_softmax_bfloat16(bf16* logits, const float* bias, const int64_t* targets, int64_t rows,
                                         int64_t size, float* nats, float* slope_bias, int64_t threads) {
    softmax(logits, bias, targets, rows, size, nats, slope_bias, threads);
}
extern "C" void textgen_softmax_float32(float* logits, const float* bias, const int64_t* targets, int64_t rows,
                                        int64_t size, float* nats, float* slope_bias, int64_t threads) {
    softmax(logits, bias, targets, rows, size, nats, slope_bias, threads);
}
