// Causal attention of grouped queries over a KV cache, with an online softmax (Milakov and Gimelshein 2018) over
// blocks of kKeys positions. A query's sums are in
// the same order whatever stands beside it.

// RoPE: the pairs (x[i], x[i + head_dim / 2]) of a head of query t, turned by its angles, times a factor.
template <class T>
inline void rotate(const Attention<T>& a, int64_t b, int64_t t, int64_t head, float factor, float* y) {
  const int64_t half = a.head_dim / 2, angles = (b * a.queries + t) * half;
  const float *x = a.head(b, t, head), *cos = a.cos + angles, *sin = a.sin + angles;
  for (int64_t i = 0; i < half; i += kLanes) {
    const int64_t n = half - i;
    const Floats first = load_first(x + i, n), second = load_first(x + half + i, n);
    const Floats c = load_first(cos + i, n) * all(factor), s = load_first(sin + i, n) * all(factor);
    store_first(y + i, first * c - second * s, n);
    store_first(y + half + i, second * c + first * s, n);
  }
}

// Puts the key and the value of query t into the cache.
template <class T>
inline void write(const Attention<T>& a, int64_t b, int64_t k, int64_t t) {
  static thread_local std::vector<float> rotated;
  rotated.resize(a.head_dim);
  rotate(a, b, t, a.heads + k, 1, rotated.data());
  const float* value = a.head(b, t, a.heads + a.kv_heads + k);
  T *to_key = a.row(a.keys, b, k, a.start[b] + t), *to_value = a.row(a.values, b, k, a.start[b] + t);
  for (int64_t h = 0; h < a.head_dim; h += kLanes) {
    store_first(to_key + h, load_first(&rotated[h], a.head_dim - h), a.head_dim - h);
    store_first(to_value + h, load_first(value + h, a.head_dim - h), a.head_dim - h);
  }
}

// The softmax of kRows rows' blocks so far.
template <int kRows>
struct Softmax {
  static constexpr int kWhole = (kRows + kLanes - 1) / kLanes * kLanes;
  float highest[kWhole];
  float factor[kWhole];         // of what was summed before the last block
  float share[kWhole];          // of the last block's weights that are relative to its highest score
  float total[kRows * kLanes];  // of each row's weights, in each lane

  Softmax() {
    std::fill_n(highest, kWhole, kLowest);
    std::fill_n(total, kRows * kLanes, 0);
  }
  // Goes on to a block with these highest scores.
  void go_on(const float* scores) {
    for (int r = 0; r < kWhole; r += kLanes) {
      const Floats before = load(highest + r), block = load(scores + r), now = max(before, block);
      store(highest + r, now);
      store(factor + r, exp2(before - now));
      store(share + r, exp2(block - now));
    }
  }
  // Adds `step` times what the lanes have summed of a row's block.
  void add(int r, Floats weights, float step) {
    float* sums = total + r * kLanes;
    store(sums, fma(weights, all(step), load(sums) * all(factor[r])));
  }
  float sum_of(int r) const { return sum(load(total + r * kLanes)); }
};

// The highest of kKeys scores, of which the first `count` count; the others become kLowest. NaN if one is.
inline float highest(float* scores, int64_t count) {
  std::fill(scores + std::clamp<int64_t>(count, 0, kKeys), scores + kKeys, kLowest);
  Floats most = all(kLowest), nothing = all(0.0f);
  for (int j = 0; j < kKeys; j += kLanes) {
    most = max(most, load(scores + j));
    nothing = fma(load(scores + j), all(0.0f), nothing);
  }
  return has_nan(nothing) ? NAN : maximum(most);
}

#include "attend_one.h"
#include "attend_many.h"

template <class T>
inline void attention(xla::ffi::ThreadPool& pool, const Attention<T>& a) {
  a.queries == 1 ? attend_one(pool, a) : attend_many(pool, a);
}
