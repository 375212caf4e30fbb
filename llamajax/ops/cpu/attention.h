// Causal attention of grouped queries over a KV cache, with an online softmax (Milakov and Gimelshein 2018) over
// blocks of kKeys positions. A query's sums are in the same order whatever stands beside it.

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

// scores [kRows, kKeys] of queries [kRows, H] and the first `count` keys [H] of a cache. The values, which are next,
// are fetched meanwhile.
template <int kRows, class T>
inline void score_stored(const float* queries, int64_t H, const T* keys, const T* values, int64_t count, float* scores) {
  for (int64_t s = 0; s < count; ++s) {
    for (int64_t h = 0; h < H; h += 64 / sizeof(T)) {
      __builtin_prefetch(keys + (s + kAhead) * H + h);
      __builtin_prefetch(values + s * H + h);
    }
    Floats total[kRows];
    UNROLL for (int r = 0; r < kRows; ++r) total[r] = all(0.0f);
    int64_t h = 0;
    for (; h + kLanes <= H; h += kLanes) {
      const Floats key = load(keys + s * H + h);
      UNROLL for (int r = 0; r < kRows; ++r) total[r] = fma(load(queries + r * H + h), key, total[r]);
    }
    if (h < H) {
      const Floats key = load_first(keys + s * H + h, H - h);
      UNROLL for (int r = 0; r < kRows; ++r) total[r] = fma(load_first(queries + r * H + h, H - h), key, total[r]);
    }
    UNROLL for (int r = 0; r < kRows; ++r) scores[r * kKeys + s] = sum(total[r]);
  }
}

// sums [kRows, H] = factor[r] * sums + weights [kRows, kKeys] times `count` values [H] of a cache, of kWide vectors
// from h on, or of one with less than kLanes numbers.
template <int kRows, int kWide, bool kWhole, class T>
inline void mix_part(const float* weights, const float* factor, const T* values, int64_t count, int64_t H, int64_t h,
                     float* sums) {
  const auto get = [&](const auto* p) { return kWhole ? load(p) : load_first(p, H - h); };
  Floats total[kRows][kWide];
  UNROLL for (int r = 0; r < kRows; ++r) {
    UNROLL for (int i = 0; i < kWide; ++i) total[r][i] = get(sums + r * H + h + i * kLanes) * all(factor[r]);
  }
  for (int64_t s = 0; s < count; ++s) {
    Floats value[kWide];
    UNROLL for (int i = 0; i < kWide; ++i) value[i] = get(values + s * H + h + i * kLanes);
    UNROLL for (int r = 0; r < kRows; ++r) {
      const Floats weight = all(weights[r * kKeys + s]);
      UNROLL for (int i = 0; i < kWide; ++i) total[r][i] = fma(weight, value[i], total[r][i]);
    }
  }
  UNROLL for (int r = 0; r < kRows; ++r) {
    UNROLL for (int i = 0; i < kWide; ++i) {
      if constexpr (kWhole) {
        store(sums + r * H + h + i * kLanes, total[r][i]);
      } else {
        store_first(sums + r * H + h, total[r][i], H - h);
      }
    }
  }
}

template <int kRows, int kWide, class T>
inline void mix(const float* weights, const float* factor, const T* values, int64_t count, int64_t H, float* sums) {
  int64_t h = 0;
  for (; h + kWide * kLanes <= H; h += kWide * kLanes) mix_part<kRows, kWide, true>(weights, factor, values, count, H, h, sums);
  for (; h + kLanes <= H; h += kLanes) mix_part<kRows, 1, true>(weights, factor, values, count, H, h, sums);
  if (h < H) mix_part<kRows, 1, false>(weights, factor, values, count, H, h, sums);
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

// One query of kRows heads of a KV head's group.
template <int kRows, class T>
inline void attend_one(const Attention<T>& a, int64_t b, int64_t k, int64_t first) {
  const int64_t H = a.head_dim, end = a.start[b] + 1;
  static thread_local std::vector<float> scratch;
  scratch.resize(2 * kRows * H);
  float *queries = scratch.data(), *sums = queries + kRows * H, scores[kRows * kKeys];
  Softmax<kRows> softmax;
  float most[softmax.kWhole] = {};
  std::fill(sums, sums + kRows * H, 0);
  const float scale = kLog2e / std::sqrt(float(H));  // scores are of powers of two
  for (int r = 0; r < kRows; ++r) rotate(a, b, 0, k * a.group() + first + r, scale, queries + r * H);
  for (int64_t s = 0; s < end; s += kKeys) {
    const int64_t count = std::min<int64_t>(kKeys, end - s);
    score_stored<kRows>(queries, H, a.row(a.keys, b, k, s), a.row(a.values, b, k, s), count, scores);
    for (int r = 0; r < kRows; ++r) most[r] = highest(scores + r * kKeys, count);
    softmax.go_on(most);
    for (int r = 0; r < kRows; ++r) {
      Floats total = all(0.0f);
      for (float* at = scores + r * kKeys; at < scores + (r + 1) * kKeys; at += kLanes) {
        const Floats weight = exp2(load(at) - all(softmax.highest[r]));
        store(at, weight);
        total = total + weight;
      }
      softmax.add(r, total, 1);
    }
    mix<kRows, 4>(scores, softmax.factor, a.row(a.values, b, k, s), count, H, sums);
  }
  for (int r = 0; r < kRows; ++r) {
    float* out = a.out + (b * a.heads + k * a.group() + first + r) * H;
    const Floats inverse = all(1 / softmax.sum_of(r));
    for (int64_t h = 0; h < H; h += kLanes) {
      store_first(out + h, load_first(sums + r * H + h, H - h) * inverse, H - h);
    }
  }
}

template <class T, int kRows = 4>
inline void attend_group(const Attention<T>& a, int64_t b, int64_t k) {
  if constexpr (kRows > 1) {
    if (a.group() % kRows != 0) return attend_group<T, kRows - 1>(a, b, k);
  }
  for (int64_t first = 0; first < a.group(); first += kRows) attend_one<kRows>(a, b, k, first);
}

// Many queries take the cache in blocks that stand as the products run. Of a cache of f32 these are in f32. Of another,
// they are in 16 bits, in pairs: queries and keys are multiples of a vector's largest magnitude / kFine, values of a
// dimension's in the block, weights of the block's largest / kWeight, so that sums fit 32 bits.
constexpr int32_t kFine = 4095, kWeight = INT32_MAX / kFine / kKeys;

template <class T>
using Number = std::conditional_t<std::is_same_v<T, float>, float, int16_t>;
template <class N>
constexpr int kPair = std::is_same_v<N, float> ? 1 : 2;

template <class N>
struct Block {
  N *keys, *values;                // [head_dim / kPair, kKeys, kPair], [kKeys / kPair, width, kPair]
  float *key_steps, *value_steps;  // [kKeys], [width]
};

// Blocks of all sequences and KV heads. Their width is head_dim, filled up to whole vectors.
template <class N>
struct Blocks {
  int64_t head_dim, width;
  std::vector<N> numbers;
  std::vector<float> steps;

  void resize(int64_t count, int64_t H) {
    head_dim = H;
    width = (H + 2 * kLanes - 1) / (2 * kLanes) * 2 * kLanes;
    numbers.resize(count * kKeys * (head_dim + width));
    steps.resize(count * (kKeys + width));
  }
  Block<N> operator[](int64_t i) {
    N* keys = numbers.data() + i * kKeys * (head_dim + width);
    float* key_steps = steps.data() + i * (kKeys + width);
    return {keys, keys + kKeys * head_dim, key_steps, key_steps + kKeys};
  }
};

// Puts numbers as they are, or rounded. Returns what was put.
inline Floats put(float* p, Floats x) {
  store(p, x);
  return x;
}
inline Floats put(int16_t* p, Floats x) {
  const Ints rounded = round(x);
  store_int16(p, rounded);
  return to_floats(rounded);
}

// `count` numbers x, as multiples of their largest magnitude / `most` if they are rounded, in whole vectors. Returns
// the step.
template <class T, class N>
inline float narrow_row(const T* x, int64_t count, float most, N* y) {
  float step = 1;
  Floats inverse = all(1.0f);
  if constexpr (kPair<N> == 2) {
    Floats largest = all(0.0f), nothing = all(0.0f);
    for (int64_t i = 0; i < count; i += kLanes) {
      const Floats part = load_first(x + i, count - i);
      largest = max(largest, max(part, -part));
      nothing = fma(part, all(0.0f), nothing);  // or NaN, which rounding would lose
    }
    step = has_nan(nothing) ? NAN : maximum(largest) / most;
    inverse = all(step > 0 ? 1 / step : 0);
  }
  for (int64_t i = 0; i < count; i += kLanes) put(y + i, load_first(x + i, count - i) * inverse);
  return step;
}

// Writes what is new of the positions from s on into the cache, and makes a block of them.
template <class T, class N>
inline void pack(const Attention<T>& a, int64_t b, int64_t k, int64_t s, int64_t width, const Block<N>& block) {
  constexpr int P = kPair<N>;
  const int64_t H = a.head_dim, start = a.start[b], end = start + a.queries;
  for (int64_t t = std::max(s, start); t < std::min(s + kKeys, end); ++t) write(a, b, k, t - start);
  static thread_local std::vector<N> narrowed;
  static thread_local std::vector<T> zeros;
  narrowed.resize(width);
  zeros.assign(H, T{});
  const T* values[kKeys];
  for (int64_t j = 0; j < kKeys; ++j) {
    const bool there = s + j < end;
    values[j] = there ? a.row(a.values, b, k, s + j) : zeros.data();
    block.key_steps[j] = narrow_row(there ? a.row(a.keys, b, k, s + j) : zeros.data(), H, kFine, narrowed.data());
    for (int64_t h = 0; h < H; h += P) std::copy_n(&narrowed[h], P, block.keys + h * kKeys + P * j);
  }
  for (int64_t h = 0; h < width; h += kLanes) {
    Floats part[kKeys], largest = all(0.0f), nothing = all(0.0f);
    for (int j = 0; j < kKeys; ++j) {
      part[j] = h < H ? load_first(values[j] + h, H - h) : all(0.0f);
      largest = max(largest, max(part[j], -part[j]));
      nothing = fma(part[j], all(0.0f), nothing);  // or NaN
    }
    if constexpr (P == 1) {
      store(block.value_steps + h, all(1.0f));
      for (int j = 0; j < kKeys; ++j) store(block.values + j * width + h, part[j]);
    } else {
      const Floats inverse = all(float(kFine)) / max(largest, all(1e-30f));
      store(block.value_steps + h, fma(largest, all(1.0f / kFine), nothing));
      for (int j = 0; j < kKeys; j += 2) {
        store(block.values + j * width + 2 * h, pairs(round(part[j] * inverse), round(part[j + 1] * inverse)));
      }
    }
  }
}

// c [kRows, width] = factor [kRows] * c, if there is a factor, + a [kRows, length] times b [length / kPair, width, kPair],
// of steps for each row of a and each column of b: the first `columns` of c, with the first `depth` of a.
template <int kRows, class N>
inline void product(const N* a, const float* row_steps, int64_t length, const N* b, const float* column_steps,
                    int64_t width, int64_t depth, int64_t columns, const float* factor, float* c) {
  constexpr int P = kPair<N>;
  constexpr std::conditional_t<P == 1, float, int32_t> kNothing = 0;
  for (int64_t j = 0; j < columns; j += 2 * kLanes) {
    decltype(all(kNothing)) total[kRows][2];
    UNROLL for (int r = 0; r < kRows; ++r) total[r][0] = total[r][1] = all(kNothing);
    for (int64_t d = 0; d < depth; d += P) {
      const auto first = load(b + d * width + P * j), second = load(b + d * width + P * (j + kLanes));
      UNROLL for (int r = 0; r < kRows; ++r) {
        total[r][0] = dot(total[r][0], first, a + r * length + d);
        total[r][1] = dot(total[r][1], second, a + r * length + d);
      }
    }
    UNROLL for (int i = 0; i < 2; ++i) {
      const Floats steps = load(column_steps + j + i * kLanes);
      UNROLL for (int r = 0; r < kRows; ++r) {
        float* to = c + r * width + j + i * kLanes;
        const Floats before = factor ? load(to) * all(factor[r]) : all(0.0f);
        store(to, fma(to_floats(total[r][i]), steps * all(row_steps[r]), before));
      }
    }
  }
}

// Rows first .. first + kQueries of a KV head's queries (row = query * group + head of the group), those there are.
template <class T, class N>
inline void attend_many(const Attention<T>& a, int64_t b, int64_t k, int64_t first, Blocks<N>& blocks,
                        int64_t first_block) {
  constexpr int kRows = kQueries;
  constexpr float kOne = kPair<N> == 1 ? 1 : kWeight;
  const float log_of_one = std::log2(kOne);
  const int64_t H = a.head_dim, width = blocks.width, group = a.group();
  const int64_t rows = std::min<int64_t>(kRows, a.queries * group - first);
  static thread_local std::vector<float> scratch;
  static thread_local std::vector<N> queries;
  scratch.resize(H + kRows * width);
  queries.resize(kRows * H + kLanes);
  float *rotated = scratch.data(), *sums = rotated + H, scores[kRows * kKeys];
  N weights[kRows * kKeys];
  Softmax<kRows> softmax;
  float query_steps[kRows], weight_steps[kRows], most[softmax.kWhole] = {};
  std::fill(sums, sums + kRows * width, 0);
  int64_t end[kRows];
  const float finest = std::min<float>(kFine, INT32_MAX / kFine / H);
  for (int r = 0; r < kRows; ++r) {
    const int64_t row = first + std::min<int64_t>(r, rows - 1), t = row / group;
    end[r] = a.start[b] + t + 1;
    rotate(a, b, t, k * group + row % group, kLog2e / std::sqrt(float(H)), rotated);
    query_steps[r] = narrow_row(rotated, H, finest, queries.data() + r * H);
  }
  for (int64_t s = 0; s < end[kRows - 1]; s += kKeys) {
    const Block<N> block = blocks[first_block + s / kKeys];
    const int64_t count = std::min<int64_t>(kKeys, end[kRows - 1] - s);  // that the last row sees
    product<kRows>(queries.data(), query_steps, H, block.keys, block.key_steps, kKeys, H, count, nullptr, scores);
    for (int r = 0; r < kRows; ++r) most[r] = highest(scores + r * kKeys, end[r] - s);
    softmax.go_on(most);
    for (int r = 0; r < kRows; ++r) {
      const Floats below = all(most[r] - log_of_one);
      Floats total = all(0.0f);
      for (int64_t j = r * kKeys; j < r * kKeys + count; j += kLanes) {
        total = total + put(weights + j, exp2(load(scores + j) - below));
      }
      weight_steps[r] = softmax.share[r] / kOne;
      softmax.add(r, total, weight_steps[r]);
    }
    product<kRows>(weights, weight_steps, kKeys, block.values, block.value_steps, width, count, width, softmax.factor,
                   sums);
  }
  for (int r = 0; r < rows; ++r) {
    const int64_t t = (first + r) / group, g = (first + r) % group;
    float* out = a.out + ((b * a.queries + t) * a.heads + k * group + g) * H;
    const Floats inverse = all(1 / softmax.sum_of(r));
    for (int64_t h = 0; h < H; h += kLanes) store_first(out + h, load(sums + r * width + h) * inverse, H - h);
  }
}

template <class T>
inline void attention(xla::ffi::ThreadPool& pool, const Attention<T>& a) {
  const int64_t B = a.batch, K = a.kv_heads;
  if (a.queries == 1) {
    parallel_for(pool, B * K, 1, [&](int64_t i) {
      write(a, i / K, i % K, 0);
      attend_group(a, i / K, i % K);
    });
    return;
  }
  int64_t count = 0;  // of blocks in the longest sequence
  for (int64_t b = 0; b < B; ++b) count = std::max<int64_t>(count, (a.start[b] + a.queries + kKeys - 1) / kKeys);
  static thread_local Blocks<Number<T>> scratch;
  Blocks<Number<T>>& blocks = scratch;  // this thread's, in the others too
  blocks.resize(B * K * count, a.head_dim);
  parallel_for(pool, B * K * count, 1, [&](int64_t i) {
    const int64_t b = i / (K * count), k = i / count % K, s = i % count * kKeys;
    if (s < a.start[b] + a.queries) pack(a, b, k, s, blocks.width, blocks[i]);
  });
  const int64_t tiles = (a.queries * a.group() + kQueries - 1) / kQueries;
  parallel_for(pool, B * K * tiles, 1, [&](int64_t i) {
    const int64_t head = i / tiles, tile = tiles - 1 - i % tiles;  // the longest first
    attend_many(a, head / K, head % K, tile * kQueries, blocks, head * count);
  });
}
