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
    step = largest(x, count) / most;  // NaN, if a number is, which rounding would lose
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
  const int64_t count = std::min<int64_t>(kKeys, end - s);
  const T *keys = a.row(a.keys, b, k, s), *values = a.row(a.values, b, k, s);
  float key_steps[kKeys], value_steps[kKeys];
  if constexpr (kSteps<T>) {
    read_steps(keys, H, a.row_len(), count, key_steps);
    read_steps(values, H, a.row_len(), count, value_steps);
  }
  for (int64_t j = 0; j < kKeys; ++j) {
    block.key_steps[j] = narrow_row(j < count ? keys + j * a.row_len() : zeros.data(), H, kFine, narrowed.data());
    if (kSteps<T> && j < count) block.key_steps[j] *= key_steps[j];
    for (int64_t h = 0; h < H; h += P) std::copy_n(&narrowed[h], P, block.keys + h * kKeys + P * j);
  }
  for (int64_t h = 0; h < width; h += kLanes) {
    Floats part[kKeys], largest = all(0.0f), nothing = all(0.0f);
    for (int j = 0; j < kKeys; ++j) {
      part[j] = h < H && j < count ? load_first(values + j * a.row_len() + h, H - h) : all(0.0f);
      if (kSteps<T> && j < count) part[j] = part[j] * all(value_steps[j]);
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

// a [kRows, length] times b [length / kPair, width, kPair], with the first `depth` of a, for the first `columns` of b:
// calls at(column)(row, sums) for each vector of columns.
template <int kRows, class N, class At>
inline void product(const N* a, int64_t length, const N* b, int64_t width, int64_t depth, int64_t columns,
                    const At& at) {
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
      const auto put = at(j + i * kLanes);
      UNROLL for (int r = 0; r < kRows; ++r) put(r, to_floats(total[r][i]));
    }
  }
}

// kQueries rows of a KV head's queries (row = query * group + head of the group), from block to block.
template <class T, class N>
class Tile {
 public:
  // Takes the rows from `first` on; the last one more than once if there are no more.
  void begin(const Attention<T>& a, int64_t b, int64_t k, int64_t first, int64_t width) {
    const int64_t H = a.head_dim, group = a.group(), rows = a.queries * group;
    const float finest = std::min<float>(kFine, INT32_MAX / kFine / H);
    queries_.resize(kRows * H + kLanes);
    rotated_.resize(H);
    sums_.assign(kRows * width, 0);
    softmax_ = {};
    for (int r = 0; r < kRows; ++r) {
      const int64_t row = std::min(first + r, rows - 1), t = row / group;
      end_[r] = a.start[b] + t + 1;
      rotate(a, b, t, k * group + row % group, kLog2e / std::sqrt(float(H)), rotated_.data());
      query_steps_[r] = narrow_row(rotated_.data(), H, finest, queries_.data() + r * H);
    }
  }

  // Attends to the block of the positions from s on.
  void attend(const Block<N>& block, int64_t s, int64_t H, int64_t width) {
    const int64_t count = std::min<int64_t>(kKeys, end_[kRows - 1] - s);  // that the last row sees
    if (count <= 0) return;
    float scores[kRows * kKeys];
    N weights[kRows * kKeys];
    product<kRows>(queries_.data(), H, block.keys, kKeys, H, count, [&](int64_t j) {
      return [&, j, steps = load(block.key_steps + j)](int r, Floats sums) {
        store(scores + r * kKeys + j, sums * (steps * all(query_steps_[r])));
      };
    });
    weigh(scores, s, count, weights);
    product<kRows>(weights, kKeys, block.values, width, count, width, [&](int64_t j) {
      return [&, to = sums_.data() + j, steps = load(block.value_steps + j)](int r, Floats sums) {
        store(to + r * width, fma(sums, steps * all(weight_steps_[r]), load(to + r * width) * all(softmax_.factor[r])));
      };
    });
  }

  void finish(const Attention<T>& a, int64_t b, int64_t k, int64_t first, int64_t width) const {
    const int64_t H = a.head_dim, group = a.group(), rows = std::min<int64_t>(kRows, a.queries * group - first);
    for (int r = 0; r < rows; ++r) {
      const int64_t t = (first + r) / group, g = (first + r) % group;
      float* out = a.out + ((b * a.queries + t) * a.heads + k * group + g) * H;
      const Floats inverse = all(1 / softmax_.sum_of(r));
      for (int64_t h = 0; h < H; h += kLanes) store_first(out + h, load(&sums_[r * width + h]) * inverse, H - h);
    }
  }

 private:
  static constexpr int kRows = kQueries;

  // The weights of a block's scores, relative to its highest one.
  void weigh(float* scores, int64_t s, int64_t count, N* weights) {
    constexpr float kOne = kPair<N> == 1 ? 1 : kWeight;
    static const float kLogOfOne = std::log2(kOne);
    float most[Softmax<kRows>::kWhole] = {};
    for (int r = 0; r < kRows; ++r) most[r] = highest(scores + r * kKeys, end_[r] - s);
    softmax_.go_on(most);
    for (int r = 0; r < kRows; ++r) {
      const Floats below = all(most[r] - kLogOfOne);
      Floats total = all(0.0f);
      for (int64_t j = r * kKeys; j < r * kKeys + count; j += kLanes) {
        total = total + put(weights + j, exp2(load(scores + j) - below));
      }
      weight_steps_[r] = softmax_.share[r] / kOne;
      softmax_.add(r, total, weight_steps_[r]);
    }
  }

  std::vector<N> queries_;                // [kRows, head_dim]
  std::vector<float> rotated_, sums_;     // [head_dim], [kRows, width]
  float query_steps_[kRows], weight_steps_[kRows];
  int64_t end_[kRows];                    // how many positions a row sees
  Softmax<kRows> softmax_;
};

// Tiles that share a block of keys and values while it is in a core's first-level cache.
constexpr int64_t kTiles = 8;

// The queries of each sequence.
template <class T>
inline void attend_many(xla::ffi::ThreadPool& pool, const Attention<T>& a) {
  using N = Number<T>;
  const int64_t B = a.batch, K = a.kv_heads, H = a.head_dim;
  int64_t count = 0;  // of blocks in the longest sequence
  for (int64_t b = 0; b < B; ++b) count = std::max<int64_t>(count, (a.start[b] + a.queries + kKeys - 1) / kKeys);
  static thread_local Blocks<N> scratch;
  Blocks<N>& blocks = scratch;  // this thread's, in the others too
  blocks.resize(B * K * count, H);
  parallel_for(pool, B * K * count, 1, [&](int64_t i) {
    const int64_t b = i / (K * count), k = i / count % K, s = i % count * kKeys;
    if (s < a.start[b] + a.queries) pack(a, b, k, s, blocks.width, blocks[i]);
  });
  const int64_t rows = a.queries * a.group(), each = kTiles * kQueries, parts = (rows + each - 1) / each;
  parallel_for(pool, B * K * parts, 1, [&](int64_t i) {
    const int64_t head = i / parts, b = head / K, k = head % K;
    const int64_t first = (parts - 1 - i % parts) * each;  // the longest first
    static thread_local std::vector<Tile<T, N>> tiles;
    tiles.resize((std::min(first + each, rows) - first + kQueries - 1) / kQueries);
    const auto row = [&](const auto& tile) { return first + (&tile - tiles.data()) * kQueries; };
    for (auto& tile : tiles) tile.begin(a, b, k, row(tile), blocks.width);
    for (int64_t s = 0; s < a.start[b] + a.queries; s += kKeys) {
      for (auto& tile : tiles) tile.attend(blocks[head * count + s / kKeys], s, H, blocks.width);
    }
    for (auto& tile : tiles) tile.finish(a, b, k, row(tile), blocks.width);
  });
}
