// The tile instructions of AMX in plain C++, for tests on processors without them: training.cpp is compiled with
// `-include` of this file. What a processor would refuse, such as shapes that do not fit, ends the process.
// Sums round as Intel's description of TDPBF16PS says ("Intel 64 and IA-32 Architectures Software Developer's Manual"),
// except for numbers below 2^-126, which the instruction takes for zero.

#include <immintrin.h>

#include <cmath>
#include <cstdint>
#include <cstdlib>
#include <cstring>

#define __AMX_BF16__ 1

namespace emulated {
struct Tile {
    int rows, bytes;
    alignas(64) uint8_t data[16][64];
};
static thread_local Tile tiles[8];  // without rows until a configuration is loaded

static void insist(bool holds) {
    if (!holds) std::abort();
}
static void load_configuration(const void* memory) {
    const uint8_t* bytes = static_cast<const uint8_t*>(memory);
    insist(bytes[0] == 1 && bytes[1] == 0);
    for (int i = 2; i < 16; i++) insist(bytes[i] == 0);
    for (int t = 0; t < 16; t++) {
        uint16_t width;
        std::memcpy(&width, bytes + 16 + 2 * t, sizeof width);
        const int rows = bytes[48 + t];
        insist(width <= 64 && rows <= 16 && (width == 0) == (rows == 0) && (t < 8 || rows == 0));
        if (t < 8) tiles[t] = Tile{rows, width, {}};
    }
}
static void release() {
    for (Tile& tile : tiles) tile = Tile{};
}
static void load(int t, const void* memory, long stride) {
    insist(tiles[t].rows > 0);
    for (int r = 0; r < tiles[t].rows; r++)
        std::memcpy(tiles[t].data[r], static_cast<const uint8_t*>(memory) + r * stride, tiles[t].bytes);
}
static void store(int t, void* memory, long stride) {
    insist(tiles[t].rows > 0);
    for (int r = 0; r < tiles[t].rows; r++)
        std::memcpy(static_cast<uint8_t*>(memory) + r * stride, tiles[t].data[r], tiles[t].bytes);
}
static float wide(const uint8_t* bfloat16) {  // the upper half of a float32
    uint32_t bits = 0;
    std::memcpy(reinterpret_cast<uint8_t*>(&bits) + 2, bfloat16, 2);
    float value;
    std::memcpy(&value, &bits, sizeof value);
    return value;
}
static void multiply(int target, int left, int right) {
    Tile &c = tiles[target], &a = tiles[left], &b = tiles[right];
    insist(target != left && target != right && left != right);
    insist(c.rows > 0 && c.rows == a.rows && c.bytes == b.bytes && a.bytes == 4 * b.rows);
    for (int m = 0; m < c.rows; m++) {
        float even[16] = {}, odd[16] = {}, *sums = reinterpret_cast<float*>(c.data[m]);
        for (int k = 0; k < b.rows; k++)
            for (int n = 0; n < c.bytes / 4; n++) {
                even[n] = std::fma(wide(a.data[m] + 4 * k), wide(b.data[k] + 4 * n), even[n]);
                odd[n] = std::fma(wide(a.data[m] + 4 * k + 2), wide(b.data[k] + 4 * n + 2), odd[n]);
            }
        for (int n = 0; n < c.bytes / 4; n++) sums[n] += even[n] + odd[n];
    }
}
}  // namespace emulated

#undef _tile_loadd
#undef _tile_stored
#undef _tile_dpbf16ps
#define _tile_loadconfig emulated::load_configuration
#define _tile_release emulated::release
#define _tile_loadd emulated::load
#define _tile_stored emulated::store
#define _tile_dpbf16ps emulated::multiply
