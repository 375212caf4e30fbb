// Causal attention of grouped queries over a KV cache, with an online softmax (Milakov and Gimelshein 2018) over
// blocks of kKeys positions. A query is summed in the same order however many others are computed with it: this makes
// a batch equal to single requests.

// 1 / sqrt(mean(x^2) + eps) of `count` numbers.
inline float inverse_rms(const float* x, int64_t count, float eps) {
  Floats squares = all(0.0f);
  for (int64_t i = 0; i < count; i += kLanes) {
    const Floats part = load_first(x + i, count - i);
    squares = fma(part, part, squares);
  }
  return 1 / std::sqrt(sum(squares) / count + eps);
}

// RoPE: turns the pairs (x[i], x[i + head_dim / 2]) of a head of query t by its angles, and multiplies them by a
// factor. If there are norms, normalizes the head first.
template <class T>
inline void rotate(const Attention<T>& a, int64_t b, int64_t t, int64_t head, float factor, float* y) {
  const int64_t half = a.head_dim / 2, angles = (b * a.queries + t) * half;
  const float *x = a.head(b, t, head), *cos = a.cos + angles, *sin = a.sin + angles;
  const float* norm = a.norms ? a.norms + (head < a.heads ? 0 : a.head_dim) : nullptr;
  const Floats scale = all(norm ? inverse_rms(x, a.head_dim, a.eps) : 1);
  const auto get = [&](int64_t i, int64_t n) {
    return norm ? load_first(x + i, n) * scale * load_first(norm + i, n) : load_first(x + i, n);
  };
  for (int64_t i = 0; i < half; i += kLanes) {
    const int64_t n = half - i;
    const Floats first = get(i, n), second = get(half + i, n);
    const Floats c = load_first(cos + i, n) * all(factor), s = load_first(sin + i, n) * all(factor);
    store_first(y + i, first * c - second * s, n);
    store_first(y + half + i, second * c + first * s, n);
  }
}

// The largest magnitude of `count` numbers; NaN if one is.
template <class T>
inline float largest(const T* x, int64_t count) {
  Floats most = all(0.0f), nothing = all(0.0f);
  for (int64_t i = 0; i < count; i += kLanes) {
    const Floats part = load_first(x + i, count - i);
    most = max(most, max(part, -part));
    nothing = fma(part, all(0.0f), nothing);
  }
  return has_nan(nothing) ? NAN : maximum(most);
}

// Whether a cache's rows end in a step, as those of int8 do.
template <class T>
constexpr bool kSteps = std::is_same_v<T, int8_t>;

// Reads the steps of `count` rows [H] of a cache, and fills the last vector with zeros.
template <class T>
inline void read_steps(const T* rows, int64_t H, int64_t row_len, int64_t count, float* steps) {
  Half stored[kKeys] = {};
  for (int64_t s = 0; s < count; ++s) std::memcpy(&stored[s], rows + s * row_len + H, kStepBytes);
  for (int64_t s = 0; s < count; s += kLanes) store(steps + s, load(stored + s));
}

// Stores a row of `count` numbers in a cache.
template <class T>
inline void put_row(const float* x, int64_t count, T* row) {
  for (int64_t h = 0; h < count; h += kLanes) store_first(row + h, load_first(x + h, count - h), count - h);
}
inline void put_row(const float* x, int64_t count, int8_t* row) {
  Half stored[kLanes];
  store(stored, all(largest(x, count) / INT8_MAX));
  std::memcpy(row + count, stored, kStepBytes);
  float step[kLanes];  // as it is stored
  store(step, load(stored));
  const Floats inverse = all(step[0] > 0 ? 1 / step[0] : 0);
  for (int64_t h = 0; h < count; h += kLanes) {
    const Floats multiples = load_first(x + h, count - h) * inverse;
    store_first(row + h, max(min(multiples, all(127.0f)), all(-127.0f)), count - h);
  }
}

// Stores the key and the value of query t in the cache.
template <class T>
inline void write(const Attention<T>& a, int64_t b, int64_t k, int64_t t) {
  static thread_local std::vector<float> rotated;
  rotated.resize(a.head_dim);
  rotate(a, b, t, a.heads + k, 1, rotated.data());
  const float* value = a.head(b, t, a.heads + a.kv_heads + k);
  put_row(rotated.data(), a.head_dim, a.row(a.keys, b, k, a.start[b] + t));
  put_row(value, a.head_dim, a.row(a.values, b, k, a.start[b] + t));
}

// The running softmax of kRows rows, over the blocks so far.
template <int kRows>
struct Softmax {
  static constexpr int kWhole = (kRows + kLanes - 1) / kLanes * kLanes;
  float highest[kWhole];
  float factor[kWhole];         // scales what was summed before the last block
  float total[kRows * kLanes];  // of each row's weights, in each lane

  Softmax() {
    std::fill_n(highest, kWhole, kLowest);
    std::fill_n(total, kRows * kLanes, 0);
  }
  // Begins a block with these highest scores.
  void go_on(const float* scores) {
    for (int r = 0; r < kWhole; r += kLanes) {
      const Floats before = load(highest + r), block = load(scores + r), now = max(before, block);
      store(highest + r, now);
      store(factor + r, exp2(before - now));
    }
  }
  // Adds the lanes' sums of a row's block.
  void add(int r, Floats weights) {
    float* sums = total + r * kLanes;
    store(sums, fma(load(sums), all(factor[r]), weights));
  }
  float sum_of(int r) const { return sum(load(total + r * kLanes)); }
};

// The highest of the scores from `begin` up to `count`; NaN if one is. The others of kKeys become kLowest.
inline float highest(float* scores, int64_t begin, int64_t count) {
  std::fill(scores, scores + std::clamp<int64_t>(begin, 0, kKeys), kLowest);
  std::fill(scores + std::clamp<int64_t>(count, 0, kKeys), scores + kKeys, kLowest);
  Floats most = all(kLowest), nothing = all(0.0f);
  for (int j = 0; j < kKeys; j += kLanes) {
    most = max(most, load(scores + j));
    nothing = fma(load(scores + j), all(0.0f), nothing);
  }
  return has_nan(nothing) ? NAN : maximum(most);
}

#include "attend_few.h"
#include "attend_many.h"

// Idle sequences get zeros.
template <class T>
inline void attention(xla::ffi::ThreadPool& pool, const Attention<T>& a) {
  const int64_t length = a.queries * a.heads * a.head_dim;
  for (int64_t b = 0; b < a.batch; ++b) {
    if (a.idle(b)) std::fill_n(a.out + b * length, length, 0.0f);
  }
  a.queries < kMany ? attend_few(pool, a) : attend_many(pool, a);
}
