// Products with weights, attention, and sampling, for XLA's CPU backend. All are compiled for each instruction set;
// the best that the machine has is chosen when the library is loaded.

#include <algorithm>
#include <array>
#include <cfloat>
#include <cmath>
#include <cstdint>
#include <cstring>
#include <initializer_list>
#include <iterator>
#include <map>
#include <memory>
#include <mutex>
#include <shared_mutex>
#include <string>
#include <string_view>
#include <type_traits>
#include <utility>
#include <vector>

#if defined(__linux__)
#include <sys/mman.h>
#endif
#if defined(__x86_64__)
#include <cpuid.h>
#include <immintrin.h>
#if defined(__clang__) ? __clang_major__ >= 12 : __GNUC__ >= 11
#define HAS_NEW_X86  // the compiler knows AVX-VNNI and products of bf16
#endif
#if defined(__linux__)
#include <sys/syscall.h>
#include <unistd.h>
#endif
// Clang knows dot products only if it compiles everything for them, as it does for Apple's processors.
#elif defined(__aarch64__) && (!defined(__clang__) || defined(__ARM_FEATURE_DOTPROD))
#define HAS_NEON
#include <arm_neon.h>
#if defined(__linux__)
#include <sys/auxv.h>
#endif
#endif

#include "threads.h"

// Loops over a tile's rows: their sums stay in registers.
#define UNROLL _Pragma("GCC unroll 16")

namespace ffi = xla::ffi;

namespace {

constexpr int64_t kGroup = 16;  // rows of weights that are stored together
constexpr int kKeys = 64;  // positions of a block of attention, and of a page of the cache
constexpr int64_t kMany = 16;             // from so many queries of a sequence on, attend_many.h computes them
constexpr int64_t kPanelBytes = 1 << 17;  // of packed x: stays in a core's second-level cache
constexpr int64_t kFewRows = 32;          // a thread: with fewer, threads divide the weights, not the rows
constexpr int64_t kUnpackedBytes = 28 << 10;  // of weights: stay in a core's first-level cache, beside rows of x
constexpr int64_t kManyTiles = 8;         // of rows: with so many, it pays to unpack the weights first
constexpr int64_t kLine = 64;             // bytes of a cache line
constexpr int64_t kStepBytes = 2;         // of a row of int8_t in a cache
constexpr float kLowest = -1e30f;
constexpr float kMassRounding = 1e-6f;    // of probabilities: a set whose mass is within this of top_p reaches it

struct Half {  // IEEE 754 binary16
  uint16_t bits;
};
struct BFloat16 {
  uint16_t bits;
};

// The type of stored weights, or of their quants.
enum class Numbers { u4, u8, f16, bf16, f32 };
constexpr const char* kNumbers[] = {"u4", "u8", "float16", "bfloat16", "float32"};
constexpr int kBitsOf[] = {4, 8, 16, 16, 32};

// The arguments of a product: y = x W^T + residual, or silu(gate) * up for W's two halves.
struct Product {
  int64_t M, K, N;         // if gated, N is 2 * the width of y
  const float* x;          // [M, K]
  const uint8_t* weights;  // [ceil(N / kGroup), bytes of a group]
  Numbers numbers;
  int64_t block, zero;  // of matmul.h's formats
  bool offsets;
  const float* norm;  // [K], or null
  float eps;
  const float* residual;  // as y, or null
  bool gated;
  float* y;  // [M, N], or [M, N / 2] if gated
};

// The arguments of attention. Query t of a sequence is at position start + t. A sequence with a negative start is
// idle. The cache consists of pages of kKeys positions, and a sequence's table has the numbers of its pages in their
// order. A cache of int8_t has rows of head_dim numbers and the step that they are multiples of, in f16. A query sees
// `window` positions, up to its own.
template <class T>
struct Attention {
  int64_t batch, queries, heads, kv_heads, head_dim, table_len, layers, layer, window;
  const float* qkv;           // [B, queries, heads + 2 * kv_heads, head_dim]
  const float* norms;         // [2, head_dim]: weights of a query's and a key's RMS norm; null for none
  float eps;                  // of these norms
  const float *cos, *sin;     // [B, queries, head_dim / 2]
  const int32_t* start;       // [B]
  const int32_t* table;       // [B, table_len]
  T *keys, *values;           // [pages, layers, kv_heads, kKeys, row_len]
  float* out;                 // [B, queries, heads, head_dim]

  int64_t group() const { return heads / kv_heads; }
  int64_t row_len() const { return head_dim + (std::is_same_v<T, int8_t> ? kStepBytes : 0); }
  const float* head(int64_t b, int64_t t, int64_t head) const {
    return qkv + ((b * queries + t) * (heads + 2 * kv_heads) + head) * head_dim;
  }
  T* row(T* cache, int64_t b, int64_t k, int64_t s) const {
    const int64_t page = table[b * table_len + s / kKeys];
    return cache + (((page * layers + layer) * kv_heads + k) * kKeys + s % kKeys) * row_len();
  }
  bool idle(int64_t b) const { return start[b] < 0; }
  int64_t end(int64_t b) const { return idle(b) ? 0 : start[b] + queries; }  // of its positions
  // The first position that a query sees. Of an idle sequence, 0.
  int64_t first_seen(int64_t b, int64_t t) const {
    return idle(b) ? 0 : std::max<int64_t>(0, start[b] + t - window + 1);
  }
};

struct DrawOptions {  // of a row; in the order of native.py's columns
  float temperature, min_p, top_k, top_p;  // temperature 0: the most probable token
  float repetition_penalty, presence_penalty, frequency_penalty;
  float uniform;  // in [0, 1): decides the draw
};

// The arguments of sampling: B rows of V scores, N of which have a bias.
struct Draws {
  int64_t rows, count, num_biases;  // B, V, N
  const float* logits;              // [B, V]
  const bool* in_prompt;            // [B, V]
  const int32_t* counts;            // [B, V], in the answer
  const int32_t* bias_ids;          // [B, N]
  const float* bias;                // [B, N]
  const DrawOptions* options;       // [B]
  int32_t* token;                   // [B]; V if a score is NaN or infinite
};

}  // namespace

// Each instruction set's functions are in a namespace of their own.
#if defined(__x86_64__)
#if defined(HAS_NEW_X86)
#if defined(__clang__)
#pragma clang attribute push(__attribute__((target("avx512f,avx512bw,avx512dq,avx512vl,avx512vnni,avx2,fma,f16c,avx512bf16,amx-tile,amx-bf16,amx-int8"))), apply_to = function)
#else
#pragma GCC push_options
#pragma GCC target("avx512f,avx512bw,avx512dq,avx512vl,avx512vnni,avx2,fma,f16c,avx512bf16,amx-tile,amx-bf16,amx-int8")
#endif
namespace amx {
constexpr bool kBf16 = true, kAmx = true;
#include "simd_avx512.h"
#include "simd.h"
#include "matmul.h"
#include "attention.h"
#include "amx.h"
}  // namespace amx
#if defined(__clang__)
#pragma clang attribute pop
#else
#pragma GCC pop_options
#endif
#if defined(__clang__)
#pragma clang attribute push(__attribute__((target("avx512f,avx512bw,avx512dq,avx512vl,avx512vnni,avx2,fma,f16c,avx512bf16"))), apply_to = function)
#else
#pragma GCC push_options
#pragma GCC target("avx512f,avx512bw,avx512dq,avx512vl,avx512vnni,avx2,fma,f16c,avx512bf16")
#endif
namespace avx512bf16 {
constexpr bool kBf16 = true, kAmx = false;
#include "simd_avx512.h"
#include "simd.h"
#include "matmul.h"
}  // namespace avx512bf16
#if defined(__clang__)
#pragma clang attribute pop
#else
#pragma GCC pop_options
#endif
#if defined(__clang__)
#pragma clang attribute push(__attribute__((target("avx2,fma,f16c,avxvnni"))), apply_to = function)
#else
#pragma GCC push_options
#pragma GCC target("avx2,fma,f16c,avxvnni")
#endif
namespace avxvnni {
constexpr bool kVnni = true;
#include "simd_avx2.h"
#include "simd.h"
#include "matmul.h"
#include "linear.h"
#include "attention.h"
}  // namespace avxvnni
#if defined(__clang__)
#pragma clang attribute pop
#else
#pragma GCC pop_options
#endif
#endif
#if defined(__clang__)
#pragma clang attribute push(__attribute__((target("avx512f,avx512bw,avx512dq,avx512vl,avx512vnni,avx2,fma,f16c"))), apply_to = function)
#else
#pragma GCC push_options
#pragma GCC target("avx512f,avx512bw,avx512dq,avx512vl,avx512vnni,avx2,fma,f16c")
#endif
namespace avx512 {
constexpr bool kBf16 = false, kAmx = false;
#include "simd_avx512.h"
#include "simd.h"
#include "matmul.h"
#include "linear.h"
#include "attention.h"
#include "sample.h"
}  // namespace avx512
#if defined(__clang__)
#pragma clang attribute pop
#else
#pragma GCC pop_options
#endif
#if defined(__clang__)
#pragma clang attribute push(__attribute__((target("avx2,fma,f16c"))), apply_to = function)
#else
#pragma GCC push_options
#pragma GCC target("avx2,fma,f16c")
#endif
namespace avx2 {
constexpr bool kVnni = false;
#include "simd_avx2.h"
#include "simd.h"
#include "matmul.h"
#include "linear.h"
#include "attention.h"
#include "sample.h"
}  // namespace avx2
#if defined(__clang__)
#pragma clang attribute pop
#else
#pragma GCC pop_options
#endif
#elif defined(HAS_NEON)
#if !defined(__clang__)
#pragma GCC push_options
#pragma GCC target("arch=armv8.2-a+dotprod")
#endif
namespace neon {
#include "simd_neon.h"
#include "simd.h"
#include "matmul.h"
#include "linear.h"
#include "attention.h"
#include "sample.h"
}  // namespace neon
#if !defined(__clang__)
#pragma GCC pop_options
#endif
#endif
namespace portable {
#include "simd_portable.h"
#include "simd.h"
#include "matmul.h"
#include "linear.h"
#include "attention.h"
#include "sample.h"
}  // namespace portable

namespace {

// From the worst to the best.
#if defined(__x86_64__)
enum class Isa { portable, avx2, avxvnni, avx512, avx512bf16, amx };
constexpr const char* kNames[] = {"portable", "avx2", "avxvnni", "avx512", "avx512bf16", "amx"};

// Whether Linux lets this process use AMX's tiles, which takes a request (Documentation/arch/x86/xstate.rst).
bool may_use_tiles() {
#if defined(__linux__)
  constexpr long kRequestPermission = 0x1023, kTileData = 18;
  return syscall(SYS_arch_prctl, kRequestPermission, kTileData) == 0;
#else
  return false;
#endif
}

// Which registers the operating system keeps when it changes between threads.
__attribute__((target("xsave"))) uint64_t kept_registers() { return _xgetbv(0); }

// Bits are numbered as in Intel's manual, volume 2A, "CPUID". Not every compiler has __builtin_cpu_supports.
bool has(Isa isa) {
  struct Leaf {
    unsigned eax = 0, ebx = 0, ecx = 0, edx = 0;
    explicit Leaf(unsigned number, unsigned part = 0) { __get_cpuid_count(number, part, &eax, &ebx, &ecx, &edx); }
  };
  const auto all = [](uint64_t found, std::initializer_list<int> bits) {
    return std::all_of(bits.begin(), bits.end(), [&](int bit) { return found >> bit & 1; });
  };
  const Leaf one(1), seven(7), more(7, 1);
  const uint64_t kept = all(one.ecx, {27}) ? kept_registers() : 0;
  // FMA, F16C, AVX2; then AVX-512's F, DQ, BW, VL and VNNI.
  const bool avx2 = all(one.ecx, {12, 29}) && all(seven.ebx, {5}) && all(kept, {1, 2});
  const bool avx512 = avx2 && all(seven.ebx, {16, 17, 30, 31}) && all(seven.ecx, {11}) && all(kept, {5, 6, 7});
  switch (isa) {
#if defined(HAS_NEW_X86)
    case Isa::amx: return has(Isa::avx512bf16) && all(seven.edx, {22, 24, 25}) && may_use_tiles();
    case Isa::avx512bf16: return avx512 && all(more.eax, {5});
    case Isa::avxvnni: return avx2 && all(more.eax, {4});
#endif
    case Isa::avx512: return avx512;
    case Isa::avx2: return avx2;
    default: return isa == Isa::portable;
  }
}
#elif defined(HAS_NEON)
enum class Isa { portable, neon };
constexpr const char* kNames[] = {"portable", "neon"};

bool has(Isa isa) {
#if defined(__linux__)
  return isa == Isa::portable || getauxval(AT_HWCAP) & HWCAP_ASIMDDP;
#else
  return true;  // as all of Apple's
#endif
}
#else
enum class Isa { portable };
constexpr const char* kNames[] = {"portable"};

bool has(Isa) { return true; }
#endif

// The best that the machine has, but none above `most`.
Isa best(const char* most = "") {
  Isa found = Isa::portable;
  for (int i = 0; i < int(std::size(kNames)); ++i) {
    if (has(Isa(i))) found = Isa(i);
    if (std::strcmp(most, kNames[i]) == 0) break;
  }
  return found;
}

std::atomic<Isa> isa{best()};

ffi::Error wrong(const std::string& operation) {
  return ffi::Error::InvalidArgument("llamajax_" + operation + ": the shapes do not fit each other");
}

ffi::Error no_layer(const std::string& operation, int64_t layer, int64_t layers) {
  return ffi::Error(ffi::ErrorCode::kOutOfRange, "llamajax_" + operation + ": layer " + std::to_string(layer) +
                                                     " of " + std::to_string(layers));
}

// Weights and norms are stacks of layers'.
ffi::Error linear(ffi::ThreadPool pool, ffi::Buffer<ffi::F32> x, ffi::BufferR3<ffi::U8> weights,
                  ffi::BufferR0<ffi::S32> layer, ffi::BufferR2<ffi::F32> norms, ffi::BufferR0<ffi::S32> norm_layer,
                  ffi::Buffer<ffi::F32> residual, ffi::ResultBuffer<ffi::F32> y, std::string_view numbers,
                  int64_t block, bool offsets, int64_t zero, float eps, bool gated) {
  const auto xs = x.dimensions(), ws = weights.dimensions(), ns = norms.dimensions(), ys = y->dimensions();
  const int64_t kind = std::find(std::begin(kNumbers), std::end(kNumbers), numbers) - std::begin(kNumbers);
  if (kind == std::size(kNumbers) || (block != 16 && block != 32) || xs.size() != 2 || ys.size() != 2) {
    return wrong("linear");
  }
  const int64_t bits = kBitsOf[kind], num_blocks = (xs[1] + block - 1) / block;
  const bool dense = bits > 8, steps = bits == 4 && offsets;  // a block's product must fit 16 bits then
  const bool known = block == 32 ? !(dense && offsets) : !dense && !(bits == 8 && offsets);
  const int64_t head = dense ? 0 : 2 + 2 * offsets;
  if (!known || (steps && block * 127 * std::max(zero, 15 - zero) > INT16_MAX) || xs[0] != ys[0] ||
      (!dense && xs[1] % block != 0) || ws[2] != kGroup * (4 * steps + num_blocks * (head + block * bits / 8)) ||
      (gated ? ys[1] % kGroup != 0 || ws[1] * kGroup != 2 * ys[1] : ws[1] != (ys[1] + kGroup - 1) / kGroup) ||
      (ns[1] != 0 && ns[1] != xs[1]) ||
      (residual.element_count() != 0 && residual.element_count() != y->element_count())) {
    return wrong("linear");
  }
  const int64_t l = layer.typed_data()[0], n = norm_layer.typed_data()[0];
  if (l < 0 || l >= ws[0]) return no_layer("linear", l, ws[0]);
  if (n < 0 || n >= ns[0]) return no_layer("linear", n, ns[0]);
  const Product product{xs[0], xs[1], ys[1] * (1 + gated), x.typed_data(),
                        weights.typed_data() + l * ws[1] * ws[2], Numbers(kind), block, zero, offsets,
                        ns[1] ? norms.typed_data() + n * ns[1] : nullptr, eps,
                        residual.element_count() ? residual.typed_data() : nullptr, gated, y->typed_data()};
  const bool bf16 = product.numbers == Numbers::bf16;
  switch (isa.load()) {
#if defined(__x86_64__)
#if defined(HAS_NEW_X86)
    case Isa::amx:
      if (bf16) amx::multiply<amx::DenseTiles>(pool, product);
      else avx512::linear(pool, product);
      break;
    case Isa::avx512bf16:
      if (bf16) avx512bf16::multiply<avx512bf16::Dense<BFloat16>>(pool, product);
      else avx512::linear(pool, product);
      break;
    case Isa::avxvnni: avxvnni::linear(pool, product); break;
#endif
    case Isa::avx512: avx512::linear(pool, product); break;
    case Isa::avx2: avx2::linear(pool, product); break;
#elif defined(HAS_NEON)
    case Isa::neon: neon::linear(pool, product); break;
#endif
    default: portable::linear(pool, product);
  }
  return ffi::Error::Success();
}

template <class T>
void attend(ffi::ThreadPool& pool, const Attention<T>& a) {
  switch (isa.load()) {
#if defined(__x86_64__)
#if defined(HAS_NEW_X86)
    case Isa::amx: return amx::attention(pool, a);
    case Isa::avxvnni: return avxvnni::attention(pool, a);
#endif
    case Isa::avx512bf16:
    case Isa::avx512: return avx512::attention(pool, a);
    case Isa::avx2: return avx2::attention(pool, a);
#elif defined(HAS_NEON)
    case Isa::neon: return neon::attention(pool, a);
#endif
    default: return portable::attention(pool, a);
  }
}

// Attention. The cache's input and output are the same memory. One sequence may come without a batch dimension.
ffi::Error attention(ffi::ThreadPool pool, ffi::Buffer<ffi::F32> qkv, ffi::Buffer<ffi::F32> cos,
                     ffi::Buffer<ffi::F32> sin, ffi::Buffer<ffi::S32> start, ffi::BufferR0<ffi::S32> layer,
                     ffi::Buffer<ffi::S32> table, ffi::AnyBuffer old_keys, ffi::AnyBuffer old_values,
                     ffi::Buffer<ffi::F32> norms, float eps, int64_t window, ffi::ResultBuffer<ffi::F32> y,
                     ffi::Result<ffi::AnyBuffer> keys, ffi::Result<ffi::AnyBuffer> values) {
  const auto in = qkv.dimensions(), cache = keys->dimensions(), tables = table.dimensions();
  const auto type = keys->element_type();
  if (in.size() < 2 || cache.size() != 5 || tables.size() + 1 != in.size()) return wrong("attention");
  const int64_t T = in[in.size() - 2], width = in.back(), P = cache[0], L = cache[1], K = cache[2], M = tables.back(),
                row = cache[4], H = row - (type == ffi::S8 ? kStepBytes : 0), B = start.element_count(),
                N = width / std::max<int64_t>(H, 1) - 2 * K, l = layer.typed_data()[0];
  if (K < 1 || cache[3] != kKeys || H < 8 || H % 8 || N < K || N % K || width != (N + 2 * K) * H ||
      int64_t(qkv.element_count()) != B * T * width || int64_t(table.element_count()) != B * M ||
      int64_t(y->element_count()) != B * T * N * H || int64_t(cos.element_count()) != B * T * H / 2 ||
      sin.element_count() != cos.element_count() || window < 1 ||
      (norms.element_count() != 0 && int64_t(norms.element_count()) != 2 * H) || !(values->dimensions() == cache) ||
      values->element_type() != type || old_keys.untyped_data() != keys->untyped_data() ||
      old_values.untyped_data() != values->untyped_data() ||
      (type != ffi::F32 && type != ffi::F16 && type != ffi::BF16 && type != ffi::S8)) {
    return wrong("attention");
  }
  if (l < 0 || l >= L) return no_layer("attention", l, L);
  for (int64_t b = 0; b < B; ++b) {
    const int64_t begin = start.typed_data()[b];
    if (begin < 0) continue;
    if (begin + T > M * kKeys) {
      return ffi::Error(ffi::ErrorCode::kOutOfRange,
                        "llamajax_attention: positions " + std::to_string(begin) + " to " +
                            std::to_string(begin + T - 1) + " of a cache of " + std::to_string(M * kKeys));
    }
    for (int64_t i = 0; i * kKeys < begin + T; ++i) {
      const int64_t page = table.typed_data()[b * M + i];
      if (page < 0 || page >= P) {
        return ffi::Error(ffi::ErrorCode::kOutOfRange, "llamajax_attention: page " + std::to_string(page) + " of " +
                                                           std::to_string(P));
      }
    }
  }
  const auto call = [&](auto* key, auto* value) {
    attend(pool, Attention<std::remove_pointer_t<decltype(key)>>{
                     B, T, N, K, H, M, L, l, window, qkv.typed_data(),
                     norms.element_count() == 0 ? nullptr : norms.typed_data(), eps, cos.typed_data(),
                     sin.typed_data(), start.typed_data(), table.typed_data(), key, value, y->typed_data()});
  };
  if (type == ffi::F32) {
    call(static_cast<float*>(keys->untyped_data()), static_cast<float*>(values->untyped_data()));
  } else if (type == ffi::F16) {
    call(static_cast<Half*>(keys->untyped_data()), static_cast<Half*>(values->untyped_data()));
  } else if (type == ffi::S8) {
    call(static_cast<int8_t*>(keys->untyped_data()), static_cast<int8_t*>(values->untyped_data()));
  } else {
    call(static_cast<BFloat16*>(keys->untyped_data()), static_cast<BFloat16*>(values->untyped_data()));
  }
  return ffi::Error::Success();
}

// Writes nothing, so that a pool takes no memory before it is used. Asks Linux for huge pages (2 MiB): a pool's pages
// are read in any order, and span more memory pages of 4 KiB than the TLB has entries for. With 32 rows of 4,096
// positions (SmolLM2-135M, Zen 3) attention takes 0.9 of the time.
ffi::Error unwritten(ffi::Result<ffi::AnyBuffer> first, ffi::Result<ffi::AnyBuffer> second) {
#if defined(__linux__)
  for (auto array : {first, second}) {
    constexpr uintptr_t kUnit = 1 << 21;
    const uintptr_t address = reinterpret_cast<uintptr_t>(array->untyped_data()), end = address + array->size_bytes();
    const uintptr_t first_unit = (address + kUnit - 1) / kUnit * kUnit, units_end = end / kUnit * kUnit;
    if (first_unit < units_end) madvise(reinterpret_cast<void*>(first_unit), units_end - first_unit, MADV_HUGEPAGE);
  }
#endif
  return ffi::Error::Success();
}

ffi::Error sample(ffi::ThreadPool pool, ffi::BufferR2<ffi::F32> logits, ffi::BufferR2<ffi::PRED> in_prompt,
                  ffi::BufferR2<ffi::S32> counts, ffi::BufferR2<ffi::S32> bias_ids, ffi::BufferR2<ffi::F32> bias,
                  ffi::BufferR2<ffi::F32> options, ffi::ResultBufferR1<ffi::S32> token) {
  const auto shape = logits.dimensions(), biases = bias.dimensions(), columns = options.dimensions();
  const auto differ = [](const auto& a, const auto& b) { return a[0] != b[0] || a[1] != b[1]; };
  if (differ(in_prompt.dimensions(), shape) || differ(counts.dimensions(), shape) ||
      differ(bias_ids.dimensions(), biases) || biases[0] != shape[0] || columns[0] != shape[0] ||
      columns[1] * sizeof(float) != sizeof(DrawOptions) || token->dimensions()[0] != shape[0] || shape[1] < 1) {
    return wrong("sample");
  }
  const Draws draws{shape[0], shape[1], biases[1], logits.typed_data(), in_prompt.typed_data(), counts.typed_data(),
                    bias_ids.typed_data(), bias.typed_data(),
                    reinterpret_cast<const DrawOptions*>(options.typed_data()), token->typed_data()};
  switch (isa.load()) {
#if defined(__x86_64__)
    case Isa::amx:
    case Isa::avx512bf16:
    case Isa::avx512: avx512::sample(pool, draws); break;
    case Isa::avxvnni:
    case Isa::avx2: avx2::sample(pool, draws); break;
#elif defined(HAS_NEON)
    case Isa::neon: neon::sample(pool, draws); break;
#endif
    default: portable::sample(pool, draws);
  }
  return ffi::Error::Success();
}

std::shared_mutex answering;
bool (*answer)(int32_t, int32_t, uint32_t*) = nullptr;

// The tokens that may follow a token. The first thread that needs them asks the host; others wait.
struct Question {
  const int32_t asked, token;
  std::vector<uint32_t> mask;
  bool ended = true;
  std::once_flag once;

  void ask() {
    std::call_once(once, [this] {
      const std::shared_lock lock(answering);
      ended = !answer || !answer(asked, token, mask.data());
    });
  }
};

std::mutex questioning;
std::map<int32_t, std::shared_ptr<Question>> questions;  // by who is asked: the later, the higher
// A program that fails before `ask` leaves its question here. When there are more, the oldest one goes.
constexpr size_t kMostQuestions = 64;

// A thread of the pool asks while the program goes on. `same` is the token, so that what uses it comes after this.
ffi::Error begin_to_ask(ffi::ThreadPool pool, ffi::BufferR1<ffi::S32> asked, ffi::BufferR1<ffi::S32> token,
                        ffi::ResultBufferR1<ffi::S32> same, int64_t vocab_size) {
  if (asked.element_count() != 1 || token.element_count() != 1 || same->element_count() != 1 || vocab_size < 1) {
    return wrong("begin_to_ask");
  }
  const int32_t number = asked.typed_data()[0];
  same->typed_data()[0] = token.typed_data()[0];
  const std::shared_ptr<Question> question(
      new Question{number, token.typed_data()[0], std::vector<uint32_t>(vocab_size / 32 + 1)});
  {
    const std::lock_guard lock(questioning);
    questions[number] = question;
    if (questions.size() > kMostQuestions) questions.erase(questions.begin());
  }
  pool.Schedule([question] { question->ask(); });
  return ffi::Error::Success();
}

constexpr auto kBits = [] {
  std::array<uint32_t, 32> bits{};
  for (int i = 0; i < 32; ++i) bits[i] = uint32_t(1) << i;
  return bits;
}();

ffi::Error ask(ffi::BufferR1<ffi::S32> asked, ffi::BufferR2<ffi::F32> logits, ffi::ResultBufferR2<ffi::F32> allowed,
               ffi::ResultBufferR1<ffi::PRED> ended) {
  std::shared_ptr<Question> question;
  if (asked.element_count() == 1) {
    const std::lock_guard lock(questioning);
    if (const auto found = questions.extract(asked.typed_data()[0])) question = found.mapped();
  }
  const int64_t V = logits.element_count();
  if (!question || int64_t(question->mask.size()) != V / 32 + 1 || logits.dimensions()[0] != 1 ||
      int64_t(allowed->element_count()) != V || ended->element_count() != 1) {
    return wrong("ask");
  }
  question->ask();
  ended->typed_data()[0] = question->ended;
  const float *from = logits.typed_data();
  float *to = allowed->typed_data();
  for (int64_t i = 0; i < V; i += 32) {
    const uint32_t word = question->mask[i / 32];
    const int64_t count = std::min<int64_t>(32, V - i);
    for (int64_t j = 0; j < count; ++j) {
      const float x = from[i + j];  // read always, and masked by a table: without branches
      to[i + j] = word & kBits[j] ? x : -INFINITY;
    }
  }
  return ffi::Error::Success();
}

}  // namespace

XLA_FFI_DEFINE_HANDLER_SYMBOL(llamajax_linear, linear,
                              ffi::Ffi::Bind()
                                  .Ctx<ffi::ThreadPool>()
                                  .Arg<ffi::Buffer<ffi::F32>>()
                                  .Arg<ffi::BufferR3<ffi::U8>>()
                                  .Arg<ffi::BufferR0<ffi::S32>>()
                                  .Arg<ffi::BufferR2<ffi::F32>>()
                                  .Arg<ffi::BufferR0<ffi::S32>>()
                                  .Arg<ffi::Buffer<ffi::F32>>()
                                  .Ret<ffi::Buffer<ffi::F32>>()
                                  .Attr<std::string_view>("numbers")
                                  .Attr<int64_t>("block")
                                  .Attr<bool>("offsets")
                                  .Attr<int64_t>("zero")
                                  .Attr<float>("eps")
                                  .Attr<bool>("gated"));

XLA_FFI_DEFINE_HANDLER_SYMBOL(llamajax_attention, attention,
                              ffi::Ffi::Bind()
                                  .Ctx<ffi::ThreadPool>()
                                  .Arg<ffi::Buffer<ffi::F32>>()
                                  .Arg<ffi::Buffer<ffi::F32>>()
                                  .Arg<ffi::Buffer<ffi::F32>>()
                                  .Arg<ffi::Buffer<ffi::S32>>()
                                  .Arg<ffi::BufferR0<ffi::S32>>()
                                  .Arg<ffi::Buffer<ffi::S32>>()
                                  .Arg<ffi::AnyBuffer>()
                                  .Arg<ffi::AnyBuffer>()
                                  .Arg<ffi::Buffer<ffi::F32>>()
                                  .Attr<float>("eps")
                                  .Attr<int64_t>("window")
                                  .Ret<ffi::Buffer<ffi::F32>>()
                                  .Ret<ffi::AnyBuffer>()
                                  .Ret<ffi::AnyBuffer>());

XLA_FFI_DEFINE_HANDLER_SYMBOL(llamajax_unwritten, unwritten,
                              ffi::Ffi::Bind().Ret<ffi::AnyBuffer>().Ret<ffi::AnyBuffer>());

XLA_FFI_DEFINE_HANDLER_SYMBOL(llamajax_sample, sample,
                              ffi::Ffi::Bind()
                                  .Ctx<ffi::ThreadPool>()
                                  .Arg<ffi::BufferR2<ffi::F32>>()
                                  .Arg<ffi::BufferR2<ffi::PRED>>()
                                  .Arg<ffi::BufferR2<ffi::S32>>()
                                  .Arg<ffi::BufferR2<ffi::S32>>()
                                  .Arg<ffi::BufferR2<ffi::F32>>()
                                  .Arg<ffi::BufferR2<ffi::F32>>()
                                  .Ret<ffi::BufferR1<ffi::S32>>());

XLA_FFI_DEFINE_HANDLER_SYMBOL(llamajax_begin_to_ask, begin_to_ask,
                              ffi::Ffi::Bind()
                                  .Ctx<ffi::ThreadPool>()
                                  .Arg<ffi::BufferR1<ffi::S32>>()
                                  .Arg<ffi::BufferR1<ffi::S32>>()
                                  .Ret<ffi::BufferR1<ffi::S32>>()
                                  .Attr<int64_t>("vocab_size"));

XLA_FFI_DEFINE_HANDLER_SYMBOL(llamajax_ask, ask,
                              ffi::Ffi::Bind()
                                  .Arg<ffi::BufferR1<ffi::S32>>()
                                  .Arg<ffi::BufferR2<ffi::F32>>()
                                  .Ret<ffi::BufferR2<ffi::F32>>()
                                  .Ret<ffi::BufferR1<ffi::PRED>>());

// Sets the function that `ask` calls, with the number of who is asked, a token, and room for the mask of the tokens
// that may follow. The function returns whether any may. Without one, all answers end. When this returns, no call of
// the old function is running.
extern "C" void llamajax_answer(bool (*function)(int32_t, int32_t, uint32_t*)) {
  const std::unique_lock lock(answering);
  answer = function;
}

// The name of the instruction set that is used.
extern "C" const char* llamajax_instruction_set() { return kNames[int(isa.load())]; }

// From now on the best that the machine has, but none above `most`.
extern "C" void llamajax_limit(const char* most) { isa = best(most); }

namespace {

// Packs rows of a file's blocks as packed.py describes. A block has `head` bytes of f16: a scale, or a scale and an
// offset, which become multiples of a step. Then come quants: each byte is xored with `flip`, and a Word of one row
// is stored next to the next row's. Rows of zeros fill the last group. Returns whether all scales and offsets are
// finite.
template <class Word>
bool pack(const uint8_t* const* rows, int64_t num_rows, int64_t num_blocks, int64_t head, int64_t quants, Word flip,
          int64_t zero, uint8_t* packed) {
  const int64_t size = head + quants;
  const std::vector<uint8_t> zeros(num_blocks * size);
  float sum = 0;  // of zeros; NaN if there is a number that is not finite
  const auto numbers = [&](const uint8_t* block) {
    Half read[2];
    std::memcpy(read, block, sizeof read);
    const float scale = portable::widen(read[0]);
    return std::pair{scale, portable::widen(read[1]) + zero * scale};
  };
  for (int64_t first = 0; first < num_rows; first += kGroup) {
    const uint8_t* group[kGroup];
    float inverse[kGroup];
    for (int64_t r = 0; r < kGroup; ++r) group[r] = first + r < num_rows ? rows[first + r] : zeros.data();
    if (head == 4) {
      for (int64_t r = 0; r < kGroup; ++r, packed += 4) {
        float most = 0, nothing = 0;
        for (int64_t b = 0; b < num_blocks; ++b) {
          const auto [scale, offset] = numbers(group[r] + b * size);
          most = std::max({most, std::fabs(scale), std::fabs(offset)});
          nothing += 0 * (scale + offset);  // or NaN
        }
        inverse[r] = most > 0 ? INT16_MAX / most : 0;
        const float step = most * (1.0f / INT16_MAX) + nothing;
        sum += nothing;
        std::memcpy(packed, &step, 4);
      }
    }
    for (int64_t b = 0; b < num_blocks; ++b, packed += kGroup * size) {
      for (int64_t r = 0; r < kGroup; ++r) {
        const uint8_t* block = group[r] + b * size;
        if (head == 4) {
          const auto [scale, offset] = numbers(block);
          const int16_t pair[] = {int16_t(std::lrint(scale * inverse[r])), int16_t(std::lrint(offset * inverse[r]))};
          std::memcpy(packed + 4 * r, pair, 4);
        } else if (head == 2) {
          std::memcpy(packed + 2 * r, block, 2);
          Half scale;
          std::memcpy(&scale, block, 2);
          sum += 0 * portable::widen(scale);
        }
        for (int64_t i = 0; i < quants; i += sizeof(Word)) {
          Word word;
          std::memcpy(&word, block + head + i, sizeof word);
          word ^= flip;
          std::memcpy(packed + kGroup * (head + i) + sizeof word * r, &word, sizeof word);
        }
      }
    }
  }
  return sum == 0;
}

}  // namespace

extern "C" bool llamajax_pack(const uint8_t* const* rows, int64_t num_rows, int64_t num_blocks, int64_t head,
                              int64_t quants, int64_t word, uint8_t flip, int64_t zero, uint8_t* packed) {
  if (word == 2) return pack<uint16_t>(rows, num_rows, num_blocks, head, quants, flip * 0x0101u, zero, packed);
  return pack<uint32_t>(rows, num_rows, num_blocks, head, quants, flip * 0x01010101u, zero, packed);
}
