// Products of 8-bit activations with packed weights on a CPU, for jax.ffi.
//
// Ternary weights [K, N] come as tiles (quant/packed.py): block (n / 16, k / 16) is 64 bytes;
// byte 4 * (n % 16) + k % 4 holds, two bits each and lowest first, the codes
// (weight + 1) of the four k with the same k % 4. A 64-byte vector therefore is, for
// each of its four pairs of bits, sixteen outputs times four inputs: what one
// vpdpbusd, one vdot or one row of an AMX tile takes, with no sum across lanes ever.
//
//   sum_k (code - 1) q  =  sum_k code q  -  sum_k q
//
// so codes stay unsigned and the sum of the activations is subtracted.
// All sums are exact in int32; the roundings of the result, of scale products and
// of the output, are those of quant/, in its order; with scales by groups of inputs,
// that of groups.inc.
//
// Every instruction set has its own functions behind one table, in one binary; the
// best one that the processor has is chosen when the library is loaded.

#include <algorithm>
#include <array>
#include <atomic>
#include <chrono>
#include <cmath>
#include <cstdint>
#include <cstring>
#include <limits>
#include <string>
#include <thread>
#include <type_traits>
#include <utility>
#include <vector>

#include "xla/ffi/api/ffi.h"

#if defined(__x86_64__) && defined(__GNUC__)
#define VAANI_X86 1
#include <immintrin.h>
#if defined(__linux__)
#include <sys/syscall.h>
#include <unistd.h>
#endif
#elif defined(__aarch64__) && defined(__GNUC__)
#define VAANI_NEON 1
#include <arm_neon.h>
#if defined(__linux__)
#include <sys/auxv.h>
#endif
#endif

namespace ffi = xla::ffi;

namespace {

constexpr float kEpsilon = 1e-5f;  // as EPSILON in quant/rounding.py
constexpr int64_t kTile = 16;      // outputs and inputs of a block
constexpr int64_t kBlock = 64;     // its bytes
// Rows of activation codes are padded to this, and to whole AMX tiles.
constexpr int64_t kRowAlign = 64;
constexpr int64_t kRows = 32;
// Groups of inputs are made of these.
constexpr int64_t kUnit = 32;
constexpr int64_t kLargestGroup = 256;  // of the inputs with one scale of weights

// Quantized activations [m, stride]. With one group, all inputs: the sum of each row,
// and its bound, the magnitude that maps to 127. For what has groups: what a code
// counts, bound / 127, [m, groups].
struct Activations {
  const int8_t* codes;
  const int32_t* sums;
  const float* bounds;
  const float* steps;
  int64_t m, stride, groups;
};

// A product to compute: tiles and scales in, [m, n] out.
struct Product {
  const uint8_t* tiles;
  const float* scale;      // [], or, where `per_channel`, [n], or [n / 16, groups, 16]
  const uint16_t* halves;  // or these, [n / 16, groups, 16] in float16
  bool per_channel;
  int64_t groups;    // of inputs with a scale of weights of their own; 0: [] or [n]
  int64_t n, depth;  // depth: blocks along k
  float* out;
  // Where weights or activations have groups, see groups.inc: how many pieces, each of
  // `piece` blocks, and how many of them the inner sum takes.
  int64_t pieces, piece, inside;
  bool weights_first;
  const int32_t* starts;  // [m, pieces], less the sums of the codes
};

// 8-bit rows [v, d] with a scale each: an embedding, as an output head.
struct Rows {
  const int8_t* codes;
  const float* scales;
  int64_t v, d;
  float* out;
};

// Activations as 16-bit codes, split in unsigned bytes: code + 32768 = 256 high + low.
struct Wide {
  const uint8_t* high;
  const uint8_t* low;
  const float* scales;
  int64_t m, stride;
};

// Queries against keys and values; see `attention`.
struct Attention {
  const float* q;  // [b, t, n, h]
  const void *keys, *values;  // [b, s, k, h], float32, bfloat16, int8 or `Nibbles`
  const float *key_scales, *value_scales;  // [b, s, k], of codes
  const float* centers;  // [b, blocks, k, h], of keys in 4 bits
  int64_t blocks;
  const int32_t* starts;  // [b]
  int64_t slot, t, n, s, k, h;  // slot: of the first query
  float* out;  // [b, t, n, h]
  float* weights;  // [b, n, t, s], or null
};

// What comes back through causal attention of all queries to each other: g, the
// gradient of y, leads to those of queries, keys and values.
struct AttentionGradient {
  const float *q, *keys, *values, *y, *g;  // [b, t, n, h], of keys and values [b, t, k, h]
  const float* weights;  // [b, n, t, t], 0 where a query sees nothing
  int64_t t, n, k, h;
  float *dq, *dkeys, *dvalues;
};

// Float activations [m, k] with float weights, [n, k] or, as columns, [k, n]: out [m, n].
struct Floats {
  const float *x, *w;
  int64_t m, n, k;
  bool columns;
  float* out;
};

struct Isa {
  const char* name;
  bool (*available)();
  void (*quantize)(const float* x, int64_t k, const float* range, int8_t* codes,
                   int64_t stride, int32_t* sum, float* bound);
  // The sum of each 32 codes.
  void (*sum_units)(const int8_t* codes, int64_t k, int32_t* sums);
  // Output blocks [begin, end) of 16, for all rows; the second for what has groups.
  void (*multiply)(const Activations&, const Product&, int64_t begin, int64_t end);
  void (*grouped)(const Activations&, const Product&, int64_t begin, int64_t end);
  // Vocabulary rows [begin, end), for all rows of activations.
  void (*rows)(const Wide&, const Rows&, int64_t begin, int64_t end);
  // out = x / sqrt(mean(x^2) + epsilon) * scale, of m rows, and the factors of x.
  void (*norm)(const float* x, const float* scale, int64_t m, int64_t k, float epsilon,
               float* out, float* factors);
  // Rows [top, bottom) of activations, outputs [begin, end).
  void (*floats)(const Floats&, int64_t top, int64_t bottom, int64_t begin,
                 int64_t end);
  // out = gate sigmoid(gate) up, and sigmoid(gate), of n numbers.
  void (*swiglu)(const float* gate, const float* up, int64_t n, float* out,
                 float* sigmoid);
  // log(sum(exp(x))) of one row.
  float (*log_sum_exp)(const float* x, int64_t k);
  // The float parts of attention, see attention.inc; one function per type of the cache.
  void (*attend[4])(const Attention&, int64_t b, int64_t head, int64_t begin,
                    int64_t end, int64_t width, float* scratch);
  void (*decode_scores[4])(const Attention&, int64_t b, int64_t begin, int64_t end,
                           int64_t first, int64_t last, int64_t width, float* scores);
  float (*decode_weights)(float* x, int64_t count);
  void (*decode_values[4])(const Attention&, int64_t b, int64_t begin, int64_t end,
                           int64_t i, int64_t j, int64_t first, int64_t last,
                           int64_t width, const float* scores, const float* inverses);
  // Row `b` of the batch, key-value head `shared`.
  void (*attend_back)(const AttentionGradient&, int64_t b, int64_t shared,
                      int64_t width, float* scratch);
};

bool always() { return true; }

// Up to so many rows, products are bound by reading the weights, which are asked for
// ahead of time: so many bytes, or those of the next outputs. What is asked for may lie
// beyond the end of the buffer.
constexpr int64_t kFew = 4;
constexpr int64_t kAhead = 8192;
constexpr int64_t kScalesAhead = 2048;  // of groups, which take fewer bytes

inline void ask_for([[maybe_unused]] const void* address) {
#if defined(__GNUC__)
  __builtin_prefetch(address);
#endif
}

// The bound of a row from its range, and the factor that gives codes. A row that isn't
// finite gets a NaN, so that its outputs are NaN as in training.
float bound_of(float range, bool finite, float* factor) {
  const float bound = std::max(range, kEpsilon);
  *factor = 127.0f / bound;
  return finite ? bound : std::numeric_limits<float>::quiet_NaN();
}

// As output_scale in quant/product.py.
constexpr float kPart = 1.0f / 127.0f;

// -- Float parts ------------------------------------------------------------------
//
// What is not exact has one order, on every machine and in training as in serving:
//
//   a sum of products  element i goes to lane i mod 16, in the order of i; a product and
//                      its addition round once together (fma); then lanes in a tree: l
//                      and l + 8, l and l + 4, l and l + 2, l and l + 1
//   over slots         one by one, from the first that counts, with fma
//   a score            a product, times 1 / sqrt(h), times the scale of a code, and, of
//                      4 bits, the query's product with the center, times 1 / sqrt(h)
//   roots, quotients   rounded correctly
//
// So a row's numbers depend neither on other rows nor on padding, nor on how work is
// cut into threads and calls. `floats.inc` is written in operations on sixteen lanes,
// which each instruction set brings.

constexpr int kLanes = 16;
constexpr int64_t kTogether = 4;   // queries that share the reading of values
constexpr int64_t kQueries = 128;  // of a head, in one part
constexpr int64_t kSpan = 256;     // slots that stay in the cache while queries pass by
constexpr int64_t kTurned = kSpan + 2 * kLanes;
constexpr int64_t kSlotsAhead = 32;  // slots that are asked for before their turn
constexpr int64_t kFewSlots = 8;   // slots whose keys are read for one head, then another
constexpr int64_t kSome = 32;      // slots whose values are
constexpr int64_t kCentered = 64;  // slots whose keys have one center: model/codes.py

// Stands for a pointer to codes of 4 bits, two a byte: of each 32, the first sixteen in
// the low halves of sixteen bytes, the others in the high ones (model/codes.py). `i`
// counts codes, and is a multiple of 16.
struct Nibbles {
  const uint8_t* bytes;
  int64_t i;
};
inline Nibbles operator+(Nibbles x, int64_t count) { return {x.bytes, x.i + count}; }

template <typename T>
constexpr bool kHalved = std::is_same_v<T, Nibbles>;

// Number `i` of a cache of T.
template <typename T>
inline auto row_of(const void* cache, int64_t i) {
  if constexpr (kHalved<T>)
    return Nibbles{static_cast<const uint8_t*>(cache), i};
  else
    return static_cast<const T*>(cache) + i;
}

// Numbers from a head to the next one.
template <typename T>
constexpr int64_t padded(int64_t h) {
  return kHalved<T> ? (h + 31) / 32 * 32 : h;
}

inline const void* place_of(const void* x) { return x; }
inline const void* place_of(Nibbles x) { return x.bytes + (x.i >> 1); }

// Bytes of `count` numbers.
template <typename T>
constexpr int64_t distance_of(const T*, int64_t count) {
  return count * sizeof(T);
}
constexpr int64_t distance_of(Nibbles, int64_t count) { return count / 2; }

// -- Portable ---------------------------------------------------------------------

namespace portable {

#define VAANI_TARGET
#define VAANI_LANE inline __attribute__((always_inline))

constexpr int kTileRows = 2, kTileColumns = 2;
constexpr int kDots = 8, kAdds = 4;  // sums in registers at a time

struct Lanes {
  float v[kLanes];
};

template <typename F>
VAANI_LANE Lanes by_lane(const F& function) {
  Lanes found;
  for (int i = 0; i < kLanes; ++i) found.v[i] = function(i);
  return found;
}

VAANI_LANE Lanes all(float x) {
  return by_lane([&](int) { return x; });
}
VAANI_LANE Lanes zero() { return all(0.0f); }
VAANI_LANE Lanes load(const float* x) {
  return by_lane([&](int i) { return x[i]; });
}
VAANI_LANE Lanes load(const int8_t* x) {
  return by_lane([&](int i) { return static_cast<float>(x[i]); });
}
VAANI_LANE Lanes load(const uint16_t* x) {  // bfloat16
  return by_lane([&](int i) {
    const uint32_t bits = static_cast<uint32_t>(x[i]) << 16;
    float value;
    std::memcpy(&value, &bits, sizeof value);
    return value;
  });
}
// The exponent of float16 has 5 bits and a bias of 15. Not by a product with 2^112,
// which would meet numbers too small to be normal, that count as zero here.
VAANI_LANE float widened(uint16_t half) {
  const uint32_t sign = static_cast<uint32_t>(half & 0x8000) << 16;
  const uint32_t rest = static_cast<uint32_t>(half & 0x7fff) << 13;
  uint32_t bits = rest + (112u << 23);
  if (rest >= 31u << 23) bits = rest | 0x7f800000;  // infinite or NaN
  float value;
  if (rest < 1u << 23) {
    value = static_cast<float>(half & 0x3ff) * (1.0f / (1 << 24));
    std::memcpy(&bits, &value, sizeof bits);
  }
  bits |= sign;
  std::memcpy(&value, &bits, sizeof value);
  return value;
}
VAANI_LANE Lanes load_halves(const uint16_t* x) {
  return by_lane([&](int i) { return widened(x[i]); });
}
VAANI_LANE Lanes load(Nibbles x) {
  const uint8_t* bytes = x.bytes + (x.i >> 5 << 4);
  const int up = (x.i & 31) ? 0 : 4;
  return by_lane([&](int i) {
    const int8_t high = static_cast<int8_t>(bytes[i] << up);
    return static_cast<float>(high >> 4);
  });
}
VAANI_LANE void store(float* to, const Lanes& x) { std::memcpy(to, x.v, sizeof x.v); }
VAANI_LANE Lanes add(const Lanes& x, const Lanes& y) {
  return by_lane([&](int i) { return x.v[i] + y.v[i]; });
}
VAANI_LANE Lanes mul(const Lanes& x, const Lanes& y) {
  return by_lane([&](int i) { return x.v[i] * y.v[i]; });
}
VAANI_LANE Lanes divide(const Lanes& x, const Lanes& y) {
  return by_lane([&](int i) { return x.v[i] / y.v[i]; });
}
VAANI_LANE Lanes minus_abs(const Lanes& x) {
  return by_lane([&](int i) { return -std::fabs(x.v[i]); });
}
VAANI_LANE Lanes pick(const Lanes& x, const Lanes& a, const Lanes& b) {
  return by_lane([&](int i) { return x.v[i] < 0.0f ? b.v[i] : a.v[i]; });
}
VAANI_LANE Lanes at_least(const Lanes& x, const Lanes& least) {
  return by_lane([&](int i) { return x.v[i] < least.v[i] ? least.v[i] : x.v[i]; });
}
VAANI_LANE Lanes fma(const Lanes& x, const Lanes& y, const Lanes& sum) {
  return by_lane([&](int i) { return std::fma(x.v[i], y.v[i], sum.v[i]); });
}
VAANI_LANE Lanes nearest(const Lanes& x) {
  return by_lane([&](int i) { return std::nearbyint(x.v[i]); });
}
VAANI_LANE Lanes power(const Lanes& n) {
  return by_lane([&](int i) {
    // What is no exponent is NaN or infinite, and stays so by what it is multiplied with.
    const bool normal = n.v[i] >= -126.0f && n.v[i] <= 127.0f;
    const uint32_t bits = ((normal ? static_cast<int32_t>(n.v[i]) : 0) + 127) << 23;
    float value;
    std::memcpy(&value, &bits, sizeof value);
    return value;
  });
}

// Adds the products of a block to the sums of its sixteen outputs.
inline void add_block(const uint8_t* tile, const int8_t* q, int32_t* sums) {
  for (int64_t n = 0; n < kTile; ++n) {
    int32_t sum = 0;
    for (int64_t j = 0; j < 4; ++j) {
      const int32_t byte = tile[4 * n + j];
      for (int64_t plane = 0; plane < 4; ++plane)
        sum += ((byte >> (2 * plane)) & 3) * q[4 * plane + j];
    }
    sums[n] += sum;
  }
}

constexpr int kGroupRows = 1;
constexpr int group_columns(int) { return 1; }

VAANI_LANE void multiply_piece(const uint8_t* tiles, int64_t, const int8_t* q, int64_t,
                               int64_t blocks, const int32_t* starts, int64_t,
                               int64_t, Lanes (&sums)[1][1]) {
  int32_t found[kTile];
  std::fill_n(found, kTile, *starts);
  for (int64_t kb = 0; kb < blocks; ++kb)
    add_block(tiles + kb * kBlock, q + kb * kTile, found);
  sums[0][0] = by_lane([&](int i) { return static_cast<float>(found[i]); });
}

#include "floats.inc"
#include "groups.inc"

#undef VAANI_TARGET
#undef VAANI_LANE
}  // namespace portable

void portable_quantize(const float* x, int64_t k, const float* range, int8_t* codes,
                       int64_t stride, int32_t* sum, float* bound) {
  float largest = 0.0f;
  bool finite = true;
  for (int64_t i = 0; i < k; ++i) {
    // With a given range, infinities saturate; NaN never passes.
    finite &= range ? !std::isnan(x[i]) : std::isfinite(x[i]);
    largest = std::max(largest, std::fabs(x[i]));
  }
  float factor;
  *bound = bound_of(range ? *range : largest, finite, &factor);
  int32_t total = 0;
  for (int64_t i = 0; i < k; ++i) {
    float value = std::nearbyint(x[i] * factor);
    value = std::min(std::max(value, -128.0f), 127.0f);
    codes[i] = finite ? static_cast<int8_t>(value) : 0;
    total += codes[i];
  }
  std::memset(codes + k, 0, stride - k);
  *sum = total;
}

void portable_sum_units(const int8_t* codes, int64_t k, int32_t* sums) {
  for (int64_t unit = 0; unit < k / kUnit; ++unit) {
    int32_t sum = 0;
    for (int64_t i = 0; i < kUnit; ++i) sum += codes[unit * kUnit + i];
    sums[unit] = sum;
  }
}

void store_block(const Activations& a, const Product& p, int64_t block, int64_t row,
                 const int32_t* sums) {
  const int64_t first = block * kTile, count = std::min(kTile, p.n - first);
  float* out = p.out + row * p.n + first;
  for (int64_t i = 0; i < count; ++i) {
    const float scale = p.per_channel ? (a.bounds[row] * kPart) * p.scale[first + i]
                                      : a.bounds[row] * (*p.scale * kPart);
    out[i] = static_cast<float>(sums[i] - a.sums[row]) * scale;
  }
}

void portable_multiply(const Activations& a, const Product& p, int64_t begin,
                       int64_t end) {
  for (int64_t b = begin; b < end; ++b) {
    const uint8_t* tiles = p.tiles + b * p.depth * kBlock;
    for (int64_t m = 0; m < a.m; ++m) {
      int32_t sums[kTile] = {};
      for (int64_t kb = 0; kb < p.depth; ++kb)
        portable::add_block(tiles + kb * kBlock, a.codes + m * a.stride + kb * kTile,
                            sums);
      store_block(a, p, b, m, sums);
    }
  }
}

void portable_rows(const Wide& a, const Rows& r, int64_t begin, int64_t end) {
  for (int64_t v = begin; v < end; ++v) {
    const int8_t* w = r.codes + v * r.d;
    for (int64_t m = 0; m < a.m; ++m) {
      const uint8_t *high = a.high + m * a.stride, *low = a.low + m * a.stride;
      int32_t sum_high = 0, sum_low = 0;
      for (int64_t i = 0; i < r.d; ++i) {
        sum_high += (static_cast<int32_t>(high[i]) - 128) * w[i];
        sum_low += static_cast<int32_t>(low[i]) * w[i];
      }
      const double total = 256.0 * sum_high + sum_low;
      r.out[m * r.v + v] =
          static_cast<float>(total) * (a.scales[m] * r.scales[v]);
    }
  }
}

#if VAANI_X86

typedef float V8 __attribute__((vector_size(32)));

#if defined(__clang__)
#define VAANI_PICK(a, b, ...) __builtin_shufflevector(a, b, __VA_ARGS__)
#else
typedef int32_t Order __attribute__((vector_size(32)));
#define VAANI_PICK(a, b, ...) __builtin_shuffle(a, b, Order{__VA_ARGS__})
#endif

// -- AVX2 -------------------------------------------------------------------------

#define VAANI_AVX2 __attribute__((target("avx2,fma,f16c")))

namespace avx2 {

#define VAANI_TARGET VAANI_AVX2
#define VAANI_LANE VAANI_TARGET inline __attribute__((always_inline))

constexpr int kTileRows = 2, kTileColumns = 2;
constexpr int kDots = 8, kAdds = 4;

struct Lanes {
  __m256 low, high;
};

VAANI_LANE Lanes all(float x) { return {_mm256_set1_ps(x), _mm256_set1_ps(x)}; }
VAANI_LANE Lanes zero() { return {_mm256_setzero_ps(), _mm256_setzero_ps()}; }
VAANI_LANE Lanes load(const float* x) {
  return {_mm256_loadu_ps(x), _mm256_loadu_ps(x + 8)};
}
VAANI_LANE Lanes from_bytes(__m128i bytes) {
  return {_mm256_cvtepi32_ps(_mm256_cvtepi8_epi32(bytes)),
          _mm256_cvtepi32_ps(_mm256_cvtepi8_epi32(_mm_srli_si128(bytes, 8)))};
}
VAANI_LANE Lanes load(const int8_t* x) {
  return from_bytes(_mm_loadu_si128(reinterpret_cast<const __m128i*>(x)));
}
VAANI_LANE Lanes from_halves(__m128i halves) {  // the low ones
  const __m128i values = _mm_setr_epi8(0, 1, 2, 3, 4, 5, 6, 7, -8, -7, -6, -5, -4, -3, -2, -1);
  return from_bytes(_mm_shuffle_epi8(values, _mm_and_si128(halves, _mm_set1_epi8(15))));
}
VAANI_LANE void load_two(Nibbles x, Lanes* to) {
  const void* from = x.bytes + (x.i >> 1);
  const __m128i bytes = _mm_loadu_si128(static_cast<const __m128i*>(from));
  to[0] = from_halves(bytes);
  to[1] = from_halves(_mm_srli_epi16(bytes, 4));
}
VAANI_LANE Lanes load(Nibbles x) {
  Lanes both[2];
  load_two(Nibbles{x.bytes, x.i & ~31}, both);
  return both[(x.i & 31) != 0];
}
VAANI_LANE __m256 widened(const uint16_t* x) {
  const __m128i halves = _mm_loadu_si128(reinterpret_cast<const __m128i*>(x));
  return _mm256_castsi256_ps(_mm256_slli_epi32(_mm256_cvtepu16_epi32(halves), 16));
}
VAANI_LANE Lanes load(const uint16_t* x) { return {widened(x), widened(x + 8)}; }
VAANI_LANE Lanes load_halves(const uint16_t* x) {
  const __m128i* halves = reinterpret_cast<const __m128i*>(x);
  return {_mm256_cvtph_ps(_mm_loadu_si128(halves)),
          _mm256_cvtph_ps(_mm_loadu_si128(halves + 1))};
}
VAANI_LANE void store(float* to, Lanes x) {
  _mm256_storeu_ps(to, x.low);
  _mm256_storeu_ps(to + 8, x.high);
}
VAANI_LANE Lanes add(Lanes x, Lanes y) {
  return {_mm256_add_ps(x.low, y.low), _mm256_add_ps(x.high, y.high)};
}
VAANI_LANE Lanes mul(Lanes x, Lanes y) {
  return {_mm256_mul_ps(x.low, y.low), _mm256_mul_ps(x.high, y.high)};
}
VAANI_LANE Lanes divide(Lanes x, Lanes y) {
  return {_mm256_div_ps(x.low, y.low), _mm256_div_ps(x.high, y.high)};
}
VAANI_LANE Lanes minus_abs(Lanes x) {
  const __m256 sign = _mm256_set1_ps(-0.0f);
  return {_mm256_or_ps(x.low, sign), _mm256_or_ps(x.high, sign)};
}
VAANI_LANE Lanes pick(Lanes x, Lanes a, Lanes b) {
  return {_mm256_blendv_ps(a.low, b.low, x.low),
          _mm256_blendv_ps(a.high, b.high, x.high)};
}
VAANI_LANE Lanes at_least(Lanes x, Lanes least) {  // the second, where one is NaN
  return {_mm256_max_ps(least.low, x.low), _mm256_max_ps(least.high, x.high)};
}
VAANI_LANE Lanes fma(Lanes x, Lanes y, Lanes sum) {
  return {_mm256_fmadd_ps(x.low, y.low, sum.low),
          _mm256_fmadd_ps(x.high, y.high, sum.high)};
}
VAANI_LANE __m256 nearest(__m256 x) {
  return _mm256_round_ps(x, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC);
}
VAANI_LANE Lanes nearest(Lanes x) { return {nearest(x.low), nearest(x.high)}; }
VAANI_LANE __m256 power(__m256 n) {
  const __m256i whole = _mm256_add_epi32(_mm256_cvtps_epi32(n), _mm256_set1_epi32(127));
  return _mm256_castsi256_ps(_mm256_slli_epi32(whole, 23));
}
VAANI_LANE Lanes power(Lanes n) { return {power(n.low), power(n.high)}; }
VAANI_LANE __m256 folded(Lanes x) { return _mm256_add_ps(x.low, x.high); }

#define VAANI_FOLDED
#include "floats.inc"
#undef VAANI_FOLDED

#undef VAANI_TARGET
#undef VAANI_LANE
}  // namespace avx2

VAANI_AVX2 void avx2_quantize(const float* x, int64_t k, const float* range,
                              int8_t* codes, int64_t stride, int32_t* sum,
                              float* bound) {
  const __m256 magnitude = _mm256_castsi256_ps(_mm256_set1_epi32(0x7fffffff));
  const __m256 infinity = _mm256_set1_ps(std::numeric_limits<float>::infinity());
  __m256 largest = _mm256_setzero_ps(), bad = _mm256_setzero_ps();
  int64_t i = 0;
  for (; i + 8 <= k; i += 8) {
    const __m256 v = _mm256_and_ps(_mm256_loadu_ps(x + i), magnitude);
    largest = _mm256_max_ps(largest, v);
    bad = _mm256_or_ps(bad, range ? _mm256_cmp_ps(v, v, _CMP_UNORD_Q)
                                  : _mm256_cmp_ps(v, infinity, _CMP_NLT_UQ));
  }
  float lanes[8], most = 0.0f;
  bool finite = _mm256_movemask_ps(bad) == 0;
  _mm256_storeu_ps(lanes, largest);
  for (float lane : lanes) most = std::max(most, lane);
  for (int64_t j = i; j < k; ++j) {
    finite &= range ? !std::isnan(x[j]) : std::isfinite(x[j]);
    most = std::max(most, std::fabs(x[j]));
  }
  float factor;
  *bound = bound_of(range ? *range : most, finite, &factor);
  if (!finite) {
    std::memset(codes, 0, stride);
    *sum = 0;
    return;
  }
  const __m256 by = _mm256_set1_ps(factor);
  const __m256 low = _mm256_set1_ps(-128.0f), high = _mm256_set1_ps(127.0f);
  __m256i total = _mm256_setzero_si256();
  for (i = 0; i + 8 <= k; i += 8) {
    __m256 v = _mm256_mul_ps(_mm256_loadu_ps(x + i), by);
    v = _mm256_min_ps(_mm256_max_ps(v, low), high);
    const __m256i q = _mm256_cvtps_epi32(v);
    total = _mm256_add_epi32(total, q);
    const __m128i words = _mm_packs_epi32(_mm256_castsi256_si128(q),
                                          _mm256_extracti128_si256(q, 1));
    _mm_storel_epi64(reinterpret_cast<__m128i*>(codes + i),
                     _mm_packs_epi16(words, words));
  }
  int32_t totals[8];
  _mm256_storeu_si256(reinterpret_cast<__m256i*>(totals), total);
  int32_t result = 0;
  for (int32_t t : totals) result += t;
  for (; i < k; ++i) {
    const float v = std::min(std::max(x[i] * factor, -128.0f), 127.0f);
    codes[i] = static_cast<int8_t>(std::nearbyint(v));
    result += codes[i];
  }
  std::memset(codes + k, 0, stride - k);
  *sum = result;
}

VAANI_AVX2 int32_t avx2_total(__m256i v) {
  __m128i s = _mm_add_epi32(_mm256_castsi256_si128(v), _mm256_extracti128_si256(v, 1));
  s = _mm_add_epi32(s, _mm_shuffle_epi32(s, 0x4e));
  s = _mm_add_epi32(s, _mm_shuffle_epi32(s, 0xb1));
  return _mm_cvtsi128_si32(s);
}

VAANI_AVX2 void avx2_sum_units(const int8_t* codes, int64_t k, int32_t* sums) {
  const __m256i ones = _mm256_set1_epi8(1), one = _mm256_set1_epi16(1);
  for (int64_t i = 0; i + kUnit <= k; i += kUnit) {
    const __m256i q = _mm256_loadu_si256(reinterpret_cast<const __m256i*>(codes + i));
    sums[i / kUnit] = avx2_total(_mm256_madd_epi16(_mm256_maddubs_epi16(ones, q), one));
  }
}

inline int32_t four(const int8_t* q) {
  int32_t value;
  std::memcpy(&value, q, 4);
  return value;
}

// Pairs of products are at most 2 * 2 * 128 and four planes are added: fifteen blocks
// fit in 16 bits before they must be widened.
constexpr int64_t kNarrowBlocks = 15;

// Adds the products of M rows with `blocks` blocks, any number, to their sums.
template <int M>
VAANI_AVX2 inline __attribute__((always_inline)) void avx2_add(
    const uint8_t* tiles, const int8_t* q, int64_t stride, int64_t blocks,
    __m256i (&sums)[M][2]) {
  const __m256i three = _mm256_set1_epi8(3), one = _mm256_set1_epi16(1);
  for (int64_t start = 0; start < blocks; start += kNarrowBlocks) {
    const int64_t stop = std::min(start + kNarrowBlocks, blocks);
    __m256i acc[M][2];
    for (int m = 0; m < M; ++m) acc[m][0] = acc[m][1] = _mm256_setzero_si256();
    for (int64_t kb = start; kb < stop; ++kb) {
      ask_for(tiles + kb * kBlock + kAhead);
      const __m256i* tile = reinterpret_cast<const __m256i*>(tiles + kb * kBlock);
      __m256i left = _mm256_loadu_si256(tile), right = _mm256_loadu_si256(tile + 1);
      for (int plane = 0; plane < 4; ++plane) {
        const __m256i l = _mm256_and_si256(left, three);
        const __m256i r = _mm256_and_si256(right, three);
        left = _mm256_srli_epi16(left, 2);
        right = _mm256_srli_epi16(right, 2);
        for (int m = 0; m < M; ++m) {
          const __m256i x =
              _mm256_set1_epi32(four(q + m * stride + kb * kTile + 4 * plane));
          acc[m][0] = _mm256_add_epi16(acc[m][0], _mm256_maddubs_epi16(l, x));
          acc[m][1] = _mm256_add_epi16(acc[m][1], _mm256_maddubs_epi16(r, x));
        }
      }
    }
    for (int m = 0; m < M; ++m)
      for (int half = 0; half < 2; ++half)
        sums[m][half] =
            _mm256_add_epi32(sums[m][half], _mm256_madd_epi16(acc[m][half], one));
  }
}

template <int M>
VAANI_AVX2 void avx2_block(const Activations& a, const Product& p, int64_t b,
                           int64_t row) {
  __m256i sums[M][2];
  for (int m = 0; m < M; ++m) sums[m][0] = sums[m][1] = _mm256_setzero_si256();
  avx2_add(p.tiles + b * p.depth * kBlock, a.codes + row * a.stride, a.stride, p.depth,
           sums);
  for (int m = 0; m < M; ++m) {
    alignas(32) int32_t found[kTile];
    _mm256_store_si256(reinterpret_cast<__m256i*>(found), sums[m][0]);
    _mm256_store_si256(reinterpret_cast<__m256i*>(found + 8), sums[m][1]);
    store_block(a, p, b, row + m, found);
  }
}

VAANI_AVX2 void avx2_multiply(const Activations& a, const Product& p, int64_t begin,
                              int64_t end) {
  int64_t row = 0;
  for (; row + 4 <= a.m; row += 4)
    for (int64_t b = begin; b < end; ++b) avx2_block<4>(a, p, b, row);
  for (int64_t b = begin; b < end; ++b) switch (a.m - row) {
      case 3: avx2_block<3>(a, p, b, row); break;
      case 2: avx2_block<2>(a, p, b, row); break;
      case 1: avx2_block<1>(a, p, b, row); break;
    }
}

VAANI_AVX2 void avx2_rows(const Wide& a, const Rows& r, int64_t begin, int64_t end) {
  const int64_t whole = r.d / 16 * 16;
  for (int64_t v = begin; v < end; ++v) {
    const int8_t* w = r.codes + v * r.d;
    for (int64_t m = 0; m < a.m; ++m) {
      const uint8_t *high = a.high + m * a.stride, *low = a.low + m * a.stride;
      __m256i sum_high = _mm256_setzero_si256(), sum_low = _mm256_setzero_si256();
      for (int64_t i = 0; i < whole; i += 16) {
        // Sixteen bits on both sides: pairs sum to at most 2 * 255 * 128.
        const __m256i x = _mm256_cvtepi8_epi16(
            _mm_loadu_si128(reinterpret_cast<const __m128i*>(w + i)));
        const __m256i h = _mm256_sub_epi16(
            _mm256_cvtepu8_epi16(
                _mm_loadu_si128(reinterpret_cast<const __m128i*>(high + i))),
            _mm256_set1_epi16(128));
        const __m256i l = _mm256_cvtepu8_epi16(
            _mm_loadu_si128(reinterpret_cast<const __m128i*>(low + i)));
        sum_high = _mm256_add_epi32(sum_high, _mm256_madd_epi16(h, x));
        sum_low = _mm256_add_epi32(sum_low, _mm256_madd_epi16(l, x));
      }
      int32_t total_high = avx2_total(sum_high), total_low = avx2_total(sum_low);
      for (int64_t i = whole; i < r.d; ++i) {
        total_high += (static_cast<int32_t>(high[i]) - 128) * w[i];
        total_low += static_cast<int32_t>(low[i]) * w[i];
      }
      r.out[m * r.v + v] = static_cast<float>(256.0 * total_high + total_low) *
                           (a.scales[m] * r.scales[v]);
    }
  }
}

namespace avx2 {

#define VAANI_TARGET VAANI_AVX2

constexpr int kGroupRows = 4;
constexpr int group_columns(int) { return 1; }

template <int M>
VAANI_AVX2 inline __attribute__((always_inline)) void multiply_piece(
    const uint8_t* tiles, int64_t, const int8_t* q, int64_t stride, int64_t blocks,
    const int32_t* starts, int64_t pieces, int64_t, Lanes (&sums)[M][1]) {
  __m256i found[M][2];
  for (int m = 0; m < M; ++m)
    found[m][0] = found[m][1] = _mm256_set1_epi32(starts[m * pieces]);
  avx2_add(tiles, q, stride, blocks, found);
  for (int m = 0; m < M; ++m)
    sums[m][0] = {_mm256_cvtepi32_ps(found[m][0]), _mm256_cvtepi32_ps(found[m][1])};
}

#include "groups.inc"

#undef VAANI_TARGET
}  // namespace avx2

bool has_avx2() {
  unsigned a = 0, b, c = 0, d;
  __asm__("cpuid" : "+a"(a), "=b"(b), "+c"(c), "=d"(d));
  if (a < 1) return false;
  a = 1, c = 0;
  __asm__("cpuid" : "+a"(a), "=b"(b), "+c"(c), "=d"(d));
  const bool f16c = (c >> 29) & 1;
  return f16c && __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma");
}

// -- AVX2 with VNNI: processors that lack AVX-512 -----------------------------------

#if __GNUC__ >= 11 || __clang_major__ >= 13
#define VAANI_VNNI 1
#define VAANI_AVXVNNI __attribute__((target("avx2,fma,f16c,avxvnni")))

namespace avxvnni {

#define VAANI_TARGET VAANI_AVXVNNI
#define VAANI_LANE VAANI_TARGET inline __attribute__((always_inline))

using avx2::add;
using avx2::all;
using avx2::Lanes;
using avx2::load;
using avx2::load_halves;
using avx2::mul;
using avx2::store;
using avx2::zero;

// The sums of M rows with `blocks` blocks, from `starts` on, which are `apart`. Products
// wait for those before them in a sum: of few rows, each has two.
template <int M>
VAANI_LANE void sum_blocks(const uint8_t* tiles, const int8_t* q, int64_t stride,
                           int64_t blocks, const int32_t* starts, int64_t apart,
                           __m256i (&sums)[M][2]) {
  constexpr int U = M <= 2 ? 2 : 1;
  const __m256i three = _mm256_set1_epi8(3);
  __m256i acc[U][M][2];
  for (int u = 0; u < U; ++u)
    for (int m = 0; m < M; ++m)
      acc[u][m][0] = acc[u][m][1] =
          u ? _mm256_setzero_si256() : _mm256_set1_epi32(starts[m * apart]);
  for (int64_t kb = 0; kb < blocks; ++kb) {
    ask_for(tiles + kb * kBlock + kAhead);
    const __m256i* tile = reinterpret_cast<const __m256i*>(tiles + kb * kBlock);
    __m256i left = _mm256_loadu_si256(tile), right = _mm256_loadu_si256(tile + 1);
    for (int plane = 0; plane < 4; ++plane) {
      const __m256i l = _mm256_and_si256(left, three);
      const __m256i r = _mm256_and_si256(right, three);
      left = _mm256_srli_epi16(left, 2);
      right = _mm256_srli_epi16(right, 2);
      for (int m = 0; m < M; ++m) {
        __m256i(&to)[2] = acc[plane % U][m];
        const __m256i x =
            _mm256_set1_epi32(four(q + m * stride + kb * kTile + 4 * plane));
        to[0] = _mm256_dpbusd_avx_epi32(to[0], l, x);
        to[1] = _mm256_dpbusd_avx_epi32(to[1], r, x);
      }
    }
  }
  for (int m = 0; m < M; ++m)
    for (int half = 0; half < 2; ++half) {
      sums[m][half] = acc[0][m][half];
      for (int u = 1; u < U; ++u)
        sums[m][half] = _mm256_add_epi32(sums[m][half], acc[u][m][half]);
    }
}

template <int M>
VAANI_AVXVNNI void block(const Activations& a, const Product& p, int64_t b, int64_t row) {
  const int32_t nothing = 0;
  __m256i sums[M][2];
  sum_blocks(p.tiles + b * p.depth * kBlock, a.codes + row * a.stride, a.stride, p.depth,
             &nothing, 0, sums);
  for (int m = 0; m < M; ++m) {
    alignas(32) int32_t found[kTile];
    _mm256_store_si256(reinterpret_cast<__m256i*>(found), sums[m][0]);
    _mm256_store_si256(reinterpret_cast<__m256i*>(found + 8), sums[m][1]);
    store_block(a, p, b, row + m, found);
  }
}

void multiply(const Activations& a, const Product& p, int64_t begin, int64_t end) {
  int64_t row = 0;
  for (; row + 4 <= a.m; row += 4)
    for (int64_t b = begin; b < end; ++b) block<4>(a, p, b, row);
  for (int64_t b = begin; b < end; ++b) switch (a.m - row) {
      case 3: block<3>(a, p, b, row); break;
      case 2: block<2>(a, p, b, row); break;
      case 1: block<1>(a, p, b, row); break;
    }
}

constexpr int kGroupRows = 4;
constexpr int group_columns(int) { return 1; }

template <int M>
VAANI_LANE void multiply_piece(const uint8_t* tiles, int64_t, const int8_t* q,
                               int64_t stride, int64_t blocks, const int32_t* starts,
                               int64_t pieces, int64_t, Lanes (&sums)[M][1]) {
  __m256i found[M][2];
  sum_blocks(tiles, q, stride, blocks, starts, pieces, found);
  for (int m = 0; m < M; ++m)
    sums[m][0] = {_mm256_cvtepi32_ps(found[m][0]), _mm256_cvtepi32_ps(found[m][1])};
}

#include "groups.inc"

bool available() {
  if (!has_avx2()) return false;
  unsigned a = 7, b, c = 0, d;
  __asm__("cpuid" : "+a"(a), "=b"(b), "+c"(c), "=d"(d));
  if (a < 1) return false;
  a = 7, c = 1;
  __asm__("cpuid" : "+a"(a), "=b"(b), "+c"(c), "=d"(d));
  return (a >> 4) & 1;
}

#undef VAANI_TARGET
#undef VAANI_LANE
}  // namespace avxvnni
#endif  // VNNI

// -- AVX-512 with VNNI ------------------------------------------------------------

#define VAANI_AVX512 \
  __attribute__((target("avx512f,avx512bw,avx512vl,avx512dq,avx512vnni")))

namespace avx512 {

#define VAANI_TARGET VAANI_AVX512
#define VAANI_LANE VAANI_TARGET inline __attribute__((always_inline))

constexpr int kTileRows = 4, kTileColumns = 4;
constexpr int kDots = 16, kAdds = 16;

typedef __m512 Lanes;

VAANI_LANE Lanes all(float x) { return _mm512_set1_ps(x); }
VAANI_LANE Lanes zero() { return _mm512_setzero_ps(); }
VAANI_LANE Lanes load(const float* x) { return _mm512_loadu_ps(x); }
VAANI_LANE Lanes load(const int8_t* x) {
  const __m128i bytes = _mm_loadu_si128(reinterpret_cast<const __m128i*>(x));
  return _mm512_cvtepi32_ps(_mm512_cvtepi8_epi32(bytes));
}
VAANI_LANE Lanes from_halves(__m512i halves) {  // of words, the low four bits
  const Lanes values = _mm512_setr_ps(0, 1, 2, 3, 4, 5, 6, 7, -8, -7, -6, -5, -4, -3, -2, -1);
  return _mm512_permutexvar_ps(halves, values);
}
VAANI_LANE void load_two(Nibbles x, Lanes* to) {
  const void* from = x.bytes + (x.i >> 1);
  const __m512i words = _mm512_cvtepu8_epi32(_mm_loadu_si128(static_cast<const __m128i*>(from)));
  to[0] = from_halves(words);
  to[1] = from_halves(_mm512_srli_epi32(words, 4));
}
VAANI_LANE Lanes load(Nibbles x) {
  const void* from = x.bytes + (x.i >> 5 << 4);
  const __m512i words = _mm512_cvtepu8_epi32(_mm_loadu_si128(static_cast<const __m128i*>(from)));
  return from_halves((x.i & 31) ? _mm512_srli_epi32(words, 4) : words);
}
VAANI_LANE Lanes load(const uint16_t* x) {  // bfloat16
  const __m256i halves = _mm256_loadu_si256(reinterpret_cast<const __m256i*>(x));
  return _mm512_castsi512_ps(_mm512_slli_epi32(_mm512_cvtepu16_epi32(halves), 16));
}
VAANI_LANE Lanes load_halves(const uint16_t* x) {
  return _mm512_cvtph_ps(_mm256_loadu_si256(reinterpret_cast<const __m256i*>(x)));
}
VAANI_LANE void store(float* to, Lanes x) { _mm512_storeu_ps(to, x); }
VAANI_LANE Lanes add(Lanes x, Lanes y) { return _mm512_add_ps(x, y); }
VAANI_LANE Lanes mul(Lanes x, Lanes y) { return _mm512_mul_ps(x, y); }
VAANI_LANE Lanes divide(Lanes x, Lanes y) { return _mm512_div_ps(x, y); }
VAANI_LANE Lanes minus_abs(Lanes x) { return _mm512_or_ps(x, _mm512_set1_ps(-0.0f)); }
VAANI_LANE Lanes pick(Lanes x, Lanes a, Lanes b) {
  return _mm512_mask_blend_ps(_mm512_cmp_ps_mask(x, zero(), _CMP_LT_OQ), a, b);
}
VAANI_LANE Lanes at_least(Lanes x, Lanes least) {  // the second, where one is NaN
  return _mm512_max_ps(least, x);
}
VAANI_LANE Lanes fma(Lanes x, Lanes y, Lanes sum) { return _mm512_fmadd_ps(x, y, sum); }
VAANI_LANE Lanes nearest(Lanes x) {
  return _mm512_roundscale_ps(x, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC);
}
VAANI_LANE Lanes power(Lanes n) {
  const __m512i whole = _mm512_add_epi32(_mm512_cvtps_epi32(n), _mm512_set1_epi32(127));
  return _mm512_castsi512_ps(_mm512_slli_epi32(whole, 23));
}
VAANI_LANE __m256 folded(Lanes x) {
  return _mm256_add_ps(_mm512_castps512_ps256(x), _mm512_extractf32x8_ps(x, 1));
}

#define VAANI_FOLDED
#include "floats.inc"
#undef VAANI_FOLDED

#undef VAANI_TARGET
#undef VAANI_LANE
}  // namespace avx512

VAANI_AVX512 void avx512_quantize(const float* x, int64_t k, const float* range,
                                  int8_t* codes, int64_t stride, int32_t* sum,
                                  float* bound) {
  const __m512 infinity = _mm512_set1_ps(std::numeric_limits<float>::infinity());
  __m512 largest = _mm512_setzero_ps();
  __mmask16 bad = 0;
  for (int64_t i = 0; i < k; i += 16) {
    const __mmask16 mask = k - i >= 16 ? 0xffff : (1u << (k - i)) - 1;
    const __m512 v = _mm512_abs_ps(_mm512_maskz_loadu_ps(mask, x + i));
    largest = _mm512_max_ps(largest, v);
    bad |= range ? _mm512_cmp_ps_mask(v, v, _CMP_UNORD_Q)
                 : _mm512_cmp_ps_mask(v, infinity, _CMP_NLT_UQ);
  }
  float factor;
  *bound = bound_of(range ? *range : _mm512_reduce_max_ps(largest), !bad, &factor);
  if (bad) {
    std::memset(codes, 0, stride);
    *sum = 0;
    return;
  }
  const __m512 by = _mm512_set1_ps(factor);
  const __m512 low = _mm512_set1_ps(-128.0f), high = _mm512_set1_ps(127.0f);
  __m512i total = _mm512_setzero_si512();
  int64_t i = 0;
  for (; i < k; i += 16) {
    const __mmask16 mask = k - i >= 16 ? 0xffff : (1u << (k - i)) - 1;
    __m512 v = _mm512_mul_ps(_mm512_maskz_loadu_ps(mask, x + i), by);
    v = _mm512_min_ps(_mm512_max_ps(v, low), high);
    const __m512i q = _mm512_cvtps_epi32(v);
    total = _mm512_add_epi32(total, q);
    _mm_storeu_si128(reinterpret_cast<__m128i*>(codes + i), _mm512_cvtsepi32_epi8(q));
  }
  std::memset(codes + i, 0, stride - i);
  *sum = _mm512_reduce_add_epi32(total);
}

VAANI_AVX512 void avx512_sum_units(const int8_t* codes, int64_t k, int32_t* sums) {
  const __m256i ones = _mm256_set1_epi8(1);
  for (int64_t i = 0; i + kUnit <= k; i += kUnit) {
    const __m256i q = _mm256_loadu_si256(reinterpret_cast<const __m256i*>(codes + i));
    const __m256i fours = _mm256_dpbusd_epi32(_mm256_setzero_si256(), ones, q);
    __m128i s = _mm_add_epi32(_mm256_castsi256_si128(fours),
                              _mm256_extracti128_si256(fours, 1));
    s = _mm_add_epi32(s, _mm_shuffle_epi32(s, 0x4e));
    sums[i / kUnit] = _mm_extract_epi32(s, 0) + _mm_extract_epi32(s, 1);
  }
}

VAANI_AVX512 inline void avx512_store(const Activations& a, const Product& p,
                                      int64_t block, int64_t row, __m512i sums) {
  const int64_t first = block * kTile, left = p.n - first;
  const __mmask16 mask = left >= kTile ? 0xffff : (1u << left) - 1;
  const float bound = a.bounds[row];
  const __m512 scale =
      p.per_channel ? _mm512_mul_ps(_mm512_set1_ps(bound * kPart),
                                    _mm512_maskz_loadu_ps(mask, p.scale + first))
                    : _mm512_set1_ps(bound * (*p.scale * kPart));
  sums = _mm512_sub_epi32(sums, _mm512_set1_epi32(a.sums[row]));
  _mm512_mask_storeu_ps(p.out + row * p.n + first, mask,
                        _mm512_mul_ps(_mm512_cvtepi32_ps(sums), scale));
}

#define VAANI_AVX512_INLINE VAANI_AVX512 inline __attribute__((always_inline))

// One or two rows: bound by reading the tiles. The planes are masked where they stand, which
// multiplies their sums by 1, 4, 16 and 64; each has its accumulator and is shifted
// back at the end.
template <int M>
VAANI_AVX512_INLINE void avx512_add_planes(const uint8_t* tile, const int8_t* q,
                                           int64_t stride, __m512i (&acc)[M][4]) {
  const __m512i masks[4] = {
      _mm512_set1_epi8(0x03), _mm512_set1_epi8(0x0c), _mm512_set1_epi8(0x30),
      _mm512_set1_epi8(static_cast<char>(0xc0))};
  const __m512i block = _mm512_loadu_si512(tile);
  for (int plane = 0; plane < 4; ++plane) {
    const __m512i codes = _mm512_and_si512(block, masks[plane]);
    for (int m = 0; m < M; ++m)
      acc[m][plane] = _mm512_dpbusd_epi32(
          acc[m][plane], codes, _mm512_set1_epi32(four(q + m * stride + 4 * plane)));
  }
}

VAANI_AVX512_INLINE __m512i avx512_of_planes(const __m512i (&acc)[4]) {
  const __m512i low = _mm512_add_epi32(acc[0], _mm512_srai_epi32(acc[1], 2));
  const __m512i high =
      _mm512_add_epi32(_mm512_srai_epi32(acc[2], 4), _mm512_srai_epi32(acc[3], 6));
  return _mm512_add_epi32(low, high);
}

// U accumulators a plane hide the latency of vpdpbusd.
template <int M, int U>
VAANI_AVX512 void avx512_narrow(const Activations& a, const Product& p, int64_t row,
                                int64_t begin, int64_t end) {
  const int8_t* q = a.codes + row * a.stride;
  for (int64_t b = begin; b < end; ++b) {
    const uint8_t* tiles = p.tiles + b * p.depth * kBlock;
    __m512i acc[U][M][4];
    for (int u = 0; u < U; ++u)
      for (int m = 0; m < M; ++m)
        for (int plane = 0; plane < 4; ++plane)
          acc[u][m][plane] = _mm512_setzero_si512();
    int64_t kb = 0;
    for (; kb + U <= p.depth; kb += U)
      for (int u = 0; u < U; ++u) {
        ask_for(tiles + (kb + u) * kBlock + kAhead);
        avx512_add_planes(tiles + (kb + u) * kBlock, q + (kb + u) * kTile, a.stride,
                          acc[u]);
      }
    for (; kb < p.depth; ++kb)
      avx512_add_planes(tiles + kb * kBlock, q + kb * kTile, a.stride, acc[0]);
    for (int m = 0; m < M; ++m) {
      __m512i sum = _mm512_setzero_si512();
      for (int u = 0; u < U; ++u)
        sum = _mm512_add_epi32(sum, avx512_of_planes(acc[u][m]));
      avx512_store(a, p, b, row + m, sum);
    }
  }
}

// More rows: bound by arithmetic. M rows times two blocks in registers; a tile is
// unpacked once for all of them.
template <int M>
VAANI_AVX512_INLINE void avx512_add_pair(const uint8_t* tiles, const uint8_t* others,
                                         const int8_t* q, int64_t stride, int64_t kb,
                                         __m512i (&acc)[M][2]) {
  const __m512i three = _mm512_set1_epi8(3);
  __m512i left = _mm512_loadu_si512(tiles + kb * kBlock);
  __m512i right = _mm512_loadu_si512(others + kb * kBlock);
  for (int plane = 0; plane < 4; ++plane) {
    const __m512i l = _mm512_and_si512(left, three);
    const __m512i r = _mm512_and_si512(right, three);
    left = _mm512_srli_epi16(left, 2);
    right = _mm512_srli_epi16(right, 2);
    for (int m = 0; m < M; ++m) {
      const __m512i x =
          _mm512_set1_epi32(four(q + m * stride + kb * kTile + 4 * plane));
      acc[m][0] = _mm512_dpbusd_epi32(acc[m][0], l, x);
      acc[m][1] = _mm512_dpbusd_epi32(acc[m][1], r, x);
    }
  }
}

template <int M>
VAANI_AVX512 void avx512_wide(const Activations& a, const Product& p, int64_t row,
                              int64_t begin, int64_t end) {
  const int8_t* q = a.codes + row * a.stride;
  for (int64_t b = begin; b < end; b += 2) {
    const bool pair = b + 1 < end;
    const uint8_t* tiles = p.tiles + b * p.depth * kBlock;
    const uint8_t* others = pair ? tiles + p.depth * kBlock : tiles;
    __m512i acc[M][2];
    for (int m = 0; m < M; ++m) acc[m][0] = acc[m][1] = _mm512_setzero_si512();
    for (int64_t kb = 0; kb < p.depth; ++kb) {
      if (M <= kFew) {
        ask_for(tiles + (kb + 2 * p.depth) * kBlock);
        ask_for(others + (kb + 2 * p.depth) * kBlock);
      }
      avx512_add_pair(tiles, others, q, a.stride, kb, acc);
    }
    for (int m = 0; m < M; ++m) {
      avx512_store(a, p, b, row + m, acc[m][0]);
      if (pair) avx512_store(a, p, b + 1, row + m, acc[m][1]);
    }
  }
}

using Avx512Part = void (*)(const Activations&, const Product&, int64_t, int64_t,
                            int64_t);

template <int... I>
constexpr std::array<Avx512Part, sizeof...(I)> wide_parts(
    std::integer_sequence<int, I...>) {
  return {avx512_wide<I + 1>...};
}

// More than this, and compilers spill.
constexpr int kWide = 8;
constexpr auto kWideParts = wide_parts(std::make_integer_sequence<int, kWide>());

VAANI_AVX512 void avx512_multiply(const Activations& a, const Product& p,
                                  int64_t begin, int64_t end) {
  switch (a.m) {
    case 1: return avx512_narrow<1, 2>(a, p, 0, begin, end);
    case 2: return avx512_narrow<2, 1>(a, p, 0, begin, end);
  }
  for (int64_t row = 0; row < a.m;) {
    // Rows in equal parts: 9 are 5 and 4, not 8 and 1.
    const int64_t left = a.m - row, parts = (left + kWide - 1) / kWide;
    const int64_t count = (left + parts - 1) / parts;
    kWideParts[count - 1](a, p, row, begin, end);
    row += count;
  }
}

namespace avx512 {

#define VAANI_TARGET VAANI_AVX512

constexpr int kGroupRows = 6;  // that have floats beside their integers
constexpr int group_columns(int rows) { return rows <= 2 ? 1 : 2; }

// One or two rows: tiles are read in one go. Two accumulators hide latency.
template <int M>
VAANI_AVX512_INLINE void multiply_piece(const uint8_t* tiles, int64_t, const int8_t* q,
                                        int64_t stride, int64_t blocks,
                                        const int32_t* starts, int64_t pieces, int64_t,
                                        Lanes (&sums)[M][1]) {
  const __m512i three = _mm512_set1_epi8(3);
  __m512i acc[M][2];
  for (int m = 0; m < M; ++m) {
    acc[m][0] = _mm512_set1_epi32(starts[m * pieces]);
    acc[m][1] = _mm512_setzero_si512();
  }
  for (int64_t kb = 0; kb < blocks; kb += 2)  // their number is even
    for (int u = 0; u < 2; ++u) {
      const uint8_t* at = tiles + (kb + u) * kBlock;
      ask_for(at + kAhead);
      __m512i tile = _mm512_loadu_si512(at);
      for (int plane = 0; plane < 4; ++plane) {
        const __m512i codes = _mm512_and_si512(tile, three);
        tile = _mm512_srli_epi16(tile, 2);
        for (int m = 0; m < M; ++m)
          acc[m][u] = _mm512_dpbusd_epi32(
              acc[m][u], codes,
              _mm512_set1_epi32(four(q + m * stride + (kb + u) * kTile + 4 * plane)));
      }
    }
  for (int m = 0; m < M; ++m)
    sums[m][0] = _mm512_cvtepi32_ps(_mm512_add_epi32(acc[m][0], acc[m][1]));
}

template <int M>
VAANI_AVX512_INLINE void multiply_piece(const uint8_t* tiles, int64_t apart,
                                        const int8_t* q, int64_t stride, int64_t blocks,
                                        const int32_t* starts, int64_t pieces,
                                        int64_t next, Lanes (&sums)[M][2]) {
  __m512i acc[M][2];
  for (int m = 0; m < M; ++m)
    acc[m][0] = acc[m][1] = _mm512_set1_epi32(starts[m * pieces]);
  for (int64_t kb = 0; kb < blocks; ++kb) {
    if (M <= kFew) {
      ask_for(tiles + kb * kBlock + next);
      ask_for(tiles + kb * kBlock + next + apart);
    }
    avx512_add_pair(tiles, tiles + apart, q, stride, kb, acc);
  }
  for (int m = 0; m < M; ++m)
    for (int c = 0; c < 2; ++c) sums[m][c] = _mm512_cvtepi32_ps(acc[m][c]);
}

#include "groups.inc"

#undef VAANI_TARGET
}  // namespace avx512

// u8 high and low bytes times s8 weights; 128 * sum(weights) comes from a third
// product, which costs nothing where memory is the limit.
template <int M>
VAANI_AVX512 void avx512_rows_of(const Wide& a, const Rows& r, int64_t row,
                                 int64_t begin, int64_t end) {
  const __m512i bias = _mm512_set1_epi8(static_cast<char>(0x80));
  for (int64_t v = begin; v < end; ++v) {
    const int8_t* w = r.codes + v * r.d;
    __m512i high[M], low[M], offset = _mm512_setzero_si512();
    for (int m = 0; m < M; ++m) high[m] = low[m] = _mm512_setzero_si512();
    for (int64_t i = 0; i < r.d; i += 64) {
      _mm_prefetch(reinterpret_cast<const char*>(w + i + 2048), _MM_HINT_T0);
      const __mmask64 mask =
          r.d - i >= 64 ? ~__mmask64{0} : (__mmask64{1} << (r.d - i)) - 1;
      const __m512i x = _mm512_maskz_loadu_epi8(mask, w + i);
      offset = _mm512_dpbusd_epi32(offset, bias, x);
      for (int m = 0; m < M; ++m) {
        const int64_t at = (row + m) * a.stride + i;
        high[m] = _mm512_dpbusd_epi32(high[m], _mm512_loadu_si512(a.high + at), x);
        low[m] = _mm512_dpbusd_epi32(low[m], _mm512_loadu_si512(a.low + at), x);
      }
    }
    for (int m = 0; m < M; ++m) {
      const double total =
          256.0 * _mm512_reduce_add_epi32(_mm512_sub_epi32(high[m], offset)) +
          _mm512_reduce_add_epi32(low[m]);
      r.out[(row + m) * r.v + v] =
          static_cast<float>(total) * (a.scales[row + m] * r.scales[v]);
    }
  }
}

VAANI_AVX512 void avx512_rows(const Wide& a, const Rows& r, int64_t begin,
                              int64_t end) {
  int64_t row = 0;
  for (; row + 4 <= a.m; row += 4) avx512_rows_of<4>(a, r, row, begin, end);
  for (; row < a.m; ++row) avx512_rows_of<1>(a, r, row, begin, end);
}

bool has_avx512() {
  return __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
         __builtin_cpu_supports("avx512vl") && __builtin_cpu_supports("avx512dq") &&
         __builtin_cpu_supports("avx512vnni");
}

// -- AMX: AVX-512, and tiles of 16 x 64 bytes for many rows -----------------------

#if defined(__linux__) && (__GNUC__ >= 11 || __clang_major__ >= 12)
#define VAANI_AMX 1
#define VAANI_TILES                                                              \
  __attribute__((target("avx512f,avx512bw,avx512vl,avx512dq,avx512vnni,amx-tile," \
                        "amx-int8")))

struct alignas(64) TileConfig {
  uint8_t palette = 1, start_row = 0, reserved[14] = {};
  uint16_t bytes[16] = {};
  uint8_t rows[16] = {};
};

// Two panels of 16 outputs, unpacked to rows of four inputs x 16 outputs, as
// tdpbsud takes them: [depth x 4, 64] bytes each.
VAANI_TILES void amx_unpack(const uint8_t* tiles, int64_t depth, int64_t padded,
                            uint8_t* panel) {
  const __m512i three = _mm512_set1_epi8(3);
  for (int64_t kb = 0; kb < depth; ++kb) {
    __m512i tile = _mm512_loadu_si512(tiles + kb * kBlock);
    for (int plane = 0; plane < 4; ++plane) {
      _mm512_store_si512(panel + (4 * kb + plane) * 64, _mm512_and_si512(tile, three));
      tile = _mm512_srli_epi16(tile, 2);
    }
  }
  std::memset(panel + depth * 256, 0, (padded - depth) * 256);
}

VAANI_TILES void amx_multiply(const Activations& a, const Product& p, int64_t begin,
                              int64_t end) {
  if (a.m < 12) return avx512_multiply(a, p, begin, end);
  const int64_t padded = (p.depth + 3) / 4 * 4;  // blocks; tiles take four
  thread_local std::vector<uint8_t> scratch;
  scratch.resize(2 * padded * 256 + 64);
  uint8_t* panels = scratch.data() + (-reinterpret_cast<uintptr_t>(scratch.data()) & 63);
  uint8_t* second = panels + padded * 256;
  TileConfig config;
  for (int i = 0; i < 8; ++i) config.bytes[i] = 64, config.rows[i] = 16;
  _tile_loadconfig(&config);
  alignas(64) int32_t sums[4][16][16];
  for (int64_t b = begin; b < end; b += 2) {
    const bool pair = b + 1 < end;
    amx_unpack(p.tiles + b * p.depth * kBlock, p.depth, padded, panels);
    if (pair)
      amx_unpack(p.tiles + (b + 1) * p.depth * kBlock, p.depth, padded, second);
    for (int64_t row = 0; row < a.m; row += kRows) {
      // Rows beyond m are padding that belongs to the buffer.
      const int8_t* q = a.codes + row * a.stride;
      const int8_t* more = q + 16 * a.stride;
      _tile_zero(0);
      _tile_zero(1);
      _tile_zero(2);
      _tile_zero(3);
      for (int64_t kb = 0; kb < padded; kb += 4) {
        _tile_loadd(4, q + kb * kTile, a.stride);
        _tile_loadd(5, more + kb * kTile, a.stride);
        _tile_loadd(6, panels + kb * 256, 64);
        _tile_loadd(7, second + kb * 256, 64);
        _tile_dpbsud(0, 4, 6);
        _tile_dpbsud(1, 5, 6);
        _tile_dpbsud(2, 4, 7);
        _tile_dpbsud(3, 5, 7);
      }
      _tile_stored(0, sums[0], 64);
      _tile_stored(1, sums[1], 64);
      _tile_stored(2, sums[2], 64);
      _tile_stored(3, sums[3], 64);
      const int64_t count = std::min(kRows, a.m - row);
      for (int64_t i = 0; i < count; ++i) {
        avx512_store(a, p, b, row + i, _mm512_load_si512(sums[i / 16][i % 16]));
        if (pair)
          avx512_store(a, p, b + 1, row + i,
                       _mm512_load_si512(sums[2 + i / 16][i % 16]));
      }
    }
  }
  _tile_release();
}

// A piece at a time: its sums are stored, and what isn't exact is done with vectors.
VAANI_TILES void amx_grouped(const Activations& a, const Product& p, int64_t begin,
                             int64_t end) {
  if (a.m < 12) return avx512::grouped(a, p, begin, end);
  thread_local std::vector<uint8_t> scratch;
  scratch.resize(2 * p.depth * 256 + 64);
  uint8_t* panels = scratch.data() + (-reinterpret_cast<uintptr_t>(scratch.data()) & 63);
  uint8_t* second = panels + p.depth * 256;
  // Inputs of a tile: whole tiles make a piece.
  const int64_t inputs = p.piece * kTile, step = inputs % 64 ? 32 : 64;
  TileConfig config;
  for (int i = 0; i < 8; ++i) config.bytes[i] = 64, config.rows[i] = 16;
  for (int i = 4; i < 6; ++i) config.bytes[i] = step;
  for (int i = 6; i < 8; ++i) config.rows[i] = step / 4;
  _tile_loadconfig(&config);
  alignas(64) int32_t sums[2][kRows][kTile];
  alignas(64) float inner[2][kRows][kTile], outer[2][kRows][kTile];
  for (int64_t b = begin; b < end; b += 2) {
    const int64_t sides = std::min<int64_t>(2, end - b);
    amx_unpack(p.tiles + b * p.depth * kBlock, p.depth, p.depth, panels);
    if (sides == 2)
      amx_unpack(p.tiles + (b + 1) * p.depth * kBlock, p.depth, p.depth, second);
    for (int64_t row = 0; row < a.m; row += kRows) {
      // Rows beyond m are padding that belongs to the buffer.
      const int64_t count = std::min(kRows, a.m - row);
      const int8_t* q = a.codes + row * a.stride;
      const int8_t* more = q + 16 * a.stride;
      // to += from * scale, of weights by the block or of activations by the row.
      const auto add = [&](bool weights, int64_t group, const auto& from, auto& to)
          VAANI_TILES {
        for (int64_t side = 0; side < sides; ++side) {
          const __m512 scales = avx512::scales_of(p, b + side, weights ? group : 0);
          for (int64_t i = 0; i < count; ++i) {
            const __m512 scale =
                weights ? scales
                        : _mm512_set1_ps(a.steps[(row + i) * a.groups + group]);
            const __m512 product = _mm512_mul_ps(from(side, i), scale);
            _mm512_store_ps(to[side][i],
                            _mm512_add_ps(_mm512_load_ps(to[side][i]), product));
          }
        }
      };
      std::memset(outer, 0, sizeof outer);
      for (int64_t piece = 0, group = 0; piece < p.pieces; ++group) {
        std::memset(inner, 0, sizeof inner);
        for (const int64_t stop = piece + p.inside; piece < stop; ++piece) {
          _tile_zero(0);
          _tile_zero(1);
          _tile_zero(2);
          _tile_zero(3);
          for (int64_t k = piece * inputs; k < (piece + 1) * inputs; k += step) {
            _tile_loadd(4, q + k, a.stride);
            _tile_loadd(5, more + k, a.stride);
            _tile_loadd(6, panels + 16 * k, 64);
            _tile_loadd(7, second + 16 * k, 64);
            _tile_dpbsud(0, 4, 6);
            _tile_dpbsud(1, 5, 6);
            _tile_dpbsud(2, 4, 7);
            _tile_dpbsud(3, 5, 7);
          }
          _tile_stored(0, sums[0][0], 64);
          _tile_stored(1, sums[0][16], 64);
          _tile_stored(2, sums[1][0], 64);
          _tile_stored(3, sums[1][16], 64);
          const auto values = [&](int64_t side, int64_t i) VAANI_TILES {
            const int32_t start = p.starts[(row + i) * p.pieces + piece];
            return _mm512_cvtepi32_ps(_mm512_add_epi32(
                _mm512_load_si512(sums[side][i]), _mm512_set1_epi32(start)));
          };
          add(p.weights_first, piece, values, inner);
        }
        const auto values = [&](int64_t side, int64_t i) VAANI_TILES {
          return _mm512_load_ps(inner[side][i]);
        };
        add(!p.weights_first, group, values, outer);
      }
      for (int64_t side = 0; side < sides; ++side)
        for (int64_t i = 0; i < count; ++i)
          avx512::store_outputs(p, b + side, row + i, _mm512_load_ps(outer[side][i]));
    }
  }
  _tile_release();
}

bool has_amx() {
  if (!has_avx512()) return false;
  unsigned a, b, c, d;
  __asm__("cpuid" : "=a"(a), "=b"(b), "=c"(c), "=d"(d) : "a"(7), "c"(0));
  const bool tiles = (d >> 24) & 1, int8 = (d >> 25) & 1;
  // Linux hands the tile registers out on request (ARCH_REQ_XCOMP_PERM, XTILEDATA).
  return tiles && int8 && syscall(SYS_arch_prctl, 0x1023, 18) == 0;
}
#endif  // AMX
#endif  // x86

#if VAANI_NEON

// -- NEON with dot products -------------------------------------------------------

#if defined(__clang__)
#define VAANI_DOT __attribute__((target("dotprod")))
#else
#define VAANI_DOT __attribute__((target("+dotprod")))
#endif

// Adds the products of M rows with `blocks` blocks to their sums.
template <int M>
VAANI_DOT inline __attribute__((always_inline)) void neon_add(
    const uint8_t* tiles, const int8_t* q, int64_t stride, int64_t blocks,
    int32x4_t (&acc)[M][4]) {
  const uint8x16_t three = vdupq_n_u8(3);
  for (int64_t kb = 0; kb < blocks; ++kb) {
    ask_for(tiles + kb * kBlock + kAhead);
    int8x16_t x[M];
    for (int m = 0; m < M; ++m) x[m] = vld1q_s8(q + m * stride + kb * kTile);
    for (int part = 0; part < 4; ++part) {
      const uint8x16_t tile = vld1q_u8(tiles + kb * kBlock + 16 * part);
      const int8x16_t w0 = vreinterpretq_s8_u8(vandq_u8(tile, three));
      const int8x16_t w1 = vreinterpretq_s8_u8(vandq_u8(vshrq_n_u8(tile, 2), three));
      const int8x16_t w2 = vreinterpretq_s8_u8(vandq_u8(vshrq_n_u8(tile, 4), three));
      const int8x16_t w3 = vreinterpretq_s8_u8(vshrq_n_u8(tile, 6));
      for (int m = 0; m < M; ++m) {
        acc[m][part] = vdotq_laneq_s32(acc[m][part], w0, x[m], 0);
        acc[m][part] = vdotq_laneq_s32(acc[m][part], w1, x[m], 1);
        acc[m][part] = vdotq_laneq_s32(acc[m][part], w2, x[m], 2);
        acc[m][part] = vdotq_laneq_s32(acc[m][part], w3, x[m], 3);
      }
    }
  }
}

template <int M>
VAANI_DOT void neon_block(const Activations& a, const Product& p, int64_t b, int64_t row) {
  int32x4_t acc[M][4];
  for (int m = 0; m < M; ++m)
    for (int part = 0; part < 4; ++part) acc[m][part] = vdupq_n_s32(0);
  neon_add(p.tiles + b * p.depth * kBlock, a.codes + row * a.stride, a.stride, p.depth,
           acc);
  for (int m = 0; m < M; ++m) {
    int32_t sums[kTile];
    for (int part = 0; part < 4; ++part) vst1q_s32(sums + 4 * part, acc[m][part]);
    store_block(a, p, b, row + m, sums);
  }
}

VAANI_DOT void neon_multiply(const Activations& a, const Product& p, int64_t begin,
                             int64_t end) {
  int64_t row = 0;
  for (; row + 4 <= a.m; row += 4)
    for (int64_t b = begin; b < end; ++b) neon_block<4>(a, p, b, row);
  for (int64_t b = begin; b < end; ++b)
    for (int64_t rest = row; rest < a.m; ++rest) neon_block<1>(a, p, b, rest);
}

namespace neon {

#define VAANI_TARGET VAANI_DOT
#define VAANI_LANE VAANI_TARGET inline __attribute__((always_inline))

struct Lanes {
  float32x4_t v[4];
};

VAANI_LANE Lanes all(float x) {
  const float32x4_t v = vdupq_n_f32(x);
  return {{v, v, v, v}};
}
VAANI_LANE Lanes zero() { return all(0.0f); }
VAANI_LANE Lanes load(const float* x) {
  return {{vld1q_f32(x), vld1q_f32(x + 4), vld1q_f32(x + 8), vld1q_f32(x + 12)}};
}
VAANI_LANE float32x4_t widened(const uint16_t* x) {
  return vcvt_f32_f16(vreinterpret_f16_u16(vld1_u16(x)));
}
VAANI_LANE Lanes load_halves(const uint16_t* x) {
  return {{widened(x), widened(x + 4), widened(x + 8), widened(x + 12)}};
}
VAANI_LANE void store(float* to, Lanes x) {
  for (int i = 0; i < 4; ++i) vst1q_f32(to + 4 * i, x.v[i]);
}
VAANI_LANE Lanes add(Lanes x, Lanes y) {
  for (int i = 0; i < 4; ++i) x.v[i] = vaddq_f32(x.v[i], y.v[i]);
  return x;
}
VAANI_LANE Lanes mul(Lanes x, Lanes y) {
  for (int i = 0; i < 4; ++i) x.v[i] = vmulq_f32(x.v[i], y.v[i]);
  return x;
}

constexpr int kGroupRows = 4;
constexpr int group_columns(int) { return 1; }

template <int M>
VAANI_LANE void multiply_piece(const uint8_t* tiles, int64_t, const int8_t* q,
                               int64_t stride, int64_t blocks, const int32_t* starts,
                               int64_t pieces, int64_t, Lanes (&sums)[M][1]) {
  int32x4_t acc[M][4];
  for (int m = 0; m < M; ++m)
    for (int part = 0; part < 4; ++part) acc[m][part] = vdupq_n_s32(starts[m * pieces]);
  neon_add(tiles, q, stride, blocks, acc);
  for (int m = 0; m < M; ++m)
    for (int part = 0; part < 4; ++part)
      sums[m][0].v[part] = vcvtq_f32_s32(acc[m][part]);
}

#include "groups.inc"

#undef VAANI_TARGET
#undef VAANI_LANE
}  // namespace neon

bool has_dot() {
#if defined(__linux__)
  return (getauxval(AT_HWCAP) >> 20) & 1;  // HWCAP_ASIMDDP
#else
  return true;  // every processor of Apple's that runs macOS
#endif
}
#endif  // NEON

// -- The choice -------------------------------------------------------------------

#define VAANI_OF_TYPES(name) {name<float>, name<uint16_t>, name<int8_t>, name<Nibbles>}
#define VAANI_FLOAT_TABLE(name)                                                        \
  name::norm, name::floats, name::swiglu, name::log_sum_exp,                           \
  VAANI_OF_TYPES(name::attend), VAANI_OF_TYPES(name::decode_scores),                   \
  name::decode_weights, VAANI_OF_TYPES(name::decode_values), name::attend_back

const Isa kIsas[] = {
#if VAANI_X86
#if VAANI_AMX
    {"amx", has_amx, avx512_quantize, avx512_sum_units, amx_multiply, amx_grouped,
     avx512_rows, VAANI_FLOAT_TABLE(avx512)},
#endif
    {"avx512", has_avx512, avx512_quantize, avx512_sum_units, avx512_multiply,
     avx512::grouped, avx512_rows, VAANI_FLOAT_TABLE(avx512)},
#if VAANI_VNNI
    {"avxvnni", avxvnni::available, avx2_quantize, avx2_sum_units, avxvnni::multiply,
     avxvnni::grouped, avx2_rows, VAANI_FLOAT_TABLE(avx2)},
#endif
    {"avx2", has_avx2, avx2_quantize, avx2_sum_units, avx2_multiply, avx2::grouped,
     avx2_rows, VAANI_FLOAT_TABLE(avx2)},
#endif
#if VAANI_NEON
    {"neon", has_dot, portable_quantize, portable_sum_units, neon_multiply,
     neon::grouped, portable_rows, VAANI_FLOAT_TABLE(portable)},
#endif
    {"portable", always, portable_quantize, portable_sum_units, portable_multiply,
     portable::grouped, portable_rows, VAANI_FLOAT_TABLE(portable)},
};

const Isa* best() {
  for (const Isa& isa : kIsas)
    if (isa.available()) return &isa;
  return nullptr;
}

std::atomic<const Isa*> chosen{best()};

// -- Threads ----------------------------------------------------------------------

// Work comes in numbered parts that threads take one by one, the caller among them.
// Decoding makes hundreds of calls a token, each of some microseconds, which is less
// than it takes to wake a thread of the pool. So a helper, once it runs, stays and looks
// for the next call's work until none has come for `kLinger`; then the pool has its
// thread back. A helper that doesn't come in time delays nothing: it finds no parts.
// Where rows are many, as in training, calls are long and others of XLA stand between
// them, which want the thread: helpers then leave at once.

inline void pause() {
#if VAANI_X86
  _mm_pause();
#endif
}

// While it lives, numbers too small to be normal count as zero, on every thread alike:
// some of XLA's threads are set so, and others aren't.
class FlushTiny {
 public:
#if VAANI_X86
  FlushTiny() : before_(_mm_getcsr()) { _mm_setcsr(before_ | 0x8040); }
  ~FlushTiny() { _mm_setcsr(before_); }

 private:
  unsigned before_;
#elif VAANI_NEON
  FlushTiny() {
    asm volatile("mrs %0, fpcr" : "=r"(before_));
    asm volatile("msr fpcr, %0" : : "r"(before_ | (uint64_t{1} << 24)));
  }
  ~FlushTiny() { asm volatile("msr fpcr, %0" : : "r"(before_)); }

 private:
  uint64_t before_;
#endif
};

struct Work {
  void (*run)(const void* function, int64_t part);
  const void* function;
  int64_t parts;
  bool lingers;  // whether the next call comes soon
  std::atomic<int64_t> next{0}, done{0};
  std::atomic<bool> failed{false};  // for want of memory

  void take() {
    [[maybe_unused]] const FlushTiny flush;
    for (;;) {
      const int64_t part = next.fetch_add(1, std::memory_order_relaxed);
      if (part >= parts) return;
      // Nothing may leave by an exception: others count on every part.
      try {
        run(function, part);
      } catch (const std::bad_alloc&) {
        failed.store(true);
      }
      done.fetch_add(1, std::memory_order_release);
    }
  }
};

class Crew {
 public:
  // Runs all parts; false, with nothing done, where another call has the crew.
  bool run(ffi::ThreadPool& pool, int64_t threads, Work& work) {
    if (busy_.exchange(true)) return false;
    for (int64_t i = helpers_.load() + 1; i < threads; ++i) {
      helpers_.fetch_add(1);
      try {
        pool.Schedule([this] { help(); });
      } catch (const std::bad_alloc&) {  // then with those that are there
        helpers_.fetch_sub(1);
        break;
      }
    }
    work_.store(&work);
    work.take();
    for (int spins = 0; work.done.load(std::memory_order_acquire) < work.parts; ++spins)
      wait(spins);
    // No helper may hold the work when it goes out of scope: those that saw it are
    // counted, and those that come now see nothing.
    work_.store(nullptr);
    for (int spins = 0; inside_.load() > 0; ++spins) wait(spins);
    busy_.store(false);
    return true;
  }

 private:
  static constexpr std::chrono::microseconds kLinger{200};

  static void wait(int spins) {
    if (spins < 10'000)
      pause();
    else
      std::this_thread::yield();
  }

  void help() {
    auto since = std::chrono::steady_clock::now();
    for (int idle = 0;;) {
      if (work_.load(std::memory_order_relaxed)) {
        inside_.fetch_add(1);
        bool lingers = true;
        if (Work* work = work_.load()) {
          lingers = work->lingers;
          work->take();
        }
        inside_.fetch_sub(1);
        if (!lingers) break;
        idle = 0;
        // The caller may still run its last part: its work stands until that is done.
        while (work_.load(std::memory_order_relaxed) && ++idle < 1000) pause();
        idle = 0;
        since = std::chrono::steady_clock::now();
      }
      pause();
      if (++idle % 64 == 0 && std::chrono::steady_clock::now() - since > kLinger) break;
    }
    helpers_.fetch_sub(1);
  }

  std::atomic<bool> busy_{false};
  std::atomic<Work*> work_{nullptr};
  std::atomic<int64_t> helpers_{0}, inside_{0};
};

Crew& crew() {
  static Crew* crew = new Crew;  // never destroyed: helpers may outlive main
  return *crew;
}

constexpr int64_t kDecoded = 64;  // rows of a call, where it is one of decoding

template <typename F>
ffi::Error parallel(ffi::ThreadPool& pool, int64_t rows, int64_t threads, int64_t parts,
                    const F& function) {
  threads = std::min(threads, parts);
  Work work{[](const void* f, int64_t part) { (*static_cast<const F*>(f))(part); },
            &function, parts, rows <= kDecoded};
  if (threads <= 1 || !crew().run(pool, threads, work)) work.take();
  if (!work.failed.load()) return ffi::Error::Success();
  return ffi::Error(ffi::ErrorCode::kResourceExhausted,
                    "no memory for the scratch of a kernel");
}

// Fewer byte-rows than this a thread cost more to hand over than to do.
constexpr int64_t kWorth = 1 << 15;

int64_t useful_threads(ffi::ThreadPool& pool, int64_t work) {
  const int64_t available = std::max<int64_t>(1, pool.num_threads());
  return std::clamp<int64_t>(work / kWorth, 1, available);
}

template <typename T>
T* aligned(std::vector<T>& buffer, int64_t count) {
  if (static_cast<int64_t>(buffer.size()) < count + 64) buffer.resize(count + 64);
  const auto address = reinterpret_cast<uintptr_t>(buffer.data());
  return buffer.data() + (-address & 63) / sizeof(T);
}

// The nearest number that bfloat16 has; of two as near, the even one.
float to_half(float x) {
  if (std::isnan(x)) return x;
  uint32_t bits = __builtin_bit_cast(uint32_t, x);
  bits += 0x7fff + ((bits >> 16) & 1);
  return __builtin_bit_cast(float, bits & 0xffff0000);
}

int64_t rounded(int64_t value, int64_t to) { return (value + to - 1) / to * to; }

// -- Handlers ---------------------------------------------------------------------

// One product of `ternary_matmul`, without what is quantized in the call. False where
// its buffers don't go together; `scale` is [], [n] or [n / 16, groups, 16].
bool make_product(const ffi::AnyBuffer& tiles, const ffi::AnyBuffer& scale,
                  const ffi::AnyBuffer& out, int64_t m, int64_t k,
                  int64_t activation_group, Product* p) {
  const auto shape = tiles.dimensions(), scales = scale.dimensions();
  const auto outputs = out.dimensions();
  const bool half = scale.element_type() == ffi::F16 && scales.size() == 3;
  if (tiles.element_type() != ffi::U8 || out.element_type() != ffi::F32 ||
      (scale.element_type() != ffi::F32 && !half) || outputs.size() != 2 ||
      outputs[0] != m)
    return false;
  *p = {};
  p->n = outputs[1];
  p->depth = rounded(k, kTile) / kTile;
  const int64_t blocks = rounded(p->n, kTile) / kTile;
  if (shape.size() != 3 || shape[0] != blocks || shape[1] != p->depth ||
      shape[2] != kBlock)
    return false;
  p->tiles = static_cast<const uint8_t*>(tiles.untyped_data());
  p->out = static_cast<float*>(out.untyped_data());
  if (half)
    p->halves = static_cast<const uint16_t*>(scale.untyped_data());
  else
    p->scale = static_cast<const float*>(scale.untyped_data());
  p->per_channel = scales.size() == 1;
  int64_t group = k;  // inputs with one scale
  if (scales.size() == 3) {
    p->groups = scales[1];
    if (scales[0] != blocks || scales[2] != kTile || p->groups < 1 || k % p->groups)
      return false;
    group = k / p->groups;
    if (group % kUnit || group < kUnit || group > kLargestGroup) return false;
  } else if (scales.size() > 1 || (p->per_channel && scales[0] != p->n)) {
    return false;
  }
  const int64_t steps = activation_group ? activation_group : k;
  if (!p->groups && !activation_group) return true;
  if (steps % group && group % steps) return false;
  p->weights_first = group <= steps && p->groups;
  const int64_t inputs = std::min(group, steps);
  p->pieces = k / inputs;
  p->piece = inputs / kTile;
  p->inside = std::max(group, steps) / inputs;
  return true;
}

// Inputs: x [m, k] float32; then, for each product, tiles [n / 16, k / 16, 64] uint8
// and scale [] or [n] float32, or [n / 16, groups, 16] float32 or float16, of as many
// groups of inputs, each of 32 to 256 and a multiple of 32; then, where `tracked`, the
// activation range, and, where `normed`, the scale [k] of an RMSNorm that comes first,
// and whose result is rounded to bfloat16 where `halves`. Activations have a scale by
// token, or, where `activation_group` is not 0, by as many inputs: a multiple of 32
// that divides k, and that divides the groups of every product or is a multiple of
// them. Outputs: [m, n] float32 each.
ffi::Error ternary_matmul(ffi::ThreadPool pool, ffi::Buffer<ffi::F32> x,
                          ffi::RemainingArgs args, ffi::RemainingRets results,
                          bool tracked, bool normed, bool halves, float epsilon,
                          int64_t activation_group) {
  const Isa& isa = *chosen.load(std::memory_order_relaxed);
  if (x.dimensions().size() != 2)
    return ffi::Error::InvalidArgument("activations must be [m, k]");
  const int64_t m = x.dimensions()[0], k = x.dimensions()[1];
  if (activation_group < 0 || activation_group % kUnit || activation_group > k ||
      (activation_group && (k % activation_group || tracked)))
    return ffi::Error::InvalidArgument(
        "groups of activations must be multiples of 32 that divide k, without a range");
  const size_t count = results.size();
  if (args.size() != 2 * count + tracked + normed)
    return ffi::Error::InvalidArgument("tiles and a scale for each product");
  const int64_t depth = rounded(k, kTile) / kTile;
  std::vector<Product> products(count);
  int64_t work = 0;
  for (size_t i = 0; i < count; ++i) {
    auto tiles = args.get<ffi::AnyBuffer>(2 * i);
    auto scale = args.get<ffi::AnyBuffer>(2 * i + 1);
    auto out = results.get<ffi::AnyBuffer>(i);
    if (!tiles || !scale || !out ||
        !make_product(*tiles, *scale, **out, m, k, activation_group, &products[i]))
      return ffi::Error::InvalidArgument(
          "tiles and scales do not fit the input, its groups and the output");
    work += static_cast<int64_t>(tiles->element_count()) * m;
  }
  const float* range = nullptr;
  if (tracked) {
    auto buffer = args.get<ffi::Buffer<ffi::F32>>(2 * count);
    if (!buffer || buffer->element_count() != 1)
      return ffi::Error::InvalidArgument("the range must be one float32");
    range = buffer->typed_data();
  }
  const float* norm_scale = nullptr;
  if (normed) {
    auto buffer = args.get<ffi::Buffer<ffi::F32>>(2 * count + tracked);
    if (!buffer || buffer->element_count() != static_cast<size_t>(k))
      return ffi::Error::InvalidArgument("the norm's scale must be [k] float32");
    norm_scale = buffer->typed_data();
  }
  if (m == 0) return ffi::Error::Success();

  // What is found of the rows: codes, sums, bounds; with groups, steps and starts.
  thread_local std::vector<int8_t> code_buffer;
  thread_local std::vector<int32_t> sums, start_buffer;
  thread_local std::vector<float> bounds, step_buffer;
  const int64_t stride = rounded(k, kRowAlign), rows = rounded(m, kRows);
  const int64_t span = activation_group ? activation_group : k;
  const int64_t groups = activation_group ? k / span : 1;
  int8_t* codes = aligned(code_buffer, rows * stride);
  if (static_cast<int64_t>(sums.size()) < m) sums.resize(m), bounds.resize(m);
  if (static_cast<int64_t>(step_buffer.size()) < m * groups)
    step_buffer.resize(m * groups);
  int32_t* row_sums = sums.data();
  float *row_bounds = bounds.data(), *steps = step_buffer.data();
  // Of products that are cut alike, the starts are the same.
  std::vector<std::pair<int64_t, int64_t>> cuts;  // pieces, and where their starts are
  int64_t started = 0;
  for (const Product& p : products)
    if (p.pieces && std::none_of(cuts.begin(), cuts.end(), [&](const auto& cut) {
          return cut.first == p.pieces;
        })) {
      cuts.push_back({p.pieces, started});
      started += m * p.pieces;
    }
  if (static_cast<int64_t>(start_buffer.size()) < started) start_buffer.resize(started);
  int32_t* all_starts = start_buffer.data();
  for (Product& p : products)
    for (const auto& [pieces, first] : cuts)
      if (p.pieces == pieces) p.starts = all_starts + first;
  const float* input = x.typed_data();
  const int64_t threads = useful_threads(pool, work);

  constexpr int64_t kBatch = 8;  // rows quantized at a time
  const ffi::Error quantized = parallel(
      pool, m, useful_threads(pool, m * k), (m + kBatch - 1) / kBatch,
           [=, &isa, &cuts](int64_t part) {
             thread_local std::vector<float> normal;
             thread_local std::vector<int32_t> units;
             if (norm_scale && static_cast<int64_t>(normal.size()) < k)
               normal.resize(k);
             if (!cuts.empty() && static_cast<int64_t>(units.size()) < k / kUnit)
               units.resize(k / kUnit);
             const int64_t stop = std::min(m, (part + 1) * kBatch);
             for (int64_t row = part * kBatch; row < stop; ++row) {
               const float* from = input + row * k;
               if (norm_scale) {
                 float factor;
                 isa.norm(from, norm_scale, 1, k, epsilon, normal.data(), &factor);
                 if (halves)
                   for (int64_t i = 0; i < k; ++i) normal[i] = to_half(normal[i]);
                 from = normal.data();
               }
               int8_t* to = codes + row * stride;
               for (int64_t g = 0; g < groups; ++g) {
                 const int64_t at = g * span;
                 isa.quantize(from + at, span, range, to + at,
                              g + 1 < groups ? span : stride - at, row_sums + row,
                              row_bounds + row);
                 steps[row * groups + g] = row_bounds[row] * kPart;
               }
               if (cuts.empty()) continue;
               isa.sum_units(to, k, units.data());
               for (const auto& [pieces, first] : cuts) {
                 const int64_t each = k / kUnit / pieces;
                 int32_t* starts = all_starts + first + row * pieces;
                 for (int64_t i = 0; i < pieces; ++i) {
                   starts[i] = 0;
                   for (int64_t j = 0; j < each; ++j) starts[i] -= units[i * each + j];
                 }
               }
             }
           });
  if (quantized.failure()) return quantized;

  // Blocks of all products in one row, cut in parts of even numbers of blocks: some for
  // each thread, and no larger than what stays in its cache while the rows pass by, or,
  // where they are few and nothing stays, than what the last thread may be late with.
  const int64_t largest = m > kFew ? 1 << 18 : 1 << 20;  // bytes
  const Activations activations{codes, row_sums, row_bounds, steps, m, stride, groups};
  std::vector<int64_t> starts{0};
  for (const Product& p : products)
    starts.push_back(starts.back() + rounded(p.n, 2 * kTile) / kTile);
  const int64_t total = starts.back();
  if (total == 0) return ffi::Error::Success();
  const int64_t least = std::max(threads == 1 ? 1 : 4 * threads,
                                 total * depth * kBlock / largest);
  const int64_t parts = std::min(total / 2, least);
  const int64_t each = rounded((total + parts - 1) / parts, 2);
  return parallel(pool, m, threads, (total + each - 1) / each, [=, &isa](int64_t part) {
    const int64_t begin = part * each, end = std::min(total, begin + each);
    for (size_t i = 0; i < products.size(); ++i) {
      const int64_t blocks = rounded(products[i].n, kTile) / kTile;
      const int64_t first = std::max<int64_t>(begin - starts[i], 0);
      const int64_t last = std::min(end - starts[i], blocks);
      if (first < last)
        (products[i].pieces ? isa.grouped : isa.multiply)(activations, products[i],
                                                          first, last);
    }
  });
}

// x [m, d] float32, codes [v, d] int8, scales [v] float32 -> [m, v] float32. The
// activations are rounded to 16 bits a row; all else is exact until the last product.
ffi::Error rows_matmul(ffi::ThreadPool pool, ffi::Buffer<ffi::F32> x,
                       ffi::Buffer<ffi::S8> codes, ffi::Buffer<ffi::F32> scales,
                       ffi::ResultBuffer<ffi::F32> out) {
  const Isa& isa = *chosen.load(std::memory_order_relaxed);
  if (x.dimensions().size() != 2 || codes.dimensions().size() != 2 ||
      x.dimensions()[1] != codes.dimensions()[1] ||
      scales.element_count() != static_cast<size_t>(codes.dimensions()[0]) ||
      out->element_count() !=
          static_cast<size_t>(x.dimensions()[0] * codes.dimensions()[0]))
    return ffi::Error::InvalidArgument("rows do not fit the input and the output");
  const int64_t m = x.dimensions()[0], d = x.dimensions()[1];
  const int64_t v = codes.dimensions()[0], stride = rounded(d, kRowAlign);
  if (m == 0) return ffi::Error::Success();
  thread_local std::vector<uint8_t> high_buffer, low_buffer;
  thread_local std::vector<float> scale_buffer;
  uint8_t* high = aligned(high_buffer, m * stride);
  uint8_t* low = aligned(low_buffer, m * stride);
  if (static_cast<int64_t>(scale_buffer.size()) < m) scale_buffer.resize(m);
  for (int64_t row = 0; row < m; ++row) {
    const float* from = x.typed_data() + row * d;
    float bound = kEpsilon;
    bool finite = true;
    for (int64_t i = 0; i < d; ++i) {
      finite &= std::isfinite(from[i]);
      bound = std::max(bound, std::fabs(from[i]));
    }
    const float factor = 32767.0f / bound;
    for (int64_t i = 0; i < d; ++i) {
      const float value =
          finite ? std::min(std::max(from[i] * factor, -32767.0f), 32767.0f) : 0.0f;
      const int32_t code = static_cast<int32_t>(std::nearbyint(value)) + 32768;
      high[row * stride + i] = static_cast<uint8_t>(code >> 8);
      low[row * stride + i] = static_cast<uint8_t>(code & 255);
    }
    scale_buffer[row] = finite ? bound * (1.0f / 32767.0f)
                               : std::numeric_limits<float>::quiet_NaN();
  }
  const Wide activations{high, low, scale_buffer.data(), m, stride};
  const Rows rows{codes.typed_data(), scales.typed_data(), v, d, out->typed_data()};
  const int64_t threads = useful_threads(pool, v * d * m);
  const int64_t parts = threads == 1 ? 1 : std::min(v, 4 * threads);
  const int64_t each = (v + parts - 1) / parts;
  return parallel(pool, m, threads, parts, [=, &isa](int64_t part) {
    const int64_t begin = part * each, end = std::min(v, begin + each);
    if (begin < end) isa.rows(activations, rows, begin, end);
  });
}

// One query of each head; `kind` says which type the cache has.
ffi::Error decode(ffi::ThreadPool pool, const Isa& isa, const Attention& a, int64_t batch,
                  int kind) {
  const int64_t length = std::clamp<int64_t>(a.slot + 1, 1, a.s), groups = a.n / a.k;
  const int64_t threads = useful_threads(pool, 2 * batch * a.n * length * a.h);
  const int64_t width = rounded(length, 1024) + 2 * kLanes;
  const auto first_of = [&](int64_t b) {
    return std::clamp<int64_t>(a.starts[b], 0, length - 1);
  };
  // Rows, or their heads, where these are enough for all threads and what a part reads
  // in one go is not torn to pieces.
  const bool rows = threads == 1 || batch >= 4 * threads;
  if (rows || (length < 1024 && batch * a.k >= threads)) {
    const int64_t heads = rows ? a.k : 1, parts = a.k / heads;
    return parallel(pool, batch, threads, batch * parts, [=, &a, &isa](int64_t part) {
      thread_local std::vector<float> scratch;
      const int64_t b = part / parts, begin = part % parts * heads, size = a.n * (width + 1);
      if (static_cast<int64_t>(scratch.size()) < size) scratch.resize(size);
      float *scores = scratch.data(), *inverses = scores + a.n * width;
      const int64_t first = first_of(b);
      isa.decode_scores[kind](a, b, begin, begin + heads, first, length, width, scores);
      for (int64_t n = begin * groups; n < (begin + heads) * groups; ++n)
        inverses[n] = isa.decode_weights(scores + n * width + first, length - first);
      isa.decode_values[kind](a, b, begin, begin + heads, 0, a.h, first, length, width,
                              scores, inverses);
    });
  }
  std::vector<float> scratch;
  try {
    scratch.resize(a.n * (width + 1));
  } catch (const std::bad_alloc&) {
    return ffi::Error(ffi::ErrorCode::kResourceExhausted, "no memory for scores");
  }
  float *scores = scratch.data(), *inverses = scores + a.n * width;
  constexpr int64_t kSlots = 512;  // of a part
  // Sums of values go over all slots in one part: heads are dealt out, and cut where
  // they are fewer than threads.
  constexpr int64_t kPair = 2 * kLanes;  // as Nibbles come
  const int64_t cuts = std::min((threads + a.k - 1) / a.k, (a.h + kPair - 1) / kPair);
  const int64_t wide = rounded((a.h + cuts - 1) / cuts, kPair);
  const int64_t heads = std::max<int64_t>(1, a.k / threads);
  const int64_t dealt = (a.k + heads - 1) / heads;
  for (int64_t b = 0; b < batch; ++b) {
    const int64_t first = first_of(b), parts = (length - first + kSlots - 1) / kSlots;
    ffi::Error done = parallel(pool, 1, threads, parts, [=, &a, &isa](int64_t part) {
      const int64_t from = first + part * kSlots, stop = std::min(length, from + kSlots);
      isa.decode_scores[kind](a, b, 0, a.k, from, stop, width, scores);
    });
    if (done.failure()) return done;
    done = parallel(pool, 1, threads, a.n, [=, &isa](int64_t n) {
      inverses[n] = isa.decode_weights(scores + n * width + first, length - first);
    });
    if (done.failure()) return done;
    done = parallel(pool, 1, threads, dealt * cuts, [=, &a, &isa](int64_t part) {
      const int64_t begin = part / cuts * heads, end = std::min(a.k, begin + heads);
      const int64_t i = part % cuts * wide, j = std::min(a.h, i + wide);
      if (i < j)
        isa.decode_values[kind](a, b, begin, end, i, j, first, length, width, scores,
                                inverses);
    });
    if (done.failure()) return done;
  }
  return ffi::Error::Success();
}

// Attention of queries q [b, t, n, h] float32, in consecutive slots from `slot` [] on, to
// the slots from starts [b] up to their own, of keys and values [b, s, k, h] of float32,
// bfloat16, int8, or codes of 4 bits [b, s, k, 16 ceil(h / 32)] uint8. Codes come with
// scales [b, s, k] for keys and for values, those of 4 bits then with the centers of
// keys [b, blocks, k, h]; float32. Reads only the slots that count. -> [b, t, n, h], and,
// where asked for, the weights [b, n, t, s].
ffi::Error attention(ffi::ThreadPool pool, ffi::Buffer<ffi::F32> q,
                     ffi::AnyBuffer keys, ffi::AnyBuffer values,
                     ffi::Buffer<ffi::S32> slot, ffi::Buffer<ffi::S32> starts,
                     ffi::RemainingArgs scales, ffi::RemainingRets results) {
  const Isa& isa = *chosen.load(std::memory_order_relaxed);
  const auto from = q.dimensions(), cache = keys.dimensions();
  int kind = -1;
  if (keys.element_type() == ffi::F32) kind = 0;
  if (keys.element_type() == ffi::BF16) kind = 1;
  if (keys.element_type() == ffi::S8) kind = 2;
  if (keys.element_type() == ffi::U8) kind = 3;
  auto out = results.get<ffi::Buffer<ffi::F32>>(0);
  const size_t further[] = {0, 0, 2, 3};
  if (kind < 0 || from.size() != 4 || cache.size() != 4 || from[0] != cache[0] ||
      cache[3] != (kind == 3 ? padded<Nibbles>(from[3]) / 2 : from[3]) ||
      cache[1] == 0 || cache[2] == 0 || cache[3] == 0 || from[2] % cache[2] ||
      values.element_type() != keys.element_type() ||
      values.element_count() != keys.element_count() ||
      starts.element_count() != static_cast<size_t>(from[0]) || !out ||
      (*out)->element_count() != q.element_count() || scales.size() != further[kind])
    return ffi::Error::InvalidArgument("queries, cache and output do not fit");
  Attention a{};
  a.q = q.typed_data();
  a.keys = keys.untyped_data();
  a.values = values.untyped_data();
  if (kind >= 2) {
    auto first = scales.get<ffi::Buffer<ffi::F32>>(0);
    auto second = scales.get<ffi::Buffer<ffi::F32>>(1);
    const size_t count = keys.element_count() / cache[3];
    if (!first || !second || first->element_count() != count ||
        second->element_count() != count)
      return ffi::Error::InvalidArgument("scales must be [b, s, k] float32");
    a.key_scales = first->typed_data();
    a.value_scales = second->typed_data();
  }
  if (kind == 3) {
    auto centers = scales.get<ffi::Buffer<ffi::F32>>(2);
    a.blocks = (cache[1] + kCentered - 1) / kCentered;
    if (!centers || centers->element_count() !=
                        static_cast<size_t>(from[0] * a.blocks * cache[2] * from[3]))
      return ffi::Error::InvalidArgument("centers must be [b, blocks, k, h] float32");
    a.centers = centers->typed_data();
  }
  a.starts = starts.typed_data();
  a.slot = *slot.typed_data();
  a.t = from[1];
  a.n = from[2];
  a.s = cache[1];
  a.k = cache[2];
  a.h = from[3];
  a.out = (*out)->typed_data();
  if (results.size() == 2) {
    auto weights = results.get<ffi::Buffer<ffi::F32>>(1);
    if (!weights ||
        (*weights)->element_count() != static_cast<size_t>(from[0] * a.n * a.t * a.s))
      return ffi::Error::InvalidArgument("weights must be [b, n, t, s] float32");
    a.weights = (*weights)->typed_data();
  }
  if (q.element_count() == 0) return ffi::Error::Success();
  if (a.t == 1 && !a.weights) return decode(pool, isa, a, from[0], kind);
  const int64_t length = std::clamp<int64_t>(a.slot + a.t, 1, a.s);
  // A part holds a row of scores for each of its queries.
  const int64_t queries = length > (1 << 14) ? kQueries / 2 : kQueries;
  const int64_t pieces = (a.t + queries - 1) / queries;
  const int64_t units = from[0] * a.n * pieces;
  const int64_t threads = useful_threads(pool, 2 * from[0] * a.n * a.t * length * a.h);
  return parallel(pool, from[0] * a.t, threads, units, [=, &isa](int64_t unit) {
    thread_local std::vector<float> scratch;
    // Whole vectors are written from any slot on.
    const int64_t head = unit / pieces % a.n, begin = unit % pieces * queries;
    const int64_t end = std::min(a.t, begin + queries);
    const int64_t width = rounded(length, 1024) + 2 * kLanes;
    const int64_t size = (end - begin) * width + a.h * kTurned;
    if (static_cast<int64_t>(scratch.size()) < size) scratch.resize(size);
    isa.attend[kind](a, unit / pieces / a.n, head, begin, end, width, scratch.data());
  });
}

// Gradients of causal attention: of q [b, t, n, h], keys and values [b, t, k, h], y and
// its gradient g [b, t, n, h], with weights [b, n, t, t], all float32. -> as q, keys and
// values.
ffi::Error attention_gradient(
    ffi::ThreadPool pool, ffi::Buffer<ffi::F32> q, ffi::Buffer<ffi::F32> keys,
    ffi::Buffer<ffi::F32> values, ffi::Buffer<ffi::F32> y, ffi::Buffer<ffi::F32> g,
    ffi::Buffer<ffi::F32> weights, ffi::ResultBuffer<ffi::F32> dq,
    ffi::ResultBuffer<ffi::F32> dkeys, ffi::ResultBuffer<ffi::F32> dvalues) {
  const Isa& isa = *chosen.load(std::memory_order_relaxed);
  const auto from = q.dimensions(), kept = keys.dimensions();
  const size_t queries = q.element_count(), stored = keys.element_count();
  if (from.size() != 4 || kept.size() != 4 || from[0] != kept[0] ||
      from[1] != kept[1] || from[3] != kept[3] || kept[2] == 0 || from[2] % kept[2] ||
      values.element_count() != stored || y.element_count() != queries ||
      g.element_count() != queries || dq->element_count() != queries ||
      weights.element_count() !=
          static_cast<size_t>(from[0] * from[2] * from[1] * from[1]) ||
      dkeys->element_count() != stored || dvalues->element_count() != stored)
    return ffi::Error::InvalidArgument("queries, keys and gradients do not fit");
  const AttentionGradient a{q.typed_data(),     keys.typed_data(), values.typed_data(),
                            y.typed_data(),     g.typed_data(),    weights.typed_data(),
                            from[1],            from[2],           kept[2],
                            from[3],            dq->typed_data(),  dkeys->typed_data(),
                            dvalues->typed_data()};
  if (queries == 0) return ffi::Error::Success();
  const int64_t threads = useful_threads(pool, 5 * from[0] * a.n * a.t * a.t * a.h);
  return parallel(pool, from[0] * a.t, threads, from[0] * a.k, [=, &isa](int64_t unit) {
    thread_local std::vector<float> scratch;
    const int64_t width = a.t + 2 * kLanes, size = (kQueries + a.h) * width;
    if (static_cast<int64_t>(scratch.size()) < size) scratch.resize(size);
    isa.attend_back(a, unit / a.k, unit % a.k, width, scratch.data());
  });
}

// x [m, d], scale [d] -> x / sqrt(mean(x^2) + epsilon) * scale, and the factor of x of
// each row, [m]; all float32.
ffi::Error rms_norm(ffi::ThreadPool pool, ffi::Buffer<ffi::F32> x,
                    ffi::Buffer<ffi::F32> scale, ffi::ResultBuffer<ffi::F32> out,
                    ffi::ResultBuffer<ffi::F32> inverse, float epsilon) {
  const Isa& isa = *chosen.load(std::memory_order_relaxed);
  if (x.dimensions().size() != 2 ||
      scale.element_count() != static_cast<size_t>(x.dimensions()[1]) ||
      out->element_count() != x.element_count() ||
      inverse->element_count() != static_cast<size_t>(x.dimensions()[0]))
    return ffi::Error::InvalidArgument("x must be [m, d], the scale [d]");
  const int64_t m = x.dimensions()[0], d = x.dimensions()[1];
  const float *from = x.typed_data(), *weights = scale.typed_data();
  float *to = out->typed_data(), *factors = inverse->typed_data();
  constexpr int64_t kBatch = 16;  // rows at a time
  return parallel(pool, m, useful_threads(pool, m * d / 4), (m + kBatch - 1) / kBatch,
           [=, &isa](int64_t part) {
             const int64_t row = part * kBatch, count = std::min(m - row, kBatch);
             isa.norm(from + row * d, weights, count, d, epsilon, to + row * d,
                      factors + row);
           });
}

// gate, up [m, f] -> gate sigmoid(gate) up and sigmoid(gate), [m, f]; all float32.
ffi::Error swiglu(ffi::ThreadPool pool, ffi::Buffer<ffi::F32> gate,
                  ffi::Buffer<ffi::F32> up, ffi::ResultBuffer<ffi::F32> out,
                  ffi::ResultBuffer<ffi::F32> sigmoid) {
  const Isa& isa = *chosen.load(std::memory_order_relaxed);
  const size_t elements = gate.element_count();
  if (gate.dimensions().size() != 2 || up.element_count() != elements ||
      out->element_count() != elements || sigmoid->element_count() != elements)
    return ffi::Error::InvalidArgument("gate and up must be [m, f]");
  const int64_t count = elements;
  const float *from = gate.typed_data(), *other = up.typed_data();
  float *to = out->typed_data(), *kept = sigmoid->typed_data();
  constexpr int64_t kBatch = 4096;  // numbers at a time
  return parallel(pool, gate.dimensions()[0], useful_threads(pool, count),
           (count + kBatch - 1) / kBatch, [=, &isa](int64_t part) {
             const int64_t i = part * kBatch, n = std::min(kBatch, count - i);
             isa.swiglu(from + i, other + i, n, to + i, kept + i);
           });
}

// x [m, v] -> log(sum(exp(x))) of each row, [m]; both float32. NaN where a number is NaN
// or plus infinity.
ffi::Error log_sum_exp(ffi::ThreadPool pool, ffi::Buffer<ffi::F32> x,
                       ffi::ResultBuffer<ffi::F32> out) {
  const Isa& isa = *chosen.load(std::memory_order_relaxed);
  if (x.dimensions().size() != 2 || x.dimensions()[1] == 0 ||
      out->element_count() != static_cast<size_t>(x.dimensions()[0]))
    return ffi::Error::InvalidArgument("x must be [m, v], the result [m]");
  const int64_t m = x.dimensions()[0], v = x.dimensions()[1];
  const float* from = x.typed_data();
  float* to = out->typed_data();
  constexpr int64_t kBatch = 16;  // rows at a time
  return parallel(pool, m, useful_threads(pool, 4 * m * v), (m + kBatch - 1) / kBatch,
           [=, &isa](int64_t part) {
             const int64_t stop = std::min(m, (part + 1) * kBatch);
             for (int64_t row = part * kBatch; row < stop; ++row)
               to[row] = isa.log_sum_exp(from + row * v, v);
           });
}

// x [m, k] and w [n, k], or [k, n] where `columns` -> [m, n]; all float32.
ffi::Error float_matmul(ffi::ThreadPool pool, ffi::Buffer<ffi::F32> x,
                        ffi::Buffer<ffi::F32> w, ffi::ResultBuffer<ffi::F32> out,
                        bool columns) {
  const Isa& isa = *chosen.load(std::memory_order_relaxed);
  const auto from = x.dimensions(), shape = w.dimensions();
  if (from.size() != 2 || shape.size() != 2 || from[1] != shape[columns ? 0 : 1] ||
      out->element_count() != static_cast<size_t>(from[0] * shape[columns ? 1 : 0]))
    return ffi::Error::InvalidArgument("weights do not fit the input and the output");
  const Floats f{x.typed_data(), w.typed_data(), from[0], shape[columns ? 1 : 0],
                 from[1], columns, out->typed_data()};
  // Weights of a part stay in the cache, while its rows pass by.
  constexpr int64_t kPanel = 64;
  const int64_t panels = (f.n + kPanel - 1) / kPanel, pieces = (f.m + kPanel - 1) / kPanel;
  return parallel(pool, f.m, useful_threads(pool, f.m * f.n * f.k), panels * pieces,
           [=, &isa](int64_t part) {
             const int64_t begin = part / pieces * kPanel, top = part % pieces * kPanel;
             isa.floats(f, top, std::min(f.m, top + kPanel), begin,
                        std::min(f.n, begin + kPanel));
           });
}

}  // namespace

XLA_FFI_DEFINE_HANDLER_SYMBOL(vaani_ternary_matmul, ternary_matmul,
                              ffi::Ffi::Bind()
                                  .Ctx<ffi::ThreadPool>()
                                  .Arg<ffi::Buffer<ffi::F32>>()
                                  .RemainingArgs()
                                  .RemainingRets()
                                  .Attr<bool>("tracked")
                                  .Attr<bool>("normed")
                                  .Attr<bool>("halves")
                                  .Attr<float>("epsilon")
                                  .Attr<int64_t>("activation_group"));

XLA_FFI_DEFINE_HANDLER_SYMBOL(vaani_attention, attention,
                              ffi::Ffi::Bind()
                                  .Ctx<ffi::ThreadPool>()
                                  .Arg<ffi::Buffer<ffi::F32>>()
                                  .Arg<ffi::AnyBuffer>()
                                  .Arg<ffi::AnyBuffer>()
                                  .Arg<ffi::Buffer<ffi::S32>>()
                                  .Arg<ffi::Buffer<ffi::S32>>()
                                  .RemainingArgs()
                                  .RemainingRets());

XLA_FFI_DEFINE_HANDLER_SYMBOL(vaani_attention_gradient, attention_gradient,
                              ffi::Ffi::Bind()
                                  .Ctx<ffi::ThreadPool>()
                                  .Arg<ffi::Buffer<ffi::F32>>()
                                  .Arg<ffi::Buffer<ffi::F32>>()
                                  .Arg<ffi::Buffer<ffi::F32>>()
                                  .Arg<ffi::Buffer<ffi::F32>>()
                                  .Arg<ffi::Buffer<ffi::F32>>()
                                  .Arg<ffi::Buffer<ffi::F32>>()
                                  .Ret<ffi::Buffer<ffi::F32>>()
                                  .Ret<ffi::Buffer<ffi::F32>>()
                                  .Ret<ffi::Buffer<ffi::F32>>());

XLA_FFI_DEFINE_HANDLER_SYMBOL(vaani_rms_norm, rms_norm,
                              ffi::Ffi::Bind()
                                  .Ctx<ffi::ThreadPool>()
                                  .Arg<ffi::Buffer<ffi::F32>>()
                                  .Arg<ffi::Buffer<ffi::F32>>()
                                  .Ret<ffi::Buffer<ffi::F32>>()
                                  .Ret<ffi::Buffer<ffi::F32>>()
                                  .Attr<float>("epsilon"));

XLA_FFI_DEFINE_HANDLER_SYMBOL(vaani_swiglu, swiglu,
                              ffi::Ffi::Bind()
                                  .Ctx<ffi::ThreadPool>()
                                  .Arg<ffi::Buffer<ffi::F32>>()
                                  .Arg<ffi::Buffer<ffi::F32>>()
                                  .Ret<ffi::Buffer<ffi::F32>>()
                                  .Ret<ffi::Buffer<ffi::F32>>());

XLA_FFI_DEFINE_HANDLER_SYMBOL(vaani_log_sum_exp, log_sum_exp,
                              ffi::Ffi::Bind()
                                  .Ctx<ffi::ThreadPool>()
                                  .Arg<ffi::Buffer<ffi::F32>>()
                                  .Ret<ffi::Buffer<ffi::F32>>());

XLA_FFI_DEFINE_HANDLER_SYMBOL(vaani_float_matmul, float_matmul,
                              ffi::Ffi::Bind()
                                  .Ctx<ffi::ThreadPool>()
                                  .Arg<ffi::Buffer<ffi::F32>>()
                                  .Arg<ffi::Buffer<ffi::F32>>()
                                  .Ret<ffi::Buffer<ffi::F32>>()
                                  .Attr<bool>("columns"));

XLA_FFI_DEFINE_HANDLER_SYMBOL(vaani_rows_matmul, rows_matmul,
                              ffi::Ffi::Bind()
                                  .Ctx<ffi::ThreadPool>()
                                  .Arg<ffi::Buffer<ffi::F32>>()
                                  .Arg<ffi::Buffer<ffi::S8>>()
                                  .Arg<ffi::Buffer<ffi::F32>>()
                                  .Ret<ffi::Buffer<ffi::F32>>());

// Of what the functions compute, and take: raised with every change of either.
extern "C" int vaani_version() { return 3; }

// The name of instruction set `index` in order of preference, null beyond the last.
extern "C" const char* vaani_isa_name(int index) {
  const int count = sizeof(kIsas) / sizeof(kIsas[0]);
  return index < count ? kIsas[index].name : nullptr;
}

// The one in use.
extern "C" const char* vaani_isa() { return chosen.load()->name; }

// Takes another; 0 where it is unknown or the processor lacks it.
extern "C" int vaani_choose_isa(const char* name) {
  for (const Isa& isa : kIsas)
    if (std::string(name) == isa.name && isa.available()) {
      chosen.store(&isa);
      return 1;
    }
  return 0;
}
